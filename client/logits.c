/* longreach logits: ids in, logits out, through the same prefill as run. */
#include "base/file.h"
#include "client/command.h"
#include "client/reading.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const size_t max_ids_bytes = (size_t)8 << 30;

struct logits {
    struct lr_settings settings;
    const char *ids_path, *out_path, *positions_text;
    int64_t full_last; /* positions at the end that attend to everything, as a question does */
    struct lr_job job;
    struct lr_token_buffer ids; /* worker 0 */
    int64_t n_ids;
    int64_t *positions; /* ascending; NULL: all */
    int64_t n_positions, next_position;
    FILE *out;
};

static enum lr_status read_ids(struct logits *l, struct lr_error *err)
{
    char *bytes;
    size_t n_bytes;
    LR_TRY(lr_file_read(l->ids_path, max_ids_bytes, &bytes, &n_bytes, err));
    enum lr_status status = LR_OK;
    if (n_bytes == 0 || n_bytes % 4 != 0)
        status = lr_fail(err, LR_INVALID, "%s has %zu bytes: int32 ids need a multiple of 4, and at least one",
                         l->ids_path, n_bytes);
    int64_t vocab = l->job.engine.model.dims.vocab;
    l->ids.ids = status == LR_OK ? malloc(n_bytes) : NULL;
    if (status == LR_OK && !l->ids.ids)
        status = lr_fail(err, LR_NO_MEMORY, "%s: no memory for %zu bytes", l->ids_path, n_bytes);
    for (size_t i = 0; status == LR_OK && i < n_bytes / 4; i++) {
        const unsigned char *b = (const unsigned char *)bytes + 4 * i;
        int32_t id = (int32_t)((uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
        if (id < 0 || id >= vocab)
            status = lr_fail(err, LR_INVALID, "%s: id %d at place %zu is outside the vocabulary of %lld", l->ids_path,
                             id, i, (long long)vocab);
        l->ids.ids[i] = id;
    }
    l->ids.n_ids = status == LR_OK ? (int64_t)(n_bytes / 4) : 0;
    free(bytes);
    return status;
}

/* "0,63,64": ascending. The same text on every worker, so no agreement is needed. */
static enum lr_status parse_positions(struct logits *l, struct lr_error *err)
{
    const char *at = l->positions_text;
    if (!at)
        return LR_OK;
    l->positions = calloc(strlen(at) + 1, sizeof *l->positions);
    if (!l->positions)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the positions");
    for (;;) {
        char *end;
        errno = 0;
        long long position = strtoll(at, &end, 10);
        if (end == at || errno || position < 0 || position >= l->n_ids)
            return lr_fail(err, LR_INVALID, "--positions: '%.40s' does not start with a position from 0 to %lld", at,
                           (long long)l->n_ids - 1);
        if (l->n_positions > 0 && position <= l->positions[l->n_positions - 1])
            return lr_fail(err, LR_INVALID, "--positions: %lld does not come after %lld", position,
                           (long long)l->positions[l->n_positions - 1]);
        l->positions[l->n_positions++] = position;
        if (*end == '\0')
            return LR_OK;
        if (*end != ',')
            return lr_fail(err, LR_INVALID, "--positions: '%.40s' where a comma should be", end);
        at = end + 1;
    }
}

static int is_wanted(struct logits *l, int64_t position)
{
    if (!l->positions)
        return 1;
    while (l->next_position < l->n_positions && l->positions[l->next_position] < position)
        l->next_position++;
    return l->next_position < l->n_positions && l->positions[l->next_position] == position;
}

static enum lr_status write_logits(void *context, int64_t position, const float *logits, struct lr_error *err)
{
    struct logits *l = context;
    size_t vocab = (size_t)l->job.engine.model.dims.vocab;
    if (is_wanted(l, position) && fwrite(logits, sizeof *logits, vocab, l->out) != vocab)
        return lr_fail(err, LR_IO, "%s: %s", l->out_path, strerror(errno));
    return LR_OK;
}

/* The last tokens go through a fork, which attends to everything. */
static enum lr_status read_last(struct logits *l, const int32_t *ids, struct lr_error *err)
{
    struct lr_fork_input input = {.ids = ids, .n_ids = l->full_last};
    LR_TRY(lr_session_fork(l->job.session, &input.fork, err));
    lr_signals_phase("the last positions");
    struct lr_fork_output output = {.sink = write_logits, .sink_context = l};
    enum lr_status status = lr_forks_extend(l->job.session, &input, 1, &output, err);
    lr_fork_release(input.fork);
    return status;
}

static enum lr_status run_model(struct logits *l, const int32_t *last, struct lr_error *err)
{
    struct lr_token_buffer document = l->ids;
    document.n_ids = l->n_ids - l->full_last;
    struct lr_reading reading = {.settings = &l->settings,
                                 .on_logits = write_logits,
                                 .logits_context = l,
                                 .positions = l->positions,
                                 .n_positions = l->n_positions};
    while (reading.n_positions > 0 && l->positions[reading.n_positions - 1] >= document.n_ids)
        reading.n_positions--;
    LR_TRY(lr_reading_run(&reading, &l->job, &document, l->full_last > 0, l->full_last, err));
    if (l->full_last > 0)
        LR_TRY(read_last(l, last, err));
    double density;
    LR_TRY(lr_session_density(l->job.session, &density, err));
    if (l->job.comm->rank == 0 && !l->settings.quiet)
        fprintf(stderr, "%s tokens in %s, density %.4f\n", lr_number_text(reading.n_tokens),
                lr_duration_text(l->job.prefill_seconds), density);
    return LR_OK;
}

static enum lr_status open_output(struct logits *l, struct lr_error *err)
{
    if (l->job.comm->rank != 0)
        return LR_OK;
    l->out = fopen(l->out_path, "wb");
    return l->out ? LR_OK : lr_fail(err, LR_IO, "%s cannot be written: %s", l->out_path, strerror(errno));
}

static enum lr_status work_on(struct logits *l, int32_t **last, struct lr_error *err)
{
    enum lr_status mine = l->job.comm->rank == 0 ? read_ids(l, err) : LR_OK;
    LR_TRY(lr_agree(l->job.comm, mine, err));
    l->n_ids = l->ids.n_ids;
    LR_TRY(lr_comm_broadcast(l->job.comm, "number of ids", 0, &l->n_ids, sizeof l->n_ids, err));
    if (l->full_last >= l->n_ids)
        return lr_fail(err, LR_INVALID, "--full-last %lld leaves no document of %lld tokens", (long long)l->full_last,
                       (long long)l->n_ids);
    LR_TRY(parse_positions(l, err));
    int64_t n_last;
    const int32_t *from = l->ids.ids ? l->ids.ids + l->n_ids - l->full_last : NULL;
    LR_TRY(lr_job_share_ids(&l->job, from, l->full_last, LR_OK, last, &n_last, err));
    LR_TRY(lr_agree(l->job.comm, open_output(l, err), err));
    LR_TRY(run_model(l, *last, err));
    mine = LR_OK;
    if (l->out && fclose(l->out) != 0)
        mine = lr_fail(err, LR_IO, "%s: %s", l->out_path, strerror(errno));
    l->out = NULL;
    return lr_agree(l->job.comm, mine, err);
}

static enum lr_status work(void *context, struct lr_comm *comm, struct lr_error *err)
{
    struct logits *l = context;
    int32_t *last = NULL;
    struct lr_job_options options = lr_settings_job(&l->settings, comm);
    lr_signals_phase("loading the model");
    LR_TRY(lr_job_open(&l->job, &options, comm, 0, err));
    enum lr_status status = work_on(l, &last, err);
    if (l->out)
        fclose(l->out);
    free(last);
    free(l->ids.ids);
    free(l->positions);
    lr_job_close(&l->job);
    return status;
}

int lr_command_logits(int argc, char **argv)
{
    static const struct lr_command_text text = {
        .usage = "logits --model DIR --ids FILE --out FILE [OPTIONS]",
        .summary = "Writes the logits of a sequence of token ids: int32 little-endian in, float32 little-endian "
                   "[positions, vocab] out.",
        .examples =
            "  longreach logits --model models/longreach-tiny --ids ids.bin --out logits.bin --workers 3\n"
            "  longreach logits --model DIR --ids ids.bin --out last.bin --positions 0,63,999 --attention sparse\n"};
    struct logits l = {.settings = lr_settings_default};
    struct lr_option options[LR_MAX_OPTIONS] = {
        {.kind = LR_OPTION_TEXT, .name = "ids", .argument = "FILE", .out = &l.ids_path, .help = "int32 ids"},
        {.kind = LR_OPTION_TEXT, .name = "out", .argument = "FILE", .out = &l.out_path, .help = "where the logits go"},
        {.kind = LR_OPTION_TEXT,
         .name = "positions",
         .argument = "LIST",
         .out = &l.positions_text,
         .help = "the positions wanted, ascending, with commas (default: all)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "full-last",
         .argument = "N",
         .out = &l.full_last,
         .lowest = 0,
         .highest = 1 << 20,
         .help = "the last N tokens are a question: they attend to everything (default 0)"}};
    int n_options = 4, n_operands;
    lr_settings_options(&l.settings, 0, options, &n_options);
    int code = lr_command_parse(&text, options, n_options, &l.settings.help, argc, argv, NULL, 0, &n_operands);
    if (code >= 0)
        return code;
    if (!l.settings.model || !l.ids_path || !l.out_path)
        return lr_command_usage("logits", "--model, --ids and --out are needed");
    return lr_command_execute(&l.settings, strcmp(l.ids_path, "-") == 0, argc, argv, work, &l);
}
