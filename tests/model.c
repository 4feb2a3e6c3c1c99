/* model.c - is it the model: logits, hidden states, routing and greedy tokens against the same model in plain f64 loops at odd
 * shapes (tiny.h); and does the answer stay the same bits for any number of threads and any batching. Goldens: golden.c. */
#include "collect.h"

/* the same bits everywhere */
static void assert_same(const result *a, const result *b, int64_t new_tokens)
{
    for (int64_t i = 0; i < a->p->count; i++) {
        size_t n = (size_t)length_of(a->p, i);
        assert_memory_equal(a->logits[i], b->logits[i], n * (size_t)a->s->vocab * 4);
        assert_memory_equal(a->hidden[i], b->hidden[i], n * (size_t)((a->s->layers + 1) * a->s->hidden) * 4);
        assert_memory_equal(a->ids[i], b->ids[i], n * (size_t)(a->s->moe_layers * a->s->top_k) * 4);
        assert_memory_equal(a->weights[i], b->weights[i], n * (size_t)(a->s->moe_layers * a->s->top_k) * 4);
        if (new_tokens) assert_memory_equal(a->replies[i].tokens, b->replies[i].tokens, (size_t)new_tokens * 4);
    }
}

/* ---------------------------------------------------------------------------------------- odd shapes against f64 */

static void check_against_f64(tiny t)
{
    exc_ctx *ctx = test_ctx(2);
    char *dir = test_tmpdir();
    tiny_write(&t, dir);
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_F32);
    exc_prompts p = make_prompts(5, (int64_t[]){1, 3, 19, 33, 8}, t.vocab, t.seed);
    result r = run(ctx, m, &p, 0, 2, 24);
    for (int64_t i = 0; i < p.count; i++) {
        int64_t n = length_of(&p, i), L = t.layers + 1, K = t.top_k;
        double *hidden = calloc((size_t)(L * n * t.hidden), 8), *logits = calloc((size_t)(n * t.vocab), 8), margin;
        int32_t *ids = calloc((size_t)(t.layers * n * K), 4);
        tiny_forward(&t, p.tokens + p.begin[i], n, hidden, logits, ids, &margin);
        if (margin > 1e-5) { /* a near tie may fall either way in f32 */
            double dh = 0, nh = 0, dl = 0, nl = 0;
            for (int64_t j = 0; j < L * n * t.hidden; j++) {
                dh += pow((double)r.hidden[i][j] - hidden[j], 2);
                nh += hidden[j] * hidden[j];
            }
            for (int64_t j = 0; j < n * t.vocab; j++) {
                dl += pow((double)r.logits[i][j] - logits[j], 2);
                nl += logits[j] * logits[j];
            }
            /* f32 rounding through a few layers: 1e-6 typical (the golden's own is 1.6e-6) */
            if (!(sqrt(dh / nh) < 2e-5 && sqrt(dl / nl) < 2e-5))
                fail_msg("prompt %d: hidden %.2e logits %.2e", (int)i, sqrt(dh / nh), sqrt(dl / nl));
            for (int l = 0, row = 0; l < t.layers; l++)
                if (tiny_is_moe(&t, l)) {
                    assert_memory_equal(ids + (int64_t)l * n * K, r.ids[i] + (int64_t)row * n * K, (size_t)(n * K) * 4);
                    row++;
                }
        }
        free(hidden);
        free(logits);
        free(ids);
    }
    free_result(&r);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

static void test_odd_shapes(void **state)
{
    tiny t = tiny_default();
    check_against_f64(t);
    t.renorm = 0;
    t.seed = 2;
    t.files = 3;
    check_against_f64(t);
    t = tiny_default();
    t.only = "[1]"; /* a dense layer in the middle */
    t.tied = 1;
    t.dtype = "F32";
    check_against_f64(t);
    t = tiny_default();
    t.sparse_step = 2; /* layers 1, 3 have experts */
    t.layers = 4;
    t.dtype = "F16";
    check_against_f64(t);
    t = (tiny){.layers = 2, .hidden = 33, .heads = 4, .kv = 4, .dim = 2, .vocab = 31, .experts = 2, .top_k = 2, .inner = 1, .context = 64,
               .dense = 1, .sparse_step = 1, .renorm = 1, .files = 1, .dtype = "BF16", .seed = 5};
    check_against_f64(t); /* every expert chosen, widths of 1 and 2 */
    t = (tiny){.layers = 1, .hidden = 64, .heads = 6, .kv = 3, .dim = 32, .vocab = 257, .experts = 130, .top_k = 1, .inner = 48,
               .context = 64, .dense = 1, .sparse_step = 1, .renorm = 0, .files = 1, .dtype = "BF16", .seed = 6};
    check_against_f64(t); /* more experts than tokens, one chosen, its weight not renormalised to 1 */
    t = tiny_default();
    t.kind = TINY_OLMOE; /* q and k of 54 and 18 channels: neither fills its panels */
    t.renorm = 0;
    check_against_f64(t);
    t = tiny_default();
    t.window = 5; /* on every layer, shorter than most prompts */
    check_against_f64(t);
    t.kind = TINY_OSS;
    check_against_f64(t);
    t.window = 1;
    t.inner = 40; /* as wide as hidden: nothing but the name tells gate from down */
    t.top_k = 1;
    t.dtype = "F32";
    check_against_f64(t);
    t = tiny_default();
    t.kind = TINY_GLM;
    t.dim = 20; /* 10 rotate */
    t.experts = 12;
    t.groups = 4;
    t.kept = 2; /* some keys are negative */
    t.scale = 2.5;
    check_against_f64(t);
    t.groups = t.kept = 1;
    t.renorm = 0;
    t.dtype = "F32";
    t.seed = 9;
    check_against_f64(t);
    t.kind = TINY_LATENT; /* no two widths alike, none a whole panel; continued prompts take the absorbed form */
    t.heads = t.kv = 5;
    t.q_rank = 21;
    t.rank = 33;
    t.plain = 19;
    t.turned = 10;
    t.value = 17;
    t.yarn = 1;
    check_against_f64(t);
    t.dtype = "F16";
    t.q_rank = 0;
    t.halves = 1;
    t.heads = t.kv = 70; /* more heads than a unit of work of the attention has rows */
    t.rank = 16;
    t.plain = 1;
    t.value = 40;
    check_against_f64(t);
    t.dtype = "BF16";
    t.heads = t.kv = 1;
    t.yarn = t.halves = 0;
    t.turned = 2;
    t.groups = 4;
    t.kept = 2;
    check_against_f64(t);
    t = tiny_default();
    t.kind = TINY_NEXT; /* no head or projection fills its panels; three value heads to a key head; 4 of 18 channels rotate */
    t.layers = 5;
    t.interval = 3;
    t.k_heads = 2;
    t.v_heads = 6;
    t.k_dim = 9;
    t.v_dim = 13;
    t.taps = 4;
    t.shared = 29;
    t.only = "[1]"; /* dense in a linear layer */
    check_against_f64(t);
    t.only = NULL;
    t.kind = TINY_APART;
    t.files = 2;
    t.dtype = "F32";
    check_against_f64(t);
    t.dtype = "F16"; /* one head of each kind, no history in the convolution, no softmax layer but the last */
    t.k_heads = t.v_heads = t.heads = 1;
    t.taps = 1;
    t.k_dim = 33;
    t.v_dim = 1;
    t.interval = 5;
    check_against_f64(t);
    t.kind = TINY_NEXT;
    t.dtype = "BF16"; /* softmax alone */
    t.interval = 1;
    check_against_f64(t);
}

/* ----------------------------------------------------------------------------------------------- same bits */

static void same_threads(const char *name)
{
    exc_prompts p = golden_prompts(name);
    char path[64];
    snprintf(path, sizeof path, "models/%s", name);
    for (int compute = 0; compute < 2; compute++) {
        result r[3];
        exc_ctx *ctx[3];
        exc_model *m[3];
        for (int i = 0; i < 3; i++) {
            ctx[i] = test_ctx(i == 2 ? 5 : i + 1);
            m[i] = open_model(ctx[i], test_data(path), (exc_compute)compute);
            r[i] = run(ctx[i], m[i], &p, 9, 0, 0);
        }
        assert_same(&r[0], &r[1], 9);
        assert_same(&r[0], &r[2], 9);
        for (int i = 0; i < 3; i++) {
            free_result(&r[i]);
            exc_model_free(m[i]);
            exc_ctx_free(ctx[i]);
        }
    }
    free_prompts(&p);
}

static void test_threads(void **state)
{
    same_threads("qwen3_moe");
    same_threads("deepseek_v3");
    same_threads("qwen3_next");
}

static void same_batching(const char *name)
{
    static const int64_t sizes[][2] = {{0, 0}, {1, 0}, {2, 16}, {6, 7}, {3, 1}}; /* sequences, tokens of a prefill step */
    exc_prompts p = golden_prompts(name);
    char path[64];
    snprintf(path, sizeof path, "models/%s", name);
    for (int compute = 0; compute < 2; compute++) {
        exc_ctx_options opt = EXC_CTX_OPTIONS;
        opt.backend = "cpu";
        opt.threads = 2;
        opt.reproducible = 1;
        exc_ctx *ctx;
        assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_OK);
        exc_model *m = open_model(ctx, test_data(path), (exc_compute)compute);
        result first = run(ctx, m, &p, 12, sizes[0][0], sizes[0][1]);
        if (compute == EXC_COMPUTE_F32) {
            verdict v = judge(name, &first);
            assert_true(v.logits < 1e-4 && v.hidden < 1e-4 && v.same_experts == 1);
        }
        for (size_t i = 1; i < EXC_COUNT(sizes); i++) {
            result r = run(ctx, m, &p, 12, sizes[i][0], sizes[i][1]);
            assert_same(&first, &r, 12);
            free_result(&r);
        }
        free_result(&first);
        exc_model_free(m);
        exc_ctx_free(ctx);
    }
    free_prompts(&p);
}

static void test_batching(void **state)
{
    same_batching("qwen3_moe");
    same_batching("moonlight"); /* never expanded then */
    same_batching("gpt_oss");   /* windows that begin within blocks */
    same_batching("qwen3_5_moe"); /* chunks are counted from the prompt's start, not from the step's */
}

/* without the reproducible mode batching may move bits, but only roundings */
static void loose_batching(const char *name)
{
    exc_ctx *ctx = test_ctx(2);
    char path[64];
    snprintf(path, sizeof path, "models/%s", name);
    exc_prompts p = golden_prompts(name);
    exc_model *m = open_model(ctx, test_data(path), EXC_COMPUTE_F32);
    for (int64_t batch = 1; batch <= 4; batch += 3) {
        result r = run(ctx, m, &p, 16, batch, 10 * batch);
        verdict v = judge(name, &r);
        assert_true(v.logits < 1e-4 && v.hidden < 1e-4 && v.greedy == 96);
        free_result(&r);
    }
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

static void test_batching_loose(void **state)
{
    loose_batching("qwen3_moe");
    loose_batching("qwen3_next");
    loose_batching("deepseek_v3"); /* begun prompts expanded, continued ones absorbed, in one step */
}

/* ------------------------------------------------------------------------------------------------ generation */

static exc_reply *sample(exc_ctx *ctx, exc_model *m, const exc_prompts *p, float temperature, float top_p, uint64_t seed, int64_t batch)
{
    exc_decode d = {.max_new = 20, .temperature = temperature, .top_p = top_p, .seed = seed, .batch = batch};
    exc_reply *r = NULL;
    if (exc_decode_run(ctx, m, p, &d, &r)) fail_msg("%s", exc_ctx_error(ctx));
    return r;
}

static int64_t equal_tokens(const exc_reply *a, const exc_reply *b, int64_t n)
{
    int64_t same = 0;
    for (int64_t i = 0; i < n; i++) {
        if (a[i].count != b[i].count || a[i].stopped != b[i].stopped) continue;
        same += a[i].count == 0 || !memcmp(a[i].tokens, b[i].tokens, (size_t)a[i].count * 4);
    }
    return same;
}

static void test_sampling(void **state)
{
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    opt.backend = "cpu";
    opt.reproducible = 1;
    exc_ctx *ctx;
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_OK);
    exc_model *m = open_model(ctx, test_data("models/qwen3_moe"), EXC_COMPUTE_BF16);
    exc_prompts p = golden_prompts("qwen3_moe");
    exc_reply *a = sample(ctx, m, &p, 1.0f, 0.9f, 11, 0), *b = sample(ctx, m, &p, 1.0f, 0.9f, 11, 1), *c = sample(ctx, m, &p, 1.0f, 0.9f, 12, 0),
              *open = sample(ctx, m, &p, 1.0f, 0, 11, 0), *whole = sample(ctx, m, &p, 1.0f, 1, 11, 0),
              *greedy = sample(ctx, m, &p, 0, 0, 1, 2), *cold = sample(ctx, m, &p, 1e-6f, 1, 3, 0), *narrow = sample(ctx, m, &p, 1, 1e-9f, 4, 0);
    assert_int_equal(equal_tokens(a, b, 6), 6); /* the seed decides, not the batching */
    assert_true(equal_tokens(a, c, 6) < 6);
    assert_int_equal(equal_tokens(open, whole, 6), 6); /* top_p 0 is off, not the smallest set */
    assert_true(equal_tokens(open, greedy, 6) < 6);
    assert_int_equal(equal_tokens(greedy, cold, 6), 6); /* temperature to 0 and top-p to 0 both end at the largest logit */
    assert_int_equal(equal_tokens(greedy, narrow, 6), 6);
    exc_reply *all[] = {a, b, c, open, whole, greedy, cold, narrow};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_replies_free(all[i], 6);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

/* the end token stops a reply and is not part of it; the context ends replies too */
static void test_stops(void **state)
{
    exc_ctx *ctx = test_ctx(2);
    char *dir = test_tmpdir();
    tiny t = tiny_default();
    t.context = 24;
    tiny_write(&t, dir);
    exc_model *m = open_model(ctx, dir, EXC_COMPUTE_F32);
    exc_prompts p = make_prompts(4, (int64_t[]){24, 20, 3, 1}, t.vocab, 3);
    exc_decode d = {.max_new = 16};
    exc_reply *all = NULL, *cut = NULL;
    if (exc_decode_run(ctx, m, &p, &d, &all)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(all[0].count + all[0].stopped, 1); /* a full context still emits one token */
    assert_true(all[1].count <= 4);
    int64_t which = all[2].count > 3 ? 2 : 3;
    assert_true(all[which].count > 3);
    m->atlas->shape.eos[0] = all[which].tokens[3];
    m->atlas->shape.n_eos = 1;
    assert_int_equal(exc_decode_run(ctx, m, &p, &d, &cut), EXC_OK);
    int64_t first = 0;
    while (all[which].tokens[first] != all[which].tokens[3]) first++;
    assert_int_equal(cut[which].stopped, 1);
    assert_int_equal(cut[which].count, first);
    d.ignore_eos = true; /* asked for exactly 16 new tokens: refused where the context has no room for them */
    exc_reply *none = NULL;
    test_refused(ctx, exc_decode_run(ctx, m, &p, &d, &none), EXC_ERR_INPUT, "prompt 1", "at most 24", "39", NULL);
    exc_clear(ctx);
    exc_replies_free(all, 4);
    exc_replies_free(cut, 4);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

/* logits of all positions equal those of the run, in prompt order, whole prompts handed along */
typedef struct seen {
    const result *r;
    int64_t prompt, at;
} seen;

static exc_status look(exc_ctx *ctx, void *user, int64_t prompt, int64_t first, int64_t rows, const int32_t *tokens, const float *logits)
{
    seen *s = user;
    if (prompt != s->prompt) {
        assert_int_equal(prompt, s->prompt + 1);
        s->prompt = prompt;
        s->at = 0;
    }
    assert_int_equal(first, s->at);
    assert_ptr_equal(tokens, s->r->p->tokens + s->r->p->begin[prompt]);
    s->at += rows;
    assert_true(test_relative(logits, s->r->logits[prompt] + first * s->r->s->vocab, (size_t)(rows * s->r->s->vocab)) < 1e-5);
    return EXC_OK;
}

static void test_logits(void **state)
{
    exc_ctx *ctx = test_ctx(2);
    exc_model *m = open_model(ctx, test_data("models/qwen3_moe"), EXC_COMPUTE_F32);
    exc_prompts p = golden_prompts("qwen3_moe");
    result r = run(ctx, m, &p, 0, 0, 0);
    seen s = {.r = &r, .prompt = -1};
    assert_int_equal(exc_logits_run(ctx, m, &p, "look", look, &s), EXC_OK);
    assert_int_equal(s.prompt, 5);
    assert_int_equal(s.at, 64);
    free_result(&r);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

/* the verb's file holds exactly the run */
static void test_forward_file(void **state)
{
    exc_ctx *ctx = test_ctx(2);
    char *dir = test_tmpdir();
    exc_model *m = open_model(ctx, test_data("models/qwen3_moe"), EXC_COMPUTE_F32);
    exc_prompts p = golden_prompts("qwen3_moe");
    result r = run(ctx, m, &p, 16, 0, 0);
    exc_forward_options opt = {.size = sizeof opt, .emit_logits = 1, .emit_hidden = 1, .emit_routing = 1, .generate = 16};
    const char *out = test_path(dir, "f.safetensors");
    char *json = NULL;
    if (exc_forward(ctx, m, &p, &opt, out, &json)) fail_msg("%s", exc_ctx_error(ctx));
    assert_non_null(strstr(json, "\"tokens\":124"));
    exc_free(json);
    exc_tensors *f;
    assert_int_equal(exc_tensors_open(ctx, out, &f), EXC_OK);
    assert_int_equal(f->count, 6 * 6);
    for (int64_t i = 0; i < 6; i++) {
        size_t n = (size_t)length_of(&p, i), S = (size_t)(r.s->moe_layers * r.s->top_k) * n * 4;
        assert_memory_equal(golden(f, i, "tokens"), p.tokens + p.begin[i], n * 4);
        assert_memory_equal(golden(f, i, "logits"), r.logits[i], n * (size_t)r.s->vocab * 4);
        assert_memory_equal(golden(f, i, "hidden"), r.hidden[i], n * (size_t)((r.s->layers + 1) * r.s->hidden) * 4);
        assert_memory_equal(golden(f, i, "router_ids"), r.ids[i], S);
        assert_memory_equal(golden(f, i, "router_weights"), r.weights[i], S);
        assert_memory_equal(golden(f, i, "greedy"), r.replies[i].tokens, 64);
    }
    exc_tensors_close(f);
    test_refused(ctx, exc_forward(ctx, m, &p, &opt, out, NULL), EXC_ERR_USAGE, "f.safetensors", NULL);
    opt.force = 1;
    opt.emit_logits = opt.emit_hidden = opt.emit_routing = opt.generate = 0;
    assert_int_equal(exc_forward(ctx, m, &p, &opt, out, NULL), EXC_OK);
    assert_int_equal(exc_tensors_open(ctx, out, &f), EXC_OK);
    assert_int_equal(f->count, 6);
    exc_tensors_close(f);
    free_result(&r);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

/* generate on token prompts, from a folder without a tokenizer */
static void test_generate_file(void **state)
{
    exc_ctx *ctx = test_ctx(2);
    char *dir = test_tmpdir();
    exc_model *m = open_model(ctx, test_data("models/qwen3_moe"), EXC_COMPUTE_F32);
    exc_prompts p = golden_prompts("qwen3_moe");
    exc_generate_options opt = EXC_GENERATE_OPTIONS;
    opt.max_new = 5;
    const char *out = test_path(dir, "g.jsonl");
    if (exc_generate(ctx, m, &p, &opt, out, NULL)) fail_msg("%s", exc_ctx_error(ctx));
    size_t n;
    char *text = test_read(out, &n);
    int64_t i = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), i++) {
        json_t *o = json_loads(line, 0, NULL);
        assert_non_null(o);
        assert_int_equal(json_array_size(json_object_get(o, "prompt")), (size_t)length_of(&p, i));
        assert_true(json_is_null(json_object_get(o, "text")));
        assert_true(json_array_size(json_object_get(o, "tokens")) <= 5);
        assert_true(json_is_string(json_object_get(o, "stop")));
        json_decref(o);
    }
    assert_int_equal(i, 6);
    free(text);
    opt.top_p = 1.5f;
    test_refused(ctx, exc_generate(ctx, m, &p, &opt, out, NULL), EXC_ERR_USAGE, "top_p", NULL);
    free_prompts(&p);
    exc_model_free(m);
    exc_ctx_free(ctx);
}

/* the f64 product behind output sums, at sizes that fill no panel and no group of rows */
static void test_matvec(void **state)
{
    static const int64_t sizes[][3] = {{1, 1, 1}, {31, 33, 3}, {16, 32, 8}, {17, 127, 9}, {64, 48, 20}, {5, 7, 0}};
    exc_ctx *ctx = test_ctx(2);
    for (size_t i = 0; i < EXC_COUNT(sizes); i++)
        for (int dtype = EXC_F32; dtype <= EXC_BF16; dtype++) {
            int64_t n = sizes[i][0], k = sizes[i][1], rows = sizes[i][2];
            float *w = calloc((size_t)(n * k), 4);
            uint16_t *half = calloc((size_t)(n * k), 2);
            double *x = calloc((size_t)(rows * k) + 1, 8), *y = calloc((size_t)(rows * n) + 1, 8);
            for (int64_t j = 0; j < n * k; j++) {
                half[j] = test_bf16(test_normal(i, (uint64_t)j));
                w[j] = dtype == EXC_BF16 ? test_from_bf16(half[j]) : test_normal(i, (uint64_t)j);
            }
            for (int64_t j = 0; j < rows * k; j++) x[j] = (double)test_normal(99, (uint64_t)j) * 1e6;
            y[rows * n] = 123; /* guard */
            void *packed = exc_alloc(ctx, exc_packed_bytes(n, k, dtype), 1, "panels");
            exc_packed p = {packed, n, k, dtype};
            assert_int_equal(ctx->ops->pack(&ctx->queue, &(struct exc_pack_args){.w = dtype == EXC_BF16 ? (void *)half : (void *)w,
                .w_dtype = dtype, .n = n, .k = k, .to = dtype, .out = packed}), EXC_OK);
            assert_int_equal(ctx->ops->matvec(&ctx->queue, &(struct exc_matvec_args){.x = x, .w = &p, .rows = rows, .y = y}), EXC_OK);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t o = 0; o < n; o++) {
                    double sum = 0, size = 0;
                    for (int64_t j = 0; j < k; j++) {
                        sum += x[r * k + j] * (double)w[o * k + j];
                        size += fabs(x[r * k + j] * (double)w[o * k + j]);
                    }
                    assert_true(fabs(y[r * n + o] - sum) <= 1e-13 * size + 1e-300);
                }
            assert_true(y[rows * n] == 123);
            exc_release(packed);
            free(w);
            free(half);
            free(x);
            free(y);
        }
    exc_ctx_free(ctx);
}

/* every allocation on the way may fail: the answer is an error, never a crash, and nothing stays behind */
static void test_allocations_fail(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *dir = test_tmpdir();
    tiny t = tiny_default();
    t.layers = 2; /* latent attention: the loader's copies and views too */
    t.kind = TINY_LATENT;
    t.heads = t.kv = 2;
    t.groups = t.kept = 1;
    t.scale = 1;
    t.rank = t.plain = t.turned = t.value = 6;
    tiny_write(&t, dir);
    exc_prompts p = make_prompts(2, (int64_t[]){3, 2}, t.vocab, 9);
    exc_status st = EXC_ERR_MEMORY;
    for (uint64_t n = 1; st != EXC_OK && n < 2000; n++) {
        exc_model *m = NULL;
        exc_reply *r = NULL;
        exc_decode d = {.max_new = 3};
        exc_alloc_fail_at(n);
        st = exc_model_open(ctx, dir, NULL, &m);
        if (!st) st = exc_decode_run(ctx, m, &p, &d, &r);
        exc_alloc_fail_at(0);
        if (st) {
            assert_int_equal(st, EXC_ERR_MEMORY);
            assert_true(strlen(exc_ctx_error(ctx)) > 0);
        }
        exc_replies_free(r, 2);
        exc_model_free(m);
        exc_clear(ctx);
    }
    assert_int_equal(st, EXC_OK);
    free_prompts(&p);
    exc_ctx_free(ctx);
    tiny_free(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_odd_shapes),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_batching),
        cmocka_unit_test(test_batching_loose),
        cmocka_unit_test(test_sampling),
        cmocka_unit_test(test_stops),
        cmocka_unit_test(test_logits),
        cmocka_unit_test(test_forward_file),
        cmocka_unit_test(test_generate_file),
        cmocka_unit_test(test_matvec),
        cmocka_unit_test(test_allocations_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
