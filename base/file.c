#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum lr_status lr_file_map(const char *path, struct lr_mapped_file *out, struct lr_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return lr_fail(err, errno == ENOENT ? LR_NOT_FOUND : LR_IO, "cannot open %s: %s", path, strerror(errno));
    enum lr_status status = LR_OK;
    struct stat info;
    void *data = NULL;
    if (fstat(fd, &info) != 0) {
        status = lr_fail(err, LR_IO, "cannot stat %s: %s", path, strerror(errno));
        goto close_fd;
    }
    if (!S_ISREG(info.st_mode)) {
        status = lr_fail(err, LR_INVALID, "%s is not a regular file", path);
        goto close_fd;
    }
    if (info.st_size > 0) {
        data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == MAP_FAILED) {
            status = lr_fail(err, LR_IO, "cannot map %s: %s", path, strerror(errno));
            goto close_fd;
        }
    }
    *out = (struct lr_mapped_file){.data = data, .size_bytes = (size_t)info.st_size};
close_fd:
    close(fd);
    return status;
}

void lr_file_unmap(struct lr_mapped_file *file)
{
    if (file->data)
        munmap((void *)(size_t)file->data, file->size_bytes);
    *file = (struct lr_mapped_file){0};
}

static enum lr_status grow(char **data, size_t *capacity, size_t limit_bytes, const char *path, struct lr_error *err)
{
    size_t bigger = *capacity * 2;
    if (bigger > limit_bytes + 1)
        bigger = limit_bytes + 1;
    char *moved = realloc(*data, bigger + 1);
    if (!moved)
        return lr_fail(err, LR_NO_MEMORY, "no memory for %zu bytes of %s", bigger, path);
    *data = moved;
    *capacity = bigger;
    return LR_OK;
}

enum lr_status lr_file_read(const char *path, size_t limit_bytes, char **data, size_t *size_bytes, struct lr_error *err)
{
    int is_stdin = strcmp(path, "-") == 0;
    int fd = is_stdin ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return lr_fail(err, errno == ENOENT ? LR_NOT_FOUND : LR_IO, "cannot open %s: %s", path, strerror(errno));
    enum lr_status status = LR_OK;
    size_t capacity = 1 << 16, used = 0;
    char *buffer = malloc(capacity + 1);
    if (!buffer)
        status = lr_fail(err, LR_NO_MEMORY, "no memory to read %s", path);
    while (status == LR_OK) {
        if (used > limit_bytes)
            status = lr_fail(err, LR_INVALID, "%s is longer than %zu bytes", path, limit_bytes);
        else if (used == capacity)
            status = grow(&buffer, &capacity, limit_bytes, path, err);
        if (status != LR_OK)
            break;
        ssize_t got = read(fd, buffer + used, capacity - used);
        if (got == 0)
            break;
        if (got < 0 && errno != EINTR)
            status = lr_fail(err, LR_IO, "cannot read %s: %s", path, strerror(errno));
        used += got > 0 ? (size_t)got : 0;
    }
    if (!is_stdin)
        close(fd);
    if (status != LR_OK) {
        free(buffer);
        return status;
    }
    buffer[used] = '\0';
    *data = buffer;
    *size_bytes = used;
    return LR_OK;
}
