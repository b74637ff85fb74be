/* The four jobs: which kernel meets which piece, in which order, and the arithmetic per channel between the sweeps. */
#include "channels.h"
#include "machine.h"
#include "plan.h"
#include "wide.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

/* A job is a reduction of every channel, arithmetic on its sums, and a map over its elements; any of them may be missing. */
typedef struct run run;
struct run {
    fbn_plan plan;
    fbn_sample sample; /* where statistics look for a first guess of the mean */
    int reduces, maps;
    fbn_op reduction, map;
    void (*finish)(const run *run, int64_t first, int64_t channels);
    int independent; /* the map does not need the sums: both visit a tile together */
    double momentum;
    int unbiased;
};

static void total(const fbn_plan *plan, int64_t c, double *first, double *second) {
    *first = *second = 0;
    for (int64_t t = 0; t < plan->tiles; t++) {
        const double *sums = plan->sums + (t * plan->job->C + c) * 2;
        *first += sums[0];
        *second += sums[1];
    }
}

/* ---- one piece ---- */

static void *at(const fbn_tensor *tensor, int64_t bytes, int64_t n, int64_t c, int64_t s) {
    return tensor->data ? tensor->data + (n * tensor->n + c * tensor->c + s * tensor->s) * bytes : NULL;
}

static void point(fbn_piece *piece, const fbn_job *job, int64_t bytes, int64_t n, int64_t c, int64_t s) {
    piece->out = at(&job->out, bytes, n, c, s);
    piece->dresidual = at(&job->dresidual, bytes, n, c, s);
    piece->dy = at(&job->dy, bytes, n, c, s);
    piece->x = at(&job->x, bytes, n, c, s);
    piece->residual = at(&job->residual, bytes, n, c, s);
}

static void set_strides(fbn_piece *piece, const fbn_job *job, int along_n, int64_t times) {
    piece->out_stride = times * (along_n ? job->out.n : job->out.s);
    piece->dresidual_stride = times * (along_n ? job->dresidual.n : job->dresidual.s);
    piece->dy_stride = times * (along_n ? job->dy.n : job->dy.s);
    piece->x_stride = times * (along_n ? job->x.n : job->x.s);
    piece->residual_stride = times * (along_n ? job->residual.n : job->residual.s);
}

static fbn_piece new_piece(const run *run) {
    const fbn_job *job = run->plan.job;
    return (fbn_piece){.activation = job->activation, .frozen = job->frozen, .stream = run->plan.stream};
}

static void call(const run *run, fbn_op op, const fbn_piece *piece) {
    run->plan.table->kernel[op][run->plan.layout][run->plan.job->dtype](piece);
}

static void set_constants(fbn_piece *piece, const fbn_plan *plan, int64_t c) {
    const void **constants[] = {&piece->center, &piece->scale, &piece->shift, &piece->slope, &piece->offset};
    for (int i = 0; i < 5; i++)
        *constants[i] = plan->constants[i] + c * plan->constant_bytes;
}

static void plane_piece(const run *run, fbn_op op, int64_t c, int64_t tile) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    fbn_piece piece = new_piece(run);
    set_constants(&piece, plan, c);
    int64_t n = tile * plan->tile_rows, s = 0;
    piece.rows = job->N - n < plan->tile_rows ? job->N - n : plan->tile_rows;
    piece.cols = job->S;
    if (job->S > plan->tile_cols) {
        const int64_t pieces = plan->tiles / job->N;
        n = tile / pieces;
        s = tile % pieces * plan->tile_cols;
        piece.rows = 1;
        piece.cols = job->S - s < plan->tile_cols ? job->S - s : plan->tile_cols;
    }
    point(&piece, job, plan->bytes, n, c, s);
    set_strides(&piece, job, 1, 1);
    piece.sums = plan->sums + (tile * job->C + c) * 2;
    call(run, op, &piece);
}

/* Repeats the constants of channels first.. for every column of a row. */
static void expand(const fbn_plan *plan, char *columns, const char *constants, int64_t channels, int64_t times) {
    const int64_t bytes = plan->constant_bytes, once = channels * plan->span * bytes;
    if (plan->span == 1)
        memcpy(columns, constants, (size_t)once);
    else
        for (int64_t c = 0; c < channels; c++) {
            if (bytes == 8)
                for (int64_t s = 0; s < plan->span; s++)
                    ((double *)columns)[c * plan->span + s] = ((const double *)constants)[c];
            else
                for (int64_t s = 0; s < plan->span; s++)
                    ((float *)columns)[c * plan->span + s] = ((const float *)constants)[c];
        }
    for (int64_t k = 1; k < times; k++)
        memcpy(columns + k * once, columns, (size_t)once);
}

/* The constants that an operation reads, as bits 1 << FBN_CENTER and so on. */
static unsigned constants_of(const run *run, fbn_op op) {
    const unsigned center = 1u << FBN_CENTER, affine = center | 1u << FBN_SCALE | 1u << FBN_SHIFT;
    switch (op) {
    case FBN_STATS:
        return center;
    case FBN_GRAD_REDUCE:
        return run->plan.job->activation ? affine : center;
    case FBN_GRAD_INPUT:
        return affine | 1u << FBN_SLOPE | 1u << FBN_OFFSET;
    default:
        return affine;
    }
}

static void column_piece(const run *run, fbn_op op, int64_t group, int64_t tile, int slot) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const int64_t first = group * plan->group, channels = job->C - first < plan->group ? job->C - first : plan->group;
    const int64_t tiles_per_outer = (plan->rows + plan->tile_rows - 1) / plan->tile_rows;
    fbn_piece piece = new_piece(run);
    int64_t n, s = 0;
    if (plan->rest && tile == plan->tiles - 1) {
        n = plan->rows * plan->K;
        piece.rows = 1;
        piece.cols = plan->rest;
    } else {
        const int64_t row = tile % tiles_per_outer * plan->tile_rows;
        n = tile / tiles_per_outer * plan->rows + row * plan->K;
        piece.rows = plan->rows - row < plan->tile_rows ? plan->rows - row : plan->tile_rows;
        piece.cols = plan->K * channels * plan->span;
    }
    /* Channels last has its samples in n and s; otherwise a sample is an n. */
    const int along_n = plan->span > 1 || job->S == 1;
    if (!along_n) {
        s = n % job->S;
        n = n / job->S;
    }
    point(&piece, job, plan->bytes, n, first, s);
    const int reduces = op == FBN_STATS || op == FBN_GRAD_REDUCE;
    const int64_t joined = reduces || piece.rows < plan->joined ? 1 : plan->joined, left = piece.rows % joined, width = piece.cols;
    piece.rows /= joined;
    piece.cols *= joined;
    set_strides(&piece, job, along_n, plan->K * joined);

    char *const scratch = plan->slots + slot * plan->slot_bytes;
    piece.sums = (double *)scratch;
    char *columns = scratch + plan->tile_cols * 2 * (int64_t)sizeof(double);
    const void **constants[] = {&piece.center, &piece.scale, &piece.shift, &piece.slope, &piece.offset};
    const unsigned wanted = constants_of(run, op);
    for (int i = 0; i < 5; i++) {
        const char *values = plan->constants[i] + first * plan->constant_bytes;
        if (!(wanted >> i & 1))
            continue;
        *constants[i] = values;
        if (plan->K * plan->span * joined > 1) {
            expand(plan, columns, values, channels, plan->K * joined);
            *constants[i] = columns;
            columns += plan->tile_cols * joined * plan->constant_bytes;
        }
    }
    call(run, op, &piece);
    if (left) {
        const int64_t done = n * (along_n ? 1 : job->S) + s + piece.rows * joined * plan->K;
        point(&piece, job, plan->bytes, along_n ? done : done / job->S, first, along_n ? 0 : done % job->S);
        piece.rows = 1;
        piece.cols = left * width;
        call(run, op, &piece);
    }
    if (!reduces)
        return;
    double *sums = plan->sums + (tile * job->C + first) * 2;
    memset(sums, 0, (size_t)channels * 2 * sizeof *sums);
    for (int64_t column = 0, c = 0; column < piece.cols; c = c + 1 < channels ? c + 1 : 0)
        for (const int64_t stop = column + plan->span; column < stop; column++) {
            sums[2 * c] += piece.sums[column];
            sums[2 * c + 1] += piece.sums[piece.cols + column];
        }
}

/* ---- the order of pieces ---- */

static void piece_of(const run *run, fbn_op op, int64_t group, int64_t tile, int slot) {
    const fbn_plan *plan = &run->plan;
    if (plan->layout == FBN_NSC) {
        column_piece(run, op, group, tile, slot);
        return;
    }
    for (int64_t c = group * plan->group; c < plan->job->C && c < (group + 1) * plan->group; c++)
        plane_piece(run, op, c, tile);
}

static int64_t sample_groups(const fbn_plan *plan) {
    return (plan->job->C + plan->sample_group - 1) / plan->sample_group;
}

/* Planes in the order of memory: the channels of one sample are the rows of a piece. */
static void sample_task(void *context, int64_t index, int slot) {
    const run *run = context;
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const int64_t groups = sample_groups(plan), position = run->reduces ? job->N * groups - 1 - index : index;
    const int64_t n = position / groups, first = position % groups * plan->sample_group;
    fbn_piece piece = new_piece(run);
    (void)slot;
    set_constants(&piece, plan, first);
    piece.rows = job->C - first < plan->sample_group ? job->C - first : plan->sample_group;
    piece.cols = job->S;
    piece.constant_step = 1;
    point(&piece, job, plan->bytes, n, first, 0);
    piece.out_stride = job->out.c;
    piece.dresidual_stride = job->dresidual.c;
    piece.dy_stride = job->dy.c;
    piece.x_stride = job->x.c;
    piece.residual_stride = job->residual.c;
    run->plan.table->kernel[run->map][FBN_NCS][job->dtype](&piece);
}

static void center_on_sample(const run *run, int64_t first, int64_t channels) {
    double centre[FBN_CHANNELS];
    for (int64_t c = first; c < first + channels; c += FBN_CHANNELS) {
        const int64_t count = first + channels - c < FBN_CHANNELS ? first + channels - c : FBN_CHANNELS;
        fbn_sample_mean(centre, run->plan.job, &run->sample, c, count);
        for (int64_t i = 0; i < count; i++)
            fbn_set_constant(&run->plan, FBN_CENTER, c + i, centre[i]);
    }
}

static void whole_channels(const run *run, int64_t group, int64_t channel, int64_t channels, int slot) {
    const fbn_plan *plan = &run->plan;
    const int planes = plan->layout == FBN_NCS;
    if (run->reduces && run->reduction == FBN_STATS)
        center_on_sample(run, channel, channels);
    for (int64_t tile = 0; run->reduces && tile < plan->tiles; tile++) {
        if (planes)
            plane_piece(run, run->reduction, channel, tile);
        else
            column_piece(run, run->reduction, group, tile, slot);
        if (run->independent)
            planes ? plane_piece(run, run->map, channel, tile) : column_piece(run, run->map, group, tile, slot);
    }
    if (run->reduces)
        run->finish(run, channel, channels);
    /* Backwards, from what the first sweep left in the cache. */
    for (int64_t tile = plan->tiles - 1; run->maps && !(run->reduces && run->independent) && tile >= 0; tile--)
        planes ? plane_piece(run, run->map, channel, tile) : column_piece(run, run->map, group, tile, slot);
}

static void group_task(void *context, int64_t index, int slot) {
    const run *run = context;
    const fbn_plan *plan = &run->plan;
    const int64_t first = index * plan->group, left = plan->job->C - first, channels = left < plan->group ? left : plan->group;
    if (plan->layout == FBN_NSC)
        whole_channels(run, index, first, channels, slot);
    else
        for (int64_t c = first; c < first + channels; c++)
            whole_channels(run, index, c, 1, slot);
}

static void reduce_task(void *context, int64_t index, int slot) {
    const run *run = context;
    const int64_t tile = index / run->plan.groups, group = index % run->plan.groups;
    piece_of(run, run->reduction, group, tile, slot);
    if (run->independent)
        piece_of(run, run->map, group, tile, slot);
}

static void finish_task(void *context, int64_t index, int slot) {
    const run *run = context;
    const int64_t first = index * FBN_CHANNELS, left = run->plan.job->C - first;
    (void)slot;
    run->finish(run, first, left < FBN_CHANNELS ? left : FBN_CHANNELS);
}

static void map_task(void *context, int64_t index, int slot) {
    const run *run = context;
    const int64_t last = run->plan.tiles * run->plan.groups - 1, from_end = run->reduces ? last - index : index;
    piece_of(run, run->map, from_end % run->plan.groups, from_end / run->plan.groups, slot);
}

/* No values: statistics and gradients are zero, the running statistics stay. */
static void execute_empty(const run *run) {
    const fbn_job *job = run->plan.job;
    for (int64_t c = 0; c < job->C; c++) {
        if (run->reduces && run->reduction == FBN_STATS)
            job->batch_mean[c] = job->batch_m2[c] = 0;
        if (run->reduces && job->sums != NULL)
            job->sums[c] = job->sums[job->C + c] = 0;
        fbn_set_value(&job->dweight, c, 0);
        fbn_set_value(&job->dbias, c, 0);
    }
}

static void execute(run *run) {
    const fbn_plan *plan = &run->plan;
    const int64_t tasks = plan->tiles * plan->groups;
    if (plan->job->N * plan->job->C * plan->job->S == 0) {
        execute_empty(run);
        return;
    }
    run->sample = fbn_sample_of(plan->job);
    if (plan->fused && run->reduces) {
        fbn_parallel(group_task, run, plan->groups, plan->threads);
        return;
    }
    if (run->reduces) {
        if (run->reduction == FBN_STATS)
            center_on_sample(run, 0, plan->job->C);
        fbn_parallel(reduce_task, run, tasks, plan->threads);
        fbn_parallel(finish_task, run, (plan->job->C + FBN_CHANNELS - 1) / FBN_CHANNELS, plan->threads);
    }
    if (!run->maps || (run->reduces && run->independent))
        return;
    if (plan->sample_group)
        fbn_parallel(sample_task, run, plan->job->N * sample_groups(plan), plan->threads);
    else
        fbn_parallel(map_task, run, tasks, plan->threads);
}

/* ---- the jobs ---- */

static void finish_stats(const run *run, int64_t first, int64_t channels) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const double n = (double)job->N * (double)job->S;
    /* Squares below this lose bits in CT. */
    const double least = plan->constant_bytes == 8 ? 0x1p-900 : 0x1p-90;
    double mean[FBN_CHANNELS], m2[FBN_CHANNELS];
    for (int64_t group = first; group < first + channels; group += FBN_CHANNELS) {
        const int64_t count = first + channels - group < FBN_CHANNELS ? first + channels - group : FBN_CHANNELS;
        int again = 0;
        for (int64_t i = 0; i < count; i++) {
            double sum, square;
            total(plan, group + i, &sum, &square);
            const double off = sum / n, spread = square - sum * off;
            mean[i] = fbn_constant(plan, FBN_CENTER, group + i) + off;
            m2[i] = spread;
            /* One pass loses (center - mean)^2 / var of its bits; NaN, overflow and underflow come here too. */
            again |= !(spread >= least * n && off * off * n <= spread && spread < INFINITY) << i;
        }
        if (again && n > 1) {
            double wide_mean[FBN_CHANNELS], wide_m2[FBN_CHANNELS];
            fbn_wide_stats(wide_mean, wide_m2, job, &run->sample, group, count);
            for (int64_t i = 0; i < count; i++)
                if (again >> i & 1) {
                    mean[i] = wide_mean[i];
                    m2[i] = wide_m2[i];
                }
        }
        double var[FBN_CHANNELS];
        for (int64_t i = 0; i < count; i++) {
            m2[i] = m2[i] < 0 ? 0 : m2[i];
            var[i] = m2[i] / n;
            job->batch_mean[group + i] = mean[i];
            job->batch_m2[group + i] = m2[i];
        }
        if (!run->maps)
            continue;
        fbn_set_affine(plan, group, (int)count, mean, var);
        for (int64_t i = 0; i < count && (job->mean.data != NULL || job->var.data != NULL); i++) {
            const int64_t c = group + i;
            const double moved = m2[i] / (run->unbiased && n > 1 ? n - 1 : n);
            fbn_set_value(&job->mean, c, (1 - run->momentum) * fbn_value_of(&job->mean, c, 0) + run->momentum * mean[i]);
            fbn_set_value(&job->var, c, (1 - run->momentum) * fbn_value_of(&job->var, c, 0) + run->momentum * moved);
        }
    }
}

/* With d = x - center and lost = mean - center, per channel:
 *
 *   dbias = sum(g)      dweight = invstd * sum(g*(x-mean)),   sum(g*(x-mean)) = sum(g*d) - lost*sum(g)
 *   dx = scale * (g - dbias/n - (x-mean) * invstd^2 * sum(g*(x-mean))/n) = scale*g + slope*d + offset
 *
 * Where this job does not reduce, its sums are given. */
static void finish_backward(const run *run, int64_t first, int64_t channels) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const double one_of_count = 1 / (double)job->count, one_of_n = run->reduces ? 1 / ((double)job->N * (double)job->S) : one_of_count;
    for (int64_t block = first; block < first + channels; block += FBN_CHANNELS) {
        const int count = first + channels - block < FBN_CHANNELS ? (int)(first + channels - block) : FBN_CHANNELS;
        double sum[FBN_CHANNELS], product[FBN_CHANNELS], lost[FBN_CHANNELS], var[FBN_CHANNELS], inverse[FBN_CHANNELS], weight[FBN_CHANNELS];
        for (int i = 0; i < count; i++) {
            lost[i] = job->batch_mean[block + i] - fbn_constant(plan, FBN_CENTER, block + i);
            var[i] = job->batch_m2[block + i] * one_of_count;
            if (run->reduces) {
                total(plan, block + i, &sum[i], &product[i]);
                product[i] -= lost[i] * sum[i];
            } else {
                sum[i] = job->sums[block + i];
                product[i] = job->sums[job->C + block + i];
            }
            if (run->reduces && job->sums != NULL) {
                job->sums[block + i] = sum[i];
                job->sums[job->C + block + i] = product[i];
            }
        }
        fbn_gather(weight, &job->weight, block, count, 1);
        fbn_inverse_std(inverse, var, count, job->eps);
        for (int i = 0; i < count; i++) {
            const double scale = weight[i] * inverse[i], dweight = inverse[i] * product[i];
            const double slope = -scale * inverse[i] * dweight * one_of_n;
            fbn_set_value(&job->dbias, block + i, sum[i]);
            fbn_set_value(&job->dweight, block + i, dweight);
            fbn_set_constant(plan, FBN_SLOPE, block + i, slope);
            fbn_set_constant(plan, FBN_OFFSET, block + i, -scale * sum[i] * one_of_n - slope * lost[i]);
        }
    }
}

int64_t fbn_first_without_root(const fbn_vector *var, int64_t C, double eps) {
    for (int64_t c = 0; c < C; c++)
        if (fbn_value_of(var, c, 1) + eps <= 0)
            return c;
    return -1;
}

int64_t fbn_work_bytes(const fbn_job *job) {
    fbn_plan plan;
    return fbn_plan_job(&plan, job, NULL);
}

void fbn_infer(const fbn_job *job, void *work) {
    run run = {.maps = 1, .map = FBN_APPLY};
    fbn_plan_job(&run.plan, job, work);
    for (int64_t c = 0; c < job->C; c += FBN_CHANNELS) {
        const int count = job->C - c < FBN_CHANNELS ? (int)(job->C - c) : FBN_CHANNELS;
        double mean[FBN_CHANNELS], var[FBN_CHANNELS];
        fbn_gather(mean, &job->mean, c, count, 0);
        fbn_gather(var, &job->var, c, count, 1);
        fbn_set_affine(&run.plan, c, count, mean, var);
    }
    execute(&run);
}

void fbn_train(const fbn_job *job, double momentum, int unbiased, void *work) {
    run run = {.reduces = 1,
               .reduction = FBN_STATS,
               .maps = 1,
               .map = FBN_APPLY,
               .finish = finish_stats,
               .momentum = momentum,
               .unbiased = unbiased};
    fbn_plan_job(&run.plan, job, work);
    execute(&run);
}

void fbn_stats(const fbn_job *job, void *work) {
    run run = {.reduces = 1, .reduction = FBN_STATS, .finish = finish_stats};
    fbn_plan_job(&run.plan, job, work);
    execute(&run);
}

static run new_backward(const fbn_job *job, void *work) {
    run run = {.reduction = FBN_GRAD_REDUCE, .map = FBN_GRAD_INPUT, .finish = finish_backward, .independent = job->frozen};
    fbn_plan_job(&run.plan, job, work);
    const double one_of_count = 1 / (double)job->count;
    for (int64_t c = 0; c < job->C; c += FBN_CHANNELS) {
        const int count = job->C - c < FBN_CHANNELS ? (int)(job->C - c) : FBN_CHANNELS;
        double var[FBN_CHANNELS];
        for (int i = 0; i < count; i++)
            var[i] = job->batch_m2[c + i] * one_of_count;
        fbn_set_affine(&run.plan, c, count, job->batch_mean + c, var);
    }
    return run;
}

void fbn_backward(const fbn_job *job, void *work) {
    run run = new_backward(job, work);
    run.reduces = !run.plan.map_only;
    run.maps = 1;
    execute(&run);
}

void fbn_backward_sums(const fbn_job *job, void *work) {
    run run = new_backward(job, work);
    run.reduces = 1;
    execute(&run);
}

void fbn_backward_input(const fbn_job *job, void *work) {
    run run = new_backward(job, work);
    run.maps = 1;
    finish_backward(&run, 0, job->C);
    execute(&run);
}
