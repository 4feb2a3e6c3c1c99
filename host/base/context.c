/* context.c - exc_ctx: picks a backend from the ordered list, opens the queue, describes both.
 *
 * Backends stand in one list, CPU last. A backend the caller names must be usable or the call fails with the reason: a job
 * that asked for a GPU must never find out from its speed that it did not get one. Who names none gets the CPU, which does
 * everything; the GPU serves the [stream] calls. */
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

static exc_status choose(exc_ctx *ctx, const char *name)
{
    for (size_t i = 0; i < EXC_COUNT(backends); i++) {
        const backend *b = &backends[i];
        if (strcmp(name ? name : "cpu", b->name)) continue;
        const char *why = b->why_not();
        if (!why) {
            ctx->ops = b->ops;
            ctx->backend = b->name;
            return EXC_OK;
        }
        return exc_fail(ctx, EXC_ERR_DEVICE, "backend %s cannot be used: %s", b->name, why);
    }
    return exc_fail(ctx, EXC_ERR_USAGE, "backend: expected cpu or cuda, found %s", exc_show(name, strlen(name)));
}

static exc_status open_backend(exc_ctx *ctx)
{
    exc_status st = choose(ctx, ctx->opt.backend);
    if (st == EXC_OK) st = exc_queue_open(ctx, ctx->opt.threads);
    ctx->queue.reproducible = ctx->opt.reproducible != 0;
    ctx->queue.nonfinite = &ctx->nonfinite;
    if (st == EXC_OK && !ctx->ops) st = exc_device_open(ctx, ctx->opt.device);
    /* scratch of this context's threads and of those that read layers ahead (model/window.c), and the program */
    if (st == EXC_OK && !ctx->module) exc_memory_take(ctx, 2 * (uint64_t)ctx->queue.workers * EXC_SCRATCH_BYTES + PROGRAM_BYTES);
    if (st == EXC_OK) ctx->memory = ctx->opt.memory ? ctx->opt.memory : exc_memory_free(ctx) / 10 * 9;
    return st;
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
    EXC_TRY(exc_ranks_agree(ctx, "opening the backend", open_backend(ctx)));
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
