/* edits.h - what the files of the editing half of this room share: a plan compiled for one model (compiled.c) as the virtual
 * lens reads it, and what apply and verify say about edited weights (edited.c). */
#ifndef EXC_EDITS_H
#define EXC_EDITS_H

#include "study.h"

/* One step: one edit of the plan in one layer. `amount` has one number a matrix: [E] where the role has experts, or is
 * a router whose rows are edited one by one, else [1]. A projection of strength 0 and a factor of 1 leave a matrix alone. */
typedef struct exc_edit_step {
    exc_role role;
    int64_t layer, edit;   /* edit: its number in the plan */
    bool scales;           /* amount is a factor, else the strength of a projection */
    bool adds;             /* amount is added to a vector, one number an element; nothing else here matters then */
    bool rows;             /* the matrices are the rows of one weight */
    bool follows;          /* the bias of the weight that the step before edits */
    int side;              /* EXC_SIDE_OUT, EXC_SIDE_IN */
    exc_norm_restore norm;
    float *basis;          /* [rank,H] orthonormal, no zero rows */
    int64_t rank;
    double *amount;
    int64_t n_amount;
    int64_t next;          /* the next step of the same role and layer, -1: none */
} exc_edit_step;

struct exc_compiled {
    const exc_atlas *a;
    const char *name;      /* of the plan, for messages */
    exc_rounding rounding; /* the plan's, or what apply was asked for */
    exc_edit_step *steps;
    int64_t n_steps, cap;
    int64_t *head;         /* [EXC_ROLES, L+1] first step of a role and layer (L: weights without one), -1: none */
    float *sidecar;        /* [M,E] or NULL */
};
/* first step of a role and layer in plan order, NULL: none; exc_next_step goes on */
const exc_edit_step *exc_first_step(const exc_compiled *c, exc_role role, int64_t layer);
const exc_edit_step *exc_next_step(const exc_compiled *c, const exc_edit_step *s);
/* does step s change weight w (number of its matrices that it changes)? */
int64_t exc_step_changes(const exc_edit_step *s, const exc_weight *w);

/* plan.c */
exc_status exc_plan_parse(exc_ctx *ctx, const char *what, const json_t *source, exc_plan **out); /* keeps a reference */
exc_status exc_plan_text(exc_ctx *ctx, const json_t *source, exc_buf *b);
const char *exc_rounding_name(exc_rounding r); /* as plans spell it */
bool exc_rounding_find(const char *name, exc_rounding *out);
exc_status exc_dirs_copy(exc_ctx *ctx, const exc_dirs *from, exc_dirs **out);
/* "0,4-40" or a JSON list of numbers and ranges -> numbers, each once, in the order given */
exc_status exc_numbers(exc_ctx *ctx, const char *what, const char *key, const json_t *v, int64_t **out, int64_t *n);
exc_status exc_numbers_text(exc_ctx *ctx, const char *what, const char *key, const char *text, int64_t **out, int64_t *n);

/* edited.c: the weights that a plan edits, in batches, and what became of them */
/* A stretch of a file that edits change: one weight, or several whose rows take turns (gates and ups may). */
typedef struct exc_edited_range {
    int file;
    uint64_t begin, end;
    const size_t *at;      /* [n] places in e->w */
    size_t n;
} exc_edited_range;
typedef struct exc_edited {
    exc_ctx *ctx;
    const exc_atlas *a;
    const exc_compiled *c;
    bool allow_nonfinite;
    const exc_weight **w;  /* [n] edited weights, by role, layer, expert */
    size_t n;
    size_t *order;         /* [n] their places as the files have them */
    exc_edited_range *range; /* [n_ranges] in the order of the files */
    size_t n_ranges;
    exc_effect *effect;    /* [n] */
    char (*hash)[2][33];   /* [n] XXH3-128 of old and new bytes; NULL: not wanted */
    uint64_t bytes;
    /* quantised ones (scales.c): their new scales, and where these lie; all NULL and 0 when there are none */
    uint8_t **scale, *scale_slab; /* [n], NULL entries: not quantised */
    size_t *scaled;
    exc_edited_range *stretch; /* [n_stretches] */
    size_t n_stretches;
} exc_edited;
exc_status exc_edited_open(exc_ctx *ctx, const exc_compiled *c, bool hashes, exc_edited *e);
void exc_edited_close(exc_edited *e);
/* new bytes of n ranges, in any order */
exc_status exc_edited_batch(exc_edited *e, const exc_edited_range *const *r, size_t n, const void *const *src, void *const *dst);
/* walks all ranges from the map through a buffer, batch by batch; visit (may be NULL) sees the new bytes */
typedef exc_status (*exc_edited_fn)(void *user, const exc_edited *e, const exc_edited_range *r, const void *dst);
exc_status exc_edited_walk(exc_edited *e, const char *step, exc_edited_fn visit, void *user);
/* scales.c. Stretches of scales come when all codes of their weights are done: apply writes them, verify compares them. */
exc_status exc_edited_scales(exc_edited *e);
void exc_edited_old_scale(exc_edited *e, size_t at);
void exc_edited_scales_close(exc_edited *e);
exc_status exc_edited_each_stretch(const exc_edited *e, exc_edited_fn visit, void *user);
/* widened.c: the checkpoint with its quantised tensors as bf16. What stands for tensor t in the new one (false: a scale, gone); all
 * tensors of a file, edited, one after the other; the files of a new checkpoint; the same without writing; its config.json */
typedef struct exc_widened {
    char name[512];
    exc_dtype dtype;
    int rank;
    int64_t shape[8];
    uint64_t bytes;
    const void *data;
} exc_widened;
typedef exc_status (*exc_widened_fn)(void *user, const exc_tensor *t, const exc_widened *w);
bool exc_widened_describe(const exc_checkpoint *c, const exc_tensor *t, exc_widened *out);
exc_status exc_widened_make(exc_edited *e, int file, const char *step, exc_widened_fn visit, void *user);
exc_status exc_widened_write(exc_edited *e, exc_publish *p);
exc_status exc_widened_try(exc_edited *e);
json_t *exc_widened_config(const exc_checkpoint *c); /* new reference */
/* {"tensors_edited",..,"roles":[..],"tensors":[..]} added to o */
void exc_edited_facts(const exc_edited *e, json_t *o);

/* bytes of excise/sidecar.safetensors into `path` */
exc_status exc_sidecar_save(exc_ctx *ctx, const exc_compiled *c, const char *path);
exc_status exc_sidecar_check(exc_ctx *ctx, const exc_compiled *c, const char *path);

#endif
