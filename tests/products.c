/* products.c - the .cu twins of the products and of what stands around them, pack, widen, view, matmul, bundle, permute, glu, down,
 * combine, against their CPU definitions, which dense.c and absorb.c check against f64.
 *
 * Every weight dtype with every activation dtype it goes with, odd sizes on both sides of a tile, empty and crowded experts, captured
 * sums in both modes. Distances: f32 sums of k products in another order, about sqrt(k)/2 ulp of the sum of |products|. */
#include "module.h"
#include "twin.h"

#include <math.h>

#include "codes.h"

static uint16_t test_to_f16(float x) { _Float16 h = (_Float16)x; uint16_t u; memcpy(&u, &h, 2); return u; }
static float test_from_f16(uint16_t u) { _Float16 h; memcpy(&h, &u, 2); return (float)h; }
static size_t act_size(int act) { return act == EXC_F32 ? 4 : 2; }

/* ------------------------------------------------------------------------------------------------------------- weights */

/* a stored matrix: bytes, scales and how they are read */
typedef struct stored {
    int dtype, to, scale_dtype;
    int64_t n, k;
    uint8_t *w, *scale;
    size_t bytes, scale_bytes;
} stored;

static stored store(int dtype, int to, int64_t n, int64_t k, uint64_t seed) {
    stored s = {.dtype = dtype, .to = to, .n = n, .k = k};
    size_t count = (size_t)(n * k);
    s.bytes = dtype == EXC_F32 ? count * 4 : dtype == EXC_F8_E4M3 ? count : dtype == EXC_F4 ? count / 2 : count * 2;
    s.w = malloc(s.bytes + 16);
    if (exc_is_coded(dtype)) {
        bool four = dtype == EXC_F4;
        size_t scales = four ? (size_t)(n * k / 32) : (size_t)((n + 127) / 128 * ((k + 127) / 128));
        s.scale_dtype = four || seed % 3 == 0 ? EXC_F8_E8M0 : seed % 3 == 1 ? EXC_F32 : EXC_BF16;
        s.scale_bytes = scales * (s.scale_dtype == EXC_F8_E8M0 ? 1 : s.scale_dtype == EXC_F32 ? 4 : 2);
        s.scale = malloc(s.scale_bytes + 16);
        for (size_t i = 0; i < s.bytes; i++) {
            s.w[i] = (uint8_t)exc_random_u64(seed, 1, i);
            if (!four && (s.w[i] & 0x7f) >= 0x68) s.w[i] &= 0x9f; /* no NaN, and numbers that leave the small ones a say */
        }
        for (size_t i = 0; i < scales; i++) {
            float x = 0.002f * (1 + (float)(exc_random_u64(seed, 2, i) % 100));
            uint16_t h = test_bf16(x);
            if (s.scale_dtype == EXC_F8_E8M0) s.scale[i] = (uint8_t)(118 + exc_random_u64(seed, 2, i) % 6);
            else if (s.scale_dtype == EXC_F32) memcpy(s.scale + i * 4, &x, 4);
            else memcpy(s.scale + i * 2, &h, 2);
        }
        return s;
    }
    float *x = twin_normals(n * k, seed, 0.5f);
    for (size_t i = 0; i < count; i++) {
        uint16_t h = dtype == EXC_F16 ? test_to_f16(x[i]) : test_bf16(x[i]);
        if (dtype == EXC_F32) memcpy(s.w + i * 4, &x[i], 4);
        else memcpy(s.w + i * 2, &h, 2);
    }
    free(x);
    return s;
}
static void unstore(stored *s) { free(s->w), free(s->scale); }

typedef struct pair { exc_packed cpu, gpu; } pair;

static pair packed(const stored *s) {
    size_t bytes = exc_packed_bytes(s->n, s->k, s->to);
    void *out = aligned_alloc(64, (bytes + 127) / 64 * 64), *zero = calloc(bytes + 1, 1);
    struct exc_pack_args a = {s->w, s->dtype, s->n, s->k, s->to, out, s->scale, s->scale_dtype}, g = a;
    assert_int_equal(exc_cpu_pack(&twin.cpu->queue, &a), EXC_OK);
    g.w = twin_up(s->w, s->bytes);
    g.scale = twin_up(s->scale, s->scale_bytes);
    g.out = twin_up(zero, bytes);
    TWIN_RUN(pack, &g);
    free(zero);
    return (pair){{out, s->n, s->k, s->to}, {g.out, s->n, s->k, s->to}};
}

/* the weight of a stored matrix as the packed one has it, in f64 */
static double weight_at(const stored *s, int64_t n, int64_t k) {
    int64_t i = n * s->k + k;
    double x;
    float f;
    uint16_t h;
    if (exc_is_coded(s->dtype)) return (double)exc_coded_at(s->w, s->dtype, s->scale, s->scale_dtype, s->k, n, k);
    if (s->dtype == EXC_F32) memcpy(&f, s->w + i * 4, 4), x = (double)f;
    else memcpy(&h, s->w + i * 2, 2), x = (double)(s->dtype == EXC_F16 ? test_from_f16(h) : test_from_bf16(h));
    return s->to == EXC_BF16 ? (double)test_from_bf16(test_bf16((float)x)) : x;
}

/* which activations go with which weights */
static const struct { int act, stored, to; } kinds[] = {
    {EXC_BF16, EXC_BF16, EXC_BF16}, {EXC_BF16, EXC_F32, EXC_BF16},        {EXC_BF16, EXC_F16, EXC_BF16},
    {EXC_F32, EXC_F32, EXC_F32},    {EXC_F32, EXC_BF16, EXC_BF16},        {EXC_BF16, EXC_F8_E4M3, EXC_F8_E4M3},
    {EXC_BF16, EXC_F4, EXC_F4},     {EXC_F32, EXC_F8_E4M3, EXC_F8_E4M3},  {EXC_F32, EXC_F4, EXC_F4},
    {EXC_F32, EXC_F8_E4M3, EXC_F32}};

static void set_reproducible(int on) { twin.cpu->queue.reproducible = twin.gpu->queue.reproducible = on; }

/* two sums of k products in different orders (6 is 4 of each, as dense.c has it, added as errors are), relative to the root of the sum of squares of the products */
static void close_sums(const float *got, const float *want, const float *size, int64_t n, int64_t k, const char *what) {
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - (double)want[i]), limit = 6 * sqrt((double)k) * 0x1p-24 * (double)size[i] + 1e-30;
        if (!(d <= limit)) fail_msg("%s: [%lld] = %.9g, want %.9g (limit %.3g)", what, (long long)i, (double)got[i], (double)want[i], limit);
    }
}

/* -------------------------------------------------------------------------------------------------------- pack, matmul */

static void matmul_case(int kind, int64_t rows, int64_t n, int64_t k, uint64_t seed) {
    int act = kinds[kind].act;
    stored s = store(kinds[kind].stored, kinds[kind].to, n, k, seed);
    pair w = packed(&s);
    int64_t stride = k + (seed % 2 ? 3 : 0), ystride = n + (int64_t)(seed % 3);
    void *x = twin_acts(rows * stride, seed, 1, act);
    float *bias = twin_normals(n, seed + 7, 1), *add = twin_normals(rows * ystride, seed + 8, 1), *got = calloc((size_t)(rows * ystride) + 1, 4),
          *want = calloc((size_t)(rows * ystride) + 1, 4), *size = calloc((size_t)(rows * ystride) + 1, 4);
    memcpy(want, add, (size_t)(rows * ystride) * 4);
    bool extra = seed % 2;
    struct exc_matmul_args a = {x, stride, act, &w.cpu, extra ? bias : NULL, extra ? want : NULL, want, ystride, rows}, g = a;
    g.x = twin_up(x, (size_t)(rows * stride) * act_size(act));
    g.w = &w.gpu;
    g.bias = extra ? twin_up(bias, (size_t)n * 4) : NULL;
    g.y = twin_up(add, (size_t)(rows * ystride) * 4);
    g.add = extra ? g.y : NULL;
    assert_int_equal(exc_cpu_matmul(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(matmul, &g);
    twin_down(got, g.y, (size_t)(rows * ystride) * 4);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t o = 0; o < ystride; o++) {
            double sq = 1e-12, in;
            for (int64_t i = 0; i < k && o < n; i++) {
                in = act == EXC_F32 ? (double)((float *)x)[t * stride + i] : (double)test_from_bf16(((uint16_t *)x)[t * stride + i]);
                sq += pow(in * weight_at(&s, o, i), 2);
            }
            size[t * ystride + o] = (float)sqrt(sq) + (extra ? fabsf(add[t * ystride + o]) : 0);
        }
    close_sums(got, want, size, rows * ystride, k, "matmul");
    twin_done();
    free((void *)(uintptr_t)w.cpu.data), free(x), free(bias), free(add), free(got), free(want), free(size);
    unstore(&s);
}

static void matmul_all(void **state) {
    static const int64_t shapes[][3] = {{1, 1, 32}, {1, 31, 64}, {5, 33, 96}, {17, 127, 160}, {70, 200, 64}, {130, 130, 288}, {33, 48, 416}, {0, 16, 32}};
    for (size_t k = 0; k < EXC_COUNT(kinds); k++)
        for (size_t i = 0; i < EXC_COUNT(shapes); i++) {
            if (twin_small() && i != 1) continue;
            matmul_case((int)k, shapes[i][0], shapes[i][1], shapes[i][2], 3 * i + k);
        }
    for (size_t k = 0; k < 5 && !twin_small(); k++) matmul_case((int)k, 9, 21, 37, 50 + k); /* inputs that are no whole pieces */
    for (size_t k = 0; k < 5; k++) matmul_case((int)k, 3, 5, 1, 60 + k);
    matmul_case(5, 9, 21, 200, 71); /* a partial span of scales */
    if (!twin_small()) matmul_case(7, 9, 150, 300, 72), matmul_case(5, 3, 70, 1000, 73), matmul_case(6, 9, 66, 1056, 75); /* rings go round */
}

/* on a reproducible queue bits of a row do not depend on the rows beside it */
static void matmul_rows_alone(void **state) {
    enum { T = 70, N = 68, K = 96 };
    set_reproducible(1);
    for (size_t kind = 0; kind < EXC_COUNT(kinds); kind += twin_small() ? 3 : 1) {
        int act = kinds[kind].act;
        stored s = store(kinds[kind].stored, kinds[kind].to, N, K, kind);
        pair w = packed(&s);
        void *x = twin_acts(T * K, 1, 1, act);
        float *y = calloc(T * N, 4), *one = calloc(N, 4);
        struct exc_matmul_args g = {twin_up(x, T * K * act_size(act)), K, act, &w.gpu, NULL, NULL, twin_up(y, T * N * 4), N, T};
        TWIN_RUN(matmul, &g);
        twin_down(y, g.y, T * N * 4);
        float *all = g.y;
        for (int64_t t = 0; t < T; t += 23) {
            struct exc_matmul_args h = g;
            h.x = (const char *)g.x + (size_t)(t * K) * act_size(act);
            h.rows = 1;
            h.y = all;
            TWIN_RUN(matmul, &h);
            twin_down(one, all, N * 4);
            assert_memory_equal(one, y + t * N, N * 4);
        }
        twin_done();
        free((void *)(uintptr_t)w.cpu.data), free(x), free(y), free(one);
        unstore(&s);
    }
    set_reproducible(0);
}

static void bundle_all(void **state) {
    static const int64_t shapes[][4] = {{1, 1, 16, 32}, {5, 3, 33, 64}, {33, 2, 20, 96}, {70, 4, 16, 48}};
    for (size_t kind = 0; kind < EXC_COUNT(kinds); kind++)
        for (size_t i = 0; i < (twin_small() ? 1 : EXC_COUNT(shapes)); i++) {
            int64_t T = shapes[i][0], heads = shapes[i][1], n = shapes[i][2], k = shapes[i][3] / 32 * 32;
            int act = kinds[kind].act;
            bool same = i % 2; /* all heads read the same rows */
            int64_t xs = same ? k : heads * k, ys = heads * n + 2;
            exc_packed cpu[4], gpu[4];
            stored s[4];
            for (int64_t h = 0; h < heads; h++) {
                s[h] = store(kinds[kind].stored, kinds[kind].to, n, k, 3 * (10 * i + (size_t)h) + kind % 3);
                pair w = packed(&s[h]);
                cpu[h] = w.cpu, gpu[h] = w.gpu;
            }
            void *x = twin_acts(T * xs, i, 1, act), *want = calloc((size_t)(T * ys) + 1, 4), *got = calloc((size_t)(T * ys) + 1, 4);
            struct exc_bundle_args a = {x, xs, same ? 0 : k, act, cpu, heads, want, ys, n, T, n, kinds[kind].to}, g = a;
            g.x = twin_up(x, (size_t)(T * xs) * act_size(act));
            g.w = twin_up(gpu, (size_t)heads * sizeof *gpu);
            g.y = twin_up(want, (size_t)(T * ys) * act_size(act));
            assert_int_equal(exc_cpu_bundle(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(bundle, &g);
            twin_down(got, g.y, (size_t)(T * ys) * act_size(act));
            if (act == EXC_F32) twin_close_f32(got, want, (size_t)(T * ys), 1e-5, 1e-4, "bundle");
            else twin_close_bf16(got, want, (size_t)(T * ys), 64, 20, "bundle"); /* cancelled sums differ by many of their small ulp */
            twin_done();
            for (int64_t h = 0; h < heads; h++) free((void *)(uintptr_t)cpu[h].data), unstore(&s[h]);
            free(x), free(want), free(got);
        }
}

/* ----------------------------------------------------------------------------------------------------- permute, experts */

static void permute_all(void **state) {
    static const int64_t shapes[][3] = {{0, 2, 4}, {1, 1, 1}, {5, 3, 7}, {127, 8, 128}, {700, 4, 1000}, {3000, 2, 31}};
    for (size_t i = 0; i < EXC_COUNT(shapes); i++)
        for (int skew = 0; skew < 3; skew++) {
            int64_t T = shapes[i][0], K = shapes[i][1], E = shapes[i][2], n = T * K;
            if (twin_small() && n > 1100) continue;
            int32_t *ids = malloc(((size_t)n + 1) * 4), *r[2], *p[2];
            int64_t *o[2];
            for (int64_t j = 0; j < n; j++) {
                uint64_t u = exc_random_u64(i, 3, (uint64_t)j);
                ids[j] = skew == 0 ? (int32_t)(u % (uint64_t)E) : skew == 1 ? (u % 3 ? 0 : (int32_t)(u / 3 % (uint64_t)E)) : u % 5 ? (int32_t)(u / 5 % (uint64_t)E) : -1;
            }
            for (int b = 0; b < 2; b++) r[b] = calloc((size_t)n + 1, 4), p[b] = calloc((size_t)n + 1, 4), o[b] = calloc((size_t)E + 1, 8);
            struct exc_permute_args a = {ids, T, K, E, o[0], r[0], p[0]}, g = a;
            g.ids = twin_up(ids, (size_t)n * 4);
            g.offset = twin_up(o[1], (size_t)(E + 1) * 8);
            g.row_of = twin_up(r[1], (size_t)n * 4);
            g.pair_of = twin_up(p[1], (size_t)n * 4);
            assert_int_equal(exc_cpu_permute(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(permute, &g);
            twin_down(o[1], g.offset, (size_t)(E + 1) * 8);
            twin_down(r[1], g.row_of, (size_t)n * 4);
            twin_down(p[1], g.pair_of, (size_t)n * 4);
            assert_memory_equal(o[0], o[1], (size_t)(E + 1) * 8);
            assert_memory_equal(r[0], r[1], (size_t)n * 4);
            assert_memory_equal(p[0], p[1], (size_t)o[0][E] * 4);
            twin_done();
            free(ids);
            for (int b = 0; b < 2; b++) free(r[b]), free(p[b]), free(o[b]);
        }
}

typedef struct grouping { int64_t T, K, E; int32_t *ids, *row_of, *pair_of, *slot; int64_t *offset; } grouping;

/* expert 0 is crowded, the last one empty */
static grouping group(int64_t T, int64_t K, int64_t E, uint64_t seed) {
    grouping g = {.T = T, .K = K, .E = E};
    size_t n = (size_t)(T * K);
    g.ids = malloc(n * 4 + 4), g.row_of = malloc(n * 4 + 4), g.pair_of = malloc(n * 4 + 4), g.slot = malloc((size_t)T * 4 + 4);
    g.offset = malloc((size_t)(E + 1) * 8);
    for (int64_t t = 0; t < T; t++) {
        g.slot[t] = t % 3 == 2 ? -1 : (int32_t)(t % 4);
        for (int64_t j = 0; j < K; j++) {
            uint64_t u = exc_random_u64(seed, 4, (uint64_t)(t * K + j));
            g.ids[t * K + j] = u % 3 == 0 || E < 3 ? 0 : (int32_t)(u / 3 % (uint64_t)(E - 1));
        }
    }
    struct exc_permute_args a = {g.ids, T, K, E, g.offset, g.row_of, g.pair_of};
    assert_int_equal(exc_cpu_permute(&twin.cpu->queue, &a), EXC_OK);
    return g;
}
static void ungroup(grouping *g) { free(g->ids), free(g->row_of), free(g->pair_of), free(g->slot), free(g->offset); }

/* all experts but the first, as a rank that holds those has them: the bits they have among all, and no other row is written */
static void stretch_case(struct exc_glu_args g, struct exc_down_args d, int64_t skip, int64_t rows, const void *mid, size_t as, const float *y) {
    size_t width[] = {(size_t)g.inner * as, (size_t)d.hidden * sizeof *y};
    const void *want[] = {mid, y};
    char *got[] = {calloc((size_t)rows + 1, width[0]), calloc((size_t)rows + 1, width[1])};
    g.gate++, g.up++, g.offset++, g.experts--, g.mid_sum = NULL;
    d.down++, d.offset++, d.experts--, d.sqnorm_sum = NULL;
    if (g.gate_bias) g.gate_bias += g.inner, g.up_bias += g.inner, d.bias += d.hidden;
    g.mid = twin_up(got[0], (size_t)rows * width[0]);
    d.y = twin_up(got[1], (size_t)rows * width[1]);
    TWIN_RUN(glu, &g);
    TWIN_RUN(down, &d);
    twin_down(got[0], g.mid, (size_t)rows * width[0]);
    twin_down(got[1], d.y, (size_t)rows * width[1]);
    for (int i = 0; i < 2; i++) {
        size_t before = (size_t)skip * width[i];
        for (size_t b = 0; b < before; b++) assert_int_equal(got[i][b], 0);
        assert_memory_equal(got[i] + before, (const char *)want[i] + before, (size_t)rows * width[i] - before);
        free(got[i]);
    }
}

static void experts_case(int kind, int64_t T, int64_t K, int64_t E, int64_t H, int64_t I, int clamped, int reproducible, uint64_t seed) {
    int act = kinds[kind].act, to = kinds[kind].to;
    size_t as = act_size(act);
    grouping gr = group(T, K, E, seed);
    int64_t rows = gr.offset[E];
    stored *s = calloc((size_t)(3 * E), sizeof *s);
    exc_packed *cpu = calloc((size_t)(3 * E), sizeof *cpu), *gpu = calloc((size_t)(3 * E), sizeof *gpu);
    for (int64_t i = 0; i < 3 * E; i++) {
        s[i] = store(kinds[kind].stored, to, i < 2 * E ? I : H, i < 2 * E ? H : I, seed + (uint64_t)i);
        pair w = packed(&s[i]);
        cpu[i] = w.cpu, gpu[i] = w.gpu;
    }
    set_reproducible(reproducible);
    void *x = twin_acts(T * H, seed, 1, act), *mid[2];
    float *gb = twin_normals(E * I, 1, 0.3f), *ub = twin_normals(E * I, 2, 0.3f), *db = twin_normals(E * H, 3, 0.3f), *y[2];
    double *ms[2], *sq[2];
    for (int b = 0; b < 2; b++) {
        mid[b] = calloc((size_t)(rows * I) + 1, 4), y[b] = calloc((size_t)(rows * H) + 1, 4);
        ms[b] = calloc((size_t)(E * I), 8), sq[b] = calloc((size_t)E, 8);
        for (int64_t i = 0; i < E * I; i++) ms[b][i] = 1.5;
    }
    const void *there_w = twin_up(gpu, (size_t)(3 * E) * sizeof *gpu);
    const int64_t *there_o = twin_up(gr.offset, (size_t)(E + 1) * 8);
    const int32_t *there_p = twin_up(gr.pair_of, (size_t)(T * K) * 4), *there_s = twin_up(gr.slot, (size_t)T * 4);
    bool one = E == 1 && K == 1; /* the dense case reads rows as they are */
    struct exc_glu_args a = {x, act, cpu, cpu + E, clamped ? gb : NULL, clamped ? ub : NULL, {clamped ? EXC_GLU_CLAMPED : EXC_GLU_SILU, 1.702f, 7},
                             gr.offset, one ? NULL : gr.pair_of, T, K, E, H, I, mid[0], gr.slot, ms[0], to}, g = a;
    g.x = twin_up(x, (size_t)(T * H) * as);
    g.gate = there_w;
    g.up = (const exc_packed *)there_w + E;
    g.gate_bias = clamped ? twin_up(gb, (size_t)(E * I) * 4) : NULL;
    g.up_bias = clamped ? twin_up(ub, (size_t)(E * I) * 4) : NULL;
    g.offset = there_o, g.pair_of = one ? NULL : there_p, g.slot = there_s;
    g.mid = twin_up(mid[1], (size_t)(rows * I) * as);
    g.mid_sum = twin_up(ms[1], (size_t)(E * I) * 8);
    assert_int_equal(exc_cpu_glu(&twin.cpu->queue, &a), EXC_OK);
    TWIN_RUN(glu, &g);
    twin_down(mid[1], g.mid, (size_t)(rows * I) * as);
    twin_down(ms[1], g.mid_sum, (size_t)(E * I) * 8);
    if (act == EXC_F32) twin_close_f32(mid[1], mid[0], (size_t)(rows * I), 2e-4, 2e-4, "glu");
    else twin_close_bf16(mid[1], mid[0], (size_t)(rows * I), 40, 10, "glu");
    for (int64_t e = 0; e < E; e++)
        for (int64_t c = 0; c < I; c++) {
            /* the device's sum against its own stored rows */
            double sum = 1.5, size = 0;
            for (int64_t r = gr.offset[e]; r < gr.offset[e + 1]; r++) {
                if (gr.slot[gr.pair_of[r] / K] < 0) continue;
                double value = act == EXC_F32 ? (double)((float *)mid[1])[r * I + c] : (double)test_from_bf16(((uint16_t *)mid[1])[r * I + c]);
                sum += value;
                size += fabs(value);
            }
            double got = ms[1][e * I + c], room = 64 * 0x1p-24 * size + 0x1p-28 * (double)(gr.offset[e + 1] - gr.offset[e]);
            if (!(fabs(got - sum) <= room)) fail_msg("mid_sum[%d,%d] = %.9g, want %.9g", (int)e, (int)c, got, sum);
        }

    struct exc_down_args da = {mid[0], act, cpu + 2 * E, clamped ? db : NULL, gr.offset, one ? NULL : gr.pair_of, T, K, E, H, I, y[0], gr.slot, sq[0], to}, dg = da;
    dg.mid = twin_up(mid[0], (size_t)(rows * I) * as); /* the same rows, so that only this op is compared */
    dg.down = (const exc_packed *)there_w + 2 * E;
    dg.bias = clamped ? twin_up(db, (size_t)(E * H) * 4) : NULL;
    dg.offset = there_o, dg.pair_of = one ? NULL : there_p, dg.slot = there_s;
    dg.y = twin_up(y[1], (size_t)(rows * H) * 4);
    dg.sqnorm_sum = twin_up(sq[1], (size_t)E * 8);
    assert_int_equal(exc_cpu_down(&twin.cpu->queue, &da), EXC_OK);
    TWIN_RUN(down, &dg);
    twin_down(y[1], dg.y, (size_t)(rows * H) * 4);
    twin_down(sq[1], dg.sqnorm_sum, (size_t)E * 8);
    double norm = 0, far = 0;
    for (int64_t i = 0; i < rows * H; i++) norm += pow((double)y[0][i], 2), far += pow((double)y[0][i] - (double)y[1][i], 2);
    if (!(sqrt(far) <= 2e-6 * sqrt(norm))) fail_msg("down: distance %.3g", sqrt(far / norm));
    for (int64_t e = 0; e < E; e++)
        if (!(fabs(sq[0][e] - sq[1][e]) <= 1e-5 * sq[0][e])) fail_msg("sqnorm_sum[%d] = %.9g, want %.9g", (int)e, sq[1][e], sq[0][e]);
    if (reproducible && E > 2) stretch_case(g, dg, gr.offset[1], rows, mid[1], as, y[1]);
    set_reproducible(0);
    twin_done();
    for (int64_t i = 0; i < 3 * E; i++) free((void *)(uintptr_t)cpu[i].data), unstore(&s[i]);
    for (int b = 0; b < 2; b++) free(mid[b]), free(y[b]), free(ms[b]), free(sq[b]);
    free(s), free(cpu), free(gpu), free(x), free(gb), free(ub), free(db);
    ungroup(&gr);
}

static void experts_all(void **state) {
    for (int kind = 0; kind < (int)EXC_COUNT(kinds); kind++) {
        experts_case(kind, 5, 2, 4, 64, 32, 0, 0, 1);
        if (twin_small()) continue;
        experts_case(kind, 1, 1, 1, 32, 32, 1, 1, 2);
        experts_case(kind, 150, 2, 3, 64, 96, 1, 0, 3);
        experts_case(kind, 97, 1, 1, 96, 64, 0, 1, 4);
    }
    experts_case(0, 33, 3, 7, 37, 41, 0, 0, 5); /* no whole pieces */
    experts_case(3, 33, 3, 7, 37, 41, 1, 1, 6);
}

/* reproducible sums: the same bits however tokens are split over calls, and those of the CPU for the same rows */
static void sums_any_split(void **state) {
    enum { T = 90, H = 32, I = 64 };
    stored s[2];
    exc_packed w[2];
    for (int i = 0; i < 2; i++) {
        s[i] = store(EXC_BF16, EXC_BF16, I, H, (uint64_t)i);
        pair p = packed(&s[i]);
        w[i] = p.gpu;
        free((void *)(uintptr_t)p.cpu.data);
    }
    void *x = twin_acts(T * H, 5, 1, EXC_BF16);
    double *zero = calloc(I, 8), whole[I], parts[I];
    int32_t slot[T] = {0};
    uint16_t mid[T * I] = {0};
    set_reproducible(1);
    const exc_packed *there = twin_up(w, sizeof w);
    char *tx = twin_up(x, T * H * 2), *tm = twin_up(mid, sizeof mid);
    const int32_t *ts = twin_up(slot, sizeof slot);
    double *sum[2] = {twin_up(zero, I * 8), twin_up(zero, I * 8)};
    for (int way = 0; way < 2; way++)
        for (int64_t first = 0, n; first < T; first += n) {
            n = way ? (first ? 13 : 1) : T;
            if (first + n > T) n = T - first;
            int64_t offset[2] = {0, n};
            struct exc_glu_args g = {tx + first * H * 2, EXC_BF16, there, there + 1, NULL, NULL, {EXC_GLU_SILU, 0, 0}, twin_up(offset, 16), NULL, n, 1, 1, H, I,
                                     tm, ts, sum[way], EXC_BF16};
            TWIN_RUN(glu, &g);
        }
    twin_down(whole, sum[0], I * 8);
    twin_down(parts, sum[1], I * 8);
    assert_memory_equal(whole, parts, I * 8);
    set_reproducible(0);
    twin_done();
    free(x), free(zero);
    for (int i = 0; i < 2; i++) unstore(&s[i]);
}

static void combine_all(void **state) {
    static const int64_t shapes[][4] = {{0, 1, 8, 0}, {1, 1, 1, 1}, {5, 3, 33, 2}, {31, 8, 129, 5}, {3, 2, 1027, 16}};
    for (size_t i = 0; i < EXC_COUNT(shapes); i++)
        for (int variant = 0; variant < 4; variant++) {
            int64_t T = shapes[i][0], K = shapes[i][1], H = shapes[i][2], R = variant & 1 ? shapes[i][3] : 0, E = 6;
            grouping gr = group(T, K, E, i);
            float *y = twin_normals(T * K * H, i, 1), *w = twin_normals(T * K, 9, 1), *b = twin_normals(R * H, 10, 1 / sqrtf((float)H)), *st = twin_normals(E, 11, 1),
                  *sc = twin_normals(E, 12, 1), *h = twin_normals(T * H, 13, 1), *got = calloc((size_t)(T * H) + 1, 4);
            if (T > 2) gr.row_of[K] = -1;
            struct exc_combine_args a = {y, gr.row_of, gr.ids, w, T, K, H, R ? b : NULL, R, st, variant & 2 ? sc : NULL, h}, g = a;
            g.y = twin_up(y, (size_t)(T * K * H) * 4);
            g.row_of = twin_up(gr.row_of, (size_t)(T * K) * 4);
            g.ids = twin_up(gr.ids, (size_t)(T * K) * 4);
            g.weights = twin_up(w, (size_t)(T * K) * 4);
            g.basis = R ? twin_up(b, (size_t)(R * H) * 4) : NULL;
            g.strength = twin_up(st, (size_t)E * 4);
            g.scale = variant & 2 ? twin_up(sc, (size_t)E * 4) : NULL;
            g.h = twin_up(h, (size_t)(T * H) * 4);
            assert_int_equal(exc_cpu_combine(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(combine, &g);
            twin_down(got, g.h, (size_t)(T * H) * 4);
            if (!R) assert_memory_equal(got, h, (size_t)(T * H) * 4); /* the same additions in the same order */
            else twin_close_f32(got, h, (size_t)(T * H), 1e-5, 2e-5, "combine");
            twin_done();
            free(y), free(w), free(b), free(st), free(sc), free(h), free(got);
            ungroup(&gr);
        }
}

/* ---------------------------------------------------------------------------------------------------------- view, widen */

static void view_all(void **state) {
    for (size_t unit = 1; unit <= 4; unit *= 2)
        for (int way = 0; way < 4; way++) {
            int64_t R = 37, C = 70, n = 2 * R * C;
            uint8_t *src = malloc((size_t)n * unit), *want = calloc((size_t)n, unit), *got = calloc((size_t)n, unit);
            for (size_t i = 0; i < (size_t)n * unit; i++) src[i] = (uint8_t)exc_random_u64(1, unit, i);
            struct exc_view_args a = {src, way & 1 ? 1 : 2 * C, way & 1 ? R : 2, want, way & 2 ? 2 : C, way & 2 ? 2 * R : 1, R, C, unit}, g = a;
            g.src = twin_up(src, (size_t)n * unit);
            g.dst = twin_up(want, (size_t)n * unit);
            assert_int_equal(exc_cpu_view(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(view, &g);
            twin_down(got, g.dst, (size_t)n * unit);
            assert_memory_equal(got, want, (size_t)n * unit);
            twin_done();
            free(src), free(want), free(got);
        }
}

/* rows of every word that a copy can have, with and without a share; the first row again and again, and the last */
static void gather_all(void **state) {
    static const size_t widths[] = {2, 6, 4, 12, 16, 160, 0, 8208};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        for (int64_t rows = 0; rows <= 33; rows += 11)
            for (int64_t share = 1; share <= 3; share += 2) {
                size_t width = widths[i], from = 9 * width + 1, to = (size_t)rows * width + 16;
                uint8_t *x = malloc(from), *want = calloc(to, 1), *got = calloc(to, 1);
                int32_t *index = malloc((size_t)(rows + 1) * sizeof *index);
                for (size_t b = 0; b < from; b++) x[b] = (uint8_t)exc_random_u64(2, width, b);
                for (int64_t r = 0; r < rows; r++) {
                    index[r] = (int32_t)(r % 4 == 0 ? 0 : r % 4 == 1 ? 9 * share - 1 : (int64_t)(exc_random_u64(3, width, (uint64_t)r) % (uint64_t)(9 * share)));
                    memcpy(want + (size_t)r * width, x + (size_t)(index[r] / share) * width, width);
                }
                struct exc_gather_args a = {x, index, share, rows, width, got}, g = a;
                assert_int_equal(exc_cpu_gather(&twin.cpu->queue, &a), EXC_OK);
                assert_memory_equal(got, want, to);
                memset(got, 0, to);
                g.x = twin_up(x, from);
                g.index = twin_up(index, (size_t)(rows + 1) * sizeof *index);
                g.y = twin_up(got, to);
                TWIN_RUN(gather, &g);
                twin_down(got, g.y, to);
                assert_memory_equal(got, want, to);
                twin_done();
                free(x), free(want), free(got), free(index);
            }
}

/* E experts over every number of ranks, against the rule by which they are dealt out */
static void whence_all(void **state) {
    for (int64_t E = 1; E <= 31; E += 6)
        for (int64_t ranks = 1; ranks <= E && ranks <= 9; ranks += ranks < 4 ? 1 : 5)
            for (int64_t T = 0; T <= 43; T += 43) {
                int64_t K = E < 4 ? E : 4, n = T * K;
                grouping g = group(T, K, E, (uint64_t)(E * 16 + ranks));
                int32_t *want = calloc((size_t)n + 1, 4), *got = calloc((size_t)n + 1, 4);
                struct exc_whence_args a = {g.ids, g.pair_of, n, E, ranks, got}, d = a;
                for (int64_t r = 0, first = 0, end = 0; r < n; r++)
                    for (int b = 0; b < (int)ranks; b++) {
                        exc_share(E, b, (int)ranks, &first, &end);
                        int32_t e = g.ids[g.pair_of[r]];
                        if (e >= first && e < end) want[r] = (int32_t)(b * n + g.pair_of[r]);
                    }
                assert_int_equal(exc_cpu_whence(&twin.cpu->queue, &a), EXC_OK);
                assert_memory_equal(got, want, (size_t)n * 4);
                memset(got, 0, (size_t)n * 4);
                d.ids = twin_up(g.ids, (size_t)n * 4);
                d.pair_of = twin_up(g.pair_of, (size_t)n * 4);
                d.index = twin_up(got, (size_t)n * 4);
                TWIN_RUN(whence, &d);
                twin_down(got, d.index, (size_t)n * 4);
                assert_memory_equal(got, want, (size_t)n * 4);
                twin_done();
                ungroup(&g);
                free(want), free(got);
            }
}

static void widen_all(void **state) {
    static const int to[] = {EXC_F32, EXC_BF16, EXC_F64};
    for (int four = 0; four < 2; four++)
        for (size_t d = 0; d < 3; d++)
            for (int bad = 0; bad < 2; bad++) {
                int64_t n = 133, k = four ? 96 : 150;
                stored s = store(four ? EXC_F4 : EXC_F8_E4M3, EXC_F32, n, k, 3 + d);
                if (bad && four) s.scale[77] = 255;
                if (bad && !four) s.w[777] = 0x7f, s.w[5000] = 0xff;
                size_t bytes = (size_t)(n * k) * (to[d] == EXC_F64 ? 8 : to[d] == EXC_F32 ? 4 : 2);
                char *want = calloc(bytes, 1), *got = calloc(bytes, 1);
                int64_t flag[2] = {5, 5}, there[2] = {5, 5};
                struct exc_widen_args a = {s.w, s.dtype, s.scale, s.scale_dtype, n, k, want, to[d], &flag[0], &flag[1]}, g = a;
                g.src = twin_up(s.w, s.bytes);
                g.scale = twin_up(s.scale, s.scale_bytes);
                g.dst = twin_up(want, bytes);
                g.nonfinite = twin_up(&there[0], 8);
                g.index = twin_up(&there[1], 8);
                assert_int_equal(exc_cpu_widen(&twin.cpu->queue, &a), EXC_OK);
                TWIN_RUN(widen, &g);
                twin_down(got, g.dst, bytes);
                twin_down(&there[0], g.nonfinite, 8);
                twin_down(&there[1], g.index, 8);
                if (!bad || !four) assert_memory_equal(got, want, bytes);
                assert_int_equal(there[0], flag[0]);
                assert_int_equal(there[1], flag[1]);
                twin_done();
                free(want), free(got);
                unstore(&s);
            }
}

static void refusals(void **state) {
    exc_packed w = {NULL, 4, 32, EXC_F32};
    assert_int_equal(TWIN_STATUS(matmul, (&(struct exc_matmul_args){.act = EXC_BF16, .w = &w, .rows = 1})), EXC_ERR_USAGE);
    w.dtype = EXC_BF16;
    assert_int_equal(TWIN_STATUS(matmul, (&(struct exc_matmul_args){.act = EXC_BF16, .w = &w, .rows = 1})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(glu, (&(struct exc_glu_args){.act = EXC_BF16, .tokens = 1})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(down, (&(struct exc_down_args){.act = EXC_BF16, .tokens = 1})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(permute, (&(struct exc_permute_args){.tokens = -1})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(combine, (&(struct exc_combine_args){.tokens = 1, .top_k = 65})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(view, (&(struct exc_view_args){.rows = 1, .columns = 1, .unit = 3})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(gather, (&(struct exc_gather_args){.rows = 1, .share = 1, .width = 3})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(gather, (&(struct exc_gather_args){.rows = 1, .width = 4})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(whence, (&(struct exc_whence_args){.pairs = 1, .experts = 2, .ranks = 3})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(whence, (&(struct exc_whence_args){.pairs = INT32_MAX, .experts = 2, .ranks = 2})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(pack, (&(struct exc_pack_args){.n = 1, .k = 8, .w_dtype = EXC_F4, .to = EXC_F4})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(widen, (&(struct exc_widen_args){.rows = 1, .cols = 31, .dtype = EXC_F4, .scale_dtype = EXC_F8_E8M0})), EXC_ERR_USAGE);
    assert_int_equal(TWIN_STATUS(bundle, (&(struct exc_bundle_args){.act = EXC_F16})), EXC_ERR_USAGE);
}

/* y = x W^T in f64 of weights as they are packed, both kinds of code too */
static void matvec_codes(void **state) {
    static const int64_t shapes[][3] = {{1, 33, 200}, {5, 130, 96}, {4, 16, 1056}};
    for (int kind = 3; kind < 7; kind++) /* f32, bf16, e4m3, fp4 */
        for (size_t i = 0; i < (twin_small() ? 1 : EXC_COUNT(shapes)); i++) {
            int64_t rows = shapes[i][0], n = shapes[i][1], k = shapes[i][2];
            if (kinds[kind].to == EXC_F4) k = (k + 31) / 32 * 32;
            stored s = store(kinds[kind].stored, kinds[kind].to, n, k, 40 + i);
            pair w = packed(&s);
            double *x = calloc((size_t)(rows * k), 8), *want = calloc((size_t)(rows * n), 8), *got = calloc((size_t)(rows * n), 8);
            for (int64_t j = 0; j < rows * k; j++) x[j] = (double)test_normal(9, (uint64_t)j) * (1 + 1e-9 * (double)j);
            struct exc_matvec_args a = {x, &w.cpu, rows, want},
                                   g = {twin_up(x, (size_t)(rows * k) * 8), &w.gpu, rows, twin_up(got, (size_t)(rows * n) * 8)};
            assert_int_equal(exc_cpu_matvec(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(matvec, &g);
            twin_down(got, g.y, (size_t)(rows * n) * 8);
            for (int64_t j = 0; j < rows * n; j++) {
                double size = 0; /* k + 1 roundings of at most the sum of the terms' sizes each */
                for (int64_t c = 0; c < k; c++) size += fabs(weight_at(&s, j % n, c) * x[j / n * k + c]);
                if (!(fabs(got[j] - want[j]) <= (double)(k + 1) * 0x1p-52 * size)) fail_msg("kind %d: y[%d] = %.17g, want %.17g", kind, (int)j, got[j], want[j]);
            }
            twin_done();
            free((void *)(uintptr_t)w.cpu.data), unstore(&s), free(x), free(want), free(got);
        }
}

/* tiles of four warps at once, on a Hopper (HC_MAJOR=9 plays one): they were tried and did right */
static void wide_tiles(void **state) {
    exc_device_info info;
    char lines[2048];
    twin_ok(twin.gpu->module->describe(twin.gpu->queue.device, &info));
    if (info.major != 9) skip();
    twin.gpu->module->libraries(lines, sizeof lines);
    assert_non_null(strstr(lines, "wgmma: products of bf16 rows"));
    for (int kind = 0; kind < (int)EXC_COUNT(kinds); kind++)
        if (kinds[kind].act == EXC_BF16 && kinds[kind].to == EXC_BF16) {
            experts_case(kind, twin_small() ? 100 : 300, 2, 3, 200, 136, 1, 0, 9);
            matmul_case(kind, 257, 130, 72, 10); /* rows of 130 outputs: not for cuBLASLt */
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matmul_all),     cmocka_unit_test(matmul_rows_alone), cmocka_unit_test(bundle_all),
        cmocka_unit_test(permute_all),    cmocka_unit_test(experts_all),       cmocka_unit_test(sums_any_split),
        cmocka_unit_test(combine_all),    cmocka_unit_test(view_all),          cmocka_unit_test(gather_all),
        cmocka_unit_test(whence_all),     cmocka_unit_test(widen_all),         cmocka_unit_test(matvec_codes),
        cmocka_unit_test(wide_tiles),     cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, twin_open, twin_close);
}
