/* deltas.c - rows of the gated delta net at the sizes of Qwen3-Next and Qwen3.5: 16 key heads, 32 value heads of 128 channels,
 * a convolution of 4 taps over 8192 channels.
 *
 * Floors: prefill does its multiply-adds in f32, as the state wants; decode reads the state of every sequence once and, unlike the
 * rule written token by token, does not write it; `conv` and `gate` read and write their arrays once. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "bench.h"

enum { HK = 16, HV = 32, D = 128, CHANNELS = 2 * HK * D + HV * D, WIDTH = CHANNELS + 2 * HV };

#define OP(b, op, args) bench_must(b, (b)->ctx->ops->op(&(b)->ctx->queue, args), #op)

static void run_delta(bench *b, void *arg) { OP(b, delta, arg); }

/* the rule itself, token by token in f64, for one value head of the first sequence */
static double delta_error(const struct exc_delta_args *a, int64_t head, int64_t tokens)
{
    double *s = calloc(D * D, sizeof *s), diff = 0, norm = 0;
    for (int64_t t = 0; t < tokens; t++) {
        const float *q = a->q + t * WIDTH + head / 2 * D, *k = a->k + t * WIDTH + head / 2 * D, *v = a->v + t * WIDTH + head * D;
        double qq = 1e-6, kk = 1e-6, beta = 1 / (1 + exp(-(double)a->beta[t * WIDTH + head])),
               decay = exp(-exp((double)a->a_log[head]) * log1p(exp((double)a->step[t * WIDTH + head] + (double)a->dt_bias[head])));
        for (int d = 0; d < D; d++) qq += (double)q[d] * (double)q[d], kk += (double)k[d] * (double)k[d];
        for (int c = 0; c < D; c++) {
            double seen = 0, o = 0;
            for (int d = 0; d < D; d++) seen += decay * s[d * D + c] * (double)k[d] / sqrt(kk);
            for (int d = 0; d < D; d++) {
                s[d * D + c] = decay * s[d * D + c] + (double)k[d] / sqrt(kk) * beta * ((double)v[c] - seen);
                o += s[d * D + c] * (double)q[d] / sqrt(qq * D);
            }
            double got = (double)a->out[(t * HV + head) * D + c];
            diff += (got - o) * (got - o);
            norm += o * o;
        }
    }
    free(s);
    return sqrt(diff / norm);
}

/* `sequences` of `tokens` new ones each, behind `before` old ones */
static void delta_row(bench *b, const char *name, int64_t sequences, int64_t tokens, int64_t before, ceiling against)
{
    if (!bench_wanted(b, name)) return;
    int64_t T = sequences * tokens, each = (int64_t)exc_delta_floats(HK, HV, D, D);
    int64_t old = sequences * before, rows = T > old ? T : old, *begin = bench_alloc(b, (size_t)(sequences + 1) * 8), *length = bench_alloc(b, (size_t)sequences * 8);
    float *x = bench_alloc(b, (size_t)(rows * WIDTH) * 4), *state = bench_alloc(b, (size_t)(sequences * each) * 4),
          *out = bench_alloc(b, (size_t)(rows * HV * D) * 4), logs[2 * HV];
    int32_t *slot = bench_alloc(b, (size_t)sequences * 4);
    fill_f32(b, x, (size_t)(rows * WIDTH), 1, 91);
    for (int h = 0; h < HV; h++) logs[h] = -3 + 0.1f * (float)h, logs[HV + h] = 0;
    for (int64_t s = 0; s <= sequences; s++) begin[s] = s * (before ? before : tokens);
    for (int64_t s = 0; s < sequences; s++) length[s] = before ? before : tokens, slot[s] = (int32_t)s;
    struct exc_delta_args a = {.q = x, .k = x + HK * D, .v = x + 2 * HK * D, .stride = WIDTH, .beta = x + CHANNELS, .step = x + CHANNELS + HV,
        .gate_stride = WIDTH, .a_log = logs, .dt_bias = logs + HV, .begin = begin, .length = length, .slot = slot, .sequences = sequences,
        .tokens = rows, .k_heads = HK, .v_heads = HV, .k_dim = D, .v_dim = D, .state = state, .state_stride = each, .out = out};
    run_delta(b, &a);
    double error = delta_error(&a, 21, before ? before : tokens);
    if (before) { /* the same token again and again: its place in the chunk is the middle */
        for (int64_t s = 0; s <= sequences; s++) begin[s] = s * tokens;
        for (int64_t s = 0; s < sequences; s++) length[s] = before + tokens;
        a.tokens = T;
    }
    double flop = (double)T * HV * (6.0 * D * D + 2.0 * EXC_DELTA_CHUNK * 2 * D), bytes = (double)sequences * HV * D * D * 4;
    char shape[64];
    snprintf(shape, sizeof shape, "%d sequences, %d new tokens each", (int)sequences, (int)tokens);
    row r = {.name = name, .shape = shape, .against = against, .work = against == CEIL_READ ? bytes : flop, .unit = "tok/s",
             .per_call = (double)T, .error = error, .limit = 2e-6};
    bench_measure(b, &r, run_delta, &a);
    exc_release(x);
    exc_release(state);
    exc_release(out);
    exc_release(begin);
    exc_release(length);
    exc_release(slot);
}

static void run_conv(bench *b, void *arg) { OP(b, conv, arg); }
static void run_gate(bench *b, void *arg) { OP(b, gate, arg); }

static void conv_row(bench *b)
{
    if (!bench_wanted(b, "conv")) return;
    int64_t T = 2048, begin[2] = {0, T}, length = T;
    int32_t slot = 0;
    float *x = bench_alloc(b, (size_t)(T * CHANNELS) * 4), *y = bench_alloc(b, (size_t)(T * CHANNELS) * 4), *w = bench_alloc(b, 4 * CHANNELS * 4),
          *state = bench_alloc(b, 3 * CHANNELS * 4);
    fill_f32(b, x, (size_t)(T * CHANNELS), 1, 92);
    fill_f32(b, w, 4 * CHANNELS, 0.5f, 93);
    struct exc_conv_args a = {.x = x, .x_stride = CHANNELS, .weight = w, .taps = 4, .channels = CHANNELS, .begin = begin, .length = &length,
        .slot = &slot, .sequences = 1, .tokens = T, .state = state, .state_stride = 3 * CHANNELS, .y = y, .y_stride = CHANNELS};
    run_conv(b, &a);
    double error = 0;
    for (int64_t t = 0; t < T; t += 61)
        for (int64_t c = t % 97; c < CHANNELS; c += 997) {
            double sum = 0;
            for (int64_t j = 0; j < 4; j++)
                if (t - 3 + j >= 0) sum += (double)w[j * CHANNELS + c] * (double)x[(t - 3 + j) * CHANNELS + c];
            double off = fabs((double)y[t * CHANNELS + c] - sum / (1 + exp(-sum)));
            if (!(off <= error)) error = off;
        }
    row r = {.name = "conv", .shape = "2048 tokens, 8192 channels, 4 taps", .against = CEIL_COPY, .work = 8.0 * (double)T * CHANNELS, .error = error,
             .limit = 4e-6};
    bench_measure(b, &r, run_conv, &a);
    exc_release(x);
    exc_release(y);
    exc_release(w);
    exc_release(state);
}

static void gate_row(bench *b)
{
    if (!bench_wanted(b, "gate")) return;
    int64_t T = 4096, n = T * HV * D;
    float *x = bench_alloc(b, (size_t)n * 4), *g = bench_alloc(b, (size_t)n * 4), w[D];
    uint16_t *y = bench_alloc(b, (size_t)n * 2);
    fill_f32(b, x, (size_t)n, 1, 94);
    fill_f32(b, g, (size_t)n, 1, 95);
    for (int d = 0; d < D; d++) w[d] = 1;
    struct exc_gate_args a = {.x = x, .x_dtype = EXC_F32, .g = g, .g_stride = HV * D, .silu = 1, .weight = w, .eps = 1e-6f, .tokens = T,
                              .heads = HV, .dim = D, .y = y, .act = EXC_BF16};
    run_gate(b, &a);
    double error = 0;
    for (int64_t h = 0; h < T * HV; h += 997) {
        double sum = 0;
        for (int d = 0; d < D; d++) sum += (double)x[h * D + d] * (double)x[h * D + d];
        for (int d = 0; d < D; d++) {
            double gate = (double)g[h * D + d], off = fabs((double)from_bf16(y[h * D + d]) - (double)x[h * D + d] / sqrt(sum / D + 1e-6) * gate / (1 + exp(-gate)));
            if (!(off <= error)) error = off;
        }
    }
    row r = {.name = "gate", .shape = "4096 tokens, 32 heads of 128, normed", .against = CEIL_COPY, .work = 10.0 * (double)n, .error = error,
             .limit = 0x1p-5, .note = "values up to 16: error is one rounding to bf16"};
    bench_measure(b, &r, run_gate, &a);
    exc_release(x);
    exc_release(g);
    exc_release(y);
}

void delta_rows(bench *b)
{
    conv_row(b);
    delta_row(b, "delta_prefill", 8, b->quick ? 64 : 256, 0, CEIL_F32);
    delta_row(b, "delta_decode", 16, 1, 48, CEIL_READ);
    gate_row(b);
}
