/* resident.c - models in device memory: the families of golden.c on the emulated device (or the real one, where EXCISE_CUDA_MODULE
 * names its module), by the same limits. */
#include "goldens.h"

/* one of each mixer, and of each format */
static bool is_chosen(const char *name)
{
    static const char *const chosen[] = {"qwen3_moe", "qwen3_next", "deepseek_v2", "qwen3_moe_fp8", "gpt_oss"};
    bool found = false;
    for (size_t i = 0; i < EXC_COUNT(chosen); i++) found |= !strcmp(name, chosen[i]);
    return found;
}

/* sanitizers make the emulated device ten times as slow */
static bool is_taken(const char *name)
{
#ifdef __SANITIZE_ADDRESS__
    return is_chosen(name);
#else
    return true;
#endif
}

/* greedy tokens once: in all families the sums of decode tell */
static void device_f32(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(families); i++)
        if (is_taken(families[i].name)) golden_f32("cuda", families[i].name, i ? 0 : 16);
}

/* twins.c and products.c look at bf16 op by op */
static void device_bf16(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(families); i++)
        if (is_chosen(families[i].name)) golden_bf16("cuda", &families[i]);
}

static void device_sums(void **state)
{
    for (size_t i = 0; i < EXC_COUNT(families); i++)
        if (is_taken(families[i].name)) golden_sums("cuda", families[i].name);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(device_f32), cmocka_unit_test(device_bf16), cmocka_unit_test(device_sums)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
