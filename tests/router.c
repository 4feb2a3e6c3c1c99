/* router.c - route against f64: selection by key with ties and groups, weights of every gate, NaN, counting, and gate sums whose
 * bits do not depend on how tokens are split.
 *
 * Tolerances. Weights are softmax in f32: 2e-6. Selection is exact but for keys nearer than 1e-6, which f32 may turn round. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "helpers.h"

static const char *const levels[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

static void at_every_level(void (*body)(void)) {
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

#define GUARD 64
/* n bytes, then 64 guard bytes */
static void *get(size_t n) {
    uint8_t *p = aligned_alloc(64, (n + GUARD + 63) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xa5, n + GUARD);
    return p;
}

static void guarded(const void *p, size_t n) {
    for (int i = 0; i < GUARD; i++) assert_int_equal(((const uint8_t *)p)[n + (size_t)i], 0xa5);
}

static float *normals(int64_t n, uint64_t seed, float scale) {
    float *x = get((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) x[i] = scale * test_normal(seed, (uint64_t)i);
    return x;
}

static void close_to(double got, double want, double relative, double absolute, const char *what) {
    if (isnan(want) && isnan(got)) return;
    if (!(fabs(got - want) <= relative * fabs(want) + absolute)) fail_msg("%s: %.9g, not %.9g", what, got, want);
}

typedef struct routing {
    int64_t T, E, K;
    exc_gate gate;
    float *logits, *bias;
    int32_t *ids;
    float *weights, *margin;
} routing;

static routing routing_make(int64_t T, int64_t E, int64_t K, int score, int renorm, int bias) {
    routing r = {T, E, K, EXC_GATE, normals(T * E, (uint64_t)E, 2), bias ? normals(E, 4, 0.1f) : NULL};
    r.gate.score = score;
    r.gate.renorm = renorm;
    r.gate.scale = score == 1 ? 2.5f : 0;
    r.ids = get((size_t)(T * K) * 4);
    r.weights = get((size_t)(T * K) * 4);
    r.margin = get((size_t)T * 4);
    return r;
}

static void routing_free(routing *r) { free(r->logits), free(r->bias), free(r->ids), free(r->weights), free(r->margin); }

static exc_status routing_run(const routing *r, int threads) {
    return exc_cpu_route(queue_of(threads),
                         &(struct exc_route_args){.logits = r->logits, .bias = r->bias, .gate = &r->gate, .tokens = r->T,
                                                  .experts = r->E, .top_k = r->K, .ids = r->ids, .weights = r->weights,
                                                  .margin = r->margin});
}

static double two_best(const double *x, int64_t n) {
    double a = -INFINITY, b = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (x[i] > a) b = a, a = x[i];
        else if (x[i] > b) b = x[i];
    return a + b;
}

/* selection by key in f64, ties to the lower id; keys nearer than 1e-6 may go either way */
static void routing_check_token(const routing *r, int64_t t) {
    static double s[1024], key[1024];
    static int taken[1024];
    const float *x = r->logits + t * r->E;
    double top = -INFINITY, sum = 0, chosen = 0, last = INFINITY;
    for (int64_t e = 0; e < r->E; e++) top = fmax(top, (double)x[e]);
    for (int64_t e = 0; e < r->E; e++) sum += exp((double)x[e] - top);
    for (int64_t e = 0; e < r->E; e++) {
        double z = (double)x[e];
        s[e] = r->gate.score == 0 ? exp(z - top) / sum : r->gate.score == 1 ? 1 / (1 + exp(-z)) : z;
        key[e] = s[e] + (r->bias ? (double)r->bias[e] : 0);
        taken[e] = 0;
    }
    int64_t groups = r->gate.groups > 1 ? r->gate.groups : 0, size = groups ? r->E / groups : 0;
    for (int64_t g = 0; g < groups; g++) {
        int64_t better = 0;
        for (int64_t o = 0; o < groups; o++) better += two_best(key + o * size, size) > two_best(key + g * size, size);
        for (int64_t i = 0; better >= r->gate.groups_kept && i < size; i++) taken[g * size + i] = 1;
    }
    for (int64_t e = 0; e < r->E; e++)
        if (taken[e]) key[e] = -INFINITY;
    double low = INFINITY, high = -INFINITY, weight[64], all = 0;
    for (int64_t k = 0; k < r->K; k++) {
        int32_t e = r->ids[t * r->K + k];
        assert_in_range(e, 0, r->E - 1);
        assert_int_equal(taken[e], 0);
        taken[e] = 3;
        low = fmin(low, key[e]);
        chosen = fmax(k ? chosen : s[e], s[e]);
    }
    for (int64_t e = 0; e < r->E; e++)
        if (taken[e] == 0) high = fmax(high, key[e]);
    assert_true(low >= high - 1e-6 * (1 + fabs(high)));
    for (int64_t k = 0; k < r->K; k++) {
        weight[k] = s[r->ids[t * r->K + k]];
        if (r->gate.score == 2) weight[k] = exp(weight[k] - chosen);
        all += weight[k];
    }
    for (int64_t k = 0; k < r->K; k++) {
        double w = weight[k] / (r->gate.score == 2 || r->gate.renorm ? all : 1) * (r->gate.scale != 0 ? (double)r->gate.scale : 1);
        float got = r->weights[t * r->K + k];
        close_to((double)got, w, 2e-6, 1e-12, "weight");
        assert_true((double)got <= last);
        if (k && (double)got == last) assert_true(r->ids[t * r->K + k] > r->ids[t * r->K + k - 1]);
        last = (double)got;
    }
    if (r->K < r->E && isfinite(high)) close_to((double)r->margin[t], low - high, 1e-5, 1e-6, "margin");
}

static void route_body(void) {
    static const int64_t sizes[][2] = {{1, 1}, {2, 1}, {8, 8}, {16, 4}, {31, 5}, {33, 33}, {60, 4}, {128, 8}, {255, 8},
                                       {256, 8}, {384, 8}, {512, 10}, {1000, 64}, {1024, 64}};
    for (size_t i = 0; i < EXC_COUNT(sizes); i++)
        for (int c = 0; c < 6; c++) {
            routing r = routing_make(67, sizes[i][0], sizes[i][1], c % 3, c & 1, c % 3 == 1);
            assert_int_equal(routing_run(&r, 2), EXC_OK);
            for (int64_t t = 0; t < r.T; t++) routing_check_token(&r, t);
            guarded(r.ids, (size_t)(r.T * r.K) * 4);
            guarded(r.weights, (size_t)(r.T * r.K) * 4);
            guarded(r.margin, (size_t)r.T * 4);
            routing_free(&r);
        }
}

static void route_selects_and_weighs(void **state) { at_every_level(route_body); }

static void groups_body(void) {
    for (int with_bias = 0; with_bias < 2; with_bias++) {
        routing r = routing_make(300, 256, 8, 1, 1, with_bias);
        for (int64_t e = 0; with_bias && e < 256; e++) r.bias[e] -= 0.9f; /* negative keys are kept before dropped ones */
        r.gate.groups = 8;
        r.gate.groups_kept = 3;
        r.gate.renorm_eps = 1e-20f;
        assert_int_equal(routing_run(&r, 2), EXC_OK);
        for (int64_t t = 0; t < r.T; t++) routing_check_token(&r, t);
        r.gate.groups_kept = 9;
        assert_int_equal(routing_run(&r, 1), EXC_ERR_USAGE);
        r.gate.groups = 7;
        assert_int_equal(routing_run(&r, 1), EXC_ERR_USAGE);
        routing_free(&r);
    }
}

static void route_limits_groups(void **state) { at_every_level(groups_body); }

static void ties_body(void) {
    routing r = routing_make(3, 40, 6, 0, 1, 0);
    for (int64_t e = 0; e < 40; e++) {
        r.logits[e] = 1;                                  /* all equal */
        r.logits[40 + e] = e % 2 ? 2 : e % 4 ? -0.0f : 0; /* odd ones, equal */
        r.logits[80 + e] = e == 39 ? 5 : e == 7 || e == 38 ? 4 : 0;
    }
    assert_int_equal(routing_run(&r, 1), EXC_OK);
    static const int32_t want[] = {0, 1, 2, 3, 4, 5, 1, 3, 5, 7, 9, 11, 39, 7, 38, 0, 1, 2};
    assert_memory_equal(r.ids, want, sizeof want);
    assert_true(r.margin[0] == 0 && r.margin[2] == 0);
    routing_free(&r);
}

static void route_ties_to_lower_id(void **state) { at_every_level(ties_body); }

static void nan_body(void) {
    for (int score = 0; score < 3; score++) {
        routing r = routing_make(2, 10, 4, score, 1, 0);
        for (int64_t e = 0; e < 20; e++) r.logits[e] = NAN;
        r.logits[9] = 1, r.logits[6] = 2;                                              /* two numbers: two NaN weights */
        r.logits[13] = 1, r.logits[15] = 2, r.logits[16] = 3, r.logits[17] = -INFINITY; /* four numbers: none */
        exc_queue *q = queue_of(1);
        uint64_t before = *q->nonfinite;
        assert_int_equal(routing_run(&r, 1), EXC_OK);
        static const int32_t want[] = {6, 9, 0, 1, 6, 5, 3, 7};
        assert_memory_equal(r.ids, want, sizeof want);
        assert_int_equal(*q->nonfinite - before, 8);
        for (int i = 0; i < 8; i++) assert_int_equal(isnan(r.weights[i]) != 0, i == 2 || i == 3);
        close_to((double)(r.weights[0] + r.weights[1]), score == 1 ? 2.5 : 1, 1e-6, 0, "sum of the numbers");
        routing_free(&r);
    }
}

/* NaN in the groups that are kept: a number of a dropped group is no way out */
static void nan_groups_body(void) {
    routing r = routing_make(2, 8, 4, 1, 1, 0);
    r.gate.groups = 4;
    r.gate.groups_kept = 2;
    for (int64_t e = 0; e < 16; e++) r.logits[e] = -1;
    r.logits[2] = 3, r.logits[3] = NAN, r.logits[4] = 2, r.logits[5] = NAN; /* groups of 0, 1 and 6, 7 are whole and kept */
    for (int64_t e = 8; e < 16; e++) r.logits[e] = e % 2 ? NAN : (float)e;  /* no group is whole: the first two are kept */
    uint64_t before = *queue_of(1)->nonfinite;
    assert_int_equal(routing_run(&r, 1), EXC_OK);
    static const int32_t want[] = {0, 1, 6, 7, 2, 0, 1, 3};
    assert_memory_equal(r.ids, want, sizeof want);
    assert_int_equal(*queue_of(1)->nonfinite - before, 4);
    for (int i = 0; i < 8; i++) assert_int_equal(isnan(r.weights[i]) != 0, i >= 6);
    assert_true(isinf(r.margin[0]));
    routing_free(&r);
}

static void route_nan_in_kept_groups(void **state) { at_every_level(nan_groups_body); }

static void route_nan_never_before_a_number(void **state) { at_every_level(nan_body); }

static void route_counts(void **state) {
    routing r = routing_make(500, 48, 6, 0, 1, 0);
    int32_t *slot = get(500 * 4);
    for (int t = 0; t < 500; t++) slot[t] = t % 5 == 3 ? -1 : t / 100;
    void *kept[3] = {0};
    for (int threads = 1; threads <= 3; threads++) {
        int64_t *count = calloc(48, 8), want[48] = {0};
        double *gate = calloc(48, 8), sum[48] = {0};
        uint32_t *by_prompt = calloc(5 * 100, 4);
        count[3] = 10; /* adds to what is there */
        struct exc_route_args a = {.logits = r.logits, .gate = &r.gate, .tokens = 500, .experts = 48, .top_k = 6, .ids = r.ids,
                                   .weights = r.weights, .slot = slot, .count = count, .gate_sum = gate,
                                   .prompt_count = by_prompt, .prompt_stride = 100};
        assert_int_equal(exc_cpu_route(queue_of(threads), &a), EXC_OK);
        want[3] = 10;
        for (int t = 0; t < 500; t++)
            for (int k = 0; k < 6 && slot[t] >= 0; k++) {
                want[r.ids[t * 6 + k]]++;
                sum[r.ids[t * 6 + k]] += (double)r.weights[t * 6 + k];
                by_prompt[slot[t] * 100 + r.ids[t * 6 + k]]--;
            }
        assert_memory_equal(count, want, sizeof want);
        assert_memory_equal(gate, sum, sizeof sum); /* token order: the same bits */
        for (int i = 0; i < 500; i++) assert_int_equal(by_prompt[i], 0);
        free(count), free(by_prompt);
        kept[threads - 1] = gate;
    }
    for (int i = 1; i < 3; i++) assert_memory_equal(kept[i], kept[0], 48 * 8);
    for (int i = 0; i < 3; i++) free(kept[i]);
    free(slot);
    routing_free(&r);
}

/* reproducible: gate sums of tokens in two calls, in either order, are those of one call */
static void route_gate_sums_of_any_split(void **state) {
    routing r = routing_make(500, 48, 6, 0, 1, 0);
    int32_t *slot = calloc(500, 4);
    double gate[3][48] = {{0}};
    exc_queue q = *queue_of(2);
    q.reproducible = 1;
    static const int64_t part[3][2][2] = {{{0, 500}, {0, 0}}, {{0, 77}, {77, 500}}, {{77, 500}, {0, 77}}};
    for (int i = 0; i < 6; i++) {
        const int64_t *span = part[i / 2][i % 2];
        struct exc_route_args a = {.logits = r.logits + span[0] * 48, .gate = &r.gate, .tokens = span[1] - span[0],
                                   .experts = 48, .top_k = 6, .ids = r.ids, .weights = r.weights, .slot = slot,
                                   .gate_sum = gate[i / 2]};
        assert_int_equal(exc_cpu_route(&q, &a), EXC_OK);
    }
    assert_memory_equal(gate[0], gate[1], sizeof gate[0]);
    assert_memory_equal(gate[0], gate[2], sizeof gate[0]);
    free(slot);
    routing_free(&r);
}

static void route_refuses(void **state) {
    routing r = routing_make(1, 8, 4, 0, 1, 0);
    r.K = 9;
    assert_int_equal(routing_run(&r, 1), EXC_ERR_USAGE);
    r.K = 65, r.E = 100;
    assert_int_equal(routing_run(&r, 1), EXC_ERR_USAGE);
    r.K = 4, r.E = 1025;
    assert_int_equal(routing_run(&r, 1), EXC_ERR_USAGE);
    r.E = 8, r.T = 0;
    assert_int_equal(routing_run(&r, 1), EXC_OK);
    r.gate.score = 3;
    assert_int_equal(routing_run(&r, 1), EXC_ERR_USAGE);
    routing_free(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(route_selects_and_weighs),
        cmocka_unit_test(route_limits_groups),
        cmocka_unit_test(route_ties_to_lower_id),
        cmocka_unit_test(route_nan_never_before_a_number),
        cmocka_unit_test(route_nan_in_kept_groups),
        cmocka_unit_test(route_counts),
        cmocka_unit_test(route_gate_sums_of_any_split),
        cmocka_unit_test(route_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
