/* matmul.cu - y [T,n] = x [T,k] W^T (+ bias) (+ add) on the device, the twin of matmul.c. Tiles and arithmetic: product.cuh.
 *
 * Blocks that share rows of x run beside each other (outputs are the fast axis), so x comes from the second-level cache while W
 * streams once for each block of rows. Above 64 rows the tile is 128 x 128: each operand byte is used twice as often.
 *
 * There, where arithmetic and not the reading of W is the limit, cuBLASLt does it if it is at hand and operands are of one
 * dtype. Not on a reproducible queue: which algorithm it takes, and so a row's bits, depends on how many rows there are. Fewer
 * rows stay with our tiles, as do codes, which it does not read, and f32 rows against bf16 weights. */
#include "libraries.cuh"
#include "wide.cuh"

template <class TILE> __global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS) matmul_tiles(const struct exc_matmul_args a, Plane w, int64_t n, bool whole) {
    DYN_SHARED(unsigned char, shared);
    SHARED_ARRAY(const unsigned char *, row, TILE::BM);
    using T = typename TILE::Act;
    const int64_t first = (int64_t)blockIdx.y * TILE::BM, column = (int64_t)blockIdx.x * TILE::BN;
    Rows rows = {row, (int)(a.rows - first < TILE::BM ? a.rows - first : TILE::BM), whole};
    for (int i : block_stride(TILE::BM))
        row[i] = reinterpret_cast<const unsigned char *>(static_cast<const T *>(a.x) + (first + (i < rows.count ? i : 0)) * a.x_stride);
    __syncthreads();
    const float *out = TILE::run(shared, rows, &w, column);
    for (int i : block_stride(rows.count * TILE::BN)) {
        const int r = i / TILE::BN, c = i % TILE::BN;
        if (column + c >= n) continue;
        const int64_t at = (first + r) * a.y_stride + column + c;
        float y = out[r * TILE::OUT + c];
        if (a.bias) y += a.bias[column + c];
        if (a.add) y += a.add[at];
        a.y[at] = y;
    }
}

static bool whole(const struct exc_matmul_args *a) { return aligned(a->x, 16) && a->x_stride % 8 == 0 && a->w->k % 8 == 0; }

template <class TILE> static exc_status run(exc_queue *q, const struct exc_matmul_args *a) {
    const dim3 grid((unsigned)ceil_div(a->w->n, TILE::BN), (unsigned)ceil_div(a->rows, TILE::BM));
    struct exc_matmul_args there = *a;
    there.w = nullptr; /* it is on the host */
    ENQUEUE(q, matmul_tiles<TILE>, grid, TILE::THREADS, TILE::SHARED, there, plane_of(*a->w), a->w->n, whole(a));
    return EXC_OK;
}

constexpr int64_t FEW = 64; /* rows */

/* whether cuBLASLt's reading of the arguments is legal: y^T = W x^T in columns, W's rows one after the other (ops.h) */
static bool by_library(const exc_queue *q, const struct exc_matmul_args *a, Product *p) {
    const int64_t unit = a->act == EXC_F32 ? 4 : 2, pitch = ceil_div(a->w->k, K_WHOLE) * K_WHOLE;
    if (q->reproducible || a->rows <= FEW || a->act != a->w->dtype) return false;
    for (const void *pointer : {a->x, a->w->data, (const void *)a->bias, (const void *)a->add, (const void *)a->y})
        if (!aligned(pointer, 16)) return false;
    if (a->x_stride * unit % 16 || a->y_stride % 4 || a->w->k * unit % 16 || a->w->n > INT32_MAX || pitch > INT32_MAX) return false;
    p->operand = a->act == EXC_F32 ? nv::CUDA_R_32F : nv::CUDA_R_16BF;
    p->m = a->w->n, p->n = a->rows, p->k = a->w->k;
    p->turn_a = 1, p->lda = pitch, p->ldb = a->x_stride, p->ldd = a->y_stride;
    p->batch = 1;
    p->add = a->add != nullptr, p->bias = a->bias != nullptr;
    return true;
}

extern "C" exc_status exc_cuda_matmul(exc_queue *q, const struct exc_matmul_args *a) {
    if (!a->w || a->rows < 0 || a->w->k < 1 || a->w->n < 0 || a->rows > 65535 * 16) return EXC_ERR_USAGE;
    if (a->act != EXC_F32 && (a->act != EXC_BF16 || a->w->dtype == EXC_F32)) return EXC_ERR_USAGE;
    if (!a->rows || !a->w->n) return EXC_OK;
    if (!a->w->data) return EXC_ERR_USAGE;
    Product p = {};
    if (by_library(q, a, &p)) {
        exc_status st;
        const Plan *plan = exc_product_plan(q, p, &st);
        if (st != EXC_OK) return st;
        if (plan) {
            Carve work(q);
            char *workspace = work.take<char>(BLAS_WORKSPACE);
            return work.ready() ? exc_product(q, plan, a->w->data, a->x, a->add, a->y, a->bias, workspace) : work.status;
        }
    }
    if (a->w->n >= 128) BY_WIDE(q, a->act, a->w->dtype, whole(a), 1, a->rows, return run<TILE>(q, a));
    if (a->act == EXC_BF16 && a->w->dtype == EXC_BF16 && a->rows > 64 && a->w->n >= 128)
        return run<TensorTile<EXC_BF16, 128, 128, 1, 2, 4>>(q, a);
    BY_TILE(a->act, a->w->dtype, 1, a->rows, return run<TILE>(q, a));
}
