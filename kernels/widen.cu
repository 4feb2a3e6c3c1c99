/* widen.cu - a quantised matrix [rows,cols] as numbers on the device, the twin of widen.c: code times scale, rounded once (exact in
 * f64), and the look for NaN codes and scales that are no finite number. Counter and index as in convert.cu. */
#include "product.cuh"

template <int W, class To> __global__ void widen_all(const struct exc_widen_args a) {
    const int64_t spans = ceil_div(a.cols, span_of(W));
    for (int64_t i : grid_stride(a.rows * a.cols)) {
        const int64_t r = i / a.cols, c = i % a.cols, s = (W == EXC_F4 ? r : r / E4M3_SPAN) * spans + c / span_of(W);
        const float scale = a.scale_dtype == EXC_F32    ? static_cast<const float *>(a.scale)[s]
                            : a.scale_dtype == EXC_BF16 ? widen(static_cast<const bf16 *>(a.scale)[s])
                                                        : from_e8m0(static_cast<const unsigned char *>(a.scale)[s]);
        const unsigned char *codes = static_cast<const unsigned char *>(a.src);
        const uint32_t code = W == EXC_F4 ? (uint32_t)codes[r * (a.cols / 2) + c / 2] >> (c % 2 ? 4 : 0) : codes[i];
        if (!is_finite(scale) || (W == EXC_F8_E4M3 && (code & 0x7f) == 0x7f)) {
            if (a.nonfinite) atomicAdd(reinterpret_cast<unsigned long long *>(a.nonfinite), 1ull);
            if (a.index) atomicMin(reinterpret_cast<unsigned long long *>(a.index), (unsigned long long)i);
        }
        if (!a.dst) continue;
        const float x = W == EXC_F4 ? from_e2m1(code) : from_e4m3(code);
        if (sizeof(To) == 8) static_cast<double *>(a.dst)[i] = (double)x * (double)scale;
        else if (sizeof(To) == 4) static_cast<float *>(a.dst)[i] = x * scale;
        else static_cast<bf16 *>(a.dst)[i] = narrow<bf16>(x * scale);
    }
}

template <int W> static exc_status run(exc_queue *q, const struct exc_widen_args *a) {
    const unsigned grid = grid_for(a->rows * a->cols, 256);
    switch (a->dst ? a->dst_dtype : EXC_F32) {
    case EXC_F32: ENQUEUE(q, (widen_all<W, float>), grid, 256, 0, *a); return EXC_OK;
    case EXC_BF16: ENQUEUE(q, (widen_all<W, bf16>), grid, 256, 0, *a); return EXC_OK;
    case EXC_F64: ENQUEUE(q, (widen_all<W, double>), grid, 256, 0, *a); return EXC_OK;
    default: return EXC_ERR_USAGE;
    }
}

extern "C" exc_status exc_cuda_widen(exc_queue *q, const struct exc_widen_args *a) {
    const bool scales = a->scale_dtype == EXC_F8_E8M0 || (a->dtype == EXC_F8_E4M3 && (a->scale_dtype == EXC_F32 || a->scale_dtype == EXC_BF16));
    if (a->rows < 0 || a->cols < 1 || !is_coded(a->dtype) || !scales || (a->dtype == EXC_F4 && a->cols % FP4_SPAN)) return EXC_ERR_USAGE;
    exc_status st = EXC_OK;
    if (a->nonfinite) st = exc_enqueue_fill(q, a->nonfinite, 0, sizeof *a->nonfinite);
    if (st == EXC_OK && a->index) st = exc_enqueue_fill(q, a->index, 0xff, sizeof *a->index);
    if (st != EXC_OK) return st;
    return a->dtype == EXC_F4 ? run<EXC_F4>(q, a) : run<EXC_F8_E4M3>(q, a);
}
