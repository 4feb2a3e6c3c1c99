/* forward.c - one step of the model: tokens of several sequences in, residual stream, logits and taps out.
 *
 * A step is a list of rows; each sequence's rows continue what its cache slot holds, so prefill (many rows a
 * sequence), its continuation in pieces and decode (one row) are the same code, and no row is padding. Twelve
 * op calls a layer and chunk of rows, each over all sequences and, for the experts, over all experts at once: small models
 * are bound by calls, not by arithmetic. All buffers belong to the session, so a step allocates nothing.
 * Activations [T,H] are kept as f32 in the residual stream and as `act` (bf16 or f32) where they enter a
 * matmul. What a plan does virtually sits where writers add to the stream. */
#include <string.h>

#include "session.h"

static const exc_mixer *const mixers[EXC_MIXES] = {[EXC_MIX_SOFTMAX] = &exc_mixer_softmax,
                                                     [EXC_MIX_LATENT] = &exc_mixer_latent,
                                                     [EXC_MIX_LINEAR] = &exc_mixer_linear};

const exc_mixer *exc_mixer_of(exc_mix kind) { return mixers[kind]; }

exc_status exc_op_checked(exc_ctx *ctx, const char *op, exc_status st) {
    if (st == EXC_OK) return EXC_OK;
    if (st == EXC_ERR_USAGE) return exc_fail(ctx, st, "forward: op %s refused its arguments", op);
    return exc_device_failed(ctx, st, op);
}

size_t exc_act_bytes(const exc_model *m) { return m->act == EXC_BF16 ? 2 : 4; }

/* -------------------------------------------------------------------------------------------------------
 * session */

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* rows of hidden states that get logits at once */
static int64_t logit_rows(const exc_session *s) { return most(s->slots, 64); }

/* two neighbouring chunks hold more rows than one could, or they would be one */
static int64_t most_chunks(const exc_session *s, int64_t rows) { return 2 * (rows / s->step_tokens) + 1; }

/* rows that decide how many chunks the step may have: of ranks each makes as many as the one that makes most */
static int64_t rows_to_cut(const exc_session *s, int64_t rows) { return exc_ranks_count(s->ctx) > 1 ? s->step_rows : rows; }

/* lays the arrays of a step of that size out in a block, or, with NULL, only tells its bytes */
static size_t lay_inputs(const exc_session *s, exc_inputs *in, void *block, int64_t rows, int64_t sequences) {
    exc_carve c = {.base = block};
    size_t R = (size_t)rows, S = (size_t)sequences, C = (size_t)most_chunks(s, rows_to_cut(s, rows));
    in->cache_row = exc_carve_take(&c, R, sizeof *in->cache_row);
    in->begin = exc_carve_take(&c, S + 2 * C, sizeof *in->begin);
    in->base = exc_carve_take(&c, S + C, sizeof *in->base);
    in->length = exc_carve_take(&c, S + C, sizeof *in->length);
    in->groups = exc_carve_take(&c, 2 * C, sizeof *in->groups);
    in->tokens = exc_carve_take(&c, R, sizeof *in->tokens);
    in->position = exc_carve_take(&c, R, sizeof *in->position);
    in->observe = exc_carve_take(&c, R, sizeof *in->observe);
    in->ring_row = s->ring ? exc_carve_take(&c, R, sizeof *in->ring_row) : NULL;
    in->ring_base = s->ring ? exc_carve_take(&c, S + C, sizeof *in->ring_base) : NULL;
    in->slot = exc_carve_take(&c, S + C, sizeof *in->slot);
    in->last = exc_carve_take(&c, S, sizeof *in->last);
    return c.overflow ? SIZE_MAX : c.at;
}

/* the host's block, and its image where ops run */
static void *take_twice(exc_carve *c, size_t bytes, void **there) {
    void *here = exc_carve_keep(c, bytes, 1);
    *there = c->apart ? exc_carve_take(c, bytes, 1) : here;
    return here;
}

/* one function measures and carves, so that the two cannot disagree */
static void lay_out(exc_session *s, exc_carve *c) {
    const exc_shape *p = &s->m->atlas->shape;
    exc_whole *w = &s->whole;
    exc_inputs in;
    void *found;
    size_t act = exc_act_bytes(s->m), T = (size_t)s->step_tokens, H = (size_t)p->hidden, S = (size_t)s->slots,
           R = (size_t)s->step_rows;
    s->base = exc_carve_keep(c, S, sizeof *s->base);
    s->capacity = exc_carve_keep(c, S, sizeof *s->capacity);
    s->length = exc_carve_keep(c, S, sizeof *s->length);
    w->chunk = exc_carve_keep(c, (size_t)most_chunks(s, s->step_rows), sizeof *w->chunk);
    w->block_here = take_twice(c, lay_inputs(s, &in, NULL, s->step_rows, s->slots), &w->block_there);
    s->found_here = take_twice(c, sizeof *s->found_here + S * sizeof s->found_here->token[0], &found);
    s->found_there = found;
    s->random = exc_carve_take(c, S, sizeof *s->random);
    w->h = exc_carve_take(c, R * H, sizeof *w->h);
    s->x = exc_carve_take(c, T * H, act);
    s->last = exc_carve_take(c, (size_t)logit_rows(s) * H, sizeof *s->last);
    s->last_x = exc_carve_take(c, (size_t)logit_rows(s) * H, act);
    s->zero_ids = exc_carve_take(c, T, sizeof *s->zero_ids);
    s->own_row = exc_carve_take(c, T, sizeof *s->own_row);
    s->ones = exc_carve_take(c, T, sizeof *s->ones);
    exc_feed_room(c, s);
    exc_spread_room(c, s);
    for (exc_mix kind = 0; kind < EXC_MIXES; kind++)
        if (p->mix_layers[kind]) mixers[kind]->room(c, s);
}

/* the choice of a single expert, for combine; 4 bytes each, so one array of the host serves for both */
static exc_status fill_constants(exc_session *s) {
    size_t n = (size_t)s->step_tokens;
    int32_t *row = exc_alloc(s->ctx, n, sizeof *row, "rows of a step");
    float *one = (float *)(void *)row;
    if (!row) return EXC_ERR_MEMORY;
    for (size_t t = 0; t < n; t++) row[t] = (int32_t)t;
    exc_status st = exc_device_put(s->ctx, s->own_row, row, n * sizeof *row);
    for (size_t t = 0; t < n; t++) one[t] = 1.0f;
    if (st == EXC_OK) st = exc_device_put(s->ctx, s->ones, one, n * sizeof *one);
    if (st == EXC_OK) st = exc_device_zero(s->ctx, s->zero_ids, n * sizeof *s->zero_ids);
    exc_release(row);
    return st;
}

static exc_status get_slab(exc_session *s) {
    exc_carve c = exc_carve_measure(s->ctx);
    lay_out(s, &c);
    s->bytes = c.at;
    EXC_TRY(exc_slab_make(s->ctx, &c, "buffers and KV cache of the forward pass", &s->slab));
    exc_memory_take(s->ctx, s->slab.bytes);
    lay_out(s, &c);
    return fill_constants(s);
}

/* The rows of a chunk are stored before they look around, so a ring holds them and the window of the first. It is taken where
 * that is less than what the slots have. */
static void choose_ring(exc_session *s) {
    const exc_shape *p = &s->m->atlas->shape;
    int64_t window = 0;
    for (int64_t i = 0; i < p->layers; i++) window = most(window, p->window[i]);
    int64_t rows = (window + s->step_tokens + EXC_RING_ALIGN - 1) / EXC_RING_ALIGN * EXC_RING_ALIGN;
    if (!window || s->once || rows >= s->cache_tokens / most(s->slots, 1)) return;
    s->ring = rows;
    s->ring_tokens = rows * s->slots;
}

static exc_session with_room(exc_model *m, const exc_room *room) {
    int64_t chunk = room->chunk_tokens ? room->chunk_tokens : room->step_tokens;
    exc_session s = {.ctx = m->ctx, .m = m, .slots = room->slots, .cache_tokens = room->cache_tokens, .step_rows = room->step_tokens,
                     .once = room->once};
    s.step_tokens = chunk;
    choose_ring(&s);
    return s;
}

uint64_t exc_session_measure(exc_model *m, const exc_room *room) {
    exc_session s = with_room(m, room);
    exc_carve c = exc_carve_measure(m->ctx);
    lay_out(&s, &c);
    return c.overflow ? UINT64_MAX / 4 : c.at;
}

exc_status exc_session_open(exc_ctx *ctx, exc_model *m, const exc_room *room, exc_session **out) {
    *out = NULL;
    if (room->slots < 1 || room->cache_tokens < 1 || room->step_tokens < 1 || room->chunk_tokens < 0 ||
        room->chunk_tokens > room->step_tokens || room->step_tokens > INT32_MAX / 64 || room->cache_tokens > (int64_t)1 << 40)
        return exc_fail(ctx, EXC_ERR_USAGE,
                        "session: expected at least one slot, cache token and step token");
    exc_session *s = exc_zalloc(ctx, 1, sizeof *s, "session");
    if (!s) return EXC_ERR_MEMORY;
    *s = with_room(m, room);
    s->ctx = ctx;
    exc_status st = get_slab(s);
    if (st) exc_session_close(s);
    else *out = s;
    return st;
}

void exc_session_close(exc_session *s) {
    if (!s) return;
    exc_replay_close(s);
    exc_memory_give(s->ctx, s->slab.bytes);
    exc_slab_free(s->ctx, &s->slab);
    exc_release(s);
}

uint64_t exc_session_bytes(const exc_session *s) { return s->bytes; }

bool exc_session_fits(const exc_session *s, const exc_room *room) {
    exc_session w = with_room(s->m, room);
    bool same = w.step_tokens < w.step_rows ? s->step_tokens == w.step_tokens : s->step_tokens >= w.step_tokens;
    return same && s->once == w.once && s->slots >= w.slots && s->cache_tokens >= w.cache_tokens && s->step_rows >= w.step_rows;
}

int64_t exc_plane(const exc_session *s, int64_t layer) { return s->once ? 0 : s->m->atlas->shape.mix_row[layer]; }

int64_t exc_planes(const exc_session *s, exc_mix kind) { return s->once ? 1 : s->m->atlas->shape.mix_layers[kind]; }

exc_status exc_session_reset(exc_session *s, int64_t slots, const int64_t *capacity) {
    int64_t at = 0;
    if (slots > s->slots)
        return exc_fail(s->ctx, EXC_ERR_USAGE, "session: expected at most %lld slots", (long long)s->slots);
    for (int64_t i = 0; i < slots; i++) {
        s->base[i] = at;
        s->capacity[i] = capacity[i];
        s->length[i] = 0;
        if (!s->spread || exc_spread_owns(s, i)) at += capacity[i];
    }
    s->used_slots = slots;
    if (at > s->cache_tokens)
        return exc_fail(s->ctx, EXC_ERR_USAGE,
                        "session: expected capacities of at most %lld tokens, found %lld",
                        (long long)s->cache_tokens, (long long)at);
    return EXC_OK;
}

/* caches and recurrent states stay as they are: an op that is told of length 0 looks at neither */
void exc_session_forget(exc_session *s, int64_t slot) { s->length[slot] = 0; }

int64_t exc_session_length(const exc_session *s, int64_t slot) { return s->length[slot]; }

int64_t exc_cache_bytes(const exc_model *m) {
    int64_t values = 0;
    for (exc_mix kind = 0; kind < EXC_MIXES; kind++)
        values += m->atlas->shape.mix_layers[kind] * mixers[kind]->cached(&m->atlas->shape);
    return values * (int64_t)exc_act_bytes(m);
}

int64_t exc_state_bytes(const exc_model *m) {
    int64_t bytes = 0;
    for (exc_mix kind = 0; kind < EXC_MIXES; kind++)
        if (mixers[kind]->held) bytes += m->atlas->shape.mix_layers[kind] * mixers[kind]->held(&m->atlas->shape);
    return bytes;
}

int64_t exc_step_tokens(const exc_model *m) {
    /* experts want rows (64 or more each keep their weights' traffic below the arithmetic), caches want few
     * rows */
    const exc_shape *p = &m->atlas->shape;
    int64_t per_token = p->top_k * (p->hidden * 4 + p->inner * 2), tokens = ((int64_t)96 << 20) / per_token;
    int64_t wanted = 64 * p->experts / p->top_k;
    if (tokens < wanted) tokens = wanted;
    return tokens < 256 ? 256 : tokens > 4096 ? 4096 : tokens;
}

/* --------------------------------------------------------------------------------------------------------- a
 * step */

/* Adds `count` rows of a slot to the chunk. They continue what it holds. */
static void add_rows(exc_session *s, exc_chunk *c, int64_t slot, int64_t count) {
    exc_inputs *in = &s->whole.here;
    int64_t row = c->row + c->rows, at = c->at + c->sequences++;
    for (int64_t j = 0; j < count; j++) {
        in->position[row + j] = (int32_t)(s->length[slot] + j);
        in->cache_row[row + j] = s->base[slot] + s->length[slot] + j;
        if (s->ring) in->ring_row[row + j] = slot * s->ring + (s->length[slot] + j) % s->ring;
    }
    s->length[slot] += count;
    c->rows += count;
    c->longest = most(c->longest, s->length[slot]);
    in->slot[at] = (int32_t)slot;
    in->base[at] = s->base[slot];
    if (s->ring) in->ring_base[at] = slot * s->ring;
    in->length[at] = s->length[slot];
    in->begin[c->begin + c->sequences] = c->rows;
    in->groups[c->groups + 1] = c->rows;
}

static exc_chunk *next_chunk(exc_whole *w, exc_chunk *last) {
    exc_chunk *c = &w->chunk[w->chunks++];
    *c = (exc_chunk){0};
    if (last)
        *c = (exc_chunk){.row = last->row + last->rows, .at = last->at + last->sequences, .begin = last->begin + last->sequences + 1,
                         .groups = last->groups + 2};
    w->here.begin[c->begin] = 0;
    w->here.groups[c->groups] = w->here.groups[c->groups + 1] = 0;
    return c;
}

/* the rule that place() cuts by */
static bool opens_chunk(const exc_session *s, int64_t rows, int64_t left) { return rows && left > s->step_tokens - rows; }

int64_t exc_chunks_more(const exc_session *s, int64_t left, int64_t *rows) {
    int64_t chunks = 0;
    for (int64_t take; left > 0; left -= take) {
        if (opens_chunk(s, *rows, left)) chunks++, *rows = 0;
        take = least(left, s->step_tokens);
        *rows += take;
    }
    return chunks;
}

/* where each row stands: position in its sequence, row of the cache, and the chunk it goes with */
static exc_status place(exc_session *s, const exc_step *t) {
    const int64_t *begin = t->begin;
    exc_whole *w = &s->whole;
    w->rows = t->sequences ? begin[t->sequences] : 0;
    if (w->rows > s->step_rows || t->sequences > s->slots)
        return exc_fail(s->ctx, EXC_ERR_USAGE, "session: expected at most %lld rows in a step, found %lld",
                        (long long)s->step_rows, (long long)w->rows);
    size_t bytes = lay_inputs(s, &w->here, w->block_here, w->rows, t->sequences);
    lay_inputs(s, &w->there, w->block_there, w->rows, t->sequences);
    w->chunks = 0;
    exc_chunk *c = next_chunk(w, NULL);
    for (int64_t i = 0; i < t->sequences; i++) {
        int64_t slot = t->slot[i], left = begin[i + 1] - begin[i];
        if (slot < 0 || slot >= s->used_slots || left < 1 || s->length[slot] + left > s->capacity[slot])
            return exc_fail(s->ctx, EXC_ERR_USAGE, "session: sequence %lld does not fit its slot",
                            (long long)i);
        for (int64_t take; left > 0; left -= take) {
            if (opens_chunk(s, c->rows, left)) c = next_chunk(w, c);
            take = least(left, s->step_tokens);
            add_rows(s, c, slot, take);
        }
        w->here.last[i] = (int32_t)(begin[i + 1] - 1);
    }
    while (s->spread && w->chunks < exc_spread_chunks(s)) c = next_chunk(w, c); /* for the others' rows */
    if (w->rows) memcpy(w->here.tokens, t->tokens, (size_t)w->rows * sizeof *t->tokens);
    if (!t->observe) w->here.observe = w->there.observe = NULL;
    else if (w->rows) memcpy(w->here.observe, t->observe, (size_t)w->rows * sizeof *t->observe);
    return exc_device_put(s->ctx, w->block_there, w->block_here, bytes);
}

static exc_inputs inputs_of(const exc_inputs *whole, const exc_chunk *c) {
    exc_inputs in = *whole;
    in.cache_row += c->row;
    in.begin += c->begin;
    in.base += c->at;
    in.length += c->at;
    in.groups += c->groups;
    in.tokens += c->row;
    in.position += c->row;
    if (in.observe) in.observe += c->row;
    if (in.ring_row) in.ring_row += c->row, in.ring_base += c->at;
    in.slot += c->at;
    return in;
}

/* the part of a step that a chunk is, and the session's arrays at its rows */
static exc_step enter(exc_session *s, const exc_step *t, const exc_chunk *c) {
    const exc_whole *w = &s->whole;
    const exc_shape *p = &s->m->atlas->shape;
    exc_step part = *t;
    s->h = w->h + c->row * p->hidden;
    s->here = inputs_of(&w->here, c);
    s->there = inputs_of(&w->there, c);
    s->longest = c->longest;
    part.slot = s->here.slot;
    part.begin = s->here.begin;
    part.sequences = c->sequences;
    part.observe = s->here.observe;
    if (t->router_ids) part.router_ids = t->router_ids + c->row * p->top_k;
    if (t->router_weights) part.router_weights = t->router_weights + c->row * p->top_k;
    return part;
}

exc_status exc_norm_rows(exc_session *s, const float *x, const float *weight, int64_t rows, void *y) {
    const exc_shape *p = &s->m->atlas->shape;
    EXC_RUN(s, norm, .x = x, .x_stride = p->hidden, .weight = weight,
        .zero_centred = s->m->atlas->family->norm_zero_centred, .eps = p->eps, .rows = rows, .dim = p->hidden,
        .y = y, .y_stride = p->hidden, .act = s->m->act);
    return EXC_OK;
}

/* A writer of the stream: h += x W^T + bias. With a virtual edit the output is made apart and projected on its way
 * into the sum. */
exc_status exc_write_stream(exc_session *s, const void *x, int64_t width, const exc_packed *w,
                            const float *bias, const exc_virtual *v, int64_t rows) {
    int64_t H = s->m->atlas->shape.hidden;
    float *y = v->on ? s->y : s->h;
    EXC_RUN(s, matmul, .x = x, .x_stride = width, .act = s->m->act, .w = w, .bias = bias, .add = v->on ? NULL : s->h,
        .y = y, .y_stride = H, .rows = rows);
    if (!v->on) return EXC_OK;
    EXC_RUN(s, combine, .y = s->y, .row_of = s->own_row, .ids = s->zero_ids, .weights = s->ones, .tokens = rows,
        .top_k = 1, .hidden = H, .basis = v->basis, .rank = v->rank, .strength = v->strength,
        .scale = v->scale, .h = s->h);
    return EXC_OK;
}

/* the stream's last row of each sequence, [sequences,H] */
static exc_status gather_last(exc_session *s, const exc_step *t) {
    EXC_RUN(s, embed, .table = s->whole.h, .table_dtype = EXC_F32, .ids = s->whole.there.last, .tokens = t->sequences,
        .hidden = s->m->atlas->shape.hidden, .out = s->last);
    return EXC_OK;
}

/* copies of the residual stream after `depth` layers (0: the embedding) */
static exc_status tap(exc_session *s, const exc_step *t, int64_t depth) {
    int64_t H = s->m->atlas->shape.hidden, stack = (s->m->atlas->shape.layers + 1) * H, n = s->whole.rows * H;
    if (t->hidden) EXC_TRY(exc_device_copy(s->ctx, t->hidden + depth * n, s->whole.h, (size_t)n * sizeof *t->hidden));
    if (!t->hidden_last) return EXC_OK;
    EXC_TRY(gather_last(s, t));
    EXC_RUN(s, view, .src = s->last, .src_row = H, .src_column = 1, .dst = t->hidden_last + depth * H, .dst_row = stack,
        .dst_column = 1, .rows = t->sequences, .columns = H, .unit = sizeof *s->last);
    return EXC_OK;
}

/* NaN or infinity anywhere in a layer reaches the stream and stays there: one look at the end is enough */
static exc_status look(exc_session *s) {
    EXC_RUN(s, convert, .src = s->whole.h, .src_dtype = EXC_F32, .dst = NULL, .dst_dtype = EXC_F32,
        .n = s->whole.rows * s->m->atlas->shape.hidden, .nonfinite = &s->found_there->bad, .index = &s->found_there->index);
    return EXC_OK;
}

/* fetches what the last step left, with the first `tokens` of those drawn */
static exc_status fetch(exc_session *s, int64_t tokens) {
    const exc_found *f = s->found_here;
    int64_t H = s->m->atlas->shape.hidden;
    EXC_TRY(exc_device_get(s->ctx, s->found_here, s->found_there, sizeof *f + (size_t)tokens * sizeof f->token[0]));
    if (!f->bad) return EXC_OK;
    return exc_fail(
        s->ctx, EXC_ERR_NUMERIC,
        "%s: residual stream after the last layer: expected finite activations, found NaN or infinity at "
        "row %lld, element %lld (%lld in this step)",
        s->m->dir, (long long)(f->index / H), (long long)(f->index % H), (long long)f->bad);
}

exc_status exc_session_check(exc_session *s) { return fetch(s, 0); }

exc_status exc_session_draw(exc_session *s, const exc_draw *d, int32_t *token) {
    if (d->temperature > 0)
        EXC_TRY(exc_device_put(s->ctx, s->random, d->random01, (size_t)d->rows * sizeof *s->random));
    EXC_RUN(s, sample, .logits = d->logits, .rows = d->rows, .vocab = s->m->atlas->shape.vocab, .temperature = d->temperature,
        .top_p = d->top_p, .random01 = s->random, .token = s->found_there->token);
    EXC_TRY(fetch(s, d->rows));
    memcpy(token, s->found_here->token, (size_t)d->rows * sizeof *token);
    return EXC_OK;
}

/* logits [rows,V] of s->last_x, from as many rows of the head at a time as it gives */
static exc_status head(exc_session *s, int64_t rows, float *logits) {
    const exc_shape *p = &s->m->atlas->shape;
    exc_packed w;
    for (int64_t first = 0; first < p->vocab; first += w.n) {
        EXC_TRY(exc_head_at(s->ctx, s->m, first, &w));
        EXC_RUN(s, matmul, .x = s->last_x, .x_stride = p->hidden, .act = s->m->act, .w = &w, .y = logits + first, .y_stride = p->vocab,
            .rows = rows);
    }
    return EXC_OK;
}

exc_status exc_session_part_logits(exc_session *s, int64_t first, int64_t rows, float *logits) {
    const exc_shape *p = &s->m->atlas->shape;
    for (int64_t done = 0, n; done < rows; done += n) {
        n = rows - done < logit_rows(s) ? rows - done : logit_rows(s);
        EXC_TRY(exc_norm_rows(s, s->whole.h + (first + done) * p->hidden, s->m->loaded->norm_final, n, s->last_x));
        EXC_TRY(head(s, n, logits + done * p->vocab));
    }
    return EXC_OK;
}

static exc_status last_logits(exc_session *s, const exc_step *t) {
    bool all = s->whole.rows == t->sequences; /* each row is its sequence's last */
    if (!all) EXC_TRY(gather_last(s, t));
    EXC_TRY(exc_norm_rows(s, all ? s->whole.h : s->last, s->m->loaded->norm_final, t->sequences, s->last_x));
    return head(s, t->sequences, t->logits);
}

exc_status exc_session_logits(exc_session *s, int64_t first, int64_t rows, float *logits) {
    return s->spread ? exc_spread_logits(s, first, rows, logits) : exc_session_part_logits(s, first, rows, logits);
}

exc_status exc_session_step(exc_session *s, const exc_step *t) {
    return s->spread ? exc_spread_step(s, t) : exc_session_part(s, t);
}

static exc_status run_layer(exc_session *s, int64_t layer, const exc_step *t) {
    const exc_layer *y;
    EXC_TRY(exc_layer_at(s->ctx, s->m, layer, s->whole.chunks, &y));
    for (int64_t i = 0; i < s->whole.chunks; i++) {
        int64_t rows = s->whole.chunk[i].rows;
        exc_step part = enter(s, t, &s->whole.chunk[i]);
        EXC_TRY(exc_norm_rows(s, s->h, y->norm_in, rows, s->x));
        EXC_TRY(mixers[s->m->atlas->shape.mix[layer]]->run(s, y, layer, &part, rows));
        EXC_TRY(exc_norm_rows(s, s->h, y->norm_post, rows, s->x));
        EXC_TRY(exc_feed_run(s, y, layer, &part, rows));
    }
    return EXC_OK;
}

exc_status exc_session_run(exc_session *s, const exc_step *t) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_loaded *l = s->m->loaded;
    EXC_RUN(s, embed, .table = l->embed, .table_dtype = l->embed_dtype, .ids = s->whole.there.tokens, .tokens = s->whole.rows,
        .hidden = p->hidden, .out = s->whole.h);
    EXC_TRY(tap(s, t, 0));
    for (int64_t i = 0; i < p->layers; i++) {
        EXC_TRY(run_layer(s, i, t));
        EXC_TRY(tap(s, t, i + 1));
    }
    EXC_TRY(look(s));
    if (!t->logits) return EXC_OK;
    return t->logits_all ? exc_session_part_logits(s, 0, s->whole.rows, t->logits) : last_logits(s, t);
}

/* the observed tokens of every MoE layer: the host knows them */
static void count_tokens(const exc_session *s, const exc_step *t) {
    if (!t->sums || !t->sums->tokens || !t->observe) return;
    int64_t n = 0;
    for (int64_t i = 0; i < s->whole.rows; i++) n += t->observe[i] >= 0;
    for (int64_t row = 0; row < s->m->atlas->shape.moe_layers; row++) t->sums->tokens[row] += n;
}

exc_status exc_session_part(exc_session *s, const exc_step *t) {
    EXC_TRY(place(s, t));
    if (!s->whole.rows && !s->spread) return exc_device_zero(s->ctx, s->found_there, sizeof *s->found_there);
    /* a rank without rows still has experts that others ask */
    count_tokens(s, t);
    return exc_replay_step(s, t);
}
