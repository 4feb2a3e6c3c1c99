/* pieces.c - the pre-tokenizer: patterns that cut a text into the pieces which merges never cross.
 *
 * The patterns in tokenizer.json are written for Oniguruma (Ruby syntax); PCRE2 runs them here, compiled to
 * machine code. Where the two languages read the same letters differently the pattern is translated (\s:
 * PCRE2 counts U+180E as a space) or refused by name (\w, \h, nested sets, a repeated repetition): a wrong
 * cut would be a silently different tokenisation. A stage cuts every piece of the stage before it on its own,
 * so that a look-ahead sees the piece's end as the text's end; what a pattern does not match stays a piece
 * too. */
#include <string.h>

#include "tokenizer.h"

#define SPACES "\\t-\\r\\x{85}\\p{Z}"

typedef struct reader {
    exc_ctx *ctx;
    const char *what, *p, *end;
    exc_buf out;
    bool in_class;
} reader;

static exc_status unknown(reader *r, const char *at, size_t n) {
    if (n > (size_t)(r->end - at)) n = (size_t)(r->end - at);
    return exc_fail(r->ctx, EXC_ERR_INPUT,
                    "%s: pre_tokenizer: a pattern uses \"%s\", which is not supported" EXC_WAY_OUT, r->what,
                    exc_show(at, n));
}

/* p is at a backslash */
static exc_status escape(reader *r) {
    const char *at = r->p;
    if (r->end - at < 2) return unknown(r, at, 1);
    char c = at[1];
    r->p += 2;
    if (c == 's') {
        exc_buf_puts(&r->out, r->in_class ? SPACES : "[" SPACES "]");
        return EXC_OK;
    }
    if (c == 'S' && !r->in_class) {
        exc_buf_puts(&r->out, "[^" SPACES "]");
        return EXC_OK;
    }
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    bool shared = strchr("rntfdDpP", c) || (c == 'x' && r->p < r->end && *r->p == '{');
    if (letter && !shared) return unknown(r, at, 2);
    exc_buf_put(&r->out, at, 2);
    return EXC_OK;
}

/* p is at a "(": groups, look-around and (?i: mean the same in both languages */
static exc_status group(reader *r) {
    static const char *const known[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    size_t left = (size_t)(r->end - r->p);
    if (left < 2 || (r->p[1] != '?' && r->p[1] != '*')) {
        exc_buf_put(&r->out, r->p++, 1);
        return EXC_OK;
    }
    for (size_t i = 0; i < EXC_COUNT(known); i++) {
        size_t n = strlen(known[i]);
        if (left < n || memcmp(r->p, known[i], n)) continue;
        exc_buf_put(&r->out, r->p, n);
        r->p += n;
        return EXC_OK;
    }
    return unknown(r, r->p, 4);
}

/* p is at a "{": a count, never possessive there ("{1,3}+" repeats the repetition in one language only) */
static exc_status count(reader *r) {
    const char *at = r->p++;
    size_t digits = 0;
    while (r->p < r->end && ((*r->p >= '0' && *r->p <= '9') || (*r->p == ',' && digits))) digits++, r->p++;
    bool closed = digits && r->p < r->end && *r->p == '}';
    if (!closed || (r->p + 1 < r->end && r->p[1] == '+')) return unknown(r, at, (size_t)(r->p - at) + 2);
    exc_buf_put(&r->out, at, (size_t)(++r->p - at));
    return EXC_OK;
}

static exc_status next(reader *r) {
    char c = *r->p;
    if (c == '\\') return escape(r);
    if (r->in_class) {
        if (c == '[' || (c == '&' && r->end - r->p > 1 && r->p[1] == '&')) return unknown(r, r->p, 2);
        if (c == ']') r->in_class = false;
    } else if (c == '(') {
        return group(r);
    } else if (c == '{') {
        return count(r);
    } else if (c == '[') {
        r->in_class = true;
        size_t n = r->end - r->p > 1 && r->p[1] == '^' ? 2 : 1;
        if (r->p + n < r->end && r->p[n] == ']') return unknown(r, r->p, n + 1);
        exc_buf_put(&r->out, r->p, n);
        r->p += n;
        return EXC_OK;
    }
    exc_buf_put(&r->out, r->p++, 1);
    return EXC_OK;
}

/* \p{..} inside a translated pattern keeps its braces: they are copied here, not read as a count */
static exc_status translate(reader *r) {
    while (r->p < r->end) {
        bool property = r->end - r->p > 2 && r->p[0] == '\\' && strchr("pPx", r->p[1]) && r->p[2] == '{';
        EXC_TRY(next(r));
        if (!property) continue;
        const char *close = memchr(r->p, '}', (size_t)(r->end - r->p));
        if (!close) return unknown(r, r->p - 2, 3);
        exc_buf_put(&r->out, r->p, (size_t)(close + 1 - r->p));
        r->p = close + 1;
    }
    return EXC_OK;
}

/* Ruby's ^ and $ are always those of lines, and a line ends at LF */
static exc_status compile(exc_ctx *ctx, const char *what, const char *pattern, size_t n, uint32_t options,
                          pcre2_code **code) {
    pcre2_compile_context *c = pcre2_compile_context_create(NULL);
    if (!c) return exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory for a pattern", what);
    pcre2_set_newline(c, PCRE2_NEWLINE_LF);
    int error;
    PCRE2_SIZE at;
    *code = pcre2_compile((PCRE2_SPTR)pattern, n, options | PCRE2_UTF, &error, &at, c);
    pcre2_compile_context_free(c);
    if (!*code) {
        PCRE2_UCHAR text[128];
        pcre2_get_error_message(error, text, sizeof text);
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: pre_tokenizer: pattern \"%s\": %s at %zu", what,
                        exc_show(pattern, n), (const char *)text, (size_t)at);
    }
    uint32_t empty = 0;
    pcre2_pattern_info(*code, PCRE2_INFO_MATCHEMPTY, &empty);
    if (empty)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: pre_tokenizer: pattern \"%s\" can match nothing" EXC_WAY_OUT,
                        what, exc_show(pattern, n));
    pcre2_jit_compile(*code,
                      PCRE2_JIT_COMPLETE); /* where there is no JIT the interpreter gives the same matches */
    return EXC_OK;
}

exc_status exc_stage_add(exc_ctx *ctx, exc_tokenizer *t, const char *what, const char *pattern, size_t n,
                         bool literal) {
    if (t->stages == EXC_MAX_STAGES)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: pre_tokenizer: expected at most %d patterns" EXC_WAY_OUT,
                        what, EXC_MAX_STAGES);
    if (!n) return exc_fail(ctx, EXC_ERR_INPUT, "%s: pre_tokenizer: a pattern is empty" EXC_WAY_OUT, what);
    if (literal) return compile(ctx, what, pattern, n, PCRE2_LITERAL, t->stage + t->stages++);
    reader r = {ctx, what, pattern, pattern + n, {0}, false};
    exc_status st = translate(&r);
    if (st == EXC_OK && r.out.failed) st = exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory for a pattern", what);
    if (st == EXC_OK)
        st = compile(ctx, what, r.out.data, r.out.len, PCRE2_UCP | PCRE2_MULTILINE, t->stage + t->stages++);
    exc_buf_free(&r.out);
    return st;
}

exc_status exc_pieces(exc_ctx *ctx, const exc_tokenizer *t, exc_scratch *w, int stage, const char *p,
                      size_t n, exc_ids *ids) {
    if (stage == t->stages) return exc_merge_piece(ctx, t, w, p, n, ids);
    for (size_t at = 0; at < n;) {
        int rc = pcre2_match(t->stage[stage], (PCRE2_SPTR)p, n, at, PCRE2_NO_UTF_CHECK, w->match, w->limits);
        if (rc < 0 && rc != PCRE2_ERROR_NOMATCH)
            return exc_fail(
                ctx, EXC_ERR_INPUT,
                "tokenizer: pattern %d gave up at byte %zu of a text of %zu bytes (PCRE2 error %d)",
                stage + 1, at, n, rc);
        const PCRE2_SIZE *m = pcre2_get_ovector_pointer(w->match);
        size_t from = rc < 0 ? n : m[0], to = rc < 0 ? n : m[1];
        if (from > at) EXC_TRY(exc_pieces(ctx, t, w, stage + 1, p + at, from - at, ids));
        if (to > from) EXC_TRY(exc_pieces(ctx, t, w, stage + 1, p + from, to - from, ids));
        at = to;
    }
    return EXC_OK;
}
