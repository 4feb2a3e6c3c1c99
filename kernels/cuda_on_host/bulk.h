/* bulk.h - what the asynchronous copies and mbarriers of bulk.cuh mean, on the host.
 *
 * A gate's word points to what the runtime knows of it. Bytes under way are moved as late as allowed: a load or remote
 * store when a thread waits for its phase and the phase is complete, a bulk store when its group is waited for; so what
 * reads too early reads what lay there before. Stops the program: addresses or sizes that are no multiples of 16, a gate
 * that was not made or whose block has ended, more arrivals than it was made for, more bytes than were announced, bytes
 * that a complete set of waiting threads waits for in vain, a bulk store without a fence, a bulk load over what
 * a bulk store may not have read, a thread that ends with such stores, a block that ends with bytes on the way to it. */
#ifndef EXC_CUDA_BULK_H
#define EXC_CUDA_BULK_H

#include "device.h"

namespace hc {
void gate_init(unsigned long long *word, int arrivals);
void gate_expect(unsigned long long *word, unsigned bytes);
void gate_wait(unsigned long long *word, unsigned parity, Site s);
void gate_bring(unsigned long long *word, void *to, const void *from, unsigned bytes, bool bulk);
void bulk_store(void *global, const void *shared, unsigned bytes);
void bulk_fence();
void bulk_commit();
void bulk_wait(int open, bool read_only);
} // namespace hc

inline void gate_init(Gate *g, int arrivals) { hc::gate_init(&g->word, arrivals); }
inline void gates_ready() {}
inline void gate_expect(Gate *g, unsigned bytes) { hc::gate_expect(&g->word, bytes); }
#define gate_wait(g, parity) hc::gate_wait(&(g)->word, parity, HC_SITE)
inline void bulk_load(void *shared, const void *global, unsigned bytes, Gate *g) {
    hc::gate_bring(&g->word, shared, global, bytes, true);
}
inline void bulk_store(void *global, const void *shared, unsigned bytes) { hc::bulk_store(global, shared, bytes); }
inline void bulk_fence() { hc::bulk_fence(); }
inline void bulk_commit() { hc::bulk_commit(); }
template <int OPEN> inline void bulk_wait_read() { hc::bulk_wait(OPEN, true); }
template <int OPEN> inline void bulk_wait() { hc::bulk_wait(OPEN, false); }
inline void remote_store(float *p, int rank, float x, Gate *g) {
    hc::gate_bring(&((Gate *)cluster_place(g, rank))->word, cluster_place(p, rank), &x, sizeof x, false);
}
inline void remote_store(float *p, int rank, const float4 &x, Gate *g) {
    const float each[] = {x.x, x.y, x.z, x.w};
    if ((uintptr_t)cluster_place(p, rank) % 16) hc::fail("a remote store of 16 bytes to no multiple of 16");
    for (int i = 0; i < 4; i++) remote_store(p + i, rank, each[i], g);
}

#endif
