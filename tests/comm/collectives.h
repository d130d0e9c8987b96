/* Every collective, with every byte that comes checked: over any communicator, in any memory.
 *
 * Byte `offset` of what worker `from` has for worker `to` in step n is byte_of(n, from, to, offset);
 * whoever receives it computes it again. */
#ifndef LR_TESTS_COMM_COLLECTIVES_H
#define LR_TESTS_COMM_COLLECTIVES_H

#include "tests/comm/area.h"

enum { ANYONE = LR_COMM_MAX_WORKERS };

/* What is checked from now on. `host` is what ends the world. */
void collectives_use(struct lr_comm *comm, struct lr_comm *host, const struct area *area);

/* Edge and random sizes, several in flight, refusals. */
void collectives_check(void);

/* ---- for checks of one's own ---- */

/* A sentence on stderr; ends the world with exit code 1. */
_Noreturn void give_up(const char *format, ...) __attribute__((format(printf, 1, 2)));
void must(enum lr_status status, const char *what, const struct lr_error *err);
void must_fail(enum lr_status status, enum lr_status wanted, const char *what);

/* Memory of the area, guarded on both sides, never NULL. */
unsigned char *take_buffer(size_t size_bytes);
void release_buffer(unsigned char *buffer, size_t size_bytes, const char *what);
void fill(unsigned char *data, size_t size_bytes, uint64_t n, int from, int to);
void check(const unsigned char *data, size_t size_bytes, uint64_t n, int from, int to, const char *what);

#endif
