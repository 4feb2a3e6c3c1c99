/* delta.cu - the gated delta rule, the twin of delta.c: the same chunks, the same state, the same chains of multiply-adds a
 * row, so that a sequence may be cut into calls anywhere here too.
 *
 * Four kernels. delta_units writes queries and keys of length 1, delta_gates beta and decay of every token. delta_heads
 * does the rule: a block takes COLUMNS value channels of one head of one sequence, which no other block touches, and walks
 * its chunks; keys of the chunk stand transposed in shared memory, S stays in the state (first-level cache). Products with
 * S are four chains over a quarter of the key channels each, added in order, so that a single token keeps a whole block
 * busy. delta_keep stores what blocks share, keys and decays of the running chunk, once all have read the old ones. */
#include "cuda.cuh"

#define C EXC_DELTA_CHUNK
#define COLUMNS 64
#define PARTS 4
#define THREADS (COLUMNS * PARTS)
#define TOGETHER 8 /* rows of a product with S at once */

struct Rule {
    const float *v;
    int64_t stride, sequences, k_heads, v_heads, k_dim, v_dim, wide;
    const int64_t *begin, *length;
    const int32_t *slot;
    float *state;
    int64_t state_stride;
    const float *q, *k, *beta, *step; /* made here: [T,k_heads,k_dim] twice, [T,v_heads] twice */
    float *out;
};

/* the state of a slot, as delta.c lays it out */
struct Kept {
    float *keys; /* [k_dim, C] of the key head */
    float *s;    /* of the value head: [k_dim, 64] for every 64 columns, the last perhaps fewer */
    float *d;    /* [C, wide] */
    double *since; /* [C] */
};

__device__ Kept find(const Rule &a, int64_t sequence, int64_t head) {
    float *at = a.state + a.slot[sequence] * a.state_stride;
    Kept t = {at + head / (a.v_heads / a.k_heads) * a.k_dim * C, nullptr, nullptr, nullptr};
    at += a.k_heads * a.k_dim * C;
    t.s = at + head * a.k_dim * a.wide;
    at += a.v_heads * a.k_dim * a.wide;
    t.d = at + head * C * a.wide;
    at += a.v_heads * C * a.wide;
    t.since = reinterpret_cast<double *>(at) + head * C;
    return t;
}

/* rows of both, a warp each: x / |x| * scale, the square of the length with 1e-6 added */
__global__ void delta_units(const float *q, const float *k, int64_t stride, int64_t rows, int64_t heads, int64_t dim, float scale,
                            float *unit_q, float *unit_k) {
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= 2 * rows) return; /* whole warps */
    bool is_key = row >= rows;
    if (is_key) row -= rows;
    const float *x = (is_key ? k : q) + row / heads * stride + row % heads * dim;
    float *y = (is_key ? unit_k : unit_q) + row * dim, sum = 0;
    for (int64_t i = lane; i < dim; i += WARP) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(warp_sum(sum) + 1e-6f);
    for (int64_t i = lane; i < dim; i += WARP) y[i] = x[i] * inverse * (is_key ? 1.0f : scale);
}

__global__ void delta_gates(const float *beta, const float *step, int64_t stride, const float *a_log, const float *dt_bias, int64_t n,
                            int64_t heads, float *open, float *fall) {
    for (int64_t i : grid_stride(n)) {
        int64_t h = i % heads, at = i / heads * stride + h;
        float x = step[at] + dt_bias[h], grown = (x > 0.0f ? x : 0.0f) + log1pf(expf(x > 0.0f ? -x : x));
        open[i] = 1.0f / (1.0f + expf(-beta[at]));
        fall[i] = -expf(a_log[h]) * grown;
    }
}

/* what a block works on, in shared memory; rows are those of the chunk */
struct Room {
    float l[C][C + 1], m[C][C + 1]; /* what corrections and outputs take of earlier corrections */
    float d[C][COLUMNS];            /* corrections */
    float ks[C][COLUMNS], qs[C][COLUMNS];
    float part[2][PARTS][TOGETHER][COLUMNS];
    double since[C];
    float beta[C], decay[C];
};

struct Piece { /* rows first.. of a chunk, tokens token.. of the batch */
    int64_t token, first, rows;
    bool fresh; /* the sequence's first chunk: S is zero and was never written */
};

__device__ void load_chunk(const Rule &a, const Kept &t, const Piece &p, int64_t head, float *keys, Room &r, bool resumed) {
    int64_t key_head = head / (a.v_heads / a.k_heads);
    for (int64_t i : block_stride(a.k_dim * p.first))
        if (resumed) keys[i / p.first * C + i % p.first] = t.keys[i / p.first * C + i % p.first];
    for (int64_t i : block_stride(a.k_dim * p.rows)) {
        int64_t row = i / a.k_dim, d = i % a.k_dim;
        keys[d * C + p.first + row] = a.k[((p.token + row) * a.k_heads + key_head) * a.k_dim + d];
    }
    if (threadIdx.x == 0)
        for (int64_t i = p.first; i < p.first + p.rows; i++) {
            int64_t at = (p.token + i - p.first) * a.v_heads + head;
            r.since[i] = (double)a.step[at] + (i ? r.since[i - 1] : 0);
            r.decay[i] = expf((float)r.since[i]);
            r.beta[i] = a.beta[at];
        }
    __syncthreads();
}

/* products of keys and queries with the chunk's keys, with their decays */
__device__ void mix_rows(const Rule &a, const Piece &p, int64_t head, const float *keys, Room &r) {
    int64_t j = threadIdx.x % C, last = p.first + p.rows, key_head = head / (a.v_heads / a.k_heads);
    for (int64_t i = p.first + threadIdx.x / C; i < last; i += THREADS / C) {
        if (j > i) continue;
        const float *q = a.q + ((p.token + i - p.first) * a.k_heads + key_head) * a.k_dim;
        float kk = 0, qk = 0, decay = expf((float)(r.since[i] - r.since[j]));
        for (int64_t d = 0; d < a.k_dim; d++) {
            kk = fmaf(keys[d * C + i], keys[d * C + j], kk);
            qk = fmaf(q[d], keys[d * C + j], qk);
        }
        r.l[i][j] = -r.beta[i] * decay * kk;
        r.m[i][j] = decay * qk;
    }
    __syncthreads();
}

/* ks, qs of the piece's rows */
__device__ void read_state(const Rule &a, const Kept &t, const Piece &p, int64_t head, int64_t column, bool inside, const float *keys,
                           Room &r) {
    int64_t c = threadIdx.x % COLUMNS, part = threadIdx.x / COLUMNS, each = ceil_div(a.k_dim, PARTS),
            width = a.wide - column < COLUMNS ? a.wide - column : COLUMNS, key_head = head / (a.v_heads / a.k_heads), from = part * each, to = from + each < a.k_dim ? from + each : a.k_dim;
    for (int64_t row = 0; row < p.rows; row += TOGETHER) {
        int64_t n = p.rows - row < TOGETHER ? p.rows - row : TOGETHER;
        const float *q = a.q + ((p.token + row) * a.k_heads + key_head) * a.k_dim;
        float ks[TOGETHER] = {}, qs[TOGETHER] = {};
        for (int64_t d = from; d < to; d++) {
            float s = inside ? t.s[column * a.k_dim + d * width + c] : 0;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
                if (i < n) {
                    ks[i] = fmaf(keys[d * C + p.first + row + i], s, ks[i]);
                    qs[i] = fmaf(q[i * a.k_heads * a.k_dim + d], s, qs[i]);
                }
        }
        for (int i = 0; i < TOGETHER; i++) r.part[0][part][i][c] = ks[i], r.part[1][part][i][c] = qs[i];
        __syncthreads();
        for (int64_t i : block_stride(n * COLUMNS)) {
            int64_t u = i / COLUMNS, w = i % COLUMNS, at = p.first + row + u;
            float k = r.part[0][0][u][w], o = r.part[1][0][u][w];
            for (int s = 1; s < PARTS; s++) k += r.part[0][s][u][w], o += r.part[1][s][u][w];
            r.ks[at][w] = k;
            r.qs[at][w] = o;
        }
        __syncthreads();
    }
}

/* corrections one after the other, a thread a column; then outputs */
__device__ void correct(const Rule &a, const Piece &p, int64_t head, int64_t column, Room &r) {
    int64_t c = threadIdx.x % COLUMNS, end = p.first + p.rows;
    bool inside = column + c < a.v_dim;
    if (threadIdx.x < COLUMNS)
        for (int64_t i = p.first; i < end; i++) {
            float value = inside ? a.v[(p.token + i - p.first) * a.stride + head * a.v_dim + column + c] : 0;
            float d = r.beta[i] * (p.fresh ? value : value - r.decay[i] * r.ks[i][c]);
            for (int64_t j = 0; j < i; j++) d = fmaf(r.l[i][j], r.d[j][c], d);
            r.d[i][c] = d;
        }
    __syncthreads();
    for (int64_t i = p.first + threadIdx.x / COLUMNS; i < end && inside; i += PARTS) {
        float o = p.fresh ? 0 : r.decay[i] * r.qs[i][c];
        for (int64_t j = 0; j <= i; j++) o = fmaf(r.m[i][j], r.d[j][c], o);
        a.out[((p.token + i - p.first) * a.v_heads + head) * a.v_dim + column + c] = o;
    }
    __syncthreads();
}

/* S takes up the whole chunk */
__device__ void turn_over(const Rule &a, const Kept &t, const Piece &p, int64_t column, bool inside, const float *keys, const Room &r) {
    int64_t c = threadIdx.x % COLUMNS, width = a.wide - column < COLUMNS ? a.wide - column : COLUMNS;
    if (inside) {
        float x[C], all = r.decay[C - 1];
#pragma unroll
        for (int i = 0; i < C; i++) x[i] = expf((float)(r.since[C - 1] - r.since[i])) * r.d[i][c];
        for (int64_t d = threadIdx.x / COLUMNS; d < a.k_dim; d += PARTS) {
            float *to = t.s + column * a.k_dim + d * width + c, s = p.fresh ? 0 : all * *to;
#pragma unroll
            for (int i = 0; i < C; i++) s = fmaf(keys[d * C + i], x[i], s);
            *to = s;
        }
    }
    __syncthreads();
}

__global__ void delta_heads(Rule a) {
    DYN_SHARED(unsigned char, shared);
    Room &r = *reinterpret_cast<Room *>(shared);
    float *keys = reinterpret_cast<float *>(shared + sizeof(Room)); /* [k_dim, C] */
    int64_t sequence = blockIdx.x, head = blockIdx.y, column = (int64_t)blockIdx.z * COLUMNS, c = threadIdx.x % COLUMNS;
    int64_t token = a.begin[sequence], end = a.begin[sequence + 1], position = a.length[sequence] - (end - token);
    bool inside = column + c < a.v_dim, resumed = true;
    Kept t = find(a, sequence, head);
    for (int64_t i : block_stride(position % C * COLUMNS)) {
        int64_t row = i / COLUMNS, w = i % COLUMNS;
        r.d[row][w] = column + w < a.v_dim ? t.d[row * a.wide + column + w] : 0;
        if (w == 0) r.since[row] = t.since[row];
    }
    __syncthreads();
    for (int64_t rows; token < end; token += rows, position += rows, resumed = false) {
        Piece p = {token, position % C, 0, position < C};
        p.rows = rows = C - p.first < end - token ? C - p.first : end - token;
        load_chunk(a, t, p, head, keys, r, resumed);
        mix_rows(a, p, head, keys, r);
        if (!p.fresh) read_state(a, t, p, head, column, inside, keys, r);
        correct(a, p, head, column, r);
        if (p.first + rows == C) turn_over(a, t, p, column, inside, keys, r);
    }
    for (int64_t i : block_stride(position % C * COLUMNS))
        if (column + i % COLUMNS < a.wide) t.d[i / COLUMNS * a.wide + column + i % COLUMNS] = r.d[i / COLUMNS][i % COLUMNS];
}

/* keys and decays of the running chunk */
__global__ void delta_keep(Rule a) {
    int64_t sequence = blockIdx.x, head = blockIdx.y, group = a.v_heads / a.k_heads, rows = a.begin[sequence + 1] - a.begin[sequence],
            length = a.length[sequence], kept = length % C < rows ? length % C : rows, first = length % C - kept;
    Kept t = find(a, sequence, head);
    if (head % group == 0)
        for (int64_t i : block_stride(a.k_dim * kept)) {
            int64_t row = i / a.k_dim, d = i % a.k_dim;
            t.keys[d * C + first + row] = a.k[((a.begin[sequence + 1] - kept + row) * a.k_heads + head / group) * a.k_dim + d];
        }
    if (threadIdx.x == 0)
        for (int64_t i = first; i < first + kept; i++)
            t.since[i] = (double)a.step[(a.begin[sequence + 1] - kept + i - first) * a.v_heads + head] + (i ? t.since[i - 1] : 0);
}

extern "C" exc_status exc_cuda_delta(exc_queue *q, const struct exc_delta_args *a) {
    if (a->sequences < 0 || a->k_heads < 1 || a->v_heads < 1 || a->v_heads % a->k_heads || a->k_dim < 1 || a->v_dim < 1)
        return EXC_ERR_USAGE;
    int64_t rows = a->tokens * a->k_heads, gates = a->tokens * a->v_heads;
    Carve work(q);
    float *unit_q = work.take<float>(rows * a->k_dim), *unit_k = work.take<float>(rows * a->k_dim),
          *beta = work.take<float>(gates), *step = work.take<float>(gates);
    if (!work.ready()) return work.status;
    if (!a->sequences || !a->tokens) return EXC_OK;
    Rule r = {a->v,      a->stride, a->sequences, a->k_heads,      a->v_heads, a->k_dim, a->v_dim, (a->v_dim + 15) / 16 * 16,
              a->begin,  a->length, a->slot,      a->state,        a->state_stride, unit_q, unit_k, beta, step, a->out};
    dim3 heads((unsigned)a->sequences, (unsigned)a->v_heads, (unsigned)ceil_div(a->v_dim, COLUMNS));
    ENQUEUE(q, delta_units, (unsigned)ceil_div(2 * rows, 4), 4 * WARP, 0, a->q, a->k, a->stride, rows, a->k_heads, a->k_dim,
            (float)(1.0 / sqrt((double)a->k_dim)), unit_q, unit_k);
    ENQUEUE(q, delta_gates, grid_for(gates, 256), 256, 0, a->beta, a->step, a->gate_stride, a->a_log, a->dt_bias, gates, a->v_heads,
            beta, step);
    ENQUEUE(q, delta_heads, heads, THREADS, sizeof(Room) + (size_t)(a->k_dim * C) * sizeof(float), r);
    ENQUEUE(q, delta_keep, dim3((unsigned)a->sequences, (unsigned)a->v_heads), 128, 0, r);
    return EXC_OK;
}
