/* helpers.c - see helpers.h. Temporary folders are removed at exit; paths come from small static rings so that tests stay
 * free of bookkeeping. */
#include "helpers.h"

#include <dirent.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "model.h"

#define MAX_DIRS 256
static char *dirs[MAX_DIRS];
static int n_dirs;
static pid_t owner;

void test_emulated(void)
{
    char self[PATH_MAX], path[PATH_MAX + 32];
    if (getenv("EXCISE_CUDA_MODULE")) return;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    assert_true(n > 0);
    self[n] = 0;
    snprintf(path, sizeof path, "%s/libexcise_emulated.so", dirname(self));
    setenv("EXCISE_CUDA_MODULE", path, 1);
    snprintf(path, sizeof path, "%s/libraries", self); /* dirname() has cut it: the stand-ins for NVIDIA's */
    setenv("EXCISE_CUDA_LIBRARIES", path, 0);
}

exc_ctx *test_ctx(int threads) { return test_ctx_on("cpu", threads); }

exc_ctx *test_ctx_on(const char *backend, int threads)
{
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    if (!strcmp(backend, "cuda")) test_emulated();
    opt.backend = backend;
    opt.threads = threads;
    exc_ctx *ctx = NULL;
    exc_status st = exc_ctx_create(&opt, &ctx);
    if (st != EXC_OK) fail_msg("exc_ctx_create: %s", exc_ctx_error(ctx));
    assert_string_equal(ctx->backend, backend);
    return ctx;
}

const char *test_data(const char *relative)
{
    static char ring[8][1024];
    static unsigned turn;
    char *p = ring[turn++ % 8];
    const char *elsewhere = getenv("EXCISE_TEST_DATA"); /* programs that were packed for another machine */
    snprintf(p, sizeof ring[0], "%s/%s", elsewhere ? elsewhere : EXC_TEST_DATA, relative);
    return p;
}

static void remove_tree(const char *path)
{
    struct stat sb;
    if (lstat(path, &sb)) return;
    if (!S_ISDIR(sb.st_mode)) {
        unlink(path);
        return;
    }
    chmod(path, 0700);
    DIR *d = opendir(path);
    if (d) {
        for (struct dirent *e; (e = readdir(d));) {
            if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
            char *child;
            if (asprintf(&child, "%s/%s", path, e->d_name) < 0) continue;
            remove_tree(child);
            free(child);
        }
        closedir(d);
    }
    rmdir(path);
}

static void cleanup(void)
{
    if (getpid() != owner) return; /* a forked child must not remove its parent's folders */
    for (int i = 0; i < n_dirs; i++) {
        remove_tree(dirs[i]);
        free(dirs[i]);
    }
}

char *test_tmpdir(void)
{
    const char *base = getenv("TMPDIR");
    char *p;
    assert_true(n_dirs < MAX_DIRS);
    assert_true(asprintf(&p, "%s/excise-test-XXXXXX", base && *base ? base : "/tmp") > 0);
    assert_non_null(mkdtemp(p));
    if (!n_dirs) {
        owner = getpid();
        atexit(cleanup);
    }
    return dirs[n_dirs++] = p;
}

char *test_path(const char *dir, const char *name)
{
    static char ring[16][1024];
    static unsigned turn;
    char *p = ring[turn++ % 16];
    snprintf(p, sizeof ring[0], "%s/%s", dir, name);
    return p;
}

void test_write(const char *path, const void *data, size_t n)
{
    unlink(path); /* rewriting a file in place flushes it on some file systems, at 20 ms each */
    FILE *f = fopen(path, "wb");
    if (!f) fail_msg("cannot write %s", path);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

char *test_read(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("cannot read %s", path);
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    rewind(f);
    char *p = malloc((size_t)size + 1);
    assert_non_null(p);
    assert_int_equal(fread(p, 1, (size_t)size, f), size);
    p[size] = 0;
    fclose(f);
    if (n) *n = (size_t)size;
    return p;
}

void test_copy_tree(const char *from, const char *to)
{
    mkdir(to, 0700);
    DIR *d = opendir(from);
    if (!d) fail_msg("cannot open folder %s", from);
    for (struct dirent *e; (e = readdir(d));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        char *a, *b;
        struct stat sb;
        assert_true(asprintf(&a, "%s/%s", from, e->d_name) > 0);
        assert_true(asprintf(&b, "%s/%s", to, e->d_name) > 0);
        assert_int_equal(stat(a, &sb), 0);
        if (S_ISDIR(sb.st_mode)) {
            test_copy_tree(a, b);
        } else {
            size_t n;
            char *data = test_read(a, &n);
            test_write(b, data, n);
            free(data);
        }
        free(a);
        free(b);
    }
    closedir(d);
}

float test_normal(uint64_t seed, uint64_t i)
{
    double u = exc_random_unit(seed, 0x6e6f726d, 2 * i) + 0x1p-54;
    double v = exc_random_unit(seed, 0x6e6f726d, 2 * i + 1);
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

double test_relative(const float *a, const float *b, size_t n)
{
    double diff = 0, ref = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        diff += d * d;
        ref += (double)b[i] * (double)b[i];
    }
    return ref > 0 ? sqrt(diff / ref) : sqrt(diff);
}

uint16_t test_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float test_from_bf16(uint16_t x)
{
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

void test_refused(exc_ctx *ctx, exc_status got, exc_status want, ...)
{
    if (got != want) fail_msg("expected %s, found %s: %s", exc_status_name(want), exc_status_name(got), exc_ctx_error(ctx));
    va_list ap;
    va_start(ap, want);
    for (const char *part; (part = va_arg(ap, const char *));)
        if (!strstr(exc_ctx_error(ctx), part)) {
            va_end(ap);
            fail_msg("\"%s\" is not in the message: %s", part, exc_ctx_error(ctx));
        }
    va_end(ap);
    if (strchr(exc_ctx_error(ctx), '\n')) fail_msg("more than one line: %s", exc_ctx_error(ctx));
}

exc_status test_read_model(exc_ctx *ctx, const char *dir, exc_model **m)
{
    int32_t token = 1;
    int64_t begin[2] = {0, 1};
    exc_prompts p = {.tokens = &token, .begin = begin, .count = 1};
    exc_decode d = {0};
    EXC_TRY(exc_model_open(ctx, dir, NULL, m));
    exc_status st = exc_decode_run(ctx, *m, &p, &d, NULL);
    if (st == EXC_OK) return st;
    exc_model_free(*m);
    *m = NULL;
    return st;
}

int test_shell(const char *command, char **out)
{
    char *full;
    assert_true(asprintf(&full, "{ %s ; } 2>&1", command) > 0);
    FILE *f = popen(full, "r");
    free(full);
    assert_non_null(f);
    size_t len = 0, cap = 4096;
    char *text = malloc(cap);
    for (size_t n; (n = fread(text + len, 1, cap - len - 1, f)) > 0;) {
        len += n;
        if (cap - len < 2) text = realloc(text, cap *= 2);
    }
    text[len] = 0;
    int status = pclose(f);
    if (out) *out = text;
    else free(text);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* ------------------------------------------------------------------------------------------------------------- ranks */

void test_in_ranks(int ranks, void (*body)(int rank, const char *dir), const char *dir, int *code) {
    int file[TEST_RANKS][TEST_RANKS] = {{0}};
    pid_t child[TEST_RANKS];
    assert_true(ranks <= TEST_RANKS);
    for (int i = 0; i < ranks; i++)
        for (int j = 0, pair[2]; j < i; j++) {
            assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
            file[i][j] = pair[0], file[j][i] = pair[1];
        }
    setenv("EXCISE_RANK_SECONDS", "60", 1);
    fflush(NULL);
    for (int r = 0; r < ranks; r++) {
        if ((child[r] = fork())) continue;
        char names[TEST_RANKS * 12 + 12];
        int at = snprintf(names, sizeof names, "%d", r);
        for (int i = 0; i < ranks; i++) {
            at += snprintf(names + at, sizeof names - (size_t)at, "%c%d", i ? ',' : ':', i == r ? -1 : file[r][i]);
            for (int j = 0; j < ranks; j++)
                if (i != r && i != j) close(file[i][j]);
        }
        setenv("EXCISE_RANK_SOCKETS", names, 1);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        body(r, dir);
        _exit(0); /* an assertion that fails takes the suite's way out instead, with another code */
    }
    for (int i = 0; i < ranks; i++)
        for (int j = 0; j < ranks; j++)
            if (i != j) close(file[i][j]);
    for (int r = 0; r < ranks; r++) {
        int status;
        assert_int_equal(waitpid(child[r], &status, 0), child[r]);
        code[r] = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    }
}
