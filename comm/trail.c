#include "comm/trail.h"

#include <stdlib.h>
#include <string.h>

enum { EXPLAIN_MS = 10000 };

/* A step as one other worker is told of it. */
struct told {
    uint64_t sequence; /* 0: none */
    uint64_t kind;
    uint64_t common;
    uint64_t sends, receives; /* of the teller, to and from the one told */
    char label[LR_COMM_LABEL_BYTES];
};

struct letter {
    uint64_t last; /* the newest step */
    struct told steps[LR_TRAIL_STEPS];
};

struct lr_trail {
    struct lr_comm *host;
    struct told steps[LR_TRAIL_STEPS]; /* step n at n % LR_TRAIL_STEPS; sizes are in `sends` and `receives` */
    uint64_t last;
    uint64_t *sends, *receives;     /* [LR_TRAIL_STEPS][size] */
    struct letter *sent, *received; /* [size]; the own one is not used */
    size_t *sizes;                  /* [size] of the letters: 0 for the own */
    struct lr_comm_request request; /* of the letters on their way */
};

enum lr_status lr_trail_open(struct lr_comm *host, struct lr_trail **out, struct lr_error *err)
{
    size_t n = (size_t)host->size;
    struct lr_trail *trail = calloc(1, sizeof *trail);
    if (trail) {
        trail->host = host;
        trail->sends = calloc(n * LR_TRAIL_STEPS, sizeof *trail->sends);
        trail->receives = calloc(n * LR_TRAIL_STEPS, sizeof *trail->receives);
        trail->sent = calloc(n, sizeof *trail->sent);
        trail->received = calloc(n, sizeof *trail->received);
        trail->sizes = calloc(n, sizeof *trail->sizes);
    }
    if (!trail || !trail->sends || !trail->receives || !trail->sent || !trail->received || !trail->sizes) {
        lr_trail_close(trail);
        return lr_fail(err, LR_NO_MEMORY, "no memory for the trails of %d workers", host->size);
    }
    for (int r = 0; r < host->size; r++)
        trail->sizes[r] = r == host->rank ? 0 : sizeof(struct letter);
    *out = trail;
    return LR_OK;
}

/* Letters still on their way keep their memory: MPI may write there to the end. */
void lr_trail_close(struct lr_trail *trail)
{
    if (!trail || trail->request.pending)
        return;
    free(trail->sends);
    free(trail->receives);
    free(trail->sent);
    free(trail->received);
    free(trail->sizes);
    free(trail);
}

void lr_trail_add(struct lr_trail *trail,
                  const struct lr_comm_step *step,
                  uint64_t common,
                  const size_t *sends,
                  const size_t *receives)
{
    size_t n = (size_t)trail->host->size, at = step->sequence % LR_TRAIL_STEPS;
    struct told *told = &trail->steps[at];
    *told = (struct told){.sequence = step->sequence, .kind = (uint64_t)step->kind, .common = common};
    memcpy(told->label, step->label, sizeof told->label);
    for (size_t r = 0; r < n; r++) {
        trail->sends[at * n + r] = sends ? sends[r] : 0;
        trail->receives[at * n + r] = receives ? receives[r] : 0;
    }
    trail->last = step->sequence;
}

/* The letters lie packed, without the own one, as an all-to-all wants them. */
static struct letter *letter_of(const struct lr_trail *trail, struct letter *letters, int rank)
{
    return letters + (rank < trail->host->rank ? rank : rank - 1);
}

static enum lr_status send_letters(struct lr_trail *trail, struct lr_error *err)
{
    size_t n = (size_t)trail->host->size;
    for (int r = 0; r < trail->host->size; r++) {
        if (r == trail->host->rank)
            continue;
        struct letter *letter = letter_of(trail, trail->sent, r);
        letter->last = trail->last;
        memcpy(letter->steps, trail->steps, sizeof letter->steps);
        for (size_t i = 0; i < LR_TRAIL_STEPS; i++) {
            letter->steps[i].sends = trail->sends[i * n + (size_t)r];
            letter->steps[i].receives = trail->receives[i * n + (size_t)r];
        }
    }
    return lr_comm_all_to_all_v_start(trail->host, "trail of the links", trail->sent, trail->sizes, trail->received,
                                      trail->sizes, &trail->request, err);
}

static enum lr_status differ(
    const struct lr_trail *trail, int other, const struct told *mine, const struct told *theirs, struct lr_error *err)
{
    return lr_fail(err, LR_OUT_OF_STEP,
                   "workers are out of step: worker %d is at step %llu, %s '%s' (%llu), sends %llu bytes and expects "
                   "%llu; worker %d is at step %llu, %s '%.47s' (%llu), expects %llu and sends %llu",
                   trail->host->rank, (unsigned long long)mine->sequence,
                   lr_comm_kind_text((enum lr_comm_kind)mine->kind), mine->label, (unsigned long long)mine->common,
                   (unsigned long long)mine->sends, (unsigned long long)mine->receives, other,
                   (unsigned long long)theirs->sequence, lr_comm_kind_text((enum lr_comm_kind)theirs->kind),
                   theirs->label, (unsigned long long)theirs->common, (unsigned long long)theirs->receives,
                   (unsigned long long)theirs->sends);
}

/* The first step that both tell of and that is not the same. */
static enum lr_status compare(const struct lr_trail *trail, int other, struct lr_error *err)
{
    const struct letter *mine = letter_of(trail, trail->sent, other);
    const struct letter *theirs = letter_of(trail, trail->received, other);
    uint64_t last = mine->last < theirs->last ? mine->last : theirs->last;
    for (uint64_t n = last > LR_TRAIL_STEPS ? last - LR_TRAIL_STEPS + 1 : 1; n <= last; n++) {
        const struct told *a = &mine->steps[n % LR_TRAIL_STEPS], *b = &theirs->steps[n % LR_TRAIL_STEPS];
        if (a->sequence != n || b->sequence != n) /* overwritten by a newer one */
            continue;
        if (a->kind != b->kind || a->common != b->common || a->sends != b->receives || a->receives != b->sends ||
            memcmp(a->label, b->label, sizeof a->label) != 0)
            return differ(trail, other, a, b, err);
    }
    return LR_OK;
}

static enum lr_status read_letters(struct lr_trail *trail, struct lr_error *err)
{
    if (!trail->request.pending)
        return LR_OK;
    LR_TRY(lr_comm_wait(trail->host, &trail->request, err));
    for (int r = 0; r < trail->host->size; r++)
        if (r != trail->host->rank)
            LR_TRY(compare(trail, r, err));
    return LR_OK;
}

/* Where the host communicator has no room for more in flight, it has none at any worker: all leave this one out. */
enum lr_status lr_trail_check(struct lr_trail *trail, struct lr_error *err)
{
    if (trail->host->size == 1)
        return LR_OK;
    LR_TRY(read_letters(trail, err));
    enum lr_status status = send_letters(trail, err);
    return status == LR_FULL ? LR_OK : status;
}

enum lr_status lr_trail_end(struct lr_trail *trail, struct lr_error *err)
{
    LR_TRY(lr_trail_check(trail, err));
    return read_letters(trail, err);
}

/* After all trails were compared and none differs. */
static enum lr_status name_missing(const struct lr_trail *trail, struct lr_error *err)
{
    int first = -1, others = 0;
    for (int r = 0; r < trail->host->size; r++) {
        if (r == trail->host->rank || letter_of(trail, trail->received, r)->last >= trail->last)
            continue;
        others += first >= 0;
        first = first < 0 ? r : first;
    }
    if (first < 0)
        return lr_fail(err, LR_TIMEOUT, "all workers have entered it");
    const struct letter *theirs = letter_of(trail, trail->received, first);
    return lr_fail(err, LR_TIMEOUT, "worker %d has come to step %llu '%.47s' only%s", first,
                   (unsigned long long)theirs->last, theirs->steps[theirs->last % LR_TRAIL_STEPS].label,
                   others > 0 ? ", and it is not alone" : "");
}

static enum lr_status exchange_now(struct lr_trail *trail, struct lr_error *err)
{
    LR_TRY(read_letters(trail, err));
    LR_TRY(send_letters(trail, err));
    LR_TRY(read_letters(trail, err));
    return name_missing(trail, err);
}

enum lr_status lr_trail_explain(struct lr_trail *trail, struct lr_error *err)
{
    struct lr_comm *host = trail->host;
    if (host->size == 1)
        return lr_fail(err, LR_TIMEOUT, "there is no other worker");
    int64_t timeout_ms = host->timeout_ms;
    host->timeout_ms = timeout_ms < EXPLAIN_MS ? timeout_ms : EXPLAIN_MS;
    enum lr_status status = exchange_now(trail, err);
    host->timeout_ms = timeout_ms;
    return status;
}
