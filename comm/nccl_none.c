/* A build without NCCL. */
#include "comm/links.h"

enum lr_status lr_links_open_nccl(struct lr_comm *host,
                                  const struct lr_link_memory *memory,
                                  struct lr_comm *links,
                                  struct lr_error *err)
{
    (void)host;
    (void)memory;
    (void)links;
    return lr_fail(err, LR_UNSUPPORTED, "this longreach was built without NCCL");
}
