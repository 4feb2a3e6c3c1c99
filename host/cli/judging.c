/* judging.c - verbs that judge and sum up: evaluate, run, report, bench, version. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"
#include "opening.h"

int verb_evaluate(cli *c) {
    cli_model m = CLI_MODEL, ref = CLI_MODEL;
    exc_evaluate_options eo = EXC_EVALUATE_OPTIONS;
    const char *against = NULL;
    const cli_option options[] = {
        CLI_HEAD("what is compared"),
        {"--against", CLI_TEXT, &against, "DIR",
         "the model before the edit. Default: MODEL itself when --plan is given"},
        CLI_HEAD("texts"),
        {"--target", CLI_TEXT, &eo.target, "FILE", "prompts that show the behaviour"},
        {"--baseline", CLI_TEXT, &eo.baseline, "FILE", "prompts that do not"},
        {"--neutral", CLI_TEXT, &eo.neutral, "FILE", "plain text, raw, for KL and perplexity"},
        {"--markers", CLI_TEXT, &eo.markers, "FILE",
         "one phrase a line; a reply is marked when it contains one"},
        {"--answers", CLI_TEXT, &eo.answers, "FILE", "JSON lines {\"request\",\"answer\"}"},
        {"--system", CLI_TEXT, &eo.system, "TEXT", "system message in front of every prompt"},
        {"--max-new", CLI_COUNT, &eo.max_new, "N", "tokens of a reply at most. Default: 48"},
        {"--examples", CLI_COUNT, &eo.examples, "N", "example replies to show. Default: 4"},
        {"--seed", CLI_U64, &eo.seed, "N", "of the resampled intervals. Default: 0"},
        CLI_LENS(m),
        CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!eo.target && !eo.baseline && !eo.neutral)
        return cli_usage(c, "expected at least one of --target, --baseline, --neutral");
    if ((eo.markers || eo.answers) && !eo.target && !eo.baseline)
        return cli_usage(c, "%s judges replies: expected --target or --baseline beside it",
                         eo.markers ? "--markers" : "--answers");
    if (cli_check_lens(c, &m)) return c->code;
    if (!against && m.plan_path) against = c->rest[0];
    ref.compute = m.compute;
    char *json = NULL;
    exc_status st = cli_model_open(c, &m, c->rest[0]);
    if (st == EXC_OK && against) st = cli_model_open(c, &ref, against);
    if (st == EXC_OK) st = exc_evaluate(c->ctx, m.model, ref.model, &eo, &json);
    int code = c->code ? c->code : cli_result(c, st, json, cli_show_evaluation);
    cli_model_close(&m);
    cli_model_close(&ref);
    return code;
}

int verb_run(cli *c) {
    const cli_option options[] = {CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    char *json = NULL;
    exc_status st = exc_run(c->ctx, c->rest[0], c->force, &json);
    return cli_result(c, st, json, cli_show_run);
}

int verb_report(cli *c) {
    const char *out = NULL;
    const cli_option options[] = {
        CLI_HEAD("input and output"), {"-o", CLI_TEXT, &out, "FILE", "page to write (HTML)"}, CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!out) return cli_usage(c, "expected -o FILE");
    if (cli_output(c, out)) return c->code;
    char *json = NULL;
    exc_status st = exc_report(c->ctx, c->rest[0], out, c->force, &json);
    return cli_result(c, st, json, cli_show);
}

/* The harness is a program of its own beside this one: it reaches into the kernels, which this one must not.
 */
int verb_bench(cli *c) {
    const cli_option options[] = {CLI_END};
    if (c->argc && (!strcmp(c->argv[0], "-h") || !strcmp(c->argv[0], "--help"))) {
        cli_help(c->verb, options);
        return 0;
    }
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 16);
    if (n < 0) return cli_usage(c, "cannot find my own folder: %s", strerror(errno));
    self[n] = 0;
    strcpy(strrchr(self, '/') + 1, "excise_bench");
    c->argv[-1] = self; /* the verb's place in argv: the harness sees its rows as arguments */
    execv(self, c->argv - 1);
    fprintf(stderr, "excise bench: %s: %s\n", self, strerror(errno));
    return 1;
}

int verb_version(cli *c) {
    const cli_option options[] = {CLI_END};
    if (cli_begin(c, options, 0, 0)) return c->code;
    char *json = NULL;
    exc_status st = exc_ctx_describe(c->ctx, &json);
    return cli_result(c, st, json, cli_show);
}
