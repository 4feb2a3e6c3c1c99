/* study.h - from taps to stats, directions, plans and edits, and the proof of what was done. The nouns of excise.h that
 * belong to this room; all of them are plain data. */
#ifndef EXC_STUDY_H
#define EXC_STUDY_H

#include "base.h"
#include "files.h"
#include "model.h"

enum { EXC_TARGET = 0, EXC_BASELINE = 1 };
enum { EXC_PREFILL = 0, EXC_DECODE = 1 };

/* One (label, phase) group of sums; arrays as in the stats file. */
typedef struct exc_group {
    int64_t *count;      /* [M,E] */
    double *gate_sum;    /* [M,E] */
    int64_t *tokens;     /* [M] */
    double *mid_sum;     /* [M,E,I] */
    double *out_sum;     /* [M,E,H] or NULL (no_out) */
    double *sqnorm_sum;  /* [M,E] */
    double *shared_out_sum; /* [M,H]; NULL when the family has no shared experts */
} exc_group;

struct exc_stats {
    int64_t layers, moe_layers, experts, top_k, inner, hidden;
    int64_t *layer_of;   /* [M] decoder layer of each row */
    exc_group group[2][2];       /* [label][phase] */
    int64_t prompts[2];          /* [label] P */
    uint32_t *prompt_count[2];   /* [P,M,E] prefill */
    float *resid_last[2];        /* [P,L+1,H] */
    char fingerprint[33];
    char *prompt_hashes[2];      /* comma list: merging appends */
    char *options;               /* JSON text: what was observed by which rule */
    int decode;                  /* tokens fed back */
};

struct exc_dirs {
    int64_t rows, rank, hidden;  /* rows = L+1 */
    float *basis;                /* [L+1,R,H] rows orthonormal, or all zero: no direction there */
    float *singular;             /* [L+1,R] */
    float *mean_difference;      /* [L+1,H] */
    int64_t moe_layers, experts; /* of expert_basis */
    float *expert_basis;         /* [M,E,R,H] or NULL */
    char fingerprint[33];
    char *options;               /* JSON text: method, rank, stats hashes */
};

typedef enum exc_edit_op {
    EXC_EDIT_PROJECT, EXC_EDIT_PROJECT_INPUT, EXC_EDIT_ROUTER_PROJECT, EXC_EDIT_SCALE, EXC_EDIT_MASK, EXC_EDIT_ROUTER_SCALE,
    EXC_EDIT_ROUTER_BIAS
} exc_edit_op;

typedef struct exc_edit {
    exc_edit_op op;
    exc_role role;
    int64_t *layers; int64_t n_layers;   /* NULL: every decoder layer that has the role */
    int64_t *experts; int64_t n_experts; /* NULL: all */
    double *strength; int64_t n_strength; /* 1, or one a layer */
    bool by_layer;                       /* strength is a list: as long as the layers */
    double *values; int64_t n_values;    /* router_bias */
    double basis; int has_basis;         /* fixed (or fractional) row; else layer l uses row l+1 */
    exc_norm_restore norm;
} exc_edit;

struct exc_plan {
    exc_edit *edits; int64_t n_edits;
    char fingerprint[33];        /* "" in a hand-written plan */
    char *directions;            /* path as the plan has it, or NULL */
    exc_dirs *dirs;              /* owned; NULL if no edit needs one */
    exc_rounding rounding; bool has_rounding;
    json_t *source;              /* the JSON it came from: saved back unchanged */
    char *path;                  /* file it was read from, for messages; NULL when made in memory */
};

/* table.c: the experts table in memory, [M,E] rows in the order of the stats; NaN where there is no number. The decode phase
 * has no counts by prompt, hence no errors: log_ratio and risk alone. Arrays of a phase that was not observed are NULL, and so
 * are projection and score without directions or output sums. `choices` may be NULL: the defaults. */
typedef struct exc_experts {
    int64_t moe_layers, experts;
    struct { double *log_ratio, *se, *z, *p, *q, *risk; } phase[2];
    double *projection; /* difference of output a token, target less baseline, along the mean difference within the subspace */
    double *score;      /* length in the subspace of the same difference, outputs times mean gate weight: "top:N" ranks by it */
    double *slab;
} exc_experts;
exc_status exc_experts_make(exc_ctx *ctx, const exc_stats *s, const exc_dirs *d, const exc_contrast_options *choices, exc_experts *out);
void exc_experts_free(exc_experts *t);

/* compiled.c: what the plan does to one weight, in order; the one routine behind baked and written forms */
typedef struct exc_compiled exc_compiled; /* a plan checked against one atlas: per weight a list of steps with bases */
exc_status exc_plan_compile(exc_ctx *ctx, const exc_atlas *a, const exc_plan *p, exc_compiled **out);
bool exc_compiled_touches(const exc_compiled *c, const exc_weight *w);
/* router biases that the family cannot store, f32 [M,E]: they need a sidecar; NULL when the plan has none */
const float *exc_compiled_sidecar(const exc_compiled *c);
/* What the edits of a weight did. before, after: |R W|^2 of old and new, summed over its projections (0: none); changed: elements
 * whose bits changed, summed over its edits; nonfinite: NaN and infinities it came with; overflow: new infinities. For quantised
 * weights and other rounding than to nearest: moved, error, size: squared lengths of the edit before rounding, of what
 * rounding did, of the weight (0: not taken). */
typedef struct exc_effect { double before, after, moved, error, size; int64_t changed, nonfinite, overflow; } exc_effect;
/* Applies every edit to `count` weights of one role and layer; src and dst [count] pointers to [out,in] in the stored dtype,
 * aligned for it; dst[i] may be src[i]; scale [count] arrays without gaps of quantised ones, edited in place, or NULL. Every edit is rounded once, whatever is edited beside it: baked and written agree. */
exc_status exc_compiled_apply(exc_ctx *ctx, const exc_compiled *c, const exc_weight *const *w, size_t count,
                              const void *const *src, void *const *dst, void *const *scale, exc_effect *effects);
void exc_compiled_free(exc_compiled *c);

/* Names that the report (sections.c) reads from the results of the verbs; what is missing is left out of the page.
 * experts.csv: layer, expert, output_projection, score, and by phase (prefill_, decode_): log_ratio, se, z, q, risk_difference.
 * exc_directions: {"rows":[{"energy"}]}, one a row of the basis, row 0 the embedding.
 * exc_apply: {"roles":[{"role","layer","edited","present","residual"}]}, residual = |R W'| / |R W| of the role in that layer. */

#endif
