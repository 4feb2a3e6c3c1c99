/* loader.h - inside the model room: how packed weights are laid out and filled.
 *
 * Every mechanism of a layer (a token mixer, the feed-forward part) has one function that carves its weights out of
 * the slab and one that fills them from the files. Carving runs twice: with base NULL it only measures, so the two
 * cannot disagree. Weights lie where ops run: the host knows their addresses and does not look into them. */
#ifndef EXC_LOADER_H
#define EXC_LOADER_H

#include "model.h"

typedef struct exc_carve {
    uint8_t *base;              /* memory where ops run; NULL: only measuring */
    size_t at;
    uint8_t *host;              /* the host's own where ops run elsewhere; NULL: only measuring, or the same memory */
    size_t host_at;
    bool apart;                 /* ops run elsewhere */
    bool turns;                 /* matrices of experts take turns in a part of the room (exc_layer.turn) */
    bool overflow;
} exc_carve;
/* 64-byte aligned; NULL while measuring */
void *exc_carve_take(exc_carve *c, size_t count, size_t size); /* for ops: the host does not look into it */
void *exc_carve_keep(exc_carve *c, size_t count, size_t size); /* for the host */
/* a carving that measures; then make allocates what it came to and begins it anew */
exc_carve exc_carve_measure(const exc_ctx *ctx);
exc_status exc_slab_make(exc_ctx *ctx, exc_carve *c, const char *what, exc_slab *out);
void exc_slab_free(exc_ctx *ctx, exc_slab *s);

bool exc_keeps_codes(const exc_weight *w); /* quantised, and each of its panels lies within a block of scales */
int exc_carve_dtype(const exc_model *m, exc_role role, int64_t layer); /* of the packed form of a role's weights in a layer */
int exc_carve_join(const exc_model *m, int a, int b); /* of one matrix made of parts that by themselves would be a and b */
exc_packed exc_carve_packed(exc_carve *c, int64_t n, int64_t k, int dtype);
exc_packed exc_carve_role(exc_carve *c, const exc_model *m, exc_role role, int64_t layer);
exc_table exc_carve_table(exc_carve *c, int64_t count, int64_t n, int64_t k, int dtype);
exc_table exc_carve_group(exc_carve *c, const exc_model *m, exc_role role, int64_t layer); /* of all experts, or one matrix for other roles */
/* of experts, so many of which are in memory at a time */
exc_table exc_carve_turns(exc_carve *c, const exc_model *m, exc_role role, int64_t layer, int64_t turn);
float *exc_carve_vector(exc_carve *c, const exc_model *m, exc_role role, int64_t layer);   /* f32, of all experts; NULL: none */
exc_virtual exc_carve_lens(exc_carve *c, const exc_model *m, exc_role role, int64_t layer); /* what a virtual plan does there */
exc_virtual exc_lens_of(const exc_model *m, exc_role role, int64_t layer); /* the same by the plan's own arrays */
int64_t exc_whole_panels(int64_t n); /* n rounded up to EXC_PANEL */

typedef struct exc_stage { uint8_t *data; size_t bytes; } exc_stage;
typedef struct exc_loader {
    exc_ctx *ctx;
    exc_model *m;
    const exc_atlas *a;
    exc_stage stage; /* copy of a weight that the plan edits, or whose bytes are not aligned for their dtype */
    exc_stage dense; /* [out,in] of one that lies otherwise */
    exc_stage scale; /* scales of a quantised one, aligned, without gaps */
    /* where ops run */
    exc_stage codes, scales; /* rows of a weight and their scales on their way to a device */
    exc_stage part, part_scales; /* a view that does not lie dense, and its scales */
    exc_stage wide;  /* numbers of a quantised one, f32 */
    uint64_t done, total;
} exc_loader;
/* scans one matrix for NaN and infinity and packs it into `into`, from row `row` (whole panels) on */
exc_status exc_fill_rows(exc_loader *r, exc_role role, int64_t layer, const exc_packed *into, int64_t row);
exc_status exc_fill_role(exc_loader *r, exc_role role, int64_t layer, const exc_packed *into);
exc_status exc_fill_group(exc_loader *r, exc_role role, int64_t layer, const exc_table *into);
exc_status exc_fill_some(exc_loader *r, exc_role role, int64_t layer, const exc_table *into, int64_t first, int64_t n); /* of its matrices */
exc_status exc_fill_table(exc_loader *r, const exc_table *t); /* tells ops where its matrices are */
exc_status exc_fill_vector(exc_loader *r, exc_role role, int64_t layer, float *into); /* as f32 */
/* A whole matrix [out,in] where ops run, to be taken apart by views; holds until the next weight is read. A quantised one is as f32,
 * or codes and scales (else NULL) if `codes` says so. */
typedef struct exc_matrix { const exc_weight *weight; const uint8_t *data, *scale; int dtype; } exc_matrix;
exc_status exc_fill_open(exc_loader *r, exc_role role, int64_t layer, bool codes, exc_matrix *out); /* scanned for NaN and infinity */
/* packs into [n,k] the elements (i,j) at first + i*row_step + j*column_step of the matrix; of codes, (0,0) begins a block of scales */
exc_status exc_fill_view(exc_loader *r, const exc_matrix *from, int64_t first, int64_t row_step, int64_t column_step,
                         const exc_packed *into);
/* `count` times `rows` rows of a matrix, from and to rows that many apart */
typedef struct exc_moved { int64_t from, from_step, to, to_step, rows, count; } exc_moved;
/* where the scales of a panel of moved rows lie among the weight's, or one of these: in several places; it has no rows */
#define EXC_SCALES_MIXED (-1)
#define EXC_SCALES_NONE (-2)
int64_t exc_scales_of_panel(const exc_weight *w, const exc_moved *moved, size_t n, int64_t panel);
int exc_carve_moved(const exc_model *m, exc_role role, int64_t layer, const exc_moved *moved, size_t n, int64_t rows); /* dtype of the result */
/* packs a matrix [rows,in] of rows of the role's in another order, those that nothing moves to zero, from row `at` of `into` on */
exc_status exc_fill_moved(exc_loader *r, exc_role role, int64_t layer, const exc_moved *moved, size_t n, int64_t rows,
                          const exc_packed *into, int64_t at);
exc_status exc_fill_turned(exc_loader *r, exc_role role, int64_t layer, float *into); /* a small matrix as f32 [in,out] */
exc_status exc_fill_close(exc_loader *r, const exc_matrix *m);
exc_status exc_fill_lens(exc_loader *r, exc_role role, int64_t layer, const exc_virtual *v);

/* the part of a layer behind the mixer: experts, shared expert, dense MLP (feed.c) */
void exc_feed_carve(exc_carve *c, const exc_model *m, exc_layer *y, int64_t layer);
exc_status exc_feed_fill(exc_loader *r, exc_layer *y, int64_t layer);
exc_status exc_feed_fill_down(exc_loader *r, exc_layer *y, int64_t layer); /* only what exc_model_down reads */
/* experts first.. of a layer whose experts take turns */
exc_status exc_feed_fill_turn(exc_loader *r, const exc_layer *y, int64_t layer, int64_t first, exc_extent extent);

/* a place of layers: memory for one (-1: for any), and its weights read into it */
exc_status exc_layer_room(exc_ctx *ctx, exc_model *m, int64_t layer, exc_slab *slab);
void exc_layer_drop(exc_ctx *ctx, exc_model *m, exc_slab *slab);
exc_status exc_layer_fill(exc_loader *r, exc_place *p, int64_t layer, exc_extent extent); /* where experts take turns, without them */
void exc_loader_release(exc_loader *r);

#endif
