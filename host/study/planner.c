/* planner.c - a plan from what was measured: which roles, layers and experts, along which directions, how
 * strongly.
 *
 * The plan is written as JSON first and then read by the same strict reader as a file, so that a plan made
 * here can be nothing that a file could not say. Experts are chosen over all selected layers at once: the N
 * with the largest output score or the largest log-ratio, or all with a false discovery rate of at most X;
 * other roles are edited whole. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "edits.h"

typedef enum rule { RULE_ALL, RULE_TOP, RULE_RATIO, RULE_Q } rule;

typedef struct pick {
    int64_t row, expert; /* MoE row of the stats */
    double value;
} pick;

typedef struct planner {
    exc_ctx *ctx;
    const exc_atlas *a;
    const exc_shape *s;
    const exc_stats *stats;
    const exc_dirs *dirs;
    const exc_plan_options *opt;
    int64_t *layers, n_layers; /* the selected ones */
    bool some_layers;          /* not all */
    double *strength;          /* [n_layers], or one */
    bool by_layer;
    rule rule;
    double limit; /* N or X */
    pick *picks;
    int64_t n_picks;
    json_t *edits, *facts;
} planner;

static exc_status usage(planner *k, const char *option, const char *expected, const char *found) {
    return exc_fail(k->ctx, EXC_ERR_USAGE, "plan: %s: expected %s, found \"%s\"", option, expected,
                    exc_show(found, strlen(found)));
}

/* ----------------------------------------------------------------------------------------------------------
 * options */

static bool has_role(const planner *k, exc_role role, int64_t layer) {
    int64_t out, in;
    return exc_shape_role(k->s, k->a->family, role, layer, &out, &in);
}

static exc_status read_layers(planner *k) {
    k->some_layers = k->opt->layers != NULL;
    if (k->some_layers) { /* what is no list of layers at all is the caller's mistake, not the model's */
        exc_status st = exc_numbers_text(k->ctx, "plan", "layers", k->opt->layers, &k->layers, &k->n_layers);
        if (st != EXC_OK) return st == EXC_ERR_INPUT ? EXC_ERR_USAGE : st;
    } else {
        k->n_layers = k->s->layers;
        k->layers = exc_alloc(k->ctx, (size_t)k->n_layers, sizeof *k->layers, "layers");
        if (!k->layers) return EXC_ERR_MEMORY;
        for (int64_t l = 0; l < k->n_layers; l++) k->layers[l] = l;
    }
    for (int64_t i = 0; i < k->n_layers; i++)
        if (k->layers[i] >= k->s->layers)
            return exc_fail(k->ctx, EXC_ERR_INPUT, "plan: layers: expected layers 0..%lld, found %lld",
                            (long long)k->s->layers - 1, (long long)k->layers[i]);
    return EXC_OK;
}

static exc_status read_strength(planner *k) {
    const char *text = k->opt->strength ? k->opt->strength : "1", *p = text;
    int64_t n = 0;
    k->strength = exc_alloc(k->ctx, (size_t)k->n_layers, sizeof *k->strength, "strengths");
    if (!k->strength) return EXC_ERR_MEMORY;
    for (;; p++) {
        char *end;
        double x = strtod(p, &end);
        if (end == p || !isfinite(x))
            return usage(k, "strength", "a number or a comma list of numbers", text);
        if (n < k->n_layers) k->strength[n] = x;
        n++;
        p = end + strspn(end, " ");
        if (!*p) break;
        if (*p != ',') return usage(k, "strength", "a number or a comma list of numbers", text);
    }
    k->by_layer = strchr(text, ',') != NULL;
    if (!k->by_layer || n == k->n_layers) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT,
                    "plan: strength: expected one number or as many as layers (%lld), found %lld",
                    (long long)k->n_layers, (long long)n);
}

static exc_status read_select(planner *k) {
    static const struct {
        const char *head;
        rule rule;
    } rules[] = {{"top:", RULE_TOP}, {"logratio:", RULE_RATIO}, {"q:", RULE_Q}};
    const char *text = k->opt->select;
    if (!text || !strcmp(text, "all")) return EXC_OK;
    for (size_t i = 0; i < EXC_COUNT(rules); i++) {
        size_t n = strlen(rules[i].head);
        if (strncmp(text, rules[i].head, n)) continue;
        char *end;
        k->rule = rules[i].rule;
        k->limit = strtod(text + n, &end);
        bool good = end != text + n && !*end && k->limit > 0;
        if (good && (k->rule == RULE_Q ? k->limit <= 1 : k->limit == floor(k->limit) && k->limit < 1e9))
            return EXC_OK;
    }
    return usage(k, "select", "all, top:N, logratio:N or q:X (N from 1, X in 0..1)", text);
}

/* --------------------------------------------------------------------------------------------------------
 * selection */

static int largest_first(const void *a, const void *b) {
    const pick *x = a, *y = b;
    if (x->value != y->value) return x->value < y->value ? 1 : -1;
    if (x->row != y->row) return x->row < y->row ? -1 : 1;
    return x->expert < y->expert ? -1 : x->expert > y->expert;
}

static int by_place(const void *a, const void *b) {
    const pick *x = a, *y = b;
    if (x->row != y->row) return x->row < y->row ? -1 : 1;
    return x->expert < y->expert ? -1 : x->expert > y->expert;
}

static bool selected_layer(const planner *k, int64_t layer) {
    for (int64_t i = 0; i < k->n_layers; i++)
        if (k->layers[i] == layer) return true;
    return false;
}

/* candidates with a number, best first; what the rule keeps; then in order of place */
static exc_status choose(planner *k, const exc_experts *t) {
    const double *value = k->rule == RULE_TOP     ? t->score
                          : k->rule == RULE_RATIO ? t->phase[EXC_PREFILL].log_ratio
                                                  : t->phase[EXC_PREFILL].q;
    if (!value)
        return exc_fail(k->ctx, EXC_ERR_INPUT,
                        "plan: select %s: expected stats with output sums (.out_sum), found none (captured "
                        "with --no-out)",
                        k->opt->select);
    k->picks = exc_alloc(k->ctx, (size_t)(t->moe_layers * t->experts), sizeof *k->picks, "selected experts");
    if (!k->picks) return EXC_ERR_MEMORY;
    for (int64_t m = 0; m < t->moe_layers; m++)
        for (int64_t e = 0; e < t->experts; e++) {
            double x = value[m * t->experts + e];
            bool wanted = isfinite(x) && selected_layer(k, k->stats->layer_of[m]) &&
                          (k->rule != RULE_Q || x <= k->limit);
            if (wanted) k->picks[k->n_picks++] = (pick){m, e, x};
        }
    qsort(k->picks, (size_t)k->n_picks, sizeof *k->picks, largest_first);
    if (k->rule != RULE_Q && (double)k->n_picks > k->limit) k->n_picks = (int64_t)k->limit;
    if (!k->n_picks)
        return exc_fail(k->ctx, EXC_ERR_INPUT, "plan: select %s: expected at least one expert, found none",
                        k->opt->select);
    json_t *list = json_array();
    for (int64_t i = 0; i < k->n_picks; i++)
        json_array_append_new(list, json_pack("{s:I,s:I,s:f}", "layer",
                                              (json_int_t)k->stats->layer_of[k->picks[i].row], "expert",
                                              (json_int_t)k->picks[i].expert,
                                              k->rule == RULE_TOP     ? "score"
                                              : k->rule == RULE_RATIO ? "log_ratio"
                                                                      : "q",
                                              k->picks[i].value));
    json_object_set_new(k->facts, "selected", list);
    qsort(k->picks, (size_t)k->n_picks, sizeof *k->picks, by_place);
    return EXC_OK;
}

static exc_status select_experts(planner *k) {
    exc_experts t;
    if (k->rule == RULE_ALL) return EXC_OK;
    if (!k->stats)
        return exc_fail(k->ctx, EXC_ERR_USAGE, "plan: select %s: expected stats to select by, found none",
                        k->opt->select);
    EXC_TRY(exc_experts_make(k->ctx, k->stats, k->dirs, NULL, &t));
    exc_status st = choose(k, &t);
    exc_experts_free(&t);
    return st;
}

/* -------------------------------------------------------------------------------------------------------------
 * edits */

static json_t *number(double x) {
    return x == floor(x) && fabs(x) < 1e15 ? json_integer((json_int_t)x) : json_real(x);
}

static exc_status put_common(planner *k, json_t *edit) {
    if (k->opt->basis) {
        char *end;
        double row = strtod(k->opt->basis, &end);
        if (end == k->opt->basis || *end || !(row >= 0))
            return usage(k, "basis", "a row number from 0, or a fraction between two", k->opt->basis);
        json_object_set_new(edit, "basis", number(row));
    }
    if (k->opt->norm && strcmp(k->opt->norm, "none") && strcmp(k->opt->norm, "column") &&
        strcmp(k->opt->norm, "row"))
        return usage(k, "norm", "none, column or row", k->opt->norm);
    if (k->opt->norm && strcmp(k->opt->norm, "none"))
        json_object_set_new(edit, "norm", json_string(k->opt->norm));
    json_array_append(k->edits, edit);
    return EXC_OK;
}

static json_t *new_edit(exc_role role) {
    return json_pack("{s:s,s:s}", "op", "project", "role", exc_role_name(role));
}

/* every selected layer that has the role */
static exc_status whole_role(planner *k, exc_role role, int64_t *found) {
    json_t *edit = new_edit(role), *layers = json_array(), *strength = json_array();
    for (int64_t i = 0; i < k->n_layers; i++) {
        if (!has_role(k, role, k->layers[i])) continue;
        json_array_append_new(layers, json_integer(k->layers[i]));
        json_array_append_new(strength, number(k->strength[k->by_layer ? i : 0]));
        ++*found;
    }
    if (k->some_layers || k->by_layer) json_object_set(edit, "layers", layers);
    if (k->by_layer)
        json_object_set(edit, "strength", strength);
    else
        json_object_set_new(edit, "strength", number(k->strength[0]));
    exc_status st = *found ? put_common(k, edit) : EXC_OK;
    json_decref(layers);
    json_decref(strength);
    json_decref(edit);
    return st;
}

static double strength_of(const planner *k, int64_t layer) {
    for (int64_t i = 0; k->by_layer && i < k->n_layers; i++)
        if (k->layers[i] == layer) return k->strength[i];
    return k->strength[0];
}

/* one edit a layer that has selected experts */
static exc_status selected_role(planner *k, exc_role role, int64_t *found) {
    exc_status st = EXC_OK;
    for (int64_t i = 0; i < k->n_picks && st == EXC_OK;) {
        int64_t row = k->picks[i].row, layer = k->stats->layer_of[row];
        json_t *edit = new_edit(role), *experts = json_array();
        for (; i < k->n_picks && k->picks[i].row == row; i++)
            json_array_append_new(experts, json_integer(k->picks[i].expert));
        json_object_set_new(edit, "layers", json_pack("[I]", (json_int_t)layer));
        json_object_set_new(edit, "experts", experts);
        json_object_set_new(edit, "strength", number(strength_of(k, layer)));
        st = put_common(k, edit);
        json_decref(edit);
        ++*found;
    }
    return st;
}

static exc_status one_model(planner *k, exc_role role, int64_t *found) {
    json_t *edit = new_edit(role);
    json_object_set_new(edit, "strength", number(k->strength[0]));
    *found = 1;
    exc_status st = put_common(k, edit);
    json_decref(edit);
    return st;
}

static exc_status one_role(planner *k, exc_role role, bool asked) {
    int64_t found = 0;
    if (!exc_role_by_layer(role))
        EXC_TRY(one_model(k, role, &found));
    else if (k->rule != RULE_ALL && exc_role_by_expert(role))
        EXC_TRY(selected_role(k, role, &found));
    else
        EXC_TRY(whole_role(k, role, &found));
    if (!found && asked)
        return exc_fail(
            k->ctx, EXC_ERR_INPUT,
            "plan: roles: expected roles that the selected layers of this model (%s) have, found %s",
            k->a->family->model_type, exc_role_name(role));
    return EXC_OK;
}

static exc_status asked_roles(planner *k) {
    bool seen[EXC_ROLES] = {false};
    for (const char *p = k->opt->roles, *next; p; p = next) {
        char name[24];
        exc_role role;
        p += strspn(p, " ");
        size_t n = strcspn(p, ",");
        next = p[n] ? p + n + 1 : NULL;
        snprintf(name, sizeof name, "%.*s", n < sizeof name ? (int)n : 0, p);
        if (!exc_role_find(name, &role) || !exc_role_writes(role) || seen[role])
            return exc_fail(k->ctx, EXC_ERR_USAGE,
                            "plan: roles: expected roles that write the residual stream, each once "
                            "(expert_down, shared_down, dense_down, attn_out, embed), found \"%s\"",
                            exc_show(p, n));
        EXC_TRY(one_role(k, role, true));
        seen[role] = true;
    }
    return EXC_OK;
}

static exc_status all_roles(planner *k) {
    for (exc_role role = EXC_ROLE_EXPERT_DOWN; role <= EXC_ROLE_ATTN_OUT; role++)
        EXC_TRY(one_role(k, role, false));
    return EXC_OK;
}

/* ----------------------------------------------------------------------------------------------------------
 * the plan */

static exc_status check_origin(planner *k) {
    if (k->stats && strcmp(k->stats->fingerprint, k->a->fingerprint))
        return exc_fail(k->ctx, EXC_ERR_INPUT,
                        "plan: stats: expected those of %s (fingerprint %s), found those of %s",
                        k->a->files->dir, k->a->fingerprint, k->stats->fingerprint);
    if (!k->dirs->fingerprint[0] || !strcmp(k->dirs->fingerprint, k->a->fingerprint)) return EXC_OK;
    return exc_fail(k->ctx, EXC_ERR_INPUT,
                    "plan: directions: expected those of %s (fingerprint %s), found those of %s",
                    k->a->files->dir, k->a->fingerprint, k->dirs->fingerprint);
}

static exc_status build(planner *k, exc_plan **plan) {
    EXC_TRY(check_origin(k));
    EXC_TRY(read_layers(k));
    EXC_TRY(read_strength(k));
    EXC_TRY(read_select(k));
    EXC_TRY(select_experts(k));
    EXC_TRY(k->opt->roles ? asked_roles(k) : all_roles(k));
    json_t *source =
        json_pack("{s:i,s:{s:s,s:s},s:s,s:O}", "excise_plan", 1, "model", "family", k->a->family->model_type,
                  "fingerprint", k->a->fingerprint, "directions",
                  k->opt->directions ? k->opt->directions : "directions.safetensors", "edits", k->edits);
    if (!source) return exc_fail(k->ctx, EXC_ERR_MEMORY, "plan: no memory");
    exc_rounding rounding;
    exc_status st = !k->opt->round || exc_rounding_find(k->opt->round, &rounding)
                        ? EXC_OK
                        : usage(k, "round", "rn, sr or exact", k->opt->round);
    if (st == EXC_OK && k->opt->round) json_object_set_new(source, "rounding", json_string(k->opt->round));
    if (st == EXC_OK) st = exc_plan_parse(k->ctx, "plan", source, plan);
    json_decref(source);
    EXC_TRY(st);
    return exc_dirs_copy(k->ctx, k->dirs, &(*plan)->dirs);
}

/* the plan must fit the model now, not when it is applied; and what it will edit is told */
static exc_status describe(planner *k, const exc_plan *plan, char **json) {
    exc_compiled *c = NULL;
    EXC_TRY(exc_plan_compile(k->ctx, k->a, plan, &c));
    int64_t edited = 0, experts = 0;
    const exc_tensor *last = NULL; /* experts that share a tensor follow each other */
    for (size_t i = 0; i < k->a->count; i++) {
        if (!exc_compiled_touches(c, &k->a->items[i])) continue;
        edited += k->a->items[i].tensor != last;
        last = k->a->items[i].tensor;
        experts += k->a->items[i].role == EXC_ROLE_EXPERT_DOWN;
    }
    exc_compiled_free(c);
    if (!edited)
        return exc_fail(
            k->ctx, EXC_ERR_INPUT,
            "plan: expected edits that change something, found none (strength 0, or no direction)");
    json_object_set_new(k->facts, "edits", json_integer(plan->n_edits));
    json_object_set_new(k->facts, "select", json_string(k->opt->select ? k->opt->select : "all"));
    json_object_set_new(k->facts, "tensors", json_integer(edited));
    json_object_set_new(k->facts, "experts", json_integer(experts));
    json_object_set_new(k->facts, "experts_present", json_integer(k->s->moe_layers * k->s->experts));
    json_object_set_new(k->facts, "directions", json_string(plan->directions));
    json_object_set(k->facts, "list", k->edits);
    if (!json) return EXC_OK;
    *json = exc_json_text(k->ctx, k->facts);
    return *json ? EXC_OK : EXC_ERR_MEMORY;
}

exc_status exc_plan_make(exc_ctx *ctx, const char *model_dir, const exc_stats *stats, const exc_dirs *dirs,
                         const exc_plan_options *options, exc_plan **plan, char **json) {
    exc_plan_options opt = EXC_PLAN_OPTIONS;
    planner k = {.ctx = ctx, .stats = stats, .dirs = dirs, .opt = &opt};
    exc_atlas *a = NULL;
    if (!ctx || !plan) return EXC_ERR_USAGE;
    exc_clear(ctx);
    *plan = NULL;
    if (json) *json = NULL;
    if (!model_dir || !dirs)
        return exc_fail(ctx, EXC_ERR_USAGE, "plan: expected a model folder and directions");
    if (options) {
        if (options->size < sizeof options->size || options->size > sizeof opt)
            return exc_fail(ctx, EXC_ERR_USAGE, "plan: options.size: expected at most %zu, found %zu",
                            sizeof opt, options->size);
        memcpy(&opt, options, options->size);
    }
    EXC_TRY(exc_atlas_open(ctx, model_dir, &a));
    k.a = a;
    k.s = &a->shape;
    k.edits = json_array();
    k.facts = json_object();
    exc_status st = build(&k, plan);
    if (st == EXC_OK) st = describe(&k, *plan, json);
    if (st != EXC_OK) {
        exc_plan_free(*plan);
        *plan = NULL;
    }
    json_decref(k.edits);
    json_decref(k.facts);
    exc_release(k.layers);
    exc_release(k.strength);
    exc_release(k.picks);
    exc_atlas_close(a);
    return st;
}
