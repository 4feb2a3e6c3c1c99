/* emulated.c - the AMX kernel against f64 loops on any machine with AVX-512: its tile instructions are played by plain C here.
 *
 * kernels/amx.c is compiled into this program with the eight tile intrinsics replaced, so its addresses, strides, register shapes
 * and tails are the real ones; only the arithmetic of a register is ours. Shapes are checked as the hardware would: a load
 * or product with registers that do not fit fails. */
#include "helpers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

typedef struct reg {
    int lines, line_bytes;
    uint8_t data[16][64];
} reg;
static reg regs[8];

static void play_config(const void *config) {
    const uint8_t *c = config;
    assert_int_equal(c[0], 1);
    for (int i = 0; i < 8; i++) {
        uint16_t bytes;
        memcpy(&bytes, c + 16 + 2 * i, 2);
        regs[i] = (reg){.lines = c[48 + i], .line_bytes = bytes};
        assert_true(regs[i].lines <= 16 && bytes <= 64);
    }
}

static void play_zero(int t) {
    assert_true(regs[t].lines > 0);
    memset(regs[t].data, 0, sizeof regs[t].data);
}

static void play_load(int t, const void *from, int64_t stride) {
    assert_true(regs[t].lines > 0);
    for (int i = 0; i < regs[t].lines; i++)
        memcpy(regs[t].data[i], (const uint8_t *)from + i * stride, (size_t)regs[t].line_bytes);
}

static void play_store(int t, void *to, int64_t stride) {
    for (int i = 0; i < regs[t].lines; i++)
        memcpy((uint8_t *)to + i * stride, regs[t].data[i], (size_t)regs[t].line_bytes);
}

static float half_at(const uint8_t *line, int i) {
    uint16_t h;
    memcpy(&h, line + 2 * i, 2);
    return test_from_bf16(h);
}

static void play_dot(int c, int a, int b) {
    assert_int_equal(regs[c].lines, regs[a].lines);
    assert_int_equal(regs[b].lines * 4, regs[a].line_bytes);
    assert_int_equal(regs[c].line_bytes, regs[b].line_bytes);
    for (int m = 0; m < regs[c].lines; m++)
        for (int n = 0; n < regs[c].line_bytes / 4; n++) {
            float sum;
            memcpy(&sum, regs[c].data[m] + 4 * n, 4);
            for (int i = 0; i < 2 * regs[b].lines; i++)
                sum += half_at(regs[a].data[m], i) * half_at(regs[b].data[i / 2], 2 * n + i % 2);
            memcpy(regs[c].data[m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig play_config
#define _tile_release() memset(regs, 0, sizeof regs)
#define _tile_loadd play_load
#define _tile_stored play_store
#define _tile_zero play_zero
#define _tile_dpbf16ps play_dot
#include "../kernels/amx.c"

static void tiles_against_f64(void **state) {
    if (exc_isa_level() < EXC_ISA_AVX512) skip();
    static const int64_t ks[] = {1, 31, 32, 33, 127, 160};
    exc_ctx *ctx = test_ctx(1);
    for (size_t c = 0; c < EXC_COUNT(ks); c++)
        for (int rows = 1; rows <= ROWS; rows++) {
            int64_t k = ks[c], kk = (k + 31) / 32 * 32;
            uint16_t *x = malloc((size_t)(rows * k) * 2), *w = malloc((size_t)(32 * k) * 2);
            for (int64_t i = 0; i < rows * k; i++) x[i] = test_bf16(test_normal(1, (uint64_t)i));
            for (int64_t i = 0; i < 32 * k; i++) w[i] = test_bf16(test_normal(2, (uint64_t)i));
            uint8_t *packed = aligned_alloc(64, exc_packed_bytes(32, k, EXC_BF16)), *tile = malloc((size_t)(rows * kk) * 2 + 64);
            assert_int_equal(exc_cpu_pack(&ctx->queue, &(struct exc_pack_args){w, EXC_BF16, 32, k, EXC_BF16, packed}), EXC_OK);
            const void *row[ROWS];
            for (int r = 0; r < rows; r++) row[r] = x + r * k;
            exc_tile_amx->gather(row, rows, k, tile);
            float out[ROWS + 1][EXC_PAIR];
            memset(out, 0xff, sizeof out);
            exc_weights panels = {.now = {packed, packed + exc_packed_bytes(16, k, EXC_BF16)}};
            exc_tile_amx->multiply(tile, rows, &panels, k, out);
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < EXC_PAIR; o++) {
                    double want = 0, size = 0; /* f32 sums of k products, as in dense.c */
                    for (int64_t i = 0; i < k; i++) {
                        double v = (double)test_from_bf16(x[r * k + i]) * (double)test_from_bf16(w[o * k + i]);
                        want += v;
                        size += v * v;
                    }
                    double tolerance = 4 * sqrt((double)k) * 0x1p-24 * (sqrt(size) + fabs(want));
                    if (!(fabs((double)out[r][o] - want) <= tolerance))
                        fail_msg("k %d, %d rows: [%d,%d] = %g, want %g", (int)k, rows, r, o, (double)out[r][o], want);
                }
            for (int o = 0; o < EXC_PAIR; o++) assert_true(isnan(out[rows][o]));
            assert_int_equal(regs[0].lines, 0); /* released */
            free(x);
            free(w);
            free(packed);
            free(tile);
        }
    exc_ctx_free(ctx);
}
#else
static void tiles_against_f64(void **state) { skip(); }
#endif

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(tiles_against_f64)};
    return cmocka_run_group_tests_name("emulated", tests, NULL, NULL);
}
