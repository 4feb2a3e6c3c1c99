/* factors.c - the op scale: products rounded once from f64, zero and one as promised, counts, odd lengths, guard bytes, every
 * instruction set. */
#include "tiny.h"

static exc_ctx *ctx;
static const char *const dtypes[] = {"BF16", "F16", "F32"};

/* f64 rounded once to the dtype: by halving the interval between neighbours, not by way of f32 */
static double expected(double x, const char *dtype) {
    double near = tiny_round(x, dtype), best = near;
    for (int step = -1; step <= 1; step += 2) {
        double other = tiny_round(near + step * fabs(near) * (strcmp(dtype, "F16") ? 0x1p-8 : 0x1p-11), dtype);
        if (strcmp(dtype, "F32") && fabs(other - x) < fabs(best - x)) best = other;
    }
    return best;
}

static void scale_op(void **state) {
    enum { N = 127, PAD = 8 };
    static const double factors[] = {0, 1, -0.3, 2};
    static const int types[] = {EXC_BF16, EXC_F16, EXC_F32};
    for (int d = 0; d < 3; d++)
        for (int n = 0; n <= N; n += n == 1 ? 30 : n == 31 ? 2 : n == 33 ? 94 : 1) {
            size_t unit = types[d] == EXC_F32 ? 4 : 2;
            uint8_t src[4][N * 4 + PAD], dst[4][N * 4 + PAD];
            const void *from[4];
            void *to[4];
            int64_t changed[4], bad[4], over[4];
            double value[4][N];
            for (int m = 0; m < 4; m++) {
                memset(dst[m], 0xa5, sizeof dst[m]);
                for (int i = 0; i < n; i++) {
                    value[m][i] = tiny_round((double)test_normal(9, (uint64_t)(m * N + i)), dtypes[d]);
                    if (i == 7) value[m][i] = (double)NAN;
                    if (i == 8) value[m][i] = types[d] == EXC_F16 ? 65504 : 3.3895313892515355e38; /* largest of bf16 */
                    float f = (float)value[m][i];
                    _Float16 h = (_Float16)f;
                    uint16_t bits = isnan(f) ? 0x7fc0 : test_bf16(f);
                    memcpy(src[m] + (size_t)i * unit, types[d] == EXC_F32 ? (void *)&f : types[d] == EXC_F16 ? (void *)&h : (void *)&bits, unit);
                }
                from[m] = src[m];
                to[m] = dst[m];
            }
            struct exc_scale_args a = {.src = from, .dst = to, .dtype = types[d], .count = 4, .n = n, .factor = factors, .changed = changed,
                                       .nonfinite = bad, .overflow = over};
            assert_int_equal(ctx->ops->scale(&ctx->queue, &a), EXC_OK);
            for (int m = 0; m < 4; m++) {
                for (size_t i = (size_t)n * unit; i < sizeof dst[m]; i++) assert_int_equal(dst[m][i], 0xa5);
                assert_int_equal(over[m], n > 8 && factors[m] == 2);
                assert_int_equal(bad[m], n > 7 && factors[m] != 1);
                if (factors[m] == 1) assert_memory_equal(dst[m], src[m], (size_t)n * unit);
                for (int i = 0; i < n && factors[m] != 1; i++) {
                    float f;
                    uint16_t h;
                    _Float16 half;
                    memcpy(&f, dst[m] + (size_t)i * unit, types[d] == EXC_F32 ? 4 : 0);
                    memcpy(&h, dst[m] + (size_t)i * unit, 2);
                    memcpy(&half, &h, 2);
                    double got = types[d] == EXC_F32 ? (double)f : types[d] == EXC_F16 ? (double)half : (double)test_from_bf16(h);
                    if (factors[m] == 0) assert_true(got == 0 && !signbit(got));
                    else if (i == 7) assert_true(isnan(got));
                    else if (i != 8) assert_true(got == expected(value[m][i] * factors[m], dtypes[d]));
                }
            }
        }
    struct exc_scale_args wrong = {.dtype = EXC_I32};
    assert_int_equal(ctx->ops->scale(&ctx->queue, &wrong), EXC_ERR_USAGE);
}

static void every_isa(void **state) {
    static const char *const levels[] = {"generic", "avx2", "avx512"};
    for (int i = 0; i < 3; i++) {
        exc_isa_lower(levels[i]);
        scale_op(state);
    }
    exc_isa_lower(NULL);
    scale_op(state);
}

int main(void) {
    ctx = test_ctx(2);
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_isa)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    exc_ctx_free(ctx);
    return failed;
}
