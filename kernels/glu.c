/* glu.c - first half of the experts: mid [rows,I] of gate x Wg^T and up x Wu^T, rows gathered by expert, with fused capture.
 *
 * A tile multiplies a panel of gate and the same panel of up, so that both factors of 16 outputs meet in
 * registers; the product is rounded to the activation dtype, stored, and, for observed rows, added to the
 * expert's sums while it is there: capture reads nothing twice. Blocks of 64 rows are summed in f32 and blocks
 * in f64, in ascending rows; a task owns its columns of an expert, so no sum is shared between threads. Reproducible
 * queues sum in fixed point instead (fixed.h), from the rows just stored. */
#include "fixed.h"

#define ADD_PARAMS (const void *mid, size_t row_bytes, int act, int rows, int cols, const uint8_t *seen, double *sum)

EXC_INLINE void add_panel(const uint8_t *row, size_t row_bytes, int act, int rows, const uint8_t *seen, double *sum) {
    exc_doubles part[2] = {0};
    for (int r = 0; r < rows; r++, row += row_bytes)
        if (seen[r]) exc_fixed_lanes(row, act, part);
    for (int i = 0; i < 2; i++) ((exc_doubles *)sum)[i] += part[i];
}

/* the observed rows of a stored tile into sum f64 [cols] */
EXC_INLINE void add_body ADD_PARAMS {
    if (cols == EXC_PANEL && act == EXC_F32) add_panel(mid, row_bytes, EXC_F32, rows, seen, sum);
    else if (cols == EXC_PANEL) add_panel(mid, row_bytes, EXC_BF16, rows, seen, sum);
    else
        for (int r = 0; r < rows; r++)
            if (seen[r]) exc_fixed_row((const uint8_t *)mid + (size_t)r * row_bytes, act, cols, sum);
}
EXC_DISPATCH(add, ADD_PARAMS, (mid, row_bytes, act, rows, cols, seen, sum))

typedef struct job {
    const struct exc_glu_args *a;
    const exc_tile *tile;
    exc_groups groups;
    void (*add) ADD_PARAMS;                 /* NULL: sums in blocks of rows */
    size_t gate_bytes, up_bytes, act_bytes; /* of a panel of each; of an activation */
    exc_queue *q;
} job;

typedef struct share {
    const job *j;
    exc_piece_of piece;
    int64_t chunk;
    uint8_t *seen; /* [EXC_SWEEP_ROWS] rows of the chunk that are observed */
    float sum[EXC_PANEL];
} share;

static int64_t token(const struct exc_glu_args *a, int64_t r) { return a->pair_of ? a->pair_of[r] / a->top_k : r; }

static const void *row(void *user, int64_t r) {
    const share *s = user;
    const struct exc_glu_args *a = s->j->a;
    return (const uint8_t *)a->x + (size_t)(token(a, s->piece.row + r) * a->hidden) * s->j->act_bytes;
}

static void pair(void *user, int64_t p, const uint8_t *w[2]) {
    const share *s = user;
    w[0] = exc_panel_at(&s->j->a->gate[s->piece.expert], p, s->j->gate_bytes);
    w[1] = exc_panel_at(&s->j->a->up[s->piece.expert], p, s->j->up_bytes);
}

/* the f32 sums of a block of rows go to the f64 sums of the expert */
static void flush(share *s, int64_t column, int cols) {
    double *to = s->j->a->mid_sum + s->piece.expert * s->j->a->inner + column;
    for (int i = 0; i < cols; i++) to[i] += (double)s->sum[i];
    for (int i = 0; i < EXC_PANEL; i++) s->sum[i] = 0;
}

static void done(void *user, int64_t p, int64_t first, int rows, const float (*out)[EXC_PAIR]) {
    share *s = user;
    const struct exc_glu_args *a = s->j->a;
    int64_t col = p * EXC_PANEL, r = s->piece.row + first, end = first + rows;
    int cols = (int)(a->inner - col < EXC_PANEL ? a->inner - col : EXC_PANEL);
    uint8_t *seen = a->mid_sum ? s->seen + first % s->chunk : NULL;
    if (seen && p == s->piece.first)
        for (int i = 0; i < rows; i++) seen[i] = a->slot[token(a, r + i)] >= 0;
    int64_t bias = s->piece.expert * a->inner + col;
    exc_gated how = {.fn = a->activation,
                     .gate_bias = a->gate_bias ? a->gate_bias + bias : NULL,
                     .up_bias = a->up_bias ? a->up_bias + bias : NULL};
    size_t row_bytes = (size_t)a->inner * s->j->act_bytes;
    uint8_t *mid = (uint8_t *)a->mid + (size_t)r * row_bytes + (size_t)col * s->j->act_bytes;
    int in_blocks = seen && !s->j->add;
    s->j->tile->gate(out, rows, cols, &how, mid, a->inner, in_blocks ? seen : NULL, s->sum);
    exc_ask_rows(mid + (size_t)rows * row_bytes, (int64_t)row_bytes, rows, EXC_PANEL * (int)s->j->act_bytes);
    if (seen && s->j->add)
        s->j->add(mid, row_bytes, a->act, rows, cols, seen, a->mid_sum + s->piece.expert * a->inner + col);
    if (in_blocks && (end % EXC_ROW_BLOCK == 0 || end == s->piece.rows || end % s->chunk == 0)) flush(s, col, cols);
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    size_t bytes = EXC_SWEEP_BYTES(j->q->scratch_bytes);
    share s = {.j = j, .chunk = exc_sweep_chunk(j->tile, j->a->hidden, bytes)};
    s.seen = (uint8_t *)j->q->scratch[worker] + bytes;
    for (int64_t i = 0; exc_groups_piece(&j->groups, task, i, &s.piece); i++) {
        exc_sweep sweep = {.tile = j->tile,
                           .k = j->a->hidden,
                           .rows = s.piece.rows,
                           .first = s.piece.first,
                           .last = s.piece.last,
                           .user = &s,
                           .row = row,
                           .pair = pair,
                           .done = done};
        exc_sweep_run(&sweep, j->q->scratch[worker], bytes);
    }
}

exc_status exc_cpu_glu(exc_queue *q, const struct exc_glu_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->experts < 1 || a->hidden < 1 || a->inner < 1) return EXC_ERR_USAGE;
    if (!a->gate || !a->up || a->gate->dtype != a->w_dtype || a->up->dtype != a->w_dtype || (a->mid_sum && !a->slot)) return EXC_ERR_USAGE;
    if (a->activation.kind != EXC_GLU_SILU && a->activation.kind != EXC_GLU_CLAMPED) return EXC_ERR_USAGE;
    job j = {.a = a, .tile = exc_tile_for(a->act, a->gate->dtype), .q = q};
    if (!j.tile) return EXC_ERR_USAGE;
    if (q->reproducible) j.add = add_for();
    j.gate_bytes = exc_packed_bytes(EXC_PANEL, a->hidden, a->gate->dtype);
    j.up_bytes = exc_packed_bytes(EXC_PANEL, a->hidden, a->up->dtype);
    j.act_bytes = a->act == EXC_BF16 ? 2 : 4;
    if (!exc_groups_make(&j.groups, q, a->offset, a->experts, a->hidden, (a->inner + EXC_PANEL - 1) / EXC_PANEL))
        return EXC_ERR_USAGE;
    if (j.groups.tasks) q->parallel(q, j.groups.tasks, run, &j);
    return EXC_OK;
}
