/* tile.c - the choice of micro-kernels, their portable definition, and the sweep over tiles.
 *
 * The portable kernels widen bf16 to f32 and keep a tile of 4 rows x 32 outputs in plain arrays. They are what every
 * faster set is tested against, and what runs where no faster one may. */
#include <string.h>

#include "codes.h"

#define ROWS 4
#define CHUNK_BYTES ((size_t)512 << 10) /* gathered rows of a chunk: half of a second-level cache of 1 MB */

EXC_TILE_ENDS()

static void gather_bf16(const void *const *row, int rows, int64_t k, void *tile) {
    exc_gather_body(row, rows, k, EXC_BF16, tile);
}

static void gather_f32(const void *const *row, int rows, int64_t k, void *tile) {
    exc_gather_body(row, rows, k, EXC_F32, tile);
}

static void multiply_bf16(const void *tile, int rows, const exc_weights *both, int64_t k, float (*out)[EXC_PAIR]) {
    const float *x = tile;
    const uint16_t *w[2] = {(const uint16_t *)(const void *)both->now[0], (const uint16_t *)(const void *)both->now[1]};
    memset(out, 0, (size_t)rows * sizeof *out);
    for (int64_t i = 0; i < k; i += 2, x += 2 * rows)
        for (int p = 0; p < 2; p++, w[p - 1] += 2 * EXC_PANEL)
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < EXC_PANEL; o++) {
                    float *sum = &out[r][p * EXC_PANEL + o];
                    *sum += exc_from_bits((uint32_t)w[p][2 * o] << 16) * x[r];
                    *sum += exc_from_bits((uint32_t)w[p][2 * o + 1] << 16) * x[rows + r];
                }
}

static void multiply_f32(const void *tile, int rows, const exc_weights *both, int64_t k, float (*out)[EXC_PAIR]) {
    const float *x = tile, *w[2] = {(const float *)(const void *)both->now[0], (const float *)(const void *)both->now[1]};
    memset(out, 0, (size_t)rows * sizeof *out);
    for (int64_t i = 0; i < k; i++, x += rows)
        for (int p = 0; p < 2; p++, w[p - 1] += EXC_PANEL)
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < EXC_PANEL; o++) out[r][p * EXC_PANEL + o] += w[p][o] * x[r];
}

/* both panels under one scale, inputs i .. i+n-1, added to out */
static void span_codes(const float *x, int rows, const uint8_t *const *now, int64_t i, int64_t n, int64_t k, int dtype,
                       float (*out)[EXC_PAIR]) {
    float sum[ROWS][EXC_PAIR] = {{0}};
    for (int64_t j = i; j < i + n; j++)
        for (int o = 0; o < EXC_PAIR; o++) {
            float w = exc_panel_code(now[o / EXC_PANEL], dtype, j, o % EXC_PANEL);
            for (int r = 0; r < rows; r++) sum[r][o] += w * x[(j - i) * rows + r];
        }
    for (int o = 0; o < EXC_PAIR; o++) {
        float scale = exc_panel_scale(now[o / EXC_PANEL], dtype, k, i, o % EXC_PANEL);
        for (int r = 0; r < rows; r++) out[r][o] += sum[r][o] * scale;
    }
}

static void multiply_codes(const float *x, int rows, const exc_weights *w, int64_t k, int dtype, float (*out)[EXC_PAIR]) {
    int64_t span = exc_scale_span(dtype);
    memset(out, 0, (size_t)rows * sizeof *out);
    for (int64_t i = 0; i < k; i += span, x += span * rows)
        span_codes(x, rows, w->now, i, k - i < span ? k - i : span, k, dtype, out);
}

static void multiply_f8(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    multiply_codes(tile, rows, w, k, EXC_F8_E4M3, out);
}

static void multiply_f4(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    multiply_codes(tile, rows, w, k, EXC_F4, out);
}

const exc_tile exc_tile_generic[EXC_TILES] = {
    [EXC_TILE_BF16_BF16] = {ROWS, 2, 4, 64, gather_bf16, multiply_bf16, store, gate_bf16},
    [EXC_TILE_F32_BF16] = {ROWS, 2, 4, 64, gather_f32, multiply_bf16, store, gate_f32},
    [EXC_TILE_F32_F32] = {ROWS, 2, 4, 128, gather_f32, multiply_f32, store, gate_f32},
    [EXC_TILE_BF16_F8] = {ROWS, 2, 4, 32, gather_bf16, multiply_f8, store, gate_bf16},
    [EXC_TILE_F32_F8] = {ROWS, 2, 4, 32, gather_f32, multiply_f8, store, gate_f32},
    [EXC_TILE_BF16_F4] = {ROWS, 2, 4, 16, gather_bf16, multiply_f4, store, gate_bf16},
    [EXC_TILE_F32_F4] = {ROWS, 2, 4, 16, gather_f32, multiply_f4, store, gate_f32},
};

static int tile_number(int act, int weights) {
    if (act != EXC_BF16 && act != EXC_F32) return -1;
    int wide = act == EXC_F32;
    switch (weights) {
    case EXC_BF16: return EXC_TILE_BF16_BF16 + wide;
    case EXC_F32: return wide ? EXC_TILE_F32_F32 : -1;
    case EXC_F8_E4M3: return EXC_TILE_BF16_F8 + wide;
    case EXC_F4: return EXC_TILE_BF16_F4 + wide;
    default: return -1;
    }
}

const exc_tile *exc_tile_for(int act, int weights) {
    int i = tile_number(act, weights);
    if (i < 0) return NULL;
#if defined(__x86_64__)
    enum exc_isa level = exc_isa_level();
    if (level >= EXC_ISA_AMX && i == EXC_TILE_BF16_BF16) return exc_tile_amx;
    if (level >= EXC_ISA_AVX512BF16 && exc_tile_dot[i].rows) return &exc_tile_dot[i];
    if (level >= EXC_ISA_AVX512) return &exc_tile_avx512[i];
    if (level >= EXC_ISA_AVX2) return &exc_tile_avx2[i];
#endif
    return &exc_tile_generic[i];
}

/* --------------------------------------------------------------------------------------------------------- the sweep */

static int64_t padded(const exc_tile *t, int64_t k) { return (k + t->k_step - 1) / t->k_step * t->k_step; }

/* room for a pair of decoded panels, behind the gathered rows */
static size_t decoded_bytes(const exc_tile *t, int64_t k) { return t->decode ? 2 * exc_packed_bytes(EXC_PANEL, k, EXC_BF16) : 0; }

int64_t exc_sweep_chunk(const exc_tile *tile, int64_t k, size_t bytes) {
    size_t row = (size_t)padded(tile, k) * tile->width, decoded = decoded_bytes(tile, k);
    bytes -= decoded < bytes / 2 ? decoded : 0;
    int64_t fit = (int64_t)((bytes - 64) / row), want = (int64_t)(CHUNK_BYTES / row);
    if (want < EXC_ROW_BLOCK) want = EXC_ROW_BLOCK;
    if (want > EXC_SWEEP_ROWS) want = EXC_SWEEP_ROWS;
    if (want > fit) want = fit;
    return want < EXC_ROW_BLOCK ? want : want / EXC_ROW_BLOCK * EXC_ROW_BLOCK;
}

/* tiles of a block are as equal as they can be: 64 rows are 13+13+13+13+12, not 4x14+8 */
static int tile_height(const exc_tile *t, int64_t at, int64_t rows) {
    int64_t left = EXC_ROW_BLOCK - at % EXC_ROW_BLOCK;
    if (left > rows - at) left = rows - at;
    int64_t tiles = (left + t->rows - 1) / t->rows;
    return (int)((left + tiles - 1) / tiles);
}

static void gather_chunk(const exc_sweep *s, int64_t first, int64_t rows, size_t row_bytes, uint8_t *buffer) {
    const void *row[EXC_TILE_ROWS];
    for (int64_t r = 0, n; r < rows; r += n) {
        n = tile_height(s->tile, r, rows);
        for (int64_t i = 0; i < n; i++) row[i] = s->row(s->user, first + r + i);
        s->tile->gather(row, (int)n, s->k, buffer + (size_t)r * row_bytes);
    }
}

static void decode_pair(const exc_sweep *s, exc_weights *w, uint8_t *room) {
    size_t panel = exc_packed_bytes(EXC_PANEL, s->k, EXC_BF16);
    for (int i = 0; i < 2; i++) {
        w->scale[i] = w->now[i] + s->tile->code_bytes(s->k);
        s->tile->decode(w->now[i], s->k, room + (size_t)i * panel);
        w->now[i] = room + (size_t)i * panel;
    }
}

/* room: for decoded panels, or NULL */
static void sweep_pair(const exc_sweep *s, int64_t p, int64_t first, int64_t rows, size_t row_bytes,
                       const uint8_t *buffer, uint8_t *room) {
    float out[EXC_TILE_ROWS][EXC_PAIR] __attribute__((aligned(64)));
    exc_weights w;
    s->pair(s->user, p, w.now);
    s->pair(s->user, p + 1 < s->last ? p + 1 : s->first, w.next);
    int64_t tiles = (rows + s->tile->rows - 1) / s->tile->rows;
    /* a panel line a step, spread over the tiles; a single tile is bound by memory, and the processor's own prefetch, which sees
     * two long streams, keeps that busier than we can */
    w.step = tiles > 1 ? (s->tile->line + tiles - 1) / tiles : 0;
    int decoded = room && tiles > 3; /* fewer decode in registers: a pair goes through the second-level cache */
    if (decoded) decode_pair(s, &w, room);
    for (int64_t r = 0, n; r < rows; r += n) {
        n = tile_height(s->tile, r, rows);
        if (decoded) s->tile->multiply_decoded(buffer + (size_t)r * row_bytes, (int)n, &w, s->k, out);
        else s->tile->multiply(buffer + (size_t)r * row_bytes, (int)n, &w, s->k, out);
        s->done(s->user, p, first + r, (int)n, (const float (*)[EXC_PAIR])out);
        int64_t ahead = s->k / s->tile->k_step * w.step;
        w.next[0] += ahead;
        w.next[1] += ahead;
    }
}

void exc_sweep_run(const exc_sweep *s, void *scratch, size_t bytes) {
    int64_t chunk = exc_sweep_chunk(s->tile, s->k, bytes);
    size_t row_bytes = (size_t)padded(s->tile, s->k) * s->tile->width;
    size_t decoded = decoded_bytes(s->tile, s->k);
    uint8_t *buffer = scratch, *room = decoded && decoded < bytes / 2 ? buffer + (bytes - decoded) / 64 * 64 : NULL;
    for (int64_t first = 0; first < s->rows; first += chunk) {
        int64_t rows = s->rows - first < chunk ? s->rows - first : chunk;
        gather_chunk(s, first, rows, row_bytes, buffer);
        for (int64_t p = s->first; p < s->last; p++) sweep_pair(s, p, first, rows, row_bytes, buffer, room);
    }
}

int64_t exc_pairs_per_task(int64_t rows, int64_t k, int64_t pairs) {
    /* one pair: 64*k bytes at some 20 bytes a ns, or 64*rows*k operations at some 200 a ns, whichever is longer */
    double ns = (double)k * (rows > 10 ? 0.32 * (double)rows : 3.2);
    double want = 10000.0 / ns;
    int64_t n = want >= (double)pairs ? pairs : (int64_t)want + 1;
    if (rows >= EXC_TILE_ROWS && n < 16) n = 16; /* gathering is paid once a task: some 1 % of it */
    int64_t tasks = (pairs + n - 1) / n;
    return (pairs + tasks - 1) / tasks;
}
