/* text.c - is it the tokenizer? Goldens of three real ones and of their chat templates, exact; then what
 * goldens cannot show: merges against a naive oracle, normalisation against hashes of Python's unicodedata,
 * refusals, any text there and back, threads. */
#include "helpers.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "chat.h"

static char *unpacked; /* folder with the real tokenizers, unpacked */

static int unpack(void **state) {
    static const char *const names[] = {"qwen3", "deepseek_v3", "gptoss"};
    unpacked = test_tmpdir();
    for (size_t i = 0; i < EXC_COUNT(names); i++) {
        char *command, *said;
        const char *from = test_data("tokenizers");
        assert_true(asprintf(&command,
                             "mkdir %s/%s && cp %s/%s/*.json* %s/%s/ && xz -d %s/%s/*.xz",
                             unpacked, names[i], from, names[i], unpacked, names[i], unpacked, names[i]) > 0);
        if (test_shell(command, &said)) fail_msg("%s: %s", command, said);
        free(command);
        free(said);
    }
    return 0;
}

static void ok(exc_ctx *ctx, exc_status st) {
    if (st != EXC_OK) fail_msg("%s", exc_ctx_error(ctx));
}

static exc_tokenizer *open_tokenizer(exc_ctx *ctx, const char *dir) {
    exc_tokenizer *t = NULL;
    ok(ctx, exc_tokenizer_load(ctx, dir, &t));
    return t;
}

/* calls fn for every JSON line of a file */
static void each_line(exc_ctx *ctx, const char *path, void (*fn)(exc_ctx *, const json_t *, void *),
                      void *user) {
    size_t n;
    char *text = test_read(path, &n);
    for (char *s = text, *end; s < text + n; s = end + 1) {
        json_t *o;
        end = strchr(s, '\n');
        if (!end) end = text + n;
        ok(ctx, exc_json_parse_text(ctx, path, s, (size_t)(end - s), &o));
        fn(ctx, o, user);
        json_decref(o);
    }
    free(text);
}

static void assert_ids(const json_t *want, const int32_t *ids, size_t n, const char *text) {
    bool same = json_array_size(want) == n;
    for (size_t i = 0; same && i < n; i++) same = json_integer_value(json_array_get(want, i)) == ids[i];
    if (!same) fail_msg("other ids for: %s", exc_show(text, strlen(text)));
}

/* -------------------------------------------------------------------------------------------------------------------
 * goldens */

static void golden_line(exc_ctx *ctx, const json_t *o, void *user) {
    const json_t *text = json_object_get(o, "text"), *decoded = json_object_get(o, "decoded");
    const char *s = json_string_value(text);
    exc_ids ids = {0};
    exc_buf back = {0};
    ok(ctx, exc_tokenizer_encode(ctx, user, s, json_string_length(text),
                                 json_is_true(json_object_get(o, "special")), &ids));
    assert_ids(json_object_get(o, "ids"), ids.data, ids.len, s);
    ok(ctx, exc_tokenizer_decode(ctx, user, ids.data, ids.len, false, &back));
    assert_int_equal(back.len, json_string_length(decoded));
    if (back.len) assert_memory_equal(back.data, json_string_value(decoded), back.len);
    exc_ids_free(&ids);
    exc_buf_free(&back);
}

struct chat_case {
    exc_tokenizer *t;
    exc_chat *chat;
    const char *dir;
};

static void chat_line(exc_ctx *ctx, const json_t *o, void *user) {
    struct chat_case *c = user;
    const json_t *thinking = json_object_get(o, "enable_thinking"), *text = json_object_get(o, "text");
    exc_buf out = {0};
    ok(ctx, exc_chat_render(ctx, c->chat, json_object_get(o, "messages"),
                            json_is_true(json_object_get(o, "add_generation_prompt")),
                            thinking ? json_is_true(thinking) : -1, &out));
    assert_string_equal(out.data, json_string_value(text));
    exc_buf_free(&out);
    char *line = json_dumps(o, JSON_COMPACT);
    const char *path = test_path(c->dir, "one.jsonl");
    json_t *prompt = json_copy((json_t *)o);
    json_object_del(prompt, "text"); /* the rendering; a prompt line has text or messages */
    free(line);
    line = json_dumps(prompt, JSON_COMPACT);
    test_write(path, line, strlen(line));
    exc_prompt_options opt = EXC_PROMPT_OPTIONS;
    exc_prompts *p = NULL;
    ok(ctx, exc_prompts_read(ctx, c->t, c->chat, path, &opt, &p));
    assert_int_equal(exc_prompts_count(p), 1);
    assert_ids(json_object_get(o, "ids"), p->tokens, (size_t)p->begin[1], line);
    exc_prompts_free(p);
    json_decref(prompt);
    free(line);
}

/* encode and decode, then the same file through the verb `tokenize`, then the chat goldens */
static void goldens(const char *name, bool chat) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = test_path(unpacked, name), *out = test_path(dir, "out.jsonl");
    exc_tokenizer *t = open_tokenizer(ctx, dir);
    each_line(ctx, test_path(dir, "golden.jsonl"), golden_line, t);
    ok(ctx, exc_tokenize(ctx, dir, test_path(dir, "golden.jsonl"), out, 0, 0, NULL));
    test_refused(ctx, exc_tokenize(ctx, dir, test_path(dir, "golden.jsonl"), out, 0, 0, NULL), EXC_ERR_USAGE,
                 "--force", NULL);
    size_t n, at = 0;
    char *lines = test_read(out, &n), *golden = test_read(test_path(dir, "golden.jsonl"), NULL), *g = golden;
    for (char *s = lines; *s; s = strchr(s, '\n') + 1, g = strchr(g, '\n') + 1, at++) {
        json_t *a = json_loadb(s, (size_t)(strchr(s, '\n') - s), 0, NULL);
        json_t *b = json_loadb(g, (size_t)(strchr(g, '\n') - g), JSON_ALLOW_NUL, NULL);
        assert_true(json_equal(json_object_get(a, "ids"), json_object_get(b, "ids")));
        json_decref(a);
        json_decref(b);
    }
    assert_int_equal(at, 334);
    free(lines);
    free(golden);
    if (chat) {
        struct chat_case c = {t, NULL, dir};
        exc_clear(ctx);
        ok(ctx, exc_chat_load(ctx, dir, NULL, &c.chat));
        each_line(ctx, test_path(dir, "chat_golden.jsonl"), chat_line, &c);
        exc_chat_free(c.chat);
    }
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

static void golden_qwen3(void **state) { goldens("qwen3", true); }
static void golden_deepseek_v3(void **state) { goldens("deepseek_v3", true); }
static void golden_gptoss(void **state) { goldens("gptoss", false); }

/* ----------------------------------------------------------------------------------------------------
 * normalisation */

/* hashes of what Python 3.11's unicodedata (Unicode 14) gives for the same texts */
static void nfc_of_every_code_point(void **state) {
    exc_buf all = {0}, stretch = {0}, one = {0};
    char hash[33];
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xd800 && c < 0xe000) continue;
        one.len = 0;
        exc_utf8_put(&one, c);
        if (c) exc_buf_puts(&all, "\n");
        exc_nfc(one.data, one.len, &all, &stretch);
    }
    exc_hash_hex(all.data, all.len, hash);
    assert_string_equal(hash, "251779136c889acc3ae5464e24ac9513");
    exc_buf_free(&all);
    exc_buf_free(&stretch);
    exc_buf_free(&one);
}

static uint64_t lcg_state;
static uint64_t lcg(void) {
    lcg_state = lcg_state * 6364136223846793005u + 1442695040888963407u;
    return lcg_state >> 33;
}

static void nfc_of_sequences(void **state) {
    static const uint32_t marks[] = {0x300,  0x301,  0x308, 0x323, 0x338, 0x327,   0x345, 0x1161,
                                     0x11a8, 0x3099, 0x93c, 0x5b4, 0x5b0, 0x1d165, 0x9be};
    static const uint32_t bases[] = {0x41,    0x65,  0x3b1,  0xac00, 0x1100, 0x304b, 0x915, 0x5d0,
                                     0x1d157, 0x9c7, 0x212b, 0xe9,   0x3c,   0x4e00, 0x20};
    exc_buf all = {0}, stretch = {0}, text = {0}, again = {0};
    char hash[33];
    lcg_state = 12345;
    for (int i = 0; i < 20000; i++) {
        text.len = again.len = 0;
        for (uint64_t n = lcg() % 9; n; n--) {
            uint64_t r = lcg();
            exc_utf8_put(&text, (r % 3 ? marks : bases)[r / 3 % 15]);
        }
        if (i) exc_buf_puts(&all, "\n");
        size_t before = all.len;
        exc_nfc(text.data, text.len, &all, &stretch);
        exc_nfc(all.data + before, all.len - before, &again, &stretch); /* normal form stays */
        assert_int_equal(again.len, all.len - before);
        if (again.len) assert_memory_equal(again.data, all.data + before, again.len);
        if (text.len && exc_nfc_is(text.data, text.len)) assert_int_equal(text.len, again.len);
    }
    exc_hash_hex(all.data, all.len, hash);
    assert_string_equal(hash, "765302d09e623c93db4bfbe5ccd29831");
    exc_buf_free(&all);
    exc_buf_free(&stretch);
    exc_buf_free(&text);
    exc_buf_free(&again);
}

/* ------------------------------------------------------------------------------------------------- small
 * tokenizers */

/* a tokenizer.json of 256 bytes and a few merges over a, b, c; NULL arguments take the plain value */
typedef struct recipe_text {
    const char *normalizer, *pre, *post, *decoder, *model, *merges, *vocab, *added;
} recipe_text;
#define LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"

static void put_alphabet(exc_buf *b) {
    unsigned spare = 0x100;
    for (unsigned i = 0; i < 256; i++) {
        bool prints = (i >= '!' && i <= '~') || (i >= 0xa1 && i <= 0xac) || i >= 0xae;
        exc_buf_puts(b, i ? ",\"" : "\"");
        if (i == '"' || i == '\\') exc_buf_puts(b, "\\");
        exc_utf8_put(b, prints ? i : spare++);
        exc_buf_printf(b, "\":%u", i);
    }
}

static const char *write_recipe(const recipe_text *r) {
    const char *dir = test_tmpdir();
    exc_buf b = {0};
    exc_buf_printf(
        &b,
        "{\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,\"post_processor\":%s,\"decoder\":%s,",
        r->added ? r->added : "", r->normalizer ? r->normalizer : "null", r->pre ? r->pre : LEVEL,
        r->post ? r->post : "null", r->decoder ? r->decoder : "{\"type\":\"ByteLevel\"}");
    exc_buf_printf(&b, "\"model\":{%s\"vocab\":{", r->model ? r->model : "\"type\":\"BPE\",");
    put_alphabet(&b);
    exc_buf_printf(&b,
                   ",\"ab\":256,\"abc\":257,\"aa\":258,\"bc\":259,\"aaaa\":260,\"ca\":261,\"cab\":262%s},",
                   r->vocab ? r->vocab : "");
    exc_buf_printf(
        &b, "\"merges\":[%s]}}",
        r->merges
            ? r->merges
            : "[\"a\",\"a\"],\"a b\",[\"ab\",\"c\"],\"b c\",[\"aa\",\"aa\"],[\"c\",\"a\"],[\"c\",\"ab\"]");
    test_write(test_path(dir, "tokenizer.json"), b.data, b.len);
    exc_buf_free(&b);
    return dir;
}

/* the definition of BPE, slowly: the lowest rank anywhere, leftmost first */
static size_t naive(const char *s, size_t n, int32_t *ids) {
    static const int32_t rule[][3] = {{'a', 'a', 258}, {'a', 'b', 256}, {256, 'c', 257}, {'b', 'c', 259},
                                      {258, 258, 260}, {'c', 'a', 261}, {'c', 256, 262}};
    for (size_t i = 0; i < n; i++) ids[i] = (unsigned char)s[i];
    for (size_t r = 0; r < EXC_COUNT(rule); r++)
        for (size_t i = 0; i + 1 < n; i++) {
            if (ids[i] != rule[r][0] || ids[i + 1] != rule[r][1]) continue;
            ids[i] = rule[r][2];
            memmove(ids + i + 1, ids + i + 2, (n - i - 2) * sizeof *ids);
            n--;
            r = (size_t)-1; /* from the first rule again */
            break;
        }
    return n;
}

static void merges_against_a_naive_oracle(void **state) {
    exc_ctx *ctx = test_ctx(1);
    recipe_text plain = {0};
    exc_tokenizer *t = open_tokenizer(ctx, write_recipe(&plain));
    char text[400];
    int32_t want[400];
    lcg_state = 7;
    for (int round = 0; round < 3000;
         round++) { /* pieces below and above the length where the heap takes over */
        size_t n = lcg() % (round % 10 ? 100 : 400);
        for (size_t i = 0; i < n; i++) text[i] = "aaabbccx"[lcg() % 8];
        exc_ids ids = {0};
        ok(ctx, exc_tokenizer_encode(ctx, t, text, n, true, &ids));
        size_t count = naive(text, n, want);
        assert_int_equal(ids.len, count);
        if (count) assert_memory_equal(ids.data, want, count * sizeof *want);
        exc_ids_free(&ids);
    }
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

static void a_long_piece_takes_no_quadratic_time(void **state) {
    exc_ctx *ctx = test_ctx(1);
    recipe_text plain = {0};
    exc_tokenizer *t = open_tokenizer(ctx, write_recipe(&plain));
    size_t n = 1 << 20;
    char *text = malloc(n);
    memset(text, 'a', n);
    exc_ids ids = {0};
    double began = exc_seconds();
    ok(ctx, exc_tokenizer_encode(ctx, t, text, n, true, &ids));
    assert_int_equal(ids.len, n / 4);
    assert_true(exc_seconds() - began < 20); /* n^2 would be hours */
    exc_ids_free(&ids);
    free(text);
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

static void refused_recipe(exc_ctx *ctx, recipe_text r, const char *part) {
    exc_tokenizer *t = NULL;
    exc_clear(ctx);
    test_refused(ctx, exc_tokenizer_load(ctx, write_recipe(&r), &t), EXC_ERR_INPUT, "tokenizer.json", part,
                 NULL);
    assert_null(t);
}

#define SPLIT(p)                                                                                             \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" p              \
    "\"},\"behavior\":\"Isolated\",\"invert\":false}," LEVEL "]}"
#define ADDED(id, text, more)                                                                                \
    "{\"id\":" id ",\"content\":\"" text "\",\"special\":true,\"normalized\":false" more "}"

static void unknown_recipes_are_refused(void **state) {
    exc_ctx *ctx = test_ctx(1);
    refused_recipe(ctx, (recipe_text){.normalizer = "{\"type\":\"Lowercase\"}"}, "Lowercase");
    refused_recipe(
        ctx, (recipe_text){.normalizer = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"}]}"},
        "NFKC");
    refused_recipe(ctx, (recipe_text){.pre = "{\"type\":\"Metaspace\"}"}, "Metaspace");
    refused_recipe(ctx, (recipe_text){.pre = "null"}, "ByteLevel");
    refused_recipe(ctx, (recipe_text){.pre = "{\"type\":\"ByteLevel\",\"use_regex\":false}"},
                   "add_prefix_space");
    refused_recipe(ctx, (recipe_text){.pre = SPLIT("\\\\w+")}, "\\w");
    refused_recipe(ctx, (recipe_text){.pre = SPLIT("[a&&b]")}, "&&");
    refused_recipe(ctx, (recipe_text){.pre = SPLIT("[[:alpha:]]")}, "[");
    refused_recipe(ctx, (recipe_text){.pre = SPLIT("\\\\p{N}{1,3}+")}, "}+");
    refused_recipe(ctx, (recipe_text){.pre = SPLIT("(?x)a")}, "(?x)");
    refused_recipe(ctx, (recipe_text){.pre = SPLIT("a*")}, "nothing");
    refused_recipe(ctx, (recipe_text){.pre = SPLIT("(a")}, "pattern");
    refused_recipe(ctx, (recipe_text){.post = "{\"type\":\"BertProcessing\"}"}, "BertProcessing");
    refused_recipe(
        ctx,
        (recipe_text){.post =
                          "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}],"
                          "\"special_tokens\":{\"x\":{\"ids\":[99999]}}}"},
        "ids of the vocabulary");
    refused_recipe(ctx, (recipe_text){.decoder = "{\"type\":\"WordPiece\"}"}, "WordPiece");
    refused_recipe(ctx, (recipe_text){.model = "\"type\":\"Unigram\","}, "Unigram");
    refused_recipe(ctx, (recipe_text){.model = "\"byte_fallback\":true,"}, "byte_fallback");
    refused_recipe(ctx, (recipe_text){.model = "\"continuing_subword_prefix\":\"##\","},
                   "continuing_subword_prefix");
    refused_recipe(ctx, (recipe_text){.model = "\"dropout\":0.1,"}, "dropout");
    refused_recipe(ctx, (recipe_text){.merges = "[\"a\",\"zz\"]"}, "merge 0");
    refused_recipe(ctx, (recipe_text){.merges = "\"a b c\""}, "merge 0");
    refused_recipe(ctx, (recipe_text){.merges = "[\"a\",\"z\"]"}, "its result");
    refused_recipe(ctx, (recipe_text){.merges = "\"a b\",\"a b\""}, "twice");
    refused_recipe(ctx, (recipe_text){.vocab = ",\"zz\":256"}, "two tokens");
    refused_recipe(ctx, (recipe_text){.vocab = ",\"zz\":-1"}, "expected an id");
    refused_recipe(ctx, (recipe_text){.vocab = ",\"zz\":99999999"}, "expected an id");
    refused_recipe(ctx, (recipe_text){.vocab = ",\"zz\":\"x\""}, "expected an id");
    refused_recipe(ctx, (recipe_text){.added = ADDED("300", "<x>", ",\"lstrip\":true")}, "lstrip");
    refused_recipe(ctx, (recipe_text){.added = ADDED("256", "<x>", "")}, "another token");
    refused_recipe(ctx, (recipe_text){.added = ADDED("300", "<x>", "") "," ADDED("301", "<x>", "")}, "twice");
    refused_recipe(ctx, (recipe_text){.added = ADDED("300", "", "")}, "no content");
    exc_ctx_free(ctx);
}

/* the same text, cut by this pattern, gives these ids */
static void assert_encoding(exc_ctx *ctx, const recipe_text *r, const char *text, size_t n,
                            const int32_t *want, size_t count) {
    exc_tokenizer *t = open_tokenizer(ctx, write_recipe(r));
    exc_ids ids = {0};
    ok(ctx, exc_tokenizer_encode(ctx, t, text, n, true, &ids));
    assert_int_equal(ids.len, count);
    assert_memory_equal(ids.data, want, count * sizeof *want);
    exc_ids_free(&ids);
    exc_tokenizer_free(t);
}

static void recipes_are_followed(void **state) {
    exc_ctx *ctx = test_ctx(1);
    /* U+180E is no space (PCRE2 alone would say so), U+0085 is */
    assert_encoding(ctx, &(recipe_text){.pre = SPLIT("\\\\s|[^\\\\s]{2}")},
                    "\xe1\xa0\x8e"
                    "ab",
                    5, (int32_t[]){0xe1, 0xa0, 0x8e, 'a', 'b'}, 5);
    assert_encoding(ctx, &(recipe_text){.pre = SPLIT("\\\\S+")},
                    "ab\xc2\x85"
                    "ab",
                    6, (int32_t[]){256, 0xc2, 0x85, 256}, 4);
    /* a literal pattern is literal */
    assert_encoding(
        ctx,
        &(recipe_text){
            .pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"String\":"
                   "\".\"},\"behavior\":\"Isolated\"}," LEVEL "]}"},
        "ab.ab", 5, (int32_t[]){256, '.', 256}, 3);
    assert_encoding(ctx,
                    &(recipe_text){.pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\","
                                          "\"individual_digits\":true}," LEVEL "]}"},
                    "ab1", 3, (int32_t[]){256, '1'}, 2);
    /* the post-processor's tokens stand around the text */
    assert_encoding(
        ctx,
        &(recipe_text){.post =
                           "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"s\"}},"
                           "{\"Sequence\":{\"id\":\"A\"}},{\"SpecialToken\":{\"id\":\"s\"}}],"
                           "\"special_tokens\":{\"s\":{\"id\":\"s\",\"ids\":[300]}}}",
                       .added = ADDED("300", "<s>", "")},
        "ab", 2, (int32_t[]){300, 256, 300}, 3);
    /* the longest added token wins, and the leftmost */
    assert_encoding(ctx,
                    &(recipe_text){.added = ADDED("300", "<a>", "") "," ADDED("301", "<a>b",
                                                                              "") "," ADDED("302", "b<", "")},
                    "<a>bc<a>ab<a>", 13, (int32_t[]){301, 'c', 300, 'a', 302, 'a', '>'}, 7);
    /* with ignore_merges a piece that is a token is that token, whatever merges say */
    assert_encoding(ctx, &(recipe_text){.model = "\"ignore_merges\":true,", .vocab = ",\"xyz\":263"}, "xyz",
                    3, (int32_t[]){263}, 1);
    assert_encoding(ctx, &(recipe_text){.vocab = ",\"xyz\":263"}, "xyz", 3, (int32_t[]){'x', 'y', 'z'}, 3);
    /* matched after normalisation: the composed form, from decomposed text */
    assert_encoding(
        ctx,
        &(recipe_text){.normalizer = "{\"type\":\"NFC\"}",
                       .added =
                           "{\"id\":300,\"content\":\"\xc3\xa9\",\"normalized\":true,\"special\":false}"},
        "ae\xcc\x81"
        "b",
        5, (int32_t[]){'a', 300, 'b'}, 3);
    exc_ctx_free(ctx);
}

/* a token counts as content when it lies whole in it; in normalised text the line between parts moves with
 * the text */
static void content_is_whole_tokens(void **state) {
    static const struct {
        const char *text;
        size_t cut;
        unsigned first, second;
        const char *want;
    } cases[] = {
        {"ab", 1, EXC_PART_CONTENT, 0, "\0"},
        {"ab", 1, 0, EXC_PART_CONTENT, "\0"},
        {"abc<x>ab", 3, EXC_PART_CONTENT, EXC_PART_MATCH | EXC_PART_CONTENT, "\1\0\1"},
        {"<x>ab", 3, EXC_PART_CONTENT, EXC_PART_MATCH, "\1\1\1\0"}, /* a person's "<x>" is three characters */
        {"e\xcc\x81xe\xcc\x81", 1, 0, EXC_PART_CONTENT, "\0\1\1\1\1"}, /* the accent is theirs */
    };
    exc_ctx *ctx = test_ctx(1);
    recipe_text r = {.normalizer = "{\"type\":\"NFC\"}", .added = ADDED("300", "<x>", "")};
    exc_tokenizer *t = open_tokenizer(ctx, write_recipe(&r));
    for (size_t i = 0; i < EXC_COUNT(cases); i++) {
        exc_part parts[] = {{cases[i].cut, cases[i].first}, {strlen(cases[i].text), cases[i].second}};
        exc_ids ids = {0};
        exc_buf content = {0};
        ok(ctx, exc_encode_parts(ctx, t, cases[i].text, parts, 2, true, &ids, &content));
        assert_int_equal(content.len, ids.len);
        assert_memory_equal(content.data, cases[i].want, ids.len);
        exc_ids_free(&ids);
        exc_buf_free(&content);
    }
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

/* ------------------------------------------------------------------------------------------------------- any
 * text */

static void texts_come_back(void **state) {
    static const char *const scraps[] = {"a",
                                         " ",
                                         "  ",
                                         "\n",
                                         "\r\n",
                                         "<|im_start|>",
                                         "<|im_",
                                         "'s",
                                         "'LL",
                                         "123",
                                         "\xc3\xa9",
                                         "e\xcc\x81",
                                         "\xcc\xb8",
                                         "\xe1\x84\x92\xe1\x85\xa1",
                                         "\xe6\xbc\xa2",
                                         "\xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd",
                                         "\xe1\xa0\x8e",
                                         "\xef\xbb\xbf",
                                         "\xef\xbf\xbe",
                                         "\xf4\x8f\xbf\xbf",
                                         "\x7f",
                                         "\x01",
                                         "\"",
                                         "\\",
                                         "The quick",
                                         "\xe2\x80\xa8",
                                         "\xc2\x85"};
    exc_ctx *ctx = test_ctx(1);
    exc_tokenizer *t = open_tokenizer(ctx, test_data("demo"));
    exc_buf text = {0}, back = {0}, normal = {0}, again = {0}, stretch = {0};
    exc_ids ids = {0};
    lcg_state = 99;
    for (int i = 0; i < 4000; i++) {
        text.len = back.len = normal.len = again.len = ids.len = 0;
        exc_buf_put(&text, "", 1); /* NUL is text too */
        for (uint64_t n = lcg() % 40; n; n--) {
            const char *s = scraps[lcg() % EXC_COUNT(scraps)];
            for (uint64_t k = lcg() % 16 ? 1 : lcg() % 90; k; k--) exc_buf_puts(&text, s);
        }
        ok(ctx, exc_tokenizer_encode(ctx, t, text.data, text.len, i % 2, &ids));
        ok(ctx, exc_tokenizer_decode(ctx, t, ids.data, ids.len, false, &back));
        /* an added token is cut out first, so nothing composes across its edges until all is together again
         */
        exc_nfc(text.data, text.len, &normal, &stretch);
        exc_nfc(back.data, back.len, &again, &stretch);
        assert_int_equal(again.len, normal.len);
        assert_memory_equal(again.data, normal.data, normal.len);
        if (i % 2 == 0) assert_int_equal(back.len, normal.len);
    }
    exc_buf_free(&text);
    exc_buf_free(&back);
    exc_buf_free(&normal);
    exc_buf_free(&again);
    exc_buf_free(&stretch);
    exc_ids_free(&ids);
    test_refused(ctx, exc_tokenizer_encode(ctx, t, "ok\xff", 3, true, &ids), EXC_ERR_INPUT, "UTF-8", "at 2",
                 NULL);
    exc_clear(ctx);
    ok(ctx, exc_tokenizer_decode(ctx, t, (int32_t[]){5, 512, 6}, 3, true, &back)); /* a padded vocabulary's id */
    assert_string_equal(back.data, "&'");
    exc_buf_free(&back);
    test_refused(ctx, exc_tokenizer_decode(ctx, t, (int32_t[]){5, -1}, 2, true, &back), EXC_ERR_INPUT, "token 1",
                 "-1", NULL);
    exc_buf_free(&back);
    assert_int_equal(exc_tokenizer_id(t, "<|im_end|>"), 511);
    assert_int_equal(exc_tokenizer_id(t, "no such token"), -1);
    assert_int_equal(exc_tokenizer_size(t), 512);
    assert_true(exc_tokenizer_is_special(t, 510) && !exc_tokenizer_is_special(t, 5) &&
                !exc_tokenizer_is_special(t, -1));
    exc_buf_free(&back);
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

struct reader {
    exc_tokenizer *t;
    uint64_t hash;
};

static void *read_in_thread(void *user) {
    struct reader *r = user;
    exc_ctx *ctx = test_ctx(1);
    exc_ids ids = {0};
    for (int i = 0; i < 300; i++) {
        char text[64];
        int n = snprintf(text, sizeof text, "Which colour is bird %d? It's \xc3\xa9 <|im_end|>", i);
        if (exc_tokenizer_encode(ctx, r->t, text, (size_t)n, true, &ids)) break;
    }
    r->hash = exc_hash64(ids.data, ids.len * sizeof *ids.data);
    exc_ids_free(&ids);
    exc_ctx_free(ctx);
    return NULL;
}

static void threads_share_a_tokenizer(void **state) {
    exc_ctx *ctx = test_ctx(1);
    struct reader r[4];
    pthread_t thread[4];
    exc_tokenizer *t = open_tokenizer(ctx, test_data("demo"));
    for (int i = 0; i < 4; i++) {
        r[i].t = t;
        assert_int_equal(pthread_create(thread + i, NULL, read_in_thread, r + i), 0);
    }
    for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
    for (int i = 1; i < 4; i++) assert_true(r[i].hash == r[0].hash);
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_qwen3),
        cmocka_unit_test(golden_deepseek_v3),
        cmocka_unit_test(golden_gptoss),
        cmocka_unit_test(nfc_of_every_code_point),
        cmocka_unit_test(nfc_of_sequences),
        cmocka_unit_test(merges_against_a_naive_oracle),
        cmocka_unit_test(a_long_piece_takes_no_quadratic_time),
        cmocka_unit_test(unknown_recipes_are_refused),
        cmocka_unit_test(recipes_are_followed),
        cmocka_unit_test(content_is_whole_tokens),
        cmocka_unit_test(texts_come_back),
        cmocka_unit_test(threads_share_a_tokenizer),
    };
    return cmocka_run_group_tests_name("text", tests, unpack, NULL);
}
