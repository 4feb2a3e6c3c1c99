/* scales.c - the scales of quantised weights while a plan edits them.
 *
 * Codes and scales of a weight are new together, but files hold all scales of a shard before or behind the codes, or in
 * another shard. Scales are few (a 4096th of an fp8 model, a 16th of fp4), so new ones are kept in memory, without gaps, until the codes are
 * done, and go out last, in stretches: what overlaps in a file (scales of gates and ups take turns) is one stretch. */
#include <stdlib.h>
#include <string.h>

#include "edits.h"

typedef struct lying {
    int file;
    uint64_t begin;
    size_t at;
} lying;

static int by_file(const void *a, const void *b) {
    const lying *x = a, *y = b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static void list_stretches(exc_edited *e, const lying *l, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const exc_weight *w = e->w[l[i].at];
        exc_edited_range *last = e->n_stretches ? &e->stretch[e->n_stretches - 1] : NULL;
        e->scaled[i] = l[i].at;
        if (last && last->file == w->scale->shard && w->scale_begin < last->end) {
            if (w->scale_end > last->end) last->end = w->scale_end;
            last->n++;
            continue;
        }
        e->stretch[e->n_stretches++] = (exc_edited_range){w->scale->shard, w->scale_begin, w->scale_end, e->scaled + i, 1};
    }
}

static exc_status make_lists(exc_edited *e, lying *l) {
    size_t n = 0, bytes = 0;
    for (size_t i = 0; i < e->n; i++) {
        const exc_weight *w = e->w[i];
        if (!exc_weight_coded(w)) continue;
        l[n++] = (lying){w->scale->shard, w->scale_begin, i};
        bytes += (exc_weight_scale_bytes(w) + 15) / 16 * 16;
    }
    if (!n) return EXC_OK;
    e->scaled = exc_alloc(e->ctx, n, sizeof *e->scaled, "scales of edited weights");
    e->stretch = exc_alloc(e->ctx, n, sizeof *e->stretch, "scales of edited weights");
    e->scale = exc_zalloc(e->ctx, e->n, sizeof *e->scale, "scales of edited weights");
    e->scale_slab = exc_alloc(e->ctx, bytes, 1, "scales of edited weights");
    if (!e->scaled || !e->stretch || !e->scale || !e->scale_slab) return EXC_ERR_MEMORY;
    qsort(l, n, sizeof *l, by_file);
    bytes = 0;
    for (size_t i = 0; i < n; i++) {
        e->scale[l[i].at] = e->scale_slab + bytes;
        bytes += (exc_weight_scale_bytes(e->w[l[i].at]) + 15) / 16 * 16;
    }
    list_stretches(e, l, n);
    return EXC_OK;
}

exc_status exc_edited_scales(exc_edited *e) {
    lying *l = exc_alloc(e->ctx, e->n ? e->n : 1, sizeof *l, "order of scales");
    exc_status st = l ? make_lists(e, l) : EXC_ERR_MEMORY;
    exc_release(l);
    return st;
}

/* the old scales of a weight, where its new ones will be */
void exc_edited_old_scale(exc_edited *e, size_t at) {
    const exc_weight *w = e->w[at];
    exc_scale_gather(w, e->a->files->files[w->scale->shard]->map + w->scale_begin, e->scale[at]);
}

void exc_edited_scales_close(exc_edited *e) {
    exc_release(e->scaled);
    exc_release(e->stretch);
    exc_release(e->scale);
    exc_release(e->scale_slab);
}

exc_status exc_edited_each_stretch(const exc_edited *e, exc_edited_fn visit, void *user) {
    size_t most = 0;
    for (size_t i = 0; i < e->n_stretches; i++)
        if (e->stretch[i].end - e->stretch[i].begin > most) most = (size_t)(e->stretch[i].end - e->stretch[i].begin);
    if (!e->n_stretches) return EXC_OK;
    uint8_t *bytes = exc_alloc(e->ctx, most, 1, "scales");
    exc_status st = bytes ? EXC_OK : EXC_ERR_MEMORY;
    for (size_t i = 0; i < e->n_stretches && st == EXC_OK; i++) {
        const exc_edited_range *r = &e->stretch[i];
        memcpy(bytes, e->a->files->files[r->file]->map + r->begin, (size_t)(r->end - r->begin));
        for (size_t j = 0; j < r->n; j++)
            exc_scale_scatter(e->w[r->at[j]], e->scale[r->at[j]], bytes + (e->w[r->at[j]]->scale_begin - r->begin));
        st = visit(user, e, r, bytes);
    }
    exc_release(bytes);
    return st;
}
