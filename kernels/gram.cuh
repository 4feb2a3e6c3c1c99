/* gram.cuh - Gram matrices for an op that has scratch of its own: subspace takes room for them beside its arrays.
 *
 * take() decides from the shapes, and from whether cuBLASLt is at hand, who multiplies; run() does as it decided. gram.cu has
 * the op itself, which is one after the other. */
#ifndef EXC_GRAM_CUH
#define EXC_GRAM_CUH

#include "libraries.cuh"

struct GramRoom {
    const Plan *first, *more; /* of the first piece of the depth, and of those added to it; NULL: our own tiles */
    double *wide;             /* [layers, a piece] */
    char *workspace;
    int64_t layers, piece; /* layers at once; samples or channels of a piece */
};
exc_status exc_gram_take(Carve &work, const struct exc_gram_args *a, GramRoom *room);
exc_status exc_gram_run(exc_queue *q, const struct exc_gram_args *a, const GramRoom &room);

#endif
