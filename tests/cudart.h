/* cudart.h - the CUDA runtime as a test uses it beside the library: streams, copies, graphs.
 *
 * It is opened by name: the one on the host that the emulated module uses, or, where twin.h finds a real GPU's module,
 * libcudart.so. cudart_open() comes after twin_open(); CUDA(call) fails the test when a call does not give success. */
#ifndef EXC_TEST_CUDART_H
#define EXC_TEST_CUDART_H

#include <dlfcn.h>

#include "twin.h"

/* with the vendor's numbers */
enum { TO_DEVICE = 1, TO_HOST = 2, OWN_STREAM = 1, THIS_THREAD = 1 };
static struct runtime {
    int (*malloc)(void **p, size_t bytes), (*free)(void *p);
    int (*copy)(void *dst, const void *src, size_t bytes, int kind, void *stream);
    int (*stream_create)(void **stream, unsigned flags), (*stream_wait)(void *stream), (*stream_destroy)(void *stream);
    int (*capture_begin)(void *stream, int mode), (*capture_end)(void *stream, void **graph);
    int (*graph_make)(void **run, void *graph, unsigned long long flags), (*graph_launch)(void *run, void *stream);
    int (*run_destroy)(void *run), (*graph_destroy)(void *graph);
} cuda;

#define CUDA(call) assert_int_equal(cuda.call, 0)

static inline int cudart_open(void) {
    static const struct { const char *name; size_t at; } calls[] = {
        {"cudaMalloc", offsetof(struct runtime, malloc)}, {"cudaFree", offsetof(struct runtime, free)},
        {"cudaMemcpyAsync", offsetof(struct runtime, copy)}, {"cudaStreamCreateWithFlags", offsetof(struct runtime, stream_create)},
        {"cudaStreamSynchronize", offsetof(struct runtime, stream_wait)}, {"cudaStreamDestroy", offsetof(struct runtime, stream_destroy)},
        {"cudaStreamBeginCapture", offsetof(struct runtime, capture_begin)}, {"cudaStreamEndCapture", offsetof(struct runtime, capture_end)},
        {"cudaGraphInstantiate", offsetof(struct runtime, graph_make)}, {"cudaGraphLaunch", offsetof(struct runtime, graph_launch)},
        {"cudaGraphExecDestroy", offsetof(struct runtime, run_destroy)}, {"cudaGraphDestroy", offsetof(struct runtime, graph_destroy)}};
    char path[PATH_MAX], *slash;
    snprintf(path, sizeof path, "%s", getenv("EXCISE_CUDA_MODULE"));
    bool emulated = strstr(path, "emulated") != NULL;
    if ((slash = strrchr(path, '/'))) slash[1] = 0;
    strncat(path, "libcudaonhost.so", sizeof path - strlen(path) - 1);
    void *lib = dlopen(emulated ? path : "libcudart.so", RTLD_NOW);
    if (!lib) fail_msg("%s", dlerror());
    for (size_t i = 0; i < EXC_COUNT(calls); i++) {
        void *f = dlsym(lib, calls[i].name);
        if (!f) fail_msg("%s", dlerror());
        memcpy((char *)&cuda + calls[i].at, &f, sizeof f);
    }
    return 0;
}

#endif
