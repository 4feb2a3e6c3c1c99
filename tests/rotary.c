/* rotary.c - rotary frequencies and their scaling against numbers of another implementation (ROPE_INIT_FUNCTIONS of
 * transformers 5.23, which works in f32: 5e-7 apart), against the definitions, and the refusals of configs. */
#include <math.h>
#include <string.h>

#include "helpers.h"
#include "model.h"

static exc_ctx *ctx;

static const exc_family plain = {.rope_theta = 1e4, .rotary = 1};

static exc_status read_text(const char *text, int64_t dim, int64_t context, exc_shape *s)
{
    json_t *o = json_loads(text, 0, NULL);
    assert_non_null(o);
    exc_clear(ctx);
    *s = (exc_shape){.head_dim = dim, .context = context};
    exc_status st = exc_rope_read(ctx, o, "config.json", &plain, s);
    json_decref(o);
    return st;
}

static const struct row {
    const char *name;
    int dim;
    double theta;
    int context;
    const char *scaling;
    double attention;
    int pair[8];
    double frequency[8];
} rows[] = {
    {"plain", 64, 10000.0, 163840, NULL,
     1, {0, 1, 8, 10, 16, 21, 24, 31},
     {1, 0.749894202, 0.100000001, 0.0562341288, 0.00999999978, 0.00237137382, 0.00100000005, 0.00013335215}},
    {"deepseek_v3", 64, 10000.0, 163840,
     "{\"type\":\"yarn\",\"factor\":40,\"original_max_position_embeddings\":4096,"
     "\"beta_fast\":32,\"beta_slow\":1,\"mscale\":1.0,\"mscale_all_dim\":1.0}",
     1, {0, 1, 8, 10, 16, 21, 24, 31},
     {1, 0.749894202, 0.100000001, 0.0562341288, 0.00550000044, 0.000414990413, 2.49999994e-05, 3.33380353e-06}},
    {"mscales differ", 16, 10000.0, 163840,
     "{\"type\":\"yarn\",\"factor\":40,\"original_max_position_embeddings\":4096,\"mscale\":0.707,\"mscale_all_dim\":1.0}",
     0.921042355, {0, 1, 2, 4, 5, 6, 7, 7},
     {1, 0.316227764, 0.100000001, 0.00512499968, 0.000849862176, 2.49999994e-05, 7.90569447e-06, 7.90569447e-06}},
    {"gpt_oss", 64, 150000.0, 131072,
     "{\"rope_type\":\"yarn\",\"factor\":32.0,\"original_max_position_embeddings\":4096,"
     "\"beta_fast\":32.0,\"beta_slow\":1.0,\"truncate\":false}",
     1.34657359, {0, 1, 8, 10, 16, 21, 24, 31},
     {1, 0.689044297, 0.0508132726, 0.0193349998, 0.000456483918, 1.25325696e-05, 4.09997847e-06, 3.0235114e-07}},
    {"qwen3 yarn", 128, 1000000.0, 131072,
     "{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":32768}",
     1.13862944, {0, 1, 16, 21, 32, 42, 48, 63},
     {1, 0.805842221, 0.0316227786, 0.0107460786, 0.000602941145, 2.88695483e-05, 7.90569356e-06, 3.10234441e-07}},
    {"factor null", 32, 500000.0, 65536,
     "{\"rope_type\":\"yarn\",\"factor\":null,\"original_max_position_embeddings\":8192,\"attention_factor\":1.25}",
     1.25, {0, 1, 4, 5, 8, 10, 12, 15},
     {1, 0.440366626, 0.0376060307, 0.0136623643, 0.000424263999, 3.42810235e-05, 6.64786967e-06, 5.6770881e-07}},
    {"no original", 64, 10000.0, 4096, "{\"rope_type\":\"yarn\",\"factor\":4.0,\"beta_fast\":0,\"beta_slow\":0.5}",
     1.13862944, {0, 1, 8, 10, 16, 21, 24, 31},
     {1, 0.749894202, 0.100000001, 0.0562341288, 0.00700000022, 0.00106711825, 0.000300000014, 3.33380376e-05}},
    {"ends meet", 8, 100.0, 64,
     "{\"rope_type\":\"yarn\",\"factor\":2.0,\"original_max_position_embeddings\":32,"
     "\"beta_fast\":1.0,\"beta_slow\":1.0,\"truncate\":false}",
     1.06931472, {0, 1, 2, 3, 3, 3, 3, 3},
     {1, 0.316227764, 0.0500000007, 0.0158113893, 0.0158113893, 0.0158113893, 0.0158113893, 0.0158113893}},
    {"llama 3.1", 128, 500000.0, 131072,
     "{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
     "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}",
     1, {0, 1, 16, 21, 32, 42, 48, 63},
     {1, 0.814617217, 0.0376060307, 0.0134904198, 0.000524846022, 2.2748929e-05, 6.64786967e-06, 3.06892588e-07}},
    {"llama3, odd", 20, 10000.0, 2048,
     "{\"rope_type\":\"llama3\",\"factor\":3.5,\"low_freq_factor\":0.5,"
     "\"high_freq_factor\":7,\"original_max_position_embeddings\":512}",
     1, {0, 1, 2, 3, 5, 6, 7, 9},
     {1, 0.398107171, 0.158489317, 0.0502096526, 0.00320315734, 0.00113744871, 0.000452826673, 7.17681978e-05}},
};

static void test_numbers(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(rows); i++)
        for (int nested = 0; nested < 2; nested++) { /* theta outside or inside the object */
            const struct row *r = &rows[i];
            char *text;
            exc_shape s;
            float got[64];
            int n = nested && r->scaling
                        ? asprintf(&text, "{\"rope_parameters\":{\"rope_theta\":%.17g,%s}", r->theta, r->scaling + 1)
                        : asprintf(&text, "{\"rope_theta\":%.17g,\"rope_scaling\":%s}", r->theta, r->scaling ? r->scaling : "null");
            assert_true(n > 0);
            if (read_text(text, r->dim, r->context, &s)) fail_msg("%s: %s", r->name, exc_ctx_error(ctx));
            assert_int_equal(s.rotary, r->dim);
            exc_rope_frequencies(&s.rope, s.rotary, got);
            if (!(fabs((double)s.rope.attention - r->attention) < 3e-7 * r->attention))
                fail_msg("%s: attention factor %.9g, not %.9g", r->name, (double)s.rope.attention, r->attention);
            for (int j = 0; j < 8; j++)
                if (!(fabs((double)got[r->pair[j]] - r->frequency[j]) <= 5e-7 * r->frequency[j]))
                    fail_msg("%s: pair %d: %.9g, not %.9g", r->name, r->pair[j], (double)got[r->pair[j]], r->frequency[j]);
            free(text);
        }
}

/* gpt_oss where config.json names no scaling: what GptOssConfig() of transformers takes */
static void test_silent(void **state)
{
    static const int pair[] = {0, 1, 8, 10, 16, 21, 24, 31};
    static const double frequency[] = {1,              0.689044297,    0.0508132726,   0.0193349998,
                                       0.000456483918, 1.25325696e-05, 4.09997847e-06, 3.0235114e-07};
    json_t *o = json_object();
    exc_shape s = {.head_dim = 64, .context = 131072};
    float got[32];
    assert_int_equal(exc_rope_read(ctx, o, "config.json", exc_family_find("gpt_oss"), &s), EXC_OK);
    json_decref(o);
    exc_rope_frequencies(&s.rope, s.rotary, got);
    assert_true(fabs((double)s.rope.attention - 1.3465735902799727) < 3e-7);
    for (size_t j = 0; j < EXC_COUNT(pair); j++) assert_true(fabs((double)got[pair[j]] - frequency[j]) <= 5e-7 * frequency[j]);
}

/* the softmax scale of multi-head latent attention: (0.1 ln 40 + 1)^2 */
static void test_score(void **state)
{
    exc_shape s;
    assert_int_equal(read_text("{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":40,\"original_max_position_embeddings\":4096,"
                               "\"mscale\":1,\"mscale_all_dim\":1}}", 64, 163840, &s), EXC_OK);
    assert_true(fabs(s.rope.score - 1.8738542071) < 1e-9);
    assert_int_equal(read_text("{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":40,\"original_max_position_embeddings\":4096}}", 64,
                               163840, &s), EXC_OK);
    assert_true(s.rope.score == 1);
    assert_int_equal(read_text("{}", 64, 163840, &s), EXC_OK);
    assert_true(s.rope.score == 1 && s.rope.attention == 1 && s.rope.theta == 1e4);
}

/* what loaders do where a key stands twice: rope_scaling before rope_parameters, the outer original context before the inner */
static void test_precedence(void **state)
{
    exc_shape s;
    assert_int_equal(read_text("{\"rope_theta\":5e5,\"original_max_position_embeddings\":100,\"rope_parameters\":{\"rope_type\":\"default\","
                               "\"rope_theta\":7},\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"original_max_position_embeddings\":50}}",
                               8, 400, &s), EXC_OK);
    assert_int_equal(s.rope.kind, EXC_ROPE_YARN);
    assert_true(s.rope.theta == 5e5 && s.rope.original == 100);
    assert_int_equal(read_text("{\"rope_scaling\":{},\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":7}}", 8, 400, &s), EXC_OK);
    assert_true(s.rope.theta == 7);
}

static void test_refusals(void **state)
{
    static const struct {
        const char *object;
        const char *said[2];
    } bad[] = {
        {"7", {"rope_scaling", "an object"}},
        {"{\"rope_type\":\"longrope\",\"factor\":2}", {"longrope", "llama3"}},
        {"{\"factor\":2}", {"rope_type", "nothing"}},
        {"{}", {"rope_type", "nothing"}},
        {"{\"rope_type\":3}", {"rope_type", "3"}},
        {"{\"rope_type\":\"yarn\"}", {"factor", "nothing"}},
        {"{\"rope_type\":\"yarn\",\"factor\":0.5}", {"factor", "0.5"}},
        {"{\"rope_type\":\"yarn\",\"factor\":\"4\"}", {"factor", "\"4\""}},
        {"{\"rope_type\":\"yarn\",\"factor\":null,\"original_max_position_embeddings\":4096}", {"factor", "0.25"}},
        {"{\"rope_type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":0}", {"original_max_position_embeddings", "0"}},
        {"{\"rope_type\":\"yarn\",\"factor\":4,\"beta_fast\":1,\"beta_slow\":2}", {"beta_fast", "beta_slow (2)"}},
        {"{\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":-1}", {"mscale", "-1"}},
        {"{\"rope_type\":\"yarn\",\"factor\":4,\"truncate\":1}", {"truncate", "true or false"}},
        {"{\"rope_type\":\"yarn\",\"factor\":4,\"rope_theta\":1}", {"rope_theta", "1"}},
        {"{\"rope_type\":\"llama3\",\"factor\":4}", {"low_freq_factor", "nothing"}},
        {"{\"rope_type\":\"llama3\",\"factor\":4,\"low_freq_factor\":4,\"high_freq_factor\":4}", {"high_freq_factor", "more than"}},
    };
    for (size_t i = 0; i < EXC_COUNT(bad); i++) {
        char *text;
        exc_shape s;
        assert_true(asprintf(&text, "{\"rope_scaling\":%s}", bad[i].object) > 0);
        test_refused(ctx, read_text(text, 8, 1024, &s), EXC_ERR_INPUT, "config.json", bad[i].said[0], bad[i].said[1], NULL);
        free(text);
    }
}

static int setup(void **state)
{
    ctx = test_ctx(1);
    return 0;
}

static int teardown(void **state)
{
    exc_ctx_free(ctx);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_silent),
        cmocka_unit_test(test_score),
        cmocka_unit_test(test_precedence),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
