/* inside.h - what fibers.cpp (threads, blocks, launches) and streams.cpp (streams, memory, the runtime's calls) share: the
 * settings, read once from the environment, and the way from one to the other.
 *
 * HC_SEED order of threads (0: by index), HC_WORKERS OS threads, HC_DEFER 1: a stream works only when somebody waits for
 * it, HC_GUARD 1: device memory ends at a closed page and is closed to the host between kernels, HC_DEVICES, HC_DRIVER
 * (12040: supports CUDA 12.4; 0: none), HC_SMS, HC_MEM_MB device memory, HC_STACK_KB of a CUDA thread, HC_SMEM_OPTIN shared
 * memory of a block, HC_CACHE_KB the second-level cache and HC_MAJOR the compute capability it claims to have, HC_SEEN a file
 * that is told of every kernel that runs. */
#ifndef EXC_CUDA_INSIDE_H
#define EXC_CUDA_INSIDE_H

#include "device.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <cstdlib>

namespace hc {
inline long env(const char *name, long other) {
    const char *s = getenv(name);
    return s && *s ? strtol(s, nullptr, 0) : other;
}
struct Cfg {
    long workers = env("HC_WORKERS", 0), seed = env("HC_SEED", 0), defer = env("HC_DEFER", 1), guard = env("HC_GUARD", 0),
         devices = env("HC_DEVICES", 1), driver = env("HC_DRIVER", 13000),
         sms = env("HC_SMS", env("HC_MAJOR", 8) < 9 ? 4 : 8), /* room for a cluster of sixteen blocks */
         mem = env("HC_MEM_MB", 4096), stack = env("HC_STACK_KB", 64),
         smem_optin = env("HC_SMEM_OPTIN", 163 * 1024), /* the smaller of sm_80 and sm_90 */
         cache = env("HC_CACHE_KB", 40 << 10), major = env("HC_MAJOR", 8);
};
Cfg &cfg();
void run_launch(const Launch &l, const std::function<void()> &body); /* fibers.cpp: all blocks, to the end */
void protect(bool open);                                             /* streams.cpp: HC_GUARD's pages */
} // namespace hc

#endif
