/* libraries.cuh - NVIDIA's libraries, found when the program runs: cuBLASLt for dense products, cuSOLVER for eigenvectors.
 *
 * The module links neither. A queue opens cuBLASLt with itself (libraries.cu); cuSOLVER, whose handle costs half a second and
 * device memory, is opened by the first measuring of subspace. Where one is missing, too old or refuses a shape, our own
 * kernels do the work, and exc_libraries_describe() says which and why. What a call returns as an error is the op's error.
 *
 * What the libraries' documentation promises and we rely on: cuBLASLt only enqueues, can be captured in a graph, and
 * allocates nothing where it is handed its workspace; searching an algorithm is work of the host alone. Of cuSOLVER's dense
 * routines no such promise about capture is made: on a stream that is being captured it is not called. Only names that the
 * two lists below hold are used; both are checked against NVIDIA's headers where those are installed (tests/vendor.cpp). */
#ifndef EXC_LIBRARIES_CUH
#define EXC_LIBRARIES_CUH

#include "cuda.cuh"

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
       const nv::Algo *algo, void *workspace, size_t bytes, cudaStream_t stream))

#define EXC_SOLVER_CALLS(F)                                                                                  \
    F(int, cusolverGetProperty, (int type, int *value))                                                      \
    F(int, cusolverDnCreate, (void **handle))                                                                \
    F(int, cusolverDnDestroy, (void *handle))                                                                \
    F(int, cusolverDnSetStream, (void *handle, cudaStream_t stream))                                         \
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

/* ---------------------------------------------------------------------------------------------- libraries.cu */

/* what a queue holds of the libraries (queue->module); absent ones are NULL */
struct Plans;
struct Handles {
    const nv::Blas *blas;
    void *lt;
    Plans *plans; /* of blas.cu */
    const nv::Solver *solver;
    void *dense, *params; /* cuSOLVER's */
    void *host;           /* workspace of the host that cuSOLVER asks for */
    size_t host_bytes;
};
static inline Handles *handles_of(const exc_queue *q) { return static_cast<Handles *>(q->module); }

exc_status exc_libraries_open(exc_queue *q); /* cuBLASLt where it can be used; fails only without memory */
void exc_libraries_close(exc_queue *q);
void exc_libraries_solver(exc_queue *q); /* cuSOLVER where it can be used: allocates, so for measuring calls only */
/* a line for each library: its version and what it does here, or why it is not used and what does the work instead */
void exc_libraries_describe(char *text, size_t bytes);

/* a status of a library as an op's; the first failure of a queue is kept with its place, as exc_enqueued() does */
enum { EXC_BLAS = 1, EXC_SOLVER = 2 };
exc_status exc_library_status(exc_queue *q, int library, const char *call, int status);
const char *exc_library_error(int failed); /* text of such a failure; NULL: it is CUDA's */

/* --------------------------------------------------------------------------------------------------- blas.cu */

constexpr size_t BLAS_WORKSPACE = (size_t)32 << 20; /* what NVIDIA recommends for Hopper */

/* D [m,n] = op(A) op(B) (+ C) (+ bias [m] to every column), column-major as the library has it; C lies as D does and may be D.
 * operand: type of A and B (nv::CUDA_R_16BF, _32F or _64F); sums and D are f64 for f64 operands, else f32. */
struct Product {
    int64_t operand, m, n, k;
    int64_t turn_a, turn_b; /* op is transposition */
    int64_t lda, ldb, ldd;
    int64_t batch, step_a, step_b, step_d;
    int64_t add, bias;
};
struct Plan;
void exc_plans_drop(Handles *h);
/* how the library does it, kept for the next time; NULL: it is not here or has no way, or *st is an error. Pointers that
 * exc_product() will get must be multiples of 16. */
const Plan *exc_product_plan(exc_queue *q, const Product &p, exc_status *st);
/* enqueues; workspace: BLAS_WORKSPACE bytes of device memory */
exc_status exc_product(exc_queue *q, const Plan *plan, const void *a, const void *b, const void *c, void *d,
                       const float *bias, void *workspace);

#endif
