/* fixed.h - sums whose bits depend on what is added and on nothing else, for queues in reproducible mode.
 *
 * Every term is first rounded (to nearest even) to a multiple of a fixed unit; f64 adds multiples of a unit without any rounding
 * while a sum stays below 2^53 units. So the order of rows, their split over steps, threads, devices and machines, and the
 * merging of files all give the same bits, and a device may add with atomics. Beyond that limit a sum is as accurate as any
 * f64 sum, only its last bits may depend on the order: the host warns (capture.c). The units: 2^-28 for gate weights and
 * activations (exact below 3.3e7 an expert and column; a bf16 activation of 2^-21 and more loses nothing), 2^-20 for squared
 * norms of outputs (exact below 8.5e9 an expert). NaN and infinity pass. */
#ifndef EXC_FIXED_H
#define EXC_FIXED_H

#include "lanes.h"

/* x as a multiple of EXC_UNIT: in f32, whose own unit from 2^23 of ours on is no finer */
EXC_INLINE float exc_fixed(float x) {
    const float whole = (float)(EXC_UNIT * 0x1p23), shift = __builtin_copysignf(whole, x);
    float rounded = (x + shift) - shift;
    return __builtin_fabsf(x) >= whole ? x : rounded;
}

/* x >= 0 as a multiple of EXC_SQUARE_UNIT */
EXC_INLINE double exc_fixed_square(double x) {
    const double whole = EXC_SQUARE_UNIT * 0x1p52;
    double rounded = (x + whole) - whole;
    return x >= whole ? x : rounded;
}

/* |y|^2 of a row in f64: sixteen chains, columns l, l+16, .. each, then the chains pairwise (exc_lane_sum's order) */
EXC_INLINE double exc_row_square(const float *y, int64_t n) {
    double lane[LANES] = {0}, half[8], s = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += (double)y[i + l] * (double)y[i + l];
    for (int l = 0; i + l < n; l++) lane[l] += (double)y[i + l] * (double)y[i + l];
    for (int l = 0; l < 8; l++) half[l] = lane[l] + lane[l + 8];
    for (int l = 0; l < 8; l++) s += half[l];
    return s;
}

typedef double exc_doubles __attribute__((vector_size(64), aligned(8), may_alias));
typedef float exc_half_floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t exc_words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t exc_shorts __attribute__((vector_size(32), aligned(2), may_alias));

/* sum[0..15] += 16 activations, as exc_fixed() has them; vector types, as compilers make a poor thing of the choice in a loop */
EXC_INLINE void exc_fixed_lanes(const void *row, int act, exc_doubles sum[2]) {
    const int32_t whole = 0x3d000000; /* 2^23 units */
    exc_words bits = act == EXC_F32 ? *(const exc_words *)row : __builtin_convertvector(*(const exc_shorts *)row, exc_words) << 16;
    exc_masks large = (exc_masks)(bits & 0x7fffffffu) >= whole;
    exc_floats x = (exc_floats)bits, shift = (exc_floats)((bits & 0x80000000u) | (uint32_t)whole), rounded = (x + shift) - shift;
    exc_masks both = ((exc_masks)x & large) | ((exc_masks)rounded & ~large);
    exc_half_floats half[2];
    __builtin_memcpy(half, &both, sizeof half);
    for (int i = 0; i < 2; i++) sum[i] += __builtin_convertvector(half[i], exc_doubles);
}

/* sum[0..cols) += a row of activations, as multiples of the unit */
EXC_INLINE void exc_fixed_row(const void *row, int act, int64_t cols, double *sum) {
    const float *f = row;
    const uint16_t *h = row;
    int64_t i = 0;
    for (; i + LANES <= cols; i += LANES)
        exc_fixed_lanes(act == EXC_F32 ? (const void *)(f + i) : (const void *)(h + i), act, (exc_doubles *)(sum + i));
    for (; i < cols; i++) sum[i] += (double)exc_fixed(act == EXC_F32 ? f[i] : exc_from_bf16(h[i]));
}

#endif
