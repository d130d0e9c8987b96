/* Lists of KV blocks on their way from the host to the device.
 *
 *   host     lists[0].refs -> r r r r    lists[1].refs -> r r    ...
 *   device   table: [ {refs, n}, {refs, n}, ... ]        pages:  | r r r r r r ... |  | r r ... |
 *
 * Short lists are gathered in pages and uploaded page by page, long ones go up as they lie: thousands of lists are a
 * handful of copies, and nothing is allocated. */
#ifndef LR_KERNELS_CUDA_ATTENTION_LISTS_H
#define LR_KERNELS_CUDA_ATTENTION_LISTS_H

#include "kernels/cuda/attention.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LR_CUDA_TABLE_LISTS = 2048, LR_CUDA_PAGE_REFS = 4096 };

/* Host memory of the caller's, about 130 KiB. */
struct lr_cuda_list_table {
    struct lr_cuda_list lists[LR_CUDA_TABLE_LISTS];
    int64_t n_lists, n_refs;
    int64_t page_list, page_refs; /* the page holds lists from page_list on */
    struct lr_kv_ref page[LR_CUDA_PAGE_REFS];
};

void lr_cuda_table_begin(struct lr_cuda_list_table *table);

/* Whether n_lists more lists fit: what one launch reads must not be more than the upload ring surely holds until then.
 * They always do in an empty table. */
int lr_cuda_table_fits(const struct lr_cuda_list_table *table, const struct lr_kv_list *lists, int64_t n_lists);

/* Takes the lists in; returns the number of the first one in the table. */
int32_t lr_cuda_table_add(const struct lr_exec *exec, struct lr_cuda_list_table *table, const struct lr_kv_list *lists,
                          int64_t n_lists);

/* Uploads what is left and the table itself. */
const struct lr_cuda_list *lr_cuda_table_upload(const struct lr_exec *exec, struct lr_cuda_list_table *table);

#ifdef __cplusplus
}
#endif

#endif
