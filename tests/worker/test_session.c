/* A session's promises: portions do not matter, forks are independent of each other, a rewound fork is a new one, and
 * prefill, halves and token by token agree to 2e-4 in the logits (docs/segments-and-bits.md). */
#include "tests/worker/fixtures.h"
#include "worker/session.h"

#include <math.h>

enum { N = 700, SEGMENT = 128 };
static const float tolerance = 2e-4f;

static struct lr_engine engine;
static struct lr_comm comm;
static int32_t ids[N];

struct kept {
    float *logits; /* [N, vocab] */
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

static struct kept new_kept(void)
{
    return (struct kept){.logits = calloc((size_t)(N * vocab()), sizeof(float))};
}

static struct lr_session *open_session(int64_t document, int64_t forks, struct kept *kept, int sparse, int64_t pages)
{
    struct lr_session_options options = {.segment_tokens = SEGMENT,
                                         .attention = sparse ? LR_ATTENTION_SPARSE : LR_ATTENTION_FULL,
                                         .window = LR_SPARSE_WINDOW,
                                         .sinks = LR_SPARSE_SINKS,
                                         .decode_pages = pages,
                                         .max_tokens = document,
                                         .max_forks = forks,
                                         .max_fork_tokens = N};
    struct lr_session_hooks hooks = {.on_logits = kept ? keep : NULL, .logits_context = kept};
    struct lr_session *session;
    assert_ok(lr_session_open(&engine, &options, &hooks, &session, err));
    return session;
}

/* The document in portions of `portion` tokens. */
static struct kept read_in_portions(int64_t portion)
{
    struct kept kept = new_kept();
    struct lr_session *session = open_session(N, 1, &kept, 0, 0);
    for (int64_t at = 0; at < N; at += portion)
        assert_ok(lr_session_append(session, ids + at, at + portion < N ? portion : N - at, err));
    assert_ok(lr_session_seal(session, err));
    assert_int_equal(kept.n, N);
    lr_session_close(session);
    return kept;
}

static void portions_do_not_matter(void **state)
{
    (void)state;
    struct kept whole = read_in_portions(N);
    static const int64_t portions[] = {1, 63, 128, 350};
    for (size_t i = 0; i < sizeof portions / sizeof portions[0]; i++) {
        struct kept parts = read_in_portions(portions[i]);
        assert_memory_equal(whole.logits, parts.logits, (size_t)(N * vocab()) * sizeof(float));
        free(parts.logits);
    }
    free(whole.logits);
}

/* A document of the first `document` tokens, the rest by a fork in portions of `portion`: logits of the rest. */
static struct kept extend(int64_t document, int64_t portion)
{
    struct kept kept = new_kept();
    struct lr_session *session = open_session(document, 1, NULL, 0, 0);
    struct lr_fork_input input = {0};
    assert_ok(lr_session_append(session, ids, document, err));
    assert_ok(lr_session_seal(session, err));
    assert_ok(lr_session_fork(session, &input.fork, err));
    for (int64_t at = document; at < N; at += portion) {
        input.ids = ids + at;
        input.n_ids = at + portion < N ? portion : N - at;
        assert_ok(lr_forks_extend(
            session, &input, 1, &(struct lr_fork_output){.sink = keep, .sink_context = &kept}, err));
    }
    assert_int_equal(kept.n, N - document);
    assert_int_equal(lr_fork_position(input.fork), N);
    lr_session_close(session);
    return kept;
}

static void halves_and_single_tokens_agree_with_prefill(void **state)
{
    (void)state;
    struct kept whole = read_in_portions(N);
    static const int64_t documents[] = {1, 127, 128, 350, 699};
    for (size_t i = 0; i < sizeof documents / sizeof documents[0]; i++) {
        int64_t first = documents[i];
        struct kept half = extend(first, N), single = extend(first, 1);
        size_t rest = (size_t)((N - first) * vocab());
        assert_memory_equal(half.logits + first * vocab(), single.logits + first * vocab(), rest * sizeof(float));
        float worst = 0.0f;
        for (size_t j = (size_t)(first * vocab()); j < (size_t)(N * vocab()); j++)
            worst = fmaxf(worst, fabsf(half.logits[j] - whole.logits[j]));
        print_message("document of %lld tokens: largest difference %.1e\n", (long long)first, (double)worst);
        assert_true(worst <= tolerance);
        free(half.logits);
        free(single.logits);
    }
    free(whole.logits);
}

static void forks_are_independent(void **state)
{
    (void)state;
    enum { FORKS = 5, DOCUMENT = 400 };
    for (int pages = 0; pages <= 2; pages += 2) {
        struct lr_session *session = open_session(DOCUMENT, FORKS, NULL, 1, pages);
        assert_ok(lr_session_append(session, ids, DOCUMENT, err));
        assert_ok(lr_session_seal(session, err));
        struct lr_fork_input inputs[FORKS];
        size_t row = (size_t)vocab() * sizeof(float);
        float *together = malloc(FORKS * row), *alone = malloc(row), *again = malloc(row);
        for (int i = 0; i < FORKS; i++) {
            inputs[i] = (struct lr_fork_input){.ids = ids + 7 * i, .n_ids = 1 + 40 * i};
            assert_ok(lr_session_fork(session, &inputs[i].fork, err));
        }
        struct lr_fork *more;
        assert_int_equal(lr_session_fork(session, &more, NULL), LR_FULL);
        assert_ok(lr_forks_extend(session, inputs, FORKS, &(struct lr_fork_output){.logits = together}, err));
        for (int i = 0; i < FORKS; i++) {
            lr_fork_rewind(inputs[i].fork);
            assert_int_equal(lr_fork_position(inputs[i].fork), DOCUMENT);
            assert_ok(lr_forks_extend(session, &inputs[i], 1, &(struct lr_fork_output){.logits = alone}, err));
            assert_memory_equal(together + i * vocab(), alone, row);
        }
        lr_fork_release(inputs[3].fork);
        assert_ok(lr_session_fork(session, &inputs[3].fork, err));
        assert_ok(lr_forks_extend(session, &inputs[3], 1, &(struct lr_fork_output){.logits = again}, err));
        assert_memory_equal(together + 3 * vocab(), again, row);
        free(together);
        free(alone);
        free(again);
        lr_session_close(session);
    }
}

/* As many pages as there are: nothing is left out. */
static void all_pages_are_everything(void **state)
{
    (void)state;
    float *logits[2];
    for (int i = 0; i < 2; i++) {
        struct lr_session *session = open_session(600, 1, NULL, 0, i ? 100 : 0);
        struct lr_fork_input input = {.ids = ids, .n_ids = 9};
        logits[i] = malloc((size_t)vocab() * sizeof(float));
        assert_ok(lr_session_append(session, ids, 600, err));
        assert_ok(lr_session_seal(session, err));
        assert_ok(lr_session_fork(session, &input.fork, err));
        assert_ok(lr_forks_extend(session, &input, 1, &(struct lr_fork_output){.logits = logits[i]}, err));
        lr_session_close(session);
    }
    assert_memory_equal(logits[0], logits[1], (size_t)vocab() * sizeof(float));
    free(logits[0]);
    free(logits[1]);
}

static void wrong_use_is_refused(void **state)
{
    (void)state;
    struct lr_error why;
    struct lr_fork *fork;
    int32_t outside = (int32_t)vocab();
    struct lr_session *session = open_session(100, 1, NULL, 0, 0);
    assert_int_equal(lr_session_append(session, &outside, 1, &why), LR_INVALID);
    lr_session_close(session);
    session = open_session(100, 1, NULL, 0, 0);
    assert_int_equal(lr_session_fork(session, &fork, &why), LR_INVALID);
    lr_session_close(session);
    session = open_session(100, 1, NULL, 0, 0);
    assert_int_equal(lr_session_append(session, ids, 101, &why), LR_INVALID);
    lr_session_close(session);
    session = open_session(100, 1, NULL, 0, 0);
    assert_ok(lr_session_append(session, ids, 100, err));
    assert_ok(lr_session_seal(session, err));
    assert_int_equal(lr_session_append(session, ids, 1, &why), LR_INVALID);
    lr_session_close(session);
}

static int open_engine(void **state)
{
    (void)state;
    struct lr_engine_options options = {.model_dir = "models/longreach-tiny", .n_threads = 2};
    lr_comm_open_self(&comm);
    assert_ok(lr_engine_open(&options, &comm, &engine, err));
    uint32_t x = 1;
    for (int i = 0; i < N; i++) {
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
        cmocka_unit_test(portions_do_not_matter), cmocka_unit_test(halves_and_single_tokens_agree_with_prefill),
        cmocka_unit_test(forks_are_independent),  cmocka_unit_test(all_pages_are_everything),
        cmocka_unit_test(wrong_use_is_refused),
    };
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
