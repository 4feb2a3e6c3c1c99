/* olmoe.c - family olmoe (OLMoE-1B-7B, base, SFT, DPO and Instruct): queries and keys are normed as whole
 * vectors, before they are split into heads; the chosen weights keep their softmax over all experts, so they
 * sum to less than one unless norm_topk_prob says otherwise. The experts' width is called intermediate_size.
 */
#include "model.h"

#define LAYER "model.layers.%L."

static const exc_name names[] = {
    {EXC_ROLE_EXPERT_DOWN, LAYER "mlp.experts.%E.down_proj.weight"}, /* [H,I] */
    {EXC_ROLE_EXPERT_GATE, LAYER "mlp.experts.%E.gate_proj.weight"}, /* [I,H] */
    {EXC_ROLE_EXPERT_UP, LAYER "mlp.experts.%E.up_proj.weight"},     /* [I,H] */
    {EXC_ROLE_ROUTER, LAYER "mlp.gate.weight"},                      /* [E,H] */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"},              /* [heads*D,H] */
    {EXC_ROLE_ATTN_K, LAYER "self_attn.k_proj.weight"},
    {EXC_ROLE_ATTN_V, LAYER "self_attn.v_proj.weight"},
    {EXC_ROLE_ATTN_OUT, LAYER "self_attn.o_proj.weight"},    /* [H,heads*D] */
    {EXC_ROLE_ATTN_Q_NORM, LAYER "self_attn.q_norm.weight"}, /* [heads*D] */
    {EXC_ROLE_ATTN_K_NORM, LAYER "self_attn.k_norm.weight"}, /* [kv_heads*D] */
    {EXC_ROLE_NORM_IN, LAYER "input_layernorm.weight"},
    {EXC_ROLE_NORM_POST, LAYER "post_attention_layernorm.weight"},
    {EXC_ROLE_NORM_FINAL, "model.norm.weight"},
    {EXC_ROLE_EMBED, "model.embed_tokens.weight"},
    {EXC_ROLE_LM_HEAD, "lm_head.weight"},
    EXC_STACKED_EXPERTS(LAYER "mlp.experts."),
    {EXC_ROLES, NULL},
};

static const char *const passed[] = {NULL};
static const char *const refused[] = {"attention_bias", "clip_qkv", NULL};

const exc_family exc_family_olmoe = {
    .model_type = "olmoe",
    .names = names,
    .passed = passed,
    .norm_eps = 1e-5,
    .rope_theta = 1e4,
    .rotary = 1,
    .qk_norm = EXC_QK_WHOLE,
    .gate_score = 0, /* softmax over all experts */
    .renorm_key = "norm_topk_prob",
    .gate_renorm = false,
    .experts_key = "num_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "intermediate_size",
    .dense = EXC_DENSE_NEVER,
    .refused = refused,
    .router_bias =
        "the family has no router bias tensor; an extra one would be ignored by loaders (use a sidecar)",
    .router_bias_stored = 0,
};
