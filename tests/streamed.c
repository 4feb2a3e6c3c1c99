/* streamed.c - the forward pass when not everything fits: steps whose rows go through a layer in chunks. Whatever the chunks, a
 * reproducible context gives the bits of the whole step: logits, states, routing and sums, of every kind of token mixer. */
#include <stdlib.h>
#include <string.h>

#include "collect.h"

static const int kinds[] = {TINY_QWEN, TINY_GLM, TINY_LATENT, TINY_OSS, TINY_NEXT};

static tiny spec(int kind) {
    tiny t = tiny_default();
    t.kind = kind;
    t.layers = 4;
    if (kind == TINY_GLM) t.dim = 20;
    t.shared = 29;
    if (kind == TINY_NEXT) t.interval = 2, t.k_heads = 2, t.v_heads = 6, t.k_dim = 9, t.v_dim = 13, t.taps = 4;
    if (kind == TINY_LATENT) t.heads = t.kv = 5, t.q_rank = 21, t.rank = 33, t.plain = 19, t.turned = 10, t.value = 17;
    if (kind == TINY_GLM || kind == TINY_LATENT) t.experts = 12, t.groups = 4, t.kept = 2, t.scale = 2.5;
    if (kind == TINY_OSS) t.window = 9;
    return t;
}

static exc_ctx *context(int reproducible) {
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    exc_ctx *ctx;
    opt.threads = 2;
    opt.reproducible = reproducible;
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_OK);
    return ctx;
}

/* ------------------------------------------------------------------------------------------------------- chunks */

enum { ROWS = 51, SEQUENCES = 4, STEPS = 2 };

/* everything two steps put out, one array behind the other */
typedef struct taken {
    uint8_t *data;
    size_t bytes;
} taken;

static void *more(taken *k, size_t bytes) {
    void *p = k->data ? k->data + k->bytes : NULL;
    k->bytes += (bytes + 63) / 64 * 64;
    return p;
}

static exc_sums lay_out(taken *k, const exc_shape *p, exc_step t[STEPS]) {
    size_t V = (size_t)p->vocab, H = (size_t)p->hidden, L = (size_t)p->layers + 1, M = (size_t)p->moe_layers, E = (size_t)p->experts,
           routed = M * ROWS * (size_t)p->top_k * 4;
    k->bytes = 0;
    for (int i = 0; i < STEPS; i++) {
        t[i].logits = more(k, ROWS * V * 4);
        t[i].logits_all = 1;
        t[i].hidden = more(k, L * ROWS * H * 4);
        t[i].hidden_last = more(k, SEQUENCES * L * H * 4);
        t[i].router_ids = more(k, routed);
        t[i].router_weights = more(k, routed);
    }
    return (exc_sums){.count = more(k, M * E * 8), .gate_sum = more(k, M * E * 8), .mid_sum = more(k, M * E * (size_t)p->inner * 8),
                      .sqnorm_sum = more(k, M * E * 8), .shared_mid_sum = p->shared_inner ? more(k, M * (size_t)p->shared_inner * 8) : NULL,
                      .tokens = more(k, M * 8), .prompt_count = more(k, SEQUENCES * M * E * 4)};
}

/* sequences of 13, 1, 7 and 30 tokens, and as many again that continue them in another order */
static taken two_steps(exc_ctx *ctx, exc_model *m, int64_t chunk) {
    static const int32_t slot[STEPS][SEQUENCES] = {{0, 1, 2, 3}, {2, 0, 3, 1}};
    static const int64_t begin[SEQUENCES + 1] = {0, 13, 14, 21, ROWS}, capacity[SEQUENCES] = {14, 31, 20, 37};
    int32_t tokens[ROWS], observe[ROWS];
    exc_step t[STEPS];
    taken k = {0};
    exc_session *s;
    exc_room room = {.slots = SEQUENCES, .cache_tokens = 2 * ROWS, .step_tokens = ROWS, .chunk_tokens = chunk};
    if (exc_session_open(ctx, m, &room, &s)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(exc_session_reset(s, SEQUENCES, capacity), EXC_OK);
    lay_out(&k, &m->atlas->shape, t);
    k.data = calloc(k.bytes, 1);
    exc_sums sums = lay_out(&k, &m->atlas->shape, t);
    for (int i = 0; i < STEPS; i++) {
        for (int r = 0; r < ROWS; r++) tokens[r] = (int32_t)(exc_random_u64(3, (uint64_t)i, (uint64_t)r) % (uint64_t)m->atlas->shape.vocab);
        for (int r = 0, q = 0; r < ROWS; r++) q += r == begin[q + 1], observe[r] = r % 3 ? q : -1;
        t[i].tokens = tokens;
        t[i].observe = observe;
        t[i].slot = slot[i];
        t[i].begin = begin;
        t[i].sequences = SEQUENCES;
        t[i].sums = &sums;
        if (exc_session_step(s, &t[i])) fail_msg("%s", exc_ctx_error(ctx));
    }
    exc_session_close(s);
    return k;
}

static void chunks(void **state) {
    (void)state;
    for (size_t i = 0; i < EXC_COUNT(kinds); i++) {
        tiny spec_of = spec(kinds[i]);
        char *dir = test_tmpdir();
        tiny_write(&spec_of, dir);
        exc_ctx *ctx = context(1);
        exc_model *m = open_model(ctx, dir, i % 2 ? EXC_COMPUTE_F32 : EXC_COMPUTE_BF16);
        taken whole = two_steps(ctx, m, 0);
        static const int64_t sizes[] = {1, 2, 7, 13, 14, 30, 50};
        for (size_t c = 0; c < EXC_COUNT(sizes); c++) {
            taken parts = two_steps(ctx, m, sizes[c]);
            assert_int_equal(parts.bytes, whole.bytes);
            for (size_t b = 0; b < whole.bytes; b++)
                if (whole.data[b] != parts.data[b]) fail_msg("kind %d, chunks of %d: byte %zu of %zu differs", kinds[i], (int)sizes[c], b, whole.bytes);
            free(parts.data);
        }
        free(whole.data);
        exc_model_free(m);
        exc_ctx_free(ctx);
        tiny_free(&spec_of);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(chunks)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
