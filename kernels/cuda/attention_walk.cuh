/* The producer's side of attention: one warp walks a list, leaves out the blocks that no row of the tile sees, and brings
 * the others' K and V into the ring of stages by bulk copies.
 *
 *   list     | sinks |   not seen   |  window .......... diagonal |  not seen
 *   steps    0 1                     2 3 4 ...                  n  end
 *
 * A step is KEYS keys of a block: the whole block, or a half of it where a head has 256 channels. With its keys comes a
 * note for the consumers: where the keys begin, how many exist, and whether every row of the tile sees all of them. */
#ifndef LR_KERNELS_CUDA_ATTENTION_WALK_CUH
#define LR_KERNELS_CUDA_ATTENTION_WALK_CUH

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_mma.cuh"

namespace lr
{

constexpr int BLOCK = LR_KV_BLOCK_TOKENS;
constexpr int UNIT = 64; /* tile rows of a consumer warpgroup */
constexpr int WARPGROUP = 128;

/* D channels, C consumer warpgroups. */
template <int D, int C> struct tile_shape {
    static constexpr int KEYS = D == 256 ? 64 : BLOCK;
    static constexpr int PANELS = D / 64;
    static constexpr int ROWS = C * UNIT;
    static constexpr int HALF_BYTES = KEYS * D * 2; /* K or V of a step */
    static constexpr int STAGES = D == 64 ? (C == 1 ? 3 : 4) : D == 256 && C == 2 ? 2 : 3;
    static constexpr int THREADS = (C + 1) * WARPGROUP;
    static constexpr int BLOCKS_EACH = D == 64 && C == 1 ? 2 : 1; /* thread blocks on a multiprocessor */
};

enum { STEP_WHOLE = 1, STEP_FULL = 2 };

struct alignas(16) step_note {
    int64_t position; /* of the step's first key */
    int32_t n_keys;   /* 0: the list is at its end */
    int32_t flags;    /* STEP_WHOLE: seen by the window's rule; STEP_FULL: nothing to mask */
};

template <int D, int C> struct attention_shared {
    using shape = tile_shape<D, C>;
    alignas(1024) uint8_t q[shape::ROWS * D * 2];
    alignas(1024) uint8_t k[shape::STAGES][shape::HALF_BYTES];
    alignas(1024) uint8_t v[shape::STAGES][shape::HALF_BYTES];
    step_note notes[shape::STAGES];
    uint64_t k_full[shape::STAGES], v_full[shape::STAGES], k_empty[shape::STAGES], v_empty[shape::STAGES];
};

/* A tile's list, and the bounds of its rows' positions. */
struct walk {
    const lr_kv_ref *refs;
    int n_refs;
    int jump; /* index of the first block in reach of the window; 0 where it is not known */
    int64_t first_position, last_position;
    int64_t window, sinks;
};

static __device__ __forceinline__ walk make_walk(const lr_cuda_fold &a, const lr_cuda_list &list, int64_t first_position,
                                                 int64_t last_position)
{
    walk w = {list.refs, list.n_refs, 0, first_position, last_position, a.window, a.sinks};
    if (list.dense && a.window > 0 && list.n_refs > 0) {
        const int64_t reach = first_position - a.window + 1 - list.refs[0].position;
        w.jump = reach > 0 ? static_cast<int>(reach / BLOCK) : 0;
    }
    return w;
}

/* Some row of the tile may see some key of the block. */
static __device__ __forceinline__ bool sees(const walk &w, const lr_kv_ref &ref)
{
    if (ref.position > w.last_position)
        return false;
    if (w.window == 0 || ref.whole || ref.position < w.sinks)
        return true;
    return ref.position + ref.n_keys > w.first_position - w.window + 1;
}

/* Every row of the tile sees every one of the step's keys, and none is missing. */
static __device__ __forceinline__ bool sees_all(const walk &w, const step_note &note, int keys)
{
    const int64_t end = note.position + keys;
    if (note.n_keys < keys || end - 1 > w.first_position)
        return false;
    if (w.window == 0 || (note.flags & STEP_WHOLE) || end <= w.sinks)
        return true;
    return w.last_position - note.position < w.window;
}

template <int D, int C> struct producer {
    using shape = tile_shape<D, C>;
    attention_shared<D, C> &s;
    uint32_t step;

    /* One lane. `data`: K of the KV head in its block; `first`: the step's first key there. */
    __device__ __forceinline__ void push(const uint8_t *data, const step_note &note, int first)
    {
        constexpr int PANEL = BLOCK * 128, PIECE = shape::KEYS * 128;
        const uint32_t stage = step % shape::STAGES, parity = (step / shape::STAGES & 1u) ^ 1u;
        barrier_wait(&s.k_empty[stage], parity);
        s.notes[stage] = note;
        barrier_expect(&s.k_full[stage], shape::HALF_BYTES);
        if constexpr (shape::KEYS == BLOCK)
            copy_bulk(s.k[stage], data, shape::HALF_BYTES, &s.k_full[stage]);
        else
            for (int p = 0; p < shape::PANELS; p++)
                copy_bulk(s.k[stage] + p * PIECE, data + p * PANEL + first * 128, PIECE, &s.k_full[stage]);
        barrier_wait(&s.v_empty[stage], parity);
        barrier_expect(&s.v_full[stage], shape::HALF_BYTES);
        data += shape::PANELS * PANEL;
        if constexpr (shape::KEYS == BLOCK)
            copy_bulk(s.v[stage], data, shape::HALF_BYTES, &s.v_full[stage]);
        else
            for (int p = 0; p < shape::PANELS; p++)
                copy_bulk(s.v[stage] + p * PIECE, data + p * PANEL + first * 128, PIECE, &s.v_full[stage]);
        step++;
    }

    __device__ __forceinline__ void push_block(const walk &w, const uint8_t *data, int64_t position, int n_keys, int whole)
    {
        for (int first = 0; first < BLOCK; first += shape::KEYS) {
            step_note note = {position + first, n_keys - first < shape::KEYS ? n_keys - first : shape::KEYS,
                              whole ? STEP_WHOLE : 0};
            if (note.n_keys <= 0 || note.position > w.last_position)
                break;
            if (sees_all(w, note, shape::KEYS))
                note.flags |= STEP_FULL;
            push(data, note, first);
        }
    }

    /* The whole warp: 32 blocks are looked at together, and the next 32 are on their way meanwhile. */
    __device__ __forceinline__ void run(const walk &w, int kv_head)
    {
        const int lane = threadIdx.x % 32;
        const int64_t head_offset = static_cast<int64_t>(kv_head) * 4 * BLOCK * D;
        lr_kv_ref next = {};
        if (lane < w.n_refs)
            next = w.refs[lane];
        const int64_t list_position = __shfl_sync(0xffffffffu, next.position, 0);
        for (int i = 0; i < w.n_refs;) {
            const lr_kv_ref ref = next;
            const bool there = i + lane < w.n_refs;
            uint32_t wanted = __ballot_sync(0xffffffffu, there && sees(w, ref));
            int following = i + 32;
            if (following < w.jump && list_position + static_cast<int64_t>(following) * BLOCK >= w.sinks)
                following = w.jump;
            if (__any_sync(0xffffffffu, there && ref.position > w.last_position))
                following = w.n_refs;
            if (following + lane < w.n_refs)
                next = w.refs[following + lane];
            while (wanted != 0) {
                const int source = __ffs(static_cast<int>(wanted)) - 1;
                wanted &= wanted - 1;
                const uint64_t data = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(ref.data), source);
                const int64_t position = __shfl_sync(0xffffffffu, ref.position, source);
                const int n_keys = __shfl_sync(0xffffffffu, ref.n_keys, source);
                const int whole = __shfl_sync(0xffffffffu, ref.whole, source);
                if (lane == 0)
                    push_block(w, reinterpret_cast<const uint8_t *>(data) + head_offset, position, n_keys, whole);
            }
            i = following;
        }
        if (lane == 0) {
            const uint32_t stage = step % shape::STAGES;
            barrier_wait(&s.k_empty[stage], (step / shape::STAGES & 1u) ^ 1u);
            s.notes[stage] = step_note{0, 0, 0};
            barrier_arrive(&s.k_full[stage]);
        }
    }
};

} // namespace lr

#endif
