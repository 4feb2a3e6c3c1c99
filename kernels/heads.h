/* heads.h - the arithmetic under attention, one table an instruction set (heads.c): rows of keys and values unpacked
 * to f32 and small matrix products on them. */
#ifndef EXC_HEADS_H
#define EXC_HEADS_H

#include "lanes.h"

#define EXC_KEYS 64 /* keys of a block: the columns of a product with them */

typedef struct exc_heads {
    /* c[h][16*vectors] = (add ? c : 0) + a[h][0..k) b[0..k)[16*vectors], one chain of multiply-adds an element over
     * ascending k; rows 1..4, vectors 1..4; strides in floats */
    void (*multiply)(const float *a, int64_t a_stride, int rows, const float *b, int64_t b_stride, int64_t k, float *c,
                     int64_t c_stride, int vectors, int add);
    /* keys [n][dim] act, row stride in elements -> [dim][EXC_KEYS] f32, columns n up to the next multiple of 16 zero */
    void (*turn)(const void *keys, int64_t stride, int act, int n, int64_t dim, float *out);
    /* n rows [dim] act -> f32 rows of `width` >= dim floats, the rest zero */
    void (*widen)(const void *rows, int64_t stride, int act, int n, int64_t dim, int64_t width, float *out);
    /* One row of scores s [EXC_KEYS], the first n visible: s = exp(scale*s - m), m and sum brought up to date;
     * returns in *factor what earlier sums of the row are multiplied by */
    void (*soften)(float *s, int n, float scale, float *m, float *sum, float *factor);
    void (*scale)(float *x, int64_t n, float by);
    void (*round)(const float *x, int64_t n, float by, void *out, int act); /* out = act(x * by) */
    /* Scores of bf16 queries and keys by products of pairs, where the machine has them, else NULL. dim is even: a word is channels
     * 2i and 2i+1. Keys turn to words [dim/2][EXC_KEYS]; c[h][16*vectors] = a[h] b, one chain over ascending pairs an element. */
    void (*turn_pairs)(const void *keys, int64_t stride, int n, int64_t dim, uint32_t *out);
    void (*dot)(const uint32_t *a, int64_t a_stride, int rows, const uint32_t *b, int64_t pairs, float *c, int64_t c_stride,
                int vectors);
} exc_heads;

const exc_heads *exc_heads_for(void);

#endif
