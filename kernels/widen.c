/* widen.c - a quantised matrix [rows,cols] (codes.h) as numbers: code times scale, rounded once to f32 or bf16, exact in f64; and
 * the look for NaN codes and scales that are no finite number.
 *
 * Rows are independent tasks. A run under one scale is decoded in f32, where a code is exact, in a loop that compilers make
 * vectors of. */
#include <stdatomic.h>
#include <string.h>

#include "codes.h"
#include "lanes.h"

#define TASK_ELEMENTS (64 << 10)

EXC_INLINE void decode_body(const uint8_t *code, int dtype, int n, float *x) {
    if (dtype == EXC_F4)
        for (int i = 0; i < n; i++) x[i] = exc_from_e2m1((uint32_t)code[i / 2] >> (i % 2 ? 4 : 0));
    else
        for (int i = 0; i < n; i++) x[i] = exc_from_e4m3(code[i]);
}
EXC_DISPATCH(decode, (const uint8_t *code, int dtype, int n, float *x), (code, dtype, n, x))

typedef struct job {
    const struct exc_widen_args *a;
    void (*decode)(const uint8_t *code, int dtype, int n, float *x);
    int64_t per_task;
    _Atomic int64_t bad, first;
} job;

static void put(const struct exc_widen_args *a, const float *x, float scale, int64_t at, int n) {
    if (a->dst_dtype == EXC_F64)
        for (int i = 0; i < n; i++) ((double *)a->dst)[at + i] = (double)x[i] * (double)scale;
    else
        for (int i = 0; i < n; i++) exc_store_act(x[i] * scale, a->dst, at + i, a->dst_dtype);
}

static void found(job *j, int64_t at, int64_t bad) {
    atomic_fetch_add(&j->bad, bad);
    int64_t seen = atomic_load(&j->first);
    while (at < seen && !atomic_compare_exchange_weak(&j->first, &seen, at)) {}
}

/* a run under one scale */
static void look(job *j, const uint8_t *code, float scale, int64_t at, int n) {
    int finite = (exc_to_bits(scale) & 0x7f800000u) != 0x7f800000u, first = n, bad = 0;
    if (finite && j->a->dtype == EXC_F4) return;
    for (int i = n - 1; i >= 0; i--)
        if (!finite || (code[i] & 0x7f) == EXC_NAN_E4M3) first = i, bad++;
    if (bad) found(j, at + first, bad);
}

static void run(void *arg, size_t task, int worker) {
    job *j = arg;
    const struct exc_widen_args *a = j->a;
    const int64_t span = exc_scale_span(a->dtype), spans = (a->cols + span - 1) / span;
    const int64_t from = (int64_t)task * j->per_task, to = exc_least(from + j->per_task, a->rows);
    (void)worker;
    for (int64_t r = from; r < to; r++)
        for (int64_t s = 0; s < spans; s++) {
            int64_t at = r * a->cols + s * span, row = a->dtype == EXC_F4 ? r : r / EXC_BLOCK;
            int n = (int)exc_least(span, a->cols - s * span);
            const uint8_t *code = (const uint8_t *)a->src + (a->dtype == EXC_F4 ? at / 2 : at);
            float x[EXC_BLOCK], scale = exc_scale_at(a->scale, a->scale_dtype, row * spans + s);
            look(j, code, scale, at, n);
            if (!a->dst) continue;
            j->decode(code, a->dtype, n, x);
            put(a, x, scale, at, n);
        }
}

exc_status exc_cpu_widen(exc_queue *q, const struct exc_widen_args *a) {
    int known = a->dst_dtype == EXC_F32 || a->dst_dtype == EXC_BF16 || a->dst_dtype == EXC_F64;
    if (a->rows < 0 || a->cols < 1 || !exc_is_coded(a->dtype) || !exc_is_scale(a->dtype, a->scale_dtype)) return EXC_ERR_USAGE;
    if ((a->dst && !known) || (a->dtype == EXC_F4 && a->cols % EXC_GROUP)) return EXC_ERR_USAGE;
    job j = {.a = a, .decode = decode_for(), .per_task = exc_rows_per_task(TASK_ELEMENTS, a->cols)};
    atomic_init(&j.bad, 0);
    atomic_init(&j.first, INT64_MAX);
    q->parallel(q, exc_task_count(a->rows, j.per_task), run, &j);
    if (a->nonfinite) *a->nonfinite = atomic_load(&j.bad);
    if (a->index) *a->index = atomic_load(&j.bad) ? atomic_load(&j.first) : -1;
    return EXC_OK;
}
