/* The table's slots around attention: storing keys and values in blocks, and folding listed blocks into rows. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_packet.h"
#include "kernels/cuda/mma.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int TOKENS = LR_KV_BLOCK_TOKENS;

/* Where the rows go: row r is token `(position + r) mod 128` of blocks[(position + r) / 128 - position / 128], or, with
 * positions, token `positions[r] mod 128` of blocks[r]. */
struct store_params {
    const act *k, *v;
    int64_t k_stride, v_stride, n_rows;
    int n_kv_heads, head_dim, padded;
    int64_t position;
    const int64_t *positions;
    uint8_t *const *blocks;
};

/* Eight channels from where they need not be aligned. */
static __device__ __forceinline__ uint4 load_piece(const act *from)
{
    if ((reinterpret_cast<uintptr_t>(from) & 15) == 0)
        return *reinterpret_cast<const uint4 *>(from);
    const uint16_t *x = reinterpret_cast<const uint16_t *>(from);
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        r[i] = x[2 * i] | static_cast<uint32_t>(x[2 * i + 1]) << 16;
    return make_uint4(r[0], r[1], r[2], r[3]);
}

/* One thread a piece of 8 channels of K and of V; the padding's channels become zero. */
__global__ void kv_store_kernel(const store_params a, int64_t n_pieces)
{
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n_pieces)
        return;
    const int pieces = a.padded / 8, piece = static_cast<int>(i % pieces);
    const int head = static_cast<int>(i / pieces % a.n_kv_heads);
    const int64_t row = i / pieces / a.n_kv_heads;
    const int64_t position = a.positions != nullptr ? a.positions[row] : a.position + row;
    uint8_t *block = a.blocks[a.positions != nullptr ? row : position / TOKENS - a.position / TOKENS];
    if (block == nullptr)
        return;
    const int64_t half = static_cast<int64_t>(TOKENS) * a.padded * 2;
    const int64_t at = head * 2 * half + piece / 8 * (TOKENS * 128) +
                       swizzled(static_cast<uint32_t>(position % TOKENS), static_cast<uint32_t>(piece % 8));
    uint4 k = make_uint4(0, 0, 0, 0), v = k;
    if (piece * 8 < a.head_dim) {
        const int64_t column = static_cast<int64_t>(head) * a.head_dim + piece * 8;
        k = load_piece(a.k + row * a.k_stride + column);
        v = load_piece(a.v + row * a.v_stride + column);
    }
    *reinterpret_cast<uint4 *>(block + at) = k;
    *reinterpret_cast<uint4 *>(block + half + at) = v;
}

static cudaError_t launch_store(const lr_exec *exec, const store_params &p)
{
    const int64_t n = p.n_rows * p.n_kv_heads * (p.padded / 8);
    kv_store_kernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0, static_cast<cudaStream_t>(exec->stream)>>>(p, n);
    return cudaGetLastError();
}

template <typename Args> static store_params store_of(const Args *args)
{
    store_params p = {};
    p.k = static_cast<const act *>(args->k);
    p.v = static_cast<const act *>(args->v);
    p.k_stride = args->k_stride;
    p.v_stride = args->v_stride;
    p.n_rows = args->n_rows;
    p.n_kv_heads = static_cast<int>(args->shape.n_kv_heads);
    p.head_dim = static_cast<int>(args->shape.head_dim);
    p.padded = static_cast<int>(LR_CUDA(padded_head_dim)(args->shape.head_dim));
    return p;
}

} // namespace lr::LR_CUDA_ACT

size_t LR_CUDA(kv_block_bytes)(struct lr_kv_shape shape)
{
    return static_cast<size_t>(shape.n_kv_heads * lr::TOKENS * LR_CUDA(padded_head_dim)(shape.head_dim)) * 4;
}

void LR_CUDA(kv_store)(const struct lr_exec *exec, const struct lr_kv_store_args *args)
{
    if (args->n_rows == 0)
        return;
    lr::store_params p = lr::store_of(args);
    p.position = args->position;
    const int64_t n_blocks = (args->position + args->n_rows - 1) / lr::TOKENS - args->position / lr::TOKENS + 1;
    p.blocks = static_cast<uint8_t *const *>(
        lr_cuda_upload(exec, args->blocks, static_cast<size_t>(n_blocks) * sizeof *args->blocks));
    lr_cuda_note(exec, lr::launch_store(exec, p), "kv_store");
}

void LR_CUDA(kv_store_rows)(const struct lr_exec *exec, const struct lr_kv_store_rows_args *args)
{
    if (args->n_rows == 0)
        return;
    lr::store_params p = lr::store_of(args);
    const size_t n = static_cast<size_t>(args->n_rows);
    p.positions = static_cast<const int64_t *>(lr_cuda_upload(exec, args->positions, n * sizeof *args->positions));
    p.blocks = static_cast<uint8_t *const *>(lr_cuda_upload(exec, args->blocks, n * sizeof *args->blocks));
    lr_cuda_note(exec, lr::launch_store(exec, p), "kv_store_rows");
}

/* The query blocks from `first` on, of a call with a list for each, as many as one launch takes; returns the first one
 * left over. */
static int64_t fold_query_blocks(const struct lr_exec *exec,
                                 const struct lr_attention_args *args,
                                 struct lr_cuda_fold *fold,
                                 int64_t first,
                                 int64_t n_blocks)
{
    const int64_t n_kv_heads = args->shape.n_kv_heads, lead = args->positions[0] % lr::TOKENS;
    struct lr_cuda_packet packet;
    int64_t block = first;
    lr_cuda_packet_begin(&packet);
    for (; block < n_blocks; block++) {
        const struct lr_kv_list *lists = args->lists + block * n_kv_heads;
        if (!lr_cuda_packet_fits(&packet, lists, n_kv_heads))
            break;
        struct lr_cuda_rows r = {};
        r.origin = block * lr::TOKENS - lead;
        r.first = r.origin > 0 ? r.origin : 0;
        r.end = r.origin + lr::TOKENS < args->n_rows ? r.origin + lr::TOKENS : args->n_rows;
        lr_cuda_packet_add(exec, &packet, r, lists, n_kv_heads);
    }
    lr_cuda_packet_upload(exec, &packet, NULL, 0, fold);
    fold->max_tokens = lr::TOKENS;
    LR_CUDA(fold_rows)(exec, fold, "attention");
    return block;
}

static void fold_all(const struct lr_exec *exec, const struct lr_attention_args *args, struct lr_cuda_fold *fold)
{
    struct lr_cuda_packet packet;
    struct lr_cuda_rows rows = {};
    rows.origin = -(args->positions[0] % lr::TOKENS);
    rows.end = args->n_rows;
    lr_cuda_packet_begin(&packet);
    lr_cuda_packet_add(exec, &packet, rows, args->lists, 1);
    lr_cuda_packet_upload(exec, &packet, NULL, 0, fold);
    fold->max_tokens = rows.end - rows.origin;
    LR_CUDA(fold_rows)(exec, fold, "attention");
}

void LR_CUDA(attention)(const struct lr_exec *exec, const struct lr_attention_args *args)
{
    if (args->n_rows == 0)
        return;
    struct lr_cuda_fold fold = {};
    fold.shape = args->shape;
    fold.q = args->q;
    fold.q_stride = args->q_stride;
    fold.q_head_stride = args->q_head_stride;
    fold.n_rows = args->n_rows;
    fold.position = args->positions[0];
    fold.scale = args->scale;
    fold.window = args->window;
    fold.sinks = args->sinks;
    fold.half_blocks = args->half_blocks;
    fold.resume = !args->first;
    fold.m = args->m;
    fold.l = args->l;
    fold.o = args->o;
    fold.y = args->y;
    fold.y_stride = args->y_stride;
    if (args->n_lists == 1) {
        fold_all(exec, args, &fold);
        return;
    }
    const int64_t n_blocks = (fold.position % lr::TOKENS + args->n_rows + lr::TOKENS - 1) / lr::TOKENS;
    for (int64_t block = 0; block < n_blocks;)
        block = fold_query_blocks(exec, args, &fold, block, n_blocks);
}
