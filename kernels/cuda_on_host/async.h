/* async.h - what fibers.cpp and async.cpp share: what a CUDA thread has under way (copies, bulk stores, products of four
 * warps), the gates of a launch, and the words for ThreadSanitizer. */
#ifndef EXC_CUDA_ASYNC_H
#define EXC_CUDA_ASYNC_H

#include "device.h"
#include <condition_variable>
#include <deque>
#include <mutex>
#include <unordered_set>
#include <vector>

#ifdef HC_TSAN
extern "C" {
void *__tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void *);
void *__tsan_get_current_fiber(void);
void __tsan_switch_to_fiber(void *, unsigned);
void __tsan_acquire(void *);
void __tsan_release(void *);
}
#define ACQ(p) __tsan_acquire((void *)(p))
#define REL(p) __tsan_release((void *)(p))
#else
#define ACQ(p) ((void)0)
#define REL(p) ((void)0)
#endif

namespace hc {
struct Async {
    void *d;
    const void *s;
    int n, group; /* bytes, the rest of 16 is zeroed */
};
struct Store { // a bulk store: global, shared, and what was read of it
    void *d;
    const void *s;
    unsigned n;
    int group;
    std::vector<char> read;
};
struct Product { // of four warps: operands by descriptor, this lane's sums
    uint64_t a, b;
    float *d;
    int n, group;
};
struct Pending { // of one thread
    std::vector<Async> copies;
    int groups = 0; // committed so far
    std::vector<Store> stores;
    int store_groups = 0;
    std::vector<Product> products;
    int product_groups = 0;
    bool fenced = false;  // bulk_fence since the last bulk_commit
    bool ordered = false; // group_fence since registers were last touched
    bool plain = false;   // cp.async has written since the last bulk_fence
};
struct Move { // bytes on the way to shared memory
    void *d;
    const void *s; // null: the value
    unsigned n;
    float value;
};
struct Gate { // an mbarrier: arrivals and bytes of the phase under way
    const void *block; // null: it has ended
    int arrivals, left;
    unsigned long long announced, under_way;
    unsigned phase;
    std::vector<Move> moves;
    char tok;
};
// gates of a launch; `events` counts what may let a waiting thread go on
struct Gates {
    std::mutex m;
    std::condition_variable cv;
    std::deque<Gate> all;
    std::unordered_set<unsigned long long> known; // their addresses
    unsigned long events = 0;
    void happened() {
        events++;
        cv.notify_all();
    }
};

/* async.cpp */
void end_thread(Pending &p);
void end_block(Gates &g, const void *block);
[[noreturn]] void describe_gates(Gates &g, Site s);
/* fibers.cpp: of the thread that runs */
Pending &pending();
Gates &gates();
const Block &block();
void each_pending(void (*f)(Pending &, const void *), const void *arg); // of its block
void sleep_at_gate(Site s); // until something has happened at the launch's gates
} // namespace hc

#endif
