/* The pass of recurrence_pass.cu token by token, for head dims and alignments that the tensor cores' tiles do not fit:
 * any dk and dv up to 256. Slow, float32 throughout.
 *
 * A warp takes 4 columns of S (of M behind dv, which have no v) through a slot, a lane every 32nd row of them. Since
 * o = exp(g) S^T q + (k . q) u, one round of sums serves the update and the output. */
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr::LR_CUDA_ACT
{

constexpr int PLAIN_WARPS = 8;
constexpr int PLAIN_COLUMNS = 4; /* of a warp */

static __device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, step);
    }
    return x;
}

/* Where column `column` of what the slot carries lies: B's (or the entering state's) first, then M's. */
static __device__ __forceinline__ int64_t column_offset(const recurrence_params &p, int64_t slot_head, int column)
{
    return column < p.dv ? (slot_head * p.dv + column) * p.dk : (slot_head * p.dk + column - p.dv) * p.dk;
}

/* Grid (blocks of 32 columns, heads, slots). ROWS * 32 >= dk. */
template <int ROWS, bool DELTA, bool OUTPUT>
static __global__ void __launch_bounds__(32 * PLAIN_WARPS) plain_kernel(const recurrence_params p)
{
    const int lane = threadIdx.x % 32;
    const int head = blockIdx.y;
    const int64_t slot = blockIdx.z;
    const int64_t slot_head = slot * p.n_v_heads + head;
    const struct span span = span_of(p, slot);
    const int n_columns = p.dv + (DELTA && !OUTPUT ? p.dk : 0);
    const int first_column = (blockIdx.x * PLAIN_WARPS + threadIdx.x / 32) * PLAIN_COLUMNS;
    if (span.first == span.end || first_column >= n_columns) {
        return;
    }

    float s[PLAIN_COLUMNS][ROWS];
#pragma unroll
    for (int c = 0; c < PLAIN_COLUMNS; c++) {
        const int column = first_column + c;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = lane + 32 * i;
            s[c][i] = !OUTPUT && column - p.dv == row ? 1.0f : 0.0f;
            if (OUTPUT && column < n_columns && row < p.dk) {
                s[c][i] = p.entering[column_offset(p, slot_head, column) + row];
            }
        }
    }
    const int64_t key_offset = static_cast<int64_t>(head / p.heads_per_k_head) * p.dk;
    float total = 0.0f;
    for (int64_t t = span.first; t < span.end; t++) {
        float k[ROWS];
        float q[ROWS];
        float k_q = 0.0f;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = lane + 32 * i;
            k[i] = row < p.dk ? from_act(p.k[t * p.k_stride + key_offset + row]) : 0.0f;
            q[i] = OUTPUT && row < p.dk ? from_act(p.q[t * p.q_stride + key_offset + row]) : 0.0f;
            k_q = fmaf(k[i], q[i], k_q);
        }
        const float log_decay = log2_decay(gate_at(p, t, span.end, head));
        const float decay = exp2f(log_decay);
        const float beta = DELTA ? p.beta[t * p.n_v_heads + head] : 1.0f;
        total += log_decay;
        k_q = OUTPUT ? warp_sum(k_q) : 0.0f;
#pragma unroll
        for (int c = 0; c < PLAIN_COLUMNS; c++) {
            const int column = first_column + c;
            float k_s = 0.0f;
            float q_s = 0.0f;
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                k_s = fmaf(k[i], s[c][i], k_s);
                q_s = fmaf(q[i], s[c][i], q_s);
            }
            float u = column < p.dv ? from_act(p.v[t * p.v_stride + static_cast<int64_t>(head) * p.dv + column])
                                    : 0.0f;
            if (DELTA) {
                u = beta * (u - decay * warp_sum(k_s));
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                s[c][i] = fmaf(k[i], u, decay * s[c][i]);
            }
            if (OUTPUT) {
                const float o = p.scale * fmaf(k_q, u, decay * warp_sum(q_s));
                if (lane == 0 && column < n_columns) {
                    p.o[t * p.o_stride + static_cast<int64_t>(head) * p.dv + column] = to_act(o);
                }
            }
        }
    }
    if constexpr (!OUTPUT) {
#pragma unroll
        for (int c = 0; c < PLAIN_COLUMNS; c++) {
            const int column = first_column + c;
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int row = lane + 32 * i;
                if (column < n_columns && row < p.dk) {
                    (column < p.dv ? p.b : p.m)[column_offset(p, slot_head, column) + row] = s[c][i];
                }
            }
        }
        if (!DELTA && first_column == 0 && lane == 0) {
            p.m[slot_head] = total;
        }
    }
}

template <int ROWS> static void launch(cudaStream_t stream, const recurrence_params &p, bool delta, bool output)
{
    const int n_columns = p.dv + (delta && !output ? p.dk : 0);
    const int per_block = PLAIN_WARPS * PLAIN_COLUMNS;
    const dim3 grid((n_columns + per_block - 1) / per_block, p.n_v_heads, static_cast<unsigned>(p.n_slots));
    const auto kernel = output ? (delta ? plain_kernel<ROWS, true, true> : plain_kernel<ROWS, false, true>)
                               : (delta ? plain_kernel<ROWS, true, false> : plain_kernel<ROWS, false, false>);
    kernel<<<grid, 32 * PLAIN_WARPS, 0, stream>>>(p);
}

cudaError_t launch_recurrence_plain(cudaStream_t stream, const recurrence_params &p, bool delta, bool output)
{
    if (p.dk <= 64) {
        launch<2>(stream, p, delta, output);
    } else if (p.dk <= 128) {
        launch<4>(stream, p, delta, output);
    } else {
        launch<8>(stream, p, delta, output);
    }
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT
