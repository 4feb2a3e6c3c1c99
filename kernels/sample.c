/* sample.c - next tokens from logits [rows,V]: the largest, or a draw from the smallest set of probability >= top_p.
 *
 * Nothing is sorted. Probabilities p_i = exp((x_i - max) / temperature) lie in (0, 1], so the upper half of their bits numbers
 * 16,257 buckets in order of size. Masses by bucket, from the top down, tell in which bucket the set ends; in that one
 * the lower half of the bits tells at which value. The set is then {p > edge} and the lowest ids of those equal to the
 * edge; all others get 0, and the draw walks the ids in order. Masses are f64 sums in a fixed order. */
#include <math.h>
#include <string.h>

#include "lanes.h"

#define BUCKETS 16257      /* 0 .. bits(1.0f) >> 16 */
#define FINE (1 << 16)     /* values of a bucket */
#define MASSES (BUCKETS + 7 + FINE)
#define TASK_LOGITS (32 << 10)
#define CHUNK 2048

EXC_INLINE void largest_body(const float *x, int64_t n, float *out) { *out = exc_largest(x, n); }
EXC_DISPATCH(largest, (const float *x, int64_t n, float *out), (x, n, out))

/* p_i; NaN logits get 0. An infinite maximum leaves the mass to those that reach it. */
EXC_INLINE void powers_body(const float *x, int64_t n, float m, float per_temperature, float *p) {
    if (m > __FLT_MAX__) {
        for (int64_t i = 0; i < n; i++) p[i] = x[i] == m ? 1.0f : 0.0f;
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        float e = exc_exp_down((x[i] - m) * per_temperature);
        p[i] = e == e ? e : 0.0f;
    }
}
EXC_DISPATCH(powers, (const float *x, int64_t n, float m, float per_temperature, float *p), (x, n, m, per_temperature, p))

/* what is below the edge gets 0; *out: the mass of the rest */
EXC_INLINE void keep_body(float *p, int64_t n, float edge, double *out) {
    double lane[8] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) {
            p[i + l] = p[i + l] < edge ? 0.0f : p[i + l];
            lane[l] += (double)p[i + l];
        }
    for (; i < n; i++) sum += (double)(p[i] = p[i] < edge ? 0.0f : p[i]);
    for (int l = 0; l < 8; l++) sum += lane[l];
    *out = sum;
}
EXC_DISPATCH(keep, (float *p, int64_t n, float edge, double *out), (p, n, edge, out))

/* sum of exp(x - m), NaN included */
EXC_INLINE void mass_body(const float *x, int64_t n, float m, double *out) {
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t i = at, end = exc_least(at + CHUNK, n);
        float lane[LANES] = {0}, rest = 0;
        for (; i + LANES <= end; i += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += exc_exp_down(x[i + l] - m);
        for (; i < end; i++) rest += exc_exp_down(x[i] - m);
        *out += (double)(exc_lane_sum(lane) + rest);
    }
}
EXC_DISPATCH(mass, (const float *x, int64_t n, float m, double *out), (x, n, m, out))

typedef struct job {
    const struct exc_sample_args *a;
    int64_t per_task;
    void (*largest)(const float *x, int64_t n, float *out);
    void (*powers)(const float *x, int64_t n, float m, float per_temperature, float *p);
    void (*keep)(float *p, int64_t n, float edge, double *out);
    void (*mass)(const float *x, int64_t n, float m, double *out);
    exc_queue *q;
} job;

/* lowest id of the largest number, which is m and first seen at or after `from`; 0 when there is none */
static int64_t argmax(const float *x, int64_t n, float m, int64_t from) {
    for (int64_t i = from; i < n; i++)
        if (x[i] == m) return i;
    for (int64_t i = 0; i < n; i++)
        if (x[i] == x[i]) return i;
    return 0;
}

/* The smallest set of mass >= top_p of the total: the bucket in which it ends, the value in that bucket (returned), then the
 * ids that have it; those past the end get 0. */
static float nucleus(float *p, int64_t n, float top_p, double *mass, double *fine) {
    double total = 0, above = 0;
    memset(mass, 0, BUCKETS * sizeof *mass);
    memset(fine, 0, FINE * sizeof *fine);
    for (int64_t i = 0; i < n; i++) mass[exc_to_bits(p[i]) >> 16] += (double)p[i];
    for (int b = 0; b < BUCKETS; b++) total += mass[b];
    double need = (double)top_p * total;
    int b = BUCKETS - 1;
    while (b > 0 && (mass[b] == 0 || above + mass[b] < need)) above += mass[b--];
    for (int64_t i = 0; i < n; i++)
        if (exc_to_bits(p[i]) >> 16 == (uint32_t)b) fine[exc_to_bits(p[i]) & (FINE - 1)] += (double)p[i];
    int f = FINE - 1, full = 0;
    while (f > 0 && (fine[f] == 0 || above + fine[f] < need)) above += fine[f--];
    float edge = exc_from_bits((uint32_t)b << 16 | (uint32_t)f);
    for (int64_t i = 0; i < n; i++) {
        if (p[i] != edge) continue;
        if (full) p[i] = 0;
        above += (double)edge;
        full = full || above >= need;
    }
    return edge;
}

/* a draw from what nucleus left, by id: sums by chunk first, then within the chunk where the draw falls; -1: no mass */
static int64_t draw(const job *j, const float *x, float m, double random, int worker) {
    const struct exc_sample_args *a = j->a;
    double *fine = j->q->scratch[worker], *mass = fine + FINE, kept = 0, sum = 0;
    float *p = (float *)(fine + MASSES);
    int64_t last = -1, at = 0, chunks = (a->vocab + CHUNK - 1) / CHUNK;
    j->powers(x, a->vocab, m, 1.0f / a->temperature, p);
    float edge = a->top_p >= 1.0f ? 0 : nucleus(p, a->vocab, a->top_p, mass, fine);
    for (int64_t c = 0; c < chunks; c++) {
        j->keep(p + c * CHUNK, exc_least(CHUNK, a->vocab - c * CHUNK), edge, &mass[c]);
        kept += mass[c];
    }
    while (at < chunks - 1 && sum + mass[at] <= random * kept) sum += mass[at++];
    for (int64_t i = at * CHUNK; i < a->vocab; i++) {
        if (!(p[i] > 0)) continue;
        sum += (double)p[i];
        last = i;
        if (sum > random * kept) return i;
    }
    for (int64_t i = a->vocab - 1; i >= 0 && last < 0; i--)
        if (p[i] > 0) last = i; /* rounding left nothing behind the last chunk's start */
    return last;
}

static void row(const job *j, int64_t r, int worker) {
    const struct exc_sample_args *a = j->a;
    const float *x = a->logits + r * a->vocab;
    float m = -__FLT_MAX__, of_chunk;
    int64_t id = -1, from = 0;
    for (int64_t at = 0; at < a->vocab; at += CHUNK) {
        j->largest(x + at, exc_least(CHUNK, a->vocab - at), &of_chunk);
        if (of_chunk > m) m = of_chunk, from = at;
    }
    if (a->temperature > 0) id = draw(j, x, m, a->random01[r], worker);
    if (id < 0) id = argmax(x, a->vocab, m, from);
    a->token[r] = (int32_t)id;
    if (!a->logprob) return;
    double mass = 0;
    j->mass(x, a->vocab, m, &mass);
    a->logprob[r] = (float)((double)x[id] - (double)m - log(mass));
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t first = (int64_t)task * j->per_task, last = exc_least(first + j->per_task, j->a->rows);
    for (int64_t r = first; r < last; r++) row(j, r, worker);
}

exc_status exc_cpu_sample(exc_queue *q, const struct exc_sample_args *a) {
    if (a->rows < 0 || a->vocab < 1 || a->vocab > INT32_MAX || !(a->temperature >= 0)) return EXC_ERR_USAGE;
    size_t need = MASSES * sizeof(double) + (size_t)a->vocab * sizeof(float);
    if (a->temperature > 0 && (!a->random01 || need > q->scratch_bytes)) return EXC_ERR_USAGE;
    job j = {.a = a, .largest = largest_for(), .powers = powers_for(), .keep = keep_for(), .mass = mass_for(), .q = q};
    j.per_task = exc_rows_per_task(TASK_LOGITS, a->vocab);
    q->parallel(q, exc_task_count(a->rows, j.per_task), run, &j);
    return EXC_OK;
}
