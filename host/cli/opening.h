/* opening.h - options shared by the verbs that run a model: which prompts, read through which plan, computed how. */
#ifndef EXC_CLI_OPENING_H
#define EXC_CLI_OPENING_H

#include "cli.h"

typedef struct cli_model {
    const char *plan_path, *compute;
    int is_virtual;
    exc_plan *plan;
    exc_model *model;
} cli_model;
#define CLI_MODEL {NULL, NULL, 0, NULL, NULL}

#define CLI_LENS(m)                                                                                                    \
    CLI_HEAD("model"),                                                                                                 \
        {"--plan", CLI_TEXT, &(m).plan_path, "FILE", "read the model through this plan"},                              \
        {"--virtual", CLI_FLAG, &(m).is_virtual, NULL, "project outputs instead of editing weights in memory"},        \
        {"--compute", CLI_TEXT, &(m).compute, "bf16|f32", "matmul operands. Default: bf16"}

#define CLI_PROMPTS(p)                                                                                                 \
    CLI_HEAD("prompts"),                                                                                               \
        {"--raw", CLI_FLAG, &(p).raw, NULL, "text as it is, no chat template"},                                        \
        {"--system", CLI_TEXT, &(p).system, "TEXT", "system message in front of every text prompt"},                   \
        {"--template", CLI_TEXT, &(p).chat, "NAME", "a built-in chat template instead of the model's own"},            \
        {"--limit", CLI_COUNT, &(p).limit, "N", "use the first N prompts. Default: all"}

/* options that contradict each other or would do nothing: 0, or c->code and one line */
int cli_check_prompts(cli *c, const exc_prompt_options *po);
int cli_check_lens(cli *c, const cli_model *m);

/* opens the model (and the plan); a wrong --compute sets c->code and returns EXC_ERR_USAGE */
exc_status cli_model_open(cli *c, cli_model *m, const char *dir);
void cli_model_close(cli_model *m);
/* the value of --compute; 0 and c->code on a wrong one */
int cli_compute(cli *c, const char *text, exc_compute *out);

#endif
