#include "client/report.h"

#include "base/clock.h"

#include <stdio.h>
#include <string.h>

enum { TEXTS = 8, TEXT_BYTES = 32 };

static char *next_text(void)
{
    static char texts[TEXTS][TEXT_BYTES];
    static int next;
    next = (next + 1) % TEXTS;
    return texts[next];
}

const char *lr_number_text(int64_t number)
{
    char digits[24], *out = next_text();
    int n = snprintf(digits, sizeof digits, "%lld", (long long)(number < 0 ? -number : number)), at = 0;
    if (number < 0)
        out[at++] = '-';
    for (int i = 0; i < n; i++) {
        out[at++] = digits[i];
        if ((n - i - 1) % 3 == 0 && i + 1 < n)
            out[at++] = ',';
    }
    out[at] = '\0';
    return out;
}

const char *lr_bytes_text(int64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    double value = (double)bytes;
    int unit = 0;
    while (value >= 1024.0 && unit < 5) {
        value /= 1024.0;
        unit++;
    }
    char *out = next_text();
    snprintf(out, TEXT_BYTES, unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
    return out;
}

const char *lr_duration_text(double seconds)
{
    char *out = next_text();
    long long whole = (long long)(seconds + 0.5);
    if (seconds < 60.0)
        snprintf(out, TEXT_BYTES, "%.1f s", seconds);
    else if (whole < 3600)
        snprintf(out, TEXT_BYTES, "%lld:%02lld", whole / 60, whole % 60);
    else
        snprintf(out, TEXT_BYTES, "%lld:%02lld:%02lld", whole / 3600, whole / 60 % 60, whole % 60);
    return out;
}

void lr_progress_begin(
    struct lr_progress *progress, int on, int columns, const char *title, const char *unit, int64_t total)
{
    *progress = (struct lr_progress){
        .on = on, .columns = columns, .title = title, .unit = unit, .total = total, .started = lr_clock_seconds()};
    progress->shown = columns > 0 ? 0.0 : progress->started;
}

static void draw_bar(char *bar, int width, double share)
{
    int full = (int)(share * width + 0.5);
    for (int i = 0; i < width; i++)
        bar[i] = i < full ? '#' : '.';
    bar[width] = '\0';
}

void lr_progress_update(struct lr_progress *progress, int64_t done, const char *detail)
{
    double now = lr_clock_seconds(), spent = now - progress->started;
    int last = done >= progress->total;
    if (!progress->on || (now - progress->shown < (progress->columns > 0 ? 0.1 : 10.0) && !(last && progress->drawn)))
        return;
    progress->shown = now;
    progress->drawn = 1;
    double share = progress->total > 0 ? (double)done / (double)progress->total : 1.0;
    double rate = spent > 0.0 ? (double)done / spent : 0.0;
    const char *eta = rate > 0.0 ? lr_duration_text((double)(progress->total - done) / rate) : "?";
    char line[256], bar[64];
    snprintf(line, sizeof line, "%3.0f%%  %s of %s %s  %s  %s %s/s  ETA %s", 100.0 * share, lr_number_text(done),
             lr_number_text(progress->total), progress->unit, detail, lr_number_text((int64_t)rate), progress->unit,
             eta);
    int room = progress->columns - (int)(strlen(line) + strlen(progress->title)) - 6;
    if (progress->columns <= 0) {
        fprintf(stderr, "%s %s\n", progress->title, line);
    } else if (room >= 10) {
        draw_bar(bar, room < 40 ? room : 40, share);
        fprintf(stderr, "\r%s [%s] %s\033[K", progress->title, bar, line);
    } else {
        fprintf(stderr, "\r%s %.*s\033[K", progress->title, progress->columns > 20 ? progress->columns - 12 : 40, line);
    }
    fflush(stderr);
}

void lr_progress_end(struct lr_progress *progress)
{
    if (progress->on && progress->drawn && progress->columns > 0)
        fprintf(stderr, "\r\033[K");
    fflush(stderr);
    progress->on = 0;
}
