/* replayed.c - decode as graphs on a device: the same steps enqueued launch by launch and replayed, for every kind of token mixer,
 * give the same bits: logits, sums and the host's counts, while sequences end and contexts grow. */
#include <stdlib.h>
#include <string.h>

#include "collect.h"
#include "session.h"

enum { SEQUENCES = 3, PROMPT = 4, STEPS = 12, LEAVES = 7, VOCAB_MOST = 512 };

/* what a run of steps leaves */
typedef struct left {
    float logits[STEPS][SEQUENCES * VOCAB_MOST];
    double *sums;
    int64_t count, *tokens;
    uint64_t replayed;
} left;

typedef struct stage {
    exc_ctx *ctx;
    exc_session *s;
    const exc_shape *p;
    exc_sums sums;
    float *logits[EXC_GRAPHS + 1]; /* as many as make every step new, when taken in turn */
} stage;

static void *there(exc_ctx *ctx, int64_t count, size_t size) {
    void *p;
    if (exc_device_alloc(ctx, (size_t)count, size, "arrays of a test", &p)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(exc_device_zero(ctx, p, (size_t)count * size), EXC_OK);
    return p;
}

static void one_step(stage *k, int64_t rows_each, int64_t sequences, int turn, float *logits) {
    int32_t tokens[SEQUENCES * PROMPT], slot[SEQUENCES], observe[SEQUENCES * PROMPT];
    int64_t begin[SEQUENCES + 1] = {0};
    for (int64_t i = 0; i < sequences; i++) {
        slot[i] = (int32_t)(SEQUENCES - 1 - i);
        begin[i + 1] = begin[i] + rows_each;
    }
    for (int64_t r = 0; r < begin[sequences]; r++) {
        tokens[r] = (int32_t)(exc_random_u64(5, (uint64_t)turn, (uint64_t)r) % (uint64_t)k->p->vocab);
        observe[r] = (turn + r) % 3 ? (int32_t)(r % SEQUENCES) : -1;
    }
    exc_step t = {.tokens = tokens, .slot = slot, .begin = begin, .sequences = sequences, .logits = logits, .sums = &k->sums, .observe = observe};
    if (exc_session_step(k->s, &t) || exc_session_check(k->s)) fail_msg("%s", exc_ctx_error(k->ctx));
}

static left *run_steps(exc_ctx *ctx, exc_model *m, bool replay) {
    static const int64_t capacity[SEQUENCES] = {PROMPT + STEPS, PROMPT + STEPS, PROMPT + STEPS};
    stage k = {.ctx = ctx, .p = &m->atlas->shape};
    left *l = calloc(1, sizeof *l);
    const exc_shape *p = k.p;
    exc_room room = {.slots = SEQUENCES, .cache_tokens = SEQUENCES * (PROMPT + STEPS), .step_tokens = SEQUENCES * PROMPT};
    if (exc_session_open(ctx, m, &room, &k.s)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(exc_session_reset(k.s, SEQUENCES, capacity), EXC_OK);
    for (size_t i = 0; i < EXC_COUNT(k.logits); i++) k.logits[i] = there(ctx, SEQUENCES * p->vocab, sizeof(float));
    l->count = p->moe_layers * p->experts * p->inner;
    l->tokens = calloc((size_t)p->moe_layers, sizeof *l->tokens);
    l->sums = calloc((size_t)l->count, sizeof *l->sums);
    k.sums = (exc_sums){.count = there(ctx, p->moe_layers * p->experts, 8), .mid_sum = there(ctx, l->count, 8), .tokens = l->tokens};
    one_step(&k, PROMPT, SEQUENCES, 0, k.logits[0]);
    for (int i = 0; i < STEPS; i++) {
        int64_t live = i < LEAVES ? SEQUENCES : SEQUENCES - 1;
        float *logits = k.logits[replay ? 0 : i % (EXC_GRAPHS + 1)];
        one_step(&k, 1, live, i + 1, logits);
        assert_int_equal(exc_device_get(ctx, l->logits[i], logits, (size_t)(live * p->vocab) * sizeof *logits), EXC_OK);
    }
    assert_int_equal(exc_device_get(ctx, l->sums, k.sums.mid_sum, (size_t)l->count * sizeof *l->sums), EXC_OK);
    l->replayed = k.s->replayed;
    for (size_t i = 0; i < EXC_COUNT(k.logits); i++) exc_device_release(ctx, k.logits[i]);
    exc_device_release(ctx, k.sums.count);
    exc_device_release(ctx, k.sums.mid_sum);
    exc_session_close(k.s);
    return l;
}

static void discard(left *l) {
    free(l->sums);
    free(l->tokens);
    free(l);
}

static void same_bits(void **state) {
    static const int kinds[] = {TINY_QWEN, TINY_GLM, TINY_LATENT, TINY_OSS, TINY_NEXT};
    for (size_t i = 0; i < EXC_COUNT(kinds); i++) {
        tiny spec = tiny_odd(kinds[i]);
        char *dir = test_tmpdir();
        tiny_write(&spec, dir);
        exc_ctx *ctx = test_ctx_on("cuda", 1);
        exc_model *m = open_model(ctx, dir, i % 2 ? EXC_COMPUTE_F32 : EXC_COMPUTE_BF16);
        assert_true(m->atlas->shape.vocab <= VOCAB_MOST);
        left *eager = run_steps(ctx, m, false), *replayed = run_steps(ctx, m, true);
        assert_int_equal(eager->replayed, 0);
        assert_in_range(replayed->replayed, STEPS - 4, STEPS - 2); /* two marks are seen first; scratch may grow once */
        assert_memory_equal(eager->logits, replayed->logits, sizeof eager->logits);
        assert_memory_equal(eager->sums, replayed->sums, (size_t)eager->count * sizeof *eager->sums);
        assert_memory_equal(eager->tokens, replayed->tokens, (size_t)m->atlas->shape.moe_layers * sizeof *eager->tokens);
        assert_true(eager->tokens[0] > 0);
        discard(eager);
        discard(replayed);
        exc_model_free(m);
        exc_ctx_free(ctx);
        tiny_free(&spec);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(same_bits)};
    return cmocka_run_group_tests_name("replayed", tests, NULL, NULL);
}
