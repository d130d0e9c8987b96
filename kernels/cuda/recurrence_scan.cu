/* The affine maps of a sequence's slots, one after the other, all in float32: S' = M S + B.
 *
 *   scan   from s_in: the state that enters each slot, and the one that leaves the last
 *   fold   from nothing and from the identity at once: the (M, B) of the whole sequence
 *
 * The columns of S do not meet, so a block takes 8 of them through all slots:
 *
 *   St [8, dk] in shared memory     M, 32 of its columns at a time, through a ring of 4 tiles that runs ahead
 *   thread: 2 rows of S, some of the 8 columns;  St'[c, i] = Bt[c, i] + sum over k of St[c, k] Mt[k, i], k ascending
 *
 * A fold is the same scan over more columns: those behind dv start as the identity's and have no B. */
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr
{

constexpr int SCAN_COLUMNS = 8;
constexpr int TILE_K = 32;
constexpr int SCAN_STAGES = 4;

/* Where a column starts and ends: rows of S_in, S_out [dk, dv] or of the folded pair. */
struct scan_ends {
    const float *s_in; /* [n_sequences, n_v_heads, dk, dv] or NULL: zero */
    float *s_out;      /* or NULL */
    float *m, *b;      /* a fold's */
    bool fold;
};

static __device__ __forceinline__ float first_value(const scan_ends &e, const recurrence_params &p,
                                                    int64_t sequence_head, int row, int column)
{
    if (e.fold) {
        return column - p.dv == row ? 1.0f : 0.0f;
    }
    return e.s_in != nullptr ? e.s_in[(sequence_head * p.dk + row) * p.dv + column] : 0.0f;
}

static __device__ __forceinline__ void store_last(const scan_ends &e, const recurrence_params &p, int64_t sequence_head,
                                                  int row, int column, float x)
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

/* Grid (blocks of 8 columns, heads, sequences). */
template <int DK, int GROUPS>
static __global__ void __launch_bounds__(DK / 2 * GROUPS) scan_kernel(const recurrence_params p, const scan_ends ends)
{
    constexpr int N_THREADS = DK / 2 * GROUPS;
    constexpr int COLUMNS = SCAN_COLUMNS / GROUPS;
    constexpr int TILES = DK / TILE_K;
    constexpr int TILE = TILE_K * DK;
    extern __shared__ __align__(16) float ring[];
    __shared__ __align__(16) float states[2][SCAN_COLUMNS][DK];

    const int thread = threadIdx.x;
    const int group = thread / (DK / 2);
    const int row = thread % (DK / 2) * 2;
    const int head = blockIdx.y;
    const int first_column = blockIdx.x * SCAN_COLUMNS + group * COLUMNS;
    const bool has_b = first_column < p.dv;
    const int64_t sequence_head = static_cast<int64_t>(blockIdx.z) * p.n_v_heads + head;
    const struct slot_range slots = slots_of(p, blockIdx.z);
    const int64_t n_tiles = slots.n * TILES;

    auto issue = [&](int64_t tile) {
        if (tile < n_tiles) {
            const int64_t slot_head = (slots.first + tile / TILES) * p.n_v_heads + head;
            const float *from = p.m + slot_head * DK * DK + tile % TILES * TILE;
            const uint32_t to = shared_address(ring + tile % SCAN_STAGES * TILE);
#pragma unroll
            for (int i = 0; i < TILE / 4 / N_THREADS; i++) {
                const int at = (thread + i * N_THREADS) * 4;
                copy_async(to + at * 4, from + at, true);
            }
        }
        copy_commit();
    };
    float2 next[COLUMNS];
    auto fetch_b = [&](int64_t j) {
        const int64_t slot_head = (slots.first + j) * p.n_v_heads + head;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            next[c] = has_b && j < slots.n ? *reinterpret_cast<const float2 *>(
                                                 p.b + (slot_head * p.dv + first_column + c) * DK + row)
                                           : make_float2(0.0f, 0.0f);
        }
    };

    for (int i = 0; i < SCAN_STAGES - 1; i++) {
        issue(i);
    }
    float2 x[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        x[c].x = first_value(ends, p, sequence_head, row, first_column + c);
        x[c].y = first_value(ends, p, sequence_head, row + 1, first_column + c);
    }
    fetch_b(0);
    int64_t tile = 0;
    for (int64_t j = 0; j < slots.n; j++) {
        float (*state)[DK] = states[j % 2];
        const int64_t slot_head = (slots.first + j) * p.n_v_heads + head;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            *reinterpret_cast<float2 *>(&state[group * COLUMNS + c][row]) = x[c];
            if (!ends.fold) {
                *reinterpret_cast<float2 *>(p.entering + (slot_head * p.dv + first_column + c) * DK + row) = x[c];
            }
            x[c] = next[c];
        }
        fetch_b(j + 1);
        for (int part = 0; part < TILES; part++, tile++) {
            copy_wait<SCAN_STAGES - 2>();
            __syncthreads();
            issue(tile + SCAN_STAGES - 1);
            const float *m = ring + tile % SCAN_STAGES * TILE + row;
#pragma unroll
            for (int k = 0; k < TILE_K; k += 4) {
                float2 m4[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    m4[i] = *reinterpret_cast<const float2 *>(m + (k + i) * DK);
                }
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    const float4 s =
                        *reinterpret_cast<const float4 *>(&state[group * COLUMNS + c][part * TILE_K + k]);
                    x[c].x = fmaf(s.w, m4[3].x, fmaf(s.z, m4[2].x, fmaf(s.y, m4[1].x, fmaf(s.x, m4[0].x, x[c].x))));
                    x[c].y = fmaf(s.w, m4[3].y, fmaf(s.z, m4[2].y, fmaf(s.y, m4[1].y, fmaf(s.x, m4[0].y, x[c].y))));
                }
            }
        }
    }
    copy_wait<0>();
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        store_last(ends, p, sequence_head, row, first_column + c, x[c].x);
        store_last(ends, p, sequence_head, row + 1, first_column + c, x[c].y);
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

template <int DK, int GROUPS>
static cudaError_t launch_scan(cudaStream_t stream, const recurrence_params &p, const scan_ends &ends)
{
    constexpr int n_bytes = SCAN_STAGES * TILE_K * DK * static_cast<int>(sizeof(float));
    const auto kernel = scan_kernel<DK, GROUPS>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    const int n_columns = p.dv + (ends.fold ? p.dk : 0);
    const dim3 grid(n_columns / SCAN_COLUMNS, p.n_v_heads, static_cast<unsigned>(p.n_sequences));
    kernel<<<grid, DK / 2 * GROUPS, n_bytes, stream>>>(p, ends);
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
        return launch_scan<128, 2>(stream, p, ends);
    }
    if (p.dk == 64 && p.dv % SCAN_COLUMNS == 0) {
        return launch_scan<64, 4>(stream, p, ends);
    }
    const int n_columns = p.dv + (ends.fold ? p.dk : 0);
    scan_any_kernel<<<dim3(n_columns, p.n_v_heads, n_sequences), (p.dk + 31) / 32 * 32, p.dk * sizeof(float), stream>>>(
        p, ends);
    return cudaGetLastError();
}

cudaError_t launch_recurrence_scan(cudaStream_t stream, const recurrence_params &p, bool delta, const float *s_in,
                                   float *s_out)
{
    return launch(stream, p, delta, {s_in, s_out, nullptr, nullptr, false});
}

cudaError_t launch_recurrence_fold_slots(cudaStream_t stream, const recurrence_params &p, bool delta, float *m,
                                         float *b)
{
    return launch(stream, p, delta, {nullptr, nullptr, m, b, true});
}

} // namespace lr
