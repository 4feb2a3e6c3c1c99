/* absorb.c - the ops of multi-head latent attention, latent, bundle and attend on the latent cache, against f64 loops at every instruction level this
 * machine has.
 *
 * Tolerances. f32 sums of k products err by about sqrt(k) * 2^-24 relative to sqrt(sum (x w)^2), four times that leaves room; a
 * stored bf16 adds half an ulp, 2^-8 of itself. Norms and rotations err by a few 2^-24. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "helpers.h"

static const char *const levels[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

static void at_every_level(void (*body)(void))
{
    exc_isa_lower(NULL);
    int best = (int)exc_isa_level();
    for (int i = 0; i <= best; i++) {
        exc_isa_lower(levels[i]);
        body();
    }
    exc_isa_lower(NULL);
}

static exc_queue *queue_of(int threads)
{
    static exc_ctx *open[9];
    if (!open[threads]) open[threads] = test_ctx(threads);
    return &open[threads]->queue;
}

static size_t size_of(int act) { return act == EXC_F32 ? 4 : 2; }

/* n values of act, every byte 0xa5, and 64 more bytes to guard */
static void *blank(int64_t n, int act)
{
    size_t bytes = (size_t)n * size_of(act);
    uint8_t *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xa5, (bytes + 127) / 64 * 64);
    return p;
}

static void guarded(const void *p, int64_t n, int act)
{
    for (int i = 0; i < 64; i++) assert_int_equal(((const uint8_t *)p)[(size_t)n * size_of(act) + (size_t)i], 0xa5);
}

static void *normals(int64_t n, uint64_t seed, float scale, int act)
{
    void *p = blank(n, act);
    for (int64_t i = 0; i < n; i++) {
        float x = scale * test_normal(seed, (uint64_t)i);
        if (act == EXC_F32) ((float *)p)[i] = x;
        else ((uint16_t *)p)[i] = test_bf16(x);
    }
    return p;
}

static double value(const void *p, int act, int64_t i)
{
    return act == EXC_F32 ? (double)((const float *)p)[i] : (double)test_from_bf16(((const uint16_t *)p)[i]);
}

/* not written: still the bytes of blank() */
static bool untouched(const void *p, int act, int64_t i)
{
    static const uint8_t old[4] = {0xa5, 0xa5, 0xa5, 0xa5};
    return !memcmp((const uint8_t *)p + (size_t)i * size_of(act), old, size_of(act));
}

static void close_to(double got, double want, double relative, double absolute, const char *what, int64_t at)
{
    if (!(fabs(got - want) <= relative * fabs(want) + absolute)) fail_msg("%s %d: %.9g, not %.9g", what, (int)at, got, want);
}

/* ------------------------------------------------------------------------------------------------------------ bundle */

static void bundle_case(int act, int weights, int64_t rows, int64_t heads, int64_t n, int64_t k, bool shared)
{
    int64_t xstep = shared ? 0 : k + 3, xs = shared ? k + 5 : heads * xstep, ystep = n + 7, ys = heads * ystep + 2;
    void *x = normals(rows * xs + 1, 21, 1, act), *first = NULL;
    exc_packed *w = calloc((size_t)heads, sizeof *w);
    void **plain = calloc((size_t)heads, sizeof *plain);
    for (int64_t h = 0; h < heads; h++) {
        plain[h] = normals(n * k, 30 + (uint64_t)h, 1, weights);
        void *out = blank((int64_t)exc_packed_bytes(n, k, weights), EXC_F32);
        w[h] = (exc_packed){out, n, k, weights};
        assert_int_equal(exc_cpu_pack(queue_of(2), &(struct exc_pack_args){plain[h], weights, n, k, weights, out}), EXC_OK);
    }
    for (int threads = 1; threads <= 3; threads++) {
        void *y = blank(rows * ys, act);
        assert_int_equal(exc_cpu_bundle(queue_of(threads), &(struct exc_bundle_args){.x = x, .x_stride = xs, .x_step = xstep, .act = act,
            .w = w, .heads = heads, .y = y, .y_stride = ys, .y_step = ystep, .rows = rows}), EXC_OK);
        guarded(y, rows * ys, act);
        if (!first) {
            first = y;
            continue;
        }
        assert_memory_equal(first, y, (size_t)(rows * ys) * size_of(act));
        free(y);
    }
    for (int64_t t = 0; t < rows; t++)
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t o = 0; o < n; o++) {
                double sum = 0, square = 0;
                for (int64_t i = 0; i < k; i++) {
                    double p = value(x, act, t * xs + h * xstep + i) * value(plain[h], weights, o * k + i);
                    sum += p;
                    square += p * p;
                }
                close_to(value(first, act, t * ys + h * ystep + o), sum, act == EXC_BF16 ? 0x1p-8 : 0,
                         4 * sqrt((double)k) * 0x1p-24 * sqrt(square), "bundle", o);
            }
            for (int64_t o = n; o < ystep; o++) assert_true(untouched(first, act, t * ys + h * ystep + o));
        }
    for (int64_t h = 0; h < heads; h++) {
        free((void *)(uintptr_t)w[h].data);
        free(plain[h]);
    }
    free(first);
    free(plain);
    free(w);
    free(x);
}

static void bundle_body(void)
{
    static const int64_t sizes[][4] = {{1, 1, 1, 1}, {3, 5, 24, 32}, {33, 4, 20, 31}, {2, 3, 127, 33}, {65, 2, 40, 96}, {1, 3, 512, 128},
                                       {0, 2, 8, 8}, {5, 40, 31, 16}};
    for (size_t s = 0; s < EXC_COUNT(sizes); s++)
        for (int c = 0; c < 6; c++) {
            int act = c / 2 ? EXC_F32 : EXC_BF16, weights = c / 2 == 2 ? EXC_F32 : EXC_BF16;
            bundle_case(act, weights, sizes[s][0], sizes[s][1], sizes[s][2], sizes[s][3], c & 1);
        }
}

static void test_bundle(void **state) { at_every_level(bundle_body); }

/* a row's bits are its own: the first rows of many are those of a few */
static void test_bundle_rows(void **state)
{
    int64_t n = 40, k = 70, heads = 3, rows = 130;
    for (int act = 0; act < 2; act++) {
        int dtype = act ? EXC_F32 : EXC_BF16;
        void *x = normals(rows * heads * k, 1, 1, dtype), *plain = normals(n * k, 2, 1, EXC_BF16), *all = blank(rows * heads * n, dtype),
             *some = blank(rows * heads * n, dtype), *out = blank((int64_t)exc_packed_bytes(n, k, EXC_BF16), EXC_F32);
        exc_packed w[3] = {{out, n, k, EXC_BF16}, {out, n, k, EXC_BF16}, {out, n, k, EXC_BF16}};
        assert_int_equal(exc_cpu_pack(queue_of(2), &(struct exc_pack_args){plain, EXC_BF16, n, k, EXC_BF16, out}), EXC_OK);
        struct exc_bundle_args a = {.x = x, .x_stride = heads * k, .x_step = k, .act = dtype, .w = w, .heads = heads, .y = all,
                                    .y_stride = heads * n, .y_step = n, .rows = rows};
        assert_int_equal(exc_cpu_bundle(queue_of(2), &a), EXC_OK);
        a.y = some;
        for (a.rows = 1; a.rows < 40; a.rows += 6) {
            assert_int_equal(exc_cpu_bundle(queue_of(2), &a), EXC_OK);
            assert_memory_equal(all, some, (size_t)(a.rows * heads * n) * size_of(dtype));
        }
        free(x);
        free(plain);
        free(all);
        free(some);
        free(out);
    }
}

/* ------------------------------------------------------------------------------------------------------------ latent */

typedef struct sizes {
    int64_t heads, plain, rotary, latent;
    int adjacent;
} sizes;

/* y = the rotating channels of x turned, in f64 */
static void turned(const float *x, const float *inv, const sizes *s, int32_t position, double *y)
{
    for (int64_t i = 0; i < s->rotary / 2; i++) {
        int64_t a = s->adjacent ? 2 * i : i, b = s->adjacent ? 2 * i + 1 : i + s->rotary / 2;
        double angle = (double)(float)((double)position * (double)inv[i]), u = (double)x[a], v = (double)x[b];
        y[a] = 1.25 * (u * cos(angle) - v * sin(angle));
        y[b] = 1.25 * (v * cos(angle) + u * sin(angle));
    }
}

static void latent_case(const sizes *s, int act, int expanded)
{
    enum { T = 9 };
    static const int32_t position[T] = {0, 1, 2, 3, 100, 4095, 40000, 163839, 1048575};
    static const int64_t cache_row[T] = {3, 4, 5, 6, 0, 1, 2, 9, 8};
    int64_t N = s->plain, R = s->rotary, C = s->latent, row = C + R, head = N + R, qs = s->heads * head + 3, ks = row + 5;
    int64_t plain_step = expanded ? head : N, turned_step = expanded ? head : row, U = T * s->heads;
    float *q = normals(T * qs, 1, 1, EXC_F32), *kv = normals(T * ks, 2, 3, EXC_F32), *w = normals(C, 3, 1, EXC_F32), inv[64];
    for (int64_t i = 0; i < R / 2; i++) inv[i] = (float)pow(10000.0, -2.0 * (double)i / (double)R);
    void *plain = blank(U * plain_step, act), *wide = blank(U * turned_step, act), *keys = blank(U * turned_step, act),
         *cache = blank(10 * row, act), *rows = blank(T * row, act);
    assert_int_equal(exc_cpu_latent(queue_of(2), &(struct exc_latent_args){.q = q, .q_stride = qs, .kv = kv, .kv_stride = ks, .weight = w,
        .eps = 1e-6f, .inv_freq = inv, .attention_factor = 1.25f, .adjacent = s->adjacent, .position = position, .cache_row = cache_row,
        .tokens = T, .heads = s->heads, .plain = N, .rotary = R, .latent = C, .q_plain = plain, .plain_step = plain_step,
        .q_turned = wide, .turned_step = turned_step, .k_turned = expanded ? keys : NULL, .cache = cache,
        .rows = expanded ? rows : NULL, .act = act}), EXC_OK);
    double near = 2e-6, ulp = act == EXC_BF16 ? 0x1p-8 : 1e-6, key[64], query[64];
    for (int64_t t = 0; t < T; t++) {
        double sum = 0;
        for (int64_t i = 0; i < C; i++) sum += pow((double)kv[t * ks + i], 2);
        turned(kv + t * ks + C, inv, s, position[t], key);
        for (int64_t i = 0; i < row; i++) {
            double want = i < C ? (double)w[i] * (double)kv[t * ks + i] / sqrt(sum / (double)C + 1e-6) : key[i - C];
            close_to(value(cache, act, cache_row[t] * row + i), want, ulp, 3 * near, "cache", i);
            if (expanded) assert_true(value(rows, act, t * row + i) == value(cache, act, cache_row[t] * row + i));
        }
        for (int64_t h = 0, u = t * s->heads; h < s->heads; h++, u++) {
            turned(q + t * qs + h * head + N, inv, s, position[t], query);
            for (int64_t i = 0; i < N; i++)
                close_to(value(plain, act, u * plain_step + i), (double)q[t * qs + h * head + i], act == EXC_BF16 ? 0x1p-8 : 0, 0, "plain", i);
            for (int64_t i = 0; i < R; i++) close_to(value(wide, act, u * turned_step + i), query[i], ulp, near, "query", i);
            for (int64_t i = 0; i < R && expanded; i++)
                assert_true(value(keys, act, u * turned_step + i) == value(cache, act, cache_row[t] * row + C + i));
            for (int64_t i = R; i < turned_step; i++) assert_true(untouched(wide, act, u * turned_step + i));
        }
    }
    for (int64_t i = 0; i < row; i++) assert_true(untouched(cache, act, 7 * row + i)); /* row 7 belongs to nobody */
    if (!expanded) assert_true(untouched(keys, act, 0) && untouched(rows, act, 0));
    guarded(plain, U * plain_step, act);
    guarded(wide, U * turned_step, act);
    guarded(keys, U * turned_step, act);
    guarded(cache, 10 * row, act);
    guarded(rows, T * row, act);
    free(q);
    free(kv);
    free(w);
    free(plain);
    free(wide);
    free(keys);
    free(cache);
    free(rows);
}

static void latent_body(void)
{
    static const sizes all[] = {{1, 1, 2, 1, 1}, {3, 31, 6, 33, 1}, {4, 24, 16, 32, 0}, {2, 33, 64, 130, 1}, {5, 0, 10, 127, 0}};
    for (size_t i = 0; i < EXC_COUNT(all); i++)
        for (int c = 0; c < 4; c++) latent_case(&all[i], c & 1 ? EXC_BF16 : EXC_F32, c >> 1);
}

static void test_latent(void **state) { at_every_level(latent_body); }

/* ------------------------------------------------------------------------------------------------------------ attend */

/* the absorbed form: one key head that all queries share, values the first C channels of the cached rows */
static void attend_case(int act, int64_t heads, int64_t C, int64_t R)
{
    enum { S = 4 };
    static const int64_t begin[S + 1] = {0, 1, 6, 8, 9}, length[S] = {1, 5, 130, 1100};
    int64_t base[S], rows = 0, W = C + R, T = begin[S];
    for (int s = 0; s < S; s++) base[s] = rows + 1, rows += length[s] + 1;
    void *q = normals(T * heads * W, 1, 1, act), *cache = normals((rows + 1) * W, 2, 1, act), *first = NULL;
    float scale = 1 / sqrtf((float)W);
    for (int threads = 1; threads <= 3; threads++) {
        void *out = blank(T * heads * C, act);
        assert_int_equal(exc_cpu_attend(queue_of(threads), &(struct exc_attend_args){.q = q, .cache_k = cache, .key_stride = W,
            .cache_v = cache, .value_stride = W, .q_begin = begin, .cache_begin = base, .length = length, .sequences = S,
            .q_heads = heads, .kv_heads = 1, .head_dim = W, .value_dim = C, .scale = scale, .out = out, .act = act,
            .tokens = begin[S], .longest = rows}), EXC_OK);
        guarded(out, T * heads * C, act);
        if (!first) {
            first = out;
            continue;
        }
        assert_memory_equal(first, out, (size_t)(T * heads * C) * size_of(act));
        free(out);
    }
    double *p = malloc(1100 * sizeof *p);
    for (int s = 0; s < S; s++)
        for (int64_t t = begin[s]; t < begin[s + 1]; t++)
            for (int64_t h = 0; h < heads; h += heads > 8 ? 23 : 1) {
                int64_t see = length[s] - (begin[s + 1] - begin[s]) + (t - begin[s]) + 1;
                double top = -INFINITY, total = 0;
                for (int64_t j = 0; j < see; j++) {
                    p[j] = 0;
                    for (int64_t c = 0; c < W; c++)
                        p[j] += value(q, act, (t * heads + h) * W + c) * value(cache, act, (base[s] + j) * W + c);
                    top = fmax(top, p[j] *= (double)scale);
                }
                for (int64_t j = 0; j < see; j++) total += p[j] = exp(p[j] - top);
                for (int64_t c = 0; c < C; c++) {
                    double sum = 0, size = 0;
                    for (int64_t j = 0; j < see; j++) {
                        double x = p[j] / total * value(cache, act, (base[s] + j) * W + c);
                        sum += x;
                        size += fabs(x);
                    }
                    close_to(value(first, act, (t * heads + h) * C + c), sum, act == EXC_BF16 ? 0x1p-8 : 0, 3e-6 * size, "attend", c);
                }
            }
    free(p);
    free(q);
    free(cache);
    free(first);
}

static void attend_body(void)
{
    static const int64_t shapes[][3] = {{1, 1, 2}, {3, 33, 6}, {70, 20, 10}, {129, 32, 16}, {2, 200, 24}};
    for (size_t i = 0; i < EXC_COUNT(shapes); i++)
        for (int c = 0; c < 2; c++) attend_case(c ? EXC_BF16 : EXC_F32, shapes[i][0], shapes[i][1], shapes[i][2]);
}

static void test_attend(void **state) { at_every_level(attend_body); }

static void test_refusals(void **state)
{
    exc_queue *q = queue_of(1);
    exc_packed f32 = {NULL, 4, 4, EXC_F32};
    assert_int_equal(exc_cpu_bundle(q, &(struct exc_bundle_args){.act = EXC_BF16, .w = &f32, .heads = 1, .rows = 1}), EXC_ERR_USAGE);
    assert_int_equal(exc_cpu_bundle(q, &(struct exc_bundle_args){.act = EXC_F32, .w = NULL, .heads = 1, .rows = 1}), EXC_ERR_USAGE);
    assert_int_equal(exc_cpu_bundle(q, &(struct exc_bundle_args){.act = EXC_F32, .w = &f32, .heads = 0, .rows = 1}), EXC_OK);
    struct exc_latent_args a = {.heads = 1, .plain = 2, .rotary = 3, .latent = 4, .act = EXC_F32};
    assert_int_equal(exc_cpu_latent(q, &a), EXC_ERR_USAGE);
    a.rotary = 2;
    assert_int_equal(exc_cpu_latent(q, &a), EXC_OK); /* no tokens */
    a.act = EXC_F16;
    assert_int_equal(exc_cpu_latent(q, &a), EXC_ERR_USAGE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bundle),
        cmocka_unit_test(test_bundle_rows),
        cmocka_unit_test(test_latent),
        cmocka_unit_test(test_attend),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
