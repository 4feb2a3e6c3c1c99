/* bugs.cpp - a test of the tester: deliberate bugs of CUDA code, each of which some mode of kernels/cuda_on_host must find.
 *
 * `bugs` lists them: number, the mode that finds it (plain, guard, address, thread) and what it is; `bugs N` runs one and ends
 * with 0 only when nobody noticed. Number 0 is correct and must pass everywhere. tests/bugs.sh runs the list. */
#include <cstdlib>

#include "bulk.cuh"

static cudaStream_t s, other;
static float *d, *h;
static int *counts;
static const int N = 64;

static void must(cudaError_t e) {
    if (e == cudaSuccess) return;
    printf("CUDA error: %s\n", cudaGetErrorString(e));
    exit(9);
}
static void wait() { must(cudaStreamSynchronize(s)); }
/* the first n of d are what f says */
static int compare(int n, float (*f)(int), cudaStream_t on = s) {
    must(cudaMemcpyAsync(h, d, N * sizeof(float), cudaMemcpyDeviceToHost, on));
    must(cudaStreamSynchronize(on));
    for (int i = 0; i < n; i++)
        if (!(h[i] == f(i))) return printf("[%d] is %g\n", i, (double)h[i]), 1;
    return 0;
}
static float one(int) { return 1; }
static float zero(int) { return 0; }
static float backwards(int i) { return 63.f - (float)i; }

__global__ void fill_one(float *o) { o[blockIdx.x * blockDim.x + threadIdx.x] = 1; }
static int correct() {
    must(LAUNCH(fill_one, 1, N, 0, s, d));
    return compare(N, one);
}

__global__ void no_barrier(float *o) {
    SHARED_ARRAY(float, room, 64);
    room[threadIdx.x] = (float)threadIdx.x;
    o[threadIdx.x] = room[63 - threadIdx.x];
}
static int missing_barrier() {
    must(LAUNCH(no_barrier, 1, N, 0, s, d));
    return compare(N, backwards);
}

__global__ void no_second_barrier(float *o) {
    SHARED_ARRAY(float, room, 64);
    float sum = 0;
    for (int i = 0; i < 3; i++) {
        room[threadIdx.x] = (float)i;
        __syncthreads();
        sum += room[63 - threadIdx.x];
    }
    o[threadIdx.x] = sum;
}
static int missing_barrier_in_loop() {
    must(LAUNCH(no_second_barrier, 1, N, 0, s, d));
    return compare(N, [](int) { return 3.f; });
}

__global__ void dynamic_past_end(float *o) {
    DYN_SHARED(float, room);
    room[threadIdx.x + 1] = 1;
    __syncthreads();
    o[threadIdx.x] = room[threadIdx.x + 1];
}
static int dynamic_overflow() {
    must(LAUNCH(dynamic_past_end, 1, N, N * sizeof(float), s, d));
    return wait(), 0;
}

__global__ void static_past_end(float *o, int shift) {
    SHARED_ARRAY(float, room, 64);
    room[threadIdx.x + shift] = 1;
    __syncthreads();
    o[threadIdx.x] = room[threadIdx.x];
}
static int static_overflow() {
    must(LAUNCH(static_past_end, 1, N, 0, s, d, 1));
    return wait(), 0;
}

__global__ void past_end(float *o, int shift) { o[threadIdx.x + shift] = 1; }
static int global_overflow() {
    must(LAUNCH(past_end, 1, N, 0, s, d, 1));
    return wait(), 0;
}

__global__ void split_barrier(float *o) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        o[threadIdx.x] = 1;
        __syncthreads();
    }
}
static int divergent_barrier() {
    must(LAUNCH(split_barrier, 1, N, 0, s, d));
    return wait(), 0;
}

__global__ void half_shuffle(float *o) {
    if (threadIdx.x < 16) o[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.f, 1);
    else __syncthreads();
}
static int full_mask_in_half_a_warp() {
    must(LAUNCH(half_shuffle, 1, N, 0, s, d));
    return wait(), 0;
}

__global__ void far_shuffle(float *o) {
    if (threadIdx.x < 16) o[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.f, 8);
}
static int shuffle_from_idle_lane() {
    must(LAUNCH(far_shuffle, 1, N, 0, s, d));
    return wait(), 0;
}

static int other_stream_without_event() {
    must(LAUNCH(fill_one, 1, N, 0, s, d));
    return compare(N, one, other);
}

static int host_reads_before_wait() {
    memset(h, 0, N * sizeof(float));
    must(LAUNCH(fill_one, 1, N, 0, s, d));
    must(cudaMemcpyAsync(h, d, N * sizeof(float), cudaMemcpyDeviceToHost, s));
    return h[5] != 1;
}

static int host_pointer() {
    must(LAUNCH(fill_one, 1, N, 0, s, h));
    return wait(), 0;
}

struct Holder {
    float *o;
    int64_t n;
};
__global__ void fill_by(Holder a) { a.o[threadIdx.x] = 1; }
static int host_pointer_in_struct() {
    must(LAUNCH(fill_by, 1, N, 0, s, (Holder{h, N})));
    return wait(), 0;
}

static int host_reads_device_memory() {
    must(cudaMemsetAsync(d, 0, N * sizeof(float), s));
    wait();
    return printf("%g\n", (double)*(volatile float *)&d[3]), 0;
}

__global__ void copy_all(const float *x, float *o) { o[threadIdx.x] = x[threadIdx.x]; }
static int uninitialised() {
    float *x;
    must(cudaMalloc((void **)&x, N * sizeof(float)));
    must(LAUNCH(copy_all, 1, N, 0, s, x, d));
    return compare(N, zero);
}

__global__ void count_plainly(int *c) { c[threadIdx.x % 4]++; }
static int plain_counter() {
    must(LAUNCH(count_plainly, 4, N, 0, s, counts));
    return wait(), 0;
}

__global__ void lock_step(float *o) {
    SHARED_ARRAY(volatile float, room, 64);
    int t = (int)threadIdx.x;
    room[t] = (float)t;
    if (t < 16) {
        room[t] = room[t] + room[t + 16];
        room[t] = room[t] + room[t + 8];
    }
    o[t] = room[t];
}
static int warp_in_lock_step() {
    must(LAUNCH(lock_step, 1, 32, 0, s, d));
    return compare(8, [](int i) { return 4.f * (float)i + 48; });
}

__global__ void no_wait(const float *x, float *o) {
    SHARED_ARRAY(float, room, 64 * 4);
    cp_async16(&room[threadIdx.x * 4], x);
    cp_async_commit();
    __syncthreads();
    o[threadIdx.x] = room[threadIdx.x * 4];
}
static int asynchronous_copy_without_wait() {
    float *x;
    must(cudaMalloc((void **)&x, N * sizeof(float)));
    must(cudaMemsetAsync(x, 0, N * sizeof(float), s));
    must(LAUNCH(no_wait, 1, N, 0, s, x, d));
    return compare(N, zero);
}

static int buffer_freed_under_copy() {
    float *x = (float *)calloc(N, sizeof(float));
    must(cudaMemcpyAsync(d, x, N * sizeof(float), cudaMemcpyHostToDevice, s));
    free(x);
    return wait(), 0;
}

__global__ void wide_load(const float *x, float *o) {
    float4 v = *reinterpret_cast<const float4 *>(x + 1 + 4 * threadIdx.x);
    o[threadIdx.x] = v.x;
}
static int misaligned() {
    float *x;
    must(cudaMalloc((void **)&x, 5 * N * sizeof(float)));
    must(LAUNCH(wide_load, 1, N, 0, s, x, d));
    return wait(), 0;
}

__global__ void whole_warp_only(float *o) {
    if (__activemask() == ALL_LANES) o[threadIdx.x] = 1;
}
static int trust_in_activemask() {
    must(cudaMemsetAsync(d, 0, N * sizeof(float), s));
    must(LAUNCH(whole_warp_only, 1, N, 0, s, d));
    return compare(N, one);
}

static int too_many_threads() {
    must(LAUNCH(fill_one, 1, 2048, 0, s, d));
    return 0;
}

static int copy_past_end() {
    must(cudaMemcpyAsync(d, h, (N + 1) * sizeof(float), cudaMemcpyHostToDevice, s));
    return wait(), 0;
}

__global__ void add_one(float *o) { o[threadIdx.x] += 1; }
static int blocks_of_one() {
    must(cudaMemsetAsync(d, 0, N * sizeof(float), s));
    must(LAUNCH(add_one, 4, 1, 0, s, d));
    return wait(), 0;
}
static int same_thread_of_blocks() {
    must(cudaMemsetAsync(d, 0, N * sizeof(float), s));
    must(LAUNCH(add_one, 4, N, 0, s, d));
    return wait(), 0;
}

__global__ void add_between_barriers(float *o) {
    __syncthreads();
    o[threadIdx.x] += 1;
    __syncthreads();
}
static int blocks_between_barriers() {
    must(cudaMemsetAsync(d, 0, N * sizeof(float), s));
    must(LAUNCH(add_between_barriers, 4, N, 0, s, d));
    return wait(), 0;
}

/* block b and the block six further on add to the same number */
__global__ void add_apart(float *o) { o[blockIdx.x % 6] += 1; }
static int blocks_apart() {
    must(cudaMemsetAsync(d, 0, N * sizeof(float), s));
    must(LAUNCH(add_apart, 12, 1, 0, s, d));
    return compare(6, [](int) { return 2.f; });
}

/* a shuffle brings a value along, and orders no memory */
__global__ void shuffle_for_barrier(float *o) {
    SHARED_ARRAY(float, room, 32);
    const int t = (int)threadIdx.x;
    room[t] = (float)t;
    const int from = __shfl_xor_sync(0xffffffffu, t, 1);
    o[t] = room[from] + (float)t;
}
static int order_by_shuffle() {
    must(LAUNCH(shuffle_for_barrier, 1, 32, 0, s, d));
    return compare(32, [](int i) { return (float)(i + (i ^ 1)); });
}

/* blocks of one launch, where the second step reads what others wrote in the first */
__global__ void two_steps(float *o) {
    const int t = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    o[t] = 1;
    __syncthreads();
    o[32 + t % 32] = o[31 - t % 32];
}
static int barrier_of_a_block_for_the_grid() {
    must(LAUNCH_TOGETHER(two_steps, 2, 16, 0, s, d));
    return wait(), 0;
}

static int allocation_in_capture() {
    void *p;
    must(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    must(cudaMalloc(&p, 16));
    return 0;
}
static int wait_in_capture() {
    must(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    must(LAUNCH(fill_one, 1, N, 0, s, d));
    return wait(), 0;
}

/* bulk copies: d[i] = counts[i] + 1 by way of shared memory, with one thing left out or wrong */
enum Slip { NO_SLIP, NO_WAIT, ODD_SIZE, TOO_MANY, TOO_FEW, TWO_ARRIVALS, NO_FENCE, NO_READ, NO_GATE, OTHER_PLACE };
__global__ void bulk_copies(const int *from, float *to, Slip slip) {
    SHARED_ARRAY(int, room, 64);
    SHARED_ARRAY(Gate, gate, 2);
    const int i = threadIdx.x;
    const unsigned bytes = slip == ODD_SIZE ? 248 : 256;
    if (i == 0 && slip != NO_GATE) gate_init(gate, 1);
    gates_ready();
    __syncthreads();
    if (i == 0) {
        gate_expect(gate, slip == TOO_MANY ? 128 : slip == TOO_FEW ? 512 : bytes);
        if (slip == TWO_ARRIVALS) gate_expect(gate, 0);
        bulk_load(slip == OTHER_PLACE ? room + 1 : room, from, bytes, gate);
    }
    if (slip != NO_WAIT) gate_wait(gate, 0);
    const float x = (float)room[i] + 1;
    __syncthreads();
    reinterpret_cast<float *>(room)[i] = x;
    if (slip != NO_FENCE) bulk_fence();
    __syncthreads();
    if (i) return;
    bulk_store(to, room, 256);
    bulk_commit();
    if (slip != NO_READ) bulk_wait<0>();
}
template <Slip slip> static int bulk() {
    must(LAUNCH(bulk_copies, 1, N, 0, s, counts, d, slip));
    return compare(N, one);
}

/* the blocks of a cluster tell each other their ranks; one that is told of too few bytes, too many of them */
__global__ void tell_ranks(float *o, int extra) {
    DYN_SHARED(unsigned char, base);
    float *told = reinterpret_cast<float *>(base);
    Gate *gate = reinterpret_cast<Gate *>(base + 64);
    if (threadIdx.x == 0) gate_init(gate, 1);
    gates_ready();
    cluster_begin(base);
    const int rank = cluster_rank();
    if (threadIdx.x == 0) gate_expect(gate, CLUSTER * 4 - extra);
    if (threadIdx.x < CLUSTER) remote_store(told + rank, threadIdx.x, (float)rank, gate);
    gate_wait(gate, 0);
    if (threadIdx.x < CLUSTER) o[rank * CLUSTER + threadIdx.x] = 1 + told[threadIdx.x] - (float)threadIdx.x;
    cluster_sync();
}
template <int EXTRA> static int ranks_told() {
    must(LAUNCH_CLUSTERS(1, CLUSTER, tell_ranks, 32, 128, s, d, EXTRA));
    return compare(N, one);
}

static const struct {
    const char *mode, *what;
    int (*run)();
} list[] = {
    {"none", "a correct kernel", correct},
    {"plain", "missing barrier", missing_barrier},
    {"plain", "missing second barrier of a loop", missing_barrier_in_loop},
    {"address", "dynamic shared memory past its end", dynamic_overflow},
    {"address", "static shared memory past its end", static_overflow},
    {"guard", "device memory past its end, closed pages", global_overflow},
    {"address", "device memory past its end", global_overflow},
    {"plain", "barriers of two branches", divergent_barrier},
    {"plain", "shuffle with a full mask in half a warp", full_mask_in_half_a_warp},
    {"plain", "shuffle from a lane that takes no part", shuffle_from_idle_lane},
    {"plain", "copy on another stream without an event", other_stream_without_event},
    {"plain", "host reads a result before it waited", host_reads_before_wait},
    {"plain", "host pointer handed to a kernel", host_pointer},
    {"plain", "host pointer handed to a kernel in a struct", host_pointer_in_struct},
    {"guard", "host reads device memory", host_reads_device_memory},
    {"plain", "device memory read before it was written", uninitialised},
    {"thread", "counter without atomics", plain_counter},
    {"plain", "warp taken to run in lock step", warp_in_lock_step},
    {"plain", "asynchronous copy without a wait", asynchronous_copy_without_wait},
    {"address", "host buffer freed under a copy", buffer_freed_under_copy},
    {"address", "misaligned load of 16 bytes", misaligned},
    {"plain", "all lanes taken to be active", trust_in_activemask},
    {"plain", "2048 threads a block", too_many_threads},
    {"plain", "copy past the end", copy_past_end},
    {"thread", "blocks of one thread on one number", blocks_of_one},
    {"thread", "the same thread of several blocks on one number", same_thread_of_blocks},
    {"thread", "the same between barriers", blocks_between_barriers},
    {"thread", "blocks six apart on one number", blocks_apart},
    {"thread", "shared memory ordered by a shuffle", order_by_shuffle},
    {"thread", "steps of a grid with a barrier of blocks between", barrier_of_a_block_for_the_grid},
    {"thread", "missing barrier, as a race", missing_barrier},
    {"thread", "missing second barrier of a loop, as a race", missing_barrier_in_loop},
    {"thread", "lock step, as a race", warp_in_lock_step},
    {"plain", "allocation while a graph is captured", allocation_in_capture},
    {"plain", "wait while a graph is captured", wait_in_capture},
    {"none", "correct bulk copies", bulk<NO_SLIP>},
    {"plain", "bulk load read before its gate", bulk<NO_WAIT>},
    {"plain", "bulk load of no multiple of 16 bytes", bulk<ODD_SIZE>},
    {"plain", "bulk load to no multiple of 16", bulk<OTHER_PLACE>},
    {"plain", "more bytes than a gate was told of", bulk<TOO_MANY>},
    {"plain", "fewer bytes than a gate was told of", bulk<TOO_FEW>},
    {"plain", "more arrivals than a gate was made for", bulk<TWO_ARRIVALS>},
    {"plain", "bulk store without a fence", bulk<NO_FENCE>},
    {"plain", "a thread that ends before its bulk store was read", bulk<NO_READ>},
    {"plain", "a gate that was not made", bulk<NO_GATE>},
    {"none", "correct stores within a cluster", ranks_told<0>},
    {"plain", "stores within a cluster, more than announced", ranks_told<4>},
};

int main(int argc, char **argv) {
    size_t all = sizeof list / sizeof *list;
    if (argc < 2) {
        for (size_t i = 0; i < all; i++) printf("%zu %s %s\n", i, list[i].mode, list[i].what);
        return 0;
    }
    size_t i = strtoul(argv[1], nullptr, 10);
    if (i >= all) return 2;
    must(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    must(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    must(cudaMalloc((void **)&d, N * sizeof(float)));
    must(cudaMalloc((void **)&counts, N * sizeof(int)));
    must(cudaMemsetAsync(counts, 0, N * sizeof(int), s));
    wait();
    h = (float *)calloc(N + 1, sizeof(float));
    int noticed = list[i].run();
    free(h);
    return noticed;
}
