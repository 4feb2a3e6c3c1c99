/* encode.c - text to ids and back, by the tables of a loaded tokenizer.
 *
 * A text comes as parts: scaffolding of a chat template, in which added tokens are recognised, and what
 * people wrote, in which they are not. Merges may still cross from one to the other, as they do when a
 * template's result is tokenised as one string, so the parts are not encoded one by one: added tokens are
 * looked for in some of them only, and what lies between two added tokens is one stretch. The tokenizer
 * itself is read-only; what a call needs is in its scratch, and the last scratch, with its cache of pieces,
 * waits at the tokenizer for the next call. */
#include <stdatomic.h>
#include <string.h>

#include "tokenizer.h"

#define BLANK "\xe2\x96\x81" /* U+2581 */

enum { STACK_FIRST = 32 << 10, STACK_MOST = 16 << 20, MATCH_LIMIT = 50 * 1000 * 1000, MAX_TEXT = INT32_MAX };

/* ---------------------------------------------------------------------------------------------------- ids,
 * scratch */

exc_status exc_ids_reserve(exc_ctx *ctx, exc_ids *ids, size_t more) {
    if (ids->cap - ids->len >= more) return EXC_OK;
    size_t cap = ids->cap ? ids->cap : 64;
    while (cap - ids->len < more) cap *= 2;
    int32_t *data = exc_alloc(ctx, cap, sizeof *data, "token ids");
    if (!data) return EXC_ERR_MEMORY;
    if (ids->len) memcpy(data, ids->data, ids->len * sizeof *data);
    exc_release(ids->data);
    ids->data = data;
    ids->cap = cap;
    return EXC_OK;
}

void exc_ids_free(exc_ids *ids) {
    exc_release(ids->data);
    *ids = (exc_ids){0};
}

void exc_scratch_free(exc_scratch *w) {
    if (!w) return;
    pcre2_match_data_free(w->match);
    pcre2_match_context_free(w->limits);
    pcre2_jit_stack_free(w->stack);
    exc_release(w->cache);
    exc_release(w->room);
    exc_buf_free(&w->text);
    exc_buf_free(&w->stretch);
    exc_release(w->parts);
    exc_release(w);
}

static exc_status take_scratch(exc_ctx *ctx, const exc_tokenizer *t, exc_scratch **out) {
    exc_scratch *w = atomic_exchange(&((exc_tokenizer *)t)->spare, NULL);
    *out = w;
    if (w) return EXC_OK;
    w = exc_zalloc(ctx, 1, sizeof *w, "tokenizer scratch");
    if (!w) return EXC_ERR_MEMORY;
    w->match = pcre2_match_data_create(1, NULL);
    w->limits = pcre2_match_context_create(NULL);
    w->stack = pcre2_jit_stack_create(STACK_FIRST, STACK_MOST, NULL); /* NULL without JIT: fine */
    exc_status st = exc_cache_open(ctx, w);
    if (st == EXC_OK && (!w->match || !w->limits)) st = exc_fail(ctx, EXC_ERR_MEMORY, "tokenizer: no memory");
    if (st != EXC_OK) {
        exc_scratch_free(w);
        return st;
    }
    pcre2_jit_stack_assign(w->limits, NULL, w->stack);
    pcre2_set_match_limit(w->limits, MATCH_LIMIT);
    *out = w;
    return EXC_OK;
}

static void give_scratch(const exc_tokenizer *t, exc_scratch *w) {
    exc_scratch_free(atomic_exchange(&((exc_tokenizer *)t)->spare, w));
}

/* ---------------------------------------------------------------------------------------------------- parts
 * of a text */

/* a text with its parts; the ends of the parts are places in the text */
typedef struct view {
    const char *text;
    const exc_part *parts;
    size_t n_parts;
} view;

typedef struct encoder {
    exc_ctx *ctx;
    const exc_tokenizer *t;
    exc_scratch *w;
    exc_ids *ids;
    exc_buf *content; /* NULL: not wanted */
} encoder;

static size_t part_begin(const view *v, size_t i) { return i ? v->parts[i - 1].end : 0; }

/* The next added token in [at, end), in the parts that allow one. *part is where the search stands: `at` only
 * grows. */
static bool next_added(const encoder *e, const view *v, const exc_added *a, size_t at, size_t end,
                       size_t *part, size_t *from, uint32_t *id) {
    for (size_t i = *part; a->count && i < v->n_parts && part_begin(v, i) < end;) {
        size_t last = i;
        if (v->parts[i].kind & EXC_PART_MATCH)
            while (last + 1 < v->n_parts && v->parts[last + 1].kind & EXC_PART_MATCH) last++;
        size_t begin = part_begin(v, i) > at ? part_begin(v, i) : at;
        size_t stop = v->parts[last].end < end ? v->parts[last].end : end;
        *part = i;
        if (v->parts[i].kind & EXC_PART_MATCH && begin < stop &&
            exc_added_next(e->t, a, v->text, begin, stop, from, id))
            return true;
        i = last + 1;
    }
    return false;
}

static exc_status put_added(encoder *e, uint32_t id) {
    EXC_TRY(exc_ids_reserve(e->ctx, e->ids, 1));
    e->ids->data[e->ids->len++] = (int32_t)id;
    if (e->content) exc_buf_put(e->content, "\0", 1);
    return EXC_OK;
}

/* text[begin, end) without added tokens: pieces, merges; then which of the new tokens lie whole in content.
 * The blank in front of a SentencePiece word is not looked at: the one before a prompt's first word is the
 * template's. */
static exc_status ordinary(encoder *e, const view *v, size_t begin, size_t end) {
    if (begin == end) return EXC_OK;
    size_t first = e->ids->len, part = 0;
    EXC_TRY(exc_pieces(e->ctx, e->t, e->w, 0, v->text + begin, end - begin, e->ids));
    if (!e->content) return EXC_OK;
    for (size_t i = first, at = begin; i < e->ids->len; i++) {
        size_t len = e->t->tokens[e->ids->data[i]].len, after = at + len;
        size_t from = at + (e->t->by_char && len > 1 && v->text[at] == ' ');
        while (v->parts[part].end <= from) part++;
        char yes = v->parts[part].kind & EXC_PART_CONTENT && after <= v->parts[part].end;
        exc_buf_put(e->content, &yes, 1);
        at = after;
    }
    return EXC_OK;
}

/* a normalised stretch: added tokens that are matched after normalisation, and what lies between */
static exc_status normalised(encoder *e, const view *v, size_t begin, size_t end) {
    size_t at = begin, part = 0, from = 0;
    uint32_t id = 0;
    while (next_added(e, v, &e->t->normal, at, end, &part, &from, &id)) {
        EXC_TRY(ordinary(e, v, at, from));
        EXC_TRY(put_added(e, id));
        at = from + e->t->tokens[id].len;
    }
    return ordinary(e, v, at, end);
}

static bool begins_blank(const char *s, size_t n) {
    return n && (*s == ' ' || (n >= 3 && !memcmp(s, BLANK, 3)));
}

void exc_spaces(const char *s, size_t n, exc_buf *out) {
    for (const char *end = s + n, *at; s < end; s = at + 3) {
        at = memmem(s, (size_t)(end - s), BLANK, 3);
        exc_buf_put(out, s, (size_t)((at ? at : end) - s));
        if (!at) return;
        exc_buf_put(out, " ", 1);
    }
}

/* text[begin, end) in its normal form, into w->text */
static void normal_form(const encoder *e, const char *text, size_t begin, size_t end) {
    exc_scratch *w = e->w;
    const char *s = text + begin;
    w->text.len = 0;
    if (!e->t->by_char) {
        exc_nfc(s, end - begin, &w->text, &w->stretch);
        return;
    }
    bool missing = !begins_blank(s, end - begin);
    if (e->t->lead == EXC_LEAD_EVERY || (e->t->lead == EXC_LEAD_MISSING && missing) ||
        (e->t->lead == EXC_LEAD_FIRST && missing && !begin))
        exc_buf_put(&w->text, " ", 1);
    exc_spaces(s, end - begin, &w->text);
}

/* The parts of a stretch in its normalised form: a part ends where the normal form of all before its end
 * does. (Where a mark
 * composes across that line, it stays where the shorter form ended.) */
static exc_status normal_view(encoder *e, const view *v, size_t begin, size_t end, view *out) {
    exc_scratch *w = e->w;
    if (w->parts_cap < v->n_parts) {
        exc_release(w->parts);
        w->parts_cap = 0;
        w->parts = exc_alloc(e->ctx, v->n_parts, sizeof *w->parts, "parts of a text");
        if (!w->parts) return EXC_ERR_MEMORY;
        w->parts_cap = v->n_parts;
    }
    size_t n = 0;
    for (size_t i = 0; i < v->n_parts && part_begin(v, i) < end; i++) {
        if (v->parts[i].end <= begin) continue;
        size_t stop = v->parts[i].end < end ? v->parts[i].end : end;
        normal_form(e, v->text, begin, stop);
        w->parts[n++] = (exc_part){w->text.len, v->parts[i].kind};
    }
    if (w->text.failed) return exc_fail(e->ctx, EXC_ERR_MEMORY, "tokenizer: no memory for normalised text");
    *out = (view){w->text.data, w->parts, n};
    return EXC_OK;
}

static exc_status stretch(encoder *e, const view *v, size_t begin, size_t end) {
    if (begin == end) return EXC_OK;
    bool as_it_is = !e->t->by_char && (!e->t->nfc || exc_nfc_is(v->text + begin, end - begin));
    if (as_it_is) return normalised(e, v, begin, end);
    view n;
    EXC_TRY(normal_view(e, v, begin, end, &n));
    return normalised(e, &n, 0, e->w->text.len);
}

static exc_status all(encoder *e, const view *v, size_t n, bool frame) {
    size_t at = 0, part = 0, from = 0;
    uint32_t id = 0;
    for (int i = 0; frame && i < e->t->n_before; i++) EXC_TRY(put_added(e, (uint32_t)e->t->before[i]));
    while (next_added(e, v, &e->t->raw, at, n, &part, &from, &id)) {
        EXC_TRY(stretch(e, v, at, from));
        EXC_TRY(put_added(e, id));
        at = from + e->t->tokens[id].len;
    }
    EXC_TRY(stretch(e, v, at, n));
    for (int i = 0; frame && i < e->t->n_after; i++) EXC_TRY(put_added(e, (uint32_t)e->t->after[i]));
    if (e->content && e->content->failed) return exc_fail(e->ctx, EXC_ERR_MEMORY, "tokenizer: no memory");
    return EXC_OK;
}

exc_status exc_encode_parts(exc_ctx *ctx, const exc_tokenizer *t, const char *text, const exc_part *parts,
                            size_t n_parts, bool frame, exc_ids *ids, exc_buf *content) {
    size_t n = n_parts ? parts[n_parts - 1].end : 0, bad = 0;
    if (n > MAX_TEXT)
        return exc_fail(ctx, EXC_ERR_INPUT, "text: expected at most %d bytes, found %zu", MAX_TEXT, n);
    if (!exc_utf8_valid(text, n, &bad))
        return exc_fail(ctx, EXC_ERR_INPUT, "text: expected UTF-8, found byte %s at %zu",
                        exc_show(text + bad, 1), bad);
    encoder e = {ctx, t, NULL, ids, content};
    view v = {text, parts, n_parts};
    EXC_TRY(take_scratch(ctx, t, &e.w));
    exc_status st = all(&e, &v, n, frame);
    e.w->text.failed = e.w->stretch.failed = false;
    give_scratch(t, e.w);
    return st;
}

/* ------------------------------------------------------------------------------------------------------------
 * public */

exc_status exc_tokenizer_encode(exc_ctx *ctx, const exc_tokenizer *t, const char *text, size_t n,
                                bool special, exc_ids *ids) {
    exc_part whole = {n, special ? EXC_PART_MATCH : 0};
    return exc_encode_parts(ctx, t, text, &whole, 1, special, ids, NULL);
}

/* bytes that characters fell back to: a text where they are UTF-8, else as many U+FFFD */
static void put_bytes(exc_buf *out, exc_buf *run) {
    if (run->len && exc_utf8_valid(run->data, run->len, NULL))
        exc_buf_put(out, run->data, run->len);
    else
        for (size_t i = 0; i < run->len; i++) exc_buf_puts(out, "\xef\xbf\xbd");
    run->len = 0;
}

exc_status exc_tokenizer_decode(exc_ctx *ctx, const exc_tokenizer *t, const int32_t *ids, size_t n,
                                bool skip_special, exc_buf *out) {
    size_t begin = out->len;
    exc_buf run = {0};
    exc_status st = EXC_OK;
    for (size_t i = 0; i < n && st == EXC_OK; i++) {
        if (ids[i] < 0)
            st = exc_fail(ctx, EXC_ERR_INPUT, "token %zu: expected an id of 0 or more, found %d", i, ids[i]);
        if (ids[i] < 0 || (uint32_t)ids[i] >= t->size || !t->tokens[ids[i]].flags) continue; /* padding of a vocabulary */
        const exc_token *x = t->tokens + ids[i];
        if (x->flags & EXC_TOKEN_BYTE) {
            exc_buf_put(&run, t->bytes + x->begin, 1);
        } else if (!skip_special || !(x->flags & EXC_TOKEN_SPECIAL)) {
            put_bytes(out, &run);
            exc_buf_put(out, t->bytes + x->begin, x->len);
        }
    }
    put_bytes(out, &run);
    if (t->strip && out->len > begin && out->data[begin] == ' ')
        memmove(out->data + begin, out->data + begin + 1, out->len-- - begin);
    bool failed = out->failed || run.failed;
    exc_buf_free(&run);
    return st == EXC_OK && failed ? exc_fail(ctx, EXC_ERR_MEMORY, "no memory for decoded text") : st;
}

int64_t exc_tokenizer_size(const exc_tokenizer *t) { return t->size; }

bool exc_tokenizer_is_special(const exc_tokenizer *t, int32_t id) {
    return id >= 0 && (uint32_t)id < t->size && t->tokens[id].flags & EXC_TOKEN_SPECIAL;
}
