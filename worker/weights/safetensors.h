/* One .safetensors file, mapped read-only.
 *
 *   u64 n (little-endian) | n bytes of JSON: {"name": {"dtype", "shape", "data_offsets"}, ...} | data
 *
 * Everything in the header is checked before a tensor can be taken: the tensors fill the data
 * without hole or overlap, and each has the bytes that its shape and dtype ask for.
 * (https://huggingface.co/docs/safetensors) */
#ifndef LR_WORKER_WEIGHTS_SAFETENSORS_H
#define LR_WORKER_WEIGHTS_SAFETENSORS_H

#include "base/status.h"
#include "kernels/ops.h"
#include <stddef.h>
#include <stdint.h>

enum { LR_TENSOR_MAX_DIMS = 8 };

/* A tensor as the file describes it. */
struct lr_safetensors_entry {
    const char *name;
    const char *dtype; /* the file's spelling: "BF16" */
    int n_dims;
    int64_t shape[LR_TENSOR_MAX_DIMS];
    const void *data; /* may be unaligned */
    size_t size_bytes;
};

struct lr_safetensors;

/* Maps `path` and checks it. Errors name the path and, where it is one tensor's fault, the tensor. */
LR_MUST_USE enum lr_status lr_safetensors_open(const char *path, struct lr_safetensors **out, struct lr_error *err);

/* The same over bytes that stay the caller's and must outlive the result; `path` is for messages. */
LR_MUST_USE enum lr_status lr_safetensors_parse(
    const unsigned char *data, size_t size_bytes, const char *path, struct lr_safetensors **out, struct lr_error *err);
void lr_safetensors_close(struct lr_safetensors *file);

/* NULL where there is no such tensor. */
const struct lr_safetensors_entry *lr_safetensors_find(const struct lr_safetensors *file, const char *name);

/* In the order of their names. */
int64_t lr_safetensors_count(const struct lr_safetensors *file);
const struct lr_safetensors_entry *lr_safetensors_at(const struct lr_safetensors *file, int64_t index);

#endif
