/* shape.c - config.json and generation_config.json into exc_shape: every number the forward pass depends on,
 * read by its exact key, bounded before it sizes anything, and checked against the others. A switch this
 * family's arithmetic does not have (attention biases, a foreign quantisation) is refused by name
 * instead of being ignored: a model that runs with one option missing gives plausible wrong answers, which is
 * the worst outcome. */
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "model.h"

#define MAX_LAYERS 4096
#define MAX_WIDTH (1 << 20)

typedef struct reader {
    exc_ctx *ctx;
    const json_t *o;
    const char *what;   /* path of the file, for messages */
    const json_t *root; /* what o is nested in, or o itself */
} reader;

static exc_status wrong(const reader *r, const char *key, const char *expected, const json_t *found) {
    char *text = found ? json_dumps(found, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    exc_status st = exc_fail(r->ctx, EXC_ERR_INPUT, "%s: %s: expected %s, found %s", r->what, key, expected,
                             text ? exc_show(text, strlen(text)) : "nothing");
    free(text);
    return st;
}

static exc_status integer(const reader *r, const char *key, int64_t lo, int64_t hi, int64_t *out) {
    return exc_json_int(r->ctx, r->o, r->what, key, lo, hi, out);
}

/* keys whose only supported value is "off" */
static exc_status refuse_switch(const reader *r, const char *key) {
    const json_t *v = json_object_get(r->o, key);
    if (!v || json_is_null(v) || json_is_false(v)) return EXC_OK;
    return wrong(r, key, "false (this mechanism is not part of the supported family)", v);
}

/* keys that have one supported value */
static exc_status check_fixed(const reader *r, const exc_fixed *fixed) {
    for (; fixed && fixed->key; fixed++) {
        const json_t *v = json_object_get(r->o, fixed->key);
        if (!v || json_is_null(v)) continue;
        char *text = exc_json_text(r->ctx, v);
        if (!text) return EXC_ERR_MEMORY;
        bool same = !strcmp(text, fixed->value);
        free(text);
        if (!same) return wrong(r, fixed->key, fixed->value, v);
    }
    return EXC_OK;
}

/* the family's own rule: layers that are listed or skipped, or the first ones */
static exc_status read_dense(const reader *r, const exc_family *f, exc_shape *s) {
    int64_t step = 1, first = 0;
    if (f->dense == EXC_DENSE_LISTED)
        EXC_TRY(exc_json_int_or(r->ctx, r->o, r->what, "decoder_sparse_step", 1, MAX_LAYERS, 1, &step));
    if (f->dense == EXC_DENSE_FIRST)
        EXC_TRY(exc_json_int_or(r->ctx, r->o, r->what, "first_k_dense_replace", 0, MAX_LAYERS, f->dense_first, &first));
    for (int64_t l = 0; l < s->layers; l++) s->is_moe[l] = l >= first && (l + 1) % step == 0;
    const json_t *only = f->dense == EXC_DENSE_LISTED ? json_object_get(r->o, "mlp_only_layers") : NULL;
    if (!only || json_is_null(only)) return EXC_OK;
    if (!json_is_array(only)) return wrong(r, "mlp_only_layers", "a list of layer numbers", only);
    size_t i;
    json_t *v;
    json_array_foreach(only, i, v) {
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= s->layers)
            return wrong(r, "mlp_only_layers", "layer numbers below num_hidden_layers", v);
        s->is_moe[json_integer_value(v)] = 0;
    }
    return EXC_OK;
}

/* mlp_layer_types ["dense","sparse",..], as newer configs say it */
static exc_status read_layer_types(const reader *r, const json_t *types, exc_shape *s) {
    if (!json_is_array(types) || json_array_size(types) != (size_t)s->layers)
        return wrong(r, "mlp_layer_types", "\"dense\" or \"sparse\" for each of num_hidden_layers", types);
    for (int64_t l = 0; l < s->layers; l++) {
        const char *type = json_string_value(json_array_get(types, (size_t)l));
        s->is_moe[l] = type && !strcmp(type, "sparse");
        if (!type || (!s->is_moe[l] && strcmp(type, "dense") != 0))
            return wrong(r, "mlp_layer_types", "\"dense\" or \"sparse\"", json_array_get(types, (size_t)l));
    }
    return EXC_OK;
}

const char *exc_shape_dense_keys(const exc_family *f) {
    return f->dense == EXC_DENSE_FIRST    ? "first_k_dense_replace"
           : f->dense == EXC_DENSE_LISTED ? "mlp_only_layers, decoder_sparse_step"
                                          : "num_hidden_layers";
}

static exc_status read_layers(const reader *r, const exc_family *f, exc_shape *s) {
    exc_ctx *ctx = r->ctx;
    s->is_moe = exc_zalloc(ctx, (size_t)s->layers, 1, "layer kinds");
    s->moe_row = exc_alloc(ctx, (size_t)s->layers, sizeof *s->moe_row, "layer rows");
    if (!s->is_moe || !s->moe_row) return EXC_ERR_MEMORY;
    const json_t *types = f->dense == EXC_DENSE_NEVER ? NULL : json_object_get(r->o, "mlp_layer_types");
    EXC_TRY(types && !json_is_null(types) ? read_layer_types(r, types, s) : read_dense(r, f, s));
    s->moe_layers = 0;
    for (int64_t l = 0; l < s->layers; l++) s->moe_row[l] = s->is_moe[l] ? s->moe_layers++ : -1;
    if (!s->moe_layers)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected at least one layer of experts, found none",
                        r->what, exc_shape_dense_keys(f));
    if (s->moe_layers < s->layers && !s->dense_inner)
        return wrong(r, "intermediate_size", "the width of the dense layers",
                     json_object_get(r->o, "intermediate_size"));
    return EXC_OK;
}

/* heads of the layers that have no softmax */
static exc_status read_linear(const reader *r, exc_shape *s) {
    exc_ctx *ctx = r->ctx;
    exc_linear *l = &s->linear;
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "linear_num_key_heads", 1, 1024, 16, &l->k_heads));
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "linear_num_value_heads", 1, 1024, 32, &l->v_heads));
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "linear_key_head_dim", 1, 1024, 128, &l->k_dim));
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "linear_value_head_dim", 1, 1024, 128, &l->v_dim));
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "linear_conv_kernel_dim", 1, 64, 4, &l->taps));
    if (l->v_heads % l->k_heads == 0) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT,
                    "%s: linear_num_value_heads: expected a multiple of linear_num_key_heads (%lld), found %lld",
                    r->what, (long long)l->k_heads, (long long)l->v_heads);
}

/* softmax or linear, as layer_types says, else by full_attention_interval */
static exc_status read_kinds(const reader *r, exc_shape *s) {
    static const char key[] = "layer_types", wanted[] = "\"full_attention\" or \"linear_attention\"";
    const json_t *types = json_object_get(r->o, key);
    int64_t interval;
    EXC_TRY(read_linear(r, s));
    EXC_TRY(exc_json_int_or(r->ctx, r->o, r->what, "full_attention_interval", 1, MAX_LAYERS, 4, &interval));
    bool given = types && !json_is_null(types);
    if (given && (!json_is_array(types) || json_array_size(types) != (size_t)s->layers))
        return wrong(r, key, "a kind for each of num_hidden_layers", types);
    for (int64_t l = 0; l < s->layers; l++) {
        const json_t *v = given ? json_array_get(types, (size_t)l) : NULL;
        const char *type = json_is_string(v) ? json_string_value(v) : "";
        bool full = given ? !strcmp(type, "full_attention") : (l + 1) % interval == 0;
        if (given && !full && strcmp(type, "linear_attention") != 0) return wrong(r, key, wanted, v);
        s->mix[l] = full ? EXC_MIX_SOFTMAX : EXC_MIX_LINEAR;
    }
    return EXC_OK;
}

/* which mixer each layer has, and its row among those of its kind */
static exc_status read_mixers(const reader *r, const exc_family *f, exc_shape *s) {
    s->mix = exc_alloc(r->ctx, (size_t)s->layers, 1, "layer kinds");
    s->mix_row = exc_alloc(r->ctx, (size_t)s->layers, sizeof *s->mix_row, "layer rows");
    if (!s->mix || !s->mix_row) return EXC_ERR_MEMORY;
    memset(s->mix, f->mix, (size_t)s->layers);
    if (f->mix == EXC_MIX_LINEAR) EXC_TRY(read_kinds(r, s));
    for (int64_t l = 0; l < s->layers; l++) s->mix_row[l] = s->mix_layers[s->mix[l]]++;
    return EXC_OK;
}

static exc_status read_eos(const reader *r, exc_shape *s) {
    const json_t *v = json_object_get(r->o, "eos_token_id");
    if (!v || json_is_null(v)) v = json_object_get(r->root, "eos_token_id");
    if (!v || json_is_null(v)) return EXC_OK;
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    if (n > EXC_COUNT(s->eos)) return wrong(r, "eos_token_id", "at most 8 ids", v);
    s->n_eos = 0;
    for (size_t i = 0; i < n; i++) {
        const json_t *e = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_integer(e)) return wrong(r, "eos_token_id", "an id or a list of ids", v);
        json_int_t id = json_integer_value(e);
        if (id >= 0 && id < s->vocab)
            s->eos[s->n_eos++] = (int32_t)id; /* an id outside can never be produced */
    }
    return EXC_OK;
}

/* generation_config.json wins over config.json; it may be absent */
static exc_status read_generation(exc_ctx *ctx, const char *dir, exc_shape *s) {
    char *path;
    EXC_TRY(exc_path_join(ctx, dir, "generation_config.json", &path));
    exc_status st = EXC_OK;
    if (!access(path, F_OK)) {
        json_t *root = NULL;
        st = exc_json_load(ctx, path, 0, &root);
        if (!st) {
            reader r = {ctx, root, path, root};
            st = json_is_object(root)
                     ? read_eos(&r, s)
                     : exc_fail(ctx, EXC_ERR_INPUT, "%s: top level: expected an object", path);
            json_decref(root);
        }
    }
    exc_release(path);
    return st;
}

/* the family's key for the number of experts, or the name that another version of loaders gives it */
static const char *experts_key(const reader *r, const exc_family *f) {
    static const char *const names[] = {"num_experts", "num_local_experts", "n_routed_experts"};
    if (json_object_get(r->o, f->experts_key)) return f->experts_key;
    for (size_t i = 0; i < EXC_COUNT(names); i++)
        if (json_object_get(r->o, names[i])) return names[i];
    return f->experts_key;
}

static exc_status read_head(const reader *r, const exc_family *f, exc_shape *s) {
    int64_t usual = f->head_dim ? f->head_dim : s->hidden / s->heads;
    EXC_TRY(exc_json_int_or(r->ctx, r->o, r->what, "head_dim", 1, 1024, usual, &s->head_dim));
    s->value_dim = s->head_dim;
    if (s->head_dim >= 2 && s->head_dim % 2 == 0) return EXC_OK;
    return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: head_dim: expected an even number, found %lld", r->what,
                    (long long)s->head_dim);
}

/* heads of latent attention: every one has keys of its own, so a number of key heads says nothing new */
static exc_status read_latent(const reader *r, exc_shape *s) {
    exc_latent *l = &s->latent;
    if (s->kv_heads != s->heads)
        return exc_fail(r->ctx, EXC_ERR_INPUT,
                        "%s: num_key_value_heads: expected num_attention_heads (%lld), found %lld", r->what,
                        (long long)s->heads, (long long)s->kv_heads);
    EXC_TRY(integer(r, "kv_lora_rank", 1, 4096, &l->rank));
    EXC_TRY(integer(r, "qk_nope_head_dim", 1, 1024, &l->plain));
    EXC_TRY(integer(r, "qk_rope_head_dim", 2, 1024, &l->rotary));
    if (l->rotary % 2)
        return wrong(r, "qk_rope_head_dim", "an even number", json_object_get(r->o, "qk_rope_head_dim"));
    EXC_TRY(integer(r, "v_head_dim", 1, 1024, &s->value_dim));
    if (!json_object_get(r->o, "q_lora_rank")) return wrong(r, "q_lora_rank", "a number, or null", NULL);
    EXC_TRY(exc_json_int_or(r->ctx, r->o, r->what, "q_lora_rank", 1, MAX_WIDTH, 0, &l->q_rank));
    EXC_TRY(exc_json_bool_or(r->ctx, r->o, r->what, "rope_interleave", true, &l->adjacent));
    s->head_dim = l->plain + l->rotary;
    return EXC_OK;
}

static exc_status read_sizes(const reader *r, const exc_checkpoint *files, const exc_family *f,
                             exc_shape *s) {
    exc_ctx *ctx = r->ctx;
    EXC_TRY(integer(r, "num_hidden_layers", 1, MAX_LAYERS, &s->layers));
    EXC_TRY(integer(r, "hidden_size", 1, MAX_WIDTH, &s->hidden));
    EXC_TRY(integer(r, "num_attention_heads", 1, 4096, &s->heads));
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "num_key_value_heads", 1, 4096, s->heads, &s->kv_heads));
    EXC_TRY(f->mix == EXC_MIX_LATENT ? read_latent(r, s) : read_head(r, f, s));
    EXC_TRY(integer(r, "vocab_size", 1, INT32_MAX, &s->vocab));
    EXC_TRY(integer(r, "max_position_embeddings", 1, (int64_t)1 << 24, &s->context));
    EXC_TRY(integer(r, experts_key(r, f), 1, 1024, &s->experts));
    EXC_TRY(integer(r, f->top_k_key, 1, 64, &s->top_k));
    EXC_TRY(integer(r, f->inner_key, 1, MAX_WIDTH, &s->inner));
    if (f->dense != EXC_DENSE_NEVER)
        EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "intermediate_size", 1, MAX_WIDTH, 0, &s->dense_inner));
    if (f->mtp_key)
        EXC_TRY(exc_json_int_or(ctx, r->o, r->what, f->mtp_key, 0, MAX_LAYERS, 0, &s->mtp_layers));
    if (s->top_k > s->experts)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected at most %s (%lld), found %lld", r->what,
                        f->top_k_key, f->experts_key, (long long)s->experts, (long long)s->top_k);
    if (s->heads % s->kv_heads)
        return exc_fail(
            ctx, EXC_ERR_INPUT,
            "%s: num_key_value_heads: expected a divisor of num_attention_heads (%lld), found %lld", r->what,
            (long long)s->heads, (long long)s->kv_heads);
    double eps;
    EXC_TRY(exc_json_number_or(ctx, r->o, r->what, "rms_norm_eps", f->norm_eps, &eps));
    if (!(eps > 0) || eps > 1)
        return wrong(r, "rms_norm_eps", "a number in (0, 1]", json_object_get(r->o, "rms_norm_eps"));
    s->eps = (float)eps;
    bool tied;
    const json_t *with = json_object_get(r->root, "tie_word_embeddings") ? r->root : r->o;
    EXC_TRY(exc_json_bool_or(ctx, with, r->what, "tie_word_embeddings", false, &tied));
    /* the key may be left out of a tied checkpoint; said to be false, the tensor must be there */
    if (!json_object_get(with, "tie_word_embeddings") && !exc_checkpoint_find(files, "lm_head.weight"))
        tied = true;
    s->tied = tied;
    return EXC_OK;
}

/* width of the window, 0: none */
static exc_status read_window(const reader *r, const exc_family *f, int64_t *width) {
    static const char key[] = "sliding_window";
    const json_t *v = json_object_get(r->o, key);
    bool on = true;
    *width = 0;
    if (f->window_switch) EXC_TRY(exc_json_bool_or(r->ctx, r->o, r->what, f->window_switch, false, &on));
    if (!on || json_is_null(v)) return EXC_OK;
    return v ? integer(r, key, 1, INT32_MAX, width) : (*width = f->window, EXC_OK);
}

/* which layers have it, by layer_types or as loaders fill that in */
static exc_status read_window_layers(const reader *r, const exc_family *f, int64_t width, exc_shape *s) {
    static const char key[] = "layer_types";
    const json_t *types = json_object_get(r->o, key);
    int64_t first = s->layers;
    if (!types || json_is_null(types)) {
        if (f->window_layers)
            EXC_TRY(exc_json_int_or(r->ctx, r->o, r->what, f->window_layers, 0, INT32_MAX, f->window_first, &first));
        for (int64_t l = 0; l < s->layers; l++) {
            bool slides = f->windows == EXC_WINDOWS_TYPED ? l % 2 == 0 && l < first : l >= first;
            s->window[l] = slides ? width : 0;
        }
        return EXC_OK;
    }
    if (!json_is_array(types) || json_array_size(types) != (size_t)s->layers)
        return wrong(r, key, "\"full_attention\" or \"sliding_attention\" for each of num_hidden_layers", types);
    for (int64_t l = 0; l < s->layers; l++) {
        const json_t *v = json_array_get(types, (size_t)l);
        const char *type = json_is_string(v) ? json_string_value(v) : "";
        bool slides = !strcmp(type, "sliding_attention");
        if (!slides && strcmp(type, "full_attention"))
            return wrong(r, key, "\"full_attention\" or \"sliding_attention\"", v);
        if (slides && !width)
            return wrong(r, "sliding_window", "a width (layer_types has sliding layers)",
                         json_object_get(r->o, "sliding_window"));
        s->window[l] = slides ? width : 0;
    }
    return EXC_OK;
}

static exc_status read_windows(const reader *r, const exc_family *f, exc_shape *s) {
    int64_t width;
    s->window = exc_zalloc(r->ctx, (size_t)s->layers, sizeof *s->window, "windows of layers");
    if (!s->window) return EXC_ERR_MEMORY;
    if (f->windows == EXC_WINDOWS_NEVER) return EXC_OK;
    EXC_TRY(read_window(r, f, &width));
    if (f->windows != EXC_WINDOWS_ALWAYS) return read_window_layers(r, f, width, s);
    for (int64_t l = 0; l < s->layers; l++) s->window[l] = width;
    return EXC_OK;
}

/* what makes an activation of gate and up */
static exc_status read_activation(const reader *r, const exc_family *f, exc_shape *s) {
    const char *act;
    double alpha, limit;
    EXC_TRY(exc_json_string_or(r->ctx, r->o, r->what, "hidden_act", "silu", &act));
    if (strcmp(act, "silu")) return wrong(r, "hidden_act", "\"silu\"", json_object_get(r->o, "hidden_act"));
    s->activation = (exc_activation){.kind = EXC_GLU_SILU};
    if (!f->clamped) return EXC_OK;
    EXC_TRY(exc_json_number_or(r->ctx, r->o, r->what, "swiglu_alpha", 1.702, &alpha));
    EXC_TRY(exc_json_number_or(r->ctx, r->o, r->what, "swiglu_limit", 7.0, &limit));
    if (!(alpha > 0) || alpha > 1e3)
        return wrong(r, "swiglu_alpha", "a number in (0, 1000]", json_object_get(r->o, "swiglu_alpha"));
    if (!(limit > 0) || limit > 1e6)
        return wrong(r, "swiglu_limit", "a number in (0, 1e6]", json_object_get(r->o, "swiglu_limit"));
    s->activation = (exc_activation){EXC_GLU_CLAMPED, (float)alpha, (float)limit};
    return EXC_OK;
}

static exc_status read_switches(const reader *r, const exc_family *f, exc_shape *s) {
    bool on = true;
    if (f->qk_norm_key) EXC_TRY(exc_json_bool_or(r->ctx, r->o, r->what, f->qk_norm_key, false, &on));
    s->qk_norm = on ? f->qk_norm : EXC_QK_NONE;
    if (f->bias_key) EXC_TRY(exc_json_bool_or(r->ctx, r->o, r->what, f->bias_key, f->bias, &s->qkv_bias));
    s->out_bias = s->qkv_bias && f->out_bias;
    return EXC_OK;
}

static exc_status read_shared(const reader *r, const exc_family *f, exc_shape *s) {
    if (!f->shared_key) return EXC_OK;
    EXC_TRY(exc_json_int_or(r->ctx, r->o, r->what, f->shared_key, 0, f->shared_counts ? 64 : MAX_WIDTH,
                            f->shared, &s->shared_inner));
    if (f->shared_counts) s->shared_inner *= s->inner;
    return EXC_OK;
}

static exc_status read_groups(const reader *r, const exc_family *f, exc_shape *s) {
    exc_ctx *ctx = r->ctx;
    int64_t groups, kept;
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "n_group", 1, s->experts, f->groups, &groups));
    EXC_TRY(exc_json_int_or(ctx, r->o, r->what, "topk_group", 1, groups, f->groups_kept, &kept));
    if (s->experts % groups)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: n_group: expected a divisor of the number of experts (%lld), found %lld",
                        r->what, (long long)s->experts, (long long)groups);
    if (s->experts / groups * kept < s->top_k)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: topk_group: expected groups with at least num_experts_per_tok (%lld) experts, "
                        "found %lld of %lld "
                        "groups with %lld",
                        r->what, (long long)s->top_k, (long long)kept, (long long)groups,
                        (long long)(s->experts / groups * kept));
    s->gate.groups = groups > 1 ? (int)groups : 0;
    s->gate.groups_kept = groups > 1 ? (int)kept : 0;
    return EXC_OK;
}

static exc_status read_gate(const reader *r, const exc_family *f, exc_shape *s) {
    bool renorm = f->gate_renorm;
    double scale = 1;
    const char *scoring, *own = f->gate_score == 1 ? "sigmoid" : "softmax";
    s->gate = (exc_gate){.size = sizeof s->gate, .score = f->gate_score};
    if (f->renorm_key) EXC_TRY(exc_json_bool_or(r->ctx, r->o, r->what, f->renorm_key, renorm, &renorm));
    s->gate.renorm = renorm;
    s->gate.renorm_eps = renorm ? f->renorm_eps : 0;
    EXC_TRY(exc_json_string_or(r->ctx, r->o, r->what, "scoring_func", own, &scoring));
    if (strcmp(scoring, own) != 0)
        return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: scoring_func: expected \"%s\", found \"%s\"", r->what,
                        own, exc_show(scoring, strlen(scoring)));
    if (f->scale_key) EXC_TRY(exc_json_number_or(r->ctx, r->o, r->what, f->scale_key, f->scale, &scale));
    if (!(scale > 0) || scale > 1e6)
        return wrong(r, f->scale_key, "a number in (0, 1e6]", json_object_get(r->o, f->scale_key));
    s->gate.scale = (float)scale;
    return f->grouped ? read_groups(r, f, s) : EXC_OK;
}

static exc_status read_all(const reader *r, const exc_checkpoint *files, const exc_family *f, exc_shape *s) {
    exc_ctx *ctx = r->ctx;
    EXC_TRY(exc_quant_read(ctx, r->root, r->what, s));
    EXC_TRY(read_sizes(r, files, f, s));
    EXC_TRY(read_activation(r, f, s));
    for (const char *const *key = f->refused; *key; key++) EXC_TRY(refuse_switch(r, *key));
    EXC_TRY(check_fixed(r, f->fixed));
    EXC_TRY(exc_rope_read(ctx, r->o, r->what, f, s));
    EXC_TRY(read_switches(r, f, s));
    EXC_TRY(read_layers(r, f, s));
    EXC_TRY(read_mixers(r, f, s));
    EXC_TRY(read_windows(r, f, s));
    EXC_TRY(read_shared(r, f, s));
    EXC_TRY(read_gate(r, f, s));
    EXC_TRY(read_eos(r, s));
    return read_generation(ctx, files->dir, s);
}

exc_status exc_shape_read(exc_ctx *ctx, const exc_checkpoint *files, const exc_family *family,
                          exc_shape *out) {
    memset(out, 0, sizeof *out);
    char *path;
    EXC_TRY(exc_path_join(ctx, files->dir, "config.json", &path));
    reader r = {ctx, files->config, path, files->config};
    const json_t *inner = family->nested ? json_object_get(files->config, family->nested) : NULL;
    if (json_is_object(inner)) r.o = inner;
    exc_status st = inner && !json_is_object(inner) ? wrong(&r, family->nested, "an object", inner)
                                                    : read_all(&r, files, family, out);
    exc_release(path);
    if (st) exc_shape_free(out);
    return st;
}

void exc_shape_free(exc_shape *s) {
    exc_release(s->is_moe);
    exc_release(s->moe_row);
    exc_release(s->mix);
    exc_release(s->mix_row);
    exc_release(s->window);
    s->window = NULL;
    s->is_moe = s->mix = NULL;
    s->moe_row = s->mix_row = NULL;
}

/* norms of queries and keys: one head wide, or all heads */
static int64_t qk_norm_width(const exc_shape *s, exc_role role) {
    if (s->qk_norm == EXC_QK_HEAD) return s->head_dim;
    return s->head_dim * (role == EXC_ROLE_ATTN_Q_NORM ? s->heads : s->kv_heads);
}

bool exc_shape_role(const exc_shape *s, const exc_family *family, exc_role role, int64_t layer, int64_t *out,
                    int64_t *in) {
    bool inside = layer >= 0 && layer < s->layers, moe = inside && s->is_moe[layer], shared = moe && s->shared_inner,
         here = true, linear = inside && s->mix[layer] == EXC_MIX_LINEAR;
    const exc_linear *l = &s->linear;
    int64_t H = s->hidden, o = 0, i = 1, keys = l->k_heads * l->k_dim, values = l->v_heads * l->v_dim;
#define IS(condition, rows, cols) (here = (condition), o = (rows), i = (cols))
    switch (role) {
    case EXC_ROLE_EXPERT_DOWN:
        IS(moe, H, s->inner);
        break;
    case EXC_ROLE_EXPERT_GATE:
    case EXC_ROLE_EXPERT_UP:
        IS(moe, s->inner, H);
        break;
    case EXC_ROLE_SHARED_DOWN:
        IS(shared, H, s->shared_inner);
        break;
    case EXC_ROLE_SHARED_GATE:
    case EXC_ROLE_SHARED_UP:
        IS(shared, s->shared_inner, H);
        break;
    case EXC_ROLE_SHARED_ROUTER:
        IS(shared && family->shared_gated, 1, H);
        break;
    case EXC_ROLE_ROUTER:
        IS(moe, s->experts, H);
        break;
    case EXC_ROLE_EXPERT_DOWN_BIAS:
        IS(moe && family->expert_bias, H, 1);
        break;
    case EXC_ROLE_EXPERT_GATE_BIAS:
    case EXC_ROLE_EXPERT_UP_BIAS:
        IS(moe && family->expert_bias, s->inner, 1);
        break;
    case EXC_ROLE_ATTN_OUT_BIAS:
        IS(s->out_bias, H, 1);
        break;
    case EXC_ROLE_ATTN_SINKS:
        IS(family->sinks, s->heads, 1);
        break;
    case EXC_ROLE_ROUTER_BIAS:
        IS(moe && family->router_bias_stored, s->experts, 1);
        break;
    case EXC_ROLE_DENSE_DOWN:
        IS(!moe, H, s->dense_inner);
        break;
    case EXC_ROLE_DENSE_GATE:
    case EXC_ROLE_DENSE_UP:
        IS(!moe, s->dense_inner, H);
        break;
    case EXC_ROLE_ATTN_OUT:
        IS(true, H, linear ? values : s->heads * s->value_dim);
        break;
    case EXC_ROLE_ATTN_Q:
        IS(!linear && !s->latent.q_rank, s->heads * s->head_dim * (family->out_gate ? 2 : 1), H);
        break;
    case EXC_ROLE_ATTN_K:
    case EXC_ROLE_ATTN_V:
        IS(!linear, s->kv_heads * s->head_dim, H);
        break;
    case EXC_ROLE_LINEAR_QKVZ:
        IS(linear, 2 * keys + 2 * values, H);
        break;
    case EXC_ROLE_LINEAR_BA:
        IS(linear, 2 * l->v_heads, H);
        break;
    case EXC_ROLE_LINEAR_QKV:
        IS(linear, 2 * keys + values, H);
        break;
    case EXC_ROLE_LINEAR_Z:
        IS(linear, values, H);
        break;
    case EXC_ROLE_LINEAR_B:
    case EXC_ROLE_LINEAR_A:
        IS(linear, l->v_heads, H);
        break;
    case EXC_ROLE_LINEAR_CONV:
        IS(linear, 2 * keys + values, l->taps);
        break;
    case EXC_ROLE_LINEAR_RATE:
    case EXC_ROLE_LINEAR_STEP:
        IS(linear, l->v_heads, 1);
        break;
    case EXC_ROLE_LINEAR_NORM:
        IS(linear, l->v_dim, 1);
        break;
    case EXC_ROLE_ATTN_Q_A:
        IS(s->latent.q_rank, s->latent.q_rank, H);
        break;
    case EXC_ROLE_ATTN_Q_B:
        IS(s->latent.q_rank, s->heads * s->head_dim, s->latent.q_rank);
        break;
    case EXC_ROLE_ATTN_KV_A:
        IS(true, s->latent.rank + s->latent.rotary, H);
        break;
    case EXC_ROLE_ATTN_KV_B:
        IS(true, s->heads * (s->latent.plain + s->value_dim), s->latent.rank);
        break;
    case EXC_ROLE_ATTN_Q_A_NORM:
        IS(s->latent.q_rank, s->latent.q_rank, 1);
        break;
    case EXC_ROLE_ATTN_KV_A_NORM:
        IS(true, s->latent.rank, 1);
        break;
    case EXC_ROLE_ATTN_Q_BIAS:
        IS(s->qkv_bias, s->heads * s->head_dim, 1);
        break;
    case EXC_ROLE_ATTN_K_BIAS:
    case EXC_ROLE_ATTN_V_BIAS:
        IS(s->qkv_bias, s->kv_heads * s->head_dim, 1);
        break;
    case EXC_ROLE_ATTN_Q_NORM:
    case EXC_ROLE_ATTN_K_NORM:
        IS(!linear && s->qk_norm != EXC_QK_NONE, qk_norm_width(s, role), 1);
        break;
    case EXC_ROLE_NORM_IN:
    case EXC_ROLE_NORM_POST:
    case EXC_ROLE_NORM_FINAL:
        IS(true, H, 1);
        break;
    case EXC_ROLE_EMBED:
        IS(true, s->vocab, H);
        break;
    case EXC_ROLE_LM_HEAD:
        IS(!s->tied, s->vocab, H);
        break;
    default:
        break;
    }
#undef IS
    *out = here ? o : 0;
    *in = here ? i : 0;
    return *out > 0;
}
