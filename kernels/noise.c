/* noise.c - dst [n]: uniform random numbers of mean 0 and a given deviation, each a function of its place in a stream.
 *
 * No number needs the one before it, so that any cut into calls, tasks or threads gives the same array, on every backend. */
#include "grid.h"
#include "lanes.h"

#define TASK_ELEMENTS (64 << 10)

EXC_INLINE void fill_body(void *dst, int dtype, int64_t n, uint64_t first, uint32_t key, float width) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t at = first + (uint64_t)i;
        float x = width * ((float)(exc_philox(key, (uint32_t)(at >> 32), (uint32_t)at) >> 8) * 0x1p-24f - 0.5f);
        if (dtype == EXC_F32) ((float *)dst)[i] = x;
        else ((uint16_t *)dst)[i] = (uint16_t)exc_round_bf16(x);
    }
}
EXC_DISPATCH(fill, (void *dst, int dtype, int64_t n, uint64_t first, uint32_t key, float width), (dst, dtype, n, first, key, width))

typedef struct job {
    const struct exc_noise_args *a;
    uint32_t key;
    float width;
    void (*fill)(void *dst, int dtype, int64_t n, uint64_t first, uint32_t key, float width);
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_noise_args *a = j->a;
    int64_t first = (int64_t)task * TASK_ELEMENTS, n = a->n - first < TASK_ELEMENTS ? a->n - first : TASK_ELEMENTS;
    (void)worker;
    j->fill((uint8_t *)a->dst + (size_t)first * (a->dtype == EXC_F32 ? 4 : 2), a->dtype, n, (uint64_t)(a->first + first), j->key, j->width);
}

exc_status exc_cpu_noise(exc_queue *q, const struct exc_noise_args *a) {
    if (a->n < 0 || a->first < 0 || (a->dtype != EXC_BF16 && a->dtype != EXC_F32)) return EXC_ERR_USAGE;
    job j = {a, exc_philox_key(a->seed, a->stream), a->deviation * 3.4641016f, fill_for()};
    q->parallel(q, (size_t)((a->n + TASK_ELEMENTS - 1) / TASK_ELEMENTS), run, &j);
    return EXC_OK;
}
