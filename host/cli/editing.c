/* editing.c - verbs that change weights and prove it: plan, apply, verify. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

int verb_plan(cli *c) {
    exc_plan_options po = EXC_PLAN_OPTIONS;
    const char *out = NULL;
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"-o", CLI_TEXT, &out, "FILE",
         "plan to write (JSON); it names the directions file relative to itself"},
        CLI_HEAD("what to edit"),
        {"--roles", CLI_TEXT, &po.roles, "LIST",
         "of expert_down, shared_down, dense_down, attn_out. Default: all the model has"},
        {"--layers", CLI_TEXT, &po.layers, "LIST", "numbers and ranges, as 0,4-40. Default: all"},
        {"--select", CLI_TEXT, &po.select, "RULE",
         "experts: all, top:N (output score), logratio:N, q:X. Default: all"},
        CLI_HEAD("how"),
        {"--strength", CLI_TEXT, &po.strength, "X[,X..]", "one number, or one a layer. Default: 1"},
        {"--basis", CLI_TEXT, &po.basis, "ROW",
         "one row of the directions for all layers (a fraction interpolates). Default: layer l uses row l+1"},
        {"--norm", CLI_TEXT, &po.norm, "RULE",
         "lengths to restore: none, column, row (row puts part of the direction back). Default: none"},
        {"--round", CLI_TEXT, &po.round, "RULE",
         "how results become storable: rn (nearest), sr (by chance), exact (leaves least; for fp8 and fp4). Default: rn"},
        CLI_END};
    if (cli_begin(c, options, 3, 3)) return c->code;
    if (!out) return cli_usage(c, "expected -o FILE");
    if (cli_output(c, out)) return c->code;
    char *relative = cli_relative(c->rest[2], out);
    po.directions = relative;
    exc_stats *stats = NULL;
    exc_dirs *dirs = NULL;
    exc_plan *plan = NULL;
    char *json = NULL;
    exc_status st = exc_stats_load(c->ctx, c->rest[1], &stats);
    if (st == EXC_OK) st = exc_dirs_load(c->ctx, c->rest[2], &dirs);
    if (st == EXC_OK) st = exc_plan_make(c->ctx, c->rest[0], stats, dirs, &po, &plan, &json);
    if (st == EXC_OK) st = exc_plan_save(c->ctx, plan, out, c->force);
    int code = cli_result(c, st, json, cli_show);
    exc_plan_free(plan);
    exc_dirs_free(dirs);
    exc_stats_free(stats);
    free(relative);
    return code;
}

/* Per role and layer; the tensor list is for --json, where there may be thousands. */
static void apply_text(const json_t *facts) {
    json_t *brief = json_copy((json_t *)facts);
    json_object_del(brief, "tensors");
    cli_show(brief);
    json_decref(brief);
}

int verb_apply(cli *c) {
    exc_apply_options ao = EXC_APPLY_OPTIONS;
    const char *out = NULL;
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"-o", CLI_TEXT, &out, "DIR", "checkpoint to write"},
        {"--dry-run", CLI_FLAG, &ao.dry_run, NULL, "compute and report everything, write nothing"},
        {"--round", CLI_TEXT, &ao.round, "RULE",
         "rn: to nearest even; sr: up or down by chance; exact: near values that together leave nothing of the direction, for fp8 "
         "and fp4. Default: the plan's \"rounding\", else rn"},
        {"--to", CLI_TEXT, &ao.to, "DTYPE", "bf16: write fp8 or mxfp4 weights as bf16, headers and config.json to match. Default: as stored"},
        {"--sidecar", CLI_FLAG, &ao.sidecar, NULL,
         "router biases the family cannot store go to excise/sidecar.safetensors"},
        {"--allow-nonfinite", CLI_FLAG, &ao.allow_nonfinite, NULL, "edit tensors that hold NaN or infinity"},
        CLI_END};
    if (cli_begin(c, options, 2, 2)) return c->code;
    if (!out && !ao.dry_run) return cli_usage(c, "expected -o DIR or --dry-run");
    if (ao.round && strcmp(ao.round, "rn") && strcmp(ao.round, "sr") && strcmp(ao.round, "exact"))
        return cli_usage(c, "--round: expected rn, sr or exact, found %s", ao.round);
    ao.force = c->force;
    exc_plan *plan = NULL;
    char *json = NULL;
    exc_status st = exc_plan_load(c->ctx, c->rest[1], &plan);
    if (st == EXC_OK) st = exc_apply(c->ctx, c->rest[0], plan, out, &ao, &json);
    int code = cli_result(c, st, json, apply_text);
    exc_plan_free(plan);
    return code;
}

int verb_verify(cli *c) {
    const char *path = NULL;
    const cli_option options[] = {CLI_HEAD("input"),
                                  {"--plan", CLI_TEXT, &path, "FILE",
                                   "plan the checkpoint should follow. Default: OUT_DIR/excise/plan.json"},
                                  CLI_END};
    if (cli_begin(c, options, 2, 2)) return c->code;
    exc_plan *plan = NULL;
    char *json = NULL;
    exc_status st = path ? exc_plan_load(c->ctx, path, &plan) : EXC_OK;
    if (st == EXC_OK) st = exc_verify(c->ctx, c->rest[0], c->rest[1], plan, &json);
    int code = cli_result(c, st, json, apply_text);
    exc_plan_free(plan);
    return code;
}
