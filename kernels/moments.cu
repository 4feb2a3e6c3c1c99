/* moments.cu - per-expert sums from someone else's forward pass on the device, the twin of moments.c: the
 * same order, the same bits.
 *
 * Pairs (token, choice) are grouped by expert in token order (permute.cu). Blocks of 64 rows of an expert are
 * summed side by side, in f32, each as the CPU sums it; then one thread a column adds an expert's blocks to
 * f64 in order. On reproducible queues the rows are added in fixed point (fixed.cuh), whose sums know no
 * order. Gate sums: a warp an expert, weight after weight. */
#include "fixed.cuh"

extern "C" exc_status exc_cuda_permute(exc_queue *q, const struct exc_permute_args *a); /* permute.cu */

namespace {

constexpr int BLOCK = 64; /* rows; EXC_ROW_BLOCK */
constexpr int COLUMNS = 128;

__device__ inline float number(const void *mid, int64_t i, int act) {
    return act == EXC_F32 ? static_cast<const float *>(mid)[i] : widen(static_cast<const bf16 *>(mid)[i]);
}

/* first [E+1]: the first block of each expert. One block of threads. */
__global__ void __launch_bounds__(1024)
    number_blocks(const int64_t *offset, int64_t experts, int64_t *first) {
    SHARED_ARRAY(int64_t, part, 1024);
    const int n = blockDim.x, i = threadIdx.x;
    const int64_t each = ceil_div(experts, n), from = each * i,
                  to = from + each < experts ? from + each : experts; /* may be none */
    int64_t mine = 0, before = 0;
    for (int64_t e = from; e < to; e++) mine += ceil_div(offset[e + 1] - offset[e], BLOCK);
    part[i] = mine;
    __syncthreads();
    for (int k = 0; k < i; k++) before += part[k];
    for (int64_t e = from; e < to; e++) {
        first[e] = before;
        before += ceil_div(offset[e + 1] - offset[e], BLOCK);
    }
    if (i == n - 1) first[experts] = before;
}

/* part [blocks, I]: the sum of a block's rows; S float, or double in fixed point */
template <class S>
__global__ void __launch_bounds__(COLUMNS) add_rows(exc_moments_args a, const int64_t *offset,
                                                    const int64_t *first, const int32_t *pair_of, S *part) {
    const int64_t block = blockIdx.x, col = (int64_t)blockIdx.y * COLUMNS + threadIdx.x;
    if (block >= first[a.experts]) return;
    int64_t low = 0, high = a.experts; /* the expert whose block this is: the last that begins here or before,
                                          and has rows */
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (first[middle] <= block)
            low = middle;
        else
            high = middle;
    }
    const int64_t begin = offset[low] + (block - first[low]) * BLOCK,
                  end = begin + BLOCK < offset[low + 1] ? begin + BLOCK : offset[low + 1];
    if (col >= a.inner) return;
    S sum = 0;
#pragma unroll 8
    for (int64_t r = begin; r < end; r++) {
        const float x = number(a.mid, (int64_t)pair_of[r] * a.inner + col, a.act);
        sum += sizeof(S) == 8 ? fixed_term(x) : x;
    }
    part[block * a.inner + col] = sum;
}

template <class S>
__global__ void __launch_bounds__(COLUMNS)
    add_blocks(exc_moments_args a, const int64_t *first, const S *part) {
    const int64_t e = blockIdx.x, col = (int64_t)blockIdx.y * COLUMNS + threadIdx.x;
    if (col >= a.inner || first[e] == first[e + 1]) return;
    double sum = a.mid_sum[e * a.inner + col];
    for (int64_t b = first[e]; b < first[e + 1]; b++) sum += (double)part[b * a.inner + col];
    a.mid_sum[e * a.inner + col] = sum;
}

/* counts and gate sums, a warp an expert */
__global__ void __launch_bounds__(128)
    tally(exc_moments_args a, const int64_t *offset, const int32_t *pair_of, int fixed) {
    const int64_t e = (int64_t)blockIdx.x * (128 / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (e >= a.experts) return;
    if (a.count && lane == 0) a.count[e] += offset[e + 1] - offset[e];
    if (!a.gate_sum || !a.weights) return;
    double sum = lane == 0 ? a.gate_sum[e] : 0; /* the lane that writes is the lane that reads */
    for (int64_t at = offset[e]; at < offset[e + 1]; at += WARP) {
        const int n = offset[e + 1] - at < WARP ? (int)(offset[e + 1] - at) : WARP;
        float w = lane < n ? a.weights[pair_of[at + lane]] : 0.0f;
        if (fixed) w = fixed_term(w);
        for (int l = 0; l < n; l++) sum += (double)__shfl_sync(ALL_LANES, w, l);
    }
    if (lane == 0) a.gate_sum[e] = sum;
}

/* offset [E+1]: while observing is off no expert has a pair, and the kernels behind find nothing to do */
__global__ void heed(const int32_t *enabled, int64_t experts, int64_t *offset) {
    const int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (e <= experts && !*enabled) offset[e] = 0;
}

/* what lies in the scratch: the grouping, then the blocks, then what permute takes for itself */
struct Plan {
    int64_t *offset, *first;   /* [E+1] */
    int32_t *row_of, *pair_of; /* [pairs] */
    void *part;                /* [blocks, I] */
    int64_t blocks, strips;
};

/* permute works behind what this op has taken: a queue of its own that shares all but the scratch */
exc_status grouped(exc_queue *q, const struct exc_moments_args *a, const Plan &p, size_t taken) {
    exc_queue behind = *q;
    behind.work = static_cast<char *>(q->work) + taken;
    behind.work_bytes = q->work_bytes > taken ? q->work_bytes - taken : 0;
    behind.work_needed = 0;
    struct exc_permute_args group = {a->ids, a->tokens, a->top_k, a->experts, p.offset, p.row_of, p.pair_of};
    const exc_status st = exc_cuda_permute(&behind, &group);
    if (taken + behind.work_needed > q->work_needed) q->work_needed = taken + behind.work_needed;
    q->failed = behind.failed, q->failed_at = behind.failed_at;
    return st;
}

template <class S> exc_status add(exc_queue *q, const struct exc_moments_args *a, const Plan &p) {
    ENQUEUE(q, number_blocks, 1, 256, 0, (const int64_t *)p.offset, a->experts, p.first);
    ENQUEUE(q, add_rows<S>, dim3((unsigned)p.blocks, (unsigned)p.strips), COLUMNS, 0, *a,
            (const int64_t *)p.offset, (const int64_t *)p.first, (const int32_t *)p.pair_of, (S *)p.part);
    ENQUEUE(q, add_blocks<S>, dim3((unsigned)a->experts, (unsigned)p.strips), COLUMNS, 0, *a,
            (const int64_t *)p.first, (const S *)p.part);
    return EXC_OK;
}

} // namespace

extern "C" exc_status exc_cuda_moments(exc_queue *q, const struct exc_moments_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->experts < 1) return EXC_ERR_USAGE;
    const bool sums = a->mid && a->mid_sum;
    if (sums && (a->inner < 1 || (a->act != EXC_F32 && a->act != EXC_BF16))) return EXC_ERR_USAGE;
    const int64_t pairs = a->tokens * a->top_k;
    Carve work(q);
    Plan p = {};
    p.blocks = ceil_div(pairs, BLOCK) + a->experts, p.strips = sums ? ceil_div(a->inner, COLUMNS) : 0;
    if (p.strips > 65535) return EXC_ERR_USAGE;
    p.offset = work.take<int64_t>(a->experts + 1);
    p.first = work.take<int64_t>(a->experts + 1);
    p.row_of = work.take<int32_t>(pairs);
    p.pair_of = work.take<int32_t>(pairs);
    p.part = work.take<char>(sums ? p.blocks * a->inner * (q->reproducible ? 8 : 4) : 0);
    work.ready();
    if (work.status != EXC_OK) return work.status;
    const exc_status st = grouped(q, a, p, work.at);
    if (st != EXC_OK || !pairs) return st;
    if (a->enabled) ENQUEUE(q, heed, (unsigned)ceil_div(a->experts + 1, 256), 256, 0, a->enabled, a->experts, p.offset);
    ENQUEUE(q, tally, (unsigned)ceil_div(a->experts, 128 / WARP), 128, 0, *a, (const int64_t *)p.offset,
            (const int32_t *)p.pair_of, q->reproducible);
    if (!sums) return EXC_OK;
    return q->reproducible ? add<double>(q, a, p) : add<float>(q, a, p);
}
