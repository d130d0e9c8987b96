/* The affine maps of a sequence's slots, one after the other, all in float32: S' = M S + B.
 *
 *   scan   from s_in: the state that enters each slot, and the one that leaves the last
 *   fold   from the first pair on: the (M, B) of the whole sequence
 *
 * The columns of S do not meet, so a block takes 16 of them through all slots:
 *
 *   St [16, dk] in shared memory     M, 32 of its columns at a time, through a ring of tiles that runs ahead
 *   warp: 16 rows of S;  St'[c, i] = Bt[c, i] + sum over k of St[c, k] Mt[k, i], k ascending
 *
 * A step is mostly latency, so a sequence of many slots goes in groups (recurrence_grid.cuh): shorter chains.
 *
 *   fold of the groups   side by side, the slots of each           group_slots - 1 steps
 *   fold                 the groups' pairs                         n_groups - 1
 *   scan                 side by side: the pairs of the groups
 *                        before, then the group's own slots        at most n_groups + group_slots - 1
 *
 * Groups are counted from the sequence's first slot: what enters a slot is a function of its position, not of how many
 * slots follow. Other dims and the decay rule have no groups.
 *
 * The products run on the tensor cores, each float as two tf32 numbers, x = high + low: high high + (high low + low
 * high) loses 2^-22 of a product, a float32's rounding is 2^-24. (One tf32 product loses 2^-11, which a chain of a
 * thousand slots turns into percents.)
 *
 * A fold is the same scan over more columns: those behind dv are M's. */
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/recurrence_grid.cuh"
#include "kernels/cuda/recurrence_launch.h"

namespace lr::LR_CUDA_ACT
{

constexpr int SCAN_COLUMNS = 16;
constexpr int TILE_K = 32;
/* Tiles on their way: within 99 KiB of shared memory, sm_86's most. */
template <int DK> constexpr int SCAN_STAGES = DK == 128 ? 4 : 6;

enum scan_kind { SCAN, FOLD, FOLD_GROUPS };

/* Where a column starts and ends: rows of S_in, S_out [dk, dv] or of the folded pair. Groups' pairs go to p.m, p.b. */
struct scan_ends {
    enum scan_kind kind;
    const float *s_in; /* [n_sequences, n_v_heads, dk, dv] or NULL: zero */
    float *s_out;      /* or NULL */
    float *m, *b;      /* FOLD's */
};

static __device__ __forceinline__ float
first_value(const scan_ends &e, const recurrence_params &p, int64_t sequence_head, int row, int column)
{
    if (e.kind == FOLD) {
        return column - p.dv == row ? 1.0f : 0.0f;
    }
    return e.s_in != nullptr ? e.s_in[(sequence_head * p.dk + row) * p.dv + column] : 0.0f;
}

static __device__ __forceinline__ void
store_last(const scan_ends &e, const recurrence_params &p, int64_t sequence_head, int row, int column, float x)
{
    const int64_t at = sequence_head * p.dk + row;
    if (e.kind == FOLD && column >= p.dv) {
        e.m[at * p.dk + column - p.dv] = x;
    } else if (e.kind == FOLD) {
        e.b[at * p.dv + column] = x;
    } else if (e.s_out != nullptr) {
        e.s_out[at * p.dv + column] = x;
    }
}

/* The pairs that a block goes through, as places in p.m and p.b: `lead` of groups, then n of its own. */
struct scan_steps {
    int64_t sequence;
    int64_t lead_slot, slot;
    int lead, n;
    int64_t to; /* FOLD_GROUPS: the place of the result */
    bool last;  /* of its sequence */
    bool idle;
};

/* `z`: a sequence, or a group where the kind goes by groups. */
static __device__ __forceinline__ struct scan_steps steps_of(const recurrence_params &p, enum scan_kind kind, int64_t z)
{
    struct scan_steps s = {};
    const bool by_groups = p.n_groups > 0 && kind != FOLD;
    s.sequence = by_groups ? sequence_of_group(p, z) : z;
    const struct slot_range slots = slots_of(p, s.sequence);
    const int64_t first_group = first_group_of(p, slots.first, s.sequence);
    const int64_t group = by_groups ? z - first_group : 0;
    s.slot = slots.first;
    int64_t n = slots.n;
    if (by_groups) {
        s.slot += group * p.group_slots;
        n = slots.n - group * p.group_slots;
        s.idle = n <= 0 && (group > 0 || kind == FOLD_GROUPS); /* a scan of no slots hands s_in on */
        s.last = n <= p.group_slots;
        n = n < 0 ? 0 : n < p.group_slots ? n : p.group_slots;
        s.lead = kind == SCAN ? static_cast<int>(group) : 0;
        s.lead_slot = p.n_slots + first_group;
        s.to = p.n_slots + z;
    } else {
        s.last = true;
        if (p.n_groups > 0) {
            s.slot = p.n_slots + first_group;
            n = (slots.n + p.group_slots - 1) / p.group_slots;
        }
    }
    s.n = static_cast<int>(n);
    return s;
}

/* What a lane holds of 16 rows and 16 columns of a transposed state, [columns, PITCH]; `from` and `to` are its first
 * element. */
template <int PITCH> static __device__ __forceinline__ void load_rows(float (&x)[2][4], const float *from)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float2 pair = *reinterpret_cast<const float2 *>(from + 8 * h + 8 * c * PITCH);
            x[h][2 * c] = pair.x;
            x[h][2 * c + 1] = pair.y;
        }
    }
}

template <int PITCH> static __device__ __forceinline__ void store_rows(float *to, const float (&x)[2][4])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            *reinterpret_cast<float2 *>(to + 8 * h + 8 * c * PITCH) = make_float2(x[h][2 * c], x[h][2 * c + 1]);
        }
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

/* Grid (blocks of 16 columns, heads, sequences or groups), a warp for every 16 rows. Lane l holds columns l / 4 and
 * l / 4 + 8, rows 2 (l % 4) and the next one of each 8. */
template <int DK>
static __global__ void __launch_bounds__(2 * DK) scan_kernel(const recurrence_params p, const scan_ends ends)
{
    constexpr int N_THREADS = 2 * DK;
    constexpr int TILES = DK / TILE_K;
    constexpr int N_STAGES = SCAN_STAGES<DK>;
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
    const bool has_b = column < p.dv; /* the same for a block's columns */
    const bool scans = ends.kind == SCAN;
    /* the last group has the longest way: it starts first */
    const struct scan_steps steps = steps_of(p, ends.kind, gridDim.z - 1 - blockIdx.z);
    if (steps.idle) {
        return;
    }
    const int64_t sequence_head = steps.sequence * p.n_v_heads + head;
    const bool leaves = scans && steps.last && ends.s_out != nullptr;
    /* Products of the pairs [first, end). A fold starts as the first pair; what leaves the last slot may not be asked
     * for. */
    const int first = !scans && steps.n > 0;
    const int end = steps.lead + steps.n - (scans && !leaves && steps.n > 0);
    const int n_tiles = (end - first) * TILES;

    auto slot_head_of = [&](int j) {
        return (j < steps.lead ? steps.lead_slot + j : steps.slot + (j - steps.lead)) * p.n_v_heads + head;
    };
    auto issue = [&](int tile, int stage) {
        if (tile < n_tiles) {
            const float *from = p.m + slot_head_of(first + tile / TILES) * DK * DK + tile % TILES * TILE_K * DK;
            const uint32_t to = shared_address(ring + stage * TILE);
#pragma unroll
            for (int i = 0; i < TILE_K * DK / 4 / N_THREADS; i++) {
                const int at = (thread + i * N_THREADS) * 4;
                copy_async(to + (at / DK * M_PITCH + at % DK) * 4, from + at, true);
            }
        }
        copy_commit();
    };
    /* Element r of half h: row first_row + 8 h + 2 (lane % 4) + r % 2, column + 8 (r / 2). */
    const int lane_row = first_row + 2 * (lane % 4);
    const int64_t state_offset = static_cast<int64_t>(column) * DK + lane_row;
    /* Where this lane's columns of a pair lie. */
    auto pair_at = [&](int64_t slot_head) {
        return has_b ? p.b + slot_head * p.dv * DK + state_offset : p.m + (slot_head * DK - p.dv) * DK + state_offset;
    };
    float next[2][4] = {};
    auto fetch_b = [&](int j) {
        if (has_b && j < end) {
            load_rows<DK>(next, pair_at(slot_head_of(j)));
        }
    };
    auto store_entering = [&](int j, const float(&x)[2][4]) {
        store_rows<DK>(p.entering + slot_head_of(j) * p.dv * DK + state_offset, x);
    };

    for (int i = 0; i < N_STAGES - 1; i++) {
        issue(i, i);
    }
    float x[2][4];
    if (first > 0) {
        load_rows<DK>(x, pair_at(slot_head_of(0)));
    } else {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                x[h][r] = first_value(ends, p, sequence_head, lane_row + 8 * h + r % 2, column + 8 * (r / 2));
            }
        }
    }
    fetch_b(first);
    int tile = 0;
    int stage = 0;
    int free_stage = N_STAGES - 1;
    for (int j = first; j < end; j++) {
        float *state = states[j % 2];
        float high_low[2][4] = {}; /* apart from each other and from x: three short chains of products */
        float low_high[2][4] = {};
        store_rows<S_PITCH>(state + lane / 4 * S_PITCH + lane_row, x);
        if (scans && j >= steps.lead) {
            store_entering(j, x);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                x[h][r] = next[h][r];
            }
        }
        fetch_b(j + 1);
        for (int part = 0; part < TILES; part++, tile++) {
            copy_wait<N_STAGES - 2>();
            __syncthreads();
            issue(tile + N_STAGES - 1, free_stage);
            const float *m = ring + stage * TILE + lane % 4 * M_PITCH + first_row + lane / 4;
            const float *s = state + lane / 4 * S_PITCH + part * TILE_K + lane % 4;
            free_stage = stage;
            stage = stage + 1 < N_STAGES ? stage + 1 : 0;
#pragma unroll
            for (int k = 0; k < TILE_K; k += 8) {
                uint32_t a_high[4];
                uint32_t a_low[4];
                uint32_t b_high[2][2];
                uint32_t b_low[2][2];
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    split(a_high[r], a_low[r], s[r % 2 * 8 * S_PITCH + k + r / 2 * 4]);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    split(b_high[h][0], b_low[h][0], m[k * M_PITCH + 8 * h]);
                    split(b_high[h][1], b_low[h][1], m[(k + 4) * M_PITCH + 8 * h]);
                }
                multiply(x[0], a_high, b_high[0]);
                multiply(x[1], a_high, b_high[1]);
                multiply(low_high[0], a_low, b_high[0]);
                multiply(low_high[1], a_low, b_high[1]);
                multiply(high_low[0], a_high, b_low[0]);
                multiply(high_low[1], a_high, b_low[1]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                x[h][r] += high_low[h][r] + low_high[h][r];
            }
        }
    }
    copy_wait<0>();
    if (ends.kind == FOLD_GROUPS) {
        store_rows<DK>(pair_at(steps.to * p.n_v_heads + head), x);
        return;
    }
    if (scans && !leaves) {
        if (steps.n > 0) {
            store_entering(end, x);
        }
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            store_last(ends, p, sequence_head, lane_row + 8 * h + r % 2, column + 8 * (r / 2), x[h][r]);
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
            if (ends.kind == SCAN) {
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
                if (ends.kind == SCAN) {
                    p.entering[slot_head * n_elements + element] = x;
                }
                x = fmaf(exp2_fast(log_factor[i]), x, b[i]);
                total += log_factor[i];
            }
        }
    }
    store_last(ends, p, sequence_head, row, column, x);
    if (ends.kind == FOLD && element == 0) {
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
    const int n_columns = p.dv + (ends.kind == SCAN ? 0 : p.dk);
    const int64_t n_chains = p.n_groups > 0 && ends.kind != FOLD ? p.n_groups : p.n_sequences;
    const dim3 grid(n_columns / SCAN_COLUMNS, p.n_v_heads, static_cast<unsigned>(n_chains));
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
    const int n_columns = p.dv + (ends.kind == SCAN ? 0 : p.dk);
    const size_t n_bytes = (p.dk + 3) / 4 * sizeof(float4); /* the compiler reads whole quads */
    scan_any_kernel<<<dim3(n_columns, p.n_v_heads, n_sequences), (p.dk + 31) / 32 * 32, n_bytes, stream>>>(p, ends);
    return cudaGetLastError();
}

cudaError_t
launch_recurrence_scan(cudaStream_t stream, const recurrence_params &p, bool delta, const float *s_in, float *s_out)
{
    return launch(stream, p, delta, {SCAN, s_in, s_out, nullptr, nullptr});
}

cudaError_t
launch_recurrence_fold_slots(cudaStream_t stream, const recurrence_params &p, bool delta, float *m, float *b)
{
    return launch(stream, p, delta, {FOLD, nullptr, nullptr, m, b});
}

cudaError_t launch_recurrence_fold_groups(cudaStream_t stream, const recurrence_params &p)
{
    return launch(stream, p, true, {FOLD_GROUPS, nullptr, nullptr, nullptr, nullptr});
}

} // namespace lr::LR_CUDA_ACT
