/* ledger.c - what a run folder remembers: for every step the hashes of what went in, of what it left, and its
 * result.
 *
 * A step is done when its inputs hash to the recorded key *and* its outputs still hash to what it left: then
 * it is skipped. A step notes itself as "started" before it writes, so that after a crash its leftovers are
 * its own to replace; a file which somebody changed after the run wrote it is not, and is refused. steps.json
 * is replaced whole (temporary, fsync, rename). The lock is flock() on the folder itself: it needs no file,
 * and the kernel drops it with the process, however that ends. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "result.h"

#define WHOLE_BYTES ((off_t)1 << 30) /* larger files are identified by size, time and both ends */
#define END_BYTES ((size_t)1 << 20)
#define MAX_DEPTH 8

struct exc_ledger {
    exc_ctx *ctx;
    char *dir, *path;
    int lock;
    bool force;
    json_t *root, *steps; /* {"excise_run":1,..,"steps":[..]} */
    char key[33];         /* of the step in work */
    const char *const *outputs;
};

/* ------------------------------------------------------------------------------------------------ hashes of
 * inputs */

static exc_status hash_big(exc_ctx *ctx, const char *path, const struct stat *sb, char out[33]) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return exc_fail_errno(ctx, "%s", path);
    size_t n = 2 * END_BYTES;
    int64_t id[3] = {sb->st_size, sb->st_mtim.tv_sec, sb->st_mtim.tv_nsec};
    uint8_t *ends = exc_zalloc(ctx, n + sizeof id, 1, "ends of a file");
    exc_status st = ends ? EXC_OK : EXC_ERR_MEMORY;
    if (st == EXC_OK &&
        (pread(fd, ends, END_BYTES, 0) != (ssize_t)END_BYTES ||
         pread(fd, ends + END_BYTES, END_BYTES, sb->st_size - (off_t)END_BYTES) != (ssize_t)END_BYTES))
        st = exc_fail_errno(ctx, "%s: reading its ends", path);
    if (st == EXC_OK) {
        memcpy(ends + n, id, sizeof id);
        exc_hash_hex(ends, n + sizeof id, out);
    }
    exc_release(ends);
    close(fd);
    return st;
}

static int by_name(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

static exc_status hash_into(exc_ctx *ctx, const char *path, const char *name, bool (*wanted)(const char *),
                            int depth, exc_buf *b);

static exc_status hash_folder(exc_ctx *ctx, const char *path, const char *name, bool (*wanted)(const char *),
                              int depth, exc_buf *b) {
    struct dirent **list = NULL;
    int n = scandir(path, &list, NULL, by_name);
    if (n < 0) return exc_fail_errno(ctx, "%s", path);
    exc_status st = depth > MAX_DEPTH
                        ? exc_fail(ctx, EXC_ERR_INPUT, "%s: expected at most %d folders inside each other",
                                   path, MAX_DEPTH)
                        : EXC_OK;
    for (int i = 0; i < n; i++) {
        const char *leaf = list[i]->d_name;
        if (st == EXC_OK && strcmp(leaf, ".") && strcmp(leaf, "..") && (!wanted || wanted(leaf))) {
            char *child = NULL;
            exc_buf below = {0};
            exc_buf_printf(&below, "%s%s%s", name, *name ? "/" : "", leaf);
            st = exc_path_join(ctx, path, leaf, &child);
            if (st == EXC_OK && below.failed)
                st = exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory for its names", path);
            if (st == EXC_OK) st = hash_into(ctx, child, below.data, wanted, depth + 1, b);
            exc_release(child);
            exc_buf_free(&below);
        }
        free(list[i]);
    }
    free(list);
    return st;
}

static exc_status hash_into(exc_ctx *ctx, const char *path, const char *name, bool (*wanted)(const char *),
                            int depth, exc_buf *b) {
    struct stat sb;
    char hash[33];
    if (stat(path, &sb)) return exc_fail_errno(ctx, "%s", path);
    if (S_ISDIR(sb.st_mode)) return wanted && depth ? EXC_OK : hash_folder(ctx, path, name, wanted, depth, b);
    if (!S_ISREG(sb.st_mode))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected a file or folder, found a special file", path);
    EXC_TRY(sb.st_size > WHOLE_BYTES ? hash_big(ctx, path, &sb, hash) : exc_hash_file(ctx, path, hash));
    exc_buf_printf(b, "%s %s\n", hash, name);
    return EXC_OK;
}

static exc_status hash_tree(exc_ctx *ctx, const char *path, bool (*wanted)(const char *), char out[33]) {
    exc_buf b = {0};
    exc_status st = hash_into(ctx, path, "", wanted, 0, &b);
    if (st == EXC_OK && b.failed) st = exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory to hash it", path);
    if (st == EXC_OK) exc_hash_hex(b.data ? b.data : "", b.len, out);
    exc_buf_free(&b);
    return st;
}

exc_status exc_tree_hash(exc_ctx *ctx, const char *path, char out[33]) {
    return hash_tree(ctx, path, NULL, out);
}

static bool decides_model(const char *name) {
    static const char *const whole[] = {"config.json", "generation_config.json", "vocab.json", "merges.txt",
                                        "special_tokens_map.json"};
    for (size_t i = 0; i < EXC_COUNT(whole); i++)
        if (!strcmp(name, whole[i])) return true;
    const char *dot = strrchr(name, '.');
    return (dot && !strcmp(dot, ".safetensors")) || strstr(name, ".index.json") ||
           !strncmp(name, "tokenizer", 9) || !strncmp(name, "chat_template", 13);
}

exc_status exc_model_hash(exc_ctx *ctx, const char *dir, char out[33]) {
    return hash_tree(ctx, dir, decides_model, out);
}

/* ------------------------------------------------------------------------------------------------------- the
 * folder */

static exc_status make_folders(exc_ctx *ctx, const char *dir) {
    char *path = exc_strdup(ctx, dir);
    if (!path) return EXC_ERR_MEMORY;
    exc_status st = EXC_OK;
    for (char *p = path + 1; st == EXC_OK; p++) {
        char c = *p;
        if (c && c != '/') continue;
        *p = 0;
        if (mkdir(path, 0777) && errno != EEXIST) st = exc_fail_errno(ctx, "%s", path);
        *p = c;
        if (!c) break;
    }
    exc_release(path);
    return st;
}

static exc_status take_lock(exc_ledger *l) {
    l->lock = open(l->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (l->lock < 0) return exc_fail_errno(l->ctx, "%s", l->dir);
    if (!flock(l->lock, LOCK_EX | LOCK_NB)) return EXC_OK;
    if (errno == EWOULDBLOCK)
        return exc_fail(l->ctx, EXC_ERR_IO, "%s: another run works in this folder", l->dir);
    exc_warn(l->ctx, "%s: this file system has no locks (%s); take care that no other run uses the folder",
             l->dir, strerror(errno));
    return EXC_OK;
}

static bool is_empty(const char *dir) {
    DIR *d = opendir(dir);
    bool empty = true;
    for (struct dirent *e; d && empty && (e = readdir(d));)
        empty = !strcmp(e->d_name, ".") || !strcmp(e->d_name, "..");
    if (d) closedir(d);
    return empty;
}

static exc_status read_steps(exc_ledger *l) {
    struct stat sb;
    if (!stat(l->path, &sb) && !l->force) {
        EXC_TRY(exc_json_load(l->ctx, l->path, 0, &l->root));
        int64_t format = 0;
        EXC_TRY(exc_json_int(l->ctx, l->root, l->path, "excise_run", 1, 1, &format));
        l->steps = json_object_get(l->root, "steps");
        if (!json_is_array(l->steps))
            return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: steps: expected a list, found none", l->path);
        return EXC_OK;
    }
    if (!l->force && !is_empty(l->dir))
        return exc_fail(l->ctx, EXC_ERR_USAGE,
                        "%s: expected a new folder or one of an earlier run (with steps.json); nothing is "
                        "overwritten without --force",
                        l->dir);
    l->root = json_pack("{s:i,s:s,s:[]}", "excise_run", 1, "version", EXC_VERSION, "steps");
    l->steps = json_object_get(l->root, "steps");
    return l->steps ? EXC_OK : exc_fail(l->ctx, EXC_ERR_MEMORY, "%s: no memory", l->path);
}

exc_status exc_ledger_open(exc_ctx *ctx, const char *dir, bool force, exc_ledger **out) {
    *out = NULL;
    exc_ledger *l = exc_zalloc(ctx, 1, sizeof *l, "run folder");
    if (!l) return EXC_ERR_MEMORY;
    l->ctx = ctx;
    l->force = force;
    l->lock = -1;
    exc_status st =
        (l->dir = exc_strdup(ctx, dir)) ? exc_path_join(ctx, dir, "steps.json", &l->path) : EXC_ERR_MEMORY;
    /* the first of several ranks makes the folder and holds the lock; then all read the same state */
    if (st == EXC_OK && !exc_ranks_me(ctx)) st = make_folders(ctx, dir);
    if (st == EXC_OK && !exc_ranks_me(ctx)) st = take_lock(l);
    st = exc_ranks_agree(ctx, dir, st);
    if (st == EXC_OK) st = exc_ranks_agree(ctx, dir, read_steps(l));
    if (st == EXC_OK)
        *out = l;
    else
        exc_ledger_close(l);
    return st;
}

void exc_ledger_close(exc_ledger *l) {
    if (!l) return;
    if (l->lock >= 0) close(l->lock);
    json_decref(l->root);
    exc_release(l->dir);
    exc_release(l->path);
    exc_release(l);
}

static exc_status save(exc_ledger *l) {
    char *text = json_dumps(l->root, JSON_INDENT(1) | JSON_REAL_PRECISION(17));
    if (!text) return exc_fail(l->ctx, EXC_ERR_MEMORY, "%s: no memory", l->path);
    exc_status st = exc_write_file(l->ctx, l->path, text, strlen(text), true);
    free(text);
    return st;
}

/* -------------------------------------------------------------------------------------------------------------
 * steps */

static json_t *find(const exc_ledger *l, const char *step) {
    size_t i;
    json_t *s;
    json_array_foreach(l->steps, i, s) {
        const char *name = json_string_value(json_object_get(s, "step"));
        if (name && !strcmp(name, step)) return s;
    }
    return NULL;
}

static bool says(const json_t *o, const char *key, const char *value) {
    const char *s = json_string_value(json_object_get(o, key));
    return s && !strcmp(s, value);
}

/* "" when there is no such file */
static exc_status output_hash(exc_ledger *l, const char *name, char out[33]) {
    char *path = NULL;
    struct stat sb;
    out[0] = 0;
    EXC_TRY(exc_path_join(l->ctx, l->dir, name, &path));
    exc_status st = stat(path, &sb) ? EXC_OK : exc_tree_hash(l->ctx, path, out);
    exc_release(path);
    return st;
}

static exc_status step_key(exc_ledger *l, const char *step, const json_t *inputs) {
    char *text = json_dumps(inputs, JSON_SORT_KEYS | JSON_COMPACT | JSON_REAL_PRECISION(17));
    if (!text) return exc_fail(l->ctx, EXC_ERR_MEMORY, "%s: no memory for the inputs of %s", l->path, step);
    exc_buf b = {0};
    exc_buf_printf(&b, "%s %s %s", EXC_VERSION, step, text);
    if (!b.failed) exc_hash_hex(b.data, b.len, l->key);
    exc_status st = b.failed ? exc_fail(l->ctx, EXC_ERR_MEMORY, "%s: no memory", l->path) : EXC_OK;
    exc_buf_free(&b);
    free(text);
    return st;
}

exc_status exc_ledger_begin(exc_ledger *l, const char *step, const json_t *inputs, const char *const *outputs,
                            const json_t **result) {
    *result = NULL;
    l->outputs = outputs;
    EXC_TRY(step_key(l, step, inputs));
    json_t *record = find(l, step), *left = json_object_get(record, "outputs");
    bool started = says(record, "state", "started"),
         same = says(record, "state", "done") && says(record, "key", l->key);
    for (const char *const *o = outputs; *o; o++) {
        char hash[33];
        EXC_TRY(output_hash(l, *o, hash));
        bool ours = says(left, *o, hash);
        same = same && ours;
        if (hash[0] && !ours && !started && !l->force)
            return exc_fail(
                l->ctx, EXC_ERR_USAGE,
                "%s/%s: expected the file that the step %s of this run wrote, found another; move "
                "it away, or --force to replace it",
                l->dir, *o, step);
    }
    if (same) {
        *result = json_object_get(record, "result");
        if (*result) return EXC_OK;
    }
    if (!record) {
        record = json_object();
        json_array_append_new(l->steps, record);
    }
    json_object_clear(record);
    json_object_set_new(record, "step", json_string(step));
    json_object_set_new(record, "state", json_string("started"));
    json_object_set_new(record, "key", json_string(l->key));
    json_object_set_new(record, "inputs", json_deep_copy(inputs));
    return save(l);
}

exc_status exc_ledger_done(exc_ledger *l, const char *step, const json_t *result, double seconds) {
    json_t *record = find(l, step), *left = json_object();
    exc_status st = EXC_OK;
    for (const char *const *o = l->outputs; *o && st == EXC_OK; o++) {
        char hash[33];
        st = output_hash(l, *o, hash);
        if (st == EXC_OK && !hash[0])
            st = exc_fail(l->ctx, EXC_ERR_IO, "%s/%s: expected the output of %s, found none", l->dir, *o,
                          step);
        if (st == EXC_OK) json_object_set_new(left, *o, json_string(hash));
    }
    if (st != EXC_OK) {
        json_decref(left);
        return st;
    }
    json_object_set_new(record, "state", json_string("done"));
    json_object_set_new(record, "outputs", left);
    json_object_set_new(record, "seconds", json_real(seconds));
    json_object_set_new(record, "result", json_deep_copy(result));
    return save(l);
}

const json_t *exc_ledger_steps(const exc_ledger *l) { return l->steps; }
