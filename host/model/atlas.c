/* atlas.c - the table of weights by role, from headers alone. Every tensor name is matched against the
 * family's patterns (%L layer, %E expert); what matches must have the role's shape and a dtype we compute
 * with, what the config promises must be there once, and what no pattern covers is kept in a list: it is
 * passed through, never guessed at. Names decide, shapes only confirm: a square down_proj would fit either
 * way round. A tensor may hold many weights: all experts of a layer, gates and ups side by side; each entry
 * says where its own elements lie (exc_layout, exc_weight). */
#include <stdlib.h>
#include <string.h>

#include "model.h"

/* a decimal index without sign or leading zeros, at most 9 digits */
static bool take_index(const char **s, int64_t *out) {
    const char *p = *s;
    int64_t v = 0;
    if (*p < '0' || *p > '9' || (*p == '0' && p[1] >= '0' && p[1] <= '9')) return false;
    for (; *p >= '0' && *p <= '9'; p++) {
        if (p - *s >= 9) return false;
        v = v * 10 + (*p - '0');
    }
    *s = p;
    *out = v;
    return true;
}

static bool match(const char *pattern, const char *name, int64_t *layer, int64_t *expert) {
    *layer = *expert = -1;
    while (*pattern) {
        if (*pattern == '%') {
            if (!take_index(&name, pattern[1] == 'L' ? layer : expert)) return false;
            pattern += 2;
        } else if (*pattern == '[') { /* taken where it stands, else passed over */
            size_t n = strcspn(pattern + 1, "]");
            if (!strncmp(name, pattern + 1, n)) name += n;
            pattern += n + 2;
        } else if (*pattern++ != *name++) {
            return false;
        }
    }
    return !*name;
}

static void expand(const char *pattern, int64_t layer, int64_t expert, char *out, size_t cap) {
    size_t n = 0;
    for (; *pattern && n + 1 < cap; pattern++) {
        if (*pattern == '%') {
            int w = snprintf(out + n, cap - n, "%lld", (long long)(*++pattern == 'L' ? layer : expert));
            n += w > 0 ? (size_t)w : 0;
        } else if (*pattern != '[' && *pattern != ']') {
            out[n++] = *pattern;
        }
    }
    out[n < cap ? n : cap - 1] = 0;
}

static bool in_layer(const exc_shape *s, const exc_name *p, int64_t layer) {
    return !p->in || layer < 0 || (p->in & EXC_IN(s->mix[layer]));
}

static const char *pattern_of(const exc_atlas *a, exc_role role, int64_t layer) {
    for (const exc_name *n = a->family->names; n->pattern; n++)
        if (n->role == role && in_layer(&a->shape, n, layer)) return n->pattern;
    return NULL;
}

static int compare_weights(const void *pa, const void *pb) {
    const exc_weight *a = pa, *b = pb;
    if (a->role != b->role) return a->role < b->role ? -1 : 1;
    if (a->layer != b->layer) return a->layer < b->layer ? -1 : 1;
    return a->expert < b->expert ? -1 : a->expert > b->expert;
}

const exc_weight *exc_atlas_find(const exc_atlas *a, exc_role role, int64_t layer, int64_t expert) {
    exc_weight key = {.role = role, .layer = layer, .expert = expert};
    return bsearch(&key, a->items, a->count, sizeof *a->items, compare_weights);
}

static const char *file_of(const exc_atlas *a, const exc_tensor *t) {
    return a->files->files[t->shard]->path;
}

/* what config.json says that leaves no place for the role */
static const char *why_absent(const exc_atlas *a, exc_role role, int64_t layer, char *out, size_t cap) {
    const exc_family *f = a->family;
    bool moe = a->shape.is_moe[layer],
         dense = role == EXC_ROLE_DENSE_DOWN || role == EXC_ROLE_DENSE_GATE || role == EXC_ROLE_DENSE_UP;
    bool linear = role >= EXC_ROLE_LINEAR_QKVZ && role <= EXC_ROLE_LINEAR_CONV;
    linear = linear || (role >= EXC_ROLE_LINEAR_RATE && role <= EXC_ROLE_LINEAR_NORM) || role == EXC_ROLE_ATTN_OUT;
    if (a->shape.mix[layer] == EXC_MIX_LINEAR && (linear || (role >= EXC_ROLE_ATTN_Q && role <= EXC_ROLE_ATTN_V) ||
                                                  role == EXC_ROLE_ATTN_Q_NORM || role == EXC_ROLE_ATTN_K_NORM))
        snprintf(out, cap, "has linear attention (layer_types, full_attention_interval)");
    else if (linear)
        snprintf(out, cap, "has softmax attention (layer_types, full_attention_interval)");
    else if (role >= EXC_ROLE_ATTN_OUT_BIAS && role <= EXC_ROLE_ATTN_V_BIAS)
        snprintf(out, cap, "has no biases (%s)", f->bias_key);
    else if (a->shape.latent.rank && role >= EXC_ROLE_ATTN_Q)
        snprintf(out, cap, "makes queries in %s (q_lora_rank)", a->shape.latent.q_rank ? "two steps" : "one step");
    else if (role == EXC_ROLE_ATTN_Q_NORM || role == EXC_ROLE_ATTN_K_NORM)
        snprintf(out, cap, "has no norm of queries and keys (%s)", f->qk_norm_key);
    else if (moe && !dense)
        snprintf(out, cap, "has no shared expert (%s)", f->shared_key);
    else
        snprintf(out, cap, "%s (%s)", moe ? "has experts" : "is dense", exc_shape_dense_keys(f));
    return out;
}

static size_t unit_bits(const exc_weight *w) { return exc_dtype_bits((exc_dtype)w->dtype); }

bool exc_weight_dense(const exc_weight *w) { return w->in_step == 1 && w->out_step == w->in; }

bool exc_weight_transposed(const exc_weight *w) {
    return w->out_step == 1 && w->in_step == w->out && !exc_weight_dense(w);
}

size_t exc_weight_span(const exc_weight *w) { return (size_t)(w->end - w->begin); }

uint64_t exc_weight_bytes(const exc_weight *w) { return (uint64_t)(w->out * w->in) * unit_bits(w) / 8; }

const char *exc_weight_label(const exc_weight *w, char *out, size_t cap) {
    bool whole = exc_weight_bytes(w) == w->tensor->end - w->tensor->begin;
    const char *name = exc_show(w->tensor->name, strlen(w->tensor->name));
    if (whole || w->expert < 0) snprintf(out, cap, "%s", name);
    else snprintf(out, cap, "%s[%lld]", name, (long long)w->expert);
    return out;
}

const void *exc_atlas_data(const exc_atlas *a, const exc_weight *w) {
    return a->files->files[w->tensor->shard]->map + w->begin;
}

static int64_t parts_of(const exc_layout *y) { return y->parts ? y->parts : 1; }

/* shape of a tensor that holds weights like w; returns its rank */
static int stored_shape(const exc_atlas *a, const exc_layout *y, const exc_weight *w, int64_t shape[4]) {
    int n = 0;
    int64_t out = w->out * parts_of(y);
    if (y->stacked) shape[n++] = a->shape.experts;
    if (y->transposed) shape[n++] = w->in;
    shape[n++] = out;
    if (y->channels) shape[n++] = 1;
    if (!y->transposed && !exc_role_is_vector(w->role)) shape[n++] = y->blocks ? w->in / 32 : w->in;
    if (y->blocks) shape[n++] = 16; /* bytes of 32 codes */
    return n;
}

/* where the elements of w lie in its tensor */
static void locate(const exc_layout *y, exc_weight *w) {
    int64_t parts = parts_of(y), along = y->transposed ? 1 : w->in; /* elements from an output to the next */
    int64_t first = y->part * (y->mixed ? along : along * w->out);
    w->out_step = y->mixed ? along * parts : along;
    w->in_step = y->transposed ? w->out * parts : 1;
    if (y->stacked) first += w->expert * w->out * w->in * parts;
    int64_t last = (w->out - 1) * w->out_step + (w->in - 1) * w->in_step + 1;
    w->begin = w->tensor->begin + (uint64_t)first * unit_bits(w) / 8;
    w->end = w->begin + (uint64_t)last * unit_bits(w) / 8;
}

static exc_status check_shape(exc_ctx *ctx, const exc_atlas *a, const exc_layout *y, const exc_weight *w) {
    const exc_tensor *t = w->tensor;
    int64_t shape[4];
    int rank = stored_shape(a, y, w, shape);
    bool fits = t->rank == rank;
    for (int i = 0; i < rank && fits; i++) fits = t->shape[i] == shape[i];
    if (fits) return EXC_OK;
    char found[128] = "", want[96] = "";
    size_t n = 0;
    for (int i = 0; i < t->rank && i < 4; i++)
        n += (size_t)snprintf(found + n, sizeof found - n, "%s%lld", i ? "," : "", (long long)t->shape[i]);
    n = 0;
    for (int i = 0; i < rank; i++)
        n += (size_t)snprintf(want + n, sizeof want - n, "%s%lld", i ? "," : "", (long long)shape[i]);
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: shape: expected [%s] (from config.json), found [%s%s]",
                    file_of(a, t), exc_show(t->name, strlen(t->name)), want, found, t->rank > 4 ? ",.." : "");
}

/* one matched tensor: index bounds, role present in this layer, shape, dtype */
static exc_status check_weight(exc_ctx *ctx, exc_atlas *a, const exc_name *p, exc_weight *w, bool *skip) {
    const exc_layout *y = &p->layout;
    const exc_tensor *t = w->tensor;
    const exc_shape *s = &a->shape;
    const char *file = file_of(a, t), *name = exc_show(t->name, strlen(t->name));
    char why[128];
    *skip = false;
    if (w->layer >= s->layers && w->layer < s->layers + s->mtp_layers) {
        *skip = true;
        return EXC_OK;
    }
    if (w->layer >= s->layers)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: %s: expected layers 0..%lld (num_hidden_layers %lld), found layer %lld", file,
                        name, (long long)s->layers - 1, (long long)s->layers, (long long)w->layer);
    if (w->expert >= s->experts)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected experts 0..%lld (%s %lld), found expert %lld",
                        file, name, (long long)s->experts - 1, a->family->experts_key, (long long)s->experts,
                        (long long)w->expert);
    if (!in_layer(s, p, w->layer) || !exc_shape_role(s, a->family, w->role, w->layer, &w->out, &w->in)) {
        if (w->role ==
            EXC_ROLE_LM_HEAD) { /* tied: loaders use the embedding and leave this tensor alone; so do we */
            *skip = true;
            return EXC_OK;
        }
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: layer %lld %s: expected no %s there, found one", file,
                        name, (long long)w->layer, why_absent(a, w->role, w->layer, why, sizeof why),
                        exc_role_name(w->role));
    }
    EXC_TRY(check_shape(ctx, a, y, w));
    /* vectors and the embedding are looked at one by one, without a matmul that could decode them */
    bool whole = exc_role_is_vector(w->role) || w->role == EXC_ROLE_EMBED, plain = t->dtype == EXC_BF16 || t->dtype == EXC_F16 || t->dtype == EXC_F32;
    w->dtype = y->blocks ? EXC_F4 : (int)t->dtype;
    if (y->blocks ? t->dtype == EXC_U8 : plain || (t->dtype == EXC_F8_E4M3 && !whole)) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: dtype: expected %s, found %s", file, name,
                    y->blocks ? "U8" : whole ? "BF16, F16 or F32" : "BF16, F16, F32 or F8_E4M3",
                    t->dtype_name ? t->dtype_name : exc_dtype_name(t->dtype));
}

static exc_status add_item(exc_ctx *ctx, exc_atlas *a, const exc_weight *w) {
    if (a->count == a->room) {
        size_t room = a->room * 2;
        exc_weight *items = exc_alloc(ctx, room, sizeof *items, "weight table");
        if (!items) return EXC_ERR_MEMORY;
        memcpy(items, a->items, a->count * sizeof *items);
        exc_release(a->items);
        a->items = items;
        a->room = room;
    }
    a->items[a->count++] = *w;
    return EXC_OK;
}

/* the weights of one name in a tensor: one, or one an expert */
static exc_status add_weights(exc_ctx *ctx, exc_atlas *a, const exc_name *p, exc_weight *w, bool *skip) {
    w->role = p->role;
    EXC_TRY(check_weight(ctx, a, p, w, skip));
    int64_t count = *skip ? 0 : p->layout.stacked ? a->shape.experts : 1;
    if (count && exc_weight_coded(w)) EXC_TRY(exc_scale_find(ctx, a, &p->layout, w));
    for (int64_t e = 0; e < count; e++) {
        if (p->layout.stacked) w->expert = e;
        locate(&p->layout, w);
        exc_scale_locate(&p->layout, w);
        EXC_TRY(add_item(ctx, a, w));
    }
    return EXC_OK;
}

/* two layouts of the same weight in one model: which one counts is nothing to guess */
static exc_status check_single(exc_ctx *ctx, const exc_atlas *a) {
    for (size_t i = 1; i < a->count; i++) {
        const exc_weight *w = &a->items[i], *v = w - 1;
        if (compare_weights(v, w)) continue;
        char first[256], second[256];
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected one tensor for it (%s of layer %lld), found also %s",
                        file_of(a, v->tensor), exc_weight_label(v, first, sizeof first), exc_role_name(v->role),
                        (long long)v->layer, exc_weight_label(w, second, sizeof second));
    }
    return EXC_OK;
}

/* scales are known where their weight is */
static bool is_scale(const exc_atlas *a, const char *name) {
    char owner[512];
    int64_t layer, expert;
    const exc_tensor *t = exc_scale_owner(name, owner, sizeof owner) ? exc_checkpoint_find(a->files, owner) : NULL;
    if (!t || (t->dtype != EXC_F8_E4M3 && t->dtype != EXC_U8)) return false;
    for (const exc_name *p = a->family->names; p->pattern; p++)
        if (match(p->pattern, owner, &layer, &expert) && layer < a->shape.layers) return true;
    return false;
}

static exc_status sort_out(exc_ctx *ctx, exc_atlas *a) {
    size_t n = a->files->n_tensors;
    a->room = n ? n : 1;
    a->items = exc_alloc(ctx, a->room, sizeof *a->items, "weight table");
    a->unknown = exc_alloc(ctx, n ? n : 1, sizeof *a->unknown, "list of unknown tensors");
    if (!a->items || !a->unknown) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        const exc_tensor *t = a->files->by_name[i];
        bool known = false;
        for (const exc_name *p = a->family->names; p->pattern; p++) {
            exc_weight w = {.tensor = t};
            bool skip;
            if (!match(p->pattern, t->name, &w.layer, &w.expert)) continue;
            EXC_TRY(add_weights(ctx, a, p, &w, &skip));
            known = known || !skip;
        }
        if (!known && !is_scale(a, t->name)) a->unknown[a->n_unknown++] = t;
    }
    qsort(a->items, a->count, sizeof *a->items, compare_weights);
    return check_single(ctx, a);
}

/* which expert ids of a layer are there, as "0-4,6-15", for the message about a missing one */
static void list_experts(const exc_atlas *a, exc_role role, int64_t layer, char *out, size_t cap) {
    size_t n = 0;
    int64_t start = -1, last = -2;
    out[0] = 0;
    for (int64_t e = 0; e <= a->shape.experts && n + 24 < cap; e++) {
        bool here = e < a->shape.experts && exc_atlas_find(a, role, layer, e);
        if (here && start < 0) start = e;
        if (here) last = e;
        if (!here && start >= 0) {
            n += (size_t)(start == last ? snprintf(out + n, cap - n, "%s%lld", n ? "," : "", (long long)start)
                                        : snprintf(out + n, cap - n, "%s%lld-%lld", n ? "," : "",
                                                   (long long)start, (long long)last));
            start = -1;
        }
    }
    if (!n) snprintf(out, cap, "none");
}

static exc_status check_complete(exc_ctx *ctx, const exc_atlas *a) {
    const exc_shape *s = &a->shape;
    for (const exc_name *p = a->family->names; p->pattern; p++) {
        int64_t layers = exc_role_by_layer(p->role) ? s->layers : 1,
                experts = exc_role_by_expert(p->role) ? s->experts : 1, o, i;
        for (int64_t l = 0; l < layers; l++) {
            int64_t layer = exc_role_by_layer(p->role) ? l : -1;
            if (!exc_shape_role(s, a->family, p->role, layer, &o, &i)) continue;
            for (int64_t e = 0; e < experts; e++) {
                int64_t expert = exc_role_by_expert(p->role) ? e : -1;
                if (exc_atlas_find(a, p->role, layer, expert)) continue;
                char name[256], found[160];
                const char *pattern = pattern_of(a, p->role, layer);
                expand(pattern, layer, expert, name, sizeof name);
                if (!strstr(pattern, "%E"))
                    return exc_fail(ctx, EXC_ERR_INPUT,
                                    "%s: %s: expected this %s tensor (%s layout), found none", a->files->dir,
                                    name, exc_role_name(p->role), a->family->model_type);
                list_experts(a, p->role, layer, found, sizeof found);
                return exc_fail(ctx, EXC_ERR_INPUT,
                                "%s: %s: expected experts 0..%lld in layer %lld (%s %lld), found %s",
                                a->files->dir, name, (long long)s->experts - 1, (long long)layer,
                                a->family->experts_key, (long long)s->experts, found);
            }
        }
    }
    return EXC_OK;
}

/* XXH3-128 of the config (keys sorted) and of every tensor's name, dtype and shape. Data are left out on
 * purpose: an edited checkpoint is the same model to statistics, directions and plans. */
static exc_status make_fingerprint(exc_ctx *ctx, exc_atlas *a) {
    exc_buf b = {0};
    char *config = json_dumps(a->files->config, JSON_COMPACT | JSON_SORT_KEYS);
    if (!config)
        return exc_fail(ctx, EXC_ERR_MEMORY, "out of memory for the fingerprint of %s", a->files->dir);
    exc_buf_puts(&b, config);
    free(config);
    for (size_t i = 0; i < a->files->n_tensors; i++) {
        const exc_tensor *t = a->files->by_name[i];
        exc_buf_printf(&b, "\n%s %s", t->name, t->dtype_name ? t->dtype_name : exc_dtype_name(t->dtype));
        for (int d = 0; d < t->rank && d < 8; d++) exc_buf_printf(&b, " %lld", (long long)t->shape[d]);
    }
    exc_status st =
        b.failed ? exc_fail(ctx, EXC_ERR_MEMORY, "out of memory for the fingerprint of %s", a->files->dir)
                 : EXC_OK;
    if (!st) exc_hash_hex(b.data, b.len, a->fingerprint);
    exc_buf_free(&b);
    return st;
}

static exc_status find_family(exc_ctx *ctx, exc_atlas *a) {
    const json_t *config = a->files->config, *type = config ? json_object_get(config, "model_type") : NULL;
    if (json_is_string(type)) a->family = exc_family_find(json_string_value(type));
    if (a->family) return EXC_OK;
    char known[256];
    size_t n = 0;
    known[0] = 0;
    for (int i = 0; exc_families[i] && n < sizeof known; i++)
        n += (size_t)snprintf(known + n, sizeof known - n, "%s\"%s\"", i ? ", " : "",
                              exc_families[i]->model_type);
    return exc_fail(ctx, EXC_ERR_INPUT, "%s/config.json: model_type: expected %s, found %s%s%s",
                    a->files->dir, known, json_is_string(type) ? "\"" : "",
                    json_is_string(type) ? exc_show(json_string_value(type), json_string_length(type))
                    : type               ? "a value that is no string"
                                         : "nothing",
                    json_is_string(type) ? "\"" : "");
}

static exc_status build(exc_ctx *ctx, const char *dir, exc_atlas *a) {
    EXC_TRY(exc_checkpoint_open(ctx, dir, &a->files));
    EXC_TRY(find_family(ctx, a));
    EXC_TRY(exc_shape_read(ctx, a->files, a->family, &a->shape));
    EXC_TRY(exc_quant_guess(ctx, a->files));
    EXC_TRY(sort_out(ctx, a));
    EXC_TRY(check_complete(ctx, a));
    return make_fingerprint(ctx, a);
}

exc_status exc_atlas_open(exc_ctx *ctx, const char *dir, exc_atlas **out) {
    *out = NULL;
    exc_atlas *a = exc_zalloc(ctx, 1, sizeof *a, "model table");
    if (!a) return EXC_ERR_MEMORY;
    exc_status st = build(ctx, dir, a);
    if (st)
        exc_atlas_close(a);
    else
        *out = a;
    return st;
}

void exc_atlas_close(exc_atlas *a) {
    if (!a) return;
    exc_shape_free(&a->shape);
    exc_release(a->items);
    exc_release(a->unknown);
    exc_checkpoint_close(a->files);
    exc_release(a);
}

/* A few bytes of up to so many tensors tell an edited checkpoint from its source, for a page of each. Weights that differ in little else
 * get by: comparing all of them would cost a reading of the model. */
#define LOOKS 512
#define LOOK_BYTES 64

static uint64_t mark_of(const exc_atlas *a) {
    size_t n = a->files->n_tensors, looks = n < LOOKS ? n : LOOKS;
    uint64_t mark = exc_hash64(a->fingerprint, sizeof a->fingerprint);
    for (size_t i = 0; i < looks; i++) {
        const exc_tensor *t = a->files->by_name[i * n / looks];
        const exc_tensors *f = a->files->files[t->shard];
        size_t bytes = (size_t)(t->end - t->begin), part = bytes < LOOK_BYTES ? bytes : LOOK_BYTES;
        if (f->map && part) mark = mark * 31 + exc_hash64((const uint8_t *)exc_tensors_data(f, t) + (bytes - part) / 2, part);
    }
    return mark;
}

exc_status exc_atlas_open_same(exc_ctx *ctx, const char *dir, uint64_t more, exc_atlas **out) {
    EXC_TRY(exc_ranks_agree(ctx, "the model", exc_atlas_open(ctx, dir, out)));
    return exc_ranks_count(ctx) > 1 ? exc_ranks_meet(ctx, "the model", mark_of(*out) + more) : EXC_OK;
}
