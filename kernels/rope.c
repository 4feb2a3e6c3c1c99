/* rope.c - head norm, rotation and store into the KV cache, one pass over the projections of each token.
 *
 * A pair (i, i + rotary/2) turns by position * inv_freq[i]. Cosines and sines (angle.h) are made once a token and
 * serve all its heads. */
#include <math.h>

#include "angle.h"

#define TASK_FLOATS (32 << 10)

/* one head of one token: norm, rotation, rounding */
EXC_INLINE void head_body(const struct exc_rope_args *a, const float *x, const float *weight, const float *cosine,
                          const float *sine, float *y, void *out) {
    int64_t D = a->head_dim, half = a->rotary / 2, i = 0;
    if (weight) {
        float lane[LANES] = {0}, rest = 0, shift = a->zero_centred ? 1.0f : 0.0f;
        for (; i + LANES <= D; i += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += x[i + l] * x[i + l];
        for (; i < D; i++) rest += x[i] * x[i];
        float inverse = 1.0f / sqrtf((exc_lane_sum(lane) + rest) / (float)D + a->eps);
        for (i = 0; i < D; i++) y[i] = (weight[i] + shift) * (x[i] * inverse);
    } else {
        for (i = 0; i < D; i++) y[i] = x[i];
    }
    for (i = 0; i < half; i++) {
        float u = y[i], v = y[i + half];
        y[i] = u * cosine[i] - v * sine[i];
        y[i + half] = v * cosine[i] + u * sine[i];
    }
    if (a->act == EXC_F32)
        for (i = 0; i < D; i++) ((float *)out)[i] = y[i];
    else
        for (i = 0; i < D; i++) ((uint16_t *)out)[i] = (uint16_t)exc_round_bf16(y[i]);
}

/* `work` holds a head's values and the cosines and sines of a token: 2 * head_dim floats */
EXC_INLINE void tokens_body(const struct exc_rope_args *a, int64_t first, int64_t last, float *work) {
    int64_t D = a->head_dim;
    size_t head = (size_t)D * (a->act == EXC_F32 ? 4 : 2);
    float *y = work, *cosine = work + D, *sine = cosine + a->rotary / 2;
    for (int64_t t = first; t < last; t++) {
        exc_turn((double)a->position[t], a->inv_freq, a->rotary / 2, a->attention_factor, cosine, sine);
        uint8_t *out = (uint8_t *)a->q_out + (size_t)(t * a->q_heads) * head;
        for (int64_t h = 0; h < a->q_heads; h++)
            head_body(a, a->q + t * a->q_stride + h * D, a->q_norm, cosine, sine, y, out + (size_t)h * head);
        size_t row = (size_t)(a->cache_row[t] * a->kv_heads) * head;
        for (int64_t h = 0; h < a->kv_heads; h++)
            head_body(a, a->k + t * a->k_stride + h * D, a->k_norm, cosine, sine, y,
                      (uint8_t *)a->cache_k + row + (size_t)h * head);
        const float *v = a->v + t * a->v_stride;
        if (a->act == EXC_F32) {
            __builtin_memcpy((uint8_t *)a->cache_v + row, v, (size_t)(a->kv_heads * D) * 4);
        } else {
            uint16_t *to = (uint16_t *)((uint8_t *)a->cache_v + row);
            for (int64_t i = 0; i < a->kv_heads * D; i++) to[i] = (uint16_t)exc_round_bf16(v[i]);
        }
    }
}
EXC_DISPATCH(tokens, (const struct exc_rope_args *a, int64_t first, int64_t last, float *work), (a, first, last, work))

typedef struct job {
    const struct exc_rope_args *a;
    int64_t per_task;
    void (*tokens)(const struct exc_rope_args *a, int64_t first, int64_t last, float *work);
    exc_queue *q;
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t first = (int64_t)task * j->per_task;
    j->tokens(j->a, first, exc_least(first + j->per_task, j->a->tokens), j->q->scratch[worker]);
}

exc_status exc_cpu_rope(exc_queue *q, const struct exc_rope_args *a) {
    if (a->tokens < 0 || a->q_heads < 1 || a->kv_heads < 1 || a->head_dim < 1) return EXC_ERR_USAGE;
    if (a->rotary < 0 || a->rotary > a->head_dim || a->rotary % 2) return EXC_ERR_USAGE;
    if (a->act != EXC_F32 && a->act != EXC_BF16) return EXC_ERR_USAGE;
    if ((size_t)a->head_dim * 2 * sizeof(float) > q->scratch_bytes) return EXC_ERR_USAGE;
    job j = {.a = a, .tokens = tokens_for(), .q = q};
    j.per_task = exc_rows_per_task(TASK_FLOATS, (a->q_heads + 2 * a->kv_heads) * a->head_dim);
    q->parallel(q, exc_task_count(a->tokens, j.per_task), run, &j);
    return EXC_OK;
}
