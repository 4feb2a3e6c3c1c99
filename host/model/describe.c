/* describe.c - inspect: what a model folder holds, from headers only. Family, sizes, gate formula, every role
 * with its tensors, dtypes and the edits it supports, where a router bias could be stored, and each tensor
 * that no name of the family covers. Nothing is read from the data sections, so a 700 GB checkpoint answers
 * as fast as a small one. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

/* what a plan may do with the role, in the words of plans */
static void put_edits(exc_buf *b, const exc_atlas *a, exc_role role, bool possible) {
    bool router = role == EXC_ROLE_ROUTER;
    const struct {
        const char *op;
        bool has;
    } ops[] = {{"project", exc_role_writes(role)}, {"project_input", exc_role_reads(role)},
               {"scale", true},                    {"mask", true},
               {"router_project", router},         {"router_scale", router},
               {"router_bias", router && a->family->router_bias_stored}};
    exc_buf_puts(b, ",\"edits\":[");
    for (size_t i = 0, n = 0; possible && i < EXC_COUNT(ops); i++)
        if (ops[i].has) exc_buf_printf(b, "%s\"%s\"", n++ ? "," : "", ops[i].op);
    exc_buf_puts(b, "]");
}

static const char *why_not(exc_role role) {
    if (exc_role_planned(role)) return "a block of scales is also another part's: edited by apply --to bf16 only";
    switch (role) {
    case EXC_ROLE_ROUTER_BIAS:
        return "edited by router_bias of the role router";
    case EXC_ROLE_EXPERT_DOWN_BIAS:
        return "edited together with expert_down";
    case EXC_ROLE_EXPERT_GATE_BIAS:
        return "edited together with expert_gate";
    case EXC_ROLE_EXPERT_UP_BIAS:
        return "edited together with expert_up";
    case EXC_ROLE_LINEAR_RATE:
    case EXC_ROLE_LINEAR_STEP:
        return "a vector of decays";
    case EXC_ROLE_ATTN_OUT_BIAS:
        return "edited together with attn_out";
    case EXC_ROLE_ATTN_Q_BIAS:
    case EXC_ROLE_ATTN_K_BIAS:
    case EXC_ROLE_ATTN_V_BIAS:
        return "a vector of biases";
    case EXC_ROLE_ATTN_SINKS:
        return "a score for each head, without a value";
    default:
        return exc_role_is_vector(role) ? "a vector of norm weights"
                                        : "neither a writer of the residual stream nor a role plans know";
    }
}

static void put_string(exc_buf *b, const char *s) {
    json_t *j = json_string(s);
    char *text = j ? json_dumps(j, JSON_ENCODE_ANY) : NULL;
    exc_buf_puts(b, text ? text : "\"\"");
    free(text);
    json_decref(j);
}

static void put_gate(exc_buf *b, const exc_atlas *a) {
    const exc_shape *s = &a->shape;
    static const char *const score[] = {"softmax over all experts", "sigmoid of each expert",
                                        "the logits themselves"};
    exc_buf_printf(b, ",\"gate\":\"%s, the %lld largest, %s", score[s->gate.score], (long long)s->top_k,
                   s->gate.score == 2 ? "softmax over the chosen"
                   : s->gate.renorm   ? "renormalised to sum 1"
                                      : "not renormalised");
    if (s->gate.scale != 0 && s->gate.scale != 1) exc_buf_printf(b, ", times %g", (double)s->gate.scale);
    if (a->family->router_bias_stored)
        exc_buf_puts(b, a->family->router_bias_in_logits ? "; a bias for each expert is part of the logits"
                                                         : "; a bias for each expert is added for the choice");
    if (s->gate.groups > 1)
        exc_buf_printf(b, "; of the best %d of %d groups", s->gate.groups_kept, s->gate.groups);
    exc_buf_puts(b, "\"");
}

static void put_role(exc_buf *b, const exc_atlas *a, size_t first, size_t end) {
    const exc_weight *w = &a->items[first];
    uint64_t bytes = 0, of[EXC_DTYPE_OTHER + 1] = {0};
    bool same = true; /* sizes differ between layers only where the family says so */
    size_t tensors = 0;
    for (size_t i = first; i < end; i++) {
        bytes += exc_weight_bytes(&a->items[i]);
        /* experts of one tensor follow each other */
        if (i == first || a->items[i].tensor != a->items[i - 1].tensor) tensors++, of[a->items[i].dtype]++;
        same = same && a->items[i].out == w->out && a->items[i].in == w->in;
    }
    exc_buf_printf(b, "{\"role\":\"%s\",\"tensors\":%zu,\"weights\":%zu,\"bytes\":%llu,\"dtypes\":{",
                   exc_role_name(w->role), tensors, end - first, (unsigned long long)bytes);
    for (int d = 0, n = 0; d <= EXC_DTYPE_OTHER; d++)
        if (of[d])
            exc_buf_printf(b, "%s\"%s\":%llu", n++ ? "," : "", exc_dtype_name((exc_dtype)d),
                           (unsigned long long)of[d]);
    exc_buf_puts(b, "}");
    if (same && exc_role_is_vector(w->role))
        exc_buf_printf(b, ",\"shape\":[%lld]", (long long)w->out);
    else if (same)
        exc_buf_printf(b, ",\"shape\":[%lld,%lld]", (long long)w->out, (long long)w->in);
    exc_buf_puts(b, ",\"stored\":\"");
    for (int d = 0, n = 0; d <= EXC_DTYPE_OTHER; d++) {
        if (!of[d]) continue;
        exc_buf_printf(b, "%s%s", n++ ? ", " : "", exc_dtype_name((exc_dtype)d));
        if (of[d] < tensors) exc_buf_printf(b, " %llu", (unsigned long long)of[d]);
    }
    exc_buf_printf(b, "\",\"writes_residual\":%s", exc_role_writes(w->role) ? "true" : "false");
    bool possible = exc_role_planned(w->role) && !w->scale_shared;
    put_edits(b, a, w->role, possible);
    if (!possible) exc_buf_printf(b, ",\"why_not\":\"%s\"", why_not(w->role));
    exc_buf_puts(b, "}");
}

static bool starts(const char *name, const char *with) { return !strncmp(name, with, strlen(with)); }

/* known and not part of the decoder: prefixes of the family, and layers behind the last */
static bool is_passed(const exc_atlas *a, const char *name) {
    static const char layer[] = "model.layers.";
    for (int i = 0; a->family->passed[i]; i++)
        if (starts(name, a->family->passed[i])) return true;
    if (!starts(name, layer)) return false;
    long number = strtol(name + sizeof layer - 1, NULL, 10);
    return number >= a->shape.layers && number < a->shape.layers + a->shape.mtp_layers;
}

/* one part that is passed through: its tensors and their bytes; returns whether there are any */
static bool put_part(exc_buf *b, const exc_atlas *a, const char *prefix, bool more) {
    size_t n = 0;
    uint64_t bytes = 0;
    for (size_t i = 0; i < a->n_unknown; i++)
        if (starts(a->unknown[i]->name, prefix)) n++, bytes += a->unknown[i]->end - a->unknown[i]->begin;
    if (!n) return false;
    const char *what = strstr(prefix, "visual") ? "vision" : "prediction of further tokens (MTP)";
    exc_buf_printf(b, "%s{\"part\":\"%s\",\"prefix\":\"%s\",\"tensors\":%zu,\"bytes\":%llu}", more ? "," : "", what, prefix,
                   n, (unsigned long long)bytes);
    return true;
}

static void put_parts(exc_buf *b, const exc_atlas *a) {
    bool more = false;
    for (int i = 0; a->family->passed[i]; i++) more |= put_part(b, a, a->family->passed[i], more);
    for (int64_t l = a->shape.layers; l < a->shape.layers + a->shape.mtp_layers; l++) {
        char prefix[48];
        snprintf(prefix, sizeof prefix, "model.layers.%lld.", (long long)l);
        more |= put_part(b, a, prefix, more);
    }
}

static void put_names(exc_buf *b, const exc_atlas *a, bool passed) {
    size_t n = 0;
    for (size_t i = 0; i < a->n_unknown; i++) {
        if (is_passed(a, a->unknown[i]->name) != passed) continue;
        if (n++) exc_buf_puts(b, ",");
        put_string(b, a->unknown[i]->name);
    }
}

/* how tokens see each other, layer by layer */
static void put_mixers(exc_buf *b, const exc_shape *s) {
    static const char *const kinds[EXC_MIXES] = {"softmax", "latent", "linear"};
    const exc_linear *l = &s->linear;
    exc_buf_puts(b, ",\"attention_by_layer\":[");
    for (int64_t i = 0; i < s->layers; i++) exc_buf_printf(b, "%s\"%s\"", i ? "," : "", kinds[s->mix[i]]);
    exc_buf_puts(b, "],\"window_by_layer\":[");
    for (int64_t i = 0; i < s->layers; i++) exc_buf_printf(b, "%s%lld", i ? "," : "", (long long)s->window[i]);
    exc_buf_puts(b, "]");
    if (l->v_heads)
        exc_buf_printf(b,
                       ",\"linear_key_heads\":%lld,\"linear_value_heads\":%lld,\"linear_key_dim\":%lld"
                       ",\"linear_value_dim\":%lld,\"linear_taps\":%lld",
                       (long long)l->k_heads, (long long)l->v_heads, (long long)l->k_dim, (long long)l->v_dim,
                       (long long)l->taps);
}

static void put_all(exc_buf *b, const exc_atlas *a) {
    const exc_shape *s = &a->shape;
    uint64_t params = 0, bytes = 0;
    for (size_t i = 0; i < a->count; i++) {
        params += (uint64_t)a->items[i].out * (uint64_t)a->items[i].in;
        bytes += exc_weight_bytes(&a->items[i]);
    }
    exc_buf_printf(b,
                   "{\"family\":\"%s\",\"fingerprint\":\"%s\",\"files\":%d,\"tensors\":%zu,\"parameters\":%"
                   "llu,\"bytes\":%llu",
                   a->family->model_type, a->fingerprint, a->files->n_files, a->files->n_tensors,
                   (unsigned long long)params, (unsigned long long)bytes);
    exc_buf_printf(b,
                   ",\"layers\":%lld,\"moe_layers\":%lld,\"hidden\":%lld,\"heads\":%lld,\"kv_heads\":%lld,"
                   "\"head_dim\":%lld",
                   (long long)s->layers, (long long)s->moe_layers, (long long)s->hidden, (long long)s->heads,
                   (long long)s->kv_heads, (long long)s->head_dim);
    exc_buf_printf(b,
                   ",\"intermediate\":%lld,\"experts\":%lld,\"top_k\":%lld,\"vocab\":%lld,\"context\":%lld,"
                   "\"rope_theta\":%.9g"
                   ",\"norm_eps\":%.6g,\"tied_embeddings\":%s",
                   (long long)s->inner, (long long)s->experts, (long long)s->top_k, (long long)s->vocab,
                   (long long)s->context, s->rope.theta, (double)s->eps, s->tied ? "true" : "false");
    exc_buf_printf(b, ",\"shared_intermediate\":%lld,\"rotary\":%lld", (long long)s->shared_inner,
                   (long long)s->rotary);
    exc_buf_printf(b, ",\"quantization\":\"%s\"", exc_quant_name(s->quant));
    exc_buf_printf(b, ",\"rope_type\":\"%s\"", exc_rope_name(s->rope.kind));
    if (s->rope.kind != EXC_ROPE_PLAIN)
        exc_buf_printf(b, ",\"rope_factor\":%.9g,\"rope_original_context\":%.9g", s->rope.factor,
                       s->rope.original);
    if (s->latent.rank)
        exc_buf_printf(b, ",\"latent\":%lld,\"query_latent\":%lld,\"value_dim\":%lld",
                       (long long)s->latent.rank, (long long)s->latent.q_rank, (long long)s->value_dim);
    put_mixers(b, s);
    put_gate(b, a);
    exc_buf_puts(b, ",\"experts_by_layer\":[");
    for (int64_t l = 0; l < s->layers; l++)
        exc_buf_printf(b, "%s%lld", l ? "," : "", s->is_moe[l] ? (long long)s->experts : 0LL);
    exc_buf_puts(b, "],\"end_tokens\":[");
    for (int i = 0; i < s->n_eos; i++) exc_buf_printf(b, "%s%d", i ? "," : "", s->eos[i]);
    exc_buf_puts(b, "],\"roles\":[");
    for (size_t first = 0, end; first < a->count; first = end) {
        for (end = first + 1; end < a->count && a->items[end].role == a->items[first].role; end++) {
        }
        if (first) exc_buf_puts(b, ",");
        put_role(b, a, first, end);
    }
    exc_buf_printf(
        b, "],\"router_bias\":{\"storable\":%s,\"where\":", a->family->router_bias_stored ? "true" : "false");
    put_string(b, a->family->router_bias);
    exc_buf_puts(b, "},\"parts\":[");
    put_parts(b, a);
    exc_buf_puts(b, "],\"passed_through\":[");
    put_names(b, a, true);
    exc_buf_puts(b, "],\"unknown\":[");
    put_names(b, a, false);
    exc_buf_puts(b, "]}");
}

exc_status exc_inspect(exc_ctx *ctx, const char *dir, char **json) {
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (json) *json = NULL;
    if (!dir) return exc_fail(ctx, EXC_ERR_USAGE, "inspect: no model folder given");
    exc_atlas *a;
    EXC_TRY(exc_atlas_open(ctx, dir, &a));
    exc_buf b = {0};
    if (json) put_all(&b, a);
    exc_atlas_close(a);
    if (b.failed) {
        exc_buf_free(&b);
        return exc_fail(ctx, EXC_ERR_MEMORY, "inspect %s: no memory for the description", dir);
    }
    if (json) *json = b.data;
    return EXC_OK;
}

exc_status exc_model_describe(const exc_model *m, exc_model_info *info) {
    if (!m || !info || info->size < sizeof info->size) return EXC_ERR_USAGE;
    const exc_shape *s = &m->atlas->shape;
    exc_model_info full = {.size = info->size,
                           .family = m->atlas->family->model_type,
                           .layers = s->layers,
                           .moe_layers = s->moe_layers,
                           .hidden = s->hidden,
                           .intermediate = s->inner,
                           .experts = s->experts,
                           .top_k = s->top_k,
                           .vocab = s->vocab,
                           .context = s->context};
    memcpy(full.fingerprint, m->atlas->fingerprint, sizeof full.fingerprint);
    memcpy(info, &full, info->size < sizeof full ? info->size : sizeof full);
    return EXC_OK;
}
