/* linear.h - the part of tiny.h that qwen3_next and qwen3_5_moe have to themselves: tensors of a gated delta net, packed by key head
 * or apart, and its layers a second time in f64, token by token. Included by tiny.h only. */
#ifndef EXC_TEST_LINEAR_H
#define EXC_TEST_LINEAR_H

static inline bool tiny_next(const tiny *t) { return t->kind == TINY_NEXT || t->kind == TINY_APART; }

static inline bool tiny_linear(const tiny *t, int layer) { return tiny_next(t) && (layer + 1) % t->interval; }

static inline void tiny_make_linear(tiny *t, int l)
{
    char n[128];
    double h = 1 / sqrt(t->hidden);
    int keys = t->k_heads * t->k_dim, values = t->v_heads * t->v_dim;
    if (t->kind == TINY_NEXT) {
        tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.in_proj_qkvz.weight", l), 2 * (keys + values), t->hidden, 2 * h, 0);
        tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.in_proj_ba.weight", l), 2 * t->v_heads, t->hidden, 2 * h, 0);
    } else {
        tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.in_proj_qkv.weight", l), 2 * keys + values, t->hidden, 2 * h, 0);
        tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.in_proj_z.weight", l), values, t->hidden, 2 * h, 0);
        tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.in_proj_b.weight", l), t->v_heads, t->hidden, 2 * h, 0);
        tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.in_proj_a.weight", l), t->v_heads, t->hidden, 2 * h, 0);
    }
    tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.conv1d.weight", l), 2 * keys + values, t->taps, 0.7, 0);
    tiny_tensor *conv = &t->items[t->count - 1];
    conv->rank = 3;
    conv->shape[2] = conv->shape[1];
    conv->shape[1] = 1;
    tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.A_log", l), t->v_heads, 0, 1, -1);
    tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.dt_bias", l), t->v_heads, 0, 1, 0);
    tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.norm.weight", l), t->v_dim, 0, 0.2, 1);
    tiny_add(t, TINY_NAME("model.layers.%d.linear_attn.out_proj.weight", l), t->hidden, values, 1 / sqrt(values), 0);
}

/* one row of every projection: q, k [Hk*Dk], v, z [Hv*Dv] one after the other, then beta and step [Hv] */
static inline void tiny_project(const tiny *t, int l, const double *x, double *u)
{
    char n[128];
    int64_t H = t->hidden, K = t->k_dim, n_k = t->k_heads, each = t->v_heads / n_k, V = each * t->v_dim, keys = n_k * K, values = n_k * V;
    double *gates = u + 2 * keys + 2 * values;
    if (t->kind != TINY_NEXT) {
        tiny_matmul(x, TINY_W("model.layers.%d.linear_attn.in_proj_qkv.weight", l), 1, H, 2 * keys + values, u);
        tiny_matmul(x, TINY_W("model.layers.%d.linear_attn.in_proj_z.weight", l), 1, H, values, u + 2 * keys + values);
        tiny_matmul(x, TINY_W("model.layers.%d.linear_attn.in_proj_b.weight", l), 1, H, t->v_heads, gates);
        tiny_matmul(x, TINY_W("model.layers.%d.linear_attn.in_proj_a.weight", l), 1, H, t->v_heads, gates + t->v_heads);
        return;
    }
    const double *w = TINY_W("model.layers.%d.linear_attn.in_proj_qkvz.weight", l), *ba = TINY_W("model.layers.%d.linear_attn.in_proj_ba.weight", l);
    for (int64_t g = 0; g < n_k; g++, w += (2 * K + 2 * V) * H, ba += 2 * each * H) {
        tiny_matmul(x, w, 1, H, K, u + g * K);
        tiny_matmul(x, w + K * H, 1, H, K, u + keys + g * K);
        tiny_matmul(x, w + 2 * K * H, 1, H, V, u + 2 * keys + g * V);
        tiny_matmul(x, w + (2 * K + V) * H, 1, H, V, u + 2 * keys + values + g * V);
        tiny_matmul(x, ba, 1, H, each, gates + g * each);
        tiny_matmul(x, ba + each * H, 1, H, each, gates + t->v_heads + g * each);
    }
}

static inline double tiny_silu(double x) { return x / (1 + exp(-x)); }

static inline void tiny_unit(double *x, int64_t n, double scale)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    for (int64_t i = 0; i < n; i++) x[i] *= scale / sqrt(sum + 1e-6);
}

/* the delta rule of one value head for one token: state S [Dk,Dv], gates as projected */
static inline void tiny_rule(double *S, int64_t K, int64_t V, const double *q, const double *k, const double *v, double beta, double decay, double *o)
{
    for (int64_t c = 0; c < V; c++) {
        double seen = 0;
        for (int64_t d = 0; d < K; d++) seen += decay * S[d * V + c] * k[d];
        o[c] = 0;
        for (int64_t d = 0; d < K; d++) {
            S[d * V + c] = decay * S[d * V + c] + k[d] * beta * (v[c] - seen);
            o[c] += S[d * V + c] * q[d];
        }
    }
}

/* a layer of gated delta net on normed rows x [T,H] -> o [T, Hv*Dv], ready for the output projection */
static inline void tiny_delta(const tiny *t, int l, const double *x, int64_t T, double *o)
{
    char n[128];
    int64_t K = t->k_dim, V = t->v_dim, keys = t->k_heads * K, values = t->v_heads * V, channels = 2 * keys + values,
            width = channels + values + 2 * t->v_heads;
    double *u = malloc((size_t)(T * width) * 8), *c = malloc((size_t)channels * 8), *S = calloc((size_t)(t->v_heads * K * V), 8);
    const double *conv = TINY_W("model.layers.%d.linear_attn.conv1d.weight", l), *rate = TINY_W("model.layers.%d.linear_attn.A_log", l),
                 *bias = TINY_W("model.layers.%d.linear_attn.dt_bias", l), *norm = TINY_W("model.layers.%d.linear_attn.norm.weight", l);
    for (int64_t r = 0; r < T; r++) tiny_project(t, l, x + r * t->hidden, u + r * width);
    for (int64_t r = 0; r < T; r++) {
        const double *z = u + r * width + channels, *gates = z + values;
        for (int64_t i = 0; i < channels; i++) {
            double sum = 0;
            for (int64_t j = 0; j < t->taps; j++)
                if (r - (t->taps - 1) + j >= 0) sum += conv[i * t->taps + j] * u[(r - (t->taps - 1) + j) * width + i];
            c[i] = tiny_silu(sum);
        }
        for (int64_t g = 0; g < t->k_heads; g++) tiny_unit(c + g * K, K, 1 / sqrt((double)K)), tiny_unit(c + keys + g * K, K, 1);
        for (int64_t h = 0; h < t->v_heads; h++) {
            int64_t g = h / (t->v_heads / t->k_heads);
            double *out = o + r * values + h * V, step = gates[t->v_heads + h] + bias[h];
            tiny_rule(S + h * K * V, K, V, c + g * K, c + keys + g * K, c + 2 * keys + h * V, 1 / (1 + exp(-gates[h])),
                      exp(-exp(rate[h]) * log1p(exp(step))), out);
            tiny_norm(out, norm, V, out);
            for (int64_t i = 0; i < V; i++) out[i] *= tiny_silu(z[h * V + i]);
        }
    }
    free(u);
    free(c);
    free(S);
}

/* shared expert behind its sigmoid, added to h */
static inline void tiny_shared(const tiny *t, int l, const double *x, double *h)
{
    char n[128];
    double gate;
    tiny_matmul(x, TINY_W("model.layers.%d.mlp.shared_expert_gate.weight", l), 1, t->hidden, 1, &gate);
    tiny_mlp(x, TINY_W("model.layers.%d.mlp.shared_expert.gate_proj.weight", l), TINY_W("model.layers.%d.mlp.shared_expert.up_proj.weight", l),
             TINY_W("model.layers.%d.mlp.shared_expert.down_proj.weight", l), t->hidden, t->shared, 1 / (1 + exp(-gate)), h);
}

#endif
