/* gate.cu - heads weighed by a gate of their own, the twin of gate.c: y = norm(x) * f(g), f sigmoid or silu, the norm optional.
 *
 * A warp takes a head. It reads the head twice where it is normed, the second time from the first-level cache; a lane
 * reads an element before it writes it, so y may be x. */
#include "cuda.cuh"

template <class X> __device__ float inverse_of(const X *x, int64_t dim, float eps, int64_t lane) {
    float s = 0;
    for (int64_t i = lane; i < dim; i += WARP) s += widen(x[i]) * widen(x[i]);
    return 1.0f / sqrtf(warp_sum(s) / (float)dim + eps);
}

template <class X, class Y>
__global__ void gate_heads(const X *x, const float *g, int64_t g_stride, int silu, const float *weight, float eps, int64_t units,
                           int64_t heads, int64_t dim, Y *y) {
    int64_t unit = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (unit >= units) return; /* whole warps */
    x += unit * dim;
    y += unit * dim;
    g += unit / heads * g_stride + unit % heads * dim;
    float inverse = weight ? inverse_of(x, dim, eps, lane) : 1.0f;
    for (int64_t i = lane; i < dim; i += WARP) {
        float v = widen(x[i]), e = 1.0f + expf(-g[i]);
        if (weight) v = weight[i] * (v * inverse);
        y[i] = narrow<Y>(silu ? v * (g[i] / e) : v / e);
    }
}

template <class X, class Y> static exc_status enqueue(exc_queue *q, const struct exc_gate_args *a) {
    int64_t units = a->tokens * a->heads;
    ENQUEUE(q, (gate_heads<X, Y>), (unsigned)ceil_div(units, 4), 4 * WARP, 0, (const X *)a->x, a->g, a->g_stride, a->silu, a->weight,
            a->eps, units, a->heads, a->dim, (Y *)a->y);
    return EXC_OK;
}

extern "C" exc_status exc_cuda_gate(exc_queue *q, const struct exc_gate_args *a) {
    if (a->tokens < 0 || a->heads < 1 || a->dim < 1) return EXC_ERR_USAGE;
    if (a->x_dtype != EXC_F32 && a->x_dtype != EXC_BF16) return EXC_ERR_USAGE;
    BY_ACT(a->act, return a->x_dtype == EXC_F32 ? enqueue<float, T>(q, a) : enqueue<bf16, T>(q, a));
    return EXC_ERR_USAGE;
}
