/* device.h - "CUDA on the host": the device side of CUDA C++ for a plain C++ compiler, so that kernels run on a CPU.
 *
 * One CUDA thread is one fiber; blocks are spread over OS threads; warp collectives and barriers are meetings. Calls
 * that the hardware leaves undefined stop the program with a text: lanes that meet in different collectives, barriers
 * that not all threads reach, shuffles from lanes that take no part. fibers.cpp runs it, streams.cpp is the runtime.
 * Anything missing here that a kernel uses is added here, with the meaning of the CUDA C++ guide. */
#ifndef EXC_CUDA_DEVICE_H
#define EXC_CUDA_DEVICE_H

#include "runtime.h"
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// works, but SHARED_ARRAY (gpu.h) is better: sanitizers do not see the bounds of thread_local arrays, and a
// thread_local is not renewed for every block (stale values stay, and TSan would report the reuse as a race)
#define __shared__ static thread_local

#if defined(__SANITIZE_THREAD__)
#define HC_NOTSAN __attribute__((no_sanitize_thread, noinline))
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HC_NOTSAN __attribute__((no_sanitize("thread"), noinline))
#endif
#endif
#ifndef HC_NOTSAN
#define HC_NOTSAN
#endif

namespace hc {
struct Fiber;
struct Block {
    uint3 bid;
    dim3 bdim, gdim;
    void *dsmem;
    size_t dsmem_bytes;
};
struct Thread {
    uint3 tid;
    unsigned lane, warp, lin;
    Block *blk;
    Fiber *fib;
    const char *file;
    int line;
};
extern __thread Thread *cur __attribute__((tls_model("initial-exec"))); // __thread: no init wrapper

void *shared_mem(const void *key, size_t n, size_t align); // per-block storage for SHARED_ARRAY: exact size, poisoned

struct Site {
    const char *file;
    int line;
};
[[noreturn]] void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
enum BarOp { BAR_PLAIN, BAR_COUNT, BAR_AND, BAR_OR };
int barrier(int id, int count /* -1: every live thread of the block */, BarOp op, int pred, Site s);
void grid_barrier(Site s);
void yield(Site s);
// A warp collective: the last lane of `mask` to arrive runs fn once for all lanes (in/out/arg indexed by lane).
using CollFn = void (*)(unsigned mask, const void *const *in, void *const *out, const int *arg);
unsigned collective(unsigned mask, CollFn fn, const void *in, void *out, int arg, bool memsync, Site s);

// ---- launch ----
struct Launch {
    const char *name;
    dim3 g, b;
    size_t smem;
    cudaStream_t s;
    bool coop;
};
cudaError_t launch(const Launch &, std::function<void()> body);
/* work that begins when it is submitted, again whenever a graph is that has it, and is done when what came then says so */
using Poll = std::function<bool()>;
void enqueue_poll(cudaStream_t stream, std::function<Poll()> begin);
void check_arg(const char *kernel, int i, const void *p, cudaStream_t s);
void check_words(const char *kernel, int i, const void *value, size_t n, cudaStream_t s);
template <class T> void check_one(const char *k, int i, const T &v, cudaStream_t s) {
    if constexpr (std::is_pointer<T>::value) check_arg(k, i, (const void *)v, s);
    else if constexpr (std::is_class<T>::value) check_words(k, i, &v, sizeof v, s);
}
template <class... P, class... A>
cudaError_t launch_kernel(const char *name, bool coop, void (*k)(P...), dim3 g, dim3 b, size_t smem, cudaStream_t s,
                          A &&...a) {
    std::tuple<std::decay_t<P>...> t(std::forward<A>(a)...);
    std::apply(
        [&](auto &...v) {
            int i = 0;
            (check_one(name, i++, v, s), ...);
        },
        t);
    return launch(Launch{name, g, b, smem, s, coop}, [k, t] { std::apply(k, t); });
}

// ---- collectives ----
#define HC_LANES(l, mask)                                                                                            \
    for (int l = 0; l < 32; l++)                                                                                     \
        if ((mask) >> l & 1)
template <class T> struct Shfl {
    HC_NOTSAN static void run(unsigned m, const void *const *in, void *const *out, const int *src) {
        HC_LANES(l, m) {
            if (!(m >> (src[l] & 31) & 1))
                fail("shuffle: lane %d reads lane %d, which does not take part (mask %08x)", l, src[l], m);
            *(T *)out[l] = *(const T *)in[src[l] & 31];
        }
    }
};
HC_NOTSAN inline void coll_none(unsigned, const void *const *, void *const *, const int *) {}
HC_NOTSAN inline void coll_ballot(unsigned m, const void *const *, void *const *out, const int *pred) {
    unsigned r = 0;
    HC_LANES(l, m) if (pred[l]) r |= 1u << l;
    HC_LANES(l, m) * (unsigned *)out[l] = r;
}
template <class T> struct Match {
    HC_NOTSAN static void run(unsigned m, const void *const *in, void *const *out, const int *) {
        HC_LANES(l, m) {
            unsigned r = 0;
            HC_LANES(k, m) if (*(const T *)in[k] == *(const T *)in[l]) r |= 1u << k;
            *(unsigned *)out[l] = r;
        }
    }
};
enum Red { R_ADD, R_MIN, R_MAX, R_AND, R_OR, R_XOR };
template <class T, Red R> struct Reduce {
    HC_NOTSAN static void run(unsigned m, const void *const *in, void *const *out, const int *) {
        bool first = true;
        T r{};
        HC_LANES(l, m) {
            T v = *(const T *)in[l];
            if (first)
                r = v;
            else if constexpr (R == R_ADD)
                r = r + v;
            else if constexpr (R == R_MIN)
                r = v < r ? v : r;
            else if constexpr (R == R_MAX)
                r = v > r ? v : r;
            else if constexpr (R == R_AND)
                r = r & v;
            else if constexpr (R == R_OR)
                r = r | v;
            else
                r = r ^ v;
            first = false;
        }
        HC_LANES(l, m) * (T *)out[l] = r;
    }
};
template <class T> T shfl(unsigned m, T v, int src, Site s) {
    T r;
    collective(m, Shfl<T>::run, &v, &r, src, false, s);
    return r;
}
template <class T> T shfl_idx(unsigned m, T v, int src, Site s, int w = 32) {
    int l = cur->lane;
    return shfl(m, v, (l & ~(w - 1)) | (src & (w - 1)), s);
}
template <class T> T shfl_up(unsigned m, T v, unsigned d, Site s, int w = 32) {
    int l = cur->lane, p = l - (int)d;
    return shfl(m, v, p < (l & ~(w - 1)) ? l : p, s);
}
template <class T> T shfl_down(unsigned m, T v, unsigned d, Site s, int w = 32) {
    int l = cur->lane;
    return shfl(m, v, (l & (w - 1)) + (int)d >= w ? l : l + (int)d, s);
}
template <class T> T shfl_xor(unsigned m, T v, int x, Site s, int w = 32) {
    int l = cur->lane, p = l ^ x;
    return shfl(m, v, p >= (l & ~(w - 1)) + w ? l : p, s);
}
inline unsigned ballot(unsigned m, int p, Site s) {
    unsigned r;
    collective(m, coll_ballot, nullptr, &r, p != 0, false, s);
    return r;
}
inline int all(unsigned m, int p, Site s) { return ballot(m, !p, s) == 0; }
template <class T> unsigned match_any(unsigned m, T v, Site s) {
    unsigned r;
    collective(m, Match<T>::run, &v, &r, 0, false, s);
    return r;
}
template <Red R, class T> T reduce(unsigned m, T v, Site s) {
    T r;
    collective(m, Reduce<T, R>::run, &v, &r, 0, false, s);
    return r;
}
} // namespace hc

#define HC_SITE (hc::Site{__FILE__, __LINE__})
#define threadIdx (hc::cur->tid)
#define blockIdx (hc::cur->blk->bid)
#define blockDim (hc::cur->blk->bdim)
#define gridDim (hc::cur->blk->gdim)
static constexpr int warpSize = 32;
#define __syncthreads() ((void)hc::barrier(0, -1, hc::BAR_PLAIN, 0, HC_SITE))
#define __syncthreads_count(p) hc::barrier(0, -1, hc::BAR_COUNT, !!(p), HC_SITE)
#define __syncthreads_and(p) hc::barrier(0, -1, hc::BAR_AND, !!(p), HC_SITE)
#define __syncthreads_or(p) hc::barrier(0, -1, hc::BAR_OR, !!(p), HC_SITE)
#define HC_MASK(m, ...) (m)
#define __syncwarp(...)                                                                                              \
    ((void)hc::collective(hc_mask(__VA_ARGS__), hc::coll_none, nullptr, nullptr, 0, true, HC_SITE))
inline unsigned hc_mask(unsigned m = 0xffffffffu) { return m; }
// __shfl_*_sync(mask, v, src [, width]): the site goes between so that width stays optional
#define __shfl_sync(m, v, s, ...) hc::shfl_idx(m, v, s, HC_SITE, ##__VA_ARGS__)
#define __shfl_up_sync(m, v, d, ...) hc::shfl_up(m, v, d, HC_SITE, ##__VA_ARGS__)
#define __shfl_down_sync(m, v, d, ...) hc::shfl_down(m, v, d, HC_SITE, ##__VA_ARGS__)
#define __shfl_xor_sync(m, v, x, ...) hc::shfl_xor(m, v, x, HC_SITE, ##__VA_ARGS__)
#define __ballot_sync(m, p) hc::ballot(m, (p) ? 1 : 0, HC_SITE)
#define __any_sync(m, p) (hc::ballot(m, (p) ? 1 : 0, HC_SITE) != 0)
#define __all_sync(m, p) hc::all(m, (p) ? 1 : 0, HC_SITE)
#define __match_any_sync(m, v) hc::match_any(m, v, HC_SITE)
#define __reduce_add_sync(m, v) hc::reduce<hc::R_ADD>(m, v, HC_SITE)
#define __reduce_min_sync(m, v) hc::reduce<hc::R_MIN>(m, v, HC_SITE)
#define __reduce_max_sync(m, v) hc::reduce<hc::R_MAX>(m, v, HC_SITE)
#define __reduce_and_sync(m, v) hc::reduce<hc::R_AND>(m, v, HC_SITE)
#define __reduce_or_sync(m, v) hc::reduce<hc::R_OR>(m, v, HC_SITE)
#define __reduce_xor_sync(m, v) hc::reduce<hc::R_XOR>(m, v, HC_SITE)
#define __nanosleep(ns) ((void)(ns), hc::yield(HC_SITE))
// any set that holds the caller is a legal answer; the smallest one exposes code that counts on more
inline unsigned __activemask() { return 1u << hc::cur->lane; }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { hc::fail("__trap()"); }

// ---- atomics (relaxed, device scope) ----
namespace hc {
template <class T>
using bits_t = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
template <class T, class F> T rmw(T *p, F f) {
    auto *q = (bits_t<T> *)p;
    bits_t<T> o = __atomic_load_n(q, __ATOMIC_RELAXED), n;
    T ov;
    do {
        __builtin_memcpy((void *)&ov, &o, sizeof o);
        T nv = f(ov);
        __builtin_memcpy(&n, &nv, sizeof n);
    } while (!__atomic_compare_exchange_n(q, &o, n, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return ov;
}
} // namespace hc
template <class T> T atomicAdd(T *p, std::common_type_t<T> v) {
    if constexpr (std::is_integral<T>::value)
        return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
    else
        return hc::rmw(p, [v](T o) { return o + v; });
}
template <class T> T atomicSub(T *p, std::common_type_t<T> v) {
    return hc::rmw(p, [v](T o) { return o - v; });
}
template <class T> T atomicMax(T *p, std::common_type_t<T> v) {
    return hc::rmw(p, [v](T o) { return v > o ? v : o; });
}
template <class T> T atomicMin(T *p, std::common_type_t<T> v) {
    return hc::rmw(p, [v](T o) { return v < o ? v : o; });
}
template <class T> T atomicAnd(T *p, std::common_type_t<T> v) {
    return hc::rmw(p, [v](T o) { return o & v; });
}
template <class T> T atomicOr(T *p, std::common_type_t<T> v) {
    return hc::rmw(p, [v](T o) { return o | v; });
}
template <class T> T atomicXor(T *p, std::common_type_t<T> v) {
    return hc::rmw(p, [v](T o) { return o ^ v; });
}
template <class T> T atomicExch(T *p, std::common_type_t<T> v) {
    return hc::rmw(p, [v](T) { return v; });
}
template <class T> T atomicCAS(T *p, std::common_type_t<T> c, std::common_type_t<T> v) {
    return hc::rmw(p, [c, v](T o) { return o == c ? v : o; });
}
inline unsigned atomicInc(unsigned *p, unsigned m) {
    return hc::rmw(p, [m](unsigned o) { return o >= m ? 0 : o + 1; });
}
inline unsigned atomicDec(unsigned *p, unsigned m) {
    return hc::rmw(p, [m](unsigned o) { return o == 0 || o > m ? m : o - 1; });
}

// ---- loads with cache hints, bit and math intrinsics ----
#define HC_LD(n)                                                                                                     \
    template <class T> T n(const T *p) { return *p; }
HC_LD(__ldg)
HC_LD(__ldca) HC_LD(__ldcg) HC_LD(__ldcs) HC_LD(__ldcv) HC_LD(__ldlu)
#define HC_ST(n)                                                                                                     \
    template <class T> void n(T *p, std::common_type_t<T> v) { *p = v; }
    HC_ST(__stcg) HC_ST(__stcs) HC_ST(__stwb) HC_ST(__stwt) template <class D, class S>
    D hc_bits(S s) {
    static_assert(sizeof(D) == sizeof(S), "");
    D d;
    __builtin_memcpy(&d, &s, sizeof d);
    return d;
}
inline int __float_as_int(float f) { return hc_bits<int>(f); }
inline unsigned __float_as_uint(float f) { return hc_bits<unsigned>(f); }
inline long long __double_as_longlong(double d) { return hc_bits<long long>(d); }
inline double __longlong_as_double(long long i) { return hc_bits<double>(i); }
inline float __int_as_float(int i) { return hc_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return hc_bits<float>(i); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
#define HC_MM(T)                                                                                                     \
    inline T min(T a, T b) { return b < a ? b : a; }                                                                 \
    inline T max(T a, T b) { return a < b ? b : a; }
HC_MM(int)
HC_MM(unsigned) HC_MM(long) HC_MM(unsigned long) HC_MM(long long)
    HC_MM(unsigned long long) inline float min(float a, float b) {
    return fminf(a, b);
}
inline float max(float a, float b) { return fmaxf(a, b); }
inline size_t __cvta_generic_to_shared(const void *p) { return (size_t)p; }

#endif
