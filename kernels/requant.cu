/* requant.cu - project and scale for quantised weights, and with stochastic or exact rounding: what is
 * launched, and with what scratch. requant.cuh has the kernels.
 *
 * A block takes bands one after the other, so that its scratch (new scales, and what its lines keep where
 * shared memory is too small) is that of one band. Lengths of rows across bands (norm row) need c first, then
 * a gain for every row. */
#include "requant.cuh"

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

} // namespace

exc_status exc_requantise(exc_queue *queue, const struct exc_project_args *a, const double *factor) {
    if (!fits(a)) return EXC_ERR_USAGE;
    const bool out = a->side == EXC_SIDE_OUT, by_rows = out && a->norm == EXC_NORM_ROW,
               exact = a->rounding == EXC_ROUND_EXACT;
    if (by_rows && !a->c) return EXC_ERR_USAGE;
    Launch l = {queue,
                {*a, factor, 0, 0, out ? a->rows : a->cols, out ? a->cols : a->rows, 0, nullptr, nullptr,
                 nullptr, 0, 0, 0},
                0,
                0};
    Requant &q = l.q;
    int processors = 0, most = 0;
    EXC_PASS(
        exc_enqueued(queue, "requant",
                     cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, queue->device)));
    EXC_PASS(
        exc_enqueued(queue, "requant",
                     cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue->device)));
    q.bands = ceil_div(q.whole, BAND);
    const size_t lines = Keep::bytes(a->rank, exact);
    q.shared_lines = lines + 1024 <= (size_t)most;
    l.shared = q.shared_lines ? lines : 0;
    q.kept_bytes = kept_bytes(a, q.along);
    q.scratch_bytes = q.kept_bytes + (q.shared_lines ? 0 : (int64_t)lines);
    const int64_t each =
        q.bands * (int64_t)sizeof(Requantised) + (by_rows ? q.along * (int64_t)sizeof(float) : 0);
    int64_t round = each ? (int64_t)ROUND_BYTES / each : a->count;
    round = round < 1 ? 1 : round < a->count ? round : a->count;
    const int64_t blocks = round * q.bands < processors * BLOCKS ? round * q.bands : processors * BLOCKS;
    Carve work(queue);
    q.sums = work.take<Requantised>(round * q.bands);
    float *gains = work.take<float>(by_rows ? round * q.along : 0);
    q.scratch = work.take<char>(blocks * q.scratch_bytes);
    if (!work.ready()) return work.status;
    for (q.first = 0; q.first < a->count; q.first += round) {
        q.count = a->count - q.first < round ? a->count - q.first : round;
        l.blocks = (unsigned)(q.count * q.bands < blocks ? q.count * q.bands : blocks);
        q.row_gain = nullptr;
        EXC_PASS(by_dtype(l, by_rows ? gains : nullptr));
        ENQUEUE(queue, requantised, grid_for(q.count, 64), 64, 0, q);
    }
    return EXC_OK;
}
