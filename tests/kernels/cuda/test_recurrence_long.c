/* A million tokens of the delta rule by segments: their maps (M, B), each the fold of 64 sub-segments, folded one after
 * the other into a state and into the map of all, as workers do; against float64 token by token.
 *
 *   segment 0 .. 15      M_all <- M M_all     S <- M S + B
 *
 * Keys lie in the first half of the dimensions. What a head's chain has to keep, by its gates:
 *
 *   SLOW      g about -5e-7       the other half decays to exp(-0.5) in a million steps
 *   KEPT      g = 0               the other half stays the identity, bit for bit
 *   FAINT     g = 0, beta 1e-5    the keys' half shrinks to exp(-0.16), by a million small updates
 *   BUSY      g about -0.02       the state is that of the last few hundred tokens
 *   ABRUPT    one g in fifty is below the lower bound of a float32 exponential: everything before it is gone
 *   LOWEST    every g is about the lower bound: the state is the last token's
 *
 * The tolerance is 6e-3 of the norm. Four errors add up to less:
 *
 *   what goes into a product is rounded: 3e-3 to 4e-3 of a state that the keys renew in bf16, 5e-4 in float16
 *   the tensor cores align the terms of a sum to its largest and cut off what lies below its last bits: where the state
 *     is one of the terms, half of about 2^-27 of it (sm_90) from each of a million updates: 3.7e-3 (FAINT)
 *   a chunk multiplies the state by one approximate exponential, off by up to 2^-22 and the same way wherever gates are
 *     alike: 15,625 of them, 3.7e-3 (SLOW; 2.4e-4 was seen)
 *   the folds of 64 and of 16 maps in float32: 2^-22 each */
#include "kernels/cuda/recurrence.h"
#include "kernels/ref.h"
#include "tests/kernels/cuda/check.h"
#include <pthread.h>

enum { TOKENS = 1000000, SEGMENT = 65536, SEGMENTS = (TOKENS + SEGMENT - 1) / SEGMENT, PIECE = 4096, DIM = 64 };
enum { SLOW, KEPT, FAINT, BUSY, ABRUPT, LOWEST, HEADS };
enum { STRIDE = 2 * DIM + HEADS * DIM, STATE = DIM * DIM };

static const struct lr_delta_shape shape = {1, HEADS, DIM, DIM};
static const char *const names[HEADS] = {"slow", "kept", "faint", "busy", "abrupt", "lowest"};
static const double TOLERANCE = 6e-3;

/* The rows of every segment are the same, the gates are not. */
struct tokens {
    float *rows;     /* [SEGMENT, STRIDE]: q, k, v */
    float *g, *beta; /* [TOKENS, HEADS] */
};

static float gate_of(int head, uint64_t *seed)
{
    const uint64_t bits = check_bits(seed);
    const float x = (float)(bits >> 40) * 0x1p-24f;
    switch (head) {
    case SLOW:
        return -1e-6f * x;
    case BUSY:
        return -0.04f * x;
    case ABRUPT:
        return bits % 50 == 0 ? -1000.0f * x - 90.0f : -0.05f * x;
    case LOWEST:
        return -111.0f + 30.0f * x;
    default:
        return 0.0f;
    }
}

static struct tokens take_tokens(uint64_t seed)
{
    struct tokens t = {.rows = check_floats((int64_t)SEGMENT * STRIDE, 1.0f, 1, &seed)};
    for (int64_t row = 0; row < SEGMENT; row++) {
        float *k = t.rows + row * STRIDE + DIM;
        double sum = 0.0;
        for (int i = 0; i < DIM; i++)
            sum += i < DIM / 2 ? (double)k[i] * (double)k[i] : 0.0;
        for (int i = 0; i < DIM; i++)
            k[i] = i < DIM / 2 ? check_from_act(check_to_act((float)((double)k[i] / sqrt(sum)))) : 0.0f;
    }
    t.g = check_floats((int64_t)TOKENS * HEADS, 1.0f, 0, &seed);
    t.beta = check_floats((int64_t)TOKENS * HEADS, 0.5f, 0, &seed);
    for (int64_t i = 0; i < (int64_t)TOKENS * HEADS; i++) {
        t.g[i] = gate_of((int)(i % HEADS), &seed);
        t.beta[i] = (t.beta[i] + 0.5f) * (i % HEADS == FAINT ? 1e-5f : 1.0f);
    }
    return t;
}

static int64_t rows_of(int64_t segment)
{
    return segment + 1 < SEGMENTS ? SEGMENT : TOKENS - segment * SEGMENT;
}

/* ---- the truth ---- */

/* to = m from (+ b), [DIM, DIM] each. */
static void multiply(double *to, const double *m, const double *from, const double *b)
{
    for (int i = 0; i < DIM; i++)
        for (int j = 0; j < DIM; j++) {
            double sum = b ? b[i * DIM + j] : 0.0;
            for (int k = 0; k < DIM; k++)
                sum += m[i * DIM + k] * from[k * DIM + j];
            to[i * DIM + j] = sum;
        }
}

/* (m, b) of every head, and the pair behind it that is to be folded in. */
struct map {
    double m[HEADS * STATE], b[HEADS * STATE];
};

static void fold_map(struct map *all, const struct map *next)
{
    double x[STATE];
    for (int h = 0; h < HEADS * STATE; h += STATE) {
        multiply(x, next->m + h, all->m + h, NULL);
        memcpy(all->m + h, x, sizeof x);
        multiply(x, next->m + h, all->b + h, next->b + h);
        memcpy(all->b + h, x, sizeof x);
    }
}

static void identity_map(struct map *map)
{
    memset(map, 0, sizeof *map);
    for (int i = 0; i < HEADS * DIM; i++)
        map->m[i * DIM + i % DIM] = 1.0;
}

/* One segment's map, by a thread of its own. */
struct true_segment {
    const struct tokens *tokens;
    int64_t segment;
    struct map map;
};

static void *true_map(void *argument)
{
    struct true_segment *s = argument;
    const float *first = s->tokens->rows;
    struct map *piece = malloc(sizeof *piece);
    double *s_out = malloc(sizeof piece->b), *o = malloc(sizeof *o * PIECE * HEADS * DIM);
    float *nothing = calloc(HEADS * STATE, sizeof *nothing);
    if (!piece || !s_out || !o || !nothing)
        abort();
    identity_map(&s->map);
    for (int64_t row = 0; row < rows_of(s->segment); row += PIECE) {
        const int64_t left = rows_of(s->segment) - row, gate = (s->segment * SEGMENT + row) * HEADS;
        struct lr_delta_segment_args args = {.shape = shape,
                                             .q = first + row * STRIDE,
                                             .k = first + row * STRIDE + DIM,
                                             .v = first + row * STRIDE + 2 * DIM,
                                             .qkv_stride = STRIDE,
                                             .g = s->tokens->g + gate,
                                             .beta = s->tokens->beta + gate,
                                             .n_rows = left < PIECE ? left : PIECE};
        lr_ref_delta_segment(&args, nothing, piece->m, piece->b, s_out, o);
        fold_map(&s->map, piece);
    }
    free(piece);
    free(s_out);
    free(o);
    free(nothing);
    return NULL;
}

static struct map *true_map_of_all(const struct tokens *t)
{
    struct true_segment *segments = check_host(SEGMENTS * sizeof *segments);
    struct map *all = check_host(sizeof *all);
    pthread_t threads[SEGMENTS];
    for (int i = 0; i < SEGMENTS; i++) {
        segments[i].tokens = t;
        segments[i].segment = i;
        if (pthread_create(&threads[i], NULL, true_map, &segments[i]))
            abort();
    }
    identity_map(all);
    for (int i = 0; i < SEGMENTS; i++) {
        pthread_join(threads[i], NULL);
        fold_map(all, &segments[i].map);
    }
    return all;
}

/* ---- the device ---- */

/* M_all and the state behind s_in, on the device. */
struct folded {
    float *m, *s;
};

static struct folded fold_segments(const struct tokens *t, const float *s_in)
{
    const size_t bytes = HEADS * STATE * sizeof(float);
    const uint16_t *rows = check_device_act(t->rows, (int64_t)SEGMENT * STRIDE);
    const float *g = check_device_copy(t->g, sizeof(float) * TOKENS * HEADS);
    const float *beta = check_device_copy(t->beta, sizeof(float) * TOKENS * HEADS);
    float *work = check_device(LR_CUDA(delta_work_floats)(shape, SEGMENT) * sizeof(float));
    float *m = check_device(bytes), *b = check_device(bytes), *zero = check_device(bytes);
    float *identity = check_host(bytes), *s[2] = {check_device_copy(s_in, bytes), check_device(bytes)};
    for (int i = 0; i < HEADS * STATE; i++)
        identity[i] = i / DIM % DIM == i % DIM ? 1.0f : 0.0f;
    float *m_all[2] = {check_device_copy(identity, bytes), check_device(bytes)};
    lr_cuda_memory.zero(&check.exec, zero, bytes);
    for (int64_t i = 0; i < SEGMENTS; i++) {
        const int64_t gate = i * SEGMENT * HEADS;
        struct lr_delta_segment_args args = {.shape = shape,
                                             .q = rows,
                                             .k = rows + DIM,
                                             .v = rows + 2 * DIM,
                                             .qkv_stride = STRIDE,
                                             .g = g + gate,
                                             .beta = beta + gate,
                                             .n_rows = rows_of(i),
                                             .work = work};
        LR_CUDA(delta_summary)(&check.exec, &args, m, b);
        struct lr_delta_fold_args state = {shape, m, b, s[i % 2], s[(i + 1) % 2]};
        LR_CUDA(delta_fold)(&check.exec, &state);
        struct lr_delta_fold_args map = {shape, m, zero, m_all[i % 2], m_all[(i + 1) % 2]};
        LR_CUDA(delta_fold)(&check.exec, &map);
    }
    return (struct folded){check_download_f32(m_all[SEGMENTS % 2], HEADS * STATE),
                           check_download_f32(s[SEGMENTS % 2], HEADS * STATE)};
}

/* ||got - truth|| <= TOLERANCE ||truth||; what a float32 cannot hold may be zero. */
static void check_head(const char *what, int head, const float *got, const double *truth)
{
    double error = 0.0, size = 0.0;
    for (int64_t i = head * STATE; i < (head + 1) * STATE; i++) {
        error += ((double)got[i] - truth[i]) * ((double)got[i] - truth[i]);
        size += truth[i] * truth[i];
    }
    const double relative = size > 0.0 ? sqrt(error / size) : 0.0;
    const int close = sqrt(error) <= TOLERANCE * sqrt(size) + 1e-30;
    check.worst = relative > check.worst ? relative : check.worst;
    if (!close)
        printf("  %s %s: size %.3g, relative error %.3g\n", names[head], what, sqrt(size), relative);
    check_that(close, what, head);
}

static void million_tokens(void)
{
    uint64_t seed = 1;
    struct tokens t = take_tokens(seed);
    float *s_in = check_floats(HEADS * STATE, 1.0f, 0, &seed);
    struct map *truth = true_map_of_all(&t);
    struct folded got = fold_segments(&t, s_in);
    double *s_out = check_host(sizeof truth->b), *s_first = check_host(sizeof truth->b);
    for (int i = 0; i < HEADS * STATE; i++)
        s_first[i] = (double)s_in[i];
    for (int h = 0; h < HEADS; h++) {
        multiply(s_out + h * STATE, truth->m + h * STATE, s_first + h * STATE, truth->b + h * STATE);
        check_head("M", h, got.m, truth->m);
        check_head("S", h, got.s, s_out);
    }
    for (int i = DIM / 2; i < DIM; i++)
        for (int j = 0; j < DIM; j++)
            check_that(got.m[KEPT * STATE + i * DIM + j] == (i == j ? 1.0f : 0.0f), "the identity that is kept", i);
}

static const struct check_case cases[] = {
    {"a million tokens, segment by segment", million_tokens},
};

int main(void)
{
    return check_main(cases, CASES_TO_RUN(cases, 0)); /* what it launches, test_recurrence does too */
}
