/* progress.c - events on stderr. On a terminal one line is redrawn at most six times a second with rate and
 * time left; else a whole line every ten seconds, so that a batch log stays readable. Ctrl-C asks the library
 * to stop at the next safe point; a second one ends the process at once (files are consistent then too:
 * nothing unfinished has its final name). */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cli.h"

static volatile sig_atomic_t stop;

/* A second request a second later or more ends at once. Launchers tell a process and its group, so one request may come twice. */
static void on_signal(int sig) {
    static double first;
    double now = cli_clock();
    if (stop && now - first > 1) _exit(130);
    if (!stop) first = now;
    stop = 1;
}

void cli_catch_signals(void) {
    struct sigaction action = {.sa_handler = on_signal};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL); /* batch systems warn with it before they preempt */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a file limit is an error message, not a death */
}

int cli_stopped(void) { return stop; }

double cli_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void scaled(char *out, size_t n, double v) {
    const char *unit[] = {"", " k", " M", " G", " T"};
    int i = 0;
    while (v >= 10000 && i < 4) v /= 1000, i++;
    snprintf(out, n, v < 100 && i ? "%.1f%s" : "%.0f%s", v, unit[i]);
}

void cli_progress_end(cli *c) {
    if (c->progress.open) fprintf(stderr, "\r\033[K");
    c->progress.open = 0;
}

int cli_event(void *user, const exc_event *event) {
    cli *c = user;
    int tty = isatty(STDERR_FILENO);
    if (event->kind != EXC_EVENT_PROGRESS) {
        if (c->quiet || (event->kind == EXC_EVENT_INFO && !c->verbose)) return stop;
        cli_progress_end(c);
        int colour = tty && !getenv("NO_COLOR") && event->kind == EXC_EVENT_WARNING;
        fprintf(stderr, "%s%s%s%s\n", colour ? "\033[33m" : "",
                event->kind == EXC_EVENT_WARNING ? "warning: " : "", event->text, colour ? "\033[0m" : "");
        return stop;
    }
    if (c->quiet) return stop;
    double now = cli_clock();
    if (strncmp(c->progress.step, event->text, sizeof c->progress.step - 1)) {
        snprintf(c->progress.step, sizeof c->progress.step, "%s", event->text);
        c->progress.began = now;
        c->progress.last = tty ? 0 : now;
    }
    double since = now - c->progress.began;
    if (now - c->progress.last < (tty ? 0.17 : 10.0)) return stop;
    c->progress.last = now;
    char done[32], total[32], rate[32] = "";
    scaled(done, sizeof done, (double)event->done);
    scaled(total, sizeof total, (double)event->total);
    if (since > 0.3) scaled(rate, sizeof rate, (double)event->done / since);
    fprintf(stderr, "%s%s  %s%s%s %s", tty ? "\r\033[K" : "", event->text, done, event->total ? " / " : "",
            event->total ? total : "", event->unit ? event->unit : "");
    if (*rate) fprintf(stderr, "  %s/s", rate);
    if (*rate && event->total > event->done && event->done)
        fprintf(stderr, "  %.0f s left", since * (double)(event->total - event->done) / (double)event->done);
    if (!tty) fputc('\n', stderr);
    c->progress.open = tty;
    fflush(stderr);
    return stop;
}
