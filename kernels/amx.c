/* amx.c - the micro-kernel for AMX: tiles of 32 rows x 2 panels, bf16 only.
 *
 * A block of 32 inputs of a panel, 16 lines of 64 bytes, is exactly a B register, which is why panels are laid out as they are.
 * Gathered rows are kept in blocks too, [k/32][rows][32], so an A register is up to 16 lines side by side. Registers 0-3 hold the
 * sums (two groups of rows x two panels), 4 and 5 rows, 6 and 7 weights: four products a step from four loads. The
 * configuration is loaded and released by every call, so that a thread outside a kernel has no tile state to save. Sums of a row
 * do not depend on how many rows its register has. What follows a tile is AVX-512's, which every AMX machine has. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "tile.h"

#define ROWS 32
#define HALF 16  /* rows of a register */
#define BLOCK 32 /* inputs of a register */
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,amx-tile,amx-bf16")))

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} tile_config;

TARGET static void gather(const void *const *row, int rows, int64_t k, void *tile) {
    uint8_t *to = tile;
    for (int64_t i = 0; i < k; i += BLOCK) {
        __mmask32 some = k - i >= BLOCK ? 0xffffffffu : (1u << (k - i)) - 1;
        for (int r = 0; r < rows; r++, to += 64)
            _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(some, (const uint16_t *)row[r] + i));
    }
}

TARGET static void configure(int first, int second) {
    tile_config c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    const int lines[8] = {first, first, second, second, first, second, HALF, HALF};
    for (int i = 0; i < 8; i++) {
        c.lines[i] = (uint8_t)lines[i];
        c.line_bytes[i] = lines[i] ? 64 : 0;
    }
    _tile_loadconfig(&c);
}

TARGET static void multiply_few(const uint8_t *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    configure(rows, 0);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < k; i += BLOCK, x += rows * 64) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w->now[0] + i * 32, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w->now[1] + i * 32, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out[0], sizeof *out);
    _tile_stored(1, out[0] + EXC_PANEL, sizeof *out);
}

TARGET static void multiply_many(const uint8_t *x, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    configure(HALF, rows - HALF);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < k; i += BLOCK, x += rows * 64) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w->now[0] + i * 32, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w->now[1] + i * 32, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + HALF * 64, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out[0], sizeof *out);
    _tile_stored(1, out[0] + EXC_PANEL, sizeof *out);
    _tile_stored(2, out[HALF], sizeof *out);
    _tile_stored(3, out[HALF] + EXC_PANEL, sizeof *out);
}

TARGET static void multiply(const void *tile, int rows, const exc_weights *w, int64_t k, float (*out)[EXC_PAIR]) {
    if (rows <= HALF) multiply_few(tile, rows, w, k, out);
    else multiply_many(tile, rows, w, k, out);
    _tile_release();
}

const exc_tile exc_tile_amx[1] = {{ROWS, BLOCK, 2, BLOCK * 32, gather, multiply, exc_store_avx512, exc_gate_avx512}};
#else
typedef int exc_no_amx; /* an empty file is not C */
#endif
