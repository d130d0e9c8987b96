/* Encoding of tensor maps through the driver's entry point: the library need not link against the driver. */
#include "kernels/cuda/tma.h"

#include <cuda_runtime.h>

namespace lr
{

constexpr uint32_t BOX_COLUMNS = 64;

typedef CUresult encode_function(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static encode_function *find_encode()
{
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<encode_function *>(entry)
                                                                         : nullptr;
}

bool tensor_map_possible(const matrix_view &view)
{
    constexpr int64_t MAX_STRIDE = INT64_C(1) << 40;
    const auto fits = [](int64_t bytes) { return bytes > 0 && bytes % 16 == 0 && bytes < MAX_STRIDE; };
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && fits(view.row_bytes) && fits(view.batch_bytes) &&
           view.rows <= INT32_MAX;
}

cudaError_t tensor_map_encode(CUtensorMap *map, const matrix_view &view, int box_rows)
{
    static encode_function *const encode = find_encode();
    if (encode == nullptr)
        return cudaErrorNotSupported;
    const cuuint64_t dims[3] = {static_cast<cuuint64_t>(view.columns), static_cast<cuuint64_t>(view.rows),
                                static_cast<cuuint64_t>(view.batch)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(view.row_bytes), static_cast<cuuint64_t>(view.batch_bytes)};
    const cuuint32_t box[3] = {BOX_COLUMNS, static_cast<cuuint32_t>(box_rows), 1};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void *>(view.data), dims,
                                   strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

} // namespace lr
