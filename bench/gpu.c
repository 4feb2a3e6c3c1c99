/* gpu.c - excise_gpu: the ops of the device module beside the copy bandwidth of the same GPU, measured in the same run.
 *
 *   excise_gpu [--quick] [--only NAME,..] [--device N]
 *
 * A row is timed as many launches back to back with one wait at the end, the median of eleven such batches; arrays are larger
 * than the second-level cache or take turns. Weights and activations are random: zeros run faster than numbers. Before the rows,
 * the ceiling: the driver's own copy of the same bytes, read plus write. Edits are checked first, one matrix bit for bit against the
 * CPU's. --quick takes tiny sizes: a test that the program works, of which no figure means anything. Rows are JSON lines on
 * stdout, a table goes to stderr. Exit 0; 1 without a usable GPU or when a check fails; 2 for wrong usage. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "module.h"

enum { BATCHES = 11 };

typedef struct gpu {
    exc_ctx *ctx, *cpu;
    exc_device_info info;
    const char *only;
    bool quick;
    char libraries[2048]; /* what the module says of them */
    double copy; /* bytes/s, read plus write */
    int wrong;
} gpu;

static void must(gpu *g, exc_status st, const char *what) {
    if (exc_device_failed(g->ctx, st, what) == EXC_OK) return;
    fprintf(stderr, "excise_gpu: %s: %s\n", what, *exc_ctx_error(g->ctx) ? exc_ctx_error(g->ctx) : exc_status_name(st));
    exit(1);
}

static void *room(gpu *g, size_t bytes) {
    void *p;
    must(g, exc_device_alloc(g->ctx, bytes, 1, "arrays of a row", &p), "memory");
    return p;
}

/* random bf16 or f32 numbers of deviation `scale`; a block of a million repeats */
static void *numbers(gpu *g, int64_t n, int dtype, float scale, uint64_t seed) {
    size_t size = dtype == EXC_F32 ? 4 : 2, block = (size_t)1 << 20, all = (size_t)n;
    if (block > all) block = all;
    uint8_t *host = malloc(block * size + 4), *there = room(g, all * size);
    for (size_t i = 0; host && i < block; i++) {
        float x = (float)((exc_random_unit(seed, 1, i) - 0.5) * 3.4641) * scale;
        uint32_t u;
        memcpy(&u, &x, 4);
        uint16_t h = (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
        memcpy(host + i * size, dtype == EXC_F32 ? (void *)&u : (void *)&h, size);
    }
    for (size_t at = 0; at < all; at += block)
        must(g, exc_device_put(g->ctx, there + at * size, host, (all - at < block ? all - at : block) * size), "random numbers");
    free(host);
    return there;
}

static void *up(gpu *g, const void *host, size_t bytes) {
    void *p = room(g, bytes);
    must(g, exc_device_put(g->ctx, p, host, bytes), "copy");
    return p;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

typedef exc_status (*work_fn)(gpu *g, void *arg, int round);

/* seconds of one call */
static double timed(gpu *g, work_fn fn, void *arg, const char *name) {
    double t[BATCHES];
    int launches = g->quick ? 1 : 4;
    g->ctx->queue.measuring = 1; /* scratch first */
    g->ctx->queue.work_needed = 0;
    must(g, fn(g, arg, 0), name);
    g->ctx->queue.measuring = 0;
    must(g, exc_device_reserve(g->ctx, g->ctx->queue.work_needed), name);
    for (int warm = 0; warm < 2; warm++) must(g, fn(g, arg, warm), name);
    must(g, exc_device_sync(g->ctx), name);
    for (int i = -1; i < (g->quick ? 1 : BATCHES); i++) {
        double begun = exc_seconds();
        for (int j = 0; j < launches; j++) must(g, fn(g, arg, j), name);
        must(g, exc_device_sync(g->ctx), name);
        double each = (exc_seconds() - begun) / launches;
        if (i >= 0) t[i] = each;
        else if (!g->quick && each < 5e-3) launches = (int)(2e-2 / (each + 1e-7)) + 4; /* batches of 20 ms at least */
    }
    qsort(t, g->quick ? 1 : BATCHES, sizeof *t, by_value);
    return t[g->quick ? 0 : BATCHES / 2];
}

static void row(gpu *g, const char *name, const char *shape, work_fn fn, void *arg, double bytes, double flop) {
    if (g->only && !strstr(g->only, name)) return;
    double s = timed(g, fn, arg, name);
    printf("{\"row\":\"%s\",\"shape\":\"%s\",\"us\":%.3f", name, shape, s * 1e6);
    fprintf(stderr, "%-18s %-44s %10.1f us", name, shape, s * 1e6);
    if (bytes > 0) {
        printf(",\"gb_s\":%.2f", bytes / s / 1e9);
        fprintf(stderr, " %9.1f GB/s", bytes / s / 1e9);
        if (g->copy > 0) {
            printf(",\"of_copy\":%.4f", bytes / s / g->copy);
            fprintf(stderr, " %5.1f %% of copy", 100 * bytes / s / g->copy);
        }
    }
    if (flop > 0) {
        printf(",\"tflop_s\":%.3f", flop / s / 1e12);
        fprintf(stderr, " %9.2f TFLOP/s", flop / s / 1e12);
    }
    printf(",\"gpu\":\"%s\",\"quick\":%s}\n", g->info.name, g->quick ? "true" : "false");
    fputc('\n', stderr);
    fflush(stdout);
}

/* the first of what an op left, f32 */
static float *result(gpu *g, const void *out, int64_t n) {
    float *x = malloc((size_t)n * sizeof *x + 1);
    must(g, x ? exc_device_get(g->ctx, x, out, (size_t)n * sizeof *x) : EXC_ERR_MEMORY, "result");
    return x;
}

/* A row by one of NVIDIA's libraries, where it is at hand and not NULL, and one by our own kernels: a reproducible queue leaves
 * the libraries alone. The two agree in the first n numbers of `out` to f32 rounding of their sums. */
static void rows_by(gpu *g, const char *library, const char *name, const char *shape, work_fn fn, void *arg, const void *out, int64_t n,
                    double bytes, double flop) {
    char text[160], absent[32];
    float *theirs = NULL;
    if (g->only && !strstr(g->only, name)) return;
    snprintf(absent, sizeof absent, "%s: not used", library ? library : "");
    if (library && !strstr(g->libraries, absent)) {
        snprintf(text, sizeof text, "%s by %s", shape, library);
        row(g, name, text, fn, arg, bytes, flop);
        theirs = result(g, out, n);
    }
    g->ctx->queue.reproducible = 1;
    row(g, name, shape, fn, arg, bytes, flop);
    g->ctx->queue.reproducible = 0;
    float *ours = result(g, out, n), most = 0, apart = 0;
    for (int64_t i = 0; theirs && i < n; i++) {
        most = fmaxf(most, fabsf(ours[i]));
        apart = fmaxf(apart, fabsf(ours[i] - theirs[i]));
    }
    if (!(apart <= 1e-5f * most)) {
        g->wrong++;
        fprintf(stderr, "excise_gpu: %s %s: %s and our own kernels are %g apart\n", name, shape, library, (double)apart);
    }
    free(theirs), free(ours);
}

/* ------------------------------------------------------------------------------------------------------------- ceiling */

typedef struct copying { char *src, *dst; size_t bytes; } copying;

static exc_status copy_once(gpu *g, void *arg, int round) {
    const copying *c = arg;
    (void)round;
    return g->ctx->queue.measuring ? EXC_OK : exc_device_copy(g->ctx, c->dst, c->src, c->bytes);
}

static void copy_row(gpu *g) {
    size_t bytes = g->quick ? (size_t)1 << 20 : g->info.free / 8 < ((size_t)2 << 30) ? g->info.free / 8 / 256 * 256 : (size_t)2 << 30;
    copying c = {numbers(g, (int64_t)(bytes / 2), EXC_BF16, 1, 1), room(g, bytes), bytes};
    g->copy = 2 * (double)bytes / timed(g, copy_once, &c, "copy");
    const char *only = g->only;
    char shape[64];
    snprintf(shape, sizeof shape, "%zu MiB", bytes >> 20);
    g->only = NULL;
    row(g, "copy", shape, copy_once, &c, 2 * (double)bytes, 0);
    g->only = only;
    exc_device_release(g->ctx, c.src);
    exc_device_release(g->ctx, c.dst);
}

/* --------------------------------------------------------------------------------------------------------------- edits */

typedef struct edit { struct exc_project_args a; } edit;

static exc_status edit_once(gpu *g, void *arg, int round) {
    (void)round;
    return g->ctx->ops->project(&g->ctx->queue, &((edit *)arg)->a);
}

static void check_edit(gpu *g, const struct exc_project_args *a, const char *shape) {
    size_t bytes = (size_t)(a->rows * a->cols) * 2, dim = (size_t)(a->side == EXC_SIDE_OUT ? a->rows : a->cols);
    void *before = malloc(bytes), *want = malloc(bytes), *got = malloc(bytes);
    float *basis = malloc(dim * (size_t)a->rank * 4), one = 1;
    must(g, exc_device_get(g->ctx, before, a->src_base, bytes), "check");
    must(g, exc_device_get(g->ctx, basis, a->basis, dim * (size_t)a->rank * 4), "check");
    struct exc_project_args c = *a;
    memcpy(want, before, bytes);
    c.src_base = c.dst_base = want;
    c.basis = basis;
    c.strength = &one;
    c.count = 1;
    if (g->cpu->ops->project(&g->cpu->queue, &c) != EXC_OK) g->wrong++;
    struct exc_project_args d = *a;
    d.count = 1;
    edit e = {d};
    g->ctx->queue.measuring = 1;
    must(g, edit_once(g, &e, 0), "check");
    g->ctx->queue.measuring = 0;
    must(g, exc_device_reserve(g->ctx, g->ctx->queue.work_needed), "check");
    must(g, edit_once(g, &e, 0), "check");
    must(g, exc_device_get(g->ctx, got, a->src_base, bytes), "check");
    if (memcmp(got, want, bytes)) {
        g->wrong++;
        fprintf(stderr, "excise_gpu: project %s: the edited matrix is not the CPU's\n", shape);
    }
    must(g, exc_device_put(g->ctx, (void *)(uintptr_t)a->src_base, before, bytes), "check");
    free(before), free(want), free(got), free(basis);
}

static void edit_rows(gpu *g) {
    static const struct { const char *model; int64_t E, H, I; } shapes[] = {
        {"Qwen3-30B-A3B", 128, 2048, 768}, {"GLM-4.5-Air", 128, 4096, 1408}, {"gpt-oss", 128, 2880, 2880}, {"DeepSeek-V3", 64, 7168, 2048}};
    static const int64_t ranks[] = {1, 4, 8};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int side = 0; side < 2; side++) {
            int64_t E = g->quick ? 2 : shapes[s].E, H = g->quick ? 128 : shapes[s].H, I = g->quick ? 64 : shapes[s].I;
            if ((size_t)(E * H * I) * 2 > g->info.free / 2) E = (int64_t)(g->info.free / 4) / (H * I);
            void *w = numbers(g, E * H * I, EXC_BF16, 0.02f, s);
            float *ones = malloc((size_t)E * 4), *basis = calloc((size_t)(8 * H), 4);
            for (int64_t e = 0; e < E; e++) ones[e] = 1;
            for (int64_t r = 0; r < 8; r++) /* disjoint thirds of unit vectors: orthonormal, and not sparse in any chunk */
                for (int64_t h = r; h < H; h += 8) basis[r * H + h] = (h / 8 % 2 ? 1.0f : -1.0f) / __builtin_sqrtf((float)((H - r + 7) / 8));
            float *tb = up(g, basis, (size_t)(8 * H) * 4), *ts = up(g, ones, (size_t)E * 4);
            for (size_t k = 0; k < EXC_COUNT(ranks); k++) {
                edit e = {{.dtype = EXC_BF16, .count = E, .rows = side ? I : H, .cols = side ? H : I, .side = side ? EXC_SIDE_IN : EXC_SIDE_OUT,
                           .basis = tb, .rank = ranks[k], .strength = ts, .src_base = w, .dst_base = w, .src_stride = H * I, .dst_stride = H * I}};
                char shape[96];
                snprintf(shape, sizeof shape, "%s %lldx%lldx%lld bf16 k=%lld%s", shapes[s].model, (long long)E, (long long)e.a.rows,
                         (long long)e.a.cols, (long long)ranks[k], side ? " [E,I,H]" : "");
                if (g->only && !strstr(g->only, "project")) continue;
                check_edit(g, &e.a, shape);
                row(g, "project", shape, edit_once, &e, 4.0 * (double)(E * H * I), 0);
            }
            exc_device_release(g->ctx, w);
            exc_device_release(g->ctx, tb);
            exc_device_release(g->ctx, ts);
            free(ones), free(basis);
        }
}

/* -------------------------------------------------------------------------------------------------------- forward pass */

typedef struct layer {
    struct exc_matmul_args matmul;
    struct exc_packed w;
    struct exc_route_args route;
    struct exc_permute_args permute;
    struct exc_glu_args glu;
    struct exc_down_args down;
    struct exc_combine_args combine;
    struct exc_norm_args norm;
    struct exc_attend_args attend;
    struct exc_moments_args moments;
    exc_gate gate;
} layer;

#define ONCE(op)                                                                                                       \
    static exc_status op##_once(gpu *g, void *arg, int round) {                                                        \
        (void)round;                                                                                                   \
        return g->ctx->ops->op(&g->ctx->queue, &((layer *)arg)->op);                                                   \
    }
ONCE(matmul) ONCE(route) ONCE(permute) ONCE(glu) ONCE(down) ONCE(combine) ONCE(norm) ONCE(attend) ONCE(moments)

/* packed random matrices [n,k], and their table in device memory */
static exc_packed *experts(gpu *g, int64_t E, int64_t n, int64_t k, exc_packed *host) {
    size_t bytes = exc_packed_bytes(n, k, EXC_BF16);
    char *all = numbers(g, E * (int64_t)bytes / 2, EXC_BF16, 0.02f, 7);
    for (int64_t e = 0; e < E; e++) host[e] = (exc_packed){all + (size_t)e * bytes, n, k, EXC_BF16};
    return up(g, host, (size_t)E * sizeof *host);
}

/* one layer of Qwen3-30B-A3B over T tokens */
static void layer_rows(gpu *g, int64_t T, int64_t context) {
    int64_t H = g->quick ? 64 : 2048, I = g->quick ? 32 : 768, E = g->quick ? 8 : 128, K = g->quick ? 2 : 8, Q = g->quick ? 4 : 32,
            KV = g->quick ? 1 : 4, D = g->quick ? 16 : 128;
    layer l = {.gate = EXC_GATE};
    char shape[96];
    l.gate.renorm = 1;
    exc_packed *host = calloc((size_t)(3 * E), sizeof *host);
    int32_t *slot = calloc((size_t)T, 4);
    void *x = numbers(g, T * H, EXC_BF16, 1, 3), *mid = numbers(g, T * K * I, EXC_BF16, 1, 4);
    float *h = numbers(g, T * H, EXC_F32, 1, 5), *y = numbers(g, T * K * H, EXC_F32, 1, 6), *logits = numbers(g, T * E, EXC_F32, 1, 8);
    int32_t *ids = room(g, (size_t)(T * K) * 4), *row_of = room(g, (size_t)(T * K) * 4), *pair_of = room(g, (size_t)(T * K) * 4), *seen = up(g, slot, (size_t)T * 4);
    float *weights = room(g, (size_t)(T * K) * 4), *ones = numbers(g, H, EXC_F32, 1, 9);
    int64_t *offset = room(g, (size_t)(E + 1) * 8), *count = room(g, (size_t)E * 8);
    double *gate_sum = room(g, (size_t)E * 8), *mid_sum = room(g, (size_t)(E * I) * 8), *sq = room(g, (size_t)E * 8);
    must(g, exc_device_zero(g->ctx, count, (size_t)E * 8), "zero");
    must(g, exc_device_zero(g->ctx, gate_sum, (size_t)E * 8), "zero");
    must(g, exc_device_zero(g->ctx, mid_sum, (size_t)(E * I) * 8), "zero");
    must(g, exc_device_zero(g->ctx, sq, (size_t)E * 8), "zero");
    int64_t qkv = (Q + 2 * KV) * D;
    exc_packed *dense = experts(g, 1, qkv, H, &l.w);
    float *qkv_out = room(g, (size_t)(T * qkv) * 4);
    double rows = (double)(T * K), used = rows < (double)E ? rows : (double)E;
    snprintf(shape, sizeof shape, "T=%lld %lldx%lld bf16", (long long)T, (long long)qkv, (long long)H);
    l.matmul = (struct exc_matmul_args){.x = x, .x_stride = H, .act = EXC_BF16, .w = &l.w, .y = qkv_out, .y_stride = qkv, .rows = T};
    rows_by(g, T > 64 ? "cuBLASLt" : NULL, "matmul", shape, matmul_once, &l, qkv_out, qkv,
            2.0 * (double)(qkv * H) + 2.0 * (double)(T * H) + 4.0 * (double)(T * qkv), 2.0 * (double)T * (double)(qkv * H));
    snprintf(shape, sizeof shape, "T=%lld H=%lld", (long long)T, (long long)H);
    l.norm = (struct exc_norm_args){h, H, ones, 0, 1e-6f, T, H, x, H, EXC_BF16};
    row(g, "norm", shape, norm_once, &l, 6.0 * (double)(T * H), 0);
    snprintf(shape, sizeof shape, "T=%lld E=%lld K=%lld counts", (long long)T, (long long)E, (long long)K);
    l.route = (struct exc_route_args){.logits = logits, .gate = &l.gate, .tokens = T, .experts = E, .top_k = K, .ids = ids, .weights = weights, .slot = seen,
                                      .count = count, .gate_sum = gate_sum};
    row(g, "route", shape, route_once, &l, 4.0 * (double)(T * E) + 8.0 * rows, 0);
    if (g->only) must(g, route_once(g, &l, 0), "route"); /* what follows needs ids */
    l.permute = (struct exc_permute_args){ids, T, K, E, offset, row_of, pair_of};
    row(g, "permute", shape, permute_once, &l, 12.0 * rows, 0);
    if (g->only) must(g, permute_once(g, &l, 0), "permute");
    exc_packed *gate = experts(g, E, I, H, host), *up_w = experts(g, E, I, H, host + E), *down = experts(g, E, H, I, host + 2 * E);
    for (int capture = 0; capture < 2; capture++) {
        snprintf(shape, sizeof shape, "T=%lld E=%lld K=%lld %lldx%lld%s", (long long)T, (long long)E, (long long)K, (long long)I, (long long)H, capture ? " captured" : "");
        l.glu = (struct exc_glu_args){.x = x, .act = EXC_BF16, .gate = gate, .up = up_w, .offset = offset, .pair_of = pair_of, .tokens = T, .top_k = K,
                                      .experts = E, .hidden = H, .inner = I, .mid = mid, .slot = capture ? seen : NULL, .mid_sum = capture ? mid_sum : NULL, .w_dtype = EXC_BF16};
        row(g, "glu", shape, glu_once, &l, 4.0 * used * (double)(I * H) + rows * 2.0 * (double)(H + I), 4.0 * rows * (double)(I * H));
        l.down = (struct exc_down_args){.mid = mid, .act = EXC_BF16, .down = down, .offset = offset, .pair_of = pair_of, .tokens = T, .top_k = K, .experts = E,
                                        .hidden = H, .inner = I, .y = y, .slot = capture ? seen : NULL, .sqnorm_sum = capture ? sq : NULL, .w_dtype = EXC_BF16};
        row(g, "down", shape, down_once, &l, 2.0 * used * (double)(I * H) + rows * (2.0 * (double)I + 4.0 * (double)H), 2.0 * rows * (double)(I * H));
    }
    snprintf(shape, sizeof shape, "T=%lld K=%lld H=%lld", (long long)T, (long long)K, (long long)H);
    l.combine = (struct exc_combine_args){.y = y, .row_of = row_of, .ids = ids, .weights = weights, .tokens = T, .top_k = K, .hidden = H, .h = h};
    row(g, "combine", shape, combine_once, &l, 4.0 * (double)((K + 2) * T * H), 0);
    l.moments = (struct exc_moments_args){ids, weights, mid, EXC_BF16, T, K, E, I, count, gate_sum, mid_sum};
    row(g, "moments", shape, moments_once, &l, rows * 2.0 * (double)I, 0);
    int64_t sequences = context > 1 ? T : 1, length = context > 1 ? context : T, *begin = malloc((size_t)(sequences + 1) * 8), *at = malloc((size_t)sequences * 8),
            *len = malloc((size_t)sequences * 8);
    for (int64_t s = 0; s <= sequences; s++) begin[s] = s * (T / sequences);
    for (int64_t s = 0; s < sequences; s++) at[s] = s * length, len[s] = length;
    void *ck = numbers(g, sequences * length * KV * D, EXC_BF16, 1, 11), *cv = numbers(g, sequences * length * KV * D, EXC_BF16, 1, 12),
         *q = numbers(g, T * Q * D, EXC_BF16, 1, 13), *out = room(g, (size_t)(T * Q * D) * 2);
    l.attend = (struct exc_attend_args){.q = q, .cache_k = ck, .key_stride = KV * D, .cache_v = cv, .value_stride = KV * D, .q_begin = up(g, begin, (size_t)(sequences + 1) * 8),
                                        .cache_begin = up(g, at, (size_t)sequences * 8), .length = up(g, len, (size_t)sequences * 8), .sequences = sequences, .q_heads = Q,
                                        .kv_heads = KV, .head_dim = D, .value_dim = D, .scale = 0.088f, .out = out, .act = EXC_BF16, .tokens = T, .longest = length};
    snprintf(shape, sizeof shape, "%lld sequences of %lld, %lld+%lld heads of %lld", (long long)sequences, (long long)length, (long long)Q, (long long)KV, (long long)D);
    double visible = context > 1 ? (double)T * (double)length : (double)T * (double)(T + 1) / 2;
    row(g, "attend", shape, attend_once, &l, context > 1 ? 4.0 * (double)(sequences * length * KV * D) : 0, 4.0 * (double)(Q * D) * visible);
    void *all[] = {x, mid, h, y, logits, ids, row_of, pair_of, seen, weights, ones, offset, count, gate_sum, mid_sum, sq, dense, (void *)(uintptr_t)l.w.data, qkv_out, gate, up_w,
                   down, (void *)(uintptr_t)host[0].data, (void *)(uintptr_t)host[E].data, (void *)(uintptr_t)host[2 * E].data, ck, cv, q, out,
                   (void *)(uintptr_t)l.attend.q_begin, (void *)(uintptr_t)l.attend.cache_begin, (void *)(uintptr_t)l.attend.length};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_device_release(g->ctx, all[i]);
    free(host), free(slot), free(begin), free(at), free(len);
}

typedef struct words { struct exc_sample_args sample; struct exc_compare_args compare; } words;
static exc_status sample_once(gpu *g, void *arg, int round) {
    (void)round;
    return g->ctx->ops->sample(&g->ctx->queue, &((words *)arg)->sample);
}
static exc_status compare_once(gpu *g, void *arg, int round) {
    (void)round;
    return g->ctx->ops->compare(&g->ctx->queue, &((words *)arg)->compare);
}

static void logit_rows(gpu *g) {
    int64_t rows = g->quick ? 4 : 512, V = g->quick ? 500 : 151936;
    char shape[64];
    float *p = numbers(g, rows * V, EXC_F32, 2, 21), *q = numbers(g, rows * V, EXC_F32, 2, 22);
    int32_t *token = room(g, (size_t)rows * 4);
    double *kl = room(g, (size_t)rows * 8);
    words w = {{.logits = p, .rows = rows, .vocab = V, .token = token}, {.p = p, .q = q, .rows = rows, .vocab = V, .kl = kl}};
    snprintf(shape, sizeof shape, "%lld x %lld f32", (long long)rows, (long long)V);
    row(g, "sample", shape, sample_once, &w, 4.0 * (double)(rows * V), 0);
    row(g, "compare", shape, compare_once, &w, 8.0 * (double)(rows * V), 0);
    exc_device_release(g->ctx, p);
    exc_device_release(g->ctx, q);
    exc_device_release(g->ctx, token);
    exc_device_release(g->ctx, kl);
}

typedef struct spectra { struct exc_gram_args gram; struct exc_subspace_args subspace; } spectra;
static exc_status gram_once(gpu *g, void *arg, int round) {
    (void)round;
    return g->ctx->ops->gram(&g->ctx->queue, &((spectra *)arg)->gram);
}
static exc_status subspace_once(gpu *g, void *arg, int round) {
    (void)round;
    return g->ctx->ops->subspace(&g->ctx->queue, &((spectra *)arg)->subspace);
}

/* last states of the prompts, all layers of Qwen3-30B-A3B: noise of deviation 1 and four directions that stand out of it */
static void spectrum_rows(gpu *g) {
    enum { RANK = 4 };
    int64_t L = g->quick ? 2 : 48, n = g->quick ? 130 : 512, d = g->quick ? 101 : 2048;
    size_t each = (size_t)(n * d) * 4; /* bytes of a layer */
    char shape[96];
    if (g->only && !strstr(g->only, "gram") && !strstr(g->only, "subspace")) return;
    float *host = malloc(each), *x = room(g, (size_t)L * each), *basis = room(g, (size_t)(L * RANK * d) * 4), *singular = room(g, (size_t)(L * RANK) * 4);
    double *gram = room(g, (size_t)(L * n * n) * 8), *energy = room(g, (size_t)L * 8), *residual = room(g, (size_t)L * 8);
    for (int64_t i = 0; i < n * d; i++) host[i] = (float)((exc_random_unit(31, 1, (uint64_t)i) - 0.5) * 3.4641);
    for (int64_t i = 0; i < n * RANK; i++) /* deviations 64, 32, 16 and 8 */
        host[i / RANK * d + 7 * (i % RANK)] *= (float)(64 >> i % RANK);
    for (int64_t l = 0; l < L; l++) must(g, exc_device_put(g->ctx, x + l * n * d, host, each), "samples");
    spectra s = {{x, L, n * d, n, d, d, EXC_GRAM_SAMPLES, gram},
                 {.x = x, .layers = L, .layer_stride = n * d, .samples = n, .row_stride = d, .width = d, .rank = RANK, .basis = basis,
                  .singular = singular, .energy = energy, .residual = residual}};
    snprintf(shape, sizeof shape, "%lld layers of %lldx%lld f32, X X^T in f64", (long long)L, (long long)n, (long long)d);
    rows_by(g, "cuBLASLt", "gram", shape, gram_once, &s, gram, 0, (double)L * (double)each + 8.0 * (double)(L * n * n), 2.0 * (double)(L * n * n) * (double)d);
    snprintf(shape, sizeof shape, "%lld layers of %lldx%lld f32 k=%d", (long long)L, (long long)n, (long long)d, RANK);
    rows_by(g, "cuSOLVER", "subspace", shape, subspace_once, &s, basis, RANK * d, 0, 0);
    free(host);
    void *all[] = {x, basis, singular, gram, energy, residual};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_device_release(g->ctx, all[i]);
}

int main(int argc, char **argv) {
    gpu g = {0};
    exc_ctx_options o = EXC_CTX_OPTIONS;
    o.backend = "cuda";
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick")) g.quick = true;
        else if (!strcmp(argv[i], "--only") && i + 1 < argc) g.only = argv[++i];
        else if (!strcmp(argv[i], "--device") && i + 1 < argc) o.device = atoi(argv[++i]);
        else return fprintf(stderr, "usage: excise_gpu [--quick] [--only NAME,..] [--device N]\n"), 2;
    }
    exc_ctx_options cpu = EXC_CTX_OPTIONS;
    cpu.backend = "cpu";
    exc_status st = exc_ctx_create(&cpu, &g.cpu);
    if (st == EXC_OK) st = exc_ctx_create(&o, &g.ctx);
    if (st != EXC_OK) return fprintf(stderr, "excise_gpu: %s\n", exc_ctx_error(g.ctx ? g.ctx : g.cpu)), 1;
    must(&g, g.ctx->module->describe(o.device, &g.info), "describe");
    fprintf(stderr, "%s, compute capability %d.%d, %d processors, %.1f GiB\n", g.info.name, g.info.major, g.info.minor, g.info.processors,
            (double)g.info.memory / (1 << 30));
    g.ctx->module->libraries(g.libraries, sizeof g.libraries);
    fprintf(stderr, "%s\n", g.libraries);
    copy_row(&g);
    edit_rows(&g);
    layer_rows(&g, g.quick ? 72 : 8192, 1);      /* prefill */
    layer_rows(&g, g.quick ? 3 : 16, g.quick ? 9 : 2048); /* decode */
    logit_rows(&g);
    spectrum_rows(&g);
    exc_ctx_free(g.ctx);
    exc_ctx_free(g.cpu);
    if (g.wrong) fprintf(stderr, "excise_gpu: %d checks failed\n", g.wrong);
    return g.wrong != 0;
}
