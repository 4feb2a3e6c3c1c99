/* mla.c - the latent mixer: multi-head latent attention over a cache of C+R values a token (ops.def: latent,
 * bundle).
 *
 * Keys and values of all heads are linear in a latent of C values, which is what the cache holds, beside R
 * rotated channels of a key that all heads share. Absorbed, W_UK moves into the queries and W_UV behind the
 * sum: attention runs on the cache itself, 2C+R multiply-adds a head and key instead of N+R+V, and nothing is
 * expanded. Expanded, keys and values of the step's own rows are made first, at C*(N+V) a head and key, which
 * is what absorbing costs a head and query. So sequences that begin in this step are expanded, for every pair
 * of tokens is then cheaper, and all others, decode first of all, are absorbed. In reproducible mode all are
 * absorbed: a row's bits must not depend on where a step began. */
#include "codes.h"
#include "session.h"

/* -------------------------------------------------------------------------------------------------------
 * weights */

static int64_t q_width(const exc_shape *s) {
    return s->latent.q_rank ? s->latent.q_rank : s->heads * s->head_dim;
}

static int64_t kv_width(const exc_shape *s) { return s->latent.rank + s->latent.rotary; }

static exc_role q_role(const exc_shape *s) { return s->latent.q_rank ? EXC_ROLE_ATTN_Q_A : EXC_ROLE_ATTN_Q; }

/* the first matmul makes queries (or what they are made of) and the latent row */
static int first_dtype(const exc_model *m, exc_role q, int64_t layer) {
    return exc_carve_join(m, exc_carve_dtype(m, q, layer), exc_carve_dtype(m, EXC_ROLE_ATTN_KV_A, layer));
}

/* a quantised kv_b stays codes where it falls into keys and values of heads at its blocks of scales, as all published ones do */
static int heads_dtype(const exc_model *m, int64_t layer) {
    const exc_weight *w = exc_atlas_find(m->atlas, EXC_ROLE_ATTN_KV_B, layer, -1);
    const exc_shape *s = &m->atlas->shape;
    bool whole = s->latent.plain % EXC_BLOCK == 0 && s->value_dim % EXC_BLOCK == 0 && !w->scale_first;
    if (!exc_weight_coded(w) || (whole && w->dtype == EXC_F8_E4M3)) return exc_carve_dtype(m, EXC_ROLE_ATTN_KV_B, layer);
    return m->compute == EXC_COMPUTE_BF16 ? EXC_BF16 : EXC_F32;
}

static void carve(exc_carve *c, const exc_model *m, exc_layer *y, int64_t layer) {
    const exc_shape *s = &m->atlas->shape;
    const exc_latent *l = &s->latent;
    exc_latent_weights *w = &y->mix.latent;
    int dtype = heads_dtype(m, layer);
    w->kv_at = exc_whole_panels(q_width(s));
    w->width = w->kv_at + exc_whole_panels(kv_width(s));
    w->first = exc_carve_packed(c, w->width, s->hidden, first_dtype(m, q_role(s), layer));
    if (l->q_rank) w->q_b = exc_carve_role(c, m, EXC_ROLE_ATTN_Q_B, layer);
    w->key = exc_carve_table(c, s->heads, l->plain, l->rank, dtype);
    w->absorb = exc_carve_table(c, s->heads, l->rank, l->plain, dtype);
    w->value = exc_carve_table(c, s->heads, s->value_dim, l->rank, dtype);
    w->q_norm = exc_carve_vector(c, m, EXC_ROLE_ATTN_Q_A_NORM, layer);
    w->kv_norm = exc_carve_vector(c, m, EXC_ROLE_ATTN_KV_A_NORM, layer);
}

/* keys and values of a head are N+V rows of kv_b; absorbing takes those of the keys transposed */
static exc_status fill_heads(exc_loader *r, int64_t layer, const exc_latent_weights *w) {
    const exc_shape *s = &r->a->shape;
    int64_t N = s->latent.plain, C = s->latent.rank, V = s->value_dim;
    exc_matrix kv;
    EXC_TRY(exc_fill_open(r, EXC_ROLE_ATTN_KV_B, layer, w->key.here->dtype == EXC_F8_E4M3, &kv));
    for (int64_t h = 0; h < s->heads; h++) {
        int64_t first = h * (N + V) * C;
        EXC_TRY(exc_fill_view(r, &kv, first, C, 1, &w->key.here[h]));
        EXC_TRY(exc_fill_view(r, &kv, first, 1, C, &w->absorb.here[h]));
        EXC_TRY(exc_fill_view(r, &kv, first + N * C, C, 1, &w->value.here[h]));
    }
    EXC_TRY(exc_fill_table(r, &w->key));
    EXC_TRY(exc_fill_table(r, &w->absorb));
    EXC_TRY(exc_fill_table(r, &w->value));
    return exc_fill_close(r, &kv);
}

static exc_status fill(exc_loader *r, exc_layer *y, int64_t layer) {
    const exc_shape *s = &r->a->shape;
    const exc_latent_weights *w = &y->mix.latent;
    EXC_TRY(exc_fill_rows(r, q_role(s), layer, &w->first, 0));
    EXC_TRY(exc_fill_rows(r, EXC_ROLE_ATTN_KV_A, layer, &w->first, w->kv_at));
    if (s->latent.q_rank) EXC_TRY(exc_fill_role(r, EXC_ROLE_ATTN_Q_B, layer, &w->q_b));
    if (w->q_norm) EXC_TRY(exc_fill_vector(r, EXC_ROLE_ATTN_Q_A_NORM, layer, w->q_norm));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_ATTN_KV_A_NORM, layer, w->kv_norm));
    return fill_heads(r, layer, w);
}

/* --------------------------------------------------------------------------------------------------------- a
 * step */

static void *take(exc_carve *c, const exc_session *s, int64_t per_token) {
    return exc_carve_take(c, (size_t)(s->step_tokens * per_token), exc_act_bytes(s->m));
}

/* the buffers of the two forms share their place: a sequence of a step has one of them */
static void room(exc_carve *c, exc_session *s) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_latent *l = &p->latent;
    exc_latent_room *b = &s->latent;
    int64_t n = p->heads, width = exc_whole_panels(q_width(p)) + exc_whole_panels(kv_width(p));
    b->first = exc_carve_take(c, (size_t)(s->step_tokens * width), sizeof *b->first);
    if (l->q_rank) {
        b->q_a = take(c, s, l->q_rank);
        b->q = exc_carve_take(c, (size_t)(s->step_tokens * n * p->head_dim), sizeof *b->q);
    }
    b->out = take(c, s, n * p->value_dim);
    b->cache = exc_carve_take(c, (size_t)(exc_planes(s, EXC_MIX_LATENT) * s->cache_tokens * kv_width(p)),
                              exc_act_bytes(s->m));
    exc_carve other = *c;
    b->plain = take(c, s, n * l->plain);
    b->wide = take(c, s, n * kv_width(p));
    b->sums = take(c, s, n * l->rank);
    b->queries = take(&other, s, n * p->head_dim);
    b->keys = take(&other, s, n * p->head_dim);
    b->values = take(&other, s, n * p->value_dim);
    b->rows = take(&other, s, kv_width(p));
    if (other.at > c->at) c->at = other.at;
    c->overflow = c->overflow || other.overflow;
}

/* one stretch of the step's sequences, of one form */
typedef struct stretch {
    const exc_latent_weights *w;
    void *cache; /* of the layer */
    const exc_step *t;
    int64_t from, to;  /* sequences */
    int64_t row, rows; /* theirs */
} stretch;

/* element `count` of an array of act */
static void *at(const exc_session *s, void *p, int64_t count) {
    return (uint8_t *)p + (size_t)count * exc_act_bytes(s->m);
}

static exc_status project(exc_session *s, const exc_latent_weights *w, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_latent_room *b = &s->latent;
    int64_t rank = p->latent.q_rank;
    int act = s->m->act;
    EXC_RUN(s, matmul, .x = s->x, .x_stride = p->hidden, .act = act, .w = &w->first, .y = b->first,
            .y_stride = w->width, .rows = rows);
    if (!rank) return EXC_OK;
    EXC_RUN(s, norm, .x = b->first, .x_stride = w->width, .weight = w->q_norm,
            .eps = s->m->atlas->family->latent_eps, .rows = rows, .dim = rank, .y = b->q_a, .y_stride = rank,
            .act = act);
    EXC_RUN(s, matmul, .x = b->q_a, .x_stride = rank, .act = act, .w = &w->q_b, .y = b->q,
            .y_stride = p->heads * p->head_dim, .rows = rows);
    return EXC_OK;
}

/* norm, rotation and store of the stretch's rows; operands where the form wants them */
static exc_status prepare(exc_session *s, const stretch *k, bool expand) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_latent *l = &p->latent;
    const exc_latent_room *b = &s->latent;
    int64_t D = p->head_dim, W = kv_width(p), unit = k->row * p->heads,
            q_stride = l->q_rank ? p->heads * D : k->w->width;
    const float *first = b->first + k->row * k->w->width, *q = l->q_rank ? b->q + k->row * q_stride : first;
    EXC_RUN(s, latent, .q = q, .q_stride = q_stride, .kv = first + k->w->kv_at, .kv_stride = k->w->width,
            .weight = k->w->kv_norm, .eps = s->m->atlas->family->latent_eps,
            .inv_freq = s->m->loaded->inv_freq, .attention_factor = p->rope.attention,
            .adjacent = l->adjacent, .position = s->there.position + k->row, .cache_row = s->there.cache_row + k->row,
            .tokens = k->rows, .heads = p->heads, .plain = l->plain, .rotary = l->rotary, .latent = l->rank,
            .q_plain = expand ? at(s, b->queries, unit * D) : at(s, b->plain, unit * l->plain),
            .plain_step = expand ? D : l->plain,
            .q_turned = expand ? at(s, b->queries, unit * D + l->plain) : at(s, b->wide, unit * W + l->rank),
            .turned_step = expand ? D : W, .k_turned = expand ? at(s, b->keys, unit * D + l->plain) : NULL,
            .cache = k->cache, .rows = expand ? at(s, b->rows, k->row * W) : NULL, .act = s->m->act);
    return EXC_OK;
}

static float scale_of(const exc_shape *p) {
    return (float)(p->rope.score / __builtin_sqrt((double)p->head_dim));
}

/* attention on the cache: queries [absorbed | turned] of C+R, values the first C of each row */
static exc_status absorbed(exc_session *s, const stretch *k) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_latent_room *b = &s->latent;
    int64_t n = p->heads, N = p->latent.plain, C = p->latent.rank, W = kv_width(p), V = p->value_dim;
    int act = s->m->act;
    EXC_TRY(prepare(s, k, false));
    EXC_RUN(s, bundle, .x = at(s, b->plain, k->row * n * N), .x_stride = n * N, .x_step = N, .act = act,
            .w = k->w->absorb.there, .heads = n, .outputs = C, .w_dtype = k->w->absorb.here->dtype, .y = at(s, b->wide, k->row * n * W), .y_stride = n * W,
            .y_step = W, .rows = k->rows);
    EXC_RUN(s, attend, .q = b->wide, .cache_k = k->cache, .key_stride = W, .cache_v = k->cache,
            .value_stride = W, .q_begin = s->there.begin + k->from, .cache_begin = s->there.base + k->from,
            .length = s->there.length + k->from, .sequences = k->to - k->from, .q_heads = n, .kv_heads = 1,
            .head_dim = W, .value_dim = C, .scale = scale_of(p), .out = b->sums, .act = act,
            .tokens = k->t->begin[k->to], .longest = s->longest);
    EXC_RUN(s, bundle, .x = at(s, b->sums, k->row * n * C), .x_stride = n * C, .x_step = C, .act = act,
            .w = k->w->value.there, .heads = n, .outputs = V, .w_dtype = k->w->value.here->dtype, .y = at(s, b->out, k->row * n * V), .y_stride = n * V, .y_step = V,
            .rows = k->rows);
    return EXC_OK;
}

/* attention on keys and values of the stretch's own rows */
static exc_status expanded(exc_session *s, const stretch *k) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_latent_room *b = &s->latent;
    int64_t n = p->heads, D = p->head_dim, N = p->latent.plain, W = kv_width(p), V = p->value_dim;
    const void *rows = at(s, b->rows, k->row * W);
    int act = s->m->act;
    EXC_TRY(prepare(s, k, true));
    EXC_RUN(s, bundle, .x = rows, .x_stride = W, .act = act, .w = k->w->key.there, .heads = n, .outputs = N, .w_dtype = k->w->key.here->dtype,
            .y = at(s, b->keys, k->row * n * D), .y_stride = n * D, .y_step = D, .rows = k->rows);
    EXC_RUN(s, bundle, .x = rows, .x_stride = W, .act = act, .w = k->w->value.there, .heads = n, .outputs = V, .w_dtype = k->w->value.here->dtype,
            .y = at(s, b->values, k->row * n * V), .y_stride = n * V, .y_step = V, .rows = k->rows);
    EXC_RUN(s, attend, .q = b->queries, .cache_k = b->keys, .key_stride = n * D, .cache_v = b->values,
            .value_stride = n * V, .q_begin = s->there.begin + k->from, .cache_begin = s->there.begin + k->from,
            .length = s->there.length + k->from, .sequences = k->to - k->from, .q_heads = n, .kv_heads = n,
            .head_dim = D, .value_dim = V, .scale = scale_of(p), .out = b->out, .act = act,
            .tokens = k->t->begin[k->to], .longest = s->longest);
    return EXC_OK;
}

/* a sequence that begins in this step holds only rows of this step */
static bool begins(const exc_session *s, const exc_step *t, int64_t sequence) {
    return !s->ctx->queue.reproducible &&
           s->here.length[sequence] == t->begin[sequence + 1] - t->begin[sequence];
}

static exc_status run(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    stretch k = {.w = &y->mix.latent, .t = t};
    k.cache = at(s, s->latent.cache, exc_plane(s, layer) * s->cache_tokens * kv_width(p));
    EXC_TRY(project(s, k.w, rows));
    for (; k.from < t->sequences; k.from = k.to) {
        bool expand = begins(s, t, k.from);
        for (k.to = k.from + 1; k.to < t->sequences && begins(s, t, k.to) == expand; k.to++) {
        }
        k.row = t->begin[k.from];
        k.rows = t->begin[k.to] - k.row;
        EXC_TRY(expand ? expanded(s, &k) : absorbed(s, &k));
    }
    return exc_write_stream(s, s->latent.out, p->heads * p->value_dim, &y->out, NULL, &y->attn_lens, rows);
}

const exc_mixer exc_mixer_latent = {
    .carve = carve, .fill = fill, .room = room, .cached = kv_width, .run = run};
