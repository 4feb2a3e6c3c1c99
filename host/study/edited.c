/* edited.c - the weights that a plan edits: in which order, in batches that keep all threads busy, and what became of them.
 * apply (while the files are copied), its dry run and verify (from the map) all go through exc_edited_batch.
 *
 * A batch may hold weights of several roles and layers; it is cut into runs of one role and layer, because an op call takes
 * matrices of one shape. The numbers of a weight never depend on its batch. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "edits.h"

#define BATCH ((size_t)64 << 20) /* bytes of one walk step */
#define ALIGN ((size_t)64)

static size_t bytes_of(const exc_weight *w) { return exc_weight_span(w); }
/* no gaps, so that new bytes may go to another place than the old ones */
static bool solid(const exc_weight *w) { return exc_weight_dense(w) || exc_weight_transposed(w); }
static size_t rounded(size_t n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }

typedef struct lying {
    int file;
    uint64_t begin;
    size_t at;
} lying;

static int by_file(const void *a, const void *b) {
    const lying *x = a, *y = b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static exc_status sort_by_file(exc_edited *e) {
    lying *l = exc_alloc(e->ctx, e->n ? e->n : 1, sizeof *l, "order of edited weights");
    if (!l) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < e->n; i++) l[i] = (lying){e->w[i]->tensor->shard, e->w[i]->begin, i};
    qsort(l, e->n, sizeof *l, by_file);
    for (size_t i = 0; i < e->n; i++) e->order[i] = l[i].at;
    exc_release(l);
    return EXC_OK;
}

/* weights whose bytes overlap are one range */
static void list_ranges(exc_edited *e) {
    for (size_t i = 0; i < e->n; i++) {
        const exc_weight *w = e->w[e->order[i]];
        exc_edited_range *last = e->n_ranges ? &e->range[e->n_ranges - 1] : NULL;
        if (last && last->file == w->tensor->shard && w->begin < last->end) {
            if (w->end > last->end) last->end = w->end;
            last->n++;
            continue;
        }
        e->range[e->n_ranges++] = (exc_edited_range){w->tensor->shard, w->begin, w->end, e->order + i, 1};
    }
    for (size_t i = 0; i < e->n_ranges; i++) e->bytes += e->range[i].end - e->range[i].begin;
}

static exc_status prepare(exc_edited *e, bool hashes) {
    const exc_atlas *a = e->a;
    size_t room = a->count ? a->count : 1;
    if (!(e->w = exc_alloc(e->ctx, room, sizeof *e->w, "list of edited weights"))) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < a->count; i++)
        if (exc_compiled_touches(e->c, &a->items[i])) e->w[e->n++] = &a->items[i];
    room = e->n ? e->n : 1;
    e->effect = exc_zalloc(e->ctx, room, sizeof *e->effect, "effects of edits");
    e->order = exc_alloc(e->ctx, room, sizeof *e->order, "order of edited weights");
    e->range = exc_alloc(e->ctx, room, sizeof *e->range, "ranges to edit");
    if (hashes) e->hash = exc_zalloc(e->ctx, room, sizeof *e->hash, "hashes of weights");
    if (!e->effect || !e->order || !e->range || (hashes && !e->hash)) return EXC_ERR_MEMORY;
    EXC_TRY(sort_by_file(e));
    list_ranges(e);
    return exc_edited_scales(e);
}

exc_status exc_edited_open(exc_ctx *ctx, const exc_compiled *c, bool hashes, exc_edited *e) {
    *e = (exc_edited){.ctx = ctx, .a = c->a, .c = c};
    exc_status st = prepare(e, hashes);
    if (st != EXC_OK) exc_edited_close(e);
    return st;
}

void exc_edited_close(exc_edited *e) {
    exc_release(e->w);
    exc_release(e->order);
    exc_release(e->range);
    exc_release(e->effect);
    exc_release(e->hash);
    exc_edited_scales_close(e);
    *e = (exc_edited){0};
}

/* ---------------------------------------------------------------------------------------------------------- a batch */

typedef struct item {
    size_t at, i; /* place in e->w, place in the caller's arrays */
} item;

static int by_place(const void *a, const void *b) {
    const item *x = a, *y = b;
    return x->at < y->at ? -1 : x->at > y->at;
}

typedef struct hashing {
    exc_edited *e;
    const size_t *at;
    const void *const *data;
    int side; /* 0: old bytes, 1: new */
} hashing;

static void hash_one(void *arg, size_t task, int worker) {
    const hashing *h = arg;
    size_t at = h->at[task];
    (void)worker;
    exc_hash_hex(h->data[task], bytes_of(h->e->w[at]), h->e->hash[at][h->side]);
}

static void hash_batch(exc_edited *e, const size_t *at, size_t n, const void *const *data, int side) {
    hashing h = {e, at, data, side};
    if (e->hash) e->ctx->queue.parallel(&e->ctx->queue, n, hash_one, &h);
}

/* the same for codes and scales; where codes are mixed with others only the weight is named */
static exc_status code_not_finite(exc_edited *e, const exc_weight *w) {
    int64_t bad = 0, index = -1;
    char name[256], place[96] = "";
    void *scale = exc_alloc(e->ctx, exc_weight_scale_bytes(w), 1, "scales");
    if (!scale) return EXC_ERR_MEMORY;
    exc_scale_gather(w, e->a->files->files[w->scale->shard]->map + w->scale_begin, scale);
    struct exc_widen_args a = {.src = exc_atlas_data(e->a, w), .dtype = w->dtype, .scale = scale, .scale_dtype = w->scale_dtype, .rows = w->out,
                               .cols = w->in, .nonfinite = &bad, .index = &index};
    exc_dock d = {.ctx = e->ctx, .what = "a weight that is not finite"};
    exc_dock_in(&d, &a.src, bytes_of(w));
    exc_dock_in(&d, &a.scale, exc_weight_scale_bytes(w));
    exc_dock_out(&d, &a.nonfinite, sizeof bad);
    exc_dock_out(&d, &a.index, sizeof index);
    if (exc_weight_dense(w) && EXC_DOCK_CALL(&d, widen, &a) == EXC_OK && index >= 0)
        snprintf(place, sizeof place, " at [%lld,%lld] (%lld in this tensor)", (long long)(index / w->in), (long long)(index % w->in), (long long)bad);
    exc_release(scale);
    return exc_fail(e->ctx, EXC_ERR_NUMERIC, "%s: %s: expected finite weights, found NaN or infinity%s", e->a->files->files[w->tensor->shard]->path,
                    exc_weight_label(w, name, sizeof name), place);
}

/* names the first NaN or infinity of a weight; `room` is as large as it */
static exc_status not_finite(exc_edited *e, const exc_weight *w, void *room) {
    if (exc_weight_coded(w)) return code_not_finite(e, w);
    int64_t bad = 0, index = -1, unit = (int64_t)exc_dtype_bits((exc_dtype)w->dtype) / 8, n = (int64_t)bytes_of(w) / unit;
    char name[256];
    memcpy(room, exc_atlas_data(e->a, w), bytes_of(w));
    struct exc_convert_args a = {.src = room, .src_dtype = w->dtype, .dst_dtype = w->dtype, .n = n, .nonfinite = &bad, .index = &index};
    exc_dock d = {.ctx = e->ctx, .what = "a weight that is not finite"};
    exc_dock_in(&d, &a.src, bytes_of(w));
    exc_dock_out(&d, &a.nonfinite, sizeof bad);
    exc_dock_out(&d, &a.index, sizeof index);
    exc_status st = EXC_DOCK_CALL(&d, convert, &a);
    exc_weight_label(w, name, sizeof name);
    if (st != EXC_OK || index < 0) return exc_fail(e->ctx, EXC_ERR_NUMERIC, "%s: expected finite weights, found NaN or infinity", name);
    int64_t row = w->out_step > w->in_step ? w->out_step : w->in_step; /* elements of a stored row */
    return exc_fail(e->ctx, EXC_ERR_NUMERIC, "%s: %s: expected finite weights, found NaN or infinity at [%lld,%lld] (%lld in this tensor)",
                    e->a->files->files[w->tensor->shard]->path, name, (long long)(index / row), (long long)(index % row), (long long)bad);
}

static exc_status check_effect(exc_edited *e, size_t at, void *room) {
    const exc_effect *f = &e->effect[at];
    const exc_weight *w = e->w[at];
    if (e->allow_nonfinite) return EXC_OK;
    if (f->nonfinite) return not_finite(e, w, room);
    if (!f->overflow) return EXC_OK;
    char name[256];
    return exc_fail(e->ctx, EXC_ERR_NUMERIC, "%s: %s: expected an edit that stays in the range of %s, found infinity", e->c->name,
                    exc_weight_label(w, name, sizeof name), exc_dtype_name((exc_dtype)w->dtype));
}

/* the arrays that one op call wants, for a batch sorted by place */
typedef struct sorted {
    item *order;
    const exc_weight **w;
    const void **src;
    void **dst, **scale; /* scale NULL: nothing is quantised */
    exc_effect *effect;
} sorted;

/* one op call takes both: same dtype, lying the same way */
static bool alike(const exc_weight *v, const exc_weight *w) {
    return v->dtype == w->dtype && v->scale_dtype == w->scale_dtype && v->out_step == w->out_step && v->in_step == w->in_step;
}

static exc_status run_batch(exc_edited *e, const sorted *s, size_t n) {
    for (size_t i = 0, m; i < n; i += m) {
        for (m = 1; i + m < n && s->w[i + m]->role == s->w[i]->role && s->w[i + m]->layer == s->w[i]->layer &&
                    alike(s->w[i + m], s->w[i]);)
            m++;
        EXC_TRY(exc_compiled_apply(e->ctx, e->c, s->w + i, m, s->src + i, s->dst + i, s->scale ? s->scale + i : NULL, s->effect + i));
    }
    for (size_t i = 0; i < n; i++) e->effect[s->order[i].at] = s->effect[i];
    for (size_t i = 0; i < n; i++) EXC_TRY(check_effect(e, s->order[i].at, s->dst[i]));
    return EXC_OK;
}

static exc_status weights_batch(exc_edited *e, const size_t *at, size_t n, const void *const *src, void *const *dst) {
    exc_ctx *ctx = e->ctx;
    sorted s = {exc_alloc(ctx, n, sizeof *s.order, "batch"), exc_alloc(ctx, n, sizeof *s.w, "batch"), exc_alloc(ctx, n, sizeof *s.src, "batch"),
                exc_alloc(ctx, n, sizeof *s.dst, "batch"), e->scale ? exc_alloc(ctx, n, sizeof *s.scale, "batch") : NULL,
                exc_alloc(ctx, n, sizeof *s.effect, "batch")};
    exc_status st = s.order && s.w && s.src && s.dst && (s.scale || !e->scale) && s.effect ? EXC_OK : EXC_ERR_MEMORY;
    if (st == EXC_OK) {
        hash_batch(e, at, n, src, 0);
        for (size_t i = 0; i < n; i++) s.order[i] = (item){at[i], i};
        qsort(s.order, n, sizeof *s.order, by_place);
        for (size_t i = 0; i < n; i++) {
            s.w[i] = e->w[s.order[i].at];
            s.src[i] = src[s.order[i].i];
            s.dst[i] = dst[s.order[i].i];
            if (!s.scale) continue;
            s.scale[i] = e->scale[s.order[i].at];
            if (s.scale[i]) exc_edited_old_scale(e, s.order[i].at);
        }
        st = run_batch(e, &s, n);
    }
    if (st == EXC_OK) hash_batch(e, at, n, (const void *const *)dst, 1);
    exc_release(s.order);
    exc_release(s.w);
    exc_release(s.src);
    exc_release(s.dst);
    exc_release(s.scale);
    exc_release(s.effect);
    return st;
}

/* where each weight of the ranges lies in the buffers; what is not solid is edited in place, on a copy of the old bytes */
static void point(const exc_edited *e, const exc_edited_range *const *r, size_t n, const void *const *src, void *const *dst, size_t *at,
                  const void **from, void **to) {
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        bool copied = !solid(e->w[r[i]->at[0]]);
        if (copied && src[i] != dst[i]) memcpy(dst[i], src[i], (size_t)(r[i]->end - r[i]->begin));
        for (size_t j = 0; j < r[i]->n; j++, m++) {
            size_t offset = (size_t)(e->w[r[i]->at[j]]->begin - r[i]->begin);
            at[m] = r[i]->at[j];
            to[m] = (uint8_t *)dst[i] + offset;
            from[m] = copied ? to[m] : (const uint8_t *)src[i] + offset;
        }
    }
}

exc_status exc_edited_batch(exc_edited *e, const exc_edited_range *const *r, size_t n, const void *const *src, void *const *dst) {
    size_t m = 0;
    for (size_t i = 0; i < n; i++) m += r[i]->n;
    size_t *at = exc_alloc(e->ctx, m, sizeof *at, "batch");
    const void **from = exc_alloc(e->ctx, m, sizeof *from, "batch");
    void **to = exc_alloc(e->ctx, m, sizeof *to, "batch");
    exc_status st = at && from && to ? EXC_OK : EXC_ERR_MEMORY;
    if (st == EXC_OK) {
        point(e, r, n, src, dst, at, from, to);
        st = weights_batch(e, at, m, from, to);
    }
    exc_release(at);
    exc_release(from);
    exc_release(to);
    return st;
}

/* ------------------------------------------------------------------------------------------------- from the map */

typedef struct walk {
    const exc_edited_range **r;
    const void **src;
    void **dst;
    uint8_t *room;
    size_t bytes;
} walk;

static size_t span_of(const exc_edited_range *r) { return (size_t)(r->end - r->begin); }

/* how many ranges from `first` on fit */
static size_t fit(const exc_edited *e, size_t first, size_t bytes) {
    size_t used = 0, n = 0;
    for (; first + n < e->n_ranges; n++) {
        used += rounded(span_of(&e->range[first + n]));
        if (n && used > bytes) break;
    }
    return n;
}

static void place(const exc_edited *e, walk *k, size_t first, size_t n) {
    size_t used = 0;
    for (size_t i = 0; i < n; i++) {
        const exc_edited_range *r = k->r[i] = &e->range[first + i];
        k->dst[i] = k->room + used;
        k->src[i] = e->a->files->files[r->file]->map + r->begin;
        size_t unit = exc_dtype_bits((exc_dtype)e->w[r->at[0]]->dtype) / 8;
        if (unit > 1 && (uintptr_t)k->src[i] % unit) {
            memcpy(k->dst[i], k->src[i], span_of(r));
            k->src[i] = k->dst[i];
        }
        used += rounded(span_of(r));
    }
}

static exc_status walk_all(exc_edited *e, walk *k, const char *step, exc_edited_fn visit, void *user) {
    uint64_t done = 0;
    for (size_t i = 0, n; i < e->n_ranges; i += n) {
        n = fit(e, i, k->bytes);
        place(e, k, i, n);
        EXC_TRY(exc_edited_batch(e, k->r, n, k->src, k->dst));
        for (size_t j = 0; j < n; j++) {
            done += span_of(k->r[j]);
            if (visit) EXC_TRY(visit(user, e, k->r[j], k->dst[j]));
        }
        EXC_TRY(exc_progress(e->ctx, step, done, e->bytes, "bytes"));
    }
    return EXC_OK;
}

exc_status exc_edited_walk(exc_edited *e, const char *step, exc_edited_fn visit, void *user) {
    walk k = {0};
    size_t all = 0, largest = 0;
    for (size_t i = 0; i < e->n_ranges; i++) {
        size_t b = rounded(span_of(&e->range[i]));
        if (b > largest) largest = b;
        if (all < BATCH) all += b;
    }
    if (!e->n) return EXC_OK;
    k.bytes = all < BATCH ? all : BATCH;
    if (k.bytes < largest) k.bytes = largest;
    k.r = exc_alloc(e->ctx, e->n_ranges, sizeof *k.r, "batch");
    k.src = exc_alloc(e->ctx, e->n_ranges, sizeof *k.src, "batch");
    k.dst = exc_alloc(e->ctx, e->n_ranges, sizeof *k.dst, "batch");
    k.room = exc_alloc(e->ctx, k.bytes, 1, "buffer for edited weights");
    exc_status st = k.r && k.src && k.dst && k.room ? walk_all(e, &k, step, visit, user) : EXC_ERR_MEMORY;
    exc_release(k.r);
    exc_release(k.src);
    exc_release(k.dst);
    exc_release(k.room);
    return st;
}

/* ---------------------------------------------------------------------------------------------------------- facts */

/* what an edit was meant to move and what storing it moved besides, as shares of the weight's length */
static void set_cost(json_t *o, double moved, double error, double size) {
    if (!(size > 0)) return;
    json_object_set_new(o, "edit_size", json_real(sqrt(moved / size)));
    json_object_set_new(o, "requantisation_error", json_real(sqrt(error / size)));
}

static json_t *residual(double before, double after) { return before > 0 && isfinite(after) ? json_real(sqrt(after / before)) : json_null(); }

static json_t *tensor_facts(const exc_edited *e, size_t i) {
    const exc_weight *w = e->w[i];
    const exc_effect *f = &e->effect[i];
    json_t *o = json_object();
    json_object_set_new(o, "name", json_string(w->tensor->name));
    json_object_set_new(o, "role", json_string(exc_role_name(w->role)));
    if (w->layer >= 0) json_object_set_new(o, "layer", json_integer(w->layer));
    if (w->expert >= 0) json_object_set_new(o, "expert", json_integer(w->expert));
    json_object_set_new(o, "residual", residual(f->before, f->after));
    set_cost(o, f->moved, f->error, f->size);
    json_object_set_new(o, "changed", json_integer(f->changed));
    json_object_set_new(o, "elements", json_integer(w->out * w->in));
    if (f->nonfinite) json_object_set_new(o, "nonfinite", json_integer(f->nonfinite));
    if (!e->hash) return o;
    json_object_set_new(o, "before", json_string(e->hash[i][0]));
    json_object_set_new(o, "after", json_string(e->hash[i][1]));
    return o;
}

/* one role in one layer: weights first..first+n-1 */
static json_t *role_facts(const exc_edited *e, size_t first, size_t n) {
    const exc_weight *w = e->w[first];
    double before = 0, after = 0, moved = 0, error = 0, size = 0;
    int64_t changed = 0, elements = 0;
    for (size_t i = first; i < first + n; i++) {
        before += e->effect[i].before;
        after += e->effect[i].after;
        moved += e->effect[i].moved;
        error += e->effect[i].error;
        size += e->effect[i].size;
        changed += e->effect[i].changed;
        elements += e->w[i]->out * e->w[i]->in;
    }
    json_t *o = json_object();
    json_object_set_new(o, "role", json_string(exc_role_name(w->role)));
    json_object_set_new(o, "layer", w->layer >= 0 ? json_integer(w->layer) : json_null());
    json_object_set_new(o, "edited", json_integer((json_int_t)n));
    json_object_set_new(o, "present", json_integer(exc_role_by_expert(w->role) ? e->a->shape.experts : 1));
    json_object_set_new(o, "residual", residual(before, after));
    set_cost(o, moved, error, size);
    json_object_set_new(o, "dtype", json_string(exc_dtype_name((exc_dtype)w->dtype)));
    json_object_set_new(o, "changed", json_real(elements ? (double)changed / (double)elements : 0));
    return o;
}

/* (layer, expert) pairs with an edited weight; e->w comes by role, so a pair may come several times */
static int64_t experts_edited(const exc_edited *e) {
    const exc_shape *s = &e->a->shape;
    uint8_t *seen = exc_zalloc(e->ctx, (size_t)(s->layers * s->experts), 1, "edited experts");
    int64_t n = 0;
    for (size_t i = 0; seen && i < e->n; i++) {
        if (!exc_role_by_expert(e->w[i]->role)) continue;
        uint8_t *at = &seen[e->w[i]->layer * s->experts + e->w[i]->expert];
        n += !*at;
        *at = 1;
    }
    exc_release(seen);
    return seen ? n : -1;
}

/* a tensor may hold many weights */
static size_t tensor_number(const exc_checkpoint *c, const exc_tensor *t) {
    size_t before = 0;
    for (int i = 0; i < t->shard; i++) before += c->files[i]->count;
    return before + (size_t)(t - c->files[t->shard]->items);
}

static int64_t tensors_edited(const exc_edited *e) {
    int64_t n = 0;
    uint8_t *seen = exc_zalloc(e->ctx, e->a->files->n_tensors, 1, "edited tensors");
    for (size_t i = 0; seen && i < e->n; i++) {
        uint8_t *at = &seen[tensor_number(e->a->files, e->w[i]->tensor)];
        n += !*at;
        *at = 1;
    }
    exc_release(seen);
    return seen ? n : -1;
}

void exc_edited_facts(const exc_edited *e, json_t *o) {
    json_t *roles = json_array(), *tensors = json_array();
    double before = 0, after = 0, moved = 0, error = 0, size = 0;
    for (size_t i = 0, n; i < e->n; i += n) {
        for (n = 1; i + n < e->n && e->w[i + n]->role == e->w[i]->role && e->w[i + n]->layer == e->w[i]->layer;) n++;
        json_array_append_new(roles, role_facts(e, i, n));
    }
    for (size_t i = 0; i < e->n; i++) {
        before += e->effect[i].before;
        after += e->effect[i].after;
        moved += e->effect[i].moved;
        error += e->effect[i].error;
        size += e->effect[i].size;
        json_array_append_new(tensors, tensor_facts(e, i));
    }
    json_object_set_new(o, "tensors_edited", json_integer(tensors_edited(e)));
    json_object_set_new(o, "tensors_present", json_integer((json_int_t)e->a->files->n_tensors));
    json_object_set_new(o, "experts_edited", json_integer(experts_edited(e)));
    json_object_set_new(o, "experts_present", json_integer(e->a->shape.moe_layers * e->a->shape.experts));
    json_object_set_new(o, "bytes_edited", json_integer((json_int_t)e->bytes));
    json_object_set_new(o, "residual", residual(before, after));
    set_cost(o, moved, error, size);
    json_object_set_new(o, "roles", roles);
    json_object_set_new(o, "tensors", tensors);
}
