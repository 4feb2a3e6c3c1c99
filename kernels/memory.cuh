/* memory.cuh - what memory.cu and graph.cu give to module.cu's table. Contracts are in module.h.
 * Kernels never include this: an op has no business with memory that it was not handed. */
#ifndef EXC_MEMORY_CUH
#define EXC_MEMORY_CUH

#include "cuda.cuh"

exc_status exc_cuda_alloc(exc_queue *q, size_t bytes, void **p);
exc_status exc_cuda_release(exc_queue *q, void *p);
exc_status exc_cuda_sync(exc_queue *q);
exc_status exc_cuda_ready(exc_queue *q, int *done);
exc_status exc_cuda_put(exc_queue *q, void *device, const void *host, size_t bytes);
exc_status exc_cuda_get(exc_queue *q, void *host, const void *device, size_t bytes);
exc_status exc_cuda_copy(exc_queue *q, void *dst, const void *src, size_t bytes);
exc_status exc_cuda_zero(exc_queue *q, void *p, size_t bytes);
exc_status exc_cuda_record(exc_queue *q); /* and the next three: graph.cu */
exc_status exc_cuda_recorded(exc_queue *q, void **graph);
exc_status exc_cuda_replay(exc_queue *q, void *graph);
exc_status exc_cuda_forget(exc_queue *q, void *graph);

#endif
