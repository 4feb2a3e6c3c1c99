/* golden.c - the families against goldens made by another implementation (goldens.h), a long prompt, and other ways to store the
 * same checkpoint. On the device: resident.c. */
#include "goldens.h"
#include "session.h"

static void test_golden_f32(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(families); i++) golden_f32("cpu", families[i].name, 16);
}

static void test_golden_bf16(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(families); i++) golden_bf16("cpu", &families[i]);
}

/* a prompt of 150 tokens, longer than several chunks of the delta rule and no multiple of one: the last 16 positions, in one
 * prefill, in pieces, and token by token as in decode */
static void test_golden_long(void **state)
{
    static const char *const models[] = {"qwen3_next", "qwen3_5_moe"};
    static const int64_t steps[] = {150, 47, 1};
    for (int k = 0; k < 6; k++) {
        exc_ctx *ctx = test_ctx(2);
        exc_model *m = open_model(ctx, golden_dir(models[k / 3]), EXC_COMPUTE_F32);
        const exc_shape *s = &m->atlas->shape;
        exc_tensors *g;
        char file[256];
        snprintf(file, sizeof file, "models/%s/golden/long.safetensors", models[k / 3]);
        assert_int_equal(exc_tensors_open(ctx, test_data(file), &g), EXC_OK);
        exc_prompts p = {.count = 1, .begin = calloc(2, 8), .tokens = calloc(150, 4)};
        p.begin[1] = 150;
        memcpy(p.tokens, golden(g, -1, "tokens"), 150 * 4);
        result r = run(ctx, m, &p, 0, 1, steps[k % 3]);
        distance z = {0}, h = {0};
        add_distance(&z, r.logits[0] + (150 - 16) * s->vocab, golden(g, -1, "logits"), (size_t)(16 * s->vocab));
        for (int64_t l = 0; l <= s->layers; l++)
            add_distance(&h, r.hidden[0] + (l * 150 + 150 - 16) * s->hidden, (const char *)golden(g, -1, "hidden") + l * 16 * s->hidden * 4,
                         (size_t)(16 * s->hidden));
        print_message("  %s, %lld tokens a step: logits %.1e hidden %.1e\n", models[k / 3], (long long)steps[k % 3], relative(&z), relative(&h));
        assert_true(relative(&z) < 1e-4 && relative(&h) < 1e-4);
        exc_tensors_close(g);
        free_result(&r);
        free_prompts(&p);
        exc_model_free(m);
        exc_ctx_free(ctx);
    }
}

/* Two sequences of 200 tokens in pieces of at most 8: layers with a window of 8 or 9 keep rings of 64 rows, which go round three
 * times. Logits are those of one step that holds everything, up to another order of sums. */
static void test_rings(void **state)
{
    enum { N = 200, PIECE = 8 };
    static const char *const models[] = {"gpt_oss", "dots1"};
    for (size_t i = 0; i < EXC_COUNT(models); i++) {
        exc_ctx *ctx = test_ctx(2);
        exc_model *m = open_model(ctx, golden_dir(models[i]), EXC_COMPUTE_F32);
        int64_t V = m->atlas->shape.vocab, capacity[2] = {N, N};
        float *whole = malloc(2 * N * (size_t)V * 4), *piece = malloc(2 * PIECE * (size_t)V * 4);
        int32_t token[2 * N];
        for (int t = 0; t < 2 * N; t++) token[t] = (int32_t)(exc_random_u64(3, 1, (uint64_t)t) % (uint64_t)V);
        exc_session *one, *many;
        assert_int_equal(exc_session_open(ctx, m, &(exc_room){.slots = 2, .cache_tokens = 2 * N, .step_tokens = 2 * N}, &one), EXC_OK);
        assert_int_equal(exc_session_open(ctx, m, &(exc_room){.slots = 2, .cache_tokens = 2 * N, .step_tokens = PIECE}, &many), EXC_OK);
        assert_true(!one->ring && many->ring == 64);
        assert_int_equal(exc_session_reset(one, 2, capacity), EXC_OK);
        assert_int_equal(exc_session_reset(many, 2, capacity), EXC_OK);
        exc_step step = {.tokens = token, .slot = (int32_t[]){0, 1}, .begin = (int64_t[]){0, N, 2 * N}, .sequences = 2, .logits_all = 1, .logits = whole};
        assert_int_equal(exc_session_step(one, &step), EXC_OK);
        for (int64_t at = 0, n = 1; at < N; at += n, n = n % (PIECE / 2) + 1) {
            if (n > N - at) n = N - at;
            int32_t now[PIECE];
            memcpy(now, token + at, (size_t)n * 4), memcpy(now + n, token + N + at, (size_t)n * 4);
            step = (exc_step){.tokens = now, .slot = (int32_t[]){0, 1}, .begin = (int64_t[]){0, n, 2 * n}, .sequences = 2, .logits_all = 1, .logits = piece};
            if (exc_session_step(many, &step)) fail_msg("%s", exc_ctx_error(ctx));
            for (int k = 0; k < 2; k++)
                if (!(test_relative(piece + k * n * V, whole + (k * N + at) * V, (size_t)(n * V)) < 1e-5)) fail_msg("%s: token %d of sequence %d", models[i], (int)at, k);
        }
        exc_session_close(one);
        exc_session_close(many);
        exc_model_free(m);
        exc_ctx_free(ctx);
        free(whole);
        free(piece);
    }
}

static void test_golden_sums(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(families); i++) golden_sums("cpu", families[i].name);
}

/* the golden checkpoint stored as f32 or f16, in one file: f32 is exact, f16 rounds what lies below its normal range */
static void test_golden_variants(void **state)
{
    exc_ctx *ctx = test_ctx(2);
    exc_checkpoint *c;
    assert_int_equal(exc_checkpoint_open(ctx, test_data("models/qwen3_moe"), &c), EXC_OK);
    exc_prompts p = golden_prompts("qwen3_moe");
    for (int half = 0; half < 2; half++) {
        char *dir = test_tmpdir();
        size_t n;
        char *config = test_read(test_data("models/qwen3_moe/config.json"), &n);
        test_write(test_path(dir, "config.json"), config, n);
        free(config);
        tiny t = {.dtype = half ? "F16" : "F32"};
        for (size_t i = 0; i < c->n_tensors; i++) {
            const exc_tensor *x = c->by_name[i];
            const uint16_t *from = exc_checkpoint_data(c, x);
            t.items = realloc(t.items, (i + 1) * sizeof *t.items);
            tiny_tensor *y = &t.items[t.count++];
            *y = (tiny_tensor){.rank = x->rank, .shape = {x->shape[0], x->shape[1]}, .dtype = t.dtype};
            snprintf(y->name, sizeof y->name, "%s", x->name);
            y->count = (int64_t)(x->end - x->begin) / 2;
            y->value = malloc((size_t)y->count * 8);
            for (int64_t j = 0; j < y->count; j++) y->value[j] = tiny_round((double)test_from_bf16(from[j]), t.dtype);
        }
        tiny_file(&t, test_path(dir, "model.safetensors"), 0, t.count);
        tiny_free(&t);
        for (int compute = 0; compute < 2; compute++) {
            exc_model *m = open_model(ctx, dir, (exc_compute)compute);
            result r = run(ctx, m, &p, compute ? 16 : 0, 0, 0);
            verdict v = judge("qwen3_moe", &r);
            show(half ? (compute ? "f16 stored, f32" : "f16 stored, bf16") : (compute ? "f32 stored, f32" : "f32 stored, bf16"), &v);
            if (compute) assert_true(v.logits < 1e-4 && v.hidden < 1e-4 && v.greedy == 96);
            else assert_true(v.logits < 1.4e-1 && v.same_experts >= 0.907);
            free_result(&r);
            exc_model_free(m);
        }
    }
    free_prompts(&p);
    exc_checkpoint_close(c);
    exc_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_f32),
        cmocka_unit_test(test_golden_bf16),
        cmocka_unit_test(test_golden_long),
        cmocka_unit_test(test_rings),
        cmocka_unit_test(test_golden_sums),
        cmocka_unit_test(test_golden_variants),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
