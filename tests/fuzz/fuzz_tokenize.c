/* Any bytes as a text: invalid UTF-8 is refused at the right byte, anything else comes back byte for byte. */
#include "base/utf8.h"
#include "tests/fuzz/fuzz.h"
#include "worker/weights/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const directories[] = {"models/longreach-tiny", "tests/oracle/tokenizer/gpt2",
                                          "tests/oracle/tokenizer/llama3", "tests/oracle/tokenizer/qwen"};
enum { N_TOKENIZERS = sizeof directories / sizeof directories[0] };

static struct lr_tokenizer *tokenizers[N_TOKENIZERS];

static void load(void)
{
    struct lr_error err;
    for (int i = 0; i < N_TOKENIZERS; i++)
        if (!tokenizers[i] && lr_tokenizer_load(directories[i], &tokenizers[i], &err) != LR_OK) {
            fprintf(stderr, "%s\n", err.message);
            abort();
        }
}

static void check(struct lr_tokenizer *tokenizer, const char *text, size_t n, int flags, int gives_bytes_back)
{
    struct lr_token_buffer ids = {0};
    struct lr_error err;
    char *bytes;
    size_t n_bytes;
    enum lr_status status = lr_tokenizer_encode(tokenizer, text, n, flags, &ids, &err);
    int valid = lr_utf8_valid_prefix(text, n) == n;
    if ((status == LR_OK) != valid)
        abort();
    if (status == LR_OK) {
        if (lr_tokenizer_decode(tokenizer, ids.ids, ids.n_ids, &bytes, &n_bytes, &err) != LR_OK)
            abort();
        if (gives_bytes_back && (n_bytes != n || memcmp(bytes, text, n) != 0))
            abort();
        free(bytes);
    }
    free(ids.ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    load();
    if (size == 0)
        return 0;
    char *repaired = malloc(3 * size + 1);
    if (!repaired)
        return 0;
    size_t n = lr_utf8_repair((const char *)data + 1, size - 1, repaired);
    if (lr_utf8_valid_prefix(repaired, n) != n)
        abort();
    int flags = data[0] & 1;
    for (int i = 0; i < N_TOKENIZERS; i++) {
        check(tokenizers[i], (const char *)data + 1, size - 1, flags, i == 0);
        check(tokenizers[i], repaired, n, flags, i == 0);
    }
    free(repaired);
    return 0;
}
