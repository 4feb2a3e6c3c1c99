/* mixers.c - rows of the other token mixers: attention with windows and sinks (gpt-oss-120b), multi-head latent attention
 * (DeepSeek-V3) and gated delta nets (Qwen3-Next), for prefill and for decode.
 *
 * Bytes and FLOP as in layers.c. Latent attention in decode reads its cache once for all heads; 2 * heads * (576 + 512) FLOP for
 * every 1152 bytes are arithmetic on most machines, so both rates are told. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "gauge.h"

/* a batch of `S` sequences, `each` new tokens that end at `L` */
typedef struct ragged {
    int64_t S, each, L, *begin, *at, *length;
    int32_t *slot, *position;
    int64_t *row;
} ragged;

static ragged open_ragged(gauge *g, int64_t S, int64_t each, int64_t L) {
    int64_t T = S * each, *length = malloc((size_t)S * 8), *place = malloc((size_t)T * 8);
    int32_t *slot = malloc((size_t)S * 4), *position = malloc((size_t)T * 4);
    for (int64_t s = 0; s < S; s++) length[s] = L, slot[s] = (int32_t)s;
    for (int64_t t = 0; t < T; t++) position[t] = (int32_t)(L - each + t % each), place[t] = t / each * L + position[t];
    ragged r = {S,
                each,
                L,
                gauge_steps(g, S + 1, each),
                gauge_steps(g, S, L),
                gauge_up(g, length, (size_t)S * 8),
                gauge_up(g, slot, (size_t)S * 4),
                gauge_up(g, position, (size_t)T * 4),
                gauge_up(g, place, (size_t)T * 8)};
    free(length), free(place), free(slot), free(position);
    return r;
}

/* ---------------------------------------------------------------------------------------------------------- windows */

static void window_row(gauge *g, int64_t S, int64_t each, int64_t L) {
    enum { WINDOW = 128 };
    int64_t Q = g->quick ? 4 : 64, KV = g->quick ? 2 : 8, D = g->quick ? 16 : 64, T = S * each;
    ragged r = open_ragged(g, S, each, L);
    struct exc_attend_args a = {.q = gauge_numbers(g, T * Q * D, EXC_BF16, 1),
                                .cache_k = gauge_numbers(g, S * L * KV * D, EXC_BF16, 1),
                                .key_stride = KV * D,
                                .cache_v = gauge_numbers(g, S * L * KV * D, EXC_BF16, 1),
                                .value_stride = KV * D,
                                .q_begin = r.begin,
                                .cache_begin = r.at,
                                .length = r.length,
                                .sequences = S,
                                .q_heads = Q,
                                .kv_heads = KV,
                                .head_dim = D,
                                .value_dim = D,
                                .scale = 1 / sqrtf((float)D),
                                .act = EXC_BF16,
                                .window = WINDOW,
                                .sinks = gauge_numbers(g, Q, EXC_F32, 1),
                                .out = gauge_room(g, (size_t)(T * Q * D) * 2),
                                .tokens = T,
                                .longest = L};
    double seen = 0, touched = (double)(L < each + WINDOW - 1 ? L : each + WINDOW - 1);
    for (int64_t j = 0; j < each; j++) seen += fmin((double)(L - each + j + 1), WINDOW);
    ROW(g, attend, &a, 4.0 * (double)S * touched * (double)(KV * D), 4.0 * (double)(S * Q * D) * seen,
        "gpt-oss %s%lldx%lld, %lld+%lld heads of %lld, window %d, sinks", each == 1 ? "decode " : "", (long long)S,
        (long long)(each == 1 ? L : each), (long long)Q, (long long)KV, (long long)D, WINDOW);
    gauge_clear(g);
}

/* ----------------------------------------------------------------------------------------------------- latent attention */

enum { N = 128, R = 64, C = 512, W = C + R }; /* plain and rotating channels of a head, latent */

static void bundle_row(gauge *g, int64_t T, int64_t heads, int64_t n, int64_t k) {
    size_t each = exc_packed_bytes(n, k, EXC_BF16);
    exc_packed *host = malloc((size_t)heads * sizeof *host);
    char *all = gauge_numbers(g, heads * (int64_t)each / 2, EXC_BF16, 1 / sqrtf((float)k));
    for (int64_t h = 0; h < heads; h++) host[h] = (exc_packed){all + (size_t)h * each, n, k, EXC_BF16};
    struct exc_bundle_args a = {.x = gauge_numbers(g, T * heads * k, EXC_BF16, 1),
                                .x_stride = heads * k,
                                .x_step = k,
                                .act = EXC_BF16,
                                .w = gauge_up(g, host, (size_t)heads * sizeof *host),
                                .heads = heads,
                                .y = gauge_room(g, (size_t)(T * heads * n) * 2),
                                .y_stride = heads * n,
                                .y_step = n,
                                .rows = T,
                                .outputs = n,
                                .w_dtype = EXC_BF16};
    ROW(g, bundle, &a, 2.0 * (double)(heads * n * k) + 2.0 * (double)(T * heads * (n + k)),
        2.0 * (double)(T * heads) * (double)(n * k), "T=%lld %lld heads %lld->%lld bf16", (long long)T,
        (long long)heads, (long long)k, (long long)n);
    free(host);
}

static void latent_rows(gauge *g, int64_t S, int64_t each, int64_t L) {
    int64_t heads = g->quick ? 2 : 128, T = S * each, width = heads * (N + R) + W;
    const char *decode = each == 1 ? "decode " : "";
    ragged r = open_ragged(g, S, each, L);
    float *x = gauge_numbers(g, T * width, EXC_F32, 1);
    void *cache = gauge_numbers(g, S * L * W, EXC_BF16, 1), *wide = gauge_numbers(g, T * heads * W, EXC_BF16, 0.2f);
    struct exc_latent_args latent = {.q = x,
                                     .q_stride = width,
                                     .kv = x + heads * (N + R),
                                     .kv_stride = width,
                                     .weight = gauge_numbers(g, C, EXC_F32, 1),
                                     .inv_freq = gauge_numbers(g, R / 2, EXC_F32, 0.01f),
                                     .eps = 1e-6f,
                                     .attention_factor = 1,
                                     .adjacent = 1,
                                     .act = EXC_BF16,
                                     .position = r.position,
                                     .cache_row = r.row,
                                     .tokens = T,
                                     .heads = heads,
                                     .plain = N,
                                     .rotary = R,
                                     .latent = C,
                                     .q_plain = gauge_room(g, (size_t)(T * heads * N) * 2),
                                     .plain_step = N,
                                     .q_turned = (uint16_t *)wide + C,
                                     .turned_step = W,
                                     .cache = cache};
    ROW(g, latent, &latent, 6.0 * (double)(T * width), 0, "%sT=%lld %lld heads", decode, (long long)T,
        (long long)heads);
    bundle_row(g, T, heads, C, N); /* absorbed: queries into the latent */
    double visible = (double)T * ((double)(L - each) + ((double)each + 1) / 2);
    if (each == 1) {
        struct exc_attend_args absorbed = {.q = wide,
                                           .cache_k = cache,
                                           .key_stride = W,
                                           .cache_v = cache,
                                           .value_stride = W,
                                           .q_begin = r.begin,
                                           .cache_begin = r.at,
                                           .length = r.length,
                                           .sequences = S,
                                           .q_heads = heads,
                                           .kv_heads = 1,
                                           .head_dim = W,
                                           .value_dim = C,
                                           .scale = 0.0721688f,
                                           .act = EXC_BF16,
                                           .out = gauge_room(g, (size_t)(T * heads * C) * 2),
                                           .tokens = T,
                                           .longest = L};
        ROW(g, attend, &absorbed, 2.0 * (double)(S * L * W), 2.0 * (double)(heads * (W + C)) * visible,
            "DeepSeek-V3 decode %lldx%lld, %lld heads of the latent", (long long)S, (long long)L, (long long)heads);
    } else {
        struct exc_attend_args expanded = {.q = gauge_numbers(g, T * heads * (N + R), EXC_BF16, 1),
                                           .cache_k = gauge_numbers(g, T * heads * (N + R), EXC_BF16, 1),
                                           .key_stride = heads * (N + R),
                                           .cache_v = gauge_numbers(g, T * heads * N, EXC_BF16, 1),
                                           .value_stride = heads * N,
                                           .q_begin = r.begin,
                                           .cache_begin = r.at,
                                           .length = r.length,
                                           .sequences = S,
                                           .q_heads = heads,
                                           .kv_heads = heads,
                                           .head_dim = N + R,
                                           .value_dim = N,
                                           .scale = 0.0721688f,
                                           .act = EXC_BF16,
                                           .out = gauge_room(g, (size_t)(T * heads * N) * 2),
                                           .tokens = T,
                                           .longest = L};
        ROW(g, attend, &expanded, 0, 2.0 * (double)(heads * (2 * N + R)) * visible,
            "DeepSeek-V3 %lldx%lld, %lld heads of 192 and 128", (long long)S, (long long)each, (long long)heads);
    }
    gauge_clear(g);
}

/* ------------------------------------------------------------------------------------------------------- gated delta nets */

static void delta_rows(gauge *g, int64_t S, int64_t each, int64_t before) {
    int64_t HK = g->quick ? 2 : 16, HV = g->quick ? 4 : 32, D = g->quick ? 32 : 128, T = S * each,
            channels = 2 * HK * D + HV * D, width = channels + 2 * HV, state = (int64_t)exc_delta_floats(HK, HV, D, D),
            taps = 4;
    const char *decode = each == 1 ? "decode " : "";
    ragged r = open_ragged(g, S, each, before + each);
    float *x = gauge_numbers(g, T * width, EXC_F32, 1), *y = gauge_room(g, (size_t)(T * channels) * 4),
          *out = gauge_room(g, (size_t)(T * HV * D) * 4);
    struct exc_conv_args conv = {.x = x,
                                 .x_stride = width,
                                 .weight = gauge_numbers(g, taps * channels, EXC_F32, 0.5f),
                                 .taps = taps,
                                 .channels = channels,
                                 .begin = r.begin,
                                 .length = r.length,
                                 .slot = r.slot,
                                 .sequences = S,
                                 .tokens = T,
                                 .state = gauge_numbers(g, S * (taps - 1) * channels, EXC_F32, 1),
                                 .state_stride = (taps - 1) * channels,
                                 .y = y,
                                 .y_stride = channels};
    struct exc_delta_args delta = {.q = x,
                                   .k = x + HK * D,
                                   .v = x + 2 * HK * D,
                                   .stride = width,
                                   .beta = x + channels,
                                   .step = x + channels + HV,
                                   .gate_stride = width,
                                   .a_log = gauge_numbers(g, HV, EXC_F32, 1),
                                   .dt_bias = gauge_numbers(g, HV, EXC_F32, 1),
                                   .begin = r.begin,
                                   .length = r.length,
                                   .slot = r.slot,
                                   .sequences = S,
                                   .tokens = T,
                                   .k_heads = HK,
                                   .v_heads = HV,
                                   .k_dim = D,
                                   .v_dim = D,
                                   .state = gauge_zeros(g, (size_t)(S * state) * 4),
                                   .state_stride = state,
                                   .out = out};
    struct exc_gate_args gate = {.x = out,
                                 .x_dtype = EXC_F32,
                                 .silu = 1,
                                 .g = gauge_numbers(g, T * HV * D, EXC_F32, 1),
                                 .g_stride = HV * D,
                                 .weight = gauge_numbers(g, D, EXC_F32, 1),
                                 .eps = 1e-6f,
                                 .act = EXC_BF16,
                                 .tokens = T,
                                 .heads = HV,
                                 .dim = D,
                                 .y = gauge_room(g, (size_t)(T * HV * D) * 2)};
    double heads = (double)HV, d = (double)D;
    ROW(g, conv, &conv, 8.0 * (double)(T * channels), 0, "%s%lldx%lld, %lld channels, 4 taps", decode, (long long)S,
        (long long)each, (long long)channels);
    ROW(g, delta, &delta, each == 1 ? 4.0 * (double)S * heads * d * d : 0,
        (double)T * heads * (6.0 * d * d + 2.0 * EXC_DELTA_CHUNK * 2 * d), "%s%lldx%lld, %lld+%lld heads of %lld",
        decode, (long long)S, (long long)each, (long long)HK, (long long)HV, (long long)D);
    ROW(g, gate, &gate, 10.0 * (double)(T * HV * D), 0, "%sT=%lld %lld heads of %lld, normed", decode, (long long)T,
        (long long)HV, (long long)D);
    gauge_clear(g);
}

void mixer_rows(gauge *g) {
    bool q = g->quick;
    if (gauge_wanted(g, "attend"))
        window_row(g, q ? 2 : 16, q ? 36 : 512, q ? 36 : 512), window_row(g, q ? 3 : 64, 1, q ? 200 : 2048);
    if (gauge_wanted(g, "attend") || gauge_wanted(g, "latent") || gauge_wanted(g, "bundle")) {
        latent_rows(g, q ? 2 : 8, q ? 9 : 512, q ? 9 : 512);
        latent_rows(g, q ? 2 : 64, 1, q ? 40 : 2048);
    }
    if (gauge_wanted(g, "delta") || gauge_wanted(g, "conv") || gauge_wanted(g, "gate")) {
        delta_rows(g, q ? 2 : 16, q ? 40 : 512, 0);
        delta_rows(g, q ? 2 : 64, 1, q ? 9 : 2032);
    }
}
