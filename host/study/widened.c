/* widened.c - a quantised checkpoint written as bf16 (apply --to bf16), with a plan's edits made on the bf16 numbers.
 *
 * Every quantised tensor of a shard, those of layers no plan reaches too, becomes the bf16 tensor that loaders know under the same
 * name: codes times scales, rounded once; blocks of fp4 become [E,in,out] without the suffix, which is how the unquantised form of
 * that family is stored. Scales disappear, headers are new, config.json loses its quantization_config and the index follows. All
 * else is copied. One tensor is in memory at a time. verify makes the tensors again in the same way and compares. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edits.h"

#define INDEX "model.safetensors.index.json"

typedef enum kind { PLAIN, CODES, BLOCKS, SCALES } kind;

typedef struct maker {
    exc_edited *e;
    uint8_t *old, *data, *turned; /* of the tensor in work */
    size_t next;                  /* in e->order */
} maker;

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n > m && !strcmp(s + n - m, end);
}

/* the tensor beside t whose name has another end; NULL: none */
static const exc_tensor *beside(const exc_checkpoint *c, const char *name, const char *end, const char *other) {
    char text[512];
    size_t n = strlen(name) - strlen(end);
    if (!ends_with(name, end) && *end) return NULL;
    if (n + strlen(other) >= sizeof text) return NULL;
    memcpy(text, name, n);
    strcpy(text + n, other);
    return exc_checkpoint_find(c, text);
}

static kind kind_of(const exc_checkpoint *c, const exc_tensor *t) {
    const exc_tensor *owner = beside(c, t->name, "_scale_inv", "");
    if (owner && owner->dtype == EXC_F8_E4M3) return SCALES;
    owner = beside(c, t->name, "_scales", "_blocks");
    if (owner && owner->dtype == EXC_U8) return SCALES;
    if (t->dtype == EXC_F8_E4M3) return CODES;
    if (t->dtype == EXC_U8 && t->rank == 4 && t->shape[3] == 16 && beside(c, t->name, "_blocks", "_scales")) return BLOCKS;
    return PLAIN;
}

/* what stands in the new header for t; false: nothing does */
bool exc_widened_describe(const exc_checkpoint *c, const exc_tensor *t, exc_widened *out) {
    kind k = kind_of(c, t);
    if (k == SCALES) return false;
    *out = (exc_widened){.dtype = k == PLAIN ? t->dtype : EXC_BF16, .rank = t->rank};
    snprintf(out->name, sizeof out->name, "%s", t->name);
    memcpy(out->shape, t->shape, sizeof out->shape);
    if (k == BLOCKS) {
        out->name[strlen(t->name) - strlen("_blocks")] = 0;
        out->rank = 3;
        out->shape[1] = t->shape[2] * 32;
        out->shape[2] = t->shape[1];
    }
    out->bytes = t->end - t->begin;
    if (k == CODES) out->bytes *= 2;
    if (k == BLOCKS) out->bytes *= 4;
    return true;
}

static exc_status misfit(const maker *m, const exc_tensor *t, const char *why) {
    return exc_fail(m->e->ctx, EXC_ERR_INPUT, "%s: %s: expected %s to write it as bf16", m->e->a->files->files[t->shard]->path,
                    exc_show(t->name, strlen(t->name)), why);
}

static int64_t blocks(int64_t n) { return (n + 127) / 128; }

/* codes [slabs, rows, cols] and their scales as bf16 into m->data */
static exc_status widen(maker *m, const exc_tensor *t, kind k) {
    exc_ctx *ctx = m->e->ctx;
    const exc_checkpoint *c = m->e->a->files;
    const exc_tensor *s = k == CODES ? beside(c, t->name, "", "_scale_inv") : beside(c, t->name, "_blocks", "_scales");
    bool f4 = k == BLOCKS, stacked = k == CODES && t->rank == 3;
    if (!s || (k == CODES && t->rank != 2 && t->rank != 3)) return misfit(m, t, "a matrix with scales beside it");
    int64_t slabs = stacked ? t->shape[0] : 1, rows = f4 ? t->shape[0] * t->shape[1] : t->shape[stacked], cols = f4 ? t->shape[2] * 32 : t->shape[stacked + 1];
    int scale_dtype = s->dtype == EXC_U8 ? EXC_F8_E8M0 : (int)s->dtype;
    size_t unit = exc_dtype_bits(s->dtype) / 8, each = (size_t)(f4 ? rows * cols / 32 : blocks(rows) * blocks(cols)) * unit, codes = (size_t)(rows * cols) / (f4 ? 2 : 1);
    if (scale_dtype != EXC_F8_E8M0 && (f4 || (scale_dtype != EXC_F32 && scale_dtype != EXC_BF16)))
        return misfit(m, t, "scales of F32, BF16 or F8_E8M0");
    if (s->end - s->begin != each * (size_t)slabs) return misfit(m, t, "a scale for every block");
    uint8_t *scale = exc_alloc(ctx, each ? each : 1, 1, "scales");
    if (!scale) return EXC_ERR_MEMORY;
    exc_status st = EXC_OK;
    int64_t bad = 0;
    for (int64_t i = 0; i < slabs && st == EXC_OK && !bad; i++) {
        memcpy(scale, (const uint8_t *)exc_checkpoint_data(c, s) + (size_t)i * each, each);
        struct exc_widen_args a = {.src = (const uint8_t *)exc_checkpoint_data(c, t) + (size_t)i * codes, .dtype = f4 ? EXC_F4 : EXC_F8_E4M3, .scale = scale,
                                   .scale_dtype = scale_dtype, .rows = rows, .cols = cols, .dst = m->data + (size_t)(i * rows * cols) * 2,
                                   .dst_dtype = EXC_BF16, .nonfinite = &bad};
        exc_dock d = {.ctx = ctx, .what = "widened tensor"};
        exc_dock_in(&d, &a.src, codes);
        exc_dock_in(&d, &a.scale, each);
        exc_dock_out(&d, &a.dst, (size_t)(rows * cols) * 2);
        exc_dock_out(&d, &a.nonfinite, sizeof bad);
        st = EXC_DOCK_CALL(&d, widen, &a);
    }
    exc_release(scale);
    EXC_TRY(st);
    if (!bad || m->e->allow_nonfinite) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_NUMERIC, "%s: %s: expected finite weights, found NaN or infinity", c->files[t->shard]->path, exc_show(t->name, strlen(t->name)));
}

/* the plan's edits of the weights in this tensor, in m->data, where elements lie as they did */
static exc_status edit(maker *m, const exc_tensor *t) {
    exc_edited *e = m->e;
    for (; m->next < e->n && e->w[e->order[m->next]]->tensor == t; m->next++) {
        size_t at = e->order[m->next];
        exc_weight v = *e->w[at];
        const exc_weight *w = &v;
        uint64_t first = (v.begin - t->begin) * 8 / exc_dtype_bits((exc_dtype)v.dtype);
        int64_t last = (v.out - 1) * v.out_step + (v.in - 1) * v.in_step + 1;
        if (exc_weight_coded(&v)) v.dtype = EXC_BF16;
        v.scale = NULL;
        size_t unit = exc_dtype_bits((exc_dtype)v.dtype) / 8;
        v.begin = first * unit;
        v.end = v.begin + (uint64_t)last * unit;
        void *to = m->data + v.begin;
        const void *from = to;
        if (e->hash) exc_hash_hex(to, exc_weight_span(w), e->hash[at][0]);
        EXC_TRY(exc_compiled_apply(e->ctx, e->c, &w, 1, &from, &to, NULL, &e->effect[at]));
        if (e->hash) exc_hash_hex(to, exc_weight_span(w), e->hash[at][1]);
        if (e->allow_nonfinite || (!e->effect[at].nonfinite && !e->effect[at].overflow)) continue;
        return exc_fail(e->ctx, EXC_ERR_NUMERIC, "%s: %s: expected finite weights before and after the edit, found NaN or infinity", e->c->name,
                        exc_show(t->name, strlen(t->name)));
    }
    return EXC_OK;
}

/* [E,out,in] -> [E,in,out] */
static exc_status turn(maker *m, const exc_widened *w) {
    int64_t in = w->shape[1], out = w->shape[2];
    size_t each = (size_t)(in * out) * 2;
    for (int64_t i = 0; i < w->shape[0]; i++) {
        struct exc_view_args a = {.src = m->data + (size_t)i * each, .src_row = 1, .src_column = in, .dst = m->turned + (size_t)i * each,
                                  .dst_row = out, .dst_column = 1, .rows = in, .columns = out, .unit = 2};
        exc_dock d = {.ctx = m->e->ctx, .what = "widened tensor"};
        exc_dock_in(&d, &a.src, each);
        exc_dock_out(&d, &a.dst, each);
        EXC_TRY(EXC_DOCK_CALL(&d, view, &a));
    }
    return EXC_OK;
}

static exc_status make(maker *m, const exc_tensor *t, exc_widened *w, exc_widened_fn visit, void *user) {
    exc_ctx *ctx = m->e->ctx;
    const exc_checkpoint *c = m->e->a->files;
    kind k = kind_of(c, t);
    bool edited = m->next < m->e->n && m->e->w[m->e->order[m->next]]->tensor == t;
    w->data = exc_checkpoint_data(c, t);
    if (k == PLAIN && !edited) return visit(user, t, w);
    size_t bytes = w->bytes ? (size_t)w->bytes : 1;
    m->data = exc_alloc(ctx, bytes, 1, "widened tensor");
    if (k == BLOCKS) m->turned = exc_alloc(ctx, bytes, 1, "widened tensor");
    exc_status st = m->data && (m->turned || k != BLOCKS) ? EXC_OK : EXC_ERR_MEMORY;
    if (st == EXC_OK && k == PLAIN) memcpy(m->data, w->data, (size_t)w->bytes);
    if (st == EXC_OK && k != PLAIN) st = widen(m, t, k);
    if (st == EXC_OK) st = edit(m, t);
    if (st == EXC_OK && k == BLOCKS) st = turn(m, w);
    w->data = k == BLOCKS ? m->turned : m->data;
    if (st == EXC_OK) st = visit(user, t, w);
    exc_release(m->data);
    exc_release(m->turned);
    m->data = m->turned = NULL;
    return st;
}

exc_status exc_widened_make(exc_edited *e, int file, const char *step, exc_widened_fn visit, void *user) {
    const exc_tensors *f = e->a->files->files[file];
    maker m = {.e = e};
    while (m.next < e->n && e->w[e->order[m.next]]->tensor->shard < file) m.next++;
    for (size_t i = 0; i < f->count; i++) {
        exc_widened w;
        if (!exc_widened_describe(e->a->files, &f->items[i], &w)) continue;
        EXC_TRY(make(&m, &f->items[i], &w, visit, user));
        EXC_TRY(exc_progress(e->ctx, step, f->items[i].end, f->size, "bytes"));
    }
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------------------- writing */

static exc_status put(void *user, const exc_tensor *t, const exc_widened *w) {
    (void)t;
    return exc_writer_put(user, w->name, w->data, (size_t)w->bytes);
}

static exc_status declare(const exc_edited *e, int file, exc_writer *to) {
    const exc_tensors *f = e->a->files->files[file];
    const char *key;
    json_t *value;
    if (f->metadata)
        json_object_foreach(f->metadata, key, value) EXC_TRY(exc_writer_meta(to, key, json_string_value(value)));
    for (size_t i = 0; i < f->count; i++) {
        exc_widened w;
        if (exc_widened_describe(e->a->files, &f->items[i], &w)) EXC_TRY(exc_writer_declare(to, w.name, w.dtype, w.rank, w.shape));
    }
    return EXC_OK;
}

/* shards are dealt out to the ranks as they are without --to */
static exc_status write_shard(exc_edited *e, exc_publish *p, int file) {
    char *path = NULL;
    exc_writer *to = NULL;
    EXC_TRY(exc_publish_shard(p, file, &path));
    bool mine = exc_publish_rank(e->ctx, file) == exc_ranks_me(e->ctx);
    exc_status st = mine ? exc_writer_open_own(e->ctx, path, false, &to) : EXC_OK;
    exc_release(path);
    if (st != EXC_OK || !mine) return st;
    st = declare(e, file, to);
    if (st == EXC_OK) st = exc_widened_make(e, file, "write", put, to);
    if (st == EXC_OK) return exc_writer_commit(to);
    exc_writer_abort(to);
    return st;
}

static exc_status replace_json(exc_edited *e, exc_publish *p, const char *name, json_t *o) {
    char *text = json_dumps(o, JSON_INDENT(2));
    exc_status st = text ? exc_publish_replace(p, name, text, strlen(text)) : exc_fail(e->ctx, EXC_ERR_MEMORY, "no memory for %s", name);
    free(text);
    return st;
}

/* loaders take a checkpoint without quantization_config as one of numbers */
json_t *exc_widened_config(const exc_checkpoint *c) {
    json_t *o = json_deep_copy(c->config), *text = json_object_get(o, "text_config");
    json_object_del(o, "quantization_config");
    if (json_is_object(text)) json_object_del(text, "quantization_config");
    return o;
}

/* the index anew; its other metadata stays */
static exc_status write_index(exc_edited *e, exc_publish *p, json_t *index) {
    const exc_checkpoint *c = e->a->files;
    json_t *map = json_object(), *meta = json_object_get(index, "metadata");
    uint64_t total = 0;
    for (int i = 0; i < c->n_files; i++) {
        const char *slash = strrchr(c->files[i]->path, '/');
        for (size_t j = 0; j < c->files[i]->count; j++) {
            exc_widened w;
            if (!exc_widened_describe(c, &c->files[i]->items[j], &w)) continue;
            json_object_set_new(map, w.name, json_string(slash ? slash + 1 : c->files[i]->path));
            total += w.bytes;
        }
    }
    json_object_set_new(index, "weight_map", map);
    if (json_is_object(meta)) json_object_set_new(meta, "total_size", json_integer((json_int_t)total));
    return replace_json(e, p, INDEX, index);
}

exc_status exc_widened_write(exc_edited *e, exc_publish *p) {
    const exc_checkpoint *c = e->a->files;
    exc_status st = EXC_OK;
    for (int i = 0; i < c->n_files && st == EXC_OK; i++) st = write_shard(e, p, i);
    EXC_TRY(exc_ranks_agree(e->ctx, "shards of the new checkpoint", st));
    json_t *config = exc_widened_config(c), *index = NULL;
    st = replace_json(e, p, "config.json", config);
    json_decref(config);
    char *path = NULL;
    if (st == EXC_OK) st = exc_path_join(e->ctx, c->dir, INDEX, &path);
    if (st == EXC_OK && !access(path, F_OK)) {
        st = exc_json_load(e->ctx, path, 0, &index);
        if (st == EXC_OK) st = write_index(e, p, index);
        json_decref(index);
    }
    exc_release(path);
    return st;
}

static exc_status nothing(void *user, const exc_tensor *t, const exc_widened *w) {
    (void)user, (void)t, (void)w;
    return EXC_OK;
}

exc_status exc_widened_try(exc_edited *e) {
    for (int i = 0; i < e->a->files->n_files; i++) EXC_TRY(exc_widened_make(e, i, "edit", nothing, NULL));
    return EXC_OK;
}
