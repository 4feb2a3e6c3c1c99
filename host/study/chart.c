/* chart.c - the vector pictures of report.html as inline SVG (few marks, sharp in print) and the frame of a
 * heatmap. Colours are classes of the page's style sheet, so that dark mode and print need no second picture.
 * Every picture has a table beside it with the same numbers: a picture is for seeing, a table for quoting. */
#include <math.h>
#include <string.h>

#include "page.h"

/* ---------------------------------------------------------------------------------------- before and after,
 * one row */

static void interval(exc_buf *b, const exc_mark *m, double y, const char *line, const char *dot) {
    if (!isfinite(m->value)) return;
    if (isfinite(m->lo) && isfinite(m->hi))
        exc_buf_printf(b, "<line class=\"%s\" x1=\"%.2f%%\" x2=\"%.2f%%\" y1=\"%g\" y2=\"%g\"/>", line,
                       100 * m->lo, 100 * m->hi, y, y);
    exc_buf_printf(b, "<circle class=\"%s\" cx=\"%.2f%%\" cy=\"%g\" r=\"5\"/>", dot, 100 * m->value, y);
}

void exc_chart_rate(exc_buf *b, const exc_mark *before, const exc_mark *after) {
    exc_buf_puts(b, "<svg aria-hidden=\"true\">");
    for (int i = 0; i <= 4; i++)
        exc_buf_printf(b, "<line class=\"grid%s\" x1=\"%d%%\" x2=\"%d%%\" y1=\"0\" y2=\"30\"/>",
                       i % 4 ? " dim" : "", 25 * i, 25 * i);
    bool both = before && isfinite(before->value);
    if (both) interval(b, before, 9, "b", "bd");
    interval(b, after, both ? 21 : 15, "a", "ad");
    exc_buf_puts(b, "</svg>");
}

/* -------------------------------------------------------------------------------------------------------------
 * lines */

enum { WIDTH = 460, HEIGHT = 240, LEFT = 54, RIGHT = 8, TOP = 12, FOOT = 44 };

static void range(const exc_lines *l, double *lo, double *hi) {
    *lo = INFINITY;
    *hi = -INFINITY;
    for (int s = 0; s < l->series; s++)
        for (int64_t i = 0; i < l->n; i++) {
            double v = l->y[s][i];
            if (!isfinite(v) || (l->logarithmic && v <= 0)) continue;
            if (l->logarithmic) v = log10(v);
            *lo = fmin(*lo, v);
            *hi = fmax(*hi, v);
        }
    if (*lo > *hi) *lo = *hi = 0;
    if (l->logarithmic) {
        *lo = floor(*lo);
        *hi = ceil(*hi);
    } else {
        *lo = 0; /* lengths and shares: a cut axis would exaggerate */
    }
    if (*hi - *lo < 1e-12) *hi = *lo + 1;
}

/* 1, 2 or 5 times a power of ten, so that there are about four grid lines */
static double nice_step(double span) {
    double raw = span / 4, power = pow(10, floor(log10(raw))), m = raw / power;
    return power * (m < 1.5 ? 1 : m < 3.5 ? 2 : m < 7.5 ? 5 : 10);
}

static void grid(exc_buf *b, const exc_lines *l, double lo, double hi) {
    double span = hi - lo, step = l->logarithmic ? (span > 8 ? 2 : 1) : nice_step(span);
    for (double v = lo; v <= hi + step * 1e-6; v += step) {
        double y = TOP + (hi - v) / span * (HEIGHT - TOP - FOOT);
        exc_buf_printf(b, "<line class=\"grid\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/>", LEFT,
                       WIDTH - RIGHT, y, y);
        if (l->logarithmic) {
            exc_buf_printf(b,
                           "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">10<tspan dy=\"-5\" "
                           "font-size=\"9\">%s%g</tspan></text>",
                           LEFT - 8, y + 4, v < 0 ? "\xe2\x88\x92" : "", fabs(v));
        } else {
            exc_buf_printf(b, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>", LEFT - 8, y + 4, v);
        }
    }
}

void exc_chart_lines(exc_buf *b, const exc_lines *l) {
    double lo, hi, room = WIDTH - LEFT - RIGHT - 24;
    range(l, &lo, &hi);
    exc_buf_printf(b, "<svg class=\"chart\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"", WIDTH, HEIGHT);
    exc_html(b, l->alt);
    exc_buf_puts(b, "\">");
    grid(b, l, lo, hi);
    double dx = l->n > 1 ? room / (double)(l->n - 1) : 0;
    int64_t every = 1;
    while ((double)every * dx < 26 && every < l->n) every *= 2;
    for (int64_t i = 0; i < l->n; i += every)
        exc_buf_printf(b, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%lld</text>",
                       LEFT + 12 + dx * (double)i, HEIGHT - FOOT + 19, (long long)(l->first + i));
    exc_buf_printf(b, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">", LEFT + 12 + room / 2, HEIGHT - 4);
    exc_html(b, l->x_label);
    exc_buf_puts(b, "</text>");
    for (int s = 0; s < l->series; s++) {
        bool pen = false;
        exc_buf dots = {0};
        exc_buf_printf(b, "<path class=\"ln s%d\" fill=\"none\" d=\"", s % 4);
        for (int64_t i = 0; i < l->n; i++) {
            double v = l->y[s][i];
            if (!isfinite(v) || (l->logarithmic && v <= 0)) {
                pen = false;
                continue;
            }
            if (l->logarithmic) v = log10(v);
            double x = LEFT + 12 + dx * (double)i, y = TOP + (hi - v) / (hi - lo) * (HEIGHT - TOP - FOOT);
            exc_buf_printf(b, "%s%.1f %.1f", pen ? "L" : "M", x, y);
            exc_buf_printf(&dots, "<circle class=\"s%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"%g\"/>", s % 4, x, y,
                           l->n > 40 ? 2.0 : 3.5);
            pen = true;
        }
        exc_buf_puts(b, "\"/>");
        if (dots.data) exc_buf_put(b, dots.data, dots.len);
        b->failed |= dots.failed;
        exc_buf_free(&dots);
    }
    exc_buf_puts(b, "</svg>\n");
    if (!l->names || l->series < 2) return;
    exc_buf_puts(b, "<p class=\"key\">");
    for (int s = 0; s < l->series; s++) {
        exc_buf_printf(b,
                       "<span><svg aria-hidden=\"true\"><line class=\"ln s%d\" x1=\"0\" x2=\"34\" y1=\"6\" "
                       "y2=\"6\"/><circle class=\"s%d\" "
                       "cx=\"17\" cy=\"6\" r=\"3.5\"/></svg>",
                       s % 4, s % 4);
        exc_html(b, l->names[s]);
        exc_buf_puts(b, "</span>");
    }
    exc_buf_puts(b, "</p>\n");
}

/* -----------------------------------------------------------------------------------------------------------
 * heatmap */

void exc_chart_map(exc_buf *b, const char *title, const char *sub, const double *values, int64_t rows,
                   int64_t cols, const int64_t *layers, double scale) {
    exc_buf_printf(
        b, "<figure class=\"map\" data-rows=\"%lld\" data-cols=\"%lld\" data-scale=\"%.9g\" data-layers=\"",
        (long long)rows, (long long)cols, scale);
    for (int64_t r = 0; r < rows; r++) exc_buf_printf(b, "%s%lld", r ? "," : "", (long long)layers[r]);
    exc_buf_puts(b, "\" data-cells=\"");
    exc_pack_cells(b, values, (size_t)(rows * cols), scale);
    exc_buf_puts(b, "\"><figcaption>");
    exc_html(b, title);
    exc_buf_puts(b, " <span>");
    exc_html(b, sub);
    exc_buf_printf(b,
                   "</span></figcaption><canvas role=\"img\" aria-label=\"heatmap, %lld layers by %lld "
                   "experts; the table has its "
                   "numbers\"></canvas><output></output><noscript><img alt=\"heatmap, one pixel an expert, a "
                   "row a layer\" src=\"",
                   (long long)rows, (long long)cols);
    exc_png_cells(b, values, rows, cols, scale);
    exc_buf_puts(b, "\"></noscript></figure>\n");
}
