/* base.c - the ground floor: status table, error texts, events, memory, threads, small files, random numbers. */
#include "helpers.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static void status_codes(void **state)
{
    static const int want[] = {0, 1, 1, 1, 2, 3, 3, 130};
    for (int i = 0; i < 8; i++) {
        assert_int_equal(exc_status_exit((exc_status)i), want[i]);
        assert_string_not_equal(exc_status_name((exc_status)i), "unknown");
    }
    assert_string_equal(exc_status_name((exc_status)99), "unknown");
}

static void first_error_stays(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    assert_int_equal(exc_fail(ctx, EXC_ERR_INPUT, "a\nb %d", 1), EXC_ERR_INPUT);
    assert_int_equal(exc_fail(ctx, EXC_ERR_IO, "later"), EXC_ERR_IO);
    assert_string_equal(exc_ctx_error(ctx), "a b 1");
    exc_clear(ctx);
    assert_string_equal(exc_ctx_error(ctx), "");
    exc_ctx_free(ctx);
}

static void named_backend_is_never_replaced(void **state)
{
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    exc_ctx *ctx = NULL;
    opt.backend = "cuda";
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_ERR_DEVICE);
    assert_non_null(strstr(exc_ctx_error(ctx), "cuda"));
    exc_ctx_free(ctx);
    opt.backend = "abacus";
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_ERR_USAGE);
    exc_ctx_free(ctx);
    opt.backend = NULL;
    opt.threads = -1;
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_ERR_USAGE);
    exc_ctx_free(ctx);
}

static void add_task(void *arg, size_t task, int worker)
{
    _Atomic uint32_t *seen = arg;
    atomic_fetch_add(&seen[task], 1);
}

static void every_task_once(void **state)
{
    static _Atomic uint32_t seen[1000];
    for (int threads = 1; threads <= 5; threads++) {
        exc_ctx *ctx = test_ctx(threads);
        memset(seen, 0, sizeof seen);
        for (int round = 0; round < 400; round++) ctx->queue.parallel(&ctx->queue, (size_t)(round % 7) * 11, add_task, seen);
        for (int i = 0; i < 66; i++) {
            uint32_t want = 0;
            for (int round = 0; round < 400; round++) want += i < round % 7 * 11;
            assert_int_equal(seen[i], want);
        }
        exc_ctx_free(ctx);
    }
}

static int cancel_at_three(void *user, const exc_event *event)
{
    int *n = user;
    return event->kind == EXC_EVENT_PROGRESS && ++*n == 3;
}

static void callback_cancels(void **state)
{
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    int n = 0;
    opt.on_event = cancel_at_three;
    opt.user = &n;
    opt.threads = 1;
    exc_ctx *ctx = NULL;
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_OK);
    assert_int_equal(exc_progress(ctx, "step", 0, 3, "x"), EXC_OK);
    exc_info(ctx, "hello");
    assert_int_equal(exc_progress(ctx, "step", 1, 3, "x"), EXC_OK);
    assert_int_equal(exc_progress(ctx, "step", 2, 3, "x"), EXC_CANCELLED);
    exc_ctx_free(ctx);
}

static void allocation_failures_are_reported(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    assert_null(exc_alloc(ctx, SIZE_MAX / 2, 4, "huge"));
    assert_non_null(strstr(exc_ctx_error(ctx), "huge"));
    exc_clear(ctx);
    exc_alloc_fail_at(2);
    void *a = exc_alloc(ctx, 1, 1, "first");
    assert_non_null(a);
    assert_null(exc_alloc(ctx, 1, 1, "second"));
    assert_non_null(strstr(exc_ctx_error(ctx), "second"));
    exc_alloc_fail_at(0);
    exc_release(a);
    exc_ctx_free(ctx);
    /* a context whose creation fails at any allocation reports it and can be freed */
    for (uint64_t n = 1;; n++) {
        exc_ctx_options opt = EXC_CTX_OPTIONS;
        opt.threads = 3;
        exc_alloc_fail_at(n);
        exc_status st = exc_ctx_create(&opt, &ctx);
        exc_alloc_fail_at(0);
        exc_ctx_free(ctx);
        if (st == EXC_OK) break;
        assert_int_equal(st, EXC_ERR_MEMORY);
    }
}

static void utf8(void **state)
{
    static const struct { const char *s; size_t n; long bad; } cases[] = {
        {"abc", 3, -1}, {"\xc3\xa9", 2, -1}, {"\xe2\x82\xac", 3, -1}, {"\xf0\x9f\x98\x80", 4, -1},
        {"a\xff", 2, 1}, {"\xc0\xaf", 2, 0}, {"\xed\xa0\x80", 3, 0}, {"\xf4\x90\x80\x80", 4, 0}, {"ab\xe2\x82", 4, 2},
        {"\xf0\x9f\x98z", 4, 0}, {"", 0, -1},
    };
    for (size_t i = 0; i < EXC_COUNT(cases); i++) {
        size_t at = 99;
        assert_int_equal(exc_utf8_valid(cases[i].s, cases[i].n, &at), cases[i].bad < 0);
        if (cases[i].bad >= 0) assert_int_equal(at, cases[i].bad);
    }
    assert_string_equal(exc_show("a\x1b[1m\xff", 6), "a\\x1b[1m\\xff");
    assert_string_equal(exc_show("\xc3\xa9\xc2\x9b", 4), "\xc3\xa9\\xc2\\x9b");
}

static void files(void **state)
{
    exc_ctx *ctx = test_ctx(1);
    char *dir = test_tmpdir(), *data;
    size_t n;
    char *path = test_path(dir, "a");
    assert_int_equal(exc_write_file(ctx, path, "hello", 5, false), EXC_OK);
    test_refused(ctx, exc_write_file(ctx, path, "x", 1, false), EXC_ERR_USAGE, path, "--force", NULL);
    exc_clear(ctx);
    assert_int_equal(exc_write_file(ctx, path, "hello!", 6, true), EXC_OK);
    char *pipe = test_path(test_tmpdir(), "pipe"); /* what is no file is not replaced by one, whatever is forced */
    assert_int_equal(mkfifo(pipe, 0600), 0);
    test_refused(ctx, exc_write_file(ctx, pipe, "x", 1, true), EXC_ERR_USAGE, "device, pipe", NULL);
    exc_clear(ctx);
    assert_int_equal(exc_read_file(ctx, path, 0, &data, &n), EXC_OK);
    assert_int_equal(n, 6);
    assert_string_equal(data, "hello!");
    exc_release(data);
    test_refused(ctx, exc_read_file(ctx, path, 5, &data, &n), EXC_ERR_INPUT, "at most 5", "found 6", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_read_file(ctx, dir, 0, &data, &n), EXC_ERR_INPUT, "folder", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_read_file(ctx, test_path(dir, "none"), 0, &data, &n), EXC_ERR_IO, "none", NULL);
    exc_clear(ctx);
    char *fifo = test_path(dir, "fifo");
    assert_int_equal(mkfifo(fifo, 0600), 0);
    test_refused(ctx, exc_read_file(ctx, fifo, 0, &data, &n), EXC_ERR_INPUT, "special file", NULL);
    exc_clear(ctx);
    char hash[33], again[33];
    assert_int_equal(exc_hash_file(ctx, path, hash), EXC_OK);
    exc_hash_hex("hello!", 6, again);
    assert_string_equal(hash, again);
    char *joined;
    assert_int_equal(exc_path_join(ctx, "a/b//", "c", &joined), EXC_OK);
    assert_string_equal(joined, "a/b/c");
    exc_release(joined);
    exc_ctx_free(ctx);
}

static void random_numbers(void **state)
{
    /* mean and variance of 1e5 uniforms: 1/2 +- 5 sigma of the mean, 1/12 likewise */
    double sum = 0, sum2 = 0;
    for (int i = 0; i < 100000; i++) {
        double u = exc_random_unit(1, 2, (uint64_t)i);
        assert_true(u >= 0 && u < 1);
        sum += u;
        sum2 += u * u;
    }
    double mean = sum / 1e5, var = sum2 / 1e5 - mean * mean;
    assert_true(mean > 0.5 - 0.0046 && mean < 0.5 + 0.0046);
    assert_true(var > 1.0 / 12 - 0.0012 && var < 1.0 / 12 + 0.0012);
    assert_true(exc_random_u64(1, 2, 3) == exc_random_u64(1, 2, 3));
    assert_true(exc_random_u64(1, 2, 3) != exc_random_u64(2, 2, 3));
    assert_true(exc_random_u64(1, 2, 3) != exc_random_u64(1, 3, 3));
    assert_true(exc_random_u64(1, 2, 3) != exc_random_u64(1, 2, 4));
}

static void describe(void **state)
{
    exc_ctx *ctx = test_ctx(2);
    char *json = NULL;
    assert_int_equal(exc_ctx_describe(ctx, &json), EXC_OK);
    assert_non_null(strstr(json, "\"backend\":\"cpu\""));
    assert_non_null(strstr(json, "\"threads\":2"));
    exc_free(json);
    exc_ctx_free(ctx);
}

/* who names none gets the CPU where no GPU can be used, and is told why */
static int first_info(void *user, const exc_event *event)
{
    char *text = user;
    if (event->kind == EXC_EVENT_INFO && !*text) snprintf(text, 256, "%s", event->text);
    return 0;
}

static void no_backend_named(void **state)
{
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    char text[256] = "", *json = NULL;
    exc_ctx *ctx = NULL;
    opt.on_event = first_info;
    opt.user = text;
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_OK);
    assert_int_equal(exc_ctx_describe(ctx, &json), EXC_OK);
    assert_non_null(strstr(json, "\"backend\":\"cpu\""));
    assert_string_equal(exc_ctx_error(ctx), "");
    assert_memory_equal(text, "backend cuda is not used: /none.so: ", 36);
    exc_free(json);
    exc_ctx_free(ctx);
}

int main(void)
{
    setenv("EXCISE_CUDA_MODULE", "/none.so", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(status_codes),
        cmocka_unit_test(first_error_stays),
        cmocka_unit_test(named_backend_is_never_replaced),
        cmocka_unit_test(no_backend_named),
        cmocka_unit_test(every_task_once),
        cmocka_unit_test(callback_cancels),
        cmocka_unit_test(allocation_failures_are_reported),
        cmocka_unit_test(utf8),
        cmocka_unit_test(files),
        cmocka_unit_test(random_numbers),
        cmocka_unit_test(describe),
    };
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
