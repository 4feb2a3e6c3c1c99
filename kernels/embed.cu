/* embed.cu - out [T,H] f32 = rows of the embedding table, widened exactly; the twin of embed.c.
 *
 * A block takes a stretch of one token's row; where table and output are aligned, four numbers a load. */
#include "cuda.cuh"

#define THREADS 256

template <int V, class T> __global__ void embed_rows(const T *table, const int32_t *ids, int64_t hidden, float *out) {
    struct alignas(V * sizeof(T)) In { T v[V]; };
    struct alignas(V * sizeof(float)) Out { float v[V]; };
    int64_t t = blockIdx.x, step = (int64_t)gridDim.y * THREADS;
    const In *from = reinterpret_cast<const In *>(table + ids[t] * hidden);
    Out *to = reinterpret_cast<Out *>(out + t * hidden);
    for (int64_t i = (int64_t)blockIdx.y * THREADS + threadIdx.x; i < hidden / V; i += step) {
        In in = from[i];
        Out wide;
        for (int k = 0; k < V; k++) wide.v[k] = widen(in.v[k]);
        to[i] = wide;
    }
}

extern "C" exc_status exc_cuda_embed(exc_queue *q, const struct exc_embed_args *a) {
    if (a->tokens < 0 || a->hidden < 1) return EXC_ERR_USAGE;
    BY_DTYPE(a->table_dtype, {
        const T *table = (const T *)a->table;
        bool fours = a->hidden % 4 == 0 && aligned(table, 4 * sizeof(T)) && aligned(a->out, 16);
        dim3 grid((unsigned)a->tokens, grid_for(a->hidden, THREADS, fours ? 4 : 1, 64));
        if (fours) ENQUEUE(q, (embed_rows<4, T>), grid, THREADS, 0, table, a->ids, a->hidden, a->out);
        else ENQUEUE(q, (embed_rows<1, T>), grid, THREADS, 0, table, a->ids, a->hidden, a->out);
    });
    return EXC_OK;
}
