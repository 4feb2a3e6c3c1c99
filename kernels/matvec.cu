/* matvec.cu - f64 products with a packed weight matrix on the device, the twin of matvec.c: y [rows,n] = x
 * [rows,k] W^T.
 *
 * A warp takes four outputs and up to four rows of x, so that a weight is read once, as it is stored, and an x
 * four times from the first-level cache. A lane adds its 16-byte pieces in ascending order, the lanes are added
 * as a tree: the bits of an output depend on its row of W and its x alone, and differ from the CPU's single
 * chain by the rounding of k f64 additions. A code times its scale is exact in f64. */
#include "product.cuh"

namespace {

constexpr int OUTPUTS = 4, ROWS = 4, WARPS = 4;

/* weight or code i of a piece of 16 bytes */
template <int W> __device__ inline float one_of(const uint4 &piece, int i) {
    const unsigned word[4] = {piece.x, piece.y, piece.z, piece.w};
    if constexpr (W == EXC_F32) return f32_of(word[i]);
    if constexpr (W == EXC_BF16) return f32_of(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    if constexpr (W == EXC_F8_E4M3) return from_e4m3(word[i / 4] >> i % 4 * 8 & 0xff);
    return from_e2m1(word[i / 8] >> i % 8 * 4 & 15);
}

template <int W>
__global__ void __launch_bounds__(WARPS *WARP)
    matvec(const double *x, const Plane w, int64_t n, int64_t rows, double *y) {
    constexpr int EACH = (int)(16 * 4 / code_bytes(4, W));
    const int lane = threadIdx.x % WARP;
    const int64_t first = ((int64_t)blockIdx.x * WARPS + threadIdx.x / WARP) * OUTPUTS,
                  row = (int64_t)blockIdx.y * ROWS;
    const int count = (int)min((int64_t)ROWS, rows - row);
    double sum[OUTPUTS][ROWS] = {};
    for (int64_t at = (int64_t)lane * EACH; at < w.k && first < n; at += WARP * EACH) {
        uint4 p[OUTPUTS];
        double scale[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) { /* rows are padded to whole 16, zeros behind k */
            p[o] = *reinterpret_cast<const uint4 *>(w.data + code_offset<W>(w, first + o, at));
            if (is_coded(W)) scale[o] = (double)scale_at<W>(w, first + o, at);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (at + i >= w.k) break;
            double v[OUTPUTS];
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) v[o] = (double)one_of<W>(p[o], i) * (is_coded(W) ? scale[o] : 1.0);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r >= count) break;
                const double to = __ldg(x + (row + r) * w.k + at + i);
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++) sum[o][r] = fma(v[o], to, sum[o][r]);
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

template <int W> exc_status run(exc_queue *q, const struct exc_matvec_args *a) {
    const dim3 grid((unsigned)ceil_div(a->w->n, OUTPUTS * WARPS), (unsigned)ceil_div(a->rows, ROWS));
    ENQUEUE(q, matvec<W>, grid, WARPS * WARP, 0, a->x, plane_of(*a->w), a->w->n, a->rows, a->y);
    return EXC_OK;
}

} // namespace

extern "C" exc_status exc_cuda_matvec(exc_queue *q, const struct exc_matvec_args *a) {
    if (a->rows < 0 || !a->w || !a->w->data || a->rows > 65535 * ROWS) return EXC_ERR_USAGE;
    switch (a->w->dtype) {
    case EXC_F32:
        return run<EXC_F32>(q, a);
    case EXC_BF16:
        return run<EXC_BF16>(q, a);
    case EXC_F8_E4M3:
        return run<EXC_F8_E4M3>(q, a);
    case EXC_F4:
        return run<EXC_F4>(q, a);
    default:
        return EXC_ERR_USAGE;
    }
}
