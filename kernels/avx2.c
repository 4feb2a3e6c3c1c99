/* avx2.c - the micro-kernels for AVX2 and FMA: tiles of 6 rows x 16 outputs, a pair's panels one after the other.
 *
 * Sixteen registers hold 12 sums, two halves of a panel line and one broadcast input. bf16 weights are widened on the way:
 * a 32-bit word holds inputs (2i, 2i+1) of an output, so a shift gives the even and a mask the odd one, exactly. e4m3 and fp4 codes
 * are decoded likewise; their scales meet the sums. Activations are widened when they are gathered. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "codes.h"

#define ROWS 6
#define TARGET __attribute__((target("avx2,fma")))
#define BODY static inline __attribute__((always_inline, target("avx2,fma")))

EXC_TILE_ENDS(TARGET)

TARGET static void gather_bf16(const void *const *row, int rows, int64_t k, void *tile) {
    exc_gather_body(row, rows, k, EXC_BF16, tile);
}

TARGET static void gather_f32(const void *const *row, int rows, int64_t k, void *tile) {
    exc_gather_body(row, rows, k, EXC_F32, tile);
}

BODY void step(const float *x, __m256 lo, __m256 hi, int rows, __m256 (*sum)[2]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m256 v = _mm256_broadcast_ss(x + r);
        sum[r][0] = _mm256_fmadd_ps(lo, v, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(hi, v, sum[r][1]);
    }
}

BODY __m256 even(__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
BODY __m256 odd(__m256i w) { return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000u))); }

/* one panel: out[r][0..15] */
BODY void panel(const float *x, const uint8_t *w, int64_t k, int bf16, int rows, float (*out)[EXC_PAIR]) {
    __m256 sum[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    if (bf16)
        for (int64_t i = 0; i < k; i += 2, x += 2 * rows, w += 64) {
            __m256i lo = _mm256_load_si256((const __m256i *)w), hi = _mm256_load_si256((const __m256i *)(w + 32));
            step(x, even(lo), even(hi), rows, sum);
            step(x + rows, odd(lo), odd(hi), rows, sum);
        }
    else
        for (int64_t i = 0; i < k; i++, x += rows, w += 64)
            step(x, _mm256_load_ps((const float *)w), _mm256_load_ps((const float *)(w + 32)), rows, sum);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        _mm256_storeu_ps(out[r], sum[r][0]);
        _mm256_storeu_ps(out[r] + 8, sum[r][1]);
    }
}

/* Codes, and the number they are: words of two e4m3 or bytes of two fp4, eight outputs at a time, are widened to 32 bits; a shift
 * puts the code at the top, where it becomes the upper bits of a number 2^-120 too small, or picks one of eight. */
BODY __m256 e4m3(__m256i top) {
    __m256i u = _mm256_and_si256(_mm256_srai_epi32(top, 4), _mm256_set1_epi32((int)0x87f00000u));
    return _mm256_mul_ps(_mm256_castsi256_ps(u), _mm256_set1_ps(0x1p120f));
}
BODY __m256 e2m1(__m256i code) {
    __m256 size = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6), code);
    __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32((int)0x80000000u));
    return _mm256_or_ps(size, _mm256_castsi256_ps(sign));
}
BODY void two_inputs(const uint8_t *w, int dtype, __m256 even[2], __m256 odd[2]) {
    for (int h = 0; h < 2; h++) {
        if (dtype == EXC_F8_E4M3) {
            __m256i c = _mm256_cvtepu16_epi32(_mm_load_si128((const __m128i *)(w + 16 * h)));
            even[h] = e4m3(_mm256_slli_epi32(c, 24));
            odd[h] = e4m3(_mm256_slli_epi32(c, 16));
        } else {
            __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(w + 8 * h)));
            even[h] = e2m1(c);
            odd[h] = e2m1(_mm256_srli_epi32(c, 4));
        }
    }
}
/* scales of eight outputs */
BODY __m256 scales_of(const uint8_t *scale, int dtype, int64_t span, int h) {
    if (dtype == EXC_F8_E4M3) return _mm256_broadcast_ss((const float *)(const void *)scale + span);
    __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(scale + span * EXC_PANEL + 8 * h)));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(e, 23), _mm256_set1_epi32(0x00400000)));
}

/* one panel of codes: sums under one scale are multiplied by it and added up in `out` */
BODY void panel_codes(const float *x, const uint8_t *w, int64_t k, int dtype, int rows, float (*out)[EXC_PAIR]) {
    const uint8_t *scale = w + exc_code_bytes(k, dtype);
    const int64_t span = exc_scale_span(dtype);
    for (int64_t first = 0, s = 0; first < k; first += span, s++) {
        __m256 sum[ROWS][2];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
        for (int64_t i = first; i < first + span && i < k; i += 2, x += 2 * rows, w += dtype == EXC_F4 ? 16 : 32) {
            __m256 even[2], odd[2];
            two_inputs(w, dtype, even, odd);
            step(x, even[0], even[1], rows, sum);
            step(x + rows, odd[0], odd[1], rows, sum);
        }
        for (int h = 0; h < 2; h++) {
            __m256 f = scales_of(scale, dtype, s, h);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m256 before = first ? _mm256_loadu_ps(out[r] + 8 * h) : _mm256_setzero_ps();
                _mm256_storeu_ps(out[r] + 8 * h, _mm256_fmadd_ps(sum[r][h], f, before));
            }
        }
    }
}

BODY void pair(const void *x, const exc_weights *w, int64_t k, int dtype, int rows, float (*out)[EXC_PAIR]) {
    for (int p = 0; p < 2; p++) {
        float(*to)[EXC_PAIR] = (float(*)[EXC_PAIR])(out[0] + p * EXC_PANEL);
        if (exc_is_coded(dtype)) panel_codes(x, w->now[p], k, dtype, rows, to);
        else panel(x, w->now[p], k, dtype == EXC_BF16, rows, to);
    }
}

BODY void choose(const void *x, int rows, const exc_weights *w, int64_t k, int dtype, float (*out)[EXC_PAIR]) {
    switch (rows) {
    case 1: pair(x, w, k, dtype, 1, out); break;
    case 2: pair(x, w, k, dtype, 2, out); break;
    case 3: pair(x, w, k, dtype, 3, out); break;
    case 4: pair(x, w, k, dtype, 4, out); break;
    case 5: pair(x, w, k, dtype, 5, out); break;
    default: pair(x, w, k, dtype, 6, out);
    }
}

TARGET static void multiply_bf16(const void *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    choose(x, rows, w, k, EXC_BF16, out);
}

TARGET static void multiply_f32(const void *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    choose(x, rows, w, k, EXC_F32, out);
}

TARGET static void multiply_f8(const void *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    choose(x, rows, w, k, EXC_F8_E4M3, out);
}

TARGET static void multiply_f4(const void *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    choose(x, rows, w, k, EXC_F4, out);
}

const exc_tile exc_tile_avx2[EXC_TILES] = {
    [EXC_TILE_BF16_BF16] = {ROWS, 2, 4, 64, gather_bf16, multiply_bf16, store, gate_bf16},
    [EXC_TILE_F32_BF16] = {ROWS, 2, 4, 64, gather_f32, multiply_bf16, store, gate_f32},
    [EXC_TILE_F32_F32] = {ROWS, 2, 4, 128, gather_f32, multiply_f32, store, gate_f32},
    [EXC_TILE_BF16_F8] = {ROWS, 2, 4, 32, gather_bf16, multiply_f8, store, gate_bf16},
    [EXC_TILE_F32_F8] = {ROWS, 2, 4, 32, gather_f32, multiply_f8, store, gate_f32},
    [EXC_TILE_BF16_F4] = {ROWS, 2, 4, 16, gather_bf16, multiply_f4, store, gate_bf16},
    [EXC_TILE_F32_F4] = {ROWS, 2, 4, 16, gather_f32, multiply_f4, store, gate_f32},
};
#else
typedef int exc_no_avx2; /* an empty file is not C */
#endif
