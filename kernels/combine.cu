/* combine.cu - residual add of the experts and the virtual edit of their outputs on the device, the twin of combine.c.
 *
 * A block takes a token. Its rows, weights and edited weights are in shared memory; each thread sums its columns over the K rows in
 * ascending order, so h is read and written once and y once. With a basis the token needs a second sum u = sum w_j s_j y_j; its
 * coefficients B u are made block-wide, then every column loses its part of B^T (B u). u stays in device scratch f32 [T,H]:
 * it is written and read by the same threads. */
#include "cuda.cuh"

constexpr int THREADS = 256, MAX_K = 64, TOGETHER = 4;

struct Combine {
    struct exc_combine_args a;
    float *u; /* [T,H] with a basis */
};

__global__ static void combine_tokens(const Combine j) {
    DYN_SHARED(float, dot); /* [rank] */
    SHARED_ARRAY(float, room, WARP);
    SHARED_ARRAY(float, weight, MAX_K);
    SHARED_ARRAY(float, edited, MAX_K);
    SHARED_ARRAY(int32_t, row, MAX_K);
    const struct exc_combine_args &a = j.a;
    const int64_t t = blockIdx.x, H = a.hidden;
    for (int64_t i : block_stride(a.top_k)) {
        const int64_t p = t * a.top_k + i;
        const int32_t r = a.row_of[p];
        float w = 0, e = 0;
        if (r >= 0) {
            w = a.scale ? a.weights[p] * a.scale[a.ids[p]] : a.weights[p];
            e = a.basis ? w * a.strength[a.ids[p]] : 0;
        }
        row[i] = r;
        weight[i] = w;
        edited[i] = e;
    }
    __syncthreads();
    float *h = a.h + t * H, *u = j.u + t * H;
    for (int64_t c : block_stride(H)) {
        float v = 0, part = 0;
        for (int i = 0; i < a.top_k; i++) {
            if (row[i] < 0) continue;
            const float y = a.y[row[i] * H + c];
            v += weight[i] * y;
            if (a.basis) part += edited[i] * y;
        }
        h[c] += v;
        if (a.basis) u[c] = part;
    }
    if (!a.basis) return;
    for (int64_t first = 0; first < a.rank; first += TOGETHER) {
        float sum[TOGETHER] = {};
        for (int64_t c : block_stride(H))
            for (int k = 0; k < TOGETHER; k++)
                if (first + k < a.rank) sum[k] += a.basis[(first + k) * H + c] * u[c];
        for (int k = 0; k < TOGETHER && first + k < a.rank; k++) {
            const float all = block_sum(sum[k], room);
            if (threadIdx.x == 0) dot[first + k] = all;
        }
    }
    __syncthreads();
    for (int64_t c : block_stride(H)) {
        float x = h[c];
        for (int64_t r = 0; r < a.rank; r++) x -= dot[r] * a.basis[r * H + c];
        h[c] = x;
    }
}

extern "C" exc_status exc_cuda_combine(exc_queue *q, const struct exc_combine_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->top_k > MAX_K || a->hidden < 1 || a->rank < 0 || a->rank > 4096) return EXC_ERR_USAGE;
    if (a->basis && !a->strength) return EXC_ERR_USAGE;
    Carve work(q);
    Combine j = {*a, a->basis ? work.take<float>(a->tokens * a->hidden) : nullptr};
    if (!work.ready()) return work.status;
    ENQUEUE(q, combine_tokens, (unsigned)a->tokens, THREADS, a->basis ? (size_t)a->rank * sizeof(float) : 0, j);
    return EXC_OK;
}
