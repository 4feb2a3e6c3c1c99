/* sections.h - between the two halves of the page's text: report.c (what changed) and sections.c (where and
 * how). */
#ifndef EXC_SECTIONS_H
#define EXC_SECTIONS_H

#include "page.h"

double exc_get(const json_t *o, const char *key);        /* NaN when it is no number */
exc_mark exc_get_mark(const json_t *o, const char *key); /* key and key_ci */
void exc_put_percent(exc_buf *b, double x);
exc_status exc_section_routing(exc_ctx *ctx, exc_buf *b, const json_t *report, const char *dir);
exc_status exc_section_directions(exc_ctx *ctx, exc_buf *b, const json_t *report, const char *dir);
void exc_section_residuals(exc_buf *b, const json_t *report);

#endif
