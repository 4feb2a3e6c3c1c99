/* studying.c - verbs from prompts to directions: capture, merge, contrast, directions; and the model options
 * they share. */
#include <stdio.h>
#include <string.h>

#include "cli.h"
#include "opening.h"

int cli_compute(cli *c, const char *text, exc_compute *out) {
    *out = EXC_COMPUTE_BF16;
    if (!text || !strcmp(text, "bf16")) return 1;
    *out = EXC_COMPUTE_F32;
    if (!strcmp(text, "f32")) return 1;
    cli_usage(c, "--compute: expected bf16 or f32, found %s", text);
    return 0;
}

int cli_check_prompts(cli *c, const exc_prompt_options *po) {
    if (po->raw && po->system) return cli_usage(c, "--raw uses no chat template: expected no --system beside it");
    if (po->raw && po->chat) return cli_usage(c, "--raw uses no chat template: expected no --template beside it");
    return 0;
}

int cli_check_lens(cli *c, const cli_model *m) {
    exc_compute any;
    if (m->is_virtual && !m->plan_path) return cli_usage(c, "--virtual: expected --plan FILE beside it");
    return cli_compute(c, m->compute, &any) ? 0 : c->code;
}

exc_status cli_model_open(cli *c, cli_model *m, const char *dir) {
    exc_model_options mo = EXC_MODEL_OPTIONS;
    if (!cli_compute(c, m->compute, &mo.compute)) return EXC_ERR_USAGE;
    if (m->plan_path) {
        exc_status st = exc_plan_load(c->ctx, m->plan_path, &m->plan);
        if (st != EXC_OK) return st;
        mo.plan = m->plan;
        mo.lens = m->is_virtual ? EXC_LENS_VIRTUAL : EXC_LENS_BAKED;
    }
    return exc_model_open(c->ctx, dir, &mo, &m->model);
}

void cli_model_close(cli_model *m) {
    exc_model_free(m->model);
    exc_plan_free(m->plan);
}

int verb_capture(cli *c) {
    cli_model m = CLI_MODEL;
    exc_prompt_options po = EXC_PROMPT_OPTIONS;
    exc_capture_options co = EXC_CAPTURE_OPTIONS;
    const char *target = NULL, *baseline = NULL, *out = NULL;
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"--target", CLI_TEXT, &target, "FILE", "prompts that show the behaviour"},
        {"--baseline", CLI_TEXT, &baseline, "FILE", "prompts that do not"},
        {"-o", CLI_TEXT, &out, "FILE", "stats to write (safetensors)"},
        CLI_HEAD("capture"),
        {"--decode", CLI_INT, &co.decode, "N", "feed N greedy tokens back and observe them too. Default: 0"},
        {"--no-out", CLI_FLAG, &co.no_out, NULL,
         "leave output sums out; they follow from the intermediate sums"},
        {"--batch-tokens", CLI_COUNT, &co.batch_tokens, "N", "tokens a step. Default: chosen"},
        CLI_PROMPTS(po),
        CLI_LENS(m),
        CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!target || !baseline || !out)
        return cli_usage(c, "expected --target FILE, --baseline FILE and -o FILE");
    if (cli_check_prompts(c, &po) || cli_check_lens(c, &m)) return c->code;
    if (cli_output(c, out)) return c->code;
    exc_prompts *t = NULL, *b = NULL;
    exc_stats *stats = NULL;
    char *json = NULL;
    exc_status st = exc_prompts_load(c->ctx, c->rest[0], target, &po, &t);
    if (st == EXC_OK) st = exc_prompts_load(c->ctx, c->rest[0], baseline, &po, &b);
    if (st == EXC_OK) st = cli_model_open(c, &m, c->rest[0]);
    if (st == EXC_OK) st = exc_capture(c->ctx, m.model, t, b, &co, &stats, &json);
    if (st == EXC_OK) st = exc_stats_save(c->ctx, stats, out, c->force);
    int code = c->code ? c->code : cli_result(c, st, json, cli_show);
    exc_stats_free(stats);
    exc_prompts_free(t);
    exc_prompts_free(b);
    cli_model_close(&m);
    return code;
}

int verb_merge(cli *c) {
    const char *out = NULL;
    const cli_option options[] = {CLI_HEAD("input and output"),
                                  {"-o", CLI_TEXT, &out, "FILE", "stats to write: the sum of all inputs"},
                                  CLI_END};
    if (cli_begin(c, options, 1, 1 << 20)) return c->code;
    if (!out) return cli_usage(c, "expected -o FILE");
    if (cli_output(c, out)) return c->code;
    exc_stats *sum = NULL;
    exc_status st = exc_stats_load(c->ctx, c->rest[0], &sum);
    for (int i = 1; i < c->n_rest && st == EXC_OK; i++) {
        exc_stats *more = NULL;
        st = exc_stats_load(c->ctx, c->rest[i], &more);
        if (st == EXC_OK) st = exc_stats_add(c->ctx, sum, more);
        exc_stats_free(more);
    }
    char *json = NULL;
    if (st == EXC_OK) st = exc_stats_save(c->ctx, sum, out, c->force);
    if (st == EXC_OK) st = exc_stats_describe(c->ctx, sum, &json);
    exc_stats_free(sum);
    return cli_result(c, st, json, cli_show);
}

int verb_contrast(cli *c) {
    exc_contrast_options co = EXC_CONTRAST_OPTIONS;
    co.alpha = 0.5;
    const char *dirs_path = NULL, *out = NULL;
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"-o", CLI_TEXT, &out, "FILE", "experts table, .csv or .jsonl by its name"},
        {"--directions", CLI_TEXT, &dirs_path, "FILE",
         "adds the projection of each expert's output difference"},
        CLI_HEAD("statistics"),
        {"--alpha", CLI_REAL, &co.alpha, "X", "smoothing of the log-ratio. Default: 0.5"},
        {"--resamples", CLI_COUNT, &co.resamples, "N", "bootstrap draws of whole prompts. Default: 1000"},
        {"--seed", CLI_U64, &co.seed, "N", "of the draws. Default: 0"},
        CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!out) return cli_usage(c, "expected -o FILE");
    if (!(co.alpha > 0)) return cli_usage(c, "--alpha: expected a number above 0, found %g", co.alpha);
    if (co.resamples == 1) return cli_usage(c, "--resamples: expected at least 2, found 1");
    if (cli_output(c, out)) return c->code;
    exc_stats *stats = NULL;
    exc_dirs *dirs = NULL;
    char *json = NULL;
    exc_status st = exc_stats_load(c->ctx, c->rest[0], &stats);
    if (st == EXC_OK && dirs_path) st = exc_dirs_load(c->ctx, dirs_path, &dirs);
    if (st == EXC_OK) st = exc_contrast(c->ctx, stats, dirs, &co, out, c->force, &json);
    int code = cli_result(c, st, json, cli_show);
    exc_stats_free(stats);
    exc_dirs_free(dirs);
    return code;
}

int verb_directions(cli *c) {
    exc_directions_options opt = EXC_DIRECTIONS_OPTIONS;
    const char *method = "mean", *out = NULL;
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"-o", CLI_TEXT, &out, "FILE", "directions to write (safetensors)"},
        CLI_HEAD("method"),
        {"--method", CLI_TEXT, &method, "NAME",
         "mean, projected, svd (uncentred) or whitened. Default: mean"},
        {"--rank", CLI_COUNT, &opt.rank, "K", "vectors a layer. Default: 1"},
        {"--per-expert", CLI_FLAG, &opt.per_expert, NULL, "also a basis for every expert, from output sums"},
        CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!out) return cli_usage(c, "expected -o FILE");
    static const char *const names[] = {"mean", "projected", "svd", "whitened"};
    int found = -1;
    for (int i = 0; i < 4; i++)
        if (!strcmp(method, names[i])) found = i;
    if (found < 0)
        return cli_usage(c, "--method: expected mean, projected, svd or whitened, found %s", method);
    opt.method = (exc_method)found;
    if (cli_output(c, out)) return c->code;
    exc_stats *stats = NULL;
    exc_dirs *dirs = NULL;
    char *json = NULL;
    exc_status st = exc_stats_load(c->ctx, c->rest[0], &stats);
    if (st == EXC_OK) st = exc_directions(c->ctx, stats, &opt, &dirs, &json);
    if (st == EXC_OK) st = exc_dirs_save(c->ctx, dirs, out, c->force);
    int code = cli_result(c, st, json, cli_show);
    exc_stats_free(stats);
    exc_dirs_free(dirs);
    return code;
}
