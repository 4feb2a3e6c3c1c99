/* view.c - a matrix copied between two layouts: dense, transposed, or with others in between.
 *
 * Where both sides run along the row a row is one memcpy; else squares of 32 x 32 elements are copied, so that the lines
 * which one side reads across stay in the first-level cache until the other side has used them whole. */
#include <string.h>

#include "tile.h"

#define SQUARE 32
#define TASK_BYTES (128 << 10)

typedef struct job {
    const struct exc_view_args *a;
    int64_t per_task;
} job;

EXC_INLINE void copy_one(const struct exc_view_args *a, int64_t r, int64_t c, size_t unit) {
    size_t from = (size_t)(r * a->src_row + c * a->src_column) * unit, to = (size_t)(r * a->dst_row + c * a->dst_column) * unit;
    memcpy((uint8_t *)a->dst + to, (const uint8_t *)a->src + from, unit);
}

EXC_INLINE void copy_square(const struct exc_view_args *a, int64_t first, int64_t last, int64_t column, size_t unit) {
    int64_t end = column + SQUARE < a->columns ? column + SQUARE : a->columns;
    for (int64_t r = first; r < last; r++)
        for (int64_t c = column; c < end; c++) copy_one(a, r, c, unit);
}

static void copy_rows(const struct exc_view_args *a, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++)
        memcpy((uint8_t *)a->dst + (size_t)(r * a->dst_row) * a->unit, (const uint8_t *)a->src + (size_t)(r * a->src_row) * a->unit,
               (size_t)a->columns * a->unit);
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_view_args *a = j->a;
    int64_t first = (int64_t)task * j->per_task, last = first + j->per_task < a->rows ? first + j->per_task : a->rows;
    (void)worker;
    if (a->src_column == 1 && a->dst_column == 1) {
        copy_rows(a, first, last);
        return;
    }
    for (; first < last; first += SQUARE) {
        int64_t end = first + SQUARE < last ? first + SQUARE : last;
        for (int64_t c = 0; c < a->columns; c += SQUARE) {
            if (a->unit == 2) copy_square(a, first, end, c, 2);
            else if (a->unit == 4) copy_square(a, first, end, c, 4);
            else copy_square(a, first, end, c, 1);
        }
    }
}

exc_status exc_cpu_view(exc_queue *q, const struct exc_view_args *a) {
    if (a->rows < 0 || a->columns < 0 || (a->unit != 1 && a->unit != 2 && a->unit != 4)) return EXC_ERR_USAGE;
    if (!a->rows || !a->columns) return EXC_OK;
    job j = {a, TASK_BYTES / (a->columns * (int64_t)a->unit) / SQUARE * SQUARE};
    if (j.per_task < SQUARE) j.per_task = SQUARE;
    q->parallel(q, (size_t)((a->rows + j.per_task - 1) / j.per_task), run, &j);
    return EXC_OK;
}
