/* next.c - family qwen3_next (Qwen3-Next-80B-A3B, Qwen3-Coder-Next): three layers of gated delta net to one of
 * gated grouped-query attention, norms centred on zero, a quarter of each head rotates. Projections of the delta
 * net are packed by key head; each expert has tensors of its own, and a shared expert stands behind a sigmoid
 * gate. The weights that predict further tokens (mtp.) are passed through. */
#include "model.h"

#define LAYER "model.layers.%L."

static const exc_name names[] = {
    {EXC_ROLE_EXPERT_DOWN, LAYER "mlp.experts.%E.down_proj.weight"}, /* [H,I] */
    {EXC_ROLE_EXPERT_GATE, LAYER "mlp.experts.%E.gate_proj.weight"}, /* [I,H] */
    {EXC_ROLE_EXPERT_UP, LAYER "mlp.experts.%E.up_proj.weight"},     /* [I,H] */
    EXC_STACKED_EXPERTS(LAYER "mlp.experts."),
    {EXC_ROLE_SHARED_DOWN, LAYER "mlp.shared_expert.down_proj.weight"},
    {EXC_ROLE_SHARED_GATE, LAYER "mlp.shared_expert.gate_proj.weight"},
    {EXC_ROLE_SHARED_UP, LAYER "mlp.shared_expert.up_proj.weight"},
    {EXC_ROLE_SHARED_ROUTER, LAYER "mlp.shared_expert_gate.weight"}, /* [1,H] */
    {EXC_ROLE_DENSE_DOWN, LAYER "mlp.down_proj.weight"},             /* [H,intermediate_size] */
    {EXC_ROLE_DENSE_GATE, LAYER "mlp.gate_proj.weight"},
    {EXC_ROLE_DENSE_UP, LAYER "mlp.up_proj.weight"},
    {EXC_ROLE_ROUTER, LAYER "mlp.gate.weight"},         /* [E,H] */
    {EXC_ROLE_ATTN_Q, LAYER "self_attn.q_proj.weight"}, /* [heads*2D,H]: D of queries, D of gates, head by head */
    {EXC_ROLE_ATTN_K, LAYER "self_attn.k_proj.weight"},
    {EXC_ROLE_ATTN_V, LAYER "self_attn.v_proj.weight"},
    {EXC_ROLE_ATTN_OUT, LAYER "self_attn.o_proj.weight", .in = EXC_IN(EXC_MIX_SOFTMAX)},  /* [H,heads*D] */
    {EXC_ROLE_ATTN_OUT, LAYER "linear_attn.out_proj.weight", .in = EXC_IN(EXC_MIX_LINEAR)}, /* [H,Hv*Dv] */
    {EXC_ROLE_ATTN_Q_NORM, LAYER "self_attn.q_norm.weight"},                              /* [D] */
    {EXC_ROLE_ATTN_K_NORM, LAYER "self_attn.k_norm.weight"},
    {EXC_ROLE_LINEAR_QKVZ, LAYER "linear_attn.in_proj_qkvz.weight"}, /* [2*Hk*Dk+2*Hv*Dv,H] */
    {EXC_ROLE_LINEAR_BA, LAYER "linear_attn.in_proj_ba.weight"},     /* [2*Hv,H] */
    {EXC_ROLE_LINEAR_CONV, LAYER "linear_attn.conv1d.weight", {.channels = true}}, /* [2*Hk*Dk+Hv*Dv,1,taps] */
    {EXC_ROLE_LINEAR_RATE, LAYER "linear_attn.A_log"},                             /* [Hv] */
    {EXC_ROLE_LINEAR_STEP, LAYER "linear_attn.dt_bias"},
    {EXC_ROLE_LINEAR_NORM, LAYER "linear_attn.norm.weight"}, /* [Dv], not centred on zero */
    {EXC_ROLE_NORM_IN, LAYER "input_layernorm.weight"},
    {EXC_ROLE_NORM_POST, LAYER "post_attention_layernorm.weight"},
    {EXC_ROLE_NORM_FINAL, "model.norm.weight"},
    {EXC_ROLE_EMBED, "model.embed_tokens.weight"},
    {EXC_ROLE_LM_HEAD, "lm_head.weight"},
    {EXC_ROLES, NULL},
};

static const char *const passed[] = {"mtp.", NULL};
static const char *const refused[] = {"attention_bias", "use_sliding_window", NULL};

const exc_family exc_family_qwen3_next = {
    .model_type = "qwen3_next",
    .names = names,
    .passed = passed,
    .norm_zero_centred = 1,
    .norm_eps = 1e-6,
    .rope_theta = 1e4,
    .rotary = 0.25,
    .head_dim = 256,
    .qk_norm = EXC_QK_HEAD,
    .mix = EXC_MIX_LINEAR,
    .out_gate = true,
    .gate_score = 0, /* softmax over all experts */
    .renorm_key = "norm_topk_prob",
    .gate_renorm = true,
    .experts_key = "num_experts",
    .top_k_key = "num_experts_per_tok",
    .inner_key = "moe_intermediate_size",
    .shared_key = "shared_expert_intermediate_size",
    .shared = 512,
    .shared_gated = true,
    .dense = EXC_DENSE_LISTED,
    .refused = refused,
    .router_bias =
        "the family has no router bias tensor; an extra one would be ignored by loaders (use a sidecar)",
    .router_bias_stored = 0,
};
