/* io.c - does any byte string do harm? Hand-made defects of the container, its JSON and its fields, each with
 * its verdict and a fragment of its message; every byte of a valid header replaced; random damage to a real
 * header; truncation at every length. What is accepted must hold together: ranges inside the file, disjoint,
 * sizes right. Then the good path: strict JSON getters, our own writer read back, all of it under failing
 * allocations. */
#include "helpers.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"

static exc_ctx *ctx;
static char *dir;

/* -------------------------------------------------------------------------------------------------------
 * tools */

static const char *put_raw(const void *bytes, size_t n) {
    const char *path = test_path(dir, "x.safetensors");
    unlink(path); /* ext4 writes a file that is truncated and written again to the disk at once */
    test_write(path, bytes, n);
    return path;
}

/* header length `n_header` as stated, the header's own bytes, then `data` zero bytes */
static const char *put(uint64_t stated, const char *header, size_t n, size_t data) {
    size_t size = 8 + n + data;
    uint8_t *all = calloc(1, size);
    for (int i = 0; i < 8; i++) all[i] = (uint8_t)(stated >> 8 * i);
    memcpy(all + 8, header, n);
    const char *path = put_raw(all, size);
    free(all);
    return path;
}

/* what any accepted file must satisfy, whatever its header said */
static void check_table(const exc_tensors *t) {
    uint64_t at = t->header_bytes;
    for (size_t i = 0; i < t->count; i++) {
        const exc_tensor *x = &t->items[i];
        assert_true(x->begin == at && x->end >= x->begin && x->end <= t->size);
        at = x->end;
        assert_true(x->rank >= 0 && x->rank <= 64);
        assert_non_null(x->dtype_name);
        assert_ptr_equal(exc_tensors_find(t, x->name), x);
        size_t bits = exc_dtype_bits(x->dtype);
        if (!bits || x->rank > 8) continue;
        unsigned __int128 n = bits;
        for (int d = 0; d < x->rank; d++) n *= (unsigned __int128)x->shape[d];
        assert_true(n == (unsigned __int128)(x->end - x->begin) * 8);
    }
    assert_int_equal(at, t->size);
}

/* NULL: accepted; else refused as input, in one line with the fragment and the file's name */
static void verdict(const char *id, const char *path, const char *fragment) {
    exc_tensors *t = NULL;
    exc_clear(ctx);
    exc_status st = exc_tensors_open(ctx, path, &t);
    if (!fragment) {
        if (st) fail_msg("%s: expected acceptance, found: %s", id, exc_ctx_error(ctx));
        check_table(t);
    } else {
        if (st != EXC_ERR_INPUT) fail_msg("%s: status %s: %s", id, exc_status_name(st), exc_ctx_error(ctx));
        if (!strstr(exc_ctx_error(ctx), fragment) || !strstr(exc_ctx_error(ctx), "x.safetensors"))
            fail_msg("%s: no \"%s\" in: %s", id, fragment, exc_ctx_error(ctx));
        for (const char *p = exc_ctx_error(ctx); *p; p++)
            if ((unsigned char)*p < 0x20 || *p == 0x7f)
                fail_msg("%s: control byte in: %s", id, exc_ctx_error(ctx));
        assert_null(t);
    }
    exc_tensors_close(t);
}

/* ---------------------------------------------------------------------------------------------------
 * container */

#define BASE "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}"
#define BASE_N (sizeof BASE - 1)

static void container(void **state) {
    verdict("S001", put_raw("", 0), "at least 8");
    verdict("S002", put_raw("\1\0\0\0\0\0\0", 7), "at least 8");
    verdict("S003", put(60, "", 0, 0), "incomplete download");
    verdict("S004", put(0, "", 0, 0), "header length");
    verdict("S005", put(0, "", 0, 16), "header length");
    verdict("S006", put(1, "{", 1, 0), "header length");
    verdict("S007", put(1000, BASE, BASE_N, 16), "incomplete download");
    verdict("S008", put(BASE_N + 1, BASE, BASE_N, 16), "NUL");
    verdict("S009", put(BASE_N - 1, BASE, BASE_N, 16), "}");
    verdict("S010", put(UINT64_MAX, BASE, BASE_N, 16), "header length");
    verdict("S011", put(UINT64_MAX - 7, BASE, BASE_N, 16), "header length");
    verdict("S012", put((uint64_t)1 << 63, BASE, BASE_N, 16), "header length");
    verdict("S013", put(100000001, BASE, BASE_N, 16), "100000001");
    verdict("S016", put((uint64_t)BASE_N << 56, BASE, BASE_N, 16), "byte order");
    verdict("S017", put(BASE_N, BASE, BASE_N, 17), "behind the last");
    verdict("S018", put(BASE_N, BASE, BASE_N, 16 + 200), "behind the last");
    verdict("S019", put(BASE_N, BASE, BASE_N, 15), "incomplete download");
    verdict("S020", put(BASE_N, BASE, BASE_N, 0), "incomplete download");
    verdict("S021", put(BASE_N + 6, BASE "      ", BASE_N + 6, 16), NULL);
    verdict("S022", put(BASE_N + 2, BASE "\0\0", BASE_N + 2, 16), "NUL");
    verdict("S023", put(BASE_N + 4, BASE "\r\n\t ", BASE_N + 4, 16), NULL);
    verdict("S024", put(BASE_N + 1, " " BASE, BASE_N + 1, 16), NULL);
    verdict("S025", put(BASE_N + 3, "\xef\xbb\xbf" BASE, BASE_N + 3, 16), "expected {");
    verdict("S026", put(4, "{\0}\0", 4, 0), "header byte 9");
    verdict("S027", put(BASE_N + 2, BASE "{}", BASE_N + 2, 16), "spaces");
    verdict("S028", put(2, "[]", 2, 0), "expected {");
    verdict("S029", put(4, "null", 4, 0), "expected {");
    verdict("S030", put(3, "\"a\"", 3, 0), "expected {");
    verdict("S031", put(2, "{}", 2, 0), NULL);
    verdict("S032", put(2, "{}", 2, 4), "behind the last");
    verdict("S033", put(BASE_N, "\0" BASE, BASE_N, 16), "unfinished edit");
    verdict("S033b", put(BASE_N, "!" BASE, BASE_N, 16), "unfinished edit");
    verdict("S034", put(BASE_N | (uint64_t)0x80 << 56, BASE, BASE_N, 16), "header length");
    exc_tensors *t = NULL;
    exc_clear(ctx);
    test_refused(ctx, exc_tensors_open(ctx, test_path(dir, "none"), &t), EXC_ERR_IO, "none", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_tensors_open(ctx, dir, &t), EXC_ERR_INPUT, "folder", NULL);
    exc_clear(ctx);
    assert_int_equal(mkfifo(test_path(dir, "fifo"), 0600), 0);
    test_refused(ctx, exc_tensors_open(ctx, test_path(dir, "fifo"), &t), EXC_ERR_INPUT, "special", NULL);
    exc_clear(ctx);
    assert_int_equal(symlink("loop", test_path(dir, "loop")), 0);
    test_refused(ctx, exc_tensors_open(ctx, test_path(dir, "loop"), &t), EXC_ERR_IO, "loop", NULL);
    unlink(test_path(dir, "fifo"));
    unlink(test_path(dir, "loop"));
}

/* --------------------------------------------------------------------------------------------------------
 * JSON */

#define T(more) "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]" more "}"

typedef struct row {
    const char *id, *header;
    size_t data;
    const char *fragment; /* NULL: accepted */
} row;

static const row json_rows[] = {
    {"J001", "{\"a\":" T(",") "}", 4, "a key"},
    {"J001b", "{\"a\":" T("") ",}", 4, "a tensor name"},
    {"J002", "{/* */\"a\":" T("") "}", 4, "a tensor name"},
    {"J003", "{'a':" T("") "}", 4, "a tensor name"},
    {"J004", "{\"a\":" T(",\"x\":NaN") "}", 4, "a JSON value"},
    {"J005", "{\"a\":" T("") ",\"a\":" T("") "}", 4, "overlaps"},
    {"J005b", "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"a\":" T("") "}", 4,
     "duplicate name"},
    {"J007", "{\"a\":" T("") ",\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}", 8,
     "duplicate name"},
    {"J008", "{\"a\":" T(",\"dtype\":\"U8\"") "}", 4, "duplicate"},
    {"J008b", "{\"a\":" T(",\"shape\":[4]") "}", 4, "duplicate"},
    {"J008c", "{\"a\":" T(",\"data_offsets\":[0,4]") "}", 4, "duplicate"},
    {"J009", "{\"__metadata__\":{},\"__metadata__\":{},\"a\":" T("") "}", 4, "duplicate"},
    {"J010", "{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"},\"a\":" T("") "}", 4, "duplicate"},
    {"J011", "{\"a\":" T("") ",\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}", 8,
     "duplicate name"},
    {"J012", "{\"a\\u0000b\":" T("") "}", 4, "NUL"},
    {"J014", "{\"\":" T("") "}", 4, NULL},
    {"J015", "{\"\\ud800\":" T("") "}", 4, "surrogate"},
    {"J015b", "{\"\\udc00\":" T("") "}", 4, "surrogate"},
    {"J015c", "{\"\\ud83d\\ude00\":" T("") "}", 4, NULL},
    {"J015d", "{\"\\ud800\\ud800\":" T("") "}", 4, "surrogate"},
    {"J016", "{\"\xff\":" T("") "}", 4, "UTF-8"},
    {"J017", "{\"\xc0\xaf\":" T("") "}", 4, "UTF-8"},
    {"J017b", "{\"\xed\xa0\x80\":" T("") "}", 4, "UTF-8"},
    {"J018", "{\"a\nb\":" T("") "}", 4, "control"},
    {"J018b", "{\"a\\x\":" T("") "}", 4, "escape"},
    {"J018c", "{\"a\\u12g4\":" T("") "}", 4, "hexadecimal"},
    {"J019", "{\"../../etc/passwd\":" T("") "}", 4, NULL},
    {"J020", "{\"\\u001b[31m\":" T("") "}", 4, NULL},
    {"J020b", "{\"\\u001b[31m\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[0,4]}}", 4, "\\x1b[31m"},
    {"J025", "{\"a\":" T(",\"note\":{\"x\":[1,-2.5e3,true,null,\"\\t\"]}") "}", 4, NULL},
    {"J025b", "{\"a\":" T(",\"note\":[01]") "}", 4, "a JSON value"},
    {"J025c", "{\"a\":" T(",\"note\":1.") "}", 4, "a JSON value"},
    {"J025d", "{\"a\":" T(",\"note\":-") "}", 4, "a JSON value"},
    {"J025e", "{\"a\":" T(",\"note\":tru") "}", 4, "a JSON value"},
    {"J026", "{\"a\":{\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "a dtype"},
    {"J027", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,4]}}", 4, "a shape"},
    {"J028", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4]}}", 4, "data_offsets"},
    {"J028b", "{\"a\":{}}", 0, "a dtype"},
    {"J029", "{\"a\":null}", 4, "an object"},
    {"J030", "{\"a\":[\"U8\",[4],[0,4]]}", 4, "an object"},
    {"J031", "{\"__metadata__\":{\"k\":1},\"a\":" T("") "}", 4, "__metadata__"},
    {"J032", "{\"__metadata__\":null,\"a\":" T("") "}", 4, NULL},
    {"J033", "{\"__metadata__\":[],\"a\":" T("") "}", 4, "__metadata__"},
    {"J034", "{\"__metadata__\":{},\"a\":" T("") "}", 4, NULL},
    {"J035", "{\"__metadata__\":" T("") "}", 4, "__metadata__"},
    {"J036", "{\"__metadata__\":{\"k\":{}},\"a\":" T("") "}", 4, "__metadata__"},
    {"J037", "{\"__metadata__\":{\"format\":\"pt\"}}", 0, NULL},
    {"J038", "   text", 0, "expected {"},
    {"J039", "{\"a\"", 0, ":"},
    {"J040", "{\"a", 0, "end of a string"},
    {"J041", "{\"a\\", 0, "end of a string"},
    {"J042", "{\"a\":", 0, "an object"},
    {"J043", "{1:2}", 0, "a tensor name"},
};

#define F(dtype, shape, offsets)                                                                             \
    "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
#define TWO(first, second)                                                                                   \
    "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" first                                         \
    "},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" second "}}"
#define ZERO(name, at) "\"" name "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[" at "," at "]}"

static const row field_rows[] = {
    {"F001", F("\"f32\"", "[4]", "[0,16]"), 16, "dtype"},
    {"F002", F("\"F33\"", "[4]", "[0,16]"), 16, NULL}, /* unknown: only copied; its size is taken on trust */
    {"F003", F("5", "[4]", "[0,16]"), 16, "dtype"},
    {"F004", F("\"\"", "[4]", "[0,16]"), 16, "dtype"},
    {"F005", F("null", "[4]", "[0,16]"), 16, "dtype"},
    {"F006", F("\"U8\"", "[-2]", "[0,4]"), 4, "dimension"},
    {"F007", F("\"U8\"", "[-0]", "[0,0]"), 0, "dimension"},
    {"F008", F("\"U8\"", "[2.0]", "[0,2]"), 2, "dimension"},
    {"F009", F("\"U8\"", "[2e0]", "[0,2]"), 2, "dimension"},
    {"F010", F("\"U8\"", "[02]", "[0,2]"), 2, "dimension"},
    {"F011", F("\"U8\"", "[+2]", "[0,2]"), 2, "dimension"},
    {"F012", F("\"U8\"", "[0x2]", "[0,2]"), 2, "]"},
    {"F013", F("\"U8\"", "[\"2\"]", "[0,2]"), 2, "dimension"},
    {"F014", F("\"U8\"", "[18446744073709551616]", "[0,2]"), 2, "dimension"},
    {"F014b", F("\"U8\"", "[281474976710656]", "[0,2]"), 2, "dimension"},
    {"F015", F("\"U8\"", "[4294967296,4294967297]", "[0,4]"), 4, "2^64"},
    {"F016", F("\"U8\"", "[4294967296,4294967296]", "[0,0]"), 0, "2^64"},
    {"F017", F("\"F32\"", "[1073741825,4294967296]", "[0,4]"), 4, "2^64"},
    {"F018", F("\"F64\"", "[281474976710655,8192]", "[0,0]"), 0, "2^64"},
    {"F019", F("\"U8\"", "[0,18446744073709551615]", "[0,0]"), 0, "dimension"},
    {"F020", F("\"U8\"", "[4294967296,4294967296,0]", "[0,0]"), 0, NULL},
    {"F021", F("\"U8\"", "[0,4294967296,4294967296]", "[0,0]"), 0, NULL},
    {"F022", F("\"F32\"", "[]", "[0,4]"), 4, NULL},
    {"F023", F("\"F32\"", "[]", "[0,0]"), 0, "expected 4 bytes"},
    {"F024", F("\"F32\"", "[2,0]", "[0,0]"), 0, NULL},
    {"F025", F("\"F32\"", "[2,0]", "[0,16]"), 16, "expected 0 bytes"},
    {"F028", F("\"F32\"", "[4]", "[0,12]"), 12, "expected 16 bytes"},
    {"F029", F("\"F32\"", "[4]", "[0,20]"), 20, "expected 16 bytes"},
    {"F030", F("\"F32\"", "[4]", "[16,0]"), 16, "begin <= end"},
    {"F031", F("\"F32\"", "[4]", "[-16,0]"), 16, "an offset"},
    {"F032", F("\"F32\"", "[4]", "[4,20]"), 20, "hole"},
    {"F033", F("\"F32\"", "[400]", "[0,1600]"), 16, "incomplete download"},
    {"F034", F("\"F32\"", "[4]", "[0,16.0]"), 16, "an offset"},
    {"F035", F("\"F32\"", "[4]", "[0,\"16\"]"), 16, "an offset"},
    {"F036", F("\"F32\"", "[4]", "[0,18446744073709551632]"), 16, "an offset"},
    {"F037", F("\"F32\"", "[4]", "[16]"), 16, "second offset"},
    {"F038", F("\"F32\"", "[4]", "[0,16,16]"), 16, "two offsets"},
    {"F039", F("\"F32\"", "[4]", "{\"begin\":0}"), 16, "data_offsets"},
    {"F040", TWO("[0,4]", "[0,4]"), 4, "overlaps"},
    {"F041", TWO("[0,4]", "[2,6]"), 6, "overlaps"},
    {"F042", TWO("[0,4]", "[5,9]"), 9, "hole"},
    {"F043", TWO("[4,8]", "[0,4]"), 8, NULL},
    {"F044",
     "{" ZERO("z", "4") ",\"a\":" T("") ",\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}", 8,
     NULL},
    {"F045", "{" ZERO("z", "2") ",\"a\":" T("") "}", 4, "overlaps"},
    {"F046", "{" ZERO("z", "9") ",\"a\":" T("") "}", 4, "hole"},
    {"F048", F("\"F4\"", "[3]", "[0,1]"), 1, "whole bytes"},
    {"F049", F("\"F4\"", "[4]", "[0,2]"), 2, NULL},
    {"F050", F("\"F6_E2M3\"", "[4]", "[0,3]"), 3, NULL},
    {"F051", F("\"F6_E3M2\"", "[3]", "[0,2]"), 2, "whole bytes"},
    {"F052", F("\"F8_E8M0\"", "[4]", "[0,4]"), 4, NULL},
    {"F053",
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],"
     "\"data_offsets\":[1,5]}}",
     5, NULL},
    {"F055", F("\"U8\"", "[[4]]", "[0,4]"), 4, "dimension"},
    {"F056", F("\"U8\"", "4", "[0,4]"), 4, "a list"},
    {"F057", F("\"U8\"", "null", "[0,4]"), 4, "a list"},
    {"F059", F("\"BOOL\"", "[4]", "[0,4]"), 4, NULL},
    {"F061", F("\"BF16\"", "[2,3]", "[0,12]"), 12, NULL},
    {"F062", F("\"I64\"", "[2]", "[0,16]"), 16, NULL},
};

static void run_rows(const row *rows, size_t n) {
    for (size_t i = 0; i < n; i++) {
        size_t len = strlen(rows[i].header);
        verdict(rows[i].id, put(len, rows[i].header, len, rows[i].data), rows[i].fragment);
    }
}

static void json(void **state) { run_rows(json_rows, EXC_COUNT(json_rows)); }
static void fields(void **state) { run_rows(field_rows, EXC_COUNT(field_rows)); }

/* text with one part said n times */
static void repeated(const char *id, const char *head, const char *part, size_t n, const char *tail,
                     size_t data, const char *fragment) {
    exc_buf b = {0};
    exc_buf_puts(&b, head);
    for (size_t i = 0; i < n; i++) exc_buf_puts(&b, part);
    exc_buf_puts(&b, tail);
    verdict(id, put(b.len, b.data, b.len, data), fragment);
    exc_buf_free(&b);
}

static void extremes(void **state) {
    repeated("J021", "{\"", "aaaaaaaaaaaaaaaa", 65536, "\":" T("") "}", 4, "4096");
    repeated("name of 4096", "{\"", "a", 4096, "\":" T("") "}", 4, NULL);
    repeated("J022", "{\"a\":{\"x\":", "[", 200, "}}", 0, "nested");
    repeated("depth within", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"x\":", "[", 29,
             "1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}}", 4, NULL);
    repeated("J024", "{\"a\":{\"x\":", "[", 1000000, "", 0, "nested");
    repeated("J024b", "", "[", 1000000, "", 0, "expected {");
    repeated("F026", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1", ",1", 64, "],\"data_offsets\":[0,1]}}", 1,
             "64 dimensions");
    repeated("rank 64", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1", ",1", 63, "],\"data_offsets\":[0,1]}}", 1,
             NULL);
    repeated("F027", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1", ",1", 100000, "],\"data_offsets\":[0,1]}}", 1,
             "64 dimensions");
    exc_buf b = {0};
    for (int i = 0; i < 1000; i++) exc_buf_printf(&b, "%s" ZERO("z%d", "0"), i ? "," : "{", i);
    exc_buf_puts(&b, "}");
    verdict("F047", put(b.len, b.data, b.len, 0), NULL);
    b.len = 0;
    double t0 = exc_seconds();
    for (int i = 0; i < 200000; i++)
        exc_buf_printf(&b, "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
                       i ? "," : "{", (i * 7919) % 200000, i, i + 1);
    exc_buf_puts(&b, "}");
    verdict("F060", put(b.len, b.data, b.len, 200000), NULL);
    assert_true(exc_seconds() - t0 < 20); /* n log n: seconds even under a sanitizer */
    exc_buf_free(&b);
}

/* a header of 100,000,000 bytes, all blanks behind {}, is the largest; one more is too many */
static void largest_header(void **state) {
    size_t n = 100000000, chunk = 1 << 20;
    const char *path = test_path(dir, "x.safetensors");
    char *blanks = malloc(chunk);
    memset(blanks, ' ', chunk);
    FILE *f = fopen(path, "wb");
    uint64_t stated = n;
    assert_int_equal(fwrite(&stated, 8, 1, f), 1);
    assert_int_equal(fwrite("{}", 2, 1, f), 1);
    for (size_t left = n - 2, now; left; left -= now) {
        now = left < chunk ? left : chunk;
        assert_int_equal(fwrite(blanks, 1, now, f), now);
    }
    assert_int_equal(fflush(f), 0);
    verdict("S014", path, NULL);
    assert_int_equal(fputc(' ', f), ' ');
    rewind(f);
    stated++;
    assert_int_equal(fwrite(&stated, 8, 1, f), 1);
    assert_int_equal(fclose(f), 0);
    verdict("S015", path, "100000001");
    unlink(path);
    free(blanks);
}

/* ------------------------------------------------------------------------------------------------------
 * damage */

/* opens what lies at path; accepted or refused, it must hold together; returns whether it was accepted */
static bool survives(const char *path) {
    exc_tensors *t = NULL;
    exc_clear(ctx);
    exc_status st = exc_tensors_open(ctx, path, &t);
    if (!st)
        check_table(t);
    else if (st != EXC_ERR_INPUT || !exc_ctx_error(ctx)[0])
        fail_msg("%s: %s", exc_status_name(st), exc_ctx_error(ctx));
    exc_tensors_close(t);
    return !st;
}

static void flip_every_byte(void **state) {
    static const char good[] =
        "{\"__metadata__\":{\"k\":\"v\"},\"a.b\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
        "\"c\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[16,18]}} ";
    static const uint8_t other[] = {0,   ' ', '"', '\\', '0', '9',  ',',  ':', '{',
                                    '}', '[', ']', '-',  'e', 0x7f, 0x80, 0xff};
    size_t n = sizeof good - 1, accepted = 0, tried = 0;
    uint8_t *all = calloc(1, 8 + n + 18);
    all[0] = (uint8_t)n;
    memcpy(all + 8, good, n);
    assert_true(survives(put_raw(all, 8 + n + 18)));
    for (size_t i = 0; i < 8 + n; i++)
        for (size_t k = 0; k < EXC_COUNT(other) + 8; k++) {
            uint8_t was = all[i];
            all[i] = k < EXC_COUNT(other) ? other[k] : (uint8_t)(was ^ 1u << (k - EXC_COUNT(other)));
            if (all[i] != was) {
                accepted += survives(put_raw(all, 8 + n + 18));
                tried++;
            }
            all[i] = was;
        }
    assert_true(tried > 3000 &&
                accepted < tried / 3); /* names and metadata may change unseen, nothing else */
    free(all);
}

static void random_damage(void **state) {
    size_t n;
    char *whole = test_read(test_data("models/qwen3_moe/golden/expert_stats.safetensors"), &n);
    uint64_t head;
    memcpy(&head, whole, 8);
    assert_true(head < n);
    size_t tail = 8 + (size_t)head; /* the data stay: only the header is damaged */
    char *copy = malloc(n);
    for (uint64_t round = 0; round < 400; round++) {
        memcpy(copy, whole, n);
        uint64_t hits = 1 + exc_random_u64(7, round, 0) % 4;
        for (uint64_t h = 0; h < hits; h++) {
            size_t at = exc_random_u64(7, round, 3 * h + 1) % tail,
                   from = exc_random_u64(7, round, 3 * h + 2) % tail;
            size_t len = 1 + exc_random_u64(7, round, 3 * h + 3) % 16;
            if (at + len > tail || from + len > tail) continue;
            if (h % 2)
                memmove(copy + at, whole + from, len); /* splice: keeps much of the grammar */
            else
                copy[at] = (char)exc_random_u64(7, round, 100 + h);
        }
        survives(put_raw(copy, n));
    }
    free(copy);
    free(whole);
}

static void truncation(void **state) {
    size_t n = 8 + BASE_N + 16;
    uint8_t *all = calloc(1, n);
    all[0] = BASE_N;
    memcpy(all + 8, BASE, BASE_N);
    for (size_t cut = 0; cut < n; cut++) assert_false(survives(put_raw(all, cut)));
    assert_true(survives(put_raw(all, n)));
    free(all);
}

/* -------------------------------------------------------------------------------------------------- JSON
 * getters */

static void getters(void **state) {
    static const char text[] = "{\"i\":7,\"neg\":-3,\"big\":9223372036854775807,\"r\":1.5,\"whole\":2.0,"
                               "\"t\":true,\"s\":\"x\",\"n\":null,\"l\":[]}";
    json_t *o = NULL;
    int64_t i;
    double d;
    bool b;
    const char *s;
    exc_clear(ctx);
    assert_int_equal(exc_json_parse(ctx, "f", text, sizeof text - 1, &o), EXC_OK);
    assert_int_equal(exc_json_int(ctx, o, "f", "i", 0, 7, &i), EXC_OK);
    assert_int_equal(i, 7);
    assert_int_equal(exc_json_int(ctx, o, "f", "big", 0, INT64_MAX, &i), EXC_OK);
    assert_true(i == INT64_MAX);
    assert_int_equal(exc_json_int_or(ctx, o, "f", "none", 0, 1, 42, &i), EXC_OK);
    assert_int_equal(i, 42);
    assert_int_equal(exc_json_int_or(ctx, o, "f", "n", 0, 1, 43, &i), EXC_OK);
    assert_int_equal(i, 43);
    assert_int_equal(exc_json_number_or(ctx, o, "f", "r", 0, &d), EXC_OK);
    assert_true(d == 1.5);
    assert_int_equal(exc_json_number_or(ctx, o, "f", "i", 0, &d), EXC_OK);
    assert_true(d == 7);
    assert_int_equal(exc_json_bool_or(ctx, o, "f", "t", false, &b), EXC_OK);
    assert_true(b);
    assert_int_equal(exc_json_string_or(ctx, o, "f", "s", NULL, &s), EXC_OK);
    assert_string_equal(s, "x");
    test_refused(ctx, exc_json_int(ctx, o, "f", "i", 0, 6, &i), EXC_ERR_INPUT, "f: i", "0..6", "found 7",
                 NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_int(ctx, o, "f", "whole", 0, 6, &i), EXC_ERR_INPUT, "found 2.0", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_int(ctx, o, "f", "none", 0, 6, &i), EXC_ERR_INPUT, "found nothing", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_int_or(ctx, o, "f", "neg", 0, 6, 0, &i), EXC_ERR_INPUT, "found -3", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_number_or(ctx, o, "f", "s", 0, &d), EXC_ERR_INPUT, "a number", "\"x\"", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_bool_or(ctx, o, "f", "i", 0, &b), EXC_ERR_INPUT, "true or false", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_string_or(ctx, o, "f", "l", NULL, &s), EXC_ERR_INPUT, "text", "a list", NULL);
    exc_clear(ctx);
    static const char *const known[] = {"i", "neg", "big", "r", "whole", "t", "s", "n", "list", NULL};
    test_refused(ctx, exc_json_keys(ctx, o, "f", known), EXC_ERR_INPUT, "\"l\"", NULL);
    json_decref(o);
    exc_clear(ctx);
    assert_int_equal(exc_json_parse(ctx, "f", "{\"strenght\":1}", 14, &o), EXC_OK);
    static const char *const plan[] = {"op", "strength", "layers", NULL};
    test_refused(ctx, exc_json_keys(ctx, o, "plan.json", plan), EXC_ERR_INPUT, "did you mean \"strength\"",
                 NULL);
    char *back = exc_json_text(ctx, o);
    assert_string_equal(back, "{\"strenght\":1}");
    exc_free(back);
    json_decref(o);
    static const char *const bad[] = {
        "",      "{",      "{}x",    "{\"a\":1,\"a\":1}", "01", "\"\xff\"", "{\"a\":\"\\u0000\"}",
        "[NaN]", "/**/{}", "{'a':1}"};
    for (size_t k = 0; k < EXC_COUNT(bad); k++) {
        exc_clear(ctx);
        test_refused(ctx, exc_json_parse(ctx, "some.json", bad[k], strlen(bad[k]), &o), EXC_ERR_INPUT,
                     "some.json", NULL);
        assert_null(o);
    }
    test_write(test_path(dir, "l.json"), "{\n  \"a\": 1,\n  \"a\": 2\n}", 22);
    exc_clear(ctx);
    test_refused(ctx, exc_json_load(ctx, test_path(dir, "l.json"), 0, &o), EXC_ERR_INPUT, "l.json:3:", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_load(ctx, test_path(dir, "l.json"), 10, &o), EXC_ERR_INPUT, "at most 10 bytes",
                 NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_json_load(ctx, test_path(dir, "none.json"), 0, &o), EXC_ERR_IO, "none.json", NULL);
}

/* ------------------------------------------------------------------------------------------------------
 * writer */

static exc_status write_some(const char *path, bool force) {
    static const float f[6] = {1, 2, 3, 4, 5, 6};
    static const uint8_t u[3] = {7, 8, 9};
    static const double d[2] = {0.5, -0.0};
    exc_writer *w;
    EXC_TRY(exc_writer_open(ctx, path, force, &w));
    exc_status st = exc_writer_meta(w, "k\"\n", "v\xc3\xa9");
    if (!st) st = exc_writer_declare(w, "bytes", EXC_U8, 1, (int64_t[]){3});
    if (!st) st = exc_writer_declare(w, "matrix \\ \"q\"", EXC_F32, 2, (int64_t[]){2, 3});
    if (!st) st = exc_writer_declare(w, "none", EXC_F32, 2, (int64_t[]){0, 3});
    if (!st) st = exc_writer_declare(w, "doubles", EXC_F64, 1, (int64_t[]){2});
    if (!st) st = exc_writer_put(w, "doubles", d, sizeof d);
    if (!st) st = exc_writer_put(w, "bytes", u, 3);
    if (!st) st = exc_writer_put(w, "matrix \\ \"q\"", f, sizeof f);
    if (!st) return exc_writer_commit(w);
    exc_writer_abort(w);
    return st;
}

static void check_some(const char *path) {
    exc_tensors *t = NULL;
    exc_clear(ctx);
    if (exc_tensors_open(ctx, path, &t)) fail_msg("%s", exc_ctx_error(ctx));
    check_table(t);
    assert_int_equal(t->count, 4);
    assert_string_equal(json_string_value(json_object_get(t->metadata, "k\"\n")), "v\xc3\xa9");
    const exc_tensor *m = exc_tensors_find(t, "matrix \\ \"q\"");
    assert_non_null(m);
    assert_int_equal(m->dtype, EXC_F32);
    assert_int_equal(m->shape[1], 3);
    assert_true(((const float *)exc_tensors_data(t, m))[5] == 6); /* our own files are aligned */
    assert_int_equal(exc_tensors_find(t, "doubles")->begin % 8, 0);
    assert_null(exc_tensors_find(t, "absent"));
    assert_string_equal(t->items[0].name, "doubles");
    exc_tensors_close(t);
}

static int entries(const char *path) {
    char *command, *text;
    assert_true(asprintf(&command, "ls -A '%s' | wc -l", path) > 0);
    test_shell(command, &text);
    int n = atoi(text);
    free(text);
    free(command);
    return n;
}

static void writer(void **state) {
    char *own = test_tmpdir();
    char *path;
    assert_true(asprintf(&path, "%s/w.safetensors", own) > 0);
    exc_clear(ctx);
    assert_int_equal(write_some(path, false), EXC_OK);
    check_some(path);
    exc_clear(ctx);
    test_refused(ctx, write_some(path, false), EXC_ERR_USAGE, "w.safetensors", "--force", NULL);
    exc_clear(ctx);
    assert_int_equal(write_some(path, true), EXC_OK);
    check_some(path);
    exc_writer *w;
    exc_clear(ctx);
    assert_int_equal(exc_writer_open(ctx, path, true, &w), EXC_OK);
    assert_int_equal(exc_writer_declare(w, "a", EXC_F32, 1, (int64_t[]){2}), EXC_OK);
    test_refused(ctx, exc_writer_put(w, "a", "1234", 4), EXC_ERR_USAGE, "expected 8 bytes", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_writer_put(w, "b", "1234", 4), EXC_ERR_USAGE, "never declared", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_writer_declare(w, "c", EXC_F32, 0, NULL), EXC_ERR_USAGE, "after the first", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_writer_commit(w), EXC_ERR_USAGE, "never came", NULL);
    check_some(path); /* the old file is whole */
    exc_clear(ctx);
    assert_int_equal(exc_writer_open(ctx, path, true, &w), EXC_OK);
    test_refused(ctx, exc_writer_declare(w, "c", EXC_F32, 2, (int64_t[]){INT64_MAX, 3}), EXC_ERR_USAGE,
                 "shape", NULL);
    exc_clear(ctx);
    test_refused(ctx, exc_writer_declare(w, "c", EXC_F32, 1, (int64_t[]){-1}), EXC_ERR_USAGE, "shape", NULL);
    exc_clear(ctx);
    assert_int_equal(exc_writer_declare(w, "c", EXC_U8, 1, (int64_t[]){0}), EXC_OK);
    assert_int_equal(exc_writer_declare(w, "c", EXC_U8, 1, (int64_t[]){0}), EXC_OK);
    test_refused(ctx, exc_writer_commit(w), EXC_ERR_USAGE, "declared twice", NULL);
    exc_writer_abort(NULL);
    assert_int_equal(entries(own), 1); /* no temporary is left */
    free(path);
}

/* ----------------------------------------------------------------------------------------- failing
 * allocations */

static exc_status open_once(const char *path) {
    exc_tensors *t = NULL;
    exc_status st = exc_tensors_open(ctx, path, &t);
    exc_tensors_close(t);
    return st;
}

static exc_status writer_once(const char *path) { return write_some(path, true); }

static void no_memory(void **state) {
    char *own = test_tmpdir(), *path;
    assert_true(asprintf(&path, "%s/w.safetensors", own) > 0);
    struct {
        exc_status (*run)(const char *);
        const char *path;
    } jobs[] = {{writer_once, path}, {open_once, path}};
    for (size_t j = 0; j < EXC_COUNT(jobs); j++) {
        uint64_t n = 1;
        for (exc_status st = EXC_ERR_MEMORY; st; n++) {
            exc_clear(ctx);
            exc_alloc_fail_at(n);
            st = jobs[j].run(jobs[j].path);
            exc_alloc_fail_at(0);
            if (st && st != EXC_ERR_MEMORY) fail_msg("allocation %d: %s", (int)n, exc_ctx_error(ctx));
            if (st) assert_true(exc_ctx_error(ctx)[0] != 0);
            assert_true(n < 200);
        }
        assert_true(n > 4);
        assert_int_equal(entries(own), 1); /* and no temporary beside it */
    }
    free(path);
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
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(container),     cmocka_unit_test(json),           cmocka_unit_test(fields),
        cmocka_unit_test(extremes),      cmocka_unit_test(largest_header), cmocka_unit_test(flip_every_byte),
        cmocka_unit_test(random_damage), cmocka_unit_test(truncation),     cmocka_unit_test(getters),
        cmocka_unit_test(writer),        cmocka_unit_test(no_memory),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
