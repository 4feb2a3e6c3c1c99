/* checkpoint.c - a model folder as one table of tensors, from headers alone.
 *
 * Either model.safetensors, or the shards that model.safetensors.index.json names; a folder with both is
 * refused unless the index names that file, because loaders disagree on which one wins. Names in the index
 * come from outside: each must be a plain file name of this folder. Index and headers are compared in both
 * directions: a tensor that is promised and absent would be left uninitialised by some loaders, one that is
 * present and not promised is used and said. Every shard's size is checked before any work starts. */
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"

#define INDEX "model.safetensors.index.json"
#define SINGLE "model.safetensors"
#define INDEX_LIMIT ((size_t)256 << 20)
#define MAX_SHARDS 100000

typedef struct opening {
    exc_ctx *ctx;
    exc_checkpoint *c;
    json_t *index;       /* NULL: a single file */
    const char **shards; /* [n_shards] sorted, unique; borrowed from the index */
    size_t n_shards;
} opening;

static const char *shown(const char *s) { return exc_show(s, strlen(s)); }

static bool is_there(exc_ctx *ctx, const char *dir, const char *name, exc_status *st) {
    char *path = NULL;
    struct stat sb;
    *st = exc_path_join(ctx, dir, name, &path);
    bool there = *st == EXC_OK && !lstat(path, &sb);
    exc_release(path);
    return there;
}

/* --------------------------------------------------------------------------------------------------------
 * index */

/* a name of a file in this folder and nothing else; the rule it breaks, or NULL */
static const char *name_fault(const char *s, size_t n) {
    if (!n || !strcmp(s, ".") || !strcmp(s, "..")) return "no file name";
    if (memchr(s, '/', n) || memchr(s, '\\', n)) return "a path";
    if (n > 255) return "a name longer than 255 bytes";
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f) return "a name with control characters";
    if (n < 13 || strcmp(s + n - 12, ".safetensors")) return "a file of another kind";
    return NULL;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static exc_status collect_shards(opening *o, const json_t *map) {
    exc_ctx *ctx = o->ctx;
    const char *key;
    json_t *v;
    size_t n = 0;
    o->shards = exc_alloc(ctx, json_object_size(map), sizeof *o->shards, "shard names");
    if (!o->shards) return EXC_ERR_MEMORY;
    json_object_foreach((json_t *)(uintptr_t)map, key, v) {
        if (!json_is_string(v))
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s/" INDEX ": weight_map: %s: expected a file name, found no string", o->c->dir,
                            shown(key));
        const char *fault = name_fault(json_string_value(v), json_string_length(v));
        if (fault)
            return exc_fail(
                ctx, EXC_ERR_INPUT,
                "%s/" INDEX
                ": weight_map: %s: expected the name of a .safetensors file in this folder, found %s: \"%s\"",
                o->c->dir, shown(key), fault, exc_show(json_string_value(v), json_string_length(v)));
        o->shards[n++] = json_string_value(v);
    }
    qsort(o->shards, n, sizeof *o->shards, by_text);
    for (size_t i = 0; i < n; i++)
        if (!o->n_shards || strcmp(o->shards[i], o->shards[o->n_shards - 1]))
            o->shards[o->n_shards++] = o->shards[i];
    if (o->n_shards > MAX_SHARDS)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s/" INDEX ": weight_map: expected at most %d files, found %zu",
                        o->c->dir, MAX_SHARDS, o->n_shards);
    return EXC_OK;
}

static exc_status read_index(opening *o) {
    exc_ctx *ctx = o->ctx;
    char *path;
    EXC_TRY(exc_path_join(ctx, o->c->dir, INDEX, &path));
    exc_status st = exc_json_load(ctx, path, INDEX_LIMIT, &o->index);
    const json_t *map = json_object_get(o->index, "weight_map");
    if (!st && !json_is_object(map))
        st = exc_fail(ctx, EXC_ERR_INPUT,
                      "%s: weight_map: expected an object (tensor name -> file name), found %s", path,
                      map ? "something else" : "none");
    if (!st && !json_object_size(map))
        st = exc_fail(ctx, EXC_ERR_INPUT, "%s: weight_map: expected tensors, found none", path);
    exc_release(path);
    return st ? st : collect_shards(o, map);
}

/* neither model.safetensors nor an index: say what is there instead */
static exc_status nothing_here(opening *o) {
    size_t shards = 0, bins = 0;
    DIR *d = opendir(o->c->dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        size_t n = strlen(e->d_name);
        shards += n > 12 && !strcmp(e->d_name + n - 12, ".safetensors");
        bins += n > 4 && (!strcmp(e->d_name + n - 4, ".bin") || !strcmp(e->d_name + n - 4, ".pth"));
    }
    if (d) closedir(d);
    return exc_fail(o->ctx, EXC_ERR_INPUT,
                    "%s: expected " SINGLE " or " INDEX
                    ", found neither (%zu other .safetensors files, %zu .bin or .pth files)",
                    o->c->dir, shards, bins);
}

static exc_status choose_layout(opening *o) {
    static const char *single[] = {SINGLE};
    exc_status st, st2;
    bool index = is_there(o->ctx, o->c->dir, INDEX, &st), one = is_there(o->ctx, o->c->dir, SINGLE, &st2);
    EXC_TRY(st);
    EXC_TRY(st2);
    if (!index && !one) return nothing_here(o);
    if (!index) {
        o->shards = exc_alloc(o->ctx, 1, sizeof *o->shards, "shard names");
        if (!o->shards) return EXC_ERR_MEMORY;
        o->shards[0] = single[0];
        o->n_shards = 1;
        return EXC_OK;
    }
    EXC_TRY(read_index(o));
    const char *key = SINGLE;
    if (one && !bsearch(&key, o->shards, o->n_shards, sizeof *o->shards, by_text))
        return exc_fail(o->ctx, EXC_ERR_INPUT,
                        "%s: expected " SINGLE " or shards with " INDEX
                        ", found both; loaders disagree on which one is the model",
                        o->c->dir);
    return EXC_OK;
}

/* -------------------------------------------------------------------------------------------------------
 * shards */

static exc_status open_shards(opening *o) {
    exc_checkpoint *c = o->c;
    c->files = exc_zalloc(o->ctx, o->n_shards, sizeof *c->files, "shards");
    if (!c->files) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < o->n_shards; i++) {
        exc_status st;
        if (o->index && !is_there(o->ctx, c->dir, o->shards[i], &st))
            return st ? st
                      : exc_fail(o->ctx, EXC_ERR_INPUT,
                                 "%s/" INDEX ": weight_map: expected the file %s in the folder, found none",
                                 c->dir, shown(o->shards[i]));
        char *path;
        EXC_TRY(exc_path_join(o->ctx, c->dir, o->shards[i], &path));
        st = exc_tensors_open(o->ctx, path, &c->files[i]);
        exc_release(path);
        EXC_TRY(st);
        c->n_files++;
        for (size_t k = 0; k < c->files[i]->count; k++) c->files[i]->items[k].shard = (int)i;
        c->n_tensors += c->files[i]->count;
    }
    return EXC_OK;
}

static int by_name(const void *pa, const void *pb) {
    return strcmp((*(const exc_tensor *const *)pa)->name, (*(const exc_tensor *const *)pb)->name);
}

static exc_status merge_names(opening *o) {
    exc_checkpoint *c = o->c;
    size_t n = 0;
    c->by_name = exc_alloc(o->ctx, c->n_tensors ? c->n_tensors : 1, sizeof *c->by_name, "tensor names");
    if (!c->by_name) return EXC_ERR_MEMORY;
    for (int i = 0; i < c->n_files; i++)
        for (size_t k = 0; k < c->files[i]->count; k++) c->by_name[n++] = &c->files[i]->items[k];
    if (n) qsort(c->by_name, n, sizeof *c->by_name, by_name);
    for (size_t i = 1; i < n; i++)
        if (!strcmp(c->by_name[i]->name, c->by_name[i - 1]->name))
            return exc_fail(o->ctx, EXC_ERR_INPUT,
                            "%s: %s: expected each tensor in one file, found it in %s too",
                            c->files[c->by_name[i]->shard]->path, shown(c->by_name[i]->name),
                            o->shards[c->by_name[i - 1]->shard]);
    return EXC_OK;
}

/* every entry of the index has its tensor, in that file; tensors beyond the index are used, and said */
static exc_status compare_index(opening *o) {
    exc_checkpoint *c = o->c;
    const json_t *map = json_object_get(o->index, "weight_map");
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)map, key, v) {
        const exc_tensor *t = exc_checkpoint_find(c, key);
        if (!t)
            return exc_fail(o->ctx, EXC_ERR_INPUT,
                            "%s/%s: %s: expected this tensor (" INDEX " has it there), found none", c->dir,
                            json_string_value(v), shown(key));
        if (strcmp(o->shards[t->shard], json_string_value(v)))
            return exc_fail(o->ctx, EXC_ERR_INPUT,
                            "%s/" INDEX ": weight_map: %s: expected the file that has it, %s, found %s",
                            c->dir, shown(key), o->shards[t->shard], json_string_value(v));
    }
    size_t extra = c->n_tensors - json_object_size(map);
    for (size_t i = 0; i < c->n_tensors && extra; i++) {
        if (json_object_get(map, c->by_name[i]->name)) continue;
        exc_warn(o->ctx,
                 "%s/" INDEX
                 " leaves out %zu tensors that the files have, the first of them %s; they are used",
                 c->dir, extra, shown(c->by_name[i]->name));
        break;
    }
    return EXC_OK;
}

/* numbers that nobody should trust: a difference is worth a word, not a refusal */
static void compare_totals(const opening *o) {
    const exc_checkpoint *c = o->c;
    const json_t *total = json_object_get(json_object_get(o->index, "metadata"), "total_size");
    uint64_t bytes = 0;
    for (int i = 0; i < c->n_files; i++) bytes += c->files[i]->size - c->files[i]->header_bytes;
    if (total && (!json_is_integer(total) || (uint64_t)json_integer_value(total) != bytes))
        exc_warn(o->ctx, "%s/" INDEX ": metadata.total_size: expected %llu (the files have that), found %s",
                 c->dir, (unsigned long long)bytes,
                 json_is_integer(total) ? "another number" : "no whole number");
    for (int i = 0; i < c->n_files; i++) {
        const char *of = strstr(o->shards[i], "-of-");
        if (!of || strtol(of + 4, NULL, 10) == c->n_files) continue;
        exc_warn(o->ctx, "%s/" INDEX ": %s is named as one of %ld files, but the index has %d", c->dir,
                 o->shards[i], strtol(of + 4, NULL, 10), c->n_files);
        break;
    }
}

/* -------------------------------------------------------------------------------------------------------
 * folder */

static exc_status read_config(opening *o) {
    exc_checkpoint *c = o->c;
    exc_ctx *ctx = o->ctx;
    struct stat sb;
    if (stat(c->dir, &sb)) return exc_fail_errno(ctx, "%s", c->dir);
    if (!S_ISDIR(sb.st_mode))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected a model folder, found a file", c->dir);
    char *path;
    EXC_TRY(exc_path_join(ctx, c->dir, "config.json", &path));
    exc_status st = EXC_OK;
    if (stat(path, &sb) && errno == ENOENT)
        st = exc_fail(ctx, EXC_ERR_INPUT, "%s: expected a model folder with config.json, found none", c->dir);
    if (!st) st = exc_json_load(ctx, path, 0, &c->config);
    if (!st && !json_is_object(c->config))
        st = exc_fail(ctx, EXC_ERR_INPUT, "%s: top level: expected an object, found something else", path);
    exc_release(path);
    return st;
}

static exc_status open_all(opening *o) {
    EXC_TRY(read_config(o));
    EXC_TRY(choose_layout(o));
    EXC_TRY(open_shards(o));
    EXC_TRY(merge_names(o));
    if (!o->index) return EXC_OK;
    EXC_TRY(compare_index(o));
    compare_totals(o);
    return EXC_OK;
}

exc_status exc_checkpoint_open(exc_ctx *ctx, const char *dir, exc_checkpoint **out) {
    *out = NULL;
    opening o = {.ctx = ctx, .c = exc_zalloc(ctx, 1, sizeof *o.c, "checkpoint")};
    if (!o.c) return EXC_ERR_MEMORY;
    exc_status st = (o.c->dir = exc_strdup(ctx, dir)) ? open_all(&o) : EXC_ERR_MEMORY;
    exc_release(o.shards);
    json_decref(o.index);
    if (st)
        exc_checkpoint_close(o.c);
    else
        *out = o.c;
    return st;
}

const exc_tensor *exc_checkpoint_find(const exc_checkpoint *c, const char *name) {
    const exc_tensor key = {.name = (char *)(uintptr_t)name}, *p = &key;
    const exc_tensor **hit =
        c->n_tensors ? bsearch(&p, c->by_name, c->n_tensors, sizeof *c->by_name, by_name) : NULL;
    return hit ? *hit : NULL;
}

const void *exc_checkpoint_data(const exc_checkpoint *c, const exc_tensor *t) {
    return exc_tensors_data(c->files[t->shard], t);
}

void exc_checkpoint_close(exc_checkpoint *c) {
    if (!c) return;
    for (int i = 0; i < c->n_files; i++) exc_tensors_close(c->files[i]);
    exc_release(c->files);
    exc_release(c->by_name);
    json_decref(c->config);
    exc_release(c->dir);
    exc_release(c);
}
