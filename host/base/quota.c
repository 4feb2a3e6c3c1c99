/* quota.c - how much memory models may take, and what they have taken.
 *
 * The caller says a number, or it is nine tenths of what is available when the context is made: of the machine, within the
 * limit of every control group above this process (v2 and v1; pages of files count as available), shared with the
 * other ranks on this machine; or of the device. Weights, caches and buffers are counted as they are allocated and
 * not as they are touched, so that what fits does not depend on the moment. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "module.h"

/* "KEY   N kB" or "KEY N" of a file of such lines; -1: it is not there */
static int64_t entry(const char *folder, const char *name, const char *key) {
    char path[2 * PATH_MAX], line[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    int64_t found = -1;
    size_t n = strlen(key);
    while (f && found < 0 && fgets(line, sizeof line, f))
        if (!strncmp(line, key, n)) found = strtoll(line + n, NULL, 10) * (strstr(line, " kB") ? 1024 : 1);
    if (f) fclose(f);
    return found;
}

/* the one number of a file; -1: there is none. "max" is 0 */
static int64_t number(const char *folder, const char *name) { return entry(folder, name, ""); }

static uint64_t least(uint64_t a, int64_t b) { return b >= 0 && (uint64_t)b < a ? (uint64_t)b : a; }

/* what one control group leaves; pages of files are given up when others need them */
static uint64_t group_free(const char *folder, const char *limit, const char *used, const char *files, const char *shared, uint64_t most) {
    int64_t may = number(folder, limit), has = number(folder, used), cache = entry(folder, "memory.stat", files);
    int64_t kept = entry(folder, "memory.stat", shared); /* files that lie in memory alone */
    if (may <= 0 || has < 0) return most;
    cache -= kept > 0 ? kept : 0;
    has -= cache > 0 && cache < has ? cache : 0;
    return least(most, may > has ? may - has : 0);
}

/* all groups from the process's own to the root; "ID:controllers:PATH" a line */
static uint64_t groups_free(uint64_t most) {
    FILE *f = fopen("/proc/self/cgroup", "r");
    char line[PATH_MAX], folder[PATH_MAX + 64];
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *kind = strchr(line, ':'), *path = kind ? strchr(kind + 1, ':') : NULL;
        if (!path) continue;
        bool two = path == kind + 1, one = !two && strstr(kind, "memory");
        for (*path++ = 0; two || one;) {
            snprintf(folder, sizeof folder, "%s%s", two ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory", path);
            most = two ? group_free(folder, "memory.max", "memory.current", "file ", "shmem ", most)
                       : group_free(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache ", "total_shmem ", most);
            char *slash = strrchr(path, '/');
            if (!slash || !path[0]) break;
            *slash = 0;
        }
    }
    if (f) fclose(f);
    return most;
}

uint64_t exc_memory_free(exc_ctx *ctx) {
    exc_device_info info = {0};
    if (ctx->module) {
        ctx->module->describe(ctx->queue.device, &info);
        return info.free;
    }
    return groups_free(least(UINT64_MAX / 16, entry("/proc", "meminfo", "MemAvailable:"))) / (uint64_t)exc_ranks_near(ctx);
}

void exc_memory_take(exc_ctx *ctx, uint64_t bytes) {
    ctx->taken += bytes;
    if (ctx->taken > ctx->most_taken) ctx->most_taken = ctx->taken;
}

void exc_memory_give(exc_ctx *ctx, uint64_t bytes) { ctx->taken -= bytes; }

uint64_t exc_memory_left(const exc_ctx *ctx) { return ctx->memory > ctx->taken ? ctx->memory - ctx->taken : 0; }

uint64_t exc_memory_peak(const exc_ctx *ctx) {
    int64_t peak = ctx->module ? -1 : entry("/proc/self", "status", "VmHWM:");
    return peak > 0 ? (uint64_t)peak : ctx->most_taken;
}

const char *exc_memory_text(uint64_t bytes, char out[32]) {
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    size_t u = 0;
    for (; value >= 1024 && u < EXC_COUNT(units) - 1; u++) value /= 1024;
    snprintf(out, 32, u ? "%.1f %s" : "%.0f %s", value, units[u]);
    return out;
}
