/* dots.c - family dots1 (dots.llm1): attention as qwen3_moe has it, a norm per head, with biases where
 * attention_bias says so, a window on the layers that layer_types names; router, shared experts and dense
 * first layers as deepseek_v3 has them. All of it is data: this file is the whole family. */
#include "model.h"

#define LAYER "model.layers.%L."

static const exc_name names[] = {
    {EXC_ROLE_EXPERT_DOWN, LAYER "mlp.experts.%E.down_proj.weight"},     /* [H,I] */
    {EXC_ROLE_EXPERT_GATE, LAYER "mlp.experts.%E.gate_proj.weight"},     /* [I,H] */
    {EXC_ROLE_EXPERT_UP, LAYER "mlp.experts.%E.up_proj.weight"},         /* [I,H] */
    {EXC_ROLE_SHARED_DOWN, LAYER "mlp.shared_experts.down_proj.weight"}, /* [H,n_shared_experts*I] */
    {EXC_ROLE_SHARED_GATE, LAYER "mlp.shared_experts.gate_proj.weight"},
    {EXC_ROLE_SHARED_UP, LAYER "mlp.shared_experts.up_proj.weight"},
    {EXC_ROLE_DENSE_DOWN, LAYER "mlp.down_proj.weight"}, /* [H,intermediate_size] */
    {EXC_ROLE_DENSE_GATE, LAYER "mlp.gate_proj.weight"},
    {EXC_ROLE_DENSE_UP, LAYER "mlp.up_proj.weight"},
    {EXC_ROLE_ROUTER, LAYER "mlp.gate.weight"},                       /* [E,H] */
    {EXC_ROLE_ROUTER_BIAS, LAYER "mlp.gate.e_score_correction_bias"}, /* [E] */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"},               /* [heads*D,H] */
    {EXC_ROLE_ATTN_K, LAYER "self_attn.k_proj.weight"},
    {EXC_ROLE_ATTN_V, LAYER "self_attn.v_proj.weight"},
    {EXC_ROLE_ATTN_Q_BIAS, LAYER "self_attn.q_proj.bias"}, /* [heads*D] */
    {EXC_ROLE_ATTN_K_BIAS, LAYER "self_attn.k_proj.bias"},
    {EXC_ROLE_ATTN_V_BIAS, LAYER "self_attn.v_proj.bias"},
    {EXC_ROLE_ATTN_OUT, LAYER "self_attn.o_proj.weight"}, /* [H,heads*D] */
    {EXC_ROLE_ATTN_OUT_BIAS, LAYER "self_attn.o_proj.bias"},
    {EXC_ROLE_ATTN_Q_NORM, LAYER "self_attn.q_norm.weight"}, /* [D] */
    {EXC_ROLE_ATTN_K_NORM, LAYER "self_attn.k_norm.weight"},
    {EXC_ROLE_NORM_IN, LAYER "input_layernorm.weight"},
    {EXC_ROLE_NORM_POST, LAYER "post_attention_layernorm.weight"},
    {EXC_ROLE_NORM_FINAL, "model.norm.weight"},
    {EXC_ROLE_EMBED, "model.embed_tokens.weight"},
    {EXC_ROLE_LM_HEAD, "lm_head.weight"},
    EXC_STACKED_EXPERTS(LAYER "mlp.experts."),
    {EXC_ROLES, NULL},
};

static const char *const passed[] = {NULL};
static const char *const refused[] = {NULL};

const exc_family exc_family_dots1 = {
    .model_type = "dots1",
    .names = names,
    .passed = passed,
    .norm_eps = 1e-6,
    .rope_theta = 1e4,
    .rotary = 1,
    .qk_norm = EXC_QK_HEAD,
    .bias_key = "attention_bias",
    .out_bias = true,
    .gate_score = 1, /* sigmoid */
    .renorm_key = "norm_topk_prob",
    .gate_renorm = false,
    .renorm_eps = 1e-20f,
    .scale_key = "routed_scaling_factor",
    .scale = 1,
    .grouped = true,
    .groups = 1,
    .groups_kept = 1,
    .experts_key = "n_routed_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "moe_intermediate_size",
    .shared_key = "n_shared_experts",
    .shared_counts = true,
    .dense = EXC_DENSE_FIRST,
    .windows = EXC_WINDOWS_BEHIND,
    .window = 4096,
    .window_layers = "max_window_layers",
    .window_first = 62,
    .refused = refused,
    .router_bias =
        "mlp.gate.e_score_correction_bias: added to the sigmoid scores (0..1) for the choice alone; the "
        "weights of the chosen do not change",
    .router_bias_stored = 1,
};
