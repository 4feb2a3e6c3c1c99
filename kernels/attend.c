/* attend.c - causal softmax attention of a ragged batch against the KV cache; prefill and decode are one code path.
 *
 * A unit of work is one KV head of one sequence and a block of up to 64 query rows: the query heads that share the KV head (a
 * part of them, where they are more), token by token. Keys come in blocks of 64, ascending; each block is unpacked once to
 * f32 for all rows (or, where bf16 products exist, keys to pairs), multiplied, softened online (running maximum and sum)
 * and applied to the values. A row's arithmetic is a chain over its own visible keys: neither its neighbours nor the batch
 * show in its bits. Keys before the window of a unit's first row are never read. A sink joins the maximum and the sum when a
 * row is finished.
 *
 * Long caches are cut into spans of 1024 keys. A span starts its own maximum, sum and output, and spans are merged in
 * ascending order; so one token's long cache may be spread over threads and gives the bits of a single thread. */
#include <string.h>

#include "heads.h"

#define ROWS 64
#define SPAN 1024
#define PRIVATE_BYTES ((size_t)4 << 20) /* of a worker's scratch; the rest of worker 0's is shared */
#define SPREAD_BELOW 64                 /* fewer units than this: spans become tasks of their own */
#define TASK_FLOPS 500000.0

typedef struct job {
    const struct exc_attend_args *a;
    const exc_heads *with;
    exc_queue *q;
    int64_t group;         /* query heads of a KV head */
    int64_t part, parts;   /* of them in a unit; units that share a KV head */
    int64_t tokens, rows;  /* most query tokens and rows of a unit */
    int64_t width, wide;   /* head_dim and value_dim up to a multiple of 16 */
    int64_t *first;        /* [sequences+1] query blocks before each sequence */
    size_t units, per_task, size;
    int pairs;             /* scores by products of bf16 pairs: queries and keys are kept as words of two channels */
    int64_t spans;         /* most spans of a unit when spread, else 0 */
    float *partial;        /* [units][spans][rows][wide + 2] */
} job;

/* a worker's block of scratch */
typedef struct room {
    void *q, *keys;                       /* [ROWS,width], [width,64]: f32, or words of two channels */
    float *values, *scores, *out, *total; /* [64,wide] [ROWS,64] [ROWS,wide] twice */
    float m[ROWS], sum[ROWS], total_m[ROWS], total_sum[ROWS];
} room;

typedef struct unit {
    int64_t sequence, kv, head, heads;   /* query heads head .. head+heads-1 */
    int64_t token, tokens;               /* query tokens token .. token+tokens-1 of the sequence */
    int64_t visible;                     /* cached tokens up to its first one: that token sees the last `window` of them */
    int64_t rows;
} unit;

static size_t carve(const job *j, float *at, room *r) {
    float *start = at;
    r->q = at, at += ROWS * j->width;
    r->keys = at, at += EXC_KEYS * j->width;
    r->values = at, at += EXC_KEYS * j->wide;
    r->scores = at, at += ROWS * EXC_KEYS + LANES; /* soften fills up its last vector */
    r->out = at, at += ROWS * j->wide;
    r->total = at, at += ROWS * j->wide;
    return (size_t)(at - start) * sizeof(float);
}

static unit unit_at(const job *j, size_t i) {
    const struct exc_attend_args *a = j->a;
    int64_t share = a->kv_heads * j->parts, block = (int64_t)i / share, low = 0, high = a->sequences;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (j->first[middle] <= block) low = middle;
        else high = middle;
    }
    int64_t count = a->q_begin[low + 1] - a->q_begin[low];
    int64_t kv = (int64_t)i % share / j->parts, from = (int64_t)i % j->parts * j->part;
    unit u = {.sequence = low, .kv = kv, .head = kv * j->group + from, .token = (block - j->first[low]) * j->tokens};
    u.heads = exc_least(j->part, j->group - from);
    u.tokens = exc_least(j->tokens, count - u.token);
    u.visible = a->length[low] - count + u.token + 1;
    u.rows = u.tokens * u.heads;
    return u;
}

/* bytes to the query, or with value_dim the output, of a row */
static size_t query_at(const job *j, const unit *u, int64_t row, int64_t dim) {
    int64_t t = j->a->q_begin[u->sequence] + u->token + row / u->heads;
    return (size_t)((t * j->a->q_heads + u->head + row % u->heads) * dim) * j->size;
}

static const void *cached(const job *j, const void *cache, const unit *u, int64_t key, int64_t stride, int64_t dim) {
    int64_t row = j->a->cache_begin[u->sequence] + (j->a->ring ? key % j->a->ring : key); /* no block of keys goes round */
    return (const uint8_t *)cache + (size_t)(row * stride + u->kv * dim) * j->size;
}

/* keys of the unit: from the first that its first token sees to the last of its last token */
static int64_t first_key(const job *j, const unit *u) {
    return j->a->window && u->visible > j->a->window ? u->visible - j->a->window : 0;
}

static int64_t end_key(const unit *u) { return u->visible + u->tokens - 1; }

/* a stretch of keys within a block, and how many of them lie before the first (`before`) and up to the last (`seen`) key that
 * a row sees */
typedef struct stretch {
    int64_t from;
    int n;
} stretch;

static int within(const stretch *k, int64_t key) {
    return key < k->from ? 0 : key - k->from > k->n ? k->n : (int)(key - k->from);
}

static int before(const job *j, const unit *u, int64_t row, const stretch *k) {
    return j->a->window ? within(k, u->visible + row / u->heads - j->a->window) : 0;
}

static int seen(const job *j, const unit *u, int64_t row, const stretch *k) {
    return within(k, u->visible + row / u->heads);
}

/* out [wide] of one row += its scores of keys [first, last) x values */
static void apply_row(const job *j, room *r, int64_t row, int first, int last, int64_t at, int vectors) {
    if (first >= last) return;
    j->with->multiply(r->scores + row * EXC_KEYS + first, EXC_KEYS, 1, r->values + first * j->wide + at, j->wide,
                      last - first, r->out + row * j->wide + at, j->wide, vectors, 1);
}

/* out[row..row+n) += scores x values: the keys that all n rows see together, what a row sees before and behind them alone */
static void apply(const job *j, const unit *u, room *r, int64_t row, int n, const stretch *k) {
    int first = before(j, u, row + n - 1, k), last = seen(j, u, row, k);
    if (last < first) last = first;
    for (int64_t at = 0; at < j->wide; at += EXC_KEYS) {
        int vectors = (int)(exc_least(EXC_KEYS, j->wide - at) / LANES);
        for (int i = 0; i < n; i++) {
            int own = seen(j, u, row + i, k);
            apply_row(j, r, row + i, before(j, u, row + i, k), own < first ? own : first, at, vectors);
        }
        if (first < last)
            j->with->multiply(r->scores + row * EXC_KEYS + first, EXC_KEYS, n, r->values + first * j->wide + at, j->wide,
                              last - first, r->out + row * j->wide + at, j->wide, vectors, 1);
        for (int i = 0; i < n; i++) apply_row(j, r, row + i, last, seen(j, u, row + i, k), at, vectors);
    }
}

static void score(const job *j, room *r, int64_t row, int n, int vectors, float *scores) {
    int64_t D = j->a->head_dim, W = j->width;
    if (j->pairs)
        j->with->dot((const uint32_t *)r->q + row * W / 2, W / 2, n, r->keys, D / 2, scores, EXC_KEYS, vectors);
    else
        j->with->multiply((const float *)r->q + row * W, W, n, r->keys, EXC_KEYS, D, scores, EXC_KEYS, vectors, 0);
}

static void block(const job *j, const unit *u, room *r, const stretch *k) {
    const struct exc_attend_args *a = j->a;
    int64_t D = a->head_dim, V = a->value_dim;
    const void *keys = cached(j, a->cache_k, u, k->from, a->key_stride, D);
    if (j->pairs) j->with->turn_pairs(keys, a->key_stride, k->n, D, r->keys);
    else j->with->turn(keys, a->key_stride, a->act, k->n, D, r->keys);
    j->with->widen(cached(j, a->cache_v, u, k->from, a->value_stride, V), a->value_stride, a->act, k->n, V, j->wide, r->values);
    for (int64_t row = 0; row < u->rows; row += 4) {
        int n = (int)exc_least(4, u->rows - row), last = seen(j, u, row + n - 1, k);
        if (before(j, u, row, k) >= last) continue;
        float *scores = r->scores + row * EXC_KEYS;
        score(j, r, row, n, (last + LANES - 1) / LANES, scores);
        for (int i = 0; i < n; i++) {
            int first = before(j, u, row + i, k), own = seen(j, u, row + i, k) - first;
            float factor = 1.0f;
            if (own > 0)
                j->with->soften(scores + i * EXC_KEYS + first, own, a->scale, &r->m[row + i], &r->sum[row + i], &factor);
            if (factor != 1.0f) j->with->scale(r->out + (row + i) * j->wide, j->wide, factor);
        }
        apply(j, u, r, row, n, k);
    }
}

/* the keys of one span that the unit sees into r->out, m, sum; blocks begin at multiples of 64 whoever shares the unit */
static void span(const job *j, const unit *u, room *r, int64_t from) {
    int64_t end = exc_least(from + SPAN, end_key(u)), first = first_key(j, u);
    memset(r->out, 0, (size_t)(u->rows * j->wide) * sizeof(float));
    for (int64_t row = 0; row < u->rows; row++) r->m[row] = -__builtin_inff(), r->sum[row] = 0;
    for (int64_t next; from < end; from = next) {
        next = exc_least(from + EXC_KEYS, end);
        int64_t start = from < first ? first : from;
        if (start < next) block(j, u, r, &(stretch){start, (int)(next - start)});
    }
}

/* adds a span's result of one row to the row's total; a row that saw nothing of the span adds nothing */
static void merge(const job *j, float *total, float *total_m, float *total_sum, float *out, float m, float sum) {
    if (sum == 0) return;
    float top = m > *total_m ? m : *total_m, old = exc_exp_down(*total_m - top), new = exc_exp_down(m - top);
    j->with->scale(total, j->wide, old);
    j->with->scale(out, j->wide, new);
    for (int64_t i = 0; i < j->wide; i++) total[i] += out[i];
    *total_sum = *total_sum * old + sum * new;
    *total_m = top;
}

/* one row's output: total / sum, where a sink counts as one more key of that score, without a value */
static void finish(const job *j, const unit *u, int64_t row, const float *total, float m, float sum) {
    float by = 1.0f;
    int64_t V = j->a->value_dim;
    if (j->a->sinks) {
        float sink = j->a->sinks[u->head + row % u->heads], top = m > sink ? m : sink;
        by = exc_exp_down(m - top);
        sum = sum * by + exc_exp_down(sink - top);
    }
    j->with->round(total, V, by / sum, (uint8_t *)j->a->out + query_at(j, u, row, V), j->a->act);
}

static void finish_all(const job *j, const unit *u, const float *total, const float *m, const float *sum) {
    for (int64_t row = 0; row < u->rows; row++) finish(j, u, row, total + row * j->wide, m[row], sum[row]);
}

static void load_queries(const job *j, const unit *u, room *r) {
    int64_t D = j->a->head_dim;
    for (int64_t row = 0; row < u->rows; row++) {
        const uint8_t *q = (const uint8_t *)j->a->q + query_at(j, u, row, D);
        if (j->pairs) memcpy((uint16_t *)r->q + row * j->width, q, (size_t)D * sizeof(uint16_t));
        else j->with->widen(q, 0, j->a->act, 1, D, j->width, (float *)r->q + row * j->width);
    }
}

static void whole(const job *j, const unit *u, room *r) {
    int64_t from = first_key(j, u) / SPAN * SPAN;
    load_queries(j, u, r);
    span(j, u, r, from);
    if (end_key(u) <= from + SPAN) {
        finish_all(j, u, r->out, r->m, r->sum);
        return;
    }
    size_t bytes = (size_t)u->rows * sizeof(float);
    memcpy(r->total, r->out, bytes * (size_t)j->wide);
    memcpy(r->total_m, r->m, bytes);
    memcpy(r->total_sum, r->sum, bytes);
    while ((from += SPAN) < end_key(u)) {
        span(j, u, r, from);
        for (int64_t row = 0; row < u->rows; row++)
            merge(j, r->total + row * j->wide, &r->total_m[row], &r->total_sum[row], r->out + row * j->wide, r->m[row],
                  r->sum[row]);
    }
    finish_all(j, u, r->total, r->total_m, r->total_sum);
}

static void run_whole(void *arg, size_t task, int worker) {
    const job *j = arg;
    room r;
    carve(j, j->q->scratch[worker], &r);
    for (size_t i = task * j->per_task; i < (task + 1) * j->per_task && i < j->units; i++) {
        unit u = unit_at(j, i);
        whole(j, &u, &r);
    }
}

/* where row 0 of a unit's result of its s-th span is kept: out [wide], m, sum a row */
static float *kept(const job *j, size_t i, int64_t s) {
    return j->partial + ((int64_t)i * j->spans + s) * j->rows * (j->wide + 2);
}

static void run_span(void *arg, size_t task, int worker) {
    const job *j = arg;
    size_t i = task / (size_t)j->spans;
    int64_t s = (int64_t)(task % (size_t)j->spans);
    unit u = unit_at(j, i);
    int64_t from = (first_key(j, &u) / SPAN + s) * SPAN;
    if (from >= end_key(&u)) return;
    room r;
    carve(j, j->q->scratch[worker], &r);
    load_queries(j, &u, &r);
    span(j, &u, &r, from);
    float *to = kept(j, i, s);
    for (int64_t row = 0; row < u.rows; row++, to += j->wide + 2) {
        memcpy(to, r.out + row * j->wide, (size_t)j->wide * sizeof(float));
        to[j->wide] = r.m[row];
        to[j->wide + 1] = r.sum[row];
    }
}

static void run_merge(void *arg, size_t task, int worker) {
    const job *j = arg;
    (void)worker;
    unit u = unit_at(j, task);
    int64_t step = j->wide + 2, spans = (end_key(&u) + SPAN - 1) / SPAN - first_key(j, &u) / SPAN;
    for (int64_t row = 0; row < u.rows; row++) {
        float *total = kept(j, task, 0) + row * step;
        for (int64_t s = 1; s < spans; s++) {
            float *out = kept(j, task, s) + row * step;
            merge(j, total, total + j->wide, total + j->wide + 1, out, out[j->wide], out[j->wide + 1]);
        }
        finish(j, &u, row, total, total[j->wide], total[j->wide + 1]);
    }
}

/* most keys that a unit of a sequence of this length may see */
static int64_t most_keys(const job *j, int64_t length) {
    return j->a->window && j->a->window < length ? exc_least(length, j->a->window + j->tokens - 1) : length;
}

/* lists the query blocks; false when worker 0's scratch cannot hold the list */
static int plan(job *j) {
    const struct exc_attend_args *a = j->a;
    uint8_t *shared = (uint8_t *)j->q->scratch[0] + PRIVATE_BYTES;
    size_t list = (size_t)(a->sequences + 1) * sizeof(int64_t), room_left = j->q->scratch_bytes - PRIVATE_BYTES;
    if (list > room_left) return 0;
    j->first = (int64_t *)shared;
    j->first[0] = 0;
    double flops = 0;
    int64_t longest = 0, most = 0;
    for (int64_t s = 0; s < a->sequences; s++) {
        int64_t n = a->q_begin[s + 1] - a->q_begin[s];
        j->first[s + 1] = j->first[s] + (n + j->tokens - 1) / j->tokens;
        int64_t keys = most_keys(j, a->length[s]);
        flops += 2.0 * (double)(a->q_heads * (a->head_dim + a->value_dim)) * (double)n * (double)keys;
        if (n && keys > longest) longest = keys;
        if (n > most) most = n;
    }
    j->rows = exc_least(j->tokens, most) * j->part;
    j->units = (size_t)(j->first[a->sequences] * a->kv_heads * j->parts);
    if (!j->units) return 1;
    double per_unit = flops / (double)j->units;
    j->per_task = per_unit >= TASK_FLOPS ? 1 : (size_t)(TASK_FLOPS / (per_unit + 1)) + 1;
    int64_t spans = (longest + SPAN - 1) / SPAN + (a->window > 0); /* a window may begin within a span */
    list = (list + 63) / 64 * 64;
    size_t need = j->units * (size_t)(spans * j->rows * (j->wide + 2)) * sizeof(float);
    if (spans < 2 || j->units >= SPREAD_BELOW || need > room_left - list) return 1;
    j->spans = spans;
    j->partial = (float *)(shared + list);
    return 1;
}

exc_status exc_cpu_attend(exc_queue *q, const struct exc_attend_args *a) {
    if (a->sequences < 0 || a->kv_heads < 1 || a->q_heads < a->kv_heads || a->q_heads % a->kv_heads) return EXC_ERR_USAGE;
    if (a->head_dim < 1 || a->value_dim < 1) return EXC_ERR_USAGE;
    if ((a->act != EXC_F32 && a->act != EXC_BF16) || a->window < 0) return EXC_ERR_USAGE;
    if (a->ring < 0 || a->ring % EXC_KEYS) return EXC_ERR_USAGE;
    if (a->sequences && a->tokens != a->q_begin[a->sequences]) return EXC_ERR_USAGE;
    for (int64_t s = 0; s < a->sequences; s++)
        if (a->length[s] > a->longest) return EXC_ERR_USAGE;
    job j = {.a = a, .with = exc_heads_for(), .q = q, .group = a->q_heads / a->kv_heads};
    room r;
    j.width = (a->head_dim + LANES - 1) / LANES * LANES;
    j.wide = (a->value_dim + LANES - 1) / LANES * LANES;
    j.size = a->act == EXC_F32 ? 4 : 2;
    j.pairs = j.with->dot && a->act == EXC_BF16 && a->head_dim % 2 == 0;
    if (carve(&j, q->scratch[0], &r) > PRIVATE_BYTES) return EXC_ERR_USAGE;
    j.parts = (j.group + ROWS - 1) / ROWS;
    j.part = (j.group + j.parts - 1) / j.parts;
    j.tokens = ROWS / j.part;
    if (!plan(&j)) return EXC_ERR_USAGE;
    if (!j.units) return EXC_OK;
    if (j.spans) {
        q->parallel(q, j.units * (size_t)j.spans, run_span, &j);
        q->parallel(q, j.units, run_merge, &j);
    } else {
        q->parallel(q, (j.units + j.per_task - 1) / j.per_task, run_whole, &j);
    }
    return EXC_OK;
}
