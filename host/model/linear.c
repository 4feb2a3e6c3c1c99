/* linear.c - the linear mixer: a gated delta net (ops.def: conv, delta, gate), whose state has one size at any length.
 *
 * One matmul makes queries, keys, values and the gate z of the output, another beta and step of each value head. A short
 * convolution along the sequence mixes the channels of q|k|v, the delta rule turns them into outputs, which are normed by
 * head, multiplied by silu(z) and projected. Checkpoints store the projections apart, or packed by key head:
 * [q | k | values | z's] and [betas | steps] of one after the other; packed rows are moved while they are loaded. What a
 * sequence leaves behind lies in a ring and a state by layer and slot; the ops know from its length what holds. */
#include "session.h"

static int64_t keys_of(const exc_linear *l) { return l->k_heads * l->k_dim; }
static int64_t values_of(const exc_linear *l) { return l->v_heads * l->v_dim; }
static int64_t channels_of(const exc_linear *l) { return 2 * keys_of(l) + values_of(l); }
static int64_t z_at(const exc_linear *l) { return exc_whole_panels(channels_of(l)); }
static int64_t in_width(const exc_linear *l) { return z_at(l) + exc_whole_panels(values_of(l)); }
static int64_t gates_width(const exc_linear *l) { return 2 * exc_whole_panels(l->v_heads); }

/* ------------------------------------------------------------------------------------------------------- weights */

static bool packed(const exc_atlas *a, int64_t layer) { return exc_atlas_find(a, EXC_ROLE_LINEAR_QKVZ, layer, -1); }

#define IN_MOVES 4
#define GATE_MOVES 2
static int64_t in_rows(const exc_linear *l) { return z_at(l) + values_of(l); }
static int64_t gate_rows(const exc_linear *l) { return exc_whole_panels(l->v_heads) + l->v_heads; }

/* where rows of packed projections go: a key head has [q | k | values | z's], and [betas | steps] */
static void unpack(const exc_linear *l, exc_moved in[IN_MOVES], exc_moved gates[GATE_MOVES]) {
    int64_t n = l->k_heads, K = l->k_dim, each = l->v_heads / n, V = each * l->v_dim, group = 2 * K + 2 * V;
    in[0] = (exc_moved){0, group, 0, K, K, n};
    in[1] = (exc_moved){K, group, keys_of(l), K, K, n};
    in[2] = (exc_moved){2 * K, group, 2 * keys_of(l), V, V, n};
    in[3] = (exc_moved){2 * K + V, group, z_at(l), V, V, n};
    gates[0] = (exc_moved){0, 2 * each, 0, each, each, n};
    gates[1] = (exc_moved){each, 2 * each, exc_whole_panels(l->v_heads), each, each, n};
}

/* dtype of one matrix made of two roles */
static int joined(const exc_model *m, int64_t layer, exc_role first, exc_role second) {
    return exc_carve_join(m, exc_carve_dtype(m, first, layer), exc_carve_dtype(m, second, layer));
}

static void carve(exc_carve *c, const exc_model *m, exc_layer *y, int64_t layer) {
    const exc_shape *s = &m->atlas->shape;
    const exc_linear *l = &s->linear;
    exc_linear_weights *w = &y->mix.linear;
    w->z_at = z_at(l);
    w->width = in_width(l);
    w->step_at = exc_whole_panels(l->v_heads);
    w->gates_width = gates_width(l);
    int in_dtype, gates_dtype;
    if (packed(m->atlas, layer)) {
        exc_moved in[IN_MOVES], gates[GATE_MOVES];
        unpack(l, in, gates);
        in_dtype = exc_carve_moved(m, EXC_ROLE_LINEAR_QKVZ, layer, in, IN_MOVES, in_rows(l));
        gates_dtype = exc_carve_moved(m, EXC_ROLE_LINEAR_BA, layer, gates, GATE_MOVES, gate_rows(l));
    } else {
        in_dtype = joined(m, layer, EXC_ROLE_LINEAR_QKV, EXC_ROLE_LINEAR_Z);
        gates_dtype = joined(m, layer, EXC_ROLE_LINEAR_B, EXC_ROLE_LINEAR_A);
    }
    w->in = exc_carve_packed(c, w->width, s->hidden, in_dtype);
    w->gates = exc_carve_packed(c, w->gates_width, s->hidden, gates_dtype);
    w->conv = exc_carve_take(c, (size_t)(l->taps * channels_of(l)), sizeof *w->conv);
    w->rate = exc_carve_vector(c, m, EXC_ROLE_LINEAR_RATE, layer);
    w->step_bias = exc_carve_vector(c, m, EXC_ROLE_LINEAR_STEP, layer);
    w->norm = exc_carve_vector(c, m, EXC_ROLE_LINEAR_NORM, layer);
}

static exc_status fill_packed(exc_loader *r, int64_t layer, const exc_linear_weights *w) {
    const exc_linear *l = &r->a->shape.linear;
    exc_moved in[IN_MOVES], gates[GATE_MOVES];
    unpack(l, in, gates);
    EXC_TRY(exc_fill_moved(r, EXC_ROLE_LINEAR_QKVZ, layer, in, IN_MOVES, in_rows(l), &w->in, 0));
    return exc_fill_moved(r, EXC_ROLE_LINEAR_BA, layer, gates, GATE_MOVES, gate_rows(l), &w->gates, 0);
}

static exc_status fill_apart(exc_loader *r, int64_t layer, const exc_linear_weights *w) {
    EXC_TRY(exc_fill_rows(r, EXC_ROLE_LINEAR_QKV, layer, &w->in, 0));
    EXC_TRY(exc_fill_rows(r, EXC_ROLE_LINEAR_Z, layer, &w->in, w->z_at));
    EXC_TRY(exc_fill_rows(r, EXC_ROLE_LINEAR_B, layer, &w->gates, 0));
    return exc_fill_rows(r, EXC_ROLE_LINEAR_A, layer, &w->gates, w->step_at);
}

static exc_status fill(exc_loader *r, exc_layer *y, int64_t layer) {
    const exc_linear_weights *w = &y->mix.linear;
    EXC_TRY(packed(r->a, layer) ? fill_packed(r, layer, w) : fill_apart(r, layer, w));
    EXC_TRY(exc_fill_turned(r, EXC_ROLE_LINEAR_CONV, layer, w->conv));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_LINEAR_RATE, layer, w->rate));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_LINEAR_STEP, layer, w->step_bias));
    return exc_fill_vector(r, EXC_ROLE_LINEAR_NORM, layer, w->norm);
}

/* -------------------------------------------------------------------------------------------------------- a step */

/* floats to a multiple of 16, so that every slot's begin on a line of the cache */
static int64_t ring_floats(const exc_linear *l) { return exc_whole_panels((l->taps - 1) * channels_of(l)); }

static int64_t state_floats(const exc_linear *l) {
    return exc_whole_panels((int64_t)exc_delta_floats(l->k_heads, l->v_heads, l->k_dim, l->v_dim));
}

static void room(exc_carve *c, exc_session *s) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_linear *l = &p->linear;
    exc_linear_room *b = &s->linear;
    size_t T = (size_t)s->step_tokens, values = (size_t)values_of(l),
           slots = (size_t)(exc_planes(s, EXC_MIX_LINEAR) * s->slots);
    b->in = exc_carve_take(c, T * (size_t)in_width(l), sizeof *b->in);
    b->gates = exc_carve_take(c, T * (size_t)gates_width(l), sizeof *b->gates);
    b->qkv = exc_carve_take(c, T * (size_t)channels_of(l), sizeof *b->qkv);
    b->out = exc_carve_take(c, T * values, sizeof *b->out);
    b->x = exc_carve_take(c, T * values, exc_act_bytes(s->m));
    b->ring_step = ring_floats(l);
    b->state_step = state_floats(l);
    b->ring = exc_carve_take(c, slots * (size_t)b->ring_step, sizeof *b->ring);
    b->state = exc_carve_take(c, slots * (size_t)b->state_step, sizeof *b->state);
}

static exc_status mix_tokens(exc_session *s, const exc_linear_weights *w, int64_t layer, const exc_step *t,
                             int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_linear *l = &p->linear;
    const exc_linear_room *b = &s->linear;
    int64_t row = exc_plane(s, layer) * s->slots, channels = channels_of(l);
    const float *q = b->qkv, *k = q + keys_of(l), *v = k + keys_of(l);
    EXC_RUN(s, conv, .x = b->in, .x_stride = w->width, .weight = w->conv, .taps = l->taps, .channels = channels,
            .begin = s->there.begin, .length = s->there.length, .slot = s->there.slot, .sequences = t->sequences,
            .tokens = rows, .state = b->ring + row * b->ring_step, .state_stride = b->ring_step, .y = b->qkv, .y_stride = channels);
    EXC_RUN(s, delta, .q = q, .k = k, .v = v, .stride = channels, .beta = b->gates, .step = b->gates + w->step_at,
            .gate_stride = w->gates_width, .a_log = w->rate, .dt_bias = w->step_bias, .begin = s->there.begin,
            .length = s->there.length, .slot = s->there.slot, .sequences = t->sequences, .tokens = rows,
            .k_heads = l->k_heads, .v_heads = l->v_heads, .k_dim = l->k_dim, .v_dim = l->v_dim, .state = b->state + row * b->state_step,
            .state_stride = b->state_step, .out = b->out);
    return EXC_OK;
}

static exc_status run(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_linear *l = &p->linear;
    const exc_linear_weights *w = &y->mix.linear;
    const exc_linear_room *b = &s->linear;
    int act = s->m->act;
    EXC_RUN(s, matmul, .x = s->x, .x_stride = p->hidden, .act = act, .w = &w->in, .y = b->in, .y_stride = w->width,
            .rows = rows);
    EXC_RUN(s, matmul, .x = s->x, .x_stride = p->hidden, .act = act, .w = &w->gates, .y = b->gates,
            .y_stride = w->gates_width, .rows = rows);
    EXC_TRY(mix_tokens(s, w, layer, t, rows));
    EXC_RUN(s, gate, .x = b->out, .x_dtype = EXC_F32, .g = b->in + w->z_at, .g_stride = w->width, .silu = 1,
            .weight = w->norm, .eps = p->eps, .tokens = rows, .heads = l->v_heads, .dim = l->v_dim, .y = b->x, .act = act);
    return exc_write_stream(s, b->x, values_of(l), &y->out, y->out_bias, &y->attn_lens, rows);
}

static int64_t cached(const exc_shape *s) {
    (void)s;
    return 0;
}

static int64_t held(const exc_shape *s) {
    return (ring_floats(&s->linear) + state_floats(&s->linear)) * (int64_t)sizeof(float);
}

const exc_mixer exc_mixer_linear = {
    .carve = carve, .fill = fill, .room = room, .cached = cached, .held = held, .run = run};
