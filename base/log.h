/* The log: lower-case lines on standard error, for people who operate a run. Never per token above
 * debug. Thread-safe: a line is written by one call. */
#ifndef LR_BASE_LOG_H
#define LR_BASE_LOG_H

enum lr_log_level { LR_LOG_ERROR, LR_LOG_WARN, LR_LOG_INFO, LR_LOG_DEBUG };

/* Lines above `level` are dropped. `who` (for example "worker 1") is put before each line; NULL for
 * none. */
void lr_log_configure(enum lr_log_level level, const char *who);
void lr_log(enum lr_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
