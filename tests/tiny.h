/* tiny.h - random checkpoints of qwen3_moe, glm4_moe, olmoe, deepseek_v3, gpt_oss, qwen3_next and qwen3_5_moe, of any
 * shape, made by the tests themselves, and the model computed a second time in plain f64 loops. The writer is its own (not the library's), and a callback may spoil any tensor on its way out: that is how
 * the refusals are tested. Weights are counter-based, so a spec names its checkpoint. */
#ifndef EXC_TEST_TINY_H
#define EXC_TEST_TINY_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h"
#include "helpers.h"

typedef struct tiny_tensor {
    char name[128];
    int rank;
    int64_t shape[3];
    const char *dtype;   /* of this tensor in the header */
    int drop, poison;    /* left out; element 0 becomes NaN */
    double *value;       /* as stored (rounded to the dtype) */
    int64_t count;
} tiny_tensor;

typedef struct tiny {
    int layers, hidden, heads, kv, dim, vocab, experts, top_k, inner, dense, context;
    enum { TINY_QWEN, TINY_GLM, TINY_OLMOE, TINY_LATENT, TINY_OSS, TINY_NEXT, TINY_APART } kind; /* glm: biases, half of a head rotates, sigmoid router with a selection bias,
                                                      groups, shared expert, layer 0 dense; olmoe: norm over all heads;
                                                      latent: deepseek_v3, feed-forward as glm; oss: gpt_oss, biases,
                                                      sinks, clamped experts stacked as [in,out], no yarn; next, apart: qwen3_next, qwen3_5_moe */
    int interval, k_heads, v_heads, k_dim, v_dim, taps, shared; /* next: every interval-th layer is softmax; width of the shared expert */
    int window;          /* tokens that a layer sees, 0: all; oss: on even layers */
    int q_rank, rank, plain, turned, value; /* latent: 0 or rank of queries; of keys; channels of a head */
    int yarn, halves;    /* latent: yarn of factor 4 from 64 positions; pairs (i, i + turned/2), not (2i, 2i+1) */
    int groups, kept;    /* glm: of the experts */
    double scale;        /* glm: of the routing weights */
    const char *only;    /* mlp_only_layers as JSON, or NULL */
    int sparse_step, tied, renorm, files;
    const char *dtype;   /* "BF16", "F16", "F32" */
    uint64_t seed;
    const char *extra;   /* more config text: "\"key\":value," */
    void (*spoil)(void *user, tiny_tensor *t);
    void *user;
    tiny_tensor *items;  /* made by tiny_write */
    int count;
} tiny;

static inline tiny tiny_default(void)
{
    return (tiny){.layers = 3, .hidden = 40, .heads = 3, .kv = 1, .dim = 18, .vocab = 101, .experts = 7, .top_k = 3, .inner = 23,
                  .dense = 37, .context = 256, .sparse_step = 1, .renorm = 1, .files = 1, .dtype = "BF16", .seed = 1};
}

static inline int tiny_is_moe(const tiny *t, int layer)
{
    char key[16];
    if (t->kind == TINY_GLM || t->kind == TINY_LATENT) return layer > 0;
    if (t->kind == TINY_OSS) return 1;
    if ((layer + 1) % t->sparse_step) return 0;
    if (!t->only) return 1;
    snprintf(key, sizeof key, "%d", layer); /* the lists of the tests hold single digits */
    return strstr(t->only, key) == NULL;
}

static inline bool tiny_sigmoid(const tiny *t) { return t->kind == TINY_GLM || t->kind == TINY_LATENT; }


static inline double tiny_round(double x, const char *dtype)
{
    if (!strcmp(dtype, "BF16")) return (double)test_from_bf16(test_bf16((float)x));
    if (!strcmp(dtype, "F16")) return (double)(_Float16)(float)x;
    return (double)(float)x;
}

static inline void tiny_add(tiny *t, const char *name, int64_t rows, int64_t cols, double scale, double mean)
{
    t->items = realloc(t->items, (size_t)(t->count + 1) * sizeof *t->items);
    tiny_tensor *x = &t->items[t->count];
    memset(x, 0, sizeof *x);
    snprintf(x->name, sizeof x->name, "%s", name);
    x->rank = cols ? 2 : 1;
    x->shape[0] = rows;
    x->shape[1] = cols;
    x->dtype = t->dtype;
    x->count = rows * (cols ? cols : 1);
    x->value = malloc((size_t)x->count * sizeof(double));
    for (int64_t i = 0; i < x->count; i++)
        x->value[i] = tiny_round(mean + scale * (double)test_normal(t->seed * 1000 + (uint64_t)t->count, (uint64_t)i), t->dtype);
    t->count++;
}

#define TINY_NAME(...) (snprintf(n, sizeof n, __VA_ARGS__), n)
#define TINY_W(...) tiny_find(t, TINY_NAME(__VA_ARGS__))

static inline const double *tiny_find(const tiny *t, const char *name)
{
    for (int i = 0; i < t->count; i++)
        if (!strcmp(t->items[i].name, name)) return t->items[i].value;
    fail_msg("no tensor %s", name);
    return NULL;
}

static inline void tiny_matmul(const double *x, const double *w, int64_t rows, int64_t k, int64_t n, double *y)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < n; o++) {
            double sum = 0;
            for (int64_t i = 0; i < k; i++) sum += x[r * k + i] * w[o * k + i];
            y[r * n + o] = sum;
        }
}

static inline void tiny_norm(const double *x, const double *w, int64_t n, double *y)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    double scale = 1 / sqrt(sum / (double)n + 1e-6);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

static inline void tiny_mlp(const double *x, const double *g, const double *u, const double *d, int64_t h, int64_t inner, double weight,
                            double *add)
{
    double *a = malloc((size_t)inner * 8), *b = malloc((size_t)inner * 8);
    tiny_matmul(x, g, 1, h, inner, a);
    tiny_matmul(x, u, 1, h, inner, b);
    for (int64_t i = 0; i < inner; i++) a[i] = a[i] / (1 + exp(-a[i])) * b[i];
    for (int64_t o = 0; o < h; o++)
        for (int64_t i = 0; i < inner; i++) add[o] += weight * d[o * inner + i] * a[i];
    free(a);
    free(b);
}

#include "linear.h"

/* what the layer's output projection reads */
static inline int tiny_out(const tiny *t, int l)
{
    if (tiny_linear(t, l)) return t->v_heads * t->v_dim;
    return t->heads * (t->kind == TINY_LATENT ? t->value : t->dim);
}

static inline void tiny_make_latent(tiny *t, int l)
{
    char n[128];
    double h = 1 / sqrt(t->hidden);
    int q = t->heads * (t->plain + t->turned);
    if (t->q_rank) {
        tiny_add(t, TINY_NAME("model.layers.%d.self_attn.q_a_proj.weight", l), t->q_rank, t->hidden, h, 0);
        tiny_add(t, TINY_NAME("model.layers.%d.self_attn.q_a_layernorm.weight", l), t->q_rank, 0, 0.2, 1);
        tiny_add(t, TINY_NAME("model.layers.%d.self_attn.q_b_proj.weight", l), q, t->q_rank, 2 / sqrt(t->q_rank), 0);
    } else {
        tiny_add(t, TINY_NAME("model.layers.%d.self_attn.q_proj.weight", l), q, t->hidden, 2 * h, 0);
    }
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.kv_a_proj_with_mqa.weight", l), t->rank + t->turned, t->hidden, 2 * h, 0);
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.kv_a_layernorm.weight", l), t->rank, 0, 0.2, 1);
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.kv_b_proj.weight", l), t->heads * (t->plain + t->value), t->rank, 1 / sqrt(t->rank), 0);
}

static inline void tiny_make_softmax(tiny *t, int l)
{
    char n[128];
    double h = 1 / sqrt(t->hidden), mean = tiny_next(t) ? 0 : 1; /* of norms: centred on zero */
    int q = t->heads * t->dim, kv = t->kv * t->dim;
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.q_proj.weight", l), tiny_next(t) ? 2 * q : q, t->hidden, 2 * h, 0);
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.k_proj.weight", l), kv, t->hidden, 2 * h, 0);
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.v_proj.weight", l), kv, t->hidden, h, 0);
    for (int i = 0; i < 3 && (t->kind == TINY_GLM || t->kind == TINY_OSS); i++)
        tiny_add(t, TINY_NAME("model.layers.%d.self_attn.%c_proj.bias", l, "qkv"[i]), i ? kv : q, 0, 0.5, 0);
    if (t->kind == TINY_OSS) {
        tiny_add(t, TINY_NAME("model.layers.%d.self_attn.o_proj.bias", l), t->hidden, 0, 0.5, 0);
        tiny_add(t, TINY_NAME("model.layers.%d.self_attn.sinks", l), t->heads, 0, 2, 0);
        return;
    }
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.q_norm.weight", l), t->kind == TINY_OLMOE ? q : t->dim, 0, 0.2, mean);
    tiny_add(t, TINY_NAME("model.layers.%d.self_attn.k_norm.weight", l), t->kind == TINY_OLMOE ? kv : t->dim, 0, 0.2, mean);
}

/* the last tensor is one of [experts, rows, cols] */
static inline void tiny_stacked(tiny *t, int64_t rows, int64_t cols)
{
    tiny_tensor *x = &t->items[t->count - 1];
    x->rank = 3;
    x->shape[0] = t->experts;
    x->shape[1] = rows;
    x->shape[2] = cols;
}

static inline void tiny_make_oss(tiny *t, int l)
{
    char n[128];
    int E = t->experts, I = t->inner, H = t->hidden;
    tiny_add(t, TINY_NAME("model.layers.%d.mlp.router.weight", l), E, H, 2 / sqrt(H), 0);
    tiny_add(t, TINY_NAME("model.layers.%d.mlp.router.bias", l), E, 0, 1, 0);
    tiny_add(t, TINY_NAME("model.layers.%d.mlp.experts.gate_up_proj", l), E * H, 2 * I, 4 / sqrt(H), 0); /* many beyond 7 */
    tiny_stacked(t, H, 2 * I);
    tiny_add(t, TINY_NAME("model.layers.%d.mlp.experts.gate_up_proj_bias", l), E, 2 * I, 1, 0);
    tiny_add(t, TINY_NAME("model.layers.%d.mlp.experts.down_proj", l), E * I, H, 0.3 / sqrt(I), 0);
    tiny_stacked(t, I, H);
    tiny_add(t, TINY_NAME("model.layers.%d.mlp.experts.down_proj_bias", l), E, H, 0.5, 0);
}

/* items of a tensor an expert, `parts` names beside each other, become one tensor [E, parts*rows, columns] */
static inline void tiny_stack(tiny *t, int layer, const char *as, int parts, const char *const *names)
{
    tiny_tensor all = {.rank = 3, .dtype = t->dtype};
    snprintf(all.name, sizeof all.name, "model.layers.%d.mlp.experts.%s", layer, as);
    for (int e = 0; e < t->experts; e++)
        for (int p = 0; p < parts; p++) {
            char name[128];
            snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s.weight", layer, e, names[p]);
            for (int i = 0; i < t->count; i++) {
                tiny_tensor *x = &t->items[i];
                if (strcmp(x->name, name)) continue;
                all.value = realloc(all.value, (size_t)(all.count + x->count) * sizeof(double));
                memcpy(all.value + all.count, x->value, (size_t)x->count * sizeof(double));
                all.count += x->count;
                all.shape[1] = parts * x->shape[0];
                all.shape[2] = x->shape[1];
                x->drop = 1;
            }
        }
    all.shape[0] = t->experts;
    t->items = realloc(t->items, (size_t)(t->count + 1) * sizeof *t->items);
    t->items[t->count++] = all;
}

static inline void tiny_stack_layer(tiny *t, int layer)
{
    static const char *const both[] = {"gate_proj", "up_proj"}, *const down[] = {"down_proj"};
    tiny_stack(t, layer, "gate_up_proj", 2, both);
    tiny_stack(t, layer, "down_proj", 1, down);
}

static inline void tiny_make(tiny *t)
{
    char n[128];
    double h = 1 / sqrt(t->hidden), mean = tiny_next(t) ? 0 : 1;
    tiny_add(t, "model.embed_tokens.weight", t->vocab, t->hidden, 1, 0);
    for (int l = 0; l < t->layers; l++) {
        tiny_add(t, TINY_NAME("model.layers.%d.input_layernorm.weight", l), t->hidden, 0, 0.2, mean);
        tiny_add(t, TINY_NAME("model.layers.%d.post_attention_layernorm.weight", l), t->hidden, 0, 0.2, mean);
        if (t->kind == TINY_LATENT) tiny_make_latent(t, l);
        else if (tiny_linear(t, l)) tiny_make_linear(t, l);
        else tiny_make_softmax(t, l);
        if (!tiny_linear(t, l))
            tiny_add(t, TINY_NAME("model.layers.%d.self_attn.o_proj.weight", l), t->hidden, tiny_out(t, l), 1 / sqrt(tiny_out(t, l)), 0);
        if (!tiny_is_moe(t, l)) {
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.gate_proj.weight", l), t->dense, t->hidden, 2 * h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.up_proj.weight", l), t->dense, t->hidden, h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.down_proj.weight", l), t->hidden, t->dense, 1 / sqrt(t->dense), 0);
            continue;
        }
        if (t->kind == TINY_OSS) {
            tiny_make_oss(t, l);
            continue;
        }
        tiny_add(t, TINY_NAME("model.layers.%d.mlp.gate.weight", l), t->experts, t->hidden, 2 * h, 0);
        if (tiny_sigmoid(t)) {
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.gate.e_score_correction_bias", l), t->experts, 0, 0.5, -0.3);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.shared_experts.gate_proj.weight", l), 2 * t->inner, t->hidden, 2 * h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.shared_experts.up_proj.weight", l), 2 * t->inner, t->hidden, h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.shared_experts.down_proj.weight", l), t->hidden, 2 * t->inner, 1 / sqrt(t->inner), 0);
        }
        if (tiny_next(t)) {
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.shared_expert_gate.weight", l), 1, t->hidden, 2 * h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.shared_expert.gate_proj.weight", l), t->shared, t->hidden, 2 * h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.shared_expert.up_proj.weight", l), t->shared, t->hidden, h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.shared_expert.down_proj.weight", l), t->hidden, t->shared, 1 / sqrt(t->shared), 0);
        }
        for (int e = 0; e < t->experts; e++) {
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.experts.%d.gate_proj.weight", l, e), t->inner, t->hidden, 2 * h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.experts.%d.up_proj.weight", l, e), t->inner, t->hidden, h, 0);
            tiny_add(t, TINY_NAME("model.layers.%d.mlp.experts.%d.down_proj.weight", l, e), t->hidden, t->inner, 1 / sqrt(t->inner), 0);
        }
    }
    tiny_add(t, "model.norm.weight", t->hidden, 0, 0.2, mean);
    if (!t->tied) tiny_add(t, "lm_head.weight", t->vocab, t->hidden, h, 0);
    for (int l = 0; l < t->layers && t->kind == TINY_APART; l++) tiny_stack_layer(t, l);
}

/* the code of a number that e4m3 has; of others, 0 */
static inline uint8_t tiny_code(double v)
{
    for (unsigned c = 1; c < 256; c++)
        if (c != 0x7f && c != 0xff && (double)exc_from_e4m3(c) == v) return (uint8_t)c;
    return 0;
}

static inline void tiny_store(const tiny_tensor *x, void *to)
{
    for (int64_t i = 0; i < x->count; i++) {
        double v = x->poison && i == x->poison - 1 ? (double)NAN : x->value[i];
        if (!strcmp(x->dtype, "F32")) ((float *)to)[i] = (float)v;
        else if (!strcmp(x->dtype, "F16")) ((_Float16 *)to)[i] = (_Float16)(float)v;
        else if (!strcmp(x->dtype, "F8_E4M3")) ((uint8_t *)to)[i] = tiny_code(v);
        else ((uint16_t *)to)[i] = isnan(v) ? 0x7fc0 : test_bf16((float)v);
    }
}

/* the name in the file: apart, the decoder is a part of a larger model */
static inline const char *tiny_stored(const tiny *t, const tiny_tensor *x)
{
    static char name[160];
    if (t->kind != TINY_APART || strncmp(x->name, "model.", 6)) return x->name;
    snprintf(name, sizeof name, "model.language_model.%s", x->name + 6);
    return name;
}

/* one safetensors file of items[from..to); elements of other dtypes are stored in two bytes */
static inline void tiny_file(const tiny *t, const char *path, int from, int to)
{
    exc_buf head = {0};
    size_t at = 0;
    exc_buf_puts(&head, "{");
    for (int i = from; i < to; i++) {
        const tiny_tensor *x = &t->items[i];
        if (x->drop) continue;
        size_t unit = !strcmp(x->dtype, "F32") ? 4 : !strcmp(x->dtype, "F8_E4M3") ? 1 : 2, bytes = (size_t)x->count * unit;
        exc_buf_printf(&head, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld", head.len > 1 ? "," : "", tiny_stored(t, x), x->dtype,
                       (long long)x->shape[0]);
        for (int d = 1; d < x->rank; d++) exc_buf_printf(&head, ",%lld", (long long)x->shape[d]);
        exc_buf_printf(&head, "],\"data_offsets\":[%zu,%zu]}", at, at + bytes);
        at += bytes;
    }
    exc_buf_puts(&head, "}");
    while (head.len % 8) exc_buf_puts(&head, " ");
    uint8_t *all = calloc(1, 8 + head.len + at);
    uint64_t n = head.len;
    memcpy(all, &n, 8);
    memcpy(all + 8, head.data, head.len);
    at = 8 + head.len;
    for (int i = from; i < to; i++) {
        const tiny_tensor *x = &t->items[i];
        if (x->drop) continue;
        tiny_store(x, all + at);
        at += (size_t)x->count * (!strcmp(x->dtype, "F32") ? 4 : !strcmp(x->dtype, "F8_E4M3") ? 1 : 2);
    }
    test_write(path, all, at);
    free(all);
    exc_buf_free(&head);
}

static inline void tiny_config(const tiny *t, const char *dir)
{
    exc_buf b = {0};
    static const char *const type[] = {"qwen3_moe", "glm4_moe", "olmoe", "deepseek_v3", "gpt_oss", "qwen3_next", "qwen3_5_moe_text"};
    exc_buf_puts(&b, t->kind == TINY_APART ? "{\"model_type\":\"qwen3_5_moe\",\"text_config\":{" : "{");
    if (tiny_next(t))
        exc_buf_printf(&b, "\"full_attention_interval\":%d,\"linear_num_key_heads\":%d,\"linear_num_value_heads\":%d,\"linear_key_head_dim\":%d,"
                           "\"linear_value_head_dim\":%d,\"linear_conv_kernel_dim\":%d,\"shared_expert_intermediate_size\":%d,",
                       t->interval, t->k_heads, t->v_heads, t->k_dim, t->v_dim, t->taps, t->shared);
    if (tiny_sigmoid(t))
        exc_buf_printf(&b, "\"n_routed_experts\":%d,\"n_shared_experts\":2,\"first_k_dense_replace\":1,\"n_group\":%d,\"topk_group\":%d,"
                           "\"routed_scaling_factor\":%.17g,", t->experts, t->groups, t->kept, t->scale);
    if (t->kind == TINY_GLM) exc_buf_puts(&b, "\"attention_bias\":true,\"use_qk_norm\":true,\"partial_rotary_factor\":0.5,");
    if (t->kind == TINY_LATENT) {
        exc_buf_printf(&b, "\"kv_lora_rank\":%d,\"qk_nope_head_dim\":%d,\"qk_rope_head_dim\":%d,\"v_head_dim\":%d,\"rope_interleave\":%s,",
                       t->rank, t->plain, t->turned, t->value, t->halves ? "false" : "true");
        if (t->q_rank) exc_buf_printf(&b, "\"q_lora_rank\":%d,", t->q_rank);
        else exc_buf_puts(&b, "\"q_lora_rank\":null,");
        if (t->yarn)
            exc_buf_puts(&b, "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":64,\"beta_fast\":8,"
                             "\"beta_slow\":1,\"mscale\":0.5,\"mscale_all_dim\":1},");
    }
    if (t->kind == TINY_OSS) exc_buf_puts(&b, "\"rope_scaling\":{\"rope_type\":\"default\"},");
    if (t->window) exc_buf_printf(&b, "\"use_sliding_window\":true,\"sliding_window\":%d,", t->window);
    exc_buf_printf(&b, "%s\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"%s\",\"hidden_size\":%d,"
                       "\"num_hidden_layers\":%d,\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,\"vocab_size\":%d,"
                       "\"num_experts\":%d,\"num_experts_per_tok\":%d,\"moe_intermediate_size\":%d,\"intermediate_size\":%d,"
                       "\"max_position_embeddings\":%d,\"rms_norm_eps\":1e-06,\"rope_theta\":10000.0,\"hidden_act\":\"silu\","
                       "\"norm_topk_prob\":%s,\"decoder_sparse_step\":%d,\"mlp_only_layers\":%s,\"tie_word_embeddings\":%s,"
                       "\"eos_token_id\":2}%s",
                   t->extra ? t->extra : "", type[t->kind], t->hidden, t->layers, t->heads, t->kv, t->dim, t->vocab, t->experts, t->top_k, t->inner,
                   t->kind == TINY_OLMOE || t->kind == TINY_OSS ? t->inner : t->dense, t->context, t->renorm ? "true" : "false", t->sparse_step, t->only ? t->only : "[]",
                   t->tied ? "true" : "false", t->kind == TINY_APART ? "}" : "");
    test_write(test_path(dir, "config.json"), b.data, b.len);
    exc_buf_free(&b);
}

/* writes the checkpoint; t->items stay for the oracle (tiny_free) */
static inline void tiny_write(tiny *t, const char *dir)
{
    if (!t->items) tiny_make(t);
    if (t->spoil)
        for (int i = 0; i < t->count; i++) t->spoil(t->user, &t->items[i]);
    tiny_config(t, dir);
    if (t->files <= 1) {
        tiny_file(t, test_path(dir, "model.safetensors"), 0, t->count);
        return;
    }
    exc_buf index = {0};
    exc_buf_puts(&index, "{\"metadata\":{\"total_size\":1},\"weight_map\":{");
    int written = 0;
    for (int f = 0; f < t->files; f++) {
        char name[64];
        int from = t->count * f / t->files, to = t->count * (f + 1) / t->files;
        snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", f + 1, t->files);
        tiny_file(t, test_path(dir, name), from, to);
        for (int i = from; i < to; i++)
            if (!t->items[i].drop) exc_buf_printf(&index, "%s\"%s\":\"%s\"", written++ ? "," : "", tiny_stored(t, &t->items[i]), name);
    }
    exc_buf_puts(&index, "}}");
    test_write(test_path(dir, "model.safetensors.index.json"), index.data, index.len);
    exc_buf_free(&index);
}

static inline void tiny_free(tiny *t)
{
    for (int i = 0; i < t->count; i++) free(t->items[i].value);
    free(t->items);
    t->items = NULL;
    t->count = 0;
}

/* ------------------------------------------------------------------------------------------- the model again, in f64 */

/* the norms that some families centre on zero */
static inline void tiny_centred(const tiny *t, const double *x, const double *w, int64_t n, double *y)
{
    double *shifted = malloc((size_t)n * 8);
    for (int64_t i = 0; i < n; i++) shifted[i] = w[i] + (tiny_next(t) ? 1 : 0);
    tiny_norm(x, shifted, n, y);
    free(shifted);
}

static inline void tiny_biased(double *y, const double *bias, int64_t rows, int64_t n)
{
    for (int64_t i = 0; i < rows * n; i++) y[i] += bias[i % n];
}

/* sigmoid router: keys = scores + bias, groups by the sum of their two largest keys; the weights have no bias. margin: how near
 * another choice was. chosen[K] by descending weight. */
static inline void tiny_choose(const tiny *t, const double *z, const double *bias, int32_t *chosen, double *weight, double *margin)
{
    int64_t E = t->experts, K = t->top_k, size = E / t->groups;
    double *key = malloc((size_t)E * 8), group[64], sum = 0, last = INFINITY;
    for (int64_t e = 0; e < E; e++) key[e] = 1 / (1 + exp(-z[e])) + bias[e];
    for (int64_t g = 0; g < t->groups; g++) {
        double best = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
            if (key[e] > best) second = best, best = key[e];
            else second = fmax(second, key[e]);
        }
        group[g] = best + second;
    }
    for (int64_t g = 0; g < t->groups && t->groups > 1; g++) {
        int before = 0;
        for (int64_t o = 0; o < t->groups; o++) before += group[o] > group[g];
        for (int64_t o = 0; o < t->groups; o++)
            if (o != g) *margin = fmin(*margin, fabs(group[o] - group[g]));
        for (int64_t e = g * size; e < (g + 1) * size && before >= t->kept; e++) key[e] = -INFINITY;
    }
    for (int64_t j = 0; j <= K && j < E; j++) {
        int64_t at = 0;
        for (int64_t e = 1; e < E; e++)
            if (key[e] > key[at]) at = e;
        if (j == K) {
            *margin = fmin(*margin, last - key[at]);
            break;
        }
        chosen[j] = (int32_t)at;
        last = key[at];
        key[at] = -INFINITY;
        sum += weight[j] = 1 / (1 + exp(-z[at]));
    }
    for (int64_t j = 1; j < K; j++)
        for (int64_t i = j; i > 0 && weight[i] > weight[i - 1]; i--) {
            double w = weight[i];
            int32_t e = chosen[i];
            weight[i] = weight[i - 1], chosen[i] = chosen[i - 1];
            weight[i - 1] = w, chosen[i - 1] = e;
        }
    for (int64_t j = 0; j < K; j++) weight[j] *= t->scale / (t->renorm ? sum + 1e-20 : 1);
    free(key);
}

static inline void tiny_rotate(double *x, int64_t dim, int64_t position)
{
    for (int64_t i = 0; i < dim / 2; i++) {
        double angle = (double)position * pow(10000.0, -2.0 * (double)i / (double)dim), c = cos(angle), s = sin(angle);
        double a = x[i], b = x[i + dim / 2];
        x[i] = a * c - b * s;
        x[i + dim / 2] = b * c + a * s;
    }
}

/* o [T, heads*V]: causal softmax attention of q [T, heads*D] on the last `window` (0: all) of k [T, kv*D], v [T, kv*V]; sinks
 * [heads] or NULL: scores without a value */
static inline void tiny_softmax(const double *q, const double *k, const double *v, int64_t T, int64_t heads, int64_t kv, int64_t D, int64_t V,
                                double scale, int64_t window, const double *sinks, double *o)
{
    double *p = malloc((size_t)T * 8);
    memset(o, 0, (size_t)(T * heads * V) * 8);
    for (int64_t r = 0; r < T; r++)
        for (int64_t i = 0; i < heads; i++) {
            const double *qi = q + (r * heads + i) * D;
            int64_t g = i / (heads / kv), first = window && r >= window ? r - window + 1 : 0;
            double best = sinks ? sinks[i] : -INFINITY, total = 0;
            for (int64_t j = first; j <= r; j++) {
                p[j] = 0;
                for (int64_t c = 0; c < D; c++) p[j] += qi[c] * k[(j * kv + g) * D + c];
                p[j] *= scale;
                best = fmax(best, p[j]);
            }
            for (int64_t j = first; j <= r; j++) total += p[j] = exp(p[j] - best);
            if (sinks) total += exp(sinks[i] - best);
            for (int64_t j = first; j <= r; j++)
                for (int64_t c = 0; c < V; c++) o[(r * heads + i) * V + c] += p[j] / total * v[(j * kv + g) * V + c];
        }
    free(p);
}

/* grouped-query attention of normed rows x [T,H] of layer l -> o [T, heads*D] */
static inline void tiny_grouped(const tiny *t, int l, const double *x, int64_t T, double *o)
{
    char n[128];
    int64_t H = t->hidden, D = t->dim, Q = t->heads * D, KV = t->kv * D, turned = t->kind == TINY_GLM ? D / 2 : tiny_next(t) ? D / 4 / 2 * 2 : D;
    double *q = malloc((size_t)(T * Q) * 8), *k = malloc((size_t)(T * KV) * 8), *v = malloc((size_t)(T * KV) * 8);
    bool whole = t->kind == TINY_OLMOE, oss = t->kind == TINY_OSS, each = !whole && !oss;
    double *both = malloc((size_t)(T * 2 * Q) * 8);
    tiny_matmul(x, TINY_W("model.layers.%d.self_attn.q_proj.weight", l), T, H, tiny_next(t) ? 2 * Q : Q, tiny_next(t) ? both : q);
    for (int64_t i = 0; i < T * t->heads && tiny_next(t); i++) memcpy(q + i * D, both + 2 * i * D, (size_t)D * 8);
    tiny_matmul(x, TINY_W("model.layers.%d.self_attn.k_proj.weight", l), T, H, KV, k);
    tiny_matmul(x, TINY_W("model.layers.%d.self_attn.v_proj.weight", l), T, H, KV, v);
    if (t->kind == TINY_GLM || oss) {
        tiny_biased(q, TINY_W("model.layers.%d.self_attn.q_proj.bias", l), T, Q);
        tiny_biased(k, TINY_W("model.layers.%d.self_attn.k_proj.bias", l), T, KV);
        tiny_biased(v, TINY_W("model.layers.%d.self_attn.v_proj.bias", l), T, KV);
    }
    for (int64_t r = 0; r < T; r++) {
        if (whole) tiny_centred(t, q + r * Q, TINY_W("model.layers.%d.self_attn.q_norm.weight", l), Q, q + r * Q);
        if (whole) tiny_centred(t, k + r * KV, TINY_W("model.layers.%d.self_attn.k_norm.weight", l), KV, k + r * KV);
        for (int64_t i = 0; i < t->heads; i++) {
            if (each) tiny_centred(t, q + r * Q + i * D, TINY_W("model.layers.%d.self_attn.q_norm.weight", l), D, q + r * Q + i * D);
            tiny_rotate(q + r * Q + i * D, turned, r);
        }
        for (int64_t i = 0; i < t->kv; i++) {
            if (each) tiny_centred(t, k + r * KV + i * D, TINY_W("model.layers.%d.self_attn.k_norm.weight", l), D, k + r * KV + i * D);
            tiny_rotate(k + r * KV + i * D, turned, r);
        }
    }
    const double *sinks = oss ? TINY_W("model.layers.%d.self_attn.sinks", l) : NULL;
    tiny_softmax(q, k, v, T, t->heads, t->kv, D, D, 1 / sqrt((double)D), oss && l % 2 ? 0 : t->window, sinks, o);
    for (int64_t i = 0; i < T * Q && tiny_next(t); i++) o[i] /= 1 + exp(-both[i / D * 2 * D + D + i % D]);
    free(both);
    free(q);
    free(k);
    free(v);
}

/* the rotating channels of latent attention. yarn: below `low` a pair keeps its frequency, above `high` it has a quarter. */
static inline void tiny_turn(const tiny *t, double *x, int64_t position)
{
    int64_t d = t->turned, step = t->halves ? d / 2 : 1;
    double low = floor((double)d * log(64 / (8 * 2 * M_PI)) / (2 * log(10000.0))), high = ceil((double)d * log(64 / (2 * M_PI)) / (2 * log(10000.0))),
           factor = t->yarn ? (0.05 * log(4) + 1) / (0.1 * log(4) + 1) : 1;
    if (high > (double)d - 1) high = (double)d - 1;
    if (low < 0) low = 0;
    for (int64_t i = 0; i < d / 2; i++) {
        double f = pow(10000.0, -2.0 * (double)i / (double)d), ramp = fmin(1, fmax(0, ((double)i - low) / (high - low)));
        if (t->yarn) f = f * (1 - ramp) + f / 4 * ramp;
        double *u = x + (t->halves ? i : 2 * i), c = factor * cos((double)position * f), s = factor * sin((double)position * f), a = u[0], b = u[step];
        u[0] = a * c - b * s;
        u[step] = b * c + a * s;
    }
}

/* latent attention of normed rows x [T,H] of layer l, keys and values of all heads written out -> o [T, heads*V] */
static inline void tiny_latent(const tiny *t, int l, const double *x, int64_t T, double *o)
{
    char n[128];
    int64_t H = t->hidden, N = t->plain, R = t->turned, D = N + R, V = t->value, C = t->rank, heads = t->heads;
    double *q = malloc((size_t)(T * heads * D) * 8), *k = malloc((size_t)(T * heads * D) * 8), *v = malloc((size_t)(T * heads * V) * 8),
           *kv = malloc((size_t)(T * (C + R)) * 8), *both = malloc((size_t)(heads * (N + V)) * 8), *a = malloc((size_t)(t->q_rank + 1) * 8),
           scale = 1 / sqrt((double)D);
    tiny_matmul(x, TINY_W("model.layers.%d.self_attn.kv_a_proj_with_mqa.weight", l), T, H, C + R, kv);
    for (int64_t r = 0; r < T; r++) {
        double *row = kv + r * (C + R);
        if (t->q_rank) {
            tiny_matmul(x + r * H, TINY_W("model.layers.%d.self_attn.q_a_proj.weight", l), 1, H, t->q_rank, a);
            tiny_norm(a, TINY_W("model.layers.%d.self_attn.q_a_layernorm.weight", l), t->q_rank, a);
            tiny_matmul(a, TINY_W("model.layers.%d.self_attn.q_b_proj.weight", l), 1, t->q_rank, heads * D, q + r * heads * D);
        } else {
            tiny_matmul(x + r * H, TINY_W("model.layers.%d.self_attn.q_proj.weight", l), 1, H, heads * D, q + r * heads * D);
        }
        tiny_norm(row, TINY_W("model.layers.%d.self_attn.kv_a_layernorm.weight", l), C, row);
        tiny_turn(t, row + C, r);
        tiny_matmul(row, TINY_W("model.layers.%d.self_attn.kv_b_proj.weight", l), 1, C, heads * (N + V), both);
        for (int64_t i = 0; i < heads; i++) {
            tiny_turn(t, q + (r * heads + i) * D + N, r);
            memcpy(k + (r * heads + i) * D, both + i * (N + V), (size_t)N * 8);
            memcpy(k + (r * heads + i) * D + N, row + C, (size_t)R * 8);
            memcpy(v + (r * heads + i) * V, both + i * (N + V) + N, (size_t)V * 8);
        }
    }
    if (t->yarn) scale *= pow(0.1 * log(4) + 1, 2);
    tiny_softmax(q, k, v, T, heads, heads, D, V, scale, 0, NULL, o);
    free(q);
    free(k);
    free(v);
    free(kv);
    free(both);
    free(a);
}

/* add [H] += weight * expert e of gpt_oss on x [H] */
static inline void tiny_oss_expert(const tiny *t, int l, int64_t e, const double *x, double weight, double *add)
{
    char n[128];
    int64_t H = t->hidden, I = t->inner;
    const double *gu = TINY_W("model.layers.%d.mlp.experts.gate_up_proj", l) + e * H * 2 * I,
                 *gub = TINY_W("model.layers.%d.mlp.experts.gate_up_proj_bias", l) + e * 2 * I,
                 *d = TINY_W("model.layers.%d.mlp.experts.down_proj", l) + e * I * H,
                 *db = TINY_W("model.layers.%d.mlp.experts.down_proj_bias", l) + e * H;
    for (int64_t h = 0; h < H; h++) add[h] += weight * db[h];
    for (int64_t i = 0; i < I; i++) {
        double g = gub[2 * i], u = gub[2 * i + 1];
        for (int64_t h = 0; h < H; h++) g += x[h] * gu[h * 2 * I + 2 * i], u += x[h] * gu[h * 2 * I + 2 * i + 1];
        g = fmin(g, 7);
        u = fmax(fmin(u, 7), -7);
        double a = (u + 1) * g / (1 + exp(-1.702 * g));
        for (int64_t h = 0; h < H; h++) add[h] += weight * a * d[i * H + h];
    }
}

/* hidden [L+1,T,H], logits [T,V], ids [L,T,K] (-1 in dense layers), margin: the smallest gap at a K boundary */
static inline void tiny_forward(const tiny *t, const int32_t *tokens, int64_t T, double *hidden, double *logits, int32_t *ids,
                                double *margin)
{
    int64_t H = t->hidden, E = t->experts, K = t->top_k;
    double *x = malloc((size_t)(T * H) * 8), *o, *y = malloc((size_t)(T * H) * 8);
    char n[128];
    const double *embed = tiny_find(t, "model.embed_tokens.weight");
    *margin = INFINITY;
    for (int64_t r = 0; r < T; r++) memcpy(hidden + r * H, embed + tokens[r] * H, (size_t)H * 8);
    for (int l = 0; l < t->layers; l++) {
        double *h = hidden + (l + 1) * T * H;
        memcpy(h, hidden + l * T * H, (size_t)(T * H) * 8);
        for (int64_t r = 0; r < T; r++) tiny_centred(t, h + r * H, TINY_W("model.layers.%d.input_layernorm.weight", l), H, x + r * H);
        int64_t Q = tiny_out(t, l);
        o = malloc((size_t)(T * Q) * 8);
        if (t->kind == TINY_LATENT) tiny_latent(t, l, x, T, o);
        else if (tiny_linear(t, l)) tiny_delta(t, l, x, T, o);
        else tiny_grouped(t, l, x, T, o);
        const char *writer = tiny_linear(t, l) ? "model.layers.%d.linear_attn.out_proj.weight" : "model.layers.%d.self_attn.o_proj.weight";
        tiny_matmul(o, TINY_W(writer, l), T, Q, H, y);
        free(o);
        if (t->kind == TINY_OSS) tiny_biased(y, TINY_W("model.layers.%d.self_attn.o_proj.bias", l), T, H);
        for (int64_t i = 0; i < T * H; i++) h[i] += y[i];
        for (int64_t r = 0; r < T; r++) {
            tiny_centred(t, h + r * H, TINY_W("model.layers.%d.post_attention_layernorm.weight", l), H, x + r * H);
            int32_t *chosen = ids + ((int64_t)l * T + r) * K;
            if (!tiny_is_moe(t, l)) {
                for (int64_t j = 0; j < K; j++) chosen[j] = -1;
                tiny_mlp(x + r * H, TINY_W("model.layers.%d.mlp.gate_proj.weight", l), TINY_W("model.layers.%d.mlp.up_proj.weight", l),
                         TINY_W("model.layers.%d.mlp.down_proj.weight", l), H, t->dense, 1, h + r * H);
                continue;
            }
            double *z = malloc((size_t)E * 8), top = -INFINITY, all = 0, sum = 0;
            bool oss = t->kind == TINY_OSS;
            tiny_matmul(x + r * H, oss ? TINY_W("model.layers.%d.mlp.router.weight", l) : TINY_W("model.layers.%d.mlp.gate.weight", l), 1, H, E, z);
            if (oss) tiny_biased(z, TINY_W("model.layers.%d.mlp.router.bias", l), 1, E);
            for (int64_t e = 0; e < E; e++) top = fmax(top, z[e]);
            for (int64_t e = 0; e < E; e++) all += exp(z[e] - top);
            double weight[64], last = 0;
            if (tiny_next(t)) tiny_shared(t, l, x + r * H, h + r * H);
            if (tiny_sigmoid(t)) {
                tiny_choose(t, z, TINY_W("model.layers.%d.mlp.gate.e_score_correction_bias", l), chosen, weight, margin);
                tiny_mlp(x + r * H, TINY_W("model.layers.%d.mlp.shared_experts.gate_proj.weight", l),
                         TINY_W("model.layers.%d.mlp.shared_experts.up_proj.weight", l),
                         TINY_W("model.layers.%d.mlp.shared_experts.down_proj.weight", l), H, 2 * t->inner, 1, h + r * H);
            }
            for (int64_t j = 0; !tiny_sigmoid(t) && j <= K && j < E; j++) {
                int64_t at = -1;
                for (int64_t e = 0; e < E; e++) {
                    int used = 0;
                    for (int64_t i = 0; i < j; i++) used |= chosen[i] == e;
                    if (!used && (at < 0 || z[e] > z[at])) at = e;
                }
                if (j == K) {
                    *margin = fmin(*margin, last - z[at]);
                    break;
                }
                chosen[j] = (int32_t)at;
                last = z[at];
                sum += weight[j] = exp(z[at] - top) / all;
            }
            for (int64_t j = 0; j < K; j++) {
                int e = chosen[j];
                if (oss) {
                    tiny_oss_expert(t, l, e, x + r * H, weight[j] / sum, h + r * H);
                    continue;
                }
                tiny_mlp(x + r * H, TINY_W("model.layers.%d.mlp.experts.%d.gate_proj.weight", l, e),
                         TINY_W("model.layers.%d.mlp.experts.%d.up_proj.weight", l, e),
                         TINY_W("model.layers.%d.mlp.experts.%d.down_proj.weight", l, e), H, t->inner, weight[j] / (t->renorm && !tiny_sigmoid(t) ? sum : 1),
                         h + r * H);
            }
            free(z);
        }
    }
    for (int64_t r = 0; r < T; r++)
        tiny_centred(t, hidden + (t->layers * T + r) * H, tiny_find(t, "model.norm.weight"), H, x + r * H);
    tiny_matmul(x, tiny_find(t, t->tied ? "model.embed_tokens.weight" : "lm_head.weight"), T, H, t->vocab, logits);
    free(x);
    free(y);
}

#endif
