/* attention.c - the softmax mixer: grouped-query attention with rotary positions over a KV cache.
 *
 * Queries, keys and values come from one matmul. Rotation, the norm per head and the store into the cache are one op;
 * where a family norms all heads as one vector that norm runs before, and where it gates the output that comes behind. Cache
 * rows of all sequences lie in one plane a layer, [cache_tokens, kv_heads*D]; a sequence owns a stretch of it. A layer may see
 * a window of the last tokens only, and then keeps a ring of them where contexts are longer than that; each head may have a
 * sink, a score that takes its share of the softmax and has no value. */
#include "session.h"

/* a gated q_proj is stored head by head, D rows of queries and D of gates; gates go behind all queries */
static void part_heads(const exc_shape *s, int64_t gate_at, exc_moved moved[2]) {
    int64_t n = s->heads, D = s->head_dim;
    moved[0] = (exc_moved){0, 2 * D, 0, D, D, n};
    moved[1] = (exc_moved){D, 2 * D, gate_at, D, D, n};
}

static void carve(exc_carve *c, const exc_model *m, exc_layer *y, int64_t layer) {
    const exc_shape *s = &m->atlas->shape;
    exc_softmax_weights *w = &y->mix.softmax;
    int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    int dtype = exc_carve_dtype(m, EXC_ROLE_ATTN_Q, layer);
    bool gated = m->atlas->family->out_gate;
    if (gated) {
        exc_moved moved[2];
        part_heads(s, exc_whole_panels(q), moved);
        dtype = exc_carve_moved(m, EXC_ROLE_ATTN_Q, layer, moved, 2, exc_whole_panels(q) + q);
    }
    for (exc_role r = EXC_ROLE_ATTN_K; r <= EXC_ROLE_ATTN_V; r++) dtype = exc_carve_join(m, dtype, exc_carve_dtype(m, r, layer));
    w->gate_at = gated ? exc_whole_panels(q) : 0;
    w->k_at = w->gate_at + exc_whole_panels(q);
    w->v_at = w->k_at + exc_whole_panels(kv);
    w->width = w->v_at + exc_whole_panels(kv);
    w->qkv = exc_carve_packed(c, w->width, s->hidden, dtype);
    if (s->qkv_bias) w->bias = exc_carve_take(c, (size_t)w->width, sizeof(float));
    w->q_norm = exc_carve_vector(c, m, EXC_ROLE_ATTN_Q_NORM, layer);
    w->k_norm = exc_carve_vector(c, m, EXC_ROLE_ATTN_K_NORM, layer);
    w->sinks = exc_carve_vector(c, m, EXC_ROLE_ATTN_SINKS, layer);
}

/* biases of q, k and v stand where their outputs do; the columns between them are padding */
static exc_status fill_bias(exc_loader *r, int64_t layer, const exc_softmax_weights *w) {
    EXC_TRY(exc_device_zero(r->ctx, w->bias, (size_t)w->width * sizeof *w->bias));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_ATTN_Q_BIAS, layer, w->bias));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_ATTN_K_BIAS, layer, w->bias + w->k_at));
    return exc_fill_vector(r, EXC_ROLE_ATTN_V_BIAS, layer, w->bias + w->v_at);
}

static exc_status fill_gated(exc_loader *r, int64_t layer, const exc_softmax_weights *w) {
    const exc_shape *s = &r->a->shape;
    exc_moved moved[2];
    part_heads(s, w->gate_at, moved);
    return exc_fill_moved(r, EXC_ROLE_ATTN_Q, layer, moved, 2, w->gate_at + s->heads * s->head_dim, &w->qkv, 0);
}

/* rows that pad q, k and v to whole panels are written by pack, which fills a last panel with zeros */
static exc_status fill(exc_loader *r, exc_layer *y, int64_t layer) {
    const exc_softmax_weights *w = &y->mix.softmax;
    EXC_TRY(w->gate_at ? fill_gated(r, layer, w) : exc_fill_rows(r, EXC_ROLE_ATTN_Q, layer, &w->qkv, 0));
    EXC_TRY(exc_fill_rows(r, EXC_ROLE_ATTN_K, layer, &w->qkv, w->k_at));
    EXC_TRY(exc_fill_rows(r, EXC_ROLE_ATTN_V, layer, &w->qkv, w->v_at));
    if (w->bias) EXC_TRY(fill_bias(r, layer, w));
    if (w->sinks) EXC_TRY(exc_fill_vector(r, EXC_ROLE_ATTN_SINKS, layer, w->sinks));
    if (w->q_norm) EXC_TRY(exc_fill_vector(r, EXC_ROLE_ATTN_Q_NORM, layer, w->q_norm));
    return w->k_norm ? exc_fill_vector(r, EXC_ROLE_ATTN_K_NORM, layer, w->k_norm) : EXC_OK;
}

/* width of the q|k|v rows of the model's softmax layers: the same in each */
static int64_t qkv_width(const exc_atlas *a) {
    const exc_shape *p = &a->shape;
    int64_t q = exc_whole_panels(p->heads * p->head_dim), kv = exc_whole_panels(p->kv_heads * p->head_dim);
    return (a->family->out_gate ? 2 : 1) * q + 2 * kv;
}

static bool in_ring(const exc_session *s, int64_t layer) { return s->ring && s->m->atlas->shape.window[layer]; }

/* cache rows before those of a layer, and of all */
static int64_t plane_at(const exc_session *s, int64_t layer) {
    int64_t rows = 0;
    if (!s->ring) return exc_plane(s, layer) * s->cache_tokens;
    for (int64_t i = 0; i < layer; i++)
        if (s->m->atlas->shape.mix[i] == EXC_MIX_SOFTMAX) rows += in_ring(s, i) ? s->ring_tokens : s->cache_tokens;
    return rows;
}

static int64_t plane_rows(const exc_session *s) {
    return s->ring ? plane_at(s, s->m->atlas->shape.layers) : exc_planes(s, EXC_MIX_SOFTMAX) * s->cache_tokens;
}

static void room(exc_carve *c, exc_session *s) {
    const exc_shape *p = &s->m->atlas->shape;
    size_t T = (size_t)s->step_tokens, act = exc_act_bytes(s->m), q = (size_t)(p->heads * p->head_dim),
           cache = (size_t)(plane_rows(s) * p->kv_heads * p->head_dim);
    s->softmax.qkv = exc_carve_take(c, T * (size_t)qkv_width(s->m->atlas), sizeof(float));
    s->softmax.q = exc_carve_take(c, T * q, act);
    s->softmax.o = exc_carve_take(c, T * q, act);
    s->softmax.cache_k = exc_carve_take(c, cache, act);
    s->softmax.cache_v = exc_carve_take(c, cache, act);
}

/* norm over all heads of the queries or keys at once, in place and unrounded: the rotation rounds */
static exc_status norm_part(exc_session *s, const float *weight, float *x, int64_t stride, int64_t width, int64_t rows) {
    EXC_RUN(s, norm, .x = x, .x_stride = stride, .weight = weight, .zero_centred = s->m->atlas->family->norm_zero_centred,
            .eps = s->m->atlas->shape.eps, .rows = rows, .dim = width, .y = x, .y_stride = stride, .act = EXC_F32);
    return EXC_OK;
}

static exc_status run(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_softmax_weights *w = &y->mix.softmax;
    const exc_softmax_room *b = &s->softmax;
    int act = s->m->act;
    int64_t q = p->heads * p->head_dim, kv = p->kv_heads * p->head_dim;
    size_t plane = (size_t)(plane_at(s, layer) * kv) * exc_act_bytes(s->m);
    bool ring = in_ring(s, layer);
    void *ck = (uint8_t *)b->cache_k + plane, *cv = (uint8_t *)b->cache_v + plane;
    EXC_RUN(s, matmul, .x = s->x, .x_stride = p->hidden, .act = act, .w = &w->qkv, .bias = w->bias, .y = b->qkv,
            .y_stride = w->width, .rows = rows);
    bool whole = p->qk_norm == EXC_QK_WHOLE;
    if (whole) {
        EXC_TRY(norm_part(s, w->q_norm, b->qkv, w->width, q, rows));
        EXC_TRY(norm_part(s, w->k_norm, b->qkv + w->k_at, w->width, kv, rows));
    }
    EXC_RUN(s, rope, .q = b->qkv, .q_stride = w->width, .k = b->qkv + w->k_at, .k_stride = w->width, .v = b->qkv + w->v_at,
            .v_stride = w->width, .q_norm = whole ? NULL : w->q_norm, .k_norm = whole ? NULL : w->k_norm, .eps = p->eps,
            .zero_centred = s->m->atlas->family->norm_zero_centred, .inv_freq = s->m->loaded->inv_freq, .rotary = p->rotary,
            .attention_factor = p->rope.attention, .position = s->there.position, .cache_row = ring ? s->there.ring_row : s->there.cache_row,
            .tokens = rows,
            .q_heads = p->heads, .kv_heads = p->kv_heads, .head_dim = p->head_dim, .q_out = b->q, .cache_k = ck,
            .cache_v = cv, .act = act);
    EXC_RUN(s, attend, .q = b->q, .cache_k = ck, .cache_v = cv, .q_begin = s->there.begin, .cache_begin = ring ? s->there.ring_base : s->there.base,
            .length = s->there.length, .sequences = t->sequences, .q_heads = p->heads, .kv_heads = p->kv_heads,
            .head_dim = p->head_dim, .value_dim = p->head_dim, .key_stride = kv, .value_stride = kv,
            .scale = (float)(1.0 / __builtin_sqrt((double)p->head_dim)), .window = p->window[layer], .sinks = w->sinks,
            .out = b->o, .act = act, .tokens = rows, .longest = s->longest, .ring = ring ? s->ring : 0);
    if (w->gate_at)
        EXC_RUN(s, gate, .x = b->o, .x_dtype = act, .g = b->qkv + w->gate_at, .g_stride = w->width, .tokens = rows,
                .heads = p->heads, .dim = p->head_dim, .y = b->o, .act = act);
    return exc_write_stream(s, b->o, q, &y->out, y->out_bias, &y->attn_lens, rows);
}

static int64_t cached(const exc_shape *s) { return 2 * s->kv_heads * s->head_dim; }

const exc_mixer exc_mixer_softmax = {.carve = carve, .fill = fill, .room = room, .cached = cached, .run = run};
