/* absorbed.c - keys and values of latent attention in e4m3: a kv_b whose heads are whole blocks of scales stays codes, by heads and
 * transposed, on the CPU and on a device. The oracle is the same model in bf16: with scales that are powers of two both have the same
 * numbers, and f32 logits of the two differ by the order of sums only (1e-5 of the largest; measured 1e-6). */
#include "codes.h"
#include "models.h"

#include "model.h"
#include "session.h"

enum { ROWS = 9, HEADS = 3 };

static double scale_of(int64_t row, int64_t col, int64_t layer) { return ldexp(1, -3 - (int)((row / EXC_BLOCK + 2 * (col / EXC_BLOCK) + layer) % 4)); }

/* every kv_b: codes of middling size; as the numbers they stand for, or as codes with their scales beside them */
static void make(tiny *t, bool coded) {
    int n = t->count;
    for (int i = 0, layer = 0; i < n; i++) {
        if (!strstr(t->items[i].name, ".kv_b_proj.weight")) continue;
        int64_t rows = t->items[i].shape[0], cols = t->items[i].shape[1], of[2] = {(rows + EXC_BLOCK - 1) / EXC_BLOCK, (cols + EXC_BLOCK - 1) / EXC_BLOCK};
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.self_attn.kv_b_proj.weight_scale_inv", layer);
        if (coded) {
            tiny_add(t, name, of[0], of[1], 0, 0); /* may move the items */
            t->items[t->count - 1].dtype = "F32";
            t->items[i].dtype = "F8_E4M3";
        }
        for (int64_t k = 0; k < rows * cols; k++) {
            uint32_t code = ((uint32_t)exc_random_u64(5, (uint64_t)layer, (uint64_t)k) & 0x8f) | 0x20;
            t->items[i].value[k] = exc_from_e4m3(code) * (coded ? 1 : scale_of(k / cols, k % cols, layer));
        }
        for (int64_t k = 0; coded && k < of[0] * of[1]; k++)
            t->items[t->count - 1].value[k] = scale_of(k / of[1] * EXC_BLOCK, k % of[1] * EXC_BLOCK, layer);
        layer++;
    }
}

static float *logits_of(const char *backend, int reproducible, exc_compute compute, const char *dir, int dtype, size_t *n) {
    static const int32_t tokens[ROWS] = {3, 50, 7, 12, 9, 9, 20, 1, 77}, slot[2] = {0, 1};
    static const int64_t begin[3] = {0, 7, ROWS}, capacity[2] = {16, 16};
    exc_ctx_options opt = EXC_CTX_OPTIONS;
    exc_model_options o = EXC_MODEL_OPTIONS;
    exc_ctx *ctx;
    exc_model *m;
    exc_session *s;
    void *there;
    opt.backend = backend;
    opt.reproducible = reproducible;
    if (!strcmp(backend, "cuda")) test_emulated();
    assert_int_equal(exc_ctx_create(&opt, &ctx), EXC_OK);
    o.compute = compute;
    if (exc_model_open(ctx, dir, &o, &m)) fail_msg("%s", exc_ctx_error(ctx));
    if (exc_session_open(ctx, m, &(exc_room){.slots = 2, .cache_tokens = 32, .step_tokens = ROWS}, &s)) fail_msg("%s", exc_ctx_error(ctx));
    assert_int_equal(exc_session_reset(s, 2, capacity), EXC_OK);
    *n = (size_t)(ROWS * m->atlas->shape.vocab);
    float *z = malloc(2 * *n * sizeof *z);
    assert_int_equal(exc_device_alloc(ctx, *n, sizeof *z, "logits", &there), EXC_OK);
    for (int i = 0; i < 2; i++) { /* sequences that begin, then ones that go on: both forms */
        exc_step step = {.tokens = tokens, .slot = slot, .begin = begin, .sequences = 2, .logits_all = 1, .logits = there};
        if (exc_session_step(s, &step)) fail_msg("%s", exc_ctx_error(ctx));
        assert_int_equal(exc_device_get(ctx, z + i * *n, there, *n * sizeof *z), EXC_OK);
    }
    const exc_latent_weights *w = &m->loaded->place[1].y.mix.latent;
    for (int h = 0; h < HEADS; h++) {
        assert_int_equal(w->key.here[h].dtype, dtype);
        assert_int_equal(w->absorb.here[h].dtype, dtype);
        assert_int_equal(w->value.here[h].dtype, dtype);
    }
    *n *= 2;
    exc_device_release(ctx, there);
    exc_session_close(s);
    exc_model_free(m);
    exc_ctx_free(ctx);
    return z;
}

static void stay_codes(void **state) {
    (void)state;
    tiny t = tiny_odd(TINY_LATENT);
    char *plain = test_tmpdir(), *coded = test_tmpdir();
    t.heads = t.kv = HEADS, t.plain = 2 * EXC_BLOCK, t.value = EXC_BLOCK, t.rank = 136; /* blocks of columns: two, one ragged */
    tiny_make(&t);
    make(&t, false);
    tiny_write(&t, plain);
    make(&t, true);
    t.extra = "\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"weight_block_size\":[128,128]},";
    tiny_write(&t, coded);
    for (int way = 0; way < 4; way++) {
        const char *backend = way < 2 ? "cpu" : "cuda";
        size_t n, of;
        double worst = 0, most = 0;
        float *a = logits_of(backend, way % 2, EXC_COMPUTE_F32, plain, EXC_BF16, &n), *b = logits_of(backend, way % 2, EXC_COMPUTE_F32, coded, EXC_F8_E4M3, &of);
        assert_int_equal(n, of);
        for (size_t i = 0; i < n; i++) most = fmax(most, fabs(a[i])), worst = fmax(worst, fabs((double)a[i] - b[i]));
        if (!(worst <= 1e-5 * most)) fail_msg("%s, reproducible %d: %.3g of %.3g", backend, way % 2, worst, most);
        free(a);
        free(b);
    }
    tiny_free(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(stay_codes)};
    return cmocka_run_group_tests_name("absorbed", tests, NULL, NULL);
}
