/* tensor.h - what the tensor-core and asynchronous-copy instructions of tensor.cuh mean, on the host.
 *
 * A warp-wide instruction runs once, by the last lane to arrive, over the registers of all lanes with the fragment layout
 * of the PTX manual, so a kernel's index arithmetic is really tested. Products of an mma are added in f32 in ascending k. An
 * asynchronous copy is done as late as allowed, at the wait for its group, so a missing wait shows. */
#ifndef EXC_CUDA_TENSOR_H
#define EXC_CUDA_TENSOR_H

#include "device.h"

namespace hc {
struct MmaIn {
    const float *c;
    const unsigned *a, *b;
};
HC_NOTSAN inline float bf_half(unsigned r, int hi) { return hc_bits<float>((unsigned)(hi ? r & 0xffff0000u : r << 16)); }
HC_NOTSAN inline void mma_run(unsigned m, const void *const *in, void *const *out, const int *) {
    if (m != 0xffffffffu) fail("mma needs all 32 lanes (mask %08x)", m);
    float A[16][16], B[16][8], D[16][8];
    for (int l = 0; l < 32; l++) {
        const MmaIn &x = *(const MmaIn *)in[l];
        int g = l / 4, q = l % 4;
        for (int i = 0; i < 8; i++) A[g + (i / 2 % 2) * 8][q * 2 + i % 2 + (i / 4) * 8] = bf_half(x.a[i / 2], i % 2);
        for (int i = 0; i < 4; i++) B[q * 2 + i % 2 + (i / 2) * 8][g] = bf_half(x.b[i / 2], i % 2);
        for (int i = 0; i < 4; i++) D[g + (i / 2) * 8][q * 2 + i % 2] = x.c[i];
    }
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++)
            for (int c = 0; c < 8; c++) D[r][c] += A[r][k] * B[k][c];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((float *)out[l])[i] = D[l / 4 + (i / 2) * 8][l % 4 * 2 + i % 2];
}
HC_NOTSAN inline void ldmatrix_run(unsigned m, const void *const *in, void *const *out, const int *trans) {
    if (m != 0xffffffffu) fail("ldmatrix needs all 32 lanes (mask %08x)", m);
    for (int l = 0; l < 32; l++)
        for (int t = 0; t < 4; t++) {
            const uint16_t *row[8];
            for (int i = 0; i < 8; i++) row[i] = (const uint16_t *)in[t * 8 + i];
            int g = l / 4, q = l % 4;
            unsigned lo = trans[l] ? row[2 * q][g] : row[g][2 * q], hi = trans[l] ? row[2 * q + 1][g] : row[g][2 * q + 1];
            ((unsigned *)out[l])[t] = lo | hi << 16;
        }
}
inline void ldmatrix(unsigned *r, const void *row, int trans, Site site) {
    if ((uintptr_t)row % 16) fail("ldmatrix: row address %p is not 16-byte aligned", row);
    collective(~0u, ldmatrix_run, row, r, trans, false, site);
}
void cp_async(void *d, const void *s, int bytes);
void cp_async_commit();
void cp_async_wait(int open);
} // namespace hc

#define mma_bf16(d, a, b)                                                                                              \
    do {                                                                                                               \
        hc::MmaIn in_{d, a, b};                                                                                        \
        hc::collective(~0u, hc::mma_run, &in_, d, 0, false, HC_SITE);                                                  \
    } while (0)
#define ldmatrix_x4(r, p) hc::ldmatrix(r, p, 0, HC_SITE)
#define ldmatrix_x4_trans(r, p) hc::ldmatrix(r, p, 1, HC_SITE)
inline void cp_async16(void *shared, const void *global, int bytes = 16) { hc::cp_async(shared, global, bytes); }
inline void cp_async_commit() { hc::cp_async_commit(); }
inline unsigned pack_bf16(float lo, float hi) {
    auto one = [](float x) -> unsigned {
        unsigned u = hc_bits<unsigned>(x);
        return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    };
    return one(lo) | one(hi) << 16;
}
inline uint4 load_keep(const void *p) { return *static_cast<const uint4 *>(p); }
inline uint4 load_drop(const void *p) { return *static_cast<const uint4 *>(p); }
inline void store_drop(void *p, const uint4 &v) { *static_cast<uint4 *>(p) = v; }
inline void store_drop(void *p, const uint2 &v) { *static_cast<uint2 *>(p) = v; }

#endif
