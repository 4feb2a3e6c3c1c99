/* forward.c - one step of the model: tokens of several sequences in, residual stream, logits and taps out.
 *
 * A step is a list of rows; each sequence's rows continue what its cache slot holds, so prefill (many rows a
 * sequence), its continuation in pieces and decode (one row) are the same code, and no row is padding. Twelve
 * op calls a layer, each over the whole batch and, for the experts, over all experts at once: small models
 * are bound by calls, not by arithmetic. All buffers belong to the session, so a step allocates nothing.
 * Activations [T,H] are kept as f32 in the residual stream and as `act` (bf16 or f32) where they enter a
 * matmul. What a plan does virtually sits where writers add to the stream. */
#include <string.h>

#include "model.h"

struct exc_session {
    exc_ctx *ctx;
    exc_model *m;
    int64_t slots, cache_tokens, step_tokens;
    int64_t used_slots;             /* of the last reset */
    int64_t *base, *capacity;       /* [slots] cache rows of a slot */
    int64_t *length;                /* [slots] tokens it holds */
    void *cache_k, *cache_v;        /* [L, cache_tokens, kv_heads*D] act */
    float *h;                       /* [T,H] residual stream */
    void *x;                        /* [T,H] act: normed rows */
    float *qkv;                     /* [T, q|k|v] */
    void *q, *o;                    /* [T, heads*D] act */
    float *router;                  /* [T,E] */
    int32_t *ids;                   /* [T,K] */
    float *weights;                 /* [T,K] */
    int64_t *offset;                /* [E+1] */
    int32_t *row_of, *pair_of;      /* [T*K] */
    void *mid;                      /* [T*K,I], [T,shared] or [T,dense] act */
    float *y;                       /* [T*K,H] */
    float *last;                    /* [max(slots,64),H] rows that get logits */
    void *last_x;                   /* the same, normed, act */
    int32_t *position;              /* [T] */
    int64_t *cache_row;             /* [T] */
    int64_t *seq_base, *seq_length; /* [slots] of the sequences in the step */
    int32_t *zero_ids;              /* [T] zeros: the single "expert" of dense writers */
    int32_t *own_row;               /* [T] 0,1,2,..: and its row */
    float *ones;                    /* [T] and its weight */
    void *slab;
    size_t bytes;
};

/* One op call; a refusal is a fault of this file, and says which call. */
#define RUN(s, op, ...)                                                                                      \
    EXC_TRY(                                                                                                 \
        checked((s)->ctx, #op, (s)->ctx->ops->op(&(s)->ctx->queue, &(struct exc_##op##_args){__VA_ARGS__})))

static exc_status checked(exc_ctx *ctx, const char *op, exc_status st) {
    return st == EXC_OK ? EXC_OK : exc_fail(ctx, st, "forward: op %s refused its arguments", op);
}

/* -------------------------------------------------------------------------------------------------------
 * session */

static void *take(uint8_t *slab, size_t *at, int64_t count, size_t size) {
    void *p = slab ? slab + *at : NULL;
    *at += ((size_t)count * size + 63) / 64 * 64;
    return p;
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* rows of hidden states that get logits at once */
static int64_t logit_rows(const exc_session *s) { return most(s->slots, 64); }

/* one function measures (slab NULL) and carves, so that the two cannot disagree */
static size_t lay_out(exc_session *s, uint8_t *slab) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_loaded *l = s->m->loaded;
    size_t at = 0, act = s->m->act == EXC_BF16 ? 2 : 4;
    int64_t T = s->step_tokens, H = p->hidden, K = p->top_k, q = p->heads * p->head_dim,
            kv = p->kv_heads * p->head_dim;
    bool dense = p->moe_layers < p->layers;
    s->base = take(slab, &at, s->slots, 8);
    s->capacity = take(slab, &at, s->slots, 8);
    s->length = take(slab, &at, s->slots, 8);
    s->seq_base = take(slab, &at, s->slots, 8);
    s->seq_length = take(slab, &at, s->slots, 8);
    s->h = take(slab, &at, T * H, 4);
    s->x = take(slab, &at, T * H, act);
    s->qkv = take(slab, &at, T * l->qkv, 4);
    s->q = take(slab, &at, T * q, act);
    s->o = take(slab, &at, T * q, act);
    s->router = take(slab, &at, T * p->experts, 4);
    s->ids = take(slab, &at, T * K, 4);
    s->weights = take(slab, &at, T * K, 4);
    s->offset = take(slab, &at, p->experts + 1, 8);
    s->row_of = take(slab, &at, T * K, 4);
    s->pair_of = take(slab, &at, T * K, 4);
    s->mid = take(slab, &at, T * most(most(K * p->inner, p->shared_inner), dense ? p->dense_inner : 0), act);
    s->y = take(slab, &at, T * K * H, 4);
    s->last = take(slab, &at, logit_rows(s) * H, 4);
    s->last_x = take(slab, &at, logit_rows(s) * H, act);
    s->position = take(slab, &at, T, 4);
    s->cache_row = take(slab, &at, T, 8);
    s->zero_ids = take(slab, &at, T, 4);
    s->own_row = take(slab, &at, T, 4);
    s->ones = take(slab, &at, T, 4);
    s->cache_k = take(slab, &at, p->layers * s->cache_tokens * kv, act);
    s->cache_v = take(slab, &at, p->layers * s->cache_tokens * kv, act);
    return at;
}

exc_status exc_session_open(exc_ctx *ctx, exc_model *m, int64_t slots, int64_t cache_tokens,
                            int64_t step_tokens, exc_session **out) {
    *out = NULL;
    if (slots < 1 || cache_tokens < 1 || step_tokens < 1 || step_tokens > INT32_MAX / 64 ||
        cache_tokens > (int64_t)1 << 40)
        return exc_fail(ctx, EXC_ERR_USAGE,
                        "session: expected at least one slot, cache token and step token");
    exc_session *s = exc_zalloc(ctx, 1, sizeof *s, "session");
    if (!s) return EXC_ERR_MEMORY;
    s->ctx = ctx;
    s->m = m;
    s->slots = slots;
    s->cache_tokens = cache_tokens;
    s->step_tokens = step_tokens;
    s->bytes = lay_out(s, NULL);
    s->slab = exc_alloc(ctx, s->bytes, 1, "buffers and KV cache of the forward pass");
    if (!s->slab) {
        exc_release(s);
        return EXC_ERR_MEMORY;
    }
    lay_out(s, s->slab);
    for (int64_t t = 0; t < step_tokens; t++) {
        s->zero_ids[t] = 0;
        s->own_row[t] = (int32_t)t;
        s->ones[t] = 1.0f;
    }
    *out = s;
    return EXC_OK;
}

void exc_session_close(exc_session *s) {
    if (!s) return;
    exc_release(s->slab);
    exc_release(s);
}

uint64_t exc_session_bytes(const exc_session *s) { return s->bytes; }

bool exc_session_fits(const exc_session *s, int64_t slots, int64_t cache_tokens, int64_t step_tokens) {
    return s->slots >= slots && s->cache_tokens >= cache_tokens && s->step_tokens >= step_tokens;
}

exc_status exc_session_reset(exc_session *s, int64_t slots, const int64_t *capacity) {
    int64_t at = 0;
    if (slots > s->slots)
        return exc_fail(s->ctx, EXC_ERR_USAGE, "session: expected at most %lld slots", (long long)s->slots);
    for (int64_t i = 0; i < slots; i++) {
        s->base[i] = at;
        s->capacity[i] = capacity[i];
        s->length[i] = 0;
        at += capacity[i];
    }
    s->used_slots = slots;
    if (at > s->cache_tokens)
        return exc_fail(s->ctx, EXC_ERR_USAGE,
                        "session: expected capacities of at most %lld tokens, found %lld",
                        (long long)s->cache_tokens, (long long)at);
    return EXC_OK;
}

void exc_session_forget(exc_session *s, int64_t slot) { s->length[slot] = 0; }

int64_t exc_session_length(const exc_session *s, int64_t slot) { return s->length[slot]; }

int64_t exc_step_tokens(const exc_model *m) {
    /* experts want rows (64 or more each keep their weights' traffic below the arithmetic), caches want few
     * rows */
    const exc_shape *p = &m->atlas->shape;
    int64_t per_token = p->top_k * (p->hidden * 4 + p->inner * 2), tokens = ((int64_t)96 << 20) / per_token;
    int64_t wanted = 64 * p->experts / p->top_k;
    if (tokens < wanted) tokens = wanted;
    return tokens < 256 ? 256 : tokens > 4096 ? 4096 : tokens;
}

/* --------------------------------------------------------------------------------------------------------- a
 * step */

/* where each row stands: position in its sequence and row of the cache */
static exc_status place(exc_session *s, const exc_step *t, int64_t *rows) {
    const int64_t *begin = t->begin;
    int64_t n = t->sequences ? begin[t->sequences] : 0;
    *rows = n;
    if (n > s->step_tokens || t->sequences > s->slots)
        return exc_fail(s->ctx, EXC_ERR_USAGE, "session: expected at most %lld rows in a step, found %lld",
                        (long long)s->step_tokens, (long long)n);
    for (int64_t i = 0; i < t->sequences; i++) {
        int64_t slot = t->slot[i], count = begin[i + 1] - begin[i];
        if (slot < 0 || slot >= s->used_slots || count < 1 || s->length[slot] + count > s->capacity[slot])
            return exc_fail(s->ctx, EXC_ERR_USAGE, "session: sequence %lld does not fit its slot",
                            (long long)i);
        for (int64_t j = 0; j < count; j++) {
            s->position[begin[i] + j] = (int32_t)(s->length[slot] + j);
            s->cache_row[begin[i] + j] = s->base[slot] + s->length[slot] + j;
        }
        s->length[slot] += count;
        s->seq_base[i] = s->base[slot];
        s->seq_length[i] = s->length[slot];
    }
    return EXC_OK;
}

static exc_status norm(exc_session *s, const float *x, const float *weight, int64_t rows, void *y) {
    const exc_shape *p = &s->m->atlas->shape;
    RUN(s, norm, .x = x, .x_stride = p->hidden, .weight = weight,
        .zero_centred = s->m->atlas->family->norm_zero_centred, .eps = p->eps, .rows = rows, .dim = p->hidden,
        .y = y, .y_stride = p->hidden, .act = s->m->act);
    return EXC_OK;
}

/* A writer of the stream: h += x W^T. With a virtual edit the output is made apart and projected on its way
 * into the sum. */
static exc_status write_stream(exc_session *s, const void *x, int64_t width, const exc_packed *w,
                               const exc_virtual *v, int64_t rows) {
    int64_t H = s->m->atlas->shape.hidden;
    float *y = v->on ? s->y : s->h;
    RUN(s, matmul, .x = x, .x_stride = width, .act = s->m->act, .w = w, .add = v->on ? NULL : s->h, .y = y,
        .y_stride = H, .rows = rows);
    if (!v->on) return EXC_OK;
    RUN(s, combine, .y = s->y, .row_of = s->own_row, .ids = s->zero_ids, .weights = s->ones, .tokens = rows,
        .top_k = 1, .hidden = H, .basis = v->basis, .rank = v->rank, .strength = v->strength,
        .scale = v->scale, .h = s->h);
    return EXC_OK;
}

/* norm over all heads of the queries or keys at once, in place and unrounded: the rotation rounds */
static exc_status norm_part(exc_session *s, const float *weight, int64_t at, int64_t width, int64_t rows) {
    const exc_loaded *l = s->m->loaded;
    RUN(s, norm, .x = s->qkv + at, .x_stride = l->qkv, .weight = weight,
        .zero_centred = s->m->atlas->family->norm_zero_centred, .eps = s->m->atlas->shape.eps, .rows = rows,
        .dim = width, .y = s->qkv + at, .y_stride = l->qkv, .act = EXC_F32);
    return EXC_OK;
}

static exc_status attention(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t,
                            int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_loaded *l = s->m->loaded;
    int act = s->m->act;
    int64_t q = p->heads * p->head_dim, kv = p->kv_heads * p->head_dim;
    size_t plane = (size_t)(layer * s->cache_tokens * kv) * (act == EXC_BF16 ? 2 : 4);
    void *ck = (uint8_t *)s->cache_k + plane, *cv = (uint8_t *)s->cache_v + plane;
    EXC_TRY(norm(s, s->h, y->norm_in, rows, s->x));
    RUN(s, matmul, .x = s->x, .x_stride = p->hidden, .act = act, .w = &y->qkv, .bias = y->qkv_bias,
        .y = s->qkv, .y_stride = l->qkv, .rows = rows);
    bool whole = p->qk_norm == EXC_QK_WHOLE;
    if (whole) {
        EXC_TRY(norm_part(s, y->q_norm, 0, q, rows));
        EXC_TRY(norm_part(s, y->k_norm, l->k_at, kv, rows));
    }
    RUN(s, rope, .q = s->qkv, .q_stride = l->qkv, .k = s->qkv + l->k_at, .k_stride = l->qkv,
        .v = s->qkv + l->v_at, .v_stride = l->qkv, .q_norm = whole ? NULL : y->q_norm,
        .k_norm = whole ? NULL : y->k_norm, .eps = p->eps,
        .zero_centred = s->m->atlas->family->norm_zero_centred, .inv_freq = l->inv_freq, .rotary = p->rotary,
        .attention_factor = 1.0f, .position = s->position, .cache_row = s->cache_row, .tokens = rows,
        .q_heads = p->heads, .kv_heads = p->kv_heads, .head_dim = p->head_dim, .q_out = s->q, .cache_k = ck,
        .cache_v = cv, .act = act);
    RUN(s, attend, .q = s->q, .cache_k = ck, .cache_v = cv, .q_begin = t->begin, .cache_begin = s->seq_base,
        .length = s->seq_length, .sequences = t->sequences, .q_heads = p->heads, .kv_heads = p->kv_heads,
        .head_dim = p->head_dim, .scale = (float)(1.0 / __builtin_sqrt((double)p->head_dim)), .out = s->o,
        .act = act);
    return write_stream(s, s->o, q, &y->out, &y->attn_lens, rows);
}

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

static exc_status experts(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t,
                          int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    int64_t row = p->moe_row[layer], E = p->experts, K = p->top_k, H = p->hidden;
    exc_sums sums = sums_of(s, t, row);
    const int32_t *slot = t->sums ? t->observe : NULL;
    int32_t *ids = t->router_ids ? t->router_ids + row * rows * K : s->ids;
    float *weights = t->router_weights ? t->router_weights + row * rows * K : s->weights;
    RUN(s, matmul, .x = s->x, .x_stride = H, .act = s->m->act, .w = &y->router, .y = s->router, .y_stride = E,
        .rows = rows);
    RUN(s, route, .logits = s->router, .bias = y->router_bias, .gate = &p->gate, .tokens = rows, .experts = E,
        .top_k = K, .ids = ids, .weights = weights, .slot = slot, .count = sums.count,
        .gate_sum = sums.gate_sum, .prompt_count = sums.prompt_count, .prompt_stride = p->moe_layers * E);
    RUN(s, permute, .ids = ids, .tokens = rows, .top_k = K, .experts = E, .offset = s->offset,
        .row_of = s->row_of, .pair_of = s->pair_of);
    RUN(s, glu, .x = s->x, .act = s->m->act, .gate = y->gate, .up = y->up, .offset = s->offset,
        .pair_of = s->pair_of, .tokens = rows, .top_k = K, .experts = E, .hidden = H, .inner = p->inner,
        .mid = s->mid, .slot = sums.mid_sum ? slot : NULL, .mid_sum = sums.mid_sum);
    RUN(s, down, .mid = s->mid, .act = s->m->act, .down = y->down, .offset = s->offset, .pair_of = s->pair_of,
        .tokens = rows, .top_k = K, .experts = E, .hidden = H, .inner = p->inner, .y = s->y,
        .slot = sums.sqnorm_sum ? slot : NULL, .sqnorm_sum = sums.sqnorm_sum);
    const exc_virtual *v = &y->mlp_lens;
    RUN(s, combine, .y = s->y, .row_of = s->row_of, .ids = ids, .weights = weights, .tokens = rows,
        .top_k = K, .hidden = H, .basis = v->on ? v->basis : NULL, .rank = v->on ? v->rank : 0,
        .strength = v->on ? v->strength : NULL, .scale = v->on ? v->scale : NULL, .h = s->h);
    if (t->sums && t->sums->tokens && slot)
        for (int64_t i = 0; i < rows; i++) t->sums->tokens[row] += slot[i] >= 0;
    return EXC_OK;
}

/* the expert that every token has. Its gate, where there is one, is a router with a single choice: the
 * sigmoid of one logit is the weight. */
static exc_status shared(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    if (!y->shared_down.data) return EXC_OK;
    int64_t offset[2] = {0, rows}, I = p->shared_inner, H = p->hidden;
    exc_sums sums = sums_of(s, t, p->moe_row[layer]);
    RUN(s, glu, .x = s->x, .act = s->m->act, .gate = &y->shared_gate, .up = &y->shared_up, .offset = offset,
        .tokens = rows, .top_k = 1, .experts = 1, .hidden = H, .inner = I, .mid = s->mid,
        .slot = sums.shared_mid_sum ? t->observe : NULL, .mid_sum = sums.shared_mid_sum);
    const exc_virtual *v = &y->shared_lens;
    if (!y->shared_router.data) return write_stream(s, s->mid, I, &y->shared_down, v, rows);
    static const exc_gate sigmoid = {.size = sizeof sigmoid, .score = 1};
    RUN(s, matmul, .x = s->x, .x_stride = H, .act = s->m->act, .w = &y->shared_router, .y = s->router,
        .y_stride = 1, .rows = rows);
    RUN(s, route, .logits = s->router, .gate = &sigmoid, .tokens = rows, .experts = 1, .top_k = 1,
        .ids = s->ids, .weights = s->weights);
    RUN(s, matmul, .x = s->mid, .x_stride = I, .act = s->m->act, .w = &y->shared_down, .y = s->y,
        .y_stride = H, .rows = rows);
    RUN(s, combine, .y = s->y, .row_of = s->own_row, .ids = s->zero_ids, .weights = s->weights,
        .tokens = rows, .top_k = 1, .hidden = H, .basis = v->on ? v->basis : NULL,
        .rank = v->on ? v->rank : 0, .strength = v->on ? v->strength : NULL, .scale = v->on ? v->scale : NULL,
        .h = s->h);
    return EXC_OK;
}

static exc_status dense(exc_session *s, const exc_layer *y, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    int64_t offset[2] = {0, rows};
    RUN(s, glu, .x = s->x, .act = s->m->act, .gate = y->gate, .up = y->up, .offset = offset, .tokens = rows,
        .top_k = 1, .experts = 1, .hidden = p->hidden, .inner = p->dense_inner, .mid = s->mid);
    return write_stream(s, s->mid, p->dense_inner, y->down, &y->mlp_lens, rows);
}

/* copies of the residual stream after `depth` layers (0: the embedding) */
static void tap(exc_session *s, const exc_step *t, int64_t depth, int64_t rows) {
    const exc_shape *p = &s->m->atlas->shape;
    size_t row = (size_t)p->hidden * sizeof(float);
    if (t->hidden) memcpy((uint8_t *)t->hidden + (size_t)(depth * rows) * row, s->h, (size_t)rows * row);
    if (t->hidden_last)
        for (int64_t i = 0; i < t->sequences; i++)
            memcpy((uint8_t *)t->hidden_last + (size_t)(i * (p->layers + 1) + depth) * row,
                   (uint8_t *)s->h + (size_t)(t->begin[i + 1] - 1) * row, row);
}

/* NaN or infinity anywhere in a layer reaches the stream and stays there: one look at the end is enough */
static exc_status check_finite(exc_session *s, int64_t rows) {
    int64_t bad = 0, index = -1, H = s->m->atlas->shape.hidden;
    RUN(s, convert, .src = s->h, .src_dtype = EXC_F32, .dst = NULL, .dst_dtype = EXC_F32, .n = rows * H,
        .nonfinite = &bad, .index = &index);
    if (!bad) return EXC_OK;
    return exc_fail(
        s->ctx, EXC_ERR_NUMERIC,
        "%s: residual stream after the last layer: expected finite activations, found NaN or infinity at "
        "row %lld, element %lld (%lld in this step)",
        s->m->dir, (long long)(index / H), (long long)(index % H), (long long)bad);
}

exc_status exc_session_logits(exc_session *s, int64_t first, int64_t rows, float *logits) {
    const exc_shape *p = &s->m->atlas->shape;
    for (int64_t done = 0, n; done < rows; done += n) {
        n = rows - done < logit_rows(s) ? rows - done : logit_rows(s);
        EXC_TRY(norm(s, s->h + (first + done) * p->hidden, s->m->loaded->norm_final, n, s->last_x));
        RUN(s, matmul, .x = s->last_x, .x_stride = p->hidden, .act = s->m->act, .w = &s->m->loaded->lm_head,
            .y = logits + done * p->vocab, .y_stride = p->vocab, .rows = n);
    }
    return EXC_OK;
}

static exc_status last_logits(exc_session *s, const exc_step *t) {
    const exc_shape *p = &s->m->atlas->shape;
    size_t row = (size_t)p->hidden * sizeof(float);
    for (int64_t i = 0; i < t->sequences; i++)
        memcpy((uint8_t *)s->last + (size_t)i * row, (uint8_t *)s->h + (size_t)(t->begin[i + 1] - 1) * row,
               row);
    EXC_TRY(norm(s, s->last, s->m->loaded->norm_final, t->sequences, s->last_x));
    RUN(s, matmul, .x = s->last_x, .x_stride = p->hidden, .act = s->m->act, .w = &s->m->loaded->lm_head,
        .y = t->logits, .y_stride = p->vocab, .rows = t->sequences);
    return EXC_OK;
}

exc_status exc_session_step(exc_session *s, const exc_step *t) {
    const exc_shape *p = &s->m->atlas->shape;
    const exc_loaded *l = s->m->loaded;
    int64_t rows;
    EXC_TRY(place(s, t, &rows));
    if (!rows) return EXC_OK;
    RUN(s, embed, .table = l->embed, .table_dtype = l->embed_dtype, .ids = t->tokens, .tokens = rows,
        .hidden = p->hidden, .out = s->h);
    tap(s, t, 0, rows);
    for (int64_t i = 0; i < p->layers; i++) {
        const exc_layer *y = &l->layer[i];
        EXC_TRY(attention(s, y, i, t, rows));
        EXC_TRY(norm(s, s->h, y->norm_post, rows, s->x));
        EXC_TRY(p->is_moe[i] ? experts(s, y, i, t, rows) : dense(s, y, rows));
        EXC_TRY(shared(s, y, i, t, rows));
        tap(s, t, i + 1, rows);
    }
    EXC_TRY(check_finite(s, rows));
    if (!t->logits) return EXC_OK;
    return t->logits_all ? exc_session_logits(s, 0, rows, t->logits) : last_logits(s, t);
}
