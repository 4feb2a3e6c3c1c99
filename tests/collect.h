/* collect.h - a model run over prompts with everything it can tell kept: logits, hidden states, routing and the greedy
 * continuation, for the suites that compare them with goldens, with plain loops or with another run. */
#ifndef EXC_TEST_COLLECT_H
#define EXC_TEST_COLLECT_H

#include "models.h"

#include "model.h"

typedef struct result {
    const exc_prompts *p;
    const exc_shape *s;
    float **logits, **hidden, **weights; /* [P] */
    int32_t **ids;
    exc_reply *replies;
} result;

static inline int64_t length_of(const exc_prompts *p, int64_t i) { return p->begin[i + 1] - p->begin[i]; }

static inline void put_rows(exc_ctx *ctx, void *to, const void *from, int64_t planes, const exc_piece *x, int64_t n, int64_t width)
{
    for (int64_t i = 0; i < planes; i++)
        assert_int_equal(exc_device_get(ctx, (float *)to + (i * n + x->first) * width,
                                        (const float *)from + (i * x->step_rows + x->row) * width, (size_t)(x->rows * width) * 4),
                         EXC_OK);
}

static inline exc_status collect(exc_ctx *ctx, void *user, const exc_piece *x)
{
    result *r = user;
    int64_t n = length_of(r->p, x->prompt);
    put_rows(ctx, r->hidden[x->prompt], x->step->hidden, r->s->layers + 1, x, n, r->s->hidden);
    put_rows(ctx, r->ids[x->prompt], x->step->router_ids, r->s->moe_layers, x, n, r->s->top_k);
    put_rows(ctx, r->weights[x->prompt], x->step->router_weights, r->s->moe_layers, x, n, r->s->top_k);
    void *there;
    size_t count = (size_t)(x->rows * r->s->vocab);
    EXC_TRY(exc_device_alloc(ctx, count, 4, "logits", &there));
    exc_status st = exc_session_logits(x->session, x->row, x->rows, there);
    if (!st) st = exc_device_get(ctx, r->logits[x->prompt] + x->first * r->s->vocab, there, count * 4);
    exc_device_release(ctx, there);
    return st;
}

static inline exc_prompts make_prompts(int64_t count, const int64_t *lengths, int64_t vocab, uint64_t seed)
{
    exc_prompts p = {.count = count, .begin = calloc((size_t)count + 1, 8)};
    for (int64_t i = 0; i < count; i++) p.begin[i + 1] = p.begin[i] + lengths[i];
    p.tokens = calloc((size_t)p.begin[count] + 1, 4);
    for (int64_t i = 0; i < p.begin[count]; i++) p.tokens[i] = (int32_t)(exc_random_u64(seed, 7, (uint64_t)i) % (uint64_t)vocab);
    return p;
}

static inline exc_prompts golden_prompts(const char *model)
{
    size_t n;
    char path[256];
    snprintf(path, sizeof path, "models/%s/golden/prompts.jsonl", golden_of(model));
    char *text = test_read(test_data(path), &n);
    exc_prompts p = {.begin = calloc(65, 8), .tokens = calloc(8192, 4)};
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        json_t *o = json_loads(line, 0, NULL), *list = json_object_get(o, "tokens");
        p.begin[p.count + 1] = p.begin[p.count] + (int64_t)json_array_size(list);
        for (size_t i = 0; i < json_array_size(list); i++)
            p.tokens[p.begin[p.count] + (int64_t)i] = (int32_t)json_integer_value(json_array_get(list, i));
        p.count++;
        json_decref(o);
    }
    free(text);
    return p;
}

static inline void free_prompts(exc_prompts *p)
{
    free(p->begin);
    free(p->tokens);
}

static inline result run(exc_ctx *ctx, exc_model *m, const exc_prompts *p, int64_t new_tokens, int64_t batch, int64_t batch_tokens)
{
    const exc_shape *s = &m->atlas->shape;
    result r = {.p = p, .s = s};
    size_t P = (size_t)p->count;
    r.logits = calloc(P, sizeof(void *));
    r.hidden = calloc(P, sizeof(void *));
    r.weights = calloc(P, sizeof(void *));
    r.ids = calloc(P, sizeof(void *));
    for (size_t i = 0; i < P; i++) {
        size_t n = (size_t)length_of(p, (int64_t)i);
        r.logits[i] = calloc(n * (size_t)s->vocab, 4);
        r.hidden[i] = calloc(n * (size_t)((s->layers + 1) * s->hidden), 4);
        r.weights[i] = calloc(n * (size_t)(s->moe_layers * s->top_k), 4);
        r.ids[i] = calloc(n * (size_t)(s->moe_layers * s->top_k), 4);
    }
    exc_decode d = {.max_new = new_tokens, .ignore_eos = true, .batch = batch, .batch_tokens = batch_tokens, .hidden = true,
                    .routing = true, .visit = collect, .user = &r};
    exc_status st = exc_decode_run(ctx, m, p, &d, &r.replies);
    if (st) fail_msg("%s", exc_ctx_error(ctx));
    return r;
}

static inline void free_result(result *r)
{
    for (int64_t i = 0; i < r->p->count; i++) {
        free(r->logits[i]);
        free(r->hidden[i]);
        free(r->weights[i]);
        free(r->ids[i]);
    }
    free(r->logits);
    free(r->hidden);
    free(r->weights);
    free(r->ids);
    exc_replies_free(r->replies, r->p->count);
}

static inline exc_model *open_model(exc_ctx *ctx, const char *dir, exc_compute compute)
{
    exc_model_options opt = EXC_MODEL_OPTIONS;
    opt.compute = compute;
    exc_model *m = NULL;
    if (exc_model_open(ctx, dir, &opt, &m)) fail_msg("%s", exc_ctx_error(ctx));
    return m;
}

static inline const void *golden(const exc_tensors *g, int64_t prompt, const char *what)
{
    char name[64];
    if (prompt >= 0) snprintf(name, sizeof name, "p%lld.%s", (long long)prompt, what);
    else snprintf(name, sizeof name, "%s", what);
    const exc_tensor *t = exc_tensors_find(g, name);
    if (!t) fail_msg("golden has no %s", name);
    return exc_tensors_data(g, t);
}

typedef struct distance {
    double diff, norm;
} distance;

static inline void add_distance(distance *d, const float *a, const void *b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float g;
        memcpy(&g, (const char *)b + i * 4, 4);
        d->diff += ((double)a[i] - (double)g) * ((double)a[i] - (double)g);
        d->norm += (double)g * (double)g;
    }
}

static inline double relative(const distance *d) { return sqrt(d->diff / d->norm); }

static inline int same_set(const int32_t *a, const int32_t *b, int64_t k)
{
    for (int64_t i = 0; i < k; i++) {
        int found = 0;
        for (int64_t j = 0; j < k; j++) found |= a[i] == b[j];
        if (!found) return 0;
    }
    return 1;
}

typedef struct verdict {
    double logits, hidden, weights, same_experts;
    double unflipped; /* logits of positions whose routing and whose prompt's earlier routing all agree */
    int64_t greedy;   /* tokens equal, of 16 a prompt */
} verdict;

static inline verdict judge(const char *model, const result *r)
{
    char path[256];
    exc_ctx *ctx = test_ctx(1);
    exc_tensors *g;
    distance logits = {0}, hidden = {0}, weights = {0}, clean = {0};
    int64_t same = 0, pairs = 0;
    verdict v = {0};
    snprintf(path, sizeof path, "models/%s/golden/golden.safetensors", golden_of(model));
    assert_int_equal(exc_tensors_open(ctx, test_data(path), &g), EXC_OK);
    for (int64_t i = 0; i < r->p->count; i++) {
        int64_t n = length_of(r->p, i), M = r->s->moe_layers, K = r->s->top_k, V = r->s->vocab;
        add_distance(&logits, r->logits[i], golden(g, i, "logits"), (size_t)(n * V));
        add_distance(&hidden, r->hidden[i], golden(g, i, "hidden"), (size_t)((r->s->layers + 1) * n * r->s->hidden));
        const int32_t *ids = golden(g, i, "router_ids");
        const char *gw = golden(g, i, "router_weights");
        int flipped = 0;
        for (int64_t t = 0; t < n; t++) {
            for (int64_t l = 0; l < M; l++) {
                int64_t at = (l * n + t) * K;
                int equal = same_set(r->ids[i] + at, ids + at, K);
                same += equal;
                pairs++;
                flipped |= !equal;
                if (equal && !memcmp(r->ids[i] + at, ids + at, (size_t)K * 4))
                    add_distance(&weights, r->weights[i] + at, gw + at * 4, (size_t)K);
            }
            if (!flipped) add_distance(&clean, r->logits[i] + t * V, (const char *)golden(g, i, "logits") + t * V * 4, (size_t)V);
        }
        if (r->replies[i].count == 16) {
            const int32_t *greedy = golden(g, i, "greedy");
            for (int j = 0; j < 16; j++) v.greedy += r->replies[i].tokens[j] == greedy[j];
        }
    }
    exc_tensors_close(g);
    exc_ctx_free(ctx);
    v.logits = relative(&logits);
    v.hidden = relative(&hidden);
    v.weights = relative(&weights);
    v.same_experts = (double)same / (double)pairs;
    v.unflipped = relative(&clean);
    return v;
}

#endif
