/* module.cu - the device module's table: is there a GPU, opening and closing a queue on it, and its ops by name.
 *
 * Any code of the driver but success means "no GPU", in words. A queue is a stream that does not wait for others, scratch that
 * its ops share in stream order, a counter of non-finite numbers, and handles of NVIDIA's libraries where those are. */
#include "libraries.cuh"
#include "wide.cuh"
#include "memory.cuh"
#include "module.h"

/* a missing twin is a link error */
extern "C" {
#define EXC_OP(name, ...) exc_status exc_cuda_##name(exc_queue *q, const struct exc_##name##_args *a);
#include "ops.def"
#undef EXC_OP
}

static const struct exc_ops ops = {
    "cuda",
#define EXC_OP(name, ...) exc_cuda_##name,
#include "ops.def"
#undef EXC_OP
};

static const char *why_not(void) {
    static char text[256];
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaSuccess && n > 0) return nullptr;
    cudaGetLastError();
    if (e == cudaErrorInsufficientDriver || e == cudaErrorStubLibrary) {
        int driver = 0, runtime = 0;
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        cudaGetLastError();
        if (!driver) return "no NVIDIA driver is installed";
        snprintf(text, sizeof text, "the NVIDIA driver supports CUDA %d.%d, this build needs %d.%d", driver / 1000,
                 driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
        return text;
    }
    if (e == cudaErrorNoDevice || e == cudaSuccess) return "there is a driver, but no NVIDIA GPU";
    snprintf(text, sizeof text, "the NVIDIA driver says: %s", cudaGetErrorString(e));
    return text;
}

static int devices(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
    cudaGetLastError();
    return 0;
}

static exc_status describe(int device, exc_device_info *info) {
    cudaDeviceProp p;
    size_t free_bytes = 0, total = 0;
    *info = exc_device_info();
    if (cudaSetDevice(device) != cudaSuccess || cudaGetDeviceProperties(&p, device) != cudaSuccess ||
        cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) {
        cudaGetLastError();
        return EXC_ERR_DEVICE;
    }
    snprintf(info->name, sizeof info->name, "%s", p.name);
    memcpy(info->id, p.uuid.bytes, sizeof info->id);
    info->major = p.major;
    info->minor = p.minor;
    info->processors = p.multiProcessorCount;
    info->memory = total;
    info->free = free_bytes;
    return EXC_OK;
}

/* the counter and the scratch are one block: counter first */
static const size_t HEAD = 256;

static exc_status resize(exc_queue *q, size_t work_bytes) {
    exc_status st = exc_cuda_sync(q);
    if (st != EXC_OK) return st;
    if (q->nonfinite) st = exc_cuda_release(q, q->nonfinite);
    q->nonfinite = nullptr;
    q->work = nullptr;
    q->work_bytes = 0;
    void *p = nullptr;
    if (st == EXC_OK) st = exc_cuda_alloc(q, HEAD + work_bytes, &p);
    if (st != EXC_OK) return st;
    q->nonfinite = static_cast<uint64_t *>(p);
    q->work = static_cast<char *>(p) + HEAD;
    q->work_bytes = work_bytes;
    return exc_cuda_zero(q, q->nonfinite, HEAD);
}

static exc_status open_queue(exc_queue *q, int device, void *callers, size_t work_bytes) {
    cudaStream_t stream = static_cast<cudaStream_t>(callers);
    q->device = device;
    q->failed = 0;
    q->nonfinite = nullptr;
    q->borrowed = callers != nullptr;
    cudaError_t e = cudaSetDevice(device);
    if (e == cudaSuccess && !callers) e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e != cudaSuccess) return exc_enqueued(q, "opening a stream", e);
    q->stream = stream;
    exc_status st = exc_wide_check(q);
    if (st == EXC_OK) st = exc_libraries_open(q);
    return st == EXC_OK ? resize(q, work_bytes) : st;
}

static void close_queue(exc_queue *q) {
    if (!q->stream) return;
    cudaSetDevice(q->device);
    cudaStreamSynchronize((cudaStream_t)q->stream);
    exc_libraries_close(q);
    if (q->nonfinite) exc_cuda_release(q, q->nonfinite);
    if (!q->borrowed) cudaStreamDestroy((cudaStream_t)q->stream);
    cudaGetLastError();
    q->stream = nullptr;
    q->nonfinite = nullptr;
    q->work = nullptr;
}

/* in the head beside the counter, written in stream order */
__global__ static void set_constant(float *p, float value) { *p = value; }

static exc_status constant(exc_queue *q, float value, const float **device) {
    float *p = reinterpret_cast<float *>(q->nonfinite) + 2;
    *device = p;
    ENQUEUE(q, set_constant, 1, 1, 0, p, value);
    return EXC_OK;
}

static const char *error_text(const exc_queue *q) {
    const char *text = exc_library_error(q->failed);
    return text ? text : cudaGetErrorString((cudaError_t)q->failed);
}

/* and what does products where none of them does */
static void describe_libraries(char *text, size_t bytes) {
    exc_libraries_describe(text, bytes);
    const size_t at = strlen(text);
    if (at + 2 > bytes) return;
    text[at] = '\n';
    exc_wide_describe(text + at + 1, bytes - at - 1);
}

static exc_status library_product(exc_queue *q, const exc_library_product *a) {
    Product p = {};
    p.operand = nv::CUDA_R_16BF;
    p.m = a->m, p.n = a->n, p.k = a->k;
    p.turn_a = a->turn_a, p.turn_b = a->turn_b;
    p.lda = a->lda, p.ldb = a->ldb, p.ldd = a->ldd;
    p.batch = a->batch, p.step_a = a->step_a, p.step_b = a->step_b, p.step_d = a->step_d;
    p.add = a->add, p.narrow = a->narrow;
    Carve work(q);
    void *workspace = work.take<char>(BLAS_WORKSPACE);
    exc_status st;
    const Plan *plan = exc_product_plan(q, p, &st);
    if (!plan) return st == EXC_OK ? EXC_ERR_INPUT : st;
    return work.ready() ? exc_product(q, plan, a->a, a->b, a->d, a->d, nullptr, workspace) : work.status;
}

static const exc_module table = {
    EXC_MODULE_VERSION,
    sizeof(exc_module),
    sizeof(exc_queue),
#ifdef __CUDACC__
    "cuda",
#else
    "cuda on the host",
#endif
    &ops,
    why_not,
    devices,
    describe,
    open_queue,
    close_queue,
    resize,
    exc_cuda_alloc,
    exc_cuda_release,
    exc_cuda_put,
    exc_cuda_get,
    exc_cuda_copy,
    exc_cuda_zero,
    exc_cuda_sync,
    exc_cuda_ready,
    exc_cuda_record,
    exc_cuda_recorded,
    exc_cuda_replay,
    exc_cuda_forget,
    constant,
    error_text,
    describe_libraries,
    library_product,
};

extern "C" const exc_module *exc_module_open(uint32_t version) { return version == EXC_MODULE_VERSION ? &table : nullptr; }
