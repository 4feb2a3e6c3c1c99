/* sentence.c - tokenizers that are no byte-level BPE in tokenizer.json. SentencePiece's kind (Mixtral, Llama 2): BPE over
 * characters with blanks written as U+2581 and bytes to fall back to; goldens are of the `tokenizers` library, for the three ways
 * in which such files ask for blanks: one tokenizer.json, whose normaliser and pre-tokenizer the test exchanges. And
 * tiktoken.model (Kimi, Moonlight); goldens are of a naive merge in Python over its `regex` module. Then what is refused,
 * any text there and back, and which tokens of a prompt count as its words. */
#include "helpers.h"

#include <stdlib.h>
#include <string.h>

#include "chat.h"

#define PREPEND                                                                                                        \
    "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},"                          \
    "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]}"
#define METASPACE(scheme, split)                                                                                       \
    "{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"prepend_scheme\":\"" scheme "\",\"split\":" split "}"

static const char *unpacked;

static int unpack(void **state) {
    char *command, *said;
    unpacked = test_tmpdir();
    assert_true(asprintf(&command, "mkdir %s/tik && cp %s/* %s/ && cp %s/* %s/tik/ && xz -d %s/*.xz %s/tik/*.xz", unpacked,
                         test_data("tokenizers/sentencepiece"), unpacked, test_data("tokenizers/tiktoken"), unpacked, unpacked,
                         unpacked) > 0);
    if (test_shell(command, &said)) fail_msg("%s: %s", command, said);
    free(command);
    free(said);
    return 0;
}

/* a folder with the tokenizer, keys of it exchanged: key, value as JSON, .., NULL; "model.x" is a key of the model */
static const char *variant(const char *const *change) {
    const char *dir = test_tmpdir();
    size_t n;
    char *text = test_read(test_path(unpacked, "tokenizer.json"), &n);
    json_t *root = json_loadb(text, n, 0, NULL);
    for (; change[0]; change += 2) {
        json_t *value = json_loads(change[1], JSON_DECODE_ANY, NULL), *where = root;
        const char *key = change[0];
        if (!strncmp(key, "model.", 6)) where = json_object_get(root, "model"), key += 6;
        assert_non_null(value);
        json_object_set_new(where, key, value);
    }
    free(text);
    text = json_dumps(root, JSON_COMPACT);
    test_write(test_path(dir, "tokenizer.json"), text, strlen(text));
    json_decref(root);
    free(text);
    return dir;
}

static exc_tokenizer *open_tokenizer(exc_ctx *ctx, const char *dir) {
    exc_tokenizer *t = NULL;
    if (exc_tokenizer_load(ctx, dir, &t)) fail_msg("%s", exc_ctx_error(ctx));
    return t;
}

static void check_line(exc_ctx *ctx, const exc_tokenizer *t, const json_t *o) {
    const json_t *text = json_object_get(o, "text"), *want = json_object_get(o, "ids"), *decoded = json_object_get(o, "decoded");
    const char *s = json_string_value(text);
    exc_ids ids = {0};
    exc_buf back = {0};
    assert_int_equal(exc_tokenizer_encode(ctx, t, s, json_string_length(text), json_is_true(json_object_get(o, "special")), &ids), 0);
    int same = json_array_size(want) == ids.len;
    for (size_t i = 0; same && i < ids.len; i++) same = json_integer_value(json_array_get(want, i)) == ids.data[i];
    if (!same) fail_msg("other ids for: \"%s\"", exc_show(s, json_string_length(text)));
    assert_int_equal(exc_tokenizer_decode(ctx, t, ids.data, ids.len, false, &back), 0);
    if (back.len != json_string_length(decoded) || (back.len && memcmp(back.data, json_string_value(decoded), back.len)))
        fail_msg("other text for: \"%s\"", exc_show(s, json_string_length(text)));
    exc_ids_free(&ids);
    exc_buf_free(&back);
}

static int check_file(exc_ctx *ctx, const exc_tokenizer *t, const char *path) {
    char *text = test_read(path, NULL), *save = NULL;
    int lines = 0;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save), lines++) {
        json_t *o = json_loads(line, JSON_ALLOW_NUL, NULL);
        check_line(ctx, t, o);
        json_decref(o);
    }
    free(text);
    return lines;
}

static void goldens(void **state) {
    static const char *const kinds[][5] = {{"prepend", "normalizer", PREPEND, "pre_tokenizer", "null"},
                                           {"first", "normalizer", "null", "pre_tokenizer", METASPACE("first", "false")},
                                           {"always", "normalizer", "null", "pre_tokenizer", METASPACE("always", "true")}};
    exc_ctx *ctx = test_ctx(1);
    for (size_t k = 0; k < EXC_COUNT(kinds); k++) {
        const char *const change[] = {kinds[k][1], kinds[k][2], kinds[k][3], kinds[k][4], NULL};
        exc_tokenizer *t = open_tokenizer(ctx, variant(change));
        char name[32];
        snprintf(name, sizeof name, "%s.jsonl", kinds[k][0]);
        assert_int_equal(check_file(ctx, t, test_path(unpacked, name)), 354);
        exc_tokenizer_free(t);
    }
    exc_ctx_free(ctx);
}

/* any text, also one whose merges take a heap, comes back but for the blank in front */
static void there_and_back(void **state) {
    exc_ctx *ctx = test_ctx(1);
    exc_tokenizer *t = open_tokenizer(ctx, variant((const char *const[]){NULL}));
    for (uint64_t seed = 0; seed < 200; seed++) {
        exc_buf text = {0}, back = {0};
        exc_ids ids = {0};
        for (uint64_t i = 0, n = exc_random_u64(seed, 1, 0) % 400; i < n; i++) {
            uint64_t r = exc_random_u64(seed, 2, i);
            uint32_t c = r % 5 == 0 ? ' ' : r % 5 < 4 ? (uint32_t)(r >> 8) % 0x250 : (uint32_t)(r >> 8) % 0x10ffff;
            if ((c >= 0xd800 && c < 0xe000) || c == 0x2581) c = 'x';
            exc_utf8_put(&text, c);
        }
        assert_int_equal(exc_tokenizer_encode(ctx, t, text.data, text.len, false, &ids), 0);
        assert_int_equal(exc_tokenizer_decode(ctx, t, ids.data, ids.len, false, &back), 0);
        assert_int_equal(back.len, text.len);
        if (text.len) assert_memory_equal(back.data, text.data, text.len);
        exc_buf_free(&text);
        exc_buf_free(&back);
        exc_ids_free(&ids);
    }
    int32_t lone[2] = {3 + 0xe2, 3 + 0x41}; /* half a character, then a letter: no UTF-8, so two signs of replacement */
    exc_buf back = {0};
    assert_int_equal(exc_tokenizer_decode(ctx, t, lone, 2, false, &back), 0);
    assert_string_equal(back.data, "\xef\xbf\xbd\xef\xbf\xbd");
    exc_buf_free(&back);
    assert_int_equal(exc_tokenizer_id(t, "<s>"), 1);
    assert_int_equal(exc_tokenizer_id(t, "[TOOL]"), 1606);
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

/* a conversation in Mixtral's format: the person's words are its content, the blanks and brackets around them are not */
static void content(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = variant((const char *const[]){NULL}), *path = test_path(dir, "p.jsonl");
    exc_prompt_options opt = EXC_PROMPT_OPTIONS;
    exc_prompts *p = NULL;
    opt.chat = "mixtral";
    static const char line[] = "{\"text\":\"the </s> hen\"}\n";
    test_write(path, line, sizeof line - 1);
    if (exc_prompts_load(ctx, dir, path, &opt, &p)) fail_msg("%s", exc_ctx_error(ctx));
    exc_tokenizer *t = open_tokenizer(ctx, dir);
    exc_buf all = {0}, said = {0};
    size_t n = (size_t)p->begin[1];
    assert_int_equal(p->tokens[0], 1);
    assert_int_equal(exc_tokenizer_decode(ctx, t, p->tokens, n, false, &all), 0);
    assert_string_equal(all.data, "<s>  [INST] the </s> hen [/INST]");
    for (size_t i = 0; i < n; i++) {
        assert_true(p->tokens[i] != 2); /* a typed </s> is four characters */
        if (p->content[i]) assert_int_equal(exc_tokenizer_decode(ctx, t, p->tokens + i, 1, false, &said), 0);
    }
    /* the first word too, although its token has the template's blank; decoding one token drops the blank in front */
    assert_string_equal(said.data, "the</s>hen");
    exc_buf_free(&all);
    exc_buf_free(&said);
    exc_prompts_free(p);
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

static void refusals(void **state) {
    static const char *const rows[][4] = {
        {"normalizer", "null", "U+2581"},
        {"normalizer", "{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"}", "U+2581"},
        {"normalizer", "{\"type\":\"Prepend\",\"prepend\":\"_\"}", "Prepend"},
        {"normalizer", "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"_\"}", "Replace"},
        {"normalizer", "{\"type\":\"NFKC\"}", "NFKC"},
        {"pre_tokenizer", METASPACE("first", "true"), "Metaspace"}, /* beside the Replace: blanks twice */
        {"pre_tokenizer", "{\"type\":\"ByteLevel\"}", "ByteLevel"},
        {"decoder", "{\"type\":\"ByteLevel\"}", "ByteLevel"},
        {"decoder", "{\"type\":\"Strip\",\"content\":\" \",\"start\":2,\"stop\":0}", "start"},
        {"decoder", "null", "decoder"},
        {"model.byte_fallback", "false", "byte-level"},
        {"model.vocab", "{\"<unk>\":0,\"<s>\":1,\"</s>\":2,\"<0x00>\":3,\"<0x01>\":4}", "0x02"},
        {"model.merges", "[[\"a\",\"zzz\"]]", "merge 0"},
        {"added_tokens", "[{\"id\":1,\"content\":\"<s>\",\"normalized\":true}]", "normalized"},
    };
    exc_ctx *ctx = test_ctx(1);
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        exc_tokenizer *t = NULL;
        const char *const change[] = {rows[i][0], rows[i][1], NULL};
        test_refused(ctx, exc_tokenizer_load(ctx, variant(change), &t), EXC_ERR_INPUT, "tokenizer.json", rows[i][2], NULL);
        assert_null(t);
        exc_clear(ctx);
    }
    exc_ctx_free(ctx);
}

/* ------------------------------------------------------------------------------------------------------- tiktoken.model */

static void tiktoken(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = test_path(unpacked, "tik"), *path = test_path(dir, "p.jsonl");
    exc_tokenizer *t = open_tokenizer(ctx, dir);
    assert_int_equal(check_file(ctx, t, test_path(dir, "golden.jsonl")), 336);
    assert_int_equal(exc_tokenizer_size(t), 4256);
    assert_int_equal(exc_tokenizer_id(t, "<|im_middle|>"), 4017);
    assert_int_equal(exc_tokenizer_id(t, "<|reserved_token_4100|>"), 4100);
    assert_int_equal(exc_tokenizer_is_special(t, 4000) && !exc_tokenizer_is_special(t, 3999), 1);
    exc_prompt_options opt = EXC_PROMPT_OPTIONS; /* a conversation in Moonlight's format */
    exc_prompts *p = NULL;
    exc_buf all = {0};
    opt.chat = "moonlight";
    test_write(path, "{\"text\":\"a hen\"}\n", 17);
    if (exc_prompts_load(ctx, dir, path, &opt, &p)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(exc_tokenizer_decode(ctx, t, p->tokens, (size_t)p->begin[1], false, &all), 0);
    assert_string_equal(all.data, "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|><|im_user|>user"
                                  "<|im_middle|>a hen<|im_end|><|im_assistant|>assistant<|im_middle|>");
    assert_int_equal(p->tokens[0], 4010);
    exc_buf_free(&all);
    exc_prompts_free(p);
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

static void tiktoken_refusals(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = test_tmpdir(), *ranks = test_path(dir, "tiktoken.model"), *config = test_path(dir, "tokenizer_config.json");
    static const struct {
        const char *ranks, *config, *part;
    } rows[] = {
        {"", "{}", "lines"},        {"YQ== 0\n", "{}", "every byte"},    {"YQ= 0\n", "{}", "tiktoken.model:1"},
        {"YQ== 1\n", "{}", ":1"},   {"YQ== 0\nYg== 0\n", "{}", "twice"}, {"YQ== 0\n\nY?== 1\n", "{}", ":3"},
        {"YQ== x\n", "{}", ":1"},   {"YQ==\n", "{}", ":1"},              {"=QQQ 0\n", "{}", ":1"},
        {"YQ== 0\n", "[", "JSON"}, {"YQ== 0\n", "{\"added_tokens_decoder\":{\"0\":{\"content\":\"x\"}}}", "1..256"},
        {"YQ== 0\n", "{\"added_tokens_decoder\":{\"9\":{\"content\":\"\"}}}", "no content"},
        {"YQ== 0\nYQ== 1\n", "{}", "there twice"},
    };
    exc_tokenizer *t = NULL;
    test_write(ranks, "YQ== 0\n", 7);
    test_refused(ctx, exc_tokenizer_load(ctx, dir, &t), EXC_ERR_IO, "tokenizer_config.json", NULL);
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        exc_clear(ctx);
        test_write(ranks, rows[i].ranks, strlen(rows[i].ranks));
        test_write(config, rows[i].config, strlen(rows[i].config));
        test_refused(ctx, exc_tokenizer_load(ctx, dir, &t), EXC_ERR_INPUT, rows[i].part, NULL);
        assert_null(t);
    }
    exc_ctx_free(ctx);
}

static void fail_each(const char *dir) {
    exc_status st = EXC_ERR_MEMORY;
    for (uint64_t n = 1; st != EXC_OK; n++) {
        exc_ctx *ctx = test_ctx(1);
        exc_tokenizer *t = NULL;
        exc_ids ids = {0};
        exc_buf back = {0};
        exc_alloc_fail_at(n);
        st = exc_tokenizer_load(ctx, dir, &t);
        if (st == EXC_OK) st = exc_tokenizer_encode(ctx, t, "a \xf0\x9f\x99\x82 hen <s>", 13, true, &ids);
        if (st == EXC_OK) st = exc_tokenizer_decode(ctx, t, ids.data, ids.len, false, &back);
        exc_alloc_fail_at(0);
        if (st != EXC_OK && st != EXC_ERR_MEMORY) fail_msg("%d: %s", st, exc_ctx_error(ctx));
        exc_ids_free(&ids);
        exc_buf_free(&back);
        exc_tokenizer_free(t);
        exc_ctx_free(ctx);
    }
}

static void every_allocation_may_fail(void **state) {
    fail_each(variant((const char *const[]){NULL}));
    fail_each(test_path(unpacked, "tik"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(goldens),  cmocka_unit_test(there_and_back),            cmocka_unit_test(content),
        cmocka_unit_test(refusals), cmocka_unit_test(tiktoken),                  cmocka_unit_test(tiktoken_refusals),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests_name("sentence", tests, unpack, NULL);
}
