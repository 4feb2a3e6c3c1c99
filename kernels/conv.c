/* conv.c - short causal convolution of every channel along its sequence, then silu, for a ragged batch.
 *
 * x f32 [T, channels], a sequence's rows one after the other; what a row needs from before this call lies in the state of
 * the sequence's slot, a ring of the last taps - 1 inputs [taps-1, channels] (the input of position p in row p mod
 * (taps-1)). A task is a stretch of rows of the batch, read and written in whole rows: blocks of channels would jump from page
 * to page. Rings are brought up to date when all rows are done. An output is one chain over ascending taps, with zeros from
 * before the sequence, whether its inputs come from the ring or from the batch, so a sequence may be cut into calls anywhere. */
#include <string.h>

#include "lanes.h"

#define MOST_TAPS 64
#define TASK_ROWS 64
#define ROWS 4 /* made at once: an input is still near when the next rows want it again */

typedef struct job {
    const struct exc_conv_args *a;
    void (*stretch)(const struct exc_conv_args *a, int64_t first, int64_t end);
} job;

/* the input of a position of sequence s, of which this call brings rows from `before` on; NULL: before the sequence */
EXC_INLINE const float *input(const struct exc_conv_args *a, int64_t s, int64_t before, int64_t position) {
    if (position < 0) return NULL;
    if (position >= before) return a->x + (a->begin[s] + position - before) * a->x_stride;
    return a->state + a->slot[s] * a->state_stride + position % (a->taps - 1) * a->channels;
}

/* `rows` outputs from inputs x[0 .. rows+taps-2] */
EXC_INLINE void outputs(const struct exc_conv_args *a, const float *const *x, int rows, float *y) {
    static const exc_floats none;
    int64_t i = 0, n = a->channels, taps = a->taps;
    for (; i + LANES <= n; i += LANES) {
        exc_floats total[ROWS] = {{0}}; /* compilers take loops over arrays of floats apart into single ones */
        for (int64_t j = 0; j < taps; j++)
            for (int r = 0; r < rows; r++)
                total[r] += *(const exc_floats *)(a->weight + j * n + i) * (x[r + j] ? *(const exc_floats *)(x[r + j] + i) : none);
        for (int r = 0; r < rows; r++) {
            float sum[LANES];
            memcpy(sum, &total[r], sizeof sum);
            for (int l = 0; l < LANES; l++) y[r * a->y_stride + i + l] = sum[l] * exc_sigmoid(sum[l]);
        }
    }
    for (; i < n; i++)
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (int64_t j = 0; j < taps; j++) sum += a->weight[j * n + i] * (x[r + j] ? x[r + j][i] : 0.0f);
            y[r * a->y_stride + i] = sum * exc_sigmoid(sum);
        }
}

/* rows first .. end-1 of the batch, of one sequence or several */
EXC_INLINE void stretch_body(const struct exc_conv_args *a, int64_t first, int64_t end) {
    const float *x[ROWS + MOST_TAPS];
    int64_t s = 0;
    for (int64_t row = first, n; row < end; row += n) {
        while (row >= a->begin[s + 1]) s++;
        int64_t before = a->length[s] - (a->begin[s + 1] - a->begin[s]), last = exc_least(end, a->begin[s + 1]);
        n = last - row >= ROWS ? ROWS : 1;
        for (int64_t k = 0; k < n + a->taps - 1; k++) x[k] = input(a, s, before, before + row - a->begin[s] - (a->taps - 1) + k);
        if (n == ROWS) outputs(a, x, ROWS, a->y + row * a->y_stride);
        else outputs(a, x, 1, a->y + row * a->y_stride);
    }
}
EXC_DISPATCH(stretch, (const struct exc_conv_args *a, int64_t first, int64_t end), (a, first, end))

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t first = j->a->begin[0] + (int64_t)task * TASK_ROWS;
    (void)worker;
    j->stretch(j->a, first, exc_least(first + TASK_ROWS, j->a->begin[j->a->sequences]));
}

/* the last inputs of a sequence */
static void keep(void *arg, size_t task, int worker) {
    const struct exc_conv_args *a = ((const job *)arg)->a;
    int64_t s = (int64_t)task, rows = a->begin[s + 1] - a->begin[s], end = a->length[s];
    float *ring = a->state + a->slot[s] * a->state_stride;
    (void)worker;
    for (int64_t p = end - exc_least(a->taps - 1, rows); p < end; p++)
        memcpy(ring + p % (a->taps - 1) * a->channels, input(a, s, end - rows, p), (size_t)a->channels * sizeof *ring);
}

exc_status exc_cpu_conv(exc_queue *q, const struct exc_conv_args *a) {
    if (a->sequences < 0 || a->channels < 1 || a->taps < 1 || a->taps > MOST_TAPS) return EXC_ERR_USAGE;
    if (!a->sequences) return EXC_OK;
    job j = {.a = a, .stretch = stretch_for()};
    q->parallel(q, exc_task_count(a->begin[a->sequences] - a->begin[0], TASK_ROWS), run, &j);
    q->parallel(q, (size_t)a->sequences, keep, &j);
    return EXC_OK;
}
