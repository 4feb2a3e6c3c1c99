/* report.c - exc_report: a run folder as one page. It reads report.json (results of every step), experts.csv
 * (heatmaps) and directions.safetensors (singular values), and writes what there is: a section whose data is
 * missing is left out, so a half-finished study can be looked at too. Order: what changed, what the model
 * says now, where the sets part, what was removed, and from what all of it was made. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "page.h"
#include "sections.h"

/* ------------------------------------------------------------------------------------------------- reading
 * results */

double exc_get(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

exc_mark exc_get_mark(const json_t *o, const char *key) {
    char ci[64];
    snprintf(ci, sizeof ci, "%s_ci", key);
    const json_t *v = json_object_get(o, ci), *lo = json_array_get(v, 0), *hi = json_array_get(v, 1);
    return (exc_mark){exc_get(o, key), json_is_number(lo) ? json_number_value(lo) : NAN,
                      json_is_number(hi) ? json_number_value(hi) : NAN};
}

/* 0.95 -> "95 %"; one decimal where it is needed */
void exc_put_percent(exc_buf *b, double x) {
    double p = 100 * x;
    if (!isfinite(p))
        exc_buf_puts(b, "\xe2\x80\x93");
    else if (fabs(p - nearbyint(p)) < 0.05)
        exc_buf_printf(b, "%.0f&#8239;%%", p);
    else
        exc_buf_printf(b, "%.1f&#8239;%%", p);
}

static void put_percent_range(exc_buf *b, const exc_mark *m) {
    if (isfinite(m->lo) && isfinite(m->hi))
        exc_buf_printf(b, "%.1f\xe2\x80\x93%.1f&#8239;%%", 100 * m->lo, 100 * m->hi);
}

static void put_small(exc_buf *b, double x) {
    if (!isfinite(x))
        exc_buf_puts(b, "\xe2\x80\x93");
    else
        exc_buf_printf(b, fabs(x) >= 0.00005 || x == 0 ? "%.4f" : "%.1e", x);
}

/* --------------------------------------------------------------------------------------------------- head
 * and tiles */

static void put_count(exc_buf *b, const json_t *o, const char *key, const char *after) {
    double v = exc_get(o, key);
    if (isfinite(v)) exc_buf_printf(b, " \xc2\xb7 %.0f %s", v, after);
}

static const char *last_part(const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    while (n && path[n - 1] != '/') n--;
    return path + n;
}

static void head(exc_buf *b, const json_t *r) {
    const json_t *model = json_object_get(r, "model"), *e = json_object_get(r, "evaluation");
    const json_t *before = json_object_get(e, "before"), *after = json_object_get(e, "after");
    const char *name = json_string_value(json_object_get(json_object_get(r, "job"), "model"));
    const char *shown = json_string_value(json_object_get(model, "name")),
               *family = json_string_value(json_object_get(model, "family"));
    if (!shown) shown = name && *last_part(name) && last_part(name)[0] != '.' ? last_part(name) : "model";
    exc_buf_puts(b, "<header>\n<p class=\"eyebrow\">Excise \xc2\xb7 study report</p>\n<h1>");
    exc_html(b, shown);
    exc_buf_puts(b, "</h1>\n<p class=\"facts\">");
    exc_html(b, family ? family : "mixture of experts");
    put_count(b, model, "layers", "layers");
    put_count(b, model, "experts", "experts a layer");
    put_count(b, model, "top_k", "per token");
    put_count(b, model, "hidden", "hidden");
    put_count(b, model, "vocab", "tokens in the vocabulary");
    exc_buf_puts(b, "</p>\n");
    exc_mark was = exc_get_mark(json_object_get(before, "target"), "marker_rate"),
             is = exc_get_mark(json_object_get(after, "target"), "marker_rate");
    if (isfinite(is.value)) {
        exc_buf_puts(b, "<p class=\"lede\">");
        if (isfinite(was.value)) {
            exc_buf_puts(b, "The behaviour shows in ");
            exc_put_percent(b, was.value);
            exc_buf_puts(b, " of replies to the target prompts before the edit and in ");
            exc_put_percent(b, is.value);
            exc_buf_puts(b, " after it");
        } else {
            exc_buf_puts(b, "The behaviour shows in ");
            exc_put_percent(b, is.value);
            exc_buf_puts(b, " of replies to the target prompts");
        }
        exc_buf_printf(b, " (%.0f prompts, 95&#8239;%% interval ",
                       exc_get(json_object_get(after, "target"), "n"));
        put_percent_range(b, &is);
        exc_buf_puts(b, ").");
        double right = exc_get(json_object_get(after, "target"), "correct_rate"),
               keep = exc_get(json_object_get(after, "baseline"), "correct_rate");
        if (isfinite(right)) {
            exc_buf_puts(b, " Right answers there: ");
            exc_put_percent(b, right);
            exc_buf_puts(b, isfinite(keep) ? "; on the baseline prompts: " : ".");
            if (isfinite(keep)) {
                exc_put_percent(b, keep);
                exc_buf_puts(b, ".");
            }
        }
        double kl = exc_get(e, "kl_neutral");
        if (isfinite(kl)) {
            exc_buf_puts(b, " On neutral text the two models differ by ");
            put_small(b, kl);
            exc_buf_puts(b, " nats a token.");
        }
        exc_buf_puts(b, "</p>\n");
    }
    exc_buf_puts(b, "</header>\n<main>\n");
}

static void tile_rate(exc_buf *b, const char *what, const json_t *before, const json_t *after,
                      const char *set, const char *key) {
    exc_mark was = exc_get_mark(json_object_get(before, set), key),
             is = exc_get_mark(json_object_get(after, set), key);
    if (!isfinite(is.value)) return;
    exc_buf_puts(b, "<div class=\"tile\"><div class=\"what\">");
    exc_html(b, what);
    exc_buf_puts(b, "</div><div class=\"big\">");
    if (isfinite(was.value)) {
        exc_buf_puts(b, "<span class=\"was\">");
        exc_put_percent(b, was.value);
        exc_buf_puts(b, " \xe2\x86\x92 </span>");
    }
    exc_put_percent(b, is.value);
    exc_buf_puts(b, "</div><div class=\"ci\">");
    put_percent_range(b, &is);
    exc_buf_puts(b, "</div></div>\n");
}

static void tiles(exc_buf *b, const json_t *e) {
    const json_t *before = json_object_get(e, "before"), *after = json_object_get(e, "after");
    exc_buf_puts(b, "<div class=\"tiles\">\n");
    tile_rate(b, "Target prompts: replies that show the behaviour", before, after, "target", "marker_rate");
    tile_rate(b, "Target prompts: right answers", before, after, "target", "correct_rate");
    tile_rate(b, "Baseline prompts: right answers", before, after, "baseline", "correct_rate");
    exc_mark kl = exc_get_mark(e, "kl_neutral");
    if (isfinite(kl.value)) {
        exc_buf_puts(b, "<div class=\"tile\"><div class=\"what\">Neutral text: KL a token, nats</div><div "
                        "class=\"big\">");
        put_small(b, kl.value);
        exc_buf_puts(b, "</div><div class=\"ci\">");
        if (isfinite(kl.lo)) exc_buf_printf(b, "%.4f\xe2\x80\x93%.4f", kl.lo, kl.hi);
        exc_buf_puts(b, "</div></div>\n");
    }
    exc_buf_puts(b, "</div>\n");
}

/* ------------------------------------------------------------------------------------------------- before
 * and after */

static void rate_cell(exc_buf *b, const exc_mark *m) {
    exc_buf_puts(b, "<td>");
    exc_put_percent(b, m->value);
    if (isfinite(m->value)) {
        exc_buf_puts(b, " <span class=\"ci\">");
        put_percent_range(b, m);
        exc_buf_puts(b, "</span>");
    }
    exc_buf_puts(b, "</td>");
}

static void rate_rows(exc_buf *b, const json_t *e, const char *set, const char *title) {
    static const char *const keys[3][2] = {{"marker_rate", "show the behaviour"},
                                           {"correct_rate", "right answer"},
                                           {"degenerate_rate", "degenerate text"}};
    const json_t *before = json_object_get(json_object_get(e, "before"), set),
                 *after = json_object_get(json_object_get(e, "after"), set);
    if (!after) return;
    exc_buf_printf(b, "<tr class=\"group\"><td colspan=\"4\">%s, %.0f</td></tr>\n", title,
                   exc_get(after, "n"));
    for (int i = 0; i < 3; i++) {
        exc_mark was = exc_get_mark(before, keys[i][0]), is = exc_get_mark(after, keys[i][0]);
        if (!isfinite(is.value)) continue;
        exc_buf_printf(b, "<tr><td>%s</td><td class=\"pic\">", keys[i][1]);
        exc_chart_rate(b, &was, &is);
        exc_buf_puts(b, "</td>");
        rate_cell(b, &was);
        rate_cell(b, &is);
        exc_buf_puts(b, "</tr>\n");
    }
}

static void mean_row(exc_buf *b, const char *what, const exc_mark *was, const exc_mark *is, bool percent,
                     const char *note) {
    if (!isfinite(is->value)) return;
    exc_buf_printf(b, "<tr><td>%s</td>", what);
    for (int i = 0; i < 2; i++) {
        const exc_mark *m = i ? is : was;
        exc_buf_puts(b, "<td>");
        if (!m || !isfinite(m->value))
            exc_buf_puts(b, i ? "\xe2\x80\x93" : "");
        else if (percent)
            exc_put_percent(b, m->value);
        else
            put_small(b, m->value);
        exc_buf_puts(b, "</td>");
    }
    exc_buf_puts(b, "<td class=\"ci\">");
    if (isfinite(is->lo) && percent)
        put_percent_range(b, is);
    else if (isfinite(is->lo))
        exc_buf_printf(b, "%.4f\xe2\x80\x93%.4f", is->lo, is->hi);
    exc_buf_printf(b, "</td><td class=\"l ci\">%s</td></tr>\n", note);
}

static void means(exc_buf *b, const json_t *e) {
    exc_mark none = {NAN, NAN, NAN}, m, was;
    exc_buf_puts(b, "<div class=\"panel scroll\"><table><thead><tr><th>distance between the two "
                    "models</th><th>before</th><th>after</th>"
                    "<th>95&#8239;% interval</th><th class=\"l\">over</th></tr></thead><tbody>\n");
    m = exc_get_mark(e, "kl_first");
    mean_row(b, "KL of the first new token, nats", &none, &m, false, "baseline prompts");
    m = exc_get_mark(e, "kl_neutral");
    mean_row(b, "KL a token, nats", &none, &m, false, "neutral text");
    m = (exc_mark){exc_get(e, "kl_neutral_max"), NAN, NAN};
    mean_row(b, "largest KL of one token, nats", &none, &m, false, "neutral text");
    was = exc_get_mark(json_object_get(e, "before"), "ppl_neutral");
    m = exc_get_mark(json_object_get(e, "after"), "ppl_neutral");
    mean_row(b, "perplexity", &was, &m, false, "neutral text");
    m = exc_get_mark(e, "top_token_same");
    mean_row(b, "same most likely token", &none, &m, true, "neutral text");
    m = exc_get_mark(e, "routing_same");
    mean_row(b, "same set of experts", &none, &m, true, "neutral text, tokens \xc3\x97 layers");
    m = exc_get_mark(e, "baseline_replies_same");
    mean_row(b, "reply unchanged, word for word", &none, &m, true, "baseline prompts");
    exc_buf_puts(b, "</tbody></table></div>\n");
}

static void changed(exc_buf *b, const json_t *e) {
    exc_buf_puts(b, "<section>\n<h2>Before and after</h2>\n<p class=\"note\">Greedy replies to prompts that "
                    "played no part in finding the "
                    "edit, unless the job says otherwise. Lines are 95&#8239;% intervals; a low rate of the "
                    "behaviour counts only beside right answers.</p>\n"
                    "<div class=\"panel\"><table class=\"rates\"><thead><tr><th>share of replies</th><th "
                    "class=\"l\">0 to 100&#8239;%</th><th>before</th><th>after</th></tr></thead><tbody>\n");
    rate_rows(b, e, "target", "Target prompts");
    rate_rows(b, e, "baseline", "Baseline prompts");
    exc_buf_puts(b, "</tbody></table>\n<p class=\"key\">");
    if (json_object_get(e, "before"))
        exc_buf_puts(b, "<span><svg aria-hidden=\"true\"><line class=\"b\" x1=\"0\" x2=\"34\" y1=\"6\" "
                        "y2=\"6\"/><circle class=\"bd\" cx=\"17\" cy=\"6\" r=\"5\"/></svg>before</span>");
    exc_buf_puts(b,
                 "<span><svg aria-hidden=\"true\"><line class=\"a\" x1=\"0\" x2=\"34\" y1=\"6\" "
                 "y2=\"6\"/><circle class=\"ad\" cx=\"17\" cy=\"6\" r=\"5\"/></svg>after</span></p></div>\n");
    if (isfinite(exc_get(e, "kl_neutral")) || isfinite(exc_get(e, "kl_first"))) {
        exc_buf_puts(b, "<h3>Collateral</h3>\n");
        means(b, e);
    }
    exc_buf_puts(b, "</section>\n");
}

/* --------------------------------------------------------------------------------------------------------
 * examples */

static bool verdict(const json_t *x, const char *key, const char *what) {
    return json_is_true(json_object_get(json_object_get(x, key), what));
}

static void reply(exc_buf *b, const json_t *x, const char *which, const char *verdicts, bool answered) {
    const char *text = json_string_value(json_object_get(x, which));
    if (!text) return;
    exc_buf_printf(b, "<dt>%s</dt><dd>", which);
    exc_html(b, text);
    if (!*text) exc_buf_puts(b, "<span class=\"ci\">(nothing)</span>");
    if (verdict(x, verdicts, "marked")) exc_buf_puts(b, "<span class=\"tag bad\">behaviour</span>");
    if (verdict(x, verdicts, "right"))
        exc_buf_puts(b, "<span class=\"tag good\">right</span>");
    else if (answered && !verdict(x, verdicts, "marked"))
        exc_buf_puts(b, "<span class=\"tag bad\">wrong</span>");
    if (verdict(x, verdicts, "degenerate")) exc_buf_puts(b, "<span class=\"tag bad\">degenerate</span>");
    exc_buf_puts(b, "</dd>");
}

static void cards(exc_buf *b, const json_t *list) {
    size_t i;
    const json_t *x;
    exc_buf_puts(b, "<div class=\"cards\">\n");
    json_array_foreach(list, i, x) {
        const char *request = json_string_value(json_object_get(x, "request")),
                   *set = json_string_value(json_object_get(x, "set"));
        const char *answer = json_string_value(json_object_get(x, "answer"));
        exc_buf_puts(b, "<article class=\"card\"><p class=\"ask\"><small>");
        exc_html(b, set ? set : "");
        exc_buf_printf(b, " prompt %.0f</small>", exc_get(x, "prompt"));
        exc_html(b, request ? request : "(given as tokens)");
        exc_buf_puts(b, "</p><dl>");
        reply(b, x, "before", "before_verdict", answer);
        reply(b, x, "after", "after_verdict", answer);
        if (answer && !verdict(x, "after_verdict", "right")) {
            exc_buf_puts(b, "<dt>expected</dt><dd>");
            exc_html(b, answer);
            exc_buf_puts(b, "</dd>");
        }
        exc_buf_puts(b, "</dl></article>\n");
    }
    exc_buf_puts(b, "</div>\n");
}

static void examples(exc_buf *b, const json_t *e) {
    const json_t *even = json_object_get(e, "examples"), *failed = json_object_get(e, "failures");
    if (!json_array_size(even)) return;
    exc_buf_puts(b, "<section>\n<h2>What the models say</h2>\n<p class=\"note\">Prompts at even distances "
                    "through both sets; nobody picked "
                    "them. All replies are in evaluation.csv.</p>\n");
    cards(b, even);
    if (json_array_size(failed)) {
        exc_buf_printf(b, "<details><summary>What still goes wrong: the first %zu</summary>\n",
                       json_array_size(failed));
        cards(b, failed);
        exc_buf_puts(b, "</details>\n");
    }
    exc_buf_puts(b, "</section>\n");
}

/* -------------------------------------------------------------------------------------------------------
 * provenance */

static void steps(exc_buf *b, const json_t *r) {
    size_t i;
    const json_t *s, *h;
    const char *key;
    exc_buf_puts(b, "<div class=\"panel scroll\"><table><thead><tr><th>step</th><th>seconds</th><th "
                    "class=\"l\">left, with hash</th></tr></thead><tbody>\n");
    json_array_foreach(json_object_get(r, "steps"), i, s) {
        const char *name = json_string_value(json_object_get(s, "step"));
        exc_buf_puts(b, "<tr><td>");
        exc_html(b, name ? name : "");
        exc_buf_printf(b, "</td><td>%.2f</td><td class=\"l\">", exc_get(s, "seconds"));
        json_object_foreach(json_object_get(s, "outputs"), key, h) {
            exc_html(b, key);
            exc_buf_puts(b, " <code class=\"ci\">");
            exc_html(b, json_string_value(h) ? json_string_value(h) : "");
            exc_buf_puts(b, "</code> ");
        }
        exc_buf_puts(b, "</td></tr>\n");
    }
    exc_buf_puts(b, "</tbody></table></div>\n");
}

static void provenance(exc_buf *b, const json_t *r) {
    char *job = json_dumps(json_object_get(r, "job"), JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    const json_t *rules = json_object_get(json_object_get(r, "evaluation"), "rules"), *v;
    const char *key;
    exc_buf_puts(b, "<section>\n<h2>How this was made</h2>\n<p class=\"note\">The same job file on the same "
                    "inputs gives the same files. "
                    "Hashes are XXH3-128.</p>\n");
    steps(b, r);
    exc_buf_puts(b, "<div class=\"two\"><div><h3>Job</h3><div class=\"panel\"><pre>");
    exc_html(b, job ? job : "");
    free(job);
    exc_buf_puts(b,
                 "</pre></div></div><div><h3>Rules of judging</h3><div class=\"panel\"><dl class=\"rules\">");
    json_object_foreach((json_t *)rules, key, v) {
        exc_buf_puts(b, "<dt>");
        exc_html(b, key);
        exc_buf_puts(b, "</dt><dd>");
        exc_html(b, json_string_value(v) ? json_string_value(v) : "");
        exc_buf_puts(b, "</dd>");
    }
    exc_buf_puts(b, "</dl></div></div></div>\n</section>\n");
}

/* -------------------------------------------------------------------------------------------------------------
 * page */

static exc_status page(exc_ctx *ctx, const json_t *r, const char *dir, exc_buf *b) {
    const json_t *e = json_object_get(r, "evaluation"), *engine = json_object_get(r, "engine");
    const char *name = json_string_value(json_object_get(json_object_get(r, "model"), "name"));
    const char *version = json_string_value(json_object_get(r, "version")),
               *backend = json_string_value(json_object_get(engine, "backend"));
    exc_buf title = {0};
    exc_buf_printf(&title, "Excise: %s", name ? name : "study");
    exc_page_begin(b, title.data ? title.data : "Excise");
    b->failed |= title.failed;
    exc_buf_free(&title);
    head(b, r);
    if (e) {
        tiles(b, e);
        changed(b, e);
        examples(b, e);
    }
    EXC_TRY(exc_section_routing(ctx, b, r, dir));
    EXC_TRY(exc_section_directions(ctx, b, r, dir));
    exc_section_residuals(b, r);
    provenance(b, r);
    exc_buf_puts(b, "</main>\n<footer>Excise ");
    exc_html(b, version ? version : "");
    exc_buf_puts(b, ", backend ");
    exc_html(b, backend ? backend : "unknown");
    exc_buf_puts(b, ". One file; it loads nothing from the network.</footer>\n");
    exc_page_end(b);
    return b->failed ? exc_fail(ctx, EXC_ERR_MEMORY, "report: no memory for the page") : EXC_OK;
}

static exc_status facts(exc_ctx *ctx, const char *run_dir, const char *out_html, size_t bytes, char **json) {
    json_t *o = json_pack("{s:s,s:s,s:I}", "run", run_dir, "out", out_html, "bytes", (json_int_t)bytes);
    *json = o ? exc_json_text(ctx, o) : NULL;
    json_decref(o);
    return *json ? EXC_OK : exc_fail(ctx, EXC_ERR_MEMORY, "report: no memory for the result");
}

exc_status exc_report(exc_ctx *ctx, const char *run_dir, const char *out_html, int force, char **json) {
    if (!ctx || !run_dir || !out_html) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (json) *json = NULL;
    EXC_TRY(exc_check_file(ctx, out_html, force != 0));
    char *path = NULL;
    json_t *r = NULL;
    exc_buf b = {0};
    exc_status st = exc_path_join(ctx, run_dir, "report.json", &path);
    int64_t format = 0;
    if (st == EXC_OK) st = exc_json_load(ctx, path, 0, &r);
    if (st == EXC_OK) st = exc_json_int(ctx, r, path, "excise_report", 1, 1, &format);
    if (st == EXC_OK) st = page(ctx, r, run_dir, &b);
    if (st == EXC_OK) st = exc_write_file(ctx, out_html, b.data, b.len, force != 0);
    if (st == EXC_OK && json) st = facts(ctx, run_dir, out_html, b.len, json);
    exc_buf_free(&b);
    json_decref(r);
    exc_release(path);
    return st;
}
