/* latent.cu - queries, latent and shared key of multi-head latent attention into place, the twin of latent.c.
 *
 * A block takes eight pieces of one token, a warp each: piece 0 is its row of the cache (the norm of the latent, the turned
 * key), the others are its heads. The token's cosines and sines are made once a block, in shared memory f32 [2, R/2]. A lane
 * takes four channels at a time, in one load and one store where all rows are aligned; the order of the norm's sum is that
 * of the four either way, so that alignment changes no bit. The key of a head (k_turned) is turned again from the
 * first-level cache. */
#include "angle.cuh"

namespace {

constexpr int PIECES = 8; /* of a block */

template <class T> struct alignas(4 * sizeof(T)) Four { T v[4]; };

/* channels i .. i+3 of x, zeros from n on; V numbers a load */
template <int V> __device__ Four<float> load(const float *x, int64_t i, int64_t n) {
    Four<float> f;
    if (V == 4) f = *reinterpret_cast<const Four<float> *>(x + i);
    else
        for (int j = 0; j < 4; j++) f.v[j] = i + j < n ? x[i + j] : 0.0f;
    return f;
}

template <int V, class T> __device__ void store(Four<float> f, T *y, int64_t i, int64_t n) {
    if (V == 4) *reinterpret_cast<Four<T> *>(y + i) = {{narrow<T>(f.v[0]), narrow<T>(f.v[1]), narrow<T>(f.v[2]), narrow<T>(f.v[3])}};
    else
        for (int j = 0; j < 4 && i + j < n; j++) y[i + j] = narrow<T>(f.v[j]);
}

template <int V, class T> __device__ void copy_row(const float *x, int64_t n, int lane, T *y) {
    for (int64_t i = 4 * lane; i < n; i += 4 * WARP) store<V>(load<V>(x, i, n), y, i, n);
}

/* `also`: a second place for the same numbers, or NULL */
template <int V, class T> __device__ void norm_row(const float *x, const float *weight, float eps, int64_t n, int lane, T *y, T *also) {
    float sum = 0;
    for (int64_t i = 4 * lane; i < n; i += 4 * WARP) {
        const Four<float> f = load<V>(x, i, n);
        sum += (f.v[0] * f.v[0] + f.v[1] * f.v[1]) + (f.v[2] * f.v[2] + f.v[3] * f.v[3]);
    }
    const float inverse = 1.0f / sqrtf(warp_sum(sum) / (float)n + eps);
    for (int64_t i = 4 * lane; i < n; i += 4 * WARP) {
        Four<float> f = load<V>(x, i, n), w = load<V>(weight, i, n);
        for (int j = 0; j < 4; j++) f.v[j] = w.v[j] * (f.v[j] * inverse);
        store<V>(f, y, i, n);
        if (also) store<V>(f, also, i, n);
    }
}

/* pair i is channels 2i and 2i+1 where they are adjacent, else i and i + half */
template <class T> __device__ void turn_row(const float *x, const float *cosine, const float *sine, int64_t half, bool adjacent,
                                            int lane, T *y, T *also) {
    for (int64_t i = lane; i < half; i += WARP) {
        const int64_t first = adjacent ? 2 * i : i, second = adjacent ? 2 * i + 1 : i + half;
        const float u = x[first], v = x[second];
        const T a = narrow<T>(u * cosine[i] - v * sine[i]), b = narrow<T>(v * cosine[i] + u * sine[i]);
        y[first] = a, y[second] = b;
        if (also) also[first] = a, also[second] = b;
    }
}

template <int V, class T> __global__ void __launch_bounds__(PIECES *WARP) latent_pieces(const struct exc_latent_args a) {
    DYN_SHARED(float, cosine);
    const int64_t N = a.plain, R = a.rotary, C = a.latent, t = blockIdx.x, piece = (int64_t)blockIdx.y * PIECES + threadIdx.x / WARP;
    const int lane = (int)threadIdx.x % WARP;
    const float *sine = cosine + R / 2, *kv = a.kv + t * a.kv_stride;
    for (int64_t i : block_stride(R / 2)) turn((double)a.position[t], a.inv_freq[i], a.attention_factor, cosine + i, cosine + R / 2 + i);
    __syncthreads();
    if (piece == 0) {
        T *row = (T *)a.cache + a.cache_row[t] * (C + R), *also = a.rows ? (T *)a.rows + t * (C + R) : nullptr;
        norm_row<V>(kv, a.weight, a.eps, C, lane, row, also);
        turn_row(kv + C, cosine, sine, R / 2, a.adjacent, lane, row + C, also ? also + C : nullptr);
    } else if (piece <= a.heads) {
        const int64_t h = piece - 1, u = t * a.heads + h;
        const float *q = a.q + t * a.q_stride + h * (N + R);
        T *none = nullptr;
        copy_row<V>(q, N, lane, (T *)a.q_plain + u * a.plain_step);
        turn_row(q + N, cosine, sine, R / 2, a.adjacent, lane, (T *)a.q_turned + u * a.turned_step, none);
        if (a.k_turned) turn_row(kv + C, cosine, sine, R / 2, a.adjacent, lane, (T *)a.k_turned + u * a.turned_step, none);
    }
}

/* whether four channels of every row that is taken by fours lie in one aligned load and store */
template <class T> bool by_fours(const struct exc_latent_args *a) {
    const int64_t all = a->q_stride | a->kv_stride | a->plain | a->rotary | a->latent | a->plain_step;
    return all % 4 == 0 && aligned(a->q, 16) && aligned(a->kv, 16) && aligned(a->weight, 16) &&
           aligned(a->q_plain, 4 * sizeof(T)) && aligned(a->cache, 4 * sizeof(T)) && aligned(a->rows, 4 * sizeof(T));
}

} // namespace

extern "C" exc_status exc_cuda_latent(exc_queue *q, const struct exc_latent_args *a) {
    if (a->tokens < 0 || a->heads < 1 || a->plain < 0 || a->rotary < 0 || a->rotary % 2 || a->rotary > 4096 || a->latent < 1)
        return EXC_ERR_USAGE;
    const dim3 grid((unsigned)a->tokens, (unsigned)ceil_div(a->heads + 1, PIECES));
    const size_t angles = (size_t)a->rotary * sizeof(float);
    BY_ACT(a->act, {
        if (by_fours<T>(a)) ENQUEUE(q, (latent_pieces<4, T>), grid, PIECES * WARP, angles, *a);
        else ENQUEUE(q, (latent_pieces<1, T>), grid, PIECES * WARP, angles, *a);
    });
    return EXC_OK;
}
