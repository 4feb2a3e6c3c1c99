/* rope.cu - head norm, rotation and store into the KV cache, the twin of rope.c.
 *
 * A block takes eight heads of one token, a warp each: of its q_heads queries, kv_heads keys, kv_heads values, in this order. The
 * token's cosines and sines are made once a block, in shared memory f32 [2, rotary/2]. A head is read twice, the second
 * time from the first-level cache; pairs (i, i + rotary/2) belong to one lane. */
#include "angle.cuh"

#define HEADS 8 /* of a block */

struct Head {
    const float *from;
    const float *weight; /* of the norm, or NULL */
    int64_t to;          /* element of its output */
    bool turned;
};

/* 1/rms of a head, the same for all lanes */
__device__ static float inverse_of(const float *x, int64_t dim, float eps, int lane) {
    float s = 0;
    for (int64_t i = lane; i < dim; i += WARP) s += x[i] * x[i];
    return 1.0f / sqrtf(warp_sum(s) / (float)dim + eps);
}

template <class T> __device__ void head_row(const struct exc_rope_args &a, const Head &h, const float *cosine, const float *sine,
                                            int lane, T *out) {
    int64_t half = h.turned ? a.rotary / 2 : 0;
    float shift = a.zero_centred ? 1.0f : 0.0f, inverse = h.weight ? inverse_of(h.from, a.head_dim, a.eps, lane) : 1.0f;
    auto normed = [&](int64_t i) { return h.weight ? (h.weight[i] + shift) * (h.from[i] * inverse) : h.from[i]; };
    out += h.to;
    for (int64_t i = lane; i < half; i += WARP) {
        float u = normed(i), v = normed(i + half);
        out[i] = narrow<T>(u * cosine[i] - v * sine[i]);
        out[i + half] = narrow<T>(v * cosine[i] + u * sine[i]);
    }
    for (int64_t i = 2 * half + lane; i < a.head_dim; i += WARP) out[i] = narrow<T>(normed(i));
}

template <class T> __global__ void rope_heads(const struct exc_rope_args a) {
    DYN_SHARED(float, cosine);
    float *sine = cosine + a.rotary / 2;
    int64_t t = blockIdx.x, head = (int64_t)blockIdx.y * HEADS + threadIdx.x / WARP, D = a.head_dim;
    int lane = (int)threadIdx.x % WARP;
    for (int64_t i : block_stride(a.rotary / 2)) turn((double)a.position[t], a.inv_freq[i], a.attention_factor, cosine + i, sine + i);
    __syncthreads();
    if (head < a.q_heads) {
        Head h = {a.q + t * a.q_stride + head * D, a.q_norm, (t * a.q_heads + head) * D, true};
        head_row(a, h, cosine, sine, lane, (T *)a.q_out);
    } else if ((head -= a.q_heads) < a.kv_heads) {
        Head h = {a.k + t * a.k_stride + head * D, a.k_norm, (a.cache_row[t] * a.kv_heads + head) * D, true};
        head_row(a, h, cosine, sine, lane, (T *)a.cache_k);
    } else if ((head -= a.kv_heads) < a.kv_heads) {
        Head h = {a.v + t * a.v_stride + head * D, nullptr, (a.cache_row[t] * a.kv_heads + head) * D, false};
        head_row(a, h, cosine, sine, lane, (T *)a.cache_v);
    }
}

extern "C" exc_status exc_cuda_rope(exc_queue *q, const struct exc_rope_args *a) {
    if (a->tokens < 0 || a->q_heads < 1 || a->kv_heads < 1 || a->head_dim < 1) return EXC_ERR_USAGE;
    if (a->rotary < 0 || a->rotary > a->head_dim || a->rotary % 2 || a->rotary > 4096) return EXC_ERR_USAGE;
    dim3 grid((unsigned)a->tokens, (unsigned)ceil_div(a->q_heads + 2 * a->kv_heads, HEADS));
    BY_ACT(a->act, ENQUEUE(q, rope_heads<T>, grid, HEADS * WARP, (size_t)a->rotary * sizeof(float), *a));
    return EXC_OK;
}
