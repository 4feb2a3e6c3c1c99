/* context.c - exc_ctx: picks a backend from the ordered list, opens the queue, describes both.
 *
 * Backends stand in one list, CPU last. A backend the caller names must be usable or the call fails with the reason: a job
 * that asked for a GPU must never find out from its speed that it did not get one. Who names none gets the first that can be
 * used, and is told why one before it was passed over. */
#include <string.h>

#include "base.h"
#include "module.h"

#define PROGRAM_BYTES ((uint64_t)32 << 20) /* code, libraries, tokenizer, tables of weights, blocks rounded to large pages */

typedef struct backend {
    const char *name;
    /* NULL when usable, else one sentence why not */
    const char *(*why_not)(void);
    const struct exc_ops *ops;
} backend;

static const char *usable(void) { return NULL; }

static const backend backends[] = {
    {"cuda", exc_device_why_not, NULL}, /* ops come with the module */
    {"cpu", usable, &exc_cpu_ops},
};

static exc_status use(exc_ctx *ctx, const backend *b)
{
    ctx->ops = b->ops;
    ctx->backend = b->name;
    return b->ops ? EXC_OK : exc_device_open(ctx, ctx->opt.device);
}

static exc_status use_named(exc_ctx *ctx, const char *name)
{
    for (size_t i = 0; i < EXC_COUNT(backends); i++) {
        const backend *b = &backends[i];
        if (strcmp(name, b->name)) continue;
        const char *why = b->why_not();
        return why ? exc_fail(ctx, EXC_ERR_DEVICE, "backend %s cannot be used: %s", b->name, why) : use(ctx, b);
    }
    return exc_fail(ctx, EXC_ERR_USAGE, "backend: expected cpu or cuda, found %s", exc_show(name, strlen(name)));
}

/* Says why `b` is passed over. One that is not there is worth a line in a log; one that is there, but cannot be opened (it is
 * full, or another's), a warning. */
static void decline(exc_ctx *ctx, const backend *b)
{
    snprintf(ctx->declined, sizeof ctx->declined, "%.255s", ctx->error);
    exc_device_close(ctx);
    ctx->queue.nonfinite = &ctx->nonfinite;
    ctx->queue.failed = 0;
    exc_clear(ctx);
    if (b->why_not()) exc_info(ctx, "backend %s is not used: %s", b->name, ctx->declined);
    else exc_warn(ctx, "backend %s is not used: %s", b->name, ctx->declined);
}

/* The first that all ranks can use: parts from different backends would not fit together bit for bit. */
static exc_status use_first(exc_ctx *ctx)
{
    exc_status st = EXC_ERR_DEVICE;
    for (size_t i = 0; i < EXC_COUNT(backends); i++) {
        const backend *b = &backends[i];
        const char *why = b->why_not();
        st = why ? exc_fail(ctx, EXC_ERR_DEVICE, "%s", why) : use(ctx, b);
        if (i == EXC_COUNT(backends) - 1) break; /* nothing is left to fall back on */
        uint32_t ready = st == EXC_OK;
        EXC_TRY(exc_ranks_sum(ctx, "ranks with a GPU", EXC_U32, &ready, 1));
        if (ready == (uint32_t)exc_ranks_count(ctx)) break;
        if (st == EXC_OK) exc_fail(ctx, EXC_ERR_DEVICE, "%d of %d ranks cannot use it", exc_ranks_count(ctx) - (int)ready, exc_ranks_count(ctx));
        decline(ctx, b);
    }
    return st;
}

static exc_status open_backend(exc_ctx *ctx)
{
    ctx->backend = "none"; /* until one is in use */
    ctx->queue.reproducible = ctx->opt.reproducible != 0;
    ctx->queue.nonfinite = &ctx->nonfinite;
    EXC_TRY(exc_ranks_agree(ctx, "opening the backend", exc_queue_open(ctx, ctx->opt.threads)));
    if (!ctx->opt.backend) EXC_TRY(use_first(ctx));
    else EXC_TRY(exc_ranks_agree(ctx, "opening the backend", use_named(ctx, ctx->opt.backend)));
    /* scratch of this context's threads and of those that read layers ahead (model/window.c), and the program */
    if (!ctx->module) exc_memory_take(ctx, 2 * (uint64_t)ctx->queue.workers * EXC_SCRATCH_BYTES + PROGRAM_BYTES);
    ctx->memory = ctx->opt.memory ? ctx->opt.memory : exc_memory_free(ctx) / 10 * 9;
    return EXC_OK;
}

exc_status exc_ctx_create(const exc_ctx_options *options, exc_ctx **out)
{
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    if (!out) return EXC_ERR_USAGE;
    *out = NULL;
    if (options) {
        if (options->size < sizeof options->size || options->size > sizeof opt) return EXC_ERR_USAGE;
        memcpy(&opt, options, options->size);
        opt.size = sizeof opt;
    }
    exc_ctx none = {.error = ""};
    exc_ctx *ctx = exc_zalloc(&none, 1, sizeof *ctx, "context");
    if (!ctx) return EXC_ERR_MEMORY;
    ctx->opt = opt;
    *out = ctx; /* also on failure: exc_ctx_error() says why, exc_ctx_free() is due */
    EXC_TRY(exc_ranks_open(ctx, opt.ranks)); /* first: so that a backend that cannot be used is said once */
    EXC_TRY(open_backend(ctx));
    return exc_ranks_device(ctx);
}

void exc_ctx_free(exc_ctx *ctx)
{
    if (!ctx) return;
    if (ctx->kept.thing) ctx->kept.drop(ctx->kept.thing);
    exc_ranks_close(ctx);
    exc_device_close(ctx);
    exc_queue_close(ctx);
    exc_release(ctx);
}

exc_status exc_ctx_describe(exc_ctx *ctx, char **json)
{
    if (!ctx || !json) return EXC_ERR_USAGE;
    exc_clear(ctx);
    exc_buf b = {0};
    exc_buf_printf(&b, "{\"version\":\"%s\",\"backend\":\"%s\",\"backends\":[", EXC_VERSION, ctx->backend);
    for (size_t i = 0; i < EXC_COUNT(backends); i++) {
        const char *why = backends[i].why_not();
        if (!why && !backends[i].ops && ctx->declined[0]) why = ctx->declined;
        exc_buf_printf(&b, "%s{\"name\":\"%s\",\"usable\":%s", i ? "," : "", backends[i].name, why ? "false" : "true");
        if (why) exc_buf_printf(&b, ",\"why\":\"%s\"", why);
        exc_buf_puts(&b, "}");
    }
    exc_buf_puts(&b, "]");
    if (ctx->module) {
        char lines[2048], *rest = lines;
        ctx->module->libraries(lines, sizeof lines);
        exc_buf_puts(&b, ",\"libraries\":{");
        for (const char *name = strsep(&rest, ":"); name; name = strsep(&rest, ":")) {
            const char *what = strsep(&rest, "\n");
            exc_buf_printf(&b, "\"%s\":\"%s\"%s", name, what ? what + 1 : "", rest ? "," : "");
        }
        exc_buf_puts(&b, "}");
    }
    exc_buf_printf(&b, ",\"threads\":%d,\"isa\":\"%s\",\"reproducible\":%s,\"rank\":%d,\"ranks\":%d}", ctx->queue.workers,
                   exc_isa_name(exc_isa_level()), ctx->queue.reproducible ? "true" : "false", exc_ranks_me(ctx),
                   exc_ranks_count(ctx));
    if (b.failed) {
        exc_buf_free(&b);
        return exc_fail(ctx, EXC_ERR_MEMORY, "no memory for the description");
    }
    *json = b.data;
    return EXC_OK;
}
