/* window.c - which layers' weights are in memory.
 *
 * A model within its budget is resident: every layer has a place of its own. Memory that was not touched before comes at half a
 * gigabyte a second where a hypervisor has to find it. So the first pass reads layers in passing, a few experts at a time, into a
 * part of one place that stays in cache, and the second pass fills the places: a first token, or a job of one pass, does not wait
 * for room that it does not need. A device's places are filled when the model is opened. A larger model is streamed: its layers
 * take turns in one or two places, each filled when a pass reaches it. A thread with a context of its own does that, so that with
 * two places the next layer is read and packed while ops run on this one; an error it finds is told by the call that needs the
 * layer. Places are as large as the largest layer. A model may give places up later, when states or another model need the
 * memory. Output sums want one matrix of each layer only: a place may hold just that. */
#include <pthread.h>
#include <signal.h>
#include <string.h>

#include "session.h"

#define FILL_BYTES ((size_t)1 << 20) /* scratch of the ops that fill a layer, on a device; they get more when they ask */

enum { IDLE, BUSY, READY, QUIT };

/* the thread that fills places, and what it is asked for */
struct exc_ahead {
    exc_loader loader;        /* its context is the thread's own: two threads do not share a queue */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int state;
    exc_place *place;
    int64_t layer;
    exc_extent extent;
    exc_status status;
};

/* ------------------------------------------------------------------------------------------------------- the thread */

static void *work(void *arg) {
    struct exc_ahead *a = arg;
    pthread_mutex_lock(&a->lock);
    for (;;) {
        while (a->state != BUSY && a->state != QUIT) pthread_cond_wait(&a->turn, &a->lock);
        if (a->state == QUIT) break;
        pthread_mutex_unlock(&a->lock);
        exc_clear(a->loader.ctx);
        exc_status st = exc_layer_fill(&a->loader, a->place, a->layer, a->extent);
        if (st == EXC_OK) st = exc_device_sync(a->loader.ctx);
        pthread_mutex_lock(&a->lock);
        a->status = st;
        if (a->state == BUSY) a->state = READY;
        pthread_cond_broadcast(&a->turn);
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

static void ask(struct exc_ahead *a, exc_place *p, int64_t layer, exc_extent extent) {
    p->layer = -1;
    pthread_mutex_lock(&a->lock);
    a->place = p;
    a->layer = layer;
    a->extent = extent;
    a->state = BUSY;
    pthread_cond_broadcast(&a->turn);
    pthread_mutex_unlock(&a->lock);
}

/* waits until the thread is idle; a place that could not be filled stays empty */
static exc_status settle(exc_loaded *l) {
    struct exc_ahead *a = l->ahead;
    pthread_mutex_lock(&a->lock);
    while (a->state == BUSY) pthread_cond_wait(&a->turn, &a->lock);
    exc_status st = a->state == READY ? a->status : EXC_OK;
    bool filled = a->state == READY && st == EXC_OK;
    a->state = IDLE;
    pthread_mutex_unlock(&a->lock);
    if (!filled) return st;
    a->place->layer = a->layer;
    a->place->extent = a->extent;
    l->fills += a->extent == EXC_LAYER_WHOLE;
    return EXC_OK;
}

/* of the thread's context; on the CPU every context counts that for two */
static uint64_t scratch(const exc_ctx *ctx) { return ctx->module ? FILL_BYTES : 0; }

/* a context like `of` for work beside its: no events, no ranks, a stream of its own */
static exc_status second_context(const exc_ctx *of, exc_ctx **out) {
    exc_ctx_options opt = of->opt;
    opt.on_event = NULL;
    opt.ranks = NULL;
    opt.stream = NULL;
    opt.backend = of->backend;
    opt.threads = of->queue.workers;
    opt.device = of->queue.device;
    opt.work_bytes = FILL_BYTES;
    return exc_ctx_create(&opt, out);
}

static void stop(exc_loaded *l) {
    struct exc_ahead *a = l->ahead;
    if (!a) return;
    settle(l);
    pthread_mutex_lock(&a->lock);
    a->state = QUIT;
    pthread_cond_broadcast(&a->turn);
    pthread_mutex_unlock(&a->lock);
    pthread_join(a->thread, NULL);
    pthread_mutex_destroy(&a->lock);
    pthread_cond_destroy(&a->turn);
    exc_loader_release(&a->loader);
    exc_memory_give(a->loader.m->ctx, scratch(a->loader.ctx));
    exc_ctx_free(a->loader.ctx);
    exc_release(a);
    l->ahead = NULL;
}

static exc_status start(exc_ctx *ctx, exc_model *m) {
    struct exc_ahead *a = exc_zalloc(ctx, 1, sizeof *a, "reader of layers");
    if (!a) return EXC_ERR_MEMORY;
    exc_status st = second_context(ctx, &a->loader.ctx);
    a->loader.m = m;
    a->loader.a = m->atlas;
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->turn, NULL);
    sigset_t all, before; /* signals belong to the caller's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool runs = st == EXC_OK && !pthread_create(&a->thread, NULL, work, a);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (runs) {
        exc_memory_take(ctx, scratch(ctx));
        m->loaded->ahead = a;
        return EXC_OK;
    }
    exc_fail(ctx, EXC_ERR_MEMORY, "%s: the thread that reads its layers could not be started: %s", m->dir,
             a->loader.ctx && *exc_ctx_error(a->loader.ctx) ? exc_ctx_error(a->loader.ctx) : "no memory");
    exc_ctx_free(a->loader.ctx);
    exc_release(a);
    return EXC_ERR_MEMORY;
}

/* -------------------------------------------------------------------------------------------------------- places */

static void drop_places(exc_ctx *ctx, exc_model *m) {
    exc_loaded *l = m->loaded;
    for (int64_t i = 0; l->place && i < l->places; i++) exc_layer_drop(ctx, m, &l->place[i].slab);
    exc_release(l->place);
    l->place = NULL;
    l->places = 0;
}

uint64_t exc_window_bytes(const exc_model *m, int64_t places) {
    const exc_loaded *l = m->loaded;
    return l->ends_bytes + (places < l->layers ? (uint64_t)places * l->largest + scratch(m->ctx) : l->all_bytes);
}

/* Memory of a device is not dear to touch. What a plan or a function makes of weights is made once. */
bool exc_window_waits(const exc_model *m) {
    bool edited = m->has_lens && !m->is_virtual;
    return exc_model_streamed(m) || (!m->ctx->module && !edited && !m->made.rows);
}

static exc_status wait_for_passes(exc_ctx *ctx, exc_model *m) {
    exc_loaded *l = m->loaded;
    l->loader = exc_zalloc(ctx, 1, sizeof *l->loader, "reader of layers");
    if (!l->loader) return EXC_ERR_MEMORY;
    *l->loader = (exc_loader){.ctx = ctx, .m = m, .a = m->atlas};
    l->seen = 0;
    l->passing = (exc_place){.slab = l->place[l->largest_layer].slab, .layer = -1};
    return EXC_OK;
}

static void drop_loader(exc_loaded *l) {
    if (l->loader) exc_loader_release(l->loader);
    exc_release(l->loader);
    l->loader = NULL;
}

exc_status exc_window_open(exc_ctx *ctx, exc_model *m, int64_t places) {
    exc_loaded *l = m->loaded;
    l->place = exc_zalloc(ctx, (size_t)places, sizeof *l->place, "weights");
    if (!l->place) return EXC_ERR_MEMORY;
    l->places = places;
    for (int64_t i = 0; i < places; i++) l->place[i].layer = -1;
    for (int64_t i = 0; i < places; i++) EXC_TRY(exc_layer_room(ctx, m, places < l->layers ? -1 : i, &l->place[i].slab));
    if (places < l->layers) return start(ctx, m);
    return exc_window_waits(m) ? wait_for_passes(ctx, m) : EXC_OK;
}

bool exc_window_narrow(exc_ctx *ctx, exc_model *m, exc_status *st) {
    exc_loaded *l = m->loaded;
    int64_t fewer = l->places > 2 ? 2 : 1;
    *st = EXC_OK;
    if (fewer >= l->places) return false;
    exc_window_close(ctx, m);
    *st = exc_window_open(ctx, m, fewer);
    if (*st != EXC_OK) drop_places(ctx, m);
    return true;
}

exc_status exc_windows_agree(exc_ctx *ctx) {
    exc_status st = EXC_OK;
    for (exc_model *m = exc_ranks_count(ctx) > 1 ? ctx->models : NULL; m; m = m->next) {
        if (!m->loaded || !m->loaded->place) continue;
        int64_t least = m->loaded->places;
        EXC_TRY(exc_ranks_least(ctx, "places of layers", &least, 1));
        while (st == EXC_OK && m->loaded->places > least && exc_window_narrow(ctx, m, &st)) {}
        EXC_TRY(exc_ranks_agree(ctx, "places of layers", st));
    }
    return EXC_OK;
}

void exc_window_close(exc_ctx *ctx, exc_model *m) {
    stop(m->loaded);
    drop_loader(m->loaded);
    drop_places(ctx, m);
    m->loaded->current = 0;
}

/* -------------------------------------------------------------------------------------------------------- layers */

static bool holds(const exc_place *p, int64_t layer, exc_extent extent) {
    return p->layer == layer && (p->extent == EXC_LAYER_WHOLE || p->extent == extent);
}

static exc_status turn(exc_ctx *ctx, const exc_model *m, int64_t layer, exc_extent extent) {
    exc_loaded *l = m->loaded;
    if (holds(&l->place[l->current], layer, extent)) return EXC_OK;
    EXC_TRY(exc_device_sync(ctx)); /* ops that were started may still read the place that is filled next */
    settle(l); /* a layer that failed is tried again below, and tells why */
    int64_t other = l->places > 1 ? 1 - l->current : 0;
    if (!holds(&l->place[other], layer, extent)) {
        ask(l->ahead, &l->place[other], layer, extent);
        exc_status st = settle(l);
        if (st != EXC_OK) return exc_fail(ctx, st, "%s", exc_ctx_error(l->ahead->loader.ctx));
    }
    l->current = other;
    if (l->places > 1 && layer + 1 < l->layers) ask(l->ahead, &l->place[1 - other], layer + 1, extent);
    return exc_progress(ctx, "layers", (uint64_t)layer, (uint64_t)l->layers, "layers");
}

/* Of a resident model: the layer's own place, or the first time the one that all take turns in, unless that would be read again
 * for every chunk of the step. */
static exc_status come(exc_ctx *ctx, exc_loaded *l, int64_t layer, int64_t chunks, exc_place **out) {
    if (chunks > 1 && l->seen < l->layers) l->seen = l->layers;
    exc_place *p = *out = l->seen == layer ? &l->passing : &l->place[layer];
    if (l->seen < l->layers && l->seen != layer) l->seen = l->layers; /* a pass that was broken off is not taken up */
    l->passing.layer = -1;
    if (p->layer == layer) return EXC_OK;
    EXC_TRY(exc_layer_fill(l->loader, p, layer, EXC_LAYER_WHOLE));
    p->layer = layer;
    p->extent = EXC_LAYER_WHOLE;
    l->fills++;
    return exc_progress(ctx, "layers", (uint64_t)layer, (uint64_t)l->layers, "layers");
}

/* Weights that one rank refuses hold all of them up; so that they go on alike, none has read the layer then. */
static exc_status come_together(exc_ctx *ctx, exc_loaded *l, int64_t layer, int64_t chunks, const exc_layer **out) {
    exc_place *p;
    exc_status st = exc_ranks_agree(ctx, "layer", come(ctx, l, layer, chunks, &p));
    if (st != EXC_OK) {
        p->layer = -1;
        return st;
    }
    *out = &p->y;
    if (l->seen == layer || l->seen == l->layers + layer) l->seen++;
    if (l->seen == 2 * l->layers) drop_loader(l);
    return EXC_OK;
}

static exc_status lost(exc_ctx *ctx, const exc_model *m, int64_t layer) {
    return exc_fail(ctx, EXC_ERR_MEMORY, "%s: layer %lld: expected memory for its weights, found none since an earlier call failed", m->dir,
                    (long long)layer);
}

exc_status exc_layer_at(exc_ctx *ctx, const exc_model *m, int64_t layer, int64_t chunks, const exc_layer **out) {
    exc_loaded *l = m->loaded;
    *out = NULL;
    if (l->loader) return come_together(ctx, l, layer, chunks, out);
    if (l->ahead) {
        exc_status st = turn(ctx, m, layer, EXC_LAYER_WHOLE);
        *out = &l->place[l->current].y;
        return exc_ranks_agree(ctx, "layer", st); /* ranks pass through the layers together */
    }
    if (l->places < l->layers) return lost(ctx, m, layer);
    *out = &l->place[layer].y;
    return EXC_OK;
}

exc_status exc_layer_turn(const exc_model *m, int64_t first) {
    exc_loaded *l = m->loaded;
    l->turn = -1;
    EXC_TRY(exc_feed_fill_turn(l->loader, &l->passing.y, l->passing.layer, first, l->passing.extent));
    l->turn = first;
    return EXC_OK;
}

/* before a layer has its own place, only the matrices that are asked for are read */
static exc_status look(const exc_model *m, int64_t layer, int64_t expert, const exc_layer **out) {
    exc_loaded *l = m->loaded;
    bool kept = l->seen > l->layers; /* the place that layers pass through has become one of these */
    exc_place *p = kept || l->place[layer].layer == layer ? &l->place[layer] : &l->passing;
    exc_extent extent = kept ? EXC_LAYER_WHOLE : EXC_LAYER_DOWN;
    if (!holds(p, layer, extent) || (p == &l->passing && p->extent != extent)) {
        p->layer = -1;
        EXC_TRY(exc_layer_fill(l->loader, p, layer, extent));
        p->layer = layer;
        p->extent = extent;
        l->turn = -1;
    }
    int64_t first = p->y.turn ? expert - expert % p->y.turn : -1;
    if (first != l->turn && first >= 0) EXC_TRY(exc_layer_turn(m, first));
    *out = &p->y;
    return EXC_OK;
}

exc_status exc_layer_down(exc_ctx *ctx, const exc_model *m, int64_t layer, int64_t expert, const exc_layer **out) {
    exc_loaded *l = m->loaded;
    *out = NULL;
    if (l->loader) return look(m, layer, expert, out);
    if (!l->ahead && l->places < l->layers) return lost(ctx, m, layer);
    exc_status st = l->ahead ? turn(ctx, m, layer, EXC_LAYER_DOWN) : EXC_OK;
    *out = &l->place[l->ahead ? l->current : layer].y;
    return st;
}
