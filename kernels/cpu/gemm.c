/* Dense layers: y = act(x W^T + bias), W packed in panels of 16 of its rows (kernels/ops.h).
 *
 * Rows of x are broadcast straight from where they lie: packing them would cost more than it saves at the widths of a
 * layer. A task owns up to 96 rows and a group of panels and walks it in strips of 64 columns, so that a strip's result
 * is still in L1 when bias, activation and residual come to it. */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/cpu.h"

#include "base/pool.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/tile.h"

#define TILE(rows, panels) tile_multiply(&at, rows, panels, dtype)

LR_INLINE struct lr_tile tile_at(const struct lr_tile *t, int64_t row, int64_t panel, enum lr_dtype dtype)
{
    struct lr_tile at = *t;
    at.a += row * t->a_row;
    at.b = (const char *)t->b + (size_t)(panel * t->b_panel) * lr_dtype_bytes(dtype);
    at.c += row * t->c_row + panel * t->c_panel;
    return at;
}

/* `panels` panels in steps of `wide`, then one by one */
#define THIN_ROWS(n, wide)                                                                                             \
    if (rows - row >= (n)) {                                                                                           \
        panel = 0;                                                                                                     \
        for (; panel + (wide) <= panels; panel += (wide)) {                                                            \
            struct lr_tile at = tile_at(t, row, panel, dtype);                                                         \
            TILE(n, wide);                                                                                             \
        }                                                                                                              \
        for (; panel < panels; panel++) {                                                                              \
            struct lr_tile at = tile_at(t, row, panel, dtype);                                                         \
            TILE(n, 1);                                                                                                \
        }                                                                                                              \
        row += (n);                                                                                                    \
    }

LR_INLINE void product(const struct lr_tile *t, int64_t rows, int64_t panels, const enum lr_dtype dtype)
{
    int64_t full = rows - rows % LR_TILE_ROWS, panel = 0;
    for (; panel + LR_TILE_PANELS <= panels; panel += LR_TILE_PANELS)
        for (int64_t row = 0; row < full; row += LR_TILE_ROWS) {
            struct lr_tile at = tile_at(t, row, panel, dtype);
            TILE(LR_TILE_ROWS, LR_TILE_PANELS);
        }
    for (; panel < panels; panel++)
        for (int64_t row = 0; row < full; row += LR_TILE_ROWS) {
            struct lr_tile at = tile_at(t, row, panel, dtype);
            TILE(LR_TILE_ROWS, 1);
        }
    int64_t row = full;
#if defined(LR_SIMD_V4)
    THIN_ROWS(8, 2)
    THIN_ROWS(4, 4)
    THIN_ROWS(2, 8)
    THIN_ROWS(1, 8)
#else
    THIN_ROWS(4, 1)
    THIN_ROWS(2, 2)
    THIN_ROWS(1, 4)
#endif
}

void LR_ISA(lr_tile_product)(const struct lr_tile *t, int64_t rows, int64_t panels, enum lr_dtype dtype)
{
    if (dtype == LR_F32)
        product(t, rows, panels, LR_F32);
    else if (dtype == LR_BF16)
        product(t, rows, panels, LR_BF16);
    else
        product(t, rows, panels, LR_F16);
}

size_t LR_ISA(lr_weight_bytes)(int64_t n, int64_t k, enum lr_dtype dtype)
{
    return (size_t)((n + 15) / 16 * 16) * (size_t)k * lr_dtype_bytes(dtype);
}

void LR_ISA(lr_weight_pack)(struct lr_weight *w, int64_t row, int64_t n_rows, const void *rows)
{
    size_t element = lr_dtype_bytes(w->dtype);
    for (int64_t r = 0; r < n_rows; r++) {
        int64_t n = row + r;
        char *to = (char *)w->data + (size_t)(n / 16 * w->k * 16 + n % 16) * element;
        const char *from = (const char *)rows + (size_t)(r * w->k) * element;
        if (element == 4)
            for (int64_t k = 0; k < w->k; k++)
                memcpy(to + k * 64, from + k * 4, 4);
        else
            for (int64_t k = 0; k < w->k; k++)
                memcpy(to + k * 32, from + k * 2, 2);
    }
}

/* Weights of 16 bits are widened once for all rows of a task where there are rows enough to pay for it: blocks of
 * K_BLOCK, so that two panels stay near. */
enum { K_BLOCK = 256, WIDE_ROWS = 4 * LR_TILE_ROWS };

static void widen(const struct lr_weight *w, const char *from, int64_t panels, int64_t k, float *to)
{
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < k; i++)
            v_store(to + (p * K_BLOCK + i) * 16, tile_load_b(from, (p * w->k + i) * 16, w->dtype));
}

static void wide_product(const struct lr_weight *w, const struct lr_tile *t, int64_t rows, int64_t panels)
{
    float wide[LR_TILE_PANELS * K_BLOCK * 16] __attribute__((aligned(64)));
    size_t element = lr_dtype_bytes(w->dtype);
    for (int64_t p = 0; p < panels; p += LR_TILE_PANELS)
        for (int64_t first = 0; first < w->k; first += K_BLOCK) {
            int64_t k = w->k - first < K_BLOCK ? w->k - first : K_BLOCK;
            int64_t n = panels - p < LR_TILE_PANELS ? panels - p : LR_TILE_PANELS;
            struct lr_tile block = *t;
            widen(w, (const char *)t->b + (size_t)(p * w->k + first) * 16 * element, n, k, wide);
            block.a += first;
            block.b = wide;
            block.b_panel = K_BLOCK * 16;
            block.c += p * 16;
            block.k = k;
            block.load_c = first > 0;
            product(&block, rows, n, LR_F32);
        }
}

void LR_ISA(lr_weight_product)(const struct lr_weight *w,
                               const float *a,
                               int64_t a_stride,
                               int64_t rows,
                               int64_t panel,
                               int64_t panels,
                               float *c,
                               int64_t c_stride)
{
    struct lr_tile t = {
        .a = a,
        .a_row = a_stride,
        .a_k = 1,
        .b = (const char *)w->data + (size_t)(panel * w->k * 16) * lr_dtype_bytes(w->dtype),
        .b_panel = w->k * 16,
        .b_k = 16,
        .c = c,
        .c_row = c_stride,
        .c_panel = 16,
        .k = w->k,
    };
    if (w->dtype != LR_F32 && rows >= WIDE_ROWS)
        wide_product(w, &t, rows, panels);
    else if (w->dtype == LR_F32)
        product(&t, rows, panels, LR_F32); /* inlined: most strides are constants here */
    else
        LR_ISA(lr_tile_product)(&t, rows, panels, w->dtype);
}

struct gemm_job {
    const struct lr_gemm_args *args;
    struct lr_gemm_grid grid;
};

/* product [rows][c_stride] -> y, columns [column, column + width) of it */
static void finish_strip(const struct lr_gemm_args *g,
                         const float *product,
                         int64_t product_stride,
                         int64_t row,
                         int64_t rows,
                         int64_t column,
                         int64_t width)
{
    for (int64_t i = 0; i < rows; i++) {
        float *y = (float *)g->y + (row + i) * g->y_stride + column;
        const float *x = product + i * product_stride;
        for (int64_t j = 0; j < width; j += 16) {
            int64_t n = width - j < 16 ? width - j : 16;
            lr_v16 v = v_load(x + j);
            if (g->bias)
                v = v_add(v, n == 16 ? v_load(g->bias + column + j) : v_load_part(g->bias + column + j, n, 0.0f));
            v = v_activate(v, g->activation);
            if (g->accumulate)
                v = v_add(n == 16 ? v_load(y + j) : v_load_part(y + j, n, 0.0f), v);
            if (n == 16)
                v_store(y + j, v);
            else
                v_store_part(y + j, n, v);
        }
    }
}

static void gemm_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct gemm_job *job = context;
    const struct lr_gemm_args *g = job->args;
    struct lr_gemm_part part = lr_gemm_grid_part(&job->grid, task);
    const float *a = (const float *)g->a + part.row * g->a_stride;
    int plain = !g->bias && g->activation == LR_ACT_NONE && !g->accumulate;
    float strip[LR_GEMM_ROWS * LR_GEMM_STRIP * 16];

    for (int64_t p = 0; p < part.panels; p += LR_GEMM_STRIP) {
        int64_t panel = part.panel + p, column = panel * 16;
        int64_t panels = part.panels - p < LR_GEMM_STRIP ? part.panels - p : LR_GEMM_STRIP;
        int64_t width = g->w->n - column < panels * 16 ? g->w->n - column : panels * 16;
        if (width == panels * 16 && !g->accumulate) {
            float *y = (float *)g->y + part.row * g->y_stride + column;
            LR_ISA(lr_weight_product)(g->w, a, g->a_stride, part.rows, panel, panels, y, g->y_stride);
            if (!plain)
                finish_strip(g, y, g->y_stride, part.row, part.rows, column, width);
        } else {
            LR_ISA(lr_weight_product)(g->w, a, g->a_stride, part.rows, panel, panels, strip, LR_GEMM_STRIP * 16);
            finish_strip(g, strip, LR_GEMM_STRIP * 16, part.row, part.rows, column, width);
        }
    }
}

void LR_ISA(lr_gemm)(const struct lr_exec *exec, const struct lr_gemm_args *args)
{
    if (args->n_rows == 0)
        return;
    struct gemm_job job = {args, lr_gemm_grid_make(args->n_rows, args->w->n, lr_pool_threads(exec->pool))};
    if (job.grid.n_tasks == 1 || args->n_rows * args->w->n * args->w->k < 32768)
        for (int64_t i = 0; i < job.grid.n_tasks; i++)
            gemm_task(&job, i, 0);
    else
        lr_pool_run(exec->pool, job.grid.n_tasks, gemm_task, &job);
}
