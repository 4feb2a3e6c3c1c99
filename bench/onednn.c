/* onednn.c - the bf16 matmul of oneDNN as a ceiling: weights packed in the layout the library likes best, f32 result, all
 * threads. Built only where oneDNN was found; the driver sees weak symbols elsewhere. The two major versions differ in how a
 * primitive is described, so both are spelled out. */
#include <dnnl.h>
#include <stdlib.h>

#include "bench.h"

struct onednn {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_t matmul;
    dnnl_memory_t x, w, y;
    double flop;
};

#if DNNL_VERSION_MAJOR >= 3
typedef dnnl_memory_desc_t desc;
static bool describe(desc *d, int64_t rows, int64_t cols, dnnl_data_type_t type, dnnl_format_tag_t tag)
{
    const dnnl_dims_t dims = {rows, cols};
    return dnnl_memory_desc_create_with_tag(d, 2, dims, type, tag) == dnnl_success;
}
static bool primitive(onednn *o, desc x, desc w, desc y, dnnl_primitive_desc_t *pd)
{
    return dnnl_matmul_primitive_desc_create(pd, o->engine, x, w, NULL, y, NULL) == dnnl_success;
}
static bool memory(dnnl_memory_t *m, dnnl_primitive_desc_t pd, dnnl_query_t what, onednn *o)
{
    return dnnl_memory_create(m, dnnl_primitive_desc_query_md(pd, what, 0), o->engine, DNNL_MEMORY_ALLOCATE) == dnnl_success;
}
#else
typedef dnnl_memory_desc_t desc;
static bool describe(desc *d, int64_t rows, int64_t cols, dnnl_data_type_t type, dnnl_format_tag_t tag)
{
    const dnnl_dims_t dims = {rows, cols};
    return dnnl_memory_desc_init_by_tag(d, 2, dims, type, tag) == dnnl_success;
}
static bool primitive(onednn *o, desc x, desc w, desc y, dnnl_primitive_desc_t *pd)
{
    dnnl_matmul_desc_t d;
    return dnnl_matmul_desc_init(&d, &x, &w, NULL, &y) == dnnl_success &&
           dnnl_primitive_desc_create(pd, &d, NULL, o->engine, NULL) == dnnl_success;
}
static bool memory(dnnl_memory_t *m, dnnl_primitive_desc_t pd, dnnl_query_t what, onednn *o)
{
    return dnnl_memory_create(m, dnnl_primitive_desc_query_md(pd, what, 0), o->engine, DNNL_MEMORY_ALLOCATE) == dnnl_success;
}
#endif

/* any bits that are not NaN or denormal will do: 0x3c00.. is about 0.008 */
static void touch(dnnl_memory_t m, size_t elements)
{
    void *p;
    if (dnnl_memory_get_data_handle(m, &p) != dnnl_success) return;
    for (size_t i = 0; i < elements; i++) ((uint16_t *)p)[i] = (uint16_t)(0x3c00 + i % 251);
}

onednn *onednn_open(int64_t m, int64_t n, int64_t k)
{
    onednn *o = calloc(1, sizeof *o);
    desc x, w, y;
    dnnl_primitive_desc_t pd = NULL;
    bool ok = o && dnnl_engine_create(&o->engine, dnnl_cpu, 0) == dnnl_success &&
              dnnl_stream_create(&o->stream, o->engine, dnnl_stream_default_flags) == dnnl_success &&
              describe(&x, m, k, dnnl_bf16, dnnl_ab) && describe(&w, k, n, dnnl_bf16, dnnl_format_tag_any) &&
              describe(&y, m, n, dnnl_f32, dnnl_ab) && primitive(o, x, w, y, &pd) &&
              memory(&o->x, pd, dnnl_query_src_md, o) && memory(&o->w, pd, dnnl_query_weights_md, o) &&
              memory(&o->y, pd, dnnl_query_dst_md, o) && dnnl_primitive_create(&o->matmul, pd) == dnnl_success;
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (!ok) {
        onednn_close(o);
        return NULL;
    }
    touch(o->x, (size_t)(m * k));
    touch(o->w, (size_t)(k * n));
    o->flop = 2.0 * (double)m * (double)n * (double)k;
    return o;
}

double onednn_run(onednn *o)
{
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, o->x}, {DNNL_ARG_WEIGHTS, o->w}, {DNNL_ARG_DST, o->y}};
    if (dnnl_primitive_execute(o->matmul, o->stream, 3, args) != dnnl_success || dnnl_stream_wait(o->stream) != dnnl_success)
        return 0;
    return o->flop;
}

void onednn_close(onednn *o)
{
    if (!o) return;
    if (o->x) dnnl_memory_destroy(o->x);
    if (o->w) dnnl_memory_destroy(o->w);
    if (o->y) dnnl_memory_destroy(o->y);
    if (o->matmul) dnnl_primitive_destroy(o->matmul);
    if (o->stream) dnnl_stream_destroy(o->stream);
    if (o->engine) dnnl_engine_destroy(o->engine);
    free(o);
}
