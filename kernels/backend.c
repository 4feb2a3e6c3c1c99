/* backend.c - the CPU's table of ops: every entry of ops.def, by name. A missing definition is a link error. */
#include "ops.h"

const struct exc_ops exc_cpu_ops = {
    .name = "cpu",
#define EXC_OP(name, ...) .name = exc_cpu_##name,
#include "ops.def"
#undef EXC_OP
};
