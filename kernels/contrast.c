/* contrast.c - how much more often the target prompts choose an expert than the baseline prompts do, and how sure that is.
 *
 * The error comes from a bootstrap of whole prompts: tokens of one prompt are far from independent, prompts are. A
 * resample is drawn once for all experts as a multiplicity per prompt; its counts are then a small product multiplicity^T x
 * counts. Random numbers are a function of (seed, stream, resample, draw) alone, and resamples are cut into a fixed number of
 * tasks whose sums are added in order, so threads do not change a bit. Deviations are taken from the point
 * estimate, which keeps the variance clear of cancellation. */
#include <math.h>
#include <string.h>

#include "lanes.h"

#define TASKS 16
#define DRAW_SETS 2

/* SplitMix64's finaliser over a Weyl sequence: value i of stream (seed, stream) */
static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

typedef struct set {
    const uint32_t *counts; /* [prompts, experts], row stride `stride` */
    int64_t prompts;
} set;

typedef struct job {
    const struct exc_contrast_args *a;
    exc_queue *q;
    double *moments; /* [TASKS, 2, experts]: sums of deviations and of their squares */
} job;

EXC_INLINE void add_row_body(const uint32_t *row, double times, int64_t experts, double *sum) {
    for (int64_t e = 0; e < experts; e++) sum[e] += times * (double)row[e];
}
EXC_DISPATCH(add_row, (const uint32_t *row, double times, int64_t experts, double *sum), (row, times, experts, sum))

/* sums of the prompts, each as often as `times` says (NULL: once); returns the sum over experts. Integers: exact. */
static double add_up(const set *s, int64_t stride, int64_t experts, const uint32_t *times, double *sum) {
    void (*add)(const uint32_t *row, double n, int64_t count, double *into) = add_row_for();
    double all = 0;
    memset(sum, 0, (size_t)experts * sizeof *sum);
    for (int64_t p = 0; p < s->prompts; p++)
        if (!times || times[p]) add(s->counts + p * stride, times ? (double)times[p] : 1.0, experts, sum);
    for (int64_t e = 0; e < experts; e++) all += sum[e];
    return all;
}

static double log_share(double n, double all, double alpha, int64_t experts) {
    double top = n + alpha, under = all + alpha * (double)experts;
    return under > 0 ? log(top / under) : 0;
}

static set set_of(const struct exc_contrast_args *a, int which) {
    return which ? (set){a->baseline, a->baseline_prompts} : (set){a->target, a->target_prompts};
}

static void draw(const struct exc_contrast_args *a, int which, int64_t prompts, int64_t resample, uint32_t *times) {
    uint64_t key = mix(mix(a->seed + 0x9e3779b97f4a7c15u) ^ mix(a->stream * DRAW_SETS + (uint64_t)which + 1));
    key = mix(key ^ (uint64_t)resample);
    memset(times, 0, (size_t)prompts * sizeof *times);
    for (int64_t i = 0; i < prompts; i++) {
        uint64_t high = mix(key + (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u) >> 32;
        times[high * (uint64_t)prompts >> 32]++;
    }
}

static void resamples_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_contrast_args *a = j->a;
    int64_t E = a->experts, first = a->resamples * (int64_t)task / TASKS, last = a->resamples * (int64_t)(task + 1) / TASKS;
    double *sum[2] = {(double *)j->q->scratch[worker] + TASKS * 2 * E, NULL};
    sum[1] = sum[0] + E;
    uint32_t *times = (uint32_t *)(sum[1] + E);
    double *m = j->moments + (int64_t)task * 2 * E;
    memset(m, 0, (size_t)(2 * E) * sizeof *m);
    for (int64_t r = first; r < last; r++) {
        double all[2];
        for (int which = 0; which < 2; which++) {
            set s = set_of(a, which);
            draw(a, which, s.prompts, r, times);
            all[which] = add_up(&s, a->stride, E, times, sum[which]);
        }
        for (int64_t e = 0; e < E; e++) {
            double d = log_share(sum[0][e], all[0], a->alpha, E) - log_share(sum[1][e], all[1], a->alpha, E) - a->log_ratio[e];
            m[e] += d;
            m[E + e] += d * d;
        }
    }
}

/* standard deviation, z and p of one expert. Without two resamples, or two prompts to tell apart, nothing is known: z 0, p 1. */
static void judge(const job *j, int64_t e) {
    const struct exc_contrast_args *a = j->a;
    double s = 0, s2 = 0, n = (double)a->resamples;
    for (int64_t t = 0; t < TASKS; t++) {
        s += j->moments[t * 2 * a->experts + e];
        s2 += j->moments[t * 2 * a->experts + a->experts + e];
    }
    double variance = a->resamples > 1 ? (s2 - s * s / n) / (n - 1) : 0;
    a->se[e] = variance > 0 ? sqrt(variance) : 0;
    a->z[e] = a->se[e] > 0 ? a->log_ratio[e] / a->se[e] : 0;
    a->p[e] = erfc(fabs(a->z[e]) * 0.70710678118654752440);
}

exc_status exc_cpu_contrast(exc_queue *q, const struct exc_contrast_args *a) {
    int64_t E = a->experts, most = a->target_prompts > a->baseline_prompts ? a->target_prompts : a->baseline_prompts;
    if (E < 0 || a->target_prompts < 0 || a->baseline_prompts < 0 || a->resamples < 0 || !(a->alpha >= 0)) return EXC_ERR_USAGE;
    if (a->stride < E || most >= (int64_t)1 << 31) return EXC_ERR_USAGE;
    if (((size_t)E * (TASKS * 2 + 2)) * sizeof(double) + (size_t)most * sizeof(uint32_t) > q->scratch_bytes) return EXC_ERR_USAGE;
    job j = {.a = a, .q = q, .moments = q->scratch[0]};
    double *sum[2] = {(double *)q->scratch[0] + TASKS * 2 * E, NULL}, all[2];
    sum[1] = sum[0] + E;
    for (int which = 0; which < 2; which++) {
        set s = set_of(a, which);
        all[which] = add_up(&s, a->stride, E, NULL, sum[which]);
    }
    for (int64_t e = 0; e < E; e++) {
        a->log_ratio[e] = log_share(sum[0][e], all[0], a->alpha, E) - log_share(sum[1][e], all[1], a->alpha, E);
        double share_t = all[0] > 0 ? sum[0][e] / all[0] : 0, share_b = all[1] > 0 ? sum[1][e] / all[1] : 0;
        a->risk[e] = (share_t - share_b) * (double)a->top_k;
    }
    q->parallel(q, TASKS, resamples_run, &j);
    for (int64_t e = 0; e < E; e++) judge(&j, e);
    return EXC_OK;
}
