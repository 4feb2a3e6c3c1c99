/* bundle.cu - a product a head, y[t,h,:] = x[t,h,:] W_h^T, on the device, the twin of bundle.c. Tiles and arithmetic:
 * product.cuh; a head is a plane of the grid. */
#include "product.cuh"

template <class TILE> __global__ void __launch_bounds__(TILE::THREADS) bundle_tiles(const struct exc_bundle_args a, bool whole) {
    DYN_SHARED(unsigned char, shared);
    SHARED_ARRAY(const unsigned char *, row, TILE::BM);
    using T = typename TILE::Act;
    const exc_packed packed = a.w[blockIdx.z];
    const Plane w = plane_of(packed);
    const int64_t first = (int64_t)blockIdx.y * TILE::BM, column = (int64_t)blockIdx.x * TILE::BN, head = blockIdx.z;
    if (column >= packed.n) return;
    Rows rows = {row, (int)(a.rows - first < TILE::BM ? a.rows - first : TILE::BM), whole && w.k % 8 == 0};
    for (int i : block_stride(TILE::BM))
        row[i] = reinterpret_cast<const unsigned char *>(static_cast<const T *>(a.x) + (first + (i < rows.count ? i : 0)) * a.x_stride +
                                                         head * a.x_step);
    __syncthreads();
    const float *out = TILE::run(shared, rows, &w, column);
    for (int i : block_stride(rows.count * TILE::BN)) {
        const int r = i / TILE::BN, c = i % TILE::BN;
        if (column + c < packed.n)
            static_cast<T *>(a.y)[(first + r) * a.y_stride + head * a.y_step + column + c] = narrow<T>(out[r * TILE::OUT + c]);
    }
}

template <class TILE> static exc_status run(exc_queue *q, const struct exc_bundle_args *a) {
    const size_t act = sizeof(typename TILE::Act);
    const bool whole = aligned(a->x, 16) && a->x_stride * act % 16 == 0 && a->x_step * act % 16 == 0;
    const dim3 grid((unsigned)ceil_div(a->outputs, TILE::BN), (unsigned)ceil_div(a->rows, TILE::BM), (unsigned)a->heads);
    ENQUEUE(q, bundle_tiles<TILE>, grid, TILE::THREADS, TILE::SHARED, *a, whole);
    return EXC_OK;
}

extern "C" exc_status exc_cuda_bundle(exc_queue *q, const struct exc_bundle_args *a) {
    if (!a->w || a->rows < 0 || a->heads < 0 || a->outputs < 0 || a->rows > 65535 * 16 || a->heads > 65535) return EXC_ERR_USAGE;
    if (a->act != EXC_F32 && (a->act != EXC_BF16 || a->w_dtype == EXC_F32)) return EXC_ERR_USAGE;
    if (!a->rows || !a->heads || !a->outputs) return EXC_OK;
    BY_TILE(a->act, a->w_dtype, 1, a->rows, return run<TILE>(q, a));
}
