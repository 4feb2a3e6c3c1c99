/* movers.c - rows of the ops that move, convert or scale arrays: what loading a model and editing by a factor are made of.
 *
 * Bytes: every array read once and written once, quantised ones with their scales. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "gauge.h"

static void plain_rows(gauge *g, int64_t n, int64_t k) {
    void *half = gauge_numbers(g, n * k, EXC_BF16, 1), *wide = gauge_room(g, (size_t)(n * k) * 4);
    double count = (double)(n * k);
    int64_t *found = gauge_room(g, 16);
    struct exc_view_args view = {.src = half,
                                 .src_row = 1,
                                 .src_column = n,
                                 .dst = wide,
                                 .dst_row = k,
                                 .dst_column = 1,
                                 .rows = n,
                                 .columns = k,
                                 .unit = 2};
    struct exc_pack_args pack = {.w = half, .w_dtype = EXC_BF16, .n = n, .k = k, .to = EXC_BF16, .out = wide};
    struct exc_convert_args widen = {half, EXC_BF16, wide, EXC_F32, n * k, found, found + 1},
                            narrow = {wide, EXC_F32, half, EXC_BF16, n * k, NULL, NULL};
    struct exc_noise_args noise = {.dst = half, .n = n * k, .dtype = EXC_BF16, .deviation = 1};
    ROW(g, view, &view, 4 * count, 0, "%lldx%lld bf16 transposed", (long long)n, (long long)k);
    ROW(g, pack, &pack, 4 * count, 0, "%lldx%lld bf16", (long long)n, (long long)k);
    ROW(g, convert, &widen, 6 * count, 0, "%lldx%lld bf16 to f32, looked at", (long long)n, (long long)k);
    ROW(g, convert, &narrow, 6 * count, 0, "%lldx%lld f32 to bf16", (long long)n, (long long)k);
    ROW(g, noise, &noise, 2 * count, 0, "%lldx%lld bf16", (long long)n, (long long)k);
    gauge_clear(g);
}

static void scale_row(gauge *g, int64_t E, int64_t n) {
    char *w = gauge_numbers(g, E * n, EXC_BF16, 0.02f);
    void **at = malloc((size_t)E * sizeof *at);
    double *factor = malloc((size_t)E * sizeof *factor);
    for (int64_t e = 0; e < E; e++) at[e] = w + (size_t)(e * n) * 2, factor[e] = e % 2 ? 1.25 : 0.8;
    struct exc_scale_args a = {.dtype = EXC_BF16,
                               .count = E,
                               .n = n,
                               .factor = gauge_up(g, factor, (size_t)E * sizeof *factor),
                               .rows = 1,
                               .cols = n};
    a.dst = gauge_up(g, at, (size_t)E * sizeof *at);
    a.src = (const void *const *)a.dst;
    ROW(g, scale, &a, 4.0 * (double)(E * n), 0, "%lldx%lld bf16 in place", (long long)E, (long long)n);
    free(at), free(factor);
    gauge_clear(g);
}

static void coded_rows(gauge *g, int64_t n, int64_t k, int dtype) {
    bool fp4 = dtype == EXC_F4;
    const char *of = fp4 ? "mxfp4" : "fp8";
    size_t codes = (size_t)(n * k) / (fp4 ? 2 : 1),
           scales = fp4 ? (size_t)(n * (k / 32)) : (size_t)((n + 127) / 128 * ((k + 127) / 128)) * 4;
    uint32_t *s = malloc(scales + 4);
    for (size_t i = 0; i < scales / 4; i++) s[i] = fp4 ? 0x78787878u : 0x3c000000u;
    struct exc_widen_args widen = {.src = gauge_codes(g, codes),
                                   .dtype = dtype,
                                   .scale = gauge_up(g, s, scales),
                                   .scale_dtype = fp4 ? EXC_F8_E8M0 : EXC_F32,
                                   .rows = n,
                                   .cols = k,
                                   .dst = gauge_room(g, (size_t)(n * k) * 2),
                                   .dst_dtype = EXC_BF16};
    struct exc_pack_args pack = {.w = widen.src,
                                 .w_dtype = dtype,
                                 .n = n,
                                 .k = k,
                                 .to = dtype,
                                 .out = gauge_room(g, exc_packed_bytes(n, k, dtype)),
                                 .scale = widen.scale,
                                 .scale_dtype = widen.scale_dtype};
    ROW(g, widen, &widen, (double)(codes + scales) + 2.0 * (double)(n * k), 0, "%lldx%lld %s to bf16", (long long)n,
        (long long)k, of);
    ROW(g, pack, &pack, 2.0 * (double)(codes + scales), 0, "%lldx%lld %s", (long long)n, (long long)k, of);
    free(s);
    gauge_clear(g);
}

void mover_rows(gauge *g) {
    int64_t n = g->quick ? 128 : 65536, k = g->quick ? 96 : 4096;
    static const char *const ops[] = {"view", "pack", "convert", "noise", "scale", "widen"};
    bool any = false;
    for (size_t i = 0; i < EXC_COUNT(ops); i++) any |= gauge_wanted(g, ops[i]);
    if (!any) return;
    plain_rows(g, n, k);
    scale_row(g, g->quick ? 3 : 128, g->quick ? 1000 : 2048 * 768);
    coded_rows(g, n, k, EXC_F8_E4M3);
    coded_rows(g, n, k, EXC_F4);
}
