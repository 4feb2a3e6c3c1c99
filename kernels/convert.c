/* convert.c - n elements from one of bf16, f16, f32, f64 to another, and the look for NaN and infinity on the way.
 *
 * Every pair goes through f32 in runs that stay in the first-level cache: widening is exact, narrowing rounds to nearest
 * even. From f64 to a half the f32 in the middle is rounded to odd, so that the second rounding sees on which side of a tie
 * the number lies and the result is rounded once. Equal dtypes are copied, whatever the bits. */
#include <stdatomic.h>
#include <string.h>

#include "lanes.h"

#define RUN 1024
#define TASK_ELEMENTS (64 << 10)

static size_t size_of(int dtype) { return dtype == EXC_F64 ? 8 : dtype == EXC_F32 ? 4 : 2; }

EXC_INLINE void run_body(const void *src, int from, void *dst, int to, int64_t n) {
    float mid[RUN];
    if (from == EXC_F64) {
        const double *d = src;
        if (to == EXC_F32)
            for (int64_t i = 0; i < n; i++) mid[i] = (float)d[i];
        else
            for (int64_t i = 0; i < n; i++) mid[i] = exc_round_to_odd(d[i]);
    } else {
        exc_load_row(src, from, n, mid);
    }
    if (to == EXC_F64)
        for (int64_t i = 0; i < n; i++) ((double *)dst)[i] = (double)mid[i];
    else if (to == EXC_F32)
        memcpy(dst, mid, (size_t)n * 4);
    else if (to == EXC_BF16)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)dst)[i] = (uint16_t)exc_round_bf16(mid[i]);
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)dst)[i] = (uint16_t)exc_round_f16(mid[i]);
}
EXC_DISPATCH(run, (const void *src, int from, void *dst, int to, int64_t n), (src, from, dst, to, n))

/* how many of n (at most RUN) elements have all exponent bits set; counters as wide as the elements vectorise best */
EXC_INLINE void look_body(const void *src, int dtype, int64_t n, int64_t *bad) {
    if (dtype == EXC_F64) {
        uint64_t count = 0;
        for (int64_t i = 0; i < n; i++) count += (((const uint64_t *)src)[i] & 0x7ff0000000000000u) == 0x7ff0000000000000u;
        *bad = (int64_t)count;
    } else if (dtype == EXC_F32) {
        uint32_t count = 0;
        for (int64_t i = 0; i < n; i++) count += (((const uint32_t *)src)[i] & 0x7f800000u) == 0x7f800000u;
        *bad = (int64_t)count;
    } else {
        uint16_t mask = dtype == EXC_BF16 ? 0x7f80 : 0x7c00, count = 0;
        for (int64_t i = 0; i < n; i++) count = (uint16_t)(count + ((((const uint16_t *)src)[i] & mask) == mask));
        *bad = (int64_t)count;
    }
}
EXC_DISPATCH(look, (const void *src, int dtype, int64_t n, int64_t *bad), (src, dtype, n, bad))

typedef struct job {
    const struct exc_convert_args *a;
    void (*convert)(const void *src, int from, void *dst, int to, int64_t n);
    void (*look)(const void *src, int dtype, int64_t n, int64_t *bad);
    _Atomic int64_t bad, first; /* first: the lowest index yet, n when none */
} job;

static int is_bad(const void *src, int dtype, int64_t i) {
    int64_t bad;
    look_generic((const uint8_t *)src + (size_t)i * size_of(dtype), dtype, 1, &bad);
    return bad > 0;
}

static void found(job *j, int64_t at, int64_t bad) {
    atomic_fetch_add(&j->bad, bad);
    while (!is_bad(j->a->src, j->a->src_dtype, at)) at++;
    int64_t seen = atomic_load(&j->first);
    while (at < seen && !atomic_compare_exchange_weak(&j->first, &seen, at)) {}
}

static void task_run(void *arg, size_t task, int worker) {
    job *j = arg;
    const struct exc_convert_args *a = j->a;
    (void)worker;
    int64_t at = (int64_t)task * TASK_ELEMENTS, end = exc_least(at + TASK_ELEMENTS, a->n);
    size_t in = size_of(a->src_dtype), out = size_of(a->dst_dtype);
    for (; at < end; at += RUN) {
        int64_t n = exc_least(RUN, end - at), bad = 0;
        const uint8_t *src = (const uint8_t *)a->src + (size_t)at * in;
        if (a->nonfinite || a->index) j->look(src, a->src_dtype, n, &bad);
        if (bad) found(j, at, bad);
        if (!a->dst) continue;
        uint8_t *dst = (uint8_t *)a->dst + (size_t)at * out;
        if (a->src_dtype == a->dst_dtype) memmove(dst, src, (size_t)n * in);
        else j->convert(src, a->src_dtype, dst, a->dst_dtype, n);
    }
}

static int known(int dtype) { return dtype == EXC_F32 || dtype == EXC_BF16 || dtype == EXC_F16 || dtype == EXC_F64; }

exc_status exc_cpu_convert(exc_queue *q, const struct exc_convert_args *a) {
    if (a->n < 0 || !known(a->src_dtype) || (a->dst && !known(a->dst_dtype))) return EXC_ERR_USAGE;
    job j = {.a = a, .convert = run_for(), .look = look_for()};
    atomic_init(&j.bad, 0);
    atomic_init(&j.first, a->n);
    q->parallel(q, exc_task_count(a->n, TASK_ELEMENTS), task_run, &j);
    if (a->nonfinite) *a->nonfinite = atomic_load(&j.bad);
    if (a->index) *a->index = atomic_load(&j.first) < a->n ? atomic_load(&j.first) : -1;
    return EXC_OK;
}
