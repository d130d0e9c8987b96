/* The device's memory as the table offers it. Large uploads and downloads go through pinned memory in pieces, the
 * host's copy of one piece beside the bus's copy of another:
 *
 *   upload     host --memcpy--> ring (pinned) --bus--> device
 *   download   device --bus--> landing (pinned, two halves) --memcpy--> host */
#include "base/memory.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/rows.cuh"

#include <cuda_runtime.h>
#include <string.h>

namespace
{

constexpr size_t PIECE_BYTES = 4u << 20;
constexpr double GIB = 1073741824.0;

static_assert(PIECE_BYTES <= LR_CUDA_MAX_UPLOAD_BYTES && 2 * PIECE_BYTES <= LR_CUDA_LANDING_BYTES, "pieces fit");

enum lr_status reserve(size_t size_bytes, void **out, struct lr_error *err)
{
    void *base = nullptr;
    cudaError_t error = cudaMalloc(&base, size_bytes > 0 ? size_bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total_bytes = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&free_bytes, &total_bytes);
        return lr_fail(err, LR_NO_MEMORY, "%.2f GiB of GPU memory wanted, %.2f of %.2f GiB are free",
                       static_cast<double>(size_bytes) / GIB, static_cast<double>(free_bytes) / GIB,
                       static_cast<double>(total_bytes) / GIB);
    }
    if (error == cudaSuccess)
        error = cudaMemset(base, 0, size_bytes);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(cudaStreamLegacy); /* our stream does not wait for that one by itself */
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        (void)cudaFree(base);
        return lr_fail(err, LR_INTERNAL, "reserving GPU memory: %s", cudaGetErrorString(error));
    }
    *out = base;
    return LR_OK;
}

void release(void *base, size_t size_bytes)
{
    (void)size_bytes;
    (void)cudaFree(base);
    (void)cudaGetLastError();
}

size_t available()
{
    size_t free_bytes = 0, total_bytes = 0;
    if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess)
        free_bytes = 0;
    (void)cudaGetLastError();
    return free_bytes;
}

enum lr_status reserve_host(size_t size_bytes, void **out, struct lr_error *err)
{
    void *base = nullptr;
    const cudaError_t error = cudaHostAlloc(&base, size_bytes > 0 ? size_bytes : 1, cudaHostAllocDefault);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        return lr_fail(err, error == cudaErrorMemoryAllocation ? LR_NO_MEMORY : LR_INTERNAL,
                       "%.2f GiB of host memory could not be pinned, %.2f GiB are free: %s",
                       static_cast<double>(size_bytes) / GIB, static_cast<double>(lr_memory_available()) / GIB,
                       cudaGetErrorString(error));
    }
    *out = base;
    return LR_OK;
}

void release_host(void *base, size_t size_bytes)
{
    (void)size_bytes;
    (void)cudaDeviceSynchronize();
    (void)cudaFreeHost(base);
    (void)cudaGetLastError();
}

void copy(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes)
{
    lr_cuda_note(exec, cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDefault, lr::stream_of(exec)), "copy");
}

void copy_aside(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes)
{
    const cudaStream_t aside = static_cast<cudaStream_t>(lr_cuda_lane(exec, LR_LANE_ASIDE));
    lr_cuda_note(exec, cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDefault, aside), "copy_aside");
}

void zero(const struct lr_exec *exec, void *to, size_t size_bytes)
{
    lr_cuda_note(exec, cudaMemsetAsync(to, 0, size_bytes, lr::stream_of(exec)), "zero");
}

void upload(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes)
{
    for (size_t at = 0; at < size_bytes; at += PIECE_BYTES) {
        const size_t n = size_bytes - at < PIECE_BYTES ? size_bytes - at : PIECE_BYTES;
        const struct lr_cuda_space space = lr_cuda_ring_take(exec, n);
        memcpy(space.pinned, static_cast<const char *>(from) + at, n);
        lr_cuda_note(
            exec,
            cudaMemcpyAsync(static_cast<char *>(to) + at, space.pinned, n, cudaMemcpyHostToDevice, lr::stream_of(exec)),
            "upload");
    }
}

/* Everything launched before is waited for first: the copies then run on an idle stream, and `idle` had its turn. */
enum lr_status download(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    char *landing = static_cast<char *>(lr_cuda_landing(exec));
    size_t previous = 0;
    LR_TRY(lr_cuda_drain(exec, err));
    for (size_t at = 0, piece = 0; previous < size_bytes; piece++) {
        const size_t n = size_bytes - at < PIECE_BYTES ? size_bytes - at : PIECE_BYTES;
        const size_t arrived = at - previous;
        if (n > 0)
            lr_cuda_note(exec,
                         cudaMemcpyAsync(landing + piece % 2 * PIECE_BYTES, static_cast<const char *>(from) + at, n,
                                         cudaMemcpyDeviceToHost, lr::stream_of(exec)),
                         "download");
        if (arrived > 0)
            memcpy(static_cast<char *>(to) + previous, landing + (piece + 1) % 2 * PIECE_BYTES, arrived);
        previous = at;
        at += n;
        LR_TRY(lr_cuda_drain(exec, err));
    }
    return LR_OK;
}

/* Rows of words of the widest size that all addresses, strides and the row's length are multiples of. */
template <class Word>
__global__ void __launch_bounds__(lr::ROW_THREADS) copy_rows_kernel(
    Word *to, int64_t to_stride, const Word *from, int64_t from_stride, struct lr::divider n_words, uint32_t n_all)
{
    const uint32_t at = blockIdx.x * lr::ROW_THREADS + threadIdx.x;
    if (at >= n_all)
        return;
    const uint32_t row = n_words.of(at), word = at - row * n_words.d;
    to[row * to_stride + word] = from[row * from_stride + word];
}

template <class Word>
void copy_rows_of(const struct lr_exec *exec,
                  void *to,
                  size_t to_stride,
                  const void *from,
                  size_t from_stride,
                  size_t row_bytes,
                  int64_t n_rows)
{
    constexpr size_t size = sizeof(Word);
    const int64_t n_words = static_cast<int64_t>(row_bytes / size);
    lr::for_row_slices(n_rows, n_words, [&](int64_t first, int64_t n) {
        Word *to_row = reinterpret_cast<Word *>(static_cast<char *>(to) + static_cast<size_t>(first) * to_stride);
        const Word *from_row =
            reinterpret_cast<const Word *>(static_cast<const char *>(from) + static_cast<size_t>(first) * from_stride);
        const uint32_t n_all = static_cast<uint32_t>(n * n_words);
        copy_rows_kernel<Word><<<lr::blocks_for(n_all, lr::ROW_THREADS), lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(
            to_row, static_cast<int64_t>(to_stride / size), from_row, static_cast<int64_t>(from_stride / size),
            lr::divider_by(n_words), n_all);
    });
}

void copy_rows(const struct lr_exec *exec,
               void *to,
               size_t to_stride,
               const void *from,
               size_t from_stride,
               size_t row_bytes,
               int64_t n_rows)
{
    if (row_bytes == 0 || n_rows <= 0)
        return;
    const size_t bits =
        reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | to_stride | from_stride | row_bytes;
    if (bits % 16 == 0)
        copy_rows_of<uint4>(exec, to, to_stride, from, from_stride, row_bytes, n_rows);
    else if (bits % 4 == 0)
        copy_rows_of<uint32_t>(exec, to, to_stride, from, from_stride, row_bytes, n_rows);
    else if (bits % 2 == 0)
        copy_rows_of<uint16_t>(exec, to, to_stride, from, from_stride, row_bytes, n_rows);
    else
        copy_rows_of<uint8_t>(exec, to, to_stride, from, from_stride, row_bytes, n_rows);
    lr_cuda_note(exec, cudaGetLastError(), "copy_rows");
}

} // namespace

const struct lr_memory_ops lr_cuda_memory = {
    reserve, release, available, reserve_host,  release_host, lr_memory_available, copy,         copy_rows,
    zero,    upload,  download,  lr_cuda_drain, copy_aside,   lr_cuda_mark,        lr_cuda_await};
