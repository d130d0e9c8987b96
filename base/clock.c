#include "base/clock.h"

#include <time.h>

int64_t lr_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

double lr_clock_seconds(void)
{
    return (double)lr_clock_ns() * 1e-9;
}
