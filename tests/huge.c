/* huge.c - inspect at the sizes of the published models: headers alone, data as holes in sparse files. The numbers of parameters are
 * those of the model cards' configs: Moonlight-16B-A3B 15,960,110,208, DeepSeek-V3 671,026,419,200 without its prediction layer. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "helpers.h"

#include "model.h"

typedef struct size {
    int64_t layers, dense, hidden, inner, wide, experts, shared, heads, q_rank, rank, plain, turned, value, vocab;
    int mtp;
    bool fp8;
} size;

/* one file being declared: header text, and how far the data would reach */
typedef struct file {
    exc_buf head;
    uint64_t at;
    int64_t tensors;
    const char *dir;
    int number, files;
    exc_buf *map;
} file;

static void declare(file *f, const char *name, const char *dtype, int unit, int64_t rows, int64_t cols)
{
    uint64_t bytes = (uint64_t)(rows * (cols ? cols : 1) * unit);
    exc_buf_printf(&f->head, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld", f->head.len > 1 ? "," : "", name, dtype, (long long)rows);
    if (cols) exc_buf_printf(&f->head, ",%lld", (long long)cols);
    exc_buf_printf(&f->head, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)f->at, (unsigned long long)(f->at + bytes));
    exc_buf_printf(f->map, "%s\"%s\":\"model-%05d-of-%05d.safetensors\"", f->map->len > 1 ? "," : "", name, f->number, f->files);
    f->at += bytes;
    f->tensors++;
}

static void matrix(file *f, const size *s, const char *name, int64_t rows, int64_t cols)
{
    char scale[200];
    snprintf(scale, sizeof scale, "%s_scale_inv", name);
    declare(f, name, s->fp8 ? "F8_E4M3" : "BF16", s->fp8 ? 1 : 2, rows, cols);
    if (s->fp8) declare(f, scale, "F32", 4, (rows + 127) / 128, (cols + 127) / 128);
}

#define NAME(...) (snprintf(n, sizeof n, __VA_ARGS__), n)

static void mlp(file *f, const size *s, const char *prefix, int64_t inner)
{
    char n[160];
    matrix(f, s, NAME("%s.gate_proj.weight", prefix), inner, s->hidden);
    matrix(f, s, NAME("%s.up_proj.weight", prefix), inner, s->hidden);
    matrix(f, s, NAME("%s.down_proj.weight", prefix), s->hidden, inner);
}

static void layer(file *f, const size *s, int64_t l)
{
    char n[128], prefix[96];
    int64_t q = s->heads * (s->plain + s->turned);
    int at = (int)l;
    declare(f, NAME("model.layers.%d.input_layernorm.weight", at), "BF16", 2, s->hidden, 0);
    declare(f, NAME("model.layers.%d.post_attention_layernorm.weight", at), "BF16", 2, s->hidden, 0);
    if (s->q_rank) {
        matrix(f, s, NAME("model.layers.%d.self_attn.q_a_proj.weight", at), s->q_rank, s->hidden);
        declare(f, NAME("model.layers.%d.self_attn.q_a_layernorm.weight", at), "BF16", 2, s->q_rank, 0);
        matrix(f, s, NAME("model.layers.%d.self_attn.q_b_proj.weight", at), q, s->q_rank);
    } else {
        matrix(f, s, NAME("model.layers.%d.self_attn.q_proj.weight", at), q, s->hidden);
    }
    matrix(f, s, NAME("model.layers.%d.self_attn.kv_a_proj_with_mqa.weight", at), s->rank + s->turned, s->hidden);
    declare(f, NAME("model.layers.%d.self_attn.kv_a_layernorm.weight", at), "BF16", 2, s->rank, 0);
    matrix(f, s, NAME("model.layers.%d.self_attn.kv_b_proj.weight", at), s->heads * (s->plain + s->value), s->rank);
    matrix(f, s, NAME("model.layers.%d.self_attn.o_proj.weight", at), s->hidden, s->heads * s->value);
    snprintf(prefix, sizeof prefix, "model.layers.%d.mlp", at);
    if (l < s->dense) {
        mlp(f, s, prefix, s->wide);
        return;
    }
    declare(f, NAME("%s.gate.weight", prefix), "BF16", 2, s->experts, s->hidden);
    declare(f, NAME("%s.gate.e_score_correction_bias", prefix), "F32", 4, s->experts, 0);
    for (int64_t e = 0; e < s->experts; e++) {
        snprintf(prefix, sizeof prefix, "model.layers.%d.mlp.experts.%d", at, (int)e);
        mlp(f, s, prefix, s->inner);
    }
    snprintf(prefix, sizeof prefix, "model.layers.%d.mlp.shared_experts", at);
    mlp(f, s, prefix, s->shared * s->inner);
}

static void finish(file *f)
{
    char name[64];
    uint64_t n;
    exc_buf_puts(&f->head, "}");
    while (f->head.len % 8) exc_buf_puts(&f->head, " ");
    n = f->head.len;
    snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", f->number, f->files);
    const char *path = test_path(f->dir, name);
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, &n, 8), 8);
    assert_int_equal(write(fd, f->head.data, n), (ssize_t)n);
    assert_int_equal(ftruncate(fd, (off_t)(8 + n + f->at)), 0);
    close(fd);
    exc_buf_free(&f->head);
}

/* the checkpoint in files of `per` layers; returns the number of tensors */
static int64_t make(const char *dir, const size *s, const char *config, int64_t per)
{
    exc_buf map = {0};
    int64_t all = s->layers + s->mtp, tensors = 0;
    int files = (int)((all + per - 1) / per);
    for (int i = 0; i < files; i++) {
        file f = {.dir = dir, .number = i + 1, .files = files, .map = &map};
        exc_buf_puts(&f.head, "{");
        if (!i) {
            declare(&f, "model.embed_tokens.weight", "BF16", 2, s->vocab, s->hidden);
            declare(&f, "lm_head.weight", "BF16", 2, s->vocab, s->hidden);
            declare(&f, "model.norm.weight", "BF16", 2, s->hidden, 0);
        }
        for (int64_t l = i * per; l < all && l < (i + 1) * per; l++) layer(&f, s, l);
        tensors += f.tensors;
        finish(&f);
    }
    exc_buf index = {0};
    exc_buf_printf(&index, "{\"metadata\":{\"total_size\":1},\"weight_map\":{%.*s}}", (int)map.len, map.data);
    test_write(test_path(dir, "model.safetensors.index.json"), index.data, index.len);
    test_write(test_path(dir, "config.json"), config, strlen(config));
    exc_buf_free(&index);
    exc_buf_free(&map);
    return tensors;
}

static void check(const size *s, const char *config, int64_t per, int64_t parameters, int64_t passed)
{
    exc_ctx *ctx = test_ctx(2);
    char *dir = test_tmpdir(), *text = NULL;
    int64_t tensors = make(dir, s, config, per);
    double before = exc_seconds();
    clock_t begun = clock();
    if (exc_inspect(ctx, dir, &text)) fail_msg("%s", exc_ctx_error(ctx));
    double busy = (double)(clock() - begun) / CLOCKS_PER_SEC; /* of processors, which other work on the machine does not change */
    print_message("  %lld tensors: inspect took %.3f s, %.3f s of processors\n", (long long)tensors, exc_seconds() - before, busy);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    assert_true(busy < 1);
#endif
    json_t *o = json_loads(text, 0, NULL);
    assert_int_equal(json_integer_value(json_object_get(o, "parameters")), parameters);
    assert_int_equal(json_integer_value(json_object_get(o, "tensors")), tensors);
    assert_int_equal(json_array_size(json_object_get(o, "unknown")), 0);
    assert_int_equal(json_array_size(json_object_get(o, "passed_through")), (size_t)passed);
    json_decref(o);
    exc_free(text);
    exc_ctx_free(ctx);
}

static void test_moonlight(void **state)
{
    size s = {.layers = 27, .dense = 1, .hidden = 2048, .inner = 1408, .wide = 11264, .experts = 64, .shared = 2, .heads = 16, .rank = 512,
              .plain = 128, .turned = 64, .value = 128, .vocab = 163840};
    check(&s, "{\"model_type\":\"deepseek_v3\",\"hidden_size\":2048,\"num_hidden_layers\":27,\"first_k_dense_replace\":1,\"moe_layer_freq\":1,"
              "\"intermediate_size\":11264,\"moe_intermediate_size\":1408,\"n_routed_experts\":64,\"num_experts_per_tok\":6,"
              "\"n_shared_experts\":2,\"n_group\":1,\"topk_group\":1,\"norm_topk_prob\":true,\"routed_scaling_factor\":2.446,"
              "\"scoring_func\":\"sigmoid\",\"topk_method\":\"noaux_tc\",\"num_attention_heads\":16,\"num_key_value_heads\":16,"
              "\"q_lora_rank\":null,\"kv_lora_rank\":512,\"qk_nope_head_dim\":128,\"qk_rope_head_dim\":64,\"v_head_dim\":128,"
              "\"rms_norm_eps\":1e-5,\"rope_theta\":50000,\"max_position_embeddings\":8192,\"attention_bias\":false,\"vocab_size\":163840,"
              "\"num_nextn_predict_layers\":0,\"tie_word_embeddings\":false,\"hidden_act\":\"silu\",\"eos_token_id\":163586}",
          9, 15960110208, 0);
}

static void test_deepseek(void **state)
{
    size s = {.layers = 61, .dense = 3, .hidden = 7168, .inner = 2048, .wide = 18432, .experts = 256, .shared = 1, .heads = 128,
              .q_rank = 1536, .rank = 512, .plain = 128, .turned = 64, .value = 128, .vocab = 129280, .mtp = 1, .fp8 = true};
    int64_t passed = 2 + 5 * 2 + 2 + 2 + (256 + 1) * 3 * 2; /* of the prediction layer: norms, attention with scales, router, experts */
    check(&s, "{\"model_type\":\"deepseek_v3\",\"hidden_size\":7168,\"num_hidden_layers\":61,\"first_k_dense_replace\":3,\"moe_layer_freq\":1,"
              "\"intermediate_size\":18432,\"moe_intermediate_size\":2048,\"n_routed_experts\":256,\"num_experts_per_tok\":8,"
              "\"n_shared_experts\":1,\"n_group\":8,\"topk_group\":4,\"norm_topk_prob\":true,\"routed_scaling_factor\":2.5,"
              "\"scoring_func\":\"sigmoid\",\"topk_method\":\"noaux_tc\",\"num_attention_heads\":128,\"num_key_value_heads\":128,"
              "\"q_lora_rank\":1536,\"kv_lora_rank\":512,\"qk_nope_head_dim\":128,\"qk_rope_head_dim\":64,\"v_head_dim\":128,"
              "\"rms_norm_eps\":1e-6,\"rope_theta\":10000,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":40,"
              "\"original_max_position_embeddings\":4096,\"beta_fast\":32,\"beta_slow\":1,\"mscale\":1.0,\"mscale_all_dim\":1.0},"
              "\"max_position_embeddings\":163840,\"attention_bias\":false,\"vocab_size\":129280,\"num_nextn_predict_layers\":1,"
              "\"tie_word_embeddings\":false,\"hidden_act\":\"silu\",\"bos_token_id\":0,\"eos_token_id\":1,"
              "\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"activation_scheme\":\"dynamic\",\"weight_block_size\":[128,128]}}",
          4, 671026419200, passed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_moonlight),
        cmocka_unit_test(test_deepseek),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
