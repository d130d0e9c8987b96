#include "tests/comm/area.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- the host's ---- */

static void *host_take(size_t size_bytes)
{
    void *base = malloc(size_bytes);
    if (!base) {
        fprintf(stderr, "area: no memory for %zu bytes\n", size_bytes);
        exit(1);
    }
    return base;
}

static void host_release(void *base, size_t size_bytes)
{
    (void)size_bytes;
    free(base);
}

static void host_move(void *to, const void *from, size_t size_bytes)
{
    if (size_bytes > 0)
        memcpy(to, from, size_bytes);
}

const struct area *area_host(void)
{
    static const struct area area = {
        .name = "host", .take = host_take, .release = host_release, .put = host_move, .get = host_move};
    return &area;
}

/* ---- the pretended device's ---- */

/* What was asked for and is not done yet. */
enum { MOST_WAITING = 4096 };
static struct transfer {
    void *to;
    const void *from;
    size_t size_bytes;
    bool from_device;
} waiting[MOST_WAITING];
static int n_waiting;

static void allow(const void *base, size_t size_bytes, int rights)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = (uintptr_t)base & ~(page - 1), end = ((uintptr_t)base + size_bytes + page - 1) & ~(page - 1);
    if (size_bytes > 0 && mprotect((void *)start, end - start, rights) != 0) {
        fprintf(stderr, "area: %zu bytes are not of the device\n", size_bytes);
        abort();
    }
}

static void move_now(void *to, bool to_device, const void *from, bool from_device, size_t size_bytes)
{
    if (to_device)
        allow(to, size_bytes, PROT_READ | PROT_WRITE);
    if (from_device)
        allow(from, size_bytes, PROT_READ | PROT_WRITE); /* both may lie in one page */
    if (size_bytes > 0)
        memcpy(to, from, size_bytes);
    if (to_device)
        allow(to, size_bytes, PROT_NONE);
    if (from_device)
        allow(from, size_bytes, PROT_NONE);
}

static void catch_up(void)
{
    for (int i = 0; i < n_waiting; i++)
        move_now(waiting[i].to, true, waiting[i].from, waiting[i].from_device, waiting[i].size_bytes);
    n_waiting = 0;
}

static void ask(void *to, const void *from, bool from_device, size_t size_bytes)
{
    if (n_waiting == MOST_WAITING)
        catch_up();
    waiting[n_waiting++] = (struct transfer){to, from, size_bytes, from_device};
}

static void *fake_take(size_t size_bytes)
{
    void *base = mmap(NULL, size_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        fprintf(stderr, "area: no memory for %zu bytes\n", size_bytes);
        exit(1);
    }
    return base;
}

static void fake_release(void *base, size_t size_bytes)
{
    catch_up();
    munmap(base, size_bytes);
}

static void fake_put(void *to, const void *from, size_t size_bytes)
{
    catch_up();
    move_now(to, true, from, false, size_bytes);
}

static void fake_get(void *to, const void *from, size_t size_bytes)
{
    catch_up();
    move_now(to, false, from, true, size_bytes);
}

static void fake_copy(void *context, void *to, const void *from, size_t size_bytes)
{
    (void)context;
    ask(to, from, true, size_bytes);
}

static void fake_upload(void *context, void *to, const void *from, size_t size_bytes)
{
    (void)context;
    ask(to, from, false, size_bytes);
}

static enum lr_status fake_download(void *context, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    (void)context;
    (void)err;
    fake_get(to, from, size_bytes);
    return LR_OK;
}

static enum lr_status fake_wait(void *context, struct lr_error *err)
{
    (void)context;
    (void)err;
    catch_up();
    return LR_OK;
}

static void *fake_pin(void *context, size_t size_bytes)
{
    (void)context;
    return host_take(size_bytes);
}

/* Poisoned first: an upload that still waits would bring the poison. */
static void fake_unpin(void *context, void *base, size_t size_bytes)
{
    (void)context;
    memset(base, 0xEE, size_bytes);
    free(base);
}

const struct area *area_fake(void)
{
    static const struct area area = {
        .name = "fake",
        .take = fake_take,
        .release = fake_release,
        .put = fake_put,
        .get = fake_get,
        .links =
            {
                .copy = fake_copy,
                .upload = fake_upload,
                .download = fake_download,
                .wait = fake_wait,
                .pin = fake_pin,
                .unpin = fake_unpin,
            },
    };
    return &area;
}
