/* table.c - the experts table: how differently the two sets use every expert, and how sure that is.
 *
 * Prefill: the op contrast takes the counts of single prompts [P,M,E] and resamples whole prompts, because
 * tokens of one prompt are not independent; q is the false discovery rate (Benjamini and Hochberg) over all
 * experts of the phase that were chosen at all. Decode has one count a set: its log-ratio and risk
 * difference are there, errors are not, and nothing is put in their place. The output columns ask what
 * an expert writes: the difference of its summed outputs a token, along the layer's subspace. Cells without
 * a number are empty (CSV) or null (JSON). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "study.h"

#define SELECT_Q 0.05 /* `selected`: prefill q at most this */
#define TOP_ROWS 12

typedef struct choices {
    double alpha;
    int64_t resamples;
    uint64_t seed;
} choices;

static exc_status read_choices(exc_ctx *ctx, const exc_contrast_options *o, choices *c) {
    *c = (choices){0.5, 1000, 0};
    if (!o) return EXC_OK;
    if (!(o->alpha >= 0 && isfinite(o->alpha)) || o->resamples < 0 || o->resamples == 1)
        return exc_fail(
            ctx, EXC_ERR_USAGE,
            "contrast: expected alpha > 0 and at least 2 resamples (0: defaults), found %g and %d", o->alpha,
            o->resamples);
    if (o->alpha > 0) c->alpha = o->alpha;
    if (o->resamples) c->resamples = o->resamples;
    c->seed = o->seed;
    return EXC_OK;
}

static bool has_decode(const exc_stats *s) {
    return s->group[EXC_TARGET][EXC_DECODE].tokens[0] > 0 && s->group[EXC_BASELINE][EXC_DECODE].tokens[0] > 0;
}

/* ------------------------------------------------------------------------------------------------- routing
 */

/* `all` points to the first layer's arrays, each followed by those of the others */
static exc_status contrast_layers(exc_ctx *ctx, const exc_stats *s, const struct exc_contrast_args *all) {
    for (int64_t m = 0; m < s->moe_layers; m++) {
        int64_t at = m * s->experts;
        struct exc_contrast_args a = *all;
        a.stream = (uint64_t)s->layer_of[m];
        a.target += at;
        a.baseline += at;
        a.log_ratio += at;
        a.se += at;
        a.z += at;
        a.p += at;
        a.risk += at;
        EXC_TRY(EXC_CALL(ctx, contrast, &a));
        EXC_TRY(exc_progress(ctx, "contrast", (uint64_t)m + 1, (uint64_t)s->moe_layers, "layers"));
    }
    return EXC_OK;
}

static exc_status contrast_prefill(exc_ctx *ctx, const exc_stats *s, const choices *c, exc_experts *t) {
    int64_t cells = s->moe_layers * s->experts;
    size_t counts = (size_t)cells * sizeof(uint32_t), numbers = (size_t)cells * sizeof(double);
    struct exc_contrast_args a = {.target = s->prompt_count[EXC_TARGET],
                                  .target_prompts = s->prompts[EXC_TARGET],
                                  .baseline = s->prompt_count[EXC_BASELINE],
                                  .baseline_prompts = s->prompts[EXC_BASELINE],
                                  .stride = cells,
                                  .experts = s->experts,
                                  .top_k = s->top_k,
                                  .alpha = c->alpha,
                                  .resamples = c->resamples,
                                  .seed = c->seed,
                                  .log_ratio = t->phase[EXC_PREFILL].log_ratio,
                                  .se = t->phase[EXC_PREFILL].se,
                                  .z = t->phase[EXC_PREFILL].z,
                                  .p = t->phase[EXC_PREFILL].p,
                                  .risk = t->phase[EXC_PREFILL].risk};
    exc_dock d = {.ctx = ctx, .what = "counts by prompt"};
    exc_dock_in(&d, &a.target, (size_t)s->prompts[EXC_TARGET] * counts);
    exc_dock_in(&d, &a.baseline, (size_t)s->prompts[EXC_BASELINE] * counts);
    exc_dock_out(&d, &a.log_ratio, numbers);
    exc_dock_out(&d, &a.se, numbers);
    exc_dock_out(&d, &a.z, numbers);
    exc_dock_out(&d, &a.p, numbers);
    exc_dock_out(&d, &a.risk, numbers);
    exc_status st = exc_dock_enter(&d);
    return exc_dock_leave(&d, st == EXC_OK ? contrast_layers(ctx, s, &a) : st);
}

/* An error is no error when nothing was drawn: an expert that no token chose (its log-ratio speaks of the
 * sets' sizes only), or a set of a single prompt, which resampling cannot vary. */
static void drop_empty_errors(const exc_stats *s, exc_experts *t) {
    const int64_t *nt = s->group[EXC_TARGET][EXC_PREFILL].count,
                  *nb = s->group[EXC_BASELINE][EXC_PREFILL].count;
    bool single = s->prompts[EXC_TARGET] < 2 || s->prompts[EXC_BASELINE] < 2;
    for (int64_t i = 0; i < s->moe_layers * s->experts; i++) {
        double *se = &t->phase[EXC_PREFILL].se[i], *z = &t->phase[EXC_PREFILL].z[i],
               *p = &t->phase[EXC_PREFILL].p[i];
        if (!single && nt[i] + nb[i] > 0 && *se > 0 && isfinite(*z) && isfinite(*p)) continue;
        *se = *z = *p = NAN;
    }
}

static void contrast_decode(const exc_stats *s, const choices *c, exc_experts *t) {
    int64_t E = s->experts;
    for (int64_t m = 0; m < s->moe_layers; m++) {
        const int64_t *nt = s->group[EXC_TARGET][EXC_DECODE].count + m * E,
                      *nb = s->group[EXC_BASELINE][EXC_DECODE].count + m * E;
        double tokens_t = (double)s->group[EXC_TARGET][EXC_DECODE].tokens[m],
               tokens_b = (double)s->group[EXC_BASELINE][EXC_DECODE].tokens[m];
        double all_t = tokens_t * (double)s->top_k, all_b = tokens_b * (double)s->top_k, a = c->alpha;
        for (int64_t e = 0; e < E; e++) {
            t->phase[EXC_DECODE].log_ratio[m * E + e] = log(((double)nt[e] + a) / (all_t + a * (double)E)) -
                                                        log(((double)nb[e] + a) / (all_b + a * (double)E));
            t->phase[EXC_DECODE].risk[m * E + e] = (double)nt[e] / tokens_t - (double)nb[e] / tokens_b;
        }
    }
}

typedef struct tested {
    double p;
    int64_t i;
} tested;

static int smallest_first(const void *a, const void *b) {
    const tested *x = a, *y = b;
    if (x->p != y->p) return x->p < y->p ? -1 : 1;
    return x->i < y->i ? -1 : x->i > y->i;
}

/* q_(i) = min over j >= i of p_(j) n / j, tests in order of p */
static exc_status false_discovery(exc_ctx *ctx, const double *p, int64_t n, double *q) {
    tested *order = exc_alloc(ctx, (size_t)n, sizeof *order, "order of p values");
    if (!order) return EXC_ERR_MEMORY;
    int64_t tests = 0;
    for (int64_t i = 0; i < n; i++) {
        q[i] = NAN;
        if (isfinite(p[i])) order[tests++] = (tested){p[i], i};
    }
    qsort(order, (size_t)tests, sizeof *order, smallest_first);
    double least = 1;
    for (int64_t j = tests; j-- > 0;) {
        least = fmin(least, order[j].p * (double)tests / (double)(j + 1));
        q[order[j].i] = least;
    }
    exc_release(order);
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------- outputs
 */

static double dot(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

static double dot_wide(const double *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * (double)b[i];
    return sum;
}

/* One layer. Within the subspace the mean difference gives the sign: c = R d, u = R^T c / |c|, so that a plus
 * means "as the target set does" whatever signs the basis vectors have. Outputs are un-gated; the score
 * weighs them by the expert's mean gate weight, which is what reaches the stream. */
static void project_layer(const exc_stats *s, const exc_dirs *d, int64_t m, double *c, exc_experts *t) {
    int64_t E = s->experts, H = s->hidden, R = d->rank, row = s->layer_of[m] + 1;
    const float *basis = d->basis + row * R * H;
    double length = 0;
    for (int64_t r = 0; r < R; r++) {
        c[r] = dot(basis + r * H, d->mean_difference + row * H, H);
        length += c[r] * c[r];
    }
    length = sqrt(length);
    for (int64_t e = 0; e < E; e++) {
        int64_t i = m * E + e;
        double along = 0, size = 0;
        for (int64_t r = 0; r < R; r++) {
            double output = 0, gated = 0;
            for (int label = 0; label < 2; label++) {
                const exc_group *g = &s->group[label][EXC_PREFILL];
                if (!g->count[i]) continue;
                double sign = label == EXC_TARGET ? 1 : -1,
                       x = sign * dot_wide(g->out_sum + i * H, basis + r * H, H) / (double)g->tokens[m];
                output += x;
                gated += x * g->gate_sum[i] / (double)g->count[i];
            }
            along += length > 0 ? output * c[r] / length : r == 0 ? output : 0;
            size += gated * gated;
        }
        bool none = length == 0 && dot(basis, basis, H) == 0; /* no direction in this layer */
        t->projection[i] = none ? NAN : along;
        t->score[i] = none ? NAN : sqrt(size);
    }
}

static exc_status check_dirs(exc_ctx *ctx, const exc_stats *s, const exc_dirs *d) {
    if (d->fingerprint[0] && strcmp(d->fingerprint, s->fingerprint))
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "directions and stats of different models: expected fingerprint %s, found %s",
                        s->fingerprint, d->fingerprint);
    if (d->rows == s->layers + 1 && d->hidden == s->hidden) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT,
                    "directions: expected %lld rows of %lld as in the stats, found %lld of %lld",
                    (long long)s->layers + 1, (long long)s->hidden, (long long)d->rows, (long long)d->hidden);
}

static exc_status project_outputs(exc_ctx *ctx, const exc_stats *s, const exc_dirs *d, exc_experts *t) {
    double *c = exc_alloc(ctx, (size_t)d->rank, sizeof *c, "coefficients of a direction");
    if (!c) return EXC_ERR_MEMORY;
    for (int64_t m = 0; m < s->moe_layers; m++) project_layer(s, d, m, c, t);
    exc_release(c);
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------ in memory
 */

static exc_status make_room(exc_ctx *ctx, const exc_stats *s, bool outputs, exc_experts *t) {
    size_t n = (size_t)(s->moe_layers * s->experts), parts = 6 + (has_decode(s) ? 2 : 0) + (outputs ? 2 : 0);
    t->moe_layers = s->moe_layers;
    t->experts = s->experts;
    double *p = t->slab = exc_zalloc(ctx, n * parts, sizeof *p, "experts table");
    if (!p) return EXC_ERR_MEMORY;
    double **array[] = {&t->phase[0].log_ratio, &t->phase[0].se,   &t->phase[0].z,         &t->phase[0].p,
                        &t->phase[0].q,         &t->phase[0].risk, &t->phase[1].log_ratio, &t->phase[1].risk,
                        &t->projection,         &t->score};
    for (size_t i = 0; i < EXC_COUNT(array); i++) {
        if ((i == 6 || i == 7) && !has_decode(s)) continue;
        if (i >= 8 && !outputs) continue;
        *array[i] = p;
        p += n;
    }
    return EXC_OK;
}

void exc_experts_free(exc_experts *t) {
    exc_release(t->slab);
    memset(t, 0, sizeof *t);
}

static exc_status fill(exc_ctx *ctx, const exc_stats *s, const exc_dirs *d, const choices *c,
                       exc_experts *t) {
    EXC_TRY(make_room(ctx, s, d && s->group[0][0].out_sum, t));
    EXC_TRY(contrast_prefill(ctx, s, c, t));
    drop_empty_errors(s, t);
    EXC_TRY(
        false_discovery(ctx, t->phase[EXC_PREFILL].p, s->moe_layers * s->experts, t->phase[EXC_PREFILL].q));
    if (has_decode(s)) contrast_decode(s, c, t);
    return t->score ? project_outputs(ctx, s, d, t) : EXC_OK;
}

exc_status exc_experts_make(exc_ctx *ctx, const exc_stats *s, const exc_dirs *d,
                            const exc_contrast_options *options, exc_experts *out) {
    choices c;
    memset(out, 0, sizeof *out);
    EXC_TRY(read_choices(ctx, options, &c));
    if (d) EXC_TRY(check_dirs(ctx, s, d));
    exc_status st = fill(ctx, s, d, &c, out);
    if (st != EXC_OK) exc_experts_free(out);
    return st;
}

/* ---------------------------------------------------------------------------------------------- as a file */

enum { MAX_COLUMNS = 32 };

typedef struct columns {
    int n;
    struct {
        char name[40];
        const double *real;            /* [M,E], or */
        const int64_t *integer;        /* [M,E], or */
        const int64_t *count, *tokens; /* [M,E] over [M] */
    } c[MAX_COLUMNS];
} columns;

static void put_column(columns *k, const char *phase, const char *name, const double *real,
                       const int64_t *integer, const int64_t *count, const int64_t *tokens) {
    if (!real && !integer && !count) return; /* not there in this phase */
    snprintf(k->c[k->n].name, sizeof k->c[k->n].name, "%s%s", phase, name);
    k->c[k->n].real = real;
    k->c[k->n].integer = integer;
    k->c[k->n].count = count;
    k->c[k->n++].tokens = tokens;
}

static void list_columns(const exc_stats *s, const exc_experts *t, columns *k) {
    memset(k, 0, sizeof *k);
    for (int phase = 0; phase < 2; phase++) {
        const char *prefix = phase ? "decode_" : "prefill_";
        const exc_group *a = &s->group[EXC_TARGET][phase], *b = &s->group[EXC_BASELINE][phase];
        if (!t->phase[phase].log_ratio) continue;
        put_column(k, prefix, "target_count", NULL, a->count, NULL, NULL);
        put_column(k, prefix, "target_frequency", NULL, NULL, a->count, a->tokens);
        put_column(k, prefix, "baseline_count", NULL, b->count, NULL, NULL);
        put_column(k, prefix, "baseline_frequency", NULL, NULL, b->count, b->tokens);
        put_column(k, prefix, "log_ratio", t->phase[phase].log_ratio, NULL, NULL, NULL);
        put_column(k, prefix, "se", t->phase[phase].se, NULL, NULL, NULL);
        put_column(k, prefix, "z", t->phase[phase].z, NULL, NULL, NULL);
        put_column(k, prefix, "q", t->phase[phase].q, NULL, NULL, NULL);
        put_column(k, prefix, "risk_difference", t->phase[phase].risk, NULL, NULL, NULL);
    }
    if (!t->score) return;
    put_column(k, "", "output_projection", t->projection, NULL, NULL, NULL);
    put_column(k, "", "score", t->score, NULL, NULL, NULL);
}

static bool is_selected(const exc_experts *t, int64_t i) { return t->phase[EXC_PREFILL].q[i] <= SELECT_Q; }

static void put_cell(exc_buf *b, const exc_stats *s, const columns *k, int c, int64_t i,
                     const char *missing) {
    if (k->c[c].integer) {
        exc_buf_printf(b, "%lld", (long long)k->c[c].integer[i]);
        return;
    }
    double x =
        k->c[c].real ? k->c[c].real[i] : (double)k->c[c].count[i] / (double)k->c[c].tokens[i / s->experts];
    if (isfinite(x))
        exc_buf_printf(b, "%.9g", x);
    else
        exc_buf_puts(b, missing);
}

static void write_csv(exc_buf *b, const exc_stats *s, const exc_experts *t, const columns *k) {
    exc_buf_puts(b, "layer,expert");
    for (int c = 0; c < k->n; c++) exc_buf_printf(b, ",%s", k->c[c].name);
    exc_buf_puts(b, ",selected\n");
    for (int64_t i = 0; i < s->moe_layers * s->experts; i++) {
        exc_buf_printf(b, "%lld,%lld", (long long)s->layer_of[i / s->experts], (long long)(i % s->experts));
        for (int c = 0; c < k->n; c++) {
            exc_buf_puts(b, ",");
            put_cell(b, s, k, c, i, "");
        }
        exc_buf_printf(b, ",%d\n", is_selected(t, i));
    }
}

static void write_lines(exc_buf *b, const exc_stats *s, const exc_experts *t, const columns *k) {
    for (int64_t i = 0; i < s->moe_layers * s->experts; i++) {
        exc_buf_printf(b, "{\"layer\":%lld,\"expert\":%lld", (long long)s->layer_of[i / s->experts],
                       (long long)(i % s->experts));
        for (int c = 0; c < k->n; c++) {
            exc_buf_printf(b, ",\"%s\":", k->c[c].name);
            put_cell(b, s, k, c, i, "null");
        }
        exc_buf_printf(b, ",\"selected\":%s}\n", is_selected(t, i) ? "true" : "false");
    }
}

/* -------------------------------------------------------------------------------------------------- result
 */

static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

static json_t *phase_facts(const exc_stats *s, const exc_experts *t, int phase) {
    json_t *o = json_object();
    int64_t n = s->moe_layers * s->experts, tests = 0, found = 0;
    double largest = 0;
    for (int64_t i = 0; i < n; i++) {
        double q = t->phase[phase].q ? t->phase[phase].q[i] : NAN;
        tests += isfinite(q);
        found += q <= SELECT_Q;
        largest = fmax(largest, fabs(t->phase[phase].log_ratio[i]));
    }
    json_object_set_new(o, "target_tokens", json_integer(s->group[EXC_TARGET][phase].tokens[0]));
    json_object_set_new(o, "baseline_tokens", json_integer(s->group[EXC_BASELINE][phase].tokens[0]));
    json_object_set_new(o, "largest_log_ratio", number(largest));
    if (phase == EXC_PREFILL) {
        json_object_set_new(o, "tested", json_integer(tests));
        json_object_set_new(o, "q_at_most_0.05", json_integer(found));
    } else {
        json_object_set_new(o, "errors", json_string("none: counts by prompt are kept of prefill only"));
    }
    return o;
}

static int64_t best_row(const exc_experts *t, const bool *taken, int64_t n) {
    const double *z = t->phase[EXC_PREFILL].z;
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && isfinite(z[i]) && (best < 0 || fabs(z[i]) > fabs(z[best]))) best = i;
    return best;
}

/* the rows of largest |z| in prefill */
static exc_status top_rows(exc_ctx *ctx, const exc_stats *s, const exc_experts *t, json_t *list) {
    int64_t n = s->moe_layers * s->experts, i;
    bool *taken = exc_zalloc(ctx, (size_t)n, sizeof *taken, "order of experts");
    if (!taken) return EXC_ERR_MEMORY;
    for (int k = 0; k < TOP_ROWS && (i = best_row(t, taken, n)) >= 0; k++) {
        json_t *o = json_object();
        taken[i] = true;
        json_object_set_new(o, "layer", json_integer(s->layer_of[i / s->experts]));
        json_object_set_new(o, "expert", json_integer(i % s->experts));
        json_object_set_new(o, "log_ratio", number(t->phase[EXC_PREFILL].log_ratio[i]));
        json_object_set_new(o, "se", number(t->phase[EXC_PREFILL].se[i]));
        json_object_set_new(o, "z", number(t->phase[EXC_PREFILL].z[i]));
        json_object_set_new(o, "q", number(t->phase[EXC_PREFILL].q[i]));
        json_object_set_new(o, "risk_difference", number(t->phase[EXC_PREFILL].risk[i]));
        if (t->phase[EXC_DECODE].log_ratio)
            json_object_set_new(o, "decode_log_ratio", number(t->phase[EXC_DECODE].log_ratio[i]));
        if (t->score) {
            json_object_set_new(o, "output_projection", number(t->projection[i]));
            json_object_set_new(o, "score", number(t->score[i]));
        }
        json_array_append_new(list, o);
    }
    exc_release(taken);
    return EXC_OK;
}

static exc_status facts(exc_ctx *ctx, const exc_stats *s, const exc_experts *t, const choices *c,
                        char **json) {
    json_t *o = json_object(), *top = json_array();
    exc_status st = top_rows(ctx, s, t, top);
    json_object_set_new(o, "moe_layers", json_integer(s->moe_layers));
    json_object_set_new(o, "experts", json_integer(s->experts));
    json_object_set_new(o, "target_prompts", json_integer(s->prompts[EXC_TARGET]));
    json_object_set_new(o, "baseline_prompts", json_integer(s->prompts[EXC_BASELINE]));
    json_object_set_new(o, "alpha", json_real(c->alpha));
    json_object_set_new(o, "resamples", json_integer(c->resamples));
    json_object_set_new(o, "seed", json_integer((json_int_t)c->seed));
    json_object_set_new(o, "selected", json_string("prefill q at most 0.05"));
    json_object_set_new(o, "prefill", phase_facts(s, t, EXC_PREFILL));
    if (t->phase[EXC_DECODE].log_ratio) json_object_set_new(o, "decode", phase_facts(s, t, EXC_DECODE));
    json_object_set_new(o, "top", top);
    if (st == EXC_OK && !(*json = exc_json_text(ctx, o)))
        st = exc_fail(ctx, EXC_ERR_MEMORY, "contrast: no memory for the result");
    json_decref(o);
    return st;
}

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), k = strlen(end);
    return n > k && !strcmp(s + n - k, end);
}

static exc_status write_table(exc_ctx *ctx, const exc_stats *s, const exc_experts *t, const char *out,
                              int force) {
    columns k;
    exc_buf b = {0};
    list_columns(s, t, &k);
    if (ends_with(out, ".csv"))
        write_csv(&b, s, t, &k);
    else
        write_lines(&b, s, t, &k);
    exc_status st = b.failed ? exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory for the table", out)
                             : exc_write_file(ctx, out, b.data, b.len, force != 0);
    exc_buf_free(&b);
    return st;
}

static void explain(exc_ctx *ctx, const exc_stats *s, const exc_dirs *d) {
    if (s->prompts[EXC_TARGET] < 2 || s->prompts[EXC_BASELINE] < 2)
        exc_warn(ctx, "contrast: a set of one prompt cannot be resampled: no errors, z or q");
    if (d && !s->group[0][0].out_sum)
        exc_warn(ctx, "contrast: these stats have no .out_sum (--no-out): no output projection and no score");
}

exc_status exc_contrast(exc_ctx *ctx, const exc_stats *stats, const exc_dirs *dirs,
                        const exc_contrast_options *options, const char *out, int force, char **json) {
    exc_experts t;
    choices c;
    exc_clear(ctx);
    if (json) *json = NULL;
    if (!stats || !out) return exc_fail(ctx, EXC_ERR_USAGE, "contrast: expected stats and a path to write");
    if (!ends_with(out, ".csv") && !ends_with(out, ".jsonl"))
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: expected a name that ends in .csv or .jsonl", out);
    EXC_TRY(exc_check_file(ctx, out, force != 0));
    EXC_TRY(read_choices(ctx, options, &c));
    EXC_TRY(exc_experts_make(ctx, stats, dirs, options, &t));
    explain(ctx, stats, dirs);
    exc_status st = json ? facts(ctx, stats, &t, &c, json) : EXC_OK;
    if (st == EXC_OK) st = write_table(ctx, stats, &t, out, force);
    if (st != EXC_OK && json) {
        exc_free(*json);
        *json = NULL;
    }
    exc_experts_free(&t);
    return st;
}
