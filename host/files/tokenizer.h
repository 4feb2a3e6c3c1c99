/* tokenizer.h - what the files of the tokenizer share; the rest of the program sees files.h only.
 *
 * The way of a text: added tokens are cut out (added.c), what lies between is normalised (nfc.c), cut into
 * pieces by the pre-tokenizer's patterns (pieces.c), and every piece becomes ids by merges (merges.c);
 * encode.c drives it. tokenizer.c loads tokenizer.json into these tables once; after that they are only read.
 */
#ifndef EXC_TOKENIZER_H
#define EXC_TOKENIZER_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "files.h"

enum {
    EXC_TOKEN_WORD = 1,  /* of the vocabulary, written in the alphabet of the kind: merges can make it */
    EXC_TOKEN_PLAIN = 2, /* of the vocabulary, written as itself */
    EXC_TOKEN_ADDED = 4,
    EXC_TOKEN_SPECIAL = 8,
    EXC_TOKEN_BYTE = 16 /* `<0x41>`: what a byte falls back to where its character is no token */
};

/* SentencePiece's way of writing spaces as U+2581 (here one blank again), and where one is put in front:
 * nowhere, of every stretch, of those that begin with none, of the text's first where it begins with none */
typedef enum exc_lead { EXC_LEAD_NONE, EXC_LEAD_EVERY, EXC_LEAD_MISSING, EXC_LEAD_FIRST } exc_lead;

typedef struct exc_token {
    uint32_t begin, len; /* its bytes in exc_tokenizer.bytes */
    uint32_t flags;      /* 0: a hole in the numbering */
} exc_token;

/* (left, right) -> the token they merge into; rank is its priority, lowest first. Open addressing. */
typedef struct exc_merge {
    uint32_t left, right, rank, id;
} exc_merge;
#define EXC_NO_RANK UINT32_MAX

/* Added tokens, sorted by their bytes: the longest that starts at a place is found by narrowing a range byte
 * by byte. */
typedef struct exc_added {
    uint32_t *ids; /* [count] */
    size_t count;
    uint8_t starts[256]; /* is there one that begins with this byte? */
} exc_added;

enum { EXC_MAX_STAGES = 8, EXC_MAX_FRAME = 8 };

struct exc_tokenizer {
    int uses;          /* by its borrowers, and one by the context that keeps it */
    exc_token *tokens; /* [size] by id */
    uint32_t size;
    char *bytes;
    uint32_t *words; /* hash table: bytes of an EXC_TOKEN_WORD -> id, UINT32_MAX empty */
    uint32_t words_mask;
    exc_merge *merges; /* hash table, rank EXC_NO_RANK empty */
    uint32_t merges_mask;
    int32_t byte_id[256];
    exc_added raw, normal; /* matched in the text as it is, and after normalisation */
    bool nfc, ignore_merges;
    bool by_char;                      /* pieces begin as characters, not bytes: SentencePiece BPE */
    exc_lead lead;                     /* by_char */
    bool strip;                        /* by_char: decoding drops one blank in front */
    pcre2_code *stage[EXC_MAX_STAGES]; /* each cuts the pieces of the one before */
    int stages;
    int32_t before[EXC_MAX_FRAME], after[EXC_MAX_FRAME]; /* of the post-processor */
    int n_before, n_after;
    _Atomic(struct exc_scratch *) spare; /* scratch of the last encode, with its warm cache */
};

/* What a stretch of text is to the tokenizer. Parts follow each other; part i ends where part i+1 begins. */
enum {
    EXC_PART_MATCH = 1,  /* added tokens in it are recognised; else it is a person's text, in which
                            `<|im_start|>` is  twelve characters */
    EXC_PART_CONTENT = 2 /* its tokens count as content */
};
typedef struct exc_part {
    size_t end;
    unsigned kind;
} exc_part;

/* ids are appended; content (may be NULL) gets one byte a token, 1: lies whole in EXC_PART_CONTENT and is no
 * added token. frame: the post-processor's tokens are put around. */
exc_status exc_encode_parts(exc_ctx *ctx, const exc_tokenizer *t, const char *text, const exc_part *parts,
                            size_t n_parts, bool frame, exc_ids *ids, exc_buf *content);

/* ---- scratch of one encode call (encode.c) */
typedef struct exc_known exc_known;
typedef struct exc_scratch {
    pcre2_match_data *match;
    pcre2_match_context *limits;
    pcre2_jit_stack *stack;
    exc_known *cache; /* pieces seen lately (merges.c) */
    void *room;       /* for the merges of a long piece */
    size_t room_bytes;
    exc_buf text, stretch; /* normalised text; nfc.c's own */
    exc_part *parts;
    size_t parts_cap;
} exc_scratch;
void exc_scratch_free(exc_scratch *w);

/* ---- merges.c */
exc_status exc_merges_build(exc_ctx *ctx, exc_tokenizer *t, const exc_merge *list, size_t n,
                            const char *what);
exc_status exc_cache_open(exc_ctx *ctx, exc_scratch *w);
exc_status exc_merge_piece(exc_ctx *ctx, const exc_tokenizer *t, exc_scratch *w, const char *p, size_t n,
                           exc_ids *ids);
int64_t exc_words_find(const exc_tokenizer *t, const char *p, size_t n); /* -1: none */
exc_status exc_words_build(exc_ctx *ctx, exc_tokenizer *t, const char *what);

/* ---- pieces.c */
/* compiles a pattern written for the reference's engine so that PCRE2 reads it the same way, or refuses it */
exc_status exc_stage_add(exc_ctx *ctx, exc_tokenizer *t, const char *what, const char *pattern, size_t n,
                         bool literal);
exc_status exc_pieces(exc_ctx *ctx, const exc_tokenizer *t, exc_scratch *w, int stage, const char *p,
                      size_t n, exc_ids *ids);

/* ---- added.c */
exc_status exc_added_build(exc_ctx *ctx, const exc_tokenizer *t, exc_added *a, const char *what);
/* the first, then longest, token of `a` in text[at..end); false: none */
bool exc_added_next(const exc_tokenizer *t, const exc_added *a, const char *text, size_t at, size_t end,
                    size_t *from, uint32_t *id);

/* ---- nfc.c; text is valid UTF-8 */
uint32_t exc_utf8_next(const char *text, size_t *at);
void exc_utf8_put(exc_buf *out, uint32_t c);
bool exc_nfc_is(const char *text, size_t n); /* false: perhaps not */
void exc_nfc(const char *text, size_t n, exc_buf *out, exc_buf *stretch);

/* a text with U+2581 as a blank (encode.c) */
void exc_spaces(const char *s, size_t n, exc_buf *out);

exc_status exc_ids_reserve(exc_ctx *ctx, exc_ids *ids, size_t more);

/* ---- loading (tokenizer.c, recipe.c) */
exc_status exc_recipe_read(exc_ctx *ctx, exc_tokenizer *t, const json_t *root, const char *what);
/* tiktoken.c: what `text`, a tiktoken.model, says, with the special tokens of tokenizer_config.json, called `where` */
exc_status exc_tiktoken_read(exc_ctx *ctx, exc_tokenizer *t, const char *what, const char *text, size_t n, const json_t *config,
                             const char *where);
#define EXC_WAY_OUT "; give pre-tokenised prompts, {\"tokens\":[..]}"

#endif
