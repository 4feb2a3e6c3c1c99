/* relay.c - the common edit at the speed of memory: bf16 in either place, R on the rows, rank 1..8, no sums asked for.
 *
 * A strip of 128 columns needs two sweeps, R W and then the subtraction, and strided rows of a power of two crowd a few sets of
 * the second-level cache: the strip is gone when the second sweep comes. So the first sweep also copies the strip to a dense
 * buffer of the worker (512 KiB at 2048 rows), which stays, and the second reads the buffer and writes past the caches. Two
 * sweeps that only read and only write leave the memory bus half idle, hence the relay: row by row the finished strip leaves the
 * buffer and the next strip takes its place, so that every step reads one row piece from memory and writes one to it.
 *
 * What bounds it on a Zen 4 server, in core cycles a line of 64 bytes and thread, where the best in-place loop takes 9: the bare way of
 * the bytes through the buffer and past the caches. At rank 3 the whole takes 16, as much without its multiply-adds, 14 without
 * its writes, and the arithmetic on rows in the first-level cache 13 (12 multiply-adds, one a cycle; the rest is widening,
 * rounding and broadcasts, which share ports with them). Some 32 lines can be on their way at a time, and asking for them
 * unevenly is worse than slowly (pace); a core that sees four neighbours read asks for more by itself, in vain (width). Lines of a
 * strip spread over the row, strips that stay in the caches and are edited there, and lines asked for twice gain nothing at rank
 * 3. Matrices that fit the last-level cache have a better way at rank 1 and 2 (abreast.c); at rank 3 it is slower while memory is
 * fast.
 *
 * R W is summed by even and odd columns of a line, a shift and a mask away from the bf16 pairs in memory, and subtracted in their
 * order, which is what the processor's own rounding wants. A column's operations are those of strip.h in the same order, so the
 * bits are the same. */
#include "relay.h"

#include "lanes.h"

#if defined(__x86_64__)
#define CHUNK 64     /* rows of one partial sum of the canonical tree */
#define MOST_RANK 8
#define LINE 32      /* columns of a 64-byte line */
#define STRIP 128    /* columns, at most: where arithmetic is what takes time, two lines wait less for memory than four */
#define WIDTH(rank) ((rank) <= 2 ? STRIP : 64)
#define AHEAD 64     /* rows asked for before they are needed */
#define PACE 10      /* steps of four cycles between rows, at rank 1 */
#define MOST_ROWS 4096
#define BUFFER ((size_t)MOST_ROWS * STRIP * sizeof(uint16_t)) /* of the scratch; shares follow */

/* a strip on its way: where it goes, and R W by rank and column */
typedef struct runner {
    const char *src;
    char *dst;
    const float *share; /* [rank, rows], strength * R */
    int careful; /* a result may be subnormal */
    float c[MOST_RANK * STRIP] __attribute__((aligned(64)));
} runner;

typedef struct relay relay;
typedef void (*pass_fn)(const relay *j, char *buffer, const runner *out, runner *in, const char *next);
struct relay {
    const struct exc_project_args *a;
    exc_queue *q;
    int64_t width, strips, per_task, across; /* columns of a strip; strips of all matrices, of a task, of a matrix */
    pass_fn fast, careful;
    float least; /* share of R, but zero */
};

/* columns 0..15 or 16..31 of a line as floats: words go to upper halves */
EXC_AVX512 EXC_INLINE __m512 left(__m512i x) {
    const __m512i from = _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000, 0x70000,
                                          0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, x));
}
EXC_AVX512 EXC_INLINE __m512 right(__m512i x) {
    const __m512i from = _mm512_set_epi32(0x1f0000, 0x1e0000, 0x1d0000, 0x1c0000, 0x1b0000, 0x1a0000, 0x190000, 0x180000, 0x170000,
                                          0x160000, 0x150000, 0x140000, 0x130000, 0x120000, 0x110000, 0x100000);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, x));
}

EXC_AVX512 EXC_INLINE __m512i joined(__m512 l, __m512 r) {
    __m512i x = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(exc_rounded(l), 16)));
    return _mm512_inserti64x4(x, _mm512_cvtepi32_epi16(_mm512_srli_epi32(exc_rounded(r), 16)), 1);
}
/* The instruction by name: all else here is the same with and without it. */
EXC_AVX512 EXC_INLINE __m512i joined_fast(__m512 l, __m512 r) {
    __m512i x;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(x) : "v"(l), "v"(r));
    return x;
}

/* Requests that come faster than memory answers are dropped, and a line that was asked for in vain stalls everything later. So
 * rows are kept apart by a chain of n multiply-adds, four cycles each, that nothing else waits for. */
EXC_AVX512 EXC_INLINE void pace(__m128 *chain, int n) {
    for (int i = 0; i < n; i++) __asm__ volatile("vfmadd231ss %0, %0, %0" : "+v"(*chain));
}

EXC_AVX512 EXC_INLINE void two_sum(float *hi, float *lo, __m512 x) {
    __m512 h = _mm512_load_ps(hi), s = _mm512_add_ps(h, x), b = _mm512_sub_ps(s, h);
    __m512 e = _mm512_add_ps(_mm512_sub_ps(h, _mm512_sub_ps(s, b)), _mm512_sub_ps(x, b));
    _mm512_store_ps(hi, s);
    _mm512_store_ps(lo, _mm512_add_ps(_mm512_load_ps(lo), e));
}

enum { FAST = 1, WHOLE = 2 }; /* the processor rounds to bf16; strength 1 */

/* What a sweep over a chunk of a few lines works on. */
typedef struct sweep {
    const char *src, *next; /* of the strip that enters; rows that are asked for meanwhile */
    char *dst, *held;       /* of the strip that leaves; both strips' place in the buffer */
    size_t stride;
    int64_t n, rows;
    const float *basis, *share, *c;
    float *hi, *lo;
} sweep;

/* Row by row the old strip leaves the buffer, less its share of R, and the new one takes its place and meets R: hi + lo += its R
 * W, even columns before odd ones. */
EXC_AVX512 EXC_INLINE void cross(sweep w, int leaves, int enters, int rank, int lines, int how) {
    __m512 s[MOST_RANK][8], c[MOST_RANK][8], b[MOST_RANK], k[MOST_RANK];
    __m128 chain = _mm_setzero_ps();
    _Pragma("GCC unroll 8") for (int r = 0; r < rank; r++)
        _Pragma("GCC unroll 8") for (int v = 0; v < 2 * lines; v++) {
            s[r][v] = _mm512_setzero_ps();
            if (leaves) c[r][v] = _mm512_load_ps(w.c + r * STRIP + v * 16);
        }
    for (int64_t h = 0; h < w.n; h++) {
        size_t at = (size_t)h * w.stride;
        __m512i *held = (__m512i *)(w.held + h * 2 * WIDTH(rank));
        if (rank == 1) pace(&chain, PACE);
        _Pragma("GCC unroll 8") for (int r = 0; r < rank; r++) {
            if (enters) b[r] = _mm512_set1_ps(w.basis[r * w.rows + h]);
            if (leaves) k[r] = how & WHOLE && enters ? b[r] : _mm512_set1_ps(w.share[r * w.rows + h]);
        }
        _Pragma("GCC unroll 8") for (int g = 0; g < lines; g++) {
            if (leaves) {
                __m512i x = held[g], y;
                __m512 l = _mm512_setzero_ps(), t = l;
                _Pragma("GCC unroll 8") for (int r = 0; r < rank; r++) {
                    l = _mm512_fmadd_ps(k[r], c[r][2 * g], l);
                    t = _mm512_fmadd_ps(k[r], c[r][2 * g + 1], t);
                }
                l = _mm512_sub_ps(left(x), l);
                t = _mm512_sub_ps(right(x), t);
                y = how & FAST ? joined_fast(l, t) : joined(l, t);
                _mm512_stream_si512((__m512i *)(w.dst + at) + g, y);
            }
            if (enters) {
                __m512i x = _mm512_load_si512((const __m512i *)(w.src + at) + g);
                __builtin_prefetch(w.next + at + 64 * g, 0, 2);
                held[g] = x;
                _Pragma("GCC unroll 8") for (int r = 0; r < rank; r++) {
                    s[r][2 * g] = _mm512_fmadd_ps(b[r], exc_even(x), s[r][2 * g]);
                    s[r][2 * g + 1] = _mm512_fmadd_ps(b[r], exc_odd(x), s[r][2 * g + 1]);
                }
            }
        }
    }
    _Pragma("GCC unroll 8") for (int r = 0; enters && r < rank; r++)
        _Pragma("GCC unroll 8") for (int v = 0; v < 2 * lines; v++)
            two_sum(w.hi + r * STRIP + v * 16, w.lo + r * STRIP + v * 16, s[r][v]);
}

/* R W, columns in their order */
EXC_AVX512 EXC_INLINE void settle(float *c, const float *hi, const float *lo, int64_t n) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    for (int64_t i = 0; i < n; i += LINE) {
        __m512 l = _mm512_add_ps(_mm512_load_ps(hi + i), _mm512_load_ps(lo + i));
        __m512 r = _mm512_add_ps(_mm512_load_ps(hi + i + 16), _mm512_load_ps(lo + i + 16));
        _mm512_store_ps(c + i, _mm512_permutex2var_ps(l, first, r));
        _mm512_store_ps(c + i + 16, _mm512_permutex2var_ps(l, second, r));
    }
}

/* One pass over the buffer: chunk by chunk `out` leaves it and `in` takes its place; either may be absent. next: the strip that
 * comes after `in`. */
EXC_AVX512 EXC_INLINE void pass(const relay *j, char *buffer, const runner *out, runner *in, const char *next, int rank, int how) {
    const struct exc_project_args *a = j->a;
    const int lines = rank <= 2 ? 4 : rank <= 6 ? 2 : 1; /* as many as registers hold */
    const int64_t rows = a->rows;
    const size_t stride = (size_t)a->cols * 2;
    float hi[MOST_RANK * STRIP] __attribute__((aligned(64))), lo[MOST_RANK * STRIP] __attribute__((aligned(64)));
    if (in) __builtin_memset(hi, 0, sizeof hi), __builtin_memset(lo, 0, sizeof lo);
    for (int64_t h = 0; h < rows; h += CHUNK) {
        int64_t n = exc_least(CHUNK, rows - h);
        const char *soon = buffer; /* asked for in vain where nothing is to come */
        size_t off = (size_t)h * stride;
        if (in) soon = h + AHEAD < rows ? in->src + off + AHEAD * stride : next + (off + AHEAD * stride - rows * stride);
        for (int at = 0; at < 2 * WIDTH(rank); at += 64 * lines) {
            sweep w = {.next = soon + at, .held = buffer + h * 2 * WIDTH(rank) + at, .stride = stride, .n = n, .rows = rows,
                       .basis = a->basis + h, .hi = hi + at / 2, .lo = lo + at / 2};
            if (in) w.src = in->src + off + at;
            if (out) w.dst = out->dst + off + at, w.c = out->c + at / 2, w.share = out->share + h;
            if (in && out) cross(w, 1, 1, rank, lines, how);
            else if (in) cross(w, 0, 1, rank, lines, how);
            else cross(w, 1, 0, rank, lines, how);
        }
    }
    if (in) settle(in->c, hi, lo, rank * STRIP); /* zeros where a strip is narrower */
}

#define PASS(n, name, how)                                                                                               \
    EXC_AVX512 static void name##n(const relay *j, char *buffer, const runner *out, runner *in, const char *next) {         \
        pass(j, buffer, out, in, next, n, how);                                                                          \
    }
#define PASSES(n) PASS(n, pass, 0) PASS(n, fast, FAST) PASS(n, whole, FAST | WHOLE)
PASSES(1) PASSES(2) PASSES(3) PASSES(4) PASSES(5) PASSES(6) PASSES(7) PASSES(8)

/* in goes fast if it can: its products with R are no smaller than allowed, and arithmetic met no subnormal number */
static void hand_over(const relay *j, char *buffer, const runner *out, runner *in, const char *next) {
    const int64_t rank = j->a->rank;
    _mm_setcsr(_mm_getcsr() & ~(unsigned)_MM_EXCEPT_DENORM);
    (out && out->careful ? j->careful : j->fast)(j, buffer, out, in, next);
    if (!in) return;
    in->careful = _mm_getcsr() & _MM_EXCEPT_DENORM || j->least * exc_smallest(in->c, rank * STRIP) < EXC_LEAST_PRODUCT;
}

static const char *strip_at(const relay *j, int64_t i) {
    return (const char *)exc_edit_src(j->a, i / j->across) + i % j->across * 2 * j->width;
}

/* strength * R: R itself where it can be */
static const float *share_of(const struct exc_project_args *a, float strength, float *room) {
    if (strength == 1.0f) return a->basis;
    for (int64_t i = 0; i < a->rank * a->rows; i++) room[i] = strength * a->basis[i];
    return room;
}

EXC_AVX512 static void relay_task(void *arg, size_t task, int worker) {
    const relay *j = arg;
    const struct exc_project_args *a = j->a;
    char *buffer = j->q->scratch[worker];
    const unsigned status = _mm_getcsr();
    float *room = (float *)(buffer + BUFFER);
    runner pair[2], *out = NULL, *in = pair;
    int64_t first = (int64_t)task * j->per_task, last = exc_least(first + j->per_task, j->strips);
    for (int64_t i = first; i < last; i++) {
        int64_t matrix = i / j->across;
        in->src = strip_at(j, i);
        in->dst = (char *)exc_edit_dst(a, matrix) + i % j->across * 2 * j->width;
        in->share = share_of(a, a->strength[matrix], room + (in - pair) * MOST_RANK * MOST_ROWS);
        hand_over(j, buffer, out, in, strip_at(j, i + 1 < last ? i + 1 : i));
        out = in;
        in = &pair[out == pair];
    }
    if (out) hand_over(j, buffer, out, NULL, NULL);
    _mm_sfence();
    _mm_setcsr(status);
}

static int all_one(const float *x, int64_t n) {
    int one = 1;
    for (int64_t i = 0; i < n; i++) one &= x[i] == 1.0f;
    return one;
}

static int fits(const exc_queue *q, const struct exc_project_args *a) {
    if (exc_isa_level() < EXC_ISA_AVX512 || a->dtype != EXC_BF16 || a->side != EXC_SIDE_OUT) return 0;
    if (a->norm != EXC_NORM_NONE || a->c || a->before || a->after || a->changed || a->nonfinite) return 0;
    if (a->rank > MOST_RANK || a->cols % WIDTH(a->rank) || a->rows > MOST_ROWS) return 0;
    if (BUFFER + 2 * MOST_RANK * MOST_ROWS * sizeof(float) > q->scratch_bytes) return 0;
    for (int64_t i = 0; i < a->count; i++)
        if (a->strength[i] == 0.0f || (uintptr_t)exc_edit_src(a, i) % 64 || (uintptr_t)exc_edit_dst(a, i) % 64) return 0;
    return 1;
}

int exc_relay_project(exc_queue *q, const struct exc_project_args *a) {
    if (!fits(q, a)) return 0;
    static const pass_fn passes[3][MOST_RANK] = {{pass1, pass2, pass3, pass4, pass5, pass6, pass7, pass8},
                                                 {fast1, fast2, fast3, fast4, fast5, fast6, fast7, fast8},
                                                 {whole1, whole2, whole3, whole4, whole5, whole6, whole7, whole8}};
    int how = exc_isa_level() < EXC_ISA_AVX512BF16 ? 0 : all_one(a->strength, a->count) ? 2 : 1;
    relay j = {.a = a, .q = q, .width = WIDTH(a->rank), .fast = passes[how][a->rank - 1], .careful = passes[0][a->rank - 1],
               .least = exc_smallest_share(a)};
    j.across = a->cols / j.width;
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
