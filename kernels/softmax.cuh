/* softmax.cuh - what compare.cu and sample.cu share: the exponential of lanes.h to the bit, and the largest
 * of a row.
 *
 * The largest is kept with its id: NaN loses against numbers, equal numbers go to the lower id, so the order
 * in which threads and blocks meet the row does not matter. */
#ifndef EXC_SOFTMAX_CUH
#define EXC_SOFTMAX_CUH

#include "cuda.cuh"

constexpr float MOST_FLOAT = 3.402823466e38f;

/* exp(x) for x <= 0 (above: 1), as exc_exp_down() */
__device__ inline float exp_down(float x) {
    x = x > 0.0f ? 0.0f : x;
    const float shifted = fmaf(x, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
    const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    const float e = p * f32_of((bits_of(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : e;
}

struct Largest {
    float value;
    int64_t id; /* -1: no number yet */
    __device__ void meet(float x, int64_t i) {
        if (x == x && (id < 0 || x > value || (x == value && i < id))) value = x, id = i;
    }
};

/* of a block; every thread gets it. room: WARP of them in shared memory */
__device__ inline Largest block_largest(Largest mine, Largest *room) {
    auto warp = [](Largest l) {
        for (int d = WARP / 2; d > 0; d /= 2) {
            const float value = __shfl_xor_sync(ALL_LANES, l.value, d);
            const long long id = __shfl_xor_sync(ALL_LANES, (long long)l.id, d);
            if (id >= 0) l.meet(value, id);
        }
        return l;
    };
    mine = warp(mine);
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = mine;
    __syncthreads();
    return warp((int)threadIdx.x % WARP < (int)blockDim.x / WARP ? room[threadIdx.x % WARP] : Largest{0, -1});
}

/* what exp(x - m) is taken from: the largest number, but no less than -FLT_MAX */
__device__ inline float peak_of(const Largest &l) {
    return l.id >= 0 && l.value > -MOST_FLOAT ? l.value : -MOST_FLOAT;
}

#endif
