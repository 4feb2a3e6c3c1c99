/* latent.c - multi-head latent attention between its projections and its products: queries are taken apart
 * into plain and rotated channels, the latent is normed, the shared key rotated, and both go to the cache as
 * one row.
 *
 * One pass over q f32 [T, heads*(N+R)] and kv f32 [T, C+R]; cosines and sines are made once a token and serve
 * all heads. Where the outputs of a head lie is the caller's choice of steps, so that both forms of the
 * attention (ops.def) find their operands in place. */
#include <math.h>

#include "angle.h"

#define TASK_FLOATS (32 << 10)

EXC_INLINE void put(const float *x, int64_t n, void *out, int64_t at, int act) {
    if (act == EXC_F32)
        for (int64_t i = 0; i < n; i++) ((float *)out)[at + i] = x[i];
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)out)[at + i] = (uint16_t)exc_round_bf16(x[i]);
}

/* y [R]: the pairs of x turned. Pair i is channels 2i and 2i+1 where they are adjacent, else i and i + R/2.
 */
EXC_INLINE void turn_pairs(const struct exc_latent_args *a, const float *x, const float *cosine,
                           const float *sine, float *y) {
    int64_t half = a->rotary / 2;
    if (a->adjacent)
        for (int64_t i = 0; i < half; i++) {
            y[2 * i] = x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i];
            y[2 * i + 1] = x[2 * i + 1] * cosine[i] + x[2 * i] * sine[i];
        }
    else
        for (int64_t i = 0; i < half; i++) {
            y[i] = x[i] * cosine[i] - x[i + half] * sine[i];
            y[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
        }
}

/* y [C] = weight * x / |x|: the norm of norm.c */
EXC_INLINE void norm_latent(const struct exc_latent_args *a, const float *x, float *y) {
    float lane[LANES] = {0}, rest = 0;
    int64_t i = 0;
    for (; i + LANES <= a->latent; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += x[i + l] * x[i + l];
    for (; i < a->latent; i++) rest += x[i] * x[i];
    float inverse = 1.0f / sqrtf((exc_lane_sum(lane) + rest) / (float)a->latent + a->eps);
    for (i = 0; i < a->latent; i++) y[i] = a->weight[i] * (x[i] * inverse);
}

/* `work`: a row of the cache, and cosines and sines */
EXC_INLINE void tokens_body(const struct exc_latent_args *a, int64_t first, int64_t last, float *work) {
    int64_t N = a->plain, R = a->rotary, C = a->latent, row = C + R;
    float *key = work + C, *turned = work + row, *cosine = turned + R, *sine = cosine + R / 2;
    for (int64_t t = first; t < last; t++) {
        const float *kv = a->kv + t * a->kv_stride, *q = a->q + t * a->q_stride;
        exc_turn((double)a->position[t], a->inv_freq, R / 2, a->attention_factor, cosine, sine);
        norm_latent(a, kv, work);
        turn_pairs(a, kv + C, cosine, sine, key);
        put(work, row, a->cache, a->cache_row[t] * row, a->act);
        if (a->rows) put(work, row, a->rows, t * row, a->act);
        for (int64_t h = 0, at = t * a->heads; h < a->heads; h++, at++, q += N + R) {
            put(q, N, a->q_plain, at * a->plain_step, a->act);
            turn_pairs(a, q + N, cosine, sine, turned);
            put(turned, R, a->q_turned, at * a->turned_step, a->act);
            if (a->k_turned) put(key, R, a->k_turned, at * a->turned_step, a->act);
        }
    }
}
EXC_DISPATCH(tokens, (const struct exc_latent_args *a, int64_t first, int64_t last, float *work),
             (a, first, last, work))

typedef struct job {
    const struct exc_latent_args *a;
    int64_t per_task;
    void (*tokens)(const struct exc_latent_args *a, int64_t first, int64_t last, float *work);
    exc_queue *q;
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t first = (int64_t)task * j->per_task;
    j->tokens(j->a, first, exc_least(first + j->per_task, j->a->tokens), j->q->scratch[worker]);
}

exc_status exc_cpu_latent(exc_queue *q, const struct exc_latent_args *a) {
    if (a->tokens < 0 || a->heads < 1 || a->plain < 0 || a->rotary < 0 || a->rotary % 2 || a->latent < 1)
        return EXC_ERR_USAGE;
    if (a->act != EXC_F32 && a->act != EXC_BF16) return EXC_ERR_USAGE;
    if ((size_t)(a->latent + 3 * a->rotary) * sizeof(float) > q->scratch_bytes) return EXC_ERR_USAGE;
    job j = {.a = a, .tokens = tokens_for(), .q = q};
    j.per_task = exc_rows_per_task(TASK_FLOATS, a->heads * (a->plain + a->rotary) + a->latent);
    q->parallel(q, exc_task_count(a->tokens, j.per_task), run, &j);
    return EXC_OK;
}
