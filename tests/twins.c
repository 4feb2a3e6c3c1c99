/* twins.c - the .cu twins of the row-wise ops against their CPU definitions, which the other suites check against f64.
 *
 * Sizes are odd on purpose, arrays lie between guard bytes, and the same cases run under several thread orders (HC_SEED),
 * with eager streams (HC_DEFER=0), with guarded pages (HC_GUARD=1) and under sanitizers: CMakeLists.txt lists the runs. */
#include "twin.h"

#include <math.h>

/* ---------------------------------------------------------------------------------------------------------------- norm */

static void norm_rows(void **state) {
    static const int64_t shapes[][2] = {{0, 8}, {1, 1}, {5, 31}, {3, 128}, {33, 64}, {2, 1027}, {3, 2048}, {127, 36}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int variant = 0; variant < 8; variant++) {
            int act = variant & 1 ? EXC_BF16 : EXC_F32, centred = variant >> 1 & 1, wide = variant >> 2;
            if (twin_small() && (shapes[s][0] * shapes[s][1] > 2100 || variant % 3)) continue;
            int64_t rows = shapes[s][0], dim = shapes[s][1], xs = dim + (wide ? 5 : 0), ys = dim + (wide ? 4 : 0);
            size_t size = act == EXC_BF16 ? 2 : 4, nx = (size_t)(rows * xs), bytes = (size_t)(rows * ys) * size;
            float *x = twin_normals(nx, s + 1, 3), *w = twin_normals((size_t)dim, 99, 1);
            char *want = calloc(bytes + 1, 1), *got = calloc(bytes + 1, 1);
            if (rows > 2) x[2 * xs] = NAN;
            struct exc_norm_args a = {x, xs, w, centred, 1e-6f, rows, dim, want, ys, act}, d = a;
            d.x = twin_up_at(x, nx * 4, wide ? 4 : 0);
            d.weight = twin_up(w, (size_t)dim * 4);
            d.y = twin_up(want, bytes);
            assert_int_equal(exc_cpu_norm(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(norm, &d);
            twin_down(got, d.y, bytes);
            /* a sum of dim squares in another order: sqrt(dim) ulp at worst, half of it after the root */
            if (act == EXC_F32) twin_close_f32((float *)got, (float *)want, (size_t)(rows * ys), 8e-6, 0, "norm");
            else twin_close_bf16((uint16_t *)got, (uint16_t *)want, (size_t)(rows * ys), 1, 100, "norm");
            twin_done();
            free(x), free(w), free(want), free(got);
        }
}

static void norm_refuses(void **state) {
    struct exc_norm_args a = {.rows = -1, .dim = 4, .act = EXC_F32};
    assert_int_equal(TWIN_STATUS(norm, &a), EXC_ERR_USAGE);
    a = (struct exc_norm_args){.rows = 0, .dim = 4, .act = EXC_F16};
    assert_int_equal(TWIN_STATUS(norm, &a), EXC_ERR_USAGE);
}

/* ------------------------------------------------------------------------------------- embed, lens, rope, latent */

static void embed_rows(void **state) {
    static const int64_t shapes[][2] = {{0, 8}, {1, 1}, {5, 31}, {33, 64}, {3, 1028}, {2, 8191}};
    static const int dtypes[] = {EXC_F32, EXC_BF16, EXC_F16};
    enum { V = 17 };
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (size_t d = 0; d < EXC_COUNT(dtypes); d++) {
            if (twin_small() && shapes[s][0] * shapes[s][1] > 200) continue;
            int64_t T = shapes[s][0], H = shapes[s][1];
            size_t size = dtypes[d] == EXC_F32 ? 4 : 2, n = (size_t)(T * H);
            int32_t ids[64];
            for (int t = 0; t < 64; t++) ids[t] = t * 7 % V;
            uint8_t *table = malloc(V * (size_t)H * size); /* any bits: widening is exact for all of them */
            for (size_t i = 0; i < V * (size_t)H * size; i++) table[i] = (uint8_t)exc_random_u64(s, d, i);
            float *want = calloc(n + 1, 4), *got = calloc(n + 1, 4);
            struct exc_embed_args a = {table, dtypes[d], ids, T, H, want}, g = a;
            g.table = twin_up_at(table, V * (size_t)H * size, s % 2 * size);
            g.ids = twin_up(ids, sizeof ids);
            g.out = twin_up(want, n * 4);
            assert_int_equal(exc_cpu_embed(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(embed, &g);
            twin_down(got, g.out, n * 4);
            assert_memory_equal(got, want, n * 4);
            twin_done();
            free(table), free(want), free(got);
        }
}

static void lens_rows(void **state) {
    static const int64_t shapes[][3] = {{0, 8, 1}, {1, 1, 1}, {5, 31, 0}, {33, 127, 3}, {3, 1024, 16}, {2, 4099, 5}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++) {
        if (twin_small() && shapes[s][0] * shapes[s][1] > 200) continue;
        int64_t T = shapes[s][0], H = shapes[s][1], R = shapes[s][2];
        float *y = twin_normals((size_t)(T * H), s, 1), *b = twin_normals((size_t)(R * H), 50 + s, 1 / sqrtf((float)H)), *got = twin_normals((size_t)(T * H), 0, 1);
        struct exc_lens_args a = {y, T, H, b, R, 0.7f}, g = a;
        g.y = twin_up(y, (size_t)(T * H) * 4);
        g.basis = twin_up(b, (size_t)(R * H) * 4);
        assert_int_equal(exc_cpu_lens(&twin.cpu->queue, &a), EXC_OK);
        TWIN_RUN(lens, &g);
        twin_down(got, g.y, (size_t)(T * H) * 4);
        twin_close_f32(got, y, (size_t)(T * H), 4e-6, 4e-6, "lens"); /* dots of H terms of 1/sqrt(H) in another order */
        twin_done();
        free(y), free(b), free(got);
    }
}

static void rope_rows(void **state) {
    static const int64_t shapes[][5] = {{0, 2, 1, 8, 8}, {1, 1, 1, 2, 2}, {3, 4, 2, 31, 10}, {5, 8, 1, 64, 64}, {33, 3, 3, 128, 64}, {2, 7, 1, 256, 256}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int variant = 0; variant < 8; variant++) {
            if (twin_small() && (shapes[s][0] * shapes[s][3] > 100 || variant % 3)) continue;
            int64_t T = shapes[s][0], Q = shapes[s][1], KV = shapes[s][2], D = shapes[s][3], R = shapes[s][4];
            int64_t width = (Q + 2 * KV) * D + 3, cache = T + 3;
            int act = variant & 1 ? EXC_BF16 : EXC_F32, centred = variant >> 1 & 1, normed = variant >> 2;
            size_t size = act == EXC_BF16 ? 2 : 4, nx = (size_t)(T * width), bytes[3] = {(size_t)(T * Q * D) * size, (size_t)(cache * KV * D) * size, (size_t)(cache * KV * D) * size};
            float *x = twin_normals(nx, s, 2), *w = twin_normals((size_t)(2 * D), 7, 1), *freq = malloc((size_t)(R / 2) * 4);
            int32_t position[64];
            int64_t row[64];
            for (int64_t i = 0; i < R / 2; i++) freq[i] = (float)pow(1e4, -2.0 * (double)i / (double)R);
            for (int t = 0; t < 64; t++) position[t] = t % 5 == 4 ? 131071 + t : t, row[t] = (t + 2) % cache;
            char *want[3], *got[3];
            for (int i = 0; i < 3; i++) want[i] = calloc(bytes[i] + 1, 1), got[i] = calloc(bytes[i] + 1, 1);
            struct exc_rope_args a = {.q = x, .q_stride = width, .k = x + Q * D, .k_stride = width, .v = x + (Q + KV) * D, .v_stride = width,
                                      .q_norm = normed ? w : NULL, .k_norm = normed ? w + D : NULL, .eps = 1e-6f, .zero_centred = centred,
                                      .inv_freq = freq, .rotary = R, .attention_factor = 1.2f, .position = position, .cache_row = row,
                                      .tokens = T, .q_heads = Q, .kv_heads = KV, .head_dim = D, .q_out = want[0], .cache_k = want[1],
                                      .cache_v = want[2], .act = act}, g = a;
            const float *base = twin_up(x, nx * 4), *norms = twin_up(w, (size_t)(2 * D) * 4);
            g.q = base, g.k = base + Q * D, g.v = base + (Q + KV) * D;
            g.q_norm = normed ? norms : NULL, g.k_norm = normed ? norms + D : NULL;
            g.inv_freq = twin_up(freq, (size_t)(R / 2) * 4);
            g.position = twin_up(position, sizeof position);
            g.cache_row = twin_up(row, sizeof row);
            g.q_out = twin_up(want[0], bytes[0]);
            g.cache_k = twin_up(want[1], bytes[1]);
            g.cache_v = twin_up(want[2], bytes[2]);
            assert_int_equal(exc_cpu_rope(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(rope, &g);
            const void *out[] = {g.q_out, g.cache_k, g.cache_v};
            for (int i = 0; i < 3; i++) {
                twin_down(got[i], out[i], bytes[i]);
                /* without a norm the arithmetic is the same step by step; with one the sum of squares has another order */
                if (!normed) assert_memory_equal(got[i], want[i], bytes[i]);
                else if (act == EXC_F32) twin_close_f32((float *)got[i], (float *)want[i], bytes[i] / 4, 4e-6, 4e-6, "rope");
                else twin_close_bf16((uint16_t *)got[i], (uint16_t *)want[i], bytes[i] / 2, 1, 100, "rope");
                free(want[i]), free(got[i]);
            }
            twin_done();
            free(x), free(w), free(freq);
        }
}

/* Both forms of the attention, whole tiles and odd sizes, rows that no token owns; the device's bits do not depend on alignment. */
static void latent_tokens(void **state) {
    enum { T = 9, ROWS = 10, OUTPUTS = 5 };
    static const struct { int64_t heads, plain, rotary, latent; int adjacent; } sizes[] = {
        {1, 1, 2, 1, 1}, {3, 31, 6, 33, 1}, {9, 24, 16, 32, 0}, {2, 132, 64, 132, 1}, {8, 0, 66, 127, 0}, {7, 4, 0, 516, 1}};
    static const int32_t position[T] = {0, 1, 2, 3, 100, 4095, 40000, 163839, 1048575};
    static const int64_t cache_row[T] = {3, 4, 5, 6, 0, 1, 2, 9, 8};
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (int variant = 0; variant < 8; variant++) {
            if (twin_small() && (s % 3 != 1 || variant % 3)) continue;
            int act = variant & 1 ? EXC_BF16 : EXC_F32, expanded = variant >> 1 & 1, odd = variant >> 2;
            int64_t H = sizes[s].heads, N = sizes[s].plain, R = sizes[s].rotary, C = sizes[s].latent, U = T * H;
            int64_t tokens = variant == 5 ? 0 : twin_small() ? 2 : T, qs = H * (N + R) + (odd ? 3 : 4), ks = C + R + 4;
            int64_t plain_step = expanded ? N + R : N, turned_step = expanded ? N + R : C + R;
            size_t size = act == EXC_BF16 ? 2 : 4;
            size_t bytes[OUTPUTS] = {(size_t)(U * plain_step) * size, (size_t)(U * turned_step) * size,
                                     (size_t)(U * turned_step) * size, (size_t)(ROWS * (C + R)) * size, (size_t)(T * (C + R)) * size};
            float *q = twin_normals((size_t)(T * qs), 2 * s, 1), *kv = twin_normals((size_t)(T * ks), 2 * s + 1, 3), *w = twin_normals((size_t)C, 3, 1), inv[64] = {0};
            for (int64_t i = 0; i < R / 2; i++) inv[i] = (float)pow(1e4, -2.0 * (double)i / (double)R);
            kv[0] = NAN;
            char *want[OUTPUTS], *got[OUTPUTS];
            void *on[OUTPUTS];
            for (int i = 0; i < OUTPUTS; i++) {
                want[i] = malloc(bytes[i] + 1), got[i] = malloc(bytes[i] + 1);
                memset(want[i], 0x5a, bytes[i]); /* what nobody writes stays */
                on[i] = twin_up_at(want[i], bytes[i], odd * size);
            }
            struct exc_latent_args a = {.q = q, .q_stride = qs, .kv = kv, .kv_stride = ks, .weight = w, .eps = 1e-6f, .inv_freq = inv,
                                        .attention_factor = 1.25f, .adjacent = sizes[s].adjacent, .position = position, .cache_row = cache_row,
                                        .tokens = tokens, .heads = H, .plain = N, .rotary = R, .latent = C, .q_plain = want[0], .plain_step = plain_step,
                                        .q_turned = want[1], .turned_step = turned_step, .k_turned = expanded ? want[2] : NULL,
                                        .cache = want[3], .rows = expanded ? want[4] : NULL, .act = act}, g = a;
            g.q = twin_up_at(q, (size_t)(T * qs) * 4, odd ? 4 : 0);
            g.kv = twin_up(kv, (size_t)(T * ks) * 4);
            g.weight = twin_up(w, (size_t)C * 4);
            g.inv_freq = twin_up(inv, sizeof inv);
            g.position = twin_up(position, sizeof position);
            g.cache_row = twin_up(cache_row, sizeof cache_row);
            g.q_plain = on[0], g.q_turned = on[1], g.k_turned = expanded ? on[2] : NULL, g.cache = on[3], g.rows = expanded ? on[4] : NULL;
            assert_int_equal(exc_cpu_latent(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(latent, &g);
            for (int i = 0; i < OUTPUTS; i++) {
                twin_down(got[i], on[i], bytes[i]);
                /* turning and copying are the same step by step; the norm's sum of squares has another order */
                if (i < 3) assert_memory_equal(got[i], want[i], bytes[i]);
                else if (act == EXC_F32) twin_close_f32((float *)got[i], (float *)want[i], bytes[i] / 4, 4e-6, 0, "latent");
                else twin_close_bf16((uint16_t *)got[i], (uint16_t *)want[i], bytes[i] / 2, 1, 100, "latent");
            }
            for (int64_t t = 0; t < tokens && expanded; t++)
                assert_memory_equal(got[4] + (size_t)(t * (C + R)) * size, got[3] + (size_t)(cache_row[t] * (C + R)) * size, (size_t)(C + R) * size);
            if (!odd && tokens) { /* the same again where no row is aligned */
                void *apart = twin_up_at(kv, (size_t)(T * ks) * 4, 4);
                char *again = malloc(bytes[3] + 1);
                g.kv = apart;
                TWIN_RUN(latent, &g);
                twin_down(again, on[3], bytes[3]);
                assert_memory_equal(again, got[3], bytes[3]);
                free(again);
            }
            twin_done();
            for (int i = 0; i < OUTPUTS; i++) free(want[i]), free(got[i]);
            free(q), free(kv), free(w);
        }
}

/* ---------------------------------------------------------------------------------------------------- scale, convert */

static const int dtypes[] = {EXC_F32, EXC_BF16, EXC_F16, EXC_F64};
static size_t size_of(int dtype) { return dtype == EXC_F64 ? 8 : dtype == EXC_F32 ? 4 : 2; }

/* any bits of a dtype, among them NaN, infinity, subnormal numbers and ties of the next smaller dtype */
static void *any_bits(size_t n, int dtype, uint64_t seed) {
    size_t size = size_of(dtype);
    uint8_t *p = malloc(n * size + 16);
    for (size_t i = 0; i < n; i++) {
        uint64_t r = exc_random_u64(seed, 5, i);
        if (dtype == EXC_F32 && i % 3 == 0) r &= 0xffff8000u;
        if (dtype == EXC_F64 && i % 3) {
            double d = (double)test_normal(seed, i) * (i % 7 ? 1 : 1e-6) + (i % 3 == 1 ? 1e-12 : 0);
            memcpy(&r, &d, 8);
        }
        memcpy(p + i * size, &r, size);
    }
    return p;
}

static void scale_matrices(void **state) {
    static const int64_t sizes[] = {0, 1, 31, 4096, 4104, 9001};
    static const double factors[] = {0.3, 0, 1, -1e30, 1.0 + 0x1p-30, 2.5};
    enum { N = EXC_COUNT(factors) };
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (int d = 0; d < 3; d++)
            for (int in_place = 0; in_place < 2; in_place++) {
                if (twin_small() && sizes[s] != 31) continue;
                int64_t n = sizes[s];
                size_t bytes = (size_t)n * size_of(dtypes[d]);
                const void *src[N], *dsrc[N];
                void *dst[N], *ddst[N], *got = malloc(bytes + 1);
                int64_t want[3][N], have[3][N];
                for (size_t i = 0; i < N; i++) {
                    void *m = any_bits((size_t)n, dtypes[d], i + s);
                    src[i] = m;
                    dsrc[i] = twin_up_at(m, bytes, i % 2 * 4);
                    dst[i] = in_place ? m : calloc(bytes + 1, 1);
                    ddst[i] = in_place ? (void *)(uintptr_t)dsrc[i] : twin_up(dst[i], bytes);
                }
                struct exc_scale_args a = {.src = src, .dst = dst, .dtype = dtypes[d], .count = N, .n = n, .factor = factors,
                                           .changed = want[0], .nonfinite = want[1], .overflow = want[2]}, g = a;
                g.src = twin_up(dsrc, sizeof dsrc);
                g.dst = twin_up(ddst, sizeof ddst);
                g.factor = twin_up(factors, sizeof factors);
                g.changed = twin_up(have[0], sizeof have[0]);
                g.nonfinite = twin_up(have[1], sizeof have[1]);
                g.overflow = twin_up(have[2], sizeof have[2]);
                assert_int_equal(exc_cpu_scale(&twin.cpu->queue, &a), EXC_OK);
                TWIN_RUN(scale, &g);
                twin_down(have[0], g.changed, sizeof have[0]);
                twin_down(have[1], g.nonfinite, sizeof have[1]);
                twin_down(have[2], g.overflow, sizeof have[2]);
                assert_memory_equal(have, want, sizeof want);
                for (size_t i = 0; i < N; i++) {
                    twin_down(got, ddst[i], bytes);
                    assert_memory_equal(got, dst[i], bytes);
                    if (!in_place) free(dst[i]);
                    free((void *)(uintptr_t)src[i]);
                }
                twin_done();
                free(got);
            }
}

static int is_nan_at(const void *p, int dtype, size_t i) {
    if (dtype == EXC_F64) return isnan(((const double *)p)[i]);
    if (dtype == EXC_F32) return isnan(((const float *)p)[i]);
    uint16_t h = ((const uint16_t *)p)[i] & 0x7fff;
    return dtype == EXC_BF16 ? h > 0x7f80 : h > 0x7c00;
}

static void convert_all(void **state) {
    static const size_t sizes[] = {0, 1, 31, 128, 1000, 5003};
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (size_t from = 0; from < 4; from++)
            for (size_t to = 0; to < 5; to++) { /* 4: only looks */
                if (twin_small() && sizes[s] != 31) continue;
                size_t n = sizes[s], out = to < 4 ? n * size_of(dtypes[to]) : 0;
                void *src = any_bits(n, dtypes[from], s), *want = calloc(out + 1, 1), *got = calloc(out + 1, 1);
                int64_t count[2] = {7, 7}, at[2] = {7, 7};
                struct exc_convert_args a = {src, dtypes[from], to < 4 ? want : NULL, to < 4 ? dtypes[to] : 0, (int64_t)n, &count[0], &at[0]}, g = a;
                g.src = twin_up_at(src, n * size_of(dtypes[from]), s % 2 * 8);
                g.dst = to < 4 ? twin_up(want, out) : NULL;
                g.nonfinite = twin_up(&count[1], 8);
                g.index = twin_up(&at[1], 8);
                assert_int_equal(exc_cpu_convert(&twin.cpu->queue, &a), EXC_OK);
                TWIN_RUN(convert, &g);
                twin_down(&count[1], g.nonfinite, 8);
                twin_down(&at[1], g.index, 8);
                assert_int_equal(count[0], count[1]);
                assert_int_equal(at[0], at[1]);
                if (to < 4) twin_down(got, g.dst, out);
                for (size_t i = 0; to < 4 && i < n; i++) { /* NaN is NaN; all else bit for bit */
                    size_t size = size_of(dtypes[to]);
                    if (is_nan_at(want, dtypes[to], i) && is_nan_at(got, dtypes[to], i)) continue;
                    if (memcmp((char *)want + i * size, (char *)got + i * size, size)) fail_msg("%zu -> %zu, element %zu of %zu", from, to, i, n);
                }
                twin_done();
                free(src), free(want), free(got);
            }
}

/* ----------------------------------------------------------------------------------------------------------------- noise */

/* the CPU's bits; any cut of the stream gives the same numbers; mean, deviation and range are a uniform distribution's */
static void noise_numbers(void **state) {
    static const int64_t sizes[] = {0, 1, 31, 33, 1024, 70001};
    static const int kinds[] = {EXC_F32, EXC_BF16};
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (size_t d = 0; d < EXC_COUNT(kinds); d++) {
            if (twin_small() && sizes[s] > 1024) continue;
            int64_t n = sizes[s], cut = n / 3;
            size_t size = kinds[d] == EXC_F32 ? 4 : 2, bytes = (size_t)n * size, offset = s % 2 ? size : 0;
            char *want = calloc(bytes + 1, 1), *got = calloc(bytes + 1, 1);
            struct exc_noise_args a = {want, n, INT64_C(0xfffffff0), 7, 3, kinds[d], 0.5f}, g = a;
            assert_int_equal(exc_cpu_noise(&twin.cpu->queue, &a), EXC_OK);
            g.dst = twin_up_at(got, bytes, offset);
            TWIN_RUN(noise, &g);
            twin_down(got, g.dst, bytes);
            assert_memory_equal(got, want, bytes);
            twin_done();
            memset(got, 0, bytes);
            a.dst = got, a.n = cut;
            assert_int_equal(exc_cpu_noise(&twin.cpu->queue, &a), EXC_OK);
            a.dst = got + (size_t)cut * size, a.n = n - cut, a.first += cut;
            assert_int_equal(exc_cpu_noise(&twin.cpu->queue, &a), EXC_OK);
            assert_memory_equal(got, want, bytes);
            double sum = 0, squares = 0, most = 0;
            for (int64_t i = 0; i < n; i++) {
                double x = kinds[d] == EXC_F32 ? (double)((float *)want)[i] : (double)test_from_bf16(((uint16_t *)want)[i]);
                sum += x, squares += x * x, most = fmax(most, fabs(x));
            }
            assert_true(most <= 0.25 * sqrt(12) * 1.004); /* bf16 rounds up by half of 2^-7 */
            if (n > 70000) { /* five standard errors */
                assert_true(fabs(sum / (double)n) < 5 * 0.5 / sqrt((double)n));
                assert_true(fabs(squares / (double)n - 0.25) < 5 * 0.25 * sqrt(0.8 / (double)n));
            }
            free(want), free(got);
        }
}

static void refusals(void **state) {
    assert_int_equal(TWIN_STATUS(noise, (&(struct exc_noise_args){.n = -1, .dtype = EXC_F32})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(noise, (&(struct exc_noise_args){.n = 1, .dtype = EXC_F16})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(convert, (&(struct exc_convert_args){.n = 4, .src_dtype = EXC_I32})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(scale, (&(struct exc_scale_args){.dtype = EXC_F64})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(embed, (&(struct exc_embed_args){.tokens = 1, .hidden = 0})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(lens, (&(struct exc_lens_args){.tokens = -1, .hidden = 1})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(rope, (&(struct exc_rope_args){.q_heads = 1, .kv_heads = 1, .head_dim = 4, .rotary = 3})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(latent, (&(struct exc_latent_args){.heads = 1, .plain = 2, .rotary = 3, .latent = 4})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(latent, (&(struct exc_latent_args){.heads = 1, .rotary = 2, .latent = 4, .act = EXC_F16})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(latent, (&(struct exc_latent_args){.heads = 1, .latent = 0, .act = EXC_BF16})), EXC_ERR_USAGE);
}

/* ---------------------------------------------------------------------------------------------------------- memory, device */

static void memory_round_trip(void **state) {
    char data[1000], back[1000];
    void *p, *q;
    for (size_t i = 0; i < sizeof data; i++) data[i] = (char)i;
    exc_ctx *both[] = {twin.cpu, twin.gpu};
    for (int i = 0; i < 2; i++) {
        exc_ctx *c = both[i];
        assert_int_equal(exc_device_alloc(c, 1000, 1, "a", &p), EXC_OK);
        assert_int_equal(exc_device_alloc(c, 1000, 1, "b", &q), EXC_OK);
        assert_int_equal(exc_device_put(c, p, data, 1000), EXC_OK);
        assert_int_equal(exc_device_copy(c, q, p, 1000), EXC_OK);
        assert_int_equal(exc_device_zero(c, (char *)q + 10, 5), EXC_OK);
        assert_int_equal(exc_device_get(c, back, q, 1000), EXC_OK);
        assert_int_equal(exc_device_sync(c), EXC_OK);
        assert_memory_equal(back, data, 10);
        assert_memory_equal(back + 10, "\0\0\0\0\0", 5);
        assert_memory_equal(back + 15, data + 15, 985);
        exc_device_release(c, p);
        exc_device_release(c, q);
        exc_device_release(c, NULL);
    }
}

static void out_of_memory_says_how_much(void **state) {
    void *p;
    exc_status st = exc_device_alloc(twin.gpu, (size_t)1 << 50, 1, "weights of layer 3", &p);
    test_refused(twin.gpu, st, EXC_ERR_MEMORY, "weights of layer 3", "1024.0 TiB of device memory needed", "free on GPU 0", NULL);
    assert_null(p);
    exc_clear(twin.gpu);
    st = exc_device_alloc(twin.gpu, SIZE_MAX / 2, 3, "weights", &p);
    test_refused(twin.gpu, st, EXC_ERR_MEMORY, "more than memory can address", NULL);
    exc_clear(twin.gpu);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_rows),
        cmocka_unit_test(norm_refuses),
        cmocka_unit_test(embed_rows),
        cmocka_unit_test(lens_rows),
        cmocka_unit_test(rope_rows),
        cmocka_unit_test(latent_tokens),
        cmocka_unit_test(scale_matrices),
        cmocka_unit_test(convert_all),
        cmocka_unit_test(noise_numbers),
        cmocka_unit_test(refusals),
        cmocka_unit_test(memory_round_trip),
        cmocka_unit_test(out_of_memory_says_how_much),
    };
    return cmocka_run_group_tests_name("twins", tests, twin_open, twin_close);
}
