/* generate.c - runs prompts through a session: prefill in steps of many tokens, then decode all live
 * sequences together.
 *
 * One loop serves greedy and sampled generation, capture and plain prefill. Prompts are taken in order; a
 * slot that finishes is given to the next prompt once a quarter of the slots is free, so steps stay wide
 * without a prefill for each single reply. Token i of prompt p draws number i of stream p: replies do not
 * depend on the batching. Prefill and decode stay separate steps because their sums are kept apart. */
#include <stdio.h>
#include <string.h>

#include "model.h"

#define CACHE_BYTES ((int64_t)1 << 30)   /* KV cache a run may take by default */
#define LOGIT_BYTES ((int64_t)256 << 20) /* one row of logits a slot */
#define PIECE_BYTES ((int64_t)16 << 20)  /* logits handed out at once by exc_logits_run */

typedef struct run {
    exc_ctx *ctx;
    exc_model *m;
    const exc_prompts *p;
    const exc_decode *d;
    exc_session *s;
    exc_reply *replies; /* [P] */
    int64_t slots, step_tokens;
    int64_t next, fed;      /* prompt to prefill next; tokens of it already in its slot */
    int64_t partial;        /* the slot it is in, -1: not begun */
    int64_t live, finished; /* sequences decoding; prompts done */
    int64_t *prompt;        /* [slots] prompt of the slot, -1: free */
    int32_t *slot;          /* [slots] slots of the step's sequences */
    int64_t *begin;         /* [slots+1] */
    int64_t *first;         /* [slots] token of its prompt that a prefill sequence begins with */
    int32_t *tokens;        /* [step_tokens] */
    int32_t *observe;       /* [step_tokens] */
    int32_t *token;         /* [slots] sampled */
    double *random;         /* [slots] */
    /* where ops run */
    float *logits;          /* [slots,V] */
    float *hidden_last;     /* [slots,L+1,H] when asked for */
    float *hidden;          /* [L+1,step_tokens,H] when asked for */
    int32_t *router_ids;    /* [M,step_tokens,K] */
    float *router_weights;
} run;

static int64_t prompt_length(const exc_prompts *p, int64_t i) { return p->begin[i + 1] - p->begin[i]; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* "FILE:LINE", or "prompt N" where no file is known */
static void name_prompt(const exc_prompts *p, int64_t i, char *out, size_t n) {
    if (p->path && p->line) snprintf(out, n, "%.480s:%lld", p->path, (long long)p->line[i]);
    else snprintf(out, n, "prompt %lld", (long long)i + 1);
}

exc_status exc_prompts_check(exc_ctx *ctx, const exc_model *m, const exc_prompts *p, int64_t extra) {
    const exc_shape *s = &m->atlas->shape;
    char name[512];
    for (int64_t i = 0; i < p->count; i++) {
        int64_t n = prompt_length(p, i);
        name_prompt(p, i, name, sizeof name);
        if (n < 1) return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected at least one token, found none", name);
        if (n + extra > s->context)
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s: expected at most %lld tokens%s (max_position_embeddings of %s), found %lld", name,
                            (long long)s->context, extra ? " with the new ones" : "", m->dir,
                            (long long)(n + extra));
        for (int64_t t = p->begin[i]; t < p->begin[i + 1]; t++)
            if (p->tokens[t] < 0 || p->tokens[t] >= s->vocab)
                return exc_fail(ctx, EXC_ERR_INPUT,
                                "%s, token %lld: expected an id in 0..%lld (vocab_size of %s), found %d", name,
                                (long long)(t - p->begin[i]), (long long)s->vocab - 1, m->dir, p->tokens[t]);
    }
    return EXC_OK;
}

/* new tokens prompt i may get: the context ends some replies early */
static int64_t reply_limit(const run *r, int64_t i) {
    return least(r->d->max_new, most(r->m->atlas->shape.context - prompt_length(r->p, i), 1));
}

/* -----------------------------------------------------------------------------------------------------------
 * set-up */

/* bytes of the buffers below: of a sequence, and of a token of a step */
static uint64_t slot_bytes(const exc_decode *d, const exc_shape *s) {
    uint64_t logits = d->max_new > 0 || d->first_logits ? (uint64_t)s->vocab * 4 : 0;
    return 64 + logits + (d->hidden_last ? (uint64_t)((s->layers + 1) * s->hidden) * 4 : 0);
}

static uint64_t token_bytes(const exc_decode *d, const exc_shape *s) {
    return 8 + (d->hidden ? (uint64_t)((s->layers + 1) * s->hidden) * 4 : 0) + (d->routing ? (uint64_t)(s->moe_layers * s->top_k) * 8 : 0);
}

/* how many sequences at once: what the caller says, or what keeps caches and logits moderate while the model is resident */
static int64_t wanted_slots(const run *r, int64_t capacity) {
    const exc_shape *s = &r->m->atlas->shape;
    if (r->d->batch > 0) return least(r->d->batch, r->p->count);
    if (r->m->loaded->places < r->m->loaded->layers) return r->p->count;
    int64_t fit = least(CACHE_BYTES / (capacity * exc_cache_bytes(r->m) + exc_state_bytes(r->m)), LOGIT_BYTES / (s->vocab * 4));
    return least(most(least(fit, 256), 1), r->p->count);
}

static exc_status get_session(run *r) {
    exc_ctx *ctx = r->ctx;
    const exc_shape *s = &r->m->atlas->shape;
    exc_wish w = {.prompts = r->p->count, .longest = 1, .capacity = 1, .slot_bytes = slot_bytes(r->d, s), .token_bytes = token_bytes(r->d, s),
                  .held = r->d->held, .once = r->d->max_new < 1};
    exc_room room;
    for (int64_t i = 0; i < r->p->count; i++) {
        int64_t n = prompt_length(r->p, i);
        w.longest = most(w.longest, n);
        w.capacity = most(w.capacity, n + most(reply_limit(r, i) - 1, 0)); /* the last new token is never fed back */
        w.tokens += n;
    }
    w.chunk = r->d->batch_tokens > 0 ? r->d->batch_tokens : exc_step_tokens(r->m);
    w.slots = wanted_slots(r, w.capacity);
    EXC_TRY(exc_room_choose(ctx, r->m, &w, &room));
    r->slots = room.slots;
    r->step_tokens = room.step_tokens;
    EXC_TRY(exc_session_get(ctx, r->m, &room, &r->s));
    int64_t *all = exc_alloc(ctx, (size_t)r->slots, sizeof *all, "slot sizes");
    if (!all) return EXC_ERR_MEMORY;
    for (int64_t i = 0; i < r->slots; i++) all[i] = w.capacity;
    exc_status st = exc_session_reset(r->s, r->slots, all);
    exc_release(all);
    return st;
}

#define GET(field, count)                                                                                    \
    do {                                                                                                     \
        r->field = exc_alloc(r->ctx, (size_t)(count), sizeof *r->field, "buffers of a run");                 \
        if (!r->field) return EXC_ERR_MEMORY;                                                                \
    } while (0)

#define GET_THERE(field, count)                                                                              \
    do {                                                                                                     \
        void *there_;                                                                                        \
        EXC_TRY(exc_device_alloc(r->ctx, (size_t)(count), sizeof *r->field, "buffers of a run", &there_));   \
        r->field = there_;                                                                                   \
    } while (0)

static exc_status get_buffers(run *r) {
    const exc_shape *s = &r->m->atlas->shape;
    int64_t B = r->slots, T = r->step_tokens;
    GET(prompt, B);
    GET(slot, B);
    GET(begin, B + 1);
    GET(first, B);
    GET(tokens, T);
    GET(observe, T);
    GET(token, B);
    GET(random, B);
    if (r->d->max_new > 0 || r->d->first_logits) GET_THERE(logits, B * s->vocab);
    if (r->d->hidden_last) GET_THERE(hidden_last, B * (s->layers + 1) * s->hidden);
    if (r->d->hidden) GET_THERE(hidden, (s->layers + 1) * T * s->hidden);
    if (r->d->routing) {
        GET_THERE(router_ids, s->moe_layers * T * s->top_k);
        GET_THERE(router_weights, s->moe_layers * T * s->top_k);
    }
    for (int64_t i = 0; i < B; i++) r->prompt[i] = -1;
    return EXC_OK;
}

static void release_buffers(run *r) {
    void *here[] = {r->prompt, r->slot, r->begin, r->first, r->tokens, r->observe, r->token, r->random};
    void *there[] = {r->logits, r->hidden_last, r->hidden, r->router_ids, r->router_weights};
    for (size_t i = 0; i < EXC_COUNT(here); i++) exc_release(here[i]);
    for (size_t i = 0; i < EXC_COUNT(there); i++) exc_device_release(r->ctx, there[i]);
}

/* ------------------------------------------------------------------------------------------------------------
 * steps */

static bool ends(const run *r, int32_t token) {
    if (r->d->ignore_eos) return false;
    for (int i = 0; i < r->m->atlas->shape.n_eos; i++)
        if (r->m->atlas->shape.eos[i] == token) return true;
    return false;
}

static void finish(run *r, int64_t slot) {
    exc_session_forget(r->s, slot);
    r->prompt[slot] = -1;
    r->finished++;
}

/* draws the next token of every sequence of the step from logits [sequences,V] */
static exc_status draw(run *r, int64_t sequences) {
    for (int64_t i = 0; i < sequences; i++) {
        int64_t prompt = r->prompt[r->slot[i]];
        r->random[i] = r->d->temperature > 0
                           ? exc_random_unit(r->d->seed, (uint64_t)prompt, (uint64_t)r->replies[prompt].count)
                           : 0.0;
    }
    const exc_draw d = {.logits = r->logits,
                        .rows = sequences,
                        .temperature = r->d->temperature,
                        .top_p = r->d->top_p > 0 ? r->d->top_p : 1,
                        .random01 = r->random};
    return exc_session_draw(r->s, &d, r->token);
}

/* what sequence i of the step drew: ends, is full, or lives on */
static void accept(run *r, int64_t i) {
    int64_t slot = r->slot[i], prompt = r->prompt[slot];
    exc_reply *reply = &r->replies[prompt];
    bool first = reply->count == 0;
    if (ends(r, r->token[i])) {
        reply->stopped = 1;
    } else {
        reply->tokens[reply->count++] = r->token[i];
        if (reply->count < reply_limit(r, prompt)) {
            r->live += first;
            return;
        }
    }
    r->live -= !first;
    finish(r, slot);
}

/* puts the next prompts into one step, whole ones where they fit; returns the number of sequences */
static int64_t gather(run *r) {
    int64_t rows = 0, n = 0, slot = 0;
    while (r->next < r->p->count && n < r->slots) {
        int64_t length = prompt_length(r->p, r->next), left = length - r->fed, room = r->step_tokens - rows;
        if (room == 0 || (left > room && rows > 0)) break;
        if (r->partial < 0) {
            while (slot < r->slots && r->prompt[slot] >= 0) slot++;
            if (slot == r->slots) break;
            r->partial = slot;
            r->prompt[slot] = r->next;
        }
        int64_t take = least(left, room), from = r->p->begin[r->next] + r->fed;
        memcpy(r->tokens + rows, r->p->tokens + from, (size_t)take * sizeof *r->tokens);
        const int32_t *wanted = r->d->prefill_observe ? r->d->prefill_observe[r->next] : NULL;
        for (int64_t t = 0; t < take; t++)
            r->observe[rows + t] = !wanted || wanted[r->fed + t] ? (int32_t)r->next : -1;
        r->slot[n] = (int32_t)r->partial;
        r->begin[n] = rows;
        r->first[n++] = r->fed;
        rows += take;
        r->fed += take;
        if (r->fed < length) break;
        r->next++;
        r->fed = 0;
        r->partial = -1;
    }
    r->begin[n] = rows;
    return n;
}

static exc_status deliver(run *r, const exc_step *step, int64_t i) {
    const exc_shape *s = &r->m->atlas->shape;
    int64_t prompt = r->prompt[r->slot[i]], rows = r->begin[i + 1] - r->begin[i];
    if (r->d->visit) {
        exc_piece piece = {.session = r->s,
                           .step = step,
                           .step_rows = r->begin[step->sequences],
                           .row = r->begin[i],
                           .prompt = prompt,
                           .first = r->first[i],
                           .rows = rows};
        EXC_TRY(r->d->visit(r->ctx, r->d->user, &piece));
    }
    if (r->first[i] + rows < prompt_length(r->p, prompt)) return EXC_OK;
    size_t stack = (size_t)((s->layers + 1) * s->hidden);
    if (r->d->hidden_last)
        EXC_TRY(exc_device_get(r->ctx, r->d->hidden_last + (size_t)prompt * stack, r->hidden_last + (size_t)i * stack,
                               stack * sizeof(float)));
    if (r->d->first_logits)
        EXC_TRY(exc_device_get(r->ctx, r->d->first_logits + prompt * s->vocab, r->logits + i * s->vocab,
                               (size_t)s->vocab * sizeof(float)));
    if (r->d->max_new > 0)
        accept(r, i);
    else
        finish(r, r->slot[i]);
    return EXC_OK;
}

static exc_status prefill(run *r) {
    int64_t n = gather(r);
    exc_step step = {.tokens = r->tokens,
                     .slot = r->slot,
                     .begin = r->begin,
                     .sequences = n,
                     .logits = r->logits,
                     .hidden = r->hidden,
                     .hidden_last = r->hidden_last,
                     .router_ids = r->router_ids,
                     .router_weights = r->router_weights,
                     .sums = r->d->prefill_sums,
                     .observe = r->observe};
    EXC_TRY(exc_session_step(r->s, &step));
    EXC_TRY(r->d->max_new > 0 ? draw(r, n) : exc_session_check(r->s));
    for (int64_t i = 0; i < n; i++) EXC_TRY(deliver(r, &step, i));
    return EXC_OK;
}

static exc_status decode(run *r) {
    int64_t n = 0;
    for (int64_t slot = 0; slot < r->slots; slot++) {
        int64_t prompt = r->prompt[slot];
        if (prompt < 0 || slot == r->partial) continue;
        r->slot[n] = (int32_t)slot;
        r->tokens[n] = r->replies[prompt].tokens[r->replies[prompt].count - 1];
        r->observe[n] = (int32_t)prompt;
        r->begin[n] = n;
        n++;
    }
    r->begin[n] = n;
    exc_step step = {.tokens = r->tokens,
                     .slot = r->slot,
                     .begin = r->begin,
                     .sequences = n,
                     .logits = r->logits,
                     .sums = r->d->observe ? r->d->decode_sums : NULL,
                     .observe = r->observe};
    EXC_TRY(exc_session_step(r->s, &step));
    EXC_TRY(draw(r, n));
    for (int64_t i = 0; i < n; i++) accept(r, i);
    return EXC_OK;
}

static exc_status loop(run *r) {
    while (r->finished < r->p->count) {
        bool pending = r->next < r->p->count;
        if (pending && (r->partial >= 0 || r->live == 0 || r->slots - r->live >= (r->slots + 3) / 4))
            EXC_TRY(prefill(r));
        else
            EXC_TRY(decode(r));
        EXC_TRY(exc_progress(r->ctx, r->d->step ? r->d->step : "generate", (uint64_t)r->finished,
                             (uint64_t)r->p->count, "prompts"));
    }
    return EXC_OK;
}

static exc_status make_replies(run *r) {
    r->replies = exc_zalloc(r->ctx, (size_t)most(r->p->count, 1), sizeof *r->replies, "replies");
    if (!r->replies) return EXC_ERR_MEMORY;
    for (int64_t i = 0; i < r->p->count && r->d->max_new > 0; i++) {
        r->replies[i].tokens =
            exc_alloc(r->ctx, (size_t)reply_limit(r, i), sizeof *r->replies[i].tokens, "a reply");
        if (!r->replies[i].tokens) return EXC_ERR_MEMORY;
    }
    return EXC_OK;
}

exc_status exc_decode_run(exc_ctx *ctx, exc_model *m, const exc_prompts *p, const exc_decode *d,
                          exc_reply **replies) {
    run r = {.ctx = ctx, .m = m, .p = p, .d = d, .partial = -1};
    exc_status st;
    if (replies) *replies = NULL;
    EXC_TRY(exc_prompts_check(ctx, m, p, d->ignore_eos && d->max_new > 0 ? d->max_new - 1 : 0));
    EXC_GOTO(done, make_replies(&r));
    if (p->count) {
        EXC_GOTO(done, get_session(&r));
        EXC_GOTO(done, get_buffers(&r));
        EXC_GOTO(done, loop(&r));
    }
    st = EXC_OK;
done:
    release_buffers(&r);
    if (st || !replies)
        exc_replies_free(r.replies, p->count);
    else
        *replies = r.replies;
    return st;
}

void exc_replies_free(exc_reply *r, int64_t n) {
    for (int64_t i = 0; r && i < n; i++) exc_release(r[i].tokens);
    exc_release(r);
}

/* ---------------------------------------------------------------------------------------------- logits of
 * all rows */

typedef struct logits_run {
    const exc_prompts *p;
    int64_t vocab, rows; /* rows the buffer holds */
    float *logits;
    exc_logits_fn visit;
    void *user;
} logits_run;

static exc_status visit_logits(exc_ctx *ctx, void *user, const exc_piece *piece) {
    logits_run *l = user;
    for (int64_t done = 0, n; done < piece->rows; done += n) {
        n = least(piece->rows - done, l->rows);
        EXC_TRY(exc_session_logits(piece->session, piece->row + done, n, l->logits));
        EXC_TRY(l->visit(ctx, l->user, piece->prompt, piece->first + done, n,
                         l->p->tokens + l->p->begin[piece->prompt], l->logits));
    }
    return EXC_OK;
}

exc_status exc_logits_run(exc_ctx *ctx, exc_model *m, const exc_prompts *p, const char *step,
                          exc_logits_fn visit, void *user) {
    int64_t vocab = m->atlas->shape.vocab;
    logits_run l = {
        .p = p, .vocab = vocab, .rows = most(PIECE_BYTES / (vocab * 4), 1), .visit = visit, .user = user};
    void *logits;
    EXC_TRY(exc_device_alloc(ctx, (size_t)(l.rows * vocab), sizeof(float), "logits", &logits));
    l.logits = logits;
    exc_decode d = {.step = step, .visit = visit_logits, .user = &l};
    exc_status st = exc_decode_run(ctx, m, p, &d, NULL);
    exc_device_release(ctx, logits);
    return st;
}
