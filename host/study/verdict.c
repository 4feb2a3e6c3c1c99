/* verdict.c - what is said about one reply, by rules that can be read aloud.
 *
 * Marked: it contains one of the phrases, whatever the case. Right: the whole reply, without white space at
 * its ends, is the expected answer; a low marker rate and a low KL can both be had by gibberish, an exact
 * answer cannot. Degenerate, which needs no expected answer: empty (nothing but white space), truncated (as
 * many tokens as were allowed and no end token), or a loop: the reply ends in one n-gram at least 3 times in
 * a row (a last partial turn counts) over at least 12 tokens; n is at most a third of the reply. Twelve, so
 * that "ha ha ha" or a row of dots is still a reply. */
#include <stdlib.h>
#include <string.h>

#include "result.h"

int64_t exc_loop_period(const int32_t *tokens, int64_t n) {
    for (int64_t period = 1; period * EXC_LOOP_REPEATS <= n; period++) {
        int64_t i = n - 1;
        while (i >= period && tokens[i] == tokens[i - period]) i--;
        int64_t covered = n - 1 - i + period; /* tokens[i+1-period .. n) repeats with this period */
        if (covered >= EXC_LOOP_REPEATS * period && covered >= EXC_LOOP_TOKENS) return period;
    }
    return 0;
}

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

size_t exc_trim(const char **text, size_t n) {
    while (n && is_space(**text)) {
        ++*text;
        n--;
    }
    while (n && is_space((*text)[n - 1])) n--;
    return n;
}

bool exc_same_trimmed(const char *a, const char *b) {
    size_t n = exc_trim(&a, strlen(a)), m = exc_trim(&b, strlen(b));
    return n == m && !memcmp(a, b, n);
}

int exc_reply_flaws(const exc_reply *reply, const char *text) {
    int flaws = 0;
    if (!exc_trim(&text, strlen(text))) flaws |= EXC_FLAW_EMPTY;
    if (!reply->stopped) flaws |= EXC_FLAW_TRUNCATED;
    if (exc_loop_period(reply->tokens, reply->count)) flaws |= EXC_FLAW_LOOP;
    return flaws;
}

/* -----------------------------------------------------------------------------------------------------
 * answers */

static int by_request(const void *a, const void *b) {
    const struct exc_answer *x = a, *y = b;
    return strcmp(x->request, y->request);
}

static exc_status answer_line(exc_ctx *ctx, const char *what, const char *line, size_t n, exc_answers *out,
                              size_t cap) {
    json_t *o = NULL;
    EXC_TRY(exc_json_parse(ctx, what, line, n, &o));
    const char *text[2] = {NULL, NULL};
    static const char *const keys[2] = {"request", "answer"};
    exc_status st = EXC_OK;
    for (int i = 0; i < 2 && st == EXC_OK; i++) {
        text[i] = json_string_value(json_object_get(o, keys[i]));
        if (!text[i])
            st = exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected a string, found none", what, keys[i]);
    }
    if (st == EXC_OK && out->count < cap) {
        struct exc_answer *a = &out->items[out->count++];
        a->request = exc_strdup(ctx, text[0]);
        a->answer = exc_strdup(ctx, text[1]);
        if (!a->request || !a->answer) st = EXC_ERR_MEMORY;
    }
    json_decref(o);
    return st;
}

exc_status exc_answers_read(exc_ctx *ctx, const char *path, exc_answers *out) {
    char **lines = NULL;
    size_t count = 0;
    memset(out, 0, sizeof *out);
    EXC_TRY(exc_lines_read(ctx, path, &lines, &count));
    exc_status st = EXC_OK;
    out->items = exc_zalloc(ctx, count ? count : 1, sizeof *out->items, "answers");
    if (!out->items) st = EXC_ERR_MEMORY;
    for (size_t i = 0; i < count && st == EXC_OK; i++) {
        exc_buf what = {0};
        exc_buf_printf(&what, "%s: answer %zu", path, i + 1);
        st = what.failed ? exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory", path)
                         : answer_line(ctx, what.data, lines[i], strlen(lines[i]), out, count);
        exc_buf_free(&what);
    }
    exc_lines_free(lines, count);
    if (st != EXC_OK) {
        exc_answers_free(out);
        return st;
    }
    qsort(out->items, out->count, sizeof *out->items, by_request);
    return EXC_OK;
}

void exc_answers_free(exc_answers *a) {
    for (size_t i = 0; i < a->count; i++) {
        exc_release(a->items[i].request);
        exc_release(a->items[i].answer);
    }
    exc_release(a->items);
    memset(a, 0, sizeof *a);
}

const struct exc_answer *exc_answers_find(const exc_answers *a, const char *request, size_t *n) {
    size_t lo = 0, hi = a->count;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (strcmp(a->items[mid].request, request) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    *n = 0;
    while (lo + *n < a->count && !strcmp(a->items[lo + *n].request, request)) ++*n;
    return *n ? &a->items[lo] : NULL;
}
