/* steps.c - a job's steps in order: capture, directions, contrast, plan, apply, verify, evaluate, report.
 *
 * Each step names its inputs as hashes (files, outputs of earlier steps, its options); the ledger tells
 * whether that is done already. Steps hand files to each other, not memory: a continued run and an
 * undisturbed one read the same bytes, so they end in the same bytes. Models are opened only by steps that
 * run: a finished job answers in milliseconds. */
#include <stdlib.h>
#include <string.h>

#include "job.h"

typedef struct work {
    exc_ctx *ctx;
    const exc_job *job;
    exc_ledger *ledger;
    json_t *list;     /* of the summary: [{"step","state","seconds"}] */
    exc_stats *stats; /* read when first needed */
    exc_dirs *dirs;
    exc_model *model; /* as captured from; also "before" */
    char hash_model[33];
    int step;
} work;

typedef struct step_def {
    const char *name;
    exc_status (*inputs)(work *w, json_t *in);
    exc_status (*perform)(work *w, json_t **result);
    const char *outputs[4];
} step_def;

/* -------------------------------------------------------------------------------------------------------
 * small tools */

static exc_status in_out(work *w, const char *name, char **path) {
    return exc_path_join(w->ctx, w->job->out, name, path);
}

static exc_status put_hash(work *w, json_t *in, const char *key, const char *path) {
    char hash[33];
    EXC_TRY(exc_tree_hash(w->ctx, path, hash));
    json_object_set_new(in, key, json_string(hash));
    return EXC_OK;
}

static exc_status put_output(work *w, json_t *in, const char *name) {
    char *path = NULL;
    EXC_TRY(in_out(w, name, &path));
    exc_status st = put_hash(w, in, name, path);
    exc_release(path);
    return st;
}

static exc_status put_model(work *w, json_t *in) {
    if (!w->hash_model[0]) EXC_TRY(exc_model_hash(w->ctx, w->job->model, w->hash_model));
    json_object_set_new(in, "model", json_string(w->hash_model));
    json_object_set_new(in, "compute", json_string(w->job->compute == EXC_COMPUTE_F32 ? "f32" : "bf16"));
    return EXC_OK;
}

/* an option section as typed: what the user did not write has its default in every version with the same
 * number */
static void put_section(work *w, json_t *in, const char *key) {
    json_t *o = json_object_get(w->job->source, key);
    if (o) json_object_set(in, key, o);
}

static exc_status parse(work *w, const char *what, char *text, json_t **out) {
    exc_status st = text ? exc_json_parse(w->ctx, what, text, strlen(text), out) : EXC_OK;
    exc_free(text);
    if (st == EXC_OK && !*out) *out = json_object();
    return st;
}

static exc_status open_model(work *w) {
    if (w->model) return EXC_OK;
    exc_model_options mo = EXC_MODEL_OPTIONS;
    mo.compute = w->job->compute;
    return exc_model_open(w->ctx, w->job->model, &mo, &w->model);
}

static exc_status need_stats(work *w) {
    char *path = NULL;
    if (w->stats) return EXC_OK;
    EXC_TRY(in_out(w, "stats.safetensors", &path));
    exc_status st = exc_stats_load(w->ctx, path, &w->stats);
    exc_release(path);
    return st;
}

static exc_status need_dirs(work *w) {
    char *path = NULL;
    if (w->dirs) return EXC_OK;
    EXC_TRY(in_out(w, "directions.safetensors", &path));
    exc_status st = exc_dirs_load(w->ctx, path, &w->dirs);
    exc_release(path);
    return st;
}

/* ------------------------------------------------------------------------------------------------------------
 * steps */

static exc_status capture_inputs(work *w, json_t *in) {
    static const char *const keys[] = {"system", "chat", "raw", "limit", "capture"};
    EXC_TRY(put_model(w, in));
    EXC_TRY(put_hash(w, in, "target", w->job->target));
    for (size_t i = 0; i < EXC_COUNT(keys); i++) put_section(w, in, keys[i]);
    return put_hash(w, in, "baseline", w->job->baseline);
}

static exc_status capture_perform(work *w, json_t **result) {
    exc_prompts *t = NULL, *b = NULL;
    exc_stats *stats = NULL;
    char *text = NULL, *path = NULL;
    exc_status st;
    EXC_GOTO(done, exc_prompts_load(w->ctx, w->job->model, w->job->target, &w->job->prompts, &t));
    EXC_GOTO(done, exc_prompts_load(w->ctx, w->job->model, w->job->baseline, &w->job->prompts, &b));
    EXC_GOTO(done, open_model(w));
    EXC_GOTO(done, exc_capture(w->ctx, w->model, t, b, &w->job->capture, &stats, &text));
    EXC_GOTO(done, in_out(w, "stats.safetensors", &path));
    EXC_GOTO(done, exc_stats_save(w->ctx, stats, path, 1));
    st = parse(w, "capture", text, result);
    text = NULL;
done:
    exc_free(text);
    exc_release(path);
    exc_stats_free(stats);
    exc_prompts_free(t);
    exc_prompts_free(b);
    return st;
}

static exc_status directions_inputs(work *w, json_t *in) {
    put_section(w, in, "directions");
    return put_output(w, in, "stats.safetensors");
}

static exc_status directions_perform(work *w, json_t **result) {
    exc_dirs *dirs = NULL;
    char *text = NULL, *path = NULL;
    exc_status st;
    EXC_GOTO(done, need_stats(w));
    EXC_GOTO(done, exc_directions(w->ctx, w->stats, &w->job->directions, &dirs, &text));
    EXC_GOTO(done, in_out(w, "directions.safetensors", &path));
    EXC_GOTO(done, exc_dirs_save(w->ctx, dirs, path, 1));
    st = parse(w, "directions", text, result);
    text = NULL;
done:
    exc_free(text);
    exc_release(path);
    exc_dirs_free(dirs);
    return st;
}

static exc_status contrast_inputs(work *w, json_t *in) {
    put_section(w, in, "contrast");
    EXC_TRY(put_output(w, in, "stats.safetensors"));
    return put_output(w, in, "directions.safetensors");
}

static exc_status contrast_perform(work *w, json_t **result) {
    char *text = NULL, *path = NULL;
    EXC_TRY(need_stats(w));
    EXC_TRY(need_dirs(w));
    EXC_TRY(in_out(w, "experts.csv", &path));
    exc_status st = exc_contrast(w->ctx, w->stats, w->dirs, &w->job->contrast, path, 1, &text);
    exc_release(path);
    if (st == EXC_OK) return parse(w, "contrast", text, result);
    exc_free(text);
    return st;
}

static exc_status plan_inputs(work *w, json_t *in) {
    put_section(w, in, "plan");
    EXC_TRY(put_model(w, in));
    EXC_TRY(put_output(w, in, "stats.safetensors"));
    return put_output(w, in, "directions.safetensors");
}

static exc_status plan_perform(work *w, json_t **result) {
    exc_plan *plan = NULL;
    char *text = NULL, *path = NULL;
    exc_status st;
    EXC_GOTO(done, need_stats(w));
    EXC_GOTO(done, need_dirs(w));
    EXC_GOTO(done, exc_plan_make(w->ctx, w->job->model, w->stats, w->dirs, &w->job->plan, &plan, &text));
    EXC_GOTO(done, in_out(w, "plan.json", &path));
    EXC_GOTO(done, exc_plan_save(w->ctx, plan, path, 1));
    st = parse(w, "plan", text, result);
    text = NULL;
done:
    exc_free(text);
    exc_release(path);
    exc_plan_free(plan);
    return st;
}

static exc_status apply_inputs(work *w, json_t *in) {
    put_section(w, in, "apply");
    EXC_TRY(put_model(w, in));
    EXC_TRY(put_output(w, in, "directions.safetensors"));
    return put_output(w, in, "plan.json");
}

static exc_status with_plan(work *w, json_t **result, bool verify) {
    exc_plan *plan = NULL;
    char *text = NULL, *path = NULL, *out = NULL;
    exc_apply_options ao = w->job->apply;
    ao.force = 1; /* the ledger has checked that what lies there is this run's own */
    exc_status st;
    EXC_GOTO(done, in_out(w, "plan.json", &path));
    EXC_GOTO(done, in_out(w, "checkpoint", &out));
    EXC_GOTO(done, exc_plan_load(w->ctx, path, &plan));
    if (verify)
        EXC_GOTO(done, exc_verify(w->ctx, w->job->model, out, plan, &text));
    else
        EXC_GOTO(done, exc_apply(w->ctx, w->job->model, plan, out, &ao, &text));
    st = parse(w, verify ? "verify" : "apply", text, result);
    text = NULL;
done:
    exc_free(text);
    exc_release(path);
    exc_release(out);
    exc_plan_free(plan);
    return st;
}

static exc_status apply_perform(work *w, json_t **result) { return with_plan(w, result, false); }

static exc_status verify_inputs(work *w, json_t *in) {
    EXC_TRY(put_model(w, in));
    EXC_TRY(put_output(w, in, "plan.json"));
    return put_output(w, in, "checkpoint");
}

static exc_status verify_perform(work *w, json_t **result) { return with_plan(w, result, true); }

static exc_status evaluate_inputs(work *w, json_t *in) {
    const exc_evaluate_options *e = &w->job->evaluate;
    static const char *const names[] = {"target", "baseline", "neutral", "markers", "answers"};
    const char *const files[] = {e->target, e->baseline, e->neutral, e->markers, e->answers};
    for (int i = 0; i < 5; i++)
        if (files[i]) EXC_TRY(put_hash(w, in, names[i], files[i]));
    put_section(w, in, "evaluate");
    if (e->system) json_object_set_new(in, "system", json_string(e->system));
    EXC_TRY(put_model(w, in));
    return put_output(w, in, "checkpoint");
}

static exc_status evaluate_perform(work *w, json_t **result) {
    exc_model *after = NULL;
    exc_model_options mo = EXC_MODEL_OPTIONS;
    char *dir = NULL, *path = NULL;
    exc_buf csv = {0};
    exc_status st;
    mo.compute = w->job->compute;
    EXC_GOTO(done, in_out(w, "checkpoint", &dir));
    EXC_GOTO(done, open_model(w));
    EXC_GOTO(done, exc_model_open(w->ctx, dir, &mo, &after));
    EXC_GOTO(done, exc_judge(w->ctx, after, w->model, &w->job->evaluate, &csv, result));
    EXC_GOTO(done, in_out(w, "evaluation.csv", &path));
    st = exc_write_file(w->ctx, path, csv.data ? csv.data : "", csv.len, true);
done:
    exc_buf_free(&csv);
    exc_release(path);
    exc_release(dir);
    exc_model_free(after);
    return st;
}

/* ------------------------------------------------------------------------------------------------------ the
 * report */

/* Paths of this machine that results may carry, cut back to what the job file says. */
static void shorten(const exc_job *j, json_t *v) {
    const char *key;
    json_t *e;
    size_t i, n = strlen(j->base);
    void *next;
    if (!n) return;
    if (json_is_string(v)) {
        const char *s = json_string_value(v);
        if (strncmp(s, j->base, n) || s[n] != '/') return;
        char *copy = strdup(s + n + 1);
        if (copy) json_string_set(v, copy);
        free(copy);
    } else if (json_is_object(v)) {
        json_object_foreach_safe(v, next, key, e) shorten(j, e);
    } else if (json_is_array(v)) {
        json_array_foreach(v, i, e) shorten(j, e);
    }
}

/* what the model is, from its headers, under the last part of its folder's name */
static exc_status describe(work *w, json_t **out) {
    char *text = NULL, *real = realpath(w->job->model, NULL);
    exc_status st = exc_inspect(w->ctx, w->job->model, &text);
    if (st == EXC_OK) st = parse(w, "model", text, out);
    if (st == EXC_OK && real && strrchr(real, '/')[1])
        json_object_set_new(*out, "name", json_string(strrchr(real, '/') + 1));
    free(real);
    return st;
}

/* report.json without what differs between two runs of the same work: which steps were skipped is the
 * terminal's business */
static exc_status assemble(work *w, json_t **out) {
    char *text = NULL;
    json_t *engine = NULL, *model = NULL, *r = json_object(), *steps = json_array(), *s;
    size_t i;
    exc_status st = exc_ctx_describe(w->ctx, &text);
    if (st == EXC_OK) st = parse(w, "engine", text, &engine);
    if (st == EXC_OK) st = describe(w, &model);
    json_object_set_new(r, "excise_report", json_integer(1));
    json_object_set_new(r, "version", json_string(EXC_VERSION));
    if (engine) json_object_set_new(r, "engine", engine);
    json_object_set_new(r, "job", json_deep_copy(w->job->source));
    if (model) json_object_set_new(r, "model", model);
    json_array_foreach(exc_ledger_steps(w->ledger), i, s) {
        const char *name = json_string_value(json_object_get(s, "step"));
        if (!name || !strcmp(name, "report")) continue;
        json_t *brief = json_object();
        json_object_set(brief, "step", json_object_get(s, "step"));
        json_object_set(brief, "seconds", json_object_get(s, "seconds"));
        json_object_set(brief, "inputs", json_object_get(s, "inputs"));
        json_object_set(brief, "outputs", json_object_get(s, "outputs"));
        json_array_append_new(steps, brief);
        if (strcmp(name, "evaluate") || w->job->evaluates)
            json_object_set_new(r, strcmp(name, "evaluate") ? name : "evaluation",
                                json_deep_copy(json_object_get(s, "result")));
    }
    json_object_set_new(r, "steps", steps);
    shorten(w->job, r);
    if (st != EXC_OK)
        json_decref(r);
    else
        *out = r;
    return st;
}

static exc_status report_inputs(work *w, json_t *in) {
    static const char *const files[] = {"experts.csv", "directions.safetensors"};
    json_t *r = NULL;
    EXC_TRY(assemble(w, &r));
    char *text = json_dumps(r, JSON_SORT_KEYS | JSON_COMPACT | JSON_REAL_PRECISION(17)), hash[33];
    json_decref(r);
    if (!text) return exc_fail(w->ctx, EXC_ERR_MEMORY, "report.json: no memory");
    exc_hash_hex(text, strlen(text), hash);
    free(text);
    json_object_set_new(in, "results", json_string(hash));
    for (size_t i = 0; i < EXC_COUNT(files); i++) EXC_TRY(put_output(w, in, files[i]));
    return EXC_OK;
}

static exc_status report_perform(work *w, json_t **result) {
    json_t *r = NULL;
    char *path = NULL, *html = NULL, *text = NULL;
    exc_status st;
    EXC_GOTO(done, assemble(w, &r));
    EXC_GOTO(done, in_out(w, "report.json", &path));
    EXC_GOTO(done, in_out(w, "report.html", &html));
    text = json_dumps(r, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    if (!text)
        st = exc_fail(w->ctx, EXC_ERR_MEMORY, "report.json: no memory");
    else
        st = exc_write_file(w->ctx, path, text, strlen(text), true);
    if (st == EXC_OK) st = exc_report(w->ctx, w->job->out, html, 1, NULL);
    if (st == EXC_OK) *result = json_object();
done:
    json_decref(r);
    free(text);
    exc_release(path);
    exc_release(html);
    return st;
}

/* ----------------------------------------------------------------------------------------------------------
 * in order */

static const step_def step_list[] = {
    {"capture", capture_inputs, capture_perform, {"stats.safetensors"}},
    {"directions", directions_inputs, directions_perform, {"directions.safetensors"}},
    {"contrast", contrast_inputs, contrast_perform, {"experts.csv"}},
    {"plan", plan_inputs, plan_perform, {"plan.json"}},
    {"apply", apply_inputs, apply_perform, {"checkpoint"}},
    {"verify", verify_inputs, verify_perform, {NULL}},
    {"evaluate", evaluate_inputs, evaluate_perform, {"evaluation.csv"}},
    {"report", report_inputs, report_perform, {"report.json", "report.html"}},
};

/* what would be wrong usage of the verb is a wrong value in the job file here */
static exc_status perform(work *w, const step_def *def, json_t **made) {
    char text[sizeof w->ctx->error];
    exc_status st = def->perform(w, made);
    if (st != EXC_ERR_USAGE) return st;
    memcpy(text, w->ctx->error, sizeof text);
    exc_clear(w->ctx);
    return exc_fail(w->ctx, EXC_ERR_INPUT, "%s: %s", w->job->path, text);
}

static exc_status take(work *w, const step_def *def) {
    json_t *in = json_object(), *made = NULL;
    const json_t *known = NULL;
    double started = exc_seconds();
    exc_status st = exc_progress(w->ctx, def->name, (uint64_t)w->step, EXC_COUNT(step_list), "steps");
    if (st == EXC_OK) st = def->inputs(w, in);
    if (st == EXC_OK) st = exc_ledger_begin(w->ledger, def->name, in, def->outputs, &known);
    bool skipped = st == EXC_OK && known;
    if (st == EXC_OK && !known) {
        st = perform(w, def, &made);
        if (st == EXC_OK) st = exc_ledger_done(w->ledger, def->name, made, exc_seconds() - started);
    }
    if (st == EXC_OK)
        json_array_append_new(w->list,
                              json_pack("{s:s,s:s,s:f}", "step", def->name, "state",
                                        skipped ? "as before" : "done", "seconds", exc_seconds() - started));
    json_decref(in);
    json_decref(made);
    return st;
}

static const json_t *result_of(const work *w, const char *step) {
    size_t i;
    json_t *s;
    json_array_foreach(exc_ledger_steps(w->ledger), i, s) {
        const char *name = json_string_value(json_object_get(s, "step"));
        if (name && !strcmp(name, step)) return json_object_get(s, "result");
    }
    return NULL;
}

/* results without their long lists: the terminal's version; report.json has all */
static void put_brief(const work *w, json_t *to, const char *step) {
    const json_t *r = result_of(w, step);
    const char *key;
    json_t *v, *brief = json_object();
    json_object_foreach((json_t *)r, key, v) if (!json_is_array(v) || json_array_size(v) <= 16)
        json_object_set(brief, key, v);
    if (r) json_object_set_new(to, step, json_deep_copy(brief));
    json_decref(brief);
}

/* "a/b/../../c" -> "c", for the eye only */
static json_t *tidy(const char *path) {
    char *p = strdup(path), *up;
    while (p && (up = strstr(p, "/../")) && up != p && strncmp(p, "../", 3)) {
        char *from = up;
        while (from > p && from[-1] != '/') from--;
        memmove(from, up + 4, strlen(up + 4) + 1);
    }
    json_t *v = json_string(p ? p : path);
    free(p);
    return v;
}

exc_status exc_job_steps(exc_ctx *ctx, const exc_job *job, exc_ledger *ledger, json_t **summary) {
    work w = {.ctx = ctx, .job = job, .ledger = ledger, .list = json_array()};
    exc_status st = EXC_OK;
    double started = exc_seconds();
    for (; w.step < (int)EXC_COUNT(step_list) && st == EXC_OK; w.step++)
        if (strcmp(step_list[w.step].name, "evaluate") || job->evaluates) st = take(&w, &step_list[w.step]);
    if (st == EXC_OK) {
        json_t *r = *summary = json_object();
        json_object_set(r, "model", json_object_get(job->source, "model"));
        json_object_set_new(r, "out", tidy(job->out));
        json_object_set_new(r, "seconds", json_real(exc_seconds() - started));
        json_object_set(r, "steps", w.list);
        static const char *const brief[] = {"capture", "directions", "plan", "apply", "verify"};
        for (size_t i = 0; i < EXC_COUNT(brief); i++) put_brief(&w, r, brief[i]);
        if (job->evaluates) json_object_set_new(r, "evaluation", json_deep_copy(result_of(&w, "evaluate")));
    }
    json_decref(w.list);
    exc_stats_free(w.stats);
    exc_dirs_free(w.dirs);
    exc_model_free(w.model);
    return st;
}
