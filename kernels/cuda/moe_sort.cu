/* Counting sort of the (token, choice) pairs by expert. Stable: within an expert, tokens ascend; so its result is the
 * one and only, whatever the launch looked like.
 *
 *   pairs:   | chunk 0 | chunk 1 | ...          one warp a chunk
 *   count:   counts[expert][chunk]
 *   scan:    before[expert][chunk] = pairs of that expert in earlier chunks; totals[expert]     one warp an expert
 *   place:   each chunk walks its pairs again, 32 at a time, in order: the place of a pair is the expert's offset plus
 *            `before` plus its rank in the chunk, which lanes with equal experts find among themselves
 *
 * Counts are 32-bit: fewer than 2^31 pairs a call. */
#include "kernels/cuda/backend.h"

#include <cuda_runtime.h>

namespace lr::LR_CUDA_ACT
{

constexpr int64_t CHUNK_PAIRS = 512;
constexpr unsigned ALL = 0xffffffffu;

struct sort_params {
    lr_expert_sort_args a;
    int n_experts;
    int n_chunks;
    int64_t n_pairs, chunk_pairs;
    int32_t *counts; /* [n_experts, n_chunks]; scan turns them into `before` */
    int32_t *totals; /* [n_experts] */
};

static __device__ __forceinline__ int sum_before(int value, int lane) /* inclusive */
{
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(ALL, value, step);
        value += lane >= step ? other : 0;
    }
    return value;
}

static __global__ void __launch_bounds__(32) count_kernel(const sort_params p)
{
    extern __shared__ int32_t tally[];
    const int lane = threadIdx.x;
    for (int e = lane; e < p.n_experts; e += 32)
        tally[e] = 0;
    __syncwarp();
    const int64_t first = blockIdx.x * p.chunk_pairs, end = min(first + p.chunk_pairs, p.n_pairs);
    for (int64_t i = first + lane; i < end; i += 32)
        atomicAdd(&tally[p.a.ids[i]], 1);
    __syncwarp();
    for (int e = lane; e < p.n_experts; e += 32)
        p.counts[static_cast<int64_t>(e) * p.n_chunks + blockIdx.x] = tally[e];
}

static __global__ void __launch_bounds__(32) scan_kernel(const sort_params p)
{
    const int lane = threadIdx.x;
    int32_t *counts = p.counts + static_cast<int64_t>(blockIdx.x) * p.n_chunks;
    int total = 0;
    for (int base = 0; base < p.n_chunks; base += 32) {
        const int chunk = base + lane;
        const int own = chunk < p.n_chunks ? counts[chunk] : 0;
        const int sum = sum_before(own, lane);
        if (chunk < p.n_chunks)
            counts[chunk] = total + sum - own;
        total += __shfl_sync(ALL, sum, 31);
    }
    if (lane == 0)
        p.totals[blockIdx.x] = total;
}

static __global__ void __launch_bounds__(32) place_kernel(const sort_params p)
{
    extern __shared__ int32_t next[]; /* [n_experts]: the place of the expert's next pair */
    const int lane = threadIdx.x;
    int total = 0;
    for (int base = 0; base < p.n_experts; base += 32) {
        const int e = base + lane;
        const int own = e < p.n_experts ? p.totals[e] : 0;
        const int sum = sum_before(own, lane);
        if (e < p.n_experts) {
            const int offset = total + sum - own;
            next[e] = offset + p.counts[static_cast<int64_t>(e) * p.n_chunks + blockIdx.x];
            if (blockIdx.x == 0)
                p.a.offsets[e] = offset;
        }
        total += __shfl_sync(ALL, sum, 31);
    }
    if (blockIdx.x == 0 && lane == 0)
        p.a.offsets[p.n_experts] = total;
    __syncwarp();
    const int64_t first = blockIdx.x * p.chunk_pairs, end = min(first + p.chunk_pairs, p.n_pairs);
    for (int64_t base = first; base < end; base += 32) {
        const int64_t i = base + lane;
        const int expert = i < end ? p.a.ids[i] : -1;
        const unsigned same = __match_any_sync(ALL, expert);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int place = expert >= 0 ? next[expert] + rank : 0;
        __syncwarp();
        if (expert >= 0) {
            if (rank == 0)
                next[expert] += __popc(same);
            p.a.order[place] = i / p.a.top_k;
            p.a.row_of[i] = place;
        }
        __syncwarp();
    }
}

static cudaError_t sort(const struct lr_exec *exec, const struct lr_expert_sort_args &args)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    sort_params p = {};
    p.a = args;
    p.n_experts = static_cast<int>(args.n_experts);
    p.n_pairs = args.n_rows * args.top_k;
    p.totals = static_cast<int32_t *>(lr_cuda_scratch(exec));
    p.counts = p.totals + LR_MAX_EXPERTS;
    /* as many chunks as the scratch memory has room for, if the pairs are that many */
    const int64_t room = (LR_CUDA_SCRATCH_BYTES / 4 - LR_MAX_EXPERTS) / args.n_experts;
    const int64_t most = room < 65536 ? room : 65536;
    p.chunk_pairs = (p.n_pairs + most - 1) / most;
    p.chunk_pairs = p.chunk_pairs > CHUNK_PAIRS ? p.chunk_pairs : CHUNK_PAIRS;
    p.n_chunks = static_cast<int>((p.n_pairs + p.chunk_pairs - 1) / p.chunk_pairs);
    const size_t n_bytes = static_cast<size_t>(p.n_experts) * sizeof(int32_t);
    if (p.n_chunks > 0)
        count_kernel<<<static_cast<unsigned>(p.n_chunks), 32, n_bytes, stream>>>(p);
    scan_kernel<<<static_cast<unsigned>(p.n_experts), 32, 0, stream>>>(p);
    place_kernel<<<static_cast<unsigned>(p.n_chunks > 0 ? p.n_chunks : 1), 32, n_bytes, stream>>>(p);
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(expert_sort)(const struct lr_exec *exec, const struct lr_expert_sort_args *args)
{
    lr_cuda_note(exec, lr::sort(exec, *args), "expert_sort");
}
