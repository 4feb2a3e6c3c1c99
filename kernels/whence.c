/* whence.c - where the outputs of experts lie that came home from the ranks that hold them.
 *
 * Every rank sends a row for each of a token's choices, whether or not the expert is its own, because how many are is known on
 * the device only; this says which rank's row counts. Experts are dealt out as exc_share deals them, in stretches whose bounds are
 * rounded down, so expert e belongs to the last rank whose first expert is not beyond e. */
#include "ops.h"

exc_status exc_cpu_whence(exc_queue *q, const struct exc_whence_args *a) {
    (void)q;
    if (a->pairs < 0 || a->experts < 1 || a->ranks < 1 || a->ranks > a->experts || a->pairs > INT32_MAX / a->ranks) return EXC_ERR_USAGE;
    for (int64_t r = 0; r < a->pairs; r++) {
        int64_t pair = a->pair_of[r], holder = ((a->ids[pair] + 1) * a->ranks - 1) / a->experts;
        a->index[r] = (int32_t)(holder * a->pairs + pair);
    }
    return EXC_OK;
}
