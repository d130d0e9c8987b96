/* What every job takes from the command line: model, workers, attention, sampling. */
#ifndef LR_CLIENT_SETTINGS_H
#define LR_CLIENT_SETTINGS_H

#include "client/job.h"
#include "client/options.h"

enum { LR_EXIT_OK = 0, LR_EXIT_FAILED = 1, LR_EXIT_USAGE = 2, LR_EXIT_INTERRUPTED = 130 };

struct lr_settings {
    const char *model;
    int64_t workers; /* 0: not given */
    int64_t threads; /* a worker; 0: the cores divided */
    int64_t segment_tokens;
    int device, transport, act, isa, attention, experts, kv_dtype; /* indices of their choices */
    int64_t top_k_blocks, decode_pages;
    int64_t kv_device_bytes, kv_host_bytes;
    double temperature, top_p;
    int64_t top_k, seed, max_new_tokens;
    struct lr_texts stop;
    int64_t timeout_seconds;
    int quiet, json, parse_special, help;
};

extern const struct lr_settings lr_settings_default;

/* Adds the table's rows for these settings to `rows` at *n. `generates`: with those of sampling. */
void lr_settings_options(struct lr_settings *settings, int generates, struct lr_option *rows, int *n);

struct lr_job_options lr_settings_job(const struct lr_settings *settings, const struct lr_comm *comm);
struct lr_sampling lr_settings_sampling(const struct lr_settings *settings);

/* Cores that this process may use: its affinity, cut by the cgroup's quota. */
int lr_usable_cores(void);

/* "\n", "\t" and "\\" in a text from the command line become what they stand for; the caller frees the result. NULL
 * without memory. */
char *lr_unescape(const char *text);

#endif
