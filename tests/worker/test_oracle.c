/* Logits against transformers (tests/oracle/make_models.py): longreach-tiny, and small random models that use every
 * field of the configuration. Bound: 2e-3, and the same argmax everywhere. */
#include "tests/worker/fixtures.h"
#include "worker/session.h"

#include <dirent.h>
#include <math.h>

static const float largest_difference = 2e-3f;

struct comparison {
    const char *what;
    const float *expected;
    int64_t *positions;
    int64_t n_positions, next, vocab;
    float worst;
};

static int64_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    return best;
}

static enum lr_status compare(void *context, int64_t position, const float *logits, struct lr_error *sink_err)
{
    struct comparison *c = context;
    if (c->next >= c->n_positions || c->positions[c->next] != position)
        return LR_OK;
    const float *expected = c->expected + c->next * c->vocab;
    for (int64_t i = 0; i < c->vocab; i++) {
        float difference = fabsf(logits[i] - expected[i]);
        if (!(difference <= largest_difference))
            return lr_fail(sink_err, LR_INTERNAL, "%s, position %lld, token %lld: %g, transformers has %g", c->what,
                           (long long)position, (long long)i, (double)logits[i], (double)expected[i]);
        c->worst = difference > c->worst ? difference : c->worst;
    }
    if (argmax(logits, c->vocab) != argmax(expected, c->vocab))
        return lr_fail(sink_err, LR_INTERNAL, "%s, position %lld: token %lld is the likeliest, in transformers %lld",
                       c->what, (long long)position, (long long)argmax(logits, c->vocab),
                       (long long)argmax(expected, c->vocab));
    c->next++;
    return LR_OK;
}

static void check_prompt(struct lr_engine *engine, const char *dir, const char *length, int64_t segment_tokens)
{
    char path[512], what[600];
    size_t ids_bytes, logits_bytes;
    snprintf(path, sizeof path, "%s/ids_%s.bin", dir, length);
    int32_t *ids = (int32_t *)(void *)read_fixture(path, &ids_bytes);
    snprintf(path, sizeof path, "%s/logits_%s.bin", dir, length);
    float *expected = (float *)(void *)read_fixture(path, &logits_bytes);
    snprintf(path, sizeof path, "%s/positions_%s.txt", dir, length);
    snprintf(what, sizeof what, "%s, %s tokens, segments of %lld", dir, length, (long long)segment_tokens);
    struct comparison c = {.what = what, .expected = expected, .vocab = engine->model.dims.vocab};
    c.positions = read_numbers(path, &c.n_positions);
    assert_true(c.n_positions > 0);
    assert_int_equal(logits_bytes, (size_t)(c.n_positions * c.vocab) * sizeof(float));
    struct lr_session_options options = {.segment_tokens = segment_tokens,
                                         .attention = LR_ATTENTION_FULL,
                                         .max_tokens = (int64_t)ids_bytes / 4,
                                         .max_forks = 1,
                                         .max_fork_tokens = 1};
    struct lr_session_hooks hooks = {.on_logits = compare, .logits_context = &c};
    struct lr_session *session;
    assert_ok(lr_session_open(engine, &options, &hooks, &session, err));
    assert_ok(lr_session_append(session, ids, options.max_tokens, err));
    assert_ok(lr_session_seal(session, err));
    assert_int_equal(c.next, c.n_positions);
    print_message("%s: largest difference %.1e\n", what, (double)c.worst);
    lr_session_close(session);
    free(c.positions);
    free(ids);
    free(expected);
}

/* Every prompt ids_N.bin of the directory. */
static int check_prompts(struct lr_engine *engine, const char *dir, int64_t segment_tokens)
{
    int n = 0;
    DIR *entries = opendir(dir);
    assert_non_null(entries);
    for (struct dirent *entry; (entry = readdir(entries));) {
        char length[16];
        if (sscanf(entry->d_name, "ids_%15[0-9].bin", length) != 1)
            continue;
        check_prompt(engine, dir, length, segment_tokens);
        n++;
    }
    closedir(entries);
    return n;
}

static void open_engine(struct lr_engine *engine, struct lr_comm *comm, const char *model_dir)
{
    struct lr_engine_options options = {.model_dir = model_dir, .n_threads = 2};
    lr_comm_open_self(comm);
    assert_ok(lr_engine_open(&options, comm, engine, err));
}

static void tiny_equals_transformers(void **state)
{
    (void)state;
    struct lr_engine engine;
    struct lr_comm comm;
    open_engine(&engine, &comm, "models/longreach-tiny");
    assert_int_equal(check_prompts(&engine, "tests/oracle/tiny", LR_DEFAULT_SEGMENT_TOKENS), 7);
    assert_int_equal(check_prompts(&engine, "tests/oracle/tiny", 128), 7);
    lr_engine_close(&engine);
}

static void every_config_equals_transformers(void **state)
{
    (void)state;
    int n = 0;
    DIR *models = opendir("tests/oracle/models");
    assert_non_null(models);
    for (struct dirent *entry; (entry = readdir(models));) {
        char dir[300];
        if (entry->d_name[0] == '.' || entry->d_type != DT_DIR)
            continue;
        snprintf(dir, sizeof dir, "tests/oracle/models/%s", entry->d_name);
        struct lr_engine engine;
        struct lr_comm comm;
        open_engine(&engine, &comm, dir);
        assert_true(check_prompts(&engine, dir, LR_DEFAULT_SEGMENT_TOKENS) >= 3);
        assert_true(check_prompts(&engine, dir, 128) >= 3);
        lr_engine_close(&engine);
        n++;
    }
    closedir(models);
    assert_true(n >= 15);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(tiny_equals_transformers),
                                       cmocka_unit_test(every_config_equals_transformers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
