/* requant.c - project for quantised weights, and with stochastic or exact rounding: W' = W - s R^T (R W), then Q near W'.
 *
 * What is left of R after an edit is what rounding puts back. The change of an element, r_i c, is far below the spacing of e4m3
 * or fp4, so that nearest rounding returns most elements to where they were (28-48 % of R W stay in e4m3, 97 % in fp4).
 * Stochastic rounding keeps the change on average. Exact rounding looks for the nearest grid point q with R q = R w': by
 * Lagrange q = RN(w' - R^T lambda), one lambda for a line and direction, found by secants, every trial a sweep.
 *
 * A task is a band: 128 lines across R (columns for EXC_SIDE_OUT, rows for EXC_SIDE_IN), which is a whole number of scale blocks, in
 * pieces of 32 along R that stay in cache: codes are loaded (turned for EXC_SIDE_IN) and decoded afresh by each sweep. Sweeps:
 * R W; lengths where they are restored; the ideal result and with it the new scales; trials; the result. Arithmetic
 * is f32, sums of a piece are added in f64. Bands are independent, so threads change no bits. */
#include <math.h>
#include <string.h>

#include "band.h"
#include "grid.h"
#include "recode.h"
#include "requant.h"

#define TRIALS 12
#define TASKS 64 /* at most, so that a task has bands to look ahead to */

/* ------------------------------------------------------------------------------------------------------------- bodies */

EXC_INLINE void decode_body(const uint16_t *raw, int dtype, const float *scale, int stride, int rows, float *x) {
    for (int h = 0; h < rows; h++, raw += BAND, x += BAND, scale += stride) {
        if (dtype == EXC_F8_E4M3)
            for (int l = 0; l < BAND; l++) x[l] = (raw[l] & 0x7f) == EXC_NAN_E4M3 ? __builtin_nanf("") : exc_from_e4m3(raw[l]) * scale[l];
        else if (dtype == EXC_F4)
            for (int l = 0; l < BAND; l++) x[l] = exc_from_e2m1(raw[l]) * scale[l];
        else if (dtype == EXC_BF16)
            for (int l = 0; l < BAND; l++) x[l] = exc_from_bf16(raw[l]);
        else
            for (int l = 0; l < BAND; l++) x[l] = exc_from_f16(raw[l]);
    }
}
EXC_DISPATCH(decode, (const uint16_t *raw, int dtype, const float *scale, int stride, int rows, float *x),
             (raw, dtype, scale, stride, rows, x))

/* acc[r] += R x over a piece */
EXC_INLINE void dots_body(const float *x, int rows, const float *basis, int64_t stride, int64_t rank, double *acc) {
    for (int64_t r = 0; r < rank; r++, acc += BAND) {
        float sum[BAND] = {0};
        for (int h = 0; h < rows; h++) {
            float b = basis[r * stride + h];
            for (int l = 0; l < BAND; l++) sum[l] = __builtin_fmaf(b, x[h * BAND + l], sum[l]);
        }
        for (int l = 0; l < BAND; l++) acc[l] += (double)sum[l];
    }
}
EXC_DISPATCH(dots, (const float *x, int rows, const float *basis, int64_t stride, int64_t rank, double *acc),
             (x, rows, basis, stride, rank, acc))

/* y = gain * (x - R^T coef); row_gain by row or NULL */
EXC_INLINE void shift_body(const float *x, int rows, const float *basis, int64_t stride, int64_t rank, const float *coef,
                           const float *gain, const float *row_gain, float *y) {
    for (int h = 0; h < rows; h++, x += BAND, y += BAND) {
        float d[BAND] = {0}, g = row_gain ? row_gain[h] : 1.0f;
        for (int64_t r = 0; r < rank; r++) {
            float b = basis[r * stride + h];
            for (int l = 0; l < BAND; l++) d[l] = __builtin_fmaf(b, coef[r * BAND + l], d[l]);
        }
        for (int l = 0; l < BAND; l++) y[l] = (x[l] - d[l]) * (gain[l] * g);
    }
}
EXC_DISPATCH(shift, (const float *x, int rows, const float *basis, int64_t stride, int64_t rank, const float *coef, const float *gain,
                     const float *row_gain, float *y),
             (x, rows, basis, stride, rank, coef, gain, row_gain, y))

/* sum[l] += (x - y)^2; y NULL: x^2 */
EXC_INLINE void squares_body(const float *x, const float *y, int rows, double *sum) {
    float s[BAND] = {0};
    for (int h = 0; h < rows; h++)
        for (int l = 0; l < BAND; l++) {
            float d = x[h * BAND + l] - (y ? y[h * BAND + l] : 0.0f);
            s[l] = __builtin_fmaf(d, d, s[l]);
        }
    for (int l = 0; l < BAND; l++) sum[l] += (double)s[l];
}
EXC_DISPATCH(squares, (const float *x, const float *y, int rows, double *sum), (x, y, rows, sum))

EXC_INLINE void largest_body(const float *x, int rows, float *most) {
    for (int h = 0; h < rows; h++)
        for (int l = 0; l < BAND; l++) {
            float a = __builtin_fabsf(x[h * BAND + l]);
            most[l] = a > most[l] ? a : most[l];
        }
}
EXC_DISPATCH(largest, (const float *x, int rows, float *most), (x, rows, most))

/* value = the stored number near v; code = its bits, or NULL. d NULL: nearest; else {key, row, column, whether rows lie across} */
typedef struct draw {
    uint32_t key, row, col;
    int turned;
} draw;

EXC_INLINE void draw_row(const exc_grid *g, const draw *d, int h, float *a) {
    for (int l = 0; l < BAND; l++) {
        uint32_t row = d->row + (uint32_t)(d->turned ? l : h), col = d->col + (uint32_t)(d->turned ? h : l);
        a[l] = exc_grid_draw(g, a[l], exc_philox(d->key, row, col));
    }
}

/* loops over plain arrays without a choice of path, so that each becomes a few vector instructions */
EXC_INLINE void settle_rows(const exc_grid g, int top, uint32_t nan, const float *v, const float *inverse, const float *scale, int stride,
                            int rows, const draw *d, float *value, uint16_t *code) {
    for (int h = 0; h < rows; h++, v += BAND, value += BAND, inverse += stride, scale += stride) {
        float a[BAND];
        uint32_t sign[BAND], c[BAND];
        for (int l = 0; l < BAND; l++) {
            a[l] = v[l] * inverse[l];
            sign[l] = exc_to_bits(a[l]) & 0x80000000u;
            a[l] = __builtin_fabsf(a[l]);
        }
        if (d) draw_row(&g, d, h, a);
        else
            for (int l = 0; l < BAND; l++) a[l] = exc_grid_near(&g, a[l]);
        for (int l = 0; l < BAND; l++) value[l] = exc_from_bits(exc_to_bits(a[l] * scale[l]) ^ sign[l]);
        if (!code) continue;
        for (int l = 0; l < BAND; l++) c[l] = exc_grid_code(&g, a[l]) | sign[l] >> (31 - top);
        /* the sign of a NaN that arithmetic makes is the processor's: the code has none */
        for (int l = 0; l < BAND; l++) code[l] = (uint16_t)(exc_to_bits(a[l]) > 0x7f800000u ? nan : c[l]);
        code += BAND;
    }
}

EXC_INLINE void settle_body(int dtype, const float *v, const float *inverse, const float *scale, int stride, int rows, const draw *d,
                            float *value, uint16_t *code) {
    switch (dtype) { /* constants in each */
    case EXC_F8_E4M3:
        settle_rows(exc_grid_of(EXC_F8_E4M3), 7, EXC_NAN_E4M3, v, inverse, scale, stride, rows, d, value, code);
        break;
    case EXC_F4: settle_rows(exc_grid_of(EXC_F4), 3, 0, v, inverse, scale, stride, rows, d, value, code); break;
    case EXC_F16: settle_rows(exc_grid_of(EXC_F16), 15, 0x7e00, v, inverse, scale, stride, rows, d, value, code); break;
    default: settle_rows(exc_grid_of(EXC_BF16), 15, 0x7fc0, v, inverse, scale, stride, rows, d, value, code);
    }
}
EXC_DISPATCH(settle, (int dtype, const float *v, const float *inverse, const float *scale, int stride, int rows, const draw *d, float *value,
                      uint16_t *code),
             (dtype, v, inverse, scale, stride, rows, d, value, code))

/* ------------------------------------------------------------------------------------------------------- load, store */

/* a stretch of a stored row; fp4 begins at an even place */
static void read_row(const uint8_t *row, int dtype, int64_t at, int n, uint16_t *raw) {
    if (dtype == EXC_F8_E4M3)
        for (int l = 0; l < n; l++) raw[l] = row[at + l];
    else if (dtype == EXC_F4)
        for (int l = 0; l < n; l += 2) {
            raw[l] = row[(at + l) / 2] & 15;
            raw[l + 1] = row[(at + l) / 2] >> 4;
        }
    else memcpy(raw, row + 2 * at, (size_t)n * 2);
}

static void write_row(uint8_t *row, int dtype, int64_t at, int n, const uint16_t *code) {
    if (dtype == EXC_F8_E4M3)
        for (int l = 0; l < n; l++) row[at + l] = (uint8_t)code[l];
    else if (dtype == EXC_F4)
        for (int l = 0; l < n; l += 2) row[(at + l) / 2] = (uint8_t)(code[l] | code[l + 1] << 4);
    else memcpy(row + 2 * at, code, (size_t)n * 2);
}

static void load_codes(band *b, int64_t h0, int rows) {
    const struct exc_project_args *a = b->j->a;
    const int64_t stride = row_bytes(a);
    if (b->lines < BAND) memset(b->raw, 0, sizeof b->raw);
    if (b->j->out) {
        for (int h = 0; h < rows; h++) read_row(b->src + (h0 + h) * stride, a->dtype, b->at, b->lines, b->raw[h]);
        return;
    }
    for (int l = 0; l < b->lines; l++) {
        uint16_t line[PIECE];
        read_row(b->src + (b->at + l) * stride, a->dtype, h0, rows, line);
        for (int h = 0; h < rows; h++) b->raw[h][l] = line[h];
    }
}

static void store_codes(band *b, int64_t h0, int rows) {
    const struct exc_project_args *a = b->j->a;
    const int64_t stride = row_bytes(a);
    const int each = a->dtype == EXC_F4; /* rows have scales of their own */
    for (int h = 0; h < rows; h++) {
        const float *was = b->old_scale[each ? h : 0], *is = b->new_scale[each ? h : 0];
        int32_t n = 0;
        for (int l = 0; l < b->lines; l++) n += (b->code[h][l] != b->raw[h][l]) | (exc_to_bits(is[l]) != exc_to_bits(was[l]));
        b->t->changed += n;
        if (b->j->out) write_row(b->dst + (h0 + h) * stride, a->dtype, b->at, b->lines, b->code[h]);
    }
    for (int l = 0; !b->j->out && l < b->lines; l++) {
        uint16_t line[PIECE];
        for (int h = 0; h < rows; h++) line[h] = b->code[h][l];
        write_row(b->dst + (b->at + l) * stride, a->dtype, h0, rows, line);
    }
}

static float inverse_of(float scale) { return scale != 0.0f ? 1.0f / scale : 0.0f; }

/* one row of scales, each found once for the lines that share it */
static void spread_scales(band *b, int64_t h0, int h, int known) {
    const struct exc_project_args *a = b->j->a;
    const int share = a->dtype == EXC_F8_E4M3 || !b->coded ? BAND : b->j->out ? EXC_GROUP : 1;
    for (int first = 0; first < BAND; first += share) {
        int inside = b->coded && first < b->lines;
        float old = inside ? exc_scale_at(b->scale, a->scale_dtype, scale_place(b, h0 + h, first)) : 1.0f;
        float now = inside && known ? b->kept[kept_place(b, h0 + h, first)] : 1.0f, inverse = inverse_of(now);
        for (int l = first; l < first + share; l++) b->old_scale[h][l] = old, b->new_scale[h][l] = now, b->inverse[h][l] = inverse;
    }
}

/* scales of a piece: one row of them for e4m3, one for each of its rows for fp4, which are all alike where the piece is a group */
static void load_scales(band *b, int64_t h0, int rows, int known) {
    const int alike = !b->j->out;
    int n = b->j->a->dtype == EXC_F4 ? rows : 1;
    for (int h = 0; h < n; h++) {
        if (h == 0 || !alike) {
            spread_scales(b, h0, h, known);
            continue;
        }
        memcpy(b->old_scale[h], b->old_scale[0], sizeof b->old_scale[0]);
        memcpy(b->new_scale[h], b->new_scale[0], sizeof b->new_scale[0]);
        memcpy(b->inverse[h], b->inverse[0], sizeof b->inverse[0]);
    }
}

static void load_piece(band *b, int64_t h0, int rows, int known) {
    load_codes(b, h0, rows);
    if (b->j->a->dtype == EXC_F4 || h0 % EXC_BLOCK == 0) load_scales(b, h0, rows, known);
    decode_for()(b->raw[0], b->j->a->dtype, b->old_scale[0], b->j->a->dtype == EXC_F4 ? BAND : 0, rows, b->x[0]);
}

/* the ideal result of a piece decides its scales; e4m3 waits for the end of the block */
static void choose_scales(band *b, int64_t h0, int rows) {
    const struct exc_project_args *a = b->j->a;
    if (!b->coded) return;
    if (a->dtype == EXC_F8_E4M3) {
        if (h0 % EXC_BLOCK == 0) memset(b->most, 0, sizeof b->most);
        largest_for()(b->ideal[0], rows, b->most);
        b->kept[h0 / EXC_BLOCK] = next_scale(b, b->old_scale[0][0], most_of(b->most, b->lines));
        return;
    }
    if (b->j->out) {
        for (int h = 0; h < rows; h++) {
            memset(b->most, 0, sizeof b->most);
            largest_for()(b->ideal[h], 1, b->most);
            for (int l = 0; l < b->lines; l += EXC_GROUP)
                b->kept[kept_place(b, h0 + h, l)] = next_scale(b, b->old_scale[h][l], most_of(b->most + l, EXC_GROUP));
        }
        return;
    }
    memset(b->most, 0, sizeof b->most);
    largest_for()(b->ideal[0], rows, b->most);
    for (int l = 0; l < b->lines; l++) b->kept[kept_place(b, h0, l)] = next_scale(b, b->old_scale[0][l], b->most[l]);
}

/* ------------------------------------------------------------------------------------------------------------- sweeps */

static void clear_acc(band *b) { memset(b->acc, 0, (size_t)b->j->a->rank * sizeof *b->acc); }

#define EACH_PIECE(h0, rows)                                                                                      \
    for (int64_t h0 = 0, rows = exc_least(PIECE, b->j->along); h0 < b->j->along;                                  \
         h0 += PIECE, rows = exc_least(PIECE, b->j->along - h0))

/* R W, and the length of lines */
static void sweep_dots(band *b) {
    const struct exc_project_args *a = b->j->a;
    clear_acc(b);
    memset(b->length, 0, sizeof b->length);
    EACH_PIECE(h0, rows) {
        load_piece(b, h0, (int)rows, 0);
        dots_for()(b->x[0], (int)rows, a->basis + h0, b->j->along, a->rank, b->acc[0]);
        squares_for()(b->x[0], NULL, (int)rows, b->length);
        for (int h = 0; a->nonfinite && h < rows; h++)
            for (int l = 0; l < b->lines; l++) b->t->nonfinite += !(__builtin_fabsf(b->x[h][l]) < __builtin_inff());
    }
    keep_dots(b);
}

/* the ideal result of a piece that is loaded */
static void make_ideal(band *b, int64_t h0, int rows) {
    const struct exc_project_args *a = b->j->a;
    shift_for()(b->x[0], rows, a->basis + h0, b->j->along, a->rank, b->coef[0], b->gain, b->j->row_gain ? b->j->row_gain + h0 : NULL, b->ideal[0]);
}

static void sweep_lengths(band *b) {
    memset(b->left, 0, sizeof b->left);
    EACH_PIECE(h0, rows) {
        load_piece(b, h0, (int)rows, 0);
        make_ideal(b, h0, (int)rows);
        squares_for()(b->ideal[0], NULL, (int)rows, b->left);
    }
    for (int l = 0; l < BAND; l++) b->gain[l] = gain_of(b->length[l], b->left[l]);
}

/* scales, the size of the edit, and where exact rounding is to lead */
static void sweep_ideal(band *b) {
    const struct exc_project_args *a = b->j->a;
    double moved[BAND] = {0};
    clear_acc(b);
    EACH_PIECE(h0, rows) {
        load_piece(b, h0, (int)rows, 0);
        make_ideal(b, h0, (int)rows);
        squares_for()(b->ideal[0], b->x[0], (int)rows, moved);
        if (!b->bare) dots_for()(b->ideal[0], (int)rows, a->basis + h0, b->j->along, a->rank, b->acc[0]);
        choose_scales(b, h0, (int)rows);
    }
    b->t->moved = total(moved, b->lines);
    if (!b->bare) memcpy(b->target, b->acc, (size_t)a->rank * sizeof *b->acc);
}

/* the piece rounded: ideal less R^T lambda */
static void round_piece(band *b, int64_t h0, int rows, const lane *lambda, int last) {
    const struct exc_project_args *a = b->j->a;
    const float *v = b->ideal[0];
    draw d = {b->key, (uint32_t)(b->j->out ? h0 : b->at), (uint32_t)(b->j->out ? b->at : h0), !b->j->out};
    make_ideal(b, h0, rows);
    if (lambda) {
        shift_for()(b->ideal[0], rows, a->basis + h0, b->j->along, a->rank, lambda[0], b->ones, NULL, b->value[0]);
        v = b->value[0];
    }
    settle_for()(a->dtype, v, b->inverse[0], b->new_scale[0], a->dtype == EXC_F4 ? BAND : 0, rows, a->rounding == EXC_ROUND_SR ? &d : NULL,
                 b->value[0], last ? b->code[0] : NULL);
}

/* gap = R Q(lambda) - R W' by direction and line */
static void trial(band *b) {
    const struct exc_project_args *a = b->j->a;
    clear_acc(b);
    if (b->by) b->by->trial(&b->whole);
    else EACH_PIECE(h0, rows) {
        load_piece(b, h0, (int)rows, 1);
        round_piece(b, h0, (int)rows, (const lane *)b->lambda, 0);
        dots_for()(b->value[0], (int)rows, a->basis + h0, b->j->along, a->rank, b->acc[0]);
    }
    for (int64_t r = 0; r < a->rank; r++)
        for (int l = 0; l < BAND; l++) b->gap[r][l] = (float)(b->acc[r][l] - b->target[r][l]);
    for (int l = 0; l < BAND; l++) {
        double s = 0;
        for (int64_t r = 0; r < a->rank; r++) s += (double)b->gap[r][l] * (double)b->gap[r][l];
        if (!(s < b->best_gap[l])) continue;
        b->best_gap[l] = s;
        for (int64_t r = 0; r < a->rank; r++) b->best[r][l] = b->lambda[r][l];
    }
}

/* The gap falls as lambda grows, in steps. One direction: between a lambda on either side of zero a secant, the older side counting half
 * when it is used again (Illinois); until there is one, larger steps. Several: a secant each, as if they were alone. */
static float step_of(float lambda, float gap, float past, float past_gap, int first) {
    float slope = first || lambda == past ? 0.4f : (past_gap - gap) / (lambda - past);
    slope = slope < 0.1f ? 0.1f : slope > 2.0f ? 2.0f : slope;
    return lambda + gap / slope;
}

static void next_bracketed(band *b, int l, int first) {
    float lambda = b->lambda[0][l], gap = b->gap[0][l];
    int side = gap < 0; /* 0: lambda is too small */
    float *const at[2] = {&b->low[0][l], &b->high[0][l]}, *const value[2] = {&b->low[1][l], &b->high[1][l]};
    *at[side] = lambda;
    *value[side] = gap;
    if (!first && (b->past_gap[0][l] < 0) == side) *value[!side] *= 0.5f;
    int both = b->low[1][l] > 0 && b->high[1][l] < 0;
    float next = both ? b->low[0][l] + (b->high[0][l] - b->low[0][l]) * (b->low[1][l] / (b->low[1][l] - b->high[1][l]))
                      : step_of(lambda, gap, b->past[0][l], b->past_gap[0][l], first);
    b->past[0][l] = lambda;
    b->past_gap[0][l] = gap;
    b->lambda[0][l] = gap == 0 ? lambda : next;
}

void exc_solve(band *b) {
    const int64_t rank = b->j->a->rank;
    memset(b->lambda, 0, (size_t)rank * sizeof *b->lambda);
    memset(b->best, 0, (size_t)rank * sizeof *b->best);
    memset(b->low, 0, sizeof b->low);
    memset(b->high, 0, sizeof b->high);
    for (int l = 0; l < BAND; l++) b->best_gap[l] = __builtin_inf();
    for (int i = 0; i < TRIALS; i++) {
        trial(b);
        for (int64_t r = 0; r < rank; r++)
            for (int l = 0; l < BAND; l++) {
                if (rank == 1) {
                    next_bracketed(b, l, i == 0);
                    continue;
                }
                float next = step_of(b->lambda[r][l], b->gap[r][l], b->past[r][l], b->past_gap[r][l], i == 0);
                b->past[r][l] = b->lambda[r][l];
                b->past_gap[r][l] = b->gap[r][l];
                b->lambda[r][l] = next;
            }
    }
}

static void sweep_result(band *b) {
    const struct exc_project_args *a = b->j->a;
    double error[BAND] = {0};
    clear_acc(b);
    EACH_PIECE(h0, rows) {
        load_piece(b, h0, (int)rows, 1);
        round_piece(b, h0, (int)rows, b->bare ? NULL : (const lane *)b->best, 1);
        dots_for()(b->value[0], (int)rows, a->basis + h0, b->j->along, a->rank, b->acc[0]);
        squares_for()(b->value[0], b->ideal[0], (int)rows, error);
        store_codes(b, h0, (int)rows);
    }
    if (b->coded) store_scales(b, 0);
    b->t->error = total(error, b->lines);
    b->t->after = acc_square(b);
}

/* ------------------------------------------------------------------------------------------------------------- the op */

/* strength 0: bytes as they are, sums all the same */
static void copy_band(const band *b) {
    const struct exc_project_args *a = b->j->a;
    const int64_t stride = row_bytes(a);
    int64_t rows = b->j->out ? a->rows : b->lines, first = b->j->out ? 0 : b->at;
    int64_t from = b->j->out ? b->at * stride / a->cols : 0, n = b->j->out ? (b->lines * stride + a->cols - 1) / a->cols : stride;
    for (int64_t r = first; b->src != b->dst && r < first + rows; r++) memcpy(b->dst + r * stride + from, b->src + r * stride + from, (size_t)n);
}

/* what a factor does to scales: all of it, or the power of two in it */
static float base_of(const struct exc_project_args *a, double factor) {
    float f = (float)fabs(factor);
    return powers_only(a) && f > 0 ? exc_from_bits(exc_to_bits(f) & 0x7f800000u) : f;
}

static void open_band(band *b, const job *j, size_t task) {
    const struct exc_project_args *a = j->a;
    b->j = j;
    b->matrix = j->first + (int64_t)task / j->bands;
    b->at = (int64_t)task % j->bands * BAND;
    b->lines = (int)exc_least(BAND, j->whole - b->at);
    b->src = exc_edit_src(a, b->matrix);
    b->dst = exc_edit_dst(a, b->matrix);
    b->coded = exc_is_coded(a->dtype);
    b->scale = b->coded ? a->scale[b->matrix] : NULL;
    b->scale_to = b->coded ? a->scale_to[b->matrix] : NULL;
    b->key = exc_philox_key(a->seed, a->stream ? a->stream[b->matrix] : (uint64_t)b->matrix);
    b->by = NULL;
    b->bare = a->rounding != EXC_ROUND_EXACT;
    b->base = j->factor ? base_of(a, j->factor[b->matrix]) : 1.0f;
    b->kept = (float *)(b + 1);
    b->old = b->kept + kept_floats(j);
    b->reach = b->old + kept_floats(j);
    b->largest = (uint8_t *)(b->reach + j->along);
    b->turned = b->largest + j->along / EXC_BLOCK + 1;
    b->t = &j->sums[task];
    for (int l = 0; l < BAND; l++) b->gain[l] = b->ones[l] = 1.0f;
}

static band *band_of(const job *j, int worker) { return (band *)((char *)j->q->scratch[worker] + CARVED); }

/* scales as they were; where numbers become 0, one that is none becomes 1 */
static void keep_scales(band *b, int mend) {
    const int f4 = b->j->a->dtype == EXC_F4;
    EACH_PIECE(h0, rows) {
        load_scales(b, h0, (int)rows, 0);
        for (int h = 0; h < rows; h++)
            for (int l = 0; l < b->lines; l++) {
                float s = b->old_scale[f4 ? h : 0][l];
                b->kept[kept_place(b, h0 + h, l)] = mend && !(__builtin_fabsf(s) < __builtin_inff()) ? 1.0f : s;
            }
    }
    store_scales(b, mend);
}

/* factor 0: +0 whatever was there */
static void clear_band(band *b) {
    EACH_PIECE(h0, rows) {
        load_piece(b, h0, (int)rows, 0);
        memset(b->code, 0, sizeof b->code);
        memcpy(b->new_scale, b->old_scale, sizeof b->new_scale);
        store_codes(b, h0, (int)rows);
    }
    keep_scales(b, 1);
    b->t->after = 0;
}

static void edit_band(band *b) {
    const job *j = b->j;
    const struct exc_project_args *a = j->a;
    *b->t = (tally){0};
    b->was_asked = b->asked;
    b->asked = 0;
    if (exc_edit_whole(b)) return;
    sweep_dots(b);
    b->t->after = b->t->before;
    if (j->factor ? j->factor[b->matrix] == 1 : a->strength[b->matrix] == 0.0f) {
        copy_band(b);
        if (b->coded && b->scale != b->scale_to) keep_scales(b, 0);
        return;
    }
    if (j->factor && j->factor[b->matrix] == 0) {
        clear_band(b);
        return;
    }
    if (a->norm != EXC_NORM_NONE && !j->row_gain) sweep_lengths(b);
    for (int l = 0; j->factor && l < BAND; l++) b->gain[l] = (float)j->factor[b->matrix];
    sweep_ideal(b);
    if (!b->bare) exc_solve(b);
    sweep_result(b);
}

/* bands of a task lie one after the other in memory */
static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    band *b = band_of(j, worker);
    int64_t first = (int64_t)task * j->per_task, last = exc_least(first + j->per_task, j->total);
    b->asked = 0;
    for (int64_t i = first; i < last; i++) {
        open_band(b, j, (size_t)i);
        b->last = i + 1 == last;
        edit_band(b);
    }
}

static void run_bands(job *j, int64_t total) {
    j->total = total;
    j->per_task = total > TASKS ? (total + TASKS - 1) / TASKS : 1;
    j->q->parallel(j->q, exc_task_count(total, j->per_task), run, j);
}

/* lengths of rows that cross all bands: sums of a piece of rows over the bands, one after the other */
static void row_lengths(void *arg, size_t task, int worker) {
    const job *j = arg;
    band *b = band_of(j, worker);
    int64_t h0 = (int64_t)task * PIECE;
    int rows = (int)exc_least(PIECE, j->along - h0);
    double before[PIECE] = {0}, after[PIECE] = {0};
    for (int64_t i = 0; i < j->bands; i++) {
        open_band(b, j, (size_t)i);
        for (int64_t r = 0; r < j->a->rank; r++)
            for (int l = 0; l < BAND; l++)
                b->coef[r][l] = l < b->lines ? j->a->strength[j->first] * j->a->c[(j->first * j->a->rank + r) * j->whole + b->at + l] : 0;
        load_scales(b, h0, rows, 0);
        load_piece(b, h0, rows, 0);
        shift_for()(b->x[0], rows, j->a->basis + h0, j->along, j->a->rank, b->coef[0], b->gain, NULL, b->ideal[0]);
        for (int h = 0; h < rows; h++)
            for (int l = 0; l < b->lines; l++) {
                before[h] += (double)b->x[h][l] * (double)b->x[h][l];
                after[h] += (double)b->ideal[h][l] * (double)b->ideal[h][l];
            }
    }
    for (int h = 0; h < rows; h++) j->row_gain[h0 + h] = gain_of(before[h], after[h]);
}

static void dots_run(void *arg, size_t task, int worker) {
    band *b = band_of(arg, worker);
    open_band(b, arg, task);
    *b->t = (tally){0};
    sweep_dots(b);
}

static void collect(const job *j, int64_t matrices) {
    const struct exc_project_args *a = j->a;
    for (int64_t i = 0; i < matrices; i++) {
        tally all = {0};
        for (int64_t s = 0; s < j->bands; s++) {
            const tally *t = &j->sums[i * j->bands + s];
            all.before += t->before, all.after += t->after, all.moved += t->moved, all.error += t->error, all.size += t->size;
            all.changed += t->changed, all.nonfinite += t->nonfinite;
        }
        int64_t m = j->first + i;
        double *const sums[] = {a->before, a->after, a->moved, a->error, a->size};
        const double values[] = {all.before, all.after, all.moved, all.error, all.size};
        for (int k = 0; k < 5; k++)
            if (sums[k]) sums[k][m] = values[k];
        if (a->changed) a->changed[m] = all.changed;
        if (a->nonfinite) a->nonfinite[m] = all.nonfinite;
    }
}

int exc_requant_wanted(int dtype, int rounding) { return exc_is_coded(dtype) || (rounding != EXC_ROUND_RN && dtype != EXC_F32); }

static int fits(const struct exc_project_args *a) {
    if (a->rounding < EXC_ROUND_RN || a->rounding > EXC_ROUND_EXACT) return 0;
    if (!exc_is_coded(a->dtype)) return a->dtype == EXC_BF16 || a->dtype == EXC_F16;
    if (a->dtype == EXC_F4 && a->cols % EXC_GROUP) return 0;
    return (!a->count || (a->src && a->scale && a->scale_to)) && exc_is_scale(a->dtype, a->scale_dtype);
}

/* matrix by matrix: R W of all bands, gains of rows, then the edit */
static exc_status row_norms(job *j) {
    const struct exc_project_args *a = j->a;
    size_t sums = (size_t)j->bands * sizeof *j->sums, gains = (size_t)j->along * sizeof *j->row_gain;
    if (!a->c || sums + gains > CARVED) return EXC_ERR_USAGE;
    for (j->first = 0; j->first < a->count; j->first++) {
        j->row_gain = NULL;
        if (a->strength[j->first] != 0.0f) {
            j->q->parallel(j->q, (size_t)j->bands, dots_run, j);
            j->row_gain = (float *)(void *)((char *)j->sums + (sums + 63) / 64 * 64);
            j->q->parallel(j->q, exc_task_count(j->along, PIECE), row_lengths, j);
        }
        run_bands(j, j->bands);
        collect(j, 1);
    }
    return EXC_OK;
}

static exc_status run_all(exc_queue *q, const struct exc_project_args *a, const double *factor) {
    int out = a->side == EXC_SIDE_OUT;
    if (!fits(a)) return EXC_ERR_USAGE;
    job j = {.a = a, .q = q, .out = out, .along = out ? a->rows : a->cols, .whole = out ? a->cols : a->rows,
             .sums = q->scratch[0], .factor = factor};
    j.bands = (j.whole + BAND - 1) / BAND;
    if (CARVED + sizeof(band) + kept_floats(&j) * sizeof(float) > q->scratch_bytes) return EXC_ERR_USAGE;
    if (out && a->norm == EXC_NORM_ROW) return row_norms(&j);
    int64_t at_once = j.bands ? (int64_t)(CARVED / sizeof(tally)) / j.bands : a->count;
    if (at_once < 1 && a->count > 0) return EXC_ERR_USAGE;
    for (j.first = 0; j.first < a->count; j.first += at_once) {
        int64_t n = exc_least(at_once, a->count - j.first);
        run_bands(&j, n * j.bands);
        collect(&j, n);
    }
    return EXC_OK;
}

exc_status exc_requant_project(exc_queue *q, const struct exc_project_args *a) { return run_all(q, a, NULL); }

exc_status exc_requant_scale(exc_queue *q, const struct exc_scale_args *a) {
    static const float no_basis = 0; /* of rank 0 */
    struct exc_project_args p = {.src = a->src, .dst = a->dst, .dtype = a->dtype, .count = a->count, .rows = a->rows, .cols = a->cols,
                                 .side = EXC_SIDE_OUT, .basis = &no_basis, .changed = a->changed, .nonfinite = a->nonfinite, .scale = a->scale,
                                 .scale_to = a->scale_to, .scale_dtype = a->scale_dtype, .scale_power = a->scale_power};
    if (a->rows < 0 || a->cols < 1 || a->n != a->rows * a->cols) return EXC_ERR_USAGE;
    if (a->overflow) memset(a->overflow, 0, (size_t)a->count * sizeof *a->overflow); /* what is too large is the largest, or rescaled */
    return run_all(q, &p, a->factor);
}
