/* rope.c - head norm, rotation and store into the KV cache, one pass over the projections of each token.
 *
 * A pair (i, i + rotary/2) turns by position * inv_freq[i]. The product is exact or nearly so in f64 and is rounded to f32, the
 * angle that models are trained with; its sine and cosine are taken in f64 (Cody-Waite reduction by pi/2, fdlibm's
 * polynomials: error below 1e-14 for any angle of 2^20 positions) in a loop that vectorises, because library
 * calls for every token and layer would cost as much as the projections of a small model. */
#include <math.h>

#include "lanes.h"

#define TASK_FLOATS (32 << 10)

/* cos and sin of position * inv_freq[i], times factor */
EXC_INLINE void turn_body(double position, const float *inv_freq, int64_t half, float factor, float *cosine, float *sine) {
    for (int64_t i = 0; i < half; i++) {
        double angle = (double)(float)(position * (double)inv_freq[i]);
        double shifted = angle * 0.63661977236758134308 + 0x1.8p52, n = shifted - 0x1.8p52;
        double r = angle - n * 1.57079632673412561417 - n * 6.07710050650619224932e-11, z = r * r;
        double s = 1.58969099521155010221e-10;
        s = s * z - 2.50507602534068634195e-08;
        s = s * z + 2.75573137070700676789e-06;
        s = s * z - 1.98412698298579493134e-04;
        s = s * z + 8.33333333332248946124e-03;
        s = s * z - 1.66666666666666324348e-01;
        s = r + r * z * s;
        double c = -1.13596475577881948265e-11;
        c = c * z + 2.08757232129817482790e-09;
        c = c * z - 2.75573143513906633035e-07;
        c = c * z + 2.48015872894767294178e-05;
        c = c * z - 1.38888888888741095749e-03;
        c = c * z + 4.16666666666666019037e-02;
        c = 1.0 - 0.5 * z + z * z * c;
        /* the quarter turn picks: 0 (c,s), 1 (-s,c), 2 (-c,-s), 3 (s,-c) */
        double quarter = n - 4.0 * (((n * 0.25 - 0.375) + 0x1.8p52) - 0x1.8p52);
        int odd = quarter == 1.0 || quarter == 3.0, back = quarter >= 2.0;
        double cc = odd ? -s : c, ss = odd ? c : s;
        cosine[i] = (float)(back ? -cc : cc) * factor;
        sine[i] = (float)(back ? -ss : ss) * factor;
    }
}

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
        turn_body((double)a->position[t], a->inv_freq, a->rotary / 2, a->attention_factor, cosine, sine);
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
