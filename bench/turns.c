/* turns.c - work and its ceiling timed in turns: ceiling, work, ceiling, work, ..
 *
 * A shared machine's memory changes between states within seconds (on one of ours reads of 35 and of 63 GB/s), and a fraction whose
 * numerator is of one state and denominator of the other means nothing. So turns are short, each is set against the mean of
 * the ceiling's samples just before and just after it, turns whose two samples lie further apart than they should are left out
 * and counted, and the loop that is the ceiling is chosen anew, by what is fastest now, before every row. */
#include "bench.h"

#define APART 1.1 /* neighbouring samples of the ceiling that differ by more tell of a change in between */
#define LEAST 3   /* turns that make a row; where fewer are steady all are taken, and the row says so */

void turns_begin(bench *b, turns *t, ceiling against, double slice)
{
    *t = (turns){.against = against, .slice = slice};
    ceilings_choose(b, against);
    t->before = ceilings_rate(b, against, slice);
}

void turns_next(bench *b, turns *t)
{
    double after = ceilings_rate(b, t->against, t->slice), low = after < t->before ? after : t->before, high = after + t->before - low;
    t->steady = high <= APART * low;
    t->rate = (t->before + after) / 2;
    t->before = after;
}

bool series_add(series *s, const turns *t, double seconds, double work)
{
    if (s->kept + s->dropped == TURNS) return false;
    /* steady turns from the front, others from the back */
    int i = t->steady ? s->kept++ : TURNS - ++s->dropped;
    s->seconds[i] = seconds;
    s->rate[i] = t->rate;
    s->fraction[i] = t->rate > 0 ? work / seconds / t->rate : 0;
    return true;
}

static void join(double *x, const series *s)
{
    for (int i = 0; i < s->dropped; i++) x[s->kept + i] = x[TURNS - s->dropped + i];
}

void series_row(series *s, row *r)
{
    r->rounds = s->kept;
    r->dropped = s->dropped;
    int n = s->kept;
    if (n < LEAST) {
        join(s->seconds, s);
        join(s->rate, s);
        join(s->fraction, s);
        n += s->dropped;
        r->unsteady = true;
    }
    r->seconds = bench_median(s->seconds, n);
    r->ceiling_rate = bench_median(s->rate, n);
    r->fraction = bench_median(s->fraction, n);
    r->fraction_low = s->fraction[0];
    r->fraction_high = s->fraction[n - 1];
}

static double timed(bench *b, work_fn fn, void *arg, int repeat)
{
    double start = exc_seconds();
    for (int i = 0; i < repeat; i++) fn(b, arg);
    return (exc_seconds() - start) / repeat;
}

/* Turns until enough of them are steady, three times as many at most. */
void bench_measure(bench *b, row *r, work_fn fn, void *arg)
{
    double first = timed(b, fn, arg, 1), slice = 0.01;
    int wanted = b->quick ? 3 : first > 0.5 ? 7 : first > 0.1 ? 11 : 21, repeat = first < slice ? (int)(slice / first) + 1 : 1;
    turns t;
    series s = {0};
    turns_begin(b, &t, r->against, first > 0.1 ? 0.03 : slice);
    while (s.kept < wanted && s.kept + s.dropped < 3 * wanted) {
        double seconds = timed(b, fn, arg, repeat);
        turns_next(b, &t);
        if (!series_add(&s, &t, seconds, r->work)) break;
    }
    series_row(&s, r);
    if (r->per_call > 0) r->value = r->per_call / r->seconds;
    else if (!r->unit) {
        r->value = r->work / r->seconds / 1e9;
        r->unit = r->against >= CEIL_BF16 ? "GFLOP/s" : "GB/s";
    } else if (r->value == 0) r->value = r->seconds;
    bench_emit(b, r);
}
