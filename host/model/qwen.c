/* qwen.c - family qwen3_moe (Qwen3-30B-A3B, 235B-A22B, the 2507 and Coder releases): published names, one 2-D
 * tensor per expert and projection, grouped-query attention with a norm per head, softmax over all experts,
 * then top-k, then renormalisation where norm_topk_prob says so. Layers in mlp_only_layers, or skipped by
 * decoder_sparse_step, are dense. */
#include "model.h"

#define LAYER "model.layers.%L."

static const exc_name names[] = {
    {EXC_ROLE_EXPERT_DOWN, LAYER "mlp.experts.%E.down_proj.weight"}, /* [H,I] */
    {EXC_ROLE_EXPERT_GATE, LAYER "mlp.experts.%E.gate_proj.weight"}, /* [I,H] */
    {EXC_ROLE_EXPERT_UP, LAYER "mlp.experts.%E.up_proj.weight"},     /* [I,H] */
    {EXC_ROLE_DENSE_DOWN, LAYER "mlp.down_proj.weight"},             /* [H,intermediate_size] */
    {EXC_ROLE_DENSE_GATE, LAYER "mlp.gate_proj.weight"},
    {EXC_ROLE_DENSE_UP, LAYER "mlp.up_proj.weight"},
    {EXC_ROLE_ROUTER, LAYER "mlp.gate.weight"},         /* [E,H] */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"}, /* [heads*D,H] */
    {EXC_ROLE_ATTN_K, LAYER "self_attn.k_proj.weight"},
    {EXC_ROLE_ATTN_V, LAYER "self_attn.v_proj.weight"},
    {EXC_ROLE_ATTN_OUT, LAYER "self_attn.o_proj.weight"},    /* [H,heads*D] */
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

static const char *const passed[] = {"mtp.", NULL};
static const char *const refused[] = {"attention_bias", NULL};

const exc_family exc_family_qwen3_moe = {
    .model_type = "qwen3_moe",
    .names = names,
    .passed = passed,
    .norm_zero_centred = 0,
    .norm_eps = 1e-6,
    .rope_theta = 1e4,
    .rotary = 1,
    .qk_norm = EXC_QK_HEAD,
    .gate_score = 0, /* softmax over all experts */
    .renorm_key = "norm_topk_prob",
    .experts_key = "num_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "moe_intermediate_size",
    .dense = EXC_DENSE_LISTED,
    .windows = EXC_WINDOWS_ALWAYS,
    .window_switch = "use_sliding_window",
    .window = 4096,
    .refused = refused,
    .router_bias =
        "the family has no router bias tensor; an extra one would be ignored by loaders (use a sidecar)",
    .router_bias_stored = 0,
};
