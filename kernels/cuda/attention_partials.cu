/* Decoding for many forks: the rows of an item, all query heads of a KV head together, over the item's own list.
 *
 *   item 0   slot 0   rows 0 .. n   blocks 0 .. 31        thread block (item, KV head): one pass over its blocks
 *   item 1   slot 1   rows 0 .. n   blocks 32 .. 63
 *
 * All items are one launch, so that a few rows over a million tokens fill the device. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_packet.h"

#include <math.h>

namespace lr::LR_CUDA_ACT
{

/* Every slot empty, for those that no item covers. */
__global__ void clear_partials(float *m, float *l, float *o, int64_t n, int64_t head_dim)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t i = start; i < n; i += step) {
        m[i] = -INFINITY;
        l[i] = 0.0f;
    }
    for (int64_t i = start; i < n * head_dim; i += step)
        o[i] = 0.0f;
}

} // namespace lr::LR_CUDA_ACT

static void clear_all(const struct lr_exec *exec, const struct lr_partials_args *args)
{
    const int64_t n = args->n_slots * args->n_rows * args->shape.n_heads;
    const int n_blocks = 4 * lr_cuda_multiprocessors(exec);
    lr::clear_partials<<<n_blocks, 256, 0, static_cast<cudaStream_t>(exec->stream)>>>(args->m, args->l, args->o, n,
                                                                                      args->shape.head_dim);
    lr_cuda_note(exec, cudaGetLastError(), "partials");
}

static struct lr_cuda_rows rows_of(const struct lr_partials_args *args, const struct lr_partial_item *item)
{
    struct lr_cuda_rows r = {};
    r.slot = item->slot;
    r.origin = item->first_row;
    r.first = item->first_row;
    r.end = item->first_row + item->n_rows;
    r.first_position = r.last_position = args->positions[r.first];
    for (int64_t row = r.first; row < r.end; row++) {
        r.first_position = args->positions[row] < r.first_position ? args->positions[row] : r.first_position;
        r.last_position = args->positions[row] > r.last_position ? args->positions[row] : r.last_position;
    }
    return r;
}

/* The items from `first` on, as many as one launch takes; returns the first one left over. */
static int64_t
fold_items(const struct lr_exec *exec, const struct lr_partials_args *args, struct lr_cuda_fold *fold, int64_t first)
{
    struct lr_cuda_packet packet;
    int64_t i = first;
    lr_cuda_packet_begin(&packet);
    fold->max_tokens = 0;
    for (; i < args->n_items; i++) {
        const struct lr_partial_item *item = &args->items[i];
        if (!lr_cuda_packet_fits(&packet, item->lists, item->n_lists))
            break;
        if (item->n_rows == 0)
            continue;
        lr_cuda_packet_add(exec, &packet, rows_of(args, item), item->lists, item->n_lists);
        fold->max_tokens = item->n_rows > fold->max_tokens ? item->n_rows : fold->max_tokens;
    }
    if (packet.n_rows > 0) {
        lr_cuda_packet_upload(exec, &packet, args->positions, args->n_rows, fold);
        LR_CUDA(fold_rows)(exec, fold, "partials");
    }
    return i;
}

void LR_CUDA(partials)(const struct lr_exec *exec, const struct lr_partials_args *args)
{
    if (args->n_rows == 0 || args->n_slots == 0)
        return;
    int64_t covered = 0;
    for (int64_t i = 0; i < args->n_items; i++)
        covered += args->items[i].n_rows;
    if (covered < args->n_slots * args->n_rows)
        clear_all(exec, args);
    struct lr_cuda_fold fold = {};
    fold.shape = args->shape;
    fold.q = args->q;
    fold.q_stride = args->q_stride;
    fold.q_head_stride = args->q_head_stride;
    fold.n_rows = args->n_rows;
    fold.scale = args->scale;
    fold.m = args->m;
    fold.l = args->l;
    fold.o = args->o;
    for (int64_t i = 0; i < args->n_items;)
        i = fold_items(exec, args, &fold, i);
}
