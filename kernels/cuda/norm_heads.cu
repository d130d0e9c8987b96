/* Norms over heads: RMSNorm with a gate behind it, RMSNorm with rotary behind it, and q, k to unit length. A head is a
 * unit of rows.cuh: it is read once, summed over its lanes, written once. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

namespace lr::LR_CUDA_ACT
{

/* A head of a row: where it lies, and whether it exists. */
struct head {
    int64_t row;
    uint32_t index;
    int n; /* its columns; 0 behind the last head, so that nothing is read or written */
};

static __device__ __forceinline__ struct head
head_of(uint32_t unit, uint32_t n_units, const struct divider &n_heads, int head_dim)
{
    const uint32_t row = n_heads.of(unit);
    return {row, unit - row * n_heads.d, unit < n_units ? head_dim : 0};
}

template <class S>
static __global__ void __launch_bounds__(ROW_THREADS)
    gated_rmsnorm_kernel(const struct lr_gated_rmsnorm_args a, struct divider n_heads, uint32_t n_units)
{
    const int head_dim = static_cast<int>(a.head_dim);
    struct piece x[S::UNITS][S::PIECES], z[S::UNITS][S::PIECES];
    struct head heads[S::UNITS];
#pragma unroll
    for (int u = 0; u < S::UNITS; u++) {
        const struct head h = heads[u] = head_of(S::unit(u), n_units, n_heads, head_dim);
        const int64_t start = static_cast<int64_t>(h.index) * head_dim;
#pragma unroll
        for (int i = 0; i < S::PIECES; i++) {
            const int64_t at = start + S::column(i);
            const int left = h.n - S::column(i);
            x[u][i] = load_piece<S::ALIGNED>(static_cast<const act *>(a.x) + h.row * a.x_stride + at, left);
            z[u][i] = load_piece<S::ALIGNED>(static_cast<const act *>(a.z) + h.row * a.z_stride + at, left);
        }
    }
#pragma unroll
    for (int u = 0; u < S::UNITS; u++) {
        const struct head h = heads[u];
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < S::PIECES; i++)
            sum = sum_of_squares(x[u][i], sum);
        const float scale = rsqrtf(group_sum<S::LANES>(sum) / static_cast<float>(head_dim) + a.eps);
#pragma unroll
        for (int i = 0; i < S::PIECES; i++) {
            const int left = h.n - S::column(i);
            const struct piece w = load_piece<S::ALIGNED>(a.w + S::column(i), left);
            struct piece y;
#pragma unroll
            for (int j = 0; j < 8; j++)
                y.v[j] = x[u][i].v[j] * scale * w.v[j] * (z[u][i].v[j] * sigmoid_fast(z[u][i].v[j]));
            act *out = static_cast<act *>(a.y) + h.row * a.y_stride + static_cast<int64_t>(h.index) * head_dim;
            store_piece<S::ALIGNED>(out + S::column(i), y, left);
        }
    }
}

template <class S>
static __global__ void __launch_bounds__(ROW_THREADS)
    l2norm_kernel(const struct lr_l2norm_args a, struct divider n_heads, uint32_t n_units)
{
    const int head_dim = static_cast<int>(a.head_dim);
    struct piece x[S::UNITS][S::PIECES];
    act *base[S::UNITS];
    int n[S::UNITS];
#pragma unroll
    for (int u = 0; u < S::UNITS; u++) {
        const struct head h = head_of(S::unit(u), n_units, n_heads, head_dim);
        base[u] = static_cast<act *>(a.x) + h.row * a.x_stride + static_cast<int64_t>(h.index) * head_dim;
        n[u] = h.n;
#pragma unroll
        for (int i = 0; i < S::PIECES; i++)
            x[u][i] = load_piece<S::ALIGNED>(base[u] + S::column(i), n[u] - S::column(i));
    }
#pragma unroll
    for (int u = 0; u < S::UNITS; u++) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < S::PIECES; i++)
            sum = sum_of_squares(x[u][i], sum);
        const float scale = a.scale * rsqrtf(group_sum<S::LANES>(sum) + a.eps);
#pragma unroll
        for (int i = 0; i < S::PIECES; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[u][i].v[j] *= scale;
            store_piece<S::ALIGNED>(base[u] + S::column(i), x[u][i], n[u] - S::column(i));
        }
    }
}

/* What the rotation of a piece needs from elsewhere: the other halves' columns, raw, with their weights. A column's
 * partner is half a rotary_dim away. ALIGNED: half is a multiple of 8, so that a piece lies on one side. */
struct partner {
    struct piece x, w, cos, sin;
};

template <bool ALIGNED>
static __device__ __forceinline__ struct partner
load_partner(const struct lr_norm_rope_args &a, const act *x, int64_t row, int column, int n)
{
    const int half = static_cast<int>(a.rotary_dim / 2);
    struct partner p;
    if constexpr (ALIGNED) {
        const int other = column < half ? column + half : column - half, angle = column < half ? column : column - half;
        const int there = column < 2 * half ? n : 0;
        p.x = load_piece<true>(x + other, there);
        p.w = load_piece<true>(a.w + other, there);
        p.cos = load_piece<true>(a.cos + row * half + angle, there);
        p.sin = load_piece<true>(a.sin + row * half + angle, there);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int c = column + j;
            const bool there = j < n && c < 2 * half, first = c < half;
            p.x.v[j] = there ? from_act(x[first ? c + half : c - half]) : 0.0f;
            p.w.v[j] = there ? a.w[first ? c + half : c - half] : 0.0f;
            p.cos.v[j] = there ? a.cos[row * half + (first ? c : c - half)] : 0.0f;
            p.sin.v[j] = there ? a.sin[row * half + (first ? c : c - half)] : 0.0f;
        }
    }
    return p;
}

template <class S>
static __global__ void __launch_bounds__(ROW_THREADS, 5)
    norm_rope_kernel(const struct lr_norm_rope_args a, struct divider n_heads, uint32_t n_units)
{
    const int head_dim = static_cast<int>(a.head_dim), half = static_cast<int>(a.rotary_dim / 2);
    const struct head h = head_of(S::unit(0), n_units, n_heads, head_dim);
    act *base = static_cast<act *>(a.x) + h.row * a.x_stride + static_cast<int64_t>(h.index) * a.head_stride;
    struct piece x[S::PIECES];
    struct partner partners[S::PIECES];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < S::PIECES; i++) {
        x[i] = load_piece<S::ALIGNED>(base + S::column(i), h.n - S::column(i));
        partners[i] = load_partner<S::ALIGNED>(a, base, h.row, S::column(i), h.n - S::column(i));
    }
    __syncwarp(); /* the partners are read before anyone writes */
#pragma unroll
    for (int i = 0; i < S::PIECES; i++)
        sum = sum_of_squares(x[i], sum);
    const float scale = rsqrtf(group_sum<S::LANES>(sum) / static_cast<float>(head_dim) + a.eps);
#pragma unroll
    for (int i = 0; i < S::PIECES; i++) {
        const struct piece w = load_piece<S::ALIGNED>(a.w + S::column(i), h.n - S::column(i));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int column = S::column(i) + j;
            const float mine = x[i].v[j] * scale * (1.0f + w.v[j]);
            const float other = partners[i].x.v[j] * scale * (1.0f + partners[i].w.v[j]);
            const float c = partners[i].cos.v[j], s = partners[i].sin.v[j];
            const float rotated = column < half ? fmaf(mine, c, -(other * s)) : fmaf(mine, c, other * s);
            x[i].v[j] = column < 2 * half ? rotated : mine;
        }
        store_piece<S::ALIGNED>(base + S::column(i), x[i], h.n - S::column(i));
    }
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(gated_rmsnorm)(const struct lr_exec *exec, const struct lr_gated_rmsnorm_args *args)
{
    const bool aligned = lr::are_aligned(16, args->x, args->z, args->w, args->y) &&
                         (args->x_stride | args->z_stride | args->y_stride | args->head_dim) % 8 == 0;
    lr::for_row_slices(args->n_rows, args->n_heads, [&](int64_t first, int64_t n) {
        struct lr_gated_rmsnorm_args a = *args;
        a.x = static_cast<const lr::act *>(a.x) + first * a.x_stride;
        a.z = static_cast<const lr::act *>(a.z) + first * a.z_stride;
        a.y = static_cast<lr::act *>(a.y) + first * a.y_stride;
        const uint32_t n_units = static_cast<uint32_t>(n * a.n_heads);
        lr::with_spread<2>(a.head_dim, aligned, [&](auto spread) {
            using S = decltype(spread);
            lr::gated_rmsnorm_kernel<S>
                <<<lr::blocks_for(n_units, S::PER_BLOCK), lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(
                    a, lr::divider_by(a.n_heads), n_units);
        });
    });
    lr_cuda_note(exec, cudaGetLastError(), "gated_rmsnorm");
}

void LR_CUDA(l2norm)(const struct lr_exec *exec, const struct lr_l2norm_args *args)
{
    const bool aligned = lr::are_aligned(16, args->x) && (args->x_stride | args->head_dim) % 8 == 0;
    lr::for_row_slices(args->n_rows, args->n_heads, [&](int64_t first, int64_t n) {
        struct lr_l2norm_args a = *args;
        a.x = static_cast<lr::act *>(a.x) + first * a.x_stride;
        const uint32_t n_units = static_cast<uint32_t>(n * a.n_heads);
        lr::with_spread<2>(a.head_dim, aligned, [&](auto spread) {
            using S = decltype(spread);
            lr::l2norm_kernel<S><<<lr::blocks_for(n_units, S::PER_BLOCK), lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(
                a, lr::divider_by(a.n_heads), n_units);
        });
    });
    lr_cuda_note(exec, cudaGetLastError(), "l2norm");
}

void LR_CUDA(norm_rope)(const struct lr_exec *exec, const struct lr_norm_rope_args *args)
{
    const bool aligned = lr::are_aligned(16, args->x, args->w, args->cos, args->sin) &&
                         (args->x_stride | args->head_stride | args->head_dim) % 8 == 0 && args->rotary_dim % 16 == 0;
    lr::for_row_slices(args->n_rows, args->n_heads, [&](int64_t first, int64_t n) {
        struct lr_norm_rope_args a = *args;
        a.x = static_cast<lr::act *>(a.x) + first * a.x_stride;
        a.cos += first * (a.rotary_dim / 2);
        a.sin += first * (a.rotary_dim / 2);
        const uint32_t n_units = static_cast<uint32_t>(n * a.n_heads);
        lr::with_spread<1>(a.head_dim, aligned, [&](auto spread) {
            using S = decltype(spread);
            lr::norm_rope_kernel<S><<<lr::blocks_for(n_units, S::PER_BLOCK), lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(
                a, lr::divider_by(a.n_heads), n_units);
        });
    });
    lr_cuda_note(exec, cudaGetLastError(), "norm_rope");
}
