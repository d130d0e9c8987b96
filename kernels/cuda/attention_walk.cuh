/* The producers' side of attention. A thread block goes through tiles; in each, one warp walks the tile's list, leaves
 * out the blocks that no row of the tile sees, and brings the others' K and V into the ring of stages by bulk copies.
 * It runs ahead of the consumers, into the next tiles too. Other warps bring the queries, one warp for each consumer.
 *
 *   list     | sinks |   not seen   |  window .......... diagonal |  not seen
 *   steps    0 1                     2 3 4 ...                  n
 *
 * A step is KEYS keys of a block: the whole block, or a half of it where a head has 256 channels. With its keys comes a
 * note for the consumers: where the keys begin, how many exist, whether every row of the tile sees all of them, and
 * whether it is the tile's last. A tile that sees nothing is one step without keys. */
#ifndef LR_KERNELS_CUDA_ATTENTION_WALK_CUH
#define LR_KERNELS_CUDA_ATTENTION_WALK_CUH

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_tile.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int UNIT = 64; /* tile rows of a consumer warpgroup */
constexpr int WARPGROUP = 128;

/* D channels, C consumer warpgroups. */
template <int D, int C> struct tile_shape {
    static constexpr int KEYS = D == 256 ? 64 : BLOCK;
    static constexpr int PANELS = D / 64;
    static constexpr int ROWS = C * UNIT;
    static constexpr int HALF_BYTES = KEYS * D * 2; /* K or V of a step */
    static constexpr int STAGES = D == 64 ? (C == 1 ? 3 : 4) : D == 256 && C == 2 ? 2 : 3;
    static constexpr int THREADS = (C + 1) * WARPGROUP;
    static constexpr int BLOCKS_EACH = D == 64 && C == 1 ? 2 : 1; /* thread blocks on a multiprocessor */
    static constexpr int PRODUCER_REGISTERS = C == 3 ? 32 : C == 2 ? 40 : 24;
    static constexpr int CONSUMER_REGISTERS = C == 3 ? 160 : 232;
};

template <int D, int C> struct attention_shared {
    using shape = tile_shape<D, C>;
    alignas(1024) uint8_t q[shape::ROWS * D * 2];
    alignas(1024) uint8_t k[shape::STAGES][shape::HALF_BYTES];
    alignas(1024) uint8_t v[shape::STAGES][shape::HALF_BYTES];
    step_note notes[shape::STAGES];
    uint64_t k_full[shape::STAGES], v_full[shape::STAGES], k_empty[shape::STAGES], v_empty[shape::STAGES];
    uint64_t q_full[C], q_empty[C];
};

/* What one lane of the walking warp does: puts steps into the ring, one behind what it is told, to know the last. */
template <int D, int C> struct ring_writer {
    using shape = tile_shape<D, C>;
    attention_shared<D, C> &s;
    uint32_t stage, parity;
    const uint8_t *data; /* the step held back: K of its keys in the block's first panel; NULL: none */
    step_note note;

    /* K or V of a step: one copy, or one for each panel. */
    static __device__ __forceinline__ void copy_half(uint8_t *to, const uint8_t *from, uint64_t *full)
    {
        constexpr int PANEL = BLOCK * 128, PIECE = shape::KEYS * 128;
        barrier_expect(full, shape::HALF_BYTES);
        if constexpr (shape::KEYS == BLOCK)
            copy_bulk(to, from, shape::HALF_BYTES, full);
        else
            for (int p = 0; p < shape::PANELS; p++)
                copy_bulk(to + p * PIECE, from + p * PANEL, PIECE, full);
    }

    __device__ __forceinline__ void put(int flags)
    {
        barrier_wait(&s.k_empty[stage], parity ^ 1);
        note.flags |= flags;
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
        stage = stage + 1 == shape::STAGES ? 0 : stage + 1;
        parity ^= stage == 0;
    }

    __device__ __forceinline__ void offer(const walk &w, const uint8_t *block, int64_t position, int n_keys, int whole)
    {
        for (int first = 0; first < BLOCK; first += shape::KEYS) {
            const int left = n_keys - first;
            if (left <= 0 || position + first > w.last_position)
                break;
            if (data != nullptr)
                put(0);
            data = block + first * 128;
            note = {position + first, left < shape::KEYS ? left : shape::KEYS, whole ? STEP_WHOLE : 0};
            if (sees_all(w, note, shape::KEYS))
                note.flags |= STEP_FULL;
        }
    }

    __device__ __forceinline__ void finish()
    {
        if (data == nullptr)
            note = {0, 0, 0};
        put(STEP_LAST);
        data = nullptr;
    }
};

/* The walking warp: 32 blocks are looked at together, and the next 32 are on their way meanwhile. */
template <int D, int C>
static __device__ __forceinline__ void produce(const walk &w, int kv_head, ring_writer<D, C> &ring)
{
    const int lane = threadIdx.x % 32;
    const int64_t head_offset = static_cast<int64_t>(kv_head) * 4 * BLOCK * D;
    lr_kv_ref next = {};
    if (lane < w.n_refs)
        next = w.refs[lane];
    const int64_t list_position = __shfl_sync(0xffffffffu, next.position, 0);
    for (int i = 0; i < w.n_refs;) {
        const lr_kv_ref ref = next;
        const bool there = i + lane < w.n_refs;
        uint32_t wanted = __ballot_sync(0xffffffffu, there && sees(w, ref));
        int following = i + 32;
        if (following < w.jump && list_position + static_cast<int64_t>(following) * BLOCK >= w.sinks)
            following = w.jump;
        if (__any_sync(0xffffffffu, there && ref.position > w.last_position))
            following = w.n_refs;
        if (following + lane < w.n_refs)
            next = w.refs[following + lane];
        while (wanted != 0) {
            const int source = __ffs(static_cast<int>(wanted)) - 1;
            wanted &= wanted - 1;
            const uint64_t data = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(ref.data), source);
            const int64_t position = __shfl_sync(0xffffffffu, ref.position, source);
            const int n_keys = __shfl_sync(0xffffffffu, ref.n_keys, source);
            const int whole = __shfl_sync(0xffffffffu, ref.whole, source);
            if (lane == 0)
                ring.offer(w, reinterpret_cast<const uint8_t *>(data) + head_offset, position, n_keys, whole);
        }
        i = following;
    }
    if (lane == 0)
        ring.finish();
}

/* One warp puts a consumer's 64 query rows into shared memory, swizzled; rows and channels that do not exist are zero.
 * `round`: how many tiles the thread block has been through. */
template <int D, int C>
static __device__ __forceinline__ void
bring_queries(const lr_cuda_fold &a, const tile &t, int group, int consumer, uint32_t round, attention_shared<D, C> &s)
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
        copy_async(q + (piece / 8) * (tile_shape<D, C>::ROWS * 128) + swizzled(r, piece % 8), from, there);
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
