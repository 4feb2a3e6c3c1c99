/* models.h - the golden checkpoints by name. One of them is not stored but made: gpt_oss_bf16 is gpt_oss with every mxfp4 tensor
 * written out as bf16, [E,out,in] turned to [E,in,out], as such checkpoints circulate; both have the same values, so the
 * same goldens. */
#ifndef EXC_TEST_MODELS_H
#define EXC_TEST_MODELS_H

#include "tiny.h"

#include "files.h"

/* values [E,in,out] of mxfp4 blocks u8 [E,out,in/32,16] (low nibble first) and scales u8 [E,out,in/32] */
static inline void mxfp4_values(const uint8_t *blocks, const uint8_t *scales, int64_t E, int64_t out, int64_t in, double *value)
{
    static const double fp4[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
    for (int64_t e = 0; e < E; e++)
        for (int64_t o = 0; o < out; o++)
            for (int64_t i = 0; i < in; i++) {
                int64_t at = (e * out + o) * in + i;
                int nibble = blocks[at / 2] >> 4 * (at % 2) & 15;
                value[(e * in + i) * out + o] = ldexp(fp4[nibble], scales[at / 32] - 127);
            }
}

/* one tensor of that form; false: scales, which go with their blocks */
static inline int oss_tensor(const exc_checkpoint *c, const exc_tensor *x, const char *dtype, tiny_tensor *y)
{
    size_t n = strlen(x->name);
    const char *tail = n > 7 ? x->name + n - 7 : "";
    if (!strcmp(tail, "_scales")) return 0;
    *y = (tiny_tensor){.rank = x->rank, .dtype = dtype};
    if (strcmp(tail, "_blocks") != 0) {
        const uint8_t *from = exc_checkpoint_data(c, x);
        snprintf(y->name, sizeof y->name, "%s", x->name);
        for (int d = 0; d < x->rank; d++) y->shape[d] = x->shape[d];
        y->count = (int64_t)(x->end - x->begin) / 2;
        y->value = malloc((size_t)y->count * 8);
        for (int64_t i = 0; i < y->count; i++) {
            uint16_t half;
            memcpy(&half, from + i * 2, 2);
            y->value[i] = (double)test_from_bf16(half);
        }
        return 1;
    }
    char scales[160];
    snprintf(y->name, sizeof y->name, "%.*s", (int)n - 7, x->name);
    snprintf(scales, sizeof scales, "%s_scales", y->name);
    y->rank = 3;
    y->shape[0] = x->shape[0];
    y->shape[1] = x->shape[2] * 32;
    y->shape[2] = x->shape[1];
    y->count = y->shape[0] * y->shape[1] * y->shape[2];
    y->value = malloc((size_t)y->count * 8);
    mxfp4_values(exc_checkpoint_data(c, x), exc_checkpoint_data(c, exc_checkpoint_find(c, scales)), y->shape[0], y->shape[2], y->shape[1],
                 y->value);
    return 1;
}

/* a new folder with gpt_oss, all of it as BF16 or F32 */
static inline char *make_oss(const char *dtype)
{
    exc_ctx *ctx = test_ctx(1);
    exc_checkpoint *c;
    size_t n;
    tiny t = {.dtype = dtype};
    char *dir = test_tmpdir();
    char *text = test_read(test_data("models/gpt_oss/config.json"), &n);
    json_t *config = json_loads(text, 0, NULL);
    assert_int_equal(json_object_del(config, "quantization_config"), 0);
    free(text);
    text = json_dumps(config, JSON_INDENT(2));
    test_write(test_path(dir, "config.json"), text, strlen(text));
    assert_int_equal(exc_checkpoint_open(ctx, test_data("models/gpt_oss"), &c), EXC_OK);
    t.items = calloc(c->n_tensors, sizeof *t.items);
    for (size_t i = 0; i < c->n_tensors; i++) t.count += oss_tensor(c, c->by_name[i], dtype, &t.items[t.count]);
    tiny_file(&t, test_path(dir, "model.safetensors"), 0, t.count);
    tiny_free(&t);
    free(text);
    json_decref(config);
    exc_checkpoint_close(c);
    exc_ctx_free(ctx);
    return dir;
}

/* folder of a golden checkpoint, and the stored one whose goldens it has */
static inline const char *golden_dir(const char *model)
{
    static char *made;
    char path[128];
    if (!strcmp(model, "gpt_oss_bf16")) return made ? made : (made = make_oss("BF16"));
    snprintf(path, sizeof path, "models/%s", model);
    return test_data(path);
}

static inline const char *golden_of(const char *model) { return strcmp(model, "gpt_oss_bf16") ? model : "gpt_oss"; }

/* a small model of that kind with odd sizes and, of hybrids, both kinds of layers */
static inline tiny tiny_odd(int kind) {
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

#endif
