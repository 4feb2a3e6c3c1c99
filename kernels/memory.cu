/* memory.cu - device memory and waiting: the only file that allocates, copies to the host or synchronises.
 *
 * Copies between host and device wait for their end: weights are put once, results are small, and a caller's buffer is free
 * again at once. Out of memory is an answer, not a failure of the queue: CUDA is fine after it. */
#include "memory.cuh"

exc_status exc_cuda_alloc(exc_queue *q, size_t bytes, void **p) {
    *p = nullptr;
    cudaError_t e = cudaSetDevice(q->device);
    if (e == cudaSuccess) e = cudaMalloc(p, bytes ? bytes : 1);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return EXC_ERR_MEMORY;
    }
    return exc_enqueued(q, "allocation", e);
}

/* work may still use the memory: cudaFree waits for it */
exc_status exc_cuda_release(exc_queue *q, void *p) {
    if (!p) return EXC_OK;
    cudaError_t e = cudaSetDevice(q->device);
    return exc_enqueued(q, "release", e == cudaSuccess ? cudaFree(p) : e);
}

exc_status exc_cuda_sync(exc_queue *q) { return exc_enqueued(q, "wait", cudaStreamSynchronize((cudaStream_t)q->stream)); }

exc_status exc_cuda_ready(exc_queue *q, int *done) {
    cudaError_t e = cudaStreamQuery((cudaStream_t)q->stream);
    *done = e != cudaErrorNotReady;
    if (e != cudaErrorNotReady) return exc_enqueued(q, "wait", e);
    cudaGetLastError();
    return EXC_OK;
}

static exc_status transfer(exc_queue *q, void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, const char *what) {
    if (!bytes) return EXC_OK;
    cudaError_t e = cudaSetDevice(q->device);
    if (e == cudaSuccess) e = cudaMemcpyAsync(dst, src, bytes, kind, (cudaStream_t)q->stream);
    return exc_enqueued(q, what, e);
}

exc_status exc_cuda_put(exc_queue *q, void *device, const void *host, size_t bytes) {
    exc_status st = transfer(q, device, host, bytes, cudaMemcpyHostToDevice, "copy to the device");
    return st == EXC_OK && bytes ? exc_cuda_sync(q) : st;
}

exc_status exc_cuda_get(exc_queue *q, void *host, const void *device, size_t bytes) {
    exc_status st = transfer(q, host, device, bytes, cudaMemcpyDeviceToHost, "copy from the device");
    return st == EXC_OK && bytes ? exc_cuda_sync(q) : st;
}

exc_status exc_cuda_copy(exc_queue *q, void *dst, const void *src, size_t bytes) {
    return transfer(q, dst, src, bytes, cudaMemcpyDeviceToDevice, "copy on the device");
}

exc_status exc_cuda_zero(exc_queue *q, void *p, size_t bytes) { return exc_enqueue_fill(q, p, 0, bytes); }
