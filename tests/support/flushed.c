/* Preloaded: whatever a process flushes is copied to $FLUSHED, so that a test knows what would survive a power cut.
 *
 * A flushed file leaves its content in `ID`, a flushed folder its entries in `ID`, one `KIND ID NAME` each, ended by
 * a zero byte. ID is made of device, inode and time of birth: inodes are used again.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void write_id(const struct statx *found, char *name, size_t size) {
    snprintf(name, size, "%x-%x-%llx-%llx-%x", found->stx_dev_major, found->stx_dev_minor,
             (unsigned long long)found->stx_ino, (unsigned long long)found->stx_btime.tv_sec,
             found->stx_btime.tv_nsec);
}

static void put(int out, const char *data, size_t size) {
    while (size > 0) {
        ssize_t done = write(out, data, size);
        if (done <= 0)
            abort();
        data += done;
        size -= (size_t)done;
    }
}

static void keep_entries(int handle, int out) {
    int again = openat(handle, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *folder = again < 0 ? NULL : fdopendir(again);
    if (folder == NULL)
        abort();
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        struct statx found;
        char id[128], line[512];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (statx(again, entry->d_name, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &found) != 0)
            continue; /* removed meanwhile */
        write_id(&found, id, sizeof id);
        int size = snprintf(line, sizeof line, "%c %s %s", S_ISDIR(found.stx_mode) ? 'd' : 'f', id, entry->d_name);
        put(out, line, (size_t)size + 1);
    }
    closedir(folder);
}

static void keep_content(int handle, int out) {
    char self[64], part[65536];
    snprintf(self, sizeof self, "/proc/self/fd/%d", handle);
    int in = open(self, O_RDONLY | O_CLOEXEC);
    if (in < 0)
        abort();
    for (ssize_t count; (count = read(in, part, sizeof part)) > 0;)
        put(out, part, (size_t)count);
    close(in);
}

/* The ID of an open file or folder; -1 where there is none. */
int flushed_id(int handle, char *id, size_t size) {
    struct statx found;
    if (statx(handle, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &found) != 0)
        return -1;
    write_id(&found, id, size);
    return S_ISDIR(found.stx_mode) || S_ISREG(found.stx_mode);
}

/* Keep what is in an open file or folder now, below `folder`. */
int keep_flushed(int handle, const char *folder) {
    char id[128], final[PATH_MAX], partial[PATH_MAX + 32];
    struct stat found;
    int kind = flushed_id(handle, id, sizeof id);
    if (kind <= 0 || fstat(handle, &found) != 0)
        return kind;
    snprintf(final, sizeof final, "%s/%s", folder, id);
    snprintf(partial, sizeof partial, "%s.%ld", final, (long)syscall(SYS_gettid));
    int out = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (out < 0)
        abort();
    if (S_ISDIR(found.st_mode))
        keep_entries(handle, out);
    else
        keep_content(handle, out);
    close(out);
    if (rename(partial, final) != 0)
        abort();
    return 0;
}

static int keep(int handle) {
    const char *folder = getenv("FLUSHED");
    return folder == NULL ? 0 : keep_flushed(handle, folder);
}

int fsync(int handle) { return keep(handle); }

int fdatasync(int handle) { return keep(handle); }
