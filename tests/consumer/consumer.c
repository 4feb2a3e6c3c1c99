/* consumer.c - another project's use of the [stream] tier: its own weights, one direction, our edit in place; then it looks
 * for itself that nothing of the direction is left in the output space. */
#include <excise.h>
#include <math.h>
#include <stdio.h>

enum { H = 48, I = 20 };

int main(void)
{
    static float w[H * I], r[H];
    double before = 0, after = 0, length = 0;
    for (int i = 0; i < H; i++) r[i] = sinf((float)(3 * i + 1)), length += r[i] * r[i];
    for (int i = 0; i < H; i++) r[i] = (float)(r[i] / sqrt(length));
    for (int i = 0; i < H * I; i++) w[i] = cosf((float)(7 * i));
    exc_ctx *ctx = NULL;
    if (exc_ctx_create(NULL, &ctx) != EXC_OK) return fprintf(stderr, "%s\n", exc_ctx_error(ctx)), 1;
    for (int j = 0; j < I; j++) {
        double dot = 0;
        for (int i = 0; i < H; i++) dot += r[i] * w[i * I + j];
        before += dot * dot;
    }
    if (exc_edit_matrix(ctx, w, EXC_F32, H, I, r, 1, 1.0f, EXC_NORM_NONE, NULL) != EXC_OK)
        return fprintf(stderr, "%s\n", exc_ctx_error(ctx)), 1;
    for (int j = 0; j < I; j++) {
        double dot = 0;
        for (int i = 0; i < H; i++) dot += r[i] * w[i * I + j];
        after += dot * dot;
    }
    exc_ctx_free(ctx);
    printf("excise %s: residual %.1e\n", exc_version(), sqrt(after / before));
    return sqrt(after / before) < 1e-6 ? 0 : 1; /* float32: a few ulp of the largest term */
}
