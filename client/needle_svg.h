/* A picture of a needle run: one mark for each fact, depth from left to right. */
#ifndef LR_CLIENT_NEEDLE_SVG_H
#define LR_CLIENT_NEEDLE_SVG_H

#include "base/status.h"
#include <stdint.h>

struct lr_svg_point {
    double depth; /* 0 to 1 */
    int found;
    const char *name;
};

LR_MUST_USE enum lr_status lr_svg_write(const char *path,
                                        const char *title,
                                        int64_t n_tokens,
                                        const struct lr_svg_point *points,
                                        int64_t n_points,
                                        struct lr_error *err);

#endif
