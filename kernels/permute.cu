/* permute.cu - stable grouping of (token, choice) pairs by expert on the device, the twin of permute.c.
 *
 * A counting sort in three kernels: each block counts its stretch of pairs by expert, u32 [blocks, E]; one block turns the counts into
 * first rows (offsets over experts, then over blocks); each block places its pairs. Inside a block every warp owns a
 * stretch of its own and goes through it in order, 32 pairs at a time, equal experts ranked by lane: pairs of an expert keep
 * their order, without atomics. The order of the grouping is what makes all later sums repeatable. */
#include "cuda.cuh"

constexpr int WARPS = 8, STRETCH = 256, BLOCK = WARPS * STRETCH; /* pairs of a warp and of a block */

/* table [WARPS][E] of counts by warp, each warp its own stretch */
__device__ static void count_stretch(const int32_t *ids, int64_t pairs, int64_t experts, int64_t first, unsigned *mine, int lane) {
    for (int64_t i = 0; i < STRETCH; i += WARP) {
        const int64_t p = first + i + lane;
        const int id = p < pairs ? ids[p] : -1;
        const unsigned same = __match_any_sync(ALL_LANES, id);
        if (id >= 0 && __ffs((int)same) - 1 == lane) mine[id] += (unsigned)__popc(same);
        __syncwarp();
    }
}

__global__ static void permute_count(const int32_t *ids, int64_t pairs, int64_t experts, unsigned *count) {
    DYN_SHARED(unsigned, table);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int64_t i : block_stride(WARPS * experts)) table[i] = 0;
    __syncthreads();
    count_stretch(ids, pairs, experts, (int64_t)blockIdx.x * BLOCK + warp * STRETCH, table + warp * experts, lane);
    __syncthreads();
    for (int64_t e : block_stride(experts)) {
        unsigned sum = 0;
        for (int w = 0; w < WARPS; w++) sum += table[w * experts + e];
        count[blockIdx.x * experts + e] = sum;
    }
}

/* offsets of experts; counts of blocks become the first rows of their pairs */
__global__ static void permute_scan(unsigned *count, int64_t blocks, int64_t experts, int64_t *offset) {
    SHARED_ARRAY(int64_t, part, 2 * 1024);
    const int n = blockDim.x, i = threadIdx.x;
    int64_t done = 0;
    for (int64_t first = 0; first < experts; first += n) {
        const int64_t e = first + i;
        int64_t sum = 0, *from = part, *to = part + 1024;
        if (e < experts)
            for (int64_t b = 0; b < blocks; b++) sum += count[b * experts + e];
        from[i] = sum;
        __syncthreads();
        for (int step = 1; step < n; step *= 2) {
            to[i] = from[i] + (i >= step ? from[i - step] : 0);
            __syncthreads();
            int64_t *swap = from;
            from = to;
            to = swap;
        }
        int64_t at = done + from[i] - sum;
        if (e < experts) {
            offset[e] = at;
            for (int64_t b = 0; b < blocks; b++) {
                const unsigned c = count[b * experts + e];
                count[b * experts + e] = (unsigned)at;
                at += c;
            }
        }
        done += from[n - 1];
        __syncthreads();
    }
    if (i == 0) offset[experts] = done;
}

__global__ static void permute_place(const int32_t *ids, int64_t pairs, int64_t experts, const unsigned *start, int32_t *row_of,
                                     int32_t *pair_of) {
    DYN_SHARED(unsigned, table);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int64_t first = (int64_t)blockIdx.x * BLOCK + warp * STRETCH;
    for (int64_t i : block_stride(WARPS * experts)) table[i] = 0;
    __syncthreads();
    count_stretch(ids, pairs, experts, first, table + warp * experts, lane);
    __syncthreads();
    for (int64_t e : block_stride(experts)) {
        unsigned at = start[blockIdx.x * experts + e];
        for (int w = 0; w < WARPS; w++) {
            const unsigned c = table[w * experts + e];
            table[w * experts + e] = at;
            at += c;
        }
    }
    __syncthreads();
    unsigned *mine = table + warp * experts;
    for (int64_t i = 0; i < STRETCH; i += WARP) {
        const int64_t p = first + i + lane;
        const int id = p < pairs ? ids[p] : -1;
        const unsigned same = __match_any_sync(ALL_LANES, id), before = same & ((1u << lane) - 1);
        if (id >= 0) {
            const unsigned row = mine[id] + (unsigned)__popc(before);
            row_of[p] = (int32_t)row;
            pair_of[row] = (int32_t)p;
        } else if (p < pairs) {
            row_of[p] = -1;
        }
        __syncwarp();
        if (id >= 0 && !before) mine[id] += (unsigned)__popc(same);
        __syncwarp();
    }
}

extern "C" exc_status exc_cuda_permute(exc_queue *q, const struct exc_permute_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->experts < 1 || a->experts > 4096 || a->tokens * a->top_k > INT32_MAX) return EXC_ERR_USAGE;
    const int64_t pairs = a->tokens * a->top_k, blocks = ceil_div(pairs, BLOCK);
    const size_t table = (size_t)(WARPS * a->experts) * sizeof(unsigned);
    Carve work(q);
    unsigned *count = work.take<unsigned>(blocks * a->experts);
    if (!work.ready()) return work.status;
    ENQUEUE(q, permute_count, (unsigned)blocks, WARPS * WARP, table, a->ids, pairs, a->experts, count);
    ENQUEUE(q, permute_scan, 1, a->experts > 256 ? 1024 : 256, 0, count, blocks, a->experts, a->offset);
    ENQUEUE(q, permute_place, (unsigned)blocks, WARPS * WARP, table, a->ids, pairs, a->experts, count, a->row_of, a->pair_of);
    return EXC_OK;
}
