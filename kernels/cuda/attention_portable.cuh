/* Attention over KV blocks with mma.sync, for every device since sm_80. A thread block is one tile: warps of 16 or 32
 * rows each, which run S = Q K^T -> softmax -> O += P V  on 64 keys a step (Dao 2023, FlashAttention-2).
 *
 *   ring of halves    | K 0 | V 0 | K 1 |         the oldest is being used, the others are on their way
 *   queue             up to 32 steps of 16 blocks of the list: one lane looks at half a block. A ref may name a half
 *
 * K and V come as they lie in their blocks, whose swizzle suits ldmatrix as well as wgmma. A queue's steps are one
 * pipeline; between two queues it runs dry, once in 32 steps. Every row folds its steps in ascending order and closes
 * its row sum at each, so that its bits depend neither on the tile that it lies in nor on how a list is divided over
 * calls. (They are not the bits of the kernels for Hopper, which take 128 keys a step.) */
#ifndef LR_KERNELS_CUDA_ATTENTION_PORTABLE_CUH
#define LR_KERNELS_CUDA_ATTENTION_PORTABLE_CUH

#include "kernels/cuda/attention_rows.cuh"

namespace lr::LR_CUDA_ACT::portable
{

constexpr int KEYS = BLOCK / 2;   /* of a step */
constexpr int QUEUE_STEPS = 32;   /* the lanes of a warp */
constexpr int ROW_BYTES = 128;    /* of a panel */

/* D channels; WARPS warps of M times 16 rows; a ring of RING halves; BLOCKS thread blocks on a multiprocessor. */
template <int D_, int M_, int WARPS, int RING_, int BLOCKS_> struct tile_shape {
    static constexpr int D = D_, M = M_, RING = RING_, BLOCKS = BLOCKS_;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int ROWS = 16 * M * WARPS;
    static constexpr int PANELS = D / 64;
    static constexpr int PANEL_BYTES = KEYS * ROW_BYTES;
    static constexpr int HALF_BYTES = KEYS * D * 2; /* K or V of a step */
};

template <class shape> struct tile_shared {
    alignas(128) uint8_t q[shape::ROWS * shape::D * 2];
    uint8_t ring[shape::RING][shape::HALF_BYTES];
    const uint8_t *data[QUEUE_STEPS]; /* K of the step's keys in the block's first panel */
    step_note notes[QUEUE_STEPS];
    int n_steps, next_ref; /* of the queue; where the next one starts */
    tile place;
    walk list;
};

/* The state of a warp's rows. */
template <class shape> struct tile_state {
    float o[shape::M][shape::D / 2];
    float m[shape::M][2], l[shape::M][2];
};

/* The next steps of the list that some row of the tile sees, if there are any. One warp. */
template <class shape> static __device__ __forceinline__ void fill_queue(tile_shared<shape> &s)
{
    constexpr int REFS = QUEUE_STEPS / 2;
    const walk &w = s.list;
    const int lane = threadIdx.x % 32, first = lane % 2 * KEYS;
    const int64_t head_offset = static_cast<int64_t>(s.place.kv_head) * 4 * BLOCK * shape::D;
    int next = s.next_ref;
    uint32_t wanted = 0;
    while (next < w.n_refs && wanted == 0) {
        const bool there = next + lane / 2 < w.n_refs;
        lr_kv_ref ref = {};
        if (there)
            ref = w.refs[next + lane / 2];
        const int left = ref.n_keys - first;
        const bool seen = there && sees(w, ref) && left > 0 && ref.position + first <= w.last_position;
        wanted = __ballot_sync(0xffffffffu, seen);
        if (seen) {
            step_note note = {ref.position + first, left < KEYS ? left : KEYS, ref.whole ? STEP_WHOLE : 0};
            note.flags |= sees_all(w, note, KEYS) ? STEP_FULL : 0;
            const int at = __popc(wanted & ((1u << lane) - 1));
            s.notes[at] = note;
            s.data[at] = static_cast<const uint8_t *>(ref.data) + head_offset + (ref.position % BLOCK + first) * ROW_BYTES;
        }
        next += REFS;
        if (next < w.jump && w.start + static_cast<int64_t>(next) * BLOCK >= w.sinks)
            next = w.jump;
        if (__any_sync(0xffffffffu, there && ref.position > w.last_position))
            next = w.n_refs;
    }
    __syncwarp();
    if (lane == 0) {
        s.n_steps = __popc(wanted);
        s.next_ref = next;
    }
}

/* Half `half` of the queue (K of step half / 2, or its V) into a place of the ring, or nothing behind the last; one
 * group of copies. */
template <class shape>
static __device__ __forceinline__ void copy_half(const tile_shared<shape> &s, uint32_t to, int half, int n_halves)
{
    constexpr int PIECES = shape::PANEL_BYTES / 16 / shape::THREADS;
    if (half < n_halves) {
        const uint8_t *from = s.data[half / 2] + (half % 2 ? shape::PANELS * BLOCK * ROW_BYTES : 0) + threadIdx.x * 16;
#pragma unroll
        for (int p = 0; p < shape::PANELS; p++)
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                copy_async(to + p * shape::PANEL_BYTES + (i * shape::THREADS + threadIdx.x) * 16,
                           from + p * BLOCK * ROW_BYTES + i * shape::THREADS * 16, true);
    }
    copy_commit();
}

/* The tile's query rows, swizzled; rows and channels that do not exist are zero. The first half's group of copies
 * takes them along. */
template <class shape> static __device__ __forceinline__ void copy_queries(const lr_cuda_fold &a, tile_shared<shape> &s)
{
    constexpr int PIECES = shape::D / 8;
    const int group = static_cast<int>(a.shape.n_heads / a.shape.n_kv_heads);
    const act *source = static_cast<const act *>(a.q);
    for (int i = threadIdx.x; i < shape::ROWS * PIECES; i += shape::THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        const row_place p = place_row(a, s.place, group, row);
        const bool there = p.position >= 0 && piece * 8 < a.shape.head_dim;
        const act *from = there ? source + p.row * a.q_stride + p.head * a.q_head_stride + piece * 8 : source;
        copy_async(shared_address(s.q) + piece / 8 * (shape::ROWS * ROW_BYTES) + swizzled(row, piece % 8), from, there);
    }
}

/* S = Q K^T. q, k: the lane's row of the first 16 x 16 block, at its piece (see the swizzle): the piece of the next 16
 * channels of a panel differs in two bits of the address. */
template <class shape>
static __device__ __forceinline__ void multiply_qk(float (&score)[shape::M][KEYS / 2], uint32_t q, uint32_t k)
{
#pragma unroll
    for (int i = 0; i < shape::M; i++)
#pragma unroll
        for (int j = 0; j < KEYS / 2; j++)
            score[i][j] = 0.0f;
#pragma unroll
    for (int step = 0; step < shape::D / 16; step++) {
        uint32_t rows[shape::M][4];
#pragma unroll
        for (int i = 0; i < shape::M; i++)
            load_matrix(rows[i], (q ^ step % 4 * 32) + step / 4 * (shape::ROWS * ROW_BYTES) + i * 16 * ROW_BYTES);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t keys[4];
            load_matrix(keys, (k ^ step % 4 * 32) + step / 4 * shape::PANEL_BYTES + j * 16 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < shape::M; i++) {
                mma_16x8x16(reinterpret_cast<float(&)[4]>(score[i][8 * j]), rows[i], keys[0], keys[1]);
                mma_16x8x16(reinterpret_cast<float(&)[4]>(score[i][8 * j + 4]), rows[i], keys[2], keys[3]);
            }
        }
    }
}

/* O += P V. v: the lane's row of the first 16 x 16 block, read transposed. */
template <class shape>
static __device__ __forceinline__ void
multiply_pv(float (&o)[shape::M][shape::D / 2], const uint32_t (&weights)[shape::M][KEYS / 16][4], uint32_t v)
{
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++)
#pragma unroll
        for (int j = 0; j < shape::D / 16; j++) {
            uint32_t values[4];
            load_transposed(values, (v ^ j % 4 * 32) + j / 4 * shape::PANEL_BYTES + step * 16 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < shape::M; i++) {
                mma_16x8x16(reinterpret_cast<float(&)[4]>(o[i][8 * j]), weights[i][step], values[0], values[1]);
                mma_16x8x16(reinterpret_cast<float(&)[4]>(o[i][8 * j + 4]), weights[i][step], values[2], values[3]);
            }
        }
}

/* Scores of keys that a row may not see become -inf. */
static __device__ __forceinline__ void mask_scores(float (&score)[KEYS / 2],
                                                   const lr_cuda_fold &a,
                                                   const step_note &note,
                                                   const int64_t (&positions)[2],
                                                   int column)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const visible_keys v = see_keys(a, note, positions[r], column);
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            if (is_hidden(v, 8 * (i / 2) + i % 2))
                score[4 * (i / 2) + 2 * r + i % 2] = -INFINITY;
    }
}

static __device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

static __device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* One step's online softmax of 16 rows: scores become weights, m, l and o move on. The reference m is raised only where
 * a score is more than MAX_TRAIL above it. */
template <int D>
static __device__ __forceinline__ void
fold_scores(float (&score)[KEYS / 2], float (&m)[2], float (&l)[2], float (&o)[D / 2], float scale2)
{
    float base[2], factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top[2] = {score[2 * r], score[2 * r + 1]};
#pragma unroll
        for (int i = 1; i < KEYS / 8; i++) {
            top[0] = fmaxf(top[0], score[4 * i + 2 * r]);
            top[1] = fmaxf(top[1], score[4 * i + 2 * r + 1]);
        }
        const float highest = quad_max(fmaxf(top[0], top[1])) * scale2;
        const float reference = highest > m[r] + MAX_TRAIL ? highest : m[r];
        /* a row that has seen nothing yet keeps -inf; its weights are exp2(-inf) = 0 */
        base[r] = reference == -INFINITY ? 0.0f : reference;
        factor[r] = reference == m[r] ? 1.0f : exp2_fast(m[r] - base[r]);
        m[r] = reference;
    }
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        const int r = i / 2 % 2;
        score[i] = exp2_fast(fmaf(score[i], scale2, -base[r]));
        sum[r][i % 2] += score[i];
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
        l[r] = fmaf(l[r], factor[r], quad_sum(sum[r][0] + sum[r][1]));
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            o[i] *= factor[i / 2 % 2];
    }
}

/* Scores to rounded weights, of all the warp's rows. */
template <class shape>
static __device__ __forceinline__ void fold_step(const lr_cuda_fold &a,
                                                 const tile_shared<shape> &s,
                                                 const step_note &note,
                                                 float (&score)[shape::M][KEYS / 2],
                                                 tile_state<shape> &t,
                                                 uint32_t (&weights)[shape::M][KEYS / 16][4])
{
    const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
    const float scale2 = a.scale * LOG2E;
#pragma unroll
    for (int i = 0; i < shape::M; i++) {
        if (!(note.flags & STEP_FULL)) {
            const int group = static_cast<int>(a.shape.n_heads / a.shape.n_kv_heads);
            const int row = (threadIdx.x / 32 * shape::M + i) * 16 + lane / 4;
            const int64_t positions[2] = {place_row(a, s.place, group, row).position,
                                          place_row(a, s.place, group, row + 8).position};
            mask_scores(score[i], a, note, positions, column);
        }
        fold_scores<shape::D>(score[i], t.m[i], t.l[i], t.o[i], scale2);
#pragma unroll
        for (int j = 0; j < KEYS / 4; j++)
            weights[i][j / 4][j % 4] = pack_act(score[i][2 * j], score[i][2 * j + 1]);
    }
}

/* The queue's steps, one after the other. */
template <class shape>
static __device__ __forceinline__ void fold_queue(const lr_cuda_fold &a, tile_shared<shape> &s, tile_state<shape> &t)
{
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t ring = shared_address(s.ring), ring_end = ring + shape::RING * shape::HALF_BYTES;
    /* of Q and of V transposed lane l reads row l mod 16, piece l / 16; of K row l mod 8 + 8 (l / 16), piece l / 8 mod 2 */
    const uint32_t q = shared_address(s.q) + warp * shape::M * 16 * ROW_BYTES + swizzled(lane % 16, lane / 16);
    const uint32_t k = swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2), v = swizzled(lane % 16, lane / 16);
    const int n_steps = s.n_steps;
    uint32_t used = ring, filled = ring;
    auto next_half = [&](int half) {
        copy_wait<shape::RING - 2>();
        __syncthreads();
        copy_half(s, filled, half + shape::RING - 1, 2 * n_steps);
        filled = filled + shape::HALF_BYTES == ring_end ? ring : filled + shape::HALF_BYTES;
        const uint32_t now = used;
        used = used + shape::HALF_BYTES == ring_end ? ring : used + shape::HALF_BYTES;
        return now;
    };
#pragma unroll
    for (int half = 0; half < shape::RING - 1; half++, filled += shape::HALF_BYTES)
        copy_half(s, filled, half, 2 * n_steps);
    for (int step = 0; step < n_steps; step++) {
        float score[shape::M][KEYS / 2];
        uint32_t weights[shape::M][KEYS / 16][4];
        multiply_qk<shape>(score, q, next_half(2 * step) + k);
        const uint32_t values = next_half(2 * step + 1) + v;
        fold_step(a, s, s.notes[step], score, t, weights);
        multiply_pv<shape>(t.o, weights, values);
    }
}

/* Tile blockIdx.x of the launch. */
template <class shape>
__global__ void __launch_bounds__(shape::THREADS, shape::BLOCKS)
    attention_kernel(const __grid_constant__ lr_cuda_fold a, int n_tiles)
{
    extern __shared__ __align__(128) uint8_t raw[];
    tile_shared<shape> &s = *reinterpret_cast<tile_shared<shape> *>(raw);
    const int group = static_cast<int>(a.shape.n_heads / a.shape.n_kv_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = 2 * (lane % 4);
    tile place;
    if (!take_tile(a, group, n_tiles, shape::ROWS, static_cast<int>(blockIdx.x), place))
        return;
    if (threadIdx.x == 0) {
        s.place = place;
        s.list = make_walk(a, place);
        s.next_ref = 0;
    }
    __syncthreads();
    copy_queries(a, s);
    tile_state<shape> t;
#pragma unroll
    for (int i = 0; i < 2 * shape::M; i++)
        load_row<shape::D>(a, t.o[i / 2], t.m[i / 2][i % 2], t.l[i / 2][i % 2],
                    place_row(a, s.place, group, (warp * shape::M + i / 2) * 16 + i % 2 * 8 + lane / 4), s.place.rows.slot,
                    i % 2, column);
    while (true) {
        if (warp == 0)
            fill_queue(s);
        __syncthreads();
        if (s.n_steps == 0)
            break;
        fold_queue(a, s, t);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2 * shape::M; i++)
        store_row<shape::D>(a, t.o[i / 2], t.m[i / 2][i % 2], t.l[i / 2][i % 2],
                     place_row(a, s.place, group, (warp * shape::M + i / 2) * 16 + i % 2 * 8 + lane / 4), s.place.rows.slot,
                     i % 2, column);
}

template <class shape> static cudaError_t launch(const lr_cuda_fold &fold, cudaStream_t stream)
{
    const int bytes = sizeof(tile_shared<shape>);
    const int64_t group = fold.shape.n_heads / fold.shape.n_kv_heads;
    const int64_t n_tiles = (fold.max_tokens * group + shape::ROWS - 1) / shape::ROWS;
    const int64_t n_work = n_tiles * fold.shape.n_kv_heads * fold.n_groups;
    const cudaError_t error =
        cudaFuncSetAttribute(attention_kernel<shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess)
        return error;
    attention_kernel<shape>
        <<<static_cast<unsigned>(n_work), shape::THREADS, bytes, stream>>>(fold, static_cast<int>(n_tiles));
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT::portable

#endif
