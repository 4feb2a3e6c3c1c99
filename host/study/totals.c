/* totals.c - sums over observed tokens as an object and a file: list, load, save, add, look up.
 *
 * Everything in exc_stats adds up, so merging shards, resuming and joining machines are one addition: counts
 * i64 and sums f64 are added, what belongs to single prompts (routing counts for the bootstrap, residual
 * states) is put one after the other. A file is untrusted: shapes follow from the first arrays and bind all
 * others, sums must be finite, and counts must agree with each other (every observed token chose exactly K
 * experts), which catches a capture that silently lost a layer. */
#include <stdlib.h>
#include <string.h>

#include "totals.h"

#define FORMAT "1"
#define LOOK_BYTES ((int64_t)16 << 20) /* that go to a device at once to be looked at */

static const char *const label_name[2] = {"target", "baseline"}, *const phase_name[2] = {"prefill", "decode"};

/* ---------------------------------------------------------------------------------------------- the list */

/* Slots are pointers to several types; they are moved as bytes, which every data pointer here shares. */
void *exc_field_get(const exc_field *f) {
    void *data;
    memcpy(&data, f->slot, sizeof data);
    return data;
}

void exc_field_set(const exc_field *f, void *data) { memcpy(f->slot, &data, sizeof data); }

int64_t exc_field_count(const exc_field *f) {
    int64_t n = 1;
    for (int i = 0; i < f->rank; i++) n *= f->shape[i];
    return n;
}

static exc_field *put(exc_field *f, const char *name, exc_dtype dtype, const void *slot, int64_t a, int64_t b,
                      int64_t c) {
    memset(f, 0, sizeof *f);
    snprintf(f->name, sizeof f->name, "%s", name);
    f->dtype = dtype;
    f->rank = c ? 3 : b ? 2 : 1;
    f->shape[0] = a;
    f->shape[1] = b;
    f->shape[2] = c;
    f->slot = (void *)(uintptr_t)slot;
    return f;
}

static exc_field *put_group(exc_field *f, const exc_stats *s, int label, int phase) {
    const exc_group *g = &s->group[label][phase];
    int64_t M = s->moe_layers, E = s->experts;
    const struct {
        const char *name;
        exc_dtype dtype;
        const void *slot;
        int64_t b, c;
        bool optional;
    } part[] = {{"count", EXC_I64, &g->count, E, 0, false},
                {"gate_sum", EXC_F64, &g->gate_sum, E, 0, false},
                {"tokens", EXC_I64, &g->tokens, 0, 0, false},
                {"mid_sum", EXC_F64, &g->mid_sum, E, s->inner, false},
                {"out_sum", EXC_F64, &g->out_sum, E, s->hidden, true},
                {"sqnorm_sum", EXC_F64, &g->sqnorm_sum, E, 0, false},
                {"shared_out_sum", EXC_F64, &g->shared_out_sum, s->hidden, 0, true}};
    for (size_t i = 0; i < EXC_COUNT(part); i++) {
        char name[40];
        snprintf(name, sizeof name, "%s.%s.%s", label_name[label], phase_name[phase], part[i].name);
        put(f, name, part[i].dtype, part[i].slot, M, part[i].b, part[i].c)->optional = part[i].optional;
        f++;
    }
    return f;
}

void exc_stats_fields(const exc_stats *s, exc_field *f) {
    for (int label = 0; label < 2; label++) {
        char name[40];
        int64_t P = s->prompts[label];
        for (int phase = 0; phase < 2; phase++) f = put_group(f, s, label, phase);
        snprintf(name, sizeof name, "%s.prompt_count", label_name[label]);
        put(f++, name, EXC_U32, &s->prompt_count[label], P, s->moe_layers, s->experts)->by_prompt = true;
        snprintf(name, sizeof name, "%s.resid_last", label_name[label]);
        put(f++, name, EXC_F32, &s->resid_last[label], P, s->layers + 1, s->hidden)->by_prompt = true;
    }
}

static size_t field_bytes(const exc_field *f) {
    return (size_t)exc_field_count(f) * (exc_dtype_bits(f->dtype) / 8);
}

const void *exc_stats_array(const exc_stats *s, const char *name, const char **dtype, int *rank,
                            int64_t shape[4]) {
    exc_field all[EXC_STATS_FIELDS];
    if (!s || !name) return NULL;
    exc_stats_fields(s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) {
        if (strcmp(all[i].name, name) || !exc_field_get(&all[i])) continue;
        if (dtype) *dtype = exc_dtype_name(all[i].dtype);
        if (rank) *rank = all[i].rank;
        if (shape) memcpy(shape, all[i].shape, sizeof all[i].shape);
        return exc_field_get(&all[i]);
    }
    return NULL;
}

static json_t *label_facts(const exc_stats *s, int label) {
    json_t *o = json_pack("{s:I,s:I}", "prompts", (json_int_t)s->prompts[label], "observed",
                          (json_int_t)s->group[label][EXC_PREFILL].tokens[0]);
    if (s->decode)
        json_object_set_new(o, "decoded", json_integer(s->group[label][EXC_DECODE].tokens[0]));
    return o;
}

exc_status exc_stats_describe(exc_ctx *ctx, const exc_stats *s, char **json) {
    exc_clear(ctx);
    if (!s || !json) return exc_fail(ctx, EXC_ERR_USAGE, "stats: expected stats and a place for the text");
    json_t *o = json_pack("{s:s,s:I,s:I,s:I,s:I,s:I,s:i,s:b,s:o,s:o}", "model", s->fingerprint, "moe_layers",
                          (json_int_t)s->moe_layers, "experts", (json_int_t)s->experts, "top_k",
                          (json_int_t)s->top_k, "intermediate", (json_int_t)s->inner, "hidden",
                          (json_int_t)s->hidden, "decode", s->decode, "output_sums",
                          s->group[0][0].out_sum != NULL, "target", label_facts(s, EXC_TARGET), "baseline",
                          label_facts(s, EXC_BASELINE));
    *json = o ? exc_json_text(ctx, o) : NULL;
    json_decref(o);
    return *json ? EXC_OK : exc_fail(ctx, EXC_ERR_MEMORY, "stats: no memory for their description");
}

/* ------------------------------------------------------------------------------------------ made and freed
 */

void exc_stats_free(exc_stats *s) {
    exc_field all[EXC_STATS_FIELDS];
    if (!s) return;
    exc_stats_fields(s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) exc_release(exc_field_get(&all[i]));
    exc_release(s->layer_of);
    for (int i = 0; i < 2; i++) exc_release(s->prompt_hashes[i]);
    exc_release(s->options);
    exc_release(s);
}

static exc_status copy_text(exc_ctx *ctx, const char *from, char **to) {
    *to = exc_strdup(ctx, from ? from : "");
    return *to ? EXC_OK : EXC_ERR_MEMORY;
}

static exc_status fill_new(exc_ctx *ctx, const exc_stats *sizes, bool out_sum, exc_stats *s) {
    exc_field all[EXC_STATS_FIELDS];
    s->layer_of = exc_alloc(ctx, (size_t)s->moe_layers, sizeof *s->layer_of, "layers of the stats");
    if (!s->layer_of) return EXC_ERR_MEMORY;
    memcpy(s->layer_of, sizes->layer_of, (size_t)s->moe_layers * sizeof *s->layer_of);
    EXC_TRY(copy_text(ctx, sizes->options, &s->options));
    for (int i = 0; i < 2; i++) EXC_TRY(copy_text(ctx, sizes->prompt_hashes[i], &s->prompt_hashes[i]));
    exc_stats_fields(s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) {
        if (all[i].optional && (!out_sum || strstr(all[i].name, ".shared_"))) continue;
        void *data =
            exc_zalloc(ctx, (size_t)exc_field_count(&all[i]), exc_dtype_bits(all[i].dtype) / 8, all[i].name);
        if (!data) return EXC_ERR_MEMORY;
        exc_field_set(&all[i], data);
    }
    return EXC_OK;
}

exc_status exc_stats_new(exc_ctx *ctx, const exc_stats *sizes, bool out_sum, exc_stats **out) {
    *out = NULL;
    exc_stats *s = exc_zalloc(ctx, 1, sizeof *s, "stats");
    if (!s) return EXC_ERR_MEMORY;
    s->layers = sizes->layers;
    s->moe_layers = sizes->moe_layers;
    s->experts = sizes->experts;
    s->top_k = sizes->top_k;
    s->inner = sizes->inner;
    s->hidden = sizes->hidden;
    s->decode = sizes->decode;
    memcpy(s->prompts, sizes->prompts, sizeof s->prompts);
    memcpy(s->fingerprint, sizes->fingerprint, sizeof s->fingerprint);
    exc_status st = fill_new(ctx, sizes, out_sum, s);
    if (st == EXC_OK)
        *out = s;
    else
        exc_stats_free(s);
    return st;
}

/* ------------------------------------------------------------------------------------------------- checked
 */

static exc_status look(exc_ctx *ctx, const char *array, const void *data, exc_dtype dtype, int64_t n, int64_t *bad, int64_t *index) {
    struct exc_convert_args a = {
        .src = data, .src_dtype = dtype, .dst_dtype = dtype, .n = n, .nonfinite = bad, .index = index};
    exc_dock d = {.ctx = ctx, .what = array};
    exc_dock_in(&d, &a.src, (size_t)n * exc_dtype_bits(dtype) / 8);
    exc_dock_out(&d, &a.nonfinite, sizeof *bad);
    exc_dock_out(&d, &a.index, sizeof *index);
    return EXC_DOCK_CALL(&d, convert, &a);
}

exc_status exc_all_finite(exc_ctx *ctx, const char *what, const char *array, const void *data,
                          exc_dtype dtype, int64_t n) {
    int64_t all = 0, first = -1, unit = (int64_t)exc_dtype_bits(dtype) / 8, piece = ctx->module ? LOOK_BYTES / unit : n;
    for (int64_t at = 0, bad, index; at < n; at += piece) {
        int64_t now = n - at < piece ? n - at : piece;
        EXC_TRY(look(ctx, array, (const uint8_t *)data + at * unit, dtype, now, &bad, &index));
        if (first < 0 && index >= 0) first = at + index;
        all += bad;
    }
    if (!all) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_NUMERIC,
                    "%s: %s: expected finite values, found NaN or infinity at element %lld "
                    "(%lld in all)",
                    what, array, (long long)first, (long long)all);
}

/* every observed token chose K experts: their counts must say so, all together and prompt by prompt */
static exc_status check_counts(exc_ctx *ctx, const exc_stats *s, int label, int phase, const char *what) {
    const exc_group *g = &s->group[label][phase];
    for (int64_t m = 0; m < s->moe_layers; m++) {
        int64_t sum = 0;
        for (int64_t e = 0; e < s->experts; e++) {
            int64_t c = g->count[m * s->experts + e];
            if (c < 0 || c > g->tokens[m])
                return exc_fail(
                    ctx, EXC_ERR_INPUT,
                    "%s: %s.%s.count: layer %lld, expert %lld: expected 0..%lld (its tokens), found "
                    "%lld",
                    what, label_name[label], phase_name[phase], (long long)s->layer_of[m], (long long)e,
                    (long long)g->tokens[m], (long long)c);
            sum += c;
        }
        if (sum != g->tokens[m] * s->top_k)
            return exc_fail(
                ctx, EXC_ERR_INPUT,
                "%s: %s.%s.count: layer %lld: expected %lld choices (%lld tokens, top %lld), found "
                "%lld",
                what, label_name[label], phase_name[phase], (long long)s->layer_of[m],
                (long long)(g->tokens[m] * s->top_k), (long long)g->tokens[m], (long long)s->top_k,
                (long long)sum);
    }
    return EXC_OK;
}

static exc_status check_prompt_counts(exc_ctx *ctx, const exc_stats *s, int label, const char *what) {
    int64_t cells = s->moe_layers * s->experts;
    for (int64_t i = 0; i < cells; i++) {
        int64_t sum = 0;
        for (int64_t p = 0; p < s->prompts[label]; p++) sum += s->prompt_count[label][p * cells + i];
        if (sum != s->group[label][EXC_PREFILL].count[i])
            return exc_fail(
                ctx, EXC_ERR_INPUT,
                "%s: %s.prompt_count: layer %lld, expert %lld: expected a sum of %lld as in count, "
                "found %lld",
                what, label_name[label], (long long)s->layer_of[i / s->experts], (long long)(i % s->experts),
                (long long)s->group[label][EXC_PREFILL].count[i], (long long)sum);
    }
    return EXC_OK;
}

exc_status exc_stats_check(exc_ctx *ctx, const exc_stats *s, const char *what) {
    exc_field all[EXC_STATS_FIELDS];
    exc_stats_fields(s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++)
        if (exc_field_get(&all[i]) && (all[i].dtype == EXC_F64 || all[i].dtype == EXC_F32))
            EXC_TRY(exc_all_finite(ctx, what, all[i].name, exc_field_get(&all[i]), all[i].dtype,
                                   exc_field_count(&all[i])));
    for (int label = 0; label < 2; label++) {
        for (int phase = 0; phase < 2; phase++) EXC_TRY(check_counts(ctx, s, label, phase, what));
        EXC_TRY(check_prompt_counts(ctx, s, label, what));
    }
    return EXC_OK;
}

/* ---------------------------------------------------------------------------------------------------- save
 */

static exc_status write_meta(exc_writer *w, const exc_stats *s) {
    exc_buf layers = {0};
    char number[24];
    for (int64_t m = 0; m < s->moe_layers; m++)
        exc_buf_printf(&layers, "%s%lld", m ? "," : "", (long long)s->layer_of[m]);
    exc_status st = layers.failed ? EXC_ERR_MEMORY : exc_writer_meta(w, "excise_stats", FORMAT);
    if (st == EXC_OK) st = exc_writer_meta(w, "model", s->fingerprint);
    if (st == EXC_OK) st = exc_writer_meta(w, "layers", layers.data ? layers.data : "");
    snprintf(number, sizeof number, "%lld", (long long)s->top_k);
    if (st == EXC_OK) st = exc_writer_meta(w, "top_k", number);
    if (st == EXC_OK) st = exc_writer_meta(w, "target_prompts", s->prompt_hashes[EXC_TARGET]);
    if (st == EXC_OK) st = exc_writer_meta(w, "baseline_prompts", s->prompt_hashes[EXC_BASELINE]);
    if (st == EXC_OK) st = exc_writer_meta(w, "options", s->options);
    exc_buf_free(&layers);
    return st;
}

static exc_status write_all(exc_writer *w, const exc_stats *s) {
    exc_field all[EXC_STATS_FIELDS];
    exc_stats_fields(s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++)
        if (exc_field_get(&all[i]))
            EXC_TRY(exc_writer_declare(w, all[i].name, all[i].dtype, all[i].rank, all[i].shape));
    EXC_TRY(write_meta(w, s));
    for (int i = 0; i < EXC_STATS_FIELDS; i++)
        if (exc_field_get(&all[i]))
            EXC_TRY(exc_writer_put(w, all[i].name, exc_field_get(&all[i]), field_bytes(&all[i])));
    return EXC_OK;
}

exc_status exc_stats_save(exc_ctx *ctx, const exc_stats *s, const char *path, int force) {
    exc_writer *w = NULL;
    exc_clear(ctx);
    if (!s || !path) return exc_fail(ctx, EXC_ERR_USAGE, "stats: expected stats and a path");
    EXC_TRY(exc_writer_open(ctx, path, force, &w));
    exc_status st = write_all(w, s);
    if (st == EXC_OK) return exc_writer_commit(w);
    exc_writer_abort(w);
    return exc_fail(ctx, st, "%s: stats could not be written", path);
}

/* ---------------------------------------------------------------------------------------------------- load
 */

typedef struct reader {
    exc_ctx *ctx;
    const char *path;
    const exc_tensors *file;
} reader;

static exc_status meta(const reader *r, const char *key, const char **value) {
    *value = json_string_value(json_object_get(r->file->metadata, key));
    if (*value) return EXC_OK;
    return exc_fail(r->ctx, EXC_ERR_INPUT,
                    "%s: __metadata__: expected the key %s of a stats file, found none", r->path, key);
}

/* the sizes of one array, to start from */
static exc_status sizes_of(const reader *r, const char *name, int rank, int64_t *shape) {
    const exc_tensor *t = exc_tensors_find(r->file, name);
    if (!t) return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: expected the array %s, found none", r->path, name);
    if (t->rank != rank)
        return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: %s: expected %d dimensions, found %d", r->path, name,
                        rank, t->rank);
    for (int i = 0; i < rank; i++)
        if (t->shape[i] < 1 || t->shape[i] > (int64_t)1 << 31)
            return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: %s: expected positive sizes, found %lld", r->path,
                            name, (long long)t->shape[i]);
    memcpy(shape, t->shape, (size_t)rank * sizeof *shape);
    return EXC_OK;
}

/* ascending layer numbers, one for each row of the arrays */
static exc_status read_layers(const reader *r, const char *text, const exc_stats *s) {
    const char *p = text;
    int64_t m = 0, last = -1;
    for (; m < s->moe_layers; m++) {
        char *end;
        long long v = strtoll(p, &end, 10);
        if (end == p || v <= last || v >= s->layers || (*end && *end != ',')) break;
        s->layer_of[m] = last = v;
        p = *end ? end + 1 : end;
    }
    if (m == s->moe_layers && !*p) return EXC_OK;
    return exc_fail(r->ctx, EXC_ERR_INPUT,
                    "%s: __metadata__.layers: expected %lld ascending layer numbers below %lld, found %s",
                    r->path, (long long)s->moe_layers, (long long)s->layers, exc_show(text, strlen(text)));
}

static exc_status read_sizes(const reader *r, exc_stats *z) {
    int64_t a[3];
    EXC_TRY(sizes_of(r, "target.prefill.mid_sum", 3, a));
    z->moe_layers = a[0];
    z->experts = a[1];
    z->inner = a[2];
    for (int label = 0; label < 2; label++) {
        char name[40];
        snprintf(name, sizeof name, "%s.resid_last", label_name[label]);
        EXC_TRY(sizes_of(r, name, 3, a));
        z->prompts[label] = a[0];
        if (!label) z->layers = a[1] - 1;
        if (!label) z->hidden = a[2];
    }
    return EXC_OK;
}

static exc_status read_meta(const reader *r, exc_stats *z, const char **layers) {
    const char *text;
    json_t *options = NULL;
    int64_t decode = 0;
    EXC_TRY(meta(r, "excise_stats", &text));
    if (strcmp(text, FORMAT))
        return exc_fail(r->ctx, EXC_ERR_INPUT,
                        "%s: __metadata__.excise_stats: expected format version %s, found %s", r->path,
                        FORMAT, exc_show(text, strlen(text)));
    EXC_TRY(meta(r, "model", &text));
    if (strlen(text) != sizeof z->fingerprint - 1 || strspn(text, "0123456789abcdef") != strlen(text))
        return exc_fail(r->ctx, EXC_ERR_INPUT,
                        "%s: __metadata__.model: expected a fingerprint of 32 hex digits, "
                        "found %s",
                        r->path, exc_show(text, strlen(text)));
    memcpy(z->fingerprint, text, sizeof z->fingerprint);
    EXC_TRY(meta(r, "top_k", &text));
    z->top_k = strtoll(text, NULL, 10);
    if (z->top_k < 1 || z->top_k > z->experts)
        return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: __metadata__.top_k: expected 1..%lld, found %s", r->path,
                        (long long)z->experts, exc_show(text, strlen(text)));
    for (int i = 0; i < 2; i++) {
        EXC_TRY(meta(r, i ? "baseline_prompts" : "target_prompts", &text));
        z->prompt_hashes[i] = (char *)(uintptr_t)text; /* copied by exc_stats_new */
    }
    EXC_TRY(meta(r, "layers", layers));
    EXC_TRY(meta(r, "options", &text));
    z->options = (char *)(uintptr_t)text;
    EXC_TRY(exc_json_parse(r->ctx, r->path, text, strlen(text), &options));
    exc_status st = exc_json_int_or(r->ctx, options, r->path, "decode", 0, INT32_MAX, 0, &decode);
    json_decref(options);
    z->decode = (int)decode;
    return st;
}

static void shape_text(const int64_t *shape, int rank, char out[96]) {
    size_t n = 0;
    out[0] = 0;
    for (int i = 0; i < rank && n < 80; i++)
        n += (size_t)snprintf(out + n, 96 - n, "%s%lld", i ? "," : "", (long long)shape[i]);
}

/* Sizes of all arrays follow from three of them, and are compared with the file before room is taken: a
 * header cannot make this allocate more than the file holds. */
static exc_status check_field(const reader *r, const exc_field *f) {
    const exc_tensor *t = exc_tensors_find(r->file, f->name);
    char want[96], found[96];
    if (!t && f->optional) return EXC_OK;
    if (!t) return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: expected the array %s, found none", r->path, f->name);
    if (t->dtype == f->dtype && t->rank == f->rank &&
        !memcmp(t->shape, f->shape, (size_t)f->rank * sizeof *f->shape))
        return EXC_OK;
    shape_text(f->shape, f->rank, want);
    shape_text(t->shape, t->rank < 8 ? t->rank : 8, found);
    return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: %s: expected %s [%s], found %s [%s]", r->path, f->name,
                    exc_dtype_name(f->dtype), want, t->dtype_name, found);
}

static exc_status read_field(const reader *r, const exc_field *f) {
    const exc_tensor *t = exc_tensors_find(r->file, f->name);
    if (!t) return EXC_OK;
    if (!exc_field_get(f)) { /* optional and there */
        void *data = exc_alloc(r->ctx, (size_t)exc_field_count(f), exc_dtype_bits(f->dtype) / 8, f->name);
        if (!data) return EXC_ERR_MEMORY;
        exc_field_set(f, data);
    }
    memcpy(exc_field_get(f), exc_tensors_data(r->file, t), field_bytes(f));
    return EXC_OK;
}

/* output sums are there for all groups or for none: half of a difference is no difference */
static exc_status check_outputs(const reader *r, const exc_stats *s) {
    bool there = s->group[0][0].out_sum;
    for (int i = 1; i < 4; i++)
        if ((s->group[i / 2][i % 2].out_sum != NULL) != there)
            return exc_fail(r->ctx, EXC_ERR_INPUT,
                            "%s: expected .out_sum for all labels and phases or for none", r->path);
    return EXC_OK;
}

static exc_status read_stats(const reader *r, exc_stats **out) {
    exc_stats z = {0}, *s = NULL;
    exc_field all[EXC_STATS_FIELDS];
    const char *layers = NULL;
    exc_status st;
    EXC_TRY(read_sizes(r, &z));
    EXC_TRY(read_meta(r, &z, &layers));
    exc_stats_fields(&z, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) EXC_TRY(check_field(r, &all[i]));
    z.layer_of = exc_zalloc(r->ctx, (size_t)z.moe_layers, sizeof *z.layer_of, "layers of the stats");
    if (!z.layer_of) return EXC_ERR_MEMORY;
    EXC_GOTO(done, read_layers(r, layers, &z));
    EXC_GOTO(done, exc_stats_new(r->ctx, &z, false, &s));
    exc_stats_fields(s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) EXC_GOTO(done, read_field(r, &all[i]));
    EXC_GOTO(done, check_outputs(r, s));
    st = exc_stats_check(r->ctx, s, r->path);
done:
    exc_release(z.layer_of);
    if (st == EXC_OK)
        *out = s;
    else
        exc_stats_free(s);
    return st;
}

exc_status exc_stats_load(exc_ctx *ctx, const char *path, exc_stats **stats) {
    exc_tensors *file = NULL;
    exc_clear(ctx);
    if (!path || !stats)
        return exc_fail(ctx, EXC_ERR_USAGE, "stats: expected a path and a place for the result");
    *stats = NULL;
    EXC_TRY(exc_tensors_open(ctx, path, &file));
    exc_status st = read_stats(&(reader){ctx, path, file}, stats);
    exc_tensors_close(file);
    return st;
}

/* ----------------------------------------------------------------------------------------------------- add
 */

static exc_status check_same(exc_ctx *ctx, const exc_stats *a, const exc_stats *b) {
    const struct {
        const char *name;
        int64_t want, found;
    } size[] = {{"layers", a->layers, b->layers},         {"MoE layers", a->moe_layers, b->moe_layers},
                {"experts", a->experts, b->experts},      {"experts per token", a->top_k, b->top_k},
                {"intermediate", a->inner, b->inner},     {"hidden", a->hidden, b->hidden},
                {"tokens fed back", a->decode, b->decode}};
    if (strcmp(a->fingerprint, b->fingerprint))
        return exc_fail(ctx, EXC_ERR_INPUT, "stats of another model: expected fingerprint %s, found %s",
                        a->fingerprint, b->fingerprint);
    for (size_t i = 0; i < EXC_COUNT(size); i++)
        if (size[i].want != size[i].found)
            return exc_fail(ctx, EXC_ERR_INPUT, "stats cannot be added: expected %lld %s, found %lld",
                            (long long)size[i].want, size[i].name, (long long)size[i].found);
    if (memcmp(a->layer_of, b->layer_of, (size_t)a->moe_layers * sizeof *a->layer_of))
        return exc_fail(ctx, EXC_ERR_INPUT, "stats cannot be added: their rows are different layers");
    if (!a->group[0][0].out_sum != !b->group[0][0].out_sum)
        return exc_fail(ctx, EXC_ERR_INPUT, "stats cannot be added: only one of them has .out_sum");
    for (int i = 0; i < 4; i++)
        if (!a->group[i / 2][i % 2].shared_out_sum != !b->group[i / 2][i % 2].shared_out_sum)
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "stats cannot be added: only one of them has %s.%s.shared_out_sum",
                            label_name[i / 2], phase_name[i % 2]);
    if (strcmp(a->options, b->options))
        return exc_fail(ctx, EXC_ERR_INPUT, "stats cannot be added: expected options %s, found %s",
                        a->options, exc_show(b->options, strlen(b->options)));
    return EXC_OK;
}

/* the prompts of both, one after the other, and what is written about them; nothing is changed yet */
static exc_status join_prompts(exc_ctx *ctx, const exc_stats *a, const exc_stats *b, exc_stats *sum) {
    exc_field fa[EXC_STATS_FIELDS], fb[EXC_STATS_FIELDS], fs[EXC_STATS_FIELDS];
    for (int i = 0; i < 2; i++) {
        exc_buf text = {0};
        sum->prompts[i] = a->prompts[i] + b->prompts[i];
        exc_buf_printf(&text, "%s%s%s", a->prompt_hashes[i], a->prompt_hashes[i][0] ? "," : "",
                       b->prompt_hashes[i]);
        sum->prompt_hashes[i] = text.failed ? NULL : exc_strdup(ctx, text.data);
        exc_buf_free(&text);
        if (!sum->prompt_hashes[i])
            return exc_fail(ctx, EXC_ERR_MEMORY, "stats: no memory for prompt hashes");
    }
    exc_stats_fields(a, fa);
    exc_stats_fields(b, fb);
    exc_stats_fields(sum, fs);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) {
        if (!fa[i].by_prompt) continue;
        size_t na = field_bytes(&fa[i]), nb = field_bytes(&fb[i]);
        uint8_t *data = exc_alloc(ctx, na + nb, 1, fa[i].name);
        if (!data) return EXC_ERR_MEMORY;
        memcpy(data, exc_field_get(&fa[i]), na);
        memcpy(data + na, exc_field_get(&fb[i]), nb);
        exc_field_set(&fs[i], data);
    }
    return EXC_OK;
}

static void add_field(const exc_field *into, const exc_field *from) {
    int64_t n = exc_field_count(into);
    if (into->dtype == EXC_I64) {
        int64_t *a = exc_field_get(into);
        const int64_t *b = exc_field_get(from);
        for (int64_t i = 0; i < n; i++) a[i] += b[i];
    } else {
        double *a = exc_field_get(into);
        const double *b = exc_field_get(from);
        for (int64_t i = 0; i < n; i++) a[i] += b[i];
    }
}

static bool named_in(const char *list, const char *hashes) {
    for (const char *p = hashes; *p;) {
        size_t n = strcspn(p, ",");
        for (const char *q = list; n && (q = strchr(q, *p)); q++)
            if (!strncmp(q, p, n) && (q == list || q[-1] == ',') && (!q[n] || q[n] == ',')) return true;
        p += n + (p[n] == ',');
    }
    return false;
}

/* `into` takes over what `sum` holds for prompts, and gives its own for release */
static void swap_prompts(exc_stats *into, exc_stats *sum) {
    for (int i = 0; i < 2; i++) {
        exc_stats old = *into;
        into->prompts[i] = sum->prompts[i];
        into->prompt_hashes[i] = sum->prompt_hashes[i];
        into->prompt_count[i] = sum->prompt_count[i];
        into->resid_last[i] = sum->resid_last[i];
        sum->prompt_hashes[i] = old.prompt_hashes[i];
        sum->prompt_count[i] = old.prompt_count[i];
        sum->resid_last[i] = old.resid_last[i];
    }
}

exc_status exc_stats_add(exc_ctx *ctx, exc_stats *into, const exc_stats *from) {
    exc_field fi[EXC_STATS_FIELDS], ff[EXC_STATS_FIELDS];
    exc_clear(ctx);
    if (!into || !from) return exc_fail(ctx, EXC_ERR_USAGE, "stats: expected two stats to add");
    EXC_TRY(check_same(ctx, into, from));
    exc_stats *sum = exc_zalloc(ctx, 1, sizeof *sum, "stats");
    if (!sum) return EXC_ERR_MEMORY;
    sum->layers = into->layers;
    sum->moe_layers = into->moe_layers;
    sum->experts = into->experts;
    sum->hidden = into->hidden;
    exc_status st = join_prompts(ctx, into, from, sum);
    if (st == EXC_OK) {
        for (int i = 0; i < 2; i++)
            if (named_in(into->prompt_hashes[i], from->prompt_hashes[i]))
                exc_warn(ctx, "stats: a prompt file of the %s set is in both parts and counts twice",
                         label_name[i]);
        exc_stats_fields(into, fi);
        exc_stats_fields(from, ff);
        for (int i = 0; i < EXC_STATS_FIELDS; i++)
            if (!fi[i].by_prompt && exc_field_get(&fi[i]) && exc_field_get(&ff[i])) add_field(&fi[i], &ff[i]);
        swap_prompts(into, sum);
    }
    exc_stats_free(sum);
    return st;
}
