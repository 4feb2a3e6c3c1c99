/* lenses.c - a model read through a plan: baked (weights are edited while they are loaded) or virtual (outputs of the writers
 * are projected while they are computed, weights untouched).
 *
 * Virtual takes what linearity allows on the output side: y - s R^T (R y) of a writer's output y = W x is (W - s R^T R W) x, and a
 * scale is a scale; a bias is part of the output. Edits of one writer compose when they share a basis: (1 - s1 P)(1 - s2 P) = 1 - (s1 + s2 - s1 s2) P. All other
 * edits (inputs, routers, restored lengths, two bases in one place) are refused here by name: baked does them. */
#include <string.h>

#include "edits.h"

typedef struct writer {
    bool on;
    const float *basis; /* of the compiled plan */
    int64_t rank;
    float *strength, *scale; /* [E] or [1]; scale NULL: ones */
    float *slab;
} writer;

typedef struct lens {
    exc_compiled *c;
    int64_t layers;
    writer *writers; /* [WRITERS, L], roles as in writer_roles; NULL when baked */
} lens;

#define WRITERS 4
static const exc_role writer_roles[WRITERS] = {EXC_ROLE_ATTN_OUT, EXC_ROLE_EXPERT_DOWN, EXC_ROLE_SHARED_DOWN, EXC_ROLE_DENSE_DOWN};

static void release(void *user) {
    lens *l = user;
    if (!l) return;
    for (int64_t i = 0; l->writers && i < WRITERS * l->layers; i++) exc_release(l->writers[i].slab);
    exc_release(l->writers);
    exc_compiled_free(l->c);
    exc_release(l);
}

/* ---------------------------------------------------------------------------------------------------------- baked */

static exc_status bake(exc_ctx *ctx, void *user, const exc_atlas *a, const exc_weight *w, void *data, void *scale) {
    const lens *l = user;
    const void *src = data;
    exc_effect effect;
    (void)a;
    EXC_TRY(exc_compiled_apply(ctx, l->c, &w, 1, &src, &data, scale ? &scale : NULL, &effect));
    if (!effect.overflow) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_NUMERIC, "%s: %s: expected an edit that stays in the range of %s, found infinity", l->c->name, w->tensor->name,
                    exc_dtype_name((exc_dtype)w->dtype));
}

static bool touches(void *user, const exc_weight *w) {
    const lens *l = user;
    return exc_compiled_touches(l->c, w);
}

/* -------------------------------------------------------------------------------------------------------- virtual */

static bool project(void *user, exc_role role, int64_t layer, const float **basis, int64_t *rank, const float **strength,
                    const float **scale) {
    const lens *l = user;
    for (int i = 0; i < WRITERS; i++) {
        const writer *w = &l->writers[i * l->layers + layer];
        if (writer_roles[i] != role || !w->on) continue;
        *basis = w->basis;
        *rank = w->rank;
        *strength = w->strength;
        *scale = w->scale;
        return true;
    }
    return false;
}

static exc_status refuse(exc_ctx *ctx, const exc_compiled *c, const exc_edit_step *s, const char *why) {
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: edits[%lld]: layer %lld, %s: expected an edit that can be virtual, found %s; read the model baked", c->name,
                    (long long)s->edit, (long long)s->layer, exc_role_name(s->role), why);
}

static bool same_basis(const writer *w, const exc_edit_step *s, int64_t hidden) {
    return !w->basis || (w->rank == s->rank && !memcmp(w->basis, s->basis, (size_t)(s->rank * hidden) * sizeof *s->basis));
}

static exc_status compose(exc_ctx *ctx, const lens *l, const exc_edit_step *s, writer *w) {
    if (!w->slab) {
        w->slab = exc_zalloc(ctx, (size_t)(2 * s->n_amount), sizeof *w->slab, "virtual edit");
        if (!w->slab) return EXC_ERR_MEMORY;
        w->strength = w->slab;
        for (int64_t i = 0; i < s->n_amount; i++) w->slab[s->n_amount + i] = 1;
    }
    w->on = true;
    if (s->scales) {
        w->scale = w->slab + s->n_amount;
        for (int64_t i = 0; i < s->n_amount; i++) w->scale[i] = (float)((double)w->scale[i] * s->amount[i]);
        return EXC_OK;
    }
    if (!s->rank) return EXC_OK;
    if (!same_basis(w, s, l->c->a->shape.hidden)) return refuse(ctx, l->c, s, "a second basis for the same outputs");
    w->basis = s->basis;
    w->rank = s->rank;
    for (int64_t i = 0; i < s->n_amount; i++) {
        double a = w->strength[i], b = s->amount[i];
        w->strength[i] = (float)(a + b - a * b);
    }
    return EXC_OK;
}

static exc_status virtual_step(exc_ctx *ctx, const lens *l, const exc_edit_step *s) {
    int kind = -1;
    if (s->follows) return EXC_OK; /* outputs have their bias in them */
    for (int i = 0; i < WRITERS; i++)
        if (writer_roles[i] == s->role) kind = i;
    if (kind < 0) return refuse(ctx, l->c, s, "a weight that does not write the stream of a layer");
    if (!s->scales && s->side != EXC_SIDE_OUT) return refuse(ctx, l->c, s, "a projection of its input");
    if (s->norm != EXC_NORM_NONE) return refuse(ctx, l->c, s, "lengths to restore");
    return compose(ctx, l, s, &l->writers[kind * l->layers + s->layer]);
}

static exc_status make_virtual(exc_ctx *ctx, lens *l) {
    l->layers = l->c->a->shape.layers;
    l->writers = exc_zalloc(ctx, (size_t)(WRITERS * l->layers), sizeof *l->writers, "virtual edits");
    if (!l->writers) return EXC_ERR_MEMORY;
    for (int64_t i = 0; i < l->c->n_steps; i++) EXC_TRY(virtual_step(ctx, l, &l->c->steps[i]));
    return EXC_OK;
}

/* ----------------------------------------------------------------------------------------------------------- both */

static exc_status check_sidecar(exc_ctx *ctx, const exc_compiled *c) {
    if (!c->sidecar) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: router_bias: %s", c->name, c->a->family->router_bias);
}

exc_status exc_lens_make(exc_ctx *ctx, const exc_atlas *a, const exc_plan *plan, exc_lens kind, exc_lens_hook *hook) {
    lens *l = exc_zalloc(ctx, 1, sizeof *l, "lens");
    if (!l) return EXC_ERR_MEMORY;
    exc_status st = exc_plan_compile(ctx, a, plan, &l->c);
    if (st == EXC_OK) st = check_sidecar(ctx, l->c);
    if (st == EXC_OK && kind == EXC_LENS_VIRTUAL) st = make_virtual(ctx, l);
    if (st != EXC_OK) {
        release(l);
        return st;
    }
    *hook = (exc_lens_hook){.bake = bake, .touches = touches, .project = l->writers ? project : NULL, .user = l, .release = release};
    return EXC_OK;
}
