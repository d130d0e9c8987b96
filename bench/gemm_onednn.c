/* oneDNN: weights reordered once into the layout the library asks for (format any), as inner product and as matmul. */
#include "bench/gemm.h"

#include <dnnl.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

enum { INNER_PRODUCT, MATMUL };

struct onednn {
    int n_threads;
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_t primitive;
    dnnl_memory_t x, w, y;
};

static void close_onednn(void *state)
{
    struct onednn *s = state;
    dnnl_memory_destroy(s->x);
    dnnl_memory_destroy(s->w);
    dnnl_memory_destroy(s->y);
    dnnl_primitive_destroy(s->primitive);
    dnnl_stream_destroy(s->stream);
    dnnl_engine_destroy(s->engine);
    free(s);
}

/* The primitive's own layout of the weights, and the weights in it. */
static int pack(struct onednn *s, const struct product *p, const_dnnl_primitive_desc_t desc, int which)
{
    dnnl_dims_t dims = {p->n, p->k};
    if (which == MATMUL) {
        dims[0] = p->k;
        dims[1] = p->n;
    }
    dnnl_memory_desc_t plain;
    const dnnl_memory_desc_t *packed = dnnl_primitive_desc_query_md(desc, dnnl_query_weights_md, 0);
    dnnl_memory_t from = NULL;
    dnnl_primitive_desc_t reorder_desc = NULL;
    dnnl_primitive_t reorder = NULL;
    int ok = dnnl_memory_desc_init_by_tag(&plain, 2, dims, dnnl_f32, which == MATMUL ? dnnl_ba : dnnl_ab) == 0 &&
             dnnl_memory_create(&from, &plain, s->engine, (void *)p->w) == 0 &&
             dnnl_memory_create(&s->w, packed, s->engine, DNNL_MEMORY_ALLOCATE) == 0 &&
             dnnl_reorder_primitive_desc_create(&reorder_desc, &plain, s->engine, packed, s->engine, NULL) == 0 &&
             dnnl_primitive_create(&reorder, reorder_desc) == 0;
    if (ok) {
        dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, s->w}};
        ok = dnnl_primitive_execute(reorder, s->stream, 2, args) == 0 && dnnl_stream_wait(s->stream) == 0;
    }
    dnnl_primitive_destroy(reorder);
    dnnl_primitive_desc_destroy(reorder_desc);
    dnnl_memory_destroy(from);
    return ok;
}

static int describe(struct onednn *s, const struct product *p, int which, dnnl_primitive_desc_t *out)
{
    dnnl_dims_t x_dims = {p->m, p->k}, y_dims = {p->m, p->n}, w_dims = {p->n, p->k}, wt_dims = {p->k, p->n};
    dnnl_memory_desc_t x, w, y;
    if (dnnl_memory_desc_init_by_tag(&x, 2, x_dims, dnnl_f32, dnnl_ab) ||
        dnnl_memory_desc_init_by_tag(&y, 2, y_dims, dnnl_f32, dnnl_ab) ||
        dnnl_memory_desc_init_by_tag(&w, 2, which == MATMUL ? wt_dims : w_dims, dnnl_f32, dnnl_format_tag_any) ||
        dnnl_memory_create(&s->x, &x, s->engine, (void *)p->x) || dnnl_memory_create(&s->y, &y, s->engine, p->y))
        return 0;
    dnnl_matmul_desc_t matmul;
    dnnl_inner_product_desc_t inner;
    if (which == MATMUL)
        return dnnl_matmul_desc_init(&matmul, &x, &w, NULL, &y) == 0 &&
               dnnl_primitive_desc_create(out, &matmul, NULL, s->engine, NULL) == 0;
    return dnnl_inner_product_forward_desc_init(&inner, dnnl_forward_inference, &x, &w, NULL, &y) == 0 &&
           dnnl_primitive_desc_create(out, &inner, NULL, s->engine, NULL) == 0;
}

static void *open_onednn(const struct racer *racer, const struct product *p)
{
    struct onednn *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->n_threads = p->n_threads;
    omp_set_num_threads(p->n_threads);
    dnnl_primitive_desc_t desc = NULL;
    int ok = dnnl_engine_create(&s->engine, dnnl_cpu, 0) == 0 &&
             dnnl_stream_create(&s->stream, s->engine, dnnl_stream_default_flags) == 0 &&
             describe(s, p, racer->which, &desc) && dnnl_primitive_create(&s->primitive, desc) == 0 &&
             pack(s, p, desc, racer->which);
    dnnl_primitive_desc_destroy(desc);
    if (ok)
        return s;
    close_onednn(s);
    return NULL;
}

static void run_onednn(void *state)
{
    struct onednn *s = state;
    omp_set_num_threads(s->n_threads);
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, s->x}, {DNNL_ARG_WEIGHTS, s->w}, {DNNL_ARG_DST, s->y}};
    dnnl_primitive_execute(s->primitive, s->stream, 3, args);
    dnnl_stream_wait(s->stream);
}

int onednn_racers(struct racer *racers, int avx2)
{
    if (avx2)
        dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx2);
    const dnnl_version_t *v = dnnl_version();
    static const char *const names[] = {"inner", "matmul"};
    for (int i = 0; i < 2; i++) {
        racers[i] = (struct racer){.which = i, .open = open_onednn, .run = run_onednn, .close = close_onednn};
        snprintf(racers[i].name, sizeof racers[i].name, "oneDNN %d.%d %s", v->major, v->minor, names[i]);
    }
    return 2;
}
