/* algebra.c - project, gram, subspace, contrast and the [stream] tier against f64 loops, at every instruction level here.
 *
 * Tolerances. project: ops.def asks for 99.9 % of bf16 elements equal to the f64 result rounded once, the rest one unit off;
 * f32 results err by the rounding of delta and difference, below 4 * 2^-24 of the largest term. gram: f64 sums of n exact
 * products, n * 2^-53 relative to the sum of magnitudes. subspace: angle 1e-6 (ops.def). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "helpers.h"

static const char *const levels[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

static int level_count(void) {
    exc_isa_lower(NULL);
    return (int)exc_isa_level() + 1;
}

static exc_ctx *ctx_of(int threads) {
    static exc_ctx *open[9];
    if (!open[threads]) open[threads] = test_ctx(threads);
    return open[threads];
}

static void *get(size_t bytes) {
    void *p = calloc(bytes + 64, 1);
    assert_non_null(p);
    memset((char *)p + bytes, 0x5a, 64);
    return p;
}

static void guarded(const void *p, size_t bytes) {
    for (int i = 0; i < 64; i++) assert_int_equal(((const unsigned char *)p)[bytes + (size_t)i], 0x5a);
}

static double half_value(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 0 ? ldexp(m, -24) : e == 31 ? (m ? NAN : INFINITY) : ldexp(m + 1024, e - 25);
    return h & 0x8000 ? -v : v;
}

static double value(const void *p, int dtype, int64_t i) {
    if (dtype == EXC_F32) return (double)((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return dtype == EXC_BF16 ? (double)test_from_bf16(h) : half_value(h);
}

static size_t size_of(int dtype) { return dtype == EXC_F32 ? 4 : 2; }

static void fill(void *p, int dtype, int64_t n, uint64_t seed) {
    for (int64_t i = 0; i < n; i++) {
        float v = test_normal(seed, (uint64_t)i);
        if (dtype == EXC_F32) ((float *)p)[i] = v;
        else if (dtype == EXC_BF16) ((uint16_t *)p)[i] = test_bf16(v);
        else ((uint16_t *)p)[i] = (uint16_t)(0x3000 + exc_random_u64(seed, 1, (uint64_t)i) % 0xc00 + (v < 0 ? 0x8000 : 0));
    }
}

/* orthonormal f32 rows, made in f64 */
static float *orthonormal(int64_t rank, int64_t n, uint64_t seed) {
    double *q = get((size_t)(rank * n) * sizeof *q);
    float *out = get((size_t)(rank * n) * sizeof *out);
    for (int64_t i = 0; i < rank; i++) {
        for (int64_t k = 0; k < n; k++) q[i * n + k] = (double)test_normal(seed + (uint64_t)i, (uint64_t)k);
        for (int pass = 0; pass < 2; pass++)
            for (int64_t j = 0; j < i; j++) {
                double d = 0;
                for (int64_t k = 0; k < n; k++) d += q[i * n + k] * q[j * n + k];
                for (int64_t k = 0; k < n; k++) q[i * n + k] -= d * q[j * n + k];
            }
        double s = 0;
        for (int64_t k = 0; k < n; k++) s += q[i * n + k] * q[i * n + k];
        for (int64_t k = 0; k < n; k++) out[i * n + k] = (float)(q[i * n + k] /= sqrt(s));
    }
    free(q);
    return out;
}

/* ---------------------------------------------------------------------------------------------------- project */

typedef struct edit {
    int dtype, side, norm;
    int64_t rows, cols, rank;
    float strength;
} edit;

/* the edited matrix in f64, and |R W|_F^2 */
static double *oracle(const edit *e, const void *w, const float *basis, double *before) {
    int64_t n = e->rows * e->cols, along = e->side == EXC_SIDE_OUT ? e->rows : e->cols, across = n / along;
    int64_t step = e->side == EXC_SIDE_OUT ? e->cols : 1, jump = e->side == EXC_SIDE_OUT ? 1 : e->cols;
    double *out = get((size_t)n * sizeof *out);
    *before = 0;
    for (int64_t i = 0; i < n; i++) out[i] = value(w, e->dtype, i);
    for (int64_t j = 0; j < across; j++) {
        double c[64] = {0};
        for (int64_t r = 0; r < e->rank; r++) {
            for (int64_t h = 0; h < along; h++) c[r] += (double)basis[r * along + h] * value(w, e->dtype, h * step + j * jump);
            *before += c[r] * c[r];
        }
        for (int64_t h = 0; h < along; h++)
            for (int64_t r = 0; r < e->rank; r++)
                out[h * step + j * jump] -= (double)e->strength * (double)basis[r * along + h] * c[r];
    }
    int by_row = e->norm == EXC_NORM_ROW || e->side == EXC_SIDE_IN;
    int64_t vectors = by_row ? e->rows : e->cols, length = n / vectors;
    for (int64_t v = 0; e->norm && v < vectors; v++) {
        double old = 0, now = 0;
        for (int64_t k = 0; k < length; k++) {
            int64_t at = by_row ? v * e->cols + k : k * e->cols + v;
            old += value(w, e->dtype, at) * value(w, e->dtype, at), now += out[at] * out[at];
        }
        for (int64_t k = 0; k < length; k++) out[by_row ? v * e->cols + k : k * e->cols + v] *= sqrt(old / now);
    }
    return out;
}

static int order_of(uint16_t h) { return h & 0x8000 ? -(h & 0x7fff) : h; }

static void close_to(const edit *e, const void *got, const double *want) {
    int64_t n = e->rows * e->cols, wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        if (e->dtype == EXC_BF16) {
            int off = abs(order_of(test_bf16((float)want[i])) - order_of(((const uint16_t *)got)[i]));
            /* next to nothing is left: the f32 rounding of the parts shows, not that of the result */
            if (fabs(want[i]) > 1e-3) assert_in_range(off, 0, 1);
            wrong += off != 0;
        } else {
            double most = e->dtype == EXC_F16 ? fabs(want[i]) * 0x1p-11 + 0x1p-20 : 32 * 0x1p-24 + fabs(want[i]) * 0x1p-22;
            assert_true(fabs(value(got, e->dtype, i) - want[i]) <= most * 1.01);
        }
    }
    assert_true((double)wrong <= 1 + 1e-3 * (double)n);
}

static void one_edit(const edit *e) {
    int64_t n = e->rows * e->cols, along = e->side == EXC_SIDE_OUT ? e->rows : e->cols;
    size_t bytes = (size_t)n * size_of(e->dtype);
    void *w = get(bytes), *first = NULL;
    fill(w, e->dtype, n, (uint64_t)(n + e->rank));
    float *basis = orthonormal(e->rank, along, 5), *c = get((size_t)(e->rank * n / along * 2) * sizeof *c);
    double sum, *want = oracle(e, w, basis, &sum);
    for (int level = 0, most = level_count(); level < most; level++)
        for (int threads = 1; threads <= 3; threads += 2)
            for (int in_place = 0; in_place < 2; in_place++) {
                exc_isa_lower(levels[level]);
                void *out = get(bytes), *still = get(bytes);
                memcpy(still, w, bytes);
                if (in_place) memcpy(out, w, bytes);
                const void *src[2] = {in_place ? out : w, w};
                void *dst[2] = {out, still};
                double before[2], after[2];
                int64_t changed[2], bad[2], differ = 0;
                struct exc_project_args a = {.src = src, .dst = dst, .dtype = e->dtype, .count = 2, .rows = e->rows, .cols = e->cols,
                                             .side = e->side, .basis = basis, .rank = e->rank,
                                             .strength = (float[]){e->strength, 0}, .norm = e->norm, .c = c, .before = before,
                                             .after = after, .changed = changed, .nonfinite = bad};
                assert_int_equal(exc_cpu_project(&ctx_of(threads)->queue, &a), EXC_OK);
                guarded(out, bytes);
                assert_memory_equal(still, w, bytes);
                close_to(e, out, want);
                for (int64_t i = 0; i < n; i++)
                    differ += memcmp((char *)out + (size_t)i * size_of(e->dtype), (char *)w + (size_t)i * size_of(e->dtype),
                                     size_of(e->dtype)) != 0;
                assert_int_equal(changed[0], differ);
                assert_int_equal(changed[1], 0);
                assert_int_equal(bad[0], 0);
                assert_true(fabs(before[0] - sum) <= 1e-5 * sum + 1e-12);
                assert_true(fabs(before[1] - after[1]) <= 0);
                if (e->strength == 1 && !e->norm) assert_true(after[0] <= before[0] * 1e-3 + (double)n * 1e-5);
                a.before = a.after = NULL, a.changed = a.nonfinite = NULL, a.c = NULL;
                void *plain = get(bytes);
                a.dst = (void *[]){plain, still};
                a.src = (const void *[]){w, w};
                assert_int_equal(exc_cpu_project(&ctx_of(threads)->queue, &a), EXC_OK);
                assert_memory_equal(plain, out, bytes); /* asking for sums changes nothing */
                free(plain), free(still);
                if (first) assert_memory_equal(out, first, bytes), free(out);
                else first = out;
            }
    exc_isa_lower(NULL);
    free(first), free(w), free(want), free(basis), free(c);
}

static void project_everywhere(void **state) {
    (void)state;
    static const int dtypes[] = {EXC_BF16, EXC_F16, EXC_F32};
    static const int64_t shapes[][2] = {{1, 1}, {31, 33}, {64, 127}, {127, 300}, {200, 16}};
    static const int64_t ranks[] = {1, 2, 3, 4, 8};
    for (int s = 0; s < 5; s++)
        for (int d = 0; d < 3; d++)
            for (int side = 0; side < 2; side++)
                for (int k = 0; k < 5; k++) {
                    int64_t along = shapes[s][side];
                    if (ranks[k] > along) continue;
                    int norm = along > 8 * ranks[k] ? (s + k) % 3 : EXC_NORM_NONE;
                    one_edit(&(edit){dtypes[d], side, norm, shapes[s][0], shapes[s][1], ranks[k], k % 2 ? 0.5f : 1.0f});
                }
    one_edit(&(edit){EXC_BF16, EXC_SIDE_OUT, EXC_NORM_NONE, 130, 40, 64, 1.0f});
}

/* the fast paths for plain bf16 edits: as when sums are asked for, which they leave to the general path; NaN and huge values too,
 * and subnormal numbers in all matrices, in one, and as differences */
static void plain_edits_agree(void **state) {
    (void)state;
    enum { SUBNORMAL, SOME, PLAIN, TINY, BAD, KINDS };
    static const int64_t shapes[][2] = {{1, 128}, {63, 128}, {129, 384}, {200, 256}, {127, 130}, {66, 96}, {2047, 1536}};
    for (int s = 0; s < 7; s++)
        for (int64_t rank = 1; rank <= (s < 6 ? 9 : 3) && rank <= shapes[s][0]; rank++)
            for (int kind = 0; kind < (s < 6 ? KINDS : 1); kind++) { /* the last: too large for a cache */
                enum { N = 5 };
                int64_t rows = shapes[s][0], cols = shapes[s][1], n = rows * cols, changed[N];
                size_t bytes = (size_t)n * 2;
                float *basis = orthonormal(rank, rows, 9);
                for (int64_t k = 0; kind == SOME && k < rank * rows; k += 3) basis[k] = 0; /* weights that nothing is added to */
                const void *src[N], *in_place[N];
                void *want[N], *out[N], *here[N];
                for (int i = 0; i < N; i++) {
                    uint16_t *w = exc_alloc(NULL, bytes, 1, "a test matrix");
                    want[i] = get(bytes), out[i] = exc_alloc(NULL, bytes, 1, "a test matrix"), here[i] = exc_alloc(NULL, bytes, 1, "a test matrix");
                    fill(w, EXC_BF16, n, (uint64_t)i);
                    for (int64_t k = 0; kind == TINY && k < n; k++) w[k] = (uint16_t)(w[k] & 0x80ff); /* about 2^-126 */
                    for (int64_t k = 0; k < n; k += 41)
                        w[k] = (uint16_t)(k % 2 ? 0x8000 : kind == PLAIN || (kind == SOME && i != 2) ? 0 : k % 64); /* -0, 0, subnormal */
                    if (kind == BAD && i % 2) w[n / 2] = 0x7f81, w[n / 3] = 0xff80, w[n - 1] = 0x7f7f, w[0] = 0x7f7f;
                    memcpy(here[i], w, bytes);
                    src[i] = w, in_place[i] = here[i];
                }
                struct exc_project_args a = {.src = src, .dst = want, .dtype = EXC_BF16, .count = N, .rows = rows, .cols = cols,
                                             .basis = basis, .rank = rank, .strength = (float[]){1, 0.5f, -1, 2, 1}, .changed = changed};
                assert_int_equal(exc_cpu_project(&ctx_of(1)->queue, &a), EXC_OK);
                a.changed = NULL;
                for (int threads = 1; threads <= 3; threads += 2) {
                    a.src = src, a.dst = out;
                    assert_int_equal(exc_cpu_project(&ctx_of(threads)->queue, &a), EXC_OK);
                    for (int i = 0; i < N; i++) assert_memory_equal(out[i], want[i], bytes);
                }
                a.src = in_place, a.dst = here;
                assert_int_equal(exc_cpu_project(&ctx_of(2)->queue, &a), EXC_OK);
                for (int i = 0; i < N; i++) {
                    assert_memory_equal(here[i], want[i], bytes);
                    guarded(want[i], bytes);
                    free(want[i]), exc_release(out[i]), exc_release(here[i]), exc_release((void *)src[i]);
                }
                free(basis);
            }
}

/* row norms of EXC_SIDE_OUT go another way through the matrix: the numbers are those of the plain edit, times one factor a row */
static void row_norms_scale_the_plain_edit(void **state) {
    (void)state;
    enum { H = 130, I = 77 };
    float *w = get(H * I * 4), *plain = get(H * I * 4), *scaled = get(H * I * 4);
    fill(w, EXC_F32, H * I, 12);
    for (int level = 0; level < level_count(); level++)
        for (int64_t rank = 1; rank <= 9; rank++) {
            float *basis = orthonormal(rank, H, 9);
            exc_isa_lower(levels[level]);
            struct exc_project_args a = {.src = (const void *[]){w}, .dst = (void *[]){plain}, .dtype = EXC_F32, .count = 1, .rows = H,
                                         .cols = I, .basis = basis, .rank = rank, .strength = (float[]){0.7f}};
            assert_int_equal(exc_cpu_project(&ctx_of(2)->queue, &a), EXC_OK);
            a.dst = (void *[]){scaled}, a.norm = EXC_NORM_ROW;
            assert_int_equal(exc_cpu_project(&ctx_of(2)->queue, &a), EXC_OK);
            for (int h = 0; h < H; h++) {
                double before = 0, after = 0;
                int same = 0;
                for (int i = 0; i < I; i++) {
                    before += (double)w[h * I + i] * (double)w[h * I + i];
                    after += (double)plain[h * I + i] * (double)plain[h * I + i];
                }
                float g = (float)sqrt(before / after), near[3] = {g, nextafterf(g, 0), nextafterf(g, 9)};
                for (int k = 0; k < 3 && !same; k++) {
                    same = 1;
                    for (int i = 0; i < I; i++) same = same && scaled[h * I + i] == plain[h * I + i] * near[k];
                }
                if (!same) fail_msg("%s, rank %d, row %d: other numbers than those of the plain edit", levels[level], (int)rank, h);
            }
            free(basis);
        }
    exc_isa_lower(NULL);
    free(w), free(plain), free(scaled);
}

static void project_edges(void **state) {
    (void)state;
    enum { H = 70, I = 40 };
    uint16_t *w = get(H * I * 2), *old = get(H * I * 2);
    float basis[H] = {[3] = 1};
    fill(w, EXC_BF16, H * I, 3);
    for (int h = 0; h < H; h++) w[h * I + 1] = 0x8000; /* a column of -0 */
    w[5 * I + 2] = 0x7f80, w[6 * I + 7] = 0x7fc0;
    memcpy(old, w, H * I * 2);
    int64_t bad;
    struct exc_project_args a = {.src = (const void *[]){w}, .dst = (void *[]){w}, .dtype = EXC_BF16, .count = 1, .rows = H, .cols = I,
                                 .basis = basis, .rank = 1, .strength = (float[]){1}, .nonfinite = &bad};
    assert_int_equal(exc_cpu_project(&ctx_of(2)->queue, &a), EXC_OK);
    assert_int_equal(bad, 2);
    for (int h = 0; h < H; h++)
        for (int i = 0; i < I; i++) {
            if (i == 2 || i == 7) assert_true(isnan(test_from_bf16(w[h * I + i]))); /* 0 * inf in the sums */
            else if (h == 3 && i != 1) assert_true(test_from_bf16(w[h * I + i]) == 0);
            else assert_int_equal(w[h * I + i], old[h * I + i]); /* bit for bit, -0 too */
        }
    a.rows = 0, a.cols = 0;
    assert_int_equal(exc_cpu_project(&ctx_of(2)->queue, &a), EXC_OK);
    a.rank = 65;
    assert_int_equal(exc_cpu_project(&ctx_of(2)->queue, &a), EXC_ERR_USAGE);
    free(w), free(old);
}

/* -------------------------------------------------------------------------------------------- gram, subspace */

static void gram_is_exact(void **state) {
    (void)state;
    enum { L = 2, N = 37, D = 33, STRIDE = 40 };
    float *x = get(L * N * STRIDE * sizeof *x);
    fill(x, EXC_F32, L * N * STRIDE, 11);
    for (int side = 0; side < 2; side++) {
        int64_t size = side == EXC_GRAM_SAMPLES ? N : D, other = side == EXC_GRAM_SAMPLES ? D : N;
        double *g = get((size_t)(L * size * size) * sizeof *g);
        struct exc_gram_args a = {.x = x, .layers = L, .layer_stride = N * STRIDE, .samples = N, .row_stride = STRIDE, .width = D, .side = side, .g = g};
        assert_int_equal(exc_cpu_gram(&ctx_of(2)->queue, &a), EXC_OK);
        guarded(g, (size_t)(L * size * size) * sizeof *g);
        for (int64_t l = 0; l < L; l++)
            for (int64_t i = 0; i < size; i++)
                for (int64_t j = 0; j < size; j++) {
                    double want = 0, most = 0;
                    for (int64_t k = 0; k < other; k++) {
                        const float *y = x + l * N * STRIDE;
                        double p = side == EXC_GRAM_SAMPLES ? (double)y[i * STRIDE + k] * (double)y[j * STRIDE + k]
                                                            : (double)y[k * STRIDE + i] * (double)y[k * STRIDE + j];
                        want += p, most += fabs(p);
                    }
                    assert_true(fabs(g[(l * size + i) * size + j] - want) <= 64 * 0x1p-53 * most);
                }
        free(g);
    }
    free(x);
}

/* one-sided Jacobi: turns the columns of a [n,d] until they are orthogonal; v [d,d] gets right singular vectors in its columns */
static void jacobi(double *a, int64_t n, int64_t d, double *v) {
    for (int64_t i = 0; i < d * d; i++) v[i] = i % (d + 1) == 0;
    for (int round = 0, turned = 1; turned && round < 60; round++) {
        turned = 0;
        for (int64_t p = 0; p < d; p++)
            for (int64_t q = p + 1; q < d; q++) {
                double pp = 0, qq = 0, pq = 0;
                for (int64_t i = 0; i < n; i++)
                    pp += a[i * d + p] * a[i * d + p], qq += a[i * d + q] * a[i * d + q], pq += a[i * d + p] * a[i * d + q];
                if (fabs(pq) <= 1e-15 * sqrt(pp * qq)) continue;
                turned = 1;
                double th = (qq - pp) / (2 * pq), t = (th < 0 ? -1 : 1) / (fabs(th) + sqrt(th * th + 1)), c = 1 / sqrt(t * t + 1), s = c * t;
                for (int64_t i = 0; i < n + d; i++) {
                    double *row = i < n ? a + i * d : v + (i - n) * d, x = row[p], y = row[q];
                    row[p] = c * x - s * y, row[q] = s * x + c * y;
                }
            }
    }
}

/* sine of the angle from row `got` to the span of the k leading oracle vectors */
static void same_subspace(const float *x, int64_t n, int64_t d, int64_t rank, const float *basis, const float *singular) {
    double *a = get((size_t)(n * d) * sizeof *a), *v = get((size_t)(d * d) * sizeof *v), *s = get((size_t)d * sizeof *s);
    for (int64_t i = 0; i < n * d; i++) a[i] = (double)x[i];
    jacobi(a, n, d, v);
    for (int64_t j = 0; j < d; j++) {
        for (int64_t i = 0; i < n; i++) s[j] += a[i * d + j] * a[i * d + j];
        s[j] = sqrt(s[j]);
    }
    int64_t lead[64];
    for (int64_t r = 0; r < rank; r++) {
        lead[r] = -1;
        for (int64_t j = 0; j < d; j++) {
            int used = 0;
            for (int64_t k = 0; k < r; k++) used |= lead[k] == j;
            if (!used && (lead[r] < 0 || s[j] > s[lead[r]])) lead[r] = j;
        }
        assert_true(fabs((double)singular[r] - s[lead[r]]) <= 1e-6 * s[lead[0]]);
    }
    for (int64_t r = 0; r < rank; r++) {
        double *rest = get((size_t)d * sizeof *rest), out = 0;
        for (int64_t k = 0; k < d; k++) rest[k] = (double)basis[r * d + k];
        for (int64_t m = 0; m < rank; m++) {
            double c = 0;
            for (int64_t k = 0; k < d; k++) c += (double)basis[r * d + k] * v[k * d + lead[m]];
            for (int64_t k = 0; k < d; k++) rest[k] -= c * v[k * d + lead[m]];
        }
        for (int64_t k = 0; k < d; k++) out += rest[k] * rest[k];
        assert_true(sqrt(out) <= 1e-6);
        free(rest);
    }
    free(a), free(v), free(s);
}

static exc_status find(exc_ctx *ctx, const float *x, int64_t layers, int64_t n, int64_t d, int64_t rank, float *basis, float *singular,
                       double *energy, double *residual) {
    size_t bytes = exc_subspace_bytes(layers, n, d, rank, ctx->queue.workers);
    void *work = get(bytes);
    struct exc_subspace_args a = {.x = x, .layers = layers, .layer_stride = n * d, .samples = n, .row_stride = d, .width = d, .rank = rank,
                                  .seed = 1, .basis = basis, .singular = singular, .energy = energy, .residual = residual, .work = work,
                                  .work_bytes = bytes};
    exc_status st = exc_cpu_subspace(&ctx->queue, &a);
    guarded(work, bytes);
    free(work);
    return st;
}

static void subspace_meets_jacobi(void **state) {
    (void)state;
    static const int64_t shapes[][3] = {{20, 31, 3}, {150, 33, 4}, {170, 110, 3}, {130, 127, 8}, {600, 101, 3}, {1, 5, 2}, {7, 40, 7}};
    for (int s = 0; s < 7; s++) {
        int64_t n = shapes[s][0], d = shapes[s][1], rank = shapes[s][2], real = rank < n ? rank : n;
        float *x = get((size_t)(2 * n * d) * sizeof *x), *dirs = orthonormal(rank, d, 77), *first = NULL;
        for (int64_t i = 0; i < 2 * n; i++)
            for (int64_t k = 0; k < d; k++) {
                x[i * d + k] = 0.3f * test_normal(9, (uint64_t)(i * d + k));
                for (int64_t r = 0; r < rank; r++)
                    x[i * d + k] += (float)(3 + rank - r) * test_normal(100 + (uint64_t)r, (uint64_t)i) * dirs[r * d + k];
            }
        for (int level = 0, most = level_count(); level < most; level++)
            for (int threads = 1; threads < 3; threads++) {
                exc_isa_lower(levels[level]);
                float *basis = get((size_t)(2 * rank * d) * sizeof *basis), singular[32];
                double energy[2], residual[2];
                assert_int_equal(find(ctx_of(threads), x, 2, n, d, rank, basis, singular, energy, residual), EXC_OK);
                guarded(basis, (size_t)(2 * rank * d) * sizeof *basis);
                for (int l = 0; l < 2; l++) {
                    same_subspace(x + l * n * d, n, d, real, basis + l * rank * d, singular + l * rank);
                    assert_true(residual[l] <= 1e-6 && energy[l] > 0.5 && energy[l] <= 1 + 1e-9);
                    for (int64_t r = real; r < rank; r++) assert_true(singular[l * rank + r] == 0 && basis[(l * rank + r) * d] == 0);
                }
                if (threads == 1) first = basis;
                else assert_memory_equal(first, basis, (size_t)(2 * rank * d) * sizeof *basis), free(basis), free(first);
            }
        exc_isa_lower(NULL);
        free(x), free(dirs);
    }
}

/* Samples that all share one shift, and vary more along another direction: centring would return the other one. */
static void planted_shift_is_found(void **state) {
    (void)state;
    enum { N = 200, D = 128 };
    float *x = get(N * D * sizeof *x), *dirs = orthonormal(2, D, 3), basis[D], singular[1];
    double energy, residual, along = 0;
    for (int i = 0; i < N; i++)
        for (int k = 0; k < D; k++)
            x[i * D + k] = 4 * dirs[k] + 2 * test_normal(1, (uint64_t)i) * dirs[D + k] + 0.05f * test_normal(2, (uint64_t)(i * D + k));
    assert_int_equal(find(ctx_of(2), x, 1, N, D, 1, basis, singular, &energy, &residual), EXC_OK);
    for (int k = 0; k < D; k++) along += (double)basis[k] * (double)dirs[k];
    assert_true(fabs(along) > 0.98);
    int top = 0;
    for (int k = 0; k < D; k++)
        if (fabsf(basis[k]) > fabsf(basis[top])) top = k;
    assert_true(basis[top] > 0);
    memset(x, 0, N * D * sizeof *x);
    assert_int_equal(find(ctx_of(2), x, 1, N, D, 1, basis, singular, &energy, &residual), EXC_OK);
    for (int k = 0; k < D; k++) assert_true(basis[k] == 0);
    assert_true(singular[0] == 0 && energy == 0 && residual == 0);
    free(x), free(dirs);
}

/* --------------------------------------------------------------------------------------------------- contrast */

static void contrast_counts_prompts(void **state) {
    (void)state;
    enum { P = 60, E = 33, STRIDE = 40 };
    uint32_t *t = get(P * STRIDE * 4), *b = get(P * STRIDE * 4);
    double out[2][5][E];
    for (int p = 0; p < P; p++)
        for (int e = 0; e < E; e++) {
            t[p * STRIDE + e] = (uint32_t)(exc_random_u64(1, (uint64_t)p, (uint64_t)e) % 20) + (e == 5 ? 30 : 0);
            b[p * STRIDE + e] = (uint32_t)(exc_random_u64(2, (uint64_t)p, (uint64_t)e) % 20);
        }
    for (int i = 0; i < 2; i++) {
        struct exc_contrast_args a = {.target = t, .target_prompts = P, .baseline = b, .baseline_prompts = P, .stride = STRIDE, .experts = E,
                                      .top_k = 4, .alpha = 0.5, .resamples = 4000, .seed = 9, .stream = 3, .log_ratio = out[i][0],
                                      .se = out[i][1], .z = out[i][2], .p = out[i][3], .risk = out[i][4]};
        assert_int_equal(exc_cpu_contrast(&ctx_of(i ? 3 : 1)->queue, &a), EXC_OK);
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
    double all[2] = {0};
    for (int p = 0; p < P; p++)
        for (int e = 0; e < E; e++) all[0] += t[p * STRIDE + e], all[1] += b[p * STRIDE + e];
    for (int e = 0; e < E; e++) {
        double n[2] = {0}, variance = 0;
        for (int p = 0; p < P; p++) n[0] += t[p * STRIDE + e], n[1] += b[p * STRIDE + e];
        double want = log((n[0] + 0.5) / (all[0] + 0.5 * E)) - log((n[1] + 0.5) / (all[1] + 0.5 * E));
        assert_true(fabs(out[0][0][e] - want) < 1e-12);
        assert_true(fabs(out[0][4][e] - 4 * (n[0] / all[0] - n[1] / all[1])) < 1e-12);
        /* delta method: variance of log(n/N) over prompts is the sum of ((x_p/n) - (N_p/N))^2 */
        for (int side = 0; side < 2; side++)
            for (int p = 0; p < P; p++) {
                const uint32_t *row = (side ? b : t) + p * STRIDE;
                double mine = 0;
                for (int k = 0; k < E; k++) mine += row[k];
                double d = row[e] / n[side] - mine / all[side];
                variance += d * d;
            }
        assert_true(fabs(out[0][1][e] / sqrt(variance) - 1) < 0.1); /* 4000 resamples: 1.1 %, and the curvature of log */
        assert_true(fabs(out[0][2][e] - want / out[0][1][e]) < 1e-9);
        assert_true(fabs(out[0][3][e] - erfc(fabs(out[0][2][e]) / sqrt(2))) < 1e-12);
    }
    assert_true(out[0][2][5] > 5);
    free(t), free(b);
}

/* ----------------------------------------------------------------------------------------------------- stream */

static void stream_checks_and_edits(void **state) {
    (void)state;
    enum { E = 70, H = 40, I = 24 };
    exc_ctx *ctx = test_ctx(2);
    float *basis = orthonormal(2, H, 1), strength[E], *w = get(E * H * I * 4), *one = get(E * H * I * 4), *c = get(E * 2 * I * 4);
    fill(w, EXC_F32, E * H * I, 4);
    memcpy(one, w, E * H * I * 4);
    for (int e = 0; e < E; e++) strength[e] = e % 3 ? 0.75f : 0;
    assert_int_equal(exc_edit_experts(ctx, w, EXC_F32, E, H, I, basis, 2, strength, EXC_NORM_NONE, c), EXC_OK);
    for (int e = 0; e < E; e++)
        assert_int_equal(exc_edit_matrix(ctx, one + e * H * I, EXC_F32, H, I, basis, 2, strength[e], EXC_NORM_NONE, NULL), EXC_OK);
    assert_memory_equal(w, one, E * H * I * 4);
    guarded(c, E * 2 * I * 4);
    float y[H], want[H];
    for (int h = 0; h < H; h++) y[h] = want[h] = test_normal(8, (uint64_t)h);
    assert_int_equal(exc_edit_matrix(ctx, want, EXC_F32, H, 1, basis, 2, 1, EXC_NORM_NONE, NULL), EXC_OK);
    assert_int_equal(exc_project_output(ctx, y, 1, H, basis, 2, 1), EXC_OK);
    assert_true(test_relative(y, want, H) < 1e-6);
    test_refused(ctx, exc_edit_matrix(ctx, w, EXC_I32, H, I, basis, 2, 1, EXC_NORM_NONE, NULL), EXC_ERR_USAGE, "dtype", NULL);
    exc_gate gate = EXC_GATE;
    int32_t ids[4];
    float weights[4], logits[8] = {0, 3, 1, 2, 5, 1, 0, 4};
    assert_int_equal(exc_route(ctx, &gate, logits, NULL, 2, 4, 2, ids, weights), EXC_OK);
    assert_true(ids[0] == 1 && ids[1] == 3 && ids[2] == 0 && ids[3] == 3);
    int64_t count[4] = {0};
    double sum[4] = {0};
    assert_int_equal(exc_observe(ctx, ids, weights, NULL, EXC_F32, 2, 4, 2, 0, count, sum, NULL), EXC_OK);
    assert_true(count[0] == 1 && count[1] == 1 && count[2] == 0 && count[3] == 2);
    exc_ctx_free(ctx);
    free(w), free(one), free(c), free(basis);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(project_everywhere),     cmocka_unit_test(project_edges),
        cmocka_unit_test(plain_edits_agree),      cmocka_unit_test(row_norms_scale_the_plain_edit),
        cmocka_unit_test(gram_is_exact),          cmocka_unit_test(subspace_meets_jacobi),
        cmocka_unit_test(planted_shift_is_found), cmocka_unit_test(contrast_counts_prompts),
        cmocka_unit_test(stream_checks_and_edits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
