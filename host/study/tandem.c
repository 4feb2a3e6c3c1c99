/* tandem.c - two models over the same tokens, step by step, compared where they stand.
 *
 * KL and routing agreement need both models' answers to the same position. Keeping all logits of one model
 * would take tokens x vocabulary x 4 bytes (a thousand lines of a 150k vocabulary: 12 GB), so both models
 * take the same step and the logits of that step are made and compared in small pieces: memory is bounded by
 * two sessions and two pieces whatever the text. Lines are packed whole into steps; one longer than a step
 * goes through in parts over the cache. Positions of padding do not exist: batches are ragged. */
#include <math.h>
#include <string.h>

#include "result.h"

#define PIECE_BYTES ((int64_t)8 << 20) /* logits of one model made at once */
#define MAX_EXPERTS 1024

typedef struct tandem {
    exc_ctx *ctx;
    exc_model *model[2]; /* before (may be NULL), after */
    exc_session *session[2];
    const exc_prompts *p;
    exc_unit *units;
    bool last_only, routing;
    int64_t vocab, layers, top_k, step_tokens, slots, piece;
    int32_t *tokens;                            /* [step_tokens] */
    int32_t *slot;                              /* [slots] */
    int64_t *begin, *capacity, *prompt, *first; /* [slots+1]; token of its prompt a sequence begins with */
    void *logits[2];                            /* [piece,V], where ops run */
    int32_t *ids[2];                            /* [M,step_tokens,K] */
    void *ids_there[2];                         /* the same where ops run, on a device */
    int32_t *next;                              /* [piece] */
    double *kl, *nll[2];                        /* [piece] */
    uint8_t *same_top, *follows; /* [piece] equal most likely token; the position has a successor */
    int64_t *owner;              /* [step_tokens] sequence of the row */
} tandem;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static exc_status fits(exc_ctx *ctx, const exc_model *a, const exc_model *b) {
    const exc_shape *x = &a->atlas->shape, *y = &b->atlas->shape;
    if (x->vocab != y->vocab)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: vocab_size: expected %lld as in %s (to be compared token by token), found %lld",
                        a->dir, (long long)y->vocab, b->dir, (long long)x->vocab);
    return EXC_OK;
}

static bool same_routers(const exc_model *a, const exc_model *b) {
    const exc_shape *x = &a->atlas->shape, *y = &b->atlas->shape;
    return x->layers == y->layers && x->moe_layers == y->moe_layers && x->moe_layers > 0 &&
           x->experts == y->experts && x->top_k == y->top_k && x->experts <= MAX_EXPERTS &&
           !memcmp(x->is_moe, y->is_moe, (size_t)x->layers);
}

#define GET(pointer, count)                                                                                  \
    do {                                                                                                     \
        (pointer) = exc_alloc(t->ctx, (size_t)(count), sizeof *(pointer), "comparison of two models");       \
        if (!(pointer)) return EXC_ERR_MEMORY;                                                               \
    } while (0)

/* whether sessions of one size for both models fit, on every rank */
static exc_status both_fit(tandem *t, const exc_room *room, const exc_wish *w, bool *fit) {
    uint64_t need = 0;
    for (int m = 0; m < 2; m++)
        if (t->model[m])
            need += exc_session_measure(t->model[m], room) + w->held + (uint64_t)room->slots * w->slot_bytes +
                    (uint64_t)room->step_tokens * w->token_bytes;
    int64_t fits = need <= exc_memory_left(t->ctx);
    exc_status st = exc_ranks_least(t->ctx, "room for two models", &fits, 1);
    *fit = fits;
    return st;
}

/* Resident models take steps of one chunk where that fits. Else, and where a model is streamed, steps are as large as both models'
 * memory lets them be; the first one leaves to the second what it takes itself. */
static exc_status choose_rooms(tandem *t, int64_t total, int64_t longest, exc_room room[2]) {
    const exc_model *first = t->model[0], *second = t->model[1];
    bool wide = exc_model_streamed(second) || (first && exc_model_streamed(first));
    uint64_t ids = t->routing ? (uint64_t)(t->layers * t->top_k) * sizeof(int32_t) : 0;
    exc_wish w = {.prompts = t->p->count, .slots = t->slots, .longest = longest, .capacity = longest, .tokens = total,
                  .chunk = t->step_tokens, .slot_bytes = 48, .token_bytes = 12 + ids, .once = true, .whole = true,
                  .held = (uint64_t)t->piece * (uint64_t)(t->vocab * 4 + 32)};
    for (int m = 0; m < 2; m++) { /* what earlier runs left is in the way of the two sessions below */
        if (!t->model[m]) continue;
        exc_session_close(t->model[m]->spare);
        t->model[m]->spare = NULL;
    }
    room[0] = room[1] = (exc_room){.slots = t->slots, .cache_tokens = most(t->step_tokens, longest), .step_tokens = t->step_tokens};
    bool fit = false;
    if (!wide) EXC_TRY(both_fit(t, room, &w, &fit));
    if (fit) return EXC_OK;
    w.slots = least(t->p->count, t->last_only ? t->piece : t->p->count);
    if (first) w.held *= 2; /* the second model's, too */
    for (int m = 0; m < 2; m++) {
        if (!t->model[m]) continue;
        w.sessions = 2 - m;
        EXC_TRY(exc_room_choose(t->ctx, t->model[m], &w, &room[m]));
        EXC_TRY(exc_session_open(t->ctx, t->model[m], &room[m], &t->session[m]));
        w.slots = t->slots = room[m].slots;
        t->step_tokens = room[m].step_tokens;
    }
    return EXC_OK;
}

static exc_status prepare(tandem *t) {
    const exc_shape *s = &t->model[1]->atlas->shape;
    int64_t total = 0, longest = 1;
    exc_room room[2];
    for (int64_t i = 0; i < t->p->count; i++) {
        int64_t n = t->p->begin[i + 1] - t->p->begin[i];
        total += n;
        longest = most(longest, n);
    }
    total = most(total, 1);
    t->vocab = s->vocab;
    t->layers = s->moe_layers;
    t->top_k = s->top_k;
    if (t->step_tokens <= 0) t->step_tokens = exc_step_tokens(t->model[1]);
    t->step_tokens = least(t->step_tokens, total);
    t->piece = least(most(PIECE_BYTES / (t->vocab * 4), 1), total);
    t->slots = least(most(t->p->count, 1), least(t->step_tokens, t->last_only ? t->piece : t->step_tokens));
    EXC_TRY(choose_rooms(t, total, longest, room));
    t->piece = least(t->piece, t->step_tokens);
    for (int m = 0; m < 2; m++) {
        if (!t->model[m]) continue;
        if (!t->session[m]) EXC_TRY(exc_session_open(t->ctx, t->model[m], &room[m], &t->session[m]));
        EXC_TRY(exc_device_alloc(t->ctx, (size_t)(t->piece * t->vocab), sizeof(float), "logits to compare", &t->logits[m]));
        GET(t->nll[m], t->piece);
        if (!t->routing) continue;
        GET(t->ids[m], t->layers * t->step_tokens * t->top_k);
        EXC_TRY(exc_device_mirror(t->ctx, (size_t)(t->layers * t->step_tokens * t->top_k), sizeof *t->ids[m], "routes to compare",
                                  &t->ids_there[m]));
    }
    GET(t->tokens, t->step_tokens);
    GET(t->owner, t->step_tokens);
    GET(t->slot, t->slots);
    GET(t->begin, t->slots + 1);
    GET(t->capacity, t->slots);
    GET(t->prompt, t->slots);
    GET(t->first, t->slots);
    GET(t->next, t->piece);
    GET(t->kl, t->piece);
    GET(t->same_top, t->piece);
    GET(t->follows, t->piece);
    return EXC_OK;
}

static void release(tandem *t) {
    for (int m = 0; m < 2; m++) {
        exc_session_close(t->session[m]);
        exc_device_release(t->ctx, t->logits[m]);
        exc_device_release(t->ctx, t->ids_there[m]);
        exc_release(t->nll[m]);
        exc_release(t->ids[m]);
    }
    void *all[] = {t->tokens, t->owner, t->slot, t->begin,    t->capacity, t->prompt,
                   t->first,  t->next,  t->kl,   t->same_top, t->follows};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_release(all[i]);
}

static void count_routes(const tandem *t, int64_t rows) {
    for (int64_t layer = 0; layer < t->layers; layer++) {
        for (int64_t r = 0; r < rows; r++) {
            size_t at = (size_t)((layer * rows + r) * t->top_k);
            const int32_t *a = t->ids[0] + at, *b = t->ids[1] + at;
            bool same = !memcmp(a, b, (size_t)t->top_k * sizeof *a);
            if (!same) { /* the same experts in another order are the same experts */
                uint8_t in[MAX_EXPERTS / 8] = {0};
                same = true;
                for (int64_t j = 0; j < t->top_k; j++) in[a[j] / 8] |= (uint8_t)(1 << a[j] % 8);
                for (int64_t j = 0; j < t->top_k && same; j++) same = in[b[j] / 8] >> b[j] % 8 & 1;
            }
            exc_unit *u = &t->units[t->prompt[t->owner[r]]];
            u->routes++;
            u->same_routes += same;
        }
    }
}

/* `count` rows of logits lie in t->logits: of rows first.. of the step, or (ends) of the last row of each
 * sequence */
static exc_status judge_rows(tandem *t, int64_t first, int64_t count, bool ends) {
    const exc_prompts *p = t->p;
    for (int64_t i = 0; i < count; i++) {
        int64_t s = ends ? i : t->owner[first + i], row = ends ? t->begin[i + 1] - 1 : first + i;
        int64_t at = p->begin[t->prompt[s]] + t->first[s] + row - t->begin[s] + 1;
        t->follows[i] = at < p->begin[t->prompt[s] + 1];
        t->next[i] =
            t->follows[i] ? p->tokens[at] : 0; /* the op wants ids; the answer to this one is ignored */
    }
    const float *before = t->model[0] ? t->logits[0] : t->logits[1];
    struct exc_compare_args args = {.p = before,
                                    .q = t->model[0] ? t->logits[1] : NULL,
                                    .rows = count,
                                    .vocab = t->vocab,
                                    .next = t->next,
                                    .nll_p = t->model[0] ? t->nll[0] : t->nll[1]};
    if (t->model[0]) {
        args.kl = t->kl;
        args.same_top = t->same_top;
        args.nll_q = t->nll[1];
    }
    exc_dock d = {.ctx = t->ctx, .what = "comparison of two models"};
    exc_dock_in(&d, &args.next, (size_t)count * sizeof *args.next);
    exc_dock_out(&d, &args.kl, (size_t)count * sizeof *args.kl);
    exc_dock_out(&d, &args.same_top, (size_t)count);
    exc_dock_out(&d, &args.nll_p, (size_t)count * sizeof *args.nll_p);
    exc_dock_out(&d, &args.nll_q, (size_t)count * sizeof *args.nll_q);
    EXC_TRY(EXC_DOCK_CALL(&d, compare, &args));
    for (int64_t i = 0; i < count; i++) {
        int64_t s = ends ? i : t->owner[first + i];
        if (ends &&
            t->first[s] + t->begin[s + 1] - t->begin[s] < p->begin[t->prompt[s] + 1] - p->begin[t->prompt[s]])
            continue; /* the middle of a long prompt */
        exc_unit *u = &t->units[t->prompt[s]];
        u->rows++;
        if (t->model[0]) {
            if (!isfinite(t->kl[i]))
                return exc_fail(t->ctx, EXC_ERR_NUMERIC,
                                "%s: prompt %lld: KL: expected a finite number, found %g", t->model[1]->dir,
                                (long long)t->prompt[s] + 1, t->kl[i]);
            u->kl += t->kl[i];
            u->kl_max = fmax(u->kl_max, t->kl[i]);
            u->same_top += t->same_top[i];
        }
        if (!t->follows[i]) continue;
        u->predicted++;
        if (t->model[0]) u->nll[0] += t->nll[0][i];
        u->nll[1] += t->nll[1][i];
    }
    return EXC_OK;
}

/* sequences 0..n-1 of t->slot, t->begin through both models; their slots hold what came before */
static exc_status step(tandem *t, int64_t n) {
    int64_t rows = t->begin[n];
    for (int64_t s = 0; s < n; s++)
        for (int64_t r = t->begin[s]; r < t->begin[s + 1]; r++) t->owner[r] = s;
    for (int m = 0; m < 2; m++) {
        if (!t->model[m]) continue;
        exc_step take = {.tokens = t->tokens,
                         .slot = t->slot,
                         .begin = t->begin,
                         .sequences = n,
                         .logits = t->last_only ? t->logits[m] : NULL,
                         .router_ids = t->routing ? exc_device_side(t->ctx, t->ids[m], t->ids_there[m]) : NULL};
        EXC_TRY(exc_session_step(t->session[m], &take));
        EXC_TRY(exc_session_check(t->session[m]));
        if (t->routing)
            EXC_TRY(exc_device_get(t->ctx, t->ids[m], take.router_ids, (size_t)(t->layers * rows * t->top_k) * sizeof *t->ids[m]));
    }
    if (t->routing) count_routes(t, rows);
    if (t->last_only) return judge_rows(t, 0, n, true);
    for (int64_t done = 0, count; done < rows; done += count) {
        count = least(rows - done, t->piece);
        for (int m = 0; m < 2; m++)
            if (t->model[m]) EXC_TRY(exc_session_logits(t->session[m], done, count, t->logits[m]));
        EXC_TRY(judge_rows(t, done, count, false));
    }
    return EXC_OK;
}

static exc_status reset(tandem *t, int64_t n) {
    for (int m = 0; m < 2; m++)
        if (t->model[m]) EXC_TRY(exc_session_reset(t->session[m], n, t->capacity));
    return EXC_OK;
}

/* one prompt that is longer than a step, in parts */
static exc_status long_prompt(tandem *t, int64_t prompt) {
    const exc_prompts *p = t->p;
    int64_t n = p->begin[prompt + 1] - p->begin[prompt];
    t->capacity[0] = n;
    EXC_TRY(reset(t, 1));
    t->slot[0] = 0;
    t->prompt[0] = prompt;
    t->begin[0] = 0;
    for (int64_t done = 0; done < n; done += t->begin[1]) {
        t->first[0] = done;
        t->begin[1] = least(n - done, t->step_tokens);
        memcpy(t->tokens, p->tokens + p->begin[prompt] + done, (size_t)t->begin[1] * sizeof *t->tokens);
        EXC_TRY(step(t, 1));
    }
    return EXC_OK;
}

static exc_status run(tandem *t, const char *name) {
    const exc_prompts *p = t->p;
    for (int64_t next = 0; next < p->count;) {
        int64_t n = 0, rows = 0;
        for (; next < p->count && n < t->slots; n++, next++) {
            int64_t length = p->begin[next + 1] - p->begin[next];
            if (rows + length > t->step_tokens) break;
            memcpy(t->tokens + rows, p->tokens + p->begin[next], (size_t)length * sizeof *t->tokens);
            t->capacity[n] = length;
            t->slot[n] = (int32_t)n;
            t->prompt[n] = next;
            t->first[n] = 0;
            t->begin[n] = rows;
            rows += length;
        }
        t->begin[n] = rows;
        if (n) {
            EXC_TRY(reset(t, n));
            EXC_TRY(step(t, n));
        } else {
            EXC_TRY(long_prompt(t, next++));
        }
        EXC_TRY(exc_progress(t->ctx, name, (uint64_t)next, (uint64_t)p->count,
                             t->last_only ? "prompts" : "lines"));
    }
    return EXC_OK;
}

exc_status exc_tandem(exc_ctx *ctx, exc_model *before, exc_model *after, const exc_prompts *p, bool last_only,
                      int64_t step_tokens, const char *name, exc_unit *units) {
    memset(units, 0, (size_t)p->count * sizeof *units);
    if (before) EXC_TRY(fits(ctx, before, after));
    EXC_TRY(exc_prompts_check(ctx, after, p, 0));
    if (before) EXC_TRY(exc_prompts_check(ctx, before, p, 0));
    tandem t = {.ctx = ctx,
                .model = {before, after},
                .p = p,
                .units = units,
                .last_only = last_only,
                .step_tokens = step_tokens};
    t.routing = before && !last_only && same_routers(before, after);
    exc_status st = prepare(&t);
    if (st == EXC_OK) st = run(&t, name);
    release(&t);
    return st;
}
