/* disk.c - rows of files: writing an edited checkpoint against cp, opening, inspecting, the first token of a model, tokenising,
 * and the peak memory of a capture.
 *
 * apply: a 4 GB checkpoint of which 31 % (down_proj and o_proj) is edited, source in the page cache, the result on disk when the
 * clock stops. Its ceiling is the same command line everybody would use: cp -r and a sync of the files, in turns with it. The
 * folder is $TMPDIR or /tmp: on a memory file system these rows tell nothing about disks, and their note says so. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"
#include "model.h"
#include "study.h"

static bool in_memory(const char *path)
{
    struct statfs s;
    return !statfs(path, &s) && (s.f_type == 0x01021994 /* tmpfs */ || s.f_type == (long)0x858458f6 /* ramfs */);
}

static void shell(const char *fmt, const char *a, const char *b)
{
    char command[9000];
    snprintf(command, sizeof command, fmt, a, b);
    if (system(command)) {
        fprintf(stderr, "excise_bench: failed: %s\n", command);
        exit(1);
    }
}

/* ---------------------------------------------------------------------------------------------------------- apply */

typedef struct job {
    const char *from;
    char to[4200];
    exc_plan *plan;
} job;

static exc_plan *make_plan(bench *b, const char *model_dir)
{
    const spec *s = &spec_large;
    char path[4200];
    exc_dirs dirs = {.rows = s->layers + 1, .rank = 3, .hidden = s->hidden};
    size_t n = (size_t)(dirs.rows * dirs.rank * dirs.hidden);
    exc_atlas *atlas = NULL;
    exc_plan *plan = NULL;
    dirs.basis = exc_zalloc(b->ctx, n, 4, "basis");
    dirs.singular = exc_zalloc(b->ctx, (size_t)(dirs.rows * dirs.rank), 4, "basis");
    dirs.mean_difference = exc_zalloc(b->ctx, (size_t)(dirs.rows * dirs.hidden), 4, "basis");
    for (int64_t l = 1; l < dirs.rows; l++) unit_rows(dirs.basis + l * dirs.rank * dirs.hidden, dirs.rank, dirs.hidden, (uint64_t)l);
    for (int64_t i = dirs.rank; i < dirs.rows * dirs.rank; i++) dirs.singular[i] = 1;
    bench_must(b, exc_atlas_open(b->ctx, model_dir, &atlas), model_dir);
    memcpy(dirs.fingerprint, atlas->fingerprint, sizeof dirs.fingerprint);
    exc_atlas_close(atlas);
    dirs.options = exc_strdup(b->ctx, "{}");
    snprintf(path, sizeof path, "%s/directions.safetensors", b->tmp);
    bench_must(b, exc_dirs_save(b->ctx, &dirs, path, 1), path);
    snprintf(path, sizeof path, "%s/plan.json", b->tmp);
    static const char text[] = "{\"excise_plan\":1,\"directions\":\"directions.safetensors\",\"edits\":["
                               "{\"op\":\"project\",\"role\":\"expert_down\"},{\"op\":\"project\",\"role\":\"attn_out\"}]}\n";
    bench_must(b, exc_write_file(b->ctx, path, text, sizeof text - 1, true), path);
    bench_must(b, exc_plan_load(b->ctx, path, &plan), path);
    exc_release(dirs.basis);
    exc_release(dirs.singular);
    exc_release(dirs.mean_difference);
    exc_release(dirs.options);
    return plan;
}

static double copy_seconds(const job *j)
{
    double start = exc_seconds();
    shell("cp -r '%s' '%s' && sync", j->from, j->to);
    double t = exc_seconds() - start;
    shell("rm -rf '%s%s'", j->to, "");
    return t;
}

static double apply_seconds(bench *b, const job *j)
{
    exc_apply_options o = EXC_APPLY_OPTIONS;
    double start = exc_seconds();
    bench_must(b, exc_apply(b->ctx, j->from, j->plan, j->to, &o, NULL), "apply");
    return exc_seconds() - start;
}

static void apply_row(bench *b)
{
    if (!bench_wanted(b, "apply_4gb")) return;
    if (b->quick) return bench_skip(b, "apply_4gb", "left out of --quick: it writes 12 GB");
    job j = {.from = make_model(b, &spec_large, NULL)};
    enum { ROUNDS = 5 };
    double ratio[ROUNDS], seconds[ROUNDS], copy[ROUNDS], error = 0;
    snprintf(j.to, sizeof j.to, "%s/edited", b->tmp);
    j.plan = make_plan(b, j.from);
    shell("sync; cat '%s'/*.safetensors >/dev/null%s", j.from, "");
    /* a round before the clock: a virtual machine touches new memory at a fraction of its speed, and the page cache of either
     * program is the memory that the other gave back */
    for (int i = -1; i < ROUNDS; i++) {
        double c = copy_seconds(&j), a = apply_seconds(b, &j);
        if (i < 0 && exc_verify(b->ctx, j.from, j.to, j.plan, NULL) != EXC_OK) {
            fprintf(stderr, "excise_bench: verify: %s\n", exc_ctx_error(b->ctx));
            error = 1;
        }
        shell("rm -rf '%s%s'", j.to, "");
        if (i < 0) continue;
        copy[i] = c;
        seconds[i] = a;
        ratio[i] = a / c;
    }
    row r = {.name = "apply_4gb", .shape = "4.0 GB, 31 % edited, rank 3", .unit = "x of cp+sync", .goal = GOAL_RATIO, .target = 1, .error = error,
             .limit = 0.5, .rounds = ROUNDS, .note = in_memory(b->tmp) ? "the folder is in memory: not a disk" : "source in the page cache"};
    r.value = bench_median(ratio, ROUNDS);
    r.fraction_low = ratio[0];
    r.fraction_high = ratio[ROUNDS - 1];
    r.seconds = bench_median(seconds, ROUNDS);
    bench_emit(b, &r);
    row c = {.name = "copy_4gb", .shape = "cp -r and sync", .unit = "s", .rounds = ROUNDS};
    c.seconds = c.value = bench_median(copy, ROUNDS);
    bench_emit(b, &c);
    exc_plan_free(j.plan);
}

/* ------------------------------------------------------------------------------------------------ open and inspect */

static void run_inspect(bench *b, void *arg)
{
    char *json = NULL;
    bench_must(b, exc_inspect(b->ctx, arg, &json), "inspect");
    exc_free(json);
}

static void run_open(bench *b, void *arg)
{
    exc_model *m = NULL;
    exc_model_options o = EXC_MODEL_OPTIONS;
    bench_must(b, exc_model_open(b->ctx, arg, &o, &m), "open");
    const exc_layer *y;
    for (int64_t pass = 0; pass < 2; pass++) /* the second fills the layers' places */
        for (int64_t i = 0; i < m->atlas->shape.layers; i++) bench_must(b, exc_layer_at(b->ctx, m, i, 1, &y), "a layer");
    exc_model_free(m);
}

static void open_rows(bench *b)
{
    if (bench_wanted(b, "inspect")) {
        char *dir = make_model(b, b->quick ? &spec_random : &spec_large, NULL);
        row r = {.name = "inspect", .shape = b->quick ? "1.3 GB, 1,608 tensors" : "4.0 GB, 1,182 tensors in 4 files", .unit = "s"};
        bench_measure(b, &r, run_inspect, dir);
    }
    if (bench_wanted(b, "open")) {
        char *dir = make_model(b, &spec_random, NULL);
        row r = {.name = "open", .shape = "random model: map, check, pack", .against = CEIL_COPY, .work = 2.0 * (double)spec_bytes(&spec_random)};
        bench_measure(b, &r, run_open, dir);
    }
}

/* ------------------------------------------------------------------------------------------------------ first token */

/* seconds from starting a process to its end, with the token that it printed */
static double token_seconds(bench *b, const char *dir, const char *memory, char *token, size_t n)
{
    char command[9000];
    snprintf(command, sizeof command, "'%s' --token-child '%s' --threads %d --memory %s", b->self, dir, b->ctx->queue.workers, memory);
    double start = exc_seconds();
    FILE *f = popen(command, "r");
    bool good = f && fgets(token, (int)n, f);
    if (!f || pclose(f) || !good) snprintf(token, n, "failed");
    return exc_seconds() - start;
}

/* Every run in a process of its own and after a pause, in which a hypervisor takes back the memory that the one before gave up: the
 * slowest counts. Beside it `cat` of the same files. The check is the token of a model that is streamed. */
static void token_row(bench *b)
{
    if (!bench_wanted(b, "first_token")) return;
    enum { RUNS = 10 };
    const spec *s = b->quick ? &spec_random : &spec_cached;
    if (exc_memory_free(b->ctx) < 3 * spec_bytes(s)) return bench_skip(b, "first_token", "too little memory to keep the files cached");
    char *dir = make_model(b, s, NULL), want[64], token[64], memory[32], shape[96], note[96];
    int runs = b->quick ? 2 : RUNS;
    double seconds[RUNS], cat[RUNS], wrong = 0;
    snprintf(memory, sizeof memory, "%llu", (unsigned long long)spec_bytes(s) / 2);
    token_seconds(b, dir, memory, want, sizeof want);
    for (int i = 0; i < runs; i++) {
        if (!b->quick) sleep(3);
        double start = exc_seconds();
        shell("cat '%s'/*.safetensors >/dev/null%s", dir, "");
        cat[i] = exc_seconds() - start;
        seconds[i] = token_seconds(b, dir, "0", token, sizeof token);
        wrong += strcmp(token, want) != 0 || !strcmp(token, "failed");
    }
    double middle = bench_median(seconds, runs), files = bench_median(cat, runs);
    snprintf(shape, sizeof shape, "%.2f GiB in the page cache, slowest of %d processes", (double)spec_bytes(s) / (1 << 30), runs);
    snprintf(note, sizeof note, "median %.2f s; cat of the files: median %.2f s, slowest %.2f s", middle, files, cat[runs - 1]);
    row r = {.name = "first_token", .shape = shape, .unit = "s", .goal = GOAL_SECONDS, .target = 2, .error = wrong, .limit = 0.5, .rounds = runs,
             .note = note, .seconds = middle, .value = seconds[runs - 1], .fraction_low = seconds[0], .fraction_high = seconds[runs - 1]};
    bench_emit(b, &r);
}

/* ------------------------------------------------------------------------------------------------------ tokenizer */

typedef struct text {
    exc_tokenizer *t;
    char *data;
    size_t n;
    exc_ids ids;
} text;

static void run_encode(bench *b, void *arg)
{
    text *x = arg;
    x->ids.len = 0;
    bench_must(b, exc_tokenizer_encode(b->ctx, x->t, x->data, x->n, false, &x->ids), "encode");
}

static void tokenizer_row(bench *b)
{
    if (!bench_wanted(b, "tokenize")) return;
    char dir[4096], path[4200];
    text x = {0};
    char *prompts = NULL;
    size_t n = 0;
    snprintf(dir, sizeof dir, "%s/demo", b->data);
    snprintf(path, sizeof path, "%s/prompts/neutral.txt", dir);
    if (access(path, R_OK)) return bench_skip(b, "tokenize", "tests/data/demo not found: give --data");
    bench_must(b, exc_read_file(b->ctx, path, 0, &prompts, &n), path);
    bench_must(b, exc_tokenizer_load(b->ctx, dir, &x.t), dir);
    x.data = bench_alloc(b, (size_t)1 << 20);
    while (x.n + n <= (size_t)1 << 20) memcpy(x.data + x.n, prompts, n), x.n += n;
    run_encode(b, &x);
    exc_buf back = {0};
    bench_must(b, exc_tokenizer_decode(b->ctx, x.t, x.ids.data, x.ids.len, false, &back), "decode");
    row r = {.name = "tokenize", .shape = "1 MB of English, demo tokenizer, one thread", .unit = "MB/s", .per_call = (double)x.n / 1e6,
             .error = back.len == x.n && !memcmp(back.data, x.data, x.n) ? 0 : 1, .limit = 0.5};
    bench_measure(b, &r, run_encode, &x);
    exc_buf_free(&back);
    exc_ids_free(&x.ids);
    exc_tokenizer_free(x.t);
    exc_release(x.data);
    exc_release(prompts);
}

/* ---------------------------------------------------------------------------------------------------- peak memory */

static void memory_row(bench *b)
{
    if (!bench_wanted(b, "capture_memory")) return;
    char *dir = make_model(b, &spec_random, NULL), line[256] = "";
    int ends[2];
    if (pipe(ends)) return bench_skip(b, "capture_memory", "no pipe");
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        close(ends[0]);
        execl(b->self, b->self, "--capture-child", dir, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    size_t got = 0;
    for (ssize_t n; got < sizeof line - 1 && (n = read(ends[0], line + got, sizeof line - 1 - got)) > 0;) got += (size_t)n;
    close(ends[0]);
    struct rusage use = {0};
    int status = 0;
    double weights, session, stats;
    if (wait4(child, &status, 0, &use) < 0 || status || sscanf(line, "%lf %lf %lf", &weights, &session, &stats) != 3)
        return bench_skip(b, "capture_memory", "the capture failed");
    double must = weights + session + stats, peak = (double)use.ru_maxrss * 1024;
    char shape[96];
    snprintf(shape, sizeof shape, "weights %.2f, session %.2f, stats %.2f GB", weights / 1e9, session / 1e9, stats / 1e9);
    row r = {.name = "capture_memory", .shape = shape, .unit = "x of weights+states", .goal = GOAL_RATIO, .target = 1.10,
             .value = peak / must, .note = "peak resident memory of a whole process"};
    bench_emit(b, &r);
}

void disk_rows(bench *b)
{
    open_rows(b);
    token_row(b);
    tokenizer_row(b);
    memory_row(b);
    apply_row(b);
}
