/* avx2.c - the micro-kernels for AVX2 and FMA: tiles of 6 rows x 16 outputs, a pair's panels one after the other.
 *
 * Sixteen registers hold 12 sums, two halves of a panel line and one broadcast input. bf16 weights are widened on the way:
 * a 32-bit word holds inputs (2i, 2i+1) of an output, so a shift gives the even and a mask the odd one, exactly. Activations are
 * widened when they are gathered. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "tile.h"

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

BODY void pair(const void *x, const exc_weights *w, int64_t k, int bf16, int rows, float (*out)[EXC_PAIR]) {
    panel(x, w->now[0], k, bf16, rows, out);
    panel(x, w->now[1], k, bf16, rows, (float(*)[EXC_PAIR])(out[0] + EXC_PANEL));
}

BODY void choose(const void *x, int rows, const exc_weights *w, int64_t k, int bf16, float (*out)[EXC_PAIR]) {
    switch (rows) {
    case 1: pair(x, w, k, bf16, 1, out); break;
    case 2: pair(x, w, k, bf16, 2, out); break;
    case 3: pair(x, w, k, bf16, 3, out); break;
    case 4: pair(x, w, k, bf16, 4, out); break;
    case 5: pair(x, w, k, bf16, 5, out); break;
    default: pair(x, w, k, bf16, 6, out);
    }
}

TARGET static void multiply_bf16(const void *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    choose(x, rows, w, k, 1, out);
}

TARGET static void multiply_f32(const void *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    choose(x, rows, w, k, 0, out);
}

const exc_tile exc_tile_avx2[3] = {
    {ROWS, 2, 4, gather_bf16, multiply_bf16, store, gate_bf16},
    {ROWS, 2, 4, gather_f32, multiply_bf16, store, gate_f32},
    {ROWS, 2, 4, gather_f32, multiply_f32, store, gate_f32},
};
#else
typedef int exc_no_avx2; /* an empty file is not C */
#endif
