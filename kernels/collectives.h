/* collectives.h - what Excise uses of NCCL, said in its own words, because nothing here may need the library or its header to build:
 * the numbers, the two structs that calls take, and the calls.
 *
 * The configuration is that of NCCL 2.14, the first whose calls need not block; its `version` tells every later library
 * which fields it has. tests/vendor.cpp holds all of this against NVIDIA's own header, where there is one. */
#ifndef EXC_COLLECTIVES_H
#define EXC_COLLECTIVES_H

#include <stddef.h>
#include <stdint.h>

#define EXC_NCCL_FILE "libnccl.so.2"
#define EXC_NCCL_LEAST 21400 /* 2.14.0: major * 10000 + minor * 100 + patch, since 2.9 */

enum { EXC_NCCL_SUCCESS = 0, EXC_NCCL_INVALID_ARGUMENT = 4, EXC_NCCL_INVALID_USAGE = 5, EXC_NCCL_REMOTE = 6, EXC_NCCL_IN_PROGRESS = 7 };
enum { EXC_NCCL_BYTES = 0 }; /* ncclInt8 */

typedef struct exc_nccl_id {
    char bytes[128];
} exc_nccl_id;

typedef struct exc_nccl_config {
    size_t size;
    unsigned magic, version;
    int blocking;
    int unset; /* where a later version has another field: INT_MIN is "not set" there */
} exc_nccl_config;
#define EXC_NCCL_CONFIG(blocking) {sizeof(exc_nccl_config), 0xcafebeefu, EXC_NCCL_LEAST, blocking, INT_MIN}

/* CALL(name, arguments); every one returns a status, comm is ncclComm_t and stream cudaStream_t */
#define EXC_NCCL_CALLS(CALL)                                                                                                     \
    CALL(ncclGetVersion, (int *version))                                                                                         \
    CALL(ncclGetUniqueId, (exc_nccl_id * id))                                                                                    \
    CALL(ncclCommInitRankConfig, (void **comm, int ranks, exc_nccl_id id, int rank, exc_nccl_config *config))                    \
    CALL(ncclCommGetAsyncError, (void *comm, int *status))                                                                       \
    CALL(ncclCommFinalize, (void *comm))                                                                                         \
    CALL(ncclCommDestroy, (void *comm))                                                                                          \
    CALL(ncclCommAbort, (void *comm))                                                                                            \
    CALL(ncclGroupStart, (void))                                                                                                 \
    CALL(ncclGroupEnd, (void))                                                                                                   \
    CALL(ncclSend, (const void *send, size_t count, int type, int peer, void *comm, void *stream))                               \
    CALL(ncclRecv, (void *recv, size_t count, int type, int peer, void *comm, void *stream))

#endif
