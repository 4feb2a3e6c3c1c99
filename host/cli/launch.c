/* launch.c - several processes for one job on this machine: one a GPU (--gpus 0,1,..) or as many as --ranks says.
 *
 * The parent makes a socket between every two ranks, forks them and waits; each goes on from here as a rank, with the files
 * that EXCISE_RANK_SOCKETS names. The parent passes signals on that only it got, and writes nothing of its own but why a rank
 * was killed. The first rank that fails gives the exit code: then the others are asked to end, and soon made to.
 * Under mpirun or srun, or with --rendezvous, nothing is started: --gpus then gives each rank of a machine its GPU. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cli.h"

#define MOST 16       /* ranks; a rank holds a socket for each other one */
#define NOTICE 2      /* seconds in which the others may see for themselves that a rank was killed */
#define INTERRUPTED 130 /* exit code of a rank that a signal told to end */
#define GRACE 5       /* seconds between asking a rank to end and making it */

typedef struct family {
    int ranks, left;
    pid_t child[MOST]; /* 0: has ended */
    int code;          /* of the first that failed */
    int ending;        /* signal that was sent last, 0: none */
    double next;       /* when the next one is due */
} family;

/* "0,2,3" to numbers; how many, or 0 when it is no such list */
static int parse(const char *list, int gpu[MOST]) {
    int n = 0;
    for (const char *at = list;; at++) {
        char *end;
        long v = strtol(at, &end, 10);
        if (*at < '0' || *at > '9' || v > 9999 || n == MOST) return 0;
        for (int i = 0; i < n; i++)
            if (gpu[i] == v) return 0;
        gpu[n++] = (int)v;
        at = end;
        if (!*at) return n;
        if (*at != ',') return 0;
    }
}

/* number of this process among those that a launcher started on this machine; -1: it started none */
static int local_rank(const cli *c) {
    static const char *const names[] = {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"};
    const char *tasks = getenv("SLURM_STEP_NUM_TASKS"); /* a step of one task has a local id, too */
    for (size_t i = !c->rendezvous; i < sizeof names / sizeof *names; i++)
        if (getenv(names[i]) && (strcmp(names[i], "SLURM_LOCALID") || !tasks || atoi(tasks) > 1)) return atoi(getenv(names[i]));
    return c->rendezvous ? 0 : -1;
}

static void share_cores(cli *c, int ranks) {
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
    if (!c->threads) c->threads = cores > ranks ? cores / ranks : 1;
}

/* --------------------------------------------------------------------------------------------------------- the ranks */

static int connect_all(int file[MOST][MOST], int n) {
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) return -1;
            file[i][j] = pair[0];
            file[j][i] = pair[1];
        }
    return 0;
}

static void close_row(int file[MOST][MOST], int n, int rank) {
    for (int i = 0; i < n; i++)
        if (i != rank) close(file[rank][i]);
}

static void become(int rank, int file[MOST][MOST], int n, pid_t parent) {
    char text[MOST * 12];
    int at = snprintf(text, sizeof text, "%d", rank);
    for (int i = 0; i < n; i++) {
        at += snprintf(text + at, sizeof text - (size_t)at, "%c%d", i ? ',' : ':', i == rank ? -1 : file[rank][i]);
        if (i != rank) close_row(file, n, i);
    }
    setenv("EXCISE_RANK_SOCKETS", text, 1);
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* nobody is left to wait for it */
    if (getppid() != parent) _exit(1);
}

/* ------------------------------------------------------------------------------------------------------- the parent */

static void tell(family *f, int sig) {
    for (int i = 0; i < f->ranks; i++)
        if (f->child[i]) kill(f->child[i], sig);
}

static void ended(cli *c, family *f, int rank, int status) {
    f->child[rank] = 0;
    f->left--;
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    if (WIFSIGNALED(status) && !f->ending)
        fprintf(stderr, "excise %s: rank %d was ended by signal %d (%s)\n", c->verb->name, rank, WTERMSIG(status), strsignal(WTERMSIG(status)));
    if (!code || f->code) return;
    f->code = code;
    f->next = cli_clock() + (code == INTERRUPTED ? GRACE : WIFSIGNALED(status) ? NOTICE : 0); /* an interrupt ends all: let them */
}

static void collect(cli *c, family *f) {
    int status;
    for (pid_t p; (p = waitpid(-1, &status, WNOHANG)) > 0;)
        for (int i = 0; i < f->ranks; i++)
            if (f->child[i] == p) ended(c, f, i, status);
}

static int wait_all(cli *c, family *f, const sigset_t *signals) {
    while (f->left) {
        siginfo_t info;
        double rest = f->code ? f->next - cli_clock() : 3600;
        if (f->code && rest <= 0) {
            f->ending = f->ending ? SIGKILL : SIGTERM;
            f->next = cli_clock() + GRACE;
            tell(f, f->ending);
            continue;
        }
        int sig = sigtimedwait(signals, &info, &(struct timespec){(time_t)rest, (long)((rest - (double)(time_t)rest) * 1e9)});
        if (sig > 0 && sig != SIGCHLD && info.si_code <= 0) tell(f, sig); /* a terminal's went to the ranks too */
        collect(c, f);
    }
    return f->code;
}

/* 0 in every rank; 1 in the parent when all have ended */
static int launch(cli *c, int n, int *rank) {
    static int file[MOST][MOST];
    family f = {.ranks = n};
    sigset_t signals, before;
    sigemptyset(&signals);
    static const int passed[] = {SIGINT, SIGTERM, SIGUSR1, SIGHUP, SIGCHLD};
    for (size_t i = 0; i < sizeof passed / sizeof *passed; i++) sigaddset(&signals, passed[i]);
    sigprocmask(SIG_BLOCK, &signals, &before);
    signal(SIGCHLD, SIG_DFL); /* ignored by whoever started us, ends of children would not be told */
    int bad = connect_all(file, n);
    pid_t parent = getpid();
    for (*rank = 0; !bad && *rank < n; ++*rank) {
        pid_t p = fork();
        if (!p) {
            become(*rank, file, n, parent);
            sigprocmask(SIG_SETMASK, &before, NULL);
            return 0;
        }
        if (p < 0) bad = 1;
        else f.child[f.left++] = p;
    }
    if (bad) {
        fprintf(stderr, "excise %s: starting %d processes: %s\n", c->verb->name, n, strerror(errno));
        f.code = 1;
    }
    for (int i = 0; !bad && i < n; i++) close_row(file, n, i);
    c->code = wait_all(c, &f, &signals);
    return 1;
}

int cli_launch(cli *c, int *device) {
    int gpu[MOST] = {0}, n = c->gpus ? parse(c->gpus, gpu) : 1, local = local_rank(c), rank = 0;
    if (!n)
        return cli_usage(c, "--gpus: expected at most %d numbers with commas between, each once, found %s", MOST, c->gpus), 1;
    if (c->gpus && !c->backend) c->backend = "cuda";
    if (c->gpus && strcmp(c->backend, "cuda")) return cli_usage(c, "--gpus: for the cuda backend, found --backend %s", c->backend), 1;
    if (c->ranks > MOST) return cli_usage(c, "--ranks: expected at most %d, found %d", MOST, c->ranks), 1;
    if (c->gpus && c->ranks && c->ranks != n) return cli_usage(c, "--ranks: expected %d, one for each of --gpus, found %d", n, c->ranks), 1;
    if (local >= 0) {
        const char *near = c->rendezvous ? getenv("LOCAL_WORLD_SIZE") : NULL;
        if (near && atoi(near) > 1) share_cores(c, atoi(near));
        if (c->ranks > 1) return cli_usage(c, "--ranks: mpirun, srun or who names a rendezvous has started the ranks already"), 1;
        if (c->gpus && local >= n)
            return cli_usage(c, "--gpus: expected a GPU for each process on this machine, found %d for process %d", n, local), 1;
        *device = c->gpus ? gpu[local] : local;
        return 0;
    }
    if (!c->gpus && c->ranks) n = c->ranks;
    if (n > 1) share_cores(c, n);
    if (n > 1 && launch(c, n, &rank)) return 1;
    *device = c->gpus ? gpu[rank] : rank;
    return 0;
}
