/* subspace.cu - leading right singular vectors of uncentred samples on the device, the twin of subspace.c,
 * all layers side by side.
 *
 * Block power iteration in f64, A = X^T X applied as two products: q [m, width] holds m >= rank + 8 vectors,
 * z = A q. Every sweep ends in Rayleigh-Ritz: q z^T is diagonalised by one block a layer (Jacobi, in shared
 * memory), q and z are turned to the Ritz vectors, their residuals and the bound of their angle are taken,
 * and z, made orthonormal by two rounds of Cholesky QR (rows scaled first), is the next q. Where one side is
 * small its Gram matrix is diagonalised for a start that is the answer: up to DIRECT by a block of ours, up to
 * LIBRARY by cuSOLVER, where it is at hand. Either is only a start: what is returned has been swept and judged
 * by its own residuals, and a layer whose matrix the library could not do starts from random vectors, as all do
 * without it. Nothing waits for the host: a fixed number of sweeps is enqueued, and the kernels of a layer that
 * is `done` return at once. The scratch is carved from the queue; a->work is the CPU's. */
#include "gram.cuh"

namespace {

constexpr int SPARE = 8,
              SIDE = 16;   /* vectors beyond the rank, at least; their number is a multiple of SIDE */
constexpr int DIRECT = 96; /* a side up to this is diagonalised by a block */
constexpr int LIBRARY = 1024; /* by cuSOLVER; beyond, iteration is the shorter way to so few vectors */
constexpr int SWEEPS = 120, DIRECT_SWEEPS = 2;
constexpr double ANGLE = 5e-7, NUMERICAL_RANK = 3e-7; /* as in subspace.c */
constexpr double DEPENDENT = 1e-14; /* what is left of a row's square when it depends on those before it */
constexpr int ROTATIONS = 40, SMALL = 256;
constexpr size_t ROUND_BYTES = (size_t)256
                               << 20; /* layers at once: what they need of the scratch is bounded */

/* one layer's arrays, f64; all layers lie one after the other */
struct Space {
    double *q, *z;    /* [m, width] */
    double *y;        /* [m, samples] */
    double *g, *u;    /* [side, side] */
    double *value;    /* [side] */
    double *residual; /* [1] */
    int *done;        /* [1] */
    int *spoilt;      /* [1] nonzero: cuSOLVER has no eigenvectors of it */
    int64_t m, width, samples, side;
};

/* -------------------------------------------------------------------------------------------------------
 * products */

constexpr int TILE = 64, DEEP = 16;

/* OF_ROWS: out[j, i] = sum over columns k of x[i, k] v[j, k]; else out[j, i] = sum over samples k of x[k, i]
 * v[j, k]. v [m, depth], out [m, size]. A block: 64 i and 16 j, four by four a thread. */
template <bool OF_ROWS>
__global__ void __launch_bounds__(64)
    product(const float *x, int64_t layer_stride, int64_t row_stride, int64_t size, int64_t depth, int64_t m,
            const double *v, double *out, const int *done) {
    SHARED_ARRAY(double, a, DEEP *(TILE + 1));
    SHARED_ARRAY(double, b, DEEP *(SIDE + 1));
    const int64_t layer = blockIdx.z, first = (int64_t)blockIdx.x * TILE, vector = (int64_t)blockIdx.y * SIDE;
    if (done[layer]) return;
    x += layer * layer_stride, v += (layer * m + vector) * depth, out += (layer * m + vector) * size;
    const int ti = threadIdx.x / 4, tj = threadIdx.x % 4;
    double sum[4][4] = {};
    for (int64_t k = 0; k < depth; k += DEEP) {
        for (int at = threadIdx.x; at < TILE * DEEP; at += 64) {
            const int i = OF_ROWS ? at / DEEP : at % TILE, d = OF_ROWS ? at % DEEP : at / TILE;
            const bool in = first + i < size && k + d < depth;
            a[d * (TILE + 1) + i] = in ? (double)(OF_ROWS ? x[(first + i) * row_stride + k + d]
                                                          : x[(k + d) * row_stride + first + i])
                                       : 0.0;
        }
        for (int at = threadIdx.x; at < SIDE * DEEP; at += 64)
            b[at % DEEP * (SIDE + 1) + at / DEEP] =
                k + at % DEEP < depth ? v[at / DEEP * depth + k + at % DEEP] : 0.0;
        __syncthreads();
        for (int d = 0; d < DEEP; d++) {
            double s[4], t[4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[e] = a[d * (TILE + 1) + ti + 16 * e], t[e] = b[d * (SIDE + 1) + tj + 4 * e];
#pragma unroll
            for (int e = 0; e < 4; e++)
#pragma unroll
                for (int f = 0; f < 4; f++) sum[e][f] = fma(s[e], t[f], sum[e][f]);
        }
        __syncthreads();
    }
    for (int e = 0; e < 4; e++)
        for (int f = 0; f < 4; f++)
            if (first + ti + 16 * e < size) out[(tj + 4 * f) * size + first + ti + 16 * e] = sum[e][f];
}

/* g[i, j] = a_i . b_j; a block: 16 i and 16 j */
__global__ void __launch_bounds__(256) inner(const double *a, const double *b, int64_t m, int64_t n,
                                             double *g, int64_t stride, const int *done) {
    constexpr int STEP = 64;
    SHARED_ARRAY(double, p, SIDE *(STEP + 1));
    SHARED_ARRAY(double, q, SIDE *(STEP + 1));
    const int64_t layer = blockIdx.z, row = (int64_t)blockIdx.x * SIDE, col = (int64_t)blockIdx.y * SIDE;
    if (done[layer]) return;
    a += (layer * m + row) * n, b += (layer * m + col) * n;
    const int i = threadIdx.x / SIDE, j = threadIdx.x % SIDE;
    double sum = 0;
    for (int64_t k = 0; k < n; k += STEP) {
        for (int at = threadIdx.x; at < SIDE * STEP; at += 256) {
            const int r = at / STEP, d = at % STEP;
            p[r * (STEP + 1) + d] = k + d < n ? a[r * n + k + d] : 0.0;
            q[r * (STEP + 1) + d] = k + d < n ? b[r * n + k + d] : 0.0;
        }
        __syncthreads();
        for (int d = 0; d < STEP; d++) sum = fma(p[i * (STEP + 1) + d], q[j * (STEP + 1) + d], sum);
        __syncthreads();
    }
    g[layer * stride + (row + i) * m + col + j] = sum;
}

/* rows of `to` [m, n] = combinations u [m, m] of the rows of `from`; both may be one array: a block has read
 * its 32 columns first */
__global__ void __launch_bounds__(256) turn(const double *u, int64_t stride, const double *from, double *to,
                                            int64_t m, int64_t n, const int *done) {
    DYN_SHARED(double, tile); /* [m, 32] */
    const int64_t layer = blockIdx.y, col = (int64_t)blockIdx.x * WARP + threadIdx.x % WARP;
    if (done[layer]) return;
    u += layer * stride, from += layer * m * n, to += layer * m * n;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int64_t j = warp; j < m; j += 256 / WARP) tile[j * WARP + lane] = col < n ? from[j * n + col] : 0.0;
    __syncthreads();
    for (int64_t i = warp; i < m; i += 256 / WARP) {
        double sum = 0;
        for (int64_t j = 0; j < m; j++) sum = fma(u[i * m + j], tile[j * WARP + lane], sum);
        if (col < n) to[i * n + col] = sum;
    }
}

/* -------------------------------------------------------------------------------------------- small
 * matrices, a block each */

/* pair `i` of round `r` of a tournament of n (even): everyone meets everyone once in n - 1 rounds */
__device__ inline void pair_of(int n, int r, int i, int *p, int *q) {
    const int a = i == 0 ? n - 1 : (r + i) % (n - 1), b = (r + n - 1 - i) % (n - 1);
    *p = a < b ? a : b, *q = a < b ? b : a;
}

/* the rotation that makes a[p, q] zero */
__device__ inline void rotation(double pp, double qq, double pq, double *c, double *s) {
    *c = 1, *s = 0;
    if (pq == 0) return;
    const double theta = (qq - pp) / (2 * pq),
                 t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
    *c = 1 / sqrt(t * t + 1);
    *s = t * *c;
}

/* Eigenvalues of the symmetric part of g [n, n] in descending order and eigenvectors in the rows of u [n, n]:
 * Jacobi, n/2 rotations at once. even: n rounded up. apart: there is no room for the vectors in shared memory, they are kept
 * in u. */
__global__ void __launch_bounds__(SMALL)
    eigen(const double *g, int64_t g_stride, int n, int even, double *value, int64_t side, double *u,
          int64_t stride, bool apart, const int *done) {
    DYN_SHARED(double, a); /* [even, pitch], then cosine and sine [even / 2], then values [even], then vectors
                              [even, pitch] unless they are apart */
    SHARED_ARRAY(double, room, WARP);
    SHARED_ARRAY(int, place, 128);
    const int pitch = even + 1, half = even / 2;
    if (done[blockIdx.x]) return;
    double *cosine = a + even * pitch, *sine = cosine + half, *found = sine + half;
    g += blockIdx.x * g_stride, u += blockIdx.x * stride, value += blockIdx.x * side;
    double *v = apart ? u : found + even;
    const int v_pitch = apart ? even : pitch;
    for (int at = threadIdx.x; at < even * even; at += SMALL) {
        const int i = at / even, j = at % even;
        a[i * pitch + j] = i < n && j < n ? 0.5 * (g[i * n + j] + g[j * n + i]) : 0.0;
        v[i * v_pitch + j] = i == j;
    }
    for (int round = 0; round < ROTATIONS; round++) {
        double off = 0, all = 0;
        __syncthreads();
        for (int at = threadIdx.x; at < even * even; at += SMALL) {
            const double x = a[at / even * pitch + at % even];
            all += x * x;
            if (at / even != at % even) off += x * x;
        }
        all = block_sum(all, room), off = block_sum(off, room);
        if (!(off > 1e-34 * all)) break;
        for (int r = 0; r < even - 1; r++) {
            __syncthreads();
            int p, q;
            if ((int)threadIdx.x < half) {
                pair_of(even, r, threadIdx.x, &p, &q);
                rotation(a[p * pitch + p], a[q * pitch + q], a[p * pitch + q], cosine + threadIdx.x,
                         sine + threadIdx.x);
            }
            __syncthreads();
            for (int at = threadIdx.x; at < half * even; at += SMALL) { /* columns */
                const int i = at / even, k = at % even;
                pair_of(even, r, i, &p, &q);
                const double x = a[k * pitch + p], y = a[k * pitch + q];
                a[k * pitch + p] = cosine[i] * x - sine[i] * y;
                a[k * pitch + q] = sine[i] * x + cosine[i] * y;
            }
            __syncthreads();
            for (int at = threadIdx.x; at < half * even; at += SMALL) { /* rows */
                const int i = at / even, k = at % even;
                pair_of(even, r, i, &p, &q);
                double x = a[p * pitch + k], y = a[q * pitch + k];
                a[p * pitch + k] = cosine[i] * x - sine[i] * y;
                a[q * pitch + k] = sine[i] * x + cosine[i] * y;
                x = v[p * v_pitch + k], y = v[q * v_pitch + k];
                v[p * v_pitch + k] = cosine[i] * x - sine[i] * y;
                v[q * v_pitch + k] = sine[i] * x + cosine[i] * y;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < even; i += SMALL)
        found[i] = i < n ? a[i * pitch + i] : -INFINITY, place[i] = i;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += SMALL) {
        int before = 0; /* NaN stands first, so that every value has a place of its own */
        const double mine = found[i] != found[i] ? INFINITY : found[i];
        for (int j = 0; j < n; j++) {
            const double other = found[j] != found[j] ? INFINITY : found[j];
            before += other > mine || (other == mine && j < i);
        }
        place[before] = i;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += SMALL) value[i] = found[place[i]];
    for (int at = threadIdx.x; apart && at < n * n; at += SMALL) a[at / n * pitch + at % n] = v[at / n * even + at % n];
    __syncthreads(); /* u is written anew */
    const double *from = apart ? a : v; /* not in the loop: gcc 12 with -fsanitize=undefined makes that read a slot it never wrote */
    for (int at = threadIdx.x; at < n * n; at += SMALL) u[at] = from[place[at / n] * pitch + at % n];
}

/* t with t g t^T = 1: the inverse of the Cholesky factor of g, rows scaled to length 1 first; rows that
 * depend on earlier ones are zero. apart: there is no room for the inverse in shared memory, it is kept in t. */
__global__ void __launch_bounds__(SMALL)
    whiten(const double *g, int64_t stride, int m, double *t, bool apart, const int *done) {
    DYN_SHARED(double, l); /* [m, pitch], then scale [m], then the inverse [m, pitch] unless it is apart */
    const int pitch = m + 1, i_pitch = apart ? m : pitch;
    if (done[blockIdx.x]) return;
    g += blockIdx.x * stride, t += blockIdx.x * stride;
    double *scale = l + m * pitch, *inverse = apart ? t : scale + m;
    for (int i = threadIdx.x; i < m; i += SMALL) scale[i] = g[i * m + i] > 0 ? 1 / sqrt(g[i * m + i]) : 0;
    __syncthreads();
    for (int at = threadIdx.x; at < m * m; at += SMALL)
        l[at / m * pitch + at % m] = g[at] * scale[at / m] * scale[at % m],
                                inverse[at / m * i_pitch + at % m] = 0;
    for (int k = 0; k < m; k++) {
        __syncthreads();
        const double pivot = l[k * pitch + k], root = pivot > DEPENDENT ? 1 / sqrt(pivot) : 0;
        __syncthreads();
        for (int i = k + threadIdx.x; i < m; i += SMALL) l[i * pitch + k] *= root;
        __syncthreads();
        for (int at = threadIdx.x; at < m * m; at += SMALL) {
            const int i = at / m, j = at % m;
            if (j > k && i >= j)
                l[i * pitch + j] = fma(-l[i * pitch + k], l[j * pitch + k], l[i * pitch + j]);
        }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < m; j += SMALL) /* column j of the inverse */
        for (int i = j; i < m; i++) {
            double sum = i == j ? 1 : 0;
            for (int k = j; k < i; k++) sum = fma(-l[i * pitch + k], inverse[k * i_pitch + j], sum);
            inverse[i * i_pitch + j] = l[i * pitch + i] > 0 ? sum / l[i * pitch + i] : 0;
        }
    __syncthreads();
    for (int at = threadIdx.x; at < m * m; at += SMALL)
        t[at] = inverse[at / m * i_pitch + at % m] * scale[at % m];
}

/* -------------------------------------------------------------------------------------------------------- a
 * layer's fate */

__device__ inline uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* the CPU's start: numbers that depend on seed and layer */
__device__ inline uint64_t layer_key(uint64_t seed, int64_t layer) {
    return mix(seed + 0x9e3779b97f4a7c15u * (uint64_t)(layer + 1));
}
__device__ inline double random_number(uint64_t key, int64_t i) {
    return (double)(int64_t)mix(key + 0x9e3779b97f4a7c15u * (uint64_t)(i + 1)) * 0x1p-63;
}
__global__ void random_start(uint64_t seed, int64_t first, int64_t n, double *q) {
    const uint64_t key = layer_key(seed, first + blockIdx.y);
    for (int64_t i : grid_stride(n)) q[blockIdx.y * n + i] = random_number(key, i);
}

/* leading m rows of u [n, n], zero where there are none -> to [m, n] */
__global__ void leading(const double *u, int64_t stride, int64_t m, int64_t n, double *to) {
    for (int64_t i : grid_stride(m * n))
        to[blockIdx.y * m * n + i] = i < n * n ? u[blockIdx.y * stride + i] : 0.0;
}

/* A matrix that is not finite is made zero before the library sees it, which promises nothing about such. A block
 * a layer. */
__global__ void __launch_bounds__(256) keep_finite(double *g, int64_t count, int *spoilt) {
    SHARED_ARRAY(int, room, WARP);
    g += blockIdx.x * count;
    int bad = 0;
    for (int64_t i : block_stride(count)) bad |= !(fabs(g[i]) < INFINITY);
    bad = block_sum(bad, room);
    if (threadIdx.x == 0) spoilt[blockIdx.x] = bad;
    for (int64_t i : block_stride(bad ? count : 0)) g[i] = 0;
}

/* the library's vectors [n, n], values ascending -> the last m of them, last first, to [m, n]; random numbers where it
 * had none, by its word (info) or ours */
__global__ void last(const double *vectors, int64_t m, int64_t n, const int *info, const int *spoilt, uint64_t seed,
                     int64_t first, double *to) {
    const int64_t layer = blockIdx.y;
    const uint64_t key = layer_key(seed, first + layer);
    for (int64_t i : grid_stride(m * n))
        to[layer * m * n + i] = info[layer] || spoilt[layer]
                                    ? random_number(key, i)
                                    : vectors[(layer * n + n - 1 - i / n) * n + i % n];
}

/* Residuals of the Ritz pairs and the bound of their angle, as ritz() in subspace.c has them; decides whether
 * that will do. */
__global__ void __launch_bounds__(256) judge(Space s, int64_t rank, double angle_wanted) {
    SHARED_ARRAY(double, room, WARP);
    const int64_t layer = blockIdx.x, n = s.width;
    if (s.done[layer]) return;
    const double *value = s.value + layer * s.side;
    double worst = 0, off = 0;
    for (int64_t i = 0; i < rank; i++) {
        const double *q = s.q + (layer * s.m + i) * n, *z = s.z + (layer * s.m + i) * n;
        double sum = 0;
        for (int64_t k : block_stride(n)) {
            const double d = z[k] - value[i] * q[k];
            sum += d * d;
        }
        const double r = sqrt(block_sum(sum, room)), gap = value[i] - value[rank];
        if (!(r <= worst)) worst = r;
        if (r > 0) off += gap > 0 ? r / gap * (r / gap) : INFINITY;
    }
    if (threadIdx.x) return;
    const double residual = value[0] > 0 ? worst / value[0] : worst > 0 ? NAN : 0;
    s.residual[layer] = residual;
    s.done[layer] = !(sqrt(off) > angle_wanted) || residual < 1e-14;
}

/* results of a layer, one block: rows of f32, the largest component positive */
__global__ void __launch_bounds__(256) give(Space s, int64_t first, exc_subspace_args a) {
    SHARED_ARRAY(double, room, WARP);
    SHARED_ARRAY(double, largest, 256);
    SHARED_ARRAY(int64_t, where, 256);
    const int64_t layer = blockIdx.x, to = first + layer, n = s.width;
    const double *value = s.value + layer * s.side;
    const float *x = a.x + to * a.layer_stride;
    double all = 0, held = 0;
    for (int64_t i = 0; i < a.samples; i++)
        for (int64_t k : block_stride(n))
            all = fma((double)x[i * a.row_stride + k], (double)x[i * a.row_stride + k], all);
    all = block_sum(all, room);
    for (int64_t i = 0; i < a.rank; i++) {
        const double *v = s.q + (layer * s.m + i) * n;
        const bool real = value[i] > NUMERICAL_RANK * NUMERICAL_RANK * value[0];
        int64_t top = threadIdx.x < n ? threadIdx.x : 0;
        for (int64_t k : block_stride(n))
            if (fabs(v[k]) > fabs(v[top])) top = k;
        largest[threadIdx.x] = fabs(v[top]), where[threadIdx.x] = top;
        __syncthreads();
        for (int t = 0; t < 256; t++)
            if (largest[t] > fabs(v[top]) || (largest[t] == fabs(v[top]) && where[t] < top)) top = where[t];
        __syncthreads();
        const double sign = !real ? 0 : v[top] < 0 ? -1 : 1;
        for (int64_t k : block_stride(n))
            a.basis[(to * a.rank + i) * n + k] = real ? (float)(sign * v[k]) : 0.0f;
        if (threadIdx.x == 0) a.singular[to * a.rank + i] = real ? (float)sqrt(value[i]) : 0.0f;
        if (real) held += value[i];
    }
    if (threadIdx.x) return;
    a.energy[to] = all > 0 ? held / all : all == 0 ? 0 : all;
    a.residual[to] = s.residual[layer];
}

/* -------------------------------------------------------------------------------------------------------------
 * the op */

/* the library's part in it: n is the smaller side; nothing where `layers` is 0 */
struct Library {
    int64_t n, layers; /* layers of a round */
    int *info;         /* [layers] */
    char *work;
    size_t bytes;
};

/* a round of layers under way */
struct Round {
    exc_queue *q;
    const struct exc_subspace_args *a;
    Space s;
    Library library;
    GramRoom gram;
    size_t shared; /* bytes that a block may have */
    int64_t first, layers;
    /* for so many bytes and up to 2 KB that are static */
    bool has_room(size_t bytes) const { return bytes + 2048 <= shared; }
    unsigned across() const { return (unsigned)layers; }
    const float *x() const { return a->x + first * a->layer_stride; }
    int64_t stride() const { return s.side * s.side; }
    int64_t least() const { return s.samples < s.width ? s.samples : s.width; }
    bool by_rows() const { return s.samples <= s.width; }
    struct exc_gram_args gram_of(int64_t count) const {
        return {x(),     count, a->layer_stride, s.samples, a->row_stride,
                s.width, by_rows() ? EXC_GRAM_SAMPLES : EXC_GRAM_WIDTH, s.g};
    }
};

exc_status through_samples(const Round &r, const double *v, double *y) { /* y = X v */
    const Space &s = r.s;
    const dim3 grid((unsigned)ceil_div(s.samples, TILE), (unsigned)(s.m / SIDE), r.across());
    ENQUEUE(r.q, product<true>, grid, 64, 0, r.x(), r.a->layer_stride, r.a->row_stride, s.samples, s.width,
            s.m, v, y, (const int *)s.done);
    return EXC_OK;
}

exc_status back(const Round &r, const double *y, double *z) { /* z = X^T y */
    const Space &s = r.s;
    const dim3 grid((unsigned)ceil_div(s.width, TILE), (unsigned)(s.m / SIDE), r.across());
    ENQUEUE(r.q, product<false>, grid, 64, 0, r.x(), r.a->layer_stride, r.a->row_stride, s.width, s.samples,
            s.m, y, z, (const int *)s.done);
    return EXC_OK;
}

exc_status inner_products(const Round &r, const double *a, const double *b) {
    const Space &s = r.s;
    const dim3 grid((unsigned)(s.m / SIDE), (unsigned)(s.m / SIDE), r.across());
    ENQUEUE(r.q, inner, grid, 256, 0, a, b, s.m, s.width, s.g, r.stride(), (const int *)s.done);
    return EXC_OK;
}

exc_status turned(const Round &r, const double *from, double *to) {
    const Space &s = r.s;
    const dim3 grid((unsigned)ceil_div(s.width, WARP), r.across());
    ENQUEUE(r.q, turn, grid, 256, (size_t)s.m * WARP * sizeof(double), (const double *)s.u, r.stride(), from,
            to, s.m, s.width, (const int *)s.done);
    return EXC_OK;
}

/* s.g, [n, n] a layer, each g_stride from the last -> values, and vectors in s.u */
exc_status diagonalised(const Round &r, int n, int64_t g_stride) {
    const int even = n + n % 2;
    const size_t square = (size_t)(even * (even + 1)) * sizeof(double), less = square + 2 * (size_t)even * sizeof(double);
    const bool apart = !r.has_room(less + square);
    ENQUEUE(r.q, eigen, r.across(), SMALL, apart ? less : less + square, (const double *)r.s.g, g_stride, n, even, r.s.value,
            r.s.side, r.s.u, r.stride(), apart, (const int *)r.s.done);
    return EXC_OK;
}

/* rows of `z` orthonormal, into `to`; z is spoilt */
exc_status orthonormal(const Round &r, double *z, double *to) {
    const size_t square = (size_t)(r.s.m * (r.s.m + 1)) * sizeof(double), less = square + (size_t)r.s.m * sizeof(double);
    const bool apart = !r.has_room(less + square);
    for (int pass = 0; pass < 2; pass++) {
        exc_status st = inner_products(r, z, z);
        if (st != EXC_OK) return st;
        ENQUEUE(r.q, whiten, r.across(), SMALL, apart ? less : less + square, (const double *)r.s.g, r.stride(), (int)r.s.m,
                r.s.u, apart, (const int *)r.s.done);
        st = turned(r, z, pass ? to : z);
        if (st != EXC_OK) return st;
    }
    return EXC_OK;
}

#define PASS(call)                                                                                           \
    do {                                                                                                     \
        exc_status passed_ = (call);                                                                         \
        if (passed_ != EXC_OK) return passed_;                                                               \
    } while (0)

/* cuSOLVER's answer for the Gram matrices in s.g, [n, n] one after the other: leading vectors -> to */
exc_status diagonalised_by_library(const Round &r, double *to) {
    const Space &s = r.s;
    const Library &l = r.library;
    const Handles *h = handles_of(r.q);
    ENQUEUE(r.q, keep_finite, r.across(), 256, 0, s.g, l.n * l.n, s.spoilt);
    PASS(exc_enqueued(r.q, "cusolverDnXsyevBatched", cudaSetDevice(r.q->device)));
    PASS(exc_library_status(r.q, EXC_SOLVER, "cusolverDnXsyevBatched",
                            h->solver->cusolverDnXsyevBatched(
                                h->dense, h->params, nv::CUSOLVER_EIG_MODE_VECTOR, nv::CUBLAS_FILL_MODE_LOWER, l.n,
                                nv::CUDA_R_64F, s.g, l.n, nv::CUDA_R_64F, s.value, nv::CUDA_R_64F, l.work, l.bytes, h->host,
                                h->host_bytes, l.info, r.layers)));
    ENQUEUE(r.q, last, dim3(grid_for(s.m * l.n, 256), r.across()), 256, 0, (const double *)s.g, s.m, l.n,
            (const int *)l.info, (const int *)s.spoilt, r.a->seed, r.first, to);
    return EXC_OK;
}

exc_status begin(const Round &r) {
    const Space &s = r.s;
    const int64_t n = s.m * s.width, least = r.least();
    if (least > DIRECT && !r.library.layers) {
        ENQUEUE(r.q, random_start, dim3(grid_for(n, 256, 8), r.across()), 256, 0, r.a->seed, r.first, n, s.q);
        return orthonormal(r, s.q, s.q);
    }
    const struct exc_gram_args g = r.gram_of(r.layers);
    double *to = r.by_rows() ? s.y : s.q;
    PASS(exc_gram_run(r.q, &g, r.gram));
    if (least > DIRECT) {
        PASS(diagonalised_by_library(r, to));
    } else {
        PASS(diagonalised(r, (int)least, least * least));
        ENQUEUE(r.q, leading, dim3(grid_for(s.m * least, 256), r.across()), 256, 0, (const double *)s.u, r.stride(),
                s.m, least, to);
    }
    if (r.by_rows()) PASS(back(r, s.y, s.q));
    return orthonormal(r, s.q, s.q);
}

exc_status sweep(const Round &r, bool last) {
    const Space &s = r.s;
    PASS(through_samples(r, s.q, s.y));
    PASS(back(r, s.y, s.z));
    PASS(inner_products(r, s.q, s.z));
    PASS(diagonalised(r, (int)s.m, r.stride()));
    PASS(turned(r, s.q, s.q));
    PASS(turned(r, s.z, s.z));
    ENQUEUE(r.q, judge, r.across(), 256, 0, s, r.a->rank, ANGLE);
    return last ? EXC_OK : orthonormal(r, s.z, s.q);
}

/* whether cuSOLVER may be called for it: its handle is made while measuring, and a capture it may not survive */
exc_status library_at_hand(exc_queue *q, int64_t least, bool *yes) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    *yes = false;
    if (q->reproducible || least <= DIRECT || least > LIBRARY) return EXC_OK;
    if (q->measuring) exc_libraries_solver(q);
    else PASS(exc_enqueued(q, "subspace", cudaStreamIsCapturing((cudaStream_t)q->stream, &capture)));
    const Handles *h = handles_of(q);
    *yes = h && h->solver && capture == cudaStreamCaptureStatusNone;
    return EXC_OK;
}

/* what it needs beside the matrices */
exc_status library_room(Carve &work, const Space &s, int64_t n, int64_t layers, Library *l) {
    exc_queue *q = work.q;
    Handles *h = handles_of(q);
    size_t host = 0;
    *l = {n, layers, nullptr, nullptr, 0};
    PASS(exc_enqueued(q, "cusolverDnXsyevBatched_bufferSize", cudaSetDevice(q->device)));
    PASS(exc_library_status(q, EXC_SOLVER, "cusolverDnXsyevBatched_bufferSize",
                            h->solver->cusolverDnXsyevBatched_bufferSize(
                                h->dense, h->params, nv::CUSOLVER_EIG_MODE_VECTOR, nv::CUBLAS_FILL_MODE_LOWER, n,
                                nv::CUDA_R_64F, s.g, n, nv::CUDA_R_64F, s.value, nv::CUDA_R_64F, &l->bytes, &host,
                                layers)));
    if (host > h->host_bytes) { /* larger than what was measured: that would have to allocate */
        if (!q->measuring) return EXC_ERR_MEMORY;
        free(h->host);
        h->host = malloc(host);
        h->host_bytes = h->host ? host : 0;
        if (!h->host) return EXC_ERR_MEMORY;
    }
    l->info = work.take<int>(layers);
    l->work = work.take<char>((int64_t)l->bytes);
    return EXC_OK;
}

} // namespace

extern "C" exc_status exc_cuda_subspace(exc_queue *q, const struct exc_subspace_args *a) {
    if (a->layers < 0 || a->samples < 0 || a->width < 1 || a->rank < 1 || a->rank > 64) return EXC_ERR_USAGE;
    if (!a->layers) return EXC_OK;
    Round r = {};
    Space &s = r.s;
    r.q = q, r.a = a;
    s.m = ceil_div(a->rank + SPARE, SIDE) * SIDE, s.width = a->width, s.samples = a->samples;
    bool library;
    int shared = 0;
    PASS(exc_enqueued(q, "subspace", cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, q->device)));
    r.shared = (size_t)shared;
    PASS(library_at_hand(q, r.least(), &library));
    s.side = library ? r.least() : s.m > DIRECT ? s.m : DIRECT;
    const int64_t each =
        (2 * s.m * s.width + s.m * s.samples + 2 * r.stride() + s.side) * (int64_t)sizeof(double);
    int64_t most = (int64_t)ROUND_BYTES / each;
    r.layers = ceil_div(a->layers, ceil_div(a->layers, most < 1 ? 1 : most));
    Carve work(q);
    s.q = work.take<double>(r.layers * s.m * s.width);
    s.z = work.take<double>(r.layers * s.m * s.width);
    s.y = work.take<double>(r.layers * s.m * s.samples);
    s.g = work.take<double>(r.layers * r.stride());
    s.u = work.take<double>(r.layers * r.stride());
    s.value = work.take<double>(r.layers * s.side);
    s.residual = work.take<double>(r.layers);
    s.done = work.take<int>(r.layers);
    s.spoilt = work.take<int>(r.layers);
    const struct exc_gram_args gram = r.gram_of(r.layers);
    if (library) PASS(library_room(work, s, r.least(), r.layers, &r.library));
    if (library || r.least() <= DIRECT) PASS(exc_gram_take(work, &gram, &r.gram));
    if (!work.ready()) return work.status;
    struct exc_subspace_args here = *a;
    here.work = nullptr; /* of the CPU */
    for (int64_t done = 0; done < a->layers; done += r.layers) {
        /* rounds are of one size, for which the libraries were asked: the last one takes some layers once more */
        r.first = done + r.layers <= a->layers ? done : a->layers - r.layers;
        PASS(exc_enqueue_fill(q, s.done, 0, (size_t)r.layers * sizeof(int)));
        PASS(begin(r));
        const int sweeps = r.least() > DIRECT ? SWEEPS : DIRECT_SWEEPS;
        for (int i = 0; i < sweeps; i++) PASS(sweep(r, i == sweeps - 1));
        ENQUEUE(q, give, r.across(), 256, 0, s, r.first, here);
    }
    return EXC_OK;
}
