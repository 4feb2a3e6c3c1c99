/* berths.c - docks: arrays of the host reach an op on either backend, come back, and leave nothing behind.
 *
 * On the CPU no field may change (no copy is made); on a device every field points elsewhere while the dock is entered, and to
 * the host's array again afterwards. The kept block is used again, two docks at once have one each, and memory that runs
 * short takes it back. */
#include "module.h"
#include "study.h"
#include "twin.h"

#include <math.h>

static exc_ctx *both[2];

static int open_both(void **state) {
    exc_ctx_options o = EXC_CTX_OPTIONS;
    twin_open(state);
    both[0] = twin.cpu;
    o.backend = "cuda";
    o.threads = 2;
    assert_int_equal(exc_ctx_create(&o, &both[1]), EXC_OK);
    return 0;
}

static int close_both(void **state) {
    exc_ctx_free(both[1]);
    return twin_close(state);
}

/* x -> bf16, with what is not finite counted */
static exc_status narrow(exc_ctx *ctx, const float *x, int64_t n, uint16_t *y, int64_t *bad, int64_t *index) {
    struct exc_convert_args a = {.src = x, .src_dtype = EXC_F32, .dst = y, .dst_dtype = EXC_BF16, .n = n, .nonfinite = bad, .index = index};
    exc_dock d = {.ctx = ctx, .what = "numbers"};
    exc_dock_in(&d, &a.src, (size_t)n * sizeof *x);
    exc_dock_out(&d, &a.dst, (size_t)n * sizeof *y);
    exc_dock_out(&d, &a.nonfinite, sizeof *bad);
    exc_dock_out(&d, &a.index, sizeof *index);
    exc_status st = EXC_DOCK_CALL(&d, convert, &a);
    assert_ptr_equal(a.src, x);
    assert_ptr_equal(a.dst, y);
    assert_ptr_equal(a.nonfinite, bad);
    return st;
}

static void there_and_back(void **state) {
    static const int64_t sizes[] = {0, 1, 31, 33, 127, 5000};
    static float x[5000];
    static uint16_t y[2][5001];
    for (size_t i = 0; i < 5000; i++) x[i] = test_normal(7, i);
    x[30] = NAN;
    for (size_t s = 0; s < 6; s++) {
        int64_t bad[2] = {-1, -1}, index[2] = {-2, -2};
        for (int b = 0; b < 2; b++) {
            memset(y[b], 0xee, sizeof y[b]);
            assert_int_equal(narrow(both[b], x, sizes[s], y[b], &bad[b], &index[b]), EXC_OK);
        }
        assert_memory_equal(y[0], y[1], sizeof y[0]);
        assert_int_equal(bad[0], sizes[s] > 30);
        assert_int_equal(bad[1], bad[0]);
        assert_int_equal(index[1], index[0]);
    }
    for (int b = 0; b < 2; b++) assert_int_equal(narrow(both[b], x, 4, y[b], NULL, NULL), EXC_OK);
}

static void fields_turn(void **state) {
    for (int b = 0; b < 2; b++) {
        char one[300] = "one", two[8] = "two", *p = one, *q = two, *none = NULL, *kept = NULL;
        exc_dock d = {.ctx = both[b], .what = "texts"}, e = {.ctx = both[b], .what = "others"};
        exc_dock_both(&d, &p, sizeof one);
        exc_dock_both(&d, &none, 8);
        exc_dock_in(&e, &q, sizeof two);
        assert_int_equal(exc_dock_enter(&d), EXC_OK);
        assert_int_equal(exc_dock_enter(&e), EXC_OK);
        assert_null(none);
        assert_int_equal(p == one, b == 0);
        assert_int_equal(q == two, b == 0);
        assert_true(p + sizeof one <= q || q + sizeof two <= p);
        kept = p;
        assert_int_equal(exc_device_zero(both[b], p + 1, 1), EXC_OK);
        assert_int_equal(exc_device_zero(both[b], q, b), EXC_OK);
        assert_int_equal(exc_dock_leave(&e, EXC_OK), EXC_OK);
        assert_int_equal(exc_dock_leave(&d, EXC_OK), EXC_OK);
        assert_ptr_equal(p, one);
        assert_memory_equal(one, "o\0e", 4);
        assert_string_equal(two, "two"); /* in is not out */
        exc_dock_in(&e, &p, 3);
        assert_int_equal(exc_dock_enter(&e), EXC_OK);
        if (b) assert_ptr_equal(p, kept); /* the larger block stayed */
        assert_int_equal(exc_dock_leave(&e, EXC_ERR_NUMERIC), EXC_ERR_NUMERIC);
    }
}

static void what_fails(void **state) {
    float x[4] = {1, 2, 3, 4};
    uint16_t y[4];
    exc_ctx *gpu = both[1];
    for (uint64_t n = 1; n < 4; n++) { /* the list, then the block */
        exc_dock_drop(gpu);
        exc_alloc_fail_at(n);
        exc_status st = narrow(gpu, x, 4, y, NULL, NULL);
        exc_alloc_fail_at(0);
        if (n < 3) test_refused(gpu, st, EXC_ERR_MEMORY, "numbers: ", n == 1 ? "no memory" : "of device memory needed", NULL);
        else assert_int_equal(st, EXC_OK);
        exc_clear(gpu);
    }
    assert_int_equal(narrow(gpu, x, 4, y, NULL, NULL), EXC_OK);
    struct exc_convert_args odd = {.src = x, .src_dtype = EXC_I32, .dst = y, .dst_dtype = EXC_BF16, .n = 4};
    for (int b = 0; b < 2; b++) {
        exc_dock d = {.ctx = both[b], .what = "numbers"};
        exc_dock_in(&d, &odd.src, sizeof x);
        test_refused(both[b], EXC_DOCK_CALL(&d, convert, &odd), EXC_ERR_INPUT, "op convert", b ? "cuda" : "cpu", NULL);
        exc_clear(both[b]);
    }
    /* more arrays than the list begins with, and no memory for more of it */
    enum { MANY = 100 };
    for (int fails = 0; fails < 2; fails++) {
        char letters[MANY], back[MANY] = {0};
        exc_dock many = {.ctx = gpu, .what = "letters"};
        char *p[MANY];
        for (int i = 0; i < MANY; i++) {
            letters[i] = (char)i;
            p[i] = &back[i];
            exc_alloc_fail_at(fails && i == 64 ? 1 : 0); /* where the list grows */
            exc_dock_through(&many, &p[i], &letters[i], 1);
        }
        exc_status st = exc_dock_enter(&many);
        if (fails) test_refused(gpu, st, EXC_ERR_MEMORY, "letters: no memory", NULL);
        else assert_int_equal(exc_device_zero(gpu, p[3], 1), EXC_OK);
        assert_int_equal(exc_dock_leave(&many, st), st);
        letters[3] = 0;
        if (!fails) assert_memory_equal(back, letters, MANY);
        exc_clear(gpu);
    }
}

/* scratch of the op grows to what it asks for, and too little says so */
static void scratch(void **state) {
    enum { P = 40, E = 16 };
    uint32_t t[P * E], b[P * E];
    double out[2][5][E];
    for (int i = 0; i < P * E; i++) t[i] = (uint32_t)(i * 7 % 11), b[i] = (uint32_t)(i * 5 % 13);
    for (int k = 0; k < 2; k++) {
        struct exc_contrast_args a = {.target = t, .target_prompts = P, .baseline = b, .baseline_prompts = P, .stride = E, .experts = E, .top_k = 2, .alpha = 0.5, .resamples = 50, .seed = 1,
                                      .log_ratio = out[k][0], .se = out[k][1], .z = out[k][2], .p = out[k][3], .risk = out[k][4]};
        exc_dock d = {.ctx = both[k], .what = "counts"};
        exc_dock_in(&d, &a.target, sizeof t);
        exc_dock_in(&d, &a.baseline, sizeof b);
        double **f[] = {&a.log_ratio, &a.se, &a.z, &a.p, &a.risk};
        for (int i = 0; i < 5; i++) exc_dock_out(&d, f[i], sizeof out[k][0]);
        if (k) assert_int_equal(both[1]->module->resize(&both[1]->queue, 0), EXC_OK);
        assert_int_equal(EXC_DOCK_CALL(&d, contrast, &a), EXC_OK);
    }
    for (int f = 0; f < 5; f++)
        for (int i = 0; i < E; i++) assert_true(fabs(out[0][f][i] - out[1][f][i]) <= 1e-12 * (1 + fabs(out[0][f][i])));
}

/* an error of the device that stays: the op and the weight are named, nothing is written, and the context closes */
static exc_status breaks(exc_queue *q, const struct exc_project_args *a) {
    if (q->measuring) return EXC_OK;
    q->failed = 700; /* cudaErrorIllegalAddress */
    q->failed_at = "strips";
    return EXC_ERR_DEVICE;
}

static exc_status lost(exc_queue *q, void *host, const void *device, size_t bytes) {
    q->failed = 700;
    q->failed_at = "copy from the device";
    return EXC_ERR_DEVICE;
}

static void sticky_errors(void **state) {
    static const char text[] = "{\"excise_plan\":1,\"directions\":\"d\",\"edits\":[{\"op\":\"project\",\"role\":\"attn_out\"}]}";
    const char *dir = test_tmpdir(), *path = test_path(dir, "plan.json"), *out = test_path(dir, "out");
    exc_dirs d = {.rows = 5, .rank = 1, .hidden = 96, .options = (char *)(uintptr_t)"{}"};
    float basis[5 * 96] = {0}, zeros[5 * 96] = {0};
    for (int i = 0; i < 5; i++) basis[i * 96 + i] = 1;
    d.basis = basis;
    d.singular = zeros;
    d.mean_difference = zeros;
    assert_int_equal(exc_dirs_save(twin.cpu, &d, test_path(dir, "d"), 0), EXC_OK);
    test_write(path, text, strlen(text));
    for (int late = 0; late < 2; late++) {
        exc_ctx_options o = EXC_CTX_OPTIONS;
        exc_ctx *ctx;
        exc_plan *plan;
        o.backend = "cuda";
        assert_int_equal(exc_ctx_create(&o, &ctx), EXC_OK);
        struct exc_ops ops = *ctx->ops;
        exc_module module = *ctx->module;
        const exc_module *real = ctx->module;
        assert_int_equal(exc_plan_load(ctx, path, &plan), EXC_OK);
        ops.project = late ? ops.project : breaks;
        module.get = late ? lost : module.get;
        ctx->ops = &ops;
        ctx->module = &module;
        exc_status st = exc_apply(ctx, "tests/data/demo", plan, out, NULL, NULL);
        test_refused(ctx, st, EXC_ERR_DEVICE, "o_proj", "GPU 0", late ? "copy from the device" : "op project: GPU 0: strips: ", NULL);
        assert_int_equal(access(out, F_OK), -1);
        ctx->module = real;
        exc_plan_free(plan);
        exc_ctx_free(ctx);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(there_and_back), cmocka_unit_test(fields_turn), cmocka_unit_test(what_fails), cmocka_unit_test(scratch),
                                       cmocka_unit_test(sticky_errors)};
    return cmocka_run_group_tests_name("berths", tests, open_both, close_both);
}
