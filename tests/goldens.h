/* goldens.h - a checkpoint of each family run on a backend and compared with what another implementation made of it: logits, hidden
 * states, routing, greedy tokens and the expert sums of prefill and decode in f32, and closeness in bf16. */
#ifndef EXC_TEST_GOLDENS_H
#define EXC_TEST_GOLDENS_H

#include "collect.h"

static inline void show(const char *what, const verdict *v)
{
    print_message("  %s: logits %.1e hidden %.1e weights %.1e, same experts %.3f, before any flip %.1e, greedy %lld\n", what, v->logits,
                  v->hidden, v->weights, v->same_experts, v->unflipped, (long long)v->greedy);
}

/* golden models, and how far the reference implementation is from its own golden in bf16 (README of the goldens): logits,
 * hidden, share of (token, layer) with the same experts, and logits with the golden routing forced */
static const struct family {
    const char *name;
    double logits, hidden, same, unflipped;
} families[] = {
    {"qwen3_moe", 1.4e-1, 9.8e-2, 0.907, 2.0e-2},
    {"mixtral", 9.2e-2, 6.4e-2, 0.987, 2.2e-2},
    {"olmoe", 7.7e-2, 4.8e-2, 0.954, 2.1e-2},
    {"glm4_moe", 7.8e-2, 5.3e-2, 0.960, 1.5e-2},
    {"qwen3_next", 1.6e-1, 1.1e-1, 0.899, 3.9e-2},
    {"qwen3_5_moe", 1.1e-1, 7.1e-2, 0.964, 2.5e-2},
    {"qwen2_moe", 3.5e-2, 2.5e-2, 0.959, 2.2e-2},
    {"qwen3_moe_fp8", 5.8e-2, 4.6e-2, 0.997, 1.8e-2},
    {"deepseek_v3_fp8", 9.8e-2, 7.7e-2, 0.980, 3.8e-2},
    {"deepseek_v3", 1.1e-1, 8.2e-2, 0.952, 3.7e-2},
    {"moonlight", 1.1e-1, 8.1e-2, 0.898, 2.3e-2},
    {"deepseek_v2", 2.0e-2, 1.5e-2, 0.976, 1.8e-2},
    {"dots1", 1.1e-1, 9.0e-2, 0.978, 1.4e-2},
    {"gpt_oss_bf16", 1.1e-1, 8.1e-2, 0.933, 2.1e-2},
    {"gpt_oss", 1.1e-1, 8.1e-2, 0.933, 2.1e-2},
};

static inline void golden_f32(const char *backend, const char *name, int64_t new_tokens)
{
    exc_ctx *ctx = test_ctx_on(backend, 2);
    exc_model *m = open_model(ctx, golden_dir(name), EXC_COMPUTE_F32);
    exc_prompts p = golden_prompts(name);
    result r = run(ctx, m, &p, new_tokens, 0, 0);
    verdict v = judge(name, &r);
    show(name, &v);
    /* the golden's own rounding error is 1.6e-6; 1e-4 is far below the effect of any wrong option (README of the golden) */
    assert_true(v.logits < 1e-4 && v.hidden < 1e-4 && v.weights < 1e-4);
    assert_true(v.same_experts == 1.0); /* the least router margin is far above f32 error */
    assert_int_equal(v.greedy, 6 * new_tokens);
    free_result(&r);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

static inline void golden_bf16(const char *backend, const struct family *f)
{
    exc_ctx *ctx = test_ctx_on(backend, 2);
    exc_model *m = open_model(ctx, golden_dir(f->name), EXC_COMPUTE_BF16);
    exc_prompts p = golden_prompts(f->name);
    result r = run(ctx, m, &p, 0, 0, 0);
    verdict v = judge(f->name, &r);
    show(f->name, &v);
    /* at least as close as the bf16 forward of the reference implementation; twice its error with the golden routing is a
     * fair limit for what was routed alike */
    if (!(v.logits < f->logits && v.hidden < f->hidden && v.same_experts >= f->same && v.unflipped < 2 * f->unflipped))
        fail_msg("%s: farther than the reference in bf16", f->name);
    free_result(&r);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

static inline double worst(const double *a, const void *b, size_t n)
{
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double g;
        memcpy(&g, (const char *)b + i * 8, 8);
        diff += (a[i] - g) * (a[i] - g);
        norm += g * g;
    }
    return sqrt(diff / norm);
}

static inline void *zeros_there(exc_ctx *ctx, size_t count, size_t size)
{
    void *p;
    assert_int_equal(exc_device_alloc(ctx, count, size, "sums", &p), EXC_OK);
    assert_int_equal(exc_device_zero(ctx, p, count * size), EXC_OK);
    return p;
}

/* a copy of an array where ops run, which is released */
static inline void *fetched(exc_ctx *ctx, void *there, size_t bytes)
{
    void *p = malloc(bytes);
    assert_int_equal(exc_device_get(ctx, p, there, bytes), EXC_OK);
    exc_device_release(ctx, there);
    return p;
}

static inline void golden_sums(const char *backend, const char *name_of)
{
    exc_ctx *ctx = test_ctx_on(backend, 2);
    exc_model *m = open_model(ctx, golden_dir(name_of), EXC_COMPUTE_F32);
    exc_prompts p = golden_prompts(name_of);
    const exc_shape *s = &m->atlas->shape;
    size_t ME = (size_t)(s->moe_layers * s->experts), I = (size_t)s->inner, H = (size_t)s->hidden;
    exc_sums sums[2];
    for (int k = 0; k < 2; k++)
        sums[k] = (exc_sums){.count = zeros_there(ctx, ME, 8), .gate_sum = zeros_there(ctx, ME, 8), .mid_sum = zeros_there(ctx, ME * I, 8),
                             .sqnorm_sum = zeros_there(ctx, ME, 8), .tokens = calloc((size_t)s->moe_layers, 8),
                             .prompt_count = zeros_there(ctx, 6 * ME, 4)};
    float *last = calloc(6 * (size_t)(s->layers + 1) * H, 4), *first = calloc(6 * (size_t)s->vocab, 4);
    exc_decode d = {.max_new = 16, .ignore_eos = true, .observe = true, .prefill_sums = &sums[0], .decode_sums = &sums[1],
                    .hidden_last = last, .first_logits = first, .batch = 4, .batch_tokens = 40};
    exc_reply *replies = NULL;
    if (exc_decode_run(ctx, m, &p, &d, &replies)) fail_msg("%s", exc_ctx_error(ctx));
    for (int k = 0; k < 2; k++) {
        sums[k].count = fetched(ctx, sums[k].count, ME * 8);
        sums[k].gate_sum = fetched(ctx, sums[k].gate_sum, ME * 8);
        sums[k].mid_sum = fetched(ctx, sums[k].mid_sum, ME * I * 8);
        sums[k].sqnorm_sum = fetched(ctx, sums[k].sqnorm_sum, ME * 8);
        sums[k].prompt_count = fetched(ctx, sums[k].prompt_count, 6 * ME * 4);
    }
    exc_tensors *g, *states;
    char file[256];
    snprintf(file, sizeof file, "models/%s/golden/expert_stats.safetensors", golden_of(name_of));
    assert_int_equal(exc_tensors_open(ctx, test_data(file), &g), EXC_OK);
    snprintf(file, sizeof file, "models/%s/golden/golden.safetensors", golden_of(name_of));
    assert_int_equal(exc_tensors_open(ctx, test_data(file), &states), EXC_OK);
    double *out = calloc(ME * H, 8);
    for (int k = 0; k < 2; k++) {
        char name[64];
#define OF(what) (snprintf(name, sizeof name, "%s.%s", k ? "decode" : "prefill", what), golden(g, -1, name))
        for (int64_t l = 0; l < s->moe_layers; l++) {
            assert_int_equal(sums[k].tokens[l], k ? 90 : 124);
            int64_t layer = 0;
            while (s->moe_row[layer] != l) layer++;
            for (int64_t e = 0; e < s->experts; e++) {
                size_t at = (size_t)(l * s->experts + e);
                assert_int_equal(exc_model_down(ctx, m, EXC_ROLE_EXPERT_DOWN, layer, e, sums[k].mid_sum + at * I, &sums[k].count[at], 1, out + at * H), EXC_OK);
            }
        }
        assert_memory_equal(sums[k].count, OF("count"), ME * 8);
        /* terms carry the f32 error of the states (1e-6), sums average it */
        assert_true(worst(sums[k].gate_sum, OF("gate_sum"), ME) < 2e-6);
        assert_true(worst(sums[k].mid_sum, OF("mid_sum"), ME * I) < 1e-5);
        assert_true(worst(sums[k].sqnorm_sum, OF("sqnorm_sum"), ME) < 1e-5);
        assert_true(worst(out, OF("out_sum"), ME * H) < 1e-5);
    }
    for (size_t i = 0; i < ME; i++) { /* per-prompt counts add up to the counts of prefill; decode kept its own */
        int64_t total = 0;
        for (size_t q = 0; q < 6; q++) total += sums[0].prompt_count[q * ME + i];
        assert_int_equal(total, sums[0].count[i]);
    }
    for (int64_t i = 0; i < 6; i++) {
        int64_t n = length_of(&p, i);
        distance h = {0}, z = {0};
        for (int64_t l = 0; l <= s->layers; l++)
            add_distance(&h, last + (i * (s->layers + 1) + l) * s->hidden,
                         (const char *)golden(states, i, "hidden") + ((l * n + n - 1) * s->hidden) * 4, H);
        add_distance(&z, first + i * s->vocab, (const char *)golden(states, i, "logits") + (n - 1) * s->vocab * 4, (size_t)s->vocab);
        assert_true(relative(&h) < 1e-4 && relative(&z) < 1e-4);
    }
    exc_tensors_close(g);
    exc_tensors_close(states);
    exc_replies_free(replies, 6);
    for (int k = 0; k < 2; k++) {
        free(sums[k].count);
        free(sums[k].gate_sum);
        free(sums[k].mid_sum);
        free(sums[k].sqnorm_sum);
        free(sums[k].tokens);
        free(sums[k].prompt_count);
    }
    free(last);
    free(first);
    free(out);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

#endif
