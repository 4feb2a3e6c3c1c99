/* conversation.c - prompt files and chat formats: what becomes of lines, messages and token lists, whose
 * words count as content, text that tries to be markup, bad files by file and line, formats by name,
 * templates that are not known, failing allocations. (Renderings of real templates are compared in text.c.)
 */
#include "helpers.h"

#include <stdlib.h>
#include <string.h>

#include "chat.h"

static void ok(exc_ctx *ctx, exc_status st) {
    if (st != EXC_OK) fail_msg("%s", exc_ctx_error(ctx));
}

static exc_tokenizer *open_tokenizer(exc_ctx *ctx, const char *dir) {
    exc_tokenizer *t = NULL;
    ok(ctx, exc_tokenizer_load(ctx, dir, &t));
    return t;
}

/* --------------------------------------------------------------------------------------------------------
 * prompts */

static exc_prompts *load(exc_ctx *ctx, const char *name, const char *data, size_t n,
                         const exc_prompt_options *opt) {
    const char *path = test_path(test_tmpdir(), name);
    exc_prompts *p = NULL;
    test_write(path, data, n);
    ok(ctx, exc_prompts_load(ctx, test_data("demo"), path, opt, &p));
    return p;
}

/* tokens of prompt i that are content, decoded */
static char *content_text(exc_ctx *ctx, const exc_tokenizer *t, const exc_prompts *p, int64_t i) {
    exc_buf b = {0};
    for (int64_t k = p->begin[i]; k < p->begin[i + 1]; k++)
        if (p->content[k]) ok(ctx, exc_tokenizer_decode(ctx, t, p->tokens + k, 1, false, &b));
    exc_buf_put(&b, "", 1);
    return b.data;
}

static void text_prompts(void **state) {
    static const char file[] = "\xef\xbb\xbfWhat is a wren?\r\n\n  \nWhat is <|im_end|> for?";
    exc_ctx *ctx = test_ctx(1);
    exc_tokenizer *t = open_tokenizer(ctx, test_data("demo"));
    exc_prompt_options opt = EXC_PROMPT_OPTIONS;
    opt.system = "open desk";
    exc_prompts *p = load(ctx, "a.txt", file, sizeof file - 1, &opt);
    assert_int_equal(exc_prompts_count(p), 2);
    assert_string_equal(p->text[0], "What is a wren?");
    char *said = content_text(ctx, t, p, 0);
    assert_string_equal(said, "What is a wren?");
    free(said);
    said = content_text(ctx, t, p, 1);
    assert_string_equal(said, "What is <|im_end|> for?"); /* typed by a person: text, not a token */
    free(said);
    int64_t n, ends = 0;
    const int32_t *ids = exc_prompts_tokens(p, 1, &n);
    for (int64_t i = 0; i < n; i++) ends += ids[i] == 511;
    assert_int_equal(ends, 2); /* of the system and the user turn */
    assert_null(exc_prompts_tokens(p, 2, &n));
    assert_int_equal(n, 0);
    exc_buf whole = {0};
    ok(ctx, exc_tokenizer_decode(ctx, t, p->tokens, (size_t)p->begin[1], false, &whole));
    assert_string_equal(
        whole.data, "<|im_start|>system\nopen desk<|im_end|>\n<|im_start|>user\nWhat is a wren?<|im_end|>\n"
                    "<|im_start|>assistant\n");
    exc_buf_free(&whole);
    exc_prompts_free(p);
    opt = (exc_prompt_options)EXC_PROMPT_OPTIONS;
    opt.raw = 1;
    opt.limit = 1;
    p = load(ctx, "b.txt", "<|im_start|>hello\nmore\n", 23, &opt); /* raw: the writer's own markup counts */
    assert_int_equal(exc_prompts_count(p), 1);
    assert_int_equal(p->tokens[0], 510);
    assert_int_equal(p->content[0], 0);
    assert_int_equal(p->content[1], 1);
    exc_prompts_free(p);
    exc_tokenizer_free(t);
    exc_ctx_free(ctx);
}

static void json_prompts(void **state) {
    static const char file[] =
        "{\"text\":\"Hi\"}\n"
        "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]}\n"
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"},"
        "{\"role\":\"user\",\"content\":\"c\"}],\"add_generation_prompt\":false}\n"
        "{\"tokens\":[1,510,3]}\n";
    exc_ctx *ctx = test_ctx(1);
    exc_tokenizer *t = open_tokenizer(ctx, test_data("demo"));
    exc_prompts *p = load(ctx, "a.jsonl", file, sizeof file - 1, NULL);
    assert_int_equal(exc_prompts_count(p), 4);
    int64_t first = p->begin[1], second = p->begin[2] - p->begin[1];
    assert_int_equal(first, second);
    assert_memory_equal(p->tokens, p->tokens + first, (size_t)first * sizeof *p->tokens);
    char *said = content_text(ctx, t, p, 2);
    assert_string_equal(said, "ac"); /* the user's turns */
    free(said);
    assert_null(p->text[3]);
    assert_memory_equal(p->tokens + p->begin[3], ((int32_t[]){1, 510, 3}), 12);
    assert_memory_equal(p->content + p->begin[3], ((uint8_t[]){1, 0, 1}), 3);
    exc_prompts_free(p);
    exc_tokenizer_free(t);
    /* token lists need no tokenizer */
    const char *bare = test_tmpdir(), *path = test_path(bare, "p.jsonl");
    test_write(path, "{\"tokens\":[7,8]}\n", 17);
    ok(ctx, exc_prompts_load(ctx, bare, path, NULL, &p));
    assert_int_equal(p->begin[1], 2);
    exc_prompts_free(p);
    test_write(path, "{\"text\":\"x\"}\n", 13);
    test_refused(ctx, exc_prompts_load(ctx, bare, path, NULL, &p), EXC_ERR_INPUT, "p.jsonl:1",
                 "tokenizer.json", NULL);
    exc_ctx_free(ctx);
}

static void bad_prompt_files(void **state) {
    static const struct {
        const char *name, *data, *parts[2];
    } bad[] = {
        {"e.txt", "", {"e.txt", "at least one prompt"}},
        {"e.txt", "\n \r\n\t\n", {"e.txt", "at least one prompt"}},
        {"e.txt", "fine\nbad \xff byte\n", {"e.txt:2", "\\xff"}},
        {"e.txt", "\xff\xfeh", {"e.txt:1", "UTF-8"}},
        {"e.jsonl", "{\"text\":\"a\"}\n{\"text\":}\n", {"e.jsonl:2:9: expected", "JSON"}},
        {"e.jsonl", "{\"text\":\"a\",\"text\":\"b\"}\n", {"e.jsonl:1", "duplicate"}},
        {"e.jsonl", "{\"text\":\"\\ud800\"}\n", {"e.jsonl:1", ""}},
        {"e.jsonl", "{\"text\":5}\n", {"e.jsonl:1", "text"}},
        {"e.jsonl", "{\"text\":\"a\"}\n{\"text\":\"\"}\n", {"e.jsonl:2", "empty text"}},
        {"e.jsonl", "{\"text\":\" \\n\\t\"}\n", {"e.jsonl:1", "white space"}},
        {"e.jsonl", "{\"text\":\"a\\u0000b\"}\n", {"e.jsonl:1: text", "NUL"}},
        {"e.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"\\u0000\"}]}\n", {"e.jsonl:1: content", "NUL"}},
        {"e.jsonl", "{\"prompt\":\"x\"}\n", {"e.jsonl:1", "found none"}},
        {"e.jsonl", "{\"text\":\"x\",\"tokens\":[1]}\n", {"e.jsonl:1", "several"}},
        {"e.jsonl", "[1,2]\n", {"e.jsonl:1", "found none"}},
        {"e.jsonl", "{\"tokens\":[]}\n", {"e.jsonl:1", "at least one token"}},
        {"e.jsonl", "{\"tokens\":[1,-1]}\n", {"e.jsonl:1", "token 1"}},
        {"e.jsonl", "{\"tokens\":[1,2147483648]}\n", {"e.jsonl:1", "token 1"}},
        {"e.jsonl", "{\"tokens\":[1.5]}\n", {"e.jsonl:1", "no whole number"}},
        {"e.jsonl", "{\"messages\":[]}\n", {"e.jsonl:1", "messages"}},
        {"e.jsonl", "{\"messages\":[{\"role\":\"tool\",\"content\":\"x\"}]}\n", {"e.jsonl:1", "tool"}},
        {"e.jsonl", "{\"messages\":[{\"role\":\"user\"}]}\n", {"e.jsonl:1", "content"}},
        {"e.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":[]}]}\n", {"e.jsonl:1", "content"}},
        {"e.jsonl",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"enable_thinking\":3}\n",
         {"e.jsonl:1", "enable_thinking"}},
    };
    exc_ctx *ctx = test_ctx(1);
    exc_prompts *p = NULL;
    for (size_t i = 0; i < EXC_COUNT(bad); i++) {
        const char *path = test_path(test_tmpdir(), bad[i].name);
        test_write(path, bad[i].data, strlen(bad[i].data));
        test_refused(ctx, exc_prompts_load(ctx, test_data("demo"), path, NULL, &p), EXC_ERR_INPUT,
                     bad[i].parts[0], bad[i].parts[1], NULL);
        assert_null(p);
    }
    test_refused(ctx, exc_prompts_load(ctx, test_data("demo"), "no/such.txt", NULL, &p), EXC_ERR_IO,
                 "no/such.txt", NULL);
    exc_ctx_free(ctx);
}

static void lines(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *path = test_path(test_tmpdir(), "l.txt");
    char **list;
    size_t n;
    test_write(path, "one\r\n\n two \nthree", 17);
    ok(ctx, exc_lines_read(ctx, path, &list, &n));
    assert_int_equal(n, 3);
    assert_string_equal(list[0], "one");
    assert_string_equal(list[1], " two ");
    assert_string_equal(list[2], "three");
    exc_lines_free(list, n);
    test_write(path, "a\nb\0c\n", 6);
    test_refused(ctx, exc_lines_read(ctx, path, &list, &n), EXC_ERR_INPUT, "l.txt:2", "NUL", NULL);
    exc_clear(ctx);
    test_write(path, "", 0);
    ok(ctx, exc_lines_read(ctx, path, &list, &n));
    assert_int_equal(n, 0);
    exc_lines_free(list, n);
    exc_ctx_free(ctx);
}

/* ----------------------------------------------------------------------------------------------------- chat
 * formats */

/* by name: what the family's own template gives for a short conversation */
static void named_formats(void **state) {
    static const struct {
        const char *name, *want;
    } formats[] = {
        {"chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<"
                   "|im_end|>\n"
                   "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"},
        {"qwen3_5", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>"
                    "assistant\nA<|im_end|>\n"
                    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n<think>\n"},
        {"glm4_moe",
         "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>\n<think></think>\nA<|user|>\nV<|assistant|>"},
        {"gpt_oss", "<|start|>system<|message|>You are ChatGPT, a large language model trained by "
                    "OpenAI.\nKnowledge cutoff: "
                    "2024-06\nCurrent date: 2025-06-28\n\nReasoning: medium\n\n# Valid channels: analysis, "
                    "commentary, final. "
                    "Channel must be included for every message.<|end|><|start|>developer<|message|># "
                    "Instructions\n\nS\n\n"
                    "<|end|><|start|>user<|message|>U<|end|><|start|>assistant<|channel|>final<|message|>A<|"
                    "end|><|start|>"
                    "user<|message|>V<|end|><|start|>assistant"},
        {"olmoe", "<|endoftext|><|system|>\nS\n<|user|>\nU\n<|assistant|>\nA<|endoftext|>\n<|user|>\nV\n<|"
                  "assistant|>\n"},
        {"mixtral", "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]"},
        {"moonlight",
         "<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>U<|im_end|><|im_assistant|>"
         "assistant<|im_middle|>A<|im_end|><|im_user|>user<|im_middle|>V<|im_end|><|im_assistant|>assistant"
         "<|im_middle|>"},
    };
    static const char text[] =
        "[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":\"U\"},"
        "{\"role\":\"assistant\",\"content\":\"A\"},{\"role\":\"user\",\"content\":\"V\"}]";
    exc_ctx *ctx = test_ctx(1);
    json_t *messages = json_loads(text, 0, NULL);
    setenv("SOURCE_DATE_EPOCH", "1751068800", 1);
    for (size_t i = 0; i < EXC_COUNT(formats); i++) {
        exc_chat *c = NULL;
        exc_buf out = {0};
        ok(ctx, exc_chat_load(ctx, "", formats[i].name, &c));
        ok(ctx, exc_chat_render(ctx, c, messages, true, -1, &out));
        assert_string_equal(out.data, formats[i].want);
        exc_buf_free(&out);
        exc_chat_free(c);
    }
    unsetenv("SOURCE_DATE_EPOCH");
    json_decref(messages);
    exc_ctx_free(ctx);
}

/* Families whose tokenizers are not among the data: renderings of their templates by jinja2, conversations drawn at random. Of
 * gpt_oss's template the parts that run without tools; olmoe's and moonlight's are their predecessors' (Tulu, Kimi-K2). */
static void formats_match_templates(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = test_tmpdir();
    char *command, *said, *text, *save = NULL;
    int lines = 0;
    setenv("SOURCE_DATE_EPOCH", "1704196800", 1); /* 2024-01-02 */
    assert_true(asprintf(&command, "xz -dc %s > %s/golden.jsonl", test_data("tokenizers/templates/golden.jsonl.xz"), dir) > 0);
    if (test_shell(command, &said)) fail_msg("%s", said);
    text = test_read(test_path(dir, "golden.jsonl"), NULL);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save), lines++) {
        json_t *o = json_loads(line, 0, NULL), *thinking = json_object_get(o, "enable_thinking");
        const char *want = json_string_value(json_object_get(o, "text"));
        exc_chat *c = NULL;
        exc_buf out = {0};
        ok(ctx, exc_chat_load(ctx, dir, json_string_value(json_object_get(o, "template")), &c));
        ok(ctx, exc_chat_render(ctx, c, json_object_get(o, "messages"), json_is_true(json_object_get(o, "add_generation_prompt")),
                                thinking ? json_is_true(thinking) : -1, &out));
        if (strcmp(out.data, want)) fail_msg("line %d: %s\n  not %s", lines + 1, out.data, want);
        exc_buf_free(&out);
        exc_chat_free(c);
        json_decref(o);
    }
    assert_int_equal(lines, 384);
    unsetenv("SOURCE_DATE_EPOCH");
    free(text);
    free(command);
    free(said);
    exc_ctx_free(ctx);
}

/* the context keeps the last tokenizer by the bytes of its file; borrowers outlive it, and a changed file is read anew */
static void a_tokenizer_is_kept(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = test_tmpdir(), *path = test_path(dir, "tokenizer.json");
    size_t n;
    char *text = test_read(test_data("demo/tokenizer.json"), &n);
    test_write(path, text, n);
    exc_tokenizer *a = open_tokenizer(ctx, test_data("demo")), *b = open_tokenizer(ctx, dir), *c;
    assert_ptr_equal(a, b);
    char *at = strstr(text, "<|im_start|>");
    while (at) at[2] = 'o', at = strstr(at, "<|im_start|>"); /* as long, at once, elsewhere */
    test_write(path, text, n);
    c = open_tokenizer(ctx, dir);
    assert_ptr_not_equal(a, c);
    assert_int_equal(exc_tokenizer_id(a, "<|im_start|>"), 510);
    assert_int_equal(exc_tokenizer_id(c, "<|im_start|>"), -1);
    exc_tokenizer_free(a);
    exc_ctx_free(ctx);
    assert_int_equal(exc_tokenizer_id(b, "<|im_start|>"), 510);
    assert_int_equal(exc_tokenizer_id(c, "<|om_start|>"), 510);
    exc_tokenizer_free(b);
    exc_tokenizer_free(c);
    free(text);
}

/* the model of the folder has no row for the last id */
static void ids_without_rows_are_refused(void **state) {
    static const struct {
        const char *config;
        bool fits;
    } rows[] = {{"{\"vocab_size\":512}", true},
                {"{\"vocab_size\":600}", true}, /* padded rows */
                {"{\"vocab_size\":511}", false},
                {"{\"vocab_size\":600,\"text_config\":{\"vocab_size\":500}}", false},
                {"{\"text_config\":{\"vocab_size\":512}}", true},
                {"{}", true}};
    exc_ctx *ctx = test_ctx(1);
    size_t n;
    char *text = test_read(test_data("demo/tokenizer.json"), &n);
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        const char *dir = test_tmpdir();
        exc_tokenizer *t = NULL;
        test_write(test_path(dir, "tokenizer.json"), text, n);
        test_write(test_path(dir, "config.json"), rows[i].config, strlen(rows[i].config));
        exc_status st = exc_tokenizer_load(ctx, dir, &t);
        if (!rows[i].fits) test_refused(ctx, st, EXC_ERR_INPUT, "tokenizer.json", "vocab_size", "config.json", "511", NULL);
        assert_int_equal(st == EXC_OK, rows[i].fits);
        assert_int_equal(t != NULL, rows[i].fits);
        exc_tokenizer_free(t);
    }
    free(text);
    exc_ctx_free(ctx);
}

/* as a file of its own a text often ends in a newline that it lacks in tokenizer_config.json */
static void known_with_a_last_newline(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = test_tmpdir();
    json_t *config = NULL;
    assert_int_equal(exc_json_load(ctx, test_data("demo/tokenizer_config.json"), 0, &config), EXC_OK);
    const char *text = json_string_value(json_object_get(config, "chat_template"));
    size_t n = strlen(text);
    char *more = malloc(n + 2);
    memcpy(more, text, n);
    memcpy(more + n, "\n\n", 2);
    for (size_t extra = 0; extra <= 2; extra++) {
        exc_chat *c = NULL;
        test_write(test_path(dir, "chat_template.jinja"), more, n + extra);
        assert_int_equal(exc_chat_load(ctx, dir, NULL, &c) == EXC_OK, extra < 2); /* jinja drops one */
        exc_chat_free(c);
        exc_clear(ctx);
    }
    free(more);
    json_decref(config);
    exc_ctx_free(ctx);
}

static void unknown_templates_are_refused(void **state) {
    exc_ctx *ctx = test_ctx(1);
    const char *dir = test_tmpdir(), *prompt = test_path(dir, "p.txt");
    exc_chat *c = NULL;
    test_refused(ctx, exc_chat_load(ctx, dir, NULL, &c), EXC_ERR_INPUT, "--template NAME", "--raw", NULL);
    exc_clear(ctx);
    test_write(test_path(dir, "tokenizer_config.json"), "{\"chat_template\":\"{{ x }}\"}", 27);
    test_refused(ctx, exc_chat_load(ctx, dir, NULL, &c), EXC_ERR_INPUT, "tokenizer_config.json", "hash",
                 "qwen3", NULL);
    exc_clear(ctx);
    test_write(test_path(dir, "chat_template.jinja"), "{{ y }}", 7);
    test_refused(ctx, exc_chat_load(ctx, dir, NULL, &c), EXC_ERR_INPUT, "chat_template.jinja", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_chat_load(ctx, dir, "klingon", &c), EXC_ERR_USAGE, "klingon", "deepseek_v3", NULL);
    /* a format whose markers the tokenizer lacks would write text that only looks like a conversation */
    exc_prompt_options opt = EXC_PROMPT_OPTIONS;
    exc_prompts *p = NULL;
    opt.chat = "deepseek_v3";
    test_write(prompt, "hi\n", 3);
    test_refused(ctx, exc_prompts_load(ctx, test_data("demo"), prompt, &opt, &p), EXC_ERR_INPUT,
                 "deepseek_v3", "marker", NULL);
    exc_ctx_free(ctx);
}

/* --------------------------------------------------------------------------------------------------- failing
 * memory */

static void every_allocation_may_fail(void **state) {
    static const char file[] = "{\"text\":\"What is e\xcc\x81?\"}\n{\"tokens\":[1]}\n";
    const char *path = test_path(test_tmpdir(), "p.jsonl");
    exc_prompts *p = NULL;
    exc_status st = EXC_ERR_MEMORY;
    uint64_t n = 0;
    test_write(path, file, sizeof file - 1);
    while (st != EXC_OK) { /* a context of its own each time: one keeps its tokenizer */
        exc_ctx *ctx = test_ctx(1);
        exc_alloc_fail_at(++n);
        st = exc_prompts_load(ctx, test_data("demo"), path, NULL, &p);
        exc_alloc_fail_at(0);
        if (st != EXC_OK) {
            assert_int_equal(st, EXC_ERR_MEMORY);
            assert_null(p);
            assert_true(exc_ctx_error(ctx)[0]);
        }
        exc_ctx_free(ctx);
    }
    assert_true(n > 20);
    exc_prompts_free(p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_prompts),
        cmocka_unit_test(json_prompts),
        cmocka_unit_test(bad_prompt_files),
        cmocka_unit_test(lines),
        cmocka_unit_test(named_formats),
        cmocka_unit_test(formats_match_templates),
        cmocka_unit_test(a_tokenizer_is_kept),
        cmocka_unit_test(ids_without_rows_are_refused),
        cmocka_unit_test(known_with_a_last_newline), cmocka_unit_test(unknown_templates_are_refused),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests_name("conversation", tests, NULL, NULL);
}
