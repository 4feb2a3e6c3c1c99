/* stored.c - the .cu twin of edits in the stored formats (e4m3, fp4, and stochastic or exact rounding)
 * against requant.c, which round.c checks against f64.
 *
 * Codes, scales, c and counts are the CPU's bits, for every format, scale dtype, side and rounding; the sums
 * are f64 sums in another order, 1e-9 relative. With norms of rows a gain is a quotient of such sums, rounded
 * to f32: its bits might differ once in 1e8. */
#include <math.h>

#include "twin.h"

typedef struct edit {
    int dtype, scale_dtype, power, side, norm, rounding, in_place;
    int64_t count, rows, cols, rank;
    int plain; /* nothing but the result is wanted */
    int calm;  /* large codes are rare */
    int odd;   /* scales that are NaN, 0, negative, subnormal */
} edit;

enum { MOST = 4 };

typedef struct outcome {
    uint8_t *w[MOST], *scale[MOST];
    float *c;
    double before[MOST], after[MOST], moved[MOST], error[MOST], size[MOST];
    int64_t changed[MOST], nonfinite[MOST];
} outcome;

static void describe(const edit *e, const char *what) {
    fail_msg("%s: dtype %d scales %d power %d side %d norm %d rounding %d in place %d, %d x [%d,%d] rank %d",
             what, e->dtype, e->scale_dtype, e->power, e->side, e->norm, e->rounding, e->in_place,
             (int)e->count, (int)e->rows, (int)e->cols, (int)e->rank);
}

static size_t bytes_of(const edit *e) {
    return (size_t)(e->rows * e->cols) * (e->dtype == EXC_F4 ? 1 : e->dtype == EXC_F8_E4M3 ? 2 : 4) / 2;
}
static int64_t scales_of(const edit *e) {
    if (e->dtype == EXC_F4) return e->rows * (e->cols / 32);
    return e->dtype == EXC_F8_E4M3 ? (e->rows + 127) / 128 * ((e->cols + 127) / 128) : 0;
}
static size_t unit_of(const edit *e) {
    return e->scale_dtype == EXC_F32 ? 4 : e->scale_dtype == EXC_BF16 ? 2 : 1;
}

static void fill(const edit *e, uint8_t *w, uint8_t *scale, uint64_t seed) {
    size_t n = bytes_of(e);
    for (size_t i = 0; i < n; i++) {
        w[i] = (uint8_t)exc_random_u64(seed, 1, i);
        if (e->dtype == EXC_F8_E4M3 && (w[i] & 0x7f) == 0x7f && i % 5) w[i] ^= 0x40; /* few NaN */
        if (e->calm && i % 997) w[i] &= 0xdf;
    }
    if (e->dtype == EXC_BF16 || e->dtype == EXC_F16)
        for (size_t i = 0; i < n / 2; i++) {
            float v = test_normal(seed, i);
            ((uint16_t *)w)[i] =
                e->dtype == EXC_BF16
                    ? test_bf16(v)
                    : (uint16_t)(0x3000 + exc_random_u64(seed, 2, i) % 0xc00 + (v < 0 ? 0x8000 : 0));
        }
    for (int64_t i = 0; i < scales_of(e); i++) {
        uint8_t power = (uint8_t)(118 + exc_random_u64(seed, 3, (uint64_t)i) % 8);
        float f = e->power ? ldexpf(1, power - 127) : 0.01f + (float)exc_random_unit(seed, 4, (uint64_t)i);
        static const float odd_scales[] = {NAN, 0, -0.3f, 0x1p-140f, INFINITY, -NAN, -INFINITY};
        if (e->odd && i % 3 == 0) f = odd_scales[i / 3 % (int64_t)EXC_COUNT(odd_scales)];
        uint16_t half = test_bf16(f);
        if (e->scale_dtype == EXC_F32)
            memcpy(scale + 4 * i, &f, 4);
        else if (e->scale_dtype == EXC_BF16)
            memcpy(scale + 2 * i, &half, 2);
        else
            scale[i] = power;
    }
}

static int near(double a, double b) {
    return (a != a && b != b) || a == b || fabs(a - b) <= 1e-9 * fabs(b) + 1e-30;
}

static void both_agree(const edit *e) {
    int64_t along = e->side == EXC_SIDE_OUT ? e->rows : e->cols, whole = e->rows * e->cols / along,
            c_size = e->count * e->rank * whole;
    size_t bytes = bytes_of(e), scales = (size_t)scales_of(e) * unit_of(e), n = (size_t)e->count;
    float *basis = malloc((size_t)(e->rank * along) * 4), strength[MOST] = {1, 0, 0.7f, -1};
    uint8_t *w[MOST], *s[MOST];
    const void *src[2][MOST], *scale[2][MOST];
    void *dst[2][MOST], *scale_to[2][MOST];
    uint64_t stream[MOST] = {7, 1, 9, 2};
    static outcome o[2];
    memset(o, 0, sizeof o);
    for (int64_t i = 0; i < e->rank * along; i++)
        basis[i] = test_normal(3, (uint64_t)i) / sqrtf((float)along);
    for (int i = 0; i < 2; i++) o[i].c = calloc((size_t)c_size, 4);
    for (int64_t m = 0; m < e->count; m++) {
        w[m] = malloc(bytes), s[m] = calloc(scales + 1, 1);
        fill(e, w[m], s[m], (uint64_t)(m + 5));
        for (int i = 0; i < 2; i++) {
            o[i].w[m] = calloc(bytes, 1), o[i].scale[m] = calloc(scales + 1, 1);
            if (e->in_place) memcpy(o[i].w[m], w[m], bytes), memcpy(o[i].scale[m], s[m], scales);
        }
        src[0][m] = e->in_place ? o[0].w[m] : w[m], scale[0][m] = e->in_place ? o[0].scale[m] : s[m];
        dst[0][m] = o[0].w[m], scale_to[0][m] = o[0].scale[m];
        dst[1][m] = twin_up(o[1].w[m], bytes), scale_to[1][m] = twin_up(o[1].scale[m], scales);
        src[1][m] = e->in_place ? dst[1][m] : twin_up(w[m], bytes),
        scale[1][m] = e->in_place ? scale_to[1][m] : twin_up(s[m], scales);
    }
    struct exc_project_args a = {.src = src[0],
                                 .dst = dst[0],
                                 .dtype = e->dtype,
                                 .count = e->count,
                                 .rows = e->rows,
                                 .cols = e->cols,
                                 .side = e->side,
                                 .basis = basis,
                                 .rank = e->rank,
                                 .strength = strength,
                                 .norm = e->norm,
                                 .c = o[0].c,
                                 .before = o[0].before,
                                 .after = o[0].after,
                                 .changed = o[0].changed,
                                 .nonfinite = o[0].nonfinite,
                                 .rounding = e->rounding,
                                 .seed = 77,
                                 .stream = stream,
                                 .scale = scale[0],
                                 .scale_to = scale_to[0],
                                 .scale_dtype = e->scale_dtype,
                                 .scale_power = e->power,
                                 .moved = o[0].moved,
                                 .error = o[0].error,
                                 .size = o[0].size},
                            b = a;
    b.src = twin_up(src[1], n * 8), b.dst = twin_up(dst[1], n * 8), b.scale = twin_up(scale[1], n * 8),
    b.scale_to = twin_up(scale_to[1], n * 8);
    b.basis = twin_up(basis, (size_t)(e->rank * along) * 4), b.strength = twin_up(strength, n * 4),
    b.stream = twin_up(stream, n * 8);
    b.c = twin_up(o[1].c, (size_t)c_size * 4);
    b.before = twin_up(o[1].before, n * 8), b.after = twin_up(o[1].after, n * 8),
    b.moved = twin_up(o[1].moved, n * 8), b.error = twin_up(o[1].error, n * 8);
    b.size = twin_up(o[1].size, n * 8), b.changed = twin_up(o[1].changed, n * 8),
    b.nonfinite = twin_up(o[1].nonfinite, n * 8);
    if (e->plain) {
        a.before = a.after = a.moved = a.error = a.size = NULL, a.changed = a.nonfinite = NULL;
        b.before = b.after = b.moved = b.error = b.size = NULL, b.changed = b.nonfinite = NULL;
        if (e->plain > 1) a.c = b.c = NULL;
    }
    assert_int_equal(exc_cpu_project(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(project, &b);
    if (b.c) twin_down(o[1].c, b.c, (size_t)c_size * 4);
    if (!e->plain) {
        twin_down(o[1].before, b.before, n * 8), twin_down(o[1].after, b.after, n * 8),
            twin_down(o[1].moved, b.moved, n * 8), twin_down(o[1].error, b.error, n * 8);
        twin_down(o[1].size, b.size, n * 8), twin_down(o[1].changed, b.changed, n * 8),
            twin_down(o[1].nonfinite, b.nonfinite, n * 8);
    }
    for (int64_t i = 0; i < c_size; i++)
        if (memcmp(&o[0].c[i], &o[1].c[i], 4) && (o[0].c[i] == o[0].c[i] || o[1].c[i] == o[1].c[i]))
            describe(e, "c differs");
    for (int64_t m = 0; m < e->count; m++) {
        twin_down(o[1].w[m], dst[1][m], bytes), twin_down(o[1].scale[m], scale_to[1][m], scales);
        if (memcmp(o[0].scale[m], o[1].scale[m], scales)) describe(e, "scales differ");
        if (memcmp(o[0].w[m], o[1].w[m], bytes)) describe(e, "codes differ");
        if (o[0].changed[m] != o[1].changed[m] || o[0].nonfinite[m] != o[1].nonfinite[m])
            describe(e, "counts differ");
        if (!near(o[1].before[m], o[0].before[m]) || !near(o[1].after[m], o[0].after[m]) ||
            !near(o[1].size[m], o[0].size[m]))
            describe(e, "sums differ");
        if (!near(o[1].moved[m], o[0].moved[m]) || !near(o[1].error[m], o[0].error[m]))
            describe(e, "moved or error differs");
    }
    twin_done();
    for (int64_t m = 0; m < e->count; m++) {
        free(w[m]), free(s[m]);
        for (int i = 0; i < 2; i++) free(o[i].w[m]), free(o[i].scale[m]);
    }
    free(basis), free(o[0].c), free(o[1].c);
}

static void edits_of_every_format(void **state) {
    static const int formats[][3] = {{EXC_F8_E4M3, EXC_F32, 0},
                                     {EXC_F8_E4M3, EXC_BF16, 0},
                                     {EXC_F8_E4M3, EXC_F32, 1},
                                     {EXC_F8_E4M3, EXC_F8_E8M0, 1},
                                     {EXC_F4, EXC_F8_E8M0, 1},
                                     {EXC_BF16, 0, 0},
                                     {EXC_F16, 0, 0}};
    static const int64_t shapes[][2] = {{40, 32}, {130, 160}, {33, 288}};
    for (size_t f = 0; f < EXC_COUNT(formats); f++)
        for (size_t s = 0; s < EXC_COUNT(shapes); s++)
            for (int side = 0; side < 2; side++)
                for (int rounding = 0; rounding < 3; rounding++) {
                    int coded = formats[f][0] == EXC_F8_E4M3 || formats[f][0] == EXC_F4;
                    if ((!coded && rounding == EXC_ROUND_RN) || (twin_small() && (s || f % 2))) continue;
                    int64_t cols = shapes[s][1] - (formats[f][0] == EXC_F4 ? 0 : (int64_t)s);
                    int norm = side == EXC_SIDE_OUT ? (int)(f + s) % 3 : (int)(f + s) % 2;
                    both_agree(&(edit){.dtype = formats[f][0],
                                       .scale_dtype = formats[f][1],
                                       .power = formats[f][2],
                                       .side = side,
                                       .norm = norm,
                                       .rounding = rounding,
                                       .in_place = (int)(f + s + (size_t)side) % 2,
                                       .count = 1 + (int64_t)(f + s) % 4,
                                       .rows = shapes[s][0],
                                       .cols = cols,
                                       .rank = 1 + (int64_t)(s + f) % 3 * 2});
                }
}

/* What a cluster shares on Hopper: one to sixteen blocks, some with fewer rows or none, blocks of scales that two of them
 * share, ragged strips, rings that go round; all codes large, so that any may raise a scale, or few */
static void edits_in_clusters(void **state) {
    static const int64_t shapes[][2] = {{32, 16},   {96, 144},  {512, 128}, {608, 32},
                                        {640, 272}, {1056, 48}, {2912, 16}, {7168, 144}};
    static const int ranks[] = {1, 2, 5};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int variant = 0; variant < 6; variant++) {
            const int64_t rows = shapes[s][0];
            if ((twin_small() && (rows > 700 || variant % 2)) || (rows > 2000 && variant % 5)) continue;
            both_agree(&(edit){.dtype = EXC_F8_E4M3,
                               .scale_dtype = (int[]){EXC_F32, EXC_BF16, EXC_F8_E8M0}[variant % 3],
                               .power = variant % 3 == 2,
                               .in_place = (variant + (int)s) % 2,
                               .count = rows > 2000 ? 1 : 1 + (int64_t)(s + (size_t)variant) % 4,
                               .rows = rows,
                               .cols = shapes[s][1],
                               .rank = ranks[(s + (size_t)variant / 2) % 3],
                               .plain = variant / 2,
                               .calm = variant % 2});
        }
    both_agree(&(edit){.dtype = EXC_F8_E4M3, .count = 1, .rows = 256, .cols = 128, .rank = 64, .calm = 1});
    for (int plain = 0; plain < 3; plain++)
        both_agree(&(edit){.dtype = EXC_F8_E4M3, .count = 3, .rows = 1600, .cols = 48, .rank = 1, .plain = plain, .odd = 1});
}

/* factors go into scales, but for what a coarse scale cannot hold; 0 clears, 1 copies */
static void factors_of_every_format(void **state) {
    static const int formats[][3] = {{EXC_F8_E4M3, EXC_F32, 0},
                                     {EXC_F8_E4M3, EXC_BF16, 0},
                                     {EXC_F8_E4M3, EXC_F8_E8M0, 1},
                                     {EXC_F4, EXC_F8_E8M0, 1}};
    for (size_t f = 0; f < EXC_COUNT(formats); f++)
        for (int in_place = 0; in_place < 2; in_place++) {
            edit e = {.dtype = formats[f][0],
                      .scale_dtype = formats[f][1],
                      .power = formats[f][2],
                      .count = MOST,
                      .rows = 131,
                      .cols = 160};
            size_t bytes = bytes_of(&e), scales = (size_t)scales_of(&e) * unit_of(&e);
            uint8_t *w = malloc(bytes), *s = malloc(scales), *got = malloc(bytes),
                    *got_scale = malloc(scales), *to[MOST], *scale_to[MOST];
            const void *src[2][MOST], *scale[2][MOST];
            void *dst[2][MOST], *new_scale[2][MOST];
            double factor[MOST] = {1.7, 0, 1, -0.25};
            int64_t changed[2][MOST] = {{0}}, bad[2][MOST] = {{0}}, over[2][MOST] = {{0}};
            for (int m = 0; m < MOST; m++) {
                fill(&e, w, s, (uint64_t)m);
                to[m] = malloc(bytes), scale_to[m] = malloc(scales);
                memcpy(to[m], w, bytes), memcpy(scale_to[m], s, scales);
                src[0][m] = dst[0][m] = to[m], scale[0][m] = new_scale[0][m] = scale_to[m];
                src[1][m] = twin_up(w, bytes), scale[1][m] = twin_up(s, scales);
                dst[1][m] = in_place ? (void *)src[1][m] : twin_up(w, bytes),
                new_scale[1][m] = in_place ? (void *)scale[1][m] : twin_up(s, scales);
            }
            struct exc_scale_args a = {.src = src[0],
                                       .dst = dst[0],
                                       .dtype = e.dtype,
                                       .count = MOST,
                                       .n = e.rows * e.cols,
                                       .factor = factor,
                                       .changed = changed[0],
                                       .nonfinite = bad[0],
                                       .overflow = over[0],
                                       .rows = e.rows,
                                       .cols = e.cols,
                                       .scale = scale[0],
                                       .scale_to = new_scale[0],
                                       .scale_dtype = e.scale_dtype,
                                       .scale_power = e.power},
                                  b = a;
            b.src = twin_up(src[1], sizeof src[1]), b.dst = twin_up(dst[1], sizeof dst[1]),
            b.scale = twin_up(scale[1], sizeof scale[1]);
            b.scale_to = twin_up(new_scale[1], sizeof new_scale[1]),
            b.factor = twin_up(factor, sizeof factor);
            b.changed = twin_up(changed[1], sizeof changed[1]), b.nonfinite = twin_up(bad[1], sizeof bad[1]),
            b.overflow = twin_up(over[1], sizeof over[1]);
            assert_int_equal(exc_cpu_scale(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(scale, &b);
            twin_down(changed[1], b.changed, sizeof changed[1]),
                twin_down(bad[1], b.nonfinite, sizeof bad[1]), twin_down(over[1], b.overflow, sizeof over[1]);
            for (int m = 0; m < MOST; m++) {
                twin_down(got, dst[1][m], bytes), twin_down(got_scale, new_scale[1][m], scales);
                if (memcmp(got_scale, scale_to[m], scales))
                    fail_msg("format %d, matrix %d: scales differ", (int)f, m);
                if (memcmp(got, to[m], bytes)) fail_msg("format %d, matrix %d: codes differ", (int)f, m);
                if (changed[0][m] != changed[1][m] || bad[0][m] != bad[1][m] || over[0][m] != over[1][m])
                    fail_msg("format %d, matrix %d: %d changed, not %d", (int)f, m, (int)changed[1][m],
                             (int)changed[0][m]);
                free(to[m]), free(scale_to[m]);
            }
            twin_done();
            free(w), free(s), free(got), free(got_scale);
        }
}

/* more directions than shared memory holds the state of */
static void many_directions(void **state) {
    both_agree(&(edit){.dtype = EXC_F8_E4M3,
                       .scale_dtype = EXC_F32,
                       .rounding = EXC_ROUND_EXACT,
                       .count = 2,
                       .rows = 70,
                       .cols = 150,
                       .rank = 64});
    both_agree(&(edit){.dtype = EXC_BF16,
                       .rounding = EXC_ROUND_SR,
                       .side = EXC_SIDE_IN,
                       .count = 1,
                       .rows = 9,
                       .cols = 100,
                       .rank = 64,
                       .in_place = 1});
    /* just the 48 KB that a launch may have without leave, were it not for static shared memory */
    both_agree(&(edit){.dtype = EXC_F8_E4M3, .scale_dtype = EXC_F32, .count = 1, .rows = 128, .cols = 130, .rank = 24});
}

static void refused(void **state) {
    struct exc_project_args a = {
        .dtype = EXC_F4, .count = 1, .rows = 4, .cols = 40, .rank = 1, .scale_dtype = EXC_F8_E8M0};
    assert_int_equal(TWIN_STATUS(project, &a), EXC_ERR_USAGE); /* not whole groups */
    a.cols = 32;
    assert_int_equal(TWIN_STATUS(project, &a), EXC_ERR_USAGE); /* no scales */
    a.dtype = EXC_BF16, a.rounding = 3;
    assert_int_equal(TWIN_STATUS(project, &a), EXC_ERR_USAGE);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(edits_of_every_format),
        cmocka_unit_test(edits_in_clusters),
        cmocka_unit_test(factors_of_every_format),
        cmocka_unit_test(many_directions),
        cmocka_unit_test(refused),
    };
    return cmocka_run_group_tests_name("stored", tests, twin_open, twin_close);
}
