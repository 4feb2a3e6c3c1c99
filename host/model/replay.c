/* replay.c - steps that look like an earlier one are replayed from a graph, on devices.
 *
 * Decode runs the same few hundred launches again and again; only what lies in the step's block of inputs changes, and
 * that is put to the same address before. A step qualifies when every sequence brings one row and has begun before, and
 * the model is resident. What its launches depend on beside those inputs is its mark: number
 * of rows, the bound of lengths (a power of two, so that it rarely changes), the addresses it writes to, the scratch. The
 * first step of a mark is enqueued launch by launch, which also lets the scratch grow; the second is recorded; from then on one
 * call replays it. A few marks are kept, because sequences that end leave fewer rows.
 *
 * Of several ranks all record or replay the same step or none does: one that lacks the graph holds the others up to what it can. */
#include <string.h>

#include "session.h"

#define SHORTEST 256 /* bound of lengths that all shorter ones share */

enum { LAUNCH = 0, RECORD, REPLAY }; /* what is done with a step, ascending */

static int64_t bound_of(int64_t longest) {
    int64_t bound = SHORTEST;
    while (bound < longest) bound *= 2;
    return bound;
}

static bool qualifies(const exc_session *s, const exc_step *t) {
    const exc_whole *w = &s->whole;
    if (!s->ctx->module || w->chunks != 1 || w->rows != t->sequences) return false;
    if (s->m->loaded->places < s->m->loaded->layers) return false;
    for (int64_t i = 0; i < t->sequences; i++)
        if (w->here.length[i] < 2) return false;
    return true;
}

/* compared byte by byte, so holes are zero */
static void mark_step(const exc_session *s, const exc_step *t, exc_mark *m) {
    memset(m, 0, sizeof *m);
    m->work = s->ctx->queue.work;
    m->rows = s->whole.rows;
    if (s->spread) exc_spread_steady(s, &m->dealt);
    m->bound = s->whole.chunk[0].longest;
    m->logits_all = t->logits_all;
    m->logits = t->logits;
    m->hidden = t->hidden;
    m->hidden_last = t->hidden_last;
    m->router_ids = t->router_ids;
    m->router_weights = t->router_weights;
    m->observe = s->whole.there.observe;
    if (t->sums) m->sums = *t->sums;
    m->sums.tokens = NULL; /* the host's own */
}

static exc_graph *find(exc_session *s, const exc_mark *m) {
    for (size_t i = 0; i < EXC_COUNT(s->graph); i++)
        if (s->graph[i].used && !memcmp(&s->graph[i].mark, m, sizeof *m)) return &s->graph[i];
    return NULL;
}

static exc_graph *oldest(exc_session *s) {
    exc_graph *g = &s->graph[0];
    for (size_t i = 1; i < EXC_COUNT(s->graph); i++)
        if (s->graph[i].used < g->used) g = &s->graph[i];
    return g;
}

static exc_status record(exc_session *s, const exc_step *t, exc_graph *g) {
    EXC_TRY(exc_device_record(s->ctx));
    exc_status st = exc_session_run(s, t);
    if (st == EXC_OK) return exc_device_recorded(s->ctx, &g->run);
    exc_device_recorded(s->ctx, NULL);
    return st;
}

/* the graph of the step's mark, *way what can be done with it; NULL: the step does not qualify */
static exc_graph *look_up(exc_session *s, const exc_step *t, int64_t *way) {
    exc_mark mark;
    *way = LAUNCH;
    if (!qualifies(s, t)) return NULL;
    s->whole.chunk[0].longest = bound_of(s->whole.chunk[0].longest);
    mark_step(s, t, &mark);
    exc_graph *g = find(s, &mark);
    if (g) {
        *way = g->run ? REPLAY : RECORD;
    } else {
        g = oldest(s);
        exc_device_forget(s->ctx, g->run);
        *g = (exc_graph){.mark = mark};
    }
    g->used = ++s->turn;
    return g;
}

exc_status exc_replay_step(exc_session *s, const exc_step *t) {
    uint64_t dealt;
    if (s->spread && !exc_spread_steady(s, &dealt)) return exc_session_run(s, t);
    int64_t way;
    exc_graph *g = look_up(s, t, &way);
    EXC_TRY(exc_ranks_least(s->ctx, "a step as a graph", &way, 1));
    if (way == LAUNCH) return exc_session_run(s, t);
    if (way == RECORD) {
        exc_device_forget(s->ctx, g->run);
        g->run = NULL;
        EXC_TRY(record(s, t, g));
    }
    s->replayed++;
    return exc_device_replay(s->ctx, g->run);
}

void exc_replay_close(exc_session *s) {
    for (size_t i = 0; i < EXC_COUNT(s->graph); i++) exc_device_forget(s->ctx, s->graph[i].run);
}
