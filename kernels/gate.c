/* gate.c - heads weighed by a gate of their own: y = norm(x) * f(g), f sigmoid or silu, the norm optional.
 *
 * x [T, heads*D] f32 or bf16, g f32 rows, y [T, heads*D] in `act`. What leaves a gated attention (sigmoid, no norm) and
 * a gated delta net (norm over each head, silu) goes through here on its way to the output projection. */
#include <math.h>

#include "lanes.h"

#define TASK_FLOATS (64 << 10)

/* one head: its values as f32 in x, normed in place */
EXC_INLINE void norm_head(const struct exc_gate_args *a, float *x) {
    float lane[LANES] = {0}, rest = 0;
    int64_t i = 0;
    for (; i + LANES <= a->dim; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += x[i + l] * x[i + l];
    for (; i < a->dim; i++) rest += x[i] * x[i];
    float inverse = 1.0f / sqrtf((exc_lane_sum(lane) + rest) / (float)a->dim + a->eps);
    for (i = 0; i < a->dim; i++) x[i] = a->weight[i] * (x[i] * inverse);
}

EXC_INLINE void rows_body(const struct exc_gate_args *a, int64_t first, int64_t last, float *work) {
    int64_t D = a->dim;
    size_t size = a->x_dtype == EXC_F32 ? 4 : 2;
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < a->heads; h++) {
            int64_t at = (t * a->heads + h) * D;
            const float *g = a->g + t * a->g_stride + h * D;
            exc_load_row((const uint8_t *)a->x + (size_t)at * size, a->x_dtype, D, work);
            if (a->weight) norm_head(a, work);
            if (a->silu)
                for (int64_t i = 0; i < D; i++) work[i] *= g[i] * exc_sigmoid(g[i]);
            else
                for (int64_t i = 0; i < D; i++) work[i] *= exc_sigmoid(g[i]);
            if (a->act == EXC_F32) {
                __builtin_memcpy((float *)a->y + at, work, (size_t)D * sizeof *work);
            } else {
                uint16_t *y = (uint16_t *)a->y + at;
                for (int64_t i = 0; i < D; i++) y[i] = (uint16_t)exc_round_bf16(work[i]);
            }
        }
}
EXC_DISPATCH(rows, (const struct exc_gate_args *a, int64_t first, int64_t last, float *work), (a, first, last, work))

typedef struct job {
    const struct exc_gate_args *a;
    int64_t per_task;
    void (*rows)(const struct exc_gate_args *a, int64_t first, int64_t last, float *work);
    exc_queue *q;
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t first = (int64_t)task * j->per_task;
    j->rows(j->a, first, exc_least(first + j->per_task, j->a->tokens), j->q->scratch[worker]);
}

exc_status exc_cpu_gate(exc_queue *q, const struct exc_gate_args *a) {
    if (a->tokens < 0 || a->heads < 1 || a->dim < 1 || (size_t)a->dim * sizeof(float) > q->scratch_bytes)
        return EXC_ERR_USAGE;
    if (a->x_dtype != EXC_F32 && a->x_dtype != EXC_BF16) return EXC_ERR_USAGE;
    if (a->act != EXC_F32 && a->act != EXC_BF16) return EXC_ERR_USAGE;
    job j = {.a = a, .rows = rows_for(), .q = q, .per_task = exc_rows_per_task(TASK_FLOATS, a->heads * a->dim)};
    q->parallel(q, exc_task_count(a->tokens, j.per_task), run, &j);
    return EXC_OK;
}
