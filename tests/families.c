/* families.c - what each family has that the others lack: config keys that disagree with the tensors, what inspect says, shared
 * experts in captures, and edits of shared and dense layers and of a stored router bias in all their forms. */
#include "collect.h"

#include "study.h"

static exc_ctx *ctx;

/* a copy of a golden model whose config.json has `from` replaced by `to` */
static char *changed(const char *model, const char *from, const char *to)
{
    char *dir = test_tmpdir(), *copy;
    size_t n;
    assert_true(asprintf(&copy, "%s/model", dir) > 0);
    test_copy_tree(golden_dir(model), copy);
    if (!from) return copy;
    char *text = test_read(test_path(copy, "config.json"), &n), *at = strstr(text, from), *out;
    if (!at) fail_msg("%s: config has no %s", model, from);
    assert_true(asprintf(&out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from)) > 0);
    test_write(test_path(copy, "config.json"), out, strlen(out));
    free(text);
    free(out);
    return copy;
}

/* ------------------------------------------------------------------------------------------------------- configs */

static const struct change {
    const char *model, *from, *to; /* text of config.json */
    const char *said[3];           /* fragments of the error; none: accepted */
} changes[] = {
    {"glm4_moe", "\"attention_bias\": true", "\"attention_bias\": false", {"attention_bias", "k_proj.bias"}},
    {"glm4_moe", "\"use_qk_norm\": true", "\"use_qk_norm\": false", {"use_qk_norm", "k_norm"}},
    {"glm4_moe", "\"use_qk_norm\": true", "\"use_qk_norm\": 1", {"use_qk_norm"}},
    {"glm4_moe", "\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 0", {"first_k_dense_replace", "has experts", "mlp.down_proj"}},
    {"glm4_moe", "\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 2", {"first_k_dense_replace", "layer 1 is dense"}},
    {"glm4_moe", "\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 4", {"first_k_dense_replace", "at least one layer"}},
    {"glm4_moe", "\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": -1", {"first_k_dense_replace"}},
    {"glm4_moe", "\"first_k_dense_replace\": 1", "\"mlp_layer_types\": [\"dense\",\"sparse\",\"sparse\",\"sparse\"]", {0}},
    {"glm4_moe", "\"first_k_dense_replace\": 1", "\"mlp_layer_types\": [\"dense\",\"sparse\"]", {"mlp_layer_types"}},
    {"glm4_moe", "\"first_k_dense_replace\": 1", "\"mlp_layer_types\": [\"dense\",\"sparse\",\"wide\",\"sparse\"]", {"mlp_layer_types", "wide"}},
    {"glm4_moe", "\"intermediate_size\": 112", "\"intermediate_size\": null", {"intermediate_size"}},
    {"glm4_moe", "\"intermediate_size\": 112", "\"intermediate_size\": 113", {"mlp.down_proj", "[64,113]", "[64,112]"}},
    {"glm4_moe", "\"n_shared_experts\": 1", "\"n_shared_experts\": 2", {"shared_experts", "shape"}},
    {"glm4_moe", "\"n_shared_experts\": 1", "\"n_shared_experts\": 0", {"n_shared_experts", "no shared expert"}},
    {"glm4_moe", "\"n_shared_experts\": 1", "\"n_shared_experts\": 65", {"n_shared_experts"}},
    {"glm4_moe", "\"n_group\": 1", "\"n_group\": 3", {"n_group", "divisor", "16"}},
    {"glm4_moe", "\"n_group\": 1", "\"n_group\": 4", {0}},
    {"glm4_moe", "\"n_group\": 1", "\"n_group\": 8", {"topk_group", "at least", "num_experts_per_tok (4)"}},
    {"glm4_moe", "\"topk_group\": 1", "\"topk_group\": 2", {"topk_group"}},
    {"glm4_moe", "\"routed_scaling_factor\": 1.0", "\"routed_scaling_factor\": 0", {"routed_scaling_factor"}},
    {"glm4_moe", "\"routed_scaling_factor\": 1.0", "\"routed_scaling_factor\": \"2\"", {"routed_scaling_factor"}},
    {"glm4_moe", "\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 0", {"partial_rotary_factor", "24"}},
    {"glm4_moe", "\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 1.5", {"partial_rotary_factor"}},
    {"glm4_moe", "\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 0.3", {"partial_rotary_factor", "even"}},
    {"glm4_moe", "\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 0", {"model.layers.4.", "num_hidden_layers 4"}},
    {"glm4_moe", "\"n_routed_experts\": 16", "\"num_local_experts\": 16", {0}},
    {"glm4_moe", "\"n_routed_experts\": 16", "\"n_routed_experts\": 17", {"shape"}},
    {"glm4_moe", "\"num_experts_per_tok\": 4", "\"num_experts_per_tok\": 17", {"num_experts_per_tok"}},
    {"glm4_moe", "\"hidden_act\"", "\"scoring_func\": \"softmax\", \"hidden_act\"", {"scoring_func", "sigmoid", "softmax"}},
    {"glm4_moe", "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"longrope\", \"factor\": 4.0}", {"rope_scaling", "longrope"}},
    {"glm4_moe", "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0}", {0}},
    {"mixtral", "\"sliding_window\": null", "\"sliding_window\": 4096", {0}},
    {"mixtral", "\"sliding_window\": null", "\"sliding_window\": 0", {"sliding_window", "0"}},
    {"mixtral", "\"sliding_window\": null", "\"sliding_window\": -5", {"sliding_window", "-5"}},
    {"mixtral", "\"sliding_window\": null", "\"sliding_window\": 5.5", {"sliding_window", "5.5"}},
    {"mixtral", "\"sliding_window\": null", "\"sliding_window\": \"wide\"", {"sliding_window"}},
    {"mixtral", "\"hidden_act\"", "\"attention_bias\": true, \"hidden_act\"", {"attention_bias"}},
    {"mixtral", "\"num_local_experts\": 8", "\"num_local_experts\": 7", {"experts.7", "0..6", "num_local_experts 7"}},
    {"mixtral", "\"num_local_experts\": 8", "\"num_experts\": 8", {0}},
    {"mixtral", "\"intermediate_size\": 80", "\"intermediate_size\": 72", {"block_sparse_moe", "shape"}},
    {"mixtral", "\"intermediate_size\": 80,", "", {"intermediate_size"}},
    {"mixtral", "\"hidden_act\"", "\"partial_rotary_factor\": 0.5, \"hidden_act\"", {"partial_rotary_factor", "whole heads"}},
    {"qwen2_moe", "\"shared_expert_intermediate_size\": 56", "\"shared_expert_intermediate_size\": 55", {"shared_expert.", "shape"}},
    {"qwen2_moe", "\"shared_expert_intermediate_size\": 56,", "", {"shared_expert.", "5632"}}, /* what loaders take then */
    {"qwen2_moe", "\"shared_expert_intermediate_size\": 56", "\"shared_expert_intermediate_size\": 0", {"shared_expert_intermediate_size"}},
    {"qwen2_moe", "\"hidden_act\"", "\"qkv_bias\": false, \"hidden_act\"", {"qkv_bias", "proj.bias"}},
    {"qwen2_moe", "\"hidden_act\"", "\"qkv_bias\": true, \"hidden_act\"", {0}},
    {"qwen2_moe", "\"use_sliding_window\": false", "\"use_sliding_window\": true", {0}},
    {"qwen2_moe", "\"use_sliding_window\": false", "\"use_sliding_window\": 1", {"use_sliding_window"}},
    {"dots1", "\"layer_types\"", "\"other_types\"", {0}}, /* from max_window_layers on: the same */
    {"dots1", "\"max_window_layers\": 2", "\"max_window_layers\": -2", {0}}, /* layer_types goes before it */
    {"dots1", "\"attention_bias\": true", "\"attention_bias\": false", {"attention_bias", "proj.bias"}},
    {"dots1", "\"sliding_window\": 9", "\"sliding_window\": null", {"sliding_window", "layer_types"}},
    {"dots1", "\"topk_group\": 2", "\"topk_group\": 4", {"topk_group"}},
    {"gpt_oss_bf16", "\"attention_bias\": true", "\"attention_bias\": false", {"attention_bias", "proj.bias"}},
    {"gpt_oss_bf16", "\"sliding_window\": 8", "\"sliding_window\": null", {"sliding_window", "layer_types", "null"}},
    {"gpt_oss_bf16", "\"sliding_window\": 8", "\"sliding_window\": 0", {"sliding_window", "0"}},
    {"gpt_oss_bf16", "\"sliding_window\": 8,", "", {0}},
    {"gpt_oss_bf16", "\"layer_types\"", "\"other_types\"", {0}},
    {"gpt_oss_bf16", "\"sliding_attention\",", "", {"layer_types", "num_hidden_layers"}},
    {"gpt_oss_bf16", "\"sliding_attention\",", "\"chunked_attention\",", {"layer_types", "full_attention", "chunked_attention"}},
    {"gpt_oss_bf16", "\"layer_types\": [", "\"layer_types\": 4, \"other\": [", {"layer_types", "4"}},
    {"gpt_oss_bf16", "\"swiglu_limit\": 7.0", "\"swiglu_limit\": 0", {"swiglu_limit", "0"}},
    {"gpt_oss_bf16", "\"swiglu_limit\": 7.0", "\"swiglu_alpha\": \"wide\"", {"swiglu_alpha", "wide"}},
    {"gpt_oss_bf16", "\"swiglu_limit\": 7.0,", "", {0}},
    {"gpt_oss_bf16", "\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", {"hidden_act", "silu", "gelu"}},
    {"gpt_oss_bf16", "\"intermediate_size\": 64", "\"intermediate_size\": 48", {"experts.down_proj", "[16,48,64]", "[16,64,64]"}},
    {"gpt_oss_bf16", "\"num_local_experts\": 16", "\"num_local_experts\": 15", {"experts.", "shape", "[15,"}},
    {"gpt_oss_bf16", "\"num_attention_heads\": 8", "\"num_attention_heads\": 10", {"self_attn.", "shape"}},
    {"gpt_oss_bf16", "\"rope_scaling\"", "\"other_scaling\"", {0}}, /* yarn all the same */
    {"gpt_oss_bf16", "\"beta_slow\": 1.0", "\"beta_slow\": 64.0", {"beta_fast", "beta_slow"}},
    {"olmoe", "\"clip_qkv\": null", "\"clip_qkv\": 8.0", {"clip_qkv", "8.0"}},
    {"olmoe", "\"norm_topk_prob\": false", "\"norm_topk_prob\": true", {0}},
    {"olmoe", "\"num_key_value_heads\": 4", "\"num_key_value_heads\": 2", {"self_attn.k", "shape"}},
    {"olmoe", "\"attention_bias\": false", "\"attention_bias\": true", {"attention_bias"}},
    {"deepseek_v3", "\"kv_lora_rank\": 32", "\"kv_lora_rank\": 31", {"kv_a_", "shape"}},
    {"deepseek_v3", "\"kv_lora_rank\": 32,", "", {"kv_lora_rank", "nothing"}},
    {"deepseek_v3", "\"q_lora_rank\": 48", "\"q_lora_rank\": null", {"q_a_", "in one step (q_lora_rank)"}},
    {"deepseek_v3", "\"q_lora_rank\": 48,", "", {"q_lora_rank", "null", "nothing"}},
    {"deepseek_v3", "\"q_lora_rank\": 48", "\"q_lora_rank\": 0", {"q_lora_rank", "0"}},
    {"moonlight", "\"q_lora_rank\": null", "\"q_lora_rank\": 48", {"self_attn.q_proj", "in two steps (q_lora_rank)"}},
    {"deepseek_v3", "\"qk_nope_head_dim\": 24", "\"qk_nope_head_dim\": 20", {"shape"}},
    {"deepseek_v3", "\"qk_rope_head_dim\": 16", "\"qk_rope_head_dim\": 15", {"qk_rope_head_dim", "even", "15"}},
    {"deepseek_v3", "\"qk_rope_head_dim\": 16", "\"qk_rope_head_dim\": 0", {"qk_rope_head_dim"}},
    {"deepseek_v3", "\"v_head_dim\": 20", "\"v_head_dim\": 24", {"shape"}},
    {"deepseek_v3", "\"v_head_dim\": 20", "\"v_head_dim\": \"20\"", {"v_head_dim"}},
    {"deepseek_v3", "\"num_key_value_heads\": 4", "\"num_key_value_heads\": 2", {"num_key_value_heads", "num_attention_heads (4)", "2"}},
    {"deepseek_v3", "\"num_key_value_heads\": 4,", "", {0}},
    {"deepseek_v3", "\"hidden_act\"", "\"head_dim\": 16, \"hidden_act\"", {0}}, /* other loaders' name for the rotating channels */
    {"deepseek_v3", "\"attention_bias\": false", "\"attention_bias\": true", {"attention_bias"}},
    {"deepseek_v3", "\"topk_method\": \"noaux_tc\"", "\"topk_method\": \"greedy\"", {"topk_method", "noaux_tc", "greedy"}},
    {"deepseek_v3", "\"moe_layer_freq\": 1", "\"moe_layer_freq\": 2", {"moe_layer_freq", "1", "2"}},
    {"deepseek_v3", "\"n_group\": 4,", "", {0}}, /* 8 of them then, 2 kept: 4 experts, as many as are chosen */
    {"deepseek_v3", "\"topk_group\": 2,", "", {0}},
    {"deepseek_v3", "\"n_group\": 4", "\"n_group\": 5", {"n_group", "divisor"}},
    {"deepseek_v3", "\"first_k_dense_replace\": 1,", "", {"first_k_dense_replace", "layer 1 is dense"}}, /* 3 then */
    {"deepseek_v3", "\"type\": \"yarn\"", "\"type\": \"dynamic\"", {"rope_scaling", "dynamic"}},
    {"deepseek_v3", "\"factor\": 40,", "", {"factor", "nothing"}},
    {"deepseek_v3", "\"model_type\": \"deepseek_v3\"", "\"model_type\": \"kimi_k2\"", {0}},
    {"deepseek_v2", "\"topk_method\": \"greedy\"", "\"topk_method\": \"group_limited_greedy\"", {"topk_method", "greedy", "group_limited"}},
    {"deepseek_v2", "\"norm_topk_prob\": false", "\"norm_topk_prob\": true", {"norm_topk_prob", "false", "true"}},
    {"deepseek_v2", "\"first_k_dense_replace\": 1,", "", {"layer 0 has experts"}}, /* none are dense then */
    {"deepseek_v2", "\"scoring_func\": \"softmax\"", "\"scoring_func\": \"sigmoid\"", {"scoring_func", "softmax", "sigmoid"}},
    {"moonlight", "\"rope_theta\": 50000.0", "\"rope_theta\": 50000.0, \"rope_interleave\": 1", {"rope_interleave"}},
    {"moonlight", "\"rope_theta\": 50000.0", "\"rope_theta\": 50000.0, \"rope_interleave\": false", {0}},
    {"qwen3_next", "\"full_attention_interval\": 4", "\"full_attention_interval\": 2", {"layer 1 has softmax attention", "linear_"}},
    {"qwen3_next", "\"full_attention_interval\": 4", "\"full_attention_interval\": 0", {"full_attention_interval"}},
    {"qwen3_next", "\"full_attention_interval\": 4,", "", {0}}, /* 4 then */
    {"qwen3_next", "\"full_attention_interval\": 4",
     "\"layer_types\": [\"linear_attention\",\"linear_attention\",\"linear_attention\",\"full_attention\"]", {0}},
    {"qwen3_next", "\"full_attention_interval\": 4",
     "\"layer_types\": [\"linear_attention\",\"linear_attention\",\"linear_attention\",\"linear_attention\"]",
     {"layer 3 has linear attention (layer_types, full_attention_interval)", "self_attn"}},
    {"qwen3_next", "\"full_attention_interval\": 4", "\"layer_types\": [\"linear_attention\"]", {"layer_types", "num_hidden_layers"}},
    {"qwen3_next", "\"full_attention_interval\": 4", "\"layer_types\": [1,2,3,4]", {"layer_types", "full_attention", "1"}},
    {"qwen3_next", "\"linear_num_value_heads\": 4", "\"linear_num_value_heads\": 3", {"linear_num_value_heads", "multiple", "(2)"}},
    {"qwen3_next", "\"linear_num_value_heads\": 4", "\"linear_num_value_heads\": 2", {"linear_attn", "shape"}},
    {"qwen3_next", "\"linear_key_head_dim\": 16", "\"linear_key_head_dim\": 15", {"linear_attn", "shape"}},
    {"qwen3_next", "\"linear_value_head_dim\": 16,", "", {"linear_attn", "shape"}}, /* 128 then */
    {"qwen3_next", "\"linear_conv_kernel_dim\": 4", "\"linear_conv_kernel_dim\": 3", {"conv1d", "[128,1,3]", "[128,1,4]"}},
    {"qwen3_next", "\"head_dim\": 32,", "", {"self_attn", "shape"}}, /* 256 then */
    {"qwen3_next", "\"partial_rotary_factor\": 0.25,", "", {0}},
    {"qwen3_next", "\"norm_topk_prob\": true,", "", {0}},
    {"qwen3_next", "\"attention_bias\": false", "\"attention_bias\": true", {"attention_bias"}},
    {"qwen3_next", "\"shared_expert_intermediate_size\": 32,", "", {"shared_expert.", "512"}},
    {"qwen3_5_moe", "\"text_config\": {", "\"text_configs\": {", {"num_hidden_layers"}},
    {"qwen3_5_moe", "\"attn_output_gate\": true", "\"attn_output_gate\": false", {"attn_output_gate", "true", "false"}},
    {"qwen3_5_moe", "\"num_experts\": 16", "\"num_experts\": 15", {"shape", "[15,"}},
    {"qwen3_5_moe", "\"moe_intermediate_size\": 32", "\"moe_intermediate_size\": 16", {"mlp.experts.", "shape"}},
    {"qwen3_5_moe", "\"vocab_size\": 400", "\"vocab_size\": 401", {"shape", "[401,64]"}},
    {"qwen3_5_moe", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": 0", {"tie_word_embeddings"}},
    {"qwen3_5_moe", "\"rope_type\": \"default\"", "\"rope_type\": \"dynamic\"", {"rope_parameters", "dynamic"}},
    {"olmoe", "\"rope_theta\": 10000.0", "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 10000.0}", {0}},
};

static void test_configs(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(changes); i++) {
        const struct change *c = &changes[i];
        char *dir = changed(c->model, c->from, c->to), *json = NULL;
        exc_status st = exc_inspect(ctx, dir, &json);
        const char *text = exc_ctx_error(ctx);
        if (st != (c->said[0] ? EXC_ERR_INPUT : EXC_OK)) fail_msg("%s, %s: %s %s", c->model, c->to, exc_status_name(st), text);
        bool whole = (strstr(text, "config.json: ") || strstr(text, "model.safetensors: ")) && strstr(text, "expected") && strstr(text, "found");
        if (c->said[0] && !whole) fail_msg("%s, %s: \"%s\" does not name file, expected and found", c->model, c->to, text);
        for (int j = 0; j < 3 && c->said[j]; j++)
            if (!strstr(text, c->said[j])) fail_msg("%s, %s: \"%s\" does not name %s", c->model, c->to, text, c->said[j]);
        exc_free(json);
        free(dir);
    }
}

/* tensors that the config promises, under another name of the same length in the header */
static void test_missing(void **state)
{
    static const struct {
        const char *model, *name, *other;
    } rows[] = {
        {"glm4_moe", "model.layers.2.mlp.shared_experts.up_proj.weight", "model.layers.2.mlp.shared_experts.up_pro_.weight"},
        {"glm4_moe", "model.layers.3.mlp.gate.e_score_correction_bias", "model.layers.3.mlp.gate.e_score_correction_bia_"},
        {"glm4_moe", "model.layers.0.self_attn.v_proj.bias", "model.layers.0.self_attn.v_proj.bia_"},
        {"glm4_moe", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weigh_"},
        {"mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight", "model.layers.1.block_sparse_moe.experts.3.w4.weight"},
        {"olmoe", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_norm.weigh_"},
        {"deepseek_v3", "model.layers.1.self_attn.kv_a_layernorm.weight", "model.layers.1.self_attn.kv_a_layernorm.weigh_"},
        {"deepseek_v3", "model.layers.2.self_attn.q_b_proj.weight", "model.layers.2.self_attn.q_c_proj.weight"},
        {"moonlight", "model.layers.3.self_attn.kv_b_proj.weight", "model.layers.3.self_attn.kv_c_proj.weight"},
        {"qwen3_next", "model.layers.1.linear_attn.out_proj.weight", "model.layers.1.linear_attn.out_pro_.weight"},
        {"qwen3_next", "model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_pro_.weight"},
        {"qwen3_next", "model.layers.0.linear_attn.A_log", "model.layers.0.linear_attn.A_lo_"},
        {"qwen3_next", "model.layers.2.linear_attn.in_proj_ba.weight", "model.layers.2.linear_attn.in_proj_bb.weight"},
        {"qwen3_next", "model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.2.mlp.experts.3.up_pro_.weight"},
        {"qwen3_5_moe", "model.language_model.layers.2.mlp.experts.down_proj", "model.language_model.layers.2.mlp.experts.down_pro_"},
        {"qwen3_5_moe", "model.language_model.layers.1.linear_attn.in_proj_z.weight", "model.language_model.layers.1.linear_attn.in_proj_y.weight"},
        {"qwen3_5_moe", "model.language_model.norm.weight", "model.language_model.norm.weigh_"},
        {"qwen3_5_moe", "model.language_model.layers.3.mlp.shared_expert_gate.weight", "model.language_model.layers.3.mlp.shared_expert_gate.weigh_"},
        {"gpt_oss_bf16", "model.layers.1.self_attn.sinks", "model.layers.1.self_attn.sink_"},
        {"gpt_oss_bf16", "model.layers.1.self_attn.o_proj.bias", "model.layers.1.self_attn.o_proj.bia_"},
        {"gpt_oss_bf16", "model.layers.3.mlp.experts.down_proj_bias", "model.layers.3.mlp.experts.down_proj_bia_"},
        {"gpt_oss_bf16", "model.layers.2.mlp.router.bias", "model.layers.2.mlp.router.bia_"},
    };
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        char *dir = changed(rows[i].model, NULL, NULL);
        size_t n;
        char *data = test_read(test_path(dir, "model.safetensors"), &n), *at = memmem(data, n, rows[i].name, strlen(rows[i].name));
        assert_non_null(at);
        memcpy(at, rows[i].other, strlen(rows[i].other));
        test_write(test_path(dir, "model.safetensors"), data, n);
        test_refused(ctx, exc_inspect(ctx, dir, NULL), EXC_ERR_INPUT, rows[i].name, "found", NULL);
        free(data);
        free(dir);
    }
}

static void test_inspect(void **state)
{
    static const struct {
        const char *model, *gate;
        int stored, passed, roles, shared, twice; /* twice: tensors that hold two roles */
    } rows[] = {
        {"gpt_oss_bf16", "the logits themselves, the 4 largest, softmax over the chosen; a bias for each expert is part of the logits", 1, 0, 22, 0, 8},
        {"glm4_moe", "sigmoid of each expert", 1, 70, 25, 32, 0},
        {"mixtral", "softmax over all experts, the 2 largest, renormalised", 0, 0, 13, 0, 0},
        {"qwen2_moe", "softmax over all experts, the 4 largest, not renormalised", 0, 0, 23, 56, 0},
        {"olmoe", "softmax over all experts, the 4 largest, not renormalised", 0, 0, 15, 0, 0},
        {"deepseek_v3", "times 2.5; a bias for each expert is added for the choice; of the best 2 of 4 groups", 1, 0, 23, 32, 0},
        {"deepseek_v2", "softmax over all experts, the 3 largest, not renormalised", 0, 0, 20, 32, 0},
        {"qwen3_next", "softmax over all experts, the 4 largest, renormalised", 0, 65, 24, 32, 0},
        {"qwen3_5_moe", "softmax over all experts, the 4 largest, renormalised", 0, 40, 27, 48, 4},
        {"moonlight", "sigmoid of each expert, the 6 largest, renormalised to sum 1, times 2.446", 1, 0, 21, 64, 0},
    };
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        char *text = NULL;
        if (exc_inspect(ctx, golden_dir(rows[i].model), &text)) fail_msg("%s", exc_ctx_error(ctx));
        json_t *o = json_loads(text, JSON_REJECT_DUPLICATES, NULL), *bias = json_object_get(o, "router_bias"), *role;
        int64_t tensors = 0;
        size_t j;
        static const char *const alias[][2] = {{"moonlight", "deepseek_v3"}, {"gpt_oss_bf16", "gpt_oss"}};
        const char *family = rows[i].model;
        for (j = 0; j < EXC_COUNT(alias); j++)
            if (!strcmp(family, alias[j][0])) family = alias[j][1];
        assert_string_equal(json_string_value(json_object_get(o, "family")), family);
        assert_non_null(strstr(json_string_value(json_object_get(o, "gate")), rows[i].gate));
        assert_int_equal(json_is_true(json_object_get(bias, "storable")), rows[i].stored);
        assert_int_equal(json_array_size(json_object_get(o, "passed_through")), (size_t)rows[i].passed);
        assert_int_equal(json_array_size(json_object_get(o, "unknown")), 0);
        assert_int_equal(json_array_size(json_object_get(o, "roles")), (size_t)rows[i].roles);
        assert_int_equal(json_integer_value(json_object_get(o, "shared_intermediate")), rows[i].shared);
        json_array_foreach(json_object_get(o, "roles"), j, role) tensors += json_integer_value(json_object_get(role, "tensors"));
        assert_int_equal(tensors - rows[i].twice + rows[i].passed, json_integer_value(json_object_get(o, "tensors")));
        json_decref(o);
        exc_free(text);
    }
}

/* ------------------------------------------------------------------------------------------------------- edits */

/* a plan of these edits, along random directions (rank 1) */
static exc_plan *plan_of(const exc_shape *s, const char *edits)
{
    const char *dir = test_tmpdir();
    int64_t rows = s->layers + 1, H = s->hidden;
    exc_dirs d = {.rows = rows, .rank = 1, .hidden = H};
    d.basis = calloc((size_t)(rows * H), 4);
    d.singular = calloc((size_t)rows, 4);
    d.mean_difference = calloc((size_t)(rows * H), 4);
    for (int64_t r = 0; r < rows; r++) {
        double norm = 0;
        for (int64_t h = 0; h < H; h++) norm += pow((double)(d.basis[r * H + h] = test_normal(77, (uint64_t)(r * H + h))), 2);
        for (int64_t h = 0; h < H; h++) d.basis[r * H + h] = (float)((double)d.basis[r * H + h] / sqrt(norm));
    }
    if (exc_dirs_save(ctx, &d, test_path(dir, "directions.safetensors"), 0)) fail_msg("%s", exc_ctx_error(ctx));
    free(d.basis);
    free(d.singular);
    free(d.mean_difference);
    char *text;
    assert_true(asprintf(&text, "{\"excise_plan\":1,\"directions\":\"directions.safetensors\",\"edits\":[%s]}", edits) > 0);
    test_write(test_path(dir, "plan.json"), text, strlen(text));
    free(text);
    exc_plan *p = NULL;
    if (exc_plan_load(ctx, test_path(dir, "plan.json"), &p)) fail_msg("%s", exc_ctx_error(ctx));
    return p;
}

static exc_model *open_as(const char *dir, const exc_plan *plan, exc_lens lens)
{
    exc_model_options opt = {.size = sizeof opt, .compute = EXC_COMPUTE_F32, .plan = plan, .lens = lens};
    exc_model *m = NULL;
    if (exc_model_open(ctx, dir, &opt, &m)) fail_msg("%s", exc_ctx_error(ctx));
    return m;
}

/* residual stream of the last layer, of all prompts */
static float *stream_of(const char *dir, const exc_plan *plan, exc_lens lens, const exc_prompts *p, size_t *count)
{
    exc_model *m = open_as(dir, plan, lens);
    const exc_shape *s = &m->atlas->shape;
    result r = run(ctx, m, p, 0, 0, 0);
    float *all = calloc((size_t)(p->begin[p->count] * s->hidden), 4);
    for (int64_t i = 0; i < p->count; i++) {
        int64_t n = p->begin[i + 1] - p->begin[i];
        memcpy(all + p->begin[i] * s->hidden, r.hidden[i] + s->layers * n * s->hidden, (size_t)(n * s->hidden) * 4);
    }
    *count = (size_t)(p->begin[p->count] * s->hidden);
    free_result(&r);
    exc_model_free(m);
    return all;
}

static char *applied(const char *dir, const exc_plan *p, json_t **facts)
{
    char *out = strdup(test_path(test_tmpdir(), "out")), *json = NULL;
    if (exc_apply(ctx, dir, p, out, NULL, &json)) fail_msg("%s", exc_ctx_error(ctx));
    if (exc_verify(ctx, dir, out, NULL, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    *facts = json_loads(json, 0, NULL);
    exc_free(json);
    return out;
}

/* every writer of a family with all of them: written = baked bit for bit, virtual as close as the rounding of bf16 weights allows */
static void test_three_forms(void **state)
{
    static const char *const models[] = {"glm4_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3",
                                         "moonlight", "gpt_oss", "deepseek_v2", "qwen3_next", "qwen3_5_moe"};
    for (size_t i = 0; i < EXC_COUNT(models); i++) {
        char *dir = changed(models[i], NULL, NULL);
        exc_prompts p = golden_prompts(models[i]);
        exc_model *m = open_as(dir, NULL, EXC_LENS_BAKED);
        const exc_shape *s = &m->atlas->shape;
        char edits[512];
        snprintf(edits, sizeof edits, "%s%s{\"op\":\"project\",\"role\":\"expert_down\"},{\"op\":\"project\",\"role\":\"attn_out\"}",
                 s->shared_inner ? "{\"op\":\"project\",\"role\":\"shared_down\"},{\"op\":\"scale\",\"role\":\"shared_down\",\"strength\":0.5}," : "",
                 s->moe_layers < s->layers ? "{\"op\":\"project\",\"role\":\"dense_down\"}," : "");
        exc_plan *plan = plan_of(s, edits);
        exc_model_free(m);
        json_t *facts = NULL;
        char *out = applied(dir, plan, &facts);
        size_t n;
        float *plain = stream_of(dir, NULL, EXC_LENS_BAKED, &p, &n), *written = stream_of(out, NULL, EXC_LENS_BAKED, &p, &n),
              *baked = stream_of(dir, plan, EXC_LENS_BAKED, &p, &n), *virtual_ = stream_of(dir, plan, EXC_LENS_VIRTUAL, &p, &n);
        assert_memory_equal(written, baked, n * 4);
        assert_true(test_relative(baked, plain, n) > 0.02);
        /* bf16 keeps 8 bits of a weight, f16 11, f32 24; a flipped expert costs more than any of that */
        double far = test_relative(virtual_, baked, n);
        print_message("  %s: virtual and baked differ by %.1e, edited and plain by %.1e\n", models[i], far, test_relative(baked, plain, n));
        assert_true(far < (!strcmp(models[i], "olmoe") ? 1e-5 : !strcmp(models[i], "gpt_oss") ? 0.4 : 0.1)); /* fp4 keeps 2 bits */
        free(plain);
        free(written);
        free(baked);
        free(virtual_);
        json_decref(facts);
        free(out);
        free(dir);
        exc_plan_free(plan);
        free_prompts(&p);
    }
}

/* Routers of norms centred on zero: blind to a direction r of the stream when they are blind to (1 + w) r. Whatever is passed
 * through keeps its bytes: verify has compared them. */
static void test_centred_router(void **state)
{
    static const char *const models[] = {"qwen3_next", "qwen3_5_moe"};
    for (int i = 0; i < 2; i++) {
        char *dir = changed(models[i], NULL, NULL);
        exc_model *m = open_as(dir, NULL, EXC_LENS_BAKED);
        exc_plan *plan = plan_of(&m->atlas->shape, "{\"op\":\"router_project\",\"role\":\"router\"}");
        exc_model_free(m);
        json_t *facts = NULL;
        char *out = applied(dir, plan, &facts);
        exc_atlas *a[2];
        assert_int_equal(exc_atlas_open(ctx, dir, &a[0]), EXC_OK);
        assert_int_equal(exc_atlas_open(ctx, out, &a[1]), EXC_OK);
        for (int64_t l = 0; l < 4; l++) {
            const uint16_t *norm = exc_atlas_data(a[0], exc_atlas_find(a[0], EXC_ROLE_NORM_POST, l, -1));
            double seen[2] = {0};
            for (int k = 0; k < 2; k++) {
                const uint16_t *w = exc_atlas_data(a[k], exc_atlas_find(a[k], EXC_ROLE_ROUTER, l, -1));
                for (int e = 0; e < 16; e++) {
                    double dot = 0;
                    for (int h = 0; h < 64; h++)
                        dot += (double)test_from_bf16(w[e * 64 + h]) * (1 + (double)test_from_bf16(norm[h])) *
                               (double)test_normal(77, (uint64_t)((l + 1) * 64 + h));
                    seen[k] += dot * dot;
                }
            }
            assert_true(seen[1] < 1e-4 * seen[0]); /* what rounding to bf16 leaves */
        }
        exc_atlas_close(a[0]);
        exc_atlas_close(a[1]);
        json_decref(facts);
        free(out);
        free(dir);
        exc_plan_free(plan);
    }
}

/* qwen3_5_moe as its text-only copies have it: config.json flat under another name, no prefix, one tensor an expert */
static void test_text_only(void **state)
{
    char *dir = test_tmpdir();
    exc_checkpoint *c;
    assert_int_equal(exc_checkpoint_open(ctx, golden_dir("qwen3_5_moe"), &c), EXC_OK);
    char *config = json_dumps(json_object_get(c->config, "text_config"), 0);
    test_write(test_path(dir, "config.json"), config, strlen(config));
    free(config);
    tiny t = {.dtype = "BF16"};
    for (size_t i = 0; i < c->n_tensors; i++) {
        const exc_tensor *x = c->by_name[i];
        bool stacked = strstr(x->name, "mlp.experts.gate_up_proj"), down = strstr(x->name, "mlp.experts.down_proj"),
             inner = !strncmp(x->name, "model.language_model.", 21);
        if (!inner && strcmp(x->name, "lm_head.weight")) continue;
        int64_t experts = stacked || down ? x->shape[0] : 1, parts = stacked ? 2 : 1, count = (int64_t)(x->end - x->begin) / (x->dtype == EXC_F32 ? 4 : 2);
        for (int64_t e = 0; e < experts * parts; e++) {
            t.items = realloc(t.items, (size_t)(t.count + 1) * sizeof *t.items);
            tiny_tensor *y = &t.items[t.count++];
            *y = (tiny_tensor){.rank = stacked || down ? 2 : x->rank, .dtype = x->dtype == EXC_F32 ? "F32" : "BF16", .count = count / experts / parts};
            for (int d = 0; d < y->rank; d++) y->shape[d] = x->shape[d + (stacked || down)];
            if (stacked) y->shape[0] /= 2;
            snprintf(y->name, sizeof y->name, "%s%s", inner ? "model." : "", x->name + (inner ? 21 : 0));
            if (stacked || down)
                snprintf(strstr(y->name, "experts."), 64, "experts.%d.%s.weight", (int)(e / parts), down ? "down_proj" : e % 2 ? "up_proj" : "gate_proj");
            y->value = malloc((size_t)y->count * 8);
            const char *from = exc_checkpoint_data(c, x);
            for (int64_t j = 0; j < y->count; j++) {
                int64_t at = e * y->count + j;
                float f;
                uint16_t h;
                memcpy(&f, from + at * 4 * (x->dtype == EXC_F32), 4 * (x->dtype == EXC_F32));
                memcpy(&h, from + at * 2 * (x->dtype != EXC_F32), 2);
                y->value[j] = x->dtype == EXC_F32 ? (double)f : (double)test_from_bf16(h);
            }
        }
    }
    tiny_file(&t, test_path(dir, "model.safetensors"), 0, t.count);
    tiny_free(&t);
    exc_prompts p = golden_prompts("qwen3_5_moe");
    exc_model *m = open_as(dir, NULL, EXC_LENS_BAKED), *whole = open_as(golden_dir("qwen3_5_moe"), NULL, EXC_LENS_BAKED);
    assert_string_equal(m->atlas->family->model_type, "qwen3_5_moe");
    result a = run(ctx, m, &p, 0, 0, 0), b = run(ctx, whole, &p, 0, 0, 0);
    for (int64_t i = 0; i < p.count; i++) assert_memory_equal(a.logits[i], b.logits[i], (size_t)((p.begin[i + 1] - p.begin[i]) * 400) * 4);
    free_result(&a);
    free_result(&b);
    exc_model_free(m);
    exc_model_free(whole);
    free_prompts(&p);
    exc_checkpoint_close(c);
}

/* the stored bias of glm4_moe: an expert pushed out is never chosen, the others keep their scores, and the file says so */
static void test_router_bias(void **state)
{
    char *dir = changed("glm4_moe", NULL, NULL);
    exc_prompts p = golden_prompts("glm4_moe");
    exc_model *m = open_as(dir, NULL, EXC_LENS_BAKED);
    exc_plan *plan = plan_of(&m->atlas->shape, "{\"op\":\"router_bias\",\"layers\":[2],\"experts\":[3,7],\"values\":[-10,10]},"
                                               "{\"op\":\"router_bias\",\"layers\":[2],\"experts\":[3],\"values\":[0.5]}");
    exc_model_free(m);
    json_t *facts = NULL;
    char *out = applied(dir, plan, &facts);
    json_t *roles = json_object_get(facts, "roles");
    assert_int_equal(json_array_size(roles), 1);
    assert_string_equal(json_string_value(json_object_get(json_array_get(roles, 0), "role")), "router_bias");
    exc_tensors *a, *b;
    assert_int_equal(exc_tensors_open(ctx, test_path(dir, "model.safetensors"), &a), EXC_OK);
    assert_int_equal(exc_tensors_open(ctx, test_path(out, "model.safetensors"), &b), EXC_OK);
    float old[16], new[16];
    memcpy(old, exc_tensors_data(a, exc_tensors_find(a, "model.layers.2.mlp.gate.e_score_correction_bias")), sizeof old);
    memcpy(new, exc_tensors_data(b, exc_tensors_find(b, "model.layers.2.mlp.gate.e_score_correction_bias")), sizeof new);
    for (int e = 0; e < 16; e++)
        assert_true(new[e] == (e == 3 ? (float)((double)(float)((double)old[e] - 10) + 0.5) : e == 7 ? (float)((double)old[e] + 10) : old[e]));
    exc_tensors_close(a);
    exc_tensors_close(b);
    for (int baked = 0; baked < 2; baked++) {
        m = baked ? open_as(dir, plan, EXC_LENS_BAKED) : open_as(out, NULL, EXC_LENS_BAKED);
        result r = run(ctx, m, &p, 0, 0, 0);
        for (int64_t i = 0; i < p.count; i++) {
            int64_t n = p.begin[i + 1] - p.begin[i];
            for (int64_t t = 0; t < n; t++) {
                int chosen[16] = {0};
                for (int k = 0; k < 4; k++) chosen[r.ids[i][((1 * n) + t) * 4 + k]] = 1; /* layer 2 is the second with experts */
                assert_true(!chosen[3] && chosen[7]);
            }
        }
        free_result(&r);
        exc_model_free(m);
    }
    exc_model_options opt = {.size = sizeof opt, .plan = plan, .lens = EXC_LENS_VIRTUAL};
    test_refused(ctx, exc_model_open(ctx, dir, &opt, &m), EXC_ERR_INPUT, "router_bias", "baked", NULL);
    json_decref(facts);
    exc_plan_free(plan);
    free_prompts(&p);
    free(out);
    free(dir);
}

/* every allocation of such an edit may fail: an error, never a crash, and nothing stays behind */
static void test_allocations_fail(void **state)
{
    char *dir = changed("glm4_moe", NULL, NULL);
    exc_model *m = open_as(dir, NULL, EXC_LENS_BAKED);
    exc_plan *plan = plan_of(&m->atlas->shape, "{\"op\":\"router_bias\",\"layers\":[1],\"experts\":[0],\"values\":[1]},"
                                               "{\"op\":\"project\",\"role\":\"shared_down\",\"layers\":[1]}");
    exc_model_free(m);
    exc_apply_options opt = EXC_APPLY_OPTIONS;
    opt.dry_run = 1;
    exc_status st = EXC_ERR_MEMORY;
    for (uint64_t n = 1; st != EXC_OK && n < 2000; n++) {
        exc_alloc_fail_at(n);
        st = exc_apply(ctx, dir, plan, NULL, &opt, NULL);
        exc_alloc_fail_at(0);
        if (st) assert_int_equal(st, EXC_ERR_MEMORY);
    }
    assert_int_equal(st, EXC_OK);
    exc_plan_free(plan);
    free(dir);
}

/* ------------------------------------------------------------------------------------------------------- captures */

/* in the last layer the shared expert's output, where no gate weighs it, is what the stream loses when the expert is scaled to nothing */
static void shared_sums(const char *model, bool gated)
{
    char *dir = changed(model, NULL, NULL);
    exc_prompts p = golden_prompts(model), other = make_prompts(2, (int64_t[]){5, 9}, 352, 3);
    exc_model *m = open_as(dir, NULL, EXC_LENS_BAKED);
    exc_plan *plan = plan_of(&m->atlas->shape, "{\"op\":\"scale\",\"role\":\"shared_down\",\"layers\":[3],\"strength\":0}");
    exc_capture_options opt = EXC_CAPTURE_OPTIONS;
    opt.decode = 3;
    opt.no_out = 1;
    exc_stats *s = NULL, *back = NULL;
    if (exc_capture(ctx, m, &p, &other, &opt, &s, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    exc_model_free(m);
    size_t n;
    float *with = stream_of(dir, NULL, EXC_LENS_BAKED, &p, &n), *without = stream_of(dir, plan, EXC_LENS_VIRTUAL, &p, &n);
    int64_t shape[4];
    int rank;
    const double *sum = exc_stats_array(s, "target.prefill.shared_out_sum", NULL, &rank, shape);
    assert_non_null(sum);
    assert_true(rank == 2 && shape[0] == 3 && shape[1] == 64);
    double diff = 0, size = 0;
    for (size_t h = 0; h < 64; h++) {
        double want = 0;
        for (size_t t = 0; t < n / 64; t++) want += (double)with[t * 64 + h] - (double)without[t * 64 + h];
        diff += pow(sum[2 * 64 + h] - want, 2);
        size += want * want;
    }
    if (!gated) assert_true(sqrt(diff / size) < 1e-5);
    else assert_true(sqrt(diff / size) > 0.1); /* sums are taken before the gate, as for routed experts */
    const char *path = test_path(test_tmpdir(), "s.safetensors"); /* kept by the file, added like every other sum */
    assert_int_equal(exc_stats_save(ctx, s, path, 0), EXC_OK);
    assert_int_equal(exc_stats_load(ctx, path, &back), EXC_OK);
    double was = sum[5];
    const double *decode = exc_stats_array(back, "baseline.decode.shared_out_sum", NULL, NULL, NULL);
    assert_true(decode && decode[0] != 0);
    assert_int_equal(exc_stats_add(ctx, s, back), EXC_OK);
    assert_true(sum[5] == 2 * was);
    exc_release(back->group[0][0].shared_out_sum);
    back->group[0][0].shared_out_sum = NULL;
    test_refused(ctx, exc_stats_add(ctx, s, back), EXC_ERR_INPUT, "target.prefill.shared_out_sum", NULL);
    free(with);
    free(without);
    exc_stats_free(s);
    exc_stats_free(back);
    exc_plan_free(plan);
    free_prompts(&p);
    free_prompts(&other);
    free(dir);
}

static void test_shared_sums(void **state)
{
    shared_sums("glm4_moe", false);
    shared_sums("qwen2_moe", true);
}

static int setup(void **state)
{
    ctx = test_ctx(2);
    return 0;
}

static int teardown(void **state)
{
    exc_ctx_free(ctx);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_configs),     cmocka_unit_test(test_missing),     cmocka_unit_test(test_inspect),
        cmocka_unit_test(test_three_forms), cmocka_unit_test(test_centred_router), cmocka_unit_test(test_text_only), cmocka_unit_test(test_router_bias), cmocka_unit_test(test_shared_sums),
        cmocka_unit_test(test_allocations_fail),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
