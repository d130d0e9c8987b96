/* The affine maps of a sequence's slots, one after the other, all in float32: S' = M S + B.
 *
 *   scan   from s_in: the state that enters each slot, and the one that leaves the last
 *   fold   from nothing and from the identity at once: the (M, B) of the whole sequence
 *
 * The columns of S do not meet, so a block takes 16 of them through all slots:
 *
 *   St [16, dk] in shared memory     M, 32 of its columns at a time, through a ring of tiles that runs ahead
 *   warp: 16 rows of S;  St'[c, i] = Bt[c, i] + sum over k of St[c, k] Mt[k, i], k ascending
 *
 * The products run on the tensor cores, each float as two tf32 numbers, x = high + low: high high + (high low + low
 * high) loses 2^-22 of a product, a float32's rounding is 2^-24. (One tf32 product loses 2^-11, which a chain of a
 * thousand slots turns into percents.)
 *
 * A fold is the same scan over more columns: those behind dv start as the identity's and have no B. */
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr::LR_CUDA_ACT
{

constexpr int SCAN_COLUMNS = 16;
constexpr int TILE_K = 32;
/* Tiles on their way: within 99 KiB of shared memory, sm_86's most. */
template <int DK> constexpr int SCAN_STAGES = DK == 128 ? 4 : 6;

/* Where a column starts and ends: rows of S_in, S_out [dk, dv] or of the folded pair. */
struct scan_ends {
    const float *s_in; /* [n_sequences, n_v_heads, dk, dv] or NULL: zero */
    float *s_out;      /* or NULL */
    float *m, *b;      /* a fold's */
    bool fold;
};

static __device__ __forceinline__ float
first_value(const scan_ends &e, const recurrence_params &p, int64_t sequence_head, int row, int column)
{
    if (e.fold) {
        return column - p.dv == row ? 1.0f : 0.0f;
    }
    return e.s_in != nullptr ? e.s_in[(sequence_head * p.dk + row) * p.dv + column] : 0.0f;
}

static __device__ __forceinline__ void
store_last(const scan_ends &e, const recurrence_params &p, int64_t sequence_head, int row, int column, float x)
{
    const int64_t at = sequence_head * p.dk + row;
    if (e.fold && column >= p.dv) {
        e.m[at * p.dk + column - p.dv] = x;
    } else if (e.fold) {
        e.b[at * p.dv + column] = x;
    } else if (e.s_out != nullptr) {
        e.s_out[at * p.dv + column] = x;
    }
}

/* Two tf32 numbers whose sum is x to 2^-22. */
static __device__ __forceinline__ void split(uint32_t &high, uint32_t &low, float x)
{
    high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
}

/* d [16 x 8] += A [16 x 8] B [8 x 8]. */
static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Grid (blocks of 16 columns, heads, sequences), a warp for every 16 rows. Lane l holds columns l / 4 and l / 4 + 8,
 * rows 2 (l % 4) and the next one of each 8. */
template <int DK>
static __global__ void __launch_bounds__(2 * DK) scan_kernel(const recurrence_params p, const scan_ends ends)
{
    constexpr int N_THREADS = 2 * DK;
    constexpr int TILES = DK / TILE_K;
    constexpr int M_PITCH = DK + 8; /* with these neither operand's loads meet in a bank */
    constexpr int S_PITCH = DK + 4;
    constexpr int TILE = TILE_K * M_PITCH;
    extern __shared__ __align__(16) float ring[];
    __shared__ __align__(16) float states[2][SCAN_COLUMNS * S_PITCH];

    const int thread = threadIdx.x;
    const int lane = thread % 32;
    const int first_row = thread / 32 * 16;
    const int head = blockIdx.y;
    const int column = blockIdx.x * SCAN_COLUMNS + lane / 4;
    const bool has_b = column < p.dv;
    const int64_t sequence_head = static_cast<int64_t>(blockIdx.z) * p.n_v_heads + head;
    const struct slot_range slots = slots_of(p, blockIdx.z);
    const int64_t n_tiles = slots.n * TILES;

    auto issue = [&](int64_t tile) {
        if (tile < n_tiles) {
            const int64_t slot_head = (slots.first + tile / TILES) * p.n_v_heads + head;
            const float *from = p.m + slot_head * DK * DK + tile % TILES * TILE_K * DK;
            const uint32_t to = shared_address(ring + tile % SCAN_STAGES<DK> * TILE);
#pragma unroll
            for (int i = 0; i < TILE_K * DK / 4 / N_THREADS; i++) {
                const int at = (thread + i * N_THREADS) * 4;
                copy_async(to + (at / DK * M_PITCH + at % DK) * 4, from + at, true);
            }
        }
        copy_commit();
    };
    /* Element r of half h: row first_row + 8 h + 2 (lane % 4) + r % 2, column + 8 (r / 2). */
    const int64_t lane_offset = static_cast<int64_t>(column) * DK + first_row + 2 * (lane % 4);
    float next[2][4];
    auto fetch_b = [&](int64_t j) {
        const float *b = p.b + ((slots.first + j) * p.n_v_heads + head) * p.dv * DK + lane_offset;
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float2 pair = has_b && j < slots.n ? *reinterpret_cast<const float2 *>(b + 8 * h + 8 * c * DK)
                                                         : make_float2(0.0f, 0.0f);
                next[h][2 * c] = pair.x;
                next[h][2 * c + 1] = pair.y;
            }
        }
    };

    for (int i = 0; i < SCAN_STAGES<DK> - 1; i++) {
        issue(i);
    }
    float x[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = first_row + 8 * h + 2 * (lane % 4) + r % 2;
            x[h][r] = first_value(ends, p, sequence_head, row, column + 8 * (r / 2));
        }
    }
    fetch_b(0);
    int64_t tile = 0;
    for (int64_t j = 0; j < slots.n; j++) {
        float *state = states[j % 2];
        float *entering = p.entering + ((slots.first + j) * p.n_v_heads + head) * p.dv * DK + lane_offset;
        float small[2][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float2 pair = make_float2(x[h][2 * c], x[h][2 * c + 1]);
                *reinterpret_cast<float2 *>(state + (lane / 4 + 8 * c) * S_PITCH + first_row + 8 * h + 2 * (lane % 4)) =
                    pair;
                if (!ends.fold) {
                    *reinterpret_cast<float2 *>(entering + 8 * h + 8 * c * DK) = pair;
                }
                x[h][2 * c] = next[h][2 * c];
                x[h][2 * c + 1] = next[h][2 * c + 1];
            }
        }
        fetch_b(j + 1);
        for (int part = 0; part < TILES; part++, tile++) {
            copy_wait<SCAN_STAGES<DK> - 2>();
            __syncthreads();
            issue(tile + SCAN_STAGES<DK> - 1);
            const float *m = ring + tile % SCAN_STAGES<DK> * TILE + lane % 4 * M_PITCH + first_row + lane / 4;
            const float *s = state + lane / 4 * S_PITCH + part * TILE_K + lane % 4;
#pragma unroll
            for (int k = 0; k < TILE_K; k += 8) {
                uint32_t a_high[4];
                uint32_t a_low[4];
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    split(a_high[r], a_low[r], s[r % 2 * 8 * S_PITCH + k + r / 2 * 4]);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t b_high[2];
                    uint32_t b_low[2];
                    split(b_high[0], b_low[0], m[k * M_PITCH + 8 * h]);
                    split(b_high[1], b_low[1], m[(k + 4) * M_PITCH + 8 * h]);
                    multiply(small[h], a_low, b_high);
                    multiply(x[h], a_high, b_high);
                    multiply(small[h], a_high, b_low);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                x[h][r] += small[h][r];
            }
        }
    }
    copy_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = first_row + 8 * h + 2 * (lane % 4) + r % 2;
            store_last(ends, p, sequence_head, row, column + 8 * (r / 2), x[h][r]);
        }
    }
}

/* The same for any dk and dv. Grid (columns, heads, sequences), a thread a row. */
static __global__ void scan_any_kernel(const recurrence_params p, const scan_ends ends)
{
    extern __shared__ float state[];
    const int row = threadIdx.x;
    const int column = blockIdx.x;
    const int head = blockIdx.y;
    const bool inside = row < p.dk;
    const int64_t sequence_head = static_cast<int64_t>(blockIdx.z) * p.n_v_heads + head;
    const struct slot_range slots = slots_of(p, blockIdx.z);
    float x = inside ? first_value(ends, p, sequence_head, row, column) : 0.0f;
    for (int64_t j = 0; j < slots.n; j++) {
        const int64_t slot_head = (slots.first + j) * p.n_v_heads + head;
        __syncthreads();
        if (inside) {
            state[row] = x;
        }
        __syncthreads();
        if (inside) {
            const int64_t at = (slot_head * p.dv + column) * p.dk + row;
            if (!ends.fold) {
                p.entering[at] = x;
            }
            x = column < p.dv ? p.b[at] : 0.0f;
            const float *m = p.m + slot_head * p.dk * p.dk + row;
            for (int k = 0; k < p.dk; k++) {
                x = fmaf(state[k], m[static_cast<int64_t>(k) * p.dk], x);
            }
        }
    }
    if (inside) {
        store_last(ends, p, sequence_head, row, column, x);
    }
}

/* Where M is a factor: every element of S alone. Grid (pieces of the state, heads, sequences). */
static __global__ void __launch_bounds__(256) scan_decay_kernel(const recurrence_params p, const scan_ends ends)
{
    constexpr int AHEAD = 4;
    const int element = blockIdx.x * 256 + threadIdx.x; /* of St [dv, dk] */
    const int head = blockIdx.y;
    const int n_elements = p.dk * p.dv;
    const int64_t sequence_head = static_cast<int64_t>(blockIdx.z) * p.n_v_heads + head;
    const struct slot_range slots = slots_of(p, blockIdx.z);
    if (element >= n_elements) {
        return;
    }
    const int row = element % p.dk;
    const int column = element / p.dk;
    float x = first_value(ends, p, sequence_head, row, column);
    float total = 0.0f;
    for (int64_t j = 0; j < slots.n; j += AHEAD) {
        float b[AHEAD];
        float log_factor[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t slot_head = (slots.first + j + i) * p.n_v_heads + head;
            b[i] = j + i < slots.n ? p.b[slot_head * n_elements + element] : 0.0f;
            log_factor[i] = j + i < slots.n ? p.m[slot_head] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (j + i < slots.n) {
                const int64_t slot_head = (slots.first + j + i) * p.n_v_heads + head;
                if (!ends.fold) {
                    p.entering[slot_head * n_elements + element] = x;
                }
                x = fmaf(exp2_fast(log_factor[i]), x, b[i]);
                total += log_factor[i];
            }
        }
    }
    store_last(ends, p, sequence_head, row, column, x);
    if (ends.fold && element == 0) {
        ends.m[sequence_head] = exp2_fast(total);
    }
}

template <int DK> static cudaError_t launch_scan(cudaStream_t stream, const recurrence_params &p, const scan_ends &ends)
{
    constexpr int n_bytes = SCAN_STAGES<DK> * TILE_K * (DK + 8) * static_cast<int>(sizeof(float));
    const auto kernel = scan_kernel<DK>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    const int n_columns = p.dv + (ends.fold ? p.dk : 0);
    const dim3 grid(n_columns / SCAN_COLUMNS, p.n_v_heads, static_cast<unsigned>(p.n_sequences));
    kernel<<<grid, 2 * DK, n_bytes, stream>>>(p, ends);
    return cudaGetLastError();
}

static cudaError_t launch(cudaStream_t stream, const recurrence_params &p, bool delta, const scan_ends &ends)
{
    const unsigned n_sequences = static_cast<unsigned>(p.n_sequences);
    if (!delta) {
        scan_decay_kernel<<<dim3((p.dk * p.dv + 255) / 256, p.n_v_heads, n_sequences), 256, 0, stream>>>(p, ends);
        return cudaGetLastError();
    }
    if (p.dk == 128 && p.dv % SCAN_COLUMNS == 0) {
        return launch_scan<128>(stream, p, ends);
    }
    if (p.dk == 64 && p.dv % SCAN_COLUMNS == 0) {
        return launch_scan<64>(stream, p, ends);
    }
    const int n_columns = p.dv + (ends.fold ? p.dk : 0);
    const size_t n_bytes = (p.dk + 3) / 4 * sizeof(float4); /* the compiler reads whole quads */
    scan_any_kernel<<<dim3(n_columns, p.n_v_heads, n_sequences), (p.dk + 31) / 32 * 32, n_bytes, stream>>>(p, ends);
    return cudaGetLastError();
}

cudaError_t
launch_recurrence_scan(cudaStream_t stream, const recurrence_params &p, bool delta, const float *s_in, float *s_out)
{
    return launch(stream, p, delta, {s_in, s_out, nullptr, nullptr, false});
}

cudaError_t
launch_recurrence_fold_slots(cudaStream_t stream, const recurrence_params &p, bool delta, float *m, float *b)
{
    return launch(stream, p, delta, {nullptr, nullptr, m, b, true});
}

} // namespace lr::LR_CUDA_ACT
