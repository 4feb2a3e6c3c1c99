/* totals.h - the arrays of a stats file as one list, shared by its makers (capture.c) and its keeper
 * (totals.c). Whatever is done to every array (allocate, write, read, add, look up by name) is a loop over
 * this list, so that no array can be forgotten. */
#ifndef EXC_TOTALS_H
#define EXC_TOTALS_H

#include "study.h"

enum { EXC_STATS_FIELDS = 2 * (2 * 7 + 2) };

typedef struct exc_field {
    char name[40]; /* "target.prefill.count" */
    exc_dtype dtype;
    int rank;
    int64_t shape[4];
    bool optional;  /* a file may lack it */
    bool by_prompt; /* grows when stats are added; the others are sums */
    void *slot;     /* the pointer in the struct, read and set by the two functions below */
} exc_field;

/* all EXC_STATS_FIELDS arrays of s, absent ones too, in the order of the file */
void exc_stats_fields(const exc_stats *s, exc_field *fields);
void *exc_field_get(const exc_field *f);
void exc_field_set(const exc_field *f, void *data);
int64_t exc_field_count(const exc_field *f); /* elements */

/* zeroed stats for the sizes in `sizes`, whose layer_of (and texts) are copied; out_sum only where asked for
 */
exc_status exc_stats_new(exc_ctx *ctx, const exc_stats *sizes, bool out_sum, exc_stats **out);
/* every sum finite, every count what tokens and top-k say: `what` names the file or the capture */
exc_status exc_stats_check(exc_ctx *ctx, const exc_stats *s, const char *what);
/* EXC_ERR_NUMERIC naming what, array and index when there is a NaN or infinity */
exc_status exc_all_finite(exc_ctx *ctx, const char *what, const char *array, const void *data,
                          exc_dtype dtype, int64_t n);

#endif
