/* What is known of a block without reading it: the mean, minimum and maximum of its keys, and Quest's bound of the
 * scores that a page can give. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int BLOCK = LR_KV_BLOCK_TOKENS;
constexpr int PANEL = 64; /* channels of a panel of keys, see attention.h */
constexpr int SUMMARY_THREADS = 128, SUMMARY_GROUPS = SUMMARY_THREADS / 8, SUMMARY_WARPS = SUMMARY_THREADS / 32;

/* A thread's 8 channels, over its rows and then over more and more threads. */
struct summary {
    float sum[8], low[8], high[8];
};

static __device__ __forceinline__ void fold(struct summary *a, const struct summary &b)
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        a->sum[i] += b.sum[i];
        a->low[i] = fminf(a->low[i], b.low[i]);
        a->high[i] = fmaxf(a->high[i], b.high[i]);
    }
}

static __device__ __forceinline__ struct summary from_lane(const struct summary &a, int mask)
{
    struct summary b;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        b.sum[i] = __shfl_xor_sync(0xffffffffu, a.sum[i], mask);
        b.low[i] = __shfl_xor_sync(0xffffffffu, a.low[i], mask);
        b.high[i] = __shfl_xor_sync(0xffffffffu, a.high[i], mask);
    }
    return b;
}

/* A block a panel: thread t has the 16-byte piece t % 8 of rows t / 8, t / 8 + 16, ... All eight loads fly together. */
static __global__ void __launch_bounds__(SUMMARY_THREADS)
    summary_kernel(const struct lr_block_summary_args a, const struct lr_kv_ref *refs)
{
    const int64_t d = a.shape.head_dim, n_panels = (d + PANEL - 1) / PANEL, unit = blockIdx.x;
    const int64_t panel = unit % n_panels, kv_head = unit / n_panels % a.shape.n_kv_heads;
    const int64_t block = unit / n_panels / a.shape.n_kv_heads;
    const int piece = threadIdx.x % 8, group = threadIdx.x / 8, n_keys = refs[block].n_keys;
    const char *keys =
        static_cast<const char *>(refs[block].data) + (kv_head * 2 * n_panels + panel) * BLOCK * PANEL * 2;
    uint4 words[BLOCK / SUMMARY_GROUPS];
#pragma unroll
    for (int i = 0; i < BLOCK / SUMMARY_GROUPS; i++) {
        const int row = group + i * SUMMARY_GROUPS;
        words[i] =
            row < n_keys ? *reinterpret_cast<const uint4 *>(keys + swizzled(row, piece)) : make_uint4(0, 0, 0, 0);
    }
    struct summary mine;
#pragma unroll
    for (int c = 0; c < 8; c++) {
        mine.sum[c] = 0.0f;
        mine.low[c] = INFINITY;
        mine.high[c] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < BLOCK / SUMMARY_GROUPS; i++) {
        const uint32_t pairs[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
        if (group + i * SUMMARY_GROUPS < n_keys) {
#pragma unroll
            for (int c = 0; c < 8; c++) {
                const float x = c % 2 ? high_of(pairs[c / 2]) : low_of(pairs[c / 2]);
                mine.sum[c] += x;
                mine.low[c] = fminf(mine.low[c], x);
                mine.high[c] = fmaxf(mine.high[c], x);
            }
        }
    }
    fold(&mine, from_lane(mine, 8));
    fold(&mine, from_lane(mine, 16));
    __shared__ struct summary shared[SUMMARY_WARPS][8];
    if (threadIdx.x % 32 < 8)
        shared[threadIdx.x / 32][piece] = mine;
    __syncthreads();
    const int64_t channel = panel * PANEL + threadIdx.x;
    if (threadIdx.x >= PANEL || channel >= d)
        return;
    const int at = threadIdx.x / 8, c = threadIdx.x % 8;
    float sum = 0.0f, low = INFINITY, high = -INFINITY;
    for (int w = 0; w < SUMMARY_WARPS; w++) {
        sum += shared[w][at].sum[c];
        low = fminf(low, shared[w][at].low[c]);
        high = fmaxf(high, shared[w][at].high[c]);
    }
    const int64_t to = (block * a.shape.n_kv_heads + kv_head) * d + channel;
    if (a.mean != nullptr)
        a.mean[to] = sum / static_cast<float>(n_keys);
    if (a.min != nullptr)
        a.min[to] = low;
    if (a.max != nullptr)
        a.max[to] = high;
}

/* ---- bounds ---- */

constexpr int BOUND_ROWS = 8; /* of a block */

/* A unit is a page and KV head, its summary stays in registers; blockIdx.y: rows. max(q lo, q hi) is q hi where q > 0,
 * else q lo. */
template <class S>
static __global__ void __launch_bounds__(ROW_THREADS)
    bounds_kernel(const struct lr_page_bounds_args a, struct divider kv_heads, uint32_t n_units)
{
    const uint32_t unit = S::unit(0), page = kv_heads.of(unit), kv_head = unit - page * kv_heads.d;
    const int64_t d = a.shape.head_dim, at = static_cast<int64_t>(unit) * d;
    const int n_heads = static_cast<int>(a.shape.n_heads / a.shape.n_kv_heads);
    const int n = unit < n_units ? static_cast<int>(d) : 0;
    struct piece low[S::PIECES], high[S::PIECES];
#pragma unroll
    for (int i = 0; i < S::PIECES; i++) {
        low[i] = load_piece<S::ALIGNED>(a.min + at + S::column(i), n - S::column(i));
        high[i] = load_piece<S::ALIGNED>(a.max + at + S::column(i), n - S::column(i));
    }
    const int64_t first = static_cast<int64_t>(blockIdx.y) * BOUND_ROWS;
    for (int64_t row = first; row < first + BOUND_ROWS && row < a.n_rows; row++) {
        float bound = -INFINITY;
        for (int head = 0; head < n_heads; head++) {
            const act *q = static_cast<const act *>(a.q) + row * a.q_stride +
                            (static_cast<int64_t>(kv_head) * n_heads + head) * a.q_head_stride;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < S::PIECES; i++) {
                const struct piece x = load_piece<S::ALIGNED>(q + S::column(i), n - S::column(i));
#pragma unroll
                for (int j = 0; j < 8; j++)
                    sum = fmaf(x.v[j], x.v[j] > 0.0f ? high[i].v[j] : low[i].v[j], sum);
            }
            bound = fmaxf(bound, group_sum<S::LANES>(sum));
        }
        if (n > 0 && threadIdx.x % S::LANES == 0)
            a.bounds[(row * a.shape.n_kv_heads + kv_head) * a.n_pages + page] = bound;
    }
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(block_summary)(const struct lr_exec *exec, const struct lr_block_summary_args *args)
{
    const int64_t most = LR_CUDA_MAX_UPLOAD_BYTES / static_cast<int64_t>(sizeof *args->blocks);
    const int64_t size = args->shape.n_kv_heads * args->shape.head_dim;
    const int64_t n_panels = (args->shape.head_dim + lr::PANEL - 1) / lr::PANEL;
    for (int64_t first = 0; first < args->n_blocks; first += most) {
        struct lr_block_summary_args a = *args;
        a.n_blocks = args->n_blocks - first < most ? args->n_blocks - first : most;
        a.mean = a.mean != nullptr ? a.mean + first * size : nullptr;
        a.min = a.min != nullptr ? a.min + first * size : nullptr;
        a.max = a.max != nullptr ? a.max + first * size : nullptr;
        const struct lr_kv_ref *refs = static_cast<const struct lr_kv_ref *>(
            lr_cuda_upload(exec, args->blocks + first, static_cast<size_t>(a.n_blocks) * sizeof *args->blocks));
        const unsigned n_units = static_cast<unsigned>(a.n_blocks * a.shape.n_kv_heads * n_panels);
        lr::summary_kernel<<<n_units, lr::SUMMARY_THREADS, 0, lr::stream_of(exec)>>>(a, refs);
    }
    lr_cuda_note(exec, cudaGetLastError(), "block_summary");
}

void LR_CUDA(page_bounds)(const struct lr_exec *exec, const struct lr_page_bounds_args *args)
{
    if (args->n_pages <= 0)
        return;
    const bool aligned = lr::are_aligned(16, args->q, args->min, args->max) &&
                         (args->q_stride | args->q_head_stride | args->shape.head_dim) % 8 == 0;
    const uint32_t n_units = static_cast<uint32_t>(args->n_pages * args->shape.n_kv_heads);
    const int64_t most = 65535 * lr::BOUND_ROWS;
    for (int64_t first = 0; first < args->n_rows; first += most) {
        struct lr_page_bounds_args a = *args;
        a.n_rows = args->n_rows - first < most ? args->n_rows - first : most;
        a.q = static_cast<const lr::act *>(a.q) + first * a.q_stride;
        a.bounds += first * a.shape.n_kv_heads * a.n_pages;
        lr::with_spread<1>(a.shape.head_dim, aligned, [&](auto spread) {
            using S = decltype(spread);
            const dim3 grid(lr::blocks_for(n_units, S::PER_BLOCK), lr::blocks_for(a.n_rows, lr::BOUND_ROWS));
            lr::bounds_kernel<S>
                <<<grid, lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(a, lr::divider_by(a.shape.n_kv_heads), n_units);
        });
    }
    lr_cuda_note(exec, cudaGetLastError(), "page_bounds");
}
