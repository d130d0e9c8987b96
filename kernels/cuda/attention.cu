/* Forward attention for Hopper: one producer warp brings K and V blocks by bulk copies, two consumer warpgroups of 64
 * query rows each run  S = Q K^T -> softmax -> O += P V  with wgmma.
 *
 *   consumer A   | QK j | softmax j ........ | PV j-1 | QK j+1 | softmax j+1
 *   consumer B          | QK j | softmax j ........ | PV j-1 | QK j+1 |
 *
 * The next block's QK^T is issued before the previous block's P V and both run while the softmax works on registers; the
 * two warpgroups take turns on the tensor cores by named barriers (Shah et al. 2024, FlashAttention-3). Every row folds
 * its blocks of 128 keys in ascending order and reduces its row sum per block, so the bits depend neither on the
 * launch's shape nor on how a list is divided over calls. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/hopper.cuh"

#include <math.h>

namespace lr
{

constexpr int TILE = 128;         /* query rows of a thread block, and keys of a KV block */
constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2;
constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
constexpr int STAGES = 2;
constexpr float LN2 = 0.6931471805599453f;
constexpr float LOG2E = 1.4426950408889634f;

struct attention_params {
    lr_cuda_attention_args a;
    int group;     /* query heads of a KV head */
    int n_tiles;   /* of 128 rows on the absolute grid */
    int64_t first_tile;
};

template <int D> struct attention_shared {
    static constexpr int PANELS = D / 64;
    static constexpr int HALF_BYTES = TILE * D * 2; /* K or V of a block and head */
    alignas(1024) uint8_t q[TILE * D * 2];
    alignas(1024) uint8_t k[STAGES][HALF_BYTES];
    alignas(1024) uint8_t v[STAGES][HALF_BYTES];
    alignas(8) uint64_t k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];
};

static __device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

/* n_bytes (a multiple of 16) from global to shared memory, reported to the barrier. */
static __device__ __forceinline__ void copy_bulk(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(n_bytes), "r"(shared_address(barrier))
                 : "memory");
}

static __device__ __forceinline__ void named_arrive(uint32_t id, uint32_t n_threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* d [64 x 128] (+)= A B^T, both tiles in shared memory, the reduced dimension along their rows. */
static __device__ __forceinline__ void wgmma_n128_shared(float (&d)[64], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 " %8, %9, %10, %11, %12, %13, %14, %15, "
                 " %16, %17, %18, %19, %20, %21, %22, %23, "
                 " %24, %25, %26, %27, %28, %29, %30, %31, "
                 " %32, %33, %34, %35, %36, %37, %38, %39, "
                 " %40, %41, %42, %43, %44, %45, %46, %47, "
                 " %48, %49, %50, %51, %52, %53, %54, %55, "
                 " %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, p, 1, 1, 0, 0;\n"
                 "}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
                   "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
                   "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
                   "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                   "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
                   "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
                   "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
                   "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
                   "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                   "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
                   "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

/* What a tile's list is, and which part of it is visible at all. Both roles walk it the same way. */
struct walk {
    const lr_kv_ref *refs;
    int64_t n;
    int64_t first_position, last_position; /* of the tile's rows */
};

static __device__ __forceinline__ bool sees(const lr_cuda_attention_args &a, const walk &w, const lr_kv_ref &ref)
{
    if (ref.position > w.last_position)
        return false;
    if (a.window == 0 || ref.whole || ref.position < a.sinks)
        return true;
    return ref.position + ref.n_keys > w.first_position - a.window + 1;
}

/* Every row of the tile sees every key of the block. */
static __device__ __forceinline__ bool sees_all(const lr_cuda_attention_args &a, const walk &w, const lr_kv_ref &ref)
{
    if (ref.n_keys < TILE || ref.position + TILE - 1 > w.first_position)
        return false;
    if (a.window == 0 || ref.whole || ref.position + TILE <= a.sinks)
        return true;
    return w.last_position - ref.position < a.window;
}

template <int D>
static __device__ __forceinline__ void produce(const attention_params &p, const walk &w, int kv_head,
                                               attention_shared<D> &s)
{
    constexpr int HALF = attention_shared<D>::HALF_BYTES;
    uint32_t step = 0;
    for (int64_t i = 0; i < w.n; i++) {
        const lr_kv_ref ref = w.refs[i];
        if (!sees(p.a, w, ref))
            continue;
        const uint32_t stage = step % STAGES, parity = (step / STAGES & 1u) ^ 1u;
        const uint8_t *data = static_cast<const uint8_t *>(ref.data) + static_cast<int64_t>(kv_head) * 2 * HALF;
        barrier_wait(&s.k_empty[stage], parity);
        barrier_expect(&s.k_full[stage], HALF);
        copy_bulk(s.k[stage], data, HALF, &s.k_full[stage]);
        barrier_wait(&s.v_empty[stage], parity);
        barrier_expect(&s.v_full[stage], HALF);
        copy_bulk(s.v[stage], data + HALF, HALF, &s.v_full[stage]);
        step++;
    }
}

template <int D> struct row_state {
    float o[D / 2]; /* [D / 8][4]: columns 8 i + 2 (lane mod 4) + {0, 1} of row lane / 4, then of row lane / 4 + 8 */
    float m[2], l[2];
};

/* S = Q K^T of this warpgroup's 64 rows. Asynchronous: the caller commits and waits. */
template <int D> static __device__ __forceinline__ void multiply_qk(float (&score)[64], const uint8_t *q, const uint8_t *k)
{
    const uint32_t q_base = shared_address(q), k_base = shared_address(k);
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        const uint32_t panel = step / 4, offset = (step % 4) * 32;
        wgmma_n128_shared(score, tile_descriptor(q_base + panel * (TILE * 128) + offset, 0),
                          tile_descriptor(k_base + panel * (TILE * 128) + offset, 0), step > 0);
    }
}

/* O += P V. V is [key][channel]: the reduced dimension runs over its rows. Asynchronous. */
template <int D>
static __device__ __forceinline__ void multiply_pv(float (&o)[D / 2], const uint32_t (&weights)[32], const uint8_t *v)
{
    const uint32_t base = shared_address(v);
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3]};
        const uint64_t b = tile_descriptor(base + step * (16 * 128), TILE * 128);
        if constexpr (D == 128)
            wgmma_n128<1>(o, a, b, true);
        else
            wgmma_n64<1>(o, a, b, true);
    }
}

/* Scores of keys that a row may not see become -inf. */
static __device__ __forceinline__ void mask_scores(float (&score)[64], const lr_cuda_attention_args &a,
                                                   const lr_kv_ref &ref, int64_t row_position, int column)
{
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int key = 8 * (i / 4) + column + (i & 1);
        const int64_t at = row_position + (i & 2) * 4; /* the thread's second row is 8 further */
        const int64_t j = ref.position + key;
        const bool near = a.window == 0 || ref.whole || at - j < a.window || j < a.sinks;
        if (key >= ref.n_keys || j > at || !near)
            score[i] = -INFINITY;
    }
}

/* One block's online softmax: scores become weights (bf16 pairs), m and l move on; returns the factors for o. */
template <int D>
static __device__ __forceinline__ void fold_scores(float (&score)[64], row_state<D> &state, uint32_t (&weights)[32],
                                                   float (&factor)[2], float scale2)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = score[2 * r];
#pragma unroll
        for (int i = 0; i < 16; i++)
            top = fmaxf(top, fmaxf(score[4 * i + 2 * r], score[4 * i + 2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float m = fmaxf(state.m[r], top * scale2);
        /* a row that has seen nothing yet keeps -inf; its weights are exp2(-inf) = 0 */
        const float base = m == -INFINITY ? 0.0f : m;
        factor[r] = exp2_fast(state.m[r] - base);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; i++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float &x = score[4 * i + 2 * r + c];
                x = exp2_fast(fmaf(x, scale2, -base));
                sum += x;
            }
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        state.l[r] = fmaf(state.l[r], factor[r], sum);
        state.m[r] = m;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        weights[2 * i] = pack_bf16(score[4 * i], score[4 * i + 1]);
        weights[2 * i + 1] = pack_bf16(score[4 * i + 2], score[4 * i + 3]);
    }
}

template <int D> static __device__ __forceinline__ void rescale(row_state<D> &state, const float (&factor)[2])
{
#pragma unroll
    for (int i = 0; i < D / 2; i++)
        state.o[i] *= factor[i / 2 & 1];
}

template <int D>
static __device__ __forceinline__ void load_state(const lr_cuda_attention_args &a, row_state<D> &state, int64_t row,
                                                  int head, int column)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t at = row + 8 * r;
        const int64_t slot = at * a.shape.n_heads + head;
        const bool there = a.resume && at >= 0 && at < a.n_rows;
        state.m[r] = there ? a.m2[slot] : -INFINITY;
        state.l[r] = there ? a.l[slot] : 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                state.o[4 * i + 2 * r + c] = there ? a.o[slot * D + 8 * i + column + c] : 0.0f;
    }
}

template <int D>
static __device__ __forceinline__ void store_state(const lr_cuda_attention_args &a, const row_state<D> &state,
                                                   int64_t row, int head, int column)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t at = row + 8 * r;
        if (at < 0 || at >= a.n_rows)
            continue;
        const int64_t slot = at * a.shape.n_heads + head;
        if (a.m2 != nullptr) {
            if (column == 0) {
                a.m2[slot] = state.m[r];
                a.l[slot] = state.l[r];
            }
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *reinterpret_cast<float2 *>(&a.o[slot * D + 8 * i + column]) =
                    make_float2(state.o[4 * i + 2 * r], state.o[4 * i + 2 * r + 1]);
        }
        const float inverse = state.l[r] > 0.0f ? 1.0f / state.l[r] : 0.0f;
        if (a.y != nullptr) {
            __nv_bfloat16 *y = static_cast<__nv_bfloat16 *>(a.y) + at * a.y_stride + static_cast<int64_t>(head) * D;
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *reinterpret_cast<uint32_t *>(y + 8 * i + column) =
                    pack_bf16(state.o[4 * i + 2 * r] * inverse, state.o[4 * i + 2 * r + 1] * inverse);
        }
        if (a.lse != nullptr && column == 0)
            a.lse[slot] = state.l[r] > 0.0f ? (state.m[r] + log2f(state.l[r])) * LN2 : -INFINITY;
    }
}

/* Puts the warpgroup's 64 query rows into shared memory, swizzled; rows that do not exist are zero. */
template <int D>
static __device__ __forceinline__ void load_queries(const lr_cuda_attention_args &a, uint8_t *q, int group_row,
                                                    int64_t row, int head, int thread)
{
    const __nv_bfloat16 *source = static_cast<const __nv_bfloat16 *>(a.q);
    for (int i = thread; i < 64 * (D / 8); i += WARPGROUP) {
        const int r = i / (D / 8), piece = i % (D / 8);
        const int64_t at = row + r;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (at >= 0 && at < a.n_rows)
            value = *reinterpret_cast<const uint4 *>(source + at * a.q_stride + head * a.q_head_stride + piece * 8);
        *reinterpret_cast<uint4 *>(q + (piece / 8) * (TILE * 128) + swizzled(group_row + r, piece % 8)) = value;
    }
    fence_to_wgmma();
    named_barrier(2 + group_row / 64, WARPGROUP);
}

/* The two warpgroups take turns on the tensor cores: barrier 4 + g lets warpgroup g issue. */
static __device__ __forceinline__ void take_turn(int group)
{
    named_barrier(4 + group, CONSUMERS * WARPGROUP);
}

static __device__ __forceinline__ void give_turn(int group)
{
    named_arrive(4 + (group ^ 1), CONSUMERS * WARPGROUP);
}

template <int D>
static __device__ __forceinline__ void consume(const attention_params &p, const walk &w, int64_t tile_row, int head,
                                               int group, attention_shared<D> &s)
{
    const lr_cuda_attention_args &a = p.a;
    const int thread = threadIdx.x % WARPGROUP, lane = thread % 32;
    const int column = 2 * (lane % 4);
    const int64_t row = tile_row + group * 64 + thread / 32 * 16 + lane / 4;
    const float scale2 = a.scale * LOG2E;
    load_queries<D>(a, s.q, group * 64, tile_row + group * 64, head, thread);
    const uint8_t *q = s.q + group * 64 * 128;

    row_state<D> state;
    load_state<D>(a, state, row, head, column);
    float score[64];
    uint32_t weights[32];
    float factor[2];
    uint32_t step = 0;
    if (group == 0)
        give_turn(1); /* warpgroup 0 goes first */
    for (int64_t i = 0; i < w.n; i++) {
        const lr_kv_ref ref = w.refs[i];
        if (!sees(a, w, ref))
            continue;
        const uint32_t stage = step % STAGES, parity = step / STAGES & 1u;
        barrier_wait(&s.k_full[stage], parity);
        take_turn(group);
        wgmma_fence();
        multiply_qk<D>(score, q, s.k[stage]);
        wgmma_commit();
        if (step > 0) {
            const uint32_t before = (step - 1) % STAGES;
            barrier_wait(&s.v_full[before], (step - 1) / STAGES & 1u);
            multiply_pv<D>(state.o, weights, s.v[before]);
            wgmma_commit();
            give_turn(group);
            wgmma_wait<1>();
        } else {
            give_turn(group);
            wgmma_wait<0>();
        }
        if (thread == 0)
            barrier_arrive(&s.k_empty[stage]);
        if (!sees_all(a, w, ref))
            mask_scores(score, a, ref, a.position + row, column);
        uint32_t next[32];
        fold_scores<D>(score, state, next, factor, scale2);
        if (step > 0) {
            wgmma_wait<0>();
            if (thread == 0)
                barrier_arrive(&s.v_empty[(step - 1) % STAGES]);
        }
        rescale<D>(state, factor);
#pragma unroll
        for (int j = 0; j < 32; j++)
            weights[j] = next[j];
        step++;
    }
    if (step > 0) {
        const uint32_t before = (step - 1) % STAGES;
        barrier_wait(&s.v_full[before], (step - 1) / STAGES & 1u);
        wgmma_fence();
        multiply_pv<D>(state.o, weights, s.v[before]);
        wgmma_commit();
        wgmma_wait<0>();
    }
    if (group == 1)
        take_turn(1); /* takes the turn that was left over, so that barriers end even */
    else
        take_turn(0);
    if (group == 1)
        give_turn(1);
    store_state<D>(a, state, row, head, column);
}

template <int D> __global__ void __launch_bounds__(THREADS, 1) attention_kernel(const __grid_constant__ attention_params p)
{
    extern __shared__ uint8_t raw[];
    attention_shared<D> &s =
        *reinterpret_cast<attention_shared<D> *>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
    /* long lists first: the last tiles of a causal document have the most work */
    const int head = blockIdx.x % p.a.shape.n_heads;
    const int64_t tile = p.n_tiles - 1 - blockIdx.x / p.a.shape.n_heads;
    const int kv_head = head / p.group;
    const int64_t tile_position = (p.first_tile + tile) * TILE;
    walk w;
    w.first_position = tile_position < p.a.position ? p.a.position : tile_position;
    const int64_t end = p.a.position + p.a.n_rows;
    w.last_position = (tile_position + TILE < end ? tile_position + TILE : end) - 1;
    const int64_t list = p.a.n_lists == 1 ? 0 : tile * p.a.shape.n_kv_heads + kv_head;
    const int64_t first = p.a.list_first[list];
    w.refs = p.a.refs + first;
    w.n = p.a.list_first[list + 1] - first;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.k_full[i], 1);
            barrier_init(&s.v_full[i], 1);
            barrier_init(&s.k_empty[i], CONSUMERS);
            barrier_init(&s.v_empty[i], CONSUMERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / WARPGROUP;
    if (warpgroup == 0) {
        registers_shrink<24>();
        if (threadIdx.x == 0)
            produce<D>(p, w, kv_head, s);
    } else {
        registers_grow<240>();
        consume<D>(p, w, tile_position - p.a.position, head, warpgroup - 1, s);
    }
}

/* One thread a 16-byte piece of K and V. */
__global__ void kv_store_kernel(lr_kv_store_args a, int64_t n_pieces)
{
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n_pieces)
        return;
    const int64_t head_dim = a.shape.head_dim, pieces = head_dim / 8;
    const int64_t piece = i % pieces, head = i / pieces % a.shape.n_kv_heads, row = i / pieces / a.shape.n_kv_heads;
    const int64_t position = a.position + row;
    const int64_t half = TILE * head_dim * 2;
    uint8_t *block = static_cast<uint8_t *>(a.blocks[position / TILE - a.position / TILE]) + head * 2 * half;
    const int64_t offset = piece / 8 * (TILE * 128) + swizzled(position % TILE, piece % 8);
    const __nv_bfloat16 *k = static_cast<const __nv_bfloat16 *>(a.k) + row * a.k_stride + head * head_dim + piece * 8;
    const __nv_bfloat16 *v = static_cast<const __nv_bfloat16 *>(a.v) + row * a.v_stride + head * head_dim + piece * 8;
    *reinterpret_cast<uint4 *>(block + offset) = *reinterpret_cast<const uint4 *>(k);
    *reinterpret_cast<uint4 *>(block + half + offset) = *reinterpret_cast<const uint4 *>(v);
}

template <int D> static int launch_attention(cudaStream_t stream, const attention_params &p)
{
    const int bytes = sizeof(attention_shared<D>) + 1024;
    cudaError_t error =
        cudaFuncSetAttribute(attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess)
        return error;
    attention_kernel<D><<<p.n_tiles * p.a.shape.n_heads, THREADS, bytes, stream>>>(p);
    return cudaGetLastError();
}

} // namespace lr

size_t lr_cuda_kv_block_bytes(struct lr_kv_shape shape)
{
    return static_cast<size_t>(shape.n_kv_heads * lr::TILE * shape.head_dim) * 4;
}

int lr_cuda_kv_store(void *stream, const struct lr_kv_store_args *args)
{
    const int64_t n = args->n_rows * args->shape.n_kv_heads * (args->shape.head_dim / 8);
    if (n == 0)
        return 0;
    lr::kv_store_kernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(*args, n);
    return cudaGetLastError();
}

int lr_cuda_attention(void *stream, const struct lr_cuda_attention_args *args)
{
    if (args->n_rows == 0)
        return 0;
    lr::attention_params p;
    p.a = *args;
    p.group = static_cast<int>(args->shape.n_heads / args->shape.n_kv_heads);
    p.first_tile = args->position / lr::TILE;
    p.n_tiles = static_cast<int>((args->position + args->n_rows + lr::TILE - 1) / lr::TILE - p.first_tile);
    cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (args->shape.head_dim == 128)
        return lr::launch_attention<128>(s, p);
    if (args->shape.head_dim == 64)
        return lr::launch_attention<64>(s, p);
    return cudaErrorInvalidValue;
}
