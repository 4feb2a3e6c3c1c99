/* twins.c - the .cu twins of the row-wise ops against their CPU definitions, which the other suites check against f64.
 *
 * Sizes are odd on purpose, arrays lie between guard bytes, and the same cases run under several thread orders (HC_SEED),
 * with eager streams (HC_DEFER=0), with guarded pages (HC_GUARD=1) and under sanitizers: CMakeLists.txt lists the runs. */
#include "twin.h"

#include <math.h>

static float *normals(size_t n, uint64_t seed, float scale) {
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = scale * test_normal(seed, i);
    return x;
}

/* ---------------------------------------------------------------------------------------------------------------- norm */

static void norm_rows(void **state) {
    static const int64_t shapes[][2] = {{0, 8}, {1, 1}, {5, 31}, {3, 128}, {33, 64}, {2, 1027}, {3, 2048}, {127, 36}};
    for (size_t s = 0; s < EXC_COUNT(shapes); s++)
        for (int variant = 0; variant < 8; variant++) {
            int act = variant & 1 ? EXC_BF16 : EXC_F32, centred = variant >> 1 & 1, wide = variant >> 2;
            int64_t rows = shapes[s][0], dim = shapes[s][1], xs = dim + (wide ? 5 : 0), ys = dim + (wide ? 4 : 0);
            size_t size = act == EXC_BF16 ? 2 : 4, nx = (size_t)(rows * xs), bytes = (size_t)(rows * ys) * size;
            float *x = normals(nx, s + 1, 3), *w = normals((size_t)dim, 99, 1);
            char *want = calloc(bytes + 1, 1), *got = calloc(bytes + 1, 1);
            if (rows > 2) x[2 * xs] = NAN;
            struct exc_norm_args a = {x, xs, w, centred, 1e-6f, rows, dim, want, ys, act}, d = a;
            d.x = twin_up_at(x, nx * 4, wide ? 4 : 0);
            d.weight = twin_up(w, (size_t)dim * 4);
            d.y = twin_up(want, bytes);
            assert_int_equal(exc_cpu_norm(&twin.cpu->queue, &a), EXC_OK);
            TWIN_RUN(norm, &d);
            twin_down(got, d.y, bytes);
            /* a sum of dim squares in another order: sqrt(dim) ulp at worst, half of it after the root */
            if (act == EXC_F32) twin_close_f32((float *)got, (float *)want, (size_t)(rows * ys), 8e-6, 0, "norm");
            else twin_close_bf16((uint16_t *)got, (uint16_t *)want, (size_t)(rows * ys), 1, 100, "norm");
            twin_done();
            free(x), free(w), free(want), free(got);
        }
}

static void norm_refuses(void **state) {
    struct exc_norm_args a = {.rows = -1, .dim = 4, .act = EXC_F32};
    assert_int_equal(TWIN_STATUS(norm, &a), EXC_ERR_USAGE);
    a = (struct exc_norm_args){.rows = 0, .dim = 4, .act = EXC_F16};
    assert_int_equal(TWIN_STATUS(norm, &a), EXC_ERR_USAGE);
}

/* ---------------------------------------------------------------------------------------------------------- memory, device */

static void memory_round_trip(void **state) {
    char data[1000], back[1000];
    void *p, *q;
    for (size_t i = 0; i < sizeof data; i++) data[i] = (char)i;
    exc_ctx *both[] = {twin.cpu, twin.gpu};
    for (int i = 0; i < 2; i++) {
        exc_ctx *c = both[i];
        assert_int_equal(exc_device_alloc(c, 1000, 1, "a", &p), EXC_OK);
        assert_int_equal(exc_device_alloc(c, 1000, 1, "b", &q), EXC_OK);
        assert_int_equal(exc_device_put(c, p, data, 1000), EXC_OK);
        assert_int_equal(exc_device_copy(c, q, p, 1000), EXC_OK);
        assert_int_equal(exc_device_zero(c, (char *)q + 10, 5), EXC_OK);
        assert_int_equal(exc_device_get(c, back, q, 1000), EXC_OK);
        assert_int_equal(exc_device_sync(c), EXC_OK);
        assert_memory_equal(back, data, 10);
        assert_memory_equal(back + 10, "\0\0\0\0\0", 5);
        assert_memory_equal(back + 15, data + 15, 985);
        exc_device_release(c, p);
        exc_device_release(c, q);
        exc_device_release(c, NULL);
    }
}

static void out_of_memory_says_how_much(void **state) {
    void *p;
    exc_status st = exc_device_alloc(twin.gpu, (size_t)1 << 50, 1, "weights of layer 3", &p);
    test_refused(twin.gpu, st, EXC_ERR_MEMORY, "weights of layer 3", "1024.0 TiB of device memory needed", "free on GPU 0", NULL);
    assert_null(p);
    exc_clear(twin.gpu);
    st = exc_device_alloc(twin.gpu, SIZE_MAX / 2, 3, "weights", &p);
    test_refused(twin.gpu, st, EXC_ERR_MEMORY, "more than memory can address", NULL);
    exc_clear(twin.gpu);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_rows),
        cmocka_unit_test(norm_refuses),
        cmocka_unit_test(memory_round_trip),
        cmocka_unit_test(out_of_memory_says_how_much),
    };
    return cmocka_run_group_tests_name("twins", tests, twin_open, twin_close);
}
