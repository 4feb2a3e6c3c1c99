/* wide.cuh - tiles of 128 rows on Hopper: two groups of four warps, operands read by the tensor cores from shared memory
 * (wgmma.cuh). Elsewhere, for coded weights and for few rows the tiles of product.cuh serve.
 *
 * A stage is 64 of k: rows of X and of W of 128 bytes each, brought by cp.async, whose 16-byte pieces go where the
 * swizzle wants them; so rows may lie anywhere (grouped experts) and weights stay packed as they are. Three stages of 32
 * KB leave room for a second block on a processor, which multiplies while the first waits at its barrier. A stage takes
 * 128 x 128 x 64 multiply-adds, some 500 cycles of four tensor cores (989 TFLOP/s: 2130 a cycle and processor), and eight
 * 16-byte copies a thread to issue, 64 warp instructions and their addresses. Not measured.
 *
 * The hardware's order of additions within 16 of k is its own, so rows of these tiles need not have the bits of other
 * tiles: queues that must be reproducible do not use them. Nobody could run this where it was written: when a queue is
 * opened on a Hopper for the first time, a product of whole numbers is made both ways, and one that differs turns these
 * tiles off (wide.cu). */
#ifndef EXC_WIDE_CUH
#define EXC_WIDE_CUH

#include "product.cuh"
#include "wgmma.cuh"

template <int NB, int BN_> struct WideTile {
    static constexpr int BM = 128, BN = BN_, THREADS = BM / 64 * GROUP, OUT = BN + 4, BK = SWIZZLE_ROW / 2, STAGES = 3;
    static constexpr int X_BYTES = BM * SWIZZLE_ROW, W_BYTES = BN * SWIZZLE_ROW, STAGE = X_BYTES + NB * W_BYTES;
    static constexpr size_t RING = STAGES * (size_t)STAGE, RESULT = sizeof(float) * NB * BM * OUT, ALIGN = 8 * SWIZZLE_ROW,
                            SHARED = ALIGN + (RING > RESULT ? RING : RESULT);
    static constexpr int BLOCKS = 2; /* of a processor, at least */
    using Act = bf16;

    __device__ static void load(unsigned char *stage, const Rows &rows, const Plane *w, int64_t column, int64_t k0) {
        for (int c = threadIdx.x; c < BM * 8; c += THREADS) {
            const int r = c / 8, part = c % 8;
            const int64_t k = k0 + part * 8;
            const bool in = r < rows.count && k < w[0].k;
            cp_async16(stage + swizzled(r, part), rows.row[r] + (in ? k * 2 : 0), in ? 16 : 0);
        }
        for (int c = threadIdx.x; c < NB * BN * 8; c += THREADS) {
            const int b = c / (BN * 8), r = c / 8 % BN, part = c % 8;
            const int64_t n = column + r, k = k0 + part * 8;
            const bool in = n < w[b].rows && k < w[b].pitch;
            cp_async16(stage + X_BYTES + b * W_BYTES + swizzled(r, part),
                       w[b].data + (in ? code_offset<EXC_BF16>(w[b], n, k) : 0), in ? 16 : 0);
        }
    }

    /* out [NB][BM][OUT] f32 in `shared`; outputs column.. of each w. Rows are whole. All threads call. */
    __device__ static float *run(unsigned char *shared, const Rows &rows, const Plane *w, int64_t column) {
        unsigned char *ring = shared + (ALIGN - shared_address(shared) % ALIGN) % ALIGN;
        const int group = threadIdx.x / GROUP, warp = threadIdx.x % GROUP / WARP, lane = threadIdx.x % WARP;
        const int steps = (int)ceil_div(w[0].pitch, BK);
        float acc[NB][BN / 2] = {};
        for (int s = 0; s < STAGES - 1; s++) {
            if (s < steps) load(ring + s * STAGE, rows, w, column, (int64_t)s * BK);
            cp_async_commit();
        }
        for (int s = 0; s < steps; s++) {
            unsigned char *stage = ring + s % STAGES * STAGE;
            cp_async_wait<STAGES - 2>();
            bulk_fence();
#pragma unroll
            for (int b = 0; b < NB; b++) group_hold(acc[b]);
            group_wait<0>(); /* products of the stage that is loaded next */
            __syncthreads();
            const uint64_t x = group_operand(stage + group * 64 * SWIZZLE_ROW), at = group_operand(stage + X_BYTES);
            group_fence();
#pragma unroll
            for (int k = 0; k < BK / 16; k++)
#pragma unroll
                for (int b = 0; b < NB; b++)
                    group_multiply<BN>(acc[b], x + k * (32 >> 4), at + b * (W_BYTES >> 4) + k * (32 >> 4));
            group_commit();
#pragma unroll
            for (int b = 0; b < NB; b++) group_hold(acc[b]);
            const int next = s + STAGES - 1;
            if (next < steps) load(ring + next % STAGES * STAGE, rows, w, column, (int64_t)next * BK);
            cp_async_commit();
        }
        group_wait<0>();
#pragma unroll
        for (int b = 0; b < NB; b++) group_hold(acc[b]);
        cp_async_wait<0>();
        __syncthreads();
        float *out = reinterpret_cast<float *>(ring);
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int i = 0; i < BN / 2; i++) {
                const int r = group * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8, c = i / 4 * 8 + lane % 4 * 2 + i % 2;
                out[(b * BM + r) * OUT + c] = acc[b][i];
            }
        __syncthreads();
        return out;
    }
};

/* whether these tiles are to be used on a queue's device, and did right there. wide.cu */
bool exc_wide(const exc_queue *q);
exc_status exc_wide_check(exc_queue *q); /* with a stream; waits */
/* a line for the description of the module, at most `bytes` with its end */
void exc_wide_describe(char *text, size_t bytes);

/* Runs the statement with TILE as the wide tile, where that serves: NB matrices of bf16, at least `rows` rows that share one */
#define BY_WIDE(q, act, w_dtype, whole, NB, rows, ...)                                                                       \
    if ((act) == EXC_BF16 && (w_dtype) == EXC_BF16 && (whole) && (rows) > 64 && exc_wide(q)) {                               \
        using TILE = WideTile<NB, 128 / NB>;                                                                                 \
        __VA_ARGS__;                                                                                                         \
    }

#endif
