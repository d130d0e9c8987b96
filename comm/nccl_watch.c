#include "comm/nccl_watch.h"

#include "base/clock.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

static const int64_t look_ns = 50000000;

struct lr_nccl_watch {
    pthread_t thread;
    pthread_mutex_t mutex; /* of all below */
    pthread_cond_t ending;
    ncclComm_t nccl;
    int64_t deadline_ns; /* 0: nobody is inside NCCL */
    bool aborted, ends;
};

static void sleep_until_next_look(struct lr_nccl_watch *watch)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    int64_t ns = until.tv_nsec + look_ns;
    until.tv_sec += ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    pthread_cond_timedwait(&watch->ending, &watch->mutex, &until);
}

static void *look_after(void *argument)
{
    struct lr_nccl_watch *watch = argument;
    pthread_mutex_lock(&watch->mutex);
    while (!watch->ends) {
        if (!watch->aborted && watch->deadline_ns > 0 && lr_clock_ns() > watch->deadline_ns) {
            watch->aborted = true;
            pthread_mutex_unlock(&watch->mutex);
            ncclCommAbort(watch->nccl);
            pthread_mutex_lock(&watch->mutex);
        } else {
            sleep_until_next_look(watch);
        }
    }
    pthread_mutex_unlock(&watch->mutex);
    return NULL;
}

enum lr_status lr_nccl_watch_open(struct lr_nccl_watch **out, struct lr_error *err)
{
    struct lr_nccl_watch *watch = calloc(1, sizeof *watch);
    if (!watch)
        return lr_fail(err, LR_NO_MEMORY, "no memory to watch over NCCL");
    pthread_mutex_init(&watch->mutex, NULL);
    pthread_cond_init(&watch->ending, NULL);
    if (pthread_create(&watch->thread, NULL, look_after, watch) != 0) {
        free(watch);
        return lr_fail(err, LR_NO_MEMORY, "no thread to watch over NCCL");
    }
    *out = watch;
    return LR_OK;
}

void lr_nccl_watch_close(struct lr_nccl_watch *watch)
{
    if (!watch)
        return;
    pthread_mutex_lock(&watch->mutex);
    watch->ends = true;
    pthread_cond_signal(&watch->ending);
    bool aborted = watch->aborted;
    pthread_mutex_unlock(&watch->mutex);
    if (aborted) { /* its abort may be stuck in the network: then it is left behind */
        pthread_detach(watch->thread);
        return;
    }
    pthread_join(watch->thread, NULL);
    pthread_cond_destroy(&watch->ending);
    pthread_mutex_destroy(&watch->mutex);
    free(watch);
}

void lr_nccl_watch_enter(struct lr_nccl_watch *watch, ncclComm_t nccl, int64_t timeout_ms)
{
    pthread_mutex_lock(&watch->mutex);
    watch->nccl = nccl;
    watch->deadline_ns = lr_clock_ns() + timeout_ms * 1000000;
    pthread_mutex_unlock(&watch->mutex);
}

bool lr_nccl_watch_leave(struct lr_nccl_watch *watch)
{
    pthread_mutex_lock(&watch->mutex);
    watch->deadline_ns = 0;
    bool aborted = watch->aborted;
    pthread_mutex_unlock(&watch->mutex);
    return !aborted;
}
