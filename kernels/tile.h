/* tile.h - the micro-kernels behind matmul, glu and down, and the sweep that drives them.
 *
 * A tile is up to `rows` rows of x times a pair of panels (2 x 16 outputs) over all of k, sums in registers. x is first
 * gathered into a buffer where a step of the kernel finds all its rows side by side; weights are read as they were
 * packed, each panel once for all rows of a sweep. Every output is one chain of multiply-adds over ascending k,
 * whatever the height of its tile: a row's bits do not depend on the rows beside it.
 *
 * One exc_tile a pair of operand dtypes and instruction set; exc_tile_for() picks it. */
#ifndef EXC_TILE_H
#define EXC_TILE_H

#include "ops.h"

#define EXC_PAIR (2 * EXC_PANEL) /* outputs of a tile */
#define EXC_TILE_ROWS 32         /* the tallest tile of any instruction set */
#define EXC_ROW_BLOCK 64         /* tiles do not cross multiples of this; sums over rows are taken in such blocks */

/* The panels of a pair, and those that will be read next: a step of the kernel also asks for a piece of them, so that
 * they have arrived when their turn comes. */
typedef struct exc_weights {
    const uint8_t *now[2];
    const uint8_t *next[2]; /* any address; moves on by `step` bytes a step of the kernel */
    int64_t step;
    const uint8_t *scale[2]; /* of panels that were decoded: their scales */
} exc_weights;

/* How gate and up of a panel become activations: biases point at the panel's first column, or NULL. */
typedef struct exc_gated {
    exc_activation fn;
    const float *gate_bias, *up_bias;
} exc_gated;

typedef struct exc_tile {
    int rows;     /* tallest tile */
    int k_step;   /* a gathered row is padded with zeros to a multiple of this many inputs */
    size_t width; /* bytes of a gathered input */
    int line;     /* bytes of a panel that k_step inputs take */
    /* rows (pointers to k values of act) -> tile; may write up to 64 bytes behind it */
    void (*gather)(const void *const *row, int rows, int64_t k, void *tile);
    /* out[r][0..15] = row r times panel now[0], out[r][16..31] = times now[1] */
    void (*multiply)(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]);
    /* one panel of a tile: y[r, 0..cols) = out[r][0..cols) (+ bias) (+ add[r, 0..cols)); add has y's stride; square f32
     * [rows,16] or NULL gets the squares of y added by lane */
    void (*store)(const float (*out)[EXC_PAIR], int rows, int cols, float *y, int64_t stride, const float *bias,
                  const float *add, float (*square)[EXC_PANEL]);
    /* mid[r, 0..cols) of gate out[r][i] and up out[r][16+i], stored as act; where seen[r], added to sum f32 [16] as stored;
     * seen may be NULL */
    void (*gate)(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid, int64_t stride,
                 const uint8_t *seen, float *sum);
    /* quantised weights, where there are several tiles to a panel; NULL: not worth it. The codes of a panel packed from k inputs as
     * a bf16 panel, the same product from that, bit for bit, and where in a panel the scales begin */
    void (*decode)(const uint8_t *panel, int64_t k, uint8_t *out);
    void (*multiply_decoded)(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]);
    size_t (*code_bytes)(int64_t k);
} exc_tile;

/* NULL: operands outside the contract (bf16 activations with f32 weights) */
const exc_tile *exc_tile_for(int act, int weights);

/* tables by instruction set: activations x weights */
enum {
    EXC_TILE_BF16_BF16, EXC_TILE_F32_BF16, EXC_TILE_F32_F32, EXC_TILE_BF16_F8, EXC_TILE_F32_F8, EXC_TILE_BF16_F4, EXC_TILE_F32_F4,
    EXC_TILES
};
extern const exc_tile exc_tile_generic[EXC_TILES], exc_tile_avx2[EXC_TILES], exc_tile_avx512[EXC_TILES];
/* vdpbf16ps: the three with bf16 activations; AMX: bf16 weights only, it has no registers to decode in */
extern const exc_tile exc_tile_dot[EXC_TILES], exc_tile_amx[1];
/* what follows a tile, with AVX-512 (avx512.c), for bf16 activations: AMX has no arithmetic of its own for it */
void exc_store_avx512(const float (*out)[EXC_PAIR], int rows, int cols, float *y, int64_t stride, const float *bias,
                      const float *add, float (*square)[EXC_PANEL]);
void exc_gate_avx512(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid, int64_t stride,
                     const uint8_t *seen, float *sum);

/* One sweep: `rows` rows times panel pairs [first,last). Rows are gathered a chunk at a time (as many as stay in the
 * second-level cache), then every pair is multiplied with all tiles of the chunk, in ascending rows. */
typedef struct exc_sweep {
    const exc_tile *tile;
    int64_t k, rows, first, last;
    void *user;
    const void *(*row)(void *user, int64_t r);
    void (*pair)(void *user, int64_t pair, const uint8_t *w[2]);
    void (*done)(void *user, int64_t pair, int64_t first, int rows, const float (*out)[EXC_PAIR]);
} exc_sweep;
void exc_sweep_run(const exc_sweep *s, void *scratch, size_t bytes);
/* rows of a chunk, a multiple of EXC_ROW_BLOCK unless k is beyond all reason */
int64_t exc_sweep_chunk(const exc_tile *tile, int64_t k, size_t bytes);

/* How many panel pairs a task should take: enough for some 10 us of work, at most all. `rows` share them. */
int64_t exc_pairs_per_task(int64_t rows, int64_t k, int64_t pairs);

/* Scratch of a worker: the sweep's gathered rows, then what the expert ops keep while they run. Worker 0's block also
 * holds what all tasks of such an op share. */
#define EXC_SWEEP_BYTES(scratch_bytes) ((scratch_bytes) - ((size_t)2 << 20))
#define EXC_SWEEP_ROWS 1024 /* most rows of a chunk */

/* Units of work 0..units-1 as tasks: while memory is the limit a task that starts anew loses the processor's prefetch streams,
 * and a task that ends late leaves the others idle. So the first two thirds of the units go out in fours, the rest one by
 * one. `few` says that memory is the limit. */
typedef struct exc_spread {
    int64_t units, unit, large; /* units; units of a small task; tasks of four small ones */
    size_t tasks;
} exc_spread;
static inline exc_spread exc_spread_make(int64_t units, int64_t unit, int few) {
    exc_spread s = {units, unit, few ? units * 2 / 3 / (4 * unit) : 0, 0};
    s.tasks = (size_t)(s.large + (units - 4 * unit * s.large + unit - 1) / unit);
    return s;
}
/* units [first, return) of a task */
static inline int64_t exc_spread_task(const exc_spread *s, int64_t task, int64_t *first) {
    int64_t small = task - s->large, last;
    *first = small < 0 ? task * 4 * s->unit : (s->large * 4 + small) * s->unit;
    last = *first + (small < 0 ? 4 * s->unit : s->unit);
    return last < s->units ? last : s->units;
}

/* ---- experts: rows grouped by expert (permute), cut into tasks of about equal work whatever the routing (groups.c) */
typedef struct exc_groups {
    const int64_t *offset;  /* [E+1] rows of each expert */
    const int32_t *active;  /* [count] experts that have rows; in worker 0's scratch */
    int64_t count;
    int64_t pairs;          /* panel pairs of an expert */
    int64_t per_piece;      /* pairs of a piece */
    int64_t pieces;         /* pieces of an expert */
    exc_spread spread;      /* all pieces of all experts as tasks */
    size_t tasks;
    float *table;           /* rest of worker 0's scratch, table_count floats */
    size_t table_count;
} exc_groups;
/* false: more experts than scratch can list */
int exc_groups_make(exc_groups *g, exc_queue *q, const int64_t *offset, int64_t experts, int64_t k, int64_t pairs);
void exc_groups_whole(exc_groups *g); /* one piece an expert */
/* Piece i of a task; 0: no more. */
typedef struct exc_piece_of {
    int64_t expert, row, rows; /* its rows: row .. row+rows-1 */
    int64_t index, first, last; /* piece number within the expert; panel pairs */
} exc_piece_of;
int exc_groups_piece(const exc_groups *g, size_t task, int64_t i, exc_piece_of *piece);

/* Matmul and down pair panels that lie half a run apart: with pairs [first,last) of a run, pair p is panels 2*first + (p - first)
 * and that plus (last - first). Each of the two streams of weights is then sequential over the whole run, which is what the
 * processor's prefetcher wants. half 0 or 1; an odd last panel has no partner: its index is not below the panel count. */
static inline int64_t exc_run_panel(int64_t first, int64_t last, int64_t p, int half) {
    return first + p + half * (last - first);
}

static inline const uint8_t *exc_panel_at(const struct exc_packed *w, int64_t panel, size_t panel_bytes) {
    return (const uint8_t *)w->data + (size_t)panel * panel_bytes;
}

/* Asks for the lines that the next tile of this pair will write, one tile's time before it does. */
static inline void exc_ask_rows(const void *first, int64_t row_bytes, int rows, int bytes) {
    const char *at = first;
    for (int r = 0; r < rows; r++, at += row_bytes)
        for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

/* ---- bodies that every instruction set compiles for itself: thin functions with the target attribute call these */
#define EXC_INLINE static inline __attribute__((always_inline))

EXC_INLINE float exc_from_bits(uint32_t u) {
    union {
        uint32_t u;
        float f;
    } c = {u};
    return c.f;
}

EXC_INLINE uint32_t exc_to_bits(float f) {
    union {
        float f;
        uint32_t u;
    } c = {f};
    return c.u;
}

/* to nearest even; NaN stays NaN */
EXC_INLINE uint32_t exc_round_bf16(float x) {
    uint32_t u = exc_to_bits(x), nan = (u & 0x7fffffff) > 0x7f800000;
    return nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

/* exp(x), relative error below 2e-7 for |x| <= 87, held at that bound beyond it (silu divides by 1 + it). Branch-free
 * so that it vectorises: x = n ln2 + r with n taken by adding 1.5 * 2^23, then a degree-6 polynomial in r. */
EXC_INLINE float exc_exp(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666668e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * exc_from_bits((exc_to_bits(shifted) << 23) + 0x3f800000u);
}

/* x * sigmoid(alpha * x) */
EXC_INLINE float exc_swish(float x, float alpha) { return x / (1.0f + exc_exp(-alpha * x)); }

/* comparisons that let NaN through */
EXC_INLINE float exc_clamped_glu(float g, float u, float alpha, float limit) {
    g = g > limit ? limit : g;
    u = u > limit ? limit : u;
    u = u < -limit ? -limit : u;
    return exc_swish(g, alpha) * (u + 1.0f);
}

EXC_INLINE void exc_store_body(const float (*out)[EXC_PAIR], int rows, int cols, float *y, int64_t stride,
                               const float *bias, const float *add, float (*square)[EXC_PANEL]) {
    for (int r = 0; r < rows; r++, y += stride, add += add ? stride : 0) {
        float v[EXC_PANEL] = {0};
        for (int i = 0; i < cols; i++) v[i] = out[r][i];
        if (bias)
            for (int i = 0; i < cols; i++) v[i] += bias[i];
        if (add)
            for (int i = 0; i < cols; i++) v[i] += add[i];
        if (cols == EXC_PANEL) __builtin_memcpy(y, v, sizeof v);
        else __builtin_memcpy(y, v, (size_t)cols * sizeof *v);
        if (square)
            for (int i = 0; i < EXC_PANEL; i++) square[r][i] += v[i] * v[i];
    }
}

EXC_INLINE void exc_gate_body(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid,
                              int64_t stride, int act, const uint8_t *seen, float *sum) {
    float gate_bias[EXC_PANEL] = {0}, up_bias[EXC_PANEL] = {0}, alpha = how->fn.alpha, limit = how->fn.limit;
    if (how->gate_bias) __builtin_memcpy(gate_bias, how->gate_bias, (size_t)cols * sizeof(float));
    if (how->up_bias) __builtin_memcpy(up_bias, how->up_bias, (size_t)cols * sizeof(float));
    for (int r = 0; r < rows; r++) {
        float v[EXC_PANEL], g[EXC_PANEL], u[EXC_PANEL];
        for (int i = 0; i < EXC_PANEL; i++) g[i] = out[r][i] + gate_bias[i];
        for (int i = 0; i < EXC_PANEL; i++) u[i] = out[r][EXC_PANEL + i] + up_bias[i];
        if (how->fn.kind == EXC_GLU_CLAMPED)
            for (int i = 0; i < EXC_PANEL; i++) v[i] = exc_clamped_glu(g[i], u[i], alpha, limit);
        else
            for (int i = 0; i < EXC_PANEL; i++) v[i] = exc_swish(g[i], 1.0f) * u[i];
        if (act == EXC_BF16) {
            uint16_t half[EXC_PANEL], *to = (uint16_t *)mid + r * stride;
            for (int i = 0; i < EXC_PANEL; i++) {
                uint32_t bits = exc_round_bf16(v[i]);
                half[i] = (uint16_t)bits;
                v[i] = exc_from_bits(bits << 16);
            }
            if (cols == EXC_PANEL) __builtin_memcpy(to, half, sizeof half);
            else __builtin_memcpy(to, half, (size_t)cols * 2);
        } else {
            float *to = (float *)mid + r * stride;
            if (cols == EXC_PANEL) __builtin_memcpy(to, v, sizeof v);
            else __builtin_memcpy(to, v, (size_t)cols * 4);
        }
        if (seen && seen[r])
            for (int i = 0; i < EXC_PANEL; i++) sum[i] += v[i];
    }
}

/* rows of bf16 or f32 -> f32 tile [k to a multiple of 2][rows] */
EXC_INLINE void exc_gather_body(const void *const *row, int rows, int64_t k, int act, float *tile) {
    for (int r = 0; r < rows; r++) {
        float *to = tile + r;
        for (int64_t i = 0; i < k; i++, to += rows)
            *to = act == EXC_F32 ? ((const float *)row[r])[i] : exc_from_bits((uint32_t)((const uint16_t *)row[r])[i] << 16);
        if (k & 1) *to = 0;
    }
}

/* defines the store and gate functions of one instruction set */
#define EXC_TILE_ENDS(target)                                                                                        \
    target static void store(const float (*out)[EXC_PAIR], int rows, int cols, float *y, int64_t stride,            \
                             const float *bias, const float *add, float (*square)[EXC_PANEL]) {                     \
        exc_store_body(out, rows, cols, y, stride, bias, add, square);                                              \
    }                                                                                                                \
    target static void gate_bf16(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid, \
                                 int64_t stride, const uint8_t *seen, float *sum) {                                 \
        exc_gate_body(out, rows, cols, how, mid, stride, EXC_BF16, seen, sum);                                      \
    }                                                                                                                \
    target static void gate_f32(const float (*out)[EXC_PAIR], int rows, int cols, const exc_gated *how, void *mid,  \
                                int64_t stride, const uint8_t *seen, float *sum) {                                  \
        exc_gate_body(out, rows, cols, how, mid, stride, EXC_F32, seen, sum);                                       \
    }

#endif
