/* scaling.c - rotary positions: base, frequencies, and the ways to stretch them beyond the context of the
 * first training.
 *
 * Channel pair i turns by position * theta^(-2i/d). yarn and llama3 keep the fast pairs, divide the slow ones
 * by `factor` and blend between: yarn by a ramp over pair numbers whose ends are pairs with `fast` and `slow`
 * turns in the original context, llama3 by the number of turns itself. yarn also multiplies cosines and sines
 * by `attention`, and multi-head latent attention its softmax scale by `score`. Both hold at every length, as
 * loaders have it. f64 here, rounded once to f32. */
#include <math.h>
#include <string.h>

#include "model.h"

static const double pi = 3.14159265358979323846;

/* a number in [lo, hi] from the scaling object; absent NaN: it must be there */
static exc_status number(exc_ctx *ctx, const json_t *o, const char *what, const char *key, double lo,
                         double hi, double absent, double *out) {
    EXC_TRY(exc_json_number_or(ctx, o, what, key, absent, out));
    if (*out >= lo && *out <= hi) return EXC_OK;
    if (isnan(*out))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected a number (rope scaling), found nothing", what,
                        key);
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected a number in [%g, %g], found %.9g", what, key, lo,
                    hi, *out);
}

/* how many channels of a head rotate: rounded down, as loaders do it */
static exc_status read_rotary(exc_ctx *ctx, const json_t *rope, const json_t *config, const char *what,
                              const exc_family *f, exc_shape *s) {
    static const char key[] = "partial_rotary_factor";
    double factor;
    EXC_TRY(
        exc_json_number_or(ctx, json_object_get(rope, key) ? rope : config, what, key, f->rotary, &factor));
    /* a factor that loaders of the family ignore must not change the answer here */
    if (f->rotary == 1 && factor != 1)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected 1 (the family rotates whole heads), found %g",
                        what, key, factor);
    int64_t channels = s->latent.rotary ? s->latent.rotary : s->head_dim;
    s->rotary = factor > 0 && factor <= 1 ? (int64_t)((double)channels * factor) : 0;
    if (s->rotary < 2 || s->rotary % 2)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: %s: expected an even number of the %lld channels of a head, found %g of them",
                        what, key, (long long)channels, factor);
    return EXC_OK;
}

/* the object that says how positions are scaled, and the key it has: rope_scaling, else rope_parameters, else
 * none */
static exc_status find_object(exc_ctx *ctx, const json_t *config, const char *what, const json_t **out,
                              const char **name) {
    static const char *const keys[] = {"rope_scaling", "rope_parameters"};
    *out = NULL;
    for (size_t i = 0; i < EXC_COUNT(keys); i++) {
        const json_t *o = json_object_get(config, keys[i]);
        if (!o || json_is_null(o)) continue;
        if (!json_is_object(o))
            return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected an object", what, keys[i]);
        *name = keys[i];
        *out = o;
        if (json_object_size(o)) return EXC_OK;
    }
    return EXC_OK;
}

static const char *const kinds[] = {
    [EXC_ROPE_PLAIN] = "default", [EXC_ROPE_YARN] = "yarn", [EXC_ROPE_LLAMA3] = "llama3"};

const char *exc_rope_name(exc_rope_kind kind) { return kinds[kind]; }

static exc_status read_kind(exc_ctx *ctx, const json_t *o, const char *what, const char *name, exc_rope *r) {
    const char *type;
    EXC_TRY(exc_json_string_or(ctx, o, what, json_object_get(o, "rope_type") ? "rope_type" : "type",
                               "nothing", &type));
    for (size_t i = 0; i < EXC_COUNT(kinds); i++)
        if (!strcmp(type, kinds[i])) {
            r->kind = (exc_rope_kind)i;
            return EXC_OK;
        }
    return exc_fail(ctx, EXC_ERR_INPUT,
                    "%s: %s: expected rope_type \"default\", \"yarn\" or \"llama3\", found \"%s\"", what,
                    name, exc_show(type, strlen(type)));
}

/* what both ways have: the factor, and the context of the first training, which may stand outside the object
 */
static exc_status read_stretch(exc_ctx *ctx, const json_t *o, const json_t *config, const char *what,
                               int64_t context, exc_rope *r) {
    static const char key[] = "original_max_position_embeddings";
    int64_t original;
    EXC_TRY(exc_json_int_or(ctx, json_object_get(config, key) ? config : o, what, key, 1, (int64_t)1 << 24,
                            context, &original));
    r->original = (double)original;
    /* null, not absent: the ratio of the two contexts */
    double ratio = json_object_get(o, "factor") ? (double)context / r->original : NAN;
    return number(ctx, o, what, "factor", 1, 1e6, ratio, &r->factor);
}

static double mscale(double factor, double by) { return factor > 1 ? 0.1 * by * log(factor) + 1 : 1; }

static exc_status read_yarn(exc_ctx *ctx, const json_t *o, const char *what, exc_rope *r) {
    double scale, all, attention;
    EXC_TRY(number(ctx, o, what, "beta_fast", 0, 1e6, 32, &r->fast));
    EXC_TRY(number(ctx, o, what, "beta_slow", 0, 1e6, 1, &r->slow));
    if (r->fast == 0) r->fast = 32; /* loaders take 0 for absent */
    if (r->slow == 0) r->slow = 1;
    if (r->fast < r->slow)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: beta_fast: expected at least beta_slow (%g), found %g", what,
                        r->slow, r->fast);
    EXC_TRY(exc_json_bool_or(ctx, o, what, "truncate", true, &r->truncate));
    EXC_TRY(number(ctx, o, what, "mscale", 0, 1e3, 0, &scale));
    EXC_TRY(number(ctx, o, what, "mscale_all_dim", 0, 1e3, 0, &all));
    double both =
        scale != 0 && all != 0 ? mscale(r->factor, scale) / mscale(r->factor, all) : mscale(r->factor, 1);
    EXC_TRY(number(ctx, o, what, "attention_factor", 0, 1e3, both, &attention));
    r->attention = (float)attention;
    r->score = mscale(r->factor, all) * mscale(r->factor, all);
    return EXC_OK;
}

static exc_status read_llama3(exc_ctx *ctx, const json_t *o, const char *what, exc_rope *r) {
    EXC_TRY(number(ctx, o, what, "low_freq_factor", 0, 1e6, NAN, &r->slow));
    EXC_TRY(number(ctx, o, what, "high_freq_factor", 0, 1e6, NAN, &r->fast));
    if (r->slow < r->fast) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT,
                    "%s: high_freq_factor: expected more than low_freq_factor (%g), found %g", what, r->slow,
                    r->fast);
}

exc_status exc_rope_read(exc_ctx *ctx, const json_t *config, const char *what, const exc_family *f,
                         exc_shape *s) {
    const json_t *o;
    const char *name = "";
    exc_rope *r = &s->rope;
    EXC_TRY(find_object(ctx, config, what, &o, &name));
    *r = !o && f->rope ? *f->rope : (exc_rope){.attention = 1, .score = 1, .factor = 1};
    if (o) EXC_TRY(read_kind(ctx, o, what, name, r));
    EXC_TRY(exc_json_number_or(ctx, config, what, "rope_theta", f->rope_theta, &r->theta));
    EXC_TRY(exc_json_number_or(ctx, o, what, "rope_theta", r->theta, &r->theta));
    if (!(r->theta > 1.0) || r->theta > 1e12)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: rope_theta: expected a number in (1, 1e12], found %.9g",
                        what, r->theta);
    if (!o) return read_rotary(ctx, o, config, what, f, s);
    if (r->kind != EXC_ROPE_PLAIN) EXC_TRY(read_stretch(ctx, o, config, what, s->context, r));
    if (r->kind == EXC_ROPE_YARN) EXC_TRY(read_yarn(ctx, o, what, r));
    if (r->kind == EXC_ROPE_LLAMA3) EXC_TRY(read_llama3(ctx, o, what, r));
    return read_rotary(ctx, o, config, what, f, s);
}

/* number of the pair, as a real, that turns `turns` times in the original context */
static double pair_of(const exc_rope *r, double turns, double channels) {
    return channels * log(r->original / (turns * 2 * pi)) / (2 * log(r->theta));
}

static double clamp(double x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

void exc_rope_frequencies(const exc_rope *r, int64_t channels, float *out) {
    double d = (double)channels, low = 0, high = 1;
    if (r->kind == EXC_ROPE_YARN) {
        low = pair_of(r, r->fast, d);
        high = pair_of(r, r->slow, d);
        if (r->truncate) low = floor(low), high = ceil(high);
        if (low < 0) low = 0;
        if (high > d - 1) high = d - 1;
        if (low == high) high += 0.001;
    }
    for (int64_t i = 0; i < channels / 2; i++) {
        double own = pow(r->theta, -2.0 * (double)i / d),
               kept = 1; /* how much of the pair's own frequency stays */
        if (r->kind == EXC_ROPE_YARN) kept = 1 - clamp(((double)i - low) / (high - low));
        if (r->kind == EXC_ROPE_LLAMA3)
            kept = clamp((r->original * own / (2 * pi) - r->slow) / (r->fast - r->slow));
        out[i] = (float)(kept * own + (1 - kept) * own / r->factor);
    }
}
