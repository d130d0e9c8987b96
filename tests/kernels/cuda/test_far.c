/* Offsets beyond 32 bits: the last rows of every operand that has rows lie behind element 2^31 of their array, and give
 * the bytes that they give in arrays without gaps, whose results other tests hold against float64.
 *
 *   near   | row 0 | row 1 | ... | row 129 |
 *   far    | row 0 | ......... | row 1 | ......... | ... | row 129 |      2^24 and a few elements from row to row
 *
 * Arrays that have no stride are long: what is looked at lies at their end. Needs 30 GB of device memory; in a short run
 * the distances are small. */
#include "kernels/ref.h"
#include "tests/kernels/cuda/check.h"

enum { ROWS = 130, WIDTH = 256, HEADS = 4, HEAD_DIM = 64, MAX_LONG = 8, ACT_BYTES = 2, F32_BYTES = 4 };

static uint64_t seed = 2024;

/* ---- long arrays, zeroed; gone at the end of a case ---- */

static struct {
    void *base;
    size_t size;
} long_arrays[MAX_LONG];
static int n_long;

static void *take_long(int64_t n, size_t element_bytes)
{
    struct lr_error err;
    size_t size = (size_t)n * element_bytes;
    if (n_long == MAX_LONG)
        abort();
    check_ok(lr_cuda_memory.reserve(size, &long_arrays[n_long].base, &err), &err);
    long_arrays[n_long].size = size;
    return long_arrays[n_long++].base;
}

static void end_long(void)
{
    struct lr_error err;
    check_ok(lr_cuda_memory.wait(&check.exec, &err), &err);
    while (n_long-- > 0)
        lr_cuda_memory.release(long_arrays[n_long].base, long_arrays[n_long].size);
    n_long = 0;
}

/* A number of elements beyond what 31 bits count. */
static int64_t beyond(void)
{
    return (int64_t)1 << (test_is_short() ? 16 : 31);
}

/* ---- far rows ---- */

static int64_t far_stride(void)
{
    return (test_is_short() ? 4096 : 1 << 24) + 8;
}

static void *spread(const void *near, int64_t width, size_t element_bytes)
{
    char *far = take_long((ROWS - 1) * far_stride() + width, element_bytes);
    lr_cuda_memory.copy_rows(&check.exec, far, (size_t)far_stride() * element_bytes, near, (size_t)width * element_bytes,
                             (size_t)width * element_bytes, ROWS);
    return far;
}

static void same_rows(const char *what, const void *near, const void *far, int64_t width, size_t element_bytes)
{
    size_t row_bytes = (size_t)width * element_bytes;
    void *again = check_device(ROWS * row_bytes);
    lr_cuda_memory.copy_rows(&check.exec, again, row_bytes, far, (size_t)far_stride() * element_bytes, row_bytes, ROWS);
    check_same(what, near, again, ROWS * row_bytes);
}

static void *take_act(int64_t n)
{
    return check_device_act(check_floats(n, 1.0f, 1, &seed), n);
}

static float *take_f32(int64_t n)
{
    return check_device_copy(check_floats(n, 1.0f, 0, &seed), (size_t)n * F32_BYTES);
}

static void *copy_of(const void *device, size_t size_bytes)
{
    void *copy = check_device(size_bytes);
    lr_cuda_memory.copy(&check.exec, copy, device, size_bytes);
    return copy;
}

/* ---- rows ---- */

/* The one that the others lean on: against copies of single rows. */
static void far_copy_rows(void)
{
    unsigned char *rows = check_device_copy(check_floats(ROWS * WIDTH / 2, 1.0f, 0, &seed), ROWS * WIDTH * ACT_BYTES);
    char *far = spread(rows, WIDTH, ACT_BYTES);
    for (int64_t r = 0; r < ROWS; r++)
        check_same("a row", rows + r * WIDTH * ACT_BYTES, far + r * far_stride() * ACT_BYTES, WIDTH * ACT_BYTES);
    same_rows("and back", rows, far, WIDTH, ACT_BYTES);
    end_long();
}

static void far_rmsnorm(void)
{
    float *x = take_f32(ROWS * WIDTH);
    void *y = check_device(ROWS * WIDTH * ACT_BYTES), *far_y = spread(y, WIDTH, ACT_BYTES);
    struct lr_rmsnorm_args args = {.x = x,
                                   .x_stride = WIDTH,
                                   .w = take_f32(WIDTH),
                                   .y = y,
                                   .y_stride = WIDTH,
                                   .n_rows = ROWS,
                                   .n_cols = WIDTH,
                                   .eps = 1e-6f};
    LR_CUDA(rmsnorm)(&check.exec, &args);
    args.x = spread(x, WIDTH, F32_BYTES);
    args.y = far_y;
    args.x_stride = args.y_stride = far_stride();
    LR_CUDA(rmsnorm)(&check.exec, &args);
    same_rows("y", y, far_y, WIDTH, ACT_BYTES);
    end_long();
}

static void far_gated_rmsnorm(void)
{
    void *x = take_act(ROWS * WIDTH), *z = take_act(ROWS * WIDTH);
    void *y = check_device(ROWS * WIDTH * ACT_BYTES), *far_y = spread(y, WIDTH, ACT_BYTES);
    struct lr_gated_rmsnorm_args args = {.x = x,
                                         .x_stride = WIDTH,
                                         .z = z,
                                         .z_stride = WIDTH,
                                         .w = take_f32(HEAD_DIM),
                                         .y = y,
                                         .y_stride = WIDTH,
                                         .n_rows = ROWS,
                                         .n_heads = HEADS,
                                         .head_dim = HEAD_DIM,
                                         .eps = 1e-6f};
    LR_CUDA(gated_rmsnorm)(&check.exec, &args);
    args.x = spread(x, WIDTH, ACT_BYTES);
    args.z = spread(z, WIDTH, ACT_BYTES);
    args.y = far_y;
    args.x_stride = args.y_stride = args.z_stride = far_stride();
    LR_CUDA(gated_rmsnorm)(&check.exec, &args);
    same_rows("y", y, far_y, WIDTH, ACT_BYTES);
    end_long();
}

static void far_l2norm(void)
{
    void *x = take_act(ROWS * WIDTH), *far = spread(x, WIDTH, ACT_BYTES);
    struct lr_l2norm_args args = {
        .x = x, .x_stride = WIDTH, .n_rows = ROWS, .n_heads = HEADS, .head_dim = HEAD_DIM, .eps = 1e-6f, .scale = 0.5f};
    LR_CUDA(l2norm)(&check.exec, &args);
    args.x = far;
    args.x_stride = far_stride();
    LR_CUDA(l2norm)(&check.exec, &args);
    same_rows("x", x, far, WIDTH, ACT_BYTES);
    end_long();
}

static void far_norm_rope(void)
{
    void *x = take_act(ROWS * WIDTH), *far = spread(x, WIDTH, ACT_BYTES);
    struct lr_norm_rope_args args = {.x = x,
                                     .x_stride = WIDTH,
                                     .n_rows = ROWS,
                                     .n_heads = HEADS,
                                     .head_stride = HEAD_DIM,
                                     .head_dim = HEAD_DIM,
                                     .rotary_dim = 32,
                                     .w = take_f32(HEAD_DIM),
                                     .cos = take_f32(ROWS * 16),
                                     .sin = take_f32(ROWS * 16),
                                     .eps = 1e-6f};
    LR_CUDA(norm_rope)(&check.exec, &args);
    args.x = far;
    args.x_stride = far_stride();
    LR_CUDA(norm_rope)(&check.exec, &args);
    same_rows("x", x, far, WIDTH, ACT_BYTES);
    end_long();
}

static void far_conv(void)
{
    enum { TAPS = 4 };
    void *x = take_act(ROWS * WIDTH), *y = check_device(ROWS * WIDTH * ACT_BYTES), *far_y = spread(y, WIDTH, ACT_BYTES);
    struct lr_conv_args args = {.x = x,
                                .x_stride = WIDTH,
                                .w = take_f32(WIDTH * TAPS),
                                .tail = take_act(WIDTH * (TAPS - 1)),
                                .y = y,
                                .y_stride = WIDTH,
                                .n_rows = ROWS,
                                .n_channels = WIDTH,
                                .n_taps = TAPS};
    void *far_x = spread(x, WIDTH, ACT_BYTES);
    for (int silu = 0; silu < 2; silu++) { /* in two kernels */
        args.activation = silu ? LR_ACT_SILU : LR_ACT_NONE;
        args.x = x;
        args.y = y;
        args.x_stride = args.y_stride = WIDTH;
        LR_CUDA(conv)(&check.exec, &args);
        args.x = far_x;
        args.y = far_y;
        args.x_stride = args.y_stride = far_stride();
        LR_CUDA(conv)(&check.exec, &args);
        same_rows("y", y, far_y, WIDTH, ACT_BYTES);
    }
    end_long();
}

static void far_conv_step(void)
{
    enum { TAPS = 4, TAIL = WIDTH * (TAPS - 1) };
    void *x = take_act(ROWS * WIDTH), *y = check_device(ROWS * WIDTH * ACT_BYTES), *far_y = spread(y, WIDTH, ACT_BYTES);
    lr_act *tails[ROWS], *far_tails[ROWS];
    for (int r = 0; r < ROWS; r++) {
        tails[r] = take_act(TAIL);
        far_tails[r] = copy_of(tails[r], TAIL * ACT_BYTES);
    }
    struct lr_conv_step_args args = {.x = x,
                                     .x_stride = WIDTH,
                                     .w = take_f32(WIDTH * TAPS),
                                     .tails = tails,
                                     .y = y,
                                     .y_stride = WIDTH,
                                     .n_rows = ROWS,
                                     .n_channels = WIDTH,
                                     .n_taps = TAPS,
                                     .activation = LR_ACT_SILU};
    LR_CUDA(conv_step)(&check.exec, &args);
    args.x = spread(x, WIDTH, ACT_BYTES);
    args.y = far_y;
    args.x_stride = args.y_stride = far_stride();
    args.tails = far_tails;
    LR_CUDA(conv_step)(&check.exec, &args);
    same_rows("y", y, far_y, WIDTH, ACT_BYTES);
    end_long();
}

static void far_sigmoid_gate(void)
{
    void *x = take_act(ROWS * WIDTH), *gate = take_act(ROWS * WIDTH);
    void *y = check_device(ROWS * WIDTH * ACT_BYTES), *far_y = spread(y, WIDTH, ACT_BYTES);
    struct lr_sigmoid_gate_args args = {.x = x,
                                        .x_stride = WIDTH,
                                        .gate = gate,
                                        .gate_stride = WIDTH,
                                        .gate_head_stride = HEAD_DIM,
                                        .y = y,
                                        .y_stride = WIDTH,
                                        .n_rows = ROWS,
                                        .n_heads = HEADS,
                                        .head_dim = HEAD_DIM};
    LR_CUDA(sigmoid_gate)(&check.exec, &args);
    args.x = spread(x, WIDTH, ACT_BYTES);
    args.gate = spread(gate, WIDTH, ACT_BYTES);
    args.y = far_y;
    args.x_stride = args.y_stride = args.gate_stride = far_stride();
    LR_CUDA(sigmoid_gate)(&check.exec, &args);
    same_rows("y", y, far_y, WIDTH, ACT_BYTES);
    end_long();
}

static void far_delta_gates(void)
{
    size_t size = ROWS * HEADS * F32_BYTES;
    void *ba = take_act(ROWS * 2 * HEADS), *far = spread(ba, 2 * HEADS, ACT_BYTES);
    float *beta = check_device(size), *g = check_device(size);
    struct lr_delta_gates_args args = {.b = ba,
                                       .a = (uint16_t *)ba + HEADS,
                                       .ba_stride = 2 * HEADS,
                                       .a_log = take_f32(HEADS),
                                       .dt_bias = take_f32(HEADS),
                                       .beta = beta,
                                       .g = g,
                                       .n_rows = ROWS,
                                       .n_heads = HEADS};
    LR_CUDA(delta_gates)(&check.exec, &args);
    args.b = far;
    args.a = (uint16_t *)far + HEADS;
    args.ba_stride = far_stride();
    args.beta = check_device(size);
    args.g = check_device(size);
    LR_CUDA(delta_gates)(&check.exec, &args);
    check_same("beta", beta, args.beta, size);
    check_same("g", g, args.g, size);
    end_long();
}

static void far_delta_step(void)
{
    struct lr_delta_shape shape = {2, 4, HEAD_DIM, HEAD_DIM};
    enum { STATE = 4 * HEAD_DIM * HEAD_DIM, QKV = 8 * HEAD_DIM, OUT = 4 * HEAD_DIM };
    void *qkv = take_act(ROWS * QKV), *far = spread(qkv, QKV, ACT_BYTES);
    void *o = check_device(ROWS * OUT * ACT_BYTES), *far_o = spread(o, OUT, ACT_BYTES);
    float *states[ROWS], *far_states[ROWS];
    float *gates = check_floats(ROWS * 4, 1.0f, 0, &seed);
    for (int i = 0; i < ROWS * 4; i++)
        gates[i] = -fabsf(gates[i]);
    for (int r = 0; r < ROWS; r++) {
        states[r] = take_f32(STATE);
        far_states[r] = copy_of(states[r], STATE * F32_BYTES);
    }
    struct lr_delta_step_args args = {.shape = shape,
                                      .q = qkv,
                                      .k = (uint16_t *)qkv + 2 * HEAD_DIM,
                                      .v = (uint16_t *)qkv + 4 * HEAD_DIM,
                                      .qkv_stride = QKV,
                                      .g = check_device_copy(gates, ROWS * 4 * F32_BYTES),
                                      .beta = take_f32(ROWS * 4),
                                      .states = states,
                                      .o = o,
                                      .o_stride = OUT,
                                      .n_rows = ROWS};
    LR_CUDA(delta_step)(&check.exec, &args);
    args.q = far;
    args.k = (uint16_t *)far + 2 * HEAD_DIM;
    args.v = (uint16_t *)far + 4 * HEAD_DIM;
    args.o = far_o;
    args.qkv_stride = args.o_stride = far_stride();
    args.states = far_states;
    LR_CUDA(delta_step)(&check.exec, &args);
    same_rows("o", o, far_o, OUT, ACT_BYTES);
    check_same("the last state", states[ROWS - 1], far_states[ROWS - 1], STATE * F32_BYTES);
    end_long();
}

/* ---- attention ---- */

enum { TOKENS = 300, BLOCKS = 3, KV_HEADS = 2, KV_WIDTH = KV_HEADS * HEAD_DIM };
static const int64_t FAR_POSITION = (int64_t)1 << 33;

static struct lr_kv_shape kv_shape(void)
{
    return (struct lr_kv_shape){HEADS, KV_HEADS, HEAD_DIM, LR_CUDA_DTYPE};
}

static void *take_block(void)
{
    size_t size = LR_CUDA(kv_block_bytes)(kv_shape());
    void *block = check_device(size);
    lr_cuda_memory.zero(&check.exec, block, size);
    return block;
}

static void far_kv_store(void)
{
    void *k = take_act(ROWS * KV_WIDTH), *v = take_act(ROWS * KV_WIDTH);
    void *blocks[2][4], *row_blocks[ROWS];
    int64_t positions[ROWS];
    for (int i = 0; i < 4; i++) {
        blocks[0][i] = take_block();
        blocks[1][i] = take_block();
    }
    struct lr_kv_store_args args = {kv_shape(), k, KV_WIDTH, v, KV_WIDTH, ROWS, 0, blocks[0]};
    LR_CUDA(kv_store)(&check.exec, &args);
    void *far_k = spread(k, KV_WIDTH, ACT_BYTES), *far_v = spread(v, KV_WIDTH, ACT_BYTES);
    args = (struct lr_kv_store_args){kv_shape(), far_k, far_stride(), far_v, far_stride(), ROWS, FAR_POSITION, blocks[1]};
    LR_CUDA(kv_store)(&check.exec, &args);
    for (int64_t r = 0; r < ROWS; r++) {
        positions[r] = FAR_POSITION + r;
        row_blocks[r] = blocks[1][2 + r / LR_KV_BLOCK_TOKENS];
    }
    struct lr_kv_store_rows_args rows = {kv_shape(),   far_k, far_stride(), far_v,
                                         far_stride(), ROWS,  positions,    row_blocks};
    LR_CUDA(kv_store_rows)(&check.exec, &rows);
    for (int i = 0; i < 4; i++)
        check_same(i < 2 ? "a block" : "a block stored by rows", blocks[0][i % 2], blocks[1][i],
                   LR_CUDA(kv_block_bytes)(kv_shape()));
    end_long();
}

/* TOKENS tokens from `position` on. */
static struct lr_kv_list take_keys(const void *k, const void *v, int64_t position)
{
    struct lr_kv_ref *refs = check_host(BLOCKS * sizeof *refs);
    void **blocks = check_host(BLOCKS * sizeof *blocks);
    for (int i = 0; i < BLOCKS; i++) {
        blocks[i] = take_block();
        refs[i] = (struct lr_kv_ref){blocks[i], position + i * LR_KV_BLOCK_TOKENS,
                                     i < BLOCKS - 1 ? LR_KV_BLOCK_TOKENS : TOKENS % LR_KV_BLOCK_TOKENS, 0};
    }
    struct lr_kv_store_args args = {kv_shape(), k, KV_WIDTH, v, KV_WIDTH, TOKENS, position, blocks};
    LR_CUDA(kv_store)(&check.exec, &args);
    return (struct lr_kv_list){refs, BLOCKS};
}

static void far_attention(void)
{
    void *k = take_act(TOKENS * KV_WIDTH), *v = take_act(TOKENS * KV_WIDTH), *q = take_act(ROWS * WIDTH);
    void *y = check_device(ROWS * WIDTH * ACT_BYTES), *far_y = spread(y, WIDTH, ACT_BYTES);
    struct lr_kv_list near = take_keys(k, v, 0), far = take_keys(k, v, FAR_POSITION);
    int64_t positions[ROWS];
    for (int64_t r = 0; r < ROWS; r++)
        positions[r] = TOKENS - ROWS + r;
    struct lr_attention_args args = {.shape = kv_shape(),
                                     .q = q,
                                     .q_stride = WIDTH,
                                     .q_head_stride = HEAD_DIM,
                                     .n_rows = ROWS,
                                     .positions = positions,
                                     .scale = 0.5f,
                                     .window = 140,
                                     .lists = &near,
                                     .n_lists = 1,
                                     .first = 1,
                                     .m = check_device(ROWS * HEADS * F32_BYTES),
                                     .l = check_device(ROWS * HEADS * F32_BYTES),
                                     .o = check_device(ROWS * WIDTH * F32_BYTES),
                                     .y = y,
                                     .y_stride = WIDTH};
    LR_CUDA(attention)(&check.exec, &args);
    for (int64_t r = 0; r < ROWS; r++)
        positions[r] += FAR_POSITION;
    args.q = spread(q, WIDTH, ACT_BYTES);
    args.y = far_y;
    args.q_stride = args.y_stride = far_stride();
    args.lists = &far;
    LR_CUDA(attention)(&check.exec, &args);
    same_rows("y", y, far_y, WIDTH, ACT_BYTES);
    end_long();
}

/* One row's slot behind many empty ones, and merging them. */
static void far_partials(void)
{
    const int64_t n_slots = beyond() / WIDTH + 2, last = n_slots - 1, position = FAR_POSITION + TOKENS;
    void *q = take_act(WIDTH), *y[2] = {check_device(WIDTH * ACT_BYTES), check_device(WIDTH * ACT_BYTES)};
    struct lr_kv_list list = take_keys(take_act(TOKENS * KV_WIDTH), take_act(TOKENS * KV_WIDTH), FAR_POSITION);
    for (int far = 0; far < 2; far++) {
        const int64_t n = far ? n_slots : 1;
        struct lr_partial_item item = {far ? last : 0, 0, 1, &list, 1};
        struct lr_partials_args args = {.shape = kv_shape(),
                                        .q = q,
                                        .q_stride = WIDTH,
                                        .q_head_stride = HEAD_DIM,
                                        .n_rows = 1,
                                        .positions = &position,
                                        .scale = 0.5f,
                                        .items = &item,
                                        .n_items = 1,
                                        .n_slots = n,
                                        .m = take_long(n * HEADS, F32_BYTES),
                                        .l = take_long(n * HEADS, F32_BYTES),
                                        .o = take_long(n * WIDTH, F32_BYTES)};
        LR_CUDA(partials)(&check.exec, &args);
        struct lr_merge_args merge = {.n_rows = 1,
                                      .n_heads = HEADS,
                                      .head_dim = HEAD_DIM,
                                      .n_partials = n,
                                      .n_partials_total = n_slots,
                                      .m = args.m,
                                      .l = args.l,
                                      .o = args.o,
                                      .bound = check_device(HEADS * 2 * F32_BYTES),
                                      .sums = check_device(HEADS * (HEAD_DIM + 1) * sizeof(int64_t)),
                                      .y = y[far],
                                      .y_stride = WIDTH};
        LR_CUDA(merge_bounds)(&check.exec, &merge);
        LR_CUDA(merge_accumulate)(&check.exec, &merge);
        LR_CUDA(merge_finish)(&check.exec, &merge);
    }
    check_same("y", y[0], y[1], WIDTH * ACT_BYTES);
    float *got = check_download_act(y[1], WIDTH);
    check_that(isfinite(got[0]) && got[0] != 0.0f, "y is a number", 0);
    end_long();
}

/* ---- selection ---- */

/* Millions of blocks, all of them alike but for three. */
static void far_block_select(void)
{
    enum { D = 1024, TOP_K = 2 };
    const int64_t n_blocks = beyond() / D + 100, best[] = {5, n_blocks - 70, n_blocks - 2};
    float *means = take_long(n_blocks * D, F32_BYTES), *values = check_host(D * F32_BYTES);
    for (int i = 0; i < 3; i++) {
        for (int d = 0; d < D; d++)
            values[d] = i == 1 ? -1.0f : 1.0f + (float)i;
        check_upload(means + best[i] * D, values, D * F32_BYTES);
    }
    float *q = check_host(D * F32_BYTES);
    for (int d = 0; d < D; d++)
        q[d] = 1.0f;
    int32_t chosen[TOP_K], *device_chosen = check_device(sizeof chosen);
    struct lr_block_select_args args = {.shape = {1, 1, D, LR_CUDA_DTYPE},
                                        .q = check_device_act(q, D),
                                        .q_stride = D,
                                        .q_head_stride = D,
                                        .n_rows = 1,
                                        .position = n_blocks * LR_KV_BLOCK_TOKENS,
                                        .block_means = means,
                                        .n_blocks = n_blocks,
                                        .top_k = TOP_K,
                                        .chosen = device_chosen};
    LR_CUDA(block_select)(&check.exec, &args);
    check_download(chosen, device_chosen, sizeof chosen);
    check_that(chosen[0] == best[0] && chosen[1] == best[2], "the two best blocks", chosen[1]);
    end_long();
}

static void far_page_bounds(void)
{
    enum { D = 1024 };
    const int64_t n_pages = beyond() / D + 100;
    float *low = check_floats(D, 1.0f, 0, &seed), *high = check_host(D * F32_BYTES);
    for (int d = 0; d < D; d++)
        high[d] = low[d] + 0.25f;
    float *far_low = take_long(n_pages * D, F32_BYTES), *far_high = take_long(n_pages * D, F32_BYTES);
    check_upload(far_low + (n_pages - 1) * D, low, D * F32_BYTES);
    check_upload(far_high + (n_pages - 1) * D, high, D * F32_BYTES);
    float *bound = check_device(F32_BYTES), *bounds = check_device((size_t)n_pages * F32_BYTES);
    struct lr_page_bounds_args args = {.shape = {1, 1, D, LR_CUDA_DTYPE},
                                       .q = take_act(D),
                                       .q_stride = D,
                                       .q_head_stride = D,
                                       .n_rows = 1,
                                       .min = check_device_copy(low, D * F32_BYTES),
                                       .max = check_device_copy(high, D * F32_BYTES),
                                       .n_pages = 1,
                                       .bounds = bound};
    LR_CUDA(page_bounds)(&check.exec, &args);
    args.min = far_low;
    args.max = far_high;
    args.n_pages = n_pages;
    args.bounds = bounds;
    LR_CUDA(page_bounds)(&check.exec, &args);
    check_same("the last page's bound", bound, bounds + n_pages - 1, F32_BYTES);
    check_that(check_download_f32(bounds, n_pages)[n_pages - 2] == 0.0f, "an empty page's bound", n_pages - 2);
    end_long();
}

/* ---- embedding, experts' rows ---- */

static void far_embed(void)
{
    const int64_t d = test_is_short() ? 1 << 8 : 1 << 20, n = beyond() / d + 2;
    uint16_t *row = take_act(d), *table = take_long(n * d, ACT_BYTES);
    lr_cuda_memory.copy(&check.exec, table + (n - 1) * d, row, (size_t)d * ACT_BYTES);
    int32_t *ids = check_host((size_t)n * sizeof *ids), zero = 0;
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)(n - 1);
    float *near = check_device((size_t)d * F32_BYTES), *y = take_long(n * d, F32_BYTES);
    LR_CUDA(embed)(&check.exec, row, LR_CUDA_DTYPE, d, &zero, 1, near);
    LR_CUDA(embed)(&check.exec, table, LR_CUDA_DTYPE, d, ids, n, y);
    check_same("the first row", near, y, (size_t)d * F32_BYTES);
    check_same("the last row", near, y + (n - 1) * d, (size_t)d * F32_BYTES);
    end_long();
}

static void far_gather(void)
{
    for (int wide = 0; wide < 2; wide++) { /* pieces of 2 and of 16 bytes */
        const size_t row_bytes = wide ? 4096 : 4098;
        const int64_t n = beyond() * 2 / (int64_t)row_bytes + 3;
        char *row = take_act((int64_t)row_bytes / 2), *x = take_long(n, row_bytes), *y = take_long(n, row_bytes);
        lr_cuda_memory.copy(&check.exec, x + (size_t)(n - 1) * row_bytes, row, row_bytes);
        int64_t *rows = check_host((size_t)n * sizeof *rows);
        for (int64_t i = 0; i < n; i++)
            rows[i] = n - 1;
        LR_CUDA(gather_rows)
        (&check.exec, x, row_bytes, check_device_copy(rows, (size_t)n * sizeof *rows), n, y);
        check_same("the first row", row, y, row_bytes);
        check_same("the last row", row, y + (size_t)(n - 1) * row_bytes, row_bytes);
        end_long();
    }
}

static void far_combine(void)
{
    for (int odd = 0; odd < 2; odd++) { /* one column a thread, or eight */
        const int64_t d = odd ? 1021 : 1024, n = beyond() / d + 3;
        uint16_t *row = take_act(d), *y = take_long(n * d, ACT_BYTES);
        lr_cuda_memory.copy(&check.exec, y + (n - 1) * d, row, (size_t)d * ACT_BYTES);
        float *x = take_f32(d), *far_x = copy_of(x, (size_t)d * F32_BYTES), weight = 0.3f;
        int64_t first = 0, last = n - 1;
        struct lr_moe_combine_args args = {.x = x,
                                           .n_rows = 1,
                                           .d = d,
                                           .top_k = 1,
                                           .weights = check_device_copy(&weight, sizeof weight),
                                           .row_of = check_device_copy(&first, sizeof first),
                                           .y = row};
        LR_CUDA(moe_combine)(&check.exec, &args);
        args.x = far_x;
        args.row_of = check_device_copy(&last, sizeof last);
        args.y = y;
        LR_CUDA(moe_combine)(&check.exec, &args);
        check_same("x", x, far_x, (size_t)d * F32_BYTES);
        end_long();
    }
}

static void far_router(void)
{
    enum { EXPERTS = 512, K = 10 };
    const int64_t n = beyond() / EXPERTS + 1;
    float *row = take_f32(EXPERTS), *logits = take_long(n * EXPERTS, F32_BYTES);
    lr_cuda_memory.copy(&check.exec, logits + (n - 1) * EXPERTS, row, EXPERTS * F32_BYTES);
    int32_t *ids = check_device(K * 4), *far_ids = take_long(n * K, 4);
    float *weights = check_device(K * 4), *far_weights = take_long(n * K, 4);
    struct lr_router_args args = {row, 1, EXPERTS, K, 1, ids, weights};
    LR_CUDA(router)(&check.exec, &args);
    args = (struct lr_router_args){logits, n, EXPERTS, K, 1, far_ids, far_weights};
    LR_CUDA(router)(&check.exec, &args);
    check_same("ids", ids, far_ids + (n - 1) * K, K * 4);
    check_same("weights", weights, far_weights + (n - 1) * K, K * 4);
    end_long();
}

/* ---- products ---- */

static struct lr_weight take_weight(int64_t n, int64_t k)
{
    struct lr_weight w = {LR_F32, n, k, NULL, LR_CUDA(weight_bytes)(n, k, LR_F32)};
    w.data = check_device(w.size_bytes);
    LR_CUDA(weight_pack)(&w, 0, n, check_floats(n * k, 0.1f, 1, &seed));
    return w;
}

/* Narrow and wide y, with and without activation, in large tiles and in small ones. */
static void far_gemm(void)
{
    enum { K = 192 };
    struct lr_weight w = take_weight(WIDTH, K);
    void *a = take_act(ROWS * K), *far_a = spread(a, K, ACT_BYTES);
    char *far_y = take_long((ROWS - 1) * far_stride() + WIDTH, F32_BYTES);
    const int n_multiprocessors = lr_cuda_multiprocessors(&check.exec);
    for (int variant = 0; variant < 8; variant++) {
        const int wide = variant & 1;
        const size_t size = wide ? F32_BYTES : ACT_BYTES;
        void *y = take_f32(ROWS * WIDTH);
        lr_cuda_memory.copy_rows(&check.exec, far_y, (size_t)far_stride() * size, y, WIDTH * size, WIDTH * size, ROWS);
        struct lr_gemm_args args = {.a = a,
                                    .a_stride = K,
                                    .w = &w,
                                    .y = y,
                                    .y_stride = WIDTH,
                                    .n_rows = ROWS,
                                    .activation = variant & 2 ? LR_ACT_SILU : LR_ACT_NONE,
                                    .accumulate = wide,
                                    .wide = wide};
        lr_cuda_pretend_multiprocessors(&check.exec, variant & 4 ? 1 : 1000);
        LR_CUDA(gemm)(&check.exec, &args);
        args.a = far_a;
        args.y = far_y;
        args.a_stride = args.y_stride = far_stride();
        LR_CUDA(gemm)(&check.exec, &args);
        same_rows("y", y, far_y, WIDTH, size);
    }
    lr_cuda_pretend_multiprocessors(&check.exec, n_multiprocessors);
    end_long();
}

static void far_gemm_weight(void)
{
    enum { K = 4096, LAST = 200, N_ROWS = 65 };
    const int64_t n = beyond() / K + LAST;
    struct lr_weight near = take_weight(LAST, K), far = {LR_F32, n, K, NULL, LR_CUDA(weight_bytes)(n, K, LR_F32)};
    far.data = take_long(n * K, ACT_BYTES);
    lr_cuda_memory.copy(&check.exec, (uint16_t *)far.data + (n - LAST) * K, near.data, near.size_bytes);
    void *y = check_device(N_ROWS * LAST * ACT_BYTES), *again = check_device(N_ROWS * LAST * ACT_BYTES);
    struct lr_gemm_args args = {
        .a = take_act(N_ROWS * K), .a_stride = K, .w = &near, .y = y, .y_stride = LAST, .n_rows = N_ROWS};
    LR_CUDA(gemm)(&check.exec, &args);
    uint16_t *far_y = take_long(N_ROWS * n, ACT_BYTES);
    args.w = &far;
    args.y = far_y;
    args.y_stride = n;
    LR_CUDA(gemm)(&check.exec, &args);
    lr_cuda_memory.copy_rows(&check.exec, again, LAST * ACT_BYTES, far_y + n - LAST, (size_t)n * ACT_BYTES,
                             LAST * ACT_BYTES, N_ROWS);
    check_same("the last columns", y, again, N_ROWS * LAST * ACT_BYTES);
    end_long();
}

/* Two experts, far from each other, of which the second one's rows are the last of many. */
static void far_experts(void)
{
    enum { D = 1024, FFN = 64, LAST = 200, SIZE = D * FFN };
    const int64_t n = beyond() / D + LAST, distance = beyond() + 4 * SIZE;
    struct lr_weight first[3], second[3]; /* gate, up, down */
    uint16_t *weights = take_long(distance + 3 * SIZE, ACT_BYTES);
    struct lr_weight pairs[3][2];
    for (int i = 0; i < 3; i++) {
        first[i] = i < 2 ? take_weight(FFN, D) : take_weight(D, FFN);
        second[i] = i < 2 ? take_weight(FFN, D) : take_weight(D, FFN);
        pairs[i][0] = first[i];
        pairs[i][1] = second[i];
        pairs[i][0].data = weights + i * SIZE;
        pairs[i][1].data = weights + i * SIZE + distance;
        lr_cuda_memory.copy(&check.exec, pairs[i][0].data, first[i].data, SIZE * ACT_BYTES);
        lr_cuda_memory.copy(&check.exec, pairs[i][1].data, second[i].data, SIZE * ACT_BYTES);
    }
    void *x = take_act(LAST * D), *y = check_device(LAST * D * ACT_BYTES);
    struct lr_experts_args args = {.x = x,
                                   .y = y,
                                   .hidden = check_device(LAST * FFN * ACT_BYTES),
                                   .n_experts = 1,
                                   .n_rows = LAST,
                                   .gate = &second[0],
                                   .up = &second[1],
                                   .down = &second[2],
                                   .activation = LR_ACT_SILU};
    LR_CUDA(experts)(&check.exec, &args);
    uint16_t *far_x = take_long(n * D, ACT_BYTES), *far_y = take_long(n * D, ACT_BYTES);
    lr_cuda_memory.copy(&check.exec, far_x + (n - LAST) * D, x, LAST * D * ACT_BYTES);
    const int64_t offsets[] = {0, n - LAST, n};
    args = (struct lr_experts_args){.x = far_x,
                                    .y = far_y,
                                    .hidden = take_long(n * FFN, ACT_BYTES),
                                    .offsets = check_device_copy(offsets, sizeof offsets),
                                    .n_experts = 2,
                                    .n_rows = n,
                                    .gate = pairs[0],
                                    .up = pairs[1],
                                    .down = pairs[2],
                                    .activation = LR_ACT_SILU};
    LR_CUDA(experts)(&check.exec, &args);
    check_same("the last rows", y, far_y + (n - LAST) * D, LAST * D * ACT_BYTES);
    end_long();
}

int main(void)
{
    static const struct check_case cases[] = {
        {"copy_rows", far_copy_rows},
        {"rmsnorm", far_rmsnorm},
        {"gated_rmsnorm", far_gated_rmsnorm},
        {"l2norm", far_l2norm},
        {"norm_rope", far_norm_rope},
        {"conv", far_conv},
        {"conv_step", far_conv_step},
        {"sigmoid_gate", far_sigmoid_gate},
        {"delta_gates", far_delta_gates},
        {"delta_step", far_delta_step},
        {"kv_store", far_kv_store},
        {"attention", far_attention},
        {"partials and merge", far_partials},
        {"block_select", far_block_select},
        {"page_bounds", far_page_bounds},
        {"embed", far_embed},
        {"gather_rows", far_gather},
        {"moe_combine", far_combine},
        {"router", far_router},
        {"gemm", far_gemm},
        {"gemm: a weight", far_gemm_weight},
        {"experts", far_experts},
    };
    return check_main(cases, CHECK_COUNT(cases));
}
