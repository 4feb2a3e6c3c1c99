/* avx512.c - the micro-kernels for AVX-512, with and without its bf16 dot products: tiles of 14 rows x 2 panels.
 *
 * Of 32 registers 28 hold sums, two the lines of the pair's panels; a broadcast input is used twice. exc_tile_dot feeds bf16 words
 * (inputs 2i, 2i+1 of an output) to vdpbf16ps as they lie in memory; exc_tile_avx512 widens them by shift and mask
 * and uses plain multiply-adds. Gathering is a transposition of 16 x 16 words: rows in, a word of every row side by side out. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "codes.h"

#define ROWS 14
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq")))
#define TARGET_DOT __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")))
#define BODY static inline __attribute__((always_inline, target("avx512f,avx512vl,avx512bw,avx512dq")))
#define TARGET_BYTES __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx512vbmi")))
#define BODY_BYTES static inline __attribute__((always_inline, target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx512vbmi")))
#define BODY_DOT static inline __attribute__((always_inline, target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")))

/* -------------------------------------------------------------------------------------------------------------- ends */

TARGET void exc_store_avx512(const float (*out)[EXC_PAIR], int rows, int cols, float *y, int64_t stride, const float *bias,
                             const float *add, float (*square)[EXC_PANEL]) {
    __mmask16 some = cols >= EXC_PANEL ? 0xffff : (__mmask16)((1u << cols) - 1);
    for (int r = 0; r < rows; r++, y += stride) {
        __m512 v = _mm512_maskz_loadu_ps(some, out[r]);
        if (bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(some, bias));
        if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(some, add + r * stride));
        _mm512_mask_storeu_ps(y, some, v);
        if (square) _mm512_storeu_ps(square[r], _mm512_fmadd_ps(v, v, _mm512_loadu_ps(square[r])));
    }
}

/* x / (1 + exp(-alpha x)); exponents are held within +-87, where all steps stay normal numbers, and NaN passes through */
BODY __m512 swish(__m512 x, __m512 alpha) {
    __m512 t = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_fnmadd_ps(alpha, x, _mm512_setzero_ps()));
    t = _mm512_max_ps(_mm512_set1_ps(-87.0f), t);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(t, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), t);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.3888889e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3333333e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1666668e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666667e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    __m512 d = _mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1.0f));
    __m512 y = _mm512_rcp14_ps(d); /* 14 bits, doubled by one Newton step */
    y = _mm512_mul_ps(y, _mm512_fnmadd_ps(d, y, _mm512_set1_ps(2.0f)));
    return _mm512_mul_ps(x, y);
}

/* to nearest even, NaN kept: integers, so that subnormals are kept as well */
BODY __m512i round_bf16(__m512 v) {
    __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000)), 16);
}

/* NaN passes: min and max return their second operand when one is NaN */
BODY __m512 clamped(__m512 g, __m512 u, __m512 alpha, __m512 limit) {
    g = _mm512_min_ps(limit, g);
    u = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, u));
    return _mm512_mul_ps(swish(g, alpha), _mm512_add_ps(u, _mm512_set1_ps(1.0f)));
}

BODY void gate(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid, int64_t stride, int act,
               const uint8_t *seen, float *sum) {
    __mmask16 some = cols >= 16 ? 0xffff : (__mmask16)((1u << cols) - 1);
    __m512 total = _mm512_loadu_ps(sum), one = _mm512_set1_ps(1.0f);
    __m512 alpha = _mm512_set1_ps(how->fn.alpha), limit = _mm512_set1_ps(how->fn.limit);
    __m512 gate_bias = how->gate_bias ? _mm512_maskz_loadu_ps(some, how->gate_bias) : _mm512_setzero_ps();
    __m512 up_bias = how->up_bias ? _mm512_maskz_loadu_ps(some, how->up_bias) : _mm512_setzero_ps();
    for (int r = 0; r < rows; r++) {
        __m512 g = _mm512_add_ps(_mm512_loadu_ps(out[r]), gate_bias);
        __m512 u = _mm512_add_ps(_mm512_loadu_ps(out[r] + EXC_PANEL), up_bias);
        __m512 v = how->fn.kind == EXC_GLU_CLAMPED ? clamped(g, u, alpha, limit) : _mm512_mul_ps(swish(g, one), u);
        if (act == EXC_BF16) {
            __m512i half = round_bf16(v);
            _mm256_mask_storeu_epi16((uint16_t *)mid + r * stride, some, _mm512_cvtepi32_epi16(half));
            v = _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
        } else {
            _mm512_mask_storeu_ps((float *)mid + r * stride, some, v);
        }
        if (seen && seen[r]) total = _mm512_add_ps(total, v);
    }
    _mm512_storeu_ps(sum, total);
}

TARGET void exc_gate_avx512(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid, int64_t stride,
                            const uint8_t *seen, float *sum) {
    gate(out, rows, cols, how, mid, stride, EXC_BF16, seen, sum);
}

TARGET static void gate_f32(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid, int64_t stride,
                            const uint8_t *seen, float *sum) {
    gate(out, rows, cols, how, mid, stride, EXC_F32, seen, sum);
}

/* ------------------------------------------------------------------------------------------------------------ gather */

BODY void transpose(__m512i v[16]) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* rows of `halves` 16-bit units -> tile [words][rows]; a line of 16 words is stored whole, its tail is overwritten by the next
 * line or lies in the slack behind the tile */
BODY void gather_words(const void *const *row, int rows, int64_t halves, int64_t words, uint32_t *tile) {
    for (int64_t w = 0; w < words; w += 16) {
        __m512i v[16];
        int64_t left = halves - 2 * w;
        __mmask32 some = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
        if (rows == 1) { /* nothing to turn, and decoding one sequence does it for every task */
            _mm512_storeu_si512(tile + w, _mm512_maskz_loadu_epi16(some, (const uint16_t *)row[0] + 2 * w));
            continue;
        }
        for (int r = 0; r < 16; r++)
            v[r] = r < rows ? _mm512_maskz_loadu_epi16(some, (const uint16_t *)row[r] + 2 * w) : _mm512_setzero_si512();
        transpose(v);
        int64_t lines = words - w < 16 ? words - w : 16;
        for (int64_t i = 0; i < lines; i++, tile += rows) _mm512_storeu_si512(tile, v[i]);
    }
}

TARGET static void gather_pairs(const void *const *row, int rows, int64_t k, void *tile) {
    gather_words(row, rows, k, (k + 1) / 2, tile);
}

/* quantised weights come four inputs at a time */
TARGET static void gather_quads(const void *const *row, int rows, int64_t k, void *tile) {
    gather_words(row, rows, k, (k + 3) / 4 * 2, tile);
}

TARGET static void gather_f32(const void *const *row, int rows, int64_t k, void *tile) {
    gather_words(row, rows, 2 * k, (k + 1) / 2 * 2, tile);
}

TARGET static void gather_bf16(const void *const *row, int rows, int64_t k, void *tile) {
    exc_gather_body(row, rows, k, EXC_BF16, tile);
}

/* ---------------------------------------------------------------------------------------------------------- multiply */

BODY void keep(__m512 (*sum)[2], int rows, float (*out)[EXC_PAIR]) {
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(out[r], sum[r][0]);
        _mm512_storeu_ps(out[r] + EXC_PANEL, sum[r][1]);
    }
}

BODY void clear(__m512 (*sum)[2], int rows) {
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
}

BODY void fetch(const uint8_t *c, const uint8_t *d) {
    _mm_prefetch((const char *)c, _MM_HINT_T0);
    _mm_prefetch((const char *)d, _MM_HINT_T0);
}

BODY_DOT void dot(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    const uint8_t *a = w->now[0], *b = w->now[1], *c = w->next[0], *d = w->next[1];
    int64_t ahead = w->step;
    const int32_t *x = tile;
    __m512 sum[ROWS][2];
    clear(sum, rows);
    for (int64_t i = 0; i < k; i += 2, a += 64, b += 64, c += ahead, d += ahead, x += rows) {
        __m512bh wa = (__m512bh)_mm512_load_si512(a), wb = (__m512bh)_mm512_load_si512(b);
        fetch(c, d);
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++) {
            __m512bh v = (__m512bh)_mm512_set1_epi32(x[r]);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], v, wa);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], v, wb);
        }
    }
    keep(sum, rows, out);
}

BODY void step(const float *x, __m512 wa, __m512 wb, int rows, __m512 (*sum)[2]) {
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        __m512 v = _mm512_set1_ps(x[r]);
        sum[r][0] = _mm512_fmadd_ps(wa, v, sum[r][0]);
        sum[r][1] = _mm512_fmadd_ps(wb, v, sum[r][1]);
    }
}

BODY __m512 even(__m512i w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
BODY __m512 odd(__m512i w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000u))); }

BODY void wide_bf16(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    const uint8_t *a = w->now[0], *b = w->now[1], *c = w->next[0], *d = w->next[1];
    int64_t ahead = w->step;
    const float *x = tile;
    __m512 sum[ROWS][2];
    clear(sum, rows);
    for (int64_t i = 0; i < k; i += 2, a += 64, b += 64, c += ahead, d += ahead, x += 2 * rows) {
        __m512i wa = _mm512_load_si512(a), wb = _mm512_load_si512(b);
        fetch(c, d);
        step(x, even(wa), even(wb), rows, sum);
        step(x + rows, odd(wa), odd(wb), rows, sum);
    }
    keep(sum, rows, out);
}

BODY void wide_f32(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    const uint8_t *a = w->now[0], *b = w->now[1], *c = w->next[0], *d = w->next[1];
    int64_t ahead = w->step;
    const float *x = tile;
    __m512 sum[ROWS][2];
    clear(sum, rows);
    for (int64_t i = 0; i < k; i++, a += 64, b += 64, c += ahead, d += ahead, x += rows) {
        fetch(c, d);
        step(x, _mm512_load_ps(a), _mm512_load_ps(b), rows, sum);
    }
    keep(sum, rows, out);
}

/* ------------------------------------------------------------------------------------------------------------- codes
 *
 * Two inputs of 16 outputs: 16 words of e4m3 or 16 bytes of fp4. For dot products they become bf16, four inputs at a time: bytes
 * of an e4m3 are looked up by its lower seven bits, all fp4 by vpermw, which minds five bits of an index. For f32 the
 * shifted code is a number 2^-120 too small, or picks one of sixteen. Codes are whole operands: the scale is applied to
 * the sums of a span, which are added up in `out`; fewer rows than for bf16 leave registers for the decoding. */

#define CODE_ROWS 12

/* bits of the bf16 of an e4m3 without its sign, upper or lower byte */
#define E4M3_BITS(c) ((c) > 7 ? (c) * 16 + 0x3c00 : (c) > 3 ? (c) * 32 + 0x3b80 : (c) > 1 ? (c) * 64 + 0x3b00 : (c) * 0x3b00)
#define UPPER(c) E4M3_BITS(c) >> 8
#define LOWER(c) E4M3_BITS(c) & 0xff
#define EIGHT(f, c) f(c), f(c + 1), f(c + 2), f(c + 3), f(c + 4), f(c + 5), f(c + 6), f(c + 7)
#define SIXTY_FOUR(f, c)                                                                                                         \
    EIGHT(f, c), EIGHT(f, c + 8), EIGHT(f, c + 16), EIGHT(f, c + 24), EIGHT(f, c + 32), EIGHT(f, c + 40), EIGHT(f, c + 48), EIGHT(f, c + 56)
static const uint8_t upper_bytes[128] __attribute__((aligned(64))) = {SIXTY_FOUR(UPPER, 0), SIXTY_FOUR(UPPER, 64)};
static const uint8_t lower_bytes[128] __attribute__((aligned(64))) = {SIXTY_FOUR(LOWER, 0), SIXTY_FOUR(LOWER, 64)};

/* bytes o and 32 + o in the words of output o */
#define PAIR(o) o, o, 32 + (o), 32 + (o)
#define FOUR_PAIRS(o) PAIR(o), PAIR(o + 1), PAIR(o + 2), PAIR(o + 3)
static const uint8_t nibbles[64] __attribute__((aligned(64))) = {FOUR_PAIRS(0), FOUR_PAIRS(4), FOUR_PAIRS(8), FOUR_PAIRS(12)};

/* the bf16 of inputs i, i+1 and of i+2, i+3 of 16 outputs */
BODY_BYTES void codes_bf16(const uint8_t *w, int dtype, __m512bh *first, __m512bh *second) {
    if (dtype == EXC_F4) {
        __m512i table = _mm512_set_epi16(-0x3f40, -0x3f80, -0x3fc0, -0x4000, -0x4040, -0x4080, -0x4100, -0x8000, 0x40c0, 0x4080, 0x4040,
                                         0x4000, 0x3fc0, 0x3f80, 0x3f00, 0, -0x3f40, -0x3f80, -0x3fc0, -0x4000, -0x4040, -0x4080,
                                         -0x4100, -0x8000, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0);
        /* the bytes twice, as they are and with their upper halves below; each word of a pair takes its byte from one of them */
        const __m512i shift = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4), from = _mm512_load_si512(nibbles), later = _mm512_set1_epi8(16);
        __m512i both = _mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)w)), shift);
        *first = (__m512bh)_mm512_permutexvar_epi16(_mm512_permutexvar_epi8(from, both), table);
        *second = (__m512bh)_mm512_permutexvar_epi16(_mm512_permutexvar_epi8(_mm512_add_epi8(from, later), both), table);
        return;
    }
    /* bytes of the two steps side by side, so that the unpacking puts them apart */
    __m512i c = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_load_si512(w));
    __m512i upper = _mm512_permutex2var_epi8(_mm512_load_si512(upper_bytes), c, _mm512_load_si512(upper_bytes + 64));
    __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(lower_bytes), c, _mm512_load_si512(lower_bytes + 64));
    upper = _mm512_ternarylogic_epi32(upper, c, _mm512_set1_epi8(-0x80), 0xf8); /* a | b & c */
    *first = (__m512bh)_mm512_unpacklo_epi8(lower, upper);
    *second = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
}

BODY __m512 e4m3(__m512i top) {
    __m512i u = _mm512_and_si512(_mm512_srai_epi32(top, 4), _mm512_set1_epi32((int)0x87f00000u));
    return _mm512_mul_ps(_mm512_castsi512_ps(u), _mm512_set1_ps(0x1p120f));
}

BODY void codes_f32(const uint8_t *w, int dtype, __m512 *even, __m512 *odd) {
    if (dtype == EXC_F8_E4M3) {
        __m512i c = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i *)w));
        *even = e4m3(_mm512_slli_epi32(c, 24));
        *odd = e4m3(_mm512_slli_epi32(c, 16));
    } else {
        __m512 table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
        __m512i c = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)w));
        *even = _mm512_permutexvar_ps(c, table);
        *odd = _mm512_permutexvar_ps(_mm512_srli_epi32(c, 4), table);
    }
}

BODY __m512 scales_of(const uint8_t *scale, int dtype, int64_t span) {
    if (dtype == EXC_F8_E4M3) return _mm512_set1_ps(((const float *)(const void *)scale)[span]);
    __m512i e = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)(scale + span * EXC_PANEL)));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(e, 23), _mm512_set1_epi32(0x00400000)));
}

/* out = (or +=) sums times the scales of a span of both panels */
BODY void fold(__m512 (*sum)[2], int rows, const uint8_t *const scale[2], int dtype, int64_t span, float (*out)[EXC_PAIR]) {
    for (int p = 0; p < 2; p++) {
        __m512 f = scales_of(scale[p], dtype, span);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            float *to = out[r] + p * EXC_PANEL;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum[r][p], f, span ? _mm512_loadu_ps(to) : _mm512_setzero_ps()));
        }
    }
}

/* the sums of `spans` spans of a pair of panels at once, each a chain of its own; a span has `steps` times four inputs */
typedef struct coded {
    const uint8_t *now[2], *next[2];
    const int32_t *x;
    int64_t ahead;
} coded;
BODY_BYTES void dot_steps(coded *q, int rows, int dtype, int decoded, int spans, int64_t steps, __m512 (*sum)[CODE_ROWS][2]) {
    const int64_t line = decoded ? 128 : dtype == EXC_F4 ? 32 : 64;
    for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 4
        for (int s = 0; s < spans; s++) {
            const int32_t *x = q->x + s * steps * 2 * rows;
            __m512bh w[2][2];
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                const uint8_t *at = q->now[p] + s * steps * line;
                if (!decoded) codes_bf16(at, dtype, &w[p][0], &w[p][1]);
                else w[p][0] = (__m512bh)_mm512_load_si512(at), w[p][1] = (__m512bh)_mm512_load_si512(at + 64);
            }
#pragma GCC unroll 24
            for (int r = 0; r < 2 * rows; r++) {
                __m512bh v = (__m512bh)_mm512_set1_epi32(x[r]);
                sum[s][r % rows][0] = _mm512_dpbf16_ps(sum[s][r % rows][0], v, w[0][r / rows]);
                sum[s][r % rows][1] = _mm512_dpbf16_ps(sum[s][r % rows][1], v, w[1][r / rows]);
            }
        }
        fetch(q->next[0], q->next[1]);
        q->next[0] += q->ahead, q->next[1] += q->ahead;
        q->now[0] += line, q->now[1] += line, q->x += 2 * rows;
    }
    q->now[0] += (spans - 1) * steps * line, q->now[1] += (spans - 1) * steps * line, q->x += (spans - 1) * steps * 2 * rows;
}

/* decoded: panels of bf16 codes, scales elsewhere. Few rows make few chains, which wait for themselves: two spans run together. */
BODY_BYTES void dot_spans(const void *tile, int rows, const exc_weights *w, int64_t k, int dtype, int decoded, float (*out)[EXC_PAIR]) {
    const uint8_t *const scale[2] = {decoded ? w->scale[0] : w->now[0] + exc_code_bytes(k, dtype),
                                     decoded ? w->scale[1] : w->now[1] + exc_code_bytes(k, dtype)};
    const int64_t length = exc_scale_span(dtype), together = rows < 4 ? 2 : 1;
    coded q = {{w->now[0], w->now[1]}, {w->next[0], w->next[1]}, tile, w->step};
    int64_t first = 0, span = 0;
    for (; first + together * length <= k; first += together * length, span += together) {
        __m512 sum[2][CODE_ROWS][2];
        for (int s = 0; s < together; s++) clear(sum[s], rows);
        dot_steps(&q, rows, dtype, decoded, (int)together, length / 4, sum);
        for (int s = 0; s < together; s++) fold(sum[s], rows, scale, dtype, span + s, out);
    }
    for (; first < k; first += length, span++) {
        __m512 sum[1][CODE_ROWS][2];
        clear(sum[0], rows);
        dot_steps(&q, rows, dtype, decoded, 1, ((first + length < k ? length : k - first) + 3) / 4, sum);
        fold(sum[0], rows, scale, dtype, span, out);
    }
}

BODY void wide_codes(const void *tile, int rows, const exc_weights *w, int64_t k, int dtype, float (*out)[EXC_PAIR]) {
    const uint8_t *a = w->now[0], *b = w->now[1], *c = w->next[0], *d = w->next[1];
    const uint8_t *const scale[2] = {a + exc_code_bytes(k, dtype), b + exc_code_bytes(k, dtype)};
    const int64_t ahead = w->step, length = exc_scale_span(dtype), line = dtype == EXC_F4 ? 16 : 32;
    const float *x = tile;
    for (int64_t first = 0, span = 0; first < k; first += length, span++) {
        int64_t last = first + length < k ? first + length : k;
        __m512 sum[CODE_ROWS][2];
        clear(sum, rows);
        for (int64_t i = first; i < last; i += 2, a += line, b += line, c += ahead, d += ahead, x += 2 * rows) {
            __m512 ea, oa, eb, ob;
            codes_f32(a, dtype, &ea, &oa);
            codes_f32(b, dtype, &eb, &ob);
            fetch(c, d);
            step(x, ea, eb, rows, sum);
            step(x + rows, oa, ob, rows, sum);
        }
        fold(sum, rows, scale, dtype, span, out);
    }
}

/* the height must be a constant for its sums to be registers */
#define CHOOSE(body)                                  \
    switch (rows) {                                   \
    case 1: body(tile, 1, w, k, out); break;          \
    case 2: body(tile, 2, w, k, out); break;          \
    case 3: body(tile, 3, w, k, out); break;          \
    case 4: body(tile, 4, w, k, out); break;          \
    case 5: body(tile, 5, w, k, out); break;          \
    case 6: body(tile, 6, w, k, out); break;          \
    case 7: body(tile, 7, w, k, out); break;          \
    case 8: body(tile, 8, w, k, out); break;          \
    case 9: body(tile, 9, w, k, out); break;          \
    case 10: body(tile, 10, w, k, out); break;        \
    case 11: body(tile, 11, w, k, out); break;        \
    case 12: body(tile, 12, w, k, out); break;        \
    case 13: body(tile, 13, w, k, out); break;        \
    default: body(tile, 14, w, k, out);               \
    }

TARGET_DOT static void multiply_dot(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE(dot)
}

TARGET static void multiply_bf16(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE(wide_bf16)
}

TARGET static void multiply_f32(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE(wide_f32)
}

BODY_BYTES void dot_codes(const void *tile, int rows, const exc_weights *w, int64_t k, int dtype, float (*out)[EXC_PAIR]) {
    dot_spans(tile, rows, w, k, dtype, 0, out);
}
BODY_BYTES void dot_decoded(const void *tile, int rows, const exc_weights *w, int64_t k, int dtype, float (*out)[EXC_PAIR]) {
    dot_spans(tile, rows, w, k, dtype, 1, out);
}

#define CHOOSE_CODES(body, dtype)                              \
    switch (rows) {                                            \
    case 1: body(tile, 1, w, k, dtype, out); break;            \
    case 2: body(tile, 2, w, k, dtype, out); break;            \
    case 3: body(tile, 3, w, k, dtype, out); break;            \
    case 4: body(tile, 4, w, k, dtype, out); break;            \
    case 5: body(tile, 5, w, k, dtype, out); break;            \
    case 6: body(tile, 6, w, k, dtype, out); break;            \
    case 7: body(tile, 7, w, k, dtype, out); break;            \
    case 8: body(tile, 8, w, k, dtype, out); break;            \
    case 9: body(tile, 9, w, k, dtype, out); break;            \
    case 10: body(tile, 10, w, k, dtype, out); break;          \
    case 11: body(tile, 11, w, k, dtype, out); break;          \
    default: body(tile, 12, w, k, dtype, out);                 \
    }

TARGET_BYTES static void dot_f8(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE_CODES(dot_codes, EXC_F8_E4M3)
}

TARGET_BYTES static void dot_f4(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE_CODES(dot_codes, EXC_F4)
}

TARGET_BYTES static void dot_decoded_f8(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE_CODES(dot_decoded, EXC_F8_E4M3)
}

TARGET_BYTES static void dot_decoded_f4(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE_CODES(dot_decoded, EXC_F4)
}

BODY_BYTES void decode(const uint8_t *panel, int64_t k, int dtype, uint8_t *out) {
    for (int64_t i = 0; i < k; i += 4, panel += dtype == EXC_F4 ? 32 : 64, out += 128) {
        __m512bh first, second;
        codes_bf16(panel, dtype, &first, &second);
        _mm512_store_si512(out, (__m512i)first);
        _mm512_store_si512(out + 64, (__m512i)second);
    }
}

TARGET_BYTES static void decode_f8(const uint8_t *panel, int64_t k, uint8_t *out) { decode(panel, k, EXC_F8_E4M3, out); }
TARGET_BYTES static void decode_f4(const uint8_t *panel, int64_t k, uint8_t *out) { decode(panel, k, EXC_F4, out); }

static size_t code_bytes_f8(int64_t k) { return exc_code_bytes(k, EXC_F8_E4M3); }
static size_t code_bytes_f4(int64_t k) { return exc_code_bytes(k, EXC_F4); }

TARGET static void multiply_f8(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE_CODES(wide_codes, EXC_F8_E4M3)
}

TARGET static void multiply_f4(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    CHOOSE_CODES(wide_codes, EXC_F4)
}

const exc_tile exc_tile_avx512[EXC_TILES] = {
    [EXC_TILE_BF16_BF16] = {ROWS, 2, 4, 64, gather_bf16, multiply_bf16, exc_store_avx512, exc_gate_avx512},
    [EXC_TILE_F32_BF16] = {ROWS, 2, 4, 64, gather_f32, multiply_bf16, exc_store_avx512, gate_f32},
    [EXC_TILE_F32_F32] = {ROWS, 2, 4, 128, gather_f32, multiply_f32, exc_store_avx512, gate_f32},
    [EXC_TILE_BF16_F8] = {CODE_ROWS, 2, 4, 32, gather_bf16, multiply_f8, exc_store_avx512, exc_gate_avx512},
    [EXC_TILE_F32_F8] = {CODE_ROWS, 2, 4, 32, gather_f32, multiply_f8, exc_store_avx512, gate_f32},
    [EXC_TILE_BF16_F4] = {CODE_ROWS, 2, 4, 16, gather_bf16, multiply_f4, exc_store_avx512, exc_gate_avx512},
    [EXC_TILE_F32_F4] = {CODE_ROWS, 2, 4, 16, gather_f32, multiply_f4, exc_store_avx512, gate_f32},
};

const exc_tile exc_tile_dot[EXC_TILES] = {
    [EXC_TILE_BF16_BF16] = {ROWS, 2, 2, 64, gather_pairs, multiply_dot, exc_store_avx512, exc_gate_avx512},
    [EXC_TILE_BF16_F8] = {CODE_ROWS, 4, 2, 64, gather_quads, dot_f8, exc_store_avx512, exc_gate_avx512, decode_f8, dot_decoded_f8,
                          code_bytes_f8},
    [EXC_TILE_BF16_F4] = {CODE_ROWS, 4, 2, 32, gather_quads, dot_f4, exc_store_avx512, exc_gate_avx512, decode_f4, dot_decoded_f4,
                          code_bytes_f4},
};
#else
typedef int exc_no_avx512; /* an empty file is not C */
#endif
