/* combine.c - h [T,H] += the weighted sum of each token's expert outputs, and the virtual edit of those outputs.
 *
 * Tasks are runs of tokens; a token's columns are summed 256 at a time so that the sum stays in registers and first-level
 * cache while its K rows stream by. With a basis B [R,H] every output z_j would lose s_j B^T B z_j; because that map is linear
 * the token needs only two sums, v = sum w_j z_j and u = sum w_j s_j z_j, and one projection: v - B^T (B u). */
#include "tile.h"

#define COLUMNS 256
#define MAX_K 64
#define TASK_FLOATS (64 << 10)

typedef struct job {
    const struct exc_combine_args *a;
    int64_t tokens; /* of a task */
    void (*mix)(const float *const *row, const float *weight, int n, const float *const *next, int ahead, int64_t cols,
                int add, float *to);
    void (*project)(const float *basis, int64_t rank, int64_t hidden, const float *u, float *h);
    exc_queue *q;
} job;

/* asks for `cols` floats of a row */
EXC_INLINE void fetch(const float *row, int64_t cols) {
    for (int64_t i = 0; i < cols; i += 16) __builtin_prefetch(row + i, 0, 2);
}

/* to[0..cols) (+)= sum_j weight[j] * row[j][0..cols), j ascending. Rows lie anywhere, each too short for the processor to see
 * a stream in it, so the same columns of the `ahead` rows (the next token's) are asked for on the way. */
EXC_INLINE void mix_body(const float *const *row, const float *weight, int n, const float *const *next, int ahead,
                         int64_t cols, int add, float *to) {
    float sum[COLUMNS];
    for (int64_t first = 0; first < cols; first += COLUMNS) {
        int64_t m = cols - first < COLUMNS ? cols - first : COLUMNS;
        for (int i = 0; i < COLUMNS; i++) sum[i] = 0;
        for (int j = 0; j < n; j++) {
            const float *y = row[j] + first;
            float w = weight[j];
            for (int64_t i = 0; i < m; i++) sum[i] += w * y[i];
            if (j < ahead) fetch(next[j] + first, m);
        }
        for (int64_t i = 0; i < m; i++) to[first + i] = add ? to[first + i] + sum[i] : sum[i];
    }
}

/* h -= B^T (B u): dot products in 16 lanes of f32, rows of B in ascending order */
EXC_INLINE void project_body(const float *basis, int64_t rank, int64_t hidden, const float *u, float *h) {
    for (int64_t r = 0; r < rank; r++, basis += hidden) {
        float lane[16] = {0}, c = 0;
        int64_t i = 0;
        for (; i + 16 <= hidden; i += 16)
            for (int l = 0; l < 16; l++) lane[l] += basis[i + l] * u[i + l];
        for (; i < hidden; i++) c += basis[i] * u[i];
        for (int l = 0; l < 16; l++) c += lane[l];
        for (i = 0; i < hidden; i++) h[i] -= c * basis[i];
    }
}

#define VARIANT(name, target)                                                                                        \
    target static void mix_##name(const float *const *row, const float *weight, int n, const float *const *next,    \
                                  int ahead, int64_t cols, int add, float *to) {                                    \
        mix_body(row, weight, n, next, ahead, cols, add, to);                                                        \
    }                                                                                                                \
    target static void project_##name(const float *basis, int64_t rank, int64_t hidden, const float *u, float *h) { \
        project_body(basis, rank, hidden, u, h);                                                                     \
    }
VARIANT(generic, )
#if defined(__x86_64__)
VARIANT(avx2, __attribute__((target("avx2"))))
VARIANT(avx512, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq"))))
#endif

/* what a token is made of: its rows, their weights, and weights times strengths */
typedef struct parts {
    const float *row[MAX_K];
    float weight[MAX_K], edited[MAX_K];
    int n;
} parts;

static void parts_of(const struct exc_combine_args *a, int64_t t, parts *p) {
    p->n = 0;
    for (int64_t i = t * a->top_k; i < (t + 1) * a->top_k; i++) {
        if (a->row_of[i] < 0) continue;
        p->row[p->n] = a->y + a->row_of[i] * a->hidden;
        p->weight[p->n] = a->scale ? a->weights[i] * a->scale[a->ids[i]] : a->weights[i];
        p->edited[p->n] = a->basis ? p->weight[p->n] * a->strength[a->ids[i]] : 0;
        p->n++;
    }
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_combine_args *a = j->a;
    int64_t first = (int64_t)task * j->tokens, last = first + j->tokens < a->tokens ? first + j->tokens : a->tokens;
    parts two[2], *now = &two[0], *next = &two[1];
    float *u = j->q->scratch[worker];
    parts_of(a, first, now);
    for (int64_t t = first; t < last; t++) {
        next->n = 0;
        if (t + 1 < last) parts_of(a, t + 1, next);
        float *h = a->h + t * a->hidden;
        j->mix(now->row, now->weight, now->n, next->row, next->n, a->hidden, 1, h);
        if (a->basis) {
            j->mix(now->row, now->edited, now->n, next->row, 0, a->hidden, 0, u);
            j->project(a->basis, a->rank, a->hidden, u, h);
        }
        parts *other = now;
        now = next;
        next = other;
    }
}

exc_status exc_cpu_combine(exc_queue *q, const struct exc_combine_args *a) {
    if (a->tokens < 0 || a->top_k < 1 || a->top_k > MAX_K || a->hidden < 1 || a->rank < 0) return EXC_ERR_USAGE;
    if (a->basis && (!a->strength || (size_t)a->hidden * sizeof(float) > q->scratch_bytes)) return EXC_ERR_USAGE;
    job j = {.a = a, .mix = mix_generic, .project = project_generic, .q = q};
#if defined(__x86_64__)
    enum exc_isa level = exc_isa_level();
    if (level >= EXC_ISA_AVX2) j.mix = mix_avx2, j.project = project_avx2;
    if (level >= EXC_ISA_AVX512) j.mix = mix_avx512, j.project = project_avx512;
#endif
    j.tokens = TASK_FLOATS / ((a->top_k + 2) * a->hidden);
    if (j.tokens < 1) j.tokens = 1;
    q->parallel(q, (size_t)((a->tokens + j.tokens - 1) / j.tokens), run, &j);
    return EXC_OK;
}
