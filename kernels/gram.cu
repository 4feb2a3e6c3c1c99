/* gram.cu - Gram matrices of samples in f64 on the device, the twin of gram.c: X X^T or X^T X, one a layer,
 * uncentred.
 *
 * A block owns a tile of 64 x 64 of the lower triangle and mirrors it. Samples are widened once, on their way
 * to shared memory, and met there 16 deep; a thread keeps 4 x 4 sums. Products of two f32 are exact in f64,
 * and every sum is one chain over ascending depth: X^T X has the bits of the CPU, X X^T, which the CPU sums
 * in lanes, its value to n * 2^-53. */
#include "cuda.cuh"

namespace {

constexpr int TILE = 64, DEEP = 16, THREADS = 256, EACH = 4; /* a thread's sums: rows and columns 16 apart */

/* element (i, k) of the factor: row i of X, or column i of X^T's sum over samples */
template <int SIDE>
__device__ inline double element(const exc_gram_args &a, const float *x, int64_t i, int64_t k) {
    return (double)(SIDE == EXC_GRAM_SAMPLES ? x[i * a.row_stride + k] : x[k * a.row_stride + i]);
}

/* rows first.. of the factor, depth k.. -> [DEEP, TILE], zero beyond the ends; neighbours in memory are read
 * by neighbours */
template <int SIDE>
__device__ inline void load(const exc_gram_args &a, const float *x, int64_t first, int64_t k, int64_t size,
                            int64_t depth, double *to) {
    for (int at = threadIdx.x; at < TILE * DEEP; at += THREADS) {
        const int i = SIDE == EXC_GRAM_SAMPLES ? at / DEEP : at % TILE,
                  d = SIDE == EXC_GRAM_SAMPLES ? at % DEEP : at / TILE;
        to[d * (TILE + 1) + i] =
            first + i < size && k + d < depth ? element<SIDE>(a, x, first + i, k + d) : 0.0;
    }
}

template <int SIDE>
__global__ void __launch_bounds__(THREADS) gram(exc_gram_args a, int64_t size, int64_t depth) {
    SHARED_ARRAY(double, p, DEEP *(TILE + 1));
    SHARED_ARRAY(double, q, DEEP *(TILE + 1));
    int down = 0, left = blockIdx.x; /* tile of the triangle, row by row */
    while (left > down) left -= ++down;
    const float *x = a.x + blockIdx.y * a.layer_stride;
    double *g = a.g + blockIdx.y * size * size, sum[EACH][EACH] = {};
    const int64_t row = (int64_t)down * TILE, col = (int64_t)left * TILE;
    const int i = threadIdx.x / 16, j = threadIdx.x % 16;
    for (int64_t k = 0; k < depth; k += DEEP) {
        load<SIDE>(a, x, row, k, size, depth, p);
        load<SIDE>(a, x, col, k, size, depth, q);
        __syncthreads();
        for (int d = 0; d < DEEP; d++) {
            double u[EACH], v[EACH];
#pragma unroll
            for (int e = 0; e < EACH; e++)
                u[e] = p[d * (TILE + 1) + i + 16 * e], v[e] = q[d * (TILE + 1) + j + 16 * e];
#pragma unroll
            for (int e = 0; e < EACH; e++)
#pragma unroll
                for (int f = 0; f < EACH; f++) sum[e][f] = fma(u[e], v[f], sum[e][f]);
        }
        __syncthreads();
    }
    for (int e = 0; e < EACH; e++)
        for (int f = 0; f < EACH; f++) {
            const int64_t r = row + i + 16 * e, c = col + j + 16 * f;
            if (r >= size || c >= size || c > r) continue;
            g[r * size + c] = sum[e][f];
            g[c * size + r] = sum[e][f];
        }
}

} // namespace

extern "C" exc_status exc_cuda_gram(exc_queue *q, const struct exc_gram_args *a) {
    if (a->layers < 0 || a->samples < 0 || a->width < 0 || a->row_stride < a->width) return EXC_ERR_USAGE;
    if (a->side != EXC_GRAM_SAMPLES && a->side != EXC_GRAM_WIDTH) return EXC_ERR_USAGE;
    const bool samples = a->side == EXC_GRAM_SAMPLES;
    const int64_t size = samples ? a->samples : a->width, depth = samples ? a->width : a->samples,
                  tiles = ceil_div(size, TILE);
    if (a->layers > 65535 || tiles > 65535) return EXC_ERR_USAGE;
    const dim3 grid((unsigned)(tiles * (tiles + 1) / 2), (unsigned)a->layers);
    if (samples)
        ENQUEUE(q, gram<EXC_GRAM_SAMPLES>, grid, THREADS, 0, *a, size, depth);
    else
        ENQUEUE(q, gram<EXC_GRAM_WIDTH>, grid, THREADS, 0, *a, size, depth);
    return EXC_OK;
}
