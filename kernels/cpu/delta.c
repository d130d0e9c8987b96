/* The gated delta rule in chunks of 64 tokens (Yang et al. 2024, "Gated Delta Networks", the WY form).
 *
 * With G the running sum of g inside a chunk, and for i >= j  D_ij = exp(G_i - G_j):
 *
 *   A = beta_i (k_i . k_j) D_ij for j < i        (I + A) [W | U] = beta [exp(G) K | V]
 *   P = (q_i . k_j) D_ij for j <= i
 *   V' = U - W S        O = exp(G) Q S + P V'        S <- exp(G_C) S + (exp(G_C - G) K)^T V'
 *
 * Three parallel steps, all of them products on the register tile:
 *   1. chunks:   -W, U, P and G of every chunk and head go to `work`     (no state needed)
 *   2. summary:  the recurrence run on [I | 0] with the inputs [0 | V]: M and B, divided over columns
 *   3. output:   the recurrence run on the state that enters, divided over columns of dv */
#include "base/pool.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile.h"

enum { CHUNK = 64, GROUP_PANELS = 4 };
enum { STATE_FLOATS = 256 * 16 * GROUP_PANELS };

static int64_t round16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

/* Where a head's chunk keeps its results in `work`. */
struct chunk_work {
    float *wu;    /* [64][width]: columns 0..dk16 are -W, then U */
    float *p;     /* [64][64] */
    float *gamma; /* [64] exp(G_i) */
    float *decay; /* [64] exp(G_last - G_i) */
    int64_t width;
};

static int64_t chunk_floats(struct lr_delta_shape s)
{
    return CHUNK * (round16(s.dk) + round16(s.dv) + CHUNK + 2);
}

size_t LR_ISA(lr_delta_work_floats)(struct lr_delta_shape shape, int64_t n_rows)
{
    return (size_t)((n_rows + CHUNK - 1) / CHUNK * shape.n_v_heads * chunk_floats(shape));
}

static struct chunk_work find_chunk(const struct lr_delta_segment_args *a, int64_t head, int64_t chunk)
{
    int64_t n_chunks = (a->n_rows + CHUNK - 1) / CHUNK;
    struct chunk_work w = {.width = round16(a->shape.dk) + round16(a->shape.dv)};
    w.wu = a->work + (head * n_chunks + chunk) * chunk_floats(a->shape);
    w.p = w.wu + CHUNK * w.width;
    w.gamma = w.p + CHUNK * CHUNK;
    w.decay = w.gamma + CHUNK;
    return w;
}

static int64_t chunk_rows(int64_t n_rows, int64_t chunk)
{
    return n_rows - chunk * CHUNK < CHUNK ? n_rows - chunk * CHUNK : CHUNK;
}

/* wu <- (I + A)^-1 wu by forward substitution; `a` holds -A. Blocks of 16 rows: what earlier blocks contribute is a
 * product, the triangle inside is done row by row. */
static void solve(const float *a, struct chunk_work w, int64_t rows)
{
    for (int64_t first = 0; first < rows; first += 16) {
        int64_t n = rows - first < 16 ? rows - first : 16;
        struct lr_tile t = {.a = a + first * CHUNK,
                            .a_row = CHUNK,
                            .a_k = 1,
                            .b = w.wu,
                            .b_panel = 16,
                            .b_k = w.width,
                            .c = w.wu + first * w.width,
                            .c_row = w.width,
                            .c_panel = 16,
                            .k = first,
                            .load_c = 1};
        if (first > 0)
            LR_ISA(lr_tile_product)(&t, n, w.width / 16, LR_F32);
        for (int64_t column = 0; column < w.width; column += 16)
            for (int64_t i = 1; i < n; i++) {
                float *x = w.wu + (first + i) * w.width + column;
                const float *coefficients = a + (first + i) * CHUNK + first;
                lr_v16 sum = v_load(x);
                for (int64_t j = 0; j < i; j++)
                    sum = v_fma(v_set1(coefficients[j]), v_load(w.wu + (first + j) * w.width + column), sum);
                v_store(x, sum);
            }
    }
}

/* One head of a chunk, given q.k and k.k. */
static void
chunk_head(const struct lr_delta_segment_args *a, int64_t chunk, int64_t head, const float *qk, const float *kk)
{
    struct lr_delta_shape s = a->shape;
    struct chunk_work w = find_chunk(a, head, chunk);
    int64_t first = chunk * CHUNK, rows = chunk_rows(a->n_rows, chunk), dk16 = round16(s.dk);
    const float *k = (const float *)a->k + first * a->qkv_stride + head / (s.n_v_heads / s.n_k_heads) * s.dk;
    const float *v = (const float *)a->v + first * a->qkv_stride + head * s.dv;
    float sums[CHUNK] = {0}, beta[CHUNK] = {0}, minus_a[CHUNK * CHUNK], total = 0.0f;
    for (int64_t i = 0; i < rows; i++) {
        total += a->g[(first + i) * s.n_v_heads + head];
        sums[i] = total;
        beta[i] = a->beta[(first + i) * s.n_v_heads + head];
    }
    for (int64_t i = 0; i < CHUNK; i += 16) {
        v_store(w.gamma + i, v_exp(v_load(sums + i)));
        v_store(w.decay + i, v_exp(v_sub(v_set1(total), v_load(sums + i))));
    }
    static const float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < CHUNK; j += 16) {
            if (j > i) {
                v_store(w.p + i * CHUNK + j, v_zero());
                continue;
            }
            /* the mask first: behind the diagonal the exponent would be positive and might overflow */
            lr_v16 column = v_add(v_load(lane), v_set1((float)j)), row = v_set1((float)i);
            lr_v16 gap = v_sub(v_set1(sums[i]), v_load(sums + j));
            lr_v16 d = v_exp(v_select_lt(row, column, v_set1(-INFINITY), gap));
            v_store(w.p + i * CHUNK + j, v_mul(v_load(qk + i * CHUNK + j), d));
            lr_v16 below = v_mul(v_mul(v_set1(-beta[i]), v_load(kk + i * CHUNK + j)), d);
            v_store(minus_a + i * CHUNK + j, v_select_lt(column, row, below, v_zero()));
        }
    for (int64_t i = 0; i < rows; i++) {
        float *x = w.wu + i * w.width;
        lr_v16 scale_k = v_set1(-(beta[i] * w.gamma[i])), scale_v = v_set1(beta[i]);
        for (int64_t j = 0; j < s.dk; j += 16)
            v_store(x + j, v_mul(scale_k, s.dk - j >= 16 ? v_load(k + i * a->qkv_stride + j)
                                                         : v_load_part(k + i * a->qkv_stride + j, s.dk - j, 0.0f)));
        for (int64_t j = 0; j < s.dv; j += 16)
            v_store(x + dk16 + j,
                    v_mul(scale_v, s.dv - j >= 16 ? v_load(v + i * a->qkv_stride + j)
                                                  : v_load_part(v + i * a->qkv_stride + j, s.dv - j, 0.0f)));
    }
    solve(minus_a, w, rows);
}

/* A task of step 1: one chunk, one key head and the value heads that read it. */
static void chunk_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct lr_delta_segment_args *a = context;
    struct lr_delta_shape s = a->shape;
    int64_t chunk = task / s.n_k_heads, k_head = task % s.n_k_heads, group = s.n_v_heads / s.n_k_heads;
    int64_t first = chunk * CHUNK, rows = chunk_rows(a->n_rows, chunk);
    const float *q = (const float *)a->q + first * a->qkv_stride + k_head * s.dk;
    const float *k = (const float *)a->k + first * a->qkv_stride + k_head * s.dk;
    float keys[LR_MAX_DELTA_DIM * 16], qk[CHUNK * CHUNK], kk[CHUNK * CHUNK];
    /* keys transposed, 16 tokens at a time: the products of a panel */
    for (int64_t j = 0; j < CHUNK; j += 16) {
        for (int64_t d = 0; d < s.dk; d++)
            for (int64_t i = 0; i < 16; i++)
                keys[d * 16 + i] = j + i < rows ? k[(j + i) * a->qkv_stride + d] : 0.0f;
        struct lr_tile t = {.a = q,
                            .a_row = a->qkv_stride,
                            .a_k = 1,
                            .b = keys,
                            .b_panel = 0,
                            .b_k = 16,
                            .c = qk + j,
                            .c_row = CHUNK,
                            .c_panel = 16,
                            .k = s.dk};
        LR_ISA(lr_tile_product)(&t, rows, 1, LR_F32);
        t.a = k;
        t.c = kk + j;
        LR_ISA(lr_tile_product)(&t, rows, 1, LR_F32);
    }
    for (int64_t h = k_head * group; h < (k_head + 1) * group; h++)
        chunk_head(a, chunk, h, qk, kk);
}

/* A group of state columns on its way through the segment. */
struct columns {
    float state[STATE_FLOATS];              /* [dk][width] */
    float v_new[CHUNK * 16 * GROUP_PANELS]; /* [64][width] V' */
    int64_t panels, width;
};

static int64_t group_panels(int64_t dk)
{
    int64_t panels = STATE_FLOATS / (dk * 16);
    return panels > GROUP_PANELS ? GROUP_PANELS : panels;
}

/* V' = U - W S for a chunk; u_column < 0: U is zero (the columns of M) */
static void new_values(struct columns *c, struct chunk_work w, int64_t dk, int64_t rows, int64_t u_column)
{
    for (int64_t i = 0; i < rows; i++) {
        float *x = c->v_new + i * c->width;
        if (u_column >= 0)
            memcpy(x, w.wu + i * w.width + u_column, (size_t)c->width * sizeof *x);
        else
            memset(x, 0, (size_t)c->width * sizeof *x);
    }
    struct lr_tile t = {.a = w.wu,
                        .a_row = w.width,
                        .a_k = 1,
                        .b = c->state,
                        .b_panel = 16,
                        .b_k = c->width,
                        .c = c->v_new,
                        .c_row = c->width,
                        .c_panel = 16,
                        .k = dk,
                        .load_c = 1};
    LR_ISA(lr_tile_product)(&t, rows, c->panels, LR_F32);
}

/* S <- exp(G_last) S + K^T (decay V'); leaves V' scaled */
static void
advance_state(struct columns *c, struct chunk_work w, const float *k, int64_t k_stride, int64_t dk, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < c->width; j += 16) {
            float *x = c->v_new + i * c->width + j;
            v_store(x, v_mul(v_load(x), v_set1(w.decay[i])));
        }
    lr_v16 decay = v_set1(w.gamma[rows - 1]);
    for (int64_t i = 0; i < dk * c->width; i += 16)
        v_store(c->state + i, v_mul(v_load(c->state + i), decay));
    struct lr_tile t = {.a = k,
                        .a_row = 1,
                        .a_k = k_stride,
                        .b = c->v_new,
                        .b_panel = 16,
                        .b_k = c->width,
                        .c = c->state,
                        .c_row = c->width,
                        .c_panel = 16,
                        .k = rows,
                        .load_c = 1};
    LR_ISA(lr_tile_product)(&t, dk, c->panels, LR_F32);
}

struct delta_job {
    const struct lr_delta_segment_args *args;
    const float *s_in;
    float *m, *b, *o;
    int64_t o_stride;
    int64_t m_groups, b_groups; /* column groups of a head */
};

static const float *head_keys(const struct lr_delta_segment_args *a, int64_t head, int64_t chunk)
{
    int64_t k_head = head / (a->shape.n_v_heads / a->shape.n_k_heads);
    return (const float *)a->k + chunk * CHUNK * a->qkv_stride + k_head * a->shape.dk;
}

static void copy_columns(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t rows, int64_t n)
{
    for (int64_t i = 0; i < rows; i++)
        memcpy(to + i * to_stride, from + i * from_stride, (size_t)n * sizeof *to);
}

static void summary_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct delta_job *job = context;
    const struct lr_delta_segment_args *a = job->args;
    struct lr_delta_shape s = a->shape;
    int64_t groups = job->m_groups + job->b_groups, head = task / groups, group = task % groups;
    int is_m = group < job->m_groups;
    int64_t n_columns = is_m ? s.dk : s.dv;
    int64_t column = (is_m ? group : group - job->m_groups) * group_panels(s.dk) * 16;
    struct columns c;
    c.panels = (round16(n_columns) - column) / 16;
    if (c.panels > group_panels(s.dk))
        c.panels = group_panels(s.dk);
    c.width = c.panels * 16;
    memset(c.state, 0, (size_t)(s.dk * c.width) * sizeof *c.state);
    for (int64_t i = column; is_m && i < s.dk && i < column + c.width; i++)
        c.state[i * c.width + i - column] = 1.0f;
    for (int64_t chunk = 0; chunk * CHUNK < a->n_rows; chunk++) {
        struct chunk_work w = find_chunk(a, head, chunk);
        int64_t rows = chunk_rows(a->n_rows, chunk);
        new_values(&c, w, s.dk, rows, is_m ? -1 : round16(s.dk) + column);
        advance_state(&c, w, head_keys(a, head, chunk), a->qkv_stride, s.dk, rows);
    }
    int64_t n = n_columns - column < c.width ? n_columns - column : c.width;
    float *to = is_m ? job->m + head * s.dk * s.dk : job->b + head * s.dk * s.dv;
    copy_columns(to + column, n_columns, c.state, c.width, s.dk, n);
}

void LR_ISA(lr_delta_summary)(const struct lr_exec *exec, const struct lr_delta_segment_args *args, float *m, float *b)
{
    struct lr_delta_shape s = args->shape;
    int64_t n_chunks = (args->n_rows + CHUNK - 1) / CHUNK, per_group = group_panels(s.dk) * 16;
    struct delta_job job = {.args = args, .m = m, .b = b};
    job.m_groups = (s.dk + per_group - 1) / per_group;
    job.b_groups = (s.dv + per_group - 1) / per_group;
    lr_pool_run(exec->pool, n_chunks * s.n_k_heads, chunk_task, (void *)(uintptr_t)args);
    lr_pool_run(exec->pool, s.n_v_heads * (job.m_groups + job.b_groups), summary_task, &job);
}

/* O = exp(G) Q S + P V' of a chunk, into o [64][width] */
static void chunk_output(
    const struct columns *c, struct chunk_work w, const float *q, int64_t q_stride, int64_t dk, int64_t rows, float *o)
{
    struct lr_tile t = {.a = q,
                        .a_row = q_stride,
                        .a_k = 1,
                        .b = c->state,
                        .b_panel = 16,
                        .b_k = c->width,
                        .c = o,
                        .c_row = c->width,
                        .c_panel = 16,
                        .k = dk};
    LR_ISA(lr_tile_product)(&t, rows, c->panels, LR_F32);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < c->width; j += 16)
            v_store(o + i * c->width + j, v_mul(v_load(o + i * c->width + j), v_set1(w.gamma[i])));
    for (int64_t first = 0; first < rows; first += 16) {
        int64_t n = rows - first < 16 ? rows - first : 16;
        struct lr_tile p = {.a = w.p + first * CHUNK,
                            .a_row = CHUNK,
                            .a_k = 1,
                            .b = c->v_new,
                            .b_panel = 16,
                            .b_k = c->width,
                            .c = o + first * c->width,
                            .c_row = c->width,
                            .c_panel = 16,
                            .k = first + n,
                            .load_c = 1};
        LR_ISA(lr_tile_product)(&p, n, c->panels, LR_F32);
    }
}

static void output_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct delta_job *job = context;
    const struct lr_delta_segment_args *a = job->args;
    struct lr_delta_shape s = a->shape;
    int64_t head = task / job->b_groups, column = task % job->b_groups * group_panels(s.dk) * 16;
    int64_t k_head = head / (s.n_v_heads / s.n_k_heads);
    struct columns c;
    float o[CHUNK * 16 * GROUP_PANELS];
    c.panels = (round16(s.dv) - column) / 16;
    if (c.panels > group_panels(s.dk))
        c.panels = group_panels(s.dk);
    c.width = c.panels * 16;
    int64_t n = s.dv - column < c.width ? s.dv - column : c.width;
    memset(c.state, 0, (size_t)(s.dk * c.width) * sizeof *c.state);
    copy_columns(c.state, c.width, job->s_in + head * s.dk * s.dv + column, s.dv, s.dk, n);
    for (int64_t chunk = 0; chunk * CHUNK < a->n_rows; chunk++) {
        struct chunk_work w = find_chunk(a, head, chunk);
        int64_t rows = chunk_rows(a->n_rows, chunk), first = chunk * CHUNK;
        const float *q = (const float *)a->q + first * a->qkv_stride + k_head * s.dk;
        new_values(&c, w, s.dk, rows, round16(s.dk) + column);
        chunk_output(&c, w, q, a->qkv_stride, s.dk, rows, o);
        copy_columns(job->o + first * job->o_stride + head * s.dv + column, job->o_stride, o, c.width, rows, n);
        if (first + CHUNK < a->n_rows)
            advance_state(&c, w, head_keys(a, head, chunk), a->qkv_stride, s.dk, rows);
    }
}

void LR_ISA(lr_delta_output)(const struct lr_exec *exec,
                             const struct lr_delta_segment_args *args,
                             const float *s_in,
                             lr_act *o,
                             int64_t o_stride)
{
    struct delta_job job = {.args = args, .s_in = s_in, .o = o, .o_stride = o_stride};
    int64_t per_group = group_panels(args->shape.dk) * 16;
    job.b_groups = (args->shape.dv + per_group - 1) / per_group;
    lr_pool_run(exec->pool, args->shape.n_v_heads * job.b_groups, output_task, &job);
}

/* Rows of S_out are a vector times a matrix: 16 columns at a time, k ascending, starting from B. */
static void fold_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_delta_fold_args *f = args;
    struct lr_delta_shape s = f->shape;
    for (int64_t row = first; row < last; row++) {
        const float *m = f->m + row * s.dk, *state = f->s_in + row / s.dk * s.dk * s.dv;
        for (int64_t j = 0; j < s.dv; j += 16) {
            int64_t n = s.dv - j < 16 ? s.dv - j : 16;
            lr_v16 sum = n == 16 ? v_load(f->b + row * s.dv + j) : v_load_part(f->b + row * s.dv + j, n, 0.0f);
            for (int64_t k = 0; k < s.dk; k++) {
                const float *x = state + k * s.dv + j;
                sum = v_fma(v_set1(m[k]), n == 16 ? v_load(x) : v_load_part(x, n, 0.0f), sum);
            }
            if (n == 16)
                v_store(f->s_out + row * s.dv + j, sum);
            else
                v_store_part(f->s_out + row * s.dv + j, n, sum);
        }
    }
}

void LR_ISA(lr_delta_fold)(const struct lr_exec *exec, const struct lr_delta_fold_args *args)
{
    struct lr_delta_shape s = args->shape;
    lr_run_rows(exec, s.n_v_heads * s.dk, s.dk * s.dv / 4, fold_rows, args);
}

/* One token of one head: the state is read twice, written once. */
static void step_head(const struct lr_delta_step_args *a, int64_t row, int64_t head)
{
    struct lr_delta_shape s = a->shape;
    int64_t k_head = head / (s.n_v_heads / s.n_k_heads);
    const float *q = (const float *)a->q + row * a->qkv_stride + k_head * s.dk;
    const float *k = (const float *)a->k + row * a->qkv_stride + k_head * s.dk;
    const float *v = (const float *)a->v + row * a->qkv_stride + head * s.dv;
    float *state = a->states[row] + head * s.dk * s.dv, *o = (float *)a->o + row * a->o_stride + head * s.dv;
    lr_v16 decay = v_set1(exp_1(a->g[row * s.n_v_heads + head])), beta = v_set1(a->beta[row * s.n_v_heads + head]);
    for (int64_t j = 0; j < s.dv; j += 16) {
        int64_t n = s.dv - j < 16 ? s.dv - j : 16;
        lr_v16 read = v_zero(), out = v_zero();
        for (int64_t i = 0; i < s.dk; i++) {
            const float *x = state + i * s.dv + j;
            lr_v16 decayed = v_mul(decay, n == 16 ? v_load(x) : v_load_part(x, n, 0.0f));
            read = v_fma(v_set1(k[i]), decayed, read);
        }
        lr_v16 u = v_mul(beta, v_sub(n == 16 ? v_load(v + j) : v_load_part(v + j, n, 0.0f), read));
        for (int64_t i = 0; i < s.dk; i++) {
            float *x = state + i * s.dv + j;
            lr_v16 decayed = v_mul(decay, n == 16 ? v_load(x) : v_load_part(x, n, 0.0f));
            lr_v16 updated = v_fma(v_set1(k[i]), u, decayed);
            out = v_fma(v_set1(q[i]), updated, out);
            if (n == 16)
                v_store(x, updated);
            else
                v_store_part(x, n, updated);
        }
        if (n == 16)
            v_store(o + j, out);
        else
            v_store_part(o + j, n, out);
    }
}

static void step_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_delta_step_args *a = args;
    for (int64_t i = first; i < last; i++)
        step_head(a, i / a->shape.n_v_heads, i % a->shape.n_v_heads);
}

void LR_ISA(lr_delta_step)(const struct lr_exec *exec, const struct lr_delta_step_args *args)
{
    struct lr_delta_shape s = args->shape;
    lr_run_rows(exec, args->n_rows * s.n_v_heads, 2 * s.dk * s.dv, step_rows, args);
}
