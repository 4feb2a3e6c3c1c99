/* rendezvous.c - ranks of any launcher, on one machine or several, find each other by a file that all of them see.
 *
 * Rank 0 listens and writes the file: a random word, the number of ranks, a port and the addresses of its machine. Every other
 * rank waits for the file, connects, shows the word and tells its number and the port where it listens itself. When all have come rank 0
 * tells everyone where the others are, and takes the file away; then each connects to those with lower numbers. What comes
 * out is a stream socket between every two ranks, and sockets.c does the rest; the id of NCCL goes the same way.
 *
 * A file may be left from a run that was killed: then nobody answers at its port, or somebody who does not know its word, and the
 * rank looks at the file again until rank 0 has written a new one. Only processes that can read the file know the word. It is
 * not a defence against who can read the network. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base.h"
#include "ranks.h"

#define MAGIC "excise ranks 1\n"
#define ADDRESS 64       /* a numeric address and its NUL */
#define LISTED 8         /* addresses of a machine */
#define HELLO_SECONDS 5.0 /* who connects must have told its number by then */
#define BLINK 100        /* milliseconds between two looks for an interrupt */

typedef struct word {
    unsigned char byte[16];
} word;

/* Numbers that travel are in network order. */
typedef struct hello {
    char magic[16];
    word secret;
    uint32_t rank, ranks, port;
    char address[LISTED][ADDRESS]; /* of its machine, the unused ones empty */
} hello;

enum { WELCOME = 1, REFUSED, TABLE };
typedef struct reply {
    char magic[16];
    word secret;
    uint32_t kind;
    char text[160]; /* why it is refused */
} reply;

/* where a rank listens: where its connection to rank 0 came from, and what it says itself, as each machine has networks of its own */
typedef struct place {
    char address[1 + LISTED][ADDRESS];
    uint32_t port;
} place;

/* what the file says */
typedef struct note {
    word secret;
    int addresses;
    unsigned port;
    char address[LISTED][ADDRESS];
} note;

typedef struct meeting {
    exc_ctx *ctx;
    const char *path;
    int rank, ranks;
    double deadline, seconds;
    word secret;
    int listener;
    unsigned port; /* of the listener */
    int *file;     /* [ranks] */
} meeting;

/* ------------------------------------------------------------------------------------------------- bytes, with an eye on the clock */

static exc_status look(const meeting *m) {
    int met = 1;
    for (int r = 0; r < m->ranks; r++) met += m->file[r] >= 0;
    return exc_progress(m->ctx, "meeting the other ranks", (uint64_t)met, (uint64_t)m->ranks, "ranks");
}

/* 1: ready; 0: the time is over; -1: interrupted, told */
static int wait_for(const meeting *m, int fd, short events, double until) {
    for (;;) {
        double rest = until - exc_seconds();
        if (rest <= 0) return 0;
        struct pollfd p = {fd, events, 0};
        int n = poll(&p, 1, rest * 1000 < BLINK ? (int)(rest * 1000) + 1 : BLINK);
        if (n > 0) return 1;
        if (look(m) != EXC_OK) return -1;
    }
}

static int send_all(const meeting *m, int fd, const void *bytes, size_t n, double until) {
    for (const char *at = bytes; n;) {
        ssize_t k = send(fd, at, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (k < 0 && errno != EAGAIN && errno != EINTR) return 0;
        if (k > 0) at += k, n -= (size_t)k;
        int ready = n ? wait_for(m, fd, POLLOUT, until) : 1;
        if (ready <= 0) return ready;
    }
    return 1;
}

static int recv_all(const meeting *m, int fd, void *bytes, size_t n, double until) {
    for (char *at = bytes; n;) {
        int ready = wait_for(m, fd, POLLIN, until);
        if (ready <= 0) return ready;
        ssize_t k = recv(fd, at, n, MSG_DONTWAIT);
        if (k == 0 || (k < 0 && errno != EAGAIN && errno != EINTR)) return 0;
        if (k > 0) at += k, n -= (size_t)k;
    }
    return 1;
}

static void pause_for(const meeting *m, int milliseconds) { wait_for(m, -1, 0, exc_seconds() + milliseconds * 1e-3); }

/* A machine that goes down says nothing: the kernel asks every ten seconds and gives up after a minute. */
static void settle_socket(int fd) {
    int on = 1, idle = 10, tries = 6;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &tries, sizeof tries);
}

/* ---------------------------------------------------------------------------------------------------- addresses, sockets */

static int listen_at(int family, unsigned *port) {
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), off = 0;
    struct sockaddr_storage at = {.ss_family = (sa_family_t)family};
    socklen_t n = family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    if (fd < 0) return -1;
    if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, (struct sockaddr *)&at, n) || listen(fd, EXC_RANKS_MOST) || getsockname(fd, (struct sockaddr *)&at, &n)) {
        close(fd);
        return -1;
    }
    *port = ntohs(family == AF_INET6 ? ((struct sockaddr_in6 *)&at)->sin6_port : ((struct sockaddr_in *)&at)->sin_port);
    return fd;
}

static exc_status open_listener(meeting *m) {
    m->listener = listen_at(AF_INET6, &m->port);
    if (m->listener < 0) m->listener = listen_at(AF_INET, &m->port);
    return m->listener < 0 ? exc_fail_errno(m->ctx, "rendezvous: a listening socket") : EXC_OK;
}

/* numeric; an IPv4 address that came over IPv6 as IPv4 */
static bool numeric(const struct sockaddr *a, char out[ADDRESS]) {
    socklen_t n = a->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    if (getnameinfo(a, n, out, ADDRESS, NULL, 0, NI_NUMERICHOST)) return false;
    if (!strncmp(out, "::ffff:", 7) && strchr(out, '.')) memmove(out, out + 7, strlen(out + 7) + 1);
    return true;
}

/* EXCISE_ADDRESS, or those of this machine that others can reach; a machine without a network has its own */
static int own_addresses(char list[LISTED][ADDRESS]) {
    const char *named = getenv("EXCISE_ADDRESS");
    int n = 0;
    if (named && *named) return snprintf(list[0], ADDRESS, "%s", named) < ADDRESS ? 1 : 0;
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all)) all = NULL;
    for (const struct ifaddrs *i = all; i && n < LISTED; i = i->ifa_next) {
        if (!i->ifa_addr || !(i->ifa_flags & IFF_UP) || i->ifa_flags & IFF_LOOPBACK) continue;
        int family = i->ifa_addr->sa_family;
        if (family != AF_INET && family != AF_INET6) continue;
        if (family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&((struct sockaddr_in6 *)i->ifa_addr)->sin6_addr)) continue;
        n += numeric(i->ifa_addr, list[n]) && strncmp(list[n], "169.254.", 8) != 0;
    }
    if (all) freeifaddrs(all);
    if (!n) snprintf(list[n++], ADDRESS, "127.0.0.1");
    return n;
}

/* -1: nobody there, or interrupted (the next look tells) */
static int connect_to(const meeting *m, const char *address, unsigned port) {
    char service[16];
    struct addrinfo want = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV}, *list;
    snprintf(service, sizeof service, "%u", port);
    if (getaddrinfo(address, service, &want, &list)) return -1;
    int fd = -1;
    for (const struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        int error = 0;
        socklen_t n = sizeof error;
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) continue;
        if (connect(fd, a->ai_addr, a->ai_addrlen) && errno != EINPROGRESS) error = errno;
        else if (wait_for(m, fd, POLLOUT, exc_seconds() + HELLO_SECONDS) != 1 || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n)) error = ETIMEDOUT;
        if (!error) break;
        close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    if (fd >= 0) settle_socket(fd);
    return fd;
}

static hello greeting(const meeting *m) {
    hello h = {.magic = MAGIC, .secret = m->secret, .rank = htonl((uint32_t)m->rank), .ranks = htonl((uint32_t)m->ranks), .port = htonl(m->port)};
    char list[LISTED][ADDRESS];
    int n = own_addresses(list);
    if (n) memcpy(h.address, list, (size_t)n * sizeof *list);
    return h;
}

/* The next process at the listener that knows the word: its socket and what it says. -1: none within `until`, or an interrupt */
static int next_guest(const meeting *m, hello *h, double until) {
    while (wait_for(m, m->listener, POLLIN, until) == 1) {
        int fd = accept4(m->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) continue;
        settle_socket(fd);
        if (recv_all(m, fd, h, sizeof *h, exc_seconds() + HELLO_SECONDS) == 1 && !memcmp(h->magic, MAGIC, sizeof h->magic) &&
            !memcmp(&h->secret, &m->secret, sizeof h->secret)) {
            h->rank = ntohl(h->rank);
            h->ranks = ntohl(h->ranks);
            h->port = ntohl(h->port);
            for (int i = 0; i < LISTED; i++) h->address[i][ADDRESS - 1] = 0;
            return fd;
        }
        close(fd); /* a stranger */
    }
    return -1;
}

/* ------------------------------------------------------------------------------------------------------------ the file */

static exc_status write_note(const meeting *m) {
    char list[LISTED][ADDRESS], partial[4096];
    int n = own_addresses(list);
    if (!n) return exc_fail(m->ctx, EXC_ERR_USAGE, "EXCISE_ADDRESS: expected an address or name of at most %d characters", ADDRESS - 1);
    exc_buf b = {0};
    exc_buf_printf(&b, MAGIC "word ");
    for (size_t i = 0; i < sizeof m->secret; i++) exc_buf_printf(&b, "%02x", m->secret.byte[i]);
    exc_buf_printf(&b, "\nranks %d\nport %u\n", m->ranks, m->port);
    for (int i = 0; i < n; i++) exc_buf_printf(&b, "address %s\n", list[i]);
    exc_buf_puts(&b, "end\n");
    if ((size_t)snprintf(partial, sizeof partial, "%s.partial-%d", m->path, (int)getpid()) >= sizeof partial || b.failed) {
        exc_buf_free(&b);
        return exc_fail(m->ctx, EXC_ERR_USAGE, "%s: the name is too long", m->path);
    }
    unlink(partial); /* of a process that was killed */
    int fd = open(partial, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    bool good = fd >= 0 && write(fd, b.data, b.len) == (ssize_t)b.len && !fsync(fd) && !rename(partial, m->path);
    exc_status st = good ? EXC_OK : exc_fail_errno(m->ctx, "%s", m->path);
    if (fd >= 0) close(fd);
    if (fd >= 0 && !good) unlink(partial);
    exc_buf_free(&b);
    return st;
}

static bool unhex(const char *s, word *w) {
    for (size_t i = 0; i < sizeof w->byte; i++, s += 2) {
        unsigned v;
        if (sscanf(s, "%2x", &v) != 1) return false;
        w->byte[i] = (unsigned char)v;
    }
    return *s == 0;
}

/* false: no file, or none of ours, or not whole yet; *out is as it was then */
static bool read_note(const char *path, note *out) {
    char line[256], hex[64];
    bool whole = false;
    FILE *f = fopen(path, "re");
    note found = {0}, *n = &found;
    if (!f) return false;
    if (fgets(line, sizeof line, f) && !strcmp(line, MAGIC))
        while (!whole && fgets(line, sizeof line, f)) {
            line[strcspn(line, "\n")] = 0;
            whole = !strcmp(line, "end");
            if (sscanf(line, "word %63s", hex) == 1 && !unhex(hex, &n->secret)) break;
            sscanf(line, "port %u", &n->port);
            if (n->addresses < LISTED && sscanf(line, "address %63s", n->address[n->addresses]) == 1) n->addresses++;
        }
    fclose(f);
    whole = whole && n->port && n->addresses;
    if (whole) *out = found;
    return whole;
}

/* takes the file away while it is this meeting's */
static void remove_note(const meeting *m) {
    note n;
    if (read_note(m->path, &n) && !memcmp(&n.secret, &m->secret, sizeof n.secret)) unlink(m->path);
}

/* -------------------------------------------------------------------------------------------------------------- rank 0 */

static void answer(const meeting *m, int fd, uint32_t kind, const char *text) {
    reply r = {.magic = MAGIC, .secret = m->secret, .kind = htonl(kind)};
    if (text) snprintf(r.text, sizeof r.text, "%s", text);
    send_all(m, fd, &r, sizeof r, exc_seconds() + HELLO_SECONDS);
}

static exc_status refuse(const meeting *m, exc_status code, const char *text) {
    for (int r = 1; r < m->ranks; r++)
        if (m->file[r] >= 0) answer(m, m->file[r], REFUSED, text);
    return exc_fail(m->ctx, code, "rendezvous %s: %s", m->path, text);
}

/* "1, 3" */
static const char *absent(const meeting *m, char out[100]) {
    size_t at = 0;
    out[0] = 0;
    for (int r = 0; r < m->ranks && at < 80; r++)
        if (r != m->rank && m->file[r] < 0) at += (size_t)snprintf(out + at, 100 - at, "%s%d", at ? ", " : "", r);
    return out;
}

static int first_gone(const meeting *m) {
    struct pollfd p[EXC_RANKS_MOST];
    for (int r = 0; r < m->ranks; r++) p[r] = (struct pollfd){m->file[r], POLLRDHUP, 0};
    if (poll(p, (nfds_t)m->ranks, 0) > 0)
        for (int r = 0; r < m->ranks; r++)
            if (m->file[r] >= 0 && p[r].revents) return r;
    return -1;
}

static bool hung_up(int fd) {
    struct pollfd p = {fd, POLLRDHUP, 0};
    return poll(&p, 1, 0) > 0 && p.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

static exc_status seat(meeting *m, place *table, int fd, const hello *h) {
    char text[160];
    bool known = h->rank && h->rank < (uint32_t)m->ranks;
    if (hung_up(fd)) { /* has lost patience while others were heard, and comes again */
        close(fd);
        return EXC_OK;
    }
    if (known && m->file[h->rank] >= 0 && hung_up(m->file[h->rank])) {
        close(m->file[h->rank]);
        m->file[h->rank] = -1;
    }
    if (h->ranks != (uint32_t)m->ranks) {
        snprintf(text, sizeof text, "expected ranks of one job, found rank %u of %u and rank 0 of %d", h->rank, h->ranks, m->ranks);
    } else if (!known || m->file[h->rank] >= 0) {
        snprintf(text, sizeof text, "expected each rank once, found a second rank %u", h->rank);
    } else {
        struct sockaddr_storage from;
        socklen_t n = sizeof from;
        place *p = &table[h->rank];
        if (getpeername(fd, (struct sockaddr *)&from, &n) || !numeric((struct sockaddr *)&from, p->address[0])) p->address[0][0] = 0;
        memcpy(p->address + 1, h->address, sizeof h->address);
        p->port = htonl(h->port);
        m->file[h->rank] = fd;
        answer(m, fd, WELCOME, NULL);
        return EXC_OK;
    }
    answer(m, fd, REFUSED, text);
    close(fd);
    return refuse(m, EXC_ERR_USAGE, text);
}

static exc_status host_meeting(meeting *m) {
    place *table = exc_zalloc(m->ctx, (size_t)m->ranks, sizeof *table, "ranks");
    if (!table) return EXC_ERR_MEMORY;
    exc_status st = EXC_OK;
    char text[160], list[100];
    if (getrandom(&m->secret, sizeof m->secret, 0) != sizeof m->secret) st = exc_fail_errno(m->ctx, "rendezvous: random bytes");
    if (st == EXC_OK) st = write_note(m);
    for (int met = 1; st == EXC_OK && met < m->ranks;) {
        hello h;
        int fd = next_guest(m, &h, exc_seconds() + 1e-3 * BLINK < m->deadline ? exc_seconds() + 1e-3 * BLINK : m->deadline), gone;
        if (fd >= 0) st = seat(m, table, fd, &h);
        else if ((st = look(m)) != EXC_OK) break;
        else if ((gone = first_gone(m)) >= 0) {
            snprintf(text, sizeof text, "rank %d ended before all had come", gone);
            st = refuse(m, EXC_ERR_DEVICE, text);
        } else if (exc_seconds() >= m->deadline) {
            snprintf(text, sizeof text, "expected %d ranks within %g s, missing: %s", m->ranks, m->seconds, absent(m, list));
            st = refuse(m, EXC_ERR_DEVICE, text);
        }
        met = 1;
        for (int r = 1; r < m->ranks; r++) met += m->file[r] >= 0;
    }
    for (int r = 1; st == EXC_OK && r < m->ranks; r++) {
        answer(m, m->file[r], TABLE, NULL);
        if (send_all(m, m->file[r], table, (size_t)m->ranks * sizeof *table, exc_seconds() + HELLO_SECONDS) != 1)
            st = exc_fail(m->ctx, EXC_ERR_DEVICE, "rendezvous %s: rank %d ended", m->path, r);
    }
    remove_note(m);
    exc_release(table);
    return st;
}

/* ---------------------------------------------------------------------------------------------------------- the others */

/* One reply of rank 0. 1: came; 0: not, or it is not ours; -1: a refusal or an interrupt, told */
static int hear(const meeting *m, int fd, uint32_t kind, double until) {
    reply r;
    int n = recv_all(m, fd, &r, sizeof r, until);
    if (n <= 0) return n;
    if (memcmp(r.magic, MAGIC, sizeof r.magic) || memcmp(&r.secret, &m->secret, sizeof r.secret)) return 0;
    r.text[sizeof r.text - 1] = 0;
    if (ntohl(r.kind) == REFUSED) return exc_fail(m->ctx, EXC_ERR_DEVICE, "rendezvous %s: %s", m->path, r.text), -1;
    return ntohl(r.kind) == kind;
}

/* the socket to rank 0 that the file leads to; -1: nobody yet */
static exc_status find_host(meeting *m, int *fd) {
    note n = {0};
    bool seen = false;
    for (;;) {
        if (read_note(m->path, &n)) {
            seen = true;
            m->secret = n.secret;
            for (int i = 0; i < n.addresses; i++) {
                hello h = greeting(m);
                *fd = connect_to(m, n.address[i], n.port);
                if (*fd < 0) continue;
                int heard = send_all(m, *fd, &h, sizeof h, exc_seconds() + HELLO_SECONDS);
                if (heard == 1) heard = hear(m, *fd, WELCOME, exc_seconds() + 3 * HELLO_SECONDS);
                if (heard == 1) return EXC_OK;
                close(*fd);
                *fd = -1;
                EXC_TRY(look(m));
                if (heard < 0) return EXC_ERR_DEVICE;
            }
        }
        EXC_TRY(look(m));
        if (exc_seconds() >= m->deadline) break;
        pause_for(m, 50);
    }
    if (!seen) return exc_fail(m->ctx, EXC_ERR_DEVICE, "rendezvous %s: expected rank 0 to write this file within %g s, found none", m->path, m->seconds);
    return exc_fail(m->ctx, EXC_ERR_DEVICE, "rendezvous %s: expected rank 0 at %s port %u within %g s, found nobody", m->path, n.address[0], n.port,
                    m->seconds);
}

static exc_status lost(const meeting *m, int rank) {
    EXC_TRY(look(m));
    return exc_fail(m->ctx, EXC_ERR_DEVICE, "rendezvous %s: rank %d ended or did not come within %g s", m->path, rank, m->seconds);
}

/* where another rank listens, by the first of its addresses that answers as one of this meeting's would */
static int reach(const meeting *m, place *p) {
    hello h = greeting(m);
    for (int i = 0; i <= LISTED; i++) {
        p->address[i][ADDRESS - 1] = 0;
        if (!p->address[i][0]) continue;
        int fd = connect_to(m, p->address[i], ntohl(p->port));
        if (fd < 0) continue;
        if (send_all(m, fd, &h, sizeof h, exc_seconds() + HELLO_SECONDS) == 1 && hear(m, fd, WELCOME, exc_seconds() + m->seconds) == 1) return fd;
        close(fd);
    }
    return -1;
}

/* those with higher numbers come; one that is known to have ended is not waited for */
static exc_status receive(meeting *m) {
    double until = exc_seconds() + m->seconds;
    for (int left = m->ranks - 1 - m->rank; left;) {
        hello h;
        int fd = next_guest(m, &h, exc_seconds() + 1e-3 * BLINK), gone = first_gone(m), missing = m->rank + 1;
        if (fd >= 0 && h.rank > (uint32_t)m->rank && h.rank < (uint32_t)m->ranks && m->file[h.rank] < 0) {
            m->file[h.rank] = fd;
            answer(m, fd, WELCOME, NULL);
            left--;
            continue;
        }
        if (fd >= 0) close(fd);
        while (missing < m->ranks - 1 && m->file[missing] >= 0) missing++;
        if (gone >= 0 || exc_seconds() >= until) return lost(m, gone >= 0 ? gone : missing);
        EXC_TRY(look(m));
    }
    return EXC_OK;
}

static exc_status attend_meeting(meeting *m) {
    exc_status st;
    place *table = exc_zalloc(m->ctx, (size_t)m->ranks, sizeof *table, "ranks");
    if (!table) return EXC_ERR_MEMORY;
    EXC_GOTO(out, find_host(m, &m->file[0]));
    int heard = hear(m, m->file[0], TABLE, exc_seconds() + m->seconds + HELLO_SECONDS);
    if (heard == 1) heard = recv_all(m, m->file[0], table, (size_t)m->ranks * sizeof *table, exc_seconds() + HELLO_SECONDS);
    if (heard != 1) {
        st = lost(m, 0);
        goto out;
    }
    for (int r = 1; r < m->rank; r++) {
        m->file[r] = reach(m, &table[r]);
        if (m->file[r] >= 0) continue;
        if ((st = look(m)) == EXC_OK)
            st = exc_fail(m->ctx, EXC_ERR_DEVICE, "rendezvous %s: rank %d could not reach rank %d at %s port %u", m->path, m->rank, r,
                          table[r].address[0], ntohl(table[r].port));
        goto out;
    }
    st = receive(m);
out:
    exc_release(table);
    return st;
}

exc_status exc_rendezvous(exc_ctx *ctx, const char *path, int rank, int ranks, double seconds, int *file) {
    meeting m = {.ctx = ctx, .path = path, .rank = rank, .ranks = ranks, .deadline = exc_seconds() + seconds, .seconds = seconds, .file = file};
    for (int r = 0; r < ranks; r++) file[r] = -1;
    EXC_TRY(open_listener(&m));
    exc_status st = rank ? attend_meeting(&m) : host_meeting(&m);
    close(m.listener);
    for (int r = 0; st != EXC_OK && r < ranks; r++)
        if (file[r] >= 0) close(file[r]);
    return st;
}
