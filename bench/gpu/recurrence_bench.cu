/* Times the chunked recurrence on one GPU:  recurrence_bench [n_repeats]
 *
 * One line a shape: the median over n_repeats of prepare, of output and of both, TFLOP/s of the products that the
 * kernels make, TB/s of the bytes that must move (q, k, v and gates read once, o written once), and the share of the
 * rate at which this device copies. Inputs are random, as are the states; nothing is warm in the second-level cache but
 * what the kernels themselves leave there. bench/gpu/recurrence_peers.py times the peers on the same shapes. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/recurrence.h"
#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

namespace
{

void must(int error, const char *what)
{
    if (error != cudaSuccess) {
        fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(error)));
        exit(1);
    }
}

template <class T> T *take(int64_t n)
{
    void *p = nullptr;
    must(cudaMalloc(&p, static_cast<size_t>(n) * sizeof(T)), "cudaMalloc");
    return static_cast<T *>(p);
}

/* In [-1, 1). */
__device__ float random_of(uint64_t i)
{
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<float>((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f;
}

__global__ void fill_rows(lr::act *x, int64_t n, float size)
{
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        x[i] = lr::to_act(size * random_of(static_cast<uint64_t>(i)));
    }
}

__global__ void fill_gates(float *x, int64_t n, float first, float size)
{
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        x[i] = first + size * random_of(static_cast<uint64_t>(i));
    }
}

struct shape {
    enum lr_recurrence_rule rule;
    struct lr_delta_shape heads;
    int64_t n_rows;
};

/* Floating-point operations of the products, as the kernels make them. */
double flops_of(const struct shape &s)
{
    const double d = static_cast<double>(s.heads.dk);
    const double scores = 2 * 64 * d;
    const double output = 2 * d * (2 * d + 64);
    const double delta =
        s.rule == LR_RECURRENCE_DELTA ? 2 * d * (d + 64) + 4 * d * (2 * d + 64) + 2 * 64 * d : 2 * d * d;
    return static_cast<double>(s.n_rows * s.heads.n_v_heads) * (scores + output + delta);
}

double bytes_of(const struct shape &s)
{
    const double row = static_cast<double>(2 * s.heads.n_k_heads * s.heads.dk + 2 * s.heads.n_v_heads * s.heads.dv) * 2;
    const double gates = static_cast<double>(s.heads.n_v_heads) * (s.rule == LR_RECURRENCE_DELTA ? 8 : 4);
    return static_cast<double>(s.n_rows) * (row + gates);
}

/* Median milliseconds of three stretches between four events. */
struct times {
    float prepare, output, both;
};

float median(std::vector<float> &x)
{
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

struct times measure(const struct shape &s, int n_repeats, const struct lr_exec *exec)
{
    cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int64_t keys = s.heads.n_k_heads * s.heads.dk;
    const int64_t values = s.heads.n_v_heads * s.heads.dv;
    const int64_t n_gates = s.n_rows * s.heads.n_v_heads;
    const int64_t state = s.heads.n_v_heads * s.heads.dk * s.heads.dv;
    lr::act *q = take<lr::act>(s.n_rows * keys);
    lr::act *k = take<lr::act>(s.n_rows * keys);
    lr::act *v = take<lr::act>(s.n_rows * values);
    lr::act *o = take<lr::act>(s.n_rows * values);
    float *g = take<float>(n_gates);
    float *beta = take<float>(n_gates);
    float *s_in = take<float>(state);
    float *s_out = take<float>(state);
    const float key_size = sqrtf(3.0f / static_cast<float>(s.heads.dk)); /* rows of length one */
    fill_rows<<<1024, 256, 0, stream>>>(q, s.n_rows * keys, key_size);
    fill_rows<<<1024, 256, 0, stream>>>(k, s.n_rows * keys, key_size);
    fill_rows<<<1024, 256, 0, stream>>>(v, s.n_rows * values, 1.0f);
    fill_gates<<<1024, 256, 0, stream>>>(g, n_gates, -0.05f, 0.05f);
    fill_gates<<<1024, 256, 0, stream>>>(beta, n_gates, 0.5f, 0.5f);
    fill_gates<<<1024, 256, 0, stream>>>(s_in, state, 0.0f, 1.0f);
    struct lr_recurrence_args args = {};
    args.rule = s.rule;
    args.shape = s.heads;
    args.q = q;
    args.k = k;
    args.v = v;
    args.q_stride = args.k_stride = keys;
    args.v_stride = values;
    args.g = g;
    args.beta = beta;
    args.scale = 1.0f / sqrtf(static_cast<float>(s.heads.dk));
    args.n_rows = s.n_rows;
    args.n_sequences = 1;
    args.hopper = lr_cuda_hopper_kernels(exec);
    args.work = take<char>(static_cast<int64_t>(LR_CUDA(recurrence_work_bytes)(s.rule, s.heads, s.n_rows, 1)));

    cudaEvent_t events[3];
    for (cudaEvent_t &event : events) {
        must(cudaEventCreate(&event), "cudaEventCreate");
    }
    std::vector<float> prepare, output, both;
    for (int i = -3; i < n_repeats; i++) {
        must(cudaEventRecord(events[0], stream), "cudaEventRecord");
        must(LR_CUDA(recurrence_prepare)(stream, &args), "prepare");
        must(cudaEventRecord(events[1], stream), "cudaEventRecord");
        must(LR_CUDA(recurrence_output)(stream, &args, s_in, o, values, s_out), "output");
        must(cudaEventRecord(events[2], stream), "cudaEventRecord");
        must(cudaStreamSynchronize(stream), "the kernels");
        float ms[3];
        must(cudaEventElapsedTime(&ms[0], events[0], events[1]), "cudaEventElapsedTime");
        must(cudaEventElapsedTime(&ms[1], events[1], events[2]), "cudaEventElapsedTime");
        must(cudaEventElapsedTime(&ms[2], events[0], events[2]), "cudaEventElapsedTime");
        if (i >= 0) {
            prepare.push_back(ms[0]);
            output.push_back(ms[1]);
            both.push_back(ms[2]);
        }
    }
    for (cudaEvent_t &event : events) {
        must(cudaEventDestroy(event), "cudaEventDestroy");
    }
    for (void *p : {static_cast<void *>(q), static_cast<void *>(k), static_cast<void *>(v), static_cast<void *>(o),
                    static_cast<void *>(g), static_cast<void *>(beta), static_cast<void *>(s_in),
                    static_cast<void *>(s_out), args.work}) {
        must(cudaFree(p), "cudaFree");
    }
    return {median(prepare), median(output), median(both)};
}

/* TB/s, read and written, of a large copy. */
double copy_rate(cudaStream_t stream)
{
    constexpr int64_t N = 1 << 30;
    char *from = take<char>(N);
    char *to = take<char>(N);
    must(cudaMemsetAsync(from, 1, N, stream), "cudaMemset");
    cudaEvent_t begin, end;
    must(cudaEventCreate(&begin), "cudaEventCreate");
    must(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<float> times;
    for (int i = 0; i < 12; i++) {
        must(cudaEventRecord(begin, stream), "cudaEventRecord");
        must(cudaMemcpyAsync(to, from, N, cudaMemcpyDeviceToDevice, stream), "cudaMemcpy");
        must(cudaEventRecord(end, stream), "cudaEventRecord");
        must(cudaStreamSynchronize(stream), "the copy");
        float ms = 0.0f;
        must(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
        times.push_back(ms);
    }
    must(cudaFree(from), "cudaFree");
    must(cudaFree(to), "cudaFree");
    return 2e-9 * static_cast<double>(N) / static_cast<double>(median(times));
}

const struct shape SHAPES[] = {
    {LR_RECURRENCE_DELTA, {16, 16, 128, 128}, 65536}, {LR_RECURRENCE_DECAY, {16, 16, 128, 128}, 65536},
    {LR_RECURRENCE_DELTA, {64, 64, 128, 128}, 32768}, {LR_RECURRENCE_DELTA, {16, 64, 128, 128}, 32768},
    {LR_RECURRENCE_DELTA, {2, 4, 64, 64}, 65536},     {LR_RECURRENCE_DELTA, {2, 4, 64, 64}, 1000000},
    {LR_RECURRENCE_DELTA, {16, 32, 128, 128}, 8192},  {LR_RECURRENCE_DECAY, {2, 4, 64, 64}, 1000000},
};

} // namespace

int main(int argc, char **argv)
{
    const int n_repeats = argc > 1 ? atoi(argv[1]) : 30;
    const size_t n_shapes = argc > 2 ? static_cast<size_t>(atoi(argv[2])) : sizeof SHAPES / sizeof *SHAPES;
    struct lr_exec exec;
    struct lr_error err;
    if (lr_cuda_device_open(0, &exec, &err) != LR_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    const double ceiling = copy_rate(static_cast<cudaStream_t>(exec.stream));
    printf("copy %.2f TB/s\n", ceiling);
    printf("rule   heads  dim    tokens | prepare  output    both ms | TFLOP/s   TB/s  of copy\n");
    for (size_t i = 0; i < n_shapes; i++) {
        const struct shape &s = SHAPES[i];
        const struct times t = measure(s, n_repeats, &exec);
        const double rate = bytes_of(s) * 1e-9 / static_cast<double>(t.both);
        printf("%s %3lld/%-3lld %4lld %9lld | %7.3f %7.3f %7.3f    | %7.0f %6.2f   %3.0f %%\n",
               s.rule == LR_RECURRENCE_DELTA ? "delta" : "decay", static_cast<long long>(s.heads.n_k_heads),
               static_cast<long long>(s.heads.n_v_heads), static_cast<long long>(s.heads.dk),
               static_cast<long long>(s.n_rows), static_cast<double>(t.prepare), static_cast<double>(t.output),
               static_cast<double>(t.both), flops_of(s) * 1e-9 / static_cast<double>(t.both), rate,
               100.0 * rate / ceiling);
        fflush(stdout);
    }
    lr_cuda_device_close(&exec);
    return 0;
}
