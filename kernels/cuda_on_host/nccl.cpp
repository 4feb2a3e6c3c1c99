/* nccl.cpp - a stand-in for NCCL between processes on one machine, whose GPUs are played by the host: sends and
 * receives go over sockets, in stream order.
 *
 * As strict as the documentation is: nothing blocks (blocking = 0 is the only mode), a communicator that is not ready may
 * only be asked for its state or aborted, calls of a group start at its end, a receive must meet a send of the same type and
 * size in the same order, all of them on one stream and in device memory. A rank that ended is not reported: the stream
 * just never comes to its end, as with the real one. HC_NCCL_VERSION is the version it says it is. */
#include "standin.h"
#include "../collectives.h"

#include <atomic>
#include <cerrno>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <thread>
#include <unistd.h>
#include <vector>

#define DECLARE(name, arguments) HC_EXPORT(int, name, arguments)
EXC_NCCL_CALLS(DECLARE)

namespace {

struct Comm {
    uint32_t kind = 0x4ccd0001;
    int rank = 0, size = 0, device = 0;
    std::string name;
    std::vector<int> file; /* towards each rank */
    std::atomic<int> state{EXC_NCCL_IN_PROGRESS};
    std::atomic<bool> aborted{false};
    std::atomic<int> launching{0}; /* looks until a group counts as launched */
    bool finalised = false;
    int on_stream = 0;
    std::atomic<int> graphs{0}; /* exchanges in graphs that are not destroyed */
    std::thread joining;

    ~Comm() {
        if (joining.joinable()) joining.join();
        for (int f : file)
            if (f >= 0) close(f);
    }
};
using Handle = std::shared_ptr<Comm>;

Handle *checked(const char *call, void *comm) {
    Handle *h = static_cast<Handle *>(comm);
    if (!h || !*h || (*h)->kind != 0x4ccd0001) hc::fail("%s: not a communicator", call);
    return h;
}

/* ---- joining */

sockaddr_un address(const std::string &name, int rank, socklen_t *length) {
    sockaddr_un a = {};
    a.sun_family = AF_UNIX; /* abstract: gone with its process */
    int n = snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "%s-%d", name.c_str(), rank);
    *length = (socklen_t)(offsetof(sockaddr_un, sun_path) + 1 + (size_t)n);
    return a;
}

struct Hello {
    int rank, size, device;
};

bool whole(Comm &c, int file, void *p, size_t n, bool out) {
    for (char *at = static_cast<char *>(p); n;) {
        ssize_t k = out ? send(file, at, n, MSG_NOSIGNAL) : recv(file, at, n, 0);
        if (k == 0 || c.aborted) return false;
        if (k < 0 && errno != EAGAIN && errno != EINTR) return false;
        if (k > 0) at += k, n -= (size_t)k;
    }
    return true;
}

int reach(Comm &c, int rank) {
    socklen_t length;
    sockaddr_un to = address(c.name, rank, &length);
    while (!c.aborted) {
        int file = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(file, reinterpret_cast<sockaddr *>(&to), length) == 0) return file;
        close(file);
        usleep(1000);
    }
    return -1;
}

int take(Comm &c, int door) {
    while (!c.aborted) {
        int file = accept4(door, nullptr, nullptr, SOCK_CLOEXEC);
        if (file >= 0) return file;
        usleep(1000);
    }
    return -1;
}

/* the rank behind `file` is known after this */
bool greet(Comm &c, int file) {
    Hello mine = {c.rank, c.size, c.device}, theirs = {};
    timeval look = {0, 100000}; /* at `aborted` */
    setsockopt(file, SOL_SOCKET, SO_RCVTIMEO, &look, sizeof look);
    if (!whole(c, file, &mine, sizeof mine, true) || !whole(c, file, &theirs, sizeof theirs, false)) return false;
    if (theirs.size != c.size || theirs.device == c.device || theirs.rank < 0 || theirs.rank >= c.size || c.file[(size_t)theirs.rank] >= 0)
        return false; /* another size, a rank twice, or a GPU twice */
    fcntl(file, F_SETFL, O_NONBLOCK);
    c.file[(size_t)theirs.rank] = file;
    return true;
}

void join_all(Comm &c, int door) {
    bool good = true;
    for (int r = 0; good && r < c.rank; r++) good = greet(c, reach(c, r));
    for (int r = c.rank + 1; good && r < c.size; r++) good = greet(c, take(c, door));
    close(door);
    c.state = good ? EXC_NCCL_SUCCESS : EXC_NCCL_INVALID_USAGE;
}

/* ---- groups */

struct Op {
    Handle comm;
    cudaStream_t stream;
    char kind; /* s, r */
    int type, peer;
    size_t bytes;
    const void *from;
    void *to;
};
thread_local int depth;
thread_local std::vector<Op> group;

struct Head {
    uint64_t bytes;
    int32_t kind, type;
};

struct Incoming {
    Head want;
    void *to; /* device memory */
};

/* what one group moves between this rank and another */
struct Lane {
    std::vector<char> out;
    size_t sent = 0, got = 0;
    std::vector<Incoming> in;
    size_t at = 0; /* in `in` */
    Head head = {};
};

struct Exchange {
    Handle comm;
    std::vector<Op> ops;
    std::vector<Lane> lanes;
    bool begun = false;

    void put(Lane &l, const Op &op) {
        Head h = {op.bytes, 's', op.type};
        const char *p = reinterpret_cast<const char *>(&h), *data = static_cast<const char *>(op.from);
        l.out.insert(l.out.end(), p, p + sizeof h);
        l.out.insert(l.out.end(), data, data + op.bytes);
    }
    void begin() { /* now: what is sent is what the stream had written by here */
        begun = true;
        lanes.resize((size_t)comm->size);
        for (const Op &op : ops) {
            Lane &l = lanes[(size_t)op.peer];
            if (op.kind == 's') put(l, op);
            else l.in.push_back({{op.bytes, 's', op.type}, op.to});
        }
    }
    void push(int r, Lane &l) {
        ssize_t n = l.sent < l.out.size() ? send(comm->file[(size_t)r], l.out.data() + l.sent, l.out.size() - l.sent, MSG_NOSIGNAL) : 0;
        if (n > 0) l.sent += (size_t)n;
    }
    void pull(int r, Lane &l) {
        while (l.at < l.in.size()) {
            Incoming &m = l.in[l.at];
            const bool in_head = l.got < sizeof l.head;
            char *to = in_head ? reinterpret_cast<char *>(&l.head) + l.got
                               : static_cast<char *>(m.to) + (l.got - sizeof l.head);
            const size_t left = (in_head ? sizeof l.head : sizeof l.head + m.want.bytes) - l.got;
            ssize_t n = left ? recv(comm->file[(size_t)r], to, left, 0) : 0;
            if (n < 0 || (n == 0 && left)) return; /* not yet; or never, which nobody is told */
            l.got += (size_t)n;
            if (in_head && l.got == sizeof l.head && memcmp(&l.head, &m.want, sizeof l.head))
                hc::fail("NCCL: rank %d: expected %llu bytes of type %d from rank %d, found %llu of type %d", comm->rank,
                         (unsigned long long)m.want.bytes, m.want.type, r, (unsigned long long)l.head.bytes, l.head.type);
            if (l.got < sizeof l.head + m.want.bytes) continue;
            l.got = 0;
            l.at++;
        }
    }
    bool poll() {
        if (comm->aborted) return true;
        hc::protect(true);
        if (!begun) begin();
        bool done = true;
        for (int r = 0; r < comm->size; r++) {
            Lane &l = lanes[(size_t)r];
            push(r, l);
            pull(r, l);
            done = done && l.sent == l.out.size() && l.at == l.in.size();
        }
        if (done) comm->on_stream--;
        hc::protect(false);
        return done;
    }
};

/* an exchange in a graph: the communicator stays as long as that does */
struct Kept {
    Exchange exchange;
    explicit Kept(const Exchange &e) : exchange(e) { exchange.comm->graphs++; }
    ~Kept() { exchange.comm->graphs--; }
};

hc::Poll begin_exchange(const Exchange &e) {
    auto one = std::make_shared<Exchange>(e);
    one->comm->on_stream++;
    return [one] { return one->poll(); };
}

int submit() {
    std::vector<Op> ops;
    ops.swap(group);
    if (ops.empty()) return EXC_NCCL_SUCCESS;
    Exchange e;
    e.comm = ops[0].comm;
    for (const Op &op : ops)
        if (op.comm != e.comm || op.stream != ops[0].stream) hc::fail("NCCL: a group on several communicators or streams");
    e.ops = std::move(ops);
    e.comm->launching = 2;
    e.comm->state = EXC_NCCL_IN_PROGRESS;
    cudaStreamCaptureStatus capture;
    cudaStreamIsCapturing(e.ops[0].stream, &capture);
    if (capture == cudaStreamCaptureStatusNone) {
        hc::enqueue_poll(e.ops[0].stream, [&] { return begin_exchange(e); });
    } else {
        auto kept = std::make_shared<Kept>(e);
        hc::enqueue_poll(e.ops[0].stream, [kept] { return begin_exchange(kept->exchange); });
    }
    return EXC_NCCL_IN_PROGRESS;
}

int add_op(const char *call, void *comm, void *stream, char kind, const void *from, void *to, size_t count, int type, int peer) {
    Handle &c = *checked(call, comm);
    if (c->state != EXC_NCCL_SUCCESS || c->finalised) hc::fail("%s: the communicator is not ready (state %d)", call, c->state.load());
    if (type != EXC_NCCL_BYTES || peer < 0 || peer >= c->size) return EXC_NCCL_INVALID_ARGUMENT;
    if (peer == c->rank) hc::fail("%s: to itself is not played", call);
    const size_t bytes = count;
    if (bytes && from) hc::check_extent(call, 0, from, bytes, static_cast<cudaStream_t>(stream));
    if (bytes && to) hc::check_extent(call, 1, to, bytes, static_cast<cudaStream_t>(stream));
    group.push_back({c, static_cast<cudaStream_t>(stream), kind, type, peer, bytes, from, to});
    return depth ? EXC_NCCL_SUCCESS : submit();
}

} // namespace

int ncclGetVersion(int *version) {
    HC_FAILS(ncclGetVersion);
    const char *said = getenv("HC_NCCL_VERSION");
    *version = said ? atoi(said) : 22809;
    return EXC_NCCL_SUCCESS;
}

int ncclGetUniqueId(exc_nccl_id *id) {
    HC_FAILS(ncclGetUniqueId);
    static int nth;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "excise-nccl-%ld-%d", (long)getpid(), nth++);
    return EXC_NCCL_SUCCESS;
}

int ncclCommInitRankConfig(void **comm, int ranks, exc_nccl_id id, int rank, exc_nccl_config *config) {
    HC_FAILS(ncclCommInitRankConfig);
    if (!comm || ranks < 1 || rank < 0 || rank >= ranks) return EXC_NCCL_INVALID_ARGUMENT;
    if (!config || config->size < 20 || config->magic != 0xcafebeefu || config->version < EXC_NCCL_LEAST || config->blocking)
        hc::fail("ncclCommInitRankConfig: a configuration without blocking = 0 is not played");
    if (strncmp(id.bytes, "excise-nccl-", 12)) return EXC_NCCL_INVALID_ARGUMENT;
    Handle c = std::make_shared<Comm>();
    c->rank = rank, c->size = ranks, c->name = id.bytes;
    c->file.assign((size_t)ranks, -1);
    cudaGetDevice(&c->device);
    socklen_t length;
    sockaddr_un here = address(c->name, rank, &length);
    int door = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (bind(door, reinterpret_cast<sockaddr *>(&here), length) || listen(door, ranks)) return EXC_NCCL_INVALID_USAGE;
    Comm *raw = c.get();
    c->joining = std::thread([raw, door] { join_all(*raw, door); });
    *comm = new Handle(c);
    return EXC_NCCL_IN_PROGRESS;
}

int ncclCommGetAsyncError(void *comm, int *status) {
    HC_FAILS(ncclCommGetAsyncError);
    Comm &c = **checked("ncclCommGetAsyncError", comm);
    if (c.launching > 0 && --c.launching == 0) c.state = EXC_NCCL_SUCCESS;
    *status = c.state;
    return EXC_NCCL_SUCCESS;
}

int ncclCommFinalize(void *comm) {
    HC_FAILS(ncclCommFinalize);
    Comm &c = **checked("ncclCommFinalize", comm);
    if (c.finalised || c.state != EXC_NCCL_SUCCESS || c.on_stream) hc::fail("ncclCommFinalize: work is left, or it was called before");
    c.finalised = true;
    c.launching = 2;
    c.state = EXC_NCCL_IN_PROGRESS;
    return EXC_NCCL_IN_PROGRESS;
}

static int drop(const char *call, void *comm, bool abort) {
    Handle *h = checked(call, comm);
    Comm &c = **h;
    if (c.graphs) hc::fail("%s: graphs hold the communicator, this would wait for their end", call);
    if (!abort && (!c.finalised || c.state != EXC_NCCL_SUCCESS)) hc::fail("%s: before the communicator was finalised", call);
    c.aborted = true;
    if (c.joining.joinable()) c.joining.join();
    c.kind = 0;
    delete h;
    return EXC_NCCL_SUCCESS;
}

int ncclCommDestroy(void *comm) { return drop("ncclCommDestroy", comm, false); }
int ncclCommAbort(void *comm) { return drop("ncclCommAbort", comm, true); }

int ncclGroupStart(void) {
    depth++;
    return EXC_NCCL_SUCCESS;
}

int ncclGroupEnd(void) {
    HC_FAILS(ncclGroupEnd);
    if (!depth) return EXC_NCCL_INVALID_USAGE;
    return --depth ? EXC_NCCL_SUCCESS : submit();
}

int ncclSend(const void *send, size_t count, int type, int peer, void *comm, void *stream) {
    HC_FAILS(ncclSend);
    return add_op("ncclSend", comm, stream, 's', send, nullptr, count, type, peer);
}

int ncclRecv(void *recv, size_t count, int type, int peer, void *comm, void *stream) {
    HC_FAILS(ncclRecv);
    return add_op("ncclRecv", comm, stream, 'r', nullptr, recv, count, type, peer);
}
