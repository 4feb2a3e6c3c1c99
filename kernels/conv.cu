/* conv.cu - short causal convolution along each sequence, then silu, the twin of conv.c.
 *
 * A block takes ROWS rows of the batch and as many channels as it has threads, a thread one channel: loads of a row are
 * one line of memory, its neighbours come from the first-level cache. Where each row stands in its sequence is found once a
 * block. Outputs first, then a second kernel brings the rings up to date: no block overwrites what another still reads. */
#include "cuda.cuh"

#define THREADS 256
#define ROWS 32

struct Ring {
    const int64_t *begin, *length;
    const int32_t *slot;
    int64_t sequences;
    float *state;
    int64_t stride;
};

struct Row {
    const float *ring;
    int64_t position, before; /* in its sequence; tokens that earlier calls saw */
};

/* the sequence that owns a row of the batch; empty ones own none */
__device__ int64_t owner_of(const Ring &r, int64_t row) {
    int64_t low = 0, high = r.sequences;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (r.begin[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

__global__ void conv_rows(const float *x, int64_t x_stride, const float *weight, int64_t taps, int64_t channels, Ring ring,
                          int64_t tokens, float *y, int64_t y_stride) {
    SHARED_ARRAY(Row, row, ROWS);
    int64_t first = (int64_t)blockIdx.x * ROWS, n = tokens - first < ROWS ? tokens - first : ROWS;
    if (threadIdx.x < n) {
        int64_t s = owner_of(ring, first + threadIdx.x), before = ring.length[s] - (ring.begin[s + 1] - ring.begin[s]);
        row[threadIdx.x] = {ring.state + ring.slot[s] * ring.stride, before + first + threadIdx.x - ring.begin[s], before};
    }
    __syncthreads();
    int64_t c = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (c >= channels) return;
    for (int64_t r = 0; r < n; r++) {
        Row at = row[r];
        float sum = 0;
        for (int64_t j = 0; j < taps; j++) {
            int64_t back = taps - 1 - j, position = at.position - back;
            if (position < 0) continue;
            float v = position >= at.before ? x[(first + r - back) * x_stride + c] : at.ring[position % (taps - 1) * channels + c];
            sum += weight[j * channels + c] * v;
        }
        y[(first + r) * y_stride + c] = sum / (1.0f + expf(-sum));
    }
}

/* the last inputs of every sequence into its ring */
__global__ void conv_keep(const float *x, int64_t x_stride, int64_t taps, int64_t channels, Ring ring) {
    int64_t s = blockIdx.x, c = (int64_t)blockIdx.y * THREADS + threadIdx.x, rows = ring.begin[s + 1] - ring.begin[s];
    if (c >= channels) return;
    float *to = ring.state + ring.slot[s] * ring.stride + c;
    for (int64_t back = rows < taps - 1 ? rows : taps - 1; back > 0; back--)
        to[(ring.length[s] - back) % (taps - 1) * channels] = x[(ring.begin[s + 1] - back) * x_stride + c];
}

extern "C" exc_status exc_cuda_conv(exc_queue *q, const struct exc_conv_args *a) {
    if (a->sequences < 0 || a->channels < 1 || a->taps < 1 || a->taps > 64) return EXC_ERR_USAGE;
    Ring ring = {a->begin, a->length, a->slot, a->sequences, a->state, a->state_stride};
    unsigned wide = (unsigned)ceil_div(a->channels, THREADS);
    if (!a->sequences || !a->tokens) return EXC_OK;
    ENQUEUE(q, conv_rows, dim3((unsigned)ceil_div(a->tokens, ROWS), wide), THREADS, 0, a->x, a->x_stride, a->weight, a->taps,
            a->channels, ring, a->tokens, a->y, a->y_stride);
    if (a->taps > 1)
        ENQUEUE(q, conv_keep, dim3((unsigned)a->sequences, wide), THREADS, 0, a->x, a->x_stride, a->taps, a->channels, ring);
    return EXC_OK;
}
