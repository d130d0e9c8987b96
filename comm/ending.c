#include "comm/ending.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const int poll_ms = 20;
static const int grace_ms = 2000; /* between SIGTERM, which lets a daemon clean up, and SIGKILL */
static const int hold_ms = 10000; /* a claim, then a daemon that hangs is killed; mpirun is impatient for five seconds */

static struct lr_ending *armed;

static void sleep_ms(int ms)
{
    struct timespec nap = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&nap, NULL);
}

static void kill_workers(const struct lr_ending *ending)
{
    int64_t self = getpid();
    for (int r = 0; r < ending->n_places; r++) {
        const struct lr_place *place = &ending->places[r];
        if (place->process != self && lr_place_same_host(&ending->mine, place) &&
            place->process_namespace == ending->mine.process_namespace &&
            !lr_process_is_gone(place->process, place->started))
            kill((pid_t)place->process, SIGKILL);
    }
}

static bool all_gone(const struct lr_ending *ending)
{
    if (ending->daemon && !lr_process_is_gone(ending->daemon, ending->daemon_started))
        return false;
    int64_t self = getpid();
    for (int r = 0; r < ending->n_places; r++) {
        const struct lr_place *place = &ending->places[r];
        if (place->process != self && lr_place_same_host(&ending->mine, place) &&
            place->process_namespace == ending->mine.process_namespace &&
            !lr_process_is_gone(place->process, place->started))
            return false;
    }
    return true;
}

/* True once nothing is left, or false after `ms`. */
static bool wait_until_gone(const struct lr_ending *ending, int ms)
{
    for (int waited = 0; waited < ms; waited += poll_ms) {
        if (all_gone(ending))
            return true;
        sleep_ms(poll_ms);
    }
    return all_gone(ending);
}

/* Nothing of the worker may be held but `kept` (-1: nothing): mpirun waits until the last writer of a worker's output
 * has closed it. */
static void close_everything_but(int kept)
{
    unsigned first_behind = kept < 0 ? 0U : (unsigned)kept + 1;
    if ((kept <= 0 || syscall(SYS_close_range, 0U, (unsigned)kept - 1, 0U) == 0) &&
        syscall(SYS_close_range, first_behind, ~0U, 0U) == 0)
        return;
    long most = sysconf(_SC_OPEN_MAX);
    for (int fd = 0; fd < (most > 0 && most < 65536 ? most : 65536); fd++)
        if (fd != kept)
            close(fd);
}

/* A process of a session of its own that holds nothing but `kept` (-1: nothing): 0 is returned in it. The other returns
 * once that is so, for daemons signal the process group of a worker, and a crowded machine runs the new process late. */
static pid_t fork_apart(int kept)
{
    int apart[2];
    bool waits = pipe(apart) == 0;
    pid_t child = _Fork(); /* fork itself is not safe in a signal handler */
    if (child == 0) {
        setsid();
        for (int number = 1; number < NSIG; number++)
            signal(number, number == SIGTERM || number == SIGHUP ? SIG_IGN : SIG_DFL);
        close_everything_but(kept); /* the pipe's end is what the other waits for */
        return 0;
    }
    if (waits) {
        char none;
        close(apart[1]);
        while (read(apart[0], &none, 1) < 0 && errno == EINTR)
            continue;
        close(apart[0]);
    }
    return child;
}

/* A process that keeps the claim until the daemon is gone: the daemon may kill the claimant before that. Where it has
 * killed all of them and then hangs (mpirun 4.1 did, on a crowded machine), this one is left to end it. */
static void hold_claim(const struct lr_ending *ending, int claim)
{
    if (fork_apart(claim) != 0)
        return;
    for (int waited = 0; waited < hold_ms && !lr_process_is_gone(ending->daemon, ending->daemon_started);
         waited += poll_ms)
        sleep_ms(poll_ms);
    if (!lr_process_is_gone(ending->daemon, ending->daemon_started)) {
        kill_workers(ending);
        kill((pid_t)ending->daemon, SIGKILL);
    }
    _exit(0);
}

/* Whether this process is the one of its host that tells the daemon: mpirun takes a second SIGTERM
 * within five seconds for impatience, and then leaves workers, output and shared memory behind. The
 * claim is the name of a socket. */
static bool claim_daemon(const struct lr_ending *ending)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct lr_text text = {.start = name.sun_path + 1, .size_bytes = sizeof name.sun_path - 1};
    lr_text_add(&text, "longreach-ending-");
    lr_text_add_number(&text, ending->daemon);
    lr_text_add(&text, "-");
    lr_text_add_number(&text, ending->daemon_started);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    socklen_t name_bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + text.used);
    if (fd < 0)
        return true;
    if (bind(fd, (const struct sockaddr *)&name, name_bytes) == 0)
        hold_claim(ending, fd);
    else if (errno == EADDRINUSE)
        return false;
    return true;
}

static void end_all(const struct lr_ending *ending)
{
    bool daemon_lives = ending->daemon && !lr_process_is_gone(ending->daemon, ending->daemon_started);
    if (daemon_lives) {
        if (claim_daemon(ending))
            kill((pid_t)ending->daemon, SIGTERM);
        wait_until_gone(ending, grace_ms);
    }
    kill_workers(ending);
    if (daemon_lives && !lr_process_is_gone(ending->daemon, ending->daemon_started))
        kill((pid_t)ending->daemon, SIGKILL);
}

static void strike(int signal_number)
{
    (void)signal_number;
    const char *sentence = armed->sentence;
    if (sentence && write(STDERR_FILENO, sentence, strlen(sentence)) < 0)
        sentence = NULL; /* nobody listens: nothing to be done about it */
    /* The daemon's SIGTERM would end this process before it has ended the rest. */
    signal(SIGTERM, SIG_IGN);
    end_all(armed);
    _exit(armed->exit_code);
}

void lr_ending_find(struct lr_ending *ending)
{
    memset(ending, 0, sizeof *ending);
    ending->daemon = lr_process_find_daemon(&ending->daemon_started);
    lr_place_find(&ending->mine);
}

void lr_ending_arm(struct lr_ending *ending, unsigned seconds)
{
    armed = ending;
    struct sigaction action = {.sa_handler = strike};
    sigfillset(&action.sa_mask);
    sigaction(SIGALRM, &action, NULL);
    sigset_t alarm_only;
    sigemptyset(&alarm_only);
    sigaddset(&alarm_only, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &alarm_only, NULL);
    alarm(seconds);
}

void lr_ending_disarm(void)
{
    alarm(0);
}

void lr_ending_watch(const struct lr_ending *ending, unsigned seconds)
{
    if (fork_apart(-1) != 0)
        return; /* where there is no memory for a watcher the alarm has to do */
    if (!wait_until_gone(ending, (int)seconds * 1000))
        end_all(ending);
    _exit(0);
}
