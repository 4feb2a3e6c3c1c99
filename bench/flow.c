/* flow.c - rows of the ops of the forward pass, at the shapes of the random model (hidden 1024, 64 experts top-8 of 384, 16
 * query heads and 2 KV heads of 128) or larger where a shape would sit in the cache.
 *
 * Floors: ops that touch each element a few times (norm, rope, embed, combine, lens, permute) move their arrays once; matmul,
 * glu, down and attend do their multiply-adds when rows are many, and read their weights or keys once when rows are few. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

#define OP(b, op, args) bench_must(b, (b)->ctx->ops->op(&(b)->ctx->queue, args), #op)

static void worse(double *worst, double off)
{
    if (!(off <= *worst)) *worst = off; /* NaN is worst */
}

/* --------------------------------------------------------------------------------------------------- embed, norm */

static void run_embed(bench *b, void *arg) { OP(b, embed, arg); }

static void embed_row(bench *b)
{
    int64_t V = 32768, H = 1024, T = b->quick ? 16384 : 65536;
    double error = 0;
    if (!bench_wanted(b, "embed")) return;
    uint16_t *table = bench_alloc(b, (size_t)(V * H) * 2);
    float *out = bench_alloc(b, (size_t)(T * H) * 4);
    int32_t *ids = bench_alloc(b, (size_t)T * 4);
    fill_bf16(b, table, (size_t)(V * H), 1, 61);
    for (int64_t t = 0; t < T; t++) ids[t] = (int32_t)(exc_random_u64(1, 2, (uint64_t)t) % (uint64_t)V);
    struct exc_embed_args a = {.table = table, .table_dtype = EXC_BF16, .ids = ids, .tokens = T, .hidden = H, .out = out};
    run_embed(b, &a);
    for (int64_t t = 0; t < T; t += 37) error += out[t * H + t % H] != from_bf16(table[ids[t] * H + t % H]);
    row r = {.name = "embed", .shape = "65536 tokens x 1024 bf16 -> f32", .against = CEIL_COPY, .work = 6.0 * (double)(T * H),
             .error = error, .limit = 0.5};
    if (b->quick) r.shape = "16384 tokens x 1024 bf16 -> f32";
    bench_measure(b, &r, run_embed, &a);
    exc_release(table);
    exc_release(out);
    exc_release(ids);
}

static void run_norm(bench *b, void *arg) { OP(b, norm, arg); }

static void norm_row(bench *b)
{
    int64_t T = b->quick ? 16384 : 65536, H = 1024;
    double error = 0;
    if (!bench_wanted(b, "norm")) return;
    float *x = bench_alloc(b, (size_t)(T * H) * 4), *w = bench_alloc(b, (size_t)H * 4);
    uint16_t *y = bench_alloc(b, (size_t)(T * H) * 2);
    fill_f32(b, x, (size_t)(T * H), 1, 62);
    fill_f32(b, w, (size_t)H, 1, 63);
    struct exc_norm_args a = {.x = x, .x_stride = H, .weight = w, .eps = 1e-6f, .rows = T, .dim = H, .y = y, .y_stride = H, .act = EXC_BF16};
    run_norm(b, &a);
    for (int64_t t = 0; t < T; t += 997) {
        double sum = 0;
        for (int64_t c = 0; c < H; c++) sum += (double)x[t * H + c] * (double)x[t * H + c];
        double want = (double)w[t % H] * (double)x[t * H + t % H] / sqrt(sum / (double)H + 1e-6);
        worse(&error, fabs((double)from_bf16(y[t * H + t % H]) - want) / (fabs(want) + 1e-30));
    }
    row r = {.name = "norm", .shape = b->quick ? "16384 x 1024 f32 -> bf16" : "65536 x 1024 f32 -> bf16", .against = CEIL_COPY,
             .work = 6.0 * (double)(T * H), .error = error, .limit = 0x1p-8};
    bench_measure(b, &r, run_norm, &a);
    exc_release(x);
    exc_release(w);
    exc_release(y);
}

/* --------------------------------------------------------------------------------------------------- rope, attend */

static void run_rope(bench *b, void *arg) { OP(b, rope, arg); }

static void rope_row(bench *b)
{
    enum { Q = 16, KV = 2, D = 128, W = (Q + 2 * KV) * D };
    int64_t T = b->quick ? 4096 : 16384;
    double error = 0;
    if (!bench_wanted(b, "rope")) return;
    float *qkv = bench_alloc(b, (size_t)(T * W) * 4), freq[D / 2], one[D];
    int32_t *position = bench_alloc(b, (size_t)T * 4);
    int64_t *cache_row = bench_alloc(b, (size_t)T * 8);
    uint16_t *q = bench_alloc(b, (size_t)(T * Q * D) * 2), *k = bench_alloc(b, (size_t)(T * KV * D) * 2), *v = bench_alloc(b, (size_t)(T * KV * D) * 2);
    fill_f32(b, qkv, (size_t)(T * W), 1, 64);
    for (int i = 0; i < D / 2; i++) freq[i] = (float)pow(1e6, -2.0 * i / D);
    for (int i = 0; i < D; i++) one[i] = 1;
    for (int64_t t = 0; t < T; t++) position[t] = (int32_t)(t % 2048), cache_row[t] = t;
    struct exc_rope_args a = {.q = qkv, .q_stride = W, .k = qkv + Q * D, .k_stride = W, .v = qkv + (Q + KV) * D, .v_stride = W, .q_norm = one,
        .k_norm = one, .eps = 1e-6f, .inv_freq = freq, .rotary = D, .attention_factor = 1, .position = position, .cache_row = cache_row,
        .tokens = T, .q_heads = Q, .kv_heads = KV, .head_dim = D, .q_out = q, .cache_k = k, .cache_v = v, .act = EXC_BF16};
    run_rope(b, &a);
    for (int64_t t = 0; t < T; t += 997) {
        const float *x = qkv + t * W + (Q + t % KV) * D; /* a key head */
        int64_t i = t % (D / 2);
        double sum = 0, angle = (double)position[t] * (double)freq[i];
        for (int c = 0; c < D; c++) sum += (double)x[c] * (double)x[c];
        double want = ((double)x[i] * cos(angle) - (double)x[i + D / 2] * sin(angle)) / sqrt(sum / D + 1e-6);
        worse(&error, fabs((double)from_bf16(k[t * KV * D + t % KV * D + i]) - want));
    }
    row r = {.name = "rope", .shape = b->quick ? "4096 tokens, 16 + 2 heads of 128" : "16384 tokens, 16 + 2 heads of 128", .against = CEIL_COPY,
             .work = 6.0 * (double)(T * W), .error = error, .limit = 0x1p-6, .note = "values of size 4: error is one rounding to bf16"};
    bench_measure(b, &r, run_rope, &a);
    exc_release(qkv);
    exc_release(position);
    exc_release(cache_row);
    exc_release(q);
    exc_release(k);
    exc_release(v);
}

static void run_attend(bench *b, void *arg) { OP(b, attend, arg); }

static double attend_error(const struct exc_attend_args *a, const uint16_t *q, const uint16_t *k, const uint16_t *v)
{
    int64_t D = a->head_dim, Q = a->q_heads, KV = a->kv_heads;
    double worst = 0;
    double *p = malloc((size_t)a->length[0] * sizeof *p);
    for (int64_t s = 0; s < a->sequences; s += 5) {
        int64_t n = a->q_begin[s + 1] - a->q_begin[s], j = n - 1 - n / 3, at = a->q_begin[s] + j, see = a->length[s] - n + j + 1, h = s % Q;
        const uint16_t *query = q + (at * Q + h) * D;
        int64_t head = h / (Q / KV);
        double top = -INFINITY, sum = 0, out = 0, size = 0;
        for (int64_t i = 0; i < see; i++) {
            const uint16_t *key = k + ((a->cache_begin[s] + i) * KV + head) * D;
            p[i] = 0;
            for (int64_t c = 0; c < D; c++) p[i] += (double)from_bf16(query[c]) * (double)from_bf16(key[c]);
            p[i] *= (double)a->scale;
            if (p[i] > top) top = p[i];
        }
        for (int64_t i = 0; i < see; i++) {
            double e = exp(p[i] - top), x = (double)from_bf16(v[((a->cache_begin[s] + i) * KV + head) * D + 3]);
            sum += e;
            out += e * x;
            size += e * fabs(x);
        }
        worse(&worst, fabs((double)from_bf16(((const uint16_t *)a->out)[(at * Q + h) * D + 3]) - out / sum) / (size / sum));
    }
    free(p);
    return worst;
}

static void attend_row(bench *b, const char *name, const char *shape, int64_t sequences, int64_t queries, int64_t length, ceiling against)
{
    enum { Q = 16, KV = 2, D = 128 };
    if (!bench_wanted(b, name)) return;
    int64_t T = sequences * queries, C = sequences * length;
    uint16_t *q = bench_alloc(b, (size_t)(T * Q * D) * 2), *out = bench_alloc(b, (size_t)(T * Q * D) * 2);
    uint16_t *k = bench_alloc(b, (size_t)(C * KV * D) * 2), *v = bench_alloc(b, (size_t)(C * KV * D) * 2);
    int64_t *begin = bench_alloc(b, (size_t)(sequences + 1) * 8), *base = bench_alloc(b, (size_t)sequences * 8), *len = bench_alloc(b, (size_t)sequences * 8);
    fill_bf16(b, q, (size_t)(T * Q * D), 1, 65);
    fill_bf16(b, k, (size_t)(C * KV * D), 1, 66);
    fill_bf16(b, v, (size_t)(C * KV * D), 1, 67);
    for (int64_t s = 0; s <= sequences; s++) begin[s] = s * queries;
    for (int64_t s = 0; s < sequences; s++) base[s] = s * length, len[s] = length;
    struct exc_attend_args a = {.q = q, .cache_k = k, .key_stride = KV * D, .cache_v = v, .value_stride = KV * D, .q_begin = begin, .cache_begin = base, .length = len, .sequences = sequences,
        .q_heads = Q, .kv_heads = KV, .head_dim = D, .value_dim = D, .scale = 0.0883883f, .out = out, .act = EXC_BF16,
        .tokens = sequences * queries, .longest = length};
    run_attend(b, &a);
    double visible = (double)length - ((double)queries - 1) / 2;
    row r = {.name = name, .shape = shape, .against = against, .error = attend_error(&a, q, k, v), .limit = 0x1p-6,
             .work = against == CEIL_READ ? 4.0 * (double)(C * KV * D) : 4.0 * D * Q * (double)T * visible};
    bench_measure(b, &r, run_attend, &a);
    exc_release(q);
    exc_release(out);
    exc_release(k);
    exc_release(v);
    exc_release(begin);
    exc_release(base);
    exc_release(len);
}

/* --------------------------------------------------------------------------------------------------- pack, matmul */

static void run_pack(bench *b, void *arg) { OP(b, pack, arg); }

static void pack_row(bench *b)
{
    int64_t n = b->quick ? 8192 : 32768, k = 2048;
    double wrong = 0;
    if (!bench_wanted(b, "pack")) return;
    uint16_t *w = bench_alloc(b, (size_t)(n * k) * 2), *out = bench_alloc(b, exc_packed_bytes(n, k, EXC_BF16));
    fill_bf16(b, w, (size_t)(n * k), 1, 68);
    struct exc_pack_args a = {.w = w, .w_dtype = EXC_BF16, .n = n, .k = k, .to = EXC_BF16, .out = out};
    run_pack(b, &a);
    for (int64_t o = 0; o < n; o += 13)
        for (int64_t i = 0; i < k; i += 97) wrong += out[o / 16 * 16 * k + i / 2 * 32 + o % 16 * 2 + i % 2] != w[o * k + i];
    row r = {.name = "pack", .shape = b->quick ? "8192 x 2048 bf16" : "32768 x 2048 bf16", .against = CEIL_COPY, .work = 4.0 * (double)(n * k),
             .error = wrong, .limit = 0.5};
    bench_measure(b, &r, run_pack, &a);
    exc_release(w);
    exc_release(out);
}

static void run_matmul(bench *b, void *arg) { OP(b, matmul, arg); }

static void matmul_row(bench *b, const char *name, int64_t rows, int64_t n, int64_t k, ceiling against)
{
    if (!bench_wanted(b, name)) return;
    uint16_t *x = bench_alloc(b, (size_t)(rows * k) * 2), *w;
    float *y = bench_alloc(b, (size_t)(rows * n) * 4);
    exc_packed p = pack_random(b, n, k, 1 / sqrtf((float)k), 69, &w);
    fill_bf16(b, x, (size_t)(rows * k), 1, 70);
    struct exc_matmul_args a = {.x = x, .x_stride = k, .act = EXC_BF16, .w = &p, .y = y, .y_stride = n, .rows = rows};
    run_matmul(b, &a);
    double error = 0;
    for (int64_t t = 0; t < rows; t += 1 + rows / 16)
        for (int64_t o = t % 7; o < n; o += 1 + n / 32) {
            double want = 0, size = 0;
            for (int64_t i = 0; i < k; i++) {
                double z = (double)from_bf16(x[t * k + i]) * (double)from_bf16(w[o * k + i]);
                want += z;
                size += fabs(z);
            }
            worse(&error, fabs((double)y[t * n + o] - want) / size);
        }
    char shape[64];
    snprintf(shape, sizeof shape, "%d x %d -> %d bf16", (int)rows, (int)k, (int)n);
    row r = {.name = name, .shape = shape, .against = against, .error = error, .limit = 1e-5,
             .work = against == CEIL_READ ? 2.0 * (double)(n * k) : 2.0 * (double)rows * (double)(n * k)};
    bench_measure(b, &r, run_matmul, &a);
    exc_release(x);
    exc_release(y);
    exc_release(w);
    exc_release((void *)(uintptr_t)p.data);
}

static void run_matvec(bench *b, void *arg) { OP(b, matvec, arg); }

static void matvec_row(bench *b)
{
    int64_t n = b->quick ? 8192 : 32768, k = 2048, rows = 4;
    double error = 0;
    if (!bench_wanted(b, "matvec")) return;
    uint16_t *w;
    exc_packed p = pack_random(b, n, k, 1, 71, &w);
    double *x = bench_alloc(b, (size_t)(rows * k) * 8), *y = bench_alloc(b, (size_t)(rows * n) * 8);
    for (int64_t i = 0; i < rows * k; i++) x[i] = exc_random_unit(7, 7, (uint64_t)i) - 0.5;
    struct exc_matvec_args a = {.x = x, .w = &p, .rows = rows, .y = y};
    run_matvec(b, &a);
    for (int64_t o = 0; o < n; o += 101) {
        double want = 0;
        for (int64_t i = 0; i < k; i++) want += x[k + i] * (double)from_bf16(w[o * k + i]);
        worse(&error, fabs(y[n + o] - want));
    }
    row r = {.name = "matvec", .shape = b->quick ? "4 f64 rows, 8192 x 2048 bf16" : "4 f64 rows, 32768 x 2048 bf16", .against = CEIL_READ,
             .work = 2.0 * (double)(n * k), .error = error, .limit = 1e-11};
    bench_measure(b, &r, run_matvec, &a);
    exc_release(w);
    exc_release((void *)(uintptr_t)p.data);
    exc_release(x);
    exc_release(y);
}

/* ------------------------------------------------------------------------------------------------ the expert ops */

enum { HIDDEN = 1024, INNER = 384, EXPERTS = 64, TOP = 8 };

/* One layer of experts, and routing that a trained router's balancing would give: every token draws 8 different ones. */
typedef struct experts {
    int64_t tokens, rows, distinct;
    exc_packed gate[EXPERTS], up[EXPERTS], down[EXPERTS];
    uint16_t *plain[3]; /* of expert 5 */
    int32_t *ids, *row_of, *pair_of, *slot;
    float *weights, *y, *h;
    int64_t offset[EXPERTS + 1];
    uint16_t *x, *mid;
    double *mid_sum, *sqnorm;
    struct exc_permute_args permute;
    struct exc_glu_args glu;
    struct exc_down_args down_args;
    struct exc_combine_args combine;
    float *basis, strength[EXPERTS];
} experts;

static void run_permute(bench *b, void *arg) { OP(b, permute, &((experts *)arg)->permute); }
static void run_glu(bench *b, void *arg) { OP(b, glu, &((experts *)arg)->glu); }
static void run_down(bench *b, void *arg) { OP(b, down, &((experts *)arg)->down_args); }
static void run_combine(bench *b, void *arg) { OP(b, combine, &((experts *)arg)->combine); }

static void draw(experts *x)
{
    bool used[EXPERTS] = {false};
    for (int64_t t = 0; t < x->tokens; t++) {
        uint64_t taken = 0, i = 0;
        for (int k = 0; k < TOP;) {
            uint64_t e = exc_random_u64(17, (uint64_t)t, i++) % EXPERTS;
            if (taken >> e & 1) continue;
            taken |= 1ull << e;
            used[e] = true;
            x->weights[t * TOP + k] = 0.125f;
            x->ids[t * TOP + k++] = (int32_t)e;
        }
        x->slot[t] = (int32_t)(t % 16);
    }
    for (int e = 0; e < EXPERTS; e++) x->distinct += used[e];
}

static experts *experts_open(bench *b, int64_t tokens)
{
    experts *x = exc_zalloc(b->ctx, 1, sizeof *x, "experts");
    x->tokens = tokens;
    x->rows = tokens * TOP;
    for (int e = 0; e < EXPERTS; e++) {
        x->gate[e] = pack_random(b, INNER, HIDDEN, 1 / 32.0f, 1000 + (uint64_t)e, e == 5 ? &x->plain[0] : NULL);
        x->up[e] = pack_random(b, INNER, HIDDEN, 1 / 32.0f, 2000 + (uint64_t)e, e == 5 ? &x->plain[1] : NULL);
        x->down[e] = pack_random(b, HIDDEN, INNER, 1 / 20.0f, 3000 + (uint64_t)e, e == 5 ? &x->plain[2] : NULL);
        x->strength[e] = 1;
    }
    x->ids = bench_alloc(b, (size_t)x->rows * 4);
    x->row_of = bench_alloc(b, (size_t)x->rows * 4);
    x->pair_of = bench_alloc(b, (size_t)x->rows * 4);
    x->weights = bench_alloc(b, (size_t)x->rows * 4);
    x->slot = bench_alloc(b, (size_t)tokens * 4);
    x->x = bench_alloc(b, (size_t)(tokens * HIDDEN) * 2);
    x->mid = bench_alloc(b, (size_t)(x->rows * INNER) * 2);
    x->y = bench_alloc(b, (size_t)(x->rows * HIDDEN) * 4);
    x->h = bench_alloc(b, (size_t)(tokens * HIDDEN) * 4);
    x->basis = bench_alloc(b, (size_t)(3 * HIDDEN) * 4);
    x->mid_sum = exc_zalloc(b->ctx, EXPERTS * INNER, 8, "sums");
    x->sqnorm = exc_zalloc(b->ctx, EXPERTS, 8, "sums");
    unit_rows(x->basis, 3, HIDDEN, 3);
    fill_bf16(b, x->x, (size_t)(tokens * HIDDEN), 1, 72);
    fill_f32(b, x->h, (size_t)(tokens * HIDDEN), 1, 73);
    draw(x);
    x->permute = (struct exc_permute_args){x->ids, tokens, TOP, EXPERTS, x->offset, x->row_of, x->pair_of};
    run_permute(b, x);
    x->glu = (struct exc_glu_args){.x = x->x, .act = EXC_BF16, .gate = x->gate, .up = x->up, .offset = x->offset, .pair_of = x->pair_of,
        .tokens = tokens, .top_k = TOP, .experts = EXPERTS, .hidden = HIDDEN, .inner = INNER, .mid = x->mid, .w_dtype = EXC_BF16};
    x->down_args = (struct exc_down_args){.mid = x->mid, .act = EXC_BF16, .down = x->down, .offset = x->offset, .pair_of = x->pair_of,
        .tokens = tokens, .top_k = TOP, .experts = EXPERTS, .hidden = HIDDEN, .inner = INNER, .y = x->y, .w_dtype = EXC_BF16};
    x->combine = (struct exc_combine_args){.y = x->y, .row_of = x->row_of, .ids = x->ids, .weights = x->weights, .tokens = tokens,
        .top_k = TOP, .hidden = HIDDEN, .h = x->h};
    run_glu(b, x);
    run_down(b, x);
    return x;
}

static void experts_close(experts *x)
{
    for (int e = 0; e < EXPERTS; e++) {
        exc_release((void *)(uintptr_t)x->gate[e].data);
        exc_release((void *)(uintptr_t)x->up[e].data);
        exc_release((void *)(uintptr_t)x->down[e].data);
    }
    void *all[] = {x->plain[0], x->plain[1], x->plain[2], x->ids, x->row_of, x->pair_of, x->weights, x->slot, x->x, x->mid, x->y, x->h,
                   x->basis, x->mid_sum, x->sqnorm, x};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_release(all[i]);
}

/* expert 5's first rows in f64, both halves */
static double experts_error(const experts *x, bool second)
{
    double worst = 0;
    for (int64_t r = x->offset[5]; r < x->offset[6] && r < x->offset[5] + 3; r++) {
        const uint16_t *in = second ? x->mid + r * INNER : x->x + x->pair_of[r] / TOP * HIDDEN;
        int64_t k = second ? INNER : HIDDEN, n = second ? HIDDEN : INNER;
        for (int64_t o = r % 5; o < n; o += 17) {
            double g = 0, u = 0;
            for (int64_t i = 0; i < k; i++) {
                double v = (double)from_bf16(in[i]);
                g += v * (double)from_bf16(x->plain[second ? 2 : 0][o * k + i]);
                if (!second) u += v * (double)from_bf16(x->plain[1][o * k + i]);
            }
            double want = second ? g : g / (1 + exp(-g)) * u, got = second ? (double)x->y[r * HIDDEN + o] : (double)from_bf16(x->mid[r * INNER + o]);
            worse(&worst, fabs(got - want) / (fabs(want) + 0.1));
        }
    }
    return worst;
}

static double permute_error(const experts *x)
{
    double wrong = 0;
    for (int e = 0; e < EXPERTS; e++)
        for (int64_t r = x->offset[e]; r < x->offset[e + 1]; r++)
            wrong += x->ids[x->pair_of[r]] != e || x->row_of[x->pair_of[r]] != r || (r > x->offset[e] && x->pair_of[r - 1] >= x->pair_of[r]);
    return wrong + (x->offset[EXPERTS] != x->rows);
}

/* h after one combine minus before, one token in f64, with the projection when there is a basis */
static double combine_error(bench *b, experts *x)
{
    float before[HIDDEN];
    int64_t t = x->tokens / 2;
    double want[HIDDEN] = {0}, worst = 0;
    memcpy(before, x->h + t * HIDDEN, sizeof before);
    run_combine(b, x);
    for (int k = 0; k < TOP; k++)
        for (int c = 0; c < HIDDEN; c++)
            want[c] += (double)x->weights[t * TOP + k] * (double)x->y[(int64_t)x->row_of[t * TOP + k] * HIDDEN + c];
    for (int64_t r = 0; r < x->combine.rank; r++) {
        double dot = 0;
        for (int c = 0; c < HIDDEN; c++) dot += (double)x->basis[r * HIDDEN + c] * want[c];
        for (int c = 0; c < HIDDEN; c++) want[c] -= dot * (double)x->basis[r * HIDDEN + c];
    }
    for (int c = 0; c < HIDDEN; c++) worse(&worst, fabs((double)x->h[t * HIDDEN + c] - (double)before[c] - want[c]));
    return worst;
}

static void expert_rows(bench *b, int64_t tokens, bool many)
{
    const char *suffix = many ? "" : "_16";
    char names[6][24], shape[64];
    static const char *const stems[6] = {"permute", "glu", "glu_captured", "down", "combine", "combine_lens"};
    bool any = false;
    for (int i = 0; i < 6; i++) {
        snprintf(names[i], sizeof names[i], "%s%s", stems[i], suffix);
        any |= bench_wanted(b, names[i]);
    }
    if (!any) return;
    experts *x = experts_open(b, tokens);
    double rows = (double)x->rows, weights = (double)x->distinct * HIDDEN * INNER * 2;
    snprintf(shape, sizeof shape, "%d tokens x %d, %d of %d experts", (int)tokens, TOP, (int)x->distinct, EXPERTS);
    ceiling c = many ? CEIL_BF16 : CEIL_READ;
    row glu = {.name = names[1], .shape = shape, .against = c, .work = many ? 4.0 * rows * INNER * HIDDEN : 2 * weights,
               .error = experts_error(x, false), .limit = 0x1p-7};
    if (bench_wanted(b, names[1])) bench_measure(b, &glu, run_glu, x);
    row down = {.name = names[3], .shape = shape, .against = c, .work = many ? 2.0 * rows * INNER * HIDDEN : weights,
                .error = experts_error(x, true), .limit = 1e-4};
    if (bench_wanted(b, names[3])) bench_measure(b, &down, run_down, x);
    if (many) {
        row permute = {.name = names[0], .shape = shape, .unit = "Mpairs/s", .per_call = rows / 1e6, .error = permute_error(x), .limit = 0.5};
        if (bench_wanted(b, names[0])) bench_measure(b, &permute, run_permute, x);
        double bytes = (TOP + 2.0) * (double)tokens * HIDDEN * 4;
        row combine = {.name = names[4], .shape = shape, .against = CEIL_READ, .work = bytes, .error = combine_error(b, x), .limit = 1e-4};
        if (bench_wanted(b, names[4])) bench_measure(b, &combine, run_combine, x);
        x->combine.basis = x->basis;
        x->combine.rank = 3;
        x->combine.strength = x->strength;
        row lens = {.name = names[5], .shape = "the same, rank-3 virtual edit", .against = CEIL_READ, .work = bytes, .error = combine_error(b, x), .limit = 1e-4};
        if (bench_wanted(b, names[5])) bench_measure(b, &lens, run_combine, x);
        x->glu.slot = x->slot;
        x->glu.mid_sum = x->mid_sum;
        row captured = glu;
        captured.name = names[2];
        if (bench_wanted(b, names[2])) bench_measure(b, &captured, run_glu, x);
    }
    experts_close(x);
}

/* ------------------------------------------------------------------------------------------------- lens, sample */

static void run_lens(bench *b, void *arg) { OP(b, lens, arg); }

static void lens_row(bench *b)
{
    int64_t T = b->quick ? 16384 : 65536, H = 1024;
    double worst = 0;
    if (!bench_wanted(b, "lens")) return;
    float *y = bench_alloc(b, (size_t)(T * H) * 4), *basis = bench_alloc(b, (size_t)(3 * H) * 4);
    unit_rows(basis, 3, H, 5);
    fill_f32(b, y, (size_t)(T * H), 1, 74);
    struct exc_lens_args a = {.y = y, .tokens = T, .hidden = H, .basis = basis, .rank = 3, .strength = 1};
    run_lens(b, &a);
    for (int64_t t = 0; t < T; t += 997) {
        double dot = 0;
        for (int64_t c = 0; c < H; c++) dot += (double)y[t * H + c] * (double)basis[H + c];
        worse(&worst, fabs(dot));
    }
    row r = {.name = "lens", .shape = b->quick ? "16384 x 1024 f32, rank 3" : "65536 x 1024 f32, rank 3", .against = CEIL_RMW, .work = 4.0 * (double)(T * H),
             .error = worst, .limit = 1e-5};
    bench_measure(b, &r, run_lens, &a);
    exc_release(y);
    exc_release(basis);
}

static void run_sample(bench *b, void *arg) { OP(b, sample, arg); }

static void sample_row(bench *b, const char *name, float temperature, float top_p)
{
    int64_t T = b->quick ? 64 : 256, V = 151936;
    double wrong = 0;
    if (!bench_wanted(b, name)) return;
    float *x = bench_alloc(b, (size_t)(T * V) * 4);
    double *u = bench_alloc(b, (size_t)T * 8);
    int32_t *token = bench_alloc(b, (size_t)T * 4);
    fill_f32(b, x, (size_t)(T * V), 2, 75);
    for (int64_t t = 0; t < T; t++) u[t] = 0; /* draws the most likely, so that one check serves both */
    struct exc_sample_args a = {.logits = x, .rows = T, .vocab = V, .temperature = temperature, .top_p = top_p, .random01 = u, .token = token};
    run_sample(b, &a);
    for (int64_t t = 0; t < T; t += 7) {
        float top = x[t * V];
        for (int64_t v = 1; v < V; v++) top = x[t * V + v] > top ? x[t * V + v] : top;
        /* a draw of 0 takes the first token of the kept set in the op's own order: any kept one is right */
        wrong += temperature == 0 ? x[t * V + token[t]] != top : x[t * V + token[t]] < top - 8;
    }
    char shape[64];
    snprintf(shape, sizeof shape, "%d x %d f32%s", (int)T, (int)V, temperature == 0 ? ", greedy" : ", top-p 0.9");
    row r = {.name = name, .shape = shape, .against = CEIL_READ, .work = 4.0 * (double)(T * V), .error = wrong, .limit = 0.5};
    bench_measure(b, &r, run_sample, &a);
    exc_release(x);
    exc_release(u);
    exc_release(token);
}

void flow_rows(bench *b)
{
    embed_row(b);
    norm_row(b);
    rope_row(b);
    attend_row(b, "attend_prefill", "16 sequences of 128, 16/2 heads of 128", 16, 128, 128, CEIL_BF16);
    attend_row(b, "attend_long", "2 sequences of 2048, 16/2 heads of 128", 2, 2048, 2048, CEIL_BF16);
    attend_row(b, "attend_decode", "64 queries, 2048 keys each", 64, 1, 2048, CEIL_READ);
    pack_row(b);
    matmul_row(b, "matmul", 2048, 2560, 1024, CEIL_BF16);
    matmul_row(b, "matmul_large", 2048, 4096, 4096, CEIL_BF16);
    matmul_row(b, "matmul_1", 1, 65536, 1024, CEIL_READ);
    matmul_row(b, "matmul_16", 16, 65536, 1024, CEIL_READ);
    matvec_row(b);
    expert_rows(b, b->quick ? 512 : 2048, true);
    expert_rows(b, 16, false);
    lens_row(b);
    sample_row(b, "sample_greedy", 0, 0);
    sample_row(b, "sample_top_p", 1, 0.9f);
}
