/* publish.c - a new checkpoint from an old one, committed by one rename.
 *
 * Everything is written into OUT.partial-<pid> beside OUT: side files first, then the shards (transfer.c),
 * then what is added under excise/. Commit looks once more whether the source is still what was opened, syncs
 * every file and folder, renames, and syncs the parent: OUT is absent, the old one, or complete, at any
 * moment and after any crash. The partial folder is locked while its writer lives; one that nobody locks was
 * left by a killed process and is removed when the same OUT is written again.
 *
 * Several ranks write one folder: the first makes it, copies side files and commits; shards are dealt out, each
 * whole to one rank. The folder must be on a file system that all of them see.
 *
 * Not copied: the source's own excise/ (it tells of another edit) and folders that begin with a dot (.git,
 * .cache). With force only a folder that is empty or has an excise/ in it is replaced: a slip of -o must not
 * cost somebody's home. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "transfer.h"

#define MAX_DEPTH 16

struct exc_publish {
    exc_ctx *ctx;
    const exc_checkpoint *from;
    char *out, *partial; /* folders; partial is empty until it is made */
    bool force, filled, guest; /* guest: another rank made the folder and will commit it */
    int lock; /* on the partial folder */
};

static const char *shown(const char *s) { return exc_show(s, strlen(s)); }
static bool dots(const char *s) { return !strcmp(s, ".") || !strcmp(s, ".."); }

/* -------------------------------------------------------------------------------------------------------
 * trees */

/* removes a folder and all in it, without following a link; best effort, never an error of its own */
static void remove_at(int parent, const char *name, int depth) {
    if (!unlinkat(parent, name, 0) || depth > 2 * MAX_DEPTH) return;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d && fd >= 0) close(fd);
    for (struct dirent *e; d && (e = readdir(d));)
        if (!dots(e->d_name)) remove_at(dirfd(d), e->d_name, depth + 1);
    if (d) closedir(d);
    unlinkat(parent, name, AT_REMOVEDIR);
}

static void remove_tree(const char *path) { remove_at(AT_FDCWD, path, 0); }

/* every file and folder below, then the folder itself, is on the disk */
static exc_status sync_tree(exc_ctx *ctx, const char *path) {
    DIR *d = opendir(path);
    if (!d) return exc_fail_errno(ctx, "%s", path);
    exc_status st = EXC_OK;
    for (struct dirent *e; !st && (e = readdir(d));) {
        char *child = NULL;
        struct stat sb;
        if (dots(e->d_name)) continue;
        st = exc_path_join(ctx, path, e->d_name, &child);
        if (!st && lstat(child, &sb)) st = exc_fail_errno(ctx, "%s", child);
        if (!st && S_ISDIR(sb.st_mode)) {
            st = sync_tree(ctx, child);
        } else if (!st) {
            int fd = open(child, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
            if (fd < 0 || fsync(fd)) st = exc_fail_errno(ctx, "%s: fsync", child);
            if (fd >= 0) close(fd);
        }
        exc_release(child);
    }
    closedir(d);
    return st ? st : exc_fsync_dir(ctx, path);
}

/* -------------------------------------------------------------------------------------------------------
 * where */

/* the folder OUT is to be in, as a real path; *base: its last component, inside out */
static exc_status real_parent(exc_publish *p, char real[PATH_MAX], const char **base) {
    char *slash = strrchr(p->out, '/');
    *base = slash ? slash + 1 : p->out;
    if (!**base || dots(*base))
        return exc_fail(p->ctx, EXC_ERR_USAGE, "%s: expected the name of a new folder, found none", p->out);
    if (!slash) return realpath(".", real) ? EXC_OK : exc_fail_errno(p->ctx, ".");
    *slash = 0;
    bool good = realpath(slash == p->out ? "/" : p->out, real);
    *slash = '/';
    return good ? EXC_OK : exc_fail_errno(p->ctx, "%s: its parent folder", p->out);
}

static bool is_inside(const char *path, const char *folder) {
    size_t n = strlen(folder);
    return !strncmp(path, folder, n) && (!path[n] || path[n] == '/' || folder[n - 1] == '/');
}

/* neither of source and output may lie in the other: one would be copied into itself, or removed with the
 * other */
static exc_status check_apart(exc_publish *p) {
    char source[PATH_MAX], parent[PATH_MAX], target[2 * PATH_MAX];
    const char *base;
    EXC_TRY(real_parent(p, parent, &base));
    if (!realpath(p->from->dir, source)) return exc_fail_errno(p->ctx, "%s", p->from->dir);
    snprintf(target, sizeof target, "%s/%s", strcmp(parent, "/") ? parent : "", base);
    if (!is_inside(target, source) && !is_inside(source, target)) return EXC_OK;
    return exc_fail(p->ctx, EXC_ERR_USAGE,
                    "%s: expected an output folder apart from the source %s, found one %s it", p->out,
                    p->from->dir,
                    !strcmp(source, target)     ? "that is"
                    : is_inside(target, source) ? "inside"
                                                : "around");
}

/* with force: what stands at OUT may go */
static exc_status check_replaceable(exc_publish *p) {
    struct stat sb;
    if (lstat(p->out, &sb)) return EXC_OK;
    DIR *d = S_ISDIR(sb.st_mode) ? opendir(p->out) : NULL;
    size_t n = 0;
    bool ours = false;
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!dots(e->d_name)) n++;
        if (!strcmp(e->d_name, "excise")) ours = true;
    }
    if (d) closedir(d);
    if (d && (ours || !n)) return EXC_OK;
    return exc_fail(
        p->ctx, EXC_ERR_USAGE,
        "%s: expected an empty folder or one that Excise wrote (it has excise/), found another; move it away",
        p->out);
}

/* folders OUT.partial-* that no living process locks */
static void remove_left_over(const exc_publish *p) {
    const char *slash = strrchr(p->out, '/'), *base = slash ? slash + 1 : p->out;
    size_t head = slash ? (size_t)(slash - p->out) + 1 : 0, n = strlen(base);
    char parent[PATH_MAX];
    snprintf(parent, sizeof parent, "%.*s", (int)head, p->out);
    DIR *d = opendir(head ? parent : ".");
    for (struct dirent *e; d && (e = readdir(d));) {
        if (strncmp(e->d_name, base, n) || strncmp(e->d_name + n, ".partial-", 9)) continue;
        int fd = openat(dirfd(d), e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB)) remove_at(dirfd(d), e->d_name, 0);
        if (fd >= 0) close(fd);
    }
    if (d) closedir(d);
}

/* --------------------------------------------------------------------------------------------------- side
 * files */

static bool is_shard(const exc_publish *p, const char *path) {
    for (int i = 0; i < p->from->n_files; i++)
        if (!strcmp(p->from->files[i]->path, path)) return true;
    return false;
}

static exc_status copy_side(exc_publish *p, const char *from, const char *to, int depth);

static exc_status copy_entry(exc_publish *p, const char *name, const char *from, const char *to, int depth) {
    struct stat sb, target;
    if (is_shard(p, from) || (!depth && !strcmp(name, "excise"))) return EXC_OK;
    if (lstat(from, &sb)) return exc_fail_errno(p->ctx, "%s", from);
    if (S_ISDIR(sb.st_mode)) {
        if (name[0] == '.') return EXC_OK;
        if (mkdir(to, 0777)) return exc_fail_errno(p->ctx, "%s", to);
        return copy_side(p, from, to, depth + 1);
    }
    if (!stat(from, &target) && S_ISREG(target.st_mode)) return exc_copy_file(p->ctx, from, to);
    exc_warn(p->ctx, "%s is no regular file and is not copied", from);
    return EXC_OK;
}

static exc_status copy_side(exc_publish *p, const char *from, const char *to, int depth) {
    if (depth > MAX_DEPTH)
        return exc_fail(p->ctx, EXC_ERR_INPUT, "%s: expected at most %d folders in each other, found more",
                        from, MAX_DEPTH);
    DIR *d = opendir(from);
    if (!d) return exc_fail_errno(p->ctx, "%s", from);
    exc_status st = EXC_OK;
    for (struct dirent *e; !st && (e = readdir(d));) {
        char *a = NULL, *b = NULL;
        if (dots(e->d_name)) continue;
        st = exc_path_join(p->ctx, from, e->d_name, &a);
        if (!st) st = exc_path_join(p->ctx, to, e->d_name, &b);
        if (!st) st = copy_entry(p, e->d_name, a, b, depth);
        exc_release(a);
        exc_release(b);
    }
    closedir(d);
    return st;
}

/* ---------------------------------------------------------------------------------------------------------
 * open */

static exc_status make_partial(exc_publish *p) {
    size_t n = strlen(p->out) + 32;
    char *path = exc_alloc(p->ctx, n, 1, "path");
    if (!path) return EXC_ERR_MEMORY;
    snprintf(path, n, "%s.partial-%ld", p->out, (long)getpid());
    if (mkdir(path, 0777)) {
        exc_status st = errno == EEXIST ? exc_fail(p->ctx, EXC_ERR_IO,
                                                   "%s: another job of this process writes here", path)
                                        : exc_fail_errno(p->ctx, "%s", path);
        exc_release(path);
        return st;
    }
    p->partial = path;
    p->lock = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (p->lock < 0) return exc_fail_errno(p->ctx, "%s", path);
    flock(p->lock,
          LOCK_EX | LOCK_NB); /* without locks on this file system nothing is ever taken for left over */
    return EXC_OK;
}

/* the first rank's name for the folder, to all */
static exc_status share_partial(exc_publish *p) {
    int n = exc_ranks_count(p->ctx);
    if (n == 1) return EXC_OK;
    char mine[PATH_MAX] = "", *all = exc_alloc(p->ctx, (size_t)n, sizeof mine, "path");
    if (!all) return EXC_ERR_MEMORY;
    if (p->partial) snprintf(mine, sizeof mine, "%s", p->partial);
    exc_status st = exc_ranks_gather(p->ctx, "folder of the new checkpoint", mine, all, sizeof mine);
    if (st == EXC_OK && exc_ranks_me(p->ctx) && !(p->partial = exc_strdup(p->ctx, all))) st = EXC_ERR_MEMORY;
    exc_release(all);
    return st;
}

static exc_status start(exc_publish *p) {
    EXC_TRY(check_apart(p));
    EXC_TRY(exc_check_output(p->ctx, p->out, p->force));
    EXC_TRY(check_replaceable(p));
    remove_left_over(p);
    EXC_TRY(make_partial(p));
    return copy_side(p, p->from->dir, p->partial, 0);
}

exc_status exc_publish_open(exc_ctx *ctx, const exc_checkpoint *from, const char *out_dir, bool force,
                            exc_publish **out) {
    *out = NULL;
    exc_publish *p = exc_zalloc(ctx, 1, sizeof *p, "new checkpoint");
    if (!p) return EXC_ERR_MEMORY;
    p->ctx = ctx;
    p->from = from;
    p->force = force;
    p->lock = -1;
    p->guest = exc_ranks_me(ctx) > 0;
    exc_status st = EXC_ERR_MEMORY;
    if ((p->out = exc_strdup(ctx, out_dir))) {
        for (size_t n = strlen(p->out); n > 1 && p->out[n - 1] == '/'; n--) p->out[n - 1] = 0;
        st = exc_ranks_agree(ctx, out_dir, p->guest ? EXC_OK : start(p));
        if (!st) st = share_partial(p);
    }
    if (st)
        exc_publish_abort(p);
    else
        *out = p;
    return st;
}

/* -------------------------------------------------------------------------------------------------------
 * shards */

static exc_status check_ranges(const exc_publish *p, const exc_range *r, size_t n) {
    for (size_t i = 0; i < n; i++) {
        bool good = r[i].file >= 0 && r[i].file < p->from->n_files && r[i].begin <= r[i].end;
        if (good)
            good = r[i].begin >= p->from->files[r[i].file]->header_bytes &&
                   r[i].end <= p->from->files[r[i].file]->size;
        if (good && i)
            good = r[i - 1].file < r[i].file || (r[i - 1].file == r[i].file && r[i - 1].end <= r[i].begin);
        if (!good)
            return exc_fail(p->ctx, EXC_ERR_USAGE,
                            "%s: range %zu: expected sorted ranges within the data of the files", p->out, i);
    }
    return EXC_OK;
}

static exc_status check_space(const exc_publish *p, uint64_t bytes) {
    struct statvfs fs;
    if (statvfs(p->partial, &fs)) return EXC_OK; /* then the disk itself will say */
    uint64_t available = (uint64_t)fs.f_bavail * fs.f_frsize;
    if (available >= bytes) return EXC_OK;
    return exc_fail(p->ctx, EXC_ERR_IO, "%s: disk space: expected %llu bytes, found %llu free", p->out,
                    (unsigned long long)bytes, (unsigned long long)available);
}

int exc_publish_rank(const exc_ctx *ctx, int file) { return file % exc_ranks_count(ctx); }

exc_status exc_publish_tensors(exc_publish *p, const exc_range *ranges, size_t n, exc_fill_fn fill,
                               void *user) {
    const exc_checkpoint *from = p->from;
    exc_transfer t = {.ranges = ranges, .n = n, .fill = fill, .user = user};
    exc_mover *m;
    if (p->filled) return exc_fail(p->ctx, EXC_ERR_USAGE, "%s: its tensors are written already", p->out);
    p->filled = true;
    EXC_TRY(check_ranges(p, ranges, n));
    uint64_t bytes = 0;
    for (int i = 0; i < from->n_files; i++) {
        bytes += from->files[i]->size;
        if (exc_publish_rank(p->ctx, i) == exc_ranks_me(p->ctx)) t.total += from->files[i]->size;
    }
    /* one rank looks, before any writes: what the first of them has written is no longer free */
    EXC_TRY(exc_ranks_agree(p->ctx, "space for the new checkpoint", p->guest ? EXC_OK : check_space(p, bytes)));
    EXC_TRY(exc_mover_open(p->ctx, &t, &m));
    exc_status st = EXC_OK;
    for (int i = 0; i < from->n_files && !st; i++) {
        if (exc_publish_rank(p->ctx, i) != exc_ranks_me(p->ctx)) continue;
        const char *slash = strrchr(from->files[i]->path, '/');
        char *to = NULL;
        st = exc_path_join(p->ctx, p->partial, slash ? slash + 1 : from->files[i]->path, &to);
        if (!st) st = exc_mover_file(m, &t, from, i, to);
        exc_release(to);
    }
    exc_mover_close(m);
    return exc_ranks_agree(p->ctx, "shards of the new checkpoint", st);
}

/* --------------------------------------------------------------------------------------------------- add,
 * commit */

exc_status exc_publish_path(exc_publish *p, const char *name, char **path) {
    const char *rest = name + 7;
    *path = NULL;
    if (strncmp(name, "excise/", 7) || !*rest || strchr(rest, '/') || dots(rest))
        return exc_fail(p->ctx, EXC_ERR_USAGE, "%s: expected a file excise/NAME, found %s", p->out,
                        shown(name));
    char *folder = NULL;
    exc_status st = exc_path_join(p->ctx, p->partial, "excise", &folder);
    if (!st && mkdir(folder, 0777) && errno != EEXIST) st = exc_fail_errno(p->ctx, "%s", folder);
    if (!st) st = exc_path_join(p->ctx, p->partial, name, path);
    exc_release(folder);
    return st;
}

exc_status exc_publish_shard(exc_publish *p, int file, char **path) {
    const char *from = p->from->files[file]->path, *slash = strrchr(from, '/');
    p->filled = true;
    return exc_path_join(p->ctx, p->partial, slash ? slash + 1 : from, path);
}

exc_status exc_publish_replace(exc_publish *p, const char *name, const void *data, size_t n) {
    char *path = NULL;
    EXC_TRY(exc_path_join(p->ctx, p->partial, name, &path));
    exc_status st = exc_write_file(p->ctx, path, data, n, true);
    exc_release(path);
    return st;
}

/* the commit syncs the file again */
exc_status exc_publish_patch(exc_publish *p, int file, uint64_t at, const void *bytes, size_t n) {
    const char *path = p->from->files[file]->path, *slash = strrchr(path, '/');
    char *to = NULL;
    EXC_TRY(exc_path_join(p->ctx, p->partial, slash ? slash + 1 : path, &to));
    int fd = open(to, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    exc_status st = fd < 0 ? exc_fail_errno(p->ctx, "%s", to) : EXC_OK;
    for (size_t done = 0; done < n && !st;) {
        ssize_t put = pwrite(fd, (const uint8_t *)bytes + done, n - done, (off_t)(at + done));
        if (put < 0 && errno != EINTR) st = exc_fail_errno(p->ctx, "%s: writing %zu bytes at %llu", to, n, (unsigned long long)at);
        if (put > 0) done += (size_t)put;
    }
    if (fd >= 0 && close(fd) && !st) st = exc_fail_errno(p->ctx, "%s: close", to);
    exc_release(to);
    return st;
}

exc_status exc_publish_add(exc_publish *p, const char *name, const void *data, size_t n) {
    char *path = NULL;
    exc_status st = exc_publish_path(p, name, &path);
    if (!st) st = exc_write_file(p->ctx, path, data, n, false);
    exc_release(path);
    return st;
}

/* The commit. With force the two folders change places in one act where the system can, and the old one goes
 * after. */
static exc_status take_place(exc_publish *p) {
    struct stat sb;
    if (!p->force) {
        if (!renameat2(AT_FDCWD, p->partial, AT_FDCWD, p->out, RENAME_NOREPLACE)) return EXC_OK;
        if (errno != EINVAL && errno != ENOSYS && errno != EEXIST)
            return exc_fail_errno(p->ctx, "%s: rename", p->out);
        EXC_TRY(exc_check_output(p->ctx, p->out, false));
    } else if (!lstat(p->out, &sb)) {
        EXC_TRY(check_replaceable(p));
        if (!renameat2(AT_FDCWD, p->partial, AT_FDCWD, p->out, RENAME_EXCHANGE)) {
            remove_tree(p->partial);
            return EXC_OK;
        }
        if (errno != EINVAL && errno != ENOSYS) return exc_fail_errno(p->ctx, "%s: rename", p->out);
        remove_tree(p->out);
    }
    return rename(p->partial, p->out) ? exc_fail_errno(p->ctx, "%s: rename", p->out) : EXC_OK;
}

static exc_status finish(exc_publish *p) {
    char parent[PATH_MAX];
    const char *base;
    for (int i = 0; i < p->from->n_files; i++) EXC_TRY(exc_same_file(p->ctx, p->from->files[i]));
    EXC_TRY(sync_tree(p->ctx, p->partial));
    EXC_TRY(real_parent(p, parent, &base));
    EXC_TRY(take_place(p));
    p->partial[0] = 0;
    return exc_fsync_dir(p->ctx, parent);
}

exc_status exc_publish_commit(exc_publish *p) {
    exc_status st = p->filled ? EXC_OK : exc_publish_tensors(p, NULL, 0, NULL, NULL);
    if (!st) st = exc_ranks_agree(p->ctx, "commit of the checkpoint", p->guest ? EXC_OK : finish(p));
    exc_publish_abort(p);
    return st;
}

void exc_publish_abort(exc_publish *p) {
    if (!p) return;
    if (p->partial && p->partial[0] && !p->guest) remove_tree(p->partial);
    if (p->lock >= 0) close(p->lock);
    exc_release(p->partial);
    exc_release(p->out);
    exc_release(p);
}
