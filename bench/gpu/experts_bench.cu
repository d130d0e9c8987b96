/* Times of the dense product, of the experts and of what routes between them, on one GPU. Each row of the output is
 *
 *   name  milliseconds  flops  bytes
 *
 * with the fewest bytes that the work can move. On a GPU with two sets of kernels the products of the portable ones
 * follow, as mma_NAME. experts_peers.py reads it and puts PyTorch's times beside it. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cuda.h"

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

static struct lr_exec exec;

static void check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

static __device__ uint32_t hash(uint64_t i)
{
    i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9u;
    i = (i ^ i >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(i >> 32);
}

/* About normal: the sum of four uniform numbers. */
static __global__ void fill_kernel(lr::act *x, int64_t n, float size, uint64_t seed)
{
    for (int64_t i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL) {
        float sum = 0.0f;
        for (int j = 0; j < 4; j++)
            sum += static_cast<float>(hash(seed + 4 * i + j) >> 8) * 0x1p-24f - 0.5f;
        x[i] = lr::to_act(sum * size * 1.7f);
    }
}

static void *reserve(int64_t n_bytes)
{
    void *data;
    check(cudaMalloc(&data, static_cast<size_t>(n_bytes)), "memory");
    return data;
}

static lr::act *take(int64_t n, float size)
{
    static uint64_t seed;
    lr::act *x = static_cast<lr::act *>(reserve(n * 2));
    fill_kernel<<<1024, 256>>>(x, n, size, seed += 1ull << 40);
    check(cudaDeviceSynchronize(), "fill");
    return x;
}

/* The median of `n` runs after a warm-up; small work is repeated between the events. */
template <class Run> static double median_ms(Run run)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(exec.stream);
    cudaEvent_t start, stop;
    check(cudaEventCreate(&start), "event");
    check(cudaEventCreate(&stop), "event");
    const auto timed = [&](int repeats) {
        float ms;
        check(cudaEventRecord(start, stream), "event");
        for (int i = 0; i < repeats; i++)
            run();
        check(cudaEventRecord(stop, stream), "event");
        check(cudaEventSynchronize(stop), "event");
        check(cudaEventElapsedTime(&ms, start, stop), "event");
        return static_cast<double>(ms) / repeats;
    };
    timed(3);
    const double first = timed(3);
    const int repeats = std::max(1, static_cast<int>(0.4 / first));
    std::vector<double> times;
    for (int i = 0; i < 25; i++)
        times.push_back(timed(repeats));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

static void report(const char *name, double ms, double flops, double bytes)
{
    printf("%s%-44s %9.4f %.4e %.4e\n", lr_cuda_hopper_kernels(&exec) ? "" : "mma_", name, ms, flops, bytes);
    fflush(stdout);
}

static void time_gemm(int64_t m, int64_t n, int64_t k, int wide, int accumulate)
{
    const size_t y_bytes = static_cast<size_t>(m * n) * (wide ? 4 : 2);
    struct lr_weight w = {LR_CUDA_DTYPE, n, k, take(n * k, 1.0f / sqrtf(static_cast<float>(k))),
                          LR_CUDA(weight_bytes)(n, k, LR_CUDA_DTYPE)};
    lr::act *a = take(m * k, 1.0f);
    void *y = reserve(static_cast<int64_t>(y_bytes));
    check(cudaMemset(y, 0, y_bytes), "zero");
    struct lr_gemm_args args = {};
    args.a = a;
    args.a_stride = k;
    args.w = &w;
    args.y = y;
    args.y_stride = n;
    args.n_rows = m;
    args.wide = wide;
    args.accumulate = accumulate;
    char name[64];
    snprintf(name, sizeof name, "gemm_%lld_%lld_%lld_%s%s", (long long)m, (long long)n, (long long)k,
             wide ? "f32" : "bf16", accumulate ? "_add" : "");
    const double ms = median_ms([&] { LR_CUDA(gemm)(&exec, &args); });
    report(name, ms, 2.0 * static_cast<double>(m * n) * static_cast<double>(k),
           2.0 * static_cast<double>(m * k + n * k) + static_cast<double>(y_bytes) * (accumulate ? 2 : 1));
    cudaFree(w.data);
    cudaFree(a);
    cudaFree(y);
}

/* The whole block but for its two dense products: route, sort, gather, experts, combine. */
static void time_experts(int64_t n_tokens, int64_t n_experts, int64_t top_k, int64_t d, int64_t ffn)
{
    const int64_t m = n_tokens * top_k, size = ffn * d;
    lr::act *weights[3];
    std::vector<struct lr_weight> w[3];
    for (int i = 0; i < 3; i++) {
        weights[i] = take(n_experts * size, 1.0f / sqrtf(static_cast<float>(d)));
        for (int64_t e = 0; e < n_experts; e++)
            w[i].push_back({LR_CUDA_DTYPE, i < 2 ? ffn : d, i < 2 ? d : ffn, weights[i] + e * size,
                            static_cast<size_t>(size) * 2});
    }
    std::vector<float> host_logits(static_cast<size_t>(n_tokens * n_experts));
    for (float &x : host_logits)
        x = static_cast<float>(rand()) / static_cast<float>(RAND_MAX);
    float *logits = static_cast<float *>(reserve(n_tokens * n_experts * 4)), *p = static_cast<float *>(reserve(m * 4));
    check(cudaMemcpy(logits, host_logits.data(), host_logits.size() * 4, cudaMemcpyHostToDevice), "copy");
    int32_t *ids = static_cast<int32_t *>(reserve(m * 4));
    int64_t *offsets = static_cast<int64_t *>(reserve((n_experts + 1) * 8));
    int64_t *order = static_cast<int64_t *>(reserve(m * 8)), *row_of = static_cast<int64_t *>(reserve(m * 8));
    lr::act *tokens = take(n_tokens * d, 1.0f), *x = take(m * d, 1.0f), *hidden = take(m * ffn, 1.0f);
    lr::act *y = take(m * d, 1.0f);
    float *residual = static_cast<float *>(reserve(n_tokens * d * 4));
    check(cudaMemset(residual, 0, static_cast<size_t>(n_tokens * d) * 4), "zero");

    const struct lr_router_args route = {logits, n_tokens, n_experts, top_k, 1, ids, p};
    const struct lr_expert_sort_args sort = {ids, n_tokens, top_k, n_experts, offsets, order, row_of};
    const struct lr_experts_args run = {x, y, hidden, offsets, n_experts, m, w[0].data(), w[1].data(), w[2].data(),
                                        LR_ACT_SILU};
    const struct lr_moe_combine_args combine = {residual, n_tokens, d, top_k, p, row_of, y, nullptr, nullptr};
    char name[96], shape[64];
    snprintf(shape, sizeof shape, "%lld_top%lld_of_%lld_d%lld_f%lld", (long long)n_tokens, (long long)top_k,
             (long long)n_experts, (long long)d, (long long)ffn);
    const double rows = static_cast<double>(m), t = static_cast<double>(n_tokens), columns = static_cast<double>(d);
    snprintf(name, sizeof name, "router_%s", shape);
    report(name, median_ms([&] { LR_CUDA(router)(&exec, &route); }), 0.0,
           t * static_cast<double>(n_experts) * 4 + rows * 8);
    snprintf(name, sizeof name, "sort_%s", shape);
    report(name, median_ms([&] { LR_CUDA(expert_sort)(&exec, &sort); }), 0.0, rows * 20);
    snprintf(name, sizeof name, "gather_%s", shape);
    report(name, median_ms([&] { LR_CUDA(gather_rows)(&exec, tokens, static_cast<size_t>(d) * 2, order, m, x); }), 0.0,
           rows * (8 + 2 * columns) + t * columns * 2);
    snprintf(name, sizeof name, "experts_%s", shape);
    const double flops = 6.0 * rows * static_cast<double>(size);
    const double bytes = rows * 4 * (columns + static_cast<double>(ffn)) + 6.0 * static_cast<double>(n_experts * size);
    report(name, median_ms([&] { LR_CUDA(experts)(&exec, &run); }), flops, bytes);
    snprintf(name, sizeof name, "combine_%s", shape);
    report(name, median_ms([&] { LR_CUDA(moe_combine)(&exec, &combine); }), 0.0,
           rows * (12 + 2 * columns) + t * columns * 8);
    void *const all[] = {weights[0], weights[1], weights[2], logits, p,      ids, offsets,
                         order,      row_of,     tokens,     x,      hidden, y,   residual};
    for (void *memory : all)
        cudaFree(memory);
}

static void open_device()
{
    const struct lr_kernel_ops *ops;
    struct lr_error err;
    if (lr_kernels_cuda_open(0, LR_CUDA_DTYPE, &ops, &exec, &err) == LR_OK)
        return;
    fprintf(stderr, "no device: %s\n", err.message);
    exit(1);
}

static void time_all()
{
    time_experts(16384, 128, 8, 2048, 768);
    time_experts(65536, 8, 2, 256, 256);
    time_gemm(8192, 8192, 8192, 0, 0);
    time_gemm(16384, 12288, 2048, 0, 0);
    time_gemm(16384, 2048, 4096, 1, 1);
    time_gemm(65536, 776, 256, 0, 0);
    time_gemm(65536, 256, 256, 1, 1);
    time_gemm(65536, 8, 256, 1, 0);
    time_gemm(65536, 1, 256, 1, 0);
    time_gemm(1, 2048, 2048, 0, 0);
    time_gemm(1, 8192, 256, 1, 0);
    time_gemm(64, 2048, 2048, 0, 0);
}

int main()
{
    open_device();
    time_all();
    if (lr_cuda_hopper_kernels(&exec)) {
        lr_kernels_cuda_close(&exec);
        setenv("LR_CUDA_KERNELS", "mma", 1);
        open_device();
        time_all();
    }
    lr_kernels_cuda_close(&exec);
    return 0;
}
