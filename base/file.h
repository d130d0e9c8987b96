/* Whole files, read-only: mapped (weights) or read (documents, configuration). */
#ifndef LR_BASE_FILE_H
#define LR_BASE_FILE_H

#include "base/status.h"
#include <stddef.h>

struct lr_mapped_file {
    const unsigned char *data; /* size_bytes bytes, NULL for an empty file */
    size_t size_bytes;
};

/* Maps a regular file. Errors name the path. The mapping stays valid until lr_file_unmap. */
LR_MUST_USE enum lr_status lr_file_map(const char *path, struct lr_mapped_file *out, struct lr_error *err);
void lr_file_unmap(struct lr_mapped_file *file);

/* Reads a file, or standard input for "-", into a new buffer with a NUL behind its last byte; the
 * caller frees it. More than `limit_bytes` is refused with LR_INVALID. Blocks until the end of the
 * file. */
LR_MUST_USE enum lr_status
lr_file_read(const char *path, size_t limit_bytes, char **data, size_t *size_bytes, struct lr_error *err);

#endif
