/* What the files of the matrix product share on the host's side.
 *
 *   gemm.cu, experts.cu    what the slots of the table ask for, as products        a, W, y, offsets
 *   gemm_wgmma.cu          the kernel for sm_90a                                   launch_product_wgmma
 *   gemm_mma.cu            the kernel for every device                             launch_product_mma
 *   gemm_plain.cu          for shapes that neither of them can read                launch_plain_product
 *
 * gemm_tiles.cuh (who computes what) and gemm_epilogue.cuh (what becomes of the sums) serve both kernels. */
#ifndef LR_KERNELS_CUDA_GEMM_H
#define LR_KERNELS_CUDA_GEMM_H

#include "kernels/cuda/act.h"
#include "kernels/cuda/tma.h"
#include "kernels/ops.h"

namespace lr::LR_CUDA_ACT
{

/* Elements between two rows of a packed weight: k rounded up to whole 16 bytes, which is what the copy engine and
 * 16-byte loads want. The elements behind k are zero. */
static inline int64_t weight_stride(int64_t k)
{
    return (k + 7) / 8 * 8;
}

static inline int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Whether y may be written in pieces of `piece` elements of `element_bytes`. */
static inline bool stores_are_wide(const void *y, int64_t y_stride, int64_t n, int piece, int element_bytes)
{
    return n % piece == 0 && y_stride % piece == 0 && reinterpret_cast<uintptr_t>(y) % (piece * element_bytes) == 0;
}

/* What y holds: activations, float32, or activations act(gate x) * (up x). */
enum class output_kind { ACT, F32, SWIGLU };

/* Where the sums go. */
struct product_output {
    void *y; /* [n_rows, n_columns] */
    int64_t y_stride;
    int n_columns;
    const float *bias; /* [n_columns] or NULL; not with SWIGLU */
    lr_activation activation;
    int accumulate;
};

/* The rows, cut into tiles of which none spans two experts: expert e has offsets[e] - offsets[0] ... offsets[e + 1] -
 * offsets[0]. offsets (device memory) NULL: one matrix, all the rows. */
struct product_rows {
    const int64_t *offsets;
    int64_t n_rows; /* with offsets: at most so many */
    int n_experts;
    int n_column_tiles; /* set by the launcher */
};

/* y (+)= act(a W^T + bias). a [n_rows, k], W [n_experts, n_columns, k]; SWIGLU: gate and up. Every view is
 * tensor_map_possible. general: an activation other than none (SWIGLU: than SiLU), activations that are accumulated, or
 * a y that cannot be written in pieces of 8 activations or of 2 floats. */
struct product {
    output_kind kind;
    bool general;
    product_rows rows;
    matrix_view a, b[2];
    product_output output;
};

/* Neither waits. A row's bits are the same for any number of rows; they differ between the two. */
cudaError_t launch_product_wgmma(const struct lr_exec *exec, const product &p);
cudaError_t launch_product_mma(const struct lr_exec *exec, const product &p);

/* With the kernel that the device takes. */
cudaError_t launch_product(const struct lr_exec *exec, const product &p);

/* The tiles of rows that there may be: every expert may end in one that is not full. */
static inline int64_t bound_row_tiles(const product_rows &rows, int tile_rows)
{
    return rows.n_rows / tile_rows + (rows.n_experts < rows.n_rows ? rows.n_experts : rows.n_rows);
}

/* For shapes that the copy engine cannot read: one warp an output element, the reduced dimension over its lanes. With
 * `up` it is the first half of SwiGLU; with `offsets` the weights are those of the row's expert, batch_elements apart.
 * Correct for everything, and slow. */
struct plain_params {
    const act *a;
    int64_t a_stride;
    const act *w, *up;
    int64_t w_stride, batch_elements;
    const int64_t *offsets;
    int64_t n_experts;
    int64_t n_rows, n, k;
    const float *bias;
    void *y;
    int64_t y_stride;
    lr_activation activation;
    int accumulate, wide;
};

cudaError_t launch_plain_product(cudaStream_t stream, const plain_params &p);

} // namespace lr::LR_CUDA_ACT

#endif
