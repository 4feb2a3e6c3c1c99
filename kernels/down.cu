/* down.cu - second half of the experts on the device, the twin of down.c: y [rows,H] = mid [rows,I] Wd^T + bias by expert, and the
 * squared norms of observed rows.
 *
 * Tiles as in glu.cu. The squares of a row's 64 columns are added up while the tile is in shared memory, f32 [rows, tiles of H], so
 * norms cost no reading of y; one block an expert then adds its rows up in f64, each warp its rows in ascending order.
 * Reproducible queues take them from the stored rows instead (fixed.cuh). */
#include "fixed.cuh"
#include "crowd.cuh"
#include "wide.cuh"

struct Down {
    struct exc_down_args a;
    const Group *group;
    float *square; /* [rows, pieces] or NULL */
    int64_t pieces;
    int64_t whole; /* rows of whole pieces */
};

template <class TILE> __global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS) down_tiles(const Down d) {
    DYN_SHARED(unsigned char, shared);
    SHARED_ARRAY(const unsigned char *, row, TILE::BM);
    using T = typename TILE::Act;
    const struct exc_down_args &a = d.a;
    const Group tile = d.group[blockIdx.y];
    if (tile.expert < 0) return;
    const int64_t column = (int64_t)blockIdx.x * TILE::BN;
    const Plane w = plane_of(a.down[tile.expert]);
    for (int i : block_stride(TILE::BM))
        row[i] = reinterpret_cast<const unsigned char *>(static_cast<const T *>(a.mid) + (tile.first + (i < tile.rows ? i : 0)) * a.inner);
    __syncthreads();
    const Rows rows = {row, tile.rows, d.whole != 0};
    const float *out = TILE::run(shared, rows, &w, column);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int r = warp; r < tile.rows; r += TILE::THREADS / WARP) {
        float sum = 0;
        for (int c = lane; c < TILE::BN; c += WARP) {
            if (column + c >= a.hidden) continue;
            const float y = out[r * TILE::OUT + c] + (a.bias ? a.bias[tile.expert * a.hidden + column + c] : 0.0f);
            a.y[(tile.first + r) * a.hidden + column + c] = y;
            sum += y * y;
        }
        if (!d.square) continue;
        sum = warp_sum(sum);
        if (lane == 0) d.square[(tile.first + r) * d.pieces + blockIdx.x] = sum;
    }
}

constexpr int SUM_WARPS = 8;

__global__ static void down_squares(const struct exc_down_args a, const float *square, int64_t pieces) {
    SHARED_ARRAY(double, part, SUM_WARPS);
    const int64_t e = blockIdx.x;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    double sum = 0;
    for (int64_t r = a.offset[e] + warp; r < a.offset[e + 1]; r += SUM_WARPS) {
        if (a.slot[a.pair_of ? a.pair_of[r] / a.top_k : r] < 0) continue;
        if (square) {
            double one = 0;
            for (int64_t p = lane; p < pieces; p += WARP) one += (double)square[r * pieces + p];
            sum += warp_sum(one);
        } else {
            sum += fixed_square(row_square(a.y + r * a.hidden, a.hidden));
        }
    }
    if (lane == 0) part[warp] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    double all = 0;
    for (int w = 0; w < SUM_WARPS; w++) all += part[w];
    if (a.offset[e] < a.offset[e + 1]) a.sqnorm_sum[e] += all;
}

static bool whole(const struct exc_down_args *a) { return aligned(a->mid, 16) && a->inner % 8 == 0; }

template <class TILE> static exc_status run(exc_queue *q, const struct exc_down_args *a) {
    const int64_t most = most_groups(a->tokens * a->top_k, a->experts, TILE::BM), pieces = ceil_div(a->hidden, TILE::BN);
    const bool in_tiles = a->sqnorm_sum && !q->reproducible;
    Carve work(q);
    Group *group = work.take<Group>(most);
    int64_t *begin = work.take<int64_t>(a->experts + 1);
    float *square = in_tiles ? work.take<float>(a->tokens * a->top_k * pieces) : nullptr;
    if (!work.ready()) return work.status;
    if (most > 65535) return EXC_ERR_USAGE;
    Down d = {*a, group, square, pieces, whole(a)};
    ENQUEUE(q, find_groups, 1, threads_for_groups(a->experts), 0, a->offset, a->experts, TILE::BM, most, group, begin);
    ENQUEUE(q, down_tiles<TILE>, dim3((unsigned)pieces, (unsigned)most), TILE::THREADS, TILE::SHARED, d);
    if (a->sqnorm_sum) ENQUEUE(q, down_squares, (unsigned)a->experts, SUM_WARPS * WARP, 0, *a, square, pieces);
    return EXC_OK;
}

extern "C" exc_status exc_cuda_down(exc_queue *q, const struct exc_down_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->experts < 1 || a->experts > 65535 || a->hidden < 1 || a->inner < 1) return EXC_ERR_USAGE;
    if (!a->down || (a->sqnorm_sum && !a->slot)) return EXC_ERR_USAGE;
    if (!a->tokens) return EXC_OK;
    const int64_t rows = a->tokens * a->top_k / a->experts;
    BY_WIDE(q, a->act, a->w_dtype, whole(a), 1, rows, return run<TILE>(q, a));
    BY_TILE(a->act, a->w_dtype, 1, rows, return run<TILE>(q, a));
}
