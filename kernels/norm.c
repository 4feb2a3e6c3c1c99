/* norm.c - RMS norm of rows, f32 in, `act` out: y = w * (x * 1/sqrt(mean(x^2) + eps)).
 *
 * The sum of squares is kept in 16 lanes that are added in a fixed order; a row is read twice, the second time from the
 * first-level cache. */
#include <math.h>

#include "lanes.h"

#define TASK_FLOATS (64 << 10)

EXC_INLINE void rows_body(const struct exc_norm_args *a, int64_t first, int64_t last) {
    float shift = a->zero_centred ? 1.0f : 0.0f;
    for (int64_t r = first; r < last; r++) {
        const float *x = a->x + r * a->x_stride, *w = a->weight;
        float lane[LANES] = {0}, rest = 0;
        int64_t i = 0;
        for (; i + LANES <= a->dim; i += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += x[i + l] * x[i + l];
        for (; i < a->dim; i++) rest += x[i] * x[i];
        float inverse = 1.0f / sqrtf((exc_lane_sum(lane) + rest) / (float)a->dim + a->eps);
        if (a->act == EXC_F32) {
            float *y = (float *)a->y + r * a->y_stride;
            for (i = 0; i < a->dim; i++) y[i] = (w[i] + shift) * (x[i] * inverse);
        } else {
            uint16_t *y = (uint16_t *)a->y + r * a->y_stride;
            for (i = 0; i < a->dim; i++) y[i] = (uint16_t)exc_round_bf16((w[i] + shift) * (x[i] * inverse));
        }
    }
}
EXC_DISPATCH(rows, (const struct exc_norm_args *a, int64_t first, int64_t last), (a, first, last))

typedef struct job {
    const struct exc_norm_args *a;
    int64_t per_task;
    void (*rows)(const struct exc_norm_args *a, int64_t first, int64_t last);
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first = (int64_t)task * j->per_task;
    j->rows(j->a, first, exc_least(first + j->per_task, j->a->rows));
}

exc_status exc_cpu_norm(exc_queue *q, const struct exc_norm_args *a) {
    if (a->rows < 0 || a->dim < 1 || (a->act != EXC_F32 && a->act != EXC_BF16)) return EXC_ERR_USAGE;
    job j = {.a = a, .rows = rows_for(), .per_task = exc_rows_per_task(TASK_FLOATS, a->dim)};
    q->parallel(q, exc_task_count(a->rows, j.per_task), run, &j);
    return EXC_OK;
}
