/* limits.c - what this GPU does at best, in this run: bytes copied by the driver and by a kernel, bytes only read and only
 * written, and a large bf16 matmul by cuBLASLt.
 *
 * `of_copy` of all rows is taken of the faster of the two copies, `of_peak` of the matmul. These rows are always measured. */
#include <stdlib.h>

#include "gauge.h"

typedef struct copying {
    char *src, *dst;
    size_t bytes;
} copying;

static exc_status copy_once(gauge *g, const void *arg) {
    const copying *c = arg;
    return g->ctx->queue.measuring ? EXC_OK : exc_device_copy(g->ctx, c->dst, c->src, c->bytes);
}

static void keep_best(double *best, double rate) {
    if (rate > *best) *best = rate;
}

static void copies(gauge *g) {
    enum { ROW_BYTES = 1 << 16 };
    size_t most = g->info.free / 8 / ROW_BYTES * ROW_BYTES, bytes = (size_t)2 << 30;
    if (g->quick)
        bytes = (size_t)1 << 18;
    else if (bytes > most)
        bytes = most;
    int64_t rows = (int64_t)(bytes / ROW_BYTES);
    char size[32];
    copying c = {gauge_numbers(g, (int64_t)(bytes / 2), EXC_BF16, 1), gauge_room(g, bytes), bytes};
    int32_t *order = malloc((size_t)rows * sizeof *order);
    for (int64_t i = 0; order && i < rows; i++) order[i] = (int32_t)i;
    struct exc_gather_args kernel = {.x = c.src,
                                     .index = gauge_up(g, order, (size_t)rows * sizeof *order),
                                     .share = 1,
                                     .rows = rows,
                                     .width = ROW_BYTES,
                                     .y = c.dst};
    struct exc_convert_args read = {.src = c.src,
                                    .src_dtype = EXC_BF16,
                                    .dst_dtype = EXC_BF16,
                                    .n = (int64_t)(bytes / 2),
                                    .nonfinite = gauge_room(g, 8)};
    struct exc_noise_args write = {.dst = c.dst, .n = (int64_t)(bytes / 4), .dtype = EXC_F32, .deviation = 1};
    row by_driver = {.name = "copy", .by = "driver", .bytes = 2 * (double)bytes},
        by_kernel = {.name = "copy", .bytes = 2 * (double)bytes};
    row reading = {.name = "read", .bytes = (double)bytes, .note = "bytes only read"},
        writing = {.name = "write", .bytes = (double)bytes, .note = "random numbers, only written"};
    row *all[] = {&by_driver, &by_kernel, &reading, &writing};
    free(order);
    exc_memory_text(bytes, size);
    for (size_t i = 0; i < EXC_COUNT(all); i++) snprintf(all[i]->shape, sizeof all[i]->shape, "%s", size);
    gauge_row(g, &by_driver, copy_once, &c, 0, 1);
    gauge_row(g, &by_kernel, gauge_ops.gather, &kernel, 0, 1);
    keep_best(&g->copy, by_driver.bytes / by_driver.seconds);
    keep_best(&g->copy, by_kernel.bytes / by_kernel.seconds);
    gauge_row(g, &reading, gauge_ops.convert, &read, 0, 1);
    gauge_row(g, &writing, gauge_ops.noise, &write, 0, 1);
    gauge_clear(g);
}

static exc_status product_once(gauge *g, const void *arg) {
    return g->ctx->module->library_product(&g->ctx->queue, arg);
}

static void peak(gauge *g) {
    int64_t n = g->quick ? 64 : 8192;
    exc_library_product p = {
        .m = n, .n = n, .k = n, .lda = n, .ldb = n, .ldd = n, .turn_a = 1, .batch = 1, .narrow = 1};
    row r = {.name = "peak", .by = "cuBLASLt", .flop = 2.0 * (double)n * (double)n * (double)n};
    snprintf(r.shape, sizeof r.shape, "%lld x %lld x %lld bf16", (long long)n, (long long)n, (long long)n);
    g->ctx->queue.measuring = 1;
    exc_status st = product_once(g, &p);
    g->ctx->queue.measuring = 0;
    if (st == EXC_ERR_INPUT) {
        gauge_skip(g, &r, "cuBLASLt is not at hand: no share of the peak is told");
        return;
    }
    p.a = gauge_numbers(g, n * n, EXC_BF16, 1);
    p.b = gauge_numbers(g, n * n, EXC_BF16, 1);
    p.d = gauge_room(g, (size_t)(n * n) * 2);
    gauge_row(g, &r, product_once, &p, 0, 1);
    g->peak = r.flop / r.seconds;
    gauge_clear(g);
}

void limit_rows(gauge *g) {
    int only = g->n_only;
    g->n_only = 0;
    copies(g);
    peak(g);
    g->n_only = only;
}
