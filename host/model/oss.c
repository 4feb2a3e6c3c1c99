/* oss.c - family gpt_oss (gpt-oss-20b, 120b): biases on every projection, a sink for each query head, a window on every other
 * layer, yarn from the start, and experts with a clamped activation whose gates and ups take turns. The router's bias is part
 * of its logits; the weights are the softmax over the chosen. In the bf16 form experts are stored [in,out]: hidden and
 * intermediate size are equal in the released models, so only the name tells. */
#include "model.h"

#define LAYER "model.layers.%L."
#define EXPERTS LAYER "mlp.experts."

static const exc_name names[] = {
    EXC_BLOCK_EXPERTS(EXPERTS),
    {EXC_ROLE_EXPERT_DOWN, EXPERTS "down_proj", {.stacked = true, .transposed = true}}, /* [E,I,H] */
    {EXC_ROLE_EXPERT_GATE, EXPERTS "gate_up_proj", {.stacked = true, .transposed = true, .parts = 2, .mixed = true}}, /* [E,H,2I] */
    {EXC_ROLE_EXPERT_UP, EXPERTS "gate_up_proj", {.stacked = true, .transposed = true, .parts = 2, .part = 1, .mixed = true}},
    {EXC_ROLE_EXPERT_DOWN_BIAS, EXPERTS "down_proj_bias", {.stacked = true}}, /* [E,H] */
    {EXC_ROLE_EXPERT_GATE_BIAS, EXPERTS "gate_up_proj_bias", {.stacked = true, .parts = 2, .mixed = true}}, /* [E,2I] */
    {EXC_ROLE_EXPERT_UP_BIAS, EXPERTS "gate_up_proj_bias", {.stacked = true, .parts = 2, .part = 1, .mixed = true}},
    {EXC_ROLE_ROUTER, LAYER "mlp.router.weight"},         /* [E,H] */
    {EXC_ROLE_ROUTER_BIAS, LAYER "mlp.router.bias"},      /* [E] */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"},   /* [heads*D,H] */
    {EXC_ROLE_ATTN_K, LAYER "self_attn.k_proj.weight"},
    {EXC_ROLE_ATTN_V, LAYER "self_attn.v_proj.weight"},
    {EXC_ROLE_ATTN_OUT, LAYER "self_attn.o_proj.weight"}, /* [H,heads*D] */
    {EXC_ROLE_ATTN_Q_BIAS, LAYER "self_attn.q_proj.bias"}, /* [heads*D] */
    {EXC_ROLE_ATTN_K_BIAS, LAYER "self_attn.k_proj.bias"},
    {EXC_ROLE_ATTN_V_BIAS, LAYER "self_attn.v_proj.bias"},
    {EXC_ROLE_ATTN_OUT_BIAS, LAYER "self_attn.o_proj.bias"}, /* [H] */
    {EXC_ROLE_ATTN_SINKS, LAYER "self_attn.sinks"},          /* [heads] */
    {EXC_ROLE_NORM_IN, LAYER "input_layernorm.weight"},
    {EXC_ROLE_NORM_POST, LAYER "post_attention_layernorm.weight"},
    {EXC_ROLE_NORM_FINAL, "model.norm.weight"},
    {EXC_ROLE_EMBED, "model.embed_tokens.weight"},
    {EXC_ROLE_LM_HEAD, "lm_head.weight"},
    {EXC_ROLES, NULL},
};

static const char *const passed[] = {NULL};
static const char *const refused[] = {NULL};

/* what loaders take where config.json has no scaling: 0.1 ln 32 + 1 is the factor of cosines and sines */
static const exc_rope rope = {.kind = EXC_ROPE_YARN,
                              .factor = 32,
                              .original = 4096,
                              .fast = 32,
                              .slow = 1,
                              .truncate = false,
                              .attention = 1.3465735903f,
                              .score = 1};

const exc_family exc_family_gpt_oss = {
    .model_type = "gpt_oss",
    .names = names,
    .passed = passed,
    .norm_eps = 1e-5,
    .rope_theta = 150000,
    .rotary = 1,
    .rope = &rope,
    .bias_key = "attention_bias",
    .bias = true,
    .out_bias = true,
    .sinks = true,
    .expert_bias = true,
    .clamped = true,
    .gate_score = 2, /* the logits; softmax over the chosen */
    .experts_key = "num_local_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "intermediate_size",
    .dense = EXC_DENSE_NEVER,
    .windows = EXC_WINDOWS_TYPED,
    .window = 128,
    .refused = refused,
    .router_bias = "mlp.router.bias: part of the logits, so of the choice and of the weights",
    .router_bias_stored = 1,
    .router_bias_in_logits = true,
};
