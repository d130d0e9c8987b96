/* Runs a target over files, and over seeded mutations of each: the smoke test that every build has.
 *
 * usage: fuzz_X MUTATIONS FILE_OR_DIRECTORY... */
#include "tests/fuzz/fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_BYTES = 1 << 20 };

static uint64_t random_state = 0x9e3779b97f4a7c15u;
static long n_runs;

static uint64_t draw(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return n ? random_state % n : 0;
}

/* One input in memory of exactly its size, so that a sanitizer sees one byte too many. */
static void run(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy)
        abort();
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    n_runs++;
}

static size_t mutate(uint8_t *data, size_t size)
{
    static const uint8_t interesting[] = {0, 1, 0x7f, 0x80, 0xff, '"', '{', '}', '[', ']', ',', ':', '-', '9', '0', '\\'};
    for (uint64_t n = 1 + draw(4); n > 0 && size > 0; n--) {
        size_t at = draw(size < 4096 || draw(2) ? size : 4096); /* headers matter more */
        size_t length = 1 + draw(16), from = draw(size);
        switch (draw(6)) {
        case 0:
            data[at] = (uint8_t)draw(256);
            break;
        case 1:
            data[at] = interesting[draw(sizeof interesting)];
            break;
        case 2:
            data[at] ^= (uint8_t)(1u << draw(8));
            break;
        case 3: /* cut off */
            size = at;
            break;
        case 4: /* take out */
            length = length < size - at ? length : size - at;
            memmove(data + at, data + at + length, size - at - length);
            size -= length;
            break;
        default: /* copy from elsewhere */
            length = length < size - at ? length : size - at;
            length = length < size - from ? length : size - from;
            memmove(data + at, data + from, length);
        }
    }
    return size;
}

static void run_file(const char *path, long mutations)
{
    static uint8_t data[MAX_BYTES], changed[MAX_BYTES];
    FILE *file = fopen(path, "rb");
    if (!file)
        return;
    size_t size = fread(data, 1, sizeof data, file);
    fclose(file);
    run(data, size);
    for (long i = 0; i < mutations; i++) {
        memcpy(changed, data, size);
        run(changed, mutate(changed, size));
    }
}

static void run_path(const char *path, long mutations)
{
    struct stat facts;
    if (stat(path, &facts) == 0 && !S_ISDIR(facts.st_mode)) {
        run_file(path, mutations);
        return;
    }
    DIR *entries = opendir(path);
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        char inside[4096];
        snprintf(inside, sizeof inside, "%s/%s", path, entry->d_name);
        if (entry->d_type == DT_REG)
            run_file(inside, mutations);
    }
    if (entries)
        closedir(entries);
}

int main(int argc, char **argv)
{
    long mutations = argc > 1 ? atol(argv[1]) : 0;
    for (int i = 2; i < argc; i++)
        run_path(argv[i], mutations);
    printf("%ld inputs\n", n_runs);
    return n_runs > 0 ? 0 : 1;
}
