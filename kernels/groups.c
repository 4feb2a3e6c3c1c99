/* groups.c - cuts the work of all experts into tasks.
 *
 * An expert with rows is cut into pieces (runs of panel pairs) of some 10 us, and small pieces are bundled into tasks of
 * that length: one expert that got half of all tokens is many tasks, sixteen experts of a few microseconds each are
 * few, experts without rows are none. Experts' rows are contiguous (permute), so offset i64 [E+1] says all. */
#include "tile.h"

/* pieces a small task should hold: as many pairs as exc_pairs_per_task says for the average expert, across experts if need be */
static int64_t bundle(const exc_groups *g, int64_t rows, int64_t k) {
    int64_t want = exc_pairs_per_task(rows, k, g->count * g->pairs) / g->per_piece;
    return want > 1 ? want : 1;
}

int exc_groups_make(exc_groups *g, exc_queue *q, const int64_t *offset, int64_t experts, int64_t k, int64_t pairs) {
    size_t keep = EXC_SWEEP_BYTES(q->scratch_bytes) + EXC_SWEEP_ROWS * (sizeof(float) * EXC_PANEL + 1);
    size_t list = ((size_t)experts * sizeof(int32_t) + 63) / 64 * 64;
    if (keep + list > q->scratch_bytes) return 0;
    int32_t *active = (int32_t *)((uint8_t *)q->scratch[0] + keep);
    *g = (exc_groups){.offset = offset, .active = active, .pairs = pairs};
    for (int64_t e = 0; e < experts; e++)
        if (offset[e + 1] > offset[e]) active[g->count++] = (int32_t)e;
    g->table = (float *)((uint8_t *)active + list);
    g->table_count = (q->scratch_bytes - keep - list) / sizeof(float);
    if (!g->count) return 1;
    int64_t rows = (offset[experts] - offset[0] + g->count - 1) / g->count;
    g->per_piece = exc_pairs_per_task(rows, k, pairs);
    g->pieces = (pairs + g->per_piece - 1) / g->per_piece;
    g->spread = exc_spread_make(g->count * g->pieces, bundle(g, rows, k), rows < EXC_TILE_ROWS);
    g->tasks = g->spread.tasks;
    return 1;
}

void exc_groups_whole(exc_groups *g) {
    g->per_piece = g->pairs;
    g->pieces = 1;
    g->spread = exc_spread_make(g->count, 1, 0);
    g->tasks = g->spread.tasks;
}

int exc_groups_piece(const exc_groups *g, size_t task, int64_t i, exc_piece_of *piece) {
    int64_t at, end = exc_spread_task(&g->spread, (int64_t)task, &at), last;
    at += i;
    if (at >= end) return 0;
    int64_t e = g->active[at / g->pieces];
    piece->expert = e;
    piece->row = g->offset[e];
    piece->rows = g->offset[e + 1] - g->offset[e];
    piece->index = at % g->pieces;
    piece->first = piece->index * g->per_piece;
    last = piece->first + g->per_piece;
    piece->last = last < g->pairs ? last : g->pairs;
    return 1;
}
