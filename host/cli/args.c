/* args.c - options from tables. Long names only, plus -o, -q, -v, -h: values follow as the next word or after
 * '='. Numbers are parsed whole or refused; an unknown option gets the nearest known one. Everything wrong is
 * one line and exit code 2.
 *
 * 2 or 3? What the command line alone shows to be wrong is 2: an unknown word, a value no model could make
 * right, options that contradict each other, an output that exists. What only a file can show is 3: a layer this
 * model has not, a rank beyond these samples, a damaged file. 1 is what may go better next time. */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cli.h"

#define COMMON 12
static void common(cli *c, cli_option out[COMMON]) {
    const cli_option table[COMMON] = {
        CLI_HEAD("every verb"),
        {"--json", CLI_FLAG, &c->json, NULL, "one JSON object a line on stdout, same facts as the text"},
        {"--backend", CLI_TEXT, &c->backend, "cpu|cuda",
         "where work runs; a named one that is absent is an error. Default: the first usable"},
        {"--threads", CLI_INT, &c->threads, "N",
         "CPU threads; any number gives the same bits. Default: all cores"},
        {"--gpus", CLI_TEXT, &c->gpus, "0,1,..", "GPUs of the cuda backend, a process each. Default: 0"},
        {"--ranks", CLI_COUNT, &c->ranks, "N", "processes on this machine that share the experts. Default: 1"},
        {"--rendezvous", CLI_TEXT, &c->rendezvous, "FILE",
         "where processes of any launcher meet, on one machine or several. They know themselves by RANK, WORLD_SIZE, LOCAL_RANK or as srun says"},
        {"--memory", CLI_BYTES, &c->memory, "SIZE",
         "for weights and states, as 8GiB; a larger model is read layer by layer. Default: what is free"},
        {"--reproducible", CLI_FLAG, &c->reproducible, NULL,
         "same logits, states, replies and sums, bit for bit, for any batching too"},
        {"--force", CLI_FLAG, &c->force, NULL, "overwrite existing outputs"},
        {"-q", CLI_FLAG, &c->quiet, NULL, "no progress, no warnings"},
        {"-v", CLI_FLAG, &c->verbose, NULL, "also informational messages"},
    };
    memcpy(out, table, sizeof table);
}

/* number of this process among those of a launcher, known before they have met */
static int launched_as(const cli *c) {
    static const char *const names[] = {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"};
    for (size_t i = !c->rendezvous; i < sizeof names / sizeof *names; i++) {
        const char *s = getenv(names[i]);
        if (s && *s) return atoi(s);
    }
    return 0;
}

/* What all ranks refuse alike is said once: by the first, whose end makes the launcher end the others while they wait
 * here (mpirun takes a second or two). What only this one refuses, a file that its machine lacks, nobody else would say. */
static bool speaks(const cli *c) {
    bool first = !c->rank && !launched_as(c);
    for (int i = 0; !first && i < 80 && !cli_stopped(); i++) nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    return first || !cli_stopped();
}

int cli_usage(cli *c, const char *fmt, ...) {
    va_list ap;
    if (!speaks(c)) return c->code = 2;
    va_start(ap, fmt);
    fprintf(stderr, "excise %s: ", c->verb->name);
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, " (excise %s -h)\n", c->verb->name);
    va_end(ap);
    return c->code = 2;
}

static void help_rows(const cli_option *o, int n) {
    for (int i = 0; i < n && (o[i].name || o[i].help); i++) {
        if (!o[i].name) {
            printf("\n%s\n", o[i].help);
            continue;
        }
        char left[64];
        snprintf(left, sizeof left, "%s%s%s", o[i].name, o[i].arg ? " " : "", o[i].arg ? o[i].arg : "");
        printf("  %-26s %s\n", left, o[i].help);
    }
}

void cli_help(const cli_verb *verb, const cli_option *options) {
    cli none = {0};
    cli_option rows[COMMON];
    common(&none, rows);
    printf("excise %s %s\n%s\n", verb->name, verb->usage, verb->brief);
    help_rows(options, INT_MAX);
    help_rows(rows, COMMON);
}

static const cli_option *find(const cli_option *o, int n, const char *name, size_t len) {
    for (int i = 0; i < n && (o[i].name || o[i].help); i++)
        if (o[i].name && strlen(o[i].name) == len && !strncmp(o[i].name, name, len)) return &o[i];
    return NULL;
}

/* edit distance, for did-you-mean; names are short */
static int distance(const char *a, const char *b) {
    int row[64], n = (int)strlen(b);
    if (n > 62) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 0; a[i]; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 0; j < n; j++) {
            int cost = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            if (row[j] + 1 < cost) cost = row[j] + 1;
            if (diagonal + 1 < cost) cost = diagonal + 1;
            row[j + 1] = cost;
        }
    }
    return row[n];
}

static const char *nearest(const cli_option *o, int n, const char *name, const char *best, int *score) {
    for (int i = 0; i < n && (o[i].name || o[i].help); i++) {
        if (!o[i].name) continue;
        int d = distance(name, o[i].name);
        if (d < *score) {
            *score = d;
            best = o[i].name;
        }
    }
    return best;
}

static int store(cli *c, const cli_option *o, const char *value) {
    char *end = NULL;
    errno = 0;
    switch (o->kind) {
    case CLI_FLAG:
        *(int *)o->to = 1;
        return 0;
    case CLI_TEXT:
        if (!*value && (!strcmp(o->arg, "FILE") || !strcmp(o->arg, "DIR")))
            return cli_usage(c, "%s: expected %s, found an empty name", o->name, o->arg);
        *(const char **)o->to = value;
        return 0;
    case CLI_INT:
    case CLI_COUNT: {
        long v = strtol(value, &end, 10), least = o->kind == CLI_COUNT;
        if (errno || end == value || *end || v < least || v > INT_MAX)
            return cli_usage(c, "%s: expected a whole number from %ld to %d, found %s", o->name, least,
                             INT_MAX, value);
        *(int *)o->to = (int)v;
        return 0;
    }
    case CLI_U64: {
        unsigned long long v = strtoull(value, &end, 10);
        if (errno || end == value || *end || *value == '-')
            return cli_usage(c, "%s: expected a whole number, found %s", o->name, value);
        *(uint64_t *)o->to = v;
        return 0;
    }
    case CLI_BYTES: {
        static const char *const units[] = {"", "KMGT", "B", "iB"};
        double v = strtod(value, &end);
        const char *unit = *end ? strchr(units[1], *end) : NULL;
        if (unit) end++;
        bool known = !*end || !strcmp(end, units[2]) || (unit && !strcmp(end, units[3]));
        double bytes = v * (unit ? pow(end[0] == 'B' ? 1000 : 1024, (double)(unit - units[1] + 1)) : 1);
        if (end == value || !known || !(bytes >= 1 && bytes < 1e18))
            return cli_usage(c, "%s: expected a size such as 8GiB, 500MB or 1073741824, found %s", o->name, value);
        *(uint64_t *)o->to = (uint64_t)bytes;
        return 0;
    }
    default: {
        double v = strtod(value, &end);
        if (errno || end == value || *end || !(v > -1e300 && v < 1e300))
            return cli_usage(c, "%s: expected a number, found %s", o->name, value);
        if (o->kind == CLI_REAL)
            *(double *)o->to = v;
        else
            *(float *)o->to = (float)v;
        return 0;
    }
    }
}

static exc_status open_context(cli *c, int device) {
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    opt.backend = c->backend;
    opt.threads = c->threads;
    opt.reproducible = c->reproducible;
    opt.memory = c->memory;
    opt.on_event = cli_event;
    opt.user = c;
    char file[PATH_MAX + 8] = "auto";
    if (c->rendezvous) snprintf(file, sizeof file, "file:%s", c->rendezvous);
    opt.ranks = file;
    opt.device = device;
    exc_status st = exc_ctx_create(&opt, &c->ctx);
    int count = 1;
    if (c->ctx) exc_ctx_rank(c->ctx, &c->rank, &count);
    /* of several ranks the first one speaks; the others say what went wrong with them */
    if (c->rank && !freopen("/dev/null", "w", stdout)) return EXC_ERR_IO;
    if (c->rank) c->quiet = 1;
    return st;
}

int cli_begin(cli *c, const cli_option *options, int least, int most) {
    cli_option shared[COMMON];
    common(c, shared);
    c->rest = c->argv; /* positional words move to the front, in place */
    int only_words = 0;
    for (int i = 0; i < c->argc; i++) {
        char *word = c->argv[i];
        if (only_words || word[0] != '-' || !word[1]) {
            if (!*word) return cli_usage(c, "usage: excise %s %s; found an empty word", c->verb->name, c->verb->usage), 1;
            c->rest[c->n_rest++] = word;
            continue;
        }
        if (!strcmp(word, "--")) {
            only_words = 1;
            continue;
        }
        if (!strcmp(word, "-h") || !strcmp(word, "--help")) {
            cli_help(c->verb, options);
            c->code = 0;
            return 1;
        }
        const char *equals = strncmp(word, "--", 2) ? NULL : strchr(word, '=');
        size_t len = equals ? (size_t)(equals - word) : strlen(word);
        const cli_option *o = find(options, INT_MAX, word, len);
        if (!o) o = find(shared, COMMON, word, len);
        if (!o) {
            int score = 4;
            const char *guess = nearest(options, INT_MAX, word, NULL, &score);
            guess = nearest(shared, COMMON, word, guess, &score);
            cli_usage(c, "unknown option %s%s%s", word, guess ? "; did you mean " : "", guess ? guess : "");
            return 1;
        }
        if (o->kind == CLI_FLAG && equals) return cli_usage(c, "%s takes no value", o->name), 1;
        const char *value = equals ? equals + 1 : NULL;
        if (o->kind != CLI_FLAG && !value) {
            if (i + 1 >= c->argc) return cli_usage(c, "%s: expected %s", o->name, o->arg), 1;
            value = c->argv[++i];
        }
        if (store(c, o, value)) return 1;
    }
    if (c->n_rest < least || c->n_rest > most) {
        cli_usage(c, "usage: excise %s %s", c->verb->name, c->verb->usage);
        return 1;
    }
    int device = 0;
    if (cli_launch(c, &device)) return 1;
    exc_status st = open_context(c, device);
    if (st == EXC_OK) return 0;
    c->code = cli_done(c, st);
    return 1;
}

/* The library asks again when it writes; this saves hours of work for nothing. */
int cli_output(cli *c, const char *path) {
    struct stat sb;
    if (!lstat(path, &sb)) {
        if (c->force && (S_ISREG(sb.st_mode) || S_ISLNK(sb.st_mode))) return 0;
        const char *why = !c->force              ? "output exists; nothing is overwritten without --force"
                          : S_ISDIR(sb.st_mode) ? "expected a file to overwrite, found a folder"
                                                 : "expected a file to overwrite, found a device, pipe or socket";
        if (speaks(c)) fprintf(stderr, "excise %s: %s: %s\n", c->verb->name, path, why);
        return c->code = 2;
    }
    const char *slash = strrchr(path, '/');
    char *folder = slash ? strndup(path, (size_t)(slash - path) + 1) : NULL;
    int absent = folder && access(folder, W_OK | X_OK) ? errno : 0;
    free(folder);
    if (!absent) return 0;
    if (speaks(c)) fprintf(stderr, "excise %s: %s: its folder: %s\n", c->verb->name, path, strerror(absent));
    return c->code = 1;
}

int cli_done(cli *c, exc_status st) {
    cli_progress_end(c);
    if (st == EXC_OK) return 0;
    const char *why = c->ctx ? exc_ctx_error(c->ctx) : "";
    size_t n = strlen(c->verb->name);
    if (!strncmp(why, c->verb->name, n) && !strncmp(why + n, ": ", 2)) why += n + 2; /* said already */
    if (speaks(c)) fprintf(stderr, "excise %s: %s\n", c->verb->name, *why ? why : exc_status_name(st));
    return exc_status_exit(st);
}

int cli_result(cli *c, exc_status st, char *json, void (*text)(const json_t *)) {
    cli_progress_end(c);
    if (st == EXC_OK && json) {
        if (c->json) {
            printf("%s\n", json);
        } else {
            json_error_t error;
            json_t *facts = json_loads(json, JSON_DECODE_ANY, &error);
            if (facts) text(facts);
            json_decref(facts);
        }
    }
    exc_free(json);
    return cli_done(c, st);
}

/* Both folders are made canonical, the common part is dropped, and ".." climbs the rest. */
char *cli_relative(const char *file, const char *to) {
    char folder[PATH_MAX], a[PATH_MAX], b[PATH_MAX], out[2 * PATH_MAX] = "";
    const char *slash = strrchr(to, '/');
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - to + (slash == to)) : 1, slash ? to : ".");
    if (!realpath(file, a) || !realpath(folder, b)) return strdup(file);
    size_t same = 0, i = 0;
    for (; a[i] && a[i] == b[i]; i++)
        if (a[i] == '/') same = i + 1;
    if (!b[i] && a[i] == '/') same = i + 1;
    for (const char *p = b + (same < strlen(b) ? same : strlen(b)); *p;) {
        strcat(out, "../");
        const char *next = strchr(p, '/');
        p = next ? next + 1 : p + strlen(p);
    }
    strcat(out, a + same);
    return strdup(out);
}
