/* matmul.cu - y [T,n] = x [T,k] W^T (+ bias) (+ add) on the device, the twin of matmul.c. Tiles and arithmetic: product.cuh.
 *
 * Blocks that share rows of x run beside each other (outputs are the fast axis), so x comes from the second-level cache while W
 * streams once for each block of rows. From 128 rows on the tile is 128 x 128: each operand byte is used twice as often. */
#include "product.cuh"

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

template <class TILE> static exc_status run(exc_queue *q, const struct exc_matmul_args *a) {
    const bool whole = aligned(a->x, 16) && a->x_stride % 8 == 0 && a->w->k % 8 == 0;
    const dim3 grid((unsigned)ceil_div(a->w->n, TILE::BN), (unsigned)ceil_div(a->rows, TILE::BM));
    struct exc_matmul_args there = *a;
    there.w = nullptr; /* it is on the host */
    ENQUEUE(q, matmul_tiles<TILE>, grid, TILE::THREADS, TILE::SHARED, there, plane_of(*a->w), a->w->n, whole);
    return EXC_OK;
}

extern "C" exc_status exc_cuda_matmul(exc_queue *q, const struct exc_matmul_args *a) {
    if (!a->w || a->rows < 0 || a->w->k < 1 || a->w->n < 0 || a->rows > 65535 * 16) return EXC_ERR_USAGE;
    if (a->act != EXC_F32 && (a->act != EXC_BF16 || a->w->dtype == EXC_F32)) return EXC_ERR_USAGE;
    if (!a->rows || !a->w->n) return EXC_OK;
    if (!a->w->data) return EXC_ERR_USAGE;
    if (a->act == EXC_BF16 && a->w->dtype == EXC_BF16 && a->rows > 64 && a->w->n >= 128)
        return run<TensorTile<EXC_BF16, 128, 128, 1, 2, 4>>(q, a);
    BY_TILE(a->act, a->w->dtype, 1, a->rows, return run<TILE>(q, a));
}
