/* matmul.c - y [T,n] = x [T,k] W^T (+ bias) (+ add), W packed in panels of 16 outputs.
 *
 * Tasks are blocks of rows x runs of panel pairs. With few rows (decode) there is one block of rows and every panel is
 * read once, at the speed of memory; with many (prefill) the gathered rows of a block stay in the second-level cache
 * while panels stream by. Both are the same sweep over tiles (tile.h), so a row has the same bits in either. */
#include "tile.h"

typedef struct job {
    const struct exc_matmul_args *a;
    const exc_tile *tile;
    size_t panel_bytes, row_bytes;
    int64_t pairs, per_task, runs; /* panel pairs; pairs a task takes; tasks a block of rows has */
    int64_t block;                 /* rows of a task */
    size_t scratch_bytes;
    void **scratch;
} job;

typedef struct share {
    const job *j;
    int64_t first; /* first row of the task */
} share;

static const void *row(void *user, int64_t r) {
    const share *s = user;
    return (const uint8_t *)s->j->a->x + (size_t)(s->first + r) * s->j->row_bytes;
}

static void pair(void *user, int64_t p, const uint8_t *w[2]) {
    const job *j = ((const share *)user)->j;
    w[0] = exc_panel_at(j->a->w, 2 * p, j->panel_bytes);
    w[1] = (2 * p + 1) * EXC_PANEL < j->a->w->n ? exc_panel_at(j->a->w, 2 * p + 1, j->panel_bytes) : w[0];
}

static void done(void *user, int64_t p, int64_t first, int rows, const float (*out)[EXC_PAIR]) {
    const share *s = user;
    const struct exc_matmul_args *a = s->j->a;
    int64_t col = p * EXC_PAIR, left = a->w->n - col, at = (s->first + first) * a->y_stride + col;
    s->j->tile->store(out, rows, (int)(left < EXC_PAIR ? left : EXC_PAIR), a->y + at, a->y_stride,
                      a->bias ? a->bias + col : NULL, a->add ? a->add + at : NULL, NULL);
    exc_ask_rows(a->y + at + rows * a->y_stride, a->y_stride * 4, rows, EXC_PAIR * 4);
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t run = (int64_t)task % j->runs, last = (run + 1) * j->per_task;
    share s = {j, (int64_t)task / j->runs * j->block};
    exc_sweep sweep = {.tile = j->tile,
                       .k = j->a->w->k,
                       .rows = j->a->rows - s.first < j->block ? j->a->rows - s.first : j->block,
                       .first = run * j->per_task,
                       .last = last < j->pairs ? last : j->pairs,
                       .user = &s,
                       .row = row,
                       .pair = pair,
                       .done = done};
    exc_sweep_run(&sweep, j->scratch[worker], j->scratch_bytes);
}

exc_status exc_cpu_matmul(exc_queue *q, const struct exc_matmul_args *a) {
    if (!a->w || a->rows < 0 || a->w->k < 1 || a->w->n < 0) return EXC_ERR_USAGE;
    const exc_tile *tile = exc_tile_for(a->act, a->w->dtype);
    if (!tile) return EXC_ERR_USAGE;
    if (!a->rows || !a->w->n) return EXC_OK;
    if (!a->w->data) return EXC_ERR_USAGE;
    int64_t k = a->w->k;
    job j = {.a = a, .tile = tile, .scratch = q->scratch, .scratch_bytes = EXC_SWEEP_BYTES(q->scratch_bytes)};
    j.panel_bytes = exc_packed_bytes(EXC_PANEL, k, a->w->dtype);
    j.row_bytes = (size_t)a->x_stride * (a->act == EXC_BF16 ? 2 : 4);
    j.pairs = (a->w->n + EXC_PAIR - 1) / EXC_PAIR;
    j.block = exc_sweep_chunk(tile, k, j.scratch_bytes);
    j.per_task = exc_pairs_per_task(a->rows < j.block ? a->rows : j.block, k, j.pairs);
    j.runs = (j.pairs + j.per_task - 1) / j.per_task;
    q->parallel(q, (size_t)(j.runs * ((a->rows + j.block - 1) / j.block)), run, &j);
    return EXC_OK;
}
