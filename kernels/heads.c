/* heads.c - see heads.h. The products are written with intrinsics: a tile of 4 rows x 64 columns keeps its 16 sums in
 * registers on AVX-512, 4 x 16 on AVX2. Products of bf16 operands are exact in either form; by pairs they cost half. An
 * element is one chain of multiply-adds whatever the tile's height, so the bits of a row depend on that row alone. */
#include "heads.h"

#define MULTIPLY_PARAMS                                                                                            \
    (const float *a, int64_t a_stride, int rows, const float *b, int64_t b_stride, int64_t k, float *c, int64_t c_stride, \
     int vectors, int add)

static void multiply_generic MULTIPLY_PARAMS {
    for (int r = 0; r < rows; r++) {
        float *to = c + r * c_stride;
        for (int i = 0; i < vectors * LANES && !add; i++) to[i] = 0;
        for (int64_t d = 0; d < k; d++)
            for (int i = 0; i < vectors * LANES; i++) to[i] += a[r * a_stride + d] * b[d * b_stride + i];
    }
}

EXC_INLINE void turn_body(const void *keys, int64_t stride, int act, int n, int64_t dim, float *out) {
    int wide = (n + LANES - 1) / LANES * LANES;
    for (int j = 0; j < n; j++) {
        const uint16_t *half = (const uint16_t *)keys + j * stride;
        const float *full = (const float *)keys + j * stride;
        for (int64_t d = 0; d < dim; d++) out[d * EXC_KEYS + j] = act == EXC_F32 ? full[d] : exc_from_bf16(half[d]);
    }
    for (int64_t d = 0; d < dim; d++)
        for (int j = n; j < wide; j++) out[d * EXC_KEYS + j] = 0;
}

EXC_INLINE void widen_body(const void *rows, int64_t stride, int act, int n, int64_t dim, int64_t width, float *out) {
    size_t size = act == EXC_F32 ? 4 : 2;
    for (int j = 0; j < n; j++) {
        exc_load_row((const uint8_t *)rows + (size_t)(j * stride) * size, act, dim, out + j * width);
        for (int64_t d = dim; d < width; d++) out[j * width + d] = 0;
    }
}

EXC_INLINE void soften_body(float *s, int n, float scale, float *m, float *sum, float *factor) {
    int wide = (n + LANES - 1) / LANES * LANES;
    float lane[LANES], top = *m, l[LANES] = {0};
    for (int i = 0; i < n; i++) s[i] *= scale;
    for (int i = n; i < wide; i++) s[i] = -__builtin_inff();
    for (int i = 0; i < LANES; i++) lane[i] = top;
    for (int j = 0; j < wide; j += LANES)
        for (int i = 0; i < LANES; i++) lane[i] = s[j + i] > lane[i] ? s[j + i] : lane[i];
    for (int i = 0; i < LANES; i++) top = lane[i] > top ? lane[i] : top;
    for (int j = 0; j < wide; j += LANES)
        for (int i = 0; i < LANES; i++) {
            s[j + i] = exc_exp_down(s[j + i] - top);
            l[i] += s[j + i];
        }
    *factor = top == *m ? 1.0f : exc_exp_down(*m - top);
    *sum = *sum * *factor + exc_lane_sum(l);
    *m = top;
}

EXC_INLINE void scale_body(float *x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i++) x[i] *= by;
}

EXC_INLINE void round_body(const float *x, int64_t n, float by, void *out, int act) {
    if (act == EXC_F32)
        for (int64_t i = 0; i < n; i++) ((float *)out)[i] = x[i] * by;
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)out)[i] = (uint16_t)exc_round_bf16(x[i] * by);
}

EXC_VARIANTS(turn, (const void *keys, int64_t stride, int act, int n, int64_t dim, float *out),
             (keys, stride, act, n, dim, out))
EXC_VARIANTS(widen, (const void *rows, int64_t stride, int act, int n, int64_t dim, int64_t width, float *out),
             (rows, stride, act, n, dim, width, out))
EXC_VARIANTS(soften, (float *s, int n, float scale, float *m, float *sum, float *factor), (s, n, scale, m, sum, factor))
EXC_VARIANTS(scale, (float *x, int64_t n, float by), (x, n, by))
EXC_VARIANTS(round, (const float *x, int64_t n, float by, void *out, int act), (x, n, by, out, act))

static const exc_heads generic = {multiply_generic, turn_generic, widen_generic, soften_generic, scale_generic,
                                  round_generic,    NULL,         NULL};

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq")))
#define DOT __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")))

/* 16 columns of up to 4 rows */
AVX2 EXC_INLINE void tile_avx2(const float *a, int64_t a_stride, int rows, const float *b, int64_t b_stride, int64_t k,
                               float *c, int64_t c_stride, int add) {
    __m256 lo[4], hi[4];
    for (int r = 0; r < rows; r++) {
        lo[r] = add ? _mm256_loadu_ps(c + r * c_stride) : _mm256_setzero_ps();
        hi[r] = add ? _mm256_loadu_ps(c + r * c_stride + 8) : _mm256_setzero_ps();
    }
    for (int64_t d = 0; d < k; d++, b += b_stride) {
        __m256 x = _mm256_loadu_ps(b), y = _mm256_loadu_ps(b + 8);
        for (int r = 0; r < rows; r++) {
            __m256 v = _mm256_set1_ps(a[r * a_stride + d]);
            lo[r] = _mm256_fmadd_ps(v, x, lo[r]);
            hi[r] = _mm256_fmadd_ps(v, y, hi[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm256_storeu_ps(c + r * c_stride, lo[r]);
        _mm256_storeu_ps(c + r * c_stride + 8, hi[r]);
    }
}

AVX2 static void multiply_avx2 MULTIPLY_PARAMS {
    for (int v = 0; v < vectors; v++, b += LANES, c += LANES)
        switch (rows) {
        case 1: tile_avx2(a, a_stride, 1, b, b_stride, k, c, c_stride, add); break;
        case 2: tile_avx2(a, a_stride, 2, b, b_stride, k, c, c_stride, add); break;
        case 3: tile_avx2(a, a_stride, 3, b, b_stride, k, c, c_stride, add); break;
        default: tile_avx2(a, a_stride, 4, b, b_stride, k, c, c_stride, add);
        }
}

AVX512 EXC_INLINE void tile_avx512(const float *a, int64_t a_stride, int rows, const float *b, int64_t b_stride,
                                   int64_t k, float *c, int64_t c_stride, int vectors, int add) {
    __m512 sum[4][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(c + r * c_stride + v * LANES) : _mm512_setzero_ps();
    for (int64_t d = 0; d < k; d++, b += b_stride) {
        __m512 x[4];
        for (int v = 0; v < vectors; v++) x[v] = _mm512_loadu_ps(b + v * LANES);
        for (int r = 0; r < rows; r++) {
            __m512 y = _mm512_set1_ps(a[r * a_stride + d]);
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_fmadd_ps(y, x[v], sum[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + r * c_stride + v * LANES, sum[r][v]);
}

#define ROWS_OF(R)                                                                                                 \
    AVX512 static void rows_##R(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t k, float *c, \
                                int64_t c_stride, int vectors, int add) {                                          \
        switch (vectors) {                                                                                         \
        case 1: tile_avx512(a, a_stride, R, b, b_stride, k, c, c_stride, 1, add); break;                           \
        case 2: tile_avx512(a, a_stride, R, b, b_stride, k, c, c_stride, 2, add); break;                           \
        case 3: tile_avx512(a, a_stride, R, b, b_stride, k, c, c_stride, 3, add); break;                           \
        default: tile_avx512(a, a_stride, R, b, b_stride, k, c, c_stride, 4, add);                                 \
        }                                                                                                          \
    }
ROWS_OF(1)
ROWS_OF(2)
ROWS_OF(3)
ROWS_OF(4)

AVX512 static void multiply_avx512 MULTIPLY_PARAMS {
    switch (rows) {
    case 1: rows_1(a, a_stride, b, b_stride, k, c, c_stride, vectors, add); break;
    case 2: rows_2(a, a_stride, b, b_stride, k, c, c_stride, vectors, add); break;
    case 3: rows_3(a, a_stride, b, b_stride, k, c, c_stride, vectors, add); break;
    default: rows_4(a, a_stride, b, b_stride, k, c, c_stride, vectors, add);
    }
}

/* 16 vectors of 16 words, transposed */
AVX512 EXC_INLINE void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    }
}

/* 16 words of each of 16 keys, transposed: a word is one f32 or a pair of bf16 */
AVX512 EXC_INLINE int take_words(const void *keys, int64_t stride, int first, int n, int64_t d, int64_t dim, int64_t per,
                                 __m512i *word) {
    int64_t left = (dim - d) / per;
    __mmask16 mask = (__mmask16)(left >= LANES ? 0xffff : (1 << left) - 1);
    for (int j = 0; j < LANES; j++) {
        const uint8_t *row = (const uint8_t *)keys + ((first + j) * stride + d) * (4 / per);
        word[j] = first + j < n ? _mm512_maskz_loadu_epi32(mask, row) : _mm512_setzero_si512();
    }
    transpose(word);
    return left < LANES ? (int)left : LANES;
}

AVX512 static void turn_wide(const void *keys, int64_t stride, int act, int n, int64_t dim, float *out) {
    int64_t per = act == EXC_F32 ? 1 : 2;
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    if (dim % per) {
        turn_avx512(keys, stride, act, n, dim, out);
        return;
    }
    for (int first = 0; first < n; first += LANES)
        for (int64_t d = 0; d < dim; d += LANES * per) {
            __m512i word[16];
            int words = take_words(keys, stride, first, n, d, dim, per, word);
            float *to = out + d * EXC_KEYS + first;
            for (int w = 0; w < words; w++, to += per * EXC_KEYS) {
                if (act == EXC_F32) {
                    _mm512_storeu_si512(to, word[w]);
                } else {
                    _mm512_storeu_si512(to, _mm512_slli_epi32(word[w], 16));
                    _mm512_storeu_si512(to + EXC_KEYS, _mm512_and_si512(word[w], high));
                }
            }
        }
}

AVX512 static void turn_pairs(const void *keys, int64_t stride, int n, int64_t dim, uint32_t *out) {
    for (int first = 0; first < n; first += LANES)
        for (int64_t d = 0; d < dim; d += 2 * LANES) {
            __m512i word[16];
            int words = take_words(keys, stride, first, n, d, dim, 2, word);
            for (int w = 0; w < words; w++) _mm512_storeu_si512(out + (d / 2 + w) * EXC_KEYS + first, word[w]);
        }
}

DOT EXC_INLINE void dot_tile(const uint32_t *a, int64_t a_stride, int rows, const uint32_t *b, int64_t pairs, float *c,
                             int64_t c_stride, int vectors) {
    __m512 sum[4][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_setzero_ps();
    for (int64_t d = 0; d < pairs; d++, b += EXC_KEYS) {
        __m512bh x[4];
        for (int v = 0; v < vectors; v++) x[v] = (__m512bh)_mm512_loadu_si512(b + v * LANES);
        for (int r = 0; r < rows; r++) {
            __m512bh y = (__m512bh)_mm512_set1_epi32((int)a[r * a_stride + d]);
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], y, x[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + r * c_stride + v * LANES, sum[r][v]);
}

#define DOT_ROWS(R)                                                                                                \
    DOT static void dot_##R(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t pairs, float *c,       \
                            int64_t c_stride, int vectors) {                                                       \
        switch (vectors) {                                                                                         \
        case 1: dot_tile(a, a_stride, R, b, pairs, c, c_stride, 1); break;                                         \
        case 2: dot_tile(a, a_stride, R, b, pairs, c, c_stride, 2); break;                                         \
        case 3: dot_tile(a, a_stride, R, b, pairs, c, c_stride, 3); break;                                         \
        default: dot_tile(a, a_stride, R, b, pairs, c, c_stride, 4);                                               \
        }                                                                                                          \
    }
DOT_ROWS(1)
DOT_ROWS(2)
DOT_ROWS(3)
DOT_ROWS(4)

static void dot(const uint32_t *a, int64_t a_stride, int rows, const uint32_t *b, int64_t pairs, float *c, int64_t c_stride,
                int vectors) {
    switch (rows) {
    case 1: dot_1(a, a_stride, b, pairs, c, c_stride, vectors); break;
    case 2: dot_2(a, a_stride, b, pairs, c, c_stride, vectors); break;
    case 3: dot_3(a, a_stride, b, pairs, c, c_stride, vectors); break;
    default: dot_4(a, a_stride, b, pairs, c, c_stride, vectors);
    }
}

static const exc_heads avx2 = {multiply_avx2, turn_avx2, widen_avx2, soften_avx2, scale_avx2, round_avx2, NULL, NULL};
static const exc_heads avx512 = {multiply_avx512, turn_wide, widen_avx512, soften_avx512, scale_avx512, round_avx512, NULL, NULL};
static const exc_heads pairs = {multiply_avx512, turn_wide,    widen_avx512, soften_avx512,
                                scale_avx512,    round_avx512, turn_pairs,   dot};
#endif

const exc_heads *exc_heads_for(void) {
#if defined(__x86_64__)
    enum exc_isa level = exc_isa_level();
    if (level >= EXC_ISA_AVX512BF16) return &pairs;
    if (level >= EXC_ISA_AVX512) return &avx512;
    if (level >= EXC_ISA_AVX2) return &avx2;
#endif
    return &generic;
}
