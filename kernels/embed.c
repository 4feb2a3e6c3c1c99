/* embed.c - out [T,H] f32 = rows of the embedding table, widened exactly from bf16, f16 or f32. */
#include "lanes.h"

#define TASK_FLOATS (64 << 10)

EXC_INLINE void row_body(const void *from, int dtype, int64_t n, float *to) { exc_load_row(from, dtype, n, to); }
EXC_DISPATCH(row, (const void *from, int dtype, int64_t n, float *to), (from, dtype, n, to))

typedef struct job {
    const struct exc_embed_args *a;
    int64_t per_task;
    size_t row_bytes;
    void (*row)(const void *from, int dtype, int64_t n, float *to);
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_embed_args *a = j->a;
    (void)worker;
    int64_t first = (int64_t)task * j->per_task, last = exc_least(first + j->per_task, a->tokens);
    for (int64_t t = first; t < last; t++)
        j->row((const uint8_t *)a->table + (size_t)a->ids[t] * j->row_bytes, a->table_dtype, a->hidden,
               a->out + t * a->hidden);
}

exc_status exc_cpu_embed(exc_queue *q, const struct exc_embed_args *a) {
    if (a->tokens < 0 || a->hidden < 1) return EXC_ERR_USAGE;
    if (a->table_dtype != EXC_F32 && a->table_dtype != EXC_BF16 && a->table_dtype != EXC_F16) return EXC_ERR_USAGE;
    job j = {.a = a, .row = row_for(), .per_task = exc_rows_per_task(TASK_FLOATS, a->hidden)};
    j.row_bytes = (size_t)a->hidden * (a->table_dtype == EXC_F32 ? 4 : 2);
    q->parallel(q, exc_task_count(a->tokens, j.per_task), run, &j);
    return EXC_OK;
}
