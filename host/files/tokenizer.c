/* tokenizer.c - tokenizer.json into tables: vocabulary, added tokens, merges.
 *
 * A token of the vocabulary is written in the byte-level alphabet: every byte is one printable character
 * (GPT-2's table), so "Ġ" is a space. The tables hold real bytes. A token with a character outside that
 * alphabet (some files list control tokens in the vocabulary too) stands for its own text. With byte_fallback
 * (SentencePiece: Mixtral, Llama 2) tokens are written as themselves, U+2581 for a blank, and 256 tokens
 * `<0x00>`.. stand for the bytes of characters that are none.
 * exc_tokenizer.bytes holds all of them behind each other. Ids may have holes; every id, index and name from
 * the file is checked here, so that encode and decode need not. What the file asks for beyond the vocabulary
 * is read by recipe.c. */
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "tokenizer.h"

enum { MAX_ID = (1 << 24) - 1, TOKENIZER_LIMIT = 256 << 20 };

/* a token as the file writes it, while loading */
typedef struct loader {
    exc_ctx *ctx;
    exc_tokenizer *t;
    const char *what;       /* path, for messages */
    int16_t byte_of[0x144]; /* character of the byte-level alphabet -> byte, -1 */
    exc_buf bytes;
} loader;

/* Bytes that print keep their own character; the others get U+0100, U+0101, .. in order. */
static void alphabet(loader *l) {
    memset(l->byte_of, 0xff, sizeof l->byte_of);
    unsigned spare = 0x100;
    for (unsigned b = 0; b < 256; b++) {
        bool prints = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        l->byte_of[prints ? b : spare++] = (int16_t)b;
    }
}

/* Appends the bytes that a vocabulary entry stands for; false, and nothing appended, if it leaves the
 * alphabet. */
static bool put_word(const loader *l, exc_buf *out, const char *s, size_t n) {
    size_t before = out->len;
    if (l->t->by_char) {
        if (memchr(s, ' ', n)) return false; /* no text has one when merges begin */
        exc_spaces(s, n, out);
        return true;
    }
    for (size_t at = 0; at < n;) {
        uint32_t c = exc_utf8_next(s, &at);
        if (c >= EXC_COUNT(l->byte_of) || l->byte_of[c] < 0) {
            out->len = before;
            return false;
        }
        char byte = (char)l->byte_of[c];
        exc_buf_put(out, &byte, 1);
    }
    return true;
}

/* ----------------------------------------------------------------------------------------------------------
 * vocabulary */

static exc_status read_size(loader *l, const json_t *vocab, const json_t *added) {
    int64_t most = -1;
    const char *key;
    json_t *value;
    size_t i;
    json_object_foreach((json_t *)vocab, key, value) {
        int64_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        if (id < 0 || id > MAX_ID)
            return exc_fail(l->ctx, EXC_ERR_INPUT,
                            "%s: vocabulary: token \"%s\": expected an id from 0 to %d, found %lld", l->what,
                            exc_show(key, strlen(key)), MAX_ID, (long long)id);
        if (id > most) most = id;
    }
    json_array_foreach((json_t *)added, i, value) {
        int64_t id;
        EXC_TRY(exc_json_int(l->ctx, value, l->what, "id", 0, MAX_ID, &id));
        if (id > most) most = id;
    }
    if (most < 0) return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: the vocabulary is empty", l->what);
    l->t->size = (uint32_t)most + 1;
    l->t->tokens = exc_zalloc(l->ctx, l->t->size, sizeof *l->t->tokens, "vocabulary");
    return l->t->tokens ? EXC_OK : EXC_ERR_MEMORY;
}

/* the byte of a token `<0x41>`, -1: another token */
static int fallback_byte(const char *key, size_t n) {
    static const char digits[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(key, "<0x", 3) || key[5] != '>') return -1;
    const char *high = memchr(digits, key[3], 16), *low = memchr(digits, key[4], 16);
    return high && low ? (int)((high - digits) * 16 + (low - digits)) : -1;
}

static exc_status read_vocab(loader *l, const json_t *vocab) {
    const char *key;
    size_t n;
    json_t *value;
    json_object_keylen_foreach((json_t *)vocab, key, n, value) {
        exc_token *x = l->t->tokens + json_integer_value(value);
        if (x->flags)
            return exc_fail(l->ctx, EXC_ERR_INPUT,
                            "%s: vocabulary: id %lld belongs to two tokens, \"%s\" is one", l->what,
                            (long long)json_integer_value(value), exc_show(key, n));
        if (!n) return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: vocabulary: a token is empty", l->what);
        uint32_t begin = (uint32_t)l->bytes.len;
        int byte = l->t->by_char ? fallback_byte(key, n) : -1;
        if (byte >= 0) {
            exc_buf_put(&l->bytes, &(char){(char)byte}, 1);
            l->t->byte_id[byte] = (int32_t)json_integer_value(value);
            *x = (exc_token){begin, 1, EXC_TOKEN_BYTE};
            continue;
        }
        bool word = put_word(l, &l->bytes, key, n);
        if (!word) exc_buf_put(&l->bytes, key, n);
        *x = (exc_token){begin, (uint32_t)l->bytes.len - begin, word ? EXC_TOKEN_WORD : EXC_TOKEN_PLAIN};
    }
    return EXC_OK;
}

/* every single byte must be a token: then no text is without tokens, and there is no unknown token */
static exc_status read_byte_ids(loader *l) {
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        int64_t id = l->t->by_char ? l->t->byte_id[b] : exc_words_find(l->t, &byte, 1);
        if (id < 0)
            return exc_fail(l->ctx, EXC_ERR_INPUT,
                            "%s: vocabulary: expected a token for every byte (%s), found none "
                            "for 0x%02x" EXC_WAY_OUT,
                            l->what, l->t->by_char ? "byte_fallback" : "byte-level BPE", b);
        l->t->byte_id[b] = (int32_t)id;
    }
    return EXC_OK;
}

/* --------------------------------------------------------------------------------------------------------------
 * merges */

/* a merge is "left right", or [left, right] */
static bool merge_sides(const json_t *m, const char *side[2], size_t len[2]) {
    if (json_is_string(m)) {
        const char *s = json_string_value(m), *gap = strchr(s, ' ');
        if (!gap || strchr(gap + 1, ' ')) return false;
        side[0] = s;
        len[0] = (size_t)(gap - s);
        side[1] = gap + 1;
        len[1] = json_string_length(m) - len[0] - 1;
        return true;
    }
    for (size_t i = 0; i < 2; i++) {
        const json_t *x = json_array_get(m, i);
        if (!json_is_string(x)) return false;
        side[i] = json_string_value(x);
        len[i] = json_string_length(x);
    }
    return json_array_size(m) == 2;
}

static exc_status read_merge(loader *l, const json_t *m, size_t rank, exc_buf *b, exc_merge *out) {
    const char *side[2];
    size_t len[2], cut = 0;
    b->len = 0;
    bool fine = merge_sides(m, side, len) && put_word(l, b, side[0], len[0]) && (cut = b->len) > 0 &&
                put_word(l, b, side[1], len[1]) && b->len > cut;
    if (b->failed) return exc_fail(l->ctx, EXC_ERR_MEMORY, "%s: no memory for its merges", l->what);
    if (!fine)
        return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: merge %zu: expected two tokens, \"a b\" or [\"a\",\"b\"]",
                        l->what, rank);
    int64_t left = exc_words_find(l->t, b->data, cut),
            right = exc_words_find(l->t, b->data + cut, b->len - cut);
    int64_t id = exc_words_find(l->t, b->data, b->len);
    if (left < 0 || right < 0 || id < 0)
        return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: merge %zu: %s \"%s\" is not in the vocabulary", l->what,
                        rank, left < 0 || right < 0 ? "its part" : "its result",
                        left < 0    ? exc_show(side[0], len[0])
                        : right < 0 ? exc_show(side[1], len[1])
                                    : exc_show(b->data, b->len));
    *out = (exc_merge){(uint32_t)left, (uint32_t)right, (uint32_t)rank, (uint32_t)id};
    return EXC_OK;
}

static exc_status read_merges(loader *l, const json_t *merges) {
    size_t n = json_array_size(merges), i;
    json_t *m;
    exc_buf pair = {0};
    exc_merge *list = exc_alloc(l->ctx, n ? n : 1, sizeof *list, "merges");
    exc_status st = list ? EXC_OK : EXC_ERR_MEMORY;
    json_array_foreach((json_t *)merges, i, m) {
        if (st == EXC_OK) st = read_merge(l, m, i, &pair, list + i);
    }
    if (st == EXC_OK) st = exc_merges_build(l->ctx, l->t, list, n, l->what);
    exc_buf_free(&pair);
    exc_release(list);
    return st;
}

/* ------------------------------------------------------------------------------------------------------------
 * added tokens */

/* lstrip, rstrip and single_word would make a token eat or need what stands around it */
static exc_status read_added_one(loader *l, const json_t *o, bool *normal, int64_t *id) {
    static const char *const never[] = {"lstrip", "rstrip", "single_word"};
    const char *content;
    bool special;
    EXC_TRY(exc_json_string_or(l->ctx, o, l->what, "content", "", &content));
    size_t n = json_string_length(json_object_get(o, "content"));
    if (!n) return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: added_tokens: one has no content", l->what);
    for (size_t i = 0; i < EXC_COUNT(never); i++) {
        bool on;
        EXC_TRY(exc_json_bool_or(l->ctx, o, l->what, never[i], false, &on));
        if (on)
            return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: added token \"%s\": %s is not supported" EXC_WAY_OUT,
                            l->what, exc_show(content, n), never[i]);
    }
    EXC_TRY(exc_json_bool_or(l->ctx, o, l->what, "special", false, &special));
    EXC_TRY(exc_json_bool_or(l->ctx, o, l->what, "normalized", true, normal));
    EXC_TRY(exc_json_int(l->ctx, o, l->what, "id", 0, MAX_ID, id));
    if (*normal && l->t->by_char)
        return exc_fail(
            l->ctx, EXC_ERR_INPUT,
            "%s: added token \"%s\": normalized is not supported beside byte_fallback" EXC_WAY_OUT, l->what,
            exc_show(content, n));
    exc_token *x = l->t->tokens + *id;
    /* listed in the vocabulary as well: then it is the same token, whose bytes are the content itself */
    bool same = x->flags & EXC_TOKEN_PLAIN || (x->flags & EXC_TOKEN_WORD && x->len == n);
    if (x->flags && (!same || x->len != n || memcmp(l->bytes.data + x->begin, content, n)))
        return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: added token \"%s\": id %lld belongs to another token",
                        l->what, exc_show(content, n), (long long)*id);
    if (!x->flags) {
        *x = (exc_token){(uint32_t)l->bytes.len, (uint32_t)n, 0};
        exc_buf_put(&l->bytes, content, n);
    }
    x->flags |= EXC_TOKEN_ADDED | (special ? EXC_TOKEN_SPECIAL : 0);
    return EXC_OK;
}

static exc_status read_added(loader *l, const json_t *added) {
    size_t count = json_array_size(added), i;
    exc_added *const all[] = {&l->t->raw, &l->t->normal};
    for (size_t k = 0; k < 2; k++) {
        all[k]->ids = exc_alloc(l->ctx, count ? count : 1, sizeof *all[k]->ids, "added tokens");
        if (!all[k]->ids) return EXC_ERR_MEMORY;
    }
    json_t *o;
    json_array_foreach((json_t *)added, i, o) {
        bool normal;
        int64_t id;
        EXC_TRY(read_added_one(l, o, &normal, &id));
        all[normal]->ids[all[normal]->count++] = (uint32_t)id;
    }
    return EXC_OK;
}

/* ----------------------------------------------------------------------------------------------------------------
 * the whole */

static exc_status expect(loader *l, const json_t *model, const char *key, bool fine, const char *expected) {
    return fine ? EXC_OK
                : exc_fail(l->ctx, EXC_ERR_INPUT, "%s: model.%s: expected %s" EXC_WAY_OUT, l->what, key,
                           expected);
}

static bool nothing(const json_t *x) {
    return !x || json_is_null(x) || (json_is_string(x) && !json_string_length(x));
}

static exc_status read_model(loader *l, const json_t *model, const json_t *added) {
    const char *type;
    bool fallback;
    EXC_TRY(exc_json_string_or(l->ctx, model, l->what, "type", "BPE", &type));
    if (strcmp(type, "BPE"))
        return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: model.type: expected BPE, found %s" EXC_WAY_OUT, l->what,
                        exc_show(type, strlen(type)));
    EXC_TRY(expect(l, model, "continuing_subword_prefix",
                   nothing(json_object_get(model, "continuing_subword_prefix")), "none"));
    EXC_TRY(expect(l, model, "end_of_word_suffix", nothing(json_object_get(model, "end_of_word_suffix")),
                   "none"));
    const json_t *dropout = json_object_get(model, "dropout");
    EXC_TRY(expect(l, model, "dropout", nothing(dropout) || json_number_value(dropout) == 0, "none"));
    EXC_TRY(exc_json_bool_or(l->ctx, model, l->what, "byte_fallback", false, &fallback));
    l->t->by_char = fallback;
    for (int b = 0; b < 256; b++) l->t->byte_id[b] = -1;
    EXC_TRY(exc_json_bool_or(l->ctx, model, l->what, "ignore_merges", false, &l->t->ignore_merges));
    const json_t *vocab = json_object_get(model, "vocab"), *merges = json_object_get(model, "merges");
    EXC_TRY(expect(l, model, "vocab", json_is_object(vocab), "an object of token: id"));
    EXC_TRY(expect(l, model, "merges", json_is_array(merges), "a list of pairs"));
    EXC_TRY(read_size(l, vocab, added));
    EXC_TRY(read_vocab(l, vocab));
    if (!l->bytes.failed) EXC_TRY(read_added(l, added));
    if (l->bytes.failed) return exc_fail(l->ctx, EXC_ERR_MEMORY, "%s: no memory for its tokens", l->what);
    l->t->bytes = l->bytes.data;
    l->bytes.data = NULL;
    EXC_TRY(exc_words_build(l->ctx, l->t, l->what));
    EXC_TRY(read_byte_ids(l));
    EXC_TRY(read_merges(l, merges));
    EXC_TRY(exc_added_build(l->ctx, l->t, &l->t->raw, l->what));
    return exc_added_build(l->ctx, l->t, &l->t->normal, l->what);
}

static exc_status load(loader *l, const json_t *root) {
    const json_t *model = json_object_get(root, "model"), *added = json_object_get(root, "added_tokens");
    if (!json_is_object(model))
        return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: expected an object \"model\", found none", l->what);
    if (added && !json_is_array(added) && !json_is_null(added))
        return exc_fail(l->ctx, EXC_ERR_INPUT, "%s: added_tokens: expected a list", l->what);
    alphabet(l);
    EXC_TRY(read_model(l, model, added));
    return exc_recipe_read(l->ctx, l->t, root, l->what);
}

/* ------------------------------------------------------------------------------------------------------------
 * files */

/* what a folder's tokenizer is made of: tokenizer.json, or tiktoken.model and names in tokenizer_config.json
 */
typedef struct source {
    char *path, *text, *config_path, *config;
    size_t n, n_config;
} source;

static exc_status find_source(exc_ctx *ctx, const char *dir, source *s) {
    EXC_TRY(exc_path_join(ctx, dir, "tokenizer.json", &s->path));
    if (!access(s->path, F_OK)) return EXC_OK;
    char *ranks;
    EXC_TRY(exc_path_join(ctx, dir, "tiktoken.model", &ranks));
    if (access(ranks, F_OK)) {
        exc_release(ranks);
        return EXC_OK; /* neither: tokenizer.json is what is missed */
    }
    exc_release(s->path);
    s->path = ranks;
    return exc_path_join(ctx, dir, "tokenizer_config.json", &s->config_path);
}

static exc_status read_source(exc_ctx *ctx, const char *dir, source *s, char key[33]) {
    char both[66] = "";
    EXC_TRY(find_source(ctx, dir, s));
    EXC_TRY(exc_read_file(ctx, s->path, TOKENIZER_LIMIT, &s->text, &s->n));
    exc_hash_hex(s->text, s->n, key);
    if (!s->config_path) return EXC_OK;
    EXC_TRY(exc_read_file(ctx, s->config_path, TOKENIZER_LIMIT, &s->config, &s->n_config));
    memcpy(both, key, 33);
    exc_hash_hex(s->config, s->n_config, both + 32);
    exc_hash_hex(both, 64, key);
    return EXC_OK;
}

static exc_status make(exc_ctx *ctx, const source *s, exc_tokenizer *t) {
    json_t *root = NULL;
    loader l = {.ctx = ctx, .what = s->path, .t = t};
    exc_status st = s->config_path ? exc_json_parse(ctx, s->config_path, s->config, s->n_config, &root)
                                   : exc_json_parse(ctx, s->path, s->text, s->n, &root);
    if (st == EXC_OK)
        st = s->config_path ? exc_tiktoken_read(ctx, t, s->path, s->text, s->n, root, s->config_path)
                            : load(&l, root);
    json_decref(root);
    exc_buf_free(&l.bytes);
    return st;
}

static void drop(void *t) { exc_tokenizer_free(t); }

static exc_status make_and_keep(exc_ctx *ctx, const source *s, const char key[33], exc_tokenizer **out) {
    exc_tokenizer *t = exc_zalloc(ctx, 1, sizeof *t, "tokenizer");
    if (!t) return EXC_ERR_MEMORY;
    t->uses = 1;
    exc_status st = make(ctx, s, t);
    if (st != EXC_OK) {
        exc_tokenizer_free(t);
        return st;
    }
    if (ctx->kept.thing) ctx->kept.drop(ctx->kept.thing);
    ctx->kept = (struct exc_kept){.thing = t, .drop = drop};
    memcpy(ctx->kept.key, key, sizeof ctx->kept.key);
    *out = t;
    return EXC_OK;
}

/* Ids that the model has no row for would be met in the middle of the work: the folder is refused as a whole. A vocabulary
 * that is smaller than the model's is common, rows are padded. A folder without a model, or one whose config
 * is not what the model's own reader takes, is not judged here. */
static exc_status check_rows(exc_ctx *ctx, const char *dir, const char *what, const exc_tokenizer *t) {
    char *path;
    json_t *root = NULL;
    EXC_TRY(exc_path_join(ctx, dir, "config.json", &path));
    exc_status st = access(path, F_OK) ? EXC_OK : exc_json_load(ctx, path, 0, &root);
    const json_t *text = json_object_get(root, "text_config"), *rows = json_object_get(text ? text : root, "vocab_size");
    if (st == EXC_OK && json_is_integer(rows) && json_integer_value(rows) < (json_int_t)t->size)
        st = exc_fail(ctx, EXC_ERR_INPUT, "%s: vocabulary: expected ids below %lld (vocab_size of %s), found id %lld", what,
                      (long long)json_integer_value(rows), path, (long long)t->size - 1);
    json_decref(root);
    exc_release(path);
    return st;
}

/* Reading a large tokenizer takes half a second and a study asks for it six times, so the context keeps the
 * last one. It is known by its bytes: neither a copied folder nor a file written anew within a tick deceives.
 */
exc_status exc_tokenizer_load(exc_ctx *ctx, const char *model_dir, exc_tokenizer **out) {
    source s = {0};
    char key[33];
    *out = NULL;
    exc_status st = read_source(ctx, model_dir, &s, key);
    if (st == EXC_OK && ctx->kept.thing && !strcmp(ctx->kept.key, key))
        *out = ctx->kept.thing;
    else if (st == EXC_OK)
        st = make_and_keep(ctx, &s, key, out);
    if (st == EXC_OK) st = check_rows(ctx, model_dir, s.path, *out);
    if (st == EXC_OK) (*out)->uses++;
    else *out = NULL;
    exc_release(s.path);
    exc_release(s.text);
    exc_release(s.config_path);
    exc_release(s.config);
    return st;
}

exc_status exc_tokenizer_maybe(exc_ctx *ctx, const char *model_dir, exc_tokenizer **out) {
    source s = {0};
    *out = NULL;
    exc_status st = find_source(ctx, model_dir, &s);
    bool here = st == EXC_OK && !access(s.path, F_OK);
    exc_release(s.path);
    exc_release(s.config_path);
    return here ? exc_tokenizer_load(ctx, model_dir, out) : st;
}

void exc_tokenizer_free(exc_tokenizer *t) {
    if (!t || --t->uses > 0) return;
    exc_release(t->tokens);
    exc_free(t->bytes);
    exc_release(t->words);
    exc_release(t->merges);
    exc_release(t->raw.ids);
    exc_release(t->normal.ids);
    for (int i = 0; i < t->stages; i++) pcre2_code_free(t->stage[i]);
    exc_scratch_free(atomic_load(&t->spare));
    exc_release(t);
}

static int64_t find_plain(const exc_tokenizer *t, const char *name, size_t n) {
    for (uint32_t id = 0; id < t->size; id++)
        if (t->tokens[id].flags & (EXC_TOKEN_PLAIN | EXC_TOKEN_ADDED) && t->tokens[id].len == n &&
            !memcmp(t->bytes + t->tokens[id].begin, name, n))
            return id;
    return -1;
}

int32_t exc_tokenizer_id(const exc_tokenizer *t, const char *token) {
    size_t n = strlen(token);
    int64_t id = find_plain(t, token, n);
    if (id >= 0 || !exc_utf8_valid(token, n, NULL)) return (int32_t)id;
    loader l = {.t = (exc_tokenizer *)(uintptr_t)t};
    exc_buf word = {0};
    alphabet(&l);
    if (put_word(&l, &word, token, n) && word.len && !word.failed)
        id = exc_words_find(t, word.data, word.len);
    exc_buf_free(&word);
    return (int32_t)id;
}
