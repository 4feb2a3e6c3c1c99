/* apply.c - a plan written into a new checkpoint, in one pass over the files.
 *
 * The publisher copies every file and asks for the new bytes of the edited ranges, big batches at a time, so that the op has
 * work for all threads while the writer thread keeps the disk busy; hashes of old and new bytes are taken in the same batch.
 * Beside the model go excise/plan.json, directions.safetensors, report.json, and sidecar.safetensors for router biases that
 * no tensor of the family can take. Nothing of it exists under its name before the one rename at the end. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "edits.h"

typedef struct work {
    exc_ctx *ctx;
    const char *dir, *out;
    const exc_plan *plan;
    exc_apply_options opt;
    exc_atlas *a;
    exc_compiled *c;
    exc_edited e;
    exc_publish *p;
} work;

/* ----------------------------------------------------------------------------------------------------- the sidecar */

exc_status exc_sidecar_save(exc_ctx *ctx, const exc_compiled *c, const char *path) {
    const exc_shape *s = &c->a->shape;
    const int64_t shape[2] = {s->moe_layers, s->experts};
    exc_writer *w = NULL;
    EXC_TRY(exc_writer_open(ctx, path, false, &w));
    exc_status st = exc_writer_declare(w, "router_bias", EXC_F32, 2, shape);
    if (st == EXC_OK) st = exc_writer_meta(w, "excise_sidecar", "1");
    if (st == EXC_OK) st = exc_writer_meta(w, "model", c->a->fingerprint);
    if (st == EXC_OK) st = exc_writer_put(w, "router_bias", c->sidecar, (size_t)(shape[0] * shape[1]) * sizeof(float));
    if (st == EXC_OK) return exc_writer_commit(w);
    exc_writer_abort(w);
    return st;
}

static exc_status same_sidecar(exc_ctx *ctx, const exc_compiled *c, const exc_tensors *f) {
    const exc_shape *s = &c->a->shape;
    const exc_tensor *t = exc_tensors_find(f, "router_bias");
    bool fits = t && t->dtype == EXC_F32 && t->rank == 2 && t->shape[0] == s->moe_layers && t->shape[1] == s->experts;
    if (fits && !memcmp(exc_tensors_data(f, t), c->sidecar, (size_t)(t->end - t->begin))) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: router_bias: expected F32 [%lld,%lld] as the plan gives it, found another", f->path,
                    (long long)s->moe_layers, (long long)s->experts);
}

exc_status exc_sidecar_check(exc_ctx *ctx, const exc_compiled *c, const char *path) {
    exc_tensors *f = NULL;
    EXC_TRY(exc_tensors_open(ctx, path, &f));
    exc_status st = same_sidecar(ctx, c, f);
    exc_tensors_close(f);
    return st;
}

/* ------------------------------------------------------------------------------------------------------- the shards */

static exc_status fill(exc_ctx *ctx, void *user, const exc_range *ranges, size_t n, const void *const *src, void *const *dst) {
    work *k = user;
    const exc_edited_range **r = exc_alloc(ctx, n, sizeof *r, "batch");
    if (!r) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < n; i++) r[i] = ranges[i].tag;
    exc_status st = exc_edited_batch(&k->e, r, n, src, dst);
    exc_release(r);
    return st;
}

/* scales of weights that this rank edited; the file may be another's, who is done with it */
static exc_status write_scales(void *user, const exc_edited *e, const exc_edited_range *r, const void *bytes) {
    work *k = user;
    if (exc_publish_rank(k->ctx, e->w[r->at[0]]->tensor->shard) != exc_ranks_me(k->ctx)) return EXC_OK;
    return exc_publish_patch(k->p, r->file, r->begin, bytes, (size_t)(r->end - r->begin));
}

/* what each rank did to the weights in its files, to all: the report is one */
static exc_status share_effects(work *k) {
    size_t ranks = (size_t)exc_ranks_count(k->ctx), n = k->e.n, one = sizeof *k->e.effect + sizeof *k->e.hash;
    if (ranks == 1) return EXC_OK;
    uint8_t *mine = exc_alloc(k->ctx, n, one, "effects"), *all = exc_alloc(k->ctx, n * ranks, one, "effects of all ranks");
    exc_status st = mine && all ? EXC_OK : EXC_ERR_MEMORY;
    for (size_t i = 0; st == EXC_OK && i < n; i++) {
        memcpy(mine + i * one, &k->e.effect[i], sizeof *k->e.effect);
        memcpy(mine + i * one + sizeof *k->e.effect, k->e.hash[i], sizeof *k->e.hash);
    }
    if (st == EXC_OK) st = exc_ranks_gather(k->ctx, "effects of the edits", mine, all, n * one);
    for (size_t i = 0; st == EXC_OK && i < n; i++) {
        const uint8_t *from = all + ((size_t)exc_publish_rank(k->ctx, k->e.w[i]->tensor->shard) * n + i) * one;
        memcpy(&k->e.effect[i], from, sizeof *k->e.effect);
        memcpy(k->e.hash[i], from + sizeof *k->e.effect, sizeof *k->e.hash);
    }
    exc_release(mine);
    exc_release(all);
    return st;
}

static exc_status write_shards(work *k) {
    exc_range *r = exc_alloc(k->ctx, k->e.n_ranges ? k->e.n_ranges : 1, sizeof *r, "ranges to edit");
    if (!r) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < k->e.n_ranges; i++) {
        exc_edited_range *from = &k->e.range[i];
        r[i] = (exc_range){.file = from->file, .begin = from->begin, .end = from->end, .tag = from};
    }
    exc_status st = exc_publish_tensors(k->p, r, k->e.n_ranges, fill, k);
    exc_release(r);
    if (st == EXC_OK) st = exc_edited_each_stretch(&k->e, write_scales, k);
    return exc_ranks_agree(k->ctx, "scales of edited weights", st);
}

/* ----------------------------------------------------------------------------------------------------- what it says */

static json_t *facts(const work *k, double seconds) {
    json_t *o = json_object();
    uint64_t all = 0;
    for (int i = 0; i < k->a->files->n_files; i++) all += k->a->files->files[i]->size;
    json_object_set_new(o, "model", json_string(k->dir));
    if (k->out && !k->opt.dry_run) json_object_set_new(o, "out", json_string(k->out));
    json_object_set_new(o, "dry_run", json_boolean(k->opt.dry_run));
    json_object_set_new(o, "fingerprint", json_string(k->a->fingerprint));
    json_object_set_new(o, "edits", json_integer(k->plan->n_edits));
    if (k->opt.to) json_object_set_new(o, "to", json_string(k->opt.to));
    json_object_set_new(o, "rounding", json_string(exc_rounding_name(k->c->rounding)));
    json_object_set_new(o, "bytes", json_integer((json_int_t)all));
    exc_edited_facts(&k->e, o);
    if (k->c->sidecar) json_object_set_new(o, "sidecar", json_string("excise/sidecar.safetensors"));
    json_object_set_new(o, "seconds", json_real(seconds));
    return o;
}

/* ------------------------------------------------------------------------------------------------------- excise/ */

static exc_status add_plan(work *k) {
    exc_buf b = {0};
    json_t *source = json_deep_copy(k->plan->source), *model;
    if (!source) return exc_fail(k->ctx, EXC_ERR_MEMORY, "no memory for a copy of the plan");
    model = json_object_get(source, "model");
    if (!json_is_object(model)) {
        model = json_object();
        json_object_set_new(source, "model", model);
    }
    json_object_set_new(model, "fingerprint", json_string(k->a->fingerprint));
    if (k->plan->dirs) json_object_set_new(source, "directions", json_string("directions.safetensors"));
    if (k->c->rounding != EXC_ROUND_RN || k->plan->has_rounding)
        json_object_set_new(source, "rounding", json_string(exc_rounding_name(k->c->rounding)));
    exc_status st = exc_plan_text(k->ctx, source, &b);
    if (st == EXC_OK) st = exc_publish_add(k->p, "excise/plan.json", b.data, b.len);
    exc_buf_free(&b);
    json_decref(source);
    return st;
}

/* hash of a file that was just written beside the model */
static exc_status put_hash(work *k, json_t *o, const char *name) {
    char *path = NULL, hash[33];
    exc_status st = exc_publish_path(k->p, name, &path);
    if (st == EXC_OK) st = exc_hash_file(k->ctx, path, hash);
    if (st == EXC_OK) json_object_set_new(o, name, json_string(hash));
    exc_release(path);
    return st;
}

static exc_status add_directions(work *k) {
    char *path = NULL;
    if (!k->plan->dirs) return EXC_OK;
    EXC_TRY(exc_publish_path(k->p, "excise/directions.safetensors", &path));
    exc_status st = exc_dirs_save(k->ctx, k->plan->dirs, path, 0);
    exc_release(path);
    return st;
}

static exc_status add_sidecar(work *k) {
    char *path = NULL;
    if (!k->c->sidecar) return EXC_OK;
    EXC_TRY(exc_publish_path(k->p, "excise/sidecar.safetensors", &path));
    exc_status st = exc_sidecar_save(k->ctx, k->c, path);
    exc_release(path);
    return st;
}

static exc_status add_report(work *k, json_t *o) {
    json_t *files = json_object();
    json_object_set_new(o, "files", files);
    EXC_TRY(put_hash(k, files, "excise/plan.json"));
    if (k->plan->dirs) EXC_TRY(put_hash(k, files, "excise/directions.safetensors"));
    if (k->c->sidecar) EXC_TRY(put_hash(k, files, "excise/sidecar.safetensors"));
    json_t *report = json_copy(o);
    /* the same edit leaves the same bytes: no folders, which may be moved, and no times */
    json_object_del(report, "out");
    json_object_del(report, "model");
    json_object_del(report, "seconds");
    char *text = json_dumps(report, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    json_decref(report);
    exc_status st = text ? exc_publish_add(k->p, "excise/report.json", text, strlen(text)) : exc_fail(k->ctx, EXC_ERR_MEMORY, "no memory for the report");
    free(text);
    return st;
}

/* ---------------------------------------------------------------------------------------------------------- the job */

static exc_status prepare(work *k) {
    EXC_TRY(exc_atlas_open_same(k->ctx, k->dir, 0, &k->a));
    EXC_TRY(exc_plan_compile(k->ctx, k->a, k->plan, &k->c));
    if (k->opt.round && !exc_rounding_find(k->opt.round, &k->c->rounding))
        return exc_fail(k->ctx, EXC_ERR_USAGE, "apply: round: expected rn, sr or exact, found %s", exc_show(k->opt.round, strlen(k->opt.round)));
    if (k->opt.to && strcmp(k->opt.to, "bf16") != 0)
        return exc_fail(k->ctx, EXC_ERR_USAGE, "apply: to: expected bf16, found %s", exc_show(k->opt.to, strlen(k->opt.to)));
    if (k->opt.to && k->a->shape.quant == EXC_QUANT_NONE)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s/config.json: expected a quantised checkpoint to write as bf16, found no quantization_config", k->dir);
    if (k->c->sidecar && !k->opt.sidecar)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "%s: router_bias: %s", k->c->name, k->a->family->router_bias);
    EXC_TRY(exc_ranks_meet(k->ctx, "options of apply", (uint64_t)k->c->rounding * 4 + (k->opt.to ? 2 : 0) + (k->opt.dry_run != 0)));
    EXC_TRY(exc_edited_open(k->ctx, k->c, true, &k->e));
    k->e.allow_nonfinite = k->opt.allow_nonfinite != 0;
    if (k->e.n || k->c->sidecar) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT,
                    "%s: expected a plan that edits something, found none that does (strength 0, scale 1 or layers without a direction)", k->c->name);
}

static exc_status write_out(work *k, double begun, json_t **o) {
    EXC_TRY(exc_publish_open(k->ctx, k->a->files, k->out, k->opt.force != 0, &k->p));
    EXC_TRY(k->opt.to ? exc_widened_write(&k->e, k->p) : write_shards(k));
    EXC_TRY(share_effects(k));
    EXC_TRY(add_plan(k));
    EXC_TRY(add_directions(k));
    EXC_TRY(add_sidecar(k));
    *o = facts(k, exc_seconds() - begun);
    EXC_TRY(add_report(k, *o));
    exc_publish *p = k->p;
    k->p = NULL;
    EXC_TRY(exc_publish_commit(p));
    json_object_set_new(*o, "seconds", json_real(exc_seconds() - begun));
    return EXC_OK;
}

/* nearest rounding of coarse formats returns most elements to where they were */
static void warn_of_rounding(const work *k) {
    double before = 0, after = 0;
    for (size_t i = 0; i < k->e.n && k->c->rounding == EXC_ROUND_RN && !k->opt.to; i++) {
        if (!exc_weight_coded(k->e.w[i])) continue;
        before += k->e.effect[i].before;
        after += k->e.effect[i].after;
    }
    if (before > 0 && after > 1e-4 * before)
        exc_warn(k->ctx, "%s: %.1f %% of what was projected is left in the quantised weights; round \"exact\" puts back least", k->c->name,
                 100 * sqrt(after / before));
}

static exc_status perform(work *k, char **json) {
    double begun = exc_seconds();
    json_t *o = NULL;
    exc_status st = prepare(k);
    if (st == EXC_OK && k->opt.dry_run) {
        st = k->opt.to ? exc_widened_try(&k->e) : exc_edited_walk(&k->e, "edit", NULL, NULL);
        if (st == EXC_OK) o = facts(k, exc_seconds() - begun);
    } else if (st == EXC_OK) {
        st = write_out(k, begun, &o);
    }
    if (st == EXC_OK) warn_of_rounding(k);
    if (st == EXC_OK && json && !(*json = exc_json_text(k->ctx, o))) st = EXC_ERR_MEMORY;
    json_decref(o);
    return st;
}

exc_status exc_apply(exc_ctx *ctx, const char *model_dir, const exc_plan *plan, const char *out_dir, const exc_apply_options *options,
                     char **json) {
    work k = {.ctx = ctx, .dir = model_dir, .out = out_dir, .plan = plan};
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (json) *json = NULL;
    k.opt = (exc_apply_options)EXC_APPLY_OPTIONS;
    if (options) {
        if (options->size < sizeof options->size || options->size > sizeof k.opt)
            return exc_fail(ctx, EXC_ERR_USAGE, "apply: options.size: expected at most %zu, found %zu", sizeof k.opt, options->size);
        memcpy(&k.opt, options, options->size);
    }
    if (!model_dir || !plan || (!out_dir && !k.opt.dry_run))
        return exc_fail(ctx, EXC_ERR_USAGE, "apply: expected a model folder, a plan and an output folder (or a dry run)");
    exc_status st = perform(&k, json);
    exc_publish_abort(k.p);
    exc_edited_close(&k.e);
    exc_compiled_free(k.c);
    exc_atlas_close(k.a);
    return st;
}
