/* lens.cu - the virtual edit of a writer, the twin of lens.c: y -= strength * B^T (B y) for rows of y [T,H], B [R,H].
 *
 * A block takes a row. Coefficients come from the unedited row, TOGETHER of them a sweep, into shared memory f32 [R];
 * then every element is edited in ascending order of r, as on the CPU. The row and B come from the caches after the first
 * sweep, so device memory sees one read and one write of y. */
#include "cuda.cuh"

#define THREADS 256
#define TOGETHER 4

__global__ void lens_rows(float *y, int64_t hidden, const float *basis, int64_t rank, float strength) {
    DYN_SHARED(float, c);
    SHARED_ARRAY(float, room, WARP);
    y += blockIdx.x * hidden;
    for (int64_t first = 0; first < rank; first += TOGETHER) {
        float dot[TOGETHER] = {};
        for (int64_t i : block_stride(hidden)) {
            float x = y[i];
            for (int k = 0; k < TOGETHER; k++)
                if (first + k < rank) dot[k] += basis[(first + k) * hidden + i] * x;
        }
        for (int k = 0; k < TOGETHER && first + k < rank; k++) {
            float sum = block_sum(dot[k], room);
            if (threadIdx.x == 0) c[first + k] = strength * sum;
        }
    }
    __syncthreads();
    for (int64_t i : block_stride(hidden)) {
        float x = y[i];
        for (int64_t r = 0; r < rank; r++) x -= c[r] * basis[r * hidden + i];
        y[i] = x;
    }
}

extern "C" exc_status exc_cuda_lens(exc_queue *q, const struct exc_lens_args *a) {
    if (a->tokens < 0 || a->hidden < 1 || a->rank < 0 || a->rank > 4096) return EXC_ERR_USAGE;
    ENQUEUE(q, lens_rows, (unsigned)(a->rank ? a->tokens : 0), THREADS, (size_t)a->rank * sizeof(float), a->y, a->hidden, a->basis,
            a->rank, a->strength);
    return EXC_OK;
}
