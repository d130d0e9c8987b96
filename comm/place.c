#include "comm/place.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What /proc/<process>/stat tells. */
struct process_facts {
    char name[32];
    char state;
    int64_t parent;
    int64_t started;
};

void lr_text_add(struct lr_text *text, const char *more)
{
    while (*more && text->used + 1 < text->size_bytes)
        text->start[text->used++] = *more++;
    if (text->size_bytes > 0)
        text->start[text->used] = '\0';
}

void lr_text_add_number(struct lr_text *text, int64_t number)
{
    char digits[24];
    size_t at = sizeof digits;
    uint64_t left = number < 0 ? 0 - (uint64_t)number : (uint64_t)number;
    digits[--at] = '\0';
    do {
        digits[--at] = (char)('0' + left % 10);
        left /= 10;
    } while (left > 0);
    if (number < 0)
        digits[--at] = '-';
    lr_text_add(text, digits + at);
}

void lr_place_describe(struct lr_text *text, int rank, const struct lr_place *place)
{
    lr_text_add(text, "worker ");
    lr_text_add_number(text, rank);
    lr_text_add(text, " (host ");
    lr_text_add(text, place->host);
    lr_text_add(text, ", process ");
    lr_text_add_number(text, place->process);
    lr_text_add(text, ")");
}

/* The first bytes of a file as a string; false where it cannot be read. */
static bool read_text(const char *path, char *text, size_t text_bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, text, text_bytes - 1);
    close(fd);
    if (got <= 0)
        return false;
    text[got] = '\0';
    return true;
}

/* The number that begins field `n` of a text of fields parted by single blanks, counted from 0. */
static int64_t number_field(const char *text, int n)
{
    while (n > 0 && *text)
        if (*text++ == ' ')
            n--;
    int64_t number = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        number = number * 10 + (*text - '0');
    return number;
}

/* proc(5): "1234 (name) S parent ...", where the name may hold blanks and brackets; the start time
 * is field 22, counted from 1. */
static bool read_facts(int64_t process, struct process_facts *facts)
{
    char path[64], stat_text[512];
    struct lr_text path_text = {.start = path, .size_bytes = sizeof path};
    lr_text_add(&path_text, "/proc/");
    lr_text_add_number(&path_text, process);
    lr_text_add(&path_text, "/stat");
    if (!read_text(path, stat_text, sizeof stat_text))
        return false;
    const char *name = strchr(stat_text, '(');
    const char *end = strrchr(stat_text, ')');
    if (!name || !end || end < name || end[1] == '\0' || end[2] == '\0')
        return false;
    size_t name_bytes = (size_t)(end - name) - 1;
    if (name_bytes >= sizeof facts->name)
        name_bytes = sizeof facts->name - 1;
    memcpy(facts->name, name + 1, name_bytes);
    facts->name[name_bytes] = '\0';
    facts->state = end[2];
    facts->parent = number_field(end + 2, 1);
    facts->started = number_field(end + 2, 19);
    return true;
}

void lr_place_find(struct lr_place *place)
{
    memset(place, 0, sizeof *place);
    place->process = getpid();
    struct process_facts facts;
    if (read_facts(place->process, &facts))
        place->started = facts.started;
    struct stat namespace;
    if (stat("/proc/self/ns/pid", &namespace) == 0)
        place->process_namespace = namespace.st_ino;
    read_text("/proc/sys/kernel/random/boot_id", place->boot, sizeof place->boot);
    place->boot[strcspn(place->boot, "\n")] = '\0';
    gethostname(place->host, sizeof place->host - 1);
}

bool lr_place_same_host(const struct lr_place *a, const struct lr_place *b)
{
    return strcmp(a->host, b->host) == 0 && strcmp(a->boot, b->boot) == 0;
}

bool lr_process_is_gone(int64_t process, int64_t started)
{
    if (kill((pid_t)process, 0) != 0 && errno == ESRCH)
        return true;
    struct process_facts facts;
    if (!read_facts(process, &facts)) /* it may have ended just now; or /proc is not for us */
        return kill((pid_t)process, 0) != 0 && errno == ESRCH;
    return facts.state == 'Z' || facts.state == 'X' || facts.started != started;
}

bool lr_place_is_gone(const struct lr_place *mine, const struct lr_place *other)
{
    if (!lr_place_same_host(mine, other) || mine->process_namespace != other->process_namespace)
        return false;
    int errno_before = errno;
    bool gone = lr_process_is_gone(other->process, other->started);
    errno = errno_before;
    return gone;
}

int64_t lr_process_find_daemon(int64_t *started)
{
    static const char *const names[] = {"mpirun", "orterun", "mpiexec", "orted", "prterun", "prted"};
    enum { MOST_WRAPPERS = 8 }; /* between the daemon and us: a shell, a profiler, "nice" */
    int64_t process = getppid();
    for (int i = 0; i <= MOST_WRAPPERS && process > 1; i++) {
        struct process_facts facts;
        if (!read_facts(process, &facts))
            return 0;
        for (size_t n = 0; n < sizeof names / sizeof names[0]; n++)
            if (strcmp(facts.name, names[n]) == 0) {
                *started = facts.started;
                return process;
            }
        process = facts.parent;
    }
    return 0;
}
