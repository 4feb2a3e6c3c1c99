/* recipe.c - what tokenizer.json asks for around the merges: normaliser, pre-tokenizer, post-processor,
 * decoder.
 *
 * Each is a small tree of typed steps. Only steps whose result is known to be reproduced exactly are
 * accepted; any other is refused with its place and type, because a tokenizer that is nearly right gives text
 * that is silently wrong. Truncation and padding belong to the caller and are ignored, as transformers does.
 */
#include <string.h>

#include "tokenizer.h"

/* GPT-2's pattern: what a ByteLevel pre-tokenizer with use_regex splits by */
#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

typedef struct recipe {
    exc_ctx *ctx;
    exc_tokenizer *t;
    const char *what;
    bool seen_level; /* a ByteLevel step of the pre-tokenizer: nothing may follow it */
    bool spaces;     /* a step that writes blanks as U+2581 */
} recipe;

static exc_status refuse(const recipe *r, const char *section, const json_t *step, const char *expected) {
    const json_t *type = json_object_get(step, "type");
    const char *found = json_is_string(type) ? json_string_value(type)
                        : step               ? "a step without a type"
                                             : "none";
    return exc_fail(r->ctx, EXC_ERR_INPUT, "%s: %s: expected %s, found %s" EXC_WAY_OUT, r->what, section,
                    expected, exc_show(found, strlen(found)));
}

static bool is(const json_t *step, const char *type) {
    const json_t *t = json_object_get(step, "type");
    return json_is_string(t) && !strcmp(json_string_value(t), type);
}

typedef exc_status (*step_fn)(recipe *r, const json_t *step);

/* calls fn for a step, or for each of a Sequence, whose list stands under `list`; null is no step */
static exc_status each(recipe *r, const json_t *step, const char *list, step_fn fn) {
    if (!step || json_is_null(step)) return EXC_OK;
    if (!is(step, "Sequence")) return fn(r, step);
    size_t i;
    json_t *inner;
    json_array_foreach(json_object_get(step, list), i, inner) EXC_TRY(fn(r, inner));
    return EXC_OK;
}

#define BLANK "\xe2\x96\x81" /* U+2581 */

static bool says(const json_t *o, const char *key, const char *value) {
    const json_t *v = json_object_get(o, key);
    return json_is_string(v) && !strcmp(json_string_value(v), value);
}

/* SentencePiece's normaliser as the library writes it: Prepend U+2581, Replace " " by it */
static exc_status spaces(recipe *r, const json_t *step) {
    if (is(step, "Prepend") && says(step, "prepend", BLANK) && !r->spaces) {
        r->t->lead = EXC_LEAD_EVERY;
        return EXC_OK;
    }
    bool replace = is(step, "Replace") && says(json_object_get(step, "pattern"), "String", " ") &&
                   says(step, "content", BLANK) && !r->spaces;
    if (!replace) return refuse(r, "normalizer", step, "Prepend of U+2581, then Replace of a blank by it");
    r->spaces = true;
    return EXC_OK;
}

static exc_status normalizer(recipe *r, const json_t *step) {
    if (r->t->by_char) return spaces(r, step);
    if (!is(step, "NFC")) return refuse(r, "normalizer", step, "null, NFC or a Sequence of them");
    r->t->nfc = true;
    return EXC_OK;
}

static exc_status split(recipe *r, const json_t *step) {
    const json_t *pattern = json_object_get(step, "pattern"), *behavior = json_object_get(step, "behavior");
    const json_t *regex = json_object_get(pattern, "Regex"), *text = json_object_get(pattern, "String");
    const json_t *use = regex ? regex : text;
    if (!json_is_string(behavior) || strcmp(json_string_value(behavior), "Isolated"))
        return refuse(r, "pre_tokenizer", step, "a Split with behavior Isolated");
    if (!json_is_string(use))
        return refuse(r, "pre_tokenizer", step, "a Split with a pattern, Regex or String");
    return exc_stage_add(r->ctx, r->t, r->what, json_string_value(use), json_string_length(use), !regex);
}

static exc_status byte_level(recipe *r, const json_t *step) {
    bool prefix, regex;
    EXC_TRY(exc_json_bool_or(r->ctx, step, r->what, "add_prefix_space", true, &prefix));
    EXC_TRY(exc_json_bool_or(r->ctx, step, r->what, "use_regex", true, &regex));
    if (prefix) return refuse(r, "pre_tokenizer", step, "add_prefix_space false");
    r->seen_level = true;
    return regex ? exc_stage_add(r->ctx, r->t, r->what, GPT2_PATTERN, strlen(GPT2_PATTERN), false) : EXC_OK;
}

/* the same as a pre-tokenizer; files from before prepend_scheme have add_prefix_space */
static exc_status metaspace(recipe *r, const json_t *step) {
    static const char expected[] = "one Metaspace with U+2581, prepend_scheme always, first or never";
    const char *scheme;
    bool prefix, cut;
    EXC_TRY(exc_json_bool_or(r->ctx, step, r->what, "add_prefix_space", true, &prefix));
    EXC_TRY(
        exc_json_string_or(r->ctx, step, r->what, "prepend_scheme", prefix ? "always" : "never", &scheme));
    EXC_TRY(exc_json_bool_or(r->ctx, step, r->what, "split", true, &cut));
    if (!is(step, "Metaspace") || !says(step, "replacement", BLANK) || r->spaces)
        return refuse(r, "pre_tokenizer", step, expected);
    r->spaces = true;
    if (!strcmp(scheme, "always"))
        r->t->lead = EXC_LEAD_MISSING;
    else if (!strcmp(scheme, "first"))
        r->t->lead = EXC_LEAD_FIRST;
    else if (strcmp(scheme, "never"))
        return refuse(r, "pre_tokenizer", step, expected);
    return cut ? exc_stage_add(r->ctx, r->t, r->what, " [^ ]*", 6, false) : EXC_OK;
}

static exc_status pre_tokenizer(recipe *r, const json_t *step) {
    static const char expected[] = "Split, Digits, then ByteLevel, or a Sequence of them";
    bool each_digit;
    if (r->t->by_char) return metaspace(r, step);
    if (r->seen_level) return refuse(r, "pre_tokenizer", step, "nothing after ByteLevel");
    if (is(step, "ByteLevel")) return byte_level(r, step);
    if (is(step, "Split")) return split(r, step);
    if (!is(step, "Digits")) return refuse(r, "pre_tokenizer", step, expected);
    EXC_TRY(exc_json_bool_or(r->ctx, step, r->what, "individual_digits", false, &each_digit));
    const char *pattern = each_digit ? "\\p{N}" : "\\p{N}+";
    return exc_stage_add(r->ctx, r->t, r->what, pattern, strlen(pattern), false);
}

/* the ids that a name in a TemplateProcessing stands for, from its special_tokens table */
static exc_status frame_ids(recipe *r, const json_t *step, const json_t *name, int32_t *ids, int *n) {
    const json_t *entry = json_is_string(name) ? json_object_get(json_object_get(step, "special_tokens"),
                                                                 json_string_value(name))
                                               : NULL;
    const json_t *list = json_object_get(entry, "ids");
    size_t i;
    json_t *id;
    if (!json_is_array(list))
        return refuse(r, "post_processor", step, "ids for each special token of its template");
    json_array_foreach((json_t *)list, i, id) {
        int64_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < 0 || value >= r->t->size || !r->t->tokens[value].flags || *n == EXC_MAX_FRAME)
            return refuse(r, "post_processor", step, "a few ids of the vocabulary");
        ids[(*n)++] = (int32_t)value;
    }
    return EXC_OK;
}

/* "single": special tokens, the text (Sequence A) once, special tokens */
static exc_status template(recipe *r, const json_t *step) {
    size_t i;
    json_t *item;
    bool text = false;
    json_array_foreach(json_object_get(step, "single"), i, item) {
        const json_t *special = json_object_get(item, "SpecialToken");
        if (json_object_get(item, "Sequence")) {
            if (text) return refuse(r, "post_processor", step, "the text once in its template");
            text = true;
        } else if (text) {
            EXC_TRY(frame_ids(r, step, json_object_get(special, "id"), r->t->after, &r->t->n_after));
        } else {
            EXC_TRY(frame_ids(r, step, json_object_get(special, "id"), r->t->before, &r->t->n_before));
        }
    }
    return text ? EXC_OK : refuse(r, "post_processor", step, "the text once in its template");
}

static exc_status post_processor(recipe *r, const json_t *step) {
    if (is(step, "ByteLevel")) return EXC_OK; /* trims offsets; ids stay */
    if (is(step, "TemplateProcessing")) return template(r, step);
    return refuse(r, "post_processor", step, "null, ByteLevel, TemplateProcessing or a Sequence of them");
}

/* Replace, ByteFallback, Fuse, and Strip where a blank was put in front */
static exc_status spaces_decoder(recipe *r, const json_t *step) {
    int64_t start, stop;
    if (is(step, "ByteFallback") || is(step, "Fuse")) return EXC_OK;
    if (is(step, "Replace") && says(json_object_get(step, "pattern"), "String", BLANK) &&
        says(step, "content", " "))
        return EXC_OK;
    if (!is(step, "Strip") || !says(step, "content", " "))
        return refuse(r, "decoder", step, "Replace of U+2581, ByteFallback, Fuse, Strip of a blank");
    EXC_TRY(exc_json_int(r->ctx, step, r->what, "start", 0, 1, &start));
    EXC_TRY(exc_json_int(r->ctx, step, r->what, "stop", 0, 0, &stop));
    r->t->strip = start == 1;
    return EXC_OK;
}

static exc_status decoder(recipe *r, const json_t *step) {
    if (r->t->by_char) return spaces_decoder(r, step);
    return is(step, "ByteLevel") ? EXC_OK : refuse(r, "decoder", step, "ByteLevel");
}

exc_status exc_recipe_read(exc_ctx *ctx, exc_tokenizer *t, const json_t *root, const char *what) {
    recipe r = {.ctx = ctx, .t = t, .what = what};
    EXC_TRY(each(&r, json_object_get(root, "normalizer"), "normalizers", normalizer));
    EXC_TRY(each(&r, json_object_get(root, "pre_tokenizer"), "pretokenizers", pre_tokenizer));
    if (t->by_char && !r.spaces)
        return refuse(&r, "pre_tokenizer", json_object_get(root, "pre_tokenizer"),
                      "blanks written as U+2581 (Replace or Metaspace) beside byte_fallback");
    if (!t->by_char && !r.seen_level)
        return refuse(&r, "pre_tokenizer", json_object_get(root, "pre_tokenizer"), "a ByteLevel step");
    EXC_TRY(each(&r, json_object_get(root, "post_processor"), "processors", post_processor));
    const json_t *d = json_object_get(root, "decoder");
    if (!json_is_object(d)) return refuse(&r, "decoder", NULL, "ByteLevel");
    return each(&r, d, "decoders", decoder);
}
