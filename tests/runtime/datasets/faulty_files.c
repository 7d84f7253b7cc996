// Preloaded into a process, makes the system calls on files below one folder fail: the n-th, or all from it on.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long fatal;
static int error_number, goes_on;
static atomic_long seen;

// fatal 0: count alone.
void faulty_arm(const char *path, long nth, int error, int all_from_it_on) {
    snprintf(folder, sizeof folder, "%s", path);
    fatal = nth;
    error_number = error;
    goes_on = all_from_it_on;
    seen = 0;
}

long faulty_seen(void) { return seen; }

static int fails(const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder)) != 0) return 0;
    long now = ++seen;
    if (!fatal || now < fatal || (now > fatal && !goes_on)) return 0;
    errno = error_number;
    return 1;
}

static int fails_open(int descriptor) {
    if (!folder[0]) return 0;
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(name, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(path);
}

static int fails_at(int place, const char *path) {
    if (path[0] == '/' || place == AT_FDCWD) return fails(path);
    return fails_open(place);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_PATH(result, name, parameters, arguments) \
    result name parameters { return fails(path) ? (result)-1 : REAL(name) arguments; }
#define ON_DESCRIPTOR(result, name, parameters, arguments) \
    result name parameters { return fails_open(descriptor) ? (result)-1 : REAL(name) arguments; }
#define AT(result, name, parameters, arguments) \
    result name parameters { return fails_at(place, path) ? (result)-1 : REAL(name) arguments; }
#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        return fails(path) ? -1 : REAL(name)(path, flags, mode); \
    }
#define OPENS_AT(name) \
    int name(int place, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        return fails_at(place, path) ? -1 : REAL(name)(place, path, flags, mode); \
    }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(int, rename, (const char *path, const char *to), (path, to))
ON_PATH(int, unlink, (const char *path), (path))
ON_PATH(int, rmdir, (const char *path), (path))
ON_PATH(int, stat, (const char *path, struct stat *status), (path, status))
ON_PATH(int, stat64, (const char *path, struct stat64 *status), (path, status))
ON_PATH(int, lstat, (const char *path, struct stat *status), (path, status))
ON_PATH(int, lstat64, (const char *path, struct stat64 *status), (path, status))
AT(int, mkdirat, (int place, const char *path, mode_t mode), (place, path, mode))
AT(int, unlinkat, (int place, const char *path, int flags), (place, path, flags))
AT(int, fstatat, (int place, const char *path, struct stat *status, int flags), (place, path, status, flags))
AT(int, fstatat64, (int place, const char *path, struct stat64 *status, int flags), (place, path, status, flags))
AT(int, renameat, (int place, const char *path, int there, const char *to), (place, path, there, to))
ON_DESCRIPTOR(ssize_t, read, (int descriptor, void *to, size_t size), (descriptor, to, size))
ON_DESCRIPTOR(ssize_t, write, (int descriptor, const void *from, size_t size), (descriptor, from, size))
ON_DESCRIPTOR(ssize_t, pread64, (int descriptor, void *to, size_t size, off64_t at), (descriptor, to, size, at))
ON_DESCRIPTOR(ssize_t, pwrite64, (int descriptor, const void *from, size_t size, off64_t at), (descriptor, from, size, at))
/* Fails as told; but nothing here cuts the power, and others may keep the disk busy. */
int fsync(int descriptor) { return fails_open(descriptor) ? -1 : 0; }
ON_DESCRIPTOR(int, fstat, (int descriptor, struct stat *status), (descriptor, status))
ON_DESCRIPTOR(int, fstat64, (int descriptor, struct stat64 *status), (descriptor, status))
ON_DESCRIPTOR(int, flock, (int descriptor, int operation), (descriptor, operation))

DIR *opendir(const char *path) { return fails(path) ? NULL : REAL(opendir)(path); }
