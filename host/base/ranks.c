/* ranks.c - the communicator over a transport: announcements, sums in rank order, pieces of any size.
 *
 * A context without ranks is rank 0 of 1 and every call here is a plain copy or nothing at all, so that callers have
 * one way to write their loops. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base.h"
#include "ranks.h"

#define PIECE ((size_t)64 << 20) /* bytes to one peer in one round */
#define SECONDS 300.0            /* an exchange may take this long, unless EXCISE_RANK_SECONDS says otherwise */

/* What a rank says before bytes move: this head, then how many bytes it will send to each rank. */
typedef struct announcement {
    uint64_t turn; /* number of this exchange */
    uint64_t same; /* must be equal on all ranks: a size, or the hash of what they agree on */
    char what[48];
} announcement;

struct exc_ranks {
    const exc_transport *t;
    int rank, size;
    uint64_t turn;
    size_t said;   /* bytes of an announcement with its counts */
    uint8_t *mine, *all; /* one, and [size] of them */
    size_t *bytes; /* [6, size] of one round and of one kind of rows */
    exc_nccl *nccl; /* between GPUs; NULL on the CPU */
    bool met;       /* by a file: the sockets are this context's */
};

int exc_ranks_me(const exc_ctx *ctx) { return ctx->ranks ? ctx->ranks->rank : 0; }

int exc_ranks_count(const exc_ctx *ctx) { return ctx->ranks ? ctx->ranks->size : 1; }

void exc_ctx_rank(const exc_ctx *ctx, int *rank, int *ranks) {
    *rank = exc_ranks_me(ctx);
    *ranks = exc_ranks_count(ctx);
}

void exc_share(int64_t n, int rank, int size, int64_t *first, int64_t *end) {
    *first = n * rank / size;
    *end = n * (rank + 1) / size;
}

/* ------------------------------------------------------------------------------------------------------------ opening */

static double time_limit(void) {
    const char *s = getenv("EXCISE_RANK_SECONDS");
    double v = s ? strtod(s, NULL) : 0;
    return v > 0 ? v : SECONDS;
}

/* What launchers tell the processes they start: number, how many, how many on this machine. Those of one process, too. */
typedef struct launcher {
    const char *rank, *ranks, *neighbours;
} launcher;
static const launcher launchers[] = {
    {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}, /* torchrun, or anybody: the innermost, and for a rendezvous only, as it starts no MPI */
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"},
    {"PMIX_RANK", "PMIX_SIZE", "MPI_LOCALNRANKS"},
    {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"},
};

static long number(const char *name) {
    const char *s = getenv(name);
    char *end;
    long v = s ? strtol(s, &end, 10) : -1;
    return s && *s && !*end ? v : -1;
}

/* number of ranks that a launcher with MPI started, 1 when none did */
static long launched(void) {
    for (size_t i = 1; i < EXC_COUNT(launchers); i++)
        if (number(launchers[i].ranks) > 1) return number(launchers[i].ranks);
    return 1;
}

int exc_ranks_near(const exc_ctx *ctx) {
    int ranks = exc_ranks_count(ctx);
    if (ranks == 1 || (ctx->ranks->t == &exc_sockets && !ctx->ranks->met)) return ranks; /* our own launcher's */
    for (size_t i = ctx->ranks->met ? 0 : 1; i < EXC_COUNT(launchers); i++) {
        long n = number(launchers[i].neighbours);
        if (n > 0 && n <= ranks) return (int)n;
    }
    return ranks;
}

static exc_status allocate(exc_ctx *ctx, const exc_transport *t, int rank, int size) {
    exc_ranks *r = exc_zalloc(ctx, 1, sizeof *r, "ranks");
    if (!r) return EXC_ERR_MEMORY;
    ctx->ranks = r;
    r->t = t;
    r->rank = rank;
    r->size = size;
    r->said = sizeof(announcement) + (size_t)size * sizeof(uint64_t);
    r->mine = exc_zalloc(ctx, 1, r->said, "ranks");
    r->all = exc_zalloc(ctx, (size_t)size, r->said, "ranks");
    r->bytes = exc_zalloc(ctx, (size_t)size * 6, sizeof *r->bytes, "ranks");
    return r->mine && r->all && r->bytes ? EXC_OK : EXC_ERR_MEMORY;
}

static exc_status open_mpi(exc_ctx *ctx, long n, const exc_transport **t) {
    char why[512];
    void *module = exc_library_open("libexcise_mpi.so", "EXCISE_MPI_MODULE", why, sizeof why);
    if (!module)
        return exc_fail(ctx, EXC_ERR_DEVICE, "ranks: %ld processes were launched, but the MPI module cannot be used: %s (a rendezvous needs none)", n, why);
    exc_transport_fn get = NULL;
    void *symbol = dlsym(module, EXC_TRANSPORT_SYMBOL);
    memcpy(&get, &symbol, sizeof get);
    *t = get ? get() : NULL;
    if (*t && (*t)->version == EXC_TRANSPORT_VERSION) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_DEVICE, "ranks: the MPI module is of another version of Excise");
}

static exc_status meet_at(exc_ctx *ctx, const char *path) {
    long rank = -1, n = -1;
    for (size_t i = 0; i < EXC_COUNT(launchers) && (rank < 0 || n < 1); i++) {
        rank = number(launchers[i].rank);
        n = number(launchers[i].ranks);
    }
    if (rank < 0 || n < 1)
        return exc_fail(ctx, EXC_ERR_USAGE, "rendezvous: expected this process's number in RANK and how many there are in WORLD_SIZE, or a launcher "
                                            "that says so (srun, mpirun, torchrun), found neither");
    if (rank >= n || n > EXC_RANKS_MOST)
        return exc_fail(ctx, EXC_ERR_USAGE, "rendezvous: expected at most %d ranks, numbered from 0, found rank %ld of %ld", EXC_RANKS_MOST, rank, n);
    if (!*path) return exc_fail(ctx, EXC_ERR_USAGE, "rendezvous: expected the path of a file, found none");
    if (n == 1) return EXC_OK;
    if (exc_sockets_taken()) return exc_fail(ctx, EXC_ERR_USAGE, "rendezvous: expected one context of a process that meets other ranks, found a second");
    int file[EXC_RANKS_MOST];
    EXC_TRY(exc_rendezvous(ctx, path, (int)rank, (int)n, time_limit(), file));
    exc_sockets_use((int)rank, (int)n, file, time_limit());
    exc_status st = allocate(ctx, &exc_sockets, (int)rank, (int)n);
    if (ctx->ranks) ctx->ranks->met = true;
    else exc_sockets_part();
    return st;
}

exc_status exc_ranks_open(exc_ctx *ctx, const char *how) {
    bool must = how && !strcmp(how, "mpi");
    if (!how || !strcmp(how, "none")) return EXC_OK;
    if (!strncmp(how, "file:", 5)) return meet_at(ctx, how + 5);
    if (!must && strcmp(how, "auto"))
        return exc_fail(ctx, EXC_ERR_USAGE, "ranks: expected auto, mpi, none or file:PATH, found %s", exc_show(how, strlen(how)));
    const exc_transport *t = !must && getenv(EXC_RANK_SOCKETS) ? &exc_sockets : NULL;
    long n = launched();
    if (!must && !t && n == 1) return EXC_OK;
    if (!t) EXC_TRY(open_mpi(ctx, n, &t));
    int rank = 0, size = 1;
    const char *bad = t->join(&rank, &size, time_limit());
    if (bad) return exc_fail(ctx, EXC_ERR_DEVICE, "ranks: %s", bad);
    /* a launcher of another MPI starts processes that do not know of each other: each would do the whole job */
    if (n > 1 && size == 1)
        return exc_fail(ctx, EXC_ERR_DEVICE,
                        "ranks: expected the %ld processes that were launched, found that MPI knows of this one only: is the launcher of "
                        "the same MPI as the module?", n);
    return size > 1 ? allocate(ctx, t, rank, size) : EXC_OK;
}

exc_status exc_ranks_device(exc_ctx *ctx) {
    return ctx->ranks && ctx->module ? exc_nccl_open(ctx, time_limit(), &ctx->ranks->nccl) : EXC_OK;
}

void exc_ranks_close(exc_ctx *ctx) {
    if (!ctx->ranks) return;
    exc_nccl_close(ctx, ctx->ranks->nccl);
    if (ctx->ranks->met) exc_sockets_part();
    exc_release(ctx->ranks->mine);
    exc_release(ctx->ranks->all);
    exc_release(ctx->ranks->bytes);
    exc_release(ctx->ranks);
    ctx->ranks = NULL;
}

/* ---------------------------------------------------------------------------------------------------------- exchanges */

const char *exc_ranks_missing(const exc_ctx *ctx) { return ctx->ranks->t->missing(); }

exc_status exc_ranks_settle(exc_ctx *ctx) {
    return ctx->ranks && ctx->ranks->nccl ? exc_nccl_settle(ctx, ctx->ranks->nccl) : EXC_OK;
}

exc_status exc_ranks_replay(exc_ctx *ctx) {
    return ctx->ranks && ctx->ranks->nccl ? exc_nccl_replay(ctx, ctx->ranks->nccl) : EXC_OK;
}

exc_status exc_ranks_broken(exc_ctx *ctx, const char *what, const char *why) {
    return exc_fail(ctx, EXC_ERR_DEVICE, "rank %d of %d, at \"%s\": %s", ctx->ranks->rank, ctx->ranks->size, what, why);
}

/* Everyone says what comes next. sends [size], or NULL: `to_all` bytes to each, which may be 0 */
static exc_status announce(exc_ctx *ctx, const char *what, uint64_t same, const size_t *sends, size_t to_all) {
    exc_ranks *r = ctx->ranks;
    announcement mine = {.turn = r->turn++, .same = same};
    uint64_t *counts = (uint64_t *)(r->mine + sizeof mine);
    snprintf(mine.what, sizeof mine.what, "%s", what);
    memcpy(r->mine, &mine, sizeof mine);
    for (int i = 0; i < r->size; i++) counts[i] = sends ? sends[i] : to_all;
    const char *why = r->t->all_gather(r->mine, r->all, r->said);
    if (why) return exc_ranks_broken(ctx, what, why);
    for (int i = 0; i < r->size; i++) {
        announcement a;
        memcpy(&a, r->all + (size_t)i * r->said, sizeof a);
        if (a.turn != mine.turn || a.same != same || strncmp(a.what, mine.what, sizeof mine.what))
            return exc_fail(ctx, EXC_ERR_DEVICE,
                            "rank %d of %d: expected all ranks at the same step, found this one at \"%s\" and rank %d at \"%.47s\"%s: do "
                            "they have the same model, prompts, plan and options?",
                            r->rank, r->size, mine.what, i, a.what, a.same != same ? " with other data" : "");
    }
    return EXC_OK;
}

/* bytes that rank `from` said it sends to this one */
static uint64_t announced(const exc_ranks *r, int from) {
    return ((const uint64_t *)(r->all + (size_t)from * r->said + sizeof(announcement)))[r->rank];
}

exc_status exc_ranks_meet(exc_ctx *ctx, const char *what, uint64_t same) {
    return ctx->ranks ? announce(ctx, what, same, NULL, 0) : EXC_OK;
}

exc_status exc_ranks_gather(exc_ctx *ctx, const char *what, const void *send, void *recv, size_t bytes) {
    if (!ctx->ranks) {
        if (bytes) memcpy(recv, send, bytes);
        return EXC_OK;
    }
    EXC_TRY(announce(ctx, what, bytes, NULL, bytes));
    const char *why = ctx->ranks->t->all_gather(send, recv, bytes);
    return why ? exc_ranks_broken(ctx, what, why) : EXC_OK;
}

static size_t share_of(size_t bytes, uint64_t round) {
    size_t at = (size_t)round * PIECE;
    return bytes <= at ? 0 : bytes - at < PIECE ? bytes - at : PIECE;
}

/* send_bytes NULL: the same piece, `same` bytes, goes to everyone */
static exc_status move(exc_ctx *ctx, const char *what, const void *send, const size_t *send_bytes, size_t same, void *recv,
                       const size_t *recv_bytes) {
    exc_ranks *r = ctx->ranks;
    size_t *sb = r->bytes, *sa = sb + r->size, *rb = sa + r->size, *ra = rb + r->size;
    uint64_t most = 0;
    EXC_TRY(announce(ctx, what, 0, send_bytes, same));
    for (int i = 0; i < r->size; i++)
        if (announced(r, i) != recv_bytes[i])
            return exc_fail(ctx, EXC_ERR_DEVICE, "rank %d of %d, at \"%s\": expected %zu bytes from rank %d, found %llu", r->rank,
                            r->size, what, recv_bytes[i], i, (unsigned long long)announced(r, i));
    for (int i = 0; i < r->size * r->size; i++) { /* everybody's counts: the number of rounds is one for all */
        const uint64_t *counts = (const uint64_t *)(r->all + (size_t)(i / r->size) * r->said + sizeof(announcement));
        if (counts[i % r->size] > most) most = counts[i % r->size];
    }
    uint64_t rounds = (most + PIECE - 1) / PIECE;
    for (uint64_t k = 0; k < rounds; k++) {
        for (size_t i = 0, s = 0, t = 0; i < (size_t)r->size; i++) {
            sb[i] = share_of(send_bytes ? send_bytes[i] : same, k);
            rb[i] = share_of(recv_bytes[i], k);
            sa[i] = s + (size_t)k * PIECE;
            ra[i] = t + (size_t)k * PIECE;
            if (send_bytes) s += send_bytes[i];
            t += recv_bytes[i];
        }
        const char *why = r->t->all_to_all(send, sb, sa, recv, rb, ra);
        if (why) return exc_ranks_broken(ctx, what, why);
    }
    return EXC_OK;
}

exc_status exc_ranks_exchange(exc_ctx *ctx, const char *what, const void *send, const size_t *send_bytes, void *recv,
                              const size_t *recv_bytes) {
    if (ctx->ranks) return move(ctx, what, send, send_bytes, 0, recv, recv_bytes);
    if (send_bytes[0]) memcpy(recv, send, send_bytes[0]);
    return EXC_OK;
}

exc_status exc_ranks_collect(exc_ctx *ctx, const char *what, const void *send, void *recv, const size_t *bytes) {
    if (ctx->ranks) return move(ctx, what, send, NULL, bytes[ctx->ranks->rank], recv, bytes);
    if (bytes[0]) memcpy(recv, send, bytes[0]);
    return EXC_OK;
}

exc_status exc_ranks_send_rows(exc_ctx *ctx, const char *what, const exc_rows *list, size_t count, const int64_t *sends,
                               const int64_t *receives) {
    exc_ranks *r = ctx->ranks;
    if (r && r->nccl) return exc_nccl_rows(ctx, r->nccl, what, list, count, sends, receives);
    for (size_t i = 0; i < count; i++) {
        size_t width = list[i].width, alone[2], *out = r ? r->bytes + 4 * r->size : alone, *in = out + (r ? r->size : 1);
        for (int k = 0; k < exc_ranks_count(ctx); k++) {
            out[k] = (size_t)sends[k] * width;
            in[k] = (size_t)receives[k] * width;
        }
        EXC_TRY(exc_ranks_exchange(ctx, what, list[i].send, out, list[i].recv, in));
    }
    return EXC_OK;
}

exc_status exc_ranks_collect_rows(exc_ctx *ctx, const char *what, const exc_rows *list, size_t count, const int64_t *rows) {
    exc_ranks *r = ctx->ranks;
    if (r && r->nccl) return exc_nccl_rows(ctx, r->nccl, what, list, count, NULL, rows);
    for (size_t i = 0; i < count; i++) {
        size_t alone, *in = r ? r->bytes + 4 * r->size : &alone;
        for (int k = 0; k < exc_ranks_count(ctx); k++) in[k] = (size_t)rows[k] * list[i].width;
        EXC_TRY(exc_ranks_collect(ctx, what, list[i].send, list[i].recv, in));
    }
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------------ sums, agreement */

#define SUM_BYTES ((size_t)4 << 20)

static void add(int dtype, void *into, const void *from, size_t n) {
    if (dtype == EXC_I64)
        for (size_t i = 0; i < n; i++) ((int64_t *)into)[i] += ((const int64_t *)from)[i];
    else if (dtype == EXC_F64)
        for (size_t i = 0; i < n; i++) ((double *)into)[i] += ((const double *)from)[i];
    else if (dtype == EXC_U32)
        for (size_t i = 0; i < n; i++) ((uint32_t *)into)[i] += ((const uint32_t *)from)[i];
    else
        for (size_t i = 0; i < n; i++) ((float *)into)[i] += ((const float *)from)[i];
}

exc_status exc_ranks_sum(exc_ctx *ctx, const char *what, int dtype, void *array, size_t count) {
    if (!ctx->ranks || !array) return EXC_OK;
    size_t size = dtype == EXC_I64 || dtype == EXC_F64 ? 8 : 4, piece = SUM_BYTES / size, R = (size_t)ctx->ranks->size;
    uint8_t *all = exc_alloc(ctx, (count < piece ? count : piece) * R, size, "sums of all ranks");
    if (!all) return EXC_ERR_MEMORY;
    exc_status st = EXC_OK;
    for (size_t at = 0, n; st == EXC_OK && at < count; at += n) {
        n = count - at < piece ? count - at : piece;
        uint8_t *mine = (uint8_t *)array + at * size;
        st = exc_ranks_gather(ctx, what, mine, all, n * size);
        if (st != EXC_OK) break;
        memcpy(mine, all, n * size);
        for (size_t r = 1; r < R; r++) add(dtype, mine, all + r * n * size, n);
    }
    exc_release(all);
    return st;
}

/* the failure of rank `from`, in its words */
static exc_status repeat(exc_ctx *ctx, const char *what, int from, exc_status st) {
    char mine[sizeof ctx->error], (*all)[sizeof mine] = exc_alloc(ctx, (size_t)ctx->ranks->size, sizeof mine, "errors of all ranks");
    if (!all) return EXC_ERR_MEMORY;
    memset(mine, 0, sizeof mine);
    snprintf(mine, sizeof mine, "%s", exc_ctx_error(ctx));
    exc_status told = exc_ranks_gather(ctx, what, mine, all, sizeof mine);
    if (told == EXC_OK) told = exc_fail(ctx, st, "rank %d: %s", from, all[from][0] ? all[from] : exc_status_name(st));
    exc_release(all);
    return told;
}

exc_status exc_ranks_least(exc_ctx *ctx, const char *what, int64_t *v, size_t n) {
    if (!ctx->ranks) return EXC_OK;
    size_t ranks = (size_t)ctx->ranks->size;
    int64_t *all = exc_alloc(ctx, ranks * n, sizeof *all, "numbers of all ranks");
    if (!all) return EXC_ERR_MEMORY;
    exc_status st = exc_ranks_gather(ctx, what, v, all, n * sizeof *all);
    for (size_t i = 0; st == EXC_OK && i < ranks * n; i++)
        if (all[i] < v[i % n]) v[i % n] = all[i];
    exc_release(all);
    return st;
}

exc_status exc_ranks_agree(exc_ctx *ctx, const char *what, exc_status mine) {
    if (!ctx->ranks) return mine;
    int32_t code = mine, *all = exc_alloc(ctx, (size_t)ctx->ranks->size, sizeof *all, "states of all ranks");
    if (!all) return EXC_ERR_MEMORY;
    exc_status st = exc_ranks_gather(ctx, what, &code, all, sizeof code);
    int failed = 0;
    while (st == EXC_OK && failed < ctx->ranks->size && !all[failed]) failed++;
    /* ranks that did not fail themselves hear the first that did */
    if (st == EXC_OK && failed < ctx->ranks->size) st = repeat(ctx, what, failed, (exc_status)all[failed]);
    exc_release(all);
    return mine ? mine : st;
}
