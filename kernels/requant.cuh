/* requant.cuh - project where rounding is more than nearest even, on the device: requant.c, bit for bit, a
 * thread a line.
 *
 * A block takes a band: 128 lines across R (columns for EXC_SIDE_OUT, rows for EXC_SIDE_IN), which is a whole
 * number of scale blocks; a thread goes down its line in pieces of 32, half a piece in registers at a time,
 * sums of the first half waiting for the second. Sweeps as in requant.c: R W; lengths; the ideal result and with it the new scales; for exact rounding 12 trials; the
 * result. What a line keeps by direction lies in shared memory, [direction, line], or in the block's scratch
 * where there is too much of it; new scales lie in the scratch, as old ones are needed until the end. Lines
 * meet only where they share a scale. */
#ifndef EXC_REQUANT_CUH
#define EXC_REQUANT_CUH

#include "edit.cuh"
#include "grid.cuh"

namespace edit {

constexpr int BAND = 128, PIECE = 32, STEP = 16, TRIALS = 12;

/* sums of a band; of a matrix */
struct Requantised {
    double before, after, moved, error, size;
    long long changed, nonfinite;
};

struct Requant {
    exc_project_args a;
    const double *factor; /* [count] or NULL: W' = factor W instead */
    int64_t first, count; /* matrices of the round */
    int64_t along, whole, bands;
    const float *row_gain; /* [matrices of the round, along] or NULL */
    Requantised *sums;     /* [matrices of the round, parts] */
    int64_t parts;         /* at least a band, more where a band is shared by blocks */
    int summed, looked_at; /* any of these is wanted; c or those that matrices of strength 0 have too */
    int narrow; /* only matrices that do not begin at multiples of 16 bytes: octets.cuh has the others */
    char *scratch; /* a part a block: new scales, then what lines keep unless it is in shared memory */
    int64_t scratch_bytes, kept_bytes;
    int shared_lines; /* what lines keep is in shared memory */
};

/* what a line keeps by direction: arrays [rank, BAND], this thread's column */
struct Keep {
    double *acc, *target;
    float *part; /* of acc, while a piece is under way */
    float *coef, *lambda, *past, *best, *past_gap;
    __host__ __device__ static size_t bytes(int64_t rank, bool exact) {
        return (size_t)rank * BAND * (exact ? 40 : 16);
    }
    __device__ Keep(char *base, int64_t rank, bool exact) {
        const int64_t n = rank * BAND;
        acc = reinterpret_cast<double *>(base) + threadIdx.x;
        target = acc + (exact ? n : 0);
        coef = reinterpret_cast<float *>(acc + (exact ? 2 * n : n) - threadIdx.x) + threadIdx.x;
        part = coef + n, lambda = coef + 2 * n, past = coef + 3 * n, best = coef + 4 * n, past_gap = coef + 5 * n;
    }
};

/* a sum of squares: f32 within a piece, f64 beyond */
struct Square {
    double sum = 0;
    float part = 0;
};

/* ---- scale policy, as in requant.c */
__device__ inline bool powers_only(const exc_project_args &a) {
    return a.scale_power || a.scale_dtype == EXC_F8_E8M0;
}
__device__ inline float scaled(const exc_project_args &a, float base, float old) {
    const float s = old * base;
    if (base == 1.0f) return old;
    if (powers_only(a)) return s > 0x1p-127f ? s : 0x1p-127f;
    return a.scale_dtype == EXC_BF16 ? widen(narrow<bf16>(s)) : s;
}
/* of numbers of which the largest is given, where the scale was `was`, and `base` times that would be kept */
template <int DTYPE>
__device__ inline float next_scale(const exc_project_args &a, float base, float was, float largest) {
    const float old = scaled(a, base, was);
    if (!(largest < INFINITY) || old != old) return was;
    if (DTYPE == EXC_F4) {
        if (largest < 8.0f * old || largest < 0x1p-124f) return old;
        return f32_of((bits_of(largest) & 0x7f800000u) - (2u << 23));
    }
    if (largest <= 448.0f * fabsf(old)) return old;
    float s = largest / 448.0f;
    if (s < 0x1p-126f) s = 0x1p-126f;
    if (powers_only(a)) {
        const uint32_t u = (bits_of(s) + 0x7fffffu) & 0x7f800000u;
        return f32_of(u < 0x00800000u ? 0x00800000u : u);
    }
    return a.scale_dtype == EXC_BF16 ? f32_of((bits_of(s) + 0xffffu) & 0xffff0000u) : s;
}
/* scale i, which was `old`, to memory; where that is the same, or NaN, it stays, bit for bit. mend: NaN is none to keep */
__device__ inline void put_scale(const void *scale, void *scale_to, int dtype, int64_t i, float old, float s, bool mend) {
    const bool kept = bits_of(old) == bits_of(s) || (old != old && !mend);
    if (!kept || scale != scale_to) scale_put(scale_to, dtype, i, kept ? old : s);
}

template <int DTYPE, bool OUT> struct Line {
    static constexpr bool CODED = DTYPE == EXC_F8_E4M3 || DTYPE == EXC_F4;
    const Requant &q;
    const exc_project_args &a;
    Keep k;
    int64_t matrix, at; /* first line of the band */
    int lines, l;
    bool in; /* this line is inside the matrix */
    const uint8_t *src;
    uint8_t *dst;
    const uint8_t *scale;
    uint8_t *scale_to;
    uint32_t key;
    float base, gain;
    mutable float peak; /* of the ideal result since the last piece began */
    float *kept;
    unsigned *most; /* shared, [2] */
    const float *row_gain;

    __device__ int64_t row(int64_t h) const { return OUT ? h : at + l; }
    __device__ int64_t col(int64_t h) const { return OUT ? at + l : h; }

    /* ---- codes and scales */
    __device__ uint32_t read(int64_t h) const {
        const int64_t i = row(h) * a.cols + col(h);
        if (DTYPE == EXC_F8_E4M3) return src[i];
        if (DTYPE == EXC_F4) return src[i / 2] >> (i % 2 ? 4 : 0) & 15;
        return reinterpret_cast<const uint16_t *>(src)[i];
    }
    __device__ int64_t scale_place(int64_t h) const {
        if (DTYPE == EXC_F4) return row(h) * (a.cols / SCALE_GROUP) + col(h) / SCALE_GROUP;
        return row(h) / SCALE_BLOCK * ceil_div(a.cols, SCALE_BLOCK) + col(h) / SCALE_BLOCK;
    }
    __device__ int64_t kept_place(int64_t h) const {
        if (DTYPE == EXC_F8_E4M3) return h / SCALE_BLOCK;
        return OUT ? h * (BAND / SCALE_GROUP) + l / SCALE_GROUP : h / SCALE_GROUP * BAND + l;
    }
    __device__ float old_scale(int64_t h) const {
        return CODED && in ? scale_at(scale, a.scale_dtype, scale_place(h)) : 1.0f;
    }
    __device__ float new_scale(int64_t h) const { return CODED && in ? kept[kept_place(h)] : 1.0f; }
    /* whether the scale at h is another than at h - 1 */
    __device__ static bool turns(int h) { return DTYPE == EXC_F4 && OUT ? true : h == 0; }

    __device__ static float decode(uint32_t code, float scale) {
        if (DTYPE == EXC_F8_E4M3)
            return (code & 0x7f) == NAN_E4M3 ? f32_of(0x7fc00000u) : from_e4m3(code) * scale;
        if (DTYPE == EXC_F4) return from_e2m1(code) * scale;
        return DTYPE == EXC_BF16 ? widen(bf16{(uint16_t)code}) : widen(f16{(uint16_t)code});
    }

    __device__ void load(int64_t h0, int rows, float (&x)[STEP]) const {
        float s = 1;
#pragma unroll
        for (int h = 0; h < STEP; h++) {
            x[h] = 0;
            if (h >= rows || !in) continue;
            if (turns(h)) s = old_scale(h0 + h);
            x[h] = decode(read(h0 + h), s);
        }
    }

    /* ---- arithmetic of a piece */
    __device__ bool piece_ends(int64_t h0) const { return h0 % PIECE == PIECE - STEP || h0 + STEP >= q.along; }
    __device__ void dots(const float (&x)[STEP], int64_t h0, int rows) const {
        for (int64_t r = 0; r < a.rank; r++) {
            float sum = h0 % PIECE ? k.part[r * BAND] : 0.0f;
#pragma unroll
            for (int h = 0; h < STEP; h++)
                if (h < rows) sum = fmaf(__ldg(a.basis + r * q.along + h0 + h), x[h], sum);
            if (piece_ends(h0))
                k.acc[r * BAND] += (double)sum;
            else
                k.part[r * BAND] = sum;
        }
    }
    __device__ void clear() const {
        for (int64_t r = 0; r < a.rank; r++) k.acc[r * BAND] = 0;
    }
    /* y = by * (x - R^T coef) */
    __device__ void shift(const float (&x)[STEP], int64_t h0, int rows, const float *coef, float by,
                          const float *by_row, float (&y)[STEP]) const {
        float d[STEP] = {};
        for (int64_t r = 0; r < a.rank; r++) {
            const float c = coef[r * BAND];
#pragma unroll
            for (int h = 0; h < STEP; h++)
                if (h < rows) d[h] = fmaf(__ldg(a.basis + r * q.along + h0 + h), c, d[h]);
        }
#pragma unroll
        for (int h = 0; h < STEP; h++)
            y[h] = (x[h] - d[h]) * (by * (by_row && h < rows ? by_row[h0 + h] : 1.0f));
    }
    __device__ void ideal(const float (&x)[STEP], int64_t h0, int rows, float (&y)[STEP]) const {
        shift(x, h0, rows, k.coef, gain, row_gain, y);
    }
    __device__ void squares(const float (&x)[STEP], const float (&y)[STEP], int64_t h0, int rows,
                            Square *to) const {
        float s = h0 % PIECE ? to->part : 0.0f;
#pragma unroll
        for (int h = 0; h < STEP; h++)
            if (h < rows) s = fmaf(x[h] - y[h], x[h] - y[h], s);
        to->part = s;
        if (piece_ends(h0)) to->sum += (double)s;
    }

    __device__ float next_scale(float was, float largest) const {
        return edit::next_scale<DTYPE>(a, base, was, largest);
    }
    /* the ideal result of a piece decides its scales; e4m3 waits for the end of the block. All threads call.
     */
    __device__ void choose(const float (&y)[STEP], int64_t h0, int rows) const {
        if constexpr (DTYPE == EXC_F4 && OUT) {
#pragma unroll
            for (int h = 0; h < STEP; h++) {
                if (h >= rows) continue;
                const float x = fabsf(y[h]);
                const unsigned group = __reduce_max_sync(ALL_LANES, x == x ? bits_of(x) : 0u);
                if (in && l % SCALE_GROUP == 0)
                    kept[kept_place(h0 + h)] = next_scale(old_scale(h0 + h), f32_of(group));
            }
        } else if constexpr (CODED) {
            if (h0 % PIECE == 0) peak = 0;
#pragma unroll
            for (int h = 0; h < STEP; h++)
                if (h < rows && fabsf(y[h]) > peak) peak = fabsf(y[h]);
            if (!piece_ends(h0)) return;
            if constexpr (DTYPE == EXC_F8_E4M3)
                choose_of_block(h0);
            else if (in)
                kept[kept_place(h0)] = next_scale(old_scale(h0), peak);
        }
    }
    __device__ void choose_of_block(int64_t h0) const {
        unsigned *m = most + h0 / SCALE_BLOCK % 2;
        const unsigned warp = __reduce_max_sync(ALL_LANES, bits_of(peak));
        if (l % WARP == 0) atomicMax(m, warp);
        if (h0 % SCALE_BLOCK + STEP < SCALE_BLOCK && h0 + STEP < q.along) return;
        __syncthreads();
        if (l == 0) kept[h0 / SCALE_BLOCK] = next_scale(old_scale(h0), f32_of(*m));
        if (l == 0)
            most[(h0 / SCALE_BLOCK + 1) % 2] = 0; /* all have left it: it was read before the last barrier */
        __syncthreads();
    }

    /* ---- rounding: v -> the stored number near it, and its code */
    __device__ void settle(const float (&v)[STEP], int64_t h0, int rows, float (&value)[STEP],
                           uint16_t (&code)[STEP]) const {
        constexpr Grid g = grid_of<DTYPE>();
        constexpr int top = DTYPE == EXC_F8_E4M3 ? 7 : DTYPE == EXC_F4 ? 3 : 15;
        constexpr uint32_t nan = DTYPE == EXC_F8_E4M3 ? NAN_E4M3
                                 : DTYPE == EXC_F4    ? 0
                                 : DTYPE == EXC_BF16  ? 0x7fc0
                                                      : 0x7e00;
        float s = 1, inverse = 1;
#pragma unroll
        for (int h = 0; h < STEP; h++) {
            value[h] = 0, code[h] = 0;
            if (h >= rows) continue;
            if (turns(h)) s = new_scale(h0 + h), inverse = s != 0.0f ? 1.0f / s : 0.0f;
            const float x = v[h] * inverse;
            float r = fabsf(x);
            if (a.rounding == EXC_ROUND_SR)
                r = grid_draw(g, r, philox(key, (uint32_t)row(h0 + h), (uint32_t)col(h0 + h)));
            else
                r = grid_near(g, r);
            const uint32_t sign = bits_of(x) >> 31;
            code[h] = (uint16_t)(r != r ? nan : grid_code(g, r) | sign << top);
            value[h] = f32_of(bits_of(r * s) ^ sign << 31);
        }
    }
    /* codes of a piece to memory; returns how many changed. All threads call: neighbours share bytes of fp4.
     */
    __device__ int store(int64_t h0, int rows, const uint16_t (&code)[STEP]) const {
        int changed = 0;
        bool rescaled = false;
#pragma unroll
        for (int h = 0; h < STEP; h++) {
            if (h >= rows) continue;
            if (in) {
                if (turns(h)) rescaled = bits_of(new_scale(h0 + h)) != bits_of(old_scale(h0 + h));
                changed += rescaled || code[h] != read(h0 + h);
            }
            const int64_t i = row(h0 + h) * a.cols + col(h0 + h);
            if (DTYPE == EXC_F4 && OUT) {
                const unsigned other = __shfl_xor_sync(ALL_LANES, (unsigned)code[h], 1);
                __syncwarp(); /* both have read the byte */
                if (in && l % 2 == 0) dst[i / 2] = (uint8_t)(code[h] | other << 4);
            } else if (DTYPE == EXC_F4) {
                if (in && h % 2) dst[i / 2] = (uint8_t)(code[h - 1] | code[h] << 4);
            } else if (DTYPE == EXC_F8_E4M3) {
                if (in) dst[i] = (uint8_t)code[h];
            } else if (in)
                reinterpret_cast<uint16_t *>(dst)[i] = code[h];
        }
        return changed;
    }
    /* scales of the band to memory. mend: one that is none becomes 1 */
    __device__ void store_scales(bool mend) const {
        __syncthreads();
        if constexpr (DTYPE == EXC_F8_E4M3) {
            for (int64_t h = l * SCALE_BLOCK; h < q.along; h += BAND * SCALE_BLOCK)
                put_scale(scale_place_of(h), kept[h / SCALE_BLOCK], mend);
        } else if constexpr (DTYPE == EXC_F4) {
            for (int64_t h = 0; in && h < q.along; h += OUT ? 1 : SCALE_GROUP)
                if (!OUT || l % SCALE_GROUP == 0) put_scale(scale_place(h), kept[kept_place(h)], mend);
        }
    }
    /* as scale_place, for any thread: e4m3 has one scale for all lines */
    __device__ int64_t scale_place_of(int64_t h) const {
        const int64_t r = OUT ? h : at, c = OUT ? at : h;
        return r / SCALE_BLOCK * ceil_div(a.cols, SCALE_BLOCK) + c / SCALE_BLOCK;
    }
    __device__ void put_scale(int64_t i, float s, bool mend) const {
        edit::put_scale(scale, scale_to, a.scale_dtype, i, scale_at(scale, a.scale_dtype, i), s, mend);
    }

    /* ---- sweeps */
    template <class F> __device__ void sweep(F piece) const {
        for (int64_t h0 = 0; h0 < q.along; h0 += STEP) {
            float x[STEP];
            const int rows = (int)min((int64_t)STEP, q.along - h0);
            load(h0, rows, x);
            piece(h0, rows, x);
        }
    }
    __device__ double acc_square() const {
        double s = 0;
        for (int64_t r = 0; r < a.rank && in; r++) s += k.acc[r * BAND] * k.acc[r * BAND];
        return s;
    }
    /* what rounding makes of ideal less R^T lambda */
    __device__ void rounded(const float (&y)[STEP], int64_t h0, int rows, const float *lambda,
                            float (&value)[STEP], uint16_t (&code)[STEP]) const {
        if (!lambda) {
            settle(y, h0, rows, value, code);
            return;
        }
        float v[STEP];
        shift(y, h0, rows, lambda, 1.0f, nullptr, v);
        settle(v, h0, rows, value, code);
    }
};

/* ---- one lambda for a line and direction, as in requant.c */
__device__ inline float step_of(float lambda, float gap, float past, float past_gap, bool first) {
    float slope = first || lambda == past ? 0.4f : (past_gap - gap) / (lambda - past);
    slope = slope < 0.1f ? 0.1f : slope > 2.0f ? 2.0f : slope;
    return lambda + gap / slope;
}

/* for one direction: what brackets the zero; [0] lambda, [1] gap */
struct Bracket {
    float low[2], high[2];
    __device__ float next(float lambda, float gap, float past, float past_gap, bool first) {
        const bool side = gap < 0; /* false: lambda is too small */
        if (side)
            high[0] = lambda, high[1] = gap;
        else
            low[0] = lambda, low[1] = gap;
        if (!first && (past_gap < 0) == side) {
            if (side)
                low[1] *= 0.5f;
            else
                high[1] *= 0.5f;
        }
        const bool both = low[1] > 0 && high[1] < 0;
        const float to = both ? low[0] + (high[0] - low[0]) * (low[1] / (low[1] - high[1]))
                              : step_of(lambda, gap, past, past_gap, first);
        return gap == 0 ? lambda : to;
    }
};

template <int DTYPE, bool OUT> __device__ inline void solve(const Line<DTYPE, OUT> &b) {
    const Keep &k = b.k;
    Bracket bracket = {};
    double best = INFINITY;
    for (int64_t r = 0; r < b.a.rank; r++)
        k.target[r * BAND] = k.acc[r * BAND], k.lambda[r * BAND] = 0, k.best[r * BAND] = 0;
    for (int i = 0; i < TRIALS; i++) {
        b.clear();
        b.sweep([&](int64_t h0, int rows, const float(&x)[STEP]) {
            float y[STEP], value[STEP];
            uint16_t code[STEP];
            b.ideal(x, h0, rows, y);
            b.rounded(y, h0, rows, k.lambda, value, code);
            b.dots(value, h0, rows);
        });
        double off = 0;
        for (int64_t r = 0; r < b.a.rank; r++) {
            const float gap = (float)(k.acc[r * BAND] - k.target[r * BAND]);
            off += (double)gap * (double)gap;
        }
        const bool better = off < best;
        if (better) best = off;
        for (int64_t r = 0; r < b.a.rank; r++) {
            const int64_t at = r * BAND;
            const float gap = (float)(k.acc[at] - k.target[at]), lambda = k.lambda[at];
            if (better) k.best[at] = lambda;
            k.lambda[at] = b.a.rank == 1 ? bracket.next(lambda, gap, k.past[at], k.past_gap[at], i == 0)
                                         : step_of(lambda, gap, k.past[at], k.past_gap[at], i == 0);
            k.past[at] = lambda;
            k.past_gap[at] = gap;
        }
    }
}

/* R W, and what is known before the edit; `own` is added to */
template <int DTYPE, bool OUT>
__device__ inline void first_sweep(const Line<DTYPE, OUT> &b, Square *length, Requantised *own) {
    const float none[STEP] = {};
    b.clear();
    b.sweep([&](int64_t h0, int rows, const float(&x)[STEP]) {
        b.dots(x, h0, rows);
        b.squares(x, none, h0, rows, length);
#pragma unroll
        for (int h = 0; h < STEP; h++) own->nonfinite += h < rows && b.in && !(fabsf(x[h]) < INFINITY);
    });
    own->before = own->after = b.acc_square();
    own->size = b.in ? length->sum : 0;
    for (int64_t r = 0; r < b.a.rank; r++) {
        const float c = (float)b.k.acc[r * BAND];
        b.k.coef[r * BAND] = b.q.factor ? 0 : b.a.strength[b.matrix] * c;
        if (b.a.c && b.in) b.a.c[(b.matrix * b.a.rank + r) * b.q.whole + b.at + b.l] = c;
    }
}

template <int DTYPE, bool OUT> __device__ inline bool moves(const Line<DTYPE, OUT> &b) {
    return b.src != b.dst || b.scale != b.scale_to;
}

/* strength 0: bytes as they are */
template <int DTYPE, bool OUT> __device__ inline void copy_line(const Line<DTYPE, OUT> &b) {
    for (int64_t h = 0; b.in && b.src != b.dst && h < b.q.along; h++) {
        const int64_t i = b.row(h) * b.a.cols + b.col(h);
        if (DTYPE == EXC_F8_E4M3)
            b.dst[i] = b.src[i];
        else if (DTYPE != EXC_F4)
            reinterpret_cast<uint16_t *>(b.dst)[i] = reinterpret_cast<const uint16_t *>(b.src)[i];
        else if (i % 2 == 0)
            b.dst[i / 2] = b.src[i / 2];
    }
}

/* scales as they were; where numbers become 0, one that is none becomes 1 */
template <int DTYPE, bool OUT> __device__ inline void keep_scales(const Line<DTYPE, OUT> &b, bool mend) {
    const int64_t step = DTYPE == EXC_F8_E4M3 ? SCALE_BLOCK : DTYPE == EXC_F4 && OUT ? 1 : SCALE_GROUP;
    for (int64_t h = 0; Line<DTYPE, OUT>::CODED && b.in && h < b.q.along; h += step) {
        const float s = b.old_scale(h);
        if (DTYPE == EXC_F8_E4M3 ? b.l == 0 : !OUT || b.l % SCALE_GROUP == 0)
            b.kept[b.kept_place(h)] = mend && !(fabsf(s) < INFINITY) ? 1.0f : s;
    }
    b.store_scales(mend);
}

/* scales, the size of the edit, where exact rounding is to lead; then the result */
template <int DTYPE, bool OUT>
__device__ inline void edit_line(Line<DTYPE, OUT> &b, double length, bool exact, Requantised *own) {
    Square left, moved, error;
    const float none[STEP] = {};
    if (b.a.norm != EXC_NORM_NONE && !b.row_gain) {
        b.sweep([&](int64_t h0, int rows, const float(&x)[STEP]) {
            float y[STEP];
            b.ideal(x, h0, rows, y);
            b.squares(y, none, h0, rows, &left);
        });
        b.gain = gain_of(length, left.sum);
    }
    if (b.q.factor) b.gain = (float)b.q.factor[b.matrix];
    b.clear();
    b.sweep([&](int64_t h0, int rows, const float(&x)[STEP]) {
        float y[STEP];
        b.ideal(x, h0, rows, y);
        b.squares(y, x, h0, rows, &moved);
        if (exact) b.dots(y, h0, rows);
        b.choose(y, h0, rows);
    });
    __syncthreads(); /* new scales are there */
    if (exact) solve(b);
    b.clear();
    b.sweep([&](int64_t h0, int rows, const float(&x)[STEP]) {
        float y[STEP], value[STEP];
        uint16_t code[STEP];
        b.ideal(x, h0, rows, y);
        b.rounded(y, h0, rows, exact ? b.k.best : nullptr, value, code);
        b.dots(value, h0, rows);
        b.squares(value, y, h0, rows, &error);
        own->changed += b.store(h0, rows, code);
    });
    b.store_scales(false);
    own->moved = b.in ? moved.sum : 0, own->error = b.in ? error.sum : 0, own->after = b.acc_square();
}

/* factor 0: +0 whatever was there */
template <int DTYPE, bool OUT>
__device__ inline void clear_line(const Line<DTYPE, OUT> &b, Requantised *own) {
    const uint16_t zero[STEP] = {};
    keep_scales(b, false); /* `kept` as old: codes alone count as changes */
    __syncthreads();
    b.sweep([&](int64_t h0, int rows, const float(&)[STEP]) { own->changed += b.store(h0, rows, zero); });
    __syncthreads();
    keep_scales(b, true);
    own->after = 0;
}

/* blocks a processor that leave each thread the registers it needs: spilled ones cost more than the third block gives */
constexpr int blocks_for(int dtype, bool out) { return (dtype == EXC_F4 && out) || (dtype == EXC_F8_E4M3 && !out) ? 2 : 3; }

template <int DTYPE, bool OUT> __global__ void __launch_bounds__(BAND, blocks_for(DTYPE, OUT)) requant(Requant q, int dots_alone) {
    DYN_SHARED(char, lines_kept);
    SHARED_ARRAY(double, room, WARP);
    SHARED_ARRAY(unsigned, most, 2);
    const exc_project_args &a = q.a;
    const bool exact = a.rounding == EXC_ROUND_EXACT;
    char *scratch = q.scratch + blockIdx.x * q.scratch_bytes;
    for (int64_t task = blockIdx.x; task < q.count * q.bands; task += gridDim.x) {
        Line<DTYPE, OUT> b = {q, a,
                              Keep(q.shared_lines ? lines_kept : scratch + q.kept_bytes, a.rank, exact)};
        b.matrix = q.first + task / q.bands, b.at = task % q.bands * BAND, b.l = (int)threadIdx.x;
        b.lines = (int)min((int64_t)BAND, q.whole - b.at), b.in = b.l < b.lines;
        b.src = static_cast<const uint8_t *>(
            a.src ? a.src[b.matrix] : static_cast<const uint8_t *>(a.src_base) + b.matrix * a.src_stride * 2);
        b.dst = static_cast<uint8_t *>(
            a.src ? a.dst[b.matrix] : static_cast<uint8_t *>(a.dst_base) + b.matrix * a.dst_stride * 2);
        b.scale = b.CODED ? static_cast<const uint8_t *>(a.scale[b.matrix]) : nullptr;
        b.scale_to = b.CODED ? static_cast<uint8_t *>(a.scale_to[b.matrix]) : nullptr;
        b.key = philox_key(a.seed, a.stream ? a.stream[b.matrix] : (uint64_t)b.matrix);
        const float f = q.factor ? (float)fabs(q.factor[b.matrix]) : 1.0f;
        b.base = powers_only(a) && f > 0 ? f32_of(bits_of(f) & 0x7f800000u) : f;
        if (q.narrow && wide(b.src, b.dst, a.cols)) continue;
        b.gain = 1, b.kept = reinterpret_cast<float *>(scratch), b.most = most;
        const bool idle = q.factor ? q.factor[b.matrix] == 1 : a.strength[b.matrix] == 0.0f;
        b.row_gain =
            q.row_gain && !idle && !dots_alone ? q.row_gain + (b.matrix - q.first) * q.along : nullptr;
        Requantised own = {};
        if (idle && !moves(b) && !q.looked_at) { /* costs no bytes */
            if (threadIdx.x == 0) q.sums[task / q.bands * q.parts + task % q.bands] = own;
            continue;
        }
        if (threadIdx.x < 2) most[threadIdx.x] = 0;
        __syncthreads();
        Square length;
        first_sweep(b, &length, &own);
        if (dots_alone) continue;
        if (idle) {
            copy_line(b);
            if (b.CODED && b.scale != b.scale_to) keep_scales(b, false);
        } else if (q.factor && q.factor[b.matrix] == 0)
            clear_line(b, &own);
        else
            edit_line(b, length.sum, exact, &own);
        double *const part[] = {&own.before, &own.after, &own.moved, &own.error, &own.size};
        for (double *x : part) *x = block_sum(*x, room);
        own.changed = (long long)block_sum((double)own.changed, room),
        own.nonfinite = (long long)block_sum((double)own.nonfinite, room);
        if (threadIdx.x == 0) q.sums[task / q.bands * q.parts + task % q.bands] = own;
        __syncthreads();
    }
}

/* Lengths of rows that cross all bands, a warp a row: from c, what gives them back. */
template <int DTYPE> __global__ void __launch_bounds__(BAND) row_gains(Requant q, float *gains) {
    const exc_project_args &a = q.a;
    const int lane = threadIdx.x % WARP;
    const int64_t row = (int64_t)blockIdx.x * (BAND / WARP) + threadIdx.x / WARP;
    if (row >= q.count * q.along) return;
    const int64_t matrix = q.first + row / q.along, h = row % q.along;
    const uint8_t *src = static_cast<const uint8_t *>(
        a.src ? a.src[matrix] : static_cast<const uint8_t *>(a.src_base) + matrix * a.src_stride * 2);
    double before = 0, after = 0;
    for (int64_t i = lane; i < a.cols; i += WARP) {
        const int64_t at = h * a.cols + i;
        float x, d = 0;
        if (DTYPE == EXC_F8_E4M3)
            x = Line<DTYPE, true>::decode(
                src[at], scale_at(a.scale[matrix], a.scale_dtype,
                                  h / SCALE_BLOCK * ceil_div(a.cols, SCALE_BLOCK) + i / SCALE_BLOCK));
        else if (DTYPE == EXC_F4)
            x = Line<DTYPE, true>::decode(
                src[at / 2] >> (at % 2 ? 4 : 0) & 15,
                scale_at(a.scale[matrix], a.scale_dtype, h * (a.cols / SCALE_GROUP) + i / SCALE_GROUP));
        else
            x = Line<DTYPE, true>::decode(reinterpret_cast<const uint16_t *>(src)[at], 1);
        for (int64_t r = 0; r < a.rank; r++)
            d = fmaf(__ldg(a.basis + r * q.along + h),
                     a.strength[matrix] * a.c[(matrix * a.rank + r) * q.whole + i], d);
        const float y = x - d;
        before += (double)x * (double)x;
        after += (double)y * (double)y;
    }
    before = warp_sum(before), after = warp_sum(after);
    if (lane == 0) gains[row] = gain_of(before, after);
}

__global__ static void requantised(Requant q) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, m = q.first + i;
    if (i >= q.count) return;
    Requantised all = {};
    for (int64_t s = 0; s < q.parts; s++) {
        const Requantised &t = q.sums[i * q.parts + s];
        all.before += t.before, all.after += t.after, all.moved += t.moved, all.error += t.error,
            all.size += t.size;
        all.changed += t.changed, all.nonfinite += t.nonfinite;
    }
    double *const sums[] = {q.a.before, q.a.after, q.a.moved, q.a.error, q.a.size};
    const double values[] = {all.before, all.after, all.moved, all.error, all.size};
    for (int k = 0; k < 5; k++)
        if (sums[k]) sums[k][m] = values[k];
    if (q.a.changed) q.a.changed[m] = all.changed;
    if (q.a.nonfinite) q.a.nonfinite[m] = all.nonfinite;
}

} // namespace edit

#endif
