/* Turning a checkpoint's tensors into packed weights. Used by the model families.
 *
 * A family describes its tensors once; the same description runs twice: measuring (arena NULL: only
 * sizes are added up), then loading. */
#ifndef LR_WORKER_MODELS_LOADER_H
#define LR_WORKER_MODELS_LOADER_H

#include "worker/model.h"

struct lr_loader {
    struct lr_checkpoint *checkpoint;
    const struct lr_kernel_ops *ops;
    struct lr_arena *arena; /* NULL while measuring */
    size_t bytes;           /* taken so far, measured or loaded */
    int64_t n_parameters;   /* of the tensors visited, whole matrices */
};

/* A run of rows of a tensor that becomes rows of a packed weight, in the order given. */
struct lr_row_range {
    int64_t source_row;
    int64_t n_rows;
};

/* A piece of a packed weight: `ranges` of the rows of tensor `name` [n_rows, k], or the whole
 * tensor where n_ranges = 0. */
struct lr_weight_piece {
    const char *name;
    int64_t n_rows;
    const struct lr_row_range *ranges;
    int64_t n_ranges;
};

/* Packs the pieces one below the other into one weight [sum of rows, k]. Its type is the tensors'
 * own; where they differ, float32. Errors name the tensor. */
LR_MUST_USE enum lr_status lr_load_weight(struct lr_loader *loader,
                                          const struct lr_weight_piece *pieces,
                                          int64_t n_pieces,
                                          int64_t k,
                                          struct lr_weight *out,
                                          struct lr_error *err);

/* A tensor [n] (or any shape of n elements, given by n_dims and shape) as float32. */
LR_MUST_USE enum lr_status lr_load_floats(
    struct lr_loader *loader, const char *name, int n_dims, const int64_t *shape, float **out, struct lr_error *err);

/* `count` objects of the model's arena, zeroed; NULL while measuring. */
void *lr_load_array(struct lr_loader *loader, int64_t count, size_t size);

#endif
