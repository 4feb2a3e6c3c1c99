/* recode.c - the vectors of recode.h: how codes become numbers and numbers codes.
 *
 * e4m3 is f16 with fewer bits: moved there by two byte operations, it is 2^-8 times what it was, and the processor's conversions
 * do the rest, both ways, subnormal numbers included. fp4 is a table of sixteen. Rounding to nearest even adds and subtracts a number
 * whose last bit is worth as much as the last bit that is to stay: the power of two in a number, times 1.5 * 2^bits. Only the arithmetic has roundings that count,
 * and it does them as requant.c does; powers of two in between are exact. */
#include <string.h>

#include "lanes.h"
#include "recode.h"

#define AHEAD 24 /* rows asked for before they are needed */

#if defined(__x86_64__)
#include <immintrin.h>

/* a result rounded as it is, with R^T lambda taken off, that without being stored, and one that is not rounded */
enum how { NEAREST, SOLVED, TRIED, MEANT };

/* the line that stands in a lane of vector v: of e4m3 the even codes of the lower and of the upper half, then the odd ones; of fp4
 * one of the eight in a word */
EXC_INLINE int lane_of(int dtype, int wide, int v, int lane) {
    return dtype == EXC_F4 ? 8 * lane + v : v % 2 * 2 * wide + 2 * lane + v / 2;
}

static int64_t count_rescaled(const uint8_t *now, const uint8_t *was, int bytes, const float *scale, const float *old) {
    int64_t n = 0;
    for (int i = 0; i < bytes; i++) {
        int same = exc_to_bits(scale[2 * i / EXC_GROUP]) == exc_to_bits(old[2 * i / EXC_GROUP]), x = now[i] ^ was[i];
        n += same ? ((x & 15) != 0) + ((x & 240) != 0) : 2;
    }
    return n;
}

/* sizes of twice the numbers of fp4 as their codes */
#define CODES_OF_DOUBLES 0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7, 0, 0, 0

/* ---- 8 lanes */
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
AVX2 EXC_INLINE __m256 avx2_signs(__m256 a) { return _mm256_and_ps(a, _mm256_set1_ps(-0.0f)); }
AVX2 EXC_INLINE __m256 avx2_size(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
AVX2 EXC_INLINE __m256 avx2_rounded(__m256 a, float least, float by) {
    __m256i power = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7f800000));
    __m256 unit = _mm256_castsi256_ps(_mm256_max_epu32(power, _mm256_castps_si256(_mm256_set1_ps(least)))), times = _mm256_set1_ps(by);
    return _mm256_fnmadd_ps(unit, times, _mm256_fmadd_ps(unit, times, a));
}
AVX2 EXC_INLINE void avx2_add_wide(double *sum, __m256 v) {
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), _mm256_cvtps_pd(_mm256_castps256_ps128(v))));
    _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))));
}
AVX2 EXC_INLINE void avx2_decode8(const uint8_t *row, __m256 *x) {
    __m256i w = _mm256_loadu_si256((const __m256i *)row), keep = _mm256_set1_epi16((short)0xbf80);
    __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 1), keep), odd = _mm256_and_si256(_mm256_srai_epi16(w, 1), keep);
    x[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(even));
    x[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1));
    x[2] = _mm256_cvtph_ps(_mm256_castsi256_si128(odd));
    x[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1));
}
AVX2 EXC_INLINE __m256i avx2_halves(__m256 a, __m256 b) { /* codes in the upper bytes */
    __m256i h = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(a, 0)), _mm256_cvtps_ph(b, 0), 1), sign = _mm256_set1_epi16((short)0x8000);
    return _mm256_or_si256(_mm256_and_si256(h, sign), _mm256_andnot_si256(sign, _mm256_slli_epi16(h, 1)));
}
AVX2 EXC_INLINE __m256i avx2_encode8(const __m256 *x) {
    __m256i even = _mm256_srli_epi16(avx2_halves(x[0], x[1]), 8), odd = avx2_halves(x[2], x[3]);
    return _mm256_or_si256(even, _mm256_and_si256(odd, _mm256_set1_epi16((short)0xff00)));
}
AVX2 EXC_INLINE void avx2_decode4(const uint8_t *row, __m256 *x) {
    const __m256 size = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
    __m256i w = _mm256_loadu_si256((const __m256i *)row);
    for (int v = 0; v < 8; v++) {
        __m256 sign = avx2_signs(_mm256_castsi256_ps(_mm256_slli_epi32(w, 28 - 4 * v)));
        x[v] = _mm256_or_ps(_mm256_permutevar8x32_ps(size, _mm256_srli_epi32(w, 4 * v)), sign);
    }
}
AVX2 EXC_INLINE __m256i avx2_encode4(const __m256 *x) {
    const __m256i codes = _mm256_broadcastsi128_si256(_mm_setr_epi8(CODES_OF_DOUBLES));
    __m256i all = _mm256_setzero_si256();
    for (int v = 0; v < 8; v++) {
        __m256 size = avx2_size(x[v]);
        __m256i code = _mm256_shuffle_epi8(codes, _mm256_cvtps_epi32(_mm256_add_ps(size, size)));
        code = _mm256_or_si256(code, _mm256_srli_epi32(_mm256_castps_si256(avx2_signs(x[v])), 28));
        all = _mm256_or_si256(all, _mm256_slli_epi32(code, 4 * v));
    }
    return all;
}
AVX2 EXC_INLINE int avx2_unequal(__m256i a, __m256i b) { return __builtin_popcount(~(unsigned)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, b))); }
AVX2 EXC_INLINE int64_t avx2_differing(__m256i code, const uint8_t *row, int dtype, const float *old, const float *now, int64_t h, int span) {
    __m256i was = _mm256_loadu_si256((const __m256i *)row);
    if (dtype == EXC_F8_E4M3) return exc_to_bits(old[h / EXC_BLOCK]) == exc_to_bits(now[h / EXC_BLOCK]) ? avx2_unequal(code, was) : 32;
    old += 4 * h + 2 * span, now += 4 * h + 2 * span;
    if (memcmp(old, now, 8)) {
        uint8_t to[32];
        _mm256_storeu_si256((__m256i *)to, code);
        return count_rescaled(to, row, 32, now, old);
    }
    __m256i low = _mm256_set1_epi8(15), x = _mm256_xor_si256(code, was), zero = _mm256_setzero_si256();
    return avx2_unequal(_mm256_and_si256(x, low), zero) + avx2_unequal(_mm256_andnot_si256(low, x), zero);
}
AVX2 EXC_INLINE __m256i avx2_larger(__m256i top, const uint8_t *row) {
    return _mm256_max_epu8(top, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)row), _mm256_set1_epi8(0x7f)));
}
AVX2 EXC_INLINE int avx2_largest(__m256i top) {
    uint8_t x[32];
    int most = 0;
    _mm256_storeu_si256((__m256i *)x, top);
    for (int i = 0; i < 32; i++) most = x[i] > most ? x[i] : most;
    return most;
}
AVX2 EXC_INLINE __m256 avx2_spread(const float *scale) {
    return _mm256_set_m128(_mm_set1_ps(scale[1]), _mm_set1_ps(scale[0]));
}
/* of powers of two */
AVX2 EXC_INLINE __m256 avx2_inverses(__m256 s) {
    return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(254 << 23), _mm256_castps_si256(s)));
}
#define V __m256
#define U __m256i
#define WIDE 8
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SET1(x) _mm256_set1_ps(x)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define LOADF(p) _mm256_loadu_ps(p)
#define STOREF(p, v) _mm256_storeu_ps(p, v)
#define ZERO _mm256_setzero_ps()
#define STOREU(p, u) _mm256_storeu_si256((__m256i *)(p), u)
#define NO_CODES _mm256_setzero_si256()
#define ROUNDED(a, least, by) avx2_rounded(a, least, by)
#define SIGNED(x, a) _mm256_or_ps(x, avx2_signs(a))
#define AT_MOST(a, x) _mm256_or_ps(_mm256_min_ps(avx2_size(a), _mm256_set1_ps(x)), avx2_signs(a))
#define ADD_WIDE(sum, v) avx2_add_wide(sum, v)
#define NAME(x) avx2_##x
#define TARGET AVX2
#include "spans.h"

/* ---- 16 lanes */
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,f16c,popcnt,prefer-vector-width=512")))
#define MIN_SIZE 2   /* vrangeps: the smaller in size, sign of the first */
#define A_OR_B_AND_C 0xf8
#define C_OF_A_ELSE_B 0xac
AVX512 EXC_INLINE __m512 avx512_rounded(__m512 a, float least, float by) {
    __m512i power = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7f800000));
    __m512 unit = _mm512_castsi512_ps(_mm512_max_epu32(power, _mm512_castps_si512(_mm512_set1_ps(least)))), times = _mm512_set1_ps(by);
    return _mm512_fnmadd_ps(unit, times, _mm512_fmadd_ps(unit, times, a));
}
AVX512 EXC_INLINE __m512 avx512_signed(__m512 x, __m512 a) {
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(x), _mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN), A_OR_B_AND_C));
}
AVX512 EXC_INLINE void avx512_add_wide(double *sum, __m512 v) {
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), _mm512_cvtps_pd(_mm512_castps512_ps256(v))));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
}
AVX512 EXC_INLINE void avx512_decode8(const uint8_t *row, __m512 *x) {
    __m512i w = _mm512_loadu_si512(row), keep = _mm512_set1_epi16((short)0xbf80);
    __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 1), keep), odd = _mm512_and_si512(_mm512_srai_epi16(w, 1), keep);
    x[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(even));
    x[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
    x[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
    x[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
}
AVX512 EXC_INLINE __m512i avx512_halves(__m512 a, __m512 b) { /* codes in the upper bytes */
    __m512i h = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a, 0)), _mm512_cvtps_ph(b, 0), 1);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16((short)0x8000), _mm512_slli_epi16(h, 1), h, C_OF_A_ELSE_B);
}
AVX512 EXC_INLINE __m512i avx512_encode8(const __m512 *x) {
    __m512i even = _mm512_srli_epi16(avx512_halves(x[0], x[1]), 8), odd = avx512_halves(x[2], x[3]);
    return _mm512_ternarylogic_epi32(even, odd, _mm512_set1_epi16((short)0xff00), A_OR_B_AND_C);
}
AVX512 EXC_INLINE void avx512_decode4(const uint8_t *row, __m512 *x) {
    const __m512 number = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    __m512i w = _mm512_loadu_si512(row);
    _Pragma("GCC unroll 8") for (int v = 0; v < 8; v++) x[v] = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * (unsigned)v), number);
}
AVX512 EXC_INLINE __m512i avx512_encode4(const __m512 *x) {
    const __m512i codes = _mm512_broadcast_i32x4(_mm_setr_epi8(CODES_OF_DOUBLES)), sign = _mm512_set1_epi32(8);
    __m512i all = _mm512_setzero_si512();
    _Pragma("GCC unroll 8") for (int v = 0; v < 8; v++) {
        __m512 size = _mm512_abs_ps(x[v]);
        __m512i code = _mm512_shuffle_epi8(codes, _mm512_cvtps_epi32(_mm512_add_ps(size, size)));
        code = _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(_mm512_castps_si512(x[v]), 28), sign, A_OR_B_AND_C);
        all = _mm512_or_si512(all, _mm512_slli_epi32(code, 4 * (unsigned)v));
    }
    return all;
}
AVX512 EXC_INLINE int64_t avx512_differing(__m512i code, const uint8_t *row, int dtype, const float *old, const float *now, int64_t h, int span) {
    __m512i was = _mm512_loadu_si512(row), x = _mm512_xor_si512(code, was);
    (void)span;
    if (dtype == EXC_F8_E4M3)
        return exc_to_bits(old[h / EXC_BLOCK]) == exc_to_bits(now[h / EXC_BLOCK]) ? __builtin_popcountll(_mm512_test_epi8_mask(x, x)) : 64;
    old += 4 * h, now += 4 * h;
    if (memcmp(old, now, 16)) {
        uint8_t to[64];
        _mm512_storeu_si512(to, code);
        return count_rescaled(to, row, 64, now, old);
    }
    return __builtin_popcountll(_mm512_test_epi8_mask(x, _mm512_set1_epi8(15))) +
           __builtin_popcountll(_mm512_test_epi8_mask(x, _mm512_set1_epi8((char)240)));
}
AVX512 EXC_INLINE __m512i avx512_larger(__m512i top, const uint8_t *row) {
    return _mm512_max_epu8(top, _mm512_and_si512(_mm512_loadu_si512(row), _mm512_set1_epi8(0x7f)));
}
AVX512 EXC_INLINE int avx512_largest(__m512i top) {
    return avx2_largest(_mm256_max_epu8(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64(top, 1)));
}
AVX512 EXC_INLINE __m512 avx512_spread(const float *scale) {
    const __m512i group = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(group, _mm512_castps128_ps512(_mm_loadu_ps(scale)));
}
AVX512 EXC_INLINE __m512 avx512_inverses(__m512 s) {
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(254 << 23), _mm512_castps_si512(s)));
}
#define V __m512
#define U __m512i
#define WIDE 16
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SET1(x) _mm512_set1_ps(x)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define LOADF(p) _mm512_loadu_ps(p)
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define ZERO _mm512_setzero_ps()
#define STOREU(p, u) _mm512_storeu_si512(p, u)
#define NO_CODES _mm512_setzero_si512()
#define ROUNDED(a, least, by) avx512_rounded(a, least, by)
#define SIGNED(x, a) avx512_signed(x, a)
#define AT_MOST(a, x) _mm512_range_ps(a, _mm512_set1_ps(x), MIN_SIZE)
#define ADD_WIDE(sum, v) avx512_add_wide(sum, v)
#define NAME(x) avx512_##x
#define TARGET AVX512
#include "spans.h"

const exc_recoder *exc_recoder_for(int dtype, int lines) {
    enum exc_isa level = exc_isa_level();
    if (dtype == EXC_F8_E4M3 && lines % 64 == 0 && level >= EXC_ISA_AVX512) return &avx512_f8;
    if (dtype == EXC_F8_E4M3 && lines % 32 == 0 && level >= EXC_ISA_AVX2) return &avx2_f8;
    if (dtype == EXC_F4 && lines % 128 == 0 && level >= EXC_ISA_AVX512) return &avx512_f4;
    if (dtype == EXC_F4 && lines % 64 == 0 && level >= EXC_ISA_AVX2) return &avx2_f4;
    return NULL;
}

/* 16 x 16 bytes: four rounds of pairing rows that are 8 apart */
static void turn_tile(const uint8_t *from, int64_t stride, uint8_t *to, int64_t to_stride) {
    __m128i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm_loadu_si128((const __m128i *)(from + i * stride));
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]), y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
        memcpy(x, y, sizeof x);
    }
    for (int i = 0; i < 16; i++) _mm_storeu_si128((__m128i *)(to + i * to_stride), x[i]);
}
#else
const exc_recoder *exc_recoder_for(int dtype, int lines) {
    (void)dtype, (void)lines;
    return NULL;
}
static void turn_tile(const uint8_t *from, int64_t stride, uint8_t *to, int64_t to_stride) {
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) to[k * to_stride + i] = from[i * stride + k];
}
#endif

void exc_turn(const uint8_t *from, int64_t stride, int64_t rows, int64_t cols, uint8_t *to, int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < cols; c += 16) {
            if (r + 16 <= rows && c + 16 <= cols) turn_tile(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
            else
                for (int64_t i = r; i < exc_least(r + 16, rows); i++)
                    for (int64_t k = c; k < exc_least(c + 16, cols); k++) to[k * to_stride + i] = from[i * stride + k];
        }
}
