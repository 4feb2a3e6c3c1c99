/* sections.c - the page's sections on where the sets part and what was removed: heatmaps layer x expert of
 * the log-ratio (prefill beside decode, one scale) and of the output projection, from experts.csv; singular
 * values from directions.safetensors; residuals of the edit from report.json. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sections.h"

#define TOP 10  /* rows of a table beside a heatmap; experts.csv has all */
#define TALL 14 /* a longer table scrolls in itself */

/* ------------------------------------------------------------------------------------------------------
 * experts.csv */

typedef struct table {
    char *text;
    char **name; /* [cols], into text */
    double *v;   /* [rows,cols], NaN where there is no number */
    size_t rows, cols;
} table;

static void table_free(table *t) {
    exc_release(t->text);
    exc_release(t->name);
    exc_release(t->v);
}

/* numbers only, no quoted commas: this is our own file; a ragged line is refused */
static exc_status table_read(exc_ctx *ctx, const char *path, table *t) {
    size_t n = 0, lines = 0, at = 0;
    memset(t, 0, sizeof *t);
    EXC_TRY(exc_read_file(ctx, path, (size_t)1 << 30, &t->text, &n));
    for (char *p = t->text; *p; p++) {
        lines += *p == '\n';
        t->cols += !lines && *p == ',';
    }
    t->cols++;
    t->name = exc_zalloc(ctx, t->cols, sizeof *t->name, "columns");
    t->v = exc_alloc(ctx, (lines + 1) * t->cols, sizeof *t->v, "experts table");
    if (!t->name || !t->v) return EXC_ERR_MEMORY;
    char *save = NULL, *line = strtok_r(t->text, "\r\n", &save);
    for (size_t row = 0; line; row++, line = strtok_r(NULL, "\r\n", &save)) {
        size_t c = 0;
        for (char *field = line; field; c++) {
            char *comma = strchr(field, ','), *end;
            if (comma) *comma++ = 0;
            if (c == t->cols) break;
            if (!row) {
                t->name[c] = field;
            } else {
                double x = strtod(field, &end);
                t->v[at++] = end == field || *end ? NAN : x;
            }
            field = comma;
        }
        if (c != t->cols)
            return exc_fail(ctx, EXC_ERR_INPUT, "%s: line %zu: expected %zu columns, found another number",
                            path, row + 1, t->cols);
        if (row) t->rows++;
    }
    return EXC_OK;
}

static int column(const table *t, const char *name) {
    for (size_t c = 0; c < t->cols; c++)
        if (t->name[c] && !strcmp(t->name[c], name)) return (int)c;
    return -1;
}

/* a phase's column: prefill_log_ratio, decode_log_ratio */
static int phase_column(const table *t, const char *phase, const char *what) {
    char name[64];
    snprintf(name, sizeof name, "%s_%s", phase, what);
    int c = column(t, name);
    if (c >= 0) return c;
    snprintf(name, sizeof name, "%s.%s", phase, what);
    c = column(t, name);
    return c >= 0 || strcmp(phase, "prefill") ? c : column(t, what);
}

typedef struct grid {
    table t;
    int layer, expert;
    int64_t *layers; /* [rows] distinct layers in order */
    int64_t *row_of; /* [t.rows] */
    int64_t rows, cols;
} grid;

static void grid_free(grid *g) {
    table_free(&g->t);
    exc_release(g->layers);
    exc_release(g->row_of);
}

static exc_status grid_read(exc_ctx *ctx, const char *path, grid *g) {
    memset(g, 0, sizeof *g);
    EXC_TRY(table_read(ctx, path, &g->t));
    g->layer = column(&g->t, "layer");
    g->expert = column(&g->t, "expert");
    if (g->layer < 0 || g->expert < 0 || !g->t.rows)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected columns layer and expert and at least one row",
                        path);
    g->layers = exc_alloc(ctx, g->t.rows, sizeof *g->layers, "layers of the table");
    g->row_of = exc_alloc(ctx, g->t.rows, sizeof *g->row_of, "layers of the table");
    if (!g->layers || !g->row_of) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < g->t.rows; i++) {
        double l = g->t.v[i * g->t.cols + (size_t)g->layer], e = g->t.v[i * g->t.cols + (size_t)g->expert];
        if (!(e >= 0 && e < 1 << 20 && l >= 0 && l < 1 << 20))
            return exc_fail(ctx, EXC_ERR_INPUT, "%s: row %zu: expected a layer and an expert number", path,
                            i + 1);
        if (!g->rows || g->layers[g->rows - 1] != (int64_t)l) g->layers[g->rows++] = (int64_t)l;
        g->row_of[i] = g->rows - 1;
        if ((int64_t)e >= g->cols) g->cols = (int64_t)e + 1;
    }
    return EXC_OK;
}

/* values of one column as [rows,cols]; *scale: largest |value|. NULL: no memory */
static double *grid_values(exc_ctx *ctx, const grid *g, int c, double *scale) {
    size_t n;
    if (!exc_mul((size_t)g->rows, (size_t)g->cols, &n)) return NULL;
    double *v = exc_alloc(ctx, n, sizeof *v, "cells of a heatmap");
    if (!v) return NULL;
    for (size_t i = 0; i < n; i++) v[i] = NAN;
    for (size_t i = 0; i < g->t.rows; i++) {
        double x = g->t.v[i * g->t.cols + (size_t)c];
        v[g->row_of[i] * g->cols + (int64_t)g->t.v[i * g->t.cols + (size_t)g->expert]] = x;
        if (isfinite(x)) *scale = fmax(*scale, fabs(x));
    }
    return v;
}

static void ramp(exc_buf *b, double scale, const char *low, const char *high) {
    exc_buf_printf(b, "<p class=\"ramp\">%s \xe2\x88\x92%.3g <i></i> +%.3g %s</p>\n", low, scale, scale,
                   high);
}

typedef struct ranked {
    double key;
    size_t row;
} ranked;

static int largest_first(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? 1 : -1;
    return x->row < y->row ? -1 : x->row > y->row;
}

typedef struct shown {
    const char *head;
    int column;
    const char *format;
} shown;

/* the TOP rows by |column| */
static exc_status top_table(exc_ctx *ctx, exc_buf *b, const grid *g, int by, const shown *columns, int n) {
    ranked *order = exc_alloc(ctx, g->t.rows, sizeof *order, "order of experts");
    if (!order) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < g->t.rows; i++) {
        double x = g->t.v[i * g->t.cols + (size_t)by];
        order[i] = (ranked){isfinite(x) ? fabs(x) : -1, i};
    }
    qsort(order, g->t.rows, sizeof *order, largest_first);
    exc_buf_puts(b, "<div class=\"panel scroll\"><table><thead><tr><th>layer</th><th>expert</th>");
    for (int c = 0; c < n; c++)
        if (columns[c].column >= 0) exc_buf_printf(b, "<th>%s</th>", columns[c].head);
    exc_buf_puts(b, "</tr></thead><tbody>\n");
    for (size_t i = 0; i < g->t.rows && i < TOP && order[i].key >= 0; i++) {
        const double *row = g->t.v + order[i].row * g->t.cols;
        exc_buf_printf(b, "<tr><td>%.0f</td><td>%.0f</td>", row[g->layer], row[g->expert]);
        for (int c = 0; c < n; c++) {
            if (columns[c].column < 0) continue;
            double x = row[columns[c].column];
            exc_buf_puts(b, "<td>");
            if (!isfinite(x))
                exc_buf_puts(b, "\xe2\x80\x93");
            else if (x && fabs(x) < 5e-4 && strcmp(columns[c].format, "%.0f"))
                exc_buf_printf(b, "%.0e", x);
            else {
                char text[48];
                snprintf(text, sizeof text, columns[c].format, fabs(x));
                exc_buf_printf(b, "%s%s", x < 0 ? "\xe2\x88\x92" : "", text);
            }
            exc_buf_puts(b, "</td>");
        }
        exc_buf_puts(b, "</tr>\n");
    }
    exc_buf_puts(b, "</tbody></table></div>\n");
    exc_release(order);
    return EXC_OK;
}

static exc_status ratios(exc_ctx *ctx, exc_buf *b, const grid *g) {
    int c[2] = {phase_column(&g->t, "prefill", "log_ratio"), phase_column(&g->t, "decode", "log_ratio")};
    static const char *const name[2] = {"Prefill", "Decode"}, *const sub[2] = {"tokens of the prompts",
                                                                               "tokens the model wrote"};
    double *v[2] = {NULL, NULL}, scale = 0;
    exc_status st = EXC_OK;
    for (int i = 0; i < 2 && st == EXC_OK; i++) {
        if (c[i] < 0) continue;
        if (!(v[i] = grid_values(ctx, g, c[i], &scale))) st = EXC_ERR_MEMORY;
    }
    if (st == EXC_OK && (v[0] || v[1])) {
        bool wide = g->cols > 64;
        exc_buf_printf(b,
                       "<section>\n<h2>Where the sets part: routing</h2>\n<p class=\"note\">Log-ratio of how "
                       "often an expert is "
                       "chosen, target against baseline, in nats; both pictures share one scale. Errors come "
                       "from resampling whole "
                       "prompts; q is the false discovery rate over all experts.</p>\n<div "
                       "class=\"panel\"><div class=\"%s\">\n",
                       wide || !v[0] || !v[1] ? "one" : "two");
        for (int i = 0; i < 2; i++)
            if (v[i]) exc_chart_map(b, name[i], sub[i], v[i], g->rows, g->cols, g->layers, scale);
        exc_buf_puts(b, "</div>\n");
        ramp(b, scale, "baseline", "target");
        exc_buf_puts(b, "</div>\n<h3>Largest differences in prefill</h3>\n");
        const shown columns[] = {
            {"log-ratio", c[0], "%.3f"},
            {"error", phase_column(&g->t, "prefill", "se"), "%.3f"},
            {"z", phase_column(&g->t, "prefill", "z"), "%.1f"},
            {"q", phase_column(&g->t, "prefill", "q"), "%.3f"},
            {"risk difference", phase_column(&g->t, "prefill", "risk_difference"), "%.4f"},
            {"log-ratio, decode", c[1], "%.3f"},
            {"z, decode", phase_column(&g->t, "decode", "z"), "%.1f"}};
        if (c[0] >= 0) st = top_table(ctx, b, g, c[0], columns, (int)EXC_COUNT(columns));
        exc_buf_puts(b, "</section>\n");
    }
    exc_release(v[0]);
    exc_release(v[1]);
    return st;
}

static exc_status projections(exc_ctx *ctx, exc_buf *b, const grid *g) {
    int c = column(&g->t, "output_projection");
    double scale = 0;
    if (c < 0) c = column(&g->t, "projection");
    if (c < 0) return EXC_OK;
    double *v = grid_values(ctx, g, c, &scale);
    if (!v) return EXC_ERR_MEMORY;
    exc_status st = EXC_OK;
    if (scale > 0) {
        exc_buf_printf(b,
                       "<section>\n<h2>Who writes the direction</h2>\n<p class=\"note\">Difference of each "
                       "expert\xe2\x80\x99s summed output, "
                       "target less baseline, along its layer\xe2\x80\x99s direction: how much of the "
                       "behaviour it puts into the "
                       "residual stream.</p>\n<div class=\"%s\"><div class=\"panel\">\n",
                       g->cols > 64 ? "one" : "side");
        exc_chart_map(b, "Output projection", "on the removed subspace", v, g->rows, g->cols, g->layers,
                      scale);
        ramp(b, scale, "against", "along");
        exc_buf_puts(b, "</div>\n");
        const shown columns[] = {{"projection", c, "%.3f"},
                                 {"log-ratio", phase_column(&g->t, "prefill", "log_ratio"), "%.3f"},
                                 {"score", column(&g->t, "score"), "%.3f"}};
        st = top_table(ctx, b, g, c, columns, (int)EXC_COUNT(columns));
        exc_buf_puts(b, "</div>\n</section>\n");
    }
    exc_release(v);
    return st;
}

static exc_status have(exc_ctx *ctx, const char *dir, const char *name, char **path) {
    *path = NULL;
    EXC_TRY(exc_path_join(ctx, dir, name, path));
    if (!access(*path, R_OK)) return EXC_OK;
    exc_release(*path);
    *path = NULL;
    return EXC_OK;
}

exc_status exc_section_routing(exc_ctx *ctx, exc_buf *b, const json_t *report, const char *dir) {
    char *path = NULL;
    grid g;
    EXC_TRY(have(ctx, dir, "experts.csv", &path));
    if (!path) return EXC_OK;
    exc_status st = grid_read(ctx, path, &g);
    if (st == EXC_OK) st = ratios(ctx, b, &g);
    if (st == EXC_OK) st = projections(ctx, b, &g);
    grid_free(&g);
    exc_release(path);
    return st;
}

/* -------------------------------------------------------------------------------------------------------
 * directions */

/* share of the samples' energy that the subspace holds, where the method has one */
static double energy_of(const json_t *facts, int64_t row) {
    return exc_get(json_array_get(json_object_get(facts, "rows"), (size_t)row), "energy");
}

static void directions_table(exc_buf *b, const exc_dirs *d, const double *const *y, int series,
                             const json_t *facts) {
    bool energies = isfinite(energy_of(facts, d->rows - 1));
    exc_buf_printf(b, "<div class=\"panel scroll%s\"><table><thead><tr><th>after layer</th>",
                   d->rows > TALL ? " tall\" tabindex=\"0" : "");
    for (int s = 0; s < series; s++) exc_buf_printf(b, "<th>\xcf\x83<sub>%d</sub></th>", s + 1);
    exc_buf_printf(b, "<th>mean difference</th>%s</tr></thead><tbody>\n",
                   energies ? "<th>energy captured</th>" : "");
    for (int64_t r = 1; r < d->rows; r++) {
        const float *m = d->mean_difference + r * d->hidden;
        double length = 0;
        for (int64_t i = 0; i < d->hidden; i++) length += (double)m[i] * m[i];
        exc_buf_printf(b, "<tr><td>%lld</td>", (long long)r - 1);
        for (int s = 0; s < series; s++) exc_buf_printf(b, "<td>%.3f</td>", y[s][r - 1]);
        exc_buf_printf(b, "<td>%.3f</td>", sqrt(length));
        if (energies) {
            exc_buf_puts(b, "<td>");
            exc_put_percent(b, energy_of(facts, r));
            exc_buf_puts(b, "</td>");
        }
        exc_buf_puts(b, "</tr>\n");
    }
    exc_buf_puts(b, "</tbody></table></div>\n");
}

exc_status exc_section_directions(exc_ctx *ctx, exc_buf *b, const json_t *report, const char *dir) {
    char *path = NULL;
    exc_dirs *d = NULL;
    EXC_TRY(have(ctx, dir, "directions.safetensors", &path));
    if (!path) return EXC_OK;
    exc_status st = exc_dirs_load(ctx, path, &d);
    exc_release(path);
    EXC_TRY(st);
    int series = d->rank < 8 ? (int)d->rank : 8;
    int64_t n = d->rows - 1;
    double *values = exc_alloc(ctx, (size_t)(n > 0 ? n : 1) * 8, sizeof *values, "singular values"), *y[8];
    char label[8][16];
    const char *names[8];
    if (!values) st = EXC_ERR_MEMORY;
    for (int s = 0; s < series && st == EXC_OK; s++) {
        y[s] = values + s * n;
        for (int64_t i = 0; i < n; i++) y[s][i] = d->singular[(i + 1) * d->rank + s];
        snprintf(label[s], sizeof label[s], "rank %d", s + 1);
        names[s] = label[s];
    }
    if (st == EXC_OK && n > 0) {
        exc_buf_puts(b, "<section>\n<h2>The directions</h2>\n<p class=\"note\">One subspace of the residual "
                        "stream after each layer. Singular "
                        "values tell how far the two sets stand apart there; they grow with the stream "
                        "itself, so compare shapes, not layers.</p>\n"
                        "<div class=\"side\"><div class=\"panel\">");
        exc_lines l = {"singular values by layer", "after layer", 0,    n, series,
                       (const double *const *)y,   names,         false};
        exc_chart_lines(b, &l);
        exc_buf_puts(b, "</div>\n");
        directions_table(b, d, (const double *const *)y, series, json_object_get(report, "directions"));
        exc_buf_puts(b, "</div>\n</section>\n");
    }
    exc_release(values);
    exc_dirs_free(d);
    return st;
}

/* --------------------------------------------------------------------------------------------------------
 * residuals */

#define MAX_ROLES 4

void exc_section_residuals(exc_buf *b, const json_t *report) {
    const json_t *rows = json_object_get(json_object_get(report, "apply"), "roles"), *row;
    const char *roles[MAX_ROLES];
    int n_roles = 0;
    int64_t layers = 0;
    size_t i;
    json_array_foreach(rows, i, row) {
        const char *role = json_string_value(json_object_get(row, "role"));
        double layer = exc_get(row, "layer");
        if (!role || !(layer >= 0 && layer < 4096)) continue;
        int r = 0;
        while (r < n_roles && strcmp(roles[r], role)) r++;
        if (r == n_roles && n_roles < MAX_ROLES) roles[n_roles++] = role;
        if ((int64_t)layer >= layers) layers = (int64_t)layer + 1;
    }
    if (!n_roles || !layers) return;
    double *values = malloc((size_t)(MAX_ROLES * layers) * sizeof *values), *y[MAX_ROLES];
    if (!values) {
        b->failed = true;
        return;
    }
    for (int64_t k = 0; k < MAX_ROLES * layers; k++) values[k] = NAN;
    for (int r = 0; r < n_roles; r++) y[r] = values + r * layers;
    exc_buf_puts(b, "<section>\n<h2>What is left of the directions</h2>\n<p class=\"note\">Length of the "
                    "edited weights along the removed subspace, "
                    "as a share of what it was: \xe2\x80\x96R\xe1\xb5\x80W\xe2\x80\xb2\xe2\x80\x96 / "
                    "\xe2\x80\x96R\xe1\xb5\x80W\xe2\x80\x96. Rounding to "
                    "the stored type leaves some; nothing is left only in exact arithmetic.</p>\n<div "
                    "class=\"side\"><div class=\"panel\">");
    json_array_foreach(rows, i, row) {
        const char *role = json_string_value(json_object_get(row, "role"));
        double layer = exc_get(row, "layer");
        for (int r = 0; r < n_roles; r++)
            if (role && layer >= 0 && layer < (double)layers && !strcmp(roles[r], role))
                y[r][(int64_t)layer] = exc_get(row, "residual");
    }
    exc_lines l = {"residual by layer and role", "layer", 0,   layers, n_roles,
                   (const double *const *)y,     roles,   true};
    exc_chart_lines(b, &l);
    exc_buf_printf(b,
                   "</div>\n<div class=\"panel "
                   "scroll%s\"><table><thead><tr><th>role</th><th>layer</th><th>edited</th><th>present</"
                   "th><th>residual</th></tr></thead><tbody>\n",
                   json_array_size(rows) > TALL ? " tall\" tabindex=\"0" : "");
    json_array_foreach(rows, i, row) {
        const char *role = json_string_value(json_object_get(row, "role"));
        if (!role) continue;
        exc_buf_puts(b, "<tr><td>");
        exc_html(b, role);
        exc_buf_printf(b, "</td><td>%.0f</td><td>%.0f</td><td>%.0f</td><td>%.2e</td></tr>\n",
                       exc_get(row, "layer"), exc_get(row, "edited"), exc_get(row, "present"),
                       exc_get(row, "residual"));
    }
    exc_buf_puts(b, "</tbody></table></div></div>\n</section>\n");
    free(values);
}
