/* abreast.c - the common edit at the speed of memory, for matrices that stay in the last-level cache: bf16 in either place, R on the
 * rows, rank 1 or 2, no sums asked for.
 *
 * A matrix is read twice, for R W and for the subtraction. Two matrices go through a worker side by side, in the order of memory:
 * while one comes from memory and meets R, four rows at a time, the same rows of the one before it come back from the last-level
 * cache, lose their share of R and are written. Whole rows keep the processor's own prefetching right, which costs more than it
 * gives on narrow pieces (scattered 256 bytes take twice as long a line as scattered 128), but it needs help: asked for some KB
 * ahead, memory and cache are read at the same time. Lines are asked for twice, as a request that finds too many others on their
 * way is dropped and its line would stall everything later: that is worth 5 % of the ceiling.
 *
 * The farther apart the two visits of a line, the slower: without arithmetic, of the best in-place loop 92 % at 256 KB, 86 % at
 * 1 MB, 79 % at 3 MB, 73 % at 4 MB, while memory is slow. By halves of rows the visits are closer, but the processor reads past the
 * half: no gain.
 *
 * Sums are kept by even and odd columns, a shift and a mask away from the bf16 pairs in memory. A column's operations are those of
 * strip.h in the same order, so the bits are the same. */
#include "abreast.h"

#include "lanes.h"
#include "relay.h"

#if defined(__x86_64__)
#define CHUNK 64            /* rows of one partial sum of the canonical tree */
#define ROWS 4              /* that share a read of the sums */
#define MOST_RANK 2
#define LINE 32             /* columns of a 64-byte line */
#define ENTER_AHEAD 24576   /* bytes asked for before they are needed: of the matrix that enters, */
#define LEAVE_AHEAD 12288   /* and of the one that leaves; and once more at half of that */
#define MATRICES 64         /* of a task, at most: its first and last have no companion */

/* a matrix on its way */
typedef struct rider {
    const char *src;
    char *dst;
    float *share; /* [rank, rows], strength * R */
    float *c;     /* [cols / 32, rank, 32], R W; 16 even columns of a line before its 16 odd ones, like all sums here */
    int careful;  /* a result may be subnormal */
} rider;

/* where the rows are that are asked for meanwhile, of in and of out: for the first time and again */
typedef struct ahead {
    const char *in[2], *out[2];
} ahead;

typedef struct abreast abreast;
typedef void (*chunk_fn)(const abreast *t, const rider *out, const rider *in, ahead soon, int64_t h, float *sum);
struct abreast {
    const struct exc_project_args *a;
    exc_queue *q;
    int64_t per_task;
    chunk_fn fast, careful;
    float least; /* share of R, but zero */
};

EXC_AVX512 EXC_INLINE __m512i joined(__m512 e, __m512 o) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(exc_rounded(e), 16), exc_rounded(o));
}
/* the instruction by name: all else here is the same with and without it */
EXC_AVX512 EXC_INLINE __m512i joined_fast(__m512 e, __m512 o) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                           3, 18, 2, 17, 1, 16, 0);
    __m512i x;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(x) : "v"(e), "v"(o));
    return _mm512_permutexvar_epi16(pairs, x);
}

enum { FAST = 1, WHOLE = 2 }; /* the processor rounds to bf16; strength 1 */

/* hi + lo += x, of which hi keeps what fits and lo the rest; all sums are followed by their hi and lo, n numbers each */
EXC_AVX512 EXC_INLINE void settle(float *sum, int64_t n, __m512 x) {
    __m512 h = _mm512_load_ps(sum + n), s = _mm512_add_ps(h, x), b = _mm512_sub_ps(s, h);
    __m512 e = _mm512_add_ps(_mm512_sub_ps(h, _mm512_sub_ps(s, b)), _mm512_sub_ps(x, b));
    _mm512_store_ps(sum + n, s);
    _mm512_store_ps(sum + 2 * n, _mm512_add_ps(_mm512_load_ps(sum + 2 * n), e));
}

/* Rows h..h+n-1 of both matrices, a line after the other. sum += R W of `in`, if it is a new chunk after the old sum has been
 * settled; `out` loses its share and is written. */
EXC_AVX512 EXC_INLINE void rows_of(const abreast *t, const rider *out, const rider *in, ahead soon, int64_t h, float *sum, int n,
                               int anew, int leaves, int enters, int rank, int how) {
    const int64_t rows = t->a->rows, sums = rank * t->a->cols;
    const size_t stride = (size_t)t->a->cols * 2, at = (size_t)h * stride;
    const char *new = enters ? in->src + at : NULL, *old = leaves ? out->src + at : NULL;
    const float *c = leaves ? out->c : NULL;
    char *to = leaves ? out->dst + at : NULL;
    const int apart = to != old;
    __m512 b[MOST_RANK][ROWS], k[MOST_RANK][ROWS];
    _Pragma("GCC unroll 4") for (int r = 0; r < rank; r++)
        _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) {
            if (enters) b[r][i] = _mm512_set1_ps(t->a->basis[r * rows + h + i]);
            if (leaves) k[r][i] = how & WHOLE && enters ? b[r][i] : _mm512_set1_ps(out->share[r * rows + h + i]);
        }
    for (size_t x = 0; x < stride; x += 2 * LINE, sum += rank * LINE, c += rank * LINE) {
        __m512 e[ROWS], o[ROWS], de[ROWS], dd[ROWS];
        _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) {
            if (enters) {
                __m512i w = _mm512_load_si512((const void *)(new + (size_t)i * stride + x));
                for (int twice = 0; twice < 2; twice++) __builtin_prefetch(soon.in[twice] + (size_t)i * stride + x, 0, 2);
                e[i] = exc_even(w);
                o[i] = exc_odd(w);
            }
            for (int twice = 0; leaves && twice < 2; twice++) __builtin_prefetch(soon.out[twice] + (size_t)i * stride + x, 0, 2);
            de[i] = dd[i] = _mm512_setzero_ps();
        }
        _Pragma("GCC unroll 4") for (int r = 0; r < rank; r++) {
            if (enters) {
                __m512 se = _mm512_load_ps(sum + r * LINE), so = _mm512_load_ps(sum + r * LINE + 16);
                if (anew) {
                    settle(sum + r * LINE, sums, se);
                    settle(sum + r * LINE + 16, sums, so);
                    se = so = _mm512_setzero_ps();
                }
                _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) {
                    se = _mm512_fmadd_ps(b[r][i], e[i], se);
                    so = _mm512_fmadd_ps(b[r][i], o[i], so);
                }
                _mm512_store_ps(sum + r * LINE, se);
                _mm512_store_ps(sum + r * LINE + 16, so);
            }
            if (leaves) {
                __m512 ce = _mm512_load_ps(c + r * LINE), co = _mm512_load_ps(c + r * LINE + 16);
                _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) {
                    de[i] = _mm512_fmadd_ps(k[r][i], ce, de[i]);
                    dd[i] = _mm512_fmadd_ps(k[r][i], co, dd[i]);
                }
            }
        }
        _Pragma("GCC unroll 4") for (int i = 0; leaves && i < n; i++) {
            __m512i w = _mm512_load_si512((const void *)(old + (size_t)i * stride + x));
            __m512 l = _mm512_sub_ps(exc_even(w), de[i]), r = _mm512_sub_ps(exc_odd(w), dd[i]);
            w = how & FAST ? joined_fast(l, r) : joined(l, r);
            if (apart) _mm512_stream_si512((__m512i *)(to + (size_t)i * stride + x), w);
            else _mm512_store_si512((void *)(to + (size_t)i * stride + x), w);
        }
    }
}

EXC_AVX512 EXC_INLINE void chunk(const abreast *t, const rider *out, const rider *in, ahead soon, int64_t h, float *sum, int leaves,
                             int enters, int rank, int how) {
    const int64_t last = exc_least(h + CHUNK, t->a->rows);
    const size_t stride = (size_t)t->a->cols * 2;
    for (int anew = h > 0; h < last; anew = 0) {
        int n = h + ROWS <= last ? ROWS : 1;
        if (enters && anew && n > 1) rows_of(t, out, in, soon, h, sum, ROWS, 1, leaves, enters, rank, how);
        else if (n > 1) rows_of(t, out, in, soon, h, sum, ROWS, 0, leaves, enters, rank, how);
        else if (enters && anew) rows_of(t, out, in, soon, h, sum, 1, 1, leaves, enters, rank, how);
        else rows_of(t, out, in, soon, h, sum, 1, 0, leaves, enters, rank, how);
        for (int twice = 0; twice < 2; twice++) {
            soon.in[twice] += (size_t)n * stride;
            soon.out[twice] += (size_t)n * stride;
        }
        h += n;
    }
}

#define CHUNK_OF(n, name, how)                                                                                                \
    EXC_AVX512 static void name##n(const abreast *t, const rider *out, const rider *in, ahead soon, int64_t h, float *sum) {      \
        if (in && out) chunk(t, out, in, soon, h, sum, 1, 1, n, how);                                                         \
        else if (in) chunk(t, out, in, soon, h, sum, 0, 1, n, how);                                                           \
        else chunk(t, out, in, soon, h, sum, 1, 0, n, how);                                                                   \
    }
#define CHUNKS_OF(n) CHUNK_OF(n, slow, 0) CHUNK_OF(n, fast, FAST) CHUNK_OF(n, whole, FAST | WHOLE)
CHUNKS_OF(1) CHUNKS_OF(2)

/* R W, from the sums of the last chunk and what was settled before */
EXC_AVX512 static void finish(float *c, float *sum, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        settle(sum + i, n, _mm512_load_ps(sum + i));
        _mm512_store_ps(c + i, _mm512_add_ps(_mm512_load_ps(sum + n + i), _mm512_load_ps(sum + 2 * n + i)));
    }
}

/* where the rows `bytes` after row h are: of this matrix or of the one after it */
static const char *later(const char *matrix, const char *next, int64_t h, int64_t rows, size_t stride, size_t bytes) {
    int64_t at = h + (int64_t)((bytes + stride - 1) / stride);
    return at < rows ? matrix + (size_t)at * stride : next + (size_t)((at - rows) % rows) * stride;
}

/* `out` leaves and `in` enters; either may be absent. next: the matrix that comes after `in`. sum [3, rank, cols]. */
static void pass(const abreast *t, const rider *out, rider *in, const char *next, float *sum) {
    const struct exc_project_args *a = t->a;
    const int64_t n = a->rank * a->cols;
    const size_t stride = (size_t)a->cols * 2;
    chunk_fn step = out && out->careful ? t->careful : t->fast;
    if (in) __builtin_memset(sum, 0, (size_t)(3 * n) * sizeof(float));
    _mm_setcsr(_mm_getcsr() & ~(unsigned)_MM_EXCEPT_DENORM);
    for (int64_t h = 0; h < a->rows; h += CHUNK) {
        const char *any = in ? in->src : out->src; /* for want of rows to come: not asked for */
        ahead soon = {{any, any}, {any, any}};
        for (int twice = 0; twice < 2; twice++) {
            if (in) soon.in[twice] = later(in->src, next, h, a->rows, stride, ENTER_AHEAD >> twice);
            if (out) soon.out[twice] = later(out->src, in ? in->src : out->src, h, a->rows, stride, LEAVE_AHEAD >> twice);
        }
        step(t, out, in, soon, h, sum);
    }
    if (!in) return;
    finish(in->c, sum, n);
    in->careful = _mm_getcsr() & _MM_EXCEPT_DENORM || t->least * exc_smallest(in->c, n) < EXC_LEAST_PRODUCT;
}

static void run(void *arg, size_t task, int worker) {
    const abreast *t = arg;
    const struct exc_project_args *a = t->a;
    const int64_t first = (int64_t)task * t->per_task, last = exc_least(first + t->per_task, a->count);
    const unsigned status = _mm_getcsr();
    const int64_t sums = a->rank * a->cols, shares = a->rank * a->rows;
    float *room = t->q->scratch[worker], *work = room + 2 * sums, *share = work + 3 * sums;
    rider pair[2], *out = NULL;
    for (int64_t i = first; i < last; i++) {
        rider *in = &pair[i % 2];
        *in = (rider){exc_edit_src(a, i), exc_edit_dst(a, i), share + i % 2 * shares, room + i % 2 * sums, 0};
        for (int64_t r = 0; r < shares; r++) in->share[r] = a->strength[i] * a->basis[r];
        pass(t, out, in, exc_edit_src(a, i + 1 < last ? i + 1 : i), work);
        out = in;
    }
    if (out) pass(t, out, NULL, NULL, work);
    _mm_sfence();
    _mm_setcsr(status);
}

static int fits(const exc_queue *q, const struct exc_project_args *a) {
    if (exc_isa_level() < EXC_ISA_AVX512 || a->dtype != EXC_BF16 || a->side != EXC_SIDE_OUT) return 0;
    if (a->norm != EXC_NORM_NONE || a->c || a->before || a->after || a->changed || a->nonfinite) return 0;
    if (a->rank > MOST_RANK || a->cols < LINE || a->cols % LINE || a->rows < 1) return 0;
    if ((size_t)(a->rank * (5 * a->cols + 2 * a->rows)) * sizeof(float) > q->scratch_bytes) return 0;
    if ((size_t)(a->rows * a->cols) * 4 > exc_cache_share(q->workers)) return 0; /* two of them are under way */
    for (int64_t i = 0; i < a->count; i++)
        if (a->strength[i] == 0.0f || (uintptr_t)exc_edit_src(a, i) % 64 || (uintptr_t)exc_edit_dst(a, i) % 64) return 0;
    return 1;
}

int exc_abreast_project(exc_queue *q, const struct exc_project_args *a) {
    if (!fits(q, a)) return 0;
    static const chunk_fn slow[] = {slow1, slow2}, fast[] = {fast1, fast2}, whole[] = {whole1, whole2};
    int one = 1;
    for (int64_t i = 0; i < a->count; i++) one &= a->strength[i] == 1.0f;
    abreast t = {.a = a, .q = q, .careful = slow[a->rank - 1], .least = exc_smallest_share(a)};
    t.fast = exc_isa_level() < EXC_ISA_AVX512BF16 ? t.careful : one ? whole[a->rank - 1] : fast[a->rank - 1];
    t.per_task = exc_least(MATRICES, (a->count + 2 * q->workers - 1) / (2 * q->workers));
    if (t.per_task < 1) t.per_task = 1;
    q->parallel(q, exc_task_count(a->count, t.per_task), run, &t);
    return 1;
}

#else
int exc_abreast_project(exc_queue *q, const struct exc_project_args *a) {
    (void)q, (void)a;
    return 0;
}
#endif
