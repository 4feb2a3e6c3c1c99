/* madeup.h - stats of a model that never was, for suites that ask what is done with sums rather than how they
 * are taken. */
#ifndef EXC_TEST_MADEUP_H
#define EXC_TEST_MADEUP_H

#include "helpers.h"
#include "totals.h"

/* consistent stats of a model that never was: counts by a counter-based coin, sums and states normal */
static inline exc_stats *made_up(exc_ctx *ctx, int64_t pt, int64_t pb, int64_t layers, int64_t M, int64_t E,
                                 int64_t H, bool out_sum) {
    int64_t layer_of[64], K = 2, I = 5;
    for (int64_t i = 0; i < M; i++) layer_of[i] = layers - M + i;
    exc_stats sizes = {.layers = layers,
                       .moe_layers = M,
                       .experts = E,
                       .top_k = K,
                       .inner = I,
                       .hidden = H,
                       .layer_of = layer_of,
                       .prompts = {pt, pb},
                       .fingerprint = "0123456789abcdef0123456789abcdef",
                       .options = "{\"decode\":3}",
                       .decode = 3};
    exc_stats *s = NULL;
    sizes.prompt_hashes[0] = "aa";
    sizes.prompt_hashes[1] = "bb";
    assert_int_equal(exc_stats_new(ctx, &sizes, out_sum, &s), EXC_OK);
    for (int label = 0; label < 2; label++)
        for (int64_t m = 0; m < M; m++)
            for (int64_t p = 0; p < s->prompts[label]; p++)
                for (int64_t t = 0; t < 6 * K; t++) {
                    int64_t e =
                        (int64_t)(exc_random_u64(7, (uint64_t)(label * 100 + m), (uint64_t)(p * 64 + t / K)) %
                                  (uint64_t)E);
                    e = (e + t % K) % E; /* K different ones */
                    s->prompt_count[label][(p * M + m) * E + e]++;
                    s->group[label][0].count[m * E + e]++;
                    s->group[label][0].tokens[m] += t % K == 0;
                    if (t < 2 * K) s->group[label][1].count[m * E + e]++;
                    if (t < 2 * K) s->group[label][1].tokens[m] += t % K == 0;
                }
    exc_field f[EXC_STATS_FIELDS];
    exc_stats_fields(s, f);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) {
        double *d = exc_field_get(&f[i]);
        float *x = exc_field_get(&f[i]);
        for (int64_t k = 0; d && f[i].dtype == EXC_F64 && k < exc_field_count(&f[i]); k++)
            d[k] = (double)test_normal((uint64_t)i, (uint64_t)k);
        for (int64_t k = 0; x && f[i].dtype == EXC_F32 && k < exc_field_count(&f[i]); k++)
            x[k] = test_normal((uint64_t)i, (uint64_t)k);
    }
    return s;
}

#endif
