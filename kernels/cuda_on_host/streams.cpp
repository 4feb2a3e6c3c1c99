/* streams.cpp - the CUDA runtime's calls on the host: streams, events, graphs, memory.
 *
 * A stream is a list of work that is done when somebody waits for it (HC_DEFER 1), so what is not ordered by a stream
 * or an event shows. Device memory is host memory filled with NaN, and every pointer handed to a kernel or copy must
 * be in an allocation of the right kind and device. Work on a stream that is being captured is kept and repeated by
 * its graph; calls that a capture forbids fail then, as on a GPU. */
#include "inside.h"
#include <ctime>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

// ---------------------------------------------------------------- streams and events
using hc::cfg;
using hc::fail;
struct StreamOp {
    std::function<void()> fn;
    std::vector<std::pair<CUstream_st *, uint64_t>> deps;
    hc::Poll poll; /* instead of fn: called until it says that the work is done */
};
struct Recorded { /* one of the two */
    std::function<void()> fn;
    std::function<hc::Poll()> begin;
};
typedef std::vector<Recorded> Work;
struct CUgraph_st {
    Work work;
};
struct CUgraphExec_st {
    Work work;
};
struct CUstream_st {
    std::unique_ptr<CUgraph_st> capture; /* being captured into */
    std::deque<StreamOp> q;
    uint64_t issued = 0, done = 0;
    bool nonblocking = false, dead = false;
    int dev = 0;
};
struct CUevent_st {
    CUstream_st *s = nullptr;
    uint64_t seq = 0;
    double t = 0;
};
static std::recursive_mutex G;
static std::vector<std::unique_ptr<CUstream_st>> streams; // kept to the end: events may point at them
static thread_local int cur_dev;
static thread_local cudaError_t last_err = cudaSuccess;
static cudaError_t err(cudaError_t e) {
    if (e != cudaSuccess) last_err = e;
    return e;
}
static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
#define LOCK std::lock_guard<std::recursive_mutex> hc_lock_(G)
static CUstream_st *legacy() {
    static std::map<int, CUstream_st> m;
    auto &s = m[cur_dev];
    s.dev = cur_dev;
    return &s;
}
static CUstream_st *S(cudaStream_t s) {
    if (s == nullptr) return legacy();
    if (s->dead) fail("use of a destroyed stream");
    return s;
}
static void drain(CUstream_st *s, uint64_t upto) {
    while (s->done < upto && !s->q.empty()) {
        StreamOp op = std::move(s->q.front());
        s->q.pop_front();
        for (auto &d : op.deps) drain(d.first, d.second);
        if (op.fn) op.fn();
        while (op.poll && !op.poll()) usleep(20);
        s->done++;
    }
}
static void drain_all() {
    LOCK;
    drain(legacy(), UINT64_MAX);
    for (auto &s : streams) drain(s.get(), UINT64_MAX);
}
static void submit(CUstream_st *s, std::function<void()> fn,
                   std::vector<std::pair<CUstream_st *, uint64_t>> deps = {}) {
    LOCK;
    if (s->capture) {
        s->capture->work.push_back({std::move(fn), {}});
        return;
    }
    CUstream_st *L = legacy();
    if (s == L) {
        for (auto &o : streams)
            if (!o->nonblocking && o->done < o->issued) deps.push_back({o.get(), o->issued});
    } else if (!s->nonblocking && L->done < L->issued)
        deps.push_back({L, L->issued});
    s->q.push_back({std::move(fn), std::move(deps)});
    s->issued++;
    if (!cfg().defer) drain(s, s->issued); // deferred (default): work happens only when somebody waits for it
}

/* work that other processes have a part in: cudaStreamQuery does not wait for it */
void hc::enqueue_poll(cudaStream_t stream, std::function<Poll()> begin) {
    LOCK;
    CUstream_st *s = S(stream);
    if (s->capture) {
        s->capture->work.push_back({{}, std::move(begin)});
        return;
    }
    s->q.push_back({{}, {}, begin()});
    s->issued++;
}

// ---------------------------------------------------------------- memory
struct Alloc {
    size_t n, map;
    char kind;
    int dev;
}; // kind: d device, p pinned, m managed
static std::map<uintptr_t, Alloc> &allocs() {
    static auto *m = new std::map<uintptr_t, Alloc>;
    return *m;
}
static size_t dev_used;
static const std::pair<const uintptr_t, Alloc> *find(const void *p) {
    auto it = allocs().upper_bound((uintptr_t)p);
    if (it == allocs().begin()) return nullptr;
    --it;
    return (uintptr_t)p < it->first + it->second.n || (uintptr_t)p == it->first ? &*it : nullptr;
}
static bool capturing() {
    for (auto &s : streams)
        if (s->capture) return true;
    return false;
}
static cudaError_t hc_alloc(void **p, size_t n, char kind) {
    LOCK;
    if (capturing()) return err(cudaErrorStreamCaptureUnsupported);
    *p = nullptr;
    if (!n) return cudaSuccess;
    if (kind == 'd' && dev_used + n > (size_t)cfg().mem << 20) return err(cudaErrorMemoryAllocation);
    size_t map = 0;
    void *q;
    if (cfg().guard && kind == 'd') { // ends at an inaccessible page; closed to the host between kernels
        map = ((n + 255) & ~(size_t)255);
        map = (map + 4095) & ~(size_t)4095;
        char *m = (char *)mmap(nullptr, map + 4096, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        q = m + map - ((n + 255) & ~(size_t)255);
        memset(q, 0xff, n);
        mprotect(m + map, 4096, PROT_NONE);
        mprotect(m, map, PROT_NONE);
    } else {
        if (posix_memalign(&q, 256, n)) return err(cudaErrorMemoryAllocation);
        memset(q, 0xff, n);
    } // NaN: shows reads before writes
    allocs()[(uintptr_t)q] = Alloc{n, map, kind, cur_dev};
    if (kind == 'd') dev_used += n;
    *p = q;
    return cudaSuccess;
}
static cudaError_t hc_free(void *p) {
    LOCK;
    if (!p) return cudaSuccess;
    auto it = allocs().find((uintptr_t)p);
    if (it == allocs().end()) return err(cudaErrorInvalidValue);
    Alloc a = it->second;
    allocs().erase(it);
    if (a.kind == 'd') dev_used -= a.n;
    if (a.map)
        munmap((void *)((uintptr_t)p & ~(uintptr_t)4095), a.map + 4096);
    else
        free(p);
    return cudaSuccess;
}
static int open_depth;
void hc::protect(bool open) {
    if (!cfg().guard) return;
    LOCK;
    if (open ? open_depth++ : --open_depth) return;
    for (auto &a : allocs())
        if (a.second.map)
            mprotect((void *)(a.first & ~(uintptr_t)4095), a.second.map, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}
/* opens the allocation of p alone, for a copy */
struct Opened {
    void *at = nullptr;
    size_t n = 0;
    explicit Opened(const void *p) {
        auto *a = cfg().guard && !open_depth ? find(p) : nullptr;
        if (!a || !a->second.map) return;
        at = (void *)(a->first & ~(uintptr_t)4095), n = a->second.map;
        mprotect(at, n, PROT_READ | PROT_WRITE);
    }
    ~Opened() {
        if (at) mprotect(at, n, PROT_NONE);
    }
};
static void check_range(const char *what, const void *p, size_t n, bool device) {
    auto *a = find(p);
    if (device && !a) fail("%s: %p is not device memory", what, p);
    if (!device && a && a->second.kind == 'd') fail("%s: %p is device memory where host memory is meant", what, p);
    if (a && (uintptr_t)p + n > a->first + a->second.n)
        fail("%s: %zu bytes at %p run past the end of an allocation of %zu bytes", what, n, p, a->second.n);
}
void hc::check_arg(const char *k, int i, const void *p, cudaStream_t s) {
    if (!p) return;
    LOCK;
    auto *a = find(p);
    if (!a) fail("launch of %s: pointer argument %d (%p) is not device, pinned or managed memory", k, i, p);
    if (a->second.kind == 'd' && a->second.dev != S(s)->dev)
        fail("launch of %s: pointer argument %d is on device %d, the stream on device %d", k, i, a->second.dev,
             S(s)->dev);
}
/* A struct handed to a kernel by value: its words that look like addresses of this process must be device memory too. */
void hc::check_words(const char *k, int i, const void *value, size_t n, cudaStream_t s) {
    for (size_t at = 0; at + 8 <= n; at += 8) {
        uintptr_t word;
        memcpy(&word, (const char *)value + at, 8);
        if (word < 0x500000000000u || word > 0x7fffffffffffu) continue;
        if ((uint32_t)word < 65536) continue; /* a small int, and whatever fills the place beside it */
        if (msync((void *)(word & ~(uintptr_t)4095), 1, MS_ASYNC)) continue; /* nothing there: a number */
        LOCK;
        if (!find((const void *)word))
            fail("launch of %s: argument %d holds a pointer (%p, at byte %zu) to memory of the host", k, i, (void *)word, at);
        (void)s;
    }
}
static cudaError_t copy(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t st, const char *what) {
    if (!n) return cudaSuccess;
    {
        LOCK;
        if (k != cudaMemcpyDefault) {
            check_range(what, d, n, k == cudaMemcpyHostToDevice || k == cudaMemcpyDeviceToDevice);
            check_range(what, s, n, k == cudaMemcpyDeviceToHost || k == cudaMemcpyDeviceToDevice);
        }
    }
    submit(S(st), [=] {
        LOCK;
        Opened to(d), from(s);
        memmove(d, s, n);
    });
    return cudaSuccess;
}
namespace hc {
cudaError_t launch(const Launch &l, std::function<void()> body) {
    unsigned long t = (unsigned long)l.b.x * l.b.y * l.b.z;
    if (!t || t > 1024 || l.b.z > 64 || !l.g.x || !l.g.y || !l.g.z || l.g.y > 65535 || l.g.z > 65535 ||
        l.g.x > 0x7fffffffu)
        return err(cudaErrorInvalidConfiguration);
    if (l.smem > (size_t)cfg().smem_optin) return err(cudaErrorInvalidValue);
    if (l.coop && (unsigned long)l.g.x * l.g.y * l.g.z > (unsigned long)cfg().sms * 2)
        return err(cudaErrorCooperativeLaunchTooLarge);
    submit(S(l.s), [l, body] { run_launch(l, body); });
    return cudaSuccess;
}
} // namespace hc

// ---------------------------------------------------------------- runtime API
#define API extern "C" cudaError_t
API cudaGetDeviceCount(int *n) { /* as the runtime does, *n stays untouched when there is no driver for it */
    if (cfg().driver < 13000) return err(cudaErrorInsufficientDriver);
    *n = (int)cfg().devices;
    return cfg().devices ? cudaSuccess : err(cudaErrorNoDevice);
}
API cudaSetDevice(int d) {
    if (d < 0 || d >= cfg().devices) return err(cudaErrorInvalidDevice);
    cur_dev = d;
    return cudaSuccess;
}
API cudaGetDevice(int *d) {
    *d = cur_dev;
    return cudaSuccess;
}
API cudaGetDeviceProperties(cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    p->uuid.bytes[0] = (char)d;
    snprintf(p->name, sizeof p->name, "CUDA on the host");
    p->major = (int)cfg().major;
    p->minor = 0;
    p->warpSize = 32;
    p->multiProcessorCount = (int)cfg().sms;
    p->totalGlobalMem = (size_t)cfg().mem << 20;
    p->maxThreadsPerBlock = 1024;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = (size_t)cfg().smem_optin;
    p->cooperativeLaunch = 1;
    return cudaSuccess;
}
API cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
    switch (a) {
    case cudaDevAttrMultiProcessorCount:
        *v = (int)cfg().sms;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *v = (int)cfg().smem_optin;
        break;
    case cudaDevAttrL2CacheSize:
        *v = (int)cfg().cache << 10;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *v = (int)cfg().major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *v = 0;
        break;
    case cudaDevAttrCooperativeLaunch:
        *v = 1;
        break;
    default:
        return err(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
API cudaMemGetInfo(size_t *f, size_t *t) {
    LOCK;
    *t = (size_t)cfg().mem << 20;
    *f = *t - dev_used;
    return cudaSuccess;
}
API cudaMalloc(void **p, size_t n) { return hc_alloc(p, n, 'd'); }
API cudaHostAlloc(void **p, size_t n, unsigned) { return hc_alloc(p, n, 'p'); }
API cudaFree(void *p) {
    drain_all();
    return hc_free(p);
}
API cudaFreeHost(void *p) {
    drain_all();
    return hc_free(p);
}
API cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t st) {
    return copy(d, s, n, k, st, "cudaMemcpyAsync");
}
API cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t st) {
    if (!n) return cudaSuccess;
    {
        LOCK;
        check_range("cudaMemset", d, n, true);
    }
    submit(S(st), [=] {
        LOCK;
        Opened to(d);
        memset(d, v, n);
    });
    return cudaSuccess;
}
API cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) {
    LOCK;
    streams.emplace_back(new CUstream_st);
    *s = streams.back().get();
    (*s)->nonblocking = f & cudaStreamNonBlocking;
    (*s)->dev = cur_dev;
    return cudaSuccess;
}
API cudaStreamSynchronize(cudaStream_t s) {
    LOCK;
    if (S(s)->capture) return err(cudaErrorStreamCaptureUnsupported);
    drain(S(s), UINT64_MAX);
    return cudaSuccess;
}
API cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    LOCK;
    CUstream_st *x = S(s);
    if (x == legacy() || x->capture) return err(cudaErrorStreamCaptureUnsupported);
    x->capture.reset(new CUgraph_st);
    return cudaSuccess;
}
API cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus *status) {
    LOCK;
    *status = S(s)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    LOCK;
    *g = S(s)->capture.release();
    return *g ? cudaSuccess : err(cudaErrorInvalidValue);
}
API cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long) {
    *e = new CUgraphExec_st{g->work};
    return cudaSuccess;
}
API cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) {
    LOCK;
    for (auto &w : e->work) w.begin ? hc::enqueue_poll(s, w.begin) : submit(S(s), w.fn);
    return cudaSuccess;
}
API cudaGraphExecDestroy(cudaGraphExec_t e) { // what was launched keeps what it needs
    LOCK;
    delete e;
    return cudaSuccess;
}
API cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}
API cudaStreamQuery(cudaStream_t s) {
    LOCK;
    CUstream_st *x = S(s);
    if (x->done < x->issued) {
        auto &poll = x->q.front().poll;
        if (!poll) drain(x, x->done + 1);
        else if (poll()) poll = nullptr;
        return cudaErrorNotReady;
    }
    return cudaSuccess;
}
API cudaStreamDestroy(cudaStream_t s) {
    LOCK;
    drain(S(s), UINT64_MAX);
    s->dead = true;
    return cudaSuccess;
}
API cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *a) {
    submit(S(s), [=] { f(a); });
    return cudaSuccess;
}
API cudaDeviceSynchronize(void) {
    drain_all();
    return cudaSuccess;
}
API cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = new CUevent_st;
    return cudaSuccess;
}
API cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
API cudaEventDestroy(cudaEvent_t e) {
    if (e) {
        LOCK;
        if (e->s) drain(e->s, e->seq);
        delete e;
    }
    return cudaSuccess;
}
API cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    LOCK;
    CUstream_st *x = S(s);
    submit(x, [e] { e->t = now(); });
    e->s = x;
    e->seq = x->issued;
    return cudaSuccess;
}
API cudaEventSynchronize(cudaEvent_t e) {
    LOCK;
    if (e->s) drain(e->s, e->seq);
    return cudaSuccess;
}
API cudaEventQuery(cudaEvent_t e) {
    LOCK;
    if (e->s && e->s->done < e->seq) {
        drain(e->s, e->s->done + 1);
        return cudaErrorNotReady;
    }
    return cudaSuccess;
}
API cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = (float)((b->t - a->t) * 1e3);
    return cudaSuccess;
}
API cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    LOCK;
    CUstream_st *es = e->s;
    uint64_t q = e->seq;
    if (es) submit(S(s), [] {}, {{es, q}});
    return cudaSuccess;
}
API cudaGetLastError(void) {
    cudaError_t e = last_err;
    last_err = cudaSuccess;
    return e;
}
API cudaPeekAtLastError(void) { return last_err; }
extern "C" const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorNotReady:
        return "device not ready";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge:
        return "too many blocks in cooperative launch";
    default:
        return "CUDA error (on the host)";
    }
}
extern "C" const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
API cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaRuntimeGetVersion(int *v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaDriverGetVersion(int *v) {
    *v = (int)cfg().driver;
    return cudaSuccess;
}
