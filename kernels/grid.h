/* grid.h - the numbers a stored dtype has, as one description that rounding and encoding share for e4m3, fp4, f16 and bf16, and
 * the random bits of stochastic rounding.
 *
 * A positive number is rounded by what it loses of an f32: `drop` low bits, or, below the least normal number, what lies
 * under a multiple of `unit`. Beyond `most` stands `over`: the largest finite number, or infinity where the dtype has it. */
#ifndef EXC_GRID_H
#define EXC_GRID_H

#include "codes.h"

typedef struct exc_grid {
    int drop;
    float least, unit, most, over;
    uint32_t bias; /* upper bits of an f32 less this are the code */
} exc_grid;

static inline exc_grid exc_grid_of(int dtype) {
    switch (dtype) {
    case EXC_F8_E4M3: return (exc_grid){20, 0x1p-6f, 0x1p-9f, 448.0f, 448.0f, 120 << 3};
    case EXC_F4: return (exc_grid){22, 1.0f, 0.5f, 6.0f, 6.0f, 126 << 1};
    case EXC_F16: return (exc_grid){13, 0x1p-14f, 0x1p-24f, 65504.0f, __builtin_inff(), 112 << 10};
    default: return (exc_grid){16, 0.0f, 1.0f, __FLT_MAX__, __builtin_inff(), 0}; /* bf16: subnormal like f32 */
    }
}

/* |x| to nearest even. Multiples of unit: adding a number whose last bit is worth one unit. */
EXC_INLINE float exc_grid_near(const exc_grid *g, float a) {
    uint32_t u = exc_to_bits(a), mask = (1u << g->drop) - 1;
    float up = exc_from_bits((u + (mask >> 1) + (u >> g->drop & 1)) & ~mask), magic = g->unit * 0x1p23f;
    float small = (a + magic) - magic, r = a < g->least ? small : up;
    r = r > g->most ? g->over : r;
    return a != a ? a : r;
}

/* |x| up or down, up with the share it is past the lower neighbour; of 32 random bits. The last bits are noise of the arithmetic
 * before: they are rounded away first, so that a number of the grid stays what it is. */
EXC_INLINE float exc_grid_draw(const exc_grid *g, float a, uint32_t random) {
    uint32_t mask = (1u << g->drop) - 1, u = (exc_to_bits(a) + 8) & ~15u;
    float up = exc_from_bits((u + (random & mask)) & ~mask);
    float steps = (a < g->least ? a : 0.0f) * (1.0f / g->unit);
    steps = (steps + 192.0f) - 192.0f; /* below 8 for e4m3 and fp4: to 2^-16 */
    float small = (float)(int32_t)(steps + (float)(random >> 8) * 0x1p-24f) * g->unit, r = a < g->least ? small : up;
    r = r > g->most ? g->over : r;
    return a != a ? a : r;
}

/* the code of a number of the grid, without sign */
EXC_INLINE uint32_t exc_grid_code(const exc_grid *g, float a) {
    const float magic = g->unit * 0x1p23f; /* whose last bit is worth one unit */
    uint32_t u = exc_to_bits(a), small = exc_to_bits(a + magic) - exc_to_bits(magic), normal = (u >> g->drop) - g->bias;
    return u < exc_to_bits(g->least) ? small : normal;
}

/* Philox2x32-10 (Salmon et al. 2011): 32 random bits that are a function of key, row and column alone */
EXC_INLINE uint32_t exc_philox(uint32_t key, uint32_t row, uint32_t col) {
    uint32_t a = col, b = row;
    for (int i = 0; i < 10; i++, key += 0x9e3779b9u) {
        uint64_t p = (uint64_t)0xd256d193u * a;
        a = (uint32_t)(p >> 32) ^ key ^ b;
        b = (uint32_t)p;
    }
    return a;
}

/* the key of one matrix: SplitMix64's finaliser over seed and stream */
static inline uint32_t exc_philox_key(uint64_t seed, uint64_t stream) {
    uint64_t x = seed + 0x9e3779b97f4a7c15ull * (stream + 1);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return (uint32_t)((x ^ x >> 31) >> 32);
}

#endif
