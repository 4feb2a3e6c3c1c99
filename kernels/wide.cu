/* wide.cu - whether wide tiles (wide.cuh) do right on a device: a product of whole numbers, exact in f32, made by such a
 * tile and number by number, once for each device of a process. One that differs turns them off, and the description says so. */
#include <atomic>

#include "wide.cuh"

namespace {

constexpr int K = 200, PITCH = 224, DEVICES = 64; /* the last stage is not whole */
enum State { UNKNOWN, OTHER, RIGHT, WRONG };
std::atomic<int> states[DEVICES];

__device__ int whole_number(int i) { return i * 37 % 13 - 6; }

struct Operands {
    bf16 x[128 * K], w[256 * PITCH];
    int wrong;
};

__global__ void wide_operands(Operands *o) {
    for (int i : block_stride(128 * K)) o->x[i] = narrow<bf16>((float)whole_number(i));
    for (int i : block_stride(256 * PITCH)) o->w[i] = narrow<bf16>(i % PITCH < K ? (float)whole_number(i + 5) : 0.0f);
    if (threadIdx.x == 0) o->wrong = 0;
}

template <class TILE, int NB> __global__ void __launch_bounds__(TILE::THREADS) wide_product(Operands *o) {
    DYN_SHARED(unsigned char, shared);
    SHARED_ARRAY(const unsigned char *, row, TILE::BM);
    for (int i : block_stride(TILE::BM)) row[i] = reinterpret_cast<const unsigned char *>(o->x + i * K);
    __syncthreads();
    const Plane w[2] = {plane_of(o->w, 128, K, EXC_BF16), plane_of(o->w + 128 * PITCH, 128, K, EXC_BF16)};
    const float *out = TILE::run(shared, Rows{row, 100, true}, w, 128 - TILE::BN);
    int wrong = 0;
    for (int i : block_stride(NB * 100 * TILE::BN)) {
        const int b = i / (100 * TILE::BN), r = i / TILE::BN % 100, c = i % TILE::BN;
        const bf16 *of = o->w + (b * 128 + 128 - TILE::BN + c) * PITCH;
        float sum = 0;
        for (int k = 0; k < K; k++) sum = fmaf(widen(o->x[r * K + k]), widen(of[k]), sum);
        wrong += !(out[(b * TILE::BM + r) * TILE::OUT + c] == sum);
    }
    if (wrong) atomicAdd(&o->wrong, wrong);
}

cudaError_t try_out(bool *right) {
    using One = WideTile<1, 128>;
    using Two = WideTile<2, 64>;
    Operands *o = nullptr;
    int wrong = -1;
    cudaStream_t stream;
    cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e != cudaSuccess) return e;
    e = cudaMalloc((void **)&o, sizeof *o);
    if (e == cudaSuccess) e = LAUNCH(wide_operands, dim3(1), dim3(256), 0, stream, o);
    if (e == cudaSuccess) e = LAUNCH((wide_product<One, 1>), dim3(1), dim3(One::THREADS), One::SHARED, stream, o);
    if (e == cudaSuccess) e = LAUNCH((wide_product<Two, 2>), dim3(1), dim3(Two::THREADS), Two::SHARED, stream, o);
    if (e == cudaSuccess) e = cudaMemcpyAsync(&wrong, &o->wrong, sizeof wrong, cudaMemcpyDeviceToHost, stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(stream);
    if (o) cudaFree(o);
    cudaStreamDestroy(stream);
    *right = e == cudaSuccess && wrong == 0;
    return e;
}

} // namespace

void exc_wide_check(int device) {
    int major = 0;
    if (device < 0 || device >= DEVICES || states[device].load() != UNKNOWN) return;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major != 9) {
        cudaGetLastError();
        states[device].store(OTHER);
        return;
    }
    bool right = false;
    if (try_out(&right) != cudaSuccess) cudaGetLastError();
    states[device].store(right ? RIGHT : WRONG);
}

bool exc_wide(const exc_queue *q) {
    return !q->reproducible && q->device >= 0 && q->device < DEVICES && states[q->device].load() == RIGHT;
}

void exc_wide_describe(char *text, size_t bytes) {
    int right = 0, wrong = 0;
    for (auto &s : states) right += s.load() == RIGHT, wrong += s.load() == WRONG;
    snprintf(text, bytes, "%s",
             wrong   ? "wgmma: differed from plain sums when it was tried on this device; mma.sync does its products instead"
             : right ? "wgmma: products of bf16 rows, 65 and more that share a matrix"
                     : "wgmma: no Hopper is in use; mma.sync does products of bf16 rows");
}
