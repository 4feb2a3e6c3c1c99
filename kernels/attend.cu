/* attend.cu - causal softmax attention of a ragged batch against the KV cache on the device, the twin of attend.c; prefill and
 * decode are one kernel.
 *
 * A unit is up to 16 query rows of one sequence and KV head: the query heads that share it (a part of them, where they are more),
 * token by token. Which unit a block has is found on the device (crowd.cuh). Four warps take four rows each; keys come in blocks of
 * 32, one a lane, through shared memory; an output's channels are spread over the lanes, and values are read as they lie,
 * coalesced, from the caches. The softmax is online: running maximum and sum.
 *
 * As on the CPU, long caches are cut into spans of 1024 keys that start anew and are merged in ascending order. Few units leave
 * spans to blocks of their own and a second kernel merges; many go through them one after the other: the same bits. */
#include "crowd.cuh"

constexpr int ROWS = 16, WARPS = 4, EACH = ROWS / WARPS, KEYS = 32, SPAN = 1024;

struct Attend {
    struct exc_attend_args a;
    const Group *unit;
    float *partial;               /* [tokens, q_heads, spans, value_dim + 2], or NULL: blocks go through all spans */
    int64_t heads, parts;         /* query heads of a unit; units that share a KV head and token */
    int64_t spans;
};

/* rows of one warp: output channels by lane, running maximum and sum */
template <int NV> struct State {
    float out[EACH][NV], m[EACH], sum[EACH];
    __device__ void clear() {
        for (int r = 0; r < EACH; r++) {
            m[r] = -INFINITY;
            sum[r] = 0;
            for (int i = 0; i < NV; i++) out[r][i] = 0;
        }
    }
    /* a span that saw nothing adds nothing */
    __device__ void merge(int r, const State &s) {
        if (s.sum[r] == 0) return;
        const float top = s.m[r] > m[r] ? s.m[r] : m[r], old = expf(m[r] - top), now = expf(s.m[r] - top);
        for (int i = 0; i < NV; i++) out[r][i] = out[r][i] * old + s.out[r][i] * now;
        sum[r] = sum[r] * old + s.sum[r] * now;
        m[r] = top;
    }
};

/* what sums are divided by, where a sink is one more key without a value; *by multiplies the outputs */
__device__ static float divisor(const struct exc_attend_args &a, int64_t head, float m, float sum) {
    if (!a.sinks) return 1.0f / sum;
    const float sink = a.sinks[head], top = m > sink ? m : sink, by = expf(m - top);
    return by / (sum * by + expf(sink - top));
}

/* one block of keys from..end for the warp's rows; tile [KEYS][pitch] has them, q [ROWS][pitch] the queries */
template <class T, int NV> __device__ void block(const struct exc_attend_args &a, const T *q, const T *tile, int64_t pitch, const T *values,
                                                 int64_t from, int64_t end, const int64_t *low, const int64_t *high, int lane, State<NV> &s) {
    float score[EACH] = {};
    for (int64_t d = 0; d < a.head_dim; d++) {
        const float k = widen(tile[lane * pitch + d]);
#pragma unroll
        for (int r = 0; r < EACH; r++) score[r] = fmaf(widen(q[r * pitch + d]), k, score[r]);
    }
    const int64_t key = from + lane;
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const bool sees = key < end && key >= low[r] && key < high[r];
        const float x = sees ? score[r] * a.scale : -INFINITY, top = warp_max(x > s.m[r] ? x : s.m[r]);
        const float factor = top == -INFINITY ? 1.0f : expf(s.m[r] - top), p = sees ? expf(x - top) : 0.0f;
        s.sum[r] = s.sum[r] * factor + warp_sum(p);
        s.m[r] = top;
        score[r] = p;
#pragma unroll
        for (int i = 0; i < NV; i++) s.out[r][i] *= factor;
    }
    const int n = (int)(end - from < KEYS ? end - from : KEYS);
    for (int j = 0; j < n; j++) {
        float p[EACH];
#pragma unroll
        for (int r = 0; r < EACH; r++) p[r] = __shfl_sync(ALL_LANES, score[r], j);
        const T *v = values + (from + j) * a.value_stride;
        if (p[0] == 0 && p[1] == 0 && p[2] == 0 && p[3] == 0) continue; /* keys that no row of the warp sees are not read */
#pragma unroll
        for (int i = 0; i < NV; i++) {
            const int64_t c = lane + i * WARP;
            const float x = c < a.value_dim ? widen(v[c]) : 0.0f;
#pragma unroll
            for (int r = 0; r < EACH; r++)
                if (p[r] != 0) s.out[r][i] = fmaf(p[r], x, s.out[r][i]);
        }
    }
}

template <class T, int NV> __global__ void __launch_bounds__(WARPS *WARP) attend_units(const Attend j) {
    DYN_SHARED(T, shared); /* q [ROWS][pitch], then keys [KEYS][pitch] */
    const struct exc_attend_args &a = j.a;
    const Group unit = j.unit[blockIdx.x];
    if (unit.expert < 0) return;
    const int64_t s = unit.expert, count = a.q_begin[s + 1] - a.q_begin[s], kv = blockIdx.y / j.parts, group = a.q_heads / a.kv_heads;
    const int64_t head0 = kv * group + blockIdx.y % j.parts * j.heads;
    const int64_t heads = (kv + 1) * group - head0 < j.heads ? (kv + 1) * group - head0 : j.heads, rows = unit.rows * heads;
    const int64_t visible = a.length[s] - count + unit.first - a.q_begin[s] + 1, end_key = visible + unit.rows - 1;
    const int64_t first_key = a.window && visible > a.window ? visible - a.window : 0;
    const int64_t D = a.head_dim, pitch = D + 4 / sizeof(T) + D / (4 / sizeof(T)) % 2 * (4 / sizeof(T)); /* an odd number of words */
    const T *keys = static_cast<const T *>(a.cache_k) + a.cache_begin[s] * a.key_stride + kv * D;
    const T *values = static_cast<const T *>(a.cache_v) + a.cache_begin[s] * a.value_stride + kv * a.value_dim;
    T *q = shared, *tile = shared + ROWS * pitch;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int64_t i : block_stride(ROWS * D)) {
        const int64_t r = i / D, d = i % D;
        q[r * pitch + d] = r < rows ? static_cast<const T *>(a.q)[((unit.first + r / heads) * a.q_heads + head0 + r % heads) * D + d] : T{};
    }
    int64_t low[EACH], high[EACH];
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const int64_t row = warp * EACH + r;
        high[r] = row < rows ? visible + row / heads : 0;
        low[r] = a.window && high[r] > a.window ? high[r] - a.window : 0;
    }
    State<NV> total, part;
    total.clear();
    const int64_t begin = first_key / SPAN * SPAN + (j.partial ? (int64_t)blockIdx.z * SPAN : 0);
    for (int64_t from = begin; from < end_key; from += SPAN) {
        part.clear();
        const int64_t end = from + SPAN < end_key ? from + SPAN : end_key;
        for (int64_t at = from; at < end; at += KEYS) {
            if (at + KEYS <= first_key) continue;
            const int64_t turn = a.ring ? at / a.ring * a.ring : 0; /* no block of keys goes round */
            __syncthreads();
            for (int64_t i : block_stride(KEYS * D)) {
                const int64_t k = i / D, d = i % D;
                tile[k * pitch + d] = at + k < end && at + k >= first_key ? keys[(at - turn + k) * a.key_stride + d] : T{};
            }
            __syncthreads();
            block<T, NV>(a, q + warp * EACH * pitch, tile, pitch, values - turn * a.value_stride, at, end, low, high, lane, part);
        }
        if (j.partial) break;
#pragma unroll
        for (int r = 0; r < EACH; r++) total.merge(r, part);
    }
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const int64_t row = warp * EACH + r, token = unit.first + row / heads, head = head0 + row % heads;
        if (row >= rows) continue;
        if (j.partial) {
            if (begin >= end_key) continue;
            float *to = j.partial + ((token * a.q_heads + head) * j.spans + blockIdx.z) * (a.value_dim + 2);
#pragma unroll
            for (int i = 0; i < NV; i++)
                if (lane + i * WARP < a.value_dim) to[lane + i * WARP] = part.out[r][i];
            if (lane == 0) to[a.value_dim] = part.m[r], to[a.value_dim + 1] = part.sum[r];
            continue;
        }
        const float by = divisor(a, head, total.m[r], total.sum[r]);
        T *out = static_cast<T *>(a.out) + (token * a.q_heads + head) * a.value_dim;
#pragma unroll
        for (int i = 0; i < NV; i++)
            if (lane + i * WARP < a.value_dim) out[lane + i * WARP] = narrow<T>(total.out[r][i] * by);
    }
}

/* spans of a row in ascending order, a warp a row. All of a unit's rows have its spans, begun at its first row's window. */
template <class T, int NV> __global__ void __launch_bounds__(WARP) attend_merge(const Attend j) {
    const struct exc_attend_args &a = j.a;
    const Group unit = j.unit[blockIdx.x];
    if (unit.expert < 0) return;
    const int64_t s = unit.expert, count = a.q_begin[s + 1] - a.q_begin[s], head = blockIdx.y;
    const int64_t visible = a.length[s] - count + unit.first - a.q_begin[s] + 1, end_key = visible + unit.rows - 1;
    const int64_t first_key = a.window && visible > a.window ? visible - a.window : 0;
    const int64_t spans = ceil_div(end_key, SPAN) - first_key / SPAN;
    const int lane = threadIdx.x;
    for (int64_t token = unit.first; token < unit.first + unit.rows; token++) {
        const float *from = j.partial + (token * a.q_heads + head) * j.spans * (a.value_dim + 2);
        State<NV> total, part;
        total.clear();
        part.clear();
        for (int64_t z = 0; z < spans; z++, from += a.value_dim + 2) {
            for (int i = 0; i < NV; i++) part.out[0][i] = lane + i * WARP < a.value_dim ? from[lane + i * WARP] : 0.0f;
            part.m[0] = from[a.value_dim];
            part.sum[0] = from[a.value_dim + 1];
            total.merge(0, part);
        }
        const float by = divisor(a, head, total.m[0], total.sum[0]);
        T *out = static_cast<T *>(a.out) + (token * a.q_heads + head) * a.value_dim;
#pragma unroll
        for (int i = 0; i < NV; i++)
            if (lane + i * WARP < a.value_dim) out[lane + i * WARP] = narrow<T>(total.out[0][i] * by);
    }
}

template <class T, int NV> static exc_status run(exc_queue *q, const struct exc_attend_args *a) {
    const int64_t group = a->q_heads / a->kv_heads, heads = group < ROWS ? group : ROWS, parts = ceil_div(group, heads);
    const int tokens = (int)(ROWS / heads);
    const int64_t most = most_groups(a->tokens, a->sequences, tokens), keys = a->window && a->window + tokens < a->longest ? a->window + tokens : a->longest;
    const int64_t spans = ceil_div(keys, SPAN) + (a->window ? 1 : 0);
    const bool spread = spans > 1 && most * a->kv_heads * parts < 512;
    Carve work(q);
    Group *unit = work.take<Group>(most);
    int64_t *begin = work.take<int64_t>(a->sequences + 1);
    float *partial = spread ? work.take<float>(a->tokens * a->q_heads * spans * (a->value_dim + 2)) : nullptr;
    if (!work.ready()) return work.status;
    if (a->kv_heads * parts > 65535 || a->q_heads > 65535 || spans > 65535) return EXC_ERR_USAGE;
    const Attend j = {*a, unit, partial, heads, parts, spans};
    ENQUEUE(q, find_groups, 1, threads_for_groups(a->sequences), 0, a->q_begin, a->sequences, tokens, most, unit, begin);
    const size_t shared = (size_t)((ROWS + KEYS) * (a->head_dim + 2 * (4 / (int64_t)sizeof(T)))) * sizeof(T);
    const dim3 grid((unsigned)most, (unsigned)(a->kv_heads * parts), (unsigned)(spread ? spans : 1));
    ENQUEUE(q, (attend_units<T, NV>), grid, WARPS * WARP, shared, j);
    if (spread) ENQUEUE(q, (attend_merge<T, NV>), dim3((unsigned)most, (unsigned)a->q_heads), WARP, 0, j);
    return EXC_OK;
}

template <class T> static exc_status by_width(exc_queue *q, const struct exc_attend_args *a) {
    if (a->value_dim <= 64) return run<T, 2>(q, a);
    if (a->value_dim <= 128) return run<T, 4>(q, a);
    if (a->value_dim <= 256) return run<T, 8>(q, a);
    return a->value_dim <= 512 ? run<T, 16>(q, a) : EXC_ERR_USAGE;
}

extern "C" exc_status exc_cuda_attend(exc_queue *q, const struct exc_attend_args *a) {
    if (a->sequences < 0 || a->kv_heads < 1 || a->q_heads < a->kv_heads || a->q_heads % a->kv_heads) return EXC_ERR_USAGE;
    if (a->head_dim < 1 || a->head_dim > 576 || a->value_dim < 1 || a->tokens < 0 || a->longest < 0 || a->window < 0) return EXC_ERR_USAGE;
    if (a->ring < 0 || a->ring % 64) return EXC_ERR_USAGE;
    if (!a->sequences || !a->tokens) return EXC_OK;
    BY_ACT(a->act, return by_width<T>(q, a));
    return EXC_OK;
}
