/* base.h - what every room of the host stands on: the context, error texts, events, memory, threads, paths.
 *
 * Error style: a fallible internal function takes the exc_ctx first and returns exc_status; exc_fail() stores one
 * line of text (file, item, rule, expected, found) and returns the code, so `return exc_fail(...)` is the idiom and
 * EXC_TRY(...) passes a failure up unchanged. The first text wins until the next public call clears it.
 * Nothing here prints, exits or aborts. */
#ifndef EXC_BASE_H
#define EXC_BASE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "excise.h"
#include "queue.h"

#define EXC_TRY(expr)                                                                                                  \
    do {                                                                                                               \
        exc_status try_ = (expr);                                                                                      \
        if (try_ != EXC_OK) return try_;                                                                               \
    } while (0)
/* EXC_GOTO(label, expr): as EXC_TRY, for functions with something to release; needs a local `exc_status st`. */
#define EXC_GOTO(label, expr)                                                                                          \
    do {                                                                                                               \
        st = (expr);                                                                                                   \
        if (st != EXC_OK) goto label;                                                                                  \
    } while (0)
#define EXC_COUNT(a) (sizeof(a) / sizeof *(a))
#define EXC_PRINTF(f, a) __attribute__((format(printf, f, a)))

struct exc_ops;    /* kernels/ops.h */
struct exc_module; /* kernels/module.h */
typedef struct exc_ranks exc_ranks; /* base/ranks.c */

struct exc_ctx {
    exc_ctx_options opt;
    char error[1024];          /* text of the last failure, empty if none */
    const struct exc_ops *ops; /* the chosen backend's table */
    const char *backend;       /* "cpu", ... */
    char declined[256];        /* why a GPU that nobody named was passed over; "" if none was */
    exc_queue queue;           /* what ops run on */
    uint64_t nonfinite;        /* counter behind queue.nonfinite, on the CPU */
    const struct exc_module *module; /* the device module; NULL: ops run on the CPU */
    exc_ranks *ranks;          /* NULL: this process works alone */
    uint64_t memory, taken, most_taken; /* budget in bytes, what models have of it now, and had at most */
    struct exc_recorded *recorded; /* graphs that are not forgotten, linked */
    bool recording;            /* between exc_device_record and exc_device_recorded */
    const int32_t *observing;  /* the caller's switch of exc_observe, where ops run; NULL: on */
    exc_model *models;         /* opened in this context, linked by `next` */
    struct exc_kept {
        char key[33];
        void *thing; /* NULL: nothing kept */
        void (*drop)(void *thing);
    } kept; /* one thing that is dear to make and asked for again: the last tokenizer, by the hash of its file */
    struct {
        void *block; /* device memory that no dock uses just now */
        size_t bytes;
    } dock; /* base/dock.c */
};

/* ---- errors and events (base/status.c) */
exc_status exc_fail(exc_ctx *ctx, exc_status code, const char *fmt, ...) EXC_PRINTF(3, 4);
/* exc_fail with ": strerror(errno)" appended; EXC_ERR_IO */
exc_status exc_fail_errno(exc_ctx *ctx, const char *fmt, ...) EXC_PRINTF(2, 3);
void exc_clear(exc_ctx *ctx); /* called on entry of every public [job] function */
/* sends one event; returns EXC_CANCELLED when the callback asked to stop, else EXC_OK */
exc_status exc_progress(exc_ctx *ctx, const char *step, uint64_t done, uint64_t total, const char *unit);
void exc_info(exc_ctx *ctx, const char *fmt, ...) EXC_PRINTF(2, 3);
void exc_warn(exc_ctx *ctx, const char *fmt, ...) EXC_PRINTF(2, 3);

/* ---- memory (base/memory.c): sizes are checked products; every allocation can fail and is reported */
void *exc_alloc(exc_ctx *ctx, size_t count, size_t size, const char *what);  /* 64-byte aligned, not zeroed; NULL + error */
void *exc_zalloc(exc_ctx *ctx, size_t count, size_t size, const char *what); /* zeroed */
void exc_release(void *p);                                                   /* for both; NULL is fine */
bool exc_mul(size_t a, size_t b, size_t *out);                               /* false on overflow */
char *exc_strdup(exc_ctx *ctx, const char *s);                               /* release with exc_release */
/* test hook: makes the n-th allocation from now fail (0: off) */
void exc_alloc_fail_at(uint64_t n);
bool exc_alloc_fails_now(void); /* for other allocators: counts one allocation */

/* the budget (base/quota.c): memory where ops run that models may take. Only large blocks are told to it. */
uint64_t exc_memory_free(exc_ctx *ctx);  /* of the machine or device: what is available, within the control group's limit */
void exc_memory_take(exc_ctx *ctx, uint64_t bytes);
void exc_memory_give(exc_ctx *ctx, uint64_t bytes);
uint64_t exc_memory_left(const exc_ctx *ctx);
uint64_t exc_memory_peak(const exc_ctx *ctx); /* most that this process had in memory, or of the device */
const char *exc_memory_text(uint64_t bytes, char out[32]); /* "1.5 GiB" */

/* one growing byte string, used for texts and reports */
typedef struct exc_buf {
    char *data; /* NUL-terminated when len > 0 or after exc_buf_put */
    size_t len, cap;
    bool failed; /* an allocation failed; checked once at the end */
} exc_buf;
void exc_buf_put(exc_buf *b, const void *bytes, size_t n);
void exc_buf_puts(exc_buf *b, const char *s);
void exc_buf_printf(exc_buf *b, const char *fmt, ...) EXC_PRINTF(2, 3);
void exc_buf_free(exc_buf *b);

/* ---- threads (base/threads.c) */
exc_status exc_queue_open(exc_ctx *ctx, int threads);
void exc_queue_close(exc_ctx *ctx);

/* ---- the device (base/device.c). Memory where this context's ops run: device memory, or plain memory on the CPU. put and get
 * wait for their end; zero and copy (both sides there) run in the order of the ops around them. */
const struct exc_module *exc_device_module(void); /* NULL: none to be had */
const char *exc_device_why_not(void);             /* NULL when a GPU can be used, else one sentence */
exc_status exc_device_open(exc_ctx *ctx, int device);
void exc_device_close(exc_ctx *ctx);
exc_status exc_device_reserve(exc_ctx *ctx, size_t work_bytes); /* scratch of ops: at least this much from now on */
size_t exc_device_free(exc_ctx *ctx); /* bytes that exc_device_alloc may still give; SIZE_MAX on the CPU */
/* EXC_ERR_MEMORY: what is needed for what, and what is free; on a device only */
exc_status exc_device_short(exc_ctx *ctx, size_t bytes, const char *fmt, ...) EXC_PRINTF(3, 4);
/* after an op that refused for want of scratch: gives the queue what it asked for; true: call the op again */
bool exc_device_grew(exc_ctx *ctx, exc_status st);
exc_status exc_device_alloc(exc_ctx *ctx, size_t count, size_t size, const char *what, void **p);
void exc_device_release(exc_ctx *ctx, void *p);
exc_status exc_device_put(exc_ctx *ctx, void *device, const void *host, size_t bytes);
exc_status exc_device_get(exc_ctx *ctx, void *host, const void *device, size_t bytes);
exc_status exc_device_copy(exc_ctx *ctx, void *dst, const void *src, size_t bytes);
exc_status exc_device_zero(exc_ctx *ctx, void *p, size_t bytes);
/* Memory of the host that ops read or write too. On the CPU they take it as it is; on a device a block of the same size stands
 * for it: mirror makes that block (NULL on the CPU), side is the one of the two that ops are given. put and get between
 * the two cost nothing on the CPU. */
exc_status exc_device_mirror(exc_ctx *ctx, size_t count, size_t size, const char *what, void **block);
void *exc_device_side(const exc_ctx *ctx, void *host, void *block);
/* Graphs (module.h says what may stand between the first two); on a device only. On failure no graph comes back. A graph of several
 * ranks can be replayed while they can exchange; all are to replay it. */
exc_status exc_device_record(exc_ctx *ctx);
exc_status exc_device_recorded(exc_ctx *ctx, void **graph);
exc_status exc_device_replay(exc_ctx *ctx, void *graph);
void exc_device_forget(exc_ctx *ctx, void *graph);
void exc_device_forget_all(exc_ctx *ctx); /* gives up one that is being recorded, and what all hold; forget is still due */
exc_status exc_device_sync(exc_ctx *ctx); /* waits for all work; errors of kernels show here */
/* passes a status on; on a device adds the text of the failed call. For the status of an op: what names it */
exc_status exc_device_failed(exc_ctx *ctx, exc_status st, const char *what);

/* ---- docks (base/dock.c): arrays of the host for one op call. Fields are addresses of pointers in its arguments; NULL ones are
 * passed over. On the CPU all of it does nothing. Usage: {.ctx, .what}, list the fields, then EXC_DOCK_CALL; or enter, several
 * calls, leave. leave is always due after enter and passes a status on. */
typedef struct exc_berth {
    void *field, *host; /* host: what the field held */
    const void *from;   /* what is put there, NULL: nothing */
    size_t bytes;
    bool out;
} exc_berth;
typedef struct exc_dock {
    exc_ctx *ctx;
    const char *what; /* the arrays, for messages */
    exc_berth *berth; /* [n], on a device only */
    size_t n, cap;
    void *block;
    size_t bytes;
    exc_status status; /* of listing and enter */
} exc_dock;
void exc_dock_in(exc_dock *d, void *field, size_t bytes);   /* the op reads it */
void exc_dock_out(exc_dock *d, void *field, size_t bytes);  /* the op writes all of it */
void exc_dock_both(exc_dock *d, void *field, size_t bytes); /* reads and writes */
/* the op finds the bytes of `from` there and changes them in place; the field's array gets them back. CPU: see exc_compiled_apply */
void exc_dock_through(exc_dock *d, void *field, const void *from, size_t bytes);
exc_status exc_dock_enter(exc_dock *d);
exc_status exc_dock_leave(exc_dock *d, exc_status st);
bool exc_dock_drop(exc_ctx *ctx); /* gives the kept block back; false: there was none */
/* One call of an op with the scratch that it asks for. A failure says which op; what an op refuses is input it cannot do. */
#define EXC_CALL(ctx, op, args)                                                                                                \
    exc_op_done((ctx), #op,                                                                                                    \
                !(ctx)->module || exc_op_ready((ctx), (ctx)->ops->op(exc_op_measure(ctx), (args)))                             \
                    ? (ctx)->ops->op(&(ctx)->queue, (args))                                                                    \
                    : EXC_ERR_MEMORY)
#define EXC_DOCK_CALL(dock, op, args)                                                                                          \
    exc_dock_leave((dock), exc_dock_enter(dock) == EXC_OK ? EXC_CALL((dock)->ctx, op, (args)) : (dock)->status)
exc_queue *exc_op_measure(exc_ctx *ctx); /* of EXC_CALL: the queue, measuring */
bool exc_op_ready(exc_ctx *ctx, exc_status measured);
exc_status exc_op_done(exc_ctx *ctx, const char *op, exc_status st);

/* ---- modules (base/library.c): a handle for dlsym, or NULL and one sentence in why; `env` may name another file */
void *exc_library_open(const char *name, const char *env, char *why, size_t n);

/* ---- ranks (base/ranks.c): processes that do one job together. All ranks make these calls in the same order; `what` names
 * the place, for the message that ranks out of step get. EXC_ERR_DEVICE: a rank is gone, late or elsewhere. */
exc_status exc_ranks_open(exc_ctx *ctx, const char *how); /* as exc_ctx_options.ranks */
void exc_ranks_close(exc_ctx *ctx);
int exc_ranks_me(const exc_ctx *ctx);       /* 0.. */
int exc_ranks_count(const exc_ctx *ctx); /* 1 alone */
int exc_ranks_near(const exc_ctx *ctx);  /* of them on this machine, as far as the launcher tells; else all */
void exc_share(int64_t n, int rank, int size, int64_t *first, int64_t *end); /* the rank's contiguous part of n things */
exc_status exc_ranks_meet(exc_ctx *ctx, const char *what, uint64_t same); /* a barrier; `same` must be equal on all ranks */
exc_status exc_ranks_gather(exc_ctx *ctx, const char *what, const void *send, void *recv, size_t bytes); /* recv [ranks, bytes] */
/* pieces to and from each rank, in rank order one after the other in send and recv; byte counts [ranks] */
exc_status exc_ranks_exchange(exc_ctx *ctx, const char *what, const void *send, const size_t *send_bytes, void *recv, const size_t *recv_bytes);
/* every rank's piece to everyone: recv in rank order, bytes [ranks] the size of each piece, known to all */
exc_status exc_ranks_collect(exc_ctx *ctx, const char *what, const void *send, void *recv, const size_t *bytes);
/* The same two for memory where ops run, and for `count` kinds of rows at once: rows [ranks] that go to and come from each, `what` a
 * literal. On a GPU they are enqueued and nothing is said before them: an exchange in the same place must have shown that the
 * ranks agree on the numbers. */
typedef struct exc_rows {
    const void *send;
    void *recv;
    size_t width; /* bytes of a row */
} exc_rows;
exc_status exc_ranks_send_rows(exc_ctx *ctx, const char *what, const exc_rows *list, size_t count, const int64_t *sends,
                               const int64_t *receives);
exc_status exc_ranks_collect_rows(exc_ctx *ctx, const char *what, const exc_rows *list, size_t count, const int64_t *rows);
/* before a wait for the device: what other ranks have a part in is done, or has failed and is given up */
exc_status exc_ranks_settle(exc_ctx *ctx);
exc_status exc_ranks_replay(exc_ctx *ctx); /* before a graph with exchanges in it is enqueued once more */
exc_status exc_ranks_device(exc_ctx *ctx); /* once the backend is open: several GPUs join */
/* array <- sum over ranks, added in rank order: the same bits everywhere. dtype EXC_I64, EXC_U32, EXC_F64, EXC_F32; array may be NULL */
exc_status exc_ranks_sum(exc_ctx *ctx, const char *what, int dtype, void *array, size_t count);
/* v [n] <- the least of each over all ranks */
exc_status exc_ranks_least(exc_ctx *ctx, const char *what, int64_t *v, size_t n);
/* fails on all ranks when it failed on one, with that one's words */
exc_status exc_ranks_agree(exc_ctx *ctx, const char *what, exc_status mine);

/* ---- small files (base/paths.c). Paths in messages are as the user gave them. */
exc_status exc_read_file(exc_ctx *ctx, const char *path, size_t limit, char **data, size_t *len); /* NUL added; exc_release */
/* n bytes at `at` of an open file; EXC_ERR_INPUT when it ends before */
exc_status exc_read_at(exc_ctx *ctx, const char *path, int fd, void *to, size_t n, uint64_t at);
/* writes PATH.partial-<pid>, fsync, rename, fsync of the folder; refuses an existing path unless force. Of several ranks the
 * first one writes, and all come back with its status once the file is there. */
exc_status exc_write_file(exc_ctx *ctx, const char *path, const void *data, size_t len, bool force);
exc_status exc_check_output(exc_ctx *ctx, const char *path, bool force); /* EXC_ERR_USAGE when it exists and !force; this rank only */
exc_status exc_check_file(exc_ctx *ctx, const char *path, bool force);   /* the same, or when a folder stands there; all ranks */
exc_status exc_path_join(exc_ctx *ctx, const char *dir, const char *name, char **out);
exc_status exc_fsync_dir(exc_ctx *ctx, const char *dir);
bool exc_utf8_valid(const char *s, size_t n, size_t *bad_at);
/* printable form of an untrusted name: control bytes and non-UTF-8 escaped, cut at 200 bytes; static thread-local ring */
const char *exc_show(const char *s, size_t n);
uint64_t exc_hash64(const void *data, size_t n);               /* XXH3-64 */
void exc_hash_hex(const void *data, size_t n, char out[33]);   /* XXH3-128 as 32 hex digits */
exc_status exc_hash_file(exc_ctx *ctx, const char *path, char out[33]);
double exc_seconds(void);                                      /* monotonic clock */

/* ---- counter-based random numbers (base/random.c): value i of stream (seed, stream) needs no state and no order */
uint64_t exc_random_u64(uint64_t seed, uint64_t stream, uint64_t i);
double exc_random_unit(uint64_t seed, uint64_t stream, uint64_t i); /* [0,1) */

#endif
