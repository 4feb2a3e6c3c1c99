/* down.c - second half of the experts: y f32 [rows,H] = mid [rows,I] Wd^T + bias by expert, with fused capture of |y[r]|^2.
 *
 * The squares are taken from the tile while it is stored: f32 by lane over a piece's columns, then one number a row and piece,
 * added up in f64 by row at the end. Pieces of an expert may run on different threads, so their numbers meet in a small
 * table [rows, pieces]; where that would not fit, an expert is one piece and adds its rows itself. How rows are cut into pieces
 * depends on how many there are, so reproducible queues take the squares from the stored rows, in fixed point (fixed.h). */
#include "fixed.h"

typedef struct job {
    const struct exc_down_args *a;
    const exc_tile *tile;
    exc_groups groups;
    size_t panel_bytes, act_bytes;
    exc_queue *q;
} job;

typedef struct share {
    const job *j;
    exc_piece_of piece;
    int64_t chunk;
    float (*square)[EXC_PANEL]; /* [EXC_SWEEP_ROWS] of the chunk, or NULL */
} share;

static int observed(const struct exc_down_args *a, int64_t r) {
    return a->slot[a->pair_of ? a->pair_of[r] / a->top_k : r] >= 0;
}

static const void *row(void *user, int64_t r) {
    const share *s = user;
    return (const uint8_t *)s->j->a->mid + (size_t)((s->piece.row + r) * s->j->a->inner) * s->j->act_bytes;
}

static void pair(void *user, int64_t p, const uint8_t *w[2]) {
    const share *s = user;
    const exc_packed *down = &s->j->a->down[s->piece.expert];
    int64_t a = exc_run_panel(s->piece.first, s->piece.last, p, 0), b = exc_run_panel(s->piece.first, s->piece.last, p, 1);
    w[0] = exc_panel_at(down, a, s->j->panel_bytes);
    w[1] = b * EXC_PANEL < s->j->a->hidden ? exc_panel_at(down, b, s->j->panel_bytes) : w[0];
}

/* the rows of a tile are complete in this piece */
static void finish(share *s, float (*square)[EXC_PANEL], int64_t first, int rows) {
    const job *j = s->j;
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int i = 0; i < EXC_PANEL; i++) sum += (double)square[r][i];
        int64_t at = s->piece.row + first + r;
        if (j->groups.pieces > 1) j->groups.table[at * j->groups.pieces + s->piece.index] = (float)sum;
        else if (observed(j->a, at)) j->a->sqnorm_sum[s->piece.expert] += sum;
    }
}

static void done(void *user, int64_t p, int64_t first, int rows, const float (*out)[EXC_PAIR]) {
    share *s = user;
    const struct exc_down_args *a = s->j->a;
    float(*square)[EXC_PANEL] = s->square ? s->square + first % s->chunk : NULL;
    if (square && p == s->piece.first)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < EXC_PANEL; i++) square[r][i] = 0;
    for (int half = 0; half < 2; half++) {
        int64_t col = exc_run_panel(s->piece.first, s->piece.last, p, half) * EXC_PANEL, left = a->hidden - col;
        if (left <= 0) continue;
        float *y = a->y + (s->piece.row + first) * a->hidden + col;
        s->j->tile->store((const float (*)[EXC_PAIR])(out[0] + half * EXC_PANEL), rows,
                          (int)(left < EXC_PANEL ? left : EXC_PANEL), y, a->hidden,
                          a->bias ? a->bias + s->piece.expert * a->hidden + col : NULL, NULL, square);
        exc_ask_rows(y + rows * a->hidden, a->hidden * 4, rows, EXC_PANEL * 4);
    }
    if (square && p == s->piece.last - 1) finish(s, square, first, rows);
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    size_t bytes = EXC_SWEEP_BYTES(j->q->scratch_bytes);
    uint8_t *scratch = j->q->scratch[worker];
    share s = {.j = j, .chunk = exc_sweep_chunk(j->tile, j->a->inner, bytes)};
    if (j->a->sqnorm_sum && !j->q->reproducible) s.square = (float(*)[EXC_PANEL])(void *)(scratch + bytes);
    for (int64_t i = 0; exc_groups_piece(&j->groups, task, i, &s.piece); i++) {
        exc_sweep sweep = {.tile = j->tile,
                           .k = j->a->inner,
                           .rows = s.piece.rows,
                           .first = s.piece.first,
                           .last = s.piece.last,
                           .user = &s,
                           .row = row,
                           .pair = pair,
                           .done = done};
        exc_sweep_run(&sweep, scratch, bytes);
    }
}

static void add_squares(const job *j) {
    const exc_groups *g = &j->groups;
    for (int64_t i = 0; i < g->count; i++) {
        int64_t e = g->active[i];
        for (int64_t r = g->offset[e]; r < g->offset[e + 1]; r++) {
            double sum = 0;
            for (int64_t p = 0; p < g->pieces; p++) sum += (double)g->table[r * g->pieces + p];
            if (observed(j->a, r)) j->a->sqnorm_sum[e] += sum;
        }
    }
}

EXC_INLINE void square_body(const float *y, int64_t n, double *square) { *square = exc_row_square(y, n); }
EXC_DISPATCH(square, (const float *y, int64_t n, double *square), (y, n, square))

typedef struct squares {
    const struct exc_down_args *a;
    void (*square)(const float *y, int64_t n, double *square);
} squares;

static void add_fixed(void *arg, size_t e, int worker) {
    const squares *s = arg;
    const struct exc_down_args *a = s->a;
    (void)worker;
    double sum = 0, one;
    for (int64_t r = a->offset[e]; r < a->offset[e + 1]; r++) {
        if (!observed(a, r)) continue;
        s->square(a->y + r * a->hidden, a->hidden, &one);
        sum += exc_fixed_square(one);
    }
    a->sqnorm_sum[e] += sum;
}

exc_status exc_cpu_down(exc_queue *q, const struct exc_down_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->experts < 1 || a->hidden < 1 || a->inner < 1) return EXC_ERR_USAGE;
    if (!a->down || a->down->dtype != a->w_dtype || (a->sqnorm_sum && !a->slot)) return EXC_ERR_USAGE;
    job j = {.a = a, .tile = exc_tile_for(a->act, a->down->dtype), .q = q};
    if (!j.tile) return EXC_ERR_USAGE;
    j.panel_bytes = exc_packed_bytes(EXC_PANEL, a->inner, a->down->dtype);
    j.act_bytes = a->act == EXC_BF16 ? 2 : 4;
    if (!exc_groups_make(&j.groups, q, a->offset, a->experts, a->inner, (a->hidden + EXC_PAIR - 1) / EXC_PAIR))
        return EXC_ERR_USAGE;
    if (!j.groups.tasks) return EXC_OK;
    int in_tiles = a->sqnorm_sum && !q->reproducible;
    if (in_tiles && (size_t)(a->offset[a->experts] * j.groups.pieces) > j.groups.table_count)
        exc_groups_whole(&j.groups);
    q->parallel(q, j.groups.tasks, run, &j);
    if (in_tiles && j.groups.pieces > 1) add_squares(&j);
    if (a->sqnorm_sum && !in_tiles) q->parallel(q, (size_t)a->experts, add_fixed, &(squares){a, square_for()});
    return EXC_OK;
}
