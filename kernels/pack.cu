/* pack.cu - W [n,k] row-major (bf16|f16|f32, or quantised) into panels of 16 rows on the device, the twin of pack.c.
 *
 * The device's panels are plain rows padded with zeros (product.cuh), so this is a conversion with padding; codes keep their
 * bits and the scales of a panel go behind it, those of e4m3 widened to f32. A thread makes one element of the padded panel (fp4: a
 * byte, two elements), then the scales have a grid of their own. */
#include "product.cuh"

__device__ static float scale_from(const void *scale, int dtype, int64_t i) {
    if (dtype == EXC_F32) return static_cast<const float *>(scale)[i];
    if (dtype == EXC_BF16) return widen(static_cast<const bf16 *>(scale)[i]);
    return from_e8m0(static_cast<const unsigned char *>(scale)[i]);
}

template <int W> __device__ static float coded(const struct exc_pack_args &a, int64_t n, int64_t k) {
    const unsigned char *code = static_cast<const unsigned char *>(a.w);
    if (W == EXC_F4)
        return from_e2m1((uint32_t)code[n * (a.k / 2) + k / 2] >> (k % 2 ? 4 : 0)) *
               scale_from(a.scale, a.scale_dtype, n * (a.k / FP4_SPAN) + k / FP4_SPAN);
    return from_e4m3(code[n * a.k + k]) *
           scale_from(a.scale, a.scale_dtype, n / E4M3_SPAN * ceil_div(a.k, E4M3_SPAN) + k / E4M3_SPAN);
}

/* values: elements of bf16, f16 or f32, or codes times scales, to bf16 or f32 */
template <int FROM, class To> __global__ void pack_values(const struct exc_pack_args a, const Plane p) {
    To *out = static_cast<To *>(a.out);
    for (int64_t i : grid_stride(p.rows * p.pitch)) {
        const int64_t n = i / p.pitch, k = i % p.pitch;
        float x = 0;
        if (n < a.n && k < a.k) {
            if (FROM == EXC_F32) x = static_cast<const float *>(a.w)[n * a.k + k];
            else if (FROM == EXC_F16) x = widen(static_cast<const f16 *>(a.w)[n * a.k + k]);
            else if (FROM == EXC_BF16) x = widen(static_cast<const bf16 *>(a.w)[n * a.k + k]);
            else x = coded<FROM>(a, n, k);
        }
        out[i] = narrow<To>(x);
    }
}
/* the same dtype: bits, NaN payloads too */
template <class T> __global__ void pack_bits(const struct exc_pack_args a, const Plane p) {
    for (int64_t i : grid_stride(p.rows * p.pitch)) {
        const int64_t n = i / p.pitch, k = i % p.pitch;
        static_cast<T *>(a.out)[i] = n < a.n && k < a.k ? static_cast<const T *>(a.w)[n * a.k + k] : T(0);
    }
}

/* every byte of the panels, codes first; what is neither code nor scale is zero */
template <int W> __global__ void pack_codes(const struct exc_pack_args a, const Plane p) {
    const int64_t row = code_bytes(p.pitch, W), have = code_bytes(a.k, W), codes = EXC_PANEL * row;
    for (int64_t i : grid_stride(p.rows / EXC_PANEL * p.panel)) {
        const int64_t panel = i / p.panel, at = i % p.panel, n = panel * EXC_PANEL + at / row, byte = at % row;
        unsigned char x = 0;
        if (at < codes && n < a.n && byte < have) x = static_cast<const unsigned char *>(a.w)[n * have + byte];
        if (at >= codes && W == EXC_F4) {
            const int64_t groups = p.pitch / FP4_SPAN, r = panel * EXC_PANEL + (at - codes) / groups;
            if (at - codes < EXC_PANEL * groups && r < a.n)
                x = static_cast<const unsigned char *>(a.scale)[r * groups + (at - codes) % groups];
        }
        static_cast<unsigned char *>(a.out)[i] = x;
    }
}
__global__ static void pack_scales(const struct exc_pack_args a, const Plane p) {
    const int64_t spans = ceil_div(a.k, E4M3_SPAN);
    for (int64_t i : grid_stride(p.rows / EXC_PANEL * spans)) {
        const int64_t n = i / spans * EXC_PANEL, s = i % spans;
        unsigned char *to = static_cast<unsigned char *>(a.out) + scale_offset<EXC_F8_E4M3>(p, n, s * E4M3_SPAN);
        *reinterpret_cast<float *>(to) = scale_from(a.scale, a.scale_dtype, n / E4M3_SPAN * spans + s);
    }
}

template <int FROM> static exc_status values(exc_queue *q, const struct exc_pack_args *a, const Plane &p) {
    const unsigned grid = grid_for(p.rows * p.pitch, 256);
    if (a->to == EXC_BF16) ENQUEUE(q, (pack_values<FROM, bf16>), grid, 256, 0, *a, p);
    else ENQUEUE(q, (pack_values<FROM, float>), grid, 256, 0, *a, p);
    return EXC_OK;
}

static bool fits(const struct exc_pack_args *a) {
    if (a->n < 0 || a->k < 1) return false;
    if (!is_coded(a->w_dtype)) {
        const bool known = a->w_dtype == EXC_BF16 || a->w_dtype == EXC_F16 || a->w_dtype == EXC_F32;
        return known && (a->to == EXC_BF16 || a->to == EXC_F32);
    }
    if (a->to != EXC_BF16 && a->to != EXC_F32 && a->to != a->w_dtype) return false;
    if (a->w_dtype == EXC_F4 && (a->k % FP4_SPAN || a->scale_dtype != EXC_F8_E8M0)) return false;
    return (a->scale || !a->n) && (a->scale_dtype == EXC_F8_E8M0 || a->scale_dtype == EXC_F32 || a->scale_dtype == EXC_BF16);
}

extern "C" exc_status exc_cuda_pack(exc_queue *q, const struct exc_pack_args *a) {
    if (!fits(a)) return EXC_ERR_USAGE;
    if (!a->n) return EXC_OK;
    const Plane p = plane_of(a->out, a->n, a->k, a->to);
    if (is_coded(a->to)) {
        const unsigned grid = grid_for(p.rows / EXC_PANEL * p.panel, 256);
        if (a->to == EXC_F4) {
            ENQUEUE(q, pack_codes<EXC_F4>, grid, 256, 0, *a, p);
            return EXC_OK;
        }
        ENQUEUE(q, pack_codes<EXC_F8_E4M3>, grid, 256, 0, *a, p);
        ENQUEUE(q, pack_scales, grid_for(p.rows / EXC_PANEL * ceil_div(a->k, E4M3_SPAN), 256), 256, 0, *a, p);
        return EXC_OK;
    }
    if (a->w_dtype == a->to) {
        const unsigned grid = grid_for(p.rows * p.pitch, 256);
        if (a->to == EXC_BF16) ENQUEUE(q, pack_bits<uint16_t>, grid, 256, 0, *a, p);
        else ENQUEUE(q, pack_bits<uint32_t>, grid, 256, 0, *a, p);
        return EXC_OK;
    }
    switch (a->w_dtype) {
    case EXC_F32: return values<EXC_F32>(q, a, p);
    case EXC_BF16: return values<EXC_BF16>(q, a, p);
    case EXC_F16: return values<EXC_F16>(q, a, p);
    case EXC_F8_E4M3: return values<EXC_F8_E4M3>(q, a, p);
    default: return values<EXC_F4>(q, a, p);
    }
}
