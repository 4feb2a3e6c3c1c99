/* directions.c - from residual states of single prompts to one subspace a layer.
 *
 * Samples are differences of the state that emits the first new token [n,L+1,H]: target i less baseline i
 * when the sets have the same size, else target i less the baseline mean. They are not centred: their mean is
 * the very shift that is sought, and centring before an SVD leaves only the noise around it. Methods: `mean`,
 * the normalised mean difference; `projected`, the same less its component along the baseline mean; `svd`,
 * the leading right singular vectors of the samples; `whitened`, the same after scaling the space so that the
 * baseline states vary alike in every direction, mapped back. The covariance of fewer prompts than
 * dimensions has no inverse, so whitening uses its factor form (probabilistic PCA): leading components with
 * their own variance, everything else with the average of the rest. Work is done in f64 by row, and row 0
 * (the embedding) has no direction. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "study.h"

#define MAX_RANK 64    /* of the ops */
#define MAX_FACTORS 64 /* components of the baseline that whitening tells apart */
#define NOISE 1e-6     /* a difference below this share of the states is rounding */

static const char *const method_name[] = {"mean", "projected", "svd", "whitened"};

typedef struct work {
    exc_ctx *ctx;
    const exc_stats *s;
    exc_method method;
    int64_t rank, n, rows, hidden; /* n samples; rows = L+1 */
    bool paired;
    double *mean[2];    /* [L+1,H] target, baseline */
    double *difference; /* [L+1,H] */
    double *size;       /* [L+1] root mean square length of a row's samples */
    float *x;           /* [n,L+1,H] samples */
    float *y;           /* [Pb,L+1,H] centred baseline states, for whitening */
    int64_t factors;
    float *factor;                           /* [L+1,F,H] */
    float *factor_sigma;                     /* [L+1,F] */
    double *factor_energy, *factor_residual; /* [L+1] */
    double *rest;                            /* [L+1] variance of the directions no factor covers */
    double *q;                               /* [L+1,R,H] bases in f64 while they are made orthonormal */
    double *energy, *residual;               /* [L+1], NaN: none */
    void *scratch;
    size_t scratch_bytes;
    exc_dirs *d;
} work;

/* -------------------------------------------------------------------------------------------------- vectors
 */

static double dot(const double *a, const double *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void add_scaled(double *y, double a, const double *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

/* Gram-Schmidt, twice, over k rows; rows that add nothing become zero. Returns how many are left. */
static int64_t orthonormalise(double *q, int64_t k, int64_t n) {
    int64_t kept = 0;
    for (int64_t i = 0; i < k; i++) {
        double *v = q + i * n, before = sqrt(dot(v, v, n));
        for (int pass = 0; pass < 2; pass++)
            for (int64_t j = 0; j < i; j++) add_scaled(v, -dot(v, q + j * n, n), q + j * n, n);
        double after = sqrt(dot(v, v, n));
        bool keep = after > 1e-6 * before && after > 0;
        for (int64_t h = 0; h < n; h++) v[h] = keep ? v[h] / after : 0;
        kept += keep;
    }
    return kept;
}

/* a difference worth a direction: more than rounding of the states it came from */
static bool is_shift(const work *w, int64_t row, double length) {
    size_t at = (size_t)(row * w->hidden);
    double t = sqrt(dot(w->mean[0] + at, w->mean[0] + at, w->hidden)),
           b = sqrt(dot(w->mean[1] + at, w->mean[1] + at, w->hidden));
    return row > 0 && length > NOISE * fmax(t, b);
}

/* ------------------------------------------------------------------------------- tasks: one row of the
 * stream */

static void take_means(void *arg, size_t task, int worker) {
    work *w = arg;
    int64_t row = (int64_t)task, H = w->hidden, stride = w->rows * H;
    double *d = w->difference + row * H;
    for (int label = 0; label < 2; label++) {
        double *mean = w->mean[label] + row * H;
        int64_t P = w->s->prompts[label];
        for (int64_t p = 0; p < P; p++) {
            const float *state = w->s->resid_last[label] + p * stride + row * H;
            for (int64_t h = 0; h < H; h++) mean[h] += (double)state[h];
        }
        for (int64_t h = 0; h < H; h++) mean[h] /= (double)P;
    }
    for (int64_t h = 0; h < H; h++) {
        d[h] = w->mean[0][row * H + h] - w->mean[1][row * H + h];
        w->d->mean_difference[row * H + h] = (float)d[h];
    }
}

static void take_samples(void *arg, size_t task, int worker) {
    work *w = arg;
    int64_t row = (int64_t)task, H = w->hidden, stride = w->rows * H, at = row * H;
    const double *mean = w->mean[1] + at;
    double all = 0;
    for (int64_t i = 0; i < w->n; i++) {
        const float *t = w->s->resid_last[0] + i * stride + at;
        const float *pair = w->paired ? w->s->resid_last[1] + i * stride + at : NULL;
        float *x = w->x + i * stride + at;
        for (int64_t h = 0; h < H; h++) {
            x[h] = (float)((double)t[h] - (pair ? (double)pair[h] : mean[h]));
            all += (double)x[h] * (double)x[h];
        }
    }
    w->size[row] = sqrt(all / (double)w->n);
}

static void take_centred(void *arg, size_t task, int worker) {
    work *w = arg;
    int64_t row = (int64_t)task, H = w->hidden, stride = w->rows * H, at = row * H;
    for (int64_t i = 0; i < w->s->prompts[EXC_BASELINE]; i++) {
        const float *b = w->s->resid_last[EXC_BASELINE] + i * stride + at;
        float *y = w->y + i * stride + at;
        for (int64_t h = 0; h < H; h++) y[h] = (float)((double)b[h] - w->mean[1][at + h]);
    }
}

static void take_mean_direction(void *arg, size_t task, int worker) {
    work *w = arg;
    int64_t row = (int64_t)task, H = w->hidden, at = row * H;
    double *q = w->q + at, length;
    const double *b = w->mean[1] + at;
    if (!is_shift(w, row, sqrt(dot(w->difference + at, w->difference + at, H)))) return;
    memcpy(q, w->difference + at, (size_t)H * sizeof *q);
    double bb = dot(b, b, H);
    for (int pass = 0; w->method == EXC_METHOD_PROJECTED && bb > 0 && pass < 2; pass++)
        add_scaled(q, -dot(q, b, H) / bb, b, H);
    length = sqrt(dot(q, q, H));
    if (!(length > NOISE * sqrt(dot(w->difference + at, w->difference + at, H)))) {
        memset(q, 0, (size_t)H * sizeof *q);
        return;
    }
    w->d->singular[row] = (float)length;
    for (int64_t h = 0; h < H; h++) q[h] /= length;
}

static double factor_variance(const work *w, int64_t row, int64_t f) {
    double sigma = (double)w->factor_sigma[row * w->factors + f];
    return sigma * sigma / (double)w->s->prompts[EXC_BASELINE];
}

/* x += (sqrt(rest/var))^(+1 or -1) - 1 times its part along each factor: Sigma^-1/2 or Sigma^1/2, up to one
 * common factor, with Sigma = rest (1 - V'V) + V' var V and factors V [F,H] orthonormal */
static void scale_part(const work *w, int64_t row, bool back, double *x) {
    int64_t H = w->hidden, F = w->factors;
    double rest = w->rest[row];
    for (int64_t f = 0; f < F; f++) {
        const float *v = w->factor + (row * F + f) * H;
        double var = factor_variance(w, row, f), c = 0;
        if (!(var > rest)) continue;
        for (int64_t h = 0; h < H; h++) c += x[h] * (double)v[h];
        c *= (back ? sqrt(var / rest) : sqrt(rest / var)) - 1;
        for (int64_t h = 0; h < H; h++) x[h] += c * (double)v[h];
    }
}

static void whiten(void *arg, size_t task, int worker) {
    work *w = arg;
    int64_t row = (int64_t)task, H = w->hidden, stride = w->rows * H;
    double *wide = w->q + row * w->rank * H; /* free until the subspace is known */
    for (int64_t i = 0; i < w->n; i++) {
        float *x = w->x + i * stride + row * H;
        for (int64_t h = 0; h < H; h++) wide[h] = (double)x[h];
        scale_part(w, row, false, wide);
        for (int64_t h = 0; h < H; h++) x[h] = (float)wide[h];
    }
    memset(wide, 0, (size_t)H * sizeof *wide);
}

/* what the op found, made orthonormal in f64 and turned so that plus means "as the target set" */
static void take_subspace(void *arg, size_t task, int worker) {
    work *w = arg;
    int64_t row = (int64_t)task, H = w->hidden, R = w->rank;
    double *q = w->q + row * R * H, *d = w->difference + row * H;
    if (!is_shift(w, row, w->size[row])) {
        memset(w->d->singular + row * R, 0, (size_t)R * sizeof(float));
        w->residual[row] = NAN;
        return;
    }
    for (int64_t i = 0; i < R * H; i++) q[i] = (double)w->d->basis[row * R * H + i];
    for (int64_t r = 0; r < R && w->method == EXC_METHOD_WHITENED; r++) scale_part(w, row, true, q + r * H);
    orthonormalise(q, R, H);
    for (int64_t r = 0; r < R; r++)
        if (dot(q + r * H, d, H) < -NOISE * sqrt(dot(d, d, H)))
            for (int64_t h = 0; h < H; h++) q[r * H + h] = -q[r * H + h];
}

/* share of |X|_F^2 of a row's samples that its basis holds; NaN without samples or basis */
static void take_energy(void *arg, size_t task, int worker) {
    work *w = arg;
    int64_t row = (int64_t)task, H = w->hidden, R = w->rank, stride = w->rows * H;
    const double *q = w->q + row * R * H;
    double all = w->size[row] * w->size[row] * (double)w->n, held = 0;
    for (int64_t i = 0; i < w->n && w->method != EXC_METHOD_SVD; i++) { /* for svd the op has said it */
        const float *x = w->x + i * stride + row * H;
        for (int64_t r = 0; r < R; r++) {
            double c = 0;
            for (int64_t h = 0; h < H; h++) c += (double)x[h] * q[r * H + h];
            held += c * c;
        }
    }
    if (w->method != EXC_METHOD_SVD) w->energy[row] = held / all;
    if (!(all > 0 && dot(q, q, R * H) > 0)) w->energy[row] = NAN;
}

static void each_row(work *w, exc_task_fn fn) {
    w->ctx->queue.parallel(&w->ctx->queue, (size_t)w->rows, fn, w);
}

/* ------------------------------------------------------------------------------------------------- subspaces
 */

static exc_status subspace(work *w, const float *x, int64_t samples, int64_t rank, float *basis,
                           float *singular, double *energy, double *residual) {
    int64_t stride = w->rows * w->hidden;
    size_t rows = (size_t)w->rows;
    struct exc_subspace_args a = {.x = x,
                                  .layers = w->rows,
                                  .layer_stride = w->hidden,
                                  .samples = samples,
                                  .row_stride = stride,
                                  .width = w->hidden,
                                  .rank = rank,
                                  .basis = basis,
                                  .singular = singular,
                                  .energy = energy,
                                  .residual = residual,
                                  .work = w->scratch,
                                  .work_bytes = w->scratch_bytes};
    exc_dock d = {.ctx = w->ctx, .what = "samples of the directions"};
    exc_dock_in(&d, &a.x, (size_t)(samples * stride) * sizeof *x);
    exc_dock_out(&d, &a.basis, rows * (size_t)(rank * w->hidden) * sizeof *basis);
    exc_dock_out(&d, &a.singular, rows * (size_t)rank * sizeof *singular);
    exc_dock_out(&d, &a.energy, rows * sizeof *energy);
    exc_dock_out(&d, &a.residual, rows * sizeof *residual);
    return EXC_DOCK_CALL(&d, subspace, &a);
}

/* How many factors of a row stand out, and the variance of each direction they leave. Pure noise of P samples
 * in H dimensions has sample variances up to (1 + sqrt(H/P))^2 times the true one (Marchenko and Pastur): a
 * component below that edge tells nothing, and scaling by it would only add noise. Those beyond the count are
 * switched off. */
static void count_factors(work *w, int64_t row) {
    int64_t H = w->hidden, F = w->factors, kept = 0;
    double edge = 1 + sqrt((double)H / (double)w->s->prompts[EXC_BASELINE]), held = 0, all = 0;
    for (int64_t f = 0; f < F; f++) held += factor_variance(w, row, f);
    all = w->factor_energy[row] > 0 ? held / w->factor_energy[row] : 0;
    double rest = all / (double)H;
    for (held = 0; kept < F && factor_variance(w, row, kept) > rest * edge * edge; kept++) {
        held += factor_variance(w, row, kept);
        rest = (all - held) / (double)(H - kept - 1);
    }
    for (int64_t f = kept; f < F; f++) w->factor_sigma[row * F + f] = 0;
    w->rest[row] = fmax(rest, 1e-9 * all);
    if (!(w->rest[row] > 0)) w->rest[row] = 1; /* no variance at all: nothing to scale */
}

/* factors of the baseline's covariance by row; then the samples are scaled by them */
static exc_status take_factors(work *w) {
    each_row(w, take_centred);
    EXC_TRY(subspace(w, w->y, w->s->prompts[EXC_BASELINE], w->factors, w->factor, w->factor_sigma,
                     w->factor_energy, w->factor_residual));
    for (int64_t row = 0; row < w->rows; row++) count_factors(w, row);
    each_row(w, whiten);
    return EXC_OK;
}

static exc_status find_bases(work *w) {
    bool mean = w->method == EXC_METHOD_MEAN || w->method == EXC_METHOD_PROJECTED;
    each_row(w, take_means);
    each_row(w, take_samples);
    EXC_TRY(exc_progress(w->ctx, "directions", 1, 3, "passes"));
    if (mean) {
        for (int64_t row = 0; row < w->rows; row++) w->residual[row] = NAN; /* nothing was iterated */
        each_row(w, take_mean_direction);
    } else {
        if (w->method == EXC_METHOD_WHITENED) EXC_TRY(take_factors(w));
        EXC_TRY(subspace(w, w->x, w->n, w->rank, w->d->basis, w->d->singular, w->energy, w->residual));
        each_row(w, take_subspace);
        if (w->method == EXC_METHOD_WHITENED) each_row(w, take_samples); /* energy is asked for unscaled */
    }
    EXC_TRY(exc_progress(w->ctx, "directions", 2, 3, "passes"));
    each_row(w, take_energy);
    int64_t n = w->rows * w->rank * w->hidden;
    for (int64_t i = 0; i < n; i++) w->d->basis[i] = (float)w->q[i];
    return exc_progress(w->ctx, "directions", 3, 3, "passes");
}

/* ------------------------------------------------------------------------------------------------ per expert
 */

/* A sum over tokens gives one vector a phase: the difference of mean outputs in prefill, then in decode. An
 * expert that one set never chose has no difference, and further rows are zero. */
static exc_status find_expert_bases(work *w, int64_t *with) {
    const exc_stats *s = w->s;
    int64_t H = s->hidden, R = w->rank, n = s->moe_layers * s->experts;
    double *q = exc_alloc(w->ctx, (size_t)(R * H), sizeof *q, "basis of an expert");
    if (!q) return EXC_ERR_MEMORY;
    *with = 0;
    for (int64_t i = 0; i < n; i++) {
        memset(q, 0, (size_t)(R * H) * sizeof *q);
        for (int phase = 0; phase < 2 && phase < R; phase++) {
            const exc_group *t = &s->group[0][phase], *b = &s->group[1][phase];
            if (!t->count[i] || !b->count[i]) continue;
            add_scaled(q + phase * H, 1 / (double)t->count[i], t->out_sum + i * H, H);
            add_scaled(q + phase * H, -1 / (double)b->count[i], b->out_sum + i * H, H);
        }
        *with += orthonormalise(q, R, H) > 0;
        for (int64_t k = 0; k < R * H; k++) w->d->expert_basis[i * R * H + k] = (float)q[k];
    }
    exc_release(q);
    return EXC_OK;
}

/* --------------------------------------------------------------------------------------------------- result
 */

static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

static json_t *row_facts(const work *w, int64_t row) {
    const exc_dirs *d = w->d;
    const float *diff = d->mean_difference + row * d->hidden;
    json_t *o = json_object(), *sigma = json_array();
    double length = 0;
    int64_t rank = 0;
    for (int64_t h = 0; h < d->hidden; h++) length += (double)diff[h] * (double)diff[h];
    for (int64_t r = 0; r < d->rank; r++) {
        const float *v = d->basis + (row * d->rank + r) * d->hidden;
        double size = 0;
        for (int64_t h = 0; h < d->hidden; h++) size += (double)v[h] * (double)v[h];
        rank += size > 0;
        json_array_append_new(sigma, number((double)d->singular[row * d->rank + r]));
    }
    json_object_set_new(o, "row", json_integer(row));
    json_object_set_new(o, "after_layer", row ? json_integer(row - 1) : json_null());
    json_object_set_new(o, "rank", json_integer(rank));
    json_object_set_new(o, "mean_difference", number(sqrt(length)));
    json_object_set_new(o, "singular", sigma);
    json_object_set_new(o, "energy", number(w->energy[row]));
    json_object_set_new(o, "residual", number(w->residual[row]));
    return o;
}

static exc_status facts(const work *w, int64_t with, char **json) {
    static const char *const meaning[] = {
        "length of the mean difference", "length of the projected mean difference",
        "singular values of the samples", "singular values of the whitened samples"};
    if (!json) return EXC_OK;
    json_t *o = json_object(), *rows = json_array();
    json_object_set_new(o, "method", json_string(method_name[w->method]));
    json_object_set_new(o, "rank", json_integer(w->rank));
    json_object_set_new(o, "samples", json_integer(w->n));
    json_object_set_new(
        o, "sample",
        json_string(w->paired ? "target less baseline, in pairs" : "target less the baseline mean"));
    json_object_set_new(o, "centred", json_false());
    json_object_set_new(o, "singular", json_string(meaning[w->method]));
    if (w->factors) json_object_set_new(o, "whitening_factors", json_integer(w->factors));
    if (w->d->expert_basis) json_object_set_new(o, "experts_with_direction", json_integer(with));
    for (int64_t row = 0; row < w->rows; row++) json_array_append_new(rows, row_facts(w, row));
    json_object_set_new(o, "rows", rows);
    *json = exc_json_text(w->ctx, o);
    json_decref(o);
    return *json ? EXC_OK : exc_fail(w->ctx, EXC_ERR_MEMORY, "directions: no memory for the result");
}

/* what the file says of its origin: method, rank, and the stats' own metadata */
static exc_status describe(work *w) {
    exc_buf layers = {0};
    json_t *from = NULL;
    for (int64_t m = 0; m < w->s->moe_layers; m++)
        exc_buf_printf(&layers, "%s%lld", m ? "," : "", (long long)w->s->layer_of[m]);
    exc_status st =
        exc_json_parse(w->ctx, "options of the stats", w->s->options, strlen(w->s->options), &from);
    json_t *o =
        json_pack("{s:s,s:I,s:b,s:I,s:b,s:s,s:s,s:s}", "method", method_name[w->method], "rank",
                  (json_int_t)w->rank, "per_expert", w->d->expert_basis != NULL, "samples", (json_int_t)w->n,
                  "paired", (int)w->paired, "layers", layers.data ? layers.data : "", "target_prompts",
                  w->s->prompt_hashes[0], "baseline_prompts", w->s->prompt_hashes[1]);
    if (o && from) json_object_set(o, "stats", from);
    char *text = st == EXC_OK && o && !layers.failed ? exc_json_text(w->ctx, o) : NULL;
    if (text) w->d->options = exc_strdup(w->ctx, text);
    exc_free(text);
    json_decref(o);
    json_decref(from);
    exc_buf_free(&layers);
    if (st == EXC_OK && !w->d->options)
        st = exc_fail(w->ctx, EXC_ERR_MEMORY, "directions: no memory for options");
    return st;
}

/* ---------------------------------------------------------------------------------------------------- memory
 */

static void *room(work *w, exc_status *st, int64_t count, size_t size) {
    void *p = *st == EXC_OK ? exc_zalloc(w->ctx, (size_t)count, size, "directions") : NULL;
    if (!p) *st = EXC_ERR_MEMORY;
    return p;
}

static exc_status make_dirs(work *w, bool per_expert) {
    exc_status st = EXC_OK;
    exc_dirs *d = w->d = room(w, &st, 1, sizeof *d);
    if (!d) return st;
    d->rows = w->rows;
    d->rank = w->rank;
    d->hidden = w->hidden;
    memcpy(d->fingerprint, w->s->fingerprint, sizeof d->fingerprint);
    d->basis = room(w, &st, d->rows * d->rank * d->hidden, sizeof *d->basis);
    d->singular = room(w, &st, d->rows * d->rank, sizeof *d->singular);
    d->mean_difference = room(w, &st, d->rows * d->hidden, sizeof *d->mean_difference);
    if (!per_expert) return st;
    d->moe_layers = w->s->moe_layers;
    d->experts = w->s->experts;
    d->expert_basis = room(w, &st, d->moe_layers * d->experts * d->rank * d->hidden, sizeof *d->expert_basis);
    return st;
}

static exc_status make_room(work *w, bool per_expert) {
    int64_t L = w->rows, H = w->hidden, F = w->factors, P = w->s->prompts[1];
    int workers = w->ctx->queue.workers;
    exc_status st = make_dirs(w, per_expert);
    for (int i = 0; i < 2; i++) w->mean[i] = room(w, &st, L * H, sizeof(double));
    w->difference = room(w, &st, L * H, sizeof(double));
    w->size = room(w, &st, L, sizeof(double));
    w->x = room(w, &st, w->n * L * H, sizeof(float));
    w->q = room(w, &st, L * w->rank * H, sizeof(double));
    w->energy = room(w, &st, L, sizeof(double));
    w->residual = room(w, &st, L, sizeof(double));
    if (w->method == EXC_METHOD_SVD || w->method == EXC_METHOD_WHITENED)
        w->scratch_bytes = exc_subspace_bytes(L, w->n, H, w->rank, workers);
    if (w->method == EXC_METHOD_WHITENED) {
        size_t more = exc_subspace_bytes(L, P, H, F, workers);
        if (more > w->scratch_bytes) w->scratch_bytes = more;
        w->y = room(w, &st, P * L * H, sizeof(float));
        w->factor = room(w, &st, L * F * H, sizeof(float));
        w->factor_sigma = room(w, &st, L * F, sizeof(float));
        w->factor_energy = room(w, &st, L, sizeof(double));
        w->factor_residual = room(w, &st, L, sizeof(double));
        w->rest = room(w, &st, L, sizeof(double));
    }
    if (w->ctx->module) w->scratch_bytes = 0; /* a device has scratch of its own */
    if (w->scratch_bytes) w->scratch = room(w, &st, (int64_t)w->scratch_bytes, 1);
    return st;
}

static void release_room(work *w) {
    void *all[] = {w->mean[0],
                   w->mean[1],
                   w->difference,
                   w->size,
                   w->x,
                   w->q,
                   w->energy,
                   w->residual,
                   w->y,
                   w->factor,
                   w->factor_sigma,
                   w->factor_energy,
                   w->factor_residual,
                   w->rest,
                   w->scratch};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_release(all[i]);
}

/* --------------------------------------------------------------------------------------------------- choices
 */

static exc_status check_rank(work *w, int64_t rank) {
    const char *method = method_name[w->method];
    bool one = w->method == EXC_METHOD_MEAN || w->method == EXC_METHOD_PROJECTED;
    if (rank > w->n) /* first: no method and no machine changes this */
        return exc_fail(w->ctx, EXC_ERR_INPUT,
                        "directions: expected a rank of at most %lld (the target prompts are the samples), "
                        "found rank %lld",
                        (long long)w->n, (long long)rank);
    if (rank > w->hidden)
        return exc_fail(w->ctx, EXC_ERR_INPUT,
                        "directions: expected a rank of at most %lld (hidden size), found rank %lld",
                        (long long)w->hidden, (long long)rank);
    if (rank < 0 || rank > MAX_RANK)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "directions: expected a rank of 1..%d, found %lld", MAX_RANK,
                        (long long)rank);
    w->rank = rank ? rank : 1;
    if (one && w->rank > 1)
        return exc_fail(
            w->ctx, EXC_ERR_USAGE,
            "directions: method %s gives one vector a layer: expected rank 1, found %lld (svd and whitened "
            "give more)",
            method, (long long)w->rank);
    return EXC_OK;
}

static exc_status read_choices(work *w, const exc_directions_options *o) {
    const exc_stats *s = w->s;
    w->method = o ? o->method : EXC_METHOD_MEAN;
    w->n = s->prompts[EXC_TARGET];
    w->paired = s->prompts[EXC_TARGET] == s->prompts[EXC_BASELINE];
    w->rows = s->layers + 1;
    w->hidden = s->hidden;
    if ((int)w->method < 0 || w->method > EXC_METHOD_WHITENED)
        return exc_fail(w->ctx, EXC_ERR_USAGE, "directions: expected a method of 0..%d, found %d",
                        EXC_METHOD_WHITENED, (int)w->method);
    EXC_TRY(check_rank(w, o ? o->rank : 0));
    if (o && o->per_expert && !s->group[0][0].out_sum)
        return exc_fail(
            w->ctx, EXC_ERR_INPUT,
            "directions: bases of experts need .out_sum, which these stats lack (captured with --no-out)");
    if (w->method != EXC_METHOD_WHITENED) return EXC_OK;
    if (s->prompts[EXC_BASELINE] < 4 || w->hidden < 4)
        return exc_fail(w->ctx, EXC_ERR_INPUT,
                        "directions: whitening expected at least 4 baseline prompts, found %lld",
                        (long long)s->prompts[EXC_BASELINE]);
    /* half of the degrees of freedom stay for the variance of the rest */
    w->factors = (s->prompts[EXC_BASELINE] - 1) / 2;
    if (w->factors > w->hidden / 2) w->factors = w->hidden / 2;
    if (w->factors > MAX_FACTORS) w->factors = MAX_FACTORS;
    return EXC_OK;
}

static exc_status check_found(const work *w) {
    for (int64_t i = 0; i < w->rows * w->rank * w->hidden; i++)
        if (w->d->basis[i] != 0) return EXC_OK;
    return exc_fail(
        w->ctx, EXC_ERR_INPUT,
        "directions: expected target and baseline states that differ, found no difference in any layer");
}

exc_status exc_directions(exc_ctx *ctx, const exc_stats *stats, const exc_directions_options *options,
                          exc_dirs **dirs, char **json) {
    work w = {.ctx = ctx, .s = stats};
    int64_t with = 0;
    exc_status st;
    exc_clear(ctx);
    if (json) *json = NULL;
    if (!stats || !dirs)
        return exc_fail(ctx, EXC_ERR_USAGE, "directions: expected stats and a place for the result");
    *dirs = NULL;
    EXC_TRY(read_choices(&w, options));
    EXC_GOTO(done, make_room(&w, options && options->per_expert));
    EXC_GOTO(done, find_bases(&w));
    EXC_GOTO(done, check_found(&w));
    if (w.d->expert_basis) EXC_GOTO(done, find_expert_bases(&w, &with));
    EXC_GOTO(done, describe(&w));
    st = facts(&w, with, json);
done:
    release_room(&w);
    if (st == EXC_OK)
        *dirs = w.d;
    else
        exc_dirs_free(w.d);
    return st;
}
