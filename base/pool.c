#include "base/pool.h"

#include "base/clock.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct lr_pool {
    int n_threads;
    int64_t spin_ns;
    pthread_t *threads;
    struct helper *helpers;

    lr_pool_task *task;
    void *context;
    int64_t n_tasks;
    _Alignas(64) atomic_int_fast64_t next_task;
    _Alignas(64) atomic_int working; /* helpers that have not finished the current loop */
    _Alignas(64) atomic_uint round;  /* raised by one for each loop */
    atomic_int sleeping;             /* helpers that wait on `wake` */
    int stopping;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

struct helper {
    struct lr_pool *pool;
    int thread;
};

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_tasks(struct lr_pool *pool, int thread)
{
    for (;;) {
        int64_t task = atomic_fetch_add_explicit(&pool->next_task, 1, memory_order_relaxed);
        if (task >= pool->n_tasks)
            return;
        pool->task(pool->context, task, thread);
    }
}

/* Waits until the round differs from `seen`: spinning first, then on the condition variable. */
static unsigned await_round(struct lr_pool *pool, unsigned seen)
{
    int64_t give_up_ns = lr_clock_ns() + pool->spin_ns;
    for (int spins = 0;; spins++) {
        unsigned round = atomic_load_explicit(&pool->round, memory_order_acquire);
        if (round != seen)
            return round;
        cpu_relax();
        if ((spins & 63) == 63 && lr_clock_ns() >= give_up_ns)
            break;
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleeping, 1);
    while (atomic_load(&pool->round) == seen)
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
    return atomic_load_explicit(&pool->round, memory_order_acquire);
}

static void *helper_main(void *argument)
{
    struct helper *helper = argument;
    struct lr_pool *pool = helper->pool;
    unsigned seen = 0;
    for (;;) {
        seen = await_round(pool, seen);
        if (pool->stopping)
            return NULL;
        take_tasks(pool, helper->thread);
        atomic_fetch_sub_explicit(&pool->working, 1, memory_order_release);
    }
}

/* Publishes the fields written before it to the helpers. */
static void start_round(struct lr_pool *pool)
{
    atomic_fetch_add(&pool->round, 1);
    if (atomic_load(&pool->sleeping) > 0) {
        /* A helper that is about to sleep holds the mutex between its last look and its wait. */
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

void lr_pool_run(struct lr_pool *pool, int64_t n_tasks, lr_pool_task *task, void *context)
{
    if (pool->n_threads == 1 || n_tasks <= 1) {
        for (int64_t i = 0; i < n_tasks; i++)
            task(context, i, 0);
        return;
    }
    pool->task = task;
    pool->context = context;
    pool->n_tasks = n_tasks;
    atomic_store_explicit(&pool->next_task, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->working, pool->n_threads - 1, memory_order_relaxed);
    start_round(pool);
    take_tasks(pool, 0);
    for (int spins = 0; atomic_load_explicit(&pool->working, memory_order_acquire) > 0; spins++) {
        cpu_relax();
        if (pool->spin_ns == 0 || spins > 100000)
            sched_yield();
    }
}

int lr_pool_threads(const struct lr_pool *pool)
{
    return pool->n_threads;
}

static void stop_helpers(struct lr_pool *pool, int n_started)
{
    pool->stopping = 1;
    start_round(pool);
    for (int i = 0; i < n_started; i++)
        pthread_join(pool->threads[i], NULL);
}

static void free_pool(struct lr_pool *pool)
{
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->helpers);
    free(pool->threads);
    free(pool);
}

enum lr_status lr_pool_create(int n_threads, int spin_us, struct lr_pool **out, struct lr_error *err)
{
    struct lr_pool *pool = aligned_alloc(64, (sizeof *pool + 63) & ~(size_t)63);
    if (!pool)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a pool of %d threads", n_threads);
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->spin_ns = (int64_t)spin_us * 1000;
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    pool->helpers = calloc((size_t)n_threads, sizeof *pool->helpers);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    if (!pool->threads || !pool->helpers) {
        free_pool(pool);
        return lr_fail(err, LR_NO_MEMORY, "no memory for a pool of %d threads", n_threads);
    }
    for (int i = 0; i < n_threads - 1; i++) {
        pool->helpers[i] = (struct helper){.pool = pool, .thread = i + 1};
        int failed = pthread_create(&pool->threads[i], NULL, helper_main, &pool->helpers[i]);
        if (failed) {
            stop_helpers(pool, i);
            free_pool(pool);
            return lr_fail(err, LR_NO_MEMORY, "cannot start thread %d of %d: %s", i + 1, n_threads, strerror(failed));
        }
    }
    *out = pool;
    return LR_OK;
}

void lr_pool_destroy(struct lr_pool *pool)
{
    if (!pool)
        return;
    stop_helpers(pool, pool->n_threads - 1);
    free_pool(pool);
}
