/* folder.c - a model folder as a hostile or careless hand left it: indexes that name absent files, paths,
 * other kinds of files or the wrong shard; duplicates; links, pipes and folders where files should be; both
 * layouts at once; broken configs. And the good ones: links as the hub's cache has them, and 700 GB of shards
 * answered from their headers. */
#include "helpers.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"

static exc_ctx *ctx;
static char *dir;

#define T(more) "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]" more "}"

static char *folder; /* of the case in work */

static void shard(const char *name, const char *tensor) {
    char header[256];
    int n = snprintf(header, sizeof header, "{\"%s\":" T("") "}", tensor);
    uint8_t all[512] = {(uint8_t)n};
    memcpy(all + 8, header, (size_t)n);
    test_write(test_path(folder, name), all, 8 + (size_t)n + 4);
}

#define INDEX "model.safetensors.index.json"

static void fresh(const char *index) {
    folder = test_path(dir, "m");
    char *text;
    assert_true(asprintf(&text, "rm -rf '%s'", folder) > 0);
    assert_int_equal(test_shell(text, NULL), 0);
    free(text);
    assert_int_equal(mkdir(folder, 0700), 0);
    static char kept[1024];
    snprintf(kept, sizeof kept, "%s", folder);
    folder = kept;
    test_write(test_path(folder, "config.json"), "{}", 2);
    if (index) test_write(test_path(folder, INDEX), index, strlen(index));
}

static void opens(const char *id, const char *fragment) {
    exc_checkpoint *c = NULL;
    exc_clear(ctx);
    exc_status st = exc_checkpoint_open(ctx, folder, &c);
    if (!fragment && st) fail_msg("%s: expected acceptance, found: %s", id, exc_ctx_error(ctx));
    if (fragment && st != EXC_ERR_INPUT)
        fail_msg("%s: status %s: %s", id, exc_status_name(st), exc_ctx_error(ctx));
    if (fragment && !strstr(exc_ctx_error(ctx), fragment))
        fail_msg("%s: no \"%s\" in: %s", id, fragment, exc_ctx_error(ctx));
    for (size_t i = 0; c && i < c->n_tensors; i++)
        assert_ptr_equal(exc_checkpoint_find(c, c->by_name[i]->name), c->by_name[i]);
    exc_checkpoint_close(c);
}

#define MAP(entries) "{\"metadata\":{\"total_size\":8},\"weight_map\":{" entries "}}"
#define A "\"a\":\"model-00001-of-00002.safetensors\""
#define B "\"b\":\"model-00002-of-00002.safetensors\""

static const struct {
    const char *id, *index, *fragment;
} index_rows[] = {
    {"X00", MAP(A "," B), NULL},
    {"X03", "", INDEX},
    {"X04", "not json", INDEX},
    {"X05", "\xef\xbb\xbf" MAP(A "," B), INDEX},
    {"X06", "[]", "weight_map"},
    {"X07", "{\"metadata\":{}}", "weight_map"},
    {"X08", "{\"weight_map\":null}", "weight_map"},
    {"X08b", "{\"weight_map\":[]}", "weight_map"},
    {"X08c", "{\"weight_map\":\"x\"}", "weight_map"},
    {"X09", "{\"weight_map\":{}}", "found none"},
    {"X10", MAP(A ",\"b\":1"), "no string"},
    {"X10b", MAP(A ",\"b\":null"), "no string"},
    {"X10c", MAP(A ",\"b\":{}"), "no string"},
    {"X11", MAP(A "," A "," B), "uplicate"},
    {"X12", MAP(A ",\"a\":\"model-00002-of-00002.safetensors\"," B), "uplicate"},
    {"X13", MAP(A ",\"b\\u0000\":\"model-00002-of-00002.safetensors\""), INDEX},
    {"X14", MAP(A ",\"b\":\"../x.safetensors\""), "found a path"},
    {"X15", MAP(A ",\"b\":\"/etc/x.safetensors\""), "found a path"},
    {"X16", MAP(A ",\"b\":\"sub/x.safetensors\""), "found a path"},
    {"X16b", MAP(A ",\"b\":\"sub\\\\x.safetensors\""), "found a path"},
    {"X17", MAP(A ",\"b\":\"\""), "no file name"},
    {"X17b", MAP(A ",\"b\":\".\""), "no file name"},
    {"X17c", MAP(A ",\"b\":\"..\""), "no file name"},
    {"X18", MAP(A ",\"b\":\"x\\n.safetensors\""), "control"},
    {"X18b", MAP(A ",\"b\":\"x\\u0000.safetensors\""), INDEX},
    {"X22", MAP(A ",\"b\":\"model-00003-of-00003.safetensors\""), "model-00003-of-00003.safetensors"},
    {"X24", MAP(A "," B ",\"c\":\"model-00002-of-00002.safetensors\""), "expected this tensor"},
    {"X24b", MAP("\"a\":\"model-00002-of-00002.safetensors\",\"b\":\"model-00001-of-00002.safetensors\""),
     "that has it"},
    {"X27", "{\"metadata\":{\"total_size\":-1},\"weight_map\":{" A "," B "}}", NULL},
    {"X27b", "{\"metadata\":{\"total_size\":\"8\"},\"weight_map\":{" A "," B "}}", NULL},
    {"X28", "{\"weight_map\":{" A "," B "}}", NULL},
    {"X35", MAP(A ",\"b\":\"pytorch_model.bin\""), "another kind"},
    {"X36", MAP(A "," B) "x", INDEX},
};

static void two_shards(const char *index) {
    fresh(index);
    shard("model-00001-of-00002.safetensors", "a");
    shard("model-00002-of-00002.safetensors", "b");
}

static void indexes(void **state) {
    for (size_t i = 0; i < EXC_COUNT(index_rows); i++) {
        two_shards(index_rows[i].index);
        opens(index_rows[i].id, index_rows[i].fragment);
    }
    two_shards(NULL);
    opens("X01", "found neither (2 other");
    fresh(NULL);
    shard("model.safetensors", "a");
    opens("X02", NULL);
    two_shards(MAP(A "," B));
    shard("model.safetensors", "a");
    opens("X33", "found both");
    two_shards(MAP(A "," B));
    shard("model-00002-of-00002.safetensors", "a");
    opens("X26", "expected each tensor in one file");
    fresh(MAP(A));
    shard("model-00001-of-00002.safetensors", "a");
    opens("X30: named as one of two", NULL);
    two_shards(MAP(A "," B));
    unlink(test_path(folder, "model-00002-of-00002.safetensors"));
    assert_int_equal(mkdir(test_path(folder, "model-00002-of-00002.safetensors"), 0700), 0);
    opens("X21", "folder");
    rmdir(test_path(folder, "model-00002-of-00002.safetensors"));
    assert_int_equal(mkfifo(test_path(folder, "model-00002-of-00002.safetensors"), 0600), 0);
    opens("X21b", "special");
    fresh(NULL);
    shard("x", "a");
    assert_int_equal(mkdir(test_path(folder, "blobs"), 0700), 0);
    assert_int_equal(rename(test_path(folder, "x"), test_path(folder, "blobs/0123")), 0);
    assert_int_equal(symlink("blobs/0123", test_path(folder, "model.safetensors")), 0);
    opens("D13: a link, as in the hub's cache", NULL);
    fresh(NULL);
    opens("empty", "found neither");
    test_write(test_path(folder, "pytorch_model.bin"), "", 0);
    opens("X35b", "1 .bin");
    char *name = malloc(400);
    memset(name, 'x', 300);
    strcpy(name + 300, ".safetensors");
    char *index;
    assert_true(asprintf(&index, "{\"weight_map\":{\"a\":\"%s\"}}", name) > 0);
    fresh(index);
    opens("X18c", "longer than 255");
    free(index);
    free(name);
    fresh(NULL);
    shard("model.safetensors", "a");
    unlink(test_path(folder, "config.json"));
    opens("C01", "config.json");
    static const char *const configs[] = {
        "", "{", "[]", "3", "{\"a\":1,\"a\":2}", "{} x", "{\"a\":\"\xff\"}", "{\"a\":NaN}"};
    for (size_t i = 0; i < EXC_COUNT(configs); i++) {
        test_write(test_path(folder, "config.json"), configs[i], strlen(configs[i]));
        opens(configs[i], "config.json");
    }
}

/* what the index leaves out is used, and said */
static int count_warnings(void *user, const exc_event *e) {
    if (e->kind == EXC_EVENT_WARNING && strstr(e->text, (const char *)user)) *(char *)user = '!';
    return 0;
}

static void warnings(void **state) {
    char want[] = "leaves out 1 tensors";
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    opt.backend = "cpu";
    opt.threads = 1;
    opt.on_event = count_warnings;
    opt.user = want;
    exc_ctx *own;
    exc_checkpoint *c = NULL;
    assert_int_equal(exc_ctx_create(&opt, &own), EXC_OK);
    fresh(MAP("\"model.a\":\"x.safetensors\""));
    const char header[] =
        "{\"model.a\":" T("") ",\"mtp.b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}";
    uint8_t all[512] = {sizeof header - 1};
    memcpy(all + 8, header, sizeof header - 1);
    test_write(test_path(folder, "x.safetensors"), all, 8 + sizeof header - 1 + 8);
    assert_int_equal(exc_checkpoint_open(own, folder, &c), EXC_OK);
    assert_int_equal(c->n_tensors, 2);
    assert_int_equal(want[0], '!');
    exc_checkpoint_close(c);
    exc_ctx_free(own);
}

/* 700 GB of shards, as holes: headers only, so the answer comes at once */
static void sparse_giant(void **state) {
    fresh(NULL);
    exc_buf index = {0};
    exc_buf_puts(&index, "{\"weight_map\":{");
    for (int s = 0; s < 70; s++) {
        char name[64], header[256];
        snprintf(name, sizeof name, "model-%05d-of-00070.safetensors", s + 1);
        int n = snprintf(
            header, sizeof header,
            "{\"w%d\":{\"dtype\":\"BF16\",\"shape\":[1000000,5000],\"data_offsets\":[0,10000000000]}}", s);
        uint8_t head[512] = {(uint8_t)n};
        memcpy(head + 8, header, (size_t)n);
        test_write(test_path(folder, name), head, 8 + (size_t)n);
        if (truncate(test_path(folder, name), 8 + n + 10000000000)) skip();
        exc_buf_printf(&index, "%s\"w%d\":\"%s\"", s ? "," : "", s, name);
    }
    exc_buf_puts(&index, "}}");
    test_write(test_path(folder, INDEX), index.data, index.len);
    exc_buf_free(&index);
    double t0 = exc_seconds();
    exc_checkpoint *c = NULL;
    exc_clear(ctx);
    exc_status st = exc_checkpoint_open(ctx, folder, &c);
    if (st) fail_msg("%s", exc_ctx_error(ctx));
    assert_true(exc_seconds() - t0 < 1);
    assert_int_equal(c->n_files, 70);
    exc_checkpoint_close(c);
}

/* ----------------------------------------------------------------------------- failing allocations */

static void no_memory(void **state) {
    two_shards(MAP(A "," B));
    uint64_t n = 0;
    for (exc_status st = EXC_ERR_MEMORY; st;) {
        exc_checkpoint *c = NULL;
        exc_clear(ctx);
        exc_alloc_fail_at(++n);
        st = exc_checkpoint_open(ctx, folder, &c);
        exc_alloc_fail_at(0);
        if (st && st != EXC_ERR_MEMORY) fail_msg("allocation %d: %s", (int)n, exc_ctx_error(ctx));
        if (st) assert_true(!c && exc_ctx_error(ctx)[0] != 0);
        exc_checkpoint_close(c);
        assert_true(n < 200);
    }
    assert_true(n > 10);
}

static int setup(void **state) {
    ctx = test_ctx(1);
    dir = test_tmpdir();
    return 0;
}

static int teardown(void **state) {
    exc_ctx_free(ctx);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(indexes), cmocka_unit_test(warnings),
                                       cmocka_unit_test(sparse_giant), cmocka_unit_test(no_memory)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
