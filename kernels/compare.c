/* compare.c - two sets of logits, row by row: KL divergence, equal argmax, negative log-probabilities.
 *
 * Online softmax: a row is taken in chunks that stay in the first-level cache; a chunk's maximum comes first, earlier sums are
 * rescaled when it is a new one, and the chunk's sums in 16 lanes of f32 are added to f64. With e_i = exp(p_i - m_p),
 *     KL = sum e_i (p_i - q_i) / sum e_i - (m_p + log sum e_i) + (m_q + log sum exp(q_i - m_q)),
 * so that the differences of nearly equal logits are taken directly. */
#include <math.h>

#include "lanes.h"

#define CHUNK 2048
#define TASK_LOGITS (32 << 10)

typedef struct side {
    float largest;
    double sum;
    int64_t chunk; /* where the largest was first seen, -1: nowhere */
} side;

/* sums over a chunk: e_p, e_q and e_p (p - q); q NULL: the first only */
EXC_INLINE void sums_body(const float *p, const float *q, int64_t n, float mp, float mq, float *out) {
    float a[LANES] = {0}, b[LANES] = {0}, c[LANES] = {0}, ra = 0, rb = 0, rc = 0;
    int64_t i = 0;
    if (!q) {
        for (; i + LANES <= n; i += LANES)
            for (int l = 0; l < LANES; l++) a[l] += exc_exp_down(p[i + l] - mp);
        for (; i < n; i++) ra += exc_exp_down(p[i] - mp);
        out[0] = exc_lane_sum(a) + ra;
        return;
    }
    for (; i + LANES <= n; i += LANES) {
        __builtin_prefetch(p + i + CHUNK); /* the next chunk's, while this one keeps the arithmetic busy */
        __builtin_prefetch(q + i + CHUNK);
        for (int l = 0; l < LANES; l++) {
            float e = exc_exp_down(p[i + l] - mp), d = p[i + l] - q[i + l];
            a[l] += e;
            b[l] += exc_exp_down(q[i + l] - mq);
            c[l] += e == 0.0f ? 0.0f : e * d;
        }
    }
    for (; i < n; i++) {
        float e = exc_exp_down(p[i] - mp);
        ra += e;
        rb += exc_exp_down(q[i] - mq);
        rc += e == 0.0f ? 0.0f : e * (p[i] - q[i]);
    }
    out[0] = exc_lane_sum(a) + ra;
    out[1] = exc_lane_sum(b) + rb;
    out[2] = exc_lane_sum(c) + rc;
}
EXC_DISPATCH(sums, (const float *p, const float *q, int64_t n, float mp, float mq, float *out), (p, q, n, mp, mq, out))

EXC_INLINE void largest_body(const float *x, int64_t n, float *out) { *out = exc_largest(x, n); }
EXC_DISPATCH(largest, (const float *x, int64_t n, float *out), (x, n, out))

typedef struct job {
    const struct exc_compare_args *a;
    int64_t per_task;
    void (*sums)(const float *p, const float *q, int64_t n, float mp, float mq, float *out);
    void (*largest)(const float *x, int64_t n, float *out);
} job;

/* takes a chunk's maximum in; returns what earlier sums must be multiplied by */
static double raise(const job *j, side *s, const float *x, int64_t at, int64_t n) {
    float m;
    j->largest(x + at, n, &m);
    if (m <= s->largest) return 1.0;
    double factor = exp((double)s->largest - (double)m);
    s->largest = m;
    s->chunk = at;
    return factor;
}

/* the lowest id of the largest number; a row without a number above -FLT_MAX: the first number, else 0 */
static int64_t top(const side *s, const float *x, int64_t vocab) {
    if (s->chunk >= 0)
        for (int64_t i = s->chunk; i < vocab; i++)
            if (x[i] == s->largest) return i;
    int64_t best = -1;
    for (int64_t i = 0; i < vocab; i++)
        if (x[i] == x[i] && (best < 0 || x[i] > x[best])) best = i;
    return best < 0 ? 0 : best;
}

static void row(const job *j, int64_t r) {
    const struct exc_compare_args *a = j->a;
    int64_t V = a->vocab;
    const float *p = a->p + r * V, *q = a->q ? a->q + r * V : NULL;
    side sp = {-__FLT_MAX__, 0, -1}, sq = sp;
    double dot = 0;
    for (int64_t at = 0; at < V; at += CHUNK) {
        int64_t n = exc_least(CHUNK, V - at);
        float out[3] = {0};
        double fp = raise(j, &sp, p, at, n), fq = q ? raise(j, &sq, q, at, n) : 1.0;
        j->sums(p + at, q ? q + at : NULL, n, sp.largest, sq.largest, out);
        sp.sum = sp.sum * fp + (double)out[0];
        sq.sum = sq.sum * fq + (double)out[1];
        dot = dot * fp + (double)out[2];
    }
    double lp = (double)sp.largest + log(sp.sum), lq = q ? (double)sq.largest + log(sq.sum) : 0;
    if (a->nll_p) a->nll_p[r] = lp - (double)p[a->next[r]];
    if (!q) return;
    if (a->nll_q) a->nll_q[r] = lq - (double)q[a->next[r]];
    if (a->same_top) a->same_top[r] = top(&sp, p, V) == top(&sq, q, V);
    if (!a->kl) return;
    double kl = dot / sp.sum - lp + lq;
    a->kl[r] = kl < 0 ? 0 : kl;
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first = (int64_t)task * j->per_task, last = exc_least(first + j->per_task, j->a->rows);
    for (int64_t r = first; r < last; r++) row(j, r);
}

exc_status exc_cpu_compare(exc_queue *q, const struct exc_compare_args *a) {
    if (a->rows < 0 || a->vocab < 1 || ((a->nll_p || a->nll_q) && !a->next)) return EXC_ERR_USAGE;
    if (!a->q && (a->kl || a->same_top || a->nll_q)) return EXC_ERR_USAGE;
    job j = {.a = a, .sums = sums_for(), .largest = largest_for(), .per_task = exc_rows_per_task(TASK_LOGITS, a->vocab)};
    q->parallel(q, exc_task_count(a->rows, j.per_task), run, &j);
    return EXC_OK;
}
