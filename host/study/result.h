/* result.h - the judging half of the study room: intervals, verdicts on replies, two models side by side, the
 * run folder and its page. study.h has the nouns that find and edit; this header has what tells whether that
 * worked. */
#ifndef EXC_RESULT_H
#define EXC_RESULT_H

#include "study.h"

/* ---- intervals (interval.c): every rate and mean that is reported has one, at 95 % */
#define EXC_RESAMPLES 1000
/* Wilson score interval of k successes in n trials; n = 0 gives [0,1]. Keeps its coverage at 0 of n, where
 * Wald's is [0,0] */
void exc_wilson(int64_t k, int64_t n, double *lo, double *hi);
/* percentile bootstrap of sum(num) / sum(den) over whole units (prompts, lines); den NULL: the mean. Unit j
 * of resample r is exc_random_unit(seed, stream, r * n + j). Fewer than two units: EXC_OK with lo = hi = NaN
 */
exc_status exc_bootstrap(exc_ctx *ctx, const double *num, const double *den, int64_t n, uint64_t seed,
                         uint64_t stream, double *lo, double *hi);

/* ---- verdicts (verdict.c) */
enum { EXC_FLAW_EMPTY = 1, EXC_FLAW_TRUNCATED = 2, EXC_FLAW_LOOP = 4 };
#define EXC_LOOP_REPEATS 3
#define EXC_LOOP_TOKENS 12
/* period of the repeated n-gram the reply ends in, 0: none (see verdict.c for the rule) */
int64_t exc_loop_period(const int32_t *tokens, int64_t n);
/* flaws of a reply, as bits; `text` is what the tokens decode to */
int exc_reply_flaws(const exc_reply *reply, const char *text);
/* [from, to) without white space at both ends; returns the new length and moves *text */
size_t exc_trim(const char **text, size_t n);
bool exc_same_trimmed(const char *a, const char *b);

/* request -> answers; several answers to one request are all right */
typedef struct exc_answers {
    struct exc_answer {
        char *request, *answer;
    } * items;
    size_t count;
} exc_answers;
exc_status exc_answers_read(exc_ctx *ctx, const char *path, exc_answers *out);
void exc_answers_free(exc_answers *a);
/* first answer to the request or NULL; *n gets how many follow each other from there */
const struct exc_answer *exc_answers_find(const exc_answers *a, const char *request, size_t *n);

/* ---- two models on the same tokens (tandem.c) */
typedef struct exc_unit {        /* sums over the positions of one prompt or line */
    double kl, kl_max;           /* KL(before || after) in nats */
    double nll[2];               /* -log p of the token that follows, before and after */
    int64_t rows, predicted;     /* positions; positions with a token that follows */
    int64_t same_top;            /* equal most likely token */
    int64_t routes, same_routes; /* (token, MoE layer) pairs; those with the same set of experts */
} exc_unit;
/* units [P]. before NULL: only nll[1] is filled. last_only: just the position that emits the first new token
 */
exc_status exc_tandem(exc_ctx *ctx, exc_model *before, exc_model *after, const exc_prompts *p, bool last_only,
                      int64_t step_tokens, const char *step, exc_unit *units);

/* ---- evaluate (evaluate.c): exc_evaluate, and one CSV line a prompt when `csv` is not NULL */
exc_status exc_judge(exc_ctx *ctx, exc_model *after, exc_model *before, const exc_evaluate_options *options,
                     exc_buf *csv, json_t **result);
void exc_csv_field(exc_buf *b, const char *text); /* quoted where RFC 4180 asks for it */

/* ---- the run folder (ledger.c): which steps are done, from what, and what they left */
typedef struct exc_ledger exc_ledger;
/* creates the folder, takes its lock, reads steps.json; EXC_ERR_USAGE: a folder that is not a run's,
 * EXC_ERR_IO: somebody runs there */
exc_status exc_ledger_open(exc_ctx *ctx, const char *dir, bool force, exc_ledger **out);
void exc_ledger_close(exc_ledger *l);
/* Is `step` done with these inputs, and are its outputs as it left them? Then *result is its recorded result
 * (borrowed), else NULL: the caller does the step and calls exc_ledger_done. inputs: object of strings;
 * outputs: NULL-terminated names in the folder */
exc_status exc_ledger_begin(exc_ledger *l, const char *step, const json_t *inputs, const char *const *outputs,
                            const json_t **result);
exc_status exc_ledger_done(exc_ledger *l, const char *step, const json_t *result, double seconds);
const json_t *exc_ledger_steps(const exc_ledger *l); /* array, in order, borrowed */
/* hash of a file, or of all regular files of a folder below it (names and contents); big files by size, time
 * and ends */
exc_status exc_tree_hash(exc_ctx *ctx, const char *path, char out[33]);
/* the same over the files of a model folder that decide what the model is: config, weights, tokenizer,
 * template */
exc_status exc_model_hash(exc_ctx *ctx, const char *dir, char out[33]);

/* ---- the page (report.c and its parts) */
void exc_html(exc_buf *b, const char *text);                      /* escaped for text and attribute values */
void exc_sha256_base64(const void *data, size_t n, char out[45]); /* digest.c: for the policy of the page */
void exc_base64(exc_buf *b, const void *data, size_t n);
/* picture.c: values [rows,cols] as little int16 in units of scale/32767 (NaN: -32768), base64 */
void exc_pack_cells(exc_buf *b, const double *values, size_t n, double scale);
/* indexed PNG of the same on the diverging scale of the page, one pixel a cell, as a data: URL */
void exc_png_cells(exc_buf *b, const double *values, int64_t rows, int64_t cols, double scale);

#endif
