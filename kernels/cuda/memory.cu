/* The device's memory as the table offers it. Large uploads and downloads go through pinned memory in pieces, the
 * host's copy of one piece beside the bus's copy of another:
 *
 *   upload     host --memcpy--> ring (pinned) --bus--> device
 *   download   device --bus--> landing (pinned, two halves) --memcpy--> host */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/device.h"

#include <cuda_runtime.h>
#include <string.h>

namespace
{

constexpr size_t PIECE_BYTES = 4u << 20;
constexpr double GIB = 1073741824.0;

static_assert(PIECE_BYTES <= LR_CUDA_MAX_UPLOAD_BYTES && 2 * PIECE_BYTES <= LR_CUDA_LANDING_BYTES, "pieces fit");

cudaStream_t stream_of(const struct lr_exec *exec)
{
    return static_cast<cudaStream_t>(exec->stream);
}

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

void copy(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes)
{
    lr_cuda_note(exec, cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDeviceToDevice, stream_of(exec)), "copy");
}

void zero(const struct lr_exec *exec, void *to, size_t size_bytes)
{
    lr_cuda_note(exec, cudaMemsetAsync(to, 0, size_bytes, stream_of(exec)), "zero");
}

void upload(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes)
{
    for (size_t at = 0; at < size_bytes; at += PIECE_BYTES) {
        const size_t n = size_bytes - at < PIECE_BYTES ? size_bytes - at : PIECE_BYTES;
        const struct lr_cuda_space space = lr_cuda_ring_take(exec, n);
        memcpy(space.pinned, static_cast<const char *>(from) + at, n);
        lr_cuda_note(
            exec,
            cudaMemcpyAsync(static_cast<char *>(to) + at, space.pinned, n, cudaMemcpyHostToDevice, stream_of(exec)),
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
                                         cudaMemcpyDeviceToHost, stream_of(exec)),
                         "download");
        if (arrived > 0)
            memcpy(static_cast<char *>(to) + previous, landing + (piece + 1) % 2 * PIECE_BYTES, arrived);
        previous = at;
        at += n;
        LR_TRY(lr_cuda_drain(exec, err));
    }
    return LR_OK;
}

/* n_rows x n_words words of the widest size that all addresses, strides and the row's length are multiples of. */
template <class Word>
__global__ void
copy_rows_kernel(Word *to, int64_t to_stride, const Word *from, int64_t from_stride, int64_t n_words, int64_t n_all)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n_all; i += step) {
        const int64_t row = i / n_words, word = i - row * n_words;
        to[row * to_stride + word] = from[row * from_stride + word];
    }
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
    constexpr int64_t n_threads = 256;
    const int64_t n_words = static_cast<int64_t>(row_bytes / size), n_all = n_words * n_rows;
    const int64_t n_blocks = (n_all + n_threads - 1) / n_threads, most = 16 * lr_cuda_multiprocessors(exec);
    copy_rows_kernel<Word><<<static_cast<unsigned>(n_blocks < most ? n_blocks : most), n_threads, 0, stream_of(exec)>>>(
        static_cast<Word *>(to), static_cast<int64_t>(to_stride / size), static_cast<const Word *>(from),
        static_cast<int64_t>(from_stride / size), n_words, n_all);
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

const struct lr_memory_ops lr_cuda_memory = {reserve, release, available, copy,         copy_rows,
                                             zero,    upload,  download,  lr_cuda_drain};
