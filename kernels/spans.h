/* spans.h - recode.h for one instruction set. recode.c includes this once for each, after defining
 *     V, U, WIDE           vectors of WIDE floats and of as many 32-bit integers
 *     FMA, SET1, ADD, SUB, MUL, LOADF, STOREF, ZERO
 *     ROUNDED(a, least, by)   a to nearest even; by = 1.5 * 2^(bits that go), or as many as go of the power of two `least`
 *     SIGNED(x, a)         x with the sign of a
 *     AT_MOST(a, x)        a, its size held below x
 *     ADD_WIDE(sum, v)     f64 [WIDE] += v
 *     decode8, encode8, decode4, encode4, differing, larger, largest, spread    see recode.c
 *     NAME(x)              the name for this instruction set, TARGET its attribute
 *
 * A span is what lines fit into a register of codes: four vectors of e4m3, eight of fp4. In which order lines lie in them is
 * lane_of()'s matter; all arithmetic is element by element. */

#define MOST 8 /* vectors of a span */
#define VECTORS(dtype) ((dtype) == EXC_F4 ? 8 : 4)
#define EACH(v) _Pragma("GCC unroll 8") for (int v = 0; v < n; v++)

/* arrays of lines to and from the order of vectors */
TARGET EXC_INLINE void NAME(take)(const float *lines, int dtype, V *to) {
    float x[MOST * WIDE];
    for (int i = 0; i < VECTORS(dtype) * WIDE; i++) x[i] = lines[lane_of(dtype, WIDE, i / WIDE, i % WIDE)];
    for (int v = 0; v < VECTORS(dtype); v++) to[v] = LOADF(x + v * WIDE);
}
TARGET EXC_INLINE void NAME(give)(const double *sum, int dtype, double *lines) {
    for (int i = 0; i < VECTORS(dtype) * WIDE; i++) lines[lane_of(dtype, WIDE, i / WIDE, i % WIDE)] = sum[i];
}

TARGET EXC_INLINE void NAME(take_all)(const exc_recode *a, const float *lines, int dtype, int span, float *coef) {
    const int n = VECTORS(dtype);
    V x[MOST];
    for (int64_t r = 0; r < a->rank; r++) {
        NAME(take)(lines + r * EXC_BAND + span * n * WIDE, dtype, x);
        EACH(v) STOREF(coef + (r * MOST + v) * WIDE, x[v]);
    }
}

/* the scales of row h: one for all of e4m3, by lane for fp4 */
TARGET EXC_INLINE V NAME(scales)(const float *scale, int dtype, int64_t h, int span) {
    return dtype == EXC_F4 ? NAME(spread)(scale + 4 * h + span * WIDE / 4) : SET1(scale[h / EXC_BLOCK]);
}
TARGET EXC_INLINE V NAME(inverse)(const float *scale, int dtype, int64_t h, int span) {
    if (dtype == EXC_F4) return NAME(inverses)(NAME(scales)(scale, dtype, h, span));
    return SET1(1.0f / scale[h / EXC_BLOCK] * 0x1p-8f);
}

/* weights of a row: codes of e4m3 come out 2^-8 times what they are, which the scale makes up for */
TARGET EXC_INLINE void NAME(weights)(const uint8_t *row, int dtype, V scale, V *x) {
    const int n = VECTORS(dtype);
    if (dtype == EXC_F4) NAME(decode4)(row, x);
    else NAME(decode8)(row, x);
    EACH(v) x[v] = MUL(x[v], scale);
}

/* what one sum of squares or direction of a span has come to */
typedef struct NAME(sum) {
    double wide[MOST * WIDE];
} NAME(sum);

TARGET EXC_INLINE void NAME(add)(NAME(sum) *to, const V *part, int n) {
    EACH(v) ADD_WIDE(to->wide + v * WIDE, part[v]);
}

/* sums of a piece that lies in a buffer, a direction at a time */
TARGET EXC_INLINE void NAME(directions)(const exc_recode *a, const float *x, int64_t h0, int rows, int n, double *wide) {
    for (int64_t r = 0; r < a->rank; r++) {
        V part[MOST];
        EACH(v) part[v] = ZERO;
        for (int h = 0; h < rows; h++) {
            V b = SET1(a->basis[r * a->rows + h0 + h]);
            EACH(v) part[v] = FMA(b, LOADF(x + (h * n + v) * WIDE), part[v]);
        }
        NAME(add)((NAME(sum) *)(wide + r * MOST * WIDE), part, n);
    }
}

/* R^T coef of row h; one direction's coefficients are in registers */
TARGET EXC_INLINE void NAME(share)(const exc_recode *a, const V *held, const float *coef, int64_t h, int one, int n, V *d) {
    EACH(v) d[v] = ZERO;
    if (one) {
        V b = SET1(a->basis[h]);
        EACH(v) d[v] = FMA(b, held[v], d[v]);
    } else
        for (int64_t r = 0; r < a->rank; r++) {
            V b = SET1(a->basis[r * a->rows + h]);
            EACH(v) d[v] = FMA(b, LOADF(coef + (r * MOST + v) * WIDE), d[v]);
        }
}

#define EACH_SPAN(span) for (int span = 0; span * VECTORS(dtype) * WIDE < a->lines; span++)
#define SPAN_BYTES (4 * WIDE)

TARGET EXC_INLINE void NAME(dots_of)(exc_recode *a, int dtype, int one, int sized) {
    const int n = VECTORS(dtype);
    const int64_t stride = a->stride;
    double *wide = a->wide;
    EACH_SPAN(span) {
        NAME(sum) size = {{0}};
        const uint8_t *row = a->from + span * SPAN_BYTES;
        U top = NO_CODES;
        memset(wide, 0, (size_t)a->rank * MOST * WIDE * sizeof *wide);
        for (int64_t h0 = 0; h0 < a->rows; h0 += EXC_BAND_PIECE) {
            const int rows = (int)(a->rows - h0 < EXC_BAND_PIECE ? a->rows - h0 : EXC_BAND_PIECE);
            V part[MOST], square[MOST];
            float buffer[EXC_BAND_PIECE * MOST * WIDE];
            EACH(v) part[v] = square[v] = ZERO;
            V scale = NAME(scales)(a->old, dtype, h0, span);
            if (dtype != EXC_F4) scale = MUL(scale, SET1(0x1p8f));
            for (int h = 0; h < rows; h++, row += stride) {
                V x[MOST], b = SET1(a->basis[h0 + h]);
                if (!a->fetched) __builtin_prefetch(row + AHEAD * stride, 0, 2);
                if (dtype == EXC_F4) scale = NAME(scales)(a->old, dtype, h0 + h, span);
                else top = NAME(larger)(top, row);
                NAME(weights)(row, dtype, scale, x);
                EACH(v) {
                    if (one) part[v] = FMA(b, x[v], part[v]);
                    else STOREF(buffer + (h * n + v) * WIDE, x[v]);
                    if (sized) square[v] = FMA(x[v], x[v], square[v]);
                }
            }
            if (one) NAME(add)((NAME(sum) *)wide, part, n);
            else NAME(directions)(a, buffer, h0, rows, n, wide);
            if (sized) NAME(add)(&size, square, n);
            if (dtype == EXC_F4 || ((h0 + rows) % EXC_BLOCK && h0 + rows < a->rows)) continue;
            int most = NAME(largest)(top);
            if (most > a->most[h0 / EXC_BLOCK]) a->most[h0 / EXC_BLOCK] = (uint8_t)most;
            top = NO_CODES;
        }
        for (int64_t r = 0; r < a->rank; r++) NAME(give)(wide + r * MOST * WIDE, dtype, a->sums + r * EXC_BAND + span * n * WIDE);
        if (sized) NAME(give)(size.wide, dtype, a->length + span * n * WIDE);
    }
}

TARGET EXC_INLINE void NAME(left_of)(exc_recode *a, int dtype) {
    const int n = VECTORS(dtype);
    float *coef = a->held;
    EACH_SPAN(span) {
        NAME(sum) size = {{0}};
        NAME(take_all)(a, a->coef, dtype, span, coef);
        for (int64_t h0 = 0; h0 < a->rows; h0 += EXC_BAND_PIECE) {
            const int64_t end = a->rows - h0 < EXC_BAND_PIECE ? a->rows : h0 + EXC_BAND_PIECE;
            V square[MOST];
            EACH(v) square[v] = ZERO;
            for (int64_t h = h0; h < end; h++) {
                V x[MOST], d[MOST], scale = NAME(scales)(a->old, dtype, h, span);
                if (dtype != EXC_F4) scale = MUL(scale, SET1(0x1p8f));
                NAME(weights)(a->from + span * SPAN_BYTES + h * a->stride, dtype, scale, x);
                NAME(share)(a, NULL, coef, h, 0, n, d);
                EACH(v) {
                    V y = SUB(x[v], d[v]);
                    square[v] = FMA(y, y, square[v]);
                }
            }
            NAME(add)(&size, square, n);
        }
        NAME(give)(size.wide, dtype, a->length + span * n * WIDE);
    }
}

/* `one`: a direction and no gain; `summed`: moved and error are wanted; `how` the result comes about */
TARGET EXC_INLINE void NAME(result_of)(exc_recode *a, int dtype, int one, int summed, enum how how) {
    const int n = VECTORS(dtype), stored = how == NEAREST || how == SOLVED, apart = stored && a->to != a->from;
    const int64_t stride = a->stride, next_stride = a->next && stored ? a->next_stride : 0;
    double *wide = a->wide;
    float *coef = a->held, *lambda = a->held + a->rank * EXC_BAND;
    int64_t changed = 0;
    EACH_SPAN(span) {
        NAME(sum) moved = {{0}}, error = {{0}};
        V held[MOST], gain[MOST], solved[MOST];
        NAME(take_all)(a, a->coef, dtype, span, coef);
        EACH(v) held[v] = solved[v] = LOADF(coef + v * WIDE);
        if (how == TRIED || how == SOLVED) {
            NAME(take_all)(a, a->lambda, dtype, span, lambda);
            EACH(v) solved[v] = LOADF(lambda + v * WIDE);
        }
        EACH(v) gain[v] = SET1(1.0f);
        if (!one && a->gain) NAME(take)(a->gain + span * n * WIDE, dtype, gain);
        memset(wide, 0, (size_t)a->rank * MOST * WIDE * sizeof *wide);
        const uint8_t *row = a->from + span * SPAN_BYTES;
        uint8_t *to = a->to + span * SPAN_BYTES;
        const uint8_t *next = a->next + span * SPAN_BYTES;
        for (int64_t h0 = 0; h0 < a->rows; h0 += EXC_BAND_PIECE) {
            const int rows = (int)(a->rows - h0 < EXC_BAND_PIECE ? a->rows - h0 : EXC_BAND_PIECE);
            V part[MOST], moves[MOST], errors[MOST];
            float buffer[EXC_BAND_PIECE * MOST * WIDE];
            EACH(v) part[v] = moves[v] = errors[v] = ZERO;
            V old = NAME(scales)(a->old, dtype, h0, span), now = NAME(scales)(a->now, dtype, h0, span);
            V inverse = NAME(inverse)(a->now, dtype, h0, span);
            if (dtype != EXC_F4) old = MUL(old, SET1(0x1p8f)), now = MUL(now, SET1(0x1p8f));
            for (int h = 0; h < rows; h++, row += stride, to += stride, next += next_stride) {
                V x[MOST], d[MOST], shift[MOST], b = SET1(a->basis[h0 + h]);
                if (next_stride) __builtin_prefetch(next, 0, 2);
                if (apart) __builtin_prefetch(to + AHEAD * stride, 1, 2);
                if (dtype == EXC_F4) {
                    old = NAME(scales)(a->old, dtype, h0 + h, span), now = NAME(scales)(a->now, dtype, h0 + h, span);
                    inverse = NAME(inverse)(a->now, dtype, h0 + h, span);
                }
                NAME(weights)(row, dtype, old, x);
                NAME(share)(a, held, coef, h0 + h, one, n, d);
                if (how == TRIED || how == SOLVED) NAME(share)(a, solved, lambda, h0 + h, one, n, shift);
                EACH(v) {
                    V y = SUB(x[v], d[v]);
                    if (!one) y = MUL(y, gain[v]);
                    V s = how == TRIED || how == SOLVED ? SUB(y, shift[v]) : y, near, value = y;
                    s = MUL(s, inverse);
                    if (dtype == EXC_F4) near = ROUNDED(AT_MOST(s, 6.0f), 1.0f, 0x1.8p22f);
                    else near = ROUNDED(how == SOLVED || how == TRIED ? AT_MOST(s, 1.75f) : s, 0x1p-14f, 0x1.8p20f);
                    if (how != MEANT) value = MUL(near, now);
                    if (one) part[v] = FMA(b, value, part[v]);
                    else STOREF(buffer + (h * n + v) * WIDE, value);
                    if (summed) {
                        V m = SUB(y, x[v]), e = SUB(value, y);
                        moves[v] = FMA(m, m, moves[v]);
                        errors[v] = FMA(e, e, errors[v]);
                    }
                    x[v] = SIGNED(near, s);
                }
                if (!stored) continue;
                U code = dtype == EXC_F4 ? NAME(encode4)(x) : NAME(encode8)(x);
                changed += NAME(differing)(code, row, dtype, a->old, a->now, h0 + h, span);
                STOREU(to, code);
            }
            if (one) NAME(add)((NAME(sum) *)wide, part, n);
            else NAME(directions)(a, buffer, h0, rows, n, wide);
            if (summed) NAME(add)(&moved, moves, n), NAME(add)(&error, errors, n);
        }
        for (int64_t r = 0; r < a->rank; r++) NAME(give)(wide + r * MOST * WIDE, dtype, a->sums + r * EXC_BAND + span * n * WIDE);
        if (summed) NAME(give)(moved.wide, dtype, a->moved + span * n * WIDE), NAME(give)(error.wide, dtype, a->error + span * n * WIDE);
    }
    if (stored) a->changed = changed;
}

#define SWEEPS(name, dtype)                                                                     \
    TARGET static void NAME(dots_##name)(exc_recode *a) {                                       \
        if (a->rank > 1) NAME(dots_of)(a, dtype, 0, a->length != NULL);                         \
        else if (a->length) NAME(dots_of)(a, dtype, 1, 1);                                      \
        else NAME(dots_of)(a, dtype, 1, 0);                                                     \
    }                                                                                           \
    TARGET static void NAME(left_##name)(exc_recode *a) { NAME(left_of)(a, dtype); }            \
    TARGET static void NAME(result_##name)(exc_recode *a) {                                     \
        if (a->rank > 1 || a->gain) NAME(result_of)(a, dtype, 0, a->moved != NULL, NEAREST);    \
        else if (a->moved) NAME(result_of)(a, dtype, 1, 1, NEAREST);                            \
        else NAME(result_of)(a, dtype, 1, 0, NEAREST);                                          \
    }                                                                                           \
    TARGET static void NAME(solved_##name)(exc_recode *a) {                                     \
        NAME(result_of)(a, dtype, 0, a->moved != NULL, SOLVED);                                 \
    }                                                                                           \
    TARGET static void NAME(meant_##name)(exc_recode *a) { NAME(result_of)(a, dtype, 0, 0, MEANT); } \
    TARGET static void NAME(trial_##name)(exc_recode *a) {                                      \
        if (a->rank > 1 || a->gain) NAME(result_of)(a, dtype, 0, 0, TRIED);                     \
        else NAME(result_of)(a, dtype, 1, 0, TRIED);                                            \
    }                                                                                           \
    static const exc_recoder NAME(name) = {NAME(dots_##name),   NAME(left_##name),  NAME(result_##name), \
                                           NAME(solved_##name), NAME(meant_##name), NAME(trial_##name)};
SWEEPS(f8, EXC_F8_E4M3)
SWEEPS(f4, EXC_F4)

#undef SWEEPS
#undef MOST
#undef VECTORS
#undef EACH
#undef EACH_SPAN
#undef SPAN_BYTES
#undef V
#undef U
#undef WIDE
#undef FMA
#undef SET1
#undef ADD
#undef SUB
#undef MUL
#undef LOADF
#undef STOREF
#undef ZERO
#undef STOREU
#undef NO_CODES
#undef ROUNDED
#undef SIGNED
#undef AT_MOST
#undef ADD_WIDE
#undef NAME
#undef TARGET
