/* Monotonic time. Deadlines are absolute values of lr_clock_ns(). */
#ifndef LR_BASE_CLOCK_H
#define LR_BASE_CLOCK_H

#include <stdint.h>

int64_t lr_clock_ns(void);
double lr_clock_seconds(void);

#endif
