/* matmul.c - y [T,n] = x [T,k] W^T (+ bias) (+ add), W packed in panels of 16 outputs.
 *
 * Tasks are blocks of rows x runs of panel pairs. With few rows (decode) there is one block of rows and every panel is
 * read once, at the speed of memory; with many (prefill) the gathered rows of a block stay in the second-level cache
 * while panels stream by. Both are the same sweep over tiles (tile.h), so a row has the same bits in either.
 *
 * oneDNN is not called: on the same machine its matmul was 0-2 % faster at 2048 rows and no faster at 512 or 16, and it
 * brings OpenMP threads that contend with ours. The bench keeps it as the ceiling. */
#include "tile.h"

typedef struct job {
    const struct exc_matmul_args *a;
    const exc_tile *tile;
    size_t panel_bytes, row_bytes;
    int64_t panels, block; /* panels of W; rows of a task */
    exc_spread spread;     /* of the panel pairs, for each block of rows */
    size_t scratch_bytes;
    void **scratch;
} job;

typedef struct share {
    const job *j;
    int64_t row, first, last; /* first row of the task; its pairs */
} share;

static const void *row(void *user, int64_t r) {
    const share *s = user;
    return (const uint8_t *)s->j->a->x + (size_t)(s->row + r) * s->j->row_bytes;
}

static void pair(void *user, int64_t p, const uint8_t *w[2]) {
    const share *s = user;
    int64_t a = exc_run_panel(s->first, s->last, p, 0), b = exc_run_panel(s->first, s->last, p, 1);
    w[0] = exc_panel_at(s->j->a->w, a, s->j->panel_bytes);
    w[1] = b < s->j->panels ? exc_panel_at(s->j->a->w, b, s->j->panel_bytes) : w[0];
}

static void done(void *user, int64_t p, int64_t first, int rows, const float (*out)[EXC_PAIR]) {
    const share *s = user;
    const struct exc_matmul_args *a = s->j->a;
    for (int half = 0; half < 2; half++) {
        int64_t col = exc_run_panel(s->first, s->last, p, half) * EXC_PANEL, left = a->w->n - col;
        if (left <= 0) continue;
        int64_t at = (s->row + first) * a->y_stride + col;
        s->j->tile->store((const float (*)[EXC_PAIR])(out[0] + half * EXC_PANEL), rows,
                          (int)(left < EXC_PANEL ? left : EXC_PANEL), a->y + at, a->y_stride,
                          a->bias ? a->bias + col : NULL, a->add ? a->add + at : NULL, NULL);
        exc_ask_rows(a->y + at + rows * a->y_stride, a->y_stride * 4, rows, EXC_PANEL * 4);
    }
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    share s = {.j = j, .row = (int64_t)(task / j->spread.tasks) * j->block};
    s.last = exc_spread_task(&j->spread, (int64_t)(task % j->spread.tasks), &s.first);
    exc_sweep sweep = {.tile = j->tile,
                       .k = j->a->w->k,
                       .rows = j->a->rows - s.row < j->block ? j->a->rows - s.row : j->block,
                       .first = s.first,
                       .last = s.last,
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
    int64_t k = a->w->k, rows;
    job j = {.a = a, .tile = tile, .scratch = q->scratch, .scratch_bytes = EXC_SWEEP_BYTES(q->scratch_bytes)};
    j.panel_bytes = exc_packed_bytes(EXC_PANEL, k, a->w->dtype);
    j.row_bytes = (size_t)a->x_stride * (a->act == EXC_BF16 ? 2 : 4);
    j.panels = (a->w->n + EXC_PANEL - 1) / EXC_PANEL;
    j.block = exc_sweep_chunk(tile, k, j.scratch_bytes);
    rows = a->rows < j.block ? a->rows : j.block;
    int64_t pairs = (j.panels + 1) / 2;
    j.spread = exc_spread_make(pairs, exc_pairs_per_task(rows, k, pairs), rows < EXC_TILE_ROWS);
    q->parallel(q, j.spread.tasks * (size_t)((a->rows + j.block - 1) / j.block), run, &j);
    return EXC_OK;
}
