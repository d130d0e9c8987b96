/* Any bytes as a text, through tokenizers of four kinds. The first byte chooses: bit 0 parses special tokens, bits 1
 * and 2 the tokenizer. */
#include "base/utf8.h"
#include "tests/fuzz/fuzz.h"
#include "worker/weights/tokenizer.h"

/* Which texts come back as they were. */
enum exact { EXACT_ALWAYS, EXACT_WITHOUT_ANGLE, EXACT_FOR_ASCII };

static struct {
    const char *dir;
    enum exact exact;
    struct lr_tokenizer *tokenizer;
} kinds[] = {{"models/longreach-tiny", EXACT_ALWAYS, NULL},
             {"tests/oracle/tokenizer/gpt2", EXACT_WITHOUT_ANGLE, NULL}, /* its <left> and <right> eat white space */
             {"tests/oracle/tokenizer/llama3", EXACT_ALWAYS, NULL},
             {"tests/oracle/tokenizer/qwen", EXACT_FOR_ASCII, NULL}}; /* NFC */

static struct lr_tokenizer *tokenizer_of(int kind)
{
    struct lr_error why = {0};
    if (!kinds[kind].tokenizer && lr_tokenizer_load(kinds[kind].dir, &kinds[kind].tokenizer, &why) != LR_OK)
        require(0, why.message);
    return kinds[kind].tokenizer;
}

static int comes_back(int kind, const char *text, size_t n)
{
    if (kinds[kind].exact == EXACT_WITHOUT_ANGLE)
        return memchr(text, '<', n) == NULL;
    for (size_t i = 0; i < n && kinds[kind].exact == EXACT_FOR_ASCII; i++)
        if ((unsigned char)text[i] >= 0x80)
            return 0;
    return 1;
}

static void check_ids(int kind, const struct lr_token_buffer *ids, const char *text, size_t n)
{
    struct lr_tokenizer *tokenizer = tokenizer_of(kind);
    struct lr_error why = {0};
    char *bytes = NULL;
    size_t n_bytes = 0;
    for (int64_t i = 0; i < ids->n_ids; i++)
        require(ids->ids[i] >= 0 && ids->ids[i] < lr_tokenizer_size(tokenizer), "an id that is no token");
    require(lr_tokenizer_decode(tokenizer, ids->ids, ids->n_ids, &bytes, &n_bytes, &why) == LR_OK, "ids without bytes");
    if (comes_back(kind, text, n))
        require(n_bytes == n && memcmp(bytes, text, n) == 0, "the text did not come back");
    else /* token borders lie between characters where the tokenizer changed the text: what comes back is text */
        require(lr_utf8_valid_prefix(bytes, n_bytes) == n_bytes, "what came back is no text");
    free(bytes);
}

/* A second time, over the cache of words that the first filled. */
static void check_again(int kind, const struct lr_token_buffer *ids, const char *text, size_t n, int flags)
{
    struct lr_token_buffer again = {0};
    struct lr_error why = {0};
    require(lr_tokenizer_encode(tokenizer_of(kind), text, n, flags, &again, &why) == LR_OK, "refused the second time");
    require(again.n_ids == ids->n_ids, "another number of ids the second time");
    require(ids->n_ids == 0 || memcmp(again.ids, ids->ids, (size_t)ids->n_ids * sizeof *ids->ids) == 0,
            "other ids the second time");
    free(again.ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    int kind = data[0] >> 1 & 3, flags = data[0] & 1 ? LR_TOKENIZE_PARSE_SPECIAL : 0;
    const char *text = (const char *)data + 1;
    size_t n = size - 1;
    struct lr_token_buffer ids = {0};
    struct lr_error why = {0};
    enum lr_status status = lr_tokenizer_encode(tokenizer_of(kind), text, n, flags, &ids, &why);
    if (lr_utf8_valid_prefix(text, n) < n) {
        require(status == LR_INVALID && ids.n_ids == 0, "bytes that are no UTF-8 were taken");
        require_sentence(status, &why, NULL);
    } else {
        require(status == LR_OK, why.message);
        check_ids(kind, &ids, text, n);
        check_again(kind, &ids, text, n, flags);
    }
    free(ids.ids);
    return 0;
}
