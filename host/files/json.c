/* json.c - the one way JSON comes in: jansson, strict. Duplicate keys, trailing data, bad UTF-8, NUL in a
 * string and comments are refused (other parsers take the first or the last of two equal keys, which is how
 * two programs read two different models from one file). Files are read whole, up to a limit; errors name
 * file, line and column.
 *
 * The getters take null for an absent key, as published configs write it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "files.h"

#define DEFAULT_LIMIT ((size_t)64 << 20)

/* one_line: `what` has the line's number already */
static exc_status parse(exc_ctx *ctx, const char *what, const char *text, size_t n, size_t flags,
                        bool one_line, json_t **root) {
    json_error_t e;
    *root = json_loadb(text, n, JSON_REJECT_DUPLICATES | flags, &e);
    if (*root) return EXC_OK;
    if (json_error_code(&e) == json_error_out_of_memory)
        return exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory for its JSON", what);
    if (e.line < 1)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected JSON, found %s", what, n ? e.text : "nothing");
    if (one_line)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s:%d: expected JSON: %s", what, e.column,
                        exc_show(e.text, strlen(e.text)));
    return exc_fail(ctx, EXC_ERR_INPUT, "%s:%d:%d: expected JSON: %s", what, e.line, e.column,
                    exc_show(e.text, strlen(e.text)));
}

exc_status exc_json_parse(exc_ctx *ctx, const char *what, const char *text, size_t n, json_t **root) {
    return parse(ctx, what, text, n, 0, false, root);
}

exc_status exc_json_parse_text(exc_ctx *ctx, const char *what, const char *text, size_t n, json_t **root) {
    return parse(ctx, what, text, n, JSON_ALLOW_NUL, true, root);
}

exc_status exc_json_load(exc_ctx *ctx, const char *path, size_t limit, json_t **root) {
    char *text;
    size_t n;
    *root = NULL;
    EXC_TRY(exc_read_file(ctx, path, limit ? limit : DEFAULT_LIMIT, &text, &n));
    exc_status st = exc_json_parse(ctx, path, text, n, root);
    exc_release(text);
    return st;
}

/* ----------------------------------------------------------------------------------------------------
 * getters */

/* a value as a message shows it: short, printable */
static const char *shown(const json_t *v, char out[96]) {
    switch (v ? json_typeof(v) : JSON_NULL) {
    case JSON_STRING:
        snprintf(out, 96, "\"%.80s\"", exc_show(json_string_value(v), json_string_length(v)));
        break;
    case JSON_INTEGER:
        snprintf(out, 96, "%lld", (long long)json_integer_value(v));
        break;
    case JSON_REAL:
        snprintf(out, 96, "%#.9g",
                 json_real_value(v)); /* '#': 16.0 must not look like the 16 that was asked for */
        break;
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_TRUE:
        return "true";
    case JSON_FALSE:
        return "false";
    default:
        return v ? "null" : "nothing";
    }
    return out;
}

static exc_status wrong(exc_ctx *ctx, const char *what, const char *key, const char *expected,
                        const json_t *v) {
    char text[96];
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected %s, found %s", what, key, expected, shown(v, text));
}

exc_status exc_json_int(exc_ctx *ctx, const json_t *o, const char *what, const char *key, int64_t lo,
                        int64_t hi, int64_t *out) {
    const json_t *v = json_object_get(o, key);
    if (json_is_integer(v) && json_integer_value(v) >= lo && json_integer_value(v) <= hi) {
        *out = json_integer_value(v);
        return EXC_OK;
    }
    char expected[96];
    if (lo == hi)
        snprintf(expected, sizeof expected, "%lld", (long long)lo);
    else if (hi == INT64_MAX)
        snprintf(expected, sizeof expected, "a whole number of at least %lld", (long long)lo);
    else
        snprintf(expected, sizeof expected, "a whole number %lld..%lld", (long long)lo, (long long)hi);
    return wrong(ctx, what, key, expected, v);
}

static const json_t *present(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    return json_is_null(v) ? NULL : v;
}

exc_status exc_json_int_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key, int64_t lo,
                           int64_t hi, int64_t absent, int64_t *out) {
    *out = absent;
    return present(o, key) ? exc_json_int(ctx, o, what, key, lo, hi, out) : EXC_OK;
}

exc_status exc_json_number_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key, double absent,
                              double *out) {
    const json_t *v = present(o, key);
    *out = absent;
    if (!v) return EXC_OK;
    if (!json_is_number(v) || !isfinite(json_number_value(v))) return wrong(ctx, what, key, "a number", v);
    *out = json_number_value(v);
    return EXC_OK;
}

exc_status exc_json_bool_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key, bool absent,
                            bool *out) {
    const json_t *v = present(o, key);
    *out = absent;
    if (!v) return EXC_OK;
    if (!json_is_boolean(v)) return wrong(ctx, what, key, "true or false", v);
    *out = json_is_true(v);
    return EXC_OK;
}

exc_status exc_json_string_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key,
                              const char *absent, const char **out) {
    const json_t *v = present(o, key);
    *out = absent;
    if (!v) return EXC_OK;
    if (!json_is_string(v)) return wrong(ctx, what, key, "text", v);
    *out = json_string_value(v);
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------ unknown
 * keys */

#define LONGEST 48 /* keys of ours are shorter */

/* single-character edits from a to b; LONGEST when either is too long to be a slip */
static size_t distance(const char *a, const char *b) {
    size_t n = strlen(a), m = strlen(b), row[LONGEST + 1];
    if (n > LONGEST || m > LONGEST) return LONGEST;
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t corner = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t best = corner + (a[i - 1] != b[j - 1]);
            corner = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[m];
}

static const char *nearest(const char *key, const char *const *known) {
    const char *best = NULL;
    size_t least = strlen(key) / 3 + 2; /* farther than that is no slip of the finger */
    for (; *known; known++) {
        size_t d = distance(key, *known);
        if (d < least) {
            least = d;
            best = *known;
        }
    }
    return best;
}

exc_status exc_json_keys(exc_ctx *ctx, const json_t *o, const char *what, const char *const *known) {
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)o, key, v) {
        const char *const *k = known;
        while (*k && strcmp(*k, key)) k++;
        if (*k) continue;
        const char *guess = nearest(key, known);
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: unknown key \"%s\"%s%s%s", what, exc_show(key, strlen(key)),
                        guess ? "; did you mean \"" : "", guess ? guess : "", guess ? "\"?" : "");
    }
    return EXC_OK;
}

char *exc_json_text(exc_ctx *ctx, const json_t *o) {
    char *text = o ? json_dumps(o, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    if (!text) exc_fail(ctx, EXC_ERR_MEMORY, "no memory for the JSON text of a result");
    return text;
}
