/* merges.c - BPE of one piece: its bytes (or characters, where the tokenizer says so) become tokens, then the
 * adjacent pair of lowest rank is merged, the leftmost first among equals, until no pair has a rank.
 *
 * Three speeds. Pieces seen lately come from a cache (direct mapped, one 64-byte line an entry, so its size
 * is fixed and a lookup is one line of memory): text repeats its words. Short pieces are merged by scanning
 * their ranks again after every merge, which for a few dozen pairs beats any heap. Long ones (a megabyte of
 * `a` is legal text) use a heap of (rank, place) over a linked list, n log n; entries whose pair has changed
 * since are recognised by their rank, because a place's pair only ever grows. */
#include <string.h>

#include "tokenizer.h"

enum { CACHE_LINES = 1 << 14, KNOWN_BYTES = 22, KNOWN_IDS = 8, SHORT_PIECE = 64 };

struct exc_known {
    uint64_t hash;
    uint8_t len, count; /* count 0: empty */
    char bytes[KNOWN_BYTES];
    int32_t ids[KNOWN_IDS];
};
_Static_assert(sizeof(exc_known) == 64, "one cache line");

/* smallest power of two with at most half of it filled by n */
static uint32_t table_size(size_t n) {
    uint32_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
}

/* ---------------------------------------------------------------------------------------------- words and
 * merges */

exc_status exc_words_build(exc_ctx *ctx, exc_tokenizer *t, const char *what) {
    uint32_t size = table_size(t->size);
    t->words = exc_alloc(ctx, size, sizeof *t->words, "vocabulary");
    if (!t->words) return EXC_ERR_MEMORY;
    memset(t->words, 0xff, size * sizeof *t->words);
    t->words_mask = size - 1;
    for (uint32_t id = 0; id < t->size; id++) {
        const exc_token *x = t->tokens + id;
        if (!(x->flags & EXC_TOKEN_WORD)) continue;
        if (exc_words_find(t, t->bytes + x->begin, x->len) >= 0)
            return exc_fail(ctx, EXC_ERR_INPUT, "%s: vocabulary: token \"%s\" is there twice", what,
                            exc_show(t->bytes + x->begin, x->len));
        uint32_t at = (uint32_t)exc_hash64(t->bytes + x->begin, x->len) & t->words_mask;
        while (t->words[at] != UINT32_MAX) at = (at + 1) & t->words_mask;
        t->words[at] = id;
    }
    return EXC_OK;
}

int64_t exc_words_find(const exc_tokenizer *t, const char *p, size_t n) {
    uint32_t at = (uint32_t)exc_hash64(p, n) & t->words_mask;
    for (; t->words[at] != UINT32_MAX; at = (at + 1) & t->words_mask) {
        const exc_token *x = t->tokens + t->words[at];
        if (x->len == n && !memcmp(t->bytes + x->begin, p, n)) return t->words[at];
    }
    return -1;
}

static uint32_t pair_hash(uint32_t left, uint32_t right) {
    return (uint32_t)((((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u) >> 32);
}

static const exc_merge *find_merge(const exc_tokenizer *t, uint32_t left, uint32_t right) {
    uint32_t at = pair_hash(left, right) & t->merges_mask;
    const exc_merge *m = t->merges + at;
    while (m->rank != EXC_NO_RANK && (m->left != left || m->right != right)) {
        at = (at + 1) & t->merges_mask;
        m = t->merges + at;
    }
    return m; /* an empty slot has EXC_NO_RANK */
}

exc_status exc_merges_build(exc_ctx *ctx, exc_tokenizer *t, const exc_merge *list, size_t n,
                            const char *what) {
    uint32_t size = table_size(n);
    t->merges = exc_alloc(ctx, size, sizeof *t->merges, "merges");
    if (!t->merges) return EXC_ERR_MEMORY;
    memset(t->merges, 0xff, size * sizeof *t->merges);
    t->merges_mask = size - 1;
    for (size_t i = 0; i < n; i++) {
        exc_merge *m = (exc_merge *)find_merge(t, list[i].left, list[i].right);
        if (m->rank != EXC_NO_RANK)
            return exc_fail(ctx, EXC_ERR_INPUT, "%s: merges: the pair of merge %zu is there twice", what, i);
        *m = list[i];
    }
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------ merging a
 * piece */

/* the tokens that merging starts from: of bytes; or of characters, and of the bytes of those that are none */
static size_t first_ids(const exc_tokenizer *t, const char *p, size_t n, int32_t *ids) {
    size_t count = 0;
    for (; !t->by_char && count < n; count++) ids[count] = t->byte_id[(unsigned char)p[count]];
    for (size_t at = 0, from = 0; t->by_char && at < n; from = at) {
        exc_utf8_next(p, &at);
        int64_t id = exc_words_find(t, p + from, at - from);
        if (id >= 0) ids[count++] = (int32_t)id;
        for (; id < 0 && from < at; from++) ids[count++] = t->byte_id[(unsigned char)p[from]];
    }
    return count;
}

static size_t merge_short(const exc_tokenizer *t, const char *p, size_t n, int32_t *ids) {
    uint32_t id[SHORT_PIECE], rank[SHORT_PIECE], made[SHORT_PIECE]; /* rank, made: of the pair (i, i+1) */
    n = first_ids(t, p, n, ids);
    for (size_t i = 0; i < n; i++) id[i] = (uint32_t)ids[i];
    for (size_t i = 0; i + 1 < n; i++) {
        const exc_merge *m = find_merge(t, id[i], id[i + 1]);
        rank[i] = m->rank;
        made[i] = m->id;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == EXC_NO_RANK) break;
        id[best] = made[best];
        n--;
        for (size_t i = best + 1; i < n; i++) {
            id[i] = id[i + 1];
            rank[i - 1] = rank[i];
            made[i - 1] = made[i];
        }
        for (size_t i = best ? best - 1 : 0; i <= best && i + 1 < n; i++) {
            const exc_merge *m = find_merge(t, id[i], id[i + 1]);
            rank[i] = m->rank;
            made[i] = m->id;
        }
    }
    memcpy(ids, id, n * sizeof *ids);
    return n;
}

/* one token of a long piece; rank, made: of it and its successor */
typedef struct node {
    uint32_t id, before, after, rank, made;
} node;
#define NO_NODE UINT32_MAX

typedef struct heap {
    uint64_t *key;
    size_t n;
} heap; /* rank << 32 | place: smallest first */

static void heap_push(heap *h, uint64_t key) {
    size_t i = h->n++;
    for (size_t up; i && h->key[up = (i - 1) / 2] > key; i = up) h->key[i] = h->key[up];
    h->key[i] = key;
}

static uint64_t heap_pop(heap *h) {
    uint64_t top = h->key[0], last = h->key[--h->n];
    size_t i = 0;
    for (size_t kid; (kid = 2 * i + 1) < h->n; i = kid) {
        if (kid + 1 < h->n && h->key[kid + 1] < h->key[kid]) kid++;
        if (h->key[kid] >= last) break;
        h->key[i] = h->key[kid];
    }
    h->key[i] = last;
    return top;
}

static void rate(const exc_tokenizer *t, node *list, uint32_t at, heap *h) {
    node *x = list + at;
    x->rank = EXC_NO_RANK;
    if (x->after == NO_NODE) return;
    const exc_merge *m = find_merge(t, x->id, list[x->after].id);
    x->rank = m->rank;
    x->made = m->id;
    if (m->rank != EXC_NO_RANK) heap_push(h, (uint64_t)m->rank << 32 | at);
}

/* every merge pushes two pairs at most and there are fewer than n, so 3n keys are enough */
static exc_status long_room(exc_ctx *ctx, exc_scratch *w, size_t n) {
    size_t need = n * (sizeof(node) + 3 * sizeof(uint64_t));
    if (w->room_bytes >= need) return EXC_OK;
    exc_release(w->room);
    w->room_bytes = 0;
    w->room = exc_alloc(ctx, n, sizeof(node) + 3 * sizeof(uint64_t), "merges of a long piece");
    if (!w->room) return EXC_ERR_MEMORY;
    w->room_bytes = need;
    return EXC_OK;
}

static exc_status merge_long(exc_ctx *ctx, const exc_tokenizer *t, exc_scratch *w, const char *p, size_t n,
                             int32_t *ids, size_t *count) {
    EXC_TRY(long_room(ctx, w, n));
    heap h = {w->room, 0};
    node *list = (node *)(void *)(h.key + 3 * n);
    n = first_ids(t, p, n, ids);
    for (size_t i = 0; i < n; i++)
        list[i] = (node){(uint32_t)ids[i], i ? (uint32_t)i - 1 : NO_NODE,
                         i + 1 < n ? (uint32_t)i + 1 : NO_NODE, EXC_NO_RANK, 0};
    for (size_t i = 0; i + 1 < n; i++) rate(t, list, (uint32_t)i, &h);
    while (h.n) {
        uint64_t top = heap_pop(&h);
        uint32_t at = (uint32_t)top;
        node *x = list + at;
        if (x->rank != (uint32_t)(top >> 32)) continue; /* merged away or grown since */
        node *gone = list + x->after;
        x->id = x->made;
        x->after = gone->after;
        gone->rank = EXC_NO_RANK;
        if (x->after != NO_NODE) list[x->after].before = at;
        rate(t, list, at, &h);
        if (x->before != NO_NODE) rate(t, list, x->before, &h);
    }
    *count = 0;
    for (uint32_t at = 0; at != NO_NODE; at = list[at].after) ids[(*count)++] = (int32_t)list[at].id;
    return EXC_OK;
}

/* -------------------------------------------------------------------------------------------------------- a
 * piece */

exc_status exc_cache_open(exc_ctx *ctx, exc_scratch *w) {
    w->cache = exc_zalloc(ctx, CACHE_LINES, sizeof *w->cache, "cache of pieces");
    return w->cache ? EXC_OK : EXC_ERR_MEMORY;
}

static exc_status merge_new(exc_ctx *ctx, const exc_tokenizer *t, exc_scratch *w, const char *p, size_t n,
                            int32_t *ids, size_t *count) {
    int64_t whole = t->ignore_merges ? exc_words_find(t, p, n) : -1;
    if (whole >= 0) {
        ids[0] = (int32_t)whole;
        *count = 1;
        return EXC_OK;
    }
    if (n > SHORT_PIECE) return merge_long(ctx, t, w, p, n, ids, count);
    *count = merge_short(t, p, n, ids);
    return EXC_OK;
}

exc_status exc_merge_piece(exc_ctx *ctx, const exc_tokenizer *t, exc_scratch *w, const char *p, size_t n,
                           exc_ids *ids) {
    EXC_TRY(exc_ids_reserve(ctx, ids, n));
    int32_t *to = ids->data + ids->len;
    uint64_t hash = exc_hash64(p, n);
    exc_known *k = w->cache + (hash >> 32) % CACHE_LINES;
    if (k->hash == hash && k->len == n && k->count && !memcmp(k->bytes, p, n)) {
        for (unsigned i = 0; i < k->count; i++) to[i] = k->ids[i];
        ids->len += k->count;
        return EXC_OK;
    }
    size_t count;
    EXC_TRY(merge_new(ctx, t, w, p, n, to, &count));
    ids->len += count;
    if (n <= KNOWN_BYTES && count <= KNOWN_IDS) {
        *k = (exc_known){.hash = hash, .len = (uint8_t)n, .count = (uint8_t)count};
        memcpy(k->bytes, p, n);
        memcpy(k->ids, to, count * sizeof *to);
    }
    return EXC_OK;
}
