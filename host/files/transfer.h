/* transfer.h - inside the files room: moving bytes of big files (transfer.c) for publish.c. */
#ifndef EXC_TRANSFER_H
#define EXC_TRANSFER_H

#include "files.h"

typedef struct exc_transfer {
    const exc_range *ranges; /* all of the checkpoint, sorted by file, begin */
    size_t n;
    exc_fill_fn fill;
    void *user;
    uint64_t done, total; /* bytes, for progress */
} exc_transfer;

/* the bytes of file number `index` of `from` into the new file `to`, with its ranges filled; synced to the
 * disk */
typedef struct exc_mover exc_mover;
exc_status exc_mover_open(exc_ctx *ctx, const exc_transfer *t, exc_mover **out);
exc_status exc_mover_file(exc_mover *m, exc_transfer *t, const exc_checkpoint *from, int index,
                          const char *to);
void exc_mover_close(exc_mover *m); /* waits for what is being written */

/* a whole plain file, by clone or by copy; not synced */
exc_status exc_copy_file(exc_ctx *ctx, const char *from, const char *to);
/* EXC_ERR_INPUT when the file is not the one that was opened: replaced, resized or written since */
exc_status exc_same_file(exc_ctx *ctx, const exc_tensors *t);

#endif
