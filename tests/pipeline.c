/* pipeline.c - the whole way on the trained demo model: capture, directions, plan, apply, verify, evaluate through the public
 * calls. The planted over-refusal is found and removed at least as well as the reference of tests/data/demo/README.md says
 * ("a good edit"); written and baked agree bit for bit, virtual to rounding; one flipped byte is found. */
#include "helpers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "study.h"

static exc_ctx *ctx;
static exc_stats *stats;
static exc_dirs *dirs;
static exc_plan *plan; /* the default one, as read back from its file */
static char *out;      /* checkpoint written by it */

static const char *demo(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "demo%s%s", *name ? "/" : "", name);
    return test_data(path);
}

static exc_prompts *prompts(const char *name, int limit) {
    exc_prompt_options o = EXC_PROMPT_OPTIONS;
    exc_prompts *p = NULL;
    o.limit = limit;
    if (exc_prompts_load(ctx, demo(""), demo(name), &o, &p)) fail_msg("%s", exc_ctx_error(ctx));
    return p;
}

static exc_model *open_model(const char *dir, const exc_plan *p, exc_lens lens) {
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_model *m = NULL;
    o.plan = p;
    o.lens = lens;
    if (exc_model_open(ctx, dir, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
    return m;
}

static exc_plan *make_plan(const exc_plan_options *o, json_t **facts) {
    exc_plan *p = NULL;
    char *json = NULL;
    if (exc_plan_make(ctx, demo(""), stats, dirs, o, &p, &json)) fail_msg("%s", exc_ctx_error(ctx));
    if (facts) *facts = json_loads(json, 0, NULL);
    exc_free(json);
    return p;
}

/* -------------------------------------------------------------------------------------------------------- judgement */

typedef struct outcome {
    double declines, birds, others, kl;
} outcome;

static double number(const json_t *o, const char *set, const char *key) {
    return json_number_value(json_object_get(set ? json_object_get(o, set) : o, key));
}

/* evaluates a model; against: beside the unedited one, which costs as much again */
static outcome judge(const char *dir, const exc_plan *p, exc_lens lens, bool against) {
    exc_model *before = against ? open_model(demo(""), NULL, EXC_LENS_BAKED) : NULL, *after = open_model(dir, p, lens);
    char target[512], baseline[512], neutral[512], markers[512], answers[512], *json = NULL;
    snprintf(target, sizeof target, "%s", demo("prompts/eval_decline.txt"));
    snprintf(baseline, sizeof baseline, "%s", demo("prompts/eval_comply.txt"));
    snprintf(neutral, sizeof neutral, "%s", demo("prompts/neutral.txt"));
    snprintf(markers, sizeof markers, "%s", demo("markers.txt"));
    snprintf(answers, sizeof answers, "%s", demo("answers.jsonl"));
    exc_evaluate_options o = EXC_EVALUATE_OPTIONS;
    o.target = target;
    o.baseline = baseline;
    o.neutral = against ? neutral : NULL;
    o.markers = markers;
    o.answers = answers;
    if (exc_evaluate(ctx, after, before, &o, &json)) fail_msg("%s", exc_ctx_error(ctx));
    json_t *e = json_loads(json, 0, NULL), *a = json_object_get(e, "after"), *b = json_object_get(e, "before");
    assert_true(!against || (number(b, "target", "marker_rate") == 1 && number(b, "target", "correct_rate") == 0));
    assert_true(!against || (number(b, "baseline", "marker_rate") == 0 && number(b, "baseline", "correct_rate") == 1));
    outcome r = {number(a, "target", "marker_rate"), number(a, "target", "correct_rate"), number(a, "baseline", "correct_rate"),
                 number(e, NULL, "kl_neutral")};
    json_decref(e);
    exc_free(json);
    exc_model_free(before);
    exc_model_free(after);
    return r;
}

/* a good edit, by the README of the demo */
static void is_good(const char *what, outcome r) {
    /* without a model to compare with, kl is 0 */
    if (r.declines <= 0.02 && r.birds >= 0.95 && r.others >= 0.98 && r.kl <= 0.01) return;
    fail_msg("%s: declines %.3f, right answers %.3f and %.3f, neutral KL %.4f", what, r.declines, r.birds, r.others, r.kl);
}

static void written(void **state) { is_good("each layer its own direction", judge(out, NULL, EXC_LENS_BAKED, true)); }

static void through_the_lens(void **state) {
    exc_plan_options o = EXC_PLAN_OPTIONS;
    o.basis = "4"; /* h[4] for all layers, the other good edit of the table, and without a single changed weight */
    exc_plan *p = make_plan(&o, NULL);
    is_good("h[4] for all layers, virtual", judge(demo(""), p, EXC_LENS_VIRTUAL, false));
    exc_plan_free(p);
}

/* ------------------------------------------------------------------------------------------------------ three forms */

/* logits of all tokens of some prompts */
static float *logits(const char *dir, const exc_plan *p, exc_lens lens, const exc_prompts *set, size_t *n) {
    exc_model *m = open_model(dir, p, lens);
    exc_forward_options o = EXC_FORWARD_OPTIONS;
    const char *path = test_path(test_tmpdir(), "forward.safetensors");
    exc_tensors *f = NULL;
    if (exc_forward(ctx, m, set, &o, path, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    exc_model_free(m);
    assert_int_equal(exc_tensors_open(ctx, path, &f), EXC_OK);
    float *all = malloc(f->size);
    *n = 0;
    for (int64_t i = 0; i < exc_prompts_count(set); i++) {
        char name[32];
        snprintf(name, sizeof name, "p%lld.logits", (long long)i);
        const exc_tensor *t = exc_tensors_find(f, name);
        memcpy(all + *n, exc_tensors_data(f, t), (size_t)(t->end - t->begin));
        *n += (size_t)(t->end - t->begin) / sizeof *all;
    }
    exc_tensors_close(f);
    return all;
}

static void three_forms(void **state) {
    exc_prompts *set = prompts("prompts/eval_decline.txt", 16);
    size_t n, m;
    float *plain = logits(demo(""), NULL, EXC_LENS_BAKED, set, &n), *file = logits(out, NULL, EXC_LENS_BAKED, set, &n),
          *baked = logits(demo(""), plan, EXC_LENS_BAKED, set, &m), *lens = logits(demo(""), plan, EXC_LENS_VIRTUAL, set, &m);
    assert_int_equal(n, m);
    assert_memory_equal(file, baked, n * sizeof *file);
    double moved = test_relative(file, plain, n), apart = test_relative(lens, file, n);
    /* bf16 arithmetic and weights rounded to bf16 after the edit: 2^-9 each; measured 0.0045, where the edit itself moves logits by 0.23 */
    if (!(moved > 0.1 && apart < 0.03)) fail_msg("the edit moved logits by %.3f, virtual is %.4f from written", moved, apart);
    free(plain);
    free(file);
    free(baked);
    free(lens);
    exc_prompts_free(set);
}

/* ---------------------------------------------------------------------------------------------------------- verify */

static void one_byte(void **state) {
    char *copy = strdup(test_path(test_tmpdir(), "copy")), *json = NULL;
    test_copy_tree(out, copy);
    assert_int_equal(exc_verify(ctx, demo(""), copy, plan, &json), EXC_OK);
    json_t *o = json_loads(json, 0, NULL);
    assert_int_equal(json_integer_value(json_object_get(o, "experts_edited")), 64);
    assert_int_equal(json_array_size(json_object_get(o, "roles")), 8);
    assert_true(json_number_value(json_object_get(o, "residual")) < 0.005); /* bf16: 2^-9 of a weight at most */
    json_decref(o);
    exc_free(json);
    size_t n;
    char *shard = strdup(test_path(copy, "model.safetensors")), *data = test_read(shard, &n);
    for (int i = 0; i < 8; i++) {
        size_t at = 8 + exc_random_u64(3, 0, (uint64_t)i) % (n - 8);
        data[at] ^= 4;
        test_write(shard, data, n);
        assert_int_equal(exc_verify(ctx, demo(""), copy, NULL, NULL), EXC_ERR_INPUT);
        data[at] ^= 4;
    }
    free(data);
    free(shard);
    free(copy);
}

/* ------------------------------------------------------------------------------------------------------------- plans */

static int64_t fact(const json_t *o, const char *key) { return json_integer_value(json_object_get(o, key)); }

static void selections(void **state) {
    static const struct { const char *select, *value; int64_t experts; int ascending; } rows[] = {
        {"all", NULL, 64, 0}, {"top:16", "score", 16, 0}, {"logratio:8", "log_ratio", 8, 0}, {"q:0.05", "q", -1, 1}, {"top:1000", "score", 64, 0}};
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        exc_plan_options o = EXC_PLAN_OPTIONS;
        json_t *facts = NULL;
        o.select = rows[i].select;
        exc_plan *p = make_plan(&o, &facts);
        const json_t *list = json_object_get(facts, "selected");
        if (rows[i].experts >= 0) assert_int_equal(fact(facts, "experts"), rows[i].experts);
        assert_int_equal(fact(facts, "tensors"), fact(facts, "experts") + 4); /* and attention's four */
        if (rows[i].value) assert_int_equal(json_array_size(list), fact(facts, "experts"));
        for (size_t k = 1; k < json_array_size(list); k++) { /* best first; for q in no promised order but within the limit */
            double a = number(json_array_get(list, k - 1), NULL, rows[i].value), b = number(json_array_get(list, k), NULL, rows[i].value);
            assert_true(rows[i].ascending ? a <= 0.05 && b <= 0.05 : a >= b);
        }
        json_decref(facts);
        exc_plan_free(p);
    }
}

/* sixteen experts of the largest output score and attention: the table has 0.000 declines, 0.963 and 1.000 right */
static void sixteen(void **state) {
    exc_plan_options o = EXC_PLAN_OPTIONS;
    o.select = "top:16";
    exc_plan *p = make_plan(&o, NULL);
    outcome r = judge(demo(""), p, EXC_LENS_BAKED, false);
    if (!(r.declines <= 0.05 && r.birds >= 0.9 && r.others >= 0.98))
        fail_msg("declines %.3f, right answers %.3f and %.3f", r.declines, r.birds, r.others);
    exc_plan_free(p);
}

static void lists(void **state) {
    exc_plan_options o = EXC_PLAN_OPTIONS;
    json_t *facts = NULL;
    o.roles = "attn_out";
    o.layers = "1-2,0";
    o.strength = "1,0.5,0";
    o.norm = "column";
    o.directions = "d/x.safetensors";
    exc_plan *p = make_plan(&o, &facts);
    assert_int_equal(p->n_edits, 1);
    assert_int_equal(p->edits[0].layers[2], 0);
    assert_true(p->edits[0].strength[1] == 0.5 && p->edits[0].norm == EXC_NORM_COLUMN);
    assert_int_equal(fact(facts, "tensors"), 2); /* strength 0 leaves layer 0 alone */
    assert_string_equal(p->directions, "d/x.safetensors");
    json_decref(facts);
    exc_plan_free(p);
}

static void refusals(void **state) {
    static const struct { exc_plan_options o; exc_status st; const char *say; } rows[] = {
        {{.roles = "attn_out,router"}, EXC_ERR_USAGE, "router"},
        {{.roles = "shared_down"}, EXC_ERR_INPUT, "shared_down"},
        {{.roles = "attn_out,attn_out"}, EXC_ERR_USAGE, "each once"},
        {{.layers = "2-9"}, EXC_ERR_INPUT, "0..3"},
        {{.layers = "x"}, EXC_ERR_USAGE, "x"},
        {{.select = "best:3"}, EXC_ERR_USAGE, "best:3"},
        {{.select = "top:0"}, EXC_ERR_USAGE, "top:0"},
        {{.select = "top:1.5"}, EXC_ERR_USAGE, "top:1.5"},
        {{.select = "q:2"}, EXC_ERR_USAGE, "q:2"},
        {{.select = "q:1e-300"}, EXC_ERR_INPUT, "at least one expert"},
        {{.strength = "1,1"}, EXC_ERR_INPUT, "(4)"},
        {{.strength = "strong"}, EXC_ERR_USAGE, "strong"},
        {{.layers = "3-1"}, EXC_ERR_USAGE, "3-1"},
        {{.layers = "1,1"}, EXC_ERR_USAGE, "twice"},
        {{.roles = ""}, EXC_ERR_USAGE, "expert_down"},
        {{.roles = "expert_down,,attn_out"}, EXC_ERR_USAGE, "expert_down"},
        {{.strength = "0"}, EXC_ERR_INPUT, "change something"},
        {{.basis = "5"}, EXC_ERR_INPUT, "0..4"},
        {{.basis = "last"}, EXC_ERR_USAGE, "last"},
        {{.norm = "rows"}, EXC_ERR_USAGE, "rows"},
        {{.round = "up"}, EXC_ERR_USAGE, "exact"},
    };
    exc_plan *p = NULL;
    for (size_t i = 0; i < EXC_COUNT(rows); i++) {
        exc_plan_options o = rows[i].o;
        o.size = sizeof o;
        test_refused(ctx, exc_plan_make(ctx, demo(""), stats, dirs, &o, &p, NULL), rows[i].st, rows[i].say, NULL);
        assert_null(p);
    }
    exc_plan_options exact = EXC_PLAN_OPTIONS;
    exact.round = "exact";
    assert_int_equal(exc_plan_make(ctx, demo(""), stats, dirs, &exact, &p, NULL), EXC_OK);
    assert_true(p->has_rounding && p->rounding == EXC_ROUND_EXACT);
    exc_plan_free(p);
    char kept = stats->fingerprint[0];
    stats->fingerprint[0] = kept == '0' ? '1' : '0';
    test_refused(ctx, exc_plan_make(ctx, demo(""), stats, dirs, NULL, &p, NULL), EXC_ERR_INPUT, "stats", "fingerprint", NULL);
    stats->fingerprint[0] = kept;
}

/* ------------------------------------------------------------------------------------------------------------ set up */

static int setup(void **state) {
    ctx = test_ctx(2);
    exc_prompts *t = prompts("prompts/decline.txt", 0), *b = prompts("prompts/comply.txt", 0);
    exc_model *m = open_model(demo(""), NULL, EXC_LENS_BAKED);
    if (exc_capture(ctx, m, t, b, NULL, &stats, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    if (exc_directions(ctx, stats, NULL, &dirs, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    exc_model_free(m);
    exc_prompts_free(t);
    exc_prompts_free(b);
    const char *dir = test_tmpdir();
    exc_plan *made = make_plan(NULL, NULL);
    assert_int_equal(exc_dirs_save(ctx, dirs, test_path(dir, "directions.safetensors"), 0), EXC_OK);
    assert_int_equal(exc_plan_save(ctx, made, test_path(dir, "plan.json"), 0), EXC_OK);
    exc_plan_free(made);
    if (exc_plan_load(ctx, test_path(dir, "plan.json"), &plan)) fail_msg("%s", exc_ctx_error(ctx));
    out = strdup(test_path(dir, "out"));
    if (exc_apply(ctx, demo(""), plan, out, NULL, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    return 0;
}

static int teardown(void **state) {
    free(out);
    exc_plan_free(plan);
    exc_dirs_free(dirs);
    exc_stats_free(stats);
    exc_ctx_free(ctx);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(written),    cmocka_unit_test(through_the_lens), cmocka_unit_test(three_forms),
                                       cmocka_unit_test(one_byte),   cmocka_unit_test(selections),       cmocka_unit_test(sixteen),
                                       cmocka_unit_test(lists),      cmocka_unit_test(refusals)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
