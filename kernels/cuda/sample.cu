/* Sampling: kernels/sample.h's integers, so that the token is the CPU's, however the sums are divided.
 *
 * A cluster of eight blocks takes a row; each keeps the keys of its part of the vocabulary in shared memory:
 *
 *   row     | block 0 | block 1 | ... | block 7 |       one read of the logits
 *   cut     |  |  |##|  |  |  ...  one bin a thread     each block counts and weighs its tokens by bins; then every
 *                                                       block sums all eight and finds the bin of the goal itself
 *   again         |  |  |#|  |                          inside that bin, until it holds one token
 *
 * top_k, top_p and the draw are three such searches; they begin from the same first cut. Two cuts take turns, so that
 * one barrier of the cluster a cut is enough. */
#include "kernels/sample.h"

#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

#include <cooperative_groups.h>

namespace lr
{

constexpr int SAMPLE_CLUSTER = 8;
constexpr int SAMPLE_THREADS = 512;
constexpr int SAMPLE_BINS = SAMPLE_THREADS;
constexpr int SAMPLE_WARPS = SAMPLE_THREADS / 32;
constexpr int SAMPLE_ROWS = 64; /* of a launch: they travel as its parameter */
constexpr int SAMPLE_UNROLL = 8;

struct sample_row {
    double scale;  /* 1 / temperature; 0: greedy */
    uint64_t bits; /* the random number */
    float top_p;
    int32_t top_k;
};

struct sample_rows {
    struct sample_row row[SAMPLE_ROWS];
};

/* Tokens of one bin, or of all bins before one. */
struct mass {
    uint32_t n_tokens;
    uint64_t weight;
};

enum measure { TOKENS, WEIGHT };

static __device__ __forceinline__ uint64_t measured(const struct mass &mass, enum measure measure)
{
    return measure == TOKENS ? mass.n_tokens : mass.weight;
}

/* A block's tokens by bins. Shared memory adds 32 bits at once: weights are two words and a carry. */
struct cut {
    uint32_t n_tokens[SAMPLE_BINS], low[SAMPLE_BINS], high[SAMPLE_BINS];
    uint32_t ids[SAMPLE_BINS]; /* their sum: the token where there is one */
};

/* A bin of the whole row. */
struct bin {
    int index;
    uint32_t ids;
    struct mass mass, before;
};

struct sample_memory {
    struct cut cuts[2];
    uint64_t best[SAMPLE_WARPS];
    uint64_t block_best;
    struct mass warps[SAMPLE_WARPS], all;
    struct bin found;
    uint32_t keys[]; /* of the block's part */
};

static __device__ __forceinline__ uint64_t warp_min(uint64_t x)
{
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(0xffffffffu, x, step);
        x = other < x ? other : x;
    }
    return x;
}

/* One row as one of its eight blocks sees it. Every thread of the cluster calls the same functions in the same order.
 */
struct row_search {
    struct sample_memory &memory;
    cooperative_groups::cluster_group cluster;
    int first, n; /* the part: tokens [first, first + n) */
    float largest;
    double scale;
    int turn;

    __device__ __forceinline__ double exponent(uint32_t key) const
    {
        return lr_sample_exponent(lr_sample_logit(key), largest, scale);
    }

    /* Reads the part; returns the first place of the row. */
    __device__ __forceinline__ uint64_t read(const float *logits)
    {
        uint64_t best = UINT64_MAX;
        for (int start = threadIdx.x; start < n; start += SAMPLE_UNROLL * SAMPLE_THREADS) {
            float logit[SAMPLE_UNROLL];
#pragma unroll
            for (int u = 0; u < SAMPLE_UNROLL; u++) {
                const int i = start + u * SAMPLE_THREADS;
                logit[u] = i < n ? logits[first + i] : 0.0f;
            }
#pragma unroll
            for (int u = 0; u < SAMPLE_UNROLL; u++) {
                const int i = start + u * SAMPLE_THREADS;
                if (i < n) {
                    const uint32_t key = lr_sample_key(logit[u]);
                    const uint64_t place = lr_sample_place(key, first + i);
                    memory.keys[i] = key;
                    best = place < best ? place : best;
                }
            }
        }
        best = warp_min(best);
        if (threadIdx.x % 32 == 0)
            memory.best[threadIdx.x / 32] = best;
        __syncthreads();
        if (threadIdx.x < 32) {
            best = warp_min(memory.best[threadIdx.x % SAMPLE_WARPS]);
            memory.block_best = best;
        }
        cluster.sync();
        for (int rank = 0; rank < SAMPLE_CLUSTER; rank++) {
            const uint64_t other = *cluster.map_shared_rank(&memory.block_best, rank);
            best = rank == 0 || other < best ? other : best;
        }
        return best;
    }

    __device__ __forceinline__ void begin_cut()
    {
        struct cut &cut = memory.cuts[turn];
        cut.n_tokens[threadIdx.x] = cut.low[threadIdx.x] = cut.high[threadIdx.x] = cut.ids[threadIdx.x] = 0;
        __syncthreads();
    }

    __device__ __forceinline__ void add(int bin, double exponent, int i)
    {
        struct cut &cut = memory.cuts[turn];
        const uint64_t weight = lr_sample_weight(exponent);
        const uint32_t low = static_cast<uint32_t>(weight), before = atomicAdd(&cut.low[bin], low);
        const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < low);
        if (high != 0)
            atomicAdd(&cut.high[bin], high);
        atomicAdd(&cut.n_tokens[bin], 1u);
        atomicAdd(&cut.ids[bin], static_cast<uint32_t>(first + i));
    }

    /* The whole row's bin of this thread, with what lies before it. memory.all: the sum, after the next barrier. */
    __device__ __forceinline__ struct bin end_cut()
    {
        const int thread = threadIdx.x, lane = thread % 32;
        struct bin bin = {thread, 0, {0, 0}, {0, 0}};
        cluster.sync();
#pragma unroll
        for (int rank = 0; rank < SAMPLE_CLUSTER; rank++) {
            const struct cut *other = cluster.map_shared_rank(&memory.cuts[turn], rank);
            bin.mass.n_tokens += other->n_tokens[thread];
            bin.mass.weight += (static_cast<uint64_t>(other->high[thread]) << 32) + other->low[thread];
            bin.ids += other->ids[thread];
        }
        turn ^= 1;
        struct mass sum = bin.mass;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t n_tokens = __shfl_up_sync(0xffffffffu, sum.n_tokens, step);
            const uint64_t weight = __shfl_up_sync(0xffffffffu, sum.weight, step);
            sum.n_tokens += lane >= step ? n_tokens : 0;
            sum.weight += lane >= step ? weight : 0;
        }
        if (lane == 31)
            memory.warps[thread / 32] = sum;
        __syncthreads();
        for (int warp = 0; warp < thread / 32; warp++) {
            sum.n_tokens += memory.warps[warp].n_tokens;
            sum.weight += memory.warps[warp].weight;
        }
        if (thread == SAMPLE_THREADS - 1)
            memory.all = sum;
        bin.before = {sum.n_tokens - bin.mass.n_tokens, sum.weight - bin.mass.weight};
        return bin;
    }

    /* The first bin up to which the cut measures `goal`, which it does reach. */
    __device__ __forceinline__ struct bin find_bin(const struct bin &mine, enum measure measure, uint64_t goal)
    {
        __syncthreads();
        const uint64_t before = measured(mine.before, measure);
        if (before < goal && goal <= before + measured(mine.mass, measure))
            memory.found = mine;
        __syncthreads();
        return memory.found;
    }

    /* By exponent: all tokens that have a weight. */
    __device__ __forceinline__ struct bin cut_exponents()
    {
        begin_cut();
        for (int i = threadIdx.x; i < n; i += SAMPLE_THREADS) {
            const double x = exponent(memory.keys[i]);
            const int bin = lr_sample_bin(x, SAMPLE_BINS);
            if (bin < SAMPLE_BINS)
                add(bin, x, i);
        }
        return end_cut();
    }

    /* By place: the tokens of places [begin, end), 2^shift places a bin. */
    __device__ __forceinline__ struct bin cut_places(uint64_t begin, uint64_t end, int shift)
    {
        const uint32_t first_key = static_cast<uint32_t>(begin >> LR_SAMPLE_ID_BITS);
        const uint32_t more_keys = static_cast<uint32_t>((end - 1) >> LR_SAMPLE_ID_BITS) - first_key;
        begin_cut();
        for (int i = threadIdx.x; i < n; i += SAMPLE_THREADS) {
            const uint32_t key = memory.keys[i];
            if (key - first_key > more_keys)
                continue;
            const uint64_t offset = lr_sample_place(key, first + i) - begin;
            if (offset < end - begin)
                add(static_cast<int>(offset >> shift), exponent(key), i);
        }
        return end_cut();
    }

    /* The first key, from the largest logit's on, whose exponent lies in bin `bin` or behind it: every lane tries one
     * of 32 digits. */
    __device__ __forceinline__ uint32_t first_key(int bin) const
    {
        const uint32_t lane = threadIdx.x % 32, best = lr_sample_key(largest);
        if (bin == 0)
            return best;
        uint32_t before = 0; /* the last key known to lie before the bin */
        for (int shift = 30; shift >= 0; shift -= 5) {
            const uint32_t key = before + (lane << shift);
            const bool is_before =
                (shift < 30 || lane < 4) && (key <= best || lr_sample_bin(exponent(key), SAMPLE_BINS) < bin);
            before += (__popc(__ballot_sync(0xffffffffu, is_before)) - 1u) << shift;
        }
        return before + 1;
    }

    /* The first token in order up to which, itself included, the row measures `goal`; *weight: the sum up to there. */
    __device__ int32_t find_token(const struct bin &mine, enum measure measure, uint64_t goal, uint64_t *weight)
    {
        struct bin bin = find_bin(mine, measure, goal);
        *weight = bin.before.weight;
        if (bin.mass.n_tokens > 1) {
            uint64_t begin = lr_sample_place(first_key(bin.index), 0),
                     end = lr_sample_place(first_key(bin.index + 1), 0);
            do {
                const int excess = 64 - __clzll(static_cast<long long>(end - begin - 1)) - 9, shift = max(excess, 0);
                static_assert(SAMPLE_BINS == 1 << 9, "nine bits a cut");
                goal -= measured(bin.before, measure);
                bin = find_bin(cut_places(begin, end, shift), measure, goal);
                *weight += bin.before.weight;
                begin += static_cast<uint64_t>(bin.index) << shift;
                end = min(end, begin + (static_cast<uint64_t>(1) << shift));
            } while (bin.mass.n_tokens > 1);
        }
        *weight += bin.mass.weight;
        return static_cast<int32_t>(bin.ids);
    }

    __device__ __forceinline__ int32_t draw(const struct sample_row &row)
    {
        const struct bin mine = cut_exponents();
        __syncthreads();
        const struct mass all = memory.all;
        uint64_t total = all.weight, unused;
        if (row.top_k > 0 && static_cast<uint32_t>(row.top_k) < all.n_tokens)
            find_token(mine, TOKENS, static_cast<uint64_t>(row.top_k), &total);
        uint64_t kept = total;
        if (row.top_p < 1.0f)
            find_token(mine, WEIGHT, lr_sample_nucleus(row.top_p, total), &kept);
        return find_token(mine, WEIGHT, lr_sample_high_product(row.bits, kept) + 1, &unused);
    }
};

static __global__ void __cluster_dims__(SAMPLE_CLUSTER) __launch_bounds__(SAMPLE_THREADS, 2) sample_kernel(
    const __grid_constant__ struct sample_rows rows, const float *logits, int vocab, int part, int32_t *ids)
{
    extern __shared__ __align__(16) char shared[];
    const int index = blockIdx.x / SAMPLE_CLUSTER, rank = blockIdx.x % SAMPLE_CLUSTER;
    const struct sample_row &row = rows.row[index];
    struct row_search search = {*reinterpret_cast<struct sample_memory *>(shared),
                                cooperative_groups::this_cluster(),
                                rank * part,
                                min(part, max(vocab - rank * part, 0)),
                                0.0f,
                                row.scale,
                                0};
    const uint64_t best = search.read(logits + static_cast<int64_t>(index) * vocab);
    search.largest = lr_sample_logit(static_cast<uint32_t>(best >> LR_SAMPLE_ID_BITS));
    int32_t id = -1;
    if (isfinite(search.largest))
        id = row.scale > 0.0 ? search.draw(row) : static_cast<int32_t>(best & ((1u << LR_SAMPLE_ID_BITS) - 1));
    if (rank == 0 && threadIdx.x == 0)
        ids[index] = id;
    search.cluster.sync(); /* nobody leaves while others read its memory */
}

} // namespace lr

void lr_cuda_sample(const struct lr_exec *exec, const struct lr_sample_args *args)
{
    const int part = static_cast<int>((args->vocab + lr::SAMPLE_CLUSTER - 1) / lr::SAMPLE_CLUSTER);
    const size_t bytes = sizeof(struct lr::sample_memory) + static_cast<size_t>(part) * sizeof(uint32_t);
    cudaError_t error =
        cudaFuncSetAttribute(lr::sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    for (int64_t first = 0; first < args->n_rows && error == cudaSuccess; first += lr::SAMPLE_ROWS) {
        struct lr::sample_rows rows = {};
        const int64_t n = args->n_rows - first < lr::SAMPLE_ROWS ? args->n_rows - first : lr::SAMPLE_ROWS;
        for (int64_t t = 0; t < n; t++) {
            const struct lr_sampling &s = args->sampling[first + t];
            rows.row[t] = {s.temperature > 0.0f ? 1.0 / static_cast<double>(s.temperature) : 0.0,
                           lr_sample_bits(s.seed, args->positions[first + t]), s.top_p, s.top_k};
        }
        lr::sample_kernel<<<static_cast<unsigned>(n * lr::SAMPLE_CLUSTER), lr::SAMPLE_THREADS, bytes,
                            lr::stream_of(exec)>>>(rows, args->logits + first * args->vocab,
                                                   static_cast<int>(args->vocab), part, args->ids + first);
        error = cudaGetLastError();
    }
    lr_cuda_note(exec, error, "sample");
}
