/* Gathering lists of KV blocks for the device. */
#include "kernels/cuda/attention_lists.h"

#include <string.h>

/* The blocks of one launch: well within the ring, beside the small arrays that go up with them. */
static const int64_t max_refs = LR_CUDA_MAX_UPLOAD_BYTES / 2 / sizeof(struct lr_kv_ref);

void lr_cuda_table_begin(struct lr_cuda_list_table *table)
{
    table->n_lists = 0;
    table->n_refs = 0;
    table->page_list = 0;
    table->page_refs = 0;
}

int lr_cuda_table_fits(const struct lr_cuda_list_table *table, const struct lr_kv_list *lists, int64_t n_lists)
{
    if (table->n_lists == 0)
        return 1;
    int64_t n_refs = table->n_refs;
    for (int64_t i = 0; i < n_lists; i++)
        n_refs += lists[i].n_refs;
    return n_refs <= max_refs && table->n_lists + n_lists <= LR_CUDA_TABLE_LISTS;
}

static int is_dense(const struct lr_kv_list *list)
{
    for (int64_t i = 0; i < list->n_refs; i++)
        if (list->refs[i].whole || list->refs[i].position != list->refs[0].position + i * LR_KV_BLOCK_TOKENS)
            return 0;
    return 1;
}

static const struct lr_kv_ref *upload_refs(const struct lr_exec *exec, const struct lr_kv_ref *refs, int64_t n)
{
    return static_cast<const struct lr_kv_ref *>(lr_cuda_upload(exec, refs, static_cast<size_t>(n) * sizeof *refs));
}

/* Until the page goes up, its lists point into it. */
static void flush_page(const struct lr_exec *exec, struct lr_cuda_list_table *table)
{
    if (table->page_refs == 0)
        return;
    const struct lr_kv_ref *base = upload_refs(exec, table->page, table->page_refs);
    for (int64_t i = table->page_list; i < table->n_lists; i++)
        if (table->lists[i].refs >= table->page && table->lists[i].refs < table->page + LR_CUDA_PAGE_REFS)
            table->lists[i].refs = base + (table->lists[i].refs - table->page);
    table->page_list = table->n_lists;
    table->page_refs = 0;
}

int32_t lr_cuda_table_add(const struct lr_exec *exec, struct lr_cuda_list_table *table, const struct lr_kv_list *lists,
                          int64_t n_lists)
{
    const int64_t first = table->n_lists;
    for (int64_t i = 0; i < n_lists; i++) {
        const int64_t n = lists[i].n_refs;
        struct lr_cuda_list out = {NULL, static_cast<int32_t>(n), is_dense(&lists[i])};
        if (n > LR_CUDA_PAGE_REFS) {
            out.refs = upload_refs(exec, lists[i].refs, n);
        } else if (n > 0) {
            if (table->page_refs + n > LR_CUDA_PAGE_REFS)
                flush_page(exec, table);
            out.refs = table->page + table->page_refs;
            memcpy(table->page + table->page_refs, lists[i].refs, static_cast<size_t>(n) * sizeof *table->page);
            table->page_refs += n;
        }
        table->lists[table->n_lists++] = out;
        table->n_refs += n;
    }
    return static_cast<int32_t>(first);
}

const struct lr_cuda_list *lr_cuda_table_upload(const struct lr_exec *exec, struct lr_cuda_list_table *table)
{
    flush_page(exec, table);
    return static_cast<const struct lr_cuda_list *>(
        lr_cuda_upload(exec, table->lists, static_cast<size_t>(table->n_lists) * sizeof table->lists[0]));
}
