/* ranks.h - several processes that do one job together: the communicator.
 *
 * All ranks make the same calls in the same order. Two movements of bytes carry everything (all_gather, all_to_all);
 * sums are gathered and added in rank order, so every rank has the same bits. Before bytes move the ranks tell
 * each other what they are about to do: ranks out of step get an error that names both places, and a rank that does
 * not come within the time limit is named too, so nobody waits for a dead one. The transport of host memory is sockets
 * between ranks that our own launcher started or that met by a file (sockets.c, rendezvous.c), or a module opened at run time (MPI: mpi.c): one binary runs with and
 * without it. */
#ifndef EXC_RANKS_H
#define EXC_RANKS_H

#include <stddef.h>
#include <stdint.h>

#include "base.h"

/* What a transport module gives; counts of bytes are per peer, arrays are [size]. Functions return NULL or one sentence. */
#define EXC_TRANSPORT_VERSION 2
#define EXC_TRANSPORT_SYMBOL "exc_transport_table"
typedef struct exc_transport {
    uint32_t version;
    const char *name;
    /* joins the job; rank and size come back. seconds: how long any exchange may take */
    const char *(*join)(int *rank, int *size, double seconds);
    /* `bytes` from everyone to everyone, in rank order */
    const char *(*all_gather)(const void *send, void *recv, size_t bytes);
    /* at most INT32_MAX bytes a peer */
    const char *(*all_to_all)(const void *send, const size_t *send_bytes, const size_t *send_at, void *recv,
                              const size_t *recv_bytes, const size_t *recv_at);
    /* outside an exchange: a rank that is known to have ended; NULL: none is */
    const char *(*missing)(void);
} exc_transport;
typedef const exc_transport *(*exc_transport_fn)(void);

#define EXC_RANKS_MOST 64                      /* over sockets */
#define EXC_RANK_SOCKETS "EXCISE_RANK_SOCKETS" /* the variable by which a rank finds its sockets */
extern const exc_transport exc_sockets;
/* Instead of join: file [ranks], a stream socket to each other rank and -1 for this one, is the transport's until exc_sockets_part closes
 * them; one set at a time. seconds as in join. */
void exc_sockets_use(int rank, int ranks, const int *file, double seconds);
bool exc_sockets_taken(void);
void exc_sockets_part(void);
/* The sockets of ranks that meet by a file at `path`, within `seconds`: file [ranks], -1 for this one. EXC_ERR_DEVICE: somebody is missing,
 * EXC_ERR_USAGE: ranks of several jobs came, EXC_ERR_IO: the file cannot be written; closed again then. Sends progress events. */
exc_status exc_rendezvous(exc_ctx *ctx, const char *path, int rank, int ranks, double seconds, int *file);

/* ---- what ranks.c and nccl.c are to each other. Statuses as in base.h, whose exc_ranks_ calls lead here on a GPU. */
typedef struct exc_nccl exc_nccl;
exc_status exc_nccl_open(exc_ctx *ctx, double seconds, exc_nccl **out); /* by all ranks; *out may be set on failure too */
void exc_nccl_close(exc_ctx *ctx, exc_nccl *n);
exc_status exc_nccl_settle(exc_ctx *ctx, exc_nccl *n);
exc_status exc_nccl_replay(exc_ctx *ctx, exc_nccl *n);
exc_status exc_nccl_rows(exc_ctx *ctx, exc_nccl *n, const char *what, const exc_rows *list, size_t count, const int64_t *sends,
                         const int64_t *receives);
exc_status exc_ranks_broken(exc_ctx *ctx, const char *what, const char *why); /* EXC_ERR_DEVICE, with the rank and the place */
const char *exc_ranks_missing(const exc_ctx *ctx);

#endif
