/* Facts planted in a document: what needle asks for. Pure functions of document and seed. */
#ifndef LR_CLIENT_NEEDLE_PLANT_H
#define LR_CLIENT_NEEDLE_PLANT_H

#include "base/status.h"
#include <stddef.h>
#include <stdint.h>

struct lr_needle {
    char subject[96]; /* "access code of silver window" */
    int64_t value;    /* six digits */
    double depth;     /* share of the text before it, 0 to 1 */
    size_t offset;    /* in the text without needles */
};

/* K needles with different names, in ascending depth, each at the line boundary nearest to a random
 * depth, no two at the same. LR_INVALID where the text has fewer line boundaries. */
LR_MUST_USE enum lr_status lr_needles_make(
    const char *text, size_t n_bytes, int64_t n_needles, uint64_t seed, struct lr_needle *out, struct lr_error *err);

/* The text with a line "The <subject> is <value>." at each needle's place; malloc'd. */
LR_MUST_USE enum lr_status lr_needles_plant(const char *text,
                                            size_t n_bytes,
                                            const struct lr_needle *needles,
                                            int64_t n_needles,
                                            char **out,
                                            size_t *n_out,
                                            struct lr_error *err);

#endif
