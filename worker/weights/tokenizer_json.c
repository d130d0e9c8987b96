/* tokenizer.json -> struct lr_tokenizer. Refuses by name whatever would make our ids differ from
 * HuggingFace's. */
#include "worker/weights/tokenizer_impl.h"

#include "base/file.h"
#include "base/utf8.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_IDS = 1 << 24, MAX_MERGES = 1 << 24, PATH_BYTES = 4096 };
static const size_t max_json_bytes = (size_t)512 << 20;

static const char gpt2_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct reader {
    const char *path;
    struct lr_tokenizer *tokenizer;
};

static const char *type_of(json_t *object)
{
    const char *type = json_string_value(json_object_get(object, "type"));
    return type ? type : "(none)";
}

static int is_set(json_t *object, const char *name)
{
    json_t *value = json_object_get(object, name);
    return value && !json_is_null(value) && !json_is_false(value) &&
           !(json_is_string(value) && json_string_length(value) == 0);
}

/* ---- the byte alphabet (GPT-2): printable bytes stand for themselves, the others for U+0100 on ---- */

static int stands_for_itself(int byte)
{
    return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
}

struct alphabet {
    short byte_of[0x180]; /* by code point; -1: none */
};

static void make_alphabet(struct alphabet *alphabet)
{
    memset(alphabet->byte_of, -1, sizeof alphabet->byte_of);
    int next = 0x100;
    for (int byte = 0; byte < 256; byte++)
        alphabet->byte_of[stands_for_itself(byte) ? byte : next++] = (short)byte;
}

/* A vocabulary entry's bytes; 0 where a character is not of the alphabet. `out` has room for n bytes. */
static int spell_bytes(const struct alphabet *alphabet, const char *text, size_t n, char *out, size_t *n_out)
{
    size_t length = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned code = (unsigned char)text[i];
        if (code >= 0xc4 && code <= 0xdf && i + 1 < n)
            code = (code & 31u) << 6 | ((unsigned char)text[++i] & 63u);
        else if ((code == 0xc2 || code == 0xc3) && i + 1 < n)
            code = (code & 31u) << 6 | ((unsigned char)text[++i] & 63u);
        else if (code >= 0x80)
            return 0;
        if (code >= 0x180 || alphabet->byte_of[code] < 0)
            return 0;
        out[length++] = (char)alphabet->byte_of[code];
    }
    *n_out = length;
    return 1;
}

/* ---- model ---- */

static enum lr_status check_model(const struct reader *r, json_t *model, struct lr_error *err)
{
    /* files of old versions leave the type out */
    if (json_object_get(model, "type") && strcmp(type_of(model), "BPE") != 0)
        return lr_fail(err, LR_UNSUPPORTED, "%s: a model of type '%.40s'; longreach reads byte-level BPE", r->path,
                       type_of(model));
    static const char *const refused[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                          "byte_fallback"};
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++)
        if (is_set(model, refused[i]))
            return lr_fail(err, LR_UNSUPPORTED, "%s: a BPE model with %s is not supported", r->path, refused[i]);
    if (!json_is_object(json_object_get(model, "vocab")) || !json_is_array(json_object_get(model, "merges")))
        return lr_fail(err, LR_CORRUPT, "%s: the model needs a vocab and merges", r->path);
    return LR_OK;
}

static enum lr_status check_id(const struct reader *r, const char *token, json_t *id, struct lr_error *err)
{
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= MAX_IDS)
        return lr_fail(err, LR_CORRUPT, "%s: the id of token '%.60s' is not from 0 to %d", r->path, token, MAX_IDS - 1);
    return LR_OK;
}

static enum lr_status count_ids(const struct reader *r, json_t *vocab, json_t *added, struct lr_error *err)
{
    const char *token;
    json_t *id, *entry;
    size_t at;
    json_object_foreach(vocab, token, id)
    {
        LR_TRY(check_id(r, token, id, err));
        if (json_integer_value(id) >= r->tokenizer->n_ids)
            r->tokenizer->n_ids = json_integer_value(id) + 1;
    }
    json_array_foreach(added, at, entry)
    {
        const char *content = json_string_value(json_object_get(entry, "content"));
        id = json_object_get(entry, "id");
        LR_TRY(check_id(r, content ? content : "(none)", id, err));
        if (json_integer_value(id) >= r->tokenizer->n_ids)
            r->tokenizer->n_ids = json_integer_value(id) + 1;
    }
    return LR_OK;
}

static enum lr_status
read_vocab(const struct reader *r, const struct alphabet *alphabet, json_t *vocab, struct lr_error *err)
{
    const char *token;
    json_t *id;
    json_object_foreach(vocab, token, id)
    {
        size_t n = strlen(token), n_bytes;
        char *bytes = malloc(n + 1);
        if (!bytes)
            return lr_fail(err, LR_NO_MEMORY, "%s: no memory for a token", r->path);
        /* entries outside the alphabet can only be added tokens; no merge leads to them */
        struct lr_error why;
        enum lr_status status = LR_OK;
        if (spell_bytes(alphabet, token, n, bytes, &n_bytes))
            status = lr_bpe_add_token(r->tokenizer->bpe, (int32_t)json_integer_value(id), bytes, n_bytes, &why);
        free(bytes);
        if (status != LR_OK)
            return lr_fail(err, status, "%s: %s", r->path, why.message);
    }
    return LR_OK;
}

/* Both sides of a merge: ["a", "b"], or "a b" in older files. */
static int split_merge(json_t *merge, const char **left, size_t *n_left, const char **right, size_t *n_right)
{
    if (json_is_array(merge)) {
        json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
        if (json_array_size(merge) != 2 || !json_is_string(a) || !json_is_string(b))
            return 0;
        *left = json_string_value(a);
        *n_left = json_string_length(a);
        *right = json_string_value(b);
        *n_right = json_string_length(b);
        return 1;
    }
    const char *text = json_string_value(merge), *space = text ? strchr(text, ' ') : NULL;
    if (!space || strchr(space + 1, ' '))
        return 0;
    *left = text;
    *n_left = (size_t)(space - text);
    *right = space + 1;
    *n_right = strlen(space + 1);
    return 1;
}

static enum lr_status
read_merge(const struct reader *r, const struct alphabet *alphabet, size_t at, json_t *merge, struct lr_error *err)
{
    const char *left, *right;
    size_t n_left, n_right, a, b;
    if (!split_merge(merge, &left, &n_left, &right, &n_right))
        return lr_fail(err, LR_CORRUPT, "%s: merge %zu does not name two tokens", r->path, at);
    char *bytes = malloc(n_left + n_right + 1);
    if (!bytes)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for a merge", r->path);
    int32_t ids[3] = {-1, -1, -1};
    if (spell_bytes(alphabet, left, n_left, bytes, &a) && spell_bytes(alphabet, right, n_right, bytes + a, &b)) {
        ids[0] = lr_bpe_find(r->tokenizer->bpe, bytes, a);
        ids[1] = lr_bpe_find(r->tokenizer->bpe, bytes + a, b);
        ids[2] = lr_bpe_find(r->tokenizer->bpe, bytes, a + b);
    }
    free(bytes);
    if (ids[0] < 0 || ids[1] < 0 || ids[2] < 0)
        return lr_fail(err, LR_CORRUPT, "%s: merge %zu, '%.40s' and '%.40s', %s not in the vocabulary", r->path, at,
                       left, right, ids[0] < 0 || ids[1] < 0 ? "has a side that is" : "has a result that is");
    return lr_bpe_add_merge(r->tokenizer->bpe, ids[0], ids[1], ids[2], err);
}

static enum lr_status read_model(const struct reader *r, json_t *model, json_t *added, struct lr_error *err)
{
    LR_TRY(check_model(r, model, err));
    json_t *vocab = json_object_get(model, "vocab"), *merges = json_object_get(model, "merges"), *merge;
    LR_TRY(count_ids(r, vocab, added, err));
    if (json_array_size(merges) > MAX_MERGES)
        return lr_fail(err, LR_UNSUPPORTED, "%s: more than %d merges", r->path, MAX_MERGES);
    LR_TRY(lr_bpe_create(r->tokenizer->n_ids, (int64_t)json_array_size(merges), &r->tokenizer->bpe, err));
    r->tokenizer->added_bytes = calloc((size_t)r->tokenizer->n_ids + 1, sizeof *r->tokenizer->added_bytes);
    if (!r->tokenizer->added_bytes)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for %lld tokens", r->path, (long long)r->tokenizer->n_ids);
    struct alphabet alphabet;
    make_alphabet(&alphabet);
    LR_TRY(read_vocab(r, &alphabet, vocab, err));
    size_t at;
    json_array_foreach(merges, at, merge)
    {
        LR_TRY(read_merge(r, &alphabet, at, merge, err));
    }
    struct lr_error why;
    enum lr_status status =
        lr_bpe_finish(r->tokenizer->bpe, json_is_true(json_object_get(model, "ignore_merges")), &why);
    return status == LR_OK ? LR_OK : lr_fail(err, status, "%s: %s", r->path, why.message);
}

/* ---- normalizer ---- */

static enum lr_status read_normalizer(const struct reader *r, json_t *normalizer, struct lr_error *err)
{
    static const struct {
        const char *name;
        enum lr_normal_form form;
    } forms[] = {{"NFC", LR_NORMAL_NFC}, {"NFD", LR_NORMAL_NFD}, {"NFKC", LR_NORMAL_NFKC}, {"NFKD", LR_NORMAL_NFKD}};
    if (!normalizer || json_is_null(normalizer))
        return LR_OK;
    json_t *list = json_object_get(normalizer, "normalizers");
    if (strcmp(type_of(normalizer), "Sequence") == 0 && json_array_size(list) == 0)
        return LR_OK;
    if (strcmp(type_of(normalizer), "Sequence") == 0 && json_array_size(list) == 1)
        normalizer = json_array_get(list, 0);
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++)
        if (strcmp(type_of(normalizer), forms[i].name) == 0) {
            r->tokenizer->form = forms[i].form;
            return LR_OK;
        }
    return lr_fail(err, LR_UNSUPPORTED, "%s: the normalizer '%.40s' is not one of NFC, NFD, NFKC, NFKD", r->path,
                   type_of(normalizer));
}

/* ---- pre-tokenizer ---- */

static enum lr_status
add_split(const struct reader *r, const char *pattern, size_t n, int matches_only, struct lr_error *err)
{
    struct lr_error why;
    enum lr_status status = lr_pretokenizer_add(&r->tokenizer->words, pattern, n, matches_only, &why);
    return status == LR_OK ? LR_OK : lr_fail(err, status, "%s: %s", r->path, why.message);
}

/* A literal, quoted for the regex: every ASCII character that is no letter or digit gets a backslash. */
static enum lr_status
add_literal(const struct reader *r, const char *text, size_t n, int matches_only, struct lr_error *err)
{
    char *quoted = malloc(2 * n + 1);
    size_t at = 0;
    if (!quoted)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for a pattern", r->path);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x80 && !((c | 32) >= 'a' && (c | 32) <= 'z') && !(c >= '0' && c <= '9'))
            quoted[at++] = '\\';
        quoted[at++] = text[i];
    }
    enum lr_status status = add_split(r, quoted, at, matches_only, err);
    free(quoted);
    return status;
}

static enum lr_status read_split(const struct reader *r, json_t *split, struct lr_error *err)
{
    json_t *pattern = json_object_get(split, "pattern"), *regex = json_object_get(pattern, "Regex");
    json_t *literal = json_object_get(pattern, "String");
    const char *behavior = json_string_value(json_object_get(split, "behavior"));
    int invert = json_is_true(json_object_get(split, "invert"));
    int matches_only = behavior && strcmp(behavior, "Removed") == 0 && invert;
    if (!behavior || (!matches_only && strcmp(behavior, "Isolated") != 0))
        return lr_fail(err, LR_UNSUPPORTED, "%s: a Split with behavior '%.40s'%s is not supported", r->path,
                       behavior ? behavior : "(none)", invert ? ", inverted," : "");
    if (json_is_string(regex))
        return add_split(r, json_string_value(regex), json_string_length(regex), matches_only, err);
    if (json_is_string(literal) && json_string_length(literal) > 0)
        return add_literal(r, json_string_value(literal), json_string_length(literal), matches_only, err);
    return lr_fail(err, LR_CORRUPT, "%s: a Split without a pattern", r->path);
}

static enum lr_status
read_pre_tokenizer(const struct reader *r, json_t *step, int depth, int *has_bytes, struct lr_error *err)
{
    const char *type = type_of(step);
    if (*has_bytes)
        return lr_fail(err, LR_UNSUPPORTED, "%s: a pre-tokenizer '%.40s' behind ByteLevel is not supported", r->path,
                       type);
    if (strcmp(type, "Sequence") == 0 && depth == 0) {
        json_t *entry;
        size_t at;
        json_array_foreach(json_object_get(step, "pretokenizers"), at, entry)
        {
            LR_TRY(read_pre_tokenizer(r, entry, 1, has_bytes, err));
        }
        return LR_OK;
    }
    if (strcmp(type, "Split") == 0)
        return read_split(r, step, err);
    if (strcmp(type, "Digits") == 0)
        return json_is_true(json_object_get(step, "individual_digits")) ? add_split(r, "\\p{N}", 5, 0, err)
                                                                        : add_split(r, "\\p{N}+", 6, 0, err);
    if (strcmp(type, "ByteLevel") != 0)
        return lr_fail(err, LR_UNSUPPORTED,
                       "%s: the pre-tokenizer '%.40s' is not one of Sequence, Split, Digits, ByteLevel", r->path, type);
    *has_bytes = 1;
    json_t *space = json_object_get(step, "add_prefix_space"), *regex = json_object_get(step, "use_regex");
    int adds_space = !space || json_is_true(space);
    if (adds_space && r->tokenizer->words.n_splits > 0)
        return lr_fail(err, LR_UNSUPPORTED, "%s: add_prefix_space behind another pre-tokenizer is not supported",
                       r->path);
    r->tokenizer->words.add_prefix_space = adds_space;
    return !regex || json_is_true(regex) ? add_split(r, gpt2_pattern, sizeof gpt2_pattern - 1, 0, err) : LR_OK;
}

/* ---- added tokens ---- */

static enum lr_status
append_added(const struct reader *r, json_t *entry, struct lr_added_set *set, int64_t capacity, struct lr_error *err)
{
    const char *content = json_string_value(json_object_get(entry, "content"));
    struct lr_added_token token = {
        .id = (int32_t)json_integer_value(json_object_get(entry, "id")),
        .special = json_is_true(json_object_get(entry, "special")),
        .single_word = json_is_true(json_object_get(entry, "single_word")),
        .lstrip = json_is_true(json_object_get(entry, "lstrip")),
        .rstrip = json_is_true(json_object_get(entry, "rstrip")),
        .normalized = json_is_true(json_object_get(entry, "normalized")),
    };
    if (!set->tokens)
        set->tokens = calloc((size_t)capacity, sizeof *set->tokens);
    if (!set->tokens)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for %lld added tokens", r->path, (long long)capacity);
    LR_TRY(lr_normalize(token.normalized ? r->tokenizer->form : LR_NORMAL_NONE, content, strlen(content),
                        &token.content, &token.n_bytes, err));
    if (token.n_bytes == 0) {
        free(token.content);
        return LR_OK;
    }
    set->tokens[set->n_tokens++] = token;
    return LR_OK;
}

static enum lr_status read_added(const struct reader *r, json_t *added, struct lr_error *err)
{
    json_t *entry;
    size_t at;
    int64_t n = (int64_t)json_array_size(added);
    json_array_foreach(added, at, entry)
    {
        const char *content = json_string_value(json_object_get(entry, "content"));
        int64_t id = json_integer_value(json_object_get(entry, "id"));
        if (!content || content[0] == '\0')
            return lr_fail(err, LR_CORRUPT, "%s: added token %lld has no content", r->path, (long long)id);
        if (r->tokenizer->added_bytes[id])
            return lr_fail(err, LR_CORRUPT, "%s: two added tokens have the id %lld", r->path, (long long)id);
        r->tokenizer->added_bytes[id] = strdup(content);
        if (!r->tokenizer->added_bytes[id])
            return lr_fail(err, LR_NO_MEMORY, "%s: no memory for an added token", r->path);
        int normalized = json_is_true(json_object_get(entry, "normalized"));
        LR_TRY(append_added(r, entry, normalized ? &r->tokenizer->normalized : &r->tokenizer->plain, n, err));
    }
    lr_added_set_sort(&r->tokenizer->plain);
    lr_added_set_sort(&r->tokenizer->normalized);
    return LR_OK;
}

static enum lr_status read_all(const struct reader *r, json_t *root, struct lr_error *err)
{
    json_t *added = json_object_get(root, "added_tokens"), *words = json_object_get(root, "pre_tokenizer");
    int has_bytes = 0;
    if (!json_is_object(json_object_get(root, "model")))
        return lr_fail(err, LR_CORRUPT, "%s has no model", r->path);
    LR_TRY(read_normalizer(r, json_object_get(root, "normalizer"), err));
    LR_TRY(read_model(r, json_object_get(root, "model"), added, err));
    if (words && !json_is_null(words))
        LR_TRY(read_pre_tokenizer(r, words, 0, &has_bytes, err));
    if (!has_bytes)
        return lr_fail(err, LR_UNSUPPORTED,
                       "%s: longreach reads byte-level BPE, and there is no ByteLevel pre-tokenizer", r->path);
    return read_added(r, added, err);
}

enum lr_status lr_tokenizer_parse(
    const char *json, size_t json_bytes, const char *path, struct lr_tokenizer **out, struct lr_error *err)
{
    json_error_t why;
    json_t *root = json_loadb(json, json_bytes, JSON_REJECT_DUPLICATES, &why);
    if (!root)
        return lr_fail(err, LR_CORRUPT, "%s is not valid JSON: %s in line %d", path, why.text, why.line);
    struct reader r = {path, calloc(1, sizeof(struct lr_tokenizer))};
    enum lr_status status =
        r.tokenizer ? read_all(&r, root, err) : lr_fail(err, LR_NO_MEMORY, "%s: no memory for a tokenizer", path);
    json_decref(root);
    if (status == LR_OK)
        *out = r.tokenizer;
    else
        lr_tokenizer_free(r.tokenizer);
    return status;
}

enum lr_status lr_tokenizer_load(const char *model_dir, struct lr_tokenizer **out, struct lr_error *err)
{
    char path[PATH_BYTES], *json;
    size_t json_bytes;
    if (snprintf(path, sizeof path, "%s/tokenizer.json", model_dir) >= (int)sizeof path)
        return lr_fail(err, LR_INVALID, "the model directory's name is longer than %d bytes", PATH_BYTES);
    LR_TRY(lr_file_read(path, max_json_bytes, &json, &json_bytes, err));
    enum lr_status status = lr_tokenizer_parse(json, json_bytes, path, out, err);
    free(json);
    return status;
}
