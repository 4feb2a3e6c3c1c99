/* spread.c - a step over several ranks: sequences are dealt out, experts stay where they are held.
 *
 * Every rank is asked for the same step. It runs the mixers for the sequences in its slots only (slot s belongs to rank s
 * modulo the number of ranks, and so does its cache) and meets the others in every MoE layer: rows travel to the rank that
 * holds the chosen expert and the expert's output travels back, unsummed, so that the weighted sum is taken at home
 * in the same order as by one rank alone. Nothing is padded and no row is dropped. Outputs that the step asks for are
 * collected on all ranks, which keeps everything above this file the same for one rank and for many.
 *
 * Rows reach an expert ordered by rank, then by token; a stable grouping keeps that. Rows move from and to memory where ops
 * run; how many go where is told between hosts, once a layer, which is also where ranks out of step are found out.
 *
 * In a step of decode on devices that word between hosts, and the wait for the device before it, would be most of the time. Few
 * rows may as well go to all ranks: each takes those out that chose its experts and sends a row for every choice back, and the
 * reader takes the one that comes from the expert's rank. More bytes travel, a few hundred rows, but their sizes are known
 * before the step: it is steady, nothing waits, and the whole of it can be recorded (replay.c). */
#include <string.h>

#include "session.h"

#define STEADY_ROWS 64 /* of a step over all ranks; with more, bytes count */

/* of steady steps: n = min(slots, STEADY_ROWS) rows of all ranks */
typedef struct steady {
    int64_t most;                   /* n; 0: no step is steady */
    bool now;                       /* the step is */
    void *x;                        /* [n,H] act */
    int32_t *ids, *mark;            /* [n,K], [n] */
    int64_t *offset;                /* [E+1] */
    int32_t *row_of, *pair_of;      /* [n*K] */
    int32_t *index;                 /* [n*K] where outputs of this rank's rows came in */
    float *out;                     /* [n*K,H] outputs by pair */
    float *back;                    /* [ranks*n*K,H] and those from each rank; they are for fewer rows the more have come */
    float *logits, *all_logits;     /* [n,V] of this rank, and of all in the order of ranks */
    int32_t *order, *order_here;    /* [n] row in that order of each sequence */
    int64_t *each;                  /* [ranks] the same number of rows from every rank */
} steady;

struct exc_spread {
    steady steady;
    int64_t step_rows;              /* of the whole step */
    int64_t chunks;                 /* of the rank that has most: so often all meet in a layer */
    int32_t *owner_row;             /* [rows of a step] rows of the step in the order of ranks */
    int64_t *rows;                  /* [ranks] how many each has */
    int64_t *sequences;             /* [ranks] */
    int32_t *order;                 /* [slots] sequences of the step in the order of ranks */
    exc_step local;                 /* this rank's part, over the arrays below */
    int32_t *tokens, *slot, *observe;
    int64_t *begin;
    /* numbers of a layer, for the host */
    int64_t *offset_here;           /* [E+1] the session's offset */
    int32_t *ids_here;              /* [R] ids */
    int64_t *counts;                /* [2,E] rows by expert, mine to all and all to mine */
    int64_t *out, *in;              /* [ranks] rows that go and come */
    size_t *send_bytes, *recv_bytes;/* [ranks] */
    /* dispatch of a chunk, where ops run; up to R = its rows on all ranks * min(K, experts of the rank) rows come in */
    void *send_x, *recv_x;          /* [T*K,H], [R,H] act */
    int32_t *send_mark, *recv_mark; /* [T*K], [R] prompt number or -1 */
    int32_t *ids, *row_of, *pair_of;/* [R] expert of a row that came in, its place in the grouping, and back */
    int64_t *offset;                /* [experts of the rank + 1] */
    float *y, *home;                /* [R,H] outputs in the grouping, and in the order they came in */
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void carve_numbers(exc_carve *c, const exc_session *s, struct exc_spread *d, size_t R) {
    size_t T = (size_t)s->step_rows, S = (size_t)s->slots, E = (size_t)s->m->atlas->shape.experts, n = (size_t)exc_ranks_count(s->ctx);
    d->owner_row = exc_carve_keep(c, T, sizeof *d->owner_row);
    d->rows = exc_carve_keep(c, n, sizeof *d->rows);
    d->sequences = exc_carve_keep(c, n, sizeof *d->sequences);
    d->order = exc_carve_keep(c, S, sizeof *d->order);
    d->tokens = exc_carve_keep(c, T, sizeof *d->tokens);
    d->observe = exc_carve_keep(c, T, sizeof *d->observe);
    d->slot = exc_carve_keep(c, S, sizeof *d->slot);
    d->begin = exc_carve_keep(c, S + 1, sizeof *d->begin);
    d->offset_here = c->apart ? exc_carve_keep(c, E + 1, sizeof *d->offset_here) : s->offset;
    d->ids_here = c->apart ? exc_carve_keep(c, R, sizeof *d->ids_here) : d->ids;
    d->counts = exc_carve_keep(c, 2 * E * n, sizeof *d->counts);
    d->out = exc_carve_keep(c, n, sizeof *d->out);
    d->in = exc_carve_keep(c, n, sizeof *d->in);
    d->send_bytes = exc_carve_keep(c, n, sizeof *d->send_bytes);
    d->recv_bytes = exc_carve_keep(c, n, sizeof *d->recv_bytes);
}

/* on devices only: where ops run beside the ranks' word costs little and bytes are what counts */
static void carve_steady(exc_carve *c, const exc_session *s, steady *y) {
    const exc_shape *p = &s->m->atlas->shape;
    int64_t most = least(least(s->slots, s->step_tokens), STEADY_ROWS);
    size_t n = (size_t)most, K = (size_t)p->top_k, H = (size_t)p->hidden, ranks = (size_t)exc_ranks_count(s->ctx);
    *y = (steady){0};
    if (!c->apart) return;
    y->most = most;
    y->x = exc_carve_take(c, n * H, exc_act_bytes(s->m));
    y->ids = exc_carve_take(c, n * K, sizeof *y->ids);
    y->mark = exc_carve_take(c, n, sizeof *y->mark);
    y->offset = exc_carve_take(c, (size_t)p->experts + 1, sizeof *y->offset);
    y->row_of = exc_carve_take(c, n * K, sizeof *y->row_of);
    y->pair_of = exc_carve_take(c, n * K, sizeof *y->pair_of);
    y->index = exc_carve_take(c, n * K, sizeof *y->index);
    y->out = exc_carve_take(c, n * K * H, sizeof *y->out);
    y->back = exc_carve_take(c, ranks * n * K * H, sizeof *y->back);
    y->logits = exc_carve_take(c, n * (size_t)p->vocab, sizeof *y->logits);
    y->all_logits = exc_carve_take(c, n * (size_t)p->vocab, sizeof *y->all_logits);
    y->order = exc_carve_take(c, n, sizeof *y->order);
    y->order_here = exc_carve_keep(c, n, sizeof *y->order_here);
    y->each = exc_carve_keep(c, ranks, sizeof *y->each);
}

int64_t exc_spread_pairs(const exc_session *s) {
    int64_t own = s->m->expert_end - s->m->expert_first, ranks = exc_ranks_count(s->ctx);
    return least(s->step_rows, ranks * s->step_tokens) * least(s->m->atlas->shape.top_k, own); /* rows in a chunk of all ranks */
}

void exc_spread_room(exc_carve *c, exc_session *s) {
    if (exc_ranks_count(s->ctx) == 1) return;
    const exc_shape *p = &s->m->atlas->shape;
    size_t T = (size_t)s->step_tokens, K = (size_t)p->top_k, H = (size_t)p->hidden, act = exc_act_bytes(s->m),
           own = (size_t)(s->m->expert_end - s->m->expert_first), R = (size_t)exc_spread_pairs(s);
    struct exc_spread *d = exc_carve_keep(c, 1, sizeof *d), none;
    s->spread = d;
    if (!d) d = &none; /* measuring */
    *d = (struct exc_spread){0};
    d->send_x = exc_carve_take(c, T * K * H, act);
    d->recv_x = exc_carve_take(c, R * H, act);
    d->send_mark = exc_carve_take(c, T * K, sizeof *d->send_mark);
    d->recv_mark = exc_carve_take(c, R, sizeof *d->recv_mark);
    d->ids = exc_carve_take(c, R, sizeof *d->ids);
    d->row_of = exc_carve_take(c, R, sizeof *d->row_of);
    d->pair_of = exc_carve_take(c, R, sizeof *d->pair_of);
    d->offset = exc_carve_take(c, own + 1, sizeof *d->offset);
    d->y = exc_carve_take(c, R * H, sizeof *d->y);
    d->home = exc_carve_take(c, R * H, sizeof *d->home);
    carve_numbers(c, s, d, R);
    carve_steady(c, s, &d->steady);
}

bool exc_spread_owns(const exc_session *s, int64_t slot) {
    return slot % exc_ranks_count(s->ctx) == exc_ranks_me(s->ctx);
}

/* ------------------------------------------------------------------------------------------------- parts of a step */

/* how many chunks a rank makes of its sequences; every rank knows that of every other one */
static int64_t chunks_of(const exc_session *s, const exc_step *t, int rank) {
    int64_t chunks = 1, rows = 0;
    for (int64_t i = 0; i < t->sequences; i++)
        if (t->slot[i] % exc_ranks_count(s->ctx) == rank) chunks += exc_chunks_more(s, t->begin[i + 1] - t->begin[i], &rows);
    return chunks;
}

int64_t exc_spread_chunks(const exc_session *s) { return s->spread->chunks; }

/* deals the sequences of a step out and fills the local step */
static const exc_step *deal(exc_session *s, const exc_step *t) {
    struct exc_spread *d = s->spread;
    int ranks = exc_ranks_count(s->ctx), me = exc_ranks_me(s->ctx);
    int64_t at = 0, seen = 0, rows = 0, n = 0;
    d->step_rows = t->sequences ? t->begin[t->sequences] : 0;
    d->chunks = 1;
    for (int r = 0; r < ranks; r++) {
        int64_t chunks = chunks_of(s, t, r);
        if (chunks > d->chunks) d->chunks = chunks;
        d->rows[r] = d->sequences[r] = 0;
        for (int64_t i = 0; i < t->sequences; i++) {
            if (t->slot[i] % ranks != r) continue;
            d->order[seen++] = (int32_t)i;
            d->sequences[r]++;
            d->rows[r] += t->begin[i + 1] - t->begin[i];
            for (int64_t row = t->begin[i]; row < t->begin[i + 1]; row++, at++) {
                d->owner_row[at] = (int32_t)row;
                if (r != me) continue;
                d->tokens[rows] = t->tokens[row];
                d->observe[rows++] = t->observe ? t->observe[row] : -1;
            }
            if (r != me) continue;
            d->slot[n] = t->slot[i];
            d->begin[++n] = rows;
        }
    }
    d->begin[0] = 0;
    d->local = (exc_step){.tokens = d->tokens,
                          .slot = d->slot,
                          .begin = d->begin,
                          .sequences = n,
                          .logits_all = t->logits_all,
                          .sums = t->sums,
                          .observe = t->observe ? d->observe : NULL};
    return &d->local;
}

/* the slots of other ranks hold these tokens too, as far as lengths go */
static void advance_others(exc_session *s, const exc_step *t) {
    for (int64_t i = 0; i < t->sequences; i++)
        if (!exc_spread_owns(s, t->slot[i])) s->length[t->slot[i]] += t->begin[i + 1] - t->begin[i];
}

/* Local results [planes, mine, width] of each rank, in the ranks' order `order`, to whole [planes, all, width] on every
 * rank. */
static exc_status collect(exc_session *s, const char *what, const void *mine, const int64_t *counts, const int32_t *order,
                          int64_t planes, int64_t all, size_t width, void *whole) {
    exc_ctx *ctx = s->ctx;
    struct exc_spread *d = s->spread;
    int64_t n = planes * all;
    int32_t *index = exc_alloc(ctx, (size_t)n, sizeof *index, "rows of all ranks"); /* where a row of the whole comes in */
    void *in = NULL, *mirror = NULL;
    exc_status st = index ? exc_device_alloc(ctx, (size_t)n, width, "results of all ranks", &in) : EXC_ERR_MEMORY;
    if (st == EXC_OK) st = exc_device_mirror(ctx, (size_t)n, sizeof *index, "rows of all ranks", &mirror);
    int32_t *there = exc_device_side(ctx, index, mirror), from = 0;
    for (int r = 0; r < exc_ranks_count(ctx); r++) d->in[r] = planes * counts[r];
    if (st == EXC_OK) st = exc_ranks_collect_rows(ctx, what, &(exc_rows){mine, in, width}, 1, d->in);
    for (int64_t r = 0, at = 0; st == EXC_OK && at < all; at += counts[r++])
        for (int64_t p = 0; p < planes; p++)
            for (int64_t i = 0; i < counts[r]; i++) index[p * all + order[at + i]] = from++;
    if (st == EXC_OK) st = exc_device_put(ctx, there, index, (size_t)n * sizeof *index);
    if (st == EXC_OK)
        st = exc_op_checked(ctx, "gather", ctx->ops->gather(&ctx->queue, &(struct exc_gather_args){in, there, 1, n, width, whole}));
    exc_device_release(ctx, mirror);
    exc_device_release(ctx, in);
    exc_release(index);
    return st;
}

typedef struct result {
    const char *what;
    void *whole;        /* where the step wants it, or NULL */
    void **local;       /* where this rank's part goes */
    int64_t planes;
    size_t width;
    bool by_sequence;   /* else by row */
} result;

static exc_status run_local(exc_session *s, const exc_step *t, exc_step *local, result *all, size_t n) {
    struct exc_spread *d = s->spread;
    int me = exc_ranks_me(s->ctx);
    for (size_t i = 0; i < n; i++) {
        int64_t count = all[i].by_sequence ? d->sequences[me] : d->rows[me];
        if (all[i].whole) EXC_TRY(exc_device_alloc(s->ctx, (size_t)(all[i].planes * count), all[i].width, "results of a step", all[i].local));
    }
    EXC_TRY(exc_session_part(s, local));
    advance_others(s, t);
    for (size_t i = 0; i < n; i++)
        if (all[i].whole)
            EXC_TRY(collect(s, all[i].what, *all[i].local, all[i].by_sequence ? d->sequences : d->rows,
                            all[i].by_sequence ? d->order : d->owner_row, all[i].planes,
                            all[i].by_sequence ? t->sequences : d->step_rows, all[i].width, all[i].whole));
    return EXC_OK;
}

/* Logits of a steady step [sequences,V], which all ranks want: made beside the step's launches at addresses that stay, because a
 * recorded step keeps them. Where they will be is told to the device before the step, for nothing is to wait behind it. */
static exc_status tell_order(exc_session *s, int64_t sequences) {
    steady *y = &s->spread->steady;
    for (int64_t i = 0; i < sequences; i++) y->order_here[s->spread->order[i]] = (int32_t)i;
    return exc_device_put(s->ctx, y->order, y->order_here, (size_t)sequences * sizeof *y->order);
}

static exc_status run_steady(exc_session *s, const exc_step *t, exc_step *local) {
    steady *y = &s->spread->steady;
    size_t width = (size_t)s->m->atlas->shape.vocab * sizeof *y->logits;
    local->logits = t->logits ? y->logits : NULL;
    if (t->logits) EXC_TRY(tell_order(s, t->sequences));
    EXC_TRY(exc_session_part(s, local));
    advance_others(s, t);
    if (!t->logits) return EXC_OK;
    EXC_TRY(exc_ranks_collect_rows(s->ctx, "logits", &(exc_rows){y->logits, y->all_logits, width}, 1, s->spread->sequences));
    EXC_RUN(s, gather, .x = y->all_logits, .index = y->order, .share = 1, .rows = t->sequences, .width = width, .y = t->logits);
    return EXC_OK;
}

/* one row a sequence, few enough, and nothing asked for but logits and sums */
static bool is_steady(const exc_session *s, const exc_step *t) {
    return t->sequences <= s->spread->steady.most && t->begin[t->sequences] == t->sequences && !t->hidden && !t->hidden_last &&
           !t->router_ids && !t->router_weights;
}

bool exc_spread_steady(const exc_session *s, uint64_t *dealt) {
    const struct exc_spread *d = s->spread;
    *dealt = exc_hash64(d->rows, (size_t)exc_ranks_count(s->ctx) * sizeof *d->rows);
    return d->steady.now;
}

/* what all ranks must have been asked for */
static uint64_t fingerprint(const exc_step *t) {
    uint64_t wanted = (uint64_t)(t->logits != NULL) | (uint64_t)(t->hidden != NULL) << 1 | (uint64_t)(t->hidden_last != NULL) << 2 |
                      (uint64_t)(t->router_ids != NULL) << 3 | (uint64_t)(t->router_weights != NULL) << 4 |
                      (uint64_t)(t->sums != NULL) << 5 | (uint64_t)(t->logits_all != 0) << 6 | (uint64_t)(t->observe != NULL) << 7;
    size_t n = (size_t)t->sequences, rows = n ? (size_t)t->begin[n] : 0;
    return exc_hash64(t->tokens, rows * sizeof *t->tokens) ^ exc_hash64(t->slot, n * sizeof *t->slot) * 3 ^
           exc_hash64(t->begin, (n + 1) * sizeof *t->begin) * 5 ^ wanted << 1;
}

/* the whole step has to fit, before it is dealt out: buffers are for that many rows and sequences */
static exc_status fits(const exc_session *s, const exc_step *t) {
    int64_t rows = t->sequences ? t->begin[t->sequences] : 0;
    bool good = rows <= s->step_rows && t->sequences <= s->slots;
    for (int64_t i = 0; good && i < t->sequences; i++) good = t->slot[i] >= 0 && t->slot[i] < s->used_slots;
    return good ? EXC_OK : exc_fail(s->ctx, EXC_ERR_USAGE, "session: expected at most %lld rows in a step, of slots below %lld, found %lld rows",
                                    (long long)s->step_rows, (long long)s->used_slots, (long long)rows);
}

exc_status exc_spread_step(exc_session *s, const exc_step *t) {
    const exc_shape *p = &s->m->atlas->shape;
    EXC_TRY(fits(s, t));
    EXC_TRY(exc_ranks_meet(s->ctx, "a step of the forward pass", fingerprint(t)));
    exc_step local = *deal(s, t);
    s->spread->steady.now = t->sequences && is_steady(s, t);
    if (s->spread->steady.now) return run_steady(s, t, &local);
    size_t H = (size_t)p->hidden * sizeof(float), K = (size_t)p->top_k * sizeof(float);
    result all[] = {{"logits", t->logits, (void **)&local.logits, 1, (size_t)p->vocab * sizeof(float), !t->logits_all},
                    {"hidden states", t->hidden, (void **)&local.hidden, p->layers + 1, H, false},
                    {"last hidden states", t->hidden_last, (void **)&local.hidden_last, 1, H * (size_t)(p->layers + 1), true},
                    {"routing", t->router_ids, (void **)&local.router_ids, p->moe_layers, K, false},
                    {"routing weights", t->router_weights, (void **)&local.router_weights, p->moe_layers, K, false}};
    exc_status st = run_local(s, t, &local, all, EXC_COUNT(all));
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_device_release(s->ctx, *all[i].local);
    return st;
}

/* Logits of rows first.. of the step: each rank makes those of its rows, which follow each other in its own order too. */
exc_status exc_spread_logits(exc_session *s, int64_t first, int64_t rows, float *logits) {
    struct exc_spread *d = s->spread;
    exc_ctx *ctx = s->ctx;
    int ranks = exc_ranks_count(ctx), me = exc_ranks_me(ctx);
    size_t V = (size_t)s->m->atlas->shape.vocab;
    int64_t *counts = exc_zalloc(ctx, (size_t)ranks, sizeof *counts, "rows of all ranks"), mine = 0;
    int32_t *order = exc_alloc(ctx, (size_t)rows, sizeof *order, "rows of all ranks");
    exc_status st = counts && order ? EXC_OK : EXC_ERR_MEMORY;
    for (int64_t r = 0, at = 0, n = 0; st == EXC_OK && r < ranks; at += d->rows[r++])
        for (int64_t i = 0; i < d->rows[r]; i++) {
            int64_t row = d->owner_row[at + i];
            if (row < first || row >= first + rows) continue;
            if (r == me && !counts[r]) mine = i;
            counts[r]++;
            order[n++] = (int32_t)(row - first);
        }
    void *part = NULL;
    if (st == EXC_OK) st = exc_device_alloc(ctx, (size_t)counts[me] * V, sizeof *logits, "logits", &part);
    if (st == EXC_OK) st = exc_session_part_logits(s, mine, counts[me], part);
    if (st == EXC_OK) st = collect(s, "logits", part, counts, order, 1, rows, V * sizeof *logits, logits);
    exc_device_release(ctx, part);
    exc_release(order);
    exc_release(counts);
    return st;
}

/* -------------------------------------------------------------------------------------------------------- experts */

/* how many rows go to and come from each expert's rank */
static exc_status tell_counts(exc_session *s) {
    struct exc_spread *d = s->spread;
    int ranks = exc_ranks_count(s->ctx);
    int64_t E = s->m->atlas->shape.experts, own = s->m->expert_end - s->m->expert_first, first, end, *theirs = d->counts + E;
    EXC_TRY(exc_device_get(s->ctx, d->offset_here, s->offset, (size_t)(E + 1) * sizeof *d->offset_here));
    for (int64_t e = 0; e < E; e++) d->counts[e] = d->offset_here[e + 1] - d->offset_here[e];
    for (int r = 0; r < ranks; r++) {
        exc_share(E, r, ranks, &first, &end);
        d->out[r] = d->offset_here[end] - d->offset_here[first];
        d->send_bytes[r] = (size_t)(end - first) * sizeof *theirs;
        d->recv_bytes[r] = (size_t)own * sizeof *theirs;
    }
    EXC_TRY(exc_ranks_exchange(s->ctx, "rows by expert", d->counts, d->send_bytes, theirs, d->recv_bytes));
    for (int r = 0; r < ranks; r++) {
        d->in[r] = 0;
        for (int64_t e = 0; e < own; e++) d->in[r] += theirs[r * own + e];
    }
    return EXC_OK;
}

/* the rows that chose each expert, to its rank; *came: how many came here, with their experts in d->ids */
static exc_status send_rows(exc_session *s, const int32_t *mark, int64_t *came) {
    struct exc_spread *d = s->spread;
    const exc_shape *p = &s->m->atlas->shape;
    size_t row = (size_t)p->hidden * exc_act_bytes(s->m);
    int64_t own = s->m->expert_end - s->m->expert_first, *theirs = d->counts + p->experts, n = 0;
    struct exc_gather_args x = {s->x, s->pair_of, p->top_k, d->offset_here[p->experts], row, d->send_x}, m = x;
    EXC_TRY(exc_op_checked(s->ctx, "gather", s->ctx->ops->gather(&s->ctx->queue, &x)));
    m.x = mark, m.width = sizeof *mark, m.y = d->send_mark;
    if (mark) EXC_TRY(exc_op_checked(s->ctx, "gather", s->ctx->ops->gather(&s->ctx->queue, &m)));
    exc_rows kinds[] = {{d->send_x, d->recv_x, row}, {d->send_mark, d->recv_mark, sizeof *mark}};
    EXC_TRY(exc_ranks_send_rows(s->ctx, "rows to experts", kinds, mark ? 2 : 1, d->out, d->in));
    for (int64_t i = 0; i < own * exc_ranks_count(s->ctx); i++)
        for (int64_t j = 0; j < theirs[i]; j++) d->ids_here[n++] = (int32_t)(i % own);
    *came = n;
    return exc_device_put(s->ctx, d->ids, d->ids_here, (size_t)n * sizeof *d->ids);
}

/* rows of all ranks to all, through the experts of this one, and back; the outputs' grouping is that of the rows of all */
static exc_status steady_experts(exc_session *s, const exc_layer *y, const int32_t *ids, int64_t rows, const int32_t *mark, double *mid,
                                 double *sq) {
    struct exc_spread *d = s->spread;
    steady *st = &d->steady;
    const exc_shape *p = &s->m->atlas->shape;
    int64_t first = s->m->expert_first, own = s->m->expert_end - first, K = p->top_k, n = d->step_rows;
    size_t width = (size_t)p->hidden * sizeof *st->out;
    exc_rows out[] = {{s->x, st->x, (size_t)p->hidden * exc_act_bytes(s->m)}, {ids, st->ids, (size_t)K * sizeof *ids}, {mark, st->mark, sizeof *mark}};
    EXC_TRY(exc_ranks_collect_rows(s->ctx, "rows to all ranks", out, mark ? 3 : 2, d->rows));
    EXC_RUN(s, permute, .ids = st->ids, .tokens = n, .top_k = K, .experts = p->experts, .offset = st->offset, .row_of = st->row_of,
            .pair_of = st->pair_of);
    EXC_TRY(exc_feed_experts(s, y, st->x, st->offset + first, st->pair_of, n, K, own, s->y, mark ? st->mark : NULL, mid, sq));
    EXC_RUN(s, gather, .x = s->y, .index = st->row_of, .share = 1, .rows = n * K, .width = width, .y = st->out);
    for (int r = 0; r < exc_ranks_count(s->ctx); r++) st->each[r] = rows;
    EXC_TRY(exc_ranks_send_rows(s->ctx, "outputs of experts", &(exc_rows){st->out, st->back, (size_t)K * width}, 1, d->rows, st->each));
    EXC_RUN(s, whence, .ids = ids, .pair_of = s->pair_of, .pairs = rows * K, .experts = p->experts, .ranks = exc_ranks_count(s->ctx),
            .index = st->index);
    EXC_RUN(s, gather, .x = st->back, .index = st->index, .share = 1, .rows = rows * K, .width = width, .y = s->y);
    return EXC_OK;
}

exc_status exc_spread_experts(exc_session *s, const exc_layer *y, const int32_t *ids, int64_t tokens, const int32_t *mark,
                              const exc_sums *sums) {
    struct exc_spread *d = s->spread;
    const exc_shape *p = &s->m->atlas->shape;
    int64_t own = s->m->expert_end - s->m->expert_first, I = p->inner, rows;
    double *mid = sums->mid_sum ? sums->mid_sum + s->m->expert_first * I : NULL;
    double *sq = sums->sqnorm_sum ? sums->sqnorm_sum + s->m->expert_first : NULL;
    size_t width = (size_t)p->hidden * sizeof *d->y;
    if (d->steady.now) return steady_experts(s, y, ids, tokens, mark, mid, sq);
    EXC_TRY(tell_counts(s));
    EXC_TRY(send_rows(s, mark, &rows));
    EXC_RUN(s, permute, .ids = d->ids, .tokens = rows, .top_k = 1, .experts = own, .offset = d->offset, .row_of = d->row_of,
            .pair_of = d->pair_of);
    exc_status st = exc_feed_experts(s, y, d->recv_x, d->offset, d->pair_of, rows, 1, own, d->y, mark ? d->recv_mark : NULL, mid, sq);
    EXC_TRY(y->turn ? exc_ranks_agree(s->ctx, "experts of a layer", st) : st); /* weights may be refused that others do not have */
    EXC_RUN(s, gather, .x = d->y, .index = d->row_of, .share = 1, .rows = rows, .width = width, .y = d->home);
    return exc_ranks_send_rows(s->ctx, "outputs of experts", &(exc_rows){d->home, s->y, width}, 1, d->in, d->out);
}
