/* load.c - opening a model: from mapped files to packed weights.
 *
 * Every matrix is packed once into the panels the matmul reads (17 GB/s of weights at 1-16 rows would be 6
 * unpacked), all into one slab whose size is measured and carved by the same code. The files are read through
 * the map in blocks of rows that stay in cache: one look for NaN and infinity, one packing; a plan's baked
 * edits are made on a copy of the matrix in its stored dtype, so that they are the bits a written checkpoint
 * would have. Mapped pages are given back as we go, so the peak is the packed weights plus one staging block,
 * not twice the model.
 *
 * bf16 weights stay bf16 in both compute modes (exact); f16 and f32 ones are rounded for bf16 and widened for
 * f32. */
#include <math.h>
#include <string.h>
#include <sys/mman.h>

#include "model.h"

#define BLOCK_BYTES                                                                                          \
    ((size_t)1 << 20) /* source bytes of one scan-and-pack block: stays in the second-level cache */
#define PAGE ((uint64_t)4096)

typedef struct carve {
    uint8_t *base; /* NULL: only measuring */
    size_t at;
    bool overflow;
} carve;

static void *take(carve *c, size_t count, size_t size) {
    size_t bytes, end;
    if (!exc_mul(count, size, &bytes) || __builtin_add_overflow(c->at, bytes + 63, &end)) {
        c->overflow = true;
        return NULL;
    }
    void *p = c->base ? c->base + c->at : NULL;
    c->at = end / 64 * 64;
    return p;
}

typedef struct loader {
    exc_ctx *ctx;
    exc_model *m;
    const exc_atlas *a;
    exc_loaded *l;
    uint8_t *stage; /* copy of a weight that the plan edits, or whose bytes are not aligned for their dtype */
    size_t stage_bytes;
    uint64_t done, total;
} loader;

/* -------------------------------------------------------------------------------------------------------
 * layout */

static int64_t whole_panels(int64_t n) { return (n + EXC_PANEL - 1) / EXC_PANEL * EXC_PANEL; }

/* dtype of the packed form of a role's weights in a layer: one for all experts, because one call reads them
 * all */
static int packed_dtype(const exc_model *m, exc_role role, int64_t layer) {
    if (m->compute == EXC_COMPUTE_BF16) return EXC_BF16;
    int64_t experts = exc_role_by_expert(role) ? m->atlas->shape.experts : 1;
    for (int64_t e = 0; e < experts; e++) {
        const exc_weight *w = exc_atlas_find(m->atlas, role, layer, exc_role_by_expert(role) ? e : -1);
        if (w->tensor->dtype != EXC_BF16) return EXC_F32;
    }
    return EXC_BF16;
}

static exc_packed take_packed(carve *c, int64_t n, int64_t k, int dtype) {
    return (exc_packed){take(c, exc_packed_bytes(n, k, dtype), 1), n, k, dtype};
}

static exc_packed take_role(carve *c, const exc_model *m, exc_role role, int64_t layer) {
    int64_t n, k;
    exc_shape_role(&m->atlas->shape, m->atlas->family, role, layer, &n, &k);
    return take_packed(c, n, k, packed_dtype(m, role, layer));
}

/* a vector of the role as f32; NULL where this layer has none */
static float *take_vector(carve *c, const exc_model *m, exc_role role, int64_t layer) {
    int64_t n, k;
    if (!exc_shape_role(&m->atlas->shape, m->atlas->family, role, layer, &n, &k)) return NULL;
    return take(c, (size_t)n, sizeof(float));
}

static exc_packed *take_group(carve *c, const exc_model *m, exc_role role, int64_t layer) {
    int64_t n, k, count = exc_role_by_expert(role) ? m->atlas->shape.experts : 1;
    exc_shape_role(&m->atlas->shape, m->atlas->family, role, layer, &n, &k);
    int dtype = packed_dtype(m, role, layer);
    exc_packed *p = take(c, (size_t)count, sizeof *p);
    for (int64_t e = 0; e < count; e++) {
        exc_packed one = take_packed(c, n, k, dtype);
        if (p) p[e] = one;
    }
    return p;
}

static void lay_out(carve *c, const exc_model *m, exc_loaded *l) {
    const exc_shape *s = &m->atlas->shape;
    size_t H = (size_t)s->hidden;
    int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    l->k_at = whole_panels(q);
    l->v_at = l->k_at + whole_panels(kv);
    l->qkv = l->v_at + whole_panels(kv);
    l->layer = take(c, (size_t)s->layers, sizeof *l->layer);
    l->norm_final = take(c, H, sizeof(float));
    l->inv_freq = take(c, (size_t)s->rotary / 2, sizeof(float));
    for (int64_t i = 0; i < s->layers; i++) {
        exc_layer local = {0}, *y = &local;
        int qkv = EXC_BF16;
        for (exc_role r = EXC_ROLE_ATTN_Q; r <= EXC_ROLE_ATTN_V; r++)
            if (packed_dtype(m, r, i) == EXC_F32) qkv = EXC_F32;
        y->qkv = take_packed(c, l->qkv, s->hidden, qkv);
        y->out = take_role(c, m, EXC_ROLE_ATTN_OUT, i);
        bool moe = s->is_moe[i];
        if (moe) y->router = take_role(c, m, EXC_ROLE_ROUTER, i);
        y->gate = take_group(c, m, moe ? EXC_ROLE_EXPERT_GATE : EXC_ROLE_DENSE_GATE, i);
        y->up = take_group(c, m, moe ? EXC_ROLE_EXPERT_UP : EXC_ROLE_DENSE_UP, i);
        y->down = take_group(c, m, moe ? EXC_ROLE_EXPERT_DOWN : EXC_ROLE_DENSE_DOWN, i);
        y->norm_in = take(c, H, sizeof(float));
        y->norm_post = take(c, H, sizeof(float));
        y->q_norm = take_vector(c, m, EXC_ROLE_ATTN_Q_NORM, i);
        y->k_norm = take_vector(c, m, EXC_ROLE_ATTN_K_NORM, i);
        y->router_bias = take_vector(c, m, EXC_ROLE_ROUTER_BIAS, i);
        if (s->qkv_bias) y->qkv_bias = take(c, (size_t)l->qkv, sizeof(float));
        if (moe && s->shared_inner) {
            y->shared_gate = take_role(c, m, EXC_ROLE_SHARED_GATE, i);
            y->shared_up = take_role(c, m, EXC_ROLE_SHARED_UP, i);
            y->shared_down = take_role(c, m, EXC_ROLE_SHARED_DOWN, i);
            if (m->atlas->family->shared_gated) y->shared_router = take_role(c, m, EXC_ROLE_SHARED_ROUTER, i);
        }
        if (l->layer) l->layer[i] = local;
    }
    const exc_weight *embed = exc_atlas_find(m->atlas, EXC_ROLE_EMBED, -1, -1);
    l->embed_dtype = embed->tensor->dtype;
    l->embed = take(c, (size_t)(s->vocab * s->hidden), exc_dtype_bits(embed->tensor->dtype) / 8);
    l->lm_head = take_role(c, m, s->tied ? EXC_ROLE_EMBED : EXC_ROLE_LM_HEAD, -1);
}

/* ------------------------------------------------------------------------------------------------------
 * reading */

/* advice on the pages that hold a weight; the edges are shared with neighbours, which may then be read again
 */
static void advise(const loader *r, const exc_weight *w, int advice) {
    const exc_tensor *t = w->tensor;
    const exc_tensors *f = r->a->files->files[t->shard];
    uint64_t first = t->begin / PAGE * PAGE;
    if (t->end - t->begin >= 4 * PAGE)
        madvise((void *)(uintptr_t)(f->map + first), (size_t)(t->end - first), advice);
}

/* starts reading the next layer while this one is packed */
static void read_ahead(const loader *r, int64_t layer) {
    for (size_t i = 0; i < r->a->count; i++)
        if (r->a->items[i].layer == layer) advise(r, &r->a->items[i], MADV_WILLNEED);
}

static exc_status call(exc_ctx *ctx, exc_status st, const char *op, const exc_weight *w) {
    if (st == EXC_OK) return EXC_OK;
    return exc_fail(ctx, st, "%s: op %s refused its arguments", w->tensor->name, op);
}

static exc_status not_finite(loader *r, const exc_weight *w, int64_t index, int64_t count) {
    char in[64] = "";
    if (w->in > 1)
        snprintf(in, sizeof in, " [%lld,%lld]", (long long)(index / w->in), (long long)(index % w->in));
    return exc_fail(
        r->ctx, EXC_ERR_NUMERIC,
        "%s: %s: expected finite weights, found NaN or infinity at element %lld%s (%lld in this block)",
        r->a->files->files[w->tensor->shard]->path, w->tensor->name, (long long)index, in, (long long)count);
}

/* bytes of a weight: the map itself, or a writable aligned copy where the plan edits it */
static exc_status source(loader *r, const exc_weight *w, const uint8_t **out) {
    const exc_tensor *t = w->tensor;
    size_t bytes = (size_t)(t->end - t->begin), unit = exc_dtype_bits(t->dtype) / 8;
    const uint8_t *data = exc_checkpoint_data(r->a->files, t);
    bool edit = r->m->has_lens && !r->m->is_virtual && r->m->lens.bake && r->m->lens.touches &&
                r->m->lens.touches(r->m->lens.user, w);
    if (edit || (uintptr_t)data % unit) {
        if (bytes > r->stage_bytes) {
            exc_release(r->stage);
            r->stage_bytes = 0;
            r->stage = exc_alloc(r->ctx, bytes, 1, "copy of a weight");
            if (!r->stage) return EXC_ERR_MEMORY;
            r->stage_bytes = bytes;
        }
        memcpy(r->stage, data, bytes);
        if (edit) EXC_TRY(r->m->lens.bake(r->ctx, r->m->lens.user, r->a, w, r->stage));
        data = r->stage;
    }
    *out = data;
    return EXC_OK;
}

/* scans and packs one matrix into whole panels starting at `out`, a block of rows at a time */
static exc_status pack_weight(loader *r, const exc_weight *w, int to, uint8_t *out) {
    exc_ctx *ctx = r->ctx;
    const exc_tensor *t = w->tensor;
    const uint8_t *data;
    EXC_TRY(source(r, w, &data));
    size_t row = (size_t)w->in * (exc_dtype_bits(t->dtype) / 8);
    int64_t rows = (int64_t)(BLOCK_BYTES / row) / EXC_PANEL * EXC_PANEL;
    if (rows < EXC_PANEL) rows = EXC_PANEL;
    size_t panel = exc_packed_bytes(EXC_PANEL, w->in, to);
    for (int64_t first = 0; first < w->out; first += rows) {
        int64_t n = w->out - first < rows ? w->out - first : rows, bad = 0, index = -1;
        const uint8_t *block = data + (size_t)first * row;
        EXC_TRY(call(ctx,
                     ctx->ops->convert(&ctx->queue, &(struct exc_convert_args){.src = block,
                                                                               .src_dtype = t->dtype,
                                                                               .dst = NULL,
                                                                               .dst_dtype = t->dtype,
                                                                               .n = n * w->in,
                                                                               .nonfinite = &bad,
                                                                               .index = &index}),
                     "convert", w));
        if (bad) return not_finite(r, w, first * w->in + index, bad);
        EXC_TRY(
            call(ctx,
                 ctx->ops->pack(&ctx->queue,
                                &(struct exc_pack_args){.w = block,
                                                        .w_dtype = t->dtype,
                                                        .n = n,
                                                        .k = w->in,
                                                        .to = to,
                                                        .out = out + (size_t)(first / EXC_PANEL) * panel}),
                 "pack", w));
    }
    r->done += t->end - t->begin;
    advise(r, w, MADV_DONTNEED); /* clean pages of a file: the cache keeps them, this process does not */
    return exc_progress(ctx, "load", r->done, r->total, "bytes");
}

/* a weight kept unpacked: norms (as f32) and the embedding (as stored) */
static exc_status copy_weight(loader *r, const exc_weight *w, int to, void *out) {
    exc_ctx *ctx = r->ctx;
    const uint8_t *data;
    EXC_TRY(source(r, w, &data));
    int64_t bad = 0, index = -1;
    EXC_TRY(call(ctx,
                 ctx->ops->convert(&ctx->queue, &(struct exc_convert_args){.src = data,
                                                                           .src_dtype = w->tensor->dtype,
                                                                           .dst = out,
                                                                           .dst_dtype = to,
                                                                           .n = w->out * w->in,
                                                                           .nonfinite = &bad,
                                                                           .index = &index}),
                 "convert", w));
    if (bad) return not_finite(r, w, index, bad);
    r->done += w->tensor->end - w->tensor->begin;
    advise(r, w, MADV_DONTNEED);
    return EXC_OK;
}

static exc_status load_role(loader *r, exc_role role, int64_t layer, const exc_packed *into) {
    const exc_weight *w = exc_atlas_find(r->a, role, layer, -1);
    return pack_weight(r, w, into->dtype, (uint8_t *)(uintptr_t)into->data);
}

static exc_status load_group(loader *r, exc_role role, int64_t layer, const exc_packed *into) {
    if (!exc_role_by_expert(role)) return load_role(r, role, layer, into);
    for (int64_t e = 0; e < r->a->shape.experts; e++) {
        const exc_weight *w = exc_atlas_find(r->a, role, layer, e);
        EXC_TRY(pack_weight(r, w, into[e].dtype, (uint8_t *)(uintptr_t)into[e].data));
    }
    return EXC_OK;
}

static exc_status load_vector(loader *r, exc_role role, int64_t layer, float *into) {
    return copy_weight(r, exc_atlas_find(r->a, role, layer, -1), EXC_F32, into);
}

/* biases of q, k and v stand where their outputs do; the columns between them are padding */
static exc_status load_bias(loader *r, int64_t layer, float *into) {
    memset(into, 0, (size_t)r->l->qkv * sizeof *into);
    EXC_TRY(load_vector(r, EXC_ROLE_ATTN_Q_BIAS, layer, into));
    EXC_TRY(load_vector(r, EXC_ROLE_ATTN_K_BIAS, layer, into + r->l->k_at));
    return load_vector(r, EXC_ROLE_ATTN_V_BIAS, layer, into + r->l->v_at);
}

static exc_status load_shared(loader *r, int64_t layer, exc_layer *y) {
    if (!y->shared_down.data) return EXC_OK;
    EXC_TRY(load_role(r, EXC_ROLE_SHARED_GATE, layer, &y->shared_gate));
    EXC_TRY(load_role(r, EXC_ROLE_SHARED_UP, layer, &y->shared_up));
    EXC_TRY(load_role(r, EXC_ROLE_SHARED_DOWN, layer, &y->shared_down));
    return y->shared_router.data ? load_role(r, EXC_ROLE_SHARED_ROUTER, layer, &y->shared_router) : EXC_OK;
}

static void ask_lens(const exc_model *m, exc_role role, int64_t layer, exc_virtual *v) {
    if (!m->has_lens || !m->is_virtual || !m->lens.project) return;
    v->on = m->lens.project(m->lens.user, role, layer, &v->basis, &v->rank, &v->strength, &v->scale);
}

static exc_status load_layer(loader *r, int64_t i) {
    exc_layer *y = &r->l->layer[i];
    bool moe = r->a->shape.is_moe[i];
    static const exc_role qkv[3] = {EXC_ROLE_ATTN_Q, EXC_ROLE_ATTN_K, EXC_ROLE_ATTN_V};
    int64_t at[3] = {0, r->l->k_at, r->l->v_at};
    size_t panel = exc_packed_bytes(EXC_PANEL, y->qkv.k, y->qkv.dtype);
    for (int j = 0; j < 3; j++) {
        uint8_t *out = (uint8_t *)(uintptr_t)y->qkv.data + (size_t)(at[j] / EXC_PANEL) * panel;
        EXC_TRY(pack_weight(r, exc_atlas_find(r->a, qkv[j], i, -1), y->qkv.dtype, out));
    }
    EXC_TRY(load_role(r, EXC_ROLE_ATTN_OUT, i, &y->out));
    if (moe) EXC_TRY(load_role(r, EXC_ROLE_ROUTER, i, &y->router));
    if (y->router_bias) EXC_TRY(load_vector(r, EXC_ROLE_ROUTER_BIAS, i, y->router_bias));
    if (y->qkv_bias) EXC_TRY(load_bias(r, i, y->qkv_bias));
    EXC_TRY(load_shared(r, i, y));
    EXC_TRY(load_group(r, moe ? EXC_ROLE_EXPERT_GATE : EXC_ROLE_DENSE_GATE, i, y->gate));
    EXC_TRY(load_group(r, moe ? EXC_ROLE_EXPERT_UP : EXC_ROLE_DENSE_UP, i, y->up));
    EXC_TRY(load_group(r, moe ? EXC_ROLE_EXPERT_DOWN : EXC_ROLE_DENSE_DOWN, i, y->down));
    EXC_TRY(load_vector(r, EXC_ROLE_NORM_IN, i, y->norm_in));
    EXC_TRY(load_vector(r, EXC_ROLE_NORM_POST, i, y->norm_post));
    if (y->q_norm) EXC_TRY(load_vector(r, EXC_ROLE_ATTN_Q_NORM, i, y->q_norm));
    if (y->k_norm) EXC_TRY(load_vector(r, EXC_ROLE_ATTN_K_NORM, i, y->k_norm));
    ask_lens(r->m, EXC_ROLE_ATTN_OUT, i, &y->attn_lens);
    ask_lens(r->m, EXC_ROLE_SHARED_DOWN, i, &y->shared_lens);
    ask_lens(r->m, moe ? EXC_ROLE_EXPERT_DOWN : EXC_ROLE_DENSE_DOWN, i, &y->mlp_lens);
    return EXC_OK;
}

static exc_status load_all(loader *r) {
    const exc_shape *s = &r->a->shape;
    for (size_t i = 0; i < r->a->count; i++)
        r->total += r->a->items[i].tensor->end - r->a->items[i].tensor->begin;
    read_ahead(r, -1);
    read_ahead(r, 0);
    const exc_weight *embed = exc_atlas_find(r->a, EXC_ROLE_EMBED, -1, -1);
    if (s->tied) r->total += embed->tensor->end - embed->tensor->begin; /* read twice: as table and as head */
    EXC_TRY(copy_weight(r, embed, embed->tensor->dtype, r->l->embed));
    for (int64_t i = 0; i < s->layers; i++) {
        read_ahead(r, i + 1);
        EXC_TRY(load_layer(r, i));
    }
    EXC_TRY(load_vector(r, EXC_ROLE_NORM_FINAL, -1, r->l->norm_final));
    EXC_TRY(load_role(r, s->tied ? EXC_ROLE_EMBED : EXC_ROLE_LM_HEAD, -1, &r->l->lm_head));
    double step = -2.0 / (double)s->rotary;
    for (int64_t i = 0; i < s->rotary / 2; i++)
        r->l->inv_freq[i] = (float)pow((double)s->rope_theta, step * (double)i);
    return exc_progress(r->ctx, "load", r->total, r->total, "bytes");
}

exc_status exc_load(exc_ctx *ctx, exc_model *m) {
    loader r = {.ctx = ctx, .m = m, .a = m->atlas};
    m->loaded = exc_zalloc(ctx, 1, sizeof *m->loaded, "weights");
    if (!m->loaded) return EXC_ERR_MEMORY;
    r.l = m->loaded;
    carve c = {0};
    lay_out(&c, m, m->loaded);
    if (c.overflow)
        return exc_fail(ctx, EXC_ERR_MEMORY, "%s: its weights are more than memory can address", m->dir);
    m->weight_bytes = c.at;
    m->loaded->slab = exc_alloc(ctx, c.at + 64, 1, "packed weights");
    if (!m->loaded->slab) return EXC_ERR_MEMORY;
    c = (carve){.base = m->loaded->slab};
    lay_out(&c, m, m->loaded);
    /* rows that pad q, k and v to whole panels are written by pack, which fills a last panel with zeros */
    exc_status st = load_all(&r);
    exc_release(r.stage);
    return st;
}

void exc_unload(exc_loaded *l) {
    if (!l) return;
    exc_release(l->slab);
    exc_release(l);
}

/* ------------------------------------------------------------------------------------------------- public
 * calls */

static exc_status open_model(exc_ctx *ctx, const char *dir, const exc_model_options *opt, exc_model *m) {
    m->ctx = ctx;
    m->compute = opt->compute;
    m->act = opt->compute == EXC_COMPUTE_F32 ? EXC_F32 : EXC_BF16;
    m->dir = exc_strdup(ctx, dir);
    if (!m->dir) return EXC_ERR_MEMORY;
    EXC_TRY(exc_atlas_open(ctx, dir, &m->atlas));
    if (opt->plan) {
        EXC_TRY(exc_lens_make(ctx, m->atlas, opt->plan, opt->lens, &m->lens));
        m->has_lens = 1;
        m->is_virtual = opt->lens == EXC_LENS_VIRTUAL;
    }
    return exc_load(ctx, m);
}

exc_status exc_model_open(exc_ctx *ctx, const char *dir, const exc_model_options *options, exc_model **out) {
    if (!ctx || !out) return EXC_ERR_USAGE;
    exc_clear(ctx);
    *out = NULL;
    exc_model_options opt = {.size = sizeof opt};
    if (!dir) return exc_fail(ctx, EXC_ERR_USAGE, "open: no model folder given");
    if (options) {
        if (options->size < sizeof options->size || options->size > sizeof opt)
            return exc_fail(ctx, EXC_ERR_USAGE, "open %s: options.size: expected at most %zu, found %zu", dir,
                            sizeof opt, options->size);
        memcpy(&opt, options, options->size);
    }
    if (opt.compute != EXC_COMPUTE_BF16 && opt.compute != EXC_COMPUTE_F32)
        return exc_fail(ctx, EXC_ERR_USAGE, "open %s: compute: expected bf16 or f32, found %d", dir,
                        (int)opt.compute);
    exc_model *m = exc_zalloc(ctx, 1, sizeof *m, "model");
    if (!m) return EXC_ERR_MEMORY;
    exc_status st = open_model(ctx, dir, &opt, m);
    if (st)
        exc_model_free(m);
    else
        *out = m;
    return st;
}

void exc_model_free(exc_model *m) {
    if (!m) return;
    exc_session_close(m->spare);
    if (m->lens.release) m->lens.release(m->lens.user);
    exc_unload(m->loaded);
    exc_atlas_close(m->atlas);
    exc_release(m->dir);
    exc_release(m);
}
