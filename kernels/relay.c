/* relay.c - the common edit at the speed of memory: bf16 in either place, R on the rows, rank 1..8, no sums asked for.
 *
 * A strip of 128 columns needs two sweeps, R W and then the subtraction, and strided rows of a power of two crowd a few sets of
 * the second-level cache: the strip is gone when the second sweep comes. So the first sweep also copies the strip to a dense
 * buffer of the worker (512 KiB at 2048 rows), which stays, and the second reads the buffer and writes past the caches. Two
 * sweeps that only read and only write leave the memory bus half idle, hence the relay: row by row the finished strip leaves the
 * buffer and the next strip takes its place, so that every step reads one row piece from memory and writes one to it.
 *
 * Share of the best in-place loop, 128 x [2048, 768], 2 threads of a Zen 4 server, medians of one run: two sweeps 0.47,
 * whole matrices through the last-level cache 0.59, relay with ordinary stores 0.68, past the caches 0.78, rows asked for 40
 * ahead instead of 64 0.75, never asked for 0.64, strips of 256 columns 0.71. Where memory is faster than about 30 GB/s for
 * both threads, arithmetic is what is left.
 *
 * Even and odd columns of 32 sit in two vectors, a shift and a mask away from the bf16 pairs in memory. A column's operations
 * are those of strip.h in the same order, so the bits are the same. */
#include "relay.h"

#include "lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define CHUNK 64    /* rows of one partial sum of the canonical tree */
#define RANKS 3     /* directions whose sums share registers */
#define MOST_RANK 8
#define STRIP 128   /* columns */
#define LINES 4     /* 64-byte vectors of a row of the strip */
#define HALVES (2 * LINES)
#define AHEAD 64    /* rows asked for before they are needed */
#define MOST_ROWS 4096
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")))

/* a strip on its way: where it goes, and R W by half line */
typedef struct runner {
    const uint16_t *src;
    uint16_t *dst;
    float strength;
    int calm; /* no NaN can come of it */
    __m512 c[MOST_RANK][HALVES];
} runner;

typedef struct relay {
    const struct exc_project_args *a;
    exc_queue *q;
    int64_t strips, per_task, across; /* of all matrices, of a task, of a matrix */
    int tame;                         /* R and strengths are of ordinary size */
} relay;

AVX512 EXC_INLINE __m512 even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
AVX512 EXC_INLINE __m512 odd(__m512i x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u)));
}

/* to nearest even, the result in the upper halves */
AVX512 EXC_INLINE __m512i rounded(__m512 x, int calm) {
    __m512i u = _mm512_castps_si512(x);
    __mmask16 up = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    __m512i half = _mm512_mask_blend_epi32(up, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    __m512i near = _mm512_add_epi32(u, half);
    if (calm) return near;
    return _mm512_mask_or_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
}
AVX512 EXC_INLINE __m512i joined(__m512 low, __m512 high, int calm) {
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(rounded(low, calm), 16), 0xaaaaaaaau, rounded(high, calm));
}

AVX512 EXC_INLINE void two_sum(__m512 *hi, __m512 *lo, __m512 x) {
    __m512 s = _mm512_add_ps(*hi, x), b = _mm512_sub_ps(s, *hi);
    __m512 e = _mm512_add_ps(_mm512_sub_ps(*hi, _mm512_sub_ps(s, b)), _mm512_sub_ps(x, b));
    *hi = s;
    *lo = _mm512_add_ps(*lo, e);
}

/* sums of a column become R W */
AVX512 EXC_INLINE void settle(runner *in, int first, int ranks, __m512 hi[RANKS][HALVES], __m512 lo[RANKS][HALVES]) {
    __mmask16 ordinary = 0xffff;
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < HALVES; v++) {
            __m512 c = _mm512_add_ps(hi[r][v], lo[r][v]);
            in->c[first + r][v] = c;
            ordinary &= _mm512_cmp_ps_mask(_mm512_abs_ps(c), _mm512_set1_ps(1e30f), _CMP_LT_OQ);
        }
    in->calm &= ordinary == 0xffff;
}

/* One pass over the buffer: `out` leaves it row by row with `all` directions, `in` enters and meets the first `ranks`; either may
 * be absent. */
AVX512 EXC_INLINE void pass(const struct exc_project_args *a, __m512i *buffer, const runner *out, runner *in, int leaves,
                            int enters, int ranks, int all, int calm) {
    __m512 hi[RANKS][HALVES], lo[RANKS][HALVES], p[RANKS][HALVES];
    /* copies, as stores of vectors might otherwise change what they were read from */
    const size_t stride = (size_t)a->cols;
    const int64_t rows = a->rows;
    const float *basis = a->basis;
    const float strength = leaves ? out->strength : 0.0f;
    const uint16_t *src = enters ? in->src : NULL;
    uint16_t *dst = leaves ? out->dst : NULL;
    __m512 few[RANKS][HALVES];
    for (int r = 0; leaves && all <= RANKS && r < all; r++)
        for (int v = 0; v < HALVES; v++) few[r][v] = out->c[r][v];
    const __m512(*c)[HALVES] = leaves && all > RANKS ? out->c : (const __m512(*)[HALVES])few;
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < HALVES; v++) hi[r][v] = lo[r][v] = _mm512_setzero_ps();
    for (int64_t first = 0; first < rows; first += CHUNK) {
        int64_t last = exc_least(first + CHUNK, rows);
        _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++)
            _Pragma("GCC unroll 8") for (int v = 0; v < HALVES; v++) p[r][v] = _mm512_setzero_ps();
        for (int64_t h = first; h < last; h++) {
            __m512i *held = buffer + h * LINES;
            __m512 k[RANKS], ks[MOST_RANK];
            _Pragma("GCC unroll 8") for (int r = 0; r < all; r++) {
                float b = basis[r * rows + h];
                if (enters && r < ranks) k[r] = _mm512_set1_ps(b);
                if (leaves) ks[r] = _mm512_set1_ps(strength * b);
            }
            _Pragma("GCC unroll 8") for (int g = 0; g < LINES; g++) {
                if (leaves) {
                    __m512i x = held[g];
                    __m512 d0 = _mm512_setzero_ps(), d1 = _mm512_setzero_ps();
                    _Pragma("GCC unroll 8") for (int r = 0; r < all; r++) {
                        d0 = _mm512_fmadd_ps(ks[r], c[r][2 * g], d0);
                        d1 = _mm512_fmadd_ps(ks[r], c[r][2 * g + 1], d1);
                    }
                    x = joined(_mm512_sub_ps(even(x), d0), _mm512_sub_ps(odd(x), d1), calm);
                    _mm512_stream_si512((__m512i *)(dst + (size_t)h * stride) + g, x);
                }
                if (enters) {
                    const __m512i *from = (const __m512i *)(src + (size_t)h * stride) + g;
                    __m512i x = _mm512_load_si512(from);
                    __builtin_prefetch((const char *)from + AHEAD * stride * sizeof *src, 0, 2);
                    held[g] = x;
                    _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++) {
                        p[r][2 * g] = _mm512_fmadd_ps(k[r], even(x), p[r][2 * g]);
                        p[r][2 * g + 1] = _mm512_fmadd_ps(k[r], odd(x), p[r][2 * g + 1]);
                    }
                }
            }
        }
        if (!enters) continue;
        _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++)
            _Pragma("GCC unroll 8") for (int v = 0; v < HALVES; v++) two_sum(&hi[r][v], &lo[r][v], p[r][v]);
    }
    if (enters) settle(in, 0, ranks, hi, lo);
}

/* further directions of the strip that has entered, from the buffer */
AVX512 EXC_INLINE void meet(const struct exc_project_args *a, const __m512i *buffer, runner *in, int at, int ranks) {
    __m512 hi[RANKS][HALVES], lo[RANKS][HALVES], p[RANKS][HALVES];
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < HALVES; v++) hi[r][v] = lo[r][v] = _mm512_setzero_ps();
    for (int64_t first = 0; first < a->rows; first += CHUNK) {
        int64_t last = exc_least(first + CHUNK, a->rows);
        _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++)
            _Pragma("GCC unroll 8") for (int v = 0; v < HALVES; v++) p[r][v] = _mm512_setzero_ps();
        for (int64_t h = first; h < last; h++) {
            __m512 k[RANKS];
            _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++) k[r] = _mm512_set1_ps(a->basis[(at + r) * a->rows + h]);
            _Pragma("GCC unroll 8") for (int g = 0; g < LINES; g++) {
                __m512i x = buffer[h * LINES + g];
                _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++) {
                    p[r][2 * g] = _mm512_fmadd_ps(k[r], even(x), p[r][2 * g]);
                    p[r][2 * g + 1] = _mm512_fmadd_ps(k[r], odd(x), p[r][2 * g + 1]);
                }
            }
        }
        _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++)
            _Pragma("GCC unroll 8") for (int v = 0; v < HALVES; v++) two_sum(&hi[r][v], &lo[r][v], p[r][v]);
    }
    settle(in, at, ranks, hi, lo);
}

AVX512 EXC_INLINE void step(const struct exc_project_args *a, __m512i *buffer, const runner *out, runner *in, int all) {
    int ranks = all < RANKS ? all : RANKS;
    if (!out) pass(a, buffer, out, in, 0, 1, ranks, all, 1);
    else if (!in) pass(a, buffer, out, in, 1, 0, ranks, all, 0);
    else if (out->calm) pass(a, buffer, out, in, 1, 1, ranks, all, 1);
    else pass(a, buffer, out, in, 1, 1, ranks, all, 0);
    if (!in) return;
    if (all > 3) meet(a, buffer, in, 3, all < 6 ? all - 3 : 3);
    if (all > 6) meet(a, buffer, in, 6, all - 6);
}

typedef void (*step_fn)(const struct exc_project_args *a, __m512i *buffer, const runner *out, runner *in);
#define STEP(n)                                                                                                     \
    AVX512 static void step##n(const struct exc_project_args *a, __m512i *buffer, const runner *out, runner *in) {  \
        step(a, buffer, out, in, n);                                                                                \
    }
STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8)

AVX512 static void relay_task(void *arg, size_t task, int worker) {
    static const step_fn steps[MOST_RANK] = {step1, step2, step3, step4, step5, step6, step7, step8};
    const relay *j = arg;
    const struct exc_project_args *a = j->a;
    runner pair[2], *out = NULL, *in = pair;
    int64_t first = (int64_t)task * j->per_task, last = exc_least(first + j->per_task, j->strips);
    for (int64_t i = first; i < last; i++) {
        int64_t matrix = i / j->across, at = i % j->across * STRIP;
        in->src = (const uint16_t *)exc_edit_src(a, matrix) + at;
        in->dst = (uint16_t *)exc_edit_dst(a, matrix) + at;
        in->strength = a->strength[matrix];
        in->calm = j->tame;
        steps[a->rank - 1](a, j->q->scratch[worker], out, in);
        out = in;
        in = &pair[out == pair];
    }
    if (out) steps[a->rank - 1](a, j->q->scratch[worker], out, NULL);
    _mm_sfence();
}

/* With these bounds, R W below 1e30 and hence finite weights, W - s R^T (R W) is no NaN. */
static int tame(const struct exc_project_args *a) {
    int fine = 1;
    for (int64_t i = 0; i < a->count; i++) fine &= __builtin_fabsf(a->strength[i]) < 1e3f;
    for (int64_t i = 0; i < a->rank * a->rows; i++) fine &= __builtin_fabsf(a->basis[i]) < 1e2f;
    return fine;
}

static int fits(const exc_queue *q, const struct exc_project_args *a) {
    if (exc_isa_level() < EXC_ISA_AVX512 || a->dtype != EXC_BF16 || a->side != EXC_SIDE_OUT) return 0;
    if (a->norm != EXC_NORM_NONE || a->c || a->before || a->after || a->changed || a->nonfinite) return 0;
    if (a->rank > MOST_RANK || a->cols % STRIP || a->rows > MOST_ROWS) return 0;
    if ((size_t)a->rows * STRIP * sizeof(uint16_t) > q->scratch_bytes) return 0;
    for (int64_t i = 0; i < a->count; i++)
        if (a->strength[i] == 0.0f || (uintptr_t)exc_edit_src(a, i) % 64 || (uintptr_t)exc_edit_dst(a, i) % 64) return 0;
    return 1;
}

/* A task begins and ends with a pass that only reads or writes: as few and long as keep all workers busy. Columns are
 * independent, so their number changes no bits. */
int exc_relay_project(exc_queue *q, const struct exc_project_args *a) {
    if (!fits(q, a)) return 0;
    relay j = {.a = a, .q = q, .across = a->cols / STRIP, .tame = tame(a)};
    j.strips = j.across * a->count;
    j.per_task = exc_least(48, j.strips / (8 * q->workers));
    if (j.per_task < 1) j.per_task = 1;
    q->parallel(q, exc_task_count(j.strips, j.per_task), relay_task, &j);
    return 1;
}

#else
int exc_relay_project(exc_queue *q, const struct exc_project_args *a) {
    (void)q, (void)a;
    return 0;
}
#endif
