/* libraries.c - products and eigenvectors by NVIDIA's libraries: there, absent, too old, incomplete, unwilling, failing.
 *
 * Libraries are looked for once in a process, so each case is a process of its own, which opens the module by itself. What it
 * meets are the stand-ins of kernels/cuda_on_host, whose settings are in standin.h; a log tells who has done the work. On a real
 * GPU's module the cases that need a stand-in's ill will are skipped. */
#include <fcntl.h>
#include <math.h>
#include <sys/wait.h>

#include "cudart.h"
#include "module.h"

static char log_path[64];
static bool emulated;

/* ------------------------------------------------------------------------------------------------------ what is run */

/* runs an op at once; where `captured`, once more from a graph that is launched twice, after `bytes` of what it wrote are lost */
static bool captured;
#define RUN(op, args, out, bytes) run(TWIN_STATUS(op, args), (ran_fn)(void (*)(void))twin.gpu->ops->op, args, out, bytes)
typedef exc_status (*ran_fn)(exc_queue *q, const void *args);

static exc_status run(exc_status st, ran_fn op, const void *args, void *out, size_t bytes) {
    void *stream = twin.gpu->queue.stream, *graph, *again;
    if (st != EXC_OK) return st;
    twin_ok(exc_device_sync(twin.gpu));
    if (!captured) return st;
    CUDA(capture_begin(stream, THIS_THREAD));
    st = op(&twin.gpu->queue, args);
    CUDA(capture_end(stream, &graph));
    CUDA(graph_make(&again, graph, 0));
    twin_ok(exc_device_zero(twin.gpu, out, bytes));
    for (int i = 0; i < 2; i++) CUDA(graph_launch(again, stream));
    twin_ok(exc_device_sync(twin.gpu));
    CUDA(run_destroy(again));
    CUDA(graph_destroy(graph));
    return st;
}

/* y = x W^T (+ bias + add): the twin's result, after a check against f64 */
static exc_status product(int act, int w_dtype, int64_t rows, int64_t n, int64_t k, bool extra, float *result) {
    size_t size = act == EXC_F32 ? 4 : 2;
    void *x = twin_acts(rows * k, 1, 1, act), *w = twin_acts(n * k, 2, 1, w_dtype);
    float *bias = twin_normals(n, 3, 1), *add = twin_normals(rows * n, 4, 1), *got = calloc((size_t)(rows * n), 4);
    struct exc_packed packed = {.n = n, .k = k, .dtype = w_dtype};
    void *panels = calloc(exc_packed_bytes(n, k, w_dtype), 1);
    packed.data = twin_up(panels, exc_packed_bytes(n, k, w_dtype));
    struct exc_pack_args p = {twin_up(w, (size_t)(n * k) * (w_dtype == EXC_F32 ? 4 : 2)), w_dtype, n, k, w_dtype, (void *)(uintptr_t)packed.data, NULL, 0};
    TWIN_RUN(pack, &p);
    struct exc_matmul_args a = {.x = twin_up(x, (size_t)(rows * k) * size), .x_stride = k, .act = act, .w = &packed, .y_stride = n, .rows = rows};
    a.y = twin_up(add, (size_t)(rows * n) * 4);
    if (extra) a.bias = twin_up(bias, (size_t)n * 4), a.add = a.y;
    exc_status st = RUN(matmul, &a, a.y, (size_t)(rows * n) * 4);
    if (st == EXC_OK) {
        twin_down(got, a.y, (size_t)(rows * n) * 4);
        for (int64_t t = 0; t < rows; t++)
            for (int64_t o = 0; o < n; o++) {
                double want = extra ? (double)bias[o] + (double)add[t * n + o] : 0, square = want * want;
                for (int64_t i = 0; i < k; i++) {
                    double u = act == EXC_F32 ? (double)((float *)x)[t * k + i] : (double)test_from_bf16(((uint16_t *)x)[t * k + i]);
                    double v = w_dtype == EXC_F32 ? (double)((float *)w)[o * k + i] : (double)test_from_bf16(((uint16_t *)w)[o * k + i]);
                    want += u * v, square += u * v * u * v;
                }
                /* k + 2 roundings of sums that a random walk keeps near the root of the sum of squares, as in dense.c */
                if (!(fabs((double)got[t * n + o] - want) <= 4 * sqrt((double)k + 2) * 0x1p-24 * sqrt(square)))
                    fail_msg("[%lld,%lld] = %.9g, want %.9g", (long long)t, (long long)o, (double)got[t * n + o], want);
            }
        if (result) memcpy(result, got, (size_t)(rows * n) * 4);
    }
    twin_done();
    free(x), free(w), free(bias), free(add), free(got), free(panels);
    return st;
}

/* Gram matrices against f64 sums; symmetric to the bit */
static void gram(int64_t layers, int64_t n, int64_t d, int side) {
    int64_t size = side == EXC_GRAM_SAMPLES ? n : d, depth = side == EXC_GRAM_SAMPLES ? d : n, step = d + 3;
    float *x = twin_normals(layers * n * step, 5, 1);
    double *got = calloc((size_t)(layers * size * size), 8);
    struct exc_gram_args a = {.layers = layers, .layer_stride = n * step, .samples = n, .row_stride = step, .width = d, .side = side};
    a.x = twin_up(x, (size_t)(layers * n * step) * 4);
    a.g = twin_up(got, (size_t)(layers * size * size) * 8);
    TWIN_RUN(gram, &a);
    twin_down(got, a.g, (size_t)(layers * size * size) * 8);
    for (int64_t l = 0; l < layers; l++)
        for (int64_t i = 0; i < size; i++)
            for (int64_t j = 0; j <= i; j += i > 20 ? 13 : 1) {
                double want = 0, most = 0;
                for (int64_t k = 0; k < depth; k++) {
                    const float *y = x + l * n * step;
                    double p = side == EXC_GRAM_SAMPLES ? (double)y[i * step + k] * (double)y[j * step + k] : (double)y[k * step + i] * (double)y[k * step + j];
                    want += p, most += fabs(p);
                }
                const double *g = got + l * size * size;
                assert_true(fabs(g[i * size + j] - want) <= (double)depth * 0x1p-53 * most);
                assert_memory_equal(&g[i * size + j], &g[j * size + i], 8);
            }
    twin_done();
    free(x), free(got);
}

/* planted directions are found, and what is returned has small residuals: whoever started it */
static exc_status subspace(int64_t layers, int64_t n, int64_t d, bool nan, float *basis_out) {
    enum { RANK = 3 };
    float *x = twin_normals(layers * n * d, 6, 0.3f), *basis = calloc((size_t)(layers * RANK * d), 4), singular[16 * RANK] = {0};
    double energy[16] = {0}, residual[16] = {0};
    for (int64_t i = 0; i < layers * n; i++)
        for (int r = 0; r < RANK; r++) x[i * d + 7 * r] += (float)(8 >> r) * test_normal(7 + (uint64_t)r, (uint64_t)i);
    if (nan) x[5] = NAN; /* of the first layer */
    struct exc_subspace_args a = {.x = twin_up(x, (size_t)(layers * n * d) * 4), .layers = layers, .layer_stride = n * d, .samples = n, .row_stride = d, .width = d, .rank = RANK};
    a.basis = twin_up(basis, (size_t)(layers * RANK * d) * 4);
    a.singular = twin_up(singular, sizeof singular);
    a.energy = twin_up(energy, sizeof energy);
    a.residual = twin_up(residual, sizeof residual);
    exc_status st = RUN(subspace, &a, a.basis, (size_t)(layers * RANK * d) * 4);
    if (st == EXC_OK) {
        twin_down(basis, a.basis, (size_t)(layers * RANK * d) * 4);
        twin_down(singular, a.singular, sizeof singular);
        twin_down(residual, a.residual, sizeof residual);
        twin_down(energy, a.energy, sizeof energy);
        for (int64_t l = nan; l < layers; l++) {
            assert_true(residual[l] <= 1e-6);
            for (int r = 0; r < RANK; r++) { /* |X v| is the singular value that goes with v */
                const float *v = basis + (l * RANK + r) * d;
                double sum = 0;
                for (int64_t i = 0; i < n; i++) {
                    double dot = 0;
                    for (int64_t k = 0; k < d; k++) dot += (double)x[(l * n + i) * d + k] * (double)v[k];
                    sum += dot * dot;
                }
                assert_true(fabs(sqrt(sum) - (double)singular[l * RANK + r]) <= 1e-5 * sqrt(sum));
                assert_true(fabsf(v[7 * r]) > 0.9f);
            }
        }
        if (nan) assert_true(isnan(energy[0]));
        if (basis_out) memcpy(basis_out, basis, (size_t)(layers * RANK * d) * 4);
    }
    twin_done();
    free(x), free(basis);
    return st;
}

/* ----------------------------------------------------------------------------------------------------- processes */

/* lines of the log that begin with `what` */
static int logged(const char *what) {
    char line[256];
    int n = 0;
    FILE *f = fopen(log_path, "r");
    while (f && fgets(line, sizeof line, f)) n += !strncmp(line, what, strlen(what));
    if (f) fclose(f);
    return n;
}

/* runs a case in a process of its own, with settings "NAME=VALUE" */
static void alone(void (*body)(void **state), const char *setting) {
    if (setting && !emulated) skip();
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (!child) {
        int code;
        char name[64];
        if (setting) {
            snprintf(name, sizeof name, "%.*s", (int)strcspn(setting, "="), setting);
            setenv(name, setting + strlen(name) + 1, 1);
        }
        unlink(log_path);
        setenv("HC_LIBRARY_LOG", log_path, 1);
        int quiet = open("/dev/null", O_WRONLY); /* cmocka's report of one case; a failure's text goes to stderr */
        dup2(quiet, STDOUT_FILENO);
        const struct CMUnitTest one[] = {{setting ? setting : "as it is", body, NULL, NULL, NULL}};
        code = cmocka_run_group_tests_name("libraries", one, twin_open, twin_close);
        unlink(log_path);
        exit(code);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) fail_msg("the case with %s failed (wait status %d)", setting ? setting : "no settings", status);
}

static void describes(const char *text) {
    char lines[2048];
    twin.gpu->module->libraries(lines, sizeof lines);
    if (!strstr(lines, text)) fail_msg("not in the description: %s\n%s", text, lines);
}

static void done_by(int products, int eigen) {
    if (!emulated) return;
    if (logged("product") != products || logged("eigen") != eigen)
        fail_msg("the libraries have done %d products and %d batches, not %d and %d", logged("product"), logged("eigen"), products, eigen);
}

/* --------------------------------------------------------------------------------------------------------- cases */

static void all_ops(void) {
    twin_ok(product(EXC_BF16, EXC_BF16, 65, 36, 40, false, NULL));
    gram(2, 97, 33, EXC_GRAM_SAMPLES);
    twin_ok(subspace(2, 130, 101, false, NULL));
}

static void served(void **state) {
    float *y[2] = {calloc(130 * 64, 4), calloc(130 * 64, 4)};
    if (emulated) {
        describes("cuBLASLt: 13.1.0, for dense products and Gram matrices");
        describes("cuSOLVER: 12.0.4, for subspaces of 97 to 1024");
    }
    /* k in two parts, added through the workspace; bias and add; the same bits again, from the plan that is kept */
    for (int i = 0; i < 2; i++) twin_ok(product(EXC_BF16, EXC_BF16, 130, 64, 544, true, y[i]));
    assert_memory_equal(y[0], y[1], 130 * 64 * 4);
    twin_ok(product(EXC_F32, EXC_F32, 70, 48, 36, false, NULL));
    twin_ok(product(EXC_F32, EXC_F32, 70, 20, 36, true, NULL));
    done_by(4, 0);
    gram(3, 97, 65, EXC_GRAM_SAMPLES);
    gram(2, 70, 131, EXC_GRAM_WIDTH);
    done_by(6, 0);
    float *basis[2] = {calloc(2 * 3 * 101, 4), calloc(2 * 3 * 101, 4)};
    for (int i = 0; i < 2; i++) twin_ok(subspace(2, 130, 101, false, basis[i]));
    assert_memory_equal(basis[0], basis[1], 2 * 3 * 101 * 4);
    twin_ok(subspace(1, 99, 240, false, NULL));
    done_by(9, 3);
    free(y[0]), free(y[1]), free(basis[0]), free(basis[1]);
}

/* what benches ask of the library: batches that share an operand, every transposition, D in bf16 and added to */
static void for_benches(void **state) {
    enum { M = 24, N = 16, K = 40, BATCH = 3 };
    const exc_module *m = twin.gpu->module;
    for (int turn = 0; turn < 4; turn++)
        for (int narrow = 0; narrow < 2; narrow++) {
            exc_library_product p = {.m = M, .n = N, .k = K, .turn_a = turn & 1, .turn_b = turn >> 1, .ldd = M, .batch = BATCH, .step_a = M * K, .step_d = M * N,
                                     .add = 1, .narrow = narrow};
            p.lda = p.turn_a ? K : M, p.ldb = p.turn_b ? N : K;
            uint16_t *a = twin_acts(BATCH * M * K, 1, 1, EXC_BF16), *b = twin_acts(N * K, 2, 1, EXC_BF16);
            void *d = twin_acts(BATCH * M * N, 3, 1, narrow ? EXC_BF16 : EXC_F32), *got = malloc(BATCH * M * N * 4);
            size_t bytes = (size_t)(BATCH * M * N) * (narrow ? 2 : 4);
            p.a = twin_up(a, BATCH * M * K * 2), p.b = twin_up(b, N * K * 2), p.d = twin_up(d, bytes);
            twin_ok(m->library_product(&twin.gpu->queue, &p));
            twin_down(got, p.d, bytes);
            for (int at = 0; at < BATCH * M * N; at++) {
                int layer = at / (M * N), j = at % (M * N) / M, i = at % M;
                double want = narrow ? (double)test_from_bf16(((uint16_t *)d)[at]) : (double)((float *)d)[at];
                for (int k = 0; k < K; k++)
                    want += (double)test_from_bf16(a[layer * M * K + (p.turn_a ? i * K + k : k * M + i)]) *
                            (double)test_from_bf16(b[p.turn_b ? k * N + j : j * K + k]);
                double is = narrow ? (double)test_from_bf16(((uint16_t *)got)[at]) : (double)((float *)got)[at];
                if (!(fabs(is - want) <= (narrow ? 0x1p-8 : 1e-6) * (fabs(want) + 8))) fail_msg("turn %d narrow %d [%d] = %g, want %g", turn, narrow, at, is, want);
            }
            twin_done();
            free(a), free(b), free(d), free(got);
        }
    done_by(8, 0);
}

static void none_for_benches(void **state) {
    exc_library_product p = {.m = 8, .n = 8, .k = 8, .lda = 8, .ldb = 8, .ldd = 8, .batch = 1};
    assert_int_equal(twin.gpu->module->library_product(&twin.gpu->queue, &p), EXC_ERR_INPUT);
}

/* the depth in two pieces; layers in two rounds, the second of which overlaps the first */
static void in_pieces(void **state) {
    if (twin_small()) return;
    gram(1, 96, 44000, EXC_GRAM_SAMPLES);
    done_by(2, 0);
    gram(5, 96, 11000, EXC_GRAM_SAMPLES);
    done_by(4, 0);
}

static void not_served(void **state) {
    twin_ok(product(EXC_BF16, EXC_BF16, 64, 64, 64, false, NULL));  /* few rows */
    twin_ok(product(EXC_BF16, EXC_BF16, 70, 63, 64, false, NULL));  /* rows of y at odd places */
    twin_ok(product(EXC_BF16, EXC_BF16, 70, 64, 36, false, NULL));  /* rows of x */
    twin_ok(product(EXC_F32, EXC_BF16, 70, 64, 64, false, NULL));   /* two dtypes */
    gram(1, 95, 20, EXC_GRAM_SAMPLES);
    twin_ok(subspace(1, 130, 95, false, NULL));
    done_by(0, 0);
    twin.gpu->queue.reproducible = 1;
    all_ops();
    done_by(0, 0);
}

/* more plans than a queue keeps, then the first again */
static void many_shapes(void **state) {
    int most = twin_small() ? 2 : 70;
    for (int i = 0; i < most; i++) twin_ok(product(EXC_BF16, EXC_BF16, 65 + i, 4, 8, i % 2, NULL));
    twin_ok(product(EXC_BF16, EXC_BF16, 65, 4, 8, false, NULL));
    done_by(most + 1, 0);
}

/* products are captured as they are; cuSOLVER is left out of a capture, where subspaces come from iteration */
static void in_a_graph(void **state) {
    cudart_open();
    captured = true;
    twin_ok(product(EXC_BF16, EXC_BF16, 70, 32, 544, false, NULL));
    done_by(3, 0);
    twin_ok(subspace(2, 130, 101, false, NULL));
    done_by(4, 1);
}

static void nan_among_samples(void **state) { twin_ok(subspace(2, 130, 101, true, NULL)); }

static void too_little_scratch(void **state) {
    twin_ok(exc_device_failed(twin.gpu, twin.gpu->module->resize(&twin.gpu->queue, 1 << 20), "resize"));
    struct exc_packed w = {.n = 8, .k = 8, .dtype = EXC_BF16, .data = (void *)(uintptr_t)4096};
    struct exc_matmul_args a = {.x = w.data, .x_stride = 8, .act = EXC_BF16, .w = &w, .y = (void *)(uintptr_t)4096, .y_stride = 8, .rows = 100};
    exc_status st = twin.gpu->ops->matmul(&twin.gpu->queue, &a);
    test_refused(twin.gpu, exc_device_failed(twin.gpu, st, "matmul"), EXC_ERR_MEMORY, "matmul: 32.0 MiB of device scratch needed", NULL);
}

static void nowhere(void **state) {
    describes("cuBLASLt: not used, neither libcublasLt.so.13 nor libcublasLt.so.12 was found in /nowhere; Excise's own tiles multiply");
    describes("cuSOLVER: not used, neither libcusolver.so.12 nor libcusolver.so.11 was found in /nowhere; subspaces come from power iteration");
    all_ops();
    done_by(0, 0);
}

static void too_old(void **state) {
    describes("cuBLASLt: not used, 11.6.9 is too old, 12.0 or later is needed;");
    describes("cuSOLVER: not used, 11.6.9 is too old, 11.7 or later is needed;");
    all_ops();
    done_by(0, 0);
}

static void no_handle(void **state) {
    describes("cuBLASLt: not used, 13.1.0: cublasLtCreate gave status 1;");
    all_ops();
    done_by(0, 1); /* the other library is not touched by it */
}

static void no_stream(void **state) {
    all_ops();
    describes("cuSOLVER: not used, 12.0.4: cusolverDnSetStream gave status 7;");
    done_by(2, 0);
}

static void no_algorithm(void **state) {
    all_ops();
    done_by(0, 1);
}

static void product_fails(void **state) {
    exc_status st = product(EXC_BF16, EXC_BF16, 65, 36, 40, false, NULL);
    test_refused(twin.gpu, exc_device_failed(twin.gpu, st, "matmul"), EXC_ERR_DEVICE, "matmul: GPU 0: cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED (13, cuBLASLt 13.1.0)", NULL);
}

static void search_fails(void **state) {
    exc_status st = product(EXC_BF16, EXC_BF16, 65, 36, 40, false, NULL);
    test_refused(twin.gpu, exc_device_failed(twin.gpu, st, "matmul"), EXC_ERR_DEVICE, "cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_INVALID_VALUE (7,", NULL);
}

static void eigen_fails(void **state) {
    exc_status st = subspace(2, 130, 101, false, NULL);
    test_refused(twin.gpu, exc_device_failed(twin.gpu, st, "subspace"), EXC_ERR_DEVICE, "subspace: GPU 0: cusolverDnXsyevBatched: CUSOLVER_STATUS_EXECUTION_FAILED (6, cuSOLVER 12.0.4)", NULL);
}

static void one_matrix_spoilt(void **state) {
    twin_ok(subspace(2, 130, 101, false, NULL));
    done_by(1, 1);
}

static void foreign(void **state) {
    describes("cuBLASLt: not used, it does not tell its version;");
    all_ops();
    done_by(0, 0);
}

/* a file of the right name that is another library */
static void others_file(void **state) {
    char folder[] = "/tmp/excise-libraries-XXXXXX", beside[PATH_MAX], path[64], target[PATH_MAX + 32], setting[128];
    const char *module = getenv("EXCISE_CUDA_MODULE");
    if (!emulated) skip();
    assert_non_null(realpath(module ? module : "/proc/self/exe", beside));
    assert_non_null(mkdtemp(folder));
    snprintf(target, sizeof target, "%s/libcudaonhost.so", dirname(beside));
    snprintf(path, sizeof path, "%s/libcublasLt.so.12", folder);
    assert_int_equal(symlink(target, path), 0);
    snprintf(setting, sizeof setting, "EXCISE_CUDA_LIBRARIES=%s", folder);
    alone(foreign, setting);
    unlink(path), rmdir(folder);
}

/* a newer file that will not do, and an older one that will */
static void older_serves(void **state) {
    char lines[2048];
    describes("cuBLASLt: 13.1.0, for dense products");
    describes("cuSOLVER: 12.0.4, for subspaces");
    all_ops();
    done_by(3, 1);
    twin.gpu->module->libraries(lines, sizeof lines);
    assert_null(strstr(lines, "not used"));
}

static void both_refuse(void **state) {
    describes("cuBLASLt: not used, it does not tell its version, 13.1.0: cublasLtCreate gave status 1;");
    all_ops();
    done_by(0, 1);
}

static void copy_file(const char *from, const char *to) {
    char bytes[1 << 16];
    FILE *in = fopen(from, "rb"), *out = fopen(to, "wb");
    assert_true(in && out);
    for (size_t n; (n = fread(bytes, 1, sizeof bytes, in)) > 0;) assert_int_equal(fwrite(bytes, 1, n, out), n);
    assert_int_equal(fclose(in) | fclose(out), 0);
}

static void in_a_folder(void (*body)(void **state), const char *newer_blas, const char *fails) {
    char folder[] = "/tmp/excise-libraries-XXXXXX", self[PATH_MAX], from[PATH_MAX + 64], path[4][64], setting[128];
    static const char *const names[][2] = {{"", "libcublasLt.so.13"}, {"libcublasLt.so.13", "libcublasLt.so.12"},
                                           {"libcusolver.so.12", "libcusolver.so.12"}, {"libcusolver.so.12", "libcusolver.so.11"}};
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (!emulated) skip();
    assert_true(n > 0);
    self[n] = 0;
    char *beside = dirname(self);
    assert_non_null(mkdtemp(folder));
    for (int i = 0; i < 4; i++) { /* copies: links would be one library */
        snprintf(from, sizeof from, "%s/libraries/%s", beside, i ? names[i][0] : newer_blas);
        snprintf(path[i], sizeof path[i], "%s/%s", folder, names[i][1]);
        copy_file(from, path[i]);
    }
    snprintf(setting, sizeof setting, "EXCISE_CUDA_LIBRARIES=%s", folder);
    setenv("HC_LIBRARY_FAILS", fails, 1);
    alone(body, setting);
    unsetenv("HC_LIBRARY_FAILS");
    for (int i = 0; i < 4; i++) unlink(path[i]);
    rmdir(folder);
}
static void newer_makes_no_handle(void **state) {
    in_a_folder(older_serves, "libcublasLt.so.13", "cublasLtCreate:1@libcublasLt.so.13");
    in_a_folder(older_serves, "libcublasLt.so.13", "cusolverDnCreateParams:7@libcusolver.so.12");
}
static void newer_is_incomplete(void **state) { in_a_folder(older_serves, "libcusolver.so.12", ""); }
static void neither_will_do(void **state) { in_a_folder(both_refuse, "libcusolver.so.12", "cublasLtCreate:1"); }

#define CASE(name, body, setting) static void name(void **state) { alone(body, setting); }
CASE(products_for_benches, for_benches, NULL)
CASE(no_product_for_benches, none_for_benches, "EXCISE_CUDA_LIBRARIES=/nowhere")
CASE(the_libraries_serve, served, NULL)
CASE(gram_in_pieces_and_rounds, in_pieces, NULL)
CASE(the_rest_is_ours, not_served, NULL)
CASE(plans_are_replaced, many_shapes, NULL)
CASE(captured_in_a_graph, in_a_graph, NULL)
CASE(nan_does_not_hang, nan_among_samples, NULL)
CASE(scratch_that_is_too_small, too_little_scratch, NULL)
CASE(absent, nowhere, "EXCISE_CUDA_LIBRARIES=/nowhere")
CASE(old, too_old, "HC_LIBRARY_VERSION=11.6.9")
CASE(blas_makes_no_handle, no_handle, "HC_LIBRARY_FAILS=cublasLtCreate:1")
CASE(solver_makes_no_handle, no_stream, "HC_LIBRARY_FAILS=cusolverDnSetStream:7")
CASE(no_algorithm_for_it, no_algorithm, "HC_LIBRARY_FAILS=cublasLtMatmulAlgoGetHeuristic:15")
CASE(a_search_that_fails, search_fails, "HC_LIBRARY_FAILS=cublasLtMatmulAlgoGetHeuristic:7")
CASE(a_product_that_fails, product_fails, "HC_LIBRARY_FAILS=cublasLtMatmul:13")
CASE(eigenvectors_that_fail, eigen_fails, "HC_LIBRARY_FAILS=cusolverDnXsyevBatched:6")
CASE(a_layer_without_eigenvectors, one_matrix_spoilt, "HC_SOLVER_SPOILS=0")

int main(void) {
    const char *module = getenv("EXCISE_CUDA_MODULE");
    emulated = !module || strstr(module, "emulated");
    snprintf(log_path, sizeof log_path, "/tmp/excise-libraries-%d.log", (int)getpid());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_libraries_serve),    cmocka_unit_test(gram_in_pieces_and_rounds),
        cmocka_unit_test(the_rest_is_ours),       cmocka_unit_test(plans_are_replaced),
        cmocka_unit_test(captured_in_a_graph),    cmocka_unit_test(nan_does_not_hang),
        cmocka_unit_test(scratch_that_is_too_small), cmocka_unit_test(products_for_benches),
        cmocka_unit_test(no_product_for_benches),
        cmocka_unit_test(absent),                 cmocka_unit_test(old),
        cmocka_unit_test(newer_makes_no_handle),  cmocka_unit_test(newer_is_incomplete),
        cmocka_unit_test(neither_will_do),
        cmocka_unit_test(others_file),            cmocka_unit_test(blas_makes_no_handle),
        cmocka_unit_test(solver_makes_no_handle), cmocka_unit_test(no_algorithm_for_it),
        cmocka_unit_test(a_search_that_fails),    cmocka_unit_test(a_product_that_fails),
        cmocka_unit_test(eigenvectors_that_fail), cmocka_unit_test(a_layer_without_eigenvectors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
