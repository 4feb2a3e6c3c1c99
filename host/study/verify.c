/* verify.c - proves from files alone that OUT is MODEL with only the plan's tensors changed, each to exactly what the plan
 * gives: sizes and headers are equal byte for byte, every byte outside the planned tensors is equal, every planned tensor equals
 * the edit made anew from MODEL, side files are the same, and nothing was added but excise/. A difference is refused
 * naming the tensor and the element, or the file and the byte.
 *
 * Nothing is believed that apply wrote about itself: residuals are taken again. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edits.h"

#define PIECE ((uint64_t)1 << 20) /* bytes of one comparing task */
#define MAX_DEPTH 16

typedef struct span {
    int file;
    uint64_t begin, end;
} span;

typedef struct work {
    exc_ctx *ctx;
    const char *dir, *out;
    exc_atlas *a;
    exc_compiled *c;
    exc_edited e;
    exc_tensors **files; /* [n_files] of OUT */
    span *same;          /* pieces that must be equal */
    size_t n_same;
    _Atomic size_t first_bad; /* the first of them that is not */
    exc_rounding rounding;
    bool to_bf16;        /* OUT holds bf16 where MODEL is quantised */
    size_t widened;      /* tensors compared in a file */
    uint64_t compared;
    int64_t side_files;
} work;

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool dots(const char *s) { return !strcmp(s, ".") || !strcmp(s, ".."); }

/* ------------------------------------------------------------------------------------------------------- the shards */

static size_t first_difference(const uint8_t *a, const uint8_t *b, size_t n) {
    size_t i = 0;
    while (i < n && a[i] == b[i]) i++;
    return i;
}

static exc_status open_shard(work *k, int i) {
    const exc_tensors *from = k->a->files->files[i];
    char *path = NULL;
    EXC_TRY(exc_path_join(k->ctx, k->out, base_name(from->path), &path));
    exc_status st = exc_tensors_open(k->ctx, path, &k->files[i]);
    exc_release(path);
    EXC_TRY(st);
    const exc_tensors *f = k->files[i];
    size_t head = from->header_bytes < f->size ? from->header_bytes : f->size, at = first_difference(from->map, f->map, head);
    if (at < from->header_bytes)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: header: expected the bytes of %s, found a difference at byte %zu", f->path, from->path, at);
    if (f->size == from->size) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: size: expected %zu bytes, found %zu", f->path, from->size, f->size);
}

static void compare_piece(void *arg, size_t task, int worker) {
    work *k = arg;
    const span *s = &k->same[task];
    (void)worker;
    if (task > k->first_bad) return;
    if (!memcmp(k->a->files->files[s->file]->map + s->begin, k->files[s->file]->map + s->begin, (size_t)(s->end - s->begin))) return;
    size_t seen = k->first_bad;
    while (task < seen && !__atomic_compare_exchange_n((size_t *)&k->first_bad, &seen, task, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

static void add_span(work *k, int file, uint64_t begin, uint64_t end, bool count_only) {
    for (; begin < end; begin += PIECE) {
        uint64_t to = end - begin > PIECE ? begin + PIECE : end;
        if (!count_only) k->same[k->n_same] = (span){file, begin, to};
        k->n_same++;
    }
}

/* what lies between edited ranges and their scales, gaps of the file included, in pieces */
static void list_spans(work *k, bool count_only) {
    size_t i = 0, j = 0;
    const exc_edited *e = &k->e;
    k->n_same = 0;
    for (int f = 0; f < k->a->files->n_files; f++) {
        uint64_t at = k->a->files->files[f]->header_bytes;
        for (;;) {
            const exc_edited_range *r = i < e->n_ranges && e->range[i].file == f ? &e->range[i] : NULL;
            const exc_edited_range *s = j < e->n_stretches && e->stretch[j].file == f ? &e->stretch[j] : NULL;
            if (!r && !s) break;
            bool scales = s && (!r || s->begin < r->begin);
            if (scales) r = s, j++;
            else i++;
            add_span(k, f, at, r->begin, count_only);
            at = r->end;
        }
        add_span(k, f, at, k->a->files->files[f]->size, count_only);
    }
}

static exc_status report_piece(work *k, const span *s) {
    const exc_tensors *from = k->a->files->files[s->file], *f = k->files[s->file];
    uint64_t at = s->begin + first_difference(from->map + s->begin, f->map + s->begin, (size_t)(s->end - s->begin));
    for (size_t i = 0; i < from->count; i++) {
        const exc_tensor *t = &from->items[i];
        if (at >= t->begin && at < t->end)
            return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: %s: expected the bytes of %s (the plan does not edit it), found a difference at byte %llu of it",
                            f->path, t->name, from->path, (unsigned long long)(at - t->begin));
    }
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected the bytes of %s, found a difference at byte %llu", f->path, from->path, (unsigned long long)at);
}

static exc_status compare_rest(work *k) {
    list_spans(k, true);
    k->same = exc_alloc(k->ctx, k->n_same ? k->n_same : 1, sizeof *k->same, "pieces to compare");
    if (!k->same) return EXC_ERR_MEMORY;
    list_spans(k, false);
    k->first_bad = k->n_same;
    /* a slice at a time, so that progress is told and a wish to stop is heard */
    for (size_t at = 0, step = 256; at < k->n_same; at += step) {
        size_t n = k->n_same - at < step ? k->n_same - at : step;
        span *all = k->same;
        size_t total = k->n_same;
        k->same = all + at;
        k->first_bad = n;
        k->ctx->queue.parallel(&k->ctx->queue, n, compare_piece, k);
        k->same = all;
        for (size_t i = 0; i < n; i++) k->compared += all[at + i].end - all[at + i].begin;
        if (k->first_bad < n) return report_piece(k, &all[at + k->first_bad]);
        EXC_TRY(exc_progress(k->ctx, "compare", at + n, total, "MiB"));
    }
    return EXC_OK;
}

static exc_status compare_edited(void *user, const exc_edited *e, const exc_edited_range *r, const void *dst) {
    work *k = user;
    const exc_weight *w = e->w[r->at[0]];
    const exc_tensors *f = k->files[r->file];
    const uint8_t *old = k->a->files->files[r->file]->map + r->begin, *got = f->map + r->begin;
    size_t n = (size_t)(r->end - r->begin), bits = exc_dtype_bits((exc_dtype)w->dtype);
    char name[256];
    k->compared += n;
    if (!memcmp(got, dst, n)) return EXC_OK;
    exc_weight_label(w, name, sizeof name);
    if (!memcmp(got, old, n))
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: %s: expected the edited tensor, found it unedited", f->path, name);
    int64_t i = (int64_t)(first_difference(got, dst, n) * 8 / bits), row = w->out_step > w->in_step ? w->out_step : w->in_step;
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: %s: expected what the plan gives, found a difference at [%lld,%lld]", f->path, name,
                    (long long)(i / row), (long long)(i % row));
}

static exc_status compare_scales(void *user, const exc_edited *e, const exc_edited_range *r, const void *want) {
    work *k = user;
    const exc_tensors *f = k->files[r->file];
    size_t n = (size_t)(r->end - r->begin);
    k->compared += n;
    if (!memcmp(f->map + r->begin, want, n)) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: %s: expected the scales that the plan gives, found a difference at byte %zu of them", f->path,
                    e->w[r->at[0]]->scale->name, first_difference(f->map + r->begin, want, n));
}

/* -------------------------------------------------------------------------------------------------------- side files */

static exc_status map_file(exc_ctx *ctx, const char *path, const uint8_t **map, size_t *n) {
    struct stat sb;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    *map = NULL;
    *n = 0;
    if (fd < 0) return exc_fail_errno(ctx, "%s", path);
    exc_status st = EXC_OK;
    if (fstat(fd, &sb)) st = exc_fail_errno(ctx, "%s", path);
    else if (!S_ISREG(sb.st_mode)) st = exc_fail(ctx, EXC_ERR_INPUT, "%s: expected a regular file, found another kind", path);
    else if ((*n = (size_t)sb.st_size)) {
        void *p = mmap(NULL, *n, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) st = exc_fail_errno(ctx, "%s: mmap", path);
        else *map = p;
    }
    close(fd);
    return st;
}

static exc_status same_file(work *k, const char *from, const char *to) {
    const uint8_t *a, *b = NULL;
    size_t n, m = 0;
    exc_status st = map_file(k->ctx, from, &a, &n);
    if (st == EXC_OK) st = map_file(k->ctx, to, &b, &m);
    if (st == EXC_OK && n != m)
        st = exc_fail(k->ctx, EXC_ERR_INPUT, "%s: size: expected %zu bytes as in %s, found %zu", to, n, from, m);
    else if (st == EXC_OK && n && memcmp(a, b, n))
        st = exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected the bytes of %s, found a difference at byte %zu", to, from, first_difference(a, b, n));
    if (a) munmap((void *)(uintptr_t)a, n);
    if (b) munmap((void *)(uintptr_t)b, m);
    k->compared += n;
    k->side_files++;
    return st;
}

/* ---- OUT holds as bf16 what MODEL holds quantised: every tensor is made anew */
static bool is_widened(const work *k) {
    char *path = NULL;
    json_t *config = NULL;
    bool plain = false;
    if (k->a->shape.quant != EXC_QUANT_NONE && exc_path_join(k->ctx, k->out, "config.json", &path) == EXC_OK &&
        exc_json_load(k->ctx, path, 0, &config) == EXC_OK)
        plain = !json_object_get(config, "quantization_config");
    json_decref(config);
    exc_release(path);
    exc_clear(k->ctx);
    return plain;
}

static exc_status compare_widened(void *user, const exc_tensor *t, const exc_widened *w) {
    work *k = user;
    const exc_tensors *f = k->files[t->shard];
    const exc_tensor *got = exc_tensors_find(f, w->name);
    bool fits = got && got->dtype == w->dtype && got->rank == w->rank && got->end - got->begin == w->bytes;
    for (int i = 0; fits && i < w->rank; i++) fits = got->shape[i] == w->shape[i];
    if (!fits)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: %s: expected this tensor as %s, found %s", f->path, w->name, exc_dtype_name(w->dtype),
                        got ? "another dtype or shape" : "none");
    k->compared += w->bytes;
    k->widened++;
    const uint8_t *bytes = exc_tensors_data(f, got);
    if (!memcmp(bytes, w->data, (size_t)w->bytes)) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: %s: expected what the plan gives, found a difference at byte %zu of it", f->path, w->name,
                    first_difference(bytes, w->data, (size_t)w->bytes));
}

/* it opens as a checkpoint: index and shards agree */
static exc_status open_widened(work *k) {
    exc_atlas *a = NULL;
    EXC_TRY(exc_atlas_open(k->ctx, k->out, &a));
    exc_atlas_close(a);
    return EXC_OK;
}

static exc_status verify_widened(work *k) {
    for (int i = 0; i < k->a->files->n_files; i++) {
        char *path = NULL;
        EXC_TRY(exc_path_join(k->ctx, k->out, base_name(k->a->files->files[i]->path), &path));
        exc_status st = exc_tensors_open(k->ctx, path, &k->files[i]);
        exc_release(path);
        EXC_TRY(st);
        k->widened = 0;
        EXC_TRY(exc_widened_make(&k->e, i, "verify", compare_widened, k));
        if (k->widened != k->files[i]->count)
            return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected %zu tensors, found %zu", k->files[i]->path, k->widened, k->files[i]->count);
    }
    return EXC_OK;
}

/* config.json of a checkpoint without its quantization, as apply writes it */
static exc_status same_config(work *k, const char *to) {
    json_t *want = exc_widened_config(k->a->files), *got = NULL;
    exc_status st = exc_json_load(k->ctx, to, 0, &got);
    if (st == EXC_OK && !json_equal(want, got))
        st = exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected the source's without quantization_config, found another", to);
    json_decref(want);
    json_decref(got);
    return st;
}

static bool is_shard(const work *k, const char *path) {
    for (int i = 0; i < k->a->files->n_files; i++)
        if (!strcmp(k->a->files->files[i]->path, path)) return true;
    return false;
}

static exc_status compare_tree(work *k, const char *from, const char *to, int depth);

static exc_status compare_entry(work *k, const char *name, const char *from, const char *to, int depth) {
    struct stat sb;
    if (is_shard(k, from) || (!depth && !strcmp(name, "excise"))) return EXC_OK;
    if (stat(from, &sb)) return exc_fail_errno(k->ctx, "%s", from);
    if (S_ISDIR(sb.st_mode)) {
        struct stat lb;
        if (name[0] == '.' || (!lstat(from, &lb) && S_ISLNK(lb.st_mode))) return EXC_OK; /* apply leaves these out */
        return compare_tree(k, from, to, depth + 1);
    }
    if (!S_ISREG(sb.st_mode)) return EXC_OK;
    if (access(to, F_OK)) return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected a copy of %s, found none", to, from);
    if (k->to_bf16 && !depth && !strcmp(name, "config.json")) return same_config(k, to);
    if (k->to_bf16 && !depth && !strcmp(name, "model.safetensors.index.json")) return EXC_OK; /* opening it read it */
    return same_file(k, from, to);
}

/* calls back for every entry of a folder, with its path there and in the other tree */
static exc_status each_entry(work *k, const char *here, const char *there, int depth,
                             exc_status (*fn)(work *k, const char *name, const char *a, const char *b, int depth)) {
    DIR *d = opendir(here);
    if (!d) return exc_fail_errno(k->ctx, "%s", here);
    exc_status st = EXC_OK;
    for (struct dirent *e; st == EXC_OK && (e = readdir(d));) {
        char *a = NULL, *b = NULL;
        if (dots(e->d_name)) continue;
        st = exc_path_join(k->ctx, here, e->d_name, &a);
        if (st == EXC_OK) st = exc_path_join(k->ctx, there, e->d_name, &b);
        if (st == EXC_OK) st = fn(k, e->d_name, a, b, depth);
        exc_release(a);
        exc_release(b);
    }
    closedir(d);
    return st;
}

/* a file of OUT that MODEL does not have */
static exc_status refuse_added(work *k, const char *name, const char *out, const char *from, int depth) {
    struct stat sb;
    if ((!depth && !strcmp(name, "excise")) || !stat(from, &sb)) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected only what %s has, and excise/, found this beside it", out, k->dir);
}

static exc_status compare_tree(work *k, const char *from, const char *to, int depth) {
    if (depth > MAX_DEPTH)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected at most %d folders in each other, found more", from, MAX_DEPTH);
    if (access(to, F_OK)) return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: expected a copy of %s, found none", to, from);
    EXC_TRY(each_entry(k, from, to, depth, compare_entry));
    return each_entry(k, to, from, depth, refuse_added);
}

/* ---------------------------------------------------------------------------------------------------------- the job */

static exc_status check_sidecar(work *k) {
    char *path = NULL;
    if (!k->c->sidecar) return EXC_OK;
    EXC_TRY(exc_path_join(k->ctx, k->out, "excise/sidecar.safetensors", &path));
    exc_status st = exc_sidecar_check(k->ctx, k->c, path);
    exc_release(path);
    return st;
}

static exc_status prepare(work *k, const exc_plan *plan) {
    EXC_TRY(exc_atlas_open(k->ctx, k->dir, &k->a));
    EXC_TRY(exc_plan_compile(k->ctx, k->a, plan, &k->c));
    k->c->rounding = k->rounding;
    EXC_TRY(exc_edited_open(k->ctx, k->c, false, &k->e));
    k->e.allow_nonfinite = true; /* here the question is only whether the bytes are those of the plan */
    k->files = exc_zalloc(k->ctx, (size_t)k->a->files->n_files, sizeof(exc_tensors *), "files to compare");
    return k->files ? EXC_OK : EXC_ERR_MEMORY;
}

static exc_status perform(work *k, const exc_plan *plan, char **json) {
    double begun = exc_seconds();
    EXC_TRY(prepare(k, plan));
    k->to_bf16 = is_widened(k);
    if (k->to_bf16) EXC_TRY(open_widened(k));
    for (int i = 0; i < k->a->files->n_files && !k->to_bf16; i++) EXC_TRY(open_shard(k, i));
    EXC_TRY(compare_tree(k, k->dir, k->out, 0));
    if (k->to_bf16) {
        EXC_TRY(verify_widened(k));
    } else {
        EXC_TRY(compare_rest(k));
        EXC_TRY(exc_edited_walk(&k->e, "verify", compare_edited, k));
        EXC_TRY(exc_edited_each_stretch(&k->e, compare_scales, k));
    }
    EXC_TRY(check_sidecar(k));
    if (!json) return EXC_OK;
    json_t *o = json_object();
    json_object_set_new(o, "model", json_string(k->dir));
    json_object_set_new(o, "out", json_string(k->out));
    json_object_set_new(o, "verified", json_true());
    json_object_set_new(o, "files", json_integer(k->a->files->n_files));
    json_object_set_new(o, "side_files", json_integer(k->side_files));
    json_object_set_new(o, "bytes_compared", json_integer((json_int_t)k->compared));
    exc_edited_facts(&k->e, o);
    if (k->c->sidecar) json_object_set_new(o, "sidecar", json_string("excise/sidecar.safetensors"));
    json_object_set_new(o, "seconds", json_real(exc_seconds() - begun));
    *json = exc_json_text(k->ctx, o);
    json_decref(o);
    return *json ? EXC_OK : EXC_ERR_MEMORY;
}

exc_status exc_verify(exc_ctx *ctx, const char *model_dir, const char *out_dir, const exc_plan *plan, char **json) {
    work k = {.ctx = ctx, .dir = model_dir, .out = out_dir};
    exc_plan *own = NULL;
    char *path = NULL;
    exc_status st = EXC_OK;
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (json) *json = NULL;
    if (!model_dir || !out_dir) return exc_fail(ctx, EXC_ERR_USAGE, "verify: expected a model folder and the folder made from it");
    /* the plan in OUT, or what a plan that leaves it open does not say: how it was rounded */
    if (!plan || !plan->has_rounding) {
        st = exc_path_join(ctx, out_dir, "excise/plan.json", &path);
        if (st == EXC_OK && (!plan || !access(path, R_OK))) st = exc_plan_load(ctx, path, &own);
    }
    k.rounding = own ? own->rounding : plan ? plan->rounding : EXC_ROUND_RN;
    if (st == EXC_OK) st = perform(&k, plan ? plan : own, json);
    for (int i = 0; k.files && i < k.a->files->n_files; i++) exc_tensors_close(k.files[i]);
    exc_release(k.files);
    exc_release(k.same);
    exc_edited_close(&k.e);
    exc_compiled_free(k.c);
    exc_atlas_close(k.a);
    exc_plan_free(own);
    exc_release(path);
    return st;
}
