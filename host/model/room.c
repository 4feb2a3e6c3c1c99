/* room.c - how a run shares the memory budget between weights and states.
 *
 * What a run asks for (exc_wish) is turned into a session's sizes: as many sequences at once as fit, because a streamed
 * model reads its weights once a step whatever the number of rows. A step's residual stream and the caches grow with
 * the rows; everything else is as large as a chunk. A run that never decodes needs the caches of one layer only. When
 * not even one prompt fits, places of layers are given up, of this model and then of others, and when none is left
 * the message says what would do. */
#include "session.h"

#define LEAST_CHUNK 32 /* rows below which a chunk is not made smaller */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* -------------------------------------------------------------------------------------------------------- sizes */

bool exc_model_streamed(const exc_model *m) { return m->loaded->places < m->loaded->layers; }

/* steps of many chunks */
static bool wide(const exc_model *m, const exc_wish *w) { return w->whole || exc_model_streamed(m); }

static exc_room room_of(const exc_model *m, const exc_wish *w, int64_t slots, int64_t chunk) {
    int64_t rows = wide(m, w) ? least(w->tokens, slots * w->longest) : least(chunk, w->tokens);
    exc_room r = {.slots = slots, .cache_tokens = slots * w->capacity, .step_tokens = most(most(rows, slots), 1)};
    r.chunk_tokens = least(chunk, r.step_tokens);
    r.once = w->once && wide(m, w);
    return r;
}

static uint64_t cost(exc_model *m, const exc_wish *w, const exc_room *r) {
    uint64_t session = exc_session_measure(m, r) + (uint64_t)r->slots * w->slot_bytes + (uint64_t)r->step_tokens * w->token_bytes;
    return session * (w->sessions ? w->sessions : 1) + w->held;
}

/* the last session is reused or given up */
static uint64_t left_for(const exc_ctx *ctx, const exc_model *m) {
    return exc_memory_left(ctx) + (m->spare ? exc_session_bytes(m->spare) : 0);
}

/* the largest number of slots that fits; 0: not one */
static int64_t most_slots(exc_model *m, const exc_wish *w, int64_t chunk, uint64_t left) {
    int64_t fits = 0, beyond = w->slots + 1;
    if (wide(m, w)) beyond = least(beyond, (INT32_MAX / 64) / w->longest + 1);
    while (beyond - fits > 1) {
        int64_t n = fits + (beyond - fits) / 2;
        exc_room r = room_of(m, w, n, chunk);
        if (cost(m, w, &r) <= left) fits = n;
        else beyond = n;
    }
    return fits;
}

/* What a run costs, in readings of the weights from memory: filling a place takes about four, each chunk one. */
static int64_t effort(const exc_wish *w, const exc_room *r) {
    int64_t steps = (w->prompts + r->slots - 1) / r->slots;
    return 4 * steps + (w->tokens + r->chunk_tokens - 1) / r->chunk_tokens;
}

/* Small chunks leave memory to more sequences, so to fewer steps. A resident model has the largest that fits. */
static bool choose(exc_model *m, const exc_wish *w, uint64_t left, exc_room *out, int64_t *best) {
    *best = INT64_MAX;
    for (int64_t chunk = w->chunk;; chunk = most(chunk / 2, LEAST_CHUNK)) {
        int64_t slots = most_slots(m, w, chunk, left);
        exc_room r = room_of(m, w, slots, chunk);
        if (slots && effort(w, &r) < *best) {
            *best = effort(w, &r);
            *out = r;
        }
        if (chunk <= LEAST_CHUNK || (slots && !wide(m, w))) return *best < INT64_MAX;
    }
}

/* ------------------------------------------------------------------------------------------------------- the budget */

/* asks another model of the context to make room */
static bool others_narrow(exc_ctx *ctx, const exc_model *but, exc_status *st) {
    for (exc_model *m = ctx->models; m; m = m->next) {
        if (m == but || !m->loaded) continue;
        if (m->spare) {
            exc_session_close(m->spare);
            m->spare = NULL;
            return true;
        }
        if (exc_window_narrow(ctx, m, st)) return true;
    }
    return false;
}

static exc_status refuse(exc_ctx *ctx, const exc_model *m, uint64_t states, const char *what) {
    const exc_loaded *l = m->loaded;
    char all[32], layer[32], ends[32], state[32], rest[32], need[32], has[32];
    uint64_t others = ctx->taken - m->weight_bytes - (m->spare ? exc_session_bytes(m->spare) : 0);
    uint64_t total = exc_window_bytes(m, 1) + states + others;
    exc_memory_text(total, need);
    exc_memory_text(ctx->memory, has);
    exc_memory_text(l->largest, layer);
    exc_memory_text(l->ends_bytes, ends);
    exc_memory_text(states, state);
    exc_memory_text(others, rest);
    exc_memory_text(exc_window_bytes(m, l->layers) + states + others, all);
    return exc_fail(ctx, ctx->opt.memory ? EXC_ERR_INPUT : EXC_ERR_MEMORY,
                    "%s: memory: expected at least %s (its largest layer %s, embedding and head %s, %s %s, besides the model %s), found a budget of %s; "
                    "%s would hold all layers", m->dir, need, layer, ends, what, state, rest, has, all);
}

/* the second place is for reading ahead; without it there may be so much more room for states that it does not pay */
static bool better_narrow(exc_model *m, const exc_wish *w, uint64_t left, int64_t effort) {
    exc_room r;
    int64_t narrow;
    return m->loaded->places == 2 && wide(m, w) && choose(m, w, left + m->loaded->largest, &r, &narrow) && narrow < effort / 2;
}

static exc_status choose_alone(exc_ctx *ctx, exc_model *m, const exc_wish *w, exc_room *out) {
    exc_status st = EXC_OK;
    for (int64_t effort;;) {
        bool fits = choose(m, w, left_for(ctx, m), out, &effort);
        if (fits && !better_narrow(m, w, left_for(ctx, m), effort)) {
            if (m->spare && cost(m, w, out) - exc_session_measure(m, out) > exc_memory_left(ctx)) { /* larger than what was counted */
                exc_session_close(m->spare);
                m->spare = NULL;
            }
            return EXC_OK;
        }
        if (!exc_window_narrow(ctx, m, &st) && !others_narrow(ctx, m, &st)) {
            exc_room one = room_of(m, w, 1, LEAST_CHUNK);
            return refuse(ctx, m, cost(m, w, &one), "states of one prompt");
        }
        EXC_TRY(st);
    }
}

/* Ranks meet in every step and, of streamed models, in every layer: all take what the one with least memory can. Each number of a
 * room may be less without the others. */
exc_status exc_room_choose(exc_ctx *ctx, exc_model *m, const exc_wish *w, exc_room *out) {
    for (int64_t same = 0; !same;) { /* a model that is streamed for another rank's sake wants another room */
        bool streamed = exc_model_streamed(m);
        EXC_TRY(exc_ranks_agree(ctx, "room for states", choose_alone(ctx, m, w, out)));
        streamed |= exc_model_streamed(m);
        EXC_TRY(exc_windows_agree(ctx));
        same = streamed == exc_model_streamed(m);
        EXC_TRY(exc_ranks_least(ctx, "room for states", &same, 1));
    }
    int64_t v[] = {out->slots, out->cache_tokens, out->step_tokens, out->chunk_tokens};
    EXC_TRY(exc_ranks_least(ctx, "room for states", v, EXC_COUNT(v)));
    out->slots = v[0], out->cache_tokens = v[1], out->step_tokens = v[2], out->chunk_tokens = v[3];
    return EXC_OK;
}

/* what a short prompt takes: a model is resident where at least that fits beside it */
static uint64_t short_prompt(exc_model *m, int64_t chunk) {
    const exc_shape *s = &m->atlas->shape;
    exc_room r = {.slots = 1, .cache_tokens = 256, .step_tokens = chunk};
    return exc_session_measure(m, &r) + (uint64_t)s->vocab * 4;
}

exc_status exc_budget_places(exc_ctx *ctx, exc_model *m, int64_t *places) {
    const int64_t tried[] = {m->loaded->layers, 2, 1};
    for (;;) {
        uint64_t left = exc_memory_left(ctx);
        for (int i = 0; i < 3; i++) {
            *places = least(tried[i], m->loaded->layers);
            uint64_t states = short_prompt(m, i ? LEAST_CHUNK : exc_step_tokens(m));
            if (exc_window_bytes(m, *places) + states <= left) return EXC_OK;
        }
        exc_status st = EXC_OK;
        if (!others_narrow(ctx, m, &st)) return refuse(ctx, m, short_prompt(m, LEAST_CHUNK), "states of a short prompt");
        EXC_TRY(st);
    }
}

exc_status exc_session_get(exc_ctx *ctx, exc_model *m, const exc_room *room, exc_session **out) {
    if (!m->spare || !exc_session_fits(m->spare, room)) {
        exc_session_close(m->spare);
        m->spare = NULL;
        EXC_TRY(exc_session_open(ctx, m, room, &m->spare));
    }
    *out = m->spare;
    return EXC_OK;
}

void exc_memory_facts(const exc_model *m, json_t *to) {
    const exc_loaded *l = m->loaded;
    json_object_set_new(to, "budget", json_integer((json_int_t)m->ctx->memory));
    json_object_set_new(to, "peak_memory", json_integer((json_int_t)exc_memory_peak(m->ctx)));
    json_object_set_new(to, "streamed", json_boolean(exc_model_streamed(m)));
    json_object_set_new(to, "passes", json_integer((json_int_t)(((int64_t)l->fills + l->layers - 1) / l->layers)));
}
