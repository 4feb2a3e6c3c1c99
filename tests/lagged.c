/* lagged.c - the .cu twins of the ops with a state along the sequence (conv, delta, gate) against their CPU definitions, which
 * recur.c checks against f64: sequences fed in pieces of several sizes, state handed from call to call on the device; wherever
 * a sequence is cut, the device gives the same bits. */
#include "twin.h"

#include <math.h>

static double far(const float *got, const float *want, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - (double)want[i];
        diff += d * d;
        norm += (double)want[i] * (double)want[i];
    }
    return norm > 0 ? sqrt(diff / norm) : diff;
}

/* two sequences: a call takes `piece` tokens of each, or what is left (0: all); slots in turned order */
enum { S = 2 };
typedef struct feed {
    const int64_t *lengths;
    int64_t piece, done[S], begin[S + 1], length[S], from[S], n;
    int32_t slot[S], which[S];
} feed;

static int next_call(feed *f) {
    f->n = 0;
    f->begin[0] = 0;
    for (int s = 0; s < S; s++) {
        int64_t left = f->lengths[s] - f->done[s], take = f->piece && left > f->piece ? f->piece : left;
        if (!take) continue;
        f->from[f->n] = f->done[s];
        f->which[f->n] = s;
        f->slot[f->n] = S - 1 - s;
        f->length[f->n] = f->done[s] += take;
        f->begin[f->n + 1] = f->begin[f->n] + take;
        f->n++;
    }
    return f->n > 0;
}

/* rows of the call out of [sequence][token] or back */
static void rows_of(const feed *f, float *all, size_t width, float *call, int back) {
    for (int64_t i = 0; i < f->n; i++) {
        size_t n = (size_t)(f->begin[i + 1] - f->begin[i]), at = (size_t)((f->which[i] ? f->lengths[0] : 0) + f->from[i]);
        float *a = all + at * width, *b = call + (size_t)f->begin[i] * width;
        memcpy(back ? a : b, back ? b : a, n * width * 4);
    }
}

/* ------------------------------------------------------------------------------------------------------------ conv */

static void feed_conv(float *y, float *x, const float *w, int64_t channels, int64_t taps, const int64_t *lengths, int64_t piece, int device) {
    size_t ring = (size_t)(S * ((taps - 1) * channels + 1)), total = (size_t)(lengths[0] + lengths[1]), row = (size_t)channels * 4;
    float *state = twin_normals(ring, 8, 1e30f), *part = malloc(total * row), *got = malloc(total * row);
    float *on = device ? twin_up(state, ring * 4) : state;
    for (feed f = {.lengths = lengths, .piece = piece}; next_call(&f);) {
        rows_of(&f, x, (size_t)channels, part, 0);
        size_t rows = (size_t)f.begin[f.n];
        struct exc_conv_args a = {.x = part, .x_stride = channels, .weight = w, .taps = taps, .channels = channels, .begin = f.begin,
                                  .length = f.length, .slot = f.slot, .sequences = f.n, .tokens = (int64_t)rows, .state = on,
                                  .state_stride = (taps - 1) * channels + 1, .y = got, .y_stride = channels};
        if (device) {
            a.x = twin_up(part, rows * row), a.weight = twin_up(w, (size_t)taps * row), a.y = twin_up(got, rows * row);
            a.begin = twin_up(f.begin, sizeof f.begin), a.length = twin_up(f.length, sizeof f.length), a.slot = twin_up(f.slot, sizeof f.slot);
            TWIN_RUN(conv, &a);
            twin_down(got, a.y, rows * row);
        } else {
            assert_int_equal(exc_cpu_conv(&twin.cpu->queue, &a), EXC_OK);
        }
        rows_of(&f, y, (size_t)channels, got, 1);
    }
    if (device) twin_done();
    free(state), free(part), free(got);
}

static void conv_twin(void **state) {
    static const int64_t shapes[][2] = {{33, 4}, {300, 4}, {1, 1}, {257, 2}}, lengths[] = {37, 6};
    for (size_t k = 0; k < EXC_COUNT(shapes); k++) {
        if (twin_small() && k != 0) continue;
        int64_t channels = shapes[k][0], taps = shapes[k][1];
        size_t n = (size_t)(43 * channels);
        float *x = twin_normals(n, k, 1), *w = twin_normals((size_t)(taps * channels), 70 + k, 0.7f), *want = twin_normals(n, 0, 0), *got = twin_normals(n, 0, 0), *cut = twin_normals(n, 0, 0);
        feed_conv(want, x, w, channels, taps, lengths, 0, 0);
        feed_conv(got, x, w, channels, taps, lengths, 0, 1);
        twin_close_f32(got, want, n, 1e-6, 1e-7, "conv"); /* the same sums; another exponential */
        feed_conv(cut, x, w, channels, taps, lengths, 3, 1);
        assert_memory_equal(cut, got, n * 4);
        free(x), free(w), free(want), free(got), free(cut);
    }
}

/* ----------------------------------------------------------------------------------------------------------- delta */

typedef struct rule {
    int64_t k_heads, v_heads, k_dim, v_dim;
} rule;

static void feed_delta(float *y, float *x, const float *logs, const rule *r, const int64_t *lengths, int64_t piece, int device) {
    size_t width = (size_t)(2 * r->k_heads * r->k_dim + r->v_heads * (r->v_dim + 2)), out = (size_t)(r->v_heads * r->v_dim),
           each = exc_delta_floats(r->k_heads, r->v_heads, r->k_dim, r->v_dim) + 2, total = (size_t)(lengths[0] + lengths[1]);
    float *state = malloc(S * each * 4), *part = malloc(total * width * 4), *got = malloc(total * out * 4);
    for (size_t i = 0; i < S * each; i++) state[i] = NAN;
    float *on = device ? twin_up(state, S * each * 4) : state;
    const float *gone = device ? twin_up(logs, (size_t)(2 * r->v_heads) * 4) : logs, *base = device ? twin_up(part, total * width * 4) : part,
                *k = base + r->k_heads * r->k_dim, *v = k + r->k_heads * r->k_dim, *gates = v + r->v_heads * r->v_dim;
    feed f = {.lengths = lengths, .piece = piece}, *ids = device ? twin_up(&f, sizeof f) : &f;
    struct exc_delta_args a = {.q = base, .k = k, .v = v, .stride = (int64_t)width, .beta = gates, .step = gates + r->v_heads,
                               .gate_stride = (int64_t)width, .a_log = gone, .dt_bias = gone + r->v_heads, .begin = ids->begin,
                               .length = ids->length, .slot = ids->slot, .k_heads = r->k_heads, .v_heads = r->v_heads, .k_dim = r->k_dim,
                               .v_dim = r->v_dim, .state = on, .state_stride = (int64_t)each, .out = device ? twin_up(got, total * out * 4) : got};
    while (next_call(&f)) {
        rows_of(&f, x, width, part, 0);
        a.sequences = f.n;
        a.tokens = f.begin[f.n];
        size_t bytes = (size_t)a.tokens * out * 4;
        if (device) {
            twin_ok(exc_device_put(twin.gpu, (void *)(uintptr_t)base, part, (size_t)a.tokens * width * 4));
            twin_ok(exc_device_put(twin.gpu, ids, &f, sizeof f));
            TWIN_RUN(delta, &a);
            twin_down(got, a.out, bytes);
        } else {
            assert_int_equal(exc_cpu_delta(&twin.cpu->queue, &a), EXC_OK);
        }
        rows_of(&f, y, out, got, 1);
    }
    if (device) twin_done();
    free(state), free(part), free(got);
}

static void delta_twin(void **state) {
    static const rule rules[] = {{1, 2, 9, 13}, {2, 2, 16, 70}, {1, 1, 1, 1}, {1, 3, 130, 33}};
    static const int64_t lengths[] = {71, 34}, pieces[] = {1, 30};
    for (size_t k = 0; k < EXC_COUNT(rules); k++) {
        if (twin_small() && k != 2) continue;
        const rule *r = &rules[k];
        size_t width = (size_t)(2 * r->k_heads * r->k_dim + r->v_heads * (r->v_dim + 2)), n = (size_t)(105 * r->v_heads * r->v_dim);
        float *x = twin_normals(105 * width, k, 1), *logs = twin_normals((size_t)(2 * r->v_heads), 40 + k, 1), *want = twin_normals(n, 0, 0), *got = twin_normals(n, 0, 0),
              *cut = twin_normals(n, 0, 0);
        for (int64_t h = 0; h < r->v_heads; h++) logs[h] -= 2; /* long memory */
        feed_delta(want, x, logs, r, lengths, 0, 0);
        feed_delta(got, x, logs, r, lengths, 0, 1);
        assert_true(far(got, want, n) < 2e-6); /* recur.c allows the CPU as much */
        for (int i = 0; i < 2 && !twin_small(); i++) {
            if (pieces[i] == 1 && k != 0) continue; /* as many calls as tokens */
            feed_delta(cut, x, logs, r, lengths, pieces[i], 1);
            assert_memory_equal(cut, got, n * 4);
        }
        free(x), free(logs), free(want), free(got), free(cut);
    }
}

/* ------------------------------------------------------------------------------------------------------------ gate */

static void gate_twin(void **state) {
    static const int64_t dims[] = {1, 31, 127, 256};
    for (int k = 0; k < 4 * 16; k++) {
        if (twin_small() && k % 13) continue;
        int64_t D = dims[k % 4], T = 3, heads = 2, stride = heads * D + 3;
        int silu = k / 4 % 2, norm = k / 8 % 2, from = k / 16 % 2 ? EXC_BF16 : EXC_F32, act = k / 32 ? EXC_BF16 : EXC_F32;
        size_t n = (size_t)(T * heads * D), out = n * (act == EXC_F32 ? 4 : 2);
        float *x = twin_normals(n, 1, 2), *g = twin_normals((size_t)(T * stride), 2, 4), *w = twin_normals((size_t)D, 3, 1);
        uint16_t *half = malloc(n * 2);
        for (size_t i = 0; i < n; i++) half[i] = test_bf16(x[i]);
        void *want = calloc(n, 4), *got = calloc(n, 4), *in = from == EXC_F32 ? (void *)x : (void *)half;
        struct exc_gate_args a = {in, from, silu, g, stride, norm ? w : NULL, 1e-5f, act, T, heads, D, want}, d = a;
        assert_int_equal(exc_cpu_gate(&twin.cpu->queue, &a), EXC_OK);
        d.x = twin_up(in, n * (from == EXC_F32 ? 4 : 2));
        d.g = twin_up(g, (size_t)(T * stride) * 4);
        d.weight = norm ? twin_up(w, (size_t)D * 4) : NULL;
        d.y = from == act ? (void *)(uintptr_t)d.x : twin_up(got, out); /* in place where it may be */
        TWIN_RUN(gate, &d);
        twin_down(got, d.y, out);
        if (act == EXC_F32) twin_close_f32(got, want, n, 4e-6, 1e-30, "gate");
        else twin_close_bf16(got, want, n, 1, 50, "gate");
        twin_done();
        free(x), free(g), free(w), free(half), free(want), free(got);
    }
}

static void refuses(void **state) {
    struct exc_conv_args c = {.channels = 0, .taps = 4};
    struct exc_delta_args d = {.k_heads = 2, .v_heads = 3, .k_dim = 1, .v_dim = 1};
    struct exc_gate_args g = {.x_dtype = EXC_F16, .act = EXC_F32, .heads = 1, .dim = 1};
    assert_int_equal(TWIN_STATUS(conv, &c), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(delta, &d), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(gate, &g), EXC_ERR_USAGE);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(conv_twin), cmocka_unit_test(delta_twin), cmocka_unit_test(gate_twin), cmocka_unit_test(refuses)};
    return cmocka_run_group_tests(tests, twin_open, twin_close);
}
