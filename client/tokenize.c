/* longreach tokenize: text to ids, ids to text. No workers. */
#include "base/file.h"
#include "client/command.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const size_t max_text_bytes = (size_t)16 << 30;

struct tokenize {
    const char *model, *decode;
    int parse_special, help;
};

static enum lr_status
encode(const struct tokenize *t, struct lr_tokenizer *tokenizer, const char *path, struct lr_error *err)
{
    char *text;
    size_t n_bytes;
    struct lr_token_buffer ids = {0};
    LR_TRY(lr_file_read(path, max_text_bytes, &text, &n_bytes, err));
    struct lr_error why;
    enum lr_status status =
        lr_tokenizer_encode(tokenizer, text, n_bytes, t->parse_special ? LR_TOKENIZE_PARSE_SPECIAL : 0, &ids, &why);
    free(text);
    if (status != LR_OK)
        lr_fail(err, status, "%s: %s", path, why.message);
    for (int64_t i = 0; status == LR_OK && i < ids.n_ids; i++)
        printf("%s%d", i ? " " : "", ids.ids[i]);
    if (status == LR_OK)
        putchar('\n');
    free(ids.ids);
    return status;
}

/* Decimal ids with white space between them. */
static enum lr_status
parse_ids(const char *path, char *text, size_t n_bytes, struct lr_token_buffer *ids, struct lr_error *err)
{
    if (memchr(text, '\0', n_bytes))
        return lr_fail(err, LR_INVALID, "%s has a NUL byte; it must be a list of ids in decimal", path);
    for (char *at = text;;) {
        at += strspn(at, " \t\r\n");
        if (*at == '\0')
            return LR_OK;
        char *end;
        errno = 0;
        long id = strtol(at, &end, 10);
        if (end == at || (*end != '\0' && !strchr(" \t\r\n", *end)) || errno || id < 0 || id > INT32_MAX)
            return lr_fail(err, LR_INVALID, "%s: '%.20s' at byte %zu is no id", path, at, (size_t)(at - text));
        LR_TRY(lr_tokens_push(ids, (int32_t)id, err));
        at = end;
    }
}

static enum lr_status decode(struct lr_tokenizer *tokenizer, const char *path, struct lr_error *err)
{
    char *text, *bytes = NULL;
    size_t n_bytes, n = 0;
    struct lr_token_buffer ids = {0};
    LR_TRY(lr_file_read(path, max_text_bytes, &text, &n_bytes, err));
    enum lr_status status = parse_ids(path, text, n_bytes, &ids, err);
    if (status == LR_OK)
        status = lr_tokenizer_decode(tokenizer, ids.ids, ids.n_ids, &bytes, &n, err);
    if (status == LR_OK && fwrite(bytes, 1, n, stdout) != n)
        status = lr_fail(err, LR_IO, "standard output: %s", strerror(errno));
    free(text);
    free(ids.ids);
    free(bytes);
    return status;
}

int lr_command_tokenize(int argc, char **argv)
{
    static const struct lr_command_text text = {
        .usage = "tokenize --model DIR (FILE | --decode FILE) [OPTIONS]",
        .summary = "Prints the token ids of a text on one line, or with --decode the bytes of such a line. - is "
                   "standard input.",
        .examples = "  longreach tokenize --model models/longreach-tiny book.txt > ids.txt\n"
                    "  longreach tokenize --model models/longreach-tiny --decode ids.txt\n"};
    struct tokenize t = {0};
    const char *operand = NULL;
    int n_operands;
    const struct lr_option options[] = {
        {.kind = LR_OPTION_TEXT,
         .name = "model",
         .argument = "DIR",
         .out = &t.model,
         .help = "a directory with a tokenizer.json of byte-level BPE"},
        {.kind = LR_OPTION_TEXT,
         .name = "decode",
         .argument = "FILE",
         .out = &t.decode,
         .help = "ids in decimal, separated by spaces; prints their bytes"},
        {.kind = LR_OPTION_FLAG,
         .name = "parse-special",
         .out = &t.parse_special,
         .help = "texts like <|endoftext|> become that token"},
        {.kind = LR_OPTION_FLAG, .name = "help", .out = &t.help, .help = "this text"},
    };
    int code = lr_command_parse(&text, options, 4, &t.help, argc, argv, &operand, 1, &n_operands);
    if (code >= 0)
        return code;
    if (!t.model || (n_operands == 1) == (t.decode != NULL))
        return lr_command_usage("tokenize", "--model and either a FILE or --decode FILE are needed");
    struct lr_error err;
    struct lr_tokenizer *tokenizer = NULL;
    enum lr_status status = lr_tokenizer_load(t.model, &tokenizer, &err);
    if (status == LR_OK)
        status = t.decode ? decode(tokenizer, t.decode, &err) : encode(&t, tokenizer, operand, &err);
    if (status == LR_OK && fflush(stdout) != 0)
        status = lr_fail(&err, LR_IO, "standard output: %s", strerror(errno));
    lr_tokenizer_free(tokenizer);
    return lr_command_report(status, &err);
}
