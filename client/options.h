/* Command-line options as a table, over getopt_long: GNU-style long options, "--name value" or "--name=value", unique
 * prefixes allowed, in any order with the operands. */
#ifndef LR_CLIENT_OPTIONS_H
#define LR_CLIENT_OPTIONS_H

#include "base/status.h"
#include <stdint.h>
#include <stdio.h>

enum lr_option_kind {
    LR_OPTION_FLAG,    /* int *: set to 1 */
    LR_OPTION_INTEGER, /* int64_t *, in [lowest, highest] */
    LR_OPTION_SIZE,    /* int64_t *, bytes in [lowest, highest]: a whole number with K, M, G or T (of 1024) behind it */
    LR_OPTION_REAL,    /* double *, in [low, high] */
    LR_OPTION_TEXT,    /* const char ** */
    LR_OPTION_TEXTS,   /* struct lr_texts *: may be given several times */
    LR_OPTION_CHOICE,  /* int *: index into choices */
    LR_OPTION_HEADING  /* a title in the help */
};

enum { LR_MAX_OPTIONS = 64 };

/* The values of an option that may be repeated; they point into argv. */
struct lr_texts {
    const char **texts;
    int n_texts;
};

struct lr_option {
    enum lr_option_kind kind;
    const char *name;     /* without the dashes */
    const char *argument; /* what the help calls its value; NULL for a flag */
    const char *help;
    void *out;
    int64_t lowest, highest;
    double low, high;
    const char *const *choices; /* NULL-terminated */
};

/* Fills what the options point at. `operands` [max_operands] gets the other arguments in order. LR_INVALID with the
 * sentence for the user. */
LR_MUST_USE enum lr_status lr_options_parse(const struct lr_option *options,
                                            int n_options,
                                            int argc,
                                            char **argv,
                                            const char **operands,
                                            int max_operands,
                                            int *n_operands,
                                            struct lr_error *err);

/* The table as help text: names and arguments left, sentences right, wrapped at 100 columns. */
void lr_options_print(FILE *out, const struct lr_option *options, int n_options);

#endif
