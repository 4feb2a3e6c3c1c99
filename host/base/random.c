/* random.c - counter-based random numbers: value i of stream (seed, stream) is a pure function, so results do
 * not depend on order, batching or threads. Two rounds of the SplitMix64 finaliser over the mixed counter
 * (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014). */
#include "base.h"

static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

uint64_t exc_random_u64(uint64_t seed, uint64_t stream, uint64_t i) {
    return mix(mix(seed + 0x9e3779b97f4a7c15ull * (stream + 1)) + 0x9e3779b97f4a7c15ull * (i + 1));
}

double exc_random_unit(uint64_t seed, uint64_t stream, uint64_t i) {
    return (double)(exc_random_u64(seed, stream, i) >> 11) * 0x1p-53;
}
