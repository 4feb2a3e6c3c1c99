/* gauge.h - what the parts of excise_gpu share: the run, arrays on the device, a row and how it is timed.
 *
 * A row is one call of an op (or of somebody else's code for the same work) at a size of a published model, with the bytes or FLOP
 * that its definition needs: never what the code moves. Rates stand beside what this GPU did in the same run at a bare copy
 * and at a bare matmul. Arrays hold random numbers, made on the device: zeros run faster than numbers. */
#ifndef EXC_GAUGE_H
#define EXC_GAUGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base.h"
#include "module.h"

typedef struct gauge {
    exc_ctx *ctx, *cpu;
    exc_device_info info;
    const char *only[16]; /* beginnings of row names; none: all */
    int n_only;
    bool quick;
    char libraries[2048]; /* what the module says of them */
    double copy, peak;    /* bytes/s, read plus written; FLOP/s of bf16. 0: not measured */
    int rows, skipped, wrong;
    void *held[256]; /* arrays of the group of rows at work */
    int n_held;
    uint64_t seed;
} gauge;

typedef exc_status (*work_fn)(gauge *g, const void *arg);

typedef struct row {
    const char *name, *by; /* by NULL: excise */
    char shape[128];
    double bytes, flop;               /* of one call */
    double tokens;                    /* 0: not what it is about */
    bool eager;                       /* not to be captured in a graph */
    double seconds, low, high, floor; /* floor: the least that its bytes could take; 0: not told */
    double overhead;                  /* percent, where `compared` */
    bool compared;
    const char *note;
} row;

/* ---- gauge.c */
void gauge_must(gauge *g, exc_status st,
                const char *what); /* ends the program on failure, with the text of the context */
bool gauge_wanted(const gauge *g, const char *name);
double gauge_median(double *x, int n);    /* sorts x */
void *gauge_room(gauge *g, size_t bytes); /* device memory until gauge_clear() */
void *gauge_up(gauge *g, const void *host, size_t bytes);
void *gauge_zeros(gauge *g, size_t bytes);
void *gauge_numbers(gauge *g, int64_t n, int dtype, float deviation); /* bf16 or f32 */
void *gauge_codes(gauge *g, size_t bytes);                            /* e4m3 or fp4: middling numbers, no NaN */
int64_t *gauge_steps(gauge *g, int64_t n, int64_t step);              /* 0, step, .. */
void gauge_clear(gauge *g);
/* times `turns` argument blocks of `size` bytes in turn, so that no call finds its arrays in a cache; then prints */
void gauge_row(gauge *g, row *r, work_fn fn, const void *args, size_t size, int turns);
void gauge_print(gauge *g, const row *r);
void gauge_skip(gauge *g, const row *r, const char *why, ...) EXC_PRINTF(3, 4);
void gauge_op(gauge *g, const char *op, work_fn fn, const void *args, size_t size, int turns, double bytes, double flop,
              const char *shape, ...) EXC_PRINTF(9, 10);
/* The row of an op by our own kernels and, in front of it, by the library that the module takes for it (NULL: none); the two agree
 * in the first n f32 numbers of `out`. */
void gauge_both(gauge *g, const char *library, const char *op, work_fn fn, const void *args, const void *out, int64_t n,
                double bytes, double flop, const char *shape, ...) EXC_PRINTF(10, 11);

/* every op as a work_fn: gauge_ops.norm */
struct gauge_ops {
#define EXC_OP(name, ...) work_fn name;
#include "ops.def"
#undef EXC_OP
};
extern const struct gauge_ops gauge_ops;
#define ROW(g, op, args, bytes, flop, ...)                                                                             \
    gauge_op(g, #op, gauge_ops.op, args, sizeof *(args), 1, bytes, flop, __VA_ARGS__)
#define RUN(g, op, ...) gauge_must(g, gauge_now(g, gauge_ops.op, &(struct exc_##op##_args){__VA_ARGS__}), #op)
exc_status gauge_now(gauge *g, work_fn fn, const void *args); /* one call with the scratch that it asks for */

/* ---- the rows */
void limit_rows(gauge *g);      /* limits.c: copies and the matmul that all rates stand beside */
void projection_rows(gauge *g); /* projection.c: edits of weights */
void layer_rows(gauge *g);      /* layers.c: the ops of a layer with softmax attention and experts */
void mixer_rows(gauge *g);      /* mixers.c: latent attention, gated delta nets, windows */
void mover_rows(gauge *g);      /* movers.c: ops that move, convert or scale arrays */
void figure_rows(gauge *g);     /* figures.c: statistics, comparison, sampling, spectra */
void whole_rows(gauge *g);      /* whole.c: a whole model: prefill, decode, capture, and the edit of all its experts */

#endif
