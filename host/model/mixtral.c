/* mixtral.c - family mixtral (Mixtral-8x7B, 8x22B and models merged in their form): experts under
 * block_sparse_moe with w1 (gate), w3 (up) and w2 (down), plain grouped-query attention, softmax over all
 * experts and always renormalised, which is the softmax over the two chosen logits. The experts' width is
 * called intermediate_size. */
#include "model.h"

#define LAYER "model.layers.%L."

static const exc_name names[] = {
    {EXC_ROLE_EXPERT_DOWN, LAYER "block_sparse_moe.experts.%E.w2.weight"}, /* [H,I] */
    {EXC_ROLE_EXPERT_GATE, LAYER "block_sparse_moe.experts.%E.w1.weight"}, /* [I,H] */
    {EXC_ROLE_EXPERT_UP, LAYER "block_sparse_moe.experts.%E.w3.weight"},   /* [I,H] */
    {EXC_ROLE_ROUTER, LAYER "block_sparse_moe.gate.weight"},               /* [E,H] */
    {EXC_ROLE_ROUTER, LAYER "mlp.gate.weight"},                            /* beside experts in one tensor */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"},                    /* [heads*D,H] */
    {EXC_ROLE_ATTN_K, LAYER "self_attn.k_proj.weight"},
    {EXC_ROLE_ATTN_V, LAYER "self_attn.v_proj.weight"},
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
static const char *const refused[] = {"attention_bias", NULL};

const exc_family exc_family_mixtral = {
    .model_type = "mixtral",
    .names = names,
    .passed = passed,
    .norm_eps = 1e-5,
    .rope_theta = 1e6,
    .rotary = 1,
    .gate_score = 0, /* softmax over all experts */
    .gate_renorm = true,
    .experts_key = "num_local_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "intermediate_size",
    .dense = EXC_DENSE_NEVER,
    .windows = EXC_WINDOWS_ALWAYS,
    .refused = refused,
    .router_bias =
        "the family has no router bias tensor; an extra one would be ignored by loaders (use a sidecar)",
    .router_bias_stored = 0,
};
