/* sums.c - rows of the ops that turn tokens into statistics: route, moments, contrast, gram, compare, convert.
 *
 * Floors: route reads T x E logits; moments reads T x K x I intermediates; compare reads two sets of logits; convert reads and
 * writes. Shapes are taken from the models this is meant for (256 experts of DeepSeek-V3, 768 wide experts of Qwen3-30B-A3B,
 * its vocabulary of 151,936), and are larger than any cache. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "files.h"

#define OP(b, op, args) bench_must(b, (b)->ctx->ops->op(&(b)->ctx->queue, args), #op)

/* ------------------------------------------------------------------------------------------------------- route */

static void run_route(bench *b, void *arg) { OP(b, route, arg); }

/* share of checked tokens whose ids or weights differ from the plain definition */
static double route_error(const struct exc_route_args *a)
{
    int64_t wrong = 0, seen = 0;
    for (int64_t t = 0; t < a->tokens; t += 997, seen++) {
        const float *x = a->logits + t * a->experts;
        bool taken[1024] = {false};
        int32_t ids[64];
        double sum = 0, chosen = 0;
        for (int64_t k = 0; k < a->top_k; k++) {
            int64_t best = -1;
            for (int64_t e = 0; e < a->experts; e++)
                if (!taken[e] && (best < 0 || x[e] > x[best])) best = e;
            taken[best] = true;
            ids[k] = (int32_t)best;
            chosen += exp((double)x[best]);
        }
        for (int64_t e = 0; e < a->experts; e++) sum += exp((double)x[e]);
        double whole = a->gate->renorm ? chosen : sum;
        bool bad = false;
        for (int64_t k = 0; k < a->top_k; k++) {
            double w = exp((double)x[ids[k]]) / whole;
            bad |= a->ids[t * a->top_k + k] != ids[k] || fabs((double)a->weights[t * a->top_k + k] - w) > 1e-5 * w;
        }
        wrong += bad;
    }
    return (double)wrong / (double)seen;
}

static void route_row(bench *b, const char *name, int64_t experts, int64_t k, bool count, double target)
{
    if (!bench_wanted(b, name)) return;
    int64_t T = b->quick ? 32768 : 131072 * 256 / experts;
    char shape[64];
    exc_gate gate = EXC_GATE;
    gate.renorm = 1;
    float *logits = bench_alloc(b, (size_t)(T * experts) * 4);
    struct exc_route_args a = {.logits = logits, .gate = &gate, .tokens = T, .experts = experts, .top_k = k,
                               .ids = bench_alloc(b, (size_t)(T * k) * 4), .weights = bench_alloc(b, (size_t)(T * k) * 4)};
    fill_f32(b, logits, (size_t)(T * experts), 1.5f, 11);
    int32_t *slot = bench_alloc(b, (size_t)T * 4);
    int64_t *counts = exc_zalloc(b->ctx, (size_t)experts, 8, "counts");
    double *gates = exc_zalloc(b->ctx, (size_t)experts, 8, "gate sums");
    uint32_t *prompts = exc_zalloc(b->ctx, (size_t)(64 * experts), 4, "prompt counts");
    for (int64_t t = 0; t < T; t++) slot[t] = (int32_t)(t * 64 / T);
    if (count) a.slot = slot, a.count = counts, a.gate_sum = gates, a.prompt_count = prompts, a.prompt_stride = experts;
    run_route(b, &a);
    double error = route_error(&a);
    if (count) {
        int64_t total = 0;
        for (int64_t e = 0; e < experts; e++) total += counts[e];
        if (total != T * k) error = 1;
    }
    snprintf(shape, sizeof shape, "%d tokens, top-%d of %d%s", (int)T, (int)k, (int)experts, count ? ", counted" : "");
    row r = {.name = name, .shape = shape, .against = CEIL_READ, .work = 4.0 * (double)(T * experts), .unit = "tokens/s",
             .per_call = (double)T, .goal = target > 0 ? GOAL_RATE : GOAL_NONE, .target = target, .error = error, .limit = 1e-9};
    bench_measure(b, &r, run_route, &a);
    exc_release(logits);
    exc_release(a.ids);
    exc_release(a.weights);
    exc_release(slot);
    exc_release(counts);
    exc_release(gates);
    exc_release(prompts);
}

/* ----------------------------------------------------------------------------------------------------- moments */

static void run_moments(bench *b, void *arg) { OP(b, moments, arg); }

static void moments_row(bench *b)
{
    if (!bench_wanted(b, "moments")) return;
    int64_t T = b->quick ? 4096 : 16384, K = 8, E = 128, I = 768;
    char shape[64];
    int32_t *ids = bench_alloc(b, (size_t)(T * K) * 4);
    float *weights = bench_alloc(b, (size_t)(T * K) * 4);
    uint16_t *mid = bench_alloc(b, (size_t)(T * K * I) * 2);
    int64_t *count = exc_zalloc(b->ctx, (size_t)E, 8, "counts");
    double *gate = exc_zalloc(b->ctx, (size_t)E, 8, "gate sums"), *sum = exc_zalloc(b->ctx, (size_t)(E * I), 8, "sums");
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++) {
            ids[t * K + k] = (int32_t)((exc_random_u64(3, 0, (uint64_t)t) + (uint64_t)(k * 16)) % (uint64_t)E);
            weights[t * K + k] = 0.125f;
        }
    fill_bf16(b, mid, (size_t)(T * K * I), 1, 12);
    struct exc_moments_args a = {.ids = ids, .weights = weights, .mid = mid, .act = EXC_BF16, .tokens = T, .top_k = K,
                                 .experts = E, .inner = I, .count = count, .gate_sum = gate, .mid_sum = sum};
    run_moments(b, &a);
    double error = 0;
    for (int64_t e = 0; e < E; e += 41)
        for (int64_t i = 0; i < I; i += 101) {
            double want = 0, size = 0;
            for (int64_t p = 0; p < T * K; p++)
                if (ids[p] == e) want += (double)from_bf16(mid[p * I + i]), size += fabs((double)from_bf16(mid[p * I + i]));
            if (!(fabs(sum[e * I + i] - want) / size <= error)) error = fabs(sum[e * I + i] - want) / size;
        }
    snprintf(shape, sizeof shape, "%d tokens x %d, %d experts of %d bf16", (int)T, (int)K, (int)E, (int)I);
    row r = {.name = "moments", .shape = shape, .against = CEIL_READ, .work = 2.0 * (double)(T * K * I), .goal = GOAL_FRACTION,
             .target = 0.60, .error = error, .limit = 1e-6};
    bench_measure(b, &r, run_moments, &a);
    exc_release(ids);
    exc_release(weights);
    exc_release(mid);
    exc_release(count);
    exc_release(gate);
    exc_release(sum);
}

/* ---------------------------------------------------------------------------------------------------- contrast */

static void run_contrast(bench *b, void *arg) { OP(b, contrast, arg); }

static void contrast_row(bench *b)
{
    if (!bench_wanted(b, "contrast")) return;
    int64_t P = 256, E = 128, K = 8;
    double *out = bench_alloc(b, (size_t)(5 * E) * 8), n[2] = {0}, of[2] = {0};
    uint32_t *counts[2];
    for (int s = 0; s < 2; s++) {
        counts[s] = bench_alloc(b, (size_t)(P * E) * 4);
        for (int64_t i = 0; i < P * E; i++) counts[s][i] = (uint32_t)(exc_random_u64(21 + (uint64_t)s, 0, (uint64_t)i) % 5);
        for (int64_t p = 0; p < P; p++)
            for (int64_t e = 0; e < E; e++) n[s] += counts[s][p * E + e], of[s] += e == 5 ? counts[s][p * E + e] : 0;
    }
    struct exc_contrast_args a = {.target = counts[0], .target_prompts = P, .baseline = counts[1], .baseline_prompts = P, .stride = E,
        .experts = E, .top_k = K, .alpha = 0.5, .resamples = b->quick ? 200 : 1000, .seed = 1, .log_ratio = out, .se = out + E,
        .z = out + 2 * E, .p = out + 3 * E, .risk = out + 4 * E};
    run_contrast(b, &a);
    double want = log((of[0] + 0.5) / (n[0] + 0.5 * (double)E)) - log((of[1] + 0.5) / (n[1] + 0.5 * (double)E));
    char shape[64];
    snprintf(shape, sizeof shape, "%d + %d prompts x %d experts, %d resamples", (int)P, (int)P, (int)E, (int)a.resamples);
    /* a resample adds up the rows of as many prompts as there are: one addition an element, half a multiply-add */
    row r = {.name = "contrast", .shape = shape, .against = CEIL_F32, .work = 2.0 * (double)(a.resamples * P * E), .unit = "layers/s",
             .per_call = 1, .error = fabs(out[5] - want), .limit = 1e-12};
    bench_measure(b, &r, run_contrast, &a);
    exc_release(out);
    exc_release(counts[0]);
    exc_release(counts[1]);
}

/* -------------------------------------------------------------------------------------------------------- gram */

static void run_gram(bench *b, void *arg) { OP(b, gram, arg); }

static void gram_row(bench *b, const char *name, int side, int64_t samples, int64_t width)
{
    if (!bench_wanted(b, name)) return;
    int64_t L = 4, n = side == EXC_GRAM_SAMPLES ? samples : width, k = side == EXC_GRAM_SAMPLES ? width : samples;
    float *x = bench_alloc(b, (size_t)(L * samples * width) * 4);
    double *g = bench_alloc(b, (size_t)(L * n * n) * 8), error = 0;
    fill_f32(b, x, (size_t)(L * samples * width), 1, 31);
    struct exc_gram_args a = {.x = x, .layers = L, .layer_stride = samples * width, .samples = samples, .row_stride = width,
                              .width = width, .side = side, .g = g};
    run_gram(b, &a);
    for (int64_t i = 0; i < n; i += 53)
        for (int64_t j = 0; j < n; j += 61) {
            double want = 0;
            for (int64_t c = 0; c < k; c++)
                want += side == EXC_GRAM_SAMPLES ? (double)x[i * width + c] * (double)x[j * width + c]
                                                 : (double)x[c * width + i] * (double)x[c * width + j];
            double off = fabs(g[i * n + j] - want) / (double)k;
            if (!(off <= error)) error = off;
        }
    char shape[64];
    snprintf(shape, sizeof shape, "%d layers, %d samples x %d", (int)L, (int)samples, (int)width);
    /* symmetric: half of the products */
    row r = {.name = name, .shape = shape, .against = CEIL_F64, .work = (double)(L * n * (n + 1) * k), .error = error, .limit = 1e-7};
    bench_measure(b, &r, run_gram, &a);
    exc_release(x);
    exc_release(g);
}

/* ----------------------------------------------------------------------------------------------------- compare */

static void run_compare(bench *b, void *arg) { OP(b, compare, arg); }

static double compare_error(const struct exc_compare_args *a)
{
    double worst = 0;
    for (int64_t t = 0; t < a->rows; t += 37) {
        const float *p = a->p + t * a->vocab, *q = a->q + t * a->vocab;
        double sp = 0, sq = 0, kl = 0;
        for (int64_t v = 0; v < a->vocab; v++) sp += exp((double)p[v]), sq += exp((double)q[v]);
        for (int64_t v = 0; v < a->vocab; v++) kl += exp((double)p[v]) / sp * ((double)p[v] - log(sp) - (double)q[v] + log(sq));
        double off = fabs(a->kl[t] - kl) / kl + fabs(a->nll_p[t] - (log(sp) - (double)p[a->next[t]]));
        if (!(off <= worst)) worst = off;
    }
    return worst;
}

static void compare_row(bench *b)
{
    if (!bench_wanted(b, "compare")) return;
    int64_t T = b->quick ? 64 : 256, V = 151936;
    float *p = bench_alloc(b, (size_t)(T * V) * 4), *q = bench_alloc(b, (size_t)(T * V) * 4);
    double *out = bench_alloc(b, (size_t)(3 * T) * 8);
    int32_t *next = bench_alloc(b, (size_t)T * 4);
    fill_f32(b, p, (size_t)(T * V), 2, 41);
    fill_f32(b, q, (size_t)(T * V), 2, 42);
    for (int64_t t = 0; t < T; t++) next[t] = (int32_t)(t * 131 % V);
    struct exc_compare_args a = {.p = p, .q = q, .rows = T, .vocab = V, .next = next, .kl = out, .same_top = bench_alloc(b, (size_t)T),
                                 .nll_p = out + T, .nll_q = out + 2 * T};
    run_compare(b, &a);
    char shape[64];
    snprintf(shape, sizeof shape, "%d rows x %d f32, two sets", (int)T, (int)V);
    row r = {.name = "compare", .shape = shape, .against = CEIL_READ, .work = 8.0 * (double)(T * V), .error = compare_error(&a), .limit = 1e-5};
    bench_measure(b, &r, run_compare, &a);
    exc_release(p);
    exc_release(q);
    exc_release(out);
    exc_release(next);
    exc_release(a.same_top);
}

/* ----------------------------------------------------------------------------------------------------- convert */

static void run_convert(bench *b, void *arg) { OP(b, convert, arg); }

static void convert_row(bench *b, const char *name, int from, int to, bool look)
{
    if (!bench_wanted(b, name)) return;
    int64_t n = (int64_t)(b->quick ? 16 : 64) << 20, bad = 0, at = -1;
    size_t in = from == EXC_F32 ? 4 : 2, out = look ? 0 : to == EXC_F32 ? 4 : 2;
    void *src = bench_alloc(b, (size_t)n * in), *dst = look ? NULL : bench_alloc(b, (size_t)n * out);
    if (from == EXC_F32) fill_f32(b, src, (size_t)n, 1, 51);
    else fill_bf16(b, src, (size_t)n, 1, 51);
    struct exc_convert_args a = {.src = src, .src_dtype = from, .dst = dst, .dst_dtype = to, .n = n, .nonfinite = &bad, .index = &at};
    run_convert(b, &a);
    double wrong = (double)bad;
    for (int64_t i = 0; !look && i < n; i += 101)
        wrong += from == EXC_F32 ? to_bf16(((float *)src)[i]) != ((uint16_t *)dst)[i] : from_bf16(((uint16_t *)src)[i]) != ((float *)dst)[i];
    char shape[64];
    snprintf(shape, sizeof shape, "%lld M %s -> %s", (long long)(n >> 20), exc_dtype_name((exc_dtype)from),
             look ? "looked at" : exc_dtype_name((exc_dtype)to));
    row r = {.name = name, .shape = shape, .against = look ? CEIL_READ : CEIL_COPY, .work = (double)n * (double)(in + out),
             .error = wrong, .limit = 0.5};
    bench_measure(b, &r, run_convert, &a);
    exc_release(src);
    exc_release(dst);
}

void sums_rows(bench *b)
{
    route_row(b, "route", 256, 8, false, 5e6);
    route_row(b, "route_counted", 256, 8, true, 0);
    route_row(b, "route_64", 64, 8, false, 0);
    moments_row(b);
    contrast_row(b);
    gram_row(b, "gram_samples", EXC_GRAM_SAMPLES, 512, 2048);
    gram_row(b, "gram_width", EXC_GRAM_WIDTH, 2048, 512);
    compare_row(b);
    convert_row(b, "convert_bf16_f32", EXC_BF16, EXC_F32, false);
    convert_row(b, "convert_f32_bf16", EXC_F32, EXC_BF16, false);
    convert_row(b, "convert_look", EXC_BF16, EXC_BF16, true);
}
