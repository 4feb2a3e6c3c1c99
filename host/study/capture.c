/* capture.c - two prompt sets through a model, sums out.
 *
 * The sums are taken inside the forward pass (ops route, glu, down), so this file only says what is observed
 * and where it goes. Prefill and decode are separate groups: which experts read a request and which ones
 * write the reply are different questions. Observed are, in prefill, the tokens of the request itself and the
 * last position: the reply is decided there, although it is a template token (on the demo model, experts
 * ranked without it are the wrong ones). Other template, system and special tokens are the same in both sets
 * and would only dilute the contrast; ragged batches have no padding. In decode every greedy token that is
 * fed back counts. Output sums follow from the intermediate sums, sum_t W a_t = W sum_t a_t, with one pass
 * over the down_proj weights at the end for all groups. All arrays are taken before the first token runs; while a set runs its
 * sums live where the ops do. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "totals.h"

#define RULE                                                                                                 \
    "prefill: tokens of the requests and the last position, which emits the first new token (no other chat " \
    "template, system text or special tokens; no padding exists); "                                          \
    "decode: every greedy token fed back, up to an end token"

typedef struct capture {
    exc_ctx *ctx;
    exc_model *m;
    const exc_prompts *set[2];
    exc_capture_options opt;
    exc_stats *s;
    int32_t *observe[2];           /* [tokens] 1: observed in prefill */
    const int32_t **observe_of[2]; /* [P] into observe */
    int64_t observed[2], ended[2];
    double *x, *y;            /* [4,I], [4,H]: one expert's sums of all groups */
    double *shared_mid[2][2]; /* [M,Ishared] sums before the shared experts' down_proj, or NULL */
} capture;

static const char *const label_name[2] = {"target", "baseline"};

/* ------------------------------------------------------------------------------------------------- the sets
 */

static int64_t length_of(const exc_prompts *p, int64_t i) { return p->begin[i + 1] - p->begin[i]; }

static int compare_prompts(const exc_prompts *a, int64_t i, const exc_prompts *b, int64_t j) {
    int64_t na = length_of(a, i), nb = length_of(b, j);
    if (na != nb) return na < nb ? -1 : 1;
    return memcmp(a->tokens + a->begin[i], b->tokens + b->begin[j], (size_t)na * sizeof *a->tokens);
}

static int by_tokens(const void *a, const void *b, void *set) {
    return compare_prompts(set, *(const int64_t *)a, set, *(const int64_t *)b);
}

/* prompts that both sets have, by their tokens and in any order; every copy counts */
static exc_status count_shared(const capture *c, int64_t *shared) {
    const exc_prompts *t = c->set[0], *b = c->set[1];
    int64_t *order = exc_alloc(c->ctx, (size_t)(t->count + b->count), sizeof *order, "order of prompts");
    if (!order) return EXC_ERR_MEMORY;
    int64_t *other = order + t->count;
    for (int64_t i = 0; i < t->count; i++) order[i] = i;
    for (int64_t i = 0; i < b->count; i++) other[i] = i;
    qsort_r(order, (size_t)t->count, sizeof *order, by_tokens, (void *)(uintptr_t)t);
    qsort_r(other, (size_t)b->count, sizeof *other, by_tokens, (void *)(uintptr_t)b);
    *shared = 0;
    for (int64_t i = 0, j = 0; i < t->count && j < b->count;) {
        int order_of = compare_prompts(t, order[i], b, other[j]);
        *shared += order_of == 0;
        i += order_of <= 0;
        j += order_of >= 0;
    }
    exc_release(order);
    return EXC_OK;
}

/* sets without a difference have no contrast: every direction would be rounding noise */
static exc_status check_sets(const capture *c) {
    int64_t shared = 0;
    for (int i = 0; i < 2; i++) {
        if (c->set[i]->count < 1)
            return exc_fail(c->ctx, EXC_ERR_INPUT, "%s set: expected at least one prompt, found none",
                            label_name[i]);
        exc_status st = exc_prompts_check(c->ctx, c->m, c->set[i], 0);
        if (st != EXC_OK) {
            char text[sizeof c->ctx->error];
            memcpy(text, c->ctx->error, sizeof text);
            exc_clear(c->ctx);
            return exc_fail(c->ctx, st, "%s set: %s", label_name[i], text);
        }
    }
    EXC_TRY(count_shared(c, &shared));
    if (shared == c->set[0]->count && shared == c->set[1]->count)
        return exc_fail(c->ctx, EXC_ERR_INPUT,
                        "target and baseline set: expected different prompts, found the same %lld in both",
                        (long long)shared);
    if (shared)
        exc_warn(c->ctx, "capture: %lld prompts are in the target and in the baseline set",
                 (long long)shared);
    return EXC_OK;
}

static exc_status choose_observed(capture *c, int label) {
    const exc_prompts *p = c->set[label];
    int64_t tokens = p->begin[p->count];
    int32_t *o = c->observe[label] = exc_alloc(c->ctx, (size_t)tokens, sizeof *o, "observed tokens");
    const int32_t **of = exc_alloc(c->ctx, (size_t)p->count, sizeof *of, "observed tokens");
    c->observe_of[label] = of;
    if (!o || !of) return EXC_ERR_MEMORY;
    int64_t text = 0;
    for (int64_t t = 0; t < tokens; t++) text += o[t] = !p->content || p->content[t];
    for (int64_t i = 0; i < p->count; i++) {
        of[i] = o + p->begin[i];
        o[p->begin[i + 1] - 1] = 1;
    }
    for (int64_t t = 0; t < tokens; t++) c->observed[label] += o[t];
    if (text) return EXC_OK;
    return exc_fail(c->ctx, EXC_ERR_INPUT,
                    "%s set: expected prompts with text of their own, found only template and special tokens",
                    label_name[label]);
}

/* ------------------------------------------------------------------------------------------------------ runs
 */

static exc_status make_stats(capture *c) {
    const exc_atlas *a = c->m->atlas;
    const exc_shape *p = &a->shape;
    exc_stats sizes = {.layers = p->layers,
                       .moe_layers = p->moe_layers,
                       .experts = p->experts,
                       .top_k = p->top_k,
                       .inner = p->inner,
                       .hidden = p->hidden,
                       .decode = c->opt.decode};
    char options[512];
    if (p->moe_layers < 1)
        return exc_fail(c->ctx, EXC_ERR_INPUT, "%s: expected at least one layer with experts, found none",
                        c->m->dir);
    sizes.layer_of = exc_alloc(c->ctx, (size_t)p->moe_layers, sizeof *sizes.layer_of, "layers of the stats");
    if (!sizes.layer_of) return EXC_ERR_MEMORY;
    for (int64_t i = 0; i < p->layers; i++)
        if (p->is_moe[i]) sizes.layer_of[p->moe_row[i]] = i;
    for (int i = 0; i < 2; i++) {
        sizes.prompts[i] = c->set[i]->count;
        sizes.prompt_hashes[i] = (char *)(uintptr_t)c->set[i]->hash;
    }
    memcpy(sizes.fingerprint, a->fingerprint, sizeof sizes.fingerprint);
    snprintf(options, sizeof options,
             "{\"decode\":%d,\"no_out\":%s,\"reproducible\":%s,\"compute\":\"%s\",\"plan\":\"%s\","
             "\"observed\":\"" RULE "\"}",
             c->opt.decode, c->opt.no_out ? "true" : "false", c->ctx->queue.reproducible ? "true" : "false",
             c->m->compute == EXC_COMPUTE_F32 ? "f32" : "bf16",
             !c->m->has_lens    ? "none"
             : c->m->is_virtual ? "virtual"
                                : "baked");
    sizes.options = options;
    exc_status st = exc_stats_new(c->ctx, &sizes, !c->opt.no_out, &c->s);
    exc_release(sizes.layer_of);
    if (st != EXC_OK || c->opt.no_out) return st;
    c->x = exc_alloc(c->ctx, (size_t)(4 * p->inner), sizeof *c->x, "sums of an expert");
    c->y = exc_alloc(c->ctx, (size_t)(4 * p->hidden), sizeof *c->y, "sums of an expert");
    return c->x && c->y ? EXC_OK : EXC_ERR_MEMORY;
}

/* the file keeps what the shared experts put out, not what went in, so both are here until the end */
static exc_status make_shared(capture *c) {
    const exc_shape *p = &c->m->atlas->shape;
    if (!p->shared_inner) return EXC_OK;
    for (int i = 0; i < 4; i++) {
        double **in = &c->shared_mid[i / 2][i % 2], **out = &c->s->group[i / 2][i % 2].shared_out_sum;
        *in = exc_zalloc(c->ctx, (size_t)(p->moe_layers * p->shared_inner), sizeof **in,
                         "sums of shared experts");
        *out =
            exc_zalloc(c->ctx, (size_t)(p->moe_layers * p->hidden), sizeof **out, "sums of shared experts");
        if (!*in || !*out) return EXC_ERR_MEMORY;
    }
    return EXC_OK;
}

static exc_sums sums_of(const capture *c, int label, int phase) {
    const exc_stats *s = c->s;
    const exc_group *g = &s->group[label][phase];
    return (exc_sums){.count = g->count,
                      .gate_sum = g->gate_sum,
                      .mid_sum = g->mid_sum,
                      .sqnorm_sum = g->sqnorm_sum,
                      .shared_mid_sum = c->shared_mid[label][phase],
                      .tokens = g->tokens,
                      .prompt_count = phase == EXC_PREFILL ? s->prompt_count[label] : NULL};
}

/* bytes of the sums; on a device those that lie there */
static uint64_t held(const capture *c, const exc_dock *there) {
    if (c->ctx->module) return there->bytes;
    exc_field all[EXC_STATS_FIELDS];
    uint64_t bytes = 4 * (uint64_t)(c->s->moe_layers * c->m->atlas->shape.shared_inner) * sizeof(double);
    exc_stats_fields(c->s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++)
        if (exc_field_get(&all[i])) bytes += (uint64_t)exc_field_count(&all[i]) * exc_dtype_bits(all[i].dtype) / 8;
    return bytes;
}

static void dock_sums(const capture *c, int label, exc_sums *sums, exc_dock *d) {
    const exc_shape *p = &c->m->atlas->shape;
    size_t M = (size_t)p->moe_layers, cells = M * (size_t)p->experts;
    exc_dock_both(d, &sums->count, cells * sizeof *sums->count);
    exc_dock_both(d, &sums->gate_sum, cells * sizeof *sums->gate_sum);
    exc_dock_both(d, &sums->mid_sum, cells * (size_t)p->inner * sizeof *sums->mid_sum);
    exc_dock_both(d, &sums->sqnorm_sum, cells * sizeof *sums->sqnorm_sum);
    exc_dock_both(d, &sums->shared_mid_sum, M * (size_t)p->shared_inner * sizeof *sums->shared_mid_sum);
    exc_dock_both(d, &sums->prompt_count, (size_t)c->s->prompts[label] * cells * sizeof *sums->prompt_count);
}

static exc_status run_set(capture *c, int label) {
    const exc_prompts *p = c->set[label];
    exc_sums prefill = sums_of(c, label, EXC_PREFILL), decode = sums_of(c, label, EXC_DECODE);
    exc_dock sums = {.ctx = c->ctx, .what = "sums of a capture"};
    exc_decode d = {.max_new =
                        c->opt.decode ? c->opt.decode + 1 : 0, /* the last new token is never fed back */
                    .observe = true,
                    .prefill_sums = &prefill,
                    .decode_sums = &decode,
                    .prefill_observe = c->observe_of[label],
                    .hidden_last = c->s->resid_last[label],
                    .batch_tokens = c->opt.batch_tokens,
                    .step = label ? "capture baseline" : "capture target"};
    exc_reply *replies = NULL;
    dock_sums(c, label, &prefill, &sums);
    if (c->opt.decode) dock_sums(c, label, &decode, &sums);
    exc_status st = exc_dock_enter(&sums);
    d.held = held(c, &sums);
    if (st == EXC_OK) st = exc_decode_run(c->ctx, c->m, p, &d, &replies);
    st = exc_dock_leave(&sums, st);
    for (int64_t i = 0; st == EXC_OK && i < p->count; i++) c->ended[label] += replies[i].stopped;
    exc_replies_free(replies, p->count);
    return st;
}

/* out_sum [M,E,H] of all groups from mid_sum [M,E,I]; a weight is read once for the four */
static exc_status sum_outputs(capture *c) {
    exc_stats *s = c->s;
    int64_t E = s->experts, I = s->inner, H = s->hidden;
    for (int64_t m = 0; m < s->moe_layers; m++) {
        for (int64_t e = 0; e < E; e++) {
            int64_t terms[4];
            for (int g = 0; g < 4; g++) terms[g] = s->group[g / 2][g % 2].count[m * E + e];
            if (!(terms[0] + terms[1] + terms[2] + terms[3])) continue; /* its sums are zero, and stay so */
            if (e < c->m->expert_first || e >= c->m->expert_end) continue; /* another rank's expert: added at the end */
            for (int g = 0; g < 4; g++)
                memcpy(c->x + g * I, s->group[g / 2][g % 2].mid_sum + (m * E + e) * I,
                       (size_t)I * sizeof *c->x);
            EXC_TRY(exc_model_down(c->ctx, c->m, EXC_ROLE_EXPERT_DOWN, s->layer_of[m], e, c->x, terms, 4, c->y));
            for (int g = 0; g < 4; g++)
                memcpy(s->group[g / 2][g % 2].out_sum + (m * E + e) * H, c->y + g * H,
                       (size_t)H * sizeof *c->y);
        }
        EXC_TRY(exc_progress(c->ctx, "output sums", (uint64_t)m + 1, (uint64_t)s->moe_layers, "layers"));
    }
    return EXC_OK;
}

/* Each rank has counted its own sequences' choices and its own experts' activations: the sum over ranks is the whole. Ranks with GPUs
 * take it on their hosts as well: the sums have come there for the file, once a capture and not once a step, and are added in rank
 * order, so that f64 has the same bits on every rank, with any number of GPUs and any transport (NCCL's order is that of its
 * ring, its version and the message's size). Counts are integers, exact in any order. */
static exc_status share_sums(capture *c) {
    exc_ctx *ctx = c->ctx;
    const exc_stats *s = c->s;
    size_t M = (size_t)s->moe_layers, E = (size_t)s->experts;
    for (int i = 0; i < 4; i++) {
        const exc_group *g = &s->group[i / 2][i % 2];
        EXC_TRY(exc_ranks_sum(ctx, "counts", EXC_I64, g->count, M * E));
        EXC_TRY(exc_ranks_sum(ctx, "gate sums", EXC_F64, g->gate_sum, M * E));
        EXC_TRY(exc_ranks_sum(ctx, "intermediate sums", EXC_F64, g->mid_sum, M * E * (size_t)s->inner));
        EXC_TRY(exc_ranks_sum(ctx, "output norms", EXC_F64, g->sqnorm_sum, M * E));
        EXC_TRY(exc_ranks_sum(ctx, "tokens", EXC_I64, g->tokens, M));
        EXC_TRY(exc_ranks_sum(ctx, "sums of shared experts", EXC_F64, c->shared_mid[i / 2][i % 2],
                              M * (size_t)c->m->atlas->shape.shared_inner));
    }
    for (int i = 0; i < 2; i++)
        EXC_TRY(exc_ranks_sum(ctx, "counts by prompt", EXC_U32, s->prompt_count[i], (size_t)s->prompts[i] * M * E));
    return EXC_OK;
}

static exc_status share_outputs(capture *c) {
    const exc_stats *s = c->s;
    for (int i = 0; i < 4; i++)
        EXC_TRY(exc_ranks_sum(c->ctx, "output sums", EXC_F64, s->group[i / 2][i % 2].out_sum,
                              (size_t)(s->moe_layers * s->experts * s->hidden)));
    return EXC_OK;
}

static exc_status sum_shared(capture *c) {
    exc_stats *s = c->s;
    int64_t I = c->m->atlas->shape.shared_inner, H = s->hidden;
    for (int64_t m = 0; m < s->moe_layers && I; m++)
        for (int g = 0; g < 4; g++)
            EXC_TRY(exc_model_down(c->ctx, c->m, EXC_ROLE_SHARED_DOWN, s->layer_of[m], -1,
                                   c->shared_mid[g / 2][g % 2] + m * I, &s->group[g / 2][g % 2].tokens[m], 1,
                                   s->group[g / 2][g % 2].shared_out_sum + m * H));
    return EXC_OK;
}

/* ---------------------------------------------------------------------------------------------------- result
 */

/* a sum beyond the reach of fixed point is right, but its last bits may depend on the order of the terms */
static void warn_inexact(const capture *c) {
    exc_field all[EXC_STATS_FIELDS];
    exc_stats_fields(c->s, all);
    for (int i = 0; i < EXC_STATS_FIELDS; i++) {
        const double *sum = exc_field_get(&all[i]);
        if (!sum || all[i].dtype != EXC_F64 || strstr(all[i].name, "out_sum")) continue;
        double limit = EXC_EXACT_UNITS * (strstr(all[i].name, "sqnorm") ? EXC_SQUARE_UNIT : EXC_UNIT);
        int64_t n = exc_field_count(&all[i]), beyond = 0;
        for (int64_t k = 0; k < n; k++) beyond += fabs(sum[k]) >= limit;
        if (beyond)
            exc_warn(c->ctx,
                     "capture: %s: %lld sums are beyond %.2g: bits may depend on the batching after all",
                     all[i].name, (long long)beyond, limit);
    }
}

static json_t *set_facts(const capture *c, int label) {
    const exc_prompts *p = c->set[label];
    const exc_group *d = &c->s->group[label][EXC_DECODE];
    json_t *o = json_pack("{s:I,s:I,s:I}", "prompts", (json_int_t)p->count, "tokens",
                          (json_int_t)p->begin[p->count], "observed", (json_int_t)c->observed[label]);
    if (!c->opt.decode) return o;
    json_object_set_new(o, "decoded", json_integer(d->tokens[0]));
    json_object_set_new(o, "replies_ended", json_integer(c->ended[label]));
    return o;
}

static exc_status facts(const capture *c, char **json) {
    const exc_stats *s = c->s;
    if (!json) return EXC_OK;
    json_t *o =
        json_pack("{s:s,s:I,s:I,s:I,s:i,s:s,s:b,s:s,s:o,s:o}", "model", s->fingerprint, "moe_layers",
                  (json_int_t)s->moe_layers, "experts", (json_int_t)s->experts, "top_k", (json_int_t)s->top_k,
                  "decode", s->decode, "compute", c->m->compute == EXC_COMPUTE_F32 ? "f32" : "bf16",
                  "output_sums", !c->opt.no_out, "observed", RULE, "target", set_facts(c, EXC_TARGET),
                  "baseline", set_facts(c, EXC_BASELINE));
    exc_memory_facts(c->m, o);
    *json = o ? exc_json_text(c->ctx, o) : NULL;
    json_decref(o);
    return *json ? EXC_OK : exc_fail(c->ctx, EXC_ERR_MEMORY, "capture: no memory for the result");
}

static exc_status perform(capture *c, char **json) {
    EXC_TRY(check_sets(c));
    for (int i = 0; i < 2; i++) EXC_TRY(choose_observed(c, i));
    EXC_TRY(make_stats(c));
    EXC_TRY(make_shared(c));
    exc_info(c->ctx, "observed: " RULE);
    exc_info(c->ctx, "observed in prefill: %lld of %lld target tokens, %lld of %lld baseline tokens",
             (long long)c->observed[0], (long long)c->set[0]->begin[c->set[0]->count],
             (long long)c->observed[1], (long long)c->set[1]->begin[c->set[1]->count]);
    for (int i = 0; i < 2; i++) EXC_TRY(run_set(c, i));
    EXC_TRY(share_sums(c));
    if (!c->opt.no_out) EXC_TRY(sum_outputs(c));
    if (!c->opt.no_out) EXC_TRY(share_outputs(c));
    EXC_TRY(sum_shared(c));
    EXC_TRY(exc_stats_check(c->ctx, c->s, "capture"));
    if (c->ctx->queue.reproducible) warn_inexact(c);
    return facts(c, json);
}

exc_status exc_capture(exc_ctx *ctx, exc_model *model, const exc_prompts *target, const exc_prompts *baseline,
                       const exc_capture_options *options, exc_stats **stats, char **json) {
    capture c = {.ctx = ctx, .m = model, .set = {target, baseline}};
    exc_clear(ctx);
    if (json) *json = NULL;
    if (!model || !target || !baseline || !stats)
        return exc_fail(ctx, EXC_ERR_USAGE,
                        "capture: expected a model, two prompt sets and a place for the stats");
    *stats = NULL;
    if (options) c.opt = *options;
    if (c.opt.decode < 0 || c.opt.decode == INT32_MAX || c.opt.batch_tokens < 0)
        return exc_fail(ctx, EXC_ERR_USAGE,
                        "capture: expected decode and batch_tokens of 0 or more, found %d and %d",
                        c.opt.decode, c.opt.batch_tokens);
    exc_status st = perform(&c, json);
    for (int i = 0; i < 2; i++) {
        exc_release(c.observe[i]);
        exc_release((void *)(uintptr_t)c.observe_of[i]);
    }
    for (int i = 0; i < 4; i++) exc_release(c.shared_mid[i / 2][i % 2]);
    exc_release(c.x);
    exc_release(c.y);
    if (st == EXC_OK)
        *stats = c.s;
    else
        exc_stats_free(c.s);
    return st;
}
