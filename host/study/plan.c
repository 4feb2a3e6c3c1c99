/* plan.c - the plan as a file: a readable list of edits,
 * {"excise_plan":1,"model":{..},"directions":FILE,"edits":[..]}, read strictly, kept as it was read, and
 * written back unchanged.
 *
 * Strict means: a key, op or role that is not known, a key that its op would ignore, a list of the wrong
 * length or a number out of range is refused by name. An edit that silently does less than its author meant
 * is worse than none, because the result still looks like a model. What depends on the model (layers,
 * experts, rows) is checked by compiled.c when the plan meets one. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "edits.h"

#define FORMAT 1
#define MAX_NUMBERS 65536 /* layers or experts of one list; keeps "0-999999999" from asking for memory */

static const char *const op_name[] = {"project", "project_input", "router_project", "scale",
                                      "mask",    "router_scale",  "router_bias"};
static const char *const norm_name[] = {"none", "column", "row"};

static const char *shown(const json_t *v) {
    static _Thread_local char text[160];
    char *t = v ? json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    snprintf(text, sizeof text, "%.150s", t ? exc_show(t, strlen(t)) : "nothing");
    free(t);
    return text;
}

static exc_status wrong(exc_ctx *ctx, const char *what, const char *key, const char *expected,
                        const json_t *v) {
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected %s, found %s", what, key, expected, shown(v));
}

/* the value of a key; null is as good as absent */
static const json_t *present(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    return json_is_null(v) ? NULL : v;
}

/* ------------------------------------------------------------------------------------------------ lists of
 * numbers */

typedef struct list {
    int64_t *v, n, cap;
} list;

static exc_status push(exc_ctx *ctx, const char *what, const char *key, list *l, int64_t x) {
    if (l->n == MAX_NUMBERS)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected at most %d numbers, found more", what, key,
                        MAX_NUMBERS);
    if (l->n == l->cap) {
        int64_t cap = l->cap ? 2 * l->cap : 64, *v = exc_alloc(ctx, (size_t)cap, sizeof *v, key);
        if (!v) return EXC_ERR_MEMORY;
        if (l->n) memcpy(v, l->v, (size_t)l->n * sizeof *v);
        exc_release(l->v);
        l->v = v;
        l->cap = cap;
    }
    l->v[l->n++] = x;
    return EXC_OK;
}

static bool digits(const char **p, int64_t *out) {
    char *end;
    if (**p < '0' || **p > '9') return false;
    *out = strtoll(*p, &end, 10);
    if (end - *p > 9) return false;
    *p = end;
    return true;
}

/* "3", "4-40", with commas between several; blanks are fine */
static exc_status push_text(exc_ctx *ctx, const char *what, const char *key, list *l, const char *text) {
    const char *p = text + strspn(text, " ");
    int64_t a, b;
    for (;;) {
        if (!digits(&p, &a)) break;
        b = a;
        if (*p == '-' && (p++, !digits(&p, &b))) break;
        if (b < a) break;
        for (int64_t x = a; x <= b; x++) EXC_TRY(push(ctx, what, key, l, x));
        p += strspn(p, " ");
        if (!*p) return EXC_OK;
        if (*p++ != ',') break;
        p += strspn(p, " ");
    }
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected numbers and ranges such as 4-40, found \"%s\"",
                    what, key, exc_show(text, strlen(text)));
}

static int ascending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static exc_status check_list(exc_ctx *ctx, const char *what, const char *key, const list *l) {
    if (!l->n)
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected at least one number, found none", what, key);
    int64_t *sorted = exc_alloc(ctx, (size_t)l->n, sizeof *sorted, key), twice = -1;
    if (!sorted) return EXC_ERR_MEMORY;
    memcpy(sorted, l->v, (size_t)l->n * sizeof *sorted);
    qsort(sorted, (size_t)l->n, sizeof *sorted, ascending);
    for (int64_t i = 1; i < l->n; i++)
        if (sorted[i] == sorted[i - 1]) twice = sorted[i];
    exc_release(sorted);
    if (twice < 0) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected each number once, found %lld twice", what, key,
                    (long long)twice);
}

static exc_status give_list(exc_ctx *ctx, const char *what, const char *key, exc_status st, list *l,
                            int64_t **out, int64_t *n) {
    if (st == EXC_OK) st = check_list(ctx, what, key, l);
    if (st != EXC_OK) {
        exc_release(l->v);
        return st;
    }
    *out = l->v;
    *n = l->n;
    return EXC_OK;
}

exc_status exc_numbers(exc_ctx *ctx, const char *what, const char *key, const json_t *v, int64_t **out,
                       int64_t *n) {
    list l = {0};
    exc_status st = EXC_OK;
    if (!json_is_array(v)) return wrong(ctx, what, key, "a list of numbers and ranges such as \"4-40\"", v);
    for (size_t i = 0; i < json_array_size(v) && st == EXC_OK; i++) {
        const json_t *e = json_array_get(v, i);
        if (json_is_integer(e) && json_integer_value(e) >= 0)
            st = push(ctx, what, key, &l, json_integer_value(e));
        else if (json_is_string(e))
            st = push_text(ctx, what, key, &l, json_string_value(e));
        else
            st = wrong(ctx, what, key, "numbers from 0 and ranges such as \"4-40\"", e);
    }
    return give_list(ctx, what, key, st, &l, out, n);
}

exc_status exc_numbers_text(exc_ctx *ctx, const char *what, const char *key, const char *text, int64_t **out,
                            int64_t *n) {
    list l = {0};
    return give_list(ctx, what, key, push_text(ctx, what, key, &l, text), &l, out, n);
}

/* a list of finite reals */
static exc_status reals(exc_ctx *ctx, const char *what, const char *key, const json_t *v, double **out,
                        int64_t *n) {
    size_t count = json_array_size(v);
    if (!count) return wrong(ctx, what, key, "a list of numbers", v);
    double *x = exc_alloc(ctx, count, sizeof *x, key);
    if (!x) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < count; i++) {
        const json_t *e = json_array_get(v, i);
        x[i] = json_number_value(e);
        if (!json_is_number(e) || !isfinite(x[i]) || fabs(x[i]) > 1e30) {
            exc_release(x);
            return wrong(ctx, what, key, "numbers", e);
        }
    }
    *out = x;
    *n = (int64_t)count;
    return EXC_OK;
}

/* ------------------------------------------------------------------------------------------------------- one
 * edit */

static int find_name(const char *const *names, int n, const char *name) {
    for (int i = 0; i < n; i++)
        if (!strcmp(names[i], name)) return i;
    return -1;
}

static bool is_router_op(exc_edit_op op) {
    return op == EXC_EDIT_ROUTER_PROJECT || op == EXC_EDIT_ROUTER_SCALE || op == EXC_EDIT_ROUTER_BIAS;
}

static bool projects(exc_edit_op op) {
    return op == EXC_EDIT_PROJECT || op == EXC_EDIT_PROJECT_INPUT || op == EXC_EDIT_ROUTER_PROJECT;
}

static exc_status read_op(exc_ctx *ctx, const char *what, const json_t *o, exc_edit *e) {
    const json_t *v = present(o, "op");
    int op = json_is_string(v) ? find_name(op_name, (int)EXC_COUNT(op_name), json_string_value(v)) : -1;
    if (op < 0)
        return wrong(ctx, what, "op",
                     "project, project_input, router_project, scale, mask, router_scale or router_bias", v);
    e->op = (exc_edit_op)op;
    return EXC_OK;
}

static exc_status read_role(exc_ctx *ctx, const char *what, const json_t *o, exc_edit *e) {
    const json_t *v = present(o, "role");
    bool known = false;
    if (!v && is_router_op(e->op)) {
        e->role = EXC_ROLE_ROUTER;
        return EXC_OK;
    }
    if (json_is_string(v)) known = exc_role_find(json_string_value(v), &e->role) && exc_role_planned(e->role);
    if (!known)
        return wrong(ctx, what, "role",
                     "expert_down, expert_gate, expert_up, shared_down, dense_down, attn_out, router, embed "
                     "or lm_head",
                     v);
    const char *rule = NULL;
    if (is_router_op(e->op) && e->role != EXC_ROLE_ROUTER)
        rule = "the role router";
    else if (e->op == EXC_EDIT_PROJECT && !exc_role_writes(e->role))
        rule =
            "a role that writes the residual stream (expert_down, shared_down, dense_down, attn_out, embed)";
    else if (e->op == EXC_EDIT_PROJECT_INPUT && !exc_role_reads(e->role))
        rule = "a role that reads the residual stream (expert_gate, expert_up, router, lm_head)";
    if (!rule) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: role: %s expected %s, found %s", what, op_name[e->op], rule,
                    exc_role_name(e->role));
}

static exc_status read_strength(exc_ctx *ctx, const char *what, const json_t *o, exc_edit *e) {
    const json_t *v = present(o, "strength");
    e->by_layer = json_is_array(v);
    if (e->by_layer) {
        EXC_TRY(reals(ctx, what, "strength", v, &e->strength, &e->n_strength));
        if (!e->n_layers || e->n_strength == e->n_layers) return EXC_OK;
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: strength: expected one number or as many as layers (%lld), found %lld", what,
                        (long long)e->n_layers, (long long)e->n_strength);
    }
    if (v && !(json_is_number(v) && isfinite(json_number_value(v)) && fabs(json_number_value(v)) <= 1e30))
        return wrong(ctx, what, "strength", "a number or a list of numbers", v);
    if (!v && (e->op == EXC_EDIT_SCALE || e->op == EXC_EDIT_ROUTER_SCALE))
        return wrong(ctx, what, "strength", "the factor", NULL);
    e->strength = exc_alloc(ctx, 1, sizeof *e->strength, "strength");
    if (!e->strength) return EXC_ERR_MEMORY;
    e->n_strength = 1;
    e->strength[0] = v ? json_number_value(v) : 1;
    return EXC_OK;
}

static exc_status read_basis(exc_ctx *ctx, const char *what, const json_t *o, exc_edit *e) {
    const json_t *v = present(o, "basis"), *norm = present(o, "norm");
    e->norm = EXC_NORM_NONE;
    if (norm) {
        int i = json_is_string(norm)
                    ? find_name(norm_name, (int)EXC_COUNT(norm_name), json_string_value(norm))
                    : -1;
        if (i < 0) return wrong(ctx, what, "norm", "\"none\", \"column\" or \"row\"", norm);
        e->norm = (exc_norm_restore)i;
    }
    if (!v) return EXC_OK;
    if (!json_is_number(v) || !(json_number_value(v) >= 0))
        return wrong(ctx, what, "basis", "a row number from 0, or a fraction between two", v);
    e->has_basis = 1;
    e->basis = json_number_value(v);
    return EXC_OK;
}

/* keys that this op would ignore */
static exc_status refuse_idle(exc_ctx *ctx, const char *what, const json_t *o, const exc_edit *e) {
    const json_t *strength = present(o, "strength");
    const char *idle = NULL;
    if (e->op != EXC_EDIT_ROUTER_BIAS && present(o, "values")) idle = "values";
    if (!projects(e->op) && present(o, "basis")) idle = "basis";
    if (!projects(e->op) && e->norm != EXC_NORM_NONE) idle = "norm";
    if (e->op == EXC_EDIT_ROUTER_BIAS && strength) idle = "strength";
    if (e->op == EXC_EDIT_MASK && strength && (json_is_array(strength) || json_number_value(strength) != 1))
        idle = "strength";
    if (!idle) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: %s: expected no such key for %s, found %s", what, idle,
                    op_name[e->op], shown(json_object_get(o, idle)));
}

static exc_status read_values(exc_ctx *ctx, const char *what, const json_t *o, exc_edit *e) {
    const json_t *v = present(o, "values");
    if (e->op != EXC_EDIT_ROUTER_BIAS) return EXC_OK;
    if (!json_is_array(v)) return wrong(ctx, what, "values", "a list with a number for each expert", v);
    EXC_TRY(reals(ctx, what, "values", v, &e->values, &e->n_values));
    if (!e->n_experts || e->n_values == e->n_experts) return EXC_OK;
    return exc_fail(ctx, EXC_ERR_INPUT, "%s: values: expected as many numbers as experts (%lld), found %lld",
                    what, (long long)e->n_experts, (long long)e->n_values);
}

static exc_status read_edit(exc_ctx *ctx, const char *what, const json_t *o, exc_edit *e) {
    static const char *const keys[] = {"op",    "role", "layers", "experts", "strength",
                                       "basis", "norm", "values", NULL};
    if (!json_is_object(o))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected an object, found %s", what, shown(o));
    EXC_TRY(exc_json_keys(ctx, o, what, keys));
    EXC_TRY(read_op(ctx, what, o, e));
    EXC_TRY(read_role(ctx, what, o, e));
    const json_t *layers = present(o, "layers"), *experts = present(o, "experts");
    if (layers) EXC_TRY(exc_numbers(ctx, what, "layers", layers, &e->layers, &e->n_layers));
    if (experts) EXC_TRY(exc_numbers(ctx, what, "experts", experts, &e->experts, &e->n_experts));
    EXC_TRY(read_basis(ctx, what, o, e));
    EXC_TRY(refuse_idle(ctx, what, o, e));
    EXC_TRY(read_strength(ctx, what, o, e));
    return read_values(ctx, what, o, e);
}

/* ------------------------------------------------------------------------------------------------------- the
 * plan */

static exc_status read_model(exc_ctx *ctx, const char *what, const json_t *model, exc_plan *p) {
    static const char *const keys[] = {"fingerprint", "family", "name", NULL};
    char where[300];
    const char *text;
    if (!model) return EXC_OK;
    snprintf(where, sizeof where, "%.280s: model", what);
    if (!json_is_object(model)) return wrong(ctx, what, "model", "an object", model);
    EXC_TRY(exc_json_keys(ctx, model, where, keys));
    EXC_TRY(exc_json_string_or(ctx, model, where, "fingerprint", "", &text));
    if (*text && (strlen(text) != 32 || strspn(text, "0123456789abcdef") != 32))
        return wrong(ctx, where, "fingerprint", "32 hex digits", json_object_get(model, "fingerprint"));
    memcpy(p->fingerprint, text, strlen(text) + 1);
    return EXC_OK;
}

static const char *const rounding_names[] = {"rn", "sr", "exact"};

const char *exc_rounding_name(exc_rounding r) { return rounding_names[r]; }

bool exc_rounding_find(const char *name, exc_rounding *out) {
    for (int i = 0; i < 3; i++)
        if (!strcmp(name, rounding_names[i])) {
            *out = (exc_rounding)i;
            return true;
        }
    return false;
}

static exc_status read_rounding(exc_ctx *ctx, const char *what, const json_t *o, exc_plan *p) {
    const char *name;
    EXC_TRY(exc_json_string_or(ctx, o, what, "rounding", NULL, &name));
    p->has_rounding = name != NULL;
    if (!name || exc_rounding_find(name, &p->rounding)) return EXC_OK;
    return wrong(ctx, what, "rounding", "\"rn\", \"sr\" or \"exact\"", json_object_get(o, "rounding"));
}

static exc_status read_plan(exc_ctx *ctx, const char *what, exc_plan *p) {
    static const char *const keys[] = {"excise_plan", "model", "directions", "rounding", "edits", NULL};
    const json_t *o = p->source, *edits;
    const char *directions;
    int64_t format;
    if (!json_is_object(o))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: expected a plan (an object), found %s", what, shown(o));
    EXC_TRY(exc_json_keys(ctx, o, what, keys));
    EXC_TRY(exc_json_int(ctx, o, what, "excise_plan", FORMAT, FORMAT, &format));
    EXC_TRY(read_model(ctx, what, present(o, "model"), p));
    EXC_TRY(exc_json_string_or(ctx, o, what, "directions", NULL, &directions));
    if (directions && !(p->directions = exc_strdup(ctx, directions))) return EXC_ERR_MEMORY;
    EXC_TRY(read_rounding(ctx, what, o, p));
    edits = json_object_get(o, "edits");
    if (!json_is_array(edits)) return wrong(ctx, what, "edits", "a list of edits", edits);
    if (!json_array_size(edits))
        return exc_fail(ctx, EXC_ERR_INPUT, "%s: edits: expected at least one edit, found none", what);
    p->edits = exc_zalloc(ctx, json_array_size(edits), sizeof *p->edits, "edits");
    if (!p->edits) return EXC_ERR_MEMORY;
    for (size_t i = 0; i < json_array_size(edits); i++) {
        char where[300];
        snprintf(where, sizeof where, "%.260s: edits[%zu]", what, i);
        p->n_edits++;
        EXC_TRY(read_edit(ctx, where, json_array_get(edits, i), &p->edits[i]));
    }
    return EXC_OK;
}

exc_status exc_plan_parse(exc_ctx *ctx, const char *what, const json_t *source, exc_plan **out) {
    *out = NULL;
    exc_plan *p = exc_zalloc(ctx, 1, sizeof *p, "plan");
    if (!p) return EXC_ERR_MEMORY;
    p->source = json_incref((json_t *)(uintptr_t)source);
    exc_status st = read_plan(ctx, what, p);
    if (st == EXC_OK)
        *out = p;
    else
        exc_plan_free(p);
    return st;
}

void exc_plan_free(exc_plan *p) {
    if (!p) return;
    for (int64_t i = 0; i < p->n_edits; i++) {
        exc_release(p->edits[i].layers);
        exc_release(p->edits[i].experts);
        exc_release(p->edits[i].strength);
        exc_release(p->edits[i].values);
    }
    exc_release(p->edits);
    exc_release(p->directions);
    exc_release(p->path);
    exc_dirs_free(p->dirs);
    json_decref(p->source);
    exc_release(p);
}

/* ----------------------------------------------------------------------------------------------------------
 * files */

/* the directions file lies where the plan says, seen from the plan */
static exc_status load_dirs(exc_ctx *ctx, exc_plan *p) {
    bool needed = false;
    for (int64_t i = 0; i < p->n_edits; i++) needed = needed || projects(p->edits[i].op);
    if (!needed) return EXC_OK;
    if (!p->directions)
        return exc_fail(ctx, EXC_ERR_INPUT,
                        "%s: directions: expected a file for the edits that project, found none", p->path);
    const char *slash = strrchr(p->path, '/');
    char *folder = NULL, *path = NULL;
    exc_status st = EXC_OK;
    if (p->directions[0] == '/' || !slash)
        path = exc_strdup(ctx, p->directions);
    else {
        folder = exc_strdup(ctx, p->path);
        if (folder) folder[slash - p->path + (slash == p->path)] = 0;
        if (folder) st = exc_path_join(ctx, folder, p->directions, &path);
    }
    if (!path && st == EXC_OK) st = EXC_ERR_MEMORY;
    if (st == EXC_OK) st = exc_dirs_load(ctx, path, &p->dirs);
    exc_release(folder);
    exc_release(path);
    return st;
}

exc_status exc_plan_load(exc_ctx *ctx, const char *path, exc_plan **plan) {
    json_t *source = NULL;
    if (!ctx || !plan) return EXC_ERR_USAGE;
    exc_clear(ctx);
    *plan = NULL;
    if (!path) return exc_fail(ctx, EXC_ERR_USAGE, "plan: no file given");
    EXC_TRY(exc_json_load(ctx, path, 0, &source));
    exc_plan *p = NULL;
    exc_status st = exc_plan_parse(ctx, path, source, &p);
    json_decref(source);
    EXC_TRY(st);
    p->path = exc_strdup(ctx, path);
    st = p->path ? load_dirs(ctx, p) : EXC_ERR_MEMORY;
    if (st == EXC_OK)
        *plan = p;
    else
        exc_plan_free(p);
    return st;
}

/* one edit a line: the form a person edits */
exc_status exc_plan_text(exc_ctx *ctx, const json_t *source, exc_buf *b) {
    const char *key;
    json_t *v;
    bool first = true;
    exc_buf_puts(b, "{");
    json_object_foreach((json_t *)(uintptr_t)source, key, v) {
        char *text;
        exc_buf_printf(b, "%s\n  \"%s\": ", first ? "" : ",", key);
        first = false;
        if (!strcmp(key, "edits")) {
            for (size_t i = 0; i < json_array_size(v); i++) {
                text = json_dumps(json_array_get(v, i), JSON_ENCODE_ANY | JSON_REAL_PRECISION(17));
                if (!text) b->failed = true;
                exc_buf_printf(b, "%s\n    %s", i ? "," : "[", text ? text : "");
                free(text);
            }
            exc_buf_puts(b, "\n  ]");
            continue;
        }
        text = json_dumps(v, JSON_ENCODE_ANY | JSON_REAL_PRECISION(17));
        if (!text) b->failed = true;
        exc_buf_puts(b, text ? text : "");
        free(text);
    }
    exc_buf_puts(b, "\n}\n");
    return b->failed ? exc_fail(ctx, EXC_ERR_MEMORY, "no memory for the text of a plan") : EXC_OK;
}

exc_status exc_plan_save(exc_ctx *ctx, const exc_plan *plan, const char *path, int force) {
    exc_buf b = {0};
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (!plan || !path) return exc_fail(ctx, EXC_ERR_USAGE, "plan: expected a plan and a path");
    exc_status st = exc_plan_text(ctx, plan->source, &b);
    if (st == EXC_OK) st = exc_write_file(ctx, path, b.data, b.len, force != 0);
    exc_buf_free(&b);
    return st;
}

exc_status exc_plan_json(exc_ctx *ctx, const exc_plan *plan, char **json) {
    if (!ctx) return EXC_ERR_USAGE;
    exc_clear(ctx);
    if (!plan || !json) return exc_fail(ctx, EXC_ERR_USAGE, "plan: expected a plan and a place for its text");
    *json = exc_json_text(ctx, plan->source);
    return *json ? EXC_OK : EXC_ERR_MEMORY;
}

/* ------------------------------------------------------------------------------------------------------
 * directions */

static exc_status copy_floats(exc_ctx *ctx, const float *from, int64_t n, float **to) {
    if (!from) return EXC_OK;
    if (!(*to = exc_alloc(ctx, (size_t)n, sizeof **to, "directions"))) return EXC_ERR_MEMORY;
    memcpy(*to, from, (size_t)n * sizeof **to);
    return EXC_OK;
}

static exc_status copy_arrays(exc_ctx *ctx, const exc_dirs *from, exc_dirs *d) {
    EXC_TRY(copy_floats(ctx, from->basis, d->rows * d->rank * d->hidden, &d->basis));
    EXC_TRY(copy_floats(ctx, from->singular, d->rows * d->rank, &d->singular));
    EXC_TRY(copy_floats(ctx, from->mean_difference, d->rows * d->hidden, &d->mean_difference));
    EXC_TRY(copy_floats(ctx, from->expert_basis, d->moe_layers * d->experts * d->rank * d->hidden,
                        &d->expert_basis));
    if (from->options && !(d->options = exc_strdup(ctx, from->options))) return EXC_ERR_MEMORY;
    return EXC_OK;
}

exc_status exc_dirs_copy(exc_ctx *ctx, const exc_dirs *from, exc_dirs **out) {
    exc_dirs *d = exc_zalloc(ctx, 1, sizeof *d, "directions");
    if (!d) return EXC_ERR_MEMORY;
    *d = *from;
    d->basis = d->singular = d->mean_difference = d->expert_basis = NULL;
    d->options = NULL;
    exc_status st = copy_arrays(ctx, from, d);
    if (st == EXC_OK)
        *out = d;
    else
        exc_dirs_free(d);
    return st;
}
