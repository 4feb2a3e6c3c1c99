/* gauge.c - excise_gpu: the ops of the device module, and a whole model, beside what the same GPU did at a bare copy and matmul.
 *
 *   excise_gpu [--quick] [--only NAME,..] [--device N]
 *
 * A row is the median of eleven batches of 20 ms of calls back to back, one wait at the end of each; calls under 30 us are captured
 * and replayed as a graph, or the host's part of a launch would be the figure. Edits are checked first, bit for bit against the
 * CPU's. --quick takes tiny sizes: a test that the program works, of which no figure means anything. Rows are JSON lines on
 * stdout, a table goes to stderr; README.md explains them. Exit 0; 1 without a usable GPU or when a check fails; 2 for wrong usage. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gauge.h"

enum { BATCHES = 11, RECORDED = 32 }; /* calls in a graph at least */
#define BATCH_SECONDS 2e-2
#define GRAPH_BELOW 3e-5

#define EXC_OP(name, ...)                                                                                              \
    static exc_status call_##name(gauge *g, const void *args) { return g->ctx->ops->name(&g->ctx->queue, args); }
#include "ops.def"
#undef EXC_OP
const struct gauge_ops gauge_ops = {
#define EXC_OP(name, ...) call_##name,
#include "ops.def"
#undef EXC_OP
};

void gauge_must(gauge *g, exc_status st, const char *what) {
    if (exc_device_failed(g->ctx, st, what) == EXC_OK) return;
    fprintf(stderr, "excise_gpu: %s: %s\n", what, *exc_ctx_error(g->ctx) ? exc_ctx_error(g->ctx) : exc_status_name(st));
    exit(1);
}

bool gauge_wanted(const gauge *g, const char *name) {
    for (int i = 0; i < g->n_only; i++)
        if (!strncmp(name, g->only[i], strlen(g->only[i]))) return true;
    return !g->n_only;
}

/* ---------------------------------------------------------------------------------------------------------- arrays */

void *gauge_room(gauge *g, size_t bytes) {
    void *p;
    gauge_must(g, exc_device_alloc(g->ctx, bytes ? bytes : 1, 1, "arrays of a row", &p), "memory");
    if (g->n_held == (int)EXC_COUNT(g->held))
        gauge_must(g, exc_fail(g->ctx, EXC_ERR_USAGE, "more than %d arrays", g->n_held), "memory");
    return g->held[g->n_held++] = p;
}

void gauge_clear(gauge *g) {
    while (g->n_held) exc_device_release(g->ctx, g->held[--g->n_held]);
}

void *gauge_up(gauge *g, const void *host, size_t bytes) {
    void *p = gauge_room(g, bytes);
    gauge_must(g, exc_device_put(g->ctx, p, host, bytes), "copy");
    return p;
}

void *gauge_zeros(gauge *g, size_t bytes) {
    void *p = gauge_room(g, bytes);
    gauge_must(g, exc_device_zero(g->ctx, p, bytes), "zeros");
    return p;
}

void *gauge_numbers(gauge *g, int64_t n, int dtype, float deviation) {
    void *p = gauge_room(g, (size_t)n * (dtype == EXC_F32 ? 4 : 2));
    RUN(g, noise, .dst = p, .n = n, .seed = 1, .stream = ++g->seed, .dtype = dtype, .deviation = deviation);
    return p;
}

/* a block of a megabyte, again and again; exponents of e4m3 from 4 to 7, which fp4 takes for any codes, and about four times in 128 x 128 the
 * largest number: quantised checkpoints have it in nearly every block, where an edit must then look whether the scale still holds */
void *gauge_codes(gauge *g, size_t bytes) {
    size_t block = bytes < (size_t)1 << 20 ? bytes : (size_t)1 << 20;
    uint8_t *host = malloc(block + 8), *p = gauge_room(g, bytes);
    for (size_t i = 0; host && i < block; i += 8) {
        uint64_t u = exc_random_u64(7, 1, i);
        u = (u & 0x8787878787878787ull) | 0x2020202020202020ull | (u >> 3 & 0x1818181818181818ull);
        memcpy(host + i, &u, 8);
        if (i % 4096 == 0) host[i + exc_random_u64(7, 2, i) % 8] = 0x7e;
    }
    gauge_must(g, host ? exc_device_put(g->ctx, p, host, block) : EXC_ERR_MEMORY, "codes");
    for (size_t at = block, n; at < bytes; at += n) {
        n = bytes - at < at ? bytes - at : at;
        gauge_must(g, exc_device_copy(g->ctx, p + at, p, n), "codes");
    }
    free(host);
    return p;
}

int64_t *gauge_steps(gauge *g, int64_t n, int64_t step) {
    int64_t *host = malloc((size_t)n * sizeof *host + 1), *p;
    for (int64_t i = 0; host && i < n; i++) host[i] = i * step;
    p = gauge_up(g, host, (size_t)n * sizeof *host);
    free(host);
    return p;
}

/* ---------------------------------------------------------------------------------------------------------- timing */

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double gauge_median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static void measure_scratch(gauge *g, work_fn fn, const void *args) {
    g->ctx->queue.measuring = 1;
    g->ctx->queue.work_needed = 0;
    exc_status st = fn(g, args);
    g->ctx->queue.measuring = 0;
    gauge_must(g, st, "scratch");
    gauge_must(g, exc_device_reserve(g->ctx, g->ctx->queue.work_needed), "scratch");
}

exc_status gauge_now(gauge *g, work_fn fn, const void *args) {
    measure_scratch(g, fn, args);
    return fn(g, args);
}

typedef struct batch {
    work_fn fn;
    const char *args;
    size_t size;
    int turns, calls, recorded; /* in the graph */
    void *graph;                /* NULL: call by call */
} batch;

static void enqueue(gauge *g, const batch *b, int calls) {
    for (int i = 0; i < calls; i++) gauge_must(g, b->fn(g, b->args + (size_t)(i % b->turns) * b->size), "row");
}

/* seconds of one call */
static double run_batch(gauge *g, const batch *b) {
    double begun = exc_seconds();
    if (b->graph)
        for (int i = 0; i < b->calls; i += b->recorded) gauge_must(g, exc_device_replay(g->ctx, b->graph), "graph");
    else
        enqueue(g, b, b->calls);
    gauge_must(g, exc_device_sync(g->ctx), "row");
    return (exc_seconds() - begun) / b->calls;
}

static void time_row(gauge *g, row *r, batch *b) {
    double t[BATCHES];
    int batches = g->quick ? 1 : BATCHES;
    measure_scratch(g, b->fn, b->args);
    enqueue(g, b, g->quick ? 1 : 2 * b->turns);
    gauge_must(g, exc_device_sync(g->ctx), r->name);
    b->calls = b->turns;
    double each = g->quick ? 0 : run_batch(g, b);
    if (each < GRAPH_BELOW && !r->eager) {
        gauge_must(g, exc_device_record(g->ctx), r->name);
        int least = g->quick ? 2 : RECORDED;
        b->recorded = (least + b->turns - 1) / b->turns * b->turns;
        enqueue(g, b, b->recorded);
        gauge_must(g, exc_device_recorded(g->ctx, &b->graph), r->name);
        b->calls = b->recorded;
        if (!g->quick) each = run_batch(g, b);
    }
    if (!g->quick) b->calls *= (int)(BATCH_SECONDS / (each * b->calls)) + 1;
    for (int i = 0; i < batches; i++) t[i] = run_batch(g, b);
    r->seconds = gauge_median(t, batches);
    r->low = t[0];
    r->high = t[batches - 1];
    exc_device_forget(g->ctx, b->graph);
}

/* ------------------------------------------------------------------------------------------------------------ rows */

static void open_row(gauge *g, const row *r) {
    printf("{\"row\":\"%s\",\"shape\":\"%s\",\"by\":\"%s\"", r->name, r->shape, r->by ? r->by : "excise");
    fprintf(stderr, "%-18s %-58s %-9s", r->name, r->shape, r->by ? r->by : "");
}

static void close_row(gauge *g) {
    printf(",\"gpu\":\"%s\",\"quick\":%s}\n", g->info.name, g->quick ? "true" : "false");
    fputc('\n', stderr);
    fflush(stdout);
}

/* a rate, and its share of what the GPU can do at best */
static void print_rate(const char *rate, const char *share, const char *unit, const char *of, double work,
                       double seconds, double scale, double best) {
    printf(",\"%s\":%.3f", rate, work / seconds / scale);
    fprintf(stderr, " %9.1f %s", work / seconds / scale, unit);
    if (best <= 0) return;
    printf(",\"%s\":%.4f", share, work / seconds / best);
    fprintf(stderr, " %5.1f %% of %s", 100 * work / seconds / best, of);
}

void gauge_print(gauge *g, const row *r) {
    g->rows++;
    open_row(g, r);
    if (r->seconds > 0) {
        printf(",\"us\":%.3f,\"low_us\":%.3f,\"high_us\":%.3f", r->seconds * 1e6, r->low * 1e6, r->high * 1e6);
        fprintf(stderr, " %11.1f us", r->seconds * 1e6);
    }
    if (r->bytes > 0) print_rate("gb_s", "of_copy", "GB/s", "copy", r->bytes, r->seconds, 1e9, g->copy);
    if (r->flop > 0) print_rate("tflop_s", "of_peak", "TFLOP/s", "peak", r->flop, r->seconds, 1e12, g->peak);
    if (r->tokens > 0) {
        printf(",\"tokens_s\":%.2f", r->tokens / r->seconds);
        fprintf(stderr, " %9.0f tokens/s", r->tokens / r->seconds);
    }
    if (r->floor > 0) {
        printf(",\"floor_us\":%.3f", r->floor * 1e6);
        fprintf(stderr, ", floor %.1f us", r->floor * 1e6);
    }
    if (r->compared) {
        printf(",\"overhead_percent\":%.3f,\"low_percent\":%.3f,\"high_percent\":%.3f", r->overhead, r->low, r->high);
        fprintf(stderr, " %+.2f %% (%+.2f .. %+.2f)", r->overhead, r->low, r->high);
    }
    if (r->note) printf(",\"note\":\"%s\"", r->note);
    close_row(g);
}

void gauge_skip(gauge *g, const row *r, const char *why, ...) {
    char text[512];
    va_list list;
    va_start(list, why);
    vsnprintf(text, sizeof text, why, list);
    va_end(list);
    for (char *c = text; *c; c++)
        if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ') *c = ' ';
    g->skipped++;
    open_row(g, r);
    printf(",\"skipped\":\"%s\"", text);
    fprintf(stderr, " skipped: %s", text);
    close_row(g);
}

void gauge_row(gauge *g, row *r, work_fn fn, const void *args, size_t size, int turns) {
    batch b = {.fn = fn, .args = args, .size = size, .turns = turns};
    if (!gauge_wanted(g, r->name)) return;
    time_row(g, r, &b);
    gauge_print(g, r);
}

void gauge_op(gauge *g, const char *op, work_fn fn, const void *args, size_t size, int turns, double bytes, double flop,
              const char *shape, ...) {
    row r = {.name = op, .bytes = bytes, .flop = flop};
    va_list list;
    va_start(list, shape);
    vsnprintf(r.shape, sizeof r.shape, shape, list);
    va_end(list);
    gauge_row(g, &r, fn, args, size, turns);
}

static float *fetch(gauge *g, const void *out, int64_t n) {
    float *x = malloc((size_t)n * sizeof *x + 1);
    gauge_must(g, x ? exc_device_get(g->ctx, x, out, (size_t)n * sizeof *x) : EXC_ERR_MEMORY, "result");
    return x;
}

/* a reproducible queue leaves the libraries alone */
void gauge_both(gauge *g, const char *library, const char *op, work_fn fn, const void *args, const void *out, int64_t n,
                double bytes, double flop, const char *shape, ...) {
    row r = {.name = op, .bytes = bytes, .flop = flop, .eager = library && !strcmp(library, "cuSOLVER")};
    char absent[32];
    float *theirs = NULL, most = 0, apart = 0;
    va_list list;
    if (!gauge_wanted(g, op)) return;
    va_start(list, shape);
    vsnprintf(r.shape, sizeof r.shape, shape, list);
    va_end(list);
    snprintf(absent, sizeof absent, "%s: not used", library ? library : "");
    if (library && strstr(g->libraries, absent)) {
        r.by = library;
        gauge_skip(g, &r, "%.*s", (int)strcspn(strstr(g->libraries, absent), "\n"), strstr(g->libraries, absent));
    } else if (library) {
        r.by = library;
        gauge_row(g, &r, fn, args, 0, 1);
        theirs = fetch(g, out, n);
    }
    r.by = NULL;
    g->ctx->queue.reproducible = 1;
    gauge_row(g, &r, fn, args, 0, 1);
    g->ctx->queue.reproducible = 0;
    float *ours = fetch(g, out, n);
    for (int64_t i = 0; theirs && i < n; i++) {
        most = fmaxf(most, fabsf(ours[i]));
        apart = fmaxf(apart, fabsf(ours[i] - theirs[i]));
    }
    if (!(apart <= 1e-5f * most)) {
        g->wrong++;
        fprintf(stderr, "excise_gpu: %s %s: %s and our own kernels are %g apart\n", op, r.shape, library,
                (double)apart);
    }
    free(theirs), free(ours);
}

/* ------------------------------------------------------------------------------------------------------------ main */

static void (*const groups[])(gauge *g) = {limit_rows, projection_rows, layer_rows, mixer_rows,
                                           mover_rows, figure_rows,     whole_rows};

static void open_contexts(gauge *g, exc_ctx_options *o) {
    exc_ctx_options cpu = EXC_CTX_OPTIONS;
    cpu.backend = "cpu";
    exc_status st = exc_ctx_create(&cpu, &g->cpu);
    if (st == EXC_OK) st = exc_ctx_create(o, &g->ctx);
    if (st == EXC_OK) return;
    fprintf(stderr, "excise_gpu: %s\n", exc_ctx_error(g->ctx ? g->ctx : g->cpu));
    exit(1);
}

/* the first row: the GPU, and the libraries that the module found */
static void machine(gauge *g) {
    char note[sizeof g->libraries];
    row r = {.name = "machine", .note = note};
    snprintf(r.shape, sizeof r.shape, "compute capability %d.%d, %d processors, %.1f GiB", g->info.major, g->info.minor,
             g->info.processors, (double)g->info.memory / (1 << 30));
    snprintf(note, sizeof note, "%s", g->libraries);
    for (char *c = note; *c; c++)
        if (*c == '\n') *c = ';';
    fprintf(stderr, "%s\n%s\n", g->info.name, g->libraries);
    gauge_print(g, &r);
}

int main(int argc, char **argv) {
    static gauge g;
    exc_ctx_options o = EXC_CTX_OPTIONS;
    o.backend = "cuda";
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            g.quick = true;
        else if (!strcmp(argv[i], "--only") && i + 1 < argc) {
            for (char *name = strtok(argv[++i], ","); name && g.n_only < (int)EXC_COUNT(g.only);
                 name = strtok(NULL, ","))
                g.only[g.n_only++] = name;
        } else if (!strcmp(argv[i], "--device") && i + 1 < argc)
            o.device = atoi(argv[++i]);
        else
            return fprintf(stderr, "usage: excise_gpu [--quick] [--only NAME,..] [--device N]\n"), 2;
    }
    open_contexts(&g, &o);
    gauge_must(&g, g.ctx->module->describe(o.device, &g.info), "describe");
    g.ctx->module->libraries(g.libraries, sizeof g.libraries);
    machine(&g);
    for (size_t i = 0; i < EXC_COUNT(groups); i++) {
        groups[i](&g);
        gauge_clear(&g);
    }
    exc_ctx_free(g.ctx);
    exc_ctx_free(g.cpu);
    fprintf(stderr, "%d rows, %d skipped, %d checks failed\n", g.rows, g.skipped, g.wrong);
    return g.wrong != 0;
}
