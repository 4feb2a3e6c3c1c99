/* tandem.h - the memory-bound common case of project, for matrices that fit the last-level cache. */
#ifndef EXC_TANDEM_H
#define EXC_TANDEM_H

#include "ops.h"

/* The whole call, bit for bit as project.c would; 0: this case or machine has no such path, nothing was done. */
int exc_tandem_project(exc_queue *q, const struct exc_project_args *a);

#endif
