/* convert.cu - n elements from one of bf16, f16, f32, f64 to another, and the look for NaN and infinity on the way; the twin of
 * convert.c.
 *
 * Four elements a load where both arrays are aligned. Equal dtypes are copied, whatever the bits; from f64 to 16 bits the f32 in
 * the middle is rounded to odd, so that the second rounding is the only one. Counter and index are device memory: threads that
 * find nothing touch neither, and -1 is the largest unsigned number, so the lowest index is an atomic minimum. */
#include "cuda.cuh"

#define THREADS 256

__device__ static bool is_bad(double x) { return (((unsigned long long)__double_as_longlong(x)) >> 52 & 0x7ff) == 0x7ff; }
template <class T> __device__ static bool is_bad(T x) { return !is_finite(widen(x)); }

template <class From, class To> struct Convert {
    __device__ static To one(From x) { return narrow<To>(widen(x)); }
};
template <class Same> struct Convert<Same, Same> {
    __device__ static Same one(Same x) { return x; }
};
template <class From> struct Convert<From, double> {
    __device__ static double one(From x) { return (double)widen(x); }
};
template <class To> struct Convert<double, To> {
    __device__ static To one(double x) { return narrow<To>(sizeof(To) == 4 ? (float)x : round_to_odd(x)); }
};
template <> struct Convert<double, double> {
    __device__ static double one(double x) { return x; }
};

template <int V, class From, class To>
__global__ void convert_all(const From *src, To *dst, int64_t n, unsigned long long *nonfinite, unsigned long long *index) {
    struct alignas(V * sizeof(From) > 16 ? 16 : V * sizeof(From)) In { From v[V]; };
    struct alignas(V * sizeof(To) > 16 ? 16 : V * sizeof(To)) Out { To v[V]; };
    for (int64_t i : grid_stride(n / V)) {
        In in = reinterpret_cast<const In *>(src)[i];
        Out out;
        int bad = 0, first = V;
        for (int k = V - 1; k >= 0; k--) {
            if (is_bad(in.v[k])) bad++, first = k;
            out.v[k] = Convert<From, To>::one(in.v[k]);
        }
        if (bad && nonfinite) atomicAdd(nonfinite, (unsigned long long)bad);
        if (bad && index) atomicMin(index, (unsigned long long)(i * V + first));
        if (dst) reinterpret_cast<Out *>(dst)[i] = out;
    }
}

template <class From, class To> static exc_status enqueue(exc_queue *q, const struct exc_convert_args *a) {
    const From *src = (const From *)a->src;
    To *dst = (To *)a->dst;
    auto *count = (unsigned long long *)a->nonfinite, *index = (unsigned long long *)a->index;
    if (a->n % 4 == 0 && aligned(src, 16) && aligned(dst, 16))
        ENQUEUE(q, (convert_all<4, From, To>), grid_for(a->n, THREADS, 4), THREADS, 0, src, dst, a->n, count, index);
    else
        ENQUEUE(q, (convert_all<1, From, To>), grid_for(a->n, THREADS), THREADS, 0, src, dst, a->n, count, index);
    return EXC_OK;
}

template <class From> static exc_status enqueue_from(exc_queue *q, const struct exc_convert_args *a) {
    switch (a->dst ? a->dst_dtype : a->src_dtype) {
    case EXC_F32: return enqueue<From, float>(q, a);
    case EXC_BF16: return enqueue<From, bf16>(q, a);
    case EXC_F16: return enqueue<From, f16>(q, a);
    case EXC_F64: return enqueue<From, double>(q, a);
    default: return EXC_ERR_USAGE;
    }
}

static bool known(int dtype) { return dtype == EXC_F32 || dtype == EXC_BF16 || dtype == EXC_F16 || dtype == EXC_F64; }

extern "C" exc_status exc_cuda_convert(exc_queue *q, const struct exc_convert_args *a) {
    if (a->n < 0 || !known(a->src_dtype) || (a->dst && !known(a->dst_dtype))) return EXC_ERR_USAGE;
    exc_status st = EXC_OK;
    if (a->nonfinite) st = exc_enqueue_fill(q, a->nonfinite, 0, sizeof *a->nonfinite);
    if (st == EXC_OK && a->index) st = exc_enqueue_fill(q, a->index, 0xff, sizeof *a->index);
    if (st != EXC_OK) return st;
    switch (a->src_dtype) {
    case EXC_F32: return enqueue_from<float>(q, a);
    case EXC_BF16: return enqueue_from<bf16>(q, a);
    case EXC_F16: return enqueue_from<f16>(q, a);
    case EXC_F64: return enqueue_from<double>(q, a);
    default: return EXC_ERR_USAGE;
    }
}
