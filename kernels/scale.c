/* scale.c - count matrices of n elements times one f64 factor each: masks (0), weights made weaker or stronger.
 *
 * Tasks are runs of one matrix. A run goes through f64: the product of a stored number and the factor is rounded to odd on
 * its way to f32, so that the rounding to a half afterwards is the only one. Counts of a task are added to its matrix
 * atomically; they are whole numbers, so their order does not matter. */
#include <string.h>

#include "codes.h"
#include "lanes.h"
#include "requant.h"

#define RUN 1024
#define TASK_ELEMENTS (64 << 10)

typedef struct tally {
    int64_t changed, nonfinite, overflow;
} tally;

static size_t size_of(int dtype) { return dtype == EXC_F32 ? 4 : 2; }

EXC_INLINE void store_run(const float *y, void *dst, int dtype, int64_t n) {
    if (dtype == EXC_F32) memcpy(dst, y, (size_t)n * 4);
    else if (dtype == EXC_BF16)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)dst)[i] = (uint16_t)exc_round_bf16(y[i]);
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)dst)[i] = (uint16_t)exc_round_f16(y[i]);
}

EXC_INLINE int is_finite(float x) { return (exc_to_bits(x) & 0x7f800000u) != 0x7f800000u; }

EXC_INLINE void run_body(const void *src, void *dst, int dtype, int64_t n, double factor, tally *t) {
    float x[RUN], y[RUN], z[RUN];
    exc_load_row(src, dtype, n, x);
    if (factor == 0) memset(y, 0, (size_t)n * sizeof *y);
    else if (dtype == EXC_F32)
        for (int64_t i = 0; i < n; i++) y[i] = (float)((double)x[i] * factor);
    else
        for (int64_t i = 0; i < n; i++) y[i] = exc_round_to_odd((double)x[i] * factor);
    store_run(y, dst, dtype, n);
    exc_load_row(dst, dtype, n, z);
    for (int64_t i = 0; i < n; i++) {
        t->changed += exc_to_bits(x[i]) != exc_to_bits(z[i]);
        t->nonfinite += !is_finite(x[i]);
        t->overflow += is_finite(x[i]) && !is_finite(z[i]);
    }
}
EXC_DISPATCH(run, (const void *src, void *dst, int dtype, int64_t n, double factor, tally *t),
             (src, dst, dtype, n, factor, t))

typedef struct job {
    const struct exc_scale_args *a;
    size_t per_matrix; /* tasks */
    void (*run)(const void *src, void *dst, int dtype, int64_t n, double factor, tally *t);
} job;

static void add(int64_t *to, size_t matrix, int64_t n) {
    if (to && n) __atomic_fetch_add(to + matrix, n, __ATOMIC_RELAXED);
}

static void task_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_scale_args *a = j->a;
    size_t matrix = task / j->per_matrix, unit = size_of(a->dtype);
    int64_t at = (int64_t)(task % j->per_matrix) * TASK_ELEMENTS, end = exc_least(at + TASK_ELEMENTS, a->n);
    const uint8_t *src = a->src[matrix];
    uint8_t *dst = a->dst[matrix];
    tally t = {0};
    (void)worker;
    if (a->factor[matrix] == 1) {
        if (src != dst) memcpy(dst + (size_t)at * unit, src + (size_t)at * unit, (size_t)(end - at) * unit);
        return;
    }
    for (; at < end; at += RUN)
        j->run(src + (size_t)at * unit, dst + (size_t)at * unit, a->dtype, exc_least(RUN, end - at), a->factor[matrix], &t);
    add(a->changed, matrix, t.changed);
    add(a->nonfinite, matrix, t.nonfinite);
    add(a->overflow, matrix, t.overflow);
}

exc_status exc_cpu_scale(exc_queue *q, const struct exc_scale_args *a) {
    if (a->count >= 0 && exc_is_coded(a->dtype)) return exc_requant_scale(q, a);
    if (a->count < 0 || a->n < 0 || (a->dtype != EXC_BF16 && a->dtype != EXC_F16 && a->dtype != EXC_F32))
        return EXC_ERR_USAGE;
    job j = {.a = a, .per_matrix = exc_task_count(a->n, TASK_ELEMENTS), .run = run_for()};
    int64_t *const counts[] = {a->changed, a->nonfinite, a->overflow};
    for (int i = 0; i < 3; i++)
        if (counts[i]) memset(counts[i], 0, (size_t)a->count * sizeof **counts);
    q->parallel(q, j.per_matrix * (size_t)a->count, task_run, &j);
    return EXC_OK;
}
