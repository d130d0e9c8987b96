/* Gathering rows, lists and blocks for a launch of attention. */
#include "kernels/cuda/attention_packet.h"

#include <string.h>

/* The blocks of one launch: well within the ring, beside the small arrays that go up with them. */
static const int64_t max_refs = LR_CUDA_MAX_UPLOAD_BYTES / 2 / sizeof(struct lr_kv_ref);

void lr_cuda_packet_begin(struct lr_cuda_packet *packet)
{
    packet->n_lists = packet->n_rows = packet->n_refs = 0;
    packet->page_list = packet->page_refs = 0;
}

int lr_cuda_packet_fits(const struct lr_cuda_packet *packet, const struct lr_kv_list *lists, int64_t n_lists)
{
    if (packet->n_rows == 0)
        return 1;
    int64_t n_refs = packet->n_refs;
    for (int64_t i = 0; i < n_lists; i++)
        n_refs += lists[i].n_refs;
    return n_refs <= max_refs && packet->n_lists + n_lists <= LR_CUDA_PACKET_LISTS &&
           packet->n_rows < LR_CUDA_PACKET_LISTS;
}

static int16_t is_dense(const struct lr_kv_list *list)
{
    for (int64_t i = 0; i < list->n_refs; i++)
        if (list->refs[i].whole || list->refs[i].position != list->refs[0].position + i * LR_KV_BLOCK_TOKENS)
            return 0;
    return 1;
}

static uint64_t upload_refs(const struct lr_exec *exec, const void *refs, int64_t n)
{
    return reinterpret_cast<uint64_t>(lr_cuda_upload(exec, refs, static_cast<size_t>(n) * sizeof(struct lr_kv_ref)));
}

/* The page is full: it goes up on its own, and its lists name their blocks by address. */
static void flush_page(const struct lr_exec *exec, struct lr_cuda_packet *packet)
{
    const uint64_t base = upload_refs(exec, packet->bytes, packet->page_refs);
    for (int64_t i = packet->page_list; i < packet->n_lists; i++)
        if (packet->lists[i].relative) {
            packet->lists[i].refs += base;
            packet->lists[i].relative = 0;
        }
    packet->page_list = packet->n_lists;
    packet->page_refs = 0;
}

static void add_list(const struct lr_exec *exec, struct lr_cuda_packet *packet, const struct lr_kv_list *list)
{
    const int64_t n = list->n_refs;
    struct lr_cuda_list out = {0, static_cast<int32_t>(n), is_dense(list), 0};
    if (n > LR_CUDA_PAGE_REFS) {
        out.refs = upload_refs(exec, list->refs, n);
    } else if (n > 0) {
        if (packet->page_refs + n > LR_CUDA_PAGE_REFS)
            flush_page(exec, packet);
        out.refs = static_cast<uint64_t>(packet->page_refs) * sizeof *list->refs;
        out.relative = 1;
        memcpy(packet->bytes + out.refs, list->refs, static_cast<size_t>(n) * sizeof *list->refs);
        packet->page_refs += n;
    }
    packet->lists[packet->n_lists++] = out;
    packet->n_refs += n;
}

void lr_cuda_packet_add(const struct lr_exec *exec,
                        struct lr_cuda_packet *packet,
                        struct lr_cuda_rows rows,
                        const struct lr_kv_list *lists,
                        int64_t n_lists)
{
    rows.list = static_cast<int32_t>(packet->n_lists);
    rows.list_step = n_lists > 1;
    packet->rows[packet->n_rows++] = rows;
    for (int64_t i = 0; i < n_lists; i++)
        add_list(exec, packet, &lists[i]);
}

static size_t append(struct lr_cuda_packet *packet, size_t *end, const void *from, size_t size_bytes)
{
    const size_t at = *end;
    memcpy(packet->bytes + at, from, size_bytes);
    *end += size_bytes;
    return at;
}

void lr_cuda_packet_upload(const struct lr_exec *exec,
                           struct lr_cuda_packet *packet,
                           const int64_t *positions,
                           int64_t n_positions,
                           struct lr_cuda_fold *fold)
{
    const size_t position_bytes = positions == NULL ? 0 : static_cast<size_t>(n_positions) * sizeof *positions;
    const bool inside = position_bytes > 0 && n_positions <= LR_CUDA_PACKET_POSITIONS;
    if (position_bytes > 0 && !inside)
        fold->positions = static_cast<const int64_t *>(lr_cuda_upload(exec, positions, position_bytes));
    size_t end = static_cast<size_t>(packet->page_refs) * sizeof(struct lr_kv_ref);
    const size_t lists =
        append(packet, &end, packet->lists, static_cast<size_t>(packet->n_lists) * sizeof packet->lists[0]);
    const size_t rows =
        append(packet, &end, packet->rows, static_cast<size_t>(packet->n_rows) * sizeof packet->rows[0]);
    const size_t at = inside ? append(packet, &end, positions, position_bytes) : 0;
    const char *base = static_cast<const char *>(lr_cuda_upload(exec, packet->bytes, end));
    fold->packet = base;
    fold->lists = reinterpret_cast<const struct lr_cuda_list *>(base + lists);
    fold->rows = reinterpret_cast<const struct lr_cuda_rows *>(base + rows);
    fold->n_groups = packet->n_rows;
    if (inside)
        fold->positions = reinterpret_cast<const int64_t *>(base + at);
}
