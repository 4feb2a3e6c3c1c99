/* cluster.cuh - edits on Hopper: one read and one write of memory, nothing through the second-level cache.
 *
 * Eight or sixteen blocks, a cluster, share a strip of 64 to 256 bytes of all rows, each some of its chunks. A
 * block's shared memory is a ring of chunks: bulk copies (bulk.cuh) bring the next ones, of the next strips too,
 * into every place that is free. Partial sums of chunks go to the block that owns their columns; it adds them in
 * ascending order, the canonical one, and sends the sums to all. Both ways are stores that report to a gate: no
 * barrier of the cluster. Results are written over the weights in the ring and leave as bulk copies, row pieces
 * of up to 256 bytes. A warp has the same eight rows of every chunk: it asks for them, changes them, sends them
 * off and asks for what comes next, so that a place is free again without a barrier of the block.
 *
 * Bytes on the way. Of a copy at 4.3 TB/s (H200) half is reads: 16.3 bytes a ns and processor of 132. A load
 * takes some 0.7 us, an exchange there and back perhaps 1.5 us, the sums and the update of 64 KB, 28 and 32
 * instructions a piece of 16 bytes at rank 1 on four schedulers, some 2 us: in these 4.2 us memory could give 68
 * KB. The ring has 208 KB. H = 2048, bf16, 256-byte rows: a strip is 64 KB a block, 144 KB are on their way
 * beside it. 4096: 128 and 80. 2880: 96 and 112. 7168: sixteen blocks 112 and 96; eight, with rows of 128
 * bytes, 112 and 104. Rows of 128 bytes reach 93 % of the full rate where 256 reach 99 (QuACK, H100). None of
 * this was measured here.
 *
 * What must not meet. Sums of exchange e + 1 come to an owner only after its own c of exchange e was seen by
 * their sender, so what the owner read is free. c of exchange e + 1 comes only after all threads of a block that has
 * rows have passed the barrier that begins it, so none of them still reads c of e. A block without rows (of nine
 * chunks on eight blocks the last have none) may meet c of e + 1 before the last c of e: it reads neither. A chunk's place is asked for again by the warp
 * that read and wrote it last, after its stores have been read (bulk_wait_read); other warps read these rows
 * before they sent sums, and c came only after that. On the host a launch is one cluster, whose blocks run at
 * once (tensor.cuh), so this source is tested there. */
#ifndef EXC_CLUSTER_CUH
#define EXC_CLUSTER_CUH

#include "bulk.cuh"
#include "edit.cuh"

namespace edit {

constexpr int WARPS = THREADS / WARP, SLICE = CHUNK / WARPS; /* rows of a chunk that a warp has */

/* how strips lie in a cluster */
struct Ring {
    int size;  /* blocks */
    int lanes; /* 16-byte pieces of a row of the strip: 4, 8 or 16 */
    int each;  /* chunks of a block, the last ones may have fewer or none */
    int slots; /* chunks that fit in a block; 0: too few */
    size_t bytes;
};

struct Stage {
    uint4 *tile;    /* [slots, CHUNK, lanes] */
    float *partial; /* [sums at once, chunks of all blocks, own columns] */
    float *c;       /* [directions, columns] */
    float *length, *left, *gain; /* [columns], the general edit only */
    double *fold;
    Gate *full;            /* [slots] */
    Gate *summed, *folded; /* partial sums are there; c is */
};

__host__ __device__ inline size_t carve(unsigned char *base, const Ring &r, int n, int rank, bool general, Stage *s) {
    const size_t columns = (size_t)r.lanes * n;
    size_t at = 0;
    lay(s->tile, base, at, (size_t)r.slots * CHUNK * r.lanes * 16);
    lay(s->partial, base, at, (general ? RANKS : rank) * (size_t)r.each * columns * 4);
    lay(s->c, base, at, rank * columns * 4);
    lay(s->length, base, at, general ? columns * 4 : 0);
    lay(s->left, base, at, general ? columns * 4 : 0);
    lay(s->gain, base, at, general ? columns * 4 : 0);
    lay(s->fold, base, at, general ? WARP * sizeof(double) : 0);
    lay(s->full, base, at, r.slots * sizeof(Gate));
    lay(s->summed, base, at, sizeof(Gate));
    lay(s->folded, base, at, sizeof(Gate));
    return at;
}

/* this thread's view of its block's part */
template <class T> struct Share {
    const Job &j;
    const Ring &r;
    Stage s;
    int rank;               /* of the block in its cluster */
    int chunks, mine, rows; /* of all blocks; chunks and rows of this one */
    int64_t first, pitch;   /* its first row; bytes of a row */
    int64_t step;           /* clusters of the grid */
    /* what its warp has asked for: chunks so far, and where the next one is */
    int64_t asked, asked_task;
    int asked_chunk;
    int64_t freed;      /* chunks whose rows of this warp are free again */
    unsigned exchanges; /* so far */

    __device__ int columns() const { return r.lanes * N<T>; }
    __device__ int own() const { return r.lanes * N<T> / r.size; }
    __device__ uint4 *tile(int64_t piece) const { return s.tile + piece % r.slots * CHUNK * r.lanes; }
    __device__ Gate *gate(int64_t piece) const { return s.full + piece % r.slots; }
    __device__ unsigned parity(int64_t piece) const { return (unsigned)(piece / r.slots) & 1; }
    __device__ int64_t column(int64_t task) const { return task % j.strips * columns(); }
    __device__ int64_t matrix(int64_t task) const { return j.first + task / j.strips; }
    __device__ bool idle(int64_t task) const { return j.strength[matrix(task)] == 0.0f; }
    __device__ bool moves(int64_t task) const { return src_of(j, matrix(task)) != dst_of(j, matrix(task)); }
    __device__ Tally &tally(int64_t task) const {
        return j.parts[task / j.strips * j.tallies + task % j.strips * r.size + rank];
    }
    /* from `task` on the next that this kernel has work with, -1: none */
    __device__ int64_t next(int64_t task) const {
        for (; task < j.count * j.strips; task += step)
            if (wide(src_of(j, matrix(task)), dst_of(j, matrix(task)), pitch) &&
                (!idle(task) || moves(task) || j.looked_at))
                return task;
        return -1;
    }
    /* asks for its warp's rows of chunks, as many as there is room for */
    __device__ void ask() {
        const int lane = threadIdx.x % WARP, slice = threadIdx.x / WARP * SLICE;
        while (mine && asked_task >= 0 && asked < freed + r.slots) {
            const int begin = asked_chunk * CHUNK + slice, count = max(0, min(SLICE, rows - begin));
            const int64_t at = column(asked_task) * (int64_t)sizeof(T);
            const unsigned bytes = (unsigned)min((int64_t)r.lanes * 16, pitch - at);
            if (lane == 0) gate_expect(gate(asked), bytes * count);
            if (lane < count)
                bulk_load(tile(asked) + (slice + lane) * r.lanes,
                          src_of(j, matrix(asked_task)) + (first + begin + lane) * pitch + at, bytes, gate(asked));
            asked++;
            if (++asked_chunk < mine) continue;
            asked_chunk = 0;
            asked_task = next(asked_task + step);
        }
    }
};

/* Canonical sums of the strip whose first chunk is `piece`, in all blocks: out[i, column] = sum over rows of what
 * term(row, x, column, p) adds to p[i]. A thread takes 4 bytes of a row, down a chunk. */
template <class T, int SUMS, class Term>
__device__ inline void exchange(Share<T> &b, int64_t piece, float *out, Term term) {
    constexpr int U = 4 / sizeof(T);
    const int words = b.r.lanes * 4, own = b.own(), columns = b.columns(), all = b.r.each * b.r.size;
    const unsigned parity = b.exchanges++ & 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        gate_expect(b.s.summed, (unsigned)(SUMS * b.chunks * own * 4));
        gate_expect(b.s.folded, (unsigned)(SUMS * columns * 4));
    }
    for (int item = threadIdx.x; item < b.mine * words; item += THREADS) {
        const int chunk = item / words, word = item % words, begin = chunk * CHUNK, count = min(CHUNK, b.rows - begin);
        float p[SUMS][U] = {};
        gate_wait(b.gate(piece + chunk), b.parity(piece + chunk));
        const unsigned *from = reinterpret_cast<const unsigned *>(b.tile(piece + chunk)) + word;
#pragma unroll 8
        for (int h = 0; h < count; h++) {
            float x[N<T>];
            unpack<T>(make_uint4(from[h * words], 0, 0, 0), x);
            term((int)b.first + begin + h, x, word * U, p);
        }
        const int at = b.rank * b.r.each + chunk;
#pragma unroll
        for (int i = 0; i < SUMS; i++)
#pragma unroll
            for (int u = 0; u < U; u++)
                remote_store(b.s.partial + (i * all + at) * own + (word * U + u) % own, (word * U + u) / own, p[i][u],
                             b.s.summed);
    }
    const int i = threadIdx.x / own, column = b.rank * own + threadIdx.x % own;
    if (i < SUMS) {
        const float *from = b.s.partial + i * all * own + threadIdx.x % own;
        float hi = 0, lo = 0;
        gate_wait(b.s.summed, parity);
        for (int chunk = 0; chunk < b.chunks; chunk++) add_to(hi, lo, from[chunk * own]);
        for (int block = 0; block < b.r.size; block++) remote_store(out + i * columns + column, block, hi + lo, b.s.folded);
    }
    gate_wait(b.s.folded, parity);
}

template <class T, int SUMS, class Look>
__device__ inline void dots(Share<T> &b, int64_t piece, int first, Look look) {
    const float *basis = b.j.basis + (size_t)first * b.j.rows;
    exchange<T, SUMS>(b, piece, b.s.c + first * b.columns(),
                      [&](int h, const float(&x)[N<T>], int column, float(&p)[SUMS][4 / sizeof(T)]) {
                          look(x, column);
#pragma unroll
                          for (int r = 0; r < SUMS; r++) {
                              const float k = __ldg(basis + (size_t)r * b.j.rows + h);
#pragma unroll
                              for (int u = 0; u < 4 / (int)sizeof(T); u++) p[r][u] = fmaf(k, x[u], p[r][u]);
                          }
                      });
}

/* what is subtracted from COUNT weights of row h, whose c begins at `c` */
template <class T, int K, int COUNT>
__device__ inline void delta(const Share<T> &b, float strength, const float (&held)[K ? K : 1][N<T>], const float *c, int h,
                             float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) d[i] = 0;
    if constexpr (K > 0) {
#pragma unroll
        for (int r = 0; r < K; r++) {
            const float k = strength * __ldg(b.j.basis + (size_t)r * b.j.rows + h);
#pragma unroll
            for (int i = 0; i < COUNT; i++) d[i] = fmaf(k, held[r][i], d[i]);
        }
    } else {
        for (int r = 0; r < b.j.rank; r++, c += b.columns()) {
            const float k = strength * __ldg(b.j.basis + (size_t)r * b.j.rows + h);
#pragma unroll
            for (int i = 0; i < COUNT; i++) d[i] = fmaf(k, c[i], d[i]);
        }
    }
}

/* The warp's rows of the strip: the result over the weights, and off to memory. Returns how many weights changed,
 * where that is wanted. FREE: what has been sent is asked for anew. */
template <class T, int K, bool FREE> __device__ inline int update(Share<T> &b, int64_t piece, int64_t task, bool gains) {
    const int lanes = b.r.lanes, lane = threadIdx.x % lanes, down = threadIdx.x % WARP / lanes,
              slice = threadIdx.x / WARP * SLICE;
    const int64_t at = b.column(task) + lane * N<T>, from = b.column(task) * (int64_t)sizeof(T);
    const bool idle = b.idle(task), in = at < b.j.cols;
    const float strength = b.j.strength[b.matrix(task)];
    const unsigned bytes = (unsigned)min((int64_t)lanes * 16, b.pitch - from);
    char *dst = dst_of(b.j, b.matrix(task)) + b.first * b.pitch + from;
    int changed = 0;
    float c[K ? K : 1][N<T>];
#pragma unroll
    for (int r = 0; r < K; r++)
#pragma unroll
        for (int i = 0; i < N<T>; i++) c[r][i] = b.s.c[r * b.columns() + lane * N<T> + i];
    for (int chunk = 0; chunk < b.mine && (!idle || b.moves(task)); chunk++) {
        const int begin = chunk * CHUNK + slice, count = max(0, min(SLICE, b.rows - begin));
        uint4 *tile = b.tile(piece + chunk) + slice * lanes;
        gate_wait(b.gate(piece + chunk), b.parity(piece + chunk));
#pragma unroll 2
        for (int h = down; h < count && in && !idle; h += WARP / lanes) {
            const uint4 v = tile[h * lanes + lane];
            float x[N<T>], d[N<T>];
            unpack<T>(v, x);
            delta<T, K>(b, strength, c, b.s.c + lane * N<T>, (int)b.first + begin + h, d);
#pragma unroll
            for (int i = 0; i < N<T>; i++) x[i] = x[i] - d[i];
#pragma unroll
            for (int i = 0; i < N<T>; i++)
                if (K == 0 && gains) x[i] = x[i] * b.s.gain[lane * N<T> + i];
            const uint4 edited = pack<T>(x);
            if (K == 0 && b.j.changed) changed += differing<T>(v, edited, N<T>);
            tile[h * lanes + lane] = edited;
        }
        bulk_fence();
        __syncwarp();
        const int row = threadIdx.x % WARP;
        if (row < count) bulk_store(dst + (begin + row) * b.pitch, tile + row * lanes, bytes);
        bulk_commit();
        if (FREE) {
            bulk_wait_read<1>(); /* the chunk before this one has left */
            __syncwarp();
            b.freed = piece + chunk;
            b.ask();
        }
    }
    return changed;
}

/* all of the warp's rows of the strip are free */
template <class T> __device__ inline void release(Share<T> &b, int64_t piece) {
    bulk_wait_read<0>();
    __syncwarp();
    b.freed = piece + b.mine;
    b.ask();
}

/* by the first block, which has rows: see above */
template <class T> __device__ inline void keep(const Share<T> &b, int64_t task) {
    const int columns = b.columns();
    for (int i = threadIdx.x; b.j.c && b.rank == 0 && i < b.j.rank * columns; i += THREADS) {
        const int r = i / columns, column = i % columns;
        const int64_t at = b.column(task) + column;
        if (at < b.j.cols) b.j.c[(task / b.j.strips * b.j.rank + r) * b.j.cols + at] = b.s.c[r * columns + column];
    }
}

/* c of all directions, RANKS at a time; returns the NaN and infinities met, where they are counted */
template <class T> __device__ inline int all_dots(Share<T> &b, int64_t piece, int64_t task, bool begin) {
    const int64_t in = b.j.cols - b.column(task);
    int bad = 0;
    for (int r = 0; r < b.j.rank; r += RANKS) {
        auto look = [&](const float(&x)[N<T>], int column) {
            for (int u = 0; begin && r == 0 && b.j.nonfinite && u < 4 / (int)sizeof(T); u++)
                bad += column + u < in && !is_finite(x[u]);
        };
        if (b.j.rank - r >= 4)
            dots<T, 4>(b, piece, r, look);
        else if (b.j.rank - r == 3)
            dots<T, 3>(b, piece, r, look);
        else if (b.j.rank - r == 2)
            dots<T, 2>(b, piece, r, look);
        else
            dots<T, 1>(b, piece, r, look);
    }
    return bad;
}

/* |column|^2 before the edit, or after it but for the gain */
template <class T, bool EDITED> __device__ inline void squares(Share<T> &b, int64_t piece, int64_t task, float *out) {
    constexpr int U = 4 / sizeof(T);
    const float none[1][N<T>] = {}, strength = b.j.strength[b.matrix(task)];
    exchange<T, 1>(b, piece, out, [&](int h, const float(&x)[N<T>], int column, float(&p)[1][U]) {
        float d[U];
        if (EDITED) delta<T, 0>(b, strength, none, b.s.c + column, h, d);
#pragma unroll
        for (int u = 0; u < U; u++) {
            const float y = EDITED ? x[u] - d[u] : x[u];
            p[0][u] = fmaf(y, y, p[0][u]);
        }
    });
}

/* of the columns inside the matrix; every thread gets it */
template <class T> __device__ inline double square_sum(const Share<T> &b, int64_t task) {
    const int columns = b.columns();
    double sum = 0;
    for (int i = threadIdx.x; i < b.j.rank * columns; i += THREADS)
        if (b.column(task) + i % columns < b.j.cols) sum += (double)b.s.c[i] * (double)b.s.c[i];
    return block_sum(sum, b.s.fold);
}

/* one strip, any rank, and everything that may be asked for */
template <class T> __device__ inline Tally general(Share<T> &b, int64_t piece, int64_t task) {
    const bool idle = b.idle(task), gains = b.j.norm != EXC_NORM_NONE && !idle;
    double before = 0, after = 0;
    int bad = 0, changed = 0;
    for (bool begin = true;; begin = false) { /* the second time over the result */
        bad += all_dots<T>(b, piece, task, begin);
        const double square = b.j.before || b.j.after ? square_sum(b, task) : 0;
        after = square;
        if (!begin) break;
        before = square;
        keep(b, task);
        if (gains) {
            squares<T, false>(b, piece, task, b.s.length);
            squares<T, true>(b, piece, task, b.s.left);
            for (int i = threadIdx.x; i < b.columns(); i += THREADS)
                b.s.gain[i] = gain_of((double)b.s.length[i], (double)b.s.left[i]);
            __syncthreads();
        }
        changed = update<T, 0, false>(b, piece, task, gains);
        if (idle || !b.j.after) break;
    }
    __syncthreads(); /* all have read the tile */
    const double many = b.j.sums ? block_sum((double)bad, b.s.fold) : 0,
                 moved = b.j.sums ? block_sum((double)changed, b.s.fold) : 0;
    return Tally{b.rank ? 0 : before, b.rank ? 0 : after, (int64_t)moved, (int64_t)many};
}

template <class T, int K> __device__ inline void clustered_block(const Job &j, const Ring &r, unsigned char *base) {
    Share<T> b = {j, r, {}, cluster_rank(), (int)((j.rows + CHUNK - 1) / CHUNK), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    b.first = (int64_t)b.rank * r.each * CHUNK, b.pitch = j.cols * (int64_t)sizeof(T), b.step = gridDim.x / r.size;
    b.rows = (int)max((int64_t)0, min((int64_t)r.each * CHUNK, j.rows - b.first));
    b.mine = (b.rows + CHUNK - 1) / CHUNK;
    carve(base, r, N<T>, j.rank, K == 0, &b.s);
    if (threadIdx.x == 0) {
        for (int i = 0; i < r.slots; i++) gate_init(b.s.full + i, WARPS);
        gate_init(b.s.summed, 1);
        gate_init(b.s.folded, 1);
        gates_ready();
    }
    cluster_begin(base);
    int64_t task = b.next(blockIdx.x / r.size), piece = 0;
    b.asked_task = task;
    b.ask();
    for (; task >= 0; piece += b.mine, task = b.next(task + b.step)) {
        if constexpr (K > 0) {
            dots<T, K>(b, piece, 0, [](const float(&)[N<T>], int) {});
            keep(b, task);
            update<T, K, true>(b, piece, task, false);
        } else {
            const Tally sum = general(b, piece, task);
            if (j.sums && threadIdx.x == 0) b.tally(task) = sum;
        }
        release(b, piece);
    }
    bulk_wait<0>();
    cluster_sync(); /* no block leaves while another may still send to it */
}

template <class T, int K> __global__ void __launch_bounds__(THREADS, 1) clustered(Job j, Ring r) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    DYN_SHARED(unsigned char, base);
    clustered_block<T, K>(j, r, base);
#endif
}

} // namespace edit

#endif
