/* project.cu - orthogonalises weight matrices on the device: W <- W - s R^T (R W), rounded once, with the
 * bits of project.c.
 *
 * Memory bound. R on the rows (EXC_SIDE_OUT, W [H,I]): a block owns a strip of all H rows and 64 or 128 bytes
 * of them. One sweep takes c = R W, a second subtracts. The rows that fit stay in shared memory between the
 * two, the rest is found again in the second-level cache: the first sweep asks the cache to keep it, the
 * second to drop it. Strips are chosen so narrow, and blocks so few, that what waits fits there (choose()). A
 * thread goes down whole chunks of 64 rows and meets the same weights in both sweeps, so weights held in
 * shared memory are never shared. R on the columns (EXC_SIDE_IN, W [I,H]): a block takes some whole rows to
 * shared memory, edits them there and writes them back. On Hopper the common edit keeps the strip on the
 * chip, in the shared memory of eight blocks (cluster.cuh). Row norms of EXC_SIDE_OUT span all strips: c of
 * some matrices first, then row by row, while they are in cache. Experts of strength 0 cost no bytes in
 * place. */
#include "cluster.cuh"
#include "racks.cuh"
#include "strips.cuh"

exc_status exc_requantise(exc_queue *q, const struct exc_project_args *a,
                          const double *factor); /* requant.cu */

using namespace edit;

namespace {

/* --------------------------------------------------------------------------------------- R on the rows,
 * norms of rows */

/* |x|^2 of a row in the order of project.c: 16 threads hold a sum each, then the tail, then the sums in order
 */
template <class Value> __device__ inline double lane_square(int n, int lane, unsigned mask, Value value) {
    const int whole = n / 16 * 16;
    double sum = 0, total = 0;
    for (int i = lane; i < whole; i += 16) {
        const double x = (double)value(i);
        sum = sum + x * x;
    }
    for (int i = whole; i < n; i++) {
        const double x = (double)value(i);
        total = total + x * x;
    }
    for (int l = 0; l < 16; l++) total = total + __shfl_sync(mask, sum, l, 16);
    return total;
}

/* half a warp takes a row: its length before and after, then its weights */
template <class T> __global__ void __launch_bounds__(THREADS) rescaled(Job j, int64_t *changed) {
    const int lane = threadIdx.x % 16, I = (int)j.cols;
    const unsigned mask = 0xffffu << (threadIdx.x % 32 / 16 * 16);
    const int64_t step = (int64_t)gridDim.x * (THREADS / 16), total = j.count * j.rows;
    for (int64_t at = (int64_t)blockIdx.x * (THREADS / 16) + threadIdx.x / 16; at < total; at += step) {
        const int64_t matrix = j.first + at / j.rows, h = at % j.rows;
        const float strength = j.strength[matrix];
        if (strength == 0.0f) continue;
        const char *src = src_of(j, matrix) + h * I * sizeof(T);
        char *dst = dst_of(j, matrix) + h * I * sizeof(T);
        const float *c = j.c + (at / j.rows) * j.rank * j.cols;
        auto weight = [&](int i) {
            float x[N<T>];
            unpack<T>(gather<T>(src + (size_t)i * sizeof(T), 1), x);
            return x[0];
        };
        auto edited = [&](int i) {
            float d = 0;
            for (int r = 0; r < j.rank; r++)
                d = fmaf(strength * __ldg(j.basis + (size_t)r * j.rows + h), c[(size_t)r * I + i], d);
            return weight(i) - d;
        };
        const double before = lane_square(I, lane, mask, weight), after = lane_square(I, lane, mask, edited);
        const float gain = gain_of(before, after);
        __syncwarp(mask); /* all have read the tail */
        unsigned moved = 0;
        for (int i = lane; i < I; i += 16) {
            float x[N<T>] = {};
            x[0] = edited(i) * gain;
            const uint4 v = pack<T>(x);
            moved += differing<T>(gather<T>(src + (size_t)i * sizeof(T), 1), v, 1);
            scatter<T>(dst + (size_t)i * sizeof(T), v, 1);
        }
        if (!changed) continue;
        moved = __reduce_add_sync(mask, moved);
        if (lane == 0)
            atomicAdd(reinterpret_cast<unsigned long long *>(changed + matrix), (unsigned long long)moved);
    }
}

/* ------------------------------------------------------------------------------------------------------ the
 * op */

__device__ inline void add(Tally &all, const Tally *from, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        all.before += from[i].before, all.after += from[i].after, all.changed += from[i].changed,
            all.nonfinite += from[i].nonfinite;
}

/* sums of a matrix from those that blocks and clusters have left, in order */
__global__ void __launch_bounds__(64)
    collect(Job j, double *before, double *after, int64_t *changed, int64_t *nonfinite) {
    const int64_t m = (int64_t)blockIdx.x * 64 + threadIdx.x;
    if (m >= j.count) return;
    Tally all = {};
    add(all, j.sums + m * j.strips, j.strips);
    add(all, j.parts + m * j.tallies, j.tallies);
    if (before) before[m] = all.before;
    if (after) after[m] = all.after;
    if (changed) changed[m] = all.changed;
    if (nonfinite) nonfinite[m] = all.nonfinite;
}

struct Device {
    int processors;
    size_t shared, cache; /* bytes a block may have, of the second-level cache */
    int major;            /* compute capability */
};

/* a call under way: what its rounds share */
struct Call {
    const struct exc_project_args *a;
    exc_queue *q;
    Device d;
    Job j;
};

cudaError_t look_at(int device, Device *d) {
    int shared = 0, cache = 0;
    cudaError_t e = cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&d->major, cudaDevAttrComputeCapabilityMajor, device);
    d->shared = (size_t)shared, d->cache = (size_t)cache;
    return e;
}

/* Strips of 128 bytes, or of 64 and fewer blocks, until what waits between the sweeps takes at most half the
 * cache: lines are kept in both halves of it. */
Cut choose(const Device &d, int64_t rows, int n, int rank, int at_once, bool extra) {
    static const struct { int lanes, blocks; } ways[] = {{8, 2}, {4, 2}, {4, 1}};
    const int chunks = (int)ceil_div(rows, CHUNK);
    Cut k = {};
    for (auto &way : ways) {
        Room none;
        const size_t room =
            way.blocks == 1 ? d.shared : (d.shared + 1024) / 2 - 1024; /* a block's own kilobyte */
        const size_t fixed = carve(nullptr, way.lanes, n, 0, rank, at_once, extra, &none),
                     chunk = (size_t)CHUNK * way.lanes * 16;
        const int fit = room > fixed ? (int)((room - fixed) / chunk) : 0;
        k = Cut{way.lanes, fit < chunks ? fit : chunks, way.blocks * d.processors, 0};
        k.bytes = fixed + k.held * chunk;
        if ((size_t)(chunks - k.held) * chunk * k.blocks <= d.cache / 2) break;
    }
    return k;
}

/* One launch over the matrices whose rows begin at multiples of 16 bytes, one over the others; where the
 * addresses are known here, one of them is enough. */
template <class Launch> exc_status wide_and_narrow(const Job &j, size_t row_bytes, Launch launch) {
    const uintptr_t all =
        (uintptr_t)j.src_base | (uintptr_t)j.dst_base | (uintptr_t)j.src_stride | (uintptr_t)j.dst_stride;
    const bool known = !j.src, can = row_bytes % 16 == 0 && (!known || all % 16 == 0);
    exc_status st = can ? launch(std::true_type()) : EXC_OK;
    return st == EXC_OK && !(known && can) ? launch(std::false_type()) : st;
}

int64_t strips_of(const Job &j, const Cut &k, int n) { return ceil_div(j.cols, k.lanes * n); }

template <class T, int K, bool WIDE> exc_status start_strips(const Call &c, const Cut &k, Mode what) {
    Job j = c.j;
    j.strips = strips_of(j, k, N<T>);
    const int64_t tasks = j.count * j.strips;
    ENQUEUE(c.q, (strips<T, K, WIDE>), (unsigned)(tasks < k.blocks ? tasks : k.blocks), THREADS, k.bytes, j,
            k, what);
    return EXC_OK;
}

/* the cut of the kernels that know everything; sums are counted by its strips */
template <class T> Cut full_cut(const Call &c) { return choose(c.d, c.j.rows, N<T>, c.j.rank, RANKS, true); }

/* ways to lay strips in clusters, the better ones first */
constexpr struct Way {
    int lanes, size;
} WAYS[] = {{16, CLUSTER}, {16, 2 * CLUSTER}, {8, CLUSTER}, {8, 2 * CLUSTER}, {4, CLUSTER}};

/* slots 0: rows are shorter, or too little is on its way beside a strip that is worked on */
template <class T> Ring ring_of(const Call &c, const Way &way, bool general) {
    const size_t chunk = (size_t)CHUNK * way.lanes * 16, bytes = (size_t)c.j.cols * sizeof(T);
    Ring r = {way.size, way.lanes, (int)ceil_div(ceil_div(c.j.rows, CHUNK), way.size), 0, 0};
    Stage none;
    const size_t fixed = carve(nullptr, r, N<T>, c.j.rank, general, &none);
    if (fixed > c.d.shared || (r.lanes > 4 && (size_t)r.lanes * 16 / 2 >= bytes)) return r;
    r.slots = (int)((c.d.shared - fixed) / (chunk + 16));
    if (r.slots <= r.each || (r.slots - r.each) * chunk < c.d.shared / 4) r.slots = 0;
    r.bytes = carve(nullptr, r, N<T>, c.j.rank, general, &none);
    return r;
}

template <class T> int64_t strips_of(const Job &j, const Ring &r) { return ceil_div(j.cols, r.lanes * N<T>); }

template <class T, int K> cudaError_t start_clusters(const Call &c, const Ring &r) {
    Job j = c.j;
    j.strips = strips_of<T>(j, r);
    if (c.q->measuring || !j.count || !j.strips) return cudaSuccess;
    const cudaError_t e = cudaSetDevice(c.q->device);
    return e != cudaSuccess ? e
                            : LAUNCH_CLUSTERS(j.count * j.strips, r.size, (clustered<T, K>), THREADS, r.bytes,
                                              (cudaStream_t)c.q->stream, j, r);
}

/* false: not on this device, or no cluster fits on what is left of it (a partition) */
template <class T> bool by_clusters(const Call &c, bool plain, exc_status *st) {
    for (auto &way : WAYS) {
        const Ring r = c.d.major >= 9 ? ring_of<T>(c, way, !plain) : Ring();
        if (!r.slots) continue;
        const cudaError_t e = !plain            ? start_clusters<T, 0>(c, r)
                              : c.j.rank == 1   ? start_clusters<T, 1>(c, r)
                              : c.j.rank == 2 ? start_clusters<T, 2>(c, r)
                              : c.j.rank == 3 ? start_clusters<T, 3>(c, r)
                                              : start_clusters<T, 4>(c, r);
        if (e == cudaErrorInvalidConfiguration) {
            cudaGetLastError();
            continue;
        }
        *st = exc_enqueued(c.q, "clustered", e);
        return true;
    }
    return false;
}

/* the most parts in which clusters may leave the sums of a matrix */
template <class T> int64_t tallies_of(const Call &c) {
    int64_t most = 0;
    for (auto &way : WAYS) {
        const int64_t n = ceil_div(c.j.cols, way.lanes * N<T>) * way.size;
        if (c.d.major >= 9 && n > most) most = n;
    }
    return most;
}

template <class T> exc_status edit_strips(const Call &c, Mode what) {
    const int rank = c.j.rank;
    const bool plain = !c.j.sums && c.j.norm == EXC_NORM_NONE && rank <= RANKS && what == EDIT;
    const Cut few = choose(c.d, c.j.rows, N<T>, rank, rank, false);
    return wide_and_narrow(c.j, (size_t)c.j.cols * sizeof(T), [&](auto is_wide) {
        constexpr bool WIDE = decltype(is_wide)::value;
        if constexpr (WIDE) {
            exc_status st;
            if (what == EDIT && by_clusters<T>(c, plain, &st)) return st;
            if (plain && rank == 1) return start_strips<T, 1, WIDE>(c, few, what);
            if (plain && rank == 2) return start_strips<T, 2, WIDE>(c, few, what);
            if (plain && rank == 3) return start_strips<T, 3, WIDE>(c, few, what);
            if (plain && rank == 4) return start_strips<T, 4, WIDE>(c, few, what);
        }
        return start_strips<T, 0, WIDE>(c, full_cut<T>(c), what);
    });
}

/* rows of a tile: as many as let three blocks share a processor, 32 at most; 0: not one fits */
template <class T> int tall_of(const Call &c, size_t *bytes) {
    const int chunks = (int)ceil_div(c.j.cols, CHUNK);
    Rack none;
    int tall = 32;
    while (tall > 1 && carve(nullptr, tall, chunks, sizeof(T), c.j.rank, &none) > c.d.shared / 3) tall /= 2;
    *bytes = carve(nullptr, tall, chunks, sizeof(T), c.j.rank, &none);
    return *bytes <= c.d.shared ? tall : 0;
}

template <class T> exc_status edit_rows(const Call &c) {
    size_t bytes;
    const int tall = tall_of<T>(c, &bytes);
    const int64_t tasks = c.j.count * c.j.strips, most = (int64_t)c.d.processors * 3;
    return wide_and_narrow(c.j, (size_t)c.j.cols * sizeof(T), [&](auto is_wide) {
        ENQUEUE(c.q, (rows<T, decltype(is_wide)::value>), (unsigned)(tasks < most ? tasks : most), THREADS,
                bytes, c.j, tall);
        return EXC_OK;
    });
}

exc_status clear(const Call &c) {
    if (!c.j.sums) return EXC_OK;
    EXC_PASS(exc_enqueue_fill(c.q, c.j.sums, 0, c.j.count * c.j.strips * sizeof(Tally)));
    return exc_enqueue_fill(c.q, c.j.parts, 0, c.j.count * c.j.tallies * sizeof(Tally));
}

/* sums of the round's matrices to where the caller wants them */
exc_status give(const Call &c, double *before, double *after, int64_t *changed, int64_t *nonfinite) {
    const int64_t f = c.j.first;
    if (!c.j.sums) return EXC_OK;
    ENQUEUE(c.q, collect, grid_for(c.j.count, 64), 64, 0, c.j, before ? before + f : nullptr, after ? after + f : nullptr, changed ? changed + f : nullptr,
            nonfinite ? nonfinite + f : nullptr);
    return EXC_OK;
}

/* norms of rows of EXC_SIDE_OUT: c, then row by row, then what is left */
template <class T> exc_status rescale(Call &c) {
    const struct exc_project_args *a = c.a;
    EXC_PASS(edit_strips<T>(c, DOTS));
    EXC_PASS(give(c, a->before, nullptr, a->changed, a->nonfinite));
    ENQUEUE(c.q, (rescaled<T>), grid_for(c.j.count * c.j.rows, THREADS / 16, 1, c.d.processors * 8), THREADS,
            0, c.j, a->changed);
    if (!a->after) return EXC_OK;
    Call left = c;
    left.j.nonfinite = 0;
    EXC_PASS(clear(c));
    EXC_PASS(edit_strips<T>(left, AFTER));
    return give(c, nullptr, a->after, nullptr, nullptr);
}

/* Matrices of a round: what they need of the scratch is bounded, and c of a round is found in the cache. */
constexpr size_t ROUND_BYTES = (size_t)16 << 20;

template <class T> exc_status project(Call &c) {
    const struct exc_project_args *a = c.a;
    Job &j = c.j;
    const bool out = a->side == EXC_SIDE_OUT, by_rows = out && a->norm == EXC_NORM_ROW;
    size_t bytes = 0;
    const int tall = out ? 0 : tall_of<T>(c, &bytes);
    if (!out && !tall) return EXC_ERR_USAGE;
    j.src_stride *= sizeof(T), j.dst_stride *= sizeof(T);
    j.strips = out ? strips_of(j, full_cut<T>(c), N<T>) : ceil_div(j.rows, tall);
    j.tallies = out ? tallies_of<T>(c) : 0;
    const int64_t c_size = a->rank * (out ? a->cols : a->rows), own = by_rows && !a->c ? c_size : 0;
    const int64_t sums = j.before || j.after || j.changed || j.nonfinite ? j.strips + j.tallies : 0;
    const int64_t each = own * (int64_t)sizeof(float) + sums * (int64_t)sizeof(Tally);
    int64_t round = each ? (int64_t)ROUND_BYTES / each : a->count;
    round = round < 1 ? 1 : round < a->count ? round : a->count;
    Carve work(c.q);
    float *own_c = work.take<float>(round * own);
    Tally *own_sums = work.take<Tally>(round * sums);
    if (!work.ready()) return work.status;
    for (j.first = 0; j.first < a->count; j.first += round) {
        j.count = a->count - j.first < round ? a->count - j.first : round;
        j.c = a->c ? a->c + j.first * c_size : own ? own_c : nullptr;
        j.sums = sums ? own_sums : nullptr;
        j.parts = sums ? own_sums + j.count * j.strips : nullptr;
        EXC_PASS(clear(c));
        if (by_rows) {
            EXC_PASS(rescale<T>(c));
            continue;
        }
        EXC_PASS(out ? edit_strips<T>(c, EDIT) : edit_rows<T>(c));
        EXC_PASS(give(c, a->before, a->after, a->changed, a->nonfinite));
    }
    return EXC_OK;
}

} // namespace

extern "C" exc_status exc_cuda_project(exc_queue *q, const struct exc_project_args *a) {
    if (a->count < 0 || a->rows < 0 || a->cols < 0 || a->rank < 1 || a->rank > MOST_RANK)
        return EXC_ERR_USAGE;
    if (a->norm < EXC_NORM_NONE || a->norm > EXC_NORM_ROW) return EXC_ERR_USAGE;
    if (a->side != EXC_SIDE_OUT && a->side != EXC_SIDE_IN) return EXC_ERR_USAGE;
    if (a->rows > MOST || a->cols > MOST) return EXC_ERR_USAGE;
    const bool coded = a->dtype == EXC_F8_E4M3 || a->dtype == EXC_F4;
    if (coded || (a->rounding != EXC_ROUND_RN && a->dtype != EXC_F32)) return exc_requantise(q, a, nullptr);
    Call c = {a, q, {}, {}};
    EXC_PASS(exc_enqueued(q, "project", look_at(q->device, &c.d)));
    Job &j = c.j;
    j.src = a->src, j.dst = a->dst;
    j.src_base = static_cast<const char *>(a->src_base), j.dst_base = static_cast<char *>(a->dst_base);
    j.src_stride = a->src_stride, j.dst_stride = a->dst_stride;
    j.rows = a->rows, j.cols = a->cols, j.basis = a->basis, j.rank = (int)a->rank, j.norm = a->norm;
    j.strength = a->strength;
    j.before = a->before != nullptr, j.after = a->after != nullptr, j.changed = a->changed != nullptr;
    j.nonfinite = a->nonfinite != nullptr;
    j.looked_at = j.before || j.after || j.nonfinite || a->c;
    BY_DTYPE(a->dtype, return project<T>(c));
    return EXC_ERR_USAGE;
}
