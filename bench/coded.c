/* coded.c - rows of quantised weights: e4m3 with a scale for every 128 x 128 block and fp4 with one for every 32 inputs, read by the
 * matmul as they are stored, and edited in place.
 *
 * Floors. One row: the quantised bytes, codes and scales, read once from memory; 16 rows and more: the multiply-adds at the rate of
 * a bf16 matmul, since codes are decoded on the way. Edits: codes read once and written once; exact rounding works on each
 * strip some fifteen times, so its row is arithmetic and tells how much. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "bench.h"

#define OP(b, op, args) bench_must(b, (b)->ctx->ops->op(&(b)->ctx->queue, args), #op)

typedef struct coded {
    int dtype;
    int64_t n, k;
    size_t bytes, scale_bytes;
    uint8_t *code, *scale;
} coded;

/* random codes without NaN; scales near 2^-7 */
static coded make(bench *b, int dtype, int64_t n, int64_t k)
{
    bool f4 = dtype == EXC_F4;
    coded c = {.dtype = dtype, .n = n, .k = k, .bytes = (size_t)(n * k) / (f4 ? 2 : 1), .scale_bytes = (size_t)(f4 ? n * k / 32 : n / 128 * (k / 128) * 4)};
    c.code = bench_alloc(b, c.bytes);
    c.scale = bench_alloc(b, c.scale_bytes);
    for (size_t i = 0; i < c.bytes; i += 8) {
        uint64_t u = exc_random_u64(7, 1, i);
        if (!f4) u = (u & 0x8787878787878787ull) | 0x2020202020202020ull | (u >> 3 & 0x1010101010101010ull); /* middling exponents */
        memcpy(c.code + i, &u, 8);
    }
    for (size_t i = 0; f4 && i < c.scale_bytes; i++) c.scale[i] = (uint8_t)(119 + i % 3);
    for (size_t i = 0; !f4 && i < c.scale_bytes / 4; i++) ((float *)(void *)c.scale)[i] = 0.006f + 0.0001f * (float)(i % 32);
    return c;
}

static double at(const coded *c, int64_t o, int64_t i)
{
    static const double size[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    if (c->dtype == EXC_F4) {
        int v = c->code[(o * c->k + i) / 2] >> (i % 2 ? 4 : 0) & 15;
        return (v & 8 ? -size[v & 7] : size[v & 7]) * ldexp(1, c->scale[o * (c->k / 32) + i / 32] - 127);
    }
    int v = c->code[o * c->k + i], e = v >> 3 & 15;
    double x = e ? ldexp(8 + (v & 7), e - 10) : ldexp(v & 7, -9);
    return (v & 0x80 ? -x : x) * (double)((float *)(void *)c->scale)[o / 128 * (c->k / 128) + i / 128];
}

static const char *name_of(int dtype) { return dtype == EXC_F4 ? "fp4" : "fp8"; }

static void run_matmul(bench *b, void *arg) { OP(b, matmul, arg); }

static void matmul_row(bench *b, int dtype, int64_t rows, int64_t n, int64_t k, ceiling against)
{
    char name[32], shape[64];
    snprintf(name, sizeof name, rows > 16 ? "matmul_%s" : "matmul_%s_%d", name_of(dtype), (int)rows);
    if (!bench_wanted(b, name)) return;
    coded c = make(b, dtype, n, k);
    uint16_t *x = bench_alloc(b, (size_t)(rows * k) * 2);
    float *y = bench_alloc(b, (size_t)(rows * n) * 4);
    void *packed = bench_alloc(b, exc_packed_bytes(n, k, dtype));
    fill_bf16(b, x, (size_t)(rows * k), 1, 70);
    OP(b, pack, (&(struct exc_pack_args){.w = c.code, .w_dtype = dtype, .n = n, .k = k, .to = dtype, .out = packed, .scale = c.scale,
                                        .scale_dtype = dtype == EXC_F4 ? EXC_F8_E8M0 : EXC_F32}));
    exc_packed p = {packed, n, k, dtype};
    struct exc_matmul_args a = {.x = x, .x_stride = k, .act = EXC_BF16, .w = &p, .y = y, .y_stride = n, .rows = rows};
    run_matmul(b, &a);
    double error = 0;
    for (int64_t t = 0; t < rows; t += 1 + rows / 16)
        for (int64_t o = t % 7; o < n; o += 1 + n / 32) {
            double want = 0, size = 0;
            for (int64_t i = 0; i < k; i++) {
                double z = (double)from_bf16(x[t * k + i]) * at(&c, o, i);
                want += z;
                size += fabs(z);
            }
            double off = fabs((double)y[t * n + o] - want) / size;
            if (!(off <= error)) error = off;
        }
    snprintf(shape, sizeof shape, "%d x %d -> %d %s", (int)rows, (int)k, (int)n, name_of(dtype));
    row r = {.name = name, .shape = shape, .against = against, .error = error, .limit = 1e-5,
             .work = against == CEIL_READ ? (double)(c.bytes + c.scale_bytes) : 2.0 * (double)rows * (double)(n * k)};
    bench_measure(b, &r, run_matmul, &a);
    exc_release(x);
    exc_release(y);
    exc_release(packed);
    exc_release(c.code);
    exc_release(c.scale);
}

typedef struct edit {
    struct exc_project_args a;
    const void *src[64], *scale[64];
    void *dst[64], *scale_to[64];
    float strength[64];
} edit;

static void run_edit(bench *b, void *arg) { OP(b, project, &((edit *)arg)->a); }

/* `count` matrices of [2048, 768], out of place so that every call finds the same work; the check: what is left of R */
static void edit_row(bench *b, int dtype, int rounding, double most_left)
{
    static const char *const rules[] = {"rn", "sr", "exact"};
    int64_t H = 2048, I = 768, count = b->quick ? 4 : 16;
    char name[32], shape[64];
    snprintf(name, sizeof name, "project_%s_%s", name_of(dtype), rules[rounding]);
    if (!bench_wanted(b, name)) return;
    coded c = make(b, dtype, count * H, I);
    uint8_t *code = bench_alloc(b, c.bytes), *scale = bench_alloc(b, c.scale_bytes);
    float *basis = bench_alloc(b, (size_t)H * 4);
    unit_rows(basis, 1, H, 3);
    double before[64], after[64], left = 0, whole = 0;
    static edit e;
    e.a = (struct exc_project_args){.src = e.src, .dst = e.dst, .dtype = dtype, .count = count, .rows = H, .cols = I, .side = EXC_SIDE_OUT,
                                    .basis = basis, .rank = 1, .strength = e.strength, .before = before, .after = after, .rounding = rounding,
                                    .scale = e.scale, .scale_to = e.scale_to, .scale_dtype = dtype == EXC_F4 ? EXC_F8_E8M0 : EXC_F32};
    for (int64_t i = 0; i < count; i++) {
        e.src[i] = c.code + (size_t)i * (c.bytes / (size_t)count);
        e.dst[i] = code + (size_t)i * (c.bytes / (size_t)count);
        e.scale[i] = c.scale + (size_t)i * (c.scale_bytes / (size_t)count);
        e.scale_to[i] = scale + (size_t)i * (c.scale_bytes / (size_t)count);
        e.strength[i] = 1;
    }
    run_edit(b, &e);
    for (int64_t i = 0; i < count; i++) whole += before[i], left += after[i];
    snprintf(shape, sizeof shape, "%d x [2048, 768] %s, rank 1", (int)count, name_of(dtype));
    row r = {.name = name, .shape = shape, .against = CEIL_COPY, .work = 2.0 * (double)(c.bytes + c.scale_bytes), .error = sqrt(left / whole),
             .limit = most_left, .note = "error is the share of R W that is left"};
    bench_measure(b, &r, run_edit, &e);
    exc_release(c.code);
    exc_release(c.scale);
    exc_release(code);
    exc_release(scale);
    exc_release(basis);
}

void coded_rows(bench *b)
{
    for (int i = 0; i < 2; i++) {
        int dtype = i ? EXC_F4 : EXC_F8_E4M3;
        matmul_row(b, dtype, 1, b->quick ? 16384 : 65536, 2048, CEIL_READ);
        matmul_row(b, dtype, 16, b->quick ? 16384 : 65536, 2048, CEIL_BF16); /* 32 and 60 FLOP a byte read: arithmetic */
        matmul_row(b, dtype, b->quick ? 512 : 2048, 2560, 1024, CEIL_BF16);
    }
    edit_row(b, EXC_F8_E4M3, EXC_ROUND_RN, 0.7);
    edit_row(b, EXC_F8_E4M3, EXC_ROUND_SR, 0.1);
    edit_row(b, EXC_F8_E4M3, EXC_ROUND_EXACT, 0.01);
    edit_row(b, EXC_F4, EXC_ROUND_RN, 1.0);
    edit_row(b, EXC_F4, EXC_ROUND_EXACT, 0.02);
}
