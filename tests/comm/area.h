/* The memory that the data of a check lies in: the host's, a pretended device's, or a GPU's. */
#ifndef LR_TESTS_COMM_AREA_H
#define LR_TESTS_COMM_AREA_H

#include "comm/links.h"
#include <stdbool.h>

struct area {
    const char *name;

    /* Memory of the area; ends the process where there is none. */
    void *(*take)(size_t size_bytes);
    void (*release)(void *base, size_t size_bytes);

    /* From and to ordinary memory; after everything that was asked for before, and done on return. */
    void (*put)(void *to, const void *from, size_t size_bytes);
    void (*get)(void *to, const void *from, size_t size_bytes);

    /* What is launched between the two is captured and started at once by the second. NULL where nothing is. */
    void (*unit_begin)(void);
    void (*unit_end)(void);

    struct lr_link_memory links;
};

const struct area *area_host(void);

/* A pretended device: its memory is closed to the host but inside the functions of the area, so that whoever reads or
 * writes it directly dies; copies and uploads happen at the latest moment that the contract allows. */
const struct area *area_fake(void);

/* The GPU that this process makes its own: device `index` modulo their number. NULL in a build without CUDA or where
 * there is none. `links`, to be opened later, is asked lr_comm_check whenever the host waits for the device. */
const struct area *area_cuda(int index, struct lr_comm *links);

#endif
