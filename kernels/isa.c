/* isa.c - which instructions the kernels may use, found out once at run time.
 *
 * The processor must offer the instructions and the operating system must save their registers (XCR0), else the first
 * context switch would lose them. AMX also has to be asked for: Linux hands out the 8 KB of tile state on request only.
 * EXCISE_ISA lowers the level, never raises it. It is read once, as some op asks for the level every microsecond; a test program
 * that walks through all levels calls exc_isa_lower(). */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"

static const char *const names[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

const char *exc_isa_name(enum exc_isa level) { return names[level]; }

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static uint64_t saved_state(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

static enum exc_isa find(void) {
    uint32_t a, b, c, d, c1;
    if (!__get_cpuid(1, &a, &b, &c1, &d) || !(c1 & bit_OSXSAVE)) return EXC_ISA_GENERIC;
    uint64_t state = saved_state();
    const uint64_t ymm = 0x6, zmm = 0xe6, tiles = 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return EXC_ISA_GENERIC;
    uint32_t fma = bit_FMA | bit_AVX | bit_F16C | bit_POPCNT;
    if ((state & ymm) != ymm || (c1 & fma) != fma || !(b & bit_AVX2)) return EXC_ISA_GENERIC;
    uint32_t wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((state & zmm) != zmm || (b & wide) != wide) return EXC_ISA_AVX2;
    const uint32_t amx = 1u << 22 | 1u << 24; /* AMX-BF16, AMX-TILE in EDX of leaf 7.0 */
    int has_amx = (state & tiles) == tiles && (d & amx) == amx, has_bytes = c >> 1 & 1; /* AVX512_VBMI */
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5) || !has_bytes) return EXC_ISA_AVX512; /* AVX512_BF16 */
    if (has_amx && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return EXC_ISA_AMX;
    return EXC_ISA_AVX512BF16;
}

/* Caches are described by leaf 4, or by one of AMD's in the same format. */
size_t exc_cache_share(int workers) {
    uint32_t a, b, c, d, leaf = 4;
    if (__get_cpuid(0x80000001u, &a, &b, &c, &d) && c & 1u << 22) leaf = 0x8000001du;
    for (uint32_t i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && a & 31; i++) {
        if ((a >> 5 & 7) != 3) continue;
        size_t bytes = (size_t)((b >> 22) + 1) * ((b >> 12 & 0x3ff) + 1) * ((b & 0xfff) + 1) * ((size_t)c + 1);
        uint32_t threads = (a >> 14 & 0xfff) + 1;
        return bytes / (size_t)(workers < (int)threads ? workers : (int)threads);
    }
    return 0;
}
#else
static enum exc_isa find(void) { return EXC_ISA_GENERIC; }

size_t exc_cache_share(int workers) {
    (void)workers;
    return 0;
}
#endif

static _Atomic int known; /* level + 1 */

enum exc_isa exc_isa_lower(const char *name) {
    int level = (int)find();
    for (int i = 0; name && i < level; i++)
        if (!strcmp(name, names[i])) level = i;
    atomic_store_explicit(&known, level + 1, memory_order_relaxed);
    return (enum exc_isa)level;
}

enum exc_isa exc_isa_level(void) {
    int level = atomic_load_explicit(&known, memory_order_relaxed) - 1;
    return level < 0 ? exc_isa_lower(getenv("EXCISE_ISA")) : (enum exc_isa)level;
}
