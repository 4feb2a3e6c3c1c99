/* requant.cu - project and scale for quantised weights, and with stochastic or exact rounding: what is
 * launched, and with what scratch. requant.cuh has the kernels, octets.cuh
 * those of the common edit of e4m3 on Hopper: matrices that begin at multiples of 16 bytes are theirs.
 *
 * A block takes bands one after the other, so that its scratch (new scales, and what its lines keep where
 * shared memory is too small) is that of one band. Lengths of rows across bands (norm row) need c first, then
 * a gain for every row. */
#include "octets.cuh"

using namespace edit;

namespace {

constexpr int BLOCKS = 8; /* of a processor, at most */
constexpr size_t ROUND_BYTES = (size_t)32 << 20;

struct Launch {
    exc_queue *queue;
    Requant q;
    unsigned blocks;
    size_t shared;
};

template <int DTYPE, bool OUT> exc_status bands(const Launch &l, int dots_alone) {
    ENQUEUE(l.queue, (requant<DTYPE, OUT>), l.blocks, BAND, l.shared, l.q, dots_alone);
    return EXC_OK;
}
template <int DTYPE> exc_status run(Launch &l, float *gains) {
    if (l.q.a.side == EXC_SIDE_IN) return bands<DTYPE, false>(l, 0);
    if (gains) {
        EXC_PASS((bands<DTYPE, true>(l, 1)));
        ENQUEUE(l.queue, row_gains<DTYPE>, (unsigned)ceil_div(l.q.count * l.q.along, BAND / WARP), BAND, 0,
                l.q, gains);
        l.q.row_gain = gains;
    }
    return bands<DTYPE, true>(l, 0);
}
exc_status by_dtype(Launch &l, float *gains) {
    switch (l.q.a.dtype) {
    case EXC_F8_E4M3:
        return run<EXC_F8_E4M3>(l, gains);
    case EXC_F4:
        return run<EXC_F4>(l, gains);
    case EXC_F16:
        return run<EXC_F16>(l, gains);
    default:
        return run<EXC_BF16>(l, gains);
    }
}

bool is_coded(int dtype) { return dtype == EXC_F8_E4M3 || dtype == EXC_F4; }

bool fits(const struct exc_project_args *a) {
    if (a->rounding < EXC_ROUND_RN || a->rounding > EXC_ROUND_EXACT) return false;
    if (!is_coded(a->dtype)) return a->dtype == EXC_BF16 || a->dtype == EXC_F16;
    if (a->dtype == EXC_F4 && a->cols % SCALE_GROUP) return false;
    const bool scales =
        a->scale_dtype == EXC_F8_E8M0 ||
        (a->dtype == EXC_F8_E4M3 && (a->scale_dtype == EXC_F32 || a->scale_dtype == EXC_BF16));
    return scales && (!a->count || (a->src && a->scale && a->scale_to));
}

/* bytes of new scales of a band */
int64_t kept_bytes(const struct exc_project_args *a, int64_t along) {
    const int64_t n = a->dtype == EXC_F8_E4M3   ? ceil_div(along, SCALE_BLOCK)
                      : a->dtype != EXC_F4      ? 0
                      : a->side == EXC_SIDE_OUT ? along * (BAND / SCALE_GROUP)
                                                : ceil_div(along, SCALE_GROUP) * BAND;
    return ceil_div(n * (int64_t)sizeof(float), 256) * 256;
}

/* ---- the common edit of e4m3 on Hopper */

bool is_common(const Requant &q, int major) {
    const exc_project_args &a = q.a;
    return major >= 9 && !q.factor && a.dtype == EXC_F8_E4M3 && a.side == EXC_SIDE_OUT && a.rounding == EXC_ROUND_RN &&
           a.norm == EXC_NORM_NONE && a.rows > 0 && a.rows % PIECE == 0 && a.cols % 16 == 0;
}

/* directions that a kernel holds in registers, 0: the one for all ranks and sums */
int held(const Requant &q) { return !q.summed && q.a.rank <= PAIR ? (int)q.a.rank : 0; }

/* Few blocks with as many rows as their warps take; two on a processor where a ring has room for a strip and two steps
 * beside, else one. each 0: there are too many rows. */
Deal deal(const Requant &q, size_t shared) {
    const int64_t shares = ceil_div(q.along, SHARE);
    Deal d = {1, 0, 0, 0, 0};
    while (d.size < 2 * CLUSTER && ceil_div(shares, d.size) > SHARES) d.size *= 2;
    if (ceil_div(shares, d.size) > SHARES) return d;
    d.each = (int)ceil_div(shares, d.size);
    Desk none;
    const size_t fixed = carve(nullptr, d, (int)q.a.rank, held(q), &none), slot = (size_t)d.each * SLOT * 16;
    const size_t rooms[] = {(shared + 1024) / 2 - 1024, shared}; /* a block's own kilobyte */
    for (size_t room : rooms) {
        if (!held(q) && room != shared) continue; /* its registers fill a processor */
        const size_t slots = room > fixed ? (room - fixed) / slot : 0;
        d.slots = (int)(slots < MOST_SLOTS ? slots : MOST_SLOTS);
        if (d.slots >= STEPS + 2) break;
    }
    if (d.slots <= STEPS) d.each = 0;
    d.bytes = carve(nullptr, d, (int)q.a.rank, held(q), &none);
    return d;
}

template <int K> cudaError_t start(const Launch &l, const Deal &d) {
    const cudaError_t e = cudaSetDevice(l.queue->device);
    return e != cudaSuccess ? e
                            : LAUNCH_CLUSTERS(l.q.count * l.q.bands, d.size, octets<K>, THREADS, d.bytes,
                                              (cudaStream_t)l.queue->stream, l.q, d);
}

/* false: no cluster of this size fits on the device, or what is left of it */
bool by_octets(const Launch &l, Deal d, exc_status *st) {
    if (!l.q.count || !l.q.bands) return true;
    d.parts = (int)l.q.parts;
    const int k = held(l.q);
    const cudaError_t e = k == 0 ? start<0>(l, d) : k == 1 ? start<1>(l, d) : start<2>(l, d);
    if (e == cudaErrorInvalidConfiguration) {
        cudaGetLastError();
        return false;
    }
    *st = exc_enqueued(l.queue, "octets", e);
    return true;
}

/* what the device has */
struct Device {
    int processors, shared, major;
};
cudaError_t look_at(int device, Device *d) {
    cudaError_t e = cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&d->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return e != cudaSuccess ? e : cudaDeviceGetAttribute(&d->major, cudaDevAttrComputeCapabilityMajor, device);
}

} // namespace

exc_status exc_requantise(exc_queue *queue, const struct exc_project_args *a, const double *factor) {
    if (!fits(a)) return EXC_ERR_USAGE;
    const bool out = a->side == EXC_SIDE_OUT, by_rows = out && a->norm == EXC_NORM_ROW,
               exact = a->rounding == EXC_ROUND_EXACT;
    if (by_rows && !a->c) return EXC_ERR_USAGE;
    Device device = {};
    EXC_PASS(exc_enqueued(queue, "requant", look_at(queue->device, &device)));
    Launch l = {queue, {}, 0, 0};
    Requant &q = l.q;
    q.a = *a, q.factor = factor;
    q.along = out ? a->rows : a->cols, q.whole = out ? a->cols : a->rows;
    q.bands = ceil_div(q.whole, BAND);
    q.looked_at = a->before || a->after || a->size || a->nonfinite || a->c;
    q.summed = a->before || a->after || a->size || a->nonfinite || a->moved || a->error || a->changed;
    const size_t lines = Keep::bytes(a->rank, exact);
    q.shared_lines = lines + 1024 <= (size_t)device.shared;
    l.shared = q.shared_lines ? lines : 0;
    q.kept_bytes = kept_bytes(a, q.along);
    q.scratch_bytes = q.kept_bytes + (q.shared_lines ? 0 : (int64_t)lines);
    const Deal d = is_common(q, device.major) ? deal(q, (size_t)device.shared) : Deal();
    q.parts = d.each ? q.bands * d.size : q.bands;
    const int64_t each =
        q.parts * (int64_t)sizeof(Requantised) + (by_rows ? q.along * (int64_t)sizeof(float) : 0);
    int64_t round = each ? (int64_t)ROUND_BYTES / each : a->count;
    round = round < 1 ? 1 : round < a->count ? round : a->count;
    const int64_t most = (int64_t)device.processors * BLOCKS,
                  blocks = round * q.bands < most ? round * q.bands : most;
    Carve work(queue);
    q.sums = work.take<Requantised>(round * q.parts);
    float *gains = work.take<float>(by_rows ? round * q.along : 0);
    q.scratch = work.take<char>(blocks * q.scratch_bytes);
    if (!work.ready()) return work.status;
    for (q.first = 0; q.first < a->count; q.first += round) {
        q.count = a->count - q.first < round ? a->count - q.first : round;
        l.blocks = (unsigned)(q.count * q.bands < blocks ? q.count * q.bands : blocks);
        q.row_gain = nullptr;
        if (d.each) { /* parts that nobody has are zero */
            exc_status st = exc_enqueue_fill(queue, q.sums, 0, (size_t)(q.count * q.parts) * sizeof(Requantised));
            if (st == EXC_OK) q.narrow = by_octets(l, d, &st);
            EXC_PASS(st);
        }
        EXC_PASS(by_dtype(l, by_rows ? gains : nullptr));
        ENQUEUE(queue, requantised, grid_for(q.count, 64), 64, 0, q);
    }
    return EXC_OK;
}
