/* threads.c - the pool behind exc_queue.parallel on the CPU.
 *
 * An op is a list of tasks taken from one atomic counter. Decode steps of small models run hundreds of ops of a few
 * microseconds each, so an op must cost little more than its tasks: workers spin for some tens of microseconds after an op
 * before they sleep on a futex-backed condition, the calling thread works too (worker 0), and it waits only for workers that
 * are inside the op. One that is still waking up (50 us where the core is taken by someone else) finds the
 * op closed and goes back to waiting; its share has been done by the others. While nothing runs the pool costs nothing.
 * Results never depend on which worker took a task (queue.h). */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "base.h"

#define SPINS 20000 /* about 50 us of pause instructions */

typedef struct pool {
    exc_task_fn fn;
    void *arg;
    size_t tasks;
    _Atomic size_t next;      /* next task to take */
    _Atomic int open;         /* an op is running and may be joined */
    _Atomic int inside;       /* workers that look at the current op */
    _Atomic uint64_t round;   /* op number; workers wait for it to change */
    _Atomic int sleeping;     /* workers on the condition */
    _Atomic int quit;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t *threads;       /* [workers - 1] */
    int started;
    struct seat { struct pool *pool; int worker; } *seats;
} pool;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    sched_yield();
#endif
}

static void take(pool *p, int worker)
{
    for (;;) {
        size_t task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (task >= p->tasks) return;
        p->fn(p->arg, task, worker);
    }
}

/* A worker's part in an op. Sequentially consistent on inside and open: either the worker sees that the op is closed, or the
 * caller sees that the worker is inside and waits, so fn, arg and tasks stay what they are while anyone reads them. */
static void join(pool *p, int worker)
{
    atomic_fetch_add(&p->inside, 1);
    if (atomic_load(&p->open)) take(p, worker);
    atomic_fetch_sub(&p->inside, 1);
}

static void *work(void *arg)
{
    struct seat *seat = arg;
    pool *p = seat->pool;
    uint64_t seen = 0;
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&p->round, memory_order_acquire) == seen && spins < SPINS) {
            relax();
            spins++;
        }
        if (atomic_load(&p->round) == seen) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->sleeping, 1);
            while (atomic_load(&p->round) == seen) pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->sleeping, 1);
            pthread_mutex_unlock(&p->lock);
        }
        seen = atomic_load_explicit(&p->round, memory_order_acquire);
        if (atomic_load(&p->quit)) return NULL;
        join(p, seat->worker);
    }
}

/* A new round: publish, wake the sleepers. Sequentially consistent on round and sleeping, so that a worker either sees the
 * new round before it sleeps or is counted as sleeping here. */
static void announce(pool *p)
{
    atomic_fetch_add(&p->round, 1);
    if (atomic_load(&p->sleeping)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
}

static void parallel(exc_queue *q, size_t tasks, exc_task_fn fn, void *arg)
{
    pool *p = q->pool;
    if (tasks <= 1 || q->workers == 1) {
        for (size_t i = 0; i < tasks; i++) fn(arg, i, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->tasks = tasks;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store(&p->open, 1);
    announce(p);
    take(p, 0);
    atomic_store(&p->open, 0);
    int spins = 0;
    while (atomic_load(&p->inside) > 0) {
        /* on an oversubscribed machine the other worker may have lost its core: let it run */
        if (++spins < SPINS) relax();
        else sched_yield();
    }
}

static int usable_cores(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

exc_status exc_queue_open(exc_ctx *ctx, int threads)
{
    exc_queue *q = &ctx->queue;
    if (threads < 0 || threads > 1024)
        return exc_fail(ctx, EXC_ERR_USAGE, "threads: expected 0 (all cores) to 1024, found %d", threads);
    if (!threads) threads = usable_cores();
    pool *p = exc_zalloc(ctx, 1, sizeof *p, "thread pool");
    if (!p) return EXC_ERR_MEMORY;
    q->pool = p;
    q->parallel = parallel;
    q->workers = threads;
    q->scratch_bytes = EXC_SCRATCH_BYTES;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->threads = exc_zalloc(ctx, (size_t)threads, sizeof *p->threads, "threads");
    p->seats = exc_zalloc(ctx, (size_t)threads, sizeof *p->seats, "threads");
    q->scratch = exc_zalloc(ctx, (size_t)threads, sizeof *q->scratch, "scratch");
    if (!p->threads || !p->seats || !q->scratch) return EXC_ERR_MEMORY;
    for (int i = 0; i < threads; i++)
        if (!(q->scratch[i] = exc_alloc(ctx, EXC_SCRATCH_BYTES, 1, "scratch"))) return EXC_ERR_MEMORY;
    /* signals belong to the caller's threads */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    exc_status st = EXC_OK;
    for (int i = 0; i < threads - 1 && st == EXC_OK; i++) {
        p->seats[i] = (struct seat){p, i + 1};
        int rc = pthread_create(&p->threads[i], NULL, work, &p->seats[i]);
        if (rc) {
            errno = rc;
            exc_fail_errno(ctx, "starting thread %d of %d", i + 1, threads);
            st = EXC_ERR_MEMORY;
        } else {
            p->started++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return st;
}

void exc_queue_close(exc_ctx *ctx)
{
    exc_queue *q = &ctx->queue;
    pool *p = q->pool;
    if (p) {
        atomic_store(&p->quit, 1);
        announce(p);
        for (int i = 0; i < p->started; i++) pthread_join(p->threads[i], NULL);
        pthread_mutex_destroy(&p->lock);
        pthread_cond_destroy(&p->wake);
        exc_release(p->threads);
        exc_release(p->seats);
        exc_release(p);
    }
    if (q->scratch)
        for (int i = 0; i < q->workers; i++) exc_release(q->scratch[i]);
    exc_release(q->scratch);
    q->scratch = NULL;
    q->pool = NULL;
}
