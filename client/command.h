/* The frame of every command: options, world, one sentence for what went wrong, exit code. */
#ifndef LR_CLIENT_COMMAND_H
#define LR_CLIENT_COMMAND_H

#include "client/options.h"
#include "client/report.h"
#include "client/settings.h"
#include "client/signals.h"
#include "client/world.h"

/* argv[0] is the program, argv[1] the command. Returns the exit code. */
int lr_command_run(int argc, char **argv);
int lr_command_needle(int argc, char **argv);
int lr_command_logits(int argc, char **argv);
int lr_command_tokenize(int argc, char **argv);
int lr_command_inspect(int argc, char **argv);
int lr_command_bench(int argc, char **argv);

/* What a command is: its help and its options. */
struct lr_command_text {
    const char *usage;    /* "run --model DIR ..." */
    const char *summary;  /* one sentence */
    const char *examples; /* indented lines */
};

/* Parses argv. Returns -1 to go on, or an exit code: after --help, or after a sentence about wrong usage. */
int lr_command_parse(const struct lr_command_text *text,
                     const struct lr_option *options,
                     int n_options,
                     const int *help,
                     int argc,
                     char **argv,
                     const char **operands,
                     int max_operands,
                     int *n_operands);

/* Says what is wrong with the usage (on worker 0) and returns LR_EXIT_USAGE. */
int lr_command_usage(const char *command, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Enters the world that settings and environment ask for and runs `work` in each of its workers, or starts that world
 * and waits for it. Returns the exit code. */
typedef enum lr_status lr_command_work(void *context, struct lr_comm *comm, struct lr_error *err);
int lr_command_execute(
    const struct lr_settings *settings, int reads_stdin, int argc, char **argv, lr_command_work *work, void *context);

/* For commands without workers. */
int lr_command_report(enum lr_status status, const struct lr_error *err);

#endif
