/* OpenBLAS, twice in one process: once told which core it runs on, once left to find out. It decides while it is
 * loaded, so the second is loaded from a copy of the file, which the loader takes for another library. */
#include "bench/gemm.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 }; /* cblas.h */

typedef void sgemm(int order,
                   int trans_a,
                   int trans_b,
                   int m,
                   int n,
                   int k,
                   float alpha,
                   const float *a,
                   int lda,
                   const float *b,
                   int ldb,
                   float beta,
                   float *c,
                   int ldc);

struct library {
    sgemm *multiply;
    void (*set_threads)(int n_threads);
    char *(*core_name)(void);
};

static struct library libraries[2];

struct openblas {
    const struct library *library;
    struct product p;
};

static int load(const char *path, struct library *out)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return 0;
    *(void **)&out->multiply = dlsym(handle, "cblas_sgemm");
    *(void **)&out->set_threads = dlsym(handle, "openblas_set_num_threads");
    *(void **)&out->core_name = dlsym(handle, "openblas_get_corename");
    return out->multiply && out->set_threads && out->core_name;
}

static int load_copy(const char *path, struct library *out)
{
    int from = open(path, O_RDONLY | O_CLOEXEC), copy = memfd_create("openblas", MFD_CLOEXEC), ok = 0;
    struct stat info;
    if (from >= 0 && copy >= 0 && fstat(from, &info) == 0) {
        off_t done = 0;
        while (done < info.st_size && sendfile(copy, from, &done, (size_t)(info.st_size - done)) > 0)
            continue;
        char name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", copy);
        ok = done == info.st_size && load(name, out);
    }
    if (from >= 0)
        close(from);
    if (copy >= 0)
        close(copy);
    return ok;
}

static void *open_openblas(const struct racer *racer, const struct product *p)
{
    struct openblas *s = malloc(sizeof *s);
    if (s)
        *s = (struct openblas){&libraries[racer->which], *p};
    return s;
}

static void run_openblas(void *state)
{
    const struct openblas *s = state;
    int m = (int)s->p.m, n = (int)s->p.n, k = (int)s->p.k;
    s->library->set_threads(s->p.n_threads);
    s->library->multiply(ROW_MAJOR, NO_TRANS, TRANS, m, n, k, 1.0f, s->p.x, k, s->p.w, k, 0.0f, s->p.y, n);
}

int openblas_racers(struct racer *racers, int avx2)
{
    const char *core = __builtin_cpu_supports("avx512f") && !avx2 ? "SkylakeX"
                       : __builtin_cpu_is("amd")                  ? "Zen"
                                                                  : "Haswell";
    /* threads that spin long after a product would run into the next racer's time */
    setenv("OPENBLAS_THREAD_TIMEOUT", "20", 1);
    setenv("OPENBLAS_CORETYPE", core, 1);
    int told = load(LR_BENCH_OPENBLAS, &libraries[0]);
    unsetenv("OPENBLAS_CORETYPE");
    int found = load_copy(LR_BENCH_OPENBLAS, &libraries[1]), n = 0;
    for (int i = 0; i < 2; i++) {
        if (!(i ? found : told))
            continue;
        racers[n] = (struct racer){.which = i, .open = open_openblas, .run = run_openblas, .close = free};
        snprintf(racers[n].name, sizeof racers[n].name, "OpenBLAS %s%s", libraries[i].core_name(), i ? "*" : "");
        n++;
    }
    return n;
}
