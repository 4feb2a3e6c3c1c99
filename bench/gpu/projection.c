/* projection.c - rows of op project: all experts of a layer of four published models, W <- W - R^T (R W), in every way it can be asked
 * for; and beside the plain bf16 ones what two batched products of cuBLASLt make of the same (C = R W, W -= R^T C, C in bf16).
 *
 * Layouts: [E,H,I], where R acts on the rows of each matrix, and [E,I,H], where it acts on the columns. Plain edits are in place;
 * formats below 16 bits, norms and other roundings go from one array to another, so that every call finds the same work. Bytes:
 * every weight and scale read once and written once. Before a row is timed, its first matrix is edited by the CPU: the same bits;
 * cuBLASLt's may be as far off as its bf16 sums make it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gauge.h"

enum { RANKS = 16 }; /* most */
static const struct model {
    const char *name;
    int64_t E, H, I;
} models[] = {{"Qwen3-30B-A3B", 128, 2048, 768},
              {"GLM-4.5-Air", 128, 4096, 1408},
              {"gpt-oss-120b", 128, 2880, 2880},
              {"DeepSeek-V3", 64, 7168, 2048}};

/* one way to ask */
typedef struct way {
    int dtype;
    int64_t rank;
    int norm, rounding;
} way;
static const way ways[] = {
    {EXC_BF16, 1, EXC_NORM_NONE, EXC_ROUND_RN},       {EXC_BF16, 2, EXC_NORM_NONE, EXC_ROUND_RN},
    {EXC_BF16, 3, EXC_NORM_NONE, EXC_ROUND_RN},       {EXC_BF16, 4, EXC_NORM_NONE, EXC_ROUND_RN},
    {EXC_BF16, 8, EXC_NORM_NONE, EXC_ROUND_RN},       {EXC_BF16, 16, EXC_NORM_NONE, EXC_ROUND_RN},
    {EXC_BF16, 3, EXC_NORM_COLUMN, EXC_ROUND_RN},     {EXC_BF16, 3, EXC_NORM_ROW, EXC_ROUND_RN},
    {EXC_BF16, 1, EXC_NORM_NONE, EXC_ROUND_SR},       {EXC_BF16, 1, EXC_NORM_NONE, EXC_ROUND_EXACT},
    {EXC_F8_E4M3, 1, EXC_NORM_NONE, EXC_ROUND_RN},    {EXC_F8_E4M3, 3, EXC_NORM_NONE, EXC_ROUND_RN},
    {EXC_F8_E4M3, 1, EXC_NORM_NONE, EXC_ROUND_EXACT}, {EXC_F4, 1, EXC_NORM_NONE, EXC_ROUND_RN},
    {EXC_F4, 3, EXC_NORM_NONE, EXC_ROUND_RN}};

static bool is_plain(const way *w) { return w->dtype == EXC_BF16 && !w->norm && w->rounding == EXC_ROUND_RN; }

/* matrices of one model and side, and where edits of them go */
typedef struct bench {
    const struct model *m;
    int64_t E, rows, cols;
    int side;
    int64_t along; /* numbers in a row of R */
    float *basis, *minus, *strength, *c;
    uint16_t *narrow, *narrow_minus, *c_narrow; /* R and R W for cuBLASLt */
    float *here;                                /* R on the host */
} bench;

/* disjoint sixteenths of unit vectors: orthonormal, and sparse in no chunk of 64 */
static void make_bases(gauge *g, bench *b) {
    int64_t n = RANKS * b->along;
    b->here = calloc((size_t)n, sizeof *b->here);
    for (int64_t r = 0; r < RANKS; r++)
        for (int64_t h = r; h < b->along; h += RANKS)
            b->here[r * b->along + h] =
                (h / RANKS % 2 ? 1.0f : -1.0f) / sqrtf((float)((b->along - r + RANKS - 1) / RANKS));
    b->basis = gauge_up(g, b->here, (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) b->here[i] = -b->here[i];
    b->minus = gauge_up(g, b->here, (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) b->here[i] = -b->here[i];
    b->narrow = gauge_room(g, (size_t)n * 2);
    b->narrow_minus = gauge_room(g, (size_t)n * 2);
    RUN(g, convert, .src = b->basis, .src_dtype = EXC_F32, .dst = b->narrow, .dst_dtype = EXC_BF16, .n = n);
    RUN(g, convert, .src = b->minus, .src_dtype = EXC_F32, .dst = b->narrow_minus, .dst_dtype = EXC_BF16, .n = n);
}

static void open_bench(gauge *g, const struct model *m, int side, bench *b) {
    int64_t E = g->quick ? 2 : m->E, H = g->quick ? 128 : m->H, I = g->quick ? 64 : m->I, across;
    while (E > 1 && (uint64_t)(E * H * I) * 2 > g->info.free / 6) E /= 2;
    *b = (bench){.m = m,
                 .E = E,
                 .rows = side ? I : H,
                 .cols = side ? H : I,
                 .side = side ? EXC_SIDE_IN : EXC_SIDE_OUT,
                 .along = H};
    across = I;
    float *ones = malloc((size_t)E * sizeof *ones);
    for (int64_t e = 0; ones && e < E; e++) ones[e] = 1;
    b->strength = gauge_up(g, ones, (size_t)E * sizeof *ones);
    free(ones);
    make_bases(g, b);
    b->c = gauge_room(g, (size_t)(E * RANKS * across) * 4);
    b->c_narrow = gauge_room(g, (size_t)(E * RANKS * across) * 2);
}

static void describe(const bench *b, const way *w, char *out, size_t n) {
    static const char *const norms[] = {"", " column norms", " row norms"}, *const roundings[] = {"", " stochastic",
                                                                                                  " exact"};
    snprintf(out, n, "%s %lldx%lldx%lld %s k=%lld%s%s%s", b->m->name, (long long)b->E, (long long)b->rows,
             (long long)b->cols,
             w->dtype == EXC_BF16 ? "bf16"
             : w->dtype == EXC_F4 ? "mxfp4"
                                  : "fp8",
             (long long)w->rank, norms[w->norm], roundings[w->rounding], b->side == EXC_SIDE_IN ? " [E,I,H]" : "");
}

/* ------------------------------------------------------------------------------------------------------------ sizes */

static size_t matrix_bytes(const bench *b, int dtype) {
    size_t n = (size_t)(b->rows * b->cols);
    return dtype == EXC_BF16 ? 2 * n : dtype == EXC_F4 ? n / 2 : n;
}

static size_t scale_bytes(const bench *b, int dtype) {
    if (dtype == EXC_F4) return (size_t)(b->rows * (b->cols / 32));
    return dtype == EXC_F8_E4M3 ? (size_t)((b->rows + 127) / 128 * ((b->cols + 127) / 128)) * 4 : 0;
}

/* scales of about a hundredth: f32, or powers of two for fp4 */
static void *make_scales(gauge *g, const bench *b, int dtype) {
    size_t bytes = (size_t)b->E * scale_bytes(b, dtype);
    uint8_t *host = malloc(bytes + 4);
    for (size_t i = 0; host && i < bytes; i += 4) {
        float f = 0.006f + 0.0001f * (float)(i % 32);
        if (dtype == EXC_F4)
            memset(host + i, (int)(119 + i / 4 % 3), 4);
        else
            memcpy(host + i, &f, 4);
    }
    void *there = gauge_up(g, host, bytes);
    free(host);
    return there;
}

/* a table in device memory of E addresses, `bytes` apart */
static void *table(gauge *g, const bench *b, void *first, size_t bytes) {
    void **host = malloc((size_t)b->E * sizeof *host);
    for (int64_t e = 0; host && e < b->E; e++) host[e] = (char *)first + (size_t)e * bytes;
    void *there = gauge_up(g, host, (size_t)b->E * sizeof *host);
    free(host);
    return there;
}

/* ------------------------------------------------------------------------------------------------------------ checks */

static void *fetched(gauge *g, const void *there, size_t bytes) {
    void *here = malloc(bytes + 1);
    gauge_must(g, here ? exc_device_get(g->ctx, here, there, bytes) : EXC_ERR_MEMORY, "check");
    return here;
}

static void wrong(gauge *g, const char *by, const char *shape, const char *what) {
    g->wrong++;
    fprintf(stderr, "excise_gpu: project %s%s%s: %s\n", shape, *by ? " by " : "", by, what);
}

/* the CPU's edit of the first matrix, as the device's `a` asks for; src, scale: the bytes before. Returns what it makes, and its scales. */
static uint8_t *edit_here(gauge *g, const bench *b, const struct exc_project_args *a, const uint8_t *src,
                          const uint8_t *scale, uint8_t **scale_to) {
    size_t bytes = matrix_bytes(b, a->dtype), scales = scale_bytes(b, a->dtype);
    uint8_t *dst = malloc(bytes), *to = malloc(scales + 1);
    float one = 1, *c = malloc((size_t)(a->rank * b->rows * b->cols / b->along) * 4);
    const void *from = src, *scale_from = scale;
    void *into = dst, *scale_into = to;
    struct exc_project_args h = *a;
    h.src = &from, h.dst = &into, h.src_base = NULL, h.dst_base = NULL;
    h.scale = scales ? &scale_from : NULL, h.scale_to = scales ? &scale_into : NULL;
    h.basis = b->here, h.strength = &one, h.count = 1, h.c = a->c ? c : NULL;
    gauge_must(g, g->cpu->ops->project(&g->cpu->queue, &h), "check");
    *scale_to = to;
    free(c);
    return dst;
}

/* edits the first matrix on both sides; the device's is put back as it was */
static void check(gauge *g, const bench *b, const struct exc_project_args *a, void *w, void *scale, void *dst,
                  void *scale_dst, const char *shape) {
    size_t bytes = matrix_bytes(b, a->dtype), scales = scale_bytes(b, a->dtype);
    uint8_t *before = fetched(g, w, bytes), *scale_before = fetched(g, scale, scales), *to;
    uint8_t *want = edit_here(g, b, a, before, scale_before, &to);
    struct exc_project_args one = *a;
    one.count = 1;
    gauge_must(g, gauge_now(g, gauge_ops.project, &one), "check");
    uint8_t *got = fetched(g, dst, bytes), *scale_got = fetched(g, scale_dst, scales);
    if (memcmp(got, want, bytes) || memcmp(scale_got, to, scales))
        wrong(g, "", shape, "the edited matrix is not the CPU's");
    if (dst == w) gauge_must(g, exc_device_put(g->ctx, w, before, bytes), "check");
    free(before), free(scale_before), free(want), free(to), free(got), free(scale_got);
}

/* ------------------------------------------------------------------------------------------------------ two products */

typedef struct two {
    exc_library_product first, second;
} two;

static exc_status two_once(gauge *g, const void *arg) {
    const two *t = arg;
    exc_status st = g->ctx->module->library_product(&g->ctx->queue, &t->first);
    return st == EXC_OK ? g->ctx->module->library_product(&g->ctx->queue, &t->second) : st;
}

/* The library sees the transposed matrices, columns first: W as [I,H] (or [H,I]), C as [I,k], R as [H,k]. */
static two two_products(const bench *b, void *w, int64_t rank) {
    bool out = b->side == EXC_SIDE_OUT;
    int64_t H = b->along, I = b->rows * b->cols / H, each = b->rows * b->cols;
    exc_library_product first = {.a = w,
                                 .lda = b->cols,
                                 .turn_a = !out,
                                 .step_a = each,
                                 .b = b->narrow,
                                 .ldb = H,
                                 .d = b->c_narrow,
                                 .ldd = I,
                                 .step_d = I * rank,
                                 .m = I,
                                 .n = rank,
                                 .k = H,
                                 .batch = b->E,
                                 .narrow = 1};
    exc_library_product c_first = {
        .a = b->c_narrow, .lda = I, .step_a = I * rank, .b = b->narrow_minus, .ldb = H, .turn_b = 1, .m = I, .n = H};
    exc_library_product r_first = {
        .a = b->narrow_minus, .lda = H, .b = b->c_narrow, .ldb = I, .step_b = I * rank, .turn_b = 1, .m = H, .n = I};
    exc_library_product second = out ? c_first : r_first;
    second.d = w, second.ldd = b->cols, second.step_d = each, second.k = rank, second.batch = b->E, second.add = 1,
    second.narrow = 1;
    return (two){first, second};
}

static double number(const uint8_t *bf16, size_t i) {
    uint32_t u = (uint32_t)(bf16[2 * i] | bf16[2 * i + 1] << 8) << 16;
    float f;
    memcpy(&f, &u, 4);
    return (double)f;
}

/* what was taken off W, against what the CPU takes off */
static void check_two(gauge *g, const bench *b, const two *t, const struct exc_project_args *a, void *w,
                      const char *shape) {
    size_t bytes = matrix_bytes(b, EXC_BF16);
    two one = *t;
    uint8_t *before = fetched(g, w, bytes), *scales, *want = edit_here(g, b, a, before, NULL, &scales);
    one.first.batch = one.second.batch = 1;
    gauge_must(g, gauge_now(g, two_once, &one), "check");
    uint8_t *got = fetched(g, w, bytes);
    double apart = 0, taken = 0;
    for (size_t i = 0; i < bytes / 2; i++) {
        apart += (number(got, i) - number(want, i)) * (number(got, i) - number(want, i));
        taken += (number(want, i) - number(before, i)) * (number(want, i) - number(before, i));
    }
    /* R and C in bf16: 2^-9 of the edit each, and now and then the rounding of W to the other side */
    if (!(sqrt(apart) <= 0.1 * sqrt(taken))) wrong(g, "cuBLASLt", shape, "the edit is not the CPU's");
    gauge_must(g, exc_device_put(g->ctx, w, before, bytes), "check");
    free(before), free(scales), free(want), free(got);
}

static void two_row(gauge *g, const bench *b, void *w, const struct exc_project_args *a, const row *ours) {
    row r = *ours;
    two t = two_products(b, w, a->rank);
    r.by = "cuBLASLt";
    r.note = "two batched products, C in bf16";
    g->ctx->queue.measuring = 1;
    exc_status st = two_once(g, &t);
    g->ctx->queue.measuring = 0;
    if (st == EXC_ERR_INPUT) {
        gauge_skip(g, &r, "cuBLASLt is not at hand, or has no way for this shape");
        return;
    }
    gauge_must(g, st, "cuBLASLt");
    check_two(g, b, &t, a, w, r.shape);
    gauge_row(g, &r, two_once, &t, 0, 1);
}

/* ------------------------------------------------------------------------------------------------------------- rows */

/* what the rows of an edit share; where its matrices lie is the row's to say */
static struct exc_project_args args_of(const bench *b, const way *by) {
    return (struct exc_project_args){.dtype = by->dtype,
                                     .count = b->E,
                                     .rows = b->rows,
                                     .cols = b->cols,
                                     .side = b->side,
                                     .basis = b->basis,
                                     .rank = by->rank,
                                     .strength = b->strength,
                                     .norm = by->norm,
                                     .rounding = by->rounding,
                                     .seed = 3};
}

static void plain_row(gauge *g, const bench *b, const way *by, void *w) {
    int64_t each = b->rows * b->cols;
    row r = {.name = "project", .bytes = 4.0 * (double)(b->E * each)};
    struct exc_project_args a = args_of(b, by);
    a.src_base = a.dst_base = w;
    a.src_stride = a.dst_stride = each;
    describe(b, by, r.shape, sizeof r.shape);
    check(g, b, &a, w, w, w, w, r.shape);
    gauge_row(g, &r, gauge_ops.project, &a, 0, 1);
    RUN(g, noise, .dst = w, .n = b->E * each, .seed = 2, .dtype = EXC_BF16, .deviation = 0.02f);
    two_row(g, b, w, &a, &r);
}

static void other_row(gauge *g, const bench *b, const way *by, void *w, void *dst) {
    size_t bytes = matrix_bytes(b, by->dtype), scales = scale_bytes(b, by->dtype);
    bool coded = by->dtype != EXC_BF16;
    int held = g->n_held;
    void *scale = coded ? make_scales(g, b, by->dtype) : w,
         *scale_dst = coded ? gauge_room(g, (size_t)b->E * scales) : dst;
    row r = {.name = "project", .bytes = 2.0 * (double)b->E * (double)(bytes + scales)};
    struct exc_project_args a = args_of(b, by);
    a.src = table(g, b, w, bytes);
    a.dst = table(g, b, dst, bytes);
    if (by->norm == EXC_NORM_ROW) a.c = b->c;
    if (coded) {
        a.scale = table(g, b, scale, scales), a.scale_to = table(g, b, scale_dst, scales);
        a.scale_dtype = by->dtype == EXC_F4 ? EXC_F8_E8M0 : EXC_F32;
    }
    describe(b, by, r.shape, sizeof r.shape);
    check(g, b, &a, w, scale, dst, scale_dst, r.shape);
    gauge_row(g, &r, gauge_ops.project, &a, 0, 1);
    while (g->n_held > held) exc_device_release(g->ctx, g->held[--g->n_held]);
}

static void rows_of(gauge *g, const struct model *m, int side) {
    bench b;
    open_bench(g, m, side, &b);
    int64_t n = b.E * b.rows * b.cols;
    void *w = gauge_numbers(g, n, EXC_BF16, 0.02f), *dst = gauge_room(g, (size_t)n * 2),
         *codes = gauge_codes(g, (size_t)n);
    for (size_t i = 0; i < EXC_COUNT(ways); i++)
        if (is_plain(&ways[i]))
            plain_row(g, &b, &ways[i], w);
        else
            other_row(g, &b, &ways[i], ways[i].dtype == EXC_BF16 ? w : codes, dst);
    free(b.here);
    gauge_clear(g);
}

void projection_rows(gauge *g) {
    if (!gauge_wanted(g, "project")) return;
    for (size_t i = 0; i < EXC_COUNT(models); i++)
        for (int side = 0; side < 2; side++) rows_of(g, &models[i], side);
}
