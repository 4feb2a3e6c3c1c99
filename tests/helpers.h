/* helpers.h - what the suites share: cmocka, temporary folders, a context, small random numbers, comparisons. */
#ifndef EXC_TEST_HELPERS_H
#define EXC_TEST_HELPERS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base.h"
#include "ops.h"

exc_ctx *test_ctx(int threads);              /* asserts success; released by exc_ctx_free */
exc_ctx *test_ctx_on(const char *backend, int threads); /* "cuda": the emulated device, where EXCISE_CUDA_MODULE names no other */
void test_emulated(void);                    /* makes EXCISE_CUDA_MODULE name the emulated module, unless it names one */
const char *test_data(const char *relative); /* path under tests/data; static ring of 8 */
char *test_tmpdir(void);                     /* new folder, removed at exit; owned by the helper */
char *test_path(const char *dir, const char *name); /* dir/name; static ring of 16 */
void test_write(const char *path, const void *data, size_t n);
char *test_read(const char *path, size_t *n); /* malloc'ed, NUL added; asserts success */
void test_copy_tree(const char *from, const char *to); /* regular files and folders, made writable */
float test_normal(uint64_t seed, uint64_t i);  /* counter-based N(0,1) */
double test_relative(const float *a, const float *b, size_t n); /* |a-b| / |b|, f64 */
uint16_t test_bf16(float x);                   /* round to nearest even */
float test_from_bf16(uint16_t x);
/* asserts status and that the context's error text contains every given fragment (NULL-terminated) */
void test_refused(exc_ctx *ctx, exc_status got, exc_status want, ...);
/* opens a model and takes a token through it, which is when the weights of its layers are read; *m is NULL where one of them fails */
exc_status test_read_model(exc_ctx *ctx, const char *dir, exc_model **m);
/* forks the ranks, at most TEST_RANKS, each with a socket to each other one, and runs body in them; code [ranks]: their exit codes, 0 when body
 * came back, or minus the signal that ended one */
#define TEST_RANKS 4
void test_in_ranks(int ranks, void (*body)(int rank, const char *dir), const char *dir, int *code);
/* runs a command line by /bin/sh; returns its exit code; out gets stdout+stderr (malloc'ed), may be NULL */
int test_shell(const char *command, char **out);

#endif
