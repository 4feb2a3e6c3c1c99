/* formats.c - the built-in chat formats, one function each: what the family's own Jinja template gives for
 * system, user and assistant turns, character for character. Tools are not rendered.
 *
 * Three kinds of text go out: markup, in which added tokens are recognised; a person's words (user and system
 * turns), in which they are not, so that `<|im_end|>` typed into a prompt ends nothing; and what the model
 * itself said earlier, which may hold its own markers and is treated as markup. */
#include <string.h>
#include <stdlib.h>
#include <time.h>

#include "chat.h"

/* ---------------------------------------------------------------------------------------------- spans, as
 * Python's str */

static exc_span span(const char *s) { return (exc_span){s, strlen(s)}; }

static bool ends(exc_span x, const char *tail) {
    size_t n = strlen(tail);
    return x.n >= n && !memcmp(x.s + x.n - n, tail, n);
}

static bool begins(exc_span x, const char *head) {
    size_t n = strlen(head);
    return x.n >= n && !memcmp(x.s, head, n);
}

static bool has(exc_span x, const char *part) { return memmem(x.s, x.n, part, strlen(part)); }

/* set NULL: white space. Python strips all of Unicode's; the ASCII ones and the no-break, ideographic and
 * line separators are what prompts have. */
static size_t strippable(exc_span x, const char *set, bool from_end) {
    static const char *const spaces[] = {" ",
                                         "\n",
                                         "\t",
                                         "\r",
                                         "\f",
                                         "\v",
                                         "\x1c",
                                         "\x1d",
                                         "\x1e",
                                         "\x1f",
                                         "\xc2\x85",
                                         "\xc2\xa0",
                                         "\xe1\x9a\x80",
                                         "\xe2\x80\x80",
                                         "\xe2\x80\x81",
                                         "\xe2\x80\x82",
                                         "\xe2\x80\x83",
                                         "\xe2\x80\x84",
                                         "\xe2\x80\x85",
                                         "\xe2\x80\x86",
                                         "\xe2\x80\x87",
                                         "\xe2\x80\x88",
                                         "\xe2\x80\x89",
                                         "\xe2\x80\x8a",
                                         "\xe2\x80\xa8",
                                         "\xe2\x80\xa9",
                                         "\xe2\x80\xaf",
                                         "\xe2\x81\x9f",
                                         "\xe3\x80\x80"};
    if (set)
        return x.n && strchr(set, from_end ? x.s[x.n - 1] : x.s[0]) && (from_end ? x.s[x.n - 1] : x.s[0]);
    for (size_t i = 0; i < EXC_COUNT(spaces); i++)
        if (from_end ? ends(x, spaces[i]) : begins(x, spaces[i])) return strlen(spaces[i]);
    return 0;
}

static exc_span lstrip(exc_span x, const char *set) {
    for (size_t n; (n = strippable(x, set, false));) x = (exc_span){x.s + n, x.n - n};
    return x;
}

static exc_span rstrip(exc_span x, const char *set) {
    for (size_t n; (n = strippable(x, set, true));) x.n -= n;
    return x;
}

static exc_span strip(exc_span x, const char *set) { return rstrip(lstrip(x, set), set); }

/* x.split(mark)[0] and x.split(mark)[-1]; the whole where there is no mark */
static exc_span before_first(exc_span x, const char *mark) {
    const char *at = memmem(x.s, x.n, mark, strlen(mark));
    return at ? (exc_span){x.s, (size_t)(at - x.s)} : x;
}

static exc_span after_last(exc_span x, const char *mark) {
    size_t n = strlen(mark);
    for (const char *at; (at = memmem(x.s, x.n, mark, n));)
        x = (exc_span){at + n, (size_t)(x.s + x.n - (at + n))};
    return x;
}

/* -------------------------------------------------------------------------------------------------------------
 * output */

static void put(const exc_turns *t, unsigned kind, exc_span x) { exc_rendering_put(t->out, kind, x.s, x.n); }
static void markup(const exc_turns *t, const char *s) { put(t, EXC_PART_MATCH, span(s)); }
static void model(const exc_turns *t, exc_span x) { put(t, EXC_PART_MATCH, x); }
static void words(const exc_turns *t, const exc_message *m, exc_span x) {
    put(t, m->role == EXC_USER ? EXC_PART_CONTENT : 0, x);
}

static const char *role_name(const exc_message *m) {
    return m->role == EXC_SYSTEM ? "system" : m->role == EXC_USER ? "user" : "assistant";
}

/* what an assistant turn thought and what it said; reasoning is empty where there is none */
typedef struct answer {
    exc_span reasoning, said;
} answer;

static answer split_answer(const exc_message *m) {
    answer a = {m->reasoning.s ? m->reasoning : span(""), m->content};
    if (m->reasoning.s || !memmem(m->content.s, m->content.n, "</think>", 8)) return a;
    a.said = lstrip(after_last(m->content, "</think>"), "\n");
    a.reasoning = lstrip(after_last(rstrip(before_first(m->content, "</think>"), "\n"), "<think>"), "\n");
    return a;
}

static exc_status no_system_after_first(const exc_turns *t, const char *name) {
    for (size_t i = 1; i < t->n; i++)
        if (t->message[i].role == EXC_SYSTEM)
            return exc_fail(t->ctx, EXC_ERR_INPUT,
                            "chat format %s: expected a system message only in first place, found one at %zu",
                            name, i + 1);
    return EXC_OK;
}

/* --------------------------------------------------------------------------------------------------------------
 * ChatML */

static void chatml_open(const exc_turns *t, const exc_message *m) {
    markup(t, "<|im_start|>");
    markup(t, role_name(m));
    markup(t, "\n");
}

static exc_status chatml(const exc_turns *t) {
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        chatml_open(t, m);
        if (m->role == EXC_ASSISTANT)
            model(t, m->content);
        else
            words(t, m, m->content);
        markup(t, "<|im_end|>\n");
    }
    if (t->answer) markup(t, "<|im_start|>assistant\n");
    return EXC_OK;
}

/* the last user turn that is no tool's response, n where there is none; thinking before it is left out */
static size_t last_query(const exc_turns *t, bool stripped) {
    for (size_t i = t->n; i-- > 0;) {
        const exc_message *m = t->message + i;
        exc_span said = stripped ? strip(m->content, NULL) : m->content;
        bool tool = begins(said, "<tool_response>") && ends(said, "</tool_response>");
        if (m->role == EXC_USER && !tool) return i;
    }
    return t->n;
}

/* Qwen3's turns; where a last answer has not thought it shows so, if `empty` */
static void qwen_turns(const exc_turns *t, bool empty) {
    size_t query = last_query(t, false);
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        chatml_open(t, m);
        if (m->role != EXC_ASSISTANT) {
            words(t, m, m->content);
        } else {
            answer a = split_answer(m);
            bool thinks = i > query && ((empty && i + 1 == t->n) || a.reasoning.n);
            if (thinks) {
                markup(t, "<think>\n");
                model(t, strip(a.reasoning, "\n"));
                markup(t, "\n</think>\n\n");
            }
            model(t, thinks ? lstrip(a.said, "\n") : a.said);
        }
        markup(t, "<|im_end|>\n");
    }
    if (t->answer) markup(t, "<|im_start|>assistant\n");
}

static exc_status qwen3(const exc_turns *t) {
    qwen_turns(t, true);
    if (t->answer && t->thinking == 0) markup(t, "<think>\n\n</think>\n\n");
    return EXC_OK;
}

/* the releases of 2507 either always think, and the prompt opens it, or never do */
static exc_status qwen3_thinking(const exc_turns *t) {
    qwen_turns(t, true);
    if (t->answer) markup(t, "<think>\n");
    return EXC_OK;
}

static exc_status qwen3_instruct(const exc_turns *t) {
    qwen_turns(t, false);
    return EXC_OK;
}

/* Qwen3.5: contents are stripped, the prompt opens the thinking itself */
static exc_status qwen35(const exc_turns *t) {
    EXC_TRY(no_system_after_first(t, "qwen3_5"));
    size_t query = last_query(t, true);
    if (query == t->n)
        return exc_fail(t->ctx, EXC_ERR_INPUT, "chat format qwen3_5: expected a user message, found none");
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        exc_message stripped = {m->role, strip(m->content, NULL), m->reasoning};
        chatml_open(t, m);
        if (m->role != EXC_ASSISTANT) {
            words(t, m, stripped.content);
        } else {
            answer a = split_answer(&stripped);
            if (i > query) {
                markup(t, "<think>\n");
                model(t, strip(a.reasoning, NULL));
                markup(t, "\n</think>\n\n");
            }
            model(t, a.said);
        }
        markup(t, "<|im_end|>\n");
    }
    if (t->answer)
        markup(t, t->thinking == 0 ? "<|im_start|>assistant\n<think>\n\n</think>\n\n"
                                   : "<|im_start|>assistant\n<think>\n");
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * DeepSeek */

#define DEEPSEEK_BOS "<｜begin▁of▁sentence｜>"
#define DEEPSEEK_EOS "<｜end▁of▁sentence｜>"
#define DEEPSEEK_USER "<｜User｜>"
#define DEEPSEEK_ASSISTANT "<｜Assistant｜>"

static exc_status deepseek(const exc_turns *t) {
    bool first = true;
    markup(t, DEEPSEEK_BOS);
    for (size_t i = 0; i < t->n; i++) {
        if (t->message[i].role != EXC_SYSTEM) continue;
        if (!first) markup(t, "\n\n");
        words(t, t->message + i, t->message[i].content);
        first = false;
    }
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        if (m->role == EXC_USER) {
            markup(t, DEEPSEEK_USER);
            words(t, m, m->content);
        } else if (m->role == EXC_ASSISTANT) {
            markup(t, DEEPSEEK_ASSISTANT);
            model(t, m->content);
            markup(t, DEEPSEEK_EOS);
        }
    }
    if (t->answer) markup(t, DEEPSEEK_ASSISTANT);
    return EXC_OK;
}

/* -------------------------------------------------------------------------------------------------------------
 * GLM-4.5 */

static exc_status glm(const exc_turns *t) {
    size_t query = t->n;
    for (size_t i = 0; i < t->n; i++)
        if (t->message[i].role == EXC_USER) query = i;
    markup(t, "[gMASK]<sop>");
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        if (m->role != EXC_ASSISTANT) {
            markup(t, m->role == EXC_USER ? "<|user|>\n" : "<|system|>\n");
            words(t, m, m->content);
            if (m->role == EXC_USER && t->thinking == 0 && !ends(m->content, "/nothink"))
                markup(t, "/nothink");
            continue;
        }
        answer a = split_answer(m);
        exc_span thought = strip(a.reasoning, NULL), said = strip(a.said, NULL);
        markup(t, "<|assistant|>\n<think>");
        if (query == t->n || i > query) model(t, thought);
        markup(t, "</think>");
        if (said.n) markup(t, "\n");
        model(t, said);
    }
    if (t->answer) markup(t, t->thinking == 0 ? "<|assistant|>\n<think></think>" : "<|assistant|>");
    return EXC_OK;
}

/* -------------------------------------------------------------------------------------------------------------
 * harmony */

/* the template writes the day; SOURCE_DATE_EPOCH makes it repeatable */
static exc_status today(const exc_turns *t, char out[11]) {
    const char *fixed = getenv("SOURCE_DATE_EPOCH");
    char *end = NULL;
    time_t now = fixed && *fixed ? (time_t)strtoll(fixed, &end, 10) : time(NULL);
    struct tm day;
    if ((end && *end) || !gmtime_r(&now, &day) || !strftime(out, 11, "%Y-%m-%d", &day))
        return exc_fail(t->ctx, EXC_ERR_USAGE, "SOURCE_DATE_EPOCH: expected seconds since 1970, found %s",
                        fixed);
    return EXC_OK;
}

static exc_status harmony(const exc_turns *t) {
    char day[11];
    EXC_TRY(no_system_after_first(t, "gpt_oss"));
    EXC_TRY(today(t, day));
    markup(t, "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
              "Knowledge cutoff: 2024-06\nCurrent date: ");
    markup(t, day);
    markup(t, "\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
              "included for "
              "every message.<|end|>");
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        if (m->role == EXC_SYSTEM && !m->content.n) continue;
        if (m->role == EXC_ASSISTANT && (has(m->content, "<|channel|>analysis<|message|>") ||
                                         has(m->content, "<|channel|>final<|message|>")))
            return exc_fail(
                t->ctx, EXC_ERR_INPUT,
                "chat format gpt_oss: expected an answer without <|channel|> markup, found some at %zu",
                i + 1);
        markup(t, m->role == EXC_SYSTEM ? "<|start|>developer<|message|># Instructions\n\n"
                  : m->role == EXC_USER ? "<|start|>user<|message|>"
                                        : "<|start|>assistant<|channel|>final<|message|>");
        if (m->role == EXC_ASSISTANT)
            model(t, m->content);
        else
            words(t, m, m->content);
        if (m->role == EXC_SYSTEM) markup(t, "\n\n");
        markup(t, m->role == EXC_ASSISTANT && i + 1 == t->n && !t->answer ? "<|return|>" : "<|end|>");
    }
    if (t->answer) markup(t, "<|start|>assistant");
    return EXC_OK;
}

/* ----------------------------------------------------------------------------------------- OLMoE, Mixtral,
 * Moonlight */

static exc_status olmoe(const exc_turns *t) {
    markup(t, "<|endoftext|>");
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        markup(t, "<|");
        markup(t, role_name(m));
        markup(t, "|>\n");
        if (m->role == EXC_ASSISTANT) {
            model(t, m->content);
            markup(t, i + 1 == t->n ? "<|endoftext|>" : "<|endoftext|>\n");
        } else {
            words(t, m, m->content);
            markup(t, "\n");
        }
    }
    if (t->answer) markup(t, "<|assistant|>\n");
    return EXC_OK;
}

/* turns must alternate; a system message goes in front of the first user's words; `end` closes an answer */
static exc_status instruct(const exc_turns *t, const char *end) {
    const exc_message *system = t->n && t->message[0].role == EXC_SYSTEM ? t->message : NULL;
    markup(t, "<s>");
    for (size_t i = system ? 1 : 0, turn = 0; i < t->n; i++, turn++) {
        const exc_message *m = t->message + i;
        if (m->role != (turn % 2 ? EXC_ASSISTANT : EXC_USER))
            return exc_fail(t->ctx, EXC_ERR_INPUT,
                            "chat format mixtral: expected user and assistant in turns, found %s at %zu",
                            role_name(m), i + 1);
        markup(t, m->role == EXC_USER ? " [INST] " : " ");
        if (m->role == EXC_USER && system && !turn) {
            words(t, system, system->content);
            markup(t, "\n\n");
        }
        if (m->role == EXC_USER)
            words(t, m, m->content);
        else
            model(t, m->content);
        markup(t, m->role == EXC_USER ? " [/INST]" : end);
    }
    return EXC_OK;
}

static exc_status mixtral(const exc_turns *t) { return instruct(t, "</s>"); }
static exc_status mixtral22(const exc_turns *t) { return instruct(t, " </s>"); }

static exc_status moonlight(const exc_turns *t) {
    if (!t->n || t->message[0].role != EXC_SYSTEM)
        markup(t, "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>");
    for (size_t i = 0; i < t->n; i++) {
        const exc_message *m = t->message + i;
        markup(t, "<|im_");
        markup(t, role_name(m));
        markup(t, "|>");
        markup(t, role_name(m));
        markup(t, "<|im_middle|>");
        if (m->role == EXC_ASSISTANT)
            model(t, m->content);
        else
            words(t, m, m->content);
        markup(t, "<|im_end|>");
    }
    if (t->answer) markup(t, "<|im_assistant|>assistant<|im_middle|>");
    return EXC_OK;
}

const exc_format exc_formats[] = {
    {"chatml", "plain ChatML", chatml, {"<|im_start|>", "<|im_end|>"}},
    {"qwen3", "ChatML with thinking, Qwen3", qwen3, {"<|im_start|>", "<|im_end|>"}},
    {"qwen3_thinking", "Qwen3 2507, Thinking", qwen3_thinking, {"<|im_start|>", "<|im_end|>", "<think>"}},
    {"qwen3_instruct", "Qwen3 2507, Instruct", qwen3_instruct, {"<|im_start|>", "<|im_end|>"}},
    {"qwen3_5",
     "ChatML, stripped, thinking opened by the prompt",
     qwen35,
     {"<|im_start|>", "<|im_end|>", "<think>"}},
    {"deepseek_v3", "DeepSeek-V3", deepseek, {DEEPSEEK_BOS, DEEPSEEK_EOS, DEEPSEEK_USER, DEEPSEEK_ASSISTANT}},
    {"glm4_moe", "GLM-4.5", glm, {"[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"}},
    {"gpt_oss", "harmony", harmony, {"<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"}},
    {"olmoe", "Tulu's <|user|>, OLMoE", olmoe, {"<|endoftext|>"}},
    {"mixtral", "[INST], Mixtral 8x7B", mixtral, {"<s>", "</s>"}},
    {"mixtral_8x22b", "[INST], Mixtral 8x22B", mixtral22, {"<s>", "</s>"}},
    {"moonlight",
     "Moonlight, Kimi",
     moonlight,
     {"<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>"}},
};
const size_t exc_formats_count = EXC_COUNT(exc_formats);
