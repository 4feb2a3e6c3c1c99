/* native.c - quantised checkpoints from end to end: edits of fp8 and fp4 weights written as they are stored, proven by verify, equal
 * to the baked lens, with what is left measured again from the files; foreign formats, scales that are missing or do not
 * fit, and allocations that fail. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "edits.h"
#include "helpers.h"

static const char *const models[] = {"models/qwen3_moe_fp8", "models/gpt_oss"};

/* one direction a layer, and a plan file that edits all writers, with `more` edits behind */
static char *write_plan(exc_ctx *ctx, int64_t layers, int64_t hidden, const char *rounding, const char *more) {
    char *dir = test_tmpdir(), *text;
    int64_t n = (layers + 1) * hidden;
    float *b = calloc((size_t)n, 4), *s = calloc((size_t)layers + 1, 4);
    for (int64_t l = 1; l <= layers; l++) {
        double length = 0;
        for (int64_t h = 0; h < hidden; h++) b[l * hidden + h] = test_normal((uint64_t)l, (uint64_t)h), length += pow((double)b[l * hidden + h], 2);
        for (int64_t h = 0; h < hidden; h++) b[l * hidden + h] = (float)((double)b[l * hidden + h] / sqrt(length));
        s[l] = 1;
    }
    exc_dirs d = {.rows = layers + 1, .rank = 1, .hidden = hidden, .basis = b, .singular = s, .mean_difference = b, .options = (char *)(uintptr_t)"{}"};
    assert_int_equal(exc_dirs_save(ctx, &d, test_path(dir, "d.safetensors"), 0), EXC_OK);
    assert_true(asprintf(&text, "{\"excise_plan\":1,\"directions\":\"d.safetensors\"%s%s%s,\"edits\":[{\"op\":\"project\",\"role\":\"expert_down\"},"
                                "{\"op\":\"project\",\"role\":\"attn_out\"},{\"op\":\"project_input\",\"role\":\"expert_up\"}%s]}",
                         rounding ? ",\"rounding\":\"" : "", rounding ? rounding : "", rounding ? "\"" : "", more) > 0);
    char *path = strdup(test_path(dir, "plan.json"));
    test_write(path, text, strlen(text));
    free(text);
    free(b);
    free(s);
    return path;
}

static void shape_of(exc_ctx *ctx, const char *dir, int64_t *layers, int64_t *hidden) {
    exc_atlas *a;
    if (exc_atlas_open(ctx, dir, &a)) fail_msg("%s", exc_ctx_error(ctx));
    *layers = a->shape.layers;
    *hidden = a->shape.hidden;
    exc_atlas_close(a);
}

/* numbers of a weight of an opened checkpoint, f64 [out,in] */
static double *numbers(exc_ctx *ctx, const exc_atlas *a, const exc_weight *w) {
    double *x = calloc((size_t)(w->out * w->in), 8);
    uint8_t *codes = malloc((size_t)exc_weight_bytes(w)), *scale = malloc(exc_weight_scale_bytes(w) + 1);
    const uint8_t *lying = exc_atlas_data(a, w);
    if (exc_weight_coded(w)) {
        int64_t pack = w->dtype == EXC_F4 ? 2 : 1;
        for (int64_t r = 0; r < w->out; r++) memcpy(codes + r * (w->in / pack), lying + r * (w->out_step / pack), (size_t)(w->in / pack));
        exc_scale_gather(w, a->files->files[w->scale->shard]->map + w->scale_begin, scale);
        assert_int_equal(ctx->ops->widen(&ctx->queue, &(struct exc_widen_args){.src = codes, .dtype = w->dtype, .scale = scale,
                                                                              .scale_dtype = w->scale_dtype, .rows = w->out, .cols = w->in,
                                                                              .dst = x, .dst_dtype = EXC_F64}), EXC_OK);
    } else {
        for (int64_t i = 0; i < w->out * w->in; i++) {
            uint16_t h;
            memcpy(&h, lying + 2 * i, 2);
            x[i] = (double)test_from_bf16(h);
        }
    }
    free(codes);
    free(scale);
    return x;
}

/* |R W|_F of the roles that the plan edits, from files alone */
static void left_in(exc_ctx *ctx, const char *dir, const exc_dirs *d, exc_role role, double *sum) {
    exc_atlas *a;
    assert_int_equal(exc_atlas_open(ctx, dir, &a), EXC_OK);
    *sum = 0;
    for (size_t i = 0; i < a->count; i++) {
        const exc_weight *w = &a->items[i];
        if (w->role != role) continue;
        double *x = numbers(ctx, a, w);
        const float *r = d->basis + (w->layer + 1) * d->hidden;
        bool out = role != EXC_ROLE_EXPERT_UP;
        for (int64_t l = 0; l < (out ? w->in : w->out); l++) {
            double c = 0;
            for (int64_t h = 0; h < d->hidden; h++) c += (double)r[h] * (out ? x[h * w->in + l] : x[l * w->in + h]);
            *sum += c * c;
        }
        free(x);
    }
    exc_atlas_close(a);
    *sum = sqrt(*sum);
}

static json_t *facts_of(char *json) {
    json_t *o = json_loads(json, 0, NULL);
    exc_free(json);
    assert_non_null(o);
    return o;
}

static double fact(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    if (!v) fail_msg("no %s", key);
    return json_number_value(v);
}

static float *logits_of(exc_ctx *ctx, const char *dir, const exc_plan *plan, size_t *n) {
    static const int32_t tokens[] = {3, 50, 7, 120, 9, 9, 200};
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_model *m;
    exc_session *s;
    o.compute = EXC_COMPUTE_F32;
    o.plan = plan;
    o.lens = EXC_LENS_BAKED;
    if (exc_model_open(ctx, dir, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
    int64_t capacity = 16, begin[2] = {0, 7};
    int32_t slot = 0;
    assert_int_equal(exc_session_open(ctx, m, &(exc_room){.slots = 1, .cache_tokens = 16, .step_tokens = 16}, &s), EXC_OK);
    assert_int_equal(exc_session_reset(s, 1, &capacity), EXC_OK);
    *n = (size_t)(7 * m->atlas->shape.vocab);
    float *z = malloc(*n * 4);
    exc_step step = {.tokens = tokens, .slot = &slot, .begin = begin, .sequences = 1, .logits_all = 1, .logits = z};
    assert_int_equal(exc_session_step(s, &step), EXC_OK);
    exc_session_close(s);
    exc_model_free(m);
    return z;
}

static void one_edit(const char *name, const char *rounding, double most_left) {
    exc_ctx *ctx = test_ctx(2);
    int64_t layers, hidden;
    const char *model = test_data(name);
    char *out = strdup(test_path(test_tmpdir(), "out")), *json = NULL;
    shape_of(ctx, model, &layers, &hidden);
    char *file = write_plan(ctx, layers, hidden, NULL, "");
    exc_plan *plan;
    assert_int_equal(exc_plan_load(ctx, file, &plan), EXC_OK);
    exc_apply_options o = EXC_APPLY_OPTIONS;
    o.round = rounding;
    if (exc_apply(ctx, model, plan, out, &o, &json)) fail_msg("%s", exc_ctx_error(ctx));
    json_t *f = facts_of(json), *role;
    assert_string_equal(json_string_value(json_object_get(f, "rounding")), rounding);
    size_t i;
    json_array_foreach(json_object_get(f, "roles"), i, role) {
        double before, after;
        exc_role which;
        if (json_integer_value(json_object_get(role, "layer")) != 0) continue;
        assert_true(exc_role_find(json_string_value(json_object_get(role, "role")), &which));
        left_in(ctx, model, plan->dirs, which, &before);
        left_in(ctx, out, plan->dirs, which, &after);
        if (after / before > most_left) fail_msg("%s, %s, %s: %g is left", name, rounding, exc_role_name(which), after / before);
        if (!strcmp(json_string_value(json_object_get(role, "dtype")), "BF16")) continue;
        /* layers differ, but not by much */
        assert_true(fact(role, "residual") < 2 * most_left && fact(role, "edit_size") > 0.02 && fact(role, "edit_size") < 0.3);
        assert_true(fact(role, "requantisation_error") > 0.01 && fact(role, "requantisation_error") < 0.2);
    }
    json_decref(f);
    /* proven with the plan in OUT, and with the one it came from, which does not say how it was rounded */
    assert_int_equal(exc_verify(ctx, model, out, NULL, NULL), EXC_OK);
    if (exc_verify(ctx, model, out, plan, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    exc_plan *own;
    size_t n, m;
    assert_int_equal(exc_plan_load(ctx, test_path(out, "excise/plan.json"), &own), EXC_OK);
    float *written = logits_of(ctx, out, NULL, &n), *baked = logits_of(ctx, model, own, &m);
    assert_true(n == m);
    assert_memory_equal(written, baked, n * 4);
    free(written);
    free(baked);
    exc_plan_free(own);
    exc_plan_free(plan);
    free(out);
    free(file);
    exc_ctx_free(ctx);
}

/* limits: several times what the weights of these sizes (64 and 128) leave; nearest leaves most of it in fp4 */
static void edits_as_stored(void **state) {
    one_edit(models[0], "rn", 0.15);
    one_edit(models[0], "sr", 0.1);
    one_edit(models[0], "exact", 0.01);
    one_edit(models[1], "rn", 0.6);
    one_edit(models[1], "sr", 0.3);
    one_edit(models[1], "exact", 0.06);
}

/* a plan that names its rounding; masks and factors; a dry run tells the same */
static void plan_says_how(void **state) {
    for (size_t i = 0; i < EXC_COUNT(models); i++) {
        exc_ctx *ctx = test_ctx(3);
        int64_t layers, hidden;
        char *out = strdup(test_path(test_tmpdir(), "out")), *json, *dry;
        shape_of(ctx, test_data(models[i]), &layers, &hidden);
        char *file = write_plan(ctx, layers, hidden, "exact",
                                ",{\"op\":\"mask\",\"role\":\"expert_down\",\"layers\":[1],\"experts\":[2]},"
                                "{\"op\":\"scale\",\"role\":\"expert_gate\",\"strength\":0.7,\"layers\":[1]},"
                                "{\"op\":\"project\",\"role\":\"expert_down\",\"strength\":0.5,\"norm\":\"row\",\"basis\":2,\"layers\":[0]}");
        exc_plan *plan;
        assert_int_equal(exc_plan_load(ctx, file, &plan), EXC_OK);
        exc_apply_options o = EXC_APPLY_OPTIONS;
        if (exc_apply(ctx, test_data(models[i]), plan, out, &o, &json)) fail_msg("%s", exc_ctx_error(ctx));
        o.dry_run = 1;
        assert_int_equal(exc_apply(ctx, test_data(models[i]), plan, NULL, &o, &dry), EXC_OK);
        json_t *a = facts_of(json), *b = facts_of(dry);
        assert_string_equal(json_string_value(json_object_get(a, "rounding")), "exact");
        assert_true(json_equal(json_object_get(a, "tensors"), json_object_get(b, "tensors")));
        json_decref(a);
        json_decref(b);
        if (exc_verify(ctx, test_data(models[i]), out, NULL, NULL)) fail_msg("%s", exc_ctx_error(ctx));
        exc_plan_free(plan);
        free(out);
        free(file);
        exc_ctx_free(ctx);
    }
}

static void flip(const char *path, uint64_t at) {
    size_t n;
    char *bytes = test_read(path, &n);
    bytes[at] ^= 1;
    test_write(path, bytes, n);
    free(bytes);
}

static void verify_sees_scales(void **state) {
    exc_ctx *ctx = test_ctx(2);
    int64_t layers, hidden;
    char *out = strdup(test_path(test_tmpdir(), "out"));
    const char *model = test_data(models[0]);
    shape_of(ctx, model, &layers, &hidden);
    char *file = write_plan(ctx, layers, hidden, "exact", "");
    exc_plan *plan;
    assert_int_equal(exc_plan_load(ctx, file, &plan), EXC_OK);
    assert_int_equal(exc_apply(ctx, model, plan, out, NULL, NULL), EXC_OK);
    exc_atlas *a;
    assert_int_equal(exc_atlas_open(ctx, model, &a), EXC_OK);
    const exc_weight *edited = exc_atlas_find(a, EXC_ROLE_EXPERT_DOWN, 1, 3), *other = exc_atlas_find(a, EXC_ROLE_ATTN_Q, 1, -1);
    const char *shard = test_path(out, "model.safetensors");
    flip(shard, edited->scale_begin);
    test_refused(ctx, exc_verify(ctx, model, out, NULL, NULL), EXC_ERR_INPUT, "experts.3.down_proj.weight_scale_inv", "scales", NULL);
    flip(shard, edited->scale_begin);
    flip(shard, other->scale_begin);
    test_refused(ctx, exc_verify(ctx, model, out, NULL, NULL), EXC_ERR_INPUT, "q_proj.weight_scale_inv", "does not edit", NULL);
    flip(shard, other->scale_begin);
    flip(shard, edited->begin + 5);
    test_refused(ctx, exc_verify(ctx, model, out, NULL, NULL), EXC_ERR_INPUT, "experts.3.down_proj.weight", "[0,5]", NULL);
    exc_atlas_close(a);
    exc_plan_free(plan);
    free(out);
    free(file);
    exc_ctx_free(ctx);
}

/* ------------------------------------------------------------------------------------------------------------ as bf16 */

/* an edit of one role: all other weights are the old numbers rounded to bf16 (fp4: exactly), under the names that loaders know */
static void written_as_bf16(void **state) {
    for (size_t i = 0; i < EXC_COUNT(models); i++) {
        exc_ctx *ctx = test_ctx(2);
        const char *model = test_data(models[i]);
        int64_t layers, hidden;
        size_t n;
        char *out = strdup(test_path(test_tmpdir(), "out")), *json;
        shape_of(ctx, model, &layers, &hidden);
        char *file = write_plan(ctx, layers, hidden, NULL, "");
        exc_plan *plan;
        assert_int_equal(exc_plan_load(ctx, file, &plan), EXC_OK);
        exc_apply_options o = EXC_APPLY_OPTIONS;
        o.to = "bf16";
        if (exc_apply(ctx, model, plan, out, &o, &json)) fail_msg("%s", exc_ctx_error(ctx));
        json_t *f = facts_of(json);
        assert_string_equal(json_string_value(json_object_get(f, "to")), "bf16");
        assert_true(fact(f, "residual") < 0.02); /* the spacing of bf16 */
        json_decref(f);
        if (exc_verify(ctx, model, out, NULL, NULL)) fail_msg("%s", exc_ctx_error(ctx));
        char *config = test_read(test_path(out, "config.json"), &n);
        assert_null(strstr(config, "quantization_config"));
        free(config);
        exc_atlas *a, *b;
        assert_int_equal(exc_atlas_open(ctx, model, &a), EXC_OK);
        if (exc_atlas_open(ctx, out, &b)) fail_msg("%s", exc_ctx_error(ctx));
        assert_true(a->count == b->count && b->n_unknown == 0);
        for (size_t w = 0; w < a->count; w++) {
            const exc_weight *x = &a->items[w], *y = &b->items[w];
            assert_true(x->role == y->role && x->expert == y->expert && y->dtype == EXC_BF16 && !y->scale);
            if (x->role != EXC_ROLE_EXPERT_GATE) continue;
            double *old = numbers(ctx, a, x);
            const uint8_t *now = exc_atlas_data(b, y);
            for (int64_t r = 0; r < x->out; r++)
                for (int64_t c = 0; c < x->in; c++) {
                    uint16_t h;
                    memcpy(&h, now + 2 * (r * y->out_step + c * y->in_step), 2);
                    assert_int_equal(h, test_bf16((float)old[r * x->in + c]));
                }
            free(old);
        }
        uint64_t at = exc_atlas_find(b, EXC_ROLE_EXPERT_DOWN, 0, 0)->begin;
        exc_atlas_close(a);
        exc_atlas_close(b);
        flip(test_path(out, "model.safetensors"), at);
        test_refused(ctx, exc_verify(ctx, model, out, NULL, NULL), EXC_ERR_INPUT, "down_proj", "difference", NULL);
        o.force = 1;
        for (int k = 1, done = 0; !done; k += k < 12 ? 1 : 101) { /* every allocation fails once; OUT stays whole or new */
            exc_alloc_fail_at(k);
            exc_status st = exc_apply(ctx, model, plan, out, &o, NULL);
            exc_alloc_fail_at(0);
            if (st != EXC_OK && st != EXC_ERR_MEMORY) fail_msg("allocation %d: %s", k, exc_ctx_error(ctx));
            done = st == EXC_OK;
        }
        assert_int_equal(exc_verify(ctx, model, out, NULL, NULL), EXC_OK);
        exc_plan_free(plan);
        free(out);
        free(file);
        exc_ctx_free(ctx);
    }
}

static void bf16_of_what(void **state) {
    exc_ctx *ctx = test_ctx(1);
    int64_t layers, hidden;
    exc_plan *plan;
    exc_apply_options o = EXC_APPLY_OPTIONS;
    shape_of(ctx, test_data("models/qwen3_moe"), &layers, &hidden);
    char *file = write_plan(ctx, layers, hidden, NULL, "");
    assert_int_equal(exc_plan_load(ctx, file, &plan), EXC_OK);
    o.dry_run = 1;
    o.to = "bf16";
    test_refused(ctx, exc_apply(ctx, test_data("models/qwen3_moe"), plan, NULL, &o, NULL), EXC_ERR_INPUT, "quantization_config", "bf16", NULL);
    o.to = "f32";
    test_refused(ctx, exc_apply(ctx, test_data("models/qwen3_moe"), plan, NULL, &o, NULL), EXC_ERR_USAGE, "to", "bf16", "f32", NULL);
    exc_plan_free(plan);
    free(file);
    exc_ctx_free(ctx);
}

/* ---------------------------------------------------------------------------------------------------------- refusals */

/* a copy of a model in which a text of one file is replaced by another of the same length */
static char *copy_with(const char *model, const char *file, const char *from, const char *to) {
    char *dir = test_tmpdir();
    size_t n, m = strlen(from), k;
    test_copy_tree(test_data(model), dir);
    char *path = strdup(test_path(dir, file)), *bytes = test_read(path, &n);
    for (k = 0; k + m <= n && memcmp(bytes + k, from, m); k++) {}
    if (k + m > n) fail_msg("%s has no %s", file, from);
    if (strlen(to) == m) {
        memcpy(bytes + k, to, m);
        test_write(path, bytes, n);
    } else {
        char *text;
        assert_true(asprintf(&text, "%.*s%s%s", (int)k, bytes, to, bytes + k + m) > 0);
        test_write(path, text, strlen(text));
        free(text);
    }
    free(bytes);
    free(path);
    return dir;
}

static void refused(const char *model, const char *file, const char *from, const char *to, const char *a, const char *b, const char *c) {
    exc_ctx *ctx = test_ctx(1);
    char *dir = copy_with(model, file, from, to), *json = NULL;
    test_refused(ctx, exc_inspect(ctx, dir, &json), EXC_ERR_INPUT, a, b, c, NULL);
    assert_null(json);
    exc_ctx_free(ctx);
}

static void formats_are_refused_by_name(void **state) {
    static const struct {
        const char *method, *says;
    } methods[] = {{"awq", "AWQ"},           {"gptq", "GPTQ"},          {"bitsandbytes", "bitsandbytes"}, {"compressed-tensors", "NVFP4"},
                   {"modelopt", "NVFP4"},    {"nvfp4", "NVFP4"},        {"fbgemm_fp8", "FP8"},            {"marlin", "own bf16"}};
    char to[128];
    for (size_t i = 0; i < EXC_COUNT(methods); i++) {
        snprintf(to, sizeof to, "\"quant_method\": \"%s\"", methods[i].method);
        refused(models[0], "config.json", "\"quant_method\": \"fp8\"", to, "quantization_config.quant_method", methods[i].says, "dequantised copy");
    }
    refused(models[0], "config.json", "\"quant_method\": \"fp8\"", "\"load_in_4bit\": true", "bitsandbytes", "quant_method", "dequantised copy");
    refused(models[0], "config.json", "\"quant_method\": \"fp8\"", "\"quant_method\": 8", "quant_method", "8", "mxfp4");
    refused(models[0], "config.json", "\"quant_method\": \"fp8\"", "\"quant_method\": \"mxfp4\"", "F8_E4M3", "fp8", "mxfp4");
    refused(models[0], "config.json", "128,\n      128\n", "1,\n      128\n", "weight_block_size", "[128,128]", "[1,128]");
    refused(models[0], "config.json", "\"fmt\": \"e4m3\"", "\"fmt\": \"e5m2\"", "fmt", "e4m3", "e5m2");
    refused(models[1], "config.json", "\"quant_method\": \"mxfp4\"", "\"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]", "_blocks", "mxfp4", "fp8");
    /* tensors tell what a silent config does not */
    static const struct {
        const char *as, *says;
    } marks[] = {{"down.qweight", "GPTQ or AWQ"}, {"weight_packed", "compressed-tensors"}, {"weight_scale_2", "NVFP4"}, {"weight.absmax", "bitsandbytes"}};
    for (size_t i = 0; i < EXC_COUNT(marks); i++) {
        static const char whole[] = "model.layers.0.mlp.experts.0.down_proj.weight";
        int n = (int)(sizeof whole - 1), tail = (int)strlen(marks[i].as);
        snprintf(to, sizeof to, "%.*s.%s", n - tail - 1, whole, marks[i].as); /* of the same length */
        const char *file = "model-00001-of-00003.safetensors", *index = "model.safetensors.index.json";
        exc_ctx *ctx = test_ctx(1);
        char *dir = copy_with("models/qwen3_moe", file, whole, to);
        remove(test_path(dir, index));
        rename(test_path(dir, file), test_path(dir, "model.safetensors")); /* found before anything is missed */
        test_refused(ctx, exc_inspect(ctx, dir, NULL), EXC_ERR_INPUT, "model.safetensors: ", to, "expected weights stored as", marks[i].says, "dequantised copy", NULL);
        exc_ctx_free(ctx);
    }
}

static void scales_must_fit(void **state) {
    static const char q[] = "self_attn.q_proj.weight_scale_inv\":{\"dtype\":\"BF16\",\"shape\":[2,1]";
    const char *file = "model.safetensors";
    exc_ctx *ctx = test_ctx(1);
    refused(models[0], file, "layers.0.self_attn.q_proj.weight_scale_inv", "layers.0.self_attn.q_proj.weight_scale_xxx", "q_proj.weight:", "q_proj.weight_scale_inv",
            "found no such tensor");
    refused(models[0], file, q, "self_attn.q_proj.weight_scale_inv\":{\"dtype\":\"BF16\",\"shape\":[1,2]", "q_proj.weight_scale_inv", "expected [2,1]", "found [1,2]");
    refused(models[0], file, q, "self_attn.q_proj.weight_scale_inv\":{\"dtype\":\"F16\", \"shape\":[2,1]", "q_proj.weight_scale_inv", "F32, BF16", "found F16");
    refused(models[1], file, "layers.0.mlp.experts.down_proj_scales", "layers.0.mlp.experts.down_proj_scalex", "down_proj_blocks", "down_proj_scales", "found no such");
    refused(models[1], file, "down_proj_scales\":{\"dtype\":\"U8\",\"shape\":[16,64,2]", "down_proj_scales\":{\"dtype\":\"U8\",\"shape\":[16,2,64]", "down_proj_scales",
            "expected [16,64,2]", "found [16,2,64]");
    refused(models[1], file, "down_proj_blocks\":{\"dtype\":\"U8\",\"shape\":[16,64,2,16]", "down_proj_blocks\":{\"dtype\":\"U8\",\"shape\":[16,2,64,16]",
            "down_proj_blocks", "expected [16,64,2,16]", "found [16,2,64,16]");
    /* a scale that is no number is found when values are looked at, by load and by apply */
    exc_atlas *a;
    assert_int_equal(exc_atlas_open(ctx, test_data(models[0]), &a), EXC_OK);
    uint64_t at = exc_atlas_find(a, EXC_ROLE_EXPERT_DOWN, 1, 3)->scale_begin;
    int64_t layers = a->shape.layers, hidden = a->shape.hidden;
    exc_atlas_close(a);
    char *dir = test_tmpdir(), *shard;
    test_copy_tree(test_data(models[0]), dir);
    size_t n;
    shard = strdup(test_path(dir, file));
    char *bytes = test_read(shard, &n);
    bytes[at] = (char)0xc0, bytes[at + 1] = 0x7f; /* NaN */
    test_write(shard, bytes, n);
    exc_model *m = NULL;
    test_refused(ctx, test_read_model(ctx, dir, &m), EXC_ERR_NUMERIC, "experts.3.down_proj.weight", "finite", NULL);
    char *plan_file = write_plan(ctx, layers, hidden, "exact", "");
    exc_plan *plan;
    assert_int_equal(exc_plan_load(ctx, plan_file, &plan), EXC_OK);
    test_refused(ctx, exc_apply(ctx, dir, plan, test_path(test_tmpdir(), "out"), NULL, NULL), EXC_ERR_NUMERIC, "layers.1.mlp.experts.3.down_proj.weight", "[0,0]", NULL);
    exc_plan_free(plan);
    free(bytes);
    free(shard);
    free(plan_file);
    exc_ctx_free(ctx);
}

static void bad_roundings(void **state) {
    exc_ctx *ctx = test_ctx(1);
    char *file = write_plan(ctx, 3, 128, "up", "");
    exc_plan *plan = NULL;
    test_refused(ctx, exc_plan_load(ctx, file, &plan), EXC_ERR_INPUT, "rounding", "exact", "up", NULL);
    free(file);
    file = write_plan(ctx, 3, 128, NULL, "");
    assert_int_equal(exc_plan_load(ctx, file, &plan), EXC_OK);
    exc_apply_options o = EXC_APPLY_OPTIONS;
    o.round = "up";
    o.dry_run = 1;
    test_refused(ctx, exc_apply(ctx, test_data(models[0]), plan, NULL, &o, NULL), EXC_ERR_USAGE, "round", "exact", "up", NULL);
    exc_plan_free(plan);
    free(file);
    exc_ctx_free(ctx);
}

/* every allocation of a dry run fails once */
static void allocations_fail(void **state) {
    exc_ctx *ctx = test_ctx(1);
    int64_t layers, hidden;
    shape_of(ctx, test_data(models[1]), &layers, &hidden);
    char *file = write_plan(ctx, layers, hidden, "rn", "");
    exc_plan *plan;
    assert_int_equal(exc_plan_load(ctx, file, &plan), EXC_OK);
    exc_apply_options o = EXC_APPLY_OPTIONS;
    o.dry_run = 1;
    for (int n = 1, done = 0; !done; n += n < 20 ? 1 : 97) {
        exc_alloc_fail_at(n);
        exc_status st = exc_apply(ctx, test_data(models[1]), plan, NULL, &o, NULL);
        exc_alloc_fail_at(0);
        if (st != EXC_OK && st != EXC_ERR_MEMORY) fail_msg("allocation %d: %s", n, exc_ctx_error(ctx));
        done = st == EXC_OK;
    }
    exc_plan_free(plan);
    free(file);
    exc_ctx_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(edits_as_stored), cmocka_unit_test(plan_says_how),   cmocka_unit_test(verify_sees_scales),
        cmocka_unit_test(written_as_bf16), cmocka_unit_test(bf16_of_what), cmocka_unit_test(formats_are_refused_by_name), cmocka_unit_test(scales_must_fit), cmocka_unit_test(bad_roundings),
        cmocka_unit_test(allocations_fail),
    };
    return cmocka_run_group_tests_name("native", tests, NULL, NULL);
}
