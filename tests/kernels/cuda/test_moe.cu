/* Mixture of experts on CUDA: router, sort, gather, combine, and the experts themselves over all kinds of row counts,
 * against the float64 truth; an expert's rows have the same bytes with and without the others. */
#include "tests/kernels/cuda/test_gemm.h"

#include <algorithm>

/* ---- router ---- */

static void check_router(int64_t n_rows, int64_t n_experts, int64_t top_k, int renormalize, uint64_t seed)
{
    char name[96];
    snprintf(name, sizeof name, "router %lld rows, %lld of %lld", (long long)n_rows, (long long)top_k,
             (long long)n_experts);
    std::vector<float> logits = take_numbers(n_rows * n_experts, 4.0f, &seed); /* of few digits: many ties */
    const size_t n = static_cast<size_t>(n_rows * top_k);
    std::vector<double> p(logits.size()), truth(n);
    std::vector<int32_t> ids(n);
    const device_array<float> device_logits(logits), weights(n);
    const device_array<int32_t> device_ids(n);
    struct lr_router_args args = {logits.data(), n_rows, n_experts, top_k, renormalize, nullptr, nullptr};
    lr_ref_router(&args, p.data(), ids.data(), truth.data());
    args.logits = device_logits.data;
    args.ids = device_ids.data;
    args.weights = weights.data;
    LR_CUDA(router)(&exec, &args);
    wait_device(name);
    check_true(name, device_ids.get() == ids);
    check_distance(name, distance_from(weights.get(), truth), 1e-6);
}

static void check_router_of_nonsense()
{
    constexpr int EXPERTS = 40, K = 6, CASES = 6;
    std::vector<float> logits(CASES * EXPERTS);
    for (int i = 0; i < CASES * EXPERTS; i++) {
        const int row = i / EXPERTS, e = i % EXPERTS;
        logits[static_cast<size_t>(i)] = row == 0   ? NAN
                                         : row == 1 ? -INFINITY
                                         : row == 2 ? (e == 36 ? 1.0f : -INFINITY)
                                         : row == 3 ? (e == 7 ? NAN : static_cast<float>(e))
                                         : row == 4 ? (e == 9 ? INFINITY : 0.0f)
                                                    : 3.0f;
    }
    const device_array<float> device_logits(logits), weights(CASES * K);
    const device_array<int32_t> device_ids(CASES * K);
    const struct lr_router_args args = {device_logits.data, CASES, EXPERTS, K, 1, device_ids.data, weights.data};
    LR_CUDA(router)(&exec, &args);
    wait_device("router of nonsense");
    const std::vector<int32_t> ids = device_ids.get();
    for (int i = 0; i < CASES * K; i++) {
        const int32_t id = ids[static_cast<size_t>(i)];
        check_true("router of nonsense: range", id >= 0 && id < EXPERTS);
        check_true("router of nonsense: order", i % K == 0 || id > ids[static_cast<size_t>(i - 1)]);
        const bool single = i / K == 2 && i % K == K - 1;
        check_true("router of nonsense: the lower ids", id == (single ? 36 : i % K));
    }
}

/* ---- sort, gather, combine ---- */

/* top_k different experts for every token, ascending; low ones more often. */
static std::vector<int32_t> take_choices(int64_t n_rows, int64_t n_experts, int64_t top_k, uint64_t *seed)
{
    std::vector<int32_t> ids, row;
    for (int64_t t = 0; t < n_rows; t++) {
        row.clear();
        while (static_cast<int64_t>(row.size()) < top_k) {
            const uint64_t a = next_bits(seed) % static_cast<uint64_t>(n_experts);
            const uint64_t b = next_bits(seed) % static_cast<uint64_t>(n_experts);
            const int32_t e = static_cast<int32_t>(std::min(a, b));
            if (std::find(row.begin(), row.end(), e) == row.end())
                row.push_back(e);
        }
        std::sort(row.begin(), row.end());
        ids.insert(ids.end(), row.begin(), row.end());
    }
    return ids;
}

static void check_sort(int64_t n_rows, int64_t n_experts, int64_t top_k, uint64_t seed)
{
    char name[96];
    snprintf(name, sizeof name, "sort %lld x %lld over %lld", (long long)n_rows, (long long)top_k,
             (long long)n_experts);
    const std::vector<int32_t> ids = take_choices(n_rows, n_experts, top_k, &seed);
    std::vector<int64_t> offsets(static_cast<size_t>(n_experts + 1)), order(ids.size()), row_of(ids.size());
    for (const int32_t e : ids)
        offsets[static_cast<size_t>(e) + 1]++;
    for (size_t e = 0; e < static_cast<size_t>(n_experts); e++)
        offsets[e + 1] += offsets[e];
    std::vector<int64_t> next = offsets;
    for (size_t i = 0; i < ids.size(); i++) {
        const int64_t place = next[static_cast<size_t>(ids[i])]++;
        order[static_cast<size_t>(place)] = static_cast<int64_t>(i) / top_k;
        row_of[i] = place;
    }
    const device_array<int32_t> device_ids(ids);
    const device_array<int64_t> device_offsets(offsets.size()), device_order(ids.size()), device_row_of(ids.size());
    const struct lr_expert_sort_args args = {device_ids.data, n_rows, top_k, n_experts, device_offsets.data,
                                             device_order.data, device_row_of.data};
    LR_CUDA(expert_sort)(&exec, &args);
    wait_device(name);
    check_true(name, device_offsets.get() == offsets);
    check_true(name, device_order.get() == order);
    check_true(name, device_row_of.get() == row_of);
}

static void check_gather(size_t row_bytes, int64_t n_rows, uint64_t seed)
{
    constexpr int64_t FROM = 50;
    std::vector<uint8_t> x(static_cast<size_t>(FROM) * row_bytes), want;
    for (uint8_t &byte : x)
        byte = static_cast<uint8_t>(next_bits(&seed));
    std::vector<int64_t> rows(static_cast<size_t>(n_rows));
    for (int64_t &row : rows) {
        row = static_cast<int64_t>(next_bits(&seed) % FROM);
        const size_t at = static_cast<size_t>(row) * row_bytes;
        want.insert(want.end(), x.begin() + static_cast<long>(at), x.begin() + static_cast<long>(at + row_bytes));
    }
    const device_array<uint8_t> device_x(x), y(want.size());
    const device_array<int64_t> device_rows(rows);
    LR_CUDA(gather_rows)(&exec, device_x.data, row_bytes, device_rows.data, n_rows, y.data);
    wait_device("gather");
    check_true("gather", y.get() == want);
}

/* shared: 0 none, 1 with factor one, 2 with a gate */
static void check_combine(int64_t n_rows, int64_t d, int64_t top_k, int shared, uint64_t seed)
{
    char name[96];
    snprintf(name, sizeof name, "combine %lld x %lld top %lld shared %d", (long long)n_rows, (long long)d,
             (long long)top_k, shared);
    const int64_t n_routed = n_rows * top_k;
    const std::vector<float> x = take_numbers(n_rows * d, 1.0f, &seed), weights = take_numbers(n_routed, 1.0f, &seed);
    const std::vector<float> y = take_numbers(n_routed * d, 1.0f, &seed);
    const std::vector<float> common = take_numbers(n_rows * d, 1.0f, &seed);
    std::vector<float> gate = take_numbers(n_rows, 30.0f, &seed);
    gate[0] = -200.0f;
    std::vector<int64_t> row_of(static_cast<size_t>(n_routed));
    for (size_t i = 0; i < row_of.size(); i++)
        row_of[i] = n_routed - 1 - static_cast<int64_t>(i);
    std::vector<float> reference_x = x;
    struct lr_moe_combine_args args = {reference_x.data(), n_rows, d, top_k, weights.data(), row_of.data(), y.data(),
                                       shared ? common.data() : nullptr, shared == 2 ? gate.data() : nullptr};
    std::vector<double> truth(x.size());
    lr_ref_moe_combine(&args, truth.data());
    const device_array<float> device_x(x), device_weights(weights), device_gate(gate);
    const device_array<uint16_t> device_y(narrow(y)), device_common(narrow(common));
    const device_array<int64_t> device_row_of(row_of);
    args.x = device_x.data;
    args.weights = device_weights.data;
    args.row_of = device_row_of.data;
    args.y = device_y.data;
    args.shared = shared ? device_common.data : nullptr;
    args.shared_gate = shared == 2 ? device_gate.data : nullptr;
    LR_CUDA(moe_combine)(&exec, &args);
    wait_device(name);
    check_distance(name, distance_from(device_x.get(), truth), 1e-6);
}

/* ---- experts ---- */

struct expert_weights {
    int64_t n_experts, n, k;
    std::vector<std::vector<float>> panels;
    device_array<uint16_t> device;
    std::vector<struct lr_weight> cpu, cuda;

    /* `gap`: elements between two experts, so that the distance is not the size */
    expert_weights(int64_t count, int64_t rows, int64_t columns, int64_t gap, uint64_t *seed)
        : n_experts(count), n(rows), k(columns),
          device(static_cast<size_t>(count) *
                 (LR_CUDA(weight_bytes)(rows, columns, LR_F32) / 2 + static_cast<size_t>(gap)))
    {
        const size_t distance = device.n / static_cast<size_t>(count);
        for (size_t e = 0; e < static_cast<size_t>(count); e++) {
            const std::vector<float> w = take_numbers(n * k, 2.0f / sqrtf(static_cast<float>(k)), seed);
            panels.push_back(cpu_panels(w.data(), n, k));
            cpu.push_back({LR_F32, n, k, panels[e].data(), panels[e].size() * 4});
            cuda.push_back({LR_F32, n, k, device.data + e * distance, LR_CUDA(weight_bytes)(n, k, LR_F32)});
            LR_CUDA(weight_pack)(&cuda[e], 0, n, w.data());
        }
    }
};

/* base: offsets[0]; slack: how much n_rows lies above the true number of rows. */
static void check_experts(const std::vector<int64_t> &counts, int64_t d, int64_t ffn, lr_activation activation,
                          int64_t base, int64_t slack, uint64_t seed)
{
    char name[96];
    const int64_t n_experts = static_cast<int64_t>(counts.size());
    snprintf(name, sizeof name, "experts %lld, d %lld ffn %lld act %d", (long long)n_experts, (long long)d,
             (long long)ffn, activation);
    std::vector<int64_t> offsets = {base}, reference_offsets = {0};
    for (const int64_t count : counts) {
        offsets.push_back(offsets.back() + count);
        reference_offsets.push_back(offsets.back() - base);
    }
    const int64_t n_rows = offsets.back() - base, bound = n_rows + slack;
    const expert_weights gate(n_experts, ffn, d, 64, &seed), up(n_experts, ffn, d, 0, &seed);
    const expert_weights down(n_experts, d, ffn, 8, &seed);
    const std::vector<float> x = take_numbers(bound * d, 1.0f, &seed);
    struct lr_experts_args args = {};
    args.x = x.data();
    args.offsets = reference_offsets.data();
    args.n_experts = n_experts;
    args.n_rows = n_rows;
    args.gate = gate.cpu.data();
    args.up = up.cpu.data();
    args.down = down.cpu.data();
    args.activation = activation;
    std::vector<double> truth(static_cast<size_t>(n_rows * d)), hidden(static_cast<size_t>(ffn));
    lr_ref_experts(&args, hidden.data(), truth.data());

    const device_array<uint16_t> device_x(narrow(x));
    device_array<uint16_t> device_hidden(static_cast<size_t>(bound * ffn));
    device_array<uint16_t> y(static_cast<size_t>(bound * d)), alone(static_cast<size_t>(bound * d));
    const device_array<int64_t> device_offsets(offsets);
    args.x = device_x.data;
    args.y = y.data;
    args.hidden = device_hidden.data;
    args.offsets = device_offsets.data;
    args.n_rows = bound;
    args.gate = gate.cuda.data();
    args.up = up.cuda.data();
    args.down = down.cuda.data();
    LR_CUDA(experts)(&exec, &args);
    wait_device(name);
    const std::vector<uint16_t> all = y.get();
    std::vector<float> got = widen(all);
    got.resize(truth.size());
    check_distance(name, distance_from(got, truth), 6e-3);

    const int n_multiprocessors = lr_cuda_multiprocessors(&exec);
    for (const int n_pretended : {1, 100000}) { /* large tiles, small ones */
        y.poison();
        device_hidden.poison();
        lr_cuda_pretend_multiprocessors(&exec, n_pretended);
        LR_CUDA(experts)(&exec, &args);
        wait_device(name);
        check_true("experts on another number of multiprocessors", y.get() == all);
    }
    lr_cuda_pretend_multiprocessors(&exec, n_multiprocessors);

    /* every expert by itself, as a dense layer */
    for (int64_t e = 0; e < n_experts; e++) {
        const int64_t first = offsets[static_cast<size_t>(e)] - base, count = counts[static_cast<size_t>(e)];
        args.x = device_x.data + first * d;
        args.y = alone.data + first * d;
        args.offsets = nullptr;
        args.n_experts = 1;
        args.n_rows = count;
        args.gate = &gate.cuda[static_cast<size_t>(e)];
        args.up = &up.cuda[static_cast<size_t>(e)];
        args.down = &down.cuda[static_cast<size_t>(e)];
        LR_CUDA(experts)(&exec, &args);
    }
    wait_device(name);
    const std::vector<uint16_t> parts = alone.get();
    snprintf(name, sizeof name, "experts alone, d %lld ffn %lld", (long long)d, (long long)ffn);
    check_true(name, memcmp(all.data(), parts.data(), static_cast<size_t>(n_rows * d) * 2) == 0);
}

int main()
{
    open_device();
    uint64_t seed = 100;
    static const int64_t routers[][3] = {{1, 8, 2}, {500, 8, 2}, {333, 128, 8}, {50, 60, 4}, {20, 512, 10},
                                         {3, 4096, 40}, {9, 5, 5}, {7, 1, 1}, {21, 17, 3}};
    for (const auto &r : routers)
        for (int renormalize = 0; renormalize < 2 && (!test_is_short() || r[0] <= 50); renormalize++)
            check_router(r[0], r[1], r[2], renormalize, seed++);
    check_router_of_nonsense();
    static const int64_t sorts[][3] = {{0, 8, 2}, {1, 8, 2}, {513, 8, 2}, {16384, 128, 8}, {700, 4096, 40}, {33, 7, 7}};
    for (const auto &s : sorts)
        if (!test_is_short() || s[0] < 1000)
            check_sort(s[0], s[1], s[2], seed++);
    static const size_t widths[] = {2, 6, 16, 48, 512, 1000, 4096};
    for (const size_t width : widths)
        for (const int64_t n_rows : {1, 3, 16, 301})
            check_gather(width, n_rows, seed++);
    for (const int64_t n_rows : {1, 13, 200})
        if (!is_too_large(n_rows))
            for (const int64_t d : {1, 24, 40, 201, 256})
                for (const int64_t top_k : {0, 1, 2, 10})
                    for (int shared = 0; shared < 3; shared++)
                        check_combine(n_rows, d, top_k, shared, seed++);

    static const std::vector<int64_t> few = {0, 1, 63, 64, 65, 0, 127, 128, 129, 0}, one = {200}, ends = {3, 0, 0};
    check_experts(few, 256, 256, LR_ACT_SILU, 0, 0, seed++);
    check_experts(few, 64, 192, LR_ACT_SILU, 5, 300, seed++);
    check_experts(few, 72, 40, LR_ACT_GELU_TANH, 1000, 0, seed++);
    check_experts(one, 512, 384, LR_ACT_SILU, 0, 0, seed++);
    check_experts(one, 100, 36, LR_ACT_SILU, 0, 7, seed++);
    check_experts(ends, 20, 24, LR_ACT_GELU, 3, 2, seed++);
    check_experts(ends, 8, 8, LR_ACT_RELU, 0, 0, seed++);
    check_experts(std::vector<int64_t>(40, 3), 64, 64, LR_ACT_SILU, 0, 0, seed++);
    if (!test_is_short()) {
        check_experts({8500, 1, 8900, 0, 130}, 136, 72, LR_ACT_SILU, 0, 40, seed++); /* the large tiles */
        check_experts({2, 30, 1}, 2048, 768, LR_ACT_SILU, 0, 0, seed++);
    }
    return close_device("test_moe");
}
