/* How a product with a packed weight is cut into tasks; shared by dense layers and experts. */
#ifndef LR_KERNELS_CPU_GEMM_H
#define LR_KERNELS_CPU_GEMM_H

#include "kernels/cpu/simd.h"
#include "kernels/ops.h"

/* A task has at most LR_GEMM_ROWS rows; a strip is LR_GEMM_STRIP panels of 16 columns. */
enum { LR_GEMM_ROWS = 96, LR_GEMM_STRIP = 4 };

struct lr_gemm_grid {
    int64_t n_rows, n_panels;
    int64_t rows_per_task, panels_per_task;
    int64_t column_tasks, n_tasks;
};

struct lr_gemm_part {
    int64_t row, rows, panel, panels;
};

/* Columns are divided only where rows alone do not keep the threads busy. */
static inline struct lr_gemm_grid lr_gemm_grid_make(int64_t n_rows, int64_t n_columns, int n_threads)
{
    struct lr_gemm_grid grid = {.n_rows = n_rows, .n_panels = (n_columns + 15) / 16, .rows_per_task = LR_GEMM_ROWS};
    int64_t row_tasks = (n_rows + LR_GEMM_ROWS - 1) / LR_GEMM_ROWS;
    int64_t wanted = n_threads > 1 ? 4 * (int64_t)n_threads : 1;
    int64_t strips = (grid.n_panels + LR_GEMM_STRIP - 1) / LR_GEMM_STRIP;
    int64_t groups = row_tasks >= wanted ? 1 : (wanted + row_tasks - 1) / row_tasks;
    if (groups > strips)
        groups = strips;
    grid.panels_per_task = (strips + groups - 1) / groups * LR_GEMM_STRIP;
    grid.column_tasks = (grid.n_panels + grid.panels_per_task - 1) / grid.panels_per_task;
    grid.n_tasks = row_tasks * grid.column_tasks;
    return grid;
}

static inline struct lr_gemm_part lr_gemm_grid_part(const struct lr_gemm_grid *grid, int64_t task)
{
    struct lr_gemm_part part = {
        .row = task / grid->column_tasks * grid->rows_per_task,
        .rows = grid->rows_per_task,
        .panel = task % grid->column_tasks * grid->panels_per_task,
        .panels = grid->panels_per_task,
    };
    if (part.rows > grid->n_rows - part.row)
        part.rows = grid->n_rows - part.row;
    if (part.panels > grid->n_panels - part.panel)
        part.panels = grid->n_panels - part.panel;
    return part;
}

/* c[i][j] = sum_k a[i][k] W[16 * panel + j][k] for `rows` rows and `panels` panels. */
void LR_ISA(lr_weight_product)(const struct lr_weight *w,
                               const float *a,
                               int64_t a_stride,
                               int64_t rows,
                               int64_t panel,
                               int64_t panels,
                               float *c,
                               int64_t c_stride);

#endif
