/* files.h - bytes to tensor tables, text to token ids. This room knows formats, not experts.
 *
 * Everything read here is untrusted: sizes are checked products, names are never used as paths, JSON goes through one
 * strict jansson wrapper (duplicate keys, trailing data and bad UTF-8 refused), and every refusal is one line naming
 * file, item, rule, expected and found. */
#ifndef EXC_FILES_H
#define EXC_FILES_H

#include <jansson.h>

#include "base.h"

/* ------------------------------------------------------------------------------------------- json (files/json.c) */
/* strict load; the error names file, line, column. `limit` bytes at most (0: 64 MiB) */
exc_status exc_json_load(exc_ctx *ctx, const char *path, size_t limit, json_t **root);
exc_status exc_json_parse(exc_ctx *ctx, const char *what, const char *text, size_t n, json_t **root);
/* the same for texts of people (prompts), whose strings may hold NUL: use json_string_length */
exc_status exc_json_parse_text(exc_ctx *ctx, const char *what, const char *text, size_t n, json_t **root);
/* typed getters of an object; missing key: EXC_ERR_INPUT unless a default getter. `what` names the file in messages */
exc_status exc_json_int(exc_ctx *ctx, const json_t *o, const char *what, const char *key, int64_t lo, int64_t hi, int64_t *out);
exc_status exc_json_int_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key, int64_t lo, int64_t hi, int64_t absent, int64_t *out);
exc_status exc_json_number_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key, double absent, double *out);
exc_status exc_json_bool_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key, bool absent, bool *out);
exc_status exc_json_string_or(exc_ctx *ctx, const json_t *o, const char *what, const char *key, const char *absent, const char **out);
/* refuses keys that are not in the NULL-terminated list, with a did-you-mean */
exc_status exc_json_keys(exc_ctx *ctx, const json_t *o, const char *what, const char *const *known);
char *exc_json_text(exc_ctx *ctx, const json_t *o); /* compact, one line, keys in insertion order; exc_free */

/* ----------------------------------------------------------------------------------- safetensors (files/tensors.c) */
typedef struct exc_tensor {
    char *name;
    exc_dtype dtype;
    const char *dtype_name; /* as the header has it, for dtypes we do not compute with */
    int rank;
    int64_t shape[8];       /* rank <= 8 here; a higher rank is refused when used */
    int shard;              /* index into files of a checkpoint, 0 for a single file */
    uint64_t begin, end;    /* absolute byte range in its file */
} exc_tensor;

/* One .safetensors file, mapped read-only. data may be unaligned for its dtype: memcpy, never cast. */
typedef struct exc_tensors {
    char *path;
    const uint8_t *map;
    size_t size;            /* of the file */
    size_t header_bytes;    /* 8 + N: where data begins */
    exc_tensor *items;      /* in order of begin */
    size_t count;
    json_t *metadata;       /* object of strings, or NULL */
    uint64_t dev, ino, mtime_ns; /* identity at open, checked again at commit */
} exc_tensors;
exc_status exc_tensors_open(exc_ctx *ctx, const char *path, exc_tensors **out);
const exc_tensor *exc_tensors_find(const exc_tensors *t, const char *name);
const void *exc_tensors_data(const exc_tensors *t, const exc_tensor *x); /* pointer into the map */
void exc_tensors_close(exc_tensors *t);
size_t exc_dtype_bits(exc_dtype d);
const char *exc_dtype_name(exc_dtype d); /* "BF16" .. */

/* Writing our own files (stats, directions, forward): declare all tensors, then fill them in any order. The file appears under
 * its name only in exc_writer_commit (temp + fsync + rename). */
typedef struct exc_writer exc_writer;
exc_status exc_writer_open(exc_ctx *ctx, const char *path, bool force, exc_writer **w);
exc_status exc_writer_open_own(exc_ctx *ctx, const char *path, bool force, exc_writer **out); /* this rank's own file */
exc_status exc_writer_declare(exc_writer *w, const char *name, exc_dtype dtype, int rank, const int64_t *shape);
exc_status exc_writer_meta(exc_writer *w, const char *key, const char *value);
exc_status exc_writer_put(exc_writer *w, const char *name, const void *data, size_t bytes); /* whole tensor; header goes out first */
exc_status exc_writer_commit(exc_writer *w);  /* frees w, also on failure */
void exc_writer_abort(exc_writer *w);         /* removes the temporary; NULL is fine */

/* ------------------------------------------------------------------------------- a checkpoint folder (files/checkpoint.c) */
/* All shards of a model folder as one table: model.safetensors, or the files that model.safetensors.index.json names. */
typedef struct exc_checkpoint {
    char *dir;
    exc_tensors **files; /* [n_files] */
    int n_files;
    const exc_tensor **by_name; /* [n_tensors] sorted by name; shard = index into files */
    size_t n_tensors;
    json_t *config;      /* config.json */
} exc_checkpoint;
exc_status exc_checkpoint_open(exc_ctx *ctx, const char *dir, exc_checkpoint **out);
const exc_tensor *exc_checkpoint_find(const exc_checkpoint *c, const char *name);
const void *exc_checkpoint_data(const exc_checkpoint *c, const exc_tensor *t);
void exc_checkpoint_close(exc_checkpoint *c);

/* A new checkpoint from an old one (files/publish.c): every file of `from` copied byte for byte into OUT.partial-<pid> (reflink,
 * else read and write), with `ranges` (sorted by file, begin) replaced by bytes that `fill` delivers in big
 * buffers while copying: one pass over the data, no read-back except verification. Side files are copied too, extra files can
 * be added under excise/. exc_publish_commit: fsync all, rename, fsync the parent. Never leaves a half-written OUT. */
typedef struct exc_range { int file; uint64_t begin, end; void *tag; } exc_range;
/* gives the new bytes of ranges[first..first+n) : src[i] points at the old bytes (mapped), dst[i] at the buffer to fill */
typedef exc_status (*exc_fill_fn)(exc_ctx *ctx, void *user, const exc_range *ranges, size_t n, const void *const *src, void *const *dst);
typedef struct exc_publish exc_publish;
exc_status exc_publish_open(exc_ctx *ctx, const exc_checkpoint *from, const char *out_dir, bool force, exc_publish **p);
int exc_publish_rank(const exc_ctx *ctx, int file); /* which rank writes that file, and edits what is in it */
exc_status exc_publish_tensors(exc_publish *p, const exc_range *ranges, size_t n, exc_fill_fn fill, void *user);
/* where "excise/NAME" is to be written before the commit; release with exc_release */
exc_status exc_publish_path(exc_publish *p, const char *name, char **path);
exc_status exc_publish_add(exc_publish *p, const char *name, const void *data, size_t n); /* e.g. "excise/plan.json" */
/* n bytes at `at` of file number `file`, after exc_publish_tensors: what is known only when all ranges are filled */
exc_status exc_publish_patch(exc_publish *p, int file, uint64_t at, const void *bytes, size_t n);
/* instead of exc_publish_tensors: where shard number `file` is to be written, anew; and a side file with other content */
exc_status exc_publish_shard(exc_publish *p, int file, char **path);
exc_status exc_publish_replace(exc_publish *p, const char *name, const void *data, size_t n);
exc_status exc_publish_commit(exc_publish *p); /* frees p, also on failure */
void exc_publish_abort(exc_publish *p);

/* ------------------------------------------------------------------------------------ tokenizer (files/tokenizer.c ...) */
/* Byte-level BPE from tokenizer.json: added tokens, normaliser (none, NFC), pre-tokenizer regexes over PCRE2, merges. Anything
 * outside the whitelist is refused, never guessed. Immutable after load; encode is re-entrant with its own scratch. */
typedef struct exc_tokenizer exc_tokenizer;
exc_status exc_tokenizer_load(exc_ctx *ctx, const char *model_dir, exc_tokenizer **out);
exc_status exc_tokenizer_maybe(exc_ctx *ctx, const char *model_dir, exc_tokenizer **out); /* NULL where the folder has none */
void exc_tokenizer_free(exc_tokenizer *t);
typedef struct exc_ids { int32_t *data; size_t len, cap; } exc_ids; /* exc_ids_free */
/* special: added tokens in the text are matched, post-processor applied; else the text is ordinary text. Appends to ids. */
exc_status exc_tokenizer_encode(exc_ctx *ctx, const exc_tokenizer *t, const char *text, size_t n, bool special, exc_ids *ids);
/* appends the bytes of ids to out; skip_special leaves special added tokens out; ids that no token has (a vocabulary padded beyond
 * the tokenizer) give nothing, as in the reference library; negative ones are refused */
exc_status exc_tokenizer_decode(exc_ctx *ctx, const exc_tokenizer *t, const int32_t *ids, size_t n, bool skip_special, exc_buf *out);
int32_t exc_tokenizer_id(const exc_tokenizer *t, const char *token); /* added or plain token, -1 if absent */
int64_t exc_tokenizer_size(const exc_tokenizer *t);                  /* largest id + 1 */
bool exc_tokenizer_is_special(const exc_tokenizer *t, int32_t id);
void exc_ids_free(exc_ids *ids);

/* Chat templates (files/chat.c): the hash of the model's own template text picks a built-in rendering; unknown templates are
 * refused with the ways out. messages: JSON array of {"role","content"}. */
typedef struct exc_chat exc_chat;
exc_status exc_chat_load(exc_ctx *ctx, const char *model_dir, const char *name_or_null, exc_chat **out);
/* enable_thinking: -1 not passed to the template, else 0 or 1 */
exc_status exc_chat_render(exc_ctx *ctx, const exc_chat *c, const json_t *messages, bool add_generation_prompt, int enable_thinking, exc_buf *out);
void exc_chat_free(exc_chat *c);

/* ------------------------------------------------------------------------------------------- prompts (files/prompts.c) */
struct exc_prompts {
    int32_t *tokens;     /* all prompts one after the other */
    int64_t *begin;      /* [count+1] */
    int64_t count;
    char **text;         /* [count] the request as the file has it (NULL for token prompts): for evaluate and reports */
    uint8_t *content;    /* [tokens] 1: text of the user's turn(s); 0: template scaffolding or a special token */
    char hash[33];       /* of the file's bytes */
    char *path;          /* the file and, [count], the line of each prompt, for messages; NULL for prompts of no file */
    int64_t *line;
};
exc_status exc_prompts_read(exc_ctx *ctx, const exc_tokenizer *t, const exc_chat *chat, const char *path,
                            const exc_prompt_options *opt, exc_prompts **out);
/* list of non-empty lines of a UTF-8 text file, errors with file and line; used for markers, neutral text, .txt prompts */
exc_status exc_lines_read(exc_ctx *ctx, const char *path, char ***lines, size_t *count); /* exc_lines_free */
void exc_lines_free(char **lines, size_t count);
/* literal phrases, found in a text whatever the case (files/phrases.c); find gives the first phrase's number or -1 */
typedef struct exc_phrases exc_phrases;
exc_status exc_phrases_open(exc_ctx *ctx, char *const *lines, size_t count, exc_phrases **out);
int64_t exc_phrases_find(const exc_phrases *p, const char *text, size_t n);
void exc_phrases_close(exc_phrases *p);

#endif
