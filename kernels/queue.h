/* queue.h - what every op runs on. A queue is the only thing the arithmetic knows of its surroundings: for the
 * CPU a way to run tasks on all threads and a scratch block per worker; for a device a stream. Ops never
 * allocate, print or lock; the host fills this struct (host/base/context.c) and hands it in.
 *
 * Determinism: a task's result may depend on its index and its inputs only, never on the worker that runs it or
 * on the number of workers. Work is split into tasks by shape alone, so any thread count gives the same bits. */
#ifndef EXC_QUEUE_H
#define EXC_QUEUE_H

#include <stddef.h>
#include <stdint.h>

typedef void (*exc_task_fn)(void *arg, size_t task, int worker);

typedef struct exc_queue exc_queue;
struct exc_queue {
    /* runs fn(arg, 0..tasks-1, worker) and returns when all are done; tasks are taken from one atomic counter */
    void (*parallel)(exc_queue *q, size_t tasks, exc_task_fn fn, void *arg);
    void *pool;            /* the host's thread pool, opaque here */
    int workers;           /* threads that may call fn, >= 1; worker ids are 0..workers-1 */
    void **scratch;        /* [workers] 64-byte aligned blocks, private to a worker inside one op */
    size_t scratch_bytes;  /* size of each block: EXC_SCRATCH_BYTES */
    int reproducible;      /* 1: a row's bits must not depend on the other rows of the batch either */
    uint64_t *nonfinite;   /* optional counter that ops which check for NaN/Inf add to (atomically) */

    /* Device queues (kernels/module.cu opens them): ops enqueue on `stream` and return. What they need beside their
     * arguments is carved from `work`, which they share in stream order. While `measuring`, an op enqueues nothing and only
     * raises work_needed to what it would take: the host calls it so with the largest shapes, then gives that much. */
    void *stream;          /* cudaStream_t */
    int borrowed;          /* the stream is the caller's */
    void *module;          /* the module's own: library handles */
    void *work;            /* device memory, 256-byte aligned */
    size_t work_bytes;
    size_t work_needed;
    int measuring;
    int device;            /* its number */
    int failed;            /* first CUDA error, sticky, and the kernel or call that met it */
    const char *failed_at;
};

#define EXC_SCRATCH_BYTES ((size_t)8 << 20)

#endif
