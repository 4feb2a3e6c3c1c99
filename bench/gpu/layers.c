/* layers.c - rows of the ops of one layer of Qwen3-30B-A3B, for a prefill of 16 prompts and for decode of 1, 16 and 64 sequences behind
 * 2048 tokens; and of its two expert products with quantised weights, at the sizes of DeepSeek-V3 (fp8) and gpt-oss-120b (mxfp4).
 *
 * Bytes: what has many rows is counted by FLOP, and also by its arrays moved once; what has few by the weights (of experts that
 * are chosen) or the keys and values read once. Weights that a cache could hold take turns. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "gauge.h"

#define CACHED ((size_t)256 << 20) /* several times the largest second-level cache */

typedef struct size {
    int64_t H, I, E, K, Q, KV, D, V;
} size;

/* what flows through the layer */
typedef struct flow {
    size z;
    int64_t T, sequences, length; /* rows of a step, of so many sequences that then hold so many tokens each */
    const char *text;
    float *h, *y, *weights;
    void *x, *mid;
    int32_t *ids, *row_of, *pair_of, *seen;
    int64_t *offset, *count;
    double *gate_sum, *mid_sum, *square_sum;
    double used; /* experts that some token chose */
} flow;

/* packed random matrices [n,k], their table in device memory; plain ones and codes */
static exc_packed *experts(gauge *g, int64_t E, int64_t n, int64_t k, int dtype, exc_packed *host) {
    size_t bytes = exc_packed_bytes(n, k, dtype);
    bool fp4 = dtype == EXC_F4, coded = fp4 || dtype == EXC_F8_E4M3;
    int64_t scales = fp4 ? n * (k / 32) : (n + 127) / 128 * ((k + 127) / 128);
    char *all = gauge_room(g, (size_t)E * bytes);
    char *plain = coded ? gauge_codes(g, (size_t)(n * k)) : gauge_numbers(g, n * k, EXC_BF16, 1 / sqrtf((float)k)),
         *scale = NULL;
    if (coded) { /* powers of two near a hundredth, of either dtype */
        uint32_t *s = malloc((size_t)scales * 4);
        for (int64_t i = 0; s && i < scales; i++) s[i] = fp4 ? 0x78787878u : 0x3c000000u;
        scale = gauge_up(g, s, (size_t)scales * (fp4 ? 1 : 4));
        free(s);
    }
    for (int64_t e = 0; e < E; e++) {
        host[e] = (exc_packed){all + (size_t)e * bytes, n, k, dtype};
        if (!coded)
            RUN(g, noise, .dst = plain, .n = n * k, .seed = 4, .stream = ++g->seed, .dtype = EXC_BF16,
                .deviation = 1 / sqrtf((float)k));
        RUN(g, pack, .w = plain, .w_dtype = dtype, .n = n, .k = k, .to = dtype, .out = all + (size_t)e * bytes,
            .scale = scale, .scale_dtype = fp4 ? EXC_F8_E8M0 : EXC_F32);
    }
    return gauge_up(g, host, (size_t)E * sizeof *host);
}

static double bytes_of(int64_t n, int64_t k, int dtype) { return (double)exc_packed_bytes(n, k, dtype); }

/* y = x W^T; up to 64 rows the matrices take turns, beyond that cuBLASLt stands beside our own kernels */
static void matmul_row(gauge *g, const flow *f, const char *what, int64_t n, int64_t k, const void *x, float *y,
                       const float *add) {
    enum { MOST = 512 };
    exc_packed w[MOST];
    struct exc_matmul_args a[MOST];
    bool few = f->T <= 64;
    int held = g->n_held, turns = few && !g->quick ? (int)(CACHED / exc_packed_bytes(n, k, EXC_BF16)) + 1 : 1;
    if (!gauge_wanted(g, "matmul")) return;
    if (turns > MOST) turns = MOST;
    experts(g, turns, n, k, EXC_BF16, w);
    for (int i = 0; i < turns; i++)
        a[i] = (struct exc_matmul_args){
            .x = x, .x_stride = k, .act = EXC_BF16, .w = &w[i], .add = add, .y = y, .y_stride = n, .rows = f->T};
    double bytes = 2.0 * (double)(n * k) + 2.0 * (double)(f->T * k) + (add ? 8.0 : 4.0) * (double)(f->T * n),
           flop = 2.0 * (double)f->T * (double)(n * k);
    if (few)
        gauge_op(g, "matmul", gauge_ops.matmul, a, sizeof *a, turns, bytes, flop, "%s %s %lldx%lld bf16", f->text, what,
                 (long long)n, (long long)k);
    else
        gauge_both(g, add ? NULL : "cuBLASLt", "matmul", gauge_ops.matmul, a, y, n, bytes, flop, "%s %s %lldx%lld bf16",
                   f->text, what, (long long)n, (long long)k);
    while (g->n_held > held) exc_device_release(g->ctx, g->held[--g->n_held]);
}

/* numbers up to `below` in random order, of the host */
static int32_t *drawn(int64_t n, int64_t below) {
    int32_t *p = malloc((size_t)n * sizeof *p);
    for (int64_t i = 0; p && i < n; i++) p[i] = (int32_t)(exc_random_u64(3, 1, (uint64_t)i) % (uint64_t)below);
    return p;
}

/* -------------------------------------------------------------------------------------------------- before the experts */

static void entry_rows(gauge *g, const flow *f) {
    const size *z = &f->z;
    int64_t T = f->T;
    int32_t *token = drawn(T, z->V);
    struct exc_embed_args embed = {
        gauge_numbers(g, z->V * z->H, EXC_BF16, 1), EXC_BF16, gauge_up(g, token, (size_t)T * 4), T, z->H, f->h};
    struct exc_norm_args norm = {f->h, z->H,    gauge_numbers(g, z->H, EXC_F32, 1), 0, 1e-6f, T, z->H, f->x,
                                 z->H, EXC_BF16};
    ROW(g, embed, &embed, 6.0 * (double)(T * z->H), 0, "%s H=%lld bf16", f->text, (long long)z->H);
    ROW(g, norm, &norm, 6.0 * (double)(T * z->H), 0, "%s H=%lld", f->text, (long long)z->H);
    free(token);
}

static void attention_rows(gauge *g, const flow *f) {
    const size *z = &f->z;
    int64_t T = f->T, S = f->sequences, L = f->length, each = T / S, W = (z->Q + 2 * z->KV) * z->D, D = z->D;
    float *qkv = gauge_numbers(g, T * W, EXC_F32, 1);
    void *keys = gauge_numbers(g, S * L * z->KV * D, EXC_BF16, 1),
         *values = gauge_numbers(g, S * L * z->KV * D, EXC_BF16, 1), *q = gauge_room(g, (size_t)(T * z->Q * D) * 2),
         *out = gauge_room(g, (size_t)(T * z->Q * D) * 2);
    int32_t *position = malloc((size_t)T * 4);
    int64_t *place = malloc((size_t)T * 8), *length = malloc((size_t)S * 8);
    for (int64_t t = 0; t < T; t++) position[t] = (int32_t)(L - each + t % each), place[t] = t / each * L + position[t];
    for (int64_t s = 0; s < S; s++) length[s] = L;
    matmul_row(g, f, "q|k|v", W, z->H, f->x, qkv, NULL);
    struct exc_rope_args rope = {.q = qkv,
                                 .q_stride = W,
                                 .k = qkv + z->Q * D,
                                 .k_stride = W,
                                 .v = qkv + (z->Q + z->KV) * D,
                                 .v_stride = W,
                                 .q_norm = gauge_numbers(g, D, EXC_F32, 1),
                                 .k_norm = gauge_numbers(g, D, EXC_F32, 1),
                                 .eps = 1e-6f,
                                 .inv_freq = gauge_numbers(g, D / 2, EXC_F32, 0.01f),
                                 .rotary = D,
                                 .attention_factor = 1,
                                 .act = EXC_BF16,
                                 .position = gauge_up(g, position, (size_t)T * 4),
                                 .cache_row = gauge_up(g, place, (size_t)T * 8),
                                 .tokens = T,
                                 .q_heads = z->Q,
                                 .kv_heads = z->KV,
                                 .head_dim = D,
                                 .q_out = q,
                                 .cache_k = keys,
                                 .cache_v = values};
    ROW(g, rope, &rope, 6.0 * (double)(T * W), 0, "%s %lld+%lld heads of %lld", f->text, (long long)z->Q,
        (long long)z->KV, (long long)D);
    RUN(g, noise, .dst = q, .n = T * z->Q * D, .seed = 5, .dtype = EXC_BF16, .deviation = 1);
    struct exc_attend_args attend = {.q = q,
                                     .cache_k = keys,
                                     .key_stride = z->KV * D,
                                     .cache_v = values,
                                     .value_stride = z->KV * D,
                                     .q_begin = gauge_steps(g, S + 1, each),
                                     .cache_begin = gauge_steps(g, S, L),
                                     .length = gauge_up(g, length, (size_t)S * 8),
                                     .sequences = S,
                                     .q_heads = z->Q,
                                     .kv_heads = z->KV,
                                     .head_dim = D,
                                     .value_dim = D,
                                     .scale = 1 / sqrtf((float)D),
                                     .act = EXC_BF16,
                                     .out = out,
                                     .tokens = T,
                                     .longest = L};
    double visible = (double)T * ((double)(L - each) + ((double)each + 1) / 2);
    ROW(g, attend, &attend, 4.0 * (double)(S * L * z->KV * D), 4.0 * (double)(z->Q * D) * visible,
        "%s %lld+%lld heads of %lld, %lld keys", f->text, (long long)z->Q, (long long)z->KV, (long long)D,
        (long long)L);
    matmul_row(g, f, "out, added", z->H, z->Q * D, out, f->h, f->h);
    free(position), free(place), free(length);
}

/* ------------------------------------------------------------------------------------------------------------ experts */

static void routing_rows(gauge *g, flow *f) {
    const size *z = &f->z;
    double pairs = (double)(f->T * z->K);
    exc_gate gate = EXC_GATE;
    gate.renorm = 1;
    struct exc_route_args route = {.logits = gauge_numbers(g, f->T * z->E, EXC_F32, 1),
                                   .gate = &gate,
                                   .tokens = f->T,
                                   .experts = z->E,
                                   .top_k = z->K,
                                   .ids = f->ids,
                                   .weights = f->weights},
                          counted = route;
    struct exc_permute_args permute = {f->ids, f->T, z->K, z->E, f->offset, f->row_of, f->pair_of};
    counted.slot = f->seen, counted.count = f->count, counted.gate_sum = f->gate_sum;
    matmul_row(g, f, "router", z->E, z->H, f->x, gauge_room(g, (size_t)(f->T * z->E) * 4), NULL);
    ROW(g, route, &route, 4.0 * (double)(f->T * z->E) + 8.0 * pairs, 0, "%s E=%lld K=%lld", f->text, (long long)z->E,
        (long long)z->K);
    ROW(g, route, &counted, 4.0 * (double)(f->T * z->E) + 8.0 * pairs, 0, "%s E=%lld K=%lld captured", f->text,
        (long long)z->E, (long long)z->K);
    gauge_must(g, gauge_now(g, gauge_ops.route, &route), "route"); /* what follows needs ids */
    ROW(g, permute, &permute, 12.0 * pairs, 0, "%s E=%lld K=%lld", f->text, (long long)z->E, (long long)z->K);
    gauge_must(g, gauge_now(g, gauge_ops.permute, &permute), "permute");
    int64_t *offset = malloc((size_t)(z->E + 1) * 8);
    gauge_must(g, exc_device_get(g->ctx, offset, f->offset, (size_t)(z->E + 1) * 8), "permute");
    f->used = 0;
    for (int64_t e = 0; e < z->E; e++) f->used += offset[e + 1] > offset[e];
    free(offset);
}

static void product_rows(gauge *g, const flow *f, int dtype, int activation) {
    const size *z = &f->z;
    const char *of = dtype == EXC_BF16 ? "bf16" : dtype == EXC_F4 ? "mxfp4" : "fp8";
    double pairs = (double)(f->T * z->K), I = (double)z->I, H = (double)z->H;
    exc_packed *host = calloc((size_t)z->E, sizeof *host);
    exc_packed *gate = experts(g, z->E, z->I, z->H, dtype, host), *up = experts(g, z->E, z->I, z->H, dtype, host),
               *down = experts(g, z->E, z->H, z->I, dtype, host);
    for (int captured = 0; captured < 2; captured++) {
        const char *taken = captured ? " captured" : "";
        struct exc_glu_args first = {.x = f->x,
                                     .act = EXC_BF16,
                                     .gate = gate,
                                     .up = up,
                                     .activation = {activation, 1.702f, 7},
                                     .offset = f->offset,
                                     .pair_of = f->pair_of,
                                     .tokens = f->T,
                                     .top_k = z->K,
                                     .experts = z->E,
                                     .hidden = z->H,
                                     .inner = z->I,
                                     .mid = f->mid,
                                     .slot = captured ? f->seen : NULL,
                                     .mid_sum = captured ? f->mid_sum : NULL,
                                     .w_dtype = dtype};
        struct exc_down_args second = {.mid = f->mid,
                                       .act = EXC_BF16,
                                       .down = down,
                                       .offset = f->offset,
                                       .pair_of = f->pair_of,
                                       .tokens = f->T,
                                       .top_k = z->K,
                                       .experts = z->E,
                                       .hidden = z->H,
                                       .inner = z->I,
                                       .y = f->y,
                                       .slot = captured ? f->seen : NULL,
                                       .sqnorm_sum = captured ? f->square_sum : NULL,
                                       .w_dtype = dtype};
        ROW(g, glu, &first, 2 * f->used * bytes_of(z->I, z->H, dtype) + pairs * 2 * (H + I), 4 * pairs * I * H,
            "%s E=%lld K=%lld %lldx%lld %s%s", f->text, (long long)z->E, (long long)z->K, (long long)z->I,
            (long long)z->H, of, taken);
        ROW(g, down, &second, f->used * bytes_of(z->H, z->I, dtype) + pairs * (2 * I + 4 * H), 2 * pairs * I * H,
            "%s E=%lld K=%lld %lldx%lld %s%s", f->text, (long long)z->E, (long long)z->K, (long long)z->H,
            (long long)z->I, of, taken);
    }
    free(host);
}

static void exit_rows(gauge *g, const flow *f) {
    enum { RANK = 3 };
    const size *z = &f->z;
    int64_t T = f->T, K = z->K, H = z->H;
    float *basis = gauge_numbers(g, RANK * H, EXC_F32, 1 / sqrtf((float)H)),
          *strength = gauge_numbers(g, z->E, EXC_F32, 1);
    struct exc_combine_args plain = {.y = f->y,
                                     .row_of = f->row_of,
                                     .ids = f->ids,
                                     .weights = f->weights,
                                     .tokens = T,
                                     .top_k = K,
                                     .hidden = H,
                                     .h = f->h},
                            edited = plain;
    edited.basis = basis, edited.rank = RANK, edited.strength = strength;
    struct exc_lens_args lens = {f->h, T, H, basis, RANK, 1e-3f};
    struct exc_moments_args moments = {f->ids, f->weights, f->mid,   EXC_BF16,    T,          K,
                                       z->E,   z->I,       f->count, f->gate_sum, f->mid_sum, NULL};
    struct exc_gather_args gather = {f->x, f->pair_of, K, T * K, (size_t)H * 2, f->y};
    struct exc_whence_args whence = {f->ids, f->pair_of, T * K, z->E, z->E < 8 ? z->E : 8, gauge_room(g, (size_t)(T * K) * 4)};
    ROW(g, combine, &plain, 4.0 * (double)((K + 2) * T * H), 0, "%s K=%lld H=%lld", f->text, (long long)K,
        (long long)H);
    ROW(g, combine, &edited, 4.0 * (double)((K + 2) * T * H), 0, "%s K=%lld H=%lld, edited at rank 3", f->text,
        (long long)K, (long long)H);
    ROW(g, lens, &lens, 8.0 * (double)(T * H), 0, "%s H=%lld rank 3", f->text, (long long)H);
    ROW(g, gather, &gather, 4.0 * (double)(T * K * H), 0, "%s K=%lld H=%lld bf16, by expert", f->text, (long long)K,
        (long long)H);
    ROW(g, whence, &whence, 12.0 * (double)(T * K), 0, "%s E=%lld K=%lld, %lld ranks", f->text, (long long)z->E, (long long)K,
        (long long)whence.ranks);
    ROW(g, moments, &moments, 2.0 * (double)(T * K * z->I), 0, "%s K=%lld I=%lld bf16", f->text, (long long)K,
        (long long)z->I);
}

static flow open_flow(gauge *g, const size *z, int64_t T, int64_t sequences, int64_t length, const char *text) {
    flow f = {.z = *z, .T = T, .sequences = sequences, .length = length, .text = text};
    int64_t pairs = T * z->K;
    f.h = gauge_numbers(g, T * z->H, EXC_F32, 1);
    f.x = gauge_numbers(g, T * z->H, EXC_BF16, 1);
    f.mid = gauge_numbers(g, pairs * z->I, EXC_BF16, 1);
    f.y = gauge_numbers(g, pairs * z->H, EXC_F32, 1);
    f.weights = gauge_room(g, (size_t)pairs * 4);
    f.ids = gauge_room(g, (size_t)pairs * 4);
    f.row_of = gauge_room(g, (size_t)pairs * 4);
    f.pair_of = gauge_room(g, (size_t)pairs * 4);
    f.seen = gauge_zeros(g, (size_t)T * 4);
    f.offset = gauge_room(g, (size_t)(z->E + 1) * 8);
    f.count = gauge_zeros(g, (size_t)z->E * 8);
    f.gate_sum = gauge_zeros(g, (size_t)z->E * 8);
    f.mid_sum = gauge_zeros(g, (size_t)(z->E * z->I) * 8);
    f.square_sum = gauge_zeros(g, (size_t)z->E * 8);
    return f;
}

static void whole_layer(gauge *g, int64_t T, int64_t sequences, int64_t length) {
    static const size real = {2048, 768, 128, 8, 32, 4, 128, 151936}, small = {64, 32, 8, 2, 4, 1, 16, 100};
    char text[48];
    snprintf(text, sizeof text, sequences == T ? "decode T=%lld" : "T=%lld", (long long)T);
    flow f = open_flow(g, g->quick ? &small : &real, T, sequences, length, text);
    entry_rows(g, &f);
    attention_rows(g, &f);
    routing_rows(g, &f);
    product_rows(g, &f, EXC_BF16, EXC_GLU_SILU);
    exit_rows(g, &f);
    if (sequences == T) matmul_row(g, &f, "head", f.z.V, f.z.H, f.x, gauge_room(g, (size_t)(T * f.z.V) * 4), NULL);
    gauge_clear(g);
}

static void quantised(gauge *g, const char *model, const size *real, const size *small, int64_t T, int dtype,
                      int activation) {
    char text[48];
    row r = {.name = "glu"};
    const size *z = g->quick ? small : real;
    double need =
        3 * (double)z->E * bytes_of(z->I, z->H, dtype) + (double)(T * z->K) * (4.0 * (double)z->H + 2.0 * (double)z->I);
    snprintf(text, sizeof text, "%s T=%lld", model, (long long)T);
    if (need > 0.9 * (double)exc_device_free(g->ctx)) {
        snprintf(r.shape, sizeof r.shape, "%s", text);
        gauge_skip(g, &r, "%s of device memory needed", exc_memory_text((uint64_t)need, (char[32]){0}));
        return;
    }
    flow f = open_flow(g, z, T, 1, T, text);
    routing_rows(g, &f);
    product_rows(g, &f, dtype, activation);
    gauge_clear(g);
}

void layer_rows(gauge *g) {
    static const char *const ops[] = {"embed", "norm", "matmul",  "rope", "attend", "route",  "permute",
                                      "glu",   "down", "combine", "lens", "gather", "whence", "moments"};
    static const size deepseek = {7168, 2048, 256, 8, 0, 0, 0, 0}, oss = {2880, 2880, 128, 4, 0, 0, 0, 0},
                      small = {128, 64, 8, 2, 0, 0, 0, 0};
    bool any = false;
    for (size_t i = 0; i < EXC_COUNT(ops); i++) any |= gauge_wanted(g, ops[i]);
    if (!any) return;
    whole_layer(g, g->quick ? 72 : 8192, g->quick ? 2 : 16, g->quick ? 36 : 512);
    for (int64_t T = 1; T <= 64; T = T == 1 ? 16 : 4 * T)
        whole_layer(g, g->quick ? (T + 7) / 8 : T, g->quick ? (T + 7) / 8 : T, g->quick ? 9 : 2048);
    if (!gauge_wanted(g, "glu") && !gauge_wanted(g, "down")) return;
    for (int many = 0; many < 2; many++) {
        int64_t T = g->quick ? (many ? 70 : 3) : many ? 4096 : 16;
        quantised(g, "DeepSeek-V3", &deepseek, &small, T, EXC_F8_E4M3, EXC_GLU_SILU);
        quantised(g, "gpt-oss-120b", &oss, &small, T, EXC_F4, EXC_GLU_CLAMPED);
    }
}
