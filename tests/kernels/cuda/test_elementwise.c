/* embed, rope_table, sigmoid_gate, delta_gates. The first two give the CPU's bits. */
#include "tests/kernels/cuda/rows.h"

static void embed(void)
{
    static const int64_t shapes[][2] = {{1, 1}, {5, 7}, {9, 64}, {33, 255}, {700, 256}, {3, 2048}, {40, 1026}};
    static const enum lr_dtype dtypes[] = {LR_F32, LR_BF16, LR_F16};
    enum { VOCAB = 50 };
    uint64_t seed = 21;
    for (int s = 0; s < CHECK_COUNT(shapes); s++)
        for (int t = 0; t < CHECK_COUNT(dtypes); t++)
            for (int odd = 0; odd < 2; odd++) {
                int64_t n_rows = shapes[s][0], d = shapes[s][1];
                if (is_too_large(n_rows))
                    continue;
                size_t size = lr_dtype_bytes(dtypes[t]);
                LABEL("embed %lld x %lld, %zu bytes", (long long)n_rows, (long long)d, size);
                unsigned char *table = check_host((size_t)(VOCAB * d + 1) * size);
                for (size_t i = 0; i < (size_t)(VOCAB * d + 1) * size; i++)
                    table[i] = (unsigned char)(check_bits(&seed) & (i % size == size - 1 ? 0xbbu : 0xffu)); /* finite */
                int32_t *ids = check_host((size_t)n_rows * sizeof *ids);
                for (int64_t i = 0; i < n_rows; i++)
                    ids[i] = i == 0 ? VOCAB - 1 : (int32_t)(check_bits(&seed) % VOCAB);
                const char *device = check_device_copy(table, (size_t)(VOCAB * d + odd) * size);
                float *y = place_f32(NULL, 1, n_rows * d, (struct layout){odd, 0});
                LR_CUDA(embed)(&check.exec, device + (size_t)odd * size, dtypes[t], d, ids, n_rows, y);
                float *got = check_download_f32(y, n_rows * d);
                for (int64_t i = 0; i < n_rows * d; i++) {
                    double want = lr_ref_load(table, ids[i / d] * d + i % d + odd, dtypes[t]);
                    check_that((double)got[i] == want, "an embedded element", i);
                }
                check_end();
            }
    LR_CUDA(embed)(&check.exec, NULL, LR_BF16, 64, NULL, 0, NULL);
}

static void rope_table(void)
{
    static const int64_t firsts[] = {0, 1000, 999990, 10000000, 4000000000};
    enum { ROWS = 333, FREQ = 33 };
    double inv_freq[FREQ];
    int64_t positions[ROWS];
    for (int j = 0; j < FREQ; j++)
        inv_freq[j] = pow(10000000.0, -(double)j / FREQ);
    for (int i = 0; i < CHECK_COUNT(firsts); i++) {
        LABEL("rope_table from %lld", (long long)firsts[i]);
        for (int t = 0; t < ROWS; t++)
            positions[t] = firsts[i] + (i % 2 ? t * 7919 : t);
        double factor = i == 2 ? 1.3465735902799727 : 1.0;
        size_t n = (size_t)ROWS * FREQ;
        float *want_cos = check_host(n * 4), *want_sin = check_host(n * 4);
        lr_rope_table(positions, ROWS, inv_freq, FREQ, factor, want_cos, want_sin);
        float *cos = check_device(n * 4), *sin = check_device(n * 4);
        LR_CUDA(rope_table)(&check.exec, positions, ROWS, inv_freq, FREQ, factor, cos, sin);
        same_floats("cos", want_cos, check_download_f32(cos, (int64_t)n), (int64_t)n);
        same_floats("sin", want_sin, check_download_f32(sin, (int64_t)n), (int64_t)n);
    }
}

/* More positions than one upload holds. */
static void rope_table_long(void)
{
    int64_t n = LR_CUDA_MAX_UPLOAD_BYTES / 8 + 1000;
    int64_t *positions = check_host((size_t)n * sizeof *positions);
    for (int64_t i = 0; i < n; i++)
        positions[i] = i;
    double inv_freq = 0.1;
    float *want_cos = check_host((size_t)n * 4), *want_sin = check_host((size_t)n * 4);
    lr_rope_table(positions, n, &inv_freq, 1, 1.0, want_cos, want_sin);
    float *cos = check_device((size_t)n * 4), *sin = check_device((size_t)n * 4);
    LR_CUDA(rope_table)(&check.exec, positions, n, &inv_freq, 1, 1.0, cos, sin);
    same_floats("cos", want_cos, check_download_f32(cos, n), n);
    same_floats("sin", want_sin, check_download_f32(sin, n), n);
}

static float *
run_gate(struct lr_sigmoid_gate_args args, const float *x, const float *gate, struct layout l, int64_t part)
{
    int64_t n_rows = args.n_rows, width = args.n_heads * args.head_dim;
    uint16_t *rows = place(x, n_rows, width, l);
    /* gates lie behind their queries: [head][q, gate] */
    float *pairs = check_host((size_t)(n_rows * width) * 2 * sizeof *pairs);
    for (int64_t i = 0; i < n_rows * width; i++) {
        pairs[i / args.head_dim * 2 * args.head_dim + i % args.head_dim] = NAN;
        pairs[i / args.head_dim * 2 * args.head_dim + args.head_dim + i % args.head_dim] = gate[i];
    }
    uint16_t *gates = place(pairs, n_rows, 2 * width, l) + args.head_dim;
    uint16_t *y = l.gap == 8 ? rows : place(NULL, n_rows, width, l);
    args.x_stride = args.y_stride = stride_of(l, width);
    args.gate_stride = stride_of(l, 2 * width);
    args.gate_head_stride = 2 * args.head_dim;
    for (int64_t first = 0; first < n_rows; first += part) {
        args.x = rows + first * args.x_stride;
        args.gate = gates + first * args.gate_stride;
        args.y = y + first * args.y_stride;
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        LR_CUDA(sigmoid_gate)(&check.exec, &args);
    }
    return fetch(y, n_rows, width, l);
}

static void sigmoid_gate(void)
{
    static const int64_t shapes[][3] = {{1, 1, 1}, {5, 3, 7}, {33, 2, 32}, {129, 16, 128}, {31, 8, 256}, {700, 5, 40}};
    uint64_t seed = 22;
    for (int s = 0; s < CHECK_COUNT(shapes); s++) {
        if (is_too_large(shapes[s][0]))
            continue;
        struct lr_sigmoid_gate_args args = {.n_rows = shapes[s][0], .n_heads = shapes[s][1], .head_dim = shapes[s][2]};
        int64_t width = args.n_heads * args.head_dim, n = args.n_rows * width;
        LABEL("sigmoid_gate %lld x %lld x %lld", (long long)args.n_rows, (long long)args.n_heads,
              (long long)args.head_dim);
        float *x = check_floats(n, 3.0f, 1, &seed), *gate = check_floats(n, 10.0f, 1, &seed);
        for (int64_t i = 0; i < n; i += 41)
            gate[i] = i % 2 ? 16384.0f : -16384.0f;
        struct lr_sigmoid_gate_args host = args;
        host.x = x, host.x_stride = host.gate_stride = width, host.gate = gate, host.gate_head_stride = args.head_dim;
        double *truth = check_host((size_t)n * sizeof *truth);
        lr_ref_sigmoid_gate(&host, truth);
        float *y = run_gate(args, x, gate, layouts[0], args.n_rows);
        check_act("y", y, truth, n, 1e-30);
        for (int l = first_layout(); l < CHECK_COUNT(layouts); l++)
            same_floats("another layout", y, run_gate(args, x, gate, layouts[l], args.n_rows), n);
        if (goes_by_rows(args.n_rows))
            same_floats("row by row", y, run_gate(args, x, gate, layouts[0], 1), n);
        same_floats("in parts", y, run_gate(args, x, gate, layouts[2], args.n_rows / 3 + 1), n);
        check_end();
    }
}

struct gates {
    float *beta, *g;
};

static struct gates
run_gates(struct lr_delta_gates_args args, const float *ba, int64_t width, struct layout l, int64_t part)
{
    int64_t n_rows = args.n_rows, n = n_rows * args.n_heads;
    const uint16_t *rows = place(ba, n_rows, width, l);
    float *beta = check_device((size_t)n * 4), *g = check_device((size_t)n * 4);
    int64_t a_column = args.a_index ? 0 : args.n_heads; /* without an index: all b, then all a */
    args.ba_stride = stride_of(l, width);
    for (int64_t first = 0; first < n_rows; first += part) {
        args.b = rows + first * args.ba_stride;
        args.a = rows + first * args.ba_stride + a_column;
        args.beta = beta + first * args.n_heads;
        args.g = g + first * args.n_heads;
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        LR_CUDA(delta_gates)(&check.exec, &args);
    }
    return (struct gates){check_download_f32(beta, n), check_download_f32(g, n)};
}

static void delta_gates(void)
{
    static const int64_t shapes[][2] = {{1, 1}, {5, 3}, {300, 16}, {1000, 32}, {77, 255}, {9, 300}, {3, 1000}};
    uint64_t seed = 23;
    for (int s = 0; s < CHECK_COUNT(shapes); s++)
        for (int indexed = 0; indexed < 2; indexed++) {
            int64_t n_rows = shapes[s][0], n_heads = shapes[s][1], width = 2 * n_heads + 3, n = n_rows * n_heads;
            if (is_too_large(n_rows))
                continue;
            LABEL("delta_gates %lld x %lld", (long long)n_rows, (long long)n_heads);
            float *ba = check_floats(n_rows * width, 6.0f, 1, &seed);
            for (int64_t i = 0; i < n_rows * width; i += 7)
                ba[i] = (float)((int64_t)(check_bits(&seed) % 800) - 400) / (i % 2 ? 1.0f : 16.0f);
            for (int64_t i = 0; i < n_rows * width; i++)
                ba[i] = check_from_act(check_to_act(ba[i]));
            float *a_log = check_floats(n_heads, 3.0f, 0, &seed), *dt_bias = check_floats(n_heads, 5.0f, 0, &seed);
            int32_t *b_index = check_host((size_t)n_heads * 4), *a_index = check_host((size_t)n_heads * 4);
            for (int64_t h = 0; h < n_heads; h++) {
                b_index[h] = (int32_t)(2 * h);
                a_index[h] = (int32_t)(2 * (n_heads - 1 - h) + 1);
            }
            struct lr_delta_gates_args args = {.n_rows = n_rows, .n_heads = n_heads}, host = args;
            host.b = ba, host.a = ba + (indexed ? 0 : n_heads), host.ba_stride = width;
            host.a_log = a_log, host.dt_bias = dt_bias;
            host.b_index = indexed ? b_index : NULL, host.a_index = indexed ? a_index : NULL;
            double *beta = check_host((size_t)n * 8), *g = check_host((size_t)n * 8);
            lr_ref_delta_gates(&host, beta, g);
            args.b_index = indexed ? check_device_copy(b_index, (size_t)n_heads * 4) : NULL;
            args.a_index = indexed ? check_device_copy(a_index, (size_t)n_heads * 4) : NULL;
            args.a_log = check_device_copy(a_log, (size_t)n_heads * 4);
            args.dt_bias = check_device_copy(dt_bias, (size_t)n_heads * 4);
            struct gates whole = run_gates(args, ba, width, layouts[0], n_rows);
            check_each("beta", whole.beta, n, beta, 1, n, 1e-6, 1e-37);
            check_each("g", whole.g, n, g, 1, n, 1e-5, 1e-37);
            for (int64_t i = 0; i < n; i++)
                check_that(whole.g[i] <= 0.0f && isfinite(whole.g[i]), "g is finite and not above 0", i);
            for (int l = 0; l < 2 * CHECK_COUNT(layouts); l++) {
                struct gates other = run_gates(args, ba, width, layouts[l / 2], l % 2 ? 1 + n_rows / (l + 1) : n_rows);
                same_floats("beta in another layout", whole.beta, other.beta, n);
                same_floats("g in another layout", whole.g, other.g, n);
            }
            check_end();
        }
}

static const struct check_case cases[] = {
    {"embed", embed},
    {"rope_table", rope_table},
    {"sigmoid_gate", sigmoid_gate},
    {"delta_gates", delta_gates},
    {"rope_table of two million positions", rope_table_long},
};

int main(void)
{
    return check_main(cases, CASES_TO_RUN(cases, 4));
}
