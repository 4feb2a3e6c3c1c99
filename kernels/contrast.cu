/* contrast.cu - log-ratios of routing and their bootstrap on the device, the twin of contrast.c: the same
 * draws, the same order of sums.
 *
 * A block takes a resample: it draws prompts (256 at a time, into shared memory) and adds their counts as
 * integers, exactly; so do the counts themselves, as the resample that takes every prompt once. The
 * deviations of all resamples go to scratch, [resamples, experts], and are added as the CPU adds them: 16
 * stretches, each in order, then the 16. log and erfc are the device's, a few ulp from the CPU's; all else
 * has its bits. */
#include "cuda.cuh"

namespace {

constexpr int TASKS = 16, THREADS = 256, DRAW_SETS = 2;

__device__ inline uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* which prompt draw i of a resample takes; resample -1 takes each once */
__device__ inline int64_t drawn(uint64_t key, int64_t prompts, int64_t i, int64_t resample) {
    if (resample < 0) return i;
    const uint64_t high = mix(key + (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u) >> 32;
    return (int64_t)(high * (uint64_t)prompts >> 32);
}

/* counts of a resample's prompts by expert: sum [E], shared memory; all threads call */
__device__ inline void add_up(const exc_contrast_args &a, int which, int64_t resample,
                              unsigned long long *sum, int64_t *pick) {
    const uint32_t *counts = which ? a.baseline : a.target;
    const int64_t prompts = which ? a.baseline_prompts : a.target_prompts;
    uint64_t key = mix(mix(a.seed + 0x9e3779b97f4a7c15u) ^ mix(a.stream * DRAW_SETS + (uint64_t)which + 1));
    key = mix(key ^ (uint64_t)resample);
    const int64_t across =
        a.experts < THREADS ? ceil_div(a.experts, WARP) * WARP : THREADS; /* experts side by side */
    const int groups = (int)(THREADS / across), group = (int)(threadIdx.x / across);
    for (int64_t e = threadIdx.x; e < a.experts; e += THREADS) sum[e] = 0;
    for (int64_t first = 0; first < prompts; first += THREADS) {
        const int64_t count = prompts - first < THREADS ? prompts - first : THREADS;
        __syncthreads();
        if (threadIdx.x < count)
            pick[threadIdx.x] = drawn(key, prompts, first + threadIdx.x, resample) * a.stride;
        __syncthreads();
        for (int64_t e = threadIdx.x % across; group < groups && e < a.experts; e += across) {
            unsigned long long mine = 0;
            for (int64_t i = group; i < count; i += groups) mine += counts[pick[i] + e];
            atomicAdd(sum + e, mine);
        }
    }
    __syncthreads();
}

/* sum over experts; every thread gets it */
__device__ inline double all_of(const exc_contrast_args &a, const unsigned long long *sum,
                                unsigned long long *room) {
    unsigned long long mine = 0;
    for (int64_t e = threadIdx.x; e < a.experts; e += THREADS) mine += sum[e];
    return (double)block_sum(mine, room);
}

__device__ inline double log_share(double n, double all, double alpha, int64_t experts) {
    const double top = n + alpha, under = all + alpha * (double)experts;
    return under > 0 ? log(top / under) : 0;
}

/* the estimate itself: one block */
__global__ void __launch_bounds__(THREADS) estimate(exc_contrast_args a) {
    DYN_SHARED(unsigned long long, sum); /* [2, E] */
    SHARED_ARRAY(int64_t, pick, THREADS);
    SHARED_ARRAY(unsigned long long, room, WARP);
    double all[2];
    for (int which = 0; which < 2; which++) {
        add_up(a, which, -1, sum + which * a.experts, pick);
        all[which] = all_of(a, sum + which * a.experts, room);
    }
    for (int64_t e : block_stride(a.experts)) {
        const double t = (double)sum[e], b = (double)sum[a.experts + e];
        a.log_ratio[e] = log_share(t, all[0], a.alpha, a.experts) - log_share(b, all[1], a.alpha, a.experts);
        const double share_t = all[0] > 0 ? t / all[0] : 0, share_b = all[1] > 0 ? b / all[1] : 0;
        a.risk[e] = (share_t - share_b) * (double)a.top_k;
    }
}

/* deviation of resample blockIdx.x from the estimate, by expert */
__global__ void __launch_bounds__(THREADS) resample(exc_contrast_args a, double *deviation) {
    DYN_SHARED(unsigned long long, sum);
    SHARED_ARRAY(int64_t, pick, THREADS);
    SHARED_ARRAY(unsigned long long, room, WARP);
    double all[2];
    for (int which = 0; which < 2; which++) {
        add_up(a, which, blockIdx.x, sum + which * a.experts, pick);
        all[which] = all_of(a, sum + which * a.experts, room);
    }
    for (int64_t e : block_stride(a.experts))
        deviation[blockIdx.x * a.experts + e] =
            log_share((double)sum[e], all[0], a.alpha, a.experts) -
            log_share((double)sum[a.experts + e], all[1], a.alpha, a.experts) - a.log_ratio[e];
}

/* 16 experts a block, 16 stretches of resamples each. Without two resamples, or two prompts to tell apart,
 * nothing is known: z 0, p 1. */
__global__ void __launch_bounds__(TASKS * 16) conclude(exc_contrast_args a, const double *deviation) {
    SHARED_ARRAY(double, part, TASKS * 16 * 2);
    const int task = threadIdx.x / 16, at = threadIdx.x % 16;
    const int64_t e = (int64_t)blockIdx.x * 16 + at;
    double s = 0, s2 = 0, n = (double)a.resamples;
    for (int64_t r = a.resamples * task / TASKS; e < a.experts && r < a.resamples * (task + 1) / TASKS; r++) {
        const double d = deviation[r * a.experts + e];
        s += d;
        s2 += d * d;
    }
    part[threadIdx.x * 2] = s, part[threadIdx.x * 2 + 1] = s2;
    __syncthreads();
    if (task || e >= a.experts) return;
    s = s2 = 0;
    for (int t = 0; t < TASKS; t++) s += part[(t * 16 + at) * 2], s2 += part[(t * 16 + at) * 2 + 1];
    const double variance = a.resamples > 1 ? (s2 - s * s / n) / (n - 1) : 0;
    a.se[e] = variance > 0 ? sqrt(variance) : 0;
    a.z[e] = a.se[e] > 0 ? a.log_ratio[e] / a.se[e] : 0;
    a.p[e] = erfc(fabs(a.z[e]) * 0.70710678118654752440);
}

} // namespace

extern "C" exc_status exc_cuda_contrast(exc_queue *q, const struct exc_contrast_args *a) {
    const int64_t E = a->experts,
                  most = a->target_prompts > a->baseline_prompts ? a->target_prompts : a->baseline_prompts;
    if (E < 0 || a->target_prompts < 0 || a->baseline_prompts < 0 || a->resamples < 0 || !(a->alpha >= 0))
        return EXC_ERR_USAGE;
    if (a->stride < E || most >= (int64_t)1 << 31 || a->resamples >= (int64_t)1 << 31) return EXC_ERR_USAGE;
    if (!E) return EXC_OK;
    const size_t shared = (size_t)(2 * E) * sizeof(uint64_t);
    if (shared > 96 * 1024) return EXC_ERR_USAGE;
    Carve work(q);
    double *deviation = work.take<double>(a->resamples * E);
    if (!work.ready()) return work.status;
    ENQUEUE(q, estimate, 1, THREADS, shared, *a);
    ENQUEUE(q, resample, (unsigned)a->resamples, THREADS, shared, *a, deviation);
    ENQUEUE(q, conclude, (unsigned)ceil_div(E, 16), TASKS * 16, 0, *a, (const double *)deviation);
    return EXC_OK;
}
