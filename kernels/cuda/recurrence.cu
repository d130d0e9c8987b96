/* The owner of the recurrence's C interface: cuts the launch, lays out work, and sends each shape to its kernels.
 *
 *   work   inverses (delta)  |  b  |  m  |  entering          float32, one state a slot and head each; b and m also one
 *                                                             a group of slots and head
 *
 * Tiles of the tensor cores serve dk = dv = 64 and 128 with 16-byte aligned rows; everything else takes the plain pass,
 * which reads and writes the same slots. */
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr::LR_CUDA_ACT
{

static bool tiles_fit(const struct lr_delta_shape &shape)
{
    return shape.dk == shape.dv && (shape.dk == 64 || shape.dk == 128);
}

static bool aligned(const void *rows, int64_t stride)
{
    return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 8 == 0;
}

/* Bytes of the parts of work; their order is the struct's. */
struct work_parts {
    size_t inverses, b, m, entering;
};

static int64_t slots(struct lr_delta_shape shape, int64_t n_rows, int64_t n_sequences)
{
    const int64_t sub = LR_CUDA(recurrence_sub_tokens)(shape);
    return n_sequences == 1 ? (n_rows + sub - 1) / sub : n_rows / sub + n_sequences;
}

/* So many that the chain within a group and that over a segment's groups are alike. Many heads fill a device by
 * themselves: a segment's slots are one group. */
static int group_slots(struct lr_delta_shape shape)
{
    return shape.n_v_heads >= 16 ? 16 : 8;
}

/* 0 where no sequence can have more than one, and where the scan does not run on tiles. */
static int64_t groups(enum lr_recurrence_rule rule, struct lr_delta_shape shape, int64_t n_rows, int64_t n_sequences)
{
    const int64_t n = group_slots(shape);
    if (rule != LR_RECURRENCE_DELTA || !tiles_fit(shape) || n_rows <= n * LR_CUDA(recurrence_sub_tokens)(shape)) {
        return 0;
    }
    const int64_t n_slots = slots(shape, n_rows, n_sequences);
    return n_sequences == 1 ? (n_slots + n - 1) / n : n_slots / n + n_sequences;
}

static size_t padded(int64_t n_bytes)
{
    return (static_cast<size_t>(n_bytes) + 255) / 256 * 256;
}

static struct work_parts
parts_of(enum lr_recurrence_rule rule, const struct lr_delta_shape &shape, int64_t n_rows, int64_t n_sequences)
{
    const bool delta = rule == LR_RECURRENCE_DELTA;
    const int64_t slot_heads = slots(shape, n_rows, n_sequences) * shape.n_v_heads;
    const int64_t pair_heads = slot_heads + groups(rule, shape, n_rows, n_sequences) * shape.n_v_heads;
    const int64_t state = shape.dk * shape.dv * 4;
    struct work_parts parts;
    parts.inverses = delta && tiles_fit(shape) ? padded(slot_heads * LR_CUDA(recurrence_sub_tokens)(shape) * CHUNK * 2) : 0;
    parts.b = padded(pair_heads * state);
    parts.m = padded(pair_heads * (delta ? shape.dk * shape.dk * 4 : 4));
    parts.entering = padded(slot_heads * state);
    return parts;
}

static recurrence_params params_of(const struct lr_recurrence_args *args)
{
    recurrence_params p = {};
    p.q = static_cast<const act *>(args->q);
    p.k = static_cast<const act *>(args->k);
    p.v = static_cast<const act *>(args->v);
    p.q_stride = args->q_stride;
    p.k_stride = args->k_stride;
    p.v_stride = args->v_stride;
    p.g = args->g;
    p.beta = args->beta;
    p.scale = args->scale;
    p.offsets = args->offsets;
    p.n_rows = args->n_rows;
    p.n_sequences = args->n_sequences;
    p.n_slots = slots(args->shape, args->n_rows, args->n_sequences);
    p.n_groups = groups(args->rule, args->shape, args->n_rows, args->n_sequences);
    p.group_slots = group_slots(args->shape);
    p.sub_tokens = LR_CUDA(recurrence_sub_tokens)(args->shape);
    p.n_v_heads = static_cast<int>(args->shape.n_v_heads);
    p.heads_per_k_head = static_cast<int>(args->shape.n_v_heads / args->shape.n_k_heads);
    p.dk = static_cast<int>(args->shape.dk);
    p.dv = static_cast<int>(args->shape.dv);
    const struct work_parts parts = parts_of(args->rule, args->shape, args->n_rows, args->n_sequences);
    char *work = static_cast<char *>(args->work);
    p.inverses = reinterpret_cast<act *>(work);
    p.b = reinterpret_cast<float *>(work + parts.inverses);
    p.m = reinterpret_cast<float *>(work + parts.inverses + parts.b);
    p.entering = reinterpret_cast<float *>(work + parts.inverses + parts.b + parts.m);
    return p;
}

static bool takes_tiles(const struct lr_recurrence_args *args)
{
    return tiles_fit(args->shape) && aligned(args->q, args->q_stride) && aligned(args->k, args->k_stride) &&
           aligned(args->v, args->v_stride);
}

static cudaError_t launch_pass(cudaStream_t stream, const struct lr_recurrence_args *args, const recurrence_params &p,
                               bool output)
{
    const bool delta = args->rule == LR_RECURRENCE_DELTA;
    return args->hopper ? launch_recurrence_pass_hopper(stream, p, delta, output)
                        : launch_recurrence_pass_portable(stream, p, delta, output);
}

/* (M, B) of every slot. */
static cudaError_t launch_pairs(cudaStream_t stream, const struct lr_recurrence_args *args, const recurrence_params &p)
{
    if (!takes_tiles(args)) {
        return launch_recurrence_plain(stream, p, args->rule == LR_RECURRENCE_DELTA, false);
    }
    const cudaError_t error = args->rule == LR_RECURRENCE_DELTA ? launch_recurrence_inverse(stream, p) : cudaSuccess;
    return error != cudaSuccess ? error : launch_pass(stream, args, p, false);
}

} // namespace lr::LR_CUDA_ACT

using namespace lr;

/* Long enough that the slots' states cost little beside their tokens, short enough that one sequence's slots and heads
 * fill a device. */
extern "C" int LR_CUDA(recurrence_sub_tokens)(struct lr_delta_shape shape)
{
    const int64_t heads = shape.n_v_heads;
    return heads >= 16 ? 4096 : heads >= 8 ? 2048 : 1024;
}

extern "C" size_t
LR_CUDA(recurrence_work_bytes)(enum lr_recurrence_rule rule, struct lr_delta_shape shape, int64_t n_rows, int64_t n_sequences)
{
    const struct work_parts parts = parts_of(rule, shape, n_rows, n_sequences);
    return parts.inverses + parts.b + parts.m + parts.entering;
}

extern "C" int LR_CUDA(recurrence_prepare)(void *stream, const struct lr_recurrence_args *args)
{
    cudaStream_t to = static_cast<cudaStream_t>(stream);
    const recurrence_params p = params_of(args);
    if (args->n_rows == 0) {
        return cudaSuccess;
    }
    const cudaError_t error = launch_pairs(to, args, p);
    return error != cudaSuccess || p.n_groups == 0 ? error : launch_recurrence_fold_groups(to, p);
}

extern "C" int LR_CUDA(recurrence_summary)(void *stream, const struct lr_recurrence_args *args, float *m, float *b)
{
    return launch_recurrence_fold_slots(static_cast<cudaStream_t>(stream), params_of(args),
                                        args->rule == LR_RECURRENCE_DELTA, m, b);
}

extern "C" int LR_CUDA(recurrence_output)(
    void *stream, const struct lr_recurrence_args *args, const float *s_in, lr_act *o, int64_t o_stride, float *s_out)
{
    cudaStream_t to = static_cast<cudaStream_t>(stream);
    const bool delta = args->rule == LR_RECURRENCE_DELTA;
    recurrence_params p = params_of(args);
    p.o = static_cast<act *>(o);
    p.o_stride = o_stride;
    const cudaError_t error = launch_recurrence_scan(to, p, delta, s_in, s_out);
    if (error != cudaSuccess || args->n_rows == 0) {
        return error;
    }
    const bool tiles = takes_tiles(args) && aligned(o, o_stride);
    return tiles ? launch_pass(to, args, p, true) : launch_recurrence_plain(to, p, delta, true);
}
