/* vendor.cuh - the calls and numbers of cuBLASLt (12.0 or later) and cuSOLVER (11.7.1 or later) that are used, as NVIDIA's
 * documentation has them; no header of theirs is needed to build.
 *
 * Handles, descriptors and enumerations are plain pointers and ints: what an x86-64 or arm64 call passes is the same. The
 * lists make the tables that libraries.cu fills, the prototypes of the stand-ins (cuda_on_host/standin.h), and, where NVIDIA's
 * headers are installed, a comparison with those, number by number and argument by argument (tests/vendor.cpp). */
#ifndef EXC_VENDOR_CUH
#define EXC_VENDOR_CUH

#include <stddef.h>
#include <stdint.h>

struct CUstream_st; /* cudaStream_t points at it */

namespace nv {

#define EXC_NV_NUMBERS(F)                                                                                    \
    F(CUDA_R_32F, 0)                                                                                         \
    F(CUDA_R_64F, 1)                                                                                         \
    F(CUDA_R_16BF, 14)                                                                                       \
    F(CUBLAS_STATUS_SUCCESS, 0)                                                                              \
    F(CUBLAS_STATUS_NOT_INITIALIZED, 1)                                                                      \
    F(CUBLAS_STATUS_INVALID_VALUE, 7)                                                                        \
    F(CUBLAS_STATUS_EXECUTION_FAILED, 13)                                                                    \
    F(CUBLAS_STATUS_NOT_SUPPORTED, 15)                                                                       \
    F(CUBLAS_OP_N, 0)                                                                                        \
    F(CUBLAS_OP_T, 1)                                                                                        \
    F(CUBLAS_FILL_MODE_LOWER, 0)                                                                             \
    F(CUBLAS_COMPUTE_32F, 68)                                                                                \
    F(CUBLAS_COMPUTE_64F, 70)                                                                                \
    F(CUBLASLT_MATMUL_DESC_TRANSA, 3)                                                                        \
    F(CUBLASLT_MATMUL_DESC_TRANSB, 4)                                                                        \
    F(CUBLASLT_MATMUL_DESC_EPILOGUE, 7)                                                                      \
    F(CUBLASLT_MATMUL_DESC_BIAS_POINTER, 8)                                                                  \
    F(CUBLASLT_EPILOGUE_BIAS, 4)                                                                             \
    F(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, 5)                                                                 \
    F(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, 6)                                                        \
    F(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 1)                                                           \
    F(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, 3)                                                         \
    F(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 5)                                                         \
    F(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 6)                                                         \
    F(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 7)                                                         \
    F(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 8)                                                         \
    F(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 2)                                                             \
    F(CUSOLVER_STATUS_SUCCESS, 0)                                                                            \
    F(CUSOLVER_STATUS_NOT_INITIALIZED, 1)                                                                    \
    F(CUSOLVER_STATUS_INVALID_VALUE, 3)                                                                      \
    F(CUSOLVER_STATUS_EXECUTION_FAILED, 6)                                                                   \
    F(CUSOLVER_STATUS_INTERNAL_ERROR, 7)                                                                     \
    F(CUSOLVER_EIG_MODE_VECTOR, 1)                                                                           \
    F(MAJOR_VERSION, 0)                                                                                      \
    F(MINOR_VERSION, 1)                                                                                      \
    F(PATCH_LEVEL, 2)

#define EXC_NV_NUMBER(name, value) name = value,
enum number : int { EXC_NV_NUMBERS(EXC_NV_NUMBER) };
#undef EXC_NV_NUMBER

/* handles and descriptors are opaque; an algorithm and what the search tells of it are plain data */
struct Algo {
    uint64_t data[8];
};
struct Found {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

#define EXC_BLAS_CALLS(F)                                                                                    \
    F(int, cublasLtGetProperty, (int type, int *value))                                                      \
    F(const char *, cublasLtGetStatusName, (int status))                                                     \
    F(int, cublasLtCreate, (void **handle))                                                                  \
    F(int, cublasLtDestroy, (void *handle))                                                                  \
    F(int, cublasLtMatmulDescCreate, (void **desc, int compute, int scale_type))                             \
    F(int, cublasLtMatmulDescDestroy, (void *desc))                                                          \
    F(int, cublasLtMatmulDescSetAttribute, (void *desc, int attribute, const void *value, size_t bytes))     \
    F(int, cublasLtMatrixLayoutCreate,                                                                       \
      (void **layout, int type, uint64_t rows, uint64_t cols, int64_t leading))                              \
    F(int, cublasLtMatrixLayoutDestroy, (void *layout))                                                      \
    F(int, cublasLtMatrixLayoutSetAttribute, (void *layout, int attribute, const void *value, size_t bytes)) \
    F(int, cublasLtMatmulPreferenceCreate, (void **preference))                                              \
    F(int, cublasLtMatmulPreferenceDestroy, (void *preference))                                              \
    F(int, cublasLtMatmulPreferenceSetAttribute,                                                             \
      (void *preference, int attribute, const void *value, size_t bytes))                                    \
    F(int, cublasLtMatmulAlgoGetHeuristic,                                                                   \
      (void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted,           \
       nv::Found *found, int *count))                                                                        \
    F(int, cublasLtMatmul,                                                                                   \
      (void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b,            \
       void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,             \
       const nv::Algo *algo, void *workspace, size_t bytes, struct CUstream_st *stream))

#define EXC_SOLVER_CALLS(F)                                                                                  \
    F(int, cusolverGetProperty, (int type, int *value))                                                      \
    F(int, cusolverDnCreate, (void **handle))                                                                \
    F(int, cusolverDnDestroy, (void *handle))                                                                \
    F(int, cusolverDnSetStream, (void *handle, struct CUstream_st *stream))                                         \
    F(int, cusolverDnCreateParams, (void **params))                                                          \
    F(int, cusolverDnDestroyParams, (void *params))                                                          \
    F(int, cusolverDnXsyevBatched_bufferSize,                                                                \
      (void *handle, void *params, int vectors, int fill, int64_t n, int type_a, const void *a,              \
       int64_t leading, int type_w, const void *w, int compute, size_t *device_bytes, size_t *host_bytes,    \
       int64_t batch))                                                                                       \
    F(int, cusolverDnXsyevBatched,                                                                           \
      (void *handle, void *params, int vectors, int fill, int64_t n, int type_a, void *a, int64_t leading,   \
       int type_w, void *w, int compute, void *device, size_t device_bytes, void *host, size_t host_bytes,   \
       int *info, int64_t batch))

#define EXC_NV_MEMBER(result, name, arguments) result(*name) arguments;
struct Blas {
    EXC_BLAS_CALLS(EXC_NV_MEMBER)
};
struct Solver {
    EXC_SOLVER_CALLS(EXC_NV_MEMBER)
};
#undef EXC_NV_MEMBER

} // namespace nv

#endif
