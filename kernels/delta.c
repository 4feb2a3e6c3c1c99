/* delta.c - the gated delta rule, a linear attention with a state S [Dk,Dv] a value head:
 *     S <- e^g S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q
 *
 * Positions of a sequence are cut into chunks of C = EXC_DELTA_CHUNK. The state of a slot holds S at the start of the running
 * chunk and, of the chunk's tokens so far, the keys, the corrections d and the decays G_i = g_1 + .. + g_i since its start:
 *     d_i = beta_i (v_i - e^{G_i} S^T k_i) - sum_{j<i} beta_i e^{G_i-G_j} (k_i.k_j) d_j       (forward substitution)
 *     o_i = e^{G_i} S^T q_i + sum_{j<=i} e^{G_i-G_j} (q_i.k_j) d_j
 * and S moves once a chunk: S <- e^{G_C} S + sum_i e^{G_C-G_i} k_i d_i^T. So prefill is products of matrices, decode reads S
 * without writing it (31 times of 32), and both are the same chains of multiply-adds over the same numbers: where a
 * sequence is cut into calls does not show in its bits. A unit of work is one key head of one sequence. */
#include <math.h>
#include <string.h>

#include "heads.h"

#define C EXC_DELTA_CHUNK

typedef struct job {
    const struct exc_delta_args *a;
    const exc_heads *with;
    exc_queue *q;
    int64_t group, wide; /* value heads of a key head; v_dim up to a multiple of 16 */
    void (*unit_keys)(const float *x, int64_t dim, float scale, float *y);
    void (*gates)(float *beta, float *step, float bias, float rate, int64_t n);
    void (*exps)(float *x, int64_t n);
    void (*mix)(const double *since, const float *kk, const float *qk, int64_t row, float beta, float *l, float *m);
} job;

/* what a slot keeps of one key head: keys as columns, and of each of its value heads S, corrections, decays */
typedef struct kept {
    float *keys; /* [k_dim, C] */
    float *s;    /* [group], each in columns of 64 (the last perhaps fewer): [wide/64][k_dim, 64], so that it is read as one stream */
    float *d;    /* [group][C, wide] */
    double *since; /* [group][C] */
} kept;

/* a worker's block of scratch */
typedef struct room {
    float *q, *k;   /* [C, k_dim] rows of this call */
    float *kk, *qk; /* [C, C] products with the chunk's keys */
    float *l, *m;   /* [C, C] the same with decays and beta: what corrections and outputs take of earlier corrections */
    float *ks, *qs; /* [C, wide] products with S */
    float *x;       /* [C, wide] corrections as S takes them up */
    float beta[C], step[C], decay[C]; /* decay: e^{G_i} */
} room;

static int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

size_t exc_delta_floats(int64_t k_heads, int64_t v_heads, int64_t k_dim, int64_t v_dim) {
    return (size_t)(k_heads * k_dim * C + v_heads * (k_dim + C) * whole(v_dim) + v_heads * C * 2);
}

/* the doubles stand last, behind an even number of floats: C is even */
static kept find(const job *j, int64_t slot, int64_t head) {
    const struct exc_delta_args *a = j->a;
    float *at = a->state + slot * a->state_stride;
    int64_t first = head * j->group;
    kept t = {.keys = at + head * a->k_dim * C};
    at += a->k_heads * a->k_dim * C;
    t.s = at + first * a->k_dim * j->wide;
    at += a->v_heads * a->k_dim * j->wide;
    t.d = at + first * C * j->wide;
    at += a->v_heads * C * j->wide;
    t.since = (double *)(void *)at + first * C;
    return t;
}

static size_t carve(const job *j, float *at, room *r) {
    float *start = at;
    r->q = at, at += C * j->a->k_dim;
    r->k = at, at += C * j->a->k_dim;
    r->kk = at, at += C * C;
    r->qk = at, at += C * C;
    r->l = at, at += C * C;
    r->m = at, at += C * C;
    r->qs = at, at += C * j->wide;
    r->ks = at, at += C * j->wide;
    r->x = at, at += C * j->wide;
    return (size_t)(at - start) * sizeof(float);
}

/* y = x / |x| * scale, the square of the length with 1e-6 added */
EXC_INLINE void unit_keys_body(const float *x, int64_t dim, float scale, float *y) {
    float lane[LANES] = {0}, rest = 0;
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES)
        for (int n = 0; n < LANES; n++) lane[n] += x[i + n] * x[i + n];
    for (; i < dim; i++) rest += x[i] * x[i];
    float inverse = 1.0f / sqrtf(exc_lane_sum(lane) + rest + 1e-6f);
    for (i = 0; i < dim; i++) y[i] = x[i] * inverse * scale;
}
EXC_DISPATCH(unit_keys, (const float *x, int64_t dim, float scale, float *y), (x, dim, scale, y))

/* row `row` of the chunk: what its correction takes of the earlier ones, and its output of those and its own */
EXC_INLINE void mix_body(const double *since, const float *kk, const float *qk, int64_t row, float beta, float *l, float *m) {
    float decay[C];
    for (int64_t i = 0; i < C; i++) decay[i] = i <= row ? (float)(since[row] - since[i]) : 0;
    for (int64_t i = 0; i < C; i++) decay[i] = exc_exp_down(decay[i]);
    for (int64_t i = 0; i < C; i++) {
        l[i] = -beta * decay[i] * kk[i];
        m[i] = decay[i] * qk[i];
    }
}
EXC_DISPATCH(mix, (const double *since, const float *kk, const float *qk, int64_t row, float beta, float *l, float *m),
             (since, kk, qk, row, beta, l, m))

/* c[rows, columns] (+)= a[rows, k] b[k, columns], columns a multiple of 16: in columns of 64 whose b stays in the first-level cache */
static void product(const job *j, const float *a, int64_t a_stride, int64_t rows, const float *b, int64_t b_stride, int64_t k,
                    float *c, int64_t c_stride, int64_t columns, int add) {
    for (int64_t at = 0; at < columns; at += 64)
        for (int64_t r = 0; r < rows; r += 4)
            j->with->multiply(a + r * a_stride, a_stride, (int)exc_least(4, rows - r), b + at, b_stride, k, c + r * c_stride + at,
                              c_stride, (int)(exc_least(64, columns - at) / LANES), add);
}

/* The same with S on one side: its columns lie in blocks. */
static void times_state(const job *j, const float *a, int64_t a_stride, int64_t rows, const float *s, float *c, int64_t c_stride) {
    int64_t D = j->a->k_dim;
    for (int64_t at = 0; at < j->wide; at += 64) {
        int64_t n = exc_least(64, j->wide - at);
        product(j, a, a_stride, rows, s + at * D, n, D, c + at, c_stride, n, 0);
    }
}

static void add_to_state(const job *j, const float *keys, const float *x, float *s, int add) {
    int64_t D = j->a->k_dim;
    for (int64_t at = 0; at < j->wide; at += 64) {
        int64_t n = exc_least(64, j->wide - at);
        product(j, keys, C, D, x + at, j->wide, C, s + at * D, n, n, add);
    }
}

/* to[r] += sum of the corrections that row first + r sees, `own` of them from row `first` on beyond r: 0 the rows before it,
 * 1 itself too */
static void apply(const job *j, const float *coefficients, const float *d, int64_t first, int64_t rows, int64_t own, float *to) {
    for (int64_t r = 0; r < rows; r += 4) {
        int64_t n = exc_least(4, rows - r), seen = first + r + own;
        const float *with = coefficients + r * C;
        product(j, with, C, n, d, j->wide, seen, to + r * j->wide, j->wide, j->wide, 1);
        for (int64_t i = 1; i < n; i++)
            product(j, with + i * C + seen, C, 1, d + seen * j->wide, j->wide, i, to + (r + i) * j->wide, j->wide, j->wide, 1);
    }
}

static void load_rows(const job *j, const kept *t, room *r, int64_t head, int64_t token, int64_t first, int64_t rows) {
    const struct exc_delta_args *a = j->a;
    int64_t D = a->k_dim;
    float scale = (float)(1.0 / sqrt((double)D));
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = (token + i) * a->stride + head * D;
        j->unit_keys(a->q + at, D, scale, r->q + i * D);
        j->unit_keys(a->k + at, D, 1.0f, r->k + i * D);
        for (int64_t d = 0; d < D; d++) t->keys[d * C + first + i] = r->k[i * D + d];
    }
    product(j, r->k, D, rows, t->keys, C, D, r->kk, C, whole(first + rows), 0);
    product(j, r->q, D, rows, t->keys, C, D, r->qk, C, whole(first + rows), 0);
}

/* n <= C gates: beta -> sigmoid; step -> decay in log, never positive */
EXC_INLINE void gates_body(float *beta, float *step, float bias, float rate, int64_t n) {
    for (int64_t i = 0; i < n; i++) beta[i] = 1.0f / (1.0f + exc_exp(-beta[i]));
    for (int64_t i = 0; i < n; i++) step[i] = rate * exc_softplus(step[i] + bias);
}
EXC_DISPATCH(gates, (float *beta, float *step, float bias, float rate, int64_t n), (beta, step, bias, rate, n))

EXC_INLINE void exps_body(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = exc_exp_down(x[i]);
}
EXC_DISPATCH(exps, (float *x, int64_t n), (x, n))

/* beta and decays of the rows of a value head */
static void load_gates(const job *j, double *since, room *r, int64_t head, int64_t token, int64_t first, int64_t rows) {
    const struct exc_delta_args *a = j->a;
    for (int64_t i = 0; i < rows; i++) {
        r->beta[i] = a->beta[(token + i) * a->gate_stride + head];
        r->step[i] = a->step[(token + i) * a->gate_stride + head];
    }
    j->gates(r->beta, r->step, a->dt_bias[head], -expf(a->a_log[head]), rows);
    for (int64_t i = 0; i < rows; i++) {
        since[first + i] = (double)r->step[i] + (first + i ? since[first + i - 1] : 0);
        r->decay[i] = (float)since[first + i];
    }
    j->exps(r->decay, rows);
}

/* S takes up the whole chunk */
static void turn_over(const job *j, const kept *t, room *r, float *s, const float *d, const double *since, int fresh) {
    float left[C], all = (float)since[C - 1];
    for (int64_t i = 0; i < C; i++) left[i] = (float)(since[C - 1] - since[i]);
    j->exps(left, C);
    j->exps(&all, 1);
    for (int64_t i = 0; i < C; i++)
        for (int64_t c = 0; c < j->wide; c++) r->x[i * j->wide + c] = left[i] * d[i * j->wide + c];
    if (!fresh) j->with->scale(s, j->a->k_dim * j->wide, all);
    add_to_state(j, t->keys, r->x, s, !fresh);
}

/* ks, qs = keys and queries times S; a single token's two rows go together, so that S is read once */
static void read_state(const job *j, const room *r, const float *s, int64_t rows) {
    int64_t D = j->a->k_dim;
    if (rows == 1) {
        times_state(j, r->q, r->k - r->q, 2, s, r->qs, r->ks - r->qs);
        return;
    }
    times_state(j, r->k, D, rows, s, r->ks, j->wide);
    times_state(j, r->q, D, rows, s, r->qs, j->wide);
}

/* rows first.. of a chunk, which is the sequence's first one when `fresh`: S is zero and was never written */
static void value_head(const job *j, const kept *t, room *r, int64_t head, int64_t local, int64_t token, int64_t first,
                       int64_t rows, int fresh) {
    const struct exc_delta_args *a = j->a;
    int64_t wide = j->wide;
    float *s = t->s + local * a->k_dim * wide, *d = t->d + local * C * wide, *own = d + first * wide;
    double *since = t->since + local * C;
    load_gates(j, since, r, head, token, first, rows);
    if (!fresh) read_state(j, r, s, rows);
    for (int64_t i = 0; i < rows; i++) {
        const float *v = a->v + (token + i) * a->stride + head * a->v_dim, *ks = r->ks + i * wide;
        float *qs = r->qs + i * wide;
        for (int64_t c = 0; c < wide; c++) {
            float value = c < a->v_dim ? v[c] : 0;
            own[i * wide + c] = r->beta[i] * (fresh ? value : value - r->decay[i] * ks[c]);
            qs[c] = fresh ? 0 : r->decay[i] * qs[c];
        }
        j->mix(since, r->kk + i * C, r->qk + i * C, first + i, r->beta[i], r->l + i * C, r->m + i * C);
    }
    for (int64_t i = 0; i < rows; i += 4) apply(j, r->l + i * C, d, first + i, exc_least(4, rows - i), 0, own + i * wide);
    apply(j, r->m, d, first, rows, 1, r->qs);
    for (int64_t i = 0; i < rows; i++)
        memcpy(a->out + (token + i) * a->v_heads * a->v_dim + head * a->v_dim, r->qs + i * wide, (size_t)a->v_dim * sizeof(float));
    if (first + rows == C) turn_over(j, t, r, s, d, since, fresh);
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_delta_args *a = j->a;
    int64_t s = (int64_t)task / a->k_heads, head = (int64_t)task % a->k_heads;
    int64_t token = a->begin[s], end = a->begin[s + 1], position = a->length[s] - (end - token);
    kept t = find(j, a->slot[s], head);
    room r;
    carve(j, j->q->scratch[worker], &r);
    for (int64_t rows; token < end; token += rows, position += rows) {
        int64_t first = position % C;
        rows = exc_least(C - first, end - token);
        load_rows(j, &t, &r, head, token, first, rows);
        for (int64_t i = 0; i < j->group; i++)
            value_head(j, &t, &r, head * j->group + i, i, token, first, rows, position < C);
    }
}

exc_status exc_cpu_delta(exc_queue *q, const struct exc_delta_args *a) {
    if (a->sequences < 0 || a->k_heads < 1 || a->v_heads < 1 || a->v_heads % a->k_heads || a->k_dim < 1 || a->v_dim < 1)
        return EXC_ERR_USAGE;
    job j = {.a = a, .with = exc_heads_for(), .q = q, .group = a->v_heads / a->k_heads, .wide = whole(a->v_dim)};
    room r;
    j.unit_keys = unit_keys_for();
    j.mix = mix_for();
    j.gates = gates_for();
    j.exps = exps_for();
    if (carve(&j, q->scratch[0], &r) > q->scratch_bytes) return EXC_ERR_USAGE;
    q->parallel(q, (size_t)(a->sequences * a->k_heads), run, &j);
    return EXC_OK;
}
