/* nccl.c - rows of ranks that work on GPUs go from device memory to device memory by NCCL, on the context's stream.
 *
 * NCCL reports nothing when a rank on the same machine dies, and a call that blocks cannot be ended from outside. So no call
 * here blocks: the communicator is made with blocking = 0, and whoever is about to wait for the stream first waits here
 * (settle), looking at the stream, at NCCL's own errors, at the transport of the hosts and at the clock; then the
 * communicator is aborted, which lets the stream end, and the context answers every later call with the reason.
 * The library is opened when the first context of several ranks works on GPUs, never linked. */
#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base.h"
#include "module.h"
#include "collectives.h"
#include "ranks.h"

typedef struct calls {
#define CALL(name, arguments) int(*name) arguments;
    EXC_NCCL_CALLS(CALL)
#undef CALL
} calls;

static const char *const names[] = {
#define CALL(name, arguments) #name,
    EXC_NCCL_CALLS(CALL)
#undef CALL
};

struct exc_nccl {
    calls c;
    void *comm;       /* NULL: none yet, or given up */
    double limit;     /* seconds that an exchange may take */
    const char *what; /* the exchange that is on the stream and not known to be done; NULL: none */
};

/* ---------------------------------------------------------------------------------------------------- the library */

static exc_status no_library(exc_ctx *ctx, const char *why) {
    return exc_fail(ctx, EXC_ERR_DEVICE, "NCCL, which several GPUs need, cannot be used: %s", why);
}

/* One copy in a process: a program that brings its own has loaded it already. The CUDA of the host takes only what
 * EXCISE_CUDA_LIBRARIES names, as it does with the other libraries. */
static void *find(const exc_ctx *ctx, char *why, size_t n) {
    static const char *const files[] = {EXC_NCCL_FILE, "/usr/local/cuda/lib64/" EXC_NCCL_FILE};
    const char *folder = getenv("EXCISE_CUDA_LIBRARIES");
    bool real = !strcmp(ctx->module->name, "cuda");
    void *object = real ? dlopen(EXC_NCCL_FILE, RTLD_NOW | RTLD_NOLOAD) : NULL;
    if (!object && folder && *folder) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/%s", folder, EXC_NCCL_FILE);
        object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        snprintf(why, n, "%s was not found in %s", EXC_NCCL_FILE, folder);
        return object;
    }
    for (size_t i = 0; real && !object && i < EXC_COUNT(files); i++) object = dlopen(files[i], RTLD_NOW | RTLD_LOCAL);
    snprintf(why, n, "%s was not found, EXCISE_CUDA_LIBRARIES may name its folder", EXC_NCCL_FILE);
    return object;
}

static exc_status load(exc_ctx *ctx, calls *c, int *version) {
    char why[PATH_MAX + 128];
    void *symbol[EXC_COUNT(names)], *object = find(ctx, why, sizeof why);
    if (!object) return no_library(ctx, why);
    const char *absent = NULL;
    for (size_t i = 0; i < EXC_COUNT(names); i++)
        if (!(symbol[i] = dlsym(object, names[i])) && !absent) absent = names[i];
    memcpy(c, symbol, sizeof *c);
    *version = 0;
    if (!c->ncclGetVersion || c->ncclGetVersion(version) != EXC_NCCL_SUCCESS) return no_library(ctx, "it does not tell its version");
    if (*version < EXC_NCCL_LEAST || *version >= 30000) {
        snprintf(why, sizeof why, "expected version 2.%d or a later 2, found %d", EXC_NCCL_LEAST / 100 % 100, *version);
        return no_library(ctx, why);
    }
    if (!absent) return EXC_OK;
    snprintf(why, sizeof why, "version %d has no %s", *version, absent);
    return no_library(ctx, why);
}

/* ------------------------------------------------------------------------------------------------- errors, waiting */

static const char *result_text(int status) {
    static const char *const text[] = {"no error", "a CUDA call failed", "a system call failed", "an internal error", "an argument was refused",
                                       "a call was out of place", "another rank failed or left", "not done yet", "a time limit was over"};
    return status >= 0 && (size_t)status < EXC_COUNT(text) ? text[status] : "an unknown status";
}

/* after this nothing waits for other ranks any more */
static exc_status give_up(exc_ctx *ctx, exc_nccl *n, const char *what, const char *why) {
    exc_device_forget_all(ctx); /* before the rest: aborting waits for graphs that hold the communicator */
    if (n->comm) n->c.ncclCommAbort(n->comm);
    n->comm = NULL;
    n->what = NULL;
    return exc_ranks_broken(ctx, what, why);
}

static exc_status refused(exc_ctx *ctx, exc_nccl *n, const char *what, const char *call, int status) {
    char why[128];
    snprintf(why, sizeof why, "NCCL: %s: %s", call, result_text(status));
    return give_up(ctx, n, what, why);
}

static bool over(exc_ctx *ctx, const exc_nccl *n, double begun, const char **why) {
    *why = exc_ranks_missing(ctx);
    if (!*why && exc_seconds() - begun > n->limit) *why = "a rank did not come within the time limit; it may have ended";
    return *why != NULL;
}

/* a short spin, then the core is given away */
static void breathe(unsigned i) {
    if (i > 1000) nanosleep(&(struct timespec){.tv_nsec = i < 10000 ? 1000 : 50000}, NULL);
}

/* the end of a call that may go on in the background, before anything else is enqueued or called */
static exc_status finish(exc_ctx *ctx, exc_nccl *n, const char *what, const char *call, int status) {
    double begun = exc_seconds();
    const char *why;
    for (unsigned i = 0; status == EXC_NCCL_IN_PROGRESS; i++) {
        int now = EXC_NCCL_IN_PROGRESS, asked = n->c.ncclCommGetAsyncError(n->comm, &now);
        status = asked == EXC_NCCL_SUCCESS ? now : asked;
        if (status == EXC_NCCL_IN_PROGRESS && i % 64 == 63 && over(ctx, n, begun, &why)) return give_up(ctx, n, what, why);
        if (status == EXC_NCCL_IN_PROGRESS) breathe(i);
    }
    return status == EXC_NCCL_SUCCESS ? EXC_OK : refused(ctx, n, what, call, status);
}

exc_status exc_nccl_settle(exc_ctx *ctx, exc_nccl *n) {
    if (!n->what) return EXC_OK;
    double begun = exc_seconds();
    const char *why;
    for (unsigned i = 0;; i++) {
        int done = 0, status = EXC_NCCL_SUCCESS;
        EXC_TRY(exc_device_failed(ctx, ctx->module->ready(&ctx->queue, &done), n->what));
        if (done) break;
        if (i % 64 == 63) {
            n->c.ncclCommGetAsyncError(n->comm, &status);
            if (status != EXC_NCCL_SUCCESS && status != EXC_NCCL_IN_PROGRESS) return refused(ctx, n, n->what, "an exchange", status);
            if (over(ctx, n, begun, &why)) return give_up(ctx, n, n->what, why);
        }
        breathe(i);
    }
    n->what = NULL;
    return EXC_OK;
}

/* --------------------------------------------------------------------------------------------------- opening, closing */

/* NCCL would hang when two ranks had the same GPU */
static exc_status tell_apart(exc_ctx *ctx) {
    typedef struct who { unsigned char gpu[16]; int number; } who;
    exc_device_info info;
    int ranks = exc_ranks_count(ctx);
    EXC_TRY(exc_device_failed(ctx, ctx->module->describe(ctx->queue.device, &info), "describing the GPU"));
    who mine = {.number = ctx->queue.device}, *all = exc_alloc(ctx, (size_t)ranks, sizeof *all, "GPUs of all ranks");
    if (!all) return EXC_ERR_MEMORY;
    memcpy(mine.gpu, info.id, sizeof mine.gpu);
    exc_status st = exc_ranks_gather(ctx, "GPUs of all ranks", &mine, all, sizeof mine);
    for (int i = 0; st == EXC_OK && i < ranks; i++)
        for (int j = 0; st == EXC_OK && j < i; j++)
            if (!memcmp(all[i].gpu, all[j].gpu, sizeof mine.gpu))
                st = exc_fail(ctx, EXC_ERR_USAGE, "ranks: expected a GPU for each, found that ranks %d and %d have the same one (GPU %d)", j, i,
                              all[i].number);
    exc_release(all);
    return st;
}

static exc_status join(exc_ctx *ctx, exc_nccl *n) {
    static const char what[] = "joining the GPUs";
    int ranks = exc_ranks_count(ctx), me = exc_ranks_me(ctx);
    exc_nccl_id mine = {{0}}, *all = exc_alloc(ctx, (size_t)ranks, sizeof *all, "ids of all ranks");
    if (!all) return EXC_ERR_MEMORY;
    int status = me ? EXC_NCCL_SUCCESS : n->c.ncclGetUniqueId(&mine);
    exc_status st = status == EXC_NCCL_SUCCESS ? EXC_OK : refused(ctx, n, what, "ncclGetUniqueId", status);
    st = exc_ranks_agree(ctx, what, st);
    if (st == EXC_OK) st = exc_ranks_gather(ctx, what, &mine, all, sizeof mine);
    exc_nccl_config config = EXC_NCCL_CONFIG(0);
    if (st == EXC_OK) status = n->c.ncclCommInitRankConfig(&n->comm, ranks, all[0], me, &config);
    if (st == EXC_OK) st = finish(ctx, n, what, "ncclCommInitRankConfig", status);
    exc_release(all);
    return exc_ranks_agree(ctx, what, st);
}

exc_status exc_nccl_open(exc_ctx *ctx, double seconds, exc_nccl **out) {
    exc_nccl *n = *out = exc_zalloc(ctx, 1, sizeof *n, "NCCL");
    int version = 0;
    EXC_TRY(exc_ranks_agree(ctx, "opening NCCL", n ? load(ctx, &n->c, &version) : EXC_ERR_MEMORY));
    n->limit = seconds;
    EXC_TRY(exc_ranks_meet(ctx, "the version of NCCL", (uint64_t)version));
    EXC_TRY(tell_apart(ctx));
    return join(ctx, n);
}

void exc_nccl_close(exc_ctx *ctx, exc_nccl *n) {
    if (n) exc_device_forget_all(ctx);
    if (n && n->comm && exc_nccl_settle(ctx, n) == EXC_OK && finish(ctx, n, "leaving", "ncclCommFinalize", n->c.ncclCommFinalize(n->comm)) == EXC_OK)
        n->c.ncclCommDestroy(n->comm);
    exc_release(n);
}

/* --------------------------------------------------------------------------------------------------------- exchanges */

static exc_status gone(exc_ctx *ctx, const char *what) { return exc_ranks_broken(ctx, what, "an exchange has failed before"); }

/* sends and receives of one kind of rows; sends NULL: all of them to everyone */
static int enqueue(exc_ctx *ctx, exc_nccl *n, const exc_rows *rows, const int64_t *sends, const int64_t *receives) {
    int ranks = exc_ranks_count(ctx), me = exc_ranks_me(ctx), status = EXC_NCCL_SUCCESS;
    const char *out = rows->send;
    char *in = rows->recv;
    for (int r = 0; r < ranks; r++) {
        size_t give = (size_t)(sends ? sends[r] : receives[me]) * rows->width, take = (size_t)receives[r] * rows->width;
        if (r == me) {
            if (give && exc_device_copy(ctx, in, out, give) != EXC_OK) return EXC_NCCL_INVALID_ARGUMENT;
        } else {
            if (give) status = n->c.ncclSend(out, give, EXC_NCCL_BYTES, r, n->comm, ctx->queue.stream);
            if (take && (status == EXC_NCCL_SUCCESS || status == EXC_NCCL_IN_PROGRESS))
                status = n->c.ncclRecv(in, take, EXC_NCCL_BYTES, r, n->comm, ctx->queue.stream);
            if (status != EXC_NCCL_SUCCESS && status != EXC_NCCL_IN_PROGRESS) return status;
        }
        if (sends) out += give;
        in += take;
    }
    return status;
}

exc_status exc_nccl_rows(exc_ctx *ctx, exc_nccl *n, const char *what, const exc_rows *list, size_t count, const int64_t *sends,
                         const int64_t *receives) {
    if (!n->comm) return gone(ctx, what);
    int status = n->c.ncclGroupStart();
    for (size_t i = 0; i < count && (status == EXC_NCCL_SUCCESS || status == EXC_NCCL_IN_PROGRESS); i++)
        status = enqueue(ctx, n, &list[i], sends, receives);
    int ended = n->c.ncclGroupEnd();
    if (status == EXC_NCCL_SUCCESS || status == EXC_NCCL_IN_PROGRESS) status = ended;
    EXC_TRY(finish(ctx, n, what, "a group of sends and receives", status));
    n->what = what;
    return EXC_OK;
}

/* The exchanges in a graph are the communicator's as those outside are: they meet the other ranks' in the order of the stream,
 * need no host, and end when it is aborted. (NCCL may be recorded since 2.9; connections are made by the first exchange of a kind,
 * which is why a step is recorded only after it was enqueued launch by launch.) */
exc_status exc_nccl_replay(exc_ctx *ctx, exc_nccl *n) {
    if (!n->comm) return gone(ctx, "a recorded step");
    n->what = "a recorded step";
    return EXC_OK;
}
