/* gather.cu - y [rows] = row index[r] / share of x, bit for bit, on the device; the twin of gather.c.
 *
 * A block takes a stretch of one row, in the widest words that width and addresses allow. */
#include "cuda.cuh"

#define THREADS 256

template <class T> __global__ void gather_rows(const T *x, const int32_t *index, int64_t share, int64_t words, T *y) {
    const int64_t r = blockIdx.x, step = (int64_t)gridDim.y * THREADS;
    const T *from = x + index[r] / share * words;
    T *to = y + r * words;
    for (int64_t i = (int64_t)blockIdx.y * THREADS + threadIdx.x; i < words; i += step) to[i] = from[i];
}

template <class T> static exc_status gather(exc_queue *q, const struct exc_gather_args *a) {
    const int64_t words = (int64_t)(a->width / sizeof(T));
    const dim3 grid((unsigned)a->rows, grid_for(words, THREADS, 1, 64));
    ENQUEUE(q, gather_rows<T>, grid, THREADS, 0, static_cast<const T *>(a->x), a->index, a->share, words, static_cast<T *>(a->y));
    return EXC_OK;
}

extern "C" exc_status exc_cuda_gather(exc_queue *q, const struct exc_gather_args *a) {
    if (a->rows < 0 || a->rows > INT32_MAX || a->share < 1 || a->width % 2) return EXC_ERR_USAGE;
    if (!a->rows || !a->width) return EXC_OK;
    if (a->width % 16 == 0 && aligned(a->x, 16) && aligned(a->y, 16)) return gather<int4>(q, a);
    return a->width % 4 == 0 && aligned(a->x, 4) && aligned(a->y, 4) ? gather<uint32_t>(q, a) : gather<uint16_t>(q, a);
}
