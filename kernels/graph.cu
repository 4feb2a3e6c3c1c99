/* graph.cu - work of a queue recorded once and enqueued whole.
 *
 * A decode step of a 48-layer model is some six hundred launches of a few microseconds each; enqueued one by one the
 * host is the bottleneck. A graph has them all behind one call. It keeps every address, size and launch shape that
 * it was recorded with, so whoever replays it answers for these being the same (host/model/replay.c). What is recorded
 * must not wait, allocate or copy from the host: twins of ops do none of it. Threads beside may go on
 * allocating: only this thread's calls are watched. */
#include "memory.cuh"

exc_status exc_cuda_record(exc_queue *q) {
    cudaError_t e = cudaSetDevice(q->device);
    if (e == cudaSuccess) e = cudaStreamBeginCapture((cudaStream_t)q->stream, cudaStreamCaptureModeThreadLocal);
    return exc_enqueued(q, "recording a graph", e);
}

exc_status exc_cuda_recorded(exc_queue *q, void **graph) {
    cudaGraph_t g = nullptr;
    cudaGraphExec_t run = nullptr;
    cudaError_t e = cudaStreamEndCapture((cudaStream_t)q->stream, &g);
    if (e == cudaSuccess && graph) e = cudaGraphInstantiate(&run, g, 0);
    if (g) cudaGraphDestroy(g);
    if (graph) *graph = run;
    else cudaGetLastError(); /* given up because something failed before: that is what the queue remembers */
    return graph ? exc_enqueued(q, "making a graph", e) : EXC_OK;
}

exc_status exc_cuda_replay(exc_queue *q, void *graph) {
    cudaError_t e = cudaSetDevice(q->device);
    if (e == cudaSuccess) e = cudaGraphLaunch((cudaGraphExec_t)graph, (cudaStream_t)q->stream);
    return exc_enqueued(q, "launch of a graph", e);
}

/* it may still run: CUDA keeps what that needs */
exc_status exc_cuda_forget(exc_queue *q, void *graph) {
    if (!graph) return EXC_OK;
    cudaError_t e = cudaSetDevice(q->device);
    return exc_enqueued(q, "release of a graph", e == cudaSuccess ? cudaGraphExecDestroy((cudaGraphExec_t)graph) : e);
}
