/* Stands in for libFuzzer where the compiler has none: every file of a directory through the target, and after each a
 * number of mutations that depend on nothing but the files. usage: fuzz_X DIRECTORY MUTATIONS
 *
 * The inputs run in a child; its parent survives a sanitizer's _exit and names the input. */
#include "base/file.h"
#include "tests/fuzz/fuzz.h"

#include <dirent.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_FILES = 1000, MAX_GROWTH = 4096, PATH_BYTES = 4096, MAX_CHANGES = 4 };

struct input {
    char *path;
    uint8_t *data;
    size_t size;
};

struct corpus {
    struct input inputs[MAX_FILES];
    int n;
};

/* Shared with the child. */
struct place {
    int input, mutation;
};

/* splitmix64 */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static size_t below(uint64_t *state, size_t n)
{
    return n ? (size_t)(next_random(state) % n) : 0;
}

static void overwrite(uint64_t *state, uint8_t *data, size_t size, const void *bytes, size_t n)
{
    size_t at = below(state, size + 1);
    memcpy(data + at, bytes, n < size - at ? n : size - at);
}

/* Moves the tail so that `n` bytes are free at `at`; `room` is the buffer's size. */
static size_t insert(uint8_t *data, size_t size, size_t room, size_t at, const uint8_t *bytes, size_t n)
{
    if (n > room - size)
        n = room - size;
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, bytes, n);
    return size + n;
}

static size_t cut_out(uint64_t *state, uint8_t *data, size_t size)
{
    size_t at = below(state, size), n = 1 + below(state, size - at < 64 ? size - at : 64);
    n = n < size - at ? n : size - at;
    memmove(data + at, data + at + n, size - at - n);
    return size - n;
}

static size_t change(uint64_t *state, const struct corpus *corpus, uint8_t *data, size_t size, size_t room)
{
    static const char *const words[] = {"-1",
                                        "0",
                                        "1e999",
                                        "18446744073709551615",
                                        "9223372036854775807",
                                        "null",
                                        "[]",
                                        "{}",
                                        "\"\"",
                                        "\\u0000",
                                        "\xed\xa0\x80",
                                        "\xff",
                                        "true",
                                        "\x00\x00\x00\x00"};
    uint8_t bytes[8];
    uint64_t random = next_random(state);
    const char *word = words[below(state, sizeof words / sizeof words[0])];
    const struct input *other = &corpus->inputs[below(state, (size_t)corpus->n)];
    size_t from = below(state, other->size), n = below(state, other->size - from < 256 ? other->size - from + 1 : 256);
    memcpy(bytes, &random, sizeof bytes);
    switch (size == 0 ? 3 : random >> 56 & 7) {
    case 0:
        data[below(state, size)] ^= (uint8_t)(1u << (random & 7));
        return size;
    case 1:
        data[below(state, size)] = bytes[0];
        return size;
    case 2:
        overwrite(state, data, size, bytes, 1 + (random & 7));
        return size;
    case 3:
        return insert(data, size, room, below(state, size + 1), bytes, 1 + (random & 3));
    case 4:
        overwrite(state, data, size, word, strlen(word));
        return size;
    case 5:
        return insert(data, size, room, below(state, size + 1), (const uint8_t *)word, strlen(word));
    case 6:
        return insert(data, size, room, below(state, size + 1), other->data + from, n);
    default:
        return cut_out(state, data, size);
    }
}

/* Runs over an exact allocation, so that a sanitizer sees a read behind its end. */
static void run_exact(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);
    require(copy != NULL, "no memory for an input");
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void run_all(const struct corpus *corpus, int mutations, struct place *place)
{
    for (place->input = 0; place->input < corpus->n; place->input++) {
        const struct input *input = &corpus->inputs[place->input];
        size_t room = input->size + MAX_GROWTH;
        uint8_t *data = malloc(room);
        require(data != NULL, "no memory for an input");
        place->mutation = 0;
        run_exact(input->data, input->size);
        for (place->mutation = 1; place->mutation <= mutations; place->mutation++) {
            uint64_t state = (uint64_t)place->input << 32 | (uint32_t)place->mutation;
            size_t size = input->size, changes = 1 + below(&state, MAX_CHANGES);
            memcpy(data, input->data, size);
            for (size_t i = 0; i < changes; i++)
                size = change(&state, corpus, data, size, room);
            run_exact(data, size);
        }
        free(data);
    }
}

static int by_path(const void *a, const void *b)
{
    return strcmp(((const struct input *)a)->path, ((const struct input *)b)->path);
}

static void read_corpus(const char *dir, struct corpus *corpus)
{
    DIR *listing = opendir(dir);
    require(listing != NULL, "the corpus cannot be opened");
    for (struct dirent *entry = readdir(listing); entry; entry = readdir(listing)) {
        char path[PATH_BYTES], *data;
        struct lr_error why = {0};
        struct input *input = &corpus->inputs[corpus->n];
        if (entry->d_name[0] == '.')
            continue;
        require(corpus->n < MAX_FILES, "the corpus has too many files");
        snprintf(path, sizeof path, "%s/%s", dir, entry->d_name);
        if (lr_file_read(path, (size_t)1 << 24, &data, &input->size, &why) != LR_OK)
            require(0, why.message);
        input->path = strdup(path);
        input->data = (uint8_t *)data;
        corpus->n++;
    }
    closedir(listing);
    require(corpus->n > 0, "the corpus is empty");
    qsort(corpus->inputs, (size_t)corpus->n, sizeof corpus->inputs[0], by_path);
}

static void free_corpus(struct corpus *corpus)
{
    for (int i = 0; i < corpus->n; i++) {
        free(corpus->inputs[i].path);
        free(corpus->inputs[i].data);
    }
}

int main(int argc, char **argv)
{
    static struct corpus corpus;
    if (argc != 3) {
        fprintf(stderr, "usage: %s DIRECTORY MUTATIONS\n", argv[0]);
        return 2;
    }
    read_corpus(argv[1], &corpus);
    struct place *place = mmap(NULL, sizeof *place, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    require(place != MAP_FAILED, "no memory to share");
    pid_t child = fork();
    require(child >= 0, "no child process");
    if (child == 0) {
        run_all(&corpus, atoi(argv[2]), place);
        free_corpus(&corpus);
        return 0;
    }
    int status = 0;
    require(waitpid(child, &status, 0) == child, "the child is lost");
    if (status == 0)
        printf("%d files, %s mutations of each\n", corpus.n, argv[2]);
    else if (place->input < corpus.n)
        fprintf(stderr, "failed at %s, mutation %d (0: as it is)\n", corpus.inputs[place->input].path, place->mutation);
    free_corpus(&corpus);
    return status == 0 ? 0 : 1;
}
