/* Attention over KV blocks on CUDA against the float64 truth: every head dimension, groups, one list and a list for
 * each query block, windows, sinks, chosen blocks and halves of blocks; folding in several calls, rows alone, partials
 * and their merge. */
#include "tests/kernels/cuda/check.h"

#include "kernels/ref.h"

enum { BLOCK = LR_KV_BLOCK_TOKENS, MAX_BLOCKS = 64, MAX_LISTS = 256, ROW_GAP = 8 };

/* Tokens [0, n_tokens) of one layer: on the device, and in the CPU's layout for the truth. */
struct document {
    struct lr_kv_shape shape;
    int64_t n_tokens, n_blocks;
    float *k, *v; /* [n_tokens, width + ROW_GAP], as the activation type holds them */
    uint16_t *device_k, *device_v;
    void *blocks[MAX_BLOCKS];
    struct lr_kv_ref refs[MAX_BLOCKS], ref_refs[MAX_BLOCKS]; /* on the device; for the truth */
};

static int64_t round16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

/* A block as kernels/ops.h describes the CPU's, float32. */
static float *pack_block(const struct document *d, int64_t block)
{
    int64_t dim = d->shape.head_dim, dv16 = round16(dim), head_floats = BLOCK * (dim + dv16);
    int64_t width = d->shape.n_kv_heads * dim + ROW_GAP;
    float *out = check_host((size_t)(d->shape.n_kv_heads * head_floats) * sizeof *out);
    memset(out, 0, (size_t)(d->shape.n_kv_heads * head_floats) * sizeof *out);
    for (int64_t token = 0; token < BLOCK && block * BLOCK + token < d->n_tokens; token++)
        for (int64_t h = 0; h < d->shape.n_kv_heads; h++)
            for (int64_t i = 0; i < dim; i++) {
                int64_t from = (block * BLOCK + token) * width + h * dim + i;
                out[h * head_floats + token / 16 * dim * 16 + i * 16 + token % 16] = d->k[from];
                out[h * head_floats + BLOCK * dim + token * dv16 + i] = d->v[from];
            }
    return out;
}

static struct document
take_document(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t n_tokens, float key_size, uint64_t *seed)
{
    struct document d = {.shape = {n_heads, n_kv_heads, head_dim, LR_CUDA_DTYPE}, .n_tokens = n_tokens};
    int64_t width = n_kv_heads * head_dim + ROW_GAP;
    d.n_blocks = (n_tokens + BLOCK - 1) / BLOCK;
    d.k = check_floats(n_tokens * width, key_size, 1, seed);
    d.v = check_floats(n_tokens * width, 1.0f, 1, seed);
    d.device_k = check_device_act(d.k, n_tokens * width);
    d.device_v = check_device_act(d.v, n_tokens * width);
    size_t block_bytes = LR_CUDA(kv_block_bytes)(d.shape);
    for (int64_t i = 0; i < d.n_blocks; i++) {
        int64_t left = n_tokens - i * BLOCK;
        d.blocks[i] = check_device(block_bytes);
        lr_cuda_memory.zero(&check.exec, d.blocks[i], block_bytes);
        d.refs[i] = (struct lr_kv_ref){d.blocks[i], i * BLOCK, (int32_t)(left < BLOCK ? left : BLOCK), 0};
        d.ref_refs[i] = d.refs[i];
        d.ref_refs[i].data = pack_block(&d, i);
    }
    /* in two calls with a seam inside a block */
    for (int64_t at = 0, n = n_tokens / 3; at < n_tokens; at += n, n = n_tokens - at) {
        struct lr_kv_store_args store = {.shape = d.shape,
                                         .k = d.device_k + at * width,
                                         .k_stride = width,
                                         .v = d.device_v + at * width,
                                         .v_stride = width,
                                         .n_rows = n,
                                         .position = at,
                                         .blocks = d.blocks + at / BLOCK};
        LR_CUDA(kv_store)(&check.exec, &store);
    }
    return d;
}

/* ---- storing by rows gives the blocks of storing them together ---- */

static void run_store_rows(void)
{
    static const int64_t dims[] = {16, 64, 72, 128, 256};
    uint64_t seed = 5;
    for (int i = 0; i < CHECK_COUNT(dims); i++) {
        struct document d = take_document(2, 2, dims[i], 300, 1.0f, &seed);
        size_t bytes = LR_CUDA(kv_block_bytes)(d.shape);
        int64_t positions[300], width = d.shape.n_kv_heads * dims[i] + ROW_GAP;
        void *blocks[300], *copies[3];
        for (int b = 0; b < 3; b++) {
            copies[b] = check_device(bytes);
            lr_cuda_memory.zero(&check.exec, copies[b], bytes);
        }
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t t = 0; t < 300; t++) {
                positions[t] = t;
                blocks[t] = t % 2 == pass ? copies[t / BLOCK] : NULL;
            }
            struct lr_kv_store_rows_args store = {.shape = d.shape,
                                                  .k = d.device_k,
                                                  .k_stride = width,
                                                  .v = d.device_v,
                                                  .v_stride = width,
                                                  .n_rows = 300,
                                                  .positions = positions,
                                                  .blocks = blocks};
            LR_CUDA(kv_store_rows)(&check.exec, &store);
        }
        for (int b = 0; b < 3; b++) {
            check_same("blocks stored by rows", d.blocks[b], copies[b], bytes);
            lr_cuda_memory.zero(&check.exec, copies[b], bytes);
        }
        for (int64_t t = 0; t < 300; t++) {
            struct lr_kv_store_args store = {.shape = d.shape,
                                             .k = d.device_k + t * width,
                                             .k_stride = width,
                                             .v = d.device_v + t * width,
                                             .v_stride = width,
                                             .n_rows = 1,
                                             .position = t,
                                             .blocks = copies + t / BLOCK};
            LR_CUDA(kv_store)(&check.exec, &store);
        }
        for (int b = 0; b < 3; b++)
            check_same("blocks stored token by token", d.blocks[b], copies[b], bytes);
    }
}

/* ---- attention ---- */

enum lists { ONE, EACH, HALVES }; /* one of all blocks; some blocks, or halves of blocks, for each query block */

struct attention_case {
    int64_t n_heads, n_kv_heads, head_dim, n_tokens, position, n_rows, window, sinks;
    enum lists lists;
    float q_size, key_size;
};

/* The lists of a case, for the device and for the truth. */
struct listing {
    int64_t n_lists;
    struct lr_kv_list lists[MAX_LISTS], ref_lists[MAX_LISTS];
};

/* Makes a ref one of a half of its block; 0 where that half has no keys. */
static int name_half(struct lr_kv_ref *ref, int64_t half)
{
    int32_t keys = ref->n_keys - (int32_t)half * (BLOCK / 2);
    ref->position += half * (BLOCK / 2);
    ref->n_keys = keys < BLOCK / 2 ? keys : BLOCK / 2;
    return keys > 0;
}

static struct listing take_lists(const struct attention_case *c, const struct document *d, uint64_t *seed)
{
    struct listing out = {.n_lists = 1};
    out.lists[0] = (struct lr_kv_list){d->refs, d->n_blocks};
    out.ref_lists[0] = (struct lr_kv_list){d->ref_refs, d->n_blocks};
    if (c->lists == ONE)
        return out;
    int64_t parts = c->lists == HALVES ? 2 : 1;
    out.n_lists = ((c->position + c->n_rows - 1) / BLOCK - c->position / BLOCK + 1) * c->n_kv_heads;
    for (int64_t i = 0; i < out.n_lists; i++) {
        struct lr_kv_ref *refs = check_host((size_t)(d->n_blocks * parts) * sizeof *refs);
        struct lr_kv_ref *ref_refs = check_host((size_t)(d->n_blocks * parts) * sizeof *ref_refs);
        int64_t n = 0;
        for (int64_t b = 0; b < d->n_blocks * parts; b++) {
            uint64_t bits = check_bits(seed);
            if (bits % 3 == 0 && i % 5 != 4) /* some lists hold everything */
                continue;
            refs[n] = d->refs[b / parts];
            ref_refs[n] = d->ref_refs[b / parts];
            refs[n].whole = ref_refs[n].whole = bits >> 32 & 1;
            if (parts == 2 && (!name_half(&refs[n], b % 2) || !name_half(&ref_refs[n], b % 2)))
                continue;
            n++;
        }
        if (i == 1)
            n = 0;
        out.lists[i] = (struct lr_kv_list){refs, n};
        out.ref_lists[i] = (struct lr_kv_list){ref_refs, n};
    }
    return out;
}

/* Poisoned outputs of rows x heads. */
struct outputs {
    float *m, *l, *o;
    uint16_t *y;
};

static struct outputs take_outputs(const struct lr_kv_shape *s, int64_t n_rows, int64_t y_stride)
{
    struct outputs out;
    size_t n = (size_t)(n_rows * s->n_heads);
    out.m = check_device(n * sizeof(float));
    out.l = check_device(n * sizeof(float));
    out.o = check_device(n * (size_t)s->head_dim * sizeof(float));
    out.y = check_device((size_t)(n_rows * y_stride) * sizeof(uint16_t));
    return out;
}

/* Rows [first, first + n) of the case, from the lists' blocks in `folds` calls. */
static void fold_rows(struct lr_attention_args args,
                      const struct listing *lists,
                      int64_t first,
                      int64_t n,
                      int folds,
                      struct outputs out,
                      int with_y)
{
    struct lr_kv_list parts[MAX_LISTS];
    int64_t skipped = args.positions[first] / BLOCK - args.positions[0] / BLOCK;
    int64_t from = lists->n_lists > 1 ? skipped * args.shape.n_kv_heads : 0, at = first * args.shape.n_heads;
    args.q = (const uint16_t *)args.q + first * args.q_stride;
    args.positions += first;
    args.n_rows = n;
    args.m = out.m + at;
    args.l = out.l + at;
    args.o = out.o + at * args.shape.head_dim;
    args.lists = parts;
    args.n_lists = lists->n_lists - from;
    for (int f = 0; f < folds; f++) {
        for (int64_t i = 0; i < args.n_lists; i++) {
            int64_t all = lists->lists[from + i].n_refs, begin = all * f / folds, end = all * (f + 1) / folds;
            parts[i] = (struct lr_kv_list){lists->lists[from + i].refs + begin, end - begin};
        }
        args.first = f == 0;
        args.y = with_y && f == folds - 1 ? out.y + first * args.y_stride : NULL;
        LR_CUDA(attention)(&check.exec, &args);
    }
}

static void check_lse(const struct outputs *out, const double *lse, int64_t n)
{
    float *m = check_download_f32(out->m, n), *l = check_download_f32(out->l, n);
    for (int64_t i = 0; i < n; i++) {
        double got = l[i] > 0.0f ? ((double)m[i] + log2((double)l[i])) * log(2.0) : -(double)INFINITY;
        check_that(got == lse[i] || fabs(got - lse[i]) < 1e-4 + 1e-6 * fabs(lse[i]), "lse", i);
        check_that(l[i] > 0.0f || (m[i] == -INFINITY && l[i] == 0.0f), "a row that sees nothing", i);
    }
}

static void run_case(const struct attention_case *c, uint64_t seed)
{
    struct document d = take_document(c->n_heads, c->n_kv_heads, c->head_dim, c->n_tokens, c->key_size, &seed);
    struct listing lists = take_lists(c, &d, &seed);
    int64_t head_stride = c->head_dim + 8, q_stride = c->n_heads * head_stride + 16, n = c->n_rows * c->n_heads;
    int64_t width = c->n_heads * c->head_dim, y_stride = width + ROW_GAP;
    float *q = check_floats(c->n_rows * q_stride, c->q_size, 1, &seed);
    int64_t *positions = check_host((size_t)c->n_rows * sizeof *positions);
    for (int64_t i = 0; i < c->n_rows; i++)
        positions[i] = c->position + i;
    struct lr_attention_args args = {.shape = d.shape,
                                     .q = q,
                                     .q_stride = q_stride,
                                     .q_head_stride = head_stride,
                                     .n_rows = c->n_rows,
                                     .positions = positions,
                                     .scale = 1.0f / sqrtf((float)c->head_dim),
                                     .window = c->window,
                                     .sinks = c->sinks,
                                     .lists = lists.ref_lists,
                                     .n_lists = lists.n_lists,
                                     .half_blocks = c->lists == HALVES,
                                     .y_stride = y_stride};
    args.shape.dtype = LR_F32;
    double *truth = check_host((size_t)(n * c->head_dim) * sizeof *truth), *lse = check_host((size_t)n * sizeof *lse);
    lr_ref_attention(&args, truth, lse);
    args.shape.dtype = LR_CUDA_DTYPE;
    args.q = check_device_act(q, c->n_rows * q_stride);

    struct outputs whole = take_outputs(&d.shape, c->n_rows, y_stride), state = take_outputs(&d.shape, c->n_rows, 1);
    fold_rows(args, &lists, 0, c->n_rows, 1, whole, 1);
    fold_rows(args, &lists, 0, c->n_rows, 1, state, 0);
    float *y = check_download_act(whole.y, c->n_rows * y_stride);
    check_norm("y", y, y_stride, truth, c->n_rows, width, 6e-3);
    for (int64_t i = 0; i < c->n_rows; i++)
        check_that(isnan(y[i * y_stride + width]), "the gap behind a row", i);
    check_lse(&whole, lse, n);
    check_lse(&state, lse, n);

    struct outputs folded = take_outputs(&d.shape, c->n_rows, y_stride);
    fold_rows(args, &lists, 0, c->n_rows, 3, folded, 0);
    check_same("three folds: m", state.m, folded.m, (size_t)n * 4);
    check_same("three folds: l", state.l, folded.l, (size_t)n * 4);
    check_same("three folds: o", state.o, folded.o, (size_t)(n * c->head_dim) * 4);
    fold_rows(args, &lists, 0, c->n_rows, 2, folded, 1);
    check_same("two folds: y", whole.y, folded.y, (size_t)(c->n_rows * y_stride) * 2);
    struct outputs parts = take_outputs(&d.shape, c->n_rows, y_stride);
    int64_t cuts[] = {0, 1, c->n_rows / 3, c->n_rows / 3 + 1, c->n_rows};
    for (int i = 0; i < 4; i++)
        if (cuts[i + 1] > cuts[i])
            fold_rows(args, &lists, cuts[i], cuts[i + 1] - cuts[i], 1, parts, 1);
    check_same("rows in parts", whole.y, parts.y, (size_t)(c->n_rows * y_stride) * 2);
    int n_multiprocessors = lr_cuda_multiprocessors(&check.exec);
    struct outputs elsewhere = take_outputs(&d.shape, c->n_rows, y_stride);
    lr_cuda_pretend_multiprocessors(&check.exec, 2);
    fold_rows(args, &lists, 0, c->n_rows, 1, elsewhere, 1);
    lr_cuda_pretend_multiprocessors(&check.exec, n_multiprocessors);
    check_same("two multiprocessors", whole.y, elsewhere.y, (size_t)(c->n_rows * y_stride) * 2);
}

static void run_cases(const struct attention_case *cases, int n)
{
    for (int i = 0; i < n; i++)
        run_case(&cases[i], 100 + (uint64_t)i);
}

static void run_dims(void)
{
    static const struct attention_case cases[] = {
        {4, 2, 64, 300, 0, 300, 0, 0, ONE, 2, 2},  {2, 1, 128, 300, 0, 300, 0, 0, ONE, 2, 2},
        {2, 1, 256, 300, 0, 300, 0, 0, ONE, 2, 2}, {2, 2, 16, 200, 0, 200, 0, 0, ONE, 2, 2},
        {2, 1, 32, 200, 0, 200, 0, 0, ONE, 2, 2},  {2, 1, 96, 200, 0, 200, 0, 0, ONE, 2, 2},
        {1, 1, 200, 200, 0, 200, 0, 0, ONE, 2, 2},
    };
    run_cases(cases, CASES_TO_RUN(cases, 4));
}

static void run_groups(void)
{
    static const struct attention_case cases[] = {
        {3, 1, 64, 500, 77, 300, 0, 0, ONE, 2, 2},    {5, 1, 128, 400, 130, 150, 0, 0, ONE, 2, 2},
        {16, 2, 64, 300, 200, 77, 0, 0, ONE, 2, 2},   {8, 8, 64, 260, 128, 132, 0, 0, ONE, 2, 2},
        {7, 1, 256, 260, 100, 100, 0, 0, ONE, 2, 2},  {64, 1, 64, 300, 290, 10, 0, 0, ONE, 2, 2},
        {16, 2, 128, 1100, 1099, 1, 0, 0, ONE, 2, 2},
    };
    run_cases(cases, CASES_TO_RUN(cases, 1));
}

static void run_windows(void)
{
    static const struct attention_case cases[] = {
        {2, 1, 64, 1500, 900, 300, 200, 0, ONE, 2, 2},    {2, 1, 128, 1500, 1000, 200, 129, 5, ONE, 2, 2},
        {2, 1, 128, 6000, 5800, 100, 1, 130, ONE, 2, 2},  {2, 1, 256, 1000, 600, 150, 300, 64, ONE, 2, 2},
        {4, 2, 64, 6000, 5600, 200, 256, 128, ONE, 2, 2},
    };
    run_cases(cases, CASES_TO_RUN(cases, 2));
}

static void run_lists(void)
{
    static const struct attention_case cases[] = {
        {4, 2, 64, 1500, 700, 500, 0, 0, EACH, 2, 2},     {4, 2, 64, 1500, 700, 500, 150, 100, EACH, 2, 2},
        {4, 1, 128, 1500, 640, 260, 300, 10, EACH, 2, 2}, {4, 2, 128, 1500, 100, 380, 0, 0, EACH, 2, 2},
        {4, 2, 256, 900, 500, 200, 200, 10, EACH, 2, 2},  {3, 3, 72, 900, 500, 300, 200, 10, EACH, 2, 2},
    };
    run_cases(cases, CASES_TO_RUN(cases, 1));
}

static void run_halves(void)
{
    static const struct attention_case cases[] = {
        {4, 2, 64, 1500, 700, 500, 0, 0, HALVES, 2, 2},     {4, 1, 64, 1475, 700, 500, 150, 100, HALVES, 2, 2},
        {4, 1, 128, 1500, 640, 260, 300, 10, HALVES, 2, 2}, {2, 2, 128, 1010, 100, 380, 0, 70, HALVES, 2, 2},
        {4, 2, 256, 900, 500, 200, 200, 10, HALVES, 2, 2},  {3, 3, 72, 900, 500, 300, 0, 0, HALVES, 8, 8},
    };
    run_cases(cases, CHECK_COUNT(cases));
}

/* Scores so far apart that a row's reference goes up again and again: by little, where the sum of a step's weights is
 * too large, and by much, where they overflow; in some rows of a warp only. */
static void run_rising(void)
{
    static const struct attention_case cases[] = {
        {4, 2, 64, 1500, 900, 300, 0, 0, ONE, 8, 8},    {4, 2, 64, 1500, 900, 300, 0, 0, ONE, 14, 14},
        {2, 1, 128, 1500, 900, 300, 0, 0, ONE, 7, 7},   {2, 1, 128, 1500, 900, 300, 200, 130, ONE, 12, 12},
        {2, 1, 256, 1000, 600, 300, 0, 0, ONE, 6, 6},   {2, 1, 256, 1000, 600, 300, 0, 0, ONE, 10, 10},
        {4, 2, 64, 1500, 900, 300, 0, 0, HALVES, 9, 9}, {2, 1, 128, 900, 500, 300, 0, 0, EACH, 9, 9},
    };
    run_cases(cases, CHECK_COUNT(cases));
}

static void run_extremes(void)
{
    static const struct attention_case cases[] = {
        {2, 1, 64, 700, 500, 200, 0, 0, ONE, 300, 300},  {2, 1, 128, 700, 500, 200, 300, 0, ONE, 1e4f, 1e2f},
        {2, 1, 256, 500, 300, 200, 0, 0, ONE, 100, 100}, {2, 1, 64, 700, 500, 200, 0, 0, ONE, 0, 2},
        {2, 1, 128, 129, 0, 1, 0, 0, ONE, 2, 2},         {2, 1, 64, 200, 0, 1, 0, 0, ONE, 1e-20f, 1e-20f},
    };
    run_cases(cases, CASES_TO_RUN(cases, 1));
}

/* ---- partials and their merge ---- */

struct partial_case {
    int64_t n_heads, n_kv_heads, head_dim, n_rows;
};

enum { PARTIAL_SLOTS = 5, PARTIAL_TOKENS = 1000 };

/* The truth of one row over one list for each KV head, as unnormalised as a partial is: y and lse. */
static void ref_row(const struct document *d,
                    const float *q,
                    int64_t q_stride,
                    int64_t row,
                    int64_t position,
                    const struct lr_kv_list *list,
                    double *y,
                    double *lse)
{
    struct lr_attention_args args = {.shape = d->shape,
                                     .q = q + row * q_stride,
                                     .q_stride = q_stride,
                                     .q_head_stride = d->shape.head_dim,
                                     .n_rows = 1,
                                     .positions = &position,
                                     .scale = 1.0f / sqrtf((float)d->shape.head_dim),
                                     .lists = list,
                                     .n_lists = 1};
    args.shape.dtype = LR_F32;
    lr_ref_attention(&args, y, lse);
}

static void check_merge(const struct lr_kv_shape *s, int64_t n_rows, const struct outputs *out)
{
    int64_t n = n_rows * s->n_heads, width = s->n_heads * s->head_dim, all = PARTIAL_SLOTS * n;
    float *m = check_download_f32(out->m, all), *l = check_download_f32(out->l, all);
    float *o = check_download_f32(out->o, all * s->head_dim), *turned[3];
    struct lr_merge_args args = {.n_rows = n_rows,
                                 .n_heads = s->n_heads,
                                 .head_dim = s->head_dim,
                                 .n_partials = PARTIAL_SLOTS,
                                 .n_partials_total = PARTIAL_SLOTS,
                                 .l = l,
                                 .o = o,
                                 .y_stride = width + ROW_GAP};
    float *natural = check_host((size_t)all * sizeof *natural);
    for (int64_t i = 0; i < all; i++)
        natural[i] = m[i] * 0.69314718f;
    args.m = natural;
    double *truth = check_host((size_t)(n * s->head_dim) * sizeof *truth);
    lr_ref_merge(&args, truth);
    /* the same partials in another order */
    const float *sources[3] = {m, l, o};
    for (int k = 0; k < 3; k++) {
        size_t one = (size_t)(n * (k == 2 ? s->head_dim : 1)) * sizeof(float);
        turned[k] = check_host(PARTIAL_SLOTS * one);
        for (int p = 0; p < PARTIAL_SLOTS; p++)
            memcpy((char *)turned[k] + (size_t)((p + 2) % PARTIAL_SLOTS) * one,
                   (const char *)sources[k] + (size_t)p * one, one);
        turned[k] = check_device_copy(turned[k], PARTIAL_SLOTS * one);
    }
    int64_t *sums[2];
    for (int pass = 0; pass < 2; pass++) {
        size_t y_bytes = (size_t)(n_rows * args.y_stride) * 2;
        args.m = pass ? turned[0] : out->m;
        args.l = pass ? turned[1] : out->l;
        args.o = pass ? turned[2] : out->o;
        args.bound = check_device((size_t)n * 2 * sizeof(float));
        args.sums = sums[pass] = check_device((size_t)(n * (s->head_dim + 1)) * sizeof(int64_t));
        args.y = check_device(y_bytes);
        LR_CUDA(merge_bounds)(&check.exec, &args);
        LR_CUDA(merge_accumulate)(&check.exec, &args);
        LR_CUDA(merge_finish)(&check.exec, &args);
        check_norm("merged", check_download_act(args.y, n_rows * args.y_stride), args.y_stride, truth, n_rows, width,
                   4e-3);
    }
    check_same("sums in any order", sums[0], sums[1], (size_t)(n * (s->head_dim + 1)) * sizeof(int64_t));
}

static void run_partial_case(const struct partial_case *c, uint64_t seed)
{
    struct document d = take_document(c->n_heads, c->n_kv_heads, c->head_dim, PARTIAL_TOKENS, 2.0f, &seed);
    int64_t q_stride = c->n_heads * c->head_dim, n = c->n_rows * c->n_heads, half = c->n_rows / 2;
    float *q = check_floats(c->n_rows * q_stride, 2.0f, 1, &seed);
    int64_t positions[512];
    for (int64_t i = 0; i < c->n_rows; i++)
        positions[i] = i == 0 ? 130 : 900 + (int64_t)(check_bits(&seed) % 100);
    /* slot 0: blocks 0, 1; slot 1: 2..4 for the first rows and 3 for the others; slot 2: by KV head; 3: nobody; 4: an
     * empty list */
    struct lr_kv_list lists[4 + 64], ref_lists[4 + 64];
    static const int64_t first[] = {0, 2, 3, 0}, count[] = {2, 3, 1, 0};
    for (int64_t i = 0; i < 4 + c->n_kv_heads; i++) {
        int64_t from = i < 4 ? first[i] : 5 + i % 2, length = i < 4 ? count[i] : d.n_blocks - from;
        lists[i] = (struct lr_kv_list){d.refs + from, length};
        ref_lists[i] = (struct lr_kv_list){d.ref_refs + from, length};
    }
    struct lr_partial_item items[] = {{0, 0, c->n_rows, &lists[0], 1},
                                      {1, 0, half, &lists[1], 1},
                                      {1, half, c->n_rows - half, &lists[2], 1},
                                      {2, 0, c->n_rows, &lists[4], c->n_kv_heads},
                                      {4, 0, c->n_rows, &lists[3], 1}};
    struct outputs out = take_outputs(&d.shape, PARTIAL_SLOTS * c->n_rows, 1);
    struct lr_partials_args args = {.shape = d.shape,
                                    .q = check_device_act(q, c->n_rows * q_stride),
                                    .q_stride = q_stride,
                                    .q_head_stride = c->head_dim,
                                    .n_rows = c->n_rows,
                                    .positions = positions,
                                    .scale = 1.0f / sqrtf((float)c->head_dim),
                                    .items = items,
                                    .n_items = CHECK_COUNT(items),
                                    .n_slots = PARTIAL_SLOTS,
                                    .m = out.m,
                                    .l = out.l,
                                    .o = out.o};
    LR_CUDA(partials)(&check.exec, &args);
    int64_t all = PARTIAL_SLOTS * n;
    float *m = check_download_f32(out.m, all), *l = check_download_f32(out.l, all);
    float *o = check_download_f32(out.o, all * c->head_dim);
    double *y = check_host((size_t)q_stride * sizeof *y), *lse = check_host((size_t)c->n_heads * sizeof *lse);
    int64_t group = c->n_heads / c->n_kv_heads;
    for (int64_t slot = 0; slot < PARTIAL_SLOTS; slot++)
        for (int64_t row = 0; row < c->n_rows; row += row < 3 ? 1 : 7)
            for (int64_t h = 0; h < c->n_heads; h++) {
                int64_t list = slot == 0 ? 0 : slot == 1 ? (row < half ? 1 : 2) : slot == 2 ? 4 + h / group : 3;
                int64_t at = (slot * c->n_rows + row) * c->n_heads + h;
                if (h == 0 || slot == 2)
                    ref_row(&d, q, q_stride, row, positions[row], &ref_lists[list], y, lse);
                double got = l[at] > 0.0f ? ((double)m[at] + log2((double)l[at])) * log(2.0) : -(double)INFINITY;
                check_that(got == lse[h] || fabs(got - lse[h]) < 1e-4, "lse of a partial", at);
                for (int64_t i = 0; i < c->head_dim; i++)
                    o[at * c->head_dim + i] = l[at] > 0.0f ? o[at * c->head_dim + i] / l[at] : o[at * c->head_dim + i];
                check_norm("a partial", o + at * c->head_dim, c->head_dim, y + h * c->head_dim, 1, c->head_dim, 6e-3);
            }
    /* rows on their own, and the same slots from items in another order */
    struct outputs alone = take_outputs(&d.shape, PARTIAL_SLOTS * c->n_rows, 1);
    struct lr_partial_item singles[2048];
    int64_t n_singles = 0;
    for (int i = CHECK_COUNT(items) - 1; i >= 0; i--)
        for (int64_t row = items[i].first_row; row < items[i].first_row + items[i].n_rows; row++)
            singles[n_singles++] = (struct lr_partial_item){items[i].slot, row, 1, items[i].lists, items[i].n_lists};
    args.items = singles;
    args.n_items = n_singles;
    args.m = alone.m;
    args.l = alone.l;
    args.o = alone.o;
    LR_CUDA(partials)(&check.exec, &args);
    check_same("rows alone: m", out.m, alone.m, (size_t)all * 4);
    check_same("rows alone: l", out.l, alone.l, (size_t)all * 4);
    check_same("rows alone: o", out.o, alone.o, (size_t)(all * c->head_dim) * 4);
    check_merge(&d.shape, c->n_rows, &out);
}

static void run_partials(void)
{
    static const struct partial_case cases[] = {{4, 2, 64, 32},  {4, 2, 64, 1}, {4, 2, 64, 130}, {16, 2, 128, 20},
                                                {8, 1, 256, 33}, {3, 3, 72, 5}, {32, 8, 128, 3}, {6, 2, 32, 100}};
    for (int i = 0; i < CASES_TO_RUN(cases, 2); i++)
        run_partial_case(&cases[i], 1000 + (uint64_t)i);
}

/* ---- nothing to do ---- */

static void run_nothing(void)
{
    struct lr_attention_args attention = {.shape = {2, 1, 64, LR_CUDA_DTYPE}};
    struct lr_partials_args partials = {.shape = {2, 1, 64, LR_CUDA_DTYPE}, .n_slots = 3};
    struct lr_kv_store_args store = {.shape = {2, 1, 64, LR_CUDA_DTYPE}};
    struct lr_merge_args merge = {.n_heads = 2, .head_dim = 64};
    LR_CUDA(attention)(&check.exec, &attention);
    LR_CUDA(partials)(&check.exec, &partials);
    LR_CUDA(kv_store)(&check.exec, &store);
    LR_CUDA(merge_bounds)(&check.exec, &merge);
    LR_CUDA(merge_accumulate)(&check.exec, &merge);
    LR_CUDA(merge_finish)(&check.exec, &merge);
}

int main(void)
{
    static const struct check_case cases[] = {
        {"storing by rows", run_store_rows},
        {"attention: head dimensions", run_dims},
        {"attention: groups and first positions", run_groups},
        {"attention: windows and sinks", run_windows},
        {"attention: a list for each query block", run_lists},
        {"attention: lists of halves of blocks", run_halves},
        {"attention: rising scores", run_rising},
        {"attention: extreme scores", run_extremes},
        {"partials and merge", run_partials},
        {"no rows", run_nothing},
    };
    return check_main(cases, CHECK_COUNT(cases));
}
