/* What the tests of the dense layers and of the experts share: numbers that activations hold exactly, copies on both
 * sides, the CPU layout for the float64 truth, and the two questions - how far from the truth, and are the bytes the same? */
#ifndef LR_TESTS_KERNELS_CUDA_TEST_GEMM_H
#define LR_TESTS_KERNELS_CUDA_TEST_GEMM_H

#include "kernels/cuda/backend.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.h"
#include "tests/kernels/cuda/short.h"
extern "C" {
#include "kernels/ref.h"
}

#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

static int n_failed;
static struct lr_exec exec;

static inline void check_cuda(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return;
    printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

static inline void wait_device(const char *what)
{
    check_cuda(cudaGetLastError(), what);
    check_cuda(cudaDeviceSynchronize(), what);
}

/* splitmix64 */
static inline uint64_t next_bits(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline float next_float(uint64_t *seed)
{
    return static_cast<float>(static_cast<int64_t>(next_bits(seed) >> 40)) * 0x1p-23f - 1.0f;
}

static inline uint16_t to_half(float x)
{
    const lr::act value = lr::to_act(x);
    uint16_t bits;
    memcpy(&bits, &value, 2);
    return bits;
}

static inline float from_half(uint16_t bits)
{
    lr::act value;
    memcpy(static_cast<void *>(&value), &bits, 2);
    return lr::from_act(value);
}

/* n numbers in [-size, size) that the activation type holds exactly. */
static inline std::vector<float> take_numbers(int64_t n, float size, uint64_t *seed)
{
    std::vector<float> x(static_cast<size_t>(n));
    for (float &v : x)
        v = from_half(to_half(size * next_float(seed)));
    return x;
}

static inline std::vector<uint16_t> narrow(const std::vector<float> &x)
{
    std::vector<uint16_t> y(x.size());
    for (size_t i = 0; i < x.size(); i++)
        y[i] = to_half(x[i]);
    return y;
}

static inline std::vector<float> widen(const std::vector<uint16_t> &x)
{
    std::vector<float> y(x.size());
    for (size_t i = 0; i < x.size(); i++)
        y[i] = from_half(x[i]);
    return y;
}

/* Device memory for n elements. */
template <class T> struct device_array {
    T *data = nullptr;
    size_t n = 0;

    /* All bits set: a NaN shows where an output is not written. */
    explicit device_array(size_t count) : n(count)
    {
        check_cuda(cudaMalloc(reinterpret_cast<void **>(&data), (count ? count : 1) * sizeof(T)), "memory");
        poison();
    }
    explicit device_array(const std::vector<T> &host) : device_array(host.size())
    {
        put(host);
    }
    device_array(const device_array &) = delete;
    device_array &operator=(const device_array &) = delete;
    ~device_array()
    {
        cudaFree(data);
    }
    /* The slots' stream waits for neither: memory of the device may be set, and pageable memory of the host be on its
     * way, when the call returns. */
    void poison()
    {
        check_cuda(cudaMemset(data, 0xff, n * sizeof(T)), "poison");
        check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "poison");
    }
    void put(const std::vector<T> &host)
    {
        check_cuda(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
        check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "copy");
    }
    std::vector<T> get() const
    {
        std::vector<T> host(n);
        check_cuda(cudaMemcpy(host.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost), "copy");
        return host;
    }
};

/* W [n, k] row-major in the CPU backend's panels. */
static inline std::vector<float> cpu_panels(const float *rows, int64_t n, int64_t k)
{
    std::vector<float> panels(static_cast<size_t>((n + 15) / 16 * 16 * k));
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < k; i++)
            panels[static_cast<size_t>((j / 16 * k + i) * 16 + j % 16)] = rows[j * k + i];
    return panels;
}

/* ||got - truth|| / ||truth||; NaN where one of them is. */
static inline double distance_from(const std::vector<float> &got, const std::vector<double> &truth)
{
    double difference = 0.0, size = 0.0;
    for (size_t i = 0; i < truth.size(); i++) {
        difference += (got[i] - truth[i]) * (got[i] - truth[i]);
        size += truth[i] * truth[i];
    }
    return sqrt(difference / (size > 0.0 ? size : 1.0));
}

static inline void check_distance(const char *name, double distance, double allowed)
{
    const bool good = distance <= allowed;
    n_failed += !good;
    if (!good)
        printf("FAIL %s: off by %.3g, allowed %.3g\n", name, distance, allowed);
}

static inline void check_true(const char *name, bool good)
{
    n_failed += !good;
    if (!good)
        printf("FAIL %s\n", name);
}

static inline void open_device()
{
    const struct lr_kernel_ops *ops = nullptr;
    struct lr_error err;
    if (lr_kernels_cuda_open(0, LR_CUDA_DTYPE, &ops, &exec, &err) != LR_OK) {
        printf("no device: %s\n", err.message);
        exit(77); /* skipped */
    }
    if (test_is_short())
        lr_cuda_pretend_multiprocessors(&exec, SHORT_MULTIPROCESSORS);
}

static inline int close_device(const char *name)
{
    lr_kernels_cuda_close(&exec);
    printf("%s: %s\n", name, n_failed ? "FAILED" : "ok");
    return n_failed != 0;
}

#endif
