/* figures.c - rows of the ops that make figures of tokens: comparison and sampling of logits, contrast of routing, output sums,
 * Gram matrices and subspaces of the states of all layers of Qwen3-30B-A3B.
 *
 * `gram` and `subspace` are measured by NVIDIA's libraries and by our own kernels; the two must agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "gauge.h"

static void logit_rows(gauge *g, int64_t rows, int64_t V) {
    float *p = gauge_numbers(g, rows * V, EXC_F32, 2), *q = gauge_numbers(g, rows * V, EXC_F32, 2);
    double *random = malloc((size_t)rows * 8);
    for (int64_t i = 0; i < rows; i++) random[i] = exc_random_unit(5, 1, (uint64_t)i);
    struct exc_sample_args greedy = {.logits = p, .rows = rows, .vocab = V, .token = gauge_room(g, (size_t)rows * 4)},
                           nucleus = greedy;
    nucleus.temperature = 0.7f, nucleus.top_p = 0.9f, nucleus.random01 = gauge_up(g, random, (size_t)rows * 8);
    struct exc_compare_args compare = {.p = p,
                                       .q = q,
                                       .rows = rows,
                                       .vocab = V,
                                       .kl = gauge_room(g, (size_t)rows * 8),
                                       .same_top = gauge_room(g, (size_t)rows)};
    ROW(g, sample, &greedy, 4.0 * (double)(rows * V), 0, "%lldx%lld f32 greedy", (long long)rows, (long long)V);
    ROW(g, sample, &nucleus, 4.0 * (double)(rows * V), 0, "%lldx%lld f32 top-p 0.9", (long long)rows, (long long)V);
    ROW(g, compare, &compare, 8.0 * (double)(rows * V), 0, "%lldx%lld f32", (long long)rows, (long long)V);
    free(random);
    gauge_clear(g);
}

/* one layer's experts, prompts of both sets, 1000 resamples: additions of counts */
static void contrast_row(gauge *g) {
    int64_t P = g->quick ? 6 : 512, E = g->quick ? 16 : 128, resamples = g->quick ? 20 : 1000;
    uint32_t *count = malloc((size_t)(2 * P * E) * 4);
    for (int64_t i = 0; i < 2 * P * E; i++) count[i] = (uint32_t)(exc_random_u64(9, 1, (uint64_t)i) % 40);
    const uint32_t *there = gauge_up(g, count, (size_t)(2 * P * E) * 4);
    struct exc_contrast_args a = {.target = there,
                                  .target_prompts = P,
                                  .baseline = there + P * E,
                                  .baseline_prompts = P,
                                  .stride = E,
                                  .experts = E,
                                  .top_k = 8,
                                  .alpha = 0.5,
                                  .resamples = resamples,
                                  .seed = 1,
                                  .stream = 2,
                                  .log_ratio = gauge_room(g, (size_t)E * 8),
                                  .se = gauge_room(g, (size_t)E * 8),
                                  .z = gauge_room(g, (size_t)E * 8),
                                  .p = gauge_room(g, (size_t)E * 8),
                                  .risk = gauge_room(g, (size_t)E * 8)};
    ROW(g, contrast, &a, 0, 2.0 * (double)(resamples * P * E), "2x%lld prompts, E=%lld, %lld resamples", (long long)P,
        (long long)E, (long long)resamples);
    free(count);
    gauge_clear(g);
}

static void matvec_row(gauge *g) {
    int64_t n = g->quick ? 64 : 65536, k = g->quick ? 96 : 2048, rows = 4;
    exc_packed w = {gauge_numbers(g, (int64_t)exc_packed_bytes(n, k, EXC_BF16) / 2, EXC_BF16, 1), n, k, EXC_BF16};
    double *x = gauge_room(g, (size_t)(rows * k) * 8);
    RUN(g, convert, .src = gauge_numbers(g, rows * k, EXC_F32, 1), .src_dtype = EXC_F32, .dst = x, .dst_dtype = EXC_F64,
        .n = rows * k);
    struct exc_matvec_args a = {.x = x, .w = &w, .rows = rows, .y = gauge_room(g, (size_t)(rows * n) * 8)};
    ROW(g, matvec, &a, 2.0 * (double)(n * k), 0, "%lld f64 rows, %lldx%lld bf16", (long long)rows, (long long)n,
        (long long)k);
    gauge_clear(g);
}

/* last states of the prompts: noise of deviation 1 and four directions that stand out of it */
static void spectrum_rows(gauge *g) {
    enum { RANK = 4 };
    int64_t L = g->quick ? 2 : 48, n = g->quick ? 130 : 512, d = g->quick ? 101 : 2048;
    size_t each = (size_t)(n * d) * 4; /* bytes of a layer */
    if (!gauge_wanted(g, "gram") && !gauge_wanted(g, "subspace")) return;
    float *x = gauge_numbers(g, L * n * d, EXC_F32, 1), *line = malloc((size_t)n * d * 4);
    gauge_must(g, exc_device_get(g->ctx, line, x, each), "samples");
    for (int64_t i = 0; i < n * RANK; i++)
        line[i / RANK * d + 7 * (i % RANK)] *= (float)(64 >> i % RANK); /* deviations 64, 32, 16 and 8 */
    for (int64_t l = 0; l < L; l++) gauge_must(g, exc_device_put(g->ctx, x + l * n * d, line, each), "samples");
    free(line);
    double *gram = gauge_room(g, (size_t)(L * n * n) * 8);
    struct exc_gram_args product = {x, L, n * d, n, d, d, EXC_GRAM_SAMPLES, gram};
    struct exc_subspace_args subspace = {.x = x,
                                         .layers = L,
                                         .layer_stride = n * d,
                                         .samples = n,
                                         .row_stride = d,
                                         .width = d,
                                         .rank = RANK,
                                         .basis = gauge_room(g, (size_t)(L * RANK * d) * 4),
                                         .singular = gauge_room(g, (size_t)(L * RANK) * 4),
                                         .energy = gauge_room(g, (size_t)L * 8),
                                         .residual = gauge_room(g, (size_t)L * 8)};
    gauge_both(g, "cuBLASLt", "gram", gauge_ops.gram, &product, gram, 0,
               (double)L * (double)each + 8.0 * (double)(L * n * n), 2.0 * (double)(L * n * n) * (double)d,
               "%lld layers of %lldx%lld f32, X X^T in f64", (long long)L, (long long)n, (long long)d);
    gauge_both(g, "cuSOLVER", "subspace", gauge_ops.subspace, &subspace, subspace.basis, RANK * d, 0, 0,
               "%lld layers of %lldx%lld f32 k=%d", (long long)L, (long long)n, (long long)d, RANK);
    gauge_clear(g);
}

void figure_rows(gauge *g) {
    if (gauge_wanted(g, "sample") || gauge_wanted(g, "compare"))
        logit_rows(g, g->quick ? 4 : 512, g->quick ? 500 : 151936);
    if (gauge_wanted(g, "contrast")) contrast_row(g);
    if (gauge_wanted(g, "matvec")) matvec_row(g);
    spectrum_rows(g);
}
