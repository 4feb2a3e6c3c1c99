/* family.c - the table of families, and what roles mean. A family is one const descriptor in one file
 * (qwen.c, ...); adding one is that file and a line here. Roles are the vocabulary that plans, tables and
 * reports share: which weights come once a model, once a layer or once an expert, and which of them write the
 * residual stream. */
#include <string.h>

#include "model.h"

extern const exc_family exc_family_qwen3_moe, exc_family_mixtral, exc_family_olmoe, exc_family_glm4_moe,
    exc_family_qwen2_moe, exc_family_deepseek_v3, exc_family_deepseek_v2, exc_family_gpt_oss, exc_family_qwen3_next,
    exc_family_qwen3_5_moe, exc_family_dots1;

const exc_family *const exc_families[] = {
    &exc_family_qwen3_moe,   &exc_family_qwen3_5_moe, &exc_family_qwen3_next,  &exc_family_mixtral,
    &exc_family_olmoe,       &exc_family_glm4_moe,    &exc_family_qwen2_moe,   &exc_family_deepseek_v3,
    &exc_family_deepseek_v2, &exc_family_gpt_oss,     &exc_family_dots1,       NULL,
};

const exc_family *exc_family_find(const char *model_type) {
    for (int i = 0; exc_families[i]; i++) {
        const exc_family *f = exc_families[i];
        if (!strcmp(f->model_type, model_type) || (f->other_type && !strcmp(f->other_type, model_type))) return f;
    }
    return NULL;
}

static const char *const role_names[EXC_ROLES] = {
    [EXC_ROLE_EXPERT_DOWN] = "expert_down",
    [EXC_ROLE_SHARED_DOWN] = "shared_down",
    [EXC_ROLE_DENSE_DOWN] = "dense_down",
    [EXC_ROLE_ATTN_OUT] = "attn_out",
    [EXC_ROLE_EXPERT_GATE] = "expert_gate",
    [EXC_ROLE_EXPERT_UP] = "expert_up",
    [EXC_ROLE_SHARED_GATE] = "shared_gate",
    [EXC_ROLE_SHARED_UP] = "shared_up",
    [EXC_ROLE_DENSE_GATE] = "dense_gate",
    [EXC_ROLE_DENSE_UP] = "dense_up",
    [EXC_ROLE_ROUTER] = "router",
    [EXC_ROLE_SHARED_ROUTER] = "shared_router",
    [EXC_ROLE_ROUTER_BIAS] = "router_bias",
    [EXC_ROLE_EXPERT_DOWN_BIAS] = "expert_down_bias",
    [EXC_ROLE_EXPERT_GATE_BIAS] = "expert_gate_bias",
    [EXC_ROLE_EXPERT_UP_BIAS] = "expert_up_bias",
    [EXC_ROLE_ATTN_OUT_BIAS] = "attn_out_bias",
    [EXC_ROLE_ATTN_Q] = "attn_q",
    [EXC_ROLE_ATTN_K] = "attn_k",
    [EXC_ROLE_ATTN_V] = "attn_v",
    [EXC_ROLE_ATTN_Q_A] = "attn_q_a",
    [EXC_ROLE_ATTN_Q_B] = "attn_q_b",
    [EXC_ROLE_ATTN_KV_A] = "attn_kv_a",
    [EXC_ROLE_ATTN_KV_B] = "attn_kv_b",
    [EXC_ROLE_LINEAR_QKVZ] = "linear_qkvz",
    [EXC_ROLE_LINEAR_BA] = "linear_ba",
    [EXC_ROLE_LINEAR_QKV] = "linear_qkv",
    [EXC_ROLE_LINEAR_Z] = "linear_z",
    [EXC_ROLE_LINEAR_B] = "linear_b",
    [EXC_ROLE_LINEAR_A] = "linear_a",
    [EXC_ROLE_LINEAR_CONV] = "linear_conv",
    [EXC_ROLE_ATTN_Q_BIAS] = "attn_q_bias",
    [EXC_ROLE_ATTN_K_BIAS] = "attn_k_bias",
    [EXC_ROLE_ATTN_V_BIAS] = "attn_v_bias",
    [EXC_ROLE_ATTN_SINKS] = "attn_sinks",
    [EXC_ROLE_ATTN_Q_NORM] = "attn_q_norm",
    [EXC_ROLE_ATTN_K_NORM] = "attn_k_norm",
    [EXC_ROLE_ATTN_Q_A_NORM] = "attn_q_a_norm",
    [EXC_ROLE_ATTN_KV_A_NORM] = "attn_kv_a_norm",
    [EXC_ROLE_LINEAR_RATE] = "linear_rate",
    [EXC_ROLE_LINEAR_STEP] = "linear_step",
    [EXC_ROLE_LINEAR_NORM] = "linear_norm",
    [EXC_ROLE_NORM_IN] = "norm_in",
    [EXC_ROLE_NORM_POST] = "norm_post",
    [EXC_ROLE_NORM_FINAL] = "norm_final",
    [EXC_ROLE_EMBED] = "embed",
    [EXC_ROLE_LM_HEAD] = "lm_head",
};

const char *exc_role_name(exc_role role) {
    return role >= 0 && role < EXC_ROLES ? role_names[role] : "unknown";
}

bool exc_role_find(const char *name, exc_role *out) {
    for (int i = 0; i < EXC_ROLES; i++)
        if (!strcmp(role_names[i], name)) {
            *out = (exc_role)i;
            return true;
        }
    return false;
}

bool exc_role_by_expert(exc_role role) {
    return role == EXC_ROLE_EXPERT_DOWN || role == EXC_ROLE_EXPERT_GATE || role == EXC_ROLE_EXPERT_UP ||
           (role >= EXC_ROLE_EXPERT_DOWN_BIAS && role <= EXC_ROLE_EXPERT_UP_BIAS);
}

bool exc_role_by_layer(exc_role role) {
    return role != EXC_ROLE_NORM_FINAL && role != EXC_ROLE_EMBED && role != EXC_ROLE_LM_HEAD;
}

bool exc_role_writes(exc_role role) { return role <= EXC_ROLE_ATTN_OUT || role == EXC_ROLE_EMBED; }

bool exc_role_reads(exc_role role) {
    return role == EXC_ROLE_EXPERT_GATE || role == EXC_ROLE_EXPERT_UP || role == EXC_ROLE_ROUTER ||
           role == EXC_ROLE_LM_HEAD;
}

bool exc_role_planned(exc_role role) { return exc_role_writes(role) || exc_role_reads(role); }

bool exc_role_is_vector(exc_role role) { return role >= EXC_ROLE_ROUTER_BIAS && role <= EXC_ROLE_NORM_FINAL; }

exc_role exc_role_bias(const exc_family *f, exc_role role) {
    switch (role) {
    case EXC_ROLE_EXPERT_DOWN:
        return EXC_ROLE_EXPERT_DOWN_BIAS;
    case EXC_ROLE_EXPERT_GATE:
        return EXC_ROLE_EXPERT_GATE_BIAS;
    case EXC_ROLE_EXPERT_UP:
        return EXC_ROLE_EXPERT_UP_BIAS;
    case EXC_ROLE_ATTN_OUT:
        return EXC_ROLE_ATTN_OUT_BIAS;
    case EXC_ROLE_ROUTER:
        return f->router_bias_in_logits ? EXC_ROLE_ROUTER_BIAS : EXC_ROLES;
    default:
        return EXC_ROLES;
    }
}
