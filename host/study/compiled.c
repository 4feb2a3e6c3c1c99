/* compiled.c - a plan meets a model: every edit becomes one step for each (role, layer), with its basis and one amount a
 * matrix, and exc_compiled_apply runs a weight's steps in the order of the plan.
 *
 * This one routine is behind the baked lens, apply and verify. Each step is one op call that rounds once, and the ops give a
 * matrix the same bits whatever else is in the call, so the three agree bit for bit however they batch the weights.
 *
 * A basis is made in f64: rows of the directions as they are, or, between two rows, their linear mix made orthonormal again;
 * for the router the rows are first multiplied by the norm that stands between stream and router, so that the router is
 * blind to the direction in the stream. All-zero rows (no direction there) are left out. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "edits.h"

typedef struct compiler {
    exc_ctx *ctx;
    exc_compiled *c;
    const exc_plan *p;
    const exc_shape *s;
    char where[300]; /* "FILE: edits[2]" */
    int64_t index;   /* of the edit */
} compiler;

static size_t head_of(const exc_compiled *c, exc_role role, int64_t layer) {
    int64_t L = c->a->shape.layers;
    return (size_t)((int64_t)role * (L + 1) + (layer < 0 ? L : layer));
}

const exc_edit_step *exc_first_step(const exc_compiled *c, exc_role role, int64_t layer) {
    int64_t at = c->head[head_of(c, role, layer)];
    return at < 0 ? NULL : c->steps + at;
}

const exc_edit_step *exc_next_step(const exc_compiled *c, const exc_edit_step *s) {
    return s->next < 0 ? NULL : c->steps + s->next;
}

static bool changes(const exc_edit_step *s, int64_t i) { return s->amount[i] != (s->scales ? 1 : 0); }

int64_t exc_step_changes(const exc_edit_step *s, const exc_weight *w) {
    if (!s->rows && !s->adds) return changes(s, s->n_amount > 1 ? w->expert : 0);
    int64_t n = 0;
    for (int64_t i = 0; i < s->n_amount; i++) n += changes(s, i);
    return n;
}

bool exc_compiled_touches(const exc_compiled *c, const exc_weight *w) {
    for (const exc_edit_step *s = exc_first_step(c, w->role, w->layer); s; s = exc_next_step(c, s))
        if (exc_step_changes(s, w)) return true;
    return false;
}

const float *exc_compiled_sidecar(const exc_compiled *c) { return c->sidecar; }

void exc_compiled_free(exc_compiled *c) {
    if (!c) return;
    for (int64_t i = 0; i < c->n_steps; i++) {
        exc_release(c->steps[i].basis);
        exc_release(c->steps[i].amount);
    }
    exc_release(c->steps);
    exc_release(c->head);
    exc_release(c->sidecar);
    exc_release(c);
}

/* ---------------------------------------------------------------------------------------------------------- bases */

static double dot(const double *a, const double *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Gram-Schmidt, twice; rows that add nothing are dropped. Returns how many are left. */
static int64_t orthonormalise(double *q, int64_t rank, int64_t n) {
    int64_t kept = 0;
    for (int64_t i = 0; i < rank; i++) {
        double *v = q + kept * n;
        memmove(v, q + i * n, (size_t)n * sizeof *v);
        double before = sqrt(dot(v, v, n));
        for (int pass = 0; pass < 2; pass++)
            for (int64_t j = 0; j < kept; j++) {
                double d = dot(v, q + j * n, n);
                for (int64_t h = 0; h < n; h++) v[h] -= d * q[j * n + h];
            }
        double after = sqrt(dot(v, v, n));
        if (!(after > 1e-6 * before)) continue;
        for (int64_t h = 0; h < n; h++) v[h] /= after;
        kept++;
    }
    return kept;
}

/* row `row` of the directions, or between two; q [R,H]; returns the rows that are not zero */
static int64_t take_rows(const exc_dirs *d, double row, double *q) {
    int64_t low = (int64_t)floor(row), H = d->hidden, R = d->rank, kept = 0;
    double part = row - (double)low;
    const float *a = d->basis + low * R * H, *b = part > 0 ? a + R * H : a;
    for (int64_t r = 0; r < R; r++) {
        double *v = q + kept * H;
        for (int64_t h = 0; h < H; h++) v[h] = (1 - part) * (double)a[r * H + h] + part * (double)b[r * H + h];
        kept += dot(v, v, H) > 0;
    }
    return part > 0 ? orthonormalise(q, kept, H) : kept;
}

/* rows times the post-attention norm's weight, orthonormal again */
static exc_status see_through_norm(compiler *k, int64_t layer, double *q, int64_t *rank) {
    const exc_atlas *a = k->c->a;
    const exc_weight *w = exc_atlas_find(a, EXC_ROLE_NORM_POST, layer, -1);
    int64_t H = k->s->hidden;
    if (!w) return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected a norm before the router of layer %lld, found none", k->where, (long long)layer);
    double *norm = exc_alloc(k->ctx, (size_t)H, sizeof *norm, "norm");
    uint8_t *copy = exc_alloc(k->ctx, exc_weight_span(w), 1, "norm"); /* the map may be unaligned */
    exc_status st = norm && copy ? EXC_OK : EXC_ERR_MEMORY;
    if (st == EXC_OK) {
        struct exc_convert_args to_f64 = {.src = copy, .src_dtype = w->dtype, .dst = norm, .dst_dtype = EXC_F64, .n = H};
        exc_dock d = {.ctx = k->ctx, .what = "norm"};
        memcpy(copy, exc_atlas_data(a, w), exc_weight_span(w));
        exc_dock_in(&d, &to_f64.src, exc_weight_span(w));
        exc_dock_out(&d, &to_f64.dst, (size_t)H * sizeof *norm);
        st = EXC_DOCK_CALL(&d, convert, &to_f64);
    }
    for (int64_t r = 0; r < *rank && st == EXC_OK; r++)
        for (int64_t h = 0; h < H; h++) q[r * H + h] *= norm[h] + (a->family->norm_zero_centred ? 1 : 0);
    if (st == EXC_OK) *rank = orthonormalise(q, *rank, H);
    exc_release(copy);
    exc_release(norm);
    return st;
}

static exc_status make_basis(compiler *k, const exc_edit *e, exc_edit_step *s) {
    const exc_dirs *d = k->p->dirs;
    /* without a layer: the embedding is row 0, the head reads the last */
    double row = e->has_basis ? e->basis : s->layer >= 0 ? (double)(s->layer + 1) : e->role == EXC_ROLE_EMBED ? 0 : (double)k->s->layers;
    double *q = exc_alloc(k->ctx, (size_t)(d->rank * d->hidden), sizeof *q, "basis");
    if (!q) return EXC_ERR_MEMORY;
    s->rank = take_rows(d, row, q);
    exc_status st = EXC_OK;
    if (e->op == EXC_EDIT_ROUTER_PROJECT && s->rank) st = see_through_norm(k, s->layer, q, &s->rank);
    size_t n = (size_t)(s->rank * d->hidden);
    if (st == EXC_OK && n && !(s->basis = exc_alloc(k->ctx, n, sizeof *s->basis, "basis"))) st = EXC_ERR_MEMORY;
    for (size_t i = 0; i < n && st == EXC_OK; i++) s->basis[i] = (float)q[i];
    exc_release(q);
    return st;
}

static exc_status check_basis(compiler *k, const exc_edit *e) {
    const exc_dirs *d = k->p->dirs;
    if (!d) return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected directions for an edit that projects, found none", k->where);
    if (d->rows != k->s->layers + 1 || d->hidden != k->s->hidden)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: directions: expected %lld rows of %lld for this model, found %lld of %lld", k->where,
                        (long long)k->s->layers + 1, (long long)k->s->hidden, (long long)d->rows, (long long)d->hidden);
    if (d->fingerprint[0] && strcmp(d->fingerprint, k->c->a->fingerprint))
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: directions: expected those of model %s, found those of %s", k->where,
                        k->c->a->fingerprint, d->fingerprint);
    if (!e->has_basis || e->basis <= (double)k->s->layers) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: basis: expected a row 0..%lld, found %g", k->where, (long long)k->s->layers, e->basis);
}

/* ---------------------------------------------------------------------------------------------------------- steps */

static bool has_role(const compiler *k, exc_role role, int64_t layer) {
    int64_t out, in;
    return exc_shape_role(k->s, k->c->a->family, role, layer, &out, &in);
}

static exc_status check_experts(compiler *k, const exc_edit *e) {
    if (!e->experts) return EXC_OK;
    bool rows = e->op == EXC_EDIT_ROUTER_SCALE || e->op == EXC_EDIT_ROUTER_BIAS;
    if (!rows && !exc_role_by_expert(e->role))
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: experts: expected no such key for the role %s, which has none", k->where, exc_role_name(e->role));
    for (int64_t i = 0; i < e->n_experts; i++)
        if (e->experts[i] >= k->s->experts)
            return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: experts: expected experts 0..%lld, found %lld", k->where,
                            (long long)k->s->experts - 1, (long long)e->experts[i]);
    return EXC_OK;
}

/* amounts of a step: `x` where the edit is meant, neutral elsewhere */
static exc_status fill_amount(compiler *k, const exc_edit *e, exc_edit_step *s, double x) {
    s->rows = e->op == EXC_EDIT_ROUTER_SCALE;
    s->n_amount = s->rows || exc_role_by_expert(e->role) ? k->s->experts : 1;
    s->amount = exc_alloc(k->ctx, (size_t)s->n_amount, sizeof *s->amount, "strengths");
    if (!s->amount) return EXC_ERR_MEMORY;
    for (int64_t i = 0; i < s->n_amount; i++) s->amount[i] = !e->experts ? x : s->scales ? 1 : 0;
    for (int64_t i = 0; i < e->n_experts; i++) s->amount[e->experts[i]] = x;
    return EXC_OK;
}

static exc_status grow(compiler *k) {
    exc_compiled *c = k->c;
    if (c->n_steps < c->cap) return EXC_OK;
    int64_t cap = c->cap ? 2 * c->cap : 64;
    exc_edit_step *steps = exc_zalloc(k->ctx, (size_t)cap, sizeof *steps, "steps of a plan");
    if (!steps) return EXC_ERR_MEMORY;
    if (c->n_steps) memcpy(steps, c->steps, (size_t)c->n_steps * sizeof *steps);
    exc_release(c->steps);
    c->steps = steps;
    c->cap = cap;
    return EXC_OK;
}

/* the next step of a role and layer, last in line */
static exc_status append(compiler *k, exc_edit_step step, exc_edit_step **out) {
    exc_compiled *c = k->c;
    EXC_TRY(grow(k));
    int64_t *at = &c->head[head_of(c, step.role, step.layer)];
    while (*at >= 0) at = &c->steps[*at].next;
    *at = c->n_steps;
    *out = &c->steps[c->n_steps++];
    **out = step;
    return EXC_OK;
}

static exc_status add_step(compiler *k, const exc_edit *e, exc_role role, int64_t layer, double amount) {
    exc_edit_step *s;
    EXC_TRY(append(k, (exc_edit_step){.role = role, .layer = layer, .edit = k->index, .norm = e->norm, .next = -1}, &s));
    s->scales = e->op == EXC_EDIT_SCALE || e->op == EXC_EDIT_MASK || e->op == EXC_EDIT_ROUTER_SCALE;
    /* a row of the embedding is what a token writes: its stream side is the columns of the stored matrix */
    s->side = e->op == EXC_EDIT_PROJECT && e->role != EXC_ROLE_EMBED ? EXC_SIDE_OUT : EXC_SIDE_IN;
    if (!s->scales) EXC_TRY(make_basis(k, e, s));
    if (!s->scales && !s->rank) amount = 0;
    if (e->op == EXC_EDIT_MASK) amount = 0;
    s->follows = role != e->role;
    /* a bias is one column; its rows are single numbers, whose length is nothing to give back */
    if (s->follows && s->norm == EXC_NORM_ROW) s->norm = EXC_NORM_NONE;
    return fill_amount(k, e, s, amount);
}

/* an edit of what a weight gives out takes its bias along: W x + b is edited as a whole */
static exc_status add_steps(compiler *k, const exc_edit *e, int64_t layer, double amount) {
    bool input = e->op == EXC_EDIT_PROJECT_INPUT || e->op == EXC_EDIT_ROUTER_PROJECT;
    exc_role bias = exc_role_bias(k->c->a->family, e->role);
    EXC_TRY(add_step(k, e, e->role, layer, amount));
    return input || bias == EXC_ROLES || !has_role(k, bias, layer) ? EXC_OK : add_step(k, e, bias, layer, amount);
}

/* a router bias goes into the family's tensor, or is collected for the sidecar where there is none */
static exc_status add_bias(compiler *k, const exc_edit *e, int64_t layer) {
    exc_compiled *c = k->c;
    int64_t E = k->s->experts, n = e->experts ? e->n_experts : E;
    if (e->n_values != n)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: values: expected as many numbers as experts (%lld), found %lld", k->where, (long long)n,
                        (long long)e->n_values);
    if (k->c->a->family->router_bias_stored) {
        exc_edit_step *s;
        EXC_TRY(append(k, (exc_edit_step){.role = EXC_ROLE_ROUTER_BIAS, .layer = layer, .edit = k->index, .adds = true, .n_amount = E, .next = -1}, &s));
        if (!(s->amount = exc_zalloc(k->ctx, (size_t)E, sizeof *s->amount, "router biases"))) return EXC_ERR_MEMORY;
        for (int64_t i = 0; i < n; i++) s->amount[e->experts ? e->experts[i] : i] += e->values[i];
        return EXC_OK;
    }
    if (!c->sidecar && !(c->sidecar = exc_zalloc(k->ctx, (size_t)(k->s->moe_layers * E), sizeof *c->sidecar, "router biases"))) return EXC_ERR_MEMORY;
    float *row = c->sidecar + k->s->moe_row[layer] * E;
    for (int64_t i = 0; i < n; i++) row[e->experts ? e->experts[i] : i] += (float)e->values[i];
    return EXC_OK;
}

static exc_status one_layer(compiler *k, const exc_edit *e, int64_t layer, int64_t i) {
    if (e->op == EXC_EDIT_ROUTER_BIAS) return add_bias(k, e, layer);
    return add_steps(k, e, layer, e->by_layer ? e->strength[i] : e->strength[0]);
}

static exc_status check_layer(compiler *k, const exc_edit *e, int64_t layer) {
    if (layer >= k->s->layers)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: layers: expected layers 0..%lld, found %lld", k->where, (long long)k->s->layers - 1, (long long)layer);
    if (has_role(k, e->role, layer)) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: layers: layer %lld has no %s (it %s)", k->where, (long long)layer, exc_role_name(e->role),
                    k->s->is_moe[layer] ? "has experts" : "is dense");
}

static exc_status every_layer(compiler *k, const exc_edit *e) {
    bool by_layer = exc_role_by_layer(e->role);
    int64_t n = 0, last = by_layer ? k->s->layers - 1 : 0;
    for (int64_t l = 0; l <= last; l++) n += has_role(k, e->role, by_layer ? l : -1);
    if (!n)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: role: expected one that the model (%s) has, found %s", k->where, k->c->a->family->model_type,
                        exc_role_name(e->role));
    if (e->by_layer && e->n_strength != n)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: strength: expected one number or as many as layers with %s (%lld), found %lld", k->where,
                        exc_role_name(e->role), (long long)n, (long long)e->n_strength);
    for (int64_t l = 0, i = 0; l <= last; l++)
        if (has_role(k, e->role, by_layer ? l : -1)) EXC_TRY(one_layer(k, e, by_layer ? l : -1, i++));
    return EXC_OK;
}

static exc_status compile_edit(compiler *k, const exc_edit *e) {
    bool projects = e->op == EXC_EDIT_PROJECT || e->op == EXC_EDIT_PROJECT_INPUT || e->op == EXC_EDIT_ROUTER_PROJECT;
    if (projects) EXC_TRY(check_basis(k, e));
    EXC_TRY(check_experts(k, e));
    if (!e->layers) return every_layer(k, e);
    if (!exc_role_by_layer(e->role))
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: layers: expected no such key for the role %s, which is one a model", k->where, exc_role_name(e->role));
    for (int64_t i = 0; i < e->n_layers; i++) {
        EXC_TRY(check_layer(k, e, e->layers[i]));
        EXC_TRY(one_layer(k, e, e->layers[i], i));
    }
    return EXC_OK;
}

static exc_status compile_all(compiler *k) {
    exc_compiled *c = k->c;
    size_t heads = (size_t)EXC_ROLES * (size_t)(k->s->layers + 1);
    if (k->p->fingerprint[0] && strcmp(k->p->fingerprint, c->a->fingerprint))
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: model.fingerprint: expected %s (%s), found %s", c->name, c->a->fingerprint, c->a->files->dir,
                        k->p->fingerprint);
    if (!(c->head = exc_alloc(k->ctx, heads, sizeof *c->head, "steps of a plan"))) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < heads; i++) c->head[i] = -1;
    for (k->index = 0; k->index < k->p->n_edits; k->index++) {
        const exc_edit *e = &k->p->edits[k->index];
        snprintf(k->where, sizeof k->where, "%.260s: edits[%lld]", c->name, (long long)k->index);
        EXC_TRY(compile_edit(k, e));
        if (e->norm == EXC_NORM_ROW)
            exc_warn(k->ctx, "%s: norm \"row\" stretches rows after the projection and puts part of the direction back", k->where);
    }
    return EXC_OK;
}

/* what ranks compare: the plan's text and its directions */
static uint64_t plan_mark(const exc_plan *p) {
    char *text = p->source ? json_dumps(p->source, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
    uint64_t mark = text ? exc_hash64(text, strlen(text)) : 0;
    if (p->dirs) mark = mark * 31 + exc_hash64(p->dirs->basis, (size_t)(p->dirs->rows * p->dirs->rank * p->dirs->hidden) * sizeof *p->dirs->basis);
    free(text);
    return mark;
}

exc_status exc_plan_compile(exc_ctx *ctx, const exc_atlas *a, const exc_plan *p, exc_compiled **out) {
    *out = NULL;
    exc_compiled *c = exc_zalloc(ctx, 1, sizeof *c, "compiled plan");
    if (!c) return EXC_ERR_MEMORY;
    c->a = a;
    c->name = p->path ? p->path : "plan";
    c->rounding = p->rounding;
    compiler k = {.ctx = ctx, .c = c, .p = p, .s = &a->shape};
    exc_status st = exc_ranks_agree(ctx, "the plan", compile_all(&k));
    if (st == EXC_OK) st = exc_ranks_meet(ctx, "the plan", plan_mark(p));
    if (st == EXC_OK) *out = c;
    else exc_compiled_free(c);
    return st;
}

/* ---------------------------------------------------------------------------------------------------------- apply */

/* Weights and scales below lie where ops run (apply_there brings them); all else is the host's, and docks for each call. */

/* one call of an op: `n` matrices, and what it reports of each */
typedef struct call {
    exc_ctx *ctx;
    const exc_compiled *c;
    const exc_edit_step *s;
    const exc_weight *const *w;
    size_t count, n;   /* weights, matrices */
    const void **from; /* [n] */
    void **to;
    void *const *scale; /* [count] or NULL: of quantised weights */
    double *amount, *before, *after;
    float *strength;
    int64_t *changed, *nonfinite, *overflow;
    uint64_t *stream;
    double *moved, *error, *size;
} call;

/* arrays for n matrices in one slab */
static exc_status carve(call *k, size_t n, void **slab) {
    uint8_t *p = *slab = exc_zalloc(k->ctx, n ? n : 1, 13 * 8, "matrices of an edit");
    if (!p) return EXC_ERR_MEMORY;
    void **const part[] = {(void **)&k->from,   (void **)&k->to,      (void **)&k->amount,    (void **)&k->before, (void **)&k->after,
                           (void **)&k->strength, (void **)&k->changed, (void **)&k->nonfinite, (void **)&k->overflow,
                           (void **)&k->stream,   (void **)&k->moved,   (void **)&k->error,     (void **)&k->size};
    for (size_t i = 0; i < EXC_COUNT(part); i++) *part[i] = p + i * n * 8;
    return EXC_OK;
}

/* random bits depend on which weight it is, never on what is edited beside it */
static uint64_t stream_of(const exc_weight *w) {
    return (uint64_t)w->role << 48 | (uint64_t)(w->layer + 1) << 24 | (uint64_t)(w->expert + 1);
}

/* matrices of the step: the weights themselves, or their rows */
static void list_matrices(call *k, const void *const *src, void *const *dst) {
    const exc_edit_step *s = k->s;
    k->n = 0;
    for (size_t i = 0; i < k->count; i++) {
        const exc_weight *w = k->w[i];
        int64_t m = s->rows ? s->n_amount : 1;
        size_t stride = s->rows ? (size_t)w->in * exc_dtype_bits((exc_dtype)w->dtype) / 8 : 0;
        for (int64_t r = 0; r < m; r++, k->n++) {
            k->from[k->n] = (const uint8_t *)src[i] + (size_t)r * stride;
            k->to[k->n] = (uint8_t *)dst[i] + (size_t)r * stride;
            k->amount[k->n] = s->rows ? s->amount[r] : s->amount[s->n_amount > 1 ? w->expert : 0];
            k->strength[k->n] = (float)k->amount[k->n];
            k->stream[k->n] = stream_of(w);
        }
    }
}

/* the same projection of W^T: of lengths, only those of columns (EXC_SIDE_OUT) or rows (EXC_SIDE_IN) come here */
static void turn(struct exc_project_args *a) {
    int64_t rows = a->rows;
    a->rows = a->cols;
    a->cols = rows;
    a->side = a->side == EXC_SIDE_OUT ? EXC_SIDE_IN : EXC_SIDE_OUT;
    if (a->norm != EXC_NORM_NONE) a->norm = EXC_NORM_COLUMN;
}

/* scales that are powers of two stay such: one that the checkpoint calls so, whatever the dtype */
static int powers_only(const call *k) { return k->c->a->shape.scale_power; }

/* the tables of matrices and scales */
static void dock_tables(exc_dock *d, const call *k, void *src, void *dst, void *scale, void *scale_to) {
    exc_dock_in(d, src, k->n * sizeof(void *));
    exc_dock_in(d, dst, k->n * sizeof(void *));
    exc_dock_in(d, scale, k->n * sizeof(void *));
    exc_dock_in(d, scale_to, k->n * sizeof(void *));
}

/* what an op reports of each matrix, in 64-bit numbers; what it has nothing to say of stays 0 */
static void dock_reports(exc_dock *d, const call *k, void *const *field, size_t fields) {
    for (size_t i = 0; i < fields; i++) exc_dock_both(d, field[i], k->n * sizeof(double));
}

static exc_status run_scale(call *k) {
    const exc_weight *w = k->w[0];
    struct exc_scale_args a = {.src = k->from, .dst = k->to, .dtype = w->dtype, .count = (int64_t)k->n, .n = k->s->rows ? w->in : w->out * w->in,
                               .factor = k->amount, .changed = k->changed, .nonfinite = k->nonfinite, .overflow = k->overflow,
                               .rows = w->out, .cols = w->in, .scale = (const void *const *)k->scale, .scale_to = k->scale,
                               .scale_dtype = w->scale_dtype, .scale_power = powers_only(k)};
    exc_dock d = {.ctx = k->ctx, .what = "matrices of an edit"};
    dock_tables(&d, k, &a.src, &a.dst, &a.scale, &a.scale_to);
    exc_dock_in(&d, &a.factor, k->n * sizeof *a.factor);
    dock_reports(&d, k, (void *[]){&a.changed, &a.nonfinite, &a.overflow}, 3);
    return EXC_DOCK_CALL(&d, scale, &a);
}

static exc_status run_project(call *k) {
    const exc_edit_step *s = k->s;
    const exc_weight *w = k->w[0];
    struct exc_project_args a = {.src = k->from, .dst = k->to, .dtype = w->dtype, .count = (int64_t)k->n, .rows = w->out, .cols = w->in,
                                 .side = s->side, .basis = s->basis, .rank = s->rank, .strength = k->strength, .norm = (int)s->norm,
                                 .before = k->before, .after = k->after, .changed = k->changed, .nonfinite = k->nonfinite,
                                 .rounding = (int)k->c->rounding, .seed = (uint64_t)s->edit, .stream = k->stream,
                                 .scale = (const void *const *)k->scale, .scale_to = k->scale, .scale_dtype = w->scale_dtype,
                                 .scale_power = powers_only(k), .moved = k->moved, .error = k->error, .size = k->size};
    if (exc_weight_transposed(w)) turn(&a);
    exc_dock d = {.ctx = k->ctx, .what = "matrices of an edit"};
    dock_tables(&d, k, &a.src, &a.dst, &a.scale, &a.scale_to);
    exc_dock_in(&d, &a.basis, (size_t)(s->rank * k->c->a->shape.hidden) * sizeof *a.basis);
    exc_dock_in(&d, &a.strength, k->n * sizeof *a.strength);
    exc_dock_in(&d, &a.stream, k->n * sizeof *a.stream);
    dock_reports(&d, k, (void *[]){&a.before, &a.after, &a.changed, &a.nonfinite, &a.moved, &a.error, &a.size}, 7);
    /* lengths of rows across columns: these need R W of all of them */
    bool wide = a.norm == EXC_NORM_ROW && a.side == EXC_SIDE_OUT && (exc_weight_coded(w) || k->c->rounding != EXC_ROUND_RN);
    void *c = NULL;
    exc_status st = wide ? exc_device_alloc(k->ctx, (size_t)((int64_t)k->n * a.rank * a.cols), sizeof *a.c, "projections", &c) : EXC_OK;
    a.c = c;
    st = st == EXC_OK ? EXC_DOCK_CALL(&d, project, &a) : exc_dock_leave(&d, st);
    exc_device_release(k->ctx, c);
    return st;
}

/* says of which weight an op spoke */
static exc_status named(const call *k, exc_status st) {
    char text[sizeof k->ctx->error];
    if (st == EXC_OK) return st;
    memcpy(text, k->ctx->error, sizeof text);
    exc_clear(k->ctx);
    return exc_fail(k->ctx, st, "%s [%lld,%lld]: %s", k->w[0]->tensor->name, (long long)k->w[0]->out, (long long)k->w[0]->in, text);
}

static exc_status run_op(call *k) {
    const exc_edit_step *s = k->s;
    const exc_weight *w = k->w[0];
    if (s->rows && exc_weight_coded(w))
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: edits[%lld]: expected a router of numbers to scale row by row, found %s of %s", k->c->name,
                        (long long)s->edit, w->tensor->name, exc_dtype_name((exc_dtype)w->dtype));
    return named(k, s->scales ? run_scale(k) : run_project(k));
}

/* NaN and infinity are counted where a step first meets them: earlier steps may have left this weight alone, and later ones
 * see what the first one spread, or what overflowed. */
static void add_effects(const call *k, exc_effect *effects) {
    const exc_edit_step *s = k->s;
    size_t m = s->rows ? (size_t)s->n_amount : 1;
    for (size_t at = 0; at < k->n; at += m) {
        exc_effect *e = &effects[at / m];
        bool fresh = !e->nonfinite && !e->overflow;
        for (size_t i = at; i < at + m; i++) {
            if (k->amount[i] == (s->scales ? 1 : 0)) continue;
            e->changed += k->changed[i];
            if (fresh) e->nonfinite += k->nonfinite[i];
            if (s->scales) {
                e->overflow += k->overflow[i];
                continue;
            }
            e->before += k->before[i];
            e->after += k->after[i];
            e->moved += k->moved[i];
            e->error += k->error[i];
            if (e->size == 0) e->size = k->size[i];
            if (isfinite(k->before[i]) && !isfinite(k->after[i])) e->overflow++;
        }
    }
}

/* n numbers of the host from one dtype to another; to NULL: only counted */
static exc_status converted(const call *k, const void *from, exc_dtype dtype, void *to, exc_dtype to_dtype, int64_t n, int64_t *nonfinite) {
    struct exc_convert_args a = {.src = from, .src_dtype = (int)dtype, .dst = to, .dst_dtype = (int)to_dtype, .n = n, .nonfinite = nonfinite};
    exc_dock d = {.ctx = k->ctx, .what = "router bias"};
    exc_dock_in(&d, &a.src, (size_t)n * exc_dtype_bits(dtype) / 8);
    exc_dock_out(&d, &a.dst, (size_t)n * exc_dtype_bits(to_dtype) / 8);
    exc_dock_out(&d, &a.nonfinite, sizeof *nonfinite);
    return EXC_DOCK_CALL(&d, convert, &a);
}

/* adds to vectors: sums in f64, rounded once to the stored dtype */
static exc_status add_to(const call *k, const exc_weight *w, const void *src, void *dst, exc_effect *e) {
    int64_t n = w->out, before = 0, after = 0;
    exc_dtype dtype = (exc_dtype)w->dtype;
    size_t unit = exc_dtype_bits(dtype) / 8, bytes = (size_t)n * unit;
    double *sum = exc_alloc(k->ctx, (size_t)n, sizeof *sum, "router bias");
    uint8_t *old = exc_alloc(k->ctx, bytes, 1, "router bias"), *result = exc_alloc(k->ctx, bytes, 1, "router bias");
    exc_status st = sum && old && result ? exc_device_get(k->ctx, old, src, bytes) : EXC_ERR_MEMORY;
    if (st == EXC_OK) st = converted(k, old, dtype, sum, EXC_F64, n, &before);
    for (int64_t i = 0; i < n && st == EXC_OK; i++) sum[i] += k->s->amount[i];
    if (st == EXC_OK) st = converted(k, sum, EXC_F64, result, dtype, n, NULL);
    if (st == EXC_OK) st = converted(k, result, dtype, NULL, dtype, n, &after);
    if (st == EXC_OK) st = exc_device_put(k->ctx, dst, result, bytes);
    for (size_t i = 0; i < bytes && st == EXC_OK; i += unit) e->changed += memcmp(result + i, old + i, unit) != 0;
    if (st == EXC_OK) {
        if (!e->nonfinite && !e->overflow) e->nonfinite += before;
        e->overflow += after - before;
    }
    exc_release(sum);
    exc_release(old);
    exc_release(result);
    return named(k, st);
}

static exc_status run_step(call *k, const void *const *src, void *const *dst, exc_effect *effects) {
    exc_status st = EXC_OK;
    if (k->s->adds) {
        for (size_t i = 0; i < k->count && st == EXC_OK; i++) st = add_to(k, k->w[i], src[i], dst[i], &effects[i]);
        return st;
    }
    list_matrices(k, src, dst);
    st = run_op(k);
    if (st == EXC_OK) add_effects(k, effects);
    return st;
}

static size_t matrices(const exc_compiled *c, const exc_weight *w, size_t count) {
    size_t most = count;
    for (const exc_edit_step *s = exc_first_step(c, w->role, w->layer); s; s = exc_next_step(c, s))
        if (s->rows && count * (size_t)s->n_amount > most) most = count * (size_t)s->n_amount;
    return most;
}

/* ops take the bytes as they lie: dense, or transposed unless rows of [out,in] are wanted one by one */
static bool fits_ops(const exc_compiled *c, const exc_weight *w) {
    if (exc_weight_dense(w)) return true;
    if (!exc_weight_transposed(w)) return false;
    for (const exc_edit_step *s = exc_first_step(c, w->role, w->layer); s; s = exc_next_step(c, s))
        if (s->rows || (s->norm == EXC_NORM_ROW && s->side == EXC_SIDE_OUT)) return false;
    return true;
}

static exc_status apply_as_they_lie(exc_ctx *ctx, const exc_compiled *c, const exc_weight *const *w, size_t count,
                                    const void *const *src, void *const *dst, void *const *scale, exc_effect *effects) {
    call k = {.ctx = ctx, .c = c, .w = w, .count = count, .scale = exc_weight_coded(w[0]) ? scale : NULL};
    void *slab = NULL;
    memset(effects, 0, count * sizeof *effects);
    exc_status st = carve(&k, matrices(c, w[0], count), &slab);
    bool first = true;
    for (const exc_edit_step *s = exc_first_step(c, w[0]->role, w[0]->layer); s && st == EXC_OK; s = exc_next_step(c, s)) {
        int64_t busy = 0;
        for (size_t i = 0; i < count; i++) busy += exc_step_changes(s, w[i]);
        if (!busy) continue;
        k.s = s;
        st = run_step(&k, first ? src : (const void *const *)dst, dst, effects);
        first = false;
    }
    for (size_t i = 0; i < count && first && st == EXC_OK; i++)
        if (src[i] != dst[i]) st = exc_device_copy(ctx, dst[i], src[i], exc_weight_span(w[i]));
    exc_release(slab);
    return st;
}

/* copies elements between where a weight lies and a dense [out,in] */
static exc_status copy_view(exc_ctx *ctx, const exc_weight *w, const void *lying, void *dense, bool back) {
    int64_t pack = w->dtype == EXC_F4 ? 2 : 1; /* rows of fp4 are whole bytes of two */
    struct exc_view_args a = {.src = lying, .src_row = w->out_step / pack, .src_column = w->in_step, .dst = dense, .dst_row = w->in / pack,
                              .dst_column = 1, .rows = w->out, .columns = w->in / pack, .unit = exc_dtype_bits((exc_dtype)w->dtype) * (size_t)pack / 8};
    if (back) {
        a.src = dense, a.src_row = w->in / pack, a.src_column = 1;
        a.dst = (void *)(uintptr_t)lying, a.dst_row = w->out_step / pack, a.dst_column = w->in_step;
    }
    return EXC_CALL(ctx, view, &a);
}

/* weights in between others: taken out, edited as dense ones, put back */
static exc_status apply_to_copy(exc_ctx *ctx, const exc_compiled *c, const exc_weight *w, const void *src, void *dst, void *const *scale,
                                exc_effect *effect) {
    exc_weight own = *w;
    const exc_weight *shown = &own;
    own.out_step = own.in;
    own.in_step = 1;
    own.begin = 0;
    own.end = exc_weight_bytes(w);
    void *copy;
    EXC_TRY(exc_device_alloc(ctx, (size_t)own.end, 1, "copy of a weight", &copy));
    const void *from = copy;
    exc_status st = copy_view(ctx, w, src, copy, false);
    if (st == EXC_OK) st = apply_as_they_lie(ctx, c, &shown, 1, &from, &copy, scale, effect);
    if (st == EXC_OK) st = copy_view(ctx, w, dst, copy, true);
    exc_device_release(ctx, copy);
    return st;
}

static exc_status apply_here(exc_ctx *ctx, const exc_compiled *c, const exc_weight *const *w, size_t count, const void *const *src,
                             void *const *dst, void *const *scale, exc_effect *effects) {
    if (fits_ops(c, w[0])) return apply_as_they_lie(ctx, c, w, count, src, dst, scale, effects);
    return apply_to_copy(ctx, c, w[0], src[0], dst[0], scale, effects);
}

/* On the CPU ops work in the caller's buffers. On a device the old bytes go over, are edited in place, and the new ones come back. */
static exc_status apply_there(exc_ctx *ctx, const exc_compiled *c, const exc_weight *const *w, size_t count, const void *const *src,
                              void *const *dst, void *const *scale, exc_effect *effects) {
    if (!ctx->module) return apply_here(ctx, c, w, count, src, dst, scale, effects);
    void **to = exc_alloc(ctx, 2 * count, sizeof *to, "matrices of an edit"), **scale_to = to + count;
    if (!to) return EXC_ERR_MEMORY;
    exc_dock d = {.ctx = ctx, .what = "weights of an edit"};
    for (size_t i = 0; i < count; i++) {
        to[i] = dst[i];
        scale_to[i] = scale ? scale[i] : NULL;
        exc_dock_through(&d, &to[i], src[i], exc_weight_span(w[i]));
        if (scale && scale[i]) exc_dock_both(&d, &scale_to[i], exc_weight_scale_bytes(w[i]));
    }
    exc_status st = exc_dock_enter(&d);
    if (st == EXC_OK) st = apply_here(ctx, c, w, count, (const void *const *)to, to, scale ? scale_to : NULL, effects);
    st = exc_dock_leave(&d, st);
    exc_release(to);
    return st;
}

exc_status exc_compiled_apply(exc_ctx *ctx, const exc_compiled *c, const exc_weight *const *w, size_t count, const void *const *src,
                              void *const *dst, void *const *scale, exc_effect *effects) {
    if (!count) return EXC_OK;
    if (exc_weight_coded(w[0]) && w[0]->scale_shared)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s of %s: expected blocks of scales of its own to be edited as it is stored, found one that is also "
                        "another part's; write the checkpoint as bf16 instead (apply --to bf16)", c->name, exc_role_name(w[0]->role), w[0]->tensor->name);
    if (fits_ops(c, w[0])) return apply_there(ctx, c, w, count, src, dst, scale, effects);
    /* one by one: what lies in between others would bring the others' old bytes back with it */
    for (size_t i = 0; i < count; i++) EXC_TRY(apply_there(ctx, c, w + i, 1, src + i, dst + i, scale ? scale + i : NULL, effects + i));
    return EXC_OK;
}
