/* dock.c - arrays of the host for one op call, which takes them where ops run.
 *
 * A dock lists fields of an op's arguments that point to memory of the host. On the CPU that is where ops run: nothing is copied
 * and no field changes. On a device entering carves a place for each array from one block, puts there what the op reads and
 * turns the fields to it; leaving gets what the op wrote and turns them back. The block stays with the context for the next
 * dock, because a call a layer must not cost an allocation a layer; memory that runs short takes it back (device.c).
 *
 * Also the call itself: with as much scratch as it asks for, and a refusal in words. */
#include <string.h>

#include "base.h"

#define PIECE ((size_t)256) /* what the ops may count on */

static size_t rounded(size_t n) { return (n + PIECE - 1) / PIECE * PIECE; }

/* fields are pointers to several types; they are moved as bytes, which every data pointer here shares */
static void *pointer_in(const void *field) {
    void *p;
    memcpy(&p, field, sizeof p);
    return p;
}

static void add(exc_dock *d, void *field, const void *from, size_t bytes, bool out) {
    void *host = pointer_in(field);
    if (!host || !bytes || !d->ctx->module) return;
    if (d->n == d->cap) {
        size_t cap = d->cap ? 4 * d->cap : 16;
        exc_berth *more = d->status == EXC_OK ? exc_alloc(d->ctx, cap, sizeof *more, d->what) : NULL;
        if (!more) { /* told by exc_dock_enter */
            d->status = EXC_ERR_MEMORY;
            return;
        }
        if (d->n) memcpy(more, d->berth, d->n * sizeof *more);
        exc_release(d->berth);
        d->berth = more;
        d->cap = cap;
    }
    d->berth[d->n++] = (exc_berth){field, host, from, bytes, out};
}

void exc_dock_in(exc_dock *d, void *field, size_t bytes) { add(d, field, pointer_in(field), bytes, false); }
void exc_dock_out(exc_dock *d, void *field, size_t bytes) { add(d, field, NULL, bytes, true); }
void exc_dock_both(exc_dock *d, void *field, size_t bytes) { add(d, field, pointer_in(field), bytes, true); }
void exc_dock_through(exc_dock *d, void *field, const void *from, size_t bytes) { add(d, field, from, bytes, true); }

/* ------------------------------------------------------------------------------------------------------ the block */

bool exc_dock_drop(exc_ctx *ctx) {
    bool any = ctx->dock.block != NULL;
    if (any) exc_device_release(ctx, ctx->dock.block);
    ctx->dock.block = NULL;
    ctx->dock.bytes = 0;
    return any;
}

static exc_status take_block(exc_dock *d, size_t bytes) {
    exc_ctx *ctx = d->ctx;
    if (ctx->dock.bytes < bytes) {
        exc_dock_drop(ctx);
        EXC_TRY(exc_device_alloc(ctx, bytes, 1, d->what, &d->block));
        d->bytes = bytes;
        return EXC_OK;
    }
    d->block = ctx->dock.block; /* a dock opened before this one is left finds none, and makes its own */
    d->bytes = ctx->dock.bytes;
    ctx->dock.block = NULL;
    ctx->dock.bytes = 0;
    return EXC_OK;
}

static void leave_block(exc_dock *d) {
    exc_ctx *ctx = d->ctx;
    if (d->bytes > ctx->dock.bytes) {
        exc_dock_drop(ctx);
        ctx->dock.block = d->block;
        ctx->dock.bytes = d->bytes;
    } else if (d->block) {
        exc_device_release(ctx, d->block);
    }
    d->block = NULL;
    d->bytes = 0;
}

/* ------------------------------------------------------------------------------------------------------- in and out */

exc_status exc_dock_enter(exc_dock *d) {
    size_t bytes = 0, at = 0;
    if (d->status != EXC_OK) return d->status;
    for (size_t i = 0; i < d->n; i++) bytes += rounded(d->berth[i].bytes);
    if (bytes) d->status = take_block(d, bytes);
    for (size_t i = 0; i < d->n && d->status == EXC_OK; i++) {
        const exc_berth *b = &d->berth[i];
        void *place = (uint8_t *)d->block + at;
        at += rounded(b->bytes);
        memcpy(b->field, &place, sizeof place);
        if (b->from) d->status = exc_device_put(d->ctx, place, b->from, b->bytes);
    }
    return d->status;
}

exc_status exc_dock_leave(exc_dock *d, exc_status st) {
    for (size_t i = 0; i < d->n; i++) {
        const exc_berth *b = &d->berth[i];
        if (st == EXC_OK && b->out) st = exc_device_get(d->ctx, b->host, pointer_in(b->field), b->bytes);
        memcpy(b->field, &b->host, sizeof b->host);
    }
    leave_block(d);
    exc_release(d->berth);
    *d = (exc_dock){.ctx = d->ctx, .what = d->what};
    return st;
}

/* --------------------------------------------------------------------------------------------------------- the call */

exc_queue *exc_op_measure(exc_ctx *ctx) {
    ctx->queue.measuring = 1;
    ctx->queue.work_needed = 0;
    return &ctx->queue;
}

bool exc_op_ready(exc_ctx *ctx, exc_status measured) {
    ctx->queue.measuring = 0;
    return measured != EXC_OK || exc_device_reserve(ctx, ctx->queue.work_needed) == EXC_OK; /* else it says why itself */
}

exc_status exc_op_done(exc_ctx *ctx, const char *op, exc_status st) {
    char what[64];
    snprintf(what, sizeof what, "op %s", op);
    if (st == EXC_ERR_USAGE) return exc_fail(ctx, EXC_ERR_INPUT, "op %s: sizes or types beyond its reach on the backend %s", op, ctx->backend);
    return exc_device_failed(ctx, st, what);
}
