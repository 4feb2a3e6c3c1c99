/* edit.cuh - what the kernels of an edit share (project.cu, cluster.cuh): weights in pieces of 16 bytes, the
 * canonical sums, tallies.
 *
 * A piece is 8 columns of bf16 or f16, 4 of f32; its arithmetic is f32. The sums follow strip.h to the bit:
 * within a chunk of 64 rows one thread goes down with fmaf, chunks are added in ascending order as pairs
 * (two-sum). Which thread, block or cluster took a chunk does not matter, so every path gives the bits of the
 * CPU. A NaN stays a NaN, its payload is not kept. */
#ifndef EXC_EDIT_CUH
#define EXC_EDIT_CUH

#include <climits>
#include <type_traits>

#include "tensor.cuh"

/* hands a failure on */
#define EXC_PASS(call)                                                                                       \
    do {                                                                                                     \
        exc_status passed_ = (call);                                                                         \
        if (passed_ != EXC_OK) return passed_;                                                               \
    } while (0)

namespace edit {

constexpr int THREADS = 256;
constexpr int CHUNK = 64; /* rows of one partial sum */
constexpr int RANKS = 4;  /* directions whose sums share registers */
constexpr int MOST_RANK = 64;
constexpr int64_t MOST = INT_MAX - CHUNK; /* rows, columns */

/* sums of a strip or a row block of one matrix */
struct Tally {
    double before, after;
    int64_t changed, nonfinite;
};

/* what a call asks for; the same for all its kernels */
struct Job {
    const void *const *src; /* [count], or NULL: matrix i at src_base + i * src_stride bytes */
    void *const *dst;       /* likewise, as src */
    const char *src_base;
    char *dst_base;
    int64_t src_stride, dst_stride;
    int64_t first; /* matrix of task 0 */
    int64_t count, rows, cols;
    const float *basis; /* [rank, rows or cols] */
    int rank, norm;
    const float *strength;                 /* [matrices] */
    float *c;                              /* [matrices of the round, rank, cols or rows] or NULL */
    Tally *sums;                           /* [matrices of the round, strips], zeros, or NULL */
    Tally *parts;                          /* of clusters: [matrices of the round, tallies], likewise */
    int64_t tallies;
    int before, after, changed, nonfinite; /* which of them are wanted */
    int looked_at;                         /* matrices of strength 0 too: sums or c of them are wanted */
    int64_t strips;                        /* of a matrix */
};

/* whether 16-byte loads and stores serve the matrix: one kernel does those, another the rest */
__device__ inline bool wide(const void *src, const void *dst, int64_t row_bytes) {
    return ((reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst) | (uintptr_t)row_bytes) &
            15) == 0;
}

__device__ inline const char *src_of(const Job &j, int64_t m) {
    return j.src ? static_cast<const char *>(j.src[m]) : j.src_base + m * j.src_stride;
}
__device__ inline char *dst_of(const Job &j, int64_t m) {
    return j.src ? static_cast<char *>(j.dst[m]) : j.dst_base + m * j.dst_stride;
}

/* the next `bytes` bytes of a block's shared memory */
template <class P> __host__ __device__ inline void lay(P *&p, unsigned char *base, size_t &at, size_t bytes) {
#ifdef __CUDA_ARCH__
    p = reinterpret_cast<P *>(base + at); /* so the compiler sees that it is shared memory */
#else
    p = reinterpret_cast<P *>(reinterpret_cast<uintptr_t>(base) + at); /* base is NULL when the host measures */
#endif
    at += (bytes + 15) / 16 * 16;
}

/* ---- weights, N<T> to a piece */
template <class T> constexpr int N = 16 / (int)sizeof(T);

template <class T> __device__ inline void unpack(const uint4 &v, float (&x)[N<T>]) {
    const unsigned u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < N<T>; i++) {
        if constexpr (sizeof(T) == 4)
            x[i] = f32_of(u[i]);
        else if constexpr (std::is_same<T, bf16>::value)
            x[i] = f32_of(i % 2 ? u[i / 2] & 0xffff0000u : u[i / 2] << 16);
        else
            x[i] = widen_f16((uint16_t)(u[i / 2] >> 16 * (i % 2)));
    }
}

template <class T> __device__ inline unsigned narrow_two(float low, float high) {
    if constexpr (std::is_same<T, bf16>::value)
        return pack_bf16(low, high);
    else
        return pack_f16(low, high);
}

/* The conversion of two numbers at once is the fastest, but takes NaN for 0x7fff: pieces with NaN go one by
 * one. */
template <class T> __device__ inline uint4 pack(const float (&x)[N<T>]) {
    if constexpr (sizeof(T) == 4)
        return make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
    else {
        unsigned u[4];
        bool odd = false;
#pragma unroll
        for (int i = 0; i < 4; i++) u[i] = narrow_two<T>(x[2 * i], x[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < 8; i++) odd |= x[i] != x[i];
        if (odd)
#pragma unroll
            for (int i = 0; i < 4; i++)
                u[i] = narrow<T>(x[2 * i]).bits | (unsigned)narrow<T>(x[2 * i + 1]).bits << 16;
        return make_uint4(u[0], u[1], u[2], u[3]);
    }
}

/* n of a piece's weights, one by one: matrices whose rows do not begin at multiples of 16 bytes, and ragged
 * ends */
template <class T> __device__ inline uint4 gather(const char *p, int n) {
    unsigned u[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < N<T>; i++) {
        if (i >= n) continue;
        if constexpr (sizeof(T) == 4)
            u[i] = reinterpret_cast<const unsigned *>(p)[i];
        else
            u[i / 2] |= (unsigned)reinterpret_cast<const unsigned short *>(p)[i] << 16 * (i % 2);
    }
    return make_uint4(u[0], u[1], u[2], u[3]);
}
template <class T> __device__ inline void scatter(char *p, const uint4 &v, int n) {
    const unsigned u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < N<T>; i++) {
        if (i >= n) continue;
        if constexpr (sizeof(T) == 4)
            reinterpret_cast<unsigned *>(p)[i] = u[i];
        else
            reinterpret_cast<unsigned short *>(p)[i] = (unsigned short)(u[i / 2] >> 16 * (i % 2));
    }
}

template <class T> __device__ constexpr unsigned exponent_of() {
    return sizeof(T) == 4 ? 0x7f800000u : std::is_same<T, bf16>::value ? 0x7f80u : 0x7c00u;
}

/* weights of two pieces whose bits differ; weights of one that are NaN or infinite; the first n count */
template <class T> __device__ inline int differing(const uint4 &a, const uint4 &b, int n) {
    const unsigned u[4] = {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w};
    int count = 0;
#pragma unroll
    for (int i = 0; i < N<T>; i++) {
        unsigned bits = sizeof(T) == 4 ? u[i % 4] : u[i / 2] >> 16 * (i % 2) & 0xffffu;
        count += i < n && bits != 0;
    }
    return count;
}
template <class T> __device__ inline int special(const uint4 &v, int n) {
    const unsigned u[4] = {v.x, v.y, v.z, v.w};
    int count = 0;
#pragma unroll
    for (int i = 0; i < N<T>; i++) {
        unsigned bits = sizeof(T) == 4 ? u[i % 4] : u[i / 2] >> 16 * (i % 2);
        count += i < n && (bits & exponent_of<T>()) == exponent_of<T>();
    }
    return count;
}

/* adds x to the pair hi + lo and keeps what rounding drops */
__device__ inline void add_to(float &hi, float &lo, float x) {
    float rest;
    two_sum(hi, x, &hi, &rest);
    lo = lo + rest;
}

/* what gives a vector back its length; one that lay within R but for rounding has none to give back */
__device__ inline float gain_of(double before, double after) {
    return after > 1e-10 * before ? (float)sqrt(before / after) : 1.0f;
}

} // namespace edit

#endif
