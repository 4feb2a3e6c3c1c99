/* moments.c - per-expert sums from someone else's forward pass: counts, gate sums, sums of intermediates [E,I].
 *
 * Pairs (token, choice) are first listed by expert with a counting sort, which keeps token order; then every expert owns
 * its sums and reads its rows whole, later ones being fetched meanwhile. Blocks of 64 rows are summed in f32 and
 * blocks in f64, on reproducible queues every row in fixed point (fixed.h). Calls of more pairs than the list holds are cut
 * into parts of fixed size.
 *
 * The rows of an expert lie scattered, and what a core can have on its way from memory is the limit: on a Zen 4 server 12 cycles a
 * line of 64 bytes and thread (5 when the rows are in the caches), where a sequential read takes 7. Sums in token order would read
 * sequentially, but then the sums of all experts go through the second-level cache at every row, which takes longer. Reading 128
 * bytes of 64 rows in turn takes 13, whole rows 13 to 15, windows of 12 MB with a barrier after each 19, and experts by turns, a
 * block each, as much as now; the sort takes 4 % of a call. A request that finds too many others on their way is dropped: rows are
 * asked for twice. */
#include "fixed.h"

#define ROWS 8              /* that meet a sum together */
#define BLOCKS 16           /* of the sort, at most */
#define BLOCK_PAIRS 4096
#define AHEAD 16            /* rows asked for before they are needed, and once more at half of that */
#define STRIP 1024          /* columns of a task */
#define MAX_EXPERTS (64 << 10)
#define SMALL (32 << 10)    /* values that are not worth waking a thread for */

typedef struct job {
    const struct exc_moments_args *a;
    void (*sum)(const struct job *j, int64_t e, int64_t first, int64_t cols);
    int fixed;       /* sums in fixed point */
    int64_t *offset; /* [E+1] into list */
    int32_t *list;   /* pairs by expert */
    int32_t *place;  /* [blocks, E]: how many of a block, then where in the list */
    int64_t base, pairs, blocks; /* first pair of this part, how many, and in how many blocks */
    int64_t strips, experts_per_task;
    size_t row_bytes, act_bytes;
} job;

/* Two neighbours of a row of bf16 are a shift and a mask away from the word in memory, so sums of even and of odd columns are kept
 * apart; f32 sums are all in `even`. */
typedef uint32_t words __attribute__((aligned(2), may_alias));
EXC_INLINE float low(const void *row, int64_t i) { return exc_from_bits(((const words *)row)[i] << 16); }
EXC_INLINE float high(const void *row, int64_t i) { return exc_from_bits(((const words *)row)[i] & 0xffff0000u); }
EXC_INLINE float at(const void *row, int64_t i) { return ((const float *)row)[i]; }

/* sums of `cols` columns from word `i` on += some rows, one after the other */
EXC_INLINE void add_rows(const void *const *row, int rows, int act, int64_t i, int64_t cols, float *restrict even, float *restrict odd) {
    int64_t n = act == EXC_F32 ? cols : cols / 2;
    for (int r = 0; r < rows; r++) {
        for (int64_t k = i; k < n; k++) even[k] += act == EXC_F32 ? at(row[r], k) : low(row[r], k);
        for (int64_t k = i; act != EXC_F32 && k < n; k++) odd[k] += high(row[r], k);
        if (act != EXC_F32 && cols % 2) even[n] += exc_from_bf16(((const uint16_t *)row[r])[cols - 1]);
    }
}

/* ROWS rows in this order, 64 bytes at a time. Rows to come are asked for meanwhile, as far as the second-level cache: fewer
 * lines can be on their way to the first than keep memory busy. */
EXC_INLINE void add_all(const void *const *row, const void *const *ahead, const void *const *again, int act, int64_t cols,
                        float *restrict even, float *restrict odd) {
    int64_t i = 0, n = act == EXC_F32 ? cols : cols / 2;
    for (; i + LANES <= n; i += LANES) {
        for (int r = 0; r < ROWS; r++) {
            __builtin_prefetch((const uint8_t *)ahead[r] + i * 4, 0, 2);
            __builtin_prefetch((const uint8_t *)again[r] + i * 4, 0, 2);
        }
        for (int l = 0; l < LANES; l++) {
            float s = even[i + l];
            for (int r = 0; r < ROWS; r++) s += act == EXC_F32 ? at(row[r], i + l) : low(row[r], i + l);
            even[i + l] = s;
        }
        for (int l = 0; act != EXC_F32 && l < LANES; l++) {
            float s = odd[i + l];
            for (int r = 0; r < ROWS; r++) s += high(row[r], i + l);
            odd[i + l] = s;
        }
    }
    add_rows(row, ROWS, act, i, cols, even, odd);
}

/* some columns of an expert's rows, by blocks */
EXC_INLINE void sum_typed(const job *j, int64_t e, int64_t first, int64_t cols, int act) {
    const struct exc_moments_args *a = j->a;
    float even[STRIP], odd[STRIP / 2];
    const uint8_t *mid = (const uint8_t *)a->mid + (size_t)j->base * j->row_bytes + (size_t)first * j->act_bytes;
    int64_t end = j->offset[e + 1], last = j->offset[a->experts] - 1;
    double *to = a->mid_sum + e * a->inner + first;
    for (int64_t at = j->offset[e]; at < end; at += EXC_ROW_BLOCK) {
        int64_t stop = exc_least(at + EXC_ROW_BLOCK, end);
        for (int64_t i = 0; i < cols; i++) even[i] = 0;
        for (int64_t i = 0; i < cols / 2; i++) odd[i] = 0;
        for (int64_t p = at; p < stop; p += ROWS) {
            const void *row[ROWS], *ahead[ROWS], *again[ROWS];
            int n = (int)exc_least(ROWS, stop - p);
            for (int r = 0; r < n; r++) row[r] = mid + (size_t)j->list[p + r] * j->row_bytes;
            for (int r = 0; r < ROWS; r++) ahead[r] = mid + (size_t)j->list[exc_least(p + AHEAD + r, last)] * j->row_bytes;
            for (int r = 0; r < ROWS; r++) again[r] = mid + (size_t)j->list[exc_least(p + AHEAD / 2 + r, last)] * j->row_bytes;
            if (n == ROWS) add_all(row, ahead, again, act, cols, even, odd);
            else add_rows(row, n, act, 0, cols, even, odd);
        }
        for (int64_t i = 0; act == EXC_F32 && i < cols; i++) to[i] += (double)even[i];
        for (int64_t i = 0; act != EXC_F32 && i < cols / 2; i++) {
            to[2 * i] += (double)even[i];
            to[2 * i + 1] += (double)odd[i];
        }
        if (act != EXC_F32 && cols % 2) to[cols - 1] += (double)even[cols / 2];
    }
}
/* the same in fixed point, row by row */
EXC_INLINE void sum_fixed(const job *j, int64_t e, int64_t first, int64_t cols, int act) {
    const uint8_t *mid = (const uint8_t *)j->a->mid + (size_t)j->base * j->row_bytes + (size_t)first * j->act_bytes;
    int64_t last = j->offset[j->a->experts] - 1, size = (int64_t)j->act_bytes;
    double *to = j->a->mid_sum + e * j->a->inner + first;
    for (int64_t p = j->offset[e]; p < j->offset[e + 1]; p++) {
        const uint8_t *row = mid + (size_t)j->list[p] * j->row_bytes;
        const uint8_t *ahead = mid + (size_t)j->list[exc_least(p + AHEAD, last)] * j->row_bytes;
        for (int64_t i = 0; i < cols; i += 64) {
            for (int64_t b = 0; b < 64 * size; b += 64) __builtin_prefetch(ahead + i * size + b, 0, 2);
            exc_fixed_row(row + i * size, act, exc_least(64, cols - i), to + i);
        }
    }
}
EXC_INLINE void sum_body(const job *j, int64_t e, int64_t first, int64_t cols) {
    if (j->fixed && j->a->act == EXC_F32) sum_fixed(j, e, first, cols, EXC_F32);
    else if (j->fixed) sum_fixed(j, e, first, cols, EXC_BF16);
    else if (j->a->act == EXC_F32) sum_typed(j, e, first, cols, EXC_F32);
    else sum_typed(j, e, first, cols, EXC_BF16);
}
EXC_DISPATCH(sum, (const job *j, int64_t e, int64_t first, int64_t cols), (j, e, first, cols))

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
        j->sum(j, e, at, cols);
    }
}

/* ---- the pairs of this part, by expert, in token order: blocks of pairs are counted, then put in their places */

static int64_t block_end(const job *j, int64_t block) { return j->pairs * (block + 1) / j->blocks; }

static void count_block(void *arg, size_t block, int worker) {
    const job *j = arg;
    const int32_t *ids = j->a->ids + j->base;
    int32_t *place = j->place + (int64_t)block * j->a->experts;
    (void)worker;
    for (int64_t e = 0; e < j->a->experts; e++) place[e] = 0;
    for (int64_t p = block_end(j, (int64_t)block - 1); p < block_end(j, (int64_t)block); p++)
        if (ids[p] >= 0) place[ids[p]]++;
}

static void put_block(void *arg, size_t block, int worker) {
    const job *j = arg;
    const int32_t *ids = j->a->ids + j->base;
    int32_t *place = j->place + (int64_t)block * j->a->experts;
    (void)worker;
    for (int64_t p = block_end(j, (int64_t)block - 1); p < block_end(j, (int64_t)block); p++)
        if (ids[p] >= 0) j->list[place[ids[p]]++] = (int32_t)p;
}

static void sort(exc_queue *q, job *j) {
    int64_t E = j->a->experts, at = 0;
    j->blocks = exc_least(BLOCKS, 1 + j->pairs / BLOCK_PAIRS);
    q->parallel(q, (size_t)j->blocks, count_block, j);
    for (int64_t e = 0; e < E; e++) {
        j->offset[e] = at;
        for (int64_t b = 0; b < j->blocks; b++) {
            int32_t n = j->place[b * E + e];
            j->place[b * E + e] = (int32_t)at;
            at += n;
        }
    }
    j->offset[E] = at;
    q->parallel(q, (size_t)j->blocks, put_block, j);
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
    if (a->enabled && !*a->enabled) return EXC_OK;
    if (!a->mid || !a->mid_sum) {
        count(a, q->reproducible);
        return EXC_OK;
    }
    if (a->inner < 1 || (a->act != EXC_F32 && a->act != EXC_BF16)) return EXC_ERR_USAGE;
    job j = {.a = a, .sum = sum_for(), .fixed = q->reproducible, .offset = q->scratch[0]};
    j.place = (int32_t *)(j.offset + a->experts + 1);
    j.list = j.place + BLOCKS * a->experts;
    j.act_bytes = a->act == EXC_F32 ? 4 : 2;
    j.row_bytes = (size_t)a->inner * j.act_bytes;
    j.strips = (a->inner + STRIP - 1) / STRIP;
    int64_t total = a->tokens * a->top_k, part = (int64_t)(q->scratch_bytes / 4) - 2 * (a->experts + 1) - BLOCKS * a->experts;
    for (; j.base < total; j.base += part) {
        j.pairs = exc_least(part, total - j.base);
        sort(q, &j);
        j.experts_per_task = j.pairs * a->inner < SMALL ? a->experts : 1;
        q->parallel(q, exc_task_count(a->experts, j.experts_per_task) * (size_t)j.strips, run, &j);
    }
    return EXC_OK;
}
