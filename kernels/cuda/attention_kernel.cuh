/* Attention over KV blocks for Hopper: a warpgroup of producers and C consumer warpgroups of 64 tile rows each, which
 * run S = Q K^T -> softmax -> O += P V  with wgmma. A multiprocessor's thread block goes through its share of the
 * tiles.
 *
 *   consumer 0   | QK j | softmax j ........ | PV j-1 | QK j+1 | softmax j+1
 *   consumer 1          | QK j | softmax j ........ | PV j-1 | QK j+1 |
 *
 * The next step's Q K^T is issued before the previous step's P V, and both run while the softmax works on registers;
 * the warpgroups take turns on the tensor cores by named barriers (Shah et al. 2024, FlashAttention-3). Every row folds
 * its steps in ascending order and closes its row sum at each, so that its bits depend neither on the tile that it lies
 * in nor on how a list is divided over calls. */
#ifndef LR_KERNELS_CUDA_ATTENTION_KERNEL_CUH
#define LR_KERNELS_CUDA_ATTENTION_KERNEL_CUH

#include "kernels/cuda/attention_walk.cuh"

#include <math.h>

namespace lr::LR_CUDA_ACT
{

template <int D, int KEYS> struct fold_state {
    float o[D / 2];        /* [D / 8][4]: columns 8 i + 2 (lane mod 4) + {0, 1} of the first row, then of the second */
    float score[KEYS / 2]; /* [KEYS / 8][4]: the same for keys; becomes the weights before rounding */
    uint32_t weights[KEYS / 4];
    float m[2], l[2], factor[2]; /* of the thread's two rows: lane / 4 of its warp's sixteen, and 8 further */
};

/* S = Q K^T. Asynchronous: the caller commits and waits. PANEL: bytes between two 64-channel panels of Q. */
template <int D, int KEYS, uint32_t PANEL>
static __device__ __forceinline__ void multiply_qk(float (&score)[KEYS / 2], uint64_t q, uint64_t k)
{
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        const uint32_t panel = step / 4, offset = (step % 4) * 32;
        const uint64_t a = descriptor_at(q, panel * PANEL + offset),
                       b = descriptor_at(k, panel * (KEYS * 128) + offset);
        if constexpr (KEYS == 128)
            wgmma_n128_shared(score, a, b, step > 0);
        else
            wgmma_n64_shared(score, a, b, step > 0);
    }
}

/* O += P V. V is [key][channel]: the reduced dimension runs over its rows. Asynchronous. */
template <int D, int KEYS>
static __device__ __forceinline__ void multiply_pv(float (&o)[D / 2], const uint32_t (&weights)[KEYS / 4], uint64_t v)
{
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3]};
        const uint64_t b = descriptor_at(v, step * (16 * 128));
        if constexpr (D == 256)
            wgmma_n256(o, a, b);
        else if constexpr (D == 128)
            wgmma_n128<1>(o, a, b, true);
        else
            wgmma_n64<1>(o, a, b, true);
    }
}

/* Scores of keys that a row may not see become -inf: it sees those below `to`, but, with a window, none in [sinks,
 * from). */
template <int KEYS>
static __device__ __forceinline__ void mask_scores(float (&score)[KEYS / 2],
                                                   const lr_cuda_fold &a,
                                                   const step_note &note,
                                                   int64_t position_0,
                                                   int64_t position_1,
                                                   int column)
{
    const bool windowed = a.window > 0 && !(note.flags & STEP_WHOLE);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t position = r == 0 ? position_0 : position_1;
        int to = clamp_key(position + 1 - note.position);
        to = (to < note.n_keys ? to : note.n_keys) - column;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            if (8 * (i / 2) + i % 2 >= to)
                score[4 * (i / 2) + 2 * r + i % 2] = -INFINITY;
        if (!windowed)
            continue;
        const int from = clamp_key(position - a.window + 1 - note.position) - column;
        const int sinks = clamp_key(a.sinks - note.position) - column;
        const uint32_t hidden = from > sinks ? static_cast<uint32_t>(from - sinks) : 0;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            if (static_cast<uint32_t>(8 * (i / 2) + i % 2 - sinks) < hidden)
                score[4 * (i / 2) + 2 * r + i % 2] = -INFINITY;
    }
}

/* One step's online softmax on registers: scores become weights, m and l move on, `factor` is what o must be multiplied
 * by. The reference m is raised only where a score is more than MAX_TRAIL above it. */
template <int D, int KEYS> static __device__ __forceinline__ void fold_scores(fold_state<D, KEYS> &t, float scale2)
{
    float top[2], base[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float even = fmaxf(t.score[2 * r], t.score[2 * r + 1]);
        float odd = fmaxf(t.score[4 + 2 * r], t.score[4 + 2 * r + 1]);
#pragma unroll
        for (int i = 2; i < KEYS / 8; i += 2) {
            even = fmaxf(even, fmaxf(t.score[4 * i + 2 * r], t.score[4 * i + 2 * r + 1]));
            odd = fmaxf(odd, fmaxf(t.score[4 * i + 4 + 2 * r], t.score[4 * i + 4 + 2 * r + 1]));
        }
        top[r] = fmaxf(even, odd);
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2)) * scale2;
        const float m = top[r] > t.m[r] + MAX_TRAIL ? top[r] : t.m[r];
        /* a row that has seen nothing yet keeps -inf; its weights are exp2(-inf) = 0 */
        base[r] = m == -INFINITY ? 0.0f : m;
        t.factor[r] = m == t.m[r] ? 1.0f : exp2_fast(t.m[r] - base[r]);
        t.m[r] = m;
    }
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float &x = t.score[4 * i + 2 * r + c];
                x = exp2_fast(fmaf(x, scale2, -base[r]));
                sum[r][c] += x;
            }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float all = sum[r][0] + sum[r][1];
        all += __shfl_xor_sync(0xffffffffu, all, 1);
        all += __shfl_xor_sync(0xffffffffu, all, 2);
        t.l[r] = fmaf(t.l[r], t.factor[r], all);
    }
}

/* After the previous P V: rounds the new weights and rescales o where some row of the warp asks for it. */
template <int D, int KEYS> static __device__ __forceinline__ void settle(fold_state<D, KEYS> &t)
{
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
        t.weights[i] = pack_act(t.score[2 * i], t.score[2 * i + 1]);
    if (__any_sync(0xffffffffu, t.factor[0] != 1.0f || t.factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            t.o[i] *= t.factor[i / 2 & 1];
    }
}

template <int D, int KEYS>
static __device__ __forceinline__ void
load_state(const lr_cuda_fold &a, fold_state<D, KEYS> &t, const row_place &place, int64_t slot, int r, int column)
{
    const bool there = a.resume && place.position >= 0;
    const int64_t at = (slot * a.n_rows + place.row) * a.shape.n_heads + place.head;
    t.m[r] = there ? a.m[at] : -INFINITY;
    t.l[r] = there ? a.l[at] : 0.0f;
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            t.o[4 * i + 2 * r + c] =
                there && 8 * i < a.shape.head_dim ? a.o[at * a.shape.head_dim + 8 * i + column + c] : 0.0f;
}

template <int D, int KEYS>
static __device__ __forceinline__ void store_state(
    const lr_cuda_fold &a, const fold_state<D, KEYS> &t, const row_place &place, int64_t slot, int r, int column)
{
    if (place.position < 0)
        return;
    const int64_t at = (slot * a.n_rows + place.row) * a.shape.n_heads + place.head;
    if (column == 0) {
        a.m[at] = t.m[r];
        a.l[at] = t.l[r];
    }
    if (a.y == nullptr) {
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            if (8 * i < a.shape.head_dim)
                *reinterpret_cast<float2 *>(&a.o[at * a.shape.head_dim + 8 * i + column]) =
                    make_float2(t.o[4 * i + 2 * r], t.o[4 * i + 2 * r + 1]);
        return;
    }
    const float inverse = t.l[r] > 0.0f ? 1.0f / t.l[r] : 0.0f;
    uint16_t *y = static_cast<uint16_t *>(a.y) + place.row * a.y_stride + place.head * a.shape.head_dim;
    const bool aligned = (reinterpret_cast<uintptr_t>(y) & 3) == 0;
#pragma unroll
    for (int i = 0; i < D / 8; i++)
        if (8 * i < a.shape.head_dim) {
            const uint32_t pair = pack_act(t.o[4 * i + 2 * r] * inverse, t.o[4 * i + 2 * r + 1] * inverse);
            if (aligned) {
                *reinterpret_cast<uint32_t *>(y + 8 * i + column) = pair;
            } else {
                y[8 * i + column] = static_cast<uint16_t>(pair);
                y[8 * i + column + 1] = static_cast<uint16_t>(pair >> 16);
            }
        }
}

/* The whole warp: behind it, one lane may give the stage back for all. */
static __device__ __forceinline__ step_note load_note(const step_note *notes, uint32_t stage)
{
    const int4 x = load_shared(shared_address(notes) + stage * static_cast<uint32_t>(sizeof *notes));
    __syncwarp();
    return {static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(x.y)) << 32 | static_cast<uint32_t>(x.x)),
            x.z, x.w};
}

/* The warpgroups take turns on the tensor cores: barrier 1 + c lets consumer c issue. */
template <int C> static __device__ __forceinline__ void take_turn(int consumer)
{
    if constexpr (C > 1)
        named_barrier(1 + consumer, 2 * WARPGROUP);
}

template <int C> static __device__ __forceinline__ void give_turn(int consumer)
{
    if constexpr (C > 1)
        named_arrive(1 + (consumer + 1 == C ? 0 : consumer + 1), 2 * WARPGROUP);
}

/* Where a consumer is in the ring. */
struct ring_place {
    uint32_t stage, parity;
};

template <int STAGES> static __device__ __forceinline__ ring_place after(ring_place p)
{
    const uint32_t stage = p.stage + 1 == STAGES ? 0 : p.stage + 1;
    return {stage, p.parity ^ (stage == 0)};
}

template <int D, int C>
static __device__ __forceinline__ void consume(const lr_cuda_fold &a,
                                               const tile &w,
                                               int group,
                                               int consumer,
                                               uint32_t round,
                                               ring_place &at,
                                               attention_shared<D, C> &s)
{
    using shape = tile_shape<D, C>;
    constexpr int KEYS = shape::KEYS, STAGES = shape::STAGES;
    constexpr uint32_t PANEL = shape::ROWS * 128;
    const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, column = 2 * (lane % 4);
    const int tile_row = consumer * UNIT + thread / 32 * 16 + lane / 4;
    const float scale2 = a.scale * LOG2E;
    const int64_t position_0 = place_row(a, w, group, tile_row).position;
    const int64_t position_1 = place_row(a, w, group, tile_row + 8).position;
    const uint64_t q_tile = tile_descriptor(shared_address(s.q) + consumer * UNIT * 128, 0);
    const uint64_t k_tile = tile_descriptor(shared_address(s.k), 0);
    const uint64_t v_tile = tile_descriptor(shared_address(s.v), KEYS * 128);
    fold_state<D, KEYS> t;
#pragma unroll
    for (int r = 0; r < 2; r++)
        load_state(a, t, place_row(a, w, group, tile_row + 8 * r), w.rows.slot, r, column);

    barrier_wait(&s.q_full[consumer], round & 1);
    barrier_wait(&s.k_full[at.stage], at.parity);
    step_note note = load_note(s.notes, at.stage);
    if (note.n_keys == 0) {
        if (lane == 0) {
            barrier_arrive(&s.q_empty[consumer]);
            barrier_arrive(&s.k_empty[at.stage]);
            barrier_arrive(&s.v_empty[at.stage]);
        }
    } else {
        take_turn<C>(consumer);
        wgmma_fence();
        multiply_qk<D, KEYS, PANEL>(t.score, q_tile, descriptor_at(k_tile, at.stage * shape::HALF_BYTES));
        wgmma_commit();
        give_turn<C>(consumer);
        wgmma_wait<0>();
        if (lane == 0)
            barrier_arrive(&s.k_empty[at.stage]);
        if (!(note.flags & STEP_FULL))
            mask_scores<KEYS>(t.score, a, note, position_0, position_1, column);
        fold_scores(t, scale2);
        settle(t);
        while (!(note.flags & STEP_LAST)) {
            const ring_place next = after<STAGES>(at);
            barrier_wait(&s.k_full[next.stage], next.parity);
            note = load_note(s.notes, next.stage);
            take_turn<C>(consumer);
            wgmma_fence();
            multiply_qk<D, KEYS, PANEL>(t.score, q_tile, descriptor_at(k_tile, next.stage * shape::HALF_BYTES));
            wgmma_commit();
            barrier_wait(&s.v_full[at.stage], at.parity);
            multiply_pv<D, KEYS>(t.o, t.weights, descriptor_at(v_tile, at.stage * shape::HALF_BYTES));
            wgmma_commit();
            give_turn<C>(consumer);
            wgmma_wait<1>();
            if (lane == 0)
                barrier_arrive(&s.k_empty[next.stage]);
            if (!(note.flags & STEP_FULL))
                mask_scores<KEYS>(t.score, a, note, position_0, position_1, column);
            fold_scores(t, scale2);
            wgmma_wait<0>();
            if (lane == 0)
                barrier_arrive(&s.v_empty[at.stage]);
            settle(t);
            at = next;
        }
        if (lane == 0)
            barrier_arrive(&s.q_empty[consumer]);
        barrier_wait(&s.v_full[at.stage], at.parity);
        wgmma_fence();
        multiply_pv<D, KEYS>(t.o, t.weights, descriptor_at(v_tile, at.stage * shape::HALF_BYTES));
        wgmma_commit();
        wgmma_wait<0>();
        if (lane == 0)
            barrier_arrive(&s.v_empty[at.stage]);
    }
    at = after<STAGES>(at);
#pragma unroll
    for (int r = 0; r < 2; r++)
        store_state(a, t, place_row(a, w, group, tile_row + 8 * r), w.rows.slot, r, column);
}

template <int D, int C> static __device__ __forceinline__ void make_barriers(attention_shared<D, C> &s)
{
    constexpr int WARPS = WARPGROUP / 32;
    for (int i = 0; i < tile_shape<D, C>::STAGES; i++) {
        barrier_init(&s.k_full[i], 1);
        barrier_init(&s.v_full[i], 1);
        barrier_init(&s.k_empty[i], WARPS * C);
        barrier_init(&s.v_empty[i], WARPS * C);
    }
    for (int i = 0; i < C; i++) {
        barrier_init(&s.q_full[i], 1);
        barrier_init(&s.q_empty[i], WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* Work w of the launch's n_work goes to thread block w mod gridDim.x. Every role goes through the same tiles. */
template <int D, int C>
__global__ void __launch_bounds__(tile_shape<D, C>::THREADS, (tile_shape<D, C>::BLOCKS_EACH))
    attention_kernel(const __grid_constant__ lr_cuda_fold a, int n_tiles, int n_work)
{
    using shape = tile_shape<D, C>;
    extern __shared__ uint8_t raw[];
    attention_shared<D, C> &s =
        *reinterpret_cast<attention_shared<D, C> *>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
    const int group = static_cast<int>(a.shape.n_heads / a.shape.n_kv_heads);
    if (threadIdx.x == 0)
        make_barriers(s);
    __syncthreads();
    /* the shuffle tells the compiler that all lanes agree */
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0) / 32;
    tile t;
    if (warp < WARPGROUP / 32) {
        registers_shrink<shape::PRODUCER_REGISTERS>();
        ring_writer<D, C> ring = {s, 0, 0, nullptr, {}};
        uint32_t round = 0;
        for (int work = blockIdx.x; work < n_work && warp <= C; work += gridDim.x) {
            if (!take_tile(a, group, n_tiles, shape::ROWS, work, t))
                continue;
            if (warp == 0)
                produce(make_walk(a, t), t.kv_head, ring);
            else
                bring_queries(a, t, group, warp - 1, round, s);
            round++;
        }
    } else {
        registers_grow<shape::CONSUMER_REGISTERS>();
        const int consumer = warp / (WARPGROUP / 32) - 1;
        ring_place at = {0, 0};
        uint32_t round = 0;
        if (consumer == C - 1)
            give_turn<C>(consumer); /* consumer 0 goes first */
        for (int work = blockIdx.x; work < n_work; work += gridDim.x)
            if (take_tile(a, group, n_tiles, shape::ROWS, work, t))
                consume(a, t, group, consumer, round++, at, s);
        if (consumer == 0)
            take_turn<C>(consumer); /* the last turn given, so that the barriers end even */
    }
}

template <int D, int C> static cudaError_t launch(const lr_cuda_fold &fold, int n_multiprocessors, cudaStream_t stream)
{
    using shape = tile_shape<D, C>;
    const int bytes = sizeof(attention_shared<D, C>) + 1024;
    const int64_t group = fold.shape.n_heads / fold.shape.n_kv_heads;
    const int64_t n_tiles = (fold.max_tokens * group + shape::ROWS - 1) / shape::ROWS;
    const int64_t n_work = n_tiles * fold.shape.n_kv_heads * fold.n_groups,
                  room = n_multiprocessors * shape::BLOCKS_EACH;
    const cudaError_t error =
        cudaFuncSetAttribute(attention_kernel<D, C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess)
        return error;
    attention_kernel<D, C><<<static_cast<unsigned>(n_work < room ? n_work : room), shape::THREADS, bytes, stream>>>(
        fold, static_cast<int>(n_tiles), static_cast<int>(n_work));
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT

#endif
