/* From shape, strides and caches to tiles. */
#include "plan.h"
#include "machine.h"

#include <stddef.h>

enum {
    PLANE_TILE = 16384,  /* elements of a tile by planes, a multiple of every kernel's line */
    ROW_TILE = 65536,    /* elements of a tile by columns, */
    LEAST_ROWS = 128,    /* but no fewer rows than this */
    NARROW_ROW = 64,     /* rows of other lengths than multiples of this are joined to one that is, */
    JOINED_ROW = 512,    /* or to about this many columns */
    SMALL_PLANE = 256,   /* planes shorter than this are walked by columns, */
    FEW_SAMPLES = 4,     /* unless there are fewer samples than this */
    MOST_COLUMNS = 4096, /* columns of a group, so that a row's part is a long run of memory */
    LEAST_COLUMNS = 1024,
    ONE_THREAD = 32768 /* elements below which a second thread costs more than it brings */
};

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static int64_t parts(int64_t whole, int64_t part) {
    return (whole + part - 1) / part;
}
static int64_t aligned(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

/* Whether, for every tensor of the job, one step along `a` is `times` steps along `b`. */
typedef int64_t stride_of(const fbn_tensor *tensor);
static int64_t n_of(const fbn_tensor *t) {
    return t->n;
}
static int64_t c_of(const fbn_tensor *t) {
    return t->c;
}
static int64_t s_of(const fbn_tensor *t) {
    return t->s;
}
static int64_t one_of(const fbn_tensor *t) {
    (void)t;
    return 1;
}
static int steps(const fbn_job *job, stride_of *a, int64_t times, stride_of *b) {
    const fbn_tensor *const tensors[] = {&job->x, &job->out, &job->dy, &job->residual, &job->dresidual};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        if (tensors[i]->data != NULL && a(tensors[i]) != times * b(tensors[i]))
            return 0;
    return 1;
}

static void plan_planes(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    plan->layout = FBN_NCS;
    plan->span = job->S;
    plan->tile_rows = larger(1, PLANE_TILE / larger(1, job->S));
    plan->tile_cols = smaller(job->S, PLANE_TILE);
    plan->tiles = job->S <= PLANE_TILE ? parts(job->N, plan->tile_rows) : job->N * parts(job->S, PLANE_TILE);
    plan->group = plan->threads > 1 ? smaller(larger(1, PLANE_TILE / larger(1, job->N * job->S)), job->C) : 1;
    if (plan->map_only && job->S <= PLANE_TILE)
        plan->sample_group = smaller(PLANE_TILE / larger(1, job->S), job->C);
    plan->groups = parts(job->C, plan->group);
    plan->fused = plan->threads == 1 || plan->groups >= 4 * plan->threads;
}

/* `samples` is how many rows of C * span elements there are. */
static void plan_columns(fbn_plan *plan, int64_t outer, int64_t samples, int64_t span, int contiguous) {
    const fbn_job *job = plan->job;
    const int64_t row = job->C * span;
    plan->layout = FBN_NSC;
    plan->span = span;
    plan->outer = outer;
    plan->K = 1;
    if (contiguous && row < NARROW_ROW) {
        while (plan->K * row % NARROW_ROW && (plan->K + 1) * row <= JOINED_ROW)
            plan->K++;
        plan->K = larger(1, smaller(plan->K, samples / FBN_BLOCK));
    }
    plan->joined = contiguous ? larger(1, JOINED_ROW / (plan->K * row)) : 1;
    plan->rows = samples / plan->K;
    plan->rest = samples % plan->K * row;
    plan->tile_rows = larger(LEAST_ROWS, ROW_TILE / (plan->K * row) / FBN_BLOCK * FBN_BLOCK);
    plan->tiles = outer * parts(plan->rows, plan->tile_rows) + (plan->rest > 0);
    if (row * plan->K <= JOINED_ROW) {
        plan->group = job->C;
        plan->groups = 1;
    } else {
        const int64_t column = outer * samples * plan->bytes * (job->dy.data ? 2 : 1), budget = fbn_core_cache() / 2;
        const int64_t most = larger(1, MOST_COLUMNS / span), least = parts(LEAST_COLUMNS, span);
        plan->group = smaller(most, budget / larger(1, column * span));
        plan->fused = plan->group >= least && !plan->map_only && span == 1;
        if (!plan->fused)
            plan->group = most;
        if (plan->fused && plan->threads > 1)
            plan->group = smaller(plan->group, larger(least, parts(job->C, 2 * plan->threads)));
        if (plan->group > least)
            plan->group -= plan->group % least;
        plan->group = smaller(plan->group, job->C);
        plan->groups = parts(job->C, plan->group);
        if (plan->groups < plan->threads)
            plan->fused = 0;
    }
    plan->tile_cols = plan->K * plan->group * span;
}

int64_t fbn_plan_job(fbn_plan *plan, const fbn_job *job, void *work) {
    *plan = (fbn_plan){.job = job, .table = fbn_table()};
    const int64_t elements = job->N * job->C * job->S;
    plan->bytes = job->dtype == FBN_FLOAT64 ? 8 : job->dtype == FBN_FLOAT32 ? 4 : 2;
    plan->constant_bytes = job->dtype == FBN_FLOAT64 ? 8 : 4;
    plan->threads = elements < ONE_THREAD ? 1 : job->threads;
    const int in_place = job->out.data == job->x.data || job->out.data == job->dy.data || job->out.data == job->residual.data;
    plan->stream = !in_place && elements * plan->bytes > fbn_last_cache() / 2;

    plan->map_only = job->out.data != NULL &&
                     (job->dy.data ? job->frozen && job->dweight.data == NULL && job->dbias.data == NULL : job->batch_mean == NULL);

    /* Without values there is nothing to cut. */
    const int channels_last = elements > 0 && steps(job, c_of, 1, one_of) && (job->S == 1 || !steps(job, s_of, 1, one_of));
    if (channels_last && job->S == 1)
        plan_columns(plan, 1, job->N, 1, steps(job, n_of, job->C, one_of));
    else if (channels_last && steps(job, n_of, job->S, s_of))
        plan_columns(plan, 1, job->N * job->S, 1, steps(job, s_of, job->C, one_of));
    else if (channels_last)
        plan_columns(plan, job->N, job->S, 1, 0);
    else if (elements > 0 && !plan->map_only && job->S < SMALL_PLANE && job->N >= FEW_SAMPLES && steps(job, c_of, job->S, one_of)) {
        plan_columns(plan, 1, job->N, job->S, steps(job, n_of, job->C * job->S, one_of));
        plan->sample_group = smaller(larger(1, PLANE_TILE / job->S), job->C);
    } else
        plan_planes(plan);

    /* Integers, because there may be no memory yet. */
    uintptr_t next = (uintptr_t)work;
    plan->sums = (double *)next;
    next += (uintptr_t)aligned(plan->tiles * job->C * 2 * 8);
    for (int i = 0; i < 5; i++) {
        plan->constants[i] = (char *)next;
        next += (uintptr_t)aligned(job->C * plan->constant_bytes);
    }
    plan->slots = (char *)next;
    plan->slot_bytes = aligned(plan->tile_cols * (2 * 8 + larger(1, plan->joined) * 5 * plan->constant_bytes));
    return (int64_t)(next - (uintptr_t)work) + plan->threads * plan->slot_bytes;
}
