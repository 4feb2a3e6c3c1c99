/* rows.c - compare, sample, moments against f64 loops, at every instruction level this machine has.
 *
 * Tolerances. compare: exp errs by 1.5e-7 relative and chunks are summed in f32, so log-probabilities are good to 1e-6 and KL,
 * where most of that cancels, to 1e-6 of what is compared. moments: 64 rows in f32 before f64, so 64 * 2^-24 of the
 * sum of magnitudes at worst. sample is exact: the set and the draw are recomputed from the same probabilities. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fixed.h"
#include "helpers.h"

static void at_every_level(void (*body)(void)) {
    static const char *const levels[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
    exc_isa_lower(NULL);
    int best = (int)exc_isa_level();
    for (int i = 0; i <= best; i++) {
        exc_isa_lower(levels[i]);
        body();
    }
    exc_isa_lower(NULL);
}

static exc_queue *queue_of(int threads) {
    static exc_ctx *open[9];
    if (!open[threads]) open[threads] = test_ctx(threads);
    return &open[threads]->queue;
}

static float *normals(int64_t n, uint64_t seed, float scale) {
    float *x = malloc((size_t)(n + 1) * 4);
    for (int64_t i = 0; i < n; i++) x[i] = scale * test_normal(seed, (uint64_t)i);
    return x;
}

static void close_to(double got, double want, double relative, double absolute, const char *what) {
    if (isnan(want) && isnan(got)) return;
    if (got == want) return;
    if (!(fabs(got - want) <= relative * fabs(want) + absolute)) fail_msg("%s: %.12g, not %.12g", what, got, want);
}

/* ---------------------------------------------------------------------------------------------------------- exponential */

static void exponential(void **state) {
    for (int i = 0; i <= 870000; i++) {
        float x = -(float)i * 1e-4f;
        double want = exp((double)x);
        if (x > -87.0f) assert_true(fabs((double)exc_exp_down(x) - want) <= 1.5e-7 * want);
    }
    assert_true(exc_exp_down(0.0f) == 1.0f && exc_exp_down(-0.0f) == 1.0f && exc_exp_down(INFINITY) == 1.0f);
    assert_true(exc_exp_down(-INFINITY) == 0.0f && exc_exp_down(-88.0f) == 0.0f);
    assert_true(isnan(exc_exp_down(NAN)));
}

/* -------------------------------------------------------------------------------------------------------------- compare */

static double log_sum(const float *x, int64_t n) {
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) top = fmax(top, (double)x[i]);
    for (int64_t i = 0; i < n; i++) sum += exp((double)x[i] - top);
    return top + log(sum);
}

static int64_t first_best(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static void compare_body(void) {
    static const int64_t vocab[] = {1, 2, 15, 16, 31, 127, 2048, 2049, 5000, 33333};
    for (size_t s = 0; s < EXC_COUNT(vocab); s++)
        for (int near = 0; near < 2; near++) {
            enum { R = 9 };
            int64_t V = vocab[s];
            float *p = normals(R * V, s, 4), *q = normals(R * V, 100 + s, near ? 1e-3f : 3);
            double kl[R + 1], nll_p[R + 1], nll_q[R + 1], alone[R];
            uint8_t same[R + 1];
            int32_t next[R];
            kl[R] = nll_p[R] = nll_q[R] = 77;
            same[R] = 77;
            for (int64_t i = 0; i < R * V && near; i++) q[i] += p[i];
            for (int r = 0; r < R; r++) next[r] = (int32_t)((r * 7919) % V);
            for (int64_t i = 0; i < V; i++) q[i] = p[i]; /* row 0: the same, KL 0 exactly or nearly */
            struct exc_compare_args a = {p, q, R, V, next, kl, same, nll_p, nll_q};
            assert_int_equal(exc_cpu_compare(queue_of(2), &a), EXC_OK);
            for (int r = 0; r < R; r++) {
                const float *x = p + r * V, *y = q + r * V;
                double lx = log_sum(x, V), ly = log_sum(y, V), want = 0;
                for (int64_t i = 0; i < V; i++)
                    want += exp((double)x[i] - lx) * (((double)x[i] - lx) - ((double)y[i] - ly));
                close_to(kl[r], want, 2e-6, 1e-6, "kl");
                assert_true(kl[r] >= 0);
                close_to(nll_p[r], lx - (double)x[next[r]], 1e-6, 1e-6, "nll_p");
                close_to(nll_q[r], ly - (double)y[next[r]], 1e-6, 1e-6, "nll_q");
                assert_int_equal(same[r], first_best(x, V) == first_best(y, V));
            }
            assert_true(kl[0] < 1e-9 && kl[R] == 77 && nll_p[R] == 77 && nll_q[R] == 77 && same[R] == 77);
            struct exc_compare_args only = {.p = p, .rows = R, .vocab = V, .next = next, .nll_p = alone};
            assert_int_equal(exc_cpu_compare(queue_of(1), &only), EXC_OK);
            for (int r = 0; r < R; r++) close_to(alone[r], nll_p[r], 1e-7, 1e-7, "nll alone");
            free(p);
            free(q);
        }
}

static void compare_rows(void **state) { at_every_level(compare_body); }

static void compare_edges_body(void) {
    float p[6][4] = {{0, -INFINITY, 1, 2}, {0, 0, 0, 0}, {NAN, 1, 2, 3}, {5, 5, 1, 0}, {0, 1, 2, 3}, {-INFINITY, -INFINITY, 0, 0}};
    float q[6][4] = {{0, -INFINITY, 1, 2}, {0, -INFINITY, 0, 0}, {0, 1, 2, 3}, {5, 4, 1, 0}, {0, 1, NAN, 3}, {0, 0, 0, 0}};
    double kl[6];
    uint8_t same[6];
    struct exc_compare_args a = {.p = p[0], .q = q[0], .rows = 6, .vocab = 4, .kl = kl, .same_top = same};
    assert_int_equal(exc_cpu_compare(queue_of(1), &a), EXC_OK);
    assert_true(kl[0] < 1e-9);           /* 0 log 0 = 0 */
    assert_true(isinf(kl[1]) && kl[1] > 0); /* what p allows and q forbids */
    assert_true(isnan(kl[2]) && isnan(kl[4]));
    close_to(kl[5], log(2), 1e-6, 0, "half of four");
    assert_true(same[0] && same[1] && same[3]); /* a tie goes to the lower id */
    a.q = NULL;
    assert_int_equal(exc_cpu_compare(queue_of(1), &a), EXC_ERR_USAGE);
}

static void compare_edges(void **state) { at_every_level(compare_edges_body); }

/* --------------------------------------------------------------------------------------------------------------- sample */

typedef struct choice {
    float p;
    int32_t id;
} choice;

static int by_size(const void *a, const void *b) {
    const choice *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->id - y->id;
}

/* sorts, cuts, and walks what is left by id; *near when rounding could decide otherwise */
static int32_t sampled(const float *x, int64_t n, float temperature, float top_p, double random, int *near) {
    choice *c = malloc((size_t)n * sizeof *c);
    char *in = calloc((size_t)n, 1);
    float top = x[first_best(x, n)];
    double total = 0, kept = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        c[i] = (choice){exc_exp_down((x[i] - top) * (1.0f / temperature)), (int32_t)i};
        total += (double)c[i].p;
    }
    qsort(c, (size_t)n, sizeof *c, by_size);
    *near = 0;
    for (int64_t i = 0; i < n && (i == 0 || top_p >= 1 || kept < (double)top_p * total); i++) {
        in[c[i].id] = c[i].p > 0;
        kept += (double)c[i].p;
        if (fabs(kept - (double)top_p * total) < 1e-12 * total) *near = 1;
    }
    int32_t id = -1;
    for (int64_t i = 0; i < n && (id < 0 || sum <= random * kept); i++) {
        if (!in[i]) continue;
        sum += (double)exc_exp_down((x[i] - top) * (1.0f / temperature));
        id = (int32_t)i;
        if (fabs(sum - random * kept) < 1e-12 * kept) *near = 1;
    }
    free(c);
    free(in);
    return id;
}

static void sample_body(void) {
    static const int64_t vocab[] = {1, 2, 17, 127, 5000};
    static const float temperatures[] = {0.3f, 1.0f, 5.0f}, tops[] = {0.0f, 0.1f, 0.5f, 0.9f, 0.999f, 1.0f};
    for (size_t s = 0; s < EXC_COUNT(vocab); s++) {
        enum { R = 24 };
        int64_t V = vocab[s];
        float *x = normals(R * V, s, 2), logprob[R];
        double random[R];
        int32_t token[R + 1];
        token[R] = 77;
        for (int r = 0; r < R; r++) random[r] = r == 0 ? 0 : r == 1 ? 1 - 0x1p-53 : exc_random_unit(5, s, (uint64_t)r);
        for (int64_t i = 0; i < V; i++) x[3 * V + i] = (float)(i % 3); /* ties at the edge */
        struct exc_sample_args a = {x, R, V, 0, 0.5f, NULL, token, logprob};
        assert_int_equal(exc_cpu_sample(queue_of(2), &a), EXC_OK);
        for (int r = 0; r < R; r++) {
            assert_int_equal(token[r], first_best(x + r * V, V));
            close_to((double)logprob[r], (double)x[r * V + token[r]] - log_sum(x + r * V, V), 1e-6, 1e-6, "logprob");
        }
        a.random01 = random;
        for (size_t t = 0; t < EXC_COUNT(temperatures); t++)
            for (size_t p = 0; p < EXC_COUNT(tops); p++) {
                a.temperature = temperatures[t];
                a.top_p = tops[p];
                assert_int_equal(exc_cpu_sample(queue_of(2), &a), EXC_OK);
                for (int r = 0; r < R; r++) {
                    int near, want = sampled(x + r * V, V, a.temperature, a.top_p, random[r], &near);
                    if (!near) assert_int_equal(token[r], want);
                    close_to((double)logprob[r], (double)x[r * V + token[r]] - log_sum(x + r * V, V), 1e-6, 1e-6, "logprob");
                }
            }
        assert_int_equal(token[R], 77);
        free(x);
    }
}

static void sample_draws(void **state) { at_every_level(sample_body); }

static void sample_edges_body(void) {
    float x[6][5] = {{NAN, 1, NAN, 2, 2},
                     {NAN, NAN, NAN, NAN, NAN},
                     {0, INFINITY, 0, INFINITY, 0},
                     {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY},
                     {NAN, -INFINITY, -1e30f, -INFINITY, NAN},
                     {7, 7, 7, 7, 7}};
    double random[6] = {0, 0.5, 0.75, 0.5, 0.5, 0.5};
    int32_t token[6];
    struct exc_sample_args a = {x[0], 6, 5, 0, 1, random, token, NULL};
    assert_int_equal(exc_cpu_sample(queue_of(1), &a), EXC_OK);
    static const int32_t greedy[] = {3, 0, 1, 0, 2, 0};
    assert_memory_equal(token, greedy, sizeof greedy);
    a.temperature = 0.5f;
    assert_int_equal(exc_cpu_sample(queue_of(1), &a), EXC_OK);
    static const int32_t drawn[] = {1, 0, 3, 0, 2, 2};
    assert_memory_equal(token, drawn, sizeof drawn);
    a.top_p = 0.4f;
    assert_int_equal(exc_cpu_sample(queue_of(1), &a), EXC_OK);
    assert_int_equal(token[5], 1); /* ids 0 and 1 are left */
    a.temperature = NAN;
    assert_int_equal(exc_cpu_sample(queue_of(1), &a), EXC_ERR_USAGE);
    a.temperature = 1;
    a.random01 = NULL;
    assert_int_equal(exc_cpu_sample(queue_of(1), &a), EXC_ERR_USAGE);
}

static void sample_edges(void **state) { at_every_level(sample_edges_body); }

/* -------------------------------------------------------------------------------------------------------------- moments */

static void moments_body(void) {
    static const int64_t shapes[][4] = {{0, 2, 4, 8}, {1, 1, 1, 1}, {127, 3, 5, 31}, {700, 8, 33, 127}, {900, 2, 3, 1300}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int act = 0; act < 2; act++) {
            int64_t T = shapes[s][0], K = shapes[s][1], E = shapes[s][2], I = shapes[s][3], pairs = T * K;
            int dtype = act ? EXC_BF16 : EXC_F32;
            float *mid = normals(pairs * I, s, 1), *weights = normals(pairs, 9, 1);
            uint16_t *half = malloc((size_t)(pairs * I + 1) * 2);
            int32_t *ids = malloc((size_t)(pairs + 1) * 4);
            for (int64_t i = 0; i < pairs * I; i++) {
                half[i] = test_bf16(mid[i]);
                if (act) mid[i] = test_from_bf16(half[i]);
            }
            for (int64_t p = 0; p < pairs; p++)
                ids[p] = p / K % 10 == 4 ? -1 : (int32_t)(exc_random_u64(8, s, (uint64_t)p) % (uint64_t)E);
            double *kept = NULL;
            for (int threads = 1; threads <= 3; threads++) {
                size_t n = (size_t)(E * I);
                int64_t *count = calloc((size_t)E + 1, 8);
                double *gate = calloc((size_t)E + 1, 8), *sum = calloc(n + 1, 8), *want = calloc(n, 8), *size = calloc(n, 8);
                count[E] = 77, gate[E] = 77, sum[n] = 77;
                struct exc_moments_args a = {ids, weights, act ? (void *)half : (void *)mid, dtype, T, K, E, I, count, gate, sum};
                assert_int_equal(exc_cpu_moments(queue_of(threads), &a), EXC_OK);
                for (int64_t p = 0; p < pairs; p++) {
                    if (ids[p] < 0) continue;
                    count[ids[p]]--;
                    gate[ids[p]] -= (double)weights[p];
                    for (int64_t i = 0; i < I; i++) {
                        want[ids[p] * I + i] += (double)mid[p * I + i];
                        size[ids[p] * I + i] += fabs((double)mid[p * I + i]);
                    }
                }
                for (int64_t e = 0; e < E; e++) {
                    assert_int_equal(count[e], 0);
                    assert_true(fabs(gate[e]) < 1e-9);
                }
                for (size_t i = 0; i < n; i++) close_to(sum[i], want[i], 0, size[i] * 64 * 0x1p-24, "mid_sum");
                assert_true(count[E] == 77 && gate[E] == 77 && sum[n] == 77);
                if (kept) assert_memory_equal(sum, kept, n * 8);
                else kept = malloc(n * 8), memcpy(kept, sum, n * 8);
                free(count), free(gate), free(sum), free(want), free(size);
            }
            free(kept), free(mid), free(half), free(weights), free(ids);
        }
}

static void moments_sums(void **state) { at_every_level(moments_body); }

/* what multiples of a unit must be: exact, to nearest even, no NaN lost, nothing changed that is a multiple already */
static void fixed_rounds_to_units(void **state) {
    for (uint64_t i = 0; i < 400000; i++) {
        uint64_t u = exc_random_u64(31, 1, i);
        float x = exc_from_bits((uint32_t)u);
        if (i & 1) x = ldexpf((float)(int32_t)u, -20 - (int)(u >> 32) % 40); /* about the unit and its 2^23-fold */
        if (isnan(x)) {
            assert_true(isnan(exc_fixed(x)));
            continue;
        }
        double want = isinf(x) ? (double)x : nearbyint((double)x * 0x1p28) * 0x1p-28;
        if ((double)exc_fixed(x) != want) fail_msg("%a: %a, not %a", (double)x, (double)exc_fixed(x), want);
        double square = (double)x * (double)x, whole = nearbyint(square * 0x1p20) * 0x1p-20;
        if (exc_fixed_square(square) != whole) fail_msg("%a: %a, not %a", square, exc_fixed_square(square), whole);
    }
    assert_true(exc_fixed(0x1.8p-28f) == 0x1p-27f && exc_fixed(0x1p-29f) == 0 && exc_fixed(-0x1.8p-29f) == -0x1p-28f);
    assert_true(isnan(exc_fixed_square(NAN)) && isinf(exc_fixed_square(INFINITY)));
}

/* pairs in any order and in any number of calls: the same bits, and what integers say */
static void moments_split_body(void) {
    enum { T = 500, K = 3, E = 5, I = 1100 };
    float *mid = normals(T * K * I, 3, 1), *weights = normals(T * K, 4, 1);
    int32_t *ids = malloc(sizeof *ids * T * K);
    double *sum[2] = {calloc(E * I, 8), calloc(E * I, 8)}, gate[2][E] = {{0}};
    int64_t *units = calloc(E * I, 8);
    exc_queue q = *queue_of(2);
    q.reproducible = 1;
    for (int p = 0; p < T * K; p++) {
        ids[p] = p % 10 == 4 ? -1 : (int32_t)(exc_random_u64(8, 1, (uint64_t)p) % E);
        for (int i = 0; i < I; i++) {
            mid[p * I + i] = ldexpf(mid[p * I + i], -(i % 28)); /* small ones too */
            if (ids[p] >= 0) units[ids[p] * I + i] += llrint(ldexp((double)mid[p * I + i], 28));
        }
    }
    struct exc_moments_args a = {.ids = ids, .weights = weights, .mid = mid, .act = EXC_F32, .tokens = T, .top_k = K, .experts = E,
                                 .inner = I, .gate_sum = gate[0], .mid_sum = sum[0]};
    assert_int_equal(exc_cpu_moments(&q, &a), EXC_OK);
    for (int i = 0; i < E * I; i++) assert_true(sum[0][i] == ldexp((double)units[i], -28));
    a.gate_sum = gate[1], a.mid_sum = sum[1];
    for (int t = T, n; t > 0; t -= n) { /* from the end, in calls of 1, 2, 3, .. tokens */
        n = t < 1 + (T - t) % 97 ? t : 1 + (T - t) % 97;
        a.ids = ids + (t - n) * K, a.weights = weights + (t - n) * K, a.mid = mid + (t - n) * K * I, a.tokens = n;
        assert_int_equal(exc_cpu_moments(&q, &a), EXC_OK);
    }
    assert_memory_equal(sum[0], sum[1], E * I * 8);
    assert_memory_equal(gate[0], gate[1], sizeof gate[0]);
    memset(gate[1], 0, sizeof gate[1]);
    a = (struct exc_moments_args){.ids = ids, .weights = weights, .tokens = T, .top_k = K, .experts = E, .gate_sum = gate[1]};
    assert_int_equal(exc_cpu_moments(&q, &a), EXC_OK); /* without intermediates: another path, the same sums */
    assert_memory_equal(gate[0], gate[1], sizeof gate[0]);
    free(mid), free(weights), free(ids), free(sum[0]), free(sum[1]), free(units);
}

static void moments_same_bits_for_any_split(void **state) { at_every_level(moments_split_body); }

static void moments_optional(void **state) {
    int32_t ids[4] = {1, 0, 1, -1};
    int64_t count[2] = {5, 0};
    struct exc_moments_args a = {.ids = ids, .tokens = 2, .top_k = 2, .experts = 2, .inner = 4, .count = count};
    assert_int_equal(exc_cpu_moments(queue_of(1), &a), EXC_OK);
    assert_int_equal(count[0], 6);
    assert_int_equal(count[1], 2);
    a.experts = 0;
    assert_int_equal(exc_cpu_moments(queue_of(1), &a), EXC_ERR_USAGE);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exponential),   cmocka_unit_test(compare_rows), cmocka_unit_test(compare_edges),
        cmocka_unit_test(sample_draws),  cmocka_unit_test(sample_edges), cmocka_unit_test(moments_sums),
        cmocka_unit_test(moments_optional), cmocka_unit_test(fixed_rounds_to_units),
        cmocka_unit_test(moments_same_bits_for_any_split),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
