/* grid.cuh - codes below 16 bits and the numbers a stored dtype has, on the device: codes.h and grid.h, bit
 * for bit.
 *
 * A positive number is rounded by what it loses of an f32: `drop` low bits, or, below the least normal
 * number, what lies under a multiple of `unit`. Beyond `most` stands `over`. Random bits are a function of
 * key, row and column alone (Philox2x32-10). */
#ifndef EXC_GRID_CUH
#define EXC_GRID_CUH

#include "cuda.cuh"

constexpr int SCALE_BLOCK = 128, SCALE_GROUP = 32; /* EXC_BLOCK, EXC_GROUP */
constexpr uint32_t NAN_E4M3 = 0x7f;

__host__ __device__ inline float from_e4m3(uint32_t code) {
    return f32_of((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
}
__host__ __device__ inline float from_e2m1(uint32_t code) {
    return f32_of((code & 8) << 28 | (code & 7) << 22) * 0x1p126f;
}
__host__ __device__ inline float from_e8m0(uint32_t code) {
    const uint32_t u = code << 23;
    return f32_of(code == 255 ? 0x7fc00000u : u > 0x00400000u ? u : 0x00400000u);
}

/* scale i of an array of scales */
__device__ inline float scale_at(const void *scale, int dtype, int64_t i) {
    if (dtype == EXC_F32) return static_cast<const float *>(scale)[i];
    if (dtype == EXC_BF16) return widen(static_cast<const bf16 *>(scale)[i]);
    return from_e8m0(static_cast<const uint8_t *>(scale)[i]);
}
__device__ inline void scale_put(void *scale, int dtype, int64_t i, float s) {
    const uint32_t u = bits_of(s);
    if (dtype == EXC_F32)
        static_cast<uint32_t *>(scale)[i] = u;
    else if (dtype == EXC_BF16)
        static_cast<uint16_t *>(scale)[i] = (uint16_t)(u >> 16);
    else
        static_cast<uint8_t *>(scale)[i] = (uint8_t)(u >> 23);
}

struct Grid {
    int drop;
    float least, unit, most, over;
    uint32_t bias;
};

/* of a dtype, known when compiled */
template <int DTYPE> __device__ constexpr Grid grid_of() {
    return DTYPE == EXC_F8_E4M3 ? Grid{20, 0x1p-6f, 0x1p-9f, 448.0f, 448.0f, 120 << 3}
           : DTYPE == EXC_F4    ? Grid{22, 1.0f, 0.5f, 6.0f, 6.0f, 126 << 1}
           : DTYPE == EXC_F16   ? Grid{13, 0x1p-14f, 0x1p-24f, 65504.0f, INFINITY, 112 << 10}
                                : Grid{16, 0.0f, 1.0f, 3.402823466e38f, INFINITY, 0};
}

/* |x| to nearest even */
__device__ inline float grid_near(const Grid &g, float a) {
    const uint32_t u = bits_of(a), mask = (1u << g.drop) - 1;
    const float up = f32_of((u + (mask >> 1) + (u >> g.drop & 1)) & ~mask), magic = g.unit * 0x1p23f;
    const float small = (a + magic) - magic;
    float r = a < g.least ? small : up;
    r = r > g.most ? g.over : r;
    return a != a ? a : r;
}

/* |x| up or down, up with the share it is past the lower neighbour; of 32 random bits */
__device__ inline float grid_draw(const Grid &g, float a, uint32_t random) {
    const uint32_t mask = (1u << g.drop) - 1, u = (bits_of(a) + 8) & ~15u;
    const float up = f32_of((u + (random & mask)) & ~mask);
    float steps = (a < g.least ? a : 0.0f) * (1.0f / g.unit);
    steps = (steps + 192.0f) - 192.0f;
    const float small = (float)(int32_t)(steps + (float)(random >> 8) * 0x1p-24f) * g.unit;
    float r = a < g.least ? small : up;
    r = r > g.most ? g.over : r;
    return a != a ? a : r;
}

/* the code of a number of the grid, without sign */
__device__ inline uint32_t grid_code(const Grid &g, float a) {
    const uint32_t small = (uint32_t)(int32_t)((a < g.least ? a : 0.0f) * (1.0f / g.unit));
    return a < g.least ? small : (bits_of(a) >> g.drop) - g.bias;
}

/* the code of the number nearest to x; NaN is 0x7f */
__device__ inline uint32_t nearest_e4m3(float x) {
    constexpr Grid g = grid_of<EXC_F8_E4M3>();
    const float r = grid_near(g, fabsf(x));
    return r != r ? NAN_E4M3 : grid_code(g, r) | bits_of(x) >> 31 << 7;
}

__device__ inline uint32_t philox(uint32_t key, uint32_t row, uint32_t col) {
    uint32_t a = col, b = row;
#pragma unroll
    for (int i = 0; i < 10; i++, key += 0x9e3779b9u) {
        const uint32_t high = __umulhi(0xd256d193u, a), low = 0xd256d193u * a;
        a = high ^ key ^ b;
        b = low;
    }
    return a;
}

__host__ __device__ inline uint32_t philox_key(uint64_t seed, uint64_t stream) {
    uint64_t x = seed + 0x9e3779b97f4a7c15ull * (stream + 1);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return (uint32_t)((x ^ x >> 31) >> 32);
}

#endif
