#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static enum lr_log_level log_level = LR_LOG_WARN;
static char log_who[32];

void lr_log_configure(enum lr_log_level level, const char *who)
{
    log_level = level;
    snprintf(log_who, sizeof log_who, "%s", who ? who : "");
}

void lr_log(enum lr_log_level level, const char *format, ...)
{
    static const char *const names[] = {"error", "warning", "info", "debug"};
    if (level > log_level)
        return;
    char line[1024];
    int head = snprintf(line, sizeof line, "longreach%s%s: %s: ", log_who[0] ? " " : "", log_who, names[level]);
    va_list args;
    va_start(args, format);
    int body = vsnprintf(line + head, sizeof line - (size_t)head - 1, format, args);
    va_end(args);
    size_t length = (size_t)head + (body > 0 ? (size_t)body : 0);
    if (length > sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, length);
    (void)written; /* nowhere left to report to */
}
