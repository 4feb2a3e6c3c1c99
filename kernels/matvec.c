/* matvec.c - f64 products with a packed weight matrix: y [rows,n] = x [rows,k] W^T.
 *
 * Capture sums the activations that enter down_proj (f64 [E,I]); the sum of expert outputs is W_down times
 * that sum, because the map is linear. A few rows a matrix (labels x phases), thousands of matrices: the
 * weights are read once, 16 outputs (a panel) at a time, and every product and sum is f64. Panels are
 * independent tasks. */
#include "codes.h"

#define ROWS 8 /* rows that share one read of a panel: 8 x 16 f64 accumulators */

typedef struct job {
    const struct exc_matvec_args *a;
    int64_t panels;
} job;

static inline double from_bf16(uint16_t x) {
    union {
        uint32_t u;
        float f;
    } c = {(uint32_t)x << 16};
    return (double)c.f;
}

static void panel_bf16(const uint16_t *w, int64_t k, const double *const *x, int64_t rows,
                       double (*sum)[EXC_PANEL]) {
    for (int64_t i = 0; i < k; i += 2, w += 2 * EXC_PANEL) {
        double even[EXC_PANEL], odd[EXC_PANEL];
        for (int o = 0; o < EXC_PANEL; o++) {
            even[o] = from_bf16(w[2 * o]);
            odd[o] = from_bf16(w[2 * o + 1]);
        }
        for (int64_t r = 0; r < rows; r++) {
            double a = x[r][i], b = i + 1 < k ? x[r][i + 1] : 0.0;
            for (int o = 0; o < EXC_PANEL; o++) sum[r][o] += even[o] * a;
            for (int o = 0; o < EXC_PANEL; o++) sum[r][o] += odd[o] * b;
        }
    }
}

static void panel_f32(const float *w, int64_t k, const double *const *x, int64_t rows,
                      double (*sum)[EXC_PANEL]) {
    for (int64_t i = 0; i < k; i++, w += EXC_PANEL)
        for (int64_t r = 0; r < rows; r++) {
            double a = x[r][i];
            for (int o = 0; o < EXC_PANEL; o++) sum[r][o] += (double)w[o] * a;
        }
}

/* codes by their scale are exact in f64 */
static void panel_codes(const uint8_t *w, int dtype, int64_t k, const double *const *x, int64_t rows,
                        double (*sum)[EXC_PANEL]) {
    for (int64_t i = 0; i < k; i++) {
        double v[EXC_PANEL];
        for (int o = 0; o < EXC_PANEL; o++)
            v[o] = (double)exc_panel_code(w, dtype, i, o) * (double)exc_panel_scale(w, dtype, k, i, o);
        for (int64_t r = 0; r < rows; r++)
            for (int o = 0; o < EXC_PANEL; o++) sum[r][o] += v[o] * x[r][i];
    }
}

static void run(void *arg, size_t task, int worker) {
    const job *j = arg;
    const struct exc_matvec_args *a = j->a;
    int64_t n = a->w->n, k = a->w->k, panel = (int64_t)task % j->panels,
            first = (int64_t)task / j->panels * ROWS;
    int64_t rows = a->rows - first < ROWS ? a->rows - first : ROWS;
    size_t bytes = exc_packed_bytes(EXC_PANEL, k, a->w->dtype);
    const uint8_t *w = (const uint8_t *)a->w->data + (size_t)panel * bytes;
    const double *x[ROWS];
    double sum[ROWS][EXC_PANEL] = {{0}};
    for (int64_t r = 0; r < rows; r++) x[r] = a->x + (first + r) * k;
    if (a->w->dtype == EXC_BF16)
        panel_bf16((const uint16_t *)w, k, x, rows, sum);
    else if (exc_is_coded(a->w->dtype))
        panel_codes(w, a->w->dtype, k, x, rows, sum);
    else
        panel_f32((const float *)w, k, x, rows, sum);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < EXC_PANEL && panel * EXC_PANEL + o < n; o++)
            a->y[(first + r) * n + panel * EXC_PANEL + o] = sum[r][o];
}

exc_status exc_cpu_matvec(exc_queue *q, const struct exc_matvec_args *a) {
    if (a->rows < 0 || !a->w || !a->w->data) return EXC_ERR_USAGE;
    if (a->w->dtype != EXC_BF16 && a->w->dtype != EXC_F32 && !exc_is_coded(a->w->dtype)) return EXC_ERR_USAGE;
    if (!a->rows) return EXC_OK;
    job j = {a, (a->w->n + EXC_PANEL - 1) / EXC_PANEL};
    q->parallel(q, (size_t)(j.panels * ((a->rows + ROWS - 1) / ROWS)), run, &j);
    return EXC_OK;
}
