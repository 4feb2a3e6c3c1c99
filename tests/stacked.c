/* stacked.c - tensors that hold many weights: all experts of a layer, gates beside ups, transposed, rows taking turns. The same
 * model stored one tensor an expert and stacked is one model: logits, edited bytes, what verify finds and what is refused. Other
 * orientations are compared with the dense edit through a view of the same numbers. */
#include "collect.h"

#include <unistd.h>

#include "edits.h"

static exc_ctx *ctx;

/* ------------------------------------------------------------------------------------------------------------ view */

/* every pair of layouts of an odd matrix: elements land where they belong and nowhere else */
static void test_view(void **state)
{
    static const int64_t sizes[] = {0, 1, 31, 33, 127};
    exc_ctx *c[2] = {test_ctx(1), test_ctx(3)};
    for (size_t k = 0; k < 5 * 5 * 9 * 3; k++) {
        int64_t rows = sizes[k % 5], columns = sizes[k / 5 % 5], n = rows * columns;
        size_t from = k / 25 % 3, to = k / 75 % 3, unit = (size_t)1 << k / 225;
        /* dense, transposed, rows that take turns with another matrix */
        int64_t row[3] = {columns, 1, 2 * columns}, column[3] = {1, rows, 1};
        size_t room = (size_t)(2 * n + 1) * unit;
        uint8_t *src = malloc(room), *dst = malloc(room), *again = malloc(room), *hit = calloc(1, room);
        for (size_t i = 0; i < room; i++) src[i] = (uint8_t)exc_random_u64(k, 1, i);
        memset(dst, 0x5a, room);
        memset(again, 0x5a, room);
        struct exc_view_args a = {.src = src, .src_row = row[from], .src_column = column[from], .dst = dst, .dst_row = row[to],
                                  .dst_column = column[to], .rows = rows, .columns = columns, .unit = unit};
        assert_int_equal(c[0]->ops->view(&c[0]->queue, &a), EXC_OK);
        a.dst = again;
        assert_int_equal(c[1]->ops->view(&c[1]->queue, &a), EXC_OK);
        assert_memory_equal(dst, again, room);
        for (int64_t i = 0; i < n; i++) {
            int64_t r = i / columns, q = i % columns;
            size_t s = (size_t)(r * row[from] + q * column[from]) * unit, d = (size_t)(r * row[to] + q * column[to]) * unit;
            assert_memory_equal(dst + d, src + s, unit);
            memset(hit + d, 1, unit);
        }
        for (size_t i = 0; i < room; i++) assert_true(hit[i] || dst[i] == 0x5a);
        free(src);
        free(dst);
        free(again);
        free(hit);
    }
    struct exc_view_args bad = {.rows = 1, .columns = 1, .unit = 3};
    assert_int_equal(c[0]->ops->view(&c[0]->queue, &bad), EXC_ERR_USAGE);
    exc_ctx_free(c[0]);
    exc_ctx_free(c[1]);
}

/* ----------------------------------------------------------------------------------------------------- two layouts */

typedef struct twins {
    tiny t;
    char *dir[2]; /* one tensor an expert; stacked */
} twins;

static twins make_twins(const char *dtype)
{
    twins w = {.t = tiny_default()};
    w.t.only = "[1]";
    w.t.dtype = dtype;
    w.dir[0] = test_tmpdir();
    tiny_write(&w.t, w.dir[0]);
    for (int l = 0; l < w.t.layers; l++)
        if (tiny_is_moe(&w.t, l)) tiny_stack_layer(&w.t, l);
    w.t.files = 2;
    w.dir[1] = test_tmpdir();
    tiny_write(&w.t, w.dir[1]);
    return w;
}

static exc_model *opened(const char *dir, const exc_plan *plan, exc_lens lens)
{
    exc_model *m = NULL;
    exc_model_options o = {.size = sizeof o, .compute = EXC_COMPUTE_BF16, .plan = plan, .lens = lens};
    if (exc_model_open(ctx, dir, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
    return m;
}

static void test_same_model(void **state)
{
    static const char *const dtypes[] = {"BF16", "F16", "F32"};
    const int64_t lengths[] = {1, 9, 30};
    for (int d = 0; d < 3; d++) {
        twins w = make_twins(dtypes[d]);
        exc_prompts p = make_prompts(3, lengths, w.t.vocab, 5);
        exc_model *a = opened(w.dir[0], NULL, EXC_LENS_BAKED), *b = opened(w.dir[1], NULL, EXC_LENS_BAKED);
        assert_int_equal(a->weight_bytes, b->weight_bytes);
        result x = run(ctx, a, &p, 4, 0, 0), y = run(ctx, b, &p, 4, 0, 0);
        for (int64_t i = 0; i < 3; i++)
            assert_memory_equal(x.logits[i], y.logits[i], (size_t)(length_of(&p, i) * w.t.vocab) * 4);
        free_result(&x);
        free_result(&y);
        exc_model_free(a);
        exc_model_free(b);
        free_prompts(&p);
        tiny_free(&w.t);
    }
}

/* directions with every row set, and a plan of the given edits */
static exc_plan *plan_of(const tiny *t, const char *edits)
{
    exc_dirs d = {.rows = t->layers + 1, .rank = 1, .hidden = t->hidden};
    size_t n = (size_t)(d.rows * d.hidden);
    exc_buf text = {0};
    exc_plan *p = NULL;
    char *dir = test_tmpdir();
    d.basis = calloc(n, sizeof *d.basis);
    d.singular = calloc((size_t)d.rows, sizeof *d.singular);
    d.mean_difference = calloc(n, sizeof *d.mean_difference);
    for (int64_t r = 0; r < d.rows; r++) {
        double sum = 0;
        for (int64_t h = 0; h < d.hidden; h++) {
            double v = (double)test_normal(31 + (uint64_t)r, (uint64_t)h);
            sum += v * v;
        }
        for (int64_t h = 0; h < d.hidden; h++)
            d.basis[r * d.hidden + h] = (float)((double)test_normal(31 + (uint64_t)r, (uint64_t)h) / sqrt(sum));
    }
    if (exc_dirs_save(ctx, &d, test_path(dir, "directions.safetensors"), 0)) fail_msg("%s", exc_ctx_error(ctx));
    exc_buf_printf(&text, "{\"excise_plan\":1,\"directions\":\"directions.safetensors\",\"edits\":[%s]}", edits);
    test_write(test_path(dir, "plan.json"), text.data, text.len);
    if (exc_plan_load(ctx, test_path(dir, "plan.json"), &p)) fail_msg("%s", exc_ctx_error(ctx));
    exc_buf_free(&text);
    free(d.basis);
    free(d.singular);
    free(d.mean_difference);
    return p;
}

static const char edits[] = "{\"op\":\"project\",\"role\":\"expert_down\",\"experts\":[0,2,5],\"norm\":\"column\"},"
                            "{\"op\":\"project_input\",\"role\":\"expert_gate\",\"layers\":[0],\"strength\":0.75},"
                            "{\"op\":\"scale\",\"role\":\"expert_up\",\"experts\":[3],\"strength\":0.5},"
                            "{\"op\":\"mask\",\"role\":\"expert_down\",\"layers\":[2],\"experts\":[6]}";

static char *applied(const char *dir, const exc_plan *p, json_t **facts)
{
    char *out = strdup(test_path(test_tmpdir(), "out")), *json = NULL;
    if (exc_apply(ctx, dir, p, out, NULL, &json)) fail_msg("%s", exc_ctx_error(ctx));
    *facts = json_loads(json, 0, NULL);
    exc_free(json);
    if (exc_verify(ctx, dir, out, NULL, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    return out;
}

/* each weight of one atlas lies in the other with the same bytes */
static void same_weights(const exc_atlas *a, const exc_atlas *b)
{
    assert_int_equal(a->count, b->count);
    for (size_t i = 0; i < a->count; i++) {
        const exc_weight *v = &a->items[i], *w = &b->items[i];
        assert_true(v->role == w->role && v->layer == w->layer && v->expert == w->expert && exc_weight_dense(w));
        assert_int_equal(exc_weight_span(v), exc_weight_span(w));
        assert_memory_equal(exc_atlas_data(a, v), exc_atlas_data(b, w), exc_weight_span(v));
    }
}

static void test_same_edits(void **state)
{
    twins w = make_twins("BF16");
    exc_plan *p = plan_of(&w.t, edits);
    json_t *facts[2];
    char *out[2];
    exc_atlas *a[2];
    for (int k = 0; k < 2; k++) {
        out[k] = applied(w.dir[k], p, &facts[k]);
        if (exc_atlas_open(ctx, out[k], &a[k])) fail_msg("%s", exc_ctx_error(ctx));
    }
    same_weights(a[0], a[1]);
    for (size_t i = 0; i < 3; i++) {
        static const char *const same[] = {"experts_edited", "bytes_edited", "residual"};
        assert_true(json_equal(json_object_get(facts[0], same[i]), json_object_get(facts[1], same[i])));
    }
    /* down of layers 0 and 2, gate and up of 0, up of 2 */
    assert_int_equal(json_integer_value(json_object_get(facts[1], "tensors_edited")), 4);
    const int64_t lengths[] = {20};
    exc_prompts q = make_prompts(1, lengths, w.t.vocab, 6);
    exc_model *baked = opened(w.dir[1], p, EXC_LENS_BAKED), *written = opened(out[1], NULL, EXC_LENS_BAKED);
    result x = run(ctx, baked, &q, 0, 0, 0), y = run(ctx, written, &q, 0, 0, 0);
    assert_memory_equal(x.logits[0], y.logits[0], (size_t)(20 * w.t.vocab) * 4);
    free_result(&x);
    free_result(&y);
    exc_model_free(baked);
    exc_model_free(written);
    /* one bit of an expert that the plan leaves alone, one of an expert that it edits */
    for (int expert = 1; expert < 3; expert++) {
        const exc_weight *d = exc_atlas_find(a[1], EXC_ROLE_EXPERT_DOWN, 0, expert);
        const char *path = a[1]->files->files[d->tensor->shard]->path;
        size_t n;
        char *bytes = test_read(path, &n);
        bytes[d->begin + 7] ^= 1;
        test_write(path, bytes, n);
        test_refused(ctx, exc_verify(ctx, w.dir[1], out[1], NULL, NULL), EXC_ERR_INPUT, "layers.0.mlp.experts.down_proj",
                     expert == 1 ? "byte" : "down_proj[2]", NULL);
        bytes[d->begin + 7] ^= 1;
        test_write(path, bytes, n);
        free(bytes);
    }
    for (int k = 0; k < 2; k++) {
        exc_atlas_close(a[k]);
        json_decref(facts[k]);
        free(out[k]);
    }
    free_prompts(&q);
    exc_plan_free(p);
    tiny_free(&w.t);
}

/* -------------------------------------------------------------------------------------------------- other layouts */

static int order_of(uint16_t h) { return h & 0x8000 ? -(h & 0x7fff) : h; }

/* gates and ups of a layer by turns of rows, or transposed by turns of columns; down transposed: the same edits on the same numbers */
static void test_orientations(void **state)
{
    twins w = make_twins("BF16");
    exc_plan *p = plan_of(&w.t, edits), *row = plan_of(&w.t, "{\"op\":\"project\",\"role\":\"expert_down\",\"norm\":\"row\"}");
    exc_atlas *a = NULL;
    assert_int_equal(exc_atlas_open(ctx, w.dir[0], &a), EXC_OK);
    for (int k = 0; k < 4; k++) {
        static const exc_role roles[] = {EXC_ROLE_EXPERT_DOWN, EXC_ROLE_EXPERT_GATE, EXC_ROLE_EXPERT_UP, EXC_ROLE_EXPERT_DOWN};
        exc_compiled *c = NULL;
        if (exc_plan_compile(ctx, a, k == 3 ? row : p, &c)) fail_msg("%s", exc_ctx_error(ctx));
        for (int lie = 0; lie < 3; lie++) {
            exc_weight v = *exc_atlas_find(a, roles[k], 0, k == 2 ? 3 : 2);
            const exc_weight *as = &v;
            int64_t n = v.out * v.in, parts = lie ? 2 : 1;
            uint16_t *dense = malloc((size_t)n * 2), *got = malloc((size_t)n * 2), *lying = malloc((size_t)(n * parts) * 2);
            memcpy(dense, exc_atlas_data(a, &v), (size_t)n * 2);
            for (int64_t i = 0; i < n * parts; i++) lying[i] = 0x7fc0; /* a neighbour's numbers must not be looked at */
            exc_effect want, effect;
            void *to = dense;
            const void *from = dense;
            assert_int_equal(exc_compiled_apply(ctx, c, &as, 1, &from, &to, NULL, &want), EXC_OK);
            v.out_step = lie == 0 ? 1 : lie == 1 ? 2 * v.in : 2;
            v.in_step = lie == 0 ? v.out : lie == 1 ? 1 : 2 * v.out;
            const uint16_t *old = exc_atlas_data(a, exc_atlas_find(a, roles[k], 0, v.expert));
            for (int64_t i = 0; i < n; i++) lying[i / v.in * v.out_step + i % v.in * v.in_step] = old[i];
            v.end = v.begin + (uint64_t)((v.out - 1) * v.out_step + (v.in - 1) * v.in_step + 1) * 2;
            to = lying;
            from = lying;
            assert_int_equal(exc_compiled_apply(ctx, c, &as, 1, &from, &to, NULL, &effect), EXC_OK);
            int64_t off = 0;
            for (int64_t i = 0; i < n; i++) {
                got[i] = lying[i / v.in * v.out_step + i % v.in * v.in_step];
                lying[i / v.in * v.out_step + i % v.in * v.in_step] = 0x7fc0;
                off += got[i] != dense[i];
                /* sums in another order, rounded once (ops.def: project) */
                assert_true(abs(order_of(got[i]) - order_of(dense[i])) <= (lie == 0));
            }
            assert_true(off * 100 <= n);
            for (int64_t i = 0; i < n * parts; i++) assert_int_equal(lying[i], 0x7fc0);
            assert_true(want.changed > n / 2 && llabs(effect.changed - want.changed) <= off && !effect.nonfinite);
            assert_true(fabs(effect.before - want.before) <= 1e-6 * want.before);
            free(dense);
            free(got);
            free(lying);
        }
        exc_compiled_free(c);
    }
    exc_atlas_close(a);
    exc_plan_free(p);
    exc_plan_free(row);
    tiny_free(&w.t);
}

/* -------------------------------------------------------------------------------------------------------- refusals */

static void spoil(void *user, tiny_tensor *t)
{
    const char *const *what = user;
    if (strcmp(t->name, what[0]) != 0) return;
    if (!strcmp(what[1], "drop")) t->drop = 1;
    if (!strcmp(what[1], "keep")) t->drop = 0;
    if (!strcmp(what[1], "turn")) t->shape[1] = t->shape[2], t->shape[2] = t->count / t->shape[0] / t->shape[1];
    if (!strcmp(what[1], "flat")) t->rank = 2, t->shape[1] *= t->shape[2];
    if (!strcmp(what[1], "nan")) t->poison = 1 + 4 * (int)(t->count / t->shape[0]) + 2;
}

static void test_refused_tensors(void **state)
{
    static const char *const cases[][5] = {
        {"model.layers.0.mlp.experts.down_proj", "drop", "layers.0.mlp.experts.0.down_proj", "none"},
        {"model.layers.0.mlp.experts.down_proj", "turn", "expected [7,40,23]", "found [7,23,40]"},
        {"model.layers.2.mlp.experts.gate_up_proj", "flat", "expected [7,46,40]", "found [7,1840]"},
        {"model.layers.2.mlp.experts.4.up_proj.weight", "keep", "expected one tensor", "layers.2.mlp.experts.4.up_proj"},
        {"model.layers.2.mlp.experts.down_proj", "nan", "layers.2.mlp.experts.down_proj[4]", "[0,2]"},
    };
    for (size_t i = 0; i < EXC_COUNT(cases); i++) {
        twins w = make_twins("BF16");
        exc_model *m = NULL;
        w.t.spoil = spoil;
        w.t.user = (void *)(uintptr_t)cases[i];
        char *dir = test_tmpdir();
        tiny_write(&w.t, dir);
        bool nan = !strcmp(cases[i][1], "nan");
        test_refused(ctx, test_read_model(ctx, dir, &m), nan ? EXC_ERR_NUMERIC : EXC_ERR_INPUT, cases[i][2], cases[i][3], NULL);
        tiny_free(&w.t);
    }
}

static void test_inspect(void **state)
{
    twins w = make_twins("BF16");
    char *text = NULL;
    assert_int_equal(exc_inspect(ctx, w.dir[1], &text), EXC_OK);
    json_t *o = json_loads(text, 0, NULL), *role = json_array_get(json_object_get(o, "roles"), 0);
    assert_string_equal(json_string_value(json_object_get(role, "role")), "expert_down");
    assert_int_equal(json_integer_value(json_object_get(role, "tensors")), 2);
    assert_int_equal(json_integer_value(json_object_get(role, "weights")), 14);
    assert_int_equal(json_integer_value(json_object_get(role, "bytes")), 14 * 40 * 23 * 2);
    json_decref(o);
    exc_free(text);
    tiny_free(&w.t);
}

/* every allocation of an edit fails once: an error, no crash, nothing left behind */
static void test_allocations_fail(void **state)
{
    twins w = make_twins("BF16");
    exc_plan *p = plan_of(&w.t, edits);
    for (uint64_t n = 1; n < 400; n++) {
        char *out = test_path(test_tmpdir(), "out");
        exc_alloc_fail_at(n);
        exc_status st = exc_apply(ctx, w.dir[1], p, out, NULL, NULL);
        exc_alloc_fail_at(0);
        if (st == EXC_OK) break;
        assert_int_equal(st, EXC_ERR_MEMORY);
        assert_int_equal(access(out, F_OK), -1);
        assert_true(n < 399);
    }
    exc_plan_free(p);
    tiny_free(&w.t);
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
        cmocka_unit_test(test_view),         cmocka_unit_test(test_same_model),      cmocka_unit_test(test_same_edits),
        cmocka_unit_test(test_orientations), cmocka_unit_test(test_refused_tensors), cmocka_unit_test(test_inspect),
        cmocka_unit_test(test_allocations_fail),
    };
    return cmocka_run_group_tests(tests, open_ctx, close_ctx);
}
