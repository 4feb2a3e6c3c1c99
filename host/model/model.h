/* model.h - an opened checkpoint as experts, and the forward pass over it.
 *
 * Families are data: one const descriptor each (names by role, gate switches, attention kind, norms), found by
 * `model_type` and confirmed by names; shapes only check. forward.c knows mechanisms, not families. The lens hook lets a
 * plan change weights while they are loaded (baked) or outputs while they are computed (virtual); what a plan is, only the
 * study room knows. */
#ifndef EXC_MODEL_H
#define EXC_MODEL_H

#include "base.h"
#include "files.h"
#include "ops.h"

/* Weights by role. The first group writes the residual stream (editable on the output side). */
typedef enum exc_role {
    EXC_ROLE_EXPERT_DOWN, EXC_ROLE_SHARED_DOWN, EXC_ROLE_DENSE_DOWN, EXC_ROLE_ATTN_OUT,
    EXC_ROLE_EXPERT_GATE, EXC_ROLE_EXPERT_UP, EXC_ROLE_SHARED_GATE, EXC_ROLE_SHARED_UP, EXC_ROLE_DENSE_GATE, EXC_ROLE_DENSE_UP,
    EXC_ROLE_ROUTER, EXC_ROLE_SHARED_ROUTER, EXC_ROLE_ATTN_Q, EXC_ROLE_ATTN_K, EXC_ROLE_ATTN_V,
    EXC_ROLE_ATTN_Q_A, EXC_ROLE_ATTN_Q_B, EXC_ROLE_ATTN_KV_A, EXC_ROLE_ATTN_KV_B,
    EXC_ROLE_LINEAR_QKVZ, EXC_ROLE_LINEAR_BA, EXC_ROLE_LINEAR_QKV, EXC_ROLE_LINEAR_Z, EXC_ROLE_LINEAR_B, EXC_ROLE_LINEAR_A,
    EXC_ROLE_LINEAR_CONV,
    /* vectors */
    EXC_ROLE_ROUTER_BIAS, EXC_ROLE_EXPERT_DOWN_BIAS, EXC_ROLE_EXPERT_GATE_BIAS, EXC_ROLE_EXPERT_UP_BIAS, EXC_ROLE_ATTN_OUT_BIAS,
    EXC_ROLE_ATTN_Q_BIAS, EXC_ROLE_ATTN_K_BIAS, EXC_ROLE_ATTN_V_BIAS, EXC_ROLE_ATTN_SINKS, EXC_ROLE_ATTN_Q_NORM, EXC_ROLE_ATTN_K_NORM,
    EXC_ROLE_ATTN_Q_A_NORM, EXC_ROLE_ATTN_KV_A_NORM, EXC_ROLE_LINEAR_RATE, EXC_ROLE_LINEAR_STEP, EXC_ROLE_LINEAR_NORM,
    EXC_ROLE_NORM_IN, EXC_ROLE_NORM_POST, EXC_ROLE_NORM_FINAL, EXC_ROLE_EMBED, EXC_ROLE_LM_HEAD,
    EXC_ROLES
} exc_role;
const char *exc_role_name(exc_role role);          /* "expert_down", as plans spell it */
bool exc_role_find(const char *name, exc_role *out);

/* How the weights of a role lie in a tensor. All zero: the tensor is one weight, [out,in] (a vector: [out]). */
typedef struct exc_layout {
    bool stacked;               /* all experts of a layer, one behind the other: [E,..] */
    bool transposed;            /* each as [in,out] */
    int parts, part;            /* the `out` axis holds this many roles and this is number `part`; 0: it alone */
    bool mixed;                 /* .. taking turns along it, instead of one part behind the other */
    bool channels;              /* [out,1,in]: a convolution of each channel by itself */
    bool blocks;                /* fp4: u8 [..,in/32,16], with scales in the tensor NAME_scales beside NAME_blocks */
} exc_layout;
/* Name pattern of a role in a published layout: %L layer, %E expert, [text] may be left out. A role may stand more than once
 * (layouts that circulate); the first is the one that messages name. */
typedef struct exc_name {
    exc_role role;
    const char *pattern;
    exc_layout layout;
    unsigned in;                /* only in layers of these mixers, EXC_IN(..) each; 0: in all */
} exc_name;
#define EXC_IN(mix) (1u << (mix))

/* All experts of a layer in two tensors, gate over up, as newer loaders keep and save them: for every family's table. */
#define EXC_STACKED_EXPERTS(prefix)                                                                                         \
    {EXC_ROLE_EXPERT_DOWN, prefix "down_proj", {.stacked = true}},                          /* [E,H,I] */                   \
        {EXC_ROLE_EXPERT_GATE, prefix "gate_up_proj", {.stacked = true, .parts = 2}},       /* [E,2I,H] */                  \
        {EXC_ROLE_EXPERT_UP, prefix "gate_up_proj", {.stacked = true, .parts = 2, .part = 1}}

/* The same in fp4, gates and ups taking turns, as gpt-oss has it. */
#define EXC_BLOCK_EXPERTS(prefix)                                                                                           \
    {EXC_ROLE_EXPERT_DOWN, prefix "down_proj_blocks", {.stacked = true, .blocks = true}},   /* [E,H,I/32,16] */             \
        {EXC_ROLE_EXPERT_GATE, prefix "gate_up_proj_blocks", {.stacked = true, .parts = 2, .mixed = true, .blocks = true}}, \
        {EXC_ROLE_EXPERT_UP, prefix "gate_up_proj_blocks", {.stacked = true, .parts = 2, .part = 1, .mixed = true, .blocks = true}}

/* How weights are stored below 16 bits (quant.c). */
typedef enum exc_quant { EXC_QUANT_NONE, EXC_QUANT_FP8, EXC_QUANT_MXFP4 } exc_quant;

typedef enum exc_qk_norm { EXC_QK_NONE, EXC_QK_HEAD, EXC_QK_WHOLE } exc_qk_norm; /* each head, or all heads as one vector */
typedef enum exc_dense {
    EXC_DENSE_NEVER,
    EXC_DENSE_LISTED, /* mlp_only_layers and decoder_sparse_step */
    EXC_DENSE_FIRST   /* first_k_dense_replace */
} exc_dense;

typedef enum exc_windows { /* which layers see no further back than sliding_window tokens */
    EXC_WINDOWS_NEVER,
    EXC_WINDOWS_ALWAYS,
    EXC_WINDOWS_TYPED, /* layer_types, else every other layer from the first on, below window_layers */
    EXC_WINDOWS_BEHIND /* layer_types, else the layers from window_layers on */
} exc_windows;

/* Kinds of token mixers; one file each (session.h: exc_mixer). */
typedef enum exc_mix { EXC_MIX_SOFTMAX, EXC_MIX_LATENT, EXC_MIX_LINEAR, EXC_MIXES } exc_mix;

/* A key of config.json that may have one value (as JSON text) or be absent or null. */
typedef struct exc_fixed { const char *key, *value; } exc_fixed;

typedef struct exc_family {
    const char *model_type;
    const char *other_type;     /* a model_type that means the same; NULL: none */
    const exc_name *names;      /* ends with pattern NULL */
    const char *const *passed;  /* prefixes of tensors that are present but not part of the text decoder; NULL-terminated */
    int norm_zero_centred;
    double norm_eps, rope_theta, rotary; /* what loaders take where config.json is silent: rms_norm_eps, rope_theta, partial_rotary_factor */
    int64_t head_dim;           /* the same of head_dim; 0: hidden_size / num_attention_heads */
    exc_qk_norm qk_norm;
    exc_mix mix;                /* how tokens see each other, in all layers; LINEAR: softmax in those that layer_types calls
                                 * full_attention, or every full_attention_interval-th */
    bool out_gate;              /* q_proj makes a gate beside each head's query: the head's output is multiplied by its sigmoid */
    const char *nested;         /* object of config.json with the decoder's keys, where there is one; NULL: none */
    float latent_eps;           /* of the norms inside latent attention */
    const char *qk_norm_key;    /* switches it on; NULL: always on */
    const char *bias_key;       /* config switch of q, k and v biases; NULL: none */
    bool bias;                  /* its default */
    bool out_bias;              /* it also gives the attention's output one */
    bool sinks;                 /* each query head has a score that takes part in the softmax and has no value */
    bool expert_bias;           /* biases of gate, up and down of every expert */
    bool clamped;               /* EXC_GLU_CLAMPED with swiglu_alpha and swiglu_limit, else silu */
    int gate_score;             /* exc_gate.score */
    const char *renorm_key;     /* config switch of renormalisation; NULL: gate_renorm always */
    bool gate_renorm;           /* its default */
    float renorm_eps;
    const char *scale_key;      /* factor of the routing weights; NULL: 1 */
    double scale;               /* its default */
    bool grouped;               /* n_group, topk_group limit the selection */
    int64_t groups, groups_kept; /* their defaults */
    const char *experts_key, *top_k_key, *inner_key; /* config names */
    const char *shared_key;     /* width of the shared expert; NULL: the family has none */
    bool shared_counts;         /* it is a number of experts of the routed width, merged into one */
    int64_t shared;             /* its default */
    bool shared_gated;          /* its output is multiplied by a sigmoid of its own */
    exc_dense dense;            /* which layers have no experts */
    int64_t dense_first;        /* default of first_k_dense_replace */
    const char *mtp_key;        /* number of layers behind the last that predict further tokens and are passed through */
    exc_windows windows;
    const char *window_switch;  /* config switch without which there is no window; NULL: none needed */
    int64_t window;             /* default of sliding_window, 0: no window */
    const char *window_layers;  /* key of the layer that ends or begins windows without layer_types; NULL: none does */
    int64_t window_first;       /* its default */
    const struct exc_rope *rope; /* where config.json names no scaling; NULL: plain */
    const char *const *refused; /* config switches that loaders honour and this arithmetic does not have; NULL-terminated */
    const exc_fixed *fixed;     /* config keys of which this arithmetic has one value; ends with key NULL; NULL: none */
    const char *router_bias;    /* where a router bias is stored, or why it cannot be: for inspect and plan refusals */
    int router_bias_stored;
    bool router_bias_in_logits; /* it is part of the logits, so of the weights too; else added to the scores for the choice alone */
} exc_family;
const exc_family *exc_family_find(const char *model_type);
extern const exc_family *const exc_families[]; /* NULL-terminated (family.c); one file a family */

/* How positions rotate (scaling.c). */
typedef enum exc_rope_kind { EXC_ROPE_PLAIN, EXC_ROPE_YARN, EXC_ROPE_LLAMA3 } exc_rope_kind;
typedef struct exc_rope {
    exc_rope_kind kind;
    double theta;               /* base of the frequencies */
    double factor, original;    /* slow pairs are divided by factor; context of the first training */
    double fast, slow;          /* turns in that context: more than fast are kept, fewer than slow divided */
    bool truncate;              /* yarn: the ramp between starts and ends at whole pairs */
    float attention;            /* factor of cosines and sines */
    double score;               /* factor of the softmax scale, where the mixer has one */
} exc_rope;

/* Multi-head latent attention (mla.c): channels of a head that do not rotate and that do, values of the latent. */
typedef struct exc_latent {
    int64_t plain, rotary, rank;
    int64_t q_rank;             /* of the queries; 0: they are made in one step */
    bool adjacent;              /* channels (2i, 2i+1) rotate together, else (i, i + rotary/2) */
} exc_latent;

/* Gated delta net (linear.c): heads of keys (and queries) and of values, and taps of the convolution before it. */
typedef struct exc_linear { int64_t k_heads, v_heads, k_dim, v_dim, taps; } exc_linear;

/* Everything config.json decides, checked. */
typedef struct exc_shape {
    int64_t layers, hidden, heads, kv_heads, head_dim, vocab, context, experts, top_k, inner, dense_inner, moe_layers;
    int64_t shared_inner;       /* width of the shared expert, 0: none */
    int64_t value_dim;          /* channels of a head's output */
    int64_t rotary;             /* channels of a head that rotate */
    exc_latent latent;          /* rank 0: not this family's */
    exc_linear linear;          /* v_heads 0: not this family's */
    int64_t mtp_layers;         /* behind the last layer, passed through */
    exc_qk_norm qk_norm;
    bool qkv_bias, out_bias;
    exc_activation activation;  /* of experts and dense MLPs */
    float eps;
    exc_rope rope;
    int tied;                   /* lm_head = embed */
    exc_quant quant;            /* what quantization_config promises: tensors say which weights */
    bool scale_power;           /* scales are powers of two, whatever their dtype */
    exc_gate gate;
    uint8_t *is_moe;            /* [layers] */
    int64_t *moe_row;           /* [layers] row among the MoE layers, -1: dense */
    uint8_t *mix;               /* [layers] exc_mix: how tokens of a sequence see each other */
    int64_t *mix_row;           /* [layers] row among the layers of the same kind: where its cache lies */
    int64_t mix_layers[EXC_MIXES]; /* how many of each kind */
    int64_t *window;            /* [layers] tokens that one sees, itself included; 0: all before it */
    int32_t eos[8]; int n_eos;  /* from generation_config.json or config.json */
} exc_shape;
/* shape.c: every key checked; errors name key, expected, found */
const char *exc_shape_dense_keys(const exc_family *family); /* config keys that say which layers are dense */
exc_status exc_shape_read(exc_ctx *ctx, const exc_checkpoint *files, const exc_family *family, exc_shape *out);
void exc_shape_free(exc_shape *s);
/* logical sizes [out,in] of a role (in = 1: a vector); false: this model has no such weight in that layer */
bool exc_shape_role(const exc_shape *s, const exc_family *family, exc_role role, int64_t layer, int64_t *out, int64_t *in);
/* scaling.c: base, scaling and the number of rotating channels; and the frequencies f32 [channels/2] they make */
exc_status exc_rope_read(exc_ctx *ctx, const json_t *config, const char *what, const exc_family *f, exc_shape *s);
const char *exc_rope_name(exc_rope_kind kind); /* as rope_type spells it */
void exc_rope_frequencies(const exc_rope *r, int64_t channels, float *out);
bool exc_role_by_layer(exc_role role);  /* one a layer (or one an expert), not one a model */
bool exc_role_by_expert(exc_role role);
bool exc_role_writes(exc_role role);    /* writes the residual stream: output side editable */
bool exc_role_reads(exc_role role);     /* reads it: input side editable */
bool exc_role_planned(exc_role role);   /* plans may name it */
bool exc_role_is_vector(exc_role role);  /* norms and biases */
exc_role exc_role_bias(const exc_family *f, exc_role role); /* of the bias added to what it gives out; EXC_ROLES: none to edit with it */

/* One matrix or vector, by role: a tensor or a part of one. Element (o,i) lies o*out_step + i*in_step elements behind `begin`. */
typedef struct exc_weight {
    const exc_tensor *tensor;
    exc_role role;
    int64_t layer, expert;      /* -1 where it has none */
    int64_t out, in;            /* in = 1 for vectors */
    uint64_t begin, end;        /* bytes of the tensor's file from its first to its last element */
    int64_t out_step, in_step;  /* in, 1 as most lie; 1, out transposed; others where parts are mixed */
    int dtype;                  /* as ops know it: that of the tensor, or EXC_F4 */
    const exc_tensor *scale;    /* of quantised weights, else NULL */
    int scale_dtype;            /* EXC_F32, EXC_BF16 or EXC_F8_E8M0 */
    uint64_t scale_begin, scale_end; /* bytes of the scale's file */
    int64_t scale_step;         /* scales from a row of them to the next */
    int64_t scale_first;        /* e4m3: rows of its first block of scales that are the part's before it */
    bool scale_shared;          /* e4m3: a block of scales is also another part's: read, but not edited as it is */
} exc_weight;
bool exc_weight_coded(const exc_weight *w);      /* quantised: codes and scales */
void exc_weight_scales(const exc_weight *w, int64_t *rows, int64_t *cols); /* how many scales */
size_t exc_weight_scale_bytes(const exc_weight *w); /* of its own scales, without gaps; 0: it has none */
bool exc_weight_dense(const exc_weight *w);      /* [out,in] without gaps */
bool exc_weight_transposed(const exc_weight *w); /* [in,out] without gaps */
size_t exc_weight_span(const exc_weight *w);     /* bytes begin..end */
uint64_t exc_weight_bytes(const exc_weight *w);  /* of its own elements */
/* "NAME" or, of a tensor that holds several, "NAME[expert]"; out is returned */
const char *exc_weight_label(const exc_weight *w, char *out, size_t cap);

/* Table of weights without loading anything: for inspect, plan, apply, verify. */
typedef struct exc_atlas {
    exc_checkpoint *files;      /* owned */
    const exc_family *family;
    exc_shape shape;
    exc_weight *items; size_t count, room; /* sorted by role, layer, expert */
    const exc_tensor **unknown; size_t n_unknown; /* tensors no name covers: listed, passed through */
    char fingerprint[33];
} exc_atlas;
exc_status exc_atlas_open(exc_ctx *ctx, const char *dir, exc_atlas **out);
/* the same by all ranks, who tell each other when they find different models, or `more` differs */
exc_status exc_atlas_open_same(exc_ctx *ctx, const char *dir, uint64_t more, exc_atlas **out);
const exc_weight *exc_atlas_find(const exc_atlas *a, exc_role role, int64_t layer, int64_t expert);
const void *exc_atlas_data(const exc_atlas *a, const exc_weight *w); /* its first element in the map; may be unaligned */
void exc_atlas_close(exc_atlas *a);
/* quant.c: quantization_config; tensors of formats that are not read; the scales of a coded weight, and whose scales a name is */
exc_status exc_quant_read(exc_ctx *ctx, const json_t *config, const char *what, exc_shape *s);
const char *exc_quant_name(exc_quant q); /* as quant_method spells it, or "none" */
exc_status exc_quant_guess(exc_ctx *ctx, const exc_checkpoint *files);
exc_status exc_scale_find(exc_ctx *ctx, const exc_atlas *a, const exc_layout *y, exc_weight *w);
void exc_scale_locate(const exc_layout *y, exc_weight *w);
bool exc_scale_owner(const char *name, char *out, size_t cap);
/* a weight's scales between where they lie (its first one) and an array without gaps, and where in that those of a row begin */
void exc_scale_gather(const exc_weight *w, const void *lying, void *dense);
void exc_scale_scatter(const exc_weight *w, const void *dense, void *lying);
size_t exc_scale_offset(const exc_weight *w, int64_t row);
int64_t exc_scale_run(const exc_weight *w, int64_t row); /* e4m3: rows from there to the end of its block */

/* The lens: what a plan does to a model, as the model room sees it. Made by study/lenses.c. */
typedef struct exc_lens_hook {
    /* baked: called for every weight when it is loaded; data as it lies in its tensor, scale without gaps (NULL: none), both
     * writable; may be NULL */
    exc_status (*bake)(exc_ctx *ctx, void *user, const exc_atlas *a, const exc_weight *w, void *data, void *scale);
    /* tells whether bake would change this weight, so that untouched ones are read from the map */
    bool (*touches)(void *user, const exc_weight *w);
    /* virtual: the projection of a writer of a layer; false: none. For EXC_ROLE_EXPERT_DOWN strength is [E], else [1] */
    bool (*project)(void *user, exc_role role, int64_t layer, const float **basis, int64_t *rank, const float **strength, const float **scale);
    void *user;
    void (*release)(void *user);
} exc_lens_hook;
/* study/lenses.c: checks the plan against the atlas and makes the hook (EXC_ERR_INPUT: what cannot be virtual) */
exc_status exc_lens_make(exc_ctx *ctx, const exc_atlas *a, const exc_plan *plan, exc_lens lens, exc_lens_hook *hook);

/* Numbers that are made where ops run instead of read, so that a model of any size can be opened from the headers of its files alone
 * (benches). rows: enqueues what writes rows first.. of a weight [out,in], in its dtype, at `there`; plain weights only. */
typedef struct exc_made {
    exc_status (*rows)(exc_ctx *ctx, void *user, const exc_weight *w, int64_t first, int64_t rows, void *there);
    void *user;
} exc_made;
exc_status exc_model_open_made(exc_ctx *ctx, const char *dir, const exc_model_options *options, const exc_made *made, exc_model **out);

/* Packed weights, one entry a layer (load.c). All that pointers of these structs point to lies where ops run, but `here`. */
typedef struct exc_virtual { const float *basis, *strength, *scale; int64_t rank; bool on; } exc_virtual;
/* Matrices of one size and dtype. The host reads `here`; `there` is the same table where ops run that take one: on the CPU, it. */
typedef struct exc_table { exc_packed *here, *there; int64_t count; } exc_table;
/* q, k and v are one matrix, so that one matmul makes all three: columns 0.. of a row are queries, k_at.. keys, v_at..
 * values, each part padded to whole panels with zero weights (attention.c). */
typedef struct exc_softmax_weights {
    exc_packed qkv;
    int64_t gate_at, k_at, v_at, width; /* of a q|k|v row; gates of the output, where there are some, stand behind the queries */
    float *bias;                   /* [width] or NULL */
    float *q_norm, *k_norm;        /* [head_dim], [heads*head_dim] as the family has it, or NULL */
    float *sinks;                  /* [heads] or NULL */
} exc_softmax_weights;
typedef struct exc_latent_weights {
    exc_packed first;              /* columns 0.. of a row are queries (or their latent), kv_at.. the latent of keys and values */
    int64_t kv_at, width;          /* of such a row */
    exc_packed q_b;                /* data NULL: no latent of the queries */
    exc_table key, absorb, value;  /* [heads]: [plain,rank], its transpose, [value_dim,rank] */
    float *q_norm, *kv_norm;       /* [q_rank] or NULL, [rank] */
} exc_latent_weights;
typedef struct exc_linear_weights {
    exc_packed in, gates;          /* columns 0.. of a row are q|k|v, z_at.. the gate of the output; beta, then step at step_at */
    int64_t z_at, width, step_at, gates_width;
    float *conv;                   /* [taps, q|k|v] */
    float *rate, *step_bias;       /* [v_heads] A_log, dt_bias */
    float *norm;                   /* [v_dim] */
} exc_linear_weights;
typedef struct exc_layer {
    union { exc_softmax_weights softmax; exc_latent_weights latent; exc_linear_weights linear; } mix; /* by exc_shape.mix */
    exc_packed out, router;        /* out: what the mixer writes to the stream with */
    float *out_bias;               /* [H] or NULL */
    exc_table gate, up, down;      /* [experts of this rank]; [1] in a dense layer */
    float *gate_bias, *up_bias, *down_bias; /* [E,I], [E,I], [E,H] of all experts, or NULL */
    exc_table shared_gate, shared_up; /* [1] */
    exc_packed shared_down;        /* data NULL: no shared expert */
    exc_packed shared_router;      /* [1,H]; data NULL: not gated */
    float *router_bias;            /* [E], added where the family says, or NULL */
    float *norm_in, *norm_post;    /* [H] */
    exc_virtual attn_lens, mlp_lens, shared_lens;
    int64_t turn;                  /* so many experts are in memory at a time (exc_layer_turn); 0: all */
} exc_layer;
/* memory where ops run (bytes of it), and the host's own where that is another */
typedef struct exc_slab { void *ops, *host; size_t bytes; } exc_slab;
typedef enum exc_extent { EXC_LAYER_WHOLE, EXC_LAYER_DOWN } exc_extent; /* all weights of a layer, or what exc_model_down reads */
typedef struct exc_place { exc_layer y; exc_slab slab; int64_t layer; exc_extent extent; } exc_place; /* layer -1: it holds none */
typedef struct exc_loaded {
    exc_place *place; int64_t places; /* of layers: [layers], or 1 or 2 that they take turns in (window.c) */
    int64_t current;               /* the place in use, where they take turns */
    struct exc_ahead *ahead;       /* fills them then; NULL: resident */
    int64_t seen;                  /* resident: layers that passes came to for the first time, [0,layers), and again, up to 2*layers */
    exc_place passing;             /* what they take turns in the first time, in the slab of the largest */
    int64_t turn;                  /* the first of the experts that are in it, where these take turns; -1: none are */
    struct exc_loader *loader;     /* reads them; NULL: all are in their places */
    uint64_t fills;                /* whole layers filled so far */
    int64_t layers;
    uint64_t all_bytes, ends_bytes; /* of all layers, and of what no layer owns */
    size_t largest, largest_host;  /* layer: where ops run, and what the host keeps of it */
    int64_t largest_layer;
    exc_packed lm_head;
    int head_due;                  /* uses until it is in its place: the first takes it in pieces, the second keeps it (exc_head_at) */
    int embed_dtype;
    const void *embed;             /* [V,H] as stored, where it can be in its file */
    float *norm_final;             /* [H] */
    float *inv_freq;               /* [rotary/2] */
    exc_slab ends;                 /* holds what no layer owns */
} exc_loaded;
exc_status exc_load(exc_ctx *ctx, exc_model *m); /* fills m->loaded and m->weight_bytes */
void exc_unload(exc_ctx *ctx, exc_model *m);
exc_status exc_head_at(exc_ctx *ctx, exc_model *m, int64_t first, exc_packed *out); /* rows first.. of lm_head: out->n of them */
/* window.c: weights of a layer, for the pass that has come to it with so many chunks of rows; they hold until the next call */
exc_status exc_layer_at(exc_ctx *ctx, const exc_model *m, int64_t layer, int64_t chunks, const exc_layer **out);
/* what exc_model_down reads of it, of the experts at least this one (counted from the rank's first) */
exc_status exc_layer_down(exc_ctx *ctx, const exc_model *m, int64_t layer, int64_t expert, const exc_layer **out);
exc_status exc_layer_turn(const exc_model *m, int64_t first); /* experts first.. of the layer at hand, where they take turns */
exc_status exc_window_open(exc_ctx *ctx, exc_model *m, int64_t places); /* fills none */
bool exc_window_waits(const exc_model *m); /* layers are read when a pass comes to them */
void exc_window_close(exc_ctx *ctx, exc_model *m);
uint64_t exc_window_bytes(const exc_model *m, int64_t places); /* weights in memory with that many places */
/* fewer places: of all layers, then two, then one; false: there is only one. What layers hold is lost. */
bool exc_window_narrow(exc_ctx *ctx, exc_model *m, exc_status *st);
/* ranks: every model of the context gets as few places as it has on the rank where it has fewest; nothing alone */
exc_status exc_windows_agree(exc_ctx *ctx);

struct exc_model {
    exc_ctx *ctx;
    exc_atlas *atlas;
    exc_compute compute;
    int act;                    /* EXC_BF16 or EXC_F32 */
    exc_lens_hook lens;
    int has_lens, is_virtual;
    exc_made made;              /* rows NULL: weights are read from files */
    char *dir;
    int64_t expert_first, expert_end; /* routed experts that this rank holds: all of them when it works alone */
    uint64_t weight_bytes;      /* packed weights in memory */
    exc_loaded *loaded;         /* packed weights by layer (load.c) */
    exc_model *next;            /* of the context's models */
    struct exc_session *spare;  /* the last session, kept because first touch of fresh memory is slow (generate.c) */
};

/* ---- forward pass (forward.c). A session holds a KV cache and all buffers, so that steps allocate nothing. */
typedef struct exc_session exc_session;
typedef struct exc_room {
    int64_t slots;              /* sequences held at once */
    int64_t cache_tokens;       /* sum of their capacities */
    int64_t step_tokens;        /* most tokens of one step */
    int64_t chunk_tokens;       /* tokens that go through a layer at once; 0: all of a step */
    bool once;                  /* sequences begin and end in the same step: caches and states are of one layer */
} exc_room;
exc_status exc_session_open(exc_ctx *ctx, exc_model *m, const exc_room *room, exc_session **out);
void exc_session_close(exc_session *s);
bool exc_session_fits(const exc_session *s, const exc_room *room);
uint64_t exc_session_measure(exc_model *m, const exc_room *room); /* bytes that such a session takes */
uint64_t exc_session_bytes(const exc_session *s);
/* forgets all sequences; capacity[slots] tokens each (sum <= cache_tokens) */
exc_status exc_session_reset(exc_session *s, int64_t slots, const int64_t *capacity);
void exc_session_forget(exc_session *s, int64_t slot);          /* one sequence: its slot is empty again */
int64_t exc_session_length(const exc_session *s, int64_t slot); /* tokens the slot holds */
int64_t exc_cache_bytes(const exc_model *m);                    /* of one token, in all layers */
int64_t exc_state_bytes(const exc_model *m);                    /* of one sequence of any length, in all layers */
int64_t exc_step_tokens(const exc_model *m);                    /* a good size of a prefill step for this model */

/* ---- memory (room.c) */
/* how many places its layers get: all within what the budget leaves, else two or one. Other models of the context may have to
 * give places up for it. */
exc_status exc_budget_places(exc_ctx *ctx, exc_model *m, int64_t *places);
/* what a run would like to have */
typedef struct exc_wish {
    int64_t prompts, slots;     /* in all, and at once at most */
    int64_t longest, capacity;  /* tokens of the longest prompt, and with what it gets fed back */
    int64_t tokens;             /* of all prompts */
    int64_t chunk;              /* tokens that go through a layer at once */
    uint64_t slot_bytes, token_bytes; /* what the caller keeps of each sequence and each token of a step */
    uint64_t held;              /* and besides */
    uint64_t sessions;          /* of this size that memory must hold, 0: one */
    bool once;                  /* nothing is fed back, and prompts go whole into a step */
    bool whole;                 /* prompts must go whole into a step, also of a resident model */
} exc_wish;
bool exc_model_streamed(const exc_model *m);
/* sizes of a session within the budget; a streamed model gets steps of as many prompts as fit */
exc_status exc_room_choose(exc_ctx *ctx, exc_model *m, const exc_wish *wish, exc_room *out);
/* the session for them: the model's last one where that is large enough; belongs to the model */
exc_status exc_session_get(exc_ctx *ctx, exc_model *m, const exc_room *room, exc_session **out);
/* adds "budget", "peak_memory", "streamed" and "passes" (over the weights of layers, so far) to a result */
void exc_memory_facts(const exc_model *m, json_t *to);

/* Sums a forward pass adds to, for one label and phase, where ops run. Rows: M MoE layers. Any pointer may be NULL. */
typedef struct exc_sums {
    int64_t *count;        /* [M,E] */
    double *gate_sum;      /* [M,E] */
    double *mid_sum;       /* [M,E,I] */
    double *sqnorm_sum;    /* [M,E] */
    double *shared_mid_sum;/* [M,Ishared] */
    int64_t *tokens;       /* [M], the host's */
    uint32_t *prompt_count;/* [P,M,E] */
} exc_sums;

/* One step: `rows` tokens, grouped by sequence in any order of slots; a sequence's tokens continue what its slot holds. What goes in
 * is the host's. */
typedef struct exc_step {
    const int32_t *tokens;      /* [rows] */
    const int32_t *slot;        /* [sequences] */
    const int64_t *begin;       /* [sequences+1] rows of each sequence */
    int64_t sequences;
    /* outputs, all optional, where ops run */
    int logits_all;             /* 1: logits of every row, 0: of the last row of each sequence */
    float *logits;              /* [rows or sequences, V] */
    float *hidden;              /* [L+1, rows, H] residual stream (embedding, then after each layer) */
    float *hidden_last;         /* [sequences, L+1, H] the same for the last row of each sequence */
    int32_t *router_ids;        /* [M, rows, K] */
    float *router_weights;      /* [M, rows, K] */
    const exc_sums *sums;       /* what to add to */
    const int32_t *observe;     /* [rows] prompt number of the row, -1: not observed; needed when sums is set */
} exc_step;
/* enqueues the step: on a device it is over when something is fetched. NaN and infinity are told then, by check or draw */
exc_status exc_session_step(exc_session *s, const exc_step *step);
exc_status exc_session_check(exc_session *s); /* waits for the last step; EXC_ERR_NUMERIC when its stream is not finite */
/* logits f32 [rows,V], where ops run, of rows first.. of the last step: a large vocabulary goes out in pieces */
exc_status exc_session_logits(exc_session *s, int64_t first, int64_t rows, float *logits);

/* the next tokens i32 [rows] of the host, as op sample takes them from logits [rows,V] of the last step; checks as well */
typedef struct exc_draw { const float *logits; int64_t rows; float temperature, top_p; const double *random01; } exc_draw;
exc_status exc_session_draw(exc_session *s, const exc_draw *d, int32_t *token);

/* ---- generation (generate.c): one loop for greedy, sampled, captured decode */
/* A piece of a prompt that a prefill step just did: rows row.. of `step` are tokens first..first+rows-1 of `prompt`. */
typedef struct exc_piece { exc_session *session; const exc_step *step; int64_t step_rows, row, prompt, first, rows; } exc_piece;
typedef exc_status (*exc_piece_fn)(exc_ctx *ctx, void *user, const exc_piece *piece);

typedef struct exc_decode {
    int64_t max_new;
    float temperature, top_p;   /* 0: greedy; top_p 0: off */
    uint64_t seed;              /* token i of prompt p draws exc_random_unit(seed, p, i) whatever the batching */
    bool ignore_eos;            /* forward --generate: always max_new tokens */
    bool observe;               /* sums also for the tokens fed back */
    const exc_sums *prefill_sums, *decode_sums; /* NULL: none */
    const int32_t *const *prefill_observe;      /* [P] per prompt [tokens]: 1 observe, 0 not; NULL: all */
    float *hidden_last;         /* [P, L+1, H] of the host or NULL */
    float *first_logits;        /* [P, V] of the host or NULL: logits that emit the first new token */
    int64_t batch;              /* sequences at once; 0: chosen from lengths */
    int64_t batch_tokens;       /* prefill tokens that go through a layer at once; 0: chosen */
    uint64_t held;              /* bytes of the budget that the caller keeps for itself */
    const char *step;           /* name for progress events */
    bool hidden, routing;       /* prefill steps deliver these taps too */
    exc_piece_fn visit;         /* called for every piece of prefill, prompts in order; NULL: nobody looks */
    void *user;
} exc_decode;
typedef struct exc_reply { int32_t *tokens; int64_t count; int stopped; /* 1: end token, not in tokens */ } exc_reply;
/* replies [P], released with exc_replies_free; max_new 0: prefill only */
exc_status exc_decode_run(exc_ctx *ctx, exc_model *m, const exc_prompts *p, const exc_decode *d, exc_reply **replies);
void exc_replies_free(exc_reply *r, int64_t n);
/* logits of all positions of every prompt handed to `visit` in prompt order, in pieces: logits [rows,V] of tokens first.. of the
 * prompt, where ops run; tokens: the whole prompt, so that row i predicts tokens[first + i + 1] where there is one */
typedef exc_status (*exc_logits_fn)(exc_ctx *ctx, void *user, int64_t prompt, int64_t first, int64_t rows, const int32_t *tokens, const float *logits);
exc_status exc_logits_run(exc_ctx *ctx, exc_model *m, const exc_prompts *p, const char *step, exc_logits_fn visit, void *user);

/* checks that every prompt's ids are in the vocabulary and that it fits the context with `extra` more tokens */
exc_status exc_prompts_check(exc_ctx *ctx, const exc_model *m, const exc_prompts *p, int64_t extra);

/* W_down[layer, expert] times f64 vectors: y[n,H] = x[n,I] W^T + terms[n] bias in f64, for output sums (probe.c); terms: how many
 * activations a row of x sums */
exc_status exc_model_down(exc_ctx *ctx, exc_model *m, exc_role role, int64_t layer, int64_t expert, const double *x,
                          const int64_t *terms, int64_t n, double *y);

#endif
