/* phrases.c - does a text contain one of these phrases, whatever the case? Phrases are literal text (no
 * pattern syntax), compared by Unicode simple case folding, which PCRE2 knows: a byte-wise tolower would miss
 * "É" against "é". One compiled pattern a phrase; texts that are not valid UTF-8 (a reply may end inside a
 * character) are searched with invalid bytes as places where nothing matches. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <string.h>

#include "files.h"

struct exc_phrases {
    pcre2_code **code; /* [count] */
    pcre2_match_data *match;
    size_t count;
};

exc_status exc_phrases_open(exc_ctx *ctx, char *const *lines, size_t count, exc_phrases **out) {
    *out = NULL;
    exc_phrases *p = exc_zalloc(ctx, 1, sizeof *p, "phrases");
    if (!p) return EXC_ERR_MEMORY;
    p->code = exc_zalloc(ctx, count ? count : 1, sizeof *p->code, "phrases");
    p->match = pcre2_match_data_create(1, NULL);
    exc_status st = p->code && p->match ? EXC_OK : exc_fail(ctx, EXC_ERR_MEMORY, "phrases: no memory");
    for (size_t i = 0; i < count && st == EXC_OK; i++) {
        int error;
        PCRE2_SIZE at;
        p->code[i] = pcre2_compile((PCRE2_SPTR)lines[i], strlen(lines[i]),
                                   PCRE2_LITERAL | PCRE2_CASELESS | PCRE2_UTF | PCRE2_MATCH_INVALID_UTF,
                                   &error, &at, NULL);
        if (!p->code[i]) {
            st = exc_fail(ctx, EXC_ERR_INPUT, "phrase %zu: expected UTF-8 text, found %s", i + 1,
                          exc_show(lines[i], strlen(lines[i])));
            break;
        }
        p->count++;
    }
    if (st != EXC_OK)
        exc_phrases_close(p);
    else
        *out = p;
    return st;
}

int64_t exc_phrases_find(const exc_phrases *p, const char *text, size_t n) {
    for (size_t i = 0; i < p->count; i++)
        if (pcre2_match(p->code[i], (PCRE2_SPTR)text, n, 0, 0, p->match, NULL) >= 0) return (int64_t)i;
    return -1;
}

void exc_phrases_close(exc_phrases *p) {
    if (!p) return;
    for (size_t i = 0; i < p->count; i++) pcre2_code_free(p->code[i]);
    pcre2_match_data_free(p->match);
    exc_release(p->code);
    exc_release(p);
}
