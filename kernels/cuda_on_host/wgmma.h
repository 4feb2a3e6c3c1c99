/* wgmma.h - what the products of wgmma.cuh mean, on the host.
 *
 * Operands are found as the hardware finds them: by decoding the descriptor and the swizzle, so that a layout that does
 * not fit its descriptor gives wrong products. Products are made as late as allowed, when their group is waited for:
 * sums read before, or operands overwritten before, show. Each warp makes its own sixteen rows, f32 sums in ascending
 * k. Stops the program: a swizzle other than 128 bytes, operands outside the block's shared memory, lanes that differ
 * in their operands, a product without the fences it needs. */
#ifndef EXC_CUDA_WGMMA_H
#define EXC_CUDA_WGMMA_H

#include "device.h"

namespace hc {
void group_fence();
void group_multiply(float *d, uint64_t a, uint64_t b, int n);
void group_commit();
void group_wait(int open, Site s);
} // namespace hc

inline void group_fence() { hc::group_fence(); }
template <int N> inline void group_multiply(float (&d)[N / 2], uint64_t a, uint64_t b) { hc::group_multiply(d, a, b, N); }
inline void group_commit() { hc::group_commit(); }
template <int OPEN> inline void group_wait() { hc::group_wait(OPEN, HC_SITE); }
/* dynamic shared memory begins at 0 of the window */
inline uint64_t shared_address(const void *p) { return (uint64_t)((const char *)p - (const char *)hc::cur->blk->dsmem); }

#endif
