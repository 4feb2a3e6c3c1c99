/* round.c - project and scale on quantised weights, and with stochastic and exact rounding, against f64 and the rules in ops.def:
 * which scale a block gets, which code an element gets (brute force over all codes), what is left of R, what rounding cost.
 *
 * Tolerances: the f32 arithmetic is within 2^-22 of an element of f64, so codes may differ where W' is that near a tie: below
 * one in a thousand. Sums in f64 of f32 pieces: 1e-5. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h"
#include "grid.h"
#include "helpers.h"

typedef struct kind {
    int dtype, scale_dtype, power;
} kind;
static const kind kinds[] = {{EXC_F8_E4M3, EXC_F32, 0},     {EXC_F8_E4M3, EXC_BF16, 0}, {EXC_F8_E4M3, EXC_F8_E8M0, 0},
                             {EXC_F8_E4M3, EXC_F32, 1},     {EXC_F4, EXC_F8_E8M0, 0},   {EXC_BF16, EXC_F32, 0},
                             {EXC_F16, EXC_F32, 0}};
enum { F8_F32, F8_BF16, F8_E8M0, F8_POWER, F4, BF16, F16, KINDS };

typedef struct matrix {
    kind k;
    int64_t rows, cols, srows, scols;
    size_t bytes, scale_bytes;
    uint8_t *code, *scale;
} matrix;

static double code_value(int dtype, int c) {
    if (dtype == EXC_F8_E4M3) {
        int e = c >> 3 & 15, m = c & 7;
        double v = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
        return (c & 0x7f) == 0x7f ? NAN : c & 0x80 ? -v : v;
    }
    static const double size[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    if (dtype == EXC_F4) return c & 8 ? -size[c & 7] : size[c & 7];
    if (dtype == EXC_BF16) return (double)test_from_bf16((uint16_t)c);
    int e = c >> 10 & 31, m = c & 1023;
    double v = e == 0 ? ldexp(m, -24) : e == 31 ? (m ? NAN : INFINITY) : ldexp(m + 1024, e - 25);
    return c & 0x8000 ? -v : v;
}
static int code_of(const matrix *m, const uint8_t *code, int64_t i) {
    if (m->k.dtype == EXC_F8_E4M3) return code[i];
    if (m->k.dtype == EXC_F4) return code[i / 2] >> (i % 2 ? 4 : 0) & 15;
    return ((const uint16_t *)(const void *)code)[i];
}
static int coded(const matrix *m) { return m->k.dtype == EXC_F8_E4M3 || m->k.dtype == EXC_F4; }
static int64_t scale_place(const matrix *m, int64_t i) {
    int64_t r = i / m->cols, c = i % m->cols;
    return m->k.dtype == EXC_F4 ? r * m->scols + c / 32 : r / 128 * m->scols + c / 128;
}
static double scale_value(const matrix *m, const uint8_t *scale, int64_t at) {
    if (!coded(m)) return 1;
    if (m->k.scale_dtype == EXC_F32) return (double)((const float *)(const void *)scale)[at];
    if (m->k.scale_dtype == EXC_BF16) return (double)test_from_bf16(((const uint16_t *)(const void *)scale)[at]);
    return scale[at] == 255 ? NAN : ldexp(1, scale[at] - 127);
}
static double value_of(const matrix *m, const uint8_t *code, const uint8_t *scale, int64_t i) {
    return code_value(m->k.dtype, code_of(m, code, i)) * scale_value(m, scale, scale_place(m, i));
}

static void *get(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xa5, (bytes + 127) / 64 * 64);
    return p;
}

/* weights of about normal distribution, the largest of a block near the end of its range */
static matrix make(kind k, int64_t rows, int64_t cols, uint64_t seed) {
    matrix m = {.k = k, .rows = rows, .cols = cols};
    m.srows = k.dtype == EXC_F4 ? rows : (rows + 127) / 128;
    m.scols = k.dtype == EXC_F4 ? cols / 32 : (cols + 127) / 128;
    int64_t n = rows * cols, scales = m.srows * m.scols;
    m.bytes = (size_t)n * (k.dtype == EXC_F4 ? 1 : k.dtype == EXC_F8_E4M3 ? 2 : 4) / 2;
    m.scale_bytes = coded(&m) ? (size_t)scales * (k.scale_dtype == EXC_F32 ? 4 : k.scale_dtype == EXC_BF16 ? 2 : 1) : 0;
    m.code = get(m.bytes);
    m.scale = get((size_t)scales * 4);
    for (int64_t i = 0; i < scales; i++) {
        float s = 0x1p-9f * (0.6f + 0.8f * (float)exc_random_unit(seed, 9, (uint64_t)i));
        if (k.power) s = 0x1p-9f;
        if (k.scale_dtype == EXC_F32) ((float *)(void *)m.scale)[i] = s;
        else if (k.scale_dtype == EXC_BF16) ((uint16_t *)(void *)m.scale)[i] = test_bf16(s);
        else m.scale[i] = (uint8_t)(117 + i % 3);
    }
    exc_grid g = exc_grid_of(k.dtype);
    for (int64_t i = 0; i < n; i++) {
        float a = (k.dtype == EXC_F4 ? 1.6f : k.dtype == EXC_F8_E4M3 ? 110.0f : 0.02f) * test_normal(seed, (uint64_t)i);
        uint32_t c = exc_grid_code(&g, exc_grid_near(&g, fabsf(a)));
        if (k.dtype == EXC_F8_E4M3) m.code[i] = (uint8_t)(c | (a < 0 ? 0x80 : 0));
        else if (k.dtype == EXC_F4) m.code[i / 2] = (uint8_t)(i % 2 ? (m.code[i / 2] & 15) | (c | (a < 0 ? 8 : 0)) << 4 : c | (a < 0 ? 8u : 0));
        else ((uint16_t *)(void *)m.code)[i] = (uint16_t)(c | (a < 0 ? 0x8000 : 0));
    }
    return m;
}
static void drop(matrix *m) {
    free(m->code);
    free(m->scale);
}

static float *directions(int64_t rank, int64_t n, uint64_t seed) {
    float *b = get((size_t)(rank * n) * 4);
    double *q = get((size_t)(rank * n) * 8);
    for (int64_t r = 0; r < rank; r++) {
        double *v = q + r * n, length = 0;
        for (int64_t i = 0; i < n; i++) v[i] = (double)test_normal(seed + (uint64_t)r, (uint64_t)i);
        for (int64_t p = 0; p < r; p++) {
            double d = 0;
            for (int64_t i = 0; i < n; i++) d += v[i] * q[p * n + i];
            for (int64_t i = 0; i < n; i++) v[i] -= d * q[p * n + i];
        }
        for (int64_t i = 0; i < n; i++) length += v[i] * v[i];
        for (int64_t i = 0; i < n; i++) v[i] /= sqrt(length), b[r * n + i] = (float)v[i];
    }
    free(q);
    return b;
}

/* what one call says */
typedef struct said {
    uint8_t *code, *scale;
    double before, after, moved, error, size;
    int64_t changed, nonfinite;
} said;

static said edit(const matrix *m, int side, const float *basis, int64_t rank, float strength, int norm, int rounding, int threads, int in_place) {
    static exc_ctx *open[5];
    if (!open[threads]) open[threads] = test_ctx(threads);
    said s = {get(m->bytes + 16), get(m->scale_bytes + 16), 0, 0, 0, 0, 0, 0, 0};
    if (in_place) {
        memcpy(s.code, m->code, m->bytes);
        memcpy(s.scale, m->scale, m->scale_bytes);
    }
    const void *src = in_place ? s.code : m->code, *scale = in_place ? s.scale : m->scale;
    void *dst = s.code, *to = s.scale;
    float *c = get((size_t)(rank * m->rows + rank * m->cols) * 4);
    uint64_t stream = 77;
    struct exc_project_args a = {.src = &src, .dst = &dst, .dtype = m->k.dtype, .count = 1, .rows = m->rows, .cols = m->cols, .side = side,
                                 .basis = basis, .rank = rank, .strength = &strength, .norm = norm, .c = c, .before = &s.before, .after = &s.after,
                                 .changed = &s.changed, .nonfinite = &s.nonfinite, .rounding = rounding, .seed = 5, .stream = &stream,
                                 .scale = &scale, .scale_to = &to, .scale_dtype = m->k.scale_dtype, .scale_power = m->k.power, .moved = &s.moved,
                                 .error = &s.error, .size = &s.size};
    assert_int_equal(exc_cpu_project(&open[threads]->queue, &a), EXC_OK);
    for (int i = 0; i < 16; i++) assert_true(s.code[m->bytes + (size_t)i] == 0xa5 && s.scale[m->scale_bytes + (size_t)i] == 0xa5);
    free(c);
    return s;
}
static void forget(said *s) {
    free(s->code);
    free(s->scale);
}

/* W' in f64, from the f64 definition */
static double *ideal_of(const matrix *m, int side, const float *basis, int64_t rank, double strength, int norm) {
    int64_t along = side == EXC_SIDE_OUT ? m->rows : m->cols, lines = side == EXC_SIDE_OUT ? m->cols : m->rows;
    double *w = get((size_t)(m->rows * m->cols) * 8);
#define AT(h, l) (side == EXC_SIDE_OUT ? (h) * m->cols + (l) : (l) * m->cols + (h))
    for (int64_t i = 0; i < m->rows * m->cols; i++) w[i] = value_of(m, m->code, m->scale, i);
    double *row_before = calloc((size_t)along, 8), *row_after = calloc((size_t)along, 8), *c = get((size_t)rank * 8);
    for (int64_t l = 0; l < lines; l++) {
        double before = 0, after = 0;
        for (int64_t r = 0; r < rank; r++) {
            c[r] = 0;
            for (int64_t h = 0; h < along; h++) c[r] += (double)basis[r * along + h] * w[AT(h, l)];
        }
        for (int64_t h = 0; h < along; h++) {
            double *x = &w[AT(h, l)], old = *x;
            for (int64_t r = 0; r < rank; r++) *x -= strength * (double)basis[r * along + h] * c[r];
            before += old * old, after += *x * *x, row_before[h] += old * old, row_after[h] += *x * *x;
        }
        for (int64_t h = 0; h < along && (norm == EXC_NORM_COLUMN || (norm && side == EXC_SIDE_IN)); h++)
            w[AT(h, l)] *= after > 1e-10 * before ? sqrt(before / after) : 1;
    }
    for (int64_t h = 0; h < along && norm == EXC_NORM_ROW && side == EXC_SIDE_OUT; h++)
        for (int64_t l = 0; l < lines; l++) w[AT(h, l)] *= sqrt(row_before[h] / row_after[h]);
    free(row_before);
    free(row_after);
    free(c);
    return w;
}

static double left_of(const matrix *m, int side, const float *basis, int64_t rank, const uint8_t *code, const uint8_t *scale) {
    int64_t along = side == EXC_SIDE_OUT ? m->rows : m->cols, lines = side == EXC_SIDE_OUT ? m->cols : m->rows;
    double sum = 0;
    for (int64_t l = 0; l < lines; l++)
        for (int64_t r = 0; r < rank; r++) {
            double c = 0;
            for (int64_t h = 0; h < along; h++) c += (double)basis[r * along + h] * value_of(m, code, scale, AT(h, l));
            sum += c * c;
        }
    return sum;
}

/* the scale that the rule gives a block of which `most` is the largest */
static double rule(const matrix *m, double old, double most) {
    if (m->k.dtype == EXC_F4) return most < 8 * old ? old : ldexp(1, (int)floor(log2(most)) - 2);
    if (most <= 448 * old) return old;
    if (m->k.power || m->k.scale_dtype == EXC_F8_E8M0) return ldexp(1, (int)ceil(log2(most / 448)));
    if (m->k.scale_dtype == EXC_F32) return most / 448;
    float s = (float)(most / 448), half = test_from_bf16(test_bf16(s));
    return (double)(half >= s ? half : test_from_bf16((uint16_t)(test_bf16(s) + 1)));
}

static void check_scales(const matrix *m, const double *ideal, const said *s) {
    double *most = calloc((size_t)(m->srows * m->scols), 8);
    for (int64_t i = 0; i < m->rows * m->cols; i++)
        if (fabs(ideal[i]) > most[scale_place(m, i)]) most[scale_place(m, i)] = fabs(ideal[i]);
    for (int64_t i = 0; i < m->srows * m->scols; i++) {
        double old = scale_value(m, m->scale, i), want = rule(m, old, most[i]), got = scale_value(m, s->scale, i);
        double edge = m->k.dtype == EXC_F4 ? most[i] / old / 8 : most[i] / old / 448; /* the rule may go either way at its edge */
        if (fabs(got - want) > 1e-5 * want && fabs(edge - 1) > 1e-5) fail_msg("scale %d: %.9g, want %.9g", (int)i, got, want);
    }
    free(most);
}

/* nearest code by trying all; ties to the even one */
static int nearest(const matrix *m, double x) {
    int n = m->k.dtype == EXC_F4 ? 8 : 127, best = 0;
    double gap = INFINITY;
    for (int c = 0; c < n; c++) {
        double d = fabs(fabs(x) - code_value(m->k.dtype, c));
        if (d < gap || (d == gap && c % 2 == 0)) gap = d, best = c;
    }
    return best;
}

static void one_nearest(int kd, int side, int64_t rows, int64_t cols, int64_t rank, float strength, int norm) {
    matrix m = make(kinds[kd], rows, cols, 3);
    float *basis = directions(rank, side == EXC_SIDE_OUT ? rows : cols, 4);
    said s = edit(&m, side, basis, rank, strength, norm, EXC_ROUND_RN, 2, 0), again = edit(&m, side, basis, rank, strength, norm, EXC_ROUND_RN, 3, 1);
    assert_memory_equal(s.code, again.code, m.bytes);
    assert_memory_equal(s.scale, again.scale, m.scale_bytes);
    assert_true(s.before == again.before && s.after == again.after && s.error == again.error && s.changed == again.changed);
    double *ideal = ideal_of(&m, side, basis, rank, (double)strength, norm), moved = 0, error = 0, size = 0;
    int64_t other = 0, changed = 0, n = rows * cols;
    check_scales(&m, ideal, &s);
    for (int64_t i = 0; i < n; i++) {
        double scale = scale_value(&m, s.scale, scale_place(&m, i)), old = value_of(&m, m.code, m.scale, i), q = value_of(&m, s.code, s.scale, i);
        int want = nearest(&m, ideal[i] / scale), got = code_of(&m, s.code, i) & (kinds[kd].dtype == EXC_F4 ? 7 : 127);
        other += want != got;
        if (abs(want - got) > 1) fail_msg("code %d of [%d,%d]: %d, want %d", (int)i, (int)rows, (int)cols, got, want);
        moved += (ideal[i] - old) * (ideal[i] - old), error += (q - ideal[i]) * (q - ideal[i]), size += old * old;
        changed += code_of(&m, s.code, i) != code_of(&m, m.code, i) || scale != scale_value(&m, m.scale, scale_place(&m, i));
    }
    if (other * 1000 > n + 2000) fail_msg("%d of %d codes are not the nearest", (int)other, (int)n);
    double along = left_of(&m, side, basis, rank, m.code, m.scale), left = left_of(&m, side, basis, rank, s.code, s.scale);
    assert_true(fabs(s.before - along) <= 1e-5 * along && fabs(s.after - left) <= 1e-5 * along);
    assert_true(fabs(s.moved - moved) <= 1e-4 * moved + 1e-12 && fabs(s.error - error) <= 1e-3 * error + 1e-12 && fabs(s.size - size) <= 1e-5 * size);
    assert_int_equal(s.changed, changed);
    assert_int_equal(s.nonfinite, 0);
    free(ideal);
    free(basis);
    forget(&s);
    forget(&again);
    drop(&m);
}

static void nearest_everywhere(void **state) {
    for (int k = 0; k <= F4; k++) {
        int odd = k == F4 ? 0 : 1;
        for (int side = 0; side < 2; side++) {
            one_nearest(k, side, 1, 32, 1, 1, EXC_NORM_NONE);
            one_nearest(k, side, 33, 64 + odd, 1, 1, EXC_NORM_NONE);
            one_nearest(k, side, 130 + odd, 288 - odd, 3, 0.7f, EXC_NORM_COLUMN);
            one_nearest(k, side, 300, 160, 2, -3, EXC_NORM_NONE); /* grows: blocks need new scales */
            one_nearest(k, side, 200, 160, 5, 1, EXC_NORM_ROW);
        }
    }
}

/* blocks that the direction does not reach keep their bytes, as do matrices of strength 0 */
static void what_is_not_reached_stays(void **state) {
    for (int k = 0; k < KINDS; k++)
        for (int rounding = 0; rounding < 3; rounding++) {
            matrix m = make(kinds[k], 384, 96, 8);
            float *basis = directions(1, 384, 1);
            for (int h = 128; h < 256; h++) basis[h] = 0;
            said s = edit(&m, EXC_SIDE_OUT, basis, 1, 1, 0, rounding, 2, 0), none = edit(&m, EXC_SIDE_OUT, basis, 1, 0, 0, rounding, 2, 0);
            size_t third = m.bytes / 3;
            assert_memory_equal(s.code + third, m.code + third, third);
            assert_memory_equal(none.code, m.code, m.bytes);
            assert_memory_equal(none.scale, m.scale, m.scale_bytes);
            assert_int_equal(none.changed, 0);
            assert_true(s.changed > 0 && none.before == none.after);
            forget(&s);
            forget(&none);
            free(basis);
            drop(&m);
        }
}

/* Every element becomes one of its two neighbours; the mean of what was drawn is what was meant: with n draws of spread at most a
 * step, |mean error| < 5 steps / sqrt(n). */
static void stochastic_is_fair(void **state) {
    for (int k = 0; k < KINDS; k++)
        for (int side = 0; side < 2; side++) {
            int64_t rows = 320, cols = 288, n = rows * cols;
            matrix m = make(kinds[k], rows, cols, 13);
            float *basis = directions(1, side == EXC_SIDE_OUT ? rows : cols, 2);
            said s = edit(&m, side, basis, 1, 1, 0, EXC_ROUND_SR, 1, 0), again = edit(&m, side, basis, 1, 1, 0, EXC_ROUND_SR, 4, 1);
            assert_memory_equal(s.code, again.code, m.bytes);
            double *ideal = ideal_of(&m, side, basis, 1, 1, 0), sum = 0, spread = 0;
            for (int64_t i = 0; i < n; i++) {
                double scale = scale_value(&m, s.scale, scale_place(&m, i)), x = ideal[i] / scale;
                int c = code_of(&m, s.code, i), sign = k == F4 ? 8 : k < F4 ? 0x80 : 0x8000, size = c & (sign - 1);
                double v = code_value(m.k.dtype, size), past = fabs(x) - v;
                double step = past > 0 ? code_value(m.k.dtype, size + 1) - v : size ? v - code_value(m.k.dtype, size - 1) : 0;
                int largest = k == F4 ? 7 : 126;
                if (k <= F4 && size == largest && past > 0) continue; /* held at the largest */
                if (fabs(past) > step * (1 + 1e-4) + 1e-7) fail_msg("kind %d: %g became %g", k, x, code_value(m.k.dtype, c));
                sum += past / (step > 0 ? step : 1), spread += fabs(past) > 1e-6 * step;
            }
            if (fabs(sum) > 5 * sqrt(spread)) fail_msg("kind %d: mean error %g steps of %g draws", k, sum / spread, spread);
            free(ideal);
            free(basis);
            forget(&s);
            forget(&again);
            drop(&m);
        }
}

/* what the solve reaches, and at which cost, for weights whose change is below their spacing (kernels of this size: 512 along R) */
static void exact_leaves_little(void **state) {
    static const double left[KINDS] = {0.01, 0.01, 0.01, 0.01, 0.03, 0.002, 0.001}, cost[KINDS] = {1.3, 1.3, 1.3, 1.3, 2.2, 1.1, 1.1};
    for (int k = 0; k < KINDS; k++)
        for (int side = 0; side < 2; side++)
            for (int64_t rank = 1; rank <= (k == F8_F32 || k == F4 ? 3 : 1); rank += 2) {
                int64_t rows = side == EXC_SIDE_OUT ? 512 : 160, cols = side == EXC_SIDE_OUT ? 160 : 512;
                matrix m = make(kinds[k], rows, cols, 21);
                float *basis = directions(rank, 512, 22);
                said near = edit(&m, side, basis, rank, 1, 0, EXC_ROUND_RN, 2, 0), s = edit(&m, side, basis, rank, 1, 0, EXC_ROUND_EXACT, 1, 0),
                     again = edit(&m, side, basis, rank, 1, 0, EXC_ROUND_EXACT, 3, 1);
                assert_memory_equal(s.code, again.code, m.bytes);
                assert_true(s.after == again.after);
                double truth = left_of(&m, side, basis, rank, s.code, s.scale), before = left_of(&m, side, basis, rank, m.code, m.scale);
                assert_true(fabs(truth - s.after) <= 1e-5 * before);
                double rest = sqrt(truth / before);
                if (rest > left[k] * (rank > 1 ? 3 : 1)) fail_msg("kind %d side %d rank %d: %g of the direction is left", k, side, (int)rank, rest);
                if (k <= F4 && s.error > cost[k] * cost[k] * near.error) fail_msg("kind %d: error %g, nearest %g", k, sqrt(s.error), sqrt(near.error));
                if (k <= F4) assert_true(near.after > 4 * s.after);
                forget(&near);
                forget(&s);
                forget(&again);
                free(basis);
                drop(&m);
            }
}

/* the same bits at every instruction level */
static void levels_agree(void **state) {
    static const char *const levels[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
    exc_isa_lower(NULL);
    int best = (int)exc_isa_level();
    for (int k = 0; k < KINDS; k++)
        for (int rounding = 0; rounding < 3; rounding++) {
            matrix m = make(kinds[k], 140, 96, 31);
            float *basis = directions(2, 140, 32);
            said first = {0};
            for (int i = 0; i <= best; i++) {
                exc_isa_lower(levels[i]);
                said s = edit(&m, EXC_SIDE_OUT, basis, 2, 1, 0, rounding, 1, 0);
                if (i) assert_memory_equal(first.code, s.code, m.bytes);
                if (i) assert_memory_equal(first.scale, s.scale, m.scale_bytes);
                if (i) forget(&s);
                else first = s;
            }
            forget(&first);
            free(basis);
            drop(&m);
        }
    exc_isa_lower(NULL);
}

static void same_said(const matrix *m, const said *a, const said *b) {
    assert_memory_equal(a->code, b->code, m->bytes);
    assert_memory_equal(a->scale, b->scale, m->scale_bytes);
    assert_memory_equal(&a->before, &b->before, sizeof a->before);
    assert_true(a->after == b->after && a->moved == b->moved && a->error == b->error && a->size == b->size);
    assert_true(a->changed == b->changed && a->nonfinite == b->nonfinite);
}

/* codes that edits of whole bands could get wrong: all of them, zeros of both signs, and numbers near zero */
static matrix awkward(kind k, int64_t rows, int64_t cols) {
    matrix m = make(k, rows, cols, 51);
    for (size_t i = 0; i < m.bytes; i++) {
        uint64_t u = exc_random_u64(52, 1, i);
        if (u % 4 == 0) m.code[i] = (uint8_t)(u >> 8);
        if (u % 4 == 1) m.code[i] &= 0x8f;
        if (k.dtype == EXC_F8_E4M3 && (m.code[i] & 0x7f) == 0x7f) m.code[i] ^= 1;
    }
    return m;
}

/* whole bands in registers say what piece by piece says, which the generic level does: bits of codes, scales and sums */
static void bands_agree(void **state) {
    static const char *const levels[] = {"generic", "avx2", "avx512"};
    static const struct { int64_t lines, along, rank; float strength; int norm; } cases[] = {
        {128, 300, 1, 1, EXC_NORM_NONE},   {320, 257, 1, -3, EXC_NORM_NONE}, {192, 160, 3, 1, EXC_NORM_NONE}, {128, 97, 2, 0.7f, EXC_NORM_COLUMN},
        {64, 128, 1, 2, EXC_NORM_COLUMN}, {160, 31, 1, 1, EXC_NORM_NONE},   {96, 129, 4, 40, EXC_NORM_NONE},
    };
    exc_isa_lower(NULL);
    int best = (int)exc_isa_level();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int k = 0; k <= F4; k++)
            for (int at = 0; at < 4; at++) {
                int side = at & 1, rounding = at & 2 ? EXC_ROUND_EXACT : EXC_ROUND_RN;
                if (rounding == EXC_ROUND_EXACT && k != F8_F32 && k != F4) continue; /* which scales there are is nothing to it */
                int64_t along = k == F4 && side != EXC_SIDE_OUT ? (cases[i].along + 31) / 32 * 32 : cases[i].along, lines = cases[i].lines;
                matrix m = side == EXC_SIDE_OUT ? awkward(kinds[k], along, lines) : awkward(kinds[k], lines, along);
                float *basis = directions(cases[i].rank, along, 53);
                said want = {0};
                for (int l = 0; l < 3 && l <= best; l++) {
                    exc_isa_lower(levels[l]);
                    said s = edit(&m, side, basis, cases[i].rank, cases[i].strength, cases[i].norm, rounding, 2, l == 1);
                    if (l == 0) want = s;
                    else {
                        same_said(&m, &want, &s);
                        forget(&s);
                    }
                }
                forget(&want);
                free(basis);
                drop(&m);
            }
    exc_isa_lower(NULL);
}

static void nan_is_counted(void **state) {
    matrix m = make(kinds[F8_F32], 200, 140, 41);
    float *basis = directions(1, 200, 42);
    m.code[5 * 140 + 7] = 0xff;
    said s = edit(&m, EXC_SIDE_OUT, basis, 1, 1, 0, EXC_ROUND_RN, 2, 0);
    assert_int_equal(s.nonfinite, 1);
    for (int64_t h = 0; h < 200; h++) assert_true((s.code[h * 140 + 7] & 0x7f) == 0x7f && (s.code[h * 140 + 8] & 0x7f) != 0x7f);
    forget(&s);
    free(basis);
    drop(&m);
}

/* -------------------------------------------------------------------------------------------------------------- scale */

static void scale_uses_the_scales(void **state) {
    static const double factors[] = {1, 0.5, -2, 0.7, 3, 0};
    exc_ctx *ctx = test_ctx(2);
    for (int k = 0; k <= F4; k++)
        for (size_t f = 0; f < EXC_COUNT(factors); f++) {
            matrix m = make(kinds[k], 150, 160, 51);
            if (factors[f] == 0 && k < F4) m.code[3] = 0x7f;
            uint8_t *code = get(m.bytes + 16), *scale = get(m.scale_bytes + 16);
            const void *src = m.code, *from = m.scale;
            void *dst = code, *to = scale;
            int64_t changed, bad, over;
            struct exc_scale_args a = {.src = &src, .dst = &dst, .dtype = m.k.dtype, .count = 1, .n = 150 * 160, .factor = &factors[f],
                                       .changed = &changed, .nonfinite = &bad, .overflow = &over, .rows = 150, .cols = 160, .scale = &from,
                                       .scale_to = &to, .scale_dtype = m.k.scale_dtype, .scale_power = m.k.power};
            assert_int_equal(exc_cpu_scale(&ctx->queue, &a), EXC_OK);
            assert_int_equal(over, 0);
            int same = 1, exact = factors[f] == 1 || factors[f] == 0.5 || factors[f] == -2 || (k < F4 && k != F8_E8M0 && k != F8_POWER);
            for (int64_t i = 0; i < 150 * 160; i++) {
                double got = value_of(&m, code, scale, i), want = factors[f] == 0 ? 0 : factors[f] * value_of(&m, m.code, m.scale, i);
                same &= (code_of(&m, code, i) & (k == F4 ? 7 : 127)) == (code_of(&m, m.code, i) & (k == F4 ? 7 : 127));
                /* bf16 scales round to 2^-9; what goes into codes to half their spacing, of fp4 up to a third of small numbers */
                double room = k == F8_BF16 ? 0x1p-8 : exact ? 1e-6 : k == F4 ? 0.35 : 0x1p-4;
                double least = exact ? 0 : (k == F4 ? 0.25 : 0x1p-10) * scale_value(&m, scale, scale_place(&m, i)) * 1.001;
                if (fabs(got - want) > room * fabs(want) + least) fail_msg("kind %d, factor %g: %g, want %g", k, factors[f], got, want);
                if (factors[f] == 0) assert_int_equal(code_of(&m, code, i), 0);
            }
            if (exact && factors[f] != 0) assert_true(same);
            if (factors[f] == 1) assert_true(!memcmp(code, m.code, m.bytes) && !memcmp(scale, m.scale, m.scale_bytes));
            assert_int_equal(bad, factors[f] == 0 && k < F4 ? 1 : 0);
            free(code);
            free(scale);
            drop(&m);
        }
    exc_ctx_free(ctx);
}

static void refusals(void **state) {
    exc_ctx *ctx = test_ctx(1);
    matrix m = make(kinds[F4], 4, 64, 1);
    float basis[64] = {1}, strength = 1;
    const void *src = m.code, *scale = m.scale;
    void *dst = m.code, *to = m.scale;
    struct exc_project_args good = {.src = &src, .dst = &dst, .dtype = EXC_F4, .count = 1, .rows = 4, .cols = 64, .basis = basis, .rank = 1,
                                    .strength = &strength, .scale = &scale, .scale_to = &to, .scale_dtype = EXC_F8_E8M0}, a = good;
    assert_int_equal(exc_cpu_project(&ctx->queue, &a), EXC_OK);
    a.scale_dtype = EXC_F32;
    assert_int_equal(exc_cpu_project(&ctx->queue, &a), EXC_ERR_USAGE);
    a = good, a.cols = 33;
    assert_int_equal(exc_cpu_project(&ctx->queue, &a), EXC_ERR_USAGE);
    a = good, a.scale = NULL;
    assert_int_equal(exc_cpu_project(&ctx->queue, &a), EXC_ERR_USAGE);
    a = good, a.rounding = 3;
    assert_int_equal(exc_cpu_project(&ctx->queue, &a), EXC_ERR_USAGE);
    a = good, a.norm = EXC_NORM_ROW; /* needs c */
    assert_int_equal(exc_cpu_project(&ctx->queue, &a), EXC_ERR_USAGE);
    drop(&m);
    exc_ctx_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nearest_everywhere), cmocka_unit_test(what_is_not_reached_stays), cmocka_unit_test(stochastic_is_fair),
        cmocka_unit_test(exact_leaves_little), cmocka_unit_test(levels_agree),             cmocka_unit_test(nan_is_counted),
        cmocka_unit_test(bands_agree),        cmocka_unit_test(scale_uses_the_scales), cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests_name("round", tests, NULL, NULL);
}
