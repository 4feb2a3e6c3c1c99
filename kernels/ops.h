/* ops.h - what ops.def turns into: one argument struct an op, the prototypes of the CPU definitions, and the table of
 * function pointers that a backend fills. Also the packed weight layout, which every matmul-like op reads. */
#ifndef EXC_OPS_H
#define EXC_OPS_H

#include "excise.h"
#include "queue.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A weight matrix [n out, k in] laid out for the matmul: panels of 16 outputs. bf16: within a panel, for each pair of
 * inputs (2i, 2i+1) sixteen outputs x two values (64 bytes), k padded with zeros to a multiple of 32, n to one of 16. This is
 * what vdpbf16ps (AVX-512), tdpbf16ps (AMX) and, by shift and mask, AVX2 eat directly, and oneDNN's BA16a16b2a.
 * f32: for each input sixteen outputs (64 bytes), same padding. Quantised weights stay as they are stored: e4m3 and fp4 codes by
 * pairs like bf16 (32 and 16 bytes), each panel followed by its own scales (codes.h).
 * On a device the panels are as large but hold plain rows, [16][k to whole 32] row-major, padding zero, so that bf16 and f32
 * matrices are rows one after the other; a panel's scales follow its codes, fp4 ones as [16][k/32]. */
typedef struct exc_packed {
    const void *data; /* 64-byte aligned; NULL: absent */
    int64_t n, k;     /* logical sizes */
    int dtype;        /* EXC_BF16, EXC_F32, EXC_F8_E4M3 or EXC_F4 */
} exc_packed;
#define EXC_PANEL 16
size_t exc_packed_bytes(int64_t n, int64_t k, int dtype); /* pack.c */

/* What terms of sums are rounded to in reproducible mode (fixed.h): gate weights and activations; squared norms of outputs. */
#define EXC_UNIT 0x1p-28
#define EXC_SQUARE_UNIT 0x1p-20
#define EXC_EXACT_UNITS 0x1p53 /* f64 sums are exact below this many units */

/* What makes one activation of gate g and up u. Clamped: g = min(g, limit), u = clamp(u, -limit, limit), then
 * g * sigmoid(alpha * g) * (u + 1). */
enum { EXC_GLU_SILU = 0, EXC_GLU_CLAMPED = 1 };
typedef struct exc_activation {
    int kind;           /* EXC_GLU_SILU: g * sigmoid(g) * u */
    float alpha, limit; /* of EXC_GLU_CLAMPED */
} exc_activation;

enum { EXC_SIDE_OUT = 0, EXC_SIDE_IN = 1 };
enum { EXC_GRAM_SAMPLES = 0, EXC_GRAM_WIDTH = 1 };
size_t exc_subspace_bytes(int64_t layers, int64_t samples, int64_t width, int64_t rank, int workers); /* subspace.c */

#define EXC_DELTA_CHUNK 32 /* positions of a sequence between two moves of the delta rule's state */
size_t exc_delta_floats(int64_t k_heads, int64_t v_heads, int64_t k_dim, int64_t v_dim); /* delta.c: state of a slot */

#define EXC_OP(name, ...) struct exc_##name##_args { __VA_ARGS__ };
#include "ops.def"
#undef EXC_OP

#define EXC_OP(name, ...) exc_status exc_cpu_##name(exc_queue *q, const struct exc_##name##_args *a);
#include "ops.def"
#undef EXC_OP

struct exc_ops {
    const char *name;
#define EXC_OP(name, ...) exc_status (*name)(exc_queue *q, const struct exc_##name##_args *a);
#include "ops.def"
#undef EXC_OP
};
extern const struct exc_ops exc_cpu_ops; /* kernels/backend.c */

/* matrix i of a project call, by table or by stride */
static inline size_t exc_edit_size(int dtype) { return dtype == EXC_F32 ? 4 : 2; }
static inline const void *exc_edit_src(const struct exc_project_args *a, int64_t i) {
    return a->src ? a->src[i] : (const char *)a->src_base + (size_t)(i * a->src_stride) * exc_edit_size(a->dtype);
}
static inline void *exc_edit_dst(const struct exc_project_args *a, int64_t i) {
    return a->dst ? a->dst[i] : (char *)a->dst_base + (size_t)(i * a->dst_stride) * exc_edit_size(a->dtype);
}

/* Run-time choice of instructions (kernels/isa.c): the best level this processor and operating system offer. The
 * environment variable EXCISE_ISA (generic, avx2, avx512, avx512bf16) may lower it. It is read once; exc_isa_lower(name) lowers
 * it from the best anew, for tests; NULL or a name that is no lower: the best. */
enum exc_isa { EXC_ISA_GENERIC, EXC_ISA_AVX2, EXC_ISA_AVX512, EXC_ISA_AVX512BF16, EXC_ISA_AMX };
enum exc_isa exc_isa_level(void);
enum exc_isa exc_isa_lower(const char *name);
const char *exc_isa_name(enum exc_isa level);
/* bytes of the third-level cache for each of so many busy threads; 0: unknown */
size_t exc_cache_share(int workers);

#ifdef __cplusplus
}
#endif

#endif
