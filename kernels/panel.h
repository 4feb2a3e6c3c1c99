/* panel.h - z += X^T (X v) for a block of samples and 16 vectors side by side, for one instruction set and precision. subspace.c
 * includes this for each, after defining V (a vector of WIDE numbers of type R), ROWS (samples whose sums share registers), SET1,
 * LOAD, STORE, FMA, NAME and TARGET. v, z [width, stride] hold component j of all vectors side by side, so that a sample's
 * element is used by one broadcast. Both products run while the samples of a block are in cache: X is read once. */

#define VECTORS (SIDE / WIDE)
#define TILE 64 /* columns fetched at once */

/* some columns of the samples as R: converted once for all products with them, or where they are */
TARGET EXC_INLINE void NAME(fetch)(const float *x, int64_t row_stride, int rows, int64_t n, R room[ROWS][TILE], const R *t[ROWS]) {
    for (int i = 0; i < rows; i++) {
        const float *row = x + i * row_stride;
        t[i] = sizeof(R) == sizeof *x ? (const R *)(const void *)row : room[i];
        for (int64_t j = 0; sizeof(R) != sizeof *x && j < n; j++) room[i][j] = (R)row[j];
    }
}

TARGET EXC_INLINE void NAME(block)(const float *x, int64_t row_stride, int rows, int64_t width, const R *v, R *z, int64_t stride) {
    V y[ROWS][VECTORS];
    _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++)
        _Pragma("GCC unroll 16") for (int k = 0; k < VECTORS; k++) y[i][k] = SET1((R)0);
    for (int64_t first = 0; first < width; first += TILE) {
        int64_t n = exc_least(TILE, width - first);
        R room[ROWS][TILE];
        const R *t[ROWS];
        NAME(fetch)(x + first, row_stride, rows, n, room, t);
        for (int64_t j = 0; j < n; j++)
            _Pragma("GCC unroll 16") for (int k = 0; k < VECTORS; k++) {
                V c = LOAD(v + (first + j) * stride + k * WIDE);
                _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) y[i][k] = FMA(SET1(t[i][j]), c, y[i][k]);
            }
    }
    for (int64_t first = 0; first < width; first += TILE) {
        int64_t n = exc_least(TILE, width - first);
        R room[ROWS][TILE];
        const R *t[ROWS];
        NAME(fetch)(x + first, row_stride, rows, n, room, t);
        for (int64_t j = 0; j < n; j++)
            _Pragma("GCC unroll 16") for (int k = 0; k < VECTORS; k++) {
                V c = LOAD(z + (first + j) * stride + k * WIDE);
                _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) c = FMA(SET1(t[i][j]), y[i][k], c);
                STORE(z + (first + j) * stride + k * WIDE, c);
            }
    }
}

TARGET static void NAME(sweep)(const float *x, int64_t row_stride, int64_t samples, int64_t width, const R *v, R *z,
                               int64_t stride) {
    memset(z, 0, (size_t)(width * stride) * sizeof *z);
    int64_t i = 0;
    for (; i + ROWS <= samples; i += ROWS)
        for (int64_t at = 0; at < stride; at += SIDE)
            NAME(block)(x + i * row_stride, row_stride, ROWS, width, v + at, z + at, stride);
    for (; i < samples; i++)
        for (int64_t at = 0; at < stride; at += SIDE)
            NAME(block)(x + i * row_stride, row_stride, 1, width, v + at, z + at, stride);
}

#undef VECTORS
#undef TILE
#undef V
#undef R
#undef WIDE
#undef ROWS
#undef SET1
#undef LOAD
#undef STORE
#undef FMA
#undef NAME
#undef TARGET
