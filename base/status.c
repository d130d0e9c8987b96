#include "base/status.h"

#include <stdio.h>
#include <string.h>

const char *lr_status_text(enum lr_status status)
{
    static const char *const texts[] = {
#define X(code, text) [code] = text,
        LR_STATUS_MAP(X)
#undef X
    };
    if ((size_t)status >= sizeof texts / sizeof texts[0])
        return "unknown status";
    return texts[status];
}

enum lr_status lr_fail(struct lr_error *err, enum lr_status status, const char *format, ...)
{
    if (!err)
        return status;
    va_list args;
    va_start(args, format);
    int needed = vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    if (needed >= (int)sizeof err->message)
        memcpy(err->message + sizeof err->message - 4, "...", 4);
    for (char *c = err->message; *c; c++)
        if (*c == '\n' || *c == '\r')
            *c = ' ';
    err->status = status;
    return status;
}
