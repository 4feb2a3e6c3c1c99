/* fault.c - writing under trouble: disk full, file limit, no memory, a failing or interrupted edit, a killed
 * process, a source that changes underneath. After each: the source as it was, and OUT absent, the old one,
 * or complete; nothing named .partial- is left except by kill -9, and the next run removes that. */
#include "helpers.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "files.h"

static exc_ctx *ctx;
static char *base;                   /* folder of all cases */
static char source[1024], out[1024]; /* model folders in it */
static const int sizes[] = {40, 7, 100000, 0, 333, 4096, 65537, 1};

static int shell(const char *format, ...) {
    char *command = NULL;
    va_list ap;
    va_start(ap, format);
    assert_true(vasprintf(&command, format, ap) > 0);
    va_end(ap);
    int rc = test_shell(command, NULL);
    free(command);
    return rc;
}

static bool exists(const char *path) {
    struct stat sb;
    return !lstat(path, &sb);
}

/* -------------------------------------------------------------------------------------------------------
 * source */

static void write_shard(exc_ctx *c, const char *path, int shard) {
    exc_writer *w;
    char name[32];
    uint8_t *data = malloc(100000);
    assert_int_equal(exc_writer_open(c, path, true, &w), EXC_OK);
    for (size_t i = 0; i < EXC_COUNT(sizes); i++) {
        snprintf(name, sizeof name, "s%d.t%zu", shard, i);
        assert_int_equal(exc_writer_declare(w, name, EXC_U8, 1, (int64_t[]){sizes[i]}), EXC_OK);
    }
    for (size_t i = 0; i < EXC_COUNT(sizes); i++) {
        snprintf(name, sizeof name, "s%d.t%zu", shard, i);
        for (int k = 0; k < sizes[i]; k++)
            data[k] = (uint8_t)exc_random_u64(3, (uint64_t)shard * 100 + i, (uint64_t)k);
        assert_int_equal(exc_writer_put(w, name, data, (size_t)sizes[i]), EXC_OK);
    }
    assert_int_equal(exc_writer_commit(w), EXC_OK);
    free(data);
}

static void make_source(void) {
    shell("rm -rf '%s' && mkdir -p '%s/sub' '%s/.git' '%s/excise'", source, source, source, source);
    test_write(test_path(source, "config.json"), "{}", 2);
    test_write(test_path(source, "README.md"), "read me", 7);
    test_write(test_path(source, "empty.txt"), "", 0);
    test_write(test_path(source, "sub/vocab.txt"), "words", 5);
    test_write(test_path(source, ".git/config"), "x", 1);
    test_write(test_path(source, "excise/plan.json"), "old", 3);
    symlink("README.md", test_path(source, "link.md"));
    write_shard(ctx, test_path(source, "model-00001-of-00002.safetensors"), 1);
    write_shard(ctx, test_path(source, "model-00002-of-00002.safetensors"), 2);
    exc_buf b = {0};
    exc_buf_puts(&b, "{\"weight_map\":{");
    for (int s = 1; s < 3; s++)
        for (size_t i = 0; i < EXC_COUNT(sizes); i++)
            exc_buf_printf(&b, "%s\"s%d.t%zu\":\"model-0000%d-of-00002.safetensors\"", b.len > 20 ? "," : "",
                           s, i, s);
    exc_buf_puts(&b, "}}");
    test_write(test_path(source, "model.safetensors.index.json"), b.data, b.len);
    exc_buf_free(&b);
}

/* ------------------------------------------------------------------------------------------------------
 * publishing */

typedef struct trouble {
    void (*in_fill)(struct trouble *t); /* called in each fill, before its work */
    void (*before_commit)(struct trouble *t);
    exc_status fail; /* what fill says */
    size_t calls, ranges;
} trouble;

static exc_status fill(exc_ctx *c, void *user, const exc_range *r, size_t n, const void *const *src,
                       void *const *dst) {
    trouble *t = user;
    t->calls++;
    t->ranges += n;
    if (t->in_fill) t->in_fill(t);
    if (t->fail) return exc_fail(c, t->fail, "the edit failed");
    for (size_t i = 0; i < n; i++)
        for (uint64_t k = 0; k < r[i].end - r[i].begin; k++)
            ((uint8_t *)dst[i])[k] = ((const uint8_t *)src[i])[k] ^ 0x5a;
    return EXC_OK;
}

static bool is_edited(size_t i) { return i % 3 != 1; } /* every third tensor stays */

static exc_status publish(exc_ctx *c, const char *from, const char *to, bool force, trouble *t) {
    exc_checkpoint *k;
    exc_publish *p;
    EXC_TRY(exc_checkpoint_open(c, from, &k));
    exc_range r[64];
    size_t n = 0;
    for (int f = 0; f < k->n_files; f++)
        for (size_t i = 0; i < k->files[f]->count; i++) {
            const exc_tensor *x = &k->files[f]->items[i];
            if (is_edited(i)) r[n++] = (exc_range){f, x->begin, x->end, NULL};
        }
    exc_status st = exc_publish_open(c, k, to, force, &p);
    if (!st) {
        st = exc_publish_tensors(p, r, n, fill, t);
        if (!st) st = exc_publish_add(p, "excise/plan.json", "{\"new\":1}", 9);
        if (t->before_commit) t->before_commit(t);
        if (!st)
            st = exc_publish_commit(p);
        else
            exc_publish_abort(p);
    }
    exc_checkpoint_close(k);
    return st;
}

static void same_bytes(const char *a, const char *b) {
    size_t n, m;
    char *x = test_read(a, &n), *y = test_read(b, &m);
    assert_int_equal(n, m);
    assert_memory_equal(x, y, n);
    free(x);
    free(y);
}

/* OUT is whole: every byte of the source but the edited ranges, and the added file */
static void check_whole(const char *from, const char *to) {
    static const char *const sides[] = {"config.json",   "README.md", "empty.txt",
                                        "sub/vocab.txt", "link.md",   "model.safetensors.index.json"};
    exc_checkpoint *k = NULL;
    exc_clear(ctx);
    if (exc_checkpoint_open(ctx, to, &k)) fail_msg("%s", exc_ctx_error(ctx));
    for (int f = 0; f < k->n_files; f++) {
        size_t n, m;
        const char *name = strrchr(k->files[f]->path, '/') + 1;
        uint8_t *a = (uint8_t *)test_read(test_path(from, name), &n),
                *b = (uint8_t *)test_read(test_path(to, name), &m);
        assert_int_equal(n, m);
        for (size_t i = 0; i < k->files[f]->count; i++) {
            const exc_tensor *x = &k->files[f]->items[i];
            for (uint64_t at = x->begin; is_edited(i) && at < x->end; at++) a[at] ^= 0x5a;
        }
        assert_memory_equal(a, b, n);
        free(a);
        free(b);
    }
    exc_checkpoint_close(k);
    for (size_t i = 0; i < EXC_COUNT(sides); i++)
        same_bytes(test_path(from, sides[i]), test_path(to, sides[i]));
    struct stat sb;
    assert_int_equal(lstat(test_path(to, "link.md"), &sb), 0);
    assert_true(S_ISREG(sb.st_mode));
    char *plan = test_read(test_path(to, "excise/plan.json"), NULL);
    assert_string_equal(plan, "{\"new\":1}");
    free(plan);
    assert_false(exists(test_path(to, ".git")));
}

static bool has_partial(void) { return !shell("ls '%s' | grep -q partial", base); }

static uint64_t tree_sum(const char *path) {
    char *command, *text;
    assert_true(asprintf(&command, "cd '%s' && find . -type f | sort | xargs md5sum", path) > 0);
    assert_int_equal(test_shell(command, &text), 0);
    uint64_t h = exc_hash64(text, strlen(text));
    free(text);
    free(command);
    return h;
}

static void must_fail(const char *what, exc_status got, exc_status want, const char *part) {
    if (got != want || !strstr(exc_ctx_error(ctx), part))
        fail_msg("%s: expected %s with \"%s\", found %s: %s", what, exc_status_name(want), part,
                 exc_status_name(got), exc_ctx_error(ctx));
    if (exists(out)) fail_msg("%s: there is an output", what);
    if (has_partial()) fail_msg("%s: there are left-overs", what);
}

/* --------------------------------------------------------------------------------------------------------
 * cases */

static void good(void **state) {
    make_source();
    uint64_t before = tree_sum(source);
    trouble t = {0};
    exc_clear(ctx);
    if (publish(ctx, source, out, false, &t)) fail_msg("%s", exc_ctx_error(ctx));
    check_whole(source, out);
    assert_int_equal(t.calls, 2); /* all ranges of a file at once */
    assert_int_equal(t.ranges, 10 /* 5 of the 8 tensors in each */);
    exc_clear(ctx);
    assert_int_equal(publish(ctx, source, out, false, &t), EXC_ERR_USAGE);
    assert_non_null(strstr(exc_ctx_error(ctx), "--force"));
    exc_clear(ctx);
    if (publish(ctx, source, out, true, &t)) fail_msg("%s", exc_ctx_error(ctx));
    check_whole(source, out);
    assert_false(has_partial());
    assert_true(tree_sum(source) == before);
    shell("rm -rf '%s'", out);
}

/* untouched: the copy of everything, without ranges */
static void plain_copy(void **state) {
    make_source();
    exc_checkpoint *k;
    exc_publish *p;
    exc_clear(ctx);
    assert_int_equal(exc_checkpoint_open(ctx, source, &k), EXC_OK);
    assert_int_equal(exc_publish_open(ctx, k, test_path(base, "out/"), false, &p), EXC_OK);
    test_refused(ctx, exc_publish_add(p, "../x", "", 0), EXC_ERR_USAGE, "excise/NAME", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_publish_add(p, "excise/../x", "", 0), EXC_ERR_USAGE, "excise/NAME", NULL);
    exc_clear(ctx);
    exc_range unsorted[] = {{0, k->files[0]->size, k->files[0]->size, NULL},
                            {0, k->files[0]->header_bytes, k->files[0]->size, NULL}};
    assert_int_equal(exc_publish_commit(p), EXC_OK);
    same_bytes(k->files[1]->path, test_path(out, "model-00002-of-00002.safetensors"));
    shell("rm -rf '%s'", out);
    trouble t = {0};
    for (int i = 0; i < 3; i++) {
        exc_range bad[] = {
            {i == 0 ? 2 : 0, i == 1 ? 0 : k->files[0]->header_bytes, k->files[0]->size + (i == 2), NULL}};
        exc_clear(ctx);
        assert_int_equal(exc_publish_open(ctx, k, out, false, &p), EXC_OK);
        test_refused(ctx, exc_publish_tensors(p, bad, 1, fill, &t), EXC_ERR_USAGE, "sorted ranges", NULL);
        exc_publish_abort(p);
    }
    exc_clear(ctx);
    assert_int_equal(exc_publish_open(ctx, k, out, false, &p), EXC_OK);
    test_refused(ctx, exc_publish_tensors(p, unsorted, 2, fill, &t), EXC_ERR_USAGE, "range 1", NULL);
    exc_publish_abort(p);
    exc_publish_abort(NULL);
    assert_false(exists(out) || has_partial());
    exc_checkpoint_close(k);
}

/* one range larger than the buffers are, others around it: 70 MB that are a hole in the source */
static void large_range(void **state) {
    char big[1024];
    snprintf(big, sizeof big, "%s/big", base);
    shell("mkdir '%s'", big);
    test_write(test_path(big, "config.json"), "{}", 2);
    char header[512] = {0};
    int n = snprintf(
        header + 8, 500,
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},\"b\":{\"dtype\":\"U8\",\"shape\":[5]"
        ","
        "\"data_offsets\":[3,8]},\"c\":{\"dtype\":\"U8\",\"shape\":[70000001],\"data_offsets\":[8,70000009]},"
        "\"d\":{\"dtype\":\"U8\",\"shape\":[9],\"data_offsets\":[70000009,70000018]}}");
    header[0] = (char)n;
    header[1] = (char)(n >> 8);
    test_write(test_path(big, "model.safetensors"), header, 8 + (size_t)n);
    assert_int_equal(truncate(test_path(big, "model.safetensors"), 8 + n + 70000018), 0);
    trouble t = {0};
    exc_clear(ctx);
    if (publish(ctx, big, out, false, &t)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(t.ranges, 3);
    size_t size;
    char *data = test_read(test_path(out, "model.safetensors"), &size);
    assert_int_equal(size, 8 + n + 70000018);
    assert_memory_equal(data, header, 8 + (size_t)n);
    for (size_t i = 0; i < 70000018; i++)
        if (data[8 + n + (long)i] != (i >= 3 && i < 8 ? 0 : 0x5a)) fail_msg("byte %zu is wrong", i);
    free(data);
    shell("rm -rf '%s' '%s'", big, out);
}

static void places(void **state) {
    make_source();
    trouble t = {0};
    static const struct {
        const char *to, *part;
    } rows[] = {
        {"source", "that is"},
        {"source/", "that is"},
        {"source/new", "inside"},
        {"source/sub/new", "inside"},
        {"sub/../source", "that is"},
        {"none/new", "none"},
        {"source/..", "name of a new folder"},
        {".", "name of a new folder"},
    };
    shell("mkdir '%s/sub'", base);
    uint64_t before = tree_sum(source);
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        exc_clear(ctx);
        exc_status st = publish(ctx, source, test_path(base, rows[i].to), true, &t);
        if (!st || !strstr(exc_ctx_error(ctx), rows[i].part))
            fail_msg("%s: %s", rows[i].to, exc_ctx_error(ctx));
    }
    char inner[1100];
    snprintf(inner, sizeof inner, "%s/sub/deep", base);
    shell("cp -r '%s' '%s'", source, inner);
    exc_clear(ctx);
    test_refused(ctx, publish(ctx, inner, test_path(base, "sub"), true, &t), EXC_ERR_USAGE, "around", NULL);
    shell("rm -rf '%s/sub'", base);
    /* with force, a folder of another kind, a file and a link stay */
    shell("mkdir '%s' && echo 1 >'%s/thesis.txt'", out, out);
    exc_clear(ctx);
    test_refused(ctx, publish(ctx, source, out, true, &t), EXC_ERR_USAGE, "excise/", NULL);
    assert_true(exists(test_path(out, "thesis.txt")));
    shell("rm -rf '%s' && echo 1 >'%s'", out, out);
    exc_clear(ctx);
    test_refused(ctx, publish(ctx, source, out, true, &t), EXC_ERR_USAGE, "found another", NULL);
    shell("rm '%s' && ln -s source '%s'", out, out);
    exc_clear(ctx);
    test_refused(ctx, publish(ctx, source, out, true, &t), EXC_ERR_USAGE, "found another", NULL);
    shell("rm '%s' && mkdir '%s'", out, out);
    exc_clear(ctx);
    if (publish(ctx, source, out, true, &t)) fail_msg("empty folder: %s", exc_ctx_error(ctx));
    check_whole(source, out);
    assert_true(tree_sum(source) == before);
    shell("rm -rf '%s'", out);
}

static void failing_edit(void **state) {
    make_source();
    trouble t = {.fail = EXC_ERR_NUMERIC};
    exc_clear(ctx);
    must_fail("edit fails", publish(ctx, source, out, false, &t), EXC_ERR_NUMERIC, "the edit failed");
}

static int stop(void *user, const exc_event *e) {
    return e->kind == EXC_EVENT_PROGRESS && (*(int *)user)-- <= 0;
}

static void interrupted(void **state) {
    make_source();
    for (int after = 0; after < 3; after++) {
        int left = after;
        trouble t = {0};
        ctx->opt.on_event = stop;
        ctx->opt.user = &left;
        exc_clear(ctx);
        exc_status st = publish(ctx, source, out, false, &t);
        ctx->opt.on_event = NULL;
        if (after == 2) {
            assert_int_equal(st, EXC_OK); /* two files, two batches */
            shell("rm -rf '%s'", out);
        } else {
            must_fail("interrupted", st, EXC_CANCELLED, "interrupted");
        }
    }
}

/* -------------------------------------------------------------------------------------------- a source that
 * changes */

static char shard_two[1100];
static void touch(trouble *t) { shell("touch -d '2001-01-01' '%s'", shard_two); }
static void cut(trouble *t) { assert_int_equal(truncate(shard_two, 5000), 0); }
static void replace(trouble *t) {
    shell("cp '%s' '%s.new' && mv '%s.new' '%s'", shard_two, shard_two, shard_two, shard_two);
}
static void vanish(trouble *t) { unlink(shard_two); }

static void changing_source(void **state) {
    void (*changes[])(trouble *) = {touch, cut, replace, vanish};
    for (size_t i = 0; i < EXC_COUNT(changes); i++)
        for (int late = 0; late < 2; late++) {
            make_source();
            trouble t = {0};
            if (late)
                t.before_commit = changes[i];
            else
                t.in_fill = changes[i];
            exc_clear(ctx);
            exc_status st = publish(ctx, source, out, false, &t);
            must_fail("source changes", st, changes[i] == vanish ? EXC_ERR_IO : EXC_ERR_INPUT,
                      "model-00002-of-00002.safetensors");
        }
}

static void out_appears(trouble *t) { shell("mkdir '%s' && echo 1 >'%s/mine'", out, out); }

static void racing_output(void **state) {
    make_source();
    trouble t = {.before_commit = out_appears};
    exc_clear(ctx);
    test_refused(ctx, publish(ctx, source, out, false, &t), EXC_ERR_USAGE, "out", "exists", NULL);
    assert_true(exists(test_path(out, "mine")));
    assert_false(has_partial());
    shell("rm -rf '%s'", out);
}

/* --------------------------------------------------------------------------------------------------- disk,
 * memory */

static void file_limit(void **state) {
    make_source();
    uint64_t before = tree_sum(source);
    struct rlimit was, now;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    signal(SIGXFSZ, SIG_IGN);
    static const rlim_t limits[] = {0, 1, 6, 1000, 5000, 100000, 170000};
    for (size_t i = 0; i < EXC_COUNT(limits); i++) {
        trouble t = {0};
        now = was;
        now.rlim_cur = limits[i];
        exc_clear(ctx);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &now), 0);
        exc_status st = publish(ctx, source, out, false, &t);
        setrlimit(RLIMIT_FSIZE, &was);
        must_fail("file limit", st, EXC_ERR_IO, "File too large");
    }
    exc_writer *w;
    char path[1100];
    snprintf(path, sizeof path, "%s/w.safetensors", base);
    exc_clear(ctx);
    assert_int_equal(exc_writer_open(ctx, path, false, &w), EXC_OK);
    assert_int_equal(exc_writer_declare(w, "a", EXC_U8, 1, (int64_t[]){100000}), EXC_OK);
    char *data = calloc(1, 100000);
    now = was;
    now.rlim_cur = 8192;
    setrlimit(RLIMIT_FSIZE, &now);
    exc_status st = exc_writer_put(w, "a", data, 100000);
    setrlimit(RLIMIT_FSIZE, &was);
    test_refused(ctx, st, EXC_ERR_IO, "w.safetensors", "File too large", NULL);
    exc_writer_abort(w);
    free(data);
    assert_false(exists(path) || has_partial());
    assert_true(tree_sum(source) == before);
}

/* a file system too small: in a mount space of its own; exit 77 where that is not allowed */
static int small_disk(int kilobytes) {
    char options[64], where[1100];
    snprintf(options, sizeof options, "size=%dk", kilobytes);
    snprintf(where, sizeof where, "%s/disk", base);
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("none", where, "tmpfs", 0, options))
        return 77;
    char to[1200];
    snprintf(to, sizeof to, "%s/out", where);
    exc_ctx own = {.error = ""};
    trouble t = {0};
    exc_status st = publish(&own, source, to, false, &t);
    if (st == EXC_OK) return exists(to) ? 0 : 2;
    if (st != EXC_ERR_IO || exists(to) || shell("[ -z \"$(ls '%s')\" ]", where)) return 3;
    return strstr(own.error, "disk space") || strstr(own.error, "No space") ? 1 : 4;
}

static void disk_full(void **state) {
    make_source();
    shell("mkdir '%s/disk'", base);
    static const int kilobytes[] = {4, 16, 64, 200, 330, 360, 4000};
    for (size_t i = 0; i < EXC_COUNT(kilobytes); i++) {
        pid_t pid = fork();
        if (!pid) _exit(small_disk(kilobytes[i]));
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFEXITED(status));
        if (WEXITSTATUS(status) == 77) skip();
        bool fits = kilobytes[i] >= 4000;
        if (WEXITSTATUS(status) != (fits ? 0 : 1) && !(kilobytes[i] > 300 && WEXITSTATUS(status) < 2))
            fail_msg("disk of %d KB: %d", kilobytes[i], WEXITSTATUS(status));
    }
}

static void no_memory(void **state) {
    make_source();
    uint64_t n = 0;
    for (exc_status st = EXC_ERR_MEMORY; st;) {
        trouble t = {0};
        exc_clear(ctx);
        exc_alloc_fail_at(++n);
        st = publish(ctx, source, out, false, &t);
        exc_alloc_fail_at(0);
        if (st) must_fail("no memory", st, EXC_ERR_MEMORY, "");
        if (st) assert_true(exc_ctx_error(ctx)[0] != 0);
        assert_true(n < 500);
    }
    assert_true(n > 40);
    check_whole(source, out);
    shell("rm -rf '%s'", out);
}

/* ---------------------------------------------------------------------------------------------------------
 * kill -9 */

static void slow(trouble *t) { usleep(3000); }

/* publishes in a process of its own, killed after `us`; 0 when it finished before */
static int child(bool force, useconds_t us) {
    pid_t pid = fork();
    if (!pid) {
        exc_ctx own = {.error = ""};
        trouble t = {.in_fill = slow, .before_commit = slow};
        _exit(publish(&own, source, out, force, &t) ? 1 : 0);
    }
    usleep(us);
    kill(pid, SIGKILL);
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    return WIFSIGNALED(status);
}

static void killed(void **state) {
    make_source();
    uint64_t before = tree_sum(source);
    int died = 0;
    for (useconds_t us = 0; us < 30000; us += 1500) {
        died += child(false, us);
        if (exists(out)) check_whole(source, out); /* absent or whole */
        shell("rm -rf '%s'", out);
    }
    assert_true(died > 0);
    trouble t = {0};
    exc_clear(ctx);
    if (publish(ctx, source, out, false, &t)) fail_msg("after kills: %s", exc_ctx_error(ctx));
    assert_false(has_partial()); /* what the dead left is gone */
    check_whole(source, out);
    /* over an old output: the old one or the new one, whole */
    test_write(test_path(out, "excise/mark"), "old", 3);
    for (useconds_t us = 0; us < 30000; us += 3000) {
        child(true, us);
        check_whole(source, out);
    }
    assert_true(tree_sum(source) == before);
    exc_clear(ctx);
    if (publish(ctx, source, out, true, &t)) fail_msg("after kills: %s", exc_ctx_error(ctx));
    assert_false(has_partial() || exists(test_path(out, "excise/mark")));
    shell("rm -rf '%s'", out);
}

/* the partial folder of a living process is no left-over */
static void two_jobs(void **state) {
    make_source();
    int ready[2], go[2];
    char byte = 0;
    assert_int_equal(pipe(ready) | pipe(go), 0);
    pid_t pid = fork();
    if (!pid) {
        exc_ctx own = {.error = ""};
        exc_checkpoint *k;
        exc_publish *p;
        alarm(30); /* a job that never lets the other one go is a failure, not a wait */
        exc_status st = exc_checkpoint_open(&own, source, &k);
        if (!st) st = exc_publish_open(&own, k, out, false, &p);
        if (write(ready[1], &byte, 1) != 1 || read(go[0], &byte, 1) != 1) _exit(9);
        if (!st) st = exc_publish_commit(p);
        _exit((int)st);
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    trouble t = {0};
    exc_clear(ctx);
    if (publish(ctx, source, out, false, &t)) fail_msg("%s", exc_ctx_error(ctx));
    assert_true(has_partial());
    assert_int_equal(write(go[1], &byte, 1), 1);
    int status;
    waitpid(pid, &status, 0);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), EXC_ERR_USAGE); /* second: the output exists */
    check_whole(source, out);
    assert_false(has_partial());
    shell("rm -rf '%s'", out);
}

static int setup(void **state) {
    ctx = test_ctx(1);
    base = test_tmpdir();
    snprintf(source, sizeof source, "%s/source", base);
    snprintf(out, sizeof out, "%s/out", base);
    snprintf(shard_two, sizeof shard_two, "%s/model-00002-of-00002.safetensors", source);
    return 0;
}

static int teardown(void **state) {
    exc_ctx_free(ctx);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good),
        cmocka_unit_test(plain_copy),
        cmocka_unit_test(large_range),
        cmocka_unit_test(places),
        cmocka_unit_test(failing_edit),
        cmocka_unit_test(interrupted),
        cmocka_unit_test(changing_source),
        cmocka_unit_test(racing_output),
        cmocka_unit_test(file_limit),
        cmocka_unit_test(disk_full),
        cmocka_unit_test(no_memory),
        cmocka_unit_test(killed),
        cmocka_unit_test(two_jobs),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
