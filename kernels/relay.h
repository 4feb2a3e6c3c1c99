/* relay.h - the memory-bound common case of project, for machines that have a fast path for it. */
#ifndef EXC_RELAY_H
#define EXC_RELAY_H

#include "ops.h"

/* The whole call, bit for bit as project.c would; 0: this case or machine has no fast path, nothing was done. */
int exc_relay_project(exc_queue *q, const struct exc_project_args *a);

#endif
