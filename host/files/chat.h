/* chat.h - a rendered conversation with its parts kept apart; shared by chat.c, formats.c and prompts.c. */
#ifndef EXC_CHAT_H
#define EXC_CHAT_H

#include "tokenizer.h"

/* what a template has to say, and whose words they are */
typedef struct exc_rendering {
    exc_buf text;
    exc_buf parts; /* exc_part [n] */
} exc_rendering;
void exc_rendering_free(exc_rendering *r);
void exc_rendering_put(exc_rendering *r, unsigned kind, const char *s, size_t n);
size_t exc_rendering_parts(const exc_rendering *r, const exc_part **parts);

typedef struct exc_span {
    const char *s;
    size_t n;
} exc_span;
typedef enum exc_role { EXC_SYSTEM, EXC_USER, EXC_ASSISTANT } exc_role;
typedef struct exc_message {
    exc_role role;
    exc_span content;
    exc_span reasoning; /* s NULL: none given */
} exc_message;

/* one conversation, as a format renders it */
typedef struct exc_turns {
    exc_ctx *ctx;
    const exc_message *message; /* [n] */
    size_t n;
    bool answer;  /* add_generation_prompt */
    int thinking; /* -1: not said */
    exc_rendering *out;
} exc_turns;

/* A built-in rendering. Its markers must be added tokens of the tokenizer it is used with: where they are
 * not, the result would be text that only looks like a conversation. */
typedef struct exc_format {
    const char *name, *summary;
    exc_status (*render)(const exc_turns *t);
    const char *markers[5];
} exc_format;
extern const exc_format exc_formats[];
extern const size_t exc_formats_count;

/* messages of one prompt line; `what` names the line */
exc_status exc_chat_parts(exc_ctx *ctx, const exc_chat *c, const char *what, const json_t *messages,
                          bool add_generation_prompt, int enable_thinking, exc_rendering *out);
exc_status exc_chat_fits(exc_ctx *ctx, const exc_chat *c, const exc_tokenizer *t);

#endif
