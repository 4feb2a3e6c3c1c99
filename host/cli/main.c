/* main.c - the excise program: picks the verb and hands over. Exit codes are those of exc_status_exit(): 0
 * done, 1 failed, 2 wrong usage, 3 input refused, 130 interrupted. */
#include <locale.h>
#include <stdio.h>
#include <string.h>

#include "cli.h"

const cli_verb cli_verbs[] = {
    {"inspect", "MODEL", "family, shapes, roles found, what is editable, what is not and why", verb_inspect},
    {"forward", "MODEL --prompts F -o OUT.safetensors", "logits, hidden states, routing of prompts",
     verb_forward},
    {"generate", "MODEL --prompts F -o OUT.jsonl", "replies, greedy or sampled", verb_generate},
    {"tokenize", "MODEL --prompts F.jsonl -o OUT.jsonl", "token ids of texts or messages", verb_tokenize},
    {"capture", "MODEL --target F --baseline F -o STATS.safetensors",
     "which experts two prompt sets chose, and what those put out", verb_capture},
    {"merge", "STATS... -o STATS.safetensors", "adds stats of the same model", verb_merge},
    {"contrast", "STATS [--directions D] -o EXPERTS.csv|.jsonl", "log-ratios with errors, one row an expert",
     verb_contrast},
    {"directions", "STATS -o DIRS.safetensors", "rank-k contrast subspaces, one a layer", verb_directions},
    {"plan", "MODEL STATS DIRS -o PLAN.json", "which weights to edit, how strongly", verb_plan},
    {"apply", "MODEL PLAN.json -o OUT_DIR", "writes the edited checkpoint", verb_apply},
    {"verify", "MODEL OUT_DIR [--plan PLAN.json]", "proves that only planned tensors differ", verb_verify},
    {"evaluate", "MODEL [--plan P] [--against REF]",
     "markers, right answers, KL, perplexity, before and after", verb_evaluate},
    {"run", "JOB.json", "the verbs above in order, resumable, one output folder", verb_run},
    {"report", "RUN_DIR -o report.html", "one self-contained page of a finished run", verb_report},
    {"bench", "[ROW...]", "measures the kernels beside their ceilings", verb_bench},
    {"version", "", "version, backends, instruction set", verb_version},
    {NULL, NULL, NULL, NULL},
};

static void help(FILE *out) {
    fprintf(out,
            "excise - find and remove a behaviour in a Mixture-of-Experts model\n\nusage: excise VERB ... "
            "(excise VERB -h tells more)\n\n");
    for (const cli_verb *v = cli_verbs; v->name; v++) fprintf(out, "  %-11s %s\n", v->name, v->brief);
    fprintf(out, "\nExit: 0 done, 1 failed, 2 wrong usage, 3 input refused, 130 interrupted (run the same "
                 "command again).\n");
}

static int lost_stdout(void) {
    fprintf(stderr, "excise: stdout: write failed\n");
    return 1;
}

int main(int argc, char **argv) {
    setlocale(LC_ALL, "C"); /* numbers in files never depend on a locale */
    const char *name = argc > 1 ? argv[1] : NULL;
    if (!name || !strcmp(name, "-h") || !strcmp(name, "--help") || !strcmp(name, "help")) {
        help(name ? stdout : stderr);
        if (name && (fflush(stdout) || ferror(stdout))) return lost_stdout();
        return name ? 0 : 2;
    }
    if (!strcmp(name, "--version")) name = "version";
    for (const cli_verb *v = cli_verbs; v->name; v++) {
        if (strcmp(v->name, name)) continue;
        cli c = {.verb = v, .argc = argc - 2, .argv = argv + 2};
        cli_catch_signals();
        int code = v->run(&c);
        exc_ctx_free(c.ctx);
        if (fflush(stdout) || ferror(stdout)) return lost_stdout(), code ? code : 1;
        return code;
    }
    fprintf(stderr, "excise: unknown verb %s; excise -h lists them\n", name);
    return 2;
}
