/* gram.c - Gram matrices of samples in f64: X X^T (samples) or X^T X (width), one a layer, uncentred.
 *
 * Products of two f32 are exact in f64, so only the additions round. A task is a block of 32 rows of one result; blocks above
 * the diagonal are mirrored from below it. X^T X adds sample after sample; X X^T sums a pair of rows in 16 lanes. */
#include <string.h>

#include "lanes.h"

#define BLOCK 32

EXC_INLINE void dot_body(const float *x, const float *y, int64_t n, double *out) {
    double lane[LANES] = {0}, s = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += (double)x[i + l] * (double)y[i + l];
    for (; i < n; i++) s += (double)x[i] * (double)y[i];
    for (int l = 0; l < LANES; l++) s += lane[l];
    *out = s;
}
EXC_DISPATCH(dot, (const float *x, const float *y, int64_t n, double *out), (x, y, n, out))

EXC_INLINE void axpy_body(double x, const float *y, int64_t n, double *out) {
    for (int64_t i = 0; i < n; i++) out[i] += x * (double)y[i];
}
EXC_DISPATCH(axpy, (double x, const float *y, int64_t n, double *out), (x, y, n, out))

typedef struct job {
    const struct exc_gram_args *a;
    int64_t size, blocks; /* rows of one result, and tasks of it */
    void (*dot)(const float *x, const float *y, int64_t n, double *out);
    void (*axpy)(double x, const float *y, int64_t n, double *out);
} job;

/* rows first..last-1 of the lower triangle */
static void block_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_gram_args *a = j->a;
    int64_t layer = (int64_t)task / j->blocks, first = (int64_t)task % j->blocks * BLOCK;
    int64_t last = exc_least(first + BLOCK, j->size), N = j->size;
    const float *x = a->x + layer * a->layer_stride;
    double *g = a->g + layer * N * N;
    (void)worker;
    if (a->side == EXC_GRAM_SAMPLES) {
        for (int64_t i = first; i < last; i++)
            for (int64_t k = 0; k <= i; k++) j->dot(x + i * a->row_stride, x + k * a->row_stride, a->width, g + i * N + k);
        return;
    }
    for (int64_t i = first; i < last; i++) memset(g + i * N, 0, (size_t)(i + 1) * sizeof *g);
    for (int64_t s = 0; s < a->samples; s++) {
        const float *row = x + s * a->row_stride;
        for (int64_t i = first; i < last; i++) j->axpy((double)row[i], row, i + 1, g + i * N);
    }
}

static void mirror_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t N = j->size, layer = (int64_t)task / j->blocks, first = (int64_t)task % j->blocks * BLOCK;
    double *g = j->a->g + layer * N * N;
    (void)worker;
    for (int64_t i = first; i < exc_least(first + BLOCK, N); i++)
        for (int64_t k = i + 1; k < N; k++) g[i * N + k] = g[k * N + i];
}

exc_status exc_cpu_gram(exc_queue *q, const struct exc_gram_args *a) {
    if (a->layers < 0 || a->samples < 0 || a->width < 0 || a->row_stride < a->width) return EXC_ERR_USAGE;
    if (a->side != EXC_GRAM_SAMPLES && a->side != EXC_GRAM_WIDTH) return EXC_ERR_USAGE;
    job j = {.a = a, .size = a->side == EXC_GRAM_SAMPLES ? a->samples : a->width, .dot = dot_for(), .axpy = axpy_for()};
    j.blocks = (j.size + BLOCK - 1) / BLOCK;
    q->parallel(q, (size_t)(a->layers * j.blocks), block_run, &j);
    q->parallel(q, (size_t)(a->layers * j.blocks), mirror_run, &j);
    return EXC_OK;
}
