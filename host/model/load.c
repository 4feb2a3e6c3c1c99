/* load.c - opening a model: from mapped files to packed weights.
 *
 * Every matrix is packed once into the panels the matmul reads (17 GB/s of weights at 1-16 rows would be 6
 * unpacked), into one slab a layer and one for the rest, measured and carved by the same code. The files are read through
 * the map in blocks of rows that stay in cache: one look for NaN and infinity, one packing; a plan's baked
 * edits are made on a copy of the matrix in its stored dtype, so that they are the bits a written checkpoint
 * would have. Mapped pages are given back as we go, so the peak is the packed weights plus one staging block,
 * not twice the model. When layers are read is window.c's to say.
 *
 * bf16 weights stay bf16 in both compute modes (exact); f16 and f32 ones are rounded for bf16 and widened for
 * f32; quantised ones stay codes and scales, which the ops read. A panel has one scale for all its rows: where rows
 * are moved or parts share a block so that a panel's rows would need several (odd sizes), numbers are packed. */
#include <string.h>
#include <sys/mman.h>

#include "codes.h"
#include "session.h"

#define BLOCK_BYTES                                                                                          \
    ((size_t)1 << 20) /* source bytes of one scan-and-pack block: stays in the second-level cache */
#define HEAD_BYTES ((size_t)4 << 20)  /* of the head that are used at once before it is in its place */
#define SENT_BYTES ((size_t)32 << 20) /* of one that is sent to a device first */
#define ROW_ALIGN 128 /* rows of a block: whole panels, and whole blocks of scales */
#define PAGE ((uint64_t)4096)

static bool edited(const exc_model *m, const exc_weight *w) {
    return m->has_lens && !m->is_virtual && m->lens.bake && m->lens.touches && m->lens.touches(m->lens.user, w);
}

/* ops can read a weight where it lies in its file */
static bool lies_ready(const exc_model *m, const exc_weight *w) {
    bool plain = !exc_weight_coded(w) && exc_weight_dense(w) && !m->ctx->module && !m->made.rows;
    return plain && !edited(m, w) && (uintptr_t)exc_atlas_data(m->atlas, w) % (exc_dtype_bits((exc_dtype)w->dtype) / 8) == 0;
}

static const exc_weight *head_of(const exc_model *m) {
    return exc_atlas_find(m->atlas, m->atlas->shape.tied ? EXC_ROLE_EMBED : EXC_ROLE_LM_HEAD, -1, -1);
}

/* ------------------------------------------------------------------------------------------------------
 * layout */

/* the weights that no layer owns */
static void lay_out_ends(exc_carve *c, const exc_model *m, exc_loaded *l) {
    const exc_shape *s = &m->atlas->shape;
    l->norm_final = exc_carve_take(c, (size_t)s->hidden, sizeof(float));
    l->inv_freq = exc_carve_take(c, (size_t)s->rotary / 2, sizeof(float));
    const exc_weight *embed = exc_atlas_find(m->atlas, EXC_ROLE_EMBED, -1, -1);
    l->embed_dtype = embed->dtype;
    if (lies_ready(m, embed)) l->embed = exc_atlas_data(m->atlas, embed);
    else l->embed = exc_carve_take(c, (size_t)(s->vocab * s->hidden), exc_dtype_bits((exc_dtype)embed->dtype) / 8);
    l->lm_head = exc_carve_role(c, m, s->tied ? EXC_ROLE_EMBED : EXC_ROLE_LM_HEAD, -1);
}

static void lay_out_layer(exc_carve *c, const exc_model *m, exc_layer *y, int64_t i) {
    size_t H = (size_t)m->atlas->shape.hidden;
    *y = (exc_layer){0};
    exc_mixer_of(m->atlas->shape.mix[i])->carve(c, m, y, i);
    y->out = exc_carve_role(c, m, EXC_ROLE_ATTN_OUT, i);
    y->out_bias = exc_carve_vector(c, m, EXC_ROLE_ATTN_OUT_BIAS, i);
    y->norm_in = exc_carve_take(c, H, sizeof(float));
    y->norm_post = exc_carve_take(c, H, sizeof(float));
    y->attn_lens = exc_carve_lens(c, m, EXC_ROLE_ATTN_OUT, i);
    exc_feed_carve(c, m, y, i);
}

/* ------------------------------------------------------------------------------------------------------
 * reading */

/* advice on the pages that hold a weight; the edges are shared with neighbours, which may then be read again
 */
static void advise(const exc_loader *r, const exc_weight *w, int advice) {
    const exc_tensors *f = r->a->files->files[w->tensor->shard];
    uint64_t first = w->begin / PAGE * PAGE;
    if (r->m->made.rows) return; /* its bytes are not read */
    if (w->end - w->begin >= 4 * PAGE)
        madvise((void *)(uintptr_t)(f->map + first), (size_t)(w->end - first), advice);
}

/* weights of other ranks' experts are not read */
static bool is_mine(const exc_loader *r, const exc_weight *w) {
    return w->expert < 0 || (w->expert >= r->m->expert_first && w->expert < r->m->expert_end);
}

/* starts reading the next layer while this one is packed */
static void read_ahead(const exc_loader *r, int64_t layer) {
    for (size_t i = 0; i < r->a->count; i++)
        if (r->a->items[i].layer == layer && is_mine(r, &r->a->items[i])) advise(r, &r->a->items[i], MADV_WILLNEED);
}

static exc_status call(exc_ctx *ctx, exc_status st, const char *op, const exc_weight *w) {
    if (st == EXC_OK) return EXC_OK;
    return exc_fail(ctx, st, "%s: op %s refused its arguments", w->tensor->name, op);
}

static exc_status not_finite(exc_loader *r, const exc_weight *w, int64_t index, int64_t count) {
    char in[64] = "", name[256];
    if (w->in > 1)
        snprintf(in, sizeof in, " [%lld,%lld]", (long long)(index / w->in), (long long)(index % w->in));
    return exc_fail(
        r->ctx, EXC_ERR_NUMERIC,
        "%s: %s: expected finite weights, found NaN or infinity at element %lld%s (%lld in this block)",
        r->a->files->files[w->tensor->shard]->path, exc_weight_label(w, name, sizeof name), (long long)index, in,
        (long long)count);
}

/* bytes that are copied as one: two fp4 */
static size_t unit_of(const exc_weight *w) { return w->dtype == EXC_F4 ? 1 : exc_dtype_bits((exc_dtype)w->dtype) / 8; }

/* a buffer of at least `bytes`, its old content lost: for the host, and for ops */
static exc_status enlarge(exc_loader *r, exc_stage *s, size_t bytes) {
    if (bytes <= s->bytes) return EXC_OK;
    exc_release(s->data);
    s->bytes = 0;
    s->data = exc_alloc(r->ctx, bytes, 1, "copy of a weight");
    if (!s->data) return EXC_ERR_MEMORY;
    s->bytes = bytes;
    return EXC_OK;
}

static exc_status enlarge_there(exc_loader *r, exc_stage *s, size_t bytes) {
    void *p;
    if (bytes <= s->bytes) return EXC_OK;
    exc_device_release(r->ctx, s->data);
    *s = (exc_stage){0};
    EXC_TRY(exc_device_alloc(r->ctx, bytes, 1, "copy of a weight", &p));
    *s = (exc_stage){p, bytes};
    return EXC_OK;
}

/* bytes of the host where ops find them: themselves on the CPU, else a copy in `block` */
static exc_status send(exc_loader *r, exc_stage *block, const void *host, size_t bytes, const uint8_t **out) {
    *out = host;
    if (!r->ctx->module || !host) return EXC_OK;
    EXC_TRY(enlarge_there(r, block, bytes));
    *out = block->data;
    return exc_device_put(r->ctx, block->data, host, bytes);
}

/* dense [out,in] of a weight that lies otherwise; rows of fp4 are whole bytes */
static exc_status straighten(exc_loader *r, const exc_weight *w, const uint8_t **data) {
    EXC_TRY(enlarge(r, &r->dense, (size_t)exc_weight_bytes(w)));
    int64_t per_unit = w->dtype == EXC_F4 ? 2 : 1;
    struct exc_view_args a = {.src = *data, .src_row = w->out_step / per_unit, .src_column = w->in_step, .dst = r->dense.data,
                              .dst_row = w->in / per_unit, .dst_column = 1, .rows = w->out, .columns = w->in / per_unit,
                              .unit = unit_of(w)};
    *data = r->dense.data;
    return call(r->ctx, exc_cpu_view(&r->ctx->queue, &a), "view", w);
}

/* bytes of a weight [out,in] for the host: the map itself, or an aligned copy that the plan edited or that was straightened; and its scales */
static exc_status source(exc_loader *r, const exc_weight *w, const uint8_t **out, const uint8_t **scale) {
    const uint8_t *data = exc_atlas_data(r->a, w);
    bool edit = edited(r->m, w);
    *scale = NULL;
    if (exc_weight_coded(w)) {
        EXC_TRY(enlarge(r, &r->scale, exc_weight_scale_bytes(w)));
        exc_scale_gather(w, r->a->files->files[w->scale->shard]->map + w->scale_begin, r->scale.data);
        *scale = r->scale.data;
    }
    if (edit || (uintptr_t)data % unit_of(w)) {
        EXC_TRY(enlarge(r, &r->stage, exc_weight_span(w)));
        memcpy(r->stage.data, data, exc_weight_span(w));
        if (edit) EXC_TRY(r->m->lens.bake(r->ctx, r->m->lens.user, r->a, w, r->stage.data, r->scale.data));
        data = r->stage.data;
    }
    *out = data;
    return exc_weight_dense(w) ? EXC_OK : straighten(r, w, out);
}

/* the host looks for NaN and infinity in `n` rows of a weight from row `first` on, and for scales that are none or make one */
static exc_status scan(exc_loader *r, const exc_weight *w, const uint8_t *rows, const uint8_t *scale, int64_t first,
                       int64_t n) {
    exc_ctx *ctx = r->ctx;
    int64_t bad = 0, index = -1;
    struct exc_widen_args coded = {.src = rows, .dtype = w->dtype, .scale = scale, .scale_dtype = w->scale_dtype, .rows = n,
                                   .cols = w->in, .nonfinite = &bad, .index = &index};
    struct exc_convert_args plain = {.src = rows, .src_dtype = w->dtype, .dst_dtype = w->dtype, .n = n * w->in,
                                     .nonfinite = &bad, .index = &index};
    if (exc_weight_coded(w)) EXC_TRY(call(ctx, exc_cpu_widen(&ctx->queue, &coded), "widen", w));
    else EXC_TRY(call(ctx, exc_cpu_convert(&ctx->queue, &plain), "convert", w));
    return bad ? not_finite(r, w, first * w->in + index, bad) : EXC_OK;
}

/* what a weight cost, and its clean pages of a file: the cache keeps them, this process does not */
static exc_status leave(exc_loader *r, const exc_weight *w) {
    r->done += exc_weight_bytes(w);
    advise(r, w, MADV_DONTNEED);
    if (!r->total) return EXC_OK; /* not the opening of a model */
    return exc_progress(r->ctx, "load", r->done, r->total, "bytes");
}

/* how many rows from `first` on, at most `most`, ops can take at once: scales begin with a block */
static int64_t rows_from(const exc_weight *w, int64_t first, int64_t most) {
    int64_t n = w->out - first < most ? w->out - first : most, run = w->scale_first && !first ? exc_scale_run(w, 0) : n;
    return n < run ? n : run;
}

static size_t row_bytes(const exc_weight *w) { return (size_t)w->in * exc_dtype_bits((exc_dtype)w->dtype) / 8; }

/* rows of a block that is looked at and packed at once */
static int64_t block_rows(const exc_loader *r, const exc_weight *w) {
    int64_t rows = (int64_t)((r->ctx->module ? SENT_BYTES : BLOCK_BYTES) / row_bytes(w)) / ROW_ALIGN * ROW_ALIGN;
    return rows < ROW_ALIGN ? ROW_ALIGN : rows;
}

/* rows of a weight where ops run: looked at and sent, or made there */
static exc_status bring(exc_loader *r, const exc_weight *w, const uint8_t *data, const uint8_t *scale, int64_t first, int64_t n,
                        const uint8_t **out) {
    const exc_made *made = &r->m->made;
    size_t row = row_bytes(w), at = (size_t)first * row;
    *out = NULL;
    if (made->rows) {
        if (exc_weight_coded(w)) return exc_fail(r->ctx, EXC_ERR_USAGE, "%s: expected a plain weight to make, found a quantised one", w->tensor->name);
        EXC_TRY(enlarge_there(r, &r->codes, (size_t)n * row));
        *out = r->codes.data;
        return made->rows(r->ctx, made->user, w, first, n, r->codes.data);
    }
    EXC_TRY(scan(r, w, data + at, scale, first, n));
    return send(r, &r->codes, data + at, (size_t)n * row, out);
}

/* the numbers of a quantised weight, f32, where ops run; it is scanned for NaN and infinity */
static exc_status decode(exc_loader *r, const exc_weight *w, const uint8_t *data, const uint8_t *scale, const uint8_t **out) {
    const uint8_t *codes, *scales;
    EXC_TRY(send(r, &r->codes, data, (size_t)exc_weight_bytes(w), &codes));
    EXC_TRY(send(r, &r->scales, scale, exc_weight_scale_bytes(w), &scales));
    EXC_TRY(enlarge_there(r, &r->wide, (size_t)(w->out * w->in) * sizeof(float)));
    for (int64_t first = 0, n; first < w->out; first += n) {
        n = rows_from(w, first, w->out);
        size_t at = (size_t)first * row_bytes(w), of_scales = exc_scale_offset(w, first);
        struct exc_widen_args a = {.src = codes + at, .dtype = w->dtype, .scale = scales + of_scales, .scale_dtype = w->scale_dtype,
                                   .rows = n, .cols = w->in, .dst = r->wide.data + (size_t)(first * w->in) * sizeof(float),
                                   .dst_dtype = EXC_F32};
        EXC_TRY(scan(r, w, data + at, scale + of_scales, first, n));
        EXC_TRY(call(r->ctx, r->ctx->ops->widen(&r->ctx->queue, &a), "widen", w));
    }
    *out = r->wide.data;
    return EXC_OK;
}

/* packs a weight whose blocks of scales end within panels */
static exc_status pack_numbers(exc_loader *r, const exc_weight *w, const uint8_t *data, const uint8_t *scale, int to, uint8_t *out) {
    EXC_TRY(decode(r, w, data, scale, &data));
    struct exc_pack_args a = {.w = data, .w_dtype = EXC_F32, .n = w->out, .k = w->in, .to = to, .out = out};
    EXC_TRY(call(r->ctx, r->ctx->ops->pack(&r->ctx->queue, &a), "pack", w));
    return leave(r, w);
}

/* scans and packs rows from whole panels on into those from `out` on, a block at a time; scales: where ops run */
static exc_status pack_rows(exc_loader *r, const exc_weight *w, const uint8_t *data, const uint8_t *scale, const uint8_t *scales,
                            int64_t begin, int64_t end, int to, uint8_t *out) {
    exc_ctx *ctx = r->ctx;
    const uint8_t *codes;
    size_t panel = exc_packed_bytes(EXC_PANEL, w->in, to);
    int64_t rows = block_rows(r, w);
    for (int64_t first = begin, n; first < end; first += n) {
        n = rows_from(w, first, end - first < rows ? end - first : rows);
        size_t of_scales = scale ? exc_scale_offset(w, first) : 0;
        EXC_TRY(bring(r, w, data, scale ? scale + of_scales : NULL, first, n, &codes));
        struct exc_pack_args a = {.w = codes, .w_dtype = w->dtype, .n = n, .k = w->in, .to = to,
                                  .out = out + (size_t)((first - begin) / EXC_PANEL) * panel,
                                  .scale = scale ? scales + of_scales : NULL, .scale_dtype = w->scale_dtype};
        EXC_TRY(call(ctx, ctx->ops->pack(&ctx->queue, &a), "pack", w));
    }
    return EXC_OK;
}

/* one matrix, in whole panels from `out` on */
static exc_status pack_weight(exc_loader *r, const exc_weight *w, int to, uint8_t *out) {
    const uint8_t *data, *scale, *scales;
    EXC_TRY(source(r, w, &data, &scale));
    if (exc_weight_coded(w) && !exc_keeps_codes(w)) return pack_numbers(r, w, data, scale, to, out);
    EXC_TRY(send(r, &r->scales, scale, exc_weight_scale_bytes(w), &scales));
    EXC_TRY(pack_rows(r, w, data, scale, scales, 0, w->out, to, out));
    return leave(r, w);
}

/* a weight that stays where it lies */
static exc_status look_through(exc_loader *r, const exc_weight *w) {
    const uint8_t *data = exc_atlas_data(r->a, w);
    int64_t rows = block_rows(r, w);
    for (int64_t first = 0, n; first < w->out; first += n) {
        n = rows_from(w, first, rows);
        EXC_TRY(scan(r, w, data + (size_t)first * row_bytes(w), NULL, first, n));
        advise(r, w, MADV_DONTNEED);
    }
    return leave(r, w);
}

/* a weight kept unpacked: norms (as f32) and the embedding (as stored); these are never quantised */
static exc_status copy_weight(exc_loader *r, const exc_weight *w, int to, void *out) {
    exc_ctx *ctx = r->ctx;
    const uint8_t *data, *scale, *numbers;
    EXC_TRY(source(r, w, &data, &scale));
    size_t row_out = (size_t)w->in * exc_dtype_bits((exc_dtype)to) / 8;
    int64_t rows = block_rows(r, w);
    for (int64_t first = 0, n; first < w->out; first += n) {
        n = rows_from(w, first, rows);
        EXC_TRY(bring(r, w, data, NULL, first, n, &numbers));
        struct exc_convert_args a = {.src = numbers, .src_dtype = w->dtype, .dst = (uint8_t *)out + (size_t)first * row_out,
                                     .dst_dtype = to, .n = n * w->in};
        EXC_TRY(call(ctx, ctx->ops->convert(&ctx->queue, &a), "convert", w));
    }
    r->done += exc_weight_bytes(w);
    advise(r, w, MADV_DONTNEED);
    return EXC_OK;
}

exc_status exc_fill_rows(exc_loader *r, exc_role role, int64_t layer, const exc_packed *into, int64_t row) {
    size_t at = (size_t)(row / EXC_PANEL) * exc_packed_bytes(EXC_PANEL, into->k, into->dtype);
    return pack_weight(r, exc_atlas_find(r->a, role, layer, -1), into->dtype, (uint8_t *)(uintptr_t)into->data + at);
}

exc_status exc_fill_role(exc_loader *r, exc_role role, int64_t layer, const exc_packed *into) {
    return exc_fill_rows(r, role, layer, into, 0);
}

exc_status exc_fill_some(exc_loader *r, exc_role role, int64_t layer, const exc_table *into, int64_t first, int64_t n) {
    bool many = exc_role_by_expert(role);
    for (int64_t e = first; e < first + n; e++) {
        const exc_weight *w = exc_atlas_find(r->a, role, layer, many ? r->m->expert_first + e : -1);
        EXC_TRY(pack_weight(r, w, into->here[e].dtype, (uint8_t *)(uintptr_t)into->here[e].data));
    }
    return EXC_OK;
}

exc_status exc_fill_group(exc_loader *r, exc_role role, int64_t layer, const exc_table *into) {
    EXC_TRY(exc_fill_some(r, role, layer, into, 0, into->count));
    return exc_fill_table(r, into);
}

exc_status exc_fill_table(exc_loader *r, const exc_table *t) {
    return exc_device_put(r->ctx, t->there, t->here, (size_t)t->count * sizeof *t->here);
}

exc_status exc_fill_vector(exc_loader *r, exc_role role, int64_t layer, float *into) {
    bool many = exc_role_by_expert(role);
    for (int64_t e = 0; e < (many ? r->a->shape.experts : 1); e++) {
        const exc_weight *w = exc_atlas_find(r->a, role, layer, many ? e : -1);
        EXC_TRY(copy_weight(r, w, EXC_F32, into + e * w->out));
    }
    return EXC_OK;
}

exc_status exc_fill_open(exc_loader *r, exc_role role, int64_t layer, bool codes, exc_matrix *out) {
    const exc_weight *w = exc_atlas_find(r->a, role, layer, -1);
    const uint8_t *data, *scale;
    *out = (exc_matrix){.weight = w, .dtype = w->dtype};
    EXC_TRY(source(r, w, &data, &scale));
    if (exc_weight_coded(w) && codes) {
        EXC_TRY(scan(r, w, data, scale, 0, w->out));
        EXC_TRY(send(r, &r->codes, data, (size_t)exc_weight_bytes(w), &out->data));
        return send(r, &r->scales, scale, exc_weight_scale_bytes(w), &out->scale);
    }
    if (exc_weight_coded(w)) {
        out->dtype = EXC_F32;
        return decode(r, w, data, scale, &out->data);
    }
    return bring(r, w, data, scale, 0, w->out, &out->data);
}

/* elements [rows,columns] at steps of `unit` bytes, as an array without gaps: `from` itself, or the copy */
static exc_status take_view(exc_loader *r, const exc_weight *w, exc_stage *copy, const uint8_t *from, int64_t row_step, int64_t column_step,
                            int64_t rows, int64_t columns, size_t unit, const uint8_t **out) {
    *out = from;
    if (row_step == columns && column_step == 1) return EXC_OK;
    EXC_TRY(enlarge_there(r, copy, (size_t)(rows * columns) * unit));
    struct exc_view_args v = {.src = from, .src_row = row_step, .src_column = column_step, .dst = copy->data,
                              .dst_row = columns, .dst_column = 1, .rows = rows, .columns = columns, .unit = unit};
    *out = copy->data;
    return call(r->ctx, r->ctx->ops->view(&r->ctx->queue, &v), "view", w);
}

exc_status exc_fill_view(exc_loader *r, const exc_matrix *m, int64_t first, int64_t row_step, int64_t column_step,
                         const exc_packed *into) {
    const exc_weight *w = m->weight;
    size_t unit = exc_dtype_bits(m->dtype) / 8;
    struct exc_pack_args a = {.w_dtype = m->dtype, .n = into->n, .k = into->k, .to = into->dtype, .out = (void *)(uintptr_t)into->data};
    const uint8_t *data, *scale = NULL;
    EXC_TRY(take_view(r, w, &r->part, m->data + (size_t)first * unit, row_step, column_step, into->n, into->k, unit, &data));
    if (m->scale) { /* the blocks lie as the elements do */
        int64_t rows, columns, along = row_step == w->in;
        exc_weight_scales(w, &rows, &columns);
        unit = exc_dtype_bits((exc_dtype)w->scale_dtype) / 8;
        int64_t block = first / w->in / EXC_BLOCK * columns + first % w->in / EXC_BLOCK;
        EXC_TRY(take_view(r, w, &r->part_scales, m->scale + (size_t)block * unit, along ? columns : 1, along ? 1 : columns,
                          (into->n + EXC_BLOCK - 1) / EXC_BLOCK, (into->k + EXC_BLOCK - 1) / EXC_BLOCK, unit, &scale));
        a.scale_dtype = w->scale_dtype;
    }
    a.w = data;
    a.scale = scale;
    return call(r->ctx, r->ctx->ops->pack(&r->ctx->queue, &a), "pack", w);
}

static exc_status move_rows(exc_ctx *ctx, const exc_matrix *m, const exc_moved *v, uint8_t *to) {
    size_t row = (size_t)m->weight->in * exc_dtype_bits((exc_dtype)m->dtype) / 8;
    for (int64_t i = 0; i < v->count; i++)
        EXC_TRY(exc_device_copy(ctx, to + (size_t)(v->to + i * v->to_step) * row,
                                m->data + (size_t)(v->from + i * v->from_step) * row, (size_t)v->rows * row));
    return EXC_OK;
}

/* packs rows that were moved: those under one row of scales at once */
static exc_status pack_moved(exc_loader *r, const exc_matrix *m, const uint8_t *scale, const exc_moved *moved, size_t n, int64_t rows,
                             const exc_packed *into, uint8_t *out) {
    exc_ctx *ctx = r->ctx;
    size_t row = (size_t)into->k * exc_dtype_bits((exc_dtype)m->dtype) / 8, panel = exc_packed_bytes(EXC_PANEL, into->k, into->dtype);
    for (int64_t first = 0, end; first < rows; first = end) {
        int64_t at = scale ? exc_scales_of_panel(m->weight, moved, n, first / EXC_PANEL) : EXC_SCALES_NONE;
        for (end = first + EXC_PANEL; end < rows && end < first + ROW_ALIGN && scale; end += EXC_PANEL)
            if (exc_scales_of_panel(m->weight, moved, n, end / EXC_PANEL) != at) break;
        if (end > rows || !scale) end = rows;
        struct exc_pack_args a = {.w = r->part.data + (size_t)first * row, .w_dtype = m->dtype, .n = end - first, .k = into->k, .to = into->dtype,
                                  .out = out + (size_t)(first / EXC_PANEL) * panel, .scale = scale && at != EXC_SCALES_NONE ? scale + at : scale,
                                  .scale_dtype = m->weight->scale_dtype};
        EXC_TRY(call(ctx, ctx->ops->pack(&ctx->queue, &a), "pack", m->weight));
    }
    return EXC_OK;
}

exc_status exc_fill_moved(exc_loader *r, exc_role role, int64_t layer, const exc_moved *moved, size_t n, int64_t rows,
                          const exc_packed *into, int64_t at) {
    exc_matrix m;
    const exc_weight *w = exc_atlas_find(r->a, role, layer, -1);
    EXC_TRY(exc_fill_open(r, role, layer, w->dtype == into->dtype, &m));
    size_t bytes = (size_t)(rows * into->k) * exc_dtype_bits((exc_dtype)m.dtype) / 8;
    EXC_TRY(enlarge_there(r, &r->part, bytes));
    EXC_TRY(exc_device_zero(r->ctx, r->part.data, bytes));
    for (size_t i = 0; i < n; i++) EXC_TRY(move_rows(r->ctx, &m, &moved[i], r->part.data));
    uint8_t *out = (uint8_t *)(uintptr_t)into->data + (size_t)(at / EXC_PANEL) * exc_packed_bytes(EXC_PANEL, into->k, into->dtype);
    EXC_TRY(pack_moved(r, &m, m.scale, moved, n, rows, into, out));
    return exc_fill_close(r, &m);
}

exc_status exc_fill_turned(exc_loader *r, exc_role role, int64_t layer, float *into) {
    const exc_weight *w = exc_atlas_find(r->a, role, layer, -1);
    EXC_TRY(enlarge_there(r, &r->part, (size_t)(w->out * w->in) * sizeof *into));
    EXC_TRY(copy_weight(r, w, EXC_F32, r->part.data));
    struct exc_view_args a = {.src = r->part.data, .src_row = 1, .src_column = w->in, .dst = into, .dst_row = w->out,
                              .dst_column = 1, .rows = w->in, .columns = w->out, .unit = sizeof *into};
    return call(r->ctx, r->ctx->ops->view(&r->ctx->queue, &a), "view", w);
}

exc_status exc_fill_close(exc_loader *r, const exc_matrix *m) { return leave(r, m->weight); }

exc_status exc_fill_lens(exc_loader *r, exc_role role, int64_t layer, const exc_virtual *v) {
    const exc_virtual from = exc_lens_of(r->m, role, layer);
    size_t n = exc_role_by_expert(role) ? (size_t)r->a->shape.experts : 1;
    size_t basis = (size_t)(v->rank * r->a->shape.hidden) * sizeof *v->basis;
    if (v->basis) EXC_TRY(exc_device_put(r->ctx, (void *)(uintptr_t)v->basis, from.basis, basis));
    if (v->strength) EXC_TRY(exc_device_put(r->ctx, (void *)(uintptr_t)v->strength, from.strength, n * sizeof *v->strength));
    return v->scale ? exc_device_put(r->ctx, (void *)(uintptr_t)v->scale, from.scale, n * sizeof *v->scale) : EXC_OK;
}

static exc_status fill_layer(exc_loader *r, exc_layer *y, int64_t i) {
    EXC_TRY(exc_mixer_of(r->a->shape.mix[i])->fill(r, y, i));
    EXC_TRY(exc_fill_role(r, EXC_ROLE_ATTN_OUT, i, &y->out));
    if (y->out_bias) EXC_TRY(exc_fill_vector(r, EXC_ROLE_ATTN_OUT_BIAS, i, y->out_bias));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_NORM_IN, i, y->norm_in));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_NORM_POST, i, y->norm_post));
    EXC_TRY(exc_fill_lens(r, EXC_ROLE_ATTN_OUT, i, &y->attn_lens));
    return exc_feed_fill(r, y, i);
}

static exc_status fill_frequencies(exc_loader *r) {
    const exc_shape *s = &r->a->shape;
    size_t bytes = (size_t)(s->rotary / 2) * sizeof(float);
    EXC_TRY(enlarge(r, &r->stage, bytes));
    exc_rope_frequencies(&s->rope, s->rotary, (float *)(void *)r->stage.data);
    return exc_device_put(r->ctx, r->m->loaded->inv_freq, r->stage.data, bytes);
}

static exc_status fill_ends(exc_loader *r) {
    const exc_shape *s = &r->a->shape;
    const exc_weight *embed = exc_atlas_find(r->a, EXC_ROLE_EMBED, -1, -1);
    exc_loaded *l = r->m->loaded;
    if (lies_ready(r->m, embed)) EXC_TRY(look_through(r, embed));
    else EXC_TRY(copy_weight(r, embed, embed->dtype, (void *)(uintptr_t)l->embed));
    EXC_TRY(exc_fill_vector(r, EXC_ROLE_NORM_FINAL, -1, l->norm_final));
    EXC_TRY(fill_frequencies(r));
    const exc_weight *head = head_of(r->m);
    l->head_due = lies_ready(r->m, head) ? 2 : 0;
    if (!l->head_due) return pack_weight(r, head, l->lm_head.dtype, (uint8_t *)(uintptr_t)l->lm_head.data);
    return s->tied ? EXC_OK : look_through(r, head);
}

/* in the place of its first panels, as long as the head is not in its place */
static exc_status piece_of_head(exc_loader *r, int64_t first, exc_packed *out) {
    const exc_weight *w = head_of(r->m);
    int64_t n = (int64_t)(HEAD_BYTES / row_bytes(w)), half = (w->out + 1) / 2, left = w->out - first;
    n = exc_whole_panels(n < half ? n : half);
    *out = r->m->loaded->lm_head;
    out->n = n < left ? n : left;
    EXC_TRY(pack_rows(r, w, exc_atlas_data(r->a, w), NULL, NULL, first, first + out->n, out->dtype, (uint8_t *)(uintptr_t)out->data));
    return leave(r, w);
}

exc_status exc_head_at(exc_ctx *ctx, exc_model *m, int64_t first, exc_packed *out) {
    exc_loaded *l = m->loaded;
    exc_loader r = {.ctx = ctx, .m = m, .a = m->atlas};
    exc_status st = EXC_OK;
    *out = l->lm_head;
    if (!l->head_due) return st;
    if (l->head_due == 2) st = piece_of_head(&r, first, out);
    else st = pack_weight(&r, head_of(m), out->dtype, (uint8_t *)(uintptr_t)out->data);
    if (st == EXC_OK && first + out->n == l->lm_head.n) l->head_due--;
    exc_loader_release(&r);
    return st;
}

exc_status exc_layer_fill(exc_loader *r, exc_place *p, int64_t layer, exc_extent extent) {
    exc_carve c = exc_carve_measure(r->ctx);
    c.base = p->slab.ops;
    c.host = p->slab.host;
    c.turns = p == &r->m->loaded->passing;
    lay_out_layer(&c, r->m, &p->y, layer);
    if (extent == EXC_LAYER_DOWN) return exc_feed_fill_down(r, &p->y, layer);
    read_ahead(r, layer + 1);
    return fill_layer(r, &p->y, layer);
}

static exc_status load_all(exc_loader *r) {
    exc_loaded *l = r->m->loaded;
    bool fill = !exc_window_waits(r->m);
    for (size_t i = 0; i < r->a->count; i++)
        if (is_mine(r, &r->a->items[i]) && (fill || r->a->items[i].layer < 0)) r->total += exc_weight_bytes(&r->a->items[i]);
    if (r->a->shape.tied) r->total += exc_weight_bytes(exc_atlas_find(r->a, EXC_ROLE_EMBED, -1, -1)); /* as table and as head */
    read_ahead(r, -1);
    read_ahead(r, 0);
    EXC_TRY(fill_ends(r));
    for (int64_t i = 0; fill && i < l->layers; i++) {
        EXC_TRY(exc_layer_fill(r, &l->place[i], i, EXC_LAYER_WHOLE));
        l->place[i].layer = i;
        l->fills++;
    }
    return exc_progress(r->ctx, "load", r->total, r->total, "bytes");
}

static exc_status make_slab(exc_ctx *ctx, exc_model *m, exc_carve *c, exc_slab *slab) {
    EXC_TRY(exc_slab_make(ctx, c, "packed weights", slab));
    exc_memory_take(ctx, slab->bytes);
    m->weight_bytes += slab->bytes;
    return EXC_OK;
}

void exc_layer_drop(exc_ctx *ctx, exc_model *m, exc_slab *slab) {
    exc_memory_give(ctx, slab->bytes);
    m->weight_bytes -= slab->bytes;
    exc_slab_free(ctx, slab);
}

exc_status exc_layer_room(exc_ctx *ctx, exc_model *m, int64_t layer, exc_slab *slab) {
    exc_carve c = exc_carve_measure(ctx);
    exc_layer y;
    if (layer >= 0) lay_out_layer(&c, m, &y, layer);
    else c.at = m->loaded->largest, c.host_at = m->loaded->largest_host;
    return make_slab(ctx, m, &c, slab);
}

/* how large everything is; the places of layers are for window.c to choose */
static exc_status measure(exc_ctx *ctx, exc_model *m) {
    exc_loaded *l = m->loaded;
    exc_carve ends = exc_carve_measure(ctx);
    lay_out_ends(&ends, m, l);
    l->layers = m->atlas->shape.layers;
    l->ends_bytes = ends.at;
    bool overflow = ends.overflow;
    for (int64_t i = 0; i < l->layers; i++) {
        exc_carve c = exc_carve_measure(ctx);
        exc_layer y;
        lay_out_layer(&c, m, &y, i);
        if (c.at > l->largest) l->largest = c.at, l->largest_layer = i;
        if (c.host_at > l->largest_host) l->largest_host = c.host_at;
        overflow |= c.overflow || __builtin_add_overflow(l->all_bytes, c.at, &l->all_bytes);
    }
    if (overflow) return exc_fail(ctx, EXC_ERR_MEMORY, "%s: its weights are more than memory can address", m->dir);
    return EXC_OK;
}

void exc_loader_release(exc_loader *r) {
    exc_stage *here[] = {&r->stage, &r->dense, &r->scale}, *there[] = {&r->codes, &r->scales, &r->part, &r->part_scales, &r->wide};
    for (size_t i = 0; i < EXC_COUNT(here); i++) exc_release(here[i]->data);
    for (size_t i = 0; i < EXC_COUNT(there); i++) exc_device_release(r->ctx, there[i]->data);
}

exc_status exc_load(exc_ctx *ctx, exc_model *m) {
    exc_loader r = {.ctx = ctx, .m = m, .a = m->atlas};
    int64_t places;
    m->loaded = exc_zalloc(ctx, 1, sizeof *m->loaded, "weights");
    if (!m->loaded) return EXC_ERR_MEMORY;
    EXC_TRY(measure(ctx, m));
    EXC_TRY(exc_ranks_agree(ctx, "places of layers", exc_budget_places(ctx, m, &places)));
    EXC_TRY(exc_windows_agree(ctx));
    EXC_TRY(exc_ranks_least(ctx, "places of layers", &places, 1));
    exc_carve c = exc_carve_measure(ctx);
    lay_out_ends(&c, m, m->loaded);
    EXC_TRY(make_slab(ctx, m, &c, &m->loaded->ends));
    lay_out_ends(&c, m, m->loaded);
    EXC_TRY(exc_ranks_agree(ctx, "weights", exc_window_open(ctx, m, places)));
    exc_status st = exc_ranks_agree(ctx, "load", load_all(&r));
    exc_loader_release(&r);
    return st;
}

void exc_unload(exc_ctx *ctx, exc_model *m) {
    if (!m->loaded) return;
    exc_window_close(ctx, m);
    exc_layer_drop(ctx, m, &m->loaded->ends);
    exc_release(m->loaded);
    m->loaded = NULL;
}

/* ------------------------------------------------------------------------------------------------- public
 * calls */

static exc_status open_model(exc_ctx *ctx, const char *dir, const exc_model_options *opt, const exc_made *made, exc_model *m) {
    m->ctx = ctx;
    if (made) m->made = *made;
    m->next = ctx->models;
    ctx->models = m;
    m->compute = opt->compute;
    m->act = opt->compute == EXC_COMPUTE_F32 ? EXC_F32 : EXC_BF16;
    m->dir = exc_strdup(ctx, dir);
    if (!m->dir) return EXC_ERR_MEMORY;
    EXC_TRY(exc_atlas_open_same(ctx, dir, (uint64_t)opt->compute, &m->atlas));
    /* A rank holds whole experts, and all else as every rank does. So whatever an edit needs of a matrix, lengths of its rows and columns
     * to keep too, is on the rank that edits it: no edit needs a word of another rank. */
    exc_share(m->atlas->shape.experts, exc_ranks_me(ctx), exc_ranks_count(ctx), &m->expert_first, &m->expert_end);
    if (m->expert_first == m->expert_end)
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: ranks: expected at most %lld, one for each expert, found %d", dir,
                        (long long)m->atlas->shape.experts, exc_ranks_count(ctx));
    if (opt->plan) {
        EXC_TRY(exc_lens_make(ctx, m->atlas, opt->plan, opt->lens, &m->lens));
        m->has_lens = 1;
        m->is_virtual = opt->lens == EXC_LENS_VIRTUAL;
    }
    return exc_load(ctx, m);
}

exc_status exc_model_open(exc_ctx *ctx, const char *dir, const exc_model_options *options, exc_model **out) {
    return exc_model_open_made(ctx, dir, options, NULL, out);
}

exc_status exc_model_open_made(exc_ctx *ctx, const char *dir, const exc_model_options *options, const exc_made *made, exc_model **out) {
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
    if (made && opt.plan) return exc_fail(ctx, EXC_ERR_USAGE, "open %s: plan: expected none for a model that is made", dir);
    if (opt.compute != EXC_COMPUTE_BF16 && opt.compute != EXC_COMPUTE_F32)
        return exc_fail(ctx, EXC_ERR_USAGE, "open %s: compute: expected bf16 or f32, found %d", dir,
                        (int)opt.compute);
    exc_model *m = exc_zalloc(ctx, 1, sizeof *m, "model");
    if (!m) return EXC_ERR_MEMORY;
    exc_status st = open_model(ctx, dir, &opt, made, m);
    if (st)
        exc_model_free(m);
    else
        *out = m;
    return st;
}

void exc_model_free(exc_model *m) {
    if (!m) return;
    exc_session_close(m->spare);
    if (m->ctx) exc_unload(m->ctx, m);
    if (m->lens.release) m->lens.release(m->lens.user); /* the thread that reads ahead asked it until now */
    for (exc_model **at = m->ctx ? &m->ctx->models : NULL; at && *at; at = &(*at)->next)
        if (*at == m) {
            *at = m->next;
            break;
        }
    exc_atlas_close(m->atlas);
    exc_release(m->dir);
    exc_release(m);
}
