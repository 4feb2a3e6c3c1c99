/* stream.c - the [stream] tier: someone else's tensors and forward pass, our ops.
 *
 * Everything a caller can get wrong is checked here, with one line that names the argument, as far as the host may look: what
 * device memory holds is not read. Nothing is allocated and nothing waits. */
#include "base.h"
#include "module.h"

#define LARGEST_RANK 64

static exc_status need(exc_ctx *ctx, const char *call, const char *name, const void *pointer, int64_t elements) {
    if (pointer || elements == 0) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_USAGE, "%s: %s is NULL, expected an array", call, name);
}

static exc_status within(exc_ctx *ctx, const char *call, const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_USAGE, "%s: %s is %lld, expected %lld to %lld", call, name, (long long)value, (long long)low,
                    (long long)high);
}

static exc_status done(exc_ctx *ctx, const char *call, exc_status st) {
    if (st == EXC_OK) return st;
    if (ctx->module) return exc_device_failed(ctx, st, call);
    return exc_fail(ctx, st, "%s: the %s backend refused these sizes, expected shapes its working memory can hold", call,
                    ctx->backend);
}

#define MOST ((int64_t)1 << 40)

exc_status exc_route(exc_ctx *ctx, const exc_gate *gate, const float *logits, const float *bias, int64_t tokens,
                     int64_t experts, int64_t top_k, int32_t *ids, float *weights) {
    static const char call[] = "exc_route";
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    EXC_TRY(need(ctx, call, "gate", gate, 1));
    if (gate->size != sizeof *gate)
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: gate.size is %zu, expected %zu (start from EXC_GATE)", call, gate->size,
                        sizeof *gate);
    EXC_TRY(within(ctx, call, "tokens", tokens, 0, MOST));
    EXC_TRY(within(ctx, call, "experts", experts, 1, 1024));
    EXC_TRY(within(ctx, call, "top_k", top_k, 1, experts < 64 ? experts : 64));
    EXC_TRY(within(ctx, call, "gate.score", gate->score, 0, 2));
    EXC_TRY(need(ctx, call, "logits", logits, tokens));
    EXC_TRY(need(ctx, call, "ids", ids, tokens));
    EXC_TRY(need(ctx, call, "weights", weights, tokens));
    struct exc_route_args a = {.logits = logits, .bias = bias, .gate = gate, .tokens = tokens, .experts = experts,
                               .top_k = top_k, .ids = ids, .weights = weights};
    return done(ctx, call, ctx->ops->route(&ctx->queue, &a));
}

exc_status exc_observe(exc_ctx *ctx, const int32_t *ids, const float *weights, const void *mid, exc_dtype dtype,
                       int64_t tokens, int64_t experts, int64_t top_k, int64_t intermediate, int64_t *count,
                       double *gate_sum, double *mid_sum) {
    static const char call[] = "exc_observe";
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    EXC_TRY(within(ctx, call, "tokens", tokens, 0, MOST));
    EXC_TRY(within(ctx, call, "experts", experts, 1, 1 << 20));
    EXC_TRY(within(ctx, call, "top_k", top_k, 1, experts));
    EXC_TRY(within(ctx, call, "intermediate", intermediate, mid_sum ? 1 : 0, MOST));
    EXC_TRY(need(ctx, call, "ids", ids, tokens));
    if (gate_sum) EXC_TRY(need(ctx, call, "weights", weights, tokens));
    if (mid_sum) EXC_TRY(need(ctx, call, "mid", mid, tokens));
    if (mid_sum && dtype != EXC_BF16 && dtype != EXC_F32)
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: dtype is %d, expected EXC_BF16 or EXC_F32", call, (int)dtype);
    for (int64_t i = 0; !ctx->module && i < tokens * top_k; i++)
        if (ids[i] < -1 || ids[i] >= experts)
            return exc_fail(ctx, EXC_ERR_USAGE, "%s: ids[%lld] is %d, expected -1 to %lld", call, (long long)i, ids[i],
                            (long long)experts - 1);
    struct exc_moments_args a = {.ids = ids, .weights = weights, .mid = mid_sum ? mid : NULL, .act = dtype == EXC_F32 ? EXC_F32 : EXC_BF16,
                                 .tokens = tokens, .top_k = top_k, .experts = experts, .inner = intermediate, .count = count,
                                 .gate_sum = gate_sum, .mid_sum = mid_sum, .enabled = ctx->observing};
    return done(ctx, call, ctx->ops->moments(&ctx->queue, &a));
}

exc_status exc_observe_when(exc_ctx *ctx, const int32_t *enabled) {
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if ((uintptr_t)enabled % sizeof *enabled) return exc_fail(ctx, EXC_ERR_USAGE, "exc_observe_when: enabled is not aligned to 4 bytes");
    ctx->observing = enabled;
    return EXC_OK;
}

static exc_status edit(exc_ctx *ctx, const char *call, void *w, exc_dtype dtype, int64_t experts, int64_t hidden, int64_t inner,
                       const float *r, int64_t rank, const float *strength, exc_norm_restore norm, float *c) {
    if (!ctx) return EXC_ERR_USAGE;
    if (dtype != EXC_BF16 && dtype != EXC_F16 && dtype != EXC_F32)
        return exc_fail(ctx, EXC_ERR_USAGE, "%s: dtype is %d, expected EXC_BF16, EXC_F16 or EXC_F32", call, (int)dtype);
    EXC_TRY(within(ctx, call, "experts", experts, 0, 1 << 20));
    EXC_TRY(within(ctx, call, "hidden", hidden, 1, 1 << 30));
    EXC_TRY(within(ctx, call, "inner", inner, 0, 1 << 30));
    EXC_TRY(within(ctx, call, "rank", rank, 1, hidden < LARGEST_RANK ? hidden : LARGEST_RANK));
    EXC_TRY(within(ctx, call, "norm", (int64_t)norm, EXC_NORM_NONE, EXC_NORM_ROW));
    EXC_TRY(need(ctx, call, "w", w, experts * inner));
    EXC_TRY(need(ctx, call, "r", r, 1));
    EXC_TRY(need(ctx, call, "strength", strength, experts));
    struct exc_project_args a = {.dtype = (int)dtype, .rows = hidden, .cols = inner, .side = EXC_SIDE_OUT, .basis = r,
                                 .rank = rank, .strength = strength, .norm = (int)norm, .c = c};
    a.src_base = a.dst_base = w;
    a.src_stride = a.dst_stride = hidden * inner;
    a.count = experts;
    return done(ctx, call, ctx->ops->project(&ctx->queue, &a));
}

exc_status exc_edit_matrix(exc_ctx *ctx, void *w, exc_dtype dtype, int64_t hidden, int64_t inner, const float *r,
                           int64_t rank, float strength, exc_norm_restore norm, float *c) {
    static const char call[] = "exc_edit_matrix";
    const float *there = &strength;
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (ctx->module) EXC_TRY(done(ctx, call, ctx->module->constant(&ctx->queue, strength, &there)));
    return edit(ctx, call, w, dtype, 1, hidden, inner, r, rank, there, norm, c);
}

exc_status exc_edit_experts(exc_ctx *ctx, void *w, exc_dtype dtype, int64_t experts, int64_t hidden, int64_t inner,
                            const float *r, int64_t rank, const float *strength, exc_norm_restore norm, float *c) {
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    return edit(ctx, "exc_edit_experts", w, dtype, experts, hidden, inner, r, rank, strength, norm, c);
}

exc_status exc_project_output(exc_ctx *ctx, float *y, int64_t tokens, int64_t hidden, const float *r, int64_t rank,
                              float strength) {
    static const char call[] = "exc_project_output";
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    EXC_TRY(within(ctx, call, "tokens", tokens, 0, MOST));
    EXC_TRY(within(ctx, call, "hidden", hidden, 1, 1 << 30));
    EXC_TRY(within(ctx, call, "rank", rank, 1, hidden < LARGEST_RANK ? hidden : LARGEST_RANK));
    EXC_TRY(need(ctx, call, "y", y, tokens));
    EXC_TRY(need(ctx, call, "r", r, 1));
    struct exc_lens_args a = {.y = y, .tokens = tokens, .hidden = hidden, .basis = r, .rank = rank, .strength = strength};
    return done(ctx, call, ctx->ops->lens(&ctx->queue, &a));
}
