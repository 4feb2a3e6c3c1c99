/* driver.c - excise_bench: every hot operation beside its ceiling.
 *
 *   excise_bench [--quick] [--only NAME,NAME..] [--threads N] [--reproducible] [--data DIR] [--make random|demo|cached|large DIR]
 *
 * stdout gets one JSON object a row (stable names; README.md beside this file explains each), stderr a table for people.
 * Exit: 0; 1 when a check failed or the work could not be done; 2 for wrong usage. A missed target is shown, not an error. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench.h"

#ifndef EXC_BENCH_DATA
#define EXC_BENCH_DATA "tests/data"
#endif

/* ---------------------------------------------------------------------------------------------------- printing */

void bench_must(bench *b, exc_status st, const char *what)
{
    if (st == EXC_OK) return;
    fprintf(stderr, "excise_bench: %s: %s: %s\n", what, exc_status_name(st), exc_ctx_error(b->ctx));
    exit(1);
}

bool bench_wanted(const bench *b, const char *name)
{
    if (!b->n_only) return true;
    for (int i = 0; i < b->n_only; i++)
        if (!strncmp(name, b->only[i], strlen(b->only[i]))) return true;
    return false;
}

static bool reached(const row *r)
{
    switch (r->goal) {
    case GOAL_FRACTION: return r->fraction >= r->target;
    case GOAL_RATE: return r->value >= r->target;
    case GOAL_SECONDS:
    case GOAL_OVERHEAD:
    case GOAL_RATIO: return r->value <= r->target;
    default: return true;
    }
}

static const char *goal_text(const row *r, char *text, size_t n)
{
    switch (r->goal) {
    case GOAL_FRACTION: snprintf(text, n, ">= %.0f %% of ceiling", 100 * r->target); break;
    case GOAL_RATE: snprintf(text, n, ">= %.3g %s", r->target, r->unit); break;
    case GOAL_SECONDS: snprintf(text, n, "<= %.3g s", r->target); break;
    case GOAL_OVERHEAD: snprintf(text, n, "<= %.3g %%", r->target); break;
    case GOAL_RATIO: snprintf(text, n, "<= %.3g", r->target); break;
    default: *text = 0;
    }
    return text;
}

static void heading(bench *b)
{
    if (!b->rows)
        fprintf(stderr, "%-26s %-44s %10s %-10s %9s %6s  %-22s %s\n", "row", "shape", "value", "", "ceiling", "%", "target", "check");
}

void bench_emit(bench *b, row *r)
{
    bool wrong = r->limit > 0 && !(r->error <= r->limit), met = reached(r);
    char want[64];
    heading(b);
    b->rows++;
    b->wrong += wrong;
    b->below += !met;
    printf("{\"row\":\"%s\",\"shape\":\"%s\",\"value\":%.6g,\"unit\":\"%s\"", r->name, r->shape, r->value, r->unit);
    if (r->seconds > 0) printf(",\"seconds\":%.6g", r->seconds);
    if (r->ceiling_rate > 0)
        printf(",\"fraction\":%.4f,\"fraction_low\":%.4f,\"fraction_high\":%.4f,\"ceiling\":\"%s\",\"ceiling_rate\":%.6g,"
               "\"work\":%.6g", r->fraction, r->fraction_low, r->fraction_high, ceilings_name(r->against), r->ceiling_rate, r->work);
    else if (r->fraction_high > 0)
        printf(",\"low\":%.6g,\"high\":%.6g", r->fraction_low, r->fraction_high);
    if (r->goal) printf(",\"target\":\"%s\",\"met\":%s", goal_text(r, want, sizeof want), met ? "true" : "false");
    if (r->limit > 0) printf(",\"check\":\"%s\",\"error\":%.3g,\"limit\":%.3g", wrong ? "wrong" : "right", r->error, r->limit);
    if (r->rounds || r->dropped) printf(",\"rounds\":%d", r->rounds);
    if (r->ceiling_rate > 0) printf(",\"dropped\":%d,\"loop\":\"%s\"", r->dropped, ceilings_variant(r->against));
    if (r->unsteady) printf(",\"steady\":false");
    if (r->note) printf(",\"note\":\"%s\"", r->note);
    printf("}\n");
    fflush(stdout);

    char percent[16] = "", ceiling_value[16] = "";
    if (r->ceiling_rate > 0) {
        snprintf(percent, sizeof percent, "%.0f", 100 * r->fraction);
        snprintf(ceiling_value, sizeof ceiling_value, "%.1f G", r->ceiling_rate / 1e9);
    }
    fprintf(stderr, "%-26s %-44s %10.4g %-10s %9s %6s  %-22s %s%s%s\n", r->name, r->shape, r->value, r->unit, ceiling_value, percent,
            goal_text(r, want, sizeof want), r->limit > 0 ? wrong ? "WRONG" : "right" : "", met ? "" : "  short of target",
            r->unsteady ? "  unsteady" : "");
}

void bench_skip(bench *b, const char *name, const char *why)
{
    heading(b);
    b->rows++;
    printf("{\"row\":\"%s\",\"skipped\":\"%s\"}\n", name, why);
    fflush(stdout);
    fprintf(stderr, "%-26s skipped: %s\n", name, why);
}

/* ----------------------------------------------------------------------------------------------------- numbers */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* -------------------------------------------------------------------------------------------------------- main */

static const char usage[] =
    "usage: excise_bench [--quick] [--only NAME,NAME..] [--threads N] [--reproducible] [--data DIR]\n"
    "                    [--make random|demo|cached|large DIR]\n"
    "  --quick         smaller shapes and fewer rounds: to see that it works, not to quote\n"
    "  --only NAMES    rows whose names begin so (edit, prefill, decode, demo, route, moments, subspace, apply, ..)\n"
    "  --threads N     Default: all cores this process may use\n"
    "  --data DIR      tests/data of the source tree, for the tokenizer row\n"
    "  --make M DIR    only write the checkpoint that the rows use: random, demo, cached or large (4 GB each)\n"
    "Rows go to stdout as JSON lines, a table to stderr. bench/README.md explains every row.\n";

/* The OpenMP threads of oneDNN must sleep between its matmuls, or they take the cores from the row beside; libgomp reads its
 * environment before main. */
static void quiet_openmp(char **argv)
{
    if (!onednn_open || getenv("OMP_WAIT_POLICY")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    execv("/proc/self/exe", argv);
}

static void environment(bench *b)
{
    char *text = NULL;
    bench_must(b, exc_ctx_describe(b->ctx, &text), "describe");
    char cpu[128] = "unknown", line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            snprintf(cpu, sizeof cpu, "%.100s", strchr(line, ':') + 2);
            cpu[strcspn(cpu, "\n\"\\")] = 0;
            break;
        }
    if (f) fclose(f);
    printf("{\"row\":\"machine\",\"cpu\":\"%s\",\"quick\":%s,\"excise\":%s}\n", cpu, b->quick ? "true" : "false", text);
    fprintf(stderr, "%s, %d threads, %s%s\n", cpu, b->ctx->queue.workers, exc_isa_name(exc_isa_level()),
            b->quick ? ", --quick: not to be quoted" : "");
    exc_free(text);
}

static void remove_tree(const char *path)
{
    char command[4096];
    if (snprintf(command, sizeof command, "rm -rf '%s'", path) < (int)sizeof command && system(command)) perror(path);
}

static bench run = {.data = EXC_BENCH_DATA};

static void clean_up(void)
{
    if (run.tmp) remove_tree(run.tmp);
}

static int wrong_usage(const char *why, const char *what)
{
    fprintf(stderr, "excise_bench: %s %s\n%s", why, what, usage);
    return 2;
}

int main(int argc, char **argv)
{
    exc_ctx_options options = EXC_CTX_OPTIONS;
    options.backend = "cpu"; /* the device's ops are excise_gpu's */
    const char *make = NULL, *make_dir = NULL, *child = NULL, *token = NULL;
    quiet_openmp(argv);
    for (int i = 1; i < argc; i++) {
        const char *o = argv[i];
        if (!strcmp(o, "-h") || !strcmp(o, "--help")) return fputs(usage, stdout), 0;
        if (!strcmp(o, "--quick")) { run.quick = true; continue; }
        if (!strcmp(o, "--json")) continue; /* rows on stdout are JSON lines anyway */
        if (!strcmp(o, "--reproducible")) { options.reproducible = 1; continue; }
        if (i + 1 >= argc) return wrong_usage("unknown option, or no value after it:", o);
        char *v = argv[++i];
        if (!strcmp(o, "--only")) {
            for (char *name = strtok(v, ","); name && run.n_only < 16; name = strtok(NULL, ",")) run.only[run.n_only++] = name;
        } else if (!strcmp(o, "--threads")) options.threads = atoi(v);
        else if (!strcmp(o, "--data")) run.data = v;
        else if (!strcmp(o, "--capture-child")) child = v;
        else if (!strcmp(o, "--token-child")) token = v;
        else if (!strcmp(o, "--memory")) options.memory = strtoull(v, NULL, 10); /* of a child */
        else if (!strcmp(o, "--make") && i + 1 < argc) make = v, make_dir = argv[++i];
        else return wrong_usage("unknown option:", o);
    }
    exc_status st = exc_ctx_create(&options, &run.ctx);
    bench_must(&run, st, "context");
    if (child) return capture_child(&run, child);
    if (token) return token_child(&run, token);
    if (make) {
        const spec *s = spec_find(make);
        if (!s) return wrong_usage("--make: expected random, demo, cached or large, found", make);
        make_model(&run, s, make_dir);
        return 0;
    }
    char self[4096], tmp[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = 0;
    run.self = self;
    snprintf(tmp, sizeof tmp, "%s/excise-bench-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!(run.tmp = mkdtemp(tmp))) {
        fprintf(stderr, "excise_bench: %s: %s\n", tmp, strerror(errno));
        return 1;
    }
    atexit(clean_up);
    environment(&run);
    ceilings_open(&run);
    ceilings_rows(&run);
    edits_rows(&run);
    coded_rows(&run);
    sums_rows(&run);
    flow_rows(&run);
    delta_rows(&run);
    latent_rows(&run);
    engine_rows(&run);
    disk_rows(&run);
    ceilings_close(&run);
    fprintf(stderr, "%d rows, %d wrong, %d short of target\n", run.rows, run.wrong, run.below);
    exc_ctx_free(run.ctx);
    return run.wrong ? 1 : 0;
}
