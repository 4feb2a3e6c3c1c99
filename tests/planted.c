/* planted.c - from sums to findings: the experts table against plain loops (log-ratios, errors, false
 * discovery, output projections), nothing invented where nothing was counted; planted directions found by
 * every method, also where centring would lose them and where noise is loud; bases of experts; direction
 * files that come back and damaged ones that are refused. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "madeup.h"

static exc_ctx *ctx;

static int warned;
static int count_warnings(void *user, const exc_event *e) {
    warned += e->kind == EXC_EVENT_WARNING;
    return 0;
}

/* ----------------------------------------------------------------------------------------------- experts
 * table */

typedef struct sheet {
    int rows, cols;
    char name[40][48];
    double v[400][40]; /* NaN: empty */
} sheet;

static sheet *read_csv(const char *path) {
    size_t n;
    char *text = test_read(path, &n), *save = NULL;
    sheet *s = calloc(1, sizeof *s);
    s->rows = -1;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save), s->rows++) {
        int c = 0;
        for (char *field = line, *next; field; field = next, c++) {
            next = strchr(field, ',');
            if (next) *next++ = 0;
            if (s->rows < 0)
                snprintf(s->name[c], sizeof s->name[c], "%s", field);
            else
                s->v[s->rows][c] = *field ? strtod(field, NULL) : (double)NAN;
        }
        if (s->rows < 0) s->cols = c;
        assert_int_equal(c, s->cols);
    }
    free(text);
    return s;
}

static int has(const sheet *s, const char *name) {
    for (int c = 0; c < s->cols; c++)
        if (!strcmp(s->name[c], name)) return c;
    return -1;
}

static double cell(const sheet *s, int row, const char *name) {
    int c = has(s, name);
    if (c < 0) fail_msg("no column %s", name);
    return s->v[row][c];
}

static void near(double a, double b, double within, const char *what, int row) {
    if (!(fabs(a - b) <= within * fmax(1, fabs(b))))
        fail_msg("%s of row %d: %.12g, expected %.12g", what, row, a, b);
}

/* the plain definition: test i is rejected at the smallest level q where BH's rule would do so */
static double naive_q(const double *p, int n, int i) {
    int tests = 0;
    double least = 1;
    for (int k = 0; k < n; k++) tests += !isnan(p[k]);
    for (int j = 0; j < n; j++) {
        if (isnan(p[j]) || p[j] < p[i]) continue;
        int at_most = 0;
        for (int k = 0; k < n; k++) at_most += p[k] <= p[j];
        least = fmin(least, p[j] * tests / at_most);
    }
    return least;
}

static void table_is_right(void **state) {
    char *dir = test_tmpdir();
    exc_stats *s = made_up(ctx, 12, 9, 4, 3, 7, 11, true);
    exc_dirs *d = NULL;
    exc_directions_options o = {sizeof o, EXC_METHOD_SVD, 2, 0};
    exc_contrast_options co = {sizeof co, 0.25, 200, 5};
    char *text = NULL, path[512];
    int64_t E = 7, M = 3;
    /* an expert that no token chose, in sets of different size: its log-ratio is not zero, and has no error
     */
    for (int label = 0; label < 2; label++) {
        int64_t moved = s->group[label][0].count[3];
        s->group[label][0].count[3] = 0;
        s->group[label][0].tokens[0] -= moved;
        for (int64_t p = 0; p < s->prompts[label]; p++) s->prompt_count[label][p * M * E + 3] = 0;
        s->group[label][0].tokens[0] = 0;
        for (int64_t e = 0; e < E; e++) s->group[label][0].tokens[0] += s->group[label][0].count[e];
        s->group[label][0].tokens[0] /= 2;
    }
    assert_int_equal(exc_directions(ctx, s, &o, &d, NULL), EXC_OK);
    for (int64_t row = 0; row < d->rows; row++) /* signs of basis vectors mean nothing */
        for (int h = 0; h < 11; h++) d->basis[(row * 2 + 1) * 11 + h] *= -1;
    snprintf(path, sizeof path, "%s", test_path(dir, "e.csv"));
    if (exc_contrast(ctx, s, d, &co, path, 0, &text)) fail_msg("%s", exc_ctx_error(ctx));
    sheet *t = read_csv(path);
    assert_int_equal(t->rows, M * E);
    double p[21];
    for (int i = 0; i < 21; i++) {
        double z = cell(t, i, "prefill_z");
        p[i] = isnan(z) ? (double)NAN : erfc(fabs(z) / sqrt(2.0));
    }
    for (int i = 0; i < 21; i++) {
        int64_t m = i / E, e = i % E;
        assert_true(cell(t, i, "layer") == (double)s->layer_of[m] && cell(t, i, "expert") == (double)e);
        for (int phase = 0; phase < 2; phase++) {
            const exc_group *a = &s->group[0][phase], *b = &s->group[1][phase];
            double na = (double)a->count[i], nb = (double)b->count[i], sum_a = 0, sum_b = 0,
                   ta = (double)a->tokens[m], tb = (double)b->tokens[m];
            for (int64_t k = 0; k < E; k++)
                sum_a += (double)a->count[m * E + k], sum_b += (double)b->count[m * E + k];
            double want = log((na + 0.25) / (sum_a + 0.25 * 7)) - log((nb + 0.25) / (sum_b + 0.25 * 7));
#define COLUMN(what) (phase ? "decode_" what : "prefill_" what)
            assert_true(cell(t, i, COLUMN("target_count")) == na &&
                        cell(t, i, COLUMN("baseline_count")) == nb);
            near(cell(t, i, COLUMN("log_ratio")), want, 1e-8, "log_ratio", i);
            if (phase || m) { /* row 0 has tokens that chose an expert less: only ratios are asked there */
                near(cell(t, i, COLUMN("target_frequency")), na / ta, 1e-8, "frequency", i);
                near(cell(t, i, COLUMN("baseline_frequency")), nb / tb, 1e-8, "frequency", i);
                near(cell(t, i, COLUMN("risk_difference")), na / ta - nb / tb, 1e-7, "risk", i);
            }
        }
        if (i == 3) {
            assert_true(isnan(cell(t, i, "prefill_se")) && isnan(cell(t, i, "prefill_z")) &&
                        isnan(cell(t, i, "prefill_q")));
            assert_true(cell(t, i, "selected") == 0);
        } else {
            near(cell(t, i, "prefill_z"), cell(t, i, "prefill_log_ratio") / cell(t, i, "prefill_se"), 1e-6,
                 "z", i);
            near(cell(t, i, "prefill_q"), naive_q(p, 21, i), 1e-5, "q", i);
            assert_true(cell(t, i, "selected") == (cell(t, i, "prefill_q") <= 0.05));
        }
        /* outputs: along the mean difference within the subspace, and its gated length */
        const float *r = d->basis + (s->layer_of[m] + 1) * 2 * 11,
                    *diff = d->mean_difference + (s->layer_of[m] + 1) * 11;
        double c[2] = {0}, out[2] = {0}, gated[2] = {0};
        for (int k = 0; k < 2; k++)
            for (int h = 0; h < 11; h++) {
                double ot = s->group[0][0].out_sum[i * 11 + h] / (double)s->group[0][0].tokens[m],
                       ob = s->group[1][0].out_sum[i * 11 + h] / (double)s->group[1][0].tokens[m];
                if (!s->group[0][0].count[i]) ot = 0;
                if (!s->group[1][0].count[i]) ob = 0;
                c[k] += (double)r[k * 11 + h] * (double)diff[h];
                out[k] += (double)r[k * 11 + h] * (ot - ob);
                double gt = ot ? ot * s->group[0][0].gate_sum[i] / (double)s->group[0][0].count[i] : 0,
                       gb = ob ? ob * s->group[1][0].gate_sum[i] / (double)s->group[1][0].count[i] : 0;
                gated[k] += (double)r[k * 11 + h] * (gt - gb);
            }
        near(cell(t, i, "output_projection"), (c[0] * out[0] + c[1] * out[1]) / hypot(c[0], c[1]), 1e-6,
             "projection", i);
        near(cell(t, i, "score"), hypot(gated[0], gated[1]), 1e-6, "score", i);
    }
    assert_true(has(t, "decode_z") < 0 && has(t, "decode_q") < 0 &&
                has(t, "decode_se") < 0); /* nothing is invented */
    json_t *facts = json_loads(text, 0, NULL);
    assert_int_equal(json_integer_value(json_object_get(json_object_get(facts, "prefill"), "tested")), 20);
    assert_int_equal(json_array_size(json_object_get(facts, "top")), 12);
    assert_non_null(json_object_get(json_object_get(facts, "decode"), "errors"));
    json_decref(facts);
    exc_free(text);
    /* the same as lines of JSON */
    snprintf(path, sizeof path, "%s", test_path(dir, "e.jsonl"));
    assert_int_equal(exc_contrast(ctx, s, d, &co, path, 0, NULL), EXC_OK);
    char *lines = test_read(path, NULL), *save = NULL;
    int row = 0;
    for (char *line = strtok_r(lines, "\n", &save); line; line = strtok_r(NULL, "\n", &save), row++) {
        json_t *v = json_loads(line, 0, NULL);
        assert_int_equal(json_object_size(v), t->cols);
        near(json_number_value(json_object_get(v, "prefill_log_ratio")), cell(t, row, "prefill_log_ratio"), 0,
             "jsonl", row);
        assert_true(json_is_null(json_object_get(v, "prefill_z")) == (row == 3));
        json_decref(v);
    }
    assert_int_equal(row, 21);
    free(lines);
    free(t);
    exc_dirs_free(d);
    exc_stats_free(s);
}

/* what is not there is not in the table: decode, outputs, errors of a single prompt */
static void table_leaves_out(void **state) {
    char *dir = test_tmpdir(), path[512];
    exc_stats *s = made_up(ctx, 1, 9, 3, 3, 7, 11, false);
    exc_directions_options o = EXC_DIRECTIONS_OPTIONS;
    exc_dirs *d = NULL;
    for (int label = 0; label < 2; label++) {
        memset(s->group[label][1].count, 0, 21 * 8);
        memset(s->group[label][1].tokens, 0, 3 * 8);
    }
    assert_int_equal(exc_directions(ctx, s, &o, &d, NULL), EXC_OK);
    snprintf(path, sizeof path, "%s", test_path(dir, "e.csv"));
    ctx->opt.on_event = count_warnings;
    warned = 0;
    assert_int_equal(exc_contrast(ctx, s, d, NULL, path, 0, NULL), EXC_OK);
    ctx->opt.on_event = NULL;
    assert_int_equal(warned, 2);
    sheet *t = read_csv(path);
    assert_true(has(t, "decode_log_ratio") < 0 && has(t, "score") < 0 && has(t, "output_projection") < 0);
    for (int i = 0; i < 21; i++) {
        assert_true(isnan(cell(t, i, "prefill_se")) && isnan(cell(t, i, "prefill_q")) &&
                    cell(t, i, "selected") == 0);
        assert_false(isnan(cell(t, i, "prefill_log_ratio")));
    }
    free(t);
    test_refused(ctx, exc_contrast(ctx, s, d, NULL, path, 0, NULL), EXC_ERR_USAGE, "e.csv", NULL);
    test_refused(ctx, exc_contrast(ctx, s, d, NULL, test_path(dir, "e.txt"), 0, NULL), EXC_ERR_USAGE, "e.txt",
                 ".csv", NULL);
    exc_contrast_options co = {sizeof co, -1, 0, 0};
    test_refused(ctx, exc_contrast(ctx, s, d, &co, path, 1, NULL), EXC_ERR_USAGE, "alpha", NULL);
    d->fingerprint[0] = 'f';
    test_refused(ctx, exc_contrast(ctx, s, d, NULL, path, 1, NULL), EXC_ERR_INPUT, "different models", NULL);
    exc_dirs_free(d);
    exc_stats_free(s);
}

/* an expert that a planted share of target prompts prefers is found, and hardly any other */
static void table_finds_planted(void **state) {
    exc_stats *s = made_up(ctx, 60, 60, 2, 2, 16, 4, false);
    exc_experts t;
    for (int64_t p = 0; p < 60; p++) /* one more token a prompt, of two experts of layer row 1 */
        for (int64_t e = 9; e < 11; e++) {
            s->prompt_count[0][(p * 2 + 1) * 16 + e] += 2;
            s->group[0][0].count[16 + e] += 2;
        }
    s->group[0][0].tokens[1] += 120;
    assert_int_equal(exc_stats_check(ctx, s, "planted"), EXC_OK);
    assert_int_equal(exc_experts_make(ctx, s, NULL, NULL, &t), EXC_OK);
    assert_null(t.score);
    int found = 0;
    for (int i = 0; i < 32; i++) found += t.phase[0].q[i] <= 0.01 && t.phase[0].log_ratio[i] > 0;
    assert_true(t.phase[0].q[25] < 1e-6 && t.phase[0].q[26] < 1e-6);
    assert_int_equal(found, 2);
    exc_experts_free(&t);
    exc_stats_free(s);
}

/* --------------------------------------------------------------------------------------------------
 * directions */

enum { H = 64 };

static void unit(uint64_t seed, float *v) {
    double n = 0;
    for (int h = 0; h < H; h++) {
        v[h] = test_normal(seed, (uint64_t)h);
        n += (double)v[h] * (double)v[h];
    }
    for (int h = 0; h < H; h++) v[h] = (float)((double)v[h] / sqrt(n));
}

static double cosine(const float *a, const float *b) {
    double ab = 0, aa = 0, bb = 0;
    for (int h = 0; h < H; h++) {
        ab += (double)a[h] * (double)b[h];
        aa += (double)a[h] * (double)a[h];
        bb += (double)b[h] * (double)b[h];
    }
    return aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
}

/* states: a common mean, unit noise (`loud` times as much in three directions), target moved by `shift` along
 * v */
static exc_stats *planted(int64_t pt, int64_t pb, double shift, double loud, float *v) {
    exc_stats *s = made_up(ctx, pt, pb, 3, 3, 4, H, true);
    float mean[H], noisy[3][H];
    unit(900, v);
    unit(901, mean);
    for (int k = 0; k < 3; k++) unit(910 + (uint64_t)k, noisy[k]);
    for (int h = 0; h < H; h++)
        v[h] = loud > 0 ? (v[h] + noisy[0][h]) * 0.70710678f : v[h]; /* half of it in the noise */
    for (int label = 0; label < 2; label++)
        for (int64_t i = 0; i < s->prompts[label] * 4; i++) {
            float *x = s->resid_last[label] + i * H;
            uint64_t seed = (uint64_t)(5000 + label * 100000 + i);
            for (int h = 0; h < H; h++) {
                double y = 20 * (double)mean[h] + (double)test_normal(seed, (uint64_t)h);
                for (int k = 0; k < 3; k++)
                    y += loud * (double)(test_normal(seed, (uint64_t)(1000 + k)) * noisy[k][h]);
                if (label == 0) y += shift * (double)v[h];
                x[h] = i % 4 ? (float)y
                             : mean[h]; /* row 0, the embedding of the last token, is the same for all */
            }
        }
    return s;
}

static exc_dirs *directions(const exc_stats *s, exc_method method, int rank, int per_expert, json_t **facts) {
    exc_directions_options o = {sizeof o, method, rank, per_expert};
    exc_dirs *d = NULL;
    char *text = NULL;
    if (exc_directions(ctx, s, &o, &d, &text)) fail_msg("%s", exc_ctx_error(ctx));
    if (facts) *facts = json_loads(text, 0, NULL);
    exc_free(text);
    return d;
}

static void assert_orthonormal(const exc_dirs *d) {
    for (int64_t row = 0; row < d->rows; row++)
        for (int64_t i = 0; i < d->rank; i++)
            for (int64_t j = 0; j <= i; j++) {
                double sum = 0;
                const float *a = d->basis + (row * d->rank + i) * d->hidden,
                            *b = d->basis + (row * d->rank + j) * d->hidden;
                for (int64_t h = 0; h < d->hidden; h++) sum += (double)a[h] * (double)b[h];
                assert_true(fabs(sum - (i == j && row > 0)) < 1e-6);
            }
}

/* share of |X|^2 that the first vector holds, by plain loops */
static double energy_of(const exc_stats *s, const exc_dirs *d, int64_t row) {
    double all = 0, held = 0;
    const double n = (double)s->prompts[1];
    for (int64_t i = 0; i < s->prompts[0]; i++) {
        double c = 0;
        for (int h = 0; h < H; h++) {
            double mean = 0, x = (double)s->resid_last[0][(i * 4 + row) * H + h];
            if (s->prompts[0] == s->prompts[1])
                x -= (double)s->resid_last[1][(i * 4 + row) * H + h];
            else {
                for (int64_t p = 0; p < s->prompts[1]; p++)
                    mean += (double)s->resid_last[1][(p * 4 + row) * H + h];
                x -= mean / n;
            }
            all += x * x;
            c += x * (double)d->basis[row * d->rank * H + h];
        }
        held += c * c;
    }
    return held / all;
}

/* every method, pairs or not: the planted shift is the first vector, with its sign; the embedding has none */
static void planted_direction_is_found(void **state) {
    float v[H];
    for (int paired = 0; paired < 2; paired++) {
        double sign = paired ? 1 : -1; /* of the shift: vectors turn with it */
        exc_stats *s = planted(96, paired ? 96 : 70, 6 * sign, 0, v);
        for (int method = 0; method < 4; method++)
            for (int rank = 1; rank <= (method >= 2 ? 3 : 1); rank++) {
                json_t *facts;
                exc_dirs *d = directions(s, (exc_method)method, rank, 0, &facts);
                json_t *rows = json_object_get(facts, "rows");
                assert_orthonormal(d);
                assert_int_equal(json_array_size(rows), 4);
                for (int64_t row = 1; row < 4; row++) {
                    const json_t *r = json_array_get(rows, (size_t)row);
                    double c = sign * cosine(d->basis + row * rank * H, v),
                           e = json_number_value(json_object_get(r, "energy"));
                    if (c < 0.95)
                        fail_msg("method %d, rank %d, row %d: cosine %.3f", method, rank, (int)row, c);
                    assert_true(sign * cosine(d->mean_difference + row * H, v) > 0.95);
                    if (rank == 1) assert_true(fabs(e - energy_of(s, d, row)) < 1e-5);
                    assert_true(d->singular[row * rank] > 0 && e > 0.2 && e <= 1);
                    if (method >= 2) assert_true(json_number_value(json_object_get(r, "residual")) < 1e-5);
                }
                for (int k = 0; k < rank * H; k++) assert_true(d->basis[k] == 0);
                assert_true(json_is_null(json_object_get(json_array_get(rows, 0), "energy")));
                json_decref(facts);
                exc_dirs_free(d);
            }
        exc_stats_free(s);
    }
}

/* the leading vector of samples after their mean is taken away, by power iteration: what centring finds */
static void centred_first(const exc_stats *s, int64_t row, float *out) {
    int64_t n = s->prompts[0];
    double *x = malloc((size_t)(n * H) * 8), v[H], mean[H] = {0};
    for (int64_t i = 0; i < n; i++)
        for (int h = 0; h < H; h++) {
            x[i * H + h] = (double)s->resid_last[0][(i * 4 + row) * H + h] -
                           (double)s->resid_last[1][(i * 4 + row) * H + h];
            mean[h] += x[i * H + h] / (double)n;
        }
    for (int h = 0; h < H; h++) v[h] = 1;
    for (int round = 0; round < 300; round++) {
        double next[H] = {0}, length = 0;
        for (int64_t i = 0; i < n; i++) {
            double c = 0;
            for (int h = 0; h < H; h++) c += (x[i * H + h] - mean[h]) * v[h];
            for (int h = 0; h < H; h++) next[h] += c * (x[i * H + h] - mean[h]);
        }
        for (int h = 0; h < H; h++) length += next[h] * next[h];
        for (int h = 0; h < H; h++) v[h] = next[h] / sqrt(length);
    }
    for (int h = 0; h < H; h++) out[h] = (float)v[h];
    free(x);
}

/* the trap: with the mean taken away first, what is left is noise. And where noise is loud in some
 * directions, plain singular vectors follow the noise, whitened ones the shift. */
static void centring_would_lose_it(void **state) {
    float v[H], centred[H];
    exc_stats *s = planted(96, 96, 6, 0, v);
    exc_dirs *d = directions(s, EXC_METHOD_SVD, 1, 0, NULL);
    centred_first(s, 2, centred);
    assert_true(fabs(cosine(centred, v)) < 0.5 && cosine(d->basis + 2 * H, v) > 0.95);
    exc_dirs_free(d);
    exc_stats_free(s);
    s = planted(160, 160, 5, 8, v);
    d = directions(s, EXC_METHOD_SVD, 1, 0, NULL);
    exc_dirs *w = directions(s, EXC_METHOD_WHITENED, 1, 0, NULL);
    for (int64_t row = 1; row < 4; row++) {
        assert_true(fabs(cosine(d->basis + row * H, v)) < 0.85);
        if (cosine(w->basis + row * H, v) < 0.9)
            fail_msg("whitened: cosine %.3f", cosine(w->basis + row * H, v));
    }
    exc_dirs_free(d);
    exc_dirs_free(w);
    exc_stats_free(s);
}

/* projected: the mean difference without its part along the baseline's mean */
static void projected_is_orthogonal(void **state) {
    float v[H];
    exc_stats *s = planted(40, 30, 6, 0, v);
    for (int64_t i = 0; i < 40 * 4; i++)
        for (int h = 0; h < H && i % 4; h++)
            s->resid_last[0][i * H + h] *= 1.25f; /* moves along the mean, too */
    exc_dirs *d = directions(s, EXC_METHOD_PROJECTED, 1, 0, NULL),
             *m = directions(s, EXC_METHOD_MEAN, 1, 0, NULL);
    for (int64_t row = 1; row < 4; row++) {
        float mean[H], want[H];
        double along = 0, length = 0;
        for (int h = 0; h < H; h++) {
            double sum = 0;
            for (int64_t p = 0; p < 30; p++) sum += (double)s->resid_last[1][(p * 4 + row) * H + h];
            mean[h] = (float)(sum / 30);
            along += (double)mean[h] * (double)m->mean_difference[row * H + h];
            length += (double)mean[h] * (double)mean[h];
        }
        for (int h = 0; h < H; h++)
            want[h] = (float)((double)m->mean_difference[row * H + h] - along / length * (double)mean[h]);
        assert_true(fabs(cosine(d->basis + row * H, mean)) < 1e-6);
        assert_true(cosine(d->basis + row * H, want) > 1 - 1e-10);
        assert_true(fabs(cosine(m->basis + row * H, mean)) > 0.3);
        assert_true(cosine(m->basis + row * H, m->mean_difference + row * H) > 1 - 1e-12);
    }
    exc_dirs_free(d);
    exc_dirs_free(m);
    exc_stats_free(s);
}

/* experts: sums of outputs give the difference of mean outputs, one vector a phase */
static void expert_bases(void **state) {
    float v[H];
    exc_stats *s = planted(20, 20, 6, 0, v);
    int64_t n = s->moe_layers * s->experts;
    s->group[0][0].count[5] = 0; /* an expert that one set never chose */
    s->group[1][1].count[5] = 0;
    exc_dirs *d = directions(s, EXC_METHOD_SVD, 3, 1, NULL);
    assert_true(d->moe_layers == 3 && d->experts == 4);
    for (int64_t i = 0; i < n; i++) {
        const float *r = d->expert_basis + i * 3 * H;
        float want[H];
        for (int h = 0; h < H; h++)
            want[h] = (float)(s->group[0][0].out_sum[i * H + h] / (double)s->group[0][0].count[i] -
                              s->group[1][0].out_sum[i * H + h] / (double)s->group[1][0].count[i]);
        if (i == 5) {
            for (int k = 0; k < 3 * H; k++) assert_true(r[k] == 0);
            continue;
        }
        assert_true(cosine(r, want) > 1 - 1e-10);
        assert_true(fabs(cosine(r + H, r)) < 1e-6 && fabs(cosine(r + H, r + H) - 1) < 1e-12);
        for (int k = 2 * H; k < 3 * H; k++) assert_true(r[k] == 0);
    }
    exc_dirs_free(d);
    exc_stats_free(s);
}

static void directions_refusals(void **state) {
    float v[H];
    exc_stats *s = planted(6, 3, 6, 0, v), *bare = made_up(ctx, 6, 6, 3, 3, 4, H, false);
    exc_dirs *d = NULL;
    const struct {
        exc_method method;
        int rank, per_expert;
        const exc_stats *from;
        exc_status want;
        const char *says;
    } cases[] = {{EXC_METHOD_SVD, 7, 0, s, EXC_ERR_INPUT, "rank of at most 6"},
                 {EXC_METHOD_WHITENED, 7, 0, bare, EXC_ERR_INPUT, "rank of at most 6"},
                 {EXC_METHOD_WHITENED, 1, 0, s, EXC_ERR_INPUT, "at least 4 baseline prompts"},
                 {EXC_METHOD_MEAN, 500, 0, s, EXC_ERR_INPUT, "rank of at most 6"},
                 {EXC_METHOD_SVD, -1, 0, s, EXC_ERR_USAGE, "1..64"},
                 {EXC_METHOD_MEAN, 2, 0, s, EXC_ERR_USAGE, "one vector"},
                 {EXC_METHOD_PROJECTED, 2, 0, s, EXC_ERR_USAGE, "one vector"},
                 {(exc_method)9, 1, 0, s, EXC_ERR_USAGE, "method"},
                 {EXC_METHOD_MEAN, 1, 1, bare, EXC_ERR_INPUT, ".out_sum"}};
    for (size_t i = 0; i < EXC_COUNT(cases); i++) {
        exc_directions_options o = {sizeof o, cases[i].method, cases[i].rank, cases[i].per_expert};
        test_refused(ctx, exc_directions(ctx, cases[i].from, &o, &d, NULL), cases[i].want, cases[i].says,
                     NULL);
        assert_null(d);
    }
    /* no difference, or rounding only: every method says so */
    memcpy(bare->resid_last[1], bare->resid_last[0], (size_t)(6 * 4 * H) * 4);
    for (int method = 0; method < 4; method++) {
        exc_directions_options o = {sizeof o, (exc_method)method, 1, 0};
        test_refused(ctx, exc_directions(ctx, bare, &o, &d, NULL), EXC_ERR_INPUT, "no difference", NULL);
    }
    for (int i = 0; i < 6 * 4 * H; i += 5) bare->resid_last[1][i] *= 1 + 1e-7f;
    for (int method = 0; method < 4; method++) {
        exc_directions_options o = {sizeof o, (exc_method)method, 1, 0};
        test_refused(ctx, exc_directions(ctx, bare, &o, &d, NULL), EXC_ERR_INPUT, "no difference", NULL);
    }
    exc_stats_free(s);
    exc_stats_free(bare);
}

static void directions_same_for_threads(void **state) {
    float v[H];
    exc_stats *s = planted(40, 33, 3, 2, v);
    for (int method = 0; method < 4; method++) {
        exc_directions_options o = {sizeof o, (exc_method)method, method < 2 ? 1 : 3, 1};
        exc_dirs *d[2] = {NULL, NULL};
        for (int i = 0; i < 2; i++) {
            exc_ctx *c = test_ctx(i ? 3 : 1);
            assert_int_equal(exc_directions(c, s, &o, &d[i], NULL), EXC_OK);
            exc_ctx_free(c);
        }
        assert_memory_equal(d[0]->basis, d[1]->basis, (size_t)(4 * d[0]->rank * H) * 4);
        assert_memory_equal(d[0]->singular, d[1]->singular, (size_t)(4 * d[0]->rank) * 4);
        exc_dirs_free(d[0]);
        exc_dirs_free(d[1]);
    }
    exc_stats_free(s);
}

static void refuse_dirs(exc_dirs *d, const char *dir, exc_status want, const char *a, const char *b) {
    exc_dirs *back = NULL;
    const char *path = test_path(dir, "bad.safetensors");
    if (exc_dirs_save(ctx, d, path, 1)) fail_msg("%s", exc_ctx_error(ctx));
    test_refused(ctx, exc_dirs_load(ctx, path, &back), want, "bad.safetensors", a, b, NULL);
    assert_null(back);
}

static void directions_come_back(void **state) {
    float v[H];
    char *dir = test_tmpdir();
    exc_stats *s = planted(20, 20, 6, 0, v);
    exc_dirs *d = directions(s, EXC_METHOD_SVD, 2, 1, NULL), *back = NULL;
    const char *path = test_path(dir, "d.safetensors");
    int64_t rows, rank, hidden;
    assert_int_equal(exc_dirs_save(ctx, d, path, 0), EXC_OK);
    test_refused(ctx, exc_dirs_save(ctx, d, path, 0), EXC_ERR_USAGE, "d.safetensors", NULL);
    if (exc_dirs_load(ctx, path, &back)) fail_msg("%s", exc_ctx_error(ctx));
    assert_ptr_equal(exc_dirs_basis(back, &rows, &rank, &hidden), back->basis);
    assert_true(rows == 4 && rank == 2 && hidden == H);
    assert_memory_equal(back->basis, d->basis, 4 * 2 * H * 4);
    assert_memory_equal(back->singular, d->singular, 4 * 2 * 4);
    assert_memory_equal(back->mean_difference, d->mean_difference, 4 * H * 4);
    assert_memory_equal(back->expert_basis, d->expert_basis, 12 * 2 * H * 4);
    assert_string_equal(back->fingerprint, s->fingerprint);
    assert_string_equal(back->options, d->options);
    exc_tensors *file;
    assert_int_equal(exc_tensors_open(ctx, path, &file), EXC_OK);
    assert_string_equal(json_string_value(json_object_get(file->metadata, "target_prompts")), "aa");
    assert_string_equal(json_string_value(json_object_get(file->metadata, "layers")), "0,1,2");
    exc_tensors_close(file);
    /* by another program: no metadata, a third of an array missing */
    exc_writer *w;
    const int64_t shape[3] = {4, 2, H};
    path = test_path(dir, "theirs.safetensors");
    assert_int_equal(exc_writer_open(ctx, path, true, &w), EXC_OK);
    assert_int_equal(exc_writer_declare(w, "basis", EXC_F32, 3, shape), EXC_OK);
    assert_int_equal(exc_writer_put(w, "basis", d->basis, 4 * 2 * H * 4), EXC_OK);
    assert_int_equal(exc_writer_commit(w), EXC_OK);
    exc_dirs_free(back);
    back = NULL;
    test_refused(ctx, exc_dirs_load(ctx, path, &back), EXC_ERR_INPUT, "singular_values", NULL);
    test_refused(ctx, exc_dirs_load(ctx, test_path(dir, "absent"), &back), EXC_ERR_IO, "absent", NULL);
    /* damaged */
    float keep = d->basis[3 * 2 * H + 7];
    d->basis[3 * 2 * H + 7] += 0.1f;
    refuse_dirs(d, dir, EXC_ERR_INPUT, "basis: row 3", "orthonormal");
    d->basis[3 * 2 * H + 7] = NAN;
    refuse_dirs(d, dir, EXC_ERR_NUMERIC, "basis", "NaN");
    d->basis[3 * 2 * H + 7] = keep;
    memcpy(d->basis + 2 * H, d->basis + 3 * H, H * 4); /* the same vector twice */
    refuse_dirs(d, dir, EXC_ERR_INPUT, "basis: row 1", "orthonormal");
    memset(d->basis + 2 * H, 0, H * 4); /* a missing one is fine */
    assert_int_equal(exc_dirs_save(ctx, d, path, 1), EXC_OK);
    if (exc_dirs_load(ctx, path, &back)) fail_msg("%s", exc_ctx_error(ctx));
    exc_dirs_free(back);
    back = NULL;
    d->expert_basis[5 * 2 * H] = 2;
    refuse_dirs(d, dir, EXC_ERR_INPUT, "expert_basis: row 1, expert 1", "orthonormal");
    size_t n;
    char *text = test_read(path, &n);
    for (uint64_t i = 0; i < 200; i++) {
        size_t at = (size_t)(exc_random_u64(5, 1, i) % (i % 2 ? n : 600));
        char old = text[at];
        text[at] = (char)exc_random_u64(5, 2, i);
        test_write(test_path(dir, "flip"), text, n);
        assert_true((exc_dirs_load(ctx, test_path(dir, "flip"), &back) == EXC_OK) == (back != NULL));
        exc_dirs_free(back);
        text[at] = old;
    }
    free(text);
    exc_dirs_free(d);
    exc_stats_free(s);
}

static int begin(void **state) {
    ctx = test_ctx(2);
    return 0;
}

static int end(void **state) {
    exc_ctx_free(ctx);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table_is_right),
        cmocka_unit_test(table_leaves_out),
        cmocka_unit_test(table_finds_planted),
        cmocka_unit_test(planted_direction_is_found),
        cmocka_unit_test(centring_would_lose_it),
        cmocka_unit_test(projected_is_orthogonal),
        cmocka_unit_test(expert_bases),
        cmocka_unit_test(directions_refusals),
        cmocka_unit_test(directions_same_for_threads),
        cmocka_unit_test(directions_come_back),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
