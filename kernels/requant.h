/* requant.h - project and scale where rounding is more than nearest even: quantised weights, and other ways to round. */
#ifndef EXC_REQUANT_H
#define EXC_REQUANT_H

#include "ops.h"

/* does this call need it? f32 is finer than the arithmetic: nothing to draw or solve there */
int exc_requant_wanted(int dtype, int rounding);
exc_status exc_requant_project(exc_queue *q, const struct exc_project_args *a);
exc_status exc_requant_scale(exc_queue *q, const struct exc_scale_args *a);

#endif
