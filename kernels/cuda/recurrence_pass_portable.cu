/* The passes of recurrence_pass.cu with mma.sync, for every device since sm_80: the same recurrence on the same slots,
 *
 *   X^T  = St K^T                      St: 64 rows a thread block, 16 a warp, float32 accumulators
 *   R^T  = V^T - exp(G) X^T            X^T, R^T, U^T, o^T: 16 rows x 64 tokens a warp, in registers
 *   U^T  = R^T T^T                     (decay rule: U = V)
 *   o^T  = exp(G) (St Q^T) + U^T P^T   P = Q K^T masked and decayed: the warps share its blocks, through shared memory
 *   St  <- exp(G_end) St + (exp(G_end - G) U^T) K
 *
 * but without a producer: all four warps load the next chunk, then work on this one. T and P are lower triangular, and
 * of both only the 16 x 16 blocks up to the diagonal are multiplied. Accumulators have the layout of left operands, so
 * that a product's result is rounded where it lies and goes into the next.
 *
 * Two chunks are in shared memory where the device has the room (sm_80, sm_90), one where it has not (sm_86, sm_89); the
 * bits do not depend on that. */
#include "kernels/cuda/recurrence_chunk.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr::LR_CUDA_ACT::portable
{

constexpr int PASS_THREADS = 128;

/* What a chunk holds in shared memory, in this order, each part a multiple of BLOCK_BYTES. */
template <int DK, bool DELTA, bool OUTPUT> struct pass_layout {
    static constexpr int K_BLOCKS = DK / 64;
    static constexpr uint32_t Q_OFFSET = K_BLOCKS * BLOCK_BYTES;
    static constexpr uint32_t V_OFFSET = Q_OFFSET + (OUTPUT ? K_BLOCKS : 0) * BLOCK_BYTES;
    static constexpr uint32_t T_OFFSET = V_OFFSET + BLOCK_BYTES;
    static constexpr uint32_t STAGE_BYTES = T_OFFSET + (DELTA ? BLOCK_BYTES : 0);
    static constexpr uint32_t P_BYTES = OUTPUT ? BLOCK_BYTES : 0;
};

/* One thread block: 64 rows of St of one head and slot. */
struct pass_place {
    struct span span;
    int64_t slot_head; /* slot * n_v_heads + head */
    int64_t slot;
    int head, block, n_value_blocks; /* blocks behind the values' are M's */
    int n_chunks;
};

using sums_64 = float[32];         /* 16 rows x 64 tokens of a warp: [8][4] */
using operand_64 = uint32_t[4][4]; /* the same, rounded: [16 tokens][registers] */

template <int N> static __device__ __forceinline__ void round_sums(uint32_t (&a)[N][4], const float (&d)[8 * N])
{
#pragma unroll
    for (int i = 0; i < 4 * N; i++) {
        a[i / 4][i % 4] = pack_act(d[2 * i], d[2 * i + 1]);
    }
}

template <int N>
static __device__ __forceinline__ void
add_product(float (&d)[N], int block, const uint32_t (&a)[4], const uint32_t (&b)[4])
{
    mma_16x8x16(reinterpret_cast<float(&)[4]>(d[8 * block]), a, b[0], b[1]);
    mma_16x8x16(reinterpret_cast<float(&)[4]>(d[8 * block + 4]), a, b[2], b[3]);
}

/* Where lane l finds its row of a 16 x 16 block whose rows are the product's columns, and of one whose rows are the
 * reduced dimension and which is read transposed. `row`, `piece`: of the block's corner. */
static __device__ __forceinline__ uint32_t at_columns(uint32_t row, uint32_t piece)
{
    const uint32_t lane = threadIdx.x % 32;
    return swizzled(row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2);
}

static __device__ __forceinline__ uint32_t at_reduced(uint32_t row, uint32_t piece)
{
    const uint32_t lane = threadIdx.x % 32;
    return swizzled(row + lane % 16, piece + lane / 16);
}

/* d = A B^T, B [64 tokens, DK]. */
template <int DK>
static __device__ __forceinline__ void multiply_rows(sums_64 &d, const uint32_t (&a)[DK / 16][4], uint32_t tile)
{
#pragma unroll
    for (int i = 0; i < 32; i++) {
        d[i] = 0.0f;
    }
#pragma unroll
    for (int kk = 0; kk < DK / 16; kk++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t b[4];
            load_matrix(b, tile + kk / 4 * BLOCK_BYTES + at_columns(16 * j, kk % 4 * 2));
            add_product(d, j, a[kk], b);
        }
    }
}

/* d += A B^T, B [64, 64] lower triangular. */
static __device__ __forceinline__ void add_lower(sums_64 &d, const operand_64 &a, uint32_t tile)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
#pragma unroll
        for (int j = kk; j < 4; j++) {
            uint32_t b[4];
            load_matrix(b, tile + at_columns(16 * j, kk * 2));
            add_product(d, j, a[kk], b);
        }
    }
}

/* St <- whole St + U^T K, K [64 tokens, DK]. */
template <int DK>
static __device__ __forceinline__ void
advance_state(float (&state)[DK / 2], float whole, const operand_64 &u, uint32_t k_tile)
{
#pragma unroll
    for (int i = 0; i < DK / 2; i++) {
        state[i] *= whole;
    }
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
#pragma unroll
        for (int j = 0; j < DK / 16; j++) {
            uint32_t b[4];
            load_transposed(b, k_tile + j / 4 * BLOCK_BYTES + at_reduced(16 * kk, j % 4 * 2));
            add_product(state, j, u[kk], b);
        }
    }
}

/* Block (t, s) of 16 x 16 of P[t, s] = scale exp(G_t - G_s) (q_t . k_s) for s <= t, else 0. One warp. */
template <int DK>
static __device__ __forceinline__ void
make_scores(uint8_t *scores, uint32_t q_tile, uint32_t k_tile, const float *sum, float scale, int t_block, int s_block)
{
    float d[8] = {};
#pragma unroll
    for (int kk = 0; kk < DK / 16; kk++) {
        uint32_t a[4];
        uint32_t b[4];
        const uint32_t offset = kk / 4 * BLOCK_BYTES;
        load_matrix(a, q_tile + offset + at_reduced(16 * t_block, kk % 4 * 2));
        load_matrix(b, k_tile + offset + at_columns(16 * s_block, kk % 4 * 2));
        add_product(d, 0, a, b);
    }
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = 16 * t_block + i % 2 * 8 + lane / 4;
        const int s = 16 * s_block + i / 2 * 8 + 2 * (lane % 4);
        const float2 sum_s = *reinterpret_cast<const float2 *>(&sum[s]);
        const float low = s <= t ? d[2 * i] * exp2_fast(sum[t] - sum_s.x) * scale : 0.0f;
        const float high = s + 1 <= t ? d[2 * i + 1] * exp2_fast(sum[t] - sum_s.y) * scale : 0.0f;
        *reinterpret_cast<uint32_t *>(scores + swizzled(t, 2 * s_block + i / 2) + 4 * (lane % 4)) =
            pack_act(low, high);
    }
}

/* The warps' shares of P's ten lower blocks: 3, 3, 2 and 2, each warp its column of blocks; the last one has the first
 * one's corner. */
template <int DK>
static __device__ __forceinline__ void
share_scores(uint8_t *scores, uint32_t q_tile, uint32_t k_tile, const float *sum, float scale)
{
    const int warp = threadIdx.x / 32;
    for (int t = 3; t >= (warp == 0 ? 1 : warp); t--) {
        make_scores<DK>(scores, q_tile, k_tile, sum, scale, t, warp);
    }
    if (warp == 3) {
        make_scores<DK>(scores, q_tile, k_tile, sum, scale, 0, 0);
    }
}

/* Two tokens' factors for registers r of the 16 tokens from 16 kk on. */
static __device__ __forceinline__ float2 factors_of(const float *factors, int kk, int r)
{
    return *reinterpret_cast<const float2 *>(&factors[16 * kk + r / 2 * 8 + threadIdx.x % 4 * 2]);
}

/* The warp's sixteen columns of V, transposed; zero for the rows of M. */
static __device__ __forceinline__ void load_values(operand_64 &u, uint32_t values, bool is_value)
{
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t warp = threadIdx.x / 32;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        if (is_value) {
            load_transposed(u[kk], values + swizzled(16 * kk + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
        } else {
            u[kk][0] = u[kk][1] = u[kk][2] = u[kk][3] = 0;
        }
    }
}

/* U^T = (V^T - exp(G) X^T) T^T, from V^T in u and X^T in x; `u_end` gets exp(G_end - G) U^T. */
static __device__ __forceinline__ void
solve_updates(operand_64 &u, operand_64 &u_end, sums_64 &x, uint32_t t_tile, const struct chunk_decays *decays)
{
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float2 decay = factors_of(decays->from_start, i / 4, i % 4);
        uint32_t &r = u[i / 4][i % 4];
        r = pack_act(low_of(r) - decay.x * x[2 * i], high_of(r) - decay.y * x[2 * i + 1]);
        x[2 * i] = x[2 * i + 1] = 0.0f;
    }
    add_lower(x, u, t_tile);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float2 decay = factors_of(decays->to_end, i / 4, i % 4);
        u[i / 4][i % 4] = pack_act(x[2 * i], x[2 * i + 1]);
        u_end[i / 4][i % 4] = pack_act(decay.x * x[2 * i], decay.y * x[2 * i + 1]);
    }
}

static __device__ __forceinline__ void
decay_values(operand_64 &u_end, const operand_64 &u, const struct chunk_decays *decays)
{
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float2 decay = factors_of(decays->to_end, i / 4, i % 4);
        const uint32_t r = u[i / 4][i % 4];
        u_end[i / 4][i % 4] = pack_act(decay.x * low_of(r), decay.y * high_of(r));
    }
}

/* o^T to o, through the columns of V's block that this warp alone has read. `first`: row of the chunk's first token. */
static __device__ __forceinline__ void
store_outputs(const recurrence_params &p, const struct pass_place &place, uint8_t *values, const sums_64 &o, int64_t first)
{
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int token = i / 4 * 16 + i % 4 / 2 * 8 + lane / 4;
        *reinterpret_cast<uint32_t *>(values + swizzled(token, 2 * warp + i % 2) + lane % 4 * 4) =
            transpose_matrix(pack_act(o[2 * i], o[2 * i + 1]));
    }
    __syncwarp();
    act *columns =
        p.o + static_cast<int64_t>(place.head) * p.dv + place.block * 64 + warp * 16 + lane % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = lane / 2 + 16 * i;
        if (first + token < place.span.end) {
            *reinterpret_cast<uint4 *>(columns + (first + token) * p.o_stride) =
                *reinterpret_cast<const uint4 *>(values + swizzled(token, 2 * warp + lane % 2));
        }
    }
}

/* Copies of one chunk into its stage, one group; nothing behind the last. */
template <int DK, bool DELTA, bool OUTPUT>
static __device__ __forceinline__ void
copy_chunk(const recurrence_params &p, const struct pass_place &place, uint32_t stage, int chunk)
{
    using layout = pass_layout<DK, DELTA, OUTPUT>;
    if (chunk < place.n_chunks) {
        const int64_t row = place.span.first + static_cast<int64_t>(chunk) * CHUNK;
        const int64_t end = place.span.end;
        const int thread = threadIdx.x;
        const int keys = place.head / p.heads_per_k_head * DK;
#pragma unroll
        for (int b = 0; b < layout::K_BLOCKS; b++) {
            load_block(stage + b * BLOCK_BYTES, p.k + keys + b * 64, p.k_stride, row, end, thread);
            if (OUTPUT) {
                load_block(stage + layout::Q_OFFSET + b * BLOCK_BYTES, p.q + keys + b * 64, p.q_stride, row, end, thread);
            }
        }
        if (place.block < place.n_value_blocks) {
            load_block(stage + layout::V_OFFSET, p.v + static_cast<int64_t>(place.head) * p.dv + place.block * 64,
                       p.v_stride, row, end, thread);
        }
        if (DELTA) {
            const int64_t at = (place.slot * (p.sub_tokens / CHUNK) + chunk) * p.n_v_heads + place.head;
            load_inverse(stage + layout::T_OFFSET, p.inverses + at * CHUNK * CHUNK, thread);
        }
    }
    copy_commit();
}

/* The state that enters the slot; or zero for the values' rows and the identity for M's. */
template <int DK, bool OUTPUT>
static __device__ __forceinline__ void
start_state(float (&state)[DK / 2], const recurrence_params &p, const struct pass_place &place, int row, int column)
{
#pragma unroll
    for (int i = 0; i < DK / 4; i++) {
        const int r = row + i % 2 * 8;
        const int c = i / 2 * 8 + column;
        const bool is_value = place.block < place.n_value_blocks;
        float2 x = make_float2(!is_value && c == r ? 1.0f : 0.0f, !is_value && c + 1 == r ? 1.0f : 0.0f);
        if (OUTPUT) {
            x = *reinterpret_cast<const float2 *>(p.entering + (place.slot_head * p.dv + r) * DK + c);
        }
        state[2 * i] = x.x;
        state[2 * i + 1] = x.y;
    }
}

template <int DK>
static __device__ __forceinline__ void
store_state(const recurrence_params &p, const struct pass_place &place, const float (&state)[DK / 2], int row, int column)
{
    float *result = place.block < place.n_value_blocks ? p.b + (place.slot_head * p.dv + row) * DK
                                                       : p.m + (place.slot_head * DK + row) * DK;
#pragma unroll
    for (int i = 0; i < DK / 4; i++) {
        *reinterpret_cast<float2 *>(result + i % 2 * 8 * DK + i / 2 * 8 + column) =
            make_float2(state[2 * i], state[2 * i + 1]);
    }
}

/* One chunk of a warp's sixteen rows, from its stage. */
template <int DK, bool DELTA, bool OUTPUT>
static __device__ __forceinline__ void pass_chunk(const recurrence_params &p,
                                                  const struct pass_place &place,
                                                  float (&state)[DK / 2],
                                                  uint8_t *stage_data,
                                                  uint8_t *scores,
                                                  const struct chunk_decays *decays,
                                                  int chunk)
{
    using layout = pass_layout<DK, DELTA, OUTPUT>;
    const uint32_t stage = shared_address(stage_data);
    operand_64 u;
    operand_64 u_end;
    sums_64 o;
    if (OUTPUT) {
        share_scores<DK>(scores, stage + layout::Q_OFFSET, stage, decays->sum, p.scale);
    }
    load_values(u, stage + layout::V_OFFSET, place.block < place.n_value_blocks);
    uint32_t rounded[DK / 16][4];
    if (DELTA || OUTPUT) {
        round_sums(rounded, state);
    }
    if (OUTPUT) {
        multiply_rows<DK>(o, rounded, stage + layout::Q_OFFSET);
    }
    if constexpr (DELTA) {
        sums_64 x;
        multiply_rows<DK>(x, rounded, stage);
        solve_updates(u, u_end, x, stage + layout::T_OFFSET, decays);
    } else {
        decay_values(u_end, u, decays);
    }
    advance_state<DK>(state, decays->whole, u_end, stage);
    if (OUTPUT) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 decay = factors_of(decays->from_start, i / 4, i % 4);
            o[2 * i] *= decay.x * p.scale;
            o[2 * i + 1] *= decay.y * p.scale;
        }
        __syncthreads(); /* P is whole */
        add_lower(o, u, shared_address(scores));
        store_outputs(p, place, stage_data + layout::V_OFFSET, o,
                      place.span.first + static_cast<int64_t>(chunk) * CHUNK);
    }
}

static __device__ __forceinline__ struct pass_place place_of(const recurrence_params &p, bool output)
{
    struct pass_place place;
    place.block = blockIdx.x;
    place.head = blockIdx.y;
    /* As in recurrence_pass.cu: what the first pass has touched last is still in the cache. */
    place.slot = output ? blockIdx.z : p.n_slots - 1 - blockIdx.z;
    place.slot_head = place.slot * p.n_v_heads + place.head;
    place.n_value_blocks = p.dv / 64;
    place.span = span_of(p, place.slot);
    place.n_chunks = static_cast<int>((place.span.end - place.span.first + CHUNK - 1) / CHUNK);
    return place;
}

/* Grid (64-row blocks, heads, slots). */
template <int DK, bool DELTA, bool OUTPUT, int STAGES>
static __global__ void __launch_bounds__(PASS_THREADS, 2) pass_kernel(const recurrence_params p)
{
    using layout = pass_layout<DK, DELTA, OUTPUT>;
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ struct chunk_decays decays[2];
    const struct pass_place place = place_of(p, OUTPUT);
    const int lane = threadIdx.x % 32;
    const bool sums = threadIdx.x / 32 == 3; /* the warp with the least of P to make sums the decays, a chunk ahead */
    const int row = place.block % place.n_value_blocks * 64 + threadIdx.x / 32 * 16 + lane / 4;
    const int column = 2 * (lane % 4);
    if (place.n_chunks == 0) {
        return;
    }
    float total = 0.0f;
    float gates[2] = {0.0f, 0.0f}; /* of the next chunk to sum: on their way meanwhile */
    auto fetch_gates = [&](int chunk) {
        const int64_t token = place.span.first + static_cast<int64_t>(chunk) * CHUNK + 2 * lane;
        gates[0] = gate_at(p, token, place.span.end, place.head);
        gates[1] = gate_at(p, token + 1, place.span.end, place.head);
    };
    auto sum_chunk = [&](int chunk) {
        if (sums && chunk < place.n_chunks) {
            const float first = log2_decay(gates[0]);
            const float second = log2_decay(gates[1]);
            fetch_gates(chunk + 1);
            total += sum_decays(&decays[chunk % 2], first, second, 1.0f, lane);
        }
    };
    auto copy = [&](int chunk) {
        const uint32_t stage = shared_address(stages) + chunk % STAGES * layout::STAGE_BYTES;
        copy_chunk<DK, DELTA, OUTPUT>(p, place, stage, chunk);
    };
    copy(0);
    fetch_gates(0);
    sum_chunk(0);
    float state[DK / 2];
    start_state<DK, OUTPUT>(state, p, place, row, column);
    for (int i = 0; i < place.n_chunks; i++) {
        copy_wait<0>();
        __syncthreads();
        if (STAGES > 1) {
            copy(i + 1);
        }
        sum_chunk(i + 1);
        pass_chunk<DK, DELTA, OUTPUT>(p, place, state, stages + i % STAGES * layout::STAGE_BYTES,
                                      stages + STAGES * layout::STAGE_BYTES, &decays[i % 2], i);
        if (STAGES == 1) {
            __syncthreads();
            copy(i + 1);
        }
    }
    if (!OUTPUT) {
        store_state<DK>(p, place, state, row, column);
    }
    if (!DELTA && !OUTPUT && place.block == 0 && sums && lane == 0) {
        p.m[place.slot_head] = total;
    }
}

template <int DK, bool DELTA, bool OUTPUT, int STAGES>
static cudaError_t launch_stages(cudaStream_t stream, const recurrence_params &p)
{
    using layout = pass_layout<DK, DELTA, OUTPUT>;
    constexpr int n_bytes = STAGES * layout::STAGE_BYTES + layout::P_BYTES;
    const auto kernel = pass_kernel<DK, DELTA, OUTPUT, STAGES>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    const dim3 grid((p.dv + (DELTA && !OUTPUT ? DK : 0)) / 64, p.n_v_heads, static_cast<unsigned>(p.n_slots));
    kernel<<<grid, PASS_THREADS, n_bytes, stream>>>(p);
    return cudaGetLastError();
}

template <int DK, bool DELTA, bool OUTPUT> static cudaError_t launch(cudaStream_t stream, const recurrence_params &p)
{
    constexpr int LEAST_BYTES = 99 * 1024; /* what every device since sm_80 gives a thread block */
    constexpr int TWO = 2 * (pass_layout<DK, DELTA, OUTPUT>::STAGE_BYTES + sizeof(struct chunk_decays)) +
                        pass_layout<DK, DELTA, OUTPUT>::P_BYTES;
    if constexpr (TWO <= LEAST_BYTES) {
        return launch_stages<DK, DELTA, OUTPUT, 2>(stream, p);
    } else {
        int device;
        int room;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess) {
            error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        }
        if (error != cudaSuccess) {
            return error;
        }
        return room >= TWO ? launch_stages<DK, DELTA, OUTPUT, 2>(stream, p)
                           : launch_stages<DK, DELTA, OUTPUT, 1>(stream, p);
    }
}

template <int DK>
static cudaError_t launch_dim(cudaStream_t stream, const recurrence_params &p, bool delta, bool output)
{
    if (output) {
        return delta ? launch<DK, true, true>(stream, p) : launch<DK, false, true>(stream, p);
    }
    return delta ? launch<DK, true, false>(stream, p) : launch<DK, false, false>(stream, p);
}

} // namespace lr::LR_CUDA_ACT::portable

namespace lr::LR_CUDA_ACT
{

cudaError_t launch_recurrence_pass_portable(cudaStream_t stream, const recurrence_params &p, bool delta, bool output)
{
    return p.dk == 128 ? portable::launch_dim<128>(stream, p, delta, output)
                       : portable::launch_dim<64>(stream, p, delta, output);
}

} // namespace lr::LR_CUDA_ACT
