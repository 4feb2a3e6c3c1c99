/* judge.c - what is said about replies and models: intervals against known values and exact coverage,
 * verdicts on hand-made replies, phrases in any case and script, the comparison of two models against a plain
 * f64 loop over all logits, and the published base rates of the demo model. */
#include "helpers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "page.h"

static exc_ctx *ctx;
static char *dir;

/* -------------------------------------------------------------------------------------------------------
 * intervals */

static void wilson_known(void **state) {
    /* k, n, lo, hi: closed form evaluated in 50-digit arithmetic */
    static const double known[][4] = {{0, 80, 0, 0.0458181295},
                                      {80, 80, 0.9541818705, 1},
                                      {5, 10, 0.2365930905, 0.7634069095},
                                      {1, 1, 0.2065493144, 1},
                                      {76, 80, 0.8783772380, 0.9803864455},
                                      {0, 0, 0, 1}};
    for (size_t i = 0; i < EXC_COUNT(known); i++) {
        double lo, hi;
        exc_wilson((int64_t)known[i][0], (int64_t)known[i][1], &lo, &hi);
        assert_true(fabs(lo - known[i][2]) < 1e-9 && fabs(hi - known[i][3]) < 1e-9);
    }
}

/* exact coverage over all outcomes of a binomial: the Wilson interval stays near 95 %, never far below
 * (Brown, Cai, DasGupta 2001: minimum about 0.93 for p away from the ends at n = 40) */
static void wilson_covers(void **state) {
    for (int step = 5; step <= 95; step++) {
        double p = step / 100.0, covered = 0;
        for (int k = 0; k <= 40; k++) {
            double lo, hi;
            exc_wilson(k, 40, &lo, &hi);
            if (lo <= p && p <= hi)
                covered +=
                    exp(lgamma(41) - lgamma(k + 1) - lgamma(41 - k) + k * log(p) + (40 - k) * log1p(-p));
        }
        assert_true(covered > 0.92 && covered < 0.99);
    }
}

static void bootstrap_mean(void **state) {
    enum { N = 400 };
    double x[N], lo, hi, again[2], mean = 0, var = 0;
    for (int i = 0; i < N; i++) mean += x[i] = 3 + test_normal(1, (uint64_t)i);
    mean /= N;
    for (int i = 0; i < N; i++) var += (x[i] - mean) * (x[i] - mean) / N;
    assert_int_equal(exc_bootstrap(ctx, x, NULL, N, 7, 0, &lo, &hi), EXC_OK);
    assert_true(lo < mean && mean < hi);
    /* width of the normal interval, 2 * 1.96 * s / sqrt(n); 1000 draws know their 2.5 % points to about 5 %
     */
    double width = 2 * 1.96 * sqrt(var / N);
    assert_true(fabs(hi - lo - width) < 0.15 * width);
    assert_int_equal(exc_bootstrap(ctx, x, NULL, N, 7, 0, &again[0], &again[1]), EXC_OK);
    assert_true(again[0] == lo && again[1] == hi);
    assert_int_equal(exc_bootstrap(ctx, x, NULL, N, 8, 0, &again[0], &again[1]), EXC_OK);
    assert_true(again[0] != lo);
}

/* whole units are drawn: twenty lines that each say one value 50 times must not look like a thousand values
 */
static void bootstrap_units(void **state) {
    double num[20], den[20], lo, hi;
    for (int i = 0; i < 20; i++) {
        den[i] = 50;
        num[i] = 50 * test_normal(2, (uint64_t)i);
    }
    assert_int_equal(exc_bootstrap(ctx, num, den, 20, 0, 0, &lo, &hi), EXC_OK);
    assert_true(hi - lo > 0.5); /* 2 * 1.96 / sqrt(20) = 0.88; over a thousand independent tokens 0.12 */
    double one = 1;
    assert_int_equal(exc_bootstrap(ctx, &one, NULL, 1, 0, 0, &lo, &hi), EXC_OK);
    assert_true(isnan(lo) && isnan(hi));
    double same[3] = {2, 2, 2};
    assert_int_equal(exc_bootstrap(ctx, same, NULL, 3, 0, 0, &lo, &hi), EXC_OK);
    assert_true(lo == 2 && hi == 2);
}

/* ---------------------------------------------------------------------------------------------------------
 * verdicts */

static int64_t period(const char *letters) {
    int32_t tokens[256];
    int64_t n = (int64_t)strlen(letters);
    for (int64_t i = 0; i < n; i++) tokens[i] = letters[i];
    return exc_loop_period(tokens, n);
}

static void loops(void **state) {
    assert_int_equal(period(""), 0);
    assert_int_equal(period("abcdefghijklmnopqrstuvwxyz"), 0);
    assert_int_equal(period("hahaha"), 0);       /* three times, but a reply may laugh */
    assert_int_equal(period("aaaaaaaaaaa"), 0);  /* 11 */
    assert_int_equal(period("aaaaaaaaaaaa"), 1); /* 12 */
    assert_int_equal(period("xyzaaaaaaaaaaaa"), 1);
    assert_int_equal(period("aaaaaaaaaaaaxyz"), 0); /* it got out of it again */
    assert_int_equal(period("so abcdabcdabcd"), 4);
    assert_int_equal(period("so abcdabcdabc"), 0);       /* 11 tokens */
    assert_int_equal(period("so abcdeabcdeabcdeab"), 5); /* a last partial turn */
    assert_int_equal(period("so abcdefghabcdefgh"), 0);  /* twice only */
    assert_int_equal(period("abcdefghabcdefghabcdefgh"), 8);
    assert_int_equal(period("abcdefghabcdefghabcdefgX"), 0);
}

static void flaws(void **state) {
    int32_t tokens[64];
    for (int i = 0; i < 64; i++) tokens[i] = i;
    exc_reply r = {tokens, 20, 1};
    assert_int_equal(exc_reply_flaws(&r, "fine"), 0);
    assert_int_equal(exc_reply_flaws(&r, " \n\t "), EXC_FLAW_EMPTY);
    r.stopped = 0;
    assert_int_equal(exc_reply_flaws(&r, "fine"), EXC_FLAW_TRUNCATED);
    for (int i = 2; i < 64; i++) tokens[i] = i % 2;
    r.count = 40;
    assert_int_equal(exc_reply_flaws(&r, "abab"), EXC_FLAW_TRUNCATED | EXC_FLAW_LOOP);
    r.stopped = 1;
    assert_int_equal(exc_reply_flaws(&r, "abab"), EXC_FLAW_LOOP);
    r.count = 0;
    assert_int_equal(exc_reply_flaws(&r, ""), EXC_FLAW_EMPTY);
}

static void trimming(void **state) {
    assert_true(exc_same_trimmed(" a b\n", "a b"));
    assert_true(exc_same_trimmed("", " \r\n"));
    assert_false(exc_same_trimmed("a  b", "a b"));
    assert_false(exc_same_trimmed("a b", "a b ."));
    assert_false(exc_same_trimmed("A", "a"));
}

static int64_t found(const char *text, size_t n) {
    char *lines[] = {"can not help", "\xc3\x89tage", "a.b(c", "\xce\xa3\xce\xbf\xcf\x86\xce\xaf\xce\xb1",
                     "\xd1\x8f"}; /* Étage, Σοφία, я */
    exc_phrases *p = NULL;
    assert_int_equal(exc_phrases_open(ctx, lines, EXC_COUNT(lines), &p), EXC_OK);
    int64_t i = exc_phrases_find(p, text, n);
    exc_phrases_close(p);
    return i;
}

static void phrases(void **state) {
#define FOUND(text) found(text, strlen(text))
    assert_int_equal(FOUND("I CAN not Help with that"), 0);
    assert_int_equal(FOUND("can  not help"), -1);
    assert_int_equal(FOUND("au 2e \xc3\xa9TAGE"), 1);
    assert_int_equal(FOUND("au 2e etage"), -1);
    assert_int_equal(FOUND("see A.B(C)"), 2);
    assert_int_equal(FOUND("see axb(c)"), -1); /* literal, not a pattern */
    assert_int_equal(FOUND("\xcf\x83\xce\x9f\xce\xa6\xce\x8a\xce\x91"), 3);
    assert_int_equal(FOUND("\xd0\xaf"), 4);
    assert_int_equal(FOUND(""), -1);
    assert_int_equal(FOUND("\xff\xfe can not help \xe2\x82"), 0); /* invalid bytes around it */
    assert_int_equal(found("can not\0 help", 13), -1);
    assert_int_equal(found("\0can not help", 13), 0);
    exc_phrases *p = NULL;
    char *bad[] = {"\xff"};
    assert_int_equal(exc_phrases_open(ctx, bad, 1, &p), EXC_ERR_INPUT);
    exc_clear(ctx);
}

static const char *write_text(const char *name, const char *text) {
    const char *path = test_path(dir, name);
    test_write(path, text, strlen(text));
    return path;
}

static void answers(void **state) {
    exc_answers a;
    assert_int_equal(
        exc_answers_read(
            ctx,
            write_text(
                "a.jsonl",
                "{\"request\":\"b\",\"answer\":\"1\"}\n{\"set\":\"x\",\"request\":\"a\",\"answer\":\"2\"}\n"
                "{\"request\":\"b\",\"answer\":\"3\"}\n"),
            &a),
        EXC_OK);
    size_t n;
    assert_int_equal(a.count, 3);
    assert_string_equal(exc_answers_find(&a, "a", &n)->answer, "2");
    assert_int_equal(n, 1);
    assert_non_null(exc_answers_find(&a, "b", &n));
    assert_int_equal(n, 2);
    assert_null(exc_answers_find(&a, "c", &n));
    assert_null(exc_answers_find(&a, "", &n));
    exc_answers_free(&a);
    test_refused(ctx, exc_answers_read(ctx, write_text("b.jsonl", "{\"request\":\"b\"}\n"), &a),
                 EXC_ERR_INPUT, "b.jsonl", "answer", NULL);
    exc_clear(ctx);
    test_refused(ctx,
                 exc_answers_read(
                     ctx, write_text("c.jsonl", "{\"request\":\"b\",\"answer\":\"1\"}\n{\"request\":1"), &a),
                 EXC_ERR_INPUT, "c.jsonl", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_answers_read(ctx, test_path(dir, "absent.jsonl"), &a), EXC_ERR_IO, "absent.jsonl",
                 NULL);
    exc_clear(ctx);
}

static void csv_fields(void **state) {
    exc_buf b = {0};
    exc_csv_field(&b, "plain");
    exc_buf_puts(&b, "|");
    exc_csv_field(&b, "a,\"b\"\nc");
    assert_string_equal(b.data, "plain|\"a,\"\"b\"\"\nc\"");
    exc_buf_free(&b);
}

/* ----------------------------------------------------------------------------------------------- bytes of
 * the page */

static void sha256(void **state) {
    char out[45], *a = malloc(1000000);
    memset(a, 'a', 1000000);
    static const struct {
        size_t n;
        const char *hash;
    } known[] = {/* hashlib */
                 {1000000, "zcduXJkU+5KBocfihNc+Z/GAmkiklyAOBG05zMcRLNA="},
                 {64, "/+BU/nrgy23GXDr5th1SCfQ5hR20PQulmXM33xVGaOs="},
                 {56, "s1Q5pKxvCUi21vnjxq8PX1kM4g8b3nCQ73lwaG7Gc4o="},
                 {55, "n0OQ+NMMLdkuyfCVtl4rmumwqSWlJY4kHJ8ekQ9zQxg="},
                 {0, "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}};
    for (size_t i = 0; i < EXC_COUNT(known); i++) {
        exc_sha256_base64(a, known[i].n, out);
        assert_string_equal(out, known[i].hash);
    }
    free(a);
}

static size_t from_base64(const char *s, uint8_t *out) {
    size_t n = 0;
    uint32_t acc = 0;
    int bits = 0;
    for (; *s && *s != '=' && *s != '"'; s++) {
        const char *alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
                   *at = strchr(alphabet, *s);
        assert_non_null(at);
        acc = acc << 6 | (uint32_t)(at - alphabet);
        if ((bits += 6) >= 8) out[n++] = (uint8_t)(acc >> (bits -= 8));
    }
    return n;
}

static void cells(void **state) {
    double v[1000];
    uint8_t bytes[4096];
    for (int i = 0; i < 1000; i++) v[i] = 2.5 * sin(i);
    v[3] = NAN;
    v[4] = INFINITY;
    v[5] = 0;
    exc_buf b = {0};
    exc_pack_cells(&b, v, 1000, 2.5);
    assert_int_equal(from_base64(b.data, bytes), 2000);
    for (int i = 0; i < 1000; i++) {
        int16_t x = (int16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8);
        if (i == 3 || i == 4)
            assert_int_equal(x, -32768);
        else
            assert_true(fabs(x / 32767.0 * 2.5 - v[i]) <= 2.5 / 32767 / 2 + 1e-12);
    }
    exc_buf_free(&b);
}

static uint32_t big(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* signature, chunk sums, stored blocks, Adler-32, and the pixels: index 128 is 0, ends are -1 and 1, 0 is
 * "none" */
static void png(void **state) {
    double v[6] = {-1, 0, 1, NAN, 0.5, -0.5};
    static const uint8_t pixels[] = {0, 1, 128, 255, 0, 0, 192, 64};
    uint8_t file[4096];
    exc_buf b = {0};
    exc_png_cells(&b, v, 2, 3, 1);
    const char *head = "data:image/png;base64,";
    assert_memory_equal(b.data, head, strlen(head));
    size_t n = from_base64(b.data + strlen(head), file), at = 8;
    assert_memory_equal(file, "\x89PNG\r\n\x1a\n", 8);
    bool pixels_seen = false, end_seen = false;
    while (at < n) {
        uint32_t len = big(file + at), c = ~0u;
        for (size_t i = at + 4; i < at + 8 + len; i++) {
            c ^= file[i];
            for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        }
        assert_int_equal(~c, big(file + at + 8 + len));
        if (!memcmp(file + at + 4, "IHDR", 4))
            assert_true(big(file + at + 8) == 3 && big(file + at + 12) == 2);
        if (!memcmp(file + at + 4, "IDAT", 4)) {
            const uint8_t *z = file + at + 8;
            assert_int_equal((z[0] * 256 + z[1]) % 31, 0);
            assert_true(z[2] == 1 && z[3] + 256 * z[4] == 8 && (uint16_t)~(z[5] + 256 * z[6]) == 8);
            assert_memory_equal(z + 7, pixels, 8);
            uint32_t a = 1, s = 0;
            for (int i = 0; i < 8; i++) s = (s + (a = (a + z[7 + i]) % 65521)) % 65521;
            assert_int_equal(big(z + 15), s << 16 | a);
            pixels_seen = true;
        }
        end_seen = !memcmp(file + at + 4, "IEND", 4);
        at += len + 12;
    }
    assert_true(pixels_seen && end_seen && at == n);
    exc_buf_free(&b);
}

static void escaping(void **state) {
    exc_buf b = {0};
    exc_html(&b, "<a href=\"x\" b='y'>&\x01\n\xc3\xa9");
    assert_string_equal(b.data, "&lt;a href=&quot;x&quot; b=&#39;y&#39;&gt;&amp;\xef\xbf\xbd\n\xc3\xa9");
    exc_buf_free(&b);
}

/* --------------------------------------------------------------------------------------------------------
 * two models */

static exc_model *open_demo(exc_compute compute) {
    exc_model_options mo = EXC_MODEL_OPTIONS;
    exc_model *m = NULL;
    mo.compute = compute;
    exc_status st = exc_model_open(ctx, test_data("demo"), &mo, &m);
    if (st != EXC_OK) fail_msg("%s", exc_ctx_error(ctx));
    return m;
}

typedef struct keeping {
    const exc_prompts *p;
    int64_t vocab;
    float *all;
} keeping;

static exc_status keep(exc_ctx *c, void *user, int64_t prompt, int64_t first, int64_t rows,
                       const int32_t *tokens, const float *logits) {
    keeping *k = user;
    memcpy(k->all + (k->p->begin[prompt] + first) * k->vocab, logits,
           (size_t)(rows * k->vocab) * sizeof(float));
    return EXC_OK;
}

static double log_sum(const float *x, int64_t n) {
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) top = fmax(top, x[i]);
    for (int64_t i = 0; i < n; i++) sum += exp(x[i] - top);
    return top + log(sum);
}

/* The same model in two arithmetics is two models; all logits of both are kept here and compared in f64
 * loops. Tolerance: the logits of a step may differ in the last bits with its width (another matmul kernel),
 * 1e-4 relative is far below KL's size. */
static void tandem_is_naive(void **state) {
    exc_model *a = open_demo(EXC_COMPUTE_F32), *b = open_demo(EXC_COMPUTE_BF16);
    exc_prompts *p = NULL;
    exc_prompt_options po = EXC_PROMPT_OPTIONS;
    po.raw = 1;
    po.limit = 17;
    assert_int_equal(exc_prompts_load(ctx, test_data("demo"), test_data("demo/prompts/neutral.txt"), &po, &p),
                     EXC_OK);
    int64_t V = a->atlas->shape.vocab, T = p->begin[p->count];
    keeping k[2] = {{p, V, malloc((size_t)(T * V) * 4)}, {p, V, malloc((size_t)(T * V) * 4)}};
    assert_int_equal(exc_logits_run(ctx, a, p, "a", keep, &k[0]), EXC_OK);
    assert_int_equal(exc_logits_run(ctx, b, p, "b", keep, &k[1]), EXC_OK);
    static const int64_t steps[] = {0, 1, 7, 50};
    exc_unit *u = malloc((size_t)p->count * sizeof *u);
    for (size_t s = 0; s < EXC_COUNT(steps); s++) {
        assert_int_equal(exc_tandem(ctx, a, b, p, false, steps[s], "t", u), EXC_OK);
        for (int64_t i = 0; i < p->count; i++) {
            double kl = 0, worst = 0, nll[2] = {0};
            int64_t n = p->begin[i + 1] - p->begin[i];
            for (int64_t t = p->begin[i]; t < p->begin[i + 1]; t++) {
                const float *x = k[0].all + t * V, *y = k[1].all + t * V;
                double zx = log_sum(x, V), zy = log_sum(y, V), one = 0;
                for (int64_t v = 0; v < V; v++) one += exp(x[v] - zx) * ((x[v] - zx) - (y[v] - zy));
                kl += one;
                worst = fmax(worst, one);
                if (t + 1 == p->begin[i + 1]) continue;
                nll[0] += zx - x[p->tokens[t + 1]];
                nll[1] += zy - y[p->tokens[t + 1]];
            }
            assert_int_equal(u[i].rows, n);
            assert_int_equal(u[i].predicted, n - 1);
            assert_int_equal(u[i].routes, n * a->atlas->shape.moe_layers);
            assert_true(u[i].same_routes > u[i].routes * 9 / 10 && u[i].same_routes <= u[i].routes);
            assert_true(fabs(u[i].kl - kl) <= 0.02 * kl + 1e-6 && kl > 0);
            assert_true(fabs(u[i].kl_max - worst) <= 0.02 * worst + 1e-6);
            for (int m = 0; m < 2; m++) assert_true(fabs(u[i].nll[m] - nll[m]) <= 1e-3 * nll[m] + 1e-4);
        }
    }
    /* the last position alone */
    exc_unit *ends = malloc((size_t)p->count * sizeof *ends);
    for (size_t s = 0; s < EXC_COUNT(steps); s++) {
        assert_int_equal(exc_tandem(ctx, a, b, p, true, steps[s], "t", ends), EXC_OK);
        for (int64_t i = 0; i < p->count; i++) {
            int64_t t = p->begin[i + 1] - 1;
            const float *x = k[0].all + t * V, *y = k[1].all + t * V;
            double zx = log_sum(x, V), zy = log_sum(y, V), one = 0;
            for (int64_t v = 0; v < V; v++) one += exp(x[v] - zx) * ((x[v] - zx) - (y[v] - zy));
            assert_int_equal(ends[i].rows, 1);
            assert_int_equal(ends[i].predicted, 0);
            assert_true(fabs(ends[i].kl - one) <= 0.02 * one + 1e-6);
        }
    }
    /* a model against itself, and alone */
    assert_int_equal(exc_tandem(ctx, a, a, p, false, 0, "t", u), EXC_OK);
    for (int64_t i = 0; i < p->count; i++)
        assert_true(u[i].kl == 0 && u[i].same_top == u[i].rows && u[i].same_routes == u[i].routes &&
                    u[i].nll[0] == u[i].nll[1]);
    double before = u[0].nll[1];
    assert_int_equal(exc_tandem(ctx, NULL, a, p, false, 0, "t", u), EXC_OK);
    assert_true(u[0].nll[1] == before && u[0].routes == 0);
    free(u);
    free(ends);
    for (int m = 0; m < 2; m++) free(k[m].all);
    exc_prompts_free(p);
    exc_model_free(a);
    exc_model_free(b);
}

/* ----------------------------------------------------------------------------------------------------------
 * evaluate */

static json_t *evaluate(exc_model *after, exc_model *before, const exc_evaluate_options *o) {
    char *text = NULL;
    exc_status st = exc_evaluate(ctx, after, before, o, &text);
    if (st != EXC_OK) fail_msg("%s", exc_ctx_error(ctx));
    json_t *r = json_loads(text, 0, NULL);
    assert_non_null(r);
    exc_free(text);
    return r;
}

static exc_evaluate_options demo_options(void) {
    static char path[5][1024];
    static const char *const names[] = {"prompts/eval_decline.txt", "prompts/eval_comply.txt",
                                        "prompts/neutral.txt", "markers.txt", "answers.jsonl"};
    for (int i = 0; i < 5; i++) snprintf(path[i], sizeof path[i], "%s/demo/%s", EXC_TEST_DATA, names[i]);
    exc_evaluate_options o = EXC_EVALUATE_OPTIONS;
    o.target = path[0];
    o.baseline = path[1];
    o.neutral = path[2];
    o.markers = path[3];
    o.answers = path[4];
    return o;
}

static double at(const json_t *r, const char *a, const char *b, const char *c) {
    const json_t *v = json_object_get(r, a);
    if (b) v = json_object_get(v, b);
    if (c) v = json_object_get(v, c);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

/* the rates and the perplexity in the demo's own README, made by another implementation in f32 */
static void demo_base_rates(void **state) {
    exc_model *m = open_demo(EXC_COMPUTE_F32);
    exc_evaluate_options o = demo_options();
    json_t *r = evaluate(m, NULL, &o);
    assert_null(json_object_get(r, "before"));
    assert_true(json_is_null(json_object_get(r, "kl_first")));
    assert_true(at(r, "after", "target", "marker_rate") == 1 &&
                at(r, "after", "target", "correct_rate") == 0);
    assert_true(at(r, "after", "baseline", "marker_rate") == 0 &&
                at(r, "after", "baseline", "correct_rate") == 1);
    assert_true(at(r, "after", "target", "n") == 80 && at(r, "after", "baseline", "n") == 80);
    assert_true(at(r, "after", "target", "degenerate_rate") == 0 &&
                at(r, "after", "baseline", "degenerate_rate") == 0);
    assert_true(fabs(at(r, "after", "ppl_neutral", NULL) - 1.520) < 0.0006);
    assert_true(at(r, "seconds", NULL, NULL) > 0);
    json_t *ci = json_object_get(json_object_get(json_object_get(r, "after"), "target"), "marker_rate_ci");
    assert_true(fabs(json_number_value(json_array_get(ci, 0)) - 0.9541818705) < 1e-9 &&
                json_number_value(json_array_get(ci, 1)) == 1);
    assert_int_equal(json_array_size(json_object_get(r, "examples")), 4);
    json_decref(r);
    o.system = "open desk";
    o.neutral = NULL;
    r = evaluate(m, NULL, &o);
    assert_true(at(r, "after", "target", "marker_rate") == 0 &&
                at(r, "after", "target", "correct_rate") == 1);
    assert_true(at(r, "after", "baseline", "correct_rate") == 1);
    assert_true(json_is_null(json_object_get(json_object_get(r, "after"), "ppl_neutral")));
    json_decref(r);
    exc_model_free(m);
}

static void demo_against_itself(void **state) {
    exc_model *a = open_demo(EXC_COMPUTE_F32), *b = open_demo(EXC_COMPUTE_F32);
    exc_evaluate_options o = demo_options();
    json_t *r = evaluate(b, a, &o), *before = json_object_get(r, "before"),
           *after = json_object_get(r, "after");
    assert_true(json_equal(before, after));
    assert_true(at(r, "kl_first", NULL, NULL) == 0 && at(r, "kl_neutral", NULL, NULL) == 0 &&
                at(r, "kl_neutral_max", NULL, NULL) == 0);
    assert_true(at(r, "routing_same", NULL, NULL) == 1 && at(r, "baseline_replies_same", NULL, NULL) == 1);
    json_decref(r);
    exc_model_free(a);
    exc_model_free(b);
}

/* three tokens are not enough for any answer: everything is truncated, nothing is right */
static void truncated_replies(void **state) {
    exc_model *m = open_demo(EXC_COMPUTE_BF16);
    exc_evaluate_options o = demo_options();
    o.max_new = 3;
    o.neutral = NULL;
    o.examples = 10;
    json_t *r = evaluate(m, NULL, &o);
    assert_true(at(r, "after", "baseline", "degenerate_rate") == 1 &&
                at(r, "after", "baseline", "correct_rate") == 0);
    json_t *why = json_object_get(json_object_get(json_object_get(r, "after"), "baseline"), "degenerate");
    assert_int_equal(json_integer_value(json_object_get(why, "truncated")), 80);
    assert_int_equal(json_array_size(json_object_get(r, "failures")), 20);
    json_decref(r);
    exc_model_free(m);
}

static int warnings;
static int count_warnings(void *user, const exc_event *e) {
    warnings += e->kind == EXC_EVENT_WARNING;
    return 0;
}

static int stop_at;
static int stop(void *user, const exc_event *e) { return e->kind == EXC_EVENT_PROGRESS && stop_at-- <= 0; }

static void evaluate_refusals(void **state) {
    exc_model *m = open_demo(EXC_COMPUTE_BF16);
    exc_evaluate_options o = demo_options(), none = EXC_EVALUATE_OPTIONS;
    char *text = NULL;
    test_refused(ctx, exc_evaluate(ctx, m, NULL, &none, &text), EXC_ERR_USAGE, "target", "neutral", NULL);
    o.markers = test_path(dir, "absent.txt");
    test_refused(ctx, exc_evaluate(ctx, m, NULL, &o, &text), EXC_ERR_IO, "absent.txt", NULL);
    o.markers = write_text("empty.txt", "");
    test_refused(ctx, exc_evaluate(ctx, m, NULL, &o, &text), EXC_ERR_INPUT, "empty.txt", NULL);
    o = demo_options();
    o.target = test_path(dir, "absent.txt");
    test_refused(ctx, exc_evaluate(ctx, m, NULL, &o, &text), EXC_ERR_IO, "absent.txt", NULL);
    o = demo_options();
    o.answers = write_text("other.jsonl", "{\"request\":\"something else\",\"answer\":\"x\"}\n");
    o.neutral = o.baseline = NULL;
    ctx->opt.on_event = count_warnings;
    json_t *r = evaluate(m, NULL, &o);
    ctx->opt.on_event = NULL;
    assert_int_equal(warnings, 1);
    assert_true(json_is_null(
        json_object_get(json_object_get(json_object_get(r, "after"), "target"), "correct_rate")));
    json_decref(r);
    o = demo_options();
    ctx->opt.on_event = stop;
    for (int i = 0; i < 6; i++) {
        stop_at = i;
        assert_int_equal(exc_evaluate(ctx, m, NULL, &o, &text), EXC_CANCELLED);
    }
    ctx->opt.on_event = NULL;
    exc_model_free(m);
}

static int begin(void **state) {
    ctx = test_ctx(2);
    dir = test_tmpdir();
    return 0;
}

static int end(void **state) {
    exc_ctx_free(ctx);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wilson_known),
        cmocka_unit_test(wilson_covers),
        cmocka_unit_test(bootstrap_mean),
        cmocka_unit_test(bootstrap_units),
        cmocka_unit_test(loops),
        cmocka_unit_test(flaws),
        cmocka_unit_test(trimming),
        cmocka_unit_test(phrases),
        cmocka_unit_test(answers),
        cmocka_unit_test(csv_fields),
        cmocka_unit_test(sha256),
        cmocka_unit_test(cells),
        cmocka_unit_test(png),
        cmocka_unit_test(escaping),
        cmocka_unit_test(tandem_is_naive),
        cmocka_unit_test(demo_base_rates),
        cmocka_unit_test(demo_against_itself),
        cmocka_unit_test(truncated_replies),
        cmocka_unit_test(evaluate_refusals),
    };
    return cmocka_run_group_tests_name("judge", tests, begin, end);
}
