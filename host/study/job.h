/* job.h - a job file, read and checked: what job.c fills and steps.c works through. Options structs are those
 * of excise.h, so that a job and the verbs cannot drift apart. */
#ifndef EXC_JOB_H
#define EXC_JOB_H

#include "result.h"

typedef struct exc_job {
    json_t *source;   /* the object as typed: shown in reports, paths as the user wrote them */
    const char *path; /* of the job file */
    char *base;       /* its folder, "" for the current one: relative paths start here */
    char *model, *out, *target, *baseline;
    exc_prompt_options prompts;
    exc_compute compute;
    exc_capture_options capture;
    exc_directions_options directions;
    const char *method;
    exc_contrast_options contrast;
    exc_plan_options plan;
    exc_apply_options apply;
    exc_evaluate_options evaluate;
    bool evaluates;
    char *owned[16];
    int n_owned; /* texts the options point at */
} exc_job;

exc_status exc_job_read(exc_ctx *ctx, const char *path, exc_job *job);
void exc_job_free(exc_job *job);
/* the steps of a job (steps.c) in its locked folder; *report gets the content of report.json */
exc_status exc_job_steps(exc_ctx *ctx, const exc_job *job, exc_ledger *ledger, json_t **summary);

#endif
