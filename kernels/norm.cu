/* norm.cu - RMS norm of rows, the twin of norm.c: y = w * (x * 1/sqrt(mean(x^2) + eps)).
 *
 * Wide rows take a block each, narrow ones (heads) a warp. A row is read twice, the second time from the first-level cache,
 * four numbers a load where the rows are aligned. The sum's order is fixed by dim alone. */
#include "cuda.cuh"

#define NARROW 1024 /* rows up to this long take a warp */

template <class T> struct alignas(4 * sizeof(T)) Quad { T v[4]; };

/* threads `i` of `n` share a row; V numbers a load */
template <int V> __device__ float squares(const float *x, int64_t dim, int64_t i, int64_t n) {
    float s = 0;
    if (V == 4)
        for (int64_t k = i; k < dim / 4; k += n) {
            float4 f = reinterpret_cast<const float4 *>(x)[k];
            s += (f.x * f.x + f.y * f.y) + (f.z * f.z + f.w * f.w);
        }
    else
        for (int64_t k = i; k < dim; k += n) s += x[k] * x[k];
    return s;
}

template <int V, class T>
__device__ void write_row(const float *x, const float *w, float shift, float inverse, int64_t dim, int64_t i, int64_t n, T *y) {
    if (V == 4)
        for (int64_t k = i; k < dim / 4; k += n) {
            float4 f = reinterpret_cast<const float4 *>(x)[k], g = reinterpret_cast<const float4 *>(w)[k];
            Quad<T> out = {{narrow<T>((g.x + shift) * (f.x * inverse)), narrow<T>((g.y + shift) * (f.y * inverse)),
                            narrow<T>((g.z + shift) * (f.z * inverse)), narrow<T>((g.w + shift) * (f.w * inverse))}};
            reinterpret_cast<Quad<T> *>(y)[k] = out;
        }
    else
        for (int64_t k = i; k < dim; k += n) y[k] = narrow<T>((w[k] + shift) * (x[k] * inverse));
}

template <int V, class T> __global__ void norm_wide(const float *x, int64_t x_stride, const float *w, float shift, float eps,
                                                    int64_t dim, T *y, int64_t y_stride) {
    SHARED_ARRAY(float, room, WARP);
    x += blockIdx.x * x_stride;
    float inverse = 1.0f / sqrtf(block_sum(squares<V>(x, dim, threadIdx.x, blockDim.x), room) / (float)dim + eps);
    write_row<V>(x, w, shift, inverse, dim, threadIdx.x, blockDim.x, y + blockIdx.x * y_stride);
}

template <int V, class T> __global__ void norm_narrow(const float *x, int64_t x_stride, const float *w, float shift, float eps,
                                                      int64_t rows, int64_t dim, T *y, int64_t y_stride) {
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return; /* whole warps */
    x += row * x_stride;
    float inverse = 1.0f / sqrtf(warp_sum(squares<V>(x, dim, lane, WARP)) / (float)dim + eps);
    write_row<V>(x, w, shift, inverse, dim, lane, WARP, y + row * y_stride);
}

template <int V, class T> static exc_status enqueue(exc_queue *q, const struct exc_norm_args *a) {
    float shift = a->zero_centred ? 1.0f : 0.0f;
    if (a->dim <= NARROW)
        ENQUEUE(q, (norm_narrow<V, T>), grid_for(a->rows, 4), 4 * WARP, 0, a->x, a->x_stride, a->weight, shift, a->eps,
                a->rows, a->dim, (T *)a->y, a->y_stride);
    else
        ENQUEUE(q, (norm_wide<V, T>), (unsigned)a->rows, 256, 0, a->x, a->x_stride, a->weight, shift, a->eps, a->dim,
                (T *)a->y, a->y_stride);
    return EXC_OK;
}

extern "C" exc_status exc_cuda_norm(exc_queue *q, const struct exc_norm_args *a) {
    if (a->rows < 0 || a->dim < 1) return EXC_ERR_USAGE;
    BY_ACT(a->act, {
        bool fours = a->dim % 4 == 0 && a->x_stride % 4 == 0 && a->y_stride % 4 == 0 && aligned(a->x, 16) &&
                     aligned(a->weight, 16) && aligned(a->y, 4 * sizeof(T));
        return fours ? enqueue<4, T>(q, a) : enqueue<1, T>(q, a);
    });
    return EXC_ERR_USAGE;
}
