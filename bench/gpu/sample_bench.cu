/* sample at the vocabulary of Qwen3: one line a way of sampling, for sample_peers.py beside.
 *
 *   sample_bench          name, ms, bytes of the logits: they are read once */
#include "bench/gpu/bench.h"

#include <random>

namespace
{

constexpr int64_t VOCAB = 151936;

struct way {
    const char *name;
    float temperature, top_p;
    int32_t top_k;
};

/* What a request may ask for, and what is hardest: tokens that all lie in one bin. */
const struct way ways[] = {
    {"greedy", 0.0f, 1.0f, 0},        {"all", 1.0f, 1.0f, 0},   {"top_k_50", 1.0f, 1.0f, 50},
    {"top_p_0.9", 1.0f, 0.9f, 0},     {"both", 0.7f, 0.8f, 20}, {"hot_top_p_0.9", 10.0f, 0.9f, 0},
    {"all_alike", 1e6f, 0.9f, 50000},
};

void race(const float *logits, int64_t n_rows, const struct way &way, int32_t *ids)
{
    const std::vector<struct lr_sampling> sampling(static_cast<size_t>(n_rows),
                                                   {way.temperature, way.top_k, way.top_p, 1});
    std::vector<int64_t> positions(static_cast<size_t>(n_rows));
    struct lr_error err;
    int64_t call = 0;
    const double ms = bench::median_ms([&] {
        for (int64_t &position : positions)
            position = call++;
        const struct lr_sample_args args = {logits, n_rows, VOCAB, sampling.data(), positions.data(), ids};
        lr_cuda_sample(&bench::exec, &args);
    });
    bench::need(lr_cuda_memory.wait(&bench::exec, &err), err);
    printf("sample_%lld_%s %.4f %.0f\n", static_cast<long long>(n_rows), way.name, ms,
           4.0 * static_cast<double>(n_rows * VOCAB));
}

} // namespace

int main()
{
    constexpr int64_t ROWS = 64;
    bench::open();
    std::vector<float> host(static_cast<size_t>(ROWS * VOCAB));
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (float &x : host)
        x = normal(generator);
    float *logits = static_cast<float *>(bench::take(host.size() * sizeof(float), false));
    int32_t *ids = static_cast<int32_t *>(bench::take(ROWS * sizeof(int32_t), false));
    lr_cuda_memory.upload(&bench::exec, logits, host.data(), host.size() * sizeof(float));
    for (const int64_t n_rows : {static_cast<int64_t>(1), static_cast<int64_t>(32), ROWS})
        for (const struct way &way : ways)
            race(logits, n_rows, way, ids);
    lr_cuda_memory.release(logits, 0);
    lr_cuda_memory.release(ids, 0);
    lr_cuda_device_close(&bench::exec);
    return 0;
}
