/* The jobs: what a reduction of every channel, arithmetic on its sums and a map over the elements make together. */
#include "channels.h"
#include "schedule.h"

#include <math.h>
#include <stddef.h>

/* The sums of channels first.. over all tiles. */
static void add_tiles(const fbn_plan *plan, int64_t first, int channels, double *sum, double *second) {
    const int64_t C = plan->job->C;
    for (int i = 0; i < channels; i++)
        sum[i] = second[i] = 0;
    for (int64_t tile = 0; tile < plan->tiles; tile++) {
        const double *of_tile = plan->sums + 2 * tile * C + first;
        for (int i = 0; i < channels; i++) {
            sum[i] += of_tile[i];
            second[i] += of_tile[C + i];
        }
    }
}

/* Running statistics move towards those of this batch. */
static void move(const fbn_vector *running, int64_t first, int count, const double *batch, double momentum) {
    double values[FBN_CHANNELS];
    if (running->data == NULL)
        return;
    fbn_gather(values, running, first, count, 0);
    for (int i = 0; i < count; i++)
        values[i] = (1 - momentum) * values[i] + momentum * batch[i];
    fbn_scatter(running, first, count, values);
}

/* Whether a channel without squares is not constant. A constant one, as behind a Relu that never fires, needs no second look; others may
 * have squares that are too small for CT. */
static int differ(const fbn_job *job, int64_t first, int count, const double *square) {
    int differs[FBN_CHANNELS], found = 0;
    fbn_differ(differs, job, first, count);
    for (int i = 0; i < count; i++)
        found |= square[i] == 0 && differs[i];
    return found;
}

static void finish_stats(const fbn_run *run, int64_t first, int64_t channels) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const double n = (double)job->N * (double)job->S, one_of_n = 1 / n;
    /* Squares below this lose bits in CT. */
    const double least = plan->constant_bytes == 8 ? 0x1p-900 : 0x1p-90;
    double mean[FBN_CHANNELS], m2[FBN_CHANNELS], sum[FBN_CHANNELS], square[FBN_CHANNELS], off[FBN_CHANNELS];
    for (int64_t group = first; group < first + channels; group += FBN_CHANNELS) {
        const int count = first + channels - group < FBN_CHANNELS ? (int)(first + channels - group) : FBN_CHANNELS;
        int doubtful[FBN_CHANNELS], again = 0, dead = 0;
        add_tiles(plan, group, count, sum, square);
        fbn_constants(mean, plan, FBN_CENTER, group, count);
        for (int i = 0; i < count; i++) {
            off[i] = sum[i] * one_of_n;
            m2[i] = square[i] - sum[i] * off[i];
            mean[i] += off[i];
            /* One pass loses (center - mean)^2 / var of its bits; NaN, overflow and underflow come here too. */
            doubtful[i] = !(m2[i] >= least * n) | !(off[i] * off[i] * n <= m2[i]) | !(m2[i] < INFINITY);
            again += doubtful[i];
            dead += (sum[i] == 0) & (square[i] == 0);
        }
        if (dead == again && again && !differ(job, group, count, square))
            again = 0;
        if (again && n > 1) {
            double wide_mean[FBN_CHANNELS], wide_m2[FBN_CHANNELS];
            fbn_wide_stats(wide_mean, wide_m2, job, &run->sample, group, count);
            for (int i = 0; i < count; i++)
                if (doubtful[i]) {
                    mean[i] = wide_mean[i];
                    m2[i] = wide_m2[i];
                }
        }
        double var[FBN_CHANNELS];
        for (int i = 0; i < count; i++) {
            m2[i] = m2[i] < 0 ? 0 : m2[i];
            var[i] = m2[i] / n;
            job->batch_mean[group + i] = mean[i];
            job->batch_m2[group + i] = m2[i];
        }
        if (!run->maps)
            continue;
        fbn_set_affine(plan, group, count, mean, var);
        for (int i = 0; i < count; i++)
            var[i] = m2[i] / (run->unbiased && n > 1 ? n - 1 : n);
        move(&job->mean, group, count, mean, run->momentum);
        move(&job->var, group, count, var, run->momentum);
    }
}

/* With d = x - center and lost = mean - center, per channel:
 *
 *   dbias = sum(g)      dweight = invstd * sum(g*(x-mean)),   sum(g*(x-mean)) = sum(g*d) - lost*sum(g)
 *   dx = scale * (g - dbias/n - (x-mean) * invstd^2 * sum(g*(x-mean))/n) = scale*g + slope*d + offset
 *
 * Where this job does not reduce, its sums are given. */
static void finish_backward(const fbn_run *run, int64_t first, int64_t channels) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const double one_of_count = 1 / (double)job->count, one_of_n = run->reduces ? 1 / ((double)job->N * (double)job->S) : one_of_count;
    for (int64_t block = first; block < first + channels; block += FBN_CHANNELS) {
        const int count = first + channels - block < FBN_CHANNELS ? (int)(first + channels - block) : FBN_CHANNELS;
        double sum[FBN_CHANNELS], product[FBN_CHANNELS], lost[FBN_CHANNELS], inverse[FBN_CHANNELS], weight[FBN_CHANNELS];
        double slope[FBN_CHANNELS], offset[FBN_CHANNELS];
        fbn_constants(lost, plan, FBN_CENTER, block, count);
        for (int i = 0; i < count; i++)
            lost[i] = job->batch_mean[block + i] - lost[i];
        const fbn_vector given = {(char *)job->sums, 1, 1};
        if (run->reduces) {
            add_tiles(plan, block, count, sum, product);
            for (int i = 0; i < count; i++)
                product[i] -= lost[i] * sum[i];
            fbn_scatter(&given, block, count, sum);
            fbn_scatter(&given, job->C + block, count, product);
        } else {
            fbn_gather(sum, &given, block, count, 0);
            fbn_gather(product, &given, job->C + block, count, 0);
        }
        fbn_gather(weight, &job->weight, block, count, 1);
        for (int i = 0; i < count; i++)
            inverse[i] = job->batch_m2[block + i] * one_of_count;
        fbn_inverse_std(inverse, inverse, count, job->eps);
        for (int i = 0; i < count; i++) {
            const double scale = weight[i] * inverse[i], dweight = inverse[i] * product[i];
            weight[i] = scale;
            product[i] = dweight;
            slope[i] = -scale * inverse[i] * dweight * one_of_n;
            offset[i] = -scale * sum[i] * one_of_n - slope[i] * lost[i];
        }
        fbn_scatter(&job->dbias, block, count, sum);
        fbn_scatter(&job->dweight, block, count, product);
        fbn_set_constants(plan, FBN_SCALE, block, count, weight);
        fbn_set_constants(plan, FBN_SLOPE, block, count, slope);
        fbn_set_constants(plan, FBN_OFFSET, block, count, offset);
    }
}

int64_t fbn_first_without_root(const fbn_vector *var, int64_t C, double eps) {
    for (int64_t c = 0; c < C; c++) {
        double value;
        fbn_gather(&value, var, c, 1, 1);
        if (value + eps <= 0)
            return c;
    }
    return -1;
}

int64_t fbn_work_bytes(const fbn_job *job) {
    fbn_plan plan;
    return fbn_plan_job(&plan, job, NULL);
}

void fbn_infer(const fbn_job *job, void *work) {
    fbn_run run = {.maps = 1, .map = FBN_APPLY};
    fbn_plan_job(&run.plan, job, work);
    for (int64_t c = 0; c < job->C; c += FBN_CHANNELS) {
        const int count = job->C - c < FBN_CHANNELS ? (int)(job->C - c) : FBN_CHANNELS;
        double mean[FBN_CHANNELS], var[FBN_CHANNELS];
        fbn_gather(mean, &job->mean, c, count, 0);
        fbn_gather(var, &job->var, c, count, 1);
        fbn_set_affine(&run.plan, c, count, mean, var);
    }
    fbn_execute(&run);
}

void fbn_train(const fbn_job *job, double momentum, int unbiased, void *work) {
    fbn_run run = {.reduces = 1,
                   .reduction = FBN_STATS,
                   .maps = 1,
                   .map = FBN_APPLY,
                   .finish = finish_stats,
                   .momentum = momentum,
                   .unbiased = unbiased};
    fbn_plan_job(&run.plan, job, work);
    fbn_execute(&run);
}

void fbn_stats(const fbn_job *job, void *work) {
    fbn_run run = {.reduces = 1, .reduction = FBN_STATS, .finish = finish_stats};
    fbn_plan_job(&run.plan, job, work);
    fbn_execute(&run);
}

static fbn_run new_backward(const fbn_job *job, void *work) {
    fbn_run run = {.reduction = FBN_GRAD_REDUCE, .map = FBN_GRAD_INPUT, .finish = finish_backward, .independent = job->frozen};
    fbn_plan_job(&run.plan, job, work);
    const double one_of_count = 1 / (double)job->count;
    /* Where nothing but the sums meets a channel before it is finished, its center is all that they need. */
    const int whole = job->frozen || job->activation != FBN_NO_ACTIVATION;
    for (int64_t c = 0; c < job->C; c += FBN_CHANNELS) {
        const int count = job->C - c < FBN_CHANNELS ? (int)(job->C - c) : FBN_CHANNELS;
        double var[FBN_CHANNELS];
        for (int i = 0; i < count && whole; i++)
            var[i] = job->batch_m2[c + i] * one_of_count;
        if (whole)
            fbn_set_affine(&run.plan, c, count, job->batch_mean + c, var);
        else
            fbn_set_constants(&run.plan, FBN_CENTER, c, count, job->batch_mean + c);
    }
    return run;
}

void fbn_backward(const fbn_job *job, void *work) {
    fbn_run run = new_backward(job, work);
    run.reduces = !run.plan.map_only;
    run.maps = 1;
    fbn_execute(&run);
}

void fbn_backward_sums(const fbn_job *job, void *work) {
    fbn_run run = new_backward(job, work);
    run.reduces = 1;
    fbn_execute(&run);
}

void fbn_backward_input(const fbn_job *job, void *work) {
    fbn_run run = new_backward(job, work);
    run.maps = 1;
    finish_backward(&run, 0, job->C);
    fbn_execute(&run);
}
