/* subspace.c - leading right singular vectors of uncentred samples, one subspace a layer.
 *
 * Where one side is small its Gram matrix is diagonalised (Jacobi, f64). Otherwise blocks of k + 8 or more vectors are multiplied
 * by X^T X again and again: first in f32 with every eighth sample, then in f32 with all, which costs a sweep over the samples at
 * the speed of FMA, then in f64, and once more in f32 for what changed since, until the residuals, each divided by its gap
 * to the values behind the k-th, promise an angle below 5e-7. Every sweep ends in Rayleigh-Ritz in f64, so what is judged is
 * what is returned. A layer is a task: its bits depend on nothing but its samples. */
#include <math.h>
#include <string.h>

#include "lanes.h"

#define SIDE 16          /* vectors side by side in a sweep */
#define SPARE 8          /* vectors beyond those asked for: they carry the convergence */
#define DIRECT 96        /* a side up to this is diagonalised */
#define COARSE_SWEEPS 24
#define FINE_SWEEPS 100
#define COARSE 1e-5
#define ANGLE 5e-7         /* bound of the angle that ends it: half of what the op promises */
#define CLOSE 1e-3        /* angle below which f32 may correct what f64 has found */
#define THIN 8             /* the first sweeps see one sample in so many */
#define THIN_SWEEPS 2
#define NUMERICAL_RANK 3e-7 /* singular values below this share of the largest are rounding of the f32 samples */

#define V float
#define R float
#define WIDE 1
#define ROWS 1
#define SET1(x) (x)
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define FMA(a, b, c) ((a) * (b) + (c))
#define NAME(x) generic_f32_##x
#define TARGET
#include "panel.h"
#define V double
#define R double
#define WIDE 1
#define ROWS 1
#define SET1(x) (x)
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define FMA(a, b, c) ((a) * (b) + (c))
#define NAME(x) generic_f64_##x
#define TARGET
#include "panel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define V __m256
#define R float
#define WIDE 8
#define ROWS 4
#define SET1(x) _mm256_set1_ps(x)
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define NAME(x) avx2_f32_##x
#define TARGET __attribute__((target("avx2,fma")))
#include "panel.h"
#define V __m256d
#define R double
#define WIDE 4
#define ROWS 2
#define SET1(x) _mm256_set1_pd(x)
#define LOAD(p) _mm256_loadu_pd(p)
#define STORE(p, v) _mm256_storeu_pd(p, v)
#define FMA(a, b, c) _mm256_fmadd_pd(a, b, c)
#define NAME(x) avx2_f64_##x
#define TARGET __attribute__((target("avx2,fma")))
#include "panel.h"
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")))
#define V __m512
#define R float
#define WIDE 16
#define ROWS 8
#define SET1(x) _mm512_set1_ps(x)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define NAME(x) avx512_f32_##x
#define TARGET AVX512
#include "panel.h"
#define V __m512d
#define R double
#define WIDE 8
#define ROWS 8
#define SET1(x) _mm512_set1_pd(x)
#define LOAD(p) _mm512_loadu_pd(p)
#define STORE(p, v) _mm512_storeu_pd(p, v)
#define FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#define NAME(x) avx512_f64_##x
#define TARGET AVX512
#include "panel.h"
#endif

typedef void (*sweep_f32)(const float *x, int64_t row_stride, int64_t samples, int64_t width, const float *v, float *z, int64_t stride);
typedef void (*sweep_f64)(const float *x, int64_t row_stride, int64_t samples, int64_t width, const double *v, double *z, int64_t stride);

static sweep_f32 coarse_for(void) {
#if defined(__x86_64__)
    if (exc_isa_level() >= EXC_ISA_AVX512) return avx512_f32_sweep;
    if (exc_isa_level() >= EXC_ISA_AVX2) return avx2_f32_sweep;
#endif
    return generic_f32_sweep;
}

static sweep_f64 fine_for(void) {
#if defined(__x86_64__)
    if (exc_isa_level() >= EXC_ISA_AVX512) return avx512_f64_sweep;
    if (exc_isa_level() >= EXC_ISA_AVX2) return avx2_f64_sweep;
#endif
    return generic_f64_sweep;
}

/* ------------------------------------------------------------------------------------------- vectors, all in f64 */

EXC_INLINE void dot_body(const double *x, const double *y, int64_t n, double *out) {
    double lane[LANES] = {0}, s = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += x[i + l] * y[i + l];
    for (; i < n; i++) s += x[i] * y[i];
    for (int l = 0; l < LANES; l++) s += lane[l];
    *out = s;
}
EXC_DISPATCH(dot, (const double *x, const double *y, int64_t n, double *out), (x, y, n, out))

EXC_INLINE void add_body(double *x, double a, const double *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += a * y[i];
}
EXC_DISPATCH(add, (double *x, double a, const double *y, int64_t n), (x, a, y, n))

EXC_INLINE void product_body(const float *x, const float *y, int64_t n, double *out) {
    double lane[LANES] = {0}, s = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += (double)x[i + l] * (double)y[i + l];
    for (; i < n; i++) s += (double)x[i] * (double)y[i];
    for (int l = 0; l < LANES; l++) s += lane[l];
    *out = s;
}
EXC_DISPATCH(product, (const float *x, const float *y, int64_t n, double *out), (x, y, n, out))

EXC_INLINE void add_row_body(double *x, double a, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += a * (double)y[i];
}
EXC_DISPATCH(add_row, (double *x, double a, const float *y, int64_t n), (x, a, y, n))

static double dot(const double *x, const double *y, int64_t n) {
    double s;
    dot_for()(x, y, n, &s);
    return s;
}

/* eigenvalues of symmetric a [n,n] (destroyed) in descending order, eigenvectors in the rows of u: cyclic Jacobi */
static void eigen(double *a, int64_t n, double *value, double *u) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) u[i * n + j] = i == j;
    for (int round = 0; round < 60; round++) {
        double off = 0, all = 0;
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++) {
                all += a[i * n + j] * a[i * n + j];
                if (i != j) off += a[i * n + j] * a[i * n + j];
            }
        if (!(off > 1e-34 * all)) break;
        for (int64_t p = 0; p < n; p++)
            for (int64_t q = p + 1; q < n; q++) {
                double apq = a[p * n + q];
                if (apq == 0) continue;
                double theta = (a[q * n + q] - a[p * n + p]) / (2 * apq);
                double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
                double c = 1 / sqrt(t * t + 1), s = t * c;
                for (int64_t k = 0; k < n; k++) {
                    double x = a[k * n + p], y = a[k * n + q];
                    a[k * n + p] = c * x - s * y;
                    a[k * n + q] = s * x + c * y;
                }
                for (int64_t k = 0; k < n; k++) {
                    double x = a[p * n + k], y = a[q * n + k];
                    a[p * n + k] = c * x - s * y;
                    a[q * n + k] = s * x + c * y;
                    x = u[p * n + k], y = u[q * n + k];
                    u[p * n + k] = c * x - s * y;
                    u[q * n + k] = s * x + c * y;
                }
            }
    }
    for (int64_t i = 0; i < n; i++) value[i] = a[i * n + i];
    for (int64_t i = 0; i < n; i++) {
        int64_t best = i;
        for (int64_t j = i + 1; j < n; j++)
            if (value[j] > value[best]) best = j;
        double v = value[i];
        value[i] = value[best], value[best] = v;
        for (int64_t k = 0; best != i && k < n; k++) {
            v = u[i * n + k];
            u[i * n + k] = u[best * n + k], u[best * n + k] = v;
        }
    }
}

/* makes `count` rows of q [count, n] orthonormal, in order, twice for accuracy; rows that depend on earlier ones become zero */
static void orthonormalise(double *q, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; i++) {
        double *x = q + i * n, start = sqrt(dot(x, x, n));
        for (int pass = 0; pass < 2; pass++)
            for (int64_t j = 0; j < i; j++) add_for()(x, -dot(x, q + j * n, n), q + j * n, n);
        double left = sqrt(dot(x, x, n)), scale = left > 1e-13 * start ? 1 / left : 0;
        for (int64_t k = 0; k < n; k++) x[k] *= scale;
    }
}

/* rows of out [count, n] are the combinations u [count, count] of the rows of `from` */
static void combine(const double *u, const double *from, int64_t count, int64_t n, double *out) {
    memset(out, 0, (size_t)(count * n) * sizeof *out);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < count; j++) add_for()(out + i * n, u[i * count + j], from + j * n, n);
}

/* -------------------------------------------------------------------------------------------------- one layer */

typedef struct layer {
    const struct exc_subspace_args *a;
    const float *x;
    int64_t count;          /* vectors of the block, a multiple of SIDE */
    double *q, *z, *turned; /* [count, width] */
    double *wide, *image;   /* [width, count]: of the f64 sweep */
    float *v, *y;           /* [width, count]: of the f32 sweep */
    double *g, *u, *value;  /* [size,size], [size,size], [size], size the larger of count and DIRECT */
} layer;

static int64_t block_of(int64_t rank) { return (rank + SPARE + SIDE - 1) / SIDE * SIDE; }

/* doubles a worker needs */
static int64_t doubles_of(int64_t width, int64_t rank) {
    int64_t count = block_of(rank), size = count > DIRECT ? count : DIRECT;
    return width * (5 * count + size) + 2 * size * size + size + 64;
}

size_t exc_subspace_bytes(int64_t layers, int64_t samples, int64_t width, int64_t rank, int workers) {
    (void)layers, (void)samples;
    return (size_t)workers * (size_t)doubles_of(width, rank) * sizeof(double) + 64;
}

static double *carve(double **at, int64_t n) {
    double *p = *at;
    *at += n;
    return p;
}

static layer layer_of(const struct exc_subspace_args *a, int64_t index, int worker) {
    layer l = {.a = a, .x = a->x + index * a->layer_stride, .count = block_of(a->rank)};
    int64_t size = l.count > DIRECT ? l.count : DIRECT, block = a->width * l.count, most = a->width * size;
    uintptr_t start = ((uintptr_t)a->work + 63) & ~(uintptr_t)63;
    double *at = (double *)start + worker * doubles_of(a->width, a->rank);
    l.q = carve(&at, most);
    l.z = carve(&at, block);
    l.turned = carve(&at, block);
    l.wide = carve(&at, block);
    l.image = carve(&at, block);
    l.v = (float *)carve(&at, block / 2);
    l.y = (float *)carve(&at, block / 2);
    l.g = carve(&at, size * size);
    l.u = carve(&at, size * size);
    l.value = carve(&at, size);
    return l;
}

static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void random_start(layer *l, int64_t index) {
    int64_t n = l->count * l->a->width;
    uint64_t key = mix(l->a->seed + 0x9e3779b97f4a7c15u * (uint64_t)(index + 1));
    for (int64_t i = 0; i < n; i++)
        l->q[i] = (double)(int64_t)mix(key + 0x9e3779b97f4a7c15u * (uint64_t)(i + 1)) * 0x1p-63;
    orthonormalise(l->q, l->count, l->a->width);
}

/* Rayleigh-Ritz of q and z = A q: both are turned to the Ritz vectors, values descend. Returns the worst residual of the
 * leading `rank` pairs, relative to the first value.
 *
 * angle: A bound of the sine of the angle to the exact subspace. With P the projector on the exact complement, whose values are at
 * most s, |P (A - t) q| >= (t - s) |P q|: so vector i is off by at most its residual over the gap t_i - s, and the subspace by
 * the root of their squares. s is taken as the Ritz value behind the last. */
static double ritz(layer *l, double *angle) {
    int64_t n = l->a->width, m = l->count;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j <= i; j++)
            l->g[i * m + j] = l->g[j * m + i] = 0.5 * (dot(l->q + i * n, l->z + j * n, n) + dot(l->q + j * n, l->z + i * n, n));
    eigen(l->g, m, l->value, l->u);
    combine(l->u, l->q, m, n, l->turned);
    memcpy(l->q, l->turned, (size_t)(m * n) * sizeof *l->q);
    combine(l->u, l->z, m, n, l->turned);
    memcpy(l->z, l->turned, (size_t)(m * n) * sizeof *l->q);
    double worst = 0, off = 0;
    for (int64_t i = 0; i < l->a->rank; i++) {
        memcpy(l->turned, l->z + i * n, (size_t)n * sizeof *l->q);
        add_for()(l->turned, -l->value[i], l->q + i * n, n);
        double r = sqrt(dot(l->turned, l->turned, n));
        double gap = l->value[i] - l->value[l->a->rank];
        if (!(r <= worst)) worst = r;
        if (r > 0) off += gap > 0 ? r / gap * (r / gap) : INFINITY;
    }
    *angle = sqrt(off);
    return l->value[0] > 0 ? worst / l->value[0] : worst > 0 ? NAN : 0;
}

/* q <- orthonormal basis of z: the next power */
static void advance(layer *l) {
    memcpy(l->q, l->z, (size_t)(l->count * l->a->width) * sizeof *l->q);
    orthonormalise(l->q, l->count, l->a->width);
}

/* one sample in `thin` */
static double coarse_sweep(layer *l, int64_t thin, double *angle) {
    int64_t n = l->a->width, m = l->count;
    for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < n; k++) l->v[k * m + i] = (float)l->q[i * n + k];
    coarse_for()(l->x, thin * l->a->row_stride, l->a->samples / thin, n, l->v, l->y, m);
    for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < n; k++) l->z[i * n + k] = (double)l->y[k * m + i];
    return ritz(l, angle);
}

static double fine_sweep(layer *l, double *angle) {
    int64_t n = l->a->width, m = l->count;
    for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < n; k++) l->wide[k * m + i] = l->q[i * n + k];
    fine_for()(l->x, l->a->row_stride, l->a->samples, n, l->wide, l->image, m);
    for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < n; k++) l->z[i * n + k] = l->image[k * m + i];
    return ritz(l, angle);
}

/* The next power and its image at the price of an f32 sweep, where q and z = A q are known to f64: with q' the orthonormal basis
 * of z, C = q' q^T and D = q' - C q, A q' = C z + A D. Close to the end D is small, and f32 rounds A D alone. */
static double correcting_sweep(layer *l, double *angle) {
    int64_t n = l->a->width, m = l->count;
    double *next = l->wide, *shared = l->image; /* [count, width] here */
    memcpy(next, l->z, (size_t)(m * n) * sizeof *next);
    orthonormalise(next, m, n);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < m; j++) l->u[i * m + j] = dot(next + i * n, l->q + j * n, n);
    combine(l->u, l->q, m, n, shared);
    combine(l->u, l->z, m, n, l->turned);
    for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < n; k++) l->v[k * m + i] = (float)(next[i * n + k] - shared[i * n + k]);
    coarse_for()(l->x, l->a->row_stride, l->a->samples, n, l->v, l->y, m);
    for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < n; k++) l->z[i * n + k] = l->turned[i * n + k] + (double)l->y[k * m + i];
    memcpy(l->q, next, (size_t)(m * n) * sizeof *l->q);
    return ritz(l, angle);
}

/* Powers until the angle is small; returns the residual. Samples beyond what f32 can square (sums overflow or vanish) start
 * over in f64. */
static double iterate(layer *l, int64_t index) {
    random_start(l, index);
    double residual = 1, angle = 1;
    int fits = 1, thinned = l->a->samples / THIN >= 4 * l->count ? THIN_SWEEPS : 0;
    for (int i = 0; i < thinned && fits; i++) {
        residual = coarse_sweep(l, THIN, &angle);
        fits = isfinite(residual) && l->value[0] > 1e-25;
        if (fits) advance(l);
    }
    residual = angle = 1;
    for (int i = 0; i < COARSE_SWEEPS && fits && residual > COARSE && angle > ANGLE; i++) {
        if (i) advance(l);
        residual = coarse_sweep(l, 1, &angle);
        fits = isfinite(residual) && l->value[0] > 1e-25;
    }
    if (fits) advance(l);
    else random_start(l, index);
    for (int i = 0; i < FINE_SWEEPS; i++) {
        if (i) advance(l);
        residual = fine_sweep(l, &angle);
        if (fits && angle > ANGLE && angle < CLOSE) residual = correcting_sweep(l, &angle);
        if (!(angle > ANGLE) || residual < 1e-14) break;
    }
    return residual;
}

/* the Gram matrix of the smaller side, diagonalised; leading vectors and values as iterate leaves them */
static double direct(layer *l) {
    int64_t n = l->a->samples, d = l->a->width, stride = l->a->row_stride, N = n < d ? n : d;
    for (int64_t i = 0; i < N * N; i++) l->g[i] = 0;
    if (n <= d)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j <= i; j++) {
                product_for()(l->x + i * stride, l->x + j * stride, d, &l->g[i * N + j]);
                l->g[j * N + i] = l->g[i * N + j];
            }
    else
        for (int64_t s = 0; s < n; s++)
            for (int64_t i = 0; i < d; i++) add_row_for()(l->g + i * N, (double)l->x[s * stride + i], l->x + s * stride, d);
    eigen(l->g, N, l->value, l->u);
    int64_t kept = N < l->a->rank ? N : l->a->rank;
    memset(l->q, 0, (size_t)(l->a->rank * d) * sizeof *l->q);
    for (int64_t i = kept; i < l->a->rank; i++) l->value[i] = 0;
    for (int64_t i = 0; i < kept; i++) {
        if (n > d) memcpy(l->q + i * d, l->u + i * N, (size_t)d * sizeof *l->q);
        for (int64_t s = 0; s < n && n <= d; s++) add_row_for()(l->q + i * d, l->u[i * N + s], l->x + s * stride, d);
    }
    orthonormalise(l->q, kept, d);
    double worst = 0;
    for (int64_t i = 0; i < kept; i++) {
        memset(l->turned, 0, (size_t)d * sizeof *l->q);
        for (int64_t s = 0; s < n; s++) {
            double y = 0;
            memset(l->wide, 0, (size_t)d * sizeof *l->wide);
            add_row_for()(l->wide, 1, l->x + s * stride, d);
            y = dot(l->wide, l->q + i * d, d);
            add_for()(l->turned, y, l->wide, d);
        }
        add_for()(l->turned, -l->value[i], l->q + i * d, d);
        double r = sqrt(dot(l->turned, l->turned, d));
        int real = l->value[i] > NUMERICAL_RANK * NUMERICAL_RANK * l->value[0];
        if (real && !(r <= worst)) worst = r;
    }
    return l->value[0] > 0 ? worst / l->value[0] : worst;
}

static void give(const layer *l, int64_t index, double residual) {
    const struct exc_subspace_args *a = l->a;
    double all = 0, held = 0;
    for (int64_t s = 0; s < a->samples; s++) {
        double one;
        product_for()(l->x + s * a->row_stride, l->x + s * a->row_stride, a->width, &one);
        all += one;
    }
    for (int64_t i = 0; i < a->rank; i++) {
        const double *v = l->q + i * a->width;
        float *out = a->basis + (index * a->rank + i) * a->width;
        int real = l->value[i] > NUMERICAL_RANK * NUMERICAL_RANK * l->value[0];
        int64_t top = 0;
        for (int64_t k = 1; k < a->width; k++)
            if (fabs(v[k]) > fabs(v[top])) top = k;
        double sign = !real ? 0 : v[top] < 0 ? -1 : 1;
        for (int64_t k = 0; k < a->width; k++) out[k] = real ? (float)(sign * v[k]) : 0.0f;
        a->singular[index * a->rank + i] = real ? (float)sqrt(l->value[i]) : 0.0f;
        if (real) held += l->value[i];
    }
    a->energy[index] = all > 0 ? held / all : all == 0 ? 0 : all;
    a->residual[index] = residual;
}

static void layer_run(void *arg, size_t task, int worker) {
    const struct exc_subspace_args *a = arg;
    layer l = layer_of(a, (int64_t)task, worker);
    int64_t least = a->samples < a->width ? a->samples : a->width;
    double residual = least <= DIRECT ? direct(&l) : iterate(&l, (int64_t)task);
    give(&l, (int64_t)task, residual);
}

exc_status exc_cpu_subspace(exc_queue *q, const struct exc_subspace_args *a) {
    if (a->layers < 0 || a->samples < 0 || a->width < 1 || a->rank < 1 || a->rank > 64) return EXC_ERR_USAGE;
    if (a->work_bytes < exc_subspace_bytes(a->layers, a->samples, a->width, a->rank, q->workers)) return EXC_ERR_USAGE;
    q->parallel(q, (size_t)a->layers, layer_run, (void *)a);
    return EXC_OK;
}
