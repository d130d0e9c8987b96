/* The table of operations that every backend fills: `cpu` (float32 activations) and `cuda` (bf16
 * or float16 activations). The residual stream, recurrent states, softmax states, gates and logits are float32 on both.
 *
 * Two kinds of memory. Tensors lie in the backend's memory (the GPU's for `cuda`) and are only touched through the
 * table. What is marked "host" is an ordinary array of the caller's: lists, positions, pointers to blocks; a backend
 * that needs it elsewhere takes its copy before the slot returns, so the caller may reuse it at once. The argument
 * structs are host memory too.
 *
 * Contract of every slot, unless it says otherwise:
 *   - it owns nothing and allocates nothing: buffers, workspace and stream come with the arguments;
 *   - it does not fail: arguments were checked when the model was planned; it neither prints nor blocks (CUDA: work is
 *     ordered by exec->stream; an error of the device shows at the next memory.download or memory.wait);
 *   - a row's result does not depend on the other rows, on the number of rows or of threads
 * (batch-invariant);
 *   - rows are tokens, row-major; strides are in elements; sizes and offsets are 64-bit.
 *
 * The bits (CPU; see docs/segments-and-bits.md): a dot product over k is one chain of fused
 * multiply-adds in ascending k that starts at +0; a sum over a row runs in 16 lanes (element i in
 * lane i mod 16, ascending) folded by one tree (lane j + lane j+8, then +4, +2, +1); division and
 * square root are IEEE; exp and friends are kernels/cpu/math.h. The three instruction sets v4
 * (AVX-512), v3 (AVX2 + FMA) and c (plain C with fmaf) give equal bits.
 *
 * Called from one host thread; work is spread over exec->pool inside. */
#ifndef LR_KERNELS_OPS_H
#define LR_KERNELS_OPS_H

#include "base/status.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct lr_pool;

enum lr_dtype { LR_F32, LR_BF16, LR_F16 };

/* Bytes of one element. */
static inline size_t lr_dtype_bytes(enum lr_dtype dtype)
{
    return dtype == LR_F32 ? 4 : 2;
}

/* What the CPU kernels keep on the stack bounds these; configurations beyond are refused when a model is read. */
enum {
    LR_MAX_HEAD_DIM = 1024,
    LR_MAX_GROUP = 64,       /* query heads of one KV head */
    LR_MAX_DELTA_DIM = 1024, /* key dimension of the delta rule */
    LR_MAX_CONV_TAPS = 64,
    LR_MAX_EXPERTS = 4096,
    LR_MAX_TOP_K = 4096, /* blocks chosen per query block */
    LR_MAX_VOCAB = 3 << 17
};

enum { LR_UNIT_UPLOAD_BYTES = 8 << 20 };

/* An activation buffer, in the backend's activation type: float32 on the CPU, bf16 or float16 on CUDA. */
typedef void lr_act;

enum lr_activation { LR_ACT_NONE, LR_ACT_SILU, LR_ACT_GELU, LR_ACT_GELU_TANH, LR_ACT_RELU };

/* What a launch runs on. CPU: pool. CUDA: stream, and what the backend keeps beside it (library handles, the ring
 * through which host arrays go to the device): see kernels/cuda/cuda.h. */
struct lr_exec {
    struct lr_pool *pool;
    void *stream;
    void *backend;
};

/* ---- dense layers
 * -------------------------------------------------------------------------------------------------
 */

/* A weight matrix W [n, k] (y = x W^T) in the backend's own layout and its own type.
 * CPU: panels of 16 rows of W, each [k][16], the last one padded with zeros:
 *   data[((row / 16) * k + column) * 16 + row % 16] */
struct lr_weight {
    enum lr_dtype dtype;
    int64_t n;
    int64_t k;
    void *data;
    size_t size_bytes;
};

/* y[t, j] = act(sum_k a[t, k] W[j, k] + bias[j]) (+ y_old[t, j] where `accumulate`). y is of the backend's activation
 * type, or float32 where `wide`: the residual stream, router and head logits. */
struct lr_gemm_args {
    const lr_act *a; /* [n_rows, k], row stride a_stride */
    int64_t a_stride;
    const struct lr_weight *w;
    const float *bias; /* [n] or NULL */
    lr_act *y;         /* [n_rows, n], row stride y_stride; must not overlap a */
    int64_t y_stride;
    int64_t n_rows;
    enum lr_activation activation;
    int accumulate; /* adds the finished product to y: the residual */
    int wide;       /* y is float32 on every backend */
};

/* For each expert e: rows [offsets[e] - offsets[0], offsets[e+1] - offsets[0]) of x go through  y = down_e (act(gate_e x) *
 * (up_e x)). A dense SwiGLU layer is the case of one expert. */
struct lr_experts_args {
    const lr_act *x;        /* [n_rows, d] contiguous, sorted by expert */
    lr_act *y;              /* [n_rows, d] contiguous, overwritten */
    lr_act *hidden;         /* scratch [n_rows, ffn] */
    const int64_t *offsets; /* [n_experts + 1], ascending; NULL where n_experts is 1: all rows */
    int64_t n_experts;
    int64_t n_rows; /* offsets[n_experts] - offsets[0], or more: a bound that the host knows */
    /* The weights of a layer's experts lie at equal distances: gate[e].data = gate[0].data + e * stride, and so on. */
    const struct lr_weight *gate; /* [n_experts], each [ffn, d] */
    const struct lr_weight *up;   /* [n_experts], each [ffn, d] */
    const struct lr_weight *down; /* [n_experts], each [d, ffn] */
    enum lr_activation activation;
};

/* ---- norms, rotary, small fused steps
 * ----------------------------------------------------------------------------- */

/* y = x * rsqrt(mean(x^2) + eps) * (1 + w)  if plus_one,  else * w.  Rows of n_cols. On the CPU y may be x. */
struct lr_rmsnorm_args {
    const float *x; /* [n_rows, n_cols], row stride x_stride: the residual stream */
    int64_t x_stride;
    const float *w; /* [n_cols] */
    lr_act *y;
    int64_t y_stride;
    int64_t n_rows;
    int64_t n_cols;
    float eps;
    int plus_one;
};

/* y = x * rsqrt(mean(x^2) + eps) * w * silu(z), over each of n_heads heads of head_dim. y may be x.
 */
struct lr_gated_rmsnorm_args {
    const lr_act *x; /* [n_rows, n_heads * head_dim], row stride x_stride */
    int64_t x_stride;
    const lr_act *z; /* the same shape, row stride z_stride */
    int64_t z_stride;
    const float *w; /* [head_dim] */
    lr_act *y;      /* row stride y_stride */
    int64_t y_stride;
    int64_t n_rows;
    int64_t n_heads;
    int64_t head_dim;
    float eps;
};

/* Per head: RMSNorm with (1 + w), then rotary on the first `rotary_dim` components in halves. In
 * place. x1 = x[:rot/2], x2 = x[rot/2:rot];  x1' = fma(x1, cos, -(x2 * sin)),  x2' = fma(x2, cos,
 * x1 * sin) */
struct lr_norm_rope_args {
    lr_act *x; /* [n_rows, n_heads, head_dim], row stride x_stride */
    int64_t x_stride;
    int64_t n_rows;
    int64_t n_heads;
    int64_t head_stride; /* elements between two heads of a row (q has its gate in between) */
    int64_t head_dim;
    int64_t rotary_dim;
    const float *w;   /* [head_dim] */
    const float *cos; /* [n_rows, rotary_dim / 2], made by rope_table */
    const float *sin;
    float eps;
};

/* Causal depthwise convolution with activation:  y[t, c] = act(sum_w w[c, w] x[t - W + 1 + w, c]),
 * taps ascending. Rows before the first come from `tail`. x and y must not overlap. */
struct lr_conv_args {
    const lr_act *x; /* [n_rows, n_channels], row stride x_stride */
    int64_t x_stride;
    const float *w;     /* [n_channels, n_taps], the last tap is the current token */
    const lr_act *tail; /* [n_taps - 1, n_channels] contiguous: the inputs just before row 0 */
    lr_act *y;
    int64_t y_stride;
    int64_t n_rows;
    int64_t n_channels;
    int64_t n_taps;
    enum lr_activation activation;
};

/* One more token of each of n_rows independent sequences (forks): the convolution over the sequence's tail and its new
 * row, then the tail moves on by one row. The same bits as `conv` over the whole sequence. */
struct lr_conv_step_args {
    const lr_act *x;      /* [n_rows, n_channels], row stride x_stride */
    int64_t x_stride;
    const float *w;       /* [n_channels, n_taps] */
    lr_act *const *tails; /* host [n_rows]: each [n_taps - 1, n_channels], all different, updated in place */
    lr_act *y;
    int64_t y_stride;
    int64_t n_rows;
    int64_t n_channels;
    int64_t n_taps;
    enum lr_activation activation;
};

/* x *= scale * rsqrt(sum(x^2) + eps), over each of n_heads heads of head_dim, contiguous heads. In
 * place. */
struct lr_l2norm_args {
    lr_act *x; /* [n_rows, n_heads * head_dim], row stride x_stride */
    int64_t x_stride;
    int64_t n_rows;
    int64_t n_heads;
    int64_t head_dim;
    float eps;
    float scale;
};

/* beta = sigmoid(b);  g = -exp(A_log) * softplus(a + dt_bias), softplus(x) = x above 20, else
 * log1p(exp(x)). */
struct lr_delta_gates_args {
    const lr_act *b; /* [n_rows, ba_stride] */
    const lr_act *a;
    int64_t ba_stride;
    const int32_t *b_index; /* [n_heads] column of head h's b in a row of `b`; NULL: column h */
    const int32_t *a_index; /* [n_heads] column of head h's a in a row of `a`; NULL: column h */
    const float *a_log;     /* [n_heads] */
    const float *dt_bias;   /* [n_heads] */
    float *beta;            /* [n_rows, n_heads] float32 */
    float *g;               /* [n_rows, n_heads] float32, <= 0 */
    int64_t n_rows;
    int64_t n_heads;
};

/* y = x * sigmoid(gate), elementwise over [n_rows, n_heads, head_dim]. y may be x. */
struct lr_sigmoid_gate_args {
    const lr_act *x;
    int64_t x_stride; /* heads contiguous */
    const lr_act *gate;
    int64_t gate_stride;      /* elements between rows of gate */
    int64_t gate_head_stride; /* elements between heads of gate */
    lr_act *y;
    int64_t y_stride;
    int64_t n_rows;
    int64_t n_heads;
    int64_t head_dim;
};

/* ---- gated delta rule
 * --------------------------------------------------------------------------------------------- */

/* Per value head (key head = h / (n_v_heads / n_k_heads)), state S [dk, dv] float32:
 *   S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = S^T q_t
 * One segment of n_rows tokens is an affine map of the state that enters it: S_out = M S_in + B.
 * (Yang et al. 2024, Gated Delta Networks; summary as in fla's context parallelism.) */
struct lr_delta_shape {
    int64_t n_k_heads, n_v_heads, dk, dv;
};

struct lr_delta_segment_args {
    struct lr_delta_shape shape;
    const lr_act *q; /* [n_rows, n_k_heads * dk], row stride qkv_stride; normalised and scaled */
    const lr_act *k; /* the same; normalised */
    const lr_act *v; /* [n_rows, n_v_heads * dv] */
    int64_t qkv_stride;
    const float *g;    /* [n_rows, n_v_heads] */
    const float *beta; /* [n_rows, n_v_heads] */
    int64_t n_rows;
    float *work; /* delta_work_floats(shape, n_rows) floats: written by delta_summary, read by
                    delta_output */
};

/* S_out = M S_in + B for every head: M [n_v_heads, dk, dk], B, S [n_v_heads, dk, dv]. S_out must
 * not be S_in. */
struct lr_delta_fold_args {
    struct lr_delta_shape shape;
    const float *m;
    const float *b;
    const float *s_in;
    float *s_out;
};

/* One token of each of n_rows independent sequences (forks). */
struct lr_delta_step_args {
    struct lr_delta_shape shape;
    const lr_act *q, *k, *v;
    int64_t qkv_stride;
    const float *g, *beta; /* [n_rows, n_v_heads] */
    float *const *states;  /* host [n_rows]: S [n_v_heads, dk, dv] each, updated in place; all different */
    lr_act *o;             /* [n_rows, n_v_heads * dv], row stride o_stride */
    int64_t o_stride;
    int64_t n_rows;
};

/* ---- softmax attention over KV blocks
 * ----------------------------------------------------------------------------- */

enum { LR_KV_BLOCK_TOKENS = 128 };

/* One KV block holds 128 tokens of one layer on an absolute grid (token p is in block p / 128). CPU
 * layout, elements of `dtype`, dv16 = head_dim rounded up to 16: per KV head:  K as 8 panels of 16
 * keys [8][head_dim][16]  |  V [128][dv16], columns behind head_dim zero Keys that do not exist yet
 * are zero. */
struct lr_kv_shape {
    int64_t n_heads; /* query heads; head h reads KV head h / (n_heads / n_kv_heads) */
    int64_t n_kv_heads;
    int64_t head_dim;
    enum lr_dtype dtype; /* CPU: LR_F32 or LR_BF16. CUDA: the activation type */
};

/* A block that a query may read; or half of one, where the slot's arguments allow it. */
struct lr_kv_ref {
    const void *data; /* the block, for its second half too */
    int64_t position; /* of the first key that is meant: a multiple of 128, or 64 more for the block's second half */
    int32_t n_keys;   /* 1..128, and not beyond the block's end */
    int32_t whole;    /* 1: seen by window and sinks rules alike (a chosen block); causality still holds */
};

struct lr_kv_list {
    const struct lr_kv_ref *refs; /* host; ascending positions */
    int64_t n_refs;
};

/* Writes k, v rows of consecutive tokens into their blocks, rounding to the block's dtype. */
struct lr_kv_store_args {
    struct lr_kv_shape shape;
    const lr_act *k; /* [n_rows, n_kv_heads * head_dim], row stride k_stride */
    int64_t k_stride;
    const lr_act *v;
    int64_t v_stride;
    int64_t n_rows;
    int64_t position;    /* absolute, of row 0 */
    void *const *blocks; /* host; blocks[i] is block position / 128 + i */
};

/* The same for rows that do not follow one another: row r is at positions[r], in the block blocks[r]; a NULL block
 * skips the row (it belongs to another worker). */
struct lr_kv_store_rows_args {
    struct lr_kv_shape shape;
    const lr_act *k;
    int64_t k_stride;
    const lr_act *v;
    int64_t v_stride;
    int64_t n_rows;
    const int64_t *positions; /* host [n_rows] */
    void *const *blocks;      /* host [n_rows] */
};

/* Online softmax: folds the keys of the listed blocks, in ascending order, into the running (m, l,
 * o) of every row and head:  s_j = scale * (q . k_j) where j is visible, else -inf;  m' = max(m,
 * max_j s_j) per block; p_j = exp(s_j - m');  l = l * exp(m - m') + sum_j p_j (16 lanes by key
 * position);  o = o * exp(m - m') + sum_j p_j v_j. Key j is visible to the query at position i
 * where j <= i and (window == 0 or i - j < window or j < sinks or its block is `whole`). A row that
 * sees nothing keeps m = -inf, l = 0, o = 0. m is in the backend's own units (CPU: as above; CUDA: m * log2 e).
 * `first`: the state is taken to be empty instead of read. `y`: the result o / l (0 where l = 0) is written, and what is
 * left in m, l, o is then undefined. */
struct lr_attention_args {
    struct lr_kv_shape shape;
    const lr_act *q; /* [n_rows, n_heads, head_dim], row stride q_stride, head stride q_head_stride */
    int64_t q_stride;
    int64_t q_head_stride;
    int64_t n_rows;
    const int64_t *positions; /* host [n_rows] absolute and consecutive */
    float scale;
    int64_t window; /* 0: no window, everything before i is visible */
    int64_t sinks;
    const struct lr_kv_list *lists; /* host; one list for all; or [query block][n_kv_heads] where n_lists > 1: */
    int64_t n_lists;                /*   row r reads list (positions[r] / 128 - positions[0] / 128, its KV head) */
    int half_blocks;                /* 1: refs may name halves of blocks. The same for every call that folds a row */
    int first;                      /* 1: nothing was folded yet */
    float *m;                       /* [n_rows, n_heads] */
    float *l;                       /* [n_rows, n_heads] */
    float *o;                       /* [n_rows, n_heads, head_dim] */
    lr_act *y;                      /* [n_rows, n_heads * head_dim], row stride y_stride; or NULL: more folds follow */
    int64_t y_stride;
};

/* Fresh partials of a few rows (forks) over many ranges of keys. Slot s of row r is the softmax state over the list
 * that the one item covering (s, r) names, started empty; where no item covers (s, r) it stays empty: m = -inf, l = 0,
 * o = 0. Every listed key with j <= i is visible. All of m, l, o is written.
 *
 *   item: slot s, rows [first_row, first_row + n_rows), one list, or one for each KV head
 *
 * A row's partial does not depend on the other rows of its item. */
struct lr_partial_item {
    int64_t slot, first_row, n_rows;
    const struct lr_kv_list *lists; /* host [n_lists] */
    int64_t n_lists;                /* 1 or n_kv_heads */
};

struct lr_partials_args {
    struct lr_kv_shape shape;
    const lr_act *q; /* [n_rows, n_heads, head_dim], row stride q_stride, head stride q_head_stride */
    int64_t q_stride;
    int64_t q_head_stride;
    int64_t n_rows;
    const int64_t *positions; /* host [n_rows] absolute, in any order */
    float scale;
    const struct lr_partial_item *items; /* host */
    int64_t n_items;
    int64_t n_slots;
    float *m, *l; /* [n_slots, n_rows, n_heads]; m in the backend's units */
    float *o;     /* [n_slots, n_rows, n_heads, head_dim] */
};

/* Merging partials of different KV ranges so that the order cannot matter: with the global maximum
 * and a common power of two for each row and head, every partial is rounded to 64-bit integers,
 * whose sum is associative. Step 1 (merge_bounds): bound[row, head, 0] = max_p m_p;  bound[.., 1] =
 * max over p, d of |o_p|, and of l_p. Step 2 (merge_accumulate): w = exp(m_p - m);  sum_l +=
 * rint(l_p w 2^e), sum_o[d] += rint(o_p[d] w 2^e), with e such that n_partials_total * bound1 * 2^e
 * < 2^62.   Step 3 (merge_finish): y = (float)sum_o / (float)sum_l. Between the steps the caller
 * takes the maximum of `bound` and the sum of the integers over all workers. */
struct lr_merge_args {
    int64_t n_rows, n_heads, head_dim;
    int64_t n_partials;       /* partials here */
    int64_t n_partials_total; /* over all workers: the same number everywhere */
    const float *m, *l;       /* [n_partials, n_rows, n_heads] */
    const float *o;           /* [n_partials, n_rows, n_heads, head_dim] */
    float *bound;             /* [n_rows, n_heads, 2]; merge_bounds writes it, later steps read it */
    int64_t *sums;            /* [n_rows, n_heads, head_dim + 1], the last is l; merge_accumulate overwrites it */
    lr_act *y;                /* merge_finish: [n_rows, n_heads * head_dim], row stride y_stride */
    int64_t y_stride;
};

/* Summaries of one block's keys for selection: mean over its n_keys, and per-channel minimum and
 * maximum. */
struct lr_block_summary_args {
    struct lr_kv_shape shape;
    const struct lr_kv_ref *blocks; /* host [n_blocks] */
    int64_t n_blocks;
    float *mean; /* [n_blocks, n_kv_heads, head_dim]; NULL to skip */
    float *min;  /* the same shape; NULL to skip */
    float *max;
};

/* Chooses, for every query block (128 consecutive positions on the absolute grid) and KV head, the
 * `top_k` candidate blocks with the largest  mean_q . mean_k  (mean_q over the block's rows and the
 * KV head's query heads); ties go to the lower block. Candidates of query block b: blocks c with c
 * * 128 >= sinks and (c + 1) * 128 <= b * 128 - window, that is, blocks that lie wholly behind the
 * window's reach of the query block's first row (and in front of it). chosen[qb, kv_head, 0 .. n):
 * ascending block numbers, padded with -1. */
struct lr_block_select_args {
    struct lr_kv_shape shape;
    const lr_act *q; /* [n_rows, n_heads, head_dim], strides as in attention; consecutive positions */
    int64_t q_stride;
    int64_t q_head_stride;
    int64_t n_rows;
    int64_t position; /* of row 0, a multiple of 128 */
    int64_t window;
    int64_t sinks;
    const float *block_means; /* [n_blocks, n_kv_heads, head_dim] of blocks 0 .. n_blocks-1 */
    int64_t n_blocks;
    int64_t top_k;
    int32_t *chosen; /* [ceil(n_rows / 128), n_kv_heads, top_k] */
};

/* Quest's bound for each page and row:  sum_d max(q_d min_d, q_d max_d), the maximum over the query
 * heads of a KV head's group. (Tang et al. 2024.) */
struct lr_page_bounds_args {
    struct lr_kv_shape shape;
    const lr_act *q; /* [n_rows, n_heads, head_dim] */
    int64_t q_stride;
    int64_t q_head_stride;
    int64_t n_rows;
    const float *min, *max; /* [n_pages, n_kv_heads, head_dim] */
    int64_t n_pages;
    float *bounds; /* [n_rows, n_kv_heads, n_pages] */
};

/* ---- mixture of experts
 * ------------------------------------------------------------------------------------------- */

/* p = softmax(logits) over all experts; the top_k of p (ties: the lower id), renormalised to sum 1
 * if `renormalize` (sum in the order of selection: descending p). Written in ascending expert id.
 */
struct lr_router_args {
    const float *logits; /* [n_rows, n_experts] contiguous */
    int64_t n_rows;
    int64_t n_experts;
    int64_t top_k;
    int renormalize;
    int32_t *ids;   /* [n_rows, top_k], ascending */
    float *weights; /* [n_rows, top_k] */
};

/* Counting sort of the (token, choice) pairs by expert; within an expert, tokens ascend. */
struct lr_expert_sort_args {
    const int32_t *ids; /* [n_rows, top_k] from the router */
    int64_t n_rows;
    int64_t top_k;
    int64_t n_experts;
    int64_t *offsets; /* [n_experts + 1]: the sorted rows of expert e are [offsets[e], offsets[e + 1]) */
    int64_t *order;   /* [n_rows * top_k]: the token of each sorted row */
    int64_t *row_of;  /* [n_rows, top_k]: the sorted row of each (token, choice) */
};

/* x[t] += sum_k weights[t, k] * y[row_of[t, k]] in ascending k, then + sigmoid(shared_gate[t]) *
 * shared[t]. top_k may be 0. acc = 0; acc = fma(w_k, y_k, acc) ...; acc = fma(sigmoid(gate),
 * shared, acc); x = x + acc */
struct lr_moe_combine_args {
    float *x; /* [n_rows, d] contiguous, the residual stream */
    int64_t n_rows;
    int64_t d;
    int64_t top_k;
    const float *weights;      /* [n_rows, top_k] */
    const int64_t *row_of;     /* [n_rows, top_k] rows of y */
    const lr_act *y;           /* [any, d] contiguous */
    const lr_act *shared;      /* [n_rows, d] or NULL */
    const float *shared_gate; /* [n_rows] logits; NULL: the factor of `shared` is 1 */
};

/* ---- choosing tokens
 * ---------------------------------------------------------------------------------------------- */

struct lr_sampling {
    float temperature; /* 0: greedy, the lowest id among the largest logits */
    int32_t top_k;     /* 0: all; else only the k largest logits (ties: the lower id) */
    float top_p;       /* 1: all; else the fewest tokens, by falling probability, whose sum reaches top_p */
    uint64_t seed;
};

/* The next token of every row. Probabilities are exp((logit - largest) / temperature) as integers of 2^-44
 * (kernels/sample.h); top_k, top_p and the draw walk over the tokens by falling logit, equal ones by rising id; the
 * random number is a function of (seed, position). So the token depends on the row's logits only, and is the same from
 * every backend. */
struct lr_sample_args {
    const float *logits; /* [n_rows, vocab] contiguous */
    int64_t n_rows;
    int64_t vocab;                      /* at most LR_MAX_VOCAB */
    const struct lr_sampling *sampling; /* host [n_rows] */
    const int64_t *positions;           /* host [n_rows], of the tokens to come */
    int32_t *ids;                       /* [n_rows]; -1 where a logit is NaN, or the largest is infinite */
};

/* ---- the table
 * ----------------------------------------------------------------------------------------------------
 */

/* Two lanes of work: what is launched in one is done in order, and the lanes run beside each other.
 *
 *   kernels   K1 reads A, mark 0 | await 1, K2 reads B | ...
 *   aside     copy into B, mark 1 | await 0, copy into A | ...
 */
enum lr_lane { LR_LANE_KERNELS, LR_LANE_ASIDE };
enum { LR_MARKS = 16 };

/* The backend's memory. The copies are ordered with the kernels of `exec` and may return before they are done, but
 * for download and wait. */
struct lr_memory_ops {
    /* Zeroed memory, 256-byte aligned. Blocks. LR_NO_MEMORY with the numbers where there is not enough. */
    enum lr_status (*reserve)(size_t size_bytes, void **out, struct lr_error *err);
    void (*release)(void *base, size_t size_bytes);
    /* Bytes that could be reserved now. */
    size_t (*available)(void);
    /* Host memory that the backend copies to and from at full rate (CUDA: pinned), 256-byte aligned, contents
     * undefined. Blocks. LR_NO_MEMORY with the numbers. release_host waits for copies in both lanes. */
    enum lr_status (*reserve_host)(size_t size_bytes, void **out, struct lr_error *err);
    void (*release_host)(void *base, size_t size_bytes);
    /* Bytes of such memory that could be reserved now. */
    size_t (*available_host)(void);
    /* Backend memory or memory of reserve_host to backend memory; the ranges do not overlap. */
    void (*copy)(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes);
    /* n_rows rows of row_bytes each; strides in bytes. */
    void (*copy_rows)(const struct lr_exec *exec,
                      void *to,
                      size_t to_stride,
                      const void *from,
                      size_t from_stride,
                      size_t row_bytes,
                      int64_t n_rows);
    void (*zero)(const struct lr_exec *exec, void *to, size_t size_bytes);
    /* Host memory to backend memory; `from` may be reused at once. */
    void (*upload)(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes);
    /* Backend memory to host memory, after everything launched before. Blocks. Reports what failed since the last
     * download or wait. */
    enum lr_status (*download)(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes,
                               struct lr_error *err);
    enum lr_status (*wait)(const struct lr_exec *exec, struct lr_error *err);

    /* Between backend memory and memory of reserve_host, either way, in LR_LANE_ASIDE; everything else that this table
     * launches is in LR_LANE_KERNELS. Not between unit_begin and unit_end, nor are the next two. */
    void (*copy_aside)(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes);
    /* `mark` (0 .. LR_MARKS - 1) is where `lane` stands now; it forgets where it was. */
    void (*mark)(const struct lr_exec *exec, enum lr_lane lane, int mark);
    /* What is launched in `lane` from now on starts after what lay before the mark; one never set holds nobody up. */
    void (*await)(const struct lr_exec *exec, enum lr_lane lane, int mark);
};

struct lr_kernel_ops {
    const char *name; /* "cpu-v4", "cpu-v3", "cpu-c"; "cuda-bf16", "cuda-f16", with "-mma" behind for the portable
                         kernels. CPUs give the same bits under all their names, GPUs under one */
    enum lr_dtype act_dtype; /* of lr_act: LR_F32 (cpu), LR_BF16 or LR_F16 (cuda) */
    int host_memory;         /* 1: the backend's memory is the host's */
    struct lr_memory_ops memory;

    /* What is launched between the two may be collected and started at once by the second (CUDA: one graph, replayed
     * with new arguments where its shape is that of the last unit). Nothing in between waits: no download, no wait, no
     * reserve; host arrays of up to LR_UNIT_UPLOAD_BYTES together. unit_end reports what went wrong since the last
     * wait. */
    void (*unit_begin)(const struct lr_exec *exec);
    enum lr_status (*unit_end)(const struct lr_exec *exec, struct lr_error *err);

    /* Bytes of a packed W [n, k]; and packing rows [row, row + n_rows) of a row-major host matrix of
     * w->dtype into w->data, which the caller allocated (zeroed, 64-byte aligned) with weight_bytes. The CPU keeps the
     * type, CUDA rounds to bf16 [n, k] row-major. Blocks. */
    size_t (*weight_bytes)(int64_t n, int64_t k, enum lr_dtype dtype);
    void (*weight_pack)(struct lr_weight *w, int64_t row, int64_t n_rows, const void *rows);

    void (*gemm)(const struct lr_exec *exec, const struct lr_gemm_args *args);
    void (*experts)(const struct lr_exec *exec, const struct lr_experts_args *args);

    /* Rows of an embedding table [vocab, d] of `dtype`, row-major (not packed; backend memory): y[t] =
     * table[ids[t]], ids on the host. */
    void (*embed)(const struct lr_exec *exec,
                  const void *table,
                  enum lr_dtype dtype,
                  int64_t d,
                  const int32_t *ids,
                  int64_t n_rows,
                  float *y);
    /* cos and sin of positions[t] * inv_freq[j], times `factor`, into [n_rows, n_freq]; positions and inv_freq on the
     * host. Angle, reduction, sine and cosine as in lr_rope_table. */
    void (*rope_table)(const struct lr_exec *exec,
                       const int64_t *positions,
                       int64_t n_rows,
                       const double *inv_freq,
                       int64_t n_freq,
                       double factor,
                       float *cos_out,
                       float *sin_out);
    void (*rmsnorm)(const struct lr_exec *exec, const struct lr_rmsnorm_args *args);
    void (*gated_rmsnorm)(const struct lr_exec *exec, const struct lr_gated_rmsnorm_args *args);
    void (*norm_rope)(const struct lr_exec *exec, const struct lr_norm_rope_args *args);
    void (*conv)(const struct lr_exec *exec, const struct lr_conv_args *args);
    void (*conv_step)(const struct lr_exec *exec, const struct lr_conv_step_args *args);
    void (*l2norm)(const struct lr_exec *exec, const struct lr_l2norm_args *args);
    void (*delta_gates)(const struct lr_exec *exec, const struct lr_delta_gates_args *args);
    void (*sigmoid_gate)(const struct lr_exec *exec, const struct lr_sigmoid_gate_args *args);

    size_t (*delta_work_floats)(struct lr_delta_shape shape, int64_t n_rows);
    /* Writes M [n_v_heads, dk, dk] and B [n_v_heads, dk, dv] of the segment, and args->work. */
    void (*delta_summary)(const struct lr_exec *exec, const struct lr_delta_segment_args *args, float *m, float *b);
    /* After delta_summary, with the state s_in that enters the segment: o [n_rows, n_v_heads * dv],
     * stride o_stride. */
    void (*delta_output)(const struct lr_exec *exec,
                         const struct lr_delta_segment_args *args,
                         const float *s_in,
                         lr_act *o,
                         int64_t o_stride);
    void (*delta_fold)(const struct lr_exec *exec, const struct lr_delta_fold_args *args);
    void (*delta_step)(const struct lr_exec *exec, const struct lr_delta_step_args *args);

    size_t (*kv_block_bytes)(struct lr_kv_shape shape);
    void (*kv_store)(const struct lr_exec *exec, const struct lr_kv_store_args *args);
    void (*kv_store_rows)(const struct lr_exec *exec, const struct lr_kv_store_rows_args *args);
    void (*attention)(const struct lr_exec *exec, const struct lr_attention_args *args);
    void (*partials)(const struct lr_exec *exec, const struct lr_partials_args *args);
    void (*merge_bounds)(const struct lr_exec *exec, const struct lr_merge_args *args);
    void (*merge_accumulate)(const struct lr_exec *exec, const struct lr_merge_args *args);
    void (*merge_finish)(const struct lr_exec *exec, const struct lr_merge_args *args);
    void (*block_summary)(const struct lr_exec *exec, const struct lr_block_summary_args *args);
    void (*block_select)(const struct lr_exec *exec, const struct lr_block_select_args *args);
    void (*page_bounds)(const struct lr_exec *exec, const struct lr_page_bounds_args *args);

    void (*router)(const struct lr_exec *exec, const struct lr_router_args *args);
    void (*expert_sort)(const struct lr_exec *exec, const struct lr_expert_sort_args *args);
    /* Copies rows of row_bytes each, a multiple of the activation's size: y[i] = x[rows[i]]; rows in backend memory. */
    void (*gather_rows)(
        const struct lr_exec *exec, const void *x, size_t row_bytes, const int64_t *rows, int64_t n_rows, void *y);
    void (*moe_combine)(const struct lr_exec *exec, const struct lr_moe_combine_args *args);

    void (*sample)(const struct lr_exec *exec, const struct lr_sample_args *args);
};

enum lr_isa { LR_ISA_AUTO, LR_ISA_V4, LR_ISA_V3, LR_ISA_C };

/* The CPU table for an instruction set; AUTO takes the widest that this machine has.
 * LR_UNSUPPORTED, naming what is missing, where the machine lacks `isa`. */
LR_MUST_USE enum lr_status lr_kernels_cpu(enum lr_isa isa, const struct lr_kernel_ops **out, struct lr_error *err);

/* cos and sin of positions[t] * inv_freq[j], times `factor`, into [n_rows, n_freq]: the angle and
 * its reduction to
 * [-pi, pi] in float64 with our own sine and cosine (position times frequency in float32 is off by
 * half a radian at ten million tokens). */
void lr_rope_table(const int64_t *positions,
                   int64_t n_rows,
                   const double *inv_freq,
                   int64_t n_freq,
                   double factor,
                   float *cos_out,
                   float *sin_out);

#ifdef __cplusplus
}
#endif

#endif
