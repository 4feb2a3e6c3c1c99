/* tensor.cuh - every inline-PTX instruction of the kernels, one wrapper each, with a meaning on the host that is tested.
 *
 * Fragments are those of the PTX manual. mma_bf16: D[16,8] += A[16,16] B[16,8]; lane l = 4g + q holds of A rows g and g+8, columns
 * 2q, 2q+1 and 8 more; of B column g, rows 2q, 2q+1 and 8 more; of D rows g and g+8, columns 2q, 2q+1. ldmatrix: tile t's eight
 * rows of 16 bytes are at the addresses of lanes 8t..8t+7; register t of lane 4g + q gets row g, elements 2q and 2q+1 (.trans:
 * column g of the tile, elements 2q, 2q+1). cp_async16 copies 16 bytes global -> shared; what was issued before a
 * commit is one group, cp_async_wait<N>() waits until at most N groups are open, and a barrier must follow for others to see it.
 *
 * Copies by the asynchronous proxy and mbarriers are in bulk.cuh. */
#ifndef EXC_TENSOR_CUH
#define EXC_TENSOR_CUH

#include "grid.cuh"

#ifdef __CUDACC__
__device__ inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const void *row) {
    unsigned s = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s)
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
    unsigned s = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s)
                 : "memory");
}
/* bytes 16 or 0: zeros are written for what is not copied (rows past the end) */
__device__ inline void cp_async16(void *shared, const void *global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int OPEN> __device__ inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory"); }
/* two floats rounded to nearest even into one register, lo in the low half; NaN becomes 0x7fff */
__device__ inline unsigned pack_bf16(float lo, float hi) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
/* two bf16 numbers times two others; subnormal ones are numbers */
__device__ inline unsigned scale_bf16(unsigned two, unsigned by) {
    unsigned r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(two), "r"(by), "r"(0x80008000u));
    return r;
}
/* the same to f16: beyond the range infinity, NaN becomes 0x7fff */
__device__ inline unsigned pack_f16(float lo, float hi) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
__device__ inline float widen_f16(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
/* ---- e4m3. Four codes as two pairs of f16, exact, NaN too */
__device__ inline void halves_of_e4m3(unsigned four, unsigned &low, unsigned &high) {
#if __CUDA_ARCH__ >= 890
    asm("{\n\t.reg .b16 l, h;\n\t"
        "mov.b32 {l, h}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, l;\n\t"
        "cvt.rn.f16x2.e4m3x2 %1, h;\n\t}"
        : "=r"(low), "=r"(high)
        : "r"(four));
#else
    unsigned pair[2] = {__byte_perm(four, 0, 0x1404), __byte_perm(four, 0, 0x3424)};
#pragma unroll
    for (int i = 0; i < 2; i++) { /* sign, then exponent and fraction a place lower: 2^-8 of the number; 480 is NaN */
        const unsigned small = (pair[i] & 0x80008000u) | (pair[i] & 0x7f007f00u) >> 1;
        unsigned none;
        asm("mul.f16x2 %0, %1, %2;" : "=r"(pair[i]) : "r"(small), "r"(0x5c005c00u));
        asm("{\n\t.reg .b32 a;\n\t"
            "and.b32 a, %1, 0x7fff7fff;\n\t"
            "set.gt.u32.f16x2 %0, a, %2;\n\t}"
            : "=r"(none)
            : "r"(pair[i]), "r"(0x5f005f00u));
        pair[i] |= none;
    }
    low = pair[0], high = pair[1];
#endif
}
__device__ inline void widen_halves(unsigned two, float &low, float &high) {
    asm("{\n\t.reg .b16 l, h;\n\t"
        "mov.b32 {l, h}, %2;\n\t"
        "cvt.f32.f16 %0, l;\n\t"
        "cvt.f32.f16 %1, h;\n\t}"
        : "=f"(low), "=f"(high)
        : "r"(two));
}
/* by pairs the larger, the smaller; NaN does not count */
__device__ inline unsigned larger_halves(unsigned a, unsigned b) {
    asm("max.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
}
__device__ inline unsigned smaller_halves(unsigned a, unsigned b) {
    asm("min.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
}
/* to nearest even, beyond the range the largest, NaN 0x7f */
__device__ inline unsigned e4m3_of(float a, float b, float c, float d) {
    unsigned four = 0;
#if __CUDA_ARCH__ >= 890
    asm("{\n\t.reg .b16 l, h;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n\t"
        "mov.b32 %0, {l, h};\n\t}"
        : "=r"(four)
        : "f"(a), "f"(b), "f"(c), "f"(d));
#else
    const float v[4] = {a, b, c, d};
#pragma unroll
    for (int i = 0; i < 4; i++) four |= nearest_e4m3(v[i]) << 8 * i;
#endif
    return four;
}
/* 16 bytes of data that will be read again soon: the second-level cache keeps its lines; of data read for the last time: it
 * drops them. Volatile, so that no two are taken for one; the order of these calls is that of the program. */
#define EXC_LOAD16(name, policy)                                                                                       \
    __device__ inline uint4 name(const void *p) {                                                                      \
        uint4 v;                                                                                                       \
        uint64_t how;                                                                                                  \
        asm("createpolicy.fractional.L2::" policy ".b64 %0, 1.0;" : "=l"(how));                                        \
        asm volatile("ld.global.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"                                        \
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)                                                      \
                     : "l"(p), "l"(how));                                                                              \
        return v;                                                                                                      \
    }
EXC_LOAD16(load_keep, "evict_last")
EXC_LOAD16(load_drop, "evict_first")
/* 16, or 8, bytes that will not be read soon */
__device__ inline void store_drop(void *p, const uint4 &v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ inline void store_drop(void *p, const uint2 &v) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
constexpr int CLUSTER = 8; /* blocks; what every Hopper can hold. Twice as many where the device says so */
/* Blocks of a cluster (sm_90; compiled away below): rank; a barrier of all their threads, which orders what they wrote to each
 * other's shared memory. */
__device__ inline int cluster_rank() {
    unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ inline void cluster_begin(void *) { cluster_sync(); }
namespace exc {
/* as many clusters of `blocks` as fit, `most` at most; cudaErrorInvalidConfiguration: not one fits */
template <class... P, class... A>
cudaError_t launch_clusters(int64_t most, int blocks, void (*kernel)(P...), unsigned threads, size_t smem, cudaStream_t stream, A &&...a) {
    std::tuple<std::decay_t<P>...> values(std::forward<A>(a)...);
    cudaLaunchAttribute size = {};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = (unsigned)blocks, size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = (unsigned)blocks, config.blockDim = threads, config.dynamicSmemBytes = smem, config.stream = stream;
    config.attrs = &size, config.numAttrs = 1;
    int fit = 0;
    cudaError_t e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
    if (e == cudaSuccess) /* these kernels have their weights there */
        e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (e == cudaSuccess && blocks > CLUSTER)
        e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (e == cudaSuccess) e = cudaOccupancyMaxActiveClusters(&fit, (const void *)kernel, &config);
    if (e != cudaSuccess && blocks > CLUSTER) e = cudaErrorInvalidConfiguration; /* not on this device */
    if (e != cudaSuccess) return e;
    if (!fit) return cudaErrorInvalidConfiguration;
    config.gridDim = (unsigned)(most < fit ? most : fit) * (unsigned)blocks;
    return std::apply([&](auto &...v) {
        void *p[] = {(void *)&v...};
        return cudaLaunchKernelExC(&config, (const void *)kernel, p);
    }, values);
}
} // namespace exc
#define LAUNCH_CLUSTERS(most, size, kernel, ...) exc::launch_clusters(most, size, kernel, __VA_ARGS__)
#else
#include "cuda_on_host/tensor.h"
/* on the host a launch is one cluster: all its blocks run at once */
constexpr int CLUSTER = 8;
inline char *exc_cluster_shared[2 * CLUSTER];
inline int cluster_rank() { return (int)blockIdx.x; }
#define cluster_sync() grid_sync()
#define cluster_begin(base)                                                                                            \
    do {                                                                                                               \
        if (threadIdx.x == 0) exc_cluster_shared[blockIdx.x] = (char *)(base);                                         \
        grid_sync();                                                                                                   \
    } while (0)
/* the place of `p` in the shared memory of another */
inline void *cluster_place(void *p, int rank) {
    return exc_cluster_shared[rank] + ((const char *)p - exc_cluster_shared[blockIdx.x]);
}
inline cudaError_t fits_as_cluster(cudaError_t e) {
    return e == cudaErrorCooperativeLaunchTooLarge ? cudaErrorInvalidConfiguration : e;
}
#define LAUNCH_CLUSTERS(most, size, kernel, threads, smem, stream, ...)                                                \
    fits_as_cluster(hc::launch_kernel(#kernel, true, kernel, dim3(size), dim3(threads), smem, stream, __VA_ARGS__))
template <int OPEN> inline void cp_async_wait() { hc::cp_async_wait(OPEN); }
inline unsigned scale_bf16(unsigned two, unsigned by) {
    const float lo = f32_of(two << 16) * f32_of(by << 16), hi = f32_of(two & 0xffff0000u) * f32_of(by & 0xffff0000u);
    return pack_bf16(lo, hi);
}
inline unsigned pack_f16(float lo, float hi) {
    auto one = [](float x) -> unsigned { return x != x ? 0x7fffu : narrow<f16>(x).bits; };
    return one(lo) | one(hi) << 16;
}
inline float widen_f16(uint16_t bits) { return widen(f16{bits}); }
inline void widen_halves(unsigned two, float &low, float &high) {
    low = widen(f16{(uint16_t)two}), high = widen(f16{(uint16_t)(two >> 16)});
}
inline void halves_of_e4m3(unsigned four, unsigned &low, unsigned &high) {
    auto one = [](unsigned code) -> unsigned {
        return (code & 0x7f) == NAN_E4M3 ? 0x7fffu : narrow<f16>(from_e4m3(code)).bits;
    };
    low = one(four & 255) | one(four >> 8 & 255) << 16, high = one(four >> 16 & 255) | one(four >> 24) << 16;
}
template <class Pick> inline unsigned of_halves(unsigned a, unsigned b, Pick pick) {
    auto one = [&](unsigned x, unsigned y) -> unsigned {
        return (x & 0x7fff) > 0x7c00u ? y : (y & 0x7fff) > 0x7c00u ? x : pick(widen_f16(x), widen_f16(y)) ? x : y;
    };
    return one(a & 0xffff, b & 0xffff) | one(a >> 16, b >> 16) << 16;
}
inline unsigned larger_halves(unsigned a, unsigned b) {
    return of_halves(a, b, [](float x, float y) { return x > y; });
}
inline unsigned smaller_halves(unsigned a, unsigned b) {
    return of_halves(a, b, [](float x, float y) { return x < y; });
}
inline unsigned e4m3_of(float a, float b, float c, float d) {
    return nearest_e4m3(a) | nearest_e4m3(b) << 8 | nearest_e4m3(c) << 16 | nearest_e4m3(d) << 24;
}
#endif

#endif
