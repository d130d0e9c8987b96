/* Tensor maps: how the copy engine finds a box of a matrix in global memory. Host side; kernels/cuda/tma.cuh has the
 * instructions.
 *
 *   [batch, rows, columns] of 16 bits      box: 64 columns (128 bytes) x box_rows, in the 128-byte swizzle
 *
 * What a box holds beyond the matrix arrives as zeros. */
#ifndef LR_KERNELS_CUDA_TMA_H
#define LR_KERNELS_CUDA_TMA_H

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace lr
{

struct matrix_view {
    const void *data; /* 16-byte aligned */
    int64_t columns, rows, batch;
    int64_t row_bytes, batch_bytes; /* between two rows, two matrices; multiples of 16 */
};

/* Whether the copy engine can read it at all. */
bool tensor_map_possible(const matrix_view &view);

cudaError_t tensor_map_encode(CUtensorMap *map, const matrix_view &view, int box_rows);

} // namespace lr

#endif
