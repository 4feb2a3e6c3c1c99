/* nfc.c - Unicode normalisation form C of UTF-8 text.
 *
 * Almost all text is in form C already, so the work is finding the places where it may not be. `active` lists
 * the code points that normalisation may touch; a code point outside it neither combines with what stands
 * before it nor changes, so text may be cut before it. A stretch worth normalising is therefore: the last
 * inactive code point before an active one, the active ones, up to the next inactive one. A stretch is
 * decomposed fully, its marks are ordered by combining class (stable), and then composed from the left. Marks
 * may come by the million: sorting is n log n. */
#include <stdlib.h>
#include <string.h>

#include "composition.h"
#include "decomposition.h"
#include "tokenizer.h"

enum {
    HANGUL_S = 0xac00,
    HANGUL_L = 0x1100,
    HANGUL_V = 0x1161,
    HANGUL_T = 0x11a7,
    COUNT_L = 19,
    COUNT_V = 21,
    COUNT_T = 28,
    COUNT_S = COUNT_L * COUNT_V * COUNT_T
};

/* A code point with its combining class: class in the high bits, so that sorting by (class, place) is one
 * comparison. */
typedef struct glyph {
    uint64_t key;
    uint32_t code;
} glyph;

uint32_t exc_utf8_next(const char *text, size_t *at) {
    const unsigned char *s = (const unsigned char *)text + *at;
    if (s[0] < 0x80) return *at += 1, s[0];
    if (s[0] < 0xe0) return *at += 2, (uint32_t)(s[0] & 0x1f) << 6 | (s[1] & 0x3f);
    if (s[0] < 0xf0)
        return *at += 3, (uint32_t)(s[0] & 0xf) << 12 | (uint32_t)(s[1] & 0x3f) << 6 | (s[2] & 0x3f);
    *at += 4;
    return (uint32_t)(s[0] & 7) << 18 | (uint32_t)(s[1] & 0x3f) << 12 | (uint32_t)(s[2] & 0x3f) << 6 |
           (s[3] & 0x3f);
}

void exc_utf8_put(exc_buf *out, uint32_t c) {
    char s[4];
    size_t n = 0;
    if (c < 0x80) {
        s[n++] = (char)c;
    } else if (c < 0x800) {
        s[n++] = (char)(0xc0 | c >> 6);
    } else if (c < 0x10000) {
        s[n++] = (char)(0xe0 | c >> 12);
        s[n++] = (char)(0x80 | (c >> 6 & 0x3f));
    } else {
        s[n++] = (char)(0xf0 | c >> 18);
        s[n++] = (char)(0x80 | (c >> 12 & 0x3f));
        s[n++] = (char)(0x80 | (c >> 6 & 0x3f));
    }
    if (c >= 0x80) s[n++] = (char)(0x80 | (c & 0x3f));
    exc_buf_put(out, s, n);
}

static bool is_active(uint32_t c) {
    if (c < active[0].first || (c >= 0x3100 && c < 0xa66f))
        return false; /* Latin; Chinese and its neighbours */
    size_t lo = 0, hi = EXC_COUNT(active);
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (active[mid].last < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < EXC_COUNT(active) && active[lo].first <= c;
}

static unsigned class_of(uint32_t c) {
    size_t lo = 0, hi = EXC_COUNT(combining);
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (combining[mid].last < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < EXC_COUNT(combining) && combining[lo].first <= c ? combining[lo].class : 0;
}

static uint32_t compose(uint32_t a, uint32_t b) {
    if (a - HANGUL_L < COUNT_L && b - HANGUL_V < COUNT_V)
        return HANGUL_S + ((a - HANGUL_L) * COUNT_V + (b - HANGUL_V)) * COUNT_T;
    if (a - HANGUL_S < COUNT_S && (a - HANGUL_S) % COUNT_T == 0 && b - HANGUL_T - 1 < COUNT_T - 1)
        return a + (b - HANGUL_T);
    size_t lo = 0, hi = EXC_COUNT(composition);
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (composition[mid].first < a || (composition[mid].first == a && composition[mid].second < b))
            lo = mid + 1;
        else
            hi = mid;
    }
    bool found = lo < EXC_COUNT(composition) && composition[lo].first == a && composition[lo].second == b;
    return found ? composition[lo].code : 0;
}

static void put_glyph(exc_buf *stretch, uint32_t c) {
    glyph g = {(uint64_t)class_of(c) << 56 | stretch->len, c};
    exc_buf_put(stretch, &g, sizeof g);
}

/* at most four levels: a decomposition's second half never decomposes further in form C's data, its first may
 */
static void decompose(exc_buf *stretch, uint32_t c) {
    if (c - HANGUL_S < COUNT_S) {
        uint32_t s = c - HANGUL_S;
        put_glyph(stretch, HANGUL_L + s / (COUNT_V * COUNT_T));
        put_glyph(stretch, HANGUL_V + s / COUNT_T % COUNT_V);
        if (s % COUNT_T) put_glyph(stretch, HANGUL_T + s % COUNT_T);
        return;
    }
    size_t lo = 0, hi = EXC_COUNT(decomposition);
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (decomposition[mid].code < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == EXC_COUNT(decomposition) || decomposition[lo].code != c) {
        put_glyph(stretch, c);
        return;
    }
    decompose(stretch, decomposition[lo].first);
    if (decomposition[lo].second) decompose(stretch, decomposition[lo].second);
}

static int by_key(const void *a, const void *b) {
    uint64_t x = ((const glyph *)a)->key, y = ((const glyph *)b)->key;
    return (x > y) - (x < y);
}

static unsigned class_in(const glyph *g) { return (unsigned)(g->key >> 56); }

/* runs of marks, by class; the place in the key keeps equal classes in order */
static void order(glyph *g, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t j = i;
        while (j < n && class_in(g + j)) j++;
        if (j - i > 1) qsort(g + i, j - i, sizeof *g, by_key);
        i = j + 1;
    }
}

/* Composes in place from the left; returns the new length. A mark joins the last starter unless another of
 * the same or a higher class (or a starter) that did not join stands between them. */
static size_t join(glyph *g, size_t n) {
    size_t kept = 0, starter = SIZE_MAX;
    unsigned before = 0; /* class of the last glyph kept after the starter */
    for (size_t i = 0; i < n; i++) {
        unsigned class = class_in(g + i);
        bool next = starter != SIZE_MAX && kept == starter + 1;
        bool open = starter != SIZE_MAX && (next || (before && before < class));
        uint32_t c = open ? compose(g[starter].code, g[i].code) : 0;
        if (c) {
            g[starter].code = c;
            continue;
        }
        if (!class) starter = kept;
        before = class;
        g[kept++] = g[i];
    }
    return kept;
}

static void put_stretch(exc_buf *out, exc_buf *stretch) {
    if (stretch->failed) {
        out->failed = true;
        return;
    }
    glyph *g = (glyph *)(void *)stretch->data;
    size_t n = stretch->len / sizeof *g;
    order(g, n);
    n = join(g, n);
    for (size_t i = 0; i < n; i++) exc_utf8_put(out, g[i].code);
}

/* place of the first active code point at or after `at`; *before is the start of the code point in front of
 * it */
static size_t find_active(const char *text, size_t n, size_t at, size_t *before) {
    *before = at;
    while (at < n) {
        if ((unsigned char)text[at] < 0xcc) { /* below U+0300 nothing is active */
            *before = at;
            at += (unsigned char)text[at] < 0x80 ? 1 : 2;
            continue;
        }
        size_t here = at;
        if (is_active(exc_utf8_next(text, &at))) return here;
        *before = here;
    }
    return n;
}

bool exc_nfc_is(const char *text, size_t n) {
    size_t before;
    return find_active(text, n, 0, &before) == n;
}

void exc_nfc(const char *text, size_t n, exc_buf *out, exc_buf *stretch) {
    for (size_t at = 0; at < n;) {
        size_t from, hit = find_active(text, n, at, &from);
        if (hit == n) from = n;
        exc_buf_put(out, text + at, from - at);
        if (hit == n) return;
        stretch->len = 0;
        for (at = from; at < n;) {
            size_t next = at;
            uint32_t c = exc_utf8_next(text, &next);
            if (at > hit && !is_active(c)) break;
            decompose(stretch, c);
            at = next;
        }
        put_stretch(out, stretch);
    }
}
