/* whole.c - rows of whole models: Qwen3-30B-A3B with random weights, in prefill and decode, with capture on and off in turns; and the
 * edit of all its experts beside the least time that their bytes could take.
 *
 * The model's files are headers over holes: they say what there is, and a counter-based stream a weight, written on the device,
 * is what it holds (model.h: exc_made). Nothing of its size moves through the host. Matrices have deviation 1/sqrt(inputs), which
 * keeps activations near 1, so that routing spreads over the experts. Decode steps are what exc_decode_run does: draw, feed back;
 * on the device they are replayed from graphs. Capture is all that exc_capture takes: counts, gate sums, intermediate sums, squared
 * output norms, counts by prompt, and in prefill the last state of every prompt. What does not fit is skipped, with what it needs. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gauge.h"
#include "session.h"

typedef struct spec {
    int64_t layers, hidden, heads, kv_heads, head_dim, vocab, experts, top_k, inner;
} spec;
static const spec real = {48, 2048, 32, 4, 128, 151936, 128, 8, 768}, small = {2, 64, 4, 2, 16, 100, 8, 2, 32};

/* ------------------------------------------------------------------------------------------------------- all experts */

typedef struct model_edit {
    struct exc_project_args layer;
    const spec *s;
    size_t bytes; /* of a matrix */
    char *w;
    const void **at, **scale_at;
    float *basis;
} model_edit;

/* a call a layer, each with a basis of its own, as exc_apply and pipelines do it */
static exc_status edit_all(gauge *g, const void *arg) {
    const model_edit *e = arg;
    exc_status st = EXC_OK;
    for (int64_t l = 0; l < e->s->layers && st == EXC_OK; l++) {
        struct exc_project_args a = e->layer;
        a.basis = e->basis + l * a.rank * e->s->hidden;
        if (e->at)
            a.src = e->at + l * a.count, a.dst = (void *const *)(uintptr_t)a.src, a.scale = e->scale_at + l * a.count,
            a.scale_to = (void *const *)(uintptr_t)a.scale;
        else
            a.src_base = a.dst_base = e->w + (size_t)(l * a.count) * e->bytes;
        st = g->ctx->ops->project(&g->ctx->queue, &a);
    }
    return st;
}

static const void **addresses(gauge *g, int64_t n, char *first, size_t bytes) {
    const void **host = malloc((size_t)n * sizeof *host);
    for (int64_t i = 0; host && i < n; i++) host[i] = first + (size_t)i * bytes;
    const void **there = gauge_up(g, host, (size_t)n * sizeof *host);
    free(host);
    return there;
}

/* orthonormal rows with disjoint supports, for every layer */
static float *bases(gauge *g, int64_t layers, int64_t rank, int64_t width) {
    float *host = calloc((size_t)(layers * rank * width), sizeof *host);
    for (int64_t r = 0; host && r < layers * rank; r++)
        for (int64_t h = r % rank; h < width; h += rank)
            host[r * width + h] =
                ((h / rank + r) % 2 ? 1.0f : -1.0f) / sqrtf((float)((width - r % rank + rank - 1) / rank));
    float *there = gauge_up(g, host, (size_t)(layers * rank * width) * sizeof *host);
    free(host);
    return there;
}

/* scales of about a hundredth, f32, for every block of 128 x 128 */
static const void **make_scales(gauge *g, int64_t count, size_t bytes) {
    float *host = malloc((size_t)count * bytes);
    for (size_t i = 0; host && i < (size_t)count * bytes / 4; i++) host[i] = 0.006f + 0.0001f * (float)(i % 32);
    char *there = gauge_up(g, host, (size_t)count * bytes);
    free(host);
    return addresses(g, count, there, bytes);
}

static model_edit make_edit(gauge *g, const spec *s, int64_t rank, bool fp8, size_t bytes, size_t scales) {
    int64_t count = s->layers * s->experts, n = s->hidden * s->inner;
    float ones[1024];
    for (size_t i = 0; i < EXC_COUNT(ones); i++) ones[i] = 1;
    model_edit e = {.s = s, .bytes = bytes, .basis = bases(g, s->layers, rank, s->hidden)};
    e.w = fp8 ? gauge_codes(g, (size_t)count * bytes) : gauge_numbers(g, count * n, EXC_BF16, 0.02f);
    e.layer = (struct exc_project_args){.dtype = fp8 ? EXC_F8_E4M3 : EXC_BF16, .count = s->experts, .rows = s->hidden};
    e.layer.cols = s->inner;
    e.layer.side = EXC_SIDE_OUT;
    e.layer.rank = rank;
    e.layer.strength = gauge_up(g, ones, (size_t)s->experts * 4);
    e.layer.src_stride = e.layer.dst_stride = n;
    e.layer.scale_dtype = EXC_F32;
    if (fp8) {
        e.at = addresses(g, count, e.w, bytes);
        e.scale_at = make_scales(g, count, scales);
    }
    return e;
}

static void edit_row(gauge *g, const spec *s, int64_t rank, bool fp8) {
    int64_t blocks = (s->hidden + 127) / 128 * ((s->inner + 127) / 128);
    size_t bytes = (size_t)(s->hidden * s->inner) * (fp8 ? 1 : 2), scales = fp8 ? (size_t)blocks * 4 : 0;
    double all = (double)(s->layers * s->experts) * (double)(bytes + scales), is_free = (double)exc_device_free(g->ctx);
    row r = {.name = "edit_model", .bytes = 2 * all, .floor = g->copy > 0 ? 2 * all / g->copy : 0};
    char need[32], have[32];
    snprintf(r.shape, sizeof r.shape, "%lldx%lld [%lld,%lld] %s k=%lld", (long long)s->layers, (long long)s->experts,
             (long long)s->hidden, (long long)s->inner, fp8 ? "fp8" : "bf16", (long long)rank);
    if (all > 0.95 * is_free) {
        gauge_skip(g, &r, "%s of device memory needed, %s are free", exc_memory_text((uint64_t)all, need),
                   exc_memory_text((uint64_t)is_free, have));
        return;
    }
    model_edit e = make_edit(g, s, rank, fp8, bytes, scales);
    gauge_row(g, &r, edit_all, &e, 0, 1);
    gauge_clear(g);
}

/* ------------------------------------------------------------------------------------------------- a folder of holes */

typedef struct folder {
    char path[512];
    exc_buf head;
    uint64_t at;
} folder;

static void declare(folder *f, int64_t rows, int64_t cols, const char *name, ...) EXC_PRINTF(4, 5);
static void declare(folder *f, int64_t rows, int64_t cols, const char *name, ...) {
    char text[128];
    uint64_t bytes = 2 * (uint64_t)(rows * (cols ? cols : 1));
    va_list list;
    va_start(list, name);
    vsnprintf(text, sizeof text, name, list);
    va_end(list);
    exc_buf_printf(&f->head, "%c\"%s\":{\"dtype\":\"BF16\",\"shape\":[%lld", f->head.len ? ',' : '{', text,
                   (long long)rows);
    if (cols) exc_buf_printf(&f->head, ",%lld", (long long)cols);
    exc_buf_printf(&f->head, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)f->at,
                   (unsigned long long)(f->at + bytes));
    f->at += bytes;
}

static void declare_layer(folder *f, const spec *s, int l) {
    int64_t H = s->hidden, q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    declare(f, H, 0, "model.layers.%d.input_layernorm.weight", l);
    declare(f, q, H, "model.layers.%d.self_attn.q_proj.weight", l);
    declare(f, kv, H, "model.layers.%d.self_attn.k_proj.weight", l);
    declare(f, kv, H, "model.layers.%d.self_attn.v_proj.weight", l);
    declare(f, H, q, "model.layers.%d.self_attn.o_proj.weight", l);
    declare(f, s->head_dim, 0, "model.layers.%d.self_attn.q_norm.weight", l);
    declare(f, s->head_dim, 0, "model.layers.%d.self_attn.k_norm.weight", l);
    declare(f, H, 0, "model.layers.%d.post_attention_layernorm.weight", l);
    declare(f, s->experts, H, "model.layers.%d.mlp.gate.weight", l);
    for (int e = 0; e < (int)s->experts; e++) {
        declare(f, s->inner, H, "model.layers.%d.mlp.experts.%d.gate_proj.weight", l, e);
        declare(f, s->inner, H, "model.layers.%d.mlp.experts.%d.up_proj.weight", l, e);
        declare(f, H, s->inner, "model.layers.%d.mlp.experts.%d.down_proj.weight", l, e);
    }
}

static void declare_all(folder *f, const spec *s) {
    declare(f, s->vocab, s->hidden, "model.embed_tokens.weight");
    for (int l = 0; l < (int)s->layers; l++) declare_layer(f, s, l);
    declare(f, s->hidden, 0, "model.norm.weight");
    declare(f, s->vocab, s->hidden, "lm_head.weight");
    exc_buf_puts(&f->head, "}");
    while (f->head.len % 8) exc_buf_puts(&f->head, " ");
}

/* one file: its header, then nothing up to its end */
static bool write_holes(folder *f) {
    char path[600];
    uint64_t n = f->head.len;
    snprintf(path, sizeof path, "%s/model.safetensors", f->path);
    int fd = open(path, O_CREAT | O_WRONLY | O_EXCL, 0600);
    bool fine = fd >= 0 && !f->head.failed && write(fd, &n, 8) == 8 && write(fd, f->head.data, n) == (ssize_t)n &&
                !ftruncate(fd, (off_t)(8 + n + f->at));
    if (fd >= 0) close(fd);
    return fine;
}

static bool write_config(const folder *f, const spec *s) {
    char path[600];
    snprintf(path, sizeof path, "%s/config.json", f->path);
    FILE *file = fopen(path, "w");
    if (!file) return false;
    fprintf(file,
            "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"qwen3_moe\",\"hidden_size\":%lld,\"num_"
            "hidden_layers\":%lld,\"num_attention_heads\":%lld,"
            "\"num_key_value_heads\":%lld,\"head_dim\":%lld,\"vocab_size\":%lld,\"num_experts\":%lld,\"num_experts_per_"
            "tok\":%lld,\"moe_intermediate_size\":%lld,"
            "\"intermediate_size\":%lld,\"norm_topk_prob\":true,\"decoder_sparse_step\":1,\"mlp_only_layers\":[],"
            "\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-06,"
            "\"rope_theta\":1000000.0,\"attention_bias\":false,\"max_position_embeddings\":40960,\"tie_word_"
            "embeddings\":false,\"torch_dtype\":\"bfloat16\"}\n",
            (long long)s->hidden, (long long)s->layers, (long long)s->heads, (long long)s->kv_heads,
            (long long)s->head_dim, (long long)s->vocab, (long long)s->experts, (long long)s->top_k,
            (long long)s->inner, (long long)s->inner * 8);
    return !fclose(file);
}

static bool open_folder(folder *f, const spec *s) {
    const char *tmp = getenv("TMPDIR");
    snprintf(f->path, sizeof f->path, "%.480s/excise-gpu-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(f->path)) return *f->path = 0, false;
    declare_all(f, s);
    return write_holes(f) && write_config(f, s);
}

static void close_folder(folder *f) {
    static const char *const files[] = {"model.safetensors", "config.json"};
    char path[600];
    for (size_t i = 0; *f->path && i < EXC_COUNT(files); i++) {
        snprintf(path, sizeof path, "%s/%s", f->path, files[i]);
        unlink(path);
    }
    if (*f->path) rmdir(f->path);
    exc_buf_free(&f->head);
}

/* ---------------------------------------------------------------------------------------------------------- the model */

static exc_status make_rows(exc_ctx *ctx, void *user, const exc_weight *w, int64_t first, int64_t rows, void *there) {
    uint64_t number = (uint64_t)(((w->layer + 1) * EXC_ROLES + (int64_t)w->role) * 1024 + w->expert + 1);
    bool unit = exc_role_is_vector(w->role) || w->role == EXC_ROLE_EMBED;
    struct exc_noise_args a = {.dst = there,
                               .n = rows * w->in,
                               .first = first * w->in,
                               .seed = 6,
                               .stream = number,
                               .dtype = w->dtype,
                               .deviation = unit ? 1 : 1 / sqrtf((float)w->in)};
    (void)user;
    return EXC_CALL(ctx, noise, &a);
}

/* one model, its session, and what a step brings and takes */
typedef struct run {
    gauge *g;
    const spec *s;
    exc_model *m;
    exc_session *session;
    int64_t batch, length; /* sequences, and tokens of their prompts */
    int32_t *tokens, *slot, *observe;
    int64_t *begin;
    float *logits, *hidden_last;
    exc_sums sums;
    int64_t captured; /* tokens so far */
} run;

enum { SLOTS = 64, PROMPTS = 16, STEPS = 8, ROUNDS = 9 };
static int64_t prompt_tokens(const gauge *g) { return g->quick ? 12 : 512; }
static int64_t context_tokens(const gauge *g) { return g->quick ? 9 : 256; } /* that decode begins with */
static int64_t step_tokens(const gauge *g) { return PROMPTS * prompt_tokens(g); }
static int rounds(const gauge *g) { return g->quick ? 2 : ROUNDS; }
static int steps(const gauge *g) { return g->quick ? 2 : STEPS; }
static int64_t capacity(const gauge *g) { return context_tokens(g) + 2 * steps(g) * (rounds(g) + 2) + 2; }

static double weight_bytes(const spec *s) {
    double q = (double)(s->heads * s->head_dim), kv = (double)(s->kv_heads * s->head_dim), H = (double)s->hidden;
    double layer = H * (2 * q + 2 * kv + 3.0 * (double)(s->experts * s->inner) + (double)s->experts);
    return 2 * ((double)s->layers * layer + 2 * H * (double)s->vocab);
}

static double cache_bytes(const spec *s) {
    return 4.0 * (double)(s->layers * s->kv_heads * s->head_dim);
} /* of a token */

/* weights, caches and the buffers of a step, from above */
static double needed(const gauge *g, const spec *s) {
    double T = (double)step_tokens(g), tokens = fmax(T, (double)SLOTS * (double)capacity(g));
    double per_row = (double)s->top_k * (4.0 * (double)s->hidden + 2.0 * (double)s->inner) +
                     8.0 * (double)(s->heads + 2 * s->kv_heads) * (double)s->head_dim + 24.0 * (double)s->hidden;
    return weight_bytes(s) + tokens * cache_bytes(s) + T * per_row + 8.0 * (double)(SLOTS * s->vocab) +
           (g->quick ? 0 : 1e9);
}

static double flop_of(const spec *s, double tokens, double visible) {
    double q = (double)(s->heads * s->head_dim), kv = (double)(s->kv_heads * s->head_dim);
    double weights = (double)s->hidden * (2 * q + 2 * kv + (double)s->experts + 3.0 * (double)(s->top_k * s->inner));
    return tokens * (double)s->layers * (2 * weights + 4 * q * visible);
}

/* the folder is gone once the model has its headers, so that nothing is left of it however this program ends */
static exc_status open_model(gauge *g, const spec *s, run *r) {
    const exc_made made = {make_rows, NULL};
    folder f = {.path = ""};
    exc_status st = EXC_ERR_IO;
    if (open_folder(&f, s))
        st = exc_model_open_made(g->ctx, f.path, NULL, &made, &r->m);
    else
        exc_fail(g->ctx, st, "%s: %s", *f.path ? f.path : "a temporary folder", strerror(errno));
    close_folder(&f);
    return st == EXC_OK ? exc_device_sync(g->ctx) : st;
}

static bool open_run(gauge *g, const spec *s, run *r) {
    row none = {.name = "model", .note = "made on the device"};
    char weights[32], need[32], have[32];
    double bytes = needed(g, s), free_bytes = (double)exc_device_free(g->ctx);
    snprintf(none.shape, sizeof none.shape, "Qwen3-30B-A3B, %lld layers", (long long)s->layers);
    fprintf(stderr, "a random model of %s needs %s with its states, %s are free\n",
            exc_memory_text((uint64_t)weight_bytes(s), weights), exc_memory_text((uint64_t)bytes, need),
            exc_memory_text((uint64_t)free_bytes, have));
    if (bytes > free_bytes) return gauge_skip(g, &none, "%s of device memory needed, %s are free", need, have), false;
    double begun = exc_seconds();
    exc_status st = open_model(g, s, r);
    none.seconds = none.low = none.high = exc_seconds() - begun;
    exc_room room = {.slots = SLOTS, .cache_tokens = SLOTS * capacity(g), .step_tokens = step_tokens(g)};
    if (room.cache_tokens < room.step_tokens) room.cache_tokens = room.step_tokens;
    if (st == EXC_OK && exc_model_streamed(r->m))
        return gauge_skip(g, &none, "its weights do not fit: they would be read layer by layer"), false;
    if (st == EXC_OK) st = exc_session_open(g->ctx, r->m, &room, &r->session);
    if (st == EXC_ERR_MEMORY || st == EXC_ERR_IO) return gauge_skip(g, &none, "%s", exc_ctx_error(g->ctx)), false;
    gauge_must(g, st, "model");
    gauge_print(g, &none);
    return true;
}

static void open_arrays(gauge *g, const spec *s, run *r) {
    size_t me = (size_t)(s->layers * s->experts), T = (size_t)step_tokens(g);
    r->tokens = malloc(T * 4), r->observe = malloc(T * 4);
    r->slot = malloc(SLOTS * 4), r->begin = malloc((SLOTS + 1) * 8);
    for (int i = 0; i < SLOTS; i++) r->slot[i] = i;
    r->logits = gauge_room(g, (size_t)(SLOTS * s->vocab) * 4);
    r->hidden_last = gauge_room(g, (size_t)(SLOTS * (s->layers + 1) * s->hidden) * 4);
    r->sums = (exc_sums){.count = gauge_zeros(g, me * 8),
                         .gate_sum = gauge_zeros(g, me * 8),
                         .mid_sum = gauge_zeros(g, me * (size_t)s->inner * 8),
                         .sqnorm_sum = gauge_zeros(g, me * 8),
                         .tokens = calloc((size_t)s->layers, 8),
                         .prompt_count = gauge_zeros(g, SLOTS * me * 4)};
}

static void close_run(run *r) {
    exc_session_close(r->session);
    exc_model_free(r->m);
    free(r->tokens), free(r->observe), free(r->slot), free(r->begin), free(r->sums.tokens);
}

/* ------------------------------------------------------------------------------------------------- prefill and decode */

static void reset(run *r, int64_t batch, int64_t each) {
    int64_t capacities[SLOTS];
    for (int64_t i = 0; i < batch; i++) capacities[i] = each;
    gauge_must(r->g, exc_session_reset(r->session, batch, capacities), "session");
}

/* `count` sequences from slot `first` on, `each` new tokens a sequence, taken from r->tokens */
static void step(run *r, int64_t first, int64_t count, int64_t each, bool captured, bool states) {
    for (int64_t i = 0; i <= count; i++) r->begin[i] = i * each;
    for (int64_t t = 0; t < count * each; t++) r->observe[t] = (int32_t)(first + t / each);
    exc_step t = {.tokens = r->tokens,
                  .slot = r->slot + first,
                  .begin = r->begin,
                  .sequences = count,
                  .logits = r->logits + first * r->s->vocab};
    if (captured) {
        t.sums = &r->sums, t.observe = r->observe;
        if (states) t.hidden_last = r->hidden_last;
        r->captured += count * each;
    }
    gauge_must(r->g, exc_session_step(r->session, &t), "step");
}

static void draw_prompts(run *r, int64_t n) {
    for (int64_t i = 0; i < n; i++) r->tokens[i] = (int32_t)(exc_random_u64(8, 1, (uint64_t)i) % (uint64_t)r->s->vocab);
}

static double prefill(run *r, bool captured) {
    int64_t each = prompt_tokens(r->g);
    reset(r, PROMPTS, each);
    gauge_must(r->g, exc_device_sync(r->g->ctx), "prefill");
    double begun = exc_seconds();
    step(r, 0, PROMPTS, each, captured, true);
    gauge_must(r->g, exc_session_check(r->session), "prefill");
    return exc_seconds() - begun;
}

/* seconds of a step of decode: draw, feed back */
static double decode(run *r, bool captured) {
    exc_draw d = {.logits = r->logits, .rows = r->batch};
    double begun = exc_seconds();
    for (int i = 0; i < steps(r->g); i++) {
        gauge_must(r->g, exc_session_draw(r->session, &d, r->tokens), "draw");
        step(r, 0, r->batch, 1, captured, false);
    }
    gauge_must(r->g, exc_session_check(r->session), "decode");
    return (exc_seconds() - begun) / steps(r->g);
}

/* work without and with capture in turns, the order turned each round, so that drift falls on both; then the three rows */
static void in_turns(run *r, const char *name, const char *shape, double (*work)(run *r, bool captured), double tokens,
                     double bytes, double flop) {
    gauge *g = r->g;
    double seconds[2][ROUNDS], over[ROUNDS];
    char names[3][32];
    for (int warm = 0; warm < 4; warm++)
        work(r, warm & 1); /* scratch grows; graphs are recorded at the second step of a kind */
    for (int i = 0; i < rounds(g); i++) {
        for (int j = 0; j < 2; j++) seconds[(i + j) & 1][i] = work(r, (i + j) & 1);
        over[i] = 100 * (seconds[1][i] / seconds[0][i] - 1);
    }
    snprintf(names[0], sizeof names[0], "%s", name);
    snprintf(names[1], sizeof names[1], "%s_captured", name);
    snprintf(names[2], sizeof names[2], "%s_overhead", name);
    for (int c = 0; c < 2; c++) {
        row w = {.name = names[c], .bytes = bytes, .flop = flop, .tokens = tokens};
        snprintf(w.shape, sizeof w.shape, "%s", shape);
        w.seconds = gauge_median(seconds[c], rounds(g)), w.low = seconds[c][0], w.high = seconds[c][rounds(g) - 1];
        gauge_print(g, &w);
    }
    row o = {.name = names[2], .compared = true, .overhead = gauge_median(over, rounds(g))};
    o.low = over[0], o.high = over[rounds(g) - 1];
    snprintf(o.shape, sizeof o.shape, "%s", shape);
    gauge_print(g, &o);
}

static void check_counts(run *r) {
    const spec *s = r->s;
    int64_t n = s->layers * s->experts, *count = malloc((size_t)n * 8), wrong = 0;
    gauge_must(r->g, exc_device_get(r->g->ctx, count, r->sums.count, (size_t)n * 8), "counts");
    for (int64_t l = 0; l < s->layers; l++) {
        int64_t sum = 0;
        for (int64_t e = 0; e < s->experts; e++) sum += count[l * s->experts + e];
        wrong += sum != r->captured * s->top_k || r->sums.tokens[l] != r->captured;
    }
    if (wrong)
        fprintf(stderr, "excise_gpu: %s: counts of %lld layers are not those of the tokens that were captured\n",
                "model", (long long)wrong);
    r->g->wrong += wrong > 0;
    free(count);
}

static void prefill_rows(run *r) {
    const gauge *g = r->g;
    int64_t each = prompt_tokens(g);
    char shape[64];
    if (!gauge_wanted(g, "prefill")) return;
    draw_prompts(r, PROMPTS * each);
    snprintf(shape, sizeof shape, "%dx%lld tokens", PROMPTS, (long long)each);
    in_turns(r, "prefill", shape, prefill, (double)(PROMPTS * each), 0,
             flop_of(r->s, (double)(PROMPTS * each), ((double)each + 1) / 2));
}

/* how many experts the tokens of a step chose, over all layers */
static double experts_chosen(run *r) {
    const spec *s = r->s;
    int64_t n = s->layers * r->batch * s->top_k, distinct = 0;
    int32_t *ids = malloc((size_t)n * 4), *there = gauge_room(r->g, (size_t)n * 4);
    exc_step t = {.tokens = r->tokens,
                  .slot = r->slot,
                  .begin = r->begin,
                  .sequences = r->batch,
                  .logits = r->logits,
                  .router_ids = there};
    gauge_must(r->g, exc_session_step(r->session, &t), "decode");
    gauge_must(r->g, exc_session_check(r->session), "decode");
    gauge_must(r->g, exc_device_get(r->g->ctx, ids, there, (size_t)n * 4), "decode");
    for (int64_t l = 0; l < s->layers; l++) {
        bool used[1024] = {false};
        for (int64_t i = 0; i < r->batch * s->top_k; i++) used[ids[l * r->batch * s->top_k + i]] = true;
        for (int64_t e = 0; e < s->experts; e++) distinct += used[e];
    }
    free(ids);
    return (double)distinct;
}

static void decode_rows(run *r, int64_t batch) {
    gauge *g = r->g;
    const spec *s = r->s;
    int64_t context = context_tokens(g), at_once = step_tokens(g) / context;
    char shape[64];
    if (!gauge_wanted(g, "decode")) return;
    r->batch = batch;
    reset(r, batch, capacity(g));
    for (int64_t first = 0; first < batch; first += at_once) {
        int64_t n = batch - first < at_once ? batch - first : at_once;
        draw_prompts(r, n * context);
        step(r, first, n, context, false, false);
    }
    exc_draw d = {.logits = r->logits, .rows = batch};
    gauge_must(g, exc_session_draw(r->session, &d, r->tokens), "draw");
    step(r, 0, batch, 1, false, false);
    gauge_must(g, exc_session_draw(r->session, &d, r->tokens), "draw");
    double expert = 2.0 * 3 * (double)(s->hidden * s->inner);
    double bytes = weight_bytes(s) - 2.0 * (double)(s->vocab * s->hidden) -
                   expert * ((double)(s->layers * s->experts) - experts_chosen(r));
    bytes += (double)batch * (double)(context + capacity(g)) / 2 * cache_bytes(s);
    uint64_t replayed = r->session->replayed;
    snprintf(shape, sizeof shape, "batch %lld behind %lld tokens", (long long)batch, (long long)context);
    in_turns(r, "decode", shape, decode, (double)batch, bytes, 0);
    if (r->session->replayed - replayed < (uint64_t)(2 * steps(g) * rounds(g))) {
        g->wrong++;
        fprintf(stderr, "excise_gpu: decode %s: steps were not replayed from graphs\n", shape);
    }
}

static void model_rows(gauge *g, const spec *s) {
    static const int64_t batches[] = {1, 16, SLOTS};
    run r = {.g = g, .s = s};
    if (open_run(g, s, &r)) {
        open_arrays(g, s, &r);
        prefill_rows(&r);
        for (size_t i = 0; i < EXC_COUNT(batches); i++) decode_rows(&r, batches[i]);
        check_counts(&r);
    }
    close_run(&r);
    gauge_clear(g);
}

void whole_rows(gauge *g) {
    const spec *s = g->quick ? &small : &real;
    if (gauge_wanted(g, "edit_model"))
        for (int i = 0; i < 4; i++) edit_row(g, s, i % 2 ? 3 : 1, i / 2);
    if (gauge_wanted(g, "prefill") || gauge_wanted(g, "decode")) model_rows(g, s);
}
