/* emit.c - the verbs forward and generate: a run of the model written to a file. forward keeps, for each
 * prompt, what its options ask for (logits of every position, the residual stream, routing, greedy tokens) as
 * one safetensors file; a prompt's arrays are put together from the pieces its prefill came in and go out as
 * soon as it is whole. generate writes one JSON line a prompt. Both outputs appear under their name only when
 * complete. */
#include <string.h>
#include <unistd.h>

#include "model.h"

typedef struct sink {
    exc_writer *w;
    const exc_prompts *p;
    const exc_forward_options *opt;
    const exc_shape *s;
    float *logits;  /* [T,V] of the prompt in work; T the longest */
    void *there;    /* as many where ops run; NULL: they write to `logits` */
    float *hidden;  /* [L+1,T,H] */
    int32_t *ids;   /* [M,T,K] */
    float *weights; /* [M,T,K] */
} sink;

static int64_t prompt_length(const exc_prompts *p, int64_t i) { return p->begin[i + 1] - p->begin[i]; }

/* buffers and cache of the run just done */
static json_int_t state_bytes(const exc_model *m) {
    return m->spare ? (json_int_t)exc_session_bytes(m->spare) : 0;
}

static exc_status declare(exc_writer *w, const char *what, int64_t i, exc_dtype dtype, int rank, int64_t a,
                          int64_t b, int64_t c) {
    char name[64];
    snprintf(name, sizeof name, "p%lld.%s", (long long)i, what);
    return exc_writer_declare(w, name, dtype, rank, (int64_t[]){a, b, c});
}

static exc_status put(exc_writer *w, const char *what, int64_t i, const void *data, int64_t count,
                      size_t size) {
    char name[64];
    snprintf(name, sizeof name, "p%lld.%s", (long long)i, what);
    return exc_writer_put(w, name, data, (size_t)count * size);
}

static exc_status declare_all(const sink *k) {
    const exc_shape *s = k->s;
    for (int64_t i = 0; i < k->p->count; i++) {
        int64_t n = prompt_length(k->p, i);
        EXC_TRY(declare(k->w, "tokens", i, EXC_I32, 1, n, 0, 0));
        if (k->opt->emit_logits) EXC_TRY(declare(k->w, "logits", i, EXC_F32, 2, n, s->vocab, 0));
        if (k->opt->emit_hidden) EXC_TRY(declare(k->w, "hidden", i, EXC_F32, 3, s->layers + 1, n, s->hidden));
        if (k->opt->emit_routing) {
            EXC_TRY(declare(k->w, "router_ids", i, EXC_I32, 3, s->moe_layers, n, s->top_k));
            EXC_TRY(declare(k->w, "router_weights", i, EXC_F32, 3, s->moe_layers, n, s->top_k));
        }
        if (k->opt->generate > 0) EXC_TRY(declare(k->w, "greedy", i, EXC_I32, 1, k->opt->generate, 0, 0));
    }
    return EXC_OK;
}

/* fetches rows of planes [planes, step_rows, width] into [planes, n, width] at row `first` */
static exc_status splice(exc_ctx *ctx, void *to, const void *from, int64_t planes, const exc_piece *piece, int64_t n,
                   int64_t width) {
    size_t row = (size_t)width * 4;
    for (int64_t i = 0; i < planes; i++)
        EXC_TRY(exc_device_get(ctx, (uint8_t *)to + (size_t)(i * n + piece->first) * row,
                               (const uint8_t *)from + (size_t)(i * piece->step_rows + piece->row) * row,
                               (size_t)piece->rows * row));
    return EXC_OK;
}

static exc_status fetch_logits(exc_ctx *ctx, const sink *k, const exc_piece *piece) {
    float *here = k->logits + piece->first * k->s->vocab, *there = exc_device_side(ctx, here, k->there);
    EXC_TRY(exc_session_logits(piece->session, piece->row, piece->rows, there));
    return exc_device_get(ctx, here, there, (size_t)(piece->rows * k->s->vocab) * sizeof *here);
}

static exc_status visit(exc_ctx *ctx, void *user, const exc_piece *piece) {
    sink *k = user;
    const exc_shape *s = k->s;
    int64_t i = piece->prompt, n = prompt_length(k->p, i);
    if (k->logits) EXC_TRY(fetch_logits(ctx, k, piece));
    if (k->hidden) EXC_TRY(splice(ctx, k->hidden, piece->step->hidden, s->layers + 1, piece, n, s->hidden));
    if (k->ids) {
        EXC_TRY(splice(ctx, k->ids, piece->step->router_ids, s->moe_layers, piece, n, s->top_k));
        EXC_TRY(splice(ctx, k->weights, piece->step->router_weights, s->moe_layers, piece, n, s->top_k));
    }
    if (piece->first + piece->rows < n) return EXC_OK;
    EXC_TRY(put(k->w, "tokens", i, k->p->tokens + k->p->begin[i], n, 4));
    if (k->logits) EXC_TRY(put(k->w, "logits", i, k->logits, n * s->vocab, 4));
    if (k->hidden) EXC_TRY(put(k->w, "hidden", i, k->hidden, (s->layers + 1) * n * s->hidden, 4));
    if (k->ids) {
        EXC_TRY(put(k->w, "router_ids", i, k->ids, s->moe_layers * n * s->top_k, 4));
        EXC_TRY(put(k->w, "router_weights", i, k->weights, s->moe_layers * n * s->top_k, 4));
    }
    return EXC_OK;
}

static size_t longest_prompt(const exc_prompts *p) {
    size_t longest = 1;
    for (int64_t i = 0; i < p->count; i++)
        if ((size_t)prompt_length(p, i) > longest) longest = (size_t)prompt_length(p, i);
    return longest;
}

/* bytes of the buffers below; on a device those that lie there */
static uint64_t held(const exc_ctx *ctx, const sink *k) {
    const exc_shape *s = k->s;
    int64_t values = k->logits ? s->vocab : 0;
    if (!ctx->module) values += (k->hidden ? (s->layers + 1) * s->hidden : 0) + (k->ids ? 2 * s->moe_layers * s->top_k : 0);
    return longest_prompt(k->p) * (uint64_t)values * 4;
}

static exc_status get_buffers(exc_ctx *ctx, sink *k) {
    const exc_shape *s = k->s;
    size_t longest = longest_prompt(k->p);
    size_t routing = longest * (size_t)(s->moe_layers * s->top_k);
    if (k->opt->emit_logits &&
        !(k->logits = exc_alloc(ctx, longest * (size_t)s->vocab, 4, "logits of a prompt")))
        return EXC_ERR_MEMORY;
    if (k->opt->emit_logits) EXC_TRY(exc_device_mirror(ctx, longest * (size_t)s->vocab, 4, "logits of a prompt", &k->there));
    if (k->opt->emit_hidden && !(k->hidden = exc_alloc(ctx, longest * (size_t)((s->layers + 1) * s->hidden),
                                                       4, "hidden states of a prompt")))
        return EXC_ERR_MEMORY;
    if (k->opt->emit_routing) {
        if (!(k->ids = exc_alloc(ctx, routing, 4, "routing of a prompt"))) return EXC_ERR_MEMORY;
        if (!(k->weights = exc_alloc(ctx, routing, 4, "routing of a prompt"))) return EXC_ERR_MEMORY;
    }
    return EXC_OK;
}

static exc_status run_forward(exc_ctx *ctx, exc_model *m, sink *k) {
    EXC_TRY(exc_prompts_check(ctx, m, k->p, k->opt->generate > 0 ? k->opt->generate - 1 : 0));
    EXC_TRY(exc_writer_meta(k->w, "excise_forward", "1"));
    EXC_TRY(exc_writer_meta(k->w, "model_fingerprint", m->atlas->fingerprint));
    EXC_TRY(exc_writer_meta(k->w, "compute", m->compute == EXC_COMPUTE_F32 ? "f32" : "bf16"));
    EXC_TRY(exc_writer_meta(k->w, "prompts", k->p->hash));
    EXC_TRY(declare_all(k));
    EXC_TRY(get_buffers(ctx, k));
    exc_decode d = {.max_new = k->opt->generate,
                    .ignore_eos = true,
                    .batch_tokens = k->opt->batch_tokens,
                    .held = held(ctx, k),
                    .step = "forward",
                    .hidden = k->opt->emit_hidden,
                    .routing = k->opt->emit_routing,
                    .visit = visit,
                    .user = k};
    exc_reply *replies = NULL;
    EXC_TRY(exc_decode_run(ctx, m, k->p, &d, &replies));
    exc_status st = EXC_OK;
    for (int64_t i = 0; i < k->p->count && k->opt->generate > 0 && !st; i++)
        st = put(k->w, "greedy", i, replies[i].tokens, k->opt->generate, 4);
    exc_replies_free(replies, k->p->count);
    return st;
}

exc_status exc_forward(exc_ctx *ctx, exc_model *m, const exc_prompts *prompts,
                       const exc_forward_options *options, const char *out, char **json) {
    exc_forward_options opt = {.size = sizeof opt, .emit_logits = 1};
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (json) *json = NULL;
    if (!m || !prompts || !out)
        return exc_fail(ctx, EXC_ERR_USAGE, "forward: expected a model, prompts and an output file");
    if (options) {
        if (options->size < sizeof options->size || options->size > sizeof opt)
            return exc_fail(ctx, EXC_ERR_USAGE, "forward: options.size: expected at most %zu, found %zu",
                            sizeof opt, options->size);
        memcpy(&opt, options, options->size);
    }
    if (opt.generate < 0 || opt.batch_tokens < 0)
        return exc_fail(ctx, EXC_ERR_USAGE, "forward: generate, batch_tokens: expected 0 or more");
    if (!prompts->count)
        return exc_fail(ctx, EXC_ERR_INPUT, "forward: expected at least one prompt, found none");
    sink k = {.p = prompts, .opt = &opt, .s = &m->atlas->shape};
    double t0 = exc_seconds();
    EXC_TRY(exc_writer_open(ctx, out, opt.force, &k.w));
    exc_status st = run_forward(ctx, m, &k);
    if (st)
        exc_writer_abort(k.w);
    else
        st = exc_writer_commit(k.w);
    exc_release(k.logits);
    exc_device_release(ctx, k.there);
    exc_release(k.hidden);
    exc_release(k.ids);
    exc_release(k.weights);
    if (st || !json) return st;
    json_t *o =
        json_pack("{s:s,s:I,s:I,s:I,s:I,s:I,s:f}", "out", out, "prompts", (json_int_t)prompts->count,
                  "tokens", (json_int_t)prompts->begin[prompts->count], "generated",
                  (json_int_t)(prompts->count * opt.generate), "weight_bytes", (json_int_t)m->weight_bytes,
                  "state_bytes", state_bytes(m), "seconds", exc_seconds() - t0);
    exc_memory_facts(m, o);
    *json = o ? exc_json_text(ctx, o) : NULL;
    json_decref(o);
    return *json ? EXC_OK : exc_fail(ctx, EXC_ERR_MEMORY, "forward: no memory for the result");
}

/* ----------------------------------------------------------------------------------------------------------
 * generate */

static json_t *token_list(const int32_t *tokens, int64_t n) {
    json_t *list = json_array();
    for (int64_t i = 0; list && i < n; i++) json_array_append_new(list, json_integer(tokens[i]));
    return list;
}

/* {"prompt": the request, or its tokens, "text": the reply, null without a tokenizer, "tokens", "stop": "end"
 * or "length"} */
static exc_status put_line(exc_ctx *ctx, const exc_tokenizer *t, const exc_prompts *p, int64_t i,
                           const exc_reply *r, exc_buf *out) {
    exc_buf text = {0};
    exc_status st = t ? exc_tokenizer_decode(ctx, t, r->tokens, (size_t)r->count, true, &text) : EXC_OK;
    if (st) {
        exc_buf_free(&text);
        return st;
    }
    json_t *o = json_object();
    const char *request = p->text ? p->text[i] : NULL;
    json_object_set_new(o, "prompt",
                        request ? json_string(request)
                                : token_list(p->tokens + p->begin[i], prompt_length(p, i)));
    /* a reply cut inside a character is not UTF-8: the broken bytes become U+FFFD */
    exc_buf clean = {0};
    size_t at = 0, bad;
    while (t && text.len && !exc_utf8_valid(text.data + at, text.len - at, &bad)) {
        exc_buf_put(&clean, text.data + at, bad);
        exc_buf_puts(&clean, "\xef\xbf\xbd");
        at += bad + 1;
    }
    if (text.len) exc_buf_put(&clean, text.data + at, text.len - at);
    json_object_set_new(o, "text", t ? json_stringn(clean.data ? clean.data : "", clean.len) : json_null());
    json_object_set_new(o, "tokens", token_list(r->tokens, r->count));
    json_object_set_new(o, "stop", json_string(r->stopped ? "end" : "length"));
    char *line = o ? json_dumps(o, JSON_COMPACT) : NULL;
    if (line) {
        exc_buf_puts(out, line);
        exc_buf_puts(out, "\n");
    }
    bool failed = !line || text.failed || clean.failed || out->failed;
    free(line);
    json_decref(o);
    exc_buf_free(&text);
    exc_buf_free(&clean);
    return failed ? exc_fail(ctx, EXC_ERR_MEMORY, "generate: no memory for a reply") : EXC_OK;
}

static exc_status run_generate(exc_ctx *ctx, exc_model *m, const exc_prompts *p,
                               const exc_generate_options *opt, const char *out, int64_t *generated,
                               int64_t *stopped) {
    exc_tokenizer *t = NULL;
    exc_reply *replies = NULL;
    exc_buf lines = {0};
    exc_decode d = {.max_new = opt->max_new > 0 ? opt->max_new : 64,
                    .temperature = opt->temperature,
                    .top_p = opt->top_p,
                    .seed = opt->seed,
                    .batch = opt->batch,
                    .step = "generate"};
    exc_status st;
    EXC_GOTO(done, exc_check_file(ctx, out, opt->force));
    EXC_GOTO(done, exc_tokenizer_maybe(ctx, m->dir, &t)); /* token prompts need none */
    EXC_GOTO(done, exc_decode_run(ctx, m, p, &d, &replies));
    for (int64_t i = 0; i < p->count; i++) {
        EXC_GOTO(done, put_line(ctx, t, p, i, &replies[i], &lines));
        *generated += replies[i].count;
        *stopped += replies[i].stopped;
    }
    st = exc_write_file(ctx, out, lines.data ? lines.data : "", lines.len, opt->force);
done:
    exc_replies_free(replies, p->count);
    exc_tokenizer_free(t);
    exc_buf_free(&lines);
    return st;
}

exc_status exc_generate(exc_ctx *ctx, exc_model *m, const exc_prompts *prompts,
                        const exc_generate_options *options, const char *out, char **json) {
    exc_generate_options opt = {.size = sizeof opt};
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (json) *json = NULL;
    if (!m || !prompts || !out)
        return exc_fail(ctx, EXC_ERR_USAGE, "generate: expected a model, prompts and an output file");
    if (options) {
        if (options->size < sizeof options->size || options->size > sizeof opt)
            return exc_fail(ctx, EXC_ERR_USAGE, "generate: options.size: expected at most %zu, found %zu",
                            sizeof opt, options->size);
        memcpy(&opt, options, options->size);
    }
    if (opt.max_new < 0 || opt.batch < 0)
        return exc_fail(ctx, EXC_ERR_USAGE, "generate: max_new, batch: expected 0 or more");
    if (!(opt.temperature >= 0) || !(opt.top_p >= 0) || opt.top_p > 1)
        return exc_fail(ctx, EXC_ERR_USAGE,
                        "generate: expected temperature >= 0 and top_p in 0..1, found %g and %g",
                        (double)opt.temperature, (double)opt.top_p);
    if (!prompts->count)
        return exc_fail(ctx, EXC_ERR_INPUT, "generate: expected at least one prompt, found none");
    int64_t generated = 0, stopped = 0;
    double t0 = exc_seconds();
    EXC_TRY(run_generate(ctx, m, prompts, &opt, out, &generated, &stopped));
    if (!json) return EXC_OK;
    json_t *o =
        json_pack("{s:s,s:I,s:I,s:I,s:f}", "out", out, "prompts", (json_int_t)prompts->count, "generated",
                  (json_int_t)generated, "stopped", (json_int_t)stopped, "seconds", exc_seconds() - t0);
    exc_memory_facts(m, o);
    *json = o ? exc_json_text(ctx, o) : NULL;
    json_decref(o);
    return *json ? EXC_OK : exc_fail(ctx, EXC_ERR_MEMORY, "generate: no memory for the result");
}
