/* The weights of a HuggingFace model directory: model.safetensors, or the shards that
 * model.safetensors.index.json names. Mapped, so pages are read when a tensor is. */
#ifndef LR_WORKER_WEIGHTS_CHECKPOINT_DIR_H
#define LR_WORKER_WEIGHTS_CHECKPOINT_DIR_H

#include "worker/weights/safetensors.h"

/* A tensor of a dtype that we compute with. `data` stays valid until lr_checkpoint_close. */
struct lr_tensor {
    const char *name;
    enum lr_dtype dtype;
    int n_dims;
    int64_t shape[LR_TENSOR_MAX_DIMS];
    const void *data; /* row-major, may be unaligned */
    size_t size_bytes;
};

struct lr_checkpoint;

/* Maps every file and checks every header. */
LR_MUST_USE enum lr_status lr_checkpoint_open(const char *model_dir, struct lr_checkpoint **out, struct lr_error *err);
void lr_checkpoint_close(struct lr_checkpoint *checkpoint);

/* The tensor `name`, which must have exactly this shape: LR_NOT_FOUND, LR_CORRUPT with both shapes,
 * or LR_UNSUPPORTED naming its dtype. */
LR_MUST_USE enum lr_status lr_checkpoint_take(struct lr_checkpoint *checkpoint,
                                              const char *name,
                                              int n_dims,
                                              const int64_t *shape,
                                              struct lr_tensor *out,
                                              struct lr_error *err);

/* Sum of all tensors' elements, and how many bytes they take. */
void lr_checkpoint_totals(const struct lr_checkpoint *checkpoint, int64_t *n_elements, int64_t *size_bytes);

/* Tells the kernel that the tensor's pages are not needed again soon. */
void lr_checkpoint_discard(const struct lr_tensor *tensor);

/* Elements [first, first + n) as float32. */
void lr_tensor_widen(const struct lr_tensor *tensor, int64_t first, int64_t n, float *out);

#endif
