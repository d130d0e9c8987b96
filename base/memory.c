#include "base/memory.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static size_t read_number(const char *path, const char *key)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return SIZE_MAX;
    char line[256];
    size_t found = SIZE_MAX;
    while (fgets(line, sizeof line, file)) {
        uintmax_t value;
        size_t length = strlen(key);
        if (strncmp(line, key, length) == 0 && sscanf(line + length, " %" SCNuMAX, &value) == 1)
            found = (size_t)value;
    }
    fclose(file);
    return found;
}

size_t lr_memory_available(void)
{
    size_t kb = read_number("/proc/meminfo", "MemAvailable:");
    size_t bytes = kb == SIZE_MAX ? SIZE_MAX / 2 : kb * 1024;
    size_t limit = read_number("/sys/fs/cgroup/memory.max", "");
    size_t used = read_number("/sys/fs/cgroup/memory.current", "");
    if (limit != SIZE_MAX && used != SIZE_MAX && limit > used && limit - used < bytes)
        bytes = limit - used;
    return bytes;
}

size_t lr_memory_resident(const void *base, size_t size_bytes)
{
    enum { PAGES_AT_ONCE = 4096 };
    unsigned char present[PAGES_AT_ONCE];
    size_t page = (size_t)sysconf(_SC_PAGESIZE), resident = 0;
    for (size_t at = 0; at < size_bytes; at += PAGES_AT_ONCE * page) {
        size_t n = size_bytes - at < PAGES_AT_ONCE * page ? size_bytes - at : PAGES_AT_ONCE * page;
        if (mincore((char *)(uintptr_t)base + at, n, present) != 0)
            continue;
        for (size_t i = 0; i < (n + page - 1) / page; i++)
            resident += (present[i] & 1u) * page;
    }
    return resident < size_bytes ? resident : size_bytes;
}
