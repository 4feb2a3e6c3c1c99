/* codes.h - the formats below 16 bits. e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity, 0x7f NaN. e2m1 (fp4):
 * 0, .5, 1, 1.5, 2, 3, 4, 6 and a sign. e8m0: a power of two, 2^(code-127), 255 NaN: the scales of fp4 and some of e4m3.
 *
 * A matrix [n,k] of them: EXC_F8_E4M3 has a scale for every block of 128 x 128, f32|bf16|e8m0 [ceil(n/128), ceil(k/128)], the
 * last ones partial; EXC_F4 has k a multiple of 32, bytes [n,k/2] with the earlier input in the low four bits, and an e8m0
 * scale for every 32 inputs of a row, u8 [n,k/32]. A weight is its code times its scale.
 *
 * Packed (ops.h), a panel is 16 outputs by pairs of inputs like bf16, with codes of one byte or half a byte: codes first, then
 * its scales, f32 [ceil(k/128)] or u8 [k/32][16], and zeros up to a multiple of 64 bytes. */
#ifndef EXC_CODES_H
#define EXC_CODES_H

#include "tile.h"

#define EXC_BLOCK 128   /* rows and columns that share a scale of e4m3 */
#define EXC_GROUP 32    /* columns that share a scale of fp4 */
#define EXC_NAN_E4M3 0x7f

static inline int exc_is_coded(int dtype) { return dtype == EXC_F8_E4M3 || dtype == EXC_F4; }

/* inputs under one scale */
static inline int64_t exc_scale_span(int dtype) { return dtype == EXC_F8_E4M3 ? EXC_BLOCK : EXC_GROUP; }

/* bytes of a panel's codes: where its scales begin; k is padded to a multiple of 32 */
static inline size_t exc_code_bytes(int64_t k, int dtype) {
    return (size_t)((k + 31) / 32 * 32) * EXC_PANEL / (dtype == EXC_F4 ? 2 : 1);
}

/* bits 0-6 become the upper bits of a number 2^-120 too small, subnormal ones too; the factor is exact. 0x7f and 0xff, NaN as
 * codes, are looked for before anything is computed and count as 480 here. */
EXC_INLINE float exc_from_e4m3(uint32_t code) {
    return exc_from_bits((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
}

EXC_INLINE float exc_from_e2m1(uint32_t code) {
    return exc_from_bits((code & 8) << 28 | (code & 7) << 22) * 0x1p126f;
}

/* code 0 is 2^-127, a subnormal number */
EXC_INLINE float exc_from_e8m0(uint32_t code) {
    uint32_t u = code << 23;
    return exc_from_bits(code == 255 ? 0x7fc00000u : u > 0x00400000u ? u : 0x00400000u);
}

/* scale i of an array of scales */
EXC_INLINE float exc_scale_at(const void *scale, int dtype, int64_t i) {
    if (dtype == EXC_F32) return ((const float *)scale)[i];
    if (dtype == EXC_BF16) return exc_from_bits((uint32_t)((const uint16_t *)scale)[i] << 16);
    return exc_from_e8m0(((const uint8_t *)scale)[i]);
}

static inline int exc_is_scale(int w_dtype, int scale_dtype) {
    if (scale_dtype == EXC_F8_E8M0) return 1;
    return w_dtype == EXC_F8_E4M3 && (scale_dtype == EXC_F32 || scale_dtype == EXC_BF16);
}

/* code and scale of input i, output o of a panel packed from k inputs */
EXC_INLINE float exc_panel_code(const uint8_t *panel, int dtype, int64_t i, int o) {
    if (dtype == EXC_F4) return exc_from_e2m1((uint32_t)panel[i / 2 * EXC_PANEL + o] >> (i % 2 ? 4 : 0));
    return exc_from_e4m3(panel[i / 2 * 2 * EXC_PANEL + 2 * o + i % 2]);
}
EXC_INLINE float exc_panel_scale(const uint8_t *panel, int dtype, int64_t k, int64_t i, int o) {
    const uint8_t *scales = panel + exc_code_bytes(k, dtype);
    if (dtype == EXC_F4) return exc_from_e8m0(scales[i / EXC_GROUP * EXC_PANEL + o]);
    float x;
    __builtin_memcpy(&x, scales + (size_t)(i / EXC_BLOCK) * sizeof x, sizeof x);
    return x;
}

/* the weight at [row,col] of a coded matrix with k columns */
EXC_INLINE float exc_coded_at(const void *w, int dtype, const void *scale, int scale_dtype, int64_t k, int64_t row, int64_t col) {
    const uint8_t *code = (const uint8_t *)w;
    if (dtype == EXC_F4)
        return exc_from_e2m1((uint32_t)code[row * (k / 2) + col / 2] >> (col % 2 ? 4 : 0)) *
               exc_scale_at(scale, scale_dtype, row * (k / EXC_GROUP) + col / EXC_GROUP);
    return exc_from_e4m3(code[row * k + col]) *
           exc_scale_at(scale, scale_dtype, row / EXC_BLOCK * ((k + EXC_BLOCK - 1) / EXC_BLOCK) + col / EXC_BLOCK);
}

#endif
