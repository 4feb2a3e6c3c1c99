/* abreast.h - the memory-bound common case of project, for matrices that fit the last-level cache. */
#ifndef EXC_ABREAST_H
#define EXC_ABREAST_H

#include "ops.h"

/* The whole call, bit for bit as project.c would; 0: this case or machine has no such path, nothing was done. */
int exc_abreast_project(exc_queue *q, const struct exc_project_args *a);

#endif
