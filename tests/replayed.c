/* replayed.c - decode as graphs on a device: the same steps enqueued launch by launch and replayed, for every kind of token mixer,
 * give the same bits: logits, sums and the host's counts, while sequences end and contexts grow. And over several devices, with
 * the exchanges between them in the graphs: the bits of one; a device that is gone ends a replay that waits for it. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

/* ------------------------------------------------------------------------------------------------- several devices */

enum { RANKS = 3 };

static exc_ctx *context(int device, const char *ranks) {
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    opt.backend = "cuda";
    opt.threads = 1;
    opt.reproducible = 1; /* a row's bits do not depend on the rows beside it */
    opt.device = device;
    opt.ranks = ranks;
    exc_ctx *ctx = NULL;
    if (exc_ctx_create(&opt, &ctx)) fail_msg("%s", exc_ctx_error(ctx));
    return ctx;
}

/* what one device leaves */
static left *alone(int device, const char *dir) {
    exc_ctx *ctx = context(device, NULL);
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    left *l = run_steps(ctx, m, true);
    exc_model_free(m);
    exc_ctx_free(ctx);
    return l;
}

static void as_rank(int rank, const char *dir) {
    left *want = rank ? NULL : alone(rank, dir);
    exc_ctx *ctx = context(rank, "auto");
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    left *got = run_steps(ctx, m, true);
    size_t rows = (size_t)m->atlas->shape.moe_layers;
    assert_in_range(got->replayed, STEPS - 5, STEPS - 2);
    assert_int_equal(exc_ranks_meet(ctx, "logits of a test", exc_hash64(got->logits, sizeof got->logits)), EXC_OK);
    assert_int_equal(exc_ranks_sum(ctx, "sums of a test", EXC_F64, got->sums, (size_t)got->count), EXC_OK);
    assert_int_equal(exc_ranks_sum(ctx, "tokens of a test", EXC_I64, got->tokens, rows), EXC_OK);
    if (want) {
        assert_memory_equal(want->logits, got->logits, sizeof want->logits);
        assert_memory_equal(want->sums, got->sums, (size_t)want->count * sizeof *want->sums);
        assert_memory_equal(want->tokens, got->tokens, rows * sizeof *want->tokens);
        discard(want);
    }
    discard(got);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

/* rank 0 replays; the others leave after a few steps */
static void as_rank_left_alone(int rank, const char *dir) {
    exc_ctx *ctx = context(rank, "auto");
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    exc_session *s;
    exc_room room = {.slots = RANKS, .cache_tokens = RANKS * STEPS, .step_tokens = RANKS};
    static const int64_t capacity[RANKS] = {STEPS, STEPS, STEPS};
    assert_int_equal(exc_session_open(ctx, m, &room, &s), EXC_OK);
    assert_int_equal(exc_session_reset(s, RANKS, capacity), EXC_OK);
    float *logits = there(ctx, RANKS * m->atlas->shape.vocab, sizeof *logits);
    int32_t tokens[RANKS] = {1, 2, 3}, slot[RANKS] = {0, 1, 2};
    int64_t begin[RANKS + 1] = {0, 1, 2, 3};
    exc_step t = {.tokens = tokens, .slot = slot, .begin = begin, .sequences = RANKS, .logits = logits};
    exc_status st = EXC_OK;
    for (int i = 0; i < STEPS && st == EXC_OK; i++) {
        if (rank && i == STEPS / 2) raise(SIGKILL);
        st = exc_session_step(s, &t);
        if (st == EXC_OK) st = exc_session_check(s);
    }
    assert_true(s->replayed > 0);
    assert_int_equal(st, EXC_ERR_DEVICE);
    assert_non_null(strstr(exc_ctx_error(ctx), "rank"));
    exc_device_release(ctx, logits);
    exc_session_close(s);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

static void devices(void) {
    test_emulated();
    setenv("HC_DEVICES", "4", 1);
}

static void over_devices(void **state) {
    static const int kinds[] = {TINY_GLM, TINY_NEXT};
    for (size_t i = 0; i < EXC_COUNT(kinds); i++) {
        tiny spec = tiny_odd(kinds[i]);
        char *dir = test_tmpdir();
        int code[RANKS];
        tiny_write(&spec, dir);
        devices();
        test_in_ranks(RANKS, as_rank, dir, code);
        for (int r = 0; r < RANKS; r++)
            if (code[r]) fail_msg("kind %d: rank %d: %d", kinds[i], r, code[r]);
        tiny_free(&spec);
    }
}

static void left_alone(void **state) {
    tiny spec = tiny_odd(TINY_QWEN);
    char *dir = test_tmpdir();
    int code[RANKS];
    tiny_write(&spec, dir);
    devices();
    test_in_ranks(RANKS, as_rank_left_alone, dir, code);
    assert_int_equal(code[0], 0);
    assert_int_equal(code[1], -SIGKILL);
    tiny_free(&spec);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(over_devices), cmocka_unit_test(left_alone), cmocka_unit_test(same_bits)};
    return cmocka_run_group_tests_name("replayed", tests, NULL, NULL);
}
