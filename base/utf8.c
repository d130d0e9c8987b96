#include "base/utf8.h"

#include <string.h>

/* Bytes of the character at the start of [text, text + n), or 0 where it is invalid; then *bad is the
 * length of the invalid part. */
static size_t character(const unsigned char *text, size_t n, size_t *bad)
{
    unsigned char first = text[0];
    size_t length = first < 0x80                     ? 1
                    : first >= 0xc2 && first < 0xe0  ? 2
                    : (first & 0xf0) == 0xe0         ? 3
                    : first >= 0xf0 && first <= 0xf4 ? 4
                                                     : 0;
    *bad = 1;
    if (length <= 1)
        return length;
    unsigned char low = 0x80, high = 0xbf; /* of the second byte */
    if (first == 0xe0)
        low = 0xa0;
    else if (first == 0xed)
        high = 0x9f;
    else if (first == 0xf0)
        low = 0x90;
    else if (first == 0xf4)
        high = 0x8f;
    for (size_t i = 1; i < length; i++) {
        if (i == n || text[i] < low || text[i] > high)
            return 0;
        *bad = i + 1;
        low = 0x80;
        high = 0xbf;
    }
    return length;
}

size_t lr_utf8_valid_prefix(const char *text, size_t n)
{
    size_t at = 0, bad;
    while (at < n) {
        size_t length = character((const unsigned char *)text + at, n - at, &bad);
        if (length == 0)
            return at;
        at += length;
    }
    return n;
}

size_t lr_utf8_repair(const char *text, size_t n, char *out)
{
    size_t at = 0, written = 0, bad;
    while (at < n) {
        size_t length = character((const unsigned char *)text + at, n - at, &bad);
        memcpy(out + written, length > 0 ? text + at : "\xef\xbf\xbd", length > 0 ? length : 3);
        written += length > 0 ? length : 3;
        at += length > 0 ? length : bad;
    }
    out[written] = '\0';
    return written;
}
