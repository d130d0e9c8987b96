/* The byte-bound slots at the shapes of a Qwen3-Next layer: time, bytes that must move over time, share of the copy
 * rate.
 *
 *   elementwise_bench [rows] [groups]      65536, and any letters of n(orms) e(lementwise) s(election) t(ransfers) */
#include "bench/gpu/bench.h"

#include <string.h>

namespace
{

double ceiling; /* bytes a second */

/* Prints a line; bytes is what must be read and written once. */
template <class Run> void race(const char *what, double bytes, Run run)
{
    struct lr_error err;
    const double ms = bench::median_ms(run);
    bench::need(lr_cuda_memory.wait(&bench::exec, &err), err);
    const double rate = bytes / ms * 1e3;
    printf("%-44s %9.4f ms  %7.1f GB/s  %5.1f %%\n", what, ms, rate / 1e9, rate / ceiling * 100);
}

float *floats(int64_t n)
{
    return static_cast<float *>(bench::take(static_cast<size_t>(n) * 4, false));
}

void *halves(int64_t n)
{
    return bench::take(static_cast<size_t>(n) * 2, true);
}

void drop(void *base)
{
    lr_cuda_memory.release(base, 0);
}

void norms(int64_t rows)
{
    char what[80];
    for (int64_t d = 256; d <= 4096; d *= 2) {
        struct lr_rmsnorm_args a = {};
        float *x = floats(rows * d), *w = floats(d);
        a.x = x, a.w = w, a.x_stride = a.y_stride = a.n_cols = d, a.n_rows = rows, a.eps = 1e-6f, a.plus_one = 1;
        a.y = halves(rows * d);
        snprintf(what, sizeof what, "rmsnorm %lld x %lld", static_cast<long long>(rows), static_cast<long long>(d));
        race(what, 6.0 * static_cast<double>(rows * d), [&] { LR_CUDA(rmsnorm)(&bench::exec, &a); });
        drop(x), drop(w), drop(a.y);
    }
    {
        struct lr_gated_rmsnorm_args a = {};
        void *x = halves(rows * 4096), *z = halves(rows * 4096);
        float *w = floats(128);
        a.x = x, a.z = z, a.w = w, a.x_stride = a.z_stride = a.y_stride = 4096, a.n_rows = rows, a.n_heads = 32;
        a.y = halves(rows * 4096), a.head_dim = 128, a.eps = 1e-6f;
        race("gated_rmsnorm 32 x 128", 6.0 * static_cast<double>(rows * 4096),
             [&] { LR_CUDA(gated_rmsnorm)(&bench::exec, &a); });
        drop(x), drop(z), drop(w), drop(a.y);
    }
    {
        struct lr_l2norm_args a = {};
        a.x = halves(rows * 8192), a.x_stride = 8192, a.n_rows = rows, a.n_heads = 16, a.head_dim = 128;
        a.eps = 1e-6f, a.scale = 1.0f;
        race("l2norm 16 x 128 of rows of 8192", 4.0 * static_cast<double>(rows * 2048),
             [&] { LR_CUDA(l2norm)(&bench::exec, &a); });
        a.n_heads = 32;
        race("l2norm 32 x 128 of rows of 8192 (q and k)", 4.0 * static_cast<double>(rows * 4096),
             [&] { LR_CUDA(l2norm)(&bench::exec, &a); });
        drop(a.x);
    }
    {
        struct lr_norm_rope_args a = {};
        float *cos = floats(rows * 32), *sin = floats(rows * 32), *w = floats(256);
        a.x = halves(rows * 9216), a.x_stride = 9216, a.n_rows = rows, a.n_heads = 16, a.head_stride = 512;
        a.head_dim = 256, a.rotary_dim = 64, a.w = w, a.cos = cos, a.sin = sin, a.eps = 1e-6f;
        race("norm_rope q 16 x 256 rotary 64",
             4.0 * static_cast<double>(rows * 4096) + 8.0 * static_cast<double>(rows * 32),
             [&] { LR_CUDA(norm_rope)(&bench::exec, &a); });
        a.head_dim = 128, a.head_stride = 256, a.rotary_dim = 128, a.n_heads = 32;
        float *wide_cos = floats(rows * 64), *wide_sin = floats(rows * 64);
        a.cos = wide_cos, a.sin = wide_sin;
        race("norm_rope q 32 x 128 rotary 128",
             4.0 * static_cast<double>(rows * 4096) + 8.0 * static_cast<double>(rows * 64),
             [&] { LR_CUDA(norm_rope)(&bench::exec, &a); });
        drop(a.x), drop(w), drop(cos), drop(sin), drop(wide_cos), drop(wide_sin);
    }
}

void elementwise(int64_t rows)
{
    {
        struct lr_conv_args a = {};
        void *x = halves(rows * 8192), *tail = halves(3 * 8192);
        float *w = floats(8192 * 4);
        a.x = x, a.w = w, a.tail = tail, a.x_stride = a.y_stride = a.n_channels = 8192, a.n_rows = rows, a.n_taps = 4;
        a.y = halves(rows * 8192), a.activation = LR_ACT_SILU;
        race("conv 8192 channels, 4 taps, silu", 4.0 * static_cast<double>(rows * 8192),
             [&] { LR_CUDA(conv)(&bench::exec, &a); });
        a.n_channels = 1024;
        race("conv 1024 channels of rows of 8192", 4.0 * static_cast<double>(rows * 1024),
             [&] { LR_CUDA(conv)(&bench::exec, &a); });
        drop(x), drop(tail), drop(w), drop(a.y);
    }
    {
        struct lr_sigmoid_gate_args a = {};
        void *x = halves(rows * 4096);
        void *gate = halves(rows * 9216);
        a.x = x, a.gate = static_cast<uint16_t *>(gate) + 256, a.y = halves(rows * 4096);
        a.x_stride = a.y_stride = 4096, a.gate_stride = 9216, a.gate_head_stride = 512, a.n_rows = rows;
        a.n_heads = 16, a.head_dim = 256;
        race("sigmoid_gate 16 x 256", 6.0 * static_cast<double>(rows * 4096),
             [&] { LR_CUDA(sigmoid_gate)(&bench::exec, &a); });
        drop(x), drop(gate), drop(a.y);
    }
    {
        struct lr_delta_gates_args a = {};
        const int64_t n = 8 * rows; /* what the rows alone have would stay in the cache */
        void *ba = halves(n * 64);
        float *a_log = floats(32), *dt_bias = floats(32);
        a.b = ba, a.a = static_cast<uint16_t *>(ba) + 32, a.ba_stride = 64, a.a_log = a_log, a.dt_bias = dt_bias;
        a.beta = floats(n * 32), a.g = floats(n * 32), a.n_rows = n, a.n_heads = 32;
        race("delta_gates 32 heads, 8 x the rows", 12.0 * static_cast<double>(n * 32),
             [&] { LR_CUDA(delta_gates)(&bench::exec, &a); });
        drop(ba), drop(a_log), drop(dt_bias), drop(a.beta), drop(a.g);
    }
    {
        const int64_t vocab = 151936, d = 2048;
        void *table = halves(vocab * d);
        float *y = floats(rows * d);
        std::vector<int32_t> ids(static_cast<size_t>(rows));
        for (size_t i = 0; i < ids.size(); i++)
            ids[i] = static_cast<int32_t>(i * 2654435761u % static_cast<uint32_t>(vocab));
        race("embed bf16 x 2048 (ids uploaded)", 6.0 * static_cast<double>(rows * d),
             [&] { LR_CUDA(embed)(&bench::exec, table, LR_CUDA_DTYPE, d, ids.data(), rows, y); });
        std::vector<int64_t> positions(static_cast<size_t>(rows));
        std::vector<double> frequencies(32, 0.1);
        race("rope_table 32 (positions uploaded)", 8.0 * static_cast<double>(rows * 32), [&] {
            LR_CUDA(rope_table)(&bench::exec, positions.data(), rows, frequencies.data(), 32, 1.0, y, y + rows * 32);
        });
        drop(table), drop(y);
    }
}

void selection(int64_t rows)
{
    const struct lr_kv_shape shape = {16, 2, 256, LR_CUDA_DTYPE};
    const int64_t n_blocks = 8192, size = 2 * 256;
    {
        const size_t block_bytes = 2 * 2 * 128 * 256 * 2;
        char *keys = static_cast<char *>(bench::take(n_blocks * block_bytes, true));
        std::vector<struct lr_kv_ref> refs(n_blocks);
        for (int64_t i = 0; i < n_blocks; i++)
            refs[static_cast<size_t>(i)] = {keys + static_cast<size_t>(i) * block_bytes, i * 128, 128, 0};
        struct lr_block_summary_args a = {};
        a.shape = shape, a.blocks = refs.data(), a.n_blocks = n_blocks, a.mean = floats(n_blocks * size);
        a.min = floats(n_blocks * size), a.max = floats(n_blocks * size);
        race("block_summary 8192 blocks of 2 x 256", static_cast<double>(n_blocks) * (block_bytes / 2.0 + 12.0 * size),
             [&] { LR_CUDA(block_summary)(&bench::exec, &a); });
        drop(keys), drop(a.mean), drop(a.min), drop(a.max);
    }
    void *q = halves(rows * 9216);
    for (int64_t blocks = n_blocks; blocks <= 10 * n_blocks; blocks *= 10) {
        char what[80];
        struct lr_block_select_args a = {};
        float *means = floats(blocks * size);
        a.shape = shape, a.q = q, a.q_stride = 9216, a.q_head_stride = 512, a.n_rows = rows, a.window = 1024;
        a.sinks = 128, a.block_means = means, a.n_blocks = blocks, a.position = blocks * 128 - rows, a.top_k = 64;
        a.chosen = reinterpret_cast<int32_t *>(floats(rows / 128 * 2 * 64));
        snprintf(what, sizeof what, "block_select of %lld blocks (bytes: q)", static_cast<long long>(blocks));
        race(what, 2.0 * static_cast<double>(rows * 4096), [&] { LR_CUDA(block_select)(&bench::exec, &a); });
        drop(means), drop(a.chosen);
    }
    for (int64_t forks = 1; forks <= 32; forks *= 32) {
        char what[80];
        struct lr_page_bounds_args a = {};
        const int64_t pages = 10 * n_blocks;
        float *low = floats(pages * size), *high = floats(pages * size);
        a.shape = shape, a.q = q, a.q_stride = 9216, a.q_head_stride = 512, a.n_rows = forks, a.n_pages = pages;
        a.min = low, a.max = high, a.bounds = floats(forks * 2 * pages);
        snprintf(what, sizeof what, "page_bounds %lld pages, %lld rows", static_cast<long long>(pages),
                 static_cast<long long>(forks));
        race(what, 8.0 * static_cast<double>(pages * size) + 8.0 * static_cast<double>(forks * pages),
             [&] { LR_CUDA(page_bounds)(&bench::exec, &a); });
        drop(low), drop(high), drop(a.bounds);
    }
    drop(q);
}

void transfers()
{
    const size_t size = static_cast<size_t>(1) << 30;
    std::vector<char> host(size, 1);
    struct lr_error err;
    void *device = bench::take(size, true);
    for (int down = 0; down < 2; down++) {
        cudaEvent_t start, end;
        float ms = 0.0f;
        cudaEventCreate(&start);
        cudaEventCreate(&end);
        cudaEventRecord(start, bench::stream());
        if (down)
            bench::need(lr_cuda_memory.download(&bench::exec, host.data(), device, size, &err), err);
        else
            lr_cuda_memory.upload(&bench::exec, device, host.data(), size);
        cudaEventRecord(end, bench::stream());
        cudaEventSynchronize(end);
        cudaEventElapsedTime(&ms, start, end);
        printf("%-44s %9.4f ms  %7.1f GB/s\n", down ? "download 1 GiB" : "upload 1 GiB", static_cast<double>(ms),
               static_cast<double>(size) / static_cast<double>(ms) / 1e6);
    }
    drop(device);
}

} // namespace

int main(int argc, char **argv)
{
    const int64_t rows = argc > 1 ? atoll(argv[1]) : 65536;
    const char *groups = argc > 2 ? argv[2] : "nest";
    bench::open();
    ceiling = bench::copy_rate();
    printf("%s, %lld rows, copy %.1f GB/s read and written\n", lr_cuda_device_name(&bench::exec),
           static_cast<long long>(rows), ceiling / 1e9);
    if (strchr(groups, 'n') != nullptr)
        norms(rows);
    if (strchr(groups, 'e') != nullptr)
        elementwise(rows);
    if (strchr(groups, 's') != nullptr)
        selection(rows);
    if (strchr(groups, 't') != nullptr)
        transfers();
    lr_cuda_device_close(&bench::exec);
    return 0;
}
