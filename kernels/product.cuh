/* product.cuh - one tile of X W^T on the device, the engine under matmul, bundle, glu and down.
 *
 * X rows [k] of the activation dtype lie wherever the caller's table of row pointers says, so gathering is
 * free. W is packed (ops.h) in panels of 16 rows. A tile is BM rows by BN outputs of each of NB matrices; its
 * sums come out in f32 in shared memory, where the epilogues read them in any order.
 *
 * bf16 rows: tensor cores, operands through a ring of cp.async stages, 16-byte pieces padded so that ldmatrix
 * meets no bank conflict. Codes become bf16, exactly, on their way into the ring; for up to 16 rows, where
 * reading weights is all there is to do, the ring holds the codes themselves, four stages of 128 inputs, and they
 * become bf16 in registers: three stages of 8 KB on the way, four blocks a processor, 96 KB where a latency of
 * 0.7 us at 32 bytes a ns asks for 23. f32 rows: fused multiply-adds on f32 tiles. Both add products in ascending k, and with codes scale each span of inputs that
 * shares one: an output's bits depend on its row of X and its row of W alone, never on the tile it fell into.
 */
#ifndef EXC_PRODUCT_CUH
#define EXC_PRODUCT_CUH

#include <type_traits>

#include "tensor.cuh"

/* -------------------------------------------------------------------------------------------------------
 * weights */

constexpr int K_WHOLE = 32;                   /* inputs are padded to a multiple of it */
constexpr int E4M3_SPAN = 128, FP4_SPAN = 32; /* inputs under one scale */

__host__ __device__ constexpr bool is_coded(int dtype) { return dtype == EXC_F8_E4M3 || dtype == EXC_F4; }
__host__ __device__ constexpr int span_of(int dtype) { return dtype == EXC_F8_E4M3 ? E4M3_SPAN : FP4_SPAN; }
__host__ __device__ constexpr int64_t code_bytes(int64_t elements, int dtype) {
    return dtype == EXC_F32       ? elements * 4
           : dtype == EXC_BF16    ? elements * 2
           : dtype == EXC_F8_E4M3 ? elements
                                  : elements / 2;
}

/* a packed matrix as a tile sees it */
struct Plane {
    const unsigned char *data;
    int64_t rows, k, pitch; /* rows to whole 16, inputs, inputs to whole 32 */
    int64_t panel;          /* bytes */
};
__host__ __device__ inline Plane plane_of(const void *data, int64_t n, int64_t k, int dtype) {
    Plane p;
    p.data = static_cast<const unsigned char *>(data);
    p.rows = ceil_div(n, EXC_PANEL) * EXC_PANEL;
    p.k = k;
    p.pitch = ceil_div(k, K_WHOLE) * K_WHOLE;
    p.panel = EXC_PANEL * code_bytes(p.pitch, dtype);
    if (dtype == EXC_F8_E4M3) p.panel += ceil_div(ceil_div(p.pitch, E4M3_SPAN) * 4, 64) * 64;
    if (dtype == EXC_F4) p.panel += ceil_div(p.pitch / FP4_SPAN * EXC_PANEL, 64) * 64;
    return p;
}
__host__ __device__ inline Plane plane_of(const exc_packed &w) { return plane_of(w.data, w.n, w.k, w.dtype); }

/* where the code of input k of output n lies (fp4: of the pair) */
template <int W> __host__ __device__ inline int64_t code_offset(const Plane &p, int64_t n, int64_t k) {
    return n / EXC_PANEL * p.panel + code_bytes(n % EXC_PANEL * p.pitch + k, W);
}
/* where the scale of output n and of the span that holds input k lies */
template <int W> __host__ __device__ inline int64_t scale_offset(const Plane &p, int64_t n, int64_t k) {
    const int64_t at = n / EXC_PANEL * p.panel + code_bytes(EXC_PANEL * p.pitch, W);
    return W == EXC_F8_E4M3 ? at + k / E4M3_SPAN * 4
                            : at + n % EXC_PANEL * (p.pitch / FP4_SPAN) + k / FP4_SPAN;
}
template <int W> __device__ inline float scale_at(const Plane &p, int64_t n, int64_t k) {
    if (n >= p.rows) return 0;
    const unsigned char *at = p.data + scale_offset<W>(p, n, k);
    return W == EXC_F8_E4M3 ? *reinterpret_cast<const float *>(at) : from_e8m0(*at);
}
/* weight or, of coded matrices, code at [n,k], in f32 */
template <int W> __device__ inline float code_at(const Plane &p, int64_t n, int64_t k) {
    if (n >= p.rows || k >= p.k) return 0;
    const unsigned char *at = p.data + code_offset<W>(p, n, k);
    if (W == EXC_F32) return *reinterpret_cast<const float *>(at);
    if (W == EXC_BF16) return widen(*reinterpret_cast<const bf16 *>(at));
    if (W == EXC_F8_E4M3) return from_e4m3(*at);
    return from_e2m1((uint32_t)*at >> (k % 2 ? 4 : 0));
}

/* ------------------------------------------------------------------------------------------------------------
 * rows */

/* what a tile multiplies: row i of the tile at row[i]; rows from `count` on are zero */
struct Rows {
    const unsigned char *const *row; /* shared memory [BM] */
    int count;
    bool whole; /* every row begins at a multiple of 16 bytes and k is a multiple of 8: 16-byte copies do */
};

/* ------------------------------------------------------------------------------------------- tensor cores,
 * bf16 rows */

/* columns k0 .. k0 + BK of the rows, what lies beyond `count` and k as zero, by all THREADS of the block */
template <int BK, int THREADS, int BM, int PITCH>
__device__ inline void load_rows(bf16 (&x)[BM][PITCH], const Rows &rows, int64_t k0, int64_t k) {
    for (int c = threadIdx.x; c < BM * (BK / 8); c += THREADS) {
        const int r = c / (BK / 8), part = c % (BK / 8) * 8;
        const bf16 *from = reinterpret_cast<const bf16 *>(rows.row[r]);
        if (rows.whole) {
            const bool in = r < rows.count && k0 + part < k;
            cp_async16(&x[r][part], from + (in ? k0 + part : 0), in ? 16 : 0);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[r][part + i] = r < rows.count && k0 + part + i < k ? from[k0 + part + i] : bf16{0};
        }
    }
}

/* two bf16 numbers in one register; codes are exact in bf16 */
__device__ inline unsigned two_bf16(float lo, float hi) {
    return bits_of(lo) >> 16 | (bits_of(hi) & 0xffff0000u);
}

/* `to` is aligned to 16 */
__device__ inline void store16(void *to, const uint4 &v) {
#ifdef __CUDA_ARCH__
    *static_cast<uint4 *>(to) = v;
#else
    memcpy(to, &v, sizeof v);
#endif
}

template <int W> __device__ inline uint4 eight_codes(const Plane &p, int64_t n, int64_t k) {
    unsigned r[4] = {0, 0, 0, 0};
    if (n < p.rows) {
        const unsigned char *at = p.data + code_offset<W>(p, n, k);
        if (W == EXC_F8_E4M3) {
            const uint2 c = *reinterpret_cast<const uint2 *>(at);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned pair = (j < 2 ? c.x : c.y) >> (j % 2 * 16);
                r[j] = two_bf16(from_e4m3(pair & 0xff), from_e4m3(pair >> 8 & 0xff));
            }
        } else {
            const unsigned c = *reinterpret_cast<const unsigned *>(at);
#pragma unroll
            for (int j = 0; j < 4; j++) r[j] = two_bf16(from_e2m1(c >> (8 * j)), from_e2m1(c >> (8 * j + 4)));
        }
    }
    return make_uint4(r[0], r[1], r[2], r[3]);
}

template <int W, int BM_, int BN_, int NB, int WARPS_M, int WARPS_N> struct TensorTile {
    static constexpr int BM = BM_, BN = BN_, THREADS = WARPS_M * WARPS_N * WARP, OUT = BN + 4;
    static constexpr int BK = 32, STAGES = 3,
                         PITCH = BK + 8; /* 80 bytes: eight rows of a fragment hit all banks once */
    static constexpr int MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8;
    static_assert(MT >= 1 && NT % 2 == 0, "a warp takes whole fragments");
    struct Stage {
        bf16 x[BM][PITCH];
        bf16 w[NB][BN][PITCH];
    };
    static constexpr size_t SHARED = STAGES * sizeof(Stage) > sizeof(float) * NB *BM *OUT
                                         ? STAGES * sizeof(Stage)
                                         : sizeof(float) * NB *BM *OUT;
    using Act = bf16;
    static constexpr int BLOCKS = BM <= 16 ? 6 : THREADS > 128 ? 2 : NB == 1 ? 4 : 3; /* of a processor, at least */

    __device__ static void load(Stage &s, const Rows &rows, const Plane *w, int64_t column, int64_t k0) {
        const int64_t k = w[0].k;
        load_rows<BK, THREADS>(s.x, rows, k0, k);
        for (int c = threadIdx.x; c < NB * BN * (BK / 8); c += THREADS) {
            const int b = c / (BN * (BK / 8)), r = c / (BK / 8) % BN, part = c % (BK / 8) * 8;
            const int64_t n = column + r;
            if (is_coded(W)) {
                const uint4 eight = eight_codes<W>(w[b], n, k0 + part);
                store16(&s.w[b][r][part], eight);
            } else {
                const bool in = n < w[b].rows;
                cp_async16(&s.w[b][r][part], w[b].data + (in ? code_offset<EXC_BF16>(w[b], n, k0 + part) : 0),
                           in ? 16 : 0);
            }
        }
    }

    __device__ static void multiply(const Stage &s, int wm, int wn, int lane, float (&acc)[NB][MT][NT][4]) {
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            unsigned a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
                ldmatrix_x4(a[m], &s.x[(wm * MT + m) * 16 + lane % 16][kk + lane / 16 * 8]);
#pragma unroll
            for (int b = 0; b < NB; b++)
#pragma unroll
                for (int n = 0; n < NT; n += 2) {
                    unsigned f[4]; /* two fragments of eight outputs, both halves of k */
                    ldmatrix_x4(f,
                                &s.w[b][(wn * NT + n) * 8 + lane / 16 * 8 + lane % 8][kk + lane / 8 % 2 * 8]);
                    const unsigned lo[2] = {f[0], f[1]}, hi[2] = {f[2], f[3]};
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma_bf16(acc[b][m][n], a[m], lo);
                        mma_bf16(acc[b][m][n + 1], a[m], hi);
                    }
                }
        }
    }

    /* total += part times the scales of the span that ends before k1 */
    __device__ static void add_span(const Plane *w, int64_t column, int64_t k1, int wn, int lane,
                                    float (&part)[NB][MT][NT][4], float (&total)[NB][MT][NT][4]) {
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const int64_t at = column + (wn * NT + n) * 8 + lane % 4 * 2;
                const float s[2] = {scale_at<W>(w[b], at, k1 - 1), scale_at<W>(w[b], at + 1, k1 - 1)};
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        total[b][m][n][i] += part[b][m][n][i] * s[i % 2];
                        part[b][m][n][i] = 0;
                    }
            }
    }

    /* out [NB][BM][OUT] f32 at the start of `shared`; outputs column.. of each w. All threads call. */
    __device__ static float *run(unsigned char *shared, const Rows &rows, const Plane *w, int64_t column) {
        Stage *ring = reinterpret_cast<Stage *>(shared);
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, wm = warp / WARPS_N,
                  wn = warp % WARPS_N;
        const int steps = (int)(w[0].pitch / BK);
        float acc[NB][MT][NT][4] = {}, total[NB][MT][NT][4] = {};
        for (int s = 0; s < STAGES - 1; s++) {
            if (s < steps) load(ring[s], rows, w, column, (int64_t)s * BK);
            cp_async_commit();
        }
        for (int s = 0; s < steps; s++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            const int next = s + STAGES - 1;
            if (next < steps) load(ring[next % STAGES], rows, w, column, (int64_t)next * BK);
            cp_async_commit();
            multiply(ring[s % STAGES], wm, wn, lane, acc);
            const int64_t end = (int64_t)(s + 1) * BK;
            if (is_coded(W) && (end % span_of(W) == 0 || s + 1 == steps))
                add_span(w, column, end < w[0].k ? end : w[0].k, wn, lane, acc, total);
        }
        cp_async_wait<0>();
        __syncthreads();
        float *out = reinterpret_cast<float *>(shared);
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int r = (wm * MT + m) * 16 + lane / 4 + i / 2 * 8,
                                  c = (wn * NT + n) * 8 + lane % 4 * 2 + i % 2;
                        out[(b * BM + r) * OUT + c] = is_coded(W) ? total[b][m][n][i] : acc[b][m][n][i];
                    }
        __syncthreads();
        return out;
    }
};

/* two codes, the first in the low bits, as two bf16 numbers, exactly */
template <int W> __device__ inline unsigned two_codes(unsigned c) {
    if (W == EXC_F8_E4M3) {
        const unsigned two = (c & 0xff) | (c & 0xff00) << 8;
        return scale_bf16((two & 0x00800080u) << 8 | (two & 0x007f007fu) << 4, 0x7b807b80u); /* 2^120 */
    }
    const unsigned two = (c & 15) | (c & 0xf0) << 12;
    return scale_bf16((two & 0x00080008u) << 12 | (two & 0x00070007u) << 6, 0x7e807e80u); /* 2^126 */
}

/* coded weights and at most 16 rows: the bits of TensorTile's sums */
template <int W, int NB> struct ThinTile {
    static constexpr int BM = 16, BN = 64, THREADS = 4 * WARP, OUT = BN + 4, BK = E4M3_SPAN, STAGES = 4, NT = BN / 4 / 8;
    static constexpr int X_PITCH = BK + 8, ROW = (int)code_bytes(BK, W), W_PITCH = ROW + 16, PER_PIECE = BK / (ROW / 16);
    static constexpr int SPANS = BK / span_of(W);
    static constexpr int BLOCKS = NB == 1 ? 4 : 2; /* of a processor, at least */
    struct Stage {
        bf16 x[BM][X_PITCH];
        unsigned char w[NB][BN][W_PITCH]; /* rows four banks apart but for multiples of 32: fragments meet no conflict */
    };
    static constexpr size_t RESULT = sizeof(float) * NB * BM * OUT;
    static constexpr size_t SHARED = STAGES * sizeof(Stage) > RESULT ? STAGES * sizeof(Stage) : RESULT;
    using Act = bf16;
    using Scales = unsigned[NB][NT][2]; /* of a stage and this lane's columns: f32, or four e8m0 */

    __device__ static void load(Stage &s, const Rows &rows, const Plane *w, int64_t column, int64_t k0) {
        const int64_t k = w[0].k;
        load_rows<BK, THREADS>(s.x, rows, k0, k);
        for (int c = threadIdx.x; c < NB * BN * (ROW / 16); c += THREADS) {
            const int b = c / (BN * (ROW / 16)), r = c / (ROW / 16) % BN, part = c % (ROW / 16);
            const int64_t n = column + r, at = k0 + part * PER_PIECE;
            const bool in = n < w[b].rows && at < w[b].pitch;
            cp_async16(&s.w[b][r][part * 16], w[b].data + (in ? code_offset<W>(w[b], n, at) : 0), in ? 16 : 0);
        }
    }

    __device__ static void scales(const Plane *w, int64_t column, int64_t k0, int warp, int lane, Scales &to) {
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int64_t row = column + (warp * NT + n) * 8 + lane % 4 * 2 + i;
                    to[b][n][i] = 0;
#pragma unroll
                    for (int j = 0; j < SPANS; j++) {
                        const int64_t k = k0 + j * span_of(W);
                        if (row >= w[b].rows || k >= w[b].k) continue;
                        const unsigned char *at = w[b].data + scale_offset<W>(w[b], row, k);
                        to[b][n][i] |= W == EXC_F4 ? (unsigned)*at << 8 * j : *reinterpret_cast<const unsigned *>(at);
                    }
                }
    }

    /* total += X W^T of a stage */
    __device__ static void multiply(const Stage &s, int warp, int lane, const Scales &scale, float (&total)[NB][NT][4]) {
        float acc[NB][NT][4] = {};
#pragma unroll
        for (int kk = 0; kk < BK / 16; kk++) {
            unsigned a[4];
            ldmatrix_x4(a, &s.x[lane % 16][kk * 16 + lane / 16 * 8]);
#pragma unroll
            for (int b = 0; b < NB; b++)
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const unsigned char *row = s.w[b][(warp * NT + n) * 8 + lane / 4];
                    unsigned f[2];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int k = kk * 16 + half * 8 + lane % 4 * 2;
                        f[half] = two_codes<W>(W == EXC_F4 ? row[k / 2] : *reinterpret_cast<const unsigned short *>(row + k));
                    }
                    mma_bf16(acc[b][n], a, f);
                }
            if ((kk + 1) * 16 % span_of(W)) continue;
            const int span = (kk + 1) * 16 / span_of(W) - 1;
#pragma unroll
            for (int b = 0; b < NB; b++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const unsigned by = scale[b][n][i % 2];
                        total[b][n][i] += acc[b][n][i] * (W == EXC_F4 ? from_e8m0(by >> 8 * span & 0xff) : f32_of(by));
                        acc[b][n][i] = 0;
                    }
        }
    }

    /* as TensorTile's */
    __device__ static float *run(unsigned char *shared, const Rows &rows, const Plane *w, int64_t column) {
        Stage *ring = reinterpret_cast<Stage *>(shared);
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, steps = (int)ceil_div(w[0].pitch, BK);
        float total[NB][NT][4] = {};
        Scales now, next;
        scales(w, column, 0, warp, lane, next);
        for (int s = 0; s < STAGES - 1; s++) {
            if (s < steps) load(ring[s], rows, w, column, (int64_t)s * BK);
            cp_async_commit();
        }
        for (int s = 0; s < steps; s++) {
            memcpy(now, next, sizeof now);
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            const int later = s + STAGES - 1;
            if (later < steps) load(ring[later % STAGES], rows, w, column, (int64_t)later * BK);
            cp_async_commit();
            scales(w, column, (int64_t)(s + 1) * BK, warp, lane, next);
            multiply(ring[s % STAGES], warp, lane, now, total);
        }
        cp_async_wait<0>();
        __syncthreads();
        float *out = reinterpret_cast<float *>(shared);
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    out[(b * BM + lane / 4 + i / 2 * 8) * OUT + (warp * NT + n) * 8 + lane % 4 * 2 + i % 2] = total[b][n][i];
        __syncthreads();
        return out;
    }
};

/* ----------------------------------------------------------------------------------------------- plain f32,
 * f32 rows */

template <int W, int BM_, int BN_, int NB> struct PlainTile {
    static constexpr int BM = BM_, BN = BN_, THREADS = 128, OUT = BN + 4, BK = 16, PITCH = BK + 1;
    static constexpr int ACROSS = 16, DOWN = THREADS / ACROSS, TM = BM / DOWN, TN = BN / ACROSS;
    struct Stage {
        float x[BM][PITCH];
        float w[NB][BN][PITCH];
    };
    static constexpr size_t SHARED = sizeof(Stage) > sizeof(float) * NB *BM *OUT
                                         ? sizeof(Stage)
                                         : sizeof(float) * NB *BM *OUT;
    using Act = float;
    static constexpr int BLOCKS = 4; /* of a processor, at least */

    __device__ static void load(Stage &s, const Rows &rows, const Plane *w, int64_t column, int64_t k0) {
        for (int i = threadIdx.x; i < BM * BK; i += THREADS) {
            const int r = i / BK, k = i % BK;
            s.x[r][k] =
                r < rows.count && k0 + k < w[0].k ? reinterpret_cast<const float *>(rows.row[r])[k0 + k] : 0;
        }
        for (int i = threadIdx.x; i < NB * BN * BK; i += THREADS) {
            const int b = i / (BN * BK), n = i / BK % BN, k = i % BK;
            s.w[b][n][k] = code_at<W>(w[b], column + n, k0 + k);
        }
    }

    __device__ static float *run(unsigned char *shared, const Rows &rows, const Plane *w, int64_t column) {
        Stage &s = *reinterpret_cast<Stage *>(shared);
        const int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
        float acc[NB][TM][TN] = {}, total[NB][TM][TN] = {};
        for (int64_t k0 = 0; k0 < w[0].pitch; k0 += BK) {
            __syncthreads();
            load(s, rows, w, column, k0);
            __syncthreads();
            for (int k = 0; k < BK; k++)
#pragma unroll
                for (int b = 0; b < NB; b++)
#pragma unroll
                    for (int m = 0; m < TM; m++)
#pragma unroll
                        for (int n = 0; n < TN; n++)
                            acc[b][m][n] =
                                fmaf(s.x[down + m * DOWN][k], s.w[b][across + n * ACROSS][k], acc[b][m][n]);
            const int64_t end = k0 + BK;
            if (is_coded(W) && (end % span_of(W) == 0 || end == w[0].pitch))
                for (int b = 0; b < NB; b++)
                    for (int n = 0; n < TN; n++) {
                        const float scale = scale_at<W>(w[b], column + across + n * ACROSS,
                                                        (end < w[0].k ? end : w[0].k) - 1);
                        for (int m = 0; m < TM; m++) {
                            total[b][m][n] += acc[b][m][n] * scale;
                            acc[b][m][n] = 0;
                        }
                    }
        }
        __syncthreads();
        float *out = reinterpret_cast<float *>(shared);
        for (int b = 0; b < NB; b++)
            for (int m = 0; m < TM; m++)
                for (int n = 0; n < TN; n++)
                    out[(b * BM + down + m * DOWN) * OUT + across + n * ACROSS] =
                        is_coded(W) ? total[b][m][n] : acc[b][m][n];
        __syncthreads();
        return out;
    }
};

/* Runs the statement with TILE as the engine for activations `act`, weights `w_dtype`, NB matrices and about
 * `rows` rows that share a matrix. bf16 rows never meet f32 weights. */
template <int W, int NB>
using FewRows = typename std::conditional<is_coded(W), ThinTile<W, NB>, TensorTile<W, 16, 64, NB, 1, 4>>::type;
#define TILE_SIZES(W, NB, rows, ...)                                                                         \
    if ((rows) <= 16) {                                                                                      \
        using TILE = FewRows<W, NB>;                                                                         \
        __VA_ARGS__;                                                                                         \
    } else {                                                                                                 \
        using TILE = TensorTile<W, 64, 64, NB, 2, 2>;                                                        \
        __VA_ARGS__;                                                                                         \
    }
#define PLAIN_SIZES(W, NB, ...)                                                                              \
    {                                                                                                        \
        using TILE = PlainTile<W, 32, 64, NB>;                                                               \
        __VA_ARGS__;                                                                                         \
    }
#define BY_TILE(act, w_dtype, NB, rows, ...)                                                                 \
    if ((act) == EXC_BF16 && (w_dtype) == EXC_BF16) {                                                        \
        TILE_SIZES(EXC_BF16, NB, rows, __VA_ARGS__)                                                          \
    } else if ((act) == EXC_BF16 && (w_dtype) == EXC_F8_E4M3) {                                              \
        TILE_SIZES(EXC_F8_E4M3, NB, rows, __VA_ARGS__)                                                       \
    } else if ((act) == EXC_BF16 && (w_dtype) == EXC_F4) {                                                   \
        TILE_SIZES(EXC_F4, NB, rows, __VA_ARGS__)                                                            \
    } else if ((act) == EXC_F32 && (w_dtype) == EXC_BF16) {                                                  \
        PLAIN_SIZES(EXC_BF16, NB, __VA_ARGS__)                                                               \
    } else if ((act) == EXC_F32 && (w_dtype) == EXC_F32) {                                                   \
        PLAIN_SIZES(EXC_F32, NB, __VA_ARGS__)                                                                \
    } else if ((act) == EXC_F32 && (w_dtype) == EXC_F8_E4M3) {                                               \
        PLAIN_SIZES(EXC_F8_E4M3, NB, __VA_ARGS__)                                                            \
    } else if ((act) == EXC_F32 && (w_dtype) == EXC_F4) {                                                    \
        PLAIN_SIZES(EXC_F4, NB, __VA_ARGS__)                                                                 \
    } else                                                                                                   \
        return EXC_ERR_USAGE

#endif
