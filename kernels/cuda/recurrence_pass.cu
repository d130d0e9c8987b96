/* One pass over a sub-segment, chunk after chunk, the state in registers. Both passes and both rules are this kernel:
 *
 *   OUTPUT false: from S = 0 to B, and from the identity to M (delta rule): the sub-segment as an affine map
 *   OUTPUT true:  from the state that enters to o
 *
 * The state is kept transposed, St [dv, dk]: a warpgroup holds 64 rows of it as float32 accumulators and never needs
 * another's rows. M is 64-row blocks of the same recurrence with v = 0, so its rows are just more rows. Per chunk, with
 * G the inclusive sums of log decays, T = (I + L)^-1 diag(beta) from recurrence_inverse.cu, P = Q K^T masked and
 * decayed:
 *
 *   X^T  = St K^T                      [64 rows, 64 tokens]     A from registers, B from shared memory, throughout
 *   R^T  = V^T - exp(G) X^T
 *   U^T  = R^T T^T                     (decay rule: U = V)
 *   o^T  = exp(G) (St Q^T) + U^T P^T
 *   St  <- exp(G_end) St + (exp(G_end - G) U^T) K
 *
 * Only differences of G between tokens in order are exponentiated, so nothing overflows. A rule with another decay or
 * update changes the producer's tiles and the lines above, not the pipeline.
 *
 * Warpgroup 0 loads (cp.async into a ring of stages), sums decays and makes P; the others hold the state.
 * St is rounded to the activation type where it meets K and Q, never where it is kept. */
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/recurrence_chunk.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr::LR_CUDA_ACT
{

/* One block a multiprocessor with two row blocks, two with one: registers of the producer and of each consumer thread,
 * and shared memory. */
template <int ROW_BLOCKS> struct budget {
    static constexpr int BLOCKS = ROW_BLOCKS == 1 ? 2 : 1;
    static constexpr int PRODUCER_REGISTERS = ROW_BLOCKS == 1 ? 80 : 88;
    static constexpr int CONSUMER_REGISTERS = ROW_BLOCKS == 1 ? 176 : 208;
    static constexpr int SHARED_BYTES = ROW_BLOCKS == 1 ? 108 * 1024 : 216 * 1024;
};

/* What a stage of the ring holds, in this order, each part a multiple of BLOCK_BYTES. */
template <int DK, int ROW_BLOCKS, bool DELTA, bool OUTPUT> struct pass_layout {
    static constexpr int K_BLOCKS = DK / 64;
    static constexpr uint32_t Q_OFFSET = K_BLOCKS * BLOCK_BYTES;
    static constexpr uint32_t V_OFFSET = Q_OFFSET + (OUTPUT ? K_BLOCKS : 0) * BLOCK_BYTES;
    static constexpr uint32_t T_OFFSET = V_OFFSET + ROW_BLOCKS * BLOCK_BYTES;
    static constexpr uint32_t STAGE_BYTES = T_OFFSET + (DELTA ? BLOCK_BYTES : 0);
    static constexpr uint32_t P_BYTES = OUTPUT ? 2 * BLOCK_BYTES : 0;
    static constexpr int MOST_STAGES = (budget<ROW_BLOCKS>::SHARED_BYTES - P_BYTES) / STAGE_BYTES;
    static constexpr int N_STAGES = MOST_STAGES < 6 ? MOST_STAGES : 6;
};

/* Gates travel further ahead than tiles: a load that is to come back within a chunk's time would have to overtake all
 * the tiles on their way (with one, both passes ran at 76 % of the copy rate). */
constexpr int GATES_AHEAD = 7;

template <int N_STAGES> struct pass_shared {
    float gates[GATES_AHEAD + 1][CHUNK];
    struct chunk_decays decays[N_STAGES];
    uint64_t full[N_STAGES], empty[N_STAGES];
    uint64_t scores_full[2];
};

/* Keeps the compiler from moving reads of accumulators before the wait for the products that fill them, and writes
 * behind the fence that hands them over. No instruction. */
template <int N> static __device__ __forceinline__ void settle(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

/* Counts as this thread's arrival once all copies that it has issued are done. */
static __device__ __forceinline__ void arrive_after_copies(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* One token's gate into shared memory; 0, no decay, where there is none. */
static __device__ __forceinline__ void
copy_gate(uint32_t shared, const recurrence_params &p, int64_t row, int64_t end, int head)
{
    const bool there = p.g != nullptr && row < end;
    const void *from = there ? static_cast<const void *>(p.g + row * p.n_v_heads + head) : p.k;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(there ? 4 : 0)
                 : "memory");
}

/* Zeros where load_inverse brings nothing: once, before the first chunk. 128 threads. */
static __device__ __forceinline__ void clear_above_inverse(uint8_t *block, int thread)
{
    const int piece = thread % 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = thread / 8 + 16 * i;
        if (!holds_inverse(row, piece)) {
            *reinterpret_cast<uint4 *>(block + swizzled(row, piece)) = make_uint4(0, 0, 0, 0);
        }
    }
}

/* P[t, s] = scale exp(G_t - G_s) (q_t . k_s) for s <= t, else 0. 128 threads. */
template <int K_BLOCKS>
static __device__ __forceinline__ void
make_scores(uint8_t *scores, uint32_t q, uint32_t k, const float *sum, float scale, int thread)
{
    float d[32];
    const uint64_t q_tile = tile_descriptor(q, 0);
    const uint64_t k_tile = tile_descriptor(k, 0);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4 * K_BLOCKS; kk++) {
        const uint64_t offset = (kk / 4 * BLOCK_BYTES + kk % 4 * 32) >> 4;
        wgmma_n64_shared(d, q_tile + offset, k_tile + offset, kk > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    settle(d);
    const int lane = thread % 32;
    const int t = thread / 32 * 16 + lane / 4;
    const float sum_low = sum[t];
    const float sum_high = sum[t + 8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int s = 8 * j + 2 * (lane % 4);
        const float2 sum_s = *reinterpret_cast<const float2 *>(&sum[s]);
        const float a = s <= t ? d[4 * j] * exp2_fast(sum_low - sum_s.x) * scale : 0.0f;
        const float b = s + 1 <= t ? d[4 * j + 1] * exp2_fast(sum_low - sum_s.y) * scale : 0.0f;
        const float e = s <= t + 8 ? d[4 * j + 2] * exp2_fast(sum_high - sum_s.x) * scale : 0.0f;
        const float f = s + 1 <= t + 8 ? d[4 * j + 3] * exp2_fast(sum_high - sum_s.y) * scale : 0.0f;
        *reinterpret_cast<uint32_t *>(scores + swizzled(t, j) + 4 * (lane % 4)) = pack_act(a, b);
        *reinterpret_cast<uint32_t *>(scores + swizzled(t + 8, j) + 4 * (lane % 4)) = pack_act(e, f);
    }
}

template <int DK, int ROW_BLOCKS, bool DELTA, bool OUTPUT>
static __device__ __forceinline__ void produce(const recurrence_params &p,
                                               const struct span &span,
                                               int64_t slot,
                                               int head,
                                               int first_block,
                                               uint8_t *stages,
                                               uint8_t *scores,
                                               void *shared)
{
    using layout = pass_layout<DK, ROW_BLOCKS, DELTA, OUTPUT>;
    constexpr int N_STAGES = layout::N_STAGES;
    struct pass_shared<N_STAGES> *sync = static_cast<struct pass_shared<N_STAGES> *>(shared);
    const int thread = threadIdx.x;
    const int lane = thread % 32;
    const int n_chunks = static_cast<int>((span.end - span.first + CHUNK - 1) / CHUNK);
    const int k_head = head / p.heads_per_k_head;
    const int n_value_blocks = p.dv / 64;
    const act *inverses = nullptr;
    if (DELTA) {
        inverses = p.inverses + (slot * (p.sub_tokens / CHUNK) * p.n_v_heads + head) * CHUNK * CHUNK;
    }

    auto issue = [&](int chunk) {
        if (chunk < n_chunks) {
            const uint32_t stage = shared_address(stages + chunk % N_STAGES * layout::STAGE_BYTES);
            const int64_t row = span.first + static_cast<int64_t>(chunk) * CHUNK;
#pragma unroll
            for (int b = 0; b < layout::K_BLOCKS; b++) {
                load_block(stage + b * BLOCK_BYTES, p.k + k_head * DK + b * 64, p.k_stride, row, span.end, thread);
                if (OUTPUT) {
                    load_block(stage + layout::Q_OFFSET + b * BLOCK_BYTES, p.q + k_head * DK + b * 64, p.q_stride, row,
                               span.end, thread);
                }
            }
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) {
                if (first_block + b < n_value_blocks) {
                    load_block(stage + layout::V_OFFSET + b * BLOCK_BYTES,
                               p.v + static_cast<int64_t>(head) * p.dv + (first_block + b) * 64, p.v_stride, row,
                               span.end, thread);
                }
            }
            if (DELTA) {
                load_inverse(stage + layout::T_OFFSET,
                             inverses + static_cast<int64_t>(chunk) * p.n_v_heads * CHUNK * CHUNK, thread);
            }
            arrive_after_copies(&sync->full[chunk % N_STAGES]);
        }
    };

    /* A lane copies the two gates that it will read itself. A group also holds the tiles issued since the last one,
     * which are those of earlier chunks. */
    static_assert(GATES_AHEAD >= N_STAGES - 1, "the wait for a chunk's gates would wait for later tiles");
    auto fetch_gates = [&](int chunk) {
        const int64_t row = span.first + static_cast<int64_t>(chunk) * CHUNK + 2 * lane;
        const uint32_t to = shared_address(&sync->gates[chunk % (GATES_AHEAD + 1)][2 * lane]);
        copy_gate(to, p, row, span.end, head);
        copy_gate(to + 4, p, row + 1, span.end, head);
        copy_commit();
    };

    if (thread < 32) {
        for (int i = 0; i < GATES_AHEAD; i++) {
            fetch_gates(i);
        }
    }
    for (int i = 0; i < N_STAGES - 1; i++) {
        issue(i);
    }
    float total = 0.0f;
    for (int i = 0; i < n_chunks; i++) {
        const int s = i % N_STAGES;
        if (thread < 32) {
            fetch_gates(i + GATES_AHEAD);
            copy_wait<GATES_AHEAD>();
            const float *gates = &sync->gates[i % (GATES_AHEAD + 1)][2 * lane];
            const float first = log2_decay(gates[0]);
            const float second = log2_decay(gates[1]);
            total += sum_decays(&sync->decays[s], first, second, OUTPUT && !DELTA ? p.scale : 1.0f, lane);
            barrier_arrive(&sync->full[s]);
        }
        if (OUTPUT) {
            const uint32_t stage = shared_address(stages + s * layout::STAGE_BYTES);
            barrier_wait(&sync->full[s], i / N_STAGES % 2);
            fence_to_wgmma();
            make_scores<layout::K_BLOCKS>(scores + i % 2 * BLOCK_BYTES, stage + layout::Q_OFFSET, stage,
                                          sync->decays[s].sum, p.scale, thread);
            fence_to_wgmma();
            barrier_arrive(&sync->scores_full[i % 2]);
        }
        if (i > 0) {
            barrier_wait(&sync->empty[(i - 1) % N_STAGES], (i - 1) / N_STAGES % 2);
        }
        issue(i + N_STAGES - 1);
    }
    copy_wait<0>(); /* gates behind the end, of which nothing is read, are on their way */
    if (!DELTA && !OUTPUT && first_block == 0 && thread == 0) {
        p.m[slot * p.n_v_heads + head] = total;
    }
}

/* St (+)= U^T K for the 16 tokens of step kk; K as [token][dk]. */
static __device__ __forceinline__ void add_to_state(float (&state)[64], const uint32_t (&u)[4], uint64_t k_tile, int kk)
{
    wgmma_n128<1>(state, u, k_tile + (kk * 2048 >> 4), true);
}

static __device__ __forceinline__ void add_to_state(float (&state)[32], const uint32_t (&u)[4], uint64_t k_tile, int kk)
{
    wgmma_n64<1>(state, u, k_tile + (kk * 2048 >> 4), true);
}

template <int DK, int ROW_BLOCKS, bool DELTA, bool OUTPUT>
static __device__ __forceinline__ void consume(const recurrence_params &p,
                                               const struct span &span,
                                               int64_t slot,
                                               int head,
                                               int first_block,
                                               uint8_t *stages,
                                               uint8_t *scores,
                                               void *shared)
{
    using layout = pass_layout<DK, ROW_BLOCKS, DELTA, OUTPUT>;
    constexpr int N_STAGES = layout::N_STAGES;
    struct pass_shared<N_STAGES> *sync = static_cast<struct pass_shared<N_STAGES> *>(shared);
    const int warpgroup = threadIdx.x / 128 - 1;
    const int thread = threadIdx.x % 128;
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int n_chunks = static_cast<int>((span.end - span.first + CHUNK - 1) / CHUNK);
    const int n_value_blocks = p.dv / 64;
    const int block = first_block + warpgroup;
    const bool is_value = block < n_value_blocks;
    const int row = (is_value ? block : block - n_value_blocks) * 64 + warp * 16 + lane / 4;
    const int column = 2 * (lane % 4);

    float state[DK / 2];
    const int64_t slot_head = slot * p.n_v_heads + head;
    if (OUTPUT) {
        const float *entering = p.entering + (slot_head * p.dv + row) * DK + column;
#pragma unroll
        for (int j = 0; j < DK / 8; j++) {
            const float2 low = *reinterpret_cast<const float2 *>(entering + 8 * j);
            const float2 high = *reinterpret_cast<const float2 *>(entering + 8 * DK + 8 * j);
            state[4 * j] = low.x;
            state[4 * j + 1] = low.y;
            state[4 * j + 2] = high.x;
            state[4 * j + 3] = high.y;
        }
    } else {
#pragma unroll
        for (int j = 0; j < DK / 8; j++) {
            state[4 * j] = !is_value && 8 * j + column == row ? 1.0f : 0.0f;
            state[4 * j + 1] = !is_value && 8 * j + column + 1 == row ? 1.0f : 0.0f;
            state[4 * j + 2] = !is_value && 8 * j + column == row + 8 ? 1.0f : 0.0f;
            state[4 * j + 3] = !is_value && 8 * j + column + 1 == row + 8 ? 1.0f : 0.0f;
        }
    }

    /* Where this lane's piece of a 16 x 16 block of V^T (and of o^T, which takes its place) lies: see load_transposed.
     */
    const uint32_t value_row = lane / 16 * 8 + lane % 8;
    const uint32_t value_piece = 2 * warp + lane / 8 % 2;

    for (int i = 0; i < n_chunks; i++) {
        const int s = i % N_STAGES;
        const uint32_t stage = shared_address(stages + s * layout::STAGE_BYTES);
        const uint32_t values = stage + layout::V_OFFSET + warpgroup * BLOCK_BYTES;
        const struct chunk_decays *decays = &sync->decays[s];
        const uint64_t k_rows = tile_descriptor(stage, 0);
        const uint64_t k_columns = tile_descriptor(stage, BLOCK_BYTES);
        barrier_wait(&sync->full[s], i / N_STAGES % 2);
        fence_to_wgmma();

        float out[OUTPUT ? 32 : 1];
        float x[DELTA ? 32 : 1];
        if constexpr (DELTA || OUTPUT) {
            uint32_t rounded[DK / 16][4];
#pragma unroll
            for (int kk = 0; kk < DK / 16; kk++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    rounded[kk][r] = pack_act(state[8 * kk + 2 * r], state[8 * kk + 2 * r + 1]);
                }
            }
            wgmma_fence();
            if constexpr (DELTA) {
#pragma unroll
                for (int kk = 0; kk < DK / 16; kk++) {
                    wgmma_n64<0>(x, rounded[kk], k_rows + ((kk / 4 * BLOCK_BYTES + kk % 4 * 32) >> 4), kk > 0);
                }
                wgmma_commit();
            }
            if constexpr (OUTPUT) {
                const uint64_t q_rows = tile_descriptor(stage + layout::Q_OFFSET, 0);
#pragma unroll
                for (int kk = 0; kk < DK / 16; kk++) {
                    wgmma_n64<0>(out, rounded[kk], q_rows + ((kk / 4 * BLOCK_BYTES + kk % 4 * 32) >> 4), kk > 0);
                }
                wgmma_commit();
            }
        }

        uint32_t u[4][4];
        uint32_t u_end[4][4];
        if (is_value) {
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                load_transposed(u[kk], values + swizzled(16 * kk + value_row, value_piece));
            }
        } else {
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                u[kk][0] = u[kk][1] = u[kk][2] = u[kk][3] = 0;
            }
        }
        if constexpr (DELTA) {
            if constexpr (OUTPUT) {
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            settle(x);
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float2 decay =
                        *reinterpret_cast<const float2 *>(&decays->from_start[16 * kk + 8 * (r / 2) + column]);
                    u[kk][r] = pack_act(low_of(u[kk][r]) - decay.x * x[8 * kk + 2 * r],
                                         high_of(u[kk][r]) - decay.y * x[8 * kk + 2 * r + 1]);
                }
            }
            const uint64_t t_rows = tile_descriptor(stage + layout::T_OFFSET, 0);
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                wgmma_n64<0>(x, u[kk], t_rows + (kk * 32 >> 4), kk > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            settle(x);
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float2 decay =
                        *reinterpret_cast<const float2 *>(&decays->to_end[16 * kk + 8 * (r / 2) + column]);
                    const float low = x[8 * kk + 2 * r];
                    const float high = x[8 * kk + 2 * r + 1];
                    u[kk][r] = pack_act(low, high);
                    u_end[kk][r] = pack_act(decay.x * low, decay.y * high);
                }
            }
        } else {
            if constexpr (OUTPUT) {
                wgmma_wait<0>();
            }
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float2 decay =
                        *reinterpret_cast<const float2 *>(&decays->to_end[16 * kk + 8 * (r / 2) + column]);
                    u_end[kk][r] = pack_act(decay.x * low_of(u[kk][r]), decay.y * high_of(u[kk][r]));
                }
            }
        }

        const float whole = decays->whole;
#pragma unroll
        for (int j = 0; j < DK / 2; j++) {
            state[j] *= whole;
        }
        settle(state);
        if constexpr (OUTPUT) {
            settle(out);
            const float scale = DELTA ? p.scale : 1.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 decay = *reinterpret_cast<const float2 *>(&decays->from_start[8 * j + column]);
                out[4 * j] *= decay.x * scale;
                out[4 * j + 1] *= decay.y * scale;
                out[4 * j + 2] *= decay.x * scale;
                out[4 * j + 3] *= decay.y * scale;
            }
            settle(out);
            barrier_wait(&sync->scores_full[i % 2], i / 2 % 2);
            const uint64_t p_rows = tile_descriptor(shared_address(scores + i % 2 * BLOCK_BYTES), 0);
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                wgmma_n64<0>(out, u[kk], p_rows + (kk * 32 >> 4), true);
            }
            wgmma_commit();
        } else {
            wgmma_fence();
        }
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            add_to_state(state, u_end[kk], k_columns, kk);
        }
        wgmma_commit();
        if constexpr (OUTPUT) {
            wgmma_wait<1>();
            settle(out);
            /* Through the block that V left, where every warp overwrites only what it alone has read. */
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                uint32_t o[4];
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    o[r] = pack_act(out[8 * kk + 2 * r], out[8 * kk + 2 * r + 1]);
                }
                store_transposed(values + swizzled(16 * kk + value_row, value_piece), o);
            }
            named_barrier(2 + warpgroup, 128);
            const int64_t first = span.first + static_cast<int64_t>(i) * CHUNK;
            act *o_columns = p.o + static_cast<int64_t>(head) * p.dv + block * 64 + thread % 8 * 8;
            const uint8_t *o_block = stages + s * layout::STAGE_BYTES + layout::V_OFFSET + warpgroup * BLOCK_BYTES;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int token = thread / 8 + 16 * j;
                if (first + token < span.end) {
                    *reinterpret_cast<uint4 *>(o_columns + (first + token) * p.o_stride) =
                        *reinterpret_cast<const uint4 *>(o_block + swizzled(token, thread % 8));
                }
            }
        }
        wgmma_wait<0>();
        settle(state);
        barrier_arrive(&sync->empty[s]);
    }

    if constexpr (!OUTPUT) {
        float *result = (is_value ? p.b + (slot_head * p.dv + row) * DK : p.m + (slot_head * DK + row) * DK) + column;
#pragma unroll
        for (int j = 0; j < DK / 8; j++) {
            *reinterpret_cast<float2 *>(result + 8 * j) = make_float2(state[4 * j], state[4 * j + 1]);
            *reinterpret_cast<float2 *>(result + 8 * DK + 8 * j) = make_float2(state[4 * j + 2], state[4 * j + 3]);
        }
    }
}

/* Grid (parts of ROW_BLOCKS row blocks, heads, slots); (1 + ROW_BLOCKS) warpgroups. */
template <int DK, int ROW_BLOCKS, bool DELTA, bool OUTPUT>
static __global__ void __launch_bounds__(128 * (1 + ROW_BLOCKS), budget<ROW_BLOCKS>::BLOCKS)
    pass_kernel(const recurrence_params p)
{
    using layout = pass_layout<DK, ROW_BLOCKS, DELTA, OUTPUT>;
    constexpr int N_STAGES = layout::N_STAGES;
    extern __shared__ __align__(1024) uint8_t stages[];
    __shared__ struct pass_shared<N_STAGES> sync;
    uint8_t *scores = stages + N_STAGES * layout::STAGE_BYTES;

    const int head = blockIdx.y;
    const int first_block = blockIdx.x * ROW_BLOCKS;
    /* The first pass goes from the last slot to the first, the second back: what the pass before has touched last is
     * still in the cache. */
    const int64_t slot = OUTPUT ? blockIdx.z : p.n_slots - 1 - blockIdx.z;
    const struct span span = span_of(p, slot);
    if (span.first == span.end) {
        return;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < N_STAGES; i++) {
            barrier_init(&sync.full[i], 128 + 32); /* the loads of 128 threads, the decays of a warp */
            barrier_init(&sync.empty[i], 128 * ROW_BLOCKS);
        }
        barrier_init(&sync.scores_full[0], 128);
        barrier_init(&sync.scores_full[1], 128);
    }
    if (DELTA && threadIdx.x < 128) {
        for (int i = 0; i < N_STAGES; i++) {
            clear_above_inverse(stages + i * layout::STAGE_BYTES + layout::T_OFFSET, threadIdx.x);
        }
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<budget<ROW_BLOCKS>::PRODUCER_REGISTERS>();
        produce<DK, ROW_BLOCKS, DELTA, OUTPUT>(p, span, slot, head, first_block, stages, scores, &sync);
    } else {
        registers_grow<budget<ROW_BLOCKS>::CONSUMER_REGISTERS>();
        consume<DK, ROW_BLOCKS, DELTA, OUTPUT>(p, span, slot, head, first_block, stages, scores, &sync);
    }
}

template <int DK, int ROW_BLOCKS, bool DELTA, bool OUTPUT>
static cudaError_t launch(cudaStream_t stream, const recurrence_params &p, int n_row_blocks)
{
    using layout = pass_layout<DK, ROW_BLOCKS, DELTA, OUTPUT>;
    constexpr int n_bytes = layout::N_STAGES * layout::STAGE_BYTES + layout::P_BYTES;
    const auto kernel = pass_kernel<DK, ROW_BLOCKS, DELTA, OUTPUT>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    const dim3 grid(n_row_blocks / ROW_BLOCKS, p.n_v_heads, static_cast<unsigned>(p.n_slots));
    kernel<<<grid, 128 * (1 + ROW_BLOCKS), n_bytes, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t launch_recurrence_pass_hopper(cudaStream_t stream, const recurrence_params &p, bool delta, bool output)
{
    if (p.dk == 128) {
        if (output) {
            return delta ? launch<128, 2, true, true>(stream, p, 2) : launch<128, 2, false, true>(stream, p, 2);
        }
        return delta ? launch<128, 2, true, false>(stream, p, 4) : launch<128, 2, false, false>(stream, p, 2);
    }
    if (output) {
        return delta ? launch<64, 1, true, true>(stream, p, 1) : launch<64, 1, false, true>(stream, p, 1);
    }
    return delta ? launch<64, 1, true, false>(stream, p, 2) : launch<64, 1, false, false>(stream, p, 1);
}

} // namespace lr::LR_CUDA_ACT
