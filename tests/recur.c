/* recur.c - ops with a state along the sequence: conv, delta and the gate behind them, against token-by-token f64 loops, at every
 * instruction level; sequences cut into calls anywhere, batches in any order and any number of threads give the same bits.
 *
 * Tolerances. Keys and queries have length 1, so a chunk's sums have terms below 1 and at most 32 + Dk of them: 2e-6 relative to
 * the norm of a head's outputs is several times what f32 chains of that length leave; states carry it on, damped by the decay. */
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

static exc_ctx *ctx_of(int threads) {
    static exc_ctx *open[9];
    if (!open[threads]) open[threads] = test_ctx(threads);
    return open[threads];
}

/* n floats of N(0, scale), then 16 that must stay */
static float *normals(int64_t n, uint64_t seed, float scale) {
    float *x = malloc((size_t)(n + 16) * 4);
    for (int64_t i = 0; i < n + 16; i++) x[i] = i < n ? scale * test_normal(seed, (uint64_t)i) : 12345.0f;
    return x;
}

static void guarded(const float *x, int64_t n) {
    for (int64_t i = n; i < n + 16; i++) assert_true(x[i] == 12345.0f);
}

static double far(const float *got, const double *want, int64_t n) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) diff += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
    return norm > 0 ? sqrt(diff / norm) : diff;
}

/* How sequences of `lengths` are fed: in calls of at most `piece` tokens of each, or of one in a call (piece 0: whole). The rows of a
 * call follow each other sequence by sequence; `order` turns their order round. */
typedef struct feed {
    int64_t sequences;
    const int64_t *lengths;
    int64_t piece;
    int backwards;
    int64_t done[8];           /* tokens fed */
    int64_t begin[9], length[8];
    int32_t slot[8], which[8]; /* of the call's sequences */
    int64_t n;                 /* sequences of the call */
} feed;

static int next_call(feed *f) {
    f->n = 0;
    f->begin[0] = 0;
    for (int64_t k = 0; k < f->sequences; k++) {
        int64_t s = f->backwards ? f->sequences - 1 - k : k, left = f->lengths[s] - f->done[s];
        int64_t take = f->piece && left > f->piece ? f->piece : left;
        if (!take) continue;
        f->which[f->n] = (int32_t)s;
        f->slot[f->n] = (int32_t)(f->sequences - 1 - s); /* slots in another order than sequences */
        f->done[s] += take;
        f->length[f->n] = f->done[s];
        f->begin[f->n + 1] = f->begin[f->n] + take;
        f->n++;
    }
    return f->n > 0;
}

/* rows of a call out of (or back into) arrays that hold all sequences one after the other */
static void rows_of(const feed *f, const float *all, int64_t width, float *call, int back) {
    int64_t start[9] = {0};
    for (int64_t s = 0; s < f->sequences; s++) start[s + 1] = start[s] + f->lengths[s];
    for (int64_t i = 0; i < f->n; i++) {
        int64_t n = f->begin[i + 1] - f->begin[i], at = start[f->which[i]] + f->length[i] - n;
        float *a = (float *)(uintptr_t)all + at * width, *b = call + f->begin[i] * width;
        memcpy(back ? a : b, back ? b : a, (size_t)(n * width) * 4);
    }
}

/* ------------------------------------------------------------------------------------------------------------ conv */

static float *run_conv(exc_ctx *ctx, feed f, int64_t channels, int64_t taps, const float *x, const float *w, int64_t total) {
    int64_t ring = (taps - 1) * channels, stride = channels + 3;
    float *y = normals(total * channels, 1, 0), *state = normals((ring + 5) * f.sequences, 9, 1e30f);
    float *xs = malloc((size_t)(total * stride) * 4 + 4), *ys = malloc((size_t)(total * stride) * 4 + 4), *part = malloc((size_t)(total * channels) * 4 + 4);
    while (next_call(&f)) {
        int64_t rows = f.begin[f.n];
        rows_of(&f, x, channels, part, 0);
        for (int64_t r = 0; r < rows; r++) memcpy(xs + r * stride, part + r * channels, (size_t)channels * 4);
        struct exc_conv_args a = {.x = xs, .x_stride = stride, .weight = w, .taps = taps, .channels = channels, .begin = f.begin,
                                  .length = f.length, .slot = f.slot, .sequences = f.n, .tokens = rows, .state = state, .state_stride = ring + 5,
                                  .y = ys, .y_stride = stride};
        assert_int_equal(ctx->ops->conv(&ctx->queue, &a), EXC_OK);
        for (int64_t r = 0; r < rows; r++) memcpy(part + r * channels, ys + r * stride, (size_t)channels * 4);
        rows_of(&f, y, channels, part, 1);
    }
    guarded(state, (ring + 5) * f.sequences);
    guarded(y, total * channels);
    free(state);
    free(xs);
    free(ys);
    free(part);
    return y;
}

static void conv_body(void) {
    static const int64_t shapes[][2] = {{1, 4}, {33, 1}, {127, 4}, {1030, 3}, {16, 2}};
    static const int64_t lengths[] = {1, 31, 2, 7};
    for (size_t k = 0; k < 5; k++) {
        int64_t channels = shapes[k][0], taps = shapes[k][1], total = 41;
        float *x = normals(total * channels, k, 1), *w = normals(taps * channels, k + 50, 0.7f);
        double *want = malloc((size_t)(total * channels) * sizeof *want);
        for (int64_t s = 0, at = 0; s < 4; at += lengths[s++])
            for (int64_t t = 0; t < lengths[s]; t++)
                for (int64_t c = 0; c < channels; c++) {
                    double sum = 0;
                    for (int64_t j = 0; j < taps; j++)
                        if (t - (taps - 1) + j >= 0) sum += (double)w[j * channels + c] * (double)x[(at + t - (taps - 1) + j) * channels + c];
                    want[(at + t) * channels + c] = sum / (1 + exp(-sum));
                }
        float *whole = run_conv(ctx_of(1), (feed){.sequences = 4, .lengths = lengths}, channels, taps, x, w, total);
        assert_true(far(whole, want, total * channels) < 3e-7);
        for (int64_t piece = 1; piece < 9; piece += 2) {
            float *cut = run_conv(ctx_of(3), (feed){.sequences = 4, .lengths = lengths, .piece = piece, .backwards = piece & 2}, channels, taps, x, w, total);
            assert_memory_equal(cut, whole, (size_t)(total * channels) * 4);
            free(cut);
        }
        free(x);
        free(w);
        free(want);
        free(whole);
    }
}

static void test_conv(void **state) {
    at_every_level(conv_body);
    struct exc_conv_args none = {.channels = 3, .taps = 4}, bad = {.channels = 0, .taps = 4};
    assert_int_equal(ctx_of(1)->ops->conv(&ctx_of(1)->queue, &none), EXC_OK);
    assert_int_equal(ctx_of(1)->ops->conv(&ctx_of(1)->queue, &bad), EXC_ERR_USAGE);
}

/* ----------------------------------------------------------------------------------------------------------- delta */

typedef struct shape {
    int64_t k_heads, v_heads, k_dim, v_dim;
    float rate; /* of a_log: how fast states are forgotten */
} shape;

/* a row: q | k | v | beta | step */
static int64_t width_of(const shape *s) { return 2 * s->k_heads * s->k_dim + s->v_heads * (s->v_dim + 2); }

static float *run_delta(exc_ctx *ctx, feed f, const shape *s, const float *x, const float *a_log, const float *bias, int64_t total) {
    int64_t W = width_of(s), out = s->v_heads * s->v_dim, stride = (int64_t)exc_delta_floats(s->k_heads, s->v_heads, s->k_dim, s->v_dim) + 2;
    float *y = normals(total * out, 1, 0), *state = normals(stride * f.sequences, 9, 1e30f), *part = malloc((size_t)(total * W) * 4 + 4),
          *got = normals(total * out, 1, 0);
    for (int64_t i = 0; i < stride * f.sequences; i++) state[i] = NAN; /* what a new sequence finds must not matter */
    while (next_call(&f)) {
        rows_of(&f, x, W, part, 0);
        const float *q = part, *k = q + s->k_heads * s->k_dim, *v = k + s->k_heads * s->k_dim, *beta = v + s->v_heads * s->v_dim;
        struct exc_delta_args a = {.q = q, .k = k, .v = v, .stride = W, .beta = beta, .step = beta + s->v_heads, .gate_stride = W,
                                   .a_log = a_log, .dt_bias = bias, .begin = f.begin, .length = f.length, .slot = f.slot,
                                   .sequences = f.n, .tokens = f.begin[f.n], .k_heads = s->k_heads, .v_heads = s->v_heads, .k_dim = s->k_dim, .v_dim = s->v_dim,
                                   .state = state, .state_stride = stride, .out = got};
        assert_int_equal(ctx->ops->delta(&ctx->queue, &a), EXC_OK);
        guarded(got, total * out);
        rows_of(&f, y, out, got, 1);
    }
    guarded(state, stride * f.sequences);
    guarded(y, total * out);
    free(state);
    free(part);
    free(got);
    return y;
}

/* one sequence, token by token, by the rule itself */
static void recurrence(const shape *s, const float *x, int64_t T, const float *a_log, const float *bias, double *out) {
    int64_t W = width_of(s), D = s->k_dim, N = s->v_dim;
    double *S = malloc((size_t)(D * N) * sizeof *S), *q = malloc((size_t)D * sizeof *q), *k = malloc((size_t)D * sizeof *k);
    for (int64_t h = 0; h < s->v_heads; h++) {
        int64_t g = h / (s->v_heads / s->k_heads);
        memset(S, 0, (size_t)(D * N) * sizeof *S);
        for (int64_t t = 0; t < T; t++) {
            const float *row = x + t * W, *v = row + 2 * s->k_heads * D + h * N, *gates = row + 2 * s->k_heads * D + s->v_heads * N;
            double qq = 0, kk = 0;
            for (int64_t d = 0; d < D; d++) {
                q[d] = (double)row[g * D + d];
                k[d] = (double)row[(s->k_heads + g) * D + d];
                qq += q[d] * q[d];
                kk += k[d] * k[d];
            }
            for (int64_t d = 0; d < D; d++) q[d] /= sqrt(qq + 1e-6) * sqrt((double)D), k[d] /= sqrt(kk + 1e-6);
            double beta = 1 / (1 + exp(-(double)gates[h])), step = (double)gates[s->v_heads + h] + (double)bias[h];
            double decay = exp(-exp((double)a_log[h]) * (step > 30 ? step : log1p(exp(step))));
            for (int64_t n = 0; n < N; n++) {
                double seen = 0, o = 0;
                for (int64_t d = 0; d < D; d++) seen += decay * S[d * N + n] * k[d];
                double correction = beta * ((double)v[n] - seen);
                for (int64_t d = 0; d < D; d++) {
                    S[d * N + n] = decay * S[d * N + n] + k[d] * correction;
                    o += S[d * N + n] * q[d];
                }
                out[(t * s->v_heads + h) * N + n] = o;
            }
        }
    }
    free(S);
    free(q);
    free(k);
}

static void delta_shape(const shape *s, uint64_t seed) {
    static const int64_t lengths[] = {127, 1, 33, 64};
    int64_t W = width_of(s), out = s->v_heads * s->v_dim, total = 225;
    float *x = normals(total * W, seed, 1), *a_log = normals(s->v_heads, seed + 1, 1), *bias = normals(s->v_heads, seed + 2, 1);
    for (int64_t h = 0; h < s->v_heads; h++) a_log[h] += s->rate;
    double *want = malloc((size_t)(total * out) * sizeof *want);
    for (int64_t i = 0, at = 0; i < 4; at += lengths[i++]) recurrence(s, x + at * W, lengths[i], a_log, bias, want + at * out);
    float *whole = run_delta(ctx_of(1), (feed){.sequences = 4, .lengths = lengths}, s, x, a_log, bias, total);
    double error = far(whole, want, total * out);
    if (!(error < 2e-6)) fail_msg("%lld key heads of %lld, %lld value heads of %lld: %.1e", (long long)s->k_heads, (long long)s->k_dim, (long long)s->v_heads, (long long)s->v_dim, error);
    static const int64_t pieces[] = {1, 2, 31, 33, 50};
    for (size_t i = 0; i < 5; i++) {
        float *cut = run_delta(ctx_of(3), (feed){.sequences = 4, .lengths = lengths, .piece = pieces[i], .backwards = i & 1}, s, x, a_log, bias, total);
        assert_memory_equal(cut, whole, (size_t)(total * out) * 4);
        free(cut);
    }
    free(x);
    free(a_log);
    free(bias);
    free(want);
    free(whole);
}

static void delta_body(void) {
    static const shape shapes[] = {{1, 1, 1, 1, 0}, {2, 4, 16, 16, -1}, {1, 3, 7, 33, -3}, {3, 3, 31, 5, 2}, {1, 2, 128, 128, -2}, {2, 2, 20, 70, 4}};
    for (size_t i = 0; i < EXC_COUNT(shapes); i++) delta_shape(&shapes[i], 100 * i);
}

static void test_delta(void **state) {
    at_every_level(delta_body);
    struct exc_delta_args none = {.k_heads = 1, .v_heads = 1, .k_dim = 1, .v_dim = 1}, bad = {.k_heads = 2, .v_heads = 3, .k_dim = 1, .v_dim = 1};
    assert_int_equal(ctx_of(1)->ops->delta(&ctx_of(1)->queue, &none), EXC_OK);
    assert_int_equal(ctx_of(1)->ops->delta(&ctx_of(1)->queue, &bad), EXC_ERR_USAGE);
}

/* gates far outside: nothing is kept, or everything; a NaN stays in its sequence and head */
static void test_delta_extremes(void **state) {
    const shape s = {1, 2, 8, 8, 0};
    const int64_t lengths[] = {40, 40}, W = width_of(&s), out = 16;
    float *x = normals(80 * W, 3, 1), a_log[] = {0, 0}, bias[] = {0, 0};
    double *want = malloc(80 * 16 * sizeof *want);
    for (int64_t t = 0; t < 80; t++) {
        float *gates = x + t * W + 16 + 16;
        gates[0] = t % 3 ? 500 : -500; /* beta */
        gates[1] = -500;
        gates[2] = t % 5 ? -500 : 500; /* step: nothing forgotten, or all */
        gates[3] = -90;
    }
    for (int i = 0; i < 2; i++) recurrence(&s, x + i * 40 * W, 40, a_log, bias, want + i * 40 * out);
    float *got = run_delta(ctx_of(2), (feed){.sequences = 2, .lengths = lengths, .piece = 7}, &s, x, a_log, bias, 80);
    assert_true(far(got, want, 80 * out) < 2e-6);
    free(got);
    x[(40 + 10) * W + 16 + 9] = NAN; /* second sequence, tenth token, value head 1 */
    got = run_delta(ctx_of(2), (feed){.sequences = 2, .lengths = lengths}, &s, x, a_log, bias, 80);
    for (int64_t t = 0; t < 80; t++)
        for (int64_t c = 0; c < out; c++) {
            if (t >= 50 && c == 9) assert_true(isnan(got[t * out + c]));
            else assert_false(isnan(got[t * out + c]));
        }
    free(got);
    free(x);
    free(want);
}

/* ------------------------------------------------------------------------------------------------------------ gate */

static void gate_body(void) {
    static const int64_t dims[] = {1, 31, 33, 127};
    for (int k = 0; k < 4 * 2 * 2 * 2 * 2; k++) {
        int64_t D = dims[k % 4], heads = 3, T = 9, n = T * heads * D, stride = heads * D + 5;
        int silu = k / 4 % 2, norm = k / 8 % 2, from = k / 16 % 2 ? EXC_BF16 : EXC_F32, act = k / 32 % 2 ? EXC_BF16 : EXC_F32;
        float *x = normals(n, 1, 2), *g = normals(T * stride, 2, 4), *w = normals(D, 3, 1), *y = normals(n, 4, 0), *z = normals(n, 4, 0);
        uint16_t *half = malloc((size_t)n * 2);
        for (int64_t i = 0; i < n; i++) {
            half[i] = test_bf16(x[i]);
            if (from == EXC_BF16) x[i] = test_from_bf16(half[i]);
        }
        struct exc_gate_args a = {.x = from == EXC_F32 ? (void *)x : (void *)half, .x_dtype = from, .g = g, .g_stride = stride, .silu = silu,
                                  .weight = norm ? w : NULL, .eps = 1e-5f, .tokens = T, .heads = heads, .dim = D, .y = y, .act = act};
        exc_ctx *one = ctx_of(1), *three = ctx_of(3);
        assert_int_equal(one->ops->gate(&one->queue, &a), EXC_OK);
        guarded(y, n);
        a.y = z;
        assert_int_equal(three->ops->gate(&three->queue, &a), EXC_OK);
        assert_memory_equal(y, z, (size_t)n * (act == EXC_F32 ? 4 : 2));
        for (int64_t r = 0; r < T * heads; r++) {
            double sum = 0;
            for (int64_t d = 0; d < D; d++) sum += (double)x[r * D + d] * (double)x[r * D + d];
            for (int64_t d = 0; d < D; d++) {
                double v = (double)x[r * D + d], gate = (double)g[r / heads * stride + r % heads * D + d];
                if (norm) v *= (double)w[d] / sqrt(sum / (double)D + 1e-5);
                v *= (silu ? gate : 1) / (1 + exp(-gate));
                double got = act == EXC_F32 ? (double)y[r * D + d] : (double)test_from_bf16(((uint16_t *)y)[r * D + d]);
                assert_true(fabs(got - v) <= (act == EXC_F32 ? 2e-6 : 0x1p-8) * fabs(v) + 1e-30);
            }
        }
        if (from == act) {
            a.y = (void *)(uintptr_t)a.x; /* in place */
            assert_int_equal(one->ops->gate(&one->queue, &a), EXC_OK);
            assert_memory_equal(a.y, z, (size_t)n * (act == EXC_F32 ? 4 : 2));
        }
        free(x);
        free(g);
        free(w);
        free(y);
        free(z);
        free(half);
    }
}

static void test_gate(void **state) { at_every_level(gate_body); }

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_conv), cmocka_unit_test(test_delta), cmocka_unit_test(test_delta_extremes), cmocka_unit_test(test_gate)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
