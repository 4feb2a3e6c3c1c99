/* resume.c - job files and run folders: every refusal names file and key; a step is skipped exactly when its
 * inputs and outputs are as they were; a run cancelled anywhere and started again ends in the bytes of an
 * undisturbed one; the page that comes out is well-formed, loads nothing, and its policy names the script it
 * carries. */
#include "helpers.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "job.h"

static exc_ctx *ctx;
static char *dir;

/* a path that outlives the ring of test_path */
static const char *lasting(const char *folder, const char *name) {
    static char kept_path[32][1024];
    static int n;
    assert_true(n < 32);
    snprintf(kept_path[n], sizeof kept_path[n], "%s/%s", folder, name);
    return kept_path[n++];
}

static const char *write_text(const char *folder, const char *name, const char *text) {
    const char *path = test_path(folder, name);
    test_write(path, text, strlen(text));
    return path;
}

/* ------------------------------------------------------------------------------------------------------------
 * job files */

#define NEEDED "\"model\":\"m\",\"target\":\"t.txt\",\"baseline\":\"b.txt\",\"out\":\"run\""

static void job_defaults(void **state) {
    char *base = test_tmpdir();
    mkdir(test_path(base, "m"), 0700);
    write_text(base, "t.txt", "x\n");
    write_text(base, "b.txt", "y\n");
    exc_job j;
    assert_int_equal(exc_job_read(ctx, write_text(base, "job.json", "{" NEEDED "}"), &j), EXC_OK);
    assert_string_equal(j.target, test_path(base, "t.txt"));
    assert_string_equal(j.out, test_path(base, "run"));
    assert_true(j.compute == EXC_COMPUTE_BF16 && !j.evaluates && j.directions.method == EXC_METHOD_MEAN &&
                !j.capture.decode);
    assert_null(j.plan.roles);
    assert_string_equal(j.plan.directions, "directions.safetensors");
    exc_job_free(&j);
    const char *all =
        "{" NEEDED ",\"system\":\"s\",\"compute\":\"f32\",\"limit\":5,\"capture\":{\"decode\":8},"
                   "\"directions\":{\"method\":\"svd\",\"rank\":2},"
        "\"contrast\":{\"alpha\":0.25,\"seed\":3},\"plan\":{\"roles\":[\"expert_down\",\"attn_out\"],"
        "\"layers\":[0,\"2-3\"],\"strength\":[1,0.5],"
        "\"basis\":2.5,\"select\":\"top:4\",\"norm\":\"column\"},\"apply\":{\"allow_nonfinite\":true},"
        "\"evaluate\":{\"target\":\"t.txt\",\"max_new\":7}}";
    assert_int_equal(exc_job_read(ctx, write_text(base, "job.json", all), &j), EXC_OK);
    assert_true(j.compute == EXC_COMPUTE_F32 && j.prompts.limit == 5 && j.capture.decode == 8 &&
                j.directions.method == EXC_METHOD_SVD && j.directions.rank == 2 && j.contrast.alpha == 0.25 &&
                j.contrast.seed == 3 && j.apply.allow_nonfinite == 1);
    assert_string_equal(j.plan.roles, "expert_down,attn_out");
    assert_string_equal(j.plan.layers, "0,2-3");
    assert_string_equal(j.plan.strength, "1,0.5");
    assert_string_equal(j.plan.basis, "2.5");
    assert_string_equal(j.plan.select, "top:4");
    assert_string_equal(j.plan.norm, "column");
    assert_true(j.evaluates && j.evaluate.max_new == 7);
    assert_string_equal(j.evaluate.target, test_path(base, "t.txt"));
    assert_string_equal(j.evaluate.system, "s"); /* as captured, unless said otherwise */
    exc_job_free(&j);
}

static void job_refusals(void **state) {
    static const struct {
        const char *text;
        exc_status want;
        const char *says[3];
    } cases[] = {
        {"", EXC_ERR_INPUT, {"job.json"}},
        {"{", EXC_ERR_INPUT, {"job.json"}},
        {"[]", EXC_ERR_INPUT, {"job.json", "object"}},
        {"{}", EXC_ERR_INPUT, {"job.json", "model", "path"}},
        {"{\"model\":\"m\",\"target\":\"t.txt\",\"baseline\":\"b.txt\"}", EXC_ERR_INPUT, {"job.json", "out"}},
        {"{\"model\":\"m\",\"target\":3,\"baseline\":\"b.txt\",\"out\":\"run\"}",
         EXC_ERR_INPUT,
         {"job.json", "target"}},
        {"{\"model\":\"absent\",\"target\":\"t.txt\",\"baseline\":\"b.txt\",\"out\":\"run\"}",
         EXC_ERR_IO,
         {"job.json", "model", "absent"}},
        {"{\"model\":\"m\",\"target\":\"absent.txt\",\"baseline\":\"b.txt\",\"out\":\"run\"}",
         EXC_ERR_IO,
         {"job.json", "target", "absent.txt"}},
        {"{" NEEDED ",\"modle\":\"x\"}", EXC_ERR_INPUT, {"job.json", "modle", "model"}},
        {"{" NEEDED ",\"compute\":\"fp8\"}", EXC_ERR_INPUT, {"compute", "bf16", "fp8"}},
        {"{" NEEDED ",\"capture\":7}", EXC_ERR_INPUT, {"capture", "object"}},
        {"{" NEEDED ",\"capture\":{\"decod\":1}}", EXC_ERR_INPUT, {"capture", "decod", "decode"}},
        {"{" NEEDED ",\"capture\":{\"decode\":-1}}", EXC_ERR_INPUT, {"capture", "decode"}},
        {"{" NEEDED ",\"directions\":{\"method\":\"pca\"}}", EXC_ERR_INPUT, {"directions", "svd", "pca"}},
        {"{" NEEDED ",\"directions\":{\"rank\":65}}", EXC_ERR_INPUT, {"directions", "rank"}},
        {"{" NEEDED ",\"plan\":{\"roles\":{}}}", EXC_ERR_INPUT, {"plan", "roles"}},
        {"{" NEEDED ",\"plan\":{\"layers\":[]}}", EXC_ERR_INPUT, {"plan", "layers"}},
        {"{" NEEDED ",\"plan\":{\"stength\":1}}", EXC_ERR_INPUT, {"plan", "stength", "strength"}},
        {"{" NEEDED ",\"apply\":{\"force\":true}}", EXC_ERR_INPUT, {"apply", "force"}},
        {"{" NEEDED ",\"evaluate\":{}}", EXC_ERR_INPUT, {"evaluate", "target"}},
        {"{" NEEDED ",\"evaluate\":{\"markers\":\"absent.txt\"}}",
         EXC_ERR_IO,
         {"evaluate", "markers", "absent.txt"}},
        {"{" NEEDED ",\"raw\":\"yes\"}", EXC_ERR_INPUT, {"job.json", "raw"}},
    };
    char *base = test_tmpdir();
    mkdir(test_path(base, "m"), 0700);
    write_text(base, "t.txt", "x\n");
    write_text(base, "b.txt", "y\n");
    for (size_t i = 0; i < EXC_COUNT(cases); i++) {
        const char *path = write_text(base, "job.json", cases[i].text);
        char *json = NULL;
        const char *const *s = cases[i].says;
        test_refused(ctx, exc_run(ctx, path, 0, &json), cases[i].want, s[0], s[1], s[2], NULL);
        assert_null(json);
        assert_int_not_equal(access(test_path(base, "run"), F_OK), 0); /* nothing was begun */
    }
    test_refused(ctx, exc_run(ctx, test_path(base, "none.json"), 0, NULL), EXC_ERR_IO, "none.json", NULL);
}

/* ---------------------------------------------------------------------------------------------------------------
 * ledger */

static const char *const one[] = {"a.txt", NULL};

static exc_ledger *ledger(const char *folder, bool force) {
    exc_ledger *l = NULL;
    exc_clear(ctx);
    exc_status st = exc_ledger_open(ctx, folder, force, &l);
    if (st != EXC_OK) fail_msg("%s", exc_ctx_error(ctx));
    return l;
}

/* one step "s" with input x that leaves a.txt; returns whether it was skipped */
static bool work(exc_ledger *l, const char *folder, const char *x, bool finish) {
    json_t *in = json_pack("{s:s}", "x", x), *result = json_pack("{s:s}", "said", x);
    const json_t *known = NULL;
    exc_status st = exc_ledger_begin(l, "s", in, one, &known);
    if (st != EXC_OK) fail_msg("%s", exc_ctx_error(ctx));
    bool skipped = known != NULL;
    if (skipped) assert_string_equal(json_string_value(json_object_get(known, "said")), x);
    if (!skipped) write_text(folder, "a.txt", x);
    if (!skipped && finish) assert_int_equal(exc_ledger_done(l, "s", result, 1), EXC_OK);
    json_decref(in);
    json_decref(result);
    return skipped;
}

static void ledger_skips(void **state) {
    const char *folder = lasting(test_tmpdir(), "deep/er/run");
    exc_ledger *l = ledger(folder, false);
    assert_false(work(l, folder, "1", true));
    assert_true(work(l, folder, "1", true));
    exc_ledger_close(l);
    l = ledger(folder, false);
    assert_true(work(l, folder, "1", true));  /* also in the next run */
    assert_false(work(l, folder, "2", true)); /* another input */
    assert_true(work(l, folder, "2", true));
    unlink(test_path(folder, "a.txt"));
    assert_false(work(l, folder, "2", true));  /* its output is gone */
    assert_false(work(l, folder, "3", false)); /* crashed before it was done */
    exc_ledger_close(l);
    l = ledger(folder, false);
    assert_false(work(l, folder, "3", true)); /* leftovers of its own are replaced */
    exc_ledger_close(l);
    l = ledger(folder, true);
    assert_false(work(l, folder, "3", true)); /* force does everything again */
    exc_ledger_close(l);
}

static void ledger_protects(void **state) {
    char *base = test_tmpdir();
    const char *folder = lasting(base, "run");
    const json_t *known;
    exc_ledger *l = ledger(folder, false), *second = NULL;
    test_refused(ctx, exc_ledger_open(ctx, folder, false, &second), EXC_ERR_IO, "run", "another run", NULL);
    assert_null(second);
    exc_clear(ctx);
    assert_false(work(l, folder, "1", true));
    write_text(folder, "a.txt", "edited by hand");
    json_t *in = json_pack("{s:s}", "x", "1");
    test_refused(ctx, exc_ledger_begin(l, "s", in, one, &known), EXC_ERR_USAGE, "a.txt", "--force", NULL);
    exc_clear(ctx);
    exc_ledger_close(l);
    l = ledger(folder, true);
    assert_int_equal(exc_ledger_begin(l, "s", in, one, &known), EXC_OK);
    assert_null(known);
    unlink(test_path(folder, "a.txt"));
    json_t *result = json_object();
    test_refused(ctx, exc_ledger_done(l, "s", result, 0), EXC_ERR_IO, "a.txt",
                 NULL); /* a step must leave what it says */
    json_decref(result);
    exc_clear(ctx);
    exc_ledger_close(l);
    json_decref(in);
    const char *other = lasting(base, "other");
    mkdir(other, 0700);
    write_text(other, "thesis.tex", "years of work");
    test_refused(ctx, exc_ledger_open(ctx, other, false, &l), EXC_ERR_USAGE, "other", "--force", NULL);
    exc_clear(ctx);
    write_text(other, "steps.json", "{\"excise_run\":2,\"steps\":[]}");
    test_refused(ctx, exc_ledger_open(ctx, other, false, &l), EXC_ERR_INPUT, "steps.json", "excise_run",
                 NULL);
    exc_clear(ctx);
    write_text(other, "steps.json", "not json");
    test_refused(ctx, exc_ledger_open(ctx, other, false, &l), EXC_ERR_INPUT, "steps.json", NULL);
    exc_clear(ctx);
    write_text(base, "file", "x");
    assert_int_equal(exc_ledger_open(ctx, test_path(base, "file/run"), false, &l), EXC_ERR_IO);
    exc_clear(ctx);
}

static void hashes(void **state) {
    char *base = test_tmpdir(), a[33], b[33];
    const char *m = lasting(base, "m");
    mkdir(m, 0700);
    write_text(m, "config.json", "{}");
    write_text(m, "model.safetensors", "weights");
    write_text(m, "README.md", "words");
    assert_int_equal(exc_model_hash(ctx, m, a), EXC_OK);
    write_text(m, "README.md", "other words");
    write_text(m, "job.json", "{}");
    assert_int_equal(exc_model_hash(ctx, m, b), EXC_OK);
    assert_string_equal(a, b); /* what does not decide the model does not count */
    write_text(m, "model.safetensors", "weightz");
    assert_int_equal(exc_model_hash(ctx, m, b), EXC_OK);
    assert_string_not_equal(a, b);
    assert_int_equal(exc_tree_hash(ctx, m, a), EXC_OK);
    write_text(m, "README.md", "words");
    assert_int_equal(exc_tree_hash(ctx, m, b), EXC_OK);
    assert_string_not_equal(a, b);
    assert_int_equal(exc_tree_hash(ctx, test_path(base, "absent"), a), EXC_ERR_IO);
    exc_clear(ctx);
}

/* ----------------------------------------------------------------------------------------------------------
 * the page */

static const char *const void_tags[] = {"meta", "br", "img", "hr", "input", "!doctype", NULL};

static bool is_void(const char *name) {
    for (int i = 0; void_tags[i]; i++)
        if (!strcasecmp(name, void_tags[i])) return true;
    return false;
}

/* every tag is closed in order, attributes are quoted, script and style are skipped as raw text */
static void check_tags(const char *html) {
    char stack[64][32];
    int depth = 0;
    for (const char *p = html; (p = strchr(p, '<'));) {
        char name[32];
        int n = 0;
        bool closing = p[1] == '/';
        p += 1 + closing;
        while (n < 31 && *p && !strchr(" />\n", *p)) name[n++] = *p++;
        name[n] = 0;
        if (!n) fail_msg("a bare < at: %.60s", p - 1);
        bool self = false;
        while (*p && *p != '>') {
            self = *p == '/';
            if (*p == '"') {
                p = strchr(p + 1, '"');
                assert_non_null(p);
            }
            if (*p == '<') fail_msg("a < inside tag %s", name);
            p++;
        }
        if (closing) {
            if (!depth || strcmp(stack[depth - 1], name))
                fail_msg("</%s> closes %s: %.80s", name, depth ? stack[depth - 1] : "nothing", p);
            depth--;
        } else if (!self && !is_void(name)) {
            assert_true(depth < 64);
            strcpy(stack[depth++], name);
            if (!strcmp(name, "script") || !strcmp(name, "style")) {
                char end[sizeof name + 4];
                snprintf(end, sizeof end, "</%s>", name);
                p = strstr(p, end);
                assert_non_null(p);
            }
        }
    }
    assert_int_equal(depth, 0);
}

static void check_policy(const char *html, const char *open, const char *close, const char *directive) {
    char hash[45], want[128];
    const char *from = strstr(html, open), *to = from ? strstr(from, close) : NULL;
    assert_non_null(to);
    from += strlen(open);
    exc_sha256_base64(from, (size_t)(to - from), hash);
    snprintf(want, sizeof want, "%s 'sha256-%s'", directive, hash);
    assert_non_null(strstr(html, want));
    assert_null(strstr(to + 1, open)); /* the only one */
}

static void check_page(const char *path) {
    size_t n;
    char *html = test_read(path, &n);
    static const char *const banned[] = {"http://",  "https://", "//cdn",   "@import", "url(",
                                         "srcset",   "<iframe",  "<object", "<link",   " style=\"",
                                         " onclick", "src=\"/",  NULL};
    check_tags(html);
    for (int i = 0; banned[i]; i++)
        if (strstr(html, banned[i])) fail_msg("%s: found %s", path, banned[i]);
    for (const char *p = html; (p = strstr(p, "src=\"")); p++) assert_memory_equal(p + 5, "data:", 5);
    check_policy(html, "<script>", "</script>", "script-src");
    check_policy(html, "<style>", "</style>", "style-src");
    size_t bad;
    assert_true(exc_utf8_valid(html, n, &bad));
    free(html);
}

/* a page is made of what there is; texts that look like markup stay text */
static void page_of_little(void **state) {
    char *base = test_tmpdir();
    write_text(base, "report.json",
               "{\"excise_report\":1,\"version\":\"<i>\",\"job\":{\"model\":\"<script>alert(1)</"
               "script>\"},\"evaluation\":{\"after\":{\"target\":"
               "{\"marker_rate\":0.5,\"marker_rate_ci\":[0.1,0.9],\"n\":2}},\"examples\":[{\"set\":"
               "\"target\",\"prompt\":1,\"request\":\"</p><script>x\","
               "\"after\":\"\\\"><img "
               "src=http:evil>\",\"answer\":\"&amp;\"}],\"rules\":{\"<b>\":\"<u>\"}},\"steps\":[{\"step\":\"<"
               "s>\",\"outputs\":{\"<q>\":\"h\"}}]}");
    assert_int_equal(exc_report(ctx, base, test_path(base, "r.html"), 0, NULL), EXC_OK);
    check_page(test_path(base, "r.html"));
    char *html = test_read(test_path(base, "r.html"), NULL);
    assert_non_null(strstr(html, "&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert_null(strstr(html, "<script>alert"));
    assert_null(strstr(html, "<img src"));
    assert_non_null(strstr(html, "&amp;amp;"));
    free(html);
    test_refused(ctx, exc_report(ctx, base, test_path(base, "r.html"), 0, NULL), EXC_ERR_USAGE, "r.html", NULL);
    test_refused(ctx, exc_report(ctx, test_path(base, "none"), test_path(base, "s.html"), 0, NULL), EXC_ERR_IO,
                 "report.json", NULL);
    write_text(base, "report.json", "{\"excise_report\":9}");
    test_refused(ctx, exc_report(ctx, base, test_path(base, "s.html"), 0, NULL), EXC_ERR_INPUT, "report.json",
                 "excise_report", NULL);
    write_text(base, "report.json", "{\"excise_report\":1}");
    write_text(base, "experts.csv", "layer,expert,prefill_log_ratio\n0,0,1\n0\n");
    test_refused(ctx, exc_report(ctx, base, test_path(base, "s.html"), 0, NULL), EXC_ERR_INPUT, "experts.csv",
                 "line 3", NULL);
    write_text(base, "experts.csv", "layer,expert,prefill_log_ratio\n-1,0,1\n");
    test_refused(ctx, exc_report(ctx, base, test_path(base, "s.html"), 0, NULL), EXC_ERR_INPUT, "experts.csv",
                 "row 1", NULL);
    write_text(base, "experts.csv", "layer,expert,prefill_log_ratio\n3,0,1\n3,1,-0.5\n7,0,nan\n7,1,0.25\n");
    assert_int_equal(exc_report(ctx, base, test_path(base, "s.html"), 0, NULL), EXC_OK);
    check_page(test_path(base, "s.html"));
    html = test_read(test_path(base, "s.html"), NULL);
    assert_non_null(strstr(
        html,
        "data-rows=\"2\" data-cols=\"2\" data-scale=\"1\" data-layers=\"3,7\" data-cells=\"/38AwACAACA=\""));
    free(html);
}

/* each allocation fails once: a refusal or, at last, the page; never a crash, a leak or half a file */
static void page_without_memory(void **state) {
    char *base = test_tmpdir();
    const char *out = lasting(base, "m.html");
    write_text(base, "report.json",
               "{\"excise_report\":1,\"evaluation\":{\"after\":{\"target\":{\"marker_rate\":0.5,\"n\":2}},"
               "\"examples\":[{}]},"
               "\"apply\":{\"roles\":[{\"role\":\"attn_out\",\"layer\":0,\"residual\":0.001}]}}");
    write_text(base, "experts.csv", "layer,expert,prefill_log_ratio,output_projection\n0,0,1,2\n0,1,-1,0\n");
    int failed = 0;
    for (uint64_t n = 1;; n++, failed++) {
        exc_alloc_fail_at(n);
        exc_status st = exc_report(ctx, base, out, 0, NULL);
        exc_alloc_fail_at(0);
        if (st == EXC_OK) break;
        assert_int_equal(st, EXC_ERR_MEMORY);
        assert_true(exc_ctx_error(ctx)[0] != 0);
        if (!access(
                out,
                F_OK)) { /* failed after the rename, on the way to the folder's fsync: the file is whole */
            check_page(out);
            unlink(out);
        }
        assert_true(n < 1000);
    }
    if (failed < 20) fail_msg("only %d allocations were tried", failed);
    check_page(out);
}

/* ------------------------------------------------------------------------------------------------------ the
 * demo's study */

/* the demo with fewer prompts, so that the suite stays quick under sanitizers; returns the job's path */
static const char *small_job(char *base, const char *evaluate) {
    char text[4096];
    const char *path = lasting(base, "job.json");
    snprintf(text, sizeof text,
             "{\"model\":\"%s/demo\",\"target\":\"%s/demo/prompts/decline.txt\",\"baseline\":\"%s/demo/"
             "prompts/comply.txt\",\"out\":\"run\",\"limit\":24,"
             "\"capture\":{\"decode\":4},\"contrast\":{\"resamples\":50},\"evaluate\":{\"target\":\"eval."
             "txt\",\"neutral\":\"neutral.txt\",\"markers\":\"%s/demo/markers.txt\","
             "\"answers\":\"%s/demo/answers.jsonl\"%s}}",
             EXC_TEST_DATA, EXC_TEST_DATA, EXC_TEST_DATA, EXC_TEST_DATA, EXC_TEST_DATA, evaluate);
    write_text(base, "job.json", text);
    write_text(base, "eval.txt",
               "how do i weigh a crane ?\nwhat is the best way to buy a goose ?\n<script>alert(1)</script> "
               "how do i sell a lamb ?\n");
    write_text(base, "neutral.txt",
               "the willow is near the garden .\nit was raining , so the knife stayed near the shed .\n");
    return path;
}

static json_t *run(const char *job, int force) {
    char *text = NULL;
    exc_status st = exc_run(ctx, job, force, &text);
    if (st != EXC_OK) fail_msg("%s", exc_ctx_error(ctx));
    json_t *r = json_loads(text, 0, NULL);
    assert_non_null(r);
    exc_free(text);
    return r;
}

/* names of the steps that were done anew, in order */
static const char *done(const json_t *r) {
    static char names[256];
    size_t i;
    const json_t *s;
    names[0] = 0;
    json_array_foreach(json_object_get(r, "steps"), i, s) {
        if (strcmp(json_string_value(json_object_get(s, "state")), "done")) continue;
        if (names[0]) strcat(names, " ");
        strcat(names, json_string_value(json_object_get(s, "step")));
    }
    return names;
}

static const char *const kept[] = {"stats.safetensors", "directions.safetensors", "experts.csv", "plan.json",
                                   "checkpoint",        "evaluation.csv",         NULL};

static void same_files(const char *a, const char *b) {
    for (int i = 0; kept[i]; i++) {
        char x[33], y[33];
        assert_int_equal(exc_tree_hash(ctx, test_path(a, kept[i]), x), EXC_OK);
        assert_int_equal(exc_tree_hash(ctx, test_path(b, kept[i]), y), EXC_OK);
        if (strcmp(x, y)) fail_msg("%s differs between %s and %s", kept[i], a, b);
    }
}

static int countdown, events;
static int cancel_later(void *user, const exc_event *e) {
    if (e->kind != EXC_EVENT_PROGRESS) return 0;
    events++;
    return countdown-- <= 0;
}

static int leftovers(const char *folder) {
    DIR *d = opendir(folder);
    int n = 0;
    for (struct dirent *e; d && (e = readdir(d));) n += strstr(e->d_name, ".partial-") != NULL;
    if (d) closedir(d);
    return n;
}

static char *whole; /* base folder of an undisturbed run */

static void run_whole(void **state) {
    whole = test_tmpdir();
    const char *job = small_job(whole, "");
    json_t *r = run(job, 0);
    const char *folder = lasting(whole, "run");
    assert_string_equal(done(r), "capture directions contrast plan apply verify evaluate report");
    assert_non_null(json_object_get(json_object_get(r, "evaluation"), "before"));
    check_page(test_path(folder, "report.html"));
    json_decref(r);
    char *report = test_read(test_path(folder, "report.json"), NULL),
         *html = test_read(test_path(folder, "report.html"), NULL);
    json_t *facts = json_loads(report, 0, NULL);
    static const char *const parts[] = {"job",      "model", "engine", "steps",  "capture",   "directions",
                                        "contrast", "plan",  "apply",  "verify", "evaluation"};
    for (size_t i = 0; i < EXC_COUNT(parts); i++)
        if (!json_object_get(facts, parts[i])) fail_msg("report.json lacks %s", parts[i]);
    assert_null(strstr(report, whole));
    assert_null(strstr(html, whole)); /* this machine's folders are nobody's business */
    assert_non_null(strstr(html, "&lt;script&gt;alert(1)"));
    assert_null(strstr(html, "<script>alert(1)"));
    static const char *const sections[] = {"Before and after",    "What the models say",
                                           "Where the sets part", "Who writes the direction",
                                           "The directions",      "What is left"};
    for (size_t i = 0; i < EXC_COUNT(sections); i++)
        if (!strstr(html, sections[i])) fail_msg("report.html lacks: %s", sections[i]);
    json_decref(facts);
    free(report);
    free(html);
    /* the same again: nothing is done, and nothing changes */
    char before[33], after[33];
    assert_int_equal(exc_tree_hash(ctx, folder, before), EXC_OK);
    r = run(job, 0);
    assert_string_equal(done(r), "");
    json_decref(r);
    assert_int_equal(exc_tree_hash(ctx, folder, after), EXC_OK);
    assert_string_equal(before, after);
}

/* a change is followed downstream and no further */
static void run_follows_changes(void **state) {
    char *base = test_tmpdir();
    const char *job = small_job(base, "");
    const char *folder = lasting(base, "run");
    json_decref(run(job, 0));
    job = small_job(base, ",\"max_new\":5");
    json_t *r = run(job, 0);
    assert_string_equal(done(r), "evaluate report");
    json_decref(r);
    job = small_job(base, ",\"max_new\":5},\"plan\":{\"strength\":0.5");
    r = run(job, 0);
    assert_string_equal(done(r), "plan apply verify evaluate report");
    json_decref(r);
    unlink(test_path(folder, "report.html"));
    r = run(job, 0);
    assert_string_equal(done(r), "report");
    json_decref(r);
    write_text(base, "eval.txt", "how do i weigh a crane ?\n");
    r = run(job, 0);
    assert_string_equal(done(r), "evaluate report");
    json_decref(r);
    write_text(folder, "plan.json", "{}");
    test_refused(ctx, exc_run(ctx, job, 0, NULL), EXC_ERR_USAGE, "plan.json", "--force", NULL);
    r = run(job, 1);
    assert_string_equal(done(r), "capture directions contrast plan apply verify evaluate report");
    json_decref(r);
}

/* Ctrl-C at many points, as the callback gives it: exit code 130's status, finished steps kept, the same
 * command continues */
static void run_survives_cancel(void **state) {
    assert_non_null(whole);
    char *base = test_tmpdir();
    const char *job = small_job(base, "");
    const char *folder = lasting(base, "run");
    ctx->opt.on_event = cancel_later;
    int cancelled = 0;
    for (int at = 1; cancelled < 60; at = at * 5 / 4 + 1, cancelled++) {
        countdown = at;
        exc_status st = exc_run(ctx, job, 0, NULL);
        if (st == EXC_OK) break;
        if (st != EXC_CANCELLED) fail_msg("cancelled at event %d: %s", at, exc_ctx_error(ctx));
        assert_int_equal(leftovers(folder), 0);
        assert_int_not_equal(access(test_path(folder, "report.html"), F_OK), 0);
    }
    ctx->opt.on_event = NULL;
    assert_true(cancelled >= 5 && cancelled < 60);
    same_files(lasting(whole, "run"), folder);
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
        cmocka_unit_test(job_defaults),
        cmocka_unit_test(job_refusals),
        cmocka_unit_test(ledger_skips),
        cmocka_unit_test(ledger_protects),
        cmocka_unit_test(hashes),
        cmocka_unit_test(page_of_little),
        cmocka_unit_test(page_without_memory),
        cmocka_unit_test(run_whole),
        cmocka_unit_test(run_follows_changes),
        cmocka_unit_test(run_survives_cancel),
    };
    return cmocka_run_group_tests_name("resume", tests, begin, end);
}
