/* conv and conv_step: against float64, against each other, fed whole and in pieces. */
#include "tests/kernels/cuda/rows.h"

struct conv {
    const float *x, *w, *tail; /* x [n_rows, n_channels], tail [n_taps - 1, n_channels] */
};

/* The rows in pieces of `part`; each piece's tail is made of the rows before it. */
static float *run_conv(struct lr_conv_args args, struct conv in, struct layout l, int64_t part)
{
    int64_t n_rows = args.n_rows, n = args.n_channels, before = args.n_taps - 1;
    const uint16_t *rows = place(in.x, n_rows, n, l);
    uint16_t *y = place(NULL, n_rows, n, l);
    float *history = check_host((size_t)((before + n_rows) * n) * sizeof *history);
    memcpy(history, in.tail, (size_t)(before * n) * sizeof *history);
    memcpy(history + before * n, in.x, (size_t)(n_rows * n) * sizeof *history);
    args.w = place_f32(in.w, 1, n * args.n_taps, l);
    args.x_stride = args.y_stride = stride_of(l, n);
    for (int64_t first = 0; first < n_rows; first += part) {
        args.x = rows + first * args.x_stride;
        args.y = y + first * args.y_stride;
        args.tail = place(history + first * n, 1, before * n, (struct layout){l.offset, 0});
        args.n_rows = n_rows - first < part ? n_rows - first : part;
        LR_CUDA(conv)(&check.exec, &args);
    }
    return fetch(y, n_rows, n, l);
}

/* One token at a time: n_rows sequences would be forks; here one sequence is a fork that takes n_rows steps. */
static float *run_steps(struct lr_conv_args args, struct conv in, struct layout l)
{
    int64_t n = args.n_channels;
    const uint16_t *rows = place(in.x, args.n_rows, n, l);
    uint16_t *y = place(NULL, args.n_rows, n, l);
    lr_act *tail = place(in.tail, 1, (args.n_taps - 1) * n, (struct layout){l.offset, 0});
    for (int64_t t = 0; t < args.n_rows; t++) {
        struct lr_conv_step_args step = {.x = rows + t * stride_of(l, n),
                                         .x_stride = stride_of(l, n),
                                         .w = args.w,
                                         .tails = &tail,
                                         .y = y + t * stride_of(l, n),
                                         .y_stride = stride_of(l, n),
                                         .n_rows = 1,
                                         .n_channels = n,
                                         .n_taps = args.n_taps,
                                         .activation = args.activation};
        LR_CUDA(conv_step)(&check.exec, &step);
    }
    return fetch(y, args.n_rows, n, l);
}

static void conv(void)
{
    /* rows, channels, taps, activation */
    static const int64_t shapes[][4] = {
        {1, 1, 1, LR_ACT_NONE},    {1, 8, 4, LR_ACT_SILU},    {2, 24, 4, LR_ACT_SILU},    {70, 7, 4, LR_ACT_SILU},
        {37, 256, 4, LR_ACT_SILU}, {301, 96, 4, LR_ACT_SILU}, {65, 2056, 4, LR_ACT_SILU}, {17, 4104, 4, LR_ACT_SILU},
        {50, 64, 2, LR_ACT_SILU},  {50, 72, 3, LR_ACT_SILU},  {50, 64, 5, LR_ACT_SILU},   {9, 16, 64, LR_ACT_SILU},
        {33, 40, 4, LR_ACT_NONE},  {33, 40, 4, LR_ACT_GELU},  {33, 40, 3, LR_ACT_RELU},   {33, 40, 4, LR_ACT_GELU_TANH},
    };
    uint64_t seed = 31;
    for (int s = 0; s < CHECK_COUNT(shapes); s++) {
        if (is_too_large(shapes[s][0]))
            continue;
        struct lr_conv_args args = {.n_rows = shapes[s][0],
                                    .n_channels = shapes[s][1],
                                    .n_taps = shapes[s][2],
                                    .activation = (enum lr_activation)shapes[s][3]};
        int64_t n = args.n_rows * args.n_channels;
        LABEL("conv %lld x %lld, %lld taps, activation %d", (long long)args.n_rows, (long long)args.n_channels,
              (long long)args.n_taps, (int)args.activation);
        float *x = check_floats(n, 4.0f, 1, &seed);
        for (int64_t i = 0; i < n; i += 101)
            x[i] = (float)(i % 2 ? ACT_LARGE : -ACT_LARGE);
        struct conv in = {.x = x,
                          .w = check_floats(args.n_channels * args.n_taps, 1.0f, 0, &seed),
                          .tail = check_floats((args.n_taps - 1) * args.n_channels, 4.0f, 1, &seed)};
        struct lr_conv_args host = args;
        host.x = in.x, host.x_stride = args.n_channels, host.w = in.w, host.tail = in.tail;
        double *truth = check_host((size_t)n * sizeof *truth);
        lr_ref_conv(&host, truth);
        float *y = run_conv(args, in, layouts[0], args.n_rows);
        for (int64_t i = 0; i < n;
             i++) { /* beside a huge input nothing is left of the others: those are compared whole */
            int huge = 0;
            for (int64_t w = 0; w < args.n_taps && i - w * args.n_channels >= 0; w++)
                huge |= fabsf(x[i - w * args.n_channels]) > ACT_LARGE / 2;
            double allowed = huge ? ACT_LARGE * 1e-6 : 1e-5;
            check_that(fabs((double)y[i] - truth[i]) <= fabs(truth[i]) * 1.02 / (1 << ACT_DIGITS) + allowed, "against float64", i);
        }
        for (int l = first_layout(); l < CHECK_COUNT(layouts); l++)
            same_floats("another layout", y, run_conv(args, in, layouts[l], args.n_rows), n);
        if (goes_by_rows(args.n_rows))
            same_floats("row by row", y, run_conv(args, in, layouts[0], 1), n);
        same_floats("in parts of 5", y, run_conv(args, in, layouts[2], 5), n);
        args.w = place_f32(in.w, 1, args.n_channels * args.n_taps, layouts[0]);
        same_floats("by steps", y, run_steps(args, in, layouts[s % 4]), n);
        check_end();
    }
}

/* Many forks in one step: each as if alone, and every tail moves on by a row. */
static void conv_step(void)
{
    enum { FORKS = 37, CHANNELS = 300, TAPS = 4 };
    uint64_t seed = 32;
    float *x = check_floats(FORKS * CHANNELS, 4.0f, 1, &seed), *w = check_floats(CHANNELS * TAPS, 1.0f, 0, &seed);
    lr_act *tails[FORKS];
    float *history[FORKS];
    for (int i = 0; i < FORKS; i++) {
        history[i] = check_floats((TAPS - 1) * CHANNELS, 4.0f, 1, &seed);
        tails[i] = check_device_act(history[i], (TAPS - 1) * CHANNELS);
    }
    struct lr_conv_step_args args = {.x = place(x, FORKS, CHANNELS, layouts[2]),
                                     .x_stride = stride_of(layouts[2], CHANNELS),
                                     .w = check_device_copy(w, sizeof(float) * CHANNELS * TAPS),
                                     .tails = tails,
                                     .y = place(NULL, FORKS, CHANNELS, layouts[2]),
                                     .y_stride = stride_of(layouts[2], CHANNELS),
                                     .n_rows = FORKS,
                                     .n_channels = CHANNELS,
                                     .n_taps = TAPS,
                                     .activation = LR_ACT_SILU};
    LR_CUDA(conv_step)(&check.exec, &args);
    float *y = fetch(args.y, FORKS, CHANNELS, layouts[2]);
    for (int i = 0; i < FORKS; i++) {
        struct lr_conv_args host = {.x = x + i * CHANNELS,
                                    .w = w,
                                    .tail = history[i],
                                    .n_rows = 1,
                                    .n_channels = CHANNELS,
                                    .n_taps = TAPS,
                                    .activation = LR_ACT_SILU};
        double truth[CHANNELS];
        lr_ref_conv(&host, truth);
        check_act("y", y + i * CHANNELS, truth, CHANNELS, 1e-5);
        float *tail = check_download_act(tails[i], (TAPS - 1) * CHANNELS);
        same_floats("the tail's older rows", history[i] + CHANNELS, tail, (TAPS - 2) * CHANNELS);
        same_floats("the tail's new row", x + i * CHANNELS, tail + (TAPS - 2) * CHANNELS, CHANNELS);
    }
}

static const struct check_case cases[] = {{"conv", conv}, {"conv_step of many forks", conv_step}};

int main(void)
{
    return check_main(cases, CHECK_COUNT(cases));
}
