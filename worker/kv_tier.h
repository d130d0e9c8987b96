/* The document's keys and values in two tiers: the backend's memory, and host memory behind it.
 *
 *   slab: a layer's KV blocks of one of this worker's segments
 *
 *   device   [layer][the first slabs]   | stage | slot 0 | slot 1 |
 *   host     [layer][the other slabs]
 *
 * Which slabs are at home on the device is planned before the first token and never changes: the first of every layer.
 * Where all of them are, there is no stage, slot or host memory, and nothing here costs anything. Otherwise
 *
 *   - rows are stored on the stage, attended to from there, and copied home beside the kernels;
 *   - a walk (full attention, forks) visits the host's slabs in ascending order, layer after layer. While a slab is
 * being read in one slot the next one comes into the other, across the end of a layer and of a wave too: what comes
 * after this visit is known. Attention folds one slab after the other; several calls give the bits of one;
 *   - a gather (sparse attention, chosen pages) brings single blocks into a slot, the two slots in turn.
 *
 * The lanes (see kernels/ops.h) and their marks keep copies and kernels apart. */
#ifndef LR_WORKER_KV_TIER_H
#define LR_WORKER_KV_TIER_H

#include "worker/session_impl.h"

static inline int lr_kv_is_tiered(const struct lr_session *session)
{
    return session->tier.host != NULL;
}

/* This worker's own segment of the wave, while it is being attended to: its block i lies at + i * block_bytes. */
char *lr_kv_own(const struct lr_step *step, int64_t layer);
/* Before the first write to lr_kv_own. Settles. */
void lr_kv_own_begin(const struct lr_step *step);
/* After the last one: starts its way home. */
void lr_kv_own_save(const struct lr_step *step, int64_t layer);

/* What was saved so far is at home for the kernels' lane from here on. */
void lr_kv_settle(const struct lr_session *session);

/* A slab for the kernels that follow: where it is, in either tier. `end`: the walk goes up to this slab (of every
 * layer). Each enter has its leave before the next, after the last kernel that reads the slab was launched. */
const char *lr_kv_enter(struct lr_session *session, int64_t layer, int64_t slab, int64_t end);
void lr_kv_leave(struct lr_session *session);

/* Where the blocks [n] (absolute numbers, ascending, this worker's) are for the kernels that follow: at home on the
 * device or in the slot they are brought to. At most slot_blocks of them may be at home in host memory. Up to the
 * leave, as above. */
void lr_kv_gather(struct lr_session *session, int64_t layer, const int32_t *blocks, int64_t n, const char **where);
void lr_kv_gather_leave(struct lr_session *session);

#endif
