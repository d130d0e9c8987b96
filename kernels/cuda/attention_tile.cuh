/* Which rows a tile of attention has, which blocks of its list some row of it sees, and the rules of the fold that the
 * kernels for Hopper and the portable ones have in common.
 *
 *   list     | sinks |   not seen   |  window .......... diagonal |  not seen
 *
 * Device code only. */
#ifndef LR_KERNELS_CUDA_ATTENTION_TILE_CUH
#define LR_KERNELS_CUDA_ATTENTION_TILE_CUH

#include "kernels/cuda/attention.h"

namespace lr::LR_CUDA_ACT
{

constexpr int BLOCK = LR_KV_BLOCK_TOKENS;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float MAX_TRAIL = 8.0f; /* the weights are at most 2^8 */

enum { STEP_WHOLE = 1, STEP_FULL = 2, STEP_LAST = 4 };

struct alignas(16) step_note {
    int64_t position; /* of the step's first key */
    int32_t n_keys;
    int32_t flags; /* WHOLE: seen by the window's rule; FULL: nothing to mask; LAST: of the tile */
};

/* One tile of a launch: rows of one group, one KV head. */
struct tile {
    lr_cuda_rows rows;
    int kv_head;
    int row;             /* tile row 0 is row `row` of the group, counted in query heads */
    int64_t first, last; /* its rows of q */
};

/* The tiles with the most work first, as a causal document's last ones have: thread blocks that take them in this order
 * end together. Of one list, the KV heads of a tile follow each other; of many lists, the tiles that read
 * the same one do, so that its blocks are in L2. False where no row is in the tile. */
static __device__ __forceinline__ bool
take_tile(const lr_cuda_fold &a, int group, int n_tiles, int tile_rows, int work, tile &t)
{
    const int n_kv_heads = static_cast<int>(a.shape.n_kv_heads), n_each = n_kv_heads * n_tiles;
    const int of_group = work % n_each, tile_number = a.n_groups == 1 ? of_group / n_kv_heads : of_group % n_tiles;
    t.kv_head = a.n_groups == 1 ? of_group % n_kv_heads : of_group / n_tiles;
    t.rows = a.rows[a.n_groups - 1 - work / n_each];
    t.row = (n_tiles - 1 - tile_number) * tile_rows;
    t.first = t.rows.origin + t.row / group;
    t.last = t.rows.origin + (t.row + tile_rows - 1) / group;
    t.first = t.first > t.rows.first ? t.first : t.rows.first;
    t.last = t.last < t.rows.end ? t.last : t.rows.end - 1;
    return t.first <= t.last;
}

/* A tile row: a row of q and its head. */
struct row_place {
    int64_t row;
    int64_t position; /* -1: no such row */
    int head;
};

static __device__ __forceinline__ row_place place_row(const lr_cuda_fold &a, const tile &t, int group, int tile_row)
{
    row_place p;
    const int token = (t.row + tile_row) / group;
    p.head = t.kv_head * group + t.row + tile_row - token * group;
    p.row = t.rows.origin + token;
    if (p.row < t.rows.first || p.row >= t.rows.end)
        p.position = -1;
    else
        p.position = a.positions != nullptr ? a.positions[p.row] : a.position + p.row;
    return p;
}

/* A tile's list, and the bounds of its rows' positions. */
struct walk {
    const lr_kv_ref *refs;
    int n_refs;
    int jump;      /* index of the first block in reach of the window; 0 where it is not known */
    int64_t start; /* the list's first position */
    int64_t first_position, last_position;
    int64_t window, sinks;
};

static __device__ __forceinline__ walk make_walk(const lr_cuda_fold &a, const tile &t)
{
    const lr_cuda_list list = a.lists[t.rows.list + t.kv_head * t.rows.list_step];
    const uint64_t refs = list.refs + (list.relative ? reinterpret_cast<uint64_t>(a.packet) : 0);
    walk w = {reinterpret_cast<const lr_kv_ref *>(refs),
              list.n_refs,
              0,
              0,
              a.position + t.first,
              a.position + t.last,
              a.window,
              a.sinks};
    if (a.positions != nullptr) {
        w.first_position = t.rows.first_position;
        w.last_position = t.rows.last_position;
    }
    if (list.dense && a.window > 0 && list.n_refs > 0) {
        w.start = w.refs[0].position;
        const int64_t reach = w.first_position - a.window + 1 - w.start;
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

static __device__ __forceinline__ int clamp_key(int64_t key)
{
    return key < 0 ? 0 : key > BLOCK ? BLOCK : static_cast<int>(key);
}

} // namespace lr::LR_CUDA_ACT

#endif
