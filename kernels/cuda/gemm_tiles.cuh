/* The tiles of a product, and the order in which the thread blocks of a persistent kernel take them:
 *
 *   expert 0 | expert 1 | ...     each: groups of GROUP tiles of rows; in a group, column after column, down its rows
 *
 * Device code only. */
#ifndef LR_KERNELS_CUDA_GEMM_TILES_CUH
#define LR_KERNELS_CUDA_GEMM_TILES_CUH

#include "kernels/cuda/gemm.h"

namespace lr::LR_CUDA_ACT
{

constexpr int GROUP = 16; /* row tiles that walk the columns together, so that both operands stay in L2 */

/* Where a tile lies. */
struct tile {
    int64_t row; /* its first row */
    int n_rows;
    int column_tile;
    int expert;
};

/* Finds tiles by their number, which must ascend from call to call. `before` [n_experts + 1]: row tiles in front of
 * each expert. */
template <int TILE_ROWS> struct tile_walk {
    product_rows rows;
    const int32_t *before;
    int expert;

    __device__ __forceinline__ bool find(int64_t number, tile &t)
    {
        const int n_column_tiles = rows.n_column_tiles;
        while (expert < rows.n_experts && number >= static_cast<int64_t>(before[expert + 1]) * n_column_tiles)
            expert++;
        if (expert == rows.n_experts)
            return false;
        const int n_row_tiles = before[expert + 1] - before[expert];
        const int local = static_cast<int>(number - static_cast<int64_t>(before[expert]) * n_column_tiles);
        const int group = local / (GROUP * n_column_tiles);
        const int in_group = local - group * GROUP * n_column_tiles;
        const int group_tiles = min(GROUP, n_row_tiles - group * GROUP);
        t.column_tile = in_group / group_tiles;
        const int row_tile = group * GROUP + in_group - t.column_tile * group_tiles;
        const int64_t *offsets = rows.offsets;
        const int64_t first = offsets != nullptr ? __ldg(offsets + expert) - __ldg(offsets) : 0;
        const int64_t end = offsets != nullptr ? __ldg(offsets + expert + 1) - __ldg(offsets) : rows.n_rows;
        t.row = first + static_cast<int64_t>(row_tile) * TILE_ROWS;
        t.n_rows = static_cast<int>(min(end - t.row, static_cast<int64_t>(TILE_ROWS)));
        t.expert = expert;
        return true;
    }
};

/* One warp: before[e] for all experts. */
template <int TILE_ROWS>
static __device__ __forceinline__ void count_tiles(const product_rows &p, int32_t *before)
{
    const int lane = threadIdx.x % 32;
    int total = 0;
    for (int base = 0; base < p.n_experts; base += 32) {
        const int e = base + lane;
        int64_t n_rows = 0;
        if (e < p.n_experts)
            n_rows = p.offsets != nullptr ? p.offsets[e + 1] - p.offsets[e] : p.n_rows;
        int sum = static_cast<int>((n_rows + TILE_ROWS - 1) / TILE_ROWS);
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, step);
            sum += lane >= step ? other : 0;
        }
        if (e < p.n_experts)
            before[e + 1] = total + sum;
        total += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0)
        before[0] = 0;
}

} // namespace lr::LR_CUDA_ACT

#endif
