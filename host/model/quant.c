/* quant.c - how weights are stored below 16 bits: what quantization_config promises, and where the scales of a weight lie.
 *
 * Two formats are read and edited as they are: e4m3 with a scale for every 128 x 128 block (DeepSeek, Qwen ..-FP8), and fp4
 * with a power of two for every 32 inputs (gpt-oss). Others are recognised, by their config or by the tensors they bring, and
 * refused with a sentence that says what to do: a packing that is not understood must not be edited by accident. */
#include <string.h>

#include "model.h"

#define BLOCK 128 /* rows and columns of e4m3 under one scale */
#define GROUP 32  /* inputs of fp4 under one scale */
#define ORIGINAL "take the model's own bf16, fp8 or mxfp4 release, or save a dequantised copy of this one first"

/* ---------------------------------------------------------------------------------------------------------- config */

/* what a quant_method of others is, for the refusal */
static const struct {
    const char *method, *what;
} foreign[] = {
    {"awq", "AWQ, 4-bit integers with activation-aware scales"},
    {"gptq", "GPTQ, packed integers"},
    {"bitsandbytes", "bitsandbytes, 4- or 8-bit blocks"},
    {"compressed-tensors", "compressed-tensors (packed integers, NVFP4 or FP8 of its own layout)"},
    {"modelopt", "ModelOpt (NVFP4 or FP8 of its own layout)"},
    {"nvfp4", "NVFP4, 4-bit floats with two levels of scales"},
    {"fbgemm_fp8", "FP8 with a scale for every row"},
    {"auto-round", "AutoRound, packed integers"},
    {"hqq", "HQQ, packed integers"},
    {"quanto", "Quanto"},
    {"torchao", "TorchAO"},
    {"exl2", "EXL2, packed integers"},
    {"exl3", "EXL3, packed integers"},
    {"aqlm", "AQLM, codebooks"},
    {"eetq", "EETQ, 8-bit integers"},
};

static exc_status refuse(exc_ctx *ctx, const char *what, const char *method) {
    const char *shown = exc_show(method, strlen(method));
    for (size_t i = 0; i < EXC_COUNT(foreign); i++)
        if (!strcmp(method, foreign[i].method))
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s: quantization_config.quant_method: expected \"fp8\" or \"mxfp4\", found \"%s\": %s is not edited; " ORIGINAL, what,
                            shown, foreign[i].what);
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: quantization_config.quant_method: expected \"fp8\" or \"mxfp4\", found \"%s\"; " ORIGINAL, what, shown);
}

static exc_status wrong(exc_ctx *ctx, const char *what, const char *key, const char *expected, const json_t *found) {
    char *text = found ? json_dumps(found, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    exc_status st = exc_fail(ctx, EXC_ERR_INPUT, "%s: quantization_config.%s: expected %s, found %s", what, key, expected,
                             text ? exc_show(text, strlen(text)) : "nothing");
    free(text);
    return st;
}

static exc_status read_fp8(exc_ctx *ctx, const json_t *q, const char *what, exc_shape *s) {
    const json_t *size = json_object_get(q, "weight_block_size"), *fmt = json_object_get(q, "fmt"), *scale = json_object_get(q, "scale_fmt");
    bool blocks = json_is_array(size) && json_array_size(size) == 2;
    for (size_t i = 0; blocks && i < 2; i++) blocks = json_integer_value(json_array_get(size, i)) == BLOCK;
    if (!blocks) return wrong(ctx, what, "weight_block_size", "[128,128] (other FP8 layouts are not edited; " ORIGINAL ")", size);
    if (fmt && !(json_is_string(fmt) && !strcmp(json_string_value(fmt), "e4m3"))) return wrong(ctx, what, "fmt", "\"e4m3\"", fmt);
    if (scale && !json_is_null(scale) && !(json_is_string(scale) && (!strcmp(json_string_value(scale), "ue8m0") || !strcmp(json_string_value(scale), "float"))))
        return wrong(ctx, what, "scale_fmt", "\"ue8m0\" or \"float\"", scale);
    s->quant = EXC_QUANT_FP8;
    s->scale_power = json_is_string(scale) && !strcmp(json_string_value(scale), "ue8m0");
    return EXC_OK;
}

exc_status exc_quant_read(exc_ctx *ctx, const json_t *config, const char *what, exc_shape *s) {
    const json_t *q = json_object_get(config, "quantization_config");
    if (!q || json_is_null(q)) return EXC_OK;
    const json_t *method = json_object_get(q, "quant_method");
    if (!json_is_string(method)) {
        /* older bitsandbytes configs have only their switches */
        if (json_is_true(json_object_get(q, "load_in_4bit")) || json_is_true(json_object_get(q, "load_in_8bit"))) return refuse(ctx, what, "bitsandbytes");
        return wrong(ctx, what, "quant_method", "\"fp8\" or \"mxfp4\"", method);
    }
    if (!strcmp(json_string_value(method), "fp8")) return read_fp8(ctx, q, what, s);
    if (strcmp(json_string_value(method), "mxfp4") != 0) return refuse(ctx, what, json_string_value(method));
    s->quant = EXC_QUANT_MXFP4;
    return EXC_OK;
}

const char *exc_quant_name(exc_quant q) { return q == EXC_QUANT_FP8 ? "fp8" : q == EXC_QUANT_MXFP4 ? "mxfp4" : "none"; }

/* -------------------------------------------------------------------------------------------------------- by tensors */

static bool ends_with(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n > m && !strcmp(name + n - m, end);
}

/* a checkpoint whose config is silent about it still shows what it is by the tensors beside or instead of its weights */
exc_status exc_quant_guess(exc_ctx *ctx, const exc_checkpoint *files) {
    static const struct {
        const char *end, *what;
    } marks[] = {
        {".qweight", "GPTQ or AWQ"},      {".weight_packed", "compressed-tensors"}, {".weight_scale_2", "NVFP4"},
        {".weight.absmax", "bitsandbytes"}, {".SCB", "bitsandbytes"},               {".q_weight", "EXL2"},
    };
    for (size_t i = 0; i < files->n_tensors; i++)
        for (size_t m = 0; m < EXC_COUNT(marks); m++) {
            const exc_tensor *t = files->by_name[i];
            if (!ends_with(t->name, marks[m].end)) continue;
            return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected weights stored as BF16, F16, F32, F8_E4M3 or MXFP4, found a tensor of %s; " ORIGINAL,
                            files->files[t->shard]->path, exc_show(t->name, strlen(t->name)), marks[m].what);
        }
    return EXC_OK;
}

/* --------------------------------------------------------------------------------------------------------- the scales */

bool exc_weight_coded(const exc_weight *w) { return w->dtype == EXC_F8_E4M3 || w->dtype == EXC_F4; }

void exc_weight_scales(const exc_weight *w, int64_t *rows, int64_t *cols) {
    *rows = w->dtype == EXC_F4 ? w->out : (w->scale_first + w->out + BLOCK - 1) / BLOCK;
    *cols = w->dtype == EXC_F4 ? w->in / GROUP : (w->in + BLOCK - 1) / BLOCK;
}

size_t exc_weight_scale_bytes(const exc_weight *w) {
    int64_t rows, cols;
    if (!exc_weight_coded(w)) return 0;
    exc_weight_scales(w, &rows, &cols);
    return (size_t)(rows * cols) * exc_dtype_bits((exc_dtype)w->scale_dtype) / 8;
}

/* the name of a coded tensor's scales, or of the tensor whose scales a name is; false: neither kind of name */
static bool swap_end(const char *name, const char *end, const char *other, char *out, size_t cap) {
    size_t n = strlen(name), m = strlen(end);
    if (n <= m || strcmp(name + n - m, end) != 0 || n - m + strlen(other) >= cap) return false;
    memcpy(out, name, n - m);
    strcpy(out + n - m, other);
    return true;
}

bool exc_scale_owner(const char *name, char *out, size_t cap) {
    return swap_end(name, "_scale_inv", "", out, cap) || swap_end(name, "_scales", "_blocks", out, cap);
}

static exc_status check_shape(exc_ctx *ctx, const exc_atlas *a, const exc_tensor *t, const exc_weight *w, int rank, const int64_t *shape) {
    bool fits = t->rank == rank;
    char want[96] = "", found[128] = "";
    size_t n = 0, m = 0;
    for (int i = 0; i < rank; i++) {
        fits = fits && t->shape[i] == shape[i];
        n += (size_t)snprintf(want + n, sizeof want - n, "%s%lld", i ? "," : "", (long long)shape[i]);
    }
    for (int i = 0; i < t->rank && i < 4; i++)
        m += (size_t)snprintf(found + m, sizeof found - m, "%s%lld", i ? "," : "", (long long)t->shape[i]);
    if (fits) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: shape: expected [%s] (a scale for every %s of %s), found [%s%s]", a->files->files[t->shard]->path,
                    exc_show(t->name, strlen(t->name)), want, w->dtype == EXC_F4 ? "32 inputs" : "128 x 128 block",
                    exc_show(w->tensor->name, strlen(w->tensor->name)), found, t->rank > 4 ? ",.." : "");
}

static exc_status check_dtype(exc_ctx *ctx, const exc_atlas *a, const exc_tensor *t, exc_weight *w) {
    bool power = t->dtype == EXC_U8 || t->dtype == EXC_F8_E8M0;
    w->scale_dtype = power ? EXC_F8_E8M0 : (int)t->dtype;
    if (power || (w->dtype == EXC_F8_E4M3 && (t->dtype == EXC_F32 || t->dtype == EXC_BF16))) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: dtype: expected %s, found %s", a->files->files[t->shard]->path, exc_show(t->name, strlen(t->name)),
                    w->dtype == EXC_F4 ? "U8 or F8_E8M0" : "F32, BF16, F8_E8M0 or U8", t->dtype_name ? t->dtype_name : exc_dtype_name(t->dtype));
}

/* scales of the tensor that w is in, or in part of */
exc_status exc_scale_find(exc_ctx *ctx, const exc_atlas *a, const exc_layout *y, exc_weight *w) {
    const exc_tensor *t = w->tensor;
    char name[512];
    const char *file = a->files->files[t->shard]->path, *shown = exc_show(t->name, strlen(t->name));
    bool f4 = w->dtype == EXC_F4, named = f4 ? swap_end(t->name, "_blocks", "_scales", name, sizeof name) : swap_end(t->name, "", "_scale_inv", name, sizeof name);
    exc_quant want = f4 ? EXC_QUANT_MXFP4 : EXC_QUANT_FP8;
    if (a->shape.quant != want)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: dtype %s: expected quantization_config.quant_method \"%s\" in config.json for this tensor, found %s", file, shown,
                        exc_dtype_name((exc_dtype)w->dtype), exc_quant_name(want), exc_quant_name(a->shape.quant));
    int64_t parts = y->parts ? y->parts : 1, out = w->out * parts, shape[3];
    if (!f4 && (y->transposed || y->mixed))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected bf16, f16 or f32 where %s, found e4m3", file, shown,
                        y->mixed ? "parts take turns" : "weights lie as [in,out]");
    w->scale = named ? exc_checkpoint_find(a->files, name) : NULL;
    if (!w->scale) return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected its scales in %s, found no such tensor", file, shown, named ? name : "a tensor beside it");
    int rank = 0;
    if (y->stacked) shape[rank++] = a->shape.experts;
    shape[rank++] = f4 ? out : (out + BLOCK - 1) / BLOCK;
    shape[rank++] = f4 ? w->in / GROUP : (w->in + BLOCK - 1) / BLOCK;
    EXC_TRY(check_dtype(ctx, a, w->scale, w));
    return check_shape(ctx, a, w->scale, w, rank, shape);
}

/* where in them those of w lie */
void exc_scale_locate(const exc_layout *y, exc_weight *w) {
    int64_t rows, cols, parts = y->parts ? y->parts : 1, per_row = w->dtype == EXC_F4 ? 1 : BLOCK, before = y->part * w->out;
    if (!exc_weight_coded(w)) return;
    w->scale_first = before % per_row;
    w->scale_shared = parts > 1 && w->out % per_row;
    exc_weight_scales(w, &rows, &cols);
    size_t unit = exc_dtype_bits((exc_dtype)w->scale_dtype) / 8;
    int64_t first = y->mixed ? y->part : before / per_row; /* row */
    if (y->stacked) first += w->expert * ((w->out * parts + per_row - 1) / per_row);
    w->scale_step = y->mixed ? parts * cols : cols;
    w->scale_begin = w->scale->begin + (uint64_t)(first * cols) * unit;
    w->scale_end = w->scale_begin + (uint64_t)((rows - 1) * w->scale_step + cols) * unit;
}

size_t exc_scale_offset(const exc_weight *w, int64_t row) {
    int64_t rows, cols;
    exc_weight_scales(w, &rows, &cols);
    return (size_t)(w->dtype == EXC_F4 ? row : (w->scale_first + row) / BLOCK) * (size_t)cols * exc_dtype_bits((exc_dtype)w->scale_dtype) / 8;
}

int64_t exc_scale_run(const exc_weight *w, int64_t row) { return BLOCK - (w->scale_first + row) % BLOCK; }

/* rows of scales between where they lie and an array without gaps */
static void copy_scales(const exc_weight *w, const uint8_t *from, int64_t from_step, uint8_t *to, int64_t to_step) {
    int64_t rows, cols;
    exc_weight_scales(w, &rows, &cols);
    size_t unit = exc_dtype_bits((exc_dtype)w->scale_dtype) / 8;
    for (int64_t r = 0; r < rows; r++)
        memcpy(to + (size_t)(r * to_step) * unit, from + (size_t)(r * from_step) * unit, (size_t)cols * unit);
}

void exc_scale_gather(const exc_weight *w, const void *lying, void *dense) {
    int64_t rows, cols;
    exc_weight_scales(w, &rows, &cols);
    copy_scales(w, lying, w->scale_step, dense, cols);
}

void exc_scale_scatter(const exc_weight *w, const void *dense, void *lying) {
    int64_t rows, cols;
    exc_weight_scales(w, &rows, &cols);
    copy_scales(w, dense, cols, lying, w->scale_step);
}
