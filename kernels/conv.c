/* conv.c - short causal convolution of every channel along its sequence, then silu, for a ragged batch.
 *
 * x f32 [T, channels], a sequence's rows one after the other; what a row needs from before this call lies in the state of
 * the sequence's slot, a ring of the last taps - 1 inputs [taps-1, channels] (the input of position p in row p mod
 * (taps-1)). A unit of work is a block of channels of one sequence. An output is one chain over ascending taps whether its
 * inputs come from the ring or from the batch, so a sequence may be cut into calls anywhere. */
#include <string.h>

#include "lanes.h"

#define BLOCK 512 /* channels of a unit */
#define MOST_TAPS 64

typedef struct unit {
    int64_t row, rows; /* of the batch */
    int64_t before;    /* inputs of the sequence that earlier calls saw */
    int64_t channel, channels;
    float *ring;
} unit;

/* the input of a position, channels of the unit */
EXC_INLINE const float *input(const struct exc_conv_args *a, const unit *u, int64_t position) {
    if (position >= u->before) return a->x + (u->row + position - u->before) * a->x_stride + u->channel;
    return u->ring + position % (a->taps - 1) * a->channels + u->channel;
}

EXC_INLINE void block_body(const struct exc_conv_args *a, const unit *u) {
    int64_t n = u->channels;
    const float *x[MOST_TAPS], *w[MOST_TAPS];
    for (int64_t r = 0; r < u->rows; r++) {
        float *y = a->y + (u->row + r) * a->y_stride + u->channel;
        int64_t oldest = u->before + r - (a->taps - 1), i = 0;
        int taps = 0;
        for (int64_t j = oldest < 0 ? -oldest : 0; j < a->taps; j++, taps++) {
            x[taps] = input(a, u, oldest + j);
            w[taps] = a->weight + j * a->channels + u->channel;
        }
        for (; i + LANES <= n; i += LANES) {
            float sum[LANES] = {0};
            for (int j = 0; j < taps; j++)
                for (int l = 0; l < LANES; l++) sum[l] += w[j][i + l] * x[j][i + l];
            for (int l = 0; l < LANES; l++) y[i + l] = sum[l] * exc_sigmoid(sum[l]);
        }
        for (; i < n; i++) {
            float sum = 0;
            for (int j = 0; j < taps; j++) sum += w[j][i] * x[j][i];
            y[i] = sum * exc_sigmoid(sum);
        }
    }
    int64_t end = u->before + u->rows, kept = exc_least(a->taps - 1, u->rows);
    for (int64_t p = end - kept; p < end; p++)
        memcpy(u->ring + p % (a->taps - 1) * a->channels + u->channel, input(a, u, p), (size_t)n * sizeof(float));
}
EXC_DISPATCH(block, (const struct exc_conv_args *a, const unit *u), (a, u))

typedef struct job {
    const struct exc_conv_args *a;
    int64_t blocks;
    void (*block)(const struct exc_conv_args *a, const unit *u);
} job;

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_conv_args *a = j->a;
    int64_t s = (int64_t)task / j->blocks, channel = (int64_t)task % j->blocks * BLOCK;
    unit u = {.row = a->begin[s], .rows = a->begin[s + 1] - a->begin[s], .channel = channel};
    (void)worker;
    u.before = a->length[s] - u.rows;
    u.channels = exc_least(BLOCK, a->channels - channel);
    u.ring = a->state + a->slot[s] * a->state_stride;
    j->block(a, &u);
}

exc_status exc_cpu_conv(exc_queue *q, const struct exc_conv_args *a) {
    if (a->sequences < 0 || a->channels < 1 || a->taps < 1 || a->taps > MOST_TAPS) return EXC_ERR_USAGE;
    job j = {.a = a, .block = block_for(), .blocks = (a->channels + BLOCK - 1) / BLOCK};
    q->parallel(q, (size_t)(a->sequences * j.blocks), run, &j);
    return EXC_OK;
}
