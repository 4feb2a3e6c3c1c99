/* noise.cu - dst [n]: uniform random numbers by their places in a stream, on the device, the twin of noise.c, bit for bit.
 *
 * Four numbers a store where the array is aligned; nothing is read. */
#include "cuda.cuh"
#include "grid.cuh"

#define THREADS 256

template <int V, class T> __global__ void noise_all(T *dst, int64_t n, uint64_t first, uint32_t key, float width) {
    struct alignas(V * sizeof(T)) Out { T v[V]; };
    for (int64_t i : grid_stride(n / V)) {
        Out out;
        for (int k = 0; k < V; k++) {
            const uint64_t at = first + (uint64_t)(i * V + k);
            const float u = (float)(philox(key, (uint32_t)(at >> 32), (uint32_t)at) >> 8) * 0x1p-24f;
            out.v[k] = narrow<T>(width * (u - 0.5f));
        }
        reinterpret_cast<Out *>(dst)[i] = out;
    }
}

extern "C" exc_status exc_cuda_noise(exc_queue *q, const struct exc_noise_args *a) {
    if (a->n < 0 || a->first < 0) return EXC_ERR_USAGE;
    const uint32_t key = philox_key(a->seed, a->stream);
    const float width = a->deviation * 3.4641016f;
    BY_ACT(a->dtype, {
        T *dst = (T *)a->dst;
        if (a->n % 4 == 0 && aligned(dst, 4 * sizeof(T)))
            ENQUEUE(q, (noise_all<4, T>), grid_for(a->n, THREADS, 4), THREADS, 0, dst, a->n, (uint64_t)a->first, key, width);
        else
            ENQUEUE(q, (noise_all<1, T>), grid_for(a->n, THREADS), THREADS, 0, dst, a->n, (uint64_t)a->first, key, width);
    });
    return EXC_OK;
}
