#include "client/needle_svg.h"

#include "client/report.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { WIDTH = 960, HEIGHT = 240, LEFT = 80, RIGHT = 40, FOUND_Y = 90, MISSED_Y = 150, AXIS_Y = 190 };

static double x_of(double depth)
{
    return LEFT + depth * (WIDTH - LEFT - RIGHT);
}

static void draw_axis(FILE *out, int64_t n_tokens)
{
    fprintf(out, "<line x1=\"%d\" y1=\"%d\" x2=\"%d\" y2=\"%d\" stroke=\"#888\"/>\n", LEFT, AXIS_Y, WIDTH - RIGHT,
            AXIS_Y);
    for (int i = 0; i <= 10; i++)
        fprintf(out,
                "<line x1=\"%.1f\" y1=\"%d\" x2=\"%.1f\" y2=\"%d\" stroke=\"#888\"/>"
                "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n",
                x_of(i / 10.0), AXIS_Y, x_of(i / 10.0), AXIS_Y + 5, x_of(i / 10.0), AXIS_Y + 20,
                lr_number_text(n_tokens * i / 10));
    fprintf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">depth of the fact, tokens</text>\n", WIDTH / 2,
            HEIGHT - 6);
    fprintf(out, "<text x=\"10\" y=\"%d\">found</text><text x=\"10\" y=\"%d\">missed</text>\n", FOUND_Y + 4,
            MISSED_Y + 4);
}

enum lr_status lr_svg_write(const char *path,
                            const char *title,
                            int64_t n_tokens,
                            const struct lr_svg_point *points,
                            int64_t n_points,
                            struct lr_error *err)
{
    FILE *out = fopen(path, "w");
    if (!out)
        return lr_fail(err, LR_IO, "%s cannot be written: %s", path, strerror(errno));
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
            "<text x=\"%d\" y=\"34\" font-size=\"17\" text-anchor=\"middle\">%s</text>\n",
            WIDTH, HEIGHT, WIDTH, HEIGHT, WIDTH / 2, title);
    draw_axis(out, n_tokens);
    for (int64_t i = 0; i < n_points; i++)
        fprintf(out,
                "<circle cx=\"%.1f\" cy=\"%d\" r=\"5\" fill=\"%s\" fill-opacity=\"0.75\"><title>%s, "
                "%.2f%%</title></circle>\n",
                x_of(points[i].depth), points[i].found ? FOUND_Y : MISSED_Y, points[i].found ? "#2a7f3f" : "#c0392b",
                points[i].name, 100.0 * points[i].depth);
    fprintf(out, "</svg>\n");
    int failed = ferror(out);
    if (fclose(out) != 0 || failed)
        return lr_fail(err, LR_IO, "%s: %s", path, strerror(errno));
    return LR_OK;
}
