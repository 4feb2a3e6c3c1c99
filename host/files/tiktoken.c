/* tiktoken.c - the tokenizer of Kimi and Moonlight, which have no tokenizer.json: `tiktoken.model`, lines of
 * base64 bytes and a rank, and the names of the special tokens in tokenizer_config.json.
 *
 * The rank of a token is its id, and merging always joins the neighbours whose bytes together have the lowest
 * rank. That is BPE by a list of merges once every way to cut a token into two tokens stands in the list, at
 * the token's rank; a piece that is a token is taken whole. The 256 ids behind the last rank are special;
 * those without a name are <|reserved_token_ID|>. The pattern is not in the files but in the Python beside
 * them; classes with && (which PCRE2 lacks) are written with a look-ahead here. Not done: the wrapper's cut
 * of texts beyond 400,000 characters and of runs beyond 25,000. */
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"

enum { RESERVED = 256, MOST_RANKS = 1 << 22 };

#define HAN_NOT "(?!\\p{Han})"
#define UPPER "(?:" HAN_NOT "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}])"
#define LOWER "(?:" HAN_NOT "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}])"
#define CONTRACTION "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
static const char pattern[] =
    "[\\p{Han}]+|[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?" UPPER
    "+" LOWER "*" CONTRACTION "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

typedef struct ranks {
    exc_ctx *ctx;
    exc_tokenizer *t;
    const char *what;
    uint32_t base; /* ranks: ids below it */
    exc_buf bytes;
} ranks;

static int sextet(char c) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c ? strchr(digits, c) : NULL;
    return at ? (int)(at - digits) : -1;
}

/* base64 [n] appended as bytes; false where it is none */
static bool put_base64(exc_buf *out, const char *s, size_t n) {
    if (!n || n % 4) return false;
    for (size_t i = 0; i < n; i += 4) {
        int v[4], k = i + 4 == n ? (s[i + 3] == '=') + (s[i + 2] == '=' && s[i + 3] == '=') : 0;
        for (int c = 0; c < 4; c++) v[c] = c >= 4 - k ? 0 : sextet(s[i + (size_t)c]);
        if (v[0] < 0 || v[1] < 0 || v[2] < 0 || v[3] < 0) return false;
        char three[3] = {(char)(v[0] << 2 | v[1] >> 4), (char)(v[1] << 4 | v[2] >> 2),
                         (char)(v[2] << 6 | v[3])};
        exc_buf_put(out, three, (size_t)(3 - k));
    }
    return true;
}

/* "base64 rank" */
static exc_status read_line(ranks *r, const char *s, size_t n, size_t number) {
    const char *gap = memchr(s, ' ', n);
    uint64_t rank = 0;
    size_t begin = r->bytes.len, digits = gap ? (size_t)(s + n - gap) - 1 : 0;
    bool fine = gap && digits && digits < 8 && put_base64(&r->bytes, s, (size_t)(gap - s));
    for (size_t i = 0; fine && i < digits; i++) {
        fine = gap[1 + i] >= '0' && gap[1 + i] <= '9';
        rank = rank * 10 + (uint64_t)(gap[1 + i] - '0');
    }
    if (!fine || rank >= r->base)
        return exc_fail(r->ctx, EXC_ERR_INPUT,
                        "%s:%zu: expected base64 and a rank below %u (the lines), found \"%s\"", r->what,
                        number, r->base, exc_show(s, n));
    exc_token *x = r->t->tokens + rank;
    if (x->flags)
        return exc_fail(r->ctx, EXC_ERR_INPUT, "%s:%zu: expected each rank once, found %u twice", r->what,
                        number, (unsigned)rank);
    *x = (exc_token){(uint32_t)begin, (uint32_t)(r->bytes.len - begin), EXC_TOKEN_WORD};
    return EXC_OK;
}

static exc_status read_lines(ranks *r, const char *text, size_t n) {
    size_t lines = 0, number = 0;
    for (size_t i = 0; i < n; i++) lines += text[i] == '\n' && i && text[i - 1] != '\n';
    lines += n && text[n - 1] != '\n';
    if (!lines || lines > MOST_RANKS)
        return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: expected 256 to %d lines, found %zu", r->what, MOST_RANKS,
                        lines);
    r->base = (uint32_t)lines;
    r->t->size = r->base + RESERVED;
    r->t->tokens = exc_zalloc(r->ctx, r->t->size, sizeof *r->t->tokens, "vocabulary");
    if (!r->t->tokens) return EXC_ERR_MEMORY;
    for (const char *s = text, *end = text + n; s < end;) {
        const char *stop = memchr(s, '\n', (size_t)(end - s));
        size_t len = (size_t)((stop ? stop : end) - s);
        number++;
        if (len) EXC_TRY(read_line(r, s, len, number));
        s += len + 1;
    }
    return EXC_OK;
}

/* every cut of every token into two tokens is a merge at the token's rank */
static exc_status make_merges(ranks *r) {
    exc_tokenizer *t = r->t;
    exc_buf list = {0};
    for (uint32_t id = 0; id < r->base; id++) {
        const exc_token *x = t->tokens + id;
        const char *s = t->bytes + x->begin;
        for (uint32_t cut = 1; cut < x->len; cut++) {
            int64_t left = exc_words_find(t, s, cut),
                    right = left < 0 ? -1 : exc_words_find(t, s + cut, x->len - cut);
            exc_merge m = {(uint32_t)left, (uint32_t)right, id, id};
            if (right >= 0) exc_buf_put(&list, &m, sizeof m);
        }
    }
    exc_status st = list.failed ? exc_fail(r->ctx, EXC_ERR_MEMORY, "%s: no memory for its merges", r->what)
                                : exc_merges_build(r->ctx, t, (const exc_merge *)(const void *)list.data,
                                                   list.len / sizeof(exc_merge), r->what);
    exc_buf_free(&list);
    return st;
}

/* names from tokenizer_config.json: added_tokens_decoder, {"163584": {"content": "[BOS]"}, ..} */
static exc_status read_special(ranks *r, const json_t *config, const char *where) {
    const json_t *named = json_object_get(config, "added_tokens_decoder");
    const char *key;
    json_t *entry;
    json_object_foreach((json_t *)named, key, entry) {
        char *end;
        unsigned long id = strtoul(key, &end, 10);
        if (*end || id < r->base || id >= r->t->size)
            return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: added_tokens_decoder: expected ids %u..%u, found %s",
                            where, r->base, r->t->size - 1, exc_show(key, strlen(key)));
    }
    for (uint32_t id = r->base; id < r->t->size; id++) {
        char number[16], reserved[40];
        const char *name;
        snprintf(number, sizeof number, "%u", id);
        snprintf(reserved, sizeof reserved, "<|reserved_token_%u|>", id);
        EXC_TRY(
            exc_json_string_or(r->ctx, json_object_get(named, number), where, "content", reserved, &name));
        if (!*name)
            return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: added_tokens_decoder: %u has no content", where, id);
        r->t->tokens[id] =
            (exc_token){(uint32_t)r->bytes.len, (uint32_t)strlen(name), EXC_TOKEN_ADDED | EXC_TOKEN_SPECIAL};
        exc_buf_puts(&r->bytes, name);
        r->t->raw.ids[r->t->raw.count++] = id;
    }
    return EXC_OK;
}

static exc_status build(ranks *r, const char *text, size_t n, const json_t *config, const char *where) {
    exc_tokenizer *t = r->t;
    EXC_TRY(read_lines(r, text, n));
    t->raw.ids = exc_alloc(r->ctx, RESERVED, sizeof *t->raw.ids, "added tokens");
    if (!t->raw.ids) return EXC_ERR_MEMORY;
    EXC_TRY(read_special(r, config, where));
    if (r->bytes.failed) return exc_fail(r->ctx, EXC_ERR_MEMORY, "%s: no memory for its tokens", r->what);
    t->bytes = r->bytes.data;
    r->bytes.data = NULL;
    t->ignore_merges = true;
    EXC_TRY(exc_words_build(r->ctx, t, r->what));
    for (int b = 0; b < 256; b++) {
        int64_t id = exc_words_find(t, &(char){(char)b}, 1);
        if (id < 0)
            return exc_fail(r->ctx, EXC_ERR_INPUT,
                            "%s: expected a token for every byte, found none for 0x%02x", r->what, b);
        t->byte_id[b] = (int32_t)id;
    }
    EXC_TRY(make_merges(r));
    EXC_TRY(exc_added_build(r->ctx, t, &t->raw, r->what));
    return exc_stage_add(r->ctx, t, r->what, pattern, sizeof pattern - 1, false);
}

exc_status exc_tiktoken_read(exc_ctx *ctx, exc_tokenizer *t, const char *what, const char *text, size_t n,
                             const json_t *config, const char *where) {
    ranks r = {.ctx = ctx, .t = t, .what = what};
    exc_status st = build(&r, text, n, config, where);
    exc_buf_free(&r.bytes);
    return st;
}
