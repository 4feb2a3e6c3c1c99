/* glu.cu - first half of the experts on the device, the twin of glu.c: both products of a tile, the activation, and the sums of
 * observed rows while the tile is in shared memory.
 *
 * A block takes up to 64 rows of one expert and 64 of its I columns (16 rows where experts get few: decode). Which expert a
 * block serves is found on the device from `offset` (crowd.cuh), so nothing waits for counts. Sums: a tile
 * adds its observed rows of a column in ascending order in f32 (reproducible: in fixed point) and leaves one f64 a column,
 * f64 [tiles, I]; a second kernel adds an expert's tiles in ascending order to mid_sum. No atomics: same bits every time. */
#include "fixed.cuh"
#include "crowd.cuh"
#include "wide.cuh"

struct Glu {
    struct exc_glu_args a;
    const Group *group;
    double *part; /* [tiles, I] or NULL */
    int whole, fixed; /* rows of whole pieces; sums in fixed point */
};

__device__ static float activate(float g, float u, const exc_activation &fn) {
    if (fn.kind == EXC_GLU_SILU) return g / (1.0f + expf(-g)) * u;
    g = g > fn.limit ? fn.limit : g; /* NaN stays */
    u = u > fn.limit ? fn.limit : u < -fn.limit ? -fn.limit : u;
    return g / (1.0f + expf(-fn.alpha * g)) * (u + 1.0f);
}

__device__ static int64_t token_of(const struct exc_glu_args &a, int64_t r) { return a.pair_of ? a.pair_of[r] / a.top_k : r; }

template <class TILE> __global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS) glu_tiles(const Glu g) {
    DYN_SHARED(unsigned char, shared);
    SHARED_ARRAY(const unsigned char *, row, TILE::BM);
    SHARED_ARRAY(int, seen, TILE::BM);
    using T = typename TILE::Act;
    const struct exc_glu_args &a = g.a;
    const Group tile = g.group[blockIdx.y];
    if (tile.expert < 0) return;
    const int64_t column = (int64_t)blockIdx.x * TILE::BN;
    const Plane w[2] = {plane_of(a.gate[tile.expert]), plane_of(a.up[tile.expert])};
    for (int i : block_stride(TILE::BM)) {
        const int64_t token = token_of(a, tile.first + (i < tile.rows ? i : 0));
        row[i] = reinterpret_cast<const unsigned char *>(static_cast<const T *>(a.x) + token * a.hidden);
        seen[i] = g.part && i < tile.rows && a.slot[token] >= 0;
    }
    __syncthreads();
    const Rows rows = {row, tile.rows, g.whole != 0};
    float *out = TILE::run(shared, rows, w, column), *up = out + TILE::BM * TILE::OUT;
    const int64_t bias = tile.expert * a.inner + column;
    for (int i : block_stride(tile.rows * TILE::BN)) {
        const int r = i / TILE::BN, c = i % TILE::BN, at = r * TILE::OUT + c;
        if (column + c >= a.inner) continue;
        const T y = narrow<T>(activate(out[at] + (a.gate_bias ? a.gate_bias[bias + c] : 0.0f),
                                       up[at] + (a.up_bias ? a.up_bias[bias + c] : 0.0f), a.activation));
        static_cast<T *>(a.mid)[(tile.first + r) * a.inner + column + c] = y;
        out[at] = widen(y);
    }
    if (!g.part) return;
    __syncthreads();
    for (int c : block_stride(TILE::BN)) {
        if (column + c >= a.inner) continue;
        float sum = 0;
        double exact = 0;
        for (int r = 0; r < tile.rows; r++) {
            if (!seen[r]) continue;
            if (g.fixed) exact += (double)fixed_term(out[r * TILE::OUT + c]);
            else sum += out[r * TILE::OUT + c];
        }
        g.part[(int64_t)blockIdx.y * a.inner + column + c] = g.fixed ? exact : (double)sum;
    }
}

/* an expert's tiles, ascending, onto its sums */
__global__ static void glu_sums(const double *part, const int64_t *begin, int64_t inner, double *mid_sum) {
    const int64_t e = blockIdx.y, c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= inner || begin[e] == begin[e + 1]) return;
    double sum = mid_sum[e * inner + c];
    for (int64_t t = begin[e]; t < begin[e + 1]; t++) sum += part[t * inner + c];
    mid_sum[e * inner + c] = sum;
}

static bool whole(const struct exc_glu_args *a) { return aligned(a->x, 16) && a->hidden % 8 == 0; }

template <class TILE> static exc_status run(exc_queue *q, const struct exc_glu_args *a) {
    const int64_t most = most_groups(a->tokens * a->top_k, a->experts, TILE::BM);
    Carve work(q);
    Group *group = work.take<Group>(most);
    int64_t *begin = work.take<int64_t>(a->experts + 1);
    double *part = a->mid_sum ? work.take<double>(most * a->inner) : nullptr;
    if (!work.ready()) return work.status;
    if (most > 65535) return EXC_ERR_USAGE;
    Glu g = {*a, group, part, whole(a), q->reproducible != 0};
    /* the hole behind the activation: what the host's stack had there does not travel */
    const size_t hole = offsetof(struct exc_glu_args, activation) + sizeof g.a.activation;
    memset(reinterpret_cast<char *>(&g.a) + hole, 0, offsetof(struct exc_glu_args, offset) - hole);
    ENQUEUE(q, find_groups, 1, threads_for_groups(a->experts), 0, a->offset, a->experts, TILE::BM, most, group, begin);
    const dim3 grid((unsigned)ceil_div(a->inner, TILE::BN), (unsigned)most);
    ENQUEUE(q, glu_tiles<TILE>, grid, TILE::THREADS, TILE::SHARED, g);
    if (part)
        ENQUEUE(q, glu_sums, dim3((unsigned)ceil_div(a->inner, 128), (unsigned)a->experts), 128, 0, part, begin, a->inner, a->mid_sum);
    return EXC_OK;
}

extern "C" exc_status exc_cuda_glu(exc_queue *q, const struct exc_glu_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->experts < 1 || a->experts > 65535 || a->hidden < 1 || a->inner < 1) return EXC_ERR_USAGE;
    if (!a->gate || !a->up || (a->mid_sum && !a->slot)) return EXC_ERR_USAGE;
    if (a->activation.kind != EXC_GLU_SILU && a->activation.kind != EXC_GLU_CLAMPED) return EXC_ERR_USAGE;
    if (!a->tokens) return EXC_OK;
    const int64_t rows = a->tokens * a->top_k / a->experts;
    BY_WIDE(q, a->act, a->w_dtype, whole(a), 2, rows, return run<TILE>(q, a));
    BY_TILE(a->act, a->w_dtype, 2, rows, return run<TILE>(q, a));
}
