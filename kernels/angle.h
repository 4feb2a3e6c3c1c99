/* angle.h - cosines and sines of rotary positions, shared by rope and latent.
 *
 * position * frequency is exact or nearly so in f64 and is rounded to f32, the angle that models are trained with; its sine
 * and cosine are taken in f64 (Cody-Waite reduction by pi/2, fdlibm's polynomials: error below 1e-14 for any angle of
 * 2^20 positions) in a loop that vectorises, because library calls for every token and layer would cost as much as the
 * projections of a small model. */
#ifndef EXC_ANGLE_H
#define EXC_ANGLE_H

#include "lanes.h"

/* cos and sin of position * inv_freq[i], times factor */
EXC_INLINE void exc_turn(double position, const float *inv_freq, int64_t half, float factor, float *cosine, float *sine) {
    for (int64_t i = 0; i < half; i++) {
        double angle = (double)(float)(position * (double)inv_freq[i]);
        double shifted = angle * 0.63661977236758134308 + 0x1.8p52, n = shifted - 0x1.8p52;
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
        /* the quarter turn picks: 0 (c,s), 1 (-s,c), 2 (-c,-s), 3 (s,-c) */
        double quarter = n - 4.0 * (((n * 0.25 - 0.375) + 0x1.8p52) - 0x1.8p52);
        int odd = quarter == 1.0 || quarter == 3.0, back = quarter >= 2.0;
        double cc = odd ? -s : c, ss = odd ? c : s;
        cosine[i] = (float)(back ? -cc : cc) * factor;
        sine[i] = (float)(back ? -ss : ss) * factor;
    }
}

#endif
