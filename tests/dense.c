/* dense.c - pack, matmul, permute, glu, down, combine against f64 loops, at every instruction level this machine has.
 *
 * Tolerances. f32 sums of k products of operands exact in f32 err by at most about k * 2^-24 * sum|x w|; random signs make it
 * sqrt(k), so 4 * sqrt(k) * 2^-24 relative to sqrt(sum (x w)^2) holds with room. A stored bf16 adds 2^-8 of itself. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "helpers.h"

static const char *const levels[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

/* runs body(level) for every level that exists here */
static void at_every_level(void (*body)(void)) {
    exc_isa_lower(NULL);
    int best = (int)exc_isa_level();
    for (int i = 0; i <= best; i++) {
        exc_isa_lower(levels[i]);
        assert_int_equal(exc_isa_level(), i);
        body();
    }
    exc_isa_lower(NULL);
}

static exc_queue *queue_of(int threads) {
    static exc_ctx *open[9];
    if (!open[threads]) open[threads] = test_ctx(threads);
    return &open[threads]->queue;
}

static void *get(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xff, (bytes + 127) / 64 * 64);
    return p;
}

static size_t size_of(int dtype) { return dtype == EXC_F32 ? 4 : 2; }

static float half_to_float(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 0 ? ldexp(m, -24) : e == 31 ? (m ? NAN : INFINITY) : ldexp(m + 1024, e - 25);
    return (float)(h & 0x8000 ? -v : v);
}

/* an array of n elements of a dtype: random normal numbers, exact in that dtype */
static void *random_array(int dtype, int64_t n, uint64_t seed, float scale) {
    void *p = get((size_t)n * size_of(dtype));
    for (int64_t i = 0; i < n; i++) {
        float v = scale * test_normal(seed, (uint64_t)i);
        if (dtype == EXC_F32) ((float *)p)[i] = v;
        else if (dtype == EXC_BF16) ((uint16_t *)p)[i] = test_bf16(v);
        else ((uint16_t *)p)[i] = (uint16_t)(exc_random_u64(seed, 1, (uint64_t)i) % 0x3c00 | (v < 0 ? 0x8000 : 0));
    }
    return p;
}

static double value(const void *p, int dtype, int64_t i) {
    if (dtype == EXC_F32) return (double)((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return (double)(dtype == EXC_BF16 ? test_from_bf16(h) : half_to_float(h));
}

static exc_packed pack(const void *w, int dtype, int64_t n, int64_t k, int to) {
    size_t bytes = exc_packed_bytes(n, k, to);
    uint8_t *out = get(bytes + 64);
    assert_int_equal(exc_cpu_pack(queue_of(2), &(struct exc_pack_args){w, dtype, n, k, to, out}), EXC_OK);
    for (int i = 0; i < 64; i++) assert_int_equal(out[bytes + (size_t)i], 0xff);
    return (exc_packed){out, n, k, to};
}

/* --------------------------------------------------------------------------------------------------------------- pack */

static void pack_layout(void **state) {
    static const int64_t sizes[][2] = {{1, 1}, {16, 32}, {17, 31}, {33, 127}, {31, 33}, {300, 65}};
    static const int dtypes[] = {EXC_BF16, EXC_F16, EXC_F32};
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (int d = 0; d < 3; d++)
            for (int to = 0; to < 2; to++) {
                int64_t n = sizes[s][0], k = sizes[s][1], kk = (k + 31) / 32 * 32, nn = (n + 15) / 16 * 16;
                int out = to ? EXC_F32 : EXC_BF16;
                void *w = random_array(dtypes[d], n * k, 7 + s, 1);
                exc_packed p = pack(w, dtypes[d], n, k, out);
                assert_int_equal(exc_packed_bytes(n, k, out), nn * kk * (out == EXC_BF16 ? 2 : 4));
                for (int64_t o = 0; o < nn; o++)
                    for (int64_t i = 0; i < kk; i++) {
                        float want = o < n && i < k ? (float)value(w, dtypes[d], o * k + i) : 0.0f, got;
                        int64_t panel = o / 16 * 16 * kk;
                        if (out == EXC_BF16) {
                            got = test_from_bf16(((const uint16_t *)p.data)[panel + i / 2 * 32 + o % 16 * 2 + i % 2]);
                            want = test_from_bf16(test_bf16(want));
                        } else {
                            got = ((const float *)p.data)[panel + i * 16 + o % 16];
                        }
                        if (memcmp(&got, &want, 4)) fail_msg("[%d,%d]: %g, not %g", (int)o, (int)i, (double)got, (double)want);
                    }
                free(w);
                free((void *)(uintptr_t)p.data);
            }
}

static void pack_rounds_and_keeps_nan(void **state) {
    /* halfway cases to even, subnormals, the largest f16, infinities, NaN */
    const float in[] = {0x1.01p0f, 0x1.03p0f, 0x1p-133f, -0.0f, INFINITY, -INFINITY, NAN, 0x1.fffffep127f};
    exc_packed p = pack(in, EXC_F32, 8, 1, EXC_BF16);
    for (int i = 0; i < 8; i++) assert_int_equal(((const uint16_t *)p.data)[2 * i], test_bf16(in[i]));
    free((void *)(uintptr_t)p.data);
    uint16_t all[1024];
    for (int block = 0; block < 64; block++) {
        for (int i = 0; i < 1024; i++) all[i] = (uint16_t)(block * 1024 + i);
        p = pack(all, EXC_F16, 1024, 1, EXC_F32);
        for (int i = 0; i < 1024; i++) {
            float want = half_to_float(all[i]), got = ((const float *)p.data)[i / 16 * 16 * 32 + i % 16];
            assert_true(isnan(want) ? isnan(got) : !memcmp(&want, &got, 4));
        }
        free((void *)(uintptr_t)p.data);
    }
}

/* ------------------------------------------------------------------------------------------------------------- matmul */

typedef struct matmul_case {
    int act, weights;
    int64_t rows, n, k, x_pad, y_pad;
    int bias, add; /* add: 0 none, 1 its own array, 2 y itself */
} matmul_case;

static void matmul_against_f64(const matmul_case *c) {
    int64_t xs = c->k + c->x_pad, ys = c->n + c->y_pad;
    void *x = random_array(c->act, c->rows * xs + 1, 11, 1), *w = random_array(c->weights, c->n * c->k, 12, 1);
    float *bias = random_array(EXC_F32, c->n, 13, 1), *add = random_array(EXC_F32, c->rows * ys + 1, 14, 1);
    exc_packed p = pack(w, c->weights, c->n, c->k, c->weights);
    float *first = NULL;
    for (int threads = 1; threads <= 3; threads++) {
        float *y = get((size_t)(c->rows * ys + 16) * 4);
        if (c->add == 2) memcpy(y, add, (size_t)(c->rows * ys) * 4);
        struct exc_matmul_args a = {.x = x, .x_stride = xs, .act = c->act, .w = &p, .bias = c->bias ? bias : NULL,
                                    .add = c->add == 2 ? y : c->add ? add : NULL, .y = y, .y_stride = ys, .rows = c->rows};
        assert_int_equal(exc_cpu_matmul(queue_of(threads), &a), EXC_OK);
        if (first) assert_memory_equal(first, y, (size_t)(c->rows * ys) * 4);
        for (int64_t t = 0; t < c->rows; t++)
            for (int64_t o = 0; o < ys; o++) {
                float got = y[t * ys + o];
                if (o >= c->n) {
                    if (c->add != 2) assert_int_equal(((uint32_t *)y)[t * ys + o], 0xffffffff);
                    continue;
                }
                double want = 0, size = 0;
                for (int64_t i = 0; i < c->k; i++) {
                    double v = value(x, c->act, t * xs + i) * value(w, c->weights, o * c->k + i);
                    want += v;
                    size += v * v;
                }
                if (c->bias) want += (double)bias[o];
                if (c->add) want += (double)add[t * ys + o];
                double tolerance = 4 * sqrt((double)c->k) * 0x1p-24 * (sqrt(size) + fabs(want) + 1e-30) + 0x1p-22;
                if (!(fabs(got - want) <= tolerance))
                    fail_msg("act %d weights %d [%d,%d]x%d: y[%d,%d] = %g, want %g", c->act, c->weights, (int)c->rows,
                             (int)c->n, (int)c->k, (int)t, (int)o, (double)got, want);
            }
        assert_int_equal(((uint32_t *)y)[c->rows * ys], 0xffffffff);
        free(first);
        first = y;
    }
    free(first);
    free(x);
    free(w);
    free(bias);
    free(add);
    free((void *)(uintptr_t)p.data);
}

static void matmul_shapes(void) {
    static const int64_t rows[] = {0, 1, 2, 3, 7, 13, 14, 15, 31, 64, 67, 127}, n[] = {1, 15, 16, 17, 33, 127},
                         k[] = {1, 2, 31, 33, 128};
    static const int kinds[][2] = {{EXC_BF16, EXC_BF16}, {EXC_F32, EXC_BF16}, {EXC_F32, EXC_F32}};
    int turn = 0;
    for (int d = 0; d < 3; d++)
        for (size_t r = 0; r < EXC_COUNT(rows); r++)
            for (size_t i = 0; i < EXC_COUNT(n); i++, turn++)
                matmul_against_f64(&(matmul_case){kinds[d][0], kinds[d][1], rows[r], n[i], k[turn % 5], turn % 3, turn % 2 * 5,
                                                  turn % 2, turn % 3});
    for (int d = 0; d < 3; d++) /* several tasks by rows and by panels */
        matmul_against_f64(&(matmul_case){kinds[d][0], kinds[d][1], 1100, 70, 96, 0, 0, 0, 0});
}

static void matmul_at_every_level(void **state) { at_every_level(matmul_shapes); }

/* a row alone, among 5, and among 200 has the same bits */
static void rows_are_independent(void) {
    for (int act = 0; act < 2; act++) {
        int dtype = act ? EXC_F32 : EXC_BF16;
        int64_t k = 257, n = 100, T = 200;
        uint8_t *x = random_array(dtype, T * k, 3, 1);
        void *w = random_array(EXC_BF16, n * k, 4, 1);
        exc_packed p = pack(w, EXC_BF16, n, k, EXC_BF16);
        float *all = get((size_t)(T * n) * 4), *few = get((size_t)(T * n) * 4);
        struct exc_matmul_args a = {.x = x, .x_stride = k, .act = dtype, .w = &p, .y = all, .y_stride = n, .rows = T};
        assert_int_equal(exc_cpu_matmul(queue_of(2), &a), EXC_OK);
        static const int64_t groups[] = {1, 5, 14, 17};
        for (size_t g = 0; g < EXC_COUNT(groups); g++) {
            for (int64_t t = 0; t < T; t += groups[g]) {
                a.x = x + (size_t)(t * k) * size_of(dtype);
                a.rows = T - t < groups[g] ? T - t : groups[g];
                a.y = few + t * n;
                assert_int_equal(exc_cpu_matmul(queue_of(1), &a), EXC_OK);
            }
            assert_memory_equal(all, few, (size_t)(T * n) * 4);
        }
        free(x);
        free(w);
        free(all);
        free(few);
        free((void *)(uintptr_t)p.data);
    }
}

static void rows_at_every_level(void **state) { at_every_level(rows_are_independent); }

static void nan_and_infinity_stay_in_their_row(void) {
    int64_t k = 70, n = 40, T = 20;
    float *x = random_array(EXC_F32, T * k, 5, 1), *y = get((size_t)(T * n) * 4);
    void *w = random_array(EXC_BF16, n * k, 6, 1);
    x[3 * k + 69] = NAN;
    x[7 * k] = INFINITY;
    exc_packed p = pack(w, EXC_BF16, n, k, EXC_BF16);
    struct exc_matmul_args a = {.x = x, .x_stride = k, .act = EXC_F32, .w = &p, .y = y, .y_stride = n, .rows = T};
    assert_int_equal(exc_cpu_matmul(queue_of(2), &a), EXC_OK);
    for (int64_t t = 0; t < T; t++)
        for (int64_t o = 0; o < n; o++) {
            if (t == 3) assert_true(isnan(y[t * n + o]));
            else if (t == 7) assert_false(isfinite(y[t * n + o]));
            else assert_true(isfinite(y[t * n + o]));
        }
    free(x);
    free(y);
    free(w);
    free((void *)(uintptr_t)p.data);
}

static void nan_at_every_level(void **state) { at_every_level(nan_and_infinity_stay_in_their_row); }

static void refusals(void **state) {
    float x[64] = {0}, y[64];
    exc_packed f32 = {x, 4, 4, EXC_F32}, f16 = {x, 4, 4, EXC_F16};
    struct exc_matmul_args a = {.x = x, .x_stride = 4, .act = EXC_BF16, .w = &f32, .y = y, .y_stride = 4, .rows = 1};
    assert_int_equal(exc_cpu_matmul(queue_of(1), &a), EXC_ERR_USAGE); /* bf16 activations need bf16 weights */
    a.act = EXC_F32;
    a.w = &f16;
    assert_int_equal(exc_cpu_matmul(queue_of(1), &a), EXC_ERR_USAGE);
    a.w = NULL;
    assert_int_equal(exc_cpu_matmul(queue_of(1), &a), EXC_ERR_USAGE);
    a.w = &f32;
    a.rows = -1;
    assert_int_equal(exc_cpu_matmul(queue_of(1), &a), EXC_ERR_USAGE);
    assert_int_equal(exc_cpu_pack(queue_of(1), &(struct exc_pack_args){x, EXC_F64, 1, 1, EXC_F32, y}), EXC_ERR_USAGE);
    assert_int_equal(exc_cpu_pack(queue_of(1), &(struct exc_pack_args){x, EXC_F32, 1, 1, EXC_F16, y}), EXC_ERR_USAGE);
}

/* ------------------------------------------------------------------------------------------------------------ permute */

static void permute_is_stable(void **state) {
    static const int64_t cases[][3] = {{0, 1, 4}, {1, 1, 1}, {33, 2, 5}, {127, 8, 31}, {64, 3, 300}};
    for (size_t c = 0; c < EXC_COUNT(cases); c++) {
        int64_t T = cases[c][0], K = cases[c][1], E = cases[c][2], n = T * K, seen = 0;
        int32_t *ids = get((size_t)n * 4), *row_of = get((size_t)n * 4), *pair_of = get((size_t)n * 4);
        int64_t *offset = get((size_t)(E + 2) * 8);
        for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)(exc_random_u64(c, 1, (uint64_t)i) % (uint64_t)(E + 1)) - 1;
        struct exc_permute_args a = {ids, T, K, E, offset, row_of, pair_of};
        assert_int_equal(exc_cpu_permute(queue_of(2), &a), EXC_OK);
        assert_int_equal(offset[0], 0);
        assert_int_equal(offset[E + 1], -1);
        for (int64_t e = 0; e < E; e++)
            for (int64_t r = offset[e]; r < offset[e + 1]; r++, seen++) {
                assert_int_equal(ids[pair_of[r]], e);
                assert_int_equal(row_of[pair_of[r]], r);
                if (r > offset[e]) assert_true(pair_of[r] > pair_of[r - 1]);
            }
        assert_int_equal(seen, offset[E]);
        for (int64_t i = 0; i < n; i++)
            if (ids[i] < 0) assert_int_equal(row_of[i], -1);
        if (n) {
            ids[0] = (int32_t)E;
            assert_int_equal(exc_cpu_permute(queue_of(2), &a), EXC_ERR_USAGE);
        }
        free(ids);
        free(row_of);
        free(pair_of);
        free(offset);
    }
}

/* ------------------------------------------------------------------------------------------------------------ experts */

typedef struct experts_case {
    int act, weights;
    int64_t tokens, top_k, experts, hidden, inner;
    int skew;    /* 1: half of all choices are expert 0 */
    int clamped; /* 1: biases everywhere and a clamped activation whose bounds are hit often */
} experts_case;

typedef struct experts {
    const experts_case *c;
    void *x, *gate_w, *up_w, *down_w;
    float *gate_bias, *up_bias, *down_bias; /* [E,I], [E,I], [E,H] or NULL */
    exc_activation activation;
    exc_packed *gate, *up, *down; /* [E] */
    int32_t *ids, *row_of, *pair_of, *slot;
    int64_t *offset, rows;
    double *mid_want, *mid_size; /* [rows,I] */
} experts;

static exc_packed *pack_all(const void *w, int dtype, int64_t E, int64_t n, int64_t k) {
    exc_packed *p = get((size_t)E * sizeof *p);
    for (int64_t e = 0; e < E; e++)
        p[e] = pack((const uint8_t *)w + (size_t)(e * n * k) * size_of(dtype), dtype, n, k, dtype);
    return p;
}

static void unpack_all(exc_packed *p, int64_t E) {
    for (int64_t e = 0; e < E; e++) free((void *)(uintptr_t)p[e].data);
    free(p);
}

static experts experts_make(const experts_case *c) {
    int64_t E = c->experts, H = c->hidden, I = c->inner, n = c->tokens * c->top_k;
    experts x = {.c = c};
    x.x = random_array(c->act, c->tokens * H + 1, 21, 1);
    x.gate_w = random_array(c->weights, E * I * H, 22, 1 / sqrtf((float)H));
    x.up_w = random_array(c->weights, E * I * H, 23, 1 / sqrtf((float)H));
    x.down_w = random_array(c->weights, E * I * H, 24, 1 / sqrtf((float)I));
    if (c->clamped) {
        x.gate_bias = random_array(EXC_F32, E * I, 26, 0.5f);
        x.up_bias = random_array(EXC_F32, E * I, 27, 0.5f);
        x.down_bias = random_array(EXC_F32, E * H, 28, 0.5f);
        x.activation = (exc_activation){EXC_GLU_CLAMPED, 1.702f, 0.75f};
    }
    x.gate = pack_all(x.gate_w, c->weights, E, I, H);
    x.up = pack_all(x.up_w, c->weights, E, I, H);
    x.down = pack_all(x.down_w, c->weights, E, H, I);
    x.ids = get((size_t)n * 4);
    x.row_of = get((size_t)n * 4);
    x.pair_of = get((size_t)n * 4);
    x.slot = get((size_t)c->tokens * 4);
    x.offset = get((size_t)(E + 1) * 8);
    for (int64_t t = 0; t < c->tokens; t++) {
        x.slot[t] = t % 3 == 1 ? -1 : (int32_t)(t % 5);
        for (int64_t j = 0; j < c->top_k; j++)
            x.ids[t * c->top_k + j] =
                (int32_t)((exc_random_u64(25, 1, (uint64_t)t) + (uint64_t)j * (1 + (uint64_t)t % 2)) % (uint64_t)E);
        if (c->skew && t % 2) x.ids[t * c->top_k] = 0;
    }
    struct exc_permute_args a = {x.ids, c->tokens, c->top_k, E, x.offset, x.row_of, x.pair_of};
    assert_int_equal(exc_cpu_permute(queue_of(1), &a), EXC_OK);
    x.rows = x.offset[E];
    return x;
}

static void experts_free(experts *x) {
    void *all[] = {x->x,   x->gate_w, x->up_w,    x->down_w, x->gate_bias, x->up_bias, x->down_bias,
                   x->ids, x->row_of, x->pair_of, x->slot,   x->offset};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free(all[i]);
    unpack_all(x->gate, x->c->experts);
    unpack_all(x->up, x->c->experts);
    unpack_all(x->down, x->c->experts);
}

static int64_t expert_of(const experts *x, int64_t r) { return x->ids[x->pair_of[r]]; }
static int seen(const experts *x, int64_t r) { return x->slot[x->pair_of[r] / x->c->top_k] >= 0; }

static void check_glu(const experts *x, const void *mid) {
    const experts_case *c = x->c;
    int64_t H = c->hidden, I = c->inner;
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t i = 0; i < I; i++) {
            int64_t e = expert_of(x, r), t = x->pair_of[r] / c->top_k;
            double g = c->clamped ? (double)x->gate_bias[e * I + i] : 0, u = c->clamped ? (double)x->up_bias[e * I + i] : 0;
            for (int64_t h = 0; h < H; h++) {
                double v = value(x->x, c->act, t * H + h);
                g += v * value(x->gate_w, c->weights, (e * I + i) * H + h);
                u += v * value(x->up_w, c->weights, (e * I + i) * H + h);
            }
            double want = g / (1 + exp(-g)) * u, got = value(mid, c->act, r * I + i), limit = (double)x->activation.limit;
            if (c->clamped) {
                double low = fmin(g, limit);
                want = low / (1 + exp((double)-x->activation.alpha * low)) * (fmax(fmin(u, limit), -limit) + 1);
            }
            /* g and u err by sqrt(H) 2^-24 of their size, which is 1 */
            double tolerance = 8 * sqrt((double)H) * 0x1p-24 * (fabs(g) + fabs(u) + 1) +
                               fabs(want) * (c->act == EXC_BF16 ? 0x1.01p-8 : 0x1p-21);
            if (!(fabs(got - want) <= tolerance))
                fail_msg("mid[%d,%d] = %g, want %g", (int)r, (int)i, got, want);
        }
}

static void check_down(const experts *x, const void *mid, const float *y) {
    const experts_case *c = x->c;
    int64_t H = c->hidden, I = c->inner;
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t h = 0; h < H; h++) {
            double want = c->clamped ? (double)x->down_bias[expert_of(x, r) * H + h] : 0, size = 0;
            for (int64_t i = 0; i < I; i++) {
                double v = value(mid, c->act, r * I + i) * value(x->down_w, c->weights, (expert_of(x, r) * H + h) * I + i);
                want += v;
                size += v * v;
            }
            double tolerance = 4 * sqrt((double)I) * 0x1p-24 * (sqrt(size) + fabs(want)) + 0x1p-30;
            if (!(fabs((double)y[r * H + h] - want) <= tolerance))
                fail_msg("y[%d,%d] = %g, want %g", (int)r, (int)h, (double)y[r * H + h], want);
        }
}

/* sums follow from what was stored: f32 blocks of 64 rows, so 64 * 2^-24 of the sum of magnitudes */
static void check_sums(const experts *x, const void *mid, const float *y, const double *mid_sum, const double *sqnorm) {
    const experts_case *c = x->c;
    int64_t H = c->hidden, I = c->inner, E = c->experts;
    for (int64_t e = 0; e < E; e++) {
        double square = 1;
        for (int64_t i = 0; i < I; i++) {
            double want = 1, size = 1; /* the sums held 1 before */
            for (int64_t r = x->offset[e]; r < x->offset[e + 1]; r++)
                if (seen(x, r)) want += value(mid, c->act, r * I + i), size += fabs(value(mid, c->act, r * I + i));
            if (!(fabs(mid_sum[e * I + i] - want) <= 64 * 0x1p-24 * size))
                fail_msg("mid_sum[%d,%d] = %.9g, want %.9g", (int)e, (int)i, mid_sum[e * I + i], want);
        }
        for (int64_t r = x->offset[e]; r < x->offset[e + 1]; r++)
            for (int64_t h = 0; h < H && seen(x, r); h++) square += (double)y[r * H + h] * (double)y[r * H + h];
        if (!(fabs(sqnorm[e] - square) <= 1e-5 * square))
            fail_msg("sqnorm[%d] = %.9g, want %.9g", (int)e, sqnorm[e], square);
    }
}

static void experts_against_f64(const experts_case *c) {
    experts x = experts_make(c);
    int64_t H = c->hidden, I = c->inner, E = c->experts;
    size_t mid_bytes = (size_t)(x.rows * I) * size_of(c->act), y_bytes = (size_t)(x.rows * H) * 4;
    uint8_t *mid[2] = {get(mid_bytes + 64), get(mid_bytes + 64)};
    float *y[2] = {get(y_bytes + 64), get(y_bytes + 64)};
    double *sum[2] = {get((size_t)(E * I) * 8), get((size_t)(E * I) * 8)}, *square[2] = {get((size_t)E * 8), get((size_t)E * 8)};
    for (int capture = 0; capture < 2; capture++) /* without capture on one thread, with it on 1, 2 and 3: same bits */
        for (int threads = 1; threads <= (capture ? 3 : 1); threads++) {
            int to = capture && threads > 1;
            for (int64_t i = 0; i < E * I; i++) sum[to][i] = 1;
            for (int64_t e = 0; e < E; e++) square[to][e] = 1;
            struct exc_glu_args g = {.x = x.x, .act = c->act, .gate = x.gate, .up = x.up,
                                     .gate_bias = x.gate_bias, .up_bias = x.up_bias, .activation = x.activation,
                                     .offset = x.offset, .pair_of = x.pair_of, .tokens = c->tokens, .top_k = c->top_k, .experts = E, .hidden = H,
                                     .inner = I, .mid = mid[to], .slot = capture ? x.slot : NULL,
                                     .mid_sum = capture ? sum[to] : NULL, .w_dtype = x.gate->dtype};
            struct exc_down_args d = {.mid = mid[to], .act = c->act, .down = x.down, .bias = x.down_bias, .offset = x.offset,
                                      .pair_of = x.pair_of, .tokens = c->tokens, .top_k = c->top_k, .experts = E, .hidden = H, .inner = I,
                                      .y = y[to], .slot = capture ? x.slot : NULL, .sqnorm_sum = capture ? square[to] : NULL, .w_dtype = x.down->dtype};
            assert_int_equal(exc_cpu_glu(queue_of(threads), &g), EXC_OK);
            assert_int_equal(exc_cpu_down(queue_of(threads), &d), EXC_OK);
            if (!capture) {
                check_glu(&x, mid[0]);
                check_down(&x, mid[0], y[0]);
            }
            if (to) {
                assert_memory_equal(mid[0], mid[1], mid_bytes + 64);
                assert_memory_equal(y[0], y[1], y_bytes + 64);
                assert_memory_equal(sum[0], sum[1], (size_t)(E * I) * 8);
                assert_memory_equal(square[0], square[1], (size_t)E * 8);
            }
        }
    check_sums(&x, mid[0], y[0], sum[0], square[0]);
    for (int i = 0; i < 64; i++) assert_int_equal(mid[0][mid_bytes + (size_t)i], 0xff);
    for (int i = 0; i < 2; i++) {
        free(mid[i]);
        free(y[i]);
        free(sum[i]);
        free(square[i]);
    }
    experts_free(&x);
}

/* glu and down over tokens first..first+count-1, on a reproducible queue; sums are added to */
static void run_part(const experts *x, int threads, int64_t first, int64_t count, double *sum, double *square) {
    const experts_case *c = x->c;
    int64_t H = c->hidden, I = c->inner, E = c->experts, n = count * c->top_k;
    int64_t *offset = get((size_t)(E + 1) * 8);
    int32_t *row_of = get((size_t)n * 4), *pair_of = get((size_t)n * 4);
    void *mid = get((size_t)(n * I) * size_of(c->act));
    float *y = get((size_t)(n * H) * 4);
    exc_queue q = *queue_of(threads);
    q.reproducible = 1;
    struct exc_permute_args a = {x->ids + first * c->top_k, count, c->top_k, E, offset, row_of, pair_of};
    struct exc_glu_args g = {.x = (uint8_t *)x->x + (size_t)(first * H) * size_of(c->act), .act = c->act, .gate = x->gate,
                             .up = x->up, .offset = offset, .pair_of = pair_of, .tokens = count, .top_k = c->top_k,
                             .experts = E, .hidden = H, .inner = I, .mid = mid, .slot = x->slot + first, .mid_sum = sum,
                             .w_dtype = x->gate->dtype};
    struct exc_down_args d = {.mid = mid, .act = c->act, .down = x->down, .offset = offset, .pair_of = pair_of,
                              .tokens = count, .top_k = c->top_k, .experts = E, .hidden = H, .inner = I, .y = y,
                              .slot = x->slot + first, .sqnorm_sum = square, .w_dtype = x->down->dtype};
    assert_int_equal(exc_cpu_permute(&q, &a), EXC_OK);
    assert_int_equal(exc_cpu_glu(&q, &g), EXC_OK);
    assert_int_equal(exc_cpu_down(&q, &d), EXC_OK);
    if (count == c->tokens) { /* exact: integers in units of 2^-28; squared norms up to their rounding to 2^-20 */
        for (int64_t e = 0; e < E; e++) {
            double norm = 0;
            for (int64_t r = offset[e]; r < offset[e + 1]; r++)
                for (int64_t h = 0; h < H && x->slot[pair_of[r] / c->top_k] >= 0; h++)
                    norm += (double)y[r * H + h] * (double)y[r * H + h];
            if (!(fabs(square[e] - norm) <= 0x1p-21 * (double)(offset[e + 1] - offset[e]) + 1e-12 * norm))
                fail_msg("sqnorm[%d] = %.17g, want %.17g", (int)e, square[e], norm);
            for (int64_t i = 0; i < I; i++) {
                int64_t units = 0;
                for (int64_t r = offset[e]; r < offset[e + 1]; r++)
                    if (x->slot[pair_of[r] / c->top_k] >= 0) units += llrint(ldexp(value(mid, c->act, r * I + i), 28));
                if (sum[e * I + i] != ldexp((double)units, -28))
                    fail_msg("mid_sum[%d,%d] = %.17g, want %.17g", (int)e, (int)i, sum[e * I + i], ldexp((double)units, -28));
            }
        }
    }
    void *all[] = {offset, row_of, pair_of, mid, y};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free(all[i]);
}

/* the same bits however the tokens are cut into calls, and in whichever order those come */
static void experts_split(const experts_case *c) {
    experts x = experts_make(c);
    size_t n = (size_t)(c->experts * c->inner), E = (size_t)c->experts;
    double *sum[2] = {calloc(n, 8), calloc(n, 8)}, *square[2] = {calloc(E, 8), calloc(E, 8)};
    static const int64_t parts[] = {1, 2, 7, 64, 65};
    run_part(&x, 1, 0, c->tokens, sum[0], square[0]);
    for (size_t i = 0; i < EXC_COUNT(parts); i++) {
        memset(sum[1], 0, n * 8);
        memset(square[1], 0, E * 8);
        int64_t step = (c->tokens + parts[i] - 1) / parts[i], last = (c->tokens - 1) / step * step;
        for (int64_t first = last; first >= 0; first -= step)
            run_part(&x, 1 + (int)(i % 3), first, first == last ? c->tokens - last : step, sum[1], square[1]);
        assert_memory_equal(sum[0], sum[1], n * 8);
        assert_memory_equal(square[0], square[1], E * 8);
    }
    for (int i = 0; i < 2; i++) free(sum[i]), free(square[i]);
    experts_free(&x);
}

static void splits(void) {
    experts_split(&(experts_case){EXC_BF16, EXC_BF16, 127, 4, 7, 48, 65, 1});
    experts_split(&(experts_case){EXC_F32, EXC_BF16, 300, 1, 3, 40, 18, 1});
    experts_split(&(experts_case){EXC_F32, EXC_F32, 33, 2, 5, 127, 31, 0});
    experts_split(&(experts_case){EXC_BF16, EXC_BF16, 130, 2, 3, 700, 33, 0}); /* pieces differ with the rows of a call */
}

static void experts_same_bits_for_any_split(void **state) { at_every_level(splits); }

static void experts_shapes(void) {
    static const int kinds[][2] = {{EXC_BF16, EXC_BF16}, {EXC_F32, EXC_BF16}, {EXC_F32, EXC_F32}};
    for (int d = 0; d < 6; d++) {
        int act = kinds[d % 3][0], weights = kinds[d % 3][1], clamped = d / 3;
        experts_against_f64(&(experts_case){act, weights, 1, 1, 1, 1, 1, 0, clamped});
        experts_against_f64(&(experts_case){act, weights, 1, 8, 16, 127, 33, 0, clamped});
        experts_against_f64(&(experts_case){act, weights, 31, 2, 5, 33, 31, 0, clamped});
        experts_against_f64(&(experts_case){act, weights, 127, 4, 7, 48, 65, 1, clamped});
        experts_against_f64(&(experts_case){act, weights, 0, 4, 7, 48, 65, 0, clamped});
    }
    /* several pieces an expert, several blocks of rows, chunks of gathered rows */
    experts_against_f64(&(experts_case){EXC_BF16, EXC_BF16, 300, 2, 3, 320, 70, 1, 1});
    experts_against_f64(&(experts_case){EXC_F32, EXC_BF16, 1200, 1, 2, 40, 18, 1, 0});
}

static void experts_at_every_level(void **state) { at_every_level(experts_shapes); }

/* a dense MLP is one expert, pair_of NULL, and equals the same thing routed */
static void dense_is_one_expert(void) {
    experts_case c = {EXC_BF16, EXC_BF16, 45, 1, 1, 64, 48, 0, 0};
    experts x = experts_make(&c);
    size_t bytes = (size_t)(x.rows * c.inner) * 2;
    uint8_t *a = get(bytes), *b = get(bytes);
    struct exc_glu_args g = {.x = x.x, .act = c.act, .gate = x.gate, .up = x.up, .offset = x.offset, .pair_of = x.pair_of,
                             .tokens = 45, .top_k = 1, .experts = 1, .hidden = 64, .inner = 48, .mid = a, .w_dtype = x.gate->dtype};
    assert_int_equal(exc_cpu_glu(queue_of(2), &g), EXC_OK);
    g.pair_of = NULL;
    g.mid = b;
    assert_int_equal(exc_cpu_glu(queue_of(2), &g), EXC_OK);
    assert_memory_equal(a, b, bytes);
    free(a);
    free(b);
    experts_free(&x);
}

static void dense_at_every_level(void **state) { at_every_level(dense_is_one_expert); }

/* ------------------------------------------------------------------------------------------------------------ combine */

static void combine_against_f64(int64_t T, int64_t K, int64_t H, int64_t R, int scaled) {
    int64_t E = 9, n = T * K;
    float *y = random_array(EXC_F32, n * H + 1, 31, 1), *weights = random_array(EXC_F32, n + 1, 32, 1),
          *h = random_array(EXC_F32, T * H + 16, 33, 1), *before = get((size_t)(T * H + 16) * 4), *first = NULL;
    float *strength = random_array(EXC_F32, E, 34, 1), *scale = random_array(EXC_F32, E, 35, 1), *basis = get((size_t)(R * H) * 4);
    int32_t *ids = get((size_t)n * 4), *row_of = get((size_t)n * 4);
    memcpy(before, h, (size_t)(T * H + 16) * 4);
    for (int64_t i = 0; i < n; i++) {
        ids[i] = (int32_t)(exc_random_u64(36, 1, (uint64_t)i) % (uint64_t)E);
        row_of[i] = i % 7 == 3 ? -1 : (int32_t)(n - 1 - i);
    }
    for (int64_t i = 0; i < R * H; i++) basis[i] = i % (H + 1) ? 0.0f : 1.0f; /* e_0, e_1, .. */
    for (int64_t i = 0; R == 1 && i < H; i++) basis[i] = 1 / sqrtf((float)H);
    for (int threads = 1; threads <= 3; threads++) {
        memcpy(h, before, (size_t)(T * H + 16) * 4);
        struct exc_combine_args a = {.y = y, .row_of = row_of, .ids = ids, .weights = weights, .tokens = T, .top_k = K,
                                     .hidden = H, .basis = R ? basis : NULL, .rank = R, .strength = strength,
                                     .scale = scaled ? scale : NULL, .h = h};
        assert_int_equal(exc_cpu_combine(queue_of(threads), &a), EXC_OK);
        assert_memory_equal(h + T * H, before + T * H, 64);
        if (first) assert_memory_equal(h, first, (size_t)(T * H) * 4);
        else memcpy(first = get((size_t)(T * H) * 4), h, (size_t)(T * H) * 4);
    }
    for (int64_t t = 0; t < T; t++) {
        double want[300], size = 1;
        for (int64_t i = 0; i < H; i++) want[i] = (double)before[t * H + i];
        for (int64_t j = 0; j < K; j++) {
            int64_t p = t * K + j;
            if (row_of[p] < 0) continue;
            const float *row = y + row_of[p] * H;
            double w = (double)weights[p] * (scaled ? (double)scale[ids[p]] : 1.0);
            for (int64_t i = 0; i < H; i++) want[i] += w * (double)row[i];
            size += fabs(w);
            for (int64_t r = 0; r < R; r++) {
                double c = 0;
                for (int64_t i = 0; i < H; i++) c += (double)basis[r * H + i] * (double)row[i];
                for (int64_t i = 0; i < H; i++) want[i] -= w * (double)strength[ids[p]] * c * (double)basis[r * H + i];
            }
        }
        for (int64_t i = 0; i < H; i++)
            if (!(fabs((double)h[t * H + i] - want[i]) <= 1e-5 * size))
                fail_msg("h[%d,%d] = %g, want %g", (int)t, (int)i, (double)h[t * H + i], want[i]);
    }
    void *all[] = {y, weights, h, before, strength, scale, basis, ids, row_of, first};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free(all[i]);
}

static void combine_shapes(void) {
    combine_against_f64(0, 2, 8, 0, 0);
    combine_against_f64(1, 1, 1, 0, 0);
    combine_against_f64(33, 2, 31, 0, 1);
    combine_against_f64(127, 8, 257, 0, 0);
    combine_against_f64(33, 8, 300, 1, 1);
    combine_against_f64(31, 3, 127, 3, 0);
}

static void combine_at_every_level(void **state) { at_every_level(combine_shapes); }

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pack_layout),           cmocka_unit_test(pack_rounds_and_keeps_nan),
        cmocka_unit_test(matmul_at_every_level), cmocka_unit_test(rows_at_every_level),
        cmocka_unit_test(nan_at_every_level),    cmocka_unit_test(refusals),
        cmocka_unit_test(permute_is_stable),     cmocka_unit_test(experts_at_every_level),
        cmocka_unit_test(experts_same_bits_for_any_split),
        cmocka_unit_test(dense_at_every_level),  cmocka_unit_test(combine_at_every_level),
    };
    return cmocka_run_group_tests_name("dense", tests, NULL, NULL);
}
