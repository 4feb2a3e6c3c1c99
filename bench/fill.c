/* fill.c - memory and numbers for the rows. Numbers are counter-based, so every run works on the same bits; blocks come from the
 * library's allocator (64-byte aligned, huge pages when large) and are touched here, so that no row pays for first touch. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

#define BLOCK ((size_t)1 << 16) /* elements a task */

void *bench_alloc(bench *b, size_t bytes)
{
    void *p = exc_alloc(b->ctx, bytes ? bytes : 1, 1, "bench buffer");
    if (!p) {
        fprintf(stderr, "excise_bench: %s\n", exc_ctx_error(b->ctx));
        exit(1);
    }
    return p;
}

uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t x)
{
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

typedef struct fill {
    float *f32;
    uint16_t *bf16;
    size_t n;
    float step; /* of one count of a 16-bit integer */
    uint64_t seed;
} fill;

/* four 16-bit uniform numbers from each 64-bit state of a Weyl sequence through a finaliser */
static void block(void *arg, size_t task, int worker)
{
    const fill *f = arg;
    size_t first = task * BLOCK, last = first + BLOCK < f->n ? first + BLOCK : f->n;
    for (size_t i = first; i < last; i += 4) {
        uint64_t x = (f->seed + 1) * 0x9e3779b97f4a7c15ull + i * 0xd1342543de82ef95ull;
        x ^= x >> 32;
        x *= 0xbf58476d1ce4e5b9ull;
        x ^= x >> 29;
        x *= 0x94d049bb133111ebull;
        x ^= x >> 32;
        for (size_t j = i; j < i + 4 && j < last; j++, x >>= 16) {
            float v = ((float)(int16_t)(uint16_t)x + 0.5f) * f->step;
            if (f->f32) f->f32[j] = v;
            else f->bf16[j] = to_bf16(v);
        }
    }
}

static void run(bench *b, fill f)
{
    exc_queue *q = &b->ctx->queue;
    q->parallel(q, (f.n + BLOCK - 1) / BLOCK, block, &f);
}

void fill_f32(bench *b, float *p, size_t n, float scale, uint64_t seed)
{
    run(b, (fill){.f32 = p, .n = n, .step = scale * 1.7320508f / 32768, .seed = seed});
}

void fill_bf16(bench *b, uint16_t *p, size_t n, float scale, uint64_t seed)
{
    run(b, (fill){.bf16 = p, .n = n, .step = scale * 1.7320508f / 32768, .seed = seed});
}

void unit_rows(float *r, int64_t rank, int64_t width, uint64_t seed)
{
    double *v = malloc((size_t)(rank * width) * sizeof *v);
    for (int64_t i = 0; i < rank; i++) {
        double *x = v + i * width;
        for (int64_t c = 0; c < width; c++) x[c] = exc_random_unit(seed, (uint64_t)i, (uint64_t)c) - 0.5;
        for (int pass = 0; pass < 2; pass++)
            for (int64_t j = 0; j < i; j++) {
                double dot = 0;
                for (int64_t c = 0; c < width; c++) dot += x[c] * v[j * width + c];
                for (int64_t c = 0; c < width; c++) x[c] -= dot * v[j * width + c];
            }
        double norm = 0;
        for (int64_t c = 0; c < width; c++) norm += x[c] * x[c];
        for (int64_t c = 0; c < width; c++) x[c] /= sqrt(norm);
    }
    for (int64_t i = 0; i < rank * width; i++) r[i] = (float)v[i];
    free(v);
}

exc_packed pack_random(bench *b, int64_t n, int64_t k, float scale, uint64_t seed, uint16_t **plain)
{
    uint16_t *w = bench_alloc(b, (size_t)(n * k) * 2);
    void *out = bench_alloc(b, exc_packed_bytes(n, k, EXC_BF16));
    fill_bf16(b, w, (size_t)(n * k), scale, seed);
    struct exc_pack_args a = {.w = w, .w_dtype = EXC_BF16, .n = n, .k = k, .to = EXC_BF16, .out = out};
    bench_must(b, b->ctx->ops->pack(&b->ctx->queue, &a), "pack");
    if (plain) *plain = w;
    else exc_release(w);
    return (exc_packed){out, n, k, EXC_BF16};
}
