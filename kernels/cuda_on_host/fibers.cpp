/* fibers.cpp - CUDA threads as fibers: a block runs on one OS thread, its threads take turns.
 *
 * A thread runs until it waits: at a barrier, in a warp collective, at its end. Which one goes on is the lowest
 * (HC_SEED 0) or drawn, so every seed is another legal schedule. Shared memory is fresh, exact and poisoned for every
 * block. Under AddressSanitizer (HC_ASAN) stacks are announced; under ThreadSanitizer (HC_TSAN) every CUDA thread is
 * a fiber of its own that is ordered by barriers and __syncwarp alone, so races inside and across blocks show. HC_SEEN
 * names a file for the kernels that ran. What threads have under way by themselves is async.cpp's. This file itself must
 * not be instrumented. */
#include "async.h"
#include "inside.h"
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <fcntl.h>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <thread>
#include <string>
#include <unistd.h>
#include <vector>
#if defined(HC_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// ---------------------------------------------------------------- context switch
#if defined(__x86_64__) && !defined(HC_UCONTEXT)
extern "C" void hc_switch(void **save, void *load);
asm(".text\n.globl hc_switch\n.hidden hc_switch\n.type hc_switch,@function\nhc_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size hc_switch,.-hc_switch\n");
struct Ctx {
    void *sp = nullptr;
};
static void ctx_make(Ctx *c, char *lo, size_t n, void (*f)()) {
    void **sp = (void **)((uintptr_t)(lo + n) & ~(uintptr_t)15);
    *--sp = nullptr; // keeps the stack 16-byte aligned at the entry of f, and ends backtraces
    *--sp = (void *)f;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    c->sp = sp;
}
static inline void ctx_swap(Ctx *a, Ctx *b) { hc_switch(&a->sp, b->sp); }
#else
#include <ucontext.h>
struct Ctx {
    ucontext_t u;
};
static void ctx_make(Ctx *c, char *lo, size_t n, void (*f)()) {
    getcontext(&c->u);
    c->u.uc_stack.ss_sp = lo;
    c->u.uc_stack.ss_size = n;
    c->u.uc_link = nullptr;
    makecontext(&c->u, f, 0);
}
static inline void ctx_swap(Ctx *a, Ctx *b) { swapcontext(&a->u, &b->u); }
#endif

namespace hc {
struct Fiber {
    Pending pending;
    Ctx c;
    char *lo = nullptr;
    size_t n = 0;
    void *san = nullptr;
    Thread *start = nullptr;
    struct Runner *run = nullptr;
};
struct Warp {
    unsigned runnable, unstarted, alive, waiting;
    unsigned mask[32];
    CollFn fn[32];
    const void *in[32];
    void *out[32];
    int arg[32];
    unsigned par, seen[32]; // TSan: two tokens per lane in turn, and which were valid at the meeting
};
// two tokens, used in turn: a thread that runs ahead to the next barrier must not publish to those still leaving this
// one
struct Bar {
    int arrived, need, sum, res;
    bool live;
    unsigned wait[32], gen;
    Site site;
};
struct GridBar {
    std::mutex m;
    std::condition_variable cv;
    unsigned n = 0, in = 0, gen = 0;
    char tok[2];
};
struct Job {
    const Launch *l;
    const std::function<void()> *body;
    GridBar *gb = nullptr;
    Gates gates;
    std::atomic<unsigned long> next{0};
    unsigned long nblk = 0;
    char tok = 0;
};
Cfg &cfg() {
    static Cfg c;
    return c;
}
__thread Thread *cur;
thread_local const char *cur_kernel = "(none)";
#ifdef HC_TSAN
static std::atomic<unsigned> fibers_alive{0};
#endif

void fail(const char *fmt, ...) {
    fflush(stdout);
    fprintf(stderr, "hc: kernel %s", cur_kernel);
    if (cur)
        fprintf(stderr, ", block (%u,%u,%u), thread (%u,%u,%u)", cur->blk->bid.x, cur->blk->bid.y, cur->blk->bid.z,
                cur->tid.x, cur->tid.y, cur->tid.z);
    fprintf(stderr, ": ");
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\n");
    abort();
}

// ---------------------------------------------------------------- one block on one OS thread
struct Runner {
    Fiber main;
    std::vector<Fiber *> all;
    std::vector<Thread> th;
    Fiber *idle[1024];
    unsigned n_idle = 0; // plain array: no library calls, TSan would see those
    Warp w[32];
    Block blk;
    Bar bar[17];
    unsigned ready = 0;
    int alive = 0;
    uint64_t rng = 1;
    Job *job = nullptr;
    char tok_begin = 0, tok_end = 0;
    void *janitor = nullptr;
    // TSan: an identity costs more than all that a small block does, so blocks share some sets of them. Two blocks of
    // one set count as ordered, blocks in turn never have the same one, and which it is, is drawn: a race shows between
    // most pairs of blocks. Launches are ordered by the host anyway.
    static const unsigned SETS = 3, KEPT = 3000; // KEPT: fibers of all OS threads, nearly 1 MB each
    std::vector<Fiber *> set[SETS];
    unsigned turn = 0;
    char *tk =
        nullptr; // TSan: tokens of the block's barriers and warps, new for every block (old ones carry the past)
    char *btok(int id, unsigned gen) { return tk + id * 2 + (gen & 1); }
    char *wtok(int w_, int lane, unsigned par) { return tk + 64 + w_ * 64 + lane * 2 + (par & 1); }
    struct Static {
        const void *key;
        void *p;
    };
    std::vector<Static> statics; // SHARED_ARRAY storage of the block
    size_t fixed = 0;            // and its bytes
    std::vector<Thread *> asleep; // threads that wait at gates
    unsigned long seen = 0;       // events of the gates when they were last woken

    Runner() {
        all.reserve(2048);
        th.reserve(1024);
#ifdef HC_TSAN
        main.san = __tsan_get_current_fiber();
        janitor = __tsan_create_fiber(0);
#endif
    }
    ~Runner() {
#ifdef HC_TSAN
        return; // leave the fibers alone: freeing them here would look like a race
#endif
        for (Fiber *f : all) {
            munmap(f->lo - 4096, f->n + 4096);
            delete f;
        }
    }
    void jump(Fiber *from, Fiber *to) {
#if defined(HC_ASAN)
        void *fake;
        __sanitizer_start_switch_fiber(&fake, to->lo, to->n);
        ctx_swap(&from->c, &to->c);
        const void *b;
        size_t n;
        __sanitizer_finish_switch_fiber(fake, &b, &n);
#elif defined(HC_TSAN)
        __tsan_switch_to_fiber(to->san, 1 /* no synchronisation: barriers below give the only ordering */);
        ctx_swap(&from->c, &to->c);
#else
        ctx_swap(&from->c, &to->c);
#endif
    }
    static void entry();
    void put_idle(Fiber *f) { idle[n_idle++] = f; }
    Fiber *get_fiber() {
        if (n_idle) return idle[--n_idle];
        return make_fiber();
    }
#ifdef HC_TSAN
    static void drop(std::vector<Fiber *> &some) {
        for (Fiber *f : some) {
            __tsan_destroy_fiber(f->san);
            munmap(f->lo - 4096, f->n + 4096); // clears TSan's memory of the stack, too
            delete f;
        }
        fibers_alive -= (unsigned)some.size();
        some.clear();
    }
#endif
    Fiber *make_fiber() {
        Fiber *f = new Fiber;
        f->n = (size_t)cfg().stack * 1024;
        f->run = this;
        char *p = (char *)mmap(nullptr, f->n + 4096, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fail("no memory for a fiber stack");
        mprotect(p, 4096, PROT_NONE);
        f->lo = p + 4096;
        ctx_make(&f->c, f->lo, f->n, entry);
#ifdef HC_TSAN
        f->san = __tsan_create_fiber(0);
        fibers_alive++;
#else
        all.push_back(f);
#endif
        return f;
    }
    unsigned rnd() {
        rng ^= rng << 13;
        rng ^= rng >> 7;
        rng ^= rng << 17;
        return (unsigned)(rng >> 32);
    }
    static int pick_bit(unsigned m, unsigned r) {
        for (r %= __builtin_popcount(m); r--;) m &= m - 1;
        return __builtin_ctz(m);
    }
    // next thread to run, its state bit already cleared; null when nothing can run
    Thread *pick(int wi, bool *fresh) {
        int l;
        long seed = cfg().seed;
        if (seed) {
            if (!ready) return nullptr;
            wi = pick_bit(ready, rnd());
            l = pick_bit(w[wi].runnable | w[wi].unstarted, rnd());
        } else {
            if (!(ready >> wi & 1)) {
                if (!ready) return nullptr;
                wi = __builtin_ctz(ready);
            }
            l = __builtin_ctz(w[wi].runnable ? w[wi].runnable : w[wi].unstarted);
        }
        Warp &x = w[wi];
        unsigned b = 1u << l;
        *fresh = !(x.runnable & b);
        x.runnable &= ~b;
        x.unstarted &= ~b;
        if (!(x.runnable | x.unstarted)) ready &= ~(1u << wi);
        return &th[wi * 32 + l];
    }
    // as pick; when nothing else can run, threads at gates look again, once something has happened there
    Thread *pick_or_wake(int wi, bool *fresh) {
        Thread *t = pick(wi, fresh);
        if (t || asleep.empty()) return t;
        Gates &g = job->gates;
        std::unique_lock<std::mutex> k(g.m);
        auto news = [&] { return g.events != seen; };
        if (!news() && (!job->gb || !g.cv.wait_for(k, std::chrono::seconds(10), news))) {
            cur = asleep[0];
            describe_gates(g, Site{cur->file, cur->line});
        }
        seen = g.events;
        k.unlock();
        for (Thread *a : asleep) wake(a->warp, 1u << a->lane);
        asleep.clear();
        return pick(wi, fresh);
    }
    void wake(int wi, unsigned lanes) {
        w[wi].runnable |= lanes;
        if (lanes) ready |= 1u << wi;
    }
    [[noreturn]] void deadlock() {
        fprintf(stderr, "hc: kernel %s, block (%u,%u,%u): deadlock, no thread can go on; waiting threads:\n",
                cur_kernel, blk.bid.x, blk.bid.y, blk.bid.z);
        int shown = 0;
        for (auto &t : th)
            if ((w[t.warp].alive >> t.lane & 1) && shown++ < 12)
                fprintf(stderr, "  thread (%u,%u,%u) at %s:%d%s\n", t.tid.x, t.tid.y, t.tid.z, t.file, t.line,
                        w[t.warp].waiting >> t.lane & 1 ? " (warp collective)" : " (barrier)");
        fprintf(stderr, "  %d live of %zu\n", alive, th.size());
        abort();
    }
    void suspend(Site s) { // current thread waits until someone wakes it
        Thread *t = cur;
        t->file = s.file;
        t->line = s.line;
        bool fresh;
        Thread *n = pick_or_wake(t->warp, &fresh);
        if (!n) deadlock();
        if (n == t) return;
        if (fresh) {
            n->fib = get_fiber();
            n->fib->start = n;
        }
        Fiber *to = n->fib;
        cur = n;
        jump(t->fib, to);
        cur = t;
    }
    void fiber_loop(Fiber *f) {
#ifdef HC_ASAN
        const void *b;
        size_t bytes;
        __sanitizer_finish_switch_fiber(nullptr, &b, &bytes);
        if (!main.lo) {
            main.lo = (char *)b;
            main.n = bytes;
        }
#endif
        for (;;) {
            Thread *t = f->start;
            t->fib = f;
            cur = t;
            ACQ(&tok_begin);
            (*job->body)();
            end_thread(f->pending);
            REL(&tok_end);
            Warp &x = w[t->warp];
            x.alive &= ~(1u << t->lane);
            alive--;
            for (int i = 0; i < 16; i++)
                if (bar[i].arrived && bar[i].live && bar[i].arrived == alive) release(i);
            if (x.waiting) {
                unsigned ws = x.waiting;
                HC_LANES(l, ws) if (x.waiting >> l & 1) try_complete(t->warp, l);
            }
            bool fresh;
            Thread *n = pick_or_wake(t->warp, &fresh);
            if (!n) {
                if (alive) deadlock();
                put_idle(f);
                cur = nullptr;
                jump(f, &main);
                continue;
            }
#ifndef HC_TSAN // for TSan every CUDA thread of a block keeps a fiber (an identity) of its own
            if (fresh) {
                f->start = n;
                continue;
            }
            put_idle(f);
#else
            if (fresh) {
                n->fib = get_fiber();
                n->fib->start = n;
            }
#endif
            cur = n;
            jump(f, n->fib);
        }
    }
    void release(int i) {
        Bar &b = bar[i];
        b.res = b.sum;
        b.arrived = 0;
        b.sum = 0;
        b.gen++;
        for (int k = 0; k < 32; k++)
            if (b.wait[k]) {
                wake(k, b.wait[k]);
                b.wait[k] = 0;
            }
    }
    // lane l of warp wi waits in a collective: run it when every live lane of its mask is there
    bool try_complete(int wi, int l) {
        Warp &x = w[wi];
        unsigned m = x.mask[l] & x.alive;
        if ((x.waiting & m) != m) return false;
        HC_LANES(k, m)
        if (x.mask[k] != x.mask[l] || x.fn[k] != x.fn[l])
            fail("warp %d: lanes %d and %d meet in different collectives or with different masks (%08x, %08x)", wi, l,
                 k, x.mask[l], x.mask[k]);
        x.fn[l](m, x.in, x.out, x.arg);
        HC_LANES(k, m) x.seen[k] = x.par;
        x.waiting &= ~m;
        wake(wi, m);
        return true;
    }
    void run_block(Job *j, unsigned long i) {
        job = j;
        const Launch &L = *j->l;
        cur_kernel = L.name;
        unsigned n = L.b.x * L.b.y * L.b.z, nw = (n + 31) / 32;
        blk.gdim = L.g;
        blk.bdim = L.b;
        blk.bid = {(unsigned)(i % L.g.x), (unsigned)(i / L.g.x % L.g.y),
                   (unsigned)(i / ((unsigned long)L.g.x * L.g.y))};
        // fresh allocation of the exact size: sanitizers see the bounds; poisoned so that reads before writes show
        blk.dsmem_bytes = L.smem;
        blk.dsmem = nullptr;
        if (L.smem) {
            if (posix_memalign(&blk.dsmem, 1024, L.smem)) fail("no memory");
            memset(blk.dsmem, 0xff, L.smem);
        }
        th.resize(n);
        asleep.reserve(n); // by no CUDA thread: ThreadSanitizer takes the heap's bookkeeping for theirs
        for (unsigned t = 0; t < n; t++)
            th[t] = Thread{
                {t % L.b.x, t / L.b.x % L.b.y, t / (L.b.x * L.b.y)}, t % 32, t / 32, t, &blk, nullptr, "start", 0};
        memset(bar, 0, sizeof bar);
        for (unsigned k = 0; k < nw; k++) {
            unsigned lanes = k == nw - 1 && n % 32 ? (1u << n % 32) - 1 : 0xffffffffu;
            w[k].runnable = w[k].waiting = 0;
            w[k].unstarted = w[k].alive = lanes;
        }
        ready = nw == 32 ? 0xffffffffu : (1u << nw) - 1;
        alive = (int)n;
        rng = (uint64_t)cfg().seed * 0x9E3779B97F4A7C15ull + i * 0xD1B54A32D192ED03ull + 1;
#ifdef HC_TSAN // made here, by `main`: a fiber made by a CUDA thread would count as ordered after that thread
        std::vector<Fiber *> &mine = set[job->gb ? 0 : turn]; // blocks that live at once have OS threads of their own
        while (mine.size() < n) mine.push_back(make_fiber());
        for (n_idle = 0; n_idle < n; n_idle++) idle[n_idle] = mine[n_idle];
        tk = (char *)malloc(64 + 32 * 64);
#endif
        bool fresh;
        Thread *t = pick(0, &fresh);
        t->fib = get_fiber();
        t->fib->start = t;
        REL(&tok_begin);
        cur = t;
        jump(&main, t->fib);
        end_block(job->gates, &blk);
        // TSan: the block's memory is freed in a context of its own, so that `main` learns nothing of this block's
        // threads and the next block stays unordered to it (races between blocks show, also on one OS thread)
#ifdef HC_TSAN
        __tsan_switch_to_fiber(janitor, 1);
        ACQ(&tok_end);
#endif
        free(blk.dsmem);
        for (auto &x : statics) free(x.p);
#ifdef HC_TSAN
        free(tk);
        if (fibers_alive > KEPT) drop(mine);
        turn = (turn + 1 + rnd() % (SETS - 1)) % SETS;
        __tsan_switch_to_fiber(main.san, 1);
#endif
        statics.clear();
        fixed = 0;
    }
};
// on the heap: the TLS of this library must stay tiny (initial-exec `cur` puts all of it into the static TLS block)
static Runner &runner() {
    static thread_local std::unique_ptr<Runner> r;
    if (!r) r.reset(new Runner);
    return *r;
}
void Runner::entry() {
    Fiber *f = cur->fib;
    f->run->fiber_loop(f);
}

int barrier(int id, int count, BarOp op, int pred, Site s) {
    if (!cur) fail("%s:%d: barrier outside a kernel", s.file, s.line);
    Runner *r = cur->fib->run;
    Bar &b = r->bar[id];
    if (b.arrived && (b.site.line != s.line || strcmp(b.site.file, s.file)))
        fail("divergent barrier: this thread is at %s:%d, others of its block wait at %s:%d", s.file, s.line,
             b.site.file, b.site.line);
    b.site = s;
    b.live = count < 0;
    b.need = count;
    b.sum += op == BAR_AND ? !pred : pred;
    unsigned bg = b.gen;
    (void)bg;
    REL(r->btok(id, bg));
    if (++b.arrived == (count < 0 ? r->alive : count)) {
        if (id == 16) { // grid barrier: the last thread of the block waits for the other blocks
            GridBar *g = r->job->gb;
            if (!g) fail("%s:%d: grid barrier in a launch that is not cooperative", s.file, s.line);
            std::unique_lock<std::mutex> k(g->m);
            unsigned gen = g->gen;
            ACQ(r->btok(id, bg));
            REL(&g->tok[gen & 1]);
            if (++g->in == g->n) {
                g->in = 0;
                g->gen++;
                g->cv.notify_all();
            } else
                g->cv.wait(k, [&] { return g->gen != gen; });
            ACQ(&g->tok[gen & 1]);
            REL(r->btok(id, bg));
        }
        r->release(id);
    } else {
        b.wait[cur->warp] |= 1u << cur->lane;
        r->suspend(s);
    }
    ACQ(r->btok(id, bg));
    return op == BAR_AND ? b.res == 0 : op == BAR_OR ? b.res != 0 : b.res;
}
Pending &pending() { return cur->fib->pending; }
Gates &gates() { return cur->fib->run->job->gates; }
const Block &block() { return cur->fib->run->blk; }
void each_pending(void (*f)(Pending &, const void *), const void *arg) {
    for (Thread &t : cur->fib->run->th)
        if (t.fib && t.fib->start == &t) f(t.fib->pending, arg);
}
void sleep_at_gate(Site s) {
    cur->fib->run->asleep.push_back(cur);
    cur->fib->run->suspend(s);
}
void *shared_mem(const void *key, size_t n, size_t align) {
    Runner *r = cur->fib->run;
    for (auto &x : r->statics)
        if (x.key == key) {
            ACQ(x.p);
            return x.p;
        }
    void *p;
    if (posix_memalign(&p, align < 16 ? 16 : align, n)) fail("no memory");
    memset(p, 0xff, n);
    r->statics.push_back({key, p});
    // as a GPU has it: launch() of cuda.cuh asks for leave from 32 KB of dynamic shared memory on
    const size_t dynamic = r->blk.dsmem_bytes, both = dynamic + (r->fixed += n);
    if (both > (dynamic > 32 * 1024 ? 227 * 1024 : 48 * 1024))
        fail("%zu bytes of dynamic and %zu of static shared memory", dynamic, r->fixed);
    REL(p);
    return p;
}
void grid_barrier(Site s) { barrier(16, -1, BAR_PLAIN, 0, s); }
void yield(Site s) {
    Runner *r = cur->fib->run;
    r->wake(cur->warp, 1u << cur->lane);
    r->suspend(s);
    sched_yield();
}

unsigned collective(unsigned mask, CollFn fn, const void *in, void *out, int arg, bool memsync, Site s) {
    Thread *t = cur;
    Runner *r = t->fib->run;
    Warp &x = r->w[t->warp];
    unsigned b = 1u << t->lane;
    if (!(mask & b))
        fail("%s:%d: lane %u calls a warp collective whose mask %08x leaves it out", s.file, s.line, t->lane, mask);
    if (memsync) {
        x.par ^= b;
        REL(r->wtok(t->warp, t->lane, x.par >> t->lane));
    }
    x.mask[t->lane] = mask;
    x.fn[t->lane] = fn;
    x.in[t->lane] = in;
    x.out[t->lane] = out;
    x.arg[t->lane] = arg;
    x.waiting |= b;
    if (!r->try_complete(t->warp, t->lane))
        r->suspend(s);
    else {
        x.runnable &= ~b;
        if (!(x.runnable | x.unstarted)) r->ready &= ~(1u << t->warp);
    } // the last one goes straight on
    if (memsync) {
        unsigned p = x.seen[t->lane];
        HC_LANES(k, mask) ACQ(r->wtok(t->warp, k, p >> k));
        (void)p;
    }
    return mask;
}

// ---------------------------------------------------------------- launches: blocks over OS threads
struct Pool {
    std::mutex m;
    std::condition_variable cv, done;
    std::vector<std::thread> t;
    Job *job = nullptr;
    unsigned gen = 0, busy = 0, limit = 0;
    bool quit = false;
    static void work(Job *j) {
        ACQ(&j->tok);
        for (unsigned long i; (i = j->next.fetch_add(1)) < j->nblk;)
            runner().run_block(j, cfg().seed & 1 ? j->nblk - 1 - i : i);
        ACQ(&runner().tok_end);
        REL(&j->tok);
    }
    void loop(unsigned me) {
        for (unsigned seen = 0;;) {
            Job *j;
            {
                std::unique_lock<std::mutex> k(m);
                cv.wait(k, [&] { return quit || (job && gen != seen && me < limit); });
                if (quit) return;
                seen = gen;
                j = job;
                busy++;
            }
            work(j);
            {
                std::lock_guard<std::mutex> k(m);
                busy--;
            }
            done.notify_one();
        }
    }
    void run(Job *j, unsigned nw) {
        if (nw > 1 && j->nblk > 1) {
            while (t.size() < nw - 1) {
                unsigned me = (unsigned)t.size();
                t.emplace_back([this, me] { loop(me); });
            }
            {
                std::lock_guard<std::mutex> k(m);
                job = j;
                limit = nw - 1;
                gen++;
            }
            cv.notify_all();
            work(j);
            std::unique_lock<std::mutex> k(m);
            job = nullptr;
            done.wait(k, [&] { return busy == 0; });
        } else
            work(j);
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> k(m);
            quit = true;
        }
        cv.notify_all();
        for (auto &x : t) x.join();
    }
};
static Pool &pool() {
    static Pool p;
    return p;
}
// HC_SEEN: a line for every kernel that runs, as its launch names it (tests/seen.sh)
static void note(const char *kernel) {
    static const char *path = getenv("HC_SEEN");
    if (!path) return;
    static std::mutex m;
    static std::unordered_set<std::string> noted;
    std::lock_guard<std::mutex> k(m);
    if (!noted.insert(kernel).second) return;
    const std::string line = std::string(kernel) + "\n"; // one write: many processes may share the file
    const int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (file < 0 || write(file, line.data(), line.size()) != (ssize_t)line.size()) fail("HC_SEEN: %s cannot be written", path);
    close(file);
}
void run_launch(const Launch &l, const std::function<void()> &body) {
    note(l.name);
    Job j;
    j.l = &l;
    j.body = &body;
    j.nblk = (unsigned long)l.g.x * l.g.y * l.g.z;
    protect(true);
    REL(&j.tok);
    GridBar gb;
    gb.n = (unsigned)j.nblk;
    unsigned nw = cfg().workers ? (unsigned)cfg().workers : std::thread::hardware_concurrency();
    if (l.coop) {
        j.gb = &gb;
        nw = gb.n;
    } // all blocks live at once, each on an OS thread of its own
    pool().run(&j, nw);
    ACQ(&j.tok);
    protect(false);
}
} // namespace hc
