/* route.c - the router: logits [T,E] -> scores -> the K best by score (+ bias) -> weights, and the counting.
 *
 * A candidate is one 64-bit integer, its selection score made sortable in the upper half and the complement of its id in the
 * lower: the maximum is the answer with ties to the lower id already decided, and it needs no branch. Candidates stand in COLUMNS
 * columns with the maximum of each at hand, so taking the best costs one look at the maxima and a rescan of one column. NaN
 * sorts below every number and counts nothing in the softmax. Tokens are independent; counting runs after all of them, in
 * token order, gate sums of reproducible queues in fixed point (fixed.h). */
#include <math.h>

#include "fixed.h"

#define COLUMNS 32
#define MAX_EXPERTS 1024
#define MAX_K 64
#define TASK_LOGITS (16 << 10)
#define DROPPED_RANK INT32_MIN    /* of an expert in a group that was not kept: below the NaN of one that was */
#define NAN_RANK (INT32_MIN + 1) /* below -inf */

typedef void (*take_fn)(const int32_t *rank, int64_t E, int n, int32_t *id);

typedef struct job {
    const struct exc_route_args *a;
    int64_t per_task;
    take_fn take;
    void (*tokens)(const struct exc_route_args *a, int64_t first, int64_t last, take_fn take, uint64_t *nonfinite);
    exc_queue *q;
} job;

EXC_INLINE void softmax(const float *x, int64_t n, float *s) {
    float m = exc_largest(x, n), lane[LANES] = {0}, rest = 0;
    m = m > __FLT_MAX__ ? __FLT_MAX__ : m;
    int64_t i = 0;
    for (i = 0; i < n; i++) s[i] = exc_exp_down(x[i] - m);
    for (i = 0; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += s[i + l] == s[i + l] ? s[i + l] : 0.0f;
    for (; i < n; i++) rest += s[i] == s[i] ? s[i] : 0.0f;
    float inverse = 1.0f / (exc_lane_sum(lane) + rest);
    for (i = 0; i < n; i++) s[i] *= inverse;
}

EXC_INLINE void scores_of(const struct exc_route_args *a, const float *x, float *s) {
    int64_t E = a->experts;
    if (a->gate->score == 0) {
        softmax(x, E, s);
    } else if (a->gate->score == 1) {
        for (int64_t i = 0; i < E; i++) {
            float e = exc_exp_down(x[i] > 0 ? -x[i] : x[i]);
            s[i] = (x[i] > 0 ? 1.0f : e) / (1.0f + e);
        }
    } else {
        for (int64_t i = 0; i < E; i++) s[i] = x[i];
    }
}

/* Group-limited selection: a group's score is the sum of its two best ranks' values; all but the best groups_kept are dropped. */
EXC_INLINE void drop_groups(const exc_gate *g, int64_t E, const float *value, int32_t *rank) {
    int64_t size = E / g->groups;
    float score[MAX_EXPERTS];
    for (int64_t i = 0; i < g->groups; i++) {
        float best = -INFINITY, second = -INFINITY;
        for (int64_t e = i * size; e < (i + 1) * size; e++) {
            float v = value[e];
            if (v > best) second = best, best = v;
            else if (v > second) second = v;
        }
        score[i] = size > 1 ? best + second : best;
    }
    for (int64_t i = 0; i < g->groups; i++) {
        int before = 0;
        for (int64_t o = 0; o < g->groups; o++) before += score[o] > score[i] || (score[o] == score[i] && o < i);
        if (before < g->groups_kept) continue;
        for (int64_t e = i * size; e < (i + 1) * size; e++) rank[e] = DROPPED_RANK;
    }
}

/* the n best ids, best first */
EXC_INLINE void take_body(const int32_t *rank, int64_t E, int n, int32_t *id) {
    int64_t key[MAX_EXPERTS], top[COLUMNS];
    int64_t rows = (E + COLUMNS - 1) / COLUMNS;
    for (int64_t e = 0; e < E; e++) key[e] = (int64_t)((uint64_t)(uint32_t)rank[e] << 32 | (uint32_t)~(uint32_t)e);
    for (int64_t e = E; e < rows * COLUMNS; e++) key[e] = INT64_MIN;
    for (int c = 0; c < COLUMNS; c++) top[c] = key[c];
    for (int64_t r = 1; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++) top[c] = key[r * COLUMNS + c] > top[c] ? key[r * COLUMNS + c] : top[c];
    for (int i = 0; i < n; i++) {
        int64_t best = INT64_MIN, m = INT64_MIN;
        for (int c = 0; c < COLUMNS; c++) best = top[c] > best ? top[c] : best;
        uint32_t e = ~(uint32_t)(uint64_t)best;
        id[i] = (int32_t)e;
        key[e] = INT64_MIN;
        for (int64_t r = e % COLUMNS; r < rows * COLUMNS; r += COLUMNS) m = key[r] > m ? key[r] : m;
        for (int c = 0; c < COLUMNS; c++) top[c] = top[c] == best ? m : top[c]; /* whole vectors: a store of one would stall */
    }
}

EXC_DISPATCH(take, (const int32_t *rank, int64_t E, int n, int32_t *id), (rank, E, n, id))

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,popcnt,prefer-vector-width=512")))
#define FEW 16 /* candidates that are sorted in registers */

/* the n-th largest of 16 numbers: the least of those that fewer than n exceed */
AVX512 EXC_INLINE int32_t nth_largest(__m512i m, int n) {
    __m512i above = _mm512_setzero_si512();
    const __m512i one = _mm512_set1_epi32(1);
#define TURN(s) above = _mm512_mask_add_epi32(above, _mm512_cmpgt_epi32_mask(_mm512_alignr_epi32(m, m, s), m), above, one);
    TURN(1) TURN(2) TURN(3) TURN(4) TURN(5) TURN(6) TURN(7) TURN(8) TURN(9) TURN(10) TURN(11) TURN(12) TURN(13) TURN(14) TURN(15)
#undef TURN
    return _mm512_mask_reduce_min_epi32(_mm512_cmplt_epi32_mask(above, _mm512_set1_epi32(n)), m);
}

/* The same without a chain of steps that wait for each other. Of 16 columns the n-th best maximum bounds the n-th best of all
 * from below; few reach it, and each of them finds its place by counting how many are better. */
AVX512 static void take_few(const int32_t *rank, int64_t E, int n, int32_t *id) {
    int64_t key[2 * FEW] __attribute__((aligned(64))), place[FEW] __attribute__((aligned(64)));
    int32_t best[FEW], kept[2][2 * FEW];
    const __m512i none = _mm512_set1_epi32(INT32_MIN);
    __m512i top = none, lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int many = 0;
    for (int64_t e = 0; e < E; e += 16) {
        __mmask16 there = E - e >= 16 ? 0xffff : (__mmask16)((1u << (E - e)) - 1);
        top = _mm512_max_epi32(top, _mm512_mask_loadu_epi32(none, there, rank + e));
    }
    int32_t least = n <= FEW ? nth_largest(top, n) : INT32_MIN;
    if (least == INT32_MIN) {
        take_avx512(rank, E, n, id);
        return;
    }
    for (int64_t e = 0; e < E && many <= FEW; e += 16) {
        __mmask16 there = E - e >= 16 ? 0xffff : (__mmask16)((1u << (E - e)) - 1);
        __m512i v = _mm512_mask_loadu_epi32(none, there, rank + e);
        __mmask16 in = _mm512_mask_cmpge_epi32_mask(there, v, _mm512_set1_epi32(least));
        _mm512_storeu_si512(kept[0] + many, _mm512_maskz_compress_epi32(in, v));
        _mm512_storeu_si512(kept[1] + many, _mm512_maskz_compress_epi32(in, _mm512_add_epi32(lane, _mm512_set1_epi32((int)e))));
        many += __builtin_popcount(in);
    }
    if (many > FEW) {
        take_avx512(rank, E, n, id);
        return;
    }
    __m512i k[2], better[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int h = 0; h < 2; h++) {
        __m512i high = _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)(kept[0] + 8 * h)));
        __m512i low = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)(kept[1] + 8 * h)));
        k[h] = _mm512_or_si512(_mm512_slli_epi64(high, 32), _mm512_xor_si512(low, _mm512_set1_epi64(0xffffffff)));
        _mm512_store_si512(key + 8 * h, k[h]);
    }
    for (int i = 0; i < many; i++)
        for (int h = 0; h < 2; h++)
            better[h] = _mm512_mask_add_epi64(better[h], _mm512_cmpgt_epi64_mask(_mm512_set1_epi64(key[i]), k[h]), better[h],
                                              _mm512_set1_epi64(1));
    for (int h = 0; h < 2; h++) _mm512_store_si512(place + 8 * h, better[h]);
    for (int i = 0; i < many; i++) best[place[i]] = kept[1][i];
    for (int i = 0; i < n; i++) id[i] = best[i];
}
#endif

static take_fn best_for(void) {
#if defined(__x86_64__)
    if (exc_isa_level() >= EXC_ISA_AVX512) return take_few;
#endif
    return take_for();
}

/* weights of the chosen; NaN ones stay NaN and leave the others' sum alone */
EXC_INLINE void weigh(const struct exc_route_args *a, const float *s, const int32_t *id, float *w) {
    const exc_gate *g = a->gate;
    int K = (int)a->top_k;
    for (int i = 0; i < K; i++) w[i] = s[id[i]];
    if (g->score == 2) {
        float m = -__FLT_MAX__, sum = 0;
        for (int i = 0; i < K; i++) m = w[i] > m ? w[i] : m;
        m = m > __FLT_MAX__ ? __FLT_MAX__ : m;
        for (int i = 0; i < K; i++) {
            w[i] = exc_exp_down(w[i] - m);
            sum += w[i] == w[i] ? w[i] : 0.0f;
        }
        for (int i = 0; i < K; i++) w[i] /= sum;
    }
    if (g->renorm) {
        float sum = 0;
        for (int i = 0; i < K; i++) sum += w[i] == w[i] ? w[i] : 0.0f;
        sum += g->renorm_eps;
        for (int i = 0; i < K; i++) w[i] /= sum;
    }
    float scale = g->scale == 0 ? 1.0f : g->scale;
    for (int i = 0; i < K; i++) w[i] *= scale;
}

/* descending weight, ties to the lower id, NaN last: nearly sorted already, so insertion */
EXC_INLINE void arrange(int K, int32_t *id, float *w) {
    for (int i = 1; i < K; i++) {
        float v = w[i];
        int32_t e = id[i], at = i;
        while (at > 0 && (v > w[at - 1] || (w[at - 1] != w[at - 1] && v == v) || (v == w[at - 1] && e < id[at - 1]))) {
            w[at] = w[at - 1];
            id[at] = id[at - 1];
            at--;
        }
        w[at] = v;
        id[at] = e;
    }
}

#define TOKENS_PARAMS (const struct exc_route_args *a, int64_t first, int64_t last, take_fn take, uint64_t *nonfinite)
EXC_INLINE void tokens_body TOKENS_PARAMS {
    int64_t E = a->experts, K = a->top_k;
    float s[MAX_EXPERTS], biased[MAX_EXPERTS];
    int32_t rank[MAX_EXPERTS], id[MAX_K + 1];
    for (int64_t t = first; t < last; t++) {
        const float *x = a->logits + t * E, *value = s;
        scores_of(a, x, s);
        if (a->bias) {
            for (int64_t e = 0; e < E; e++) biased[e] = s[e] + a->bias[e];
            value = biased;
        }
        for (int64_t e = 0; e < E; e++) rank[e] = exc_rank(value[e]) | (value[e] != value[e]); /* NAN_RANK */
        if (a->gate->groups > 1) drop_groups(a->gate, E, value, rank);
        int more = a->margin && K < E;
        take(rank, E, (int)K + more, id);
        weigh(a, s, id, a->weights + t * K);
        if (a->margin) a->margin[t] = more ? value[id[K - 1]] - value[id[K]] : INFINITY;
        if (a->margin && more && rank[id[K]] == DROPPED_RANK) a->margin[t] = INFINITY;
        if (rank[id[K - 1]] == NAN_RANK)
            for (int64_t e = 0; e < E; e++) *nonfinite += value[e] != value[e];
        arrange((int)K, id, a->weights + t * K);
        __builtin_memcpy(a->ids + t * K, id, (size_t)K * sizeof *id);
    }
}
EXC_DISPATCH(tokens, TOKENS_PARAMS, (a, first, last, take, nonfinite))

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first = (int64_t)task * j->per_task;
    uint64_t nonfinite = 0;
    j->tokens(j->a, first, exc_least(first + j->per_task, j->a->tokens), j->take, &nonfinite);
    if (nonfinite && j->q->nonfinite) __atomic_fetch_add(j->q->nonfinite, nonfinite, __ATOMIC_RELAXED);
}

static void count(const struct exc_route_args *a, int fixed) {
    for (int64_t t = 0; t < a->tokens; t++) {
        if (a->slot[t] < 0) continue;
        const int32_t *id = a->ids + t * a->top_k;
        const float *w = a->weights + t * a->top_k;
        uint32_t *row = a->prompt_count ? a->prompt_count + a->slot[t] * a->prompt_stride : NULL;
        for (int64_t k = 0; k < a->top_k; k++) {
            if (a->count) a->count[id[k]]++;
            if (a->gate_sum) a->gate_sum[id[k]] += (double)(fixed ? exc_fixed(w[k]) : w[k]);
            if (row) row[id[k]]++;
        }
    }
}

exc_status exc_cpu_route(exc_queue *q, const struct exc_route_args *a) {
    const exc_gate *g = a->gate;
    if (a->tokens < 0 || a->experts < 1 || a->experts > MAX_EXPERTS) return EXC_ERR_USAGE;
    if (a->top_k < 1 || a->top_k > MAX_K || a->top_k > a->experts || !g || g->score < 0 || g->score > 2)
        return EXC_ERR_USAGE;
    if (g->groups > 1) {
        if (a->experts % g->groups || g->groups_kept < 1 || g->groups_kept > g->groups) return EXC_ERR_USAGE;
        if (a->experts / g->groups * g->groups_kept < a->top_k) return EXC_ERR_USAGE;
    }
    job j = {.a = a, .take = best_for(), .tokens = tokens_for(), .q = q, .per_task = exc_rows_per_task(TASK_LOGITS, a->experts)};
    q->parallel(q, exc_task_count(a->tokens, j.per_task), run, &j);
    if (a->slot && (a->count || a->gate_sum || a->prompt_count)) count(a, q->reproducible);
    return EXC_OK;
}
