/* Sampling: kernels/sample.h's integers, so that the token is the CPU's, however the sums are divided.
 *
 * A team takes a row: a block alone, or (sm_90) a cluster of eight, each of which keeps the keys of its part of the
 * vocabulary in shared memory:
 *
 *   row     | block 0 | block 1 | ... | block 7 |       one read of the logits
 *   cut     |  |  |##|  |  |  ...  one bin a thread     each block counts and weighs its tokens by bins; then every
 *                                                       block sums all eight and finds the bin of the goal itself
 *   again         |  |  |#|  |                          inside that bin, until it holds one token
 *
 * top_k, top_p and the draw are three such searches; they begin from the same first cut. Two cuts take turns, so that
 * one meeting of the team a cut is enough. */
#include "kernels/sample.h"

#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

#include <cooperative_groups.h>

namespace lr
{

/* ---- teams ---- */

struct block_team {
    static constexpr int BLOCKS = 1, THREADS = 1024, RESIDENT = 1;

    static __device__ __forceinline__ void meet()
    {
        __syncthreads();
    }

    /* The same place in another block's shared memory. */
    template <class T> static __device__ __forceinline__ const T *at(const T *mine, int)
    {
        return mine;
    }
};

struct cluster_team {
    static constexpr int BLOCKS = 8, THREADS = 512, RESIDENT = 2;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    static __device__ __forceinline__ void meet()
    {
        cooperative_groups::this_cluster().sync();
    }

    template <class T> static __device__ __forceinline__ const T *at(const T *mine, int rank)
    {
        return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
    }
#endif
};

/* ---- a row ---- */

constexpr int SAMPLE_ROWS = 64; /* of a launch: they travel as its parameter */

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

/* A bin of the whole row. */
struct bin {
    int index;
    uint32_t ids;
    struct mass mass, before;
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

/* One row as one block of its team sees it. Every thread of the team calls the same functions in the same order. */
template <class Team> struct row_search {
    static constexpr int THREADS = Team::THREADS, BINS = THREADS, WARPS = THREADS / 32, UNROLL = 8;
    static constexpr bool KEEPS_KEYS = Team::BLOCKS > 1;

    /* The block's tokens by bins. Shared memory adds 32 bits at once: weights are two words and a carry. */
    struct cut {
        uint32_t n_tokens[BINS], low[BINS], high[BINS];
        uint32_t ids[BINS]; /* their sum: the token where there is one */
    };

    struct shared_state {
        struct cut cuts[2];
        uint64_t best[WARPS];
        uint64_t block_best;
        struct mass warps[WARPS], all;
        struct bin found;
        uint32_t keys[]; /* [n] where they are kept */
    };

    struct shared_state &memory;
    const float *logits; /* of the part: tokens [first, first + n) */
    int first, n;
    float largest;
    double scale;
    int turn;

    __device__ __forceinline__ uint32_t key_of(int i) const
    {
        if constexpr (KEEPS_KEYS)
            return memory.keys[i];
        else
            return lr_sample_key(logits[i]);
    }

    __device__ __forceinline__ double exponent(uint32_t key) const
    {
        return lr_sample_exponent(lr_sample_logit(key), largest, scale);
    }

    /* Calls body(i, key) for the part's tokens; the keys of a few are on their way together. */
    template <class Body> __device__ __forceinline__ void for_keys(Body body) const
    {
        for (int start = threadIdx.x; start < n; start += UNROLL * THREADS) {
            uint32_t key[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++)
                key[u] = start + u * THREADS < n ? key_of(start + u * THREADS) : 0;
#pragma unroll
            for (int u = 0; u < UNROLL; u++)
                if (start + u * THREADS < n)
                    body(start + u * THREADS, key[u]);
        }
    }

    /* Reads the part; returns the first place of the row. */
    __device__ __forceinline__ uint64_t read()
    {
        uint64_t best = UINT64_MAX;
        for (int start = threadIdx.x; start < n; start += UNROLL * THREADS) {
            float logit[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++)
                logit[u] = start + u * THREADS < n ? logits[start + u * THREADS] : 0.0f;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int i = start + u * THREADS;
                if (i < n) {
                    const uint32_t key = lr_sample_key(logit[u]);
                    const uint64_t place = lr_sample_place(key, first + i);
                    if constexpr (KEEPS_KEYS)
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
            best = warp_min(memory.best[threadIdx.x % WARPS]);
            memory.block_best = best;
        }
        Team::meet();
        for (int rank = 0; rank < Team::BLOCKS; rank++) {
            const uint64_t other = *Team::at(&memory.block_best, rank);
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
        Team::meet();
#pragma unroll
        for (int rank = 0; rank < Team::BLOCKS; rank++) {
            const struct cut *other = Team::at(&memory.cuts[turn], rank);
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
        if (thread == THREADS - 1)
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
        for_keys([this](int i, uint32_t key) {
            const double x = exponent(key);
            const int bin = lr_sample_bin(x, BINS);
            if (bin < BINS)
                add(bin, x, i);
        });
        return end_cut();
    }

    /* By place: the tokens of places [begin, end), 2^shift places a bin. */
    __device__ __forceinline__ struct bin cut_places(uint64_t begin, uint64_t end, int shift)
    {
        const uint32_t key_begin = static_cast<uint32_t>(begin >> LR_SAMPLE_ID_BITS);
        const uint32_t more_keys = static_cast<uint32_t>((end - 1) >> LR_SAMPLE_ID_BITS) - key_begin;
        begin_cut();
        for_keys([=](int i, uint32_t key) {
            if (key - key_begin > more_keys)
                return;
            const uint64_t offset = lr_sample_place(key, first + i) - begin;
            if (offset < end - begin)
                add(static_cast<int>(offset >> shift), exponent(key), i);
        });
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
                (shift < 30 || lane < 4) && (key <= best || lr_sample_bin(exponent(key), BINS) < bin);
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
                int shift = 0;
                while ((end - begin - 1) >> shift >= BINS)
                    shift++;
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

template <class Team>
static __global__ void __launch_bounds__(Team::THREADS, Team::RESIDENT) sample_kernel(
    const __grid_constant__ struct sample_rows rows, const float *logits, int vocab, int part, int32_t *ids)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    constexpr bool RUNS = true;
#else
    constexpr bool RUNS = Team::BLOCKS == 1; /* there are no clusters */
#endif
    if constexpr (RUNS) {
        extern __shared__ __align__(16) char shared[];
        const int index = blockIdx.x / Team::BLOCKS, rank = blockIdx.x % Team::BLOCKS, first = rank * part;
        const int n = min(part, max(vocab - first, 0));
        const struct sample_row &row = rows.row[index];
        auto &memory = *reinterpret_cast<typename row_search<Team>::shared_state *>(shared);
        const float *mine = logits + static_cast<int64_t>(index) * vocab + first;
        struct row_search<Team> search = {
            memory, mine, first, n, 0.0f, row.scale, 0
        };
        const uint64_t best = search.read();
        search.largest = lr_sample_logit(static_cast<uint32_t>(best >> LR_SAMPLE_ID_BITS));
        int32_t id = -1;
        if (isfinite(search.largest))
            id = row.scale > 0.0 ? search.draw(row) : static_cast<int32_t>(best & ((1u << LR_SAMPLE_ID_BITS) - 1));
        if (rank == 0 && threadIdx.x == 0)
            ids[index] = id;
        Team::meet(); /* nobody leaves while others read its memory */
    }
}

/* Up to SAMPLE_ROWS rows. */
template <class Team>
static cudaError_t launch(const struct lr_exec *exec, const struct lr_sample_args *args, int64_t first, int64_t n)
{
    struct sample_rows rows = {};
    for (int64_t t = 0; t < n; t++) {
        const struct lr_sampling &s = args->sampling[first + t];
        rows.row[t] = {s.temperature > 0.0f ? 1.0 / static_cast<double>(s.temperature) : 0.0,
                       lr_sample_bits(s.seed, args->positions[first + t]), s.top_p, s.top_k};
    }
    const int vocab = static_cast<int>(args->vocab), part = (vocab + Team::BLOCKS - 1) / Team::BLOCKS;
    const size_t keys = row_search<Team>::KEEPS_KEYS ? static_cast<size_t>(part) : 0;
    const size_t bytes = sizeof(typename row_search<Team>::shared_state) + keys * sizeof(uint32_t);
    const auto kernel = sample_kernel<Team>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess)
        return error;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {Team::BLOCKS, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(n * Team::BLOCKS));
    config.blockDim = dim3(Team::THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream_of(exec);
    config.attrs = &cluster;
    config.numAttrs = Team::BLOCKS > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, rows, args->logits + first * args->vocab, vocab, part,
                              args->ids + first);
}

} // namespace lr

void lr_cuda_sample(const struct lr_exec *exec, const struct lr_sample_args *args)
{
    const auto launch = lr_cuda_hopper_kernels(exec) ? lr::launch<lr::cluster_team> : lr::launch<lr::block_team>;
    cudaError_t error = cudaSuccess;
    for (int64_t first = 0; first < args->n_rows && error == cudaSuccess; first += lr::SAMPLE_ROWS) {
        const int64_t left = args->n_rows - first;
        error = launch(exec, args, first, left < lr::SAMPLE_ROWS ? left : lr::SAMPLE_ROWS);
    }
    lr_cuda_note(exec, error, "sample");
}
