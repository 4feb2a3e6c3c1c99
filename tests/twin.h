/* twin.h - how a suite runs a .cu twin beside its CPU definition: the device context, arrays on it, the call.
 *
 * twin_up() copies an array to the device between guard bytes, twin_down() brings it back, twin_done() checks all guards and
 * frees all. TWIN_RUN(op, &args) runs the twin and waits for it; a twin that does not exist yet skips the test. The module is
 * the one that EXCISE_CUDA_MODULE names (a real GPU: libexcise_cuda.so), else the emulated one beside this program. Under
 * HC_SMALL=1 (ThreadSanitizer, where a barrier of 256 CUDA threads takes 0.1 ms) suites take small sizes, twin_small():
 * some ten thousand CUDA threads in all. */
#ifndef EXC_TEST_TWIN_H
#define EXC_TEST_TWIN_H

#include "helpers.h"
#include "module.h"

#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TWIN_GUARD 256
#define TWIN_MOST 256

static struct twin_state {
    exc_ctx *cpu, *gpu;
    struct twin_array {
        char *base;
        size_t bytes;
    } array[TWIN_MOST];
    int arrays;
} twin;

static inline int twin_small(void) { return getenv("HC_SMALL") && atoi(getenv("HC_SMALL")); }

/* the compute capability's first number: from 9 on edits go by clusters of blocks, 2048 CUDA threads each */
static inline int twin_major(void) {
    exc_device_info info;
    return twin.gpu->module->describe(twin.gpu->queue.device, &info) == EXC_OK ? info.major : 0;
}

/* group setup; teardown is twin_close */
static inline int twin_open(void **state) {
    test_emulated();
    twin.cpu = test_ctx(2);
    twin.gpu = calloc(1, sizeof *twin.gpu);
    exc_status st = exc_device_open(twin.gpu, 0);
    if (st != EXC_OK) fail_msg("device: %s", exc_ctx_error(twin.gpu));
    return 0;
}

static inline int twin_close(void **state) {
    exc_device_close(twin.gpu);
    free(twin.gpu);
    exc_ctx_free(twin.cpu);
    return 0;
}

static inline void twin_ok(exc_status st) {
    if (st != EXC_OK) fail_msg("%s: %s", exc_status_name(st), exc_ctx_error(twin.gpu));
}

/* the array starts `offset` bytes after an address aligned to 256 */
static inline void *twin_up_at(const void *host, size_t bytes, size_t offset) {
    if (!host) return NULL;
    void *base;
    size_t all = TWIN_GUARD + offset + bytes + TWIN_GUARD;
    char *image = malloc(all);
    memset(image, 0xa5, all);
    memcpy(image + TWIN_GUARD + offset, host, bytes);
    twin_ok(exc_device_alloc(twin.gpu, all, 1, "array", &base));
    twin_ok(exc_device_put(twin.gpu, base, image, all));
    free(image);
    assert_true(twin.arrays < TWIN_MOST);
    twin.array[twin.arrays++] = (struct twin_array){(char *)base, offset + bytes};
    return (char *)base + TWIN_GUARD + offset;
}
static inline void *twin_up(const void *host, size_t bytes) { return twin_up_at(host, bytes, 0); }

static inline void twin_down(void *host, const void *device, size_t bytes) {
    twin_ok(exc_device_get(twin.gpu, host, device, bytes));
}

static inline void twin_done(void) {
    for (int i = 0; i < twin.arrays; i++) {
        unsigned char guard[2][TWIN_GUARD];
        twin_down(guard[0], twin.array[i].base, TWIN_GUARD);
        twin_down(guard[1], twin.array[i].base + TWIN_GUARD + twin.array[i].bytes, TWIN_GUARD);
        for (int k = 0; k < TWIN_GUARD; k++)
            if (guard[0][k] != 0xa5 || guard[1][k] != 0xa5) fail_msg("array %d: its guard bytes were written", i);
        exc_device_release(twin.gpu, twin.array[i].base);
    }
    twin.arrays = 0;
}

/* n random numbers of deviation `scale`, malloc'ed: f32, and as an activation dtype */
static inline float *twin_normals(int64_t n, uint64_t seed, float scale) {
    float *x = malloc(((size_t)n + 1) * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = scale * test_normal(seed, (uint64_t)i);
    return x;
}
static inline void *twin_acts(int64_t n, uint64_t seed, float scale, int act) {
    float *x = twin_normals(n, seed, scale);
    uint16_t *h = malloc(((size_t)n + 1) * sizeof *h);
    for (int64_t i = 0; i < n; i++) h[i] = test_bf16(x[i]);
    free(act == EXC_F32 ? (void *)h : (void *)x);
    return act == EXC_F32 ? (void *)x : (void *)h;
}

/* enough scratch is measured first, as the host does */
#define TWIN_STATUS(op, args)                                                                                          \
    (!twin.gpu->ops->op                                                                                                \
         ? (skip(), EXC_OK)                                                                                            \
         : (twin.gpu->queue.measuring = 1, twin.gpu->queue.work_needed = 0, twin.gpu->ops->op(&twin.gpu->queue, args), \
            twin.gpu->queue.measuring = 0, twin_ok(exc_device_reserve(twin.gpu, twin.gpu->queue.work_needed)),         \
            twin.gpu->ops->op(&twin.gpu->queue, args)))
#define TWIN_RUN(op, args)                                                                                             \
    do {                                                                                                               \
        twin_ok(exc_device_failed(twin.gpu, TWIN_STATUS(op, args), #op));                                              \
        twin_ok(exc_device_sync(twin.gpu));                                                                            \
    } while (0)

/* n floats or 16-bit numbers: equal up to `ulps` of the larger, NaN equal to NaN */
static inline void twin_close_f32(const float *got, const float *want, size_t n, double relative, double absolute, const char *what) {
    for (size_t i = 0; i < n; i++) {
        double g = (double)got[i], w = (double)want[i], d = g > w ? g - w : w - g;
        if ((g != g && w != w) || g == w) continue;
        if (!(d <= absolute + relative * (w < 0 ? -w : w))) fail_msg("%s: [%zu] = %.9g, want %.9g", what, i, g, w);
    }
}
/* bf16 arrays: at most `ulps` apart, and at most one in `share` elements apart at all */
static inline void twin_close_bf16(const uint16_t *got, const uint16_t *want, size_t n, int ulps, size_t share, const char *what) {
    size_t off = 0;
    for (size_t i = 0; i < n; i++) {
        int g = got[i] & 0x8000 ? -(got[i] & 0x7fff) : got[i], w = want[i] & 0x8000 ? -(want[i] & 0x7fff) : want[i];
        if (test_from_bf16(got[i]) != test_from_bf16(got[i]) && test_from_bf16(want[i]) != test_from_bf16(want[i])) continue;
        off += g != w;
        if (abs(g - w) > ulps) fail_msg("%s: [%zu] = %.9g, want %.9g", what, i, (double)test_from_bf16(got[i]), (double)test_from_bf16(want[i]));
    }
    if (off > n / share + 1) fail_msg("%s: %zu of %zu elements differ", what, off, n);
}

#endif
