/* Gated feed-forward layers, grouped by expert: y = down(act(gate x) * (up x)).
 *
 * With rows enough a task carries up to 96 rows of one expert through all three products, its hidden rows hot in L2.
 * With few rows (decoding) columns are divided too, in two passes. */
#include "base/pool.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/math.h"

struct experts_job {
    const struct lr_experts_args *args; /* with offsets */
    int64_t hidden_groups, out_groups; /* column groups of the two passes; 1 and 1 when fused */
};

/* The rows of block `block`, counted over the experts in order; 96 rows of one expert to a block. */
static int64_t find_block(const struct lr_experts_args *e, int64_t block, int64_t *row, int64_t *rows)
{
    for (int64_t x = 0;; x++) {
        int64_t n = e->offsets[x + 1] - e->offsets[x];
        int64_t blocks = (n + LR_GEMM_ROWS - 1) / LR_GEMM_ROWS;
        if (block < blocks) {
            *row = e->offsets[x] - e->offsets[0] + block * LR_GEMM_ROWS;
            *rows = n - block * LR_GEMM_ROWS < LR_GEMM_ROWS ? n - block * LR_GEMM_ROWS : LR_GEMM_ROWS;
            return x;
        }
        block -= blocks;
    }
}

static void group_panels(int64_t n_columns, int64_t groups, int64_t group, int64_t *panel, int64_t *end)
{
    int64_t panels = (n_columns + 15) / 16;
    *panel = panels * group / groups;
    *end = panels * (group + 1) / groups;
}

static void store_rows(float *y, int64_t y_stride, const float *x, int64_t x_stride, int64_t rows, int64_t width)
{
    for (int64_t i = 0; i < rows; i++)
        memcpy(y + i * y_stride, x + i * x_stride, (size_t)width * sizeof *y);
}

static void
hidden_part(const struct lr_experts_args *e, int64_t x, int64_t row, int64_t rows, int64_t panel, int64_t end)
{
    enum { STRIP = LR_GEMM_STRIP * 16 };
    float gate[LR_GEMM_ROWS * STRIP], up[LR_GEMM_ROWS * STRIP];
    int64_t d = e->gate[x].k, ffn = e->gate[x].n;
    const float *in = (const float *)e->x + row * d;
    for (; panel < end; panel += LR_GEMM_STRIP) {
        int64_t panels = end - panel < LR_GEMM_STRIP ? end - panel : LR_GEMM_STRIP, column = panel * 16;
        int64_t width = ffn - column < panels * 16 ? ffn - column : panels * 16;
        LR_ISA(lr_weight_product)(&e->gate[x], in, d, rows, panel, panels, gate, STRIP);
        LR_ISA(lr_weight_product)(&e->up[x], in, d, rows, panel, panels, up, STRIP);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < panels * 16; j += 16) {
                float *g = gate + i * STRIP + j;
                v_store(g, v_mul(v_activate(v_load(g), e->activation), v_load(up + i * STRIP + j)));
            }
        store_rows((float *)e->hidden + row * ffn + column, ffn, gate, STRIP, rows, width);
    }
}

static void out_part(const struct lr_experts_args *e, int64_t x, int64_t row, int64_t rows, int64_t panel, int64_t end)
{
    enum { STRIP = LR_GEMM_STRIP * 16 };
    int64_t d = e->down[x].n, ffn = e->down[x].k;
    const float *in = (const float *)e->hidden + row * ffn;
    for (; panel < end; panel += LR_GEMM_STRIP) {
        int64_t panels = end - panel < LR_GEMM_STRIP ? end - panel : LR_GEMM_STRIP, column = panel * 16;
        int64_t width = d - column < panels * 16 ? d - column : panels * 16;
        float *y = (float *)e->y + row * d + column;
        if (width == panels * 16) {
            LR_ISA(lr_weight_product)(&e->down[x], in, ffn, rows, panel, panels, y, d);
        } else {
            float strip[LR_GEMM_ROWS * STRIP];
            LR_ISA(lr_weight_product)(&e->down[x], in, ffn, rows, panel, panels, strip, STRIP);
            store_rows(y, d, strip, STRIP, rows, width);
        }
    }
}

static void fused_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct lr_experts_args *e = ((const struct experts_job *)context)->args;
    int64_t row, rows, x = find_block(e, task, &row, &rows);
    hidden_part(e, x, row, rows, 0, (e->gate[x].n + 15) / 16);
    out_part(e, x, row, rows, 0, (e->down[x].n + 15) / 16);
}

static void hidden_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct experts_job *job = context;
    int64_t row, rows, panel, end, x = find_block(job->args, task / job->hidden_groups, &row, &rows);
    group_panels(job->args->gate[x].n, job->hidden_groups, task % job->hidden_groups, &panel, &end);
    hidden_part(job->args, x, row, rows, panel, end);
}

static void out_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct experts_job *job = context;
    int64_t row, rows, panel, end, x = find_block(job->args, task / job->out_groups, &row, &rows);
    group_panels(job->args->down[x].n, job->out_groups, task % job->out_groups, &panel, &end);
    out_part(job->args, x, row, rows, panel, end);
}

void LR_ISA(lr_experts)(const struct lr_exec *exec, const struct lr_experts_args *args)
{
    int64_t all[2] = {0, args->n_rows}, n_blocks = 0;
    struct lr_experts_args one = *args;
    if (!args->offsets) {
        one.offsets = all;
        args = &one;
    }
    for (int64_t x = 0; x < args->n_experts; x++)
        n_blocks += (args->offsets[x + 1] - args->offsets[x] + LR_GEMM_ROWS - 1) / LR_GEMM_ROWS;
    if (n_blocks == 0)
        return;
    int64_t threads = lr_pool_threads(exec->pool), wanted = 4 * threads;
    struct experts_job job = {args, 1, 1};
    if (threads == 1 || n_blocks >= wanted) {
        if (threads == 1)
            for (int64_t i = 0; i < n_blocks; i++)
                fused_task(&job, i, 0);
        else
            lr_pool_run(exec->pool, n_blocks, fused_task, &job);
        return;
    }
    int64_t groups = (wanted + n_blocks - 1) / n_blocks;
    int64_t hidden_strips = (args->gate[0].n + 63) / 64, out_strips = (args->down[0].n + 63) / 64;
    job.hidden_groups = groups < hidden_strips ? groups : hidden_strips;
    job.out_groups = groups < out_strips ? groups : out_strips;
    lr_pool_run(exec->pool, n_blocks * job.hidden_groups, hidden_task, &job);
    lr_pool_run(exec->pool, n_blocks * job.out_groups, out_task, &job);
}
