/* bench.h - what the parts of the harness share: the run, a row, the ceilings, and how the two are timed together.
 *
 * A row is one piece of work with a ceiling: what this machine could do at best, measured in the same run by the simplest loop
 * that does only the traffic or only the arithmetic. Work and ceiling are timed in turns and the row's fraction is the median
 * of the ratios of neighbours (turns.c), because a shared machine drifts by more than the differences that matter. Every row's
 * result is checked before it is timed; a wrong result makes the program fail. */
#ifndef EXC_BENCH_H
#define EXC_BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base.h"
#include "ops.h"

typedef enum ceiling {
    CEIL_NONE,
    CEIL_READ, /* bytes read by all threads from memory */
    CEIL_COPY, /* bytes read plus bytes written of a copy */
    CEIL_RMW,  /* bytes edited in place: each is read once and written once */
    CEIL_BF16, /* FLOP of a bf16 matmul: oneDNN's where present, else our loop in registers (ceilings.c) */
    CEIL_F32,  /* FLOP of f32 fused multiply-adds in registers */
    CEIL_F64,
    CEILINGS
} ceiling;

typedef struct bench {
    exc_ctx *ctx;
    const char *self;      /* path of this program */
    const char *data;      /* tests/data of the source tree */
    char *tmp;             /* folder for checkpoints; removed at the end */
    const char *only[16];  /* row names or their beginnings */
    int n_only;
    bool quick;
    int rows, wrong, below; /* printed; failed their check; short of their target */
} bench;

typedef enum goal { GOAL_NONE, GOAL_FRACTION, GOAL_RATE, GOAL_SECONDS, GOAL_OVERHEAD, GOAL_RATIO } goal;

/* What is printed. Zero fields are left out. */
typedef struct row {
    const char *name, *shape;
    ceiling against;
    double work;          /* bytes or FLOP of one call, by the op's definition: never what the code happens to move */
    const char *unit;     /* of `value` when it is not a rate of `work` */
    double per_call;      /* units of one call ("tokens"), 0: value is work / seconds */
    goal goal;
    double target;
    double error;         /* of the check; limit beside it */
    double limit;
    const char *note;
    /* filled by bench_measure or by the caller */
    double seconds, value, fraction, fraction_low, fraction_high, ceiling_rate;
    int rounds, dropped; /* that count; that met a change of the machine's state */
    bool unsteady;       /* hardly any round did not: all count */
} row;

typedef void (*work_fn)(bench *b, void *arg);

/* ---- driver.c */
bool bench_wanted(const bench *b, const char *name);
void bench_emit(bench *b, row *r);                           /* prints a row whose figures are there already */
void bench_skip(bench *b, const char *name, const char *why);
void bench_must(bench *b, exc_status st, const char *what);  /* ends the program on failure, with the context's text */
double bench_median(double *x, int n);                       /* sorts x */

/* ---- turns.c */
enum { TURNS = 63 };
/* where the turns stand: the ceiling about the work that was timed last */
typedef struct turns {
    ceiling against;
    double slice, before, rate; /* seconds of a sample of the ceiling; the last sample; mean of the last two */
    bool steady;                /* those two are about the same */
} turns;
/* what turns found about one piece of work */
typedef struct series {
    double seconds[TURNS], fraction[TURNS], rate[TURNS];
    int kept, dropped;
} series;
void turns_begin(bench *b, turns *t, ceiling against, double slice); /* takes the first sample of the ceiling */
void turns_next(bench *b, turns *t);                                 /* after the work: the next sample */
bool series_add(series *s, const turns *t, double seconds, double work); /* false: full */
void series_row(series *s, row *r);                                  /* medians over steady turns; sorts s */
void bench_measure(bench *b, row *r, work_fn fn, void *arg);         /* times fn and the row's ceiling in turns, prints the row */

/* ---- ceilings.c */
void ceilings_open(bench *b);  /* takes buffers, finds the best variant of each loop */
void ceilings_choose(bench *b, ceiling c); /* a loop over memory: its best variant as the machine is now */
double ceilings_rate(bench *b, ceiling c, double seconds); /* one sample of about that length: bytes/s or FLOP/s */
const char *ceilings_name(ceiling c);
const char *ceilings_variant(ceiling c);
void ceilings_rows(bench *b);
void ceilings_close(bench *b);

/* onednn.c, built where the library is; weak elsewhere: bf16 [m,k] x [k,n], FLOP/s, 0 when refused */
typedef struct onednn onednn;
__attribute__((weak)) onednn *onednn_open(int64_t m, int64_t n, int64_t k);
__attribute__((weak)) double onednn_run(onednn *o);
__attribute__((weak)) void onednn_close(onednn *o);

/* ---- fill.c: memory and numbers */
void *bench_alloc(bench *b, size_t bytes);
void fill_f32(bench *b, float *p, size_t n, float scale, uint64_t seed);    /* uniform, standard deviation `scale` */
void fill_bf16(bench *b, uint16_t *p, size_t n, float scale, uint64_t seed);
uint16_t to_bf16(float x);
float from_bf16(uint16_t x);
void unit_rows(float *r, int64_t rank, int64_t width, uint64_t seed);       /* orthonormal rows */
exc_packed pack_random(bench *b, int64_t n, int64_t k, float scale, uint64_t seed, uint16_t **plain);

/* ---- maker.c: random qwen3_moe checkpoints in the published layout */
typedef struct spec {
    const char *name;
    int64_t layers, hidden, heads, kv_heads, head_dim, vocab, experts, top_k, inner;
    int shards;
} spec;
extern const spec spec_random, spec_demo, spec_cached, spec_large;
const spec *spec_find(const char *name);
char *make_model(bench *b, const spec *s, const char *dir); /* dir NULL: tmp/<name>; made once; path owned by the maker */
uint64_t spec_bytes(const spec *s);
double spec_flop(const spec *s, double tokens, double visible); /* one forward pass without the head; visible: mean keys a query sees */

/* ---- the rows */
void flow_rows(bench *b);    /* flow.c: ops of the forward pass */
void latent_rows(bench *b);  /* latents.c: ops of multi-head latent attention */
void delta_rows(bench *b);   /* deltas.c: ops of the gated delta net */
void sums_rows(bench *b);    /* sums.c: ops of statistics and comparison */
void edits_rows(bench *b);   /* edits.c: weight edits and subspaces */
void coded_rows(bench *b);   /* coded.c: fp8 and fp4 weights, multiplied and edited as they are stored */
void engine_rows(bench *b);  /* engine.c: whole models in memory */
void disk_rows(bench *b);    /* disk.c: files, loading, tokenizer, peak memory */
int capture_child(bench *b, const char *dir); /* engine.c: the capture whose peak memory a parent watches */
int token_child(bench *b, const char *dir);   /* engine.c: a model's first token, printed; a parent watches the clock */

#endif
