/* T = (I + L)^-1 diag(beta) of every chunk of 64 tokens, L[t, s] = beta_t exp(G_t - G_s) (k_t . k_s) for s < t, else 0.
 * With it U = T (V - exp(G) K S) solves the chunk's 64 coupled delta updates at once (the WY form of Yang et al. 2024).
 *
 * Blocks of 16 x 16; X is the inverse, D_i its diagonal blocks. One warp makes a chunk's, many share a multiprocessor:
 *
 *   L_00                       K K^T by mma, ten blocks, products summed in float32
 *   L_10 L_11                  D_i by substitution, a lane a column, float32
 *   L_20 L_21 L_22             X_ij = -D_i (sum over k of L_ik X_kj), j <= k < i, by mma
 *   L_30 L_31 L_32 L_33
 *
 * The last step works on X^T: then every operand is, as it lies in registers, what the next product wants. Its operands
 * are rounded to fp16: with keys of length one and beta up to 2 no entry of X is above 2, so they lose 2^-11, an eighth
 * of what T loses when it is rounded to bf16 at the end, and as much as in float16. */
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"
#include <cuda_fp16.h>

namespace lr::LR_CUDA_ACT
{

constexpr int N_BLOCKS = CHUNK / 16;
constexpr int LOWER_BLOCKS = N_BLOCKS * (N_BLOCKS + 1) / 2;
constexpr int DIAGONAL_PITCH = 20; /* floats of a row of a diagonal block: 16-byte aligned */
constexpr int INVERSE_PITCH = 24;  /* halves of a row of its inverse: ldmatrix without bank conflicts */
constexpr int CHUNKS_A_MULTIPROCESSOR = 11;

/* Block (i, j), j <= i, in an array of the lower blocks. */
static constexpr __host__ __device__ int lower(int i, int j)
{
    return i * (i + 1) / 2 + j;
}

/* A 16 x 16 block as four 8x8 ones, (0-7, 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15): the left operand of mma, or,
 * read as [n][k], the right one. */
struct block_fragment {
    uint32_t r[4];
};

/* Its sums: two 16 x 8 halves. */
struct block_sums {
    float d[2][4];
};

static __device__ __forceinline__ struct block_fragment load_fragment(uint32_t shared)
{
    struct block_fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(shared)
                 : "memory");
    return f;
}

static __device__ __forceinline__ void
multiply_act(float (&d)[4], const struct block_fragment &a, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." LR_CUDA_MMA "." LR_CUDA_MMA ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void
multiply_f16(float (&d)[4], const struct block_fragment &a, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}

/* sums += A B^T, with B as [n][k]. */
static __device__ __forceinline__ void
add_product(struct block_sums &s, const struct block_fragment &a, const struct block_fragment &b)
{
    multiply_f16(s.d[0], a, b.r[0], b.r[2]);
    multiply_f16(s.d[1], a, b.r[1], b.r[3]);
}

static __device__ __forceinline__ uint32_t pack_f16(float low, float high)
{
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

static __device__ __forceinline__ struct block_fragment rounded(const struct block_sums &s, float sign)
{
    struct block_fragment f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        f.r[i] = pack_f16(sign * s.d[i / 2][2 * (i % 2)], sign * s.d[i / 2][2 * (i % 2) + 1]);
    }
    return f;
}

/* The lower blocks of K K^T. K as swizzled blocks of 64 columns. */
template <int DK>
static __device__ __forceinline__ void lower_products(struct block_sums (&l)[LOWER_BLOCKS], uint32_t k_tile, int lane)
{
#pragma unroll
    for (int kk = 0; kk < DK / 16; kk++) {
        struct block_fragment rows[N_BLOCKS];
#pragma unroll
        for (int i = 0; i < N_BLOCKS; i++) {
            rows[i] =
                load_fragment(k_tile + kk / 4 * CHUNK * 128 + swizzled(16 * i + lane % 16, 2 * (kk % 4) + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < N_BLOCKS; i++) {
#pragma unroll
            for (int j = 0; j <= i; j++) {
                multiply_act(l[lower(i, j)].d[0], rows[i], rows[j].r[0], rows[j].r[2]);
                multiply_act(l[lower(i, j)].d[1], rows[i], rows[j].r[1], rows[j].r[3]);
            }
        }
    }
}

/* Block (i, j) of K K^T to L; zero on and over the diagonal. */
static __device__ __forceinline__ void
decay_block(struct block_sums &s, int i, int j, const float *sum, const float *beta, int lane)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = 8 * half + 2 * (lane % 4);
        const float2 sum_s = *reinterpret_cast<const float2 *>(&sum[16 * j + column]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = 8 * r + lane / 4;
            const float sum_t = sum[16 * i + row];
            const float beta_t = beta[16 * i + row];
            float *d = &s.d[half][2 * r];
            d[0] = i > j || column < row ? d[0] * (exp2_fast(sum_t - sum_s.x) * beta_t) : 0.0f;
            d[1] = i > j || column + 1 < row ? d[1] * (exp2_fast(sum_t - sum_s.y) * beta_t) : 0.0f;
        }
    }
}

/* The inverses of the diagonal blocks I + L_ii from shared memory, to shared memory in fp16: lane l has column l % 16
 * of blocks l / 16 and 2 + l / 16. */
static __device__ __forceinline__ void substitute(__half *inverses, const float *diagonal, int lane)
{
    const int column = lane % 16;
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        const int block = 2 * pair + lane / 16;
        const float *l = diagonal + block * 16 * DIAGONAL_PITCH;
        __half *to = inverses + block * 16 * INVERSE_PITCH + column;
        float x[16];
#pragma unroll
        for (int t = 0; t < 16; t++) {
            float sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int s = 0; s < t; s += 4) {
                const float4 row = *reinterpret_cast<const float4 *>(l + t * DIAGONAL_PITCH + s);
                sum[0] = fmaf(row.x, x[s], sum[0]);
                if (s + 1 < t) {
                    sum[1] = fmaf(row.y, x[s + 1], sum[1]);
                }
                if (s + 2 < t) {
                    sum[0] = fmaf(row.z, x[s + 2], sum[0]);
                }
                if (s + 3 < t) {
                    sum[1] = fmaf(row.w, x[s + 3], sum[1]);
                }
            }
            x[t] = (t == column ? 1.0f : 0.0f) - (sum[0] + sum[1]);
            to[t * INVERSE_PITCH] = __float2half_rn(x[t]);
        }
    }
}

/* The inclusive sums of log2 decays of the 64 tokens from row on. */
static __device__ __forceinline__ void
sum_log_decays(float *sums, const recurrence_params &p, int64_t row, int64_t end, int head, int lane)
{
    const int64_t first_row = row + 2 * lane;
    const float first = log2_decay(gate_at(p, first_row, end, head));
    float sum = first + log2_decay(gate_at(p, first_row + 1, end, head));
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

/* X^T below the diagonal from L and D; x comes with D_i^T in its diagonal blocks. */
static __device__ __forceinline__ void solve_below(struct block_fragment (&x)[LOWER_BLOCKS],
                                                   const struct block_sums (&l)[LOWER_BLOCKS],
                                                   const struct block_fragment (&d)[N_BLOCKS])
{
#pragma unroll
    for (int i = 1; i < N_BLOCKS; i++) {
        struct block_sums y[N_BLOCKS - 1] = {};
#pragma unroll
        for (int k = 0; k < i; k++) {
            const struct block_fragment l_ik = rounded(l[lower(i, k)], 1.0f);
#pragma unroll
            for (int j = 0; j <= k; j++) {
                add_product(y[j], x[lower(k, j)], l_ik);
            }
        }
#pragma unroll
        for (int j = 0; j < i; j++) {
            struct block_sums sums = {};
            add_product(sums, rounded(y[j], -1.0f), d[i]);
            x[lower(i, j)] = rounded(sums, 1.0f);
        }
    }
}

/* T [t][s] into a swizzled block from X^T [s][t]. */
static __device__ __forceinline__ void
store_blocks(uint8_t *t_tile, const struct block_fragment (&x)[LOWER_BLOCKS], const float *beta, int lane)
{
#pragma unroll
    for (int j = 0; j < N_BLOCKS; j++) {
        const float beta_s[2] = {beta[16 * j + lane / 4], beta[16 * j + 8 + lane / 4]};
#pragma unroll
        for (int i = j; i < N_BLOCKS; i++) {
#pragma unroll
            for (int h = 0; h < 4; h++) {
                const float2 values = __half22float2(*reinterpret_cast<const __half2 *>(&x[lower(i, j)].r[h]));
                const uint32_t r = pack_act(values.x * beta_s[h % 2], values.y * beta_s[h % 2]);
                *reinterpret_cast<uint32_t *>(t_tile + swizzled(16 * i + h / 2 * 8 + lane / 4, 2 * j + h % 2) +
                                              lane % 4 * 4) = transpose_matrix(r);
            }
        }
    }
}

/* Grid (heads, chunks from first_chunk on), a warp each. */
template <int DK>
static __global__ void __launch_bounds__(32, CHUNKS_A_MULTIPROCESSOR)
    inverse_kernel(const recurrence_params p, int64_t first_chunk)
{
    /* K; then L_ii and D_i; then T */
    __shared__ __align__(1024) uint8_t tile[DK / 64 * CHUNK * 128];
    __shared__ __align__(16) float sum[CHUNK];
    __shared__ float beta[CHUNK];
    static_assert(N_BLOCKS * 16 * (DIAGONAL_PITCH * 4 + INVERSE_PITCH * 2) <= sizeof tile, "the diagonal blocks fit");
    const int lane = threadIdx.x;
    const int head = blockIdx.x;
    const int chunks_per_sub = p.sub_tokens / CHUNK;
    const int64_t chunk = first_chunk + blockIdx.y;
    const struct span span = span_of(p, chunk / chunks_per_sub);
    const int64_t row = span.first + chunk % chunks_per_sub * CHUNK;
    if (row >= span.end) {
        return;
    }

    const uint32_t shared = shared_address(tile);
    const int n_rows = span.end - row < CHUNK ? static_cast<int>(span.end - row) : CHUNK;
    const act *k = p.k + row * p.k_stride + head / p.heads_per_k_head * DK + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i++) {
        const int token = lane / 8 + 4 * i;
        const bool valid = token < n_rows;
        const act *from = valid ? k + token * p.k_stride : p.k;
#pragma unroll
        for (int block = 0; block < DK / 64; block++) {
            copy_async(shared + block * CHUNK * 128 + swizzled(token, lane % 8), from + block * 64, valid);
        }
    }
    copy_commit();
    sum_log_decays(sum, p, row, span.end, head, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t token = row + lane + 32 * i;
        beta[lane + 32 * i] = token < span.end ? p.beta[token * p.n_v_heads + head] : 0.0f;
    }
    copy_wait<0>();
    __syncwarp();

    struct block_sums l[LOWER_BLOCKS] = {};
    lower_products<DK>(l, shared, lane);
    __syncwarp();
    float *diagonal = reinterpret_cast<float *>(tile);
    __half *inverses = reinterpret_cast<__half *>(diagonal + N_BLOCKS * 16 * DIAGONAL_PITCH);
#pragma unroll
    for (int i = 0; i < N_BLOCKS; i++) {
#pragma unroll
        for (int j = 0; j <= i; j++) {
            decay_block(l[lower(i, j)], i, j, sum, beta, lane);
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float *d = &l[lower(i, i)].d[r / 2][r % 2 * 2];
            *reinterpret_cast<float2 *>(diagonal + (16 * i + r % 2 * 8 + lane / 4) * DIAGONAL_PITCH + r / 2 * 8 +
                                        lane % 4 * 2) = make_float2(d[0], d[1]);
        }
    }
    __syncwarp();
    substitute(inverses, diagonal, lane);
    __syncwarp();

    struct block_fragment x[LOWER_BLOCKS];
    struct block_fragment d[N_BLOCKS];
#pragma unroll
    for (int i = 0; i < N_BLOCKS; i++) {
        const uint32_t block = shared_address(inverses + i * 16 * INVERSE_PITCH);
        d[i] = load_fragment(block + (lane % 16) * INVERSE_PITCH * 2 + lane / 16 * 16);
        load_transposed(x[lower(i, i)].r, block + (lane / 16 * 8 + lane % 8) * INVERSE_PITCH * 2 + lane / 8 % 2 * 16);
    }
    __syncwarp();
    solve_below(x, l, d);
    store_blocks(tile, x, beta, lane);
    __syncwarp();

    /* Sectors of 32 bytes up to the diagonal: the passes read no others. */
    uint4 *to = reinterpret_cast<uint4 *>(p.inverses + (chunk * p.n_v_heads + head) * CHUNK * CHUNK) + lane;
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i++) {
        const int t = lane / 8 + 4 * i;
        if (lane % 8 / 2 <= i / 4) {
            to[32 * i] = *reinterpret_cast<const uint4 *>(tile + swizzled(t, lane % 8));
        }
    }
}

cudaError_t launch_recurrence_inverse(cudaStream_t stream, const recurrence_params &p)
{
    constexpr int64_t MOST = 65535; /* chunks of a launch */
    const int64_t n_chunks = p.n_slots * (p.sub_tokens / CHUNK);
    const auto kernel = p.dk == 128 ? inverse_kernel<128> : inverse_kernel<64>;
    for (int64_t first = 0; first < n_chunks; first += MOST) {
        const int64_t n = n_chunks - first < MOST ? n_chunks - first : MOST;
        kernel<<<dim3(p.n_v_heads, static_cast<unsigned>(n)), 32, 0, stream>>>(p, first);
    }
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT
