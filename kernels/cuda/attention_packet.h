/* What a launch of attention reads from the host: rows, lists and their blocks, in one upload where they are not many.
 *
 *   packet   | blocks of the lists | lists | rows | positions |          a list names its blocks by their offset
 *   pages    | blocks | | blocks |                                       earlier ones, by address, where they are many
 *
 * Lists longer than a page go up as they lie. Thousands of lists are a handful of copies, and nothing is allocated. */
#ifndef LR_KERNELS_CUDA_ATTENTION_PACKET_H
#define LR_KERNELS_CUDA_ATTENTION_PACKET_H

#include "kernels/cuda/attention.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LR_CUDA_PACKET_LISTS = 2048, LR_CUDA_PAGE_REFS = 8192, LR_CUDA_PACKET_POSITIONS = 4096 };

/* Host memory of the caller's, half a MiB. */
struct lr_cuda_packet {
    struct lr_cuda_list lists[LR_CUDA_PACKET_LISTS];
    struct lr_cuda_rows rows[LR_CUDA_PACKET_LISTS];
    int64_t n_lists, n_rows, n_refs;
    int64_t page_list, page_refs; /* the page holds lists from page_list on */
    char bytes[LR_CUDA_PAGE_REFS * sizeof(struct lr_kv_ref) +
               LR_CUDA_PACKET_LISTS * (sizeof(struct lr_cuda_list) + sizeof(struct lr_cuda_rows)) +
               LR_CUDA_PACKET_POSITIONS * sizeof(int64_t)]; /* the page, and at last what lies behind it */
};

void lr_cuda_packet_begin(struct lr_cuda_packet *packet);

/* Whether one more group of rows with n_lists lists fits: what one launch reads must not be more than the upload ring
 * surely holds until then. It always does in an empty packet. */
int lr_cuda_packet_fits(const struct lr_cuda_packet *packet, const struct lr_kv_list *lists, int64_t n_lists);

/* Takes in the rows and their lists: one, or one for each KV head. */
void lr_cuda_packet_add(const struct lr_exec *exec,
                        struct lr_cuda_packet *packet,
                        struct lr_cuda_rows rows,
                        const struct lr_kv_list *lists,
                        int64_t n_lists);

/* Uploads it and names it in the fold; positions: [n_positions] or NULL. */
void lr_cuda_packet_upload(const struct lr_exec *exec,
                           struct lr_cuda_packet *packet,
                           const int64_t *positions,
                           int64_t n_positions,
                           struct lr_cuda_fold *fold);

#ifdef __cplusplus
}
#endif

#endif
