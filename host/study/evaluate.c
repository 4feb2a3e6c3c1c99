/* evaluate.c - exc_evaluate: what a model answers, before and after an edit, side by side.
 *
 * Target and baseline prompts get greedy replies from both models, judged by verdict.c; the first new token's
 * KL is taken on the baseline prompts, KL at all positions, perplexity and routing agreement on neutral text
 * (tandem.c). A low marker rate and a low KL can be met by gibberish, so right answers and degenerate replies
 * stand beside them. Rates carry Wilson intervals, means a bootstrap over prompts or lines (interval.c). What
 * was not asked for is null. */
#include <math.h>
#include <string.h>

#include "result.h"

enum { TARGET, BASELINE, SETS };
enum { BEFORE, AFTER, MODELS };
static const char *const set_name[SETS] = {"target", "baseline"};

typedef struct verdict {
    char *text;
    int flaws;
    bool marked, right;
    int64_t tokens;
} verdict;

typedef struct judging {
    exc_ctx *ctx;
    exc_model *model[MODELS];
    const exc_evaluate_options *o;
    int64_t max_new, examples;
    exc_tokenizer *tokenizer;
    exc_phrases *phrases;
    exc_answers answers;
    exc_prompts *set[SETS], *neutral;
    verdict *said[SETS][MODELS]; /* [P] */
    const char **expected[SETS]; /* [P] first right answer or NULL */
} judging;

/* -------------------------------------------------------------------------------------------------------
 * replies */

/* A reply may stop inside a character: such bytes become U+FFFD, so that texts can go into JSON and CSV. */
static void repair(exc_buf *text) {
    size_t at = 0, bad;
    if (!text->data || exc_utf8_valid(text->data, text->len, NULL)) return;
    exc_buf whole = {0};
    while (at < text->len && !exc_utf8_valid(text->data + at, text->len - at, &bad)) {
        exc_buf_put(&whole, text->data + at, bad);
        exc_buf_puts(&whole, "\xef\xbf\xbd");
        at += bad + 1;
    }
    exc_buf_put(&whole, text->data + at, text->len - at);
    exc_buf_free(text);
    *text = whole;
}

static exc_status judge_reply(judging *j, int set, int64_t i, const exc_reply *reply, verdict *v) {
    exc_buf text = {0};
    exc_buf_puts(&text, "");
    exc_status st =
        exc_tokenizer_decode(j->ctx, j->tokenizer, reply->tokens, (size_t)reply->count, true, &text);
    if (st != EXC_OK) {
        exc_buf_free(&text);
        return st;
    }
    repair(&text);
    if (text.failed) {
        exc_buf_free(&text);
        return exc_fail(j->ctx, EXC_ERR_MEMORY, "evaluate: no memory for a reply");
    }
    v->text = text.data;
    v->tokens = reply->count;
    v->flaws = exc_reply_flaws(reply, v->text);
    v->marked = j->phrases && exc_phrases_find(j->phrases, v->text, text.len) >= 0;
    const char *request = j->set[set]->text[i];
    size_t n = 0;
    const struct exc_answer *a = request ? exc_answers_find(&j->answers, request, &n) : NULL;
    for (size_t k = 0; k < n; k++) v->right |= exc_same_trimmed(v->text, a[k].answer);
    return EXC_OK;
}

static exc_status replies_of(judging *j, int set, int which) {
    const exc_prompts *p = j->set[set];
    char step[48];
    snprintf(step, sizeof step, "%s replies %s", set_name[set],
             which == BEFORE    ? "before"
             : j->model[BEFORE] ? "after"
                                : "");
    exc_decode d = {.max_new = j->max_new, .step = step};
    exc_reply *replies = NULL;
    j->said[set][which] = exc_zalloc(j->ctx, (size_t)p->count, sizeof(verdict), "replies");
    if (!j->said[set][which]) return EXC_ERR_MEMORY;
    EXC_TRY(exc_decode_run(j->ctx, j->model[which], p, &d, &replies));
    exc_status st = EXC_OK;
    for (int64_t i = 0; i < p->count && st == EXC_OK; i++)
        st = judge_reply(j, set, i, &replies[i], &j->said[set][which][i]);
    exc_replies_free(replies, p->count);
    return st;
}

static exc_status expect(judging *j, int set) {
    const exc_prompts *p = j->set[set];
    int64_t known = 0;
    j->expected[set] = exc_zalloc(j->ctx, (size_t)p->count, sizeof(char *), "expected answers");
    if (!j->expected[set]) return EXC_ERR_MEMORY;
    for (int64_t i = 0; i < p->count; i++) {
        size_t n = 0;
        const struct exc_answer *a = p->text[i] ? exc_answers_find(&j->answers, p->text[i], &n) : NULL;
        if (a) j->expected[set][i] = a->answer;
        known += a != NULL;
    }
    if (j->o->answers && !known)
        exc_warn(j->ctx, "%s: has no answer to any of the %lld %s prompts; no right answers are counted",
                 j->o->answers, (long long)p->count, set_name[set]);
    return EXC_OK;
}

/* ----------------------------------------------------------------------------------------------------------
 * JSON */

static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }
static json_t *pair(double lo, double hi) {
    return isfinite(lo) && isfinite(hi) ? json_pack("[f,f]", lo, hi) : json_null();
}

/* KEY: k/n and KEY_ci: its interval; null when nothing could be counted */
static void put_rate(json_t *o, const char *key, int64_t k, int64_t n) {
    char ci[48];
    double lo, hi;
    exc_wilson(k, n, &lo, &hi);
    snprintf(ci, sizeof ci, "%s_ci", key);
    json_object_set_new(o, key, n ? json_real((double)k / (double)n) : json_null());
    json_object_set_new(o, ci, n ? pair(lo, hi) : json_null());
}

static json_t *set_json(const judging *j, int set, int which) {
    const verdict *v = j->said[set][which];
    int64_t n = j->set[set]->count, marked = 0, right = 0, known = 0, flawed = 0, flaw[3] = {0}, tokens = 0;
    for (int64_t i = 0; i < n; i++) {
        marked += v[i].marked;
        right += v[i].right;
        known += j->expected[set][i] != NULL;
        flawed += v[i].flaws != 0;
        for (int f = 0; f < 3; f++) flaw[f] += v[i].flaws >> f & 1;
        tokens += v[i].tokens;
    }
    json_t *o = json_object();
    put_rate(o, "marker_rate", marked, j->phrases ? n : 0);
    put_rate(o, "correct_rate", right, known);
    put_rate(o, "degenerate_rate", flawed, n);
    json_object_set_new(o, "n", json_integer(n));
    json_object_set_new(o, "marked", j->phrases ? json_integer(marked) : json_null());
    json_object_set_new(o, "correct", known ? json_integer(right) : json_null());
    json_object_set_new(o, "with_answer", json_integer(known));
    json_object_set_new(o, "degenerate",
                        json_pack("{s:I,s:I,s:I}", "empty", (json_int_t)flaw[0], "truncated",
                                  (json_int_t)flaw[1], "loop", (json_int_t)flaw[2]));
    json_object_set_new(o, "mean_tokens", number((double)tokens / (double)n));
    return o;
}

static json_t *example(const judging *j, int set, int64_t i) {
    json_t *x = json_object();
    const char *request = j->set[set]->text[i];
    json_object_set_new(x, "set", json_string(set_name[set]));
    json_object_set_new(x, "prompt", json_integer((json_int_t)i + 1));
    if (request) json_object_set_new(x, "request", json_string(request));
    for (int m = 0; m < MODELS; m++) {
        if (!j->model[m]) continue;
        const verdict *v = &j->said[set][m][i];
        json_object_set_new(x, m == BEFORE ? "before" : "after", json_string(v->text));
        json_object_set_new(
            x, m == BEFORE ? "before_verdict" : "after_verdict",
            json_pack("{s:b,s:b,s:b}", "marked", v->marked, "right", v->right, "degenerate", v->flaws != 0));
    }
    if (j->expected[set][i]) json_object_set_new(x, "answer", json_string(j->expected[set][i]));
    return x;
}

/* Examples stand at even distances through both sets, so that nobody picked them; failures are those that
 * went wrong. */
static void put_examples(const judging *j, json_t *result) {
    json_t *even = json_array(), *failed = json_array();
    int sets = (j->set[TARGET] != NULL) + (j->set[BASELINE] != NULL);
    for (int s = 0; s < SETS; s++) {
        if (!j->set[s]) continue;
        int64_t n = j->set[s]->count, want = sets == 2 ? (j->examples + (s == TARGET)) / 2 : j->examples,
                left = j->examples;
        if (want > n) want = n;
        for (int64_t e = 0; e < want; e++)
            json_array_append_new(even, example(j, s, (2 * e + 1) * n / (2 * want)));
        for (int64_t i = 0; i < n && left > 0; i++) {
            const verdict *v = &j->said[s][AFTER][i];
            if (!v->marked && !v->flaws && (v->right || !j->expected[s][i])) continue;
            json_array_append_new(failed, example(j, s, i));
            left--;
        }
    }
    json_object_set_new(result, "examples", even);
    json_object_set_new(result, "failures", failed);
}

static void put_same_replies(const judging *j, json_t *result) {
    if (!j->model[BEFORE]) return;
    for (int s = 0; s < SETS; s++) {
        if (!j->set[s]) continue;
        int64_t same = 0, n = j->set[s]->count;
        for (int64_t i = 0; i < n; i++)
            same += !strcmp(j->said[s][BEFORE][i].text, j->said[s][AFTER][i].text);
        put_rate(result, s == TARGET ? "target_replies_same" : "baseline_replies_same", same, n);
    }
}

/* ------------------------------------------------------------------------------------------------ two models
 * at once */

enum { KL, NLL_BEFORE, NLL_AFTER, TOP, ROUTES };

/* ratio of two sums over units, and its interval; one stream for all, so that before and after see the same
 * draws */
static exc_status ratio(const judging *j, const exc_unit *u, int64_t n, int what, double *value, double *lo,
                        double *hi) {
    double *num = exc_alloc(j->ctx, (size_t)n, sizeof *num, "sums by prompt"),
           *den = exc_alloc(j->ctx, (size_t)n, sizeof *den, "sums by prompt");
    exc_status st = num && den ? EXC_OK : EXC_ERR_MEMORY;
    double a = 0, b = 0;
    for (int64_t i = 0; i < n && st == EXC_OK; i++) {
        const double top[] = {u[i].kl, u[i].nll[0], u[i].nll[1], (double)u[i].same_top,
                              (double)u[i].same_routes};
        const int64_t below[] = {u[i].rows, u[i].predicted, u[i].predicted, u[i].rows, u[i].routes};
        a += num[i] = top[what];
        b += den[i] = (double)below[what];
    }
    *value = b > 0 ? a / b : NAN;
    if (st == EXC_OK) st = exc_bootstrap(j->ctx, num, den, n, j->o->seed, 0, lo, hi);
    exc_release(num);
    exc_release(den);
    return st;
}

static exc_status put_ratio(const judging *j, json_t *to, const char *key, const exc_unit *u, int64_t n,
                            int what, bool exponent) {
    double value, lo, hi;
    char ci[48];
    EXC_TRY(ratio(j, u, n, what, &value, &lo, &hi));
    if (exponent) {
        value = exp(value);
        lo = exp(lo);
        hi = exp(hi);
    }
    snprintf(ci, sizeof ci, "%s_ci", key);
    json_object_set_new(to, key, number(value));
    json_object_set_new(to, ci, pair(lo, hi));
    return EXC_OK;
}

static exc_status first_token(const judging *j, json_t *result) {
    const exc_prompts *p = j->set[BASELINE];
    if (!p || !j->model[BEFORE]) return EXC_OK;
    exc_unit *u = exc_alloc(j->ctx, (size_t)p->count, sizeof *u, "comparison by prompt");
    if (!u) return EXC_ERR_MEMORY;
    exc_status st = exc_tandem(j->ctx, j->model[BEFORE], j->model[AFTER], p, true, 0, "first tokens", u);
    if (st == EXC_OK) st = put_ratio(j, result, "kl_first", u, p->count, KL, false);
    if (st == EXC_OK) st = put_ratio(j, result, "first_token_same", u, p->count, TOP, false);
    exc_release(u);
    return st;
}

static exc_status neutral_text(const judging *j, json_t *result, json_t *const of[MODELS]) {
    const exc_prompts *p = j->neutral;
    if (!p) return EXC_OK;
    exc_unit *u = exc_alloc(j->ctx, (size_t)p->count, sizeof *u, "comparison by line");
    if (!u) return EXC_ERR_MEMORY;
    exc_status st = exc_tandem(j->ctx, j->model[BEFORE], j->model[AFTER], p, false, 0, "neutral text", u);
    if (st == EXC_OK) st = put_ratio(j, of[AFTER], "ppl_neutral", u, p->count, NLL_AFTER, true);
    int64_t tokens = 0, routes = 0, worst = 0;
    for (int64_t i = 0; i < p->count && st == EXC_OK; i++) {
        tokens += u[i].rows;
        routes += u[i].routes;
        if (u[i].kl_max > u[worst].kl_max) worst = i;
    }
    json_t *text = json_pack("{s:I,s:I}", "lines", (json_int_t)p->count, "tokens", (json_int_t)tokens);
    if (st == EXC_OK && j->model[BEFORE]) {
        st = put_ratio(j, of[BEFORE], "ppl_neutral", u, p->count, NLL_BEFORE, true);
        if (st == EXC_OK) st = put_ratio(j, result, "kl_neutral", u, p->count, KL, false);
        if (st == EXC_OK) st = put_ratio(j, result, "top_token_same", u, p->count, TOP, false);
        if (st == EXC_OK && routes) st = put_ratio(j, result, "routing_same", u, p->count, ROUTES, false);
        json_object_set_new(result, "kl_neutral_max", number(u[worst].kl_max));
        if (p->text[worst]) json_object_set_new(text, "kl_max_line", json_string(p->text[worst]));
    }
    json_object_set_new(result, "neutral", text);
    exc_release(u);
    return st;
}

/* ------------------------------------------------------------------------------------------------------ the
 * whole */

static exc_status load(judging *j) {
    const exc_evaluate_options *o = j->o;
    const char *dir = j->model[AFTER]->dir, *files[SETS] = {o->target, o->baseline};
    EXC_TRY(exc_tokenizer_load(j->ctx, dir, &j->tokenizer));
    if (o->markers) {
        char **lines = NULL;
        size_t count = 0;
        EXC_TRY(exc_lines_read(j->ctx, o->markers, &lines, &count));
        exc_status st =
            count ? exc_phrases_open(j->ctx, lines, count, &j->phrases)
                  : exc_fail(j->ctx, EXC_ERR_INPUT, "%s: expected one phrase a line, found none", o->markers);
        exc_lines_free(lines, count);
        EXC_TRY(st);
    }
    if (o->answers) EXC_TRY(exc_answers_read(j->ctx, o->answers, &j->answers));
    for (int s = 0; s < SETS; s++) {
        exc_prompt_options po = EXC_PROMPT_OPTIONS;
        po.system = o->system;
        if (files[s]) EXC_TRY(exc_prompts_load(j->ctx, dir, files[s], &po, &j->set[s]));
        if (files[s]) EXC_TRY(expect(j, s));
    }
    if (o->neutral) {
        exc_prompt_options po = EXC_PROMPT_OPTIONS;
        po.raw = 1;
        EXC_TRY(exc_prompts_load(j->ctx, dir, o->neutral, &po, &j->neutral));
    }
    return EXC_OK;
}

static void release(judging *j) {
    for (int s = 0; s < SETS; s++) {
        for (int m = 0; m < MODELS; m++) {
            for (int64_t i = 0; j->said[s][m] && i < j->set[s]->count; i++) exc_free(j->said[s][m][i].text);
            exc_release(j->said[s][m]);
        }
        exc_release(j->expected[s]);
        exc_prompts_free(j->set[s]);
    }
    exc_prompts_free(j->neutral);
    exc_answers_free(&j->answers);
    exc_phrases_close(j->phrases);
    exc_tokenizer_free(j->tokenizer);
}

static json_t *rules(const judging *j) {
    char truncated[96], loop[128];
    snprintf(truncated, sizeof truncated, "%lld tokens without an end token", (long long)j->max_new);
    snprintf(loop, sizeof loop, "ends in one n-gram at least %d times in a row over at least %d tokens",
             EXC_LOOP_REPEATS, EXC_LOOP_TOKENS);
    return json_pack(
        "{s:s,s:s,s:s,s:s,s:s,s:s,s:s}", "marked", "contains a phrase of the markers file, whatever the case",
        "correct", "equals the expected answer after trimming white space", "degenerate",
        "empty, truncated or a loop", "truncated", truncated, "loop", loop, "rate_ci", "95 %, Wilson score",
        "mean_ci", "95 %, percentile bootstrap over whole prompts or lines, 1000 draws");
}

static exc_status judge_all(judging *j, json_t *result, json_t *const of[MODELS]) {
    for (int m = 0; m < MODELS; m++)
        for (int s = 0; s < SETS; s++) {
            if (!j->model[m] || !j->set[s]) continue;
            EXC_TRY(replies_of(j, s, m));
            json_object_set_new(of[m], set_name[s], set_json(j, s, m));
        }
    static const char *const both[] = {"kl_first", "kl_neutral", "kl_neutral_max", "routing_same"};
    for (int m = 0; m < MODELS; m++) json_object_set_new(of[m], "ppl_neutral", json_null());
    for (size_t i = 0; i < EXC_COUNT(both); i++) json_object_set_new(result, both[i], json_null());
    EXC_TRY(first_token(j, result));
    return neutral_text(j, result, of);
}

void exc_csv_field(exc_buf *b, const char *text) {
    if (!strpbrk(text, ",\"\r\n")) {
        exc_buf_puts(b, text);
        return;
    }
    exc_buf_puts(b, "\"");
    for (const char *p = text; *p; p++) exc_buf_put(b, *p == '"' ? "\"\"" : p, *p == '"' ? 2 : 1);
    exc_buf_puts(b, "\"");
}

static exc_status write_csv(const judging *j, exc_buf *b) {
    exc_buf_puts(b, "set,prompt,model,marked,right,empty,truncated,loop,tokens,request,reply,answer\n");
    for (int s = 0; s < SETS; s++)
        for (int64_t i = 0; j->set[s] && i < j->set[s]->count; i++)
            for (int m = 0; m < MODELS; m++) {
                if (!j->model[m]) continue;
                const verdict *v = &j->said[s][m][i];
                exc_buf_printf(b, "%s,%lld,%s,%d,%d,%d,%d,%d,%lld,", set_name[s], (long long)i + 1,
                               m == BEFORE ? "before" : "after", v->marked, v->right,
                               v->flaws & EXC_FLAW_EMPTY ? 1 : 0, v->flaws & EXC_FLAW_TRUNCATED ? 1 : 0,
                               v->flaws & EXC_FLAW_LOOP ? 1 : 0, (long long)v->tokens);
                exc_csv_field(b, j->set[s]->text[i] ? j->set[s]->text[i] : "");
                exc_buf_puts(b, ",");
                exc_csv_field(b, v->text);
                exc_buf_puts(b, ",");
                exc_csv_field(b, j->expected[s][i] ? j->expected[s][i] : "");
                exc_buf_puts(b, "\n");
            }
    return b->failed ? exc_fail(j->ctx, EXC_ERR_MEMORY, "evaluate: no memory for the table") : EXC_OK;
}

exc_status exc_judge(exc_ctx *ctx, exc_model *after, exc_model *before, const exc_evaluate_options *options,
                     exc_buf *csv, json_t **out) {
    double started = exc_seconds();
    judging j = {.ctx = ctx,
                 .model = {before, after},
                 .o = options,
                 .max_new = options->max_new > 0 ? options->max_new : 48,
                 .examples = options->examples > 0 ? options->examples : 4};
    json_t *result = json_object(), *of[MODELS] = {json_object(), json_object()};
    exc_status st = load(&j);
    if (st == EXC_OK) st = judge_all(&j, result, of);
    if (st == EXC_OK && csv) st = write_csv(&j, csv);
    if (st == EXC_OK) {
        put_same_replies(&j, result);
        put_examples(&j, result);
        json_object_set_new(result, "max_new", json_integer((json_int_t)j.max_new));
        json_object_set_new(result, "compute",
                            json_string(after->compute == EXC_COMPUTE_F32 ? "f32" : "bf16"));
        json_object_set_new(result, "rules", rules(&j));
        exc_memory_facts(after, result);
        json_object_set_new(result, "seconds", json_real(exc_seconds() - started));
        *out = json_object();
        if (before) json_object_set(*out, "before", of[BEFORE]);
        json_object_set(*out, "after", of[AFTER]);
        json_object_update(*out, result);
    }
    for (int m = 0; m < MODELS; m++) json_decref(of[m]);
    json_decref(result);
    release(&j);
    return st;
}

exc_status exc_evaluate(exc_ctx *ctx, exc_model *model, exc_model *against,
                        const exc_evaluate_options *options, char **json) {
    exc_evaluate_options o = EXC_EVALUATE_OPTIONS;
    if (!ctx || !model) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (!options || options->size < sizeof options->size || options->size > sizeof o)
        return exc_fail(ctx, EXC_ERR_USAGE, "exc_evaluate: expected options of this version");
    memcpy(&o, options, options->size);
    o.size = sizeof o;
    if (!o.target && !o.baseline && !o.neutral)
        return exc_fail(ctx, EXC_ERR_USAGE,
                        "exc_evaluate: expected at least one of target, baseline, neutral");
    json_t *result = NULL;
    EXC_TRY(exc_judge(ctx, model, against, &o, NULL, &result));
    exc_status st = EXC_OK;
    if (json && !(*json = exc_json_text(ctx, result))) st = EXC_ERR_MEMORY;
    json_decref(result);
    return st;
}
