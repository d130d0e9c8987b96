/* What the GPU measurements share: memory filled with noise, the median of many runs between two events, the ceiling.
 * CUDA C++. */
#ifndef LR_BENCH_GPU_BENCH_H
#define LR_BENCH_GPU_BENCH_H

#include "kernels/cuda/backend.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.h"

#include <algorithm>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

namespace bench
{

static struct lr_exec exec;

static inline void need(enum lr_status status, const struct lr_error &err)
{
    if (status == LR_OK)
        return;
    printf("failed: %s\n", err.message);
    exit(1);
}

static inline cudaStream_t stream()
{
    return static_cast<cudaStream_t>(exec.stream);
}

static __global__ void fill_kernel(uint32_t *words, size_t n, uint32_t seed, int is_bf16)
{
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
         i += static_cast<size_t>(gridDim.x) * blockDim.x) {
        uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        const uint32_t bits = static_cast<uint32_t>(z >> 32); /* exponents 0x3c .. 0x3f: +-[2^-7, 2) */
        words[i] = is_bf16 ? (bits & 0x83ff83ffu) | 0x3c003c00u : (bits & 0x83ffffffu) | 0x3c000000u;
    }
}

/* Device memory of noise, bf16 or float32. */
static inline void *take(size_t size_bytes, bool is_bf16)
{
    static uint32_t seed = 1;
    struct lr_error err;
    void *base = nullptr;
    need(lr_cuda_memory.reserve(size_bytes, &base, &err), err);
    fill_kernel<<<2048, 256, 0, stream()>>>(static_cast<uint32_t *>(base), size_bytes / 4, seed++, is_bf16);
    return base;
}

/* Median of 21 runs, in milliseconds, after three that are not counted. */
template <class Run> static inline double median_ms(Run run)
{
    std::vector<float> times;
    cudaEvent_t start, end;
    cudaEventCreate(&start);
    cudaEventCreate(&end);
    for (int i = 0; i < 24; i++) {
        float ms = 0.0f;
        cudaEventRecord(start, stream());
        run();
        cudaEventRecord(end, stream());
        cudaEventSynchronize(end);
        cudaEventElapsedTime(&ms, start, end);
        if (i >= 3)
            times.push_back(ms);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

/* Bytes read and written a second by a large copy inside the device. */
static inline double copy_rate()
{
    const size_t size = static_cast<size_t>(2) << 30;
    void *from = take(size, true), *to = take(size, true);
    const double ms = median_ms([&] { lr_cuda_memory.copy(&exec, to, from, size); });
    lr_cuda_memory.release(from, size);
    lr_cuda_memory.release(to, size);
    return 2.0 * static_cast<double>(size) / ms * 1e3;
}

static inline void open()
{
    struct lr_error err;
    if (lr_cuda_device_count() == 0) {
        printf("no CUDA device\n");
        exit(77);
    }
    need(lr_cuda_device_open(0, &exec, &err), err);
}

} // namespace bench

#endif
