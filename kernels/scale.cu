/* scale.cu - count matrices of n elements times one f64 factor each, the twin of scale.c.
 *
 * Pointers and factors are read on the device; a block takes STRETCH elements of one matrix, 16 bytes a load where the matrix is
 * aligned. The product of a stored number and the factor is rounded to odd on its way to f32, so that the rounding to 16 bits
 * is the only one. Counts are whole numbers, so atomics may add them in any order. */
#include "cuda.cuh"

#define THREADS 256
#define STRETCH 4096

template <class T> __device__ static T product(T x, double factor) {
    float f = widen(x);
    if (f != f) return narrow<T>(f32_of(bits_of(f) | 0x400000u)); /* a NaN keeps its bits, as on the CPU */
    return narrow<T>(sizeof(T) == 4 ? (float)((double)f * factor) : round_to_odd((double)f * factor));
}

struct Tally {
    unsigned long long changed, nonfinite, overflow;
};

/* elements [at, end) of a matrix, V a load */
template <int V, class T> __device__ static Tally scale_stretch(const T *src, T *dst, int64_t at, int64_t end, double factor) {
    struct alignas(V * sizeof(T)) Some { T v[V]; };
    Tally t = {};
    for (int64_t i = at / V + threadIdx.x; i < end / V; i += THREADS) {
        Some in = reinterpret_cast<const Some *>(src)[i], out;
        for (int k = 0; k < V; k++) {
            float x = widen(in.v[k]);
            out.v[k] = factor == 1 ? in.v[k] : factor == 0 ? narrow<T>(0.0f) : product(in.v[k], factor);
            float y = widen(out.v[k]);
            t.changed += bits_of(x) != bits_of(y);
            t.nonfinite += factor != 1 && !is_finite(x);
            t.overflow += is_finite(x) && !is_finite(y);
        }
        reinterpret_cast<Some *>(dst)[i] = out;
    }
    return t;
}

__device__ static void add(int64_t *to, int64_t matrix, unsigned long long n) {
    n = warp_sum(n);
    if (to && n && threadIdx.x % WARP == 0) atomicAdd(reinterpret_cast<unsigned long long *>(to + matrix), n);
}

template <class T>
__global__ void scale_matrices(const void *const *src, void *const *dst, const double *factor, int64_t n, int64_t stretches,
                               int64_t *changed, int64_t *nonfinite, int64_t *overflow) {
    const int V = 16 / sizeof(T);
    int64_t matrix = blockIdx.x / stretches, at = blockIdx.x % stretches * STRETCH, end = at + STRETCH < n ? at + STRETCH : n;
    const T *from = static_cast<const T *>(src[matrix]);
    T *to = static_cast<T *>(dst[matrix]);
    double f = factor[matrix];
    if (f == 1 && from == to) return;
    bool whole = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0 && end % V == 0;
    Tally t = whole ? scale_stretch<V>(from, to, at, end, f) : scale_stretch<1>(from, to, at, end, f);
    add(changed, matrix, t.changed);
    add(nonfinite, matrix, t.nonfinite);
    add(overflow, matrix, t.overflow);
}

exc_status exc_requantise(exc_queue *q, const struct exc_project_args *a, const double *factor); /* requant.cu */

/* the factor goes into the scales: a project without directions */
static exc_status rescale(exc_queue *q, const struct exc_scale_args *a) {
    if (a->rows < 0 || a->cols < 1 || a->n != a->rows * a->cols) return EXC_ERR_USAGE;
    struct exc_project_args p = {};
    p.src = a->src, p.dst = a->dst, p.dtype = a->dtype, p.count = a->count, p.rows = a->rows, p.cols = a->cols, p.side = EXC_SIDE_OUT;
    p.changed = a->changed, p.nonfinite = a->nonfinite;
    p.scale = a->scale, p.scale_to = a->scale_to, p.scale_dtype = a->scale_dtype, p.scale_power = a->scale_power;
    if (a->overflow) { /* what is too large is the largest, or rescaled */
        exc_status st = exc_enqueue_fill(q, a->overflow, 0, (size_t)a->count * sizeof *a->overflow);
        if (st != EXC_OK) return st;
    }
    return exc_requantise(q, &p, a->factor);
}

extern "C" exc_status exc_cuda_scale(exc_queue *q, const struct exc_scale_args *a) {
    if (a->count >= 0 && (a->dtype == EXC_F8_E4M3 || a->dtype == EXC_F4)) return rescale(q, a);
    if (a->count < 0 || a->n < 0 || (a->dtype != EXC_BF16 && a->dtype != EXC_F16 && a->dtype != EXC_F32)) return EXC_ERR_USAGE;
    int64_t *const counts[] = {a->changed, a->nonfinite, a->overflow};
    for (int64_t *c : counts)
        if (c) {
            exc_status st = exc_enqueue_fill(q, c, 0, (size_t)a->count * sizeof *c);
            if (st != EXC_OK) return st;
        }
    int64_t stretches = ceil_div(a->n, STRETCH);
    if (stretches * a->count > INT32_MAX) return EXC_ERR_USAGE;
    BY_DTYPE(a->dtype, ENQUEUE(q, scale_matrices<T>, (unsigned)(stretches * a->count), THREADS, 0, a->src, a->dst, a->factor, a->n,
                               stretches, a->changed, a->nonfinite, a->overflow));
    return EXC_OK;
}
