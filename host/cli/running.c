/* running.c - verbs that run a model: inspect, forward, generate, tokenize. */
#include <stdio.h>
#include <string.h>

#include "cli.h"
#include "opening.h"

int verb_inspect(cli *c) {
    const cli_option options[] = {CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    char *json = NULL;
    exc_status st = exc_inspect(c->ctx, c->rest[0], &json);
    return cli_result(c, st, json, cli_show);
}

/* "logits,hidden,routing" in any order */
static int parse_emit(cli *c, const char *list, exc_forward_options *opt) {
    opt->emit_logits = opt->emit_hidden = opt->emit_routing = 0;
    if (!*list && !opt->generate)
        return cli_usage(c, "--emit: expected a list of logits, hidden, routing, found nothing");
    for (const char *p = list; *p;) {
        size_t n = strcspn(p, ",");
        if (n == 6 && !strncmp(p, "logits", n))
            opt->emit_logits = 1;
        else if (n == 6 && !strncmp(p, "hidden", n))
            opt->emit_hidden = 1;
        else if (n == 7 && !strncmp(p, "routing", n))
            opt->emit_routing = 1;
        else
            return cli_usage(c, "--emit: expected a list of logits, hidden, routing, found %.*s", (int)n, p);
        p += n + (p[n] == ',');
    }
    return 0;
}

int verb_forward(cli *c) {
    cli_model m = CLI_MODEL;
    exc_prompt_options po = EXC_PROMPT_OPTIONS;
    exc_forward_options fo = EXC_FORWARD_OPTIONS;
    const char *file = NULL, *out = NULL, *emit = "logits";
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"--prompts", CLI_TEXT, &file, "FILE", ".txt, one prompt a line, or .jsonl"},
        {"-o", CLI_TEXT, &out, "FILE", "safetensors to write"},
        {"--emit", CLI_TEXT, &emit, "LIST", "of logits, hidden, routing. Default: logits"},
        {"--generate", CLI_INT, &fo.generate, "N", "also N greedy tokens a prompt. Default: 0"},
        CLI_PROMPTS(po),
        CLI_LENS(m),
        {"--batch-tokens", CLI_COUNT, &fo.batch_tokens, "N", "tokens a step. Default: chosen"},
        CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!file || !out) return cli_usage(c, "expected --prompts FILE and -o FILE");
    if (parse_emit(c, emit, &fo) || cli_check_prompts(c, &po) || cli_check_lens(c, &m)) return c->code;
    if (cli_output(c, out)) return c->code;
    fo.force = c->force;
    char *json = NULL;
    exc_prompts *prompts = NULL;
    exc_status st = cli_model_open(c, &m, c->rest[0]);
    if (st == EXC_OK) st = exc_prompts_load(c->ctx, c->rest[0], file, &po, &prompts);
    if (st == EXC_OK) st = exc_forward(c->ctx, m.model, prompts, &fo, out, &json);
    int code = c->code ? c->code : cli_result(c, st, json, cli_show);
    exc_prompts_free(prompts);
    cli_model_close(&m);
    return code;
}

int verb_generate(cli *c) {
    cli_model m = CLI_MODEL;
    exc_prompt_options po = EXC_PROMPT_OPTIONS;
    exc_generate_options go = EXC_GENERATE_OPTIONS;
    const char *file = NULL, *out = NULL;
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"--prompts", CLI_TEXT, &file, "FILE", ".txt, one prompt a line, or .jsonl"},
        {"-o", CLI_TEXT, &out, "FILE", "JSON lines to write"},
        CLI_HEAD("sampling"),
        {"--max-new", CLI_COUNT, &go.max_new, "N", "new tokens at most. Default: 64"},
        {"--temperature", CLI_FLOAT, &go.temperature, "X", "0 is greedy. Default: 0"},
        {"--top-p", CLI_FLOAT, &go.top_p, "X", "smallest set of this probability. Default: 1"},
        {"--seed", CLI_U64, &go.seed, "N", "token i of prompt p depends on (seed, p, i) only. Default: 0"},
        {"--batch", CLI_COUNT, &go.batch, "N", "sequences at once. Default: chosen"},
        CLI_PROMPTS(po),
        CLI_LENS(m),
        CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!file || !out) return cli_usage(c, "expected --prompts FILE and -o FILE");
    if (go.temperature < 0 || go.top_p < 0 || go.top_p > 1)
        return cli_usage(c, "expected --temperature >= 0 and --top-p from 0 to 1");
    if (cli_check_prompts(c, &po) || cli_check_lens(c, &m) || cli_output(c, out)) return c->code;
    go.force = c->force;
    char *json = NULL;
    exc_prompts *prompts = NULL;
    exc_status st = cli_model_open(c, &m, c->rest[0]);
    if (st == EXC_OK) st = exc_prompts_load(c->ctx, c->rest[0], file, &po, &prompts);
    if (st == EXC_OK) st = exc_generate(c->ctx, m.model, prompts, &go, out, &json);
    int code = c->code ? c->code : cli_result(c, st, json, cli_show);
    exc_prompts_free(prompts);
    cli_model_close(&m);
    return code;
}

int verb_tokenize(cli *c) {
    const char *file = NULL, *out = NULL;
    int chat = 0;
    const cli_option options[] = {
        CLI_HEAD("input and output"),
        {"--prompts", CLI_TEXT, &file, "FILE", "JSON lines {\"text\",\"special\"} or {\"messages\",..}"},
        {"-o", CLI_TEXT, &out, "FILE", "JSON lines {\"ids\"} to write"},
        {"--chat", CLI_FLAG, &chat, NULL, "texts are one user turn, rendered by the chat template"},
        CLI_END};
    if (cli_begin(c, options, 1, 1)) return c->code;
    if (!file || !out) return cli_usage(c, "expected --prompts FILE and -o FILE");
    if (cli_output(c, out)) return c->code;
    char *json = NULL;
    exc_status st = exc_tokenize(c->ctx, c->rest[0], file, out, chat, c->force, &json);
    return cli_result(c, st, json, cli_show);
}
