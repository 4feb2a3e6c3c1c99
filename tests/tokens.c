/* tokens.c - the .cu twins of compare, sample and moments against their CPU definitions, which rows.c checks
 * against f64 loops.
 *
 * compare: sums in another order, 1e-6 as in rows.c. sample: the same token but where rounding decides, which
 * the random numbers here do not meet; log-probabilities to 1e-6. moments: the CPU's bits, in blocks of 64
 * rows and in fixed point. */
#include <math.h>

#include "twin.h"

static void close_to(double got, double want, double relative, double absolute, const char *what) {
    if ((isnan(want) && isnan(got)) || got == want) return;
    if (!(fabs(got - want) <= relative * fabs(want) + absolute))
        fail_msg("%s: %.12g, not %.12g", what, got, want);
}

/* --------------------------------------------------------------------------------------------------------------
 * compare */

static void both_compare(const float *p, const float *q, int64_t R, int64_t V, size_t offset) {
    double kl[2][8], nll_p[2][8], nll_q[2][8];
    uint8_t same[2][8];
    int32_t next[8];
    for (int64_t r = 0; r < R; r++) next[r] = (int32_t)(r * 7919 % V);
    struct exc_compare_args
        a = {p, q, R, V, next, q ? kl[0] : NULL, q ? same[0] : NULL, nll_p[0], q ? nll_q[0] : NULL},
        b = a;
    size_t n = (size_t)R;
    memset(kl, 0, sizeof kl), memset(nll_p, 0, sizeof nll_p), memset(nll_q, 0, sizeof nll_q),
        memset(same, 0, sizeof same);
    b.p = twin_up_at(p, n * (size_t)V * 4, offset), b.next = twin_up(next, n * 4),
    b.nll_p = twin_up(nll_p[1], n * 8);
    if (q)
        b.q = twin_up(q, n * (size_t)V * 4), b.kl = twin_up(kl[1], n * 8), b.nll_q = twin_up(nll_q[1], n * 8),
        b.same_top = twin_up(same[1], n);
    assert_int_equal(exc_cpu_compare(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(compare, &b);
    twin_down(nll_p[1], b.nll_p, n * 8);
    if (q)
        twin_down(kl[1], b.kl, n * 8), twin_down(nll_q[1], b.nll_q, n * 8), twin_down(same[1], b.same_top, n);
    for (int64_t r = 0; r < R; r++) {
        close_to(nll_p[1][r], nll_p[0][r], 1e-6, 1e-6, "nll_p");
        if (!q) continue;
        close_to(nll_q[1][r], nll_q[0][r], 1e-6, 1e-6, "nll_q");
        close_to(kl[1][r], kl[0][r], 2e-6, 1e-6, "kl");
        assert_int_equal(same[1][r], same[0][r]);
    }
    twin_done();
}

static void compare_rows(void **state) {
    static const int64_t vocab[] = {1, 2, 15, 31, 127, 2048, 5000, 33333};
    for (size_t s = 0; s < EXC_COUNT(vocab); s++)
        for (int near = 0; near < 2; near++) {
            int64_t V = vocab[s];
            if (twin_small() && V > 127) continue;
            float *p = twin_normals(5 * V, s, 4), *q = twin_normals(5 * V, 100 + s, near ? 1e-3f : 3);
            for (int64_t i = 0; i < 5 * V && near; i++) q[i] += p[i];
            for (int64_t i = 0; i < V; i++) q[i] = p[i], p[V + i] = (float)(i / 2 % 7); /* the same; ties */
            both_compare(p, q, 5, V, near ? 4 : 0);
            both_compare(p, NULL, 5, V, 0);
            free(p), free(q);
        }
    float p[7][4] = {{0, -INFINITY, 1, 2},
                     {0, 0, 0, 0},
                     {NAN, 1, 2, 3},
                     {5, 5, 1, 0},
                     {0, 1, 2, 3},
                     {-INFINITY, -INFINITY, 0, 0},
                     {NAN, -INFINITY, -INFINITY, NAN}};
    float q[7][4] = {{0, -INFINITY, 1, 2}, {0, -INFINITY, 0, 0}, {0, 1, 2, 3}, {5, 4, 1, 0},
                     {0, 1, NAN, 3},       {0, 0, 0, 0},         {0, 3, 0, 0}};
    both_compare(p[0], q[0], 7, 4, 0);
    struct exc_compare_args a = {.p = p[0], .rows = 7, .vocab = 4, .kl = (double *)p};
    assert_int_equal(TWIN_STATUS(compare, &a), EXC_ERR_USAGE);
}

/* ---------------------------------------------------------------------------------------------------------------
 * sample */

static void both_sample(const float *x, int64_t R, int64_t V, float temperature, float top_p,
                        const double *random) {
    int32_t token[2][32] = {{0}};
    float logprob[2][32] = {{0}};
    struct exc_sample_args a = {x, R, V, temperature, top_p, random, token[0], logprob[0]}, b = a;
    b.logits = twin_up(x, (size_t)(R * V) * 4), b.random01 = twin_up(random, (size_t)R * 8);
    b.token = twin_up(token[1], (size_t)R * 4), b.logprob = twin_up(logprob[1], (size_t)R * 4);
    assert_int_equal(exc_cpu_sample(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(sample, &b);
    twin_down(token[1], b.token, (size_t)R * 4), twin_down(logprob[1], b.logprob, (size_t)R * 4);
    for (int64_t r = 0; r < R; r++) {
        if (token[0][r] != token[1][r])
            fail_msg("V %d, temperature %g, top_p %g, row %d: token %d, not %d", (int)V, (double)temperature,
                     (double)top_p, (int)r, token[1][r], token[0][r]);
        close_to((double)logprob[1][r], (double)logprob[0][r], 1e-6, 1e-6, "logprob");
    }
    twin_done();
}

static void sample_draws(void **state) {
    static const int64_t vocab[] = {1, 2, 17, 127, 2048, 5000};
    static const float temperatures[] = {0, 0.3f, 5.0f}, tops[] = {0.0f, 0.1f, 0.9f, 0.999f, 1.0f};
    for (size_t s = 0; s < EXC_COUNT(vocab); s++) {
        enum { R = 11 };
        int64_t V = vocab[s], rows = twin_small() ? 4 : R; /* a block of 512 threads each */
        if (twin_small() && V != 2 && V != 127) continue;
        float *x = twin_normals(R * V, s, 2);
        double random[R];
        for (int r = 0; r < R; r++)
            random[r] = r == 0 ? 0 : r == 1 ? 1 - 0x1p-53 : exc_random_unit(5, s, (uint64_t)r);
        for (int64_t i = 0; i < V; i++) x[3 * V + i] = (float)(i % 3); /* ties at the edge */
        for (size_t t = 0; t < EXC_COUNT(temperatures); t++)
            for (size_t k = 0; k < EXC_COUNT(tops); k++)
                both_sample(x, rows, V, temperatures[t], tops[k], random);
        free(x);
    }
    float odd[7][5] = {{NAN, 1, NAN, 2, 2},
                       {NAN, NAN, NAN, NAN, NAN},
                       {0, INFINITY, 0, INFINITY, 0},
                       {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY},
                       {NAN, -INFINITY, -1e30f, -INFINITY, NAN},
                       {7, 7, 7, 7, 7},
                       {NAN, -INFINITY, -MAXFLOAT, -INFINITY, NAN}};
    double random[7] = {0, 0.5, 0.75, 0.5, 0.5, 0.5, 0.5};
    for (int t = 0; t < 2; t++)
        for (int k = 0; k < 2; k++) both_sample(odd[0], 7, 5, t ? 0.5f : 0, k ? 1.0f : 0.4f, random);
    struct exc_sample_args a = {.logits = odd[0], .rows = 1, .vocab = 5, .temperature = NAN};
    assert_int_equal(TWIN_STATUS(sample, &a), EXC_ERR_USAGE);
    a.temperature = 1;
    assert_int_equal(TWIN_STATUS(sample, &a), EXC_ERR_USAGE);
}

/* --------------------------------------------------------------------------------------------------------------
 * moments */

static void moments_sums(void **state) {
    static const int64_t shapes[][4] = {
        {0, 2, 4, 8}, {1, 1, 1, 1}, {127, 3, 5, 31}, {700, 2, 3, 127}, {300, 8, 33, 40}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int variant = 0; variant < 8; variant++) {
            int act = variant & 1 ? EXC_BF16 : EXC_F32, fixed = variant >> 1 & 1,
                alone = variant >> 2; /* alone: without activations */
            int64_t T = shapes[s][0], K = shapes[s][1], E = shapes[s][2], I = shapes[s][3], pairs = T * K;
            if (twin_small() && pairs > 400) continue;
            size_t size = act == EXC_BF16 ? 2 : 4, n = (size_t)(E * I), p = (size_t)pairs;
            float *values = twin_normals(pairs * I, s, 1), *weights = twin_normals(pairs, 9, 1);
            uint16_t *half = malloc((size_t)(pairs * I + 1) * 2);
            int32_t *ids = malloc((p + 1) * 4);
            for (int64_t i = 0; i < pairs * I; i++) half[i] = test_bf16(values[i]);
            for (int64_t i = 0; i < pairs; i++)
                ids[i] = i / K % 10 == 4 ? -1 : (int32_t)(exc_random_u64(8, s, (uint64_t)i) % (uint64_t)E);
            const void *mid = act == EXC_BF16 ? (void *)half : (void *)values;
            int64_t *count[2];
            double *gate[2], *sum[2];
            for (int i = 0; i < 2; i++) {
                count[i] = calloc((size_t)E, 8), gate[i] = calloc((size_t)E, 8), sum[i] = calloc(n, 8);
                for (int64_t e = 0; e < E; e++) count[i][e] = e, gate[i][e] = 0.25 * (double)e; /* added to */
                for (size_t k = 0; k < n; k++) sum[i][k] = 0.5 * (double)(k % 7);
            }
            struct exc_moments_args a = {ids,      weights, alone ? NULL : mid,   act, T, K, E, I,
                                         count[0], gate[0], alone ? NULL : sum[0]},
                                    b = a;
            b.ids = twin_up(ids, p * 4), b.weights = twin_up(weights, p * 4),
            b.count = twin_up(count[1], (size_t)E * 8), b.gate_sum = twin_up(gate[1], (size_t)E * 8);
            if (!alone) b.mid = twin_up(mid, p * (size_t)I * size), b.mid_sum = twin_up(sum[1], n * 8);
            twin.cpu->queue.reproducible = twin.gpu->queue.reproducible = fixed;
            assert_int_equal(exc_cpu_moments(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(moments, &b);
            twin.cpu->queue.reproducible = twin.gpu->queue.reproducible = 0;
            twin_down(count[1], b.count, (size_t)E * 8), twin_down(gate[1], b.gate_sum, (size_t)E * 8);
            if (!alone) twin_down(sum[1], b.mid_sum, n * 8);
            assert_memory_equal(count[1], count[0], (size_t)E * 8);
            assert_memory_equal(gate[1], gate[0], (size_t)E * 8);
            assert_memory_equal(sum[1], sum[0], n * 8);
            twin_done();
            for (int i = 0; i < 2; i++) free(count[i]), free(gate[i]), free(sum[i]);
            free(values), free(weights), free(half), free(ids);
        }
    struct exc_moments_args a = {.tokens = -1, .top_k = 1, .experts = 1};
    assert_int_equal(TWIN_STATUS(moments, &a), EXC_ERR_USAGE);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(compare_rows),
        cmocka_unit_test(sample_draws),
        cmocka_unit_test(moments_sums),
    };
    return cmocka_run_group_tests_name("tokens", tests, twin_open, twin_close);
}
