/* Times the slots of attention on the shapes that we race on.
 *
 *   attention_bench [quick] [causal] [sparse] [tiny] [wide] [decode] [store]     all of them without an argument
 *
 * One line a shape:  name  ms  TFLOP/s or TB/s.  Median of up to 20 runs, or of what fits into `limit_ms` (3 at least),
 * after two for warming up; inputs are random and larger than L2. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/device.h"

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

static struct lr_exec exec;
static constexpr int64_t BLOCK = LR_KV_BLOCK_TOKENS;
static constexpr float limit_ms = 2500.0f;

static void check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return;
    printf("%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

static cudaStream_t stream()
{
    return static_cast<cudaStream_t>(exec.stream);
}

/* Twelve uniform numbers make nearly a normal one. */
__global__ void fill_normal(lr::act *x, int64_t n, uint64_t seed)
{
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u + seed;
        float sum = -6.0f;
        for (int k = 0; k < 3; k++) {
            z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
            z = (z ^ z >> 27) * 0x94d049bb133111ebu;
            z ^= z >> 31;
            for (int p = 0; p < 4; p++)
                sum += static_cast<float>(z >> 16 * p & 0xffff) * 0x1p-16f;
        }
        x[i] = lr::to_act(sum);
    }
}

template <typename T> static T *take(int64_t n)
{
    void *p = nullptr;
    check(cudaMalloc(&p, static_cast<size_t>(n) * sizeof(T)), "cudaMalloc");
    return static_cast<T *>(p);
}

static lr::act *take_normal(int64_t n, uint64_t seed)
{
    lr::act *x = take<lr::act>(n);
    fill_normal<<<1024, 256, 0, stream()>>>(x, n, seed);
    return x;
}

template <typename Run> static float median_ms(Run run)
{
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    std::vector<float> times;
    float total = 0.0f;
    for (int i = 0; i < 22 && (i < 5 || total < limit_ms); i++) {
        float ms;
        check(cudaEventRecord(begin, stream()), "record");
        run();
        check(cudaEventRecord(end, stream()), "record");
        check(cudaEventSynchronize(end), "run");
        check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
        total += ms;
        if (i >= 2)
            times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

static void row(const char *name, float ms, double flops, double bytes)
{
    printf("%-52s %10.3f ms", name, ms);
    if (flops > 0)
        printf("  %7.1f TFLOP/s", flops / ms * 1e-9);
    if (bytes > 0)
        printf("  %6.2f TB/s", bytes / ms * 1e-9);
    printf("\n");
    fflush(stdout);
}

struct document {
    struct lr_kv_shape shape;
    char *data;
    std::vector<struct lr_kv_ref> refs;

    document(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t n_tokens)
        : shape{n_heads, n_kv_heads, head_dim, LR_CUDA_DTYPE}
    {
        const int64_t bytes = static_cast<int64_t>(LR_CUDA(kv_block_bytes)(shape));
        data = reinterpret_cast<char *>(take_normal(n_tokens / BLOCK * bytes / 2, 7));
        for (int64_t i = 0; i < n_tokens / BLOCK; i++)
            refs.push_back({data + i * bytes, i * BLOCK, static_cast<int32_t>(BLOCK), 0});
    }
    ~document()
    {
        cudaFree(data);
    }
};

/* Rows [position, position + n_rows) of a document; lists: one for all, or `lists`. */
static float time_attention(const document &d,
                            int64_t position,
                            int64_t n_rows,
                            int64_t window,
                            const std::vector<struct lr_kv_list> &lists,
                            bool half_blocks = false)
{
    const int64_t width = d.shape.n_heads * d.shape.head_dim;
    std::vector<int64_t> positions(static_cast<size_t>(n_rows));
    for (int64_t i = 0; i < n_rows; i++)
        positions[static_cast<size_t>(i)] = position + i;
    struct lr_attention_args args = {};
    args.shape = d.shape;
    args.q = take_normal(n_rows * width, 99);
    args.q_stride = width;
    args.q_head_stride = d.shape.head_dim;
    args.n_rows = n_rows;
    args.positions = positions.data();
    args.scale = 1.0f / sqrtf(static_cast<float>(d.shape.head_dim));
    args.window = window;
    args.lists = lists.data();
    args.n_lists = static_cast<int64_t>(lists.size());
    args.half_blocks = half_blocks;
    args.first = 1;
    args.m = take<float>(n_rows * d.shape.n_heads);
    args.l = take<float>(n_rows * d.shape.n_heads);
    args.o = nullptr;
    args.y = take<lr::act>(n_rows * width);
    args.y_stride = width;
    const float ms = median_ms([&] { LR_CUDA(attention)(&exec, &args); });
    cudaFree(const_cast<void *>(args.q));
    cudaFree(args.m);
    cudaFree(args.l);
    cudaFree(args.y);
    return ms;
}

static std::vector<struct lr_kv_list> one_list(const document &d)
{
    return {{d.refs.data(), static_cast<int64_t>(d.refs.size())}};
}

static void causal(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t n_tokens)
{
    char name[96];
    const document d(n_heads, n_kv_heads, head_dim, n_tokens);
    const float ms = time_attention(d, 0, n_tokens, 0, one_list(d));
    const double t = static_cast<double>(n_tokens);
    snprintf(name, sizeof name, "causal T=%lld H=%lld/%lld D=%lld", (long long)n_tokens, (long long)n_heads,
             (long long)n_kv_heads, (long long)head_dim);
    row(name, ms, 2.0 * static_cast<double>(n_heads * head_dim) * t * t, 0);
}

static void window(int64_t n_tokens, int64_t width)
{
    const document d(32, 8, 128, n_tokens);
    const float ms = time_attention(d, 0, n_tokens, width, one_list(d));
    row("window 4096 T=65536 H=32/8 D=128", ms, 4.0 * 32 * 128 * static_cast<double>(n_tokens * width), 0);
}

/* A tenth of the blocks of `tokens` (128 or 64) tokens at random and the query block's own, the same for every KV head,
 * causal. */
static void random_blocks(int64_t n_tokens, int64_t tokens)
{
    char name[96];
    const document d(32, 8, 128, n_tokens);
    const int64_t n_blocks = n_tokens / BLOCK, parts = BLOCK / tokens;
    std::vector<std::vector<struct lr_kv_ref>> refs(static_cast<size_t>(n_blocks));
    std::vector<struct lr_kv_list> lists;
    double n = 0;
    uint64_t seed = 1;
    for (int64_t i = 0; i < n_blocks; i++) {
        std::vector<struct lr_kv_ref> &r = refs[static_cast<size_t>(i)];
        for (int64_t j = 0; j < (i + 1) * parts; j++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            if (j / parts == i || seed >> 33 < 0x80000000u / 10)
                r.push_back({d.refs[static_cast<size_t>(j / parts)].data, j * tokens, static_cast<int32_t>(tokens), 0});
        }
        n += static_cast<double>(r.size());
        for (int64_t h = 0; h < 8; h++)
            lists.push_back({r.data(), static_cast<int64_t>(r.size())});
    }
    const float ms = time_attention(d, 0, n_tokens, 0, lists, parts > 1);
    snprintf(name, sizeof name, "random 10 %% of 128 x %lld blocks T=65536 H=32/8 D=128", (long long)tokens);
    row(name, ms, 4.0 * 32 * 128 * n * static_cast<double>(BLOCK * tokens), 0);
}

/* The rows of one wave of longreach-tiny against everything before them. */
static void tiny(int64_t n_rows, int64_t n_keys)
{
    char name[96];
    const document d(4, 2, 64, n_keys);
    const float ms = time_attention(d, n_keys - n_rows, n_rows, 0, one_list(d));
    const double pairs = static_cast<double>(n_rows) * (static_cast<double>(n_keys) - static_cast<double>(n_rows) / 2);
    snprintf(name, sizeof name, "rows %lld keys %lld H=4/2 D=64", (long long)n_rows, (long long)n_keys);
    row(name, ms, 4.0 * 4 * 64 * pairs, 0);
}

static void decode(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t n_rows)
{
    constexpr int64_t ITEMS = 245, EACH = 32;
    char name[96];
    const document d(n_heads, n_kv_heads, head_dim, ITEMS * EACH * BLOCK);
    const int64_t width = n_heads * head_dim;
    std::vector<int64_t> positions(static_cast<size_t>(n_rows), ITEMS * EACH * BLOCK);
    std::vector<struct lr_kv_list> lists(ITEMS);
    std::vector<struct lr_partial_item> items(ITEMS);
    for (int64_t i = 0; i < ITEMS; i++) {
        lists[static_cast<size_t>(i)] = {d.refs.data() + i * EACH, EACH};
        items[static_cast<size_t>(i)] = {i, 0, n_rows, &lists[static_cast<size_t>(i)], 1};
    }
    struct lr_partials_args args = {};
    args.shape = d.shape;
    args.q = take_normal(n_rows * width, 99);
    args.q_stride = width;
    args.q_head_stride = head_dim;
    args.n_rows = n_rows;
    args.positions = positions.data();
    args.scale = 1.0f / sqrtf(static_cast<float>(head_dim));
    args.items = items.data();
    args.n_items = ITEMS;
    args.n_slots = ITEMS;
    args.m = take<float>(ITEMS * n_rows * n_heads);
    args.l = take<float>(ITEMS * n_rows * n_heads);
    args.o = take<float>(ITEMS * n_rows * width);
    const float ms = median_ms([&] { LR_CUDA(partials)(&exec, &args); });
    const double kv_bytes = static_cast<double>(ITEMS * EACH) * static_cast<double>(LR_CUDA(kv_block_bytes)(d.shape));
    const double pairs = static_cast<double>(n_rows * ITEMS * EACH * BLOCK);
    snprintf(name, sizeof name, "decode %lld rows, 245 x 32 blocks, H=%lld/%lld D=%lld", (long long)n_rows,
             (long long)n_heads, (long long)n_kv_heads, (long long)head_dim);
    row(name, ms, 4.0 * static_cast<double>(width) * pairs, kv_bytes);

    struct lr_merge_args merge = {};
    merge.n_rows = n_rows;
    merge.n_heads = n_heads;
    merge.head_dim = head_dim;
    merge.n_partials = ITEMS;
    merge.n_partials_total = ITEMS;
    merge.m = args.m;
    merge.l = args.l;
    merge.o = args.o;
    merge.bound = take<float>(n_rows * n_heads * 2);
    merge.sums = take<int64_t>(n_rows * n_heads * (head_dim + 1));
    merge.y = take<lr::act>(n_rows * width);
    merge.y_stride = width;
    const float merge_ms = median_ms([&] {
        LR_CUDA(merge_bounds)(&exec, &merge);
        LR_CUDA(merge_accumulate)(&exec, &merge);
        LR_CUDA(merge_finish)(&exec, &merge);
    });
    row("  their merge", merge_ms, 0, 2.0 * static_cast<double>(ITEMS * n_rows * width) * 4);
    for (void *p : {static_cast<void *>(args.m), static_cast<void *>(args.l), static_cast<void *>(args.o),
                    static_cast<void *>(merge.bound), static_cast<void *>(merge.sums), static_cast<void *>(merge.y),
                    const_cast<void *>(args.q)})
        cudaFree(p);
}

static void store(int64_t n_kv_heads, int64_t head_dim)
{
    constexpr int64_t N = 65536;
    char name[96];
    const document d(n_kv_heads, n_kv_heads, head_dim, N);
    const int64_t width = n_kv_heads * head_dim;
    std::vector<void *> blocks;
    for (const struct lr_kv_ref &r : d.refs)
        blocks.push_back(const_cast<void *>(r.data));
    lr::act *kv = take_normal(N * 2 * width, 3);
    struct lr_kv_store_args args = {};
    args.shape = d.shape;
    args.k = kv;
    args.k_stride = 2 * width;
    args.v = kv + width;
    args.v_stride = 2 * width;
    args.n_rows = N;
    args.blocks = blocks.data();
    const float ms = median_ms([&] { LR_CUDA(kv_store)(&exec, &args); });
    snprintf(name, sizeof name, "kv_store T=65536 HK=%lld D=%lld", (long long)n_kv_heads, (long long)head_dim);
    row(name, ms, 0, 4.0 * static_cast<double>(N * width) * 2);
    cudaFree(kv);
}

static bool wanted(int argc, char **argv, const char *name)
{
    bool found = argc == 1;
    for (int i = 1; i < argc; i++)
        found = found || strcmp(argv[i], name) == 0;
    return found;
}

int main(int argc, char **argv)
{
    struct lr_error err;
    if (lr_cuda_device_open(0, &exec, &err) != LR_OK) {
        printf("%s\n", err.message);
        return 1;
    }
    if (wanted(argc, argv, "causal"))
        for (int64_t n : {65536, 131072})
            causal(32, 8, 128, n);
    if (wanted(argc, argv, "sparse")) {
        window(65536, 4096);
        random_blocks(65536, BLOCK);
        random_blocks(65536, BLOCK / 2);
    }
    if (wanted(argc, argv, "tiny"))
        tiny(65536, 1 << 20);
    if (wanted(argc, argv, "quick")) {
        causal(4, 2, 64, 65536);
        causal(32, 8, 128, 16384);
    }
    if (wanted(argc, argv, "wide"))
        causal(16, 2, 256, 32768);
    if (wanted(argc, argv, "decode")) {
        for (int64_t n : {1, 8, 32, 64})
            decode(4, 2, 64, n);
        decode(32, 8, 128, 4);
        decode(16, 2, 256, 4);
    }
    if (wanted(argc, argv, "store")) {
        store(2, 64);
        store(8, 128);
    }
    struct lr_error wait_err;
    const bool failed = lr_cuda_memory.wait(&exec, &wait_err) != LR_OK;
    if (failed)
        printf("%s\n", wait_err.message);
    lr_cuda_device_close(&exec);
    return failed;
}
