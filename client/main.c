/* longreach: one binary, a few commands. */
#include "client/command.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    const char *summary;
    int (*main)(int argc, char **argv);
} commands[] = {
    {"run", "read a document once and answer questions about it", lr_command_run},
    {"needle", "plant facts in a long document and see which are found", lr_command_needle},
    {"logits", "write the logits of a sequence of token ids", lr_command_logits},
    {"tokenize", "turn a text into token ids, or back", lr_command_tokenize},
    {"inspect", "show a model and the memory that a document would need", lr_command_inspect},
    {"bench", "measure prefill and decoding", lr_command_bench},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_help(FILE *out)
{
    fprintf(out, "usage: longreach COMMAND [OPTIONS]\n\n"
                 "Long documents, read by several workers that share one context.\n\nCommands:\n");
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fprintf(out, "\n'longreach COMMAND --help' has the options and examples.\n");
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(name, commands[i].name) == 0)
            return commands[i].main(argc, argv);
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_help(stdout);
        return LR_EXIT_OK;
    }
    if (strcmp(name, "--version") == 0) {
        printf("longreach %s\n", LR_VERSION);
        return LR_EXIT_OK;
    }
    if (lr_world_rank() == 0) {
        if (argc > 1)
            fprintf(stderr, "longreach: unknown command '%.80s'\n\n", name);
        print_help(stderr);
    }
    return LR_EXIT_USAGE;
}
