#include "client/signals.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PHASE_BYTES = 128 };

static struct lr_comm *world;
/* Two copies and an index: the handler may strike while one is being written. */
static char phases[2][PHASE_BYTES] = {"the start", "the start"};
static volatile sig_atomic_t current;

void lr_signals_phase(const char *phase)
{
    int next = 1 - (int)current;
    snprintf(phases[next], PHASE_BYTES, "%s", phase);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    current = next;
}

const char *lr_signals_current_phase(void)
{
    return phases[current];
}

static void add(char *text, size_t *used, size_t size_bytes, const char *more)
{
    size_t n = strlen(more);
    if (n > size_bytes - 1 - *used)
        n = size_bytes - 1 - *used;
    memcpy(text + *used, more, n);
    *used += n;
    text[*used] = '\0';
}

static void end(int signal_number)
{
    int several = world && world->size > 1;
    char text[512] = "longreach: ", lost[256] = "";
    size_t used = strlen(text);
    if (several)
        lr_comm_describe_loss(world, lost, sizeof lost);
    if (lost[0]) {
        add(text, &used, sizeof text, lost);
        add(text, &used, sizeof text, " in ");
    } else {
        add(text, &used, sizeof text, signal_number == SIGINT || several ? "interrupted in " : "terminated in ");
    }
    add(text, &used, sizeof text, phases[current]);
    add(text, &used, sizeof text, "\n");
    if (!several || (lr_comm_speaks(world) && world->root_is_here)) {
        ssize_t written = write(STDERR_FILENO, text, used);
        (void)written; /* nobody listens */
    }
    if (several) {
        /* another that is told later must not take this worker for one that was lost */
        struct timespec pause = {.tv_nsec = 500 * 1000 * 1000};
        nanosleep(&pause, NULL);
    }
    _exit(lost[0] || signal_number == SIGTERM ? 1 : 130);
}

static void handle(int signal_number, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler};
    sigfillset(&action.sa_mask);
    sigaction(signal_number, &action, NULL);
}

void lr_signals_install(struct lr_comm *comm)
{
    world = comm;
    handle(SIGINT, end);
    handle(SIGTERM, end);
    sigset_t both;
    sigemptyset(&both);
    sigaddset(&both, SIGINT);
    sigaddset(&both, SIGTERM);
    sigprocmask(SIG_UNBLOCK, &both, NULL);
}

void lr_signals_end(void)
{
    handle(SIGINT, SIG_DFL);
    handle(SIGTERM, SIG_DFL);
    world = NULL;
}
