/* qwen2.c - family qwen2_moe (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biases on queries, keys and values, no norm
 * of them, softmax over all experts, and a shared expert of a width of its own behind a sigmoid gate. Layers
 * in mlp_only_layers, or skipped by decoder_sparse_step, are dense. */
#include "model.h"

#define LAYER "model.layers.%L."

static const exc_name names[] = {
    {EXC_ROLE_EXPERT_DOWN, LAYER "mlp.experts.%E.down_proj.weight"}, /* [H,I] */
    {EXC_ROLE_EXPERT_GATE, LAYER "mlp.experts.%E.gate_proj.weight"}, /* [I,H] */
    {EXC_ROLE_EXPERT_UP, LAYER "mlp.experts.%E.up_proj.weight"},     /* [I,H] */
    {EXC_ROLE_SHARED_DOWN,
     LAYER "mlp.shared_expert.down_proj.weight"}, /* [H,shared_expert_intermediate_size] */
    {EXC_ROLE_SHARED_GATE, LAYER "mlp.shared_expert.gate_proj.weight"},
    {EXC_ROLE_SHARED_UP, LAYER "mlp.shared_expert.up_proj.weight"},
    {EXC_ROLE_SHARED_ROUTER, LAYER "mlp.shared_expert_gate.weight"}, /* [1,H] */
    {EXC_ROLE_DENSE_DOWN, LAYER "mlp.down_proj.weight"},             /* [H,intermediate_size] */
    {EXC_ROLE_DENSE_GATE, LAYER "mlp.gate_proj.weight"},
    {EXC_ROLE_DENSE_UP, LAYER "mlp.up_proj.weight"},
    {EXC_ROLE_ROUTER, LAYER "mlp.gate.weight"},         /* [E,H] */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"}, /* [heads*D,H] */
    {EXC_ROLE_ATTN_K, LAYER "self_attn.k_proj.weight"},
    {EXC_ROLE_ATTN_V, LAYER "self_attn.v_proj.weight"},
    {EXC_ROLE_ATTN_Q_BIAS, LAYER "self_attn.q_proj.bias"}, /* [heads*D] */
    {EXC_ROLE_ATTN_K_BIAS, LAYER "self_attn.k_proj.bias"},
    {EXC_ROLE_ATTN_V_BIAS, LAYER "self_attn.v_proj.bias"},
    {EXC_ROLE_ATTN_OUT, LAYER "self_attn.o_proj.weight"}, /* [H,heads*D] */
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

const exc_family exc_family_qwen2_moe = {
    .model_type = "qwen2_moe",
    .names = names,
    .passed = passed,
    .norm_eps = 1e-6,
    .rope_theta = 1e4,
    .rotary = 1,
    .bias_key = "qkv_bias",
    .bias = true,
    .gate_score = 0, /* softmax over all experts */
    .renorm_key = "norm_topk_prob",
    .gate_renorm = false,
    .experts_key = "num_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "moe_intermediate_size",
    .shared_key = "shared_expert_intermediate_size",
    .shared = 5632,
    .shared_gated = true,
    .dense = EXC_DENSE_LISTED,
    .windows = EXC_WINDOWS_TYPED,
    .window_switch = "use_sliding_window",
    .window = 4096,
    .window_layers = "max_window_layers",
    .window_first = 28,
    .refused = refused,
    .router_bias =
        "the family has no router bias tensor; an extra one would be ignored by loaders (use a sidecar)",
    .router_bias_stored = 0,
};
