/* T = (I + L)^-1 diag(beta) of every chunk of 64 tokens, L[t, s] = beta_t exp(G_t - G_s) (k_t . k_s) for s < t, else 0.
 * With it U = T (V - exp(G) K S) solves the chunk's 64 coupled delta updates at once (the WY form of Yang et al. 2024).
 *
 *   K [64, dk] --mma--> the lower blocks of K K^T --decay, beta--> L in shared memory (float32)
 *   column j of the inverse is thread j's: x_t = [t = j] - sum over s < t of L[t, s] x_s, in registers
 *
 * The products are exact bf16 products summed in float32 and the substitution is float32: T is rounded once, at the end.
 * Two warps a chunk and head; many chunks share a multiprocessor. */
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr
{

constexpr int INVERSE_THREADS = 64;
constexpr int PITCH = CHUNK + 4; /* of L: rows 16-byte aligned, fragments without bank conflicts */

/* Four 8x8 blocks of bf16: of a 16 x 16 block, (0-7, 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15). */
static __device__ __forceinline__ void load_fragment(uint32_t (&r)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The rows of 16 of K K^T that a warp makes are chosen so that both make five blocks of 16 x 16: rows SHORT_ROW up to
 * its diagonal block, and 3 - SHORT_ROW up to its own. d holds them one after the other. */
template <int DK, int SHORT_ROW>
static __device__ __forceinline__ void lower_products(float (&d)[5][2][4], uint32_t k_tile, int lane)
{
    constexpr int LONG_ROW = 3 - SHORT_ROW;
#pragma unroll
    for (int kk = 0; kk < DK / 16; kk++) {
        uint32_t rows[LONG_ROW + 1][4];
        const uint32_t block = k_tile + kk / 4 * CHUNK * 128;
#pragma unroll
        for (int i = 0; i <= LONG_ROW; i++) {
            load_fragment(rows[i], block + swizzled(16 * i + lane % 16, 2 * (kk % 4) + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < 5; i++) {
            const int row = i <= SHORT_ROW ? SHORT_ROW : LONG_ROW;
            const int column = i <= SHORT_ROW ? i : i - SHORT_ROW - 1;
            multiply(d[i][0], rows[row], rows[column][0], rows[column][2]);
            multiply(d[i][1], rows[row], rows[column][1], rows[column][3]);
        }
    }
}

/* Those blocks into L, decayed and scaled; what lies on or over the diagonal of a diagonal block as zero. */
template <int SHORT_ROW>
static __device__ __forceinline__ void store_lower(float *l, const float (&d)[5][2][4], const float *sum,
                                                   const float *beta, int lane)
{
#pragma unroll
    for (int i = 0; i < 5; i++) {
        const int row = i <= SHORT_ROW ? SHORT_ROW : 3 - SHORT_ROW;
        const int column = i <= SHORT_ROW ? i : i - SHORT_ROW - 1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int s = 16 * column + 8 * half + 2 * (lane % 4);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int t = 16 * row + 8 * j + lane / 4;
                float2 x;
                x.x = s < t ? d[i][half][2 * j] * exp2_fast(sum[t] - sum[s]) * beta[t] : 0.0f;
                x.y = s + 1 < t ? d[i][half][2 * j + 1] * exp2_fast(sum[t] - sum[s + 1]) * beta[t] : 0.0f;
                *reinterpret_cast<float2 *>(l + t * PITCH + s) = x;
            }
        }
    }
}

/* Column j of (I + L)^-1 from row FIRST on, where FIRST <= j. */
template <int FIRST> static __device__ __forceinline__ void substitute(float (&x)[CHUNK], const float *l, int j)
{
#pragma unroll
    for (int t = 0; t < FIRST; t++) {
        x[t] = 0.0f;
    }
#pragma unroll
    for (int t = FIRST; t < CHUNK; t++) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int s = FIRST; s < t; s += 4) {
            const float4 row = *reinterpret_cast<const float4 *>(l + t * PITCH + s);
            sum[0] += row.x * x[s];
            if (s + 1 < t) {
                sum[1] += row.y * x[s + 1];
            }
            if (s + 2 < t) {
                sum[2] += row.z * x[s + 2];
            }
            if (s + 3 < t) {
                sum[3] += row.w * x[s + 3];
            }
        }
        x[t] = (t == j ? 1.0f : 0.0f) - ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
}

/* One warp: the inclusive sums of log2 decays of the 64 tokens from row on. */
static __device__ __forceinline__ void sum_log_decays(float *sums, const recurrence_params &p, int64_t row, int64_t end,
                                                      int head, int lane)
{
    const int64_t first_row = row + 2 * lane;
    const float first = first_row < end ? log2_decay(p, first_row, head) : 0.0f;
    float sum = first + (first_row + 1 < end ? log2_decay(p, first_row + 1, head) : 0.0f);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) {
            sum += below;
        }
    }
    const float before = __shfl_up_sync(0xffffffffu, sum, 1);
    sums[2 * lane] = (lane == 0 ? 0.0f : before) + first;
    sums[2 * lane + 1] = sum;
}

/* Grid (heads, chunks from first_chunk on). */
template <int DK>
static __global__ void __launch_bounds__(INVERSE_THREADS) inverse_kernel(const recurrence_params p, int64_t first_chunk)
{
    __shared__ __align__(1024) uint8_t tile[CHUNK * PITCH * sizeof(float)]; /* K, then L, then T */
    __shared__ float sum[CHUNK];
    __shared__ float beta[CHUNK];
    const int thread = threadIdx.x;
    const int lane = thread % 32;
    const int head = blockIdx.x;
    const int chunks_per_sub = p.sub_tokens / CHUNK;
    const int64_t chunk = first_chunk + blockIdx.y;
    const struct span span = span_of(p, chunk / chunks_per_sub);
    const int64_t row = span.first + chunk % chunks_per_sub * CHUNK;
    if (row >= span.end) {
        return;
    }

    const uint32_t k_tile = shared_address(tile);
    const __nv_bfloat16 *k = p.k + head / p.heads_per_k_head * DK + thread % 8 * 8;
#pragma unroll
    for (int block = 0; block < DK / 64; block++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int token = thread / 8 + 8 * i;
            const bool valid = row + token < span.end;
            copy_async(k_tile + block * CHUNK * 128 + swizzled(token, thread % 8),
                       valid ? k + (row + token) * p.k_stride + block * 64 : k, valid);
        }
    }
    copy_commit();
    if (thread < 32) {
        sum_log_decays(sum, p, row, span.end, head, lane);
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t token = row + lane + 32 * i;
            beta[lane + 32 * i] = token < span.end ? p.beta[token * p.n_v_heads + head] : 0.0f;
        }
    }
    copy_wait<0>();
    __syncthreads();

    float *l = reinterpret_cast<float *>(tile);
    float d[5][2][4] = {};
    if (thread < 32) {
        lower_products<DK, 0>(d, k_tile, lane);
    } else {
        lower_products<DK, 1>(d, k_tile, lane);
    }
    __syncthreads();
    if (thread < 32) {
        store_lower<0>(l, d, sum, beta, lane);
    } else {
        store_lower<1>(l, d, sum, beta, lane);
    }
    __syncthreads();
    float x[CHUNK];
    if (thread < 32) {
        substitute<0>(x, l, thread);
    } else {
        substitute<32>(x, l, thread);
    }
    __syncthreads();
    __nv_bfloat16 *t_tile = reinterpret_cast<__nv_bfloat16 *>(tile);
#pragma unroll
    for (int t = 0; t < CHUNK; t++) {
        t_tile[t * CHUNK + thread] = __float2bfloat16_rn(x[t] * beta[thread]);
    }
    __syncthreads();
    /* Sectors of 32 bytes up to the diagonal: the passes read no others. */
    uint4 *to = reinterpret_cast<uint4 *>(p.inverses + (chunk * p.n_v_heads + head) * CHUNK * CHUNK);
    const uint4 *from = reinterpret_cast<const uint4 *>(tile);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (thread % 8 / 2 <= (thread / 8 + 8 * i) / 16) {
            to[thread + 64 * i] = from[thread + 64 * i];
        }
    }
}

cudaError_t launch_recurrence_inverse(cudaStream_t stream, const recurrence_params &p)
{
    /* A launch takes 65535 chunks in y. */
    constexpr int64_t MOST = 65535;
    const int64_t n_chunks = p.n_slots * (p.sub_tokens / CHUNK);
    const auto kernel = p.dk == 128 ? inverse_kernel<128> : inverse_kernel<64>;
    for (int64_t first = 0; first < n_chunks; first += MOST) {
        const int64_t n = n_chunks - first < MOST ? n_chunks - first : MOST;
        kernel<<<dim3(p.n_v_heads, static_cast<unsigned>(n)), INVERSE_THREADS, 0, stream>>>(p, first);
    }
    return cudaGetLastError();
}

} // namespace lr
