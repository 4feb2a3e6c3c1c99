/* project.cu - orthogonalises weight matrices on the device: W <- W - s R^T (R W), rounded once, with the bits of project.c.
 *
 * Memory bound. R on the rows (EXC_SIDE_OUT, W [H,I]): a block owns a strip of all H rows and 64 or 128 bytes of them. One sweep
 * takes c = R W, a second subtracts. The rows that fit stay in shared memory between the two, the rest is found again in the
 * second-level cache: the first sweep asks the cache to keep it, the second to drop it. Strips are chosen so narrow, and
 * blocks so few, that what waits fits there (choose()). A thread goes down whole chunks of 64 rows and meets the same weights in
 * both sweeps, so weights held in shared memory are never shared.
 * R on the columns (EXC_SIDE_IN, W [I,H]): a block takes some whole rows to shared memory, edits them there and writes them back.
 * Row norms of EXC_SIDE_OUT span all strips: c of some matrices first, then row by row, while they are in cache.
 * Experts of strength 0 cost no bytes in place. */
#include "edit.cuh"

using namespace edit;

namespace {

/* ------------------------------------------------------------------------------------------- R on the rows: strips */

/* how strips are cut, and what a block keeps in shared memory */
struct Cut {
    int lanes;      /* pieces of a row of the strip: 4 or 8 */
    int held;       /* leading chunks that stay in shared memory */
    int blocks;     /* of the grid */
    size_t bytes;   /* of shared memory */
};

/* this thread's part of a strip */
struct Part {
    const char *src;    /* its piece of row 0 */
    char *dst;
    int64_t pitch;    /* bytes between rows */
    int n;              /* weights of its piece inside the matrix, 0: none */
    int group, groups;  /* it takes chunks group, group + groups, ... */
    int lane, lanes;
    int rows, chunks, held;
};

/* shared memory of a block, carved alike by host and device */
struct Room {
    uint4 *held;        /* [held * CHUNK, lanes] */
    float *partial;     /* [sums at once, groups, columns] */
    float *c;           /* [rank, columns] */
    float *length, *left, *gain; /* [columns] */
    double *fold;       /* [WARP] */
};

/* the next `bytes` bytes of a block's shared memory */
template <class P> __host__ __device__ inline void lay(P *&p, unsigned char *base, size_t &at, size_t bytes) {
    p = reinterpret_cast<P *>(reinterpret_cast<uintptr_t>(base) + at); /* base is NULL when the host measures */
    at += (bytes + 15) / 16 * 16;
}

__host__ __device__ inline size_t carve(unsigned char *base, int lanes, int n, int held, int rank, int at_once, bool extra, Room *m) {
    const size_t columns = (size_t)lanes * n;
    size_t at = 0;
    lay(m->held, base, at, (size_t)held * CHUNK * lanes * 16);
    lay(m->partial, base, at, at_once * (THREADS / lanes) * columns * 4);
    lay(m->c, base, at, rank * columns * 4);
    if (!extra) return at;
    lay(m->length, base, at, columns * 4);
    lay(m->left, base, at, columns * 4);
    lay(m->gain, base, at, columns * 4);
    lay(m->fold, base, at, WARP * sizeof(double));
    return at;
}

template <class T, bool WIDE> __device__ inline uint4 fetch(const Part &t, int h, bool last) {
    const char *p = t.src + h * t.pitch;
    if (!WIDE) return gather<T>(p, t.n);
    if (!t.n) return make_uint4(0, 0, 0, 0);
    return last ? load_drop(p) : load_keep(p);
}

template <class T, bool WIDE> __device__ inline void put(const Part &t, int h, const uint4 &v) {
    if (!WIDE) scatter<T>(t.dst + h * t.pitch, v, t.n);
    else if (t.n) store_drop(t.dst + h * t.pitch, v);
}

/* pieces that a thread asks for at once beside k directions' sums: what registers allow */
__host__ __device__ constexpr int ahead(int k) { return k == 0 ? 2 : k < 4 ? 8 : 4; }

/* The canonical sums of a strip: out[i, column] = sum over rows of what term() adds to p[i]. row(h, chunk) gives the
 * weights, meet(h, chunk, v) sees them on their way. Waves of `groups` chunks; after each, one thread a sum folds the wave's
 * partial sums, in ascending order. */
template <class T, int SUMS, int AHEAD, class Row, class Meet, class Term>
__device__ inline void sums(const Part &t, float *partial, float *out, Row row, Meet meet, Term term) {
    const int columns = t.lanes * N<T>, mine = threadIdx.x;
    float hi = 0, lo = 0;
    for (int wave = 0; wave < t.chunks; wave += t.groups) {
        const int chunk = wave + t.group;
        float p[SUMS][N<T>] = {};
        auto one = [&](int h, const uint4 &v) {
            float x[N<T>];
            meet(h, chunk, v);
            unpack<T>(v, x);
            term(h, x, p);
        };
        if (chunk < t.chunks) {
            const int end = min((chunk + 1) * CHUNK, t.rows);
            int h = chunk * CHUNK;
            for (; h + AHEAD <= end; h += AHEAD) {
                uint4 v[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; i++) v[i] = row(h + i, chunk);
#pragma unroll
                for (int i = 0; i < AHEAD; i++) one(h + i, v[i]);
            }
            for (; h < end; h++) one(h, row(h, chunk));
#pragma unroll
            for (int i = 0; i < SUMS; i++)
#pragma unroll
                for (int k = 0; k < N<T>; k += 4)
                    *reinterpret_cast<float4 *>(partial + (i * t.groups + t.group) * columns + t.lane * N<T> + k) =
                        make_float4(p[i][k], p[i][k + 1], p[i][k + 2], p[i][k + 3]);
        }
        __syncthreads();
        if (mine < SUMS * columns) {
            const float *from = partial + mine / columns * t.groups * columns + mine % columns;
            const int count = min(t.groups, t.chunks - wave);
            for (int g = 0; g < count; g++) add_to(hi, lo, from[g * columns]);
        }
        __syncthreads();
    }
    if (mine < SUMS * columns) out[mine] = hi + lo;
    __syncthreads();
}

/* c of SUMS directions */
template <class T, int SUMS, class Row, class Meet>
__device__ inline void dots(const Part &t, float *partial, float *out, const float *basis, Row row, Meet meet) {
    sums<T, SUMS, ahead(SUMS)>(t, partial, out, row, meet, [&](int h, const float(&x)[N<T>], float(&p)[SUMS][N<T>]) {
#pragma unroll
        for (int r = 0; r < SUMS; r++) {
            const float b = __ldg(basis + (size_t)r * t.rows + h);
#pragma unroll
            for (int i = 0; i < N<T>; i++) p[r][i] = fmaf(b, x[i], p[r][i]);
        }
    });
}

/* what is subtracted from a piece of row h: the sum over directions of (strength * basis) c, from +0 */
template <class T, int K>
__device__ inline void delta(const Job &j, const Part &t, float strength, const float (&held)[K ? K : 1][N<T>], const float *c, int h,
                             float (&d)[N<T>]) {
    const int columns = t.lanes * N<T>;
#pragma unroll
    for (int i = 0; i < N<T>; i++) d[i] = 0;
    if constexpr (K > 0) {
#pragma unroll
        for (int r = 0; r < K; r++) {
            const float k = strength * __ldg(j.basis + (size_t)r * t.rows + h);
#pragma unroll
            for (int i = 0; i < N<T>; i++) d[i] = fmaf(k, held[r][i], d[i]);
        }
    } else {
        for (int r = 0; r < j.rank; r++) {
            const float k = strength * __ldg(j.basis + (size_t)r * t.rows + h);
            const float *from = c + r * columns + t.lane * N<T>;
#pragma unroll
            for (int i = 0; i < N<T>; i++) d[i] = fmaf(k, from[i], d[i]);
        }
    }
}

/* dst = gain * (w - delta); returns how many weights changed where that is wanted */
template <class T, int K, bool WIDE>
__device__ inline int update(const Job &j, const Part &t, float strength, const Room &m, const float *gain) {
    constexpr int AHEAD = ahead(K);
    const int columns = t.lanes * N<T>;
    float c[K ? K : 1][N<T>], g[N<T>];
    int changed = 0;
    for (int r = 0; r < K; r++)
        for (int i = 0; i < N<T>; i++) c[r][i] = m.c[r * columns + t.lane * N<T> + i];
    for (int i = 0; gain && i < N<T>; i++) g[i] = gain[t.lane * N<T> + i];
    auto one = [&](int h, const uint4 &v) {
        float x[N<T>], d[N<T>];
        unpack<T>(v, x);
        delta<T, K>(j, t, strength, c, m.c, h, d);
#pragma unroll
        for (int i = 0; i < N<T>; i++) x[i] = x[i] - d[i];
#pragma unroll
        for (int i = 0; i < N<T>; i++)
            if (K == 0 && gain) x[i] = x[i] * g[i];
        const uint4 edited = pack<T>(x);
        if (K == 0 && j.changed) changed += differing<T>(v, edited, t.n);
        put<T, WIDE>(t, h, edited);
    };
    auto down = [&](int chunk, auto row) {
        const int end = min((chunk + 1) * CHUNK, t.rows);
        int h = chunk * CHUNK;
        for (; h + AHEAD <= end; h += AHEAD) {
            uint4 v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) v[i] = row(h + i);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) one(h + i, v[i]);
        }
        for (; h < end; h++) one(h, row(h));
    };
    for (int chunk = t.group; chunk < t.chunks; chunk += t.groups) {
        if (chunk < t.held) down(chunk, [&](int h) { return m.held[h * t.lanes + t.lane]; });
        else down(chunk, [&](int h) { return fetch<T, WIDE>(t, h, true); });
    }
    return changed;
}

/* |column|^2 of the strip before the edit, or after it but for the gain */
template <class T, bool EDITED, class Row>
__device__ inline void squares(const Job &j, const Part &t, float strength, const Room &m, float *out, Row row) {
    const float none[1][N<T>] = {};
    auto pass = [](int, int, const uint4 &) {};
    sums<T, 1, 1>(t, m.partial, out, row, pass, [&](int h, const float(&x)[N<T>], float(&p)[1][N<T>]) {
        float d[N<T>];
        if (EDITED) delta<T, 0>(j, t, strength, none, m.c, h, d);
#pragma unroll
        for (int i = 0; i < N<T>; i++) {
            const float y = EDITED ? x[i] - d[i] : x[i];
            p[0][i] = fmaf(y, y, p[0][i]);
        }
    });
}

__device__ inline double square_sum(const Job &j, const Room &m, int columns) {
    double sum = 0;
    for (int i = threadIdx.x; i < j.rank * columns; i += THREADS) sum += (double)m.c[i] * (double)m.c[i];
    return block_sum(sum, m.fold);
}

__device__ inline void keep(const Job &j, const Room &m, int columns, int64_t matrix, int64_t column) {
    for (int i = threadIdx.x; j.c && i < j.rank * columns; i += THREADS) {
        const int64_t at = column + i % columns;
        if (at < j.cols) j.c[((matrix - j.first) * j.rank + i / columns) * j.cols + at] = m.c[i];
    }
}

template <class T, bool WIDE> __device__ inline void copy(const Part &t) {
    for (int chunk = t.group; chunk < t.chunks; chunk += t.groups)
        for (int h = chunk * CHUNK; h < min((chunk + 1) * CHUNK, t.rows); h++) put<T, WIDE>(t, h, fetch<T, WIDE>(t, h, true));
}

/* c of all directions, RANKS at a time. begin: the first sweep over the strip, which fills what is held; returns the NaN and
 * infinities that this thread then meets, where they are counted. Not inlined: it is large, and used twice. */
template <class T, bool WIDE> __device__ __attribute__((noinline)) int all_dots(const Job &j, const Part &t, const Room &m, bool begin) {
    int bad = 0;
    for (int r = 0; r < j.rank; r += RANKS) {
        const float *basis = j.basis + (size_t)r * t.rows;
        float *out = m.c + r * t.lanes * N<T>;
        const bool first = begin && r == 0;
        auto row = [&](int h, int chunk) {
            return !first && chunk < t.held ? m.held[h * t.lanes + t.lane] : fetch<T, WIDE>(t, h, false);
        };
        auto meet = [&](int h, int chunk, const uint4 &v) {
            if (first && chunk < t.held) m.held[h * t.lanes + t.lane] = v;
            if (first && j.nonfinite) bad += special<T>(v, t.n);
        };
        if (j.rank - r >= 4) dots<T, 4>(t, m.partial, out, basis, row, meet);
        else if (j.rank - r == 3) dots<T, 3>(t, m.partial, out, basis, row, meet);
        else if (j.rank - r == 2) dots<T, 2>(t, m.partial, out, basis, row, meet);
        else dots<T, 1>(t, m.partial, out, basis, row, meet);
    }
    return bad;
}

enum Mode { EDIT, DOTS, AFTER }; /* all of it; c and what is known before; |R W|^2 of dst alone */

/* one strip, few directions, nothing asked for but c */
template <class T, int K, bool WIDE>
__device__ inline void plain(const Job &j, const Part &t, const Room &m, int64_t matrix, int64_t column) {
    auto row = [&](int h, int) { return fetch<T, WIDE>(t, h, false); };
    auto hold = [&](int h, int chunk, const uint4 &v) {
        if (chunk < t.held) m.held[h * t.lanes + t.lane] = v;
    };
    dots<T, K>(t, m.partial, m.c, j.basis, row, hold);
    keep(j, m, t.lanes * N<T>, matrix, column);
    if (j.strength[matrix] != 0.0f) update<T, K, WIDE>(j, t, j.strength[matrix], m, nullptr);
    else if (t.src != t.dst) copy<T, WIDE>(t);
}

/* one strip, any rank, and everything that may be asked for */
template <class T, bool WIDE>
__device__ inline Tally full(const Job &j, const Part &t, const Room &m, int64_t matrix, int64_t column, Mode what) {
    const float strength = j.strength[matrix];
    const int columns = t.lanes * N<T>;
    int changed = 0;
    auto row = [&](int h, int chunk) { return chunk < t.held ? m.held[h * t.lanes + t.lane] : fetch<T, WIDE>(t, h, false); };
    const int bad = all_dots<T, WIDE>(j, t, m, true);
    if (what != AFTER) keep(j, m, columns, matrix, column);
    double before = j.before || j.after ? square_sum(j, m, columns) : 0, after = before;
    if (what != AFTER && strength == 0.0f && t.dst != t.src) copy<T, WIDE>(t);
    if (what == EDIT && strength != 0.0f) {
        if (j.norm != EXC_NORM_NONE) {
            squares<T, false>(j, t, strength, m, m.length, row);
            squares<T, true>(j, t, strength, m, m.left, row);
            for (int i = threadIdx.x; i < columns; i += THREADS) m.gain[i] = gain_of((double)m.length[i], (double)m.left[i]);
            __syncthreads();
        }
        changed = update<T, 0, WIDE>(j, t, strength, m, j.norm != EXC_NORM_NONE ? m.gain : nullptr);
        if (j.after) {
            Part out = t;
            out.src = t.dst, out.held = 0; /* a thread reads what it has written */
            all_dots<T, WIDE>(j, out, m, false);
            after = square_sum(j, m, columns);
        }
    }
    const double many = j.sums ? block_sum((double)bad, m.fold) : 0, moved = j.sums ? block_sum((double)changed, m.fold) : 0;
    return Tally{before, after, (int64_t)moved, (int64_t)many};
}

template <class T, int K, bool WIDE> __global__ void __launch_bounds__(THREADS, 2) strips(Job j, Cut k, Mode what) {
    DYN_SHARED(unsigned char, base);
    Room m;
    carve(base, k.lanes, N<T>, k.held, j.rank, K ? K : RANKS, K == 0, &m);
    Part t;
    t.lanes = k.lanes, t.lane = threadIdx.x % k.lanes, t.group = threadIdx.x / k.lanes, t.groups = THREADS / k.lanes;
    t.rows = (int)j.rows, t.chunks = (t.rows + CHUNK - 1) / CHUNK, t.held = k.held;
    t.pitch = j.cols * sizeof(T);
    for (int64_t task = blockIdx.x; task < j.count * j.strips; task += gridDim.x) {
        const int64_t matrix = j.first + task / j.strips, column = task % j.strips * t.lanes * N<T>;
        const int64_t at = column + t.lane * N<T>;
        t.n = (int)max((int64_t)0, min((int64_t)N<T>, j.cols - at));
        t.dst = dst_of(j, matrix) + at * sizeof(T);
        t.src = what == AFTER ? t.dst : src_of(j, matrix) + at * sizeof(T);
        if (wide(src_of(j, matrix), dst_of(j, matrix), t.pitch) != WIDE) continue;
        if (j.strength[matrix] == 0.0f && !j.looked_at) {
            if (what != AFTER && t.src != t.dst) copy<T, WIDE>(t);
            if (j.sums && threadIdx.x == 0) j.sums[task] = Tally{0, 0, 0, 0};
        } else if constexpr (K > 0) {
            plain<T, K, WIDE>(j, t, m, matrix, column);
        } else {
            const Tally sum = full<T, WIDE>(j, t, m, matrix, column, what);
            if (j.sums && threadIdx.x == 0) j.sums[task] = sum;
        }
    }
}

/* ------------------------------------------------------------------------------------- R on the columns: whole rows */

/* A block's rows in shared memory. Item i = chunk * tall + row is a chunk of 64 weights of a row, a thread's portion; its 16-byte
 * units are stored in the order given by exclusive or with i, so that eight threads side by side meet all banks. */
struct Rack {
    unsigned char *tile;    /* [tall, chunks * CHUNK] weights */
    float *partial;         /* [RANKS, items] */
    float *c;               /* [rank, tall] */
    float *length, *left, *gain; /* [tall] */
    double *fold;
    int tall, shift, rows;  /* rows of the tile, a power of two, its logarithm, and those inside the matrix */
    int along, chunks, items;
};

__host__ __device__ inline size_t carve(unsigned char *base, int tall, int chunks, int size, int rank, Rack *m) {
    const size_t items = (size_t)tall * chunks;
    size_t at = 0;
    lay(m->tile, base, at, items * CHUNK * size);
    lay(m->partial, base, at, (rank < RANKS ? rank : RANKS) * items * 4);
    lay(m->c, base, at, (size_t)rank * tall * 4);
    lay(m->length, base, at, (size_t)tall * 4);
    lay(m->left, base, at, (size_t)tall * 4);
    lay(m->gain, base, at, (size_t)tall * 4);
    lay(m->fold, base, at, WARP * sizeof(double));
    return at;
}

/* an item's units: number u is at [u ^ (item & 7)] */
template <class T> __device__ inline uint4 *units_of(const Rack &m, int item) {
    const int row = item & (m.tall - 1), chunk = item >> m.shift;
    return reinterpret_cast<uint4 *>(m.tile + ((size_t)row * m.chunks + chunk) * CHUNK * sizeof(T));
}
template <class T> __device__ inline uint4 *unit_of(const Rack &m, int row, int at) {
    const int item = (at * N<T> / CHUNK << m.shift) + row;
    return units_of<T>(m, item) + (at % (CHUNK / N<T>) ^ (item & 7));
}

/* some rows of a matrix to the tile; what lies beyond a row's end is zero */
template <class T, bool WIDE> __device__ inline void load(const Rack &m, const char *src) {
    const int units = m.chunks * CHUNK / N<T>;
    for (int row = 0; row < m.rows; row++)
        for (int at = threadIdx.x; at < units; at += THREADS) {
            const int n = m.along - at * N<T>;
            const char *from = src + ((size_t)row * m.along + (size_t)at * N<T>) * sizeof(T);
            if (WIDE && n > 0) cp_async16(unit_of<T>(m, row, at), from);
            else *unit_of<T>(m, row, at) = gather<T>(from, n);
        }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

template <class T, bool WIDE> __device__ inline void unload(const Rack &m, char *dst) {
    const int units = (m.along + N<T> - 1) / N<T>;
    for (int row = 0; row < m.rows; row++)
        for (int at = threadIdx.x; at < units; at += THREADS) {
            char *to = dst + ((size_t)row * m.along + (size_t)at * N<T>) * sizeof(T);
            const uint4 v = *unit_of<T>(m, row, at);
            if (WIDE) store_drop(to, v);
            else scatter<T>(to, v, m.along - at * N<T>);
        }
    __syncthreads();
}

/* N values of a direction from column h on, zero beyond the end */
template <int COUNT> __device__ inline void basis_at(const float *b, int h, int along, float (&k)[COUNT]) {
    if (h + COUNT <= along && (reinterpret_cast<uintptr_t>(b) & 15) == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 v = __ldg(reinterpret_cast<const float4 *>(b + h + i));
            k[i] = v.x, k[i + 1] = v.y, k[i + 2] = v.z, k[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) k[i] = h + i < along ? __ldg(b + h + i) : 0.0f;
    }
}

/* canonical sums of the rows of a tile: out[i, row] = sum over columns of what term(row, h, x, p) adds to p[i] */
template <class T, int SUMS, class Term> __device__ inline void row_sums(const Rack &m, float *out, Term term) {
    for (int item = threadIdx.x; item < m.items; item += THREADS) {
        float p[SUMS] = {};
        const int row = item & (m.tall - 1), first = (item >> m.shift) * CHUNK;
        const uint4 *units = units_of<T>(m, item);
        for (int u = 0; row < m.rows && u < CHUNK / N<T>; u++) {
            float x[N<T>];
            unpack<T>(units[u ^ (item & 7)], x);
            term(row, first + u * N<T>, x, p);
        }
#pragma unroll
        for (int i = 0; i < SUMS; i++) m.partial[i * m.items + item] = p[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SUMS * m.tall; i += THREADS) {
        float hi = 0, lo = 0;
        const float *from = m.partial + i / m.tall * m.items + i % m.tall;
        for (int chunk = 0; chunk < m.chunks; chunk++) add_to(hi, lo, from[chunk * m.tall]);
        out[i] = hi + lo;
    }
    __syncthreads();
}

template <class T, int SUMS> __device__ inline void row_dots(const Rack &m, float *out, const float *basis) {
    row_sums<T, SUMS>(m, out, [&](int, int h, const float(&x)[N<T>], float(&p)[SUMS]) {
#pragma unroll
        for (int r = 0; r < SUMS; r++) {
            float b[N<T>];
            basis_at<N<T>>(basis + (size_t)r * m.along, h, m.along, b);
#pragma unroll
            for (int i = 0; i < N<T>; i++) p[r] = fmaf(b[i], x[i], p[r]);
        }
    });
}

template <class T> __device__ inline void all_row_dots(const Job &j, const Rack &m) {
    for (int r = 0; r < j.rank; r += RANKS) {
        const float *basis = j.basis + (size_t)r * m.along;
        float *out = m.c + r * m.tall;
        if (j.rank - r >= 4) row_dots<T, 4>(m, out, basis);
        else if (j.rank - r == 3) row_dots<T, 3>(m, out, basis);
        else if (j.rank - r == 2) row_dots<T, 2>(m, out, basis);
        else row_dots<T, 1>(m, out, basis);
    }
}

/* what is subtracted from N weights of a row from column h on */
template <class T> __device__ inline void row_delta(const Job &j, const Rack &m, float strength, int row, int h, float (&d)[N<T>]) {
#pragma unroll
    for (int i = 0; i < N<T>; i++) d[i] = 0;
    for (int r = 0; r < j.rank; r++) {
        float b[N<T>];
        const float c = m.c[r * m.tall + row];
        basis_at<N<T>>(j.basis + (size_t)r * m.along, h, m.along, b);
#pragma unroll
        for (int i = 0; i < N<T>; i++) d[i] = fmaf(strength * b[i], c, d[i]);
    }
}

/* |row|^2 before the edit, or after it but for the gain; columns beyond the end add nothing */
template <class T, bool EDITED> __device__ inline void row_squares(const Job &j, const Rack &m, float strength, float *out) {
    row_sums<T, 1>(m, out, [&](int row, int h, const float(&x)[N<T>], float(&p)[1]) {
        float d[N<T>];
        if (EDITED) row_delta<T>(j, m, strength, row, h, d);
#pragma unroll
        for (int i = 0; i < N<T>; i++) {
            const float y = EDITED ? x[i] - d[i] : x[i];
            if (h + i < m.along) p[0] = fmaf(y, y, p[0]);
        }
    });
}

template <class T> __device__ inline int row_update(const Job &j, const Rack &m, float strength, const float *gain) {
    int changed = 0;
    for (int item = threadIdx.x; item < m.items; item += THREADS) {
        const int row = item & (m.tall - 1), first = (item >> m.shift) * CHUNK;
        uint4 *units = units_of<T>(m, item);
        for (int u = 0; row < m.rows && u < CHUNK / N<T>; u++) {
            float x[N<T>], d[N<T>];
            uint4 *at = units + (u ^ (item & 7));
            const uint4 old = *at;
            const int h = first + u * N<T>;
            unpack<T>(old, x);
            row_delta<T>(j, m, strength, row, h, d);
#pragma unroll
            for (int i = 0; i < N<T>; i++) x[i] = x[i] - d[i];
#pragma unroll
            for (int i = 0; i < N<T>; i++)
                if (gain) x[i] = x[i] * gain[row];
            const uint4 edited = pack<T>(x);
            if (j.changed) changed += differing<T>(old, edited, m.along - h);
            *at = edited;
        }
    }
    __syncthreads();
    return changed;
}

template <class T> __device__ inline int row_special(const Rack &m) {
    int bad = 0;
    for (int item = threadIdx.x; item < m.items; item += THREADS)
        for (int u = 0; (item & (m.tall - 1)) < m.rows && u < CHUNK / N<T>; u++)
            bad += special<T>(units_of<T>(m, item)[u ^ (item & 7)], m.along - (item >> m.shift) * CHUNK - u * N<T>);
    return bad;
}

__device__ inline double row_square_sum(const Job &j, const Rack &m) {
    double sum = 0;
    for (int i = threadIdx.x; i < j.rank * m.tall; i += THREADS)
        if (i % m.tall < m.rows) sum += (double)m.c[i] * (double)m.c[i];
    return block_sum(sum, m.fold);
}

template <class T, bool WIDE>
__device__ inline Tally row_block(const Job &j, const Rack &m, const char *src, char *dst, int64_t matrix, int64_t first) {
    const float strength = j.strength[matrix];
    int changed = 0;
    load<T, WIDE>(m, src);
    const int bad = j.nonfinite ? row_special<T>(m) : 0;
    all_row_dots<T>(j, m);
    for (int i = threadIdx.x; j.c && i < j.rank * m.tall; i += THREADS)
        if (i % m.tall < m.rows) j.c[((matrix - j.first) * j.rank + i / m.tall) * j.rows + first + i % m.tall] = m.c[i];
    double before = j.before || j.after ? row_square_sum(j, m) : 0, after = before;
    if (strength != 0.0f) {
        if (j.norm != EXC_NORM_NONE) {
            row_squares<T, false>(j, m, strength, m.length);
            row_squares<T, true>(j, m, strength, m.left);
            for (int i = threadIdx.x; i < m.tall; i += THREADS) m.gain[i] = gain_of((double)m.length[i], (double)m.left[i]);
            __syncthreads();
        }
        changed = row_update<T>(j, m, strength, j.norm != EXC_NORM_NONE ? m.gain : nullptr);
        if (j.after) {
            all_row_dots<T>(j, m);
            after = row_square_sum(j, m);
        }
    }
    if (strength != 0.0f || src != dst) unload<T, WIDE>(m, dst);
    else __syncthreads(); /* the tile is read until here */
    if (!j.sums) return Tally{};
    const double moved = block_sum((double)changed, m.fold), many = block_sum((double)bad, m.fold);
    return Tally{before, after, (int64_t)moved, (int64_t)many};
}

template <class T, bool WIDE> __global__ void __launch_bounds__(THREADS, 2) rows(Job j, int tall) {
    DYN_SHARED(unsigned char, base);
    Rack m;
    m.tall = tall, m.shift = __ffs(tall) - 1, m.along = (int)j.cols, m.chunks = (m.along + CHUNK - 1) / CHUNK, m.items = m.chunks * tall;
    carve(base, tall, m.chunks, sizeof(T), j.rank, &m);
    for (int64_t task = blockIdx.x; task < j.count * j.strips; task += gridDim.x) {
        const int64_t matrix = j.first + task / j.strips, first = task % j.strips * tall;
        const int64_t off = first * j.cols * sizeof(T);
        const char *src = src_of(j, matrix) + off;
        char *dst = dst_of(j, matrix) + off;
        m.rows = (int)min((int64_t)tall, j.rows - first);
        if (wide(src_of(j, matrix), dst_of(j, matrix), j.cols * sizeof(T)) != WIDE) continue;
        if (j.strength[matrix] == 0.0f && src == dst && !j.looked_at) {
            if (j.sums && threadIdx.x == 0) j.sums[task] = Tally{};
            continue;
        }
        const Tally sum = row_block<T, WIDE>(j, m, src, dst, matrix, first);
        if (j.sums && threadIdx.x == 0) j.sums[task] = sum;
    }
}

/* --------------------------------------------------------------------------------------- R on the rows, norms of rows */

/* |x|^2 of a row in the order of project.c: 16 threads hold a sum each, then the tail, then the sums in order */
template <class Value> __device__ inline double lane_square(int n, int lane, unsigned mask, Value value) {
    const int whole = n / 16 * 16;
    double sum = 0, total = 0;
    for (int i = lane; i < whole; i += 16) {
        const double x = (double)value(i);
        sum = sum + x * x;
    }
    for (int i = whole; i < n; i++) {
        const double x = (double)value(i);
        total = total + x * x;
    }
    for (int l = 0; l < 16; l++) total = total + __shfl_sync(mask, sum, l, 16);
    return total;
}

/* half a warp takes a row: its length before and after, then its weights */
template <class T> __global__ void __launch_bounds__(THREADS) rescaled(Job j, int64_t *changed) {
    const int lane = threadIdx.x % 16, I = (int)j.cols;
    const unsigned mask = 0xffffu << (threadIdx.x % 32 / 16 * 16);
    const int64_t step = (int64_t)gridDim.x * (THREADS / 16), total = j.count * j.rows;
    for (int64_t at = (int64_t)blockIdx.x * (THREADS / 16) + threadIdx.x / 16; at < total; at += step) {
        const int64_t matrix = j.first + at / j.rows, h = at % j.rows;
        const float strength = j.strength[matrix];
        if (strength == 0.0f) continue;
        const char *src = src_of(j, matrix) + h * I * sizeof(T);
        char *dst = dst_of(j, matrix) + h * I * sizeof(T);
        const float *c = j.c + (at / j.rows) * j.rank * j.cols;
        auto weight = [&](int i) {
            float x[N<T>];
            unpack<T>(gather<T>(src + (size_t)i * sizeof(T), 1), x);
            return x[0];
        };
        auto edited = [&](int i) {
            float d = 0;
            for (int r = 0; r < j.rank; r++)
                d = d + strength * __ldg(j.basis + (size_t)r * j.rows + h) * c[(size_t)r * I + i]; /* as project.c: not fused */
            return weight(i) - d;
        };
        const double before = lane_square(I, lane, mask, weight), after = lane_square(I, lane, mask, edited);
        const float gain = gain_of(before, after);
        __syncwarp(mask); /* all have read the tail */
        unsigned moved = 0;
        for (int i = lane; i < I; i += 16) {
            float x[N<T>] = {};
            x[0] = edited(i) * gain;
            const uint4 v = pack<T>(x);
            moved += differing<T>(gather<T>(src + (size_t)i * sizeof(T), 1), v, 1);
            scatter<T>(dst + (size_t)i * sizeof(T), v, 1);
        }
        if (!changed) continue;
        moved = __reduce_add_sync(mask, moved);
        if (lane == 0) atomicAdd(reinterpret_cast<unsigned long long *>(changed + matrix), (unsigned long long)moved);
    }
}

/* ------------------------------------------------------------------------------------------------------ the op */

/* sums of a matrix from those of its strips, in order */
__global__ void __launch_bounds__(64) collect(const Tally *sums, int64_t strips, int64_t count, double *before, double *after,
                                              int64_t *changed, int64_t *nonfinite) {
    const int64_t m = (int64_t)blockIdx.x * 64 + threadIdx.x;
    if (m >= count) return;
    Tally all = {};
    for (int64_t s = 0; s < strips; s++) {
        const Tally &t = sums[m * strips + s];
        all.before += t.before, all.after += t.after, all.changed += t.changed, all.nonfinite += t.nonfinite;
    }
    if (before) before[m] = all.before;
    if (after) after[m] = all.after;
    if (changed) changed[m] = all.changed;
    if (nonfinite) nonfinite[m] = all.nonfinite;
}

struct Device {
    int processors;
    size_t shared, cache; /* bytes a block may have, of the second-level cache */
};

/* a call under way: what its rounds share */
struct Call {
    const struct exc_project_args *a;
    exc_queue *q;
    Device d;
    Job j;
};

cudaError_t look_at(int device, Device *d) {
    int shared = 0, cache = 0;
    cudaError_t e = cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
    d->shared = (size_t)shared, d->cache = (size_t)cache;
    return e;
}

/* Strips of 128 bytes, or of 64 and fewer blocks, until what waits between the sweeps takes at most half the cache: lines are
 * kept in both halves of it. */
Cut choose(const Device &d, int64_t rows, int n, int rank, int at_once, bool extra) {
    static const struct {
        int lanes, blocks;
    } ways[] = {{8, 2}, {4, 2}, {4, 1}};
    const int chunks = (int)ceil_div(rows, CHUNK);
    Cut k = {};
    for (auto &way : ways) {
        Room none;
        const size_t room = way.blocks == 1 ? d.shared : (d.shared + 1024) / 2 - 1024; /* a block's own kilobyte */
        const size_t fixed = carve(nullptr, way.lanes, n, 0, rank, at_once, extra, &none), chunk = (size_t)CHUNK * way.lanes * 16;
        const int fit = room > fixed ? (int)((room - fixed) / chunk) : 0;
        k = Cut{way.lanes, fit < chunks ? fit : chunks, way.blocks * d.processors, 0};
        k.bytes = fixed + k.held * chunk;
        if ((size_t)(chunks - k.held) * chunk * k.blocks <= d.cache / 2) break;
    }
    return k;
}

/* One launch over the matrices whose rows begin at multiples of 16 bytes, one over the others; where the addresses are known here,
 * one of them is enough. */
template <class Launch> exc_status wide_and_narrow(const Job &j, size_t row_bytes, Launch launch) {
    const uintptr_t all = (uintptr_t)j.src_base | (uintptr_t)j.dst_base | (uintptr_t)j.src_stride | (uintptr_t)j.dst_stride;
    const bool known = !j.src, can = row_bytes % 16 == 0 && (!known || all % 16 == 0);
    exc_status st = can ? launch(std::true_type()) : EXC_OK;
    return st == EXC_OK && !(known && can) ? launch(std::false_type()) : st;
}

int64_t strips_of(const Job &j, const Cut &k, int n) { return ceil_div(j.cols, k.lanes * n); }

template <class T, int K, bool WIDE> exc_status start_strips(const Call &c, const Cut &k, Mode what) {
    Job j = c.j;
    j.strips = strips_of(j, k, N<T>);
    const int64_t tasks = j.count * j.strips;
    ENQUEUE(c.q, (strips<T, K, WIDE>), (unsigned)(tasks < k.blocks ? tasks : k.blocks), THREADS, k.bytes, j, k, what);
    return EXC_OK;
}

/* the cut of the kernels that know everything; sums are counted by its strips */
template <class T> Cut full_cut(const Call &c) { return choose(c.d, c.j.rows, N<T>, c.j.rank, RANKS, true); }

template <class T> exc_status edit_strips(const Call &c, Mode what) {
    const int rank = c.j.rank;
    const bool plain = !c.j.sums && c.j.norm == EXC_NORM_NONE && rank <= RANKS;
    const Cut few = choose(c.d, c.j.rows, N<T>, rank, rank, false);
    return wide_and_narrow(c.j, (size_t)c.j.cols * sizeof(T), [&](auto is_wide) {
        constexpr bool WIDE = decltype(is_wide)::value;
        if constexpr (WIDE) {
            if (plain && rank == 1) return start_strips<T, 1, WIDE>(c, few, what);
            if (plain && rank == 2) return start_strips<T, 2, WIDE>(c, few, what);
            if (plain && rank == 3) return start_strips<T, 3, WIDE>(c, few, what);
            if (plain && rank == 4) return start_strips<T, 4, WIDE>(c, few, what);
        }
        return start_strips<T, 0, WIDE>(c, full_cut<T>(c), what);
    });
}

/* rows of a tile: as many as let three blocks share a processor, 32 at most; 0: not one fits */
template <class T> int tall_of(const Call &c, size_t *bytes) {
    const int chunks = (int)ceil_div(c.j.cols, CHUNK);
    Rack none;
    int tall = 32;
    while (tall > 1 && carve(nullptr, tall, chunks, sizeof(T), c.j.rank, &none) > c.d.shared / 3) tall /= 2;
    *bytes = carve(nullptr, tall, chunks, sizeof(T), c.j.rank, &none);
    return *bytes <= c.d.shared ? tall : 0;
}

template <class T> exc_status edit_rows(const Call &c) {
    size_t bytes;
    const int tall = tall_of<T>(c, &bytes);
    const int64_t tasks = c.j.count * c.j.strips, most = (int64_t)c.d.processors * 3;
    return wide_and_narrow(c.j, (size_t)c.j.cols * sizeof(T), [&](auto is_wide) {
        ENQUEUE(c.q, (rows<T, decltype(is_wide)::value>), (unsigned)(tasks < most ? tasks : most), THREADS, bytes, c.j, tall);
        return EXC_OK;
    });
}

/* sums of the round's matrices to where the caller wants them */
exc_status give(const Call &c, double *before, double *after, int64_t *changed, int64_t *nonfinite) {
    const int64_t f = c.j.first;
    if (!c.j.sums) return EXC_OK;
    ENQUEUE(c.q, collect, grid_for(c.j.count, 64), 64, 0, (const Tally *)c.j.sums, c.j.strips, c.j.count, before ? before + f : nullptr,
            after ? after + f : nullptr, changed ? changed + f : nullptr, nonfinite ? nonfinite + f : nullptr);
    return EXC_OK;
}

/* norms of rows of EXC_SIDE_OUT: c, then row by row, then what is left */
template <class T> exc_status rescale(Call &c) {
    const struct exc_project_args *a = c.a;
    EXC_PASS(edit_strips<T>(c, DOTS));
    EXC_PASS(give(c, a->before, nullptr, a->changed, a->nonfinite));
    ENQUEUE(c.q, (rescaled<T>), grid_for(c.j.count * c.j.rows, THREADS / 16, 1, c.d.processors * 8), THREADS, 0, c.j, a->changed);
    if (!a->after) return EXC_OK;
    Call left = c;
    left.j.nonfinite = 0;
    EXC_PASS(edit_strips<T>(left, AFTER));
    return give(c, nullptr, a->after, nullptr, nullptr);
}

/* Matrices of a round: what they need of the scratch is bounded, and c of a round is found in the cache. */
constexpr size_t ROUND_BYTES = (size_t)16 << 20;

template <class T> exc_status project(Call &c) {
    const struct exc_project_args *a = c.a;
    Job &j = c.j;
    const bool out = a->side == EXC_SIDE_OUT, by_rows = out && a->norm == EXC_NORM_ROW;
    size_t bytes = 0;
    const int tall = out ? 0 : tall_of<T>(c, &bytes);
    if (!out && !tall) return EXC_ERR_USAGE;
    j.src_stride *= sizeof(T), j.dst_stride *= sizeof(T);
    j.strips = out ? strips_of(j, full_cut<T>(c), N<T>) : ceil_div(j.rows, tall);
    const int64_t c_size = a->rank * (out ? a->cols : a->rows), own = by_rows && !a->c ? c_size : 0;
    const int64_t sums = j.before || j.after || j.changed || j.nonfinite ? j.strips : 0;
    const int64_t each = own * (int64_t)sizeof(float) + sums * (int64_t)sizeof(Tally);
    int64_t round = each ? (int64_t)ROUND_BYTES / each : a->count;
    round = round < 1 ? 1 : round < a->count ? round : a->count;
    Carve work(c.q);
    float *own_c = work.take<float>(round * own);
    Tally *own_sums = work.take<Tally>(round * sums);
    if (!work.ready()) return work.status;
    for (j.first = 0; j.first < a->count; j.first += round) {
        j.count = a->count - j.first < round ? a->count - j.first : round;
        j.c = a->c ? a->c + j.first * c_size : own ? own_c : nullptr;
        j.sums = sums ? own_sums : nullptr;
        if (by_rows) {
            EXC_PASS(rescale<T>(c));
            continue;
        }
        EXC_PASS(out ? edit_strips<T>(c, EDIT) : edit_rows<T>(c));
        EXC_PASS(give(c, a->before, a->after, a->changed, a->nonfinite));
    }
    return EXC_OK;
}

} // namespace

extern "C" exc_status exc_cuda_project(exc_queue *q, const struct exc_project_args *a) {
    if (a->count < 0 || a->rows < 0 || a->cols < 0 || a->rank < 1 || a->rank > MOST_RANK) return EXC_ERR_USAGE;
    if (a->dtype != EXC_BF16 && a->dtype != EXC_F16 && a->dtype != EXC_F32) return EXC_ERR_USAGE;
    if (a->norm < EXC_NORM_NONE || a->norm > EXC_NORM_ROW) return EXC_ERR_USAGE;
    if (a->side != EXC_SIDE_OUT && a->side != EXC_SIDE_IN) return EXC_ERR_USAGE;
    if (a->rows > MOST || a->cols > MOST) return EXC_ERR_USAGE;
    Call c = {a, q, {}, {}};
    EXC_PASS(exc_enqueued(q, "project", look_at(q->device, &c.d)));
    Job &j = c.j;
    j.src = a->src, j.dst = a->dst;
    j.src_base = static_cast<const char *>(a->src_base), j.dst_base = static_cast<char *>(a->dst_base);
    j.src_stride = a->src_stride, j.dst_stride = a->dst_stride;
    j.rows = a->rows, j.cols = a->cols, j.basis = a->basis, j.rank = (int)a->rank, j.norm = a->norm;
    j.strength = a->strength;
    j.before = a->before != nullptr, j.after = a->after != nullptr, j.changed = a->changed != nullptr;
    j.nonfinite = a->nonfinite != nullptr;
    j.looked_at = j.before || j.after || j.nonfinite || a->c;
    BY_DTYPE(a->dtype, return project<T>(c));
    return EXC_ERR_USAGE;
}
