#include "worker/models/loader.h"

#include <stdlib.h>
#include <string.h>

static void *take(struct lr_loader *loader, size_t bytes)
{
    loader->bytes += lr_arena_array_bytes(bytes, 1);
    return loader->arena ? lr_arena_alloc(loader->arena, bytes, 1) : NULL;
}

void *lr_load_array(struct lr_loader *loader, int64_t count, size_t size)
{
    loader->table_bytes += lr_arena_array_bytes((size_t)count, size);
    return loader->tables ? lr_arena_alloc(loader->tables, (size_t)count, size) : NULL;
}

static int64_t piece_rows(const struct lr_weight_piece *piece)
{
    int64_t n = 0;
    for (int64_t i = 0; i < piece->n_ranges; i++)
        n += piece->ranges[i].n_rows;
    return piece->n_ranges ? n : piece->n_rows;
}

/* Packs n rows of a tensor, widened to float32 on the way where the weight's type is not the
 * tensor's. */
static enum lr_status pack_rows(const struct lr_loader *loader,
                                struct lr_weight *w,
                                int64_t row,
                                const struct lr_tensor *tensor,
                                int64_t source_row,
                                int64_t n,
                                struct lr_error *err)
{
    size_t row_bytes = (size_t)w->k * lr_dtype_bytes(tensor->dtype);
    const char *rows = (const char *)tensor->data + (size_t)source_row * row_bytes;
    if (tensor->dtype == w->dtype) {
        loader->ops->weight_pack(w, row, n, rows);
        return LR_OK;
    }
    float *wide = malloc((size_t)(n * w->k) * sizeof *wide);
    if (!wide)
        return lr_fail(err, LR_NO_MEMORY, "no memory to widen tensor %s", tensor->name);
    lr_tensor_widen(tensor, source_row * w->k, n * w->k, wide);
    loader->ops->weight_pack(w, row, n, wide);
    free(wide);
    return LR_OK;
}

static enum lr_status pack_piece(const struct lr_loader *loader,
                                 const struct lr_weight_piece *piece,
                                 const struct lr_tensor *tensor,
                                 struct lr_weight *w,
                                 int64_t row,
                                 struct lr_error *err)
{
    struct lr_row_range whole = {.source_row = 0, .n_rows = piece->n_rows};
    const struct lr_row_range *ranges = piece->n_ranges ? piece->ranges : &whole;
    int64_t n = piece->n_ranges ? piece->n_ranges : 1;
    for (int64_t i = 0; i < n; i++) {
        LR_TRY(pack_rows(loader, w, row, tensor, ranges[i].source_row, ranges[i].n_rows, err));
        row += ranges[i].n_rows;
    }
    lr_checkpoint_discard(tensor);
    return LR_OK;
}

enum lr_status lr_load_weight(struct lr_loader *loader,
                              const struct lr_weight_piece *pieces,
                              int64_t n_pieces,
                              int64_t k,
                              struct lr_weight *out,
                              struct lr_error *err)
{
    enum { MAX_PIECES = 4 };
    struct lr_tensor tensors[MAX_PIECES];
    if (n_pieces > MAX_PIECES)
        return lr_fail(err, LR_INTERNAL, "a weight of %lld pieces", (long long)n_pieces);
    struct lr_weight w = {.k = k};
    for (int64_t i = 0; i < n_pieces; i++) {
        int64_t shape[2] = {pieces[i].n_rows, k};
        LR_TRY(lr_checkpoint_take(loader->checkpoint, pieces[i].name, 2, shape, &tensors[i], err));
        w.n += piece_rows(&pieces[i]);
        w.dtype = i == 0 || tensors[i].dtype == w.dtype ? tensors[i].dtype : LR_F32;
        loader->n_parameters += pieces[i].n_rows * k;
    }
    w.size_bytes = loader->ops->weight_bytes(w.n, k, w.dtype);
    w.data = take(loader, w.size_bytes);
    if (loader->arena) {
        int64_t row = 0;
        for (int64_t i = 0; i < n_pieces; i++) {
            LR_TRY(pack_piece(loader, &pieces[i], &tensors[i], &w, row, err));
            row += piece_rows(&pieces[i]);
        }
    }
    *out = w;
    return LR_OK;
}

/* n elements of a tensor, widened, to `to` in the backend's memory. */
static enum lr_status
upload_floats(const struct lr_loader *loader, const struct lr_tensor *tensor, int64_t n, float *to, struct lr_error *err)
{
    if (loader->ops->host_memory) {
        lr_tensor_widen(tensor, 0, n, to);
        return LR_OK;
    }
    float *wide = malloc((size_t)(n > 0 ? n : 1) * sizeof *wide);
    if (!wide)
        return lr_fail(err, LR_NO_MEMORY, "no memory to widen tensor %s", tensor->name);
    lr_tensor_widen(tensor, 0, n, wide);
    loader->ops->memory.upload(loader->exec, to, wide, (size_t)n * sizeof *wide);
    free(wide);
    return LR_OK;
}

enum lr_status lr_load_floats(
    struct lr_loader *loader, const char *name, int n_dims, const int64_t *shape, float **out, struct lr_error *err)
{
    struct lr_tensor tensor;
    LR_TRY(lr_checkpoint_take(loader->checkpoint, name, n_dims, shape, &tensor, err));
    int64_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= shape[i];
    loader->n_parameters += n;
    float *floats = take(loader, (size_t)n * sizeof *floats);
    if (loader->arena)
        LR_TRY(upload_floats(loader, &tensor, n, floats, err));
    *out = floats;
    return LR_OK;
}

enum lr_status lr_load_floats_joined(struct lr_loader *loader,
                                     const char *const *names,
                                     const int64_t *n_elements,
                                     int n_tensors,
                                     float **out,
                                     struct lr_error *err)
{
    int64_t n = 0;
    for (int i = 0; i < n_tensors; i++)
        n += n_elements[i];
    loader->n_parameters += n;
    float *floats = take(loader, (size_t)n * sizeof *floats);
    n = 0;
    for (int i = 0; i < n_tensors; i++) {
        struct lr_tensor tensor;
        LR_TRY(lr_checkpoint_take(loader->checkpoint, names[i], 1, &n_elements[i], &tensor, err));
        if (loader->arena)
            LR_TRY(upload_floats(loader, &tensor, n_elements[i], floats + n, err));
        n += n_elements[i];
    }
    *out = floats;
    return LR_OK;
}

enum lr_status lr_load_rows(struct lr_loader *loader,
                            const char *name,
                            int64_t n_rows,
                            int64_t k,
                            const void **out,
                            enum lr_dtype *dtype,
                            struct lr_error *err)
{
    int64_t shape[2] = {n_rows, k};
    struct lr_tensor tensor;
    LR_TRY(lr_checkpoint_take(loader->checkpoint, name, 2, shape, &tensor, err));
    *out = tensor.data;
    *dtype = tensor.dtype;
    if (loader->ops->host_memory)
        return LR_OK;
    size_t bytes = (size_t)(n_rows * k) * lr_dtype_bytes(tensor.dtype);
    void *rows = take(loader, bytes);
    if (loader->arena)
        loader->ops->memory.upload(loader->exec, rows, tensor.data, bytes);
    *out = rows;
    return LR_OK;
}
