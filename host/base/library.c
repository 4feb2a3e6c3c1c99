/* library.c - optional parts (the CUDA backend, MPI) are modules opened at run time, so that one program serves machines
 * with and without them. A module lies beside the program or library that asks, or in the library folder of the same
 * installation; an environment variable may name another file. Nothing is searched by bare name: a stray library in
 * somebody's search path is not a part of Excise. */
#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base.h"

/* folder of the file that holds this code: the program, or libexcise.so */
static bool own_folder(char out[PATH_MAX]) {
    Dl_info info;
    char file[PATH_MAX];
    void *here;
    void *(*self)(const char *, const char *, char *, size_t) = exc_library_open;
    memcpy(&here, &self, sizeof here);
    if (!dladdr(here, &info) || !info.dli_fname || !realpath(strchr(info.dli_fname, '/') ? info.dli_fname : "/proc/self/exe", file))
        return false;
    char *slash = strrchr(file, '/');
    *slash = 0;
    snprintf(out, PATH_MAX, "%s", file);
    return true;
}

static void *open_one(const char *path, char *why, size_t n) {
    void *m = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!m) {
        const char *e = dlerror();
        snprintf(why, n, "%s", e ? e : path);
        for (char *c = why; *c; c++)
            if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ') *c = ' '; /* it is quoted in JSON */
    }
    return m;
}

void *exc_library_open(const char *name, const char *env, char *why, size_t n) {
    static const char *const places[] = {"", "excise/", "../lib/", "../lib/excise/", "../lib64/", "../lib64/excise/",
                                         "../lib/x86_64-linux-gnu/", "../lib/x86_64-linux-gnu/excise/"};
    const char *named = getenv(env);
    char folder[PATH_MAX], path[2 * PATH_MAX];
    if (named && *named) return open_one(named, why, n);
    if (!own_folder(folder)) {
        snprintf(why, n, "%s: the folder of this program is unknown", name);
        return NULL;
    }
    for (size_t i = 0; i < EXC_COUNT(places); i++) {
        snprintf(path, sizeof path, "%s/%s%s", folder, places[i], name);
        if (!access(path, R_OK)) return open_one(path, why, n);
    }
    snprintf(why, n, "%s is not installed (looked beside %s and in its lib folder)", name, folder);
    return NULL;
}
