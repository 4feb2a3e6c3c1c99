/* moments.c - per-expert sums from someone else's forward pass: counts, gate sums, sums of intermediates [E,I].
 *
 * Pairs (token, choice) are first listed by expert with a counting sort, which keeps token order; then every expert owns
 * its sums and reads its rows whole, the next one being fetched meanwhile. Blocks of 64 rows are summed in f32 and
 * blocks in f64, on reproducible queues every row in fixed point (fixed.h). Calls of more pairs than the list holds are cut
 * into parts of fixed size. */
#include "fixed.h"

#define STRIP 1024          /* columns of a task */
#define MAX_EXPERTS (64 << 10)
#define SMALL (32 << 10)    /* values that are not worth waking a thread for */

#define ADD_PARAMS                                                                                                  \
    (const void *const *row, const void *const *ahead, int rows, int act, int64_t cols, float *sum)

EXC_INLINE float at(const void *row, int act, int64_t i) {
    return act == EXC_F32 ? ((const float *)row)[i] : exc_from_bf16(((const uint16_t *)row)[i]);
}

/* four rows in this order, 32 columns at a time; the next four are asked for meanwhile */
EXC_INLINE void add_four(const void *const *row, const void *const *ahead, int act, int64_t cols, float *sum) {
    const void *a = row[0], *b = row[1], *c = row[2], *d = row[3];
    int64_t i = 0, size = act == EXC_F32 ? 4 : 2;
    for (; i + 32 <= cols; i += 32) {
        for (int r = 0; r < 4; r++) __builtin_prefetch((const uint8_t *)ahead[r] + i * size);
        if (act == EXC_F32)
            for (int r = 0; r < 4; r++) __builtin_prefetch((const uint8_t *)ahead[r] + i * size + 64);
        for (int l = 0; l < 32; l++)
            sum[i + l] = sum[i + l] + at(a, act, i + l) + at(b, act, i + l) + at(c, act, i + l) + at(d, act, i + l);
    }
    for (; i < cols; i++) sum[i] = sum[i] + at(a, act, i) + at(b, act, i) + at(c, act, i) + at(d, act, i);
}

/* sum[0..cols) += at most four rows, in their order */
EXC_INLINE void add_body ADD_PARAMS {
    if (rows == 4 && act == EXC_F32) add_four(row, ahead, EXC_F32, cols, sum);
    else if (rows == 4) add_four(row, ahead, EXC_BF16, cols, sum);
    else
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < cols; i++) sum[i] += at(row[r], act, i);
}
EXC_DISPATCH(add, ADD_PARAMS, (row, ahead, rows, act, cols, sum))

#define FIXED_PARAMS (const void *row, const void *ahead, int act, int64_t cols, double *sum)
EXC_INLINE void fixed_body FIXED_PARAMS {
    int64_t size = act == EXC_F32 ? 4 : 2;
    for (int64_t i = 0; i < cols; i += 64) {
        for (int64_t b = 0; b < 64 * size; b += 64) __builtin_prefetch((const uint8_t *)ahead + i * size + b);
        exc_fixed_row((const uint8_t *)row + i * size, act, exc_least(64, cols - i), sum + i);
    }
}
EXC_DISPATCH(fixed, FIXED_PARAMS, (row, ahead, act, cols, sum))

typedef struct job {
    const struct exc_moments_args *a;
    void (*add) ADD_PARAMS;
    void (*fixed) FIXED_PARAMS; /* NULL: sums in blocks of rows */
    int64_t *offset; /* [E+1] into list */
    int32_t *list;   /* pairs by expert */
    int64_t base;    /* first pair of this part */
    int64_t strips, experts_per_task;
    size_t row_bytes, act_bytes;
} job;

static void strip(const job *j, int64_t e, int64_t first, int64_t cols) {
    const struct exc_moments_args *a = j->a;
    float sum[STRIP];
    const uint8_t *mid = (const uint8_t *)a->mid + (size_t)j->base * j->row_bytes + (size_t)first * j->act_bytes;
    int64_t end = j->offset[e + 1];
    double *to = a->mid_sum + e * a->inner + first;
    for (int64_t at = j->offset[e]; at < end && j->fixed; at++)
        j->fixed(mid + (size_t)j->list[at] * j->row_bytes, mid + (size_t)j->list[exc_least(at + 1, end - 1)] * j->row_bytes,
                 a->act, cols, to);
    for (int64_t at = j->offset[e]; at < end && !j->fixed; at += EXC_ROW_BLOCK) {
        int64_t stop = exc_least(at + EXC_ROW_BLOCK, end);
        for (int64_t i = 0; i < cols; i++) sum[i] = 0;
        for (int64_t p = at; p < stop; p += 4) {
            const void *row[4], *ahead[4];
            int n = (int)exc_least(4, stop - p);
            for (int r = 0; r < n; r++) row[r] = mid + (size_t)j->list[p + r] * j->row_bytes;
            for (int r = 0; r < 4; r++) ahead[r] = mid + (size_t)j->list[exc_least(p + 4 + r, end - 1)] * j->row_bytes;
            j->add(row, ahead, n, a->act, cols, sum);
        }
        for (int64_t i = 0; i < cols; i++) to[i] += (double)sum[i];
    }
}

/* an expert's count and gate sum, from its pairs in token order */
static void tally(const job *j, int64_t e) {
    const struct exc_moments_args *a = j->a;
    if (a->count) a->count[e] += j->offset[e + 1] - j->offset[e];
    if (!a->gate_sum || !a->weights) return;
    double sum = a->gate_sum[e];
    for (int64_t p = j->offset[e]; p < j->offset[e + 1]; p++) {
        float w = a->weights[j->base + j->list[p]];
        sum += (double)(j->fixed ? exc_fixed(w) : w);
    }
    a->gate_sum[e] = sum;
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first = (int64_t)task / j->strips * j->experts_per_task, at = (int64_t)task % j->strips * STRIP;
    int64_t last = exc_least(first + j->experts_per_task, j->a->experts), cols = exc_least(STRIP, j->a->inner - at);
    for (int64_t e = first; e < last; e++) {
        if (at == 0) tally(j, e);
        strip(j, e, at, cols);
    }
}

/* the pairs of this part, by expert, in token order */
static void sort(job *j, int64_t pairs) {
    const int32_t *ids = j->a->ids + j->base;
    int64_t E = j->a->experts;
    for (int64_t e = 0; e <= E; e++) j->offset[e] = 0;
    for (int64_t p = 0; p < pairs; p++)
        if (ids[p] >= 0) j->offset[ids[p] + 1]++;
    for (int64_t e = 0; e < E; e++) j->offset[e + 1] += j->offset[e];
    for (int64_t p = 0; p < pairs; p++)
        if (ids[p] >= 0) j->list[j->offset[ids[p]]++] = (int32_t)p;
    for (int64_t e = E; e > 0; e--) j->offset[e] = j->offset[e - 1];
    j->offset[0] = 0;
}

static void count(const struct exc_moments_args *a, int fixed) {
    for (int64_t p = 0; p < a->tokens * a->top_k; p++) {
        int32_t e = a->ids[p];
        if (e < 0) continue;
        if (a->count) a->count[e]++;
        if (a->gate_sum && a->weights) a->gate_sum[e] += (double)(fixed ? exc_fixed(a->weights[p]) : a->weights[p]);
    }
}

exc_status exc_cpu_moments(exc_queue *q, const struct exc_moments_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->experts < 1 || a->experts > MAX_EXPERTS) return EXC_ERR_USAGE;
    if (!a->mid || !a->mid_sum) {
        count(a, q->reproducible);
        return EXC_OK;
    }
    if (a->inner < 1 || (a->act != EXC_F32 && a->act != EXC_BF16)) return EXC_ERR_USAGE;
    job j = {.a = a, .add = add_for(), .offset = q->scratch[0]};
    if (q->reproducible) j.fixed = fixed_for();
    j.list = (int32_t *)(j.offset + a->experts + 1);
    j.act_bytes = a->act == EXC_F32 ? 4 : 2;
    j.row_bytes = (size_t)a->inner * j.act_bytes;
    j.strips = (a->inner + STRIP - 1) / STRIP;
    int64_t total = a->tokens * a->top_k, part = (int64_t)(q->scratch_bytes / 4) - 2 * (a->experts + 1);
    for (; j.base < total; j.base += part) {
        int64_t pairs = exc_least(part, total - j.base);
        sort(&j, pairs);
        j.experts_per_task = pairs * a->inner < SMALL ? a->experts : 1;
        q->parallel(q, exc_task_count(a->experts, j.experts_per_task) * (size_t)j.strips, run, &j);
    }
    return EXC_OK;
}
