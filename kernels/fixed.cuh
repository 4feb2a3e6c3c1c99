/* fixed.cuh - terms of reproducible sums on the device, bit for bit as fixed.h has them: multiples of a unit, which f64 adds
 * without rounding, so that the order of rows and of blocks does not matter. */
#ifndef EXC_FIXED_CUH
#define EXC_FIXED_CUH

#include "cuda.cuh"

__device__ inline float fixed_term(float x) {
    const float whole = (float)(EXC_UNIT * 0x1p23), shift = copysignf(whole, x);
    const float rounded = (x + shift) - shift;
    return fabsf(x) >= whole ? x : rounded;
}

__device__ inline double fixed_square(double x) {
    const double whole = EXC_SQUARE_UNIT * 0x1p52;
    const double rounded = (x + whole) - whole;
    return x >= whole ? x : rounded;
}

/* |y|^2 of a row as exc_row_square() has it: sixteen chains of f64, then pairs. A whole warp calls; all lanes get it. */
__device__ inline double row_square(const float *y, int64_t n) {
    const int lane = threadIdx.x % WARP;
    double chain = 0, s = 0;
    if (lane < 16)
        for (int64_t i = lane; i < n; i += 16) chain += (double)y[i] * (double)y[i];
    const double half = chain + __shfl_down_sync(ALL_LANES, chain, 8);
    for (int l = 0; l < 8; l++) s += __shfl_sync(ALL_LANES, half, l);
    return s;
}

#endif
