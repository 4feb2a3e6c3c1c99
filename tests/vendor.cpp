/* vendor.cpp - kernels/vendor.cuh and collectives.h against NVIDIA's own headers, and their names against the libraries where
 * those are installed.
 *
 * Built only where the headers are. Numbers are compared when this is compiled; so is every prototype: as many arguments, each
 * of the same size and, pointer or number, of the same kind. What is left to run is whether the libraries have the calls;
 * opening them needs no GPU. */
#include <cublasLt.h>
#include <cusolverDn.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <type_traits>

#if __has_include(<nccl.h>)
#include <nccl.h>
#endif

#include "collectives.h"
#include "vendor.cuh"

#define NUMBER(name, value) static_assert((int)::name == (value), #name " has another value");
EXC_NV_NUMBERS(NUMBER)

static_assert(sizeof(nv::Algo) == sizeof(cublasLtMatmulAlgo_t), "an algorithm is as large");
static_assert(sizeof(nv::Found) == sizeof(cublasLtMatmulHeuristicResult_t), "a result is as large");
#define PLACE(ours, theirs)                                                                                  \
    static_assert(offsetof(nv::Found, ours) == offsetof(cublasLtMatmulHeuristicResult_t, theirs), "a field of it lies elsewhere")
PLACE(workspace, workspaceSize);
PLACE(state, state);
PLACE(waves, wavesCount);

template <class A, class B>
constexpr bool alike = sizeof(A) == sizeof(B) && std::is_pointer<A>::value == std::is_pointer<B>::value;
template <class A, class B> struct Same : std::false_type {};
template <class RA, class... A, class RB, class... B>
struct Same<RA (*)(A...), RB (*)(B...)>
    : std::integral_constant<bool, sizeof...(A) == sizeof...(B) && alike<RA, RB>> {
    static_assert((alike<A, B> && ...), "an argument is of another kind");
};
#define PROTOTYPE(result, name, arguments)                                                                   \
    static_assert(Same<result(*) arguments, decltype(&::name)>::value, #name " has another prototype");
EXC_BLAS_CALLS(PROTOTYPE)
EXC_SOLVER_CALLS(PROTOTYPE)

#ifdef NCCL_VERSION_CODE
static_assert((int)ncclSuccess == EXC_NCCL_SUCCESS && (int)ncclInvalidArgument == EXC_NCCL_INVALID_ARGUMENT &&
              (int)ncclInvalidUsage == EXC_NCCL_INVALID_USAGE &&
              (int)ncclRemoteError == EXC_NCCL_REMOTE && (int)ncclInProgress == EXC_NCCL_IN_PROGRESS, "a status of NCCL has another value");
static_assert((int)ncclInt8 == EXC_NCCL_BYTES, "a type of NCCL has another value");
static_assert(NCCL_CONFIG_UNDEF_INT == INT_MIN && offsetof(ncclConfig_t, blocking) == offsetof(exc_nccl_config, blocking) &&
              offsetof(ncclConfig_t, version) == offsetof(exc_nccl_config, version), "NCCL's configuration begins otherwise");
#define NCCL_PROTOTYPE(name, arguments) static_assert(Same<int(*) arguments, decltype(&::name)>::value, #name " has another prototype");
EXC_NCCL_CALLS(NCCL_PROTOTYPE)
#endif

static int number, failed;

static void has_all(const char *file, const char *const *names, size_t count) {
    char path[256];
    void *library = dlopen(file, RTLD_LAZY | RTLD_LOCAL);
    snprintf(path, sizeof path, "/usr/local/cuda/lib64/%s", file);
    if (!library) library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    number++;
    if (!library) {
        printf("ok %d - the calls of %s # SKIP it is not installed\n", number, file);
        return;
    }
    size_t there = 0;
    for (size_t i = 0; i < count; i++) {
        if (dlsym(library, names[i])) there++;
        else printf("# %s has no %s\n", file, names[i]);
    }
    failed |= there != count;
    printf("%sok %d - the calls of %s\n", there == count ? "" : "not ", number, file);
}

int main() {
#define NCCL_NAME(name, arguments) #name,
    static const char *const nccl[] = {EXC_NCCL_CALLS(NCCL_NAME)};
    has_all(EXC_NCCL_FILE, nccl, sizeof nccl / sizeof *nccl);
#define NAME(result, name, arguments) #name,
    static const char *const blas[] = {EXC_BLAS_CALLS(NAME)}, *const solver[] = {EXC_SOLVER_CALLS(NAME)};
    printf("ok %d - numbers and prototypes are those of the headers\n", ++number);
    has_all("libcublasLt.so.13", blas, sizeof blas / sizeof *blas);
    has_all("libcusolver.so.12", solver, sizeof solver / sizeof *solver);
    printf("1..%d\n", number);
    return failed;
}
