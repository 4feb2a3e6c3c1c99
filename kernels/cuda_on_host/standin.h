/* standin.h - what the stand-ins of NVIDIA's libraries share. They are files of the libraries' names (CMakeLists.txt), found
 * and opened as the real ones are, and hold the calls of kernels/vendor.cuh and no other, with their rules checked as
 * strictly as the documentation words them.
 *
 * Tests say by the environment, read at every call, how a library is to misbehave: HC_LIBRARY_FAILS "CALL:STATUS", that call
 * gives that status, "CALL:STATUS@FILE", in that file alone; HC_LIBRARY_VERSION "11.4.0", what both say they are; HC_SOLVER_SPOILS n, cuSOLVER does not find the
 * eigenvectors of matrix n of a batch. HC_LIBRARY_LOG names a file that gets a line for each product or batch done. */
#ifndef EXC_CUDA_STANDIN_H
#define EXC_CUDA_STANDIN_H

#include "../cuda.cuh"
#include "../vendor.cuh"
#include <cstdlib>
#include <dlfcn.h>
#include <deque>
#include <memory>
#include <mutex>

namespace hc {

void protect(bool open); /* inside.h, whose settings are the player's own */

static inline int told_to_fail(const char *call) {
    const char *fails = getenv("HC_LIBRARY_FAILS");
    const size_t n = strlen(call);
    if (!fails || strncmp(fails, call, n) || fails[n] != ':') return 0;
    const char *file = strchr(fails, '@');
    Dl_info own;
    if (file && (!dladdr((const void *)&told_to_fail, &own) || !strstr(own.dli_fname, file + 1))) return 0;
    return atoi(fails + n + 1);
}

inline int part_of_version(int part, const int (&own)[3]) {
    int said[3] = {own[0], own[1], own[2]};
    if (const char *v = getenv("HC_LIBRARY_VERSION")) sscanf(v, "%d.%d.%d", &said[0], &said[1], &said[2]);
    return said[part];
}

inline void log_line(const char *what, int64_t m, int64_t n, int64_t k, int64_t batch) {
    const char *path = getenv("HC_LIBRARY_LOG");
    FILE *f = path ? fopen(path, "a") : nullptr;
    if (!f) return;
    fprintf(f, "%s %lld %lld %lld %lld\n", what, (long long)m, (long long)n, (long long)k, (long long)batch);
    fclose(f);
}

/* first and last byte of what a call may touch lie in device memory */
inline void check_extent(const char *call, int i, const void *p, size_t bytes, cudaStream_t s) {
    if (!p) fail("%s: pointer %d is NULL", call, i);
    check_arg(call, i, p, s);
    check_arg(call, i, static_cast<const char *>(p) + bytes - 1, s);
}

/* work in stream order; it may touch device memory */
template <class F> void enqueue(cudaStream_t stream, F work) {
    struct Kept { /* graphs repeat it, so it stays */
        F work;
        static void run(void *self) {
            protect(true);
            static_cast<Kept *>(self)->work();
            protect(false);
        }
    };
    static std::deque<std::unique_ptr<Kept>> kept;
    static std::mutex guard;
    std::lock_guard<std::mutex> lock(guard);
    kept.emplace_back(new Kept{work});
    cudaLaunchHostFunc(stream, Kept::run, kept.back().get());
}

/* handles begin with their kind, which is 0 from their end on. drop: 0, or `bad` for what is no such handle */
template <class T> T *as(void *p, uint32_t kind) {
    T *t = static_cast<T *>(p);
    return t && t->kind == kind ? t : nullptr;
}
template <class T> int drop(void *p, uint32_t kind, int bad) {
    T *t = as<T>(p, kind);
    if (!t) return bad;
    t->kind = 0;
    delete t;
    return 0;
}

} // namespace hc

#define HC_EXPORT(result, name, arguments) extern "C" __attribute__((visibility("default"))) result name arguments;
#define HC_FAILS(call)                                                                                       \
    if (int told_ = hc::told_to_fail(#call)) return told_

#endif
