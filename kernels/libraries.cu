/* libraries.cu - finds NVIDIA's libraries, checks their versions, and gives queues their handles.
 *
 * A library is looked for once in a process: in the folder that EXCISE_CUDA_LIBRARIES names and nowhere else, or, without
 * that, as every program's libraries are, then in /usr/local/cuda; the newest first. A file that is there but too old,
 * incomplete or makes no handle (a driver older than it) counts as absent, what stands in the way is kept, and the next is tried. The CUDA of the host (cuda_on_host) takes only what the
 * variable names: real libraries would ask for a real driver. */
#include "libraries.cuh"

#include <cstdarg>
#include <dlfcn.h>
#include <mutex>
#include <new>

namespace {

struct Library {
    const char *title;
    const char *files[2];
    int major, minor; /* the least */
    const char *property;
    const char *serves, *without;
    void **calls; /* the table that open() fills */
    const char *const *names;
    size_t count;
    int next; /* place to look at: files, and folders within */
    bool here, used; /* used: it has made a handle, so there is no other choice any more */
    int version[3];
    char why[512]; /* files were refused */
};

#define NAME(result, name, arguments) #name,
const char *const blas_names[] = {EXC_BLAS_CALLS(NAME)};
const char *const solver_names[] = {EXC_SOLVER_CALLS(NAME)};
#undef NAME
union {
    nv::Blas table;
    void *calls[sizeof(nv::Blas) / sizeof(void *)];
} blas;
union {
    nv::Solver table;
    void *calls[sizeof(nv::Solver) / sizeof(void *)];
} solver;

std::mutex guard; /* of all below */
Library libraries[] = {
    {"cuBLASLt", {"libcublasLt.so.13", "libcublasLt.so.12"}, 12, 0, "cublasLtGetProperty",
     "dense products and Gram matrices", "Excise's own tiles multiply", blas.calls, blas_names,
     sizeof blas_names / sizeof *blas_names, 0, false, false, {}, ""},
    /* XsyevBatched came with 11.7.1 */
    {"cuSOLVER", {"libcusolver.so.12", "libcusolver.so.11"}, 11, 7, "cusolverGetProperty",
     "subspaces of 97 to 1024 samples or channels", "subspaces come from power iteration", solver.calls, solver_names,
     sizeof solver_names / sizeof *solver_names, 0, false, false, {}, ""}};

constexpr int FOLDERS = 2, PLACES = 2 * FOLDERS;

void *at(const Library &l, int place) {
    const char *folder = getenv("EXCISE_CUDA_LIBRARIES"), *file = l.files[place / FOLDERS];
    const bool named = folder && *folder, first = place % FOLDERS == 0;
    char path[4096];
#ifdef __CUDACC__
    if (!named && first) return dlopen(file, RTLD_LAZY | RTLD_LOCAL);
    if (!named) folder = "/usr/local/cuda/lib64";
#endif
    if (!folder || (named && !first)) return nullptr;
    snprintf(path, sizeof path, "%s/%s", folder, file);
    return dlopen(path, RTLD_LAZY | RTLD_LOCAL);
}

/* keeps what stands in the way of a file, once */
bool refuse(Library &l, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool refuse(Library &l, const char *format, ...) {
    char text[256];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    const size_t n = strlen(l.why);
    if (!strstr(l.why, text)) snprintf(l.why + n, sizeof l.why - n, "%s%s", n ? ", " : "", text);
    return false;
}

bool complete(Library &l, void *object) {
    for (size_t i = 0; i < l.count; i++) {
        l.calls[i] = dlsym(object, l.names[i]);
        if (!l.calls[i]) return refuse(l, "%d.%d.%d has no %s", l.version[0], l.version[1], l.version[2], l.names[i]);
    }
    return true;
}

bool new_enough(Library &l, void *object) {
    int (*property)(int, int *);
    void *symbol = dlsym(object, l.property);
    memcpy(&property, &symbol, sizeof property);
    for (int i = nv::MAJOR_VERSION; i <= nv::PATCH_LEVEL; i++)
        if (!property || property(i, &l.version[i]) != 0) return refuse(l, "it does not tell its version");
    if (l.version[0] > l.major || (l.version[0] == l.major && l.version[1] >= l.minor)) return true;
    return refuse(l, "%d.%d.%d is too old, %d.%d or later is needed", l.version[0], l.version[1], l.version[2], l.major,
                  l.minor);
}

/* under `guard`; a library once opened stays to the end of the process */
bool opened(Library &l) {
    while (!l.here && l.next < PLACES) {
        void *object = at(l, l.next++);
        if (!object) continue;
        l.here = new_enough(l, object) && complete(l, object);
        if (!l.here) dlclose(object);
    }
    return l.here;
}

/* It cannot make a handle: whatever else it can, not on this machine. Perhaps another one can, but where this one has made
 * some its calls are in use, and there is no other. */
void unwilling(Library &l, const char *call, int status) {
    l.here = false;
    if (l.used) l.next = PLACES;
    refuse(l, "%d.%d.%d: %s gave status %d", l.version[0], l.version[1], l.version[2], call, status);
}

/* why there is none */
const char *reason(const Library &l, char *text, size_t bytes) {
    const char *folder = getenv("EXCISE_CUDA_LIBRARIES");
    const bool named = folder && *folder;
    if (*l.why) return l.why;
    snprintf(text, bytes, "neither %s nor %s was found%s%s", l.files[0], l.files[1],
             named ? " in " : ", EXCISE_CUDA_LIBRARIES may name their folder", named ? folder : "");
    return text;
}

/* names of cuSOLVER's statuses; it has no call for that */
const char *solver_status(int status) {
    static const char *const names[] = {"SUCCESS",          "NOT_INITIALIZED", "ALLOC_FAILED",
                                        "INVALID_VALUE",    "ARCH_MISMATCH",   "MAPPING_ERROR",
                                        "EXECUTION_FAILED", "INTERNAL_ERROR",  "MATRIX_TYPE_NOT_SUPPORTED",
                                        "NOT_SUPPORTED"};
    return status >= 0 && status < (int)(sizeof names / sizeof *names) ? names[status] : "?";
}

constexpr int LIBRARY_CODE = 1 << 20; /* above every number of cudaError_t */

} // namespace

exc_status exc_libraries_open(exc_queue *q) {
    std::lock_guard<std::mutex> lock(guard);
    Handles *h = new (std::nothrow) Handles();
    q->module = h;
    if (!h) return EXC_ERR_MEMORY;
    for (Library &l = libraries[0]; !h->blas && opened(l);) {
        const int status = blas.table.cublasLtCreate(&h->lt);
        if (status == nv::CUBLAS_STATUS_SUCCESS) h->blas = &blas.table, l.used = true;
        else unwilling(l, "cublasLtCreate", status);
    }
    return EXC_OK;
}

void exc_libraries_solver(exc_queue *q) {
    Handles *h = handles_of(q);
    std::lock_guard<std::mutex> lock(guard);
    if (!h) return;
    cudaSetDevice(q->device);
    for (Library &l = libraries[1]; !h->solver && opened(l);) {
        const nv::Solver &s = solver.table;
        const char *call = "cusolverDnCreate";
        int status = s.cusolverDnCreate(&h->dense);
        if (status == nv::CUSOLVER_STATUS_SUCCESS) {
            call = "cusolverDnSetStream";
            status = s.cusolverDnSetStream(h->dense, (cudaStream_t)q->stream);
            if (status == nv::CUSOLVER_STATUS_SUCCESS) {
                call = "cusolverDnCreateParams";
                status = s.cusolverDnCreateParams(&h->params);
            }
            if (status != nv::CUSOLVER_STATUS_SUCCESS) s.cusolverDnDestroy(h->dense);
        }
        if (status == nv::CUSOLVER_STATUS_SUCCESS) h->solver = &s, l.used = true;
        else unwilling(l, call, status);
    }
}

void exc_libraries_close(exc_queue *q) {
    Handles *h = handles_of(q);
    q->module = nullptr;
    if (!h) return;
    if (h->blas) {
        exc_plans_drop(h);
        h->blas->cublasLtDestroy(h->lt);
    }
    if (h->solver) {
        h->solver->cusolverDnDestroyParams(h->params);
        h->solver->cusolverDnDestroy(h->dense);
    }
    free(h->host);
    delete h;
}

void exc_libraries_describe(char *text, size_t bytes) {
    std::lock_guard<std::mutex> lock(guard);
    size_t at = 0;
    text[0] = 0;
    for (Library &l : libraries) {
        const char *line = at ? "\n" : "";
        char none[512];
        int n = opened(l) ? snprintf(text + at, bytes - at, "%s%s: %d.%d.%d, for %s", line, l.title, l.version[0], l.version[1],
                                     l.version[2], l.serves)
                          : snprintf(text + at, bytes - at, "%s%s: not used, %s; %s", line, l.title, reason(l, none, sizeof none), l.without);
        if (n < 0 || (size_t)n >= bytes - at) break;
        at += (size_t)n;
    }
    for (char *c = text; *c; c++)
        if (*c == '"' || *c == '\\' || ((unsigned char)*c < ' ' && *c != '\n')) *c = ' '; /* lines are quoted in JSON */
}

exc_status exc_library_status(exc_queue *q, int library, const char *call, int status) {
    if (status == 0) return EXC_OK;
    if (!q->failed) q->failed = library * LIBRARY_CODE + status, q->failed_at = call;
    return EXC_ERR_DEVICE;
}

const char *exc_library_error(int failed) {
    static thread_local char text[128];
    const int library = failed / LIBRARY_CODE, status = failed % LIBRARY_CODE;
    if (library != EXC_BLAS && library != EXC_SOLVER) return nullptr;
    const int *v = libraries[library - 1].version;
    if (library == EXC_BLAS)
        snprintf(text, sizeof text, "%s (%d, cuBLASLt %d.%d.%d)", blas.table.cublasLtGetStatusName(status), status, v[0],
                 v[1], v[2]);
    else
        snprintf(text, sizeof text, "CUSOLVER_STATUS_%s (%d, cuSOLVER %d.%d.%d)", solver_status(status), status, v[0], v[1],
                 v[2]);
    return text;
}
