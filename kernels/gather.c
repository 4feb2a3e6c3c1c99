/* gather.c - rows brought together: y [rows] = row index[r] / share of x, bit for bit, `width` bytes each.
 *
 * A row is one memcpy. Ranks send each other rows in the order of the experts that they chose: `share` choices a token. */
#include <string.h>

#include "ops.h"

#define TASK_BYTES (128 << 10)

typedef struct job {
    const struct exc_gather_args *a;
    int64_t per_task;
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_gather_args *a = j->a;
    int64_t first = (int64_t)task * j->per_task, end = first + j->per_task < a->rows ? first + j->per_task : a->rows;
    (void)worker;
    for (int64_t r = first; r < end; r++)
        memcpy((uint8_t *)a->y + (size_t)r * a->width, (const uint8_t *)a->x + (size_t)(a->index[r] / a->share) * a->width, a->width);
}

exc_status exc_cpu_gather(exc_queue *q, const struct exc_gather_args *a) {
    if (a->rows < 0 || a->share < 1 || a->width % 2) return EXC_ERR_USAGE;
    if (!a->rows || !a->width) return EXC_OK;
    job j = {a, TASK_BYTES / (int64_t)a->width + 1};
    q->parallel(q, (size_t)((a->rows + j.per_task - 1) / j.per_task), run, &j);
    return EXC_OK;
}
