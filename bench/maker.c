/* maker.c - random qwen3_moe checkpoints in the published layout (one 2-D bf16 tensor an expert and projection), written
 * through the library's own writer. The weights hold no knowledge; their scale 1/sqrt(inputs) keeps activations near 1, so
 * that routing spreads over the experts as a trained router's does under its balancing loss.
 *
 *   random  hidden 1024, 8 layers, 64 experts top-8 of 384, vocabulary 8192, 16 query heads and 2 KV heads of 128: 244 MB of
 *           weights are read for one token at batch 1
 *   demo    hidden 128, 4 layers, 16 experts top-4 of 64: bound by calls, not by arithmetic
 *   cached  hidden 2048, 7 layers of 64 experts of 768, 4.14 GiB: the first token of a model that lies in the page cache
 *   large   hidden 2048, 3 layers of 128 experts of 768 (a slice of Qwen3-30B-A3B), 4 GB, of which 31 % are down_proj and o_proj */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "bench.h"
#include "files.h"

const spec spec_random = {"random", 8, 1024, 16, 2, 128, 8192, 64, 8, 384, 1};
const spec spec_demo = {"demo", 4, 128, 4, 2, 32, 512, 16, 4, 64, 1};
const spec spec_cached = {"cached", 7, 2048, 16, 4, 128, 8192, 64, 8, 768, 7};
const spec spec_large = {"large", 3, 2048, 32, 4, 128, 32768, 128, 8, 768, 4};

const spec *spec_find(const char *name)
{
    const spec *all[] = {&spec_random, &spec_demo, &spec_cached, &spec_large};
    for (size_t i = 0; i < EXC_COUNT(all); i++)
        if (!strcmp(name, all[i]->name)) return all[i];
    return NULL;
}

uint64_t spec_bytes(const spec *s)
{
    int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    int64_t layer = s->hidden * (2 * q + 2 * kv + 3 * s->experts * s->inner + s->experts + 2) + 2 * s->head_dim;
    return 2 * (uint64_t)(s->layers * layer + s->hidden * (2 * s->vocab + 1));
}

double spec_flop(const spec *s, double tokens, double visible)
{
    double q = (double)(s->heads * s->head_dim), kv = (double)(s->kv_heads * s->head_dim);
    double weights = (double)s->hidden * (2 * q + 2 * kv + (double)s->experts + 3.0 * (double)(s->top_k * s->inner));
    return tokens * (double)s->layers * (2 * weights + 4 * q * visible);
}

typedef struct maker {
    bench *b;
    const spec *s;
    exc_writer *w;
    bool declaring; /* first pass: names and shapes; second: bytes */
    int shard;
    uint16_t *buffer;
    uint64_t seed;
    exc_buf map;    /* weight_map of the index */
    const char *file;
} maker;

static void tensor(maker *m, int64_t rows, int64_t cols, float scale, const char *fmt, ...) EXC_PRINTF(5, 6);
static void tensor(maker *m, int64_t rows, int64_t cols, float scale, const char *fmt, ...)
{
    char name[160];
    va_list list;
    va_start(list, fmt);
    vsnprintf(name, sizeof name, fmt, list);
    va_end(list);
    size_t n = (size_t)(rows * (cols ? cols : 1));
    m->seed++;
    if (m->declaring) {
        int64_t shape[2] = {rows, cols};
        bench_must(m->b, exc_writer_declare(m->w, name, EXC_BF16, cols ? 2 : 1, shape), name);
        exc_buf_printf(&m->map, "%s\"%s\":\"%s\"", m->map.len ? "," : "", name, m->file);
        return;
    }
    if (scale > 0) fill_bf16(m->b, m->buffer, n, scale, m->seed);
    else
        for (size_t i = 0; i < n; i++) m->buffer[i] = 0x3f80; /* 1 */
    bench_must(m->b, exc_writer_put(m->w, name, m->buffer, 2 * n), name);
}

static void layer(maker *m, int64_t l)
{
    const spec *s = m->s;
    int64_t H = s->hidden, q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    float h = 1 / sqrtf((float)H), i = 1 / sqrtf((float)s->inner), o = 1 / sqrtf((float)q);
    long long at = (long long)l;
    tensor(m, H, 0, 0, "model.layers.%lld.input_layernorm.weight", at);
    tensor(m, q, H, h, "model.layers.%lld.self_attn.q_proj.weight", at);
    tensor(m, kv, H, h, "model.layers.%lld.self_attn.k_proj.weight", at);
    tensor(m, kv, H, h, "model.layers.%lld.self_attn.v_proj.weight", at);
    tensor(m, H, q, o, "model.layers.%lld.self_attn.o_proj.weight", at);
    tensor(m, s->head_dim, 0, 0, "model.layers.%lld.self_attn.q_norm.weight", at);
    tensor(m, s->head_dim, 0, 0, "model.layers.%lld.self_attn.k_norm.weight", at);
    tensor(m, H, 0, 0, "model.layers.%lld.post_attention_layernorm.weight", at);
    tensor(m, s->experts, H, h, "model.layers.%lld.mlp.gate.weight", at);
    for (int64_t e = 0; e < s->experts; e++) {
        tensor(m, s->inner, H, h, "model.layers.%lld.mlp.experts.%lld.gate_proj.weight", at, (long long)e);
        tensor(m, s->inner, H, h, "model.layers.%lld.mlp.experts.%lld.up_proj.weight", at, (long long)e);
        tensor(m, H, s->inner, i, "model.layers.%lld.mlp.experts.%lld.down_proj.weight", at, (long long)e);
    }
}

/* layers go to the shards in turn, what is outside of layers to the last */
static void shard(maker *m)
{
    const spec *s = m->s;
    for (int64_t l = 0; l < s->layers; l++)
        if (l % s->shards == m->shard) layer(m, l);
    if (m->shard < s->shards - 1) return;
    tensor(m, s->vocab, s->hidden, 1, "model.embed_tokens.weight");
    tensor(m, s->hidden, 0, 0, "model.norm.weight");
    tensor(m, s->vocab, s->hidden, 1 / sqrtf((float)s->hidden), "lm_head.weight");
}

static void write_text(bench *b, const char *dir, const char *name, const char *text)
{
    char *path;
    bench_must(b, exc_path_join(b->ctx, dir, name, &path), name);
    bench_must(b, exc_write_file(b->ctx, path, text, strlen(text), true), path);
    exc_release(path);
}

static void write_config(bench *b, const spec *s, const char *dir)
{
    exc_buf t = {0};
    exc_buf_printf(&t,
        "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"qwen3_moe\",\"hidden_size\":%lld,\"num_hidden_layers\":%lld,"
        "\"num_attention_heads\":%lld,\"num_key_value_heads\":%lld,\"head_dim\":%lld,\"vocab_size\":%lld,\"num_experts\":%lld,"
        "\"num_experts_per_tok\":%lld,\"moe_intermediate_size\":%lld,\"intermediate_size\":%lld,\"norm_topk_prob\":true,"
        "\"decoder_sparse_step\":1,\"mlp_only_layers\":[],\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-06,\"rope_theta\":1000000.0,"
        "\"rope_scaling\":null,\"attention_bias\":false,\"attention_dropout\":0.0,\"max_position_embeddings\":4096,"
        "\"max_window_layers\":%lld,\"sliding_window\":null,\"use_sliding_window\":false,\"tie_word_embeddings\":false,"
        "\"torch_dtype\":\"bfloat16\",\"use_cache\":true,\"eos_token_id\":0,\"bos_token_id\":1}\n",
        (long long)s->hidden, (long long)s->layers, (long long)s->heads, (long long)s->kv_heads, (long long)s->head_dim,
        (long long)s->vocab, (long long)s->experts, (long long)s->top_k, (long long)s->inner, (long long)s->inner * 2,
        (long long)s->layers);
    write_text(b, dir, "config.json", t.data);
    write_text(b, dir, "generation_config.json", "{\"eos_token_id\":0,\"bos_token_id\":1}\n");
    exc_buf_free(&t);
}

char *make_model(bench *b, const spec *s, const char *dir)
{
    static char paths[4][4096];
    char *path = paths[s == &spec_random ? 0 : s == &spec_demo ? 1 : s == &spec_cached ? 2 : 3], name[64];
    struct stat st;
    if (!dir && *path && !stat(path, &st)) return path;
    if (dir) snprintf(path, sizeof *paths, "%s", dir);
    else snprintf(path, sizeof *paths, "%s/%s", b->tmp, s->name);
    if (mkdir(path, 0777) && errno != EEXIST) {
        fprintf(stderr, "excise_bench: %s: %s\n", path, strerror(errno));
        exit(1);
    }
    fprintf(stderr, "making the %s checkpoint, %.2f GB\n", s->name, (double)spec_bytes(s) / 1e9);
    maker m = {.b = b, .s = s};
    int64_t largest = s->vocab * s->hidden, q = s->heads * s->head_dim * s->hidden, e = s->inner * s->hidden;
    largest = largest > q ? largest : q;
    m.buffer = bench_alloc(b, 2 * (size_t)(largest > e ? largest : e));
    for (m.shard = 0; m.shard < s->shards; m.shard++) {
        if (s->shards == 1) snprintf(name, sizeof name, "model.safetensors");
        else snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", m.shard + 1, s->shards);
        m.file = name;
        char *file;
        bench_must(b, exc_path_join(b->ctx, path, name, &file), name);
        bench_must(b, exc_writer_open(b->ctx, file, true, &m.w), file);
        uint64_t seed = m.seed;
        m.declaring = true;
        bench_must(b, exc_writer_meta(m.w, "format", "pt"), file);
        shard(&m);
        m.declaring = false;
        m.seed = seed;
        shard(&m);
        bench_must(b, exc_writer_commit(m.w), file);
        exc_release(file);
    }
    if (s->shards > 1) {
        exc_buf t = {0};
        exc_buf_printf(&t, "{\"metadata\":{\"total_size\":%llu},\"weight_map\":{", (unsigned long long)spec_bytes(s));
        exc_buf_put(&t, m.map.data, m.map.len);
        exc_buf_puts(&t, "}}\n");
        write_text(b, path, "model.safetensors.index.json", t.data);
        exc_buf_free(&t);
    }
    exc_buf_free(&m.map);
    exc_release(m.buffer);
    write_config(b, s, path);
    return path;
}
