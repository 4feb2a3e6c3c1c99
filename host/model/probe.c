/* probe.c - linear looks at single weights: a down_proj times f64 vectors. Sums of expert outputs follow from
 * sums of the intermediate activations (sum_t (W a_t + b) = W sum_t a_t + T b), so capture stores [E,I] and
 * this makes [E,H] once at the end. The weights are those the forward pass used, with the plan's baked edits if there
 * are any. */
#include "model.h"

static exc_status multiply(exc_ctx *ctx, const exc_packed *w, const double *x, int64_t n, double *y) {
    struct exc_matvec_args a = {.x = x, .w = w, .rows = n, .y = y};
    exc_dock d = {.ctx = ctx, .what = "sums of activations"};
    exc_dock_in(&d, &a.x, (size_t)(n * w->k) * sizeof *x);
    exc_dock_out(&d, &a.y, (size_t)(n * w->n) * sizeof *y);
    return EXC_DOCK_CALL(&d, matvec, &a);
}

static exc_status add_bias(exc_ctx *ctx, const float *bias, const int64_t *terms, int64_t n, int64_t out, double *y) {
    size_t bytes = (size_t)out * sizeof *bias;
    float *copy = exc_alloc(ctx, bytes, 1, "a bias");
    if (!copy) return EXC_ERR_MEMORY;
    exc_status st = exc_device_get(ctx, copy, bias, bytes);
    for (int64_t i = 0; st == EXC_OK && i < n * out; i++) y[i] += (double)terms[i / out] * (double)copy[i % out];
    exc_release(copy);
    return st;
}

exc_status exc_model_down(exc_ctx *ctx, exc_model *m, exc_role role, int64_t layer, int64_t expert,
                          const double *x, const int64_t *terms, int64_t n, double *y) {
    const exc_shape *s = &m->atlas->shape;
    bool known = role == EXC_ROLE_EXPERT_DOWN || role == EXC_ROLE_DENSE_DOWN || role == EXC_ROLE_SHARED_DOWN;
    int64_t out, in;
    if (!known || layer < 0 || !exc_shape_role(s, m->atlas->family, role, layer, &out, &in))
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: layer %lld has no %s", m->dir, (long long)layer,
                        exc_role_name(role));
    int64_t experts = role == EXC_ROLE_EXPERT_DOWN ? s->experts : 1;
    if (role != EXC_ROLE_EXPERT_DOWN) expert = 0;
    if (expert < 0 || expert >= experts)
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: layer %lld: expected experts 0..%lld, found %lld", m->dir,
                        (long long)layer, (long long)experts - 1, (long long)expert);
    if (role == EXC_ROLE_EXPERT_DOWN && (expert < m->expert_first || expert >= m->expert_end))
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: layer %lld: expert %lld is held by another rank", m->dir, (long long)layer,
                        (long long)expert);
    const exc_layer *l;
    int64_t own = role == EXC_ROLE_EXPERT_DOWN ? expert - m->expert_first : 0;
    EXC_TRY(exc_layer_down(ctx, m, layer, own, &l));
    const exc_packed *w = role == EXC_ROLE_SHARED_DOWN ? &l->shared_down : &l->down.here[own];
    const float *bias = role == EXC_ROLE_EXPERT_DOWN && l->down_bias ? l->down_bias + expert * out : NULL;
    EXC_TRY(multiply(ctx, w, x, n, y));
    return bias ? add_bias(ctx, bias, terms, n, out, y) : EXC_OK;
}
