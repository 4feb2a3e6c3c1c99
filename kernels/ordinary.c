/* ordinary.c - the edit of an ordinary band of quantised weights (recode.h): two sweeps where piece by piece it takes three or more.
 *
 * The sweep that only looked for the largest result of a block, to see whether its scale will do, is not needed: a
 * row moves by at most |R^T| |s R W|, so that nothing outgrows the range but what was near its end. These few are found by their codes and
 * computed one by one. The rest of the arithmetic is requant.c's, in the same order. */
#include <string.h>

#include "band.h"
#include "requant.h"

/* room for the whole of a band */
static int has_room(const job *j) {
    size_t bytes = CARVED + sizeof(band) + (2 * kept_floats(j) + (size_t)j->along) * sizeof(float) + (size_t)j->along / EXC_BLOCK + 1;
    return bytes + (j->out ? 0 : (size_t)j->along * BAND) <= j->q->scratch_bytes;
}

#define SLACK 1e-5f /* more than the arithmetic's roundings */

/* scales as numbers, by block of e4m3 or by row and group of fp4; 0: some are out of the ordinary */
static int ordinary_scales(band *b) {
    const struct exc_project_args *a = b->j->a;
    int fine = 1;
    if (a->dtype == EXC_F8_E4M3)
        for (int64_t h = 0; h < b->j->along; h += EXC_BLOCK) {
            float *old = b->old + h / EXC_BLOCK;
            *old = exc_scale_at(b->scale, a->scale_dtype, scale_place(b, h, 0));
            fine &= exc_scale_is_ordinary(*old);
        }
    else
        for (int64_t h = 0; h < b->j->along; h++) {
            const uint8_t *scale = b->scale + h * (a->cols / EXC_GROUP) + b->at / EXC_GROUP;
            for (int g = 0; g < b->lines / EXC_GROUP; g++) {
                b->old[4 * h + g] = exc_from_e8m0(scale[g]);
                fine &= scale[g] >= 127 - 100 && scale[g] <= 127 + 100;
            }
        }
    return fine;
}

static float ideal_at(const band *b, int64_t h, int l) {
    const struct exc_project_args *a = b->j->a;
    const uint8_t *row = b->whole.from + h * b->whole.stride;
    float scale = b->old[kept_place(b, h, l)], d = 0;
    float x = a->dtype == EXC_F4 ? exc_from_e2m1(row[l / 2] >> (l % 2 ? 4 : 0)) : exc_from_e4m3(row[l]);
    for (int64_t r = 0; r < a->rank; r++) d = __builtin_fmaf(a->basis[r * b->j->along + h], b->coef[r][l], d);
    return (x * scale - d) * b->gain[l];
}

/* the largest of n lines of a row, of those whose code is at least `code` */
static float most_from(const band *b, int64_t h, int first, int n, int code) {
    const uint8_t *row = b->whole.from + h * b->whole.stride;
    float most = 0;
    for (int l = first; l < first + n; l++) {
        if (code > 0 && (row[l] & 0x7f) < code) continue;
        float x = __builtin_fabsf(ideal_at(b, h, l));
        most = x > most ? x : most;
    }
    return most;
}

static int any_from(const uint8_t *row, int n, int code) {
    uint8_t any = 0;
    for (int l = 0; l < n; l++) any |= (row[l] & 0x7f) >= code;
    return any;
}

/* how far an edit moves the weights of a row, before the gain */
static void reaches(const band *b) {
    const job *j = b->j;
    float *reach = b->reach;
    memset(reach, 0, (size_t)j->along * sizeof *reach);
    for (int64_t r = 0; r < j->a->rank; r++) {
        float most = 0;
        for (int l = 0; l < b->lines; l++) most = __builtin_fabsf(b->coef[r][l]) > most ? __builtin_fabsf(b->coef[r][l]) : most;
        for (int64_t h = 0; h < j->along; h++) reach[h] += __builtin_fabsf(j->a->basis[r * j->along + h]) * most * (1 + SLACK);
    }
}

/* A block keeps its scale if nothing grows beyond it. Only what was near the end of the range can have: it is looked at, no other. */
static void choose_of_block(band *b, int64_t h0, float gain) {
    const float *reach = b->reach;
    const float old = b->old[h0 / EXC_BLOCK], end = 448.0f * old * (1 - SLACK) / gain;
    const int64_t last = exc_least(h0 + EXC_BLOCK, b->j->along);
    float farthest = 0, most = 0;
    for (int64_t h = h0; h < last; h++) farthest = reach[h] > farthest ? reach[h] : farthest;
    b->kept[h0 / EXC_BLOCK] = old;
    if (exc_from_e4m3(b->largest[h0 / EXC_BLOCK]) * old + farthest < end) return;
    for (int64_t h = h0; h < last; h++) {
        float from = (end - reach[h]) / old;
        int code = from < 0x1p-6f ? 0 : (int)(exc_to_bits(from) >> 20) - (120 << 3); /* rounded down */
        if (!any_from(b->whole.from + h * b->whole.stride, b->lines, code)) continue;
        float x = most_from(b, h, 0, b->lines, code);
        most = x > most ? x : most;
    }
    b->kept[h0 / EXC_BLOCK] = next_scale(b, old, most);
}

/* fp4: codes end at 6, the range at 8 */
static int choose_of_row(band *b, int64_t h, float gain) {
    int fine = 1;
    for (int g = 0; g < b->lines / EXC_GROUP; g++) {
        float old = b->old[4 * h + g];
        if ((6.0f * old + b->reach[h]) * gain < 8.0f * old * (1 - SLACK)) continue;
        b->kept[4 * h + g] = next_scale(b, old, most_from(b, h, g * EXC_GROUP, EXC_GROUP, 0));
        fine &= exc_scale_is_ordinary(b->kept[4 * h + g]);
    }
    return fine;
}

static int choose_all(band *b) {
    float gain = 1;
    int fine = 1;
    for (int l = 0; l < b->lines; l++) gain = b->gain[l] > gain ? b->gain[l] : gain;
    reaches(b);
    if (b->j->a->dtype == EXC_F8_E4M3) {
        for (int64_t h = 0; h < b->j->along; h += EXC_BLOCK) {
            choose_of_block(b, h, gain);
            fine &= exc_scale_is_ordinary(b->kept[h / EXC_BLOCK]);
        }
        return fine;
    }
    const float room = 8.0f * (1 - 2 * SLACK) - 6.0f * gain; /* of a scale, for what an edit moves */
    memcpy(b->kept, b->old, (size_t)(4 * b->j->along) * sizeof *b->kept);
    for (int64_t h = 0; h < b->j->along; h++) {
        const float *old = b->old + 4 * h, far = b->reach[h] * gain;
        int inside = 1;
        for (int g = 0; g < b->lines / EXC_GROUP; g++) inside &= far < old[g] * room;
        if (!inside) fine &= choose_of_row(b, h, gain);
    }
    return fine;
}

static void write_scales(const band *b) {
    const int64_t stride = b->j->a->cols / EXC_GROUP;
    if (b->j->a->dtype == EXC_F8_E4M3) {
        store_scales(b, 0);
        return;
    }
    for (int64_t h = 0; h < b->j->along; h++) {
        uint8_t *to = b->scale_to + h * stride + b->at / EXC_GROUP;
        for (int g = 0; g < b->lines / EXC_GROUP; g++) to[g] = (uint8_t)(exc_to_bits(b->kept[4 * h + g]) >> 23);
    }
}

/* where its codes are, and room */
static void open_whole(band *b) {
    const struct exc_project_args *a = b->j->a;
    const int64_t stride = row_bytes(a), at = a->dtype == EXC_F4 ? b->at / 2 : b->at;
    b->whole = (exc_recode){.dtype = a->dtype, .lines = b->lines, .rows = b->j->along, .rank = a->rank, .basis = a->basis, .coef = b->coef[0],
                            .old = b->old, .now = b->kept, .most = b->largest, .sums = b->acc[0], .wide = b->wide[0], .held = b->held[0]};
    b->whole.fetched = b->was_asked;
    if (!b->last) {
        const int64_t index = b->matrix * b->j->bands + b->at / BAND + 1, next = index % b->j->bands * BAND;
        const uint8_t *matrix = exc_edit_src(a, index / b->j->bands);
        b->whole.next = matrix + (b->j->out ? a->dtype == EXC_F4 ? next / 2 : next : next * stride);
        b->whole.next_stride = b->j->out ? stride : BAND; /* rows that are to be turned lie behind each other */
    }
    if (b->j->out) {
        b->whole.from = b->src + at, b->whole.to = b->dst + at, b->whole.stride = stride;
        return;
    }
    exc_turn(b->src + at * stride, stride, b->lines, stride, b->turned, BAND);
    b->whole.from = b->whole.to = b->turned, b->whole.stride = BAND;
}

/* where exact rounding is to lead, and how it gets there */
static void solve_whole(band *b, const exc_recoder *by) {
    memset(b->acc, 0, (size_t)b->j->a->rank * sizeof *b->acc);
    by->meant(&b->whole);
    memcpy(b->target, b->acc, (size_t)b->j->a->rank * sizeof *b->acc);
    b->whole.lambda = b->lambda[0];
    b->by = by;
    exc_solve(b);
}

int exc_edit_whole(band *b) {
    const job *j = b->j;
    const struct exc_project_args *a = j->a;
    const exc_recoder *by = b->coded && a->rounding != EXC_ROUND_SR ? exc_recoder_for(a->dtype, b->lines) : NULL;
    if (!by || j->factor || j->row_gain || a->strength[b->matrix] == 0.0f || (a->dtype == EXC_F4 && !j->out)) return 0;
    if (!has_room(j) || !ordinary_scales(b)) return 0;
    open_whole(b);
    memset(b->largest, 0, (size_t)(j->along + EXC_BLOCK) / EXC_BLOCK);
    memset(b->length, 0, sizeof b->length);
    b->whole.length = a->size || a->norm != EXC_NORM_NONE ? b->length : NULL;
    by->dots(&b->whole);
    for (int64_t i = 0; i < (j->along + EXC_BLOCK - 1) / EXC_BLOCK; i++)
        if (b->largest[i] >= EXC_NAN_E4M3) return 0;
    keep_dots(b);
    for (int64_t r = 0; r < a->rank; r++)
        for (int l = 0; l < b->lines; l++)
            if (!(__builtin_fabsf(b->coef[r][l]) < 0x1p100f)) return 0;
    if (a->norm != EXC_NORM_NONE) {
        b->whole.length = b->left;
        by->left(&b->whole);
        for (int l = 0; l < b->lines; l++) b->gain[l] = gain_of(b->length[l], b->left[l]);
        b->whole.gain = b->gain;
    }
    if (!choose_all(b)) {
        for (int l = 0; l < b->lines; l++) b->gain[l] = 1; /* as whoever takes the band now expects it */
        return 0;
    }
    if (!b->bare) solve_whole(b, by);
    double moved[BAND] = {0}, error[BAND] = {0};
    if (a->moved || a->error) b->whole.moved = moved, b->whole.error = error;
    b->asked = !b->last;
    if (b->bare) by->result(&b->whole);
    else {
        b->whole.lambda = b->best[0];
        by->solved(&b->whole);
    }
    write_scales(b);
    if (!j->out) exc_turn(b->turned, BAND, j->along, b->lines, b->dst + b->at * a->cols, a->cols);
    b->t->moved = total(moved, b->lines);
    b->t->error = total(error, b->lines);
    b->t->after = acc_square(b);
    b->t->changed = b->whole.changed;
    return 1;
}
