/* inspect.c - what inspect says of every golden family agrees with what the other verbs do: an edit that is listed for a role is
 * accepted in a plan for this model and no other is; counts, dtypes and bytes add up to the files; parts that are passed
 * through are named. Its speed at the sizes of published models: huge.c. */
#include "models.h"

#include "edits.h"

static exc_ctx *ctx;

static const char *const models[] = {"qwen3_moe",  "mixtral", "olmoe",       "glm4_moe",    "qwen2_moe",
                                     "deepseek_v3", "moonlight", "qwen3_5_moe", "qwen3_next", "gpt_oss_bf16", "dots1"};

static json_t *inspected(const char *dir)
{
    char *text = NULL;
    if (exc_inspect(ctx, dir, &text)) fail_msg("%s", exc_ctx_error(ctx));
    json_t *o = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(o);
    exc_free(text);
    return o;
}

/* ---------------------------------------------------------------------------------------------------------- edits */

static bool listed(const json_t *role, const char *op)
{
    size_t i;
    json_t *v;
    json_array_foreach(json_object_get(role, "edits"), i, v) if (!strcmp(json_string_value(v), op)) return true;
    return false;
}

/* does a plan with this edit load and meet the model? */
static bool accepted(const exc_atlas *a, const char *dir, const char *role, const char *op)
{
    exc_buf b = {0};
    exc_plan *p = NULL;
    exc_compiled *c = NULL;
    const char *more = "";
    exc_buf values = {0};
    if (!strcmp(op, "scale") || !strcmp(op, "router_scale")) more = ",\"strength\":0.5";
    if (!strcmp(op, "router_bias")) {
        for (int64_t e = 0; e < a->shape.experts; e++) exc_buf_printf(&values, "%s1", e ? "," : ",\"values\":[");
        exc_buf_puts(&values, "]");
        more = values.data;
    }
    exc_buf_printf(&b, "{\"excise_plan\":1,\"directions\":\"directions.safetensors\",\"edits\":[{\"op\":\"%s\",\"role\":\"%s\"%s}]}", op, role, more);
    test_write(test_path(dir, "plan.json"), b.data, b.len);
    exc_status st = exc_plan_load(ctx, test_path(dir, "plan.json"), &p);
    if (st == EXC_OK) st = exc_plan_compile(ctx, a, p, &c);
    if (st != EXC_OK) assert_int_equal(st, EXC_ERR_INPUT);
    bool yes = st == EXC_OK && !exc_compiled_sidecar(c);
    exc_compiled_free(c);
    exc_plan_free(p);
    exc_buf_free(&b);
    exc_buf_free(&values);
    return yes;
}

static void test_edits(void **state)
{
    static const char *const ops[] = {"project", "project_input", "scale", "mask", "router_project", "router_scale", "router_bias"};
    for (size_t i = 0; i < EXC_COUNT(models); i++) {
        const char *dir = golden_dir(models[i]), *plans = test_tmpdir();
        exc_atlas *a = NULL;
        if (exc_atlas_open(ctx, dir, &a)) fail_msg("%s", exc_ctx_error(ctx));
        exc_dirs d = {.rows = a->shape.layers + 1, .rank = 1, .hidden = a->shape.hidden};
        size_t n = (size_t)(d.rows * d.hidden), k;
        d.basis = calloc(n, 4);
        d.singular = calloc((size_t)d.rows, 4);
        d.mean_difference = calloc(n, 4);
        for (int64_t r = 0; r < d.rows; r++) d.basis[r * d.hidden + r] = 1;
        assert_int_equal(exc_dirs_save(ctx, &d, test_path(plans, "directions.safetensors"), 0), EXC_OK);
        json_t *o = inspected(dir), *role;
        json_array_foreach(json_object_get(o, "roles"), k, role)
        {
            const char *name = json_string_value(json_object_get(role, "role"));
            bool any = json_array_size(json_object_get(role, "edits")) > 0;
            assert_int_equal(any, !json_object_get(role, "why_not"));
            for (size_t j = 0; j < EXC_COUNT(ops); j++)
                if (listed(role, ops[j]) != accepted(a, plans, name, ops[j])) fail_msg("%s: %s of %s", models[i], ops[j], name);
        }
        json_decref(o);
        free(d.basis);
        free(d.singular);
        free(d.mean_difference);
        exc_atlas_close(a);
    }
}

/* --------------------------------------------------------------------------------------------------------- counts */

static int64_t sum_of(const json_t *list, const char *key)
{
    int64_t n = 0;
    size_t i;
    json_t *v;
    json_array_foreach(list, i, v) n += json_integer_value(json_object_get(v, key));
    return n;
}

static void test_counts(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(models); i++) {
        json_t *o = inspected(golden_dir(models[i])), *roles = json_object_get(o, "roles"), *role, *v;
        exc_checkpoint *c = NULL;
        assert_int_equal(exc_checkpoint_open(ctx, golden_dir(models[i]), &c), EXC_OK);
        uint64_t bytes = 0, passed = 0;
        size_t k, j;
        for (j = 0; j < c->n_tensors; j++) bytes += c->by_name[j]->end - c->by_name[j]->begin;
        json_array_foreach(json_object_get(o, "passed_through"), k, v)
        {
            const exc_tensor *t = exc_checkpoint_find(c, json_string_value(v));
            passed += t->end - t->begin;
        }
        assert_int_equal(json_array_size(json_object_get(o, "unknown")), 0);
        assert_int_equal(sum_of(roles, "bytes") + (int64_t)passed, bytes);
        assert_int_equal(sum_of(json_object_get(o, "parts"), "bytes"), passed);
        assert_int_equal(sum_of(json_object_get(o, "parts"), "tensors"), json_array_size(json_object_get(o, "passed_through")));
        assert_int_equal(json_integer_value(json_object_get(o, "tensors")), c->n_tensors);
        json_array_foreach(roles, k, role)
        {
            const char *dtype;
            int64_t n = 0;
            json_object_foreach(json_object_get(role, "dtypes"), dtype, v)
            {
                n += json_integer_value(v);
                assert_non_null(strstr(json_string_value(json_object_get(role, "stored")), dtype));
            }
            assert_int_equal(n, json_integer_value(json_object_get(role, "tensors")));
        }
        exc_checkpoint_close(c);
        json_decref(o);
    }
}

static const char *part_at(const json_t *o, size_t i, const char *key)
{
    return json_string_value(json_object_get(json_array_get(json_object_get(o, "parts"), i), key));
}

static void test_parts(void **state)
{
    json_t *o = inspected(golden_dir("qwen3_5_moe"));
    assert_non_null(strstr(part_at(o, 0, "part"), "MTP"));
    assert_string_equal(part_at(o, 0, "prefix"), "mtp.");
    assert_string_equal(part_at(o, 1, "part"), "vision");
    assert_string_equal(part_at(o, 1, "prefix"), "model.visual.");
    json_decref(o);
    o = inspected(golden_dir("glm4_moe"));
    assert_string_equal(part_at(o, 0, "prefix"), "model.layers.4.");
    json_decref(o);
    o = inspected(golden_dir("gpt_oss_bf16"));
    json_t *windows = json_object_get(o, "window_by_layer");
    for (size_t l = 0; l < 4; l++) assert_int_equal(json_integer_value(json_array_get(windows, l)), l % 2 ? 0 : 8);
    json_decref(o);
}

static int open_ctx(void **state)
{
    ctx = test_ctx(2);
    return 0;
}

static int close_ctx(void **state)
{
    exc_ctx_free(ctx);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_edits),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_parts),
    };
    return cmocka_run_group_tests(tests, open_ctx, close_ctx);
}
