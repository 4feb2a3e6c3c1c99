/* cli.h - what the verbs of the excise program share. A verb is a function that declares its options as a table, calls
 * excise.h, and shows the JSON the library returns: as it is with --json, as aligned text otherwise, so that both hold the
 * same facts. Only excise.h and system headers are used here: this program is the library's first outside user. */
#ifndef EXC_CLI_H
#define EXC_CLI_H

#include <jansson.h>

#include "excise.h"

/* CLI_INT is 0 or more, CLI_COUNT 1 or more (0 is how excise.h says "the default") */
typedef enum cli_kind { CLI_FLAG, CLI_INT, CLI_COUNT, CLI_U64, CLI_REAL, CLI_FLOAT, CLI_TEXT, CLI_BYTES } cli_kind;
typedef struct cli_option {
    const char *name;  /* "--rank" or "-o"; NULL: a heading of the help, with the text in `help` */
    cli_kind kind;
    void *to;          /* int, int, int, uint64_t, double, float, const char *, uint64_t */
    const char *arg;   /* "N", "FILE"; NULL for flags */
    const char *help;  /* one line; "Default: X" last */
} cli_option;
#define CLI_HEAD(text) {NULL, CLI_FLAG, NULL, NULL, text}
#define CLI_END {NULL, CLI_FLAG, NULL, NULL, NULL}

typedef struct cli {
    const struct cli_verb *verb;
    int argc;
    char **argv;                /* after the verb */
    char **rest;                /* positional arguments, in order */
    int n_rest;
    int json, quiet, verbose, force, threads, reproducible, ranks;
    const char *backend, *gpus, *rendezvous;
    uint64_t memory;
    exc_ctx *ctx;
    int rank;                   /* of this process among those of one job */
    int code;                   /* exit code when cli_begin says stop */
    struct progress { double began, last; char step[64]; int open; } progress;
} cli;

typedef struct cli_verb {
    const char *name, *usage, *brief;
    int (*run)(cli *c);
} cli_verb;
extern const cli_verb cli_verbs[]; /* main.c, ends with name NULL */

/* args.c: parses options (verb's table plus the common ones), checks the number of positional arguments, opens the context.
 * 0: go on; else return c->code (help shown, or wrong usage reported). */
int cli_begin(cli *c, const cli_option *options, int least, int most);
int cli_usage(cli *c, const char *fmt, ...) __attribute__((format(printf, 2, 3))); /* one line, exit code 2 */
int cli_output(cli *c, const char *path); /* 0 where a file may be written: told before the work, not after it */
int cli_done(cli *c, exc_status st);    /* reports a failure; the exit code */
/* ends with cli_done; shows and frees json when the call succeeded */
int cli_result(cli *c, exc_status st, char *json, void (*text)(const json_t *));
void cli_help(const cli_verb *verb, const cli_option *options);
char *cli_relative(const char *file, const char *to); /* path of `file` as seen from the folder of `to`; malloc'ed */

/* launch.c: starts the processes that --gpus and --ranks ask for. 0: go on, as one of them, on this device; else all have
 * ended, or the options are wrong: return c->code. */
int cli_launch(cli *c, int *device);

/* progress.c */
int cli_event(void *user, const exc_event *event);
void cli_progress_end(cli *c);
void cli_catch_signals(void);
int cli_stopped(void); /* a signal asked to stop */
double cli_clock(void);

/* show.c */
void cli_show(const json_t *facts);          /* any JSON as aligned text on stdout */
void cli_show_evaluation(const json_t *facts); /* before and after side by side, with intervals */
void cli_show_run(const json_t *facts);      /* the summary one pastes into an appendix */

int verb_inspect(cli *c), verb_forward(cli *c), verb_generate(cli *c), verb_tokenize(cli *c);            /* running.c */
int verb_capture(cli *c), verb_merge(cli *c), verb_contrast(cli *c), verb_directions(cli *c);            /* studying.c */
int verb_plan(cli *c), verb_apply(cli *c), verb_verify(cli *c);                                          /* editing.c */
int verb_evaluate(cli *c), verb_run(cli *c), verb_report(cli *c), verb_bench(cli *c), verb_version(cli *c); /* judging.c */

#endif
