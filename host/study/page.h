/* page.h - parts of report.html shared by its makers: the frame (page.c), vector pictures (chart.c), sections
 * (report.c). */
#ifndef EXC_PAGE_H
#define EXC_PAGE_H

#include "result.h"

void exc_page_begin(exc_buf *b, const char *title); /* title is escaped */
void exc_page_end(exc_buf *b);

/* one row of the before/after picture: a 0..1 axis with both points and their intervals (NaN: not there) */
typedef struct exc_mark {
    double value, lo, hi;
} exc_mark;
void exc_chart_rate(exc_buf *b, const exc_mark *before, const exc_mark *after);
/* lines over x = first, first+1, ..: y [series][n], NaN leaves a gap; logarithmic: powers of ten on the y
 * axis. Series names become a key below. alt: what a screen reader says */
typedef struct exc_lines {
    const char *alt, *x_label;
    int64_t first, n;
    int series;
    const double *const *y;
    const char *const *names;
    bool logarithmic;
} exc_lines;
void exc_chart_lines(exc_buf *b, const exc_lines *l);
/* heatmap with canvas, noscript picture and readout; layers [rows] number the rows */
void exc_chart_map(exc_buf *b, const char *title, const char *sub, const double *values, int64_t rows,
                   int64_t cols, const int64_t *layers, double scale);

#endif
