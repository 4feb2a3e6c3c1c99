/* project.c - orthogonalises weight matrices: W <- W - s R^T (R W), rounded once.
 *
 * Memory bound, so every weight crosses the memory bus once in each direction. A task is a strip of up to 128 columns (256
 * bytes of a bf16 row) of one matrix: the first sweep takes c = R W of the strip and leaves it in the second-level cache, where the
 * second sweep finds it, subtracts and rounds. Statistics and column norms are further sweeps of the same strip: they cost
 * arithmetic, no memory traffic. Columns are independent, hence so are tasks; per-strip sums are added in order afterwards.
 *
 * The commonest edit has paths of its own where the machine allows (abreast.c, relay.c), with the same bits.
 *
 * R on the columns (EXC_SIDE_IN) is the same edit of the transposed matrix: 16 rows are turned into a strip of 16 f32 columns,
 * edited there and turned back. Row norms of EXC_SIDE_OUT span all strips: c of a whole matrix first, then row by row. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lanes.h"
#include "relay.h"
#include "requant.h"
#include "abreast.h"

#define CHUNK 64   /* rows of one partial sum of the canonical tree */
#define RANKS 3    /* directions whose sums share registers */
#define STRIP 128  /* columns of a strip; row stride of c */
#define AHEAD 24   /* rows asked for before they are needed */
#define STRETCH 64 /* elements of a row that are turned at once */
#define TURNED 16  /* rows of a transposed tile */
#define MOST_RANK 64
#define TASKS 64   /* at most, so that a task has strips to look ahead to */
#define CARVED ((size_t)1 << 20) /* of the scratch of worker 0: sums of strips */

typedef struct exc_strip {
    const char *src;
    char *dst;
    size_t src_stride, dst_stride; /* bytes between rows */
    int dtype;
    int64_t rows, cols; /* along R and across it */
    const float *basis; /* [rank, rows] */
    int64_t rank;
    float strength;
    float *c, *after;    /* [rank, STRIP]: R W before and after */
    float *length, *left; /* [STRIP]: |column|^2 before and after */
    const float *gain;   /* [STRIP] or NULL */
    int64_t *changed;    /* or NULL */
    const char *next;    /* the strip after this one in memory order of the task, same stride, or NULL */
    int fetched;         /* an earlier update asked for this strip */
} exc_strip;

enum sweep { SWEEP_DOTS, SWEEP_AFTER, SWEEP_LENGTH, SWEEP_LEFT, SWEEP_UPDATE };

/* elements whose bits differ */
static int64_t exc_differing(const void *a, const void *b, int n, int dtype) {
    int32_t count = 0;
    if (dtype == EXC_F32)
        for (int i = 0; i < n; i++) count += ((const uint32_t *)a)[i] != ((const uint32_t *)b)[i];
    else
        for (int i = 0; i < n; i++) count += ((const uint16_t *)a)[i] != ((const uint16_t *)b)[i];
    return count;
}

/* ---- one column at a time, any machine */
EXC_INLINE float load_one(const char *p, int i, int dtype) {
    if (dtype == EXC_F32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return dtype == EXC_BF16 ? exc_from_bf16(h) : exc_from_f16(h);
}
EXC_INLINE void store_one(char *p, int i, float x, int dtype) {
    if (dtype == EXC_F32) ((float *)p)[i] = x;
    else ((uint16_t *)p)[i] = (uint16_t)(dtype == EXC_BF16 ? exc_round_bf16(x) : exc_round_f16(x));
}
static void generic_rest(const exc_strip *s, enum sweep what, int64_t at) { (void)s, (void)what, (void)at; }
#define V float
#define WIDE 1
#define GROUP 8
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#define SET1(x) (x)
#define LOADF(p) (*(p))
#define STOREF(p, v) (*(p) = (v))
#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))
#define LOAD(p, i, dtype) load_one(p, i, dtype)
#define STORE(p, i, v, dtype) store_one(p, i, v, dtype)
#define NAME(x) generic_##x
#define TARGET
#include "strip.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* ---- 8 columns at a time */
#define AVX2 __attribute__((target("avx2,fma,f16c")))
AVX2 EXC_INLINE __m256 load_avx2(const char *p, int i, int dtype) {
    if (dtype == EXC_F32) return _mm256_loadu_ps((const float *)p + i);
    __m128i h = _mm_loadu_si128((const __m128i *)(p + (size_t)i * 2));
    if (dtype == EXC_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
AVX2 EXC_INLINE void store_avx2(char *p, int i, __m256 x, int dtype) {
    __m128i *to = (__m128i *)(p + (size_t)i * 2);
    if (dtype == EXC_F32) _mm256_storeu_ps((float *)p + i, x);
    else if (dtype == EXC_F16) _mm_storeu_si128(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    else {
        __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        __m256i near = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, nan), 16);
        _mm_storeu_si128(to, _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
    }
}
static void avx2_rest(const exc_strip *s, enum sweep what, int64_t at);
#define V __m256
#define WIDE 8
#define GROUP 2
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SET1(x) _mm256_set1_ps(x)
#define LOADF(p) _mm256_loadu_ps(p)
#define STOREF(p, v) _mm256_storeu_ps(p, v)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define LOAD(p, i, dtype) load_avx2(p, i, dtype)
#define STORE(p, i, v, dtype) store_avx2(p, i, v, dtype)
#define NAME(x) avx2_##x
#define TARGET AVX2
#include "strip.h"

/* ---- 16 columns at a time */
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,f16c,prefer-vector-width=512")))
AVX512 EXC_INLINE __m512 load_avx512(const char *p, int i, int dtype) {
    if (dtype == EXC_F32) return _mm512_loadu_ps((const float *)p + i);
    __m256i h = _mm256_loadu_si256((const __m256i *)(p + (size_t)i * 2));
    if (dtype == EXC_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
AVX512 EXC_INLINE void store_avx512(char *p, int i, __m512 x, int dtype) {
    __m256i *to = (__m256i *)(p + (size_t)i * 2);
    if (dtype == EXC_F32) _mm512_storeu_ps((float *)p + i, x);
    else if (dtype == EXC_F16) _mm256_storeu_si256(to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    else {
        __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i near = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        near = _mm512_mask_or_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
    }
}
static void avx512_rest(const exc_strip *s, enum sweep what, int64_t at);
#define V __m512
#define WIDE 16
#define GROUP 8
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SET1(x) _mm512_set1_ps(x)
#define LOADF(p) _mm512_loadu_ps(p)
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define LOAD(p, i, dtype) load_avx512(p, i, dtype)
#define STORE(p, i, v, dtype) store_avx512(p, i, v, dtype)
#define NAME(x) avx512_##x
#define TARGET AVX512
#include "strip.h"

/* ---- the same with the processor's own rounding to bf16, which takes subnormal numbers for zero: those go the long way */
#define AVX512BF16 \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma,f16c,prefer-vector-width=512")))
#define SUBNORMAL 0x20
AVX512BF16 EXC_INLINE void store_bf16(char *p, int i, __m512 x, int dtype) {
    if (dtype != EXC_BF16 || __builtin_expect(_mm512_fpclass_ps_mask(x, SUBNORMAL) != 0, 0)) store_avx512(p, i, x, dtype);
    else _mm256_storeu_si256((__m256i *)(p + (size_t)i * 2), (__m256i)_mm512_cvtneps_pbh(x));
}
#define bf16_rest avx512_rest
#define V __m512
#define WIDE 16
#define GROUP 8
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SET1(x) _mm512_set1_ps(x)
#define LOADF(p) _mm512_loadu_ps(p)
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define LOAD(p, i, dtype) load_avx512(p, i, dtype)
#define STORE(p, i, v, dtype) store_bf16(p, i, v, dtype)
#define NAME(x) bf16_##x
#define TARGET AVX512BF16
#include "strip.h"

/* columns from `at` on, as a strip of their own */
static exc_strip narrowed(const exc_strip *s, int64_t at) {
    exc_strip n = *s;
    size_t off = (size_t)at * (s->dtype == EXC_F32 ? 4 : 2);
    n.src += off, n.dst += off, n.cols -= at;
    n.c += at, n.after += at, n.length += at, n.left += at;
    if (n.gain) n.gain += at;
    return n;
}
static void avx2_rest(const exc_strip *s, enum sweep what, int64_t at) {
    exc_strip n = narrowed(s, at);
    generic_strip(&n, what);
}
static void avx512_rest(const exc_strip *s, enum sweep what, int64_t at) {
    exc_strip n = narrowed(s, at);
    avx2_strip(&n, what);
}
#endif

typedef void (*sweep_fn)(const exc_strip *s, enum sweep what);

static sweep_fn sweep_for(void) {
#if defined(__x86_64__)
    enum exc_isa level = exc_isa_level();
    if (level >= EXC_ISA_AVX512BF16) return bf16_strip;
    if (level >= EXC_ISA_AVX512) return avx512_strip;
    if (level >= EXC_ISA_AVX2) return avx2_strip;
#endif
    return generic_strip;
}

/* ------------------------------------------------------------------------------------------------------ the op */

typedef struct tally {
    double before, after;
    int64_t changed, nonfinite;
} tally;

typedef struct job {
    const struct exc_project_args *a;
    exc_queue *q;
    sweep_fn sweep;
    size_t size;            /* of an element */
    int64_t first;          /* matrix of task 0 */
    int64_t strips, across; /* strips of a matrix, and columns (rows for EXC_SIDE_IN) of one */
    int64_t along, whole;   /* sizes of W along R and across */
    int64_t total, per_task; /* strips of a round; strips of a task, one after the other */
    tally *sums;            /* [matrices of a round, strips] */
    float *shared;          /* [rank, cols]: c of the matrix whose rows are rescaled */
} job;

/* room of one task: c and its successors */
typedef struct room {
    float c[MOST_RANK * STRIP], after[MOST_RANK * STRIP], length[STRIP], left[STRIP], gain[STRIP];
} room;

static int64_t bad_values(const exc_strip *s, const char *w, int dtype) {
    int64_t bad = 0;
    for (int64_t h = 0; h < s->rows; h++) {
        const char *row = w + (size_t)h * s->src_stride;
        int32_t n = 0;
        if (dtype == EXC_F32)
            for (int64_t i = 0; i < s->cols; i++) n += (((const uint32_t *)row)[i] & 0x7f800000u) == 0x7f800000u;
        else {
            uint16_t mask = dtype == EXC_BF16 ? 0x7f80 : 0x7c00;
            for (int64_t i = 0; i < s->cols; i++) n += (((const uint16_t *)row)[i] & mask) == mask;
        }
        bad += n;
    }
    return bad;
}

static double square_sum(const float *c, int64_t rank, int64_t cols) {
    double sum = 0;
    for (int64_t r = 0; r < rank; r++)
        for (int64_t i = 0; i < cols; i++) sum += (double)c[r * STRIP + i] * (double)c[r * STRIP + i];
    return sum;
}

/* what gives a vector back its length; one that lay within R but for rounding has none to give back */
static float gain_of(double before, double after) {
    return after > 1e-10 * before ? (float)sqrt(before / after) : 1.0f;
}

/* all sweeps of a strip but those over its result */
static void edit_strip(const job *j, exc_strip *s, room *m) {
    j->sweep(s, SWEEP_DOTS);
    if (j->a->norm != EXC_NORM_NONE) {
        j->sweep(s, SWEEP_LENGTH);
        j->sweep(s, SWEEP_LEFT);
        for (int64_t i = 0; i < s->cols; i++) m->gain[i] = gain_of((double)m->length[i], (double)m->left[i]);
        s->gain = m->gain;
    }
    j->sweep(s, SWEEP_UPDATE);
}

static exc_strip strip_of(const job *j, int64_t matrix, room *m) {
    const struct exc_project_args *a = j->a;
    return (exc_strip){.dtype = a->dtype, .rows = j->along, .basis = a->basis, .rank = a->rank,
                       .strength = a->strength[matrix], .c = m->c, .after = m->after, .length = m->length, .left = m->left};
}

static void keep_c(const job *j, int64_t matrix, int64_t at, int64_t cols, const room *m) {
    const struct exc_project_args *a = j->a;
    if (!a->c) return;
    for (int64_t r = 0; r < a->rank; r++)
        memcpy(a->c + (matrix * a->rank + r) * j->whole + at, m->c + r * STRIP, (size_t)cols * sizeof(float));
}

/* strength 0: bytes as they are, sums all the same */
static void copy_strip(const exc_strip *s, size_t size) {
    if (s->src == s->dst) return;
    for (int64_t h = 0; h < s->rows; h++)
        memcpy(s->dst + (size_t)h * s->dst_stride, s->src + (size_t)h * s->src_stride, (size_t)s->cols * size);
}

/* where strip `index` of the round begins */
static const char *strip_begin(const job *j, int64_t index) {
    return (const char *)exc_edit_src(j->a, j->first + index / j->strips) + (size_t)(index % j->strips * j->across) * j->size;
}

static void out_strip(const job *j, int64_t index, int64_t last, int fetched, room *m) {
    const struct exc_project_args *a = j->a;
    int64_t matrix = j->first + index / j->strips, at = index % j->strips * j->across;
    tally *t = &j->sums[index];
    exc_strip s = strip_of(j, matrix, m);
    s.next = index + 1 < last ? strip_begin(j, index + 1) : NULL;
    s.fetched = fetched;
    s.cols = exc_least(j->across, j->whole - at);
    s.src = (const char *)exc_edit_src(a, matrix) + (size_t)at * j->size;
    s.dst = (char *)exc_edit_dst(a, matrix) + (size_t)at * j->size;
    s.src_stride = s.dst_stride = (size_t)a->cols * j->size;
    *t = (tally){0};
    if (a->changed) s.changed = &t->changed;
    if (a->nonfinite) t->nonfinite = bad_values(&s, s.src, s.dtype);
    if (s.strength == 0.0f) {
        copy_strip(&s, j->size);
        if (!a->before && !a->after && !a->c) return;
        j->sweep(&s, SWEEP_DOTS);
        t->after = square_sum(m->c, s.rank, s.cols);
    } else {
        edit_strip(j, &s, m);
        if (a->after) {
            j->sweep(&s, SWEEP_AFTER);
            t->after = square_sum(m->after, s.rank, s.cols);
        }
    }
    if (a->before) t->before = square_sum(m->c, s.rank, s.cols);
    keep_c(j, matrix, at, s.cols, m);
}

static void out_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    int64_t first = (int64_t)task * j->per_task, last = exc_least(first + j->per_task, j->total);
    int fetched = 0;
    for (int64_t i = first; i < last; i++) {
        out_strip(j, i, last, fetched, (room *)((char *)j->q->scratch[worker] + CARVED));
        fetched = j->a->strength[j->first + i / j->strips] != 0.0f; /* an update has asked for the next one */
    }
}

/* Rows of W <-> columns of an f32 tile [along, TURNED]: a stretch of a row is converted at once, then spread. */
EXC_INLINE void stretch_in(const char *w, int dtype, int64_t n, float *tile) {
    float x[STRETCH];
    for (int i = 0; i < n; i++) x[i] = load_one(w, i, dtype);
    for (int64_t i = 0; i < n; i++) tile[i * TURNED] = x[i];
}
EXC_INLINE void stretch_out(const float *tile, int dtype, int64_t n, char *w) {
    float x[STRETCH];
    for (int64_t i = 0; i < n; i++) x[i] = tile[i * TURNED];
    for (int i = 0; i < n; i++) store_one(w, i, x[i], dtype);
}
EXC_INLINE void turn_body(const char *w, int dtype, int64_t rows, int64_t along, float *tile) {
    size_t size = dtype == EXC_F32 ? 4 : 2;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < along; h += STRETCH) {
            const char *from = w + (size_t)(i * along + h) * size;
            float *to = tile + h * TURNED + i;
            int64_t n = exc_least(STRETCH, along - h);
            if (dtype == EXC_BF16) stretch_in(from, EXC_BF16, n, to);
            else if (dtype == EXC_F16) stretch_in(from, EXC_F16, n, to);
            else stretch_in(from, EXC_F32, n, to);
        }
}
EXC_DISPATCH(turn, (const char *w, int dtype, int64_t rows, int64_t along, float *tile), (w, dtype, rows, along, tile))

#define BACK_PARAMS (const float *tile, int dtype, int64_t rows, int64_t along, const char *old, char *w, int64_t *changed)
EXC_INLINE void back_body BACK_PARAMS {
    size_t size = dtype == EXC_F32 ? 4 : 2;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < along; h += STRETCH) {
            char now[STRETCH * 4] __attribute__((aligned(64)));
            size_t at = (size_t)(i * along + h) * size;
            const float *from = tile + h * TURNED + i;
            int64_t n = exc_least(STRETCH, along - h);
            if (dtype == EXC_BF16) stretch_out(from, EXC_BF16, n, now);
            else if (dtype == EXC_F16) stretch_out(from, EXC_F16, n, now);
            else stretch_out(from, EXC_F32, n, now);
            *changed += exc_differing(now, old + at, (int)n, dtype);
            memcpy(w + at, now, (size_t)n * size);
        }
}
EXC_DISPATCH(back, BACK_PARAMS, (tile, dtype, rows, along, old, w, changed))

static void in_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_project_args *a = j->a;
    room *m = (room *)((char *)j->q->scratch[worker] + CARVED);
    float *tile = (float *)(m + 1);
    int64_t matrix = j->first + (int64_t)task / j->strips, at = (int64_t)task % j->strips * j->across;
    int64_t rows = exc_least(j->across, j->whole - at);
    size_t off = (size_t)(at * j->along) * j->size, bytes = (size_t)(rows * j->along) * j->size;
    const char *src = (const char *)exc_edit_src(a, matrix) + off;
    char *dst = (char *)exc_edit_dst(a, matrix) + off;
    tally *t = &j->sums[task];
    exc_strip s = strip_of(j, matrix, m);
    s.dtype = EXC_F32;
    s.cols = rows;
    s.src = (char *)tile;
    s.dst = (char *)tile;
    s.src_stride = s.dst_stride = TURNED * sizeof(float);
    *t = (tally){0};
    int idle = s.strength == 0.0f;
    if (idle && dst != src) memcpy(dst, src, bytes);
    if (idle && !a->before && !a->after && !a->c && !a->nonfinite) return;
    turn_for()(src, a->dtype, rows, j->along, tile);
    if (a->nonfinite) t->nonfinite = bad_values(&s, s.src, EXC_F32);
    if (idle) j->sweep(&s, SWEEP_DOTS);
    else {
        edit_strip(j, &s, m);
        back_for()(tile, a->dtype, rows, j->along, src, dst, &t->changed);
    }
    t->before = t->after = square_sum(m->c, s.rank, rows);
    if (a->after && !idle) {
        turn_for()(dst, a->dtype, rows, j->along, tile);
        j->sweep(&s, SWEEP_AFTER);
        t->after = square_sum(m->after, s.rank, rows);
    }
    keep_c(j, matrix, at, rows, m);
}

/* ---- row norms of EXC_SIDE_OUT: one matrix at a time, c of all its strips, then blocks of its rows */
static void row_dots_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_project_args *a = j->a;
    room *m = (room *)((char *)j->q->scratch[worker] + CARVED);
    int64_t at = (int64_t)task * j->across;
    exc_strip s = strip_of(j, j->first, m);
    tally *t = &j->sums[task];
    s.cols = exc_least(j->across, j->whole - at);
    s.src = (const char *)exc_edit_src(a, j->first) + (size_t)at * j->size;
    s.src_stride = (size_t)a->cols * j->size;
    *t = (tally){0};
    if (a->nonfinite) t->nonfinite = bad_values(&s, s.src, s.dtype);
    j->sweep(&s, SWEEP_DOTS);
    t->before = square_sum(m->c, s.rank, s.cols);
    for (int64_t r = 0; r < s.rank; r++)
        memcpy(j->shared + r * a->cols + at, m->c + r * STRIP, (size_t)s.cols * sizeof(float));
    keep_c(j, j->first, at, s.cols, m);
}

EXC_INLINE void subtract_body(float *row, const float *c, float k, int64_t n) {
    for (int64_t i = 0; i < n; i++) row[i] = __builtin_fmaf(k, c[i], row[i]); /* as the update of strips */
}
EXC_DISPATCH(subtract, (float *row, const float *c, float k, int64_t n), (row, c, k, n))

EXC_INLINE void square_body(const float *x, int64_t n, double *out) {
    double lane[LANES] = {0}, s = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += (double)x[i + l] * (double)x[i + l];
    for (; i < n; i++) s += (double)x[i] * (double)x[i];
    for (int l = 0; l < LANES; l++) s += lane[l];
    *out = s;
}
EXC_DISPATCH(square, (const float *x, int64_t n, double *out), (x, n, out))

#define ROW_BLOCK 16
static void rows_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_project_args *a = j->a;
    float *row = (float *)((char *)j->q->scratch[worker] + CARVED), *delta = row + a->cols;
    int64_t first = (int64_t)task * ROW_BLOCK, last = exc_least(first + ROW_BLOCK, a->rows), I = a->cols;
    int64_t *changed = (int64_t *)((char *)j->q->scratch[0]) + task;
    *changed = 0;
    for (int64_t h = first; h < last; h++) {
        const char *from = (const char *)exc_edit_src(a, j->first) + (size_t)(h * I) * j->size;
        char *to = (char *)exc_edit_dst(a, j->first) + (size_t)(h * I) * j->size;
        double before, after;
        exc_load_row(from, a->dtype, I, row);
        square_for()(row, I, &before);
        memset(delta, 0, (size_t)I * sizeof *delta);
        for (int64_t r = 0; r < a->rank; r++)
            subtract_for()(delta, j->shared + r * I, a->strength[j->first] * a->basis[r * a->rows + h], I);
        for (int64_t i = 0; i < I; i++) row[i] -= delta[i];
        square_for()(row, I, &after);
        float g = gain_of(before, after);
        for (int64_t i = 0; i < I; i++) {
            char one[4];
            store_one(one, 0, row[i] * g, a->dtype);
            *changed += memcmp(one, from + (size_t)i * j->size, j->size) != 0;
            memcpy(to + (size_t)i * j->size, one, j->size);
        }
    }
}

static void row_after_run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_project_args *a = j->a;
    room *m = (room *)((char *)j->q->scratch[worker] + CARVED);
    int64_t at = (int64_t)task * j->across;
    exc_strip s = strip_of(j, j->first, m);
    s.cols = exc_least(j->across, j->whole - at);
    s.dst = (char *)exc_edit_dst(a, j->first) + (size_t)at * j->size;
    s.dst_stride = (size_t)a->cols * j->size;
    j->sweep(&s, SWEEP_AFTER);
    j->sums[task].after = square_sum(m->after, s.rank, s.cols);
}

static void collect(const job *j, int64_t matrices) {
    const struct exc_project_args *a = j->a;
    for (int64_t i = 0; i < matrices; i++) {
        tally all = {0};
        for (int64_t s = 0; s < j->strips; s++) {
            const tally *t = &j->sums[i * j->strips + s];
            all.before += t->before, all.after += t->after;
            all.changed += t->changed, all.nonfinite += t->nonfinite;
        }
        if (a->before) a->before[j->first + i] = all.before;
        if (a->after) a->after[j->first + i] = all.after;
        if (a->changed) a->changed[j->first + i] = all.changed;
        if (a->nonfinite) a->nonfinite[j->first + i] = all.nonfinite;
    }
}

/* the first half of the carved block counts changes by block of rows, the second holds the sums of strips */
static exc_status row_norms(job *j) {
    const struct exc_project_args *a = j->a;
    int64_t blocks = (a->rows + ROW_BLOCK - 1) / ROW_BLOCK;
    size_t half = CARVED / 2;
    if ((size_t)blocks * 8 > half || (size_t)j->strips * sizeof(tally) > half) return EXC_ERR_USAGE;
    size_t c = (size_t)(a->rank * a->cols) * sizeof(float), own = sizeof(room) + (size_t)(2 * a->cols) * sizeof(float);
    if (CARVED + own + c > j->q->scratch_bytes) return EXC_ERR_USAGE;
    j->sums = (tally *)((char *)j->q->scratch[0] + half);
    j->shared = (float *)((char *)j->q->scratch[0] + CARVED + own);
    for (j->first = 0; j->first < a->count; j->first++) {
        j->total = j->strips, j->per_task = 1;
        if (a->strength[j->first] == 0.0f) {
            j->q->parallel(j->q, (size_t)j->strips, out_run, j);
            collect(j, 1);
            continue;
        }
        int64_t changed = 0;
        j->q->parallel(j->q, (size_t)j->strips, row_dots_run, j);
        j->q->parallel(j->q, (size_t)blocks, rows_run, j);
        if (a->after) j->q->parallel(j->q, (size_t)j->strips, row_after_run, j);
        for (int64_t b = 0; b < blocks; b++) changed += ((int64_t *)j->q->scratch[0])[b];
        collect(j, 1);
        if (a->changed) a->changed[j->first] = changed;
    }
    return EXC_OK;
}

exc_status exc_cpu_project(exc_queue *q, const struct exc_project_args *a) {
    if (a->count < 0 || a->rows < 0 || a->cols < 0 || a->rank < 1 || a->rank > MOST_RANK) return EXC_ERR_USAGE;
    if (a->norm < EXC_NORM_NONE || a->norm > EXC_NORM_ROW) return EXC_ERR_USAGE;
    if (a->side != EXC_SIDE_OUT && a->side != EXC_SIDE_IN) return EXC_ERR_USAGE;
    if (exc_requant_wanted(a->dtype, a->rounding)) return exc_requant_project(q, a);
    if (a->dtype != EXC_BF16 && a->dtype != EXC_F16 && a->dtype != EXC_F32) return EXC_ERR_USAGE;
    if (exc_abreast_project(q, a) || exc_relay_project(q, a)) return EXC_OK;
    int out = a->side == EXC_SIDE_OUT;
    job j = {.a = a, .q = q, .sweep = sweep_for(), .size = a->dtype == EXC_F32 ? 4 : 2, .sums = q->scratch[0]};
    j.across = out ? STRIP * 2 / (int64_t)j.size : TURNED;
    j.along = out ? a->rows : a->cols;
    j.whole = out ? a->cols : a->rows;
    j.strips = (j.whole + j.across - 1) / j.across;
    if (!out && CARVED + sizeof(room) + (size_t)j.along * TURNED * sizeof(float) > q->scratch_bytes) return EXC_ERR_USAGE;
    if (out && a->norm == EXC_NORM_ROW) return row_norms(&j);
    int64_t at_once = j.strips ? (int64_t)(CARVED / sizeof(tally)) / j.strips : a->count;
    if (at_once < 1 && a->count > 0) return EXC_ERR_USAGE;
    for (j.first = 0; j.first < a->count; j.first += at_once) {
        int64_t n = exc_least(at_once, a->count - j.first);
        j.total = n * j.strips;
        j.per_task = out && j.total > TASKS ? (j.total + TASKS - 1) / TASKS : 1;
        q->parallel(q, exc_task_count(j.total, j.per_task), out ? out_run : in_run, &j);
        collect(&j, n);
    }
    return EXC_OK;
}
