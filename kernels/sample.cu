/* sample.cu - next tokens from logits [rows,V] on the device, the twin of sample.c: the largest, or a draw
 * from the nucleus.
 *
 * A block takes a row. Probabilities p_i = exp((x_i - max) / temperature) have the CPU's bits; masses are
 * added as whole multiples of 2^-45, so that no order of adding changes them. The value at which the set ends
 * is found digit by digit, 8 bits of p a sweep, from masses by digit; of those equal to it the lowest ids are
 * in. Then masses by chunk of ids, the chunk in which the draw falls, the id in it. A draw may differ from
 * the CPU's where it is within V * 2^-45 of a border. */
#include "softmax.cuh"

namespace {

constexpr int THREADS = 512, CHUNK = 2048, MOST_VOCAB = 1 << 19;
typedef unsigned long long mass_t;

/* what all sweeps of a row need */
struct Row {
    const float *x;
    int64_t n;
    float peak, per_temperature;
    __device__ float power(int64_t i) const {
        if (peak > MOST_FLOAT) return x[i] == peak ? 1.0f : 0.0f;
        const float e = exp_down((x[i] - peak) * per_temperature);
        return e == e ? e : 0.0f;
    }
};

__device__ inline mass_t mass_of(float p) { return (mass_t)((double)p * 0x1p45 + 0.5); }

/* the set: all above the edge, and the first `ties` of those at it */
struct Nucleus {
    uint32_t edge; /* bits of p */
    mass_t ties;
};

/* digit by digit the largest value such that what is not below it has at least `need`; shared: digit [256] */
__device__ inline Nucleus cut(const Row &row, float top_p, mass_t *digit) {
    mass_t above = 0, need = 0;
    uint32_t edge = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = threadIdx.x; i < 256; i += THREADS) digit[i] = 0;
        __syncthreads();
        for (int64_t i : block_stride(row.n)) {
            const float p = row.power(i);
            const uint32_t u = bits_of(p);
            if (shift == 24 || u >> (shift + 8) == edge >> (shift + 8))
                atomicAdd(digit + (u >> shift & 255), mass_of(p));
        }
        __syncthreads();
        if (shift == 24) {
            mass_t total = 0;
            for (int i = 0; i < 256; i++) total += digit[i];
            need = (mass_t)ceil((double)top_p * (double)total);
            if (need > total) need = total;
        }
        int d = 255;
        while (d > 0 && (digit[d] == 0 || above + digit[d] < need)) above += digit[d--];
        edge |= (uint32_t)d << shift;
    }
    const mass_t one = mass_of(f32_of(edge)), left = need > above ? need - above : 0;
    return {edge, one ? (left + one - 1) / one + (left == 0) : left ? ~(mass_t)0 : 1};
}

/* masses and ties by chunk of ids, a warp each */
__device__ inline void by_chunk(const Row &row, uint32_t edge, int chunks, mass_t *mass, unsigned *ties) {
    for (int c = threadIdx.x / WARP; c < chunks; c += THREADS / WARP) {
        mass_t m = 0;
        unsigned t = 0;
        for (int64_t i = (int64_t)c * CHUNK + threadIdx.x % WARP; i < row.n && i < (int64_t)(c + 1) * CHUNK;
             i += WARP) {
            const float p = row.power(i);
            if (bits_of(p) > edge) m += mass_of(p);
            t += bits_of(p) == edge;
        }
        m = warp_sum(m);
        t = warp_sum(t);
        if (threadIdx.x % WARP == 0) mass[c] = m, ties[c] = t;
    }
    __syncthreads();
}

/* the id at which the masses of the set, added by id, pass `target`; warp 0 calls, with what comes before
 * chunk c */
__device__ inline int64_t within(const Row &row, const Nucleus &set, int c, mass_t before, mass_t ties,
                                 mass_t target) {
    const int lane = threadIdx.x % WARP;
    for (int64_t first = (int64_t)c * CHUNK; first < row.n; first += WARP) {
        const int64_t i = first + lane;
        const float p = i < row.n ? row.power(i) : 0.0f;
        const unsigned at_edge = __ballot_sync(ALL_LANES, i < row.n && bits_of(p) == set.edge);
        const mass_t rank = ties + (mass_t)__popc(at_edge & ((1u << lane) - 1));
        const bool in = i < row.n && (bits_of(p) > set.edge || (bits_of(p) == set.edge && rank < set.ties));
        mass_t sum = in ? mass_of(p) : 0;
        for (int d = 1; d < WARP; d *= 2) {
            const mass_t other = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d) sum += other;
        }
        const unsigned past = __ballot_sync(ALL_LANES, before + sum > target);
        if (past) return first + __ffs((int)past) - 1;
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        ties += (mass_t)__popc(at_edge);
    }
    return -1;
}

/* a draw from the set, -1: it has no mass; threads of warp 0 get it */
__device__ inline int64_t draw(const Row &row, float top_p, double random, mass_t *digit, mass_t *mass,
                               unsigned *ties) {
    const int chunks = (int)ceil_div(row.n, CHUNK);
    Nucleus set = {0, ~(mass_t)0};
    if (top_p < 1.0f) set = cut(row, top_p, digit);
    by_chunk(row, set.edge, chunks, mass, ties);
    if (threadIdx.x >= WARP) return -1;
    const mass_t one = mass_of(f32_of(set.edge));
    mass_t kept = 0, met = 0, before = 0, met_before = 0;
    auto chunk_mass = [&](int c, mass_t seen) {
        const mass_t left = set.ties > seen ? set.ties - seen : 0;
        return mass[c] + (left < ties[c] ? left : ties[c]) * one;
    };
    for (int c = 0; c < chunks; c++) kept += chunk_mass(c, met), met += ties[c];
    if (!kept) return -1;
    mass_t target = (mass_t)(random * (double)kept);
    if (target >= kept) target = kept - 1;
    int c = 0;
    while (before + chunk_mass(c, met_before) <= target)
        before += chunk_mass(c, met_before), met_before += ties[c++];
    return within(row, set, c, before, met_before, target);
}

__global__ void __launch_bounds__(THREADS) sample(exc_sample_args a) {
    SHARED_ARRAY(Largest, best, WARP);
    SHARED_ARRAY(double, sums, WARP);
    SHARED_ARRAY(mass_t, digit, 256);
    SHARED_ARRAY(mass_t, mass, MOST_VOCAB / CHUNK);
    SHARED_ARRAY(unsigned, ties, MOST_VOCAB / CHUNK);
    const float *x = a.logits + blockIdx.x * a.vocab;
    Largest mine = {0, -1};
    for (int64_t i : block_stride(a.vocab)) mine.meet(x[i], i);
    const Largest top = block_largest(mine, best);
    const float peak = peak_of(top);
    int64_t id = -1;
    if (a.temperature > 0)
        id = draw({x, a.vocab, peak, 1.0f / a.temperature}, a.top_p, a.random01[blockIdx.x], digit, mass,
                  ties);
    if (id < 0) id = top.id < 0 ? 0 : top.id;
    double sum = 0;
    if (a.logprob)
        for (int64_t i : block_stride(a.vocab)) sum += (double)exp_down(x[i] - peak);
    if (a.logprob) sum = block_sum(sum, sums);
    if (threadIdx.x) return;
    a.token[blockIdx.x] = (int32_t)id;
    if (a.logprob) a.logprob[blockIdx.x] = (float)((double)x[id] - (double)peak - log(sum));
}

} // namespace

extern "C" exc_status exc_cuda_sample(exc_queue *q, const struct exc_sample_args *a) {
    if (a->rows < 0 || a->vocab < 1 || a->vocab > MOST_VOCAB || !(a->temperature >= 0)) return EXC_ERR_USAGE;
    if (a->temperature > 0 && !a->random01) return EXC_ERR_USAGE;
    ENQUEUE(q, sample, (unsigned)a->rows, THREADS, 0, *a);
    return EXC_OK;
}
