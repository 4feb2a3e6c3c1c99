/* selection.c - the .cu twins of attend and route against their CPU definitions, which sequence.c checks against f64.
 *
 * attend: ragged batches of prefill, continued prefill and decode, grouped heads, windows, sinks, widths of keys and values apart,
 * spans in one block and in many. route: every gate, ties, NaN and infinities, groups, up to 1024 experts; ids exactly. */
#include "twin.h"

#include <math.h>

/* -------------------------------------------------------------------------------------------------------------- attend */

typedef struct batch { int64_t n, new_tokens[6], length[6]; } batch;

static void attend_case(const batch *b, int64_t Q, int64_t KV, int64_t D, int64_t V, int64_t window, bool sinks, int act, bool shared) {
    size_t as = act == EXC_F32 ? 4 : 2;
    int64_t q_begin[7] = {0}, cache_begin[6], rows = 3, longest = 0, ks = KV * D + (shared ? 0 : 5), vs = shared ? ks : KV * V;
    for (int64_t s = 0; s < b->n; s++) {
        q_begin[s + 1] = q_begin[s] + b->new_tokens[s];
        cache_begin[s] = rows;
        rows += b->length[s] + 2;
        longest = b->length[s] > longest ? b->length[s] : longest;
    }
    int64_t T = q_begin[b->n];
    size_t nq = (size_t)(T * Q * D), nk = (size_t)(rows * ks), nv = (size_t)(rows * vs), no = (size_t)(T * Q * V);
    void *q = twin_acts(nq, 1, 1, act), *k = twin_acts(nk, 2, 1, act), *v = twin_acts(nv, 3, 1, act), *want = calloc(no + 1, 4), *got = calloc(no + 1, 4);
    float *sink = twin_normals((size_t)Q, 4, 2);
    if (Q > 1) sink[1] = -INFINITY;
    struct exc_attend_args a = {.q = q, .cache_k = k, .key_stride = ks, .cache_v = shared ? k : v, .value_stride = vs, .q_begin = q_begin,
                                .cache_begin = cache_begin, .length = b->length, .sequences = b->n, .q_heads = Q, .kv_heads = KV, .head_dim = D,
                                .value_dim = V, .scale = 1 / sqrtf((float)D), .window = window, .sinks = sinks ? sink : NULL, .out = want,
                                .act = act, .tokens = T, .longest = longest, .ring = (window + 63) / 64 * 64}, g = a; /* some keys go round */
    g.q = twin_up(q, nq * as);
    g.cache_k = twin_up(k, nk * as);
    g.cache_v = shared ? g.cache_k : twin_up(v, nv * as);
    g.q_begin = twin_up(q_begin, sizeof q_begin);
    g.cache_begin = twin_up(cache_begin, sizeof cache_begin);
    g.length = twin_up(b->length, sizeof b->length);
    g.sinks = sinks ? twin_up(sink, (size_t)Q * 4) : NULL;
    g.out = twin_up(want, no * as);
    assert_int_equal(exc_cpu_attend(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(attend, &g);
    twin_down(got, g.out, no * as);
    /* softmax weights to a few ulp of exp (2e-7 each here and there), sums of up to `longest` of them in other orders */
    if (act == EXC_F32) twin_close_f32(got, want, no, 2e-5, 4e-6, "attend");
    else twin_close_bf16(got, want, no, 128, 20, "attend"); /* what cancels to nearly nothing differs by many of its small ulp */
    twin_done();
    free(q), free(k), free(v), free(want), free(got), free(sink);
}

static void attend_all(void **state) {
    static const batch some[] = {{1, {1}, {1}}, {2, {5, 1}, {5, 40}}, {4, {17, 3, 1, 33}, {17, 70, 65, 33}}, {0, {0}, {0}}, {3, {0, 2, 1}, {7, 2, 64}}};
    for (int act = 0; act < 2; act++)
        for (size_t i = 0; i < EXC_COUNT(some); i++) {
            int a = act ? EXC_BF16 : EXC_F32;
            if (twin_small() && i == 2) continue;
            attend_case(&some[i], 4, 2, 16, 16, 0, false, a, false);
            attend_case(&some[i], 3, 3, 31, 17, 0, true, a, false);
            attend_case(&some[i], 20, 1, 24, 16, 0, false, a, true); /* values are the first channels of the keys, more heads than a unit */
            attend_case(&some[i], 2, 1, 64, 128, 4, true, a, false);
        }
}

/* caches of several spans: in blocks of their own, and one after the other, with the same bits */
static void attend_spans(void **state) {
    static const batch lone = {1, {1}, {2500}}, window = {2, {3, 1}, {1100, 2100}};
    for (int act = 0; act < (twin_small() ? 1 : 2); act++) {
        attend_case(&lone, 2, 1, 16, 16, 0, true, act ? EXC_BF16 : EXC_F32, false);
        attend_case(&window, 2, 1, 16, 16, 1030, false, act ? EXC_BF16 : EXC_F32, false);
    }
    enum { N = 1040, D = 16, MANY = 600 }; /* a window of 40 keys that lies in two spans */
    float *q = twin_normals(D, 1, 1), *k = twin_normals(N * D, 2, 1), *v = twin_normals(N * D, 3, 1), *all = malloc(MANY * D * 4), *same = malloc(MANY * D * 4);
    for (int i = 0; i < MANY; i++) memcpy(all + i * D, q, D * 4);
    int64_t begin[MANY + 1], at[MANY] = {0}, length[MANY];
    for (int i = 0; i <= MANY; i++) begin[i] = i;
    for (int i = 0; i < MANY; i++) length[i] = N;
    struct exc_attend_args g = {.q = twin_up(all, MANY * D * 4), .cache_k = twin_up(k, N * D * 4), .key_stride = D, .cache_v = twin_up(v, N * D * 4),
                                .value_stride = D, .q_begin = twin_up(begin, sizeof begin), .cache_begin = twin_up(at, sizeof at),
                                .length = twin_up(length, sizeof length), .q_heads = 1, .kv_heads = 1, .head_dim = D, .value_dim = D, .scale = 0.25f, .window = 40,
                                .out = twin_up(all, MANY * D * 4), .act = EXC_F32, .longest = N};
    float one[D];
    g.sequences = g.tokens = 1; /* spans apart */
    TWIN_RUN(attend, &g);
    twin_down(one, g.out, sizeof one);
    g.sequences = g.tokens = MANY; /* spans in one block */
    TWIN_RUN(attend, &g);
    twin_down(same, g.out, MANY * D * 4);
    for (int i = 0; i < MANY; i += 199) assert_memory_equal(same + i * D, one, sizeof one);
    twin_done();
    free(q), free(k), free(v), free(all), free(same);
}

/* --------------------------------------------------------------------------------------------------------------- route */

static void route_case(int64_t T, int64_t E, int64_t K, exc_gate gate, bool biased, int kind, int reproducible) {
    size_t n = (size_t)(T * E), nk = (size_t)(T * K);
    enum { P = 3 };
    float *x = twin_normals(n, (uint64_t)E + 1, 2), *bias = twin_normals((size_t)E, 5, 0.3f), *w[2], *margin[2];
    int32_t *id[2], slot[128];
    int64_t *count[2];
    double *sum[2];
    uint32_t *prompts[2];
    uint64_t bad[2] = {0, 0};
    for (size_t i = 0; i < n; i++) {
        uint64_t u = exc_random_u64(9, 9, i);
        if (kind == 1) x[i] = (float)(u % 3);                /* ties */
        if (kind == 2 && u % 7 == 0) x[i] = NAN;
        if (kind == 2 && u % 11 == 0) x[i] = -INFINITY;
        if (kind == 3 && i / (size_t)E % 2) x[i] = u % (uint64_t)E < (uint64_t)K ? x[i] : NAN; /* hardly enough numbers */
    }
    for (int t = 0; t < 128; t++) slot[t] = t % 4 == 3 ? -1 : t % P;
    for (int b = 0; b < 2; b++) {
        w[b] = calloc(nk + 1, 4), id[b] = calloc(nk + 1, 4), margin[b] = calloc((size_t)T + 1, 4), count[b] = calloc((size_t)E, 8);
        sum[b] = calloc((size_t)E, 8), prompts[b] = calloc((size_t)(P * E), 4);
    }
    twin.cpu->queue.reproducible = twin.gpu->queue.reproducible = reproducible;
    uint64_t *was = twin.cpu->queue.nonfinite, *there = twin.gpu->queue.nonfinite;
    twin.cpu->queue.nonfinite = &bad[0];
    twin.gpu->queue.nonfinite = twin_up(&bad[1], 8);
    struct exc_route_args a = {x, biased ? bias : NULL, &gate, T, E, K, id[0], w[0], margin[0], slot, count[0], sum[0], prompts[0], E}, g = a;
    g.logits = twin_up(x, n * 4);
    g.bias = biased ? twin_up(bias, (size_t)E * 4) : NULL;
    g.ids = twin_up(id[1], nk * 4);
    g.weights = twin_up(w[1], nk * 4);
    g.margin = twin_up(margin[1], (size_t)T * 4);
    g.slot = twin_up(slot, sizeof slot);
    g.count = twin_up(count[1], (size_t)E * 8);
    g.gate_sum = twin_up(sum[1], (size_t)E * 8);
    g.prompt_count = twin_up(prompts[1], (size_t)(P * E) * 4);
    assert_int_equal(exc_cpu_route(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(route, &g);
    twin_down(id[1], g.ids, nk * 4);
    twin_down(w[1], g.weights, nk * 4);
    twin_down(margin[1], g.margin, (size_t)T * 4);
    twin_down(count[1], g.count, (size_t)E * 8);
    twin_down(sum[1], g.gate_sum, (size_t)E * 8);
    twin_down(prompts[1], g.prompt_count, (size_t)(P * E) * 4);
    twin_down(&bad[1], twin.gpu->queue.nonfinite, 8);
    assert_memory_equal(id[1], id[0], nk * 4);
    assert_memory_equal(count[1], count[0], (size_t)E * 8);
    assert_memory_equal(prompts[1], prompts[0], (size_t)(P * E) * 4);
    assert_int_equal(bad[1], bad[0]);
    twin_close_f32(w[1], w[0], nk, 4e-6, 1e-9, "weights"); /* sums of up to 1024 exponentials in another order */
    twin_close_f32(margin[1], margin[0], (size_t)T, 1e-4, 4e-6, "margin");
    for (int64_t e = 0; e < E; e++)
        if (!(fabs(sum[1][e] - sum[0][e]) <= 4e-6 * fabs(sum[0][e]) + 1e-9) && sum[0][e] == sum[0][e]) fail_msg("gate_sum[%d] = %.9g, want %.9g", (int)e, sum[1][e], sum[0][e]);
    twin.cpu->queue.nonfinite = was;
    twin.gpu->queue.nonfinite = there;
    twin.cpu->queue.reproducible = twin.gpu->queue.reproducible = 0;
    twin_done();
    for (int b = 0; b < 2; b++) free(w[b]), free(id[b]), free(margin[b]), free(count[b]), free(sum[b]), free(prompts[b]);
    free(x), free(bias);
}

static void route_all(void **state) {
    static const int64_t shapes[][3] = {{1, 1, 1}, {5, 8, 2}, {33, 60, 4}, {17, 128, 8}, {9, 256, 8}, {6, 384, 22}, {5, 1024, 64}, {0, 8, 2}};
    for (size_t i = 0; i < EXC_COUNT(shapes); i++)
        for (int score = 0; score < 3; score++)
            for (int kind = 0; kind < 4; kind++) {
                if (twin_small() && shapes[i][1] > 128) continue;
                exc_gate gate = {.size = sizeof gate, .score = score, .renorm = kind % 2, .renorm_eps = 1e-20f, .scale = kind == 2 ? 2.5f : 0};
                route_case(shapes[i][0], shapes[i][1], shapes[i][2], gate, score == 1, kind, kind == 2);
            }
    for (int kind = 0; kind < 4; kind++) {
        exc_gate gate = {.size = sizeof gate, .score = 1, .renorm = 1, .renorm_eps = 1e-20f, .scale = 2.5f, .groups = 8, .groups_kept = 4};
        route_case(13, 64, 8, gate, true, kind, kind % 2);
        gate.groups = 64, gate.groups_kept = 9; /* groups of one */
        route_case(13, 64, 8, gate, false, kind, 0);
    }
}

static void refusals(void **state) {
    exc_gate gate = {.size = sizeof gate, .groups = 3, .groups_kept = 1};
    assert_int_equal(TWIN_STATUS(route, (&(struct exc_route_args){.gate = &gate, .tokens = 1, .experts = 8, .top_k = 2})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(route, (&(struct exc_route_args){.gate = &gate, .tokens = 1, .experts = 2000, .top_k = 2})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(attend, (&(struct exc_attend_args){.sequences = 1, .q_heads = 3, .kv_heads = 2})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(attend, (&(struct exc_attend_args){.q_heads = 2, .kv_heads = 2, .head_dim = 4, .value_dim = 4, .window = -1})), EXC_ERR_USAGE);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(attend_all), cmocka_unit_test(attend_spans), cmocka_unit_test(route_all), cmocka_unit_test(refusals)};
    return cmocka_run_group_tests(tests, twin_open, twin_close);
}
