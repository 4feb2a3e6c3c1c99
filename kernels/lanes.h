/* lanes.h - what the row-wise ops share: exact conversions between dtypes, an exponential for softmax, and the macro that
 * compiles one body for every instruction set.
 *
 * Bodies are plain loops over LANES values, which compilers turn into one vector operation; sums are kept in LANES
 * partial sums that are added in a fixed order, so generic, AVX2 and AVX-512 give the same bits. */
#ifndef EXC_LANES_H
#define EXC_LANES_H

#include "tile.h"

#define LANES 16

/* EXC_VARIANTS: name_body(args) compiled for each instruction set; EXC_DISPATCH: and name_for(), the one for this machine */
#if defined(__x86_64__)
#define EXC_VARIANTS(name, params, args)                                                                            \
    static void name##_generic params { name##_body args; }                                                         \
    __attribute__((target("avx2,fma,f16c"))) static void name##_avx2 params { name##_body args; }                       \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512"))) static void              \
        name##_avx512 params {                                                                                      \
        name##_body args;                                                                                           \
    }
#define EXC_DISPATCH(name, params, args)                                                                            \
    EXC_VARIANTS(name, params, args)                                                                                \
    static void(*name##_for(void)) params {                                                                         \
        enum exc_isa level = exc_isa_level();                                                                       \
        return level >= EXC_ISA_AVX512 ? name##_avx512 : level >= EXC_ISA_AVX2 ? name##_avx2 : name##_generic;      \
    }
#else
#define EXC_VARIANTS(name, params, args)                                                                            \
    static void name##_generic params { name##_body args; }
#define EXC_DISPATCH(name, params, args)                                                                            \
    EXC_VARIANTS(name, params, args)                                                                                \
    static void(*name##_for(void)) params { return name##_generic; }
#endif

/* exp(x) for x <= 0 (above: 1), relative error below 1.5e-7, 0 below -87; NaN stays NaN. x = n ln2 + r, |r| <= ln2/2, and the
 * polynomial of Cephes' expf in fused steps. Softmax subtracts the maximum first, so nothing positive arrives but
 * +inf - FLT_MAX; what overflows far below -87 is thrown away at the end. */
EXC_INLINE float exc_exp_down(float x) {
    x = x > 0.0f ? 0.0f : x;
    float shifted = __builtin_fmaf(x, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
    float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
    float p = __builtin_fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    float e = p * exc_from_bits((exc_to_bits(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : e;
}

/* 1 / (1 + exp(-x)), relative error below 4e-7 */
EXC_INLINE float exc_sigmoid(float x) {
    float e = exc_exp_down(x > 0.0f ? -x : x);
    return (x > 0.0f ? 1.0f : e) / (1.0f + e);
}

/* log(1 + exp(x)), relative error below 4e-7, 0 below -87: max(x, 0) + log(1 + u), u = exp(-|x|), the logarithm as 2 atanh(u / (2 + u)) whose
 * series in the square of at most 1/9 needs eight terms */
EXC_INLINE float exc_softplus(float x) {
    float u = exc_exp_down(x > 0.0f ? -x : x), s = u / (2.0f + u), z = s * s;
    float p = z * (1.0f / 15) + 1.0f / 13;
    p = p * z + 1.0f / 11;
    p = p * z + 1.0f / 9;
    p = p * z + 1.0f / 7;
    p = p * z + 1.0f / 5;
    p = p * z + 1.0f / 3;
    p = p * z + 1.0f;
    return (x > 0.0f ? x : 0.0f) + 2.0f * s * p;
}

/* order of floats as integers: -0 equal to +0, NaN below everything */
EXC_INLINE int32_t exc_rank(float x) {
    int32_t i = (int32_t)exc_to_bits(x + 0.0f);
    return x != x ? INT32_MIN : i ^ (i >> 31 & 0x7fffffff);
}

typedef float exc_floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t exc_masks __attribute__((vector_size(64), aligned(4)));

/* maximum of n numbers, NaN passed over, at least -FLT_MAX; written with vector types, as compilers take a loop over LANES
 * running maxima apart into single ones */
EXC_INLINE float exc_largest(const float *x, int64_t n) {
    float m = -__FLT_MAX__;
    exc_floats lane = (exc_floats){0} + m;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        exc_floats v = *(const exc_floats *)(x + i);
        exc_masks larger = v > lane;
        lane = (exc_floats)(((exc_masks)v & larger) | ((exc_masks)lane & ~larger));
    }
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    for (int l = 0; l < LANES; l++) m = lane[l] > m ? lane[l] : m;
    return m;
}

EXC_INLINE float exc_lane_sum(const float *lane) {
    float half[8], s = 0;
    for (int l = 0; l < 8; l++) half[l] = lane[l] + lane[l + 8];
    for (int l = 0; l < 8; l++) s += half[l];
    return s;
}

EXC_INLINE float exc_from_bf16(uint16_t h) { return exc_from_bits((uint32_t)h << 16); }

/* exact; a subnormal half gets a leading one that a subtraction takes away again */
EXC_INLINE float exc_from_f16(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x7fff) << 13, e = u & 0x0f800000u;
    uint32_t wide = u + (112u << 23) + (e == 0x0f800000u ? 112u << 23 : 0);
    float small = exc_from_bits(u + (113u << 23)) - 0x1p-14f;
    return exc_from_bits((e ? wide : exc_to_bits(small)) | (uint32_t)(h & 0x8000) << 16);
}

/* to nearest even; beyond the range infinity; adding 0.5 lines a subnormal result up with the last bits of the sum */
EXC_INLINE uint32_t exc_round_f16(float x) {
    uint32_t u = exc_to_bits(x), sign = u & 0x80000000u, a = u ^ sign;
    uint32_t big = a > 0x7f800000u ? 0x7e00u | (a >> 13 & 0x3ffu) : 0x7c00u;
    uint32_t small = exc_to_bits(exc_from_bits(a) + 0.5f) - 0x3f000000u;
    uint32_t normal = (a + 0xc8000fffu + (a >> 13 & 1)) >> 13;
    uint32_t h = a >= 0x47800000u ? big : a < 0x38800000u ? small : normal;
    return h | sign >> 16;
}

/* f64 -> f32 rounded to odd: a rounding to a half afterwards sees on which side of a tie the number lies */
EXC_INLINE float exc_round_to_odd(double d) {
    float f = (float)d;
    double back = (double)f;
    uint32_t u = exc_to_bits(f), away = (back > d && d > 0) || (back < d && d < 0);
    u -= away;
    return exc_from_bits(back == d || d != d ? exc_to_bits(f) : u | 1);
}

EXC_INLINE void exc_store_act(float x, void *to, int64_t i, int act) {
    if (act == EXC_F32) ((float *)to)[i] = x;
    else ((uint16_t *)to)[i] = (uint16_t)exc_round_bf16(x);
}

/* n values of a 2- or 4-byte dtype as f32 */
EXC_INLINE void exc_load_row(const void *from, int dtype, int64_t n, float *to) {
    const uint16_t *h = (const uint16_t *)from;
    if (dtype == EXC_F32) __builtin_memcpy(to, from, (size_t)n * 4);
    else if (dtype == EXC_BF16)
        for (int64_t i = 0; i < n; i++) to[i] = exc_from_bf16(h[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = exc_from_f16(h[i]);
}

/* rows of a task that holds about `work` units when a row has `per_row`; by shape alone */
static inline int64_t exc_rows_per_task(int64_t work, int64_t per_row) {
    int64_t n = per_row > 0 ? work / per_row : work;
    return n < 1 ? 1 : n;
}

static inline size_t exc_task_count(int64_t rows, int64_t per_task) { return (size_t)((rows + per_task - 1) / per_task); }

static inline int64_t exc_least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
