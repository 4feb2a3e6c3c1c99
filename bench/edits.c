/* edits.c - rows of the weight edits and of the subspaces they use.
 *
 * edit_rankR: one layer's expert weights, 128 x [2048, 768] bf16 (402 MB), W <- W - R (R^T W) in place through the public
 * exc_edit_experts. Floor: every weight is read once and written once, so the ceiling is the best in-place loop. Editing
 * again what was edited costs the same traffic and arithmetic, so one buffer serves all repeats.
 * subspace_rank8: 48 layers of 4096 samples x 2048 f32 (1.6 GB). Floor: the samples are read once. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "files.h"

/* ------------------------------------------------------------------------------------------------------- edits */

typedef struct edit {
    int64_t experts, hidden, inner, rank;
    uint16_t *w, *before; /* [E,H,I]; before: copies of the experts that are checked */
    float *basis;         /* [R,H] */
    float *strength;      /* [E] */
} edit;

static void run_edit(bench *b, void *arg)
{
    edit *e = arg;
    bench_must(b, exc_edit_experts(b->ctx, e->w, EXC_BF16, e->experts, e->hidden, e->inner, e->basis, e->rank, e->strength,
                                   EXC_NORM_NONE, NULL), "edit");
}

/* share of elements of some columns of the first and last expert that differ from the f64 result rounded once; a difference
 * of more than one unit in the last place counts as all of them */
static double edit_error(const edit *e)
{
    const int64_t picked[2] = {0, e->experts - 1}, plane = e->hidden * e->inner;
    int64_t wrong = 0, seen = 0;
    for (int p = 0; p < 2; p++)
        for (int64_t c = 0; c < e->inner; c += 37) {
            const uint16_t *old = e->before + p * plane, *now = e->w + picked[p] * plane;
            double dot[64] = {0};
            for (int64_t r = 0; r < e->rank; r++)
                for (int64_t h = 0; h < e->hidden; h++)
                    dot[r] += (double)e->basis[r * e->hidden + h] * (double)from_bf16(old[h * e->inner + c]);
            for (int64_t h = 0; h < e->hidden; h++, seen++) {
                double x = (double)from_bf16(old[h * e->inner + c]);
                for (int64_t r = 0; r < e->rank; r++) x -= (double)e->basis[r * e->hidden + h] * dot[r];
                int off = abs((int)to_bf16((float)x) - (int)now[h * e->inner + c]);
                wrong += off == 0 ? 0 : off == 1 || off == 0x8000 ? 1 : seen + 1000000;
            }
        }
    return (double)wrong / (double)seen;
}

static void edit_row(bench *b, edit *e, int64_t rank, double target)
{
    char name[32], shape[64];
    snprintf(name, sizeof name, "edit_rank%d", (int)rank);
    if (!bench_wanted(b, name)) return;
    int64_t plane = e->hidden * e->inner;
    e->rank = rank;
    unit_rows(e->basis, rank, e->hidden, 7);
    fill_bf16(b, e->w, (size_t)(e->experts * plane), 0.02f, 3);
    memcpy(e->before, e->w, (size_t)plane * 2);
    memcpy(e->before + plane, e->w + (e->experts - 1) * plane, (size_t)plane * 2);
    run_edit(b, e);
    snprintf(shape, sizeof shape, "%d x %d x %d bf16, rank %d", (int)e->experts, (int)e->hidden, (int)e->inner, (int)rank);
    row r = {.name = name, .shape = shape, .against = CEIL_RMW, .work = 2.0 * (double)(e->experts * plane),
             .goal = target > 0 ? GOAL_FRACTION : GOAL_NONE, .target = target, .error = edit_error(e), .limit = 1e-3,
             .note = "error: share of elements one unit off the f64 result rounded once"};
    bench_measure(b, &r, run_edit, e);
}

static void edit_rows_of_layer(bench *b)
{
    edit e = {.experts = b->quick ? 32 : 128, .hidden = 2048, .inner = 768};
    if (!bench_wanted(b, "edit_rank1") && !bench_wanted(b, "edit_rank3") && !bench_wanted(b, "edit_rank8")) return;
    e.w = bench_alloc(b, (size_t)(e.experts * e.hidden * e.inner) * 2);
    e.before = bench_alloc(b, (size_t)(2 * e.hidden * e.inner) * 2);
    e.basis = bench_alloc(b, (size_t)(64 * e.hidden) * 4);
    e.strength = bench_alloc(b, (size_t)e.experts * 4);
    for (int64_t i = 0; i < e.experts; i++) e.strength[i] = 1;
    edit_row(b, &e, 1, 0.80);
    edit_row(b, &e, 3, 0.65);
    edit_row(b, &e, 8, 0);
    exc_release(e.w);
    exc_release(e.before);
    exc_release(e.basis);
    exc_release(e.strength);
}

/* ------------------------------------------------------------------------------- project: the op's other sides */

typedef struct side {
    struct exc_project_args a;
    const void *src[8];
    void *dst[8];
} side;

static void run_side(bench *b, void *arg)
{
    side *s = arg;
    bench_must(b, b->ctx->ops->project(&b->ctx->queue, &s->a), "project");
}

/* |r W| of the first matrix in f64, r the first row of R, every fifth column: the op's own sums would be their own witness */
static double along_first(const side *s)
{
    const struct exc_project_args *a = &s->a;
    double sum = 0;
    int64_t across = a->side == EXC_SIDE_OUT ? a->cols : a->rows, along = a->side == EXC_SIDE_OUT ? a->rows : a->cols;
    for (int64_t j = 0; j < across; j += 5) {
        double dot = 0;
        for (int64_t i = 0; i < along; i++) {
            int64_t at = a->side == EXC_SIDE_OUT ? i * a->cols + j : j * a->cols + i;
            double w = a->dtype == EXC_F32 ? (double)((const float *)s->dst[0])[at] : (double)from_bf16(((const uint16_t *)s->dst[0])[at]);
            dot += w * (double)a->basis[i];
        }
        sum += dot * dot;
    }
    return sqrt(sum);
}

static void side_row(bench *b, const char *name, int which, int dtype, int64_t rank, int norm)
{
    enum { N = 8, ROWS = 4096, COLS = 4096 };
    char shape[64];
    if (!bench_wanted(b, name)) return;
    size_t size = dtype == EXC_F32 ? 4 : 2, plane = (size_t)ROWS * COLS;
    float *basis = bench_alloc(b, (size_t)(rank * 4096) * 4), strength[N];
    side s = {.a = {.dtype = dtype, .count = N, .rows = ROWS, .cols = COLS, .side = which, .basis = basis, .rank = rank,
                    .strength = strength, .norm = norm}};
    for (int i = 0; i < N; i++) {
        s.dst[i] = bench_alloc(b, plane * size);
        s.src[i] = s.dst[i];
        strength[i] = 1;
        if (dtype == EXC_F32) fill_f32(b, s.dst[i], plane, 0.02f, (uint64_t)i);
        else fill_bf16(b, s.dst[i], plane, 0.02f, (uint64_t)i);
    }
    s.a.src = s.src;
    s.a.dst = s.dst;
    unit_rows(basis, rank, 4096, 9);
    double before = along_first(&s);
    run_side(b, &s);
    snprintf(shape, sizeof shape, "%d x %d x %d %s, rank %d", N, ROWS, COLS, exc_dtype_name((exc_dtype)dtype), (int)rank);
    /* a random direction holds 1/64 of the matrix, so the edit moves most bf16 elements by less than a step and rounding leaves
     * 1.4 % of it, as it does of the exact result */
    row r = {.name = name, .shape = shape, .against = CEIL_RMW, .work = (double)N * (double)plane * (double)size,
             .error = along_first(&s) / before, .limit = dtype == EXC_F32 ? 1e-5 : 0.02, .note = "error: share of the direction that is left"};
    bench_measure(b, &r, run_side, &s);
    for (int i = 0; i < N; i++) exc_release(s.dst[i]);
    exc_release(basis);
}

/* ---------------------------------------------------------------------------------------------------- subspace */

typedef struct samples {
    struct exc_subspace_args a;
    float *x;
} samples;

static void run_subspace(bench *b, void *arg)
{
    samples *s = arg;
    bench_must(b, b->ctx->ops->subspace(&b->ctx->queue, &s->a), "subspace");
}

typedef struct planting {
    float *x, *u, *v; /* [n,d]; [n,k], [d,k] */
    int64_t n, d, k;
    const double *s;
} planting;

static void plant_row(void *arg, size_t i, int worker)
{
    const planting *p = arg;
    for (int64_t j = 0; j < p->k; j++) {
        float f = (float)p->s[j] * p->u[(int64_t)i * p->k + j];
        for (int64_t c = 0; c < p->d; c++) p->x[(int64_t)i * p->d + c] += f * p->v[j * p->d + c];
    }
}

/* noise of unit variance plus 32 directions whose strengths fall by a fifth each: the spectrum of residual streams is long-tailed,
 * and a wide gap would flatter an iterative method */
static void plant(bench *b, float *x, int64_t n, int64_t d, uint64_t seed)
{
    enum { K = 32 };
    double s[K];
    float *u = bench_alloc(b, (size_t)(n * K) * 4), *v = bench_alloc(b, (size_t)(d * K) * 4);
    fill_f32(b, x, (size_t)(n * d), 1, seed);
    fill_f32(b, u, (size_t)(n * K), 1 / sqrtf((float)n), seed + 1);
    fill_f32(b, v, (size_t)(d * K), 1 / sqrtf((float)d), seed + 2);
    for (int i = 0; i < K; i++) s[i] = 3000 * pow(0.8, i);
    planting p = {x, u, v, n, d, K, s};
    b->ctx->queue.parallel(&b->ctx->queue, (size_t)n, plant_row, &p);
    exc_release(u);
    exc_release(v);
}

typedef struct product {
    const float *x;
    const double *v;
    double *y; /* [n,K] = X V, V [d,K] */
    int64_t n, d;
} product;
#define BLOCK_K 24

static void product_row(void *arg, size_t i, int worker)
{
    const product *p = arg;
    double s[BLOCK_K] = {0};
    for (int64_t c = 0; c < p->d; c++)
        for (int k = 0; k < BLOCK_K; k++) s[k] += (double)p->x[(int64_t)i * p->d + c] * p->v[c * BLOCK_K + k];
    memcpy(p->y + (int64_t)i * BLOCK_K, s, sizeof s);
}

static void product_column(void *arg, size_t block, int worker)
{
    const product *p = arg; /* here v [n,K] and y [d,K] = X^T V, 64 columns a task */
    double *y = p->y + (int64_t)block * 64 * BLOCK_K;
    memset(y, 0, 64 * BLOCK_K * sizeof *y);
    for (int64_t i = 0; i < p->n; i++)
        for (int64_t c = 0; c < 64; c++)
            for (int k = 0; k < BLOCK_K; k++)
                y[c * BLOCK_K + k] += (double)p->x[i * p->d + (int64_t)block * 64 + c] * p->v[i * BLOCK_K + k];
}

static void orthonormal_columns(double *v, int64_t d)
{
    for (int k = 0; k < BLOCK_K; k++) {
        for (int pass = 0; pass < 2; pass++)
            for (int j = 0; j < k; j++) {
                double dot = 0;
                for (int64_t c = 0; c < d; c++) dot += v[c * BLOCK_K + k] * v[c * BLOCK_K + j];
                for (int64_t c = 0; c < d; c++) v[c * BLOCK_K + k] -= dot * v[c * BLOCK_K + j];
            }
        double norm = 0;
        for (int64_t c = 0; c < d; c++) norm += v[c * BLOCK_K + k] * v[c * BLOCK_K + k];
        for (int64_t c = 0; c < d; c++) v[c * BLOCK_K + k] /= sqrt(norm);
    }
}

/* sine of the largest angle between the op's basis of layer 0 and the exact subspace, by f64 orthogonal iteration on a block of
 * 24 columns (s25/s8 = 0.8^17 = 0.02: sixteen rounds are exact to f64; with ordered columns the first 8 converge apart) */
static double angle(bench *b, const samples *s)
{
    int64_t n = s->a.samples, d = s->a.width, k = s->a.rank;
    double *v = bench_alloc(b, (size_t)(d * BLOCK_K) * 8), *y = bench_alloc(b, (size_t)(n * BLOCK_K) * 8);
    exc_queue *q = &b->ctx->queue;
    for (int64_t i = 0; i < d * BLOCK_K; i++) v[i] = exc_random_unit(5, 1, (uint64_t)i) - 0.5;
    orthonormal_columns(v, d);
    /* the gap between columns 8 and 9 is 0.8, and orthogonal iteration squares it: 0.64^80 = 3e-16 */
    for (int round = 0; round < 80; round++) {
        q->parallel(q, (size_t)n, product_row, &(product){s->x, v, y, n, d});
        q->parallel(q, (size_t)(d / 64), product_column, &(product){s->x, y, v, n, d});
        orthonormal_columns(v, d);
    }
    double worst = 0;
    for (int64_t r = 0; r < k; r++) {
        double inside = 0, whole = 0;
        const float *x = s->a.basis + r * d;
        double *left = y;
        for (int64_t c = 0; c < d; c++) left[c] = (double)x[c];
        for (int j = 0; j < k; j++) {
            double dot = 0;
            for (int64_t c = 0; c < d; c++) dot += (double)x[c] * v[c * BLOCK_K + j];
            for (int64_t c = 0; c < d; c++) left[c] -= dot * v[c * BLOCK_K + j];
        }
        for (int64_t c = 0; c < d; c++) inside += left[c] * left[c], whole += (double)x[c] * (double)x[c];
        if (!(sqrt(inside / whole) <= worst)) worst = sqrt(inside / whole);
    }
    exc_release(v);
    exc_release(y);
    return worst;
}

static void subspace_row(bench *b)
{
    int64_t layers = b->quick ? 6 : 48, n = 4096, d = 2048, k = 8;
    char shape[64];
    if (!bench_wanted(b, "subspace_rank8")) return;
    samples s = {.x = bench_alloc(b, (size_t)(layers * n * d) * 4)};
    for (int64_t l = 0; l < layers; l++)
        if (l < 3) plant(b, s.x + l * n * d, n, d, (uint64_t)(100 + 10 * l));
        else memcpy(s.x + l * n * d, s.x + l % 3 * n * d, (size_t)(n * d) * 4);
    size_t work = exc_subspace_bytes(layers, n, d, k, b->ctx->queue.workers);
    double *energy = bench_alloc(b, (size_t)layers * 8), *residual = bench_alloc(b, (size_t)layers * 8);
    s.a = (struct exc_subspace_args){.x = s.x, .layers = layers, .layer_stride = n * d, .samples = n, .row_stride = d, .width = d,
        .rank = k, .seed = 1, .basis = bench_alloc(b, (size_t)(layers * k * d) * 4), .singular = bench_alloc(b, (size_t)(layers * k) * 4),
        .energy = energy, .residual = residual, .work = bench_alloc(b, work), .work_bytes = work};
    run_subspace(b, &s);
    snprintf(shape, sizeof shape, "%d layers, %d samples x %d f32", (int)layers, (int)n, (int)d);
    row r = {.name = "subspace_rank8", .shape = shape, .against = CEIL_READ, .work = 4.0 * (double)(layers * n * d), .unit = "s",
             .goal = b->quick ? GOAL_NONE : GOAL_SECONDS, .target = 1, .error = angle(b, &s), .limit = 1e-6,
             .note = "error: sine of the angle to the exact subspace; ceiling: one read of the samples"};
    bench_measure(b, &r, run_subspace, &s);
    exc_release(s.x);
    exc_release(s.a.basis);
    exc_release(s.a.singular);
    exc_release(s.a.work);
    exc_release(energy);
    exc_release(residual);
}

void edits_rows(bench *b)
{
    edit_rows_of_layer(b);
    side_row(b, "project_out_f32", EXC_SIDE_OUT, EXC_F32, 1, EXC_NORM_NONE);
    side_row(b, "project_out_column", EXC_SIDE_OUT, EXC_BF16, 1, EXC_NORM_COLUMN);
    side_row(b, "project_in", EXC_SIDE_IN, EXC_BF16, 1, EXC_NORM_NONE);
    subspace_row(b);
}
