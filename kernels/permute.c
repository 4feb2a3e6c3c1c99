/* permute.c - groups (token, choice) pairs by expert: ids i32 [T,K] -> offset i64 [E+1], row_of and pair_of i32 [T*K].
 *
 * A counting sort, stable, so rows of an expert keep token order and per-expert sums have one order of addition.
 * It runs on the calling thread: 16,384 pairs take some 30 us beside milliseconds of expert arithmetic. The
 * cursors of the second pass live in `offset` itself: after it offset[e] has moved to the end of e's rows, which is
 * where e+1 begins, so one shift restores the table. */
#include <string.h>

#include "ops.h"

exc_status exc_cpu_permute(exc_queue *q, const struct exc_permute_args *a) {
    (void)q;
    int64_t pairs = a->tokens * a->top_k, E = a->experts, *offset = a->offset;
    if (a->tokens < 0 || a->top_k < 1 || E < 1 || pairs > INT32_MAX) return EXC_ERR_USAGE;
    memset(offset, 0, (size_t)(E + 1) * sizeof *offset);
    for (int64_t p = 0; p < pairs; p++) {
        if (a->ids[p] < -1 || a->ids[p] >= E) return EXC_ERR_USAGE;
        if (a->ids[p] >= 0) offset[a->ids[p] + 1]++;
    }
    for (int64_t e = 0; e < E; e++) offset[e + 1] += offset[e];
    for (int64_t p = 0; p < pairs; p++) {
        int32_t e = a->ids[p];
        if (e < 0) {
            a->row_of[p] = -1;
            continue;
        }
        a->row_of[p] = (int32_t)offset[e];
        a->pair_of[offset[e]++] = (int32_t)p;
    }
    memmove(offset + 1, offset, (size_t)E * sizeof *offset);
    offset[0] = 0;
    return EXC_OK;
}
