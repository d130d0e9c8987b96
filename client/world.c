#include "client/world.h"

#include <errno.h>
#include <ftw.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_ARGUMENTS = 64, LINE_BYTES = 4096, GRACE_SECONDS = 5 };

static int environment_number(const char *name, int otherwise)
{
    const char *value = getenv(name);
    return value && *value ? atoi(value) : otherwise;
}

int lr_world_rank(void)
{
    return environment_number("OMPI_COMM_WORLD_RANK", environment_number("PMIX_RANK", 0));
}

int lr_world_terminal_columns(void)
{
    struct winsize size;
    if (getenv("LONGREACH_COLUMNS"))
        return environment_number("LONGREACH_COLUMNS", 0);
    if (!isatty(STDERR_FILENO))
        return 0;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

enum lr_status lr_world_find(const struct lr_settings *settings, enum lr_world *world, struct lr_error *err)
{
    int world_size = environment_number("OMPI_COMM_WORLD_SIZE", 0);
    if (world_size > 0) {
        if (world_size > LR_COMM_MAX_WORKERS)
            return lr_fail(err, LR_INVALID, "a world of %d workers, the most is %d", world_size, LR_COMM_MAX_WORKERS);
        if (settings->workers > 0 && settings->workers != world_size)
            return lr_fail(err, LR_INVALID, "--workers %lld, but mpirun started %d", (long long)settings->workers,
                           world_size);
        *world = LR_WORLD_JOIN;
        return LR_OK;
    }
    if (environment_number("SLURM_STEP_NUM_TASKS", 1) > 1)
        return lr_fail(
            err, LR_INVALID,
            "srun started %d separate processes: start longreach once inside the allocation (sbatch or salloc), "
            "it starts its workers itself, or use mpirun",
            environment_number("SLURM_STEP_NUM_TASKS", 1));
    int tasks = getenv("SLURM_JOB_ID") ? environment_number("SLURM_NTASKS", 1) : 1;
    if (tasks > 1 && settings->workers != 1)
        *world = LR_WORLD_SLURM;
    else
        *world = settings->workers > 1 ? LR_WORLD_LOCAL : LR_WORLD_SELF;
    return LR_OK;
}

/* ---- what mpirun and its workers write to standard error ---- */

struct filter {
    char line[LINE_BYTES];
    size_t used;
    char *held; /* mpirun's own words */
    size_t n_held;
    int in_banner;
    int spoken; /* a worker has said why it ends */
};

static void hold(struct filter *filter, const char *line, size_t n)
{
    char *more = realloc(filter->held, filter->n_held + n);
    if (!more)
        return;
    memcpy(more + filter->n_held, line, n);
    filter->held = more;
    filter->n_held += n;
}

static void pass(const char *line, size_t n)
{
    ssize_t written = write(STDERR_FILENO, line, n);
    (void)written; /* nobody listens */
}

static int starts_with(const struct filter *filter, const char *start)
{
    return filter->used >= strlen(start) && memcmp(filter->line, start, strlen(start)) == 0;
}

/* A line is complete, or its start cannot wait (a progress bar has no newline). */
static void finish_line(struct filter *filter)
{
    int ends = filter->used > 0 && filter->line[filter->used - 1] == '\n';
    if (starts_with(filter, "--------------------")) {
        filter->in_banner = !filter->in_banner;
        hold(filter, filter->line, filter->used);
    } else if (filter->in_banner || starts_with(filter, "mpirun: ") || (starts_with(filter, "[") && ends)) {
        hold(filter, filter->line, filter->used);
    } else if (starts_with(filter, "longreach: ") && !strstr(filter->line, "warning: ")) {
        if (!filter->spoken)
            pass(filter->line, filter->used);
        filter->spoken = 1;
    } else {
        pass(filter->line, filter->used);
    }
    filter->used = 0;
}

static void take(struct filter *filter, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        filter->line[filter->used++] = bytes[i];
        filter->line[filter->used] = '\0';
        if (bytes[i] == '\n' || bytes[i] == '\r' || filter->used == LINE_BYTES - 1)
            finish_line(filter);
    }
    /* what is left is a bar unless it could become one of the lines above */
    if (filter->used > 0 && !strchr("-ml[", filter->line[0]) && !filter->in_banner)
        finish_line(filter);
}

/* ---- the parent ---- */

static volatile sig_atomic_t caught;

static void catch (int signal_number)
{
    caught = signal_number;
}

static int remove_entry(const char *path, const struct stat *facts, int kind, struct FTW *place)
{
    (void)facts;
    (void)kind;
    (void)place;
    remove(path);
    return 0;
}

/* Open MPI's shared memory and session files go into a directory of ours, so that nothing is left whoever dies. */
static int make_private_dir(char *path, size_t size_bytes)
{
    const char *bases[] = {"/dev/shm", getenv("TMPDIR"), "/tmp"};
    for (size_t i = 0; i < sizeof bases / sizeof bases[0]; i++) {
        if (!bases[i])
            continue;
        snprintf(path, size_bytes, "%s/longreach.XXXXXX", bases[i]);
        if (mkdtemp(path))
            return 1;
    }
    return 0;
}

/* Whoever still dies may remove or write a file meanwhile, which ends a walk early or keeps the directory. */
static void remove_private_dir(const char *path)
{
    for (int tries = 0; tries < 100; tries++) {
        nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
        if (access(path, F_OK) != 0)
            return;
        poll(NULL, 0, 20);
    }
}

static void run_mpirun(const struct lr_settings *settings, enum lr_world world, const char *dir, int argc, char **argv)
{
    char *arguments[MAX_ARGUMENTS], workers[24], self[PATH_MAX], columns[48];
    int n = 0;
    int64_t size = settings->workers > 0 ? settings->workers : environment_number("SLURM_NTASKS", 1);
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    snprintf(workers, sizeof workers, "%lld", (long long)size);
    snprintf(columns, sizeof columns, "LONGREACH_COLUMNS=%d", lr_world_terminal_columns());
    self[length > 0 ? length : 0] = '\0';
    char *const fixed[] = {
        "mpirun", "-np", workers, "--bind-to", "none", "-x", columns, "--mca", "orte_abort_print_stack", "0"};
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++)
        arguments[n++] = fixed[i];
    if (geteuid() == 0)
        arguments[n++] = "--allow-run-as-root";
    if (world == LR_WORLD_LOCAL || size > environment_number("SLURM_NTASKS", 1))
        arguments[n++] = "--oversubscribe";
    if (world == LR_WORLD_LOCAL && dir[0]) {
        char *const local[] = {"--host",
                               "localhost:1024",
                               "--mca",
                               "orte_tmpdir_base",
                               (char *)(uintptr_t)dir,
                               "--mca",
                               "btl_vader_backing_directory",
                               (char *)(uintptr_t)dir,
                               "--mca",
                               "btl",
                               "vader,self",
                               "--mca",
                               "pml",
                               "ob1"};
        for (size_t i = 0; i < sizeof local / sizeof local[0]; i++)
            arguments[n++] = local[i];
    }
    arguments[n++] = length > 0 ? self : argv[0];
    char **all = calloc((size_t)(n + argc + 1), sizeof *all);
    if (!all)
        _exit(LR_EXIT_FAILED);
    memcpy(all, arguments, (size_t)n * sizeof *all);
    memcpy(all + n, argv + 1, (size_t)(argc - 1) * sizeof *all);
    execvp("mpirun", all);
    dprintf(STDERR_FILENO, "longreach: mpirun cannot be started: %s; install Open MPI, or run with --workers 1\n",
            strerror(errno));
    _exit(LR_EXIT_FAILED);
}

/* Until mpirun has ended. An interrupt ends it; what does not end then is killed. */
static int watch(pid_t mpirun, int errors, struct filter *filter)
{
    int status = 0, told = 0, open_pipe = 1, ended = 0;
    time_t give_up = 0;
    while (!ended || open_pipe) {
        struct pollfd poll_errors = {.fd = open_pipe ? errors : -1, .events = POLLIN};
        int ready = poll(&poll_errors, 1, 50);
        char bytes[4096];
        ssize_t n = ready > 0 ? read(errors, bytes, sizeof bytes) : -1;
        if (ready > 0 && n > 0)
            take(filter, bytes, (size_t)n);
        else if (ready > 0 && (n == 0 || errno != EINTR))
            open_pipe = 0;
        if (!ended && waitpid(mpirun, &status, WNOHANG) == mpirun) {
            ended = 1;
            give_up = time(NULL) + 1; /* for a stray that keeps the pipe open */
        }
        if (caught && !told) {
            kill(mpirun, caught);
            told = 1;
            give_up = time(NULL) + GRACE_SECONDS;
        }
        if (give_up && time(NULL) > give_up) {
            if (ended)
                break;
            kill(-mpirun, SIGKILL);
            kill(mpirun, SIGKILL);
        }
    }
    return status;
}

/* Workers that mpirun did not wait for. */
static void reap(void)
{
    for (int tries = 0; tries < 100; tries++) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid < 0)
            return;
        if (pid == 0)
            poll(NULL, 0, 20);
    }
}

static int exit_code(int status, const struct filter *filter)
{
    if (caught)
        return caught == SIGINT ? LR_EXIT_INTERRUPTED : LR_EXIT_FAILED;
    if (WIFEXITED(status) && WEXITSTATUS(status) <= 2)
        return WEXITSTATUS(status);
    if (WIFEXITED(status) && WEXITSTATUS(status) == LR_EXIT_INTERRUPTED && filter->spoken)
        return LR_EXIT_INTERRUPTED;
    return LR_EXIT_FAILED;
}

int lr_world_launch(const struct lr_settings *settings, enum lr_world world, int reads_stdin, int argc, char **argv)
{
    char dir[PATH_MAX] = "";
    int errors[2];
    if (world == LR_WORLD_LOCAL && !make_private_dir(dir, sizeof dir))
        dir[0] = '\0';
    if (pipe(errors) != 0) {
        fprintf(stderr, "longreach: no pipe to mpirun: %s\n", strerror(errno));
        return LR_EXIT_FAILED;
    }
    struct sigaction action = {.sa_handler = catch};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    fflush(NULL);
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* workers that outlive mpirun become ours to reap */
    pid_t parent = getpid(), mpirun = fork();
    if (mpirun == 0) {
        setpgid(0, 0); /* the terminal's Ctrl-C comes to the parent alone */
        signal(SIGINT, SIG_DFL);
        signal(SIGTERM, SIG_DFL);
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (getppid() != parent)
            _exit(LR_EXIT_FAILED);
        dup2(errors[1], STDERR_FILENO);
        close(errors[0]);
        close(errors[1]);
        if (!reads_stdin && !freopen("/dev/null", "r", stdin))
            _exit(LR_EXIT_FAILED);
        run_mpirun(settings, world, dir, argc, argv);
    }
    close(errors[1]);
    struct filter filter = {0};
    int status = mpirun > 0 ? watch(mpirun, errors[0], &filter) : 1;
    reap();
    close(errors[0]);
    if (filter.used > 0)
        finish_line(&filter);
    int code = mpirun > 0 ? exit_code(status, &filter) : LR_EXIT_FAILED;
    if (code != LR_EXIT_OK && !filter.spoken) {
        if (caught)
            fprintf(stderr, "longreach: %s\n", caught == SIGINT ? "interrupted" : "terminated");
        else if (filter.n_held > 0)
            pass(filter.held, filter.n_held);
    }
    free(filter.held);
    if (dir[0])
        remove_private_dir(dir);
    return code;
}
