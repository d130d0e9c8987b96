#include "worker/kv_tier.h"

/* Of the lanes: a slot has been filled, has been read; the stage has been filled, has been copied home. */
enum { MARK_FILLED = 0, MARK_READ = LR_KV_SLOTS, MARK_STORED = 2 * LR_KV_SLOTS, MARK_SAVED };

_Static_assert((int)MARK_SAVED < (int)LR_MARKS, "marks for both slots and the stage");

/* ---- my own segment ---- */

static int64_t own_slab(const struct lr_step *step)
{
    return step->wave->index;
}

static int own_is_staged(const struct lr_step *step)
{
    const struct lr_session *session = step->session;
    return lr_kv_is_tiered(session) && step->n_rows > 0 && own_slab(step) >= session->tier.resident_slabs;
}

static char *own_home(const struct lr_step *step, int64_t layer)
{
    int64_t start = lr_wave_start(step->wave, step->session->engine->comm->rank);
    return lr_session_block(step->session, layer, start / LR_KV_BLOCK_TOKENS);
}

char *lr_kv_own(const struct lr_step *step, int64_t layer)
{
    return own_is_staged(step) ? step->session->tier.stage : own_home(step, layer);
}

void lr_kv_settle(const struct lr_session *session)
{
    const struct lr_engine *engine = session->engine;
    if (lr_kv_is_tiered(session))
        engine->ops->memory.await(&engine->exec, LR_LANE_KERNELS, MARK_SAVED);
}

void lr_kv_own_begin(const struct lr_step *step)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    lr_kv_settle(session);
    /* keys that do not exist yet are zero, whatever lay on the stage before */
    if (own_is_staged(step) && step->n_rows % LR_KV_BLOCK_TOKENS != 0)
        engine->ops->memory.zero(
            &engine->exec, session->tier.stage + (size_t)(step->n_rows / LR_KV_BLOCK_TOKENS) * session->block_bytes,
            session->block_bytes);
}

void lr_kv_own_save(const struct lr_step *step, int64_t layer)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_memory_ops *memory = &engine->ops->memory;
    if (!own_is_staged(step))
        return;
    memory->mark(&engine->exec, LR_LANE_KERNELS, MARK_STORED);
    memory->await(&engine->exec, LR_LANE_ASIDE, MARK_STORED);
    memory->copy_aside(&engine->exec, own_home(step, layer), session->tier.stage,
                       (size_t)lr_ceil_div(step->n_rows, LR_KV_BLOCK_TOKENS) * session->block_bytes);
    memory->mark(&engine->exec, LR_LANE_ASIDE, MARK_SAVED);
}

/* ---- walks ---- */

static int next_slot(struct lr_kv_tier *tier)
{
    int slot = tier->next_slot;
    tier->next_slot = (slot + 1) % LR_KV_SLOTS;
    return slot;
}

/* A slab starts on its way, into the slot that was read first. */
static void start_visit(struct lr_session *session, struct lr_kv_visit visit)
{
    const struct lr_engine *engine = session->engine;
    const struct lr_memory_ops *memory = &engine->ops->memory;
    struct lr_kv_tier *tier = &session->tier;
    int64_t first = visit.slab * tier->slab_blocks;
    int64_t n = lr_min_i64(tier->slab_blocks, session->local_blocks - first);
    visit.slot = next_slot(tier);
    memory->await(&engine->exec, LR_LANE_ASIDE, MARK_READ + visit.slot);
    memory->copy_aside(&engine->exec, tier->slots[visit.slot], lr_session_local_block(session, visit.layer, first),
                       (size_t)n * session->block_bytes);
    memory->mark(&engine->exec, LR_LANE_ASIDE, MARK_FILLED + visit.slot);
    tier->visits[tier->n_visits++] = visit;
}

/* What follows a visit: the layer's next slab, or the next layer's first one, of the next wave or step where that is
 * the first layer. */
static struct lr_kv_visit visit_after(const struct lr_session *session, struct lr_kv_visit visit)
{
    const struct lr_kv_tier *tier = &session->tier;
    if (visit.slab + 1 < tier->walk_end)
        return (struct lr_kv_visit){.layer = visit.layer, .slab = visit.slab + 1};
    return (struct lr_kv_visit){.layer = (visit.layer + 1) % session->engine->model.dims.n_attention_layers,
                                .slab = tier->resident_slabs};
}

static void drop_first_visit(struct lr_kv_tier *tier)
{
    tier->n_visits--;
    for (int i = 0; i < tier->n_visits; i++)
        tier->visits[i] = tier->visits[i + 1];
}

const char *lr_kv_enter(struct lr_session *session, int64_t layer, int64_t slab, int64_t end)
{
    const struct lr_engine *engine = session->engine;
    struct lr_kv_tier *tier = &session->tier;
    if (slab < tier->resident_slabs)
        return lr_session_local_block(session, layer, slab * tier->slab_blocks);
    tier->walk_end = end;
    while (tier->n_visits > 0 && (tier->visits[0].layer != layer || tier->visits[0].slab != slab))
        drop_first_visit(tier); /* a walk that ended early, or a longer one than the last */
    if (tier->n_visits == 0)
        start_visit(session, (struct lr_kv_visit){.layer = layer, .slab = slab});
    while (tier->n_visits < LR_KV_SLOTS)
        start_visit(session, visit_after(session, tier->visits[tier->n_visits - 1]));
    tier->entered = 1;
    engine->ops->memory.await(&engine->exec, LR_LANE_KERNELS, MARK_FILLED + tier->visits[0].slot);
    return tier->slots[tier->visits[0].slot];
}

void lr_kv_leave(struct lr_session *session)
{
    const struct lr_engine *engine = session->engine;
    struct lr_kv_tier *tier = &session->tier;
    if (!tier->entered)
        return;
    tier->entered = 0;
    engine->ops->memory.mark(&engine->exec, LR_LANE_KERNELS, MARK_READ + tier->visits[0].slot);
    drop_first_visit(tier);
    start_visit(session, visit_after(session, tier->visits[tier->n_visits - 1]));
}

/* ---- gathers ---- */

void lr_kv_gather(struct lr_session *session, int64_t layer, const int32_t *blocks, int64_t n, const char **where)
{
    const struct lr_engine *engine = session->engine;
    const struct lr_memory_ops *memory = &engine->ops->memory;
    struct lr_kv_tier *tier = &session->tier;
    int64_t n_away = 0;
    for (int64_t i = 0; i < n; i++) {
        where[i] = lr_session_block(session, layer, blocks[i]);
        n_away += lr_session_block_is_away(session, blocks[i]);
    }
    tier->entered = 0;
    if (n_away == 0)
        return;
    tier->n_visits = 0; /* their slots are taken */
    tier->entered = 1;
    int slot = tier->gathered = next_slot(tier);
    char *to = tier->slots[slot];
    memory->await(&engine->exec, LR_LANE_ASIDE, MARK_READ + slot);
    for (int64_t i = 0; i < n; i++) {
        if (!lr_session_block_is_away(session, blocks[i]))
            continue;
        /* neighbours at home come in one copy */
        int64_t end = i + 1;
        while (end < n && lr_session_block_is_away(session, blocks[end]) &&
               where[end] == where[i] + (size_t)(end - i) * session->block_bytes)
            end++;
        memory->copy_aside(&engine->exec, to, where[i], (size_t)(end - i) * session->block_bytes);
        for (; i < end; i++, to += session->block_bytes)
            where[i] = to;
        i--;
    }
    memory->mark(&engine->exec, LR_LANE_ASIDE, MARK_FILLED + slot);
    memory->await(&engine->exec, LR_LANE_KERNELS, MARK_FILLED + slot);
}

void lr_kv_gather_leave(struct lr_session *session)
{
    const struct lr_engine *engine = session->engine;
    struct lr_kv_tier *tier = &session->tier;
    if (!tier->entered)
        return;
    tier->entered = 0;
    engine->ops->memory.mark(&engine->exec, LR_LANE_KERNELS, MARK_READ + tier->gathered);
}
