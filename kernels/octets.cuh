/* octets.cuh - the common edit of e4m3 weights (R on the rows, rounded to nearest) on Hopper: every code is read once and
 * written once, eight of a row at a time, with the bits of requant.c.
 *
 * A cluster of up to sixteen blocks shares a strip, 128 columns of all rows: the width of a block of scales. A warp has
 * 64 rows of it, half a warp a piece of 32, the stretch of one f32 sum; a thread goes down its piece, eight columns wide,
 * twice: sums first, then the result. Codes come by cp.async into a ring that is the warp's own, so that the warp alone
 * waits for them; steps of four rows of both pieces, those of strips to come too, into every place that is free. Sums of pieces
 * go to the block that owns their columns; it adds them in f64, in ascending order, and sends c to all (as in cluster.cuh, where
 * it is shown why nothing meets). Results go from registers to memory, whole lines of 128 bytes.
 *
 * Scales. A block of 128 x 128 keeps its scale s while none of its numbers exceeds 448 s, and all but a few of its codes are so
 * far below that no edit of this size can lift them there: a thread knows the largest of its 256 codes from the first
 * sweep, the largest basis value of its piece and its own c. Where these do not settle it, the warp
 * looks at that thread's codes, a row a lane. So the sweep that requant.c makes for new scales is not made. Two blocks
 * that share scales (rows dealt by 64) tell each other what they found.
 *
 * Bytes and cycles, H200, rank 1. A copy at 4.3 TB/s gives each of 132 processors 9.3 codes a cycle (1.755 GHz), in and out.
 * Four schedulers issue for 128 lanes: 13.8 instructions a code at full speed, 16.2 at 85 %. In SASS (nvcc 13.0) a step of the
 * first sweep is some 160 instructions for 32 codes, 5.0 a code: half a conversion to pairs of f16, one to f32, times scale,
 * fma, half a maximum and minimum, the rest loads (8 bytes a row, 16 for basis values of four rows), the wait, the loop; of the
 * second 240, 7.5 a code: the same decoding, fma, subtraction, times 1/s, half a conversion from pairs, a store of 8 bytes a row,
 * what is asked for. Sending, folding and peaks add some 0.6: 13.1 in all. So 85 % of a copy needs 81 % of the issue slots, and
 * all of them would give 105 %: arithmetic is as scarce as memory here, 85 % is near what there is. Hence eight independent
 * columns a thread, and two blocks of eight warps on a processor, one computing while the other exchanges (1.5 us of DSMEM, up
 * to 2 us of f64 additions for 224 pieces; a strip of 64 KB a block lasts 9 us). On the way are, beside the strip in
 * work, at least two steps of 1 KB a warp, 32 KB a processor, and all of the next while it leaves; H200 wants 48 KB. Rows of 128
 * bytes cost 6 % of a copy (QuACK, H100); neighbouring strips are worked on at the same time by other clusters, so that the
 * other half of 256 bytes is near. Rank 2 adds 2 instructions and is bound by them. None of this was measured. */
#ifndef EXC_OCTETS_CUH
#define EXC_OCTETS_CUH

#include "bulk.cuh"
#include "requant.cuh"

namespace edit {

constexpr int OCTET = 8, ACROSS = SCALE_BLOCK / OCTET; /* columns of a thread, threads across a strip */
constexpr int SHARE = WARP / ACROSS * PIECE;           /* rows of a warp */
constexpr int ROWS = 4, STEPS = PIECE / ROWS;          /* rows of a piece that are brought at once */
constexpr int SLOT = SHARE / STEPS * SCALE_BLOCK / 16; /* 16-byte units of a step */
constexpr int SHARES = THREADS / WARP;                 /* of a block, at most */
constexpr int BLOCKS_DOWN = SHARES * SHARE / SCALE_BLOCK;
constexpr int MOST_SLOTS = 16, PAIR = 2; /* directions whose sums are taken at once */

/* how rows are dealt to a cluster */
struct Deal {
    int size;  /* blocks */
    int each;  /* shares of a block, one a warp; the last ones may have fewer or none. 0: too many rows */
    int slots; /* steps that a warp's ring holds */
    int parts; /* [matrix, parts]: sums */
    size_t bytes;
};

struct Desk {
    uint4 *tile;           /* [each, slots, SLOT] */
    float *basis;          /* [K, each * SHARE] */
    float *bound;          /* [rank, each * 2]: the largest of a piece */
    float *partial;        /* [sums at once, pieces of all, own columns] */
    float *c;              /* [rank, SCALE_BLOCK] */
    float *was, *now;      /* [BLOCKS_DOWN] scales */
    unsigned *peak;        /* [BLOCKS_DOWN] bits of the largest number that was looked at */
    float *heard;          /* [2] of a block of scales shared with the block before, the one behind */
    double *fold;          /* [WARP] */
    Gate *summed, *folded; /* partial sums are there; c is */
    Gate *told;            /* heard is */
};

/* K: directions in registers; 0: any number, and sums */
__host__ __device__ inline size_t carve(unsigned char *base, const Deal &d, int rank, int K, Desk *s) {
    size_t at = 0;
    lay(s->tile, base, at, (size_t)d.each * d.slots * SLOT * 16);
    lay(s->basis, base, at, (size_t)K * d.each * SHARE * 4);
    lay(s->bound, base, at, (size_t)rank * d.each * 2 * 4);
    lay(s->partial, base, at, (size_t)(rank < PAIR ? rank : PAIR) * d.each * 2 * SCALE_BLOCK * 4);
    lay(s->c, base, at, (size_t)rank * SCALE_BLOCK * 4);
    lay(s->was, base, at, BLOCKS_DOWN * 4);
    lay(s->now, base, at, BLOCKS_DOWN * 4);
    lay(s->peak, base, at, BLOCKS_DOWN * 4);
    lay(s->heard, base, at, 2 * 4);
    lay(s->fold, base, at, K ? 0 : WARP * sizeof(double));
    lay(s->summed, base, at, sizeof(Gate));
    lay(s->folded, base, at, sizeof(Gate));
    lay(s->told, base, at, sizeof(Gate));
    return at;
}

/* waits until at most `open` groups of this thread's are under way */
__device__ inline void cp_async_wait_for(int open) {
    switch (open) {
    case 0: cp_async_wait<0>(); break;
    case 1: cp_async_wait<1>(); break;
    case 2: cp_async_wait<2>(); break;
    case 3: cp_async_wait<3>(); break;
    case 4: cp_async_wait<4>(); break;
    case 5: cp_async_wait<5>(); break;
    case 6: cp_async_wait<6>(); break;
    case 7: cp_async_wait<7>(); break;
    case 8: cp_async_wait<8>(); break;
    case 9: cp_async_wait<9>(); break;
    case 10: cp_async_wait<10>(); break;
    case 11: cp_async_wait<11>(); break;
    default: cp_async_wait<12>(); /* 12 or more may be open */
    }
}

/* by pairs the largest and the least of codes */
struct Extremes {
    unsigned most, least;
};

/* eight codes as numbers */
__device__ inline void decode(const uint2 &w, float scale, float (&x)[OCTET], Extremes *met) {
    const unsigned u[2] = {w.x, w.y};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        unsigned low, high;
        halves_of_e4m3(u[i], low, high);
        if (met) {
            met->most = larger_halves(larger_halves(met->most, low), high);
            met->least = smaller_halves(smaller_halves(met->least, low), high);
        }
        widen_halves(low, x[4 * i], x[4 * i + 1]);
        widen_halves(high, x[4 * i + 2], x[4 * i + 3]);
    }
#pragma unroll
    for (int k = 0; k < OCTET; k++) x[k] = x[k] * scale;
}

/* bytes of two octets that differ */
__device__ inline int differing(const uint2 &a, const uint2 &b) {
    const unsigned u[2] = {a.x ^ b.x, a.y ^ b.y};
    int n = 0;
#pragma unroll
    for (int i = 0; i < OCTET; i++) n += (u[i / 4] >> i % 4 * 8 & 255) != 0;
    return n;
}

/* this thread's view of its block's part */
template <int K> struct Octets {
    const Requant &q;
    const exc_project_args &a;
    const Deal &d;
    Desk s;
    int rank, pieces;  /* of the block in its cluster; pieces of all */
    int first, rows;   /* its first row, and how many it has */
    int share, lane;   /* first row of its warp, counted in the block */
    int down, across;  /* first row of this thread's piece, likewise; first column in the strip */
    bool mine, here;   /* the warp has rows; this thread's piece is inside */
    int64_t step;      /* clusters of the grid */
    unsigned exchanges, talks; /* so far */
    /* the ring: steps asked for so far, and where the next one is */
    unsigned asked;
    int slot, next_slot; /* of the first step of the strip; of the next to come */
    int64_t asked_task;
    int asked_step;
    const uint8_t *from; /* this lane's next unit, in the upper piece */
    int bytes, bytes_below;     /* of it, of the one in the lower piece: 16 or 0 */
    int64_t below, rows_on;     /* bytes from piece to piece, from step to step */

    __device__ int own() const { return SCALE_BLOCK / d.size; }
    __device__ int64_t matrix(int64_t task) const { return q.first + task / q.bands; }
    __device__ int64_t column(int64_t task) const { return task % q.bands * SCALE_BLOCK; }
    __device__ const uint8_t *src(int64_t m) const { return static_cast<const uint8_t *>(a.src[m]); }
    __device__ uint8_t *dst(int64_t m) const { return static_cast<uint8_t *>(a.dst[m]); }
    __device__ bool idle(int64_t m) const { return a.strength[m] == 0.0f; }
    __device__ bool moves(int64_t m) const { return a.src[m] != a.dst[m] || a.scale[m] != a.scale_to[m]; }
    __device__ int64_t next(int64_t task) const {
        for (; task < q.count * q.bands; task += step) {
            const int64_t m = matrix(task);
            if (wide(src(m), dst(m), a.cols) && (!idle(m) || moves(m) || q.looked_at)) return task;
        }
        return -1;
    }
    __device__ int slot_of(int i) const { return slot + i < d.slots ? slot + i : slot + i - d.slots; }
    /* this thread's octet of row `row` of step i */
    __device__ uint2 *codes(int i, int row) const {
        uint4 *at = s.tile + ((size_t)(share / SHARE) * d.slots + slot_of(i)) * SLOT;
        return reinterpret_cast<uint2 *>(at) + (lane / ACROSS * ROWS + row) * ACROSS + lane % ACROSS;
    }
    __device__ int block_down() const { return (first + share) / SCALE_BLOCK - first / SCALE_BLOCK; }
    /* where the scale of block `block` of the own ones is */
    __device__ int64_t scale_place(int64_t task, int block) const {
        return (first / SCALE_BLOCK + block) * q.bands + task % q.bands;
    }

    __device__ void turn_to(int64_t task) {
        asked_task = task, asked_step = 0;
        if (task < 0 || !mine) return;
        const int64_t m = matrix(task), at = column(task) + lane % 8 * 16;
        const bool in = at < a.cols;
        from = src(m) + (first + share + lane / 8) * a.cols + (in ? at : 0);
        bytes = in ? 16 : 0, bytes_below = in && share + PIECE < rows ? 16 : 0;
    }
    /* Asks for the next step: four rows of both pieces, a unit of each a lane. A group is closed even where there is none, so that
     * groups count steps. */
    __device__ void ask() {
        if (mine && asked_task >= 0) {
            uint4 *to = s.tile + ((size_t)(share / SHARE) * d.slots + next_slot) * SLOT + lane;
            cp_async16(to, from, bytes);
            cp_async16(to + SLOT / 2, bytes_below ? from + below : from, bytes_below);
            from += rows_on;
            if (++asked_step == STEPS) turn_to(next(asked_task + step));
        }
        cp_async_commit();
        asked++;
        if (++next_slot == d.slots) next_slot = 0;
    }
    /* four values of direction r from row h of the block on */
    __device__ float4 direction(int r, int h) const {
        if constexpr (K > 0) return *reinterpret_cast<const float4 *>(s.basis + (size_t)r * d.each * SHARE + h);
        const float *b = a.basis + r * q.along + first + h;
        return make_float4(__ldg(b), __ldg(b + 1), __ldg(b + 2), __ldg(b + 3));
    }
};

__device__ inline float of(const float4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* what one exchange looks at beside its sums */
struct Look {
    bool first;   /* the first sweep of a strip */
    bool kept;    /* c goes to the caller */
    bool counted; /* the sum of squares and what is not finite are wanted */
    double size;
    int64_t nonfinite;
    Extremes met; /* of this thread's codes, and 0 */
};

/* c of SUMS directions from r0 on: returns this thread's part of |R W|^2. `strip`: number of the strip's first step. */
template <int K, int SUMS>
__device__ inline double dots(Octets<K> &b, int64_t task, unsigned strip, int r0, const float *scales, Look &look) {
    float p[SUMS][OCTET] = {}, square[K ? 1 : OCTET] = {};
    const unsigned parity = b.exchanges++ & 1;
    const int own = b.own();
    __syncthreads(); /* scales are there; nobody reads c of the last strip any more */
    if (threadIdx.x == 0) {
        gate_expect(b.s.summed, (unsigned)(SUMS * b.pieces * own * 4));
        gate_expect(b.s.folded, (unsigned)(SUMS * SCALE_BLOCK * 4));
    }
    if (b.mine) {
        const float scale = scales[b.block_down()];
        for (int i = 0; i < STEPS; i++) {
            if (i % 2 == 0) { /* for two steps */
                cp_async_wait_for((int)(b.asked - 2 - strip - i));
                __syncwarp();
            }
            if (!b.here) continue;
            float4 basis[SUMS];
#pragma unroll
            for (int r = 0; r < SUMS; r++) basis[r] = b.direction(r0 + r, b.down + i * ROWS);
#pragma unroll
            for (int h = 0; h < ROWS; h++) {
                float x[OCTET];
                decode(*b.codes(i, h), scale, x, &look.met);
#pragma unroll
                for (int r = 0; r < SUMS; r++)
#pragma unroll
                    for (int k = 0; k < OCTET; k++) p[r][k] = fmaf(of(basis[r], h), x[k], p[r][k]);
                if constexpr (K == 0)
#pragma unroll
                    for (int k = 0; k < OCTET; k++) {
                        if (!look.first || !look.counted) continue;
                        square[k] = fmaf(x[k], x[k], square[k]);
                        look.nonfinite += b.column(task) + b.across < b.a.cols && !is_finite(x[k]);
                    }
            }
        }
    }
    if (b.here) {
        const int piece = (b.first + b.down) / PIECE, to = b.across / own;
#pragma unroll
        for (int r = 0; r < SUMS; r++)
#pragma unroll
            for (int k = 0; k < OCTET; k += 4)
                remote_store(b.s.partial + (r * b.pieces + piece) * own + b.across % own + k, to,
                             make_float4(p[r][k], p[r][k + 1], p[r][k + 2], p[r][k + 3]), b.s.summed);
        if constexpr (K == 0)
            for (int k = 0; look.counted && look.first && b.column(task) + b.across < b.a.cols && k < OCTET; k++)
                look.size += (double)square[k];
    }
    double all = 0;
    const int r = threadIdx.x / own, column = b.rank * own + threadIdx.x % own;
    if (r < SUMS) {
        const float *part = b.s.partial + r * b.pieces * own + threadIdx.x % own;
        const int64_t at = b.column(task) + column;
        gate_wait(b.s.summed, parity);
#pragma unroll 8
        for (int i = 0; i < b.pieces; i++) all += (double)part[i * own];
        const float c = (float)all;
        for (int block = 0; block < b.d.size; block++)
            remote_store(b.s.c + (r0 + r) * SCALE_BLOCK + column, block, c, b.s.folded);
        if (at >= b.a.cols)
            all = 0;
        else if (look.kept && b.a.c)
            b.a.c[(b.matrix(task) * b.a.rank + r0 + r) * b.q.whole + at] = c;
    }
    gate_wait(b.s.folded, parity);
    return all * all;
}

/* c of all directions */
template <int K>
__device__ inline double all_dots(Octets<K> &b, int64_t task, unsigned strip, const float *scales, Look &look) {
    if constexpr (K > 0) return dots<K, K>(b, task, strip, 0, scales, look);
    double sum = 0;
    for (int r = 0; r < (int)b.a.rank; r += PAIR, look.first = false) {
        if (b.a.rank - r >= PAIR)
            sum += dots<K, PAIR>(b, task, strip, r, scales, look);
        else
            sum += dots<K, 1>(b, task, strip, r, scales, look);
    }
    return sum;
}

/* what is subtracted from `ROWS` rows of this thread's columns, from row h of the block on */
template <int K>
__device__ inline void deltas(const Octets<K> &b, const float (&coef)[K ? K : 1][OCTET], float strength, int h,
                              float (&delta)[ROWS][OCTET]) {
#pragma unroll
    for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int k = 0; k < OCTET; k++) delta[j][k] = 0;
    auto add = [&](int r, const float(&c)[OCTET]) {
        const float4 basis = b.direction(r, h);
#pragma unroll
        for (int j = 0; j < ROWS; j++)
#pragma unroll
            for (int k = 0; k < OCTET; k++) delta[j][k] = fmaf(of(basis, j), c[k], delta[j][k]);
    };
    if constexpr (K > 0) {
#pragma unroll
        for (int r = 0; r < K; r++) add(r, coef[r]);
    } else {
        for (int r = 0; r < (int)b.a.rank; r++) {
            float c[OCTET];
#pragma unroll
            for (int k = 0; k < OCTET; k++) c[k] = strength * b.s.c[r * SCALE_BLOCK + b.across + k];
            add(r, c);
        }
    }
}

/* The largest number of a block of scales as far as it matters, see above. All lanes of the warp call. */
template <int K> __device__ inline void look_for_peak(const Octets<K> &b, float strength, const Extremes &met) {
    const int down = b.block_down(), pieces = b.d.each * 2;
    const float scale = b.s.was[down], s = fabsf(scale);
    float high[2], low[2], reach = 0, peak = 0;
    widen_halves(met.most, high[0], high[1]), widen_halves(met.least, low[0], low[1]);
    const float largest_code = fmaxf(fmaxf(high[0], high[1]), -fminf(low[0], low[1]));
    for (int r = 0; r < (int)b.a.rank; r++) {
        float c = 0;
#pragma unroll
        for (int k = 0; k < OCTET; k++) {
            const float x = fabsf(strength * b.s.c[r * SCALE_BLOCK + b.across + k]);
            c = x > c || x != x ? x : c;
        }
        reach = fmaf(b.s.bound[r * pieces + b.down / PIECE], c, reach);
    }
    const bool near = b.here && (s < 1e-30f || !((largest_code * s + reach) * 1.0001f <= 448.0f * s));
    for (unsigned who = __ballot_sync(ALL_LANES, near); who; who &= who - 1) {
        const int thread = __ffs((int)who) - 1, across = thread % ACROSS * OCTET,
                  row = b.share + thread / ACROSS * PIECE + b.lane;
        const uint4 *tile = b.s.tile + ((size_t)(b.share / SHARE) * b.d.slots + b.slot_of(b.lane / ROWS)) * SLOT;
        float x[OCTET], d[OCTET] = {};
        decode(reinterpret_cast<const uint2 *>(tile)[(thread / ACROSS * ROWS + b.lane % ROWS) * ACROSS + thread % ACROSS], scale,
               x, nullptr);
        for (int r = 0; r < (int)b.a.rank; r++) {
            const float basis = __ldg(b.a.basis + r * b.q.along + b.first + row);
#pragma unroll
            for (int k = 0; k < OCTET; k++) d[k] = fmaf(basis, strength * b.s.c[r * SCALE_BLOCK + across + k], d[k]);
        }
#pragma unroll
        for (int k = 0; k < OCTET; k++) {
            const float y = fabsf(x[k] - d[k]);
            if (y > peak) peak = y;
        }
    }
    const unsigned largest = __reduce_max_sync(ALL_LANES, bits_of(peak));
    if (b.lane == 0 && largest) atomicMax(b.s.peak + down, largest);
}

/* new scales of the block's; all threads call */
template <int K> __device__ inline void choose_scales(Octets<K> &b, int64_t task) {
    const int t = threadIdx.x, end = b.first + b.rows;
    const bool before = b.rows > 0 && b.first % SCALE_BLOCK != 0,
               behind = b.rows > 0 && end % SCALE_BLOCK != 0 && end < b.a.rows;
    const int last = b.rows > 0 ? (end - 1) / SCALE_BLOCK - b.first / SCALE_BLOCK : -1;
    __syncthreads();
    if (before || behind) {
        const unsigned parity = b.talks++ & 1;
        if (t == 0) {
            gate_expect(b.s.told, 4u * before + 4u * behind);
            if (before) remote_store(b.s.heard + 1, b.rank - 1, f32_of(b.s.peak[0]), b.s.told);
            if (behind) remote_store(b.s.heard, b.rank + 1, f32_of(b.s.peak[last]), b.s.told);
        }
        gate_wait(b.s.told, parity);
    }
    if (t <= last) {
        float peak = f32_of(b.s.peak[t]);
        if (before && t == 0) peak = fmaxf(peak, b.s.heard[0]);
        if (behind && t == last) peak = fmaxf(peak, b.s.heard[1]);
        const float s = next_scale<EXC_F8_E4M3>(b.a, 1.0f, b.s.was[t], peak);
        const int64_t m = b.matrix(task);
        b.s.now[t] = s;
        if (!before || t > 0) /* the block that has its first row writes it */
            put_scale(b.a.scale[m], b.a.scale_to[m], b.a.scale_dtype, b.scale_place(task, t), b.s.was[t], s, false);
    }
    __syncthreads();
}

/* sums of a strip that only some calls want */
struct Wanted {
    double moved, error;
    int64_t changed;
};

/* the result to memory; FREE: what has been sent is asked for anew; else it is kept over the codes, and what is wanted counted */
template <int K, bool FREE> __device__ inline void update(Octets<K> &b, int64_t task, Wanted *sums) {
    const int64_t m = b.matrix(task), at = b.column(task) + b.across;
    const float strength = b.a.strength[m];
    float coef[K ? K : 1][OCTET] = {}, moved[FREE ? 1 : OCTET] = {}, error[FREE ? 1 : OCTET] = {};
    if (!b.mine) return;
#pragma unroll
    for (int r = 0; r < K; r++)
#pragma unroll
        for (int k = 0; k < OCTET; k++) coef[r][k] = strength * b.s.c[r * SCALE_BLOCK + b.across + k];
    const float was = b.s.was[b.block_down()], now = b.s.now[b.block_down()], inverse = now != 0.0f ? 1.0f / now : 0.0f;
    const bool in = b.here && at < b.a.cols, rescaled = bits_of(was) != bits_of(now);
    uint8_t *to = b.dst(m) + (b.first + b.down) * b.a.cols + at;
    for (int i = 0; i < STEPS; i++) {
        float delta[ROWS][OCTET];
        if (in) {
            deltas<K>(b, coef, strength, b.down + i * ROWS, delta);
#pragma unroll
            for (int h = 0; h < ROWS; h++, to += b.a.cols) {
                const uint2 old = *b.codes(i, h);
                float x[OCTET], y[OCTET], v[OCTET];
                decode(old, was, x, nullptr);
#pragma unroll
                for (int k = 0; k < OCTET; k++) y[k] = x[k] - delta[h][k], v[k] = y[k] * inverse;
                const uint2 w = make_uint2(e4m3_of(v[0], v[1], v[2], v[3]), e4m3_of(v[4], v[5], v[6], v[7]));
                store_drop(to, w);
                if constexpr (!FREE) {
                    *b.codes(i, h) = w;
                    sums->changed += rescaled ? OCTET : differing(old, w);
                    decode(w, now, v, nullptr);
#pragma unroll
                    for (int k = 0; k < OCTET; k++)
                        moved[k] = fmaf(y[k] - x[k], y[k] - x[k], moved[k]), error[k] = fmaf(v[k] - y[k], v[k] - y[k], error[k]);
                }
            }
        }
        if (FREE) {
            __syncwarp();
            b.ask();
        }
    }
    if constexpr (!FREE)
        for (int k = 0; k < OCTET; k++) sums->moved += (double)moved[k], sums->error += (double)error[k];
}

/* strength 0: codes and scales as they were */
template <int K> __device__ inline void copy(const Octets<K> &b, int64_t task) {
    const int64_t m = b.matrix(task), at = b.column(task) + b.across;
    uint8_t *to = b.dst(m) + (b.first + b.down) * b.a.cols + at;
    for (int i = 0; b.here && at < b.a.cols && b.src(m) != b.dst(m) && i < PIECE; i++)
        store_drop(to + i * b.a.cols, *b.codes(i / ROWS, i % ROWS));
    const int t = threadIdx.x, down = b.first / SCALE_BLOCK + t;
    if (b.a.scale[m] != b.a.scale_to[m] && t < BLOCKS_DOWN && down * SCALE_BLOCK >= b.first && down * SCALE_BLOCK < b.first + b.rows)
        put_scale(b.a.scale[m], b.a.scale_to[m], b.a.scale_dtype, b.scale_place(task, t), b.s.was[t], b.s.was[t], false);
}

/* one strip, any rank, and all sums that may be asked for */
__device__ inline void general(Octets<0> &b, int64_t task, unsigned strip, Requantised *own) {
    const bool idle = b.idle(b.matrix(task));
    Look look = {true, true, b.q.summed != 0, 0, 0, {}};
    Wanted sums = {0, 0, 0};
    own->before = own->after = all_dots(b, task, strip, b.s.was, look);
    if (idle)
        copy(b, task);
    else {
        if (b.mine) look_for_peak(b, b.a.strength[b.matrix(task)], look.met);
        choose_scales(b, task);
        update<0, false>(b, task, &sums);
        look.kept = false;
        if (b.a.after) own->after = all_dots(b, task, strip, b.s.now, look);
    }
    own->size = look.size, own->nonfinite = look.nonfinite;
    own->moved = sums.moved, own->error = sums.error, own->changed = sums.changed;
}

__device__ inline void add_up(const Octets<0> &b, int64_t task, Requantised own) {
    double *const part[] = {&own.before, &own.after, &own.moved, &own.error, &own.size};
    for (double *x : part) *x = block_sum(*x, b.s.fold);
    own.changed = (long long)block_sum((double)own.changed, b.s.fold);
    own.nonfinite = (long long)block_sum((double)own.nonfinite, b.s.fold);
    if (threadIdx.x == 0) b.q.sums[task / b.q.bands * b.d.parts + task % b.q.bands * b.d.size + b.rank] = own;
}

/* the basis of the block's rows, and the largest value of each of its pieces */
template <int K> __device__ inline void lay_basis(const Octets<K> &b) {
    const int tall = b.d.each * SHARE, pieces = b.d.each * 2;
    for (int i = threadIdx.x; i < K * tall; i += THREADS)
        b.s.basis[i] = i % tall < b.rows ? b.a.basis[i / tall * b.q.along + b.first + i % tall] : 0.0f;
    for (int i = threadIdx.x; i < (int)b.a.rank * pieces; i += THREADS) {
        float largest = 0;
        for (int h = i % pieces * PIECE; h < min(b.rows, (i % pieces + 1) * PIECE); h++)
            largest = fmaxf(largest, fabsf(b.a.basis[i / pieces * b.q.along + b.first + h]));
        b.s.bound[i] = largest;
    }
}

template <int K> __device__ inline void octets_block(const Requant &q, const Deal &d, unsigned char *base) {
    Octets<K> b = {q, q.a, d, {}, cluster_rank(), (int)(q.along / PIECE)};
    const int warp = threadIdx.x / WARP;
    b.first = b.rank * d.each * SHARE, b.rows = max(0, min(d.each * SHARE, (int)q.along - b.first));
    b.lane = threadIdx.x % WARP, b.share = warp * SHARE;
    b.mine = warp < d.each && b.share < b.rows;
    b.down = b.share + b.lane / ACROSS * PIECE, b.across = b.lane % ACROSS * OCTET;
    b.here = b.mine && b.down < b.rows;
    b.step = gridDim.x / d.size;
    b.below = PIECE * q.a.cols, b.rows_on = ROWS * q.a.cols;
    carve(base, d, (int)q.a.rank, K, &b.s);
    if (threadIdx.x == 0) {
        gate_init(b.s.summed, 1), gate_init(b.s.folded, 1), gate_init(b.s.told, 1);
        gates_ready();
    }
    lay_basis(b);
    cluster_begin(base);
    int64_t task = b.next(blockIdx.x / d.size);
    b.turn_to(task);
    for (int i = 0; i < d.slots; i++) b.ask();
    const bool has_scale = threadIdx.x < BLOCKS_DOWN && (b.first / SCALE_BLOCK + (int)threadIdx.x) * SCALE_BLOCK < b.first + b.rows;
    auto scale_of = [&](int64_t t) {
        return has_scale && t >= 0 ? scale_at(q.a.scale[b.matrix(t)], q.a.scale_dtype, b.scale_place(t, threadIdx.x)) : 0.0f;
    };
    float coming = scale_of(task);
    for (unsigned strip = 0; task >= 0; strip += STEPS) {
        const int64_t after = b.next(task + b.step);
        __syncthreads(); /* the last strip's are read */
        if (threadIdx.x < BLOCKS_DOWN) b.s.was[threadIdx.x] = coming, b.s.peak[threadIdx.x] = 0;
        coming = scale_of(after);
        if constexpr (K > 0) {
            Look look = {true, true, false, 0, 0, {}};
            const int64_t m = b.matrix(task);
            all_dots(b, task, strip, b.s.was, look);
            if (b.idle(m))
                copy(b, task);
            else {
                if (b.mine) look_for_peak(b, q.a.strength[m], look.met);
                choose_scales(b, task);
                update<K, true>(b, task, nullptr);
            }
        } else {
            Requantised own = {};
            general(b, task, strip, &own);
            if (q.summed) add_up(b, task, own);
        }
        __syncwarp(); /* the warp's part of the strip is read */
        while (b.asked < strip + STEPS + d.slots) b.ask();
        b.slot = b.slot_of(STEPS);
        task = after;
    }
    cp_async_wait<0>();
    cluster_sync(); /* no block leaves while another may still send to it */
}

template <int K> __global__ void __launch_bounds__(THREADS, K ? 2 : 1) octets(Requant q, Deal d) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    DYN_SHARED(unsigned char, base);
    octets_block<K>(q, d, base);
#endif
}

} // namespace edit

#endif
