#include "base/memory.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

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
