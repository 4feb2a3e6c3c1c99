/* excise.h - the whole public API of Excise, a toolkit that finds and removes behaviours in Mixture-of-Experts
 * language models: run a model over two contrasting prompt sets, capture which experts each token chose and what
 * they put out, turn the sums into log-ratios and rank-k contrast subspaces, remove those from the weights, and
 * prove what was done.
 *
 * Five nouns: exc_ctx (where work runs), exc_model (an opened checkpoint, read through an optional plan), exc_stats
 * (sums over tokens; adding two merges them), exc_dirs (orthonormal bases per layer), exc_plan (a list of edits).
 *
 * Rules. Every fallible call returns exc_status, 0 is success; exc_ctx_error() has the detail as one line. Options
 * structs begin with `size` and have an initialiser macro; zero means "the default". Nothing prints, exits or
 * aborts. One event callback reports progress and cancels. A context serves one thread at a time; different
 * contexts may run at once. Two tiers, marked on each declaration:
 *   [stream]  enqueues on the context's stream and returns; allocates nothing, does not synchronise, reads no
 *             device memory on the host, and can be captured in a CUDA graph. On a GPU all arrays are device memory of
 *             the context's device. On the CPU backend "the stream" is the call itself.
 *   [job]     blocks, may allocate, reads and writes files, sends events.
 * Results that are lists of facts come as JSON text (`char **json`, released with exc_free; NULL: not wanted).
 * Shapes: T tokens, H hidden, I expert intermediate, E experts, K per token, L layers, M MoE layers, V vocabulary,
 * P prompts, R rank. Arrays are row-major and belong to whoever made them. */
#ifndef EXCISE_H
#define EXCISE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EXC_VERSION "0.1.0"
#define EXC_API __attribute__((visibility("default")))

/* ------------------------------------------------------------------------------------------------ status, events */
typedef enum exc_status {
    EXC_OK = 0,
    EXC_ERR_IO = 1,        /* a file could not be opened, read or written; disk full */
    EXC_ERR_MEMORY = 2,    /* an allocation failed */
    EXC_ERR_DEVICE = 3,    /* backend absent or failed */
    EXC_ERR_USAGE = 4,     /* an argument is wrong; an output exists and force is off */
    EXC_ERR_INPUT = 5,     /* input refused: malformed, unsupported, inconsistent, nothing to edit */
    EXC_ERR_NUMERIC = 6,   /* NaN or infinity where there must be none */
    EXC_CANCELLED = 7      /* the event callback asked to stop; finished work is kept */
} exc_status;

EXC_API const char *exc_status_name(exc_status status);
/* process exit code of a status: 0; 1 io, memory, device; 2 usage; 3 input, numeric; 130 cancelled */
EXC_API int exc_status_exit(exc_status status);
EXC_API const char *exc_version(void);
EXC_API void exc_free(void *p); /* for every text this library hands out */

typedef enum exc_event_kind { EXC_EVENT_PROGRESS, EXC_EVENT_INFO, EXC_EVENT_WARNING } exc_event_kind;
typedef struct exc_event {
    exc_event_kind kind;
    const char *text;     /* the step ("capture target") or the message; valid during the call */
    const char *unit;     /* progress: what is counted ("tokens", "bytes") */
    uint64_t done, total; /* progress; total 0 when unknown */
} exc_event;
/* Called on the thread that made the [job] call. Nonzero asks to stop: the call returns EXC_CANCELLED soon. */
typedef int (*exc_event_fn)(void *user, const exc_event *event);

/* --------------------------------------------------------------------------------------------------- exc_ctx */
typedef struct exc_ctx exc_ctx;
typedef struct exc_ctx_options {
    size_t size;
    const char *backend;   /* "cuda" or "cpu": one that cannot be used is an error that says why. NULL: the first that can */
    int threads;           /* 0: all cores this process may use */
    int reproducible;      /* 1: same bits for any batching too: logits, states, replies, and all sums of a capture (see exc_capture) */
    exc_event_fn on_event; /* NULL: no events */
    void *user;
    const char *ranks;     /* processes that do one job together: NULL or "none"; "auto": as mpirun or srun started this one; "mpi";
                            * "file:PATH": they meet by a file that all of them see, without MPI; RANK and WORLD_SIZE, or srun or mpirun,
                            * say who they are; then one context a process at a time */
    int device;            /* which GPU of the "cuda" backend */
    void *stream;          /* a cudaStream_t of the caller's on that device, borrowed until exc_ctx_free; NULL: one of the context's own */
    size_t work_bytes;     /* device memory that [stream] calls share as scratch, taken once here; 0: 64 MiB */
    uint64_t memory;       /* bytes that weights, caches and buffers of models may take, where ops run; larger models are read
                            * layer by layer, once a pass. 0: what is free now, within the limit of the control group */
} exc_ctx_options;
#define EXC_CTX_OPTIONS {sizeof(exc_ctx_options)}

EXC_API exc_status exc_ctx_create(const exc_ctx_options *options, exc_ctx **ctx); /* [job] options may be NULL */
EXC_API void exc_ctx_free(exc_ctx *ctx);
EXC_API const char *exc_ctx_error(const exc_ctx *ctx); /* of the last failed call; "" if none */
EXC_API void exc_ctx_rank(const exc_ctx *ctx, int *rank, int *ranks); /* 0 of 1 when this process works alone */
/* [job] {"version","backend","backends":[{"name","usable","why"}],"libraries":{NAME:text} on cuda,"threads","isa",..} */
EXC_API exc_status exc_ctx_describe(exc_ctx *ctx, char **json);

/* ------------------------------------------------------------------------------------- plans (read before models) */
typedef struct exc_plan exc_plan;
typedef struct exc_stats exc_stats;
typedef struct exc_dirs exc_dirs;
typedef struct exc_model exc_model;

EXC_API exc_status exc_plan_load(exc_ctx *ctx, const char *path, exc_plan **plan); /* [job] reads the directions it names */
EXC_API exc_status exc_plan_save(exc_ctx *ctx, const exc_plan *plan, const char *path, int force); /* [job] */
EXC_API exc_status exc_plan_json(exc_ctx *ctx, const exc_plan *plan, char **json); /* the plan as its file has it */
EXC_API void exc_plan_free(exc_plan *plan);

/* --------------------------------------------------------------------------------------------------- exc_model */
typedef enum exc_compute { EXC_COMPUTE_BF16 = 0, EXC_COMPUTE_F32 = 1 } exc_compute;
typedef enum exc_lens { EXC_LENS_BAKED = 0, EXC_LENS_VIRTUAL = 1 } exc_lens;
typedef struct exc_model_options {
    size_t size;
    exc_compute compute; /* bf16: matmul operands bf16, sums and residual stream f32. f32: activations f32 */
    const exc_plan *plan; /* read the model through this plan; borrowed until exc_model_free */
    exc_lens lens;       /* baked: weights edited in memory (= the written checkpoint bit for bit); virtual: outputs projected */
} exc_model_options;
#define EXC_MODEL_OPTIONS {sizeof(exc_model_options)}
typedef struct exc_model_info {
    size_t size;
    const char *family;                 /* model_type, owned by the model */
    int64_t layers, moe_layers, hidden, intermediate, experts, top_k, vocab, context;
    char fingerprint[33];               /* XXH3-128 of config and tensor table, hex */
} exc_model_info;
#define EXC_MODEL_INFO {sizeof(exc_model_info)}

EXC_API exc_status exc_inspect(exc_ctx *ctx, const char *dir, char **json); /* [job] headers only */
/* [job] on the CPU weights are read, and refused where they are not finite, when a forward pass first comes to their layer. The files are
 * mapped until exc_model_free: who changes them in place meanwhile changes the model, who truncates them ends the process (SIGBUS). */
EXC_API exc_status exc_model_open(exc_ctx *ctx, const char *dir, const exc_model_options *options, exc_model **model);
EXC_API exc_status exc_model_describe(const exc_model *model, exc_model_info *info);
EXC_API void exc_model_free(exc_model *model);

/* Prompt sets: a .txt or .jsonl file, tokenised by the model folder's tokenizer and chat template. */
typedef struct exc_prompts exc_prompts;
typedef struct exc_prompt_options {
    size_t size;
    int raw;              /* 1: text as it is, no chat template */
    const char *system;   /* system message put in front of text prompts, or NULL */
    const char *chat;     /* name of a built-in template to use, NULL: the one the model's own template hashes to */
    int limit;            /* use the first `limit` prompts; 0: all */
} exc_prompt_options;
#define EXC_PROMPT_OPTIONS {sizeof(exc_prompt_options)}
EXC_API exc_status exc_prompts_load(exc_ctx *ctx, const char *model_dir, const char *path, const exc_prompt_options *options,
                                    exc_prompts **prompts); /* [job] */
EXC_API int64_t exc_prompts_count(const exc_prompts *prompts);
EXC_API const int32_t *exc_prompts_tokens(const exc_prompts *prompts, int64_t i, int64_t *count); /* owned by prompts */
EXC_API void exc_prompts_free(exc_prompts *prompts);
/* [job] lines {"text","special"} or {"messages",..} in `in` -> {"ids"} in `out`; chat: a text is one user turn */
EXC_API exc_status exc_tokenize(exc_ctx *ctx, const char *model_dir, const char *in, const char *out, int chat, int force,
                                char **json);

typedef struct exc_forward_options {
    size_t size;
    int emit_logits, emit_hidden, emit_routing;
    int generate;         /* N: also `greedy` i32 [N], always N tokens */
    int batch_tokens;     /* tokens a prefill step takes at once; 0: chosen */
    int force;
} exc_forward_options;
#define EXC_FORWARD_OPTIONS {sizeof(exc_forward_options), 1, 0, 0}
EXC_API exc_status exc_forward(exc_ctx *ctx, exc_model *model, const exc_prompts *prompts, const exc_forward_options *options,
                               const char *out, char **json); /* [job] */

typedef struct exc_generate_options {
    size_t size;
    int max_new;          /* 0: 64 */
    float temperature;    /* 0: greedy */
    float top_p;          /* 0 or 1: off */
    uint64_t seed;
    int batch;            /* sequences at once; 0: chosen */
    int force;
} exc_generate_options;
#define EXC_GENERATE_OPTIONS {sizeof(exc_generate_options)}
/* [job] one JSON line a prompt: {"prompt","text","tokens","stop"} */
EXC_API exc_status exc_generate(exc_ctx *ctx, exc_model *model, const exc_prompts *prompts, const exc_generate_options *options,
                                const char *out, char **json);

/* --------------------------------------------------------------------------------------------------- exc_stats */
typedef struct exc_capture_options {
    size_t size;
    int decode;           /* feed this many greedy tokens back and observe them too; 0: prefill only */
    int no_out;           /* leave .out_sum out of the file; it follows from .mid_sum */
    int batch_tokens;     /* 0: chosen */
} exc_capture_options;
#define EXC_CAPTURE_OPTIONS {sizeof(exc_capture_options)}
/* [job] In a reproducible context terms are rounded to multiples of 2^-28 (squared norms: 2^-20) and added exactly, so bits do not
 * depend on batching or threads, and adding the stats of parts gives those of the whole (.out_sum: to f64 rounding) */
EXC_API exc_status exc_capture(exc_ctx *ctx, exc_model *model, const exc_prompts *target, const exc_prompts *baseline,
                               const exc_capture_options *options, exc_stats **stats, char **json);
EXC_API exc_status exc_stats_load(exc_ctx *ctx, const char *path, exc_stats **stats);
EXC_API exc_status exc_stats_save(exc_ctx *ctx, const exc_stats *stats, const char *path, int force);
EXC_API exc_status exc_stats_describe(exc_ctx *ctx, const exc_stats *stats, char **json); /* sizes, prompts, observed tokens */
EXC_API exc_status exc_stats_add(exc_ctx *ctx, exc_stats *into, const exc_stats *from); /* same model, else refused */
/* borrowed view of one array of the stats file ("target.prefill.count"); NULL if absent. shape has rank entries, <= 4 */
EXC_API const void *exc_stats_array(const exc_stats *stats, const char *name, const char **dtype, int *rank, int64_t shape[4]);
EXC_API void exc_stats_free(exc_stats *stats);

typedef struct exc_contrast_options {
    size_t size;
    double alpha;         /* smoothing of the log-ratio; 0: 0.5 */
    int resamples;        /* bootstrap over prompts; 0: 1000 */
    uint64_t seed;
} exc_contrast_options;
#define EXC_CONTRAST_OPTIONS {sizeof(exc_contrast_options)}
/* [job] writes the experts table (.csv or .jsonl by name); dirs may be NULL; json gets the top rows and totals */
EXC_API exc_status exc_contrast(exc_ctx *ctx, const exc_stats *stats, const exc_dirs *dirs, const exc_contrast_options *options,
                                const char *out, int force, char **json);

typedef enum exc_method { EXC_METHOD_MEAN, EXC_METHOD_PROJECTED, EXC_METHOD_SVD, EXC_METHOD_WHITENED } exc_method;
typedef struct exc_directions_options {
    size_t size;
    exc_method method;
    int rank;             /* 0: 1 */
    int per_expert;       /* also expert_basis [M,E,R,H] from the expert output sums */
} exc_directions_options;
#define EXC_DIRECTIONS_OPTIONS {sizeof(exc_directions_options)}
EXC_API exc_status exc_directions(exc_ctx *ctx, const exc_stats *stats, const exc_directions_options *options, exc_dirs **dirs,
                                  char **json); /* [job] */
EXC_API exc_status exc_dirs_load(exc_ctx *ctx, const char *path, exc_dirs **dirs);
EXC_API exc_status exc_dirs_save(exc_ctx *ctx, const exc_dirs *dirs, const char *path, int force);
EXC_API const float *exc_dirs_basis(const exc_dirs *dirs, int64_t *rows, int64_t *rank, int64_t *hidden); /* [L+1,R,H] */
EXC_API void exc_dirs_free(exc_dirs *dirs);

/* ------------------------------------------------------------------------------------------- plan, apply, verify */
typedef struct exc_plan_options {
    size_t size;
    const char *roles;    /* comma list; NULL: every role that writes the residual stream */
    const char *layers;   /* "0,4-40"; NULL: all */
    const char *select;   /* experts: NULL or "all"; "top:N" by output score; "logratio:N"; "q:0.05" */
    const char *strength; /* one number or a comma list, one a layer; NULL: 1 */
    const char *basis;    /* NULL: layer l uses row l+1; "n" or a fraction: that row for all layers */
    const char *norm;     /* NULL or "none", "column", "row" */
    const char *directions; /* path written into the plan, relative to the plan file */
    const char *round;    /* "rn", "sr", "exact": written into the plan; NULL: left open, which means rn */
} exc_plan_options;
#define EXC_PLAN_OPTIONS {sizeof(exc_plan_options)}
EXC_API exc_status exc_plan_make(exc_ctx *ctx, const char *model_dir, const exc_stats *stats, const exc_dirs *dirs,
                                 const exc_plan_options *options, exc_plan **plan, char **json); /* [job] */

/* how an edited weight becomes one that its format can store: the nearest; up or down by chance, right on average; or near
 * ones that together leave nothing of the direction (a solve, for formats whose spacing swallows the edit) */
typedef enum exc_rounding { EXC_ROUND_RN, EXC_ROUND_SR, EXC_ROUND_EXACT } exc_rounding;

typedef struct exc_apply_options {
    size_t size;
    int dry_run, force, sidecar, allow_nonfinite;
    const char *round;    /* "rn", "sr", "exact"; NULL: as the plan says ("rounding"), else rn */
    const char *to;       /* "bf16": quantised weights are written as bf16, headers and config.json to match; NULL: as stored */
} exc_apply_options;
#define EXC_APPLY_OPTIONS {sizeof(exc_apply_options)}
/* [job] writes the checkpoint OUT_DIR: same files, only the edited ranges differ; committed by one rename */
EXC_API exc_status exc_apply(exc_ctx *ctx, const char *model_dir, const exc_plan *plan, const char *out_dir,
                             const exc_apply_options *options, char **json);
/* [job] proves from the files alone that OUT_DIR is MODEL with only the plan's tensors changed; EXC_ERR_INPUT names a
 * difference. plan NULL: the one in OUT_DIR/excise */
EXC_API exc_status exc_verify(exc_ctx *ctx, const char *model_dir, const char *out_dir, const exc_plan *plan, char **json);

typedef struct exc_evaluate_options {
    size_t size;
    const char *target, *baseline, *neutral, *markers, *answers; /* files; any may be NULL */
    const char *system;
    int max_new;          /* 0: 48 */
    int examples;         /* example replies in the result; 0: 4 */
    uint64_t seed;        /* of the bootstrap intervals */
} exc_evaluate_options;
#define EXC_EVALUATE_OPTIONS {sizeof(exc_evaluate_options)}
/* [job] `model` is "after"; `against` is "before" and may be NULL */
EXC_API exc_status exc_evaluate(exc_ctx *ctx, exc_model *model, exc_model *against, const exc_evaluate_options *options,
                                char **json);
/* [job] the whole study: capture .. evaluate, resumable, one output folder */
EXC_API exc_status exc_run(exc_ctx *ctx, const char *job_json, int force, char **json);
EXC_API exc_status exc_report(exc_ctx *ctx, const char *run_dir, const char *out_html, int force, char **json); /* [job] */

/* ------------------------------------------------------------- [stream] tier: your tensors, your forward pass, our ops */
typedef enum exc_dtype {
    EXC_F32, EXC_BF16, EXC_F16, EXC_F64, EXC_I64, EXC_I32, EXC_U32, EXC_U8, EXC_F8_E4M3, EXC_F8_E8M0, EXC_F4, EXC_DTYPE_OTHER
} exc_dtype;
typedef enum exc_norm_restore { EXC_NORM_NONE, EXC_NORM_COLUMN, EXC_NORM_ROW } exc_norm_restore;

/* Routing gate, architectures: score, then top-k, then weights. ids descend by weight, ties to the lower id. */
typedef struct exc_gate {
    size_t size;
    int score;            /* 0 softmax over all, 1 sigmoid, 2 identity (softmax over the chosen) */
    int renorm;           /* divide the chosen weights by their sum */
    float renorm_eps;     /* added to that sum */
    float scale;          /* multiplies the weights; 0: 1 */
    int groups, groups_kept; /* group-limited selection; 0: off */
} exc_gate;
#define EXC_GATE {sizeof(exc_gate)}
/* [stream] logits f32 [T,E], bias f32 [E] or NULL (selection only) -> ids i32 [T,K], weights f32 [T,K] */
EXC_API exc_status exc_route(exc_ctx *ctx, const exc_gate *gate, const float *logits, const float *bias, int64_t tokens,
                             int64_t experts, int64_t top_k, int32_t *ids, float *weights);
/* [stream] adds to the caller's sums: count i64 [E], gate_sum f64 [E], mid_sum f64 [E,I] (any may be NULL) what tokens with
 * ids i32 [T,K] (-1: padding, not counted; on a GPU, where nobody looks, others outside 0..E-1 neither), weights f32 [T,K] and intermediates mid [T,K,I] (bf16 or f32) did */
EXC_API exc_status exc_observe(exc_ctx *ctx, const int32_t *ids, const float *weights, const void *mid, exc_dtype dtype,
                               int64_t tokens, int64_t experts, int64_t top_k, int64_t intermediate, int64_t *count,
                               double *gate_sum, double *mid_sum);
/* [stream] From now on exc_observe adds nothing while *enabled (i32, where ops run, borrowed) is 0; NULL: it always adds. The flag is
 * read when the work runs: a captured graph need not be made anew to switch observing off and on */
EXC_API exc_status exc_observe_when(exc_ctx *ctx, const int32_t *enabled);
/* [stream] W [H,I] <- W - strength R (R^T W), R f32 [R,H] rows orthonormal; c f32 [R,I] gets R^T W before, or NULL */
EXC_API exc_status exc_edit_matrix(exc_ctx *ctx, void *w, exc_dtype dtype, int64_t hidden, int64_t inner, const float *r,
                                   int64_t rank, float strength, exc_norm_restore norm, float *c);
/* [stream] the same for E matrices, stacked [E,H,I]; strength f32 [E], 0 leaves an expert's bytes untouched */
EXC_API exc_status exc_edit_experts(exc_ctx *ctx, void *w, exc_dtype dtype, int64_t experts, int64_t hidden, int64_t inner,
                                    const float *r, int64_t rank, const float *strength, exc_norm_restore norm, float *c);
/* [stream] virtual edit: y f32 [T,H] <- y - strength R^T (R y) */
EXC_API exc_status exc_project_output(exc_ctx *ctx, float *y, int64_t tokens, int64_t hidden, const float *r, int64_t rank,
                                      float strength);

#ifdef __cplusplus
}
#endif
#endif
