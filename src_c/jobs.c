/* The jobs: what a reduction of every channel, arithmetic on its sums and a map over the elements make together. */
/* Loops over blocks of channels need no more than vectors: what -O3 unrolls beside them takes 92 kB, and no time less. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC optimize("O2,tree-vectorize,vect-cost-model=dynamic,version-loops-for-strides")
#endif

#include "channels.h"
#include "debug.h"
#include "float64_stats.h"
#include "schedule.h"

#include <math.h>
#include <stddef.h>

/* sum = sum over the tiles, in their order, of the sums of channels first + i; dot likewise. All tiles of a channel have the same center,
 * so that nothing but their sums is to be merged. */
FBN_BODY void add_tiles(const fbn_plan *plan, int64_t first, int channels, double *sum, double *dot) {
    const int64_t C = plan->job->C;
    for (int i = 0; i < channels; i++)
        sum[i] = dot[i] = 0;
    for (int64_t tile = 0; tile < plan->reduction.kept; tile++) {
        const double *tile_sums = plan->scratch.sums + 2 * tile * C + first;
        for (int i = 0; i < channels; i++) {
            sum[i] += tile_sums[i];
            dot[i] += tile_sums[C + i];
        }
    }
}

/* running = (1 - momentum)*running + momentum*batch */
FBN_BODY void update_running(const fbn_vector *running, int64_t first, int count, const double *batch, double momentum) {
    double values[FBN_CHANNEL_BLOCK];
    if (running->data == NULL)
        return;
    fbn_gather(values, running, first, count, 0);
    for (int i = 0; i < count; i++)
        values[i] = (1 - momentum) * values[i] + momentum * batch[i];
    fbn_scatter(running, first, count, values);
}

/* Whether a channel whose squares add up to 0 is not constant: its squares may be too small for float32. */
static int squares_vanished(const fbn_job *job, int64_t first, int count, const double *sum_dd) {
    int varies[FBN_CHANNEL_BLOCK], vanished = 0;
    fbn_find_varying(varies, job, first, count);
    for (int i = 0; i < count; i++)
        vanished |= sum_dd[i] == 0 && varies[i];
    return vanished;
}

static __attribute__((noinline)) void recompute_stats(double *mean, double *m2, const int64_t *unreliable, const fbn_run *run,
                                                      int64_t first, int count) {
    double exact_mean[FBN_CHANNEL_BLOCK], exact_m2[FBN_CHANNEL_BLOCK];
    fbn_float64_stats(exact_mean, exact_m2, run->plan.job, &run->sample, first, count);
    for (int i = 0; i < count; i++)
        if (unreliable[i]) {
            mean[i] = exact_mean[i];
            m2[i] = exact_m2[i];
        }
}

/* One-pass statistics. With the pivot p of a channel, d = x - p, sum_d = sum(d) and sum_dd = sum(d*d) in float32 blocks:
 *
 *   mean = p + sum_d/n
 *   m2   = sum((x - mean)^2) = sum_dd - sum_d^2/n
 *
 * The subtraction loses as many bits as (mean - p)^2 is larger than var. A channel is unreliable, and recomputed in two passes of float64,
 *
 *   where (mean - p)^2 > 4*var, that is, where more than a factor of 5 is lost to the pivot,
 *   where m2/n is so small that squares of its size have lost bits to underflow,
 *   where m2 is NaN or infinite.
 *
 * A constant channel whose pivot is its value has both sums 0. Where all unreliable channels of a block look so, one comparison of their
 * values shows that they are constant, and nothing is recomputed. docs/numerics.md: one-pass variance; vanishing squares. */
FBN_BODY void one_pass_stats(double *mean, double *m2, const fbn_run *run, int64_t first, int count) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const double n = (double)job->N * (double)job->S, one_over_n = 1 / n;
    const double least_var = plan->constant_bytes == 8 ? 0x1p-900 : 0x1p-90;
    double sum_d[FBN_CHANNEL_BLOCK], sum_dd[FBN_CHANNEL_BLOCK];
    int64_t unreliable[FBN_CHANNEL_BLOCK], recompute = 0, constant = 0;
    add_tiles(plan, first, count, sum_d, sum_dd);
    fbn_get_constants(mean, plan, FBN_CENTER, first, count);
    for (int i = 0; i < count; i++) {
        const double mean_d = sum_d[i] * one_over_n;
        m2[i] = sum_dd[i] - sum_d[i] * mean_d;
        mean[i] += mean_d;
        unreliable[i] = !(m2[i] >= least_var * n) | !(mean_d * mean_d * n <= 4 * m2[i]) | !(m2[i] < INFINITY);
        recompute += unreliable[i];
        constant += (sum_d[i] == 0) & (sum_dd[i] == 0);
    }
    if (recompute == 0 || n == 1 || (constant == recompute && !squares_vanished(job, first, count, sum_dd)))
        return;
    recompute_stats(mean, m2, unreliable, run, first, count);
}

/* The statistics of channels first.. and, for a map, its constants and the running statistics; the running variance takes m2/(n-1) where
 * the job asks for the unbiased one. */
FBN_BODY void finish_stats_of(const fbn_run *run, int64_t first, int count) {
    const fbn_job *job = run->plan.job;
    const double n = (double)job->N * (double)job->S;
    double mean[FBN_CHANNEL_BLOCK], m2[FBN_CHANNEL_BLOCK], var[FBN_CHANNEL_BLOCK];
    one_pass_stats(mean, m2, run, first, count);
    for (int i = 0; i < count; i++) {
        m2[i] = m2[i] < 0 ? 0 : m2[i];
        var[i] = m2[i] / n;
        job->batch_mean[first + i] = mean[i];
        job->batch_m2[first + i] = m2[i];
    }
    if (!run->maps)
        return;
    fbn_set_affine(&run->plan, first, count, mean, var);
    update_running(&job->mean, first, count, mean, run->momentum);
    if (run->unbiased && n > 1 && job->var.data != NULL)
        for (int i = 0; i < count; i++)
            var[i] = m2[i] / (n - 1);
    update_running(&job->var, first, count, var, run->momentum);
}
FBN_IN_BLOCKS(finish_stats, const fbn_run *, run)

/* sum_dy = sum(g) and sum_dy_xmu = sum(g*(x - mean)) of some channels: from the tiles, or given where this job does not reduce. The tiles
 * have d = x - center for x - mean, with mean_low = mean - center:
 *
 *   sum(g*(x - mean)) = sum(g*d) - mean_low*sum(g) */
FBN_BODY void gradient_sums(double *sum_dy, double *sum_dy_xmu, const fbn_run *run, int64_t first, int count, const double *mean_low) {
    const fbn_job *job = run->plan.job;
    const fbn_vector sums = {(char *)job->sums, 1, 1};
    if (!run->reduces) {
        fbn_gather(sum_dy, &sums, first, count, 0);
        fbn_gather(sum_dy_xmu, &sums, job->C + first, count, 0);
        return;
    }
    add_tiles(&run->plan, first, count, sum_dy, sum_dy_xmu);
    for (int i = 0; i < count; i++)
        sum_dy_xmu[i] -= mean_low[i] * sum_dy[i];
    fbn_scatter(&sums, first, count, sum_dy);
    fbn_scatter(&sums, job->C + first, count, sum_dy_xmu);
}

/* The gradients of the parameters, and the constants of grad_input:
 *
 *   dbias = sum_dy    dweight = invstd*sum_dy_xmu    scale = weight*invstd
 *   dx = scale*(g - sum_dy/n - (x - mean)*invstd^2*sum_dy_xmu/n) = scale*g + slope*(x - center) + offset
 *   slope = -scale*invstd*dweight/n    offset = -scale*sum_dy/n - slope*mean_low
 *
 * n is of this job where it reduces, and `count` where its sums are given. docs/numerics.md: backward. */
FBN_BODY void finish_backward_of(const fbn_run *run, int64_t first, int count) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const double one_over_count = 1 / (double)job->count;
    const double one_over_n = run->reduces ? 1 / ((double)job->N * (double)job->S) : one_over_count;
    double sum_dy[FBN_CHANNEL_BLOCK], sum_dy_xmu[FBN_CHANNEL_BLOCK], mean_low[FBN_CHANNEL_BLOCK], invstd[FBN_CHANNEL_BLOCK];
    double scale[FBN_CHANNEL_BLOCK], dweight[FBN_CHANNEL_BLOCK], slope[FBN_CHANNEL_BLOCK], offset[FBN_CHANNEL_BLOCK];
    fbn_get_constants(mean_low, plan, FBN_CENTER, first, count);
    for (int i = 0; i < count; i++)
        mean_low[i] = job->batch_mean[first + i] - mean_low[i];
    gradient_sums(sum_dy, sum_dy_xmu, run, first, count, mean_low);
    fbn_gather(scale, &job->weight, first, count, 1);
    for (int i = 0; i < count; i++)
        invstd[i] = job->batch_m2[first + i] * one_over_count;
    fbn_invstd(invstd, invstd, count, job->eps);
    for (int i = 0; i < count; i++) {
        scale[i] *= invstd[i];
        dweight[i] = invstd[i] * sum_dy_xmu[i];
        slope[i] = -scale[i] * invstd[i] * dweight[i] * one_over_n;
        offset[i] = -scale[i] * sum_dy[i] * one_over_n - slope[i] * mean_low[i];
    }
    fbn_scatter(&job->dbias, first, count, sum_dy);
    fbn_scatter(&job->dweight, first, count, dweight);
    fbn_set_constants(plan, FBN_SCALE, first, count, scale);
    fbn_set_constants(plan, FBN_SLOPE, first, count, slope);
    fbn_set_constants(plan, FBN_OFFSET, first, count, offset);
}
FBN_IN_BLOCKS(finish_backward, const fbn_run *, run)

typedef struct {
    const fbn_vector *var;
    double eps;
    int64_t first; /* the first channel without a root, or -1 */
} root_search;

FBN_BODY void find_without_root_of(root_search *search, int64_t first, int count) {
    double var[FBN_CHANNEL_BLOCK];
    int64_t without_root = 0;
    fbn_gather(var, search->var, first, count, 1);
    for (int i = 0; i < count; i++)
        without_root |= var[i] + search->eps <= 0;
    for (int i = 0; without_root && i < count && search->first < 0; i++)
        if (var[i] + search->eps <= 0)
            search->first = first + i;
}
FBN_IN_BLOCKS(find_without_root, root_search *, search)

int64_t fbn_first_without_root(const fbn_vector *var, int64_t C, double eps) {
    root_search search = {var, eps, -1};
    find_without_root(&search, 0, C);
    return search.first;
}

int64_t fbn_work_bytes(const fbn_job *job) {
    fbn_plan plan;
    return fbn_plan_job(&plan, job, NULL);
}

FBN_BODY void set_affine_of_inference_of(const fbn_plan *plan, int64_t first, int count) {
    double mean[FBN_CHANNEL_BLOCK], var[FBN_CHANNEL_BLOCK];
    fbn_gather(mean, &plan->job->mean, first, count, 0);
    fbn_gather(var, &plan->job->var, first, count, 1);
    fbn_set_affine(plan, first, count, mean, var);
}
FBN_IN_BLOCKS(set_affine_of_inference, const fbn_plan *, plan)

void fbn_infer(const fbn_job *job, void *work) {
    FBN_ASSERT(work != NULL && job->mean.data != NULL && job->var.data != NULL);
    fbn_run run = {.maps = 1, .map_op = FBN_APPLY};
    fbn_plan_job(&run.plan, job, work);
    set_affine_of_inference(&run.plan, 0, job->C);
    fbn_execute(&run);
}

void fbn_train(const fbn_job *job, double momentum, int unbiased, void *work) {
    FBN_ASSERT(work != NULL && (job->C == 0 || (job->batch_mean != NULL && job->batch_m2 != NULL)));
    fbn_run run = {.reduces = 1,
                   .reduce_op = FBN_STATS,
                   .maps = 1,
                   .map_op = FBN_APPLY,
                   .finish = finish_stats,
                   .momentum = momentum,
                   .unbiased = unbiased};
    fbn_plan_job(&run.plan, job, work);
    fbn_execute(&run);
}

void fbn_stats(const fbn_job *job, void *work) {
    FBN_ASSERT(work != NULL && (job->C == 0 || (job->batch_mean != NULL && job->batch_m2 != NULL)));
    fbn_run run = {.reduces = 1, .reduce_op = FBN_STATS, .finish = finish_stats};
    fbn_plan_job(&run.plan, job, work);
    fbn_execute(&run);
}

/* What a backward pass needs before its sums: z, of which the activation's derivative is taken, and the scale of a frozen map, which does
 * not wait for them. Otherwise it is the center alone. */
FBN_BODY void set_affine_of_backward_of(const fbn_plan *plan, int64_t first, int count) {
    const fbn_job *job = plan->job;
    const double one_over_count = 1 / (double)job->count;
    double var[FBN_CHANNEL_BLOCK];
    if (!job->frozen && job->activation == FBN_NO_ACTIVATION) {
        fbn_set_constants(plan, FBN_CENTER, first, count, job->batch_mean + first);
        return;
    }
    for (int i = 0; i < count; i++)
        var[i] = job->batch_m2[first + i] * one_over_count;
    fbn_set_affine(plan, first, count, job->batch_mean + first, var);
}
FBN_IN_BLOCKS(set_affine_of_backward, const fbn_plan *, plan)

static fbn_run new_backward(const fbn_job *job, void *work) {
    FBN_ASSERT(work != NULL && (job->C == 0 || (job->batch_mean != NULL && job->batch_m2 != NULL)));
    FBN_ASSERT(job->N * job->C * job->S == 0 || (job->dy.data != NULL && job->count > 0));
    fbn_run run = {.reduce_op = FBN_GRAD_REDUCE, .map_op = FBN_GRAD_INPUT, .finish = finish_backward, .independent = job->frozen};
    fbn_plan_job(&run.plan, job, work);
    set_affine_of_backward(&run.plan, 0, job->C);
    return run;
}

void fbn_backward(const fbn_job *job, void *work) {
    fbn_run run = new_backward(job, work);
    run.reduces = !run.plan.map_only;
    run.maps = 1;
    fbn_execute(&run);
}

void fbn_backward_sums(const fbn_job *job, void *work) {
    FBN_ASSERT(job->C == 0 || job->sums != NULL);
    fbn_run run = new_backward(job, work);
    run.reduces = 1;
    fbn_execute(&run);
}

void fbn_backward_input(const fbn_job *job, void *work) {
    FBN_ASSERT(job->C == 0 || job->sums != NULL);
    fbn_run run = new_backward(job, work);
    run.maps = 1;
    finish_backward(&run, 0, job->C);
    fbn_execute(&run);
}
