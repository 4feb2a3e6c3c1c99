/* bundle.c - one small matmul a head: y [T,heads,n] = x [T,heads,k] W_h^T, each head with weights of its own.
 *
 * The same tiles as matmul (tile.h). Tasks are blocks of rows x heads, several heads where a head is little
 * work, a run of its panel pairs where it is much. Outputs are rounded to `act` as they leave the tile: they
 * are operands of the attention or of the next matmul. */
#include <string.h>

#include "tile.h"

typedef struct job {
    const struct exc_bundle_args *a;
    const exc_tile *tile;
    size_t panel_bytes, act_bytes;
    int64_t panels, pairs;    /* of a head */
    int64_t block;            /* rows of a task */
    int64_t piece, pieces;    /* pairs of a task; pieces of a head */
    int64_t together, groups; /* heads of a task; groups of heads */
    exc_queue *q;
} job;

typedef struct share {
    const job *j;
    int64_t head, row, first, last; /* first row and pairs of the task */
} share;

static const void *row(void *user, int64_t r) {
    const share *s = user;
    const struct exc_bundle_args *a = s->j->a;
    return (const uint8_t *)a->x +
           (size_t)((s->row + r) * a->x_stride + s->head * a->x_step) * s->j->act_bytes;
}

static void pair(void *user, int64_t p, const uint8_t *w[2]) {
    const share *s = user;
    const exc_packed *head = &s->j->a->w[s->head];
    int64_t a = exc_run_panel(s->first, s->last, p, 0), b = exc_run_panel(s->first, s->last, p, 1);
    w[0] = exc_panel_at(head, a, s->j->panel_bytes);
    w[1] = b < s->j->panels ? exc_panel_at(head, b, s->j->panel_bytes) : w[0];
}

static void put(const job *j, const float (*out)[EXC_PAIR], int rows, int cols, size_t at) {
    const struct exc_bundle_args *a = j->a;
    if (a->act == EXC_F32) {
        j->tile->store(out, rows, cols, (float *)a->y + at, a->y_stride, NULL, NULL, NULL);
        return;
    }
    for (int r = 0; r < rows; r++, at += (size_t)a->y_stride) {
        uint16_t half[EXC_PANEL];
        for (int i = 0; i < EXC_PANEL; i++) half[i] = (uint16_t)exc_round_bf16(out[r][i]);
        memcpy((uint16_t *)a->y + at, half, (size_t)cols * sizeof *half);
    }
}

static void done(void *user, int64_t p, int64_t first, int rows, const float (*out)[EXC_PAIR]) {
    const share *s = user;
    const struct exc_bundle_args *a = s->j->a;
    for (int half = 0; half < 2; half++) {
        int64_t col = exc_run_panel(s->first, s->last, p, half) * EXC_PANEL, left = a->w->n - col;
        if (left <= 0) continue;
        put(s->j, (const float(*)[EXC_PAIR])(out[0] + half * EXC_PANEL), rows,
            (int)(left < EXC_PANEL ? left : EXC_PANEL),
            (size_t)((s->row + first) * a->y_stride + s->head * a->y_step + col));
    }
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_bundle_args *a = j->a;
    int64_t piece = (int64_t)task % j->pieces, group = (int64_t)task / j->pieces % j->groups,
            head = group * j->together;
    share s = {.j = j, .row = (int64_t)task / j->pieces / j->groups * j->block, .first = piece * j->piece};
    s.last = s.first + j->piece < j->pairs ? s.first + j->piece : j->pairs;
    exc_sweep sweep = {.tile = j->tile,
                       .k = a->w->k,
                       .rows = a->rows - s.row < j->block ? a->rows - s.row : j->block,
                       .first = s.first,
                       .last = s.last,
                       .user = &s,
                       .row = row,
                       .pair = pair,
                       .done = done};
    for (s.head = head; s.head < head + j->together && s.head < a->heads; s.head++)
        exc_sweep_run(&sweep, j->q->scratch[worker], EXC_SWEEP_BYTES(j->q->scratch_bytes));
}

/* how heads and their panel pairs are cut: by the work that a task should take */
static void cut(job *j) {
    const struct exc_bundle_args *a = j->a;
    int64_t rows = a->rows < j->block ? a->rows : j->block;
    int64_t want = exc_pairs_per_task(rows, a->w->k, j->pairs * a->heads);
    j->together = want > j->pairs ? want / j->pairs : 1;
    j->groups = (a->heads + j->together - 1) / j->together;
    j->pieces = want < j->pairs ? (j->pairs + want - 1) / want : 1;
    j->piece = (j->pairs + j->pieces - 1) / j->pieces;
    j->pieces = (j->pairs + j->piece - 1) / j->piece;
}

exc_status exc_cpu_bundle(exc_queue *q, const struct exc_bundle_args *a) {
    if (!a->w || a->rows < 0 || a->heads < 0 || a->w->k < 1 || a->w->n < 0) return EXC_ERR_USAGE;
    job j = {
        .a = a, .tile = exc_tile_for(a->act, a->w->dtype), .q = q, .act_bytes = a->act == EXC_BF16 ? 2 : 4};
    if (!j.tile) return EXC_ERR_USAGE;
    if (!a->rows || !a->heads || !a->w->n) return EXC_OK;
    j.panel_bytes = exc_packed_bytes(EXC_PANEL, a->w->k, a->w->dtype);
    j.panels = (a->w->n + EXC_PANEL - 1) / EXC_PANEL;
    j.pairs = (j.panels + 1) / 2;
    j.block = exc_sweep_chunk(j.tile, a->w->k, EXC_SWEEP_BYTES(q->scratch_bytes));
    cut(&j);
    q->parallel(q, (size_t)(j.pieces * j.groups * ((a->rows + j.block - 1) / j.block)), run, &j);
    return EXC_OK;
}
