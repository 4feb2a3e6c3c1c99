/* shapes.c - quantised weights in other layouts than the published ones: all experts of a layer in two fp8 tensors, and a model quantised
 * by the test itself with ragged blocks and each kind of scale, against the same numbers stored as f32. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "files.h"
#include "helpers.h"
#include "model.h"

static const int32_t prompt[] = {3, 50, 7, 120, 9, 9, 200, 11, 64, 300};
enum { N = 10 };

static float *logits_of(exc_ctx *ctx, const char *dir, exc_compute compute, size_t *n, uint64_t *bytes) {
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_model *m;
    exc_session *s;
    o.compute = compute;
    if (exc_model_open(ctx, dir, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
    int64_t capacity = 16, begin[2] = {0, N};
    int32_t slot = 0;
    assert_int_equal(exc_session_open(ctx, m, &(exc_room){.slots = 1, .cache_tokens = 16, .step_tokens = 16}, &s), EXC_OK);
    assert_int_equal(exc_session_reset(s, 1, &capacity), EXC_OK);
    *n = (size_t)(N * m->atlas->shape.vocab);
    *bytes = m->weight_bytes;
    float *z = malloc(*n * 4);
    exc_step step = {.tokens = prompt, .slot = &slot, .begin = begin, .sequences = 1, .logits_all = 1, .logits = z};
    assert_int_equal(exc_session_step(s, &step), EXC_OK);
    exc_session_close(s);
    exc_model_free(m);
    return z;
}

/* config.json of a model with `more` behind its first brace */
static void copy_config(const char *model, const char *dir, const char *more) {
    char path[128], *text;
    size_t n;
    snprintf(path, sizeof path, "models/%s/config.json", model);
    char *config = test_read(test_data(path), &n);
    assert_true(asprintf(&text, "{%s%s", more, strchr(config, '{') + 1) > 0);
    test_write(test_path(dir, "config.json"), text, strlen(text));
    free(text);
    free(config);
}

static const char fp8[] = "\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"weight_block_size\":[128,128]},";

static void replace(const char *path, const char *from, const char *to) {
    size_t n;
    char *text = test_read(path, &n), *at = strstr(text, from), *all;
    assert_non_null(at);
    assert_true(asprintf(&all, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from)) > 0);
    test_write(path, all, strlen(all));
    free(all);
    free(text);
}

static const void *find(const exc_checkpoint *c, const char *layer, int64_t l, const char *rest, int64_t e, const char *end, size_t *bytes) {
    char name[200];
    snprintf(name, sizeof name, "%s%lld.%s%lld.%s", layer, (long long)l, rest, (long long)e, end);
    const exc_tensor *t = exc_checkpoint_find(c, name);
    if (!t) fail_msg("no %s", name);
    *bytes = t->end - t->begin;
    return exc_checkpoint_data(c, t);
}

/* -------------------------------------------------------------------------------------------------- stacked experts */

/* experts of all layers, one behind the other, codes and scales, into tensors that newer loaders know */
static void stack(exc_writer *w, const exc_checkpoint *c, int64_t layers, int declare) {
    static const struct {
        const char *name, *part[2];
        int parts;
    } groups[] = {{"down_proj", {"down_proj", NULL}, 1}, {"gate_up_proj", {"gate_proj", "up_proj"}, 2}};
    const int64_t E = 8, side = 128;
    uint8_t *room = malloc((size_t)(E * 2 * side * side));
    for (int64_t l = 0; l < layers; l++)
        for (size_t g = 0; g < EXC_COUNT(groups); g++)
            for (int scales = 0; scales < 2; scales++) {
                char name[160], end[64];
                size_t at = 0, bytes;
                int64_t codes[3] = {E, groups[g].parts * side, side}, factors[3] = {E, groups[g].parts, 1};
                snprintf(name, sizeof name, "model.layers.%lld.mlp.experts.%s%s", (long long)l, groups[g].name, scales ? "_scale_inv" : "");
                if (declare) {
                    assert_int_equal(exc_writer_declare(w, name, scales ? EXC_BF16 : EXC_F8_E4M3, 3, scales ? factors : codes), EXC_OK);
                    continue;
                }
                for (int64_t e = 0; e < E; e++)
                    for (int p = 0; p < groups[g].parts; p++) {
                        snprintf(end, sizeof end, "%s.weight%s", groups[g].part[p], scales ? "_scale_inv" : "");
                        const void *from = find(c, "model.layers.", l, "mlp.experts.", e, end, &bytes);
                        memcpy(room + at, from, bytes);
                        at += bytes;
                    }
                assert_int_equal(exc_writer_put(w, name, room, at), EXC_OK);
            }
    free(room);
}

static void stacked_is_the_same(void **state) {
    exc_ctx *ctx = test_ctx(2);
    exc_checkpoint *c;
    exc_writer *w;
    const char *model = test_data("models/qwen3_moe_fp8");
    char *dir = test_tmpdir();
    assert_int_equal(exc_checkpoint_open(ctx, model, &c), EXC_OK);
    copy_config("qwen3_moe_fp8", dir, "");
    assert_int_equal(exc_writer_open(ctx, test_path(dir, "model.safetensors"), false, &w), EXC_OK);
    for (int put = 0; put < 2; put++) {
        for (size_t i = 0; i < c->n_tensors; i++) {
            const exc_tensor *t = c->by_name[i];
            if (strstr(t->name, "mlp.experts.")) continue;
            if (!put) assert_int_equal(exc_writer_declare(w, t->name, t->dtype, t->rank, t->shape), EXC_OK);
            else assert_int_equal(exc_writer_put(w, t->name, exc_checkpoint_data(c, t), t->end - t->begin), EXC_OK);
        }
        stack(w, c, 3, !put);
    }
    assert_int_equal(exc_writer_commit(w), EXC_OK);
    exc_checkpoint_close(c);
    size_t n, m;
    uint64_t small, large;
    for (int compute = 0; compute < 2; compute++) {
        float *a = logits_of(ctx, model, (exc_compute)compute, &n, &small), *b = logits_of(ctx, dir, (exc_compute)compute, &m, &large);
        assert_true(n == m && small == large);
        assert_memory_equal(a, b, n * 4);
        free(a);
        free(b);
    }
    exc_atlas *a;
    assert_int_equal(exc_atlas_open(ctx, dir, &a), EXC_OK);
    assert_int_equal(a->n_unknown, 0); /* scales are known with their weights */
    exc_atlas_close(a);
    exc_ctx_free(ctx);
}

/* ------------------------------------------------------------------------------------------------ quantised by the test */

/* matrices of the decoder but the router: what published fp8 checkpoints quantise; all experts of a layer in one tensor too */
static bool is_quantised(const exc_tensor *t) {
    return (t->rank == 2 || t->rank == 3) && strstr(t->name, "layers.") && strstr(t->name, "_proj") && t->dtype == EXC_BF16;
}

static double size_of(int code) { return code >> 3 ? ldexp(8 + (code & 7), (code >> 3) - 10) : ldexp(code, -9); }

/* nearest code by bisection over the 127 sizes, which ascend; ties do not matter here */
static uint8_t code_of(double x) {
    static double size[127];
    int low = 0, high = 126;
    if (size[126] == 0)
        for (int i = 0; i < 127; i++) size[i] = size_of(i);
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (size[middle] <= fabs(x)) low = middle;
        else high = middle;
    }
    int best = fabs(x) - size[low] < size[high] - fabs(x) ? low : high;
    return (uint8_t)(best | (x < 0 ? 0x80 : 0));
}

typedef struct quantised {
    uint8_t *code;
    void *scale; /* of the dtype */
    float *number; /* code times scale */
    int64_t slabs, rows, cols, scale_shape[3]; /* slabs: experts, each with blocks of its own */
    int64_t scales;
} quantised;

static quantised quantise(const exc_checkpoint *c, const exc_tensor *t, exc_dtype dtype) {
    int in = t->rank - 1;
    quantised q = {.slabs = in == 2 ? t->shape[0] : 1, .rows = t->shape[in - 1], .cols = t->shape[in]};
    const uint8_t *from = exc_checkpoint_data(c, t);
    int64_t down = (q.rows + 127) / 128, along = (q.cols + 127) / 128;
    q.scale_shape[0] = q.slabs, q.scale_shape[in - 1] = down, q.scale_shape[in] = along;
    q.scales = q.slabs * down * along;
    q.code = malloc((size_t)(q.slabs * q.rows * q.cols));
    q.number = malloc((size_t)(q.slabs * q.rows * q.cols) * 4);
    q.scale = malloc((size_t)q.scales * 4);
    for (int64_t s = 0; s < q.scales; s++) {
        int64_t slab = s / (down * along) * q.rows, r0 = slab + s / along % down * 128, c0 = s % along * 128;
        int64_t r1 = r0 + 128 < slab + q.rows ? r0 + 128 : slab + q.rows, c1 = c0 + 128 < q.cols ? c0 + 128 : q.cols;
        double most = 0;
        uint16_t h;
        for (int64_t r = r0; r < r1; r++)
            for (int64_t i = c0; i < c1; i++) {
                memcpy(&h, from + 2 * (r * q.cols + i), 2);
                most = fmax(most, fabs((double)test_from_bf16(h)));
            }
        float scale = (float)(most / 448);
        if (dtype == EXC_BF16) scale = test_from_bf16(test_bf16(scale)), ((uint16_t *)q.scale)[s] = test_bf16(scale);
        if (dtype == EXC_F8_E8M0) scale = (float)ldexp(1, (int)ceil(log2(most / 448))), ((uint8_t *)q.scale)[s] = (uint8_t)(127 + (int)ceil(log2(most / 448)));
        if (dtype == EXC_F32) ((float *)q.scale)[s] = scale;
        for (int64_t r = r0; r < r1; r++)
            for (int64_t i = c0; i < c1; i++) {
                memcpy(&h, from + 2 * (r * q.cols + i), 2);
                uint8_t k = q.code[r * q.cols + i] = code_of((double)test_from_bf16(h) / (double)scale);
                double v = size_of(k & 0x7f);
                q.number[r * q.cols + i] = (float)((k & 0x80 ? -v : v) * (double)scale);
            }
    }
    return q;
}

/* the model as codes and scales, or as the f32 numbers they are; inner: of its experts in one tensor, made of as many of their bytes */
static void write_model(exc_ctx *ctx, const exc_checkpoint *c, const char *dir, exc_dtype scales, int64_t inner, bool as_codes) {
    exc_writer *w;
    char name[220];
    assert_int_equal(exc_writer_open(ctx, test_path(dir, "model.safetensors"), false, &w), EXC_OK);
    for (int put = 0; put < 2; put++)
        for (size_t i = 0; i < c->n_tensors; i++) {
            exc_tensor own = *c->by_name[i], *t = &own;
            quantised q = {0};
            if (t->rank == 3 && inner && strstr(t->name, "gate_up_proj")) own.shape[1] = 2 * inner;
            if (t->rank == 3 && inner && strstr(t->name, "experts.down_proj")) own.shape[2] = inner;
            exc_dtype dtype = !is_quantised(t) ? t->dtype : as_codes ? EXC_F8_E4M3 : EXC_F32;
            if (is_quantised(t)) q = quantise(c, t, scales);
            snprintf(name, sizeof name, "%s_scale_inv", t->name);
            if (!put) {
                assert_int_equal(exc_writer_declare(w, t->name, dtype, t->rank, t->shape), EXC_OK);
                if (q.code && as_codes) assert_int_equal(exc_writer_declare(w, name, scales, t->rank, q.scale_shape), EXC_OK);
            } else if (!q.code) {
                assert_int_equal(exc_writer_put(w, t->name, exc_checkpoint_data(c, t), t->end - t->begin), EXC_OK);
            } else {
                size_t n = (size_t)(q.slabs * q.rows * q.cols), m = (size_t)q.scales * exc_dtype_bits(scales) / 8;
                assert_int_equal(exc_writer_put(w, t->name, as_codes ? (void *)q.code : (void *)q.number, as_codes ? n : 4 * n), EXC_OK);
                if (as_codes) assert_int_equal(exc_writer_put(w, name, q.scale, m), EXC_OK);
            }
            free(q.code);
            free(q.scale);
            free(q.number);
        }
    assert_int_equal(exc_writer_commit(w), EXC_OK);
}

/* no matrix of the decoder is wider in memory than it is stored; kv_b of latent attention falls into heads and is */
static void all_codes(exc_ctx *ctx, const char *dir) {
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_model *m;
    assert_int_equal(exc_model_open(ctx, dir, &o, &m), EXC_OK);
    const exc_shape *s = &m->atlas->shape;
    for (int64_t i = 0; i < s->layers; i++) {
        const exc_layer *y;
        assert_int_equal(exc_layer_at(ctx, m, i, 1, &y), EXC_OK);
        const exc_packed *in = s->mix[i] == EXC_MIX_LINEAR ? &y->mix.linear.in : s->mix[i] == EXC_MIX_LATENT ? &y->mix.latent.first : &y->mix.softmax.qkv;
        assert_int_equal(in->dtype, EXC_F8_E4M3);
        if (s->mix[i] == EXC_MIX_LINEAR) assert_int_equal(y->mix.linear.gates.dtype, EXC_F8_E4M3);
        assert_true(y->out.dtype == EXC_F8_E4M3 && y->gate.here->dtype == EXC_F8_E4M3 && y->up.here->dtype == EXC_F8_E4M3 && y->down.here->dtype == EXC_F8_E4M3);
    }
    exc_model_free(m);
}

/* gates and ups of experts of 32 rows share a block of scales: plans may not edit them as they are, but in a bf16 copy */
static void shared_block(exc_ctx *ctx, const char *dir) {
    static const char text[] = "{\"excise_plan\":1,\"edits\":[{\"op\":\"scale\",\"role\":\"expert_up\",\"strength\":0.5}]}";
    char *out = strdup(test_path(test_tmpdir(), "out")), *json;
    exc_apply_options o = EXC_APPLY_OPTIONS;
    exc_plan *plan;
    test_write(test_path(dir, "plan.json"), text, strlen(text));
    assert_int_equal(exc_plan_load(ctx, test_path(dir, "plan.json"), &plan), EXC_OK);
    test_refused(ctx, exc_apply(ctx, dir, plan, out, &o, NULL), EXC_ERR_INPUT, "expert_up", "gate_up_proj", "--to bf16", NULL);
    assert_int_equal(exc_inspect(ctx, dir, &json), EXC_OK);
    assert_non_null(strstr(json, "\"edits\":[],\"why_not\":\"a block of scales"));
    exc_free(json);
    o.to = "bf16";
    if (exc_apply(ctx, dir, plan, out, &o, NULL) || exc_verify(ctx, dir, out, NULL, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    exc_plan_free(plan);
    free(out);
}

/* blocks of 96 x 64 and other edges; latent attention slices its projections by heads, gated attention and a delta net move rows of
 * theirs, experts in one tensor have gates and ups in one block. f32 sums in another order: 1e-5. In memory the codes stay codes: less
 * than half of what bf16 takes, but for what is no matrix of the decoder. */
static void ragged_blocks(void **state) {
    static const exc_dtype scales[] = {EXC_F32, EXC_BF16, EXC_F8_E8M0, EXC_F32, EXC_BF16};
    static const char *const names[] = {"deepseek_v3", "moonlight", "glm4_moe", "qwen3_next", "qwen3_5_moe"};
    exc_ctx *ctx = test_ctx(2);
    for (size_t i = 0; i < EXC_COUNT(names); i++) {
        char path[64], *codes = test_tmpdir(), *numbers = test_tmpdir();
        exc_checkpoint *c;
        size_t n, m;
        uint64_t small, large;
        snprintf(path, sizeof path, "models/%s", names[i]);
        assert_int_equal(exc_checkpoint_open(ctx, test_data(path), &c), EXC_OK);
        copy_config(names[i], codes, fp8);
        copy_config(names[i], numbers, "");
        write_model(ctx, c, codes, scales[i], 0, true);
        write_model(ctx, c, numbers, scales[i], 0, false);
        float *a = logits_of(ctx, codes, EXC_COMPUTE_F32, &n, &small), *b = logits_of(ctx, numbers, EXC_COMPUTE_F32, &m, &large);
        double off = test_relative(a, b, n);
        assert_true(n == m && small < large);
        if (!(off < 1e-5)) fail_msg("%s: logits differ by %g", names[i], off);
        all_codes(ctx, codes);
        if (!strcmp(names[i], "qwen3_5_moe")) shared_block(ctx, codes);
        exc_checkpoint_close(c);
        free(a);
        free(b);
    }
    exc_ctx_free(ctx);
}

/* ups that begin 24 rows into a block: a panel of 16 would have rows of two, so
 * their numbers are packed. The same behind 9. */
static void blocks_within_panels(void **state) {
    static const int64_t inner[] = {24, 9};
    exc_ctx *ctx = test_ctx(2);
    exc_checkpoint *c;
    assert_int_equal(exc_checkpoint_open(ctx, test_data("models/qwen3_5_moe"), &c), EXC_OK);
    for (size_t i = 0; i < EXC_COUNT(inner); i++) {
        char *codes = test_tmpdir(), *numbers = test_tmpdir(), to[64];
        size_t n, m;
        uint64_t small, large;
        snprintf(to, sizeof to, "\"moe_intermediate_size\": %d", (int)inner[i]);
        copy_config("qwen3_5_moe", codes, fp8);
        copy_config("qwen3_5_moe", numbers, "");
        replace(test_path(codes, "config.json"), "\"moe_intermediate_size\": 32", to);
        replace(test_path(numbers, "config.json"), "\"moe_intermediate_size\": 32", to);
        write_model(ctx, c, codes, EXC_F32, inner[i], true);
        write_model(ctx, c, numbers, EXC_F32, inner[i], false);
        for (int compute = 0; compute < 2; compute++) {
            float *a = logits_of(ctx, codes, (exc_compute)compute, &n, &small), *b = logits_of(ctx, numbers, (exc_compute)compute, &m, &large);
            assert_true(n == m && small < large);
            if (compute == EXC_COMPUTE_F32) assert_true(test_relative(a, b, n) < 1e-5);
            free(a);
            free(b);
        }
    }
    exc_checkpoint_close(c);
    exc_ctx_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(stacked_is_the_same), cmocka_unit_test(ragged_blocks), cmocka_unit_test(blocks_within_panels)};
    return cmocka_run_group_tests_name("shapes", tests, NULL, NULL);
}
