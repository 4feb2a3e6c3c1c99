/* view.cu - a matrix copied between places with strides of their own, bit for bit, on the device, the twin of view.c.
 *
 * Squares of 32 x 32 go through shared memory, so that both the reading and the writing follow whichever of their strides is
 * the small one: neither a transposition nor a gather of every other column becomes one element an access. */
#include "cuda.cuh"

constexpr int SQUARE = 32, DOWN = 8;

template <class T> __global__ void view_squares(const struct exc_view_args a) {
    SHARED_ARRAY(T, square, SQUARE * (SQUARE + 1));
    const T *src = static_cast<const T *>(a.src);
    T *dst = static_cast<T *>(a.dst);
    const bool src_down = a.src_row < a.src_column, dst_down = a.dst_row < a.dst_column; /* neighbours are rows, not columns */
    const int x = threadIdx.x % SQUARE, y = threadIdx.x / SQUARE;
    const int64_t across = ceil_div(a.columns, SQUARE), row0 = blockIdx.x / across * SQUARE, column0 = blockIdx.x % across * SQUARE;
    for (int i = y; i < SQUARE; i += DOWN) {
        const int r = src_down ? x : i, c = src_down ? i : x;
        if (row0 + r < a.rows && column0 + c < a.columns)
            square[r * (SQUARE + 1) + c] = src[(row0 + r) * a.src_row + (column0 + c) * a.src_column];
    }
    __syncthreads();
    for (int i = y; i < SQUARE; i += DOWN) {
        const int r = dst_down ? x : i, c = dst_down ? i : x;
        if (row0 + r < a.rows && column0 + c < a.columns)
            dst[(row0 + r) * a.dst_row + (column0 + c) * a.dst_column] = square[r * (SQUARE + 1) + c];
    }
}

extern "C" exc_status exc_cuda_view(exc_queue *q, const struct exc_view_args *a) {
    if (a->rows < 0 || a->columns < 0 || (a->unit != 1 && a->unit != 2 && a->unit != 4)) return EXC_ERR_USAGE;
    const int64_t squares = ceil_div(a->rows, SQUARE) * ceil_div(a->columns, SQUARE);
    if (squares > INT32_MAX) return EXC_ERR_USAGE;
    if (a->unit == 1) ENQUEUE(q, view_squares<unsigned char>, (unsigned)squares, SQUARE * DOWN, 0, *a);
    else if (a->unit == 2) ENQUEUE(q, view_squares<uint16_t>, (unsigned)squares, SQUARE * DOWN, 0, *a);
    else ENQUEUE(q, view_squares<uint32_t>, (unsigned)squares, SQUARE * DOWN, 0, *a);
    return EXC_OK;
}
