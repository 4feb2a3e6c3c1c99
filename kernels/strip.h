/* strip.h - the sweeps of an edit over one strip of columns, for one instruction set. project.c includes this once for
 * each, after defining
 *     V, WIDE          a vector of WIDE floats
 *     GROUP            vectors side by side in a sweep: WIDE * GROUP columns in registers
 *     FMA(a, b, c), SET1(x), LOADF(p), STOREF(p, v), ADD, SUB, MUL
 *     LOAD(p, dtype), STORE(p, v, dtype)   one vector of weights, rounded once to nearest even
 *     NAME(x)          the name for this instruction set, TARGET its attribute
 *
 * A column's numbers depend on the column alone: every operation is element by element and its order is that of ops.def, so all
 * instruction sets, strips and groups give the same bits. Narrow ends of a strip go vector by vector, the rest one by one with
 * fmaf, which rounds just like the vector instruction. */

/* s + t + e = sum + error + x: adds x to a pair and keeps what rounding drops */
TARGET EXC_INLINE void NAME(two_sum)(V *hi, V *lo, V x) {
    V s = ADD(*hi, x), b = SUB(s, *hi);
    V e = ADD(SUB(*hi, SUB(s, b)), SUB(x, b));
    *hi = s;
    *lo = ADD(*lo, e);
}

/* c[0..ranks) of `n` vectors of columns, all rows. Rows to come are asked for as the sweep goes down. */
TARGET EXC_INLINE void NAME(dots)(const exc_strip *s, const char *w, size_t stride, const float *basis, int ranks, int n,
                                  int dtype, float *c) {
    V hi[RANKS][GROUP], lo[RANKS][GROUP];
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < n; v++) hi[r][v] = lo[r][v] = SET1(0.0f);
    for (int64_t first = 0; first < s->rows; first += CHUNK) {
        int64_t last = exc_least(first + CHUNK, s->rows);
        V p[RANKS][GROUP];
        _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++)
            _Pragma("GCC unroll 8") for (int v = 0; v < n; v++) p[r][v] = SET1(0.0f);
        for (int64_t h = first; h < last; h++) {
            const char *row = w + (size_t)h * stride;
            for (int at = 0; !s->fetched && at < n * WIDE * (dtype == EXC_F32 ? 4 : 2); at += 64)
                __builtin_prefetch(row + AHEAD * stride + at, 0, 2);
            V k[RANKS];
            _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++) k[r] = SET1(basis[r * s->rows + h]);
            _Pragma("GCC unroll 8") for (int v = 0; v < n; v++) {
                V x = LOAD(row, v * WIDE, dtype);
                _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++) p[r][v] = FMA(k[r], x, p[r][v]);
            }
        }
        _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++)
            _Pragma("GCC unroll 8") for (int v = 0; v < n; v++) NAME(two_sum)(&hi[r][v], &lo[r][v], p[r][v]);
    }
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < n; v++) STOREF(c + r * STRIP + v * WIDE, ADD(hi[r][v], lo[r][v]));
}

/* dst = gain * (w - sum of (strength * basis) c); gain NULL: 1. The sum starts at +0 and is subtracted at the end, so that
 * w - 0 keeps every bit of w, the sign of zero too. Rows of the next strip are asked for meanwhile: its first sweep would wait
 * for memory while nothing is written, and this one leaves memory idle while it computes. */
TARGET EXC_INLINE void NAME(update)(const exc_strip *s, const char *w, char *dst, const float *c, const float *gain, int ranks,
                                    int n, int dtype, int count) {
    V held[RANKS][GROUP], g[GROUP];
    int small = ranks > 0;
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < n; v++) held[r][v] = LOADF(c + r * STRIP + v * WIDE);
    for (int v = 0; v < n; v++) g[v] = gain ? LOADF(gain + v * WIDE) : SET1(1.0f);
    const float neg = s->strength;
    size_t bytes = (size_t)n * WIDE * (dtype == EXC_F32 ? 4 : 2);
    const char *next = s->next ? s->next + (w - s->src) : NULL;
    for (int64_t h = 0; h < s->rows; h++) {
        const char *from = w + (size_t)h * s->src_stride;
        char *to = dst + (size_t)h * s->dst_stride, old[STRIP * 4];
        V k[RANKS];
        for (size_t at = 0; next && at < bytes; at += 64) __builtin_prefetch(next + (size_t)h * s->src_stride + at, 0, 2);
        if (count) memcpy(old, from, bytes);
        if (small)
            _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++) k[r] = SET1(neg * s->basis[r * s->rows + h]);
        _Pragma("GCC unroll 8") for (int v = 0; v < n; v++) {
            V x = LOAD(from, v * WIDE, dtype), d = SET1(0.0f);
            if (small) {
                _Pragma("GCC unroll 8") for (int r = 0; r < ranks; r++) d = FMA(k[r], held[r][v], d);
            } else {
                for (int64_t r = 0; r < s->rank; r++)
                    d = FMA(SET1(neg * s->basis[r * s->rows + h]), LOADF(c + r * STRIP + v * WIDE), d);
            }
            x = SUB(x, d);
            if (gain) x = MUL(x, g[v]);
            STORE(to, v * WIDE, x, dtype);
        }
        if (count) *s->changed += exc_differing(old, to, (int)n * WIDE, dtype);
    }
}

/* sums of squares of the weights (edited 0) or of what they become before the gain (1), as pairs by chunk like dots */
TARGET EXC_INLINE void NAME(squares)(const exc_strip *s, const char *w, const float *c, int edited, int n, int dtype, float *sum) {
    for (int v = 0; v < n; v++) {
        V hi = SET1(0.0f), lo = SET1(0.0f);
        for (int64_t first = 0; first < s->rows; first += CHUNK) {
            V p = SET1(0.0f);
            for (int64_t h = first; h < exc_least(first + CHUNK, s->rows); h++) {
                V x = LOAD(w + (size_t)h * s->src_stride, v * WIDE, dtype), d = SET1(0.0f);
                for (int64_t r = 0; edited && r < s->rank; r++)
                    d = FMA(SET1(s->strength * s->basis[r * s->rows + h]), LOADF(c + r * STRIP + v * WIDE), d);
                x = SUB(x, d);
                p = FMA(x, x, p);
            }
            NAME(two_sum)(&hi, &lo, p);
        }
        STOREF(sum + v * WIDE, ADD(hi, lo));
    }
}

/* all ranks of n vectors of columns, as many at a time as registers hold */
TARGET EXC_INLINE void NAME(dots_of)(const exc_strip *s, const char *w, size_t stride, int n, int dtype, float *c) {
    int64_t r = 0;
    const float *b = s->basis;
    for (; r + 3 <= s->rank; r += 3) NAME(dots)(s, w, stride, b + r * s->rows, 3, n, dtype, c + r * STRIP);
    if (s->rank - r == 2) NAME(dots)(s, w, stride, b + r * s->rows, 2, n, dtype, c + r * STRIP);
    if (s->rank - r == 1) NAME(dots)(s, w, stride, b + r * s->rows, 1, n, dtype, c + r * STRIP);
}

TARGET EXC_INLINE void NAME(update_of)(const exc_strip *s, const char *w, char *dst, const float *c, const float *gain, int n,
                                       int dtype) {
    if (gain || s->changed || s->rank > 3) {
        if (s->changed) NAME(update)(s, w, dst, c, gain, 0, n, dtype, 1);
        else NAME(update)(s, w, dst, c, gain, 0, n, dtype, 0);
    } else if (s->rank == 1) NAME(update)(s, w, dst, c, NULL, 1, n, dtype, 0);
    else if (s->rank == 2) NAME(update)(s, w, dst, c, NULL, 2, n, dtype, 0);
    else NAME(update)(s, w, dst, c, NULL, 3, n, dtype, 0);
}

/* one call of a sweep, for a run of n vectors from column `at` of the strip */
TARGET EXC_INLINE void NAME(run)(const exc_strip *s, enum sweep what, int64_t at, int n, int dtype) {
    size_t off = (size_t)at * (dtype == EXC_F32 ? 4 : 2);
    const char *src = s->src + off;
    switch (what) {
    case SWEEP_DOTS: NAME(dots_of)(s, src, s->src_stride, n, dtype, s->c + at); break;
    case SWEEP_AFTER: NAME(dots_of)(s, s->dst + off, s->dst_stride, n, dtype, s->after + at); break;
    case SWEEP_LENGTH: NAME(squares)(s, src, s->c + at, 0, n, dtype, s->length + at); break;
    case SWEEP_LEFT: NAME(squares)(s, src, s->c + at, 1, n, dtype, s->left + at); break;
    case SWEEP_UPDATE: NAME(update_of)(s, src, s->dst + off, s->c + at, s->gain ? s->gain + at : NULL, n, dtype); break;
    }
}

TARGET EXC_INLINE void NAME(typed)(const exc_strip *s, enum sweep what, int dtype) {
    int64_t at = 0;
    for (; at + GROUP * WIDE <= s->cols; at += GROUP * WIDE) NAME(run)(s, what, at, GROUP, dtype);
    for (; at + WIDE <= s->cols; at += WIDE) NAME(run)(s, what, at, 1, dtype);
    if (at < s->cols) NAME(rest)(s, what, at);
}

TARGET static void NAME(strip)(const exc_strip *s, enum sweep what) {
    if (s->dtype == EXC_BF16) NAME(typed)(s, what, EXC_BF16);
    else if (s->dtype == EXC_F16) NAME(typed)(s, what, EXC_F16);
    else NAME(typed)(s, what, EXC_F32);
}

#undef V
#undef WIDE
#undef GROUP
#undef FMA
#undef SET1
#undef LOADF
#undef STOREF
#undef ADD
#undef SUB
#undef MUL
#undef LOAD
#undef STORE
#undef NAME
#undef TARGET
