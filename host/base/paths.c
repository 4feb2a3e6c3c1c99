/* paths.c - small files, hashes, printable names, the clock.
 *
 * A file of ours appears under its name only when it is complete: temporary in the same folder, fsync, rename, fsync of
 * the folder. A failed fsync is final (pages may be marked clean), so it is never retried. Inputs are opened without
 * blocking and must be regular files: a FIFO where a config should be must not hang a job. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "base.h"

exc_status exc_read_file(exc_ctx *ctx, const char *path, size_t limit, char **data, size_t *len)
{
    *data = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return exc_fail_errno(ctx, "%s", path);
    struct stat sb;
    exc_status st = EXC_OK;
    char *buf = NULL;
    if (fstat(fd, &sb)) {
        st = exc_fail_errno(ctx, "%s", path);
    } else if (!S_ISREG(sb.st_mode)) {
        st = exc_fail(ctx, EXC_ERR_INPUT, "%s: expected a regular file, found a %s", path,
                      S_ISDIR(sb.st_mode) ? "folder" : "special file");
    } else if (limit && (uint64_t)sb.st_size > limit) {
        st = exc_fail(ctx, EXC_ERR_INPUT, "%s: expected at most %zu bytes, found %lld", path, limit, (long long)sb.st_size);
    } else if (!(buf = exc_alloc(ctx, (size_t)sb.st_size + 1, 1, path))) {
        st = EXC_ERR_MEMORY;
    }
    size_t got = 0;
    while (st == EXC_OK && got < (size_t)sb.st_size) {
        ssize_t n = read(fd, buf + got, (size_t)sb.st_size - got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) st = exc_fail_errno(ctx, "%s: reading byte %zu", path, got);
        if (n <= 0) break;
        got += (size_t)n;
    }
    close(fd);
    if (st != EXC_OK) {
        exc_release(buf);
        return st;
    }
    buf[got] = 0;
    *data = buf;
    if (len) *len = got;
    return EXC_OK;
}

exc_status exc_check_output(exc_ctx *ctx, const char *path, bool force)
{
    struct stat sb;
    if (force || lstat(path, &sb)) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_USAGE, "%s: output exists; nothing is overwritten without --force", path);
}

static exc_status check_here(exc_ctx *ctx, const char *path, bool force)
{
    struct stat sb;
    EXC_TRY(exc_check_output(ctx, path, force));
    /* the new file is renamed over the old one, which would take away a device's node */
    if (lstat(path, &sb) || S_ISREG(sb.st_mode) || S_ISLNK(sb.st_mode)) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_USAGE, "%s: expected a file to overwrite, found %s", path,
                    S_ISDIR(sb.st_mode) ? "a folder" : "a device, pipe or socket");
}

exc_status exc_check_file(exc_ctx *ctx, const char *path, bool force)
{
    return exc_ranks_agree(ctx, path, exc_ranks_me(ctx) ? EXC_OK : check_here(ctx, path, force));
}

exc_status exc_fsync_dir(exc_ctx *ctx, const char *dir)
{
    int fd = open(*dir ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return exc_fail_errno(ctx, "%s", dir);
    int rc = fsync(fd);
    int saved = errno;
    close(fd);
    /* some file systems cannot sync a folder and say EINVAL: nothing more can be done there */
    if (rc && saved != EINVAL) {
        errno = saved;
        return exc_fail_errno(ctx, "%s: fsync", dir);
    }
    return EXC_OK;
}

static exc_status sync_parent(exc_ctx *ctx, const char *path)
{
    const char *slash = strrchr(path, '/');
    if (!slash) return exc_fsync_dir(ctx, ".");
    char *dir = exc_strdup(ctx, path);
    if (!dir) return EXC_ERR_MEMORY;
    dir[slash == path ? 1 : slash - path] = 0;
    exc_status st = exc_fsync_dir(ctx, dir);
    exc_release(dir);
    return st;
}

exc_status exc_read_at(exc_ctx *ctx, const char *path, int fd, void *to, size_t n, uint64_t at) {
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (char *)to + done, n - done, (off_t)(at + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return exc_fail_errno(ctx, "%s: reading byte %llu", path, (unsigned long long)(at + done));
        if (!got)
            return exc_fail(ctx, EXC_ERR_INPUT,
                            "%s: expected %zu bytes at %llu, found the end of the file after %zu", path, n,
                            (unsigned long long)at, done);
        done += (size_t)got;
    }
    return EXC_OK;
}

static exc_status replace_file(exc_ctx *ctx, const char *path, const void *data, size_t len)
{
    exc_buf name = {0};
    exc_buf_printf(&name, "%s.partial-%ld", path, (long)getpid());
    if (name.failed) {
        exc_buf_free(&name);
        return exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory for its name", path);
    }
    exc_status st = EXC_OK;
    int fd = open(name.data, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0) {
        st = exc_fail_errno(ctx, "%s", path);
        exc_buf_free(&name);
        return st;
    }
    const char *p = data;
    for (size_t done = 0; st == EXC_OK && done < len;) {
        ssize_t n = write(fd, p + done, len - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) st = exc_fail_errno(ctx, "%s: writing %zu bytes at %zu", path, len - done, done);
        else done += (size_t)n;
    }
    if (st == EXC_OK && fsync(fd)) st = exc_fail_errno(ctx, "%s: fsync", path);
    if (close(fd) && st == EXC_OK) st = exc_fail_errno(ctx, "%s: close", path);
    if (st == EXC_OK && rename(name.data, path)) st = exc_fail_errno(ctx, "%s: rename", path);
    if (st == EXC_OK) st = sync_parent(ctx, path);
    else unlink(name.data);
    exc_buf_free(&name);
    return st;
}

exc_status exc_write_file(exc_ctx *ctx, const char *path, const void *data, size_t len, bool force)
{
    EXC_TRY(exc_check_file(ctx, path, force));
    return exc_ranks_agree(ctx, path, exc_ranks_me(ctx) ? EXC_OK : replace_file(ctx, path, data, len));
}

exc_status exc_path_join(exc_ctx *ctx, const char *dir, const char *name, char **out)
{
    size_t a = strlen(dir), b = strlen(name);
    while (a > 1 && dir[a - 1] == '/') a--;
    char *p = exc_alloc(ctx, a + b + 2, 1, "path");
    if (!p) return EXC_ERR_MEMORY;
    memcpy(p, dir, a);
    size_t at = a;
    if (a && p[a - 1] != '/') p[at++] = '/';
    memcpy(p + at, name, b + 1);
    *out = p;
    return EXC_OK;
}

/* Strict UTF-8 (RFC 3629): no overlong forms, no surrogates, nothing above U+10FFFF. */
bool exc_utf8_valid(const char *text, size_t n, size_t *bad_at)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;
    while (i < n) {
        unsigned c = s[i];
        size_t more;
        unsigned lo = 0x80, hi = 0xbf; /* bounds of the first continuation byte */
        if (c < 0x80) { i++; continue; }
        else if (c >= 0xc2 && c <= 0xdf) more = 1;
        else if (c >= 0xe0 && c <= 0xef) { more = 2; if (c == 0xe0) lo = 0xa0; if (c == 0xed) hi = 0x9f; }
        else if (c >= 0xf0 && c <= 0xf4) { more = 3; if (c == 0xf0) lo = 0x90; if (c == 0xf4) hi = 0x8f; }
        else break;
        if (n - i <= more || s[i + 1] < lo || s[i + 1] > hi) break;
        size_t j = 2;
        while (j <= more && (s[i + j] & 0xc0) == 0x80) j++;
        if (j <= more) break;
        i += more + 1;
    }
    if (i >= n) return true;
    if (bad_at) *bad_at = i;
    return false;
}

const char *exc_show(const char *s, size_t n)
{
    static _Thread_local char ring[4][4 * 200 + 8];
    static _Thread_local unsigned turn;
    char *out = ring[turn++ % 4], *p = out;
    size_t shown = n < 200 ? n : 200;
    for (size_t i = 0; i < shown;) {
        size_t len = 1;
        unsigned char c = (unsigned char)s[i];
        while (len < 4 && i + len < n && ((unsigned char)s[i + len] & 0xc0) == 0x80) len++;
        if (c >= 0x20 && c != 0x7f && exc_utf8_valid(s + i, len, NULL) && !(c == 0xc2 && (unsigned char)s[i + 1] < 0xa0)) {
            memcpy(p, s + i, len);
            p += len;
            i += len;
        } else {
            p += sprintf(p, "\\x%02x", c);
            i++;
        }
    }
    strcpy(p, n > shown ? "..." : "");
    return out;
}

uint64_t exc_hash64(const void *data, size_t n) { return XXH3_64bits(data, n); }

static void hex128(XXH128_hash_t h, char out[33])
{
    snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
}

void exc_hash_hex(const void *data, size_t n, char out[33]) { hex128(XXH3_128bits(data, n), out); }

exc_status exc_hash_file(exc_ctx *ctx, const char *path, char out[33])
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return exc_fail_errno(ctx, "%s", path);
    XXH3_state_t *state = XXH3_createState();
    size_t cap = (size_t)1 << 20;
    char *buf = exc_alloc(ctx, cap, 1, "hash buffer");
    exc_status st = state && buf ? EXC_OK : exc_fail(ctx, EXC_ERR_MEMORY, "%s: no memory to hash it", path);
    if (st == EXC_OK) XXH3_128bits_reset(state);
    while (st == EXC_OK) {
        ssize_t n = read(fd, buf, cap);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) st = exc_fail_errno(ctx, "%s: reading", path);
        if (n <= 0) break;
        XXH3_128bits_update(state, buf, (size_t)n);
    }
    if (st == EXC_OK) hex128(XXH3_128bits_digest(state), out);
    XXH3_freeState(state);
    exc_release(buf);
    close(fd);
    return st;
}

double exc_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
