/* job.c - JOB.json: the whole study as one file, and exc_run, which works through it.
 *
 *   {"model": DIR, "target": FILE, "baseline": FILE, "out": DIR,         needed; relative paths start at the
 * job file's folder "system": TEXT, "chat": NAME, "raw": BOOL, "limit": N,              how prompts are
 * rendered (capture; system: evaluate too) "compute": "bf16" | "f32", "capture":    {"decode": N, "no_out":
 * BOOL, "batch_tokens": N}, "directions": {"method": "mean" | "projected" | "svd" | "whitened", "rank": K,
 * "per_expert": BOOL}, "contrast":   {"alpha": X, "resamples": N, "seed": N}, "plan":       {"roles": TEXT or
 * [TEXT..], "layers": TEXT or [N or TEXT..], "select": TEXT, "strength": X or [X..], "basis": X, "norm":
 * TEXT, "round": TEXT}, "apply":      {"sidecar": BOOL, "allow_nonfinite": BOOL, "to": "bf16"}, "evaluate":   {"target", "baseline",
 * "neutral", "markers", "answers": FILE, "system": TEXT, "max_new", "examples", "seed": N}}
 *
 * Everything but the first line may be left out; an unknown key is refused. The whole file and the presence
 * of every input are checked before the first step. The folder gets stats.safetensors,
 * directions.safetensors, experts.csv, plan.json, checkpoint/, evaluation.csv, report.json, report.html and
 * steps.json (ledger.c). */
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "job.h"

/* ------------------------------------------------------------------------------------------------------
 * values, paths */

static exc_status keep(exc_ctx *ctx, exc_job *j, char *text, const char **out) {
    if (!text) return EXC_ERR_MEMORY;
    if (j->n_owned == (int)EXC_COUNT(j->owned)) {
        exc_release(text);
        return exc_fail(ctx, EXC_ERR_MEMORY, "%s: more texts than a job can hold", j->path);
    }
    *out = j->owned[j->n_owned++] = text;
    return EXC_OK;
}

static exc_status resolve(exc_ctx *ctx, const exc_job *j, const char *typed, char **out) {
    if (typed[0] == '/' || !j->base[0]) return (*out = exc_strdup(ctx, typed)) ? EXC_OK : EXC_ERR_MEMORY;
    return exc_path_join(ctx, j->base, typed, out);
}

/* what = "job.json" or "job.json: evaluate"; the file or folder must be there now, not an hour into the run
 */
static exc_status get_path(exc_ctx *ctx, const exc_job *j, const json_t *o, const char *what, const char *key,
                           bool needed, bool input, char **out) {
    const char *typed = NULL;
    EXC_TRY(exc_json_string_or(ctx, o, what, key, NULL, &typed));
    if (!typed && !needed) return EXC_OK;
    if (!typed || !*typed)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected a path, found none", what, key);
    EXC_TRY(resolve(ctx, j, typed, out));
    if (input && access(*out, R_OK)) return exc_fail_errno(ctx, "%s: %s: %s", what, key, *out);
    return EXC_OK;
}

static exc_status get_int(exc_ctx *ctx, const json_t *o, const char *what, const char *key, int64_t hi,
                          int *out) {
    int64_t v = 0;
    EXC_TRY(exc_json_int_or(ctx, o, what, key, 0, hi, 0, &v));
    *out = (int)v;
    return EXC_OK;
}

static exc_status get_flag(exc_ctx *ctx, const json_t *o, const char *what, const char *key, int *out) {
    bool v = false;
    EXC_TRY(exc_json_bool_or(ctx, o, what, key, false, &v));
    *out = v;
    return EXC_OK;
}

static exc_status get_seed(exc_ctx *ctx, const json_t *o, const char *what, uint64_t *out) {
    int64_t v = 0;
    EXC_TRY(exc_json_int_or(ctx, o, what, "seed", 0, INT64_MAX, 0, &v));
    *out = (uint64_t)v;
    return EXC_OK;
}

static bool scalar_text(const json_t *v, exc_buf *b) {
    if (json_is_string(v))
        exc_buf_puts(b, json_string_value(v));
    else if (json_is_integer(v))
        exc_buf_printf(b, "%lld", (long long)json_integer_value(v));
    else if (json_is_real(v))
        exc_buf_printf(b, "%.17g", json_real_value(v));
    else
        return false;
    return true;
}

/* text, number, or a list of them -> the comma list that the verb's option takes */
static exc_status get_list(exc_ctx *ctx, exc_job *j, const json_t *o, const char *what, const char *key,
                           const char **out) {
    const json_t *v = json_object_get(o, key), *e;
    exc_buf b = {0};
    bool good = true;
    size_t i;
    if (!v) return EXC_OK;
    if (json_is_array(v)) {
        good = json_array_size(v) > 0;
        json_array_foreach(v, i, e) {
            if (i) exc_buf_puts(&b, ",");
            good = good && scalar_text(e, &b);
        }
    } else {
        good = scalar_text(v, &b);
    }
    exc_status st = EXC_OK;
    if (!good)
        st = exc_fail(ctx, EXC_ERR_INPUT,
                      "%s: %s: expected text, a number or a list of them, found something else", what, key);
    else if (b.failed)
        st = exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory", what);
    else
        st = keep(ctx, j, exc_strdup(ctx, b.data), out);
    exc_buf_free(&b);
    return st;
}

/* the object under `key`, checked for its keys; *o NULL when absent. what: buffer that names it in messages
 */
static exc_status section(exc_ctx *ctx, const exc_job *j, const char *key, const char *const *known,
                          char what[256], const json_t **o) {
    *o = json_object_get(j->source, key);
    snprintf(what, 256, "%.200s: %s", j->path, key);
    if (!*o) return EXC_OK;
    if (!json_is_object(*o))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected an object, found something else", what);
    return exc_json_keys(ctx, *o, what, known);
}

/* ------------------------------------------------------------------------------------------------------------
 * sections */

static exc_status read_prompts(exc_ctx *ctx, exc_job *j) {
    j->prompts = (exc_prompt_options)EXC_PROMPT_OPTIONS;
    EXC_TRY(get_flag(ctx, j->source, j->path, "raw", &j->prompts.raw));
    EXC_TRY(get_int(ctx, j->source, j->path, "limit", 1 << 30, &j->prompts.limit));
    EXC_TRY(exc_json_string_or(ctx, j->source, j->path, "system", NULL, &j->prompts.system));
    EXC_TRY(exc_json_string_or(ctx, j->source, j->path, "chat", NULL, &j->prompts.chat));
    if (j->prompts.raw && (j->prompts.system || j->prompts.chat))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: raw: expected no %s beside it, no chat template is used", j->path,
                        j->prompts.system ? "system" : "chat");
    const char *compute = NULL;
    EXC_TRY(exc_json_string_or(ctx, j->source, j->path, "compute", "bf16", &compute));
    j->compute = strcmp(compute, "f32") ? EXC_COMPUTE_BF16 : EXC_COMPUTE_F32;
    if (j->compute == EXC_COMPUTE_BF16 && strcmp(compute, "bf16"))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: compute: expected bf16 or f32, found %s", j->path,
                        exc_show(compute, strlen(compute)));
    return EXC_OK;
}

static exc_status read_finding(exc_ctx *ctx, exc_job *j) {
    static const char *const capture[] = {"decode", "no_out", "batch_tokens", NULL};
    static const char *const directions[] = {"method", "rank", "per_expert", NULL};
    static const char *const contrast[] = {"alpha", "resamples", "seed", NULL};
    static const char *const methods[] = {"mean", "projected", "svd", "whitened"};
    const json_t *o;
    char what[256];
    EXC_TRY(section(ctx, j, "capture", capture, what, &o));
    j->capture = (exc_capture_options)EXC_CAPTURE_OPTIONS;
    EXC_TRY(get_int(ctx, o, what, "decode", 1 << 20, &j->capture.decode));
    EXC_TRY(get_flag(ctx, o, what, "no_out", &j->capture.no_out));
    EXC_TRY(get_int(ctx, o, what, "batch_tokens", 1 << 24, &j->capture.batch_tokens));

    EXC_TRY(section(ctx, j, "directions", directions, what, &o));
    j->directions = (exc_directions_options)EXC_DIRECTIONS_OPTIONS;
    EXC_TRY(exc_json_string_or(ctx, o, what, "method", "mean", &j->method));
    int found = -1;
    for (int i = 0; i < 4; i++)
        if (!strcmp(j->method, methods[i])) found = i;
    if (found < 0)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: method: expected mean, projected, svd or whitened, found %s",
                        what, exc_show(j->method, strlen(j->method)));
    j->directions.method = (exc_method)found;
    EXC_TRY(get_int(ctx, o, what, "rank", 64, &j->directions.rank));
    EXC_TRY(get_flag(ctx, o, what, "per_expert", &j->directions.per_expert));

    EXC_TRY(section(ctx, j, "contrast", contrast, what, &o));
    j->contrast = (exc_contrast_options)EXC_CONTRAST_OPTIONS;
    EXC_TRY(exc_json_number_or(ctx, o, what, "alpha", 0, &j->contrast.alpha));
    EXC_TRY(get_int(ctx, o, what, "resamples", 1 << 20, &j->contrast.resamples));
    return get_seed(ctx, o, what, &j->contrast.seed);
}

static exc_status read_editing(exc_ctx *ctx, exc_job *j) {
    static const char *const plan[] = {"roles", "layers", "select", "strength", "basis", "norm", "round", NULL};
    static const char *const apply[] = {"sidecar", "allow_nonfinite", "to", NULL};
    const json_t *o;
    char what[256];
    EXC_TRY(section(ctx, j, "plan", plan, what, &o));
    j->plan = (exc_plan_options)EXC_PLAN_OPTIONS;
    j->plan.directions = "directions.safetensors";
    const char **const lists[] = {&j->plan.roles,    &j->plan.layers, &j->plan.select,
                                  &j->plan.strength, &j->plan.basis,  &j->plan.norm,   &j->plan.round};
    for (int i = 0; plan[i]; i++) EXC_TRY(get_list(ctx, j, o, what, plan[i], lists[i]));
    EXC_TRY(section(ctx, j, "apply", apply, what, &o));
    j->apply = (exc_apply_options)EXC_APPLY_OPTIONS;
    EXC_TRY(get_flag(ctx, o, what, "sidecar", &j->apply.sidecar));
    EXC_TRY(exc_json_string_or(ctx, o, what, "to", NULL, &j->apply.to));
    return get_flag(ctx, o, what, "allow_nonfinite", &j->apply.allow_nonfinite);
}

static exc_status read_evaluate(exc_ctx *ctx, exc_job *j) {
    static const char *const known[] = {"target", "baseline", "neutral",  "markers", "answers",
                                        "system", "max_new",  "examples", "seed",    NULL};
    const json_t *o;
    char what[256];
    EXC_TRY(section(ctx, j, "evaluate", known, what, &o));
    exc_evaluate_options *e = &j->evaluate;
    *e = (exc_evaluate_options)EXC_EVALUATE_OPTIONS;
    j->evaluates = o != NULL;
    const char **const files[] = {&e->target, &e->baseline, &e->neutral, &e->markers, &e->answers};
    for (int i = 0; i < 5; i++) {
        char *path = NULL;
        exc_status st = get_path(ctx, j, o, what, known[i], false, true, &path);
        if (path && st != EXC_OK) exc_release(path);
        EXC_TRY(st);
        if (path) EXC_TRY(keep(ctx, j, path, files[i]));
    }
    EXC_TRY(exc_json_string_or(ctx, o, what, "system", j->prompts.system, &e->system));
    EXC_TRY(get_int(ctx, o, what, "max_new", 1 << 20, &e->max_new));
    EXC_TRY(get_int(ctx, o, what, "examples", 1 << 20, &e->examples));
    EXC_TRY(get_seed(ctx, o, what, &e->seed));
    if (j->evaluates && !e->target && !e->baseline && !e->neutral)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: expected at least one of target, baseline, neutral, found none", what);
    return EXC_OK;
}

exc_status exc_job_read(exc_ctx *ctx, const char *path, exc_job *j) {
    static const char *const known[] = {"model", "target", "baseline", "out",     "system",     "chat",
                                        "raw",   "limit",  "compute",  "capture", "directions", "contrast",
                                        "plan",  "apply",  "evaluate", NULL};
    memset(j, 0, sizeof *j);
    j->path = path;
    EXC_TRY(exc_json_load(ctx, path, 1 << 20, &j->source));
    if (!json_is_object(j->source))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected an object, found something else", path);
    EXC_TRY(exc_json_keys(ctx, j->source, path, known));
    const char *slash = strrchr(path, '/');
    if (!(j->base = exc_strdup(ctx, slash ? path : ""))) return EXC_ERR_MEMORY;
    if (slash) j->base[slash == path ? 1 : slash - path] = 0;
    EXC_TRY(get_path(ctx, j, j->source, path, "model", true, true, &j->model));
    EXC_TRY(get_path(ctx, j, j->source, path, "target", true, true, &j->target));
    EXC_TRY(get_path(ctx, j, j->source, path, "baseline", true, true, &j->baseline));
    EXC_TRY(get_path(ctx, j, j->source, path, "out", true, false, &j->out));
    EXC_TRY(read_prompts(ctx, j));
    EXC_TRY(read_finding(ctx, j));
    EXC_TRY(read_editing(ctx, j));
    return read_evaluate(ctx, j);
}

void exc_job_free(exc_job *j) {
    for (int i = 0; i < j->n_owned; i++) exc_release(j->owned[i]);
    json_decref(j->source);
    exc_release(j->base);
    exc_release(j->model);
    exc_release(j->out);
    exc_release(j->target);
    exc_release(j->baseline);
}

exc_status exc_run(exc_ctx *ctx, const char *job_json, int force, char **json) {
    if (!ctx || !job_json) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (json) *json = NULL;
    exc_job job;
    exc_ledger *ledger = NULL;
    json_t *summary = NULL;
    exc_status st = exc_job_read(ctx, job_json, &job);
    if (st == EXC_OK) st = exc_ledger_open(ctx, job.out, force != 0, &ledger);
    if (st == EXC_OK) st = exc_job_steps(ctx, &job, ledger, &summary);
    if (st == EXC_OK && json && !(*json = exc_json_text(ctx, summary))) st = EXC_ERR_MEMORY;
    json_decref(summary);
    exc_ledger_close(ledger);
    exc_job_free(&job);
    return st;
}
