/* band.h - a band of quantised weights under edit: 128 lines across R in pieces of 32 along it (requant.c), where its scales lie, and
 * the policy by which they change. */
#ifndef EXC_BAND_H
#define EXC_BAND_H

#include <math.h>
#include <string.h>

#include "lanes.h"
#include "recode.h"

#define BAND EXC_BAND
#define PIECE EXC_BAND_PIECE /* along R: one group of fp4 */
#define MOST_RANK 64
#define CARVED ((size_t)1 << 20) /* of the scratch of worker 0: sums of bands, gains of rows */

typedef struct tally {
    double before, after, moved, error, size;
    int64_t changed, nonfinite;
} tally;

typedef struct job {
    const struct exc_project_args *a;
    exc_queue *q;
    int out;                          /* EXC_SIDE_OUT */
    int64_t along, whole, bands;      /* sizes along R and across; bands of a matrix */
    int64_t first;                    /* matrix of task 0 */
    int64_t total, per_task;          /* bands of a round, of a task */
    tally *sums;                      /* [matrices of a round, bands] */
    float *row_gain;                  /* [along] or NULL: lengths of rows across bands */
    const double *factor;             /* [count] or NULL: W' = factor W instead */
} job;

typedef float lane[BAND];

typedef struct band {
    const job *j;
    int64_t matrix, at; /* first line */
    int lines;
    const uint8_t *src, *scale;
    uint8_t *dst, *scale_to;
    uint32_t key;
    int coded, bare;    /* bare: no trials, lambda is zero */
    float base;         /* old scales times this are kept where they can be */
    float *kept;        /* new scales in order of the sweep */
    tally *t;
    /* an ordinary band is swept as a whole: scales as they were in the order of kept, rows of EXC_SIDE_IN turned into columns,
     * [along, BAND], largest codes of blocks, how far rows move, and its own room */
    const exc_recoder *by; /* and what sweeps it, or NULL */
    exc_recode whole;
    int last, asked, was_asked; /* of its task; it has asked for the next one; the one before has asked for it */
    float *old, *reach;
    uint8_t *turned, *largest;
    double wide[MOST_RANK][BAND];
    lane held[2 * MOST_RANK];
    double acc[MOST_RANK][BAND];
    lane coef[MOST_RANK]; /* strength * R W */
    lane gain, ones, most;
    double length[BAND], left[BAND];
    /* solver: by direction and line */
    double target[MOST_RANK][BAND];
    lane lambda[MOST_RANK], past[MOST_RANK], best[MOST_RANK];
    lane gap[MOST_RANK], past_gap[MOST_RANK], low[2], high[2]; /* low, high: lambda and gap that bracket the zero, rank 1 */
    double best_gap[BAND];
    /* a piece */
    lane x[PIECE], ideal[PIECE], value[PIECE], old_scale[PIECE], new_scale[PIECE], inverse[PIECE];
    uint16_t raw[PIECE][BAND], code[PIECE][BAND];
} band;

/* where in the matrix's array lies the scale of line l and place h along R */
static inline int64_t scale_place(const band *b, int64_t h, int l) {
    const struct exc_project_args *a = b->j->a;
    int64_t row = b->j->out ? h : b->at + l, col = b->j->out ? b->at + l : h;
    if (a->dtype == EXC_F4) return row * (a->cols / EXC_GROUP) + col / EXC_GROUP;
    return row / EXC_BLOCK * ((a->cols + EXC_BLOCK - 1) / EXC_BLOCK) + col / EXC_BLOCK;
}

/* and where its successor in kept: e4m3 one a block, fp4 four a row (EXC_SIDE_OUT) or one a line and piece */
static inline int64_t kept_place(const band *b, int64_t h, int l) {
    if (b->j->a->dtype == EXC_F8_E4M3) return h / EXC_BLOCK;
    return b->j->out ? h * (BAND / EXC_GROUP) + l / EXC_GROUP : h / EXC_GROUP * BAND + l;
}

static inline int powers_only(const struct exc_project_args *a) { return a->scale_power || a->scale_dtype == EXC_F8_E8M0; }

static inline float power_above(float x) {
    uint32_t u = (exc_to_bits(x) + 0x7fffffu) & 0x7f800000u;
    return exc_from_bits(u < 0x00800000u ? 0x00800000u : u);
}

/* the scale that a factor on all weights asks for, as its dtype has it */
static inline float scaled(const band *b, float old) {
    const struct exc_project_args *a = b->j->a;
    float s = old * b->base;
    if (b->base == 1.0f) return old;
    if (powers_only(a)) return s > 0x1p-127f ? s : 0x1p-127f;
    return a->scale_dtype == EXC_BF16 ? exc_from_bits(exc_round_bf16(s) << 16) : s;
}

/* A block keeps its scale while its numbers fit; else e4m3 gets the least that makes the largest 448 (upwards where its dtype is
 * coarse), fp4 the power by which the largest lies between 4 and 8. */
static inline float next_scale(const band *b, float was, float most) {
    const struct exc_project_args *a = b->j->a;
    float old = scaled(b, was);
    if (!(most < __builtin_inff()) || old != old) return was;
    if (a->dtype == EXC_F4) {
        if (most < 8.0f * old || most < 0x1p-124f) return old;
        return exc_from_bits((exc_to_bits(most) & 0x7f800000u) - (2u << 23));
    }
    if (most <= 448.0f * __builtin_fabsf(old)) return old;
    float s = most / 448.0f;
    if (s < 0x1p-126f) s = 0x1p-126f;
    if (powers_only(a)) return power_above(s);
    return a->scale_dtype == EXC_BF16 ? exc_from_bits((exc_to_bits(s) + 0xffffu) & 0xffff0000u) : s;
}

static inline float most_of(const float *x, int n) {
    float m = 0;
    for (int i = 0; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

static inline void store_scales(const band *b, int mend) {
    const struct exc_project_args *a = b->j->a;
    int64_t step = a->dtype == EXC_F8_E4M3 ? EXC_BLOCK : b->j->out ? 1 : EXC_GROUP;
    int lines = a->dtype == EXC_F8_E4M3 ? 1 : b->lines, by = a->dtype == EXC_F4 && b->j->out ? EXC_GROUP : 1;
    for (int64_t h = 0; h < b->j->along; h += step)
        for (int l = 0; l < lines; l += by) {
            int64_t at = scale_place(b, h, l);
            float s = b->kept[kept_place(b, h, l)], old = exc_scale_at(b->scale, a->scale_dtype, at);
            size_t unit = a->scale_dtype == EXC_F32 ? 4 : a->scale_dtype == EXC_BF16 ? 2 : 1;
            uint32_t u = exc_to_bits(s), bits = a->scale_dtype == EXC_F32 ? u : a->scale_dtype == EXC_BF16 ? u >> 16 : u >> 23;
            if (exc_to_bits(old) == u || (old != old && !mend)) memmove(b->scale_to + (size_t)at * unit, b->scale + (size_t)at * unit, unit);
            else memcpy(b->scale_to + (size_t)at * unit, &bits, unit); /* little-endian, as the files are */
        }
}

/* bytes from a stored row to the next */
static inline int64_t row_bytes(const struct exc_project_args *a) {
    return a->dtype == EXC_F8_E4M3 ? a->cols : a->dtype == EXC_F4 ? a->cols / 2 : a->cols * 2;
}

/* scales of a band, at most */
static inline size_t kept_floats(const job *j) { return (size_t)(j->along + BAND) * (BAND / EXC_GROUP); }

static inline double total(const double *x, int n) {
    double s = 0;
    for (int i = 0; i < n; i++) s += x[i];
    return s;
}

static inline double acc_square(const band *b) {
    double s = 0;
    for (int64_t r = 0; r < b->j->a->rank; r++)
        for (int l = 0; l < b->lines; l++) s += b->acc[r][l] * b->acc[r][l];
    return s;
}

static inline float gain_of(double before, double after) { return after > 1e-10 * before ? (float)sqrt(before / after) : 1.0f; }

/* what R W is for */
static inline void keep_dots(band *b) {
    const struct exc_project_args *a = b->j->a;
    b->t->before = acc_square(b);
    b->t->size = total(b->length, b->lines);
    for (int64_t r = 0; r < a->rank; r++)
        for (int l = 0; l < BAND; l++) {
            b->coef[r][l] = a->strength[b->matrix] * (float)b->acc[r][l];
            if (a->c && l < b->lines) a->c[(b->matrix * a->rank + r) * b->j->whole + b->at + l] = (float)b->acc[r][l];
        }
}

/* lambda of all lines for exact rounding, as far as a number of trials leads: in best */
void exc_solve(band *b);

/* ordinary.c: the edit of a band in registers; 0: it is not an ordinary one, nothing was written */
int exc_edit_whole(band *b);

#endif
