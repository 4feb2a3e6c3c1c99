/* made.c - models whose numbers are made where ops run and not read: with the numbers of its own files a model is bit for bit the
 * one that was read, on the CPU and on the device; with noise both backends have the same one; what cannot be made is refused. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "collect.h"

enum { TOKENS = 7 };

typedef struct source {
    const exc_atlas *from;
    int64_t calls, fails_at;
    bool noise;
} source;

/* as a bench makes weights: every matrix a stream of its own; norms of about 1 would do, but any numbers are a model */
static exc_status noise(exc_ctx *ctx, const exc_weight *w, int64_t first, int64_t rows, void *there)
{
    struct exc_noise_args a = {.dst = there, .n = rows * w->in, .first = first * w->in, .seed = 5, .dtype = w->dtype,
                               .stream = (uint64_t)((w->layer + 1) * 1000 + w->role * 50 + w->expert + 1), .deviation = 1 / sqrtf((float)w->in)};
    return EXC_CALL(ctx, noise, &a);
}

static exc_status give(exc_ctx *ctx, void *user, const exc_weight *w, int64_t first, int64_t rows, void *there)
{
    source *s = user;
    if (++s->calls == s->fails_at) return exc_fail(ctx, EXC_ERR_INPUT, "no more numbers");
    if (s->noise) return noise(ctx, w, first, rows, there);
    const exc_weight *own = exc_atlas_find(s->from, w->role, w->layer, w->expert);
    size_t row = (size_t)w->in * exc_dtype_bits((exc_dtype)w->dtype) / 8;
    return exc_device_put(ctx, there, (const char *)exc_atlas_data(s->from, own) + (size_t)first * row, (size_t)rows * row);
}

static exc_model *open_made(exc_ctx *ctx, const char *dir, source *s)
{
    const exc_made made = {give, s};
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_model *m = NULL;
    o.compute = EXC_COMPUTE_F32;
    if (exc_model_open_made(ctx, dir, &o, &made, &m)) fail_msg("%s", exc_ctx_error(ctx));
    return m;
}

/* logits of a short prompt; frees the model */
static float *logits_of(exc_ctx *ctx, exc_model *m)
{
    static const int32_t tokens[TOKENS] = {3, 1, 4, 1, 5, 9, 2}, slot[1] = {0};
    static const int64_t begin[2] = {0, TOKENS}, capacity[1] = {TOKENS};
    size_t bytes = (size_t)(TOKENS * m->atlas->shape.vocab) * sizeof(float);
    exc_room room = {.slots = 1, .cache_tokens = TOKENS, .step_tokens = TOKENS};
    exc_session *s = NULL;
    void *there;
    float *here = malloc(bytes);
    assert_int_equal(exc_device_alloc(ctx, bytes, 1, "logits", &there), EXC_OK);
    if (exc_session_open(ctx, m, &room, &s)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(exc_session_reset(s, 1, capacity), EXC_OK);
    exc_step t = {.tokens = tokens, .slot = slot, .begin = begin, .sequences = 1, .logits_all = 1, .logits = there};
    if (exc_session_step(s, &t) || exc_session_check(s)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(exc_device_get(ctx, here, there, bytes), EXC_OK);
    exc_session_close(s);
    exc_device_release(ctx, there);
    exc_model_free(m);
    return here;
}

static void its_own_numbers(void **state)
{
    static const char *const backends[] = {"cpu", "cuda"}, *const models[] = {"qwen3_moe", "glm4_moe", "qwen3_next", "deepseek_v3"};
    for (size_t b = 0; b < EXC_COUNT(backends); b++)
        for (size_t i = 0; i < EXC_COUNT(models); i++) {
            exc_ctx *ctx = test_ctx_on(backends[b], 2);
            exc_model *read = open_model(ctx, golden_dir(models[i]), EXC_COMPUTE_F32);
            size_t bytes = (size_t)(TOKENS * read->atlas->shape.vocab) * sizeof(float);
            exc_atlas *from = NULL;
            assert_int_equal(exc_atlas_open(ctx, golden_dir(models[i]), &from), EXC_OK);
            source s = {.from = from};
            float *want = logits_of(ctx, read), *got = logits_of(ctx, open_made(ctx, golden_dir(models[i]), &s));
            assert_true(s.calls > 0);
            assert_memory_equal(got, want, bytes);
            free(want), free(got);
            exc_atlas_close(from);
            exc_ctx_free(ctx);
        }
}

static void noise_on_both(void **state)
{
    float *logits[2];
    size_t n = 0;
    for (int b = 0; b < 2; b++) {
        exc_ctx *ctx = test_ctx_on(b ? "cuda" : "cpu", 2);
        source s = {.noise = true};
        exc_model *m = open_made(ctx, golden_dir("qwen3_moe"), &s);
        n = (size_t)(TOKENS * m->atlas->shape.vocab);
        logits[b] = logits_of(ctx, m);
        exc_ctx_free(ctx);
    }
    assert_true(test_relative(logits[1], logits[0], n) < 1e-4); /* as goldens.h has it of f32 */
    free(logits[0]), free(logits[1]);
}

static void what_is_refused(void **state)
{
    exc_ctx *ctx = test_ctx(2);
    source s = {.noise = true}, fails = {.noise = true, .fails_at = 20};
    exc_made made = {give, &s}, broken = {give, &fails};
    exc_model *m = NULL;
    test_refused(ctx, exc_model_open_made(ctx, golden_dir("qwen3_moe_fp8"), NULL, &made, &m), EXC_ERR_USAGE,
                 "expected a plain weight to make, found a quantised one", NULL);
    assert_null(m);
    test_refused(ctx, exc_model_open_made(ctx, golden_dir("qwen3_moe"), NULL, &broken, &m), EXC_ERR_INPUT, "no more numbers", NULL);
    assert_null(m);
    exc_model_options o = EXC_MODEL_OPTIONS;
    o.plan = (const exc_plan *)(const void *)&s; /* refused before it is looked at */
    test_refused(ctx, exc_model_open_made(ctx, golden_dir("qwen3_moe"), &o, &made, &m), EXC_ERR_USAGE, "expected none for a model that is made", NULL);
    exc_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(its_own_numbers), cmocka_unit_test(noise_on_both), cmocka_unit_test(what_is_refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
