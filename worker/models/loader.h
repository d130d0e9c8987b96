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
    const struct lr_exec *exec;
    struct lr_arena *arena;  /* backend memory; NULL while measuring */
    struct lr_arena *tables; /* host memory; NULL while measuring */
    size_t bytes;            /* taken of the first so far, measured or loaded */
    size_t table_bytes;      /* of the second */
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

/* Several tensors [n_elements each] one behind the other as float32. */
LR_MUST_USE enum lr_status lr_load_floats_joined(struct lr_loader *loader,
                                                 const char *const *names,
                                                 const int64_t *n_elements,
                                                 int n_tensors,
                                                 float **out,
                                                 struct lr_error *err);

/* A tensor [n] (or any shape of n elements, given by n_dims and shape) as float32. */
LR_MUST_USE enum lr_status lr_load_floats(
    struct lr_loader *loader, const char *name, int n_dims, const int64_t *shape, float **out, struct lr_error *err);

/* A tensor [n_rows, k] as it is, row-major: in the mapped file where the backend's memory is the host's. */
LR_MUST_USE enum lr_status lr_load_rows(struct lr_loader *loader,
                                        const char *name,
                                        int64_t n_rows,
                                        int64_t k,
                                        const void **out,
                                        enum lr_dtype *dtype,
                                        struct lr_error *err);

/* `count` objects of host memory that live as long as the model, zeroed; NULL while measuring. */
void *lr_load_array(struct lr_loader *loader, int64_t count, size_t size);

#endif
