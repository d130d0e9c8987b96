/* Which blocks a query block reads: the top_k by mean_q . mean_k. Three kernels over slices of query blocks, as many as
 * the scratch memory has room for:
 *
 *   sum     q [128 rows, group, d]        -> sums   [query blocks, kv heads, d]          float32 (mean_q up to a
 * factor) score   sums . block_means            -> keys   [query blocks, kv heads, n_blocks]   a score as an ordered
 * integer choose  the top_k-th largest key by four passes of a histogram of 256 digits, then one walk in ascending
 * order: larger keys, and of the equal ones the first few                             -> chosen
 *
 * A score is one chain of fused multiply-adds in ascending channels whatever the tile; counts are integers: nothing
 * depends on the number of query blocks in the call. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int BLOCK = LR_KV_BLOCK_TOKENS;

/* A slice of the call: query blocks [first, first + n) of its rows. */
struct select_slice {
    struct lr_block_select_args args;
    int64_t first, n;
    float *sums;    /* [n, n_kv_heads, head_dim] */
    uint32_t *keys; /* [n, n_kv_heads, n_blocks] */
};

/* Candidates [first, end) of query block `index` of the slice. */
struct block_range {
    int64_t first, end;
};

static __host__ __device__ __forceinline__ struct block_range candidates(const struct select_slice &s, int64_t index)
{
    const int64_t reach = (s.args.position / BLOCK + s.first + index) * BLOCK - s.args.window;
    const int64_t behind = reach > 0 ? reach / BLOCK : 0;
    return {(s.args.sinks + BLOCK - 1) / BLOCK, behind < s.args.n_blocks ? behind : s.args.n_blocks};
}

/* ---- sum ---- */

constexpr int SUM_THREADS = 256;

/* A block a query block and KV head: `lanes` threads side by side on the channels, the others on other rows and heads.
 */
template <bool ALIGNED>
static __global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const struct select_slice s, int lanes)
{
    extern __shared__ float partial[]; /* [groups, 8 lanes] */
    const struct lr_block_select_args &a = s.args;
    const int groups = SUM_THREADS / lanes, group = static_cast<int>(threadIdx.x) / lanes;
    const int channel = static_cast<int>(threadIdx.x) % lanes * 8, n = static_cast<int>(a.shape.head_dim) - channel;
    const int n_heads = static_cast<int>(a.shape.n_heads / a.shape.n_kv_heads);
    const int64_t first = (s.first + blockIdx.x) * BLOCK;
    const int n_rows = static_cast<int>(a.n_rows - first < BLOCK ? a.n_rows - first : BLOCK);
    const act *q =
        static_cast<const act *>(a.q) + first * a.q_stride + blockIdx.y * n_heads * a.q_head_stride + channel;
    struct piece sum = {};
#pragma unroll 4
    for (int item = group; item < n_rows * n_heads; item += groups) {
        const int row = item / n_heads, head = item - row * n_heads;
        const struct piece x = load_piece<ALIGNED>(q + row * a.q_stride + head * a.q_head_stride, n);
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum.v[i] += x.v[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        partial[group * lanes * 8 + channel + i] = sum.v[i];
    __syncthreads();
    float *out = s.sums + (blockIdx.x * a.shape.n_kv_heads + blockIdx.y) * a.shape.head_dim;
    for (int c = threadIdx.x; c < a.shape.head_dim; c += SUM_THREADS) {
        float total = 0.0f;
        for (int g = 0; g < groups; g++)
            total += partial[g * lanes * 8 + c];
        out[c] = total;
    }
}

/* ---- score ---- */

constexpr int TILE_Q = 64, TILE_K = 128, TILE_D = 16; /* query blocks, key blocks, channels */
constexpr int SCORE_THREADS = 256;                    /* 16 x 16, of 4 x 8 scores each */

/* Larger scores have larger keys; -0 and +0 the same. */
static __device__ __forceinline__ uint32_t key_of(float score)
{
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Four channels of a row of `d`; zeros where there are none. */
static __device__ __forceinline__ float4 load_channels(const float *row, int64_t channel, int64_t d, bool valid)
{
    const int64_t n = valid ? d - channel : 0;
    if (d % 4 == 0)
        return n > 0 ? *reinterpret_cast<const float4 *>(row + channel) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return make_float4(n > 0 ? row[channel] : 0.0f, n > 1 ? row[channel + 1] : 0.0f, n > 2 ? row[channel + 2] : 0.0f,
                       n > 3 ? row[channel + 3] : 0.0f);
}

static __device__ __forceinline__ void store_column(float *tile, int pitch, int channel, int column, const float4 &x)
{
    tile[channel * pitch + column] = x.x;
    tile[(channel + 1) * pitch + column] = x.y;
    tile[(channel + 2) * pitch + column] = x.z;
    tile[(channel + 3) * pitch + column] = x.w;
}

static __global__ void __launch_bounds__(SCORE_THREADS) score_kernel(const struct select_slice s)
{
    constexpr int PITCH_Q = TILE_Q + 4, PITCH_K = TILE_K + 4;
    __shared__ __align__(16) float q_tile[TILE_D * PITCH_Q], k_tile[TILE_D * PITCH_K];
    const struct lr_block_select_args &a = s.args;
    const int64_t d = a.shape.head_dim, n_kv_heads = a.shape.n_kv_heads, kv_head = blockIdx.z;
    const int64_t first_q = static_cast<int64_t>(blockIdx.y) * TILE_Q,
                  first_k = static_cast<int64_t>(blockIdx.x) * TILE_K;
    const int64_t last_q = (first_q + TILE_Q < s.n ? first_q + TILE_Q : s.n) - 1;
    const struct block_range most =
        candidates(s, last_q); /* a later query block has all candidates of an earlier one */
    if (first_k >= most.end || first_k + TILE_K <= most.first)
        return;
    const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
    const int row = thread / 4, channel = thread % 4 * 4; /* of the loads */
    const int64_t k_row[2] = {first_k + row, first_k + row + 64}, q_row = first_q + row;
    const float *q = s.sums + (q_row * n_kv_heads + kv_head) * d;
    const float *k[2] = {a.block_means + (k_row[0] * n_kv_heads + kv_head) * d,
                         a.block_means + (k_row[1] * n_kv_heads + kv_head) * d};
    float4 next_q = load_channels(q, channel, d, q_row < s.n), next_k[2];
    for (int i = 0; i < 2; i++)
        next_k[i] = load_channels(k[i], channel, d, k_row[i] < a.n_blocks);
    float sum[4][8] = {};
    for (int64_t at = 0; at < d; at += TILE_D) {
        store_column(q_tile, PITCH_Q, channel, row, next_q);
        store_column(k_tile, PITCH_K, channel, row, next_k[0]);
        store_column(k_tile, PITCH_K, channel, row + 64, next_k[1]);
        __syncthreads();
        next_q = load_channels(q, at + TILE_D + channel, d, q_row < s.n);
#pragma unroll
        for (int i = 0; i < 2; i++)
            next_k[i] = load_channels(k[i], at + TILE_D + channel, d, k_row[i] < a.n_blocks);
#pragma unroll
        for (int c = 0; c < TILE_D; c++) {
            const float4 x = *reinterpret_cast<const float4 *>(q_tile + c * PITCH_Q + ty * 4);
            const float4 y0 = *reinterpret_cast<const float4 *>(k_tile + c * PITCH_K + tx * 4);
            const float4 y1 = *reinterpret_cast<const float4 *>(k_tile + c * PITCH_K + 64 + tx * 4);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[8] = {y0.x, y0.y, y0.z, y0.w, y1.x, y1.y, y1.z, y1.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    sum[i][j] = fmaf(xs[i], ys[j], sum[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t q_at = first_q + ty * 4 + i;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int64_t k_at = first_k + j / 4 * 64 + tx * 4 + j % 4;
            if (q_at < s.n && k_at < a.n_blocks)
                s.keys[(q_at * n_kv_heads + kv_head) * a.n_blocks + k_at] = key_of(sum[i][j]);
        }
    }
}

/* ---- choose ---- */

constexpr int CHOOSE_THREADS = 512;
constexpr int CHOOSE_WARPS = CHOOSE_THREADS / 32;
constexpr size_t CHOOSE_KEY_BYTES = 96 << 10; /* of keys in shared memory; sm_86 has 99 KiB a block */

struct choose_shared {
    uint32_t histogram[256];
    uint32_t prefix, rank; /* the digits found so far; how many keys with that prefix are still wanted */
    uint32_t n_larger[CHOOSE_WARPS], n_equal[CHOOSE_WARPS];
};

/* The first warp: the largest digit such that at least `rank` keys have it or a larger one. */
static __device__ __forceinline__ void find_digit(struct choose_shared *shared, int shift)
{
    const int lane = threadIdx.x;
    uint32_t count = 0, above;
    for (int i = 0; i < 8; i++)
        count += shared->histogram[255 - lane * 8 - i];
    above = count;
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, above, step);
        above += lane >= step ? before : 0;
    }
    above -= count; /* keys with larger digits than this lane's */
    const uint32_t rank = shared->rank;
    __syncwarp();
    if (above < rank && above + count >= rank) {
        int digit = 255 - lane * 8;
        while (above + shared->histogram[digit] < rank)
            above += shared->histogram[digit--];
        shared->prefix |= static_cast<uint32_t>(digit) << shift;
        shared->rank = rank - above;
    }
}

/* HELD: the keys fit into shared memory. */
template <bool HELD> static __global__ void __launch_bounds__(CHOOSE_THREADS) choose_kernel(const struct select_slice s)
{
    extern __shared__ uint32_t held[];
    __shared__ struct choose_shared shared;
    const struct lr_block_select_args &a = s.args;
    const int64_t pair = blockIdx.x, top_k = a.top_k;
    const struct block_range range = candidates(s, pair / a.shape.n_kv_heads);
    const int64_t n = range.end > range.first ? range.end - range.first : 0;
    const uint32_t *keys = s.keys + pair * a.n_blocks + range.first;
    int32_t *chosen = a.chosen + (s.first * a.shape.n_kv_heads + pair) * top_k;
    if (n <= top_k) {
        for (int64_t i = threadIdx.x; i < top_k; i += CHOOSE_THREADS)
            chosen[i] = i < n ? static_cast<int32_t>(range.first + i) : -1;
        return;
    }
    if (HELD) {
        for (int64_t i = threadIdx.x; i < n; i += CHOOSE_THREADS)
            held[i] = keys[i];
        keys = held;
    }
    if (threadIdx.x == 0) {
        shared.prefix = 0;
        shared.rank = static_cast<uint32_t>(top_k);
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256)
            shared.histogram[threadIdx.x] = 0;
        __syncthreads();
        const uint32_t prefix = shared.prefix, mask = static_cast<uint32_t>(0xffffffff00000000ull >> (24 - shift));
        for (int64_t i = threadIdx.x; i < n; i += CHOOSE_THREADS) {
            const uint32_t key = keys[i];
            if ((key & mask) == prefix)
                atomicAdd(&shared.histogram[key >> shift & 255u], 1u);
        }
        __syncthreads();
        if (threadIdx.x < 32)
            find_digit(&shared, shift);
        __syncthreads();
    }
    const uint32_t threshold = shared.prefix, n_equal_wanted = shared.rank;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t part = (n + CHOOSE_THREADS - 1) / CHOOSE_THREADS * 32; /* of a warp */
    const int64_t first = warp * part, end = first + part < n ? first + part : n;
    uint32_t larger = 0, equal = 0;
    for (int64_t i = first + lane; i < end; i += 32) {
        larger += keys[i] > threshold;
        equal += keys[i] == threshold;
    }
    larger = __reduce_add_sync(0xffffffffu, larger);
    equal = __reduce_add_sync(0xffffffffu, equal);
    if (lane == 0) {
        shared.n_larger[warp] = larger;
        shared.n_equal[warp] = equal;
    }
    __syncthreads();
    larger = equal = 0;
    for (int w = 0; w < warp; w++) {
        larger += shared.n_larger[w];
        equal += shared.n_equal[w];
    }
    const uint32_t below = (1u << lane) - 1;
    for (int64_t i = first; i < end; i += 32) {
        const uint32_t key = i + lane < end ? keys[i + lane] : 0;
        const bool is_larger = i + lane < end && key > threshold, is_equal = i + lane < end && key == threshold;
        const uint32_t who_larger = __ballot_sync(0xffffffffu, is_larger),
                       who_equal = __ballot_sync(0xffffffffu, is_equal);
        const uint32_t equal_before = equal + static_cast<uint32_t>(__popc(who_equal & below));
        const uint32_t equal_taken = equal_before < n_equal_wanted ? equal_before : n_equal_wanted;
        if (is_larger || (is_equal && equal_before < n_equal_wanted))
            chosen[larger + static_cast<uint32_t>(__popc(who_larger & below)) + equal_taken] =
                static_cast<int32_t>(range.first + i + lane);
        larger += static_cast<uint32_t>(__popc(who_larger));
        equal += static_cast<uint32_t>(__popc(who_equal));
    }
}

static cudaError_t launch_choose(cudaStream_t stream, const struct select_slice &slice)
{
    const struct block_range most = candidates(slice, slice.n - 1);
    const size_t key_bytes = most.end > most.first ? static_cast<size_t>(most.end - most.first) * sizeof(uint32_t) : 0;
    const unsigned n_pairs = static_cast<unsigned>(slice.n * slice.args.shape.n_kv_heads);
    if (key_bytes > CHOOSE_KEY_BYTES) {
        choose_kernel<false><<<n_pairs, CHOOSE_THREADS, 0, stream>>>(slice);
        return cudaGetLastError();
    }
    const cudaError_t error = cudaFuncSetAttribute(choose_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(CHOOSE_KEY_BYTES));
    if (error != cudaSuccess)
        return error;
    choose_kernel<true><<<n_pairs, CHOOSE_THREADS, key_bytes, stream>>>(slice);
    return cudaGetLastError();
}

static cudaError_t select_blocks(cudaStream_t stream, const struct select_slice &slice)
{
    const struct lr_block_select_args &a = slice.args;
    const bool aligned = are_aligned(16, a.q) && (a.q_stride | a.q_head_stride | a.shape.head_dim) % 8 == 0;
    int lanes = 8;
    while (lanes * 8 < a.shape.head_dim)
        lanes *= 2;
    const dim3 pairs(static_cast<unsigned>(slice.n), static_cast<unsigned>(a.shape.n_kv_heads));
    const auto sum = aligned ? sum_kernel<true> : sum_kernel<false>;
    sum<<<pairs, SUM_THREADS, SUM_THREADS * 8 * sizeof(float), stream>>>(slice, lanes);
    const struct block_range most = candidates(slice, slice.n - 1);
    if (most.end > most.first) {
        const dim3 tiles(blocks_for(most.end, TILE_K), blocks_for(slice.n, TILE_Q), pairs.y);
        score_kernel<<<tiles, SCORE_THREADS, 0, stream>>>(slice);
    }
    return launch_choose(stream, slice);
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(block_select)(const struct lr_exec *exec, const struct lr_block_select_args *args)
{
    const int64_t n_query_blocks = (args->n_rows + lr::BLOCK - 1) / lr::BLOCK, n_kv_heads = args->shape.n_kv_heads;
    const int64_t n_blocks = args->n_blocks > 0 ? args->n_blocks : 1;
    if (args->top_k <= 0)
        return;
    int64_t most = LR_CUDA_SCRATCH_BYTES / (n_kv_heads * (args->shape.head_dim + n_blocks) * 4);
    if (most == 0) { /* millions of blocks times KV heads */
        lr_cuda_note(exec, cudaErrorInvalidValue, "block_select");
        return;
    }
    most = most > lr::TILE_Q ? most / lr::TILE_Q * lr::TILE_Q : most;
    for (int64_t first = 0; first < n_query_blocks; first += most) {
        const int64_t n = n_query_blocks - first < most ? n_query_blocks - first : most;
        float *sums = static_cast<float *>(lr_cuda_scratch(exec));
        uint32_t *keys = reinterpret_cast<uint32_t *>(sums + n * n_kv_heads * args->shape.head_dim);
        lr_cuda_note(exec, lr::select_blocks(lr::stream_of(exec), {*args, first, n, sums, keys}), "block_select");
    }
}
