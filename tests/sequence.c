/* sequence.c - embed, norm, rope, attend, lens, convert against f64 loops, at every
 * instruction level this machine has.
 *
 * Tolerances. exp of lanes.h errs by 1.5e-7 relative; f32 sums of n terms of one sign by at most n * 2^-24 in theory, about
 * sqrt(n) * 2^-24 in 16 lanes; a stored bf16 adds half an ulp, 2^-8 of itself. Each check names what it allows. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "helpers.h"

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
    static exc_ctx *open[9];
    if (!open[threads]) open[threads] = test_ctx(threads);
    return &open[threads]->queue;
}

#define GUARD 64
/* n bytes, then 64 guard bytes */
static void *get(size_t n) {
    uint8_t *p = aligned_alloc(64, (n + GUARD + 63) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xa5, n + GUARD);
    return p;
}

static void guarded(const void *p, size_t n) {
    for (int i = 0; i < GUARD; i++) assert_int_equal(((const uint8_t *)p)[n + (size_t)i], 0xa5);
}

static float *normals(int64_t n, uint64_t seed, float scale) {
    float *x = get((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) x[i] = scale * test_normal(seed, (uint64_t)i);
    return x;
}

/* f32 values as stored in act */
static void *stored(const float *x, int64_t n, int act) {
    void *p = get((size_t)n * 4);
    for (int64_t i = 0; i < n; i++)
        if (act == EXC_F32) ((float *)p)[i] = x[i];
        else ((uint16_t *)p)[i] = test_bf16(x[i]);
    return p;
}

static double value(const void *p, int act, int64_t i) {
    return act == EXC_F32 ? (double)((const float *)p)[i] : (double)test_from_bf16(((const uint16_t *)p)[i]);
}

static void close_to(double got, double want, double relative, double absolute, const char *what) {
    if (isnan(want) && isnan(got)) return;
    if (!(fabs(got - want) <= relative * fabs(want) + absolute)) fail_msg("%s: %.9g, not %.9g", what, got, want);
}

static double ulp_of(int act) { return act == EXC_F32 ? 0 : 0x1p-7; }

/* ------------------------------------------------------------------------------------------------------------ convert */

static const double odd_numbers[] = {0.0, -0.0, 1.0, -1.0, 1.0 + 0x1p-8, 1.0 + 0x1p-8 + 0x1p-40, 1.0 + 0x3p-8, 1.0 + 0x1p-11,
                                     1.0 + 0x1p-11 + 0x1p-45, 1.0 + 0x1p-24, 1.0 + 0x1p-24 + 0x1p-52, 65504.0, 65519.9,
                                     65520.0, 65536.0, 1e30, 1e39, -1e39, 1e300, 0x1p-14, 0x1p-24, 0x1p-25, 0x1.8p-25,
                                     0x1p-126, 0x1p-133, 0x1p-134, 0x1.8p-134, 0x1p-149, 0x1p-150, 0x1.4p-16, 3.0e-5, 1e-40,
                                     0x1.fffffep127, 0x1.fep127, 0x1.ffp127, INFINITY, -INFINITY, NAN};

/* x rounded to nearest even on a grid of `bits` significant bits, smallest exponent `low`, overflow at `limit` */
static double rounded(double x, int bits, int low, double limit) {
    if (!isfinite(x) || x == 0) return x;
    int e;
    frexp(x, &e);
    int unit = e - bits < low ? low : e - bits;
    double y = ldexp(nearbyint(ldexp(x, -unit)), unit);
    return fabs(y) > limit ? copysign(INFINITY, x) : y;
}

static double as_dtype(double x, int dtype) {
    if (dtype == EXC_F64) return x;
    if (dtype == EXC_F32) return rounded(x, 24, -149, 0x1.fffffep127);
    return dtype == EXC_BF16 ? rounded(x, 8, -133, 0x1.fep127) : rounded(x, 11, -24, 65504);
}

static size_t size_of(int dtype) { return dtype == EXC_F64 ? 8 : dtype == EXC_F32 ? 4 : 2; }

static double read_as(const void *p, int dtype, int64_t i) {
    if (dtype == EXC_F64) return ((const double *)p)[i];
    if (dtype != EXC_F16) return value(p, dtype, i);
    uint16_t h = ((const uint16_t *)p)[i];
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 0 ? ldexp(m, -24) : e == 31 ? (m ? (double)NAN : (double)INFINITY) : ldexp(m + 1024, e - 25);
    return h & 0x8000 ? -v : v;
}

/* x must be exact in the dtype */
static void write_as(void *p, int dtype, int64_t i, double x) {
    if (dtype == EXC_F64) ((double *)p)[i] = x;
    else if (dtype == EXC_F32) ((float *)p)[i] = (float)x;
    else if (dtype == EXC_BF16) ((uint16_t *)p)[i] = test_bf16((float)x);
    else {
        uint16_t sign = signbit(x) ? 0x8000 : 0, h;
        double a = fabs(x);
        int e;
        if (isnan(x)) h = 0x7e00;
        else if (isinf(x)) h = 0x7c00;
        else if (a < 0x1p-14) h = (uint16_t)ldexp(a, 24);
        else h = (uint16_t)(frexp(a, &e) * 2048), h = (uint16_t)(h - 1024 + ((e + 14) << 10));
        ((uint16_t *)p)[i] = h | sign;
    }
}

static void convert_body(void) {
    static const int dtypes[] = {EXC_F32, EXC_BF16, EXC_F16, EXC_F64};
    const int64_t n = 70001, special = (int64_t)EXC_COUNT(odd_numbers);
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++) {
            size_t out_bytes = (size_t)n * size_of(dtypes[to]);
            void *src = get((size_t)n * 8), *dst = get(out_bytes);
            for (int64_t i = 0; i < n; i++) {
                double x = i < special ? odd_numbers[i] : (double)test_normal(3, (uint64_t)i) * (1 + 0x1p-30);
                write_as(src, dtypes[from], i, as_dtype(i % 3 ? x : ldexp(x, (int)(i % 60) - 40), dtypes[from]));
            }
            int64_t bad = -7, index = -7, want = 0, first = -1;
            for (int64_t i = n; i-- > 0;)
                if (!isfinite(read_as(src, dtypes[from], i))) want++, first = i;
            assert_int_equal(exc_cpu_convert(queue_of(2), &(struct exc_convert_args){src, dtypes[from], dst, dtypes[to], n, &bad,
                                                                                     &index}), EXC_OK);
            assert_int_equal(bad, want);
            assert_int_equal(index, first);
            for (int64_t i = 0; i < n; i++) {
                double x = read_as(src, dtypes[from], i), y = read_as(dst, dtypes[to], i), z = as_dtype(x, dtypes[to]);
                if (isnan(z) ? !isnan(y) : y != z || signbit(y) != signbit(z))
                    fail_msg("%d -> %d: %a gives %a, not %a", dtypes[from], dtypes[to], x, y, z);
            }
            guarded(dst, out_bytes);
            free(src);
            free(dst);
        }
}

static void convert_rounds_once(void **state) { at_every_level(convert_body); }

static void convert_only_looks(void **state) {
    uint16_t x[3000] = {0};
    int64_t bad, index;
    exc_queue *q = queue_of(2);
    struct exc_convert_args a = {x, EXC_BF16, NULL, EXC_BF16, 3000, &bad, &index};
    assert_int_equal(exc_cpu_convert(q, &a), EXC_OK);
    assert_int_equal(bad, 0);
    assert_int_equal(index, -1);
    x[2999] = 0x7fc0, x[1025] = 0xff80;
    assert_int_equal(exc_cpu_convert(q, &a), EXC_OK);
    assert_int_equal(bad, 2);
    assert_int_equal(index, 1025);
    a.n = 0;
    assert_int_equal(exc_cpu_convert(q, &a), EXC_OK);
    assert_int_equal(bad, 0);
    a.src_dtype = EXC_I32;
    assert_int_equal(exc_cpu_convert(q, &a), EXC_ERR_USAGE);
}

/* ---------------------------------------------------------------------------------------------------- embed, norm, lens */

static void embed_body(void) {
    static const int dtypes[] = {EXC_F32, EXC_BF16, EXC_F16};
    const int64_t V = 50, H = 33, T = 2500;
    int32_t *ids = get((size_t)T * 4);
    for (int64_t t = 0; t < T; t++) ids[t] = (int32_t)(exc_random_u64(1, 2, (uint64_t)t) % (uint64_t)V);
    for (int d = 0; d < 3; d++) {
        void *table = get((size_t)(V * H) * 4);
        float *out = get((size_t)(T * H) * 4);
        for (int64_t i = 0; i < V * H; i++)
            write_as(table, dtypes[d], i, as_dtype((double)test_normal(5, (uint64_t)i) * (i % 7 ? 1 : 1e-6), dtypes[d]));
        assert_int_equal(exc_cpu_embed(queue_of(2), &(struct exc_embed_args){table, dtypes[d], ids, T, H, out}), EXC_OK);
        for (int64_t i = 0; i < T * H; i++)
            assert_true((double)out[i] == read_as(table, dtypes[d], ids[i / H] * H + i % H));
        guarded(out, (size_t)(T * H) * 4);
        free(table);
        free(out);
    }
    free(ids);
}

static void embed_widens_exactly(void **state) { at_every_level(embed_body); }

static void norm_body(void) {
    static const int64_t dims[] = {1, 15, 16, 31, 33, 127, 1024};
    for (size_t s = 0; s < EXC_COUNT(dims); s++)
        for (int c = 0; c < 4; c++) {
            int64_t rows = 130, dim = dims[s], xs = dim + 3, ys = dim + 5;
            int act = c & 1 ? EXC_BF16 : EXC_F32, centred = c >> 1;
            float *x = normals(rows * xs, s, 3), *w = normals(dim, 9, 1), eps = 1e-6f;
            void *y = get((size_t)(rows * ys) * 4);
            assert_int_equal(exc_cpu_norm(queue_of(3), &(struct exc_norm_args){x, xs, w, centred, eps, rows, dim, y, ys, act}),
                             EXC_OK);
            for (int64_t r = 0; r < rows; r++) {
                double sum = 0;
                for (int64_t i = 0; i < dim; i++) sum += (double)x[r * xs + i] * (double)x[r * xs + i];
                double inverse = 1 / sqrt(sum / (double)dim + (double)eps);
                for (int64_t i = 0; i < dim; i++)
                    close_to(value(y, act, r * ys + i), ((double)w[i] + centred) * (double)x[r * xs + i] * inverse,
                             1e-6 + ulp_of(act) / 2, 0, "norm");
                /* the gap between rows is not touched */
                size_t e = size_of(act);
                for (size_t b = 0; b < 5 * e; b++) assert_int_equal(((uint8_t *)y)[(size_t)(r * ys + dim) * e + b], 0xa5);
            }
            free(x);
            free(w);
            free(y);
        }
}

static void norm_by_row(void **state) { at_every_level(norm_body); }

static void lens_body(void) {
    static const int64_t hidden[] = {1, 31, 64, 127, 300};
    for (size_t s = 0; s < EXC_COUNT(hidden); s++)
        for (int64_t R = 0; R < 4; R++) {
            int64_t T = 37, H = hidden[s];
            float *y = normals(T * H, s, 1), *b = normals(R * H + 1, 50 + s, 1 / sqrtf((float)H)), *old = normals(T * H, s, 1);
            assert_int_equal(exc_cpu_lens(queue_of(2), &(struct exc_lens_args){y, T, H, b, R, 0.7f}), EXC_OK);
            for (int64_t t = 0; t < T; t++)
                for (int64_t i = 0; i < H; i++) {
                    double want = (double)old[t * H + i];
                    for (int64_t r = 0; r < R; r++) {
                        double dot = 0;
                        for (int64_t k = 0; k < H; k++) dot += (double)b[r * H + k] * (double)old[t * H + k];
                        want -= (double)0.7f * dot * (double)b[r * H + i];
                    }
                    close_to((double)y[t * H + i], want, 1e-6, 4e-6, "lens");
                }
            guarded(y, (size_t)(T * H) * 4);
            free(y);
            free(b);
            free(old);
        }
}

static void lens_projects(void **state) { at_every_level(lens_body); }

/* --------------------------------------------------------------------------------------------------------------- rope */

static void rope_body(void) {
    for (int c = 0; c < 8; c++) {
        int act = c & 1 ? EXC_BF16 : EXC_F32, with_norm = c & 2, partial = c & 4;
        int64_t T = 9, QH = 4, KH = 2, D = c & 2 ? 34 : 64, rot = partial ? D / 2 / 2 * 2 : D, row = (QH + 2 * KH) * D;
        float *x = normals(T * row, 77, 1), *qn = normals(D, 1, 1), *kn = normals(D, 2, 1), inv[64];
        int32_t position[9] = {0, 1, 2, 3, 100, 4095, 40000, 262143, 1048575};
        int64_t cache_row[9] = {3, 4, 5, 6, 0, 1, 2, 9, 8};
        for (int64_t i = 0; i < rot / 2; i++) inv[i] = (float)pow(10000.0, -2.0 * (double)i / (double)rot);
        size_t qb = (size_t)(T * QH * D) * size_of(act), kb = (size_t)(10 * KH * D) * size_of(act);
        void *q = get(qb), *ck = get(kb), *cv = get(kb);
        struct exc_rope_args a = {.q = x, .q_stride = row, .k = x + QH * D, .k_stride = row, .v = x + (QH + KH) * D,
                                  .v_stride = row, .q_norm = with_norm ? qn : NULL, .k_norm = with_norm ? kn : NULL,
                                  .eps = 1e-6f, .inv_freq = inv, .rotary = rot, .attention_factor = 1.25f,
                                  .position = position, .cache_row = cache_row, .tokens = T, .q_heads = QH, .kv_heads = KH,
                                  .head_dim = D, .q_out = q, .cache_k = ck, .cache_v = cv, .act = act};
        assert_int_equal(exc_cpu_rope(queue_of(2), &a), EXC_OK);
        for (int64_t t = 0; t < T; t++)
            for (int64_t h = 0; h < QH + 2 * KH; h++) {
                const float *from = x + t * row + h * D;
                double y[64], sum = 0;
                for (int64_t i = 0; i < D; i++) sum += (double)from[i] * (double)from[i];
                const float *w = h < QH ? qn : kn;
                int turned = h < QH + KH;
                for (int64_t i = 0; i < D; i++)
                    y[i] = (double)from[i] * (with_norm && turned ? (double)w[i] / sqrt(sum / (double)D + 1e-6) : 1);
                for (int64_t i = 0; turned && i < rot / 2; i++) {
                    double angle = (double)(float)((double)position[t] * (double)inv[i]), u = y[i], v = y[i + rot / 2];
                    y[i] = 1.25 * (u * cos(angle) - v * sin(angle));
                    y[i + rot / 2] = 1.25 * (v * cos(angle) + u * sin(angle));
                }
                for (int64_t i = 0; i < D; i++) {
                    double got = h < QH ? value(q, act, (t * QH + h) * D + i)
                                 : turned ? value(ck, act, (cache_row[t] * KH + h - QH) * D + i)
                                          : value(cv, act, (cache_row[t] * KH + h - QH - KH) * D + i);
                    close_to(got, y[i], 1e-6 + ulp_of(act) / 2, 2e-6, "rope");
                }
            }
        guarded(q, qb);
        guarded(ck, kb);
        assert_int_equal(((uint8_t *)ck)[(size_t)(7 * KH * D) * size_of(act)], 0xa5); /* row 7 belongs to nobody */
        free(x), free(qn), free(kn), free(q), free(ck), free(cv);
    }
}

static void rope_turns_and_stores(void **state) { at_every_level(rope_body); }

/* ------------------------------------------------------------------------------------------------------------- attend */

typedef struct ragged {
    int64_t sequences, q_heads, kv_heads, head_dim;
    int64_t q_begin[9], cache_begin[8], length[8];
    int64_t tokens, cache;
    void *q, *k, *v, *out;
    int act;
    int64_t window, ring;
    float *sinks;
} ragged;

static ragged ragged_make(const int64_t (*shape)[2], int64_t n, int64_t qh, int64_t kh, int64_t d, int act) {
    ragged r = {.sequences = n, .q_heads = qh, .kv_heads = kh, .head_dim = d, .act = act};
    for (int64_t s = 0; s < n; s++) {
        r.cache_begin[s] = r.cache + 1; /* a row between sequences belongs to nobody */
        r.length[s] = shape[s][1];
        r.cache += shape[s][1] + 1;
        r.q_begin[s + 1] = r.q_begin[s] + shape[s][0];
    }
    r.cache++;
    r.tokens = r.q_begin[n];
    float *q = normals(r.tokens * qh * d, 1, 1), *k = normals(r.cache * kh * d, 2, 1), *v = normals(r.cache * kh * d, 3, 1);
    for (int64_t i = 0; i < kh * d; i++) { /* what belongs to nobody must not be seen */
        for (int64_t s = 0; s < n; s++) k[(r.cache_begin[s] - 1) * kh * d + i] = v[(r.cache_begin[s] - 1) * kh * d + i] = NAN;
        k[(r.cache - 1) * kh * d + i] = v[(r.cache - 1) * kh * d + i] = NAN;
    }
    r.q = stored(q, r.tokens * qh * d, act);
    r.k = stored(k, r.cache * kh * d, act);
    r.v = stored(v, r.cache * kh * d, act);
    r.out = get((size_t)(r.tokens * qh * d) * size_of(act));
    free(q), free(k), free(v);
    return r;
}

/* a window, and NaN in all that lies before the first key that a query of a sequence sees */
static void ragged_narrow(ragged *r, int64_t window) {
    int64_t width = r->kv_heads * r->head_dim;
    r->window = window;
    for (int64_t s = 0; s < r->sequences; s++) {
        int64_t unseen = r->length[s] - (r->q_begin[s + 1] - r->q_begin[s]) + 1 - window;
        for (int64_t i = 0; i < unseen * width; i++) {
            write_as(r->k, r->act, r->cache_begin[s] * width + i, NAN);
            write_as(r->v, r->act, r->cache_begin[s] * width + i, NAN);
        }
    }
}

/* sinks above, among and below the scores, and one that is not there */
static void ragged_sink(ragged *r) {
    r->sinks = normals(r->q_heads, 31, 2);
    r->sinks[0] = 40;
    r->sinks[r->q_heads - 1] = -INFINITY;
}

static void ragged_free(ragged *r) { free(r->q), free(r->k), free(r->v), free(r->out), free(r->sinks); }

static void ragged_run(const ragged *r, int threads, void *out) {
    float scale = 1 / sqrtf((float)r->head_dim);
    int64_t D = r->head_dim, row = r->kv_heads * D;
    struct exc_attend_args a = {r->q, r->k, row, r->v, row, r->q_begin, r->cache_begin, r->length, r->sequences, r->q_heads,
                                r->kv_heads, D, D, scale, r->act, r->window, r->sinks, out, r->q_begin[r->sequences], 0, r->ring};
    for (int64_t s = 0; s < r->sequences; s++) a.longest = r->length[s] > a.longest ? r->length[s] : a.longest;
    assert_int_equal(exc_cpu_attend(queue_of(threads), &a), EXC_OK);
}

static void attend_check(const ragged *r) {
    double *p = malloc((size_t)r->cache * sizeof *p), scale = (double)(1 / sqrtf((float)r->head_dim));
    int64_t D = r->head_dim;
    for (int64_t s = 0; s < r->sequences; s++)
        for (int64_t t = r->q_begin[s]; t < r->q_begin[s + 1]; t++)
            for (int64_t h = 0; h < r->q_heads; h++) {
                int64_t n = r->length[s] - (r->q_begin[s + 1] - t) + 1, kv = h / (r->q_heads / r->kv_heads);
                int64_t first = r->window && n > r->window ? n - r->window : 0;
                double sink = r->sinks ? (double)r->sinks[h] : -INFINITY, top = sink, sum;
                for (int64_t j = first; j < n; j++) {
                    p[j] = 0;
                    for (int64_t i = 0; i < D; i++)
                        p[j] += value(r->q, r->act, (t * r->q_heads + h) * D + i) *
                                value(r->k, r->act, ((r->cache_begin[s] + j) * r->kv_heads + kv) * D + i);
                    p[j] *= scale;
                    top = fmax(top, p[j]);
                }
                sum = exp(sink - top);
                for (int64_t j = first; j < n; j++) sum += p[j] = exp(p[j] - top);
                for (int64_t i = 0; i < D; i++) {
                    double want = 0;
                    for (int64_t j = first; j < n; j++)
                        want += p[j] / sum * value(r->v, r->act, ((r->cache_begin[s] + j) * r->kv_heads + kv) * D + i);
                    close_to(value(r->out, r->act, (t * r->q_heads + h) * D + i), want, 3e-6 + ulp_of(r->act) / 2, 3e-6,
                             "attend");
                }
            }
    free(p);
}

static const int64_t shapes[][2] = {{1, 1}, {33, 33}, {1, 65}, {70, 130}, {5, 64}, {1, 300}, {0, 40}, {127, 127}};

static void attend_body(void) {
    static const int64_t heads[][3] = {{4, 2, 32}, {1, 1, 33}, {6, 2, 80}, {5, 1, 16}};
    for (size_t h = 0; h < EXC_COUNT(heads); h++) {
        ragged r = ragged_make(shapes, 8, heads[h][0], heads[h][1], heads[h][2], h & 1 ? EXC_F32 : EXC_BF16);
        size_t bytes = (size_t)(r.tokens * r.q_heads * r.head_dim) * size_of(r.act);
        ragged_run(&r, 1, r.out);
        attend_check(&r);
        guarded(r.out, bytes);
        void *again = get(bytes);
        ragged_run(&r, 3, again);
        assert_memory_equal(again, r.out, bytes);
        free(again);
        ragged_free(&r);
    }
}

static void attend_ragged(void **state) { at_every_level(attend_body); }

static void window_body(void) {
    static const int64_t windows[] = {1, 2, 7, 63, 64, 65, 128, 1000};
    for (size_t w = 0; w < EXC_COUNT(windows); w++)
        for (int with_sinks = 0; with_sinks < 2; with_sinks++) {
            ragged r = ragged_make(shapes, 8, with_sinks ? 2 : 6, 2, 24, w & 1 ? EXC_F32 : EXC_BF16);
            size_t bytes = (size_t)(r.tokens * r.q_heads * r.head_dim) * size_of(r.act);
            ragged_narrow(&r, windows[w]);
            if (with_sinks) ragged_sink(&r);
            ragged_run(&r, 2, r.out);
            attend_check(&r);
            guarded(r.out, bytes);
            ragged_free(&r);
        }
}

static void attend_windows_and_sinks(void **state) { at_every_level(window_body); }

/* the keys that are seen, in rings just large enough, and NaN where no key is: the same bits */
static void ring_body(void) {
    static const int64_t windows[] = {1, 63, 64, 130};
    for (size_t w = 0; w < EXC_COUNT(windows); w++) {
        ragged r = ragged_make(shapes, 8, 6, 2, 24, w & 1 ? EXC_F32 : EXC_BF16), q = r;
        size_t bytes = (size_t)(r.tokens * r.q_heads * r.head_dim) * size_of(r.act), row = (size_t)(r.kv_heads * r.head_dim) * size_of(r.act);
        ragged_narrow(&r, windows[w]);
        ragged_run(&r, 2, r.out);
        q.window = r.window;
        q.ring = (r.window + 126 + 63) / 64 * 64; /* 127 queries at most */
        q.k = malloc((size_t)(8 * q.ring) * row), q.v = malloc((size_t)(8 * q.ring) * row), q.out = get(bytes);
        memset(q.k, 0xff, (size_t)(8 * q.ring) * row), memset(q.v, 0xff, (size_t)(8 * q.ring) * row);
        for (int64_t s = 0; s < 8; s++) {
            int64_t n = r.q_begin[s + 1] - r.q_begin[s], first = r.length[s] - n + 1 - r.window;
            q.cache_begin[s] = (7 - s) * q.ring;
            for (int64_t p = first < 0 ? 0 : first; p < r.length[s]; p++) {
                size_t to = (size_t)(q.cache_begin[s] + p % q.ring) * row, from = (size_t)(r.cache_begin[s] + p) * row;
                memcpy((uint8_t *)q.k + to, (uint8_t *)r.k + from, row);
                memcpy((uint8_t *)q.v + to, (uint8_t *)r.v + from, row);
            }
        }
        ragged_run(&q, 2, q.out);
        assert_memory_equal(q.out, r.out, bytes);
        free(q.k), free(q.v), free(q.out);
        ragged_free(&r);
    }
}

static void attend_goes_round(void **state) { at_every_level(ring_body); }

/* pages in front of the window cannot be read at all */
static void unread_body(void) {
    static const int64_t one[][2] = {{1, 3000}};
    ragged r = ragged_make(one, 1, 4, 2, 16, EXC_F32);
    int64_t row = 2 * 16 * 4, page = 4096, hidden = (3001 - 70) * row / page * page;
    size_t bytes = (size_t)(r.cache * row);
    void *copy[2];
    for (int i = 0; i < 2; i++) {
        copy[i] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_ptr_not_equal(copy[i], MAP_FAILED);
        memcpy(copy[i], i ? r.v : r.k, bytes);
        assert_int_equal(mprotect(copy[i], (size_t)hidden, PROT_NONE), 0);
    }
    r.window = 70;
    ragged behind = r;
    behind.k = copy[0], behind.v = copy[1];
    ragged_run(&behind, 2, r.out);
    attend_check(&r);
    for (int i = 0; i < 2; i++) munmap(copy[i], bytes);
    ragged_free(&r);
}

static void attend_reads_only_the_window(void **state) { at_every_level(unread_body); }

/* a prompt in one piece, in two pieces, token by token: the same bits */
static void pieces_of(int64_t window) {
    static const int64_t all[][2] = {{150, 150}};
    ragged r = ragged_make(all, 1, 4, 2, 32, EXC_BF16);
    if (window) ragged_narrow(&r, window), ragged_sink(&r);
    size_t token = (size_t)(4 * 32 * 2);
    ragged_run(&r, 2, r.out);
    uint8_t *again = get(150 * token);
    for (int64_t step = 1; step <= 70; step += 69)
        for (int64_t at = 0; at < 150; at += step) {
            ragged piece = r;
            int64_t n = at + step < 150 ? step : 150 - at;
            piece.q = (uint8_t *)r.q + (size_t)at * token;
            piece.q_begin[1] = n;
            piece.length[0] = at + n;
            ragged_run(&piece, 1, again + (size_t)at * token);
            assert_memory_equal(again + (size_t)at * token, (uint8_t *)r.out + (size_t)at * token, (size_t)n * token);
        }
    free(again);
    ragged_free(&r);
}

static void pieces_body(void) {
    static const int64_t windows[] = {0, 1, 37, 100};
    for (size_t i = 0; i < EXC_COUNT(windows); i++) pieces_of(windows[i]);
}

static void attend_same_bits_in_pieces(void **state) { at_every_level(pieces_body); }

/* long caches are spread over tasks when the batch is small, not when it is large: the same bits */
static void spans_of(int64_t window) {
    static const int64_t one[][2] = {{3, 3000}}, many[][2] = {{3, 3000}, {160, 160}, {160, 160}, {160, 160}, {160, 160}};
    ragged a = ragged_make(one, 1, 4, 2, 16, EXC_F32), b = ragged_make(many, 5, 4, 2, 16, EXC_F32);
    size_t kv = (size_t)(3000 + 1) * 2 * 16 * 4, rows = 3 * 4 * 16 * 4;
    a.window = b.window = window;
    if (window) ragged_sink(&a), ragged_sink(&b);
    memcpy(b.q, a.q, rows);
    memcpy(b.k, a.k, kv);
    memcpy(b.v, a.v, kv);
    ragged_run(&a, 3, a.out);
    attend_check(&a);
    ragged_run(&b, 2, b.out);
    attend_check(&b);
    assert_memory_equal(a.out, b.out, rows);
    ragged_free(&a);
    ragged_free(&b);
}

static void spans_body(void) {
    static const int64_t windows[] = {0, 128, 951, 2000}; /* 951: from the middle of one span to the end */
    for (size_t i = 0; i < EXC_COUNT(windows); i++) spans_of(windows[i]);
}

static void attend_long_caches(void **state) { at_every_level(spans_body); }

static void attend_nan_stays_where_it_is_seen(void **state) {
    static const int64_t all[][2] = {{20, 20}};
    ragged r = ragged_make(all, 1, 2, 1, 16, EXC_F32);
    ((float *)r.v)[(r.cache_begin[0] + 10) * 16] = NAN;
    ragged_run(&r, 1, r.out);
    for (int64_t t = 0; t < 20; t++)
        for (int64_t i = 0; i < 32; i++)
            assert_int_equal(isnan(((float *)r.out)[t * 32 + i]) != 0, t >= 10 && i % 16 == 0);
    ragged_free(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(convert_rounds_once),
        cmocka_unit_test(convert_only_looks),
        cmocka_unit_test(embed_widens_exactly),
        cmocka_unit_test(norm_by_row),
        cmocka_unit_test(lens_projects),
        cmocka_unit_test(rope_turns_and_stores),
        cmocka_unit_test(attend_ragged),
        cmocka_unit_test(attend_windows_and_sinks),
        cmocka_unit_test(attend_goes_round),
        cmocka_unit_test(attend_reads_only_the_window),
        cmocka_unit_test(attend_same_bits_in_pieces),
        cmocka_unit_test(attend_long_caches),
        cmocka_unit_test(attend_nan_stays_where_it_is_seen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
