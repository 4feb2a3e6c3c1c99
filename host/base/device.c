/* device.c - the CUDA module: found and loaded when first asked for, and memory where a context's ops run.
 *
 * The module is a file beside this program or library (or in ../lib, or named by EXCISE_CUDA_MODULE), so one build serves
 * machines with and without a GPU. Every reason not to use it is one sentence. The memory calls work for every backend, so
 * that the rooms above are written once; on the CPU they are plain memory. */
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "module.h"

#define MODULE_FILE "libexcise_cuda.so"
#define WORK_BYTES ((size_t)64 << 20) /* scratch of a new queue; exc_device_reserve gives more */

static const exc_module *module;
static char why[PATH_MAX + 256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void)
{
    void *lib = exc_library_open(MODULE_FILE, "EXCISE_CUDA_MODULE", why, sizeof why);
    if (!lib) return;
    union { void *object; exc_module_open_fn function; } entry = {dlsym(lib, "exc_module_open")};
    const exc_module *m = entry.object ? entry.function(EXC_MODULE_VERSION) : NULL;
    if (m && m->size == sizeof *m && m->queue_size == sizeof(exc_queue)) {
        module = m;
        return;
    }
    snprintf(why, sizeof why, "the CUDA module was built for another version of Excise");
    dlclose(lib);
}

const struct exc_module *exc_device_module(void)
{
    pthread_once(&once, load);
    return module;
}

const char *exc_device_why_not(void)
{
    const exc_module *m = exc_device_module();
    return m ? m->why_not() : why;
}

size_t exc_device_free(exc_ctx *ctx)
{
    exc_device_info info = {0};
    if (!ctx->module) return SIZE_MAX;
    return ctx->module->describe(ctx->queue.device, &info) == EXC_OK ? (size_t)info.free : 0;
}

exc_status exc_device_short(exc_ctx *ctx, size_t bytes, const char *fmt, ...)
{
    exc_device_info info = {0};
    char what[512], need[32], have[32], all[32];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    ctx->module->describe(ctx->queue.device, &info);
    exc_memory_text(bytes, need);
    exc_memory_text(info.free, have);
    exc_memory_text(info.memory, all);
    return exc_fail(ctx, EXC_ERR_MEMORY, "%s: %s of device memory needed, %s of %s are free on GPU %d (%s)", what, need, have,
                    all, ctx->queue.device, info.name);
}

static exc_status too_little(exc_ctx *ctx, const char *what, size_t bytes) { return exc_device_short(ctx, bytes, "%s", what); }

exc_status exc_device_failed(exc_ctx *ctx, exc_status st, const char *what)
{
    if (st == EXC_OK || !ctx->module) return st;
    if (st == EXC_ERR_DEVICE)
        return exc_fail(ctx, st, "%s: GPU %d: %s: %s", what, ctx->queue.device,
                        ctx->queue.failed_at ? ctx->queue.failed_at : "launch", ctx->module->error(&ctx->queue));
    if (st == EXC_ERR_MEMORY) {
        char need[32], have[32];
        exc_memory_text(ctx->queue.work_needed, need);
        exc_memory_text(ctx->queue.work_bytes, have);
        return exc_fail(ctx, st, "%s: %s of device scratch needed, the queue has %s", what, need, have);
    }
    return exc_fail(ctx, st, "%s: refused by the device", what);
}

exc_status exc_device_open(exc_ctx *ctx, int device)
{
    const exc_module *m = exc_device_module();
    if (!m) return exc_fail(ctx, EXC_ERR_DEVICE, "%s", why);
    const char *reason = m->why_not();
    if (reason) return exc_fail(ctx, EXC_ERR_DEVICE, "%s", reason);
    int n = m->devices();
    if (device < 0 || device >= n)
        return exc_fail(ctx, EXC_ERR_USAGE, "GPU: expected 0 to %d, found %d", n - 1, device);
    ctx->module = m;
    ctx->ops = m->ops;
    size_t work = ctx->opt.work_bytes ? ctx->opt.work_bytes : WORK_BYTES;
    exc_status st = m->open(&ctx->queue, device, ctx->opt.stream, work);
    return st == EXC_ERR_MEMORY ? too_little(ctx, "scratch", work) : exc_device_failed(ctx, st, "opening the device");
}

/* the wait of a module has no end while another rank is missing: these calls first wait where there is one */
static exc_status settle(exc_ctx *ctx) { return ctx->module && ctx->ranks ? exc_ranks_settle(ctx) : EXC_OK; }

void exc_device_close(exc_ctx *ctx)
{
    if (!ctx->module) return;
    exc_dock_drop(ctx);
    ctx->module->close(&ctx->queue);
    ctx->module = NULL;
}

exc_status exc_device_reserve(exc_ctx *ctx, size_t work_bytes)
{
    if (!ctx->module || work_bytes <= ctx->queue.work_bytes) return EXC_OK;
    EXC_TRY(settle(ctx));
    exc_status st = ctx->module->resize(&ctx->queue, work_bytes);
    return st == EXC_ERR_MEMORY ? too_little(ctx, "scratch", work_bytes) : exc_device_failed(ctx, st, "scratch");
}

bool exc_device_grew(exc_ctx *ctx, exc_status st)
{
    size_t needed = ctx->queue.work_needed;
    return st == EXC_ERR_MEMORY && ctx->module && needed > ctx->queue.work_bytes && exc_device_reserve(ctx, needed) == EXC_OK;
}

exc_status exc_device_alloc(exc_ctx *ctx, size_t count, size_t size, const char *what, void **p)
{
    size_t bytes;
    *p = NULL;
    if (!ctx->module) return (*p = exc_alloc(ctx, count, size, what)) ? EXC_OK : EXC_ERR_MEMORY;
    if (!exc_mul(count, size, &bytes))
        return exc_fail(ctx, EXC_ERR_MEMORY, "%s: %zu x %zu bytes is more than memory can address", what, count, size);
    EXC_TRY(settle(ctx));
    exc_status st = exc_alloc_fails_now() ? EXC_ERR_MEMORY : ctx->module->alloc(&ctx->queue, bytes, p);
    if (st == EXC_ERR_MEMORY && exc_dock_drop(ctx)) st = ctx->module->alloc(&ctx->queue, bytes, p);
    return st == EXC_ERR_MEMORY ? too_little(ctx, what, bytes) : exc_device_failed(ctx, st, what);
}

void exc_device_release(exc_ctx *ctx, void *p)
{
    if (!ctx->module) exc_release(p);
    else if (p) settle(ctx), ctx->module->release(&ctx->queue, p);
}

exc_status exc_device_put(exc_ctx *ctx, void *device, const void *host, size_t bytes)
{
    EXC_TRY(settle(ctx));
    if (ctx->module) return exc_device_failed(ctx, ctx->module->put(&ctx->queue, device, host, bytes), "copy to the device");
    if (bytes && device != host) memcpy(device, host, bytes);
    return EXC_OK;
}

exc_status exc_device_get(exc_ctx *ctx, void *host, const void *device, size_t bytes)
{
    EXC_TRY(settle(ctx));
    if (ctx->module) return exc_device_failed(ctx, ctx->module->get(&ctx->queue, host, device, bytes), "copy from the device");
    if (bytes && host != device) memcpy(host, device, bytes);
    return EXC_OK;
}

exc_status exc_device_mirror(exc_ctx *ctx, size_t count, size_t size, const char *what, void **block)
{
    *block = NULL;
    return ctx->module ? exc_device_alloc(ctx, count, size, what, block) : EXC_OK;
}

void *exc_device_side(const exc_ctx *ctx, void *host, void *block) { return ctx->module ? block : host; }

exc_status exc_device_copy(exc_ctx *ctx, void *dst, const void *src, size_t bytes)
{
    if (ctx->module) return exc_device_failed(ctx, ctx->module->copy(&ctx->queue, dst, src, bytes), "copy on the device");
    if (bytes) memmove(dst, src, bytes);
    return EXC_OK;
}

exc_status exc_device_zero(exc_ctx *ctx, void *p, size_t bytes)
{
    if (ctx->module) return exc_device_failed(ctx, ctx->module->zero(&ctx->queue, p, bytes), "clearing device memory");
    if (bytes) memset(p, 0, bytes);
    return EXC_OK;
}

exc_status exc_device_record(exc_ctx *ctx)
{
    EXC_TRY(settle(ctx));
    EXC_TRY(exc_device_failed(ctx, ctx->module->record(&ctx->queue), "decode"));
    ctx->recording = true;
    return EXC_OK;
}

/* The context knows its graphs: NCCL does not let go of a communicator while a graph has work of it. */
typedef struct exc_recorded {
    void *graph;
    struct exc_recorded *next;
} exc_recorded;

exc_status exc_device_recorded(exc_ctx *ctx, void **graph)
{
    if (!ctx->recording) return EXC_OK; /* given up */
    exc_recorded *r = graph ? exc_zalloc(ctx, 1, sizeof *r, "graph") : NULL;
    ctx->recording = false;
    exc_status st = exc_device_failed(ctx, ctx->module->recorded(&ctx->queue, r ? &r->graph : NULL), "decode");
    if (graph && !r) return EXC_ERR_MEMORY;
    if (!graph) return st;
    if (st != EXC_OK) {
        exc_release(r);
        return st;
    }
    r->next = ctx->recorded;
    ctx->recorded = r;
    *graph = r;
    return EXC_OK;
}

exc_status exc_device_replay(exc_ctx *ctx, void *graph)
{
    EXC_TRY(exc_ranks_replay(ctx));
    return exc_device_failed(ctx, ctx->module->replay(&ctx->queue, ((exc_recorded *)graph)->graph), "decode");
}

static void drop(exc_ctx *ctx, exc_recorded *r)
{
    if (r->graph) ctx->module->forget(&ctx->queue, r->graph);
    r->graph = NULL;
}

void exc_device_forget(exc_ctx *ctx, void *graph)
{
    exc_recorded **at = &ctx->recorded;
    if (!graph) return;
    while (*at != graph) at = &(*at)->next;
    *at = (*at)->next;
    drop(ctx, graph);
    exc_release(graph);
}

void exc_device_forget_all(exc_ctx *ctx)
{
    exc_device_recorded(ctx, NULL);
    for (exc_recorded *r = ctx->recorded; r; r = r->next) drop(ctx, r);
}

exc_status exc_device_sync(exc_ctx *ctx)
{
    EXC_TRY(settle(ctx));
    return ctx->module ? exc_device_failed(ctx, ctx->module->sync(&ctx->queue), "waiting for the device") : EXC_OK;
}
