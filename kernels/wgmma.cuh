/* wgmma.cuh - the products of four warps at once on Hopper (sm_90a), with a meaning on the host that is tested.
 *
 * group_multiply<N>: D[64,N] += A[64,16] B[N,16]^T, bf16 in shared memory, f32 sums in registers; lane l = 4g + q of
 * warp w holds of D rows 16 w + g and 8 more: d[4 j + i] is column 8 j + 2 q + i % 2 of row g + i / 2 * 8 (PTX ISA,
 * wgmma, D of m64nNk16). The operands are given by descriptors (PTX ISA, "matrix descriptor"): bits 0-13 the shared
 * address / 16; 16-29 the leading offset / 16, not used by swizzled operands along k (1); 32-45 the stride from eight
 * rows to the next eight / 16; 49-51 the offset of the pattern's base, 0 as tiles begin at multiples of 1024; 62-63 the
 * swizzle, 1: 128 bytes. A row of eight 16-byte pieces is 128 bytes; the hardware adds row, stride and k to the
 * address, then takes bits 4-6 exclusive or bits 7-9: piece p of row r lies at p ^ (r & 7). The next 16 of k are 32
 * bytes on. Between writing operands and group_multiply: bulk_fence of the writers and a barrier. group_fence before
 * the first product and after registers were touched; group_commit closes a group, group_wait<N> waits until at most N
 * are open: until then neither registers nor operands may be touched. */
#ifndef EXC_WGMMA_CUH
#define EXC_WGMMA_CUH

#include "bulk.cuh"

constexpr int GROUP = 4 * WARP, SWIZZLE_ROW = 128; /* threads; bytes */

#ifdef __CUDACC__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define EXC_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define EXC_WGMMA(...) ((void)0)
#endif
__device__ inline void group_fence() { EXC_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void group_commit() { EXC_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OPEN> __device__ inline void group_wait() { EXC_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(OPEN) : "memory"); }
#define EXC_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EXC_SIXTEEN(d, i) EXC_FOUR(d, i), EXC_FOUR(d, i + 4), EXC_FOUR(d, i + 8), EXC_FOUR(d, i + 12)
template <int N> __device__ inline void group_multiply(float (&d)[N / 2], uint64_t a, uint64_t b) {
    static_assert(N == 64 || N == 128, "the shapes in use");
    if constexpr (N == 64)
        EXC_WGMMA("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
                  "%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
                  : EXC_SIXTEEN(d, 0), EXC_SIXTEEN(d, 16)
                  : "l"(a), "l"(b));
    else
        EXC_WGMMA("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
                  "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
                  "%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, 0;"
                  : EXC_SIXTEEN(d, 0), EXC_SIXTEEN(d, 16), EXC_SIXTEEN(d, 32), EXC_SIXTEEN(d, 48)
                  : "l"(a), "l"(b));
}
/* the compiler moves nothing of these registers across */
template <int COUNT> __device__ inline void group_hold(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) EXC_WGMMA("" : "+f"(d[i])::"memory");
}
__device__ inline uint64_t shared_address(const void *p) { return shared_at(p); }
#else
#include "cuda_on_host/wgmma.h"
template <int COUNT> inline void group_hold(float (&)[COUNT]) {}
#endif

/* rows of 128 bytes, swizzled, from a multiple of 1024 on */
__device__ inline uint64_t group_operand(const void *tile) {
    return (shared_address(tile) & 0x3ffff) >> 4 | 1ull << 16 | (uint64_t)(8 * SWIZZLE_ROW >> 4) << 32 | 1ull << 62;
}
/* where piece `part` of 16 bytes of row r lies in such a tile */
__device__ inline int swizzled(int r, int part) { return r * SWIZZLE_ROW + (part ^ (r & 7)) * 16; }

#endif
