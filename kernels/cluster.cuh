/* cluster.cuh - the common edit on Hopper: one read and one write of memory, nothing through the second-level
 * cache.
 *
 * Eight blocks, a cluster, share a strip of 64 to 256 bytes of all rows: each holds an eighth of its chunks
 * in shared memory, in one of 2 to 4 stages, and the strips to come are on their way while one is worked on.
 * Every block takes the partial sums of its chunks and sends them to the block that owns their columns, an
 * eighth of the strip's (distributed shared memory); the owner adds a column's partial sums in ascending
 * order, the canonical one, and sends c to all. Two cluster barriers a strip, which the loads under way
 * cover. Weights leave from registers, 16 bytes a thread and whole row pieces a warp.
 *
 * Loads are cp.async: 16 bytes a thread, any pointer whose rows begin at multiples of 16 bytes, no tensor map
 * a matrix, and no asynchronous proxy to order against the stores in place. What a remote store must not
 * meet: a block that has not begun (the barrier at the start), one that has ended (none follow the last
 * barrier), and sums or c still being read: sums are read between the barriers of a strip and written
 * outside, c is written between them and read outside. On the host a launch is one cluster, whose blocks run
 * at once (tensor.cuh), so this source is tested there. */
#ifndef EXC_CLUSTER_CUH
#define EXC_CLUSTER_CUH

#include "edit.cuh"

namespace edit {

/* how strips lie in a cluster */
struct Ring {
    int lanes; /* 16-byte pieces of a row of the strip: 4, 8 or 16 */
    int each;  /* chunks of a block, the last ones may have fewer or none */
    int stages;
    size_t bytes; /* of shared memory */
};

struct Stage {
    uint4 *tile;    /* [stages][each * CHUNK, lanes] */
    float *partial; /* [directions, chunks of all blocks, own columns] */
    float *c;       /* [directions, columns] */
};

__host__ __device__ inline size_t carve(unsigned char *base, const Ring &r, int n, int rank, Stage *s) {
    const size_t columns = (size_t)r.lanes * n;
    size_t at = 0;
    lay(s->tile, base, at, (size_t)r.stages * r.each * CHUNK * r.lanes * 16);
    lay(s->partial, base, at, rank * (size_t)r.each * CLUSTER * (columns / CLUSTER) * 4);
    lay(s->c, base, at, rank * columns * 4);
    return at;
}

/* this block's part of the work */
template <class T> struct Share {
    const Job &j;
    const Ring &r;
    Stage s;
    int rank;         /* of the block in its cluster */
    int chunks, rows; /* of all blocks; rows of this one */
    int64_t first;    /* its first row */
    int64_t pitch;

    __device__ uint4 *tile(int64_t turn) const { return s.tile + turn % r.stages * r.each * CHUNK * r.lanes; }
    __device__ int64_t column(int64_t task) const { return task % j.strips * r.lanes * N<T>; }
    __device__ int64_t matrix(int64_t task) const { return j.first + task / j.strips; }
    /* from `task` on the next that this kernel has work with, in steps of the clusters */
    __device__ int64_t next(int64_t task, int64_t step) const {
        for (; task < j.count * j.strips; task += step) {
            const char *src = src_of(j, matrix(task)), *dst = dst_of(j, matrix(task));
            if (wide(src, dst, pitch) && (j.strength[matrix(task)] != 0.0f || src != dst || j.looked_at))
                return task;
        }
        return -1;
    }
    /* asks for the strip of a task, -1: none; one group of copies a turn either way */
    __device__ void ask(int64_t task, int64_t turn) const {
        if (task >= 0) {
            const int lane = threadIdx.x % r.lanes;
            const int64_t at = column(task) + lane * N<T>;
            const char *from = src_of(j, matrix(task)) + first * pitch + at * (int64_t)sizeof(T);
            for (int h = threadIdx.x / r.lanes; h < rows; h += THREADS / r.lanes)
                cp_async16(tile(turn) + h * r.lanes + lane, from + h * pitch, at < j.cols ? 16 : 0);
        }
        cp_async_commit();
    }
};

/* partial sums of this block's chunks to the owners of the columns. A thread takes 4 bytes of a row, down a
 * chunk. */
template <class T, int K> __device__ inline void partial_sums(const Share<T> &b, const uint4 *tile) {
    constexpr int U = 4 / sizeof(T);
    const int words = b.r.lanes * 4, own = words * U / CLUSTER, chunks = (b.rows + CHUNK - 1) / CHUNK;
    const unsigned *from = reinterpret_cast<const unsigned *>(tile);
    for (int item = threadIdx.x; item < chunks * words; item += THREADS) {
        const int chunk = item / words, word = item % words, end = min((chunk + 1) * CHUNK, b.rows);
        float p[K][U] = {};
#pragma unroll 8
        for (int h = chunk * CHUNK; h < end; h++) {
            float x[N<T>];
            unpack<T>(make_uint4(from[h * words + word], 0, 0, 0), x);
#pragma unroll
            for (int r = 0; r < K; r++) {
                const float k = __ldg(b.j.basis + r * b.j.rows + b.first + h);
#pragma unroll
                for (int u = 0; u < U; u++) p[r][u] = fmaf(k, x[u], p[r][u]);
            }
        }
        const int column = word * U, at = b.rank * b.r.each + chunk;
        for (int r = 0; r < K; r++)
            for (int u = 0; u < U; u++)
                cluster_store(b.s.partial + (r * b.r.each * CLUSTER + at) * own + (column + u) % own,
                              (column + u) / own, p[r][u]);
    }
}

/* c of this block's columns, to all */
template <class T, int K> __device__ inline void fold(const Share<T> &b, int64_t task) {
    const int columns = b.r.lanes * N<T>, own = columns / CLUSTER, i = threadIdx.x;
    if (i >= K * own) return;
    const int r = i / own, column = b.rank * own + i % own;
    const float *from = b.s.partial + r * b.r.each * CLUSTER * own + i % own;
    float hi = 0, lo = 0;
    for (int chunk = 0; chunk < b.chunks; chunk++) add_to(hi, lo, from[chunk * own]);
    const float c = hi + lo;
    for (int block = 0; block < CLUSTER; block++) cluster_store(b.s.c + r * columns + column, block, c);
    const int64_t at = b.column(task) + column;
    if (b.j.c && at < b.j.cols) b.j.c[(task / b.j.strips * K + r) * b.j.cols + at] = c;
}

template <class T, int K>
__device__ inline void subtract(const Share<T> &b, const uint4 *tile, int64_t task) {
    const int lane = threadIdx.x % b.r.lanes, columns = b.r.lanes * N<T>;
    const int64_t at = b.column(task) + lane * N<T>;
    const float strength = b.j.strength[b.matrix(task)];
    char *dst = dst_of(b.j, b.matrix(task)) + b.first * b.pitch + at * (int64_t)sizeof(T);
    const bool idle = strength == 0.0f;
    if (at >= b.j.cols ||
        (idle && dst == src_of(b.j, b.matrix(task)) + b.first * b.pitch + at * (int64_t)sizeof(T)))
        return;
    float c[K][N<T>];
    for (int r = 0; r < K; r++)
        for (int i = 0; i < N<T>; i++) c[r][i] = b.s.c[r * columns + lane * N<T> + i];
#pragma unroll 4
    for (int h = threadIdx.x / b.r.lanes; h < b.rows; h += THREADS / b.r.lanes) {
        const uint4 v = tile[h * b.r.lanes + lane];
        float x[N<T>], d[N<T>] = {};
        unpack<T>(v, x);
#pragma unroll
        for (int r = 0; r < K; r++) {
            const float k = strength * __ldg(b.j.basis + r * b.j.rows + b.first + h);
#pragma unroll
            for (int i = 0; i < N<T>; i++) d[i] = fmaf(k, c[r][i], d[i]);
        }
#pragma unroll
        for (int i = 0; i < N<T>; i++) x[i] = x[i] - d[i];
        store_drop(dst + h * b.pitch, idle ? v : pack<T>(x));
    }
}

template <class T, int K> __global__ void __launch_bounds__(THREADS, 1) clustered(Job j, Ring r) {
    DYN_SHARED(unsigned char, base);
    const int64_t clusters = gridDim.x / CLUSTER;
    const int rank = cluster_rank();
    Share<T> b = {j,
                  r,
                  {},
                  rank,
                  (int)((j.rows + CHUNK - 1) / CHUNK),
                  0,
                  (int64_t)rank * r.each * CHUNK,
                  j.cols * (int64_t)sizeof(T)};
    b.rows = (int)max((int64_t)0, min((int64_t)r.each * CHUNK, j.rows - b.first));
    carve(base, r, N<T>, K, &b.s);
    cluster_begin(base);
    int64_t task = b.next(blockIdx.x / CLUSTER, clusters), asked = task, turn = 0;
    for (int i = 0; i < r.stages - 1; i++) { /* one stage is being read, the others are on their way */
        b.ask(asked, i);
        if (asked >= 0) asked = b.next(asked + clusters, clusters);
    }
    for (; task >= 0; turn++) {
        b.ask(asked, turn + r.stages - 1); /* into the stage of the turn before, which all have left */
        if (asked >= 0) asked = b.next(asked + clusters, clusters);
        if (r.stages == 2)
            cp_async_wait<1>();
        else if (r.stages == 3)
            cp_async_wait<2>();
        else
            cp_async_wait<3>();
        __syncthreads();
        partial_sums<T, K>(b, b.tile(turn));
        cluster_sync();
        fold<T, K>(b, task);
        cluster_sync();
        subtract<T, K>(b, b.tile(turn), task);
        __syncthreads();
        task = b.next(task + clusters, clusters);
    }
}

} // namespace edit

#endif
