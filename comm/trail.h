/* The trail: what this worker asked of transfers that carry no header, compared with the others' over the host
 * communicator. Private to comm/.
 *
 *   step 1 2 3 ........ 64 | 65 ....... 128 | 129 ...
 *                          ^ sends the last 64 to every worker, without waiting
 *                                           ^ takes what the others sent at 64 and compares; sends 65..128; ...
 *
 * A worker that took another step, or one of other sizes, is thus named at most 128 steps later, or as soon as
 * somebody's deadline has passed and asks all for their trails; until then the transfers may hang or bring wrong bytes.
 */
#ifndef LR_COMM_TRAIL_H
#define LR_COMM_TRAIL_H

#include "comm/ops.h"

enum { LR_TRAIL_STEPS = 64 };

struct lr_trail;

/* LR_NO_MEMORY. `host` must live longer. */
enum lr_status lr_trail_open(struct lr_comm *host, struct lr_trail **out, struct lr_error *err);
void lr_trail_close(struct lr_trail *trail);

/* Notes a step. `common` is what must be the same everywhere: a root, a number of values. sends[r], receives[r]: bytes
 * to and from worker r; NULL: none. */
void lr_trail_add(struct lr_trail *trail,
                  const struct lr_comm_step *step,
                  uint64_t common,
                  const size_t *sends,
                  const size_t *receives);

/* Every LR_TRAIL_STEPS steps, entered by all at the same one: LR_OUT_OF_STEP naming both sides where an earlier trail
 * differs, or what the host communicator says. Blocks for those who have not come to the previous such step. */
enum lr_status lr_trail_check(struct lr_trail *trail, struct lr_error *err);

/* The last comparison, of all that came since; entered by all, blocks for all. Fails as lr_trail_check. */
enum lr_status lr_trail_end(struct lr_trail *trail, struct lr_error *err);

/* After a deadline: compares what all have asked so far. LR_OUT_OF_STEP as above; LR_TIMEOUT, naming who has not come
 * to this worker's last step, or that all have. Blocks, for at most the deadline of the host communicator or 10 s. */
enum lr_status lr_trail_explain(struct lr_trail *trail, struct lr_error *err);

#endif
