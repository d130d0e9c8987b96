/* rmsnorm, gated_rmsnorm, norm_rope, l2norm against float64: sizes that fill a spread and sizes that do not, aligned
 * and not, rows alone and together. */
#include "tests/kernels/cuda/rows.h"

/* Row 1 tiny, row 2 huge, row 3 zero: norms forgive all of them. */
static float *take_rows(int64_t n_rows, int64_t width, int rounded, uint64_t *seed)
{
    float *x = check_floats(n_rows * width, 3.0f, rounded, seed);
    for (int64_t i = 0; i < n_rows * width; i++) {
        double factor = i / width == 1 ? 1.0 / ACT_LARGE : i / width == 2 ? ACT_LARGE : i / width == 3 ? 0.0 : 1.0;
        x[i] = (float)(x[i] * factor);
        x[i] = rounded ? check_from_act(check_to_act(x[i])) : x[i];
    }
    return x;
}

/* ---- rmsnorm ---- */

static float *run_rmsnorm(struct lr_rmsnorm_args args, const float *x, const float *w, struct layout l, int64_t part)
{
    int64_t n_rows = args.n_rows, n = args.n_cols;
    const float *rows = place_f32(x, n_rows, n, l);
    uint16_t *y = place(NULL, n_rows, n, l);
    args.w = place_f32(w, 1, n, l);
    args.x_stride = args.y_stride = stride_of(l, n);
    for (int64_t first = 0; first < n_rows; first += part) {
        args.x = rows + first * args.x_stride;
        args.y = y + first * args.y_stride;
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        LR_CUDA(rmsnorm)(&check.exec, &args);
    }
    return fetch(y, n_rows, n, l);
}

static void rmsnorm(void)
{
    static const int64_t shapes[][2] = {{1, 1},     {5, 7},    {9, 64},   {17, 255}, {17, 256},  {3, 257},
                                        {6, 500},   {300, 512}, {7, 1000}, {5, 1024}, {5, 1028}, {33, 2048}, {6, 2052},
                                        {4, 4096},  {3, 5120}, {2, 8192}, {2, 8193}, {3, 20000}};
    uint64_t seed = 11;
    for (int s = 0; s < CHECK_COUNT(shapes); s++) {
        int64_t n_rows = shapes[s][0], n = shapes[s][1];
        if (is_too_large(n_rows))
            continue;
        LABEL("rmsnorm %lld x %lld", (long long)n_rows, (long long)n);
        float *x = take_rows(n_rows, n, 0, &seed), *w = check_floats(n, 1.0f, 0, &seed);
        struct lr_rmsnorm_args args = {.n_rows = n_rows, .n_cols = n, .eps = 1e-6f, .plus_one = s % 2};
        double *truth = check_host((size_t)(n_rows * n) * sizeof *truth);
        struct lr_rmsnorm_args host = args;
        host.x = x, host.x_stride = n, host.w = w;
        lr_ref_rmsnorm(&host, truth);
        float *y = run_rmsnorm(args, x, w, layouts[0], n_rows);
        check_act("y", y, truth, n_rows * n, 1e-30);
        for (int l = first_layout(); l < CHECK_COUNT(layouts); l++)
            same_floats("another layout", y, run_rmsnorm(args, x, w, layouts[l], n_rows), n_rows * n);
        if (goes_by_rows(n_rows))
            same_floats("row by row", y, run_rmsnorm(args, x, w, layouts[0], 1), n_rows * n);
        same_floats("in parts", y, run_rmsnorm(args, x, w, layouts[2], n_rows / 3 + 1), n_rows * n);
        check_end();
    }
    LR_CUDA(rmsnorm)(&check.exec, &(struct lr_rmsnorm_args){.n_cols = 64});
}

/* ---- heads ---- */

struct heads_shape {
    int64_t n_rows, n_heads, head_dim;
};

static const struct heads_shape heads_shapes[] = {
    {1, 1, 1},   {1, 1, 128},  {5, 3, 7},   {33, 2, 32}, {33, 5, 64}, {65, 3, 72},  {129, 16, 128}, {7, 32, 128},
    {3, 7, 200}, {31, 4, 256}, {9, 3, 264}, {5, 2, 512}, {4, 3, 515}, {3, 1, 1024}, {2, 2, 1000},
};

static float *run_gated(
    struct lr_gated_rmsnorm_args args, const float *x, const float *z, const float *w, struct layout l, int64_t part)
{
    int64_t n_rows = args.n_rows, width = args.n_heads * args.head_dim;
    uint16_t *rows = place(x, n_rows, width, l), *gate = place(z, n_rows, width, l);
    args.w = place_f32(w, 1, args.head_dim, l);
    args.x_stride = args.z_stride = args.y_stride = stride_of(l, width);
    uint16_t *y = l.gap == 8 ? rows : place(NULL, n_rows, width, l); /* y may be x */
    for (int64_t first = 0; first < n_rows; first += part) {
        args.x = rows + first * args.x_stride;
        args.z = gate + first * args.z_stride;
        args.y = y + first * args.y_stride;
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        LR_CUDA(gated_rmsnorm)(&check.exec, &args);
    }
    return fetch(y, n_rows, width, l);
}

static void gated_rmsnorm(void)
{
    uint64_t seed = 12;
    for (int s = 0; s < CHECK_COUNT(heads_shapes); s++) {
        struct heads_shape shape = heads_shapes[s];
        if (is_too_large(shape.n_rows))
            continue;
        int64_t width = shape.n_heads * shape.head_dim, n = shape.n_rows * width;
        LABEL("gated_rmsnorm %lld x %lld x %lld", (long long)shape.n_rows, (long long)shape.n_heads,
              (long long)shape.head_dim);
        float *x = take_rows(shape.n_rows, width, 1, &seed), *z = check_floats(n, 8.0f, 1, &seed);
        float *w = check_floats(shape.head_dim, 1.0f, 0, &seed);
        for (int64_t i = 0; i < n; i += 37)
            z[i] = i % 2 ? 1e4f : -1e4f;
        for (int64_t i = 0; i < n; i++)
            z[i] = check_from_act(check_to_act(z[i]));
        struct lr_gated_rmsnorm_args args = {
            .n_rows = shape.n_rows, .n_heads = shape.n_heads, .head_dim = shape.head_dim, .eps = 1e-6f};
        struct lr_gated_rmsnorm_args host = args;
        host.x = x, host.z = z, host.w = w, host.x_stride = host.z_stride = width;
        double *truth = check_host((size_t)n * sizeof *truth);
        lr_ref_gated_rmsnorm(&host, truth);
        float *y = run_gated(args, x, z, w, layouts[0], shape.n_rows);
        check_act("y", y, truth, n, 1e-30);
        for (int l = first_layout(); l < CHECK_COUNT(layouts); l++)
            same_floats("another layout", y, run_gated(args, x, z, w, layouts[l], shape.n_rows), n);
        if (goes_by_rows(shape.n_rows))
            same_floats("row by row", y, run_gated(args, x, z, w, layouts[0], 1), n);
        same_floats("in parts", y, run_gated(args, x, z, w, layouts[3], shape.n_rows / 3 + 1), n);
        check_end();
    }
}

static float *run_l2norm(struct lr_l2norm_args args, const float *x, struct layout l, int64_t part)
{
    int64_t n_rows = args.n_rows, width = args.n_heads * args.head_dim;
    uint16_t *rows = place(x, n_rows, width, l);
    args.x_stride = stride_of(l, width);
    for (int64_t first = 0; first < n_rows; first += part) {
        args.x = rows + first * args.x_stride;
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        LR_CUDA(l2norm)(&check.exec, &args);
    }
    return fetch(rows, n_rows, width, l);
}

static void l2norm(void)
{
    uint64_t seed = 13;
    for (int s = 0; s < CHECK_COUNT(heads_shapes); s++) {
        struct heads_shape shape = heads_shapes[s];
        if (is_too_large(shape.n_rows))
            continue;
        int64_t width = shape.n_heads * shape.head_dim, n = shape.n_rows * width;
        LABEL("l2norm %lld x %lld x %lld", (long long)shape.n_rows, (long long)shape.n_heads,
              (long long)shape.head_dim);
        float *x = take_rows(shape.n_rows, width, 1, &seed);
        struct lr_l2norm_args args = {.n_rows = shape.n_rows,
                                      .n_heads = shape.n_heads,
                                      .head_dim = shape.head_dim,
                                      .eps = 1e-6f,
                                      .scale = s % 2 ? 1.0f : 0.088388f};
        struct lr_l2norm_args host = args;
        host.x = x, host.x_stride = width;
        double *truth = check_host((size_t)n * sizeof *truth);
        lr_ref_l2norm(&host, truth);
        float *y = run_l2norm(args, x, layouts[0], shape.n_rows);
        check_act("x", y, truth, n, 1e-30);
        for (int l = first_layout(); l < CHECK_COUNT(layouts); l++)
            same_floats("another layout", y, run_l2norm(args, x, layouts[l], shape.n_rows), n);
        if (goes_by_rows(shape.n_rows))
            same_floats("row by row", y, run_l2norm(args, x, layouts[0], 1), n);
        same_floats("in parts", y, run_l2norm(args, x, layouts[2], shape.n_rows / 3 + 1), n);
        check_end();
    }
}

struct rope {
    const float *x, *w, *cos, *sin;
};

/* Heads `between` elements apart that nobody may write: the layout of q with its gate. */
static float *run_rope(struct lr_norm_rope_args args, struct rope in, int64_t between, struct layout l, int64_t part)
{
    int64_t n_rows = args.n_rows, half = args.rotary_dim / 2, padded = args.head_dim + between;
    int64_t width = args.n_heads * padded, n = n_rows * width;
    float *x = check_host((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] = i % padded < args.head_dim ? in.x[i / padded * args.head_dim + i % padded] : 7.0f;
    uint16_t *rows = place(x, n_rows, width, l);
    args.w = place_f32(in.w, 1, args.head_dim, l);
    const float *cos = place_f32(in.cos, 1, n_rows * half, l), *sin = place_f32(in.sin, 1, n_rows * half, l);
    args.x_stride = stride_of(l, width);
    args.head_stride = padded;
    for (int64_t first = 0; first < n_rows; first += part) {
        args.x = rows + first * args.x_stride;
        args.cos = cos + first * half;
        args.sin = sin + first * half;
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        LR_CUDA(norm_rope)(&check.exec, &args);
    }
    float *all = fetch(rows, n_rows, width, l), *y = check_host((size_t)n * sizeof *y);
    for (int64_t i = 0; i < n; i++) {
        if (i % padded < args.head_dim)
            y[i / padded * args.head_dim + i % padded] = all[i];
        else
            check_that(all[i] == 7.0f, "an element between the heads was written", i);
    }
    return y;
}

static void norm_rope(void)
{
    uint64_t seed = 14;
    for (int s = 0; s < CHECK_COUNT(heads_shapes); s++)
        for (int share = 0; share < 4; share++) { /* of the head that is rotated: none, a quarter, an odd part, all */
            struct heads_shape shape = heads_shapes[s];
            if (is_too_large(shape.n_rows))
                continue;
            int64_t d = shape.head_dim, n = shape.n_rows * shape.n_heads * d;
            int64_t rotary = share == 0 ? 0 : share == 1 ? d / 8 * 2 : share == 2 ? d * 2 / 3 / 2 * 2 : d / 2 * 2;
            int64_t half = rotary / 2, between = share % 2 ? d : 0;
            LABEL("norm_rope %lld x %lld x %lld, rotary %lld", (long long)shape.n_rows, (long long)shape.n_heads,
                  (long long)d, (long long)rotary);
            struct rope in = {.x = take_rows(shape.n_rows, shape.n_heads * d, 1, &seed),
                              .w = check_floats(d, 1.0f, 0, &seed)};
            float *cos = check_host((size_t)(shape.n_rows * half) * sizeof(float));
            float *sin = check_host((size_t)(shape.n_rows * half) * sizeof(float));
            for (int64_t i = 0; i < shape.n_rows * half; i++) {
                cos[i] = cosf((float)i);
                sin[i] = sinf((float)i);
            }
            in.cos = cos, in.sin = sin;
            struct lr_norm_rope_args args = {
                .n_rows = shape.n_rows, .n_heads = shape.n_heads, .head_dim = d, .rotary_dim = rotary, .eps = 1e-6f};
            struct lr_norm_rope_args host = args;
            host.x = (void *)(uintptr_t)in.x, host.x_stride = shape.n_heads * d, host.head_stride = d;
            host.w = in.w, host.cos = cos, host.sin = sin;
            double *truth = check_host((size_t)n * sizeof *truth);
            lr_ref_norm_rope(&host, truth);
            float *y = run_rope(args, in, between, layouts[0], shape.n_rows);
            check_act("x", y, truth, n, 1e-5);
            for (int l = first_layout(); l < CHECK_COUNT(layouts); l++)
                same_floats("another layout", y, run_rope(args, in, between, layouts[l], shape.n_rows), n);
            if (goes_by_rows(shape.n_rows))
                same_floats("row by row", y, run_rope(args, in, between, layouts[0], 1), n);
            same_floats("in parts", y, run_rope(args, in, between, layouts[2], shape.n_rows / 3 + 1), n);
            check_end();
        }
}

static const struct check_case cases[] = {
    {"rmsnorm", rmsnorm},
    {"gated_rmsnorm", gated_rmsnorm},
    {"l2norm", l2norm},
    {"norm_rope", norm_rope},
};

int main(void)
{
    return check_main(cases, CHECK_COUNT(cases));
}
