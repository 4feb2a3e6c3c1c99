/* added.c - finds added tokens (`<|im_start|>`, `<think>`) in a text: the leftmost first, the longest where
 * several start at the same place.
 *
 * The tokens are sorted by their bytes. At a place where one may start, the range of those that agree with
 * the text so far is narrowed byte by byte; a token that ends on the way heads its range, since a prefix
 * sorts first. Nothing more is needed for 800 tokens that all begin with the same `<`, and ordinary text
 * leaves the range empty after two bytes. */
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"

static unsigned byte_at(const exc_tokenizer *t, uint32_t id, size_t depth) {
    return (unsigned char)t->bytes[t->tokens[id].begin + depth];
}

static int by_bytes(const void *a, const void *b, void *user) {
    const exc_tokenizer *t = user;
    const exc_token *x = t->tokens + *(const uint32_t *)a, *y = t->tokens + *(const uint32_t *)b;
    int c = memcmp(t->bytes + x->begin, t->bytes + y->begin, x->len < y->len ? x->len : y->len);
    return c ? c : (x->len > y->len) - (x->len < y->len);
}

exc_status exc_added_build(exc_ctx *ctx, const exc_tokenizer *t, exc_added *a, const char *what) {
    if (a->count) qsort_r(a->ids, a->count, sizeof *a->ids, by_bytes, (void *)t);
    for (size_t i = 0; i < a->count; i++) {
        if (i && !by_bytes(a->ids + i - 1, a->ids + i, (void *)t))
            return exc_fail(ctx, EXC_ERR_INPUT, "%s: added_tokens: \"%s\" is there twice", what,
                            exc_show(t->bytes + t->tokens[a->ids[i]].begin, t->tokens[a->ids[i]].len));
        a->starts[byte_at(t, a->ids[i], 0)] = 1;
    }
    return EXC_OK;
}

/* first of ids[lo..hi) whose byte at `depth` is at least `c`; all are longer than depth and agree before it
 */
static size_t first_at_least(const exc_tokenizer *t, const exc_added *a, size_t lo, size_t hi, size_t depth,
                             unsigned c) {
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (byte_at(t, a->ids[mid], depth) < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static bool longest(const exc_tokenizer *t, const exc_added *a, const char *p, size_t n, uint32_t *id) {
    size_t lo = 0, hi = a->count;
    bool found = false;
    for (size_t depth = 0; lo < hi && depth < n; depth++) {
        unsigned c = (unsigned char)p[depth];
        lo = first_at_least(t, a, lo, hi, depth, c);
        hi = first_at_least(t, a, lo, hi, depth, c + 1);
        if (lo < hi && t->tokens[a->ids[lo]].len == depth + 1) {
            *id = a->ids[lo++];
            found = true;
        }
    }
    return found;
}

bool exc_added_next(const exc_tokenizer *t, const exc_added *a, const char *text, size_t at, size_t end,
                    size_t *from, uint32_t *id) {
    if (!a->count) return false;
    for (; at < end; at++) {
        if (!a->starts[(unsigned char)text[at]] || !longest(t, a, text + at, end - at, id)) continue;
        *from = at;
        return true;
    }
    return false;
}
