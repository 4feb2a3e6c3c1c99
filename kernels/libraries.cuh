/* libraries.cuh - NVIDIA's libraries, found when the program runs: cuBLASLt for dense products, cuSOLVER for eigenvectors.
 *
 * The module links neither. A queue opens cuBLASLt with itself (libraries.cu); cuSOLVER, whose handle costs half a second and
 * device memory, is opened by the first measuring of subspace. Where one is missing, too old or refuses a shape, our own
 * kernels do the work, and exc_libraries_describe() says which and why. What a call returns as an error is the op's error.
 *
 * What the libraries' documentation promises and we rely on: cuBLASLt only enqueues, can be captured in a graph, and
 * allocates nothing where it is handed its workspace; searching an algorithm is work of the host alone. Of cuSOLVER's dense
 * routines no such promise about capture is made: on a stream that is being captured it is not called. */
#ifndef EXC_LIBRARIES_CUH
#define EXC_LIBRARIES_CUH

#include "cuda.cuh"
#include "vendor.cuh"

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
/* a line for each library, "NAME: ..": its version and what it is for, or why it is not used and what does the work instead */
void exc_libraries_describe(char *text, size_t bytes);

/* a status of a library as an op's; the first failure of a queue is kept with its place, as exc_enqueued() does */
enum { EXC_BLAS = 1, EXC_SOLVER = 2 };
exc_status exc_library_status(exc_queue *q, int library, const char *call, int status);
const char *exc_library_error(int failed); /* text of such a failure; NULL: it is CUDA's */

/* --------------------------------------------------------------------------------------------------- blas.cu */

constexpr size_t BLAS_WORKSPACE = (size_t)32 << 20; /* what NVIDIA recommends for Hopper */

/* D [m,n] = op(A) op(B) (+ C) (+ bias [m] to every column), column-major as the library has it; C lies as D does and may be D.
 * operand: type of A and B (nv::CUDA_R_16BF, _32F or _64F); sums and D are f64 for f64 operands, else f32, but where `narrow`
 * C and D are bf16 as their operands are. */
struct Product {
    int64_t operand, m, n, k;
    int64_t turn_a, turn_b; /* op is transposition */
    int64_t lda, ldb, ldd;
    int64_t batch, step_a, step_b, step_d;
    int64_t add, bias, narrow;
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
