/* What works on whole states outside the chunked passes, float32 and plain:
 *
 *   fold   S_out = M S_in + B for every head: how the segments of a sequence are joined
 *   step   one token of each of many sequences: reads and writes every state once */
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr::LR_CUDA_ACT
{

constexpr int FOLD_TILE = 32;
constexpr int FOLD_K = 64;

/* A block makes 32 x 32 elements, k ascending in one chain an element. Grid (column tiles, row tiles, heads). */
static __global__ void __launch_bounds__(256) fold_kernel(const struct lr_delta_fold_args args)
{
    __shared__ float m_tile[FOLD_TILE][FOLD_K];
    __shared__ float s_tile[FOLD_K][FOLD_TILE];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int64_t dk = args.shape.dk;
    const int64_t dv = args.shape.dv;
    const int64_t head = blockIdx.z;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * FOLD_TILE + lane;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * FOLD_TILE;
    float x[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int64_t row = first_row + 4 * warp + r;
        x[r] = row < dk && column < dv ? args.b[(head * dk + row) * dv + column] : 0.0f;
    }
    for (int64_t k0 = 0; k0 < dk; k0 += FOLD_K) {
        __syncthreads();
        for (int i = warp; i < FOLD_K; i += 8) {
            s_tile[i][lane] = k0 + i < dk && column < dv ? args.s_in[(head * dk + k0 + i) * dv + column] : 0.0f;
        }
        for (int i = threadIdx.x; i < FOLD_TILE * FOLD_K; i += 256) {
            const int64_t row = first_row + i / FOLD_K;
            const int64_t k = k0 + i % FOLD_K;
            m_tile[i / FOLD_K][i % FOLD_K] = row < dk && k < dk ? args.m[(head * dk + row) * dk + k] : 0.0f;
        }
        __syncthreads();
        const int n = dk - k0 < FOLD_K ? static_cast<int>(dk - k0) : FOLD_K;
#pragma unroll 8
        for (int k = 0; k < n; k++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                x[r] = fmaf(m_tile[4 * warp + r][k], s_tile[k][lane], x[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int64_t row = first_row + 4 * warp + r;
        if (row < dk && column < dv) {
            args.s_out[(head * dk + row) * dv + column] = x[r];
        }
    }
}

constexpr int STEP_ROWS = 32;

/* A lane holds 32 rows of one column of S, a block all rows of 32 columns. Since o = S'^T q = exp(g) S^T q + (k . q) u,
 * one sum over the rows serves both the update and the output. Grid (column tiles, heads, sequences). */
static __global__ void __launch_bounds__(256) step_kernel(const struct lr_delta_step_args args, float *const *states)
{
    __shared__ float k_row[256];
    __shared__ float q_row[256];
    __shared__ float sums[8][3][32]; /* of k S, q S and k q */
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int n_warps = blockDim.x / 32;
    const int dk = static_cast<int>(args.shape.dk);
    const int dv = static_cast<int>(args.shape.dv);
    const int head = blockIdx.y;
    const int64_t sequence = blockIdx.z;
    const int64_t k_head = head / (args.shape.n_v_heads / args.shape.n_k_heads);
    const act *q = static_cast<const act *>(args.q) + sequence * args.qkv_stride + k_head * dk;
    const act *k = static_cast<const act *>(args.k) + sequence * args.qkv_stride + k_head * dk;
    const int column = blockIdx.x * 32 + lane;
    const bool inside = column < dv;

    k_row[threadIdx.x] = static_cast<int>(threadIdx.x) < dk ? from_act(k[threadIdx.x]) : 0.0f;
    q_row[threadIdx.x] = static_cast<int>(threadIdx.x) < dk ? from_act(q[threadIdx.x]) : 0.0f;
    float *s = states[sequence] + (static_cast<int64_t>(head) * dk + warp * STEP_ROWS) * dv + column;
    float x[STEP_ROWS];
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++) {
        x[i] = inside && warp * STEP_ROWS + i < dk ? s[static_cast<int64_t>(i) * dv] : 0.0f;
    }
    __syncthreads();
    float k_s = 0.0f;
    float q_s = 0.0f;
    float k_q = 0.0f;
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++) {
        const float k_i = k_row[warp * STEP_ROWS + i];
        const float q_i = q_row[warp * STEP_ROWS + i];
        k_s = fmaf(k_i, x[i], k_s);
        q_s = fmaf(q_i, x[i], q_s);
        k_q = fmaf(k_i, q_i, k_q);
    }
    sums[warp][0][lane] = k_s;
    sums[warp][1][lane] = q_s;
    sums[warp][2][lane] = k_q;
    __syncthreads();
    k_s = q_s = k_q = 0.0f;
    for (int w = 0; w < n_warps; w++) {
        k_s += sums[w][0][lane];
        q_s += sums[w][1][lane];
        k_q += sums[w][2][lane];
    }
    const int64_t gate = sequence * args.shape.n_v_heads + head;
    const float decay = expf(args.g[gate]);
    const float v = inside ? from_act(static_cast<const act *>(
                                 args.v)[sequence * args.qkv_stride + static_cast<int64_t>(head) * dv + column])
                           : 0.0f;
    const float u = args.beta[gate] * (v - decay * k_s);
    if (!inside) {
        return;
    }
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++) {
        if (warp * STEP_ROWS + i < dk) {
            s[static_cast<int64_t>(i) * dv] = fmaf(k_row[warp * STEP_ROWS + i], u, decay * x[i]);
        }
    }
    if (warp == 0) {
        static_cast<act *>(args.o)[sequence * args.o_stride + static_cast<int64_t>(head) * dv + column] =
            to_act(fmaf(k_q, u, decay * q_s));
    }
}

} // namespace lr::LR_CUDA_ACT

extern "C" int LR_CUDA(recurrence_fold)(void *stream, const struct lr_delta_fold_args *args)
{
    const unsigned columns = static_cast<unsigned>((args->shape.dv + lr::FOLD_TILE - 1) / lr::FOLD_TILE);
    const unsigned rows = static_cast<unsigned>((args->shape.dk + lr::FOLD_TILE - 1) / lr::FOLD_TILE);
    const dim3 grid(columns, rows, static_cast<unsigned>(args->shape.n_v_heads));
    lr::fold_kernel<<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(*args);
    return cudaGetLastError();
}

extern "C" int LR_CUDA(recurrence_step)(void *stream, const struct lr_delta_step_args *args)
{
    if (args->n_rows == 0) {
        return cudaSuccess;
    }
    const unsigned columns = static_cast<unsigned>((args->shape.dv + 31) / 32);
    const unsigned threads = static_cast<unsigned>((args->shape.dk + lr::STEP_ROWS - 1) / lr::STEP_ROWS) * 32;
    const dim3 grid(columns, static_cast<unsigned>(args->shape.n_v_heads), static_cast<unsigned>(args->n_rows));
    lr::step_kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(*args, args->states);
    return cudaGetLastError();
}
