/* angle.cuh - cosine and sine of a rotary position, for rope.cu and latent.cu: the arithmetic of angle.h, step by step, so that
 * both give the same bits. The library's own sincos would also do, but for the spills of its slow path. */
#ifndef EXC_ANGLE_CUH
#define EXC_ANGLE_CUH

#include "cuda.cuh"

/* of position * frequency, times factor */
__device__ inline void turn(double position, float frequency, float factor, float *cosine, float *sine) {
    const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to a whole number */
    double angle = (double)(float)(position * (double)frequency);
    double n = (angle * 0.63661977236758134308 + magic) - magic;
    double r = angle - n * 1.57079632673412561417 - n * 6.07710050650619224932e-11, z = r * r;
    double s = 1.58969099521155010221e-10;
    s = s * z - 2.50507602534068634195e-08;
    s = s * z + 2.75573137070700676789e-06;
    s = s * z - 1.98412698298579493134e-04;
    s = s * z + 8.33333333332248946124e-03;
    s = s * z - 1.66666666666666324348e-01;
    s = r + r * z * s;
    double c = -1.13596475577881948265e-11;
    c = c * z + 2.08757232129817482790e-09;
    c = c * z - 2.75573143513906633035e-07;
    c = c * z + 2.48015872894767294178e-05;
    c = c * z - 1.38888888888741095749e-03;
    c = c * z + 4.16666666666666019037e-02;
    c = 1.0 - 0.5 * z + z * z * c;
    double quarter = n - 4.0 * (((n * 0.25 - 0.375) + magic) - magic); /* 0 (c,s), 1 (-s,c), 2 (-c,-s), 3 (s,-c) */
    bool odd = quarter == 1.0 || quarter == 3.0, back = quarter >= 2.0;
    double cc = odd ? -s : c, ss = odd ? c : s;
    *cosine = (float)(back ? -cc : cc) * factor;
    *sine = (float)(back ? -ss : ss) * factor;
}

#endif
