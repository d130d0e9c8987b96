/* Causal depthwise convolution. A thread has 8 channels and walks down CONV_ROWS rows with the last taps - 1 of them in
 * registers, so that an input is read once, but for the few rows in front of a thread's first, which its neighbour has
 * just brought into the cache:
 *
 *   channels   0..7       8..15
 *   row -3     tail       tail
 *   row  0   | thread 0 | thread 1 | ...
 *   ...      |          |          |
 *   row 32   | the next block's, or the same block's where there are few channels
 *
 * An output is one chain of fused multiply-adds over its taps, ascending, wherever a block begins: the bits do not
 * depend on how a sequence is fed, and conv_step gives the same. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int CONV_ROWS = 32; /* of a thread */
constexpr int CONV_AHEAD = 8; /* rows loaded together */

/* Eight channels as they lie in memory: half the registers of a piece. */
struct raw_piece {
    uint32_t pairs[4];

    __device__ __forceinline__ float value(int i) const
    {
        return i % 2 ? high_of(pairs[i / 2]) : low_of(pairs[i / 2]);
    }
};

template <bool ALIGNED> static __device__ __forceinline__ struct raw_piece load_raw(const act *x, int n)
{
    struct raw_piece raw;
    if constexpr (ALIGNED) {
        const uint4 words = n > 0 ? *reinterpret_cast<const uint4 *>(x) : make_uint4(0, 0, 0, 0);
        raw = {{words.x, words.y, words.z, words.w}};
    } else {
        const uint16_t *halves = reinterpret_cast<const uint16_t *>(x);
#pragma unroll
        for (int i = 0; i < 4; i++)
            raw.pairs[i] =
                (2 * i < n ? halves[2 * i] : 0u) | static_cast<uint32_t>(2 * i + 1 < n ? halves[2 * i + 1] : 0) << 16;
    }
    return raw;
}

static __device__ __forceinline__ const act *conv_row(const struct lr_conv_args &a, int64_t t)
{
    return t >= 0 ? static_cast<const act *>(a.x) + t * a.x_stride
                  : static_cast<const act *>(a.tail) + (t + a.n_taps - 1) * a.n_channels;
}

/* Blocks of `channels / 8` x `row groups` threads; blockIdx.x: rows, blockIdx.y: channels. */
static __device__ __forceinline__ int64_t first_channel()
{
    return (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * 8;
}

static __device__ __forceinline__ int64_t first_row()
{
    return (static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y) * CONV_ROWS;
}

/* SiLU behind TAPS taps: the window of rows and the taps are in registers. */
template <int TAPS, bool ALIGNED>
static __global__ void __launch_bounds__(ROW_THREADS) conv_kernel(const struct lr_conv_args a)
{
    const int64_t channel = first_channel(), first = first_row();
    const int n = static_cast<int>(a.n_channels - channel < 8 ? a.n_channels - channel : 8);
    if (n <= 0 || first >= a.n_rows)
        return;
    float taps[8][TAPS];
#pragma unroll
    for (int c = 0; c < 8; c++)
#pragma unroll
        for (int w = 0; w < TAPS; w++)
            taps[c][w] = c < n ? a.w[(channel + c) * TAPS + w] : 0.0f;
    struct raw_piece window[TAPS - 1 + CONV_AHEAD]; /* rows t - TAPS + 1 .. t + CONV_AHEAD - 1 */
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++)
        window[i] = load_raw<ALIGNED>(conv_row(a, first - (TAPS - 1) + i) + channel, n);
#pragma unroll 1
    for (int64_t t = first; t < first + CONV_ROWS && t < a.n_rows; t += CONV_AHEAD) {
        const act *x = static_cast<const act *>(a.x) + t * a.x_stride + channel;
        act *y = static_cast<act *>(a.y) + t * a.y_stride + channel;
#pragma unroll
        for (int i = 0; i < CONV_AHEAD; i++)
            window[TAPS - 1 + i] = load_raw<ALIGNED>(x + i * a.x_stride, t + i < a.n_rows ? n : 0);
#pragma unroll
        for (int i = 0; i < CONV_AHEAD; i++) {
            struct piece out;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < TAPS; w++)
                    sum = fmaf(taps[c][w], window[i + w].value(c), sum);
                out.v[c] = sum * sigmoid_fast(sum);
            }
            store_piece<ALIGNED>(y + i * a.y_stride, out, t + i < a.n_rows ? n : 0);
        }
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++)
            window[i] = window[CONV_AHEAD + i];
    }
}

/* Any number of taps, any activation; every row is read as often as it is used. */
static __global__ void __launch_bounds__(ROW_THREADS) conv_any_kernel(const struct lr_conv_args a)
{
    const int64_t channel = first_channel(), first = first_row();
    const int n = static_cast<int>(a.n_channels - channel < 8 ? a.n_channels - channel : 8);
    for (int64_t t = first; t < first + CONV_ROWS && t < a.n_rows; t++) {
        struct piece out = {};
        for (int64_t w = 0; w < a.n_taps; w++) {
            const struct raw_piece x = load_raw<false>(conv_row(a, t - (a.n_taps - 1) + w) + channel, n);
#pragma unroll
            for (int c = 0; c < 8; c++)
                out.v[c] = fmaf(c < n ? a.w[(channel + c) * a.n_taps + w] : 0.0f, x.value(c), out.v[c]);
        }
#pragma unroll
        for (int c = 0; c < 8; c++)
            out.v[c] = activate(out.v[c], a.activation);
        store_piece<false>(static_cast<act *>(a.y) + t * a.y_stride + channel, out, n);
    }
}

template <int TAPS>
static void launch_conv(cudaStream_t stream, dim3 grid, dim3 block, bool aligned, const struct lr_conv_args &args)
{
    const auto kernel = aligned ? conv_kernel<TAPS, true> : conv_kernel<TAPS, false>;
    kernel<<<grid, block, 0, stream>>>(args);
}

static void conv(cudaStream_t stream, const struct lr_conv_args &args)
{
    const bool aligned =
        are_aligned(16, args.x, args.tail, args.y) && (args.x_stride | args.y_stride | args.n_channels) % 8 == 0;
    unsigned lanes = ROW_THREADS;
    while (lanes > 1 && lanes / 2 * 8 >= args.n_channels)
        lanes /= 2;
    const dim3 block(lanes, ROW_THREADS / lanes);
    const dim3 grid(blocks_for(args.n_rows, CONV_ROWS * block.y), blocks_for(args.n_channels, lanes * 8));
    if (args.activation == LR_ACT_SILU && args.n_taps == 2)
        launch_conv<2>(stream, grid, block, aligned, args);
    else if (args.activation == LR_ACT_SILU && args.n_taps == 3)
        launch_conv<3>(stream, grid, block, aligned, args);
    else if (args.activation == LR_ACT_SILU && args.n_taps == 4)
        launch_conv<4>(stream, grid, block, aligned, args);
    else
        conv_any_kernel<<<grid, block, 0, stream>>>(args);
}

/* ---- one token of each of many sequences ---- */

static __global__ void __launch_bounds__(ROW_THREADS)
    conv_step_kernel(const struct lr_conv_step_args a, lr_act *const *tails)
{
    const int64_t row = blockIdx.y, channel = static_cast<int64_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
    if (channel >= a.n_channels)
        return;
    act *tail = static_cast<act *>(tails[row]) + channel;
    const act x = static_cast<const act *>(a.x)[row * a.x_stride + channel];
    const float *w = a.w + channel * a.n_taps;
    float sum = 0.0f;
    for (int64_t i = 0; i < a.n_taps - 1; i++) {
        const act previous = tail[i * a.n_channels];
        sum = fmaf(w[i], from_act(previous), sum);
        if (i > 0)
            tail[(i - 1) * a.n_channels] = previous;
    }
    sum = fmaf(w[a.n_taps - 1], from_act(x), sum);
    if (a.n_taps > 1)
        tail[(a.n_taps - 2) * a.n_channels] = x;
    static_cast<act *>(a.y)[row * a.y_stride + channel] = to_act(activate(sum, a.activation));
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(conv)(const struct lr_exec *exec, const struct lr_conv_args *args)
{
    if (args->n_rows <= 0 || args->n_channels <= 0)
        return;
    lr::conv(lr::stream_of(exec), *args);
    lr_cuda_note(exec, cudaGetLastError(), "conv");
}

void LR_CUDA(conv_step)(const struct lr_exec *exec, const struct lr_conv_step_args *args)
{
    const int64_t most = 32768; /* rows of a launch */
    for (int64_t first = 0; first < args->n_rows; first += most) {
        struct lr_conv_step_args a = *args;
        a.n_rows = args->n_rows - first < most ? args->n_rows - first : most;
        a.x = static_cast<const lr::act *>(a.x) + first * a.x_stride;
        a.y = static_cast<lr::act *>(a.y) + first * a.y_stride;
        lr_act *const *tails = static_cast<lr_act *const *>(
            lr_cuda_upload(exec, args->tails + first, static_cast<size_t>(a.n_rows) * sizeof *tails));
        const dim3 grid(lr::blocks_for(a.n_channels, lr::ROW_THREADS), static_cast<unsigned>(a.n_rows));
        lr::conv_step_kernel<<<grid, lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(a, tails);
    }
    lr_cuda_note(exec, cudaGetLastError(), "conv_step");
}
