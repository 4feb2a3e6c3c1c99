/* stats.c - from prompts to sums: against goldens of another implementation and against the routing of single
 * tokens; what is observed and what is not; halves that add up to the whole; files that come back as they
 * were and damaged ones that are refused; every allocation of the study failing once. */
#include "tiny.h"

#include "madeup.h"

static exc_ctx *ctx;

/* -------------------------------------------------------------------------------------------------- small
 * tools */

static int64_t length_of(const exc_prompts *p, int64_t i) { return p->begin[i + 1] - p->begin[i]; }

/* prompts first..first+count-1 of the golden set; content is left out: all tokens are observed */
static exc_prompts golden_prompts(int first, int count) {
    size_t n;
    char *text = test_read(test_data("models/qwen3_moe/golden/prompts.jsonl"), &n), *save = NULL;
    exc_prompts p = {.begin = calloc(65, 8), .tokens = calloc(8192, 4)};
    int i = 0;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save), i++) {
        if (i < first || i >= first + count) continue;
        json_t *o = json_loads(line, 0, NULL), *list = json_object_get(o, "tokens");
        p.begin[p.count + 1] = p.begin[p.count] + (int64_t)json_array_size(list);
        for (size_t k = 0; k < json_array_size(list); k++)
            p.tokens[p.begin[p.count] + (int64_t)k] = (int32_t)json_integer_value(json_array_get(list, k));
        p.count++;
        json_decref(o);
    }
    free(text);
    snprintf(p.hash, sizeof p.hash, "%032d", first * 100 + count);
    return p;
}

static void free_prompts(exc_prompts *p) {
    free(p->begin);
    free(p->tokens);
    free(p->content);
    memset(p, 0, sizeof *p);
}

static exc_model *open_golden(exc_ctx *c, exc_compute compute) {
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_model *m = NULL;
    o.compute = compute;
    if (exc_model_open(c, test_data("models/qwen3_moe"), &o, &m)) fail_msg("%s", exc_ctx_error(c));
    return m;
}

static exc_stats *capture(exc_ctx *c, exc_model *m, const exc_prompts *t, const exc_prompts *b, int decode,
                          int no_out, int batch) {
    exc_capture_options o = EXC_CAPTURE_OPTIONS;
    exc_stats *s = NULL;
    o.decode = decode;
    o.no_out = no_out;
    o.batch_tokens = batch;
    if (exc_capture(c, m, t, b, &o, &s, NULL)) fail_msg("%s", exc_ctx_error(c));
    return s;
}

/* |a - b| / |b| of f64 arrays; b may be unaligned */
static double apart(const double *a, const void *b, int64_t n) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        double g;
        memcpy(&g, (const char *)b + i * 8, 8);
        diff += (a[i] - g) * (a[i] - g);
        norm += g * g;
    }
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}

/* all arrays the same bits */
static void assert_same_stats(const exc_stats *a, const exc_stats *b) {
    exc_field fa[EXC_STATS_FIELDS], fb[EXC_STATS_FIELDS];
    exc_stats_fields(a, fa);
    exc_stats_fields(b, fb);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) {
        const void *x = exc_field_get(&fa[i]), *y = exc_field_get(&fb[i]);
        assert_int_equal(exc_field_count(&fa[i]), exc_field_count(&fb[i]));
        if (!x != !y) fail_msg("%s is in one of them", fa[i].name);
        if (x && memcmp(x, y, (size_t)exc_field_count(&fa[i]) * (exc_dtype_bits(fa[i].dtype) / 8)))
            fail_msg("%s differs", fa[i].name);
    }
    assert_memory_equal(a->layer_of, b->layer_of, (size_t)a->moe_layers * 8);
    assert_string_equal(a->fingerprint, b->fingerprint);
    assert_string_equal(a->options, b->options);
    assert_int_equal(a->decode, b->decode);
    for (int i = 0; i < 2; i++) assert_string_equal(a->prompt_hashes[i], b->prompt_hashes[i]);
}

/* ----------------------------------------------------------------------------------------------------
 * capture */

static const void *golden(const exc_tensors *g, const char *phase, const char *what) {
    char name[64];
    snprintf(name, sizeof name, "%s.%s", phase, what);
    const exc_tensor *t = exc_tensors_find(g, name);
    if (!t) fail_msg("golden has no %s", name);
    return exc_tensors_data(g, t);
}

/* the goldens are sums over all six prompts: target and baseline together must give them */
static void capture_matches_goldens(void **state) {
    exc_model *m = open_golden(ctx, EXC_COMPUTE_F32);
    exc_prompts t = golden_prompts(0, 4), b = golden_prompts(4, 2);
    exc_tensors *g;
    m->atlas->shape.n_eos = 0; /* the goldens do not stop */
    exc_stats *s = capture(ctx, m, &t, &b, 15, 0, 0);
    assert_int_equal(exc_tensors_open(ctx, test_data("models/qwen3_moe/golden/expert_stats.safetensors"), &g),
                     EXC_OK);
    int64_t ME = s->moe_layers * s->experts;
    for (int phase = 0; phase < 2; phase++) {
        const char *name = phase ? "decode" : "prefill";
        exc_group *x = &s->group[0][phase], *y = &s->group[1][phase];
        for (int64_t i = 0; i < s->moe_layers; i++)
            assert_int_equal(x->tokens[i] + y->tokens[i], phase ? 90 : 124);
        for (int64_t i = 0; i < ME; i++) {
            x->count[i] += y->count[i];
            x->gate_sum[i] += y->gate_sum[i];
            x->sqnorm_sum[i] += y->sqnorm_sum[i];
        }
        for (int64_t i = 0; i < ME * s->inner; i++) x->mid_sum[i] += y->mid_sum[i];
        for (int64_t i = 0; i < ME * s->hidden; i++) x->out_sum[i] += y->out_sum[i];
        assert_memory_equal(x->count, golden(g, name, "count"), (size_t)ME * 8);
        /* terms carry the f32 error of the states (the golden's own is 1.6e-6); sums average it */
        assert_true(apart(x->gate_sum, golden(g, name, "gate_sum"), ME) < 2e-6);
        assert_true(apart(x->mid_sum, golden(g, name, "mid_sum"), ME * s->inner) < 1e-5);
        assert_true(apart(x->out_sum, golden(g, name, "out_sum"), ME * s->hidden) < 1e-5);
        assert_true(apart(x->sqnorm_sum, golden(g, name, "sqnorm_sum"), ME) < 1e-5);
    }
    exc_tensors_close(g);
    exc_stats_free(s);
    free_prompts(&t);
    free_prompts(&b);
    exc_model_free(m);
}

typedef struct tally {
    const exc_prompts *p;
    const exc_shape *s;
    int64_t *count;         /* [M,E] */
    double *gate;           /* [M,E] */
    uint32_t *prompt_count; /* [P,M,E] */
    float *last;            /* [P,L+1,H] */
} tally;

/* counts choices one by one from the taps of the forward pass */
static exc_status count_piece(exc_ctx *c, void *user, const exc_piece *x) {
    tally *y = user;
    int64_t M = y->s->moe_layers, E = y->s->experts, K = y->s->top_k, H = y->s->hidden,
            n = length_of(y->p, x->prompt);
    for (int64_t r = 0; r < x->rows; r++) {
        int64_t token = x->first + r;
        if (token == n - 1)
            for (int64_t l = 0; l <= y->s->layers; l++)
                memcpy(y->last + (x->prompt * (y->s->layers + 1) + l) * H,
                       x->step->hidden + (l * x->step_rows + x->row + r) * H, (size_t)H * 4);
        if (token < n - 1 && !y->p->content[y->p->begin[x->prompt] + token]) continue;
        for (int64_t i = 0; i < M * K; i++) {
            int64_t at = (i / K * x->step_rows + x->row + r) * K + i % K, e = x->step->router_ids[at];
            y->count[i / K * E + e]++;
            y->gate[i / K * E + e] += (double)x->step->router_weights[at];
            y->prompt_count[(x->prompt * M + i / K) * E + e]++;
        }
    }
    return EXC_OK;
}

/* content and the last position are observed in prefill; counts by prompt and last states are those of the
 * single tokens */
static void capture_observes_content(void **state) {
    exc_model *m = open_golden(ctx, EXC_COMPUTE_F32);
    exc_prompts t = golden_prompts(2, 4), b = golden_prompts(0, 2);
    const exc_shape *p = &m->atlas->shape;
    int64_t ME = p->moe_layers * p->experts, observed = 0;
    t.content = calloc(8192, 1);
    for (int64_t i = 0; i < t.begin[t.count]; i++)
        observed += t.content[i] = i % 3 != 0 && i > 7; /* one prompt has none */
    for (int64_t i = 0; i < t.count; i++) observed += !t.content[t.begin[i + 1] - 1];
    tally y = {&t,
               p,
               calloc((size_t)ME, 8),
               calloc((size_t)ME, 8),
               calloc((size_t)(4 * ME), 4),
               calloc((size_t)(4 * (p->layers + 1) * p->hidden), 4)};
    exc_decode d = {.hidden = true, .routing = true, .visit = count_piece, .user = &y};
    assert_int_equal(exc_decode_run(ctx, m, &t, &d, NULL), EXC_OK);
    exc_stats *s = capture(ctx, m, &t, &b, 0, 0, 0);
    for (int64_t i = 0; i < p->moe_layers; i++) assert_int_equal(s->group[0][0].tokens[i], observed);
    assert_memory_equal(s->group[0][0].count, y.count, (size_t)ME * 8);
    assert_true(apart(s->group[0][0].gate_sum, y.gate, ME) < 1e-12);
    assert_memory_equal(s->prompt_count[0], y.prompt_count, (size_t)(4 * ME) * 4);
    assert_memory_equal(s->resid_last[0], y.last, (size_t)(4 * (p->layers + 1) * p->hidden) * 4);
    assert_non_null(strstr(s->options, "no other chat template"));
    for (int64_t i = 0; i < p->moe_layers; i++) assert_int_equal(s->group[0][1].tokens[i], 0);
    exc_stats_free(s);
    free(y.count);
    free(y.gate);
    free(y.prompt_count);
    free(y.last);
    free_prompts(&t);
    free_prompts(&b);
    exc_model_free(m);
}

/* an end token stops a reply and is not fed back */
static void capture_stops_at_end(void **state) {
    exc_model *m = open_golden(ctx, EXC_COMPUTE_F32);
    exc_prompts t = golden_prompts(0, 3), b = golden_prompts(3, 3);
    exc_reply *r = NULL;
    exc_capture_options o = EXC_CAPTURE_OPTIONS;
    exc_stats *s = NULL;
    char *text = NULL;
    m->atlas->shape.n_eos = 0;
    exc_decode d = {.max_new = 9};
    assert_int_equal(exc_decode_run(ctx, m, &t, &d, &r), EXC_OK);
    int32_t end = r[1].tokens[4];
    int64_t fed = 0, ended = 0;
    for (int64_t i = 0; i < 3; i++) {
        int64_t k = 0;
        while (k < 9 && r[i].tokens[k] != end) k++;
        ended += k < 9;
        fed += k < 8 ? k : 8;
    }
    exc_replies_free(r, 3);
    m->atlas->shape.n_eos = 1;
    m->atlas->shape.eos[0] = end;
    o.decode = 8;
    assert_int_equal(exc_capture(ctx, m, &t, &b, &o, &s, &text), EXC_OK);
    assert_true(ended >= 1 && fed < 24);
    assert_int_equal(s->group[0][1].tokens[0], fed);
    json_t *facts = json_loads(text, 0, NULL), *set = json_object_get(facts, "target");
    assert_int_equal(json_integer_value(json_object_get(set, "decoded")), fed);
    assert_int_equal(json_integer_value(json_object_get(set, "replies_ended")), ended);
    assert_int_equal(json_integer_value(json_object_get(set, "observed")), t.begin[3]);
    assert_non_null(json_object_get(facts, "observed"));
    json_decref(facts);
    exc_free(text);
    exc_stats_free(s);
    free_prompts(&t);
    free_prompts(&b);
    exc_model_free(m);
}

static void capture_same_for_threads(void **state) {
    exc_prompts t = golden_prompts(0, 3), b = golden_prompts(3, 3);
    exc_stats *s[2];
    for (int i = 0; i < 2; i++) {
        exc_ctx *c = test_ctx(i ? 3 : 1);
        exc_model *m = open_golden(c, EXC_COMPUTE_BF16);
        s[i] = capture(c, m, &t, &b, 4, 0, 0);
        exc_model_free(m);
        exc_ctx_free(c);
    }
    assert_same_stats(s[0], s[1]);
    for (int i = 0; i < 2; i++) exc_stats_free(s[i]);
    free_prompts(&t);
    free_prompts(&b);
}

/* halves add up to the whole: counts exactly; sums up to the f32 rounding of steps of other sizes */
static void halves_make_the_whole(void **state) {
    exc_model *m = open_golden(ctx, EXC_COMPUTE_F32);
    exc_prompts t = golden_prompts(0, 4), b = golden_prompts(2, 4), t1 = golden_prompts(0, 2),
                t2 = golden_prompts(2, 2), b1 = golden_prompts(2, 2), b2 = golden_prompts(4, 2);
    exc_stats *whole = capture(ctx, m, &t, &b, 6, 0, 0), *sum = capture(ctx, m, &t1, &b1, 6, 0, 0),
              *half = capture(ctx, m, &t2, &b2, 6, 0, 0);
    exc_field fw[EXC_STATS_FIELDS], fs[EXC_STATS_FIELDS], fh[EXC_STATS_FIELDS];
    exc_stats_fields(half, fh);
    exc_stats_fields(sum, fs);
    double first = sum->group[0][0].mid_sum[5], want = first + half->group[0][0].mid_sum[5];
    assert_int_equal(exc_stats_add(ctx, sum, half), EXC_OK);
    assert_true(sum->group[0][0].mid_sum[5] == want); /* the addition itself is one f64 addition */
    exc_stats_fields(whole, fw);
    exc_stats_fields(sum, fs);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) {
        int64_t n = exc_field_count(&fw[i]);
        assert_int_equal(n, exc_field_count(&fs[i]));
        if (!exc_field_get(&fw[i])) continue;
        if (fw[i].dtype == EXC_I64 || fw[i].dtype == EXC_U32)
            assert_memory_equal(exc_field_get(&fw[i]), exc_field_get(&fs[i]),
                                (size_t)n * exc_dtype_bits(fw[i].dtype) / 8);
        else if (fw[i].dtype == EXC_F64)
            assert_true(apart(exc_field_get(&fs[i]), exc_field_get(&fw[i]), n) < 2e-6);
        else
            assert_true(test_relative(exc_field_get(&fs[i]), exc_field_get(&fw[i]), (size_t)n) < 1e-5);
    }
    char hashes[80];
    snprintf(hashes, sizeof hashes, "%s,%s", t1.hash, t2.hash);
    assert_string_equal(sum->prompt_hashes[0], hashes);
    assert_int_equal(sum->prompts[1], 4);
    /* a sum can be added to itself */
    int64_t count = sum->group[1][1].count[3];
    assert_int_equal(exc_stats_add(ctx, sum, sum), EXC_OK);
    assert_int_equal(sum->group[1][1].count[3], 2 * count);
    assert_int_equal(sum->prompts[0], 8);
    assert_int_equal(exc_stats_check(ctx, sum, "sum"), EXC_OK);
    exc_stats_free(whole);
    exc_stats_free(sum);
    exc_stats_free(half);
    exc_prompts *all[] = {&t, &b, &t1, &t2, &b1, &b2};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free_prompts(all[i]);
    exc_model_free(m);
}

/* with --reproducible the bits of every array follow from the prompts alone: any batching, any number of threads; and sums of
 * parts are those of the whole but for out_sum, which each part makes from its own mid_sum */
static void reproducible_for_any_split(void **state) {
    static const int batch[] = {0, 7, 33, 1000}, threads[] = {2, 1, 3, 2};
    exc_prompts t = golden_prompts(0, 3), b = golden_prompts(3, 3), t1 = golden_prompts(0, 1), t2 = golden_prompts(1, 2),
                b1 = golden_prompts(3, 2), b2 = golden_prompts(5, 1);
    for (int compute = 0; compute < 2; compute++) {
        exc_stats *s[4], *part[2];
        for (int i = 0; i < 4; i++) {
            exc_ctx_options o = EXC_CTX_OPTIONS;
            exc_ctx *c;
            o.backend = "cpu";
            o.threads = threads[i];
            o.reproducible = 1;
            assert_int_equal(exc_ctx_create(&o, &c), EXC_OK);
            exc_model *m = open_golden(c, (exc_compute)compute);
            s[i] = capture(c, m, &t, &b, 4, 0, batch[i]);
            for (int p = 0; p < 2 && i == 3; p++) part[p] = capture(c, m, p ? &t2 : &t1, p ? &b2 : &b1, 4, 0, 11);
            exc_model_free(m);
            exc_ctx_free(c);
            if (i) assert_same_stats(s[0], s[i]);
        }
        assert_non_null(strstr(s[0]->options, "\"reproducible\":true"));
        assert_int_equal(exc_stats_add(ctx, part[1], part[0]), EXC_OK); /* the other way round, too */
        exc_field whole[EXC_STATS_FIELDS], sum[EXC_STATS_FIELDS];
        exc_stats_fields(s[0], whole);
        exc_stats_fields(part[1], sum);
        for (int i = 0; i < EXC_STATS_FIELDS; i++) {
            int64_t n = exc_field_count(&whole[i]);
            if (!exc_field_get(&whole[i]) || whole[i].by_prompt) continue;
            if (strstr(whole[i].name, "out_sum"))
                assert_true(apart(exc_field_get(&sum[i]), exc_field_get(&whole[i]), n) < 1e-14);
            else if (memcmp(exc_field_get(&sum[i]), exc_field_get(&whole[i]), (size_t)n * 8))
                fail_msg("%s differs", whole[i].name);
        }
        for (int i = 0; i < 4; i++) exc_stats_free(s[i]);
        for (int i = 0; i < 2; i++) exc_stats_free(part[i]);
    }
    exc_prompts *all[] = {&t, &b, &t1, &t2, &b1, &b2};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free_prompts(all[i]);
}

static int warned;
static int count_warnings(void *user, const exc_event *e) {
    warned += e->kind == EXC_EVENT_WARNING;
    return 0;
}

static void capture_refusals(void **state) {
    exc_model *m = open_golden(ctx, EXC_COMPUTE_BF16);
    exc_prompts t = golden_prompts(0, 3), b = golden_prompts(3, 3), other = golden_prompts(0, 3),
                none = golden_prompts(0, 0);
    exc_capture_options o = EXC_CAPTURE_OPTIONS;
    exc_stats *s = NULL;
    test_refused(ctx, exc_capture(ctx, m, &t, &other, NULL, &s, NULL), EXC_ERR_INPUT, "target", "baseline",
                 "same 3", NULL);
    /* the same prompts in another order are the same set */
    int64_t n = other.begin[3];
    memcpy(other.tokens, t.tokens + t.begin[1], (size_t)(n - t.begin[1]) * 4);
    memcpy(other.tokens + n - t.begin[1], t.tokens, (size_t)t.begin[1] * 4);
    other.begin[1] = length_of(&t, 1);
    other.begin[2] = other.begin[1] + length_of(&t, 2);
    test_refused(ctx, exc_capture(ctx, m, &t, &other, NULL, &s, NULL), EXC_ERR_INPUT, "different prompts",
                 NULL);
    /* a shared one is only worth a warning */
    other.tokens[0] = other.tokens[0] ? 0 : 1;
    ctx->opt.on_event = count_warnings;
    warned = 0;
    assert_int_equal(exc_capture(ctx, m, &t, &other, NULL, &s, NULL), EXC_OK);
    ctx->opt.on_event = NULL;
    assert_int_equal(warned, 1);
    exc_stats_free(s);
    s = NULL;
    test_refused(ctx, exc_capture(ctx, m, &none, &b, NULL, &s, NULL), EXC_ERR_INPUT, "target set",
                 "at least one prompt", NULL);
    b.content = calloc(8192, 1);
    test_refused(ctx, exc_capture(ctx, m, &t, &b, NULL, &s, NULL), EXC_ERR_INPUT, "baseline set",
                 "text of their own", NULL);
    free(b.content);
    b.content = NULL;
    b.tokens[5] = (int32_t)m->atlas->shape.vocab;
    test_refused(ctx, exc_capture(ctx, m, &t, &b, NULL, &s, NULL), EXC_ERR_INPUT, "baseline set: prompt",
                 "vocab_size", NULL);
    b.tokens[5] = 0;
    o.decode = -1;
    test_refused(ctx, exc_capture(ctx, m, &t, &b, &o, &s, NULL), EXC_ERR_USAGE, "decode", NULL);
    test_refused(ctx, exc_capture(ctx, m, &t, NULL, NULL, &s, NULL), EXC_ERR_USAGE, "two prompt sets", NULL);
    assert_null(s);
    exc_prompts *all[] = {&t, &b, &other, &none};
    for (size_t i = 0; i < EXC_COUNT(all); i++) free_prompts(all[i]);
    exc_model_free(m);
}

static void spoil_norm(void *user, tiny_tensor *x) {
    if (strstr(x->name, "layers.1.post_attention")) x->value[3] = 3e38;
    if (strstr(x->name, "layers.1.mlp.experts.0.down_proj"))
        for (int64_t i = 0; i < x->count; i++) x->value[i] = 1e38;
}

/* weights are finite, activations are not: refused while it runs, saying where */
static void capture_overflow(void **state) {
    tiny t = tiny_default();
    char *dir = test_tmpdir();
    t.dtype = "F32";
    t.spoil = spoil_norm;
    tiny_write(&t, dir);
    exc_model_options o = EXC_MODEL_OPTIONS;
    o.compute = EXC_COMPUTE_F32;
    exc_model *m = NULL;
    exc_stats *s = NULL;
    if (exc_model_open(ctx, dir, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
    exc_prompts a = golden_prompts(2, 1), b = golden_prompts(3, 1);
    for (int i = 0; i < 40; i++) a.tokens[i] %= 101, b.tokens[i] %= 101;
    test_refused(ctx, exc_capture(ctx, m, &a, &b, NULL, &s, NULL), EXC_ERR_NUMERIC, "NaN or infinity", NULL);
    assert_null(s);
    free_prompts(&a);
    free_prompts(&b);
    exc_model_free(m);
    tiny_free(&t);
}

static void spoil_large(void *user, tiny_tensor *x) {
    double factor = strstr(x->name, "experts") && strstr(x->name, "up_proj") ? 1e9 : strstr(x->name, "down_proj") ? 1e-9 : 1;
    for (int64_t i = 0; i < x->count; i++) x->value[i] *= factor;
}

/* intermediate sums beyond 2^53 units: right, and the promise of bits is taken back aloud, once an array */
static void capture_beyond_fixed_point(void **state) {
    tiny t = tiny_default();
    char *dir = test_tmpdir();
    t.dtype = "F32";
    t.spoil = spoil_large;
    tiny_write(&t, dir);
    exc_prompts a = golden_prompts(2, 1), b = golden_prompts(3, 1);
    for (int i = 0; i < 40; i++) a.tokens[i] %= 101, b.tokens[i] %= 101;
    for (int reproducible = 0; reproducible < 2; reproducible++) {
        exc_ctx_options o = EXC_CTX_OPTIONS;
        o.backend = "cpu";
        exc_model *m = NULL;
        exc_ctx *c;
        o.reproducible = reproducible;
        o.on_event = count_warnings;
        assert_int_equal(exc_ctx_create(&o, &c), EXC_OK);
        if (exc_model_open(c, dir, NULL, &m)) fail_msg("%s", exc_ctx_error(c));
        warned = 0;
        exc_stats_free(capture(c, m, &a, &b, 0, 0, 0));
        assert_int_equal(warned, reproducible ? 2 : 0);
        exc_model_free(m);
        exc_ctx_free(c);
    }
    free_prompts(&a);
    free_prompts(&b);
    tiny_free(&t);
}

/* -------------------------------------------------------------------------------------------------------
 * files */

static void stats_come_back(void **state) {
    char *dir = test_tmpdir();
    for (int out = 0; out < 2; out++) {
        exc_stats *s = made_up(ctx, 5, 3, 4, 3, 7, 11, out), *back = NULL;
        const char *path = test_path(dir, "s.safetensors"), *dtype = NULL;
        int rank = 0;
        int64_t shape[4];
        assert_int_equal(exc_stats_save(ctx, s, path, out), EXC_OK);
        if (exc_stats_load(ctx, path, &back)) fail_msg("%s", exc_ctx_error(ctx));
        assert_same_stats(s, back);
        test_refused(ctx, exc_stats_save(ctx, s, path, 0), EXC_ERR_USAGE, "s.safetensors", NULL);
        assert_ptr_equal(exc_stats_array(back, "target.prefill.count", &dtype, &rank, shape),
                         back->group[0][0].count);
        assert_string_equal(dtype, "I64");
        assert_true(rank == 2 && shape[0] == 3 && shape[1] == 7);
        assert_ptr_equal(exc_stats_array(back, "baseline.resid_last", &dtype, &rank, shape),
                         back->resid_last[1]);
        assert_string_equal(dtype, "F32");
        assert_true(rank == 3 && shape[0] == 3 && shape[1] == 5 && shape[2] == 11);
        assert_true((exc_stats_array(back, "baseline.decode.out_sum", NULL, NULL, NULL) != NULL) ==
                    (out == 1));
        assert_null(exc_stats_array(back, "target.decode.shared_out_sum", NULL, NULL, NULL));
        assert_null(exc_stats_array(back, "nothing", NULL, NULL, NULL));
        exc_tensors *file;
        assert_int_equal(exc_tensors_open(ctx, path, &file), EXC_OK);
        assert_string_equal(json_string_value(json_object_get(file->metadata, "layers")), "1,2,3");
        assert_string_equal(json_string_value(json_object_get(file->metadata, "target_prompts")), "aa");
        exc_tensors_close(file);
        exc_stats_free(s);
        exc_stats_free(back);
    }
}

/* saves s (its numbers may be nonsense), loads it, and wants a refusal that names the two words */
static void refuse_saved(exc_stats *s, const char *dir, exc_status want, const char *a, const char *b) {
    exc_stats *back = NULL;
    const char *path = test_path(dir, "bad.safetensors");
    if (exc_stats_save(ctx, s, path, 1)) fail_msg("%s", exc_ctx_error(ctx));
    test_refused(ctx, exc_stats_load(ctx, path, &back), want, "bad.safetensors", a, b, NULL);
    assert_null(back);
}

/* the first occurrence of a text in the file, replaced by one of the same length */
static void refuse_patched(const char *good, const char *dir, const char *from, const char *to,
                           const char *a) {
    size_t n;
    char *text = test_read(good, &n), *at = memmem(text, n, from, strlen(from));
    exc_stats *back = NULL;
    assert_true(at && strlen(from) == strlen(to));
    memcpy(at, to, strlen(to));
    test_write(test_path(dir, "patched.safetensors"), text, n);
    free(text);
    test_refused(ctx, exc_stats_load(ctx, test_path(dir, "patched.safetensors"), &back), EXC_ERR_INPUT,
                 "patched", a, NULL);
    assert_null(back);
}

static void damaged_stats_are_refused(void **state) {
    char *dir = test_tmpdir();
    exc_stats *s = made_up(ctx, 5, 3, 4, 3, 7, 11, true), *back = NULL;
    char good[512];
    size_t n;
    snprintf(good, sizeof good, "%s", test_path(dir, "good.safetensors"));
    assert_int_equal(exc_stats_save(ctx, s, good, 0), EXC_OK);
    /* numbers */
    double keep = s->group[1][0].gate_sum[4];
    s->group[1][0].gate_sum[4] = (double)NAN;
    refuse_saved(s, dir, EXC_ERR_NUMERIC, "baseline.prefill.gate_sum", "element 4");
    s->group[1][0].gate_sum[4] = keep;
    s->resid_last[0][17] = INFINITY;
    refuse_saved(s, dir, EXC_ERR_NUMERIC, "target.resid_last", "element 17");
    s->resid_last[0][17] = 0;
    s->group[0][0].count[2]++;
    refuse_saved(s, dir, EXC_ERR_INPUT, "target.prefill.count", "layer 1");
    s->group[0][0].count[2] -= 2;
    s->group[0][0].count[3]++;
    refuse_saved(s, dir, EXC_ERR_INPUT, "target.prompt_count", "expert 2");
    s->group[0][0].count[2]++;
    s->group[0][0].count[3]--;
    s->group[0][1].count[0] = -1;
    refuse_saved(s, dir, EXC_ERR_INPUT, "target.decode.count", "found -1");
    exc_stats_free(s);
    /* headers */
    refuse_patched(good, dir, "\"excise_stats\":\"1\"", "\"excise_stats\":\"9\"", "format version");
    refuse_patched(good, dir, "\"layers\":\"1,2,3\"", "\"layers\":\"1,3,2\"", "ascending");
    refuse_patched(good, dir, "\"layers\":\"1,2,3\"", "\"layers\":\"1,2,9\"", "below 4");
    refuse_patched(good, dir, "\"layers\":\"1,2,3\"", "\"layerz\":\"1,2,3\"", "layers");
    refuse_patched(good, dir, "\"top_k\":\"2\"", "\"top_k\":\"8\"", "1..7");
    refuse_patched(good, dir, "\"top_k\":\"2\"", "\"top_k\":\"1\"", "choices");
    refuse_patched(good, dir, "0123456789abcdef", "0123456789ABCDEF", "fingerprint");
    refuse_patched(good, dir, "baseline.decode.tokens", "baseline.decode.tokenz", "baseline.decode.tokens");
    refuse_patched(good, dir, "baseline.decode.out_sum", "baseline.decode.out_zum", ".out_sum");
    refuse_patched(good, dir, "target.prompt_count", "target.prompt_counz", "target.prompt_count");
    /* not a stats file at all, and none */
    test_refused(ctx,
                 exc_stats_load(ctx, test_data("models/qwen3_moe/golden/expert_stats.safetensors"), &back),
                 EXC_ERR_INPUT, "target.prefill.mid_sum", NULL);
    test_refused(ctx, exc_stats_load(ctx, test_path(dir, "absent"), &back), EXC_ERR_IO, "absent", NULL);
    /* cut anywhere, a byte changed anywhere: refused or whole, never a crash */
    char *text = test_read(good, &n);
    for (size_t cut = 0; cut < n; cut += cut < 64 ? 1 : n / 40 + 1) {
        test_write(test_path(dir, "cut"), text, cut);
        assert_true(exc_stats_load(ctx, test_path(dir, "cut"), &back) != EXC_OK && !back);
    }
    for (uint64_t i = 0; i < 400; i++) {
        size_t at = (size_t)(exc_random_u64(3, 1, i) % (i % 2 ? n : 3000));
        char old = text[at];
        text[at] = (char)exc_random_u64(3, 2, i);
        test_write(test_path(dir, "flip"), text, n);
        exc_status st = exc_stats_load(ctx, test_path(dir, "flip"), &back);
        assert_true((st == EXC_OK) == (back != NULL) && (st == EXC_OK || exc_ctx_error(ctx)[0]));
        exc_stats_free(back);
        text[at] = old;
    }
    free(text);
}

static void strangers_are_not_added(void **state) {
    exc_stats *a = made_up(ctx, 3, 3, 4, 2, 5, 6, true), *b[6];
    const char *says[] = {"another model",    "experts", "options",
                          "different layers", "out_sum", "tokens fed back"};
    b[0] = made_up(ctx, 3, 3, 4, 2, 5, 6, true);
    b[0]->fingerprint[3] = 'f';
    b[1] = made_up(ctx, 3, 3, 4, 2, 6, 6, true);
    b[2] = made_up(ctx, 3, 3, 4, 2, 5, 6, true);
    b[2]->options[2] = 'x';
    b[3] = made_up(ctx, 3, 3, 4, 2, 5, 6, true);
    b[3]->layer_of[0] = 0;
    b[4] = made_up(ctx, 3, 3, 4, 2, 5, 6, false);
    b[5] = made_up(ctx, 3, 3, 4, 2, 5, 6, true);
    b[5]->decode = 4;
    for (int i = 0; i < 6; i++) {
        test_refused(ctx, exc_stats_add(ctx, a, b[i]), EXC_ERR_INPUT, says[i], NULL);
        exc_stats_free(b[i]);
    }
    b[0] = made_up(ctx, 3, 3, 4, 2, 5, 6, true);
    assert_same_stats(a, b[0]); /* a refusal changes nothing */
    exc_stats_free(b[0]);
    exc_stats_free(a);
}

/* ------------------------------------------------------------------------------------------------------
 * memory */

typedef struct world {
    exc_model *m;
    exc_prompts t, b;
    exc_stats *s, *other;
    exc_dirs *d;
    char dir[512];
} world;

static exc_status do_capture(world *w) {
    exc_capture_options o = {sizeof o, 2, 0, 0};
    exc_stats *s = NULL;
    char *json = NULL;
    exc_status st = exc_capture(ctx, w->m, &w->t, &w->b, &o, &s, &json);
    assert_true((st == EXC_OK) == (s != NULL));
    exc_stats_free(s);
    exc_free(json);
    return st;
}

static exc_status do_files(world *w) {
    exc_stats *s = NULL;
    exc_dirs *d = NULL;
    exc_status st = exc_stats_save(ctx, w->s, test_path(w->dir, "s"), 1);
    if (st == EXC_OK) st = exc_stats_load(ctx, test_path(w->dir, "s"), &s);
    if (st == EXC_OK) st = exc_dirs_save(ctx, w->d, test_path(w->dir, "d"), 1);
    if (st == EXC_OK) st = exc_dirs_load(ctx, test_path(w->dir, "d"), &d);
    exc_stats_free(s);
    exc_dirs_free(d);
    return st;
}

static exc_status do_add(world *w) { return exc_stats_add(ctx, w->s, w->other); }

static exc_status do_directions(world *w) {
    exc_directions_options o = {sizeof o, EXC_METHOD_WHITENED, 2, 1};
    exc_dirs *d = NULL;
    char *json = NULL;
    exc_status st = exc_directions(ctx, w->other, &o, &d, &json);
    assert_true((st == EXC_OK) == (d != NULL));
    exc_dirs_free(d);
    exc_free(json);
    return st;
}

static exc_status do_contrast(world *w) {
    exc_contrast_options o = {sizeof o, 0, 20, 0};
    char *json = NULL;
    exc_status st = exc_contrast(ctx, w->other, w->d, &o, test_path(w->dir, "e.csv"), 1, &json);
    assert_true(st == EXC_OK || !json);
    exc_free(json);
    return st;
}

/* every allocation fails once: said in one line, nothing lost, no crash, and the next try works */
static void each_allocation_fails(void **state) {
    exc_status (*const job[])(world *) = {do_capture, do_files, do_directions, do_contrast, do_add};
    world w = {.m = open_golden(ctx, EXC_COMPUTE_BF16), .t = golden_prompts(0, 2), .b = golden_prompts(2, 2)};
    w.s = made_up(ctx, 4, 5, 3, 3, 4, 16, true);
    w.other = made_up(ctx, 6, 5, 3, 3, 4, 16, true);
    exc_stats *fresh = made_up(ctx, 4, 5, 3, 3, 4, 16, true);
    exc_directions_options svd = {sizeof svd, EXC_METHOD_SVD, 2, 1};
    assert_int_equal(exc_directions(ctx, w.other, &svd, &w.d, NULL), EXC_OK);
    snprintf(w.dir, sizeof w.dir, "%s", test_tmpdir());
    for (size_t j = 0; j < EXC_COUNT(job); j++) {
        uint64_t n = 1;
        for (;; n++) {
            exc_alloc_fail_at(n);
            exc_status st = job[j](&w);
            exc_alloc_fail_at(0);
            if (st != EXC_OK) assert_same_stats(w.s, fresh); /* nothing is half added */
            if (st == EXC_OK) break;
            assert_int_equal(st, EXC_ERR_MEMORY);
            assert_true(exc_ctx_error(ctx)[0] != 0);
            assert_true(n < 400);
        }
        assert_true(n > 4);
    }
    exc_stats_free(fresh);
    exc_stats_free(w.s);
    exc_stats_free(w.other);
    exc_dirs_free(w.d);
    free_prompts(&w.t);
    free_prompts(&w.b);
    exc_model_free(w.m);
}

static int stop_at;
static int cancel(void *user, const exc_event *e) { return e->kind == EXC_EVENT_PROGRESS && --stop_at < 0; }

/* asked to stop at any of its events, capture stops and hands out nothing */
static void capture_cancels(void **state) {
    exc_model *m = open_golden(ctx, EXC_COMPUTE_BF16);
    exc_prompts t = golden_prompts(0, 2), b = golden_prompts(2, 2);
    exc_stats *s = NULL;
    exc_status st = EXC_CANCELLED;
    int at = 0;
    ctx->opt.on_event = cancel;
    for (; st != EXC_OK && at < 100; at++) {
        stop_at = at;
        st = exc_capture(ctx, m, &t, &b, NULL, &s, NULL);
        assert_true(st == EXC_OK || (st == EXC_CANCELLED && !s));
    }
    ctx->opt.on_event = NULL;
    assert_true(st == EXC_OK && at > 3);
    exc_stats_free(s);
    free_prompts(&t);
    free_prompts(&b);
    exc_model_free(m);
}

static int begin(void **state) {
    ctx = test_ctx(2);
    return 0;
}

static int end(void **state) {
    exc_ctx_free(ctx);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(capture_matches_goldens), cmocka_unit_test(capture_observes_content),
        cmocka_unit_test(capture_stops_at_end),    cmocka_unit_test(capture_same_for_threads),
        cmocka_unit_test(reproducible_for_any_split),
        cmocka_unit_test(halves_make_the_whole),   cmocka_unit_test(capture_refusals),
        cmocka_unit_test(capture_beyond_fixed_point),
        cmocka_unit_test(capture_overflow),        cmocka_unit_test(capture_cancels),
        cmocka_unit_test(stats_come_back),         cmocka_unit_test(damaged_stats_are_refused),
        cmocka_unit_test(strangers_are_not_added), cmocka_unit_test(each_allocation_fails),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
