/* Dense layers on CUDA against the float64 truth: odd shapes, narrow outputs, strides, bias, activations, the residual;
 * and the bits of a row do not depend on the rows beside it. */
#include "tests/kernels/cuda/test_gemm.h"

/* n x k weights, on both sides. */
struct weights {
    std::vector<float> panels;
    device_array<uint16_t> device;
    struct lr_weight cpu, cuda;

    weights(const std::vector<float> &rows, int64_t n, int64_t k)
        : panels(cpu_panels(rows.data(), n, k)), device(LR_CUDA(weight_bytes)(n, k, LR_F32) / 2)
    {
        cpu = {LR_F32, n, k, panels.data(), panels.size() * 4};
        cuda = {LR_F32, n, k, device.data, device.n * 2};
        LR_CUDA(weight_pack)(&cuda, 0, n / 2, rows.data());
        LR_CUDA(weight_pack)(&cuda, n / 2, n - n / 2, rows.data() + n / 2 * k);
    }
};

struct gemm_case {
    int64_t n_rows, n, k;
    int64_t a_gap, y_gap; /* elements behind a row */
    bool bias;
    lr_activation activation;
    int accumulate, wide;
};

constexpr float GAP = 12345.0f;

/* y as float32 whatever its type; what lies in the gaps must not change. */
static void check_gemm(const gemm_case &c, uint64_t seed)
{
    char name[160];
    snprintf(name, sizeof name, "gemm %lld x %lld x %lld gaps %lld %lld%s act %d acc %d wide %d", (long long)c.n_rows,
             (long long)c.n, (long long)c.k, (long long)c.a_gap, (long long)c.y_gap, c.bias ? " bias" : "",
             c.activation, c.accumulate, c.wide);
    const int64_t a_stride = c.k + c.a_gap, y_stride = c.n + c.y_gap;
    std::vector<float> a = take_numbers(c.n_rows * a_stride, 1.0f, &seed);
    std::vector<float> w = take_numbers(c.n * c.k, 2.0f / sqrtf(static_cast<float>(c.k)), &seed);
    std::vector<float> bias = take_numbers(c.n, 1.0f, &seed), y = take_numbers(c.n_rows * y_stride, 1.0f, &seed);
    const float nothing = c.accumulate ? 0.0f : NAN; /* poison */
    for (int64_t t = 0; t < c.n_rows; t++)
        for (int64_t j = 0; j < y_stride; j++) {
            float &v = y[static_cast<size_t>(t * y_stride + j)];
            v = j < c.n ? v + nothing : from_half(to_half(GAP));
        }
    const weights weight(w, c.n, c.k);
    struct lr_gemm_args args = {};
    args.a = a.data();
    args.a_stride = a_stride;
    args.w = &weight.cpu;
    args.bias = c.bias ? bias.data() : nullptr;
    args.y = y.data();
    args.y_stride = y_stride;
    args.n_rows = c.n_rows;
    args.activation = c.activation;
    args.accumulate = c.accumulate;
    args.wide = c.wide;
    std::vector<double> truth(static_cast<size_t>(c.n_rows * c.n));
    lr_ref_gemm(&args, truth.data());

    const device_array<uint16_t> device_a(narrow(a)), narrow_y(narrow(y));
    const device_array<float> device_bias(bias), wide_y(y);
    args.a = device_a.data;
    args.w = &weight.cuda;
    args.bias = c.bias ? device_bias.data : nullptr;
    args.y = c.wide ? static_cast<void *>(wide_y.data) : narrow_y.data;
    LR_CUDA(gemm)(&exec, &args);
    wait_device(name);
    const std::vector<float> all = c.wide ? wide_y.get() : widen(narrow_y.get());
    std::vector<float> got;
    bool gaps_whole = true;
    for (int64_t t = 0; t < c.n_rows; t++)
        for (int64_t j = 0; j < y_stride; j++) {
            const float v = all[static_cast<size_t>(t * y_stride + j)];
            if (j < c.n)
                got.push_back(v);
            else
                gaps_whole &= v == from_half(to_half(GAP));
        }
    check_true(name, gaps_whole);
    check_distance(name, distance_from(got, truth), c.wide ? 2e-5 : 3e-3);
}

/* All rows at once, and some of them alone: the same bytes. */
static void check_bits(int64_t n, int64_t k, int wide, uint64_t seed)
{
    const int64_t ROWS = test_is_short() ? 320 : 4096;
    static const int64_t parts[][2] = {{0, 1}, {0, 63}, {0, 64}, {0, 128}, {1, 1}, {37, 100}, {4095, 1}, {130, 2000},
                                       {64, 4032}, {3, 4090}};
    const size_t size = wide ? 4 : 2;
    const weights weight(take_numbers(n * k, 0.1f, &seed), n, k);
    const device_array<uint16_t> a(narrow(take_numbers(ROWS * k, 1.0f, &seed)));
    device_array<uint8_t> y(static_cast<size_t>(ROWS * n) * size);
    struct lr_gemm_args args = {};
    args.w = &weight.cuda;
    args.a_stride = k;
    args.y_stride = n;
    args.wide = wide;
    args.a = a.data;
    args.y = y.data;
    args.n_rows = ROWS;
    LR_CUDA(gemm)(&exec, &args);
    wait_device("bits");
    const std::vector<uint8_t> want = y.get();
    const int n_multiprocessors = lr_cuda_multiprocessors(&exec);
    for (const int n_pretended : {1, 5, 100000}) { /* large tiles, some of each, small ones */
        y.poison();
        lr_cuda_pretend_multiprocessors(&exec, n_pretended);
        LR_CUDA(gemm)(&exec, &args);
        wait_device("bits");
        check_true("bits on another number of multiprocessors", y.get() == want);
    }
    lr_cuda_pretend_multiprocessors(&exec, n_multiprocessors);
    for (const auto &part : parts) {
        if (part[0] + part[1] > ROWS)
            continue;
        y.poison();
        args.a = a.data + part[0] * k;
        args.n_rows = part[1];
        LR_CUDA(gemm)(&exec, &args);
        wait_device("bits");
        const std::vector<uint8_t> got = y.get();
        char name[96];
        snprintf(name, sizeof name, "bits n %lld k %lld wide %d rows %lld + %lld", (long long)n, (long long)k, wide,
                 (long long)part[0], (long long)part[1]);
        const size_t row_bytes = static_cast<size_t>(n) * size, n_bytes = static_cast<size_t>(part[1]) * row_bytes;
        check_true(name, memcmp(got.data(), want.data() + static_cast<size_t>(part[0]) * row_bytes, n_bytes) == 0);
        bool rest_whole = true;
        for (size_t i = n_bytes; i < got.size(); i++)
            rest_whole &= got[i] == 0xff;
        check_true("rows behind the last were written", rest_whole);
    }
}

/* Conversions on the way to the device: every half is rounded as a float32 of its value would be. */
static void check_pack()
{
    constexpr int64_t N = 64, K = 1021;
    uint64_t seed = 77;
    std::vector<uint16_t> narrowed(N * K);
    std::vector<float> wide(N * K);
    for (size_t i = 0; i < narrowed.size(); i++) {
        do
            narrowed[i] = static_cast<uint16_t>(next_bits(&seed));
        while ((narrowed[i] & 0x7c00) == 0x7c00);
        wide[i] = static_cast<float>(lr_ref_load(narrowed.data(), static_cast<int64_t>(i), LR_F16));
    }
    const device_array<uint16_t> a(LR_CUDA(weight_bytes)(N, K, LR_F16) / 2), b(a.n), c(a.n);
    struct lr_weight w = {LR_F16, N, K, a.data, a.n * 2};
    LR_CUDA(weight_pack)(&w, 0, N, narrowed.data());
    w = {LR_F32, N, K, b.data, b.n * 2};
    LR_CUDA(weight_pack)(&w, 0, N, wide.data());
    const std::vector<uint16_t> rounded = narrow(wide);
    w = {LR_CUDA_DTYPE, N, K, c.data, c.n * 2};
    LR_CUDA(weight_pack)(&w, 0, N, rounded.data());
    const std::vector<uint16_t> got = a.get();
    check_true("half and float32 weights differ", got == b.get());
    check_true("weights of float32 and of the activation type differ", got == c.get());
    bool padded = true;
    for (size_t i = 0; i < got.size(); i++)
        padded &= i % 1024 < K ? got[i] == rounded[i / 1024 * K + i % 1024] : got[i] == 0;
    check_true("weight layout", padded);
}

int main()
{
    static const gemm_case cases[] = {
        {128, 256, 64, 0, 0, false, LR_ACT_NONE, 0, 1},      {128, 256, 64, 0, 0, false, LR_ACT_NONE, 0, 0},
        {1, 1, 256, 0, 0, false, LR_ACT_NONE, 0, 1},         {70, 8, 256, 0, 0, false, LR_ACT_NONE, 0, 1},
        {65, 776, 256, 0, 0, false, LR_ACT_NONE, 0, 0},      {129, 300, 200, 8, 4, false, LR_ACT_NONE, 0, 0},
        {64, 64, 8, 0, 0, false, LR_ACT_NONE, 0, 0},         {63, 100, 72, 16, 3, false, LR_ACT_NONE, 0, 0},
        {200, 513, 1000, 0, 0, false, LR_ACT_NONE, 0, 1},    {7, 33, 20, 4, 0, false, LR_ACT_NONE, 0, 0},
        {5, 17, 13, 0, 2, true, LR_ACT_GELU, 1, 0},          {5, 17, 13, 0, 0, true, LR_ACT_SILU, 1, 1},
        {130, 768, 1024, 0, 0, true, LR_ACT_NONE, 0, 0},     {100, 130, 256, 0, 6, true, LR_ACT_SILU, 0, 0},
        {100, 136, 256, 0, 0, true, LR_ACT_GELU, 0, 0},      {100, 136, 256, 0, 0, true, LR_ACT_GELU_TANH, 0, 0},
        {100, 136, 256, 0, 0, true, LR_ACT_RELU, 0, 1},      {190, 256, 256, 0, 0, false, LR_ACT_NONE, 1, 1},
        {190, 256, 256, 0, 8, true, LR_ACT_NONE, 1, 0},      {190, 255, 256, 0, 0, true, LR_ACT_SILU, 1, 1},
        {1, 2048, 2048, 0, 0, false, LR_ACT_NONE, 0, 0},     {2, 255, 4096, 0, 0, false, LR_ACT_NONE, 0, 1},
        {6000, 700, 40, 0, 0, true, LR_ACT_NONE, 1, 1},      {6000, 701, 24, 0, 0, true, LR_ACT_NONE, 0, 0},
        {6000, 704, 40, 0, 0, true, LR_ACT_NONE, 1, 0},      {17000, 100, 64, 0, 4, false, LR_ACT_NONE, 0, 0},
    };
    open_device();
    check_pack();
    uint64_t seed = 1;
    for (const gemm_case &c : cases)
        if (!test_is_short() || c.n_rows < 1000)
            check_gemm(c, seed++);
    static const int64_t shapes[][2] = {{1, 256}, {8, 256}, {776, 256}, {2048, 2048}, {300, 200}, {17, 36}};
    for (const auto &shape : shapes)
        for (int wide = 0; wide < 2 && (!test_is_short() || shape[0] < 1000); wide++)
            check_bits(shape[0], shape[1], wide, seed++);
    struct lr_gemm_args none = {};
    LR_CUDA(gemm)(&exec, &none);
    wait_device("no rows");
    return close_device("test_gemm");
}
