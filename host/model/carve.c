/* carve.c - where packed weights lie in a slab.
 *
 * A layer's weights are carved out of one slab by the mechanisms that read them; run without a base, the same code measures. Which
 * dtype the packed form has is decided here too: bf16 stays, quantised weights stay codes where a panel lies within one block of
 * scales, and matrices that one call reads share a dtype. Of experts that take turns only a few have room, and the table's
 * entries repeat. */
#include "session.h"

static void *advance(exc_carve *c, uint8_t *base, size_t *at, size_t count, size_t size) {
    size_t bytes, end;
    if (!exc_mul(count, size, &bytes) || bytes > SIZE_MAX - 63 || __builtin_add_overflow(*at, bytes + 63, &end)) {
        c->overflow = true;
        return NULL;
    }
    void *p = base ? base + *at : NULL;
    *at = end / 64 * 64;
    return p;
}

void *exc_carve_take(exc_carve *c, size_t count, size_t size) {
    return advance(c, c->base, &c->at, count, size);
}

void *exc_carve_keep(exc_carve *c, size_t count, size_t size) {
    return c->apart ? advance(c, c->host, &c->host_at, count, size) : exc_carve_take(c, count, size);
}

exc_carve exc_carve_measure(const exc_ctx *ctx) { return (exc_carve){.apart = ctx->module != NULL}; }

exc_status exc_slab_make(exc_ctx *ctx, exc_carve *c, const char *what, exc_slab *out) {
    *out = (exc_slab){0};
    if (c->overflow) return exc_fail(ctx, EXC_ERR_MEMORY, "%s: more than memory can address", what);
    EXC_TRY(exc_device_alloc(ctx, c->at + 64, 1, what, &out->ops));
    if (c->apart && !(out->host = exc_alloc(ctx, c->host_at + 64, 1, what))) {
        exc_slab_free(ctx, out);
        return EXC_ERR_MEMORY;
    }
    out->bytes = c->at;
    *c = (exc_carve){.base = out->ops, .host = out->host, .apart = c->apart};
    return EXC_OK;
}

void exc_slab_free(exc_ctx *ctx, exc_slab *s) {
    exc_device_release(ctx, s->ops);
    exc_release(s->host);
    *s = (exc_slab){0};
}

int64_t exc_whole_panels(int64_t n) { return (n + EXC_PANEL - 1) / EXC_PANEL * EXC_PANEL; }

int exc_carve_join(const exc_model *m, int a, int b) {
    if (a == b) return a;
    return m->compute == EXC_COMPUTE_BF16 ? EXC_BF16 : EXC_F32;
}

bool exc_keeps_codes(const exc_weight *w) { return exc_weight_coded(w) && w->scale_first % EXC_PANEL == 0; }

/* quantised weights stay what they are, bf16 is exact in both modes, the rest is rounded or exact as the mode has it */
static int packed_dtype(const exc_model *m, const exc_weight *w) {
    if (exc_keeps_codes(w) || w->dtype == EXC_BF16) return w->dtype;
    return m->compute == EXC_COMPUTE_BF16 ? EXC_BF16 : EXC_F32;
}

static int role_dtype(const exc_model *m, exc_role role, int64_t layer) {
    bool by_expert = exc_role_by_expert(role);
    int dtype = packed_dtype(m, exc_atlas_find(m->atlas, role, layer, by_expert ? 0 : -1));
    for (int64_t e = 1; by_expert && e < m->atlas->shape.experts; e++)
        dtype = exc_carve_join(m, dtype, packed_dtype(m, exc_atlas_find(m->atlas, role, layer, e)));
    return dtype;
}

/* one dtype for all experts, and for gate and up, because one call reads them all */
int exc_carve_dtype(const exc_model *m, exc_role role, int64_t layer) {
    static const exc_role pairs[][2] = {{EXC_ROLE_EXPERT_GATE, EXC_ROLE_EXPERT_UP},
                                        {EXC_ROLE_SHARED_GATE, EXC_ROLE_SHARED_UP},
                                        {EXC_ROLE_DENSE_GATE, EXC_ROLE_DENSE_UP}};
    for (size_t i = 0; i < EXC_COUNT(pairs); i++)
        if (role == pairs[i][0] || role == pairs[i][1])
            return exc_carve_join(m, role_dtype(m, pairs[i][0], layer), role_dtype(m, pairs[i][1], layer));
    return role_dtype(m, role, layer);
}

int64_t exc_scales_of_panel(const exc_weight *w, const exc_moved *moved, size_t n, int64_t panel) {
    int64_t first = panel * EXC_PANEL, end = first + EXC_PANEL, found = EXC_SCALES_NONE;
    for (const exc_moved *v = moved; v < moved + n; v++)
        for (int64_t i = 0; i < v->count; i++) {
            int64_t to = v->to + i * v->to_step, lo = to > first ? to : first, hi = to + v->rows < end ? to + v->rows : end;
            if (lo >= hi) continue;
            int64_t from = v->from + i * v->from_step - to, at = (int64_t)exc_scale_offset(w, from + lo);
            if (at != (int64_t)exc_scale_offset(w, from + hi - 1) || (found != EXC_SCALES_NONE && found != at)) return EXC_SCALES_MIXED;
            found = at;
        }
    return found;
}

int exc_carve_moved(const exc_model *m, exc_role role, int64_t layer, const exc_moved *moved, size_t n, int64_t rows) {
    const exc_weight *w = exc_atlas_find(m->atlas, role, layer, -1);
    int dtype = exc_carve_dtype(m, role, layer);
    for (int64_t p = 0; exc_weight_coded(w) && p * EXC_PANEL < rows; p++)
        if (exc_scales_of_panel(w, moved, n, p) == EXC_SCALES_MIXED) return exc_carve_join(m, EXC_BF16, dtype);
    return dtype;
}

exc_packed exc_carve_packed(exc_carve *c, int64_t n, int64_t k, int dtype) {
    return (exc_packed){exc_carve_take(c, exc_packed_bytes(n, k, dtype), 1), n, k, dtype};
}

exc_packed exc_carve_role(exc_carve *c, const exc_model *m, exc_role role, int64_t layer) {
    int64_t n, k;
    exc_shape_role(&m->atlas->shape, m->atlas->family, role, layer, &n, &k);
    return exc_carve_packed(c, n, k, exc_carve_dtype(m, role, layer));
}

float *exc_carve_vector(exc_carve *c, const exc_model *m, exc_role role, int64_t layer) {
    int64_t n, k;
    if (!exc_shape_role(&m->atlas->shape, m->atlas->family, role, layer, &n, &k)) return NULL;
    if (exc_role_by_expert(role)) n *= m->atlas->shape.experts;
    return exc_carve_take(c, (size_t)n, sizeof(float));
}

exc_table exc_carve_table(exc_carve *c, int64_t count, int64_t n, int64_t k, int dtype) {
    exc_table t = {.count = count};
    t.here = exc_carve_keep(c, (size_t)count, sizeof *t.here);
    t.there = c->apart ? exc_carve_take(c, (size_t)count, sizeof *t.there) : t.here;
    for (int64_t i = 0; i < count; i++) {
        exc_packed one = exc_carve_packed(c, n, k, dtype);
        if (t.here) t.here[i] = one;
    }
    return t;
}

exc_table exc_carve_group(exc_carve *c, const exc_model *m, exc_role role, int64_t layer) {
    int64_t n, k, count = exc_role_by_expert(role) ? m->expert_end - m->expert_first : 1;
    exc_shape_role(&m->atlas->shape, m->atlas->family, role, layer, &n, &k);
    return exc_carve_table(c, count, n, k, exc_carve_dtype(m, role, layer));
}

exc_table exc_carve_turns(exc_carve *c, const exc_model *m, exc_role role, int64_t layer, int64_t turn) {
    int64_t n, k;
    exc_table t = {.count = m->expert_end - m->expert_first};
    exc_shape_role(&m->atlas->shape, m->atlas->family, role, layer, &n, &k);
    t.here = t.there = exc_carve_keep(c, (size_t)t.count, sizeof *t.here);
    for (int64_t i = 0; i < t.count; i++) {
        exc_packed one = i < turn ? exc_carve_packed(c, n, k, exc_carve_dtype(m, role, layer)) : t.here ? t.here[i % turn] : (exc_packed){0};
        if (t.here) t.here[i] = one;
    }
    return t;
}

exc_virtual exc_lens_of(const exc_model *m, exc_role role, int64_t layer) {
    exc_virtual v = {0};
    if (m->has_lens && m->is_virtual && m->lens.project)
        v.on = m->lens.project(m->lens.user, role, layer, &v.basis, &v.rank, &v.strength, &v.scale);
    return v;
}

/* the plan's arrays themselves on the CPU, else room for copies of them */
exc_virtual exc_carve_lens(exc_carve *c, const exc_model *m, exc_role role, int64_t layer) {
    exc_virtual v = exc_lens_of(m, role, layer);
    size_t n = exc_role_by_expert(role) ? (size_t)m->atlas->shape.experts : 1;
    if (!v.on || !c->apart) return v;
    if (v.basis) v.basis = exc_carve_take(c, (size_t)(v.rank * m->atlas->shape.hidden), sizeof *v.basis);
    if (v.strength) v.strength = exc_carve_take(c, n, sizeof *v.strength);
    if (v.scale) v.scale = exc_carve_take(c, n, sizeof *v.scale);
    return v;
}
