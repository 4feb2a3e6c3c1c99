/* writer.c - our own safetensors files (stats, directions, forward outputs).
 *
 * All tensors are declared first, so the header is final before the first byte of data: data go straight to
 * their place in a temporary file beside the target, in any order, and nothing is held in memory. Tensors lie
 * by descending element size, then in order of declaration, behind a header padded to 8 bytes: every array is
 * aligned for its dtype. The file gets its name in commit, after fsync, so a reader never sees half of one.
 * Of several ranks the first one writes; the others check the same things and throw the bytes away. A file of one rank's own is
 * none of the others' business: nothing is agreed on. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"

#define MAX_RANK 8

typedef struct entry {
    char *name;
    exc_dtype dtype;
    int rank;
    int64_t shape[MAX_RANK];
    size_t bytes;
    uint64_t at;  /* absolute, once the header is out */
    size_t order; /* of declaration */
    bool put;
} entry;

struct exc_writer {
    exc_ctx *ctx;
    char *path, *temporary;
    int fd;
    bool own;                 /* of this rank alone */
    bool force, made, frozen; /* made: the temporary exists; frozen: header written, no more declarations */
    entry *items;             /* in file order once frozen */
    size_t count, cap;
    entry **by_name; /* [count] once frozen */
    json_t *meta;
};

static const char *shown(const char *name) { return exc_show(name, strlen(name)); }

/* ------------------------------------------------------------------------------------------------ open,
 * declare */

static exc_status start(exc_writer *w, const char *path) {
    exc_ctx *ctx = w->ctx;
    if (!(w->path = exc_strdup(ctx, path))) return EXC_ERR_MEMORY;
    size_t n = strlen(path) + 32;
    if (!(w->temporary = exc_alloc(ctx, n, 1, "path"))) return EXC_ERR_MEMORY;
    snprintf(w->temporary, n, "%s.partial-%ld", path, (long)getpid());
    if (!(w->meta = json_object())) return exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory", path);
    if (exc_ranks_me(ctx) && !w->own) return EXC_OK;
    w->fd = open(w->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (w->fd < 0) return exc_fail_errno(ctx, "%s", path);
    w->made = true;
    return EXC_OK;
}

static exc_status agree(exc_writer *w, const char *what, exc_status mine) {
    return w->own ? mine : exc_ranks_agree(w->ctx, what, mine);
}

static exc_status open_writer(exc_ctx *ctx, const char *path, bool force, bool own, exc_writer **out) {
    *out = NULL;
    EXC_TRY(own ? exc_check_output(ctx, path, force) : exc_check_file(ctx, path, force));
    exc_writer *w = exc_zalloc(ctx, 1, sizeof *w, "file writer");
    if (!w) return EXC_ERR_MEMORY;
    w->ctx = ctx;
    w->force = force;
    w->own = own;
    w->fd = -1;
    exc_status st = agree(w, path, start(w, path));
    if (st)
        exc_writer_abort(w);
    else
        *out = w;
    return st;
}

exc_status exc_writer_open(exc_ctx *ctx, const char *path, bool force, exc_writer **out) {
    return open_writer(ctx, path, force, false, out);
}

exc_status exc_writer_open_own(exc_ctx *ctx, const char *path, bool force, exc_writer **out) {
    return open_writer(ctx, path, force, true, out);
}

static exc_status check_entry(exc_writer *w, const char *name, exc_dtype dtype, int rank,
                              const int64_t *shape, size_t *bytes) {
    size_t n = exc_dtype_bits(dtype) / 8, at;
    const char *what = shown(name);
    if (w->frozen)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: declared after the first data", w->path, what);
    if (!exc_utf8_valid(name, strlen(name), &at) || !strcmp(name, "__metadata__"))
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: expected a tensor name in UTF-8", w->path, what);
    if (!n)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: dtype %s cannot be written", w->path, what,
                        exc_dtype_name(dtype));
    if (rank < 0 || rank > MAX_RANK)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: rank: expected 0..%d, found %d", w->path, what,
                        MAX_RANK, rank);
    bool zero = false, fits = true;
    for (int i = 0; i < rank; i++) {
        if (shape[i] < 0)
            return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: shape: expected sizes of 0 or more, found %lld",
                            w->path, what, (long long)shape[i]);
        zero = zero || !shape[i];
        if (!zero) fits = exc_mul(n, (size_t)shape[i], &n) && fits;
    }
    *bytes = zero ? 0 : n;
    if (zero || (fits && n <= (size_t)INT64_MAX / 2)) return EXC_OK;
    return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: shape: more bytes than a file can hold", w->path, what);
}

exc_status exc_writer_declare(exc_writer *w, const char *name, exc_dtype dtype, int rank,
                              const int64_t *shape) {
    size_t bytes = 0;
    EXC_TRY(check_entry(w, name, dtype, rank, shape, &bytes));
    if (w->count == w->cap) {
        size_t cap = w->cap ? w->cap * 2 : 32;
        entry *items = exc_alloc(w->ctx, cap, sizeof *items, "tensor table");
        if (!items) return EXC_ERR_MEMORY;
        if (w->count) memcpy(items, w->items, w->count * sizeof *items);
        exc_release(w->items);
        w->items = items;
        w->cap = cap;
    }
    entry e = {.dtype = dtype, .rank = rank, .bytes = bytes, .order = w->count};
    for (int i = 0; i < rank; i++) e.shape[i] = shape[i];
    if (!(e.name = exc_strdup(w->ctx, name))) return EXC_ERR_MEMORY;
    w->items[w->count++] = e;
    return EXC_OK;
}

exc_status exc_writer_meta(exc_writer *w, const char *key, const char *value) {
    if (w->frozen)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: metadata %s: given after the first data", w->path,
                        shown(key));
    json_t *v = json_string(value);
    if (!v)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: metadata %s: expected UTF-8 text", w->path, shown(key));
    if (json_object_set_new(w->meta, key, v))
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: metadata %s: expected a key in UTF-8", w->path,
                        shown(key));
    return EXC_OK;
}

/* -------------------------------------------------------------------------------------------------------
 * header */

static int by_size(const void *pa, const void *pb) {
    const entry *a = pa, *b = pb;
    size_t x = exc_dtype_bits(a->dtype), y = exc_dtype_bits(b->dtype);
    if (x != y) return x > y ? -1 : 1;
    return a->order < b->order ? -1 : a->order > b->order;
}

static int by_name(const void *pa, const void *pb) {
    return strcmp((*(entry *const *)pa)->name, (*(entry *const *)pb)->name);
}

static exc_status sort_entries(exc_writer *w) {
    if (!(w->by_name = exc_alloc(w->ctx, w->count ? w->count : 1, sizeof *w->by_name, "tensor names")))
        return EXC_ERR_MEMORY;
    if (!w->count) return EXC_OK;
    qsort(w->items, w->count, sizeof *w->items, by_size);
    for (size_t i = 0; i < w->count; i++) w->by_name[i] = &w->items[i];
    qsort(w->by_name, w->count, sizeof *w->by_name, by_name);
    for (size_t i = 1; i < w->count; i++)
        if (!strcmp(w->by_name[i]->name, w->by_name[i - 1]->name))
            return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: declared twice", w->path,
                            shown(w->by_name[i]->name));
    return EXC_OK;
}

static void put_text(exc_buf *b, const json_t *j) {
    char *text = j ? json_dumps(j, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    if (text)
        exc_buf_puts(b, text);
    else
        b->failed = true;
    free(text);
}

/* the header as text, offsets relative to the data; entries get those offsets too */
static void make_header(exc_writer *w, exc_buf *b) {
    uint64_t at = 0;
    exc_buf_puts(b, "{");
    if (json_object_size(w->meta)) {
        exc_buf_puts(b, "\"__metadata__\":");
        put_text(b, w->meta);
    }
    for (size_t i = 0; i < w->count; i++) {
        entry *e = &w->items[i];
        json_t *name = json_string(e->name);
        exc_buf_puts(b, b->len > 1 ? "," : "");
        put_text(b, name);
        json_decref(name);
        exc_buf_printf(b, ":{\"dtype\":\"%s\",\"shape\":[", exc_dtype_name(e->dtype));
        for (int d = 0; d < e->rank; d++) exc_buf_printf(b, "%s%lld", d ? "," : "", (long long)e->shape[d]);
        exc_buf_printf(b, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                       (unsigned long long)(at + e->bytes));
        e->at = at;
        at += e->bytes;
    }
    exc_buf_puts(b, "}");
    while (!b->failed && b->len % 8) exc_buf_puts(b, " ");
}

static exc_status write_at(exc_writer *w, const void *data, size_t n, uint64_t at) {
    if (!w->made) return EXC_OK; /* not the rank that writes */
    for (size_t done = 0; done < n;) {
        ssize_t put = pwrite(w->fd, (const char *)data + done, n - done, (off_t)(at + done));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0)
            return exc_fail_errno(w->ctx, "%s: writing %zu bytes at %llu", w->path, n - done,
                                  (unsigned long long)(at + done));
        done += (size_t)put;
    }
    return EXC_OK;
}

static exc_status freeze(exc_writer *w) {
    if (w->frozen) return EXC_OK;
    EXC_TRY(sort_entries(w));
    exc_buf b = {0};
    make_header(w, &b);
    exc_status st =
        b.failed ? exc_fail(w->ctx, EXC_ERR_MEMORY, "%s: no memory for its header", w->path) : EXC_OK;
    uint8_t n[8];
    for (int i = 0; i < 8; i++) n[i] = (uint8_t)((uint64_t)b.len >> 8 * i);
    if (!st && b.len > 100000000)
        st = exc_fail(w->ctx, EXC_ERR_USAGE, "%s: header: expected at most 100000000 bytes, found %zu",
                      w->path, b.len);
    if (!st) st = write_at(w, n, 8, 0);
    if (!st) st = write_at(w, b.data, b.len, 8);
    for (size_t i = 0; i < w->count; i++) w->items[i].at += 8 + b.len;
    exc_buf_free(&b);
    w->frozen = !st;
    return st;
}

/* --------------------------------------------------------------------------------------------------- data,
 * end */

exc_status exc_writer_put(exc_writer *w, const char *name, const void *data, size_t bytes) {
    EXC_TRY(freeze(w));
    entry key = {.name = (char *)(uintptr_t)name}, *p = &key;
    entry **hit = w->count ? bsearch(&p, w->by_name, w->count, sizeof *w->by_name, by_name) : NULL;
    if (!hit) return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: was never declared", w->path, shown(name));
    entry *e = *hit;
    if (e->bytes != bytes)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: expected %zu bytes, found %zu", w->path, shown(name),
                        e->bytes, bytes);
    EXC_TRY(write_at(w, data, bytes, e->at));
    e->put = true;
    return EXC_OK;
}

static exc_status finish(exc_writer *w) {
    EXC_TRY(freeze(w));
    for (size_t i = 0; i < w->count; i++)
        if (!w->items[i].put && w->items[i].bytes)
            return exc_fail(w->ctx, EXC_ERR_USAGE, "%s: %s: declared, but its data never came", w->path,
                            shown(w->items[i].name));
    if (!w->made) return EXC_OK;
    if (fsync(w->fd)) return exc_fail_errno(w->ctx, "%s: fsync", w->path);
    int fd = w->fd;
    w->fd = -1;
    if (close(fd)) return exc_fail_errno(w->ctx, "%s: close", w->path);
    EXC_TRY(exc_check_output(w->ctx, w->path, w->force)); /* it may have appeared meanwhile */
    if (rename(w->temporary, w->path)) return exc_fail_errno(w->ctx, "%s: rename", w->path);
    w->made = false;
    char *slash = strrchr(w->path, '/');
    if (!slash) return exc_fsync_dir(w->ctx, ".");
    slash[slash == w->path] = 0;
    return exc_fsync_dir(w->ctx, w->path);
}

exc_status exc_writer_commit(exc_writer *w) {
    exc_status st = agree(w, "end of a file", EXC_OK); /* all ranks have come this far, or there is to be no file */
    if (st == EXC_OK) st = agree(w, "commit of a file", finish(w));
    exc_writer_abort(w);
    return st;
}

void exc_writer_abort(exc_writer *w) {
    if (!w) return;
    if (w->fd >= 0) close(w->fd);
    if (w->made) unlink(w->temporary);
    for (size_t i = 0; i < w->count; i++) exc_release(w->items[i].name);
    exc_release(w->items);
    exc_release(w->by_name);
    json_decref(w->meta);
    exc_release(w->temporary);
    exc_release(w->path);
    exc_release(w);
}
