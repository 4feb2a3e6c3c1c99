/* module.h - the one door between the host and a device module (libexcise_cuda.so): a table of C functions.
 *
 * The host loads the module when it runs and asks for exc_module_open(EXC_MODULE_VERSION); NULL means the module was made for
 * another Excise. Nothing of CUDA shows here, and the module needs no CUDA library to load, so that a machine without a GPU
 * learns in words why there is none. Calls on one queue come from one thread at a time. */
#ifndef EXC_MODULE_H
#define EXC_MODULE_H

#include "ops.h"

#ifdef __cplusplus
extern "C" {
#endif

#define EXC_MODULE_VERSION 4

typedef struct exc_device_info {
    char name[256];
    unsigned char id[16]; /* no other GPU has it */
    int major, minor; /* compute capability */
    int processors;   /* streaming multiprocessors */
    uint64_t memory, free;
} exc_device_info;

/* D [m,n] = op(A) op(B), or that added to D; column-major, as the library has it: op(A) [m,k] of a matrix with lda rows, .. `batch` of
 * them, so many elements apart (0: the same one for all). bf16 operands, sums f32; D bf16 where `narrow`, else f32. */
typedef struct exc_library_product {
    const void *a, *b;
    void *d;
    int64_t m, n, k, lda, ldb, ldd, batch, step_a, step_b, step_d;
    int turn_a, turn_b; /* op is transposition */
    int add, narrow;
} exc_library_product;

typedef struct exc_module {
    uint32_t version;
    uint32_t size;              /* sizeof(exc_module) and of what it passes: a build mismatch must not get further */
    uint32_t queue_size;
    const char *name;           /* "cuda", or "cuda on the host" */
    const struct exc_ops *ops;  /* every op of ops.def */
    const char *(*why_not)(void); /* NULL when there is a usable device, else one sentence; static text */
    int (*devices)(void);
    exc_status (*describe)(int device, exc_device_info *info);

    /* a stream (the caller's, or NULL: a new one) and `work_bytes` of scratch on a device; everything else of q stays. close
     * frees what open made (q may be half open) */
    exc_status (*open)(exc_queue *q, int device, void *stream, size_t work_bytes);
    void (*close)(exc_queue *q);
    exc_status (*resize)(exc_queue *q, size_t work_bytes); /* waits, then gives the queue other scratch */

    /* memory: alloc, release and sync wait; put returns when `host` may be reused; get when the bytes are there; zero and
     * copy only enqueue */
    exc_status (*alloc)(exc_queue *q, size_t bytes, void **p);
    exc_status (*release)(exc_queue *q, void *p);
    exc_status (*put)(exc_queue *q, void *device, const void *host, size_t bytes);
    exc_status (*get)(exc_queue *q, void *host, const void *device, size_t bytes);
    exc_status (*copy)(exc_queue *q, void *dst, const void *src, size_t bytes); /* both on the device */
    exc_status (*zero)(exc_queue *q, void *p, size_t bytes);
    exc_status (*sync)(exc_queue *q);
    exc_status (*ready)(exc_queue *q, int *done); /* is all that was enqueued done? does not wait */
    /* what is enqueued between record and recorded is not done but kept as a graph, with all addresses and sizes, those in q->work
     * too; graph NULL: gives up. replay enqueues it. forget: NULL is nothing. No other call but ops, zero and copy between */
    exc_status (*record)(exc_queue *q);
    exc_status (*recorded)(exc_queue *q, void **graph);
    exc_status (*replay)(exc_queue *q, void *graph);
    exc_status (*forget)(exc_queue *q, void *graph);
    /* a value in device memory for the ops enqueued next, until another is asked for */
    exc_status (*constant)(exc_queue *q, float value, const float **device);
    const char *(*error)(const exc_queue *q); /* text of q->failed */
    /* a line for each of NVIDIA's libraries, "NAME: ..": version and what it is for, or why not and what does that instead */
    void (*libraries)(char *text, size_t bytes);
    /* enqueues what cuBLASLt makes of a product, whatever op matmul would do: for benches. EXC_ERR_INPUT: it is not here, or knows no way */
    exc_status (*library_product)(exc_queue *q, const exc_library_product *p);
} exc_module;

typedef const exc_module *(*exc_module_open_fn)(uint32_t version);
__attribute__((visibility("default"))) const exc_module *exc_module_open(uint32_t version);

#ifdef __cplusplus
}
#endif

#endif
