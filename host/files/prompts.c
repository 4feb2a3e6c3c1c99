/* prompts.c - prompt files to tokens: `.txt`, one prompt a line, or `.jsonl`, one object a line with text,
 * messages or tokens.
 *
 * Every message about a line names file:line. Text becomes one user turn of the model's chat format (or goes
 * in raw); the user's words are marked as content token by token, so that capture can leave scaffolding out.
 * Tokenizer and chat format are asked for only when a line needs them: a file of token lists works with a
 * model folder that has neither. */
#include <string.h>

#include "chat.h"

enum { FILE_LIMIT = 1 << 30, PROGRESS_LINES = 1024 };

/* where lines get their tokenizer and format from */
typedef struct source {
    exc_ctx *ctx;
    const exc_prompt_options *opt;
    const char *dir; /* NULL: tokenizer and chat are all there is */
    const exc_tokenizer *t;
    const exc_chat *chat;
    exc_chat *own; /* chat, where this file loaded it */
    bool fits;     /* the format's markers were found in the tokenizer */
} source;

/* one line of a file, without its line end */
typedef struct line {
    const char *s;
    size_t n, number;
} line;

/* -------------------------------------------------------------------------------------------------------------
 * lines */

/* The next line that has more than white space on it; false at the end. UTF-8 is checked by the caller, by
 * line. */
static bool next_line(const char *data, size_t n, size_t *at, line *l) {
    while (*at < n) {
        const char *s = data + *at, *end = memchr(s, '\n', n - *at);
        size_t len = end ? (size_t)(end - s) : n - *at;
        *at += len + (end != NULL);
        l->number++;
        if (len && s[len - 1] == '\r') len--;
        size_t i = 0;
        while (i < len && (s[i] == ' ' || s[i] == '\t' || s[i] == '\r')) i++;
        if (i == len) continue;
        l->s = s;
        l->n = len;
        return true;
    }
    return false;
}

static exc_status check_text(exc_ctx *ctx, const char *path, const line *l) {
    size_t bad;
    if (memchr(l->s, 0, l->n))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s:%zu: expected text, found a NUL byte", path, l->number);
    if (exc_utf8_valid(l->s, l->n, &bad)) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s:%zu: expected UTF-8 text, found byte %s at column %zu", path,
                    l->number, exc_show(l->s + bad, 1), bad + 1);
}

static exc_status read_text_file(exc_ctx *ctx, const char *path, char **data, size_t *n, size_t *start) {
    EXC_TRY(exc_read_file(ctx, path, FILE_LIMIT, data, n));
    *start = *n >= 3 && !memcmp(*data, "\xef\xbb\xbf", 3) ? 3 : 0; /* a byte order mark is no text */
    return EXC_OK;
}

static exc_status take_line(exc_ctx *ctx, const char *path, const line *l, char **out) {
    EXC_TRY(check_text(ctx, path, l));
    *out = exc_alloc(ctx, l->n + 1, 1, "line");
    if (!*out) return EXC_ERR_MEMORY;
    memcpy(*out, l->s, l->n);
    (*out)[l->n] = 0;
    return EXC_OK;
}

exc_status exc_lines_read(exc_ctx *ctx, const char *path, char ***lines, size_t *count) {
    char *data;
    size_t n, start, total = 0;
    *lines = NULL;
    *count = 0;
    EXC_TRY(read_text_file(ctx, path, &data, &n, &start));
    line l = {0};
    for (size_t at = start; next_line(data, n, &at, &l);) total++;
    char **list = exc_zalloc(ctx, total ? total : 1, sizeof *list, "lines");
    exc_status st = list ? EXC_OK : EXC_ERR_MEMORY;
    l = (line){0};
    for (size_t at = start, i = 0; st == EXC_OK && next_line(data, n, &at, &l); i++)
        st = take_line(ctx, path, &l, list + i);
    exc_release(data);
    if (st != EXC_OK) {
        if (list) exc_lines_free(list, total);
        return st;
    }
    *lines = list;
    *count = total;
    return EXC_OK;
}

void exc_lines_free(char **lines, size_t count) {
    for (size_t i = 0; lines && i < count; i++) exc_release(lines[i]);
    exc_release(lines);
}

/* --------------------------------------------------------------------------------------------------- one
 * prompt to ids */

static exc_status need_tokenizer(const source *s, const char *what) {
    if (s->t) return EXC_OK;
    return exc_fail(s->ctx, EXC_ERR_INPUT,
                    "%s: text needs tokenizer.json%s%s, found none; give {\"tokens\":[..]}", what,
                    s->dir ? " in " : "", s->dir ? s->dir : "");
}

static exc_status need_chat(source *s, const char *what) {
    EXC_TRY(need_tokenizer(s, what));
    if (!s->chat && s->dir) {
        EXC_TRY(exc_chat_load(s->ctx, s->dir, s->opt->chat, &s->own));
        s->chat = s->own;
    }
    if (!s->chat)
        return exc_fail(s->ctx, EXC_ERR_INPUT, "%s: expected a chat format, found none; use --raw", what);
    if (!s->fits) EXC_TRY(exc_chat_fits(s->ctx, s->chat, s->t));
    s->fits = true;
    return EXC_OK;
}

static exc_status encode_raw(source *s, const char *what, exc_span text, bool special, exc_ids *ids,
                             exc_buf *content) {
    exc_part whole = {text.n, EXC_PART_CONTENT | (special ? EXC_PART_MATCH : 0)};
    EXC_TRY(need_tokenizer(s, what));
    return exc_encode_parts(s->ctx, s->t, text.s, &whole, 1, special, ids, content);
}

static exc_status encode_messages(source *s, const char *what, const json_t *messages, bool answer,
                                  int thinking, exc_ids *ids, exc_buf *content) {
    exc_rendering r = {0};
    const exc_part *parts;
    EXC_TRY(need_chat(s, what));
    exc_status st = exc_chat_parts(s->ctx, s->chat, what, messages, answer, thinking, &r);
    if (st == EXC_OK) {
        size_t n = exc_rendering_parts(&r, &parts);
        st = exc_encode_parts(s->ctx, s->t, r.text.data, parts, n, false, ids, content);
    }
    exc_rendering_free(&r);
    return st;
}

static exc_status encode_turn(source *s, const char *what, exc_span text, exc_ids *ids, exc_buf *content) {
    json_t *messages = json_array();
    if (s->opt->system)
        json_array_append_new(messages, json_pack("{s:s,s:s}", "role", "system", "content", s->opt->system));
    json_array_append_new(messages,
                          json_pack("{s:s,s:o}", "role", "user", "content", json_stringn(text.s, text.n)));
    size_t want = s->opt->system ? 2 : 1;
    exc_status st =
        json_array_size(messages) == want
            ? encode_messages(s, what, messages, true, -1, ids, content)
            : exc_fail(s->ctx, EXC_ERR_INPUT, "%s: expected UTF-8 in the text and the system message", what);
    json_decref(messages);
    return st;
}

static exc_status read_tokens(source *s, const char *what, const json_t *list, exc_ids *ids,
                              exc_buf *content) {
    size_t i;
    json_t *v;
    EXC_TRY(exc_ids_reserve(s->ctx, ids, json_array_size(list)));
    json_array_foreach((json_t *)list, i, v) {
        int64_t id = json_is_integer(v) ? json_integer_value(v) : -1;
        int64_t most = INT32_MAX;
        if (id < 0 || id > most)
            return exc_fail(s->ctx, EXC_ERR_INPUT, "%s: token %zu: expected an id of at least 0, found %s",
                            what, i, json_is_integer(v) ? "another number" : "no whole number");
        char counts = !(s->t && exc_tokenizer_is_special(s->t, (int32_t)id));
        ids->data[ids->len++] = (int32_t)id;
        exc_buf_put(content, &counts, 1);
    }
    return EXC_OK;
}

/* add_generation_prompt (true), enable_thinking (not said) beside "messages" */
static exc_status read_switches(exc_ctx *ctx, const char *what, const json_t *o, bool *answer,
                                int *thinking) {
    bool think;
    EXC_TRY(exc_json_bool_or(ctx, o, what, "add_generation_prompt", true, answer));
    EXC_TRY(exc_json_bool_or(ctx, o, what, "enable_thinking", false, &think));
    const json_t *said = json_object_get(o, "enable_thinking");
    *thinking = said && !json_is_null(said) ? think : -1;
    return EXC_OK;
}

/* --------------------------------------------------------------------------------------------------------------
 * prompts */

typedef struct gathering {
    source *s;
    const char *path;
    exc_ids ids;
    exc_buf content, begins, texts, lines; /* uint8_t, int64_t, char *, int64_t */
    int64_t count;
} gathering;

static exc_status put_request(gathering *g, const char *s, size_t n) {
    char *copy = NULL;
    if (s) {
        copy = exc_alloc(g->s->ctx, n + 1, 1, "prompt");
        if (!copy) return EXC_ERR_MEMORY;
        memcpy(copy, s, n);
        copy[n] = 0;
    }
    exc_buf_put(&g->texts, &copy, sizeof copy);
    if (g->texts.failed) exc_release(copy);
    return g->texts.failed ? exc_fail(g->s->ctx, EXC_ERR_MEMORY, "%s: no memory for its prompts", g->path)
                           : EXC_OK;
}

/* what a .txt line cannot be, a text of a .jsonl line may not be either: nothing but white space, or holding
 * a NUL */
static exc_status check_words(exc_ctx *ctx, const char *what, const char *key, exc_span text) {
    size_t i = 0;
    if (memchr(text.s, 0, text.n))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected text, found a NUL character", what, key);
    while (i < text.n && strchr(" \t\r\n", text.s[i])) i++;
    if (i < text.n || strcmp(key, "text")) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected a prompt, found %s", what, key,
                    text.n ? "only white space" : "an empty text");
}

static exc_status put_text(gathering *g, const char *what, exc_span text) {
    EXC_TRY(check_words(g->s->ctx, what, "text", text));
    EXC_TRY(put_request(g, text.s, text.n));
    if (g->s->opt->raw) return encode_raw(g->s, what, text, true, &g->ids, &g->content);
    return encode_turn(g->s, what, text, &g->ids, &g->content);
}

static exc_status put_messages(gathering *g, const char *what, const json_t *o, const json_t *messages) {
    const json_t *request = NULL;
    size_t i;
    json_t *m;
    bool answer;
    int thinking;
    EXC_TRY(read_switches(g->s->ctx, what, o, &answer, &thinking));
    json_array_foreach((json_t *)messages, i, m) {
        const json_t *role = json_object_get(m, "role"), *content = json_object_get(m, "content");
        if (json_is_string(content))
            EXC_TRY(check_words(g->s->ctx, what, "content",
                                (exc_span){json_string_value(content), json_string_length(content)}));
        if (json_is_string(role) && !strcmp(json_string_value(role), "user")) request = content;
    }
    EXC_TRY(put_request(g, json_string_value(request), json_string_length(request)));
    return encode_messages(g->s, what, messages, answer, thinking, &g->ids, &g->content);
}

static exc_status put_object(gathering *g, const char *what, const json_t *o) {
    const json_t *text = json_object_get(o, "text"), *messages = json_object_get(o, "messages");
    const json_t *tokens = json_object_get(o, "tokens");
    if ((text != NULL) + (messages != NULL) + (tokens != NULL) != 1)
        return exc_fail(g->s->ctx, EXC_ERR_INPUT, "%s: expected one of \"text\", \"messages\", \"tokens\"%s",
                        what, text || messages || tokens ? ", found several" : ", found none");
    if (text && !json_is_string(text))
        return exc_fail(g->s->ctx, EXC_ERR_INPUT, "%s: text: expected a string", what);
    if (text) return put_text(g, what, (exc_span){json_string_value(text), json_string_length(text)});
    if (!json_is_array(messages ? messages : tokens))
        return exc_fail(g->s->ctx, EXC_ERR_INPUT, "%s: %s: expected a list", what,
                        messages ? "messages" : "tokens");
    if (messages) return put_messages(g, what, o, messages);
    EXC_TRY(put_request(g, NULL, 0));
    return read_tokens(g->s, what, tokens, &g->ids, &g->content);
}

static bool is_jsonl(const char *path) {
    size_t n = strlen(path);
    return n >= 6 && !strcmp(path + n - 6, ".jsonl");
}

/* "file:line", for messages */
static exc_status line_name(exc_ctx *ctx, const char *path, size_t number, exc_buf *b) {
    b->len = 0;
    exc_buf_printf(b, "%s:%zu", path, number);
    return b->failed ? exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory", path) : EXC_OK;
}

static exc_status put_line(gathering *g, const line *l, const char *what) {
    size_t before = g->ids.len;
    int64_t begin = (int64_t)before, number = (int64_t)l->number;
    EXC_TRY(check_text(g->s->ctx, g->path, l));
    exc_buf_put(&g->begins, &begin, sizeof begin);
    exc_buf_put(&g->lines, &number, sizeof number);
    if (is_jsonl(g->path)) {
        json_t *o;
        EXC_TRY(exc_json_parse_text(g->s->ctx, what, l->s, l->n, &o));
        exc_status st = put_object(g, what, o);
        json_decref(o);
        EXC_TRY(st);
    } else {
        EXC_TRY(put_text(g, what, (exc_span){l->s, l->n}));
    }
    g->count++;
    if (g->ids.len == before)
        return exc_fail(g->s->ctx, EXC_ERR_INPUT, "%s: expected at least one token, found none", what);
    return EXC_OK;
}

static exc_status put_lines(gathering *g, const char *data, size_t n, size_t start) {
    exc_buf what = {0};
    exc_status st = EXC_OK;
    line l = {0};
    for (size_t at = start; st == EXC_OK && next_line(data, n, &at, &l);) {
        if (g->s->opt->limit > 0 && g->count == g->s->opt->limit) break;
        EXC_GOTO(done, line_name(g->s->ctx, g->path, l.number, &what));
        EXC_GOTO(done, put_line(g, &l, what.data));
        if (g->count % PROGRESS_LINES == 0) st = exc_progress(g->s->ctx, "tokenize", at, n, "bytes");
    }
    if (st == EXC_OK && !g->count)
        st = exc_fail(g->s->ctx, EXC_ERR_INPUT, "%s: expected at least one prompt, found none", g->path);
done:
    exc_buf_free(&what);
    return st;
}

/* the gathered arrays become the set's own; on failure nothing is handed over */
static exc_status hand_over(gathering *g, exc_prompts *p) {
    int64_t end = (int64_t)g->ids.len;
    exc_buf_put(&g->begins, &end, sizeof end);
    if (g->begins.failed || g->content.failed || g->lines.failed)
        return exc_fail(g->s->ctx, EXC_ERR_MEMORY, "%s: no memory for its prompts", g->path);
    if (!(p->path = exc_strdup(g->s->ctx, g->path))) return EXC_ERR_MEMORY;
    p->tokens = g->ids.data;
    p->begin = (int64_t *)(void *)g->begins.data;
    p->text = (char **)(void *)g->texts.data;
    p->content = (uint8_t *)g->content.data;
    p->line = (int64_t *)(void *)g->lines.data;
    p->count = g->count;
    g->ids = (exc_ids){0};
    g->begins = g->texts = g->content = g->lines = (exc_buf){0};
    return EXC_OK;
}

static void drop(gathering *g) {
    for (size_t i = 0; i < g->texts.len / sizeof(char *); i++)
        exc_release(((char **)(void *)g->texts.data)[i]);
    exc_ids_free(&g->ids);
    exc_buf_free(&g->content);
    exc_buf_free(&g->begins);
    exc_buf_free(&g->texts);
    exc_buf_free(&g->lines);
}

static exc_status read_prompts(source *s, const char *path, exc_prompts **out) {
    char *data = NULL;
    size_t n, start;
    *out = NULL;
    EXC_TRY(read_text_file(s->ctx, path, &data, &n, &start));
    gathering g = {.s = s, .path = path};
    exc_prompts *p = exc_zalloc(s->ctx, 1, sizeof *p, "prompts");
    exc_status st = p ? put_lines(&g, data, n, start) : EXC_ERR_MEMORY;
    if (st == EXC_OK) st = hand_over(&g, p);
    if (st == EXC_OK) exc_hash_hex(data, n, p->hash);
    drop(&g);
    exc_release(data);
    exc_chat_free(s->own);
    if (st == EXC_OK)
        *out = p;
    else
        exc_release(p);
    return st;
}

exc_status exc_prompts_read(exc_ctx *ctx, const exc_tokenizer *t, const exc_chat *chat, const char *path,
                            const exc_prompt_options *opt, exc_prompts **out) {
    source s = {.ctx = ctx, .opt = opt, .t = t, .chat = chat};
    return read_prompts(&s, path, out);
}

exc_status exc_prompts_load(exc_ctx *ctx, const char *model_dir, const char *path,
                            const exc_prompt_options *options, exc_prompts **prompts) {
    exc_prompt_options opt = EXC_PROMPT_OPTIONS;
    exc_clear(ctx);
    *prompts = NULL;
    if (options) memcpy(&opt, options, options->size < sizeof opt ? options->size : sizeof opt);
    if (opt.limit < 0) return exc_fail(ctx, EXC_ERR_USAGE, "limit: expected at least 0, found %d", opt.limit);
    if (opt.system && !exc_utf8_valid(opt.system, strlen(opt.system), NULL))
        return exc_fail(ctx, EXC_ERR_USAGE, "system message: expected UTF-8 text");
    exc_tokenizer *t;
    EXC_TRY(exc_tokenizer_maybe(ctx, model_dir, &t)); /* without one only token lists can be read */
    source s = {.ctx = ctx, .opt = &opt, .dir = model_dir, .t = t};
    exc_status st = read_prompts(&s, path, prompts);
    exc_tokenizer_free(t);
    return st;
}

int64_t exc_prompts_count(const exc_prompts *prompts) { return prompts->count; }

const int32_t *exc_prompts_tokens(const exc_prompts *prompts, int64_t i, int64_t *count) {
    bool there = i >= 0 && i < prompts->count;
    if (count) *count = there ? prompts->begin[i + 1] - prompts->begin[i] : 0;
    return there ? prompts->tokens + prompts->begin[i] : NULL;
}

void exc_prompts_free(exc_prompts *prompts) {
    if (!prompts) return;
    for (int64_t i = 0; i < prompts->count; i++) exc_release(prompts->text[i]);
    exc_release(prompts->tokens);
    exc_release(prompts->begin);
    exc_release(prompts->text);
    exc_release(prompts->content);
    exc_release(prompts->path);
    exc_release(prompts->line);
    exc_release(prompts);
}

/* ----------------------------------------------------------------------------------------------- the verb
 * `tokenize` */

/* {"text","special"} as it stands, or as one user turn; {"messages",..} by the chat format */
static exc_status tokenize_object(source *s, const char *what, const json_t *o, bool chat, exc_ids *ids) {
    const json_t *text = json_object_get(o, "text"), *messages = json_object_get(o, "messages");
    bool special, answer;
    int thinking;
    if ((text != NULL) == (messages != NULL))
        return exc_fail(s->ctx, EXC_ERR_INPUT, "%s: expected one of \"text\", \"messages\"", what);
    if (messages) {
        if (!json_is_array(messages))
            return exc_fail(s->ctx, EXC_ERR_INPUT, "%s: messages: expected a list", what);
        EXC_TRY(read_switches(s->ctx, what, o, &answer, &thinking));
        return encode_messages(s, what, messages, answer, thinking, ids, NULL);
    }
    if (!json_is_string(text)) return exc_fail(s->ctx, EXC_ERR_INPUT, "%s: text: expected a string", what);
    exc_span span = {json_string_value(text), json_string_length(text)};
    if (chat) return encode_turn(s, what, span, ids, NULL);
    EXC_TRY(exc_json_bool_or(s->ctx, o, what, "special", true, &special));
    return encode_raw(s, what, span, special, ids, NULL);
}

static void put_ids(exc_buf *out, const exc_ids *ids) {
    exc_buf_puts(out, "{\"ids\":[");
    for (size_t i = 0; i < ids->len; i++) exc_buf_printf(out, i ? ",%d" : "%d", ids->data[i]);
    exc_buf_puts(out, "]}\n");
}

typedef struct tally {
    size_t lines, tokens;
} tally;

static exc_status tokenize_lines(source *s, const char *path, const char *data, size_t n, size_t start,
                                 bool chat, exc_buf *out, tally *all) {
    exc_buf what = {0};
    exc_ids ids = {0};
    exc_status st = EXC_OK;
    line l = {0};
    for (size_t at = start, i = 1; st == EXC_OK && next_line(data, n, &at, &l); i++) {
        json_t *o = NULL;
        ids.len = 0;
        EXC_GOTO(done, line_name(s->ctx, path, l.number, &what));
        EXC_GOTO(done, check_text(s->ctx, path, &l));
        EXC_GOTO(done, exc_json_parse_text(s->ctx, what.data, l.s, l.n, &o));
        st = tokenize_object(s, what.data, o, chat, &ids);
        json_decref(o);
        put_ids(out, &ids);
        *all = (tally){i, all->tokens + ids.len};
        if (st == EXC_OK && i % PROGRESS_LINES == 0) st = exc_progress(s->ctx, "tokenize", at, n, "bytes");
    }
    if (st == EXC_OK && out->failed) st = exc_fail(s->ctx, EXC_ERR_MEMORY, "%s: no memory for its ids", path);
done:
    exc_buf_free(&what);
    exc_ids_free(&ids);
    return st;
}

static exc_status tokenize_facts(exc_ctx *ctx, const char *out, const tally *all, char **json) {
    json_t *o = json_pack("{s:s,s:I,s:I}", "out", out, "lines", (json_int_t)all->lines, "tokens",
                          (json_int_t)all->tokens);
    *json = o ? exc_json_text(ctx, o) : NULL;
    json_decref(o);
    return *json ? EXC_OK : exc_fail(ctx, EXC_ERR_MEMORY, "tokenize: no memory for the result");
}

exc_status exc_tokenize(exc_ctx *ctx, const char *model_dir, const char *in, const char *out, int chat,
                        int force, char **json) {
    exc_prompt_options opt = EXC_PROMPT_OPTIONS;
    exc_tokenizer *t = NULL;
    char *data = NULL;
    size_t n = 0, start = 0;
    exc_buf lines = {0};
    tally all = {0};
    exc_clear(ctx);
    if (json) *json = NULL;
    EXC_TRY(exc_check_file(ctx, out, force));
    exc_status st = exc_tokenizer_load(ctx, model_dir, &t);
    source s = {.ctx = ctx, .opt = &opt, .dir = model_dir, .t = t};
    if (st == EXC_OK) st = read_text_file(ctx, in, &data, &n, &start);
    if (st == EXC_OK) st = tokenize_lines(&s, in, data, n, start, chat, &lines, &all);
    if (st == EXC_OK && !lines.len)
        st = exc_fail(ctx, EXC_ERR_INPUT, "%s: expected at least one line, found none", in);
    if (st == EXC_OK) st = exc_write_file(ctx, out, lines.data, lines.len, force);
    if (st == EXC_OK && json) st = tokenize_facts(ctx, out, &all, json);
    exc_buf_free(&lines);
    exc_release(data);
    exc_chat_free(s.own);
    exc_tokenizer_free(t);
    return st;
}
