/* sockets.c - the transport of ranks over a stream socket between every two of them.
 *
 * Ranks that one process started on this machine (excise --gpus, --ranks) inherit theirs: nothing has to be found, so there is no
 * file that could be stale or address that could be wrong. EXCISE_RANK_SOCKETS then holds the rank's number, a colon, and the file descriptor
 * towards each rank (its own: -1), with commas between. Other ranks meet first (rendezvous.c). The socket of a rank that ended says so at
 * once. Every exchange moves all pieces at the same time, whichever socket
 * is ready, so that no order of sends can lock two ranks; the time limit counts from the last byte that moved. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base.h"
#include "ranks.h"

typedef struct lane {
    const char *out; /* what is left to send to a rank, and to come from it */
    char *in;
    size_t out_bytes, in_bytes;
} lane;

static int me, ranks;
static bool met; /* the sockets are ours to close */
static double limit;
static int file[EXC_RANKS_MOST];
static char text[128];

static const char *told(const char *format, int rank) {
    snprintf(text, sizeof text, format, rank);
    return text;
}

bool exc_sockets_taken(void) { return met; }

void exc_sockets_use(int rank, int size, const int *sockets, double seconds) {
    limit = seconds;
    me = rank;
    ranks = size;
    met = true;
    memcpy(file, sockets, (size_t)size * sizeof *file);
}

void exc_sockets_part(void) {
    for (int r = 0; met && r < ranks; r++)
        if (r != me) close(file[r]);
    met = false;
}

static const char *join(int *rank, int *size, double seconds) {
    const char *s = getenv(EXC_RANK_SOCKETS);
    char *end = NULL;
    limit = seconds;
    me = s ? (int)strtol(s, &end, 10) : -1;
    ranks = 0;
    while (end && *end == (ranks ? ',' : ':') && ranks < EXC_RANKS_MOST) file[ranks++] = (int)strtol(end + 1, &end, 10);
    if (!end || *end || me < 0 || me >= ranks) return EXC_RANK_SOCKETS ": expected RANK:FILE,FILE,.. as excise --ranks makes it";
    *rank = me;
    *size = ranks;
    return NULL;
}

/* moves what can be moved at once; NULL when the rank is still there */
static const char *serve(int rank, lane *l, bool *moved) {
    ssize_t n = l->in_bytes ? recv(file[rank], l->in, l->in_bytes, MSG_DONTWAIT) : -1;
    if (n == 0 || (n < 0 && l->in_bytes && errno != EAGAIN && errno != EINTR)) return told("rank %d ended", rank);
    if (n > 0) {
        l->in += n;
        l->in_bytes -= (size_t)n;
        *moved = true;
    }
    n = l->out_bytes ? send(file[rank], l->out, l->out_bytes, MSG_DONTWAIT | MSG_NOSIGNAL) : -1;
    if (n < 0 && l->out_bytes && errno != EAGAIN && errno != EINTR) return told("rank %d ended", rank);
    if (n > 0) {
        l->out += n;
        l->out_bytes -= (size_t)n;
        *moved = true;
    }
    return NULL;
}

static const char *move(lane *lanes) {
    double last = exc_seconds();
    for (;;) {
        struct pollfd wait[EXC_RANKS_MOST];
        int left = -1; /* a rank that is waited for */
        for (int r = 0; r < ranks; r++) {
            bool in = lanes[r].in_bytes, out = lanes[r].out_bytes;
            wait[r] = (struct pollfd){in || out ? file[r] : -1, (short)((in ? POLLIN : 0) | (out ? POLLOUT : 0)), 0};
            if (in || (out && left < 0)) left = r;
        }
        if (left < 0) return NULL;
        double rest = last + limit - exc_seconds();
        if (rest <= 0) return told("rank %d did not come within the time limit", left);
        int n = poll(wait, (nfds_t)ranks, rest < 1000 ? (int)(rest * 1000) + 1 : 1000000);
        if (n < 0 && errno != EINTR) return "waiting for the other ranks failed";
        bool moved = false;
        for (int r = 0; n > 0 && r < ranks; r++) {
            const char *why = wait[r].revents ? serve(r, &lanes[r], &moved) : NULL;
            if (why) return why;
        }
        if (moved) last = exc_seconds();
    }
}

static const char *all_to_all(const void *send, const size_t *send_bytes, const size_t *send_at, void *recv,
                              const size_t *recv_bytes, const size_t *recv_at) {
    lane lanes[EXC_RANKS_MOST] = {0};
    for (int r = 0; r < ranks; r++)
        lanes[r] = (lane){(const char *)send + send_at[r], (char *)recv + recv_at[r], send_bytes[r], recv_bytes[r]};
    if (send_bytes[me]) memcpy(lanes[me].in, lanes[me].out, send_bytes[me]);
    lanes[me] = (lane){0};
    return move(lanes);
}

static const char *all_gather(const void *send, void *recv, size_t bytes) {
    lane lanes[EXC_RANKS_MOST] = {0};
    for (int r = 0; r < ranks; r++) lanes[r] = (lane){send, (char *)recv + (size_t)r * bytes, bytes, bytes};
    if (bytes) memcpy(lanes[me].in, send, bytes);
    lanes[me] = (lane){0};
    return move(lanes);
}

static const char *missing(void) {
    struct pollfd look[EXC_RANKS_MOST];
    for (int r = 0; r < ranks; r++) look[r] = (struct pollfd){file[r], POLLRDHUP, 0};
    if (poll(look, (nfds_t)ranks, 0) <= 0) return NULL;
    for (int r = 0; r < ranks; r++)
        if (look[r].revents & (POLLRDHUP | POLLHUP | POLLERR)) return told("rank %d ended", r);
    return NULL;
}

const exc_transport exc_sockets = {EXC_TRANSPORT_VERSION, "sockets", join, all_gather, all_to_all, missing};
