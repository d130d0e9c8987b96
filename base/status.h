/* Status codes and error text.
 *
 * A function that can fail returns enum lr_status and takes `struct lr_error *err` last. The first
 * one to decide that something failed fills `err` with one sentence that has the names and numbers
 * a user needs; callers only propagate the code. Outputs are set on success only. `err` may be NULL
 * where nobody will read the text. */
#ifndef LR_BASE_STATUS_H
#define LR_BASE_STATUS_H

#include <stdarg.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LR_STATUS_MAP(X)                                                                                               \
    X(LR_OK, "ok")                                                                                                     \
    X(LR_INVALID, "invalid input")                                                                                     \
    X(LR_NOT_FOUND, "not found")                                                                                       \
    X(LR_IO, "input/output error")                                                                                     \
    X(LR_CORRUPT, "corrupt data")                                                                                      \
    X(LR_UNSUPPORTED, "unsupported")                                                                                   \
    X(LR_NO_MEMORY, "out of memory")                                                                                   \
    X(LR_TIMEOUT, "deadline exceeded")                                                                                 \
    X(LR_PEER_LOST, "worker lost")                                                                                     \
    X(LR_OUT_OF_STEP, "workers out of step")                                                                           \
    X(LR_CANCELLED, "cancelled")                                                                                       \
    X(LR_FULL, "queue full")                                                                                           \
    X(LR_INTERNAL, "internal error")

enum lr_status {
#define X(code, text) code,
    LR_STATUS_MAP(X)
#undef X
};

#define LR_ERROR_TEXT_BYTES 1024

struct lr_error {
    enum lr_status status;
    char message[LR_ERROR_TEXT_BYTES]; /* one sentence, NUL-terminated, without control characters */
};

#define LR_MUST_USE __attribute__((warn_unused_result))

/* The short fixed name of a status, for example "out of memory". Never NULL. */
const char *lr_status_text(enum lr_status status);

/* Fills `err` (may be NULL) with a printf-style sentence and returns `status`, so that deciding
 * reads `return lr_fail(err, LR_INVALID, "...", ...)`. A message that is too long is cut and ends
 * in "..."; control characters become spaces or question marks. */
enum lr_status lr_fail(struct lr_error *err, enum lr_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Propagates a failure to the caller. The only control-flow macro of the C code. */
#define LR_TRY(expression)                                                                                             \
    do {                                                                                                               \
        enum lr_status lr_try_status_ = (expression);                                                                  \
        if (lr_try_status_ != LR_OK)                                                                                   \
            return lr_try_status_;                                                                                     \
    } while (0)

#ifdef __cplusplus
}
#endif

#endif
