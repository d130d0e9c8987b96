#include "client/command.h"

#include <stdarg.h>
#include <string.h>

static int is_first(void)
{
    return lr_world_rank() == 0;
}

int lr_command_usage(const char *command, const char *format, ...)
{
    if (is_first()) {
        va_list args;
        va_start(args, format);
        fprintf(stderr, "longreach %s: ", command);
        vfprintf(stderr, format, args);
        fprintf(stderr, "\nTry 'longreach %s --help'.\n", command);
        va_end(args);
    }
    return LR_EXIT_USAGE;
}

int lr_command_parse(const struct lr_command_text *text,
                     const struct lr_option *options,
                     int n_options,
                     const int *help,
                     int argc,
                     char **argv,
                     const char **operands,
                     int max_operands,
                     int *n_operands)
{
    struct lr_error err;
    enum lr_status status =
        lr_options_parse(options, n_options, argc - 1, argv + 1, operands, max_operands, n_operands, &err);
    if (status != LR_OK)
        return lr_command_usage(argv[1], "%s", err.message);
    if (!*help)
        return -1;
    if (is_first()) {
        printf("usage: longreach %s\n\n%s\n", text->usage, text->summary);
        lr_options_print(stdout, options, n_options);
        printf("\nExamples:\n%s", text->examples);
    }
    return LR_EXIT_OK;
}

int lr_command_report(enum lr_status status, const struct lr_error *err)
{
    if (status == LR_OK)
        return LR_EXIT_OK;
    fprintf(stderr, "longreach: %s\n", err->message);
    return status == LR_CANCELLED ? LR_EXIT_INTERRUPTED : LR_EXIT_FAILED;
}

/* A failure between workers is not agreed upon: each host's first living worker says what it saw, and the world is
 * ended without waiting. Any other failure is the same sentence on every worker. */
static int end_work(struct lr_comm *comm, enum lr_status status, const struct lr_error *err)
{
    fflush(stdout);
    if (comm->failed != LR_OK) {
        if (lr_comm_speaks(comm))
            fprintf(stderr, "longreach: in %s: %s\n", lr_signals_current_phase(), err->message);
        lr_signals_end();
        lr_comm_abort(comm, LR_EXIT_FAILED);
    }
    int code = status == LR_OK ? LR_EXIT_OK : LR_EXIT_FAILED;
    if (status != LR_OK && comm->rank == 0)
        code = lr_command_report(status, err);
    lr_signals_end();
    lr_comm_close(comm);
    return code;
}

int lr_command_execute(
    const struct lr_settings *settings, int reads_stdin, int argc, char **argv, lr_command_work *work, void *context)
{
    struct lr_error err = {0};
    struct lr_comm comm;
    enum lr_world world;
    int64_t segment = settings->segment_tokens;
    if ((segment & (segment - 1)) != 0)
        return lr_command_usage(argv[1], "--segment-tokens: %lld is not a power of two", (long long)segment);
    for (int i = 0; i < settings->stop.n_texts; i++)
        if (settings->stop.texts[i][0] == '\0')
            return lr_command_usage(argv[1], "--stop: the text is empty");
    if (lr_world_find(settings, &world, &err) != LR_OK)
        return lr_command_usage(argv[1], "%s", err.message);
    if (world == LR_WORLD_LOCAL || world == LR_WORLD_SLURM)
        return lr_world_launch(settings, world, reads_stdin, argc, argv);
    lr_signals_install(NULL);
    if (world == LR_WORLD_SELF) {
        lr_comm_open_self(&comm);
    } else {
        enum lr_status status = lr_comm_open_mpi(settings->timeout_seconds * 1000, &comm, &err);
        if (status != LR_OK)
            return lr_command_report(status, &err);
    }
    lr_signals_install(&comm);
    enum lr_status status = work(context, &comm, &err);
    return end_work(&comm, status, &err);
}
