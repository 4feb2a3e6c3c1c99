/* interval.c - 95 % intervals. Rates of yes/no verdicts get the Wilson score interval: with 0 of 80 the usual
 * normal interval is [0,0], which says the opposite of what 80 prompts can tell (up to 4.6 %). Means and
 * ratios over tokens get a percentile bootstrap that draws whole prompts or lines, because tokens inside one
 * are correlated: drawing tokens would make intervals several times too narrow. Draws are counter-based, so a
 * seed gives the same interval on any machine. */
#include <math.h>
#include <stdlib.h>

#include "result.h"

#define Z95 1.959963984540054 /* 97.5 % point of the normal distribution */

void exc_wilson(int64_t k, int64_t n, double *lo, double *hi) {
    if (n <= 0) {
        *lo = 0;
        *hi = 1;
        return;
    }
    double N = (double)n, p = (double)k / N, z2 = Z95 * Z95;
    double centre = (p + z2 / (2 * N)) / (1 + z2 / N);
    double half = Z95 / (1 + z2 / N) * sqrt(p * (1 - p) / N + z2 / (4 * N * N));
    /* at the ends the formula is exact up to rounding: say 0 and 1, not 1e-17 */
    *lo = k <= 0 ? 0 : fmax(centre - half, 0);
    *hi = k >= n ? 1 : fmin(centre + half, 1);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double quantile(const double *sorted, int64_t n, double q) {
    double at = q * (double)(n - 1);
    int64_t i = (int64_t)at;
    return i + 1 < n ? sorted[i] + (at - (double)i) * (sorted[i + 1] - sorted[i]) : sorted[n - 1];
}

exc_status exc_bootstrap(exc_ctx *ctx, const double *num, const double *den, int64_t n, uint64_t seed,
                         uint64_t stream, double *lo, double *hi) {
    *lo = *hi = NAN;
    if (n < 2) return EXC_OK;
    double *draws = exc_alloc(ctx, EXC_RESAMPLES, sizeof *draws, "bootstrap draws");
    if (!draws) return EXC_ERR_MEMORY;
    int64_t kept = 0;
    for (int64_t r = 0; r < EXC_RESAMPLES; r++) {
        double a = 0, b = 0;
        for (int64_t j = 0; j < n; j++) {
            int64_t i = (int64_t)(exc_random_unit(seed, stream, (uint64_t)(r * n + j)) * (double)n);
            if (i >= n) i = n - 1;
            a += num[i];
            b += den ? den[i] : 1;
        }
        if (b > 0) draws[kept++] = a / b; /* a draw of units that count nothing says nothing */
    }
    if (kept) {
        qsort(draws, (size_t)kept, sizeof *draws, ascending);
        *lo = quantile(draws, kept, 0.025);
        *hi = quantile(draws, kept, 0.975);
    }
    exc_release(draws);
    return EXC_OK;
}
