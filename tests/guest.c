/* guest.c - a small CUDA pipeline that uses the library: it brings its own device memory and its own stream, routes tokens, observes
 * experts, edits their weights and projects outputs through the public calls alone, first one by one, then captured once in
 * a CUDA graph and replayed, observing switched on the device. What comes back is what the CPU backend makes of the same arrays. */
#include <math.h>

#include "cudart.h"

enum { T = 37, E = 12, K = 3, H = 64, I = 40, R = 2 };

static struct guest {
    float logits[T * E], y[T * H], basis[R * H], strength[E], weights[T * K];
    uint16_t w[E * H * I], mid[T * K * I];
    int32_t ids[T * K], enabled;
    int64_t count[E];
    double gate[E], sum[E * I];
} host, there_back, *there; /* there: in device memory */

static exc_gate gate = EXC_GATE;

static int open_runtime(void **state) { return twin_open(state) || cudart_open(); }

#define OK(call)                                                                                                       \
    do {                                                                                                               \
        exc_status st_ = (call);                                                                                       \
        if (st_ != EXC_OK) fail_msg("%s: %s", #call, exc_ctx_error(ctx));                                              \
    } while (0)

static void fill(struct guest *g) {
    memset(g, 0, sizeof *g);
    for (int i = 0; i < T * E; i++) g->logits[i] = test_normal(1, (uint64_t)i);
    for (int i = 0; i < T * H; i++) g->y[i] = test_normal(2, (uint64_t)i);
    for (int i = 0; i < E * H * I; i++) g->w[i] = test_bf16(test_normal(3, (uint64_t)i));
    for (int i = 0; i < T * K * I; i++) g->mid[i] = test_bf16(test_normal(4, (uint64_t)i));
    for (int i = 0; i < E; i++) g->strength[i] = i % 3 ? 1.0f : 0.0f;
    g->basis[5] = 1; /* two directions of the stream */
    g->basis[H + 9] = 1;
    gate.renorm = 1;
}

/* the guest's step: everything on its stream */
static void work(exc_ctx *ctx, struct guest *g) {
    OK(exc_route(ctx, &gate, g->logits, NULL, T, E, K, g->ids, g->weights));
    OK(exc_observe(ctx, g->ids, g->weights, g->mid, EXC_BF16, T, E, K, I, g->count, g->gate, g->sum));
    OK(exc_edit_experts(ctx, g->w, EXC_BF16, E, H, I, g->basis, R, g->strength, EXC_NORM_NONE, NULL));
    OK(exc_edit_matrix(ctx, g->w, EXC_BF16, H, I, g->basis, 1, 0.5f, EXC_NORM_NONE, NULL));
    OK(exc_project_output(ctx, g->y, T, H, g->basis, R, 0.25f));
}

static void same(const struct guest *got, const struct guest *want) {
    assert_memory_equal(got->ids, want->ids, sizeof got->ids);
    assert_memory_equal(got->count, want->count, sizeof got->count);
    assert_memory_equal(got->w, want->w, sizeof got->w); /* the canonical tree: the same bits */
    twin_close_f32(got->weights, want->weights, T * K, 4e-6, 0, "weights");
    twin_close_f32(got->y, want->y, T * H, 4e-6, 4e-6, "y");
    for (int i = 0; i < E; i++) assert_true(fabs(got->gate[i] - want->gate[i]) <= 1e-5 * fabs(want->gate[i]));
    for (int i = 0; i < E * I; i++)
        if (!(fabs(got->sum[i] - want->sum[i]) <= 1e-5 * (1 + fabs(want->sum[i])))) fail_msg("mid_sum[%d] = %g, want %g", i, got->sum[i], want->sum[i]);
}

static exc_ctx *open_guest(void *stream) {
    exc_ctx_options o = EXC_CTX_OPTIONS;
    exc_ctx *ctx = NULL;
    o.backend = "cuda";
    o.stream = stream;
    o.work_bytes = (size_t)4 << 20;
    if (exc_ctx_create(&o, &ctx) != EXC_OK) fail_msg("context: %s", exc_ctx_error(ctx));
    return ctx;
}

static void calls_on_the_callers_stream(void **state) {
    void *stream;
    CUDA(stream_create(&stream, OWN_STREAM));
    CUDA(malloc((void **)&there, sizeof *there));
    exc_ctx *ctx = open_guest(stream);
    fill(&host);
    CUDA(copy(there, &host, sizeof host, TO_DEVICE, stream));
    work(ctx, there); /* no wait in between */
    CUDA(copy(&there_back, there, sizeof host, TO_HOST, stream));
    CUDA(stream_wait(stream));
    exc_ctx_free(ctx); /* the stream stays the guest's */
    work(twin.cpu, &host);
    same(&there_back, &host);
    CUDA(stream_wait(stream));
    CUDA(stream_destroy(stream));
    CUDA(free(there));
}

static void replayed_from_a_graph(void **state) {
    void *stream;
    void *graph;
    void *run;
    CUDA(stream_create(&stream, OWN_STREAM));
    CUDA(malloc((void **)&there, sizeof *there));
    exc_ctx *ctx = open_guest(stream);
    CUDA(capture_begin(stream, THIS_THREAD));
    work(ctx, there);
    CUDA(capture_end(stream, &graph));
    CUDA(graph_make(&run, graph, 0));
    for (int round = 0; round < 2; round++) {
        fill(&host);
        for (int i = 0; i < T * E; i++) host.logits[i] += (float)round * test_normal(9, (uint64_t)i);
        CUDA(copy(there, &host, sizeof host, TO_DEVICE, stream));
        CUDA(graph_launch(run, stream));
        CUDA(copy(&there_back, there, sizeof host, TO_HOST, stream));
        CUDA(stream_wait(stream));
        work(twin.cpu, &host);
        same(&there_back, &host);
    }
    CUDA(run_destroy(run));
    CUDA(graph_destroy(graph));
    exc_ctx_free(ctx);
    CUDA(stream_destroy(stream));
    CUDA(free(there));
}

/* the switch lies on the device: a graph made once adds or does not */
static void observing_off_and_on(void **state) {
    void *stream, *graph, *run;
    CUDA(stream_create(&stream, OWN_STREAM));
    CUDA(malloc((void **)&there, sizeof *there));
    exc_ctx *ctx = open_guest(stream);
    OK(exc_observe_when(ctx, &there->enabled));
    CUDA(capture_begin(stream, THIS_THREAD));
    work(ctx, there);
    CUDA(capture_end(stream, &graph));
    CUDA(graph_make(&run, graph, 0));
    for (int32_t on = 0; on < 2; on++) {
        fill(&host);
        host.enabled = on;
        CUDA(copy(there, &host, sizeof host, TO_DEVICE, stream));
        CUDA(graph_launch(run, stream));
        CUDA(copy(&there_back, there, sizeof host, TO_HOST, stream));
        CUDA(stream_wait(stream));
        OK(exc_observe_when(twin.cpu, &host.enabled));
        work(twin.cpu, &host);
        OK(exc_observe_when(twin.cpu, NULL));
        same(&there_back, &host);
        int64_t counted = 0;
        for (int e = 0; e < E; e++) counted += there_back.count[e];
        assert_int_equal(counted > 0, on);
    }
    CUDA(run_destroy(run));
    CUDA(graph_destroy(graph));
    exc_ctx_free(ctx);
    CUDA(stream_destroy(stream));
    CUDA(free(there));
}

static void refusals(void **state) {
    exc_ctx *ctx = open_guest(NULL);
    test_refused(ctx, exc_route(ctx, &gate, NULL, NULL, 1, 4, 2, NULL, NULL), EXC_ERR_USAGE, "logits is NULL", NULL);
    exc_ctx_free(ctx);
    exc_ctx_options o = EXC_CTX_OPTIONS;
    o.backend = "cuda";
    o.device = 1000;
    assert_int_equal(exc_ctx_create(&o, &ctx), EXC_ERR_USAGE);
    assert_non_null(strstr(exc_ctx_error(ctx), "GPU"));
    exc_ctx_free(ctx);
    /* scratch that is too small is said with what is needed */
    o.device = 0;
    o.work_bytes = 256;
    assert_int_equal(exc_ctx_create(&o, &ctx), EXC_OK);
    CUDA(malloc((void **)&there, sizeof *there));
    exc_status st = exc_observe(ctx, there->ids, there->weights, there->mid, EXC_BF16, T, E, K, I, there->count, there->gate, there->sum);
    assert_int_equal(st, EXC_ERR_MEMORY);
    assert_non_null(strstr(exc_ctx_error(ctx), "needed"));
    CUDA(free(there));
    exc_ctx_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(calls_on_the_callers_stream), cmocka_unit_test(replayed_from_a_graph), cmocka_unit_test(observing_off_and_on), cmocka_unit_test(refusals)};
    return cmocka_run_group_tests(tests, open_runtime, twin_close);
}
