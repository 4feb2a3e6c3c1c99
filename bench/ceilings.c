/* ceilings.c - what this machine can do at best: bandwidths with all threads, and multiply-adds in registers.
 *
 * Bandwidth: two buffers of 256 MB, far beyond any cache, in 2 MB pages and touched before. Each loop has a few variants (a
 * contiguous half a thread or blocks from one counter, software prefetch or none, stores through the cache or past it); what is
 * fastest when a row begins is its ceiling. Counting: READ bytes read; COPY bytes read plus bytes written; RMW bytes edited
 * (each moves twice), so a perfect in-place edit scores 1 against RMW.
 * Arithmetic: sixteen independent accumulators in registers, no loads; for bf16 also the matmul of oneDNN on its favourite
 * layout, where that library is present. The bf16 ceiling of a row is the oneDNN matmul when there is one (a real matmul, which
 * must load its operands), the register loop otherwise; both have rows of their own. */
#include <stdio.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bench.h"

#define BYTES ((size_t)256 << 20)
#define CHUNK ((size_t)1 << 20) /* of one task when blocks come from the counter */
#define SPIN 4096               /* rounds of a register loop in one task */

typedef void (*stream_fn)(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink);
typedef uint64_t (*spin_fn)(int rounds);

static struct {
    uint8_t *a, *b;
    onednn *dnnl;
    int variant[CEILINGS];
    uint64_t sink[64][8];
} at;

/* ------------------------------------------------------------------------------------------------- the loops */

static void read_plain(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink)
{
    const uint64_t *p = (const uint64_t *)(const void *)from;
    uint64_t s[8] = {0};
    for (size_t i = 0; i < n / 8; i += 8)
        for (int j = 0; j < 8; j++) s[j] ^= p[i + (size_t)j];
    for (int j = 0; j < 8; j++) *sink ^= s[j];
}

static void copy_plain(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink) { memcpy(to, from, n); }

static void edit_plain(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink)
{
    uint64_t *p = (uint64_t *)(void *)to;
    for (size_t i = 0; i < n / 8; i++) p[i] ^= 0x0101010101010101u;
}

static uint64_t spin_plain_f32(int rounds)
{
    float s[16];
    for (int j = 0; j < 16; j++) s[j] = (float)j;
    for (int i = 0; i < rounds; i++)
        for (int j = 0; j < 16; j++) s[j] = s[j] * 0.999f + 0.5f;
    uint64_t out = 0;
    for (int j = 0; j < 16; j++) out += (uint64_t)s[j];
    return out;
}

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f")))
#define AVX2 __attribute__((target("avx2,fma")))

#define READ(name, ahead)                                                                                              \
    AVX512 static void name(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink)                               \
    {                                                                                                                  \
        __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;                                               \
        for (size_t i = 0; i < n; i += 256) {                                                                         \
            if (ahead)                                                                                                 \
                for (size_t j = 0; j < 256; j += 64) _mm_prefetch((const char *)from + i + j + (ahead), _MM_HINT_T0); \
            s0 = _mm512_xor_si512(s0, _mm512_load_si512(from + i));                                                   \
            s1 = _mm512_xor_si512(s1, _mm512_load_si512(from + i + 64));                                              \
            s2 = _mm512_xor_si512(s2, _mm512_load_si512(from + i + 128));                                             \
            s3 = _mm512_xor_si512(s3, _mm512_load_si512(from + i + 192));                                             \
        }                                                                                                              \
        s0 = _mm512_xor_si512(_mm512_xor_si512(s0, s1), _mm512_xor_si512(s2, s3));                                    \
        *sink ^= (uint64_t)_mm512_reduce_add_epi64(s0);                                                               \
    }
READ(read_512, 0)
READ(read_512_ahead, 2048)
READ(read_512_far, 8192)

/* four places at once: more open rows of memory */
AVX512 static void read_512_four(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink)
{
    size_t quarter = n / 4;
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;
    for (size_t i = 0; i < quarter; i += 64) {
        s0 = _mm512_xor_si512(s0, _mm512_load_si512(from + i));
        s1 = _mm512_xor_si512(s1, _mm512_load_si512(from + i + quarter));
        s2 = _mm512_xor_si512(s2, _mm512_load_si512(from + i + 2 * quarter));
        s3 = _mm512_xor_si512(s3, _mm512_load_si512(from + i + 3 * quarter));
    }
    s0 = _mm512_xor_si512(_mm512_xor_si512(s0, s1), _mm512_xor_si512(s2, s3));
    *sink ^= (uint64_t)_mm512_reduce_add_epi64(s0);
}

AVX2 static void read_256(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink)
{
    __m256i s0 = _mm256_setzero_si256(), s1 = s0;
    for (size_t i = 0; i < n; i += 64) {
        s0 = _mm256_xor_si256(s0, _mm256_load_si256((const __m256i *)(const void *)(from + i)));
        s1 = _mm256_xor_si256(s1, _mm256_load_si256((const __m256i *)(const void *)(from + i + 32)));
    }
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)(void *)lanes, _mm256_xor_si256(s0, s1));
    *sink ^= lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
}

#define COPY(name, ahead, store)                                                                                       \
    AVX512 static void name(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink)                               \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i += 128) {                                                                         \
            if (ahead) {                                                                                               \
                _mm_prefetch((const char *)from + i + (ahead), _MM_HINT_T0);                                          \
                _mm_prefetch((const char *)from + i + 64 + (ahead), _MM_HINT_T0);                                     \
            }                                                                                                          \
            __m512i x = _mm512_load_si512(from + i), y = _mm512_load_si512(from + i + 64);                            \
            store((void *)(to + i), x);                                                                                \
            store((void *)(to + i + 64), y);                                                                           \
        }                                                                                                              \
        _mm_sfence();                                                                                                  \
    }
COPY(copy_512, 0, _mm512_store_si512)
COPY(copy_512_past, 0, _mm512_stream_si512)
COPY(copy_512_past_ahead, 2048, _mm512_stream_si512)

#define EDIT(name, ahead, store)                                                                                       \
    AVX512 static void name(uint8_t *to, const uint8_t *from, size_t n, uint64_t *sink)                               \
    {                                                                                                                  \
        const __m512i one = _mm512_set1_epi64(0x0101010101010101);                                                    \
        for (size_t i = 0; i < n; i += 128) {                                                                         \
            if (ahead) {                                                                                               \
                _mm_prefetch((const char *)to + i + (ahead), _MM_HINT_T0);                                            \
                _mm_prefetch((const char *)to + i + 64 + (ahead), _MM_HINT_T0);                                       \
            }                                                                                                          \
            __m512i x = _mm512_load_si512(to + i), y = _mm512_load_si512(to + i + 64);                                \
            store((void *)(to + i), _mm512_xor_si512(x, one));                                                        \
            store((void *)(to + i + 64), _mm512_xor_si512(y, one));                                                   \
        }                                                                                                              \
        _mm_sfence();                                                                                                  \
    }
EDIT(edit_512, 0, _mm512_store_si512)
EDIT(edit_512_ahead, 2048, _mm512_store_si512)
EDIT(edit_512_past, 0, _mm512_stream_si512)
EDIT(edit_512_past_ahead, 2048, _mm512_stream_si512)

/* sixteen chains hide the latency of the multiply-add; the asm keeps the compiler from folding rounds together */
#define SIXTEEN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define PIN(i) __asm__ volatile("" : "+v"(s##i));
#define ADD_PS(i) sum = _mm512_add_ps(sum, s##i);
#define ADD_PD(i) sum = _mm512_add_pd(sum, s##i);

AVX512 static uint64_t spin_512_f32(int rounds)
{
    __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(0.5f);
#define SET(i) __m512 s##i = _mm512_set1_ps(i);
#define STEP(i) s##i = _mm512_fmadd_ps(s##i, x, y);
    SIXTEEN(SET)
    for (int r = 0; r < rounds; r++) {
        SIXTEEN(STEP)
        SIXTEEN(PIN)
    }
    __m512 sum = _mm512_setzero_ps();
    SIXTEEN(ADD_PS)
    return (uint64_t)_mm512_reduce_add_ps(sum);
#undef SET
#undef STEP
}

AVX512 static uint64_t spin_512_f64(int rounds)
{
    __m512d x = _mm512_set1_pd(0.999), y = _mm512_set1_pd(0.5);
#define SET(i) __m512d s##i = _mm512_set1_pd(i);
#define STEP(i) s##i = _mm512_fmadd_pd(s##i, x, y);
    SIXTEEN(SET)
    for (int r = 0; r < rounds; r++) {
        SIXTEEN(STEP)
        SIXTEEN(PIN)
    }
    __m512d sum = _mm512_setzero_pd();
    SIXTEEN(ADD_PD)
    return (uint64_t)_mm512_reduce_add_pd(sum);
#undef SET
#undef STEP
}

__attribute__((target("avx512f,avx512bf16"))) static uint64_t spin_512_bf16(int rounds)
{
    __m512bh x = (__m512bh)_mm512_set1_epi16(0x3c01), y = (__m512bh)_mm512_set1_epi16(0x3c02);
#define SET(i) __m512 s##i = _mm512_set1_ps(i);
#define STEP(i) s##i = _mm512_dpbf16_ps(s##i, x, y);
    SIXTEEN(SET)
    for (int r = 0; r < rounds; r++) {
        SIXTEEN(STEP)
        SIXTEEN(PIN)
    }
    __m512 sum = _mm512_setzero_ps();
    SIXTEEN(ADD_PS)
    return (uint64_t)_mm512_reduce_add_ps(sum);
#undef SET
#undef STEP
}

AVX2 static uint64_t spin_256_f32(int rounds)
{
    __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(0.5f), s[12];
    for (int j = 0; j < 12; j++) s[j] = _mm256_set1_ps((float)j);
    for (int r = 0; r < rounds; r++)
        for (int j = 0; j < 12; j++) {
            s[j] = _mm256_fmadd_ps(s[j], x, y);
            __asm__ volatile("" : "+x"(s[j]));
        }
    for (int j = 1; j < 12; j++) s[0] = _mm256_add_ps(s[0], s[j]);
    return (uint64_t)_mm256_cvtss_f32(s[0]);
}

static bool has_avx512(void) { return __builtin_cpu_supports("avx512f"); }
static bool has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

static bool always(void) { return true; }

/* ------------------------------------------------------------------------------------------------- their table */

typedef struct variant {
    ceiling kind;
    const char *name;
    bool (*usable)(void);
    stream_fn stream;
    bool halves; /* a contiguous part a thread instead of blocks from the counter */
    spin_fn spin;
    double flop; /* of one round */
} variant;

static const variant variants[] = {
    {CEIL_READ, "plain", always, read_plain},
    {CEIL_COPY, "memcpy", always, copy_plain},
    {CEIL_COPY, "memcpy, halves", always, copy_plain, true},
    {CEIL_RMW, "plain", always, edit_plain},
    {CEIL_F32, "plain", always, .spin = spin_plain_f32, .flop = 32},
#if defined(__x86_64__)
    {CEIL_READ, "avx2", has_avx2, read_256},
    {CEIL_READ, "avx512", has_avx512, read_512},
    {CEIL_READ, "avx512, halves", has_avx512, read_512, true},
    {CEIL_READ, "avx512, prefetch 2 KB", has_avx512, read_512_ahead},
    {CEIL_READ, "avx512, prefetch 2 KB, halves", has_avx512, read_512_ahead, true},
    {CEIL_READ, "avx512, prefetch 8 KB", has_avx512, read_512_far},
    {CEIL_READ, "avx512, four streams", has_avx512, read_512_four, true},
    {CEIL_COPY, "avx512", has_avx512, copy_512},
    {CEIL_COPY, "avx512, past the cache", has_avx512, copy_512_past},
    {CEIL_COPY, "avx512, past the cache, halves", has_avx512, copy_512_past, true},
    {CEIL_COPY, "avx512, past the cache, prefetch 2 KB", has_avx512, copy_512_past_ahead},
    {CEIL_RMW, "avx512", has_avx512, edit_512},
    {CEIL_RMW, "avx512, halves", has_avx512, edit_512, true},
    {CEIL_RMW, "avx512, prefetch 2 KB", has_avx512, edit_512_ahead},
    {CEIL_RMW, "avx512, past the cache", has_avx512, edit_512_past},
    {CEIL_RMW, "avx512, past the cache, prefetch 2 KB", has_avx512, edit_512_past_ahead},
    {CEIL_F32, "avx2", has_avx2, .spin = spin_256_f32, .flop = 2 * 8 * 12},
    {CEIL_F32, "avx512", has_avx512, .spin = spin_512_f32, .flop = 2 * 16 * 16},
    {CEIL_F64, "avx512", has_avx512, .spin = spin_512_f64, .flop = 2 * 8 * 16},
    {CEIL_BF16, "f32 multiply-adds, avx2", has_avx2, .spin = spin_256_f32, .flop = 2 * 8 * 12},
    {CEIL_BF16, "f32 multiply-adds, avx512", has_avx512, .spin = spin_512_f32, .flop = 2 * 16 * 16},
    {CEIL_BF16, "vdpbf16ps in registers", has_bf16, .spin = spin_512_bf16, .flop = 2 * 32 * 16},
#endif
};

typedef struct pass {
    const variant *v;
    size_t chunk;
    int rounds;
} pass;

static void stream_task(void *arg, size_t task, int worker)
{
    const pass *p = arg;
    p->v->stream(at.b + task * p->chunk, at.a + task * p->chunk, p->chunk, at.sink[worker % 64]);
}

static void spin_task(void *arg, size_t task, int worker)
{
    const pass *p = arg;
    at.sink[worker % 64][0] += p->v->spin(p->rounds);
}

/* bytes or FLOP of one pass */
static double once(bench *b, const variant *v)
{
    exc_queue *q = &b->ctx->queue;
    if (v->spin) {
        size_t tasks = (size_t)q->workers * 8;
        q->parallel(q, tasks, spin_task, &(pass){v, 0, SPIN});
        return (double)tasks * SPIN * v->flop;
    }
    size_t chunk = v->halves ? BYTES / (size_t)q->workers / 4096 * 4096 : CHUNK;
    q->parallel(q, BYTES / chunk, stream_task, &(pass){v, chunk, 0});
    return (double)(BYTES / chunk * chunk) * (v->kind == CEIL_COPY ? 2 : 1);
}

static double sample(bench *b, const variant *v, double seconds)
{
    double done = 0, start = exc_seconds(), t;
    do done += once(b, v);
    while ((t = exc_seconds() - start) < seconds);
    return done / t;
}

static double sample_onednn(double seconds)
{
    double done = 0, start = exc_seconds(), t;
    do done += onednn_run(at.dnnl);
    while ((t = exc_seconds() - start) < seconds);
    return done / t;
}

/* Every variant in turn, three times over: the best by its middle sample, as a lucky one may be of another state of memory. */
static void choose(bench *b, ceiling c)
{
    double best = 0;
    double rate[EXC_COUNT(variants)][3];
    for (int trial = 0; trial < 3; trial++)
        for (size_t i = 0; i < EXC_COUNT(variants); i++)
            if (variants[i].kind == c && variants[i].usable()) rate[i][trial] = sample(b, &variants[i], b->quick ? 0.005 : 0.008);
    for (size_t i = 0; i < EXC_COUNT(variants); i++) {
        if (variants[i].kind != c || !variants[i].usable()) continue;
        double r = bench_median(rate[i], 3);
        if (r <= best) continue;
        best = r;
        at.variant[c] = (int)i;
    }
}

void ceilings_choose(bench *b, ceiling c)
{
    if (c == CEIL_READ || c == CEIL_COPY || c == CEIL_RMW) choose(b, c);
}

void ceilings_open(bench *b)
{
    at.a = bench_alloc(b, BYTES + CHUNK);
    at.b = bench_alloc(b, BYTES + CHUNK);
    fill_bf16(b, (uint16_t *)(void *)at.a, (BYTES + CHUNK) / 2, 1, 1);
    fill_bf16(b, (uint16_t *)(void *)at.b, (BYTES + CHUNK) / 2, 1, 2);
    for (int c = 0; c < CEILINGS; c++) {
        at.variant[c] = -1;
        choose(b, (ceiling)c);
    }
    if (onednn_open) at.dnnl = onednn_open(2048, 1024, 2048);
    if (at.dnnl && onednn_run(at.dnnl) == 0) {
        onednn_close(at.dnnl);
        at.dnnl = NULL;
    }
}

void ceilings_close(bench *b)
{
    if (at.dnnl) onednn_close(at.dnnl);
    exc_release(at.a);
    exc_release(at.b);
}

double ceilings_rate(bench *b, ceiling c, double seconds)
{
    if (c == CEIL_NONE || (at.variant[c] < 0 && !(c == CEIL_BF16 && at.dnnl))) return 0;
    return c == CEIL_BF16 && at.dnnl ? sample_onednn(seconds) : sample(b, &variants[at.variant[c]], seconds);
}

const char *ceilings_name(ceiling c)
{
    static const char *const names[CEILINGS] = {"none", "read", "copy", "edit in place", "bf16 matmul", "f32 fma", "f64 fma"};
    return names[c];
}

const char *ceilings_variant(ceiling c)
{
    if (c == CEIL_BF16 && at.dnnl) return "oneDNN matmul 2048 x 1024 x 2048";
    return c != CEIL_NONE && at.variant[c] >= 0 ? variants[at.variant[c]].name : "none";
}

/* Rows of their own: the median of samples spread over a second, and beside it the fastest. */
static void ceiling_row(bench *b, const char *name, ceiling c, double (*rate)(bench *, ceiling, double), const char *shape)
{
    double x[15];
    int n = b->quick ? 5 : 15;
    if (!bench_wanted(b, name)) return;
    for (int i = 0; i < n; i++) x[i] = rate(b, c, 0.02);
    row r = {.name = name, .shape = shape, .unit = c >= CEIL_BF16 ? "GFLOP/s" : "GB/s", .rounds = n};
    r.value = bench_median(x, n) / 1e9;
    r.fraction_low = x[0] / 1e9;
    r.fraction_high = x[n - 1] / 1e9;
    bench_emit(b, &r);
}

static double register_rate(bench *b, ceiling c, double seconds) { return sample(b, &variants[at.variant[c]], seconds); }

void ceilings_rows(bench *b)
{
    ceiling_row(b, "ceiling_read", CEIL_READ, ceilings_rate, ceilings_variant(CEIL_READ));
    ceiling_row(b, "ceiling_copy", CEIL_COPY, ceilings_rate, ceilings_variant(CEIL_COPY));
    ceiling_row(b, "ceiling_edit", CEIL_RMW, ceilings_rate, ceilings_variant(CEIL_RMW));
    ceiling_row(b, "ceiling_f32", CEIL_F32, ceilings_rate, ceilings_variant(CEIL_F32));
    if (at.variant[CEIL_F64] >= 0) ceiling_row(b, "ceiling_f64", CEIL_F64, ceilings_rate, ceilings_variant(CEIL_F64));
    if (at.dnnl) ceiling_row(b, "ceiling_bf16_matmul", CEIL_BF16, ceilings_rate, ceilings_variant(CEIL_BF16));
    if (at.variant[CEIL_BF16] >= 0)
        ceiling_row(b, "ceiling_bf16_registers", CEIL_BF16, register_rate, variants[at.variant[CEIL_BF16]].name);
}
