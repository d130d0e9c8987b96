/* The producers' side of attention. A thread block goes through tiles; in each, one warp walks the tile's list, leaves
 * out the blocks that no row of the tile sees, and brings the others' K and V into the ring of stages by bulk copies.
 * It runs ahead of the consumers, into the next tiles too. Other warps bring the queries, one warp for each consumer.
 *
 *   list     | sinks |   not seen   |  window .......... diagonal |  not seen
 *   steps    0 1                     2 3 4 ...                  n
 *
 * A step is KEYS keys of a block: the whole block, or a half of it where a head has 256 channels or lists name halves.
 * With its keys comes a note for the consumers: where the keys begin, how many exist, whether every row of the tile
 * sees all of them, and whether it is the tile's last. A tile that sees nothing is one step without keys. */
#ifndef LR_KERNELS_CUDA_ATTENTION_WALK_CUH
#define LR_KERNELS_CUDA_ATTENTION_WALK_CUH

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_tile.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int UNIT = 64; /* tile rows of a consumer warpgroup */
constexpr int WARPGROUP = 128;
constexpr int TILES_AHEAD = 4; /* that the walking warp hands out before they are begun */

/* D channels, C consumer warpgroups, steps of KEYS keys. */
template <int D, int C, int KEYS> struct tile_shape {
    static constexpr int PANELS = D / 64;
    static constexpr int ROWS = C * UNIT;
    static constexpr int HALF_BYTES = KEYS * D * 2;               /* K or V of a step */
    static constexpr int BLOCKS_AHEAD = D == 64 && C > 1 ? 4 : 3; /* of 128 keys */
    static constexpr int STAGES = D == 256 ? 4 - C : BLOCKS_AHEAD * BLOCK / KEYS;
    static constexpr int THREADS = (C + 1) * WARPGROUP;
    static constexpr int BLOCKS_EACH = D == 64 && C == 1 ? 2 : 1; /* thread blocks on a multiprocessor */
    static constexpr int PRODUCER_REGISTERS = C == 3 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = C == 3 ? 160 : BLOCKS_EACH == 2 ? 216 : 232;
};

template <int D, int C, int KEYS> struct attention_shared {
    using shape = tile_shape<D, C, KEYS>;
    alignas(1024) uint8_t q[shape::ROWS * D * 2];
    alignas(1024) uint8_t k[shape::STAGES][shape::HALF_BYTES];
    alignas(1024) uint8_t v[shape::STAGES][shape::HALF_BYTES];
    step_note notes[shape::STAGES];
    uint64_t k_full[shape::STAGES], v_full[shape::STAGES], k_empty[shape::STAGES], v_empty[shape::STAGES];
    uint64_t q_full[C], q_empty[C];
    int work[TILES_AHEAD];
    uint64_t work_full[TILES_AHEAD], work_empty[TILES_AHEAD];
};

/* Which piece of work a thread block does next: the first that nobody has taken. A block whose multiprocessor was held
 * by another kernel (a transfer that waits for its peer) begins late and does less, or nothing: the first pieces are
 * the largest, and one kept for a block that only begins when others end would make the launch longer by all of it.
 * Where there is a block for each piece, each does that of its own number. */
struct work_queue {
    uint32_t *taken; /* 0 between launches, which follow each other on one stream */
    int n_work;

    __device__ __forceinline__ bool is_shared() const
    {
        return n_work > static_cast<int>(gridDim.x);
    }

    /* For one thread of a block. Every block stops at its first number behind the end, so that a launch takes
     * n_work + gridDim.x numbers in all; with the last of them the counter is back at 0. */
    __device__ __forceinline__ int take_shared() const
    {
        return static_cast<int>(atomicInc(taken, static_cast<uint32_t>(n_work) + gridDim.x - 1));
    }

    /* For the one thread that starts the block. */
    __device__ __forceinline__ int take_first() const
    {
        return is_shared() ? take_shared() : static_cast<int>(blockIdx.x);
    }

    /* For the walking warp, all lanes together. */
    __device__ __forceinline__ int take_next() const
    {
        int work = n_work;
        if (is_shared() && threadIdx.x % 32 == 0)
            work = take_shared();
        return __shfl_sync(0xffffffffu, work, 0);
    }
};

/* The walking warp tells all others of the thread block which work is the `round`-th; n_work or more: there is none. */
template <int D, int C, int KEYS>
static __device__ __forceinline__ void hand_out(attention_shared<D, C, KEYS> &s, uint32_t round, int work)
{
    const uint32_t slot = round % TILES_AHEAD, parity = round / TILES_AHEAD & 1;
    if (threadIdx.x % 32 == 0) {
        barrier_wait(&s.work_empty[slot], parity ^ 1);
        s.work[slot] = work;
        barrier_arrive(&s.work_full[slot]);
    }
    __syncwarp();
}

/* What was handed out, for every warp that works on it. */
template <int D, int C, int KEYS>
static __device__ __forceinline__ int receive(attention_shared<D, C, KEYS> &s, uint32_t round)
{
    const uint32_t slot = round % TILES_AHEAD, parity = round / TILES_AHEAD & 1;
    int work = 0;
    barrier_wait(&s.work_full[slot], parity);
    if (threadIdx.x % 32 == 0) {
        work = s.work[slot];
        barrier_arrive(&s.work_empty[slot]);
    }
    return __shfl_sync(0xffffffffu, work, 0);
}

/* The walking warp's place in the ring, the same in all its lanes. */
template <int D, int C, int KEYS> struct ring_writer {
    using shape = tile_shape<D, C, KEYS>;
    attention_shared<D, C, KEYS> &s;
    uint32_t stage, parity;

    /* K or V of a step: one copy, or one for each panel. */
    static __device__ __forceinline__ void copy_half(uint8_t *to, const uint8_t *from, uint64_t *full)
    {
        constexpr int PANEL = BLOCK * 128, PIECE = KEYS * 128;
        barrier_expect(full, shape::HALF_BYTES);
        if constexpr (KEYS == BLOCK)
            copy_bulk(to, from, shape::HALF_BYTES, full);
        else
            for (int p = 0; p < shape::PANELS; p++)
                copy_bulk(to + p * PIECE, from + p * PANEL, PIECE, full);
    }

    /* One lane (`mine`) puts its step: `data` is K of its keys in the block's first panel; NULL: a step without keys.
     */
    __device__ __forceinline__ void put(bool mine, const uint8_t *data, const step_note &note)
    {
        if (mine) {
            barrier_wait(&s.k_empty[stage], parity ^ 1);
            s.notes[stage] = note;
            if (data != nullptr)
                copy_half(s.k[stage], data, &s.k_full[stage]);
            else
                barrier_arrive(&s.k_full[stage]);
            barrier_wait(&s.v_empty[stage], parity ^ 1);
            if (data != nullptr)
                copy_half(s.v[stage], data + shape::PANELS * BLOCK * 128, &s.v_full[stage]);
            else
                barrier_arrive(&s.v_full[stage]);
        }
        __syncwarp();
        stage = stage + 1 == shape::STAGES ? 0 : stage + 1;
        parity ^= stage == 0;
    }
};

/* 32 blocks of a list, one a lane. */
struct ref_batch {
    lr_kv_ref ref;
    uint32_t wanted; /* lanes whose block some row of the tile sees */
    int next;        /* index of the first block behind the batch that may be seen */
};

/* The first batch from index i on in which a block is wanted; wanted is 0 where there is none. */
static __device__ __forceinline__ ref_batch find_batch(const walk &w, int i)
{
    const int lane = threadIdx.x % 32;
    ref_batch b = {{}, 0, i};
    while (b.wanted == 0 && b.next < w.n_refs) {
        const bool there = b.next + lane < w.n_refs;
        if (there)
            b.ref = w.refs[b.next + lane];
        b.wanted = __ballot_sync(0xffffffffu, there && sees(w, b.ref));
        b.next += 32;
        if (b.next < w.jump && w.start + static_cast<int64_t>(b.next) * BLOCK >= w.sinks)
            b.next = w.jump;
        if (__any_sync(0xffffffffu, there && b.ref.position > w.last_position))
            b.next = w.n_refs;
    }
    return b;
}

/* Puts the batch's wanted blocks into the ring, in order. Each lane makes the notes of its own block beforehand:
 * between two steps there is hardly time for more than the waiting and the copies. `last`: nothing of the list follows.
 */
template <int D, int C, int KEYS>
static __device__ __forceinline__ void
put_batch(const walk &w, const ref_batch &b, int64_t head_offset, bool last, ring_writer<D, C, KEYS> &ring)
{
    constexpr int STEPS = BLOCK / KEYS;
    const int lane = threadIdx.x % 32;
    const uint8_t *data = static_cast<const uint8_t *>(b.ref.data) + head_offset + b.ref.position % BLOCK * 128;
    step_note notes[STEPS];
    uint32_t there[STEPS]; /* lanes that have this step */
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int left = b.ref.n_keys - i * KEYS;
        notes[i] = {b.ref.position + i * KEYS, left < KEYS ? left : KEYS, b.ref.whole ? STEP_WHOLE : 0};
        if (sees_all(w, notes[i], KEYS))
            notes[i].flags |= STEP_FULL;
        there[i] = b.wanted & __ballot_sync(0xffffffffu, i == 0 || (left > 0 && notes[i].position <= w.last_position));
    }
    for (uint32_t wanted = b.wanted; wanted != 0; wanted &= wanted - 1) {
        const int source = __ffs(static_cast<int>(wanted)) - 1;
        const bool end = last && (wanted & (wanted - 1)) == 0;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (!(there[i] >> source & 1))
                continue;
            if (end && (i + 1 == STEPS || !(there[(i + 1) % STEPS] >> source & 1)))
                notes[i].flags |= STEP_LAST;
            ring.put(lane == source, data + i * KEYS * 128, notes[i]);
        }
    }
}

/* The walking warp: the next batch is looked at before this one is put, so that the last step is known. */
template <int D, int C, int KEYS>
static __device__ __forceinline__ void produce(const walk &w, int kv_head, ring_writer<D, C, KEYS> &ring)
{
    const int64_t head_offset = static_cast<int64_t>(kv_head) * 4 * BLOCK * D;
    ref_batch b = find_batch(w, 0);
    if (b.wanted == 0)
        ring.put(threadIdx.x % 32 == 0, nullptr, {0, 0, STEP_LAST});
    while (b.wanted != 0) {
        const ref_batch following = find_batch(w, b.next);
        put_batch(w, b, head_offset, following.wanted == 0, ring);
        b = following;
    }
}

/* One warp puts a consumer's 64 query rows into shared memory, swizzled; rows and channels that do not exist are zero.
 * `round`: how many tiles the thread block has been through. */
template <int D, int C, int KEYS>
static __device__ __forceinline__ void bring_queries(
    const lr_cuda_fold &a, const tile &t, int group, int consumer, uint32_t round, attention_shared<D, C, KEYS> &s)
{
    constexpr int PIECES = D / 8;
    const int lane = threadIdx.x % 32;
    const act *source = static_cast<const act *>(a.q);
    const uint32_t q = shared_address(s.q) + consumer * UNIT * 128;
    barrier_wait(&s.q_empty[consumer], (round & 1) ^ 1);
    for (int i = lane; i < UNIT * PIECES; i += 32) {
        const int r = i / PIECES, piece = i % PIECES;
        const row_place p = place_row(a, t, group, consumer * UNIT + r);
        const bool there = p.position >= 0 && piece * 8 < a.shape.head_dim;
        const act *from = there ? source + p.row * a.q_stride + p.head * a.q_head_stride + piece * 8 : source;
        copy_async(q + (piece / 8) * (tile_shape<D, C, KEYS>::ROWS * 128) + swizzled(r, piece % 8), from, there);
    }
    copy_commit();
    copy_wait<0>();
    fence_to_wgmma();
    __syncwarp();
    if (lane == 0)
        barrier_arrive(&s.q_full[consumer]);
}

} // namespace lr::LR_CUDA_ACT

#endif
