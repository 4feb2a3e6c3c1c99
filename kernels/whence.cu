/* whence.cu - where the outputs of experts lie that came home from the ranks that hold them; the twin of whence.c.
 *
 * A thread a row: a few hundred of them in a step of decode. */
#include "cuda.cuh"

#define THREADS 256

__global__ static void whence_rows(const int32_t *ids, const int32_t *pair_of, int64_t pairs, int64_t experts, int64_t ranks,
                                   int32_t *index) {
    const int64_t r = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (r >= pairs) return;
    const int64_t pair = pair_of[r], holder = ((ids[pair] + 1) * ranks - 1) / experts;
    index[r] = (int32_t)(holder * pairs + pair);
}

extern "C" exc_status exc_cuda_whence(exc_queue *q, const struct exc_whence_args *a) {
    if (a->pairs < 0 || a->experts < 1 || a->ranks < 1 || a->ranks > a->experts || a->pairs > INT32_MAX / a->ranks) return EXC_ERR_USAGE;
    if (!a->pairs) return EXC_OK;
    ENQUEUE(q, whence_rows, (unsigned)ceil_div(a->pairs, THREADS), THREADS, 0, a->ids, a->pair_of, a->pairs, a->experts, a->ranks, a->index);
    return EXC_OK;
}
