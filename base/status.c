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

/* A name out of a hostile file may hold line ends and a terminal's escape sequences (C0, DEL, and C1 as UTF-8). */
static void make_printable(char *text)
{
    for (unsigned char *c = (unsigned char *)text; *c; c++) {
        if (*c == '\n' || *c == '\r' || *c == '\t')
            *c = ' ';
        else if (*c < 0x20 || *c == 0x7f)
            *c = '?';
        else if (*c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0)
            c[0] = c[1] = '?';
    }
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
    make_printable(err->message);
    err->status = status;
    return status;
}
