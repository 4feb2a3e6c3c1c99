/* feed.c - what follows the mixer in a layer: the routed experts with everything that is captured on their way, the
 * shared expert, or a dense MLP.
 *
 * One call an op covers all experts. A dense or shared MLP is the case of one expert that every token chose. Sums are
 * taken where the data already is: counts in route, activations in glu, output norms in down. */
#include "session.h"

#define TURN_BYTES ((size_t)16 << 20) /* of experts that take turns */

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* -------------------------------------------------------------------------------------------------- weights, room */

static const exc_role expert_roles[] = {EXC_ROLE_EXPERT_GATE, EXC_ROLE_EXPERT_UP, EXC_ROLE_EXPERT_DOWN};
static const exc_role dense_roles[] = {EXC_ROLE_DENSE_GATE, EXC_ROLE_DENSE_UP, EXC_ROLE_DENSE_DOWN};

/* how many experts take turns: few enough to stay in cache from packing to use, and half at most, so that small models go the same way */
static int64_t turn_of(const exc_carve *c, const exc_model *m, int64_t layer) {
    int64_t experts = m->expert_end - m->expert_first, n, k;
    size_t bytes = 0;
    if (!c->turns || !m->atlas->shape.is_moe[layer]) return 0;
    for (size_t i = 0; i < EXC_COUNT(expert_roles); i++) {
        exc_shape_role(&m->atlas->shape, m->atlas->family, expert_roles[i], layer, &n, &k);
        bytes += exc_packed_bytes(n, k, exc_carve_dtype(m, expert_roles[i], layer));
    }
    return most(least((int64_t)(TURN_BYTES / bytes), experts / 2), 1);
}

void exc_feed_carve(exc_carve *c, const exc_model *m, exc_layer *y, int64_t layer) {
    const exc_shape *s = &m->atlas->shape;
    bool moe = s->is_moe[layer];
    const exc_role *roles = moe ? expert_roles : dense_roles;
    exc_table *tables[] = {&y->gate, &y->up, &y->down};
    if (moe) y->router = exc_carve_role(c, m, EXC_ROLE_ROUTER, layer);
    y->turn = turn_of(c, m, layer);
    for (size_t i = 0; i < EXC_COUNT(tables); i++)
        *tables[i] = y->turn ? exc_carve_turns(c, m, roles[i], layer, y->turn) : exc_carve_group(c, m, roles[i], layer);
    y->gate_bias = exc_carve_vector(c, m, EXC_ROLE_EXPERT_GATE_BIAS, layer);
    y->up_bias = exc_carve_vector(c, m, EXC_ROLE_EXPERT_UP_BIAS, layer);
    y->down_bias = exc_carve_vector(c, m, EXC_ROLE_EXPERT_DOWN_BIAS, layer);
    y->router_bias = exc_carve_vector(c, m, EXC_ROLE_ROUTER_BIAS, layer);
    y->mlp_lens = exc_carve_lens(c, m, moe ? EXC_ROLE_EXPERT_DOWN : EXC_ROLE_DENSE_DOWN, layer);
    if (!moe || !s->shared_inner) return;
    y->shared_gate = exc_carve_group(c, m, EXC_ROLE_SHARED_GATE, layer);
    y->shared_up = exc_carve_group(c, m, EXC_ROLE_SHARED_UP, layer);
    y->shared_down = exc_carve_role(c, m, EXC_ROLE_SHARED_DOWN, layer);
    y->shared_lens = exc_carve_lens(c, m, EXC_ROLE_SHARED_DOWN, layer);
    if (m->atlas->family->shared_gated) y->shared_router = exc_carve_role(c, m, EXC_ROLE_SHARED_ROUTER, layer);
}

static exc_status fill_shared(exc_loader *r, exc_layer *y, int64_t layer) {
    if (!y->shared_down.data) return EXC_OK;
    EXC_TRY(exc_fill_group(r, EXC_ROLE_SHARED_GATE, layer, &y->shared_gate));
    EXC_TRY(exc_fill_group(r, EXC_ROLE_SHARED_UP, layer, &y->shared_up));
    EXC_TRY(exc_fill_role(r, EXC_ROLE_SHARED_DOWN, layer, &y->shared_down));
    return y->shared_router.data ? exc_fill_role(r, EXC_ROLE_SHARED_ROUTER, layer, &y->shared_router) : EXC_OK;
}

static exc_status fill_bias(exc_loader *r, const exc_layer *y, int64_t layer) {
    if (y->router_bias) EXC_TRY(exc_fill_vector(r, EXC_ROLE_ROUTER_BIAS, layer, y->router_bias));
    if (!y->down_bias) return EXC_OK;
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_EXPERT_GATE_BIAS, layer, y->gate_bias));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_EXPERT_UP_BIAS, layer, y->up_bias));
    return exc_fill_vector(r, EXC_ROLE_EXPERT_DOWN_BIAS, layer, y->down_bias);
}

exc_status exc_feed_fill(exc_loader *r, exc_layer *y, int64_t layer) {
    bool moe = r->a->shape.is_moe[layer];
    if (moe) EXC_TRY(exc_fill_role(r, EXC_ROLE_ROUTER, layer, &y->router));
    EXC_TRY(fill_bias(r, y, layer));
    EXC_TRY(fill_shared(r, y, layer));
    const exc_role *roles = moe ? expert_roles : dense_roles;
    const exc_table *tables[] = {&y->gate, &y->up, &y->down};
    for (size_t i = 0; i < EXC_COUNT(tables) && !y->turn; i++) EXC_TRY(exc_fill_group(r, roles[i], layer, tables[i]));
    EXC_TRY(exc_fill_lens(r, EXC_ROLE_SHARED_DOWN, layer, &y->shared_lens));
    return exc_fill_lens(r, moe ? EXC_ROLE_EXPERT_DOWN : EXC_ROLE_DENSE_DOWN, layer, &y->mlp_lens);
}

exc_status exc_feed_fill_down(exc_loader *r, exc_layer *y, int64_t layer) {
    bool moe = r->a->shape.is_moe[layer];
    if (y->down_bias) EXC_TRY(exc_fill_vector(r, EXC_ROLE_EXPERT_DOWN_BIAS, layer, y->down_bias));
    if (y->shared_down.data) EXC_TRY(exc_fill_role(r, EXC_ROLE_SHARED_DOWN, layer, &y->shared_down));
    return y->turn ? EXC_OK : exc_fill_group(r, moe ? EXC_ROLE_EXPERT_DOWN : EXC_ROLE_DENSE_DOWN, layer, &y->down);
}

exc_status exc_feed_fill_turn(exc_loader *r, const exc_layer *y, int64_t layer, int64_t first, exc_extent extent) {
    int64_t n = least(y->turn, y->down.count - first);
    if (extent == EXC_LAYER_WHOLE) {
        EXC_TRY(exc_fill_some(r, EXC_ROLE_EXPERT_GATE, layer, &y->gate, first, n));
        EXC_TRY(exc_fill_some(r, EXC_ROLE_EXPERT_UP, layer, &y->up, first, n));
    }
    return exc_fill_some(r, EXC_ROLE_EXPERT_DOWN, layer, &y->down, first, n);
}

void exc_feed_room(exc_carve *c, exc_session *s) {
    const exc_shape *p = &s->m->atlas->shape;
    size_t T = (size_t)s->step_tokens, K = (size_t)p->top_k, E = (size_t)p->experts;
    int64_t widest = most(p->top_k * p->inner, p->shared_inner), come = exc_ranks_count(s->ctx) > 1 ? exc_spread_pairs(s) : 0;
    if (p->moe_layers < p->layers) widest = most(widest, p->dense_inner);
    s->router = exc_carve_take(c, T * E, sizeof *s->router);
    s->ids = exc_carve_take(c, T * K, sizeof *s->ids);
    s->weights = exc_carve_take(c, T * K, sizeof *s->weights);
    s->offset = exc_carve_take(c, E + 1, sizeof *s->offset);
    s->offset_turn = exc_carve_keep(c, E + 1, sizeof *s->offset_turn);
    s->row_of = exc_carve_take(c, T * K, sizeof *s->row_of);
    s->pair_of = exc_carve_take(c, T * K, sizeof *s->pair_of);
    s->mid = exc_carve_take(c, (size_t)most((int64_t)T * widest, come * p->inner), exc_act_bytes(s->m));
    s->y = exc_carve_take(c, T * K * (size_t)p->hidden, sizeof *s->y);
}

/* ---------------------------------------------------------------------------------------------------------- a step */

/* the sums of one MoE row, or all NULL */
static exc_sums sums_of(const exc_session *s, const exc_step *t, int64_t row) {
    const exc_shape *p = &s->m->atlas->shape;
    exc_sums r = {0};
    if (!t->sums || !t->observe) return r;
    int64_t E = p->experts;
    if (t->sums->count) r.count = t->sums->count + row * E;
    if (t->sums->gate_sum) r.gate_sum = t->sums->gate_sum + row * E;
    if (t->sums->mid_sum) r.mid_sum = t->sums->mid_sum + row * E * p->inner;
    if (t->sums->sqnorm_sum) r.sqnorm_sum = t->sums->sqnorm_sum + row * E;
    if (t->sums->shared_mid_sum) r.shared_mid_sum = t->sums->shared_mid_sum + row * p->shared_inner;
    if (t->sums->prompt_count) r.prompt_count = t->sums->prompt_count + row * E;
    return r;
}

/* the two products of experts first..first+experts-1 of this rank; offset, pair_of and out begin with their rows */
static exc_status products(exc_session *s, const exc_layer *y, int64_t first, const void *x, const int64_t *offset, const int32_t *pair_of,
                           int64_t tokens, int64_t top_k, int64_t experts, float *out, const int32_t *slot, double *mid_sum,
                           double *sqnorm_sum) {
    const exc_shape *p = &s->m->atlas->shape;
    int64_t bias = s->m->expert_first + first; /* biases are of all experts */
    EXC_RUN(s, glu, .x = x, .act = s->m->act, .gate = y->gate.there + first, .up = y->up.there + first,
            .gate_bias = y->gate_bias ? y->gate_bias + bias * p->inner : NULL,
            .up_bias = y->up_bias ? y->up_bias + bias * p->inner : NULL, .activation = p->activation, .offset = offset,
            .pair_of = pair_of, .tokens = tokens, .top_k = top_k, .experts = experts, .hidden = p->hidden, .inner = p->inner, .mid = s->mid,
            .slot = mid_sum ? slot : NULL, .mid_sum = mid_sum ? mid_sum + first * p->inner : NULL, .w_dtype = y->gate.here->dtype);
    EXC_RUN(s, down, .mid = s->mid, .act = s->m->act, .down = y->down.there + first,
            .bias = y->down_bias ? y->down_bias + bias * p->hidden : NULL, .offset = offset, .pair_of = pair_of,
            .tokens = tokens, .top_k = top_k, .experts = experts, .hidden = p->hidden, .inner = p->inner, .y = out,
            .slot = sqnorm_sum ? slot : NULL, .sqnorm_sum = sqnorm_sum ? sqnorm_sum + first : NULL, .w_dtype = y->down.here->dtype);
    return EXC_OK;
}

/* Where experts take turns, each group of them is read and used before the next one. Ops run on the host then. */
exc_status exc_feed_experts(exc_session *s, const exc_layer *y, const void *x, const int64_t *offset, const int32_t *pair_of,
                            int64_t tokens, int64_t top_k, int64_t experts, float *out, const int32_t *slot, double *mid_sum,
                            double *sqnorm_sum) {
    if (!y->turn) return products(s, y, 0, x, offset, pair_of, tokens, top_k, experts, out, slot, mid_sum, sqnorm_sum);
    for (int64_t first = 0, n; first < experts; first += n) {
        n = least(y->turn, experts - first);
        EXC_TRY(exc_layer_turn(s->m, first));
        for (int64_t e = 0; e <= n; e++) s->offset_turn[e] = offset[first + e] - offset[first];
        EXC_TRY(products(s, y, first, x, s->offset_turn, pair_of + offset[first], tokens, top_k, n,
                         out + offset[first] * s->m->atlas->shape.hidden, slot, mid_sum, sqnorm_sum));
    }
    return EXC_OK;
}

static exc_status experts(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t,
                          int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    int64_t row = p->moe_row[layer], E = p->experts, K = p->top_k, H = p->hidden;
    exc_sums sums = sums_of(s, t, row);
    const int32_t *slot = t->sums ? s->there.observe : NULL;
    int64_t plane = row * s->whole.rows * K;
    int32_t *ids = t->router_ids ? t->router_ids + plane : s->ids;
    float *weights = t->router_weights ? t->router_weights + plane : s->weights;
    bool in_logits = s->m->atlas->family->router_bias_in_logits;
    EXC_RUN(s, matmul, .x = s->x, .x_stride = H, .act = s->m->act, .w = &y->router,
        .bias = in_logits ? y->router_bias : NULL, .y = s->router, .y_stride = E, .rows = rows);
    EXC_RUN(s, route, .logits = s->router, .bias = in_logits ? NULL : y->router_bias, .gate = &p->gate, .tokens = rows, .experts = E,
        .top_k = K, .ids = ids, .weights = weights, .slot = slot, .count = sums.count,
        .gate_sum = sums.gate_sum, .prompt_count = sums.prompt_count, .prompt_stride = p->moe_layers * E);
    EXC_RUN(s, permute, .ids = ids, .tokens = rows, .top_k = K, .experts = E, .offset = s->offset,
        .row_of = s->row_of, .pair_of = s->pair_of);
    if (s->spread) EXC_TRY(exc_spread_experts(s, y, ids, rows, slot, &sums));
    else EXC_TRY(exc_feed_experts(s, y, s->x, s->offset, s->pair_of, rows, K, E, s->y, slot, sums.mid_sum, sums.sqnorm_sum));
    const exc_virtual *v = &y->mlp_lens;
    EXC_RUN(s, combine, .y = s->y, .row_of = s->row_of, .ids = ids, .weights = weights, .tokens = rows,
        .top_k = K, .hidden = H, .basis = v->on ? v->basis : NULL, .rank = v->on ? v->rank : 0,
        .strength = v->on ? v->strength : NULL, .scale = v->on ? v->scale : NULL, .h = s->h);
    return EXC_OK;
}

/* the expert that every token has. Its gate, where there is one, is a router with a single choice: the
 * sigmoid of one logit is the weight. */
static exc_status shared(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    if (!y->shared_down.data) return EXC_OK;
    int64_t I = p->shared_inner, H = p->hidden;
    exc_sums sums = sums_of(s, t, p->moe_row[layer]);
    EXC_RUN(s, glu, .x = s->x, .act = s->m->act, .gate = y->shared_gate.there, .up = y->shared_up.there,
        .activation = p->activation, .offset = s->there.groups, .tokens = rows, .top_k = 1, .experts = 1, .hidden = H, .inner = I, .mid = s->mid,
        .slot = sums.shared_mid_sum ? s->there.observe : NULL, .mid_sum = sums.shared_mid_sum, .w_dtype = y->shared_gate.here->dtype);
    const exc_virtual *v = &y->shared_lens;
    if (!y->shared_router.data) return exc_write_stream(s, s->mid, I, &y->shared_down, NULL, v, rows);
    static const exc_gate sigmoid = {.size = sizeof sigmoid, .score = 1};
    EXC_RUN(s, matmul, .x = s->x, .x_stride = H, .act = s->m->act, .w = &y->shared_router, .y = s->router,
        .y_stride = 1, .rows = rows);
    EXC_RUN(s, route, .logits = s->router, .gate = &sigmoid, .tokens = rows, .experts = 1, .top_k = 1,
        .ids = s->ids, .weights = s->weights);
    EXC_RUN(s, matmul, .x = s->mid, .x_stride = I, .act = s->m->act, .w = &y->shared_down, .y = s->y,
        .y_stride = H, .rows = rows);
    EXC_RUN(s, combine, .y = s->y, .row_of = s->own_row, .ids = s->zero_ids, .weights = s->weights,
        .tokens = rows, .top_k = 1, .hidden = H, .basis = v->on ? v->basis : NULL,
        .rank = v->on ? v->rank : 0, .strength = v->on ? v->strength : NULL, .scale = v->on ? v->scale : NULL,
        .h = s->h);
    return EXC_OK;
}

static exc_status dense(exc_session *s, const exc_layer *y, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    EXC_RUN(s, glu, .x = s->x, .act = s->m->act, .gate = y->gate.there, .up = y->up.there, .activation = p->activation,
        .offset = s->there.groups, .tokens = rows, .top_k = 1, .experts = 1, .hidden = p->hidden, .inner = p->dense_inner, .mid = s->mid,
        .w_dtype = y->gate.here->dtype);
    return exc_write_stream(s, s->mid, p->dense_inner, y->down.here, NULL, &y->mlp_lens, rows);
}

exc_status exc_feed_run(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows) {
    EXC_TRY(s->m->atlas->shape.is_moe[layer] ? experts(s, y, layer, t, rows) : dense(s, y, rows));
    return shared(s, y, layer, t, rows);
}
