/* From shape, strides and caches to tiles. */
#include "plan.h"
#include "machine.h"

#include <stddef.h>

enum {
    ROW_TILE = 65536,    /* elements of a tile by columns, */
    LEAST_ROWS = 128,    /* but no fewer rows than this */
    JOINED_ROW = 512,    /* samples shorter than this are joined to rows of about as many columns, */
    LONG_ROW = 2048,     /* or of so many where a tensor has at least */
    LARGE = 1 << 21,     /* so many elements: memory gives most when it is read in few long runs */
    SMALL_PLANE = 512,   /* planes shorter than this are reduced by columns, and not mapped beside a reduction, */
    FEW_SAMPLES = 16,    /* unless there are fewer samples than this */
    LEAST_PLANE = 16,    /* planes shorter than this are mapped by columns */
    MOST_COLUMNS = 4096, /* columns of a group of a reduction */
    LONG_RUN = 2048,     /* elements of neighbouring planes in a row that are worth an incomplete line at its ends */
    FIRST_CACHE = 16384, /* elements that stay in the first cache from a reduction to its map */
    CHUNK = 65536,       /* elements of a map's task */
    ONE_THREAD = 32768   /* elements below which a second thread costs more than it brings */
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

static void reduce_planes(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    const int64_t channel = job->N * job->S, in_core = fbn_core_cache() / 2 / (channel * plan->bytes * (job->dy.data ? 2 : 1));
    plan->reduction = FBN_NCS;
    plan->tile_rows = larger(1, FBN_PLANE_TILE / job->S);
    plan->tiles = job->S <= FBN_PLANE_TILE ? parts(job->N, plan->tile_rows) : job->N * parts(job->S, FBN_PLANE_TILE);
    /* A short plane is better mapped in one run of memory with its neighbours. */
    plan->beside = job->S >= SMALL_PLANE && in_core >= 2 && job->out.data != NULL && !job->frozen;
    plan->group = FIRST_CACHE / channel;
    if (!plan->beside)
        plan->group = smaller(larger(parts(LONG_RUN, job->S), plan->group), in_core);
    if (plan->threads > 1)
        plan->group = larger(plan->group, FBN_PLANE_TILE / channel);
    plan->group = smaller(larger(1, plan->group), job->C);
    plan->groups = parts(job->C, plan->group);
    plan->fused = plan->threads == 1 || plan->groups >= 4 * plan->threads;
    plan->stride = plan->threads > 1 ? plan->group * larger(1, plan->groups / (4 * plan->threads)) : job->C;
}

static void reduce_columns(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    const int64_t sample = job->C * plan->span;
    plan->reduction = FBN_NSC;
    plan->K = 1;
    if (plan->contiguous)
        plan->K = larger(1, smaller((plan->samples * sample < LARGE ? JOINED_ROW : LONG_ROW) / sample, plan->samples / FBN_BLOCK));
    plan->rows = plan->samples / plan->K;
    plan->rest = plan->samples % plan->K;
    plan->tile_rows = larger(LEAST_ROWS, ROW_TILE / (plan->K * sample) / FBN_BLOCK * FBN_BLOCK);
    plan->tiles = plan->outer * parts(plan->rows, plan->tile_rows) + (plan->rest > 0);
    plan->group = job->C;
    if (plan->K == 1) {
        plan->group = smaller(job->C, larger(1, MOST_COLUMNS / plan->span));
        if (plan->threads > 1)
            plan->group = smaller(plan->group, larger(parts(JOINED_ROW, plan->span), parts(job->C, parts(2 * plan->threads, plan->tiles))));
    }
    plan->groups = parts(job->C, plan->group);
    plan->slot_columns = plan->K * plan->span > 1 ? plan->K * plan->group * plan->span : 0;
}

static void cut_map(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    const int64_t channel = plan->span, sample = job->C * channel;
    plan->chunk_samples = 1;
    plan->chunk_channels = 1;
    plan->chunk_cols = channel;
    if (plan->map == FBN_NSC || (plan->adjacent && sample <= CHUNK)) {
        plan->chunk_samples = larger(1, CHUNK / sample);
        plan->chunk_channels = job->C;
    } else if (plan->adjacent && channel <= CHUNK)
        plan->chunk_channels = CHUNK / channel;
    else
        plan->chunk_cols = smaller(CHUNK, channel);
    plan->chunks =
        plan->outer * parts(plan->samples, plan->chunk_samples) * parts(job->C, plan->chunk_channels) * parts(channel, plan->chunk_cols);
    if (plan->map == FBN_NSC)
        plan->period = plan->contiguous ? sample * smaller(parts(JOINED_ROW, sample), plan->samples) : sample;
}

/* Bytes of all tensors that a job reads or writes. */
static int64_t traffic(const fbn_plan *plan) {
    const fbn_job *job = plan->job;
    const fbn_tensor *const tensors[] = {&job->x, &job->out, &job->dy, &job->residual, &job->dresidual};
    int64_t count = 0;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        count += tensors[i]->data != NULL;
    return count * job->N * job->C * job->S * plan->bytes;
}

int64_t fbn_plan_job(fbn_plan *plan, const fbn_job *job, void *work) {
    *plan = (fbn_plan){.job = job, .table = fbn_table()};
    const int64_t elements = job->N * job->C * job->S;
    plan->bytes = job->dtype == FBN_FLOAT64 ? 8 : job->dtype == FBN_FLOAT32 ? 4 : 2;
    plan->constant_bytes = job->dtype == FBN_FLOAT64 ? 8 : 4;
    plan->threads = elements < ONE_THREAD ? 1 : job->threads;
    const int in_place = job->out.data == job->x.data || job->out.data == job->dy.data || job->out.data == job->residual.data;
    plan->map_only = job->out.data != NULL &&
                     (job->dy.data ? job->frozen && job->dweight.data == NULL && job->dbias.data == NULL : job->batch_mean == NULL);
    /* What a reduction reads leaves less room in the cache for what its map writes. */
    plan->stream = !in_place && traffic(plan) > fbn_last_cache() / (plan->map_only ? 2 : 3);

    /* Without values there is nothing to cut. */
    if (elements > 0) {
        const int channels_last = steps(job, c_of, 1, one_of) && (job->S == 1 || !steps(job, s_of, 1, one_of));
        plan->adjacent = !channels_last && steps(job, c_of, job->S, one_of);
        plan->span = channels_last ? 1 : job->S;
        plan->outer = 1;
        plan->samples = job->N;
        plan->contiguous = steps(job, n_of, job->C * plan->span, one_of);
        if (channels_last && job->S > 1) {
            const int joined = steps(job, n_of, job->S, s_of);
            plan->outer = joined ? 1 : job->N;
            plan->samples = joined ? job->N * job->S : job->S;
            plan->contiguous = joined && steps(job, s_of, job->C, one_of);
        }
        if (channels_last || (plan->adjacent && job->S < SMALL_PLANE && job->N >= FEW_SAMPLES))
            reduce_columns(plan);
        else
            reduce_planes(plan);
        plan->map = channels_last || (plan->adjacent && job->S < LEAST_PLANE) ? FBN_NSC : FBN_NCS;
        cut_map(plan);
        if (plan->map == FBN_NSC)
            plan->fused = 0;
    }

    /* Integers, because there may be no memory yet. */
    uintptr_t next = (uintptr_t)work;
    plan->sums = (double *)next;
    next += (uintptr_t)aligned(plan->tiles * job->C * 2 * 8);
    for (int i = 0; i < 5; i++) {
        plan->constants[i] = (char *)next;
        next += (uintptr_t)aligned((job->C + FBN_SPARE) * plan->constant_bytes);
    }
    for (int i = 0; i < 5 && plan->period; i++) {
        plan->tables[i] = plan->constants[i];
        if (plan->period == job->C)
            continue;
        plan->tables[i] = (char *)next;
        next += (uintptr_t)aligned((plan->period + FBN_SPARE) * plan->constant_bytes);
    }
    plan->slots = (char *)next;
    if (plan->slot_columns)
        plan->slot_bytes = aligned(plan->slot_columns * 2 * 8 + 3 * (plan->slot_columns + FBN_SPARE) * plan->constant_bytes);
    return (int64_t)(next - (uintptr_t)work) + plan->threads * plan->slot_bytes;
}
