/* UTF-8: how far a text is valid, and a version of it that is. (RFC 3629: no surrogates, nothing
 * overlong, nothing above U+10FFFF.) */
#ifndef LR_BASE_UTF8_H
#define LR_BASE_UTF8_H

#include <stddef.h>

/* Bytes of the longest valid prefix: n where all of the text is valid. */
size_t lr_utf8_valid_prefix(const char *text, size_t n);

/* Copies the text with U+FFFD for each maximal invalid part (Unicode 3.9, best practice) into `out`,
 * which needs 3 n + 1 bytes; a NUL follows. Returns the length. */
size_t lr_utf8_repair(const char *text, size_t n, char *out);

#endif
