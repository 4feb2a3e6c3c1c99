/* strips.cuh - edits with R on the rows: a block owns a strip of all rows and 64 or 128 bytes of them
 * (project.cu says why).
 *
 * Two sweeps: sums(), in waves of chunks, and update(). A thread takes the same chunks of the same 16 bytes
 * in every sweep, so the weights held in shared memory, and what it has written, are its own and need no
 * barrier. `plain` is the common edit, with the directions in registers; `full` does all that may be asked
 * for, sweep after sweep over the same strip. */
#ifndef EXC_STRIPS_CUH
#define EXC_STRIPS_CUH

#include "edit.cuh"

namespace edit {

/* how strips are cut, and what a block keeps in shared memory */
struct Cut {
    int lanes;    /* pieces of a row of the strip: 4 or 8 */
    int held;     /* leading chunks that stay in shared memory */
    int blocks;   /* of the grid */
    size_t bytes; /* of shared memory */
};

/* this thread's part of a strip */
struct Part {
    const char *src; /* its piece of row 0 */
    char *dst;
    int64_t pitch;     /* bytes between rows */
    int n;             /* weights of its piece inside the matrix, 0: none */
    int group, groups; /* it takes chunks group, group + groups, ... */
    int lane, lanes;
    int rows, chunks, held;
};

/* shared memory of a block, carved alike by host and device */
struct Room {
    uint4 *held;                 /* [held * CHUNK, lanes] */
    float *partial;              /* [sums at once, groups, columns] */
    float *c;                    /* [rank, columns] */
    float *length, *left, *gain; /* [columns] */
    double *fold;                /* [WARP] */
};

__host__ __device__ inline size_t carve(unsigned char *base, int lanes, int n, int held, int rank,
                                        int at_once, bool extra, Room *m) {
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
    if (!WIDE)
        scatter<T>(t.dst + h * t.pitch, v, t.n);
    else if (t.n)
        store_drop(t.dst + h * t.pitch, v);
}

/* pieces that a thread of `plain` asks for at once beside k directions' sums: what registers allow */
__host__ __device__ constexpr int ahead(int k) { return k < 4 ? 8 : 4; }

/* The canonical sums of a strip: out[i, column] = sum over rows of what term() adds to p[i]. row(h, chunk)
 * gives the weights, meet(h, chunk, v) sees them on their way. Waves of `groups` chunks; after each, one
 * thread a sum folds the wave's partial sums, in ascending order. */
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
                    *reinterpret_cast<float4 *>(partial + (i * t.groups + t.group) * columns + t.lane * N<T> +
                                                k) =
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
template <class T, int SUMS, int AHEAD, class Row, class Meet>
__device__ inline void dots(const Part &t, float *partial, float *out, const float *basis, Row row,
                            Meet meet) {
    sums<T, SUMS, AHEAD>(t, partial, out, row, meet,
                               [&](int h, const float(&x)[N<T>], float(&p)[SUMS][N<T>]) {
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
__device__ inline void delta(const Job &j, const Part &t, float strength,
                             const float (&held)[K ? K : 1][N<T>], const float *c, int h, float (&d)[N<T>]) {
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
    constexpr int AHEAD = K ? ahead(K) : WIDE ? 2 : 1;
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
        if (chunk < t.held)
            down(chunk, [&](int h) { return m.held[h * t.lanes + t.lane]; });
        else
            down(chunk, [&](int h) { return fetch<T, WIDE>(t, h, true); });
    }
    return changed;
}

/* |column|^2 of the strip before the edit, or after it but for the gain */
template <class T, bool EDITED, class Row>
__device__ inline void squares(const Job &j, const Part &t, float strength, const Room &m, float *out,
                               Row row) {
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
        for (int h = chunk * CHUNK; h < min((chunk + 1) * CHUNK, t.rows); h++)
            put<T, WIDE>(t, h, fetch<T, WIDE>(t, h, true));
}

/* c of all directions, RANKS at a time. begin: the first sweep over the strip, which fills what is held;
 * returns the NaN and infinities that this thread then meets, where they are counted */
template <class T, bool WIDE>
__device__ inline int all_dots(const Job &j, const Part &t, const Room &m, bool begin) {
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
        constexpr int AHEAD = WIDE ? 2 : 1;
        if (j.rank - r >= 4)
            dots<T, 4, AHEAD>(t, m.partial, out, basis, row, meet);
        else if (j.rank - r == 3)
            dots<T, 3, AHEAD>(t, m.partial, out, basis, row, meet);
        else if (j.rank - r == 2)
            dots<T, 2, AHEAD>(t, m.partial, out, basis, row, meet);
        else
            dots<T, 1, AHEAD>(t, m.partial, out, basis, row, meet);
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
    dots<T, K, ahead(K)>(t, m.partial, m.c, j.basis, row, hold);
    keep(j, m, t.lanes * N<T>, matrix, column);
    if (j.strength[matrix] != 0.0f)
        update<T, K, WIDE>(j, t, j.strength[matrix], m, nullptr);
    else if (t.src != t.dst)
        copy<T, WIDE>(t);
}

/* one strip, any rank, and everything that may be asked for */
template <class T, bool WIDE>
__device__ inline Tally full(const Job &j, const Part &t, const Room &m, int64_t matrix, int64_t column,
                             Mode what) {
    const float strength = j.strength[matrix];
    const int columns = t.lanes * N<T>;
    int changed = 0;
    auto row = [&](int h, int chunk) {
        return chunk < t.held ? m.held[h * t.lanes + t.lane] : fetch<T, WIDE>(t, h, false);
    };
    double before = 0, after = 0;
    int bad = 0;
    Part now = t;
    for (bool begin = true;; begin = false) { /* the second time over what was written */
        bad += all_dots<T, WIDE>(j, now, m, begin);
        if (!begin) {
            after = square_sum(j, m, columns);
            break;
        }
        if (what != AFTER) keep(j, m, columns, matrix, column);
        before = after = j.before || j.after ? square_sum(j, m, columns) : 0;
        if (what != AFTER && strength == 0.0f && t.dst != t.src) copy<T, WIDE>(t);
        if (what != EDIT || strength == 0.0f) break;
        if (j.norm != EXC_NORM_NONE) {
            squares<T, false>(j, t, strength, m, m.length, row);
            squares<T, true>(j, t, strength, m, m.left, row);
            for (int i = threadIdx.x; i < columns; i += THREADS)
                m.gain[i] = gain_of((double)m.length[i], (double)m.left[i]);
            __syncthreads();
        }
        changed = update<T, 0, WIDE>(j, t, strength, m, j.norm != EXC_NORM_NONE ? m.gain : nullptr);
        if (!j.after) break;
        now.src = t.dst, now.held = 0; /* a thread reads what it has written */
    }
    const double many = j.sums ? block_sum((double)bad, m.fold) : 0,
                 moved = j.sums ? block_sum((double)changed, m.fold) : 0;
    return Tally{before, after, (int64_t)moved, (int64_t)many};
}

template <class T, int K, bool WIDE>
__global__ void __launch_bounds__(THREADS, 2) strips(Job j, Cut k, Mode what) {
    DYN_SHARED(unsigned char, base);
    Room m;
    carve(base, k.lanes, N<T>, k.held, j.rank, K ? K : RANKS, K == 0, &m);
    Part t;
    t.lanes = k.lanes, t.lane = threadIdx.x % k.lanes, t.group = threadIdx.x / k.lanes,
    t.groups = THREADS / k.lanes;
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
        } else if constexpr (K > 0) {
            plain<T, K, WIDE>(j, t, m, matrix, column);
        } else {
            const Tally sum = full<T, WIDE>(j, t, m, matrix, column, what);
            if (j.sums && threadIdx.x == 0) j.sums[task] = sum;
        }
    }
}

} // namespace edit

#endif
