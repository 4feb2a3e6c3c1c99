/* lens.c - the virtual edit of a writer: y -= strength * B^T (B y) for rows of y [T,H] and orthonormal rows of B [R,H].
 *
 * All R coefficients of a row are taken from the unedited y, in 16 lanes that are added in a fixed order, and then subtracted in
 * ascending order of r. */
#include "lanes.h"

#define TASK_FLOPS (256 << 10)

EXC_INLINE void rows_body(const struct exc_lens_args *a, int64_t first, int64_t last, float *c) {
    int64_t H = a->hidden;
    for (int64_t t = first; t < last; t++) {
        float *y = a->y + t * H;
        for (int64_t r = 0; r < a->rank; r++) {
            const float *b = a->basis + r * H;
            float lane[LANES] = {0}, rest = 0;
            int64_t i = 0;
            for (; i + LANES <= H; i += LANES)
                for (int l = 0; l < LANES; l++) lane[l] += b[i + l] * y[i + l];
            for (; i < H; i++) rest += b[i] * y[i];
            c[r] = a->strength * (exc_lane_sum(lane) + rest);
        }
        for (int64_t r = 0; r < a->rank; r++) {
            const float *b = a->basis + r * H;
            for (int64_t i = 0; i < H; i++) y[i] -= c[r] * b[i];
        }
    }
}
EXC_DISPATCH(rows, (const struct exc_lens_args *a, int64_t first, int64_t last, float *c), (a, first, last, c))

typedef struct job {
    const struct exc_lens_args *a;
    int64_t per_task;
    void (*rows)(const struct exc_lens_args *a, int64_t first, int64_t last, float *c);
    exc_queue *q;
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t first = (int64_t)task * j->per_task;
    j->rows(j->a, first, exc_least(first + j->per_task, j->a->tokens), j->q->scratch[worker]);
}

exc_status exc_cpu_lens(exc_queue *q, const struct exc_lens_args *a) {
    if (a->tokens < 0 || a->hidden < 1 || a->rank < 0) return EXC_ERR_USAGE;
    if ((size_t)a->rank * sizeof(float) > q->scratch_bytes) return EXC_ERR_USAGE;
    job j = {.a = a, .rows = rows_for(), .q = q, .per_task = exc_rows_per_task(TASK_FLOPS, 4 * a->rank * a->hidden)};
    q->parallel(q, exc_task_count(a->tokens, j.per_task), run, &j);
    return EXC_OK;
}
