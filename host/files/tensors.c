/* tensors.c - reading .safetensors: 8 bytes of header length, a JSON header, data.
 *
 * The header is untrusted and may be 100 MB with a million tensors, so it has a parser of its own: one pass,
 * no tree, bounded depth, byte offsets in messages. It is read (not mapped: a file cut short while we look
 * must be an error, not a signal) into one block that stays; names are unescaped inside it, since an
 * unescaped string is never longer than its escaped form, so a table of 90,000 tensors costs one allocation
 * for its names. Every number is an integer with a range, every size a checked product, and ranges must tile
 * the data exactly: no hole, no overlap, nothing behind. Stricter than the reference where readers disagree:
 * duplicate names, NUL in names. Data are mapped and not touched. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"

#define MAX_HEADER ((uint64_t)100000000)
#define MAX_DIM (((uint64_t)1 << 48) - 1)
#define MAX_NAME ((size_t)4096)
#define MAX_RANK 64
#define MAX_DEPTH 32

/* what exc_tensors_open really makes */
typedef struct opened {
    exc_tensors t;              /* first: the public view */
    char *header;               /* [N+1] names and dtype names point into it */
    const exc_tensor **by_name; /* [count] */
    size_t cap;                 /* of t.items */
} opened;

typedef struct dtype_row {
    const char *name;
    exc_dtype dtype;
    unsigned bits;
} dtype_row;

static const dtype_row dtypes[] = {
    {"F32", EXC_F32, 32},
    {"BF16", EXC_BF16, 16},
    {"F16", EXC_F16, 16},
    {"F64", EXC_F64, 64},
    {"I64", EXC_I64, 64},
    {"I32", EXC_I32, 32},
    {"U32", EXC_U32, 32},
    {"U8", EXC_U8, 8},
    {"F8_E4M3", EXC_F8_E4M3, 8},
    {"F8_E8M0", EXC_F8_E8M0, 8},
    {"F4", EXC_F4, 4},
    {"BOOL", EXC_DTYPE_OTHER, 8},
    {"I8", EXC_DTYPE_OTHER, 8},
    {"I16", EXC_DTYPE_OTHER, 16},
    {"U16", EXC_DTYPE_OTHER, 16},
    {"U64", EXC_DTYPE_OTHER, 64},
    {"C64", EXC_DTYPE_OTHER, 64},
    {"F8_E5M2", EXC_DTYPE_OTHER, 8},
    {"F6_E2M3", EXC_DTYPE_OTHER, 6},
    {"F6_E3M2", EXC_DTYPE_OTHER, 6},
    {"F8_E4M3FNUZ", EXC_DTYPE_OTHER, 8},
    {"F8_E5M2FNUZ", EXC_DTYPE_OTHER, 8},
};

size_t exc_dtype_bits(exc_dtype d) {
    for (size_t i = 0; i < EXC_COUNT(dtypes) && d != EXC_DTYPE_OTHER; i++)
        if (dtypes[i].dtype == d) return dtypes[i].bits;
    return 0;
}

const char *exc_dtype_name(exc_dtype d) {
    for (size_t i = 0; i < EXC_COUNT(dtypes) && d != EXC_DTYPE_OTHER; i++)
        if (dtypes[i].dtype == d) return dtypes[i].name;
    return "OTHER";
}

/* ------------------------------------------------------------------------------------------------ header
 * parser */

typedef struct cursor {
    exc_ctx *ctx;
    opened *o;
    char *s; /* [n], NUL behind */
    size_t at, n;
    const char *item; /* tensor in work, for messages; NULL before the first */
    size_t item_len;
} cursor;

static exc_status refuse(const cursor *c, const char *expected) {
    char found[24] = "the end of the header";
    if (c->at < c->n) snprintf(found, sizeof found, "\"%s\"", exc_show(c->s + c->at, 1));
    return exc_fail(c->ctx, EXC_ERR_INPUT, "%s: %s%sheader byte %zu: expected %s, found %s", c->o->t.path,
                    c->item ? exc_show(c->item, c->item_len) : "", c->item ? ": " : "", 8 + c->at, expected,
                    found);
}

/* a value that is well-formed and not allowed */
static exc_status bad(const cursor *c, const char *rule) {
    return exc_fail(c->ctx, EXC_ERR_INPUT, "%s: %s%sheader byte %zu: %s", c->o->t.path,
                    c->item ? exc_show(c->item, c->item_len) : "", c->item ? ": " : "", 8 + c->at, rule);
}

static void blanks(cursor *c) {
    while (c->at < c->n &&
           (c->s[c->at] == ' ' || c->s[c->at] == '\n' || c->s[c->at] == '\r' || c->s[c->at] == '\t'))
        c->at++;
}

static bool take(cursor *c, char ch) {
    blanks(c);
    if (c->at >= c->n || c->s[c->at] != ch) return false;
    c->at++;
    return true;
}

static exc_status expect(cursor *c, char ch, const char *text) {
    return take(c, ch) ? EXC_OK : refuse(c, text);
}

static bool hex4(const char *s, unsigned *out) {
    *out = 0;
    for (int i = 0; i < 4; i++) {
        unsigned d;
        if (s[i] >= '0' && s[i] <= '9')
            d = (unsigned)(s[i] - '0');
        else if (s[i] >= 'a' && s[i] <= 'f')
            d = (unsigned)(s[i] - 'a') + 10;
        else if (s[i] >= 'A' && s[i] <= 'F')
            d = (unsigned)(s[i] - 'A') + 10;
        else
            return false;
        *out = *out << 4 | d;
    }
    return true;
}

static size_t put_utf8(char *to, unsigned u) {
    if (u < 0x80) {
        to[0] = (char)u;
        return 1;
    }
    if (u < 0x800) {
        to[0] = (char)(0xc0 | u >> 6);
        to[1] = (char)(0x80 | (u & 63));
        return 2;
    }
    if (u < 0x10000) {
        to[0] = (char)(0xe0 | u >> 12);
        to[1] = (char)(0x80 | (u >> 6 & 63));
        to[2] = (char)(0x80 | (u & 63));
        return 3;
    }
    to[0] = (char)(0xf0 | u >> 18);
    to[1] = (char)(0x80 | (u >> 12 & 63));
    to[2] = (char)(0x80 | (u >> 6 & 63));
    to[3] = (char)(0x80 | (u & 63));
    return 4;
}

/* \uXXXX at c->at (behind the 'u'), with its second half if it is a surrogate; 6 or 12 bytes become at most 4
 */
static exc_status unicode(cursor *c, char *to, size_t *len) {
    unsigned u, low;
    if (c->n - c->at < 4 || !hex4(c->s + c->at, &u)) return refuse(c, "4 hexadecimal digits");
    if (!u) return bad(c, "expected no NUL in a string, found \\u0000");
    if (u >= 0xdc00 && u <= 0xdfff) return bad(c, "expected a surrogate pair, found its second half alone");
    c->at += 4;
    if (u >= 0xd800 && u <= 0xdbff) {
        if (c->n - c->at < 6 || c->s[c->at] != '\\' || c->s[c->at + 1] != 'u' ||
            !hex4(c->s + c->at + 2, &low) || low < 0xdc00 || low > 0xdfff)
            return bad(c, "expected a surrogate pair, found its first half alone");
        c->at += 6;
        u = 0x10000 + ((u - 0xd800) << 10) + (low - 0xdc00);
    }
    *len += put_utf8(to, u);
    return EXC_OK;
}

/* a string, unescaped in place: *text is NUL-terminated inside the header block (over its closing quote or
 * before) */
static exc_status string(cursor *c, const char *expected, char **text, size_t *len) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    EXC_TRY(expect(c, '"', expected));
    char *out = c->s + c->at;
    size_t start = c->at, n = 0, at;
    while (c->at < c->n && c->s[c->at] != '"') {
        unsigned char ch = (unsigned char)c->s[c->at];
        if (ch < 0x20) return bad(c, "expected no control character in a string, found one");
        if (ch != '\\') {
            out[n++] = (char)ch;
            c->at++;
            continue;
        }
        if (++c->at >= c->n) break;
        const char *p = strchr(from, c->s[c->at]);
        if (c->s[c->at] == 'u') {
            c->at++;
            EXC_TRY(unicode(c, out + n, &n));
        } else if (p && *p) {
            out[n++] = to[p - from];
            c->at++;
        } else {
            return refuse(c, "an escape that JSON knows");
        }
    }
    if (c->at >= c->n) return refuse(c, "the end of a string");
    c->at++;
    out[n] = 0;
    if (!exc_utf8_valid(out, n, &at)) {
        c->at = start + at;
        return bad(c, "expected UTF-8, found a byte that is none");
    }
    *text = out;
    *len = n;
    return EXC_OK;
}

/* digits only: no sign, no fraction, no exponent, no leading zero; integers never pass through a double */
static exc_status integer(cursor *c, const char *expected, uint64_t most, uint64_t *out) {
    blanks(c);
    size_t start = c->at;
    uint64_t v = 0;
    bool fits = true;
    while (c->at < c->n && c->s[c->at] >= '0' && c->s[c->at] <= '9') {
        uint64_t d = (uint64_t)(c->s[c->at] - '0');
        fits = fits && !__builtin_mul_overflow(v, 10, &v) && !__builtin_add_overflow(v, d, &v);
        c->at++;
    }
    bool good = c->at > start && !(c->s[start] == '0' && c->at - start > 1);
    char next = c->at < c->n ? c->s[c->at] : 0;
    if (!good || next == '.' || next == 'e' || next == 'E' || !fits || v > most) {
        c->at = start;
        return refuse(c, expected);
    }
    *out = v;
    return EXC_OK;
}

static exc_status number(cursor *c) {
    size_t start = c->at;
    if (c->s[c->at] == '-') c->at++;
    size_t digits = strspn(c->s + c->at, "0123456789");
    bool good = digits && !(c->s[c->at] == '0' && digits > 1);
    c->at += digits;
    if (c->s[c->at] == '.') {
        digits = strspn(c->s + ++c->at, "0123456789");
        good = good && digits;
        c->at += digits;
    }
    if (c->s[c->at] == 'e' || c->s[c->at] == 'E') {
        c->at++;
        if (c->s[c->at] == '+' || c->s[c->at] == '-') c->at++;
        digits = strspn(c->s + c->at, "0123456789");
        good = good && digits;
        c->at += digits;
    }
    if (good) return EXC_OK;
    c->at = start;
    return refuse(c, "a JSON value");
}

/* any value, checked and forgotten: fields that we do not know stay in the header, which nobody re-serialises
 */
static exc_status skip(cursor *c, int depth) {
    static const char *const words[] = {"true", "false", "null"};
    char *text;
    size_t len;
    blanks(c);
    if (depth > MAX_DEPTH) return bad(c, "expected at most 32 nested values, found more");
    if (c->at >= c->n) return refuse(c, "a JSON value");
    if (c->s[c->at] == '"') return string(c, "a string", &text, &len);
    if (c->s[c->at] == '{' || c->s[c->at] == '[') {
        bool object = c->s[c->at++] == '{';
        char end = object ? '}' : ']';
        if (take(c, end)) return EXC_OK;
        do {
            if (object) {
                EXC_TRY(string(c, "a key", &text, &len));
                EXC_TRY(expect(c, ':', "\":\""));
            }
            EXC_TRY(skip(c, depth + 1));
        } while (take(c, ','));
        return expect(c, end, object ? "\",\" or \"}\"" : "\",\" or \"]\"");
    }
    for (size_t i = 0; i < EXC_COUNT(words); i++) {
        size_t n = strlen(words[i]);
        if (c->n - c->at >= n && !memcmp(c->s + c->at, words[i], n)) {
            c->at += n;
            return EXC_OK;
        }
    }
    return number(c);
}

/* ------------------------------------------------------------------------------------------------- one
 * tensor */

/* known: the row. Unknown names that look like one pass as OTHER, with their size taken on trust from the
 * offsets */
static exc_status read_dtype(cursor *c, exc_tensor *x, unsigned *bits) {
    char *name;
    size_t len;
    EXC_TRY(string(c, "a dtype name", &name, &len));
    x->dtype_name = name;
    x->dtype = EXC_DTYPE_OTHER;
    *bits = 0;
    for (size_t i = 0; i < EXC_COUNT(dtypes); i++) {
        if (strcmp(dtypes[i].name, name)) continue;
        x->dtype = dtypes[i].dtype;
        *bits = dtypes[i].bits;
        return EXC_OK;
    }
    bool plausible = len > 1 && len < 32 && name[0] >= 'A' && name[0] <= 'Z' &&
                     strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") == len;
    if (plausible) return EXC_OK;
    return exc_fail(c->ctx, EXC_ERR_INPUT,
                    "%s: %s: dtype: expected a safetensors dtype such as BF16, found \"%s\"", c->o->t.path,
                    exc_show(c->item, c->item_len), exc_show(name, len));
}

/* *elements: the product of all dimensions, 0 if any is 0, whatever their order */
static exc_status read_shape(cursor *c, exc_tensor *x, uint64_t *elements, bool *fits) {
    EXC_TRY(expect(c, '[', "a list (shape)"));
    bool zero = false;
    *elements = 1;
    *fits = true;
    if (take(c, ']')) return EXC_OK;
    do {
        uint64_t d;
        EXC_TRY(integer(c, "a dimension 0..2^48-1", MAX_DIM, &d));
        if (x->rank == MAX_RANK) return bad(c, "expected at most 64 dimensions, found more");
        if (x->rank < (int)EXC_COUNT(x->shape)) x->shape[x->rank] = (int64_t)d;
        x->rank++;
        zero = zero || !d;
        if (!zero && __builtin_mul_overflow(*elements, d, elements)) *fits = false;
    } while (take(c, ','));
    if (zero) {
        *elements = 0;
        *fits = true;
    }
    return expect(c, ']', "\",\" or \"]\"");
}

static exc_status read_offsets(cursor *c, exc_tensor *x) {
    EXC_TRY(expect(c, '[', "a list (data_offsets)"));
    EXC_TRY(integer(c, "an offset (a whole number below 2^63)", INT64_MAX, &x->begin));
    EXC_TRY(expect(c, ',', "\",\" and the second offset"));
    EXC_TRY(integer(c, "an offset (a whole number below 2^63)", INT64_MAX, &x->end));
    return expect(c, ']', "\"]\" (two offsets)");
}

static exc_status check_size(cursor *c, const exc_tensor *x, uint64_t elements, bool fits, unsigned bits) {
    const char *path = c->o->t.path, *name = exc_show(c->item, c->item_len);
    uint64_t total;
    if (x->begin > x->end)
        return exc_fail(c->ctx, EXC_ERR_INPUT,
                        "%s: %s: data_offsets: expected begin <= end, found [%llu,%llu]", path, name,
                        (unsigned long long)x->begin, (unsigned long long)x->end);
    if (!bits) return EXC_OK;
    if (!fits || __builtin_mul_overflow(elements, (uint64_t)bits, &total))
        return exc_fail(c->ctx, EXC_ERR_INPUT, "%s: %s: shape: expected a size below 2^64 bits, found more",
                        path, name);
    if (total % 8)
        return exc_fail(c->ctx, EXC_ERR_INPUT,
                        "%s: %s: shape: expected whole bytes, found %llu elements of %u bits", path, name,
                        (unsigned long long)elements, bits);
    if (x->end - x->begin != total / 8)
        return exc_fail(
            c->ctx, EXC_ERR_INPUT,
            "%s: %s: data_offsets: expected %llu bytes (shape x %s), found [%llu,%llu], %llu bytes", path,
            name, (unsigned long long)(total / 8), x->dtype_name, (unsigned long long)x->begin,
            (unsigned long long)x->end, (unsigned long long)(x->end - x->begin));
    return EXC_OK;
}

static exc_status read_tensor(cursor *c, exc_tensor *x) {
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };
    unsigned seen = 0, bits = 0;
    uint64_t elements = 0;
    bool fits = true;
    char *key;
    size_t len;
    EXC_TRY(expect(c, '{', "an object (dtype, shape, data_offsets)"));
    if (!take(c, '}')) {
        do {
            EXC_TRY(string(c, "a key", &key, &len));
            unsigned field = !strcmp(key, "dtype")          ? DTYPE
                             : !strcmp(key, "shape")        ? SHAPE
                             : !strcmp(key, "data_offsets") ? OFFSETS
                                                            : 0;
            if (field & seen) return bad(c, "expected each key once, found a duplicate");
            seen |= field;
            EXC_TRY(expect(c, ':', "\":\""));
            EXC_TRY(field == DTYPE     ? read_dtype(c, x, &bits)
                    : field == SHAPE   ? read_shape(c, x, &elements, &fits)
                    : field == OFFSETS ? read_offsets(c, x)
                                       : skip(c, 3));
        } while (take(c, ','));
        EXC_TRY(expect(c, '}', "\",\" or \"}\""));
    }
    if (seen != (DTYPE | SHAPE | OFFSETS))
        return bad(c, !(seen & DTYPE)   ? "expected a dtype, found none"
                      : !(seen & SHAPE) ? "expected a shape, found none"
                                        : "expected data_offsets, found none");
    return check_size(c, x, elements, fits, bits);
}

static exc_status read_metadata(cursor *c) {
    exc_tensors *t = &c->o->t;
    char *key, *value;
    size_t klen, vlen;
    if (t->metadata) return bad(c, "expected __metadata__ once, found a duplicate");
    if (!(t->metadata = json_object()))
        return exc_fail(c->ctx, EXC_ERR_MEMORY, "%s: no memory for __metadata__", t->path);
    blanks(c);
    if (c->n - c->at >= 4 && !memcmp(c->s + c->at, "null", 4)) {
        c->at += 4;
        return EXC_OK;
    }
    EXC_TRY(expect(c, '{', "an object of strings (__metadata__)"));
    if (take(c, '}')) return EXC_OK;
    do {
        EXC_TRY(string(c, "a key of __metadata__", &key, &klen));
        if (json_object_get(t->metadata, key))
            return bad(c, "expected each key of __metadata__ once, found a duplicate");
        EXC_TRY(expect(c, ':', "\":\""));
        EXC_TRY(string(c, "a string (__metadata__ holds only strings)", &value, &vlen));
        if (json_object_set_new(t->metadata, key, json_stringn(value, vlen)))
            return exc_fail(c->ctx, EXC_ERR_MEMORY, "%s: no memory for __metadata__", t->path);
    } while (take(c, ','));
    return expect(c, '}', "\",\" or \"}\"");
}

static exc_status add_tensor(cursor *c, exc_tensor *x) {
    opened *o = c->o;
    if (o->t.count == o->cap) {
        size_t cap = o->cap ? o->cap * 2 : 64;
        exc_tensor *items = exc_alloc(c->ctx, cap, sizeof *items, "tensor table");
        if (!items) return EXC_ERR_MEMORY;
        if (o->t.count) memcpy(items, o->t.items, o->t.count * sizeof *items);
        exc_release(o->t.items);
        o->t.items = items;
        o->cap = cap;
    }
    o->t.items[o->t.count++] = *x;
    return EXC_OK;
}

static exc_status read_header(cursor *c) {
    char *name;
    size_t len;
    EXC_TRY(expect(c, '{', "{"));
    if (!take(c, '}')) {
        do {
            c->item = NULL;
            EXC_TRY(string(c, "a tensor name", &name, &len));
            c->item = name;
            c->item_len = len;
            if (len > MAX_NAME) return bad(c, "expected a name of at most 4096 bytes, found a longer one");
            EXC_TRY(expect(c, ':', "\":\""));
            if (!strcmp(name, "__metadata__")) {
                EXC_TRY(read_metadata(c));
            } else {
                exc_tensor x = {.name = name};
                EXC_TRY(read_tensor(c, &x));
                EXC_TRY(add_tensor(c, &x));
            }
        } while (take(c, ','));
        c->item = NULL;
        EXC_TRY(expect(c, '}', "\",\" or \"}\""));
    }
    blanks(c);
    if (c->at == c->n) return EXC_OK;
    if (!c->s[c->at]) return bad(c, "expected spaces behind the header, found NUL (padded with zeros?)");
    return refuse(c, "spaces up to the end of the header");
}

/* ------------------------------------------------------------------------------------------------- whole
 * table */

static int by_place(const void *pa, const void *pb) {
    const exc_tensor *a = pa, *b = pb;
    if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
    return a->end < b->end ? -1 : a->end > b->end;
}

static int by_name(const void *pa, const void *pb) {
    return strcmp((*(const exc_tensor *const *)pa)->name, (*(const exc_tensor *const *)pb)->name);
}

/* ranges tile the data: contiguous from 0, up to the end of the file; then they become absolute */
static exc_status check_ranges(exc_ctx *ctx, opened *o) {
    exc_tensors *t = &o->t;
    uint64_t at = 0, data = t->size - t->header_bytes;
    if (t->count) qsort(t->items, t->count, sizeof *t->items, by_place);
    for (size_t i = 0; i < t->count; i++) {
        exc_tensor *x = &t->items[i];
        if (x->begin != at)
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s: %s: data_offsets: expected data to begin at %llu, found %llu (%s)", t->path,
                            exc_show(x->name, strlen(x->name)), (unsigned long long)at,
                            (unsigned long long)x->begin,
                            x->begin < at ? "it overlaps another tensor" : "a hole before it");
        at = x->end;
        if (at > data) break;
    }
    if (at != data)
        return exc_fail(
            ctx, EXC_ERR_INPUT, "%s: size: expected %llu bytes (header %zu, data %llu), found %zu; %s",
            t->path, (unsigned long long)(t->header_bytes + at), t->header_bytes, (unsigned long long)at,
            t->size, at > data ? "incomplete download?" : "there is something behind the last tensor");
    for (size_t i = 0; i < t->count; i++) {
        t->items[i].begin += t->header_bytes;
        t->items[i].end += t->header_bytes;
    }
    return EXC_OK;
}

static exc_status index_names(exc_ctx *ctx, opened *o) {
    exc_tensors *t = &o->t;
    o->by_name = exc_alloc(ctx, t->count ? t->count : 1, sizeof *o->by_name, "tensor names");
    if (!o->by_name) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < t->count; i++) o->by_name[i] = &t->items[i];
    if (t->count) qsort(o->by_name, t->count, sizeof *o->by_name, by_name);
    for (size_t i = 1; i < t->count; i++) {
        const char *name = o->by_name[i]->name;
        if (!strcmp(name, o->by_name[i - 1]->name))
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s: %s: expected each tensor name once, found a duplicate name", t->path,
                            exc_show(name, strlen(name)));
    }
    return EXC_OK;
}

/* unknown dtypes pass, since a tensor that nobody edits only has to be copied; said once a file */
static void warn_dtypes(exc_ctx *ctx, const opened *o) {
    for (size_t i = 0; i < o->t.count; i++) {
        const exc_tensor *x = &o->t.items[i];
        bool known = x->dtype != EXC_DTYPE_OTHER;
        for (size_t d = 0; d < EXC_COUNT(dtypes) && !known; d++)
            known = !strcmp(dtypes[d].name, x->dtype_name);
        if (known) continue;
        exc_warn(ctx, "%s: %s: dtype %s is not known; its size is taken from data_offsets", o->t.path,
                 exc_show(x->name, strlen(x->name)), x->dtype_name);
        return;
    }
}

/* -------------------------------------------------------------------------------------------------------
 * file */

/* N of the first 8 bytes, against the file size before any arithmetic with it */
static exc_status header_length(exc_ctx *ctx, const opened *o, int fd, uint64_t *out) {
    uint8_t b[8];
    uint64_t n = 0, swapped = 0;
    if (o->t.size < 8)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: size: expected at least 8 bytes, found %zu; incomplete download?", o->t.path,
                        o->t.size);
    EXC_TRY(exc_read_at(ctx, o->t.path, fd, b, 8, 0));
    for (int i = 0; i < 8; i++) {
        n |= (uint64_t)b[i] << 8 * i;
        swapped = swapped << 8 | b[i];
    }
    *out = n;
    if (n > MAX_HEADER)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: header length: expected at most %llu, found %llu%s",
                        o->t.path, (unsigned long long)MAX_HEADER, (unsigned long long)n,
                        swapped <= MAX_HEADER ? "; wrong byte order?" : "; not a safetensors file?");
    if (n < 2)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: header length: expected at least 2, found %llu", o->t.path,
                        (unsigned long long)n);
    if (n > o->t.size - 8)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: header: expected %llu bytes, found %zu; incomplete download?", o->t.path,
                        (unsigned long long)n, o->t.size - 8);
    return EXC_OK;
}

static exc_status load_header(exc_ctx *ctx, opened *o, int fd) {
    uint64_t n = 0;
    EXC_TRY(header_length(ctx, o, fd, &n));
    o->t.header_bytes = (size_t)n + 8;
    if (!(o->header = exc_alloc(ctx, (size_t)n + 1, 1, "safetensors header"))) return EXC_ERR_MEMORY;
    EXC_TRY(exc_read_at(ctx, o->t.path, fd, o->header, (size_t)n, 8));
    o->header[n] = 0;
    if (!o->header[0] || o->header[0] == '!')
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: header byte 8: expected {, found the mark of an unfinished edit in place",
                        o->t.path);
    cursor c = {.ctx = ctx, .o = o, .s = o->header, .n = (size_t)n};
    EXC_TRY(read_header(&c));
    EXC_TRY(check_ranges(ctx, o));
    EXC_TRY(index_names(ctx, o));
    warn_dtypes(ctx, o);
    return EXC_OK;
}

static exc_status open_fd(exc_ctx *ctx, opened *o, int fd) {
    struct stat sb;
    if (fstat(fd, &sb)) return exc_fail_errno(ctx, "%s", o->t.path);
    if (!S_ISREG(sb.st_mode))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected a regular file, found a %s", o->t.path,
                        S_ISDIR(sb.st_mode) ? "folder" : "special file");
    o->t.size = (size_t)sb.st_size;
    o->t.dev = (uint64_t)sb.st_dev;
    o->t.ino = (uint64_t)sb.st_ino;
    o->t.mtime_ns = (uint64_t)sb.st_mtim.tv_sec * 1000000000u + (uint64_t)sb.st_mtim.tv_nsec;
    EXC_TRY(load_header(ctx, o, fd));
    void *map = mmap(NULL, o->t.size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) return exc_fail_errno(ctx, "%s: mapping %zu bytes", o->t.path, o->t.size);
    o->t.map = map;
    return EXC_OK;
}

exc_status exc_tensors_open(exc_ctx *ctx, const char *path, exc_tensors **out) {
    *out = NULL;
    opened *o = exc_zalloc(ctx, 1, sizeof *o, "tensor file");
    if (!o) return EXC_ERR_MEMORY;
    exc_status st = (o->t.path = exc_strdup(ctx, path)) ? EXC_OK : EXC_ERR_MEMORY;
    int fd = -1;
    if (st == EXC_OK && (fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) < 0)
        st = exc_fail_errno(ctx, "%s", path);
    if (st == EXC_OK) st = open_fd(ctx, o, fd);
    if (fd >= 0) close(fd);
    if (st != EXC_OK)
        exc_tensors_close(&o->t);
    else
        *out = &o->t;
    return st;
}

const exc_tensor *exc_tensors_find(const exc_tensors *t, const char *name) {
    const opened *o = (const opened *)t;
    const exc_tensor key = {.name = (char *)(uintptr_t)name}, *p = &key;
    const exc_tensor **hit = t->count ? bsearch(&p, o->by_name, t->count, sizeof *o->by_name, by_name) : NULL;
    return hit ? *hit : NULL;
}

const void *exc_tensors_data(const exc_tensors *t, const exc_tensor *x) { return t->map + x->begin; }

void exc_tensors_close(exc_tensors *t) {
    if (!t) return;
    opened *o = (opened *)t;
    if (t->map) munmap((void *)(uintptr_t)t->map, t->size);
    json_decref(t->metadata);
    exc_release(t->items);
    exc_release(o->by_name);
    exc_release(o->header);
    exc_release(t->path);
    exc_release(o);
}
