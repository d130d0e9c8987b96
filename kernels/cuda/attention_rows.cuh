/* A row's softmax state between the accumulators of a warp and memory, as the kernels of attention have it in common.
 *
 *   o[4 i + 2 r + c]   channel 8 i + 2 (lane mod 4) + c of row r: lane / 4 of a warp's sixteen rows, or 8 further
 *
 * which is the layout of the sums of mma.sync and of wgmma alike. Device code only. */
#ifndef LR_KERNELS_CUDA_ATTENTION_ROWS_CUH
#define LR_KERNELS_CUDA_ATTENTION_ROWS_CUH

#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/mma.cuh"

#include <math.h>

namespace lr::LR_CUDA_ACT
{

/* The keys of a step that a row may see: those below `to`, but none of the `hidden` from `sinks` on. Counted from
 * `column`. */
struct visible_keys {
    int to, sinks;
    uint32_t hidden;
};

static __device__ __forceinline__ visible_keys see_keys(const lr_cuda_fold &a,
                                                        const step_note &note,
                                                        int64_t position,
                                                        int column)
{
    const int to = clamp_key(position + 1 - note.position);
    visible_keys v = {(to < note.n_keys ? to : note.n_keys) - column, 0, 0};
    if (a.window > 0 && !(note.flags & STEP_WHOLE)) {
        const int from = clamp_key(position - a.window + 1 - note.position) - column;
        v.sinks = clamp_key(a.sinks - note.position) - column;
        v.hidden = from > v.sinks ? static_cast<uint32_t>(from - v.sinks) : 0;
    }
    return v;
}

static __device__ __forceinline__ bool is_hidden(const visible_keys &v, int key)
{
    return key >= v.to || static_cast<uint32_t>(key - v.sinks) < v.hidden;
}

/* The state that row r of a warp's sixteen starts from; column: 2 (lane mod 4). */
template <int D>
static __device__ __forceinline__ void load_row(const lr_cuda_fold &a,
                                                float (&o)[D / 2],
                                                float &m,
                                                float &l,
                                                const row_place &place,
                                                int64_t slot,
                                                int r,
                                                int column)
{
    const bool there = a.resume && place.position >= 0;
    const int64_t at = (slot * a.n_rows + place.row) * a.shape.n_heads + place.head;
    m = there ? a.m[at] : -INFINITY;
    l = there ? a.l[at] : 0.0f;
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            o[4 * i + 2 * r + c] =
                there && 8 * i < a.shape.head_dim ? a.o[at * a.shape.head_dim + 8 * i + column + c] : 0.0f;
}

/* o / l as activations. */
template <int D>
static __device__ __forceinline__ void
store_result(const lr_cuda_fold &a, const float (&o)[D / 2], float l, const row_place &place, int r, int column)
{
    const float inverse = l > 0.0f ? 1.0f / l : 0.0f;
    uint16_t *y = static_cast<uint16_t *>(a.y) + place.row * a.y_stride + place.head * a.shape.head_dim;
    const bool aligned = (reinterpret_cast<uintptr_t>(y) & 3) == 0;
#pragma unroll
    for (int i = 0; i < D / 8; i++)
        if (8 * i < a.shape.head_dim) {
            const uint32_t pair = pack_act(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
            if (aligned) {
                *reinterpret_cast<uint32_t *>(y + 8 * i + column) = pair;
            } else {
                y[8 * i + column] = static_cast<uint16_t>(pair);
                y[8 * i + column + 1] = static_cast<uint16_t>(pair >> 16);
            }
        }
}

/* m, l and either o or, where the fold ends, the result. */
template <int D>
static __device__ __forceinline__ void store_row(const lr_cuda_fold &a,
                                                 const float (&o)[D / 2],
                                                 float m,
                                                 float l,
                                                 const row_place &place,
                                                 int64_t slot,
                                                 int r,
                                                 int column)
{
    if (place.position < 0)
        return;
    const int64_t at = (slot * a.n_rows + place.row) * a.shape.n_heads + place.head;
    if (column == 0) {
        a.m[at] = m;
        a.l[at] = l;
    }
    if (a.y != nullptr) {
        store_result<D>(a, o, l, place, r, column);
        return;
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++)
        if (8 * i < a.shape.head_dim)
            *reinterpret_cast<float2 *>(&a.o[at * a.shape.head_dim + 8 * i + column]) =
                make_float2(o[4 * i + 2 * r], o[4 * i + 2 * r + 1]);
}

} // namespace lr::LR_CUDA_ACT

#endif
