/* deepseek.c - families deepseek_v3 (DeepSeek-V3, V3.1, R1; Moonlight; Kimi-K2, which calls itself kimi_k2)
 * and deepseek_v2 (V2-Lite and models made from it). Both have multi-head latent attention, with or without a
 * low-rank query projection, positions by yarn in most, norms inside the attention with an epsilon of 1e-6
 * whatever rms_norm_eps says, shared experts and dense first layers. The router of v3 is glm4_moe's:
 * sigmoids, e_score_correction_bias and groups for the choice alone, renormalised and scaled. That of v2
 * takes the largest of a softmax over all experts as they are; its larger models choose by the best expert of
 * each group (group_limited_greedy), which is not part of this version. The layers behind the last of v3
 * predict further tokens: they are passed through. */
#include "model.h"

#define LAYER "model.layers.%L."

/* v2 has all of them but the first */
static const exc_name names[] = {
    {EXC_ROLE_ROUTER_BIAS, LAYER "mlp.gate.e_score_correction_bias"}, /* [E] */
    {EXC_ROLE_EXPERT_DOWN, LAYER "mlp.experts.%E.down_proj.weight"},  /* [H,I] */
    {EXC_ROLE_EXPERT_GATE, LAYER "mlp.experts.%E.gate_proj.weight"},  /* [I,H] */
    {EXC_ROLE_EXPERT_UP, LAYER "mlp.experts.%E.up_proj.weight"},      /* [I,H] */
    EXC_STACKED_EXPERTS(LAYER "mlp.experts."),
    {EXC_ROLE_SHARED_DOWN, LAYER "mlp.shared_experts.down_proj.weight"}, /* [H,n_shared_experts*I] */
    {EXC_ROLE_SHARED_GATE, LAYER "mlp.shared_experts.gate_proj.weight"},
    {EXC_ROLE_SHARED_UP, LAYER "mlp.shared_experts.up_proj.weight"},
    {EXC_ROLE_DENSE_DOWN, LAYER "mlp.down_proj.weight"}, /* [H,intermediate_size] */
    {EXC_ROLE_DENSE_GATE, LAYER "mlp.gate_proj.weight"},
    {EXC_ROLE_DENSE_UP, LAYER "mlp.up_proj.weight"},
    {EXC_ROLE_ROUTER, LAYER "mlp.gate.weight"},             /* [E,H] */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"},     /* [heads*(N+R),H], where q_lora_rank is null */
    {EXC_ROLE_ATTN_Q_A, LAYER "self_attn.q_a_proj.weight"}, /* [q_lora_rank,H], where it is not */
    {EXC_ROLE_ATTN_Q_B, LAYER "self_attn.q_b_proj.weight"}, /* [heads*(N+R),q_lora_rank] */
    {EXC_ROLE_ATTN_KV_A, LAYER "self_attn.kv_a_proj_with_mqa.weight"},  /* [C+R,H] */
    {EXC_ROLE_ATTN_KV_B, LAYER "self_attn.kv_b_proj.weight"},           /* [heads*(N+V),C] */
    {EXC_ROLE_ATTN_OUT, LAYER "self_attn.o_proj.weight"},               /* [H,heads*V] */
    {EXC_ROLE_ATTN_Q_A_NORM, LAYER "self_attn.q_a_layernorm.weight"},   /* [q_lora_rank] */
    {EXC_ROLE_ATTN_KV_A_NORM, LAYER "self_attn.kv_a_layernorm.weight"}, /* [C] */
    {EXC_ROLE_NORM_IN, LAYER "input_layernorm.weight"},
    {EXC_ROLE_NORM_POST, LAYER "post_attention_layernorm.weight"},
    {EXC_ROLE_NORM_FINAL, "model.norm.weight"},
    {EXC_ROLE_EMBED, "model.embed_tokens.weight"},
    {EXC_ROLE_LM_HEAD, "lm_head.weight"},
    {EXC_ROLES, NULL},
};

static const char *const passed[] = {NULL};
static const char *const refused[] = {"attention_bias", NULL};
static const exc_fixed v3_fixed[] = {{"topk_method", "\"noaux_tc\""}, {"moe_layer_freq", "1"}, {NULL, NULL}};

const exc_family exc_family_deepseek_v3 = {
    .model_type = "deepseek_v3",
    .other_type = "kimi_k2",
    .names = names,
    .passed = passed,
    .mix = EXC_MIX_LATENT,
    .norm_eps = 1e-6,
    .rope_theta = 1e4,
    .rotary = 1, /* of the channels that rotate at all */
    .latent_eps = 1e-6f,
    .gate_score = 1, /* sigmoid */
    .renorm_key = "norm_topk_prob",
    .gate_renorm = true,
    .renorm_eps = 1e-20f,
    .scale_key = "routed_scaling_factor",
    .scale = 2.5,
    .grouped = true,
    .groups = 8,
    .groups_kept = 4,
    .experts_key = "n_routed_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "moe_intermediate_size",
    .shared_key = "n_shared_experts",
    .shared_counts = true,
    .shared = 1,
    .dense = EXC_DENSE_FIRST,
    .dense_first = 3,
    .mtp_key = "num_nextn_predict_layers",
    .refused = refused,
    .fixed = v3_fixed,
    .router_bias =
        "mlp.gate.e_score_correction_bias: added to the sigmoid scores (0..1) for the choice alone; the "
        "weights of the chosen do not change",
    .router_bias_stored = 1,
};

/* norm_topk_prob: loaders disagree on what it does here, and no model has it */
static const exc_fixed v2_fixed[] = {
    {"topk_method", "\"greedy\""}, {"moe_layer_freq", "1"}, {"norm_topk_prob", "false"}, {NULL, NULL}};
static const char *const v2_refused[] = {"attention_bias", "mlp_bias", NULL};

const exc_family exc_family_deepseek_v2 = {
    .model_type = "deepseek_v2",
    .names = names + 1,
    .passed = passed,
    .mix = EXC_MIX_LATENT,
    .norm_eps = 1e-6,
    .rope_theta = 1e4,
    .rotary = 1,
    .latent_eps = 1e-6f,
    .gate_score = 0, /* softmax over all experts */
    .gate_renorm = false,
    .scale_key = "routed_scaling_factor",
    .scale = 1,
    .experts_key = "n_routed_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "moe_intermediate_size",
    .shared_key = "n_shared_experts",
    .shared_counts = true,
    .shared = 2,
    .dense = EXC_DENSE_FIRST,
    .dense_first = 0,
    .refused = v2_refused,
    .fixed = v2_fixed,
    .router_bias =
        "the family has no router bias tensor; an extra one would be ignored by loaders (use a sidecar)",
    .router_bias_stored = 0,
};
