/* orthogonal.c - the .cu twins that edit weights and find subspaces against their CPU definitions, which
 * algebra.c checks against f64.
 *
 * project: weights, c and integer counts are the CPU's bits, in place and out of place, whatever the shape
 * and the way the device takes; the sums before and after are f64 sums in another order, 1e-12 relative.
 * Sizes reach what is held in shared memory and what is found again in the cache (more than 576 rows), whole
 * and broken 16-byte pieces, one and several waves of chunks. */
#include <math.h>

#include "twin.h"

static size_t size_of(int dtype) { return dtype == EXC_F32 ? 4 : 2; }

static void fill(void *p, int dtype, int64_t n, uint64_t seed) {
    for (int64_t i = 0; i < n; i++) {
        float v = test_normal(seed, (uint64_t)i);
        if (dtype == EXC_F32)
            ((float *)p)[i] = v;
        else if (dtype == EXC_BF16)
            ((uint16_t *)p)[i] = test_bf16(v);
        else
            ((uint16_t *)p)[i] =
                (uint16_t)(0x3000 + exc_random_u64(seed, 1, (uint64_t)i) % 0xc00 + (v < 0 ? 0x8000 : 0));
    }
}

/* rows of length 1; what they are to each other does not matter here */
static float *units(int64_t rank, int64_t n, uint64_t seed) {
    float *b = malloc((size_t)(rank * n) * sizeof *b);
    for (int64_t r = 0; r < rank; r++) {
        double s = 0;
        for (int64_t i = 0; i < n; i++)
            b[r * n + i] = test_normal(seed + (uint64_t)r, (uint64_t)i),
                      s += (double)b[r * n + i] * (double)b[r * n + i];
        for (int64_t i = 0; i < n; i++) b[r * n + i] = (float)((double)b[r * n + i] / sqrt(s));
    }
    return b;
}

/* ----------------------------------------------------------------------------------------------------------------
 * project */

typedef struct edit {
    int dtype, side, norm;
    int64_t count, rows, cols, rank;
    int in_place, sums, want_c; /* what is asked for */
    int stacked;                /* base and stride instead of pointers */
    size_t offset;              /* of the first matrix from an aligned address, bytes */
    int odd_values;             /* NaN, infinities, -0, subnormal */
} edit;

static void describe(const edit *e, const char *what) {
    fail_msg(
        "%s: dtype %d side %d norm %d, %d x [%d,%d] rank %d, in place %d sums %d c %d stacked %d offset %d",
        what, e->dtype, e->side, e->norm, (int)e->count, (int)e->rows, (int)e->cols, (int)e->rank,
        e->in_place, e->sums, e->want_c, e->stacked, (int)e->offset);
}

/* results of one side */
typedef struct outcome {
    char *w;
    float *c;
    double before[8], after[8];
    int64_t changed[8], nonfinite[8];
} outcome;

static void odd_values(void *w, int dtype, int64_t n) {
    static const uint16_t bf[] = {0x8000, 0x0001, 0x7f81, 0xff80, 0x7f7f},
                          half[] = {0x8000, 0x0001, 0x7c01, 0xfc00, 0x7bff};
    for (int i = 0; i < 5 && i < n; i++) {
        int64_t at = (int64_t)i * 7919 % n;
        if (dtype == EXC_F32)
            ((uint32_t *)w)[at] = (uint32_t)bf[i] << 16;
        else
            ((uint16_t *)w)[at] = dtype == EXC_BF16 ? bf[i] : half[i];
    }
}

static void on_cpu(const edit *e, struct exc_project_args a, const void *w, outcome *o, size_t bytes) {
    const void *src[8];
    void *dst[8];
    memcpy(o->w, w, bytes * (size_t)e->count);
    for (int64_t i = 0; i < e->count; i++) src[i] = dst[i] = o->w + (size_t)i * bytes;
    a.src = src, a.dst = dst, a.c = e->want_c ? o->c : NULL;
    if (e->sums) a.before = o->before, a.after = o->after, a.changed = o->changed, a.nonfinite = o->nonfinite;
    assert_int_equal(exc_cpu_project(&twin.cpu->queue, &a), EXC_OK);
}

static void on_device(const edit *e, struct exc_project_args a, const void *w, outcome *o, size_t bytes,
                      int64_t c_size) {
    const void *src[8];
    void *dst[8];
    size_t all = bytes * (size_t)e->count, n = (size_t)e->count;
    char *from = twin_up_at(w, all, e->offset), *to = e->in_place ? from : twin_up_at(o->w, all, e->offset);
    for (int64_t i = 0; i < e->count; i++) src[i] = from + (size_t)i * bytes, dst[i] = to + (size_t)i * bytes;
    if (e->stacked)
        a.src_base = from, a.dst_base = to, a.src_stride = a.dst_stride = e->rows * e->cols;
    else
        a.src = twin_up(src, n * sizeof *src), a.dst = twin_up(dst, n * sizeof *dst);
    a.basis =
        twin_up(a.basis, (size_t)(e->rank * (e->side == EXC_SIDE_OUT ? e->rows : e->cols)) * sizeof *a.basis);
    a.strength = twin_up(a.strength, n * sizeof *a.strength);
    if (e->want_c) a.c = twin_up(o->c, (size_t)c_size * sizeof *a.c);
    if (e->sums) {
        a.before = twin_up(o->before, n * 8), a.after = twin_up(o->after, n * 8);
        a.changed = twin_up(o->changed, n * 8), a.nonfinite = twin_up(o->nonfinite, n * 8);
    }
    TWIN_RUN(project, &a);
    twin_down(o->w, to, all);
    if (e->want_c) twin_down(o->c, a.c, (size_t)c_size * sizeof *a.c);
    if (e->sums) {
        twin_down(o->before, a.before, n * 8), twin_down(o->after, a.after, n * 8);
        twin_down(o->changed, a.changed, n * 8), twin_down(o->nonfinite, a.nonfinite, n * 8);
    }
    if (!e->in_place) {
        char *still = malloc(all);
        twin_down(still, from, all);
        if (memcmp(still, w, all)) describe(e, "the source changed");
        free(still);
    }
    twin_done();
}

static int near(double a, double b) { return (a != a && b != b) || a == b || fabs(a - b) <= 1e-12 * fabs(b); }

static void both_agree(const edit *e) {
    int64_t along = e->side == EXC_SIDE_OUT ? e->rows : e->cols, n = e->rows * e->cols,
            c_size = e->count * e->rank * (n / along);
    size_t bytes = (size_t)n * size_of(e->dtype);
    char *w = malloc(bytes * (size_t)e->count);
    float strength[8], *basis = units(e->rank, along, 5);
    outcome o[2];
    memset(o, 0, sizeof o);
    for (int i = 0; i < 2; i++)
        o[i].w = calloc(bytes, (size_t)e->count), o[i].c = calloc((size_t)c_size, sizeof(float));
    for (int64_t i = 0; i < e->count; i++) {
        fill(w + (size_t)i * bytes, e->dtype, n, (uint64_t)(n + i));
        strength[i] = i % 3 == 1 ? 0.0f : i % 3 ? -0.5f : 1.0f;
        if (e->odd_values) odd_values(w + (size_t)i * bytes, e->dtype, n);
    }
    struct exc_project_args a = {.dtype = e->dtype,
                                 .count = e->count,
                                 .rows = e->rows,
                                 .cols = e->cols,
                                 .side = e->side,
                                 .basis = basis,
                                 .rank = e->rank,
                                 .strength = strength,
                                 .norm = e->norm};
    on_cpu(e, a, w, &o[0], bytes);
    on_device(e, a, w, &o[1], bytes, c_size);
    if (memcmp(o[0].w, o[1].w, bytes * (size_t)e->count)) describe(e, "the weights differ");
    for (int64_t i = 0; e->want_c && i < c_size; i++)
        if (memcmp(&o[0].c[i], &o[1].c[i], 4) && (o[0].c[i] == o[0].c[i] || o[1].c[i] == o[1].c[i]))
            describe(e, "c differs");
    for (int64_t i = 0; e->sums && i < e->count; i++) {
        if (o[0].changed[i] != o[1].changed[i]) describe(e, "changed differs");
        if (o[0].nonfinite[i] != o[1].nonfinite[i]) describe(e, "nonfinite differs");
        if (!near(o[1].before[i], o[0].before[i]) || !near(o[1].after[i], o[0].after[i]))
            describe(e, "the sums differ");
    }
    for (int i = 0; i < 2; i++) free(o[i].w), free(o[i].c);
    free(w), free(basis);
}

static void project_any_shape(void **state) {
    static const int64_t shapes[][2] = {{1, 1}, {31, 33}, {64, 128}, {127, 300}, {65, 8}, {200, 72}};
    static const int64_t ranks[] = {1, 2, 3, 4, 5, 9};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (size_t k = 0; k < EXC_COUNT(ranks); k++)
            for (int variant = 0; variant < 12; variant++) {
                int dtype = (int[]){EXC_BF16, EXC_F16, EXC_F32}[variant % 3], side = variant / 3 % 2,
                    asked = variant / 6;
                if (twin_small() && (s > 3 || k % 2 || (variant + (int)(s + k / 2)) % 4)) continue;
                if (twin_small() && twin_major() > 8 && (s < 2 || k)) continue;
                both_agree(&(edit){.dtype = dtype,
                                   .side = side,
                                   .norm = asked ? (int)(s + k) % 3 : EXC_NORM_NONE,
                                   .count = 1 + (int64_t)(s + k) % 3,
                                   .rows = shapes[s][0],
                                   .cols = shapes[s][1],
                                   .rank = ranks[k],
                                   .in_place = (int)k % 2,
                                   .sums = asked,
                                   .want_c = (int)(s + k) % 2,
                                   .stacked = (int)s % 2,
                                   .offset = s == 3 ? (dtype == EXC_F32 ? 4 : 6) : 0,
                                   .odd_values = s == 4});
            }
}

/* strips that do not fit shared memory, several waves of chunks, a ragged last strip; rows of a tile fewer
 * than 32 */
static void project_tall_and_wide(void **state) {
    if (twin_small() && twin_major() > 8) skip(); /* minutes under ThreadSanitizer; project_any_shape is that path */
    for (int variant = 0; variant < 8; variant += twin_small() ? 3 : 1) {
        int dtype = variant & 1 ? EXC_F32 : EXC_BF16, asked = variant >> 1 & 1, side = variant >> 2;
        edit e = {.dtype = dtype,
                  .side = side,
                  .norm = asked ? EXC_NORM_COLUMN : EXC_NORM_NONE,
                  .count = 2,
                  .rows = 2900,
                  .cols = 72,
                  .rank = 1 + variant % 4,
                  .in_place = asked,
                  .sums = asked,
                  .want_c = asked,
                  .stacked = variant % 2};
        if (side == EXC_SIDE_IN) e.rows = 21, e.cols = 5000;
        both_agree(&e);
    }
    both_agree(&(edit){.dtype = EXC_BF16, .count = 1, .rows = 16384, .cols = 40, .rank = 2});
    both_agree(&(edit){
        .dtype = EXC_F32, .side = EXC_SIDE_IN, .count = 1, .rows = 3, .cols = 16384, .rank = 1, .sums = 1});
    both_agree(
        &(edit){.dtype = EXC_BF16, .count = 2, .rows = 130, .cols = 40, .rank = 64, .sums = 1, .want_c = 1});
    both_agree(&(edit){.dtype = EXC_F32,
                       .side = EXC_SIDE_IN,
                       .count = 2,
                       .rows = 33,
                       .cols = 130,
                       .rank = 64,
                       .in_place = 1,
                       .sums = 1});
}

/* matrices of one call that begin at different distances from 16-byte addresses */
static void project_mixed_addresses(void **state) {
    enum { N = 4, H = 70, I = 40 };
    uint16_t w[N][H * I + 8], got[N][H * I + 8];
    float strength[N] = {1, 0.5f, 0, 1}, *basis = units(1, H, 3);
    const void *src[N], *host[N];
    void *dst[N], *to[N];
    for (int i = 0; i < N; i++) fill(w[i], EXC_BF16, H * I + 8, (uint64_t)i), host[i] = to[i] = w[i];
    for (int i = 0; i < N; i++) src[i] = dst[i] = twin_up_at(w[i], H * I * 2, i % 2 ? 2 : 0);
    struct exc_project_args a = {.src = host,
                                 .dst = to,
                                 .dtype = EXC_BF16,
                                 .count = N,
                                 .rows = H,
                                 .cols = I,
                                 .basis = basis,
                                 .rank = 1,
                                 .strength = strength},
                            d = a;
    d.src = twin_up(src, sizeof src), d.dst = twin_up(dst, sizeof dst);
    d.basis = twin_up(basis, H * 4), d.strength = twin_up(strength, sizeof strength);
    assert_int_equal(exc_cpu_project(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(project, &d);
    for (int i = 0; i < N; i++) {
        twin_down(got[i], dst[i], H * I * 2);
        assert_memory_equal(got[i], w[i], H * I * 2);
    }
    twin_done();
    free(basis);
}

static void project_refuses(void **state) {
    struct exc_project_args a = {.dtype = EXC_BF16, .rank = 1};
    assert_int_equal(TWIN_STATUS(project, &a), EXC_OK); /* no matrices, no rows */
    a.count = 3;
    assert_int_equal(TWIN_STATUS(project, &a), EXC_OK);
    a.rank = 65;
    assert_int_equal(TWIN_STATUS(project, &a), EXC_ERR_USAGE);
    a.rank = 1, a.dtype = EXC_I32;
    assert_int_equal(TWIN_STATUS(project, &a), EXC_ERR_USAGE);
    a.dtype = EXC_F32, a.norm = 3;
    assert_int_equal(TWIN_STATUS(project, &a), EXC_ERR_USAGE);
    a.norm = 0, a.rows = -1;
    assert_int_equal(TWIN_STATUS(project, &a), EXC_ERR_USAGE);
}

/* ------------------------------------------------------------------------------------------------- gram,
 * matvec, contrast */

/* Our own tiles give X^T X the CPU's order of samples: its bits. Otherwise: to the rounding of `depth` f64 additions on
 * either side */
static void gram_both_ways(void **state) {
    static const int64_t shapes[][4] = {{1, 1, 1, 1},     {2, 37, 33, 40}, {1, 130, 65, 65}, {3, 64, 64, 64},
                                        {2, 5, 200, 200}, {0, 4, 4, 4},    {1, 0, 3, 3}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int variant = 0; variant < 4; variant++) {
            int side = variant & 1, own = variant >> 1;
            int64_t layers = shapes[s][0], n = shapes[s][1], d = shapes[s][2], step = shapes[s][3],
                    size = side == EXC_GRAM_SAMPLES ? n : d, depth = side == EXC_GRAM_SAMPLES ? d : n;
            if (twin_small() && n > 64) continue;
            size_t count = (size_t)(layers * n * step), out = (size_t)(layers * size * size);
            float *x = malloc((count + 1) * 4);
            double *want = calloc(out + 1, 8), *got = calloc(out + 1, 8);
            fill(x, EXC_F32, (int64_t)count, s);
            struct exc_gram_args a = {.x = x,
                                      .layers = layers,
                                      .layer_stride = n * step,
                                      .samples = n,
                                      .row_stride = step,
                                      .width = d,
                                      .side = side,
                                      .g = want},
                                 b = a;
            b.x = twin_up(x, count * 4), b.g = twin_up(want, out * 8);
            assert_int_equal(exc_cpu_gram(&twin.cpu->queue, &a), EXC_OK);
            twin.gpu->queue.reproducible = own;
            TWIN_RUN(gram, &b);
            twin.gpu->queue.reproducible = 0;
            twin_down(got, b.g, out * 8);
            if (own && side == EXC_GRAM_WIDTH) assert_memory_equal(got, want, out * 8);
            for (int64_t l = 0; l < layers; l++)
                for (int64_t i = 0; i < size * size; i++) {
                    const double *g =
                        want + l * size * size; /* |x.y| <= |x| |y| bounds the magnitudes that were added */
                    double most = sqrt(g[i / size * (size + 1)] * g[i % size * (size + 1)]);
                    assert_true(fabs(got[l * size * size + i] - g[i]) <= (double)depth * 0x1p-52 * most);
                }
            twin_done();
            free(x), free(want), free(got);
        }
    struct exc_gram_args bad = {.layers = 1, .samples = 2, .width = 4, .row_stride = 3};
    assert_int_equal(TWIN_STATUS(gram, &bad), EXC_ERR_USAGE);
}

static void matvec_rows(void **state) {
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 16, 32}, {9, 33, 127}, {4, 100, 300}, {0, 5, 5}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int dtype = 0; dtype < 2; dtype++) {
            int64_t rows = shapes[s][0], n = shapes[s][1], k = shapes[s][2], kk = (k + 31) / 32 * 32,
                    nn = (n + 15) / 16 * 16;
            int type = dtype ? EXC_F32 : EXC_BF16;
            size_t size = size_of(type), bytes = (size_t)(nn * kk) * size;
            char *w = malloc((size_t)(n * k) * size), *plain = calloc(bytes, 1);
            void *packed = exc_alloc(NULL, exc_packed_bytes(n, k, type), 1, "a test matrix");
            double *x = malloc((size_t)(rows * k + 1) * 8), *want = calloc((size_t)(rows * n + 1), 8),
                   *got = calloc((size_t)(rows * n + 1), 8);
            fill(w, type, n * k, s);
            for (int64_t i = 0; i < rows * k; i++)
                x[i] = (double)test_normal(9, (uint64_t)i) * (1 + 1e-9 * (double)i);
            for (int64_t i = 0; i < n; i++)
                memcpy(plain + (size_t)(i * kk) * size, w + (size_t)(i * k) * size, (size_t)k * size);
            assert_int_equal(
                exc_cpu_pack(&twin.cpu->queue,
                             &(struct exc_pack_args){
                                 .w = w, .w_dtype = type, .n = n, .k = k, .to = type, .out = packed}),
                EXC_OK);
            exc_packed cpu = {packed, n, k, type}, gpu = {twin_up(plain, bytes), n, k, type};
            struct exc_matvec_args a = {x, &cpu, rows, want},
                                   b = {twin_up(x, (size_t)(rows * k) * 8), &gpu, rows,
                                        twin_up(want, (size_t)(rows * n) * 8)};
            assert_int_equal(exc_cpu_matvec(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(matvec, &b);
            twin_down(got, b.y, (size_t)(rows * n) * 8);
            for (int64_t i = 0; i < rows * n; i++)
                assert_true(fabs(got[i] - want[i]) <= (double)k * 0x1p-50 * (1 + fabs(want[i])));
            twin_done();
            free(w), free(plain), exc_release(packed), free(x), free(want), free(got);
        }
}

/* quantised: both pack the same codes and scales, and only f64 rounds */
static void matvec_codes(void **state) {
    static const int64_t shapes[][3] = {{1, 1, 32}, {5, 33, 160}, {9, 130, 288}};
    for (size_t c = 0; c < 2 * EXC_COUNT(shapes); c++) {
        int64_t rows = shapes[c / 2][0], n = shapes[c / 2][1], k = shapes[c / 2][2];
        int type = c % 2 ? EXC_F4 : EXC_F8_E4M3, scales = c % 2 ? EXC_F8_E8M0 : EXC_F32;
        size_t codes = (size_t)(n * k) / (c % 2 ? 2 : 1), count = (size_t)(c % 2 ? n * (k / 32) : (n + 127) / 128 * ((k + 127) / 128));
        size_t bytes = exc_packed_bytes(n, k, type);
        uint8_t *w = malloc(codes), scale8[2048];
        float scale4[64];
        for (size_t i = 0; i < codes; i++) w[i] = (uint8_t)(exc_random_u64(3, c, i) % 127);
        for (size_t i = 0; i < count && c % 2; i++) scale8[i] = (uint8_t)(120 + i % 9);
        for (size_t i = 0; i < count && !(c % 2); i++) scale4[i] = 0.01f * (float)(i + 1);
        const void *scale = c % 2 ? (void *)scale8 : (void *)scale4;
        void *packed = exc_alloc(NULL, bytes, 1, "a test matrix");
        double *x = malloc((size_t)(rows * k) * 8), *want = calloc((size_t)(rows * n), 8), *got = calloc((size_t)(rows * n), 8);
        for (int64_t i = 0; i < rows * k; i++) x[i] = (double)test_normal(9, (uint64_t)i);
        struct exc_pack_args here = {.w = w, .w_dtype = type, .n = n, .k = k, .to = type, .out = packed, .scale = scale, .scale_dtype = scales},
                             there = here;
        there.w = twin_up(w, codes);
        there.scale = twin_up(scale, count * (c % 2 ? 1 : 4));
        there.out = twin_up(packed, bytes);
        assert_int_equal(exc_cpu_pack(&twin.cpu->queue, &here), EXC_OK);
        TWIN_RUN(pack, &there);
        exc_packed cpu = {packed, n, k, type}, gpu = {there.out, n, k, type};
        struct exc_matvec_args a = {x, &cpu, rows, want},
                               b = {twin_up(x, (size_t)(rows * k) * 8), &gpu, rows, twin_up(want, (size_t)(rows * n) * 8)};
        assert_int_equal(exc_cpu_matvec(&twin.cpu->queue, &a), EXC_OK);
        TWIN_RUN(matvec, &b);
        twin_down(got, b.y, (size_t)(rows * n) * 8);
        for (int64_t i = 0; i < rows * n; i++)
            assert_true(fabs(got[i] - want[i]) <= (double)k * 0x1p-50 * (100 + fabs(want[i]))); /* terms of up to 100 */
        twin_done();
        free(w), exc_release(packed), free(x), free(want), free(got);
    }
}

/* the same draws: all that differs is log and erfc, a few ulp, and what a variance of such differences makes
 * of it */
static void contrast_draws_alike(void **state) {
    static const int64_t shapes[][4] = {{1, 1, 1, 5},   {60, 33, 40, 50}, {7, 300, 300, 17}, {300, 8, 9, 33},
                                        {3, 40, 40, 1}, {2, 40, 40, 0},   {0, 4, 4, 3}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++) {
        int64_t P = shapes[s][0], E = shapes[s][1], stride = shapes[s][2], B = P ? P + 3 : 0;
        if (twin_small() && s > 2) continue;
        uint32_t *t = calloc((size_t)(P * stride + 1), 4), *b = calloc((size_t)(B * stride + 1), 4);
        for (int64_t i = 0; i < P * stride; i++) t[i] = (uint32_t)(exc_random_u64(1, 0, (uint64_t)i) % 20);
        for (int64_t i = 0; i < B * stride; i++) b[i] = (uint32_t)(exc_random_u64(2, 0, (uint64_t)i) % 20);
        double *out[2][5];
        struct exc_contrast_args a[2];
        for (int i = 0; i < 2; i++) {
            for (int k = 0; k < 5; k++) out[i][k] = calloc((size_t)E, 8);
            a[i] = (struct exc_contrast_args){.target = t,
                                              .target_prompts = P,
                                              .baseline = b,
                                              .baseline_prompts = B,
                                              .stride = stride,
                                              .experts = E,
                                              .top_k = 4,
                                              .alpha = 0.5,
                                              .resamples = shapes[s][3],
                                              .seed = 9,
                                              .stream = 3};
        }
        struct exc_contrast_args *d = &a[1];
        a[0].log_ratio = out[0][0], a[0].se = out[0][1], a[0].z = out[0][2], a[0].p = out[0][3],
        a[0].risk = out[0][4];
        d->target = twin_up(t, (size_t)(P * stride) * 4), d->baseline = twin_up(b, (size_t)(B * stride) * 4);
        double **to[5] = {&d->log_ratio, &d->se, &d->z, &d->p, &d->risk};
        for (int k = 0; k < 5; k++) *to[k] = twin_up(out[1][k], (size_t)E * 8);
        assert_int_equal(exc_cpu_contrast(&twin.cpu->queue, &a[0]), EXC_OK);
        TWIN_RUN(contrast, d);
        for (int k = 0; k < 5; k++) {
            twin_down(out[1][k], *to[k], (size_t)E * 8);
            for (int64_t e = 0; e < E; e++) {
                double w = out[0][k][e], g = out[1][k][e];
                if (!(w == g || fabs(w - g) <= 1e-9 * fabs(w) + 1e-12))
                    fail_msg("shape %d, output %d, expert %d: %.17g, not %.17g", (int)s, k, (int)e, g, w);
            }
        }
        twin_done();
        for (int i = 0; i < 10; i++) free(out[i / 5][i % 5]);
        free(t), free(b);
    }
}

/* ----------------------------------------------------------------------------------------------------------------
 * subspace */

/* sine of the largest angle from a row of `got` to the span of the rows of `want` that are not zero */
static double apart(const float *got, const float *want, int64_t rank, int64_t d) {
    double most = 0;
    for (int64_t r = 0; r < rank; r++) {
        double *rest = malloc((size_t)d * sizeof *rest), out = 0;
        for (int64_t k = 0; k < d; k++) rest[k] = (double)got[r * d + k];
        for (int pass = 0; pass < 2; pass++)
            for (int64_t m = 0; m < rank; m++) {
                double c = 0;
                for (int64_t k = 0; k < d; k++) c += rest[k] * (double)want[m * d + k];
                for (int64_t k = 0; k < d; k++) rest[k] -= c * (double)want[m * d + k];
            }
        for (int64_t k = 0; k < d; k++) out += rest[k] * rest[k];
        most = fmax(most, sqrt(out));
        free(rest);
    }
    return most;
}

/* the CPU's subspaces meet an exact oracle in algebra.c to 1e-6; so two answers are 2e-6 apart at most */
static void subspace_meets_the_cpu(void **state) {
    static const int64_t shapes[][3] = {{20, 31, 3},   {150, 33, 4},  {170, 110, 3},
                                        {130, 127, 8}, {300, 101, 9}, {1, 5, 2},
                                        {7, 40, 7},    {3, 2, 2},     {0, 9, 1},
                                        {90, 120, 3},  {101, 85, 2},  {110, 128, 60}, /* much for 99 KB a block */
                                        {97, 97, 1}}; /* more than a block diagonalises: the library, or `own`, sweeps */
    for (size_t turn = 0; turn < 2 * EXC_COUNT(shapes); turn++) {
        size_t s = turn / 2, own = turn % 2;
        if (own && (shapes[s][0] < 97 || shapes[s][1] < 97)) continue;
        int64_t n = shapes[s][0], d = shapes[s][1], rank = shapes[s][2], L = 2, step = d + (int64_t)s % 3;
        if (twin_small() && s != 0 && s != 5 && s != 12) continue;
        size_t size = (size_t)(L * n * step), basis = (size_t)(L * rank * d),
               bytes = exc_subspace_bytes(L, n, d, rank, 2);
        float *x = calloc(size + 1, 4), *dirs = units(rank, d, 77), *b[2], singular[2][128] = {{0}};
        double energy[2][2], residual[2][2];
        for (int64_t i = 0; i < L * n; i++)
            for (int64_t k = 0; k < d; k++) {
                x[i * step + k] = 0.3f * test_normal(9, (uint64_t)(i * d + k));
                for (int64_t r = 0; r < rank; r++)
                    x[i * step + k] +=
                        (float)(3 + rank - r) * test_normal(100 + (uint64_t)r, (uint64_t)i) * dirs[r * d + k];
            }
        for (int i = 0; i < 2; i++) b[i] = calloc(basis, 4);
        void *work = malloc(bytes);
        struct exc_subspace_args a = {.x = x,
                                      .layers = L,
                                      .layer_stride = n * step,
                                      .samples = n,
                                      .row_stride = step,
                                      .width = d,
                                      .rank = rank,
                                      .seed = 1,
                                      .basis = b[0],
                                      .singular = singular[0],
                                      .energy = energy[0],
                                      .residual = residual[0],
                                      .work = work,
                                      .work_bytes = bytes},
                                 g = a;
        assert_int_equal(exc_cpu_subspace(&twin.cpu->queue, &a), EXC_OK);
        g.x = twin_up(x, size * 4), g.basis = twin_up(b[1], basis * 4),
        g.singular = twin_up(singular[1], (size_t)(L * rank) * 4);
        g.energy = twin_up(energy[1], 16), g.residual = twin_up(residual[1], 16);
        twin.gpu->queue.reproducible = (int)own;
        TWIN_RUN(subspace, &g);
        twin.gpu->queue.reproducible = 0;
        twin_down(b[1], g.basis, basis * 4), twin_down(singular[1], g.singular, (size_t)(L * rank) * 4);
        twin_down(energy[1], g.energy, 16), twin_down(residual[1], g.residual, 16);
        for (int64_t l = 0; l < L; l++) {
            float *mine = b[1] + l * rank * d, *theirs = b[0] + l * rank * d;
            if (!(apart(mine, theirs, rank, d) <= 2e-6 && apart(theirs, mine, rank, d) <= 2e-6))
                fail_msg("shape %d layer %d: %g apart", (int)s, (int)l, apart(mine, theirs, rank, d));
            if (!(residual[1][l] <= 1e-6) || fabs(energy[1][l] - energy[0][l]) > 1e-6)
                fail_msg("shape %d: residual %g energy %.9g not %.9g", (int)s, residual[1][l], energy[1][l],
                         energy[0][l]);
            for (int64_t r = 0; r < rank; r++) {
                double most = 1e-6 * (double)singular[0][l * rank];
                if (fabs((double)singular[0][l * rank + r] - (double)singular[1][l * rank + r]) > most)
                    fail_msg("shape %d: singular %g, not %g", (int)s, (double)singular[1][l * rank + r],
                             (double)singular[0][l * rank + r]);
            }
        }
        twin_done();
        free(x), free(dirs), free(b[0]), free(b[1]), free(work);
    }
}

/* all samples zero; NaN among them: nothing hangs, and it shows */
static void subspace_of_nothing(void **state) {
    enum { N = 40, D = 24 };
    float *x = calloc(N * D, 4), basis[D], singular[1];
    double energy, residual;
    for (int nan = 0; nan < 2; nan++) {
        if (nan) x[77] = NAN;
        struct exc_subspace_args a = {
            .layers = 1, .layer_stride = N * D, .samples = N, .row_stride = D, .width = D, .rank = 1};
        a.x = twin_up(x, N * D * 4), a.basis = twin_up(basis, sizeof basis),
        a.singular = twin_up(singular, 4);
        a.energy = twin_up(&energy, 8), a.residual = twin_up(&residual, 8);
        TWIN_RUN(subspace, &a);
        twin_down(basis, a.basis, sizeof basis), twin_down(singular, a.singular, 4);
        twin_down(&energy, a.energy, 8), twin_down(&residual, a.residual, 8);
        if (nan) assert_true(isnan(energy));
        for (int k = 0; k < D && !nan; k++) assert_true(basis[k] == 0);
        if (!nan) assert_true(singular[0] == 0 && energy == 0 && residual == 0);
        twin_done();
    }
    free(x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(project_any_shape),       cmocka_unit_test(project_tall_and_wide),
        cmocka_unit_test(project_mixed_addresses), cmocka_unit_test(project_refuses),
        cmocka_unit_test(gram_both_ways),          cmocka_unit_test(matvec_rows), cmocka_unit_test(matvec_codes),
        cmocka_unit_test(contrast_draws_alike),    cmocka_unit_test(subspace_meets_the_cpu),
        cmocka_unit_test(subspace_of_nothing),
    };
    return cmocka_run_group_tests_name("orthogonal", tests, twin_open, twin_close);
}
