/* codes.c - quantised weights: decoding, packing, and every op that multiplies by them, against definitions and f64 loops, at every
 * instruction level this machine has. Scales of e4m3 as f32, bf16 and powers of two, blocks ragged on both sides; fp4 with a
 * scale for every 32 inputs of a row.
 *
 * Tolerance: a code is exact in f32 and in bf16, so what rounds are the sums: 4 * sqrt(k) * 2^-24 of the root of the sum of
 * squared products holds with room (tests/dense.c), one more rounding for a scale. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h"
#include "helpers.h"
#include "lanes.h"

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
    static exc_ctx *open[4];
    if (!open[threads]) open[threads] = test_ctx(threads);
    return &open[threads]->queue;
}

static void *get(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xff, (bytes + 127) / 64 * 64);
    return p;
}

/* ---- definitions */
static double e4m3(int c) {
    int e = c >> 3 & 15, m = c & 7;
    double v = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
    return (c & 0x7f) == 0x7f ? NAN : c & 0x80 ? -v : v;
}
static double e2m1(int c) {
    static const double size[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return c & 8 ? -size[c & 7] : size[c & 7];
}
static double e8m0(int c) { return c == 255 ? NAN : ldexp(1, c - 127); }

/* ---- a quantised matrix */
typedef struct coded {
    int dtype, scale_dtype;
    int64_t n, k, scale_rows, scale_cols;
    uint8_t *code;
    void *scale;
} coded;

static double scale_at(const coded *m, int64_t i) {
    if (m->scale_dtype == EXC_F32) return (double)((float *)m->scale)[i];
    if (m->scale_dtype == EXC_BF16) return (double)test_from_bf16(((uint16_t *)m->scale)[i]);
    return e8m0(((uint8_t *)m->scale)[i]);
}

static double value(const coded *m, int64_t row, int64_t col) {
    if (m->dtype == EXC_F4)
        return e2m1(m->code[(row * m->k + col) / 2] >> (col % 2 ? 4 : 0) & 15) * scale_at(m, row * m->scale_cols + col / 32);
    return e4m3(m->code[row * m->k + col]) * scale_at(m, row / 128 * m->scale_cols + col / 128);
}

/* codes of all kinds, subnormal ones too, no NaN; scales that make weights of about `size` */
static coded make(int dtype, int scale_dtype, int64_t n, int64_t k, uint64_t seed) {
    coded m = {dtype, scale_dtype, n, k, dtype == EXC_F4 ? n : (n + 127) / 128, dtype == EXC_F4 ? k / 32 : (k + 127) / 128, NULL, NULL};
    size_t codes = (size_t)(n * k) / (dtype == EXC_F4 ? 2 : 1), scales = (size_t)(m.scale_rows * m.scale_cols);
    m.code = get(codes);
    m.scale = get(scales * 4);
    for (size_t i = 0; i < codes; i++) {
        m.code[i] = (uint8_t)exc_random_u64(seed, 1, i);
        if (dtype == EXC_F8_E4M3 && (m.code[i] & 0x7f) == 0x7f) m.code[i] ^= 1;
    }
    for (size_t i = 0; i < scales; i++) {
        float s = 0.002f + 0.01f * (float)exc_random_unit(seed, 2, i);
        if (scale_dtype == EXC_F32) ((float *)m.scale)[i] = s;
        else if (scale_dtype == EXC_BF16) ((uint16_t *)m.scale)[i] = test_bf16(s);
        else ((uint8_t *)m.scale)[i] = (uint8_t)(118 + exc_random_u64(seed, 2, i) % 6);
    }
    return m;
}

static void drop(coded *m) {
    free(m->code);
    free(m->scale);
}

static exc_packed pack(const coded *m, int to) {
    size_t bytes = exc_packed_bytes(m->n, m->k, to);
    uint8_t *out = get(bytes + 64);
    assert_int_equal(exc_cpu_pack(queue_of(2), &(struct exc_pack_args){.w = m->code, .w_dtype = m->dtype, .n = m->n, .k = m->k, .to = to,
                                                                       .out = out, .scale = m->scale, .scale_dtype = m->scale_dtype}),
                     EXC_OK);
    for (int i = 0; i < 64; i++) assert_int_equal(out[bytes + (size_t)i], 0xff);
    return (exc_packed){out, m->n, m->k, to};
}

static const struct {
    int dtype, scale_dtype;
} kinds[] = {{EXC_F8_E4M3, EXC_F32}, {EXC_F8_E4M3, EXC_BF16}, {EXC_F8_E4M3, EXC_F8_E8M0}, {EXC_F4, EXC_F8_E8M0}};

/* ----------------------------------------------------------------------------------------------------- widen, pack */

static void every_code(void) {
    uint8_t code[256], scale[256];
    float f8[256], f4[32 * 256], one = 1;
    for (int i = 0; i < 256; i++) code[i] = scale[i] = (uint8_t)i;
    int64_t bad = 0, at = 0;
    struct exc_widen_args a = {code, EXC_F8_E4M3, (float[]){one, one}, EXC_F32, 1, 256, f8, EXC_F32, &bad, &at};
    assert_int_equal(exc_cpu_widen(queue_of(1), &a), EXC_OK);
    assert_int_equal(bad, 2);
    assert_int_equal(at, 0x7f);
    for (int i = 0; i < 256; i++)
        if ((i & 0x7f) != 0x7f) assert_true((double)f8[i] == e4m3(i) && !signbit(f8[i]) == !(i & 0x80));
    uint8_t row[16], rows[16 * 256]; /* all sixteen fp4 twice, under each of 256 scales */
    for (int i = 0; i < 16; i++) row[i] = (uint8_t)((2 * i % 16) | (2 * i + 1) % 16 << 4);
    for (int r = 0; r < 256; r++) memcpy(rows + 16 * r, row, 16);
    a = (struct exc_widen_args){rows, EXC_F4, scale, EXC_F8_E8M0, 256, 32, f4, EXC_F32, &bad, &at};
    assert_int_equal(exc_cpu_widen(queue_of(2), &a), EXC_OK);
    assert_int_equal(bad, 32);
    assert_int_equal(at, 255 * 32);
    for (int i = 0; i < 32 * 255; i++) assert_true(f4[i] == (float)(e2m1(i % 16) * e8m0(i / 32))); /* 2^127 times 6: infinity */
}

static void every_code_decodes(void **state) { at_every_level(every_code); }

static void widen_any_shape(void **state) {
    static const int64_t sizes[][2] = {{0, 32}, {1, 32}, {31, 96}, {127, 160}, {129, 256}, {300, 288}};
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (size_t d = 0; d < EXC_COUNT(kinds); d++) {
            int64_t n = sizes[s][0], k = sizes[s][1] + (kinds[d].dtype == EXC_F4 ? 0 : 1);
            coded m = make(kinds[d].dtype, kinds[d].scale_dtype, n, k, 3 + s);
            float *f = get((size_t)(n * k) * 4 + 4);
            double *w = get((size_t)(n * k) * 8 + 8);
            uint16_t *h = get((size_t)(n * k) * 2 + 2);
            void *const to[] = {f, w, h};
            static const int dtypes[] = {EXC_F32, EXC_F64, EXC_BF16};
            int64_t bad, at;
            for (int t = 0; t < 3; t++)
                assert_int_equal(exc_cpu_widen(queue_of(2), &(struct exc_widen_args){m.code, m.dtype, m.scale, m.scale_dtype, n, k, to[t],
                                                                                     dtypes[t], &bad, &at}), EXC_OK);
            assert_int_equal(bad, 0);
            assert_int_equal(at, -1);
            for (int64_t i = 0; i < n * k; i++) {
                double v = value(&m, i / k, i % k);
                assert_true(w[i] == v && f[i] == (float)v && h[i] == test_bf16((float)v));
            }
            assert_int_equal(((uint32_t *)f)[n * k], 0xffffffff);
            assert_int_equal(h[n * k], 0xffff);
            drop(&m);
            free(f);
            free(w);
            free(h);
        }
}

static void look_finds_bad_scales(void **state) {
    coded m = make(EXC_F8_E4M3, EXC_F32, 130, 140, 9);
    int64_t bad, at;
    ((float *)m.scale)[3] = INFINITY; /* the corner block, 2 x 12 */
    struct exc_widen_args a = {m.code, m.dtype, m.scale, m.scale_dtype, 130, 140, NULL, 0, &bad, &at};
    assert_int_equal(exc_cpu_widen(queue_of(2), &a), EXC_OK);
    assert_int_equal(bad, 24);
    assert_int_equal(at, 128 * 140 + 128);
    m.code[77] = 0xff;
    assert_int_equal(exc_cpu_widen(queue_of(1), &a), EXC_OK);
    assert_int_equal(bad, 25);
    assert_int_equal(at, 77);
    a.cols = 0;
    assert_int_equal(exc_cpu_widen(queue_of(1), &a), EXC_ERR_USAGE);
    a = (struct exc_widen_args){m.code, EXC_F4, m.scale, EXC_F32, 1, 32, NULL, 0, NULL, NULL};
    assert_int_equal(exc_cpu_widen(queue_of(1), &a), EXC_ERR_USAGE); /* fp4 has e8m0 scales */
    a = (struct exc_widen_args){m.code, EXC_F4, m.scale, EXC_F8_E8M0, 1, 33, NULL, 0, NULL, NULL};
    assert_int_equal(exc_cpu_widen(queue_of(1), &a), EXC_ERR_USAGE);
    drop(&m);
}

/* codes keep their bits, scales stand behind them, what pads a panel is zero; and the same matrix packed as numbers */
static void packs_as_it_is(void **state) {
    static const int64_t sizes[][2] = {{1, 32}, {16, 64}, {17, 128}, {129, 160}, {300, 288}};
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (size_t d = 0; d < EXC_COUNT(kinds); d++) {
            int f4 = kinds[d].dtype == EXC_F4;
            int64_t n = sizes[s][0], k = sizes[s][1] - (f4 ? 0 : 1), kk = sizes[s][1], nn = (n + 15) / 16 * 16;
            coded m = make(kinds[d].dtype, kinds[d].scale_dtype, n, k, 3 + s);
            exc_packed p = pack(&m, m.dtype), wide = pack(&m, EXC_F32), half = pack(&m, EXC_BF16);
            size_t panel = exc_packed_bytes(16, k, m.dtype), scales = (size_t)(f4 ? k / 32 * 16 : (k + 127) / 128 * 4);
            assert_int_equal(panel, (size_t)kk * (f4 ? 8 : 16) + (scales + 63) / 64 * 64);
            for (int64_t o = 0; o < nn; o++)
                for (int64_t i = 0; i < kk; i++) {
                    const uint8_t *at = (const uint8_t *)p.data + (size_t)(o / 16) * panel;
                    int inside = o < n && i < k, c = f4 ? at[i / 2 * 16 + o % 16] >> (i % 2 ? 4 : 0) & 15 : at[i / 2 * 32 + o % 16 * 2 + i % 2];
                    int want = !inside ? 0 : f4 ? m.code[(o * k + i) / 2] >> (i % 2 ? 4 : 0) & 15 : m.code[o * k + i];
                    assert_int_equal(c, want);
                    if (!inside) continue;
                    const uint8_t *scale = at + kk * (f4 ? 8 : 16);
                    double x = f4 ? e8m0(scale[i / 32 * 16 + o % 16]) : (double)((const float *)(const void *)scale)[i / 128];
                    assert_true(x == scale_at(&m, f4 ? o * m.scale_cols + i / 32 : o / 128 * m.scale_cols + i / 128));
                    float number = ((const float *)wide.data)[o / 16 * 16 * kk + i * 16 + o % 16];
                    uint16_t rounded = ((const uint16_t *)half.data)[o / 16 * 16 * kk + i / 2 * 32 + o % 16 * 2 + i % 2];
                    assert_true(number == (float)value(&m, o, i) && rounded == test_bf16(number));
                }
            free((void *)(uintptr_t)p.data);
            free((void *)(uintptr_t)wide.data);
            free((void *)(uintptr_t)half.data);
            drop(&m);
        }
    coded m = make(EXC_F4, EXC_F8_E8M0, 2, 32, 1);
    struct exc_pack_args a = {.w = m.code, .w_dtype = EXC_F4, .n = 2, .k = 33, .to = EXC_F4, .out = m.code, .scale = m.scale,
                              .scale_dtype = EXC_F8_E8M0};
    assert_int_equal(exc_cpu_pack(queue_of(1), &a), EXC_ERR_USAGE);
    a.k = 32;
    a.to = EXC_F8_E4M3;
    assert_int_equal(exc_cpu_pack(queue_of(1), &a), EXC_ERR_USAGE);
    a.to = EXC_F4;
    a.scale = NULL;
    assert_int_equal(exc_cpu_pack(queue_of(1), &a), EXC_ERR_USAGE);
    drop(&m);
}

/* --------------------------------------------------------------------------------------------------------- multiply */

/* activations: random, exact in bf16 */
static float *inputs(int64_t n, uint64_t seed) {
    float *x = get((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) x[i] = test_from_bf16(test_bf16(test_normal(seed, (uint64_t)i)));
    return x;
}

static void *as_act(const float *x, int64_t n, int act) {
    void *p = get((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) exc_store_act(x[i], p, i, act);
    return p;
}

/* one output: the sum, and the root of the sum of squared products */
static double product(const coded *m, int64_t row, const float *x, double *size) {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < m->k; i++) {
        double v = value(m, row, i) * (double)x[i];
        sum += v;
        square += v * v;
    }
    *size = 4 * sqrt((double)m->k) * 0x1p-24 * (sqrt(square) + fabs(sum)) + 1e-30;
    return sum;
}

static void one_matmul(int kind, int act, int64_t rows, int64_t n, int64_t k) {
    coded m = make(kinds[kind].dtype, kinds[kind].scale_dtype, n, k, 5);
    exc_packed p = pack(&m, m.dtype);
    float *x = inputs(rows * k, 6), *bias = inputs(n, 7), *y[2] = {get((size_t)(rows * n + 16) * 4), get((size_t)(rows * n + 16) * 4)};
    void *a = as_act(x, rows * k, act);
    for (int t = 0; t < 2; t++) {
        struct exc_matmul_args args = {.x = a, .x_stride = k, .act = act, .w = &p, .bias = bias, .y = y[t], .y_stride = n, .rows = rows};
        assert_int_equal(exc_cpu_matmul(queue_of(1 + 2 * t), &args), EXC_OK);
        assert_int_equal(((uint32_t *)y[t])[rows * n], 0xffffffff);
    }
    assert_memory_equal(y[0], y[1], (size_t)(rows * n) * 4);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t o = 0; o < n; o++) {
            double size, want = product(&m, o, x + t * k, &size) + (double)bias[o];
            if (!(fabs((double)y[0][t * n + o] - want) <= size + 0x1p-23 * fabs(want)))
                fail_msg("kind %d act %d [%d,%d]x%d: y[%d,%d] = %g, want %g", kind, act, (int)rows, (int)n, (int)k, (int)t, (int)o,
                         (double)y[0][t * n + o], want);
        }
    for (int64_t t = 0; t < rows; t += 5) { /* a row alone has the same bits */
        struct exc_matmul_args args = {.x = (uint8_t *)a + (size_t)(t * k) * (act == EXC_BF16 ? 2 : 4), .x_stride = k, .act = act, .w = &p,
                                       .bias = bias, .y = y[1], .y_stride = n, .rows = 1};
        assert_int_equal(exc_cpu_matmul(queue_of(1), &args), EXC_OK);
        assert_memory_equal(y[0] + t * n, y[1], (size_t)n * 4);
    }
    drop(&m);
    free((void *)(uintptr_t)p.data);
    void *all[] = {x, bias, y[0], y[1], a};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free(all[i]);
}

static void matmul_shapes(void) {
    static const int64_t rows[] = {0, 1, 2, 5, 11, 12, 13, 31, 70}, n[] = {1, 16, 33, 127, 200}, k[] = {32, 64, 128, 160, 288};
    int turn = 0;
    for (size_t d = 0; d < EXC_COUNT(kinds); d++)
        for (int act = 0; act < 2; act++)
            for (size_t r = 0; r < EXC_COUNT(rows); r++, turn++) {
                int64_t odd = kinds[d].dtype == EXC_F8_E4M3 ? turn % 3 : 0;
                one_matmul((int)d, act ? EXC_F32 : EXC_BF16, rows[r], n[turn % 5], k[turn / 2 % 5] - odd);
            }
}

static void matmul_at_every_level(void **state) { at_every_level(matmul_shapes); }

/* f64 sums of f64 inputs: only f64 rounds */
static void matvec_is_exact(void **state) {
    for (size_t d = 0; d < EXC_COUNT(kinds); d++) {
        int64_t n = 133, k = 160, rows = 9;
        coded m = make(kinds[d].dtype, kinds[d].scale_dtype, n, k, 8);
        exc_packed p = pack(&m, m.dtype);
        double *x = get((size_t)(rows * k) * 8), *y = get((size_t)(rows * n) * 8);
        for (int64_t i = 0; i < rows * k; i++) x[i] = (double)test_normal(4, (uint64_t)i);
        assert_int_equal(exc_cpu_matvec(queue_of(2), &(struct exc_matvec_args){.x = x, .w = &p, .rows = rows, .y = y}), EXC_OK);
        for (int64_t t = 0; t < rows; t++)
            for (int64_t o = 0; o < n; o++) {
                double sum = 0, size = 0;
                for (int64_t i = 0; i < k; i++) sum += value(&m, o, i) * x[t * k + i], size += fabs(value(&m, o, i) * x[t * k + i]);
                assert_true(fabs(y[t * n + o] - sum) <= 1e-14 * size);
            }
        drop(&m);
        free((void *)(uintptr_t)p.data);
        free(x);
        free(y);
    }
}

/* experts: both halves, with capture */
static void one_mlp(int kind, int act) {
    enum { E = 3, T = 37, K = 2, H = 160, I = 96 };
    coded g[E], u[E], d[E];
    exc_packed gate[E], up[E], down[E];
    for (int e = 0; e < E; e++) {
        g[e] = make(kinds[kind].dtype, kinds[kind].scale_dtype, I, H, 10 + (uint64_t)e);
        u[e] = make(kinds[kind].dtype, kinds[kind].scale_dtype, I, H, 20 + (uint64_t)e);
        d[e] = make(kinds[kind].dtype, kinds[kind].scale_dtype, H, I, 30 + (uint64_t)e);
        gate[e] = pack(&g[e], g[e].dtype);
        up[e] = pack(&u[e], u[e].dtype);
        down[e] = pack(&d[e], d[e].dtype);
    }
    int32_t ids[T * K], row_of[T * K], pair_of[T * K], slot[T];
    int64_t offset[E + 1];
    for (int t = 0; t < T; t++) ids[t * K] = t % 3, ids[t * K + 1] = (t + 1) % 3, slot[t] = t % 4 - 1;
    assert_int_equal(exc_cpu_permute(queue_of(1), &(struct exc_permute_args){ids, T, K, E, offset, row_of, pair_of}), EXC_OK);
    float *x = inputs(T * H, 40), *y = get(T * K * H * 4), *mid32 = get(T * K * I * 4);
    for (int i = 0; i < T * H; i++) x[i] *= 0x1p-4f; /* so that silu is used where it bends */
    void *a = as_act(x, T * H, act), *mid = get(T * K * I * 4);
    double mid_sum[E * I] = {0}, square[E] = {0};
    struct exc_glu_args first = {.x = a, .act = act, .gate = gate, .up = up, .offset = offset, .pair_of = pair_of, .tokens = T, .top_k = K,
                                 .experts = E, .hidden = H, .inner = I, .mid = mid, .slot = slot, .mid_sum = mid_sum, .w_dtype = gate->dtype};
    struct exc_down_args second = {.mid = mid, .act = act, .down = down, .offset = offset, .pair_of = pair_of, .tokens = T, .top_k = K,
                                   .experts = E, .hidden = H, .inner = I, .y = y, .slot = slot, .sqnorm_sum = square, .w_dtype = down->dtype};
    assert_int_equal(exc_cpu_glu(queue_of(2), &first), EXC_OK);
    assert_int_equal(exc_cpu_down(queue_of(2), &second), EXC_OK);
    double want_square[E] = {0};
    for (int64_t r = 0; r < T * K; r++) {
        int e = ids[pair_of[r]], t = pair_of[r] / K;
        for (int i = 0; i < I; i++) {
            double a1, a2, gv = product(&g[e], i, x + t * H, &a1), uv = product(&u[e], i, x + t * H, &a2);
            double want = gv / (1 + exp(-gv)) * uv;
            float got = act == EXC_F32 ? ((float *)mid)[r * I + i] : test_from_bf16(((uint16_t *)mid)[r * I + i]);
            mid32[r * I + i] = got;
            double room = 2 * (a1 * fabs(uv) + a2 * fabs(gv)) + fabs(want) * (act == EXC_BF16 ? 0x1.01p-8 : 0x1p-21) + 1e-12;
            if (!(fabs((double)got - want) <= room)) fail_msg("mid[%d,%d] = %g, want %g", (int)r, i, (double)got, want);
        }
        for (int h = 0; h < H; h++) {
            double size, want = product(&d[e], h, mid32 + r * I, &size);
            if (!(fabs((double)y[r * H + h] - want) <= size)) fail_msg("y[%d,%d] = %g, want %g", (int)r, h, (double)y[r * H + h], want);
            if (slot[t] >= 0) want_square[e] += (double)y[r * H + h] * (double)y[r * H + h];
        }
    }
    for (int e = 0; e < E; e++) assert_true(fabs(square[e] - want_square[e]) <= 1e-5 * want_square[e]);
    for (int e = 0; e < E; e++) {
        drop(&g[e]);
        drop(&u[e]);
        drop(&d[e]);
        free((void *)(uintptr_t)gate[e].data);
        free((void *)(uintptr_t)up[e].data);
        free((void *)(uintptr_t)down[e].data);
    }
    void *all[] = {x, y, mid32, a, mid};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free(all[i]);
}

static void mlps(void) {
    for (size_t d = 0; d < EXC_COUNT(kinds); d++) {
        one_mlp((int)d, EXC_BF16);
        one_mlp((int)d, EXC_F32);
    }
}

static void mlps_at_every_level(void **state) { at_every_level(mlps); }

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code_decodes), cmocka_unit_test(widen_any_shape),       cmocka_unit_test(look_finds_bad_scales),
        cmocka_unit_test(packs_as_it_is),     cmocka_unit_test(matmul_at_every_level), cmocka_unit_test(matvec_is_exact),
        cmocka_unit_test(mlps_at_every_level),
    };
    return cmocka_run_group_tests_name("codes", tests, NULL, NULL);
}
