/* compare.cu - two sets of logits, row by row, on the device, the twin of compare.c: KL divergence, equal
 * argmax, -log-probabilities.
 *
 * A block takes a row and reads it once. A thread goes through it 8 logits at a time: their maximum first,
 * earlier sums are rescaled when it is a new one, and the sums of 8 in f32 are added to f64. Then the
 * threads' sums meet under the row's maximum. Sums and their order differ from the CPU's: log-probabilities
 * and KL are good to 1e-6, as there. */
#include "softmax.cuh"

namespace {

constexpr int THREADS = 256, EACH = 8;

/* one side of a row as a thread has met it */
struct Side {
    float peak;
    double sum;
    Largest top;
    /* takes maxima in; returns what earlier sums are multiplied by */
    __device__ double raise(const float (&x)[EACH], int n, int64_t at) {
        float m = peak;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (i >= n) continue;
            if (x[i] > m) m = x[i];
            top.meet(x[i], at + i);
        }
        if (!(m > peak)) return 1.0;
        const double factor = exp((double)peak - (double)m);
        peak = m;
        return factor;
    }
};

__device__ inline int take(const float *x, int64_t at, int64_t vocab, bool fours, float (&to)[EACH]) {
    const int n = vocab - at < EACH ? (int)(vocab - at) : EACH;
    if (fours && n == EACH)
#pragma unroll
        for (int i = 0; i < EACH; i += 4) {
            const float4 f = __ldcs(reinterpret_cast<const float4 *>(x + at + i));
            to[i] = f.x, to[i + 1] = f.y, to[i + 2] = f.z, to[i + 3] = f.w;
        }
    else
#pragma unroll
        for (int i = 0; i < EACH; i++) to[i] = i < n ? x[at + i] : 0.0f;
    return n;
}

/* a sum under a thread's maximum, under the row's */
__device__ inline double scaled(double sum, float from, float to) {
    const double factor = from == to ? 1.0 : exp((double)from - (double)to);
    return factor > 0 ? sum * factor : 0.0;
}

template <bool BOTH> __global__ void __launch_bounds__(THREADS) compare(exc_compare_args a) {
    SHARED_ARRAY(Largest, best, WARP);
    SHARED_ARRAY(double, room, WARP);
    const int64_t r = blockIdx.x, V = a.vocab;
    const float *p = a.p + r * V, *q = BOTH ? a.q + r * V : nullptr;
    const bool fours = (((uintptr_t)p | (uintptr_t)q) & 15) == 0;
    Side sp = {-MOST_FLOAT, 0, {0, -1}}, sq = sp;
    double dot = 0;
    for (int64_t at = (int64_t)threadIdx.x * EACH; at < V; at += THREADS * EACH) {
        float x[EACH], y[EACH], ep = 0, eq = 0, ed = 0;
        const int n = take(p, at, V, fours, x);
        const double fp = sp.raise(x, n, at);
        if (BOTH) take(q, at, V, fours, y);
        const double fq = BOTH ? sq.raise(y, n, at) : 1.0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (i >= n) continue;
            const float e = exp_down(x[i] - sp.peak);
            ep += e;
            if (!BOTH) continue;
            eq += exp_down(y[i] - sq.peak);
            ed += e == 0.0f ? 0.0f : e * (x[i] - y[i]);
        }
        sp.sum = sp.sum * fp + (double)ep;
        sq.sum = sq.sum * fq + (double)eq;
        dot = dot * fp + (double)ed;
    }
    const Largest tp = block_largest(sp.top, best), tq = BOTH ? block_largest(sq.top, best) : tp;
    const float mp = peak_of(tp), mq = peak_of(tq);
    const double sum = block_sum(scaled(sp.sum, sp.peak, mp), room);
    const double other = BOTH ? block_sum(scaled(sq.sum, sq.peak, mq), room) : 0;
    if (BOTH) dot = block_sum(scaled(dot, sp.peak, mp), room);
    if (threadIdx.x) return;
    const double lp = (double)mp + log(sum), lq = BOTH ? (double)mq + log(other) : 0;
    if (a.nll_p) a.nll_p[r] = lp - (double)p[a.next[r]];
    if (!BOTH) return;
    if (a.nll_q) a.nll_q[r] = lq - (double)q[a.next[r]];
    if (a.same_top) a.same_top[r] = (tp.id < 0 ? 0 : tp.id) == (tq.id < 0 ? 0 : tq.id);
    if (!a.kl) return;
    const double kl = dot / sum - lp + lq;
    a.kl[r] = kl < 0 ? 0 : kl;
}

} // namespace

extern "C" exc_status exc_cuda_compare(exc_queue *q, const struct exc_compare_args *a) {
    if (a->rows < 0 || a->vocab < 1 || ((a->nll_p || a->nll_q) && !a->next)) return EXC_ERR_USAGE;
    if (!a->q && (a->kl || a->same_top || a->nll_q)) return EXC_ERR_USAGE;
    if (a->q)
        ENQUEUE(q, compare<true>, (unsigned)a->rows, THREADS, 0, *a);
    else
        ENQUEUE(q, compare<false>, (unsigned)a->rows, THREADS, 0, *a);
    return EXC_OK;
}
