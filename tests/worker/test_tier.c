/* Keys and values in two tiers: the division of the memory, the same bits, and the order of the two lanes.
 *
 * The session runs on a table whose lane aside is late: a copy happens only when the kernels' lane awaits a mark behind
 * it. So rows that are read without waiting are the wrong ones. The other direction is checked by a clock: a slot or
 * the stage may be written only when the lane aside has awaited a mark of the kernels' lane behind their last readers,
 * and the stage saved only behind its last store. */
#include "tests/worker/fixtures.h"
#include "worker/session_impl.h"

#include "base/memory.h"

enum { N = 1500, SEGMENT = 128, FORK_TOKENS = 40, MOST_PENDING = 4096 };

static struct lr_engine engine;
static struct lr_comm comm;
static int32_t ids[N + FORK_TOKENS];
static const struct lr_kernel_ops *plain;
static struct lr_kernel_ops late;
static struct lr_session *watched;

/* ---- the late lane ---- */

static struct {
    void *to;
    const void *from;
    size_t size_bytes;
} pending[MOST_PENDING];
static int n_pending, n_done, n_copies;
static int behind[LR_MARKS];                            /* pending copies before the mark of the lane aside */
static int64_t clock_now;                               /* of the kernels' lane */
static int64_t marked[LR_MARKS];                        /* its time at the mark */
static int64_t seen;                                    /* up to which the lane aside has waited */
static int64_t read_last[LR_KV_SLOTS + 1], stored_last; /* slots, then the stage */

static int within(const void *at, const char *area, int64_t n_blocks)
{
    return (const char *)at >= area && (const char *)at < area + (size_t)n_blocks * watched->block_bytes;
}

/* The slot, or LR_KV_SLOTS for the stage, or -1. */
static int area_of(const void *at)
{
    const struct lr_kv_tier *tier = &watched->tier;
    for (int i = 0; i < LR_KV_SLOTS; i++)
        if (within(at, tier->slots[i], tier->slot_blocks))
            return i;
    return within(at, tier->stage, tier->slab_blocks) ? LR_KV_SLOTS : -1;
}

static void copy_aside(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes)
{
    (void)exec;
    assert_true(n_pending < MOST_PENDING);
    int target = area_of(to);
    if (target >= 0)
        assert_true(read_last[target] <= seen); /* nobody still reads what is overwritten */
    else
        assert_true(area_of(from) == LR_KV_SLOTS && stored_last <= seen); /* all rows are on the stage */
    pending[n_pending].to = to;
    pending[n_pending].from = from;
    pending[n_pending++].size_bytes = size_bytes;
    n_copies++;
}

static void mark(const struct lr_exec *exec, enum lr_lane lane, int index)
{
    (void)exec;
    if (lane == LR_LANE_KERNELS)
        marked[index] = clock_now;
    else
        behind[index] = n_pending;
}

static void await(const struct lr_exec *exec, enum lr_lane lane, int index)
{
    if (lane == LR_LANE_ASIDE) {
        seen = marked[index] > seen ? marked[index] : seen;
        return;
    }
    for (; n_done < behind[index]; n_done++)
        plain->memory.copy(exec, pending[n_done].to, pending[n_done].from, pending[n_done].size_bytes);
}

static void note_reads(const struct lr_kv_list *lists, int64_t n_lists)
{
    for (int64_t i = 0; i < n_lists; i++)
        for (int64_t j = 0; j < lists[i].n_refs; j++) {
            int area = area_of(lists[i].refs[j].data);
            if (area >= 0)
                read_last[area] = clock_now;
        }
}

static void attention(const struct lr_exec *exec, const struct lr_attention_args *args)
{
    clock_now++;
    note_reads(args->lists, args->n_lists);
    plain->attention(exec, args);
}

static void partials(const struct lr_exec *exec, const struct lr_partials_args *args)
{
    clock_now++;
    for (int64_t i = 0; i < args->n_items; i++)
        note_reads(args->items[i].lists, args->items[i].n_lists);
    plain->partials(exec, args);
}

static void kv_store(const struct lr_exec *exec, const struct lr_kv_store_args *args)
{
    clock_now++;
    if (area_of(args->blocks[0]) == LR_KV_SLOTS)
        stored_last = clock_now;
    plain->kv_store(exec, args);
}

static void start_late_lane(struct lr_session *session)
{
    watched = session;
    n_pending = n_done = n_copies = 0;
    clock_now = seen = stored_last = 0;
    memset(behind, 0, sizeof behind);
    memset(marked, 0, sizeof marked);
    memset(read_last, 0, sizeof read_last);
    late = *plain;
    late.attention = attention;
    late.partials = partials;
    late.kv_store = kv_store;
    late.memory.copy_aside = copy_aside;
    late.memory.mark = mark;
    late.memory.await = await;
    engine.ops = &late;
}

/* ---- the same bits ---- */

struct kept {
    float *logits; /* [N + 1 answer, vocab] */
    int64_t n;
};

static int64_t vocab(void)
{
    return engine.model.dims.vocab;
}

static enum lr_status keep(void *context, int64_t position, const float *logits, struct lr_error *sink_err)
{
    struct kept *kept = context;
    (void)sink_err;
    assert_true(position >= 0 && position < N);
    memcpy(kept->logits + position * vocab(), logits, (size_t)vocab() * sizeof *logits);
    kept->n++;
    return LR_OK;
}

static struct lr_session_options options_of(enum lr_attention_mode attention, int64_t top_k, int64_t pages)
{
    return (struct lr_session_options){.segment_tokens = SEGMENT,
                                       .attention = attention,
                                       .window = 300,
                                       .sinks = 128,
                                       .top_k_blocks = top_k,
                                       .decode_pages = pages,
                                       .kv_dtype = LR_BF16,
                                       .max_tokens = N,
                                       .max_forks = 3,
                                       .max_fork_tokens = FORK_TOKENS};
}

/* Logits of the document, and behind it of two forks' last tokens, extended together twice. */
static struct kept read_all(struct lr_session_options options, int64_t *host_slabs)
{
    struct kept kept = {.logits = calloc((size_t)((N + 4) * vocab()), sizeof(float))};
    struct lr_session_hooks hooks = {.on_logits = keep, .logits_context = &kept};
    struct lr_session *session;
    assert_ok(lr_session_open(&engine, &options, &hooks, &session, err));
    *host_slabs = session->plan.host_slabs;
    if (*host_slabs > 0)
        start_late_lane(session);
    assert_ok(lr_session_append(session, ids, N, err));
    assert_ok(lr_session_seal(session, err));
    assert_int_equal(kept.n, N);
    struct lr_fork_input inputs[2] = {{.ids = ids + N, .n_ids = FORK_TOKENS - 9}, {.ids = ids + N + 3, .n_ids = 5}};
    for (int i = 0; i < 2; i++)
        assert_ok(lr_session_fork(session, &inputs[i].fork, err));
    for (int turn = 0; turn < 2; turn++) {
        struct lr_fork_output output = {.logits = kept.logits + (N + 2 * turn) * vocab()};
        assert_ok(lr_forks_extend(session, inputs, 2, &output, err));
        for (int i = 0; i < 2; i++)
            inputs[i].n_ids = 1 + i;
    }
    if (*host_slabs > 0)
        assert_true(n_copies > 0);
    engine.ops = plain;
    lr_session_close(session);
    return kept;
}

static void tiers_do_not_matter(void **state)
{
    (void)state;
    static const struct {
        enum lr_attention_mode attention;
        int64_t top_k, pages;
    } cases[] = {{LR_ATTENTION_FULL, 0, 0},   {LR_ATTENTION_FULL, 0, 3},   {LR_ATTENTION_SPARSE, 0, 0},
                 {LR_ATTENTION_SPARSE, 2, 0}, {LR_ATTENTION_SPARSE, 0, 5}, {LR_ATTENTION_SPARSE, 3, 2}};
    int n_compared = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct lr_session_options options = options_of(cases[i].attention, cases[i].top_k, cases[i].pages);
        int64_t host_slabs;
        struct kept one = read_all(options, &host_slabs);
        assert_int_equal(host_slabs, 0);
        size_t bytes = (size_t)((N + 4) * vocab()) * sizeof(float);
        static const int64_t slabs_away[] = {12, 10, 3};
        struct lr_memory_plan whole, plan;
        lr_session_plan(&engine.model.dims, plain, 0, 1, 1, &options, &whole);
        for (size_t j = 0; j < sizeof slabs_away / sizeof slabs_away[0]; j++) {
            options.host_slabs = slabs_away[j];
            lr_session_plan(&engine.model.dims, plain, 0, 1, 1, &options, &plan);
            options.kv_device_bytes = plan.kv_bytes;
            if (plan.kv_bytes >= whole.kv_bytes)
                continue; /* stage and slots would take more than they save */
            struct kept two = read_all(options, &host_slabs);
            assert_int_equal(host_slabs, slabs_away[j]);
            assert_memory_equal(one.logits, two.logits, bytes);
            free(two.logits);
            n_compared++;
        }
        free(one.logits);
    }
    print_message("%d divisions compared\n", n_compared);
    assert_true(n_compared >= 10);
}

/* ---- the division, and the plan kept ---- */

static void memory_is_divided_as_planned(void **state)
{
    (void)state;
    struct lr_session_options options = options_of(LR_ATTENTION_FULL, 0, 0);
    const struct lr_model_dims *dims = &engine.model.dims;
    struct lr_memory_plan plan, divided;
    lr_session_plan(dims, plain, 0, 1, 1, &options, &plan);
    assert_int_equal(plan.slabs, 12);
    size_t slab = plan.kv_bytes / 12; /* of all layers: a block each */
    for (int64_t resident = 0; resident < 12; resident++) {
        /* a stage and two slots are of one layer, of two */
        options.kv_device_bytes = (size_t)resident * slab + 3 * slab / 2 + slab - 1;
        assert_ok(lr_session_divide(dims, plain, 1, 1, SIZE_MAX, 0, &options, err));
        int all_fit = options.kv_device_bytes >= plan.kv_bytes;
        assert_int_equal(options.host_slabs, all_fit ? 0 : 12 - resident);
        lr_session_plan(dims, plain, 0, 1, 1, &options, &divided);
        assert_true(divided.kv_bytes <= options.kv_device_bytes);
        if (!all_fit)
            assert_int_equal(divided.kv_bytes + divided.kv_host_bytes, plan.kv_bytes + 3 * slab / 2);
    }
    struct lr_error why;
    options.kv_device_bytes = 3 * slab / 2 - 1;
    assert_int_equal(lr_session_divide(dims, plain, 1, 1, SIZE_MAX, 0, &options, &why), LR_NO_MEMORY);
    assert_non_null(strstr(why.message, "takes at least 0.188 MiB"));
    /* without a limit: where the backend's memory is too small, and only if they may go elsewhere */
    struct lr_kernel_ops device = *plain;
    device.host_memory = 0;
    options.kv_device_bytes = 0;
    options.host_slabs = 0;
    lr_session_plan(dims, &device, 0, 1, 1, &options, &plan);
    assert_ok(lr_session_divide(dims, &device, 1, 1, plan.total_bytes - slab, 1, &options, err));
    assert_int_equal(options.host_slabs, 3); /* the one that is too much, and the stage and slots */
    assert_ok(lr_session_divide(dims, &device, 1, 1, plan.total_bytes, 1, &options, err));
    assert_int_equal(options.host_slabs, 0);
    assert_ok(lr_session_divide(dims, &device, 1, 1, plan.total_bytes - slab, 0, &options, err));
    assert_int_equal(options.host_slabs, 0);
}

static void assert_within_5_percent(size_t got, size_t planned)
{
    if (got < planned - planned / 20 || got > planned + planned / 20)
        fail_msg("%zu bytes, planned were %zu", got, planned);
}

/* What is reserved is what was planned, and the keys and values of a whole document fill their part of it. */
static void memory_is_taken_as_planned(void **state)
{
    (void)state;
    enum { LONG = 32768, WINDOW = 256, BLOCKS = LONG / LR_KV_BLOCK_TOKENS };
    int32_t *document = malloc(LONG * sizeof *document);
    for (int i = 0; i < LONG; i++)
        document[i] = ids[i % N];
    for (int tiers = 0; tiers < 2; tiers++) {
        struct lr_session_options options = options_of(LR_ATTENTION_SPARSE, 0, 0);
        options.segment_tokens = 2048;
        options.window = WINDOW;
        options.max_tokens = LONG;
        options.kv_device_bytes = tiers ? (size_t)BLOCKS * 65536 : 0; /* half */
        struct lr_session *session;
        struct lr_memory_use use;
        assert_ok(lr_session_open(&engine, &options, NULL, &session, err));
        assert_ok(lr_session_append(session, document, LONG, err));
        assert_ok(lr_session_seal(session, err));
        struct lr_fork_input question = {.ids = ids, .n_ids = 1}; /* walks through all slabs: both slots are used */
        assert_ok(lr_session_fork(session, &question.fork, err));
        assert_ok(lr_forks_extend(session, &question, 1, &(struct lr_fork_output){0}, err));
        lr_session_memory(session, &use);
        assert_int_equal(use.host_slabs > 0, tiers);
        assert_within_5_percent(use.reserved_bytes, use.planned_bytes);
        assert_true(use.taken_bytes <= use.reserved_bytes);
        assert_within_5_percent(lr_memory_resident(session->kv_memory.base, session->kv_memory.capacity_bytes),
                                use.kv_bytes);
        if (tiers) {
            assert_within_5_percent(use.host_reserved_bytes, use.host_planned_bytes);
            assert_within_5_percent(lr_memory_resident(session->kv_host.base, session->kv_host.capacity_bytes),
                                    use.host_planned_bytes);
        }
        lr_session_close(session);
    }
    free(document);
}

static int open_engine(void **state)
{
    (void)state;
    struct lr_engine_options options = {.model_dir = "models/longreach-tiny", .device = LR_DEVICE_CPU, .n_threads = 2};
    lr_comm_open_self(&comm);
    assert_ok(lr_engine_open(&options, &comm, &engine, err));
    plain = engine.ops;
    uint32_t x = 1;
    for (int i = 0; i < N + FORK_TOKENS; i++) {
        x = x * 1664525u + 1013904223u;
        ids[i] = (int32_t)((x >> 8) % (uint32_t)vocab());
    }
    return 0;
}

static int close_engine(void **state)
{
    (void)state;
    lr_engine_close(&engine);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tiers_do_not_matter),
        cmocka_unit_test(memory_is_divided_as_planned),
        cmocka_unit_test(memory_is_taken_as_planned),
    };
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
