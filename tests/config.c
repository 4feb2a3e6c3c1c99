/* config.c - what a model folder may get wrong between config.json and its tensors: each case spoils one thing in a good
 * checkpoint, and the answer must be a refusal of the right class in one line that names the key or tensor, what was expected
 * and what was found. inspect and open must agree, because both stand on the same table. */
#include "tiny.h"

#include <unistd.h>

#include "model.h"

static tiny small(void)
{
    tiny t = tiny_default();
    t.layers = 2;
    t.hidden = 16;
    t.heads = 2;
    t.dim = 8;
    t.vocab = 32;
    t.experts = 4;
    t.top_k = 2;
    t.inner = 8;
    t.dense = 12;
    return t;
}

/* ------------------------------------------------------------------------------------------------ spoiled configs */

typedef struct change {
    const char *name, *from, *to; /* text of config.json */
    const char *said[4];          /* fragments of the error; none: accepted */
} change;

static const change changes[] = {
    {"another family", "\"model_type\":\"qwen3_moe\"", "\"model_type\":\"qwen2\"", {"model_type", "qwen3_moe", "qwen2"}},
    {"no family", "\"model_type\":\"qwen3_moe\",", "", {"model_type", "nothing"}},
    {"family no string", "\"model_type\":\"qwen3_moe\"", "\"model_type\":7", {"model_type"}},
    {"no experts key", "\"num_experts\":4,", "", {"num_experts"}},
    {"experts 0", "\"num_experts\":4", "\"num_experts\":0", {"num_experts"}},
    {"experts -1", "\"num_experts\":4", "\"num_experts\":-1", {"num_experts"}},
    {"experts 1e9", "\"num_experts\":4", "\"num_experts\":1000000000", {"num_experts"}},
    {"experts 2^31", "\"num_experts\":4", "\"num_experts\":2147483648", {"num_experts"}},
    {"experts as text", "\"num_experts\":4", "\"num_experts\":\"4\"", {"num_experts"}},
    {"experts null", "\"num_experts\":4", "\"num_experts\":null", {"num_experts"}},
    {"fewer experts than stored", "\"num_experts\":4", "\"num_experts\":3", {"experts.3", "0..2", "num_experts 3"}},
    {"more experts than stored", "\"num_experts\":4", "\"num_experts\":6", {"shape", "mlp.gate.weight"}},
    {"top-k 0", "\"num_experts_per_tok\":2", "\"num_experts_per_tok\":0", {"num_experts_per_tok"}},
    {"top-k above experts", "\"num_experts_per_tok\":2", "\"num_experts_per_tok\":5", {"num_experts_per_tok", "at most", "4", "5"}},
    {"no top-k", "\"num_experts_per_tok\":2,", "", {"num_experts_per_tok"}},
    {"more layers than stored", "\"num_hidden_layers\":2", "\"num_hidden_layers\":3", {"model.layers.2.", "found none"}},
    {"fewer layers than stored", "\"num_hidden_layers\":2", "\"num_hidden_layers\":1", {"model.layers.1.", "num_hidden_layers 1"}},
    {"a billion layers", "\"num_hidden_layers\":2", "\"num_hidden_layers\":1000000000", {"num_hidden_layers"}},
    {"other hidden size", "\"hidden_size\":16", "\"hidden_size\":32", {"shape", "config.json"}},
    {"hidden size 0", "\"hidden_size\":16", "\"hidden_size\":0", {"hidden_size"}},
    {"hidden size as real", "\"hidden_size\":16", "\"hidden_size\":16.0", {"hidden_size"}},
    {"other expert width", "\"moe_intermediate_size\":8", "\"moe_intermediate_size\":9", {"experts.", "shape"}},
    {"other head dim", "\"head_dim\":8", "\"head_dim\":6", {"shape"}},
    {"odd head dim", "\"head_dim\":8", "\"head_dim\":7", {"head_dim", "even"}},
    {"heads not divisible", "\"num_key_value_heads\":1", "\"num_key_value_heads\":3", {"num_key_value_heads"}},
    {"other vocabulary", "\"vocab_size\":32", "\"vocab_size\":33", {"shape"}},
    {"layer promised dense", "\"mlp_only_layers\":[]", "\"mlp_only_layers\":[1]", {"layer 1", "dense", "expert"}},
    {"dense layer out of range", "\"mlp_only_layers\":[]", "\"mlp_only_layers\":[2]", {"mlp_only_layers"}},
    {"dense layers no list", "\"mlp_only_layers\":[]", "\"mlp_only_layers\":\"all\"", {"mlp_only_layers"}},
    {"all layers dense", "\"mlp_only_layers\":[]", "\"mlp_only_layers\":[0,1]", {"mlp_only_layers"}},
    {"sparse step", "\"decoder_sparse_step\":1", "\"decoder_sparse_step\":2", {"layer 0", "dense"}},
    {"sparse step 0", "\"decoder_sparse_step\":1", "\"decoder_sparse_step\":0", {"decoder_sparse_step"}},
    {"activation", "\"hidden_act\":\"silu\"", "\"hidden_act\":\"gelu\"", {"hidden_act", "silu", "gelu"}},
    {"norm eps 0", "\"rms_norm_eps\":1e-06", "\"rms_norm_eps\":0", {"rms_norm_eps"}},
    {"norm eps as text", "\"rms_norm_eps\":1e-06", "\"rms_norm_eps\":\"1e-6\"", {"rms_norm_eps"}},
    {"rope theta", "\"rope_theta\":10000.0", "\"rope_theta\":-1", {"rope_theta"}},
    {"yarn", "\"hidden_act\"", "\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0},\"hidden_act\"", {0}},
    {"yarn without a factor", "\"hidden_act\"", "\"rope_scaling\":{\"rope_type\":\"yarn\"},\"hidden_act\"", {"factor", "nothing"}},
    {"unknown rope parameters", "\"rope_theta\":10000.0", "\"rope_parameters\":{\"rope_type\":\"linear\",\"rope_theta\":10000.0}",
     {"rope_parameters", "linear"}},
    {"rope parameters, default", "\"rope_theta\":10000.0", "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000.0}", {0}},
    {"rope scaling null", "\"hidden_act\"", "\"rope_scaling\":null,\"hidden_act\"", {0}},
    {"attention bias", "\"hidden_act\"", "\"attention_bias\":true,\"hidden_act\"", {"attention_bias"}},
    {"attention bias off", "\"hidden_act\"", "\"attention_bias\":false,\"hidden_act\"", {0}},
    {"sliding window", "\"hidden_act\"", "\"use_sliding_window\":true,\"sliding_window\":0,\"hidden_act\"", {"sliding_window", "0"}},
    {"quantised", "\"hidden_act\"", "\"quantization_config\":{\"quant_method\":\"awq\"},\"hidden_act\"", {"quantization_config", "awq"}},
    {"tied, head present", "\"tie_word_embeddings\":false", "\"tie_word_embeddings\":true", {0}},
    {"end token as text", "\"eos_token_id\":2", "\"eos_token_id\":\"2\"", {"eos_token_id"}},
    {"nine end tokens", "\"eos_token_id\":2", "\"eos_token_id\":[1,2,3,4,5,6,7,8,9]", {"eos_token_id", "8"}},
    {"context 0", "\"max_position_embeddings\":256", "\"max_position_embeddings\":0", {"max_position_embeddings"}},
    {"duplicate key", "\"hidden_act\"", "\"num_experts\":4,\"hidden_act\"", {"config.json"}},
    {"truncated", "\"eos_token_id\":2}", "\"eos_tok", {"config.json"}},
    {"no object", "{", "[", {"config.json"}},
    {"unknown key", "\"hidden_act\"", "\"auto_map\":{\"AutoModel\":\"x.py\"},\"hidden_act\"", {0}},
};

static char *replaced(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    if (!at) fail_msg("config has no %s", from);
    char *out;
    assert_true(asprintf(&out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from)) > 0);
    return out;
}

/* the same verdict from inspect (headers) and open (weights) */
static void verdict(exc_ctx *ctx, const char *dir, const char *name, exc_status want, const char *const said[4])
{
    for (int open = 0; open < 2; open++) {
        char *json = NULL;
        exc_model *m = NULL;
        exc_status st = open ? test_read_model(ctx, dir, &m) : exc_inspect(ctx, dir, &json);
        const char *text = exc_ctx_error(ctx);
        if (want == EXC_ERR_NUMERIC && !open) want = EXC_OK; /* headers know nothing of values */
        if (st != want) fail_msg("%s: status %s, text: %s", name, exc_status_name(st), text);
        for (int i = 0; st && i < 4 && said[i]; i++)
            if (!strstr(text, said[i])) fail_msg("%s: \"%s\" does not name %s", name, text, said[i]);
        if (st && strchr(text, '\n')) fail_msg("%s: more than one line: %s", name, text);
        if (st) assert_true(json == NULL && m == NULL);
        exc_free(json);
        exc_model_free(m);
        if (!open && said[0] && !strcmp(said[0], "finite")) want = EXC_ERR_NUMERIC;
    }
}

static void test_configs(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *dir = test_tmpdir();
    tiny t = small();
    tiny_write(&t, dir);
    size_t n;
    char *good = test_read(test_path(dir, "config.json"), &n);
    for (size_t i = 0; i < EXC_COUNT(changes); i++) {
        const change *c = &changes[i];
        char *bad = replaced(good, c->from, c->to);
        test_write(test_path(dir, "config.json"), bad, strlen(bad));
        verdict(ctx, dir, c->name, c->said[0] ? EXC_ERR_INPUT : EXC_OK, c->said);
        free(bad);
    }
    free(good);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* ------------------------------------------------------------------------------------------------ spoiled tensors */

typedef struct fault {
    const char *name, *tensor; /* exact name of the tensor to spoil */
    int what;                  /* see spoil() */
    exc_status want;
    const char *said[4];
} fault;

enum { DROP, TRANSPOSE, SHRINK, RANK3, FP8, RENAME, POISON_FIRST, POISON_LAST, MIXED, NOTHING };

static const fault faults[] = {
    {"good", "", NOTHING, EXC_OK, {0}},
    {"an expert missing", "model.layers.1.mlp.experts.2.down_proj.weight", DROP, EXC_ERR_INPUT,
     {"model.layers.1.mlp.experts.2.down_proj.weight", "0..3", "found 0-1,3"}},
    {"last expert missing", "model.layers.0.mlp.experts.3.up_proj.weight", DROP, EXC_ERR_INPUT, {"experts.3.up_proj", "found 0-2"}},
    {"expert ids not contiguous", "model.layers.0.mlp.experts.1.gate_proj.weight", RENAME, EXC_ERR_INPUT, {"experts.9", "expert 9", "0..3"}},
    {"router missing", "model.layers.0.mlp.gate.weight", DROP, EXC_ERR_INPUT, {"model.layers.0.mlp.gate.weight", "router"}},
    {"attention missing", "model.layers.1.self_attn.o_proj.weight", DROP, EXC_ERR_INPUT, {"model.layers.1.self_attn.o_proj.weight"}},
    {"norm missing", "model.norm.weight", DROP, EXC_ERR_INPUT, {"model.norm.weight"}},
    {"embedding missing", "model.embed_tokens.weight", DROP, EXC_ERR_INPUT, {"model.embed_tokens.weight"}},
    {"head missing, not tied", "lm_head.weight", DROP, EXC_ERR_INPUT, {"lm_head.weight"}},
    {"down transposed", "model.layers.0.mlp.experts.0.down_proj.weight", TRANSPOSE, EXC_ERR_INPUT,
     {"experts.0.down_proj", "expected [16,8]", "found [8,16]"}},
    {"one expert smaller", "model.layers.1.mlp.experts.3.up_proj.weight", SHRINK, EXC_ERR_INPUT, {"experts.3.up_proj", "[8,16]", "[7,16]"}},
    {"a norm as matrix", "model.layers.0.input_layernorm.weight", RANK3, EXC_ERR_INPUT, {"input_layernorm", "expected [16]"}},
    {"fp8 weight", "model.layers.0.mlp.experts.0.down_proj.weight", FP8, EXC_ERR_INPUT, {"dtype F8_E4M3", "quant_method", "found none"}},
    {"NaN at the start", "model.layers.0.mlp.experts.1.down_proj.weight", POISON_FIRST, EXC_ERR_NUMERIC,
     {"finite", "model.layers.0.mlp.experts.1.down_proj.weight", "element 0", "model.safetensors"}},
    {"NaN at the end", "lm_head.weight", POISON_LAST, EXC_ERR_NUMERIC, {"finite", "lm_head.weight", "element 511", "[31,15]"}},
    {"NaN in a norm", "model.layers.1.self_attn.k_norm.weight", POISON_LAST, EXC_ERR_NUMERIC, {"finite", "k_norm", "element 7"}},
    {"NaN in the embedding", "model.embed_tokens.weight", POISON_FIRST, EXC_ERR_NUMERIC, {"finite", "embed_tokens"}},
    {"one expert in f32", "model.layers.1.mlp.experts.0.down_proj.weight", MIXED, EXC_OK, {0}},
    {"q in f32", "model.layers.1.self_attn.q_proj.weight", MIXED, EXC_OK, {0}},
};

static void spoil(void *user, tiny_tensor *t)
{
    const fault *f = user;
    if (strcmp(t->name, f->tensor)) return;
    int64_t rows = t->shape[0];
    switch (f->what) {
    case DROP: t->drop = 1; break;
    case TRANSPOSE:
        t->shape[0] = t->shape[1];
        t->shape[1] = rows;
        break;
    case SHRINK:
        t->shape[0]--;
        t->count -= t->shape[1];
        break;
    case RANK3:
        t->rank = 3;
        t->shape[1] = t->shape[2] = 1;
        break;
    case FP8: t->dtype = "F8_E4M3"; break;
    case MIXED: t->dtype = "F32"; break;
    case RENAME: strstr(t->name, "experts.1")[8] = '9'; break;
    case POISON_FIRST: t->poison = 1; break;
    case POISON_LAST: t->poison = (int)t->count; break;
    default: break;
    }
}

static void test_tensors(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    for (size_t i = 0; i < EXC_COUNT(faults); i++) {
        char *dir = test_tmpdir();
        tiny t = small();
        t.spoil = spoil;
        t.user = (void *)(uintptr_t)&faults[i];
        t.files = faults[i].want == EXC_ERR_NUMERIC ? 1 : 1 + (int)(i % 3);
        tiny_write(&t, dir);
        verdict(ctx, dir, faults[i].name, faults[i].want, faults[i].said);
        tiny_free(&t);
    }
    exc_ctx_free(ctx);
}

/* mixed dtypes give the same model: a bf16 value in an f32 tensor is the same value */
static void test_mixed_dtypes(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    static const fault mixed[2] = {{"", "", NOTHING, EXC_OK, {0}}, {"", "model.layers.1.mlp.experts.0.down_proj.weight", MIXED, EXC_OK, {0}}};
    int32_t tokens[6] = {1, 5, 9, 30, 2, 7};
    int64_t begin[2] = {0, 6};
    exc_prompts p = {.tokens = tokens, .begin = begin, .count = 1};
    float logits[2][32];
    for (int i = 0; i < 2; i++) {
        char *dir = test_tmpdir();
        tiny t = small();
        t.spoil = spoil;
        t.user = (void *)(uintptr_t)&mixed[i];
        tiny_write(&t, dir);
        exc_model *m = NULL;
        exc_model_options opt = {.size = sizeof opt, .compute = EXC_COMPUTE_F32};
        assert_int_equal(exc_model_open(ctx, dir, &opt, &m), EXC_OK);
        exc_decode d = {.first_logits = logits[i]};
        assert_int_equal(exc_decode_run(ctx, m, &p, &d, NULL), EXC_OK);
        exc_model_free(m);
        tiny_free(&t);
    }
    assert_true(test_relative(logits[0], logits[1], 32) < 1e-6);
    exc_ctx_free(ctx);
}

/* ------------------------------------------------------------------------------------------------------- folders */

static void test_folders(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *dir = test_tmpdir();
    static const char *const missing[4] = {"nowhere"}, *const config[4] = {"config.json"}, *const shard[4] = {"model.safetensors"};
    verdict(ctx, test_path(dir, "nowhere"), "missing folder", EXC_ERR_IO, missing);
    test_write(test_path(dir, "readme.txt"), "x", 1);
    exc_model *m = NULL;
    exc_status st = exc_model_open(ctx, dir, NULL, &m); /* a folder, but no model: its config.json is missing */
    assert_true(st == EXC_ERR_IO || st == EXC_ERR_INPUT);
    assert_non_null(strstr(exc_ctx_error(ctx), "config.json"));
    st = exc_inspect(ctx, test_path(dir, "readme.txt"), NULL);
    assert_true(st == EXC_ERR_IO || st == EXC_ERR_INPUT);
    tiny t = small();
    tiny_write(&t, dir);
    test_write(test_path(dir, "config.json"), "", 0);
    verdict(ctx, dir, "empty config", EXC_ERR_INPUT, config);
    tiny_config(&t, dir);
    size_t n;
    char *data = test_read(test_path(dir, "model.safetensors"), &n);
    test_write(test_path(dir, "model.safetensors"), data, n - 1);
    verdict(ctx, dir, "truncated by a byte", EXC_ERR_INPUT, shard);
    test_write(test_path(dir, "model.safetensors"), data, 40);
    verdict(ctx, dir, "truncated in the header", EXC_ERR_INPUT, shard);
    free(data);
    assert_int_equal(exc_model_open(ctx, NULL, NULL, &m), EXC_ERR_USAGE);
    assert_int_equal(exc_inspect(ctx, NULL, NULL), EXC_ERR_USAGE);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* prompts that the model cannot take: named before any work */
static void test_prompts(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *dir = test_tmpdir();
    tiny t = small();
    t.context = 8;
    tiny_write(&t, dir);
    exc_model *m = NULL;
    assert_int_equal(exc_model_open(ctx, dir, NULL, &m), EXC_OK);
    int32_t tokens[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    int64_t begin[3] = {0, 2, 10};
    exc_prompts p = {.tokens = tokens, .begin = begin, .count = 2};
    exc_decode d = {0};
    assert_int_equal(exc_decode_run(ctx, m, &p, &d, NULL), EXC_OK);
    begin[2] = 11;
    test_refused(ctx, exc_decode_run(ctx, m, &p, &d, NULL), EXC_ERR_INPUT, "prompt 2", "at most 8", "max_position_embeddings", "found 9", NULL);
    exc_clear(ctx);
    begin[2] = 10;
    tokens[3] = 32;
    test_refused(ctx, exc_decode_run(ctx, m, &p, &d, NULL), EXC_ERR_INPUT, "prompt 2", "token 1", "0..31", "found 32", NULL);
    exc_clear(ctx);
    tokens[3] = -1;
    test_refused(ctx, exc_decode_run(ctx, m, &p, &d, NULL), EXC_ERR_INPUT, "found -1", NULL);
    exc_clear(ctx);
    tokens[3] = 4;
    begin[1] = 0;
    test_refused(ctx, exc_decode_run(ctx, m, &p, &d, NULL), EXC_ERR_INPUT, "prompt 1", "at least one token", NULL);
    exc_model_free(m);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* finite weights, infinite activations: refused, with the place */
static void test_overflow(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *dir = test_tmpdir();
    tiny t = small();
    t.dtype = "F32";
    tiny_make(&t);
    for (int i = 0; i < t.count; i++)
        if (strstr(t.items[i].name, "layers.1.mlp.experts"))
            for (int64_t j = 0; j < t.items[i].count; j++) t.items[i].value[j] = 1e30;
    tiny_write(&t, dir);
    exc_model *m = NULL;
    assert_int_equal(exc_model_open(ctx, dir, NULL, &m), EXC_OK);
    int32_t tokens[2] = {1, 2};
    int64_t begin[2] = {0, 2};
    exc_prompts p = {.tokens = tokens, .begin = begin, .count = 1};
    exc_decode d = {0};
    test_refused(ctx, exc_decode_run(ctx, m, &p, &d, NULL), EXC_ERR_NUMERIC, "residual stream", "finite", NULL);
    exc_model_free(m);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* ------------------------------------------------------------------------------------------------------- inspect */

static void test_inspect(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *text = NULL, *again = NULL;
    if (exc_inspect(ctx, test_data("models/qwen3_moe"), &text)) fail_msg("%s", exc_ctx_error(ctx));
    json_t *o = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(o);
    assert_string_equal(json_string_value(json_object_get(o, "family")), "qwen3_moe");
    assert_int_equal(json_integer_value(json_object_get(o, "experts")), 16);
    assert_int_equal(json_integer_value(json_object_get(o, "top_k")), 4);
    assert_int_equal(json_integer_value(json_object_get(o, "files")), 3);
    assert_int_equal(json_integer_value(json_object_get(o, "head_dim")), 32);
    assert_int_equal(json_array_size(json_object_get(o, "experts_by_layer")), 4);
    assert_non_null(strstr(json_string_value(json_object_get(o, "gate")), "softmax over all experts"));
    assert_true(json_is_false(json_object_get(json_object_get(o, "router_bias"), "storable")));
    int64_t tensors = 0, writers = 0;
    size_t i;
    json_t *role;
    json_array_foreach(json_object_get(o, "roles"), i, role) {
        tensors += json_integer_value(json_object_get(role, "tensors"));
        writers += json_is_true(json_object_get(role, "writes_residual"));
        if (!strcmp(json_string_value(json_object_get(role, "role")), "expert_down")) {
            assert_int_equal(json_integer_value(json_object_get(role, "tensors")), 64);
            assert_int_equal(json_integer_value(json_object_get(json_object_get(role, "dtypes"), "BF16")), 64);
        }
    }
    assert_int_equal(tensors, json_integer_value(json_object_get(o, "tensors")));
    assert_int_equal(writers, 3); /* expert_down, attn_out, embed */
    assert_int_equal(json_array_size(json_object_get(o, "unknown")), 0);
    char print[64];
    snprintf(print, sizeof print, "%s", json_string_value(json_object_get(o, "fingerprint")));
    json_decref(o);
    assert_int_equal(exc_inspect(ctx, test_data("models/qwen3_moe"), &again), EXC_OK);
    assert_string_equal(text, again);
    exc_free(text);
    exc_free(again);
    assert_int_equal(exc_inspect(ctx, test_data("demo"), &text), EXC_OK);
    assert_null(strstr(text, print)); /* another model, another fingerprint */
    exc_free(text);
    exc_ctx_free(ctx);
}

/* tensors no name covers are listed and do not disturb; a multi-token-prediction block is recognised as such */
static void name_unknown(void *user, tiny_tensor *t)
{
    if (!strcmp(t->name, "lm_head.weight")) snprintf(t->name, sizeof t->name, "%s", (const char *)user);
}

static void test_unknown(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    static const char *const names[] = {"model.layers.0.mlp.experts.01.up_proj.weight", "mtp.fc.weight", "model.layers.0.extra\\u001b[2J"};
    for (size_t i = 0; i < EXC_COUNT(names); i++) {
        char *dir = test_tmpdir(), *text = NULL;
        tiny t = small();
        t.tied = 1;
        t.spoil = name_unknown;
        t.user = (void *)(uintptr_t)names[i];
        tiny_make(&t);
        tiny_add(&t, "lm_head.weight", 3, 5, 1, 0);
        tiny_write(&t, dir);
        if (exc_inspect(ctx, dir, &text)) fail_msg("%s", exc_ctx_error(ctx));
        json_t *o = json_loads(text, 0, NULL);
        assert_non_null(o);
        assert_int_equal(json_array_size(json_object_get(o, "unknown")), i == 1 ? 0 : 1);
        assert_int_equal(json_array_size(json_object_get(o, "passed_through")), i == 1);
        json_decref(o);
        exc_free(text);
        exc_model *m = NULL;
        assert_int_equal(exc_model_open(ctx, dir, NULL, &m), EXC_OK);
        exc_model_free(m);
        tiny_free(&t);
    }
    exc_ctx_free(ctx);
}

/* the end tokens of generation_config.json win; ids that cannot occur are left out */
static void test_end_tokens(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *dir = test_tmpdir();
    tiny t = small();
    tiny_write(&t, dir);
    exc_atlas *a;
    assert_int_equal(exc_atlas_open(ctx, dir, &a), EXC_OK);
    assert_int_equal(a->shape.n_eos, 1);
    assert_int_equal(a->shape.eos[0], 2);
    exc_atlas_close(a);
    static const char text[] = "{\"eos_token_id\":[5,7,1000]}", bad[] = "{\"eos_token_id\":[5,";
    test_write(test_path(dir, "generation_config.json"), text, sizeof text - 1);
    assert_int_equal(exc_atlas_open(ctx, dir, &a), EXC_OK);
    assert_int_equal(a->shape.n_eos, 2);
    assert_int_equal(a->shape.eos[1], 7);
    exc_atlas_close(a);
    test_write(test_path(dir, "generation_config.json"), bad, sizeof bad - 1);
    test_refused(ctx, exc_atlas_open(ctx, dir, &a), EXC_ERR_INPUT, "generation_config.json", NULL);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_configs), cmocka_unit_test(test_tensors), cmocka_unit_test(test_mixed_dtypes),
        cmocka_unit_test(test_folders), cmocka_unit_test(test_prompts), cmocka_unit_test(test_overflow),
        cmocka_unit_test(test_inspect), cmocka_unit_test(test_unknown), cmocka_unit_test(test_end_tokens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
