/* The device's memory, the ring, and waiting. */
#include "tests/kernels/cuda/check.h"

/* Four rings' worth of uploads of odd sizes: every copy is what was given, though the host array changes at once. */
static void ring_comes_round(void)
{
    enum { N = 300, MOST = 1 << 20 };
    uint64_t seed = 1;
    unsigned char *host = check_host(MOST);
    void *kept = check_device((size_t)N * 64);
    size_t sent = 0;
    for (int i = 0; i < N; i++) {
        size_t n = 64 + (size_t)(check_bits(&seed) % (MOST - 64));
        memset(host, i & 0xff, n);
        const void *device = lr_cuda_upload(&check.exec, host, n);
        check_that((uintptr_t)device % 256 == 0, "an upload is 256-byte aligned", i);
        lr_cuda_memory.copy(&check.exec, (char *)kept + i * 64, (const char *)device + n - 64, 64);
        memset(host, 0xee, n);
        sent += n;
    }
    check_that(sent > 2 * (size_t)LR_CUDA_RING_BYTES, "the ring came round", (long long)sent);
    unsigned char *got = check_host((size_t)N * 64);
    check_download(got, kept, (size_t)N * 64);
    for (int i = 0; i < N * 64; i++)
        check_that(got[i] == (i / 64 & 0xff), "an uploaded byte", i);
}

/* A reader launched after two later uploads that crossed into the next part still finds its array. */
static void ring_waits_for_readers(void)
{
    enum { N = LR_CUDA_MAX_UPLOAD_BYTES, ROUNDS = 12 };
    unsigned char *host = check_host(N);
    void *kept = check_device((size_t)ROUNDS * 2 * 256);
    for (int i = 0; i < ROUNDS; i++) {
        memset(host, 2 * i, N);
        const char *first = lr_cuda_upload(&check.exec, host, N / 2);
        memset(host, 2 * i + 1, N);
        const char *second = lr_cuda_upload(&check.exec, host, N);
        lr_cuda_memory.copy(&check.exec, (char *)kept + 2 * i * 256, first + N / 2 - 256, 256);
        lr_cuda_memory.copy(&check.exec, (char *)kept + (2 * i + 1) * 256, second + N - 256, 256);
    }
    unsigned char *got = check_host((size_t)ROUNDS * 2 * 256);
    check_download(got, kept, (size_t)ROUNDS * 2 * 256);
    for (int i = 0; i < ROUNDS * 2 * 256; i++)
        check_that(got[i] == i / 256, "an uploaded byte", i);
}

static void too_large_an_upload(void)
{
    size_t size = (size_t)LR_CUDA_MAX_UPLOAD_BYTES + 1;
    struct lr_error err;
    void *host = check_host(size);
    memset(host, 0, size);
    lr_cuda_upload(&check.exec, host, size);
    enum lr_status status = lr_cuda_memory.wait(&check.exec, &err);
    check_that(status == LR_INTERNAL && strstr(err.message, "upload") != NULL, "it is refused", status);
    lr_cuda_upload(&check.exec, host, size - 1);
    check_ok(lr_cuda_memory.wait(&check.exec, &err), &err);
}

static void large_copies(void)
{
    static const size_t sizes[] = {0, 1, 255, 4u << 20, (4u << 20) + 1, (200u << 20) + 12345};
    for (int i = 0; i < CHECK_COUNT(sizes); i++) {
        size_t n = sizes[i];
        uint64_t seed = n;
        unsigned char *host = check_host(n + 8), *back = check_host(n + 8);
        for (size_t j = 0; j < n; j += 8) {
            uint64_t bits = check_bits(&seed);
            memcpy(host + j, &bits, 8);
        }
        void *device = check_device(n);
        check_upload(device, host, n);
        check_download(back, device, n);
        check_that(memcmp(host, back, n) == 0, "bytes go up and come down", (long long)n);
    }
}

static void reserve_zeroes(void)
{
    struct lr_error err;
    void *base = NULL;
    size_t size = 10000001;
    check_ok(lr_cuda_memory.reserve(size, &base, &err), &err);
    check_that((uintptr_t)base % 256 == 0, "aligned", 0);
    unsigned char *host = check_host(size);
    check_download(host, base, size);
    size_t i = 0;
    while (i < size && host[i] == 0)
        i++;
    check_that(i == size, "zeroed", (long long)i);
    lr_cuda_memory.release(base, size);
    size_t available = lr_cuda_memory.available();
    check_that(available > 1u << 30, "available", (long long)available);
    enum lr_status status = lr_cuda_memory.reserve(available * 2, &base, &err);
    check_that(status == LR_NO_MEMORY && strstr(err.message, "GiB") != NULL, "too much is refused with numbers",
               status);
}

static void rows_are_copied(void)
{
    /* row bytes, strides: 16-, 4-, 2- and 1-byte ways */
    static const size_t shapes[][3] = {{512, 512, 1024}, {20, 24, 28}, {6, 10, 6}, {7, 9, 11}, {4096, 8192, 4096}};
    enum { ROWS = 77 };
    for (int i = 0; i < CHECK_COUNT(shapes); i++) {
        size_t n = shapes[i][0], to_stride = shapes[i][1], from_stride = shapes[i][2];
        uint64_t seed = 3;
        unsigned char *host = check_host(ROWS * from_stride), *back = check_host(ROWS * to_stride);
        for (size_t j = 0; j < ROWS * from_stride; j++)
            host[j] = (unsigned char)check_bits(&seed);
        void *from = check_device_copy(host, ROWS * from_stride), *to = check_device(ROWS * to_stride);
        lr_cuda_memory.copy_rows(&check.exec, to, to_stride, from, from_stride, n, ROWS);
        check_download(back, to, ROWS * to_stride);
        for (size_t row = 0; row < ROWS; row++)
            for (size_t j = 0; j < to_stride; j++)
                check_that(back[row * to_stride + j] == (j < n ? host[row * from_stride + j] : 0xff), "a row's byte",
                           (long long)(row * to_stride + j));
    }
    void *device = check_device(1000);
    unsigned char back[1000];
    lr_cuda_memory.zero(&check.exec, device, 999);
    check_download(back, device, 1000);
    for (int i = 0; i < 1000; i++)
        check_that(back[i] == (i < 999 ? 0 : 0xff), "zeroed", i);
}

/* A slot is filled in one lane and read in the other, again and again, the reader late: nobody gets what is not his. And
 * back: what the kernels' lane wrote goes to host memory aside. */
static void lanes_wait_for_each_other(void)
{
    enum { ROUNDS = 12, N = 8 << 20, FILLED = 0, READ = LR_MARKS - 1, STORED = 1, SAVED = 2 };
    const struct lr_memory_ops *memory = &lr_cuda_memory;
    const size_t heavy = 512u << 20;
    struct lr_error err;
    void *source, *saved;
    check_ok(memory->reserve_host((size_t)ROUNDS * N, &source, &err), &err);
    check_ok(memory->reserve_host((size_t)ROUNDS * N, &saved, &err), &err);
    check_that((uintptr_t)source % 256 == 0, "aligned", 0);
    check_that(memory->available_host() > 0, "host memory", 0);
    void *a, *b;
    check_ok(memory->reserve(heavy, &a, &err), &err);
    check_ok(memory->reserve(heavy, &b, &err), &err);
    char *slot = check_device(N), *stage = check_device(N);
    for (int i = 0; i < ROUNDS; i++)
        memset((char *)source + (size_t)i * N, i + 1, N);
    memset(saved, 0, (size_t)ROUNDS * N);
    for (int i = 0; i < ROUNDS; i++) {
        memory->await(&check.exec, LR_LANE_ASIDE, READ);
        memory->copy_aside(&check.exec, slot, (char *)source + (size_t)i * N, N);
        memory->mark(&check.exec, LR_LANE_ASIDE, FILLED);
        memory->copy(&check.exec, a, b, heavy);
        memory->await(&check.exec, LR_LANE_KERNELS, SAVED);
        memory->await(&check.exec, LR_LANE_KERNELS, FILLED);
        memory->copy(&check.exec, stage, slot, N);
        memory->mark(&check.exec, LR_LANE_KERNELS, READ);
        memory->mark(&check.exec, LR_LANE_KERNELS, STORED);
        memory->await(&check.exec, LR_LANE_ASIDE, STORED);
        memory->copy_aside(&check.exec, (char *)saved + (size_t)i * N, stage, N);
        memory->mark(&check.exec, LR_LANE_ASIDE, SAVED);
    }
    memory->await(&check.exec, LR_LANE_KERNELS, SAVED);
    check_ok(memory->wait(&check.exec, &err), &err);
    check_that(memcmp(source, saved, (size_t)ROUNDS * N) == 0, "every round's bytes went through", 0);
    memory->copy(&check.exec, slot, (char *)source + 5 * (size_t)N, N); /* host memory to the device in the kernels' lane */
    unsigned char *got = check_host(N);
    check_download(got, slot, N);
    check_that(got[0] == 6 && got[N - 1] == 6, "copied from host memory", got[0]);
    memory->release(a, heavy);
    memory->release(b, heavy);
    memory->release_host(source, (size_t)ROUNDS * N);
    memory->release_host(saved, (size_t)ROUNDS * N);
    enum lr_status status = memory->reserve_host((size_t)1 << 50, &source, &err);
    check_that(status == LR_NO_MEMORY && strstr(err.message, "GiB") != NULL, "too much is refused with numbers",
               status);
}

static enum lr_status give_up(void *context, struct lr_error *err)
{
    return ++*(int *)context > 3 ? lr_fail(err, LR_TIMEOUT, "the deadline is over") : LR_OK;
}

static void idle_ends_a_wait(void)
{
    int n_calls = 0;
    struct lr_error err;
    size_t size = 1u << 30;
    void *a = NULL, *b = NULL;
    check_ok(lr_cuda_memory.reserve(size, &a, &err), &err);
    check_ok(lr_cuda_memory.reserve(size, &b, &err), &err);
    for (int i = 0; i < 20; i++)
        lr_cuda_memory.copy(&check.exec, a, b, size);
    lr_cuda_set_idle(&check.exec, give_up, &n_calls);
    enum lr_status status = lr_cuda_memory.wait(&check.exec, &err);
    check_that(status == LR_TIMEOUT && strcmp(err.message, "the deadline is over") == 0, "the hook ends the wait",
               status);
    lr_cuda_set_idle(&check.exec, NULL, NULL);
    check_ok(lr_cuda_memory.wait(&check.exec, &err), &err);
    lr_cuda_memory.release(a, size);
    lr_cuda_memory.release(b, size);
}

static void errors_are_reported_once(void)
{
    struct lr_error err;
    lr_cuda_note(&check.exec, 1, "embed");
    lr_cuda_note(&check.exec, 2, "conv");
    enum lr_status status = lr_cuda_memory.wait(&check.exec, &err);
    check_that(status == LR_INTERNAL && strstr(err.message, "embed") != NULL, "the first error's slot", status);
    check_ok(lr_cuda_memory.wait(&check.exec, &err), &err);
    struct lr_exec other = {0};
    check_that(lr_cuda_device_open(99, &other, &err) == LR_INVALID, "no such device", 0);
    check_that(strlen(lr_cuda_device_name(&check.exec)) > 0 && lr_cuda_multiprocessors(&check.exec) > 0, "a name", 0);
}

/* Opens and closes the device under LR_CUDA_KERNELS=kernels. Returns what it takes, or the status, negative. */
static int kernels_under(const char *kernels, struct lr_error *err)
{
    struct lr_exec other = {0};
    setenv("LR_CUDA_KERNELS", kernels, 1);
    enum lr_status status = lr_cuda_device_open(0, &other, err);
    if (status != LR_OK)
        return -(int)status;
    int hopper = lr_cuda_hopper_kernels(&other);
    lr_cuda_device_close(&other);
    return hopper;
}

static void environment_chooses_kernels(void)
{
    struct lr_error err;
    const char *outside = getenv("LR_CUDA_KERNELS");
    char *kept = outside ? strdup(outside) : NULL;
    int by_default = kernels_under("", &err), hopper = kernels_under("hopper", &err);
    check_that(kernels_under("auto", &err) == by_default, "auto is the default", by_default);
    check_that(hopper == (by_default ? 1 : -(int)LR_UNSUPPORTED), "hopper where it is one", hopper);
    check_that(kernels_under("mma", &err) == 0, "mma everywhere", 0);
    check_that(kernels_under("wgmma", &err) == -(int)LR_INVALID && strstr(err.message, "'wgmma'") != NULL,
               "no other word", 0);
    if (kept)
        setenv("LR_CUDA_KERNELS", kept, 1);
    else
        unsetenv("LR_CUDA_KERNELS");
    free(kept);
}

static const struct check_case cases[] = {
    {"rows are copied", rows_are_copied},
    {"the ring comes round", ring_comes_round},
    {"the ring waits for readers", ring_waits_for_readers},
    {"errors are reported once", errors_are_reported_once},
    {"too large an upload", too_large_an_upload},
    {"large copies", large_copies},
    {"reserve zeroes and refuses", reserve_zeroes},
    {"lanes wait for each other", lanes_wait_for_each_other},
    {"idle ends a wait", idle_ends_a_wait},
    {"the environment chooses the kernels", environment_chooses_kernels},
};

int main(void)
{
    return check_main(cases, CASES_TO_RUN(cases, 4));
}
