/* cuda.cuh - the only file a kernel source includes (beside tensor.cuh): real CUDA under nvcc, CUDA on the host elsewhere.
 *
 * How a twin is written. kernels/X.cu defines extern "C" exc_cuda_X(q, a): it checks the arguments as X.c does, sizes its
 * launches from the host values of `a` alone (every pointer is device memory: it is never read here), takes scratch by
 * Carve, and enqueues its kernels by ENQUEUE on the queue's stream. It never allocates, copies to the host or waits, so
 * that it can be captured in a CUDA graph. norm.cu is the shortest complete one, rope.cu shows several shapes of work,
 * convert.cu scalar results, scale.cu tables of pointers. The smallest looks like this:
 *
 *     __global__ void double_rows(const float *x, int64_t n, float *y) { for (int64_t i : grid_stride(n)) y[i] = 2 * x[i]; }
 *     extern "C" exc_status exc_cuda_twice(exc_queue *q, const struct exc_twice_args *a) {
 *         if (a->n < 0) return EXC_ERR_USAGE;
 *         Carve work(q);                               // only where scratch is needed
 *         float *part = work.take<float>(a->n);
 *         if (!work.ready()) return work.status;       // measuring, or too little
 *         ENQUEUE(q, double_rows, grid_for(a->n, 256), 256, 0, a->x, a->n, a->y);  // a grid of 0 blocks is skipped
 *         return EXC_OK;
 *     }
 *
 * Rules that keep one source right in both worlds: dynamic shared memory by DYN_SHARED, static by SHARED_ARRAY (fresh,
 * exact and poisoned on the host); every warp collective with its full mask and reached by all lanes in it; no reliance on
 * warps in lock step; numbers in bf16 and f16 are storage (types below), arithmetic is f32 or f64; fused multiply-adds
 * are written fmaf, as in the CPU twins (both are compiled with contraction off); inline PTX only in tensor.cuh. */
#ifndef EXC_CUDA_CUH
#define EXC_CUDA_CUH

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <tuple>
#include <utility>
#include <cooperative_groups.h>
#define DYN_SHARED(T, name)                                                                                            \
    extern __shared__ __align__(128) unsigned char exc_dynamic_shared[];                                               \
    T *name = reinterpret_cast<T *>(exc_dynamic_shared)
#define SHARED_ARRAY(T, name, n) __shared__ __align__(16) T name[n]
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }
namespace exc {
/* a checked, typed launch that exists in both worlds */
template <class... P, class... A>
cudaError_t launch(bool together, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A &&...a) {
    std::tuple<std::decay_t<P>...> values(std::forward<A>(a)...);
    if (smem > 32 * 1024) { /* of the 48 KB that need no leave, static shared memory (at most 16 KB) has its share */
        cudaError_t e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
        if (e != cudaSuccess) return e;
    }
    return std::apply(
        [&](auto &...v) {
            void *p[] = {(void *)&v...};
            return together ? cudaLaunchCooperativeKernel((const void *)kernel, grid, block, p, smem, stream)
                            : cudaLaunchKernel((const void *)kernel, grid, block, p, smem, stream);
        },
        values);
}
} // namespace exc
#define LAUNCH(kernel, ...) exc::launch(false, kernel, __VA_ARGS__)
#define LAUNCH_TOGETHER(kernel, ...) exc::launch(true, kernel, __VA_ARGS__) /* all blocks resident: grid_sync() works */
#else
#include "cuda_on_host/device.h"
#define DYN_SHARED(T, name) T *name = static_cast<T *>(hc::cur->blk->dsmem)
#define SHARED_ARRAY(T, name, n)                                                                                       \
    static char name##_key;                                                                                            \
    T(&name)[n] = *static_cast<T(*)[n]>(hc::shared_mem(&name##_key, sizeof(T[n]), alignof(T)))
#define grid_sync() hc::grid_barrier(HC_SITE)
#define LAUNCH(kernel, ...) hc::launch_kernel(#kernel, false, kernel, __VA_ARGS__)
#define LAUNCH_TOGETHER(kernel, ...) hc::launch_kernel(#kernel, true, kernel, __VA_ARGS__)
#endif

#include "ops.h"

/* ------------------------------------------------------------------------------------------ host side of a twin */

/* the status of a device call; the first failure of a queue is kept with its place, for the host's one line of text */
static inline exc_status exc_enqueued(exc_queue *q, const char *what, cudaError_t e) {
    if (e == cudaSuccess) return EXC_OK;
    if (!q->failed) q->failed = (int)e, q->failed_at = what;
    return EXC_ERR_DEVICE;
}

/* an expression that gives a cudaError_t; returns from the function when it failed. `grid` of 0 blocks: nothing to do */
#define ENQUEUE_BY(launcher, q, kernel, grid, block, smem, ...)                                                        \
    do {                                                                                                               \
        dim3 grid_ = (grid);                                                                                           \
        if ((q)->measuring || !grid_.x || !grid_.y || !grid_.z) break;                                                 \
        exc_status status_ = exc_enqueued(q, #kernel, cudaSetDevice((q)->device));                                     \
        if (status_ == EXC_OK)                                                                                         \
            status_ = exc_enqueued(q, #kernel, launcher(kernel, grid_, dim3(block), (size_t)(smem),                    \
                                                        (cudaStream_t)(q)->stream, __VA_ARGS__));                      \
        if (status_ != EXC_OK) return status_;                                                                         \
    } while (0)
#define ENQUEUE(q, kernel, grid, block, smem, ...) ENQUEUE_BY(LAUNCH, q, kernel, grid, block, smem, __VA_ARGS__)
#define ENQUEUE_TOGETHER(q, kernel, grid, block, smem, ...)                                                            \
    ENQUEUE_BY(LAUNCH_TOGETHER, q, kernel, grid, block, smem, __VA_ARGS__)

/* sets device memory to a byte, in stream order */
static inline exc_status exc_enqueue_fill(exc_queue *q, void *p, int byte, size_t bytes) {
    if (q->measuring || !bytes) return EXC_OK;
    exc_status st = exc_enqueued(q, "fill", cudaSetDevice(q->device));
    return st != EXC_OK ? st : exc_enqueued(q, "fill", cudaMemsetAsync(p, byte, bytes, (cudaStream_t)q->stream));
}

/* Scratch of one op: consecutive pieces of queue->work. The same calls measure: what they add up to cannot disagree with what
 * is used. Contents are whatever the op before left. */
struct Carve {
    exc_queue *q;
    size_t at = 0;
    exc_status status = EXC_OK;
    explicit Carve(exc_queue *queue) : q(queue) {}
    template <class T> T *take(int64_t count) {
        T *p = reinterpret_cast<T *>(static_cast<char *>(q->work) + at);
        at += ((size_t)count * sizeof(T) + 255) / 256 * 256;
        return p;
    }
    bool ready() {
        if (at > q->work_needed) q->work_needed = at;
        if (q->measuring) return false;
        if (at > q->work_bytes) status = EXC_ERR_MEMORY;
        return status == EXC_OK;
    }
};

template <class A, class B> __host__ __device__ constexpr int64_t ceil_div(A a, B b) {
    return ((int64_t)a + (int64_t)b - 1) / (int64_t)b;
}

/* blocks of `threads` for n elements, `each` a thread; beyond `most` blocks the kernel's loop goes round (grid_stride) */
static inline unsigned grid_for(int64_t n, int threads, int each = 1, int64_t most = 1 << 20) {
    int64_t blocks = ceil_div(n, (int64_t)threads * each);
    return (unsigned)(blocks < most ? blocks : most);
}

static inline bool aligned(const void *p, size_t to) { return (uintptr_t)p % to == 0; }
static inline size_t exc_dtype_size(int dtype) { return dtype == EXC_F64 ? 8 : dtype == EXC_F32 ? 4 : 2; }

/* --------------------------------------------------------------------------------- device side: indices, numbers */

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

/* for (int64_t i : grid_stride(n)) visits i = thread of the grid, + threads of the grid, .. */
struct Stride {
    struct At {
        int64_t i, step;
        __device__ int64_t operator*() const { return i; }
        __device__ void operator++() { i += step; }
        __device__ bool operator!=(const At &end) const { return i < end.i; }
    } from, to;
    __device__ At begin() const { return from; }
    __device__ At end() const { return to; }
};
#define grid_stride(n)                                                                                                 \
    (Stride{{(int64_t)blockIdx.x * blockDim.x + threadIdx.x, (int64_t)gridDim.x * blockDim.x}, {(int64_t)(n), 0}})
#define block_stride(n) (Stride{{(int64_t)threadIdx.x, (int64_t)blockDim.x}, {(int64_t)(n), 0}})

/* storage types: a 16-bit number is bits until it is widened */
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

__host__ __device__ inline float f32_of(uint32_t u) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(u);
#else
    float f;
    memcpy(&f, &u, 4);
    return f;
#endif
}
__host__ __device__ inline uint32_t bits_of(float f) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(f);
#else
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
#endif
}

/* exact */
__host__ __device__ inline float widen(float x) { return x; }
__host__ __device__ inline float widen(bf16 x) { return f32_of((uint32_t)x.bits << 16); }
__host__ __device__ inline float widen(f16 x) {
    uint32_t u = (uint32_t)(x.bits & 0x7fff) << 13, e = u & 0x0f800000u;
    uint32_t wide = u + (112u << 23) + (e == 0x0f800000u ? 112u << 23 : 0);
    float small = f32_of(u + (113u << 23)) - 6.103515625e-5f; /* 2^-14 */
    return f32_of((e ? wide : bits_of(small)) | (uint32_t)(x.bits & 0x8000) << 16);
}

/* to nearest even, with the bits of the CPU twins for NaN too */
template <class T> __host__ __device__ inline T narrow(float x);
template <> __host__ __device__ inline float narrow<float>(float x) { return x; }
template <> __host__ __device__ inline bf16 narrow<bf16>(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16, nan = u >> 16 | 0x40;
    return {(uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <> __host__ __device__ inline f16 narrow<f16>(float x) {
    uint32_t u = bits_of(x), sign = u & 0x80000000u, a = u ^ sign;
    uint32_t big = a > 0x7f800000u ? 0x7e00u | (a >> 13 & 0x3ffu) : 0x7c00u;
    uint32_t small = bits_of(f32_of(a) + 0.5f) - 0x3f000000u;
    uint32_t normal = (a + 0xc8000fffu + (a >> 13 & 1)) >> 13;
    uint32_t h = a >= 0x47800000u ? big : a < 0x38800000u ? small : normal;
    return {(uint16_t)(h | sign >> 16)};
}

/* f64 -> f32 rounded to odd: a rounding to 16 bits afterwards is then the only one */
__host__ __device__ inline float round_to_odd(double d) {
    float f = (float)d;
    double back = (double)f;
    uint32_t u = bits_of(f), away = (back > d && d > 0) || (back < d && d < 0);
    return f32_of(back == d || d != d ? u : (u - away) | 1);
}

__host__ __device__ inline bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

/* runs the statement with T as the storage type of a dtype: BY_DTYPE(a->dtype, ENQUEUE(q, kernel<T>, ..)) */
#define BY_DTYPE(dtype, ...)                                                                                           \
    switch (dtype) {                                                                                                   \
    case EXC_F32: { using T = float; __VA_ARGS__; break; }                                                             \
    case EXC_BF16: { using T = bf16; __VA_ARGS__; break; }                                                             \
    case EXC_F16: { using T = f16; __VA_ARGS__; break; }                                                               \
    default: return EXC_ERR_USAGE;                                                                                     \
    }
#define BY_ACT(act, ...)                                                                                               \
    switch (act) {                                                                                                     \
    case EXC_F32: { using T = float; __VA_ARGS__; break; }                                                             \
    case EXC_BF16: { using T = bf16; __VA_ARGS__; break; }                                                             \
    default: return EXC_ERR_USAGE;                                                                                     \
    }

/* exact sum of a and b as hi + lo (Knuth) */
__device__ inline void two_sum(float a, float b, float *hi, float *lo) {
    float s = a + b, bb = s - a;
    *lo = (a - (s - bb)) + (b - bb);
    *hi = s;
}

/* ------------------------------------------------------------------------------------------------- device side: sums */

/* Sum over a warp in a fixed order; every lane gets it. All 32 lanes call. */
template <class T> __device__ inline T warp_sum(T v) {
    for (int d = WARP / 2; d > 0; d /= 2) v += __shfl_xor_sync(ALL_LANES, v, d);
    return v;
}
template <class T> __device__ inline T warp_max(T v) {
    for (int d = WARP / 2; d > 0; d /= 2) {
        T other = __shfl_xor_sync(ALL_LANES, v, d);
        v = other > v ? other : v;
    }
    return v;
}

/* Sum over a block of whole warps (at most 1024 threads), fixed order; every thread gets it. `room`: 32 T of shared memory, free
 * to be used again after the call's own barriers. All threads call. */
template <class T> __device__ inline T block_sum(T v, T *room) {
    v = warp_sum(v);
    int warps = (int)blockDim.x / WARP;
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = v;
    __syncthreads();
    v = warp_sum((int)threadIdx.x % WARP < warps ? room[threadIdx.x % WARP] : T(0));
    return v;
}

#endif
