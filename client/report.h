/* What a person sees while a job runs: a bar on a terminal, a line now and then elsewhere. Worker 0 only; standard
 * error. */
#ifndef LR_CLIENT_REPORT_H
#define LR_CLIENT_REPORT_H

#include <stdint.h>

struct lr_progress {
    int on;      /* 0: says nothing */
    int columns; /* of the terminal; 0: none, lines are written instead */
    const char *title;
    const char *unit;
    int64_t total;
    double started, shown; /* seconds */
    int drawn;
};

/* `columns`: see lr_world_terminal_columns. */
void lr_progress_begin(
    struct lr_progress *progress, int on, int columns, const char *title, const char *unit, int64_t total);

/* `detail`: "wave 3 of 12". Draws at most ten times a second, lines every ten seconds. */
void lr_progress_update(struct lr_progress *progress, int64_t done, const char *detail);

/* Takes the bar away. */
void lr_progress_end(struct lr_progress *progress);

/* "1,234,567"; in one of four static buffers, reused in turn. */
const char *lr_number_text(int64_t number);

/* "1.25 GiB", "1:02:03", likewise. */
const char *lr_bytes_text(int64_t bytes);
const char *lr_duration_text(double seconds);

#endif
