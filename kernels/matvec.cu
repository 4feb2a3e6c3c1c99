/* matvec.cu - f64 products with a packed weight matrix on the device, the twin of matvec.c: y [rows,n] = x
 * [rows,k] W^T.
 *
 * A warp takes four outputs and up to four rows of x, so that a weight is read once and an x four times from
 * the first-level cache. A lane adds its 16-byte pieces in ascending order, the lanes are added as a tree:
 * the bits of an output depend on its row of W and its x alone, and differ from the CPU's single chain by the
 * rounding of k f64 additions. */
#include "product.cuh"

namespace {

constexpr int OUTPUTS = 4, ROWS = 4, WARPS = 4;

template <class T>
__global__ void __launch_bounds__(WARPS *WARP)
    matvec(const double *x, const T *w, int64_t n, int64_t k, int64_t stride, int64_t rows, double *y) {
    constexpr int EACH = 16 / sizeof(T);
    struct alignas(16) Piece {
        T v[EACH];
    };
    const int lane = threadIdx.x % WARP;
    const int64_t first = ((int64_t)blockIdx.x * WARPS + threadIdx.x / WARP) * OUTPUTS,
                  row = (int64_t)blockIdx.y * ROWS;
    const int count = (int)min((int64_t)ROWS, rows - row);
    double sum[OUTPUTS][ROWS] = {};
    for (int64_t at = (int64_t)lane * EACH; at < stride && first < n; at += WARP * EACH) {
        Piece p[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) /* n is padded to whole 16, zeros behind k */
            p[o] = *reinterpret_cast<const Piece *>(w + (first + o) * stride + at);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (at + i >= k) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r >= count) break;
                const double v = __ldg(x + (row + r) * k + at + i);
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++) sum[o][r] = fma((double)widen(p[o].v[i]), v, sum[o][r]);
            }
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const double s = warp_sum(sum[o][r]);
            if (lane == 0 && r < count && first + o < n) y[(row + r) * n + first + o] = s;
        }
}

/* codes by their scale are exact in f64; a lane takes four inputs at a time, which share a scale */
template <int W>
__global__ void __launch_bounds__(WARPS *WARP)
    matvec_codes(const double *x, Plane p, int64_t n, int64_t rows, double *y) {
    constexpr int EACH = 4;
    const int lane = threadIdx.x % WARP;
    const int64_t first = ((int64_t)blockIdx.x * WARPS + threadIdx.x / WARP) * OUTPUTS,
                  row = (int64_t)blockIdx.y * ROWS;
    const int count = (int)min((int64_t)ROWS, rows - row);
    double sum[OUTPUTS][ROWS] = {};
    for (int64_t at = (int64_t)lane * EACH; at < p.k && first < n; at += WARP * EACH) {
        double scale[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) scale[o] = (double)scale_at<W>(p, first + o, at);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (at + i >= p.k) break;
            double w[OUTPUTS];
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) w[o] = scale[o] * (double)code_at<W>(p, first + o, at + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r >= count) break;
                const double v = __ldg(x + (row + r) * p.k + at + i);
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++) sum[o][r] = fma(w[o], v, sum[o][r]);
            }
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const double s = warp_sum(sum[o][r]);
            if (lane == 0 && r < count && first + o < n) y[(row + r) * n + first + o] = s;
        }
}

template <int W> exc_status run_codes(exc_queue *q, const struct exc_matvec_args *a) {
    const dim3 grid((unsigned)ceil_div(a->w->n, OUTPUTS * WARPS), (unsigned)ceil_div(a->rows, ROWS));
    ENQUEUE(q, matvec_codes<W>, grid, WARPS * WARP, 0, a->x, plane_of(*a->w), a->w->n, a->rows, a->y);
    return EXC_OK;
}

template <class T> exc_status run(exc_queue *q, const struct exc_matvec_args *a) {
    const int64_t stride = ceil_div(a->w->k, 32) * 32;
    const dim3 grid((unsigned)ceil_div(a->w->n, OUTPUTS * WARPS), (unsigned)ceil_div(a->rows, ROWS));
    ENQUEUE(q, matvec<T>, grid, WARPS * WARP, 0, a->x, (const T *)a->w->data, a->w->n, a->w->k, stride,
            a->rows, a->y);
    return EXC_OK;
}

} // namespace

extern "C" exc_status exc_cuda_matvec(exc_queue *q, const struct exc_matvec_args *a) {
    if (a->rows < 0 || !a->w || !a->w->data || a->rows > 65535 * ROWS) return EXC_ERR_USAGE;
    if (a->w->dtype == EXC_BF16) return run<bf16>(q, a);
    if (a->w->dtype == EXC_F8_E4M3) return run_codes<EXC_F8_E4M3>(q, a);
    if (a->w->dtype == EXC_F4) return run_codes<EXC_F4>(q, a);
    return a->w->dtype == EXC_F32 ? run<float>(q, a) : EXC_ERR_USAGE;
}
