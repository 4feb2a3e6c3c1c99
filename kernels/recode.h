/* recode.h - the sweeps of an edit over a band of quantised weights, whole and in registers: what requant.c does piece by piece through
 * buffers, bit for bit, for bands without NaN and with scales of ordinary size, rounded to nearest.
 *
 * A band is 128 lines (or 64, the last of a matrix) side by side in rows of codes, as they are stored for EXC_SIDE_OUT or turned for
 * EXC_SIDE_IN. Arrays of lines are in their order, sums are f32 within 32 rows and f64 beyond. */
#ifndef EXC_RECODE_H
#define EXC_RECODE_H

#include "codes.h"
#include "ops.h"

#define EXC_BAND 128      /* lines */
#define EXC_BAND_PIECE 32 /* rows of an f32 sum */

typedef struct exc_recode {
    int dtype, lines;
    int64_t rows, rank;
    const uint8_t *from;
    uint8_t *to;
    int64_t stride;        /* bytes from row to row, of both */
    const uint8_t *next;   /* the codes of the band to come, or NULL: asked for while this one is rounded */
    int64_t next_stride;
    int fetched;           /* this band has been asked for */
    const float *basis;    /* [rank, rows] */
    const float *coef;     /* [rank, EXC_BAND] */
    const float *lambda;   /* [rank, EXC_BAND] of exact rounding */
    const float *gain;     /* [EXC_BAND] or NULL: lengths are not restored */
    const float *old, *now; /* scales: e4m3 [rows / 128], fp4 [rows, 4] */
    double *sums;          /* [rank, EXC_BAND]: R W, or R Q */
    double *length, *moved, *error; /* [EXC_BAND] squares, NULL where not wanted */
    uint8_t *most;         /* [rows / 128] of e4m3: the largest code of a block without its sign */
    int64_t changed;       /* codes */
    double *wide;          /* room of [rank, EXC_BAND] */
    float *held;           /* and twice as much */
} exc_recode;

typedef struct exc_recoder {
    void (*dots)(exc_recode *);   /* sums and length of the weights, most */
    void (*left)(exc_recode *);   /* length of what they become before the gain */
    void (*result)(exc_recode *); /* codes, sums of them, moved, error, changed */
    void (*solved)(exc_recode *); /* the same after R^T lambda was taken off */
    void (*meant)(exc_recode *);  /* sums of the result before it is rounded */
    void (*trial)(exc_recode *);  /* sums of what `solved` would store */
} exc_recoder;

/* NULL: this machine, dtype or number of lines has none */
const exc_recoder *exc_recoder_for(int dtype, int lines);

/* bytes [rows, cols] as [cols, rows] */
void exc_turn(const uint8_t *from, int64_t stride, int64_t rows, int64_t cols, uint8_t *to, int64_t to_stride);

/* scales with which no step of the arithmetic leaves the range of normal numbers */
static inline int exc_scale_is_ordinary(float s) { return s >= 0x1p-100f && s <= 0x1p100f; }

#endif
