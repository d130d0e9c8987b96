/* How the tokens of a launch are cut, and where partial results lie in work. Shared by the recurrence's kernels.
 *
 * Slots: sub-segment j of sequence i has slot offsets[i] / sub + i + j, where sub = sub_tokens. Slots of two sequences
 * never collide and need no prefix sum over the sequences; some stay empty. n_slots = n_rows / sub + n_sequences; a
 * lone sequence has as many as it needs.
 *
 * Groups: where the delta rule's sequences may have more slots than group_slots, group j of sequence i is slots
 * first_slot(i) + j group_slots and those behind, and its pair lies in m and b like a slot's, at place n_slots +
 * first_slot(i) / group_slots + i + j: the same cut once more.
 *
 *   m, b   | slots | groups |
 *
 * States of slots lie transposed: a row for each column of S, dk long. So does M: a row for each of its columns. */
#ifndef LR_KERNELS_CUDA_RECURRENCE_GRID_CUH
#define LR_KERNELS_CUDA_RECURRENCE_GRID_CUH

#include "kernels/cuda/recurrence.h"
#include "kernels/cuda/act.h"

namespace lr::LR_CUDA_ACT
{

constexpr int CHUNK = LR_RECURRENCE_CHUNK_TOKENS;
constexpr float LOG2_E = 1.4426950408889634f;
/* A factor exp(g) below 2^-160 is zero in float32; sums of more negative ones would only lose the digits of others. */
constexpr float LOWEST_LOG2_DECAY = -160.0f;

struct recurrence_params {
    const act *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    const float *g, *beta;
    float scale;
    const int64_t *offsets;
    int64_t n_rows, n_sequences, n_slots;
    int64_t n_groups; /* 0: no sequence has more than one, and none is folded beforehand */
    int group_slots;
    int sub_tokens; /* a multiple of CHUNK */
    int n_v_heads, heads_per_k_head;
    int dk, dv;
    act *inverses; /* [slot, chunk, head, 64, 64]: (I + L)^-1 diag(beta) */
    float *m;                /* delta: [slot, head, dk (column), dk (row)];  decay: [slot, head] log2 of the factor */
    float *b;                /* [slot, head, dv, dk]; groups' places follow the slots' in m and b */
    float *entering;         /* [slot, head, dv, dk]: the state that enters the sub-segment */
    act *o;
    int64_t o_stride;
};

/* The tokens of one slot. */
struct span {
    int64_t sequence;
    int64_t first; /* row */
    int64_t end;   /* row behind the last; first where the slot is empty */
};

static __device__ __forceinline__ struct span span_of(const recurrence_params &p, int64_t slot)
{
    const int64_t sub = p.sub_tokens;
    struct span s;
    int64_t begin = 0;
    int64_t sequence_end = p.n_rows;
    s.sequence = 0;
    if (p.offsets != nullptr) {
        int64_t low = 0;
        int64_t high = p.n_sequences;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (p.offsets[middle] / sub + middle <= slot) {
                low = middle;
            } else {
                high = middle;
            }
        }
        s.sequence = low;
        begin = p.offsets[low];
        sequence_end = p.offsets[low + 1];
    }
    s.first = begin + (slot - begin / sub - s.sequence) * sub;
    s.end = s.first + sub < sequence_end ? s.first + sub : sequence_end;
    if (s.end < s.first) {
        s.end = s.first;
    }
    return s;
}

/* The slots of one sequence. */
struct slot_range {
    int64_t first;
    int64_t n;
};

static __device__ __forceinline__ struct slot_range slots_of(const recurrence_params &p, int64_t sequence)
{
    const int64_t sub = p.sub_tokens;
    const int64_t begin = p.offsets != nullptr ? p.offsets[sequence] : 0;
    const int64_t end = p.offsets != nullptr ? p.offsets[sequence + 1] : p.n_rows;
    return {begin / sub + sequence, (end - begin + sub - 1) / sub};
}

static __device__ __forceinline__ int64_t
first_group_of(const recurrence_params &p, int64_t first_slot, int64_t sequence)
{
    return first_slot / p.group_slots + sequence;
}

static __device__ __forceinline__ int64_t sequence_of_group(const recurrence_params &p, int64_t group)
{
    int64_t low = 0;
    int64_t high = p.n_sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (first_group_of(p, p.offsets[middle] / p.sub_tokens + middle, middle) <= group) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* One token's gate as it lies in memory; 0, no decay, where there is none. */
static __device__ __forceinline__ float gate_at(const recurrence_params &p, int64_t row, int64_t end, int head)
{
    return p.g != nullptr && row < end ? p.g[row * p.n_v_heads + head] : 0.0f;
}

/* log2 of the decay exp(g). NaN stays NaN. */
static __device__ __forceinline__ float log2_decay(float g)
{
    const float x = g * LOG2_E;
    return x < LOWEST_LOG2_DECAY ? LOWEST_LOG2_DECAY : x;
}

} // namespace lr::LR_CUDA_ACT

#endif
