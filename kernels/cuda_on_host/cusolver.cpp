/* cusolver.cpp - a stand-in for cuSOLVER's dense routines: eigenvectors of a batch by cyclic Jacobi, in stream order.
 *
 * It refuses a stream that is being captured, wants a workspace on both sides and writes over the device's, reads one
 * triangle, and gives values in ascending order with vectors in columns, as the real one does. */
#include "standin.h"

#include <algorithm>
#include <vector>

EXC_SOLVER_CALLS(HC_EXPORT)

using namespace nv;

namespace {

using hc::as;
using hc::drop;

enum : uint32_t { HANDLE = 0x44a10001, PARAMS };
struct Handle {
    uint32_t kind = HANDLE;
    cudaStream_t stream = nullptr;
};
struct Params {
    uint32_t kind = PARAMS;
};
/* a [n,n] symmetric -> diagonal, and rows of v the eigenvectors */
void jacobi(std::vector<double> &a, std::vector<double> &v, int64_t n) {
    for (int64_t i = 0; i < n * n; i++) v[i] = i / n == i % n;
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, all = 0;
        for (int64_t i = 0; i < n * n; i++) all += a[i] * a[i], off += i / n != i % n ? a[i] * a[i] : 0;
        if (!(off > 1e-32 * all)) break;
        for (int64_t p = 0; p < n; p++)
            for (int64_t q = p + 1; q < n; q++) {
                if (a[p * n + q] == 0) continue;
                const double theta = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]),
                             t = (theta < 0 ? -1 : 1) / (std::fabs(theta) + std::sqrt(theta * theta + 1)),
                             c = 1 / std::sqrt(t * t + 1), s = t * c;
                for (int64_t k = 0; k < n; k++) {
                    const double x = a[p * n + k], y = a[q * n + k];
                    a[p * n + k] = c * x - s * y, a[q * n + k] = s * x + c * y;
                }
                for (int64_t k = 0; k < n; k++) {
                    double x = a[k * n + p], y = a[k * n + q];
                    a[k * n + p] = c * x - s * y, a[k * n + q] = s * x + c * y;
                    x = v[p * n + k], y = v[q * n + k];
                    v[p * n + k] = c * x - s * y, v[q * n + k] = s * x + c * y;
                }
            }
    }
}

struct Run {
    int64_t n, leading, batch, spoilt;
    double *a, *w;
    char *device;
    size_t device_bytes;
    int *info;

    void one(double *m, double *values) const {
        std::vector<double> full((size_t)(n * n)), vectors((size_t)(n * n));
        std::vector<int64_t> order((size_t)n);
        for (int64_t row = 0; row < n; row++) /* the lower triangle, by columns */
            for (int64_t col = 0; col <= row; col++)
                full[(size_t)(row * n + col)] = full[(size_t)(col * n + row)] = m[col * leading + row];
        jacobi(full, vectors, n);
        for (int64_t i = 0; i < n; i++) order[(size_t)i] = i;
        std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return full[(size_t)(i * n + i)] < full[(size_t)(j * n + j)]; });
        for (int64_t i = 0; i < n; i++) {
            const int64_t from = order[(size_t)i];
            values[i] = full[(size_t)(from * n + from)];
            for (int64_t k = 0; k < n; k++) m[i * leading + k] = vectors[(size_t)(from * n + k)];
        }
    }
    void operator()() const {
        memset(device, 0x5a, device_bytes); /* it is the library's to spoil */
        for (int64_t i = 0; i < batch; i++) {
            info[i] = i == spoilt;
            if (i == spoilt) memset(a + i * leading * n, 0xff, (size_t)(leading * n) * sizeof *a); /* NaN */
            else one(a + i * leading * n, w + i * n);
        }
        hc::log_line("eigen", n, n, n, batch);
    }
};

size_t device_need(int64_t n, int64_t batch) { return (size_t)(n * batch) * 24 + 512; }
size_t host_need(int64_t batch) { return (size_t)batch * 16; }

bool legal(void *handle, void *params, int vectors, int fill, int64_t n, int type_a, int64_t leading, int type_w, int compute,
           int64_t batch) {
    return as<Handle>(handle, HANDLE) && as<Params>(params, PARAMS) && vectors == CUSOLVER_EIG_MODE_VECTOR &&
           fill == CUBLAS_FILL_MODE_LOWER && n >= 1 && leading >= n && batch >= 1 && type_a == CUDA_R_64F &&
           type_w == CUDA_R_64F && compute == CUDA_R_64F;
}

} // namespace

int cusolverGetProperty(int type, int *value) {
    if (!value || type < 0 || type > PATCH_LEVEL) return CUSOLVER_STATUS_INVALID_VALUE;
    *value = hc::part_of_version(type, {12, 0, 4});
    return CUSOLVER_STATUS_SUCCESS;
}
int cusolverDnCreate(void **handle) {
    HC_FAILS(cusolverDnCreate);
    *handle = new Handle;
    return CUSOLVER_STATUS_SUCCESS;
}
int cusolverDnDestroy(void *handle) { return drop<Handle>(handle, HANDLE, CUSOLVER_STATUS_INVALID_VALUE); }
int cusolverDnSetStream(void *handle, cudaStream_t stream) {
    HC_FAILS(cusolverDnSetStream);
    Handle *h = as<Handle>(handle, HANDLE);
    if (!h) return CUSOLVER_STATUS_NOT_INITIALIZED;
    h->stream = stream;
    return CUSOLVER_STATUS_SUCCESS;
}
int cusolverDnCreateParams(void **params) {
    *params = new Params;
    return CUSOLVER_STATUS_SUCCESS;
}
int cusolverDnDestroyParams(void *params) { return drop<Params>(params, PARAMS, CUSOLVER_STATUS_INVALID_VALUE); }

int cusolverDnXsyevBatched_bufferSize(void *handle, void *params, int vectors, int fill, int64_t n, int type_a, const void *,
                                      int64_t leading, int type_w, const void *, int compute, size_t *device_bytes,
                                      size_t *host_bytes, int64_t batch) {
    HC_FAILS(cusolverDnXsyevBatched_bufferSize);
    if (!legal(handle, params, vectors, fill, n, type_a, leading, type_w, compute, batch) || !device_bytes || !host_bytes)
        return CUSOLVER_STATUS_INVALID_VALUE;
    *device_bytes = device_need(n, batch);
    *host_bytes = host_need(batch);
    return CUSOLVER_STATUS_SUCCESS;
}

int cusolverDnXsyevBatched(void *handle, void *params, int vectors, int fill, int64_t n, int type_a, void *a, int64_t leading,
                           int type_w, void *w, int compute, void *device, size_t device_bytes, void *host, size_t host_bytes,
                           int *info, int64_t batch) {
    HC_FAILS(cusolverDnXsyevBatched);
    static const char call[] = "cusolverDnXsyevBatched";
    if (!legal(handle, params, vectors, fill, n, type_a, leading, type_w, compute, batch)) return CUSOLVER_STATUS_INVALID_VALUE;
    if (device_bytes < device_need(n, batch) || host_bytes < host_need(batch) || !host || (uintptr_t)device % 16)
        return CUSOLVER_STATUS_INVALID_VALUE;
    cudaStream_t stream = as<Handle>(handle, HANDLE)->stream;
    cudaStreamCaptureStatus capture;
    cudaStreamIsCapturing(stream, &capture);
    if (capture != cudaStreamCaptureStatusNone) return CUSOLVER_STATUS_INTERNAL_ERROR;
    hc::check_extent(call, 1, a, (size_t)(leading * n * batch) * 8, stream);
    hc::check_extent(call, 2, w, (size_t)(n * batch) * 8, stream);
    hc::check_extent(call, 3, device, device_bytes, stream);
    hc::check_extent(call, 4, info, (size_t)batch * sizeof *info, stream);
    memset(host, 0x5a, host_bytes);
    const char *spoils = getenv("HC_SOLVER_SPOILS");
    hc::enqueue(stream, Run{n, leading, batch, spoils ? atoi(spoils) : -1, static_cast<double *>(a), static_cast<double *>(w),
                            static_cast<char *>(device), device_bytes, info});
    return CUSOLVER_STATUS_SUCCESS;
}
