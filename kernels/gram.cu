/* gram.cu - Gram matrices of samples in f64 on the device, the twin of gram.c: X X^T or X^T X, one a layer,
 * uncentred.
 *
 * Our own: a block owns a tile of 64 x 64 of the lower triangle and mirrors it. Samples are widened once, on
 * their way to shared memory, and met there 16 deep; a thread keeps 4 x 4 sums. Products of two f32 are exact
 * in f64, and every sum is one chain over ascending depth: X^T X has the bits of the CPU, X X^T, which the CPU
 * sums in lanes, its value to n * 2^-53.
 *
 * By cuBLASLt, from a side of 96 on: its f64 products run on tensor cores, at twice the speed of fused
 * multiply-adds or more, but want f64 operands. Samples are widened into scratch, many layers at once and a
 * piece of the depth after the other, each product added to the ones before. Narrower operands would not do:
 * the eigenvalues of these matrices are squares, so f32 sums would hide every singular value below 3e-4 of the
 * largest. Not on a reproducible queue: the algorithm depends on how many layers go at once. */
#include "gram.cuh"

namespace {

constexpr int TILE = 64, DEEP = 16, THREADS = 256, EACH = 4; /* a thread's sums: rows and columns 16 apart */

/* element (i, k) of the factor: row i of X, or column i of X^T's sum over samples */
template <int SIDE>
__device__ inline double element(const exc_gram_args &a, const float *x, int64_t i, int64_t k) {
    return (double)(SIDE == EXC_GRAM_SAMPLES ? x[i * a.row_stride + k] : x[k * a.row_stride + i]);
}

/* rows first.. of the factor, depth k.. -> [DEEP, TILE], zero beyond the ends; neighbours in memory are read
 * by neighbours */
template <int SIDE>
__device__ inline void load(const exc_gram_args &a, const float *x, int64_t first, int64_t k, int64_t size,
                            int64_t depth, double *to) {
    for (int at = threadIdx.x; at < TILE * DEEP; at += THREADS) {
        const int i = SIDE == EXC_GRAM_SAMPLES ? at / DEEP : at % TILE,
                  d = SIDE == EXC_GRAM_SAMPLES ? at % DEEP : at / TILE;
        to[d * (TILE + 1) + i] =
            first + i < size && k + d < depth ? element<SIDE>(a, x, first + i, k + d) : 0.0;
    }
}

template <int SIDE>
__global__ void __launch_bounds__(THREADS) gram(exc_gram_args a, int64_t size, int64_t depth) {
    SHARED_ARRAY(double, p, DEEP *(TILE + 1));
    SHARED_ARRAY(double, q, DEEP *(TILE + 1));
    int down = 0, left = blockIdx.x; /* tile of the triangle, row by row */
    while (left > down) left -= ++down;
    const float *x = a.x + blockIdx.y * a.layer_stride;
    double *g = a.g + blockIdx.y * size * size, sum[EACH][EACH] = {};
    const int64_t row = (int64_t)down * TILE, col = (int64_t)left * TILE;
    const int i = threadIdx.x / 16, j = threadIdx.x % 16;
    for (int64_t k = 0; k < depth; k += DEEP) {
        load<SIDE>(a, x, row, k, size, depth, p);
        load<SIDE>(a, x, col, k, size, depth, q);
        __syncthreads();
        for (int d = 0; d < DEEP; d++) {
            double u[EACH], v[EACH];
#pragma unroll
            for (int e = 0; e < EACH; e++)
                u[e] = p[d * (TILE + 1) + i + 16 * e], v[e] = q[d * (TILE + 1) + j + 16 * e];
#pragma unroll
            for (int e = 0; e < EACH; e++)
#pragma unroll
                for (int f = 0; f < EACH; f++) sum[e][f] = fma(u[e], v[f], sum[e][f]);
        }
        __syncthreads();
    }
    for (int e = 0; e < EACH; e++)
        for (int f = 0; f < EACH; f++) {
            const int64_t r = row + i + 16 * e, c = col + j + 16 * f;
            if (r >= size || c >= size || c > r) continue;
            g[r * size + c] = sum[e][f];
            g[c * size + r] = sum[e][f];
        }
}

/* what is multiplied: `piece` samples or channels from `from` on of layers first.., f64, zero beyond the end.
 * wide [layers, lines, pitch]: lines and columns as x has them */
__global__ void widen_piece(exc_gram_args a, int64_t first, int64_t layers, int64_t from, int64_t lines,
                            int64_t pitch, double *wide) {
    const int64_t line0 = a.side == EXC_GRAM_SAMPLES ? 0 : from, column0 = from - line0;
    for (int64_t i : grid_stride(layers * lines * pitch)) {
        const int64_t layer = i / (lines * pitch), line = i / pitch % lines + line0, column = i % pitch + column0;
        const bool in = line < a.samples && column < a.width;
        wide[i] = in ? (double)a.x[(first + layer) * a.layer_stride + line * a.row_stride + column] : 0.0;
    }
}

/* the upper triangle from the lower one: the library promises no symmetry of bits */
__global__ void mirror(double *g, int64_t layers, int64_t size) {
    for (int64_t i : grid_stride(layers * size * size)) {
        const int64_t row = i / size % size, column = i % size;
        if (column > row) g[i] = g[i + (column - row) * (size - 1)];
    }
}

constexpr int64_t LEAST = 96;              /* side */
constexpr int64_t WIDE = (int64_t)4 << 20; /* numbers widened at once: 32 MiB stay in the second-level cache */

int64_t side_of(const struct exc_gram_args *a) { return a->side == EXC_GRAM_SAMPLES ? a->samples : a->width; }
int64_t depth_of(const struct exc_gram_args *a) { return a->side == EXC_GRAM_SAMPLES ? a->width : a->samples; }
int64_t even(int64_t n) { return n + n % 2; } /* lines begin at multiples of 16 bytes */
int64_t lines_of(const struct exc_gram_args *a, int64_t piece) { return a->side == EXC_GRAM_SAMPLES ? a->samples : piece; }
int64_t pitch_of(const struct exc_gram_args *a, int64_t piece) { return a->side == EXC_GRAM_SAMPLES ? piece : even(a->width); }

/* row-major X [lines, pitch] is X^T to a library that counts by columns: X X^T turns the first, X^T X the second */
Product product_of(const struct exc_gram_args *a, int64_t piece, int64_t layers, bool add) {
    Product p = {};
    p.operand = nv::CUDA_R_64F;
    p.m = p.n = p.ldd = side_of(a), p.k = piece;
    p.turn_a = a->side == EXC_GRAM_SAMPLES, p.turn_b = !p.turn_a;
    p.lda = p.ldb = pitch_of(a, piece);
    p.batch = layers, p.step_a = p.step_b = lines_of(a, piece) * p.lda, p.step_d = p.m * p.m;
    p.add = add;
    return p;
}

exc_status by_library(exc_queue *q, const struct exc_gram_args *a, const GramRoom &room) {
    const int64_t size = side_of(a), lines = lines_of(a, room.piece), pitch = pitch_of(a, room.piece);
    for (int64_t done = 0; done < a->layers; done += room.layers) {
        /* one count of layers, one algorithm: the last round takes some once more */
        const int64_t first = done + room.layers <= a->layers ? done : a->layers - room.layers;
        double *g = a->g + first * size * size;
        for (int64_t from = 0; from < depth_of(a); from += room.piece) {
            ENQUEUE(q, widen_piece, grid_for(room.layers * lines * pitch, 256, 4), 256, 0, *a, first, room.layers, from, lines,
                    pitch, room.wide);
            exc_status st = exc_product(q, from ? room.more : room.first, room.wide, room.wide, g, g, nullptr, room.workspace);
            if (st != EXC_OK) return st;
        }
        ENQUEUE(q, mirror, grid_for(room.layers * size * size, 256, 4), 256, 0, g, room.layers, size);
    }
    return EXC_OK;
}

exc_status by_tiles(exc_queue *q, const struct exc_gram_args *a) {
    const int64_t size = side_of(a), depth = depth_of(a), tiles = ceil_div(size, TILE);
    const dim3 grid((unsigned)(tiles * (tiles + 1) / 2), (unsigned)a->layers);
    if (a->side == EXC_GRAM_SAMPLES)
        ENQUEUE(q, gram<EXC_GRAM_SAMPLES>, grid, THREADS, 0, *a, size, depth);
    else
        ENQUEUE(q, gram<EXC_GRAM_WIDTH>, grid, THREADS, 0, *a, size, depth);
    return EXC_OK;
}

} // namespace

exc_status exc_gram_take(Carve &work, const struct exc_gram_args *a, GramRoom *room) {
    const int64_t size = side_of(a), depth = depth_of(a);
    *room = GramRoom();
    if (work.q->reproducible || size < LEAST || size > INT32_MAX || !depth || !a->layers || !aligned(a->g, 16)) return EXC_OK;
    /* whole pieces of 64, as many as there is room for; then layers */
    const int64_t across = even(size), most = WIDE / across / 64 * 64, all = ceil_div(depth, 64) * 64;
    room->piece = all < most ? all : most > 64 ? most : 64;
    const int64_t together = WIDE / (across * room->piece);
    room->layers = ceil_div(a->layers, ceil_div(a->layers, together < 1 ? 1 : together));
    exc_status st;
    room->first = exc_product_plan(work.q, product_of(a, room->piece, room->layers, false), &st);
    if (room->first && room->piece < depth)
        room->more = exc_product_plan(work.q, product_of(a, room->piece, room->layers, true), &st);
    if (st != EXC_OK) return st;
    if (room->piece < depth && !room->more) room->first = nullptr;
    if (!room->first) return EXC_OK;
    room->wide = work.take<double>(room->layers * lines_of(a, room->piece) * pitch_of(a, room->piece));
    room->workspace = work.take<char>(BLAS_WORKSPACE);
    return EXC_OK;
}

exc_status exc_gram_run(exc_queue *q, const struct exc_gram_args *a, const GramRoom &room) {
    return room.first ? by_library(q, a, room) : by_tiles(q, a);
}

extern "C" exc_status exc_cuda_gram(exc_queue *q, const struct exc_gram_args *a) {
    if (a->layers < 0 || a->samples < 0 || a->width < 0 || a->row_stride < a->width) return EXC_ERR_USAGE;
    if (a->side != EXC_GRAM_SAMPLES && a->side != EXC_GRAM_WIDTH) return EXC_ERR_USAGE;
    if (a->layers > 65535 || ceil_div(side_of(a), TILE) > 65535) return EXC_ERR_USAGE;
    Carve work(q);
    GramRoom room;
    exc_status st = exc_gram_take(work, a, &room);
    if (st != EXC_OK) return st;
    return work.ready() ? exc_gram_run(q, a, room) : work.status;
}
