/* crowd.cuh - which rows of which expert a block multiplies, found on the device from the grouping's offsets,
 * so that no launch waits for counts: the grid has as many tiles as there can be, and those that are not
 * there leave at once. */
#ifndef EXC_CROWD_CUH
#define EXC_CROWD_CUH

#include "product.cuh"

/* one tile of rows of one expert; expert -1: none */
struct Group {
    int expert, rows;
    int64_t first;
};
/* how many tiles of `bm` rows can come of `pairs` rows over `experts` */
static inline int64_t most_groups(int64_t pairs, int64_t experts, int bm) {
    return pairs / bm + (experts < pairs ? experts : pairs);
}

/* groups [most], and begin [experts+1]: the first tile of each expert. One block. */
__global__ static void find_groups(const int64_t *offset, int64_t experts, int bm, int64_t most, Group *group,
                                   int64_t *begin) {
    SHARED_ARRAY(int64_t, part, 2 * 1024);
    int64_t done = 0;
    const int n = blockDim.x, i = threadIdx.x;
    for (int64_t first = 0; first < experts; first += n) {
        const int64_t e = first + i, rows = e < experts ? offset[e + 1] - offset[e] : 0,
                      tiles = ceil_div(rows, bm);
        int64_t *from = part, *to = part + 1024;
        from[i] = tiles;
        __syncthreads();
        for (int step = 1; step < n; step *= 2) {
            to[i] = from[i] + (i >= step ? from[i - step] : 0);
            __syncthreads();
            int64_t *swap = from;
            from = to;
            to = swap;
        }
        int64_t at = done + from[i] - tiles;
        if (e < experts) begin[e] = at;
        for (int64_t r = 0; r < rows; r += bm)
            group[at++] = {(int)e, (int)(rows - r < bm ? rows - r : bm), offset[e] + r};
        done += from[n - 1];
        __syncthreads();
    }
    if (i == 0) begin[experts] = done;
    for (int64_t t = done + i; t < most; t += n) group[t].expert = -1;
}
static inline int threads_for_groups(int64_t experts) {
    return experts > 512 ? 1024 : experts > 128 ? 512 : 128;
}

#endif
