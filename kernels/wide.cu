/* wide.cu - whether wide tiles (wide.cuh) do right on a device: a product of whole numbers, exact in f32, made by such a
 * tile and number by number, once for each device of a process. One that differs turns them off, and the description says so. */
#include "memory.cuh"
#include "wide.cuh"

namespace {

constexpr int K = 200, PITCH = 224, DEVICES = 64; /* the last stage is not whole */
enum State { UNKNOWN, OTHER, RIGHT, WRONG };
int states[DEVICES]; /* queues are opened by several threads */

int state_of(int device) { return __atomic_load_n(&states[device], __ATOMIC_ACQUIRE); }

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

exc_status try_out(exc_queue *q, Operands *o, int *wrong) {
    using One = WideTile<1, 128>;
    using Two = WideTile<2, 64>;
    ENQUEUE(q, wide_operands, 1, 256, 0, o);
    ENQUEUE(q, (wide_product<One, 1>), 1, One::THREADS, One::SHARED, o);
    ENQUEUE(q, (wide_product<Two, 2>), 1, Two::THREADS, Two::SHARED, o);
    return exc_cuda_get(q, wrong, &o->wrong, sizeof *wrong);
}

} // namespace

exc_status exc_wide_check(exc_queue *q) {
    int major = 0, wrong = 0;
    void *o;
    if (q->device < 0 || q->device >= DEVICES || state_of(q->device) != UNKNOWN) return EXC_OK;
    exc_status st = exc_enqueued(q, "wgmma", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, q->device));
    if (st == EXC_OK && major == 9) {
        st = exc_cuda_alloc(q, sizeof(Operands), &o);
        if (st != EXC_OK) return st;
        st = try_out(q, static_cast<Operands *>(o), &wrong);
        const exc_status freed = exc_cuda_release(q, o);
        if (st == EXC_OK) st = freed;
    }
    if (st == EXC_OK) __atomic_store_n(&states[q->device], major != 9 ? OTHER : wrong ? WRONG : RIGHT, __ATOMIC_RELEASE);
    return st;
}

bool exc_wide(const exc_queue *q) {
    return !q->reproducible && q->device >= 0 && q->device < DEVICES && state_of(q->device) == RIGHT;
}

void exc_wide_describe(char *text, size_t bytes) {
    int right = 0, wrong = 0;
    for (int d = 0; d < DEVICES; d++) right += state_of(d) == RIGHT, wrong += state_of(d) == WRONG;
    snprintf(text, bytes, "%s",
             wrong   ? "wgmma: differed from plain sums when it was tried on this device; mma.sync does its products instead"
             : right ? "wgmma: products of bf16 rows, 65 and more that share a matrix"
                     : "wgmma: no Hopper is in use; mma.sync does products of bf16 rows");
}
