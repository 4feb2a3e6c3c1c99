/* pack.c - W [n,k] row-major (bf16|f16|f32, or quantised) -> panels of 16 outputs, the layout of exc_packed (ops.h).
 *
 * bf16: word i of an output is its inputs (2i, 2i+1); a panel is those words transposed: [k/2][16] words. f32: [k][16].
 * Both are a transposition of 16 rows of 32-bit words, k padded with zeros to a multiple of 32, and rows past n are
 * zeros. Rows are read in runs of 64 bytes and every panel line is written once, whole. Quantised weights are the same
 * transposition of 16-bit words (two e4m3) or bytes (two fp4), with the panel's scales behind it. */
#include <string.h>

#include "codes.h"

#define K_ALIGN 32
#define LINE 16        /* words a step takes of each row */
#define TASK_BYTES (256 << 10)

size_t exc_packed_bytes(int64_t n, int64_t k, int dtype) {
    size_t rows = (size_t)(n + EXC_PANEL - 1) / EXC_PANEL * EXC_PANEL;
    size_t cols = (size_t)(k + K_ALIGN - 1) / K_ALIGN * K_ALIGN;
    if (!exc_is_coded(dtype)) return rows * cols * (dtype == EXC_BF16 ? 2 : 4);
    size_t spans = (cols + (size_t)exc_scale_span(dtype) - 1) / (size_t)exc_scale_span(dtype);
    size_t scales = spans * (dtype == EXC_F4 ? EXC_PANEL : sizeof(float));
    return rows / EXC_PANEL * (exc_code_bytes(k, dtype) + (scales + 63) / 64 * 64);
}

typedef struct job {
    const struct exc_pack_args *a;
    int64_t panels, per_task;
} job;

/* exact: a subnormal half is a multiple of 2^-24 */
static inline float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023, u;
    float f;
    if (e == 0) {
        f = (float)m * 0x1p-24f;
        return sign ? -f : f;
    }
    u = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
    memcpy(&f, &u, 4);
    return f;
}

static inline float element(const void *row, int dtype, int64_t i) {
    if (dtype == EXC_F32) return ((const float *)row)[i];
    uint16_t h = ((const uint16_t *)row)[i];
    if (dtype == EXC_F16) return from_f16(h);
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* words [first, first+LINE) of a row of `k` inputs, zeros past its end */
static inline void read_words(const void *row, int dtype, int to, int64_t k, int64_t first, uint32_t *word) {
    int64_t per = to == EXC_BF16 ? 2 : 1, at = first * per, left = k - at, n = left < LINE * per ? left : LINE * per;
    if (n < LINE * per) memset(word, 0, LINE * sizeof *word);
    if (n <= 0) return;
    if (dtype == to) {
        memcpy(word, (const uint8_t *)row + at * (dtype == EXC_BF16 ? 2 : 4), (size_t)n * (dtype == EXC_BF16 ? 2 : 4));
    } else if (to == EXC_BF16) {
        uint16_t half[2 * LINE] = {0};
        for (int64_t i = 0; i < n; i++) half[i] = (uint16_t)exc_round_bf16(element(row, dtype, at + i));
        memcpy(word, half, sizeof half);
    } else {
        float wide[LINE] = {0};
        for (int64_t i = 0; i < n; i++) wide[i] = element(row, dtype, at + i);
        memcpy(word, wide, sizeof wide);
    }
}

/* a panel of codes as they are, and its scales */
static void pack_codes(const struct exc_pack_args *a, int64_t panel) {
    int64_t first = panel * EXC_PANEL, rows = a->n - first < EXC_PANEL ? a->n - first : EXC_PANEL, k = a->k;
    size_t bytes = exc_packed_bytes(EXC_PANEL, k, a->to), unit = a->to == EXC_F4 ? 1 : 2; /* of two inputs */
    size_t row_bytes = (size_t)k * unit / 2;
    uint8_t *out = (uint8_t *)a->out + (size_t)panel * bytes;
    const uint8_t *src = (const uint8_t *)a->w + (size_t)first * row_bytes;
    memset(out, 0, bytes);
    for (size_t at = 0; at < row_bytes; at += LINE * unit)
        for (int64_t r = 0; r < rows; r++) {
            size_t n = row_bytes - at < LINE * unit ? row_bytes - at : LINE * unit;
            const uint8_t *from = src + (size_t)r * row_bytes + at;
            uint8_t *to = out + at * EXC_PANEL + (size_t)r * unit;
            for (size_t i = 0; i < n; i++) to[i / unit * unit * EXC_PANEL + i % unit] = from[i];
        }
    int64_t span = exc_scale_span(a->to), spans = (k + span - 1) / span;
    uint8_t *scales = out + exc_code_bytes(k, a->to);
    if (a->to == EXC_F4)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t s = 0; s < spans; s++) scales[s * EXC_PANEL + r] = ((const uint8_t *)a->scale)[(first + r) * spans + s];
    else
        for (int64_t s = 0; s < spans; s++) {
            float x = exc_scale_at(a->scale, a->scale_dtype, first / EXC_BLOCK * spans + s);
            memcpy(scales + (size_t)s * sizeof x, &x, sizeof x);
        }
}

/* quantised weights to panels of bf16 or f32, for matrices whose parts are stored in different ways */
static void pack_decoded(const struct exc_pack_args *a, int64_t panel) {
    int64_t first = panel * EXC_PANEL, rows = a->n - first < EXC_PANEL ? a->n - first : EXC_PANEL;
    size_t bytes = exc_packed_bytes(EXC_PANEL, a->k, a->to);
    uint8_t *out = (uint8_t *)a->out + (size_t)panel * bytes;
    memset(out, 0, bytes);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < a->k; i++) {
            float x = exc_coded_at(a->w, a->w_dtype, a->scale, a->scale_dtype, a->k, first + r, i);
            if (a->to == EXC_F32) ((float *)(void *)out)[i * EXC_PANEL + r] = x;
            else ((uint16_t *)(void *)out)[i / 2 * 2 * EXC_PANEL + 2 * r + i % 2] = (uint16_t)exc_round_bf16(x);
        }
}

static void pack_panel(const struct exc_pack_args *a, int64_t panel) {
    int64_t first = panel * EXC_PANEL, rows = a->n - first < EXC_PANEL ? a->n - first : EXC_PANEL;
    size_t bytes = exc_packed_bytes(EXC_PANEL, a->k, a->to), row_bytes = (size_t)a->k * (a->w_dtype == EXC_F32 ? 4 : 2);
    uint32_t *out = (uint32_t *)a->out + (size_t)panel * (bytes / 4);
    const uint8_t *src = (const uint8_t *)a->w + (size_t)first * row_bytes;
    int64_t words = (int64_t)(bytes / 4 / EXC_PANEL);
    for (int64_t i = 0; i < words; i += LINE, out += LINE * EXC_PANEL) {
        uint32_t in[EXC_PANEL][LINE] = {{0}};
        for (int64_t r = 0; r < rows; r++)
            read_words(src + (size_t)r * row_bytes, a->w_dtype, a->to, a->k, i, in[r]);
        for (int w = 0; w < LINE; w++)
            for (int r = 0; r < EXC_PANEL; r++) out[w * EXC_PANEL + r] = in[r][w];
    }
}

static void run(void *arg, size_t task, int worker) {
    (void)worker;
    const job *j = arg;
    int64_t first = (int64_t)task * j->per_task, last = first + j->per_task;
    for (int64_t p = first; p < last && p < j->panels; p++) {
        if (exc_is_coded(j->a->to)) pack_codes(j->a, p);
        else if (exc_is_coded(j->a->w_dtype)) pack_decoded(j->a, p);
        else pack_panel(j->a, p);
    }
}

static int fits(const struct exc_pack_args *a) {
    if (a->n < 0 || a->k < 1) return 0;
    if (!exc_is_coded(a->w_dtype)) {
        int known = a->w_dtype == EXC_BF16 || a->w_dtype == EXC_F16 || a->w_dtype == EXC_F32;
        return known && (a->to == EXC_BF16 || a->to == EXC_F32);
    }
    if (a->to != EXC_BF16 && a->to != EXC_F32 && a->to != a->w_dtype) return 0;
    if (a->w_dtype == EXC_F4 && a->k % EXC_GROUP) return 0;
    return (a->scale || !a->n) && exc_is_scale(a->w_dtype, a->scale_dtype);
}

exc_status exc_cpu_pack(exc_queue *q, const struct exc_pack_args *a) {
    if (!fits(a)) return EXC_ERR_USAGE;
    if (!a->n) return EXC_OK;
    job j = {a, (a->n + EXC_PANEL - 1) / EXC_PANEL, 0};
    j.per_task = TASK_BYTES / (int64_t)exc_packed_bytes(EXC_PANEL, a->k, a->to);
    if (j.per_task < 1) j.per_task = 1;
    q->parallel(q, (size_t)((j.panels + j.per_task - 1) / j.per_task), run, &j);
    return EXC_OK;
}
