/* picture.c - a table of numbers as a picture, twice: as base64 int16 cells which the page's script draws on
 * a canvas (sharp at any size, readable under the pointer, redrawn in dark mode), and as an indexed PNG of
 * one pixel a cell for readers without scripts. Both use one diverging scale centred on 0, blue below and
 * orange-red above, which stays readable with any of the common colour vision deficiencies. 61 layers x 256
 * experts: 42 KB as cells; as SVG rectangles 1.5 MB. */
#include <math.h>
#include <string.h>

#include "result.h"

void exc_pack_cells(exc_buf *b, const double *values, size_t n, double scale) {
    uint8_t chunk[3 * 256]; /* a multiple of 3 bytes and of 2: base64 without padding inside */
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double x = scale > 0 ? values[i] / scale : 0;
        int v = isfinite(values[i]) ? (int)lrint(32767 * fmin(fmax(x, -1), 1)) : -32768;
        chunk[at++] = (uint8_t)(v & 255);
        chunk[at++] = (uint8_t)(v >> 8 & 255);
        if (at == sizeof chunk) {
            exc_base64(b, chunk, at);
            at = 0;
        }
    }
    exc_base64(b, chunk, at);
}

/* --------------------------------------------------------------------------------------------------------
 * PNG */

static uint32_t crc(uint32_t c, const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
    }
    return c;
}

static void big32(exc_buf *b, uint32_t x) {
    uint8_t p[4] = {(uint8_t)(x >> 24), (uint8_t)(x >> 16), (uint8_t)(x >> 8), (uint8_t)x};
    exc_buf_put(b, p, 4);
}

static void chunk_put(exc_buf *b, const char *type, const void *data, size_t n) {
    big32(b, (uint32_t)n);
    size_t from = b->len;
    exc_buf_put(b, type, 4);
    exc_buf_put(b, data, n);
    if (!b->failed) big32(b, ~crc(~0u, (const uint8_t *)b->data + from, n + 4));
}

/* zlib stream of stored blocks: pictures are small, and a compressor is not worth its lines here */
static void zlib_stored(exc_buf *z, const uint8_t *data, size_t n) {
    uint32_t a = 1, s = 0;
    exc_buf_put(z, "\x78\x01", 2);
    for (size_t at = 0; at < n || !n;) {
        size_t len = n - at < 65535 ? n - at : 65535;
        uint8_t head[5] = {at + len == n, (uint8_t)len, (uint8_t)(len >> 8), (uint8_t)~len,
                           (uint8_t)(~len >> 8)};
        exc_buf_put(z, head, 5);
        exc_buf_put(z, data + at, len);
        at += len;
        if (!n) break;
    }
    for (size_t i = 0; i < n; i++) {
        a = (a + data[i]) % 65521;
        s = (s + a) % 65521;
    }
    big32(z, s << 16 | a);
}

/* index 0 is "no value"; 1..255 run from -1 to 1, 128 is 0. Anchors as in the page's script (light scheme).
 */
static void palette(uint8_t rgb[256][3]) {
    static const double anchor[7][3] = {{8, 64, 129},    {43, 123, 186}, {146, 197, 222}, {247, 247, 245},
                                        {250, 190, 138}, {222, 101, 51}, {143, 36, 12}};
    memset(rgb[0], 200, 3);
    for (int i = 1; i < 256; i++) {
        double at = (i - 1) / 254.0 * 6;
        int k = at < 5 ? (int)at : 5;
        for (int c = 0; c < 3; c++)
            rgb[i][c] = (uint8_t)lrint(anchor[k][c] + (at - k) * (anchor[k + 1][c] - anchor[k][c]));
    }
}

void exc_png_cells(exc_buf *b, const double *values, int64_t rows, int64_t cols, double scale) {
    uint8_t rgb[256][3], head[13] = {(uint8_t)(cols >> 24),
                                     (uint8_t)(cols >> 16),
                                     (uint8_t)(cols >> 8),
                                     (uint8_t)cols,
                                     (uint8_t)(rows >> 24),
                                     (uint8_t)(rows >> 16),
                                     (uint8_t)(rows >> 8),
                                     (uint8_t)rows,
                                     8,
                                     3,
                                     0,
                                     0,
                                     0};
    exc_buf png = {0}, raw = {0}, z = {0};
    palette(rgb);
    for (int64_t r = 0; r < rows; r++) {
        exc_buf_put(&raw, "", 1); /* filter 0 */
        for (int64_t c = 0; c < cols; c++) {
            double v = values[r * cols + c], x = scale > 0 ? fmin(fmax(v / scale, -1), 1) : 0;
            uint8_t index = isfinite(v) ? (uint8_t)(128 + lrint(127 * x)) : 0;
            exc_buf_put(&raw, &index, 1);
        }
    }
    zlib_stored(&z, (const uint8_t *)raw.data, raw.len);
    exc_buf_put(&png, "\x89PNG\r\n\x1a\n", 8);
    chunk_put(&png, "IHDR", head, sizeof head);
    chunk_put(&png, "PLTE", rgb, sizeof rgb);
    chunk_put(&png, "IDAT", z.data, z.len);
    chunk_put(&png, "IEND", "", 0);
    exc_buf_puts(b, "data:image/png;base64,");
    if (png.data) exc_base64(b, png.data, png.len);
    b->failed |= raw.failed || z.failed || png.failed;
    exc_buf_free(&raw);
    exc_buf_free(&z);
    exc_buf_free(&png);
}
