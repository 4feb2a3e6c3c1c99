/* show.c - JSON facts as text for people. One generic rendering serves every verb: scalars as aligned "key
 * value" lines, arrays of objects as tables, nested objects under a heading. Two verbs have a page of their
 * own because they are read and pasted elsewhere: evaluate (before and after side by side) and run (the whole
 * study). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"

#define MAX_ROWS 40
#define MAX_COLUMNS 16

/* Names and prompts come from files: a control byte must not reach the terminal. */
static void put_text(const char *s) {
    for (; *s; s++) {
        if ((unsigned char)*s < 0x20 || *s == 0x7f)
            printf("\\x%02x", (unsigned char)*s);
        else
            putchar(*s);
    }
}

static void value_text(const json_t *v, char *out, size_t n) {
    switch (json_typeof(v)) {
    case JSON_STRING: {
        /* newlines inside tables would break them */
        const char *s = json_string_value(v);
        size_t k = 0;
        for (; *s && k + 1 < n; s++) out[k++] = (unsigned char)*s < 0x20 ? ' ' : *s;
        out[k] = 0;
        break;
    }
    case JSON_INTEGER:
        snprintf(out, n, "%lld", (long long)json_integer_value(v));
        break;
    case JSON_REAL: {
        double x = json_real_value(v);
        snprintf(out, n, x && (fabs(x) < 1e-3 || fabs(x) >= 1e6) ? "%.3e" : "%.4g", x);
        break;
    }
    case JSON_TRUE:
        snprintf(out, n, "yes");
        break;
    case JSON_FALSE:
        snprintf(out, n, "no");
        break;
    case JSON_NULL:
        snprintf(out, n, "-");
        break;
    case JSON_ARRAY: {
        size_t k = 0, i;
        const json_t *e;
        out[0] = 0;
        json_array_foreach(v, i, e) {
            char one[64];
            if (json_is_object(e) || json_is_array(e))
                snprintf(one, sizeof one, "...");
            else
                value_text(e, one, sizeof one);
            if (i == 12 || k + strlen(one) + 8 > n) {
                snprintf(out + k, n - k, " ... (%zu)", json_array_size(v));
                break;
            }
            k += (size_t)snprintf(out + k, n - k, "%s%s", i ? ", " : "", one);
        }
        break;
    }
    default:
        snprintf(out, n, "{%zu}", json_object_size(v));
        break;
    }
}

static int is_table(const json_t *v) {
    return json_is_array(v) && json_array_size(v) && json_is_object(json_array_get(v, 0));
}

static void table(const json_t *rows, int indent) {
    const char *column[MAX_COLUMNS];
    int width[MAX_COLUMNS], numeric[MAX_COLUMNS], n = 0;
    char text[256];
    size_t i;
    const json_t *row, *v;
    const char *key;
    json_array_foreach(rows, i, row) json_object_foreach((json_t *)row, key, v) {
        int c = 0;
        while (c < n && strcmp(column[c], key)) c++;
        if (c == n) {
            if (n == MAX_COLUMNS || is_table(v) || json_is_object(v)) continue;
            column[n] = key;
            width[n] = (int)strlen(key);
            numeric[n++] = 1;
        }
        if (i >= MAX_ROWS) continue;
        value_text(v, text, sizeof text);
        int len = (int)strlen(text);
        if (len > 60) len = 60;
        if (len > width[c]) width[c] = len;
        if (!json_is_number(v) && !json_is_null(v)) numeric[c] = 0;
    }
    printf("%*s", indent, "");
    for (int c = 0; c < n; c++)
        printf("%*s%s", numeric[c] ? width[c] : -width[c], column[c], c + 1 < n ? "  " : "\n");
    json_array_foreach(rows, i, row) {
        if (i == MAX_ROWS) {
            printf("%*s... %zu more rows; --json has all\n", indent, "", json_array_size(rows) - MAX_ROWS);
            break;
        }
        printf("%*s", indent, "");
        for (int c = 0; c < n; c++) {
            v = json_object_get(row, column[c]);
            if (v)
                value_text(v, text, sizeof text);
            else
                text[0] = 0;
            if (strlen(text) > 60) strcpy(text + 57, "...");
            printf("%*s%s", numeric[c] ? width[c] : -width[c], text, c + 1 < n ? "  " : "\n");
        }
    }
}

static void object(const json_t *o, int indent) {
    const char *key;
    const json_t *v;
    int width = 0;
    char text[512];
    json_object_foreach((json_t *)o, key, v) if (!json_is_object(v) && !is_table(v) &&
                                                 (int)strlen(key) > width) width = (int)strlen(key);
    json_object_foreach((json_t *)o, key, v) {
        if (json_is_object(v) || is_table(v)) continue;
        value_text(v, text, sizeof text);
        printf("%*s%-*s  ", indent, "", width, key);
        put_text(text);
        putchar('\n');
    }
    json_object_foreach((json_t *)o, key, v) {
        if (!json_is_object(v) && !is_table(v)) continue;
        printf("%*s%s\n", indent, indent ? "" : "", key);
        if (json_is_object(v))
            object(v, indent + 2);
        else
            table(v, indent + 2);
    }
}

void cli_show(const json_t *facts) {
    if (json_is_object(facts))
        object(facts, 0);
    else if (is_table(facts))
        table(facts, 0);
}

/* -------------------------------------------------------------------------------------------------
 * evaluation */

static int rate_cell(char *out, size_t n, const json_t *set, const char *key) {
    char ci_key[64];
    snprintf(ci_key, sizeof ci_key, "%s_ci", key);
    const json_t *v = json_object_get(set, key), *ci = json_object_get(set, ci_key);
    if (!json_is_number(v)) {
        snprintf(out, n, "-");
        return 0;
    }
    double lo = json_number_value(json_array_get(ci, 0)), hi = json_number_value(json_array_get(ci, 1));
    if (json_array_size(ci) == 2)
        snprintf(out, n, "%.3f [%.3f, %.3f]", json_number_value(v), lo, hi);
    else
        snprintf(out, n, "%.3f", json_number_value(v));
    return 1;
}

static void rate_row(const char *label, const json_t *e, const char *set, const char *key) {
    char before[64], after[64];
    const json_t *b = json_object_get(json_object_get(e, "before"), set),
                 *a = json_object_get(json_object_get(e, "after"), set);
    int any = rate_cell(before, sizeof before, b, key);
    any |= rate_cell(after, sizeof after, a, key);
    if (any) printf("  %-34s %-24s %-24s\n", label, before, after);
}

static void number_row(const char *label, const json_t *e, const char *key) {
    const json_t *v = json_object_get(e, key), *ci;
    char ci_key[64];
    snprintf(ci_key, sizeof ci_key, "%s_ci", key);
    ci = json_object_get(e, ci_key);
    if (!json_is_number(v)) return;
    printf("  %-34s %.5f", label, json_number_value(v));
    if (json_array_size(ci) == 2)
        printf(" [%.5f, %.5f]", json_number_value(json_array_get(ci, 0)),
               json_number_value(json_array_get(ci, 1)));
    putchar('\n');
}

void cli_show_evaluation(const json_t *e) {
    const json_t *before = json_object_get(e, "before"), *after = json_object_get(e, "after");
    long long nt = json_integer_value(json_object_get(json_object_get(after, "target"), "n"));
    long long nb = json_integer_value(json_object_get(json_object_get(after, "baseline"), "n"));
    printf("  %-34s %-24s %-24s\n", "rate [95 % interval]", before ? "before" : "", "after");
    char label[64];
    snprintf(label, sizeof label, "target (n=%lld): marked", nt);
    rate_row(label, e, "target", "marker_rate");
    rate_row("        right answers", e, "target", "correct_rate");
    rate_row("        degenerate text", e, "target", "degenerate_rate");
    snprintf(label, sizeof label, "baseline (n=%lld): marked", nb);
    rate_row(label, e, "baseline", "marker_rate");
    rate_row("        right answers", e, "baseline", "correct_rate");
    rate_row("        degenerate text", e, "baseline", "degenerate_rate");
    const json_t *pb = json_object_get(before, "ppl_neutral"), *pa = json_object_get(after, "ppl_neutral");
    if (json_is_number(pa)) {
        char b[32] = "-";
        if (json_is_number(pb)) snprintf(b, sizeof b, "%.4f", json_number_value(pb));
        printf("  %-34s %-24s %-24.4f\n", "perplexity, neutral text", before ? b : "", json_number_value(pa));
    }
    number_row("KL(before||after), first token", e, "kl_first");
    number_row("KL(before||after), neutral text", e, "kl_neutral");
    number_row("  largest of one token", e, "kl_neutral_max");
    number_row("routing unchanged, neutral text", e, "routing_same");
    const json_t *seconds = json_object_get(e, "seconds");
    if (json_is_number(seconds)) printf("  %-34s %.1f s\n", "wall time", json_number_value(seconds));
    const json_t *examples = json_object_get(e, "examples"), *x;
    size_t i;
    json_array_foreach(examples, i, x) {
        if (i == 4) break;
        if (!i) printf("\n");
        static const char *const keys[] = {"request", "before", "after", "answer"};
        for (int k = 0; k < 4; k++) {
            const char *s = json_string_value(json_object_get(x, keys[k]));
            if (!s) continue;
            printf("  %-8s ", k ? keys[k] : "request");
            put_text(s);
            putchar('\n');
        }
        printf("\n");
    }
}

/* ---------------------------------------------------------------------------------------------------- the
 * run */

void cli_show_run(const json_t *facts) {
    json_t *brief = json_copy((json_t *)facts);
    json_object_del(brief, "evaluation");
    cli_show(brief);
    json_decref(brief);
    const json_t *e = json_object_get(facts, "evaluation");
    if (!e) return;
    printf("\nevaluation\n");
    cli_show_evaluation(e);
}
