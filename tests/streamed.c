/* streamed.c - models larger than memory: steps whose rows go through a layer in chunks, layers that take turns in one place or
 * two, and the budget that decides; and the first pass over a model that fits, which reads weights in passing. Whatever fits, a
 * reproducible context gives the bits of a resident model: logits, states, routing, replies and sums, of every kind of token
 * mixer. What does not fit is refused in one line. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "collect.h"
#include "result.h"

static const int kinds[] = {TINY_QWEN, TINY_GLM, TINY_LATENT, TINY_OSS, TINY_NEXT};

static exc_ctx *context_of(int reproducible, const char *ranks) {
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    exc_ctx *ctx;
    opt.backend = "cpu";
    opt.threads = 2;
    opt.reproducible = reproducible;
    opt.ranks = ranks;
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_OK);
    return ctx;
}

static exc_ctx *context(int reproducible) { return context_of(reproducible, NULL); }

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

/* sequences of 13, 1, 7 and 30 tokens below vocab, and as many again that continue them in another order */
static taken steps_of(exc_ctx *ctx, exc_model *m, int64_t chunk, uint64_t vocab) {
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
        for (int r = 0; r < ROWS; r++) tokens[r] = (int32_t)(exc_random_u64(3, (uint64_t)i, (uint64_t)r) % vocab);
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

static taken two_steps(exc_ctx *ctx, exc_model *m, int64_t chunk) { return steps_of(ctx, m, chunk, (uint64_t)m->atlas->shape.vocab); }

static void chunks(void **state) {
    (void)state;
    for (size_t i = 0; i < EXC_COUNT(kinds); i++) {
        tiny spec_of = tiny_odd(kinds[i]);
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

/* Two ranks in chunks, when every token of both chooses the expert of one, and experts are far wider than the model. */
static taken alone;

static void crowd_at(int rank, const char *dir) {
    (void)rank;
    static const int64_t sizes[] = {1, 3, 7, 30};
    exc_ctx *ctx = context_of(1, "auto");
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    for (size_t c = 0; c < EXC_COUNT(sizes); c++) {
        exc_step t[STEPS];
        taken parts = steps_of(ctx, m, sizes[c], 1), upto = alone;
        size_t shared = (size_t)((uint8_t *)lay_out(&upto, &m->atlas->shape, t).count - alone.data); /* a rank's sums are its own */
        assert_memory_equal(parts.data, alone.data, shared);
        free(parts.data);
    }
    exc_model_free(m);
    exc_ctx_free(ctx);
}

static void crowded(void **state) {
    (void)state;
    tiny spec_of = tiny_default();
    char *dir = test_tmpdir();
    int code[2];
    spec_of.experts = 2, spec_of.top_k = 1, spec_of.inner = 16 * spec_of.hidden;
    tiny_write(&spec_of, dir);
    exc_ctx *ctx = context(1);
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    alone = steps_of(ctx, m, 0, 1);
    exc_model_free(m);
    exc_ctx_free(ctx);
    test_in_ranks(2, crowd_at, dir, code);
    assert_int_equal(code[0], 0);
    assert_int_equal(code[1], 0);
    free(alone.data);
    tiny_free(&spec_of);
}

/* ------------------------------------------------------------------------------------------------------- budgets */

static const int64_t lengths[] = {9, 1, 17, 30, 4, 12, 22, 2, 40};
#define PROMPTS ((int64_t)EXC_COUNT(lengths))

/* stats of a capture as their file has them, and forward with everything; what was refused is in `st` */
typedef struct outcome {
    exc_status st;
    char *stats, *forward;
    size_t stats_bytes, forward_bytes;
    int64_t places, passes;
} outcome;

static void free_outcome(outcome *o) {
    free(o->stats);
    free(o->forward);
}

static exc_status save_all(exc_ctx *ctx, exc_model *m, const char *out, const char *stats) {
    exc_prompts p = make_prompts(PROMPTS, lengths, m->atlas->shape.vocab, 5), q = make_prompts(PROMPTS - 1, lengths + 1, m->atlas->shape.vocab, 6);
    memset(p.hash, '0', sizeof p.hash - 1);
    memset(q.hash, '1', sizeof q.hash - 1);
    exc_forward_options fo = EXC_FORWARD_OPTIONS;
    exc_capture_options co = EXC_CAPTURE_OPTIONS;
    exc_stats *s = NULL;
    fo.emit_logits = fo.emit_hidden = fo.emit_routing = 1;
    fo.generate = 4;
    co.decode = 3;
    exc_status st = exc_forward(ctx, m, &p, &fo, out, NULL);
    if (st == EXC_OK) st = exc_capture(ctx, m, &p, &q, &co, &s, NULL);
    if (st == EXC_OK) st = exc_stats_save(ctx, s, stats, 0);
    exc_stats_free(s);
    free_prompts(&p);
    free_prompts(&q);
    return st;
}

/* `left` bytes for a model beside what the context has; 0: as much as there is */
static outcome run_within(const char *dir, uint64_t left, int reproducible) {
    outcome o = {0};
    char *out = test_tmpdir();
    exc_ctx *ctx = context(reproducible);
    exc_model *m = NULL;
    if (left) ctx->opt.memory = ctx->memory = ctx->taken + left;
    o.st = exc_model_open(ctx, dir, NULL, &m);
    if (o.st == EXC_OK) o.st = save_all(ctx, m, test_path(out, "f"), test_path(out, "s"));
    if (o.st == EXC_OK) {
        o.places = m->loaded->places;
        o.passes = (int64_t)m->loaded->fills / m->loaded->layers;
        o.stats = test_read(test_path(out, "s"), &o.stats_bytes);
        o.forward = test_read(test_path(out, "f"), &o.forward_bytes);
        assert_true(ctx->most_taken <= ctx->memory);
    } else if (o.st != EXC_OK) {
        test_refused(ctx, o.st, EXC_ERR_INPUT, dir, "memory: expected at least", "largest layer", "found a budget of", "would hold all layers", NULL);
    }
    exc_model_free(m);
    assert_null(ctx->models);
    exc_ctx_free(ctx);
    return o;
}

/* from budgets that hold nothing to those that hold all: each refuses or gives the same bytes */
static void budgets(void **state) {
    (void)state;
    for (size_t i = 0; i < EXC_COUNT(kinds); i++) {
        tiny t = tiny_odd(kinds[i]);
        char *dir = test_tmpdir();
        int64_t seen[3] = {0}, refused = 0, resident = 0;
        t.layers = 6;
        tiny_write(&t, dir);
        outcome all = run_within(dir, 0, 1);
        assert_int_equal(all.st, EXC_OK);
        assert_int_equal(all.places, t.layers);
        for (uint64_t left = 60000; !resident; left += left / 7) {
            outcome o = run_within(dir, left, 1);
            if (o.st == EXC_OK) {
                assert_true(all.stats_bytes == o.stats_bytes && all.forward_bytes == o.forward_bytes);
                assert_memory_equal(all.stats, o.stats, o.stats_bytes);
                assert_memory_equal(all.forward, o.forward, o.forward_bytes);
                if (o.places < t.layers) seen[o.places]++;
                else resident++;
                if (o.places < t.layers) assert_true(o.passes >= 1 + 3 + 2 * 2); /* forward feeds 3 back, a capture at least one */
            } else {
                assert_true(!seen[1] && !seen[2]); /* more memory never fits less */
                refused++;
            }
            free_outcome(&o);
        }
        assert_true(refused && seen[1] && seen[2] && resident);
        free_outcome(&all);
        tiny_free(&t);
    }
}

/* with room for the same chunks not even the batching differs */
static void same_chunks(void **state) {
    (void)state;
    tiny t = tiny_odd(TINY_QWEN);
    char *dir = test_tmpdir();
    tiny_write(&t, dir);
    exc_ctx *ctx = context(0);
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    exc_prompts p = make_prompts(PROMPTS, lengths, t.vocab, 5);
    result a = run(ctx, m, &p, 0, 0, 50);
    exc_status st;
    while (exc_window_narrow(ctx, m, &st)) {
        assert_int_equal(st, EXC_OK);
        result b = run(ctx, m, &p, 0, 0, 50);
        for (int64_t i = 0; i < PROMPTS; i++) {
            size_t n = (size_t)lengths[i];
            assert_memory_equal(a.logits[i], b.logits[i], n * (size_t)t.vocab * 4);
            assert_memory_equal(a.ids[i], b.ids[i], n * (size_t)(m->atlas->shape.moe_layers * t.top_k) * 4);
        }
        free_result(&b);
    }
    assert_int_equal(m->loaded->places, 1);
    free_result(&a);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* a second model makes the first one give places up; both together give what they give in plenty */
static void two_models(void **state) {
    (void)state;
    tiny t[2] = {tiny_odd(TINY_GLM), tiny_odd(TINY_GLM)};
    char *dir[2] = {test_tmpdir(), test_tmpdir()};
    exc_unit u[3][PROMPTS];
    t[1].seed = 2;
    for (int i = 0; i < 2; i++) {
        t[i].layers = 12;
        tiny_write(&t[i], dir[i]);
    }
    exc_prompts p = make_prompts(PROMPTS, lengths, t[0].vocab, 5);
    for (int k = 0; k < 3; k++) {
        exc_ctx *ctx = context(1);
        exc_model *a = NULL, *b = NULL;
        exc_room short_one = {.slots = 1, .cache_tokens = 256, .step_tokens = 4096};
        if (k) {
            a = open_model(ctx, dir[0], EXC_COMPUTE_F32); /* to learn sizes */
            uint64_t all = a->weight_bytes, few = exc_window_bytes(a, 2), room = exc_session_measure(a, &short_one);
            exc_model_free(a);
            ctx->opt.memory = ctx->memory = ctx->taken + (k == 1 ? all + room + few / 2 : 2 * few + (4 << 20));
        }
        a = open_model(ctx, dir[0], EXC_COMPUTE_F32);
        b = open_model(ctx, dir[1], EXC_COMPUTE_F32);
        if (exc_tandem(ctx, a, b, &p, false, 0, "t", u[k])) fail_msg("%s", exc_ctx_error(ctx));
        assert_true(!k || exc_model_streamed(a) || exc_model_streamed(b));
        assert_memory_equal(u[0], u[k], sizeof u[0]);
        exc_model_free(a);
        exc_model_free(b);
        exc_ctx_free(ctx);
    }
    free_prompts(&p);
    for (int i = 0; i < 2; i++) tiny_free(&t[i]);
}

/* two models that are resident both: what is left to their sessions counts too */
static void two_residents(void **state) {
    (void)state;
    enum { MANY = 60 };
    tiny t = tiny_odd(TINY_QWEN);
    char *dir = test_tmpdir();
    int64_t long_ones[MANY];
    static exc_unit u[2][MANY];
    for (int i = 0; i < MANY; i++) long_ones[i] = 70 + i % 11;
    tiny_write(&t, dir);
    exc_prompts p = make_prompts(MANY, long_ones, t.vocab, 5);
    for (int k = 0; k < 2; k++) {
        exc_ctx *ctx = context(1);
        exc_model *a = open_model(ctx, dir, EXC_COMPUTE_BF16), *b = open_model(ctx, dir, EXC_COMPUTE_F32);
        exc_room room = {.slots = MANY, .cache_tokens = 4096, .step_tokens = 4096};
        if (k) ctx->memory = ctx->taken + exc_session_measure(b, &room);
        if (exc_tandem(ctx, a, b, &p, false, 4096, "t", u[k])) fail_msg("%s", exc_ctx_error(ctx));
        assert_true(ctx->most_taken <= ctx->memory);
        assert_memory_equal(u[0], u[k], sizeof u[0]);
        exc_model_free(a);
        exc_model_free(b);
        exc_ctx_free(ctx);
    }
    free_prompts(&p);
    tiny_free(&t);
}

/* arrays of the host do not count against a device's memory: steps are as large as what lies there lets them be */
static void on_a_device(void **state) {
    (void)state;
    static const int64_t length[] = {200};
    tiny t = tiny_odd(TINY_QWEN);
    char *dir = test_tmpdir(), *out = test_tmpdir();
    t.layers = 12;
    tiny_write(&t, dir);
    exc_ctx *ctx = test_ctx_on("cuda", 1);
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    exc_prompts p = make_prompts(1, length, t.vocab, 5);
    exc_forward_options o = EXC_FORWARD_OPTIONS;
    exc_room room = {.slots = 1, .cache_tokens = length[0], .step_tokens = length[0]};
    uint64_t hidden = (uint64_t)(length[0] * (t.layers + 1) * t.hidden) * 4; /* a tap there, and the array that it is fetched into */
    o.emit_hidden = 1;
    ctx->memory = ctx->taken + exc_session_measure(m, &room) + hidden + hidden / 2;
    if (exc_forward(ctx, m, &p, &o, test_path(out, "f"), NULL)) fail_msg("%s", exc_ctx_error(ctx));
    assert_true(!exc_model_streamed(m) && exc_session_fits(m->spare, &room));
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* --------------------------------------------------------------------------------------------------- the first pass */

/* what every writer of the layers that have experts puts out, the last layer first, experts in an order of their own */
static taken downs(exc_ctx *ctx, exc_model *m) {
    const exc_shape *p = &m->atlas->shape;
    taken k = {0};
    double x[512];
    size_t bytes = (size_t)p->hidden * sizeof *x;
    int64_t terms = 2;
    assert_true(p->inner <= 512 && p->shared_inner <= 512);
    for (int i = 0; i < 512; i++) x[i] = (double)test_normal(9, (uint64_t)i);
    k.data = calloc((size_t)(p->layers * (p->experts + 1)), bytes + 64);
    for (int64_t layer = p->layers - 1; layer >= 0; layer--) {
        if (!p->is_moe[layer]) continue;
        for (int64_t e = 0; e < p->experts; e++)
            assert_int_equal(exc_model_down(ctx, m, EXC_ROLE_EXPERT_DOWN, layer, (e * 3 + 1) % p->experts, x, &terms, 1, more(&k, bytes)), EXC_OK);
        if (p->shared_inner)
            assert_int_equal(exc_model_down(ctx, m, EXC_ROLE_SHARED_DOWN, layer, -1, x, &terms, 1, more(&k, bytes)), EXC_OK);
    }
    return k;
}

static void same(const taken *a, taken b, const char *what, int kind) {
    assert_int_equal(a->bytes, b.bytes);
    if (memcmp(a->data, b.data, b.bytes)) fail_msg("kind %d: %s differs", kind, what);
    free(b.data);
}

static int64_t kept(const exc_model *m) {
    int64_t n = 0;
    for (int64_t i = 0; i < m->loaded->layers; i++) n += m->loaded->place[i].layer == i;
    return n;
}

/* before the first pass, behind it and when all layers are in their places: the same bits, and only then all of them are */
static void passes(void **state) {
    (void)state;
    for (size_t i = 0; i < EXC_COUNT(kinds); i++) {
        tiny t = tiny_odd(kinds[i]);
        char *dir = test_tmpdir();
        tiny_write(&t, dir);
        exc_ctx *ctx = context(1);
        exc_prompts p = make_prompts(3, lengths, t.vocab, 5);
        exc_decode once = {0}, twice = {.max_new = 2};
        exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
        taken before = downs(ctx, m);
        assert_int_equal(kept(m), 0);
        taken first = two_steps(ctx, m, 0); /* the first reads in passing, the second keeps */
        assert_int_equal(kept(m), t.layers);
        assert_true(!m->loaded->loader && !m->loaded->head_due);
        assert_int_equal(m->loaded->fills, 2 * t.layers);
        same(&before, downs(ctx, m), "a writer behind two passes", kinds[i]);
        same(&first, two_steps(ctx, m, 0), "a later pass", kinds[i]);
        exc_model_free(m);
        m = open_model(ctx, dir, EXC_COMPUTE_BF16);
        assert_int_equal(exc_decode_run(ctx, m, &p, &once, NULL), EXC_OK);
        assert_int_equal(kept(m), 0);
        assert_int_equal(m->loaded->fills, t.layers);
        same(&before, downs(ctx, m), "a writer behind one pass", kinds[i]);
        assert_int_equal(kept(m), 0);
        assert_int_equal(exc_decode_run(ctx, m, &p, &twice, NULL), EXC_OK);
        assert_int_equal(kept(m), t.layers);
        same(&first, two_steps(ctx, m, 0), "a pass behind others", kinds[i]);
        exc_model_free(m);
        m = open_model(ctx, dir, EXC_COMPUTE_BF16);
        same(&first, two_steps(ctx, m, 7), "a first pass of many chunks", kinds[i]);
        assert_int_equal(m->loaded->fills, t.layers); /* it keeps what it would have to read again */
        free(before.data);
        free(first.data);
        free_prompts(&p);
        exc_model_free(m);
        exc_ctx_free(ctx);
        tiny_free(&t);
    }
}

static int stop_at_layer(void *user, const exc_event *e) {
    int *left = user;
    return e->kind == EXC_EVENT_PROGRESS && !strcmp(e->text, "layers") && !--*left;
}

/* passes that are broken off anywhere in the first two leave a model that does as any other */
static void broken_off(void **state) {
    (void)state;
    tiny t = tiny_odd(TINY_NEXT);
    char *dir = test_tmpdir();
    tiny_write(&t, dir);
    exc_ctx *ctx = context(1);
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_BF16);
    taken whole = two_steps(ctx, m, 0), writers = downs(ctx, m);
    exc_prompts p = make_prompts(PROMPTS, lengths, t.vocab, 5);
    exc_decode d = {.max_new = 3};
    exc_model_free(m);
    for (int at = 1; at <= 2 * t.layers; at++)
        for (int again = 0; again < 3; again++) {
            int left = at;
            m = open_model(ctx, dir, EXC_COMPUTE_BF16);
            ctx->opt.on_event = stop_at_layer;
            ctx->opt.user = &left;
            assert_int_equal(exc_decode_run(ctx, m, &p, &d, NULL), EXC_CANCELLED);
            left = again == 1 ? 2 : 0;
            if (left) exc_decode_run(ctx, m, &p, &d, NULL);
            ctx->opt.on_event = NULL;
            exc_clear(ctx);
            if (again == 2) same(&writers, downs(ctx, m), "a writer", at);
            same(&whole, two_steps(ctx, m, 0), "a pass behind one that was broken off", at);
            same(&writers, downs(ctx, m), "a writer behind it", at);
            exc_model_free(m);
        }
    free(whole.data);
    free(writers.data);
    free_prompts(&p);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* -------------------------------------------------------------------------------------------------------- faults */

static void poison(void *user, tiny_tensor *x) { x->poison |= !strcmp(x->name, (const char *)user); }

static exc_model *open_streamed(exc_ctx *ctx, const char *dir, int64_t places) {
    exc_model *m = NULL;
    exc_status st = exc_model_open(ctx, dir, NULL, &m);
    while (st == EXC_OK && m->loaded->places > places) assert_true(exc_window_narrow(ctx, m, &st));
    if (st != EXC_OK) {
        exc_model_free(m);
        return NULL;
    }
    return m;
}

/* what a layer's weights are refused for shows when a pass comes to it, as often as it is tried */
static void bad_layers(void **state) {
    (void)state;
    static const int64_t places[] = {1, 2, INT64_MAX};
    for (size_t k = 0; k < EXC_COUNT(places); k++) {
        exc_ctx *ctx = context(0);
        tiny t = tiny_odd(TINY_QWEN);
        char *dir = test_tmpdir();
        t.spoil = poison;
        t.user = (void *)(uintptr_t)"model.layers.2.mlp.experts.1.up_proj.weight";
        tiny_write(&t, dir);
        exc_model *m = open_streamed(ctx, dir, places[k]);
        exc_prompts p = make_prompts(PROMPTS, lengths, t.vocab, 5);
        exc_decode d = {.max_new = 2};
        for (int i = 0; i < 3; i++) {
            exc_clear(ctx);
            test_refused(ctx, exc_decode_run(ctx, m, &p, &d, NULL), EXC_ERR_NUMERIC, "layers.2.mlp.experts.1.up_proj", "finite", "element 0", NULL);
        }
        free_prompts(&p);
        exc_model_free(m);
        exc_ctx_free(ctx);
        tiny_free(&t);
    }
}

static void fail_within(int64_t places) {
    tiny t = tiny_odd(TINY_LATENT);
    char *dir = test_tmpdir();
    tiny_write(&t, dir);
    int good = 0; /* in a row: a layer whose filling failed ahead of its time is filled again */
    for (uint64_t n = 1; good < 10; n++) {
        exc_ctx *ctx = context(0);
        exc_prompts p = make_prompts(3, lengths, t.vocab, 5);
        exc_decode d = {.max_new = 2};
        exc_reply *r = NULL;
        exc_alloc_fail_at(n);
        exc_model *m = open_streamed(ctx, dir, places);
        exc_status st = m ? exc_decode_run(ctx, m, &p, &d, &r) : EXC_ERR_MEMORY;
        good = st == EXC_OK ? good + 1 : 0;
        if (st != EXC_OK && !strstr(exc_ctx_error(ctx), "memory") && !strstr(exc_ctx_error(ctx), "could not be started"))
            fail_msg("allocation %d: %s", (int)n, exc_ctx_error(ctx));
        exc_alloc_fail_at(0);
        exc_replies_free(r, 3);
        free_prompts(&p);
        exc_model_free(m);
        exc_ctx_free(ctx);
    }
    tiny_free(&t);
}

static void allocations_fail(void **state) {
    (void)state;
    fail_within(2);
    fail_within(INT64_MAX);
}

static void cancelled(void **state) {
    (void)state;
    tiny t = tiny_odd(TINY_NEXT);
    char *dir = test_tmpdir();
    tiny_write(&t, dir);
    for (int at = 1; at < 8; at += 3) {
        int left = at;
        exc_ctx *ctx = context(0);
        exc_model *m = open_streamed(ctx, dir, 2);
        exc_prompts p = make_prompts(PROMPTS, lengths, t.vocab, 5);
        exc_decode d = {.max_new = 3};
        ctx->opt.on_event = stop_at_layer;
        ctx->opt.user = &left;
        assert_int_equal(exc_decode_run(ctx, m, &p, &d, NULL), EXC_CANCELLED);
        free_prompts(&p);
        exc_model_free(m);
        exc_ctx_free(ctx);
    }
    tiny_free(&t);
}

/* ---------------------------------------------------------------------------------------------------------- peak */

/* a checkpoint of zeros, a hole in the file system: norms too, so that nothing comes out but what was put in */
static void write_zeros(const char *dir, int layers, int hidden, int experts, int inner, int vocab) {
    exc_buf h = {0};
    char text[1024];
    int64_t at = 0;
    size_t n = (size_t)snprintf(text, sizeof text,
                                "{\"model_type\":\"qwen3_moe\",\"hidden_act\":\"silu\",\"hidden_size\":%d,\"moe_intermediate_size\":%d,"
                                "\"intermediate_size\":%d,\"num_hidden_layers\":%d,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":32,"
                                "\"num_experts\":%d,\"num_experts_per_tok\":2,\"vocab_size\":%d,\"max_position_embeddings\":512,"
                                "\"rms_norm_eps\":1e-6,\"rope_theta\":10000.0,\"norm_topk_prob\":true,\"tie_word_embeddings\":true}",
                                hidden, inner, inner, layers, experts, vocab);
    test_write(test_path(dir, "config.json"), text, n);
    exc_buf_puts(&h, "{");
#define PUT(rows, cols, ...)                                                                                                     \
    do {                                                                                                                         \
        exc_buf_printf(&h, "%s\"", at ? "," : "");                                                                               \
        exc_buf_printf(&h, __VA_ARGS__);                                                                                         \
        int64_t end_ = at + 2 * (int64_t)(rows) * ((cols) ? (cols) : 1);                                                         \
        if (cols) exc_buf_printf(&h, "\":{\"dtype\":\"BF16\",\"shape\":[%d,%d]", (int)(rows), (int)(cols));                      \
        else exc_buf_printf(&h, "\":{\"dtype\":\"BF16\",\"shape\":[%d]", (int)(rows));                                          \
        exc_buf_printf(&h, ",\"data_offsets\":[%lld,%lld]}", (long long)at, (long long)end_);                                   \
        at = end_;                                                                                                               \
    } while (0)
    PUT(vocab, hidden, "model.embed_tokens.weight");
    PUT(hidden, 0, "model.norm.weight");
    for (int l = 0; l < layers; l++) {
        PUT(hidden, 0, "model.layers.%d.input_layernorm.weight", l);
        PUT(hidden, 0, "model.layers.%d.post_attention_layernorm.weight", l);
        PUT(128, hidden, "model.layers.%d.self_attn.q_proj.weight", l);
        PUT(64, hidden, "model.layers.%d.self_attn.k_proj.weight", l);
        PUT(64, hidden, "model.layers.%d.self_attn.v_proj.weight", l);
        PUT(hidden, 128, "model.layers.%d.self_attn.o_proj.weight", l);
        PUT(32, 0, "model.layers.%d.self_attn.q_norm.weight", l);
        PUT(32, 0, "model.layers.%d.self_attn.k_norm.weight", l);
        PUT(experts, hidden, "model.layers.%d.mlp.gate.weight", l);
        for (int e = 0; e < experts; e++) {
            PUT(inner, hidden, "model.layers.%d.mlp.experts.%d.gate_proj.weight", l, e);
            PUT(inner, hidden, "model.layers.%d.mlp.experts.%d.up_proj.weight", l, e);
            PUT(hidden, inner, "model.layers.%d.mlp.experts.%d.down_proj.weight", l, e);
        }
    }
#undef PUT
    exc_buf_puts(&h, "}");
    while (h.len % 8) exc_buf_puts(&h, " ");
    int fd = open(test_path(dir, "model.safetensors"), O_CREAT | O_WRONLY, 0644);
    uint64_t length = h.len;
    assert_true(fd >= 0 && write(fd, &length, 8) == 8 && write(fd, h.data, h.len) == (ssize_t)h.len);
    assert_int_equal(ftruncate(fd, (off_t)(8 + h.len) + (off_t)at), 0);
    close(fd);
    exc_buf_free(&h);
}

/* 0: the process stayed within its budget, as the system counts it */
static int within_budget(const char *dir, uint64_t budget) {
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    exc_ctx *ctx;
    exc_model *m;
    exc_stats *s;
    char *json;
    opt.backend = "cpu";
    opt.threads = 2;
    opt.memory = budget;
    if (exc_ctx_create(&opt, &ctx) || exc_model_open(ctx, dir, NULL, &m)) return 1;
    exc_prompts p = make_prompts(PROMPTS, lengths, m->atlas->shape.vocab, 5), q = make_prompts(PROMPTS, lengths, m->atlas->shape.vocab, 6);
    memset(p.hash, '0', sizeof p.hash - 1);
    memset(q.hash, '1', sizeof q.hash - 1);
    if (exc_capture(ctx, m, &p, &q, NULL, &s, &json)) return 2;
    json_t *facts = json_loads(json, 0, NULL);
    int64_t peak = json_integer_value(json_object_get(facts, "peak_memory"));
    if ((uint64_t)json_integer_value(json_object_get(facts, "budget")) != budget || !json_is_true(json_object_get(facts, "streamed"))) return 3;
    if (peak < (int64_t)m->weight_bytes || m->loaded->all_bytes < 2 * budget) return 4;
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    return 0; /* shadow memory and blocks kept from reuse are counted too */
#endif
    if ((uint64_t)peak <= budget) return 0;
    print_error("peak %lld of %lld\n", (long long)peak, (long long)budget);
    return 5;
}

static void peak(void **state) {
    (void)state;
    char *dir = test_tmpdir();
    int code = -1;
    write_zeros(dir, 24, 512, 16, 512, 4096);
    pid_t child = fork(); /* a process of its own, so that its peak is what the capture took */
    assert_true(child >= 0);
    if (!child) _exit(within_budget(dir, (uint64_t)136 << 20));
    assert_int_equal(waitpid(child, &code, 0), child);
    assert_int_equal(code, 0);
}

/* 0: a job of one pass touched little of the memory that is there for all layers */
static int in_passing(const char *dir) {
    exc_ctx *ctx = context(0);
    exc_model *m;
    if (exc_model_open(ctx, dir, NULL, &m) || exc_model_streamed(m)) return 1;
    exc_prompts p = make_prompts(1, lengths, m->atlas->shape.vocab, 5);
    exc_decode d = {.max_new = 1};
    if (exc_decode_run(ctx, m, &p, &d, NULL)) return 2;
    if (exc_memory_peak(ctx) < m->loaded->all_bytes / 4) return 0;
    print_error("peak %lld of %lld\n", (long long)exc_memory_peak(ctx), (long long)m->loaded->all_bytes);
    return 3;
}

static void little(void **state) {
    (void)state;
    char *dir = test_tmpdir();
    int code = -1;
    write_zeros(dir, 8, 512, 64, 512, 4096);
    pid_t child = fork();
    assert_true(child >= 0);
    if (!child) _exit(in_passing(dir));
    assert_int_equal(waitpid(child, &code, 0), child);
    assert_int_equal(code, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(peak), cmocka_unit_test(little), cmocka_unit_test(passes), cmocka_unit_test(broken_off),
                                       cmocka_unit_test(chunks), cmocka_unit_test(crowded), cmocka_unit_test(budgets),
                                       cmocka_unit_test(same_chunks), cmocka_unit_test(two_models), cmocka_unit_test(two_residents), cmocka_unit_test(on_a_device), cmocka_unit_test(bad_layers),
                                       cmocka_unit_test(allocations_fail), cmocka_unit_test(cancelled)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
