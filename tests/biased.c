/* biased.c - edits of a model with biases on what is edited, experts stored [in,out] with hidden = intermediate (gpt_oss): the
 * written bytes against f64 loops that know the orientation from the published layout alone, W x + b edited as a whole, and the
 * three forms of a plan alike. One case has the released size, 2880 x 2880.
 *
 * Tolerance of edited bf16 numbers: f32 sums of up to 2880 terms err by less than a tenth of a bf16 step, so a number is the
 * f64 result rounded, or its neighbour where that was near a tie (one step). */
#include "collect.h"

#include <fcntl.h>
#include <unistd.h>

#include "edits.h"

static exc_ctx *ctx;

/* a plan of these edits, along one random direction a row */
static exc_plan *plan_of(int64_t layers, int64_t hidden, const char *edits)
{
    exc_dirs d = {.rows = layers + 1, .rank = 1, .hidden = hidden};
    size_t n = (size_t)(d.rows * hidden);
    exc_buf text = {0};
    exc_plan *p = NULL;
    char *dir = test_tmpdir();
    d.basis = calloc(n, sizeof *d.basis);
    d.singular = calloc((size_t)d.rows, sizeof *d.singular);
    d.mean_difference = calloc(n, sizeof *d.mean_difference);
    for (int64_t r = 0; r < d.rows; r++) {
        double sum = 0;
        for (int64_t h = 0; h < hidden; h++) sum += pow((double)test_normal(91 + (uint64_t)r, (uint64_t)h), 2);
        for (int64_t h = 0; h < hidden; h++) d.basis[r * hidden + h] = (float)((double)test_normal(91 + (uint64_t)r, (uint64_t)h) / sqrt(sum));
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

/* old and new files of an applied and verified plan */
typedef struct pair {
    char *out;
    exc_tensors *old, *new;
    json_t *facts;
} pair;

static pair applied(const char *dir, const exc_plan *p)
{
    pair w = {.out = strdup(test_path(test_tmpdir(), "out"))};
    char *json = NULL;
    if (exc_apply(ctx, dir, p, w.out, NULL, &json)) fail_msg("%s", exc_ctx_error(ctx));
    if (exc_verify(ctx, dir, w.out, NULL, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    w.facts = json_loads(json, 0, NULL);
    exc_free(json);
    if (exc_tensors_open(ctx, test_path(dir, "model.safetensors"), &w.old)) fail_msg("%s", exc_ctx_error(ctx));
    if (exc_tensors_open(ctx, test_path(w.out, "model.safetensors"), &w.new)) fail_msg("%s", exc_ctx_error(ctx));
    return w;
}

static void pair_free(pair *w)
{
    exc_tensors_close(w->old);
    exc_tensors_close(w->new);
    json_decref(w->facts);
    free(w->out);
}

static uint16_t half(const exc_tensors *f, const exc_tensor *t, int64_t i)
{
    uint16_t h;
    memcpy(&h, (const uint8_t *)exc_tensors_data(f, t) + i * 2, 2);
    return h;
}

static double number(const exc_tensors *f, const exc_tensor *t, int64_t i) { return (double)test_from_bf16(half(f, t, i)); }

static int order_of(uint16_t h) { return h & 0x8000 ? -(h & 0x7fff) : h; }

static int64_t moved; /* numbers that were a step away from the f64 result rounded */

static void near_to(uint16_t got, double want, const char *name, int64_t at)
{
    int step = abs(order_of(got) - order_of(test_bf16((float)want)));
    moved += step;
    if (step > 1) fail_msg("%s, element %lld: %g, not %g", name, (long long)at, (double)test_from_bf16(got), want);
}

/* rows of `t` from row `first` on, each [H] a vector written to the stream (as [in,out] stores them, and biases): x - s r (r.x) */
static void check_vectors(const pair *w, const char *name, const float *r, double s, int64_t H, int64_t first, int64_t rows)
{
    const exc_tensor *t = exc_tensors_find(w->old, name), *u = exc_tensors_find(w->new, name);
    for (int64_t i = first; i < first + rows; i++) {
        double dot = 0;
        for (int64_t h = 0; h < H; h++) dot += (double)r[h] * number(w->old, t, i * H + h);
        for (int64_t h = 0; h < H; h++) near_to(half(w->new, u, i * H + h), number(w->old, t, i * H + h) - s * dot * (double)r[h], name, i * H + h);
    }
}

/* a weight [H,n] whose columns are written to the stream */
static void check_columns(const pair *w, const char *name, const float *r, double s, int64_t H, int64_t n)
{
    const exc_tensor *t = exc_tensors_find(w->old, name), *u = exc_tensors_find(w->new, name);
    for (int64_t i = 0; i < n; i++) {
        double dot = 0;
        for (int64_t h = 0; h < H; h++) dot += (double)r[h] * number(w->old, t, h * n + i);
        for (int64_t h = 0; h < H; h++) near_to(half(w->new, u, h * n + i), number(w->old, t, h * n + i) - s * dot * (double)r[h], name, h * n + i);
    }
}

static bool same(const pair *w, const char *name)
{
    const exc_tensor *t = exc_tensors_find(w->old, name), *u = exc_tensors_find(w->new, name);
    return !memcmp(exc_tensors_data(w->old, t), exc_tensors_data(w->new, u), (size_t)(t->end - t->begin));
}

static const json_t *role_of(const json_t *facts, const char *role)
{
    size_t i;
    json_t *o;
    json_array_foreach(json_object_get(facts, "roles"), i, o) if (!strcmp(json_string_value(json_object_get(o, "role")), role)) return o;
    fail_msg("no role %s in the report", role);
    return NULL;
}

#define LAYER(l, name) "model.layers." #l "." name

static void test_written_bytes(void **state)
{
    const char *dir = golden_dir("gpt_oss_bf16");
    exc_plan *p = plan_of(4, 64, "{\"op\":\"project\",\"role\":\"expert_down\",\"layers\":[1],\"experts\":[2,5],\"strength\":0.75},"
                                 "{\"op\":\"project\",\"role\":\"attn_out\",\"layers\":[2]}");
    pair w = applied(dir, p);
    const float *r = p->dirs->basis;
    moved = 0;
    for (int64_t e = 2; e <= 5; e += 3) {
        check_vectors(&w, LAYER(1, "mlp.experts.down_proj"), r + 2 * 64, 0.75, 64, e * 64, 64);
        check_vectors(&w, LAYER(1, "mlp.experts.down_proj_bias"), r + 2 * 64, 0.75, 64, e, 1);
    }
    check_columns(&w, LAYER(2, "self_attn.o_proj.weight"), r + 3 * 64, 1, 64, 128);
    check_vectors(&w, LAYER(2, "self_attn.o_proj.bias"), r + 3 * 64, 1, 64, 0, 1);
    assert_true(moved <= 2);
    /* the plan's experts and nothing else */
    const exc_tensor *t = exc_tensors_find(w.old, LAYER(1, "mlp.experts.down_proj")), *b = exc_tensors_find(w.old, LAYER(1, "mlp.experts.down_proj_bias"));
    for (int64_t e = 0; e < 16; e++) {
        bool edited = e == 2 || e == 5;
        assert_int_equal(memcmp(exc_tensors_data(w.old, t) + e * 8192, exc_tensors_data(w.new, t) + e * 8192, 8192) != 0, edited);
        assert_int_equal(memcmp(exc_tensors_data(w.old, b) + e * 128, exc_tensors_data(w.new, b) + e * 128, 128) != 0, edited);
    }
    for (size_t i = 0; i < w.old->count; i++) {
        const char *name = w.old->items[i].name;
        bool edited = strstr(name, "layers.1.mlp.experts.down_proj") || strstr(name, "layers.2.self_attn.o_proj");
        assert_int_equal(same(&w, name), !edited);
    }
    assert_int_equal(json_integer_value(json_object_get(w.facts, "tensors_edited")), 4);
    assert_int_equal(json_integer_value(json_object_get(w.facts, "experts_edited")), 2);
    assert_int_equal(json_integer_value(json_object_get(role_of(w.facts, "expert_down_bias"), "edited")), 2);
    assert_int_equal(json_integer_value(json_object_get(role_of(w.facts, "expert_down_bias"), "present")), 16);
    pair_free(&w);
    exc_plan_free(p);
}

/* one layer and one expert of 2880 x 2880; only what is edited has numbers, the rest of the file is a hole */
static void test_released_size(void **state)
{
    enum { H = 2880 };
    static const struct {
        const char *name, *shape;
        int64_t count;
    } tensors[] = {
        {"model.embed_tokens.weight", "2,2880", 2 * H}, {"lm_head.weight", "2,2880", 2 * H}, {"model.norm.weight", "2880", H},
        {LAYER(0, "input_layernorm.weight"), "2880", H}, {LAYER(0, "post_attention_layernorm.weight"), "2880", H},
        {LAYER(0, "mlp.router.weight"), "1,2880", H}, {LAYER(0, "mlp.router.bias"), "1", 1}, {LAYER(0, "self_attn.sinks"), "1", 1},
        {LAYER(0, "self_attn.q_proj.weight"), "2,2880", 2 * H}, {LAYER(0, "self_attn.k_proj.weight"), "2,2880", 2 * H},
        {LAYER(0, "self_attn.v_proj.weight"), "2,2880", 2 * H}, {LAYER(0, "self_attn.q_proj.bias"), "2", 2},
        {LAYER(0, "self_attn.k_proj.bias"), "2", 2}, {LAYER(0, "self_attn.v_proj.bias"), "2", 2},
        {LAYER(0, "self_attn.o_proj.weight"), "2880,2", 2 * H}, {LAYER(0, "self_attn.o_proj.bias"), "2880", H},
        {LAYER(0, "mlp.experts.gate_up_proj"), "1,2880,5760", 2 * H * H}, {LAYER(0, "mlp.experts.gate_up_proj_bias"), "1,5760", 2 * H},
        {LAYER(0, "mlp.experts.down_proj_bias"), "1,2880", H}, {LAYER(0, "mlp.experts.down_proj"), "1,2880,2880", H * H},
    };
    char *dir = test_tmpdir();
    exc_buf head = {0};
    int64_t at = 0;
    for (size_t i = 0; i < EXC_COUNT(tensors); i++) {
        exc_buf_printf(&head, "%c\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%lld,%lld]}", i ? ',' : '{', tensors[i].name,
                       tensors[i].shape, (long long)at, (long long)(at + tensors[i].count * 2));
        at += tensors[i].count * 2;
    }
    exc_buf_puts(&head, "}");
    while (head.len % 8) exc_buf_puts(&head, " ");
    uint64_t n = head.len;
    int fd = open(test_path(dir, "model.safetensors"), O_CREAT | O_WRONLY, 0644);
    assert_true(fd >= 0 && pwrite(fd, &n, 8, 0) == 8 && pwrite(fd, head.data, head.len, 8) == (ssize_t)head.len);
    uint16_t *last = malloc((H + 1) * H * 2); /* the down_proj and its bias in front of it lie last */
    for (uint64_t i = 0; i < (H + 1) * H; i++) last[i] = (uint16_t)((exc_random_u64(4, 4, i) & 0x80ff) | 0x3d00);
    off_t end = (off_t)(8 + head.len) + at;
    assert_true(pwrite(fd, last, (H + 1) * H * 2, end - (H + 1) * H * 2) == (H + 1) * H * 2);
    close(fd);
    free(last);
    exc_buf_free(&head);
    static const char config[] = "{\"model_type\":\"gpt_oss\",\"hidden_size\":2880,\"intermediate_size\":2880,\"num_hidden_layers\":1,"
                                 "\"num_attention_heads\":1,\"num_key_value_heads\":1,\"head_dim\":2,\"vocab_size\":2,\"num_local_experts\":1,"
                                 "\"num_experts_per_tok\":1,\"max_position_embeddings\":64}";
    test_write(test_path(dir, "config.json"), config, sizeof config - 1);
    exc_plan *p = plan_of(1, H, "{\"op\":\"project\",\"role\":\"expert_down\"}");
    pair w = applied(dir, p);
    moved = 0;
    check_vectors(&w, LAYER(0, "mlp.experts.down_proj"), p->dirs->basis + H, 1, H, 0, H);
    check_vectors(&w, LAYER(0, "mlp.experts.down_proj_bias"), p->dirs->basis + H, 1, H, 0, 1);
    assert_true(moved < H * H / 1000); /* ops.def: >= 99.9 % are the f64 result rounded */
    assert_true(same(&w, LAYER(0, "mlp.experts.gate_up_proj")));
    pair_free(&w);
    exc_plan_free(p);
}

/* restored lengths: the bias is one more column; rows of it are single numbers and stay projected */
static void test_lengths(void **state)
{
    const char *dir = golden_dir("gpt_oss_bf16");
    exc_plan *p = plan_of(4, 64, "{\"op\":\"project\",\"role\":\"expert_down\",\"layers\":[0],\"norm\":\"column\"},"
                                 "{\"op\":\"project\",\"role\":\"attn_out\",\"layers\":[3],\"norm\":\"row\"}");
    pair w = applied(dir, p);
    const exc_tensor *b = exc_tensors_find(w.old, LAYER(0, "mlp.experts.down_proj_bias"));
    for (int64_t e = 0; e < 16; e++) {
        double before = 0, after = 0, along = 0;
        for (int64_t h = 0; h < 64; h++) {
            before += pow(number(w.old, b, e * 64 + h), 2);
            after += pow(number(w.new, b, e * 64 + h), 2);
            along += number(w.new, b, e * 64 + h) * (double)p->dirs->basis[64 + h];
        }
        assert_true(fabs(after / before - 1) < 1e-2 && fabs(along) < 1e-2 * sqrt(before)); /* what rounding to bf16 leaves */
    }
    check_vectors(&w, LAYER(3, "self_attn.o_proj.bias"), p->dirs->basis + 4 * 64, 1, 64, 0, 1);
    pair_free(&w);
    exc_plan_free(p);
}

/* factors take biases along, a mask leaves nothing, a projection of the input leaves a bias alone */
static void test_factors(void **state)
{
    const char *dir = golden_dir("gpt_oss_bf16");
    exc_plan *p = plan_of(4, 64, "{\"op\":\"scale\",\"role\":\"expert_up\",\"layers\":[0],\"experts\":[1],\"strength\":0.5},"
                                 "{\"op\":\"mask\",\"role\":\"expert_down\",\"layers\":[0],\"experts\":[3]},"
                                 "{\"op\":\"project_input\",\"role\":\"expert_gate\",\"layers\":[1]},"
                                 "{\"op\":\"router_scale\",\"layers\":[2],\"experts\":[4],\"strength\":2},"
                                 "{\"op\":\"router_project\",\"layers\":[3]}");
    pair w = applied(dir, p);
    const exc_tensor *t = exc_tensors_find(w.old, LAYER(0, "mlp.experts.gate_up_proj")), *b = exc_tensors_find(w.old, LAYER(0, "mlp.experts.gate_up_proj_bias"));
    for (int64_t i = 0; i < 16 * 64 * 128; i++) /* columns take turns: the odd ones are up */
        assert_true(number(w.new, t, i) == number(w.old, t, i) * (i / (64 * 128) == 1 && i % 2 ? 0.5 : 1));
    for (int64_t i = 0; i < 16 * 128; i++) assert_true(number(w.new, b, i) == number(w.old, b, i) * (i / 128 == 1 && i % 2 ? 0.5 : 1));
    t = exc_tensors_find(w.old, LAYER(0, "mlp.experts.down_proj")), b = exc_tensors_find(w.old, LAYER(0, "mlp.experts.down_proj_bias"));
    for (int64_t i = 0; i < 16 * 64 * 64; i++) assert_int_equal(half(w.new, t, i), i / 4096 == 3 ? 0 : half(w.old, t, i));
    for (int64_t i = 0; i < 16 * 64; i++) assert_int_equal(half(w.new, b, i), i / 64 == 3 ? 0 : half(w.old, b, i));
    /* gates of layer 1, [H] the slow axis: the even columns lose the direction on that axis */
    t = exc_tensors_find(w.old, LAYER(1, "mlp.experts.gate_up_proj"));
    moved = 0;
    for (int64_t e = 0; e < 16; e++)
        for (int64_t c = 0; c < 128; c++) {
            double dot = 0;
            for (int64_t h = 0; h < 64; h++) dot += number(w.old, t, (e * 64 + h) * 128 + c) * (double)p->dirs->basis[2 * 64 + h];
            for (int64_t h = 0; h < 64; h++) {
                int64_t at = (e * 64 + h) * 128 + c;
                if (c % 2) assert_int_equal(half(w.new, t, at), half(w.old, t, at));
                else near_to(half(w.new, t, at), number(w.old, t, at) - dot * (double)p->dirs->basis[2 * 64 + h], "gate", at);
            }
        }
    assert_true(moved < 60 && same(&w, LAYER(1, "mlp.experts.gate_up_proj_bias")));
    t = exc_tensors_find(w.old, LAYER(2, "mlp.router.weight")), b = exc_tensors_find(w.old, LAYER(2, "mlp.router.bias"));
    for (int64_t i = 0; i < 16 * 64; i++) assert_true(number(w.new, t, i) == number(w.old, t, i) * (i / 64 == 4 ? 2 : 1));
    for (int64_t e = 0; e < 16; e++) assert_true(number(w.new, b, e) == number(w.old, b, e) * (e == 4 ? 2 : 1));
    assert_true(!same(&w, LAYER(3, "mlp.router.weight")) && same(&w, LAYER(3, "mlp.router.bias")));
    pair_free(&w);
    exc_plan_free(p);
}

/* added to router.bias, which is part of the logits: the choice and the weights follow */
static void test_router_bias(void **state)
{
    const char *dir = golden_dir("gpt_oss_bf16");
    exc_plan *p = plan_of(4, 64, "{\"op\":\"router_bias\",\"layers\":[0],\"experts\":[3,7],\"values\":[-30,30]}");
    pair w = applied(dir, p);
    const exc_tensor *b = exc_tensors_find(w.old, LAYER(0, "mlp.router.bias"));
    for (int64_t e = 0; e < 16; e++)
        assert_int_equal(half(w.new, b, e), e == 3 ? test_bf16((float)(number(w.old, b, e) - 30)) : e == 7 ? test_bf16((float)(number(w.old, b, e) + 30)) : half(w.old, b, e));
    exc_prompts q = golden_prompts("gpt_oss_bf16");
    for (int baked = 0; baked < 2; baked++) {
        exc_model_options o = {.size = sizeof o, .compute = EXC_COMPUTE_F32, .plan = baked ? p : NULL, .lens = EXC_LENS_BAKED};
        exc_model *m = NULL;
        if (exc_model_open(ctx, baked ? dir : w.out, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
        result r = run(ctx, m, &q, 0, 0, 0);
        for (int64_t i = 0; i < q.count; i++)
            for (int64_t t = 0; t < length_of(&q, i); t++) {
                assert_int_equal(r.ids[i][t * 4], 7);
                assert_true((double)r.weights[i][t * 4] > 1 - 1e-6);
                for (int k = 1; k < 4; k++) assert_int_not_equal(r.ids[i][t * 4 + k], 3);
            }
        free_result(&r);
        exc_model_free(m);
    }
    free_prompts(&q);
    pair_free(&w);
    exc_plan_free(p);
}

static float *stream_of(const char *dir, const exc_plan *plan, exc_lens lens, const exc_prompts *p, size_t *count)
{
    exc_model_options o = {.size = sizeof o, .compute = EXC_COMPUTE_F32, .plan = plan, .lens = lens};
    exc_model *m = NULL;
    if (exc_model_open(ctx, dir, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
    result r = run(ctx, m, p, 0, 0, 0);
    float *all = calloc((size_t)(p->begin[p->count] * 64), 4);
    for (int64_t i = 0; i < p->count; i++)
        memcpy(all + p->begin[i] * 64, r.hidden[i] + 4 * length_of(p, i) * 64, (size_t)(length_of(p, i) * 64) * 4);
    *count = (size_t)(p->begin[p->count] * 64);
    free_result(&r);
    exc_model_free(m);
    return all;
}

/* written = baked bit for bit, virtual the same to f32 rounding: the stored weights are f32, so nothing else rounds */
static void test_three_forms(void **state)
{
    char *dir = make_oss("F32");
    exc_plan *p = plan_of(4, 64, "{\"op\":\"project\",\"role\":\"expert_down\",\"strength\":0.8},{\"op\":\"project\",\"role\":\"attn_out\"},"
                                 "{\"op\":\"scale\",\"role\":\"expert_down\",\"experts\":[0,9],\"strength\":1.5},"
                                 "{\"op\":\"mask\",\"role\":\"expert_down\",\"experts\":[2]}");
    exc_prompts q = golden_prompts("gpt_oss_bf16");
    pair w = applied(dir, p);
    size_t n;
    float *plain = stream_of(dir, NULL, EXC_LENS_BAKED, &q, &n), *written = stream_of(w.out, NULL, EXC_LENS_BAKED, &q, &n),
          *baked = stream_of(dir, p, EXC_LENS_BAKED, &q, &n), *virtual_ = stream_of(dir, p, EXC_LENS_VIRTUAL, &q, &n);
    assert_memory_equal(written, baked, n * 4);
    assert_true(test_relative(baked, plain, n) > 0.02);
    assert_true(test_relative(virtual_, baked, n) < 1e-5);
    free(plain);
    free(written);
    free(baked);
    free(virtual_);
    pair_free(&w);
    free_prompts(&q);
    exc_plan_free(p);
}

static void test_roles_refused(void **state)
{
    static const char *const roles[] = {"expert_down_bias", "attn_out_bias", "attn_sinks", "router_bias", "attn_v"};
    for (size_t i = 0; i < EXC_COUNT(roles); i++) {
        char text[256], *path = test_path(test_tmpdir(), "plan.json");
        exc_plan *p = NULL;
        snprintf(text, sizeof text, "{\"excise_plan\":1,\"edits\":[{\"op\":\"scale\",\"role\":\"%s\",\"strength\":0.5}]}", roles[i]);
        test_write(path, text, strlen(text));
        test_refused(ctx, exc_plan_load(ctx, path, &p), EXC_ERR_INPUT, "role", roles[i], NULL);
    }
}

/* what a made plan says it will edit is what apply edits, in tensors of many experts too */
static void test_made(void **state)
{
    const char *dir = golden_dir("gpt_oss_bf16");
    exc_plan *p = plan_of(4, 64, "{\"op\":\"project\",\"role\":\"expert_down\"}"), *made = NULL;
    exc_plan_options o = EXC_PLAN_OPTIONS;
    char *text = NULL;
    o.roles = "expert_down,attn_out";
    if (exc_plan_make(ctx, dir, NULL, p->dirs, &o, &made, &text)) fail_msg("%s", exc_ctx_error(ctx));
    json_t *facts = json_loads(text, 0, NULL);
    pair w = applied(dir, made);
    assert_int_equal(json_integer_value(json_object_get(facts, "tensors")), 4 * 4);
    assert_int_equal(json_integer_value(json_object_get(w.facts, "tensors_edited")), 4 * 4);
    assert_int_equal(json_integer_value(json_object_get(facts, "experts")), 64);
    pair_free(&w);
    json_decref(facts);
    exc_free(text);
    exc_plan_free(made);
    exc_plan_free(p);
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
        cmocka_unit_test(test_written_bytes), cmocka_unit_test(test_released_size), cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_factors),       cmocka_unit_test(test_router_bias),   cmocka_unit_test(test_three_forms),
        cmocka_unit_test(test_roles_refused), cmocka_unit_test(test_made),
    };
    return cmocka_run_group_tests(tests, open_ctx, close_ctx);
}
