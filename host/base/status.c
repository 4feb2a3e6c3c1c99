/* status.c - status codes, the one-line error text of a context, and events.
 *
 * A failure is described once, where it is noticed, and travels up as a code: the first text stays until the
 * next public call clears it. Codes map to process exit codes here and nowhere else, so that a batch system
 * can tell "never retry" (3) from "run the same command again" (130). */
#include <errno.h>
#include <string.h>

#include "base.h"

static const struct {
    const char *name;
    int exit_code;
} status_table[] = {
    [EXC_OK] = {"ok", 0},
    [EXC_ERR_IO] = {"io", 1},
    [EXC_ERR_MEMORY] = {"memory", 1},
    [EXC_ERR_DEVICE] = {"device", 1},
    [EXC_ERR_USAGE] = {"usage", 2},
    [EXC_ERR_INPUT] = {"input", 3},
    [EXC_ERR_NUMERIC] = {"numeric", 3},
    [EXC_CANCELLED] = {"cancelled", 130},
};

const char *exc_status_name(exc_status status) {
    size_t i = (size_t)status;
    return i < EXC_COUNT(status_table) ? status_table[i].name : "unknown";
}

int exc_status_exit(exc_status status) {
    size_t i = (size_t)status;
    return i < EXC_COUNT(status_table) ? status_table[i].exit_code : 1;
}

const char *exc_version(void) { return EXC_VERSION; }

const char *exc_ctx_error(const exc_ctx *ctx) { return ctx ? ctx->error : "no context"; }

void exc_clear(exc_ctx *ctx) { ctx->error[0] = 0; }

/* One line whatever went into it: control bytes of untrusted names never reach a terminal. */
static void one_line(char *s) {
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f) *s = ' ';
}

exc_status exc_fail(exc_ctx *ctx, exc_status code, const char *fmt, ...) {
    if (ctx->error[0]) return code;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(ctx->error, sizeof ctx->error, fmt, ap);
    va_end(ap);
    one_line(ctx->error);
    return code;
}

exc_status exc_fail_errno(exc_ctx *ctx, const char *fmt, ...) {
    int saved = errno;
    if (ctx->error[0]) return EXC_ERR_IO;
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(ctx->error, sizeof ctx->error, fmt, ap);
    va_end(ap);
    if (n >= 0 && (size_t)n < sizeof ctx->error)
        snprintf(ctx->error + n, sizeof ctx->error - (size_t)n, ": %s", strerror(saved));
    one_line(ctx->error);
    return EXC_ERR_IO;
}

static exc_status send(exc_ctx *ctx, const exc_event *event) {
    if (!ctx->opt.on_event || !ctx->opt.on_event(ctx->opt.user, event)) return EXC_OK;
    return exc_fail(ctx, EXC_CANCELLED, "interrupted during %s; finished work is kept", event->text);
}

exc_status exc_progress(exc_ctx *ctx, const char *step, uint64_t done, uint64_t total, const char *unit) {
    exc_event event = {EXC_EVENT_PROGRESS, step, unit, done, total};
    return send(ctx, &event);
}

static void say(exc_ctx *ctx, exc_event_kind kind, const char *fmt, va_list ap) {
    if (!ctx->opt.on_event) return;
    char text[1024];
    vsnprintf(text, sizeof text, fmt, ap);
    one_line(text);
    exc_event event = {kind, text, NULL, 0, 0};
    /* a message cannot cancel: the next progress event will */
    ctx->opt.on_event(ctx->opt.user, &event);
}

void exc_info(exc_ctx *ctx, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    say(ctx, EXC_EVENT_INFO, fmt, ap);
    va_end(ap);
}

void exc_warn(exc_ctx *ctx, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    say(ctx, EXC_EVENT_WARNING, fmt, ap);
    va_end(ap);
}
