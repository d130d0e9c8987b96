#include "client/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

enum { HELP_COLUMN = 28, HELP_WIDTH = 100 };

static enum lr_status parse_integer(const struct lr_option *option, const char *value, struct lr_error *err)
{
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    if (end == value || *end != '\0')
        return lr_fail(err, LR_INVALID, "--%s: '%.80s' is not a whole number", option->name, value);
    if (errno == ERANGE || number < option->lowest || number > option->highest)
        return lr_fail(err, LR_INVALID, "--%s: %.80s is out of range, it must be from %lld to %lld", option->name,
                       value, (long long)option->lowest, (long long)option->highest);
    *(int64_t *)option->out = number;
    return LR_OK;
}

static enum lr_status parse_size(const struct lr_option *option, const char *value, struct lr_error *err)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    const char *unit = end != value && *end ? strchr(units, *end) : NULL;
    int shift = unit ? 10 * (int)(unit - units + 1) : 0;
    if (end == value || end[unit != NULL] != '\0')
        return lr_fail(err, LR_INVALID, "--%s: '%.80s' is not a size like 800M, 24G or 1000000", option->name, value);
    if (errno == ERANGE || number < option->lowest || number > option->highest >> shift)
        return lr_fail(err, LR_INVALID, "--%s: %.80s is out of range, it must be from %lld to %lld bytes", option->name,
                       value, (long long)option->lowest, (long long)option->highest);
    *(int64_t *)option->out = (int64_t)number << shift;
    return LR_OK;
}

static enum lr_status parse_real(const struct lr_option *option, const char *value, struct lr_error *err)
{
    char *end;
    double number = strtod(value, &end);
    if (end == value || *end != '\0')
        return lr_fail(err, LR_INVALID, "--%s: '%.80s' is not a number", option->name, value);
    if (!(number >= option->low && number <= option->high))
        return lr_fail(err, LR_INVALID, "--%s: %.80s is out of range, it must be from %g to %g", option->name, value,
                       option->low, option->high);
    *(double *)option->out = number;
    return LR_OK;
}

static enum lr_status parse_choice(const struct lr_option *option, const char *value, struct lr_error *err)
{
    char known[200] = "";
    for (int i = 0; option->choices[i]; i++) {
        if (strcmp(option->choices[i], value) == 0) {
            *(int *)option->out = i;
            return LR_OK;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", option->choices[i]);
    }
    return lr_fail(err, LR_INVALID, "--%s: '%.80s' is not one of %s", option->name, value, known);
}

static enum lr_status add_text(struct lr_texts *texts, const char *value, struct lr_error *err)
{
    const char **more = realloc(texts->texts, (size_t)(texts->n_texts + 1) * sizeof *more);
    if (!more)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the arguments");
    texts->texts = more;
    texts->texts[texts->n_texts++] = value;
    return LR_OK;
}

static enum lr_status take_value(const struct lr_option *option, const char *value, struct lr_error *err)
{
    switch (option->kind) {
    case LR_OPTION_FLAG:
        *(int *)option->out = 1;
        return LR_OK;
    case LR_OPTION_INTEGER:
        return parse_integer(option, value, err);
    case LR_OPTION_SIZE:
        return parse_size(option, value, err);
    case LR_OPTION_REAL:
        return parse_real(option, value, err);
    case LR_OPTION_TEXT:
        *(const char **)option->out = value;
        return LR_OK;
    case LR_OPTION_TEXTS:
        return add_text(option->out, value, err);
    case LR_OPTION_CHOICE:
        return parse_choice(option, value, err);
    case LR_OPTION_HEADING:
        break;
    }
    return lr_fail(err, LR_INTERNAL, "option --%s has no kind", option->name);
}

enum lr_status lr_options_parse(const struct lr_option *options,
                                int n_options,
                                int argc,
                                char **argv,
                                const char **operands,
                                int max_operands,
                                int *n_operands,
                                struct lr_error *err)
{
    struct option names[LR_MAX_OPTIONS + 1] = {0};
    int index_of[LR_MAX_OPTIONS], n = 0;
    for (int i = 0; i < n_options && n < LR_MAX_OPTIONS; i++) {
        if (options[i].kind == LR_OPTION_HEADING)
            continue;
        names[n].name = options[i].name;
        names[n].has_arg = options[i].kind == LR_OPTION_FLAG ? no_argument : required_argument;
        index_of[n++] = i;
    }
    opterr = 0;
    optind = 1;
    *n_operands = 0;
    for (;;) {
        int which = -1, at = optind > 0 ? optind : 1;
        /* the leading '-' hands operands over as option 1, in their place */
        int code = getopt_long(argc, argv, "-:", names, &which);
        if (code == -1)
            break;
        if (code == ':')
            return lr_fail(err, LR_INVALID, "option '%.80s' needs a value", argv[optind - 1]);
        if (code == '?')
            return lr_fail(err, LR_INVALID, "unknown option '%.80s'", argv[at]);
        if (code == 0) {
            LR_TRY(take_value(&options[index_of[which]], optarg, err));
            continue;
        }
        if (*n_operands == max_operands)
            return lr_fail(err, LR_INVALID, "unexpected argument '%.80s'", optarg);
        operands[(*n_operands)++] = optarg;
    }
    for (; optind < argc; optind++) {
        if (*n_operands == max_operands)
            return lr_fail(err, LR_INVALID, "unexpected argument '%.80s'", argv[optind]);
        operands[(*n_operands)++] = argv[optind];
    }
    return LR_OK;
}

static void print_wrapped(FILE *out, const char *text)
{
    int column = HELP_COLUMN;
    while (*text) {
        const char *end = strchr(text, ' ');
        int length = end ? (int)(end - text) : (int)strlen(text);
        if (column > HELP_COLUMN && column + 1 + length > HELP_WIDTH) {
            fprintf(out, "\n%*s", HELP_COLUMN, "");
            column = HELP_COLUMN;
        }
        fprintf(out, "%s%.*s", column > HELP_COLUMN ? " " : "", length, text);
        column += length + (column > HELP_COLUMN);
        text += length + (end ? 1 : 0);
    }
    fputc('\n', out);
}

void lr_options_print(FILE *out, const struct lr_option *options, int n_options)
{
    for (int i = 0; i < n_options; i++) {
        if (options[i].kind == LR_OPTION_HEADING) {
            fprintf(out, "\n%s:\n", options[i].help);
            continue;
        }
        int used = fprintf(out, "  --%s%s%s", options[i].name, options[i].argument ? " " : "",
                           options[i].argument ? options[i].argument : "");
        if (used > HELP_COLUMN - 2) {
            fputc('\n', out);
            used = 0;
        }
        fprintf(out, "%*s", HELP_COLUMN - used, "");
        print_wrapped(out, options[i].help);
    }
}
