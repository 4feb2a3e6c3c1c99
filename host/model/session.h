/* session.h - inside the model room: a session's buffers, and the table of functions that each kind of token mixer
 * brings.
 *
 * forward.c walks layers: norm, mixer, norm, feed. What a mixer needs (weights, buffers, a cache or a recurrent state) only
 * its own file knows; it carves them from the session's slab, which is allocated once, so that a step allocates
 * nothing. A step of many rows goes through each layer in chunks of at most T rows, which is what the buffers hold, so that
 * the weights of a layer are needed once a step. What a layer leaves for the next one is of all rows of the step, R. */
#ifndef EXC_SESSION_H
#define EXC_SESSION_H

#include "loader.h"

#define EXC_RING_ALIGN 64 /* a ring has a multiple of so many rows, for op attend */

typedef struct exc_softmax_room {
    float *qkv;                     /* [T, q|k|v] */
    void *q, *o;                    /* [T, heads*D] act */
    void *cache_k, *cache_v;        /* planes of [cache_tokens or ring_tokens, kv_heads*D] act */
} exc_softmax_room;

typedef struct exc_latent_room {
    float *first;                   /* [T, queries or their latent | latent row] */
    void *q_a;                      /* [T, q_rank] act */
    float *q;                       /* [T, heads*(N+R)]; NULL: they are in `first` */
    void *out;                      /* [T, heads*V] act */
    void *cache;                    /* [planes, cache_tokens, C+R] act */
    void *plain, *wide, *sums;      /* absorbed: [T, heads*N], [T, heads*(C+R)], [T, heads*C] act */
    void *queries, *keys, *values;  /* expanded: [T, heads*(N+R)] twice, [T, heads*V] act */
    void *rows;                     /* expanded: [T, C+R] act */
} exc_latent_room;

typedef struct exc_linear_room {
    float *in;                      /* [T, q|k|v|z] */
    float *gates;                   /* [T, beta|step] */
    float *qkv;                     /* [T, q|k|v] behind the convolution */
    float *out;                     /* [T, v_heads*v_dim] */
    void *x;                        /* the same, normed and gated, act */
    float *ring, *state;            /* [planes, slots, ring_step] and [.., state_step]: what conv and delta keep */
    int64_t ring_step, state_step;
} exc_linear_room;

/* What ops read of the rows and sequences of a step: one block, laid out by the host and put where ops run once a step. Steps of
 * one shape, decode above all, find it at the same addresses. Sequences stand chunk by chunk. */
typedef struct exc_inputs {
    int64_t *cache_row;             /* [R] row of the cache */
    int64_t *ring_row, *ring_base;  /* the same and [slots + chunks], in layers that keep a ring; NULL: none does */
    int64_t *begin;                 /* [slots + 2 chunks] rows of each sequence in its chunk, one more a chunk */
    int64_t *base, *length;         /* [slots + chunks] where the slot's cache rows are, and tokens it holds then */
    int64_t *groups;                /* [2 chunks] 0 and the chunk's rows: the groups of an expert that all tokens have */
    int32_t *tokens, *position;     /* [R] */
    int32_t *observe;               /* [R] or NULL */
    int32_t *slot;                  /* [slots + chunks] */
    int32_t *last;                  /* [slots] last row of each sequence of the step */
} exc_inputs;

/* what a step leaves for the host, fetched at once */
typedef struct exc_found {
    int64_t bad, index;             /* NaN and infinities in the stream after the last layer, and the first of them */
    int32_t token[];                /* [slots] drawn */
} exc_found;

/* Rows of a step that go through a layer together: whole sequences where they fit, else a stretch of one. */
typedef struct exc_chunk {
    int64_t row, rows;              /* of the step */
    int64_t at, sequences;          /* entries of slot, base, length */
    int64_t begin;                  /* and of begin, one more */
    int64_t groups;                 /* and of groups */
    int64_t longest;                /* of length */
} exc_chunk;

/* of a whole step */
typedef struct exc_whole {
    int64_t rows;                   /* of the last step */
    float *h;                       /* [R,H] residual stream */
    exc_inputs here, there;         /* for the host, and for ops: one on the CPU */
    void *block_here, *block_there; /* they lie in */
    exc_chunk *chunk;               /* [most_chunks] the host's */
    int64_t chunks;
} exc_whole;

/* what the launches of a step depend on beside its inputs (replay.c) */
typedef struct exc_mark {
    void *work;
    int64_t rows, bound;
    uint64_t dealt;                 /* of several ranks: rows of each */
    const void *logits, *hidden, *hidden_last, *router_ids, *router_weights, *observe;
    exc_sums sums;
    int64_t logits_all;
} exc_mark;
typedef struct exc_graph {
    exc_mark mark;
    void *run;                      /* NULL: seen once */
    uint64_t used;                  /* turn, 0: free */
} exc_graph;
#define EXC_GRAPHS 8

/* Pointers are to memory where ops run, but for base, capacity, length, chunk and what is called `here`. */

struct exc_session {
    exc_ctx *ctx;
    exc_model *m;
    int64_t slots, cache_tokens;
    int64_t ring, ring_tokens;      /* cache rows of a slot, of all, in layers with a window; 0: these keep all tokens, as others */
    int64_t step_rows;              /* R, rows of a step */
    int64_t step_tokens;            /* T, rows of a chunk */
    bool once;                      /* caches of one layer a kind: sequences begin and end in a step */
    exc_whole whole;
    int64_t used_slots;             /* of the last reset */
    int64_t *base, *capacity;       /* [slots] cache rows of a slot */
    int64_t *length;                /* [slots] tokens it holds */
    float *h;                       /* [T,H] residual stream of the chunk, in whole.h */
    void *x;                        /* [T,H] act: normed rows */
    exc_softmax_room softmax;
    exc_linear_room linear;
    exc_latent_room latent;
    float *router;                  /* [T,E] */
    int32_t *ids;                   /* [T,K] */
    float *weights;                 /* [T,K] */
    int64_t *offset;                /* [E+1] */
    int64_t *offset_turn;           /* [E+1] the host's: of the experts whose turn it is */
    int32_t *row_of, *pair_of;      /* [T*K] */
    void *mid;                      /* [T*K,I], [T,shared] or [T,dense] act; over ranks also [rows that come in,I] */
    float *y;                       /* [T*K,H] */
    float *last;                    /* [max(slots,64),H] rows that get logits */
    void *last_x;                   /* the same, normed, act */
    exc_inputs here, there;         /* of the chunk, in those of whole */
    int64_t longest;                /* of here.length */
    double *random;                 /* [slots] what a draw takes */
    exc_found *found_here, *found_there; /* one on the CPU */
    int32_t *zero_ids;              /* [T] zeros: the single "expert" of dense writers */
    int32_t *own_row;               /* [T] 0,1,2,..: and its row */
    float *ones;                    /* [T] and its weight */
    exc_graph graph[EXC_GRAPHS];    /* on a device */
    uint64_t turn, replayed;        /* steps that qualified, and those replayed */
    struct exc_spread *spread;      /* buffers for work with other ranks; NULL alone */
    exc_slab slab;
    size_t bytes;                   /* where ops run */
};

/* One kind of token mixer. `run` takes a chunk: t has its sequences and rows. It adds the mixer's output for the normed rows s->x to the stream s->h. */
typedef struct exc_mixer {
    void (*carve)(exc_carve *c, const exc_model *m, exc_layer *y, int64_t layer);
    exc_status (*fill)(exc_loader *r, exc_layer *y, int64_t layer);
    void (*room)(exc_carve *c, exc_session *s);                /* buffers and caches of all its layers */
    int64_t (*cached)(const exc_shape *s);                     /* values that a layer keeps of each token */
    int64_t (*held)(const exc_shape *s);                       /* bytes that a layer keeps of each sequence; NULL: none */
    exc_status (*run)(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows);
} exc_mixer;
extern const exc_mixer exc_mixer_softmax; /* attention.c */
extern const exc_mixer exc_mixer_latent;  /* mla.c */
extern const exc_mixer exc_mixer_linear;  /* linear.c */
const exc_mixer *exc_mixer_of(exc_mix kind); /* forward.c */

/* One op call; a refusal is a fault of the caller, and says which call. Scratch grows where an op asks for more. */
#define EXC_RUN(s, op, ...)                                                                                                     \
    do {                                                                                                                        \
        exc_ctx *run_ = (s)->ctx;                                                                                               \
        const struct exc_##op##_args args_ = {__VA_ARGS__};                                                                     \
        exc_status ran_ = run_->ops->op(&run_->queue, &args_);                                                                  \
        if (exc_device_grew(run_, ran_)) ran_ = run_->ops->op(&run_->queue, &args_);                                            \
        EXC_TRY(exc_op_checked(run_, #op, ran_));                                                                               \
    } while (0)
exc_status exc_op_checked(exc_ctx *ctx, const char *op, exc_status st);

/* everything of a step behind the placing of its rows; with all sequences at one row, as a graph where that serves (replay.c) */
exc_status exc_session_run(exc_session *s, const exc_step *t);
exc_status exc_replay_step(exc_session *s, const exc_step *t);
void exc_replay_close(exc_session *s);
size_t exc_act_bytes(const exc_model *m);
/* caches and recurrent states lie in planes, one a layer of the kind, or one for all */
int64_t exc_plane(const exc_session *s, int64_t layer);
int64_t exc_planes(const exc_session *s, exc_mix kind);
/* rows [rows,H] of the stream, normed, as act */
exc_status exc_norm_rows(exc_session *s, const float *x, const float *weight, int64_t rows, void *y);
/* a writer of the stream: h += x W^T + bias (or NULL), x act [rows,width]; a virtual edit is applied on the way */
exc_status exc_write_stream(exc_session *s, const void *x, int64_t width, const exc_packed *w, const float *bias, const exc_virtual *v,
                            int64_t rows);
/* experts, shared expert or dense MLP of a layer on s->x, with the sums that the step asks for (feed.c) */
exc_status exc_feed_run(exc_session *s, const exc_layer *y, int64_t layer, const exc_step *t, int64_t rows);
void exc_feed_room(exc_carve *c, exc_session *s);
/* the experts' two products: x act [tokens,H], grouping as op glu has it, y f32 [rows,H]; slot marks observed tokens; sums may
 * be NULL. `experts` of them from the rank's first on. */
exc_status exc_feed_experts(exc_session *s, const exc_layer *y, const void *x, const int64_t *offset, const int32_t *pair_of,
                            int64_t tokens, int64_t top_k, int64_t experts, float *out, const int32_t *slot, double *mid_sum,
                            double *sqnorm_sum);

/* ---- several ranks (spread.c) */
exc_status exc_session_part(exc_session *s, const exc_step *t); /* a step over the sequences of this rank */
int64_t exc_chunks_more(const exc_session *s, int64_t left, int64_t *rows); /* that a sequence begins, after `rows` in the last one */
int64_t exc_spread_chunks(const exc_session *s); /* of the step at hand: all ranks make as many */
exc_status exc_session_part_logits(exc_session *s, int64_t first, int64_t rows, float *logits); /* of this rank's rows */
int64_t exc_spread_pairs(const exc_session *s); /* at most so many rows go through the experts of this rank, of all ranks in a chunk */
void exc_spread_room(exc_carve *c, exc_session *s);
bool exc_spread_owns(const exc_session *s, int64_t slot);
exc_status exc_spread_step(exc_session *s, const exc_step *t);
exc_status exc_spread_logits(exc_session *s, int64_t first, int64_t rows, float *logits);
/* s->x [rows,H] with choices ids [rows,K], grouped by s->offset, s->pair_of, through the experts wherever they are; outputs to s->y in
 * that grouping. mark [rows]: prompt number or -1, or NULL. sums: of this layer, [E] whole; each rank adds to its own experts' part */
exc_status exc_spread_experts(exc_session *s, const exc_layer *y, const int32_t *ids, int64_t rows, const int32_t *mark,
                              const exc_sums *sums);
/* whether the step's launches do not depend on what the router says; and a hash of the rows of each rank, on which they do */
bool exc_spread_steady(const exc_session *s, uint64_t *dealt);

#endif
