/* chat.c - which built-in format a model's conversations take, and messages as that format wants them.
 *
 * A chat template is a program in the model's folder. It is not run: its text is hashed, and a known hash
 * names the built-in format that gives the same result (formats.c; tests compare them with renderings of the
 * real templates). An unknown text is refused with the ways out, since a format that is nearly right moves
 * the very token that statistics are taken from. */
#include <string.h>
#include <sys/stat.h>

#include "chat.h"

#define WAYS_OUT "use --template NAME (%s), --raw with rendered text, or prompts that are {\"tokens\":[..]}"

struct exc_chat {
    const exc_format *format;
};

/* XXH3-128 of a template's text -> format. The texts are those of the published tokenizer_config.json files,
 * some as other public trees carry them. */
static const struct {
    const char *hash, *format;
} known[] = {
    {"4457e3d12b367a860283f874ff58d644", "qwen3"},       /* Qwen3 */
    {"cb53a145cfc5e326bdee364f122d2352", "qwen3_thinking"}, /* Qwen3-..-Thinking-2507 */
    {"ddff5cae9738234efa64bd8e686c0f33", "qwen3_instruct"}, /* Qwen3-..-Instruct-2507, as Unsloth has it */
    {"427b80bb3dda26b10ed0a1d8b9d7e0be", "qwen3_5"},     /* Qwen3.5, a public copy less the condition it adds to a line */
    {"4539344e06ec0b776878d9ac13b3ef51", "deepseek_v3"}, /* DeepSeek-V3 */
    {"577a7fce73f72e1ee2be9fd6966bb5eb", "chatml"},      /* plain ChatML, no default system line: the demo */
    {"d35407b48a8e1a791defcb14b61ec0db", "glm4_moe"},    /* GLM-4.6 */
    {"31a8050c5cfb9bad0a14740e5eebc979", "mixtral"},     /* Mixtral-8x7B-Instruct-v0.1 */
    {"55c3395246ee99a4f148bc479cb6f9a8", "mixtral_8x22b"}, /* Mixtral-8x22B-Instruct-v0.1, "default" */
};

void exc_rendering_free(exc_rendering *r) {
    exc_buf_free(&r->text);
    exc_buf_free(&r->parts);
}

size_t exc_rendering_parts(const exc_rendering *r, const exc_part **parts) {
    *parts = (const exc_part *)(const void *)r->parts.data;
    return r->parts.len / sizeof(exc_part);
}

void exc_rendering_put(exc_rendering *r, unsigned kind, const char *s, size_t n) {
    if (!n) return;
    exc_buf_put(&r->text, s, n);
    exc_part *parts = (exc_part *)(void *)r->parts.data;
    size_t count = r->parts.len / sizeof *parts;
    if (count && parts[count - 1].kind == kind) {
        parts[count - 1].end = r->text.len;
        return;
    }
    exc_part p = {r->text.len, kind};
    exc_buf_put(&r->parts, &p, sizeof p);
}

/* ---------------------------------------------------------------------------------------------------
 * choosing a format */

static const exc_format *by_name(const char *name) {
    for (size_t i = 0; i < exc_formats_count; i++)
        if (!strcmp(exc_formats[i].name, name)) return exc_formats + i;
    return NULL;
}

static const char *names(char out[256]) {
    size_t at = 0;
    for (size_t i = 0; i < exc_formats_count; i++)
        at += (size_t)snprintf(out + at, 256 - at, "%s%s", i ? ", " : "", exc_formats[i].name);
    return out;
}

static const exc_format *by_hash(const char *text, size_t n, char hash[33]) {
    exc_hash_hex(text, n, hash);
    for (size_t i = 0; i < EXC_COUNT(known); i++)
        if (!strcmp(known[i].hash, hash)) return by_name(known[i].format);
    return NULL;
}

/* a template's last newline is not part of what it renders, and some files have one more than others */
static exc_status by_text(exc_ctx *ctx, const char *what, const char *text, size_t n,
                          const exc_format **format) {
    char hash[33], list[256];
    *format = n && text[n - 1] == '\n' ? by_hash(text, n - 1, hash) : NULL;
    if (!*format) *format = by_hash(text, n, hash);
    if (*format) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT,
                    "%s: its chat template is not one of the known ones (hash %s); " WAYS_OUT, what, hash,
                    names(list));
}

/* chat_template is a text, or a list of named ones of which "default" counts */
static exc_status from_config(exc_ctx *ctx, const char *path, const json_t *config,
                              const exc_format **format) {
    const json_t *text = json_object_get(config, "chat_template");
    char list[256];
    if (json_is_array(text)) {
        size_t i;
        json_t *one, *found = NULL;
        json_array_foreach((json_t *)text, i, one) {
            const json_t *name = json_object_get(one, "name");
            if (json_is_string(name) && !strcmp(json_string_value(name), "default"))
                found = json_object_get(one, "template");
        }
        text = found;
    }
    if (!json_is_string(text))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected chat_template, found none; " WAYS_OUT, path,
                        names(list));
    return by_text(ctx, path, json_string_value(text), json_string_length(text), format);
}

static bool exists(const char *path) {
    struct stat sb;
    return !stat(path, &sb);
}

/* chat_template.jinja where there is one, else tokenizer_config.json, as transformers has it */
static exc_status from_folder(exc_ctx *ctx, const char *dir, const exc_format **format) {
    char *jinja = NULL, *config = NULL, *text = NULL, list[256];
    json_t *root = NULL;
    size_t n;
    exc_status st;
    EXC_GOTO(done, exc_path_join(ctx, dir, "chat_template.jinja", &jinja));
    EXC_GOTO(done, exc_path_join(ctx, dir, "tokenizer_config.json", &config));
    if (exists(jinja)) {
        EXC_GOTO(done, exc_read_file(ctx, jinja, 1 << 20, &text, &n));
        EXC_GOTO(done, by_text(ctx, jinja, text, n, format));
    } else if (exists(config)) {
        EXC_GOTO(done, exc_json_load(ctx, config, 0, &root));
        EXC_GOTO(done, from_config(ctx, config, root, format));
    } else {
        st = exc_fail(ctx, EXC_ERR_INPUT,
                      "%s: expected a chat template (tokenizer_config.json), found none; " WAYS_OUT, dir,
                      names(list));
    }
done:
    json_decref(root);
    exc_release(text);
    exc_release(jinja);
    exc_release(config);
    return st;
}

exc_status exc_chat_load(exc_ctx *ctx, const char *model_dir, const char *name, exc_chat **out) {
    const exc_format *format = NULL;
    char list[256];
    *out = NULL;
    if (name && !(format = by_name(name)))
        return exc_fail(ctx, EXC_ERR_USAGE, "--template: expected one of %s, found %s", names(list),
                        exc_show(name, strlen(name)));
    if (!name) EXC_TRY(from_folder(ctx, model_dir, &format));
    exc_chat *c = exc_alloc(ctx, 1, sizeof *c, "chat format");
    if (!c) return EXC_ERR_MEMORY;
    c->format = format;
    *out = c;
    return EXC_OK;
}

void exc_chat_free(exc_chat *c) { exc_release(c); }

exc_status exc_chat_fits(exc_ctx *ctx, const exc_chat *c, const exc_tokenizer *t) {
    for (size_t i = 0; i < EXC_COUNT(c->format->markers) && c->format->markers[i]; i++) {
        const char *marker = c->format->markers[i];
        int32_t id = exc_tokenizer_id(t, marker);
        if (id < 0 || !(t->tokens[id].flags & EXC_TOKEN_ADDED))
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "chat format %s: its marker \"%s\" is no added token of this model's tokenizer",
                            c->format->name, marker);
    }
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * messages */

static exc_status read_text(exc_ctx *ctx, const char *what, size_t i, const char *key, const json_t *v,
                            exc_span *out) {
    if (!json_is_string(v))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: message %zu: %s: expected text", what, i + 1, key);
    *out = (exc_span){json_string_value(v), json_string_length(v)};
    return EXC_OK;
}

static exc_status read_message(exc_ctx *ctx, const char *what, size_t i, const json_t *o, exc_message *m) {
    static const char *const roles[] = {
        [EXC_SYSTEM] = "system", [EXC_USER] = "user", [EXC_ASSISTANT] = "assistant"};
    static const char *const known_keys[] = {"role", "content", "reasoning_content", NULL};
    exc_span role = {0};
    *m = (exc_message){0};
    if (!json_is_object(o))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: message %zu: expected an object", what, i + 1);
    EXC_TRY(exc_json_keys(ctx, o, what, known_keys));
    EXC_TRY(read_text(ctx, what, i, "role", json_object_get(o, "role"), &role));
    EXC_TRY(read_text(ctx, what, i, "content", json_object_get(o, "content"), &m->content));
    const json_t *thought = json_object_get(o, "reasoning_content");
    if (thought && !json_is_null(thought))
        EXC_TRY(read_text(ctx, what, i, "reasoning_content", thought, &m->reasoning));
    for (size_t r = 0; r < EXC_COUNT(roles); r++)
        if (!strcmp(role.s, roles[r])) {
            m->role = (exc_role)r;
            return EXC_OK;
        }
    return exc_fail(ctx, EXC_ERR_INPUT,
                    "%s: message %zu: role: expected system, user or assistant, found \"%s\"", what, i + 1,
                    exc_show(role.s, role.n));
}

exc_status exc_chat_parts(exc_ctx *ctx, const exc_chat *c, const char *what, const json_t *messages,
                          bool add_generation_prompt, int enable_thinking, exc_rendering *out) {
    size_t n = json_array_size(messages), i;
    json_t *o;
    if (!n)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: messages: expected a list of at least one, found none",
                        what);
    exc_message *list = exc_alloc(ctx, n, sizeof *list, "messages");
    exc_status st = list ? EXC_OK : EXC_ERR_MEMORY;
    json_array_foreach((json_t *)messages, i, o) {
        if (st == EXC_OK) st = read_message(ctx, what, i, o, list + i);
    }
    exc_turns t = {ctx, list, n, add_generation_prompt, enable_thinking, out};
    if (st == EXC_OK) st = c->format->render(&t);
    if (st == EXC_OK && (out->text.failed || out->parts.failed))
        st = exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory to render it", what);
    exc_release(list);
    return st;
}

exc_status exc_chat_render(exc_ctx *ctx, const exc_chat *c, const json_t *messages,
                           bool add_generation_prompt, int enable_thinking, exc_buf *out) {
    exc_rendering r = {0};
    exc_status st =
        exc_chat_parts(ctx, c, "conversation", messages, add_generation_prompt, enable_thinking, &r);
    if (st == EXC_OK) exc_buf_put(out, r.text.data ? r.text.data : "", r.text.len);
    if (st == EXC_OK && out->failed)
        st = exc_fail(ctx, EXC_ERR_MEMORY, "conversation: no memory to render it");
    exc_rendering_free(&r);
    return st;
}
