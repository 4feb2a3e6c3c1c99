/* latents.c - rows of multi-head latent attention at the sizes of Moonlight (16 heads) and DeepSeek-V3 (128 heads): latent 512,
 * 64 rotating and 128 plain channels a head, values of 128.
 *
 * Floors: `latent` moves its arrays once; `bundle` reads the heads' weights once when rows are few and does its multiply-adds
 * when they are many; decode reads the latent cache once, whatever the number of heads. With many heads that floor is out of
 * reach: 2 * heads * (576 + 512) FLOP for every 1152 bytes are arithmetic, so a second row counts that. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "bench.h"

enum { C = 512, R = 64, N = 128, W = C + R };

#define OP(b, op, args) bench_must(b, (b)->ctx->ops->op(&(b)->ctx->queue, args), #op)

static void worse(double *worst, double off)
{
    if (!(off <= *worst)) *worst = off; /* NaN is worst */
}

static void run_latent(bench *b, void *arg) { OP(b, latent, arg); }

static void latent_row(bench *b)
{
    int64_t T = b->quick ? 1024 : 8192, heads = 16, width = heads * (N + R) + W;
    double error = 0;
    if (!bench_wanted(b, "latent")) return;
    float *x = bench_alloc(b, (size_t)(T * width) * 4), weight[C], freq[R / 2];
    int32_t *position = bench_alloc(b, (size_t)T * 4);
    int64_t *cache_row = bench_alloc(b, (size_t)T * 8);
    uint16_t *plain = bench_alloc(b, (size_t)(T * heads * N) * 2), *wide = bench_alloc(b, (size_t)(T * heads * W) * 2),
             *cache = bench_alloc(b, (size_t)(T * W) * 2);
    fill_f32(b, x, (size_t)(T * width), 1, 81);
    for (int i = 0; i < C; i++) weight[i] = 1;
    for (int i = 0; i < R / 2; i++) freq[i] = (float)pow(1e4, -2.0 * i / R);
    for (int64_t t = 0; t < T; t++) position[t] = (int32_t)(t % 2048), cache_row[t] = t;
    struct exc_latent_args a = {.q = x, .q_stride = width, .kv = x + heads * (N + R), .kv_stride = width, .weight = weight, .eps = 1e-6f,
        .inv_freq = freq, .attention_factor = 1, .adjacent = 1, .position = position, .cache_row = cache_row, .tokens = T, .heads = heads,
        .plain = N, .rotary = R, .latent = C, .q_plain = plain, .plain_step = N, .q_turned = wide + C, .turned_step = W, .cache = cache,
        .act = EXC_BF16};
    run_latent(b, &a);
    for (int64_t t = 0; t < T; t += 97) {
        const float *kv = a.kv + t * width;
        int64_t i = t % C, p = t % (R / 2);
        double sum = 0, angle = (double)position[t] * (double)freq[p];
        for (int c = 0; c < C; c++) sum += (double)kv[c] * (double)kv[c];
        worse(&error, fabs((double)from_bf16(cache[t * W + i]) - (double)kv[i] / sqrt(sum / C + 1e-6)));
        double want = (double)kv[C + 2 * p] * cos(angle) - (double)kv[C + 2 * p + 1] * sin(angle);
        worse(&error, fabs((double)from_bf16(cache[t * W + C + 2 * p]) - want));
    }
    row r = {.name = "latent", .shape = b->quick ? "1024 tokens, 16 heads" : "8192 tokens, 16 heads", .against = CEIL_COPY,
             .work = 6.0 * (double)(T * width), .error = error, .limit = 0x1p-6, .note = "values of size 4: error is one rounding to bf16"};
    bench_measure(b, &r, run_latent, &a);
    exc_release(x);
    exc_release(position);
    exc_release(cache_row);
    exc_release(plain);
    exc_release(wide);
    exc_release(cache);
}

static void run_bundle(bench *b, void *arg) { OP(b, bundle, arg); }

static void bundle_row(bench *b, const char *name, int64_t rows, int64_t heads, ceiling against)
{
    if (!bench_wanted(b, name)) return;
    int64_t n = C, k = N;
    size_t each = exc_packed_bytes(n, k, EXC_BF16);
    uint16_t *x = bench_alloc(b, (size_t)(rows * heads * k) * 2), *y = bench_alloc(b, (size_t)(rows * heads * n) * 2),
             *w = bench_alloc(b, (size_t)(heads * n * k) * 2);
    uint8_t *packed = bench_alloc(b, (size_t)heads * each);
    exc_packed *list = bench_alloc(b, (size_t)heads * sizeof *list);
    fill_bf16(b, x, (size_t)(rows * heads * k), 1, 82);
    fill_bf16(b, w, (size_t)(heads * n * k), 1, 83);
    for (int64_t h = 0; h < heads; h++) {
        list[h] = (exc_packed){packed + (size_t)h * each, n, k, EXC_BF16};
        OP(b, pack, &((struct exc_pack_args){.w = w + h * n * k, .w_dtype = EXC_BF16, .n = n, .k = k, .to = EXC_BF16,
                                             .out = packed + (size_t)h * each}));
    }
    struct exc_bundle_args a = {.x = x, .x_stride = heads * k, .x_step = k, .act = EXC_BF16, .w = list, .heads = heads, .y = y,
                                .y_stride = heads * n, .y_step = n, .rows = rows};
    run_bundle(b, &a);
    double error = 0;
    for (int64_t t = 0; t < rows; t += 1 + rows / 16)
        for (int64_t h = t % 5; h < heads; h += 1 + heads / 8)
            for (int64_t o = t % 7; o < n; o += 61) {
                double want = 0, size = 0;
                for (int64_t i = 0; i < k; i++) {
                    double z = (double)from_bf16(x[(t * heads + h) * k + i]) * (double)from_bf16(w[(h * n + o) * k + i]);
                    want += z;
                    size += fabs(z);
                }
                worse(&error, fabs((double)from_bf16(y[(t * heads + h) * n + o]) - want) / size);
            }
    char shape[64];
    snprintf(shape, sizeof shape, "%d x %d heads, %d -> %d bf16", (int)rows, (int)heads, (int)k, (int)n);
    row r = {.name = name, .shape = shape, .against = against, .error = error, .limit = 0x1p-8,
             .work = against == CEIL_READ ? 2.0 * (double)(heads * n * k) : 2.0 * (double)rows * (double)(heads * n * k)};
    bench_measure(b, &r, run_bundle, &a);
    exc_release(x);
    exc_release(y);
    exc_release(w);
    exc_release(packed);
    exc_release(list);
}

static void run_attend(bench *b, void *arg) { OP(b, attend, arg); }

static double decode_error(const struct exc_attend_args *a, const uint16_t *q, const uint16_t *cache, int64_t heads, int64_t length)
{
    double worst = 0, *p = malloc((size_t)length * sizeof *p);
    for (int64_t s = 0; s < a->sequences; s += 5) {
        const uint16_t *query = q + (s * heads + s % heads) * W, *keys = cache + s * length * W;
        double top = -INFINITY, sum = 0, out = 0, size = 0;
        for (int64_t i = 0; i < length; i++) {
            p[i] = 0;
            for (int c = 0; c < W; c++) p[i] += (double)from_bf16(query[c]) * (double)from_bf16(keys[i * W + c]);
            top = fmax(top, p[i] *= (double)a->scale);
        }
        for (int64_t i = 0; i < length; i++) {
            double e = exp(p[i] - top), x = (double)from_bf16(keys[i * W + 3]);
            sum += e;
            out += e * x;
            size += e * fabs(x);
        }
        worse(&worst, fabs((double)from_bf16(((const uint16_t *)a->out)[(s * heads + s % heads) * C + 3]) - out / sum) / (size / sum));
    }
    free(p);
    return worst;
}

/* one new token of each sequence against its cache, absorbed */
static void decode_rows(bench *b, const char *name, const char *arithmetic, int64_t heads, int64_t sequences, int64_t length)
{
    if (!bench_wanted(b, name) && !bench_wanted(b, arithmetic)) return;
    uint16_t *q = bench_alloc(b, (size_t)(sequences * heads * W) * 2), *out = bench_alloc(b, (size_t)(sequences * heads * C) * 2),
             *cache = bench_alloc(b, (size_t)(sequences * length * W) * 2);
    int64_t *begin = bench_alloc(b, (size_t)(sequences + 1) * 8), *base = bench_alloc(b, (size_t)sequences * 8),
            *len = bench_alloc(b, (size_t)sequences * 8);
    fill_bf16(b, q, (size_t)(sequences * heads * W), 1, 84);
    fill_bf16(b, cache, (size_t)(sequences * length * W), 1, 85);
    for (int64_t s = 0; s <= sequences; s++) begin[s] = s;
    for (int64_t s = 0; s < sequences; s++) base[s] = s * length, len[s] = length;
    struct exc_attend_args a = {.q = q, .cache_k = cache, .key_stride = W, .cache_v = cache, .value_stride = W, .q_begin = begin,
        .cache_begin = base, .length = len, .sequences = sequences, .q_heads = heads, .kv_heads = 1, .head_dim = W, .value_dim = C,
        .scale = 0.0721688f, .out = out, .act = EXC_BF16, .tokens = sequences, .longest = length};
    run_attend(b, &a);
    char shape[64];
    snprintf(shape, sizeof shape, "%d queries of %d heads, %d keys each", (int)sequences, (int)heads, (int)length);
    double error = decode_error(&a, q, cache, heads, length);
    row bytes = {.name = name, .shape = shape, .against = CEIL_READ, .error = error, .limit = 0x1p-6,
                 .work = 2.0 * (double)(sequences * length * W), .note = "bytes: the latent cache, once for all heads"};
    row flop = {.name = arithmetic, .shape = shape, .against = CEIL_BF16, .error = error, .limit = 0x1p-6,
                .work = 2.0 * (double)(sequences * length * heads * (W + C))};
    if (bench_wanted(b, name)) bench_measure(b, &bytes, run_attend, &a);
    if (bench_wanted(b, arithmetic)) bench_measure(b, &flop, run_attend, &a);
    exc_release(q);
    exc_release(out);
    exc_release(cache);
    exc_release(begin);
    exc_release(base);
    exc_release(len);
}

void latent_rows(bench *b)
{
    latent_row(b);
    bundle_row(b, "bundle", b->quick ? 128 : 1024, 16, CEIL_BF16);
    bundle_row(b, "bundle_1", 1, b->quick ? 128 : 512, CEIL_READ);
    decode_rows(b, "latent_decode", "latent_decode_flop", 16, b->quick ? 4 : 32, 2048);
    decode_rows(b, "latent_decode_128", "latent_decode_128_flop", 128, b->quick ? 2 : 8, 2048);
}
