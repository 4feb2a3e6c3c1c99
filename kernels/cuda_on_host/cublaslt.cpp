/* cublaslt.cpp - a stand-in for cuBLASLt: products by plain loops, in stream order, arguments checked as the real one does.
 *
 * Its algorithm cuts k in two where the caller allows sums through the workspace and k is 512 or more, and then wants that
 * workspace; it may be used for the problem it was found for and no other, and it needs the alignment that was promised to the
 * search. Types that go together: bf16 operands to bf16 or f32, f32 to f32, f64 to f64. What it does not know is an invalid value. */
#include "standin.h"

#include <vector>

EXC_BLAS_CALLS(HC_EXPORT)

using namespace nv;

namespace {

using hc::as;
using hc::drop;

enum : uint32_t { HANDLE = 0x4c740001, DESC, LAYOUT, PREFERENCE, ALGO };
struct Handle {
    uint32_t kind = HANDLE;
};
struct Desc {
    uint32_t kind = DESC;
    int compute, scale;
    int32_t turn_a = CUBLAS_OP_N, turn_b = CUBLAS_OP_N;
    uint32_t epilogue = 1;
    const void *bias = nullptr;
};
struct Layout {
    uint32_t kind = LAYOUT;
    int type;
    uint64_t rows, cols;
    int64_t leading;
    int32_t batch = 1;
    int64_t step = 0;
    bool operator==(const Layout &o) const {
        return type == o.type && rows == o.rows && cols == o.cols && leading == o.leading && batch == o.batch && step == o.step;
    }
};
struct Preference {
    uint32_t kind = PREFERENCE;
    uint64_t workspace = 0;
    uint32_t reduction = 7, alignment[4] = {256, 256, 256, 256};
};
struct Chosen { /* lies in nv::Algo */
    uint32_t kind, parts, alignment;
    uint64_t workspace, problem;
};
static_assert(sizeof(Chosen) <= sizeof(Algo), "an algorithm is 64 bytes");

template <class T> int put(T &to, const void *value, size_t bytes) {
    if (!value || bytes != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

size_t size_of(int type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }
double wide(double x) { return x; }
float wide(float x) { return x; }
float wide(bf16 x) { return widen(x); }
void put_number(double *to, double x) { *to = x; }
void put_number(float *to, float x) { *to = x; }
void put_number(bf16 *to, float x) { *to = narrow<bf16>(x); }

/* a problem whose parts fit together, or the status that says otherwise */
struct Problem {
    const Desc *desc;
    const Layout *a, *b, *c, *d;
    int64_t m, n, k;
    int status;
    Problem(void *op, void *la, void *lb, void *lc, void *ld)
        : desc(as<Desc>(op, DESC)), a(as<Layout>(la, LAYOUT)), b(as<Layout>(lb, LAYOUT)), c(as<Layout>(lc, LAYOUT)),
          d(as<Layout>(ld, LAYOUT)), status(CUBLAS_STATUS_INVALID_VALUE) {
        if (!desc || !a || !b || !c || !d) return;
        m = (int64_t)d->rows, n = (int64_t)d->cols, k = (int64_t)(desc->turn_a ? a->rows : a->cols);
        const bool fits = (int64_t)(desc->turn_a ? a->cols : a->rows) == m && (int64_t)(desc->turn_b ? b->rows : b->cols) == n &&
                          (int64_t)(desc->turn_b ? b->cols : b->rows) == k && c->rows == d->rows && c->cols == d->cols &&
                          a->batch == d->batch && b->batch == d->batch && c->batch == d->batch;
        if (!fits) return;
        const bool wide = a->type == CUDA_R_64F;
        const int sums = wide ? CUDA_R_64F : CUDA_R_32F;
        const bool known = a->type == b->type && c->type == d->type && (d->type == sums || (d->type == CUDA_R_16BF && a->type == CUDA_R_16BF)) &&
                           desc->scale == sums && desc->compute == (wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F) &&
                           !(desc->epilogue == CUBLASLT_EPILOGUE_BIAS && d->type != CUDA_R_32F);
        status = known ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
    }
    uint64_t number() const {
        uint64_t h = 1469598103934665603u;
        const int64_t all[] = {m, n, k, desc->turn_a, desc->turn_b, desc->epilogue, a->type, d->type, a->leading, b->leading, c->leading,
                               d->leading, d->batch, a->step, b->step, d->step};
        for (int64_t v : all) h = (h ^ (uint64_t)v) * 1099511628211u;
        return h;
    }
};

/* bytes from the first to behind the last element of all matrices of a batch */
size_t extent(const Layout &l) {
    return ((size_t)((l.batch - 1) * l.step) + (l.cols - 1) * (size_t)l.leading + l.rows) * size_of(l.type);
}

struct Run {
    Desc desc;
    Layout a, b, c, d;
    int64_t m, n, k, parts;
    double alpha, beta;
    const void *pa, *pb, *pc;
    void *pd, *workspace;

    template <class T, class S> S dot(int64_t batch, int64_t i, int64_t j, int64_t from, int64_t to) const {
        const int64_t step_a = desc.turn_a ? 1 : a.leading, step_b = desc.turn_b ? b.leading : 1;
        const T *x = static_cast<const T *>(pa) + batch * a.step + i * (desc.turn_a ? a.leading : 1);
        const T *y = static_cast<const T *>(pb) + batch * b.step + j * (desc.turn_b ? 1 : b.leading);
        S sum = 0;
        for (int64_t at = from; at < to; at++) sum += (S)wide(x[at * step_a]) * (S)wide(y[at * step_b]);
        return sum;
    }
    template <class T, class S, class R> void one(int64_t batch, int64_t i, int64_t j) const {
        S total = 0;
        for (int64_t part = 0; part < parts; part++) total += dot<T, S>(batch, i, j, part * k / parts, (part + 1) * k / parts);
        total = (S)alpha * total;
        if (beta != 0) total += (S)beta * wide(static_cast<const R *>(pc)[batch * c.step + j * c.leading + i]);
        if (desc.epilogue == CUBLASLT_EPILOGUE_BIAS) total += static_cast<const S *>(desc.bias)[i];
        put_number(static_cast<R *>(pd) + batch * d.step + j * d.leading + i, total);
    }
    template <class T, class S, class R> void all() const {
        for (int64_t batch = 0; batch < d.batch; batch++)
            for (int64_t j = 0; j < n; j++)
                for (int64_t i = 0; i < m; i++) one<T, S, R>(batch, i, j);
    }
    void operator()() const {
        if (parts > 1) memset(workspace, 0x5a, (size_t)(m * n) * 4); /* it is the library's to spoil */
        if (a.type == CUDA_R_64F) all<double, double, double>();
        else if (a.type == CUDA_R_32F) all<float, float, float>();
        else if (d.type == CUDA_R_32F) all<bf16, float, float>();
        else all<bf16, float, bf16>();
        hc::log_line("product", m, n, k, d.batch);
    }
};

} // namespace

int cublasLtGetProperty(int type, int *value) {
    if (!value || type < 0 || type > PATCH_LEVEL) return CUBLAS_STATUS_INVALID_VALUE;
    *value = hc::part_of_version(type, {13, 1, 0});
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasLtGetStatusName(int status) {
    return status == CUBLAS_STATUS_SUCCESS            ? "CUBLAS_STATUS_SUCCESS"
           : status == CUBLAS_STATUS_NOT_INITIALIZED  ? "CUBLAS_STATUS_NOT_INITIALIZED"
           : status == CUBLAS_STATUS_INVALID_VALUE    ? "CUBLAS_STATUS_INVALID_VALUE"
           : status == CUBLAS_STATUS_EXECUTION_FAILED ? "CUBLAS_STATUS_EXECUTION_FAILED"
           : status == CUBLAS_STATUS_NOT_SUPPORTED    ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                                      : "<unknown>";
}

int cublasLtCreate(void **handle) {
    HC_FAILS(cublasLtCreate);
    *handle = new Handle;
    return CUBLAS_STATUS_SUCCESS;
}
int cublasLtDestroy(void *handle) { return drop<Handle>(handle, HANDLE, CUBLAS_STATUS_INVALID_VALUE); }

int cublasLtMatmulDescCreate(void **desc, int compute, int scale_type) {
    Desc *d = new Desc;
    d->compute = compute, d->scale = scale_type;
    *desc = d;
    return CUBLAS_STATUS_SUCCESS;
}
int cublasLtMatmulDescDestroy(void *desc) { return drop<Desc>(desc, DESC, CUBLAS_STATUS_INVALID_VALUE); }
int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t bytes) {
    Desc *d = as<Desc>(desc, DESC);
    if (!d) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return put(d->turn_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return put(d->turn_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return put(d->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return put(d->bias, value, bytes);
    default: return CUBLAS_STATUS_INVALID_VALUE;
    }
}

int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t cols, int64_t leading) {
    if (!rows || !cols || leading < (int64_t)rows) return CUBLAS_STATUS_INVALID_VALUE;
    Layout *l = new Layout;
    l->type = type, l->rows = rows, l->cols = cols, l->leading = leading;
    *layout = l;
    return CUBLAS_STATUS_SUCCESS;
}
int cublasLtMatrixLayoutDestroy(void *layout) { return drop<Layout>(layout, LAYOUT, CUBLAS_STATUS_INVALID_VALUE); }
int cublasLtMatrixLayoutSetAttribute(void *layout, int attribute, const void *value, size_t bytes) {
    Layout *l = as<Layout>(layout, LAYOUT);
    if (!l) return CUBLAS_STATUS_INVALID_VALUE;
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) return put(l->batch, value, bytes);
    if (attribute == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) return put(l->step, value, bytes);
    return CUBLAS_STATUS_INVALID_VALUE;
}

int cublasLtMatmulPreferenceCreate(void **preference) {
    *preference = new Preference;
    return CUBLAS_STATUS_SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(void *preference) { return drop<Preference>(preference, PREFERENCE, CUBLAS_STATUS_INVALID_VALUE); }
int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t bytes) {
    Preference *p = as<Preference>(preference, PREFERENCE);
    if (!p) return CUBLAS_STATUS_INVALID_VALUE;
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return put(p->workspace, value, bytes);
    if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) return put(p->reduction, value, bytes);
    const int operand = attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    return operand >= 0 && operand < 4 ? put(p->alignment[operand], value, bytes) : CUBLAS_STATUS_INVALID_VALUE;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   Found *found, int *count) {
    HC_FAILS(cublasLtMatmulAlgoGetHeuristic);
    const Preference *p = as<Preference>(preference, PREFERENCE);
    const Problem problem(desc, a, b, c, d);
    if (!as<Handle>(handle, HANDLE) || !p || wanted < 1 || !found || !count) return CUBLAS_STATUS_INVALID_VALUE;
    *count = 0;
    if (problem.status != CUBLAS_STATUS_SUCCESS) return problem.status;
    uint32_t alignment = 16;
    for (uint32_t promised : p->alignment) alignment = promised < alignment ? promised : alignment;
    const bool bias = problem.desc->epilogue == CUBLASLT_EPILOGUE_BIAS;
    if (alignment < 16 || (bias && (uintptr_t)problem.desc->bias % 16)) return CUBLAS_STATUS_NOT_SUPPORTED;
    const uint64_t partial = (uint64_t)(problem.m * problem.n * problem.d->batch) * 4;
    const bool cut = p->reduction & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE && problem.k >= 512 && partial <= p->workspace;
    const Chosen chosen = {ALGO, cut ? 2u : 1u, alignment, cut ? partial : 0, problem.number()};
    *found = Found();
    memcpy(&found->algo, &chosen, sizeof chosen);
    found->workspace = chosen.workspace;
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmul(void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const Algo *algo, void *workspace,
                   size_t bytes, cudaStream_t stream) {
    HC_FAILS(cublasLtMatmul);
    static const char call[] = "cublasLtMatmul";
    const Problem p(desc, a_layout, b_layout, c_layout, d_layout);
    if (!as<Handle>(handle, HANDLE) || !alpha || !beta || !algo) return CUBLAS_STATUS_INVALID_VALUE;
    if (p.status != CUBLAS_STATUS_SUCCESS) return p.status;
    Chosen chosen;
    memcpy(&chosen, algo, sizeof chosen);
    if (chosen.kind != ALGO || chosen.problem != p.number()) return CUBLAS_STATUS_NOT_SUPPORTED;
    const bool bias = p.desc->epilogue == CUBLASLT_EPILOGUE_BIAS;
    for (const void *pointer : {a, b, c, (const void *)d, bias ? p.desc->bias : nullptr})
        if ((uintptr_t)pointer % chosen.alignment) return CUBLAS_STATUS_INVALID_VALUE;
    if (bytes < chosen.workspace || (chosen.workspace && (!workspace || (uintptr_t)workspace % 256))) return CUBLAS_STATUS_INVALID_VALUE;
    if (c == d && !(*p.c == *p.d)) return CUBLAS_STATUS_INVALID_VALUE; /* in place: of one layout */
    const bool wide = p.d->type == CUDA_R_64F;
    Run run = {*p.desc, *p.a, *p.b, *p.c, *p.d, p.m, p.n, p.k, (int64_t)chosen.parts, 0, 0, a, b, c, d, workspace};
    run.alpha = wide ? *static_cast<const double *>(alpha) : (double)*static_cast<const float *>(alpha);
    run.beta = wide ? *static_cast<const double *>(beta) : (double)*static_cast<const float *>(beta);
    hc::check_extent(call, 1, a, extent(*p.a), stream);
    hc::check_extent(call, 2, b, extent(*p.b), stream);
    if (run.beta != 0) hc::check_extent(call, 3, c, extent(*p.c), stream);
    hc::check_extent(call, 4, d, extent(*p.d), stream);
    if (bias) hc::check_extent(call, 5, p.desc->bias, (size_t)p.m * size_of(p.d->type), stream);
    if (bytes) hc::check_extent(call, 6, workspace, bytes, stream);
    hc::enqueue(stream, run);
    return CUBLAS_STATUS_SUCCESS;
}
