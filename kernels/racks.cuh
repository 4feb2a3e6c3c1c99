/* racks.cuh - edits with R on the columns: a block takes some whole rows to shared memory, edits them there,
 * writes them back.
 *
 * A row's chunks of 64 columns are portions of threads, as they are of rows in strips.cuh. Sums of chunks
 * meet in shared memory, where one thread a row and direction adds them in ascending order. All further
 * sweeps are over shared memory. */
#ifndef EXC_RACKS_CUH
#define EXC_RACKS_CUH

#include "edit.cuh"

namespace edit {

/* A block's rows in shared memory. Item i = chunk * tall + row is a chunk of 64 weights of a row, a thread's
 * portion; its 16-byte units are stored in the order given by exclusive or with i, so that eight threads side
 * by side meet all banks. */
struct Rack {
    unsigned char *tile;         /* [tall, chunks * CHUNK] weights */
    float *partial;              /* [RANKS, items] */
    float *c;                    /* [rank, tall] */
    float *length, *left, *gain; /* [tall] */
    double *fold;
    int tall, shift, rows; /* rows of the tile, a power of two, its logarithm, and those inside the matrix */
    int along, chunks, items;
};

__host__ __device__ inline size_t carve(unsigned char *base, int tall, int chunks, int size, int rank,
                                        Rack *m) {
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
    return units_of<T>(m, item) + (at % (CHUNK / N<T>)^(item & 7));
}

/* some rows of a matrix to the tile; what lies beyond a row's end is zero */
template <class T, bool WIDE> __device__ inline void load(const Rack &m, const char *src) {
    const int units = m.chunks * CHUNK / N<T>;
    for (int row = 0; row < m.rows; row++)
        for (int at = threadIdx.x; at < units; at += THREADS) {
            const int n = m.along - at * N<T>;
            const char *from = src + ((size_t)row * m.along + (size_t)at * N<T>)*sizeof(T);
            if (WIDE && n > 0)
                cp_async16(unit_of<T>(m, row, at), from);
            else
                *unit_of<T>(m, row, at) = gather<T>(from, n);
        }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

template <class T, bool WIDE> __device__ inline void unload(const Rack &m, char *dst) {
    const int units = (m.along + N<T> - 1) / N<T>;
    for (int row = 0; row < m.rows; row++)
        for (int at = threadIdx.x; at < units; at += THREADS) {
            char *to = dst + ((size_t)row * m.along + (size_t)at * N<T>)*sizeof(T);
            const uint4 v = *unit_of<T>(m, row, at);
            if (WIDE)
                store_drop(to, v);
            else
                scatter<T>(to, v, m.along - at * N<T>);
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

/* canonical sums of the rows of a tile: out[i, row] = sum over columns of what term(row, h, x, p) adds to
 * p[i] */
template <class T, int SUMS, class Term>
__device__ inline void row_sums(const Rack &m, float *out, Term term) {
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
        if (j.rank - r >= 4)
            row_dots<T, 4>(m, out, basis);
        else if (j.rank - r == 3)
            row_dots<T, 3>(m, out, basis);
        else if (j.rank - r == 2)
            row_dots<T, 2>(m, out, basis);
        else
            row_dots<T, 1>(m, out, basis);
    }
}

/* what is subtracted from N weights of a row from column h on */
template <class T>
__device__ inline void row_delta(const Job &j, const Rack &m, float strength, int row, int h,
                                 float (&d)[N<T>]) {
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
template <class T, bool EDITED>
__device__ inline void row_squares(const Job &j, const Rack &m, float strength, float *out) {
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

template <class T>
__device__ inline int row_update(const Job &j, const Rack &m, float strength, const float *gain) {
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
            bad += special<T>(units_of<T>(m, item)[u ^ (item & 7)],
                              m.along - (item >> m.shift) * CHUNK - u * N<T>);
    return bad;
}

__device__ inline double row_square_sum(const Job &j, const Rack &m) {
    double sum = 0;
    for (int i = threadIdx.x; i < j.rank * m.tall; i += THREADS)
        if (i % m.tall < m.rows) sum += (double)m.c[i] * (double)m.c[i];
    return block_sum(sum, m.fold);
}

template <class T, bool WIDE>
__device__ inline Tally row_block(const Job &j, const Rack &m, const char *src, char *dst, int64_t matrix,
                                  int64_t first) {
    const float strength = j.strength[matrix];
    int changed = 0;
    load<T, WIDE>(m, src);
    const int bad = j.nonfinite ? row_special<T>(m) : 0;
    all_row_dots<T>(j, m);
    for (int i = threadIdx.x; j.c && i < j.rank * m.tall; i += THREADS)
        if (i % m.tall < m.rows)
            j.c[((matrix - j.first) * j.rank + i / m.tall) * j.rows + first + i % m.tall] = m.c[i];
    double before = j.before || j.after ? row_square_sum(j, m) : 0, after = before;
    if (strength != 0.0f) {
        if (j.norm != EXC_NORM_NONE) {
            row_squares<T, false>(j, m, strength, m.length);
            row_squares<T, true>(j, m, strength, m.left);
            for (int i = threadIdx.x; i < m.tall; i += THREADS)
                m.gain[i] = gain_of((double)m.length[i], (double)m.left[i]);
            __syncthreads();
        }
        changed = row_update<T>(j, m, strength, j.norm != EXC_NORM_NONE ? m.gain : nullptr);
        if (j.after) {
            all_row_dots<T>(j, m);
            after = row_square_sum(j, m);
        }
    }
    if (strength != 0.0f || src != dst)
        unload<T, WIDE>(m, dst);
    else
        __syncthreads(); /* the tile is read until here */
    if (!j.sums) return Tally{};
    const double moved = block_sum((double)changed, m.fold), many = block_sum((double)bad, m.fold);
    return Tally{before, after, (int64_t)moved, (int64_t)many};
}

template <class T, bool WIDE> __global__ void __launch_bounds__(THREADS, 2) rows(Job j, int tall) {
    DYN_SHARED(unsigned char, base);
    Rack m;
    m.tall = tall, m.shift = __ffs(tall) - 1, m.along = (int)j.cols, m.chunks = (m.along + CHUNK - 1) / CHUNK,
    m.items = m.chunks * tall;
    carve(base, tall, m.chunks, sizeof(T), j.rank, &m);
    for (int64_t task = blockIdx.x; task < j.count * j.strips; task += gridDim.x) {
        const int64_t matrix = j.first + task / j.strips, first = task % j.strips * tall;
        const int64_t off = first * j.cols * sizeof(T);
        const char *src = src_of(j, matrix) + off;
        char *dst = dst_of(j, matrix) + off;
        m.rows = (int)min((int64_t)tall, j.rows - first);
        if (wide(src_of(j, matrix), dst_of(j, matrix), j.cols * sizeof(T)) != WIDE) continue;
        if (j.strength[matrix] == 0.0f && src == dst && !j.looked_at) continue;
        const Tally sum = row_block<T, WIDE>(j, m, src, dst, matrix, first);
        if (j.sums && threadIdx.x == 0) j.sums[task] = sum;
    }
}

} // namespace edit

#endif
