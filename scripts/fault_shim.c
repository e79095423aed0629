/* Preloaded below the commands: the nth call that touches a file below `prefix` fails with `code`,
 * and every later one, or (code 0) ends the process as SIGKILL does. Armed by fault_arm. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READS = 1, WRITES = 2, NAMES = 4, FINDS = 8 };

static int armed_kinds, armed_code, seen;
static int armed_nth;
static char armed_prefix[4096];

void fault_arm(int kinds, int nth, int code, const char *prefix) {
    strncpy(armed_prefix, prefix, sizeof armed_prefix - 1);
    seen = 0;
    armed_nth = nth; /* 0: count only */
    armed_code = code;
    armed_kinds = kinds;
}

int fault_seen(void) { return seen; }

static int hit(int kind, const char *path) {
    if (!(armed_kinds & kind) || strncmp(path, armed_prefix, strlen(armed_prefix)))
        return 0;
    int number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (!armed_nth || number < armed_nth)
        return 0;
    if (!armed_code)
        kill(getpid(), SIGKILL);
    errno = armed_code;
    return 1;
}

static int hit_fd(int kind, int fd) {
    if (!(armed_kinds & kind))
        return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return hit(kind, path);
}

static int hit_at(int kind, int fd, const char *path) {
    return path[0] == '/' || fd == AT_FDCWD ? hit(kind, path) : hit_fd(kind, fd);
}

#define WRAP(result, name, parameters, arguments, failing)                                         \
    result name parameters {                                                                       \
        static result(*next) parameters;                                                           \
        if (!next)                                                                                 \
            next = (result(*) parameters)dlsym(RTLD_NEXT, #name);                                  \
        return (failing) ? (result)-1 : next arguments;                                            \
    }

WRAP(ssize_t, read, (int fd, void *to, size_t n), (fd, to, n), hit_fd(READS, fd))
WRAP(ssize_t, pread64, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at), hit_fd(READS, fd))
WRAP(ssize_t, preadv64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at),
     hit_fd(READS, fd))
WRAP(ssize_t, preadv64v2, (int fd, const struct iovec *v, int n, off64_t at, int flags),
     (fd, v, n, at, flags), hit_fd(READS, fd))
WRAP(ssize_t, write, (int fd, const void *from, size_t n), (fd, from, n), hit_fd(WRITES, fd))
WRAP(ssize_t, pwrite64, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at),
     hit_fd(WRITES, fd))
WRAP(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), hit_fd(WRITES, fd))
WRAP(ssize_t, copy_file_range, (int in, off64_t *at, int out, off64_t *to, size_t n, unsigned flags),
     (in, at, out, to, n, flags), hit_fd(READS, in) || hit_fd(WRITES, out))
WRAP(ssize_t, sendfile64, (int out, int in, off64_t *at, size_t n), (out, in, at, n),
     hit_fd(READS, in) || hit_fd(WRITES, out))
WRAP(int, fsync, (int fd), (fd), hit_fd(WRITES, fd))
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size), hit_fd(WRITES, fd))
WRAP(int, rename, (const char *old, const char *new), (old, new), hit(NAMES, old))
WRAP(int, renameat2, (int a, const char *old, int b, const char *new, unsigned flags),
     (a, old, b, new, flags), hit_at(NAMES, a, old))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), hit(NAMES, path))
WRAP(int, unlink, (const char *path), (path), hit(NAMES, path))
WRAP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags),
     hit_at(NAMES, fd, path))
WRAP(int, stat64, (const char *path, struct stat64 *found), (path, found), hit(FINDS, path))

int open64(const char *path, int flags, ...) {
    static int (*next)(const char *, int, ...);
    if (!next)
        next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return hit(FINDS, path) ? -1 : next(path, flags, mode);
}

DIR *opendir(const char *path) {
    static DIR *(*next)(const char *);
    if (!next)
        next = (DIR *(*)(const char *))dlsym(RTLD_NEXT, "opendir");
    return hit(FINDS, path) ? NULL : next(path);
}
