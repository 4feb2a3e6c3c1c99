/* engine.c - rows of whole models in memory: prefill and decode of the random model with capture on and off in turns, the
 * demo-sized one, a model within half the memory it asks for, and what disk.c watches from outside: the peak memory of a
 * capture, and a first token.
 *
 * Floors. Prefill: the multiply-adds of every weight a token meets, and of attention, at the rate of a real bf16 matmul. Decode:
 * the bytes of the weights that the step must read (attention, router, head, and the experts that any sequence chose, counted
 * from the routing itself) at the read bandwidth. What is captured when capture is on: counts, gate sums, intermediate sums,
 * squared output norms, counts by prompt and the residual stream of each prompt's last token: all of what exc_capture takes. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "model.h"
#include "study.h"

/* -------------------------------------------------------------------------------------------------- small helpers */

static exc_prompts random_prompts(bench *b, int64_t count, int64_t length, int64_t vocab, uint64_t seed)
{
    exc_prompts p = {.count = count};
    p.tokens = bench_alloc(b, (size_t)(count * length) * 4);
    p.begin = bench_alloc(b, (size_t)(count + 1) * 8);
    p.content = bench_alloc(b, (size_t)(count * length));
    p.text = exc_zalloc(b->ctx, (size_t)count, sizeof *p.text, "texts");
    for (int64_t i = 0; i < count * length; i++) {
        p.tokens[i] = (int32_t)(2 + exc_random_u64(seed, 1, (uint64_t)i) % (uint64_t)(vocab - 2));
        p.content[i] = 1;
    }
    for (int64_t i = 0; i <= count; i++) p.begin[i] = i * length;
    snprintf(p.hash, sizeof p.hash, "%032llx", (unsigned long long)seed);
    return p;
}

static void release_prompts(exc_prompts *p)
{
    exc_release(p->tokens);
    exc_release(p->begin);
    exc_release(p->content);
    exc_release(p->text);
}

static exc_model *open_model(bench *b, const char *dir, exc_compute compute)
{
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_model *m = NULL;
    o.compute = compute;
    bench_must(b, exc_model_open(b->ctx, dir, &o, &m), dir);
    return m;
}

typedef struct capture {
    exc_sums sums;
    float *hidden_last; /* [P,L+1,H] */
} capture;

static capture capture_open(bench *b, const spec *s, int64_t prompts)
{
    size_t me = (size_t)(s->layers * s->experts);
    return (capture){{.count = exc_zalloc(b->ctx, me, 8, "sums"), .gate_sum = exc_zalloc(b->ctx, me, 8, "sums"),
                      .mid_sum = exc_zalloc(b->ctx, me * (size_t)s->inner, 8, "sums"), .sqnorm_sum = exc_zalloc(b->ctx, me, 8, "sums"),
                      .tokens = exc_zalloc(b->ctx, (size_t)s->layers, 8, "sums"),
                      .prompt_count = exc_zalloc(b->ctx, (size_t)prompts * me, 4, "sums")},
                     bench_alloc(b, (size_t)(prompts * (s->layers + 1) * s->hidden) * 4)};
}

static void capture_close(capture *c)
{
    void *all[] = {c->sums.count, c->sums.gate_sum, c->sums.mid_sum, c->sums.sqnorm_sum, c->sums.tokens, c->sums.prompt_count, c->hidden_last};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_release(all[i]);
}

/* -------------------------------------------------------------------------------------------------------- prefill */

typedef struct prefill {
    exc_model *m;
    exc_prompts *p;
    capture *c; /* NULL: off */
    float *first_logits;
} prefill;

static void run_prefill(bench *b, void *arg)
{
    prefill *p = arg;
    exc_decode d = {.step = "prefill", .first_logits = p->first_logits};
    exc_reply *replies = NULL;
    if (p->c) {
        d.prefill_sums = &p->c->sums;
        d.observe = true;
        d.hidden_last = p->c->hidden_last;
    }
    bench_must(b, exc_decode_run(b->ctx, p->m, p->p, &d, &replies), "prefill");
    exc_replies_free(replies, p->p->count);
}

/* bf16 logits against those of the same weights with f32 activations: |a-b|/|b|. Random models mix strongly and a near tie that
 * flips an expert moves everything behind it, so the limit only tells a right model from a wrong one; the goldens of the
 * tests are the sharp check. */
static double prefill_error(bench *b, const char *dir, prefill *p, int64_t vocab)
{
    exc_prompts some = *p->p;
    some.count = 4;
    float *l[2];
    double off = 0, whole = 0;
    for (int i = 0; i < 2; i++) {
        l[i] = bench_alloc(b, (size_t)(some.count * vocab) * 4);
        prefill q = {.m = i ? open_model(b, dir, EXC_COMPUTE_F32) : p->m, .p = &some, .first_logits = l[i]};
        run_prefill(b, &q);
        if (i) exc_model_free(q.m);
    }
    for (int64_t i = 0; i < some.count * vocab; i++) {
        double d = (double)l[0][i] - (double)l[1][i];
        off += d * d;
        whole += (double)l[1][i] * (double)l[1][i];
    }
    exc_release(l[0]);
    exc_release(l[1]);
    return sqrt(off / whole);
}

static double counts_error(const capture *c, const spec *s, int64_t tokens)
{
    double wrong = 0;
    for (int64_t l = 0; l < s->layers; l++) {
        int64_t sum = 0;
        for (int64_t e = 0; e < s->experts; e++) sum += c->sums.count[l * s->experts + e];
        wrong += sum != tokens * s->top_k;
    }
    return wrong;
}

static void prefill_rows(bench *b, const spec *s, exc_model *m, const char *dir)
{
    if (!bench_wanted(b, "prefill") && !bench_wanted(b, "prefill_captured") && !bench_wanted(b, "capture_prefill_overhead")) return;
    enum { MOST = 9 };
    int64_t P = 16, T = b->quick ? 32 : 128;
    int rounds = b->quick ? 3 : MOST;
    exc_prompts p = random_prompts(b, P, T, s->vocab, 5);
    capture c = capture_open(b, s, P);
    prefill off = {.m = m, .p = &p}, on = {.m = m, .p = &p, .c = &c};
    double error = prefill_error(b, dir, &off, s->vocab), over[MOST];
    series took[2] = {0};
    turns t;
    run_prefill(b, &on);
    double wrong = counts_error(&c, s, P * T), flop = spec_flop(s, (double)(P * T), ((double)T + 1) / 2);
    turns_begin(b, &t, CEIL_BF16, 0.05);
    for (int i = 0; i < rounds; i++) {
        double seconds[2];
        /* off on off on .. with the order turned each round, so that drift falls on both */
        for (int j = 0; j < 2; j++) {
            int captured = (i + j) & 1;
            double start = exc_seconds();
            run_prefill(b, captured ? &on : &off);
            seconds[captured] = exc_seconds() - start;
            turns_next(b, &t);
            series_add(&took[captured], &t, seconds[captured], flop);
        }
        over[i] = 100 * (seconds[1] / seconds[0] - 1);
    }
    char shape[64];
    snprintf(shape, sizeof shape, "%d prompts x %d tokens, random model", (int)P, (int)T);
    for (int captured = 0; captured < 2; captured++) {
        row r = {.name = captured ? "prefill_captured" : "prefill", .shape = shape, .against = CEIL_BF16, .work = flop, .unit = "tokens/s",
                 .goal = captured && !b->quick ? GOAL_FRACTION : GOAL_NONE, .target = 0.75, .error = captured ? wrong : error,
                 .limit = captured ? 0.5 : 0.3};
        series_row(&took[captured], &r);
        r.value = (double)(P * T) / r.seconds;
        if (bench_wanted(b, r.name)) bench_emit(b, &r);
    }
    row r = {.name = "capture_prefill_overhead", .shape = shape, .unit = "%", .goal = b->quick ? GOAL_NONE : GOAL_OVERHEAD, .target = 2, .rounds = rounds};
    r.value = bench_median(over, rounds);
    r.fraction_low = over[0];
    r.fraction_high = over[rounds - 1];
    if (bench_wanted(b, r.name)) bench_emit(b, &r);
    capture_close(&c);
    release_prompts(&p);
}

/* --------------------------------------------------------------------------------------------------------- decode */

typedef struct decode {
    const spec *s;
    exc_session *session;
    int64_t batch;
    int32_t *token, *slot, *observe, *ids; /* ids [M,B,K] */
    int64_t *begin;
    float *logits, *weights;
    capture c;
} decode;

static void decode_start(bench *b, decode *d, const exc_prompts *p, int64_t steps)
{
    int64_t length = p->begin[1], *capacity = bench_alloc(b, (size_t)d->batch * 8);
    for (int64_t i = 0; i < d->batch; i++) capacity[i] = length + steps;
    bench_must(b, exc_session_reset(d->session, d->batch, capacity), "session");
    exc_step t = {.tokens = p->tokens, .slot = d->slot, .begin = p->begin, .sequences = d->batch, .logits = d->logits};
    bench_must(b, exc_session_step(d->session, &t), "prefill");
    exc_release(capacity);
}

static void decode_sample(bench *b, decode *d)
{
    struct exc_sample_args a = {.logits = d->logits, .rows = d->batch, .vocab = d->s->vocab, .token = d->token};
    bench_must(b, b->ctx->ops->sample(&b->ctx->queue, &a), "sample");
}

/* one token for every sequence: choose, feed back */
static void decode_step(bench *b, decode *d, bool captured)
{
    decode_sample(b, d);
    exc_step t = {.tokens = d->token, .slot = d->slot, .begin = d->begin, .sequences = d->batch, .logits = d->logits};
    t.router_ids = d->ids;
    t.router_weights = d->weights;
    if (captured) t.sums = &d->c.sums, t.observe = d->observe;
    bench_must(b, exc_session_step(d->session, &t), "decode");
}

/* bytes of weights that the last step had to read: everything but experts nobody chose and rows of the embedding */
static double weights_read(const decode *d)
{
    const spec *s = d->s;
    double expert = 2.0 * 3 * (double)(s->hidden * s->inner), bytes = (double)spec_bytes(s) - 2.0 * (double)(s->vocab * s->hidden);
    for (int64_t l = 0; l < s->layers; l++) {
        bool used[1024] = {false};
        int64_t distinct = 0;
        for (int64_t i = 0; i < d->batch * s->top_k; i++) used[d->ids[l * d->batch * s->top_k + i]] = true;
        for (int64_t e = 0; e < s->experts; e++) distinct += used[e];
        bytes -= expert * (double)(s->experts - distinct);
    }
    return bytes;
}

/* the logits after n decoded tokens against a prefill of all of them at once: |a-b|/|b| of sequence 0 */
static double decode_error(bench *b, decode *d, const exc_prompts *p, int64_t n)
{
    int64_t length = p->begin[1], V = d->s->vocab, capacity = length + n;
    int32_t *all = bench_alloc(b, (size_t)(length + n) * 4);
    float *decoded = bench_alloc(b, (size_t)V * 4);
    memcpy(all, p->tokens, (size_t)length * 4);
    decode_start(b, d, p, n);
    for (int64_t i = 0; i < n; i++) {
        decode_step(b, d, false);
        all[length + i] = d->token[0];
    }
    memcpy(decoded, d->logits, (size_t)V * 4);
    bench_must(b, exc_session_reset(d->session, 1, &capacity), "session");
    int64_t begin[2] = {0, capacity};
    exc_step t = {.tokens = all, .slot = d->slot, .begin = begin, .sequences = 1, .logits = d->logits};
    bench_must(b, exc_session_step(d->session, &t), "prefill");
    double off = 0, whole = 0;
    for (int64_t v = 0; v < V; v++) {
        double x = (double)decoded[v] - (double)d->logits[v];
        off += x * x;
        whole += (double)d->logits[v] * (double)d->logits[v];
    }
    exc_release(all);
    exc_release(decoded);
    return sqrt(off / whole);
}

static void decode_rows(bench *b, const spec *s, exc_model *m, int64_t batch, double target)
{
    enum { MOST = 24, STEPS = 6 };
    char name[2][32], over_name[40], shape[64];
    snprintf(name[0], sizeof name[0], "decode_%d", (int)batch);
    snprintf(name[1], sizeof name[1], "decode_%d_captured", (int)batch);
    snprintf(over_name, sizeof over_name, "capture_decode_overhead_%d", (int)batch);
    if (!bench_wanted(b, name[0]) && !bench_wanted(b, name[1]) && !bench_wanted(b, over_name)) return;
    int64_t length = 32, V = s->vocab;
    int rounds = b->quick ? 3 : MOST;
    decode d = {.s = s, .batch = batch, .c = capture_open(b, s, batch)};
    exc_room room = {.slots = batch, .cache_tokens = batch * (length + 2 * STEPS * MOST), .step_tokens = batch * length + 64};
    bench_must(b, exc_session_open(b->ctx, m, &room, &d.session), "session");
    d.token = bench_alloc(b, (size_t)batch * 4);
    d.slot = bench_alloc(b, (size_t)batch * 4);
    d.observe = bench_alloc(b, (size_t)batch * 4);
    d.begin = bench_alloc(b, (size_t)(batch + 1) * 8);
    d.logits = bench_alloc(b, (size_t)(batch * V) * 4);
    d.ids = bench_alloc(b, (size_t)(s->layers * batch * s->top_k) * 4);
    d.weights = bench_alloc(b, (size_t)(s->layers * batch * s->top_k) * 4);
    for (int64_t i = 0; i <= batch; i++) d.begin[i] = i;
    for (int64_t i = 0; i < batch; i++) d.slot[i] = d.observe[i] = (int32_t)i;
    exc_prompts p = random_prompts(b, batch, length, V, 6);
    double error = decode_error(b, &d, &p, 8), over[MOST * STEPS], bytes = 0;
    series took[2] = {0};
    turns t;
    decode_start(b, &d, &p, 2 * STEPS * rounds);
    turns_begin(b, &t, CEIL_READ, 0.01);
    for (int i = 0; i < rounds; i++) {
        double spent[2][STEPS], read = 0;
        for (int j = 0; j < 2 * STEPS; j++) {
            int captured = (i + j) & 1; /* neighbours in time, in turns */
            double start = exc_seconds();
            decode_step(b, &d, captured);
            spent[captured][j / 2] = exc_seconds() - start;
            read += weights_read(&d) / (2 * STEPS);
        }
        turns_next(b, &t);
        bytes += read / rounds;
        for (int j = 0; j < STEPS; j++) over[i * STEPS + j] = 100 * (spent[1][j] / spent[0][j] - 1);
        for (int c = 0; c < 2; c++) series_add(&took[c], &t, bench_median(spent[c], STEPS), read);
    }
    snprintf(shape, sizeof shape, "batch %d, %.0f MB of weights a step", (int)batch, bytes / 1e6);
    for (int c = 0; c < 2; c++) {
        row r = {.name = name[c], .shape = shape, .against = CEIL_READ, .work = bytes, .unit = "tokens/s", .goal = c || b->quick ? GOAL_NONE : GOAL_FRACTION,
                 .target = target, .error = error, .limit = 0.1};
        series_row(&took[c], &r);
        r.value = (double)batch / r.seconds;
        if (bench_wanted(b, r.name)) bench_emit(b, &r);
    }
    row r = {.name = over_name, .shape = shape, .unit = "%", .goal = b->quick ? GOAL_NONE : GOAL_OVERHEAD, .target = 3, .rounds = rounds};
    r.value = bench_median(over, rounds * STEPS);
    r.fraction_low = over[0];
    r.fraction_high = over[rounds * STEPS - 1];
    if (bench_wanted(b, r.name)) bench_emit(b, &r);
    exc_session_close(d.session);
    void *all[] = {d.token, d.slot, d.observe, d.begin, d.logits, d.ids, d.weights};
    for (size_t i = 0; i < EXC_COUNT(all); i++) exc_release(all[i]);
    capture_close(&d.c);
    release_prompts(&p);
}

/* ----------------------------------------------------------------------------------------------------- demo-sized */

typedef struct small {
    exc_model *m;
    exc_prompts *p;
    double nll; /* of the last run, summed over tokens */
    int64_t tokens;
} small;

static exc_status add_nll(exc_ctx *ctx, void *user, int64_t prompt, int64_t first, int64_t rows, const int32_t *tokens, const float *logits)
{
    small *s = user;
    double nll[4096];
    int64_t length = s->p->begin[prompt + 1] - s->p->begin[prompt], n = first + rows < length ? rows : length - first - 1;
    struct exc_compare_args a = {.p = logits, .rows = n, .vocab = s->m->atlas->shape.vocab, .next = tokens + first + 1, .nll_p = nll};
    EXC_TRY(ctx->ops->compare(&ctx->queue, &a));
    for (int64_t i = 0; i < n; i++) s->nll += nll[i];
    s->tokens += n;
    return EXC_OK;
}

/* what an evaluation does: log-probabilities of every prompt token, then 24 greedy tokens a prompt */
static void run_small(bench *b, void *arg)
{
    small *s = arg;
    s->nll = 0;
    s->tokens = 0;
    bench_must(b, exc_logits_run(b->ctx, s->m, s->p, "log-probabilities", add_nll, s), "log-probabilities");
    exc_decode d = {.max_new = 24, .ignore_eos = true, .step = "generate"};
    exc_reply *replies = NULL;
    bench_must(b, exc_decode_run(b->ctx, s->m, s->p, &d, &replies), "generate");
    exc_replies_free(replies, s->p->count);
}

static void demo_row(bench *b)
{
    if (!bench_wanted(b, "demo_sized")) return;
    const spec *s = &spec_demo;
    char *dir = make_model(b, s, NULL);
    exc_prompts p = random_prompts(b, 64, 20, s->vocab, 8);
    small x = {open_model(b, dir, EXC_COMPUTE_BF16), &p}, exact = {open_model(b, dir, EXC_COMPUTE_F32), &p};
    run_small(b, &x);
    run_small(b, &exact);
    double error = fabs(x.nll - exact.nll) / exact.nll, kept = 64.0 * 20, new = 64.0 * 24;
    if (x.tokens != 64 * 19) error = 1;
    double flop = 2 * spec_flop(s, kept, 10.5) + spec_flop(s, new, 32) + 2.0 * (double)(s->vocab * s->hidden) * (kept + new);
    row r = {.name = "demo_sized", .shape = "64 prompts x 20: log-probs, 24 greedy tokens", .against = CEIL_BF16, .work = flop, .unit = "s",
             .error = error, .limit = 0.01, .note = "target: a quarter of transformers' time in peers.py"};
    bench_measure(b, &r, run_small, &x);
    exc_model_free(x.m);
    exc_model_free(exact.m);
    release_prompts(&p);
}

/* ----------------------------------------------------------------------------------------- within a budget of memory */

typedef struct fed {
    exc_ctx *ctx;
    exc_model *m;
    const exc_prompts *p;
    int64_t new; /* tokens of each prompt */
    exc_reply *replies;
} fed;

static double feed_seconds(fed *f)
{
    exc_decode d = {.step = "budget", .max_new = f->new, .ignore_eos = true};
    exc_replies_free(f->replies, f->p->count);
    f->replies = NULL;
    double start = exc_seconds();
    if (exc_decode_run(f->ctx, f->m, f->p, &d, &f->replies)) {
        fprintf(stderr, "excise_bench: within a budget: %s\n", exc_ctx_error(f->ctx));
        exit(1);
    }
    return exc_seconds() - start;
}

static void emit_rate(bench *b, const char *name, const char *shape, double tokens, double *seconds, int rounds, double error, const char *note)
{
    double middle = bench_median(seconds, rounds);
    row r = {.name = name, .shape = shape, .unit = "tokens/s", .value = tokens / middle, .seconds = middle, .rounds = rounds, .error = error,
             .limit = 0.5, .note = note, .fraction_low = tokens / seconds[rounds - 1], .fraction_high = tokens / seconds[0]};
    bench_emit(b, &r);
}

/* The same prompts through two models in turns, one resident and one whose layers take turns in memory. `new` 1: prefill, else the
 * tokens that are made count, each of which costs the second a pass over its weights. */
static void budget_pair(bench *b, fed two[2], const char *what, int64_t new)
{
    enum { ROUNDS = 5 };
    char name[64], shape[96], note[128];
    double seconds[2][ROUNDS], ratio[ROUNDS], differ = 0, tokens = (double)(new > 1 ? two[0].p->count * new : two[0].p->begin[two[0].p->count]);
    int rounds = b->quick ? 2 : ROUNDS;
    for (int i = -2; i < rounds; i++) { /* the first passes put a resident model's weights in their places */
        for (int k = 0; k < 2; k++) {
            two[k].new = new;
            double t = feed_seconds(&two[k]);
            if (i >= 0) seconds[k][i] = t;
        }
        if (i >= 0) ratio[i] = seconds[0][i] / seconds[1][i];
    }
    for (int64_t i = 0; i < two[0].p->count; i++) differ += two[0].replies[i].tokens[0] != two[1].replies[i].tokens[0];
    differ /= (double)two[0].p->count;
    snprintf(shape, sizeof shape, "%lld prompts x %lld tokens, %lld new each, random model", (long long)two[0].p->count,
             (long long)two[0].p->begin[1], (long long)new);
    snprintf(name, sizeof name, "resident_%s", what);
    emit_rate(b, name, shape, tokens, seconds[0], rounds, differ, NULL);
    snprintf(name, sizeof name, "streamed_%s", what);
    snprintf(note, sizeof note, "budget %.2f GB for %.2f GB of weights; %.3f of resident", (double)two[1].ctx->memory / 1e9,
             (double)spec_bytes(&spec_random) / 1e9, bench_median(ratio, rounds));
    emit_rate(b, name, shape, tokens, seconds[1], rounds, differ, note);
}

static void budget_rows(bench *b)
{
    static const char *const names[] = {"resident_prefill", "streamed_prefill", "resident_decode", "streamed_decode"};
    bool wanted[2] = {bench_wanted(b, names[0]) || bench_wanted(b, names[1]), bench_wanted(b, names[2]) || bench_wanted(b, names[3])};
    if (!wanted[0] && !wanted[1]) return;
    const char *dir = make_model(b, &spec_random, NULL);
    exc_ctx_options o = EXC_CTX_OPTIONS;
    bench tight = *b;
    o.backend = "cpu";
    o.threads = b->ctx->queue.workers;
    o.reproducible = b->ctx->opt.reproducible;
    o.memory = spec_bytes(&spec_random) / 2;
    bench_must(b, exc_ctx_create(&o, &tight.ctx), "a context with a budget");
    exc_prompts p = random_prompts(b, 16, b->quick ? 32 : 128, spec_random.vocab, 11), q = random_prompts(b, 16, 16, spec_random.vocab, 12);
    fed two[2] = {{.ctx = b->ctx, .m = open_model(b, dir, EXC_COMPUTE_BF16), .p = &p},
                  {.ctx = tight.ctx, .m = open_model(&tight, dir, EXC_COMPUTE_BF16), .p = &p}};
    if (wanted[0]) budget_pair(b, two, "prefill", 1);
    two[0].p = two[1].p = &q;
    if (wanted[1]) budget_pair(b, two, "decode", b->quick ? 2 : 8);
    for (int k = 0; k < 2; k++) {
        exc_replies_free(two[k].replies, two[k].p->count);
        exc_model_free(two[k].m);
    }
    exc_ctx_free(tight.ctx);
    release_prompts(&p);
    release_prompts(&q);
}

void engine_rows(bench *b)
{
    static const char *const names[] = {"prefill", "prefill_captured", "capture_prefill_overhead", "decode_1", "decode_1_captured",
        "capture_decode_overhead_1", "decode_16", "decode_16_captured", "capture_decode_overhead_16"};
    bool any = false;
    for (size_t i = 0; i < EXC_COUNT(names); i++) any |= bench_wanted(b, names[i]);
    if (any) {
        const char *dir = make_model(b, &spec_random, NULL);
        exc_model *m = open_model(b, dir, EXC_COMPUTE_BF16);
        prefill_rows(b, &spec_random, m, dir);
        decode_rows(b, &spec_random, m, 1, 0.75);
        decode_rows(b, &spec_random, m, 16, 0.60);
        exc_model_free(m);
    }
    demo_row(b);
    budget_rows(b);
}

/* ------------------------------------------------------------------------------------- the capture seen from outside */

/* Runs exc_capture and prints what it must hold: packed weights, session and stats. The parent reads the peak of this process. */
int capture_child(bench *b, const char *dir)
{
    exc_prompts target = random_prompts(b, 32, 128, spec_random.vocab, 9), baseline = random_prompts(b, 32, 128, spec_random.vocab, 10);
    exc_model *m = open_model(b, dir, EXC_COMPUTE_BF16);
    exc_capture_options o = EXC_CAPTURE_OPTIONS;
    exc_stats *stats = NULL;
    o.decode = 8;
    bench_must(b, exc_capture(b->ctx, m, &target, &baseline, &o, &stats, NULL), "capture");
    double groups = (double)(stats->moe_layers * stats->experts) * (8 * 3 + 8.0 * (double)(stats->inner + stats->hidden)) * 4;
    double prompts = 64.0 * (double)(stats->moe_layers * stats->experts * 4 + (stats->layers + 1) * stats->hidden * 4);
    printf("%.0f %.0f %.0f\n", (double)m->weight_bytes, m->spare ? (double)exc_session_bytes(m->spare) : 0, groups + prompts);
    exc_stats_free(stats);
    exc_model_free(m);
    return 0;
}

/* Opens a model, takes eight tokens through it and prints the one that follows. */
int token_child(bench *b, const char *dir)
{
    exc_prompts p = random_prompts(b, 1, 8, 8192, 13); /* the vocabulary of either model */
    exc_model *m = open_model(b, dir, EXC_COMPUTE_BF16);
    exc_decode d = {.step = "first token", .max_new = 1, .ignore_eos = true};
    exc_reply *replies = NULL;
    bench_must(b, exc_decode_run(b->ctx, m, &p, &d, &replies), "first token");
    printf("%d\n", replies[0].tokens[0]);
    return 0;
}
