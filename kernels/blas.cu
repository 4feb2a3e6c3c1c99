/* blas.cu - products by cuBLASLt: the description of one, the algorithm for it, and the call.
 *
 * What it takes to run a product of one description (the library's descriptors, the algorithm that its search gives) is a
 * plan, and a queue keeps its last PLANS of them: searching takes the host longer than enqueuing does. Same bits for the same
 * shape: an algorithm either does not cut k into parts, or adds the parts' sums in a fixed order through the workspace, which
 * is the queue's own scratch, so that no other stream meets it. The search never sees an address: it is told that pointers
 * are multiples of 16 bytes and nothing more. */
#include "libraries.cuh"

#include <new>

struct Plan {
    Product product;
    void *desc, *a, *b, *d;
    nv::Algo algo;
    bool found;
    uint64_t used; /* when last; 0: an empty place */
};

namespace {

constexpr int PLANS = 64;
constexpr uint32_t ALIGNED = 16;

template <class T> int set(int (*setter)(void *, int, const void *, size_t), void *of, int attribute, const T &value) {
    return setter(of, attribute, &value, sizeof value);
}

/* the first status that is not success, and the call that gave it */
struct Chain {
    const char *call = nullptr;
    int status = nv::CUBLAS_STATUS_SUCCESS;
    bool operator()(const char *name, int got) {
        if (status == nv::CUBLAS_STATUS_SUCCESS && got != status) call = name, status = got;
        return status == nv::CUBLAS_STATUS_SUCCESS;
    }
    bool good() const { return status == nv::CUBLAS_STATUS_SUCCESS; }
};

int64_t type_of_sums(const Product &p) { return p.operand == nv::CUDA_R_64F ? nv::CUDA_R_64F : nv::CUDA_R_32F; }

void layout(const nv::Blas &l, Chain &chain, void **out, int64_t type, int64_t rows, int64_t cols, int64_t leading,
            int64_t batch, int64_t step) {
    if (!chain.good() || !chain("cublasLtMatrixLayoutCreate", l.cublasLtMatrixLayoutCreate(out, (int)type, (uint64_t)rows,
                                                                                          (uint64_t)cols, leading)))
        return;
    const auto setter = l.cublasLtMatrixLayoutSetAttribute;
    chain("cublasLtMatrixLayoutSetAttribute", set(setter, *out, nv::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (int32_t)batch));
    chain("cublasLtMatrixLayoutSetAttribute", set(setter, *out, nv::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, step));
}

void describe(const nv::Blas &l, Chain &chain, Plan &plan) {
    const Product &p = plan.product;
    const bool wide = p.operand == nv::CUDA_R_64F;
    const int compute = wide ? nv::CUBLAS_COMPUTE_64F : nv::CUBLAS_COMPUTE_32F;
    if (!chain("cublasLtMatmulDescCreate", l.cublasLtMatmulDescCreate(&plan.desc, compute, (int)type_of_sums(p)))) return;
    const auto setter = l.cublasLtMatmulDescSetAttribute;
    const char *call = "cublasLtMatmulDescSetAttribute";
    chain(call, set(setter, plan.desc, nv::CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)(p.turn_a ? nv::CUBLAS_OP_T : nv::CUBLAS_OP_N)));
    chain(call, set(setter, plan.desc, nv::CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)(p.turn_b ? nv::CUBLAS_OP_T : nv::CUBLAS_OP_N)));
    if (p.bias) { /* the search takes the alignment it may count on from the pointer's value */
        const void *somewhere = reinterpret_cast<const void *>((uintptr_t)ALIGNED);
        chain(call, set(setter, plan.desc, nv::CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)nv::CUBLASLT_EPILOGUE_BIAS));
        chain(call, set(setter, plan.desc, nv::CUBLASLT_MATMUL_DESC_BIAS_POINTER, somewhere));
    }
    layout(l, chain, &plan.a, p.operand, p.turn_a ? p.k : p.m, p.turn_a ? p.m : p.k, p.lda, p.batch, p.step_a);
    layout(l, chain, &plan.b, p.operand, p.turn_b ? p.n : p.k, p.turn_b ? p.k : p.n, p.ldb, p.batch, p.step_b);
    layout(l, chain, &plan.d, p.narrow ? p.operand : type_of_sums(p), p.m, p.n, p.ldd, p.batch, p.step_d);
}

void search(const Handles &h, Chain &chain, Plan &plan) {
    const nv::Blas &l = *h.blas;
    void *preference = nullptr;
    if (!chain.good() || !chain("cublasLtMatmulPreferenceCreate", l.cublasLtMatmulPreferenceCreate(&preference))) return;
    const auto setter = l.cublasLtMatmulPreferenceSetAttribute;
    const char *call = "cublasLtMatmulPreferenceSetAttribute";
    chain(call, set(setter, preference, nv::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)BLAS_WORKSPACE));
    chain(call, set(setter, preference, nv::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                    (uint32_t)nv::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    for (int which = nv::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES; which <= nv::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES; which++)
        chain(call, set(setter, preference, which, ALIGNED));
    nv::Found found = {};
    int count = 0;
    if (chain.good()) {
        const int status = l.cublasLtMatmulAlgoGetHeuristic(h.lt, plan.desc, plan.a, plan.b, plan.d, plan.d, preference, 1,
                                                            &found, &count);
        if (status != nv::CUBLAS_STATUS_NOT_SUPPORTED) chain("cublasLtMatmulAlgoGetHeuristic", status);
    }
    plan.found = chain.good() && count > 0 && found.state == nv::CUBLAS_STATUS_SUCCESS && found.workspace <= BLAS_WORKSPACE;
    plan.algo = found.algo;
    l.cublasLtMatmulPreferenceDestroy(preference);
}

void forget(const nv::Blas &l, Plan &plan) {
    if (plan.desc) l.cublasLtMatmulDescDestroy(plan.desc);
    for (void *matrix : {plan.a, plan.b, plan.d})
        if (matrix) l.cublasLtMatrixLayoutDestroy(matrix);
    plan = Plan();
}

} // namespace

struct Plans {
    uint64_t clock;
    Plan plan[PLANS];
};

void exc_plans_drop(Handles *h) {
    if (!h->plans) return;
    for (Plan &plan : h->plans->plan) forget(*h->blas, plan);
    delete h->plans;
    h->plans = nullptr;
}

const Plan *exc_product_plan(exc_queue *q, const Product &p, exc_status *st) {
    Handles *h = handles_of(q);
    *st = EXC_OK;
    if (!h || !h->blas) return nullptr;
    if (!h->plans) h->plans = new (std::nothrow) Plans();
    if (!h->plans) return *st = EXC_ERR_MEMORY, nullptr;
    Plan *oldest = h->plans->plan;
    for (Plan &plan : h->plans->plan) {
        if (plan.used && !memcmp(&plan.product, &p, sizeof p)) {
            plan.used = ++h->plans->clock;
            return plan.found ? &plan : nullptr;
        }
        if (plan.used < oldest->used) oldest = &plan;
    }
    forget(*h->blas, *oldest);
    *st = exc_enqueued(q, "cublasLtMatmulAlgoGetHeuristic", cudaSetDevice(q->device)); /* which it searches for */
    if (*st != EXC_OK) return nullptr;
    Chain chain;
    oldest->product = p;
    describe(*h->blas, chain, *oldest);
    search(*h, chain, *oldest);
    if (!chain.good()) {
        forget(*h->blas, *oldest);
        *st = exc_library_status(q, EXC_BLAS, chain.call, chain.status);
        return nullptr;
    }
    oldest->used = ++h->plans->clock;
    return oldest->found ? oldest : nullptr;
}

exc_status exc_product(exc_queue *q, const Plan *plan, const void *a, const void *b, const void *c, void *d,
                       const float *bias, void *workspace) {
    static const float one = 1, none = 0;
    static const double wide_one = 1, wide_none = 0;
    const Handles *h = handles_of(q);
    const Product &p = plan->product;
    const bool wide = p.operand == nv::CUDA_R_64F;
    const void *alpha = wide ? (const void *)&wide_one : &one, *beta = wide ? (const void *)(p.add ? &wide_one : &wide_none)
                                                                            : (p.add ? &one : &none);
    exc_status st = exc_enqueued(q, "cublasLtMatmul", cudaSetDevice(q->device));
    if (st == EXC_OK && p.bias)
        st = exc_library_status(q, EXC_BLAS, "cublasLtMatmulDescSetAttribute",
                                set(h->blas->cublasLtMatmulDescSetAttribute, plan->desc, nv::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias));
    if (st != EXC_OK) return st;
    return exc_library_status(q, EXC_BLAS, "cublasLtMatmul",
                              h->blas->cublasLtMatmul(h->lt, plan->desc, alpha, a, plan->a, b, plan->b, beta, p.add ? c : d,
                                                      plan->d, d, plan->d, &plan->algo, workspace, BLAS_WORKSPACE,
                                                      (cudaStream_t)q->stream));
}
