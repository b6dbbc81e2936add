/* Counts, and on request breaks, what a process does to the files below one directory.
 *
 * Loaded with LD_PRELOAD; fault_arm(root, number, action) starts: operation `number` (from 1) gets
 * the errno `action`, or with action -1 the process is killed in it: a write is then half done.
 * fault_count() is the number of operations so far. Operations are those that change something:
 * creating, writing, truncating, flushing, renaming, linking, removing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int number, action;
static volatile int count;

void fault_arm(const char *directory, int n, int what)
{
    strncpy(root, directory, sizeof root - 1);
    number = n;
    action = what;
    count = 0;
}

int fault_count(void) { return count; }

static int below(int at, const char *path)
{
    char full[2 * PATH_MAX], link[64];
    if (!root[0])
        return 0;
    if (path && path[0] == '/') {
        snprintf(full, sizeof full, "%s", path);
    } else {
        ssize_t n;
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        n = readlink(link, full, PATH_MAX);
        if (n < 0)
            return 0;
        full[n] = 0;
        if (path)
            snprintf(full + n, sizeof full - n, "/%s", path);
    }
    return strncmp(full, root, strlen(root)) == 0;
}

/* 0: go on; 1: fail with errno; -1: die now. */
static int fate(int at, const char *path)
{
    if (!below(at, path))
        return 0;
    if (++count != number || !action)
        return 0;
    if (action < 0)
        return -1;
    errno = action;
    return 1;
}

static void die(void) { kill(getpid(), SIGKILL); pause(); }

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define MEET(at, path) do { int f_ = fate(at, path); if (f_ < 0) die(); if (f_) return -1; } while (0)

#define OPENER(name)                                                                   \
    int name(const char *path, int flags, ...)                                         \
    {                                                                                  \
        va_list ap; mode_t mode; REAL(name);                                           \
        va_start(ap, flags); mode = va_arg(ap, mode_t); va_end(ap);                    \
        if (flags & (O_CREAT | O_TRUNC)) MEET(AT_FDCWD, path);                         \
        return real(path, flags, mode);                                                \
    }
OPENER(open)
OPENER(open64)
#define OPENER_AT(name)                                                                \
    int name(int at, const char *path, int flags, ...)                                 \
    {                                                                                  \
        va_list ap; mode_t mode; REAL(name);                                           \
        va_start(ap, flags); mode = va_arg(ap, mode_t); va_end(ap);                    \
        if (flags & (O_CREAT | O_TRUNC)) MEET(at, path);                               \
        return real(at, path, flags, mode);                                            \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

#define OPEN_STREAM(name)                                                              \
    FILE *name(const char *path, const char *mode)                                     \
    {                                                                                  \
        REAL(name);                                                                    \
        if (strpbrk(mode, "wa+")) {                                                    \
            int f = fate(AT_FDCWD, path);                                              \
            if (f < 0) die();                                                          \
            if (f) return NULL;                                                        \
        }                                                                              \
        return real(path, mode);                                                       \
    }
OPEN_STREAM(fopen)
OPEN_STREAM(fopen64)

ssize_t write(int fd, const void *data, size_t size)
{
    int f; REAL(write);
    f = fate(fd, NULL);
    if (f < 0) { real(fd, data, size / 2); die(); }
    return f ? -1 : real(fd, data, size);
}
#define WRITER_AT(name, offset)                                                        \
    ssize_t name(int fd, const void *data, size_t size, offset where)                  \
    {                                                                                  \
        int f; REAL(name);                                                             \
        f = fate(fd, NULL);                                                            \
        if (f < 0) { real(fd, data, size / 2, where); die(); }                         \
        return f ? -1 : real(fd, data, size, where);                                   \
    }
WRITER_AT(pwrite, off_t)
WRITER_AT(pwrite64, off64_t)
ssize_t writev(int fd, const struct iovec *parts, int n)
{ REAL(writev); MEET(fd, NULL); return real(fd, parts, n); }

int fsync(int fd) { REAL(fsync); MEET(fd, NULL); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); MEET(fd, NULL); return real(fd); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); MEET(fd, NULL); return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); MEET(fd, NULL); return real(fd, n); }
int rename(const char *a, const char *b) { REAL(rename); MEET(AT_FDCWD, b); return real(a, b); }
int renameat(int x, const char *a, int y, const char *b)
{ REAL(renameat); MEET(y, b); return real(x, a, y, b); }
/* A directory that is there already is not made: no operation, and nobody minds why that failed. */
int mkdirat(int at, const char *p, mode_t m)
{ REAL(mkdirat); if (faccessat(at, p, F_OK, 0)) MEET(at, p); return real(at, p, m); }
int mkdir(const char *p, mode_t m)
{ REAL(mkdir); if (access(p, F_OK)) MEET(AT_FDCWD, p); return real(p, m); }
int unlink(const char *p) { REAL(unlink); MEET(AT_FDCWD, p); return real(p); }
int unlinkat(int at, const char *p, int f) { REAL(unlinkat); MEET(at, p); return real(at, p, f); }
int rmdir(const char *p) { REAL(rmdir); MEET(AT_FDCWD, p); return real(p); }
int link(const char *a, const char *b) { REAL(link); MEET(AT_FDCWD, b); return real(a, b); }
int symlink(const char *a, const char *b) { REAL(symlink); MEET(AT_FDCWD, b); return real(a, b); }
