/* relay.h - the memory-bound common case of project, for machines that have a fast path for it. */
#ifndef EXC_RELAY_H
#define EXC_RELAY_H

#include "lanes.h"
#include "ops.h"

/* The processor's own rounding to bf16 takes subnormal numbers for zero. No result is subnormal if no weight is and if the
 * products of shares of R and sums R W are zero or at least 2^-70: they, and so all of their sums, are multiples of 2^-117;
 * weights from 2^-118 on are multiples of 2^-125, and smaller ones cannot come within 2^-118 of a sum but zero. Weights tell by
 * themselves: arithmetic with a subnormal number leaves a mark in the processor's status. What fails either test is rounded in
 * steps. */
#define EXC_LEAST_PRODUCT 0x1p-69f /* before shares are rounded */

/* the smallest magnitude but zero: without their signs, numbers are in the order of their bits */
static inline float exc_smallest(const float *x, int64_t n) {
    uint32_t m = UINT32_MAX;
    for (int64_t i = 0; i < n; i++) {
        uint32_t v = (exc_to_bits(x[i]) << 1) - 1;
        m = v < m ? v : m;
    }
    return exc_from_bits((m >> 1) + (m & 1));
}
static inline float exc_smallest_share(const struct exc_project_args *a) {
    return exc_smallest(a->basis, a->rank * a->rows) * exc_smallest(a->strength, a->count);
}

#if defined(__x86_64__)
#include <immintrin.h>

#define EXC_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")))
/* the even and the odd columns of a 64-byte line of bf16 */
EXC_AVX512 EXC_INLINE __m512 exc_even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
EXC_AVX512 EXC_INLINE __m512 exc_odd(__m512i x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u)));
}
/* to bf16, to nearest even, in the upper halves; what is in the lower ones is not cleared */
EXC_AVX512 EXC_INLINE __m512i exc_rounded(__m512 x) {
    __m512i u = _mm512_castps_si512(x), tie = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(u, _mm512_add_epi32(tie, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
}
#endif

/* The whole call, bit for bit as project.c would; 0: this case or machine has no fast path, nothing was done. */
int exc_relay_project(exc_queue *q, const struct exc_project_args *a);

#endif
