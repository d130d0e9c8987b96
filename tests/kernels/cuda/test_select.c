/* block_summary, block_select, page_bounds. */
#include "tests/kernels/cuda/rows.h"

enum { BLOCK = LR_KV_BLOCK_TOKENS };

/* ---- summaries ---- */

/* keys [128, n_kv_heads, d] of one block in the CPU's layout (float32), and in the device's. */
static float *cpu_block(struct lr_kv_shape s, const float *keys)
{
    int64_t head = BLOCK * (s.head_dim + (s.head_dim + 15) / 16 * 16);
    float *block = check_host((size_t)(s.n_kv_heads * head) * sizeof *block);
    for (int64_t i = 0; i < BLOCK * s.n_kv_heads * s.head_dim; i++) {
        int64_t c = i % s.head_dim, h = i / s.head_dim % s.n_kv_heads, token = i / s.head_dim / s.n_kv_heads;
        block[h * head + token / 16 * s.head_dim * 16 + c * 16 + token % 16] = keys[i];
    }
    return block;
}

static void *cuda_block(struct lr_kv_shape s, const float *keys)
{
    int64_t panels = s.head_dim / 64, n = s.n_kv_heads * 2 * panels * BLOCK * 64;
    uint16_t *block = check_host((size_t)n * sizeof *block);
    memset(block, 0xff, (size_t)n * sizeof *block); /* values are NaN: they are not read */
    for (int64_t i = 0; i < BLOCK * s.n_kv_heads * s.head_dim; i++) {
        int64_t c = i % s.head_dim, h = i / s.head_dim % s.n_kv_heads, token = i / s.head_dim / s.n_kv_heads;
        int64_t panel = (h * 2 * panels + c / 64) * BLOCK * 64, piece = c % 64 / 8 ^ token % 8;
        block[panel + token * 64 + piece * 8 + c % 8] = check_to_act(keys[i]);
    }
    return check_device_copy(block, (size_t)n * sizeof *block);
}

static void block_summary(void)
{
    static const int64_t shapes[][2] = {{1, 64}, {2, 128}, {4, 64}, {2, 256}};
    static const int32_t n_keys[] = {128, 1, 127, 64, 17, 128, 16};
    enum { N = CHECK_COUNT(n_keys) };
    uint64_t seed = 41;
    for (int i = 0; i < CHECK_COUNT(shapes); i++) {
        struct lr_kv_shape s = {
            .n_heads = shapes[i][0], .n_kv_heads = shapes[i][0], .head_dim = shapes[i][1], .dtype = LR_F32};
        int64_t n = N * s.n_kv_heads * s.head_dim;
        LABEL("block_summary %lld heads of %lld", (long long)s.n_kv_heads, (long long)s.head_dim);
        struct lr_kv_ref refs[N], cpu_refs[N];
        for (int b = 0; b < N; b++) {
            float *keys = check_floats(BLOCK * s.n_kv_heads * s.head_dim, b == 3 ? (float)ACT_LARGE : 2.0f, 1, &seed);
            for (int64_t j = n_keys[b] * s.n_kv_heads * s.head_dim; j < BLOCK * s.n_kv_heads * s.head_dim; j++)
                keys[j] = 0.0f;
            refs[b] = (struct lr_kv_ref){cuda_block(s, keys), b * BLOCK, n_keys[b], 0};
            cpu_refs[b] = (struct lr_kv_ref){cpu_block(s, keys), b * BLOCK, n_keys[b], 0};
        }
        double *mean = check_host((size_t)n * 8), *min = check_host((size_t)n * 8), *max = check_host((size_t)n * 8);
        struct lr_block_summary_args args = {.shape = s, .blocks = cpu_refs, .n_blocks = N};
        lr_ref_block_summary(&args, mean, min, max);
        args.blocks = refs;
        args.shape.dtype = LR_CUDA_DTYPE;
        args.mean = check_device((size_t)n * 4);
        args.min = check_device((size_t)n * 4);
        args.max = check_device((size_t)n * 4);
        LR_CUDA(block_summary)(&check.exec, &args);
        float *got = check_download_f32(args.mean, n);
        for (int b = 0; b < N; b++) {
            int64_t size = s.n_kv_heads * s.head_dim;
            check_each("mean", got + b * size, size, mean + b * size, 1, size, 1e-5, b == 3 ? ACT_LARGE * 1e-6 : 1e-6);
        }
        check_each("min", check_download_f32(args.min, n), n, min, 1, n, 0.0, 0.0);
        check_each("max", check_download_f32(args.max, n), n, max, 1, n, 0.0, 0.0);
        /* one block alone, and only its mean */
        struct lr_block_summary_args alone = {.shape = args.shape, .blocks = refs + 2, .n_blocks = 1};
        alone.mean = check_device((size_t)(n / N) * 4);
        LR_CUDA(block_summary)(&check.exec, &alone);
        same_floats("a block alone", got + 2 * n / N, check_download_f32(alone.mean, n / N), n / N);
        check_end();
    }
}

/* ---- selection ---- */

struct select_case {
    int64_t n_heads, n_kv_heads, head_dim, n_rows, position, window, sinks, n_blocks, top_k;
    int ties; /* scores of few values */
};

static const struct select_case select_cases[] = {
    {1, 1, 64, 1, 0, 0, 0, 0, 4, 0},
    {2, 1, 64, 128, 0, 0, 0, 1, 4, 0},
    {4, 2, 128, 300, 128 * 70, 256, 128, 72, 8, 0},
    {8, 2, 256, 129, 128 * 200, 1024, 128, 201, 16, 0},
    {2, 2, 72, 130, 128 * 300, 640, 1, 302, 300, 1},
    {2, 1, 64, 200, 128 * 50000, 1024, 128, 50002, 4096, 1},
    {8, 2, 128, 640, 128 * 100, 1000, 100, 105, 200, 0}, /* more wanted than there are */
    {4, 4, 64, 1000, 128 * 500, 0, 0, 507, 37, 1},
    {2, 1, 64, 128 * 70, 128 * 1000, 1024, 128, 1070, 64, 0},
    {16, 2, 128, 200, 128 * 79998, 1024, 128, 80000, 1000, 0},
    {2, 2, 1024, 128, 128 * 33, 0, 0, 33, 5, 0},
};

struct selection {
    struct lr_block_select_args args;
    const float *q;
    const float *means;
};

static int32_t *run_select(const struct selection *in, struct layout l, int64_t part)
{
    struct lr_block_select_args args = in->args;
    int64_t width = args.shape.n_heads * args.shape.head_dim, n_rows = args.n_rows, position = args.position;
    int64_t n = (n_rows + BLOCK - 1) / BLOCK * args.shape.n_kv_heads * args.top_k;
    const uint16_t *q = place(in->q, n_rows, width, l);
    int32_t *chosen = check_device((size_t)n * 4), *host = check_host((size_t)n * 4);
    args.q_stride = stride_of(l, width);
    args.q_head_stride = args.shape.head_dim;
    args.block_means = in->means;
    for (int64_t first = 0; first < n_rows; first += part) {
        args.q = q + first * args.q_stride;
        args.position = position + first;
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        args.chosen = chosen + first / BLOCK * args.shape.n_kv_heads * args.top_k;
        LR_CUDA(block_select)(&check.exec, &args);
    }
    check_download(host, chosen, (size_t)n * 4);
    return host;
}

/* Are these the best? Every one that is chosen is as good, but for rounding, as every one that is not; with ties in
 * exact arithmetic (sums of small integers) the lower block goes first. */
static void check_choice(const struct select_case *c, const double *scores, const int32_t *chosen, int64_t query_block)
{
    int64_t reach = (c->position / BLOCK + query_block) * BLOCK - c->window, n = 0, i = 0;
    int64_t first = (c->sinks + BLOCK - 1) / BLOCK, end = reach > 0 ? reach / BLOCK : 0;
    end = end < c->n_blocks ? end : c->n_blocks;
    int64_t n_candidates = end > first ? end - first : 0, want = n_candidates < c->top_k ? n_candidates : c->top_k;
    double worst_chosen = (double)INFINITY, best_left = -(double)INFINITY, size = 0.0;
    int64_t last_worst = -1, first_best = -1;
    while (n < c->top_k && chosen[n] >= 0)
        n++;
    check_that(n == want, "as many are chosen as there are", n);
    for (int64_t j = n; j < c->top_k; j++)
        check_that(chosen[j] == -1, "padded with -1", j);
    for (int64_t j = 0; j < n; j++)
        check_that(chosen[j] >= first && chosen[j] < end && (j == 0 || chosen[j] > chosen[j - 1]),
                   "candidates, ascending", j);
    for (int64_t b = first; b < end; b++) {
        size = fmax(size, fabs(scores[b]));
        if (i < n && chosen[i] == b) {
            i++;
            if (scores[b] <= worst_chosen) {
                worst_chosen = scores[b];
                last_worst = b;
            }
        } else if (scores[b] > best_left) {
            best_left = scores[b];
            first_best = b;
        }
    }
    check_that(worst_chosen >= best_left - (c->ties ? 0.0 : size * 1e-5), "the best are chosen", query_block);
    if (c->ties && worst_chosen == best_left)
        check_that(last_worst < first_best, "of equal ones the lower block", first_best);
}

static void block_select(void)
{
    uint64_t seed = 42;
    for (int i = 0; i < CASES_TO_RUN(select_cases, 6); i++) {
        struct select_case c = select_cases[i];
        int64_t width = c.n_heads * c.head_dim, n_means = c.n_blocks * c.n_kv_heads * c.head_dim;
        int64_t n_query_blocks = (c.n_rows + BLOCK - 1) / BLOCK;
        LABEL("block_select %lld heads of %lld, %lld rows, %lld of %lld blocks", (long long)c.n_heads,
              (long long)c.head_dim, (long long)c.n_rows, (long long)c.top_k, (long long)c.n_blocks);
        float *q = check_floats(c.n_rows * width, 1.0f, 1, &seed), *means = check_floats(n_means, 1.0f, 0, &seed);
        for (int64_t j = 0; c.ties && j < c.n_rows * width; j++)
            q[j] = j % width % c.head_dim < 2 ? (float)(j / width % 2) : 0.0f; /* sums are small integers */
        for (int64_t j = 0; c.ties && j < n_means; j++)
            means[j] = (float)((int64_t)(check_bits(&seed) % 9) - 4);
        struct selection in = {.q = q, .means = check_device_copy(means, (size_t)n_means * 4)};
        in.args = (struct lr_block_select_args){
            .shape = {.n_heads = c.n_heads, .n_kv_heads = c.n_kv_heads, .head_dim = c.head_dim, .dtype = LR_CUDA_DTYPE},
            .n_rows = c.n_rows,
            .position = c.position,
            .window = c.window,
            .sinks = c.sinks,
            .n_blocks = c.n_blocks,
            .top_k = c.top_k};
        int32_t *chosen = run_select(&in, layouts[0], c.n_rows);
        double *scores = check_host((size_t)(c.n_blocks + 1) * sizeof *scores);
        double *sum = check_host((size_t)c.head_dim * sizeof *sum);
        for (int64_t pair = 0; pair < n_query_blocks * c.n_kv_heads; pair++) {
            int64_t first = pair / c.n_kv_heads * BLOCK, kv_head = pair % c.n_kv_heads,
                    group = c.n_heads / c.n_kv_heads;
            memset(sum, 0, (size_t)c.head_dim * sizeof *sum);
            for (int64_t row = first; row < first + BLOCK && row < c.n_rows; row++)
                for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
                    for (int64_t d = 0; d < c.head_dim; d++)
                        sum[d] += (double)q[row * width + h * c.head_dim + d];
            for (int64_t b = 0; b < c.n_blocks; b++) {
                scores[b] = 0.0;
                for (int64_t d = 0; d < c.head_dim; d++)
                    scores[b] += sum[d] * (double)means[(b * c.n_kv_heads + kv_head) * c.head_dim + d];
            }
            check_choice(&c, scores, chosen + pair * c.top_k, pair / c.n_kv_heads);
        }
        size_t size = (size_t)(n_query_blocks * c.n_kv_heads * c.top_k) * 4;
        check_that(memcmp(chosen, run_select(&in, layouts[2], c.n_rows), size) == 0, "an odd layout", 0);
        check_that(memcmp(chosen, run_select(&in, layouts[1], BLOCK), size) == 0, "one query block at a time", 0);
        check_end();
    }
}

/* ---- bounds ---- */

static void page_bounds(void)
{
    /* heads, KV heads, head_dim, rows, pages */
    static const int64_t shapes[][5] = {{1, 1, 1, 1, 1},      {4, 2, 64, 3, 77},   {8, 2, 128, 17, 33},
                                        {16, 2, 256, 9, 100}, {6, 3, 40, 5, 1000}, {2, 1, 512, 2, 50},
                                        {2, 2, 1024, 20, 9},  {4, 1, 77, 11, 12}};
    uint64_t seed = 43;
    for (int i = 0; i < CHECK_COUNT(shapes); i++) {
        struct lr_page_bounds_args args = {
            .shape = {.n_heads = shapes[i][0], .n_kv_heads = shapes[i][1], .head_dim = shapes[i][2], .dtype = LR_CUDA_DTYPE},
            .n_rows = shapes[i][3],
            .n_pages = shapes[i][4]};
        struct lr_kv_shape s = args.shape;
        int64_t width = s.n_heads * s.head_dim, n = args.n_rows * s.n_kv_heads * args.n_pages;
        int64_t n_keys = args.n_pages * s.n_kv_heads * s.head_dim;
        LABEL("page_bounds %lld heads of %lld, %lld rows, %lld pages", (long long)s.n_heads, (long long)s.head_dim,
              (long long)args.n_rows, (long long)args.n_pages);
        float *q = check_floats(args.n_rows * width, 2.0f, 1, &seed), *low = check_floats(n_keys, 2.0f, 0, &seed);
        float *high = check_floats(n_keys, 1.0f, 0, &seed);
        for (int64_t j = 0; j < n_keys; j++)
            high[j] = low[j] + fabsf(high[j]);
        args.q = q, args.q_stride = width, args.q_head_stride = s.head_dim, args.min = low, args.max = high;
        double *truth = check_host((size_t)n * 8);
        lr_ref_page_bounds(&args, truth);
        float *bounds = NULL;
        for (int l = 0; l < CHECK_COUNT(layouts); l++) {
            const uint16_t *rows = place(q, args.n_rows, width, layouts[l]);
            struct lr_page_bounds_args a = args;
            a.q_stride = stride_of(layouts[l], width);
            a.min = place_f32(low, 1, n_keys, layouts[l]);
            a.max = place_f32(high, 1, n_keys, layouts[l]);
            float *out = check_device((size_t)n * 4);
            int64_t part = l == 3 ? 1 : args.n_rows;
            for (int64_t first = 0; first < args.n_rows; first += part) {
                a.q = rows + first * a.q_stride;
                a.n_rows = part;
                a.bounds = out + first * s.n_kv_heads * args.n_pages;
                LR_CUDA(page_bounds)(&check.exec, &a);
            }
            float *got = check_download_f32(out, n);
            if (bounds)
                same_floats("another layout, rows alone", bounds, got, n);
            else
                check_each("bounds", bounds = got, n, truth, 1, n, 1e-5, 1e-4);
        }
        check_end();
    }
}

static const struct check_case cases[] = {
    {"block_summary", block_summary},
    {"block_select", block_select},
    {"page_bounds", page_bounds},
};

int main(void)
{
    return check_main(cases, CHECK_COUNT(cases));
}
