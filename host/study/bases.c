/* bases.c - directions as a file: basis [L+1,K,H], singular_values, mean_difference, and expert_basis
 * [M,E,K,H] when asked for.
 *
 * What an edit does depends on the rows being orthonormal (W - R (R^T W) removes nothing exactly when they
 * are not), so a file whose rows are neither orthonormal nor zero is refused, naming the row, instead of
 * quietly corrected. A file made by another program needs no metadata: a fingerprint, where there is one, is
 * compared when directions meet a model. */
#include <math.h>
#include <string.h>

#include "totals.h"

#define FORMAT "1"
#define ORTHONORMAL 1e-3 /* bases written in half precision by others still pass; ours are within 1e-6 */

void exc_dirs_free(exc_dirs *d) {
    if (!d) return;
    exc_release(d->basis);
    exc_release(d->singular);
    exc_release(d->mean_difference);
    exc_release(d->expert_basis);
    exc_release(d->options);
    exc_release(d);
}

const float *exc_dirs_basis(const exc_dirs *d, int64_t *rows, int64_t *rank, int64_t *hidden) {
    if (!d) return NULL;
    if (rows) *rows = d->rows;
    if (rank) *rank = d->rank;
    if (hidden) *hidden = d->hidden;
    return d->basis;
}

/* ---------------------------------------------------------------------------------------------------- the
 * list */

enum { ARRAYS = 4 };
typedef struct array {
    const char *name;
    float **data;
    int rank;
    int64_t shape[4];
} array;

static void list_arrays(exc_dirs *d, array *a) {
    a[0] = (array){"basis", &d->basis, 3, {d->rows, d->rank, d->hidden}};
    a[1] = (array){"singular_values", &d->singular, 2, {d->rows, d->rank}};
    a[2] = (array){"mean_difference", &d->mean_difference, 2, {d->rows, d->hidden}};
    a[3] = (array){"expert_basis", &d->expert_basis, 4, {d->moe_layers, d->experts, d->rank, d->hidden}};
}

static int64_t count_of(const array *a) {
    int64_t n = 1;
    for (int i = 0; i < a->rank; i++) n *= a->shape[i];
    return n;
}

/* ---------------------------------------------------------------------------------------------------------
 * save */

/* the stats' own metadata travel in the options; other readers look for them under the same keys as in stats
 */
static exc_status write_meta(exc_ctx *ctx, exc_writer *w, const exc_dirs *d) {
    static const char *const copied[] = {"layers", "target_prompts", "baseline_prompts"};
    const char *options = d->options ? d->options : "{}";
    json_t *o = NULL;
    EXC_TRY(exc_writer_meta(w, "excise_directions", FORMAT));
    if (d->fingerprint[0]) EXC_TRY(exc_writer_meta(w, "model", d->fingerprint));
    EXC_TRY(exc_writer_meta(w, "options", options));
    EXC_TRY(exc_json_parse(ctx, "options of the directions", options, strlen(options), &o));
    exc_status st = EXC_OK;
    for (size_t i = 0; i < EXC_COUNT(copied) && st == EXC_OK; i++) {
        const char *text = json_string_value(json_object_get(o, copied[i]));
        if (text) st = exc_writer_meta(w, copied[i], text);
    }
    json_decref(o);
    return st;
}

static exc_status write_all(exc_ctx *ctx, exc_writer *w, const exc_dirs *dirs) {
    exc_dirs d = *dirs;
    array a[ARRAYS];
    list_arrays(&d, a);
    for (int i = 0; i < ARRAYS; i++)
        if (*a[i].data) EXC_TRY(exc_writer_declare(w, a[i].name, EXC_F32, a[i].rank, a[i].shape));
    EXC_TRY(write_meta(ctx, w, dirs));
    for (int i = 0; i < ARRAYS; i++)
        if (*a[i].data)
            EXC_TRY(exc_writer_put(w, a[i].name, *a[i].data, (size_t)count_of(&a[i]) * sizeof(float)));
    return EXC_OK;
}

exc_status exc_dirs_save(exc_ctx *ctx, const exc_dirs *dirs, const char *path, int force) {
    exc_writer *w = NULL;
    exc_clear(ctx);
    if (!dirs || !path) return exc_fail(ctx, EXC_ERR_USAGE, "directions: expected directions and a path");
    EXC_TRY(exc_writer_open(ctx, path, force != 0, &w));
    exc_status st = write_all(ctx, w, dirs);
    if (st == EXC_OK) return exc_writer_commit(w);
    exc_writer_abort(w);
    return exc_fail(ctx, st, "%s: directions could not be written", path);
}

/* ---------------------------------------------------------------------------------------------------------
 * load */

static exc_status read_sizes(exc_ctx *ctx, const char *path, const exc_tensors *file, exc_dirs *d) {
    const exc_tensor *t = exc_tensors_find(file, "basis"), *e = exc_tensors_find(file, "expert_basis");
    if (!t)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected the array basis of a directions file, found none",
                        path);
    if (t->rank != 3 || t->shape[0] < 2 || t->shape[1] < 1 || t->shape[2] < 1)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: basis: expected F32 [layers+1,K,hidden], found %d dimensions or an empty one",
                        path, t->rank);
    if (t->shape[1] > 64)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: basis: expected a rank of 1..64, found rank %lld", path,
                        (long long)t->shape[1]);
    d->rows = t->shape[0];
    d->rank = t->shape[1];
    d->hidden = t->shape[2];
    if (!e) return EXC_OK;
    if (e->rank != 4 || e->shape[0] < 1 || e->shape[1] < 1)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: expert_basis: expected F32 [MoE layers,experts,K,hidden], found %d dimensions",
                        path, e->rank);
    d->moe_layers = e->shape[0];
    d->experts = e->shape[1];
    return EXC_OK;
}

static exc_status read_array(exc_ctx *ctx, const char *path, const exc_tensors *file, const array *a) {
    const exc_tensor *t = exc_tensors_find(file, a->name);
    if (!t && !strcmp(a->name, "expert_basis")) return EXC_OK;
    if (!t) return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected the array %s, found none", path, a->name);
    if (t->dtype != EXC_F32 || t->rank != a->rank ||
        memcmp(t->shape, a->shape, (size_t)a->rank * sizeof *a->shape))
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: %s: expected F32 with sizes as in basis [%lld,%lld,%lld], found others (%s)",
                        path, a->name, (long long)a->shape[0], (long long)a->shape[1], (long long)a->shape[2],
                        t->dtype_name);
    float *data = *a->data = exc_alloc(ctx, (size_t)count_of(a), sizeof *data, a->name);
    if (!data) return EXC_ERR_MEMORY;
    memcpy(data, exc_tensors_data(file, t), (size_t)count_of(a) * sizeof *data);
    return exc_all_finite(ctx, path, a->name, data, EXC_F32, count_of(a));
}

static exc_status read_meta(exc_ctx *ctx, const char *path, const exc_tensors *file, exc_dirs *d) {
    const char *version = json_string_value(json_object_get(file->metadata, "excise_directions")),
               *model = json_string_value(json_object_get(file->metadata, "model")),
               *options = json_string_value(json_object_get(file->metadata, "options"));
    if (version && strcmp(version, FORMAT))
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: __metadata__.excise_directions: expected format version %s, found %s", path,
                        FORMAT, exc_show(version, strlen(version)));
    if (model &&
        (strlen(model) != sizeof d->fingerprint - 1 || strspn(model, "0123456789abcdef") != strlen(model)))
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: __metadata__.model: expected a fingerprint of 32 hex digits, found %s", path,
                        exc_show(model, strlen(model)));
    if (model) memcpy(d->fingerprint, model, sizeof d->fingerprint);
    json_t *o = NULL;
    if (options) EXC_TRY(exc_json_parse(ctx, path, options, strlen(options), &o));
    json_decref(o);
    d->options = exc_strdup(ctx, options ? options : "{}");
    return d->options ? EXC_OK : EXC_ERR_MEMORY;
}

/* rows of one basis: orthonormal or zero */
static bool is_basis(const float *v, int64_t rank, int64_t hidden) {
    for (int64_t i = 0; i < rank; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = 0;
            for (int64_t h = 0; h < hidden; h++) sum += (double)v[i * hidden + h] * (double)v[j * hidden + h];
            if (fabs(sum - (i == j)) > ORTHONORMAL && !(i == j && sum == 0)) return false;
        }
    return true;
}

static exc_status check_bases(exc_ctx *ctx, const char *path, const exc_dirs *d) {
    int64_t size = d->rank * d->hidden, experts = d->moe_layers * d->experts;
    for (int64_t i = 0; i < d->rows; i++)
        if (!is_basis(d->basis + i * size, d->rank, d->hidden))
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s: basis: row %lld: expected orthonormal vectors or zeros, found neither", path,
                            (long long)i);
    for (int64_t i = 0; d->expert_basis && i < experts; i++)
        if (!is_basis(d->expert_basis + i * size, d->rank, d->hidden))
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s: expert_basis: row %lld, expert %lld: expected orthonormal vectors or zeros, "
                            "found neither",
                            path, (long long)(i / d->experts), (long long)(i % d->experts));
    return EXC_OK;
}

static exc_status read_all(exc_ctx *ctx, const char *path, const exc_tensors *file, exc_dirs *d) {
    array a[ARRAYS];
    EXC_TRY(read_sizes(ctx, path, file, d));
    EXC_TRY(read_meta(ctx, path, file, d));
    list_arrays(d, a);
    for (int i = 0; i < ARRAYS; i++) EXC_TRY(read_array(ctx, path, file, &a[i]));
    return check_bases(ctx, path, d);
}

exc_status exc_dirs_load(exc_ctx *ctx, const char *path, exc_dirs **dirs) {
    exc_tensors *file = NULL;
    exc_clear(ctx);
    if (!path || !dirs)
        return exc_fail(ctx, EXC_ERR_USAGE, "directions: expected a path and a place for the result");
    *dirs = NULL;
    exc_dirs *d = exc_zalloc(ctx, 1, sizeof *d, "directions");
    if (!d) return EXC_ERR_MEMORY;
    exc_status st = exc_tensors_open(ctx, path, &file);
    if (st == EXC_OK) st = read_all(ctx, path, file, d);
    exc_tensors_close(file);
    if (st == EXC_OK)
        *dirs = d;
    else
        exc_dirs_free(d);
    return st;
}
