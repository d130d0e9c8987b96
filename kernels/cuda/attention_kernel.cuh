/* Attention over KV blocks for Hopper: a warpgroup of producers and C consumer warpgroups of 64 tile rows each, which
 * run S = Q K^T -> softmax -> O += P V  with wgmma. A multiprocessor's thread block takes tile after tile, as long as
 * there are any.
 *
 *   consumer 0   | QK j | softmax j ........ | QK j+1 | softmax j+1
 *                       | PV j-1 |                    | PV j |
 *   consumer 1          | QK j | softmax j ........ | QK j+1 | softmax j+1
 *                              | PV j-1 |                    | PV j |
 *
 * The next step's Q K^T is issued before the previous step's P V, and P V runs while the softmax works on registers;
 * the warpgroups take turns on the tensor cores by named barriers (Shah et al. 2024, FlashAttention-3). Every row folds
 * its steps in ascending order and closes its row sum at each, so that its bits depend neither on the tile that it lies
 * in nor on how a list is divided over calls. */
#ifndef LR_KERNELS_CUDA_ATTENTION_KERNEL_CUH
#define LR_KERNELS_CUDA_ATTENTION_KERNEL_CUH

#include "kernels/cuda/attention_rows.cuh"
#include "kernels/cuda/attention_walk.cuh"

#include <math.h>

namespace lr::LR_CUDA_ACT
{

/* A row's reference stays until the weights of a step sum up to more: in float16 none may reach 2^16. */
constexpr float MAX_SUM = 0x1p14f;
/* From here on float32 may have overflown, and the scores must be made again. */
constexpr float OVERFLOWN = 0x1p96f;

/* The softmax of a thread's two rows: lane / 4 of its warp's sixteen, and 8 further. */
template <int D> struct fold_state {
    float o[D / 2];   /* [D / 8][4]: columns 8 i + 2 (lane mod 4) + {0, 1} of the first row, then of the second */
    float m[2], l[2]; /* the reference and the sum; l is 0, and m too, as long as nothing was seen */
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

/* The keys of a step that a row sees, numbered within the step: those below `to`, but none of [sinks, sinks + hidden).
 * attention_rows.cuh's visible_keys say the same; with them the loop has 20 to 30 bytes more of registers to spill. */
struct key_bounds {
    int to, sinks;
    uint32_t hidden;

    __device__ __forceinline__ bool sees(int key) const
    {
        return key < to && static_cast<uint32_t>(key - sinks) >= hidden;
    }
};

static __device__ __forceinline__ key_bounds bounds_of(const lr_cuda_fold &a, const step_note &note, int64_t position)
{
    key_bounds b = {clamp_key(position + 1 - note.position), 0, 0};
    b.to = b.to < note.n_keys ? b.to : note.n_keys;
    if (a.window > 0 && !(note.flags & STEP_WHOLE)) {
        const int from = clamp_key(position - a.window + 1 - note.position);
        b.sinks = clamp_key(a.sinks - note.position);
        b.hidden = from > b.sinks ? static_cast<uint32_t>(from - b.sinks) : 0;
    }
    return b;
}

/* Scores of keys that row r of the thread does not see become -inf. score: [KEYS / 8][4], as in fold_state. */
template <int KEYS>
static __device__ __forceinline__ void mask_row(float (&score)[KEYS / 2], int r, key_bounds b, int column)
{
    b.to -= column;
    b.sinks -= column;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
        if (8 * (i / 2) + i % 2 >= b.to)
            score[4 * (i / 2) + 2 * r + i % 2] = -INFINITY;
    if (b.hidden == 0)
        return;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
        if (!b.sees(8 * (i / 2) + i % 2))
            score[4 * (i / 2) + 2 * r + i % 2] = -INFINITY;
}

/* Over the four lanes that share a row: the same bits in each. */
static __device__ __forceinline__ float row_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

static __device__ __forceinline__ float row_top(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/* The first reference of rows that have seen nothing so far: the whole number next to their largest score. */
template <int D, int KEYS>
static __device__ __forceinline__ void begin_rows(fold_state<D> &t, const float (&score)[KEYS / 2], float scale2)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = -INFINITY;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            top = fmaxf(top, score[4 * (i / 2) + 2 * r + i % 2]);
        top = row_top(top);
        if (t.l[r] == 0.0f && top > -INFINITY)
            t.m[r] = rintf(top * scale2);
    }
}

/* Scores become weights exp2(scale2 score - m); `sum`: of each row. */
template <int KEYS>
static __device__ __forceinline__ void
weigh_scores(float (&score)[KEYS / 2], float scale2, const float (&m)[2], float (&sum)[2])
{
    float part[2][2] = {};
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float &x = score[4 * i + 2 * r + c];
                x = exp2_fast(fmaf(x, scale2, -m[r]));
                part[r][c] += x;
            }
#pragma unroll
    for (int r = 0; r < 2; r++)
        sum[r] = row_sum(part[r][0] + part[r][1]);
}

template <int KEYS>
static __device__ __forceinline__ void round_weights(uint32_t (&weights)[KEYS / 4], const float (&score)[KEYS / 2])
{
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
        weights[i] = pack_act(score[2 * i], score[2 * i + 1]);
}

/* q . k of one row and key, from swizzled tiles; `q_panel`, `k_panel`: bytes between their 64-channel panels. */
template <int D>
static __device__ __forceinline__ float
dot_shared(uint32_t q, uint32_t q_panel, uint32_t row, uint32_t k, uint32_t k_panel, uint32_t key)
{
    float sum = 0.0f;
#pragma unroll 1
    for (uint32_t piece = 0; piece < D / 8; piece++) {
        const int4 x = load_shared(q + piece / 8 * q_panel + swizzled(row, piece % 8));
        const int4 y = load_shared(k + piece / 8 * k_panel + swizzled(key, piece % 8));
        const int pairs[4][2] = {{x.x, y.x}, {x.y, y.y}, {x.z, y.z}, {x.w, y.w}};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t a = static_cast<uint32_t>(pairs[i][0]), b = static_cast<uint32_t>(pairs[i][1]);
            sum = fmaf(low_of(a), low_of(b), sum);
            sum = fmaf(high_of(a), high_of(b), sum);
        }
    }
    return sum;
}

/* A row that does not exist is as one that has seen something: it never asks for a reference. */
template <int D>
static __device__ __forceinline__ void
load_state(const lr_cuda_fold &a, fold_state<D> &t, const row_place &place, int64_t slot, int r, int column)
{
    const bool there = a.resume && place.position >= 0;
    const int64_t at = (slot * a.n_rows + place.row) * a.shape.n_heads + place.head;
    t.l[r] = there ? a.l[at] : place.position < 0 ? 1.0f : 0.0f;
    t.m[r] = there && t.l[r] > 0.0f ? a.m[at] : 0.0f;
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            t.o[4 * i + 2 * r + c] =
                there && 8 * i < a.shape.head_dim ? a.o[at * a.shape.head_dim + 8 * i + column + c] : 0.0f;
}

/* A stage's note is read when it is wanted: it lies there until the stage's keys are released. */
static __device__ __forceinline__ step_note load_note(const step_note *notes, uint32_t stage)
{
    const int4 x = load_shared(shared_address(notes) + stage * static_cast<uint32_t>(sizeof *notes));
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

/* A consumer warpgroup and its tile, as one thread sees it. */
template <int D, int C, int KEYS> struct consumer_tile {
    using shape = tile_shape<D, C, KEYS>;
    static constexpr uint32_t Q_PANEL = shape::ROWS * 128;

    const lr_cuda_fold &a;
    attention_shared<D, C, KEYS> &s;
    int consumer, lane, warp_row; /* warp_row: the thread's first row of the warpgroup's 64 */
    int64_t position[2];          /* of the thread's rows */
    float scale2;
    uint64_t q, k, v; /* descriptors: of the queries, and of the first stage */

    __device__ __forceinline__ int column() const
    {
        return 2 * (lane % 4);
    }

    __device__ __forceinline__ void issue_qk(float (&score)[KEYS / 2], uint32_t stage) const
    {
        multiply_qk<D, KEYS, Q_PANEL>(score, q, descriptor_at(k, stage * shape::HALF_BYTES));
        wgmma_commit();
    }

    __device__ __forceinline__ void
    issue_pv(fold_state<D> &t, const uint32_t (&weights)[KEYS / 4], uint32_t stage) const
    {
        multiply_pv<D, KEYS>(t.o, weights, descriptor_at(v, stage * shape::HALF_BYTES));
        wgmma_commit();
    }

    /* One thread of each warp, behind the reads of all of its lanes. (The compiler knows that the warp is together and
     * makes no instruction of the first line; racecheck then does not see that they are ordered.) */
    __device__ __forceinline__ void release(uint64_t *empty) const
    {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(empty);
    }

    /* Row r of a step again, where its weights overflowed: the scores are gone, but the keys are still in their stage.
     * Returns what the row's earlier sums must be multiplied by. */
    __device__ __forceinline__ float
    repeat_row(float (&score)[KEYS / 2], uint32_t stage, int r, float &m, float &sum) const
    {
        const key_bounds b = bounds_of(a, load_note(s.notes, stage), position[r]);
        const uint32_t queries = shared_address(s.q) + consumer * UNIT * 128, keys = shared_address(s.k[stage]);
        float again[KEYS / 4], top = -INFINITY, all = 0.0f;
#pragma unroll 1
        for (int i = 0; i < KEYS / 4; i++) {
            const int key = 8 * (i / 2) + i % 2 + column();
            const float x = dot_shared<D>(queries, Q_PANEL, warp_row + 8 * r, keys, KEYS * 128, key);
            again[i] = b.sees(key) ? x * scale2 : -INFINITY;
            top = fmaxf(top, again[i]);
        }
        top = rintf(row_top(top));
#pragma unroll 1
        for (int i = 0; i < KEYS / 4; i++) {
            again[i] = exp2_fast(again[i] - top);
            all += again[i];
        }
        all = row_sum(all);
        if (sum < OVERFLOWN)
            return 1.0f; /* it was the warp's other rows */
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            score[4 * (i / 2) + 2 * r + i % 2] = again[i];
        const float factor = exp2_fast(m - top);
        sum = all;
        m = top;
        return factor;
    }

    /* Some row of the warp has a sum beyond MAX_SUM: its reference goes up by whole powers of two. No product runs. */
    __device__ __forceinline__ void
    raise_rows(fold_state<D> &t, float (&score)[KEYS / 2], uint32_t stage, float (&sum)[2]) const
    {
        const bool repeat = __any_sync(0xffffffffu, !(sum[0] < OVERFLOWN && sum[1] < OVERFLOWN));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float before = repeat ? repeat_row(score, stage, r, t.m[r], sum[r]) : 1.0f;
            const float up = sum[r] > MAX_SUM ? static_cast<float>((__float_as_int(sum[r]) >> 23) - 127) : 0.0f;
            const float factor = exp2_fast(-up); /* not of m's difference: m + up may be rounded, the weights must fit */
            t.m[r] += up;
            t.l[r] *= before * factor;
            sum[r] *= factor;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++)
                score[4 * (i / 2) + 2 * r + i % 2] *= factor;
#pragma unroll
            for (int i = 0; i < D / 4; i++)
                t.o[4 * (i / 2) + 2 * r + i % 2] *= before * factor;
        }
    }

    /* One step's softmax: scores become weights, m and l move on. No maximum is looked for: a row's reference stays
     * until the sum of its weights is too large. The previous P V may still run at the beginning, but not this step's
     * Q K^T; at the end nothing runs. */
    __device__ __forceinline__ void
    fold(fold_state<D> &t, float (&score)[KEYS / 2], int32_t flags, uint32_t stage) const
    {
        float sum[2];
        if (!(flags & STEP_FULL))
#pragma unroll
            for (int r = 0; r < 2; r++)
                mask_row<KEYS>(score, r, bounds_of(a, load_note(s.notes, stage), position[r]), column());
        if (__any_sync(0xffffffffu, t.l[0] == 0.0f || t.l[1] == 0.0f))
            begin_rows<D, KEYS>(t, score, scale2);
        weigh_scores<KEYS>(score, scale2, t.m, sum);
        /* All of the warpgroup wait, and where only some warps have rows to raise, before that. Four lanes hold a row and
         * vote alike, so no vote is 1: the compiler cannot know, and leaves the wait behind the weights. */
        const uint32_t too_large = __ballot_sync(0xffffffffu, !(sum[0] <= MAX_SUM && sum[1] <= MAX_SUM));
        if (too_large != 1) {
            wgmma_wait<0>();
            if (too_large != 0)
                raise_rows(t, score, stage, sum);
        }
        release(&s.k_empty[stage]);
        t.l[0] += sum[0];
        t.l[1] += sum[1];
    }

    /* The steps of the tile, from the one at `at` on; `at` becomes the last one's place. */
    __device__ __forceinline__ void fold_steps(fold_state<D> &t, ring_place &at) const
    {
        float score[KEYS / 2];
        uint32_t weights[KEYS / 4];
        take_turn<C>(consumer);
        wgmma_fence();
        issue_qk(score, at.stage);
        give_turn<C>(consumer);
        wgmma_wait<0>();
        int32_t flags = load_note(s.notes, at.stage).flags;
        fold(t, score, flags, at.stage);
        round_weights<KEYS>(weights, score);
        while (!(flags & STEP_LAST)) {
            const ring_place next = after<shape::STAGES>(at);
            barrier_wait(&s.k_full[next.stage], next.parity);
            flags = load_note(s.notes, next.stage).flags;
            take_turn<C>(consumer);
            wgmma_fence();
            issue_qk(score, next.stage);
            barrier_wait(&s.v_full[at.stage], at.parity);
            issue_pv(t, weights, at.stage);
            give_turn<C>(consumer);
            wgmma_wait<1>();
            fold(t, score, flags, next.stage);
            release(&s.v_empty[at.stage]);
            round_weights<KEYS>(weights, score);
            at = next;
        }
        release(&s.q_empty[consumer]);
        barrier_wait(&s.v_full[at.stage], at.parity);
        wgmma_fence();
        issue_pv(t, weights, at.stage);
        wgmma_wait<0>();
        release(&s.v_empty[at.stage]);
    }
};

template <int D, int C, int KEYS>
static __device__ __forceinline__ void consume(const lr_cuda_fold &a,
                                               float scale2,
                                               const tile &w,
                                               int group,
                                               int consumer,
                                               uint32_t round,
                                               ring_place &at,
                                               attention_shared<D, C, KEYS> &s)
{
    using shape = tile_shape<D, C, KEYS>;
    const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, warp_row = thread / 32 * 16 + lane / 4;
    row_place place[2];
    fold_state<D> t;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        place[r] = place_row(a, w, group, consumer * UNIT + warp_row + 8 * r);
        load_state(a, t, place[r], w.rows.slot, r, 2 * (lane % 4));
    }
    const consumer_tile<D, C, KEYS> c = {a,
                                         s,
                                         consumer,
                                         lane,
                                         warp_row,
                                         {place[0].position, place[1].position},
                                         scale2,
                                         tile_descriptor(shared_address(s.q) + consumer * UNIT * 128, 0),
                                         tile_descriptor(shared_address(s.k), 0),
                                         tile_descriptor(shared_address(s.v), KEYS * 128)};
    __syncwarp(); /* of what follows, much wants the warp together */
    barrier_wait(&s.q_full[consumer], round & 1);
    barrier_wait(&s.k_full[at.stage], at.parity);
    if (load_note(s.notes, at.stage).n_keys == 0) {
        barrier_wait(&s.v_full[at.stage], at.parity); /* no values come, but the stage's phases go in step */
        c.release(&s.q_empty[consumer]);
        c.release(&s.k_empty[at.stage]);
        c.release(&s.v_empty[at.stage]);
    } else {
        c.fold_steps(t, at);
    }
    at = after<shape::STAGES>(at);
#pragma unroll
    for (int r = 0; r < 2; r++)
        store_row<D>(a, t.o, t.l[r] > 0.0f ? t.m[r] : -INFINITY, t.l[r],
                     place_row(a, w, group, consumer * UNIT + warp_row + 8 * r), w.rows.slot, r, 2 * (lane % 4));
}

template <int D, int C, int KEYS> static __device__ __forceinline__ void make_barriers(attention_shared<D, C, KEYS> &s)
{
    constexpr int WARPS = WARPGROUP / 32;
    for (int i = 0; i < tile_shape<D, C, KEYS>::STAGES; i++) {
        barrier_init(&s.k_full[i], 1);
        barrier_init(&s.v_full[i], 1);
        barrier_init(&s.k_empty[i], WARPS * C);
        barrier_init(&s.v_empty[i], WARPS * C);
    }
    for (int i = 0; i < C; i++) {
        barrier_init(&s.q_full[i], 1);
        barrier_init(&s.q_empty[i], WARPS);
    }
    for (int i = 0; i < TILES_AHEAD; i++) {
        barrier_init(&s.work_full[i], 1);
        barrier_init(&s.work_empty[i], C * (1 + WARPS)); /* the warps that bring queries, and the consumers' */
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* The walking warp: takes work, tells the others, and walks the tile's list. `first`: what lane 0 took. */
template <int D, int C, int KEYS>
static __device__ __forceinline__ void walk_tiles(
    const lr_cuda_fold &a, int group, int n_tiles, const work_queue &queue, int first, attention_shared<D, C, KEYS> &s)
{
    ring_writer<D, C, KEYS> ring = {s, 0, 0};
    tile t;
    uint32_t round = 0;
    /* taking waits for memory, but the ring is full of this tile's steps then */
    for (int work = __shfl_sync(0xffffffffu, first, 0); work < queue.n_work; work = queue.take_next()) {
        if (!take_tile(a, group, n_tiles, tile_shape<D, C, KEYS>::ROWS, work, t))
            continue;
        hand_out(s, round++, work);
        produce(make_walk(a, t), t.kv_head, ring);
    }
    hand_out(s, round, queue.n_work);
}

/* Every role goes through the same tiles. */
template <int D, int C, int KEYS>
__global__ void __launch_bounds__(tile_shape<D, C, KEYS>::THREADS, (tile_shape<D, C, KEYS>::BLOCKS_EACH))
    attention_kernel(const __grid_constant__ lr_cuda_fold a, float scale2, int n_tiles, const work_queue queue)
{
    using shape = tile_shape<D, C, KEYS>;
    extern __shared__ uint8_t raw[];
    attention_shared<D, C, KEYS> &s =
        *reinterpret_cast<attention_shared<D, C, KEYS> *>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
    const int group = static_cast<int>(a.shape.n_heads / a.shape.n_kv_heads);
    int first = 0;
    if (threadIdx.x == 0) {
        first = queue.take_first(); /* comes while the barriers are made */
        make_barriers(s);
    }
    __syncthreads();
    /* the shuffle tells the compiler that all lanes agree */
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0) / 32;
    tile t;
    if (warp < WARPGROUP / 32) {
        registers_shrink<shape::PRODUCER_REGISTERS>();
        if (warp == 0) {
            walk_tiles(a, group, n_tiles, queue, first, s);
        } else if (warp <= C) {
            for (uint32_t round = 0;; round++) {
                const int work = receive(s, round);
                if (work >= queue.n_work)
                    break;
                take_tile(a, group, n_tiles, shape::ROWS, work, t);
                bring_queries(a, t, group, warp - 1, round, s);
            }
        }
    } else {
        registers_grow<shape::CONSUMER_REGISTERS>();
        const int consumer = warp / (WARPGROUP / 32) - 1;
        ring_place at = {0, 0};
        if (consumer == C - 1)
            give_turn<C>(consumer); /* consumer 0 goes first */
        for (uint32_t round = 0;; round++) {
            const int work = receive(s, round);
            if (work >= queue.n_work)
                break;
            take_tile(a, group, n_tiles, shape::ROWS, work, t);
            consume(a, scale2, t, group, consumer, round, at, s);
        }
        if (consumer == 0)
            take_turn<C>(consumer); /* the last turn given, so that the barriers end even */
    }
}

template <int D, int C, int KEYS>
static cudaError_t launch(const lr_cuda_fold &fold, int n_multiprocessors, uint32_t *taken, cudaStream_t stream)
{
    using shape = tile_shape<D, C, KEYS>;
    const int bytes = sizeof(attention_shared<D, C, KEYS>) + 1024;
    const int64_t group = fold.shape.n_heads / fold.shape.n_kv_heads;
    const int64_t n_tiles = (fold.max_tokens * group + shape::ROWS - 1) / shape::ROWS;
    const int64_t n_work = n_tiles * fold.shape.n_kv_heads * fold.n_groups,
                  room = n_multiprocessors * shape::BLOCKS_EACH;
    const cudaError_t error =
        cudaFuncSetAttribute(attention_kernel<D, C, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess)
        return error;
    attention_kernel<D, C, KEYS>
        <<<static_cast<unsigned>(n_work < room ? n_work : room), shape::THREADS, bytes, stream>>>(
            fold, fold.scale * LOG2E, static_cast<int>(n_tiles), work_queue{taken, static_cast<int>(n_work)});
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT

#endif
