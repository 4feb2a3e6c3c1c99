/* route.cu - the router on the device, the twin of route.c: scores, the K best by score (+ bias), weights, and the counting.
 *
 * A warp takes a token and has its experts in registers, E/32 a lane. A candidate is one 64-bit integer, its score made sortable above
 * the complement of its id, so a warp-wide maximum decides ties to the lower id. Counting is three things with three answers:
 * counts are integers, so blocks add them up in shared memory and with atomics; gate sums of reproducible queues are exact in
 * f64 in any order, so they go the same way; those of other queues are added in token order, one thread an expert, from the
 * ids and weights just written. */
#include "fixed.cuh"

constexpr int WARPS = 8, MAX_EXPERTS = 1024, MAX_K = 64;
constexpr int DROPPED_RANK = INT32_MIN, NAN_RANK = INT32_MIN + 1;

struct Route {
    struct exc_route_args a; /* its gate is on the host: */
    exc_gate gate;
    unsigned long long *nonfinite;
    int64_t fixed;
};

/* an order of integers for that of floats; NaN below -inf */
__device__ static int rank_of(float x) {
    if (x != x) return NAN_RANK;
    const int u = (int)bits_of(x + 0.0f); /* -0 is 0 */
    return u ^ (u >> 31 & 0x7fffffff);
}

__device__ static unsigned long long warp_best(unsigned long long key) {
    for (int d = WARP / 2; d > 0; d /= 2) {
        const unsigned long long other = __shfl_xor_sync(ALL_LANES, key, d);
        if (other > key) key = other;
    }
    return key;
}

/* e^x of what is no larger than the maximum it was taken from; +inf less the largest number counts as 0 */
__device__ static float exp_down(float x) { return expf(x > 0 ? 0.0f : x); }

/* scores of the lane's experts e = lane + 32 i */
template <int N> __device__ void scores_of(const exc_gate &g, const float *x, int64_t E, int lane, float (&s)[N]) {
    float top = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int64_t e = lane + i * WARP;
        s[i] = e < E ? x[e] : 0.0f;
        if (e < E && s[i] > top) top = s[i];
    }
    if (g.score == 2) return;
    if (g.score == 1) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float e = exp_down(s[i] > 0 ? -s[i] : s[i]);
            s[i] = (s[i] > 0 ? 1.0f : e) / (1.0f + e);
        }
        return;
    }
    top = warp_max(top);
    if (top == -INFINITY) top = -3.402823466e38f; /* no number above it */
    if (top > 3.402823466e38f) top = 3.402823466e38f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        s[i] = lane + i * WARP < E ? exp_down(s[i] - top) : 0.0f;
        if (s[i] == s[i]) sum += s[i];
    }
    const float inverse = 1.0f / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < N; i++) s[i] *= inverse;
}

/* experts of groups that are not kept: their rank drops below everything. value [E] in shared memory */
template <int N> __device__ void drop_groups(const exc_gate &g, int64_t E, const float *value, float *group, int lane, int (&rank)[N]) {
    const int64_t size = E / g.groups;
    for (int64_t i = lane; i < g.groups; i += WARP) {
        float best = -INFINITY, second = -INFINITY;
        for (int64_t e = i * size; e < (i + 1) * size; e++) {
            const float v = value[e];
            if (v > best) second = best, best = v;
            else if (v > second) second = v;
        }
        group[i] = size > 1 ? best + second : best;
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < N; k++) {
        const int64_t e = lane + k * WARP, mine = e / size;
        if (e >= E) continue;
        int before = 0;
        for (int64_t o = 0; o < g.groups; o++) before += group[o] > group[mine] || (group[o] == group[mine] && o < mine);
        if (before >= g.groups_kept) rank[k] = DROPPED_RANK;
    }
    __syncwarp();
}

/* weights of the chosen, then by descending weight; one lane, K of them in shared memory */
__device__ static void weigh(const exc_gate &g, int K, int *id, float *w) {
    if (g.score == 2) {
        float m = -3.402823466e38f, sum = 0;
        for (int i = 0; i < K; i++) m = w[i] > m ? w[i] : m;
        m = m > 3.402823466e38f ? 3.402823466e38f : m;
        for (int i = 0; i < K; i++) {
            w[i] = exp_down(w[i] - m);
            sum += w[i] == w[i] ? w[i] : 0.0f;
        }
        for (int i = 0; i < K; i++) w[i] /= sum;
    }
    if (g.renorm) {
        float sum = 0;
        for (int i = 0; i < K; i++) sum += w[i] == w[i] ? w[i] : 0.0f;
        sum += g.renorm_eps;
        for (int i = 0; i < K; i++) w[i] /= sum;
    }
    const float scale = g.scale == 0 ? 1.0f : g.scale;
    for (int i = 0; i < K; i++) w[i] *= scale;
    for (int i = 1; i < K; i++) {
        const float v = w[i];
        const int e = id[i];
        int at = i;
        while (at > 0 && (v > w[at - 1] || (w[at - 1] != w[at - 1] && v == v) || (v == w[at - 1] && e < id[at - 1]))) {
            w[at] = w[at - 1];
            id[at] = id[at - 1];
            at--;
        }
        w[at] = v;
        id[at] = e;
    }
}

template <int N> __global__ void __launch_bounds__(WARPS *WARP, 2) route_tokens(const Route r) {
    DYN_SHARED(float, values); /* [WARPS][2 E] with groups */
    SHARED_ARRAY(int, ids, WARPS * (MAX_K + 1));
    SHARED_ARRAY(float, weights, WARPS * (MAX_K + 1));
    const struct exc_route_args &a = r.a;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, K = (int)a.top_k;
    const int64_t t = (int64_t)blockIdx.x * WARPS + warp, E = a.experts;
    if (t >= a.tokens) return;
    int *id = ids + warp * (MAX_K + 1);
    float *w = weights + warp * (MAX_K + 1), s[N], v[N];
    int rank[N];
    scores_of<N>(r.gate, a.logits + t * E, E, lane, s);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int64_t e = lane + i * WARP;
        v[i] = e < E && a.bias ? s[i] + a.bias[e] : s[i];
        rank[i] = e < E ? rank_of(v[i]) : DROPPED_RANK;
    }
    if (r.gate.groups > 1) {
        float *value = values + warp * 2 * E;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (lane + i * WARP < E) value[lane + i * WARP] = v[i];
        __syncwarp();
        drop_groups<N>(r.gate, E, value, value + E, lane, rank);
    }
    const int more = a.margin && K < E;
    float last = 0, margin = INFINITY;
    bool numbers = true;
    for (int k = 0; k < K + more; k++) {
        unsigned long long key = 0; /* below every expert's */
        int at = -1;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int64_t e = lane + i * WARP;
            if (e >= E) continue;
            const unsigned long long own = (unsigned long long)((unsigned)rank[i] ^ 0x80000000u) << 32 | (unsigned)~(unsigned)e;
            if (own > key) key = own, at = i;
        }
        const unsigned long long best = warp_best(key);
        const int e = (int)~(unsigned)best, top = (int)((unsigned)(best >> 32) ^ 0x80000000u);
        float score = 0, value = 0;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (key == best && at == i) {
                score = s[i];
                value = v[i];
                rank[i] = DROPPED_RANK; /* taken */
            }
        const int owner = e % WARP;
        score = __shfl_sync(ALL_LANES, score, owner);
        value = __shfl_sync(ALL_LANES, value, owner);
        if (k < K) {
            if (lane == 0) id[k] = e, w[k] = score;
            last = value;
            if (top == NAN_RANK) numbers = false;
        } else if (top != DROPPED_RANK) {
            margin = last - value;
        }
    }
    if (!numbers && r.nonfinite) {
        unsigned count = 0;
        for (int64_t e = lane; e < E; e += WARP) {
            const float x = a.logits[t * E + e] + (a.bias ? a.bias[e] : 0.0f);
            count += x != x;
        }
        count = __reduce_add_sync(ALL_LANES, count);
        if (lane == 0) atomicAdd(r.nonfinite, (unsigned long long)count);
    }
    __syncwarp();
    if (lane == 0) {
        weigh(r.gate, K, id, w);
        if (a.margin) a.margin[t] = margin;
    }
    __syncwarp();
    for (int k = lane; k < K; k += WARP) {
        a.ids[t * K + k] = id[k];
        a.weights[t * K + k] = w[k];
    }
}

/* integers, and gate sums that are exact whatever the order: [E] in shared memory, then atomics */
__global__ static void route_counts(const struct exc_route_args a, bool exact) {
    DYN_SHARED(double, gate); /* [E] when exact, then counts [E] */
    unsigned *count = reinterpret_cast<unsigned *>(gate + (exact ? a.experts : 0));
    for (int64_t e : block_stride(a.experts)) {
        count[e] = 0;
        if (exact) gate[e] = 0;
    }
    __syncthreads();
    for (int64_t p : grid_stride(a.tokens * a.top_k)) {
        const int slot = a.slot[p / a.top_k], e = a.ids[p];
        if (slot < 0) continue;
        atomicAdd(count + e, 1u);
        if (exact) atomicAdd(gate + e, (double)fixed_term(a.weights[p]));
        if (a.prompt_count) atomicAdd(a.prompt_count + slot * a.prompt_stride + e, 1u);
    }
    __syncthreads();
    for (int64_t e : block_stride(a.experts)) {
        if (!count[e]) continue;
        if (a.count) atomicAdd(reinterpret_cast<unsigned long long *>(a.count) + e, (unsigned long long)count[e]);
        if (exact) atomicAdd(a.gate_sum + e, gate[e]);
    }
}

/* gate sums in token order: a warp an expert, 32 pairs a look, those of the expert added by their lane order */
__global__ static void route_gates(const struct exc_route_args a) {
    const int64_t e = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, pairs = a.tokens * a.top_k;
    const int lane = threadIdx.x % WARP;
    if (e >= a.experts) return;
    double sum = lane == 0 ? a.gate_sum[e] : 0; /* the lane that writes is the lane that reads */
    for (int64_t first = 0; first < pairs; first += WARP) {
        const int64_t p = first + lane;
        const bool mine = p < pairs && a.ids[p] == e && a.slot[p / a.top_k] >= 0;
        const float w = mine ? a.weights[p] : 0.0f;
        for (unsigned left = __ballot_sync(ALL_LANES, mine); left; left &= left - 1)
            sum += (double)__shfl_sync(ALL_LANES, w, __ffs((int)left) - 1);
    }
    if (lane == 0) a.gate_sum[e] = sum;
}

template <int N> static exc_status run(exc_queue *q, const struct exc_route_args *a) {
    Route r = {*a, *a->gate, (unsigned long long *)q->nonfinite, q->reproducible != 0};
    r.a.gate = nullptr; /* it is on the host */
    const size_t shared = a->gate->groups > 1 ? (size_t)(WARPS * 2 * a->experts) * sizeof(float) : 0;
    ENQUEUE(q, route_tokens<N>, (unsigned)ceil_div(a->tokens, WARPS), WARPS * WARP, shared, r);
    if (!a->slot || (!a->count && !a->gate_sum && !a->prompt_count)) return EXC_OK;
    const bool exact = q->reproducible && a->gate_sum;
    const size_t table = (size_t)a->experts * (sizeof(unsigned) + (exact ? sizeof(double) : 0));
    ENQUEUE(q, route_counts, grid_for(a->tokens * a->top_k, 256, 8, 132), 256, table, r.a, exact);
    if (a->gate_sum && !exact) ENQUEUE(q, route_gates, (unsigned)ceil_div(a->experts, 4), 4 * WARP, 0, r.a);
    return EXC_OK;
}

extern "C" exc_status exc_cuda_route(exc_queue *q, const struct exc_route_args *a) {
    const exc_gate *g = a->gate;
    if (a->tokens < 0 || a->experts < 1 || a->experts > MAX_EXPERTS) return EXC_ERR_USAGE;
    if (a->top_k < 1 || a->top_k > MAX_K || a->top_k > a->experts || !g || g->score < 0 || g->score > 2) return EXC_ERR_USAGE;
    if (g->groups > 1) {
        if (a->experts % g->groups || g->groups_kept < 1 || g->groups_kept > g->groups) return EXC_ERR_USAGE;
        if (a->experts / g->groups * g->groups_kept < a->top_k) return EXC_ERR_USAGE;
    }
    if (!a->tokens) return EXC_OK;
    if (a->experts <= 32) return run<1>(q, a);
    if (a->experts <= 128) return run<4>(q, a);
    if (a->experts <= 256) return run<8>(q, a);
    return a->experts <= 512 ? run<16>(q, a) : run<32>(q, a);
}
