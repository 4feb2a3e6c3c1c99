/* bulk.cuh - copies that the memory system makes by itself, and what tells when they are done: the asynchronous
 * proxy of Hopper behind calls that have a meaning on the host, where they are tested (cuda_on_host/bulk.h).
 *
 * A Gate is an mbarrier in shared memory, made for a number of arrivals. gate_expect is one arrival and
 * announces bytes; a phase ends when all arrivals and exactly the announced bytes are in, and gate_wait returns
 * once the phase of that parity has ended (the first has parity 0); then this thread sees the bytes. bulk_load
 * brings bytes from global to own shared memory, remote_store a number to the same place in another block of
 * the cluster; both report to a gate. bulk_store takes bytes from own shared to global memory; a thread closes
 * what it has issued into a group by bulk_commit, bulk_wait_read<N> waits until all but N groups have been
 * read, bulk_wait<N> until they are written. What threads wrote to shared memory is seen by bulk_store after
 * bulk_fence of the writers and a barrier that the issuer shares with them. Addresses and sizes of bulk copies
 * are multiples of 16. Before the first use of gates by others: gates_ready, then a barrier. Below sm_90 these
 * are compiled away: no kernel that uses them is launched there (project.cu). */
#ifndef EXC_BULK_CUH
#define EXC_BULK_CUH

#include "tensor.cuh"

struct Gate {
    unsigned long long word;
};

#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
#define EXC_ASYNC(...) asm volatile(__VA_ARGS__)
#else
#define EXC_ASYNC(...) ((void)0)
#endif
__device__ inline unsigned shared_at(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
/* the address of `p` in the shared memory of another block of the cluster */
__device__ inline unsigned shared_of(const void *p, int rank) {
    unsigned there = 0;
    EXC_ASYNC("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_at(p)), "r"(rank));
    return there;
}
__device__ inline void gate_init(Gate *g, int arrivals) {
    EXC_ASYNC("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_at(g)), "r"(arrivals) : "memory");
}
__device__ inline void gates_ready() { EXC_ASYNC("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void gate_expect(Gate *g, unsigned bytes) {
    EXC_ASYNC("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_at(g)), "r"(bytes) : "memory");
}
__device__ inline void gate_wait(Gate *g, unsigned parity) {
    EXC_ASYNC("{\n\t"
              ".reg .pred done;\n"
              "again:\n\t"
              "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
              "@!done bra again;\n\t"
              "}" ::"r"(shared_at(g)),
              "r"(parity)
              : "memory");
}
/* read once: the second-level cache need not keep it */
__device__ inline void bulk_load(void *shared, const void *global, unsigned bytes, Gate *g) {
    EXC_ASYNC("{\n\t"
              ".reg .b64 how;\n\t"
              "createpolicy.fractional.L2::evict_first.b64 how, 1.0;\n\t"
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], how;\n\t"
              "}" ::"r"(shared_at(shared)),
              "l"(global), "r"(bytes), "r"(shared_at(g))
              : "memory");
}
__device__ inline void bulk_store(void *global, const void *shared, unsigned bytes) {
    EXC_ASYNC("{\n\t"
              ".reg .b64 how;\n\t"
              "createpolicy.fractional.L2::evict_first.b64 how, 1.0;\n\t"
              "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, how;\n\t"
              "}" ::"l"(global),
              "r"(shared_at(shared)), "r"(bytes)
              : "memory");
}
__device__ inline void bulk_fence() { EXC_ASYNC("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void bulk_commit() { EXC_ASYNC("cp.async.bulk.commit_group;" ::: "memory"); }
template <int OPEN> __device__ inline void bulk_wait_read() {
    EXC_ASYNC("cp.async.bulk.wait_group.read %0;" ::"n"(OPEN) : "memory");
}
template <int OPEN> __device__ inline void bulk_wait() {
    EXC_ASYNC("cp.async.bulk.wait_group %0;" ::"n"(OPEN) : "memory");
}
__device__ inline void remote_store(float *p, int rank, float x, Gate *g) {
    EXC_ASYNC("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(shared_of(p, rank)),
              "f"(x), "r"(shared_of(g, rank))
              : "memory");
}
/* four numbers, at a multiple of 16 bytes */
__device__ inline void remote_store(float *p, int rank, const float4 &x, Gate *g) {
    EXC_ASYNC("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(shared_of(p, rank)),
              "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(shared_of(g, rank))
              : "memory");
}
#else
#include "cuda_on_host/bulk.h"
#endif

#endif
