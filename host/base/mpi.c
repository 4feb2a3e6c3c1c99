/* mpi.c - the MPI transport, a module of its own (libexcise_mpi.so): the library and the program never link MPI.
 *
 * Every exchange is started without blocking and polled until it is done or the time limit is over, because a blocking
 * collective waits for a dead rank for ever. The module initialises MPI where nobody has, and then finalises it when
 * the process ends with success; a process that fails leaves without, which makes the launcher end the other ranks. */
#include <limits.h>
#include <mpi.h>
#include <stdlib.h>
#include <time.h>

#include "ranks.h"

static MPI_Comm world = MPI_COMM_NULL;
static int ranks;
static double limit;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ranks may share cores: after a short spin the core is given away */
static const char *finish(MPI_Request *request) {
    double begun = now();
    for (unsigned i = 0;; i++) {
        int done = 0;
        if (MPI_Test(request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) return "MPI reported an error";
        if (done) return NULL;
        if (i < 200) continue;
        nanosleep(&(struct timespec){.tv_nsec = i < 2000 ? 1000 : 50000}, NULL);
        if (now() - begun > limit) return "a rank did not come within the time limit; it may have ended";
    }
}

static void leave(int status, void *arg) {
    (void)arg;
    int gone = 0;
    MPI_Finalized(&gone);
    if (status == 0 && !gone) MPI_Finalize();
}

static const char *join(int *rank, int *size, double seconds) {
    int there = 0, provided;
    limit = seconds;
    MPI_Initialized(&there);
    if (!there) {
        if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) return "MPI_Init failed";
        on_exit(leave, NULL);
    }
    if (world == MPI_COMM_NULL) {
        if (MPI_Comm_dup(MPI_COMM_WORLD, &world) != MPI_SUCCESS) return "MPI_Comm_dup failed";
        MPI_Comm_set_errhandler(world, MPI_ERRORS_RETURN);
    }
    MPI_Comm_rank(world, rank);
    MPI_Comm_size(world, size);
    ranks = *size;
    return NULL;
}

static const char *all_gather(const void *send, void *recv, size_t bytes) {
    MPI_Request request;
    if (bytes > INT_MAX) return "a piece is larger than MPI counts";
    if (MPI_Iallgather(send, (int)bytes, MPI_BYTE, recv, (int)bytes, MPI_BYTE, world, &request) != MPI_SUCCESS)
        return "MPI_Iallgather failed";
    return finish(&request);
}

/* point to point, because offsets of MPI_Alltoallv are ints and buffers here are larger */
static const char *all_to_all(const void *send, const size_t *send_bytes, const size_t *send_at, void *recv,
                              const size_t *recv_bytes, const size_t *recv_at) {
    MPI_Request *request = calloc((size_t)ranks * 2, sizeof *request);
    if (!request) return "no memory for requests";
    const char *why = NULL;
    int n = 0;
    for (int r = 0; r < ranks && !why; r++) {
        if (send_bytes[r] > INT_MAX || recv_bytes[r] > INT_MAX) why = "a piece is larger than MPI counts";
        else if (recv_bytes[r] && MPI_Irecv((char *)recv + recv_at[r], (int)recv_bytes[r], MPI_BYTE, r, 1, world, &request[n++]))
            why = "MPI_Irecv failed";
    }
    for (int r = 0; r < ranks && !why; r++)
        if (send_bytes[r] && MPI_Isend((const char *)send + send_at[r], (int)send_bytes[r], MPI_BYTE, r, 1, world, &request[n++]))
            why = "MPI_Isend failed";
    for (int i = 0; i < n && !why; i++) why = finish(&request[i]);
    free(request);
    return why;
}

/* mpirun ends all ranks when one ends without a word */
static const char *missing(void) { return NULL; }

__attribute__((visibility("default"))) const exc_transport *exc_transport_table(void);
const exc_transport *exc_transport_table(void) {
    static const exc_transport table = {EXC_TRANSPORT_VERSION, "mpi", join, all_gather, all_to_all, missing};
    return &table;
}
