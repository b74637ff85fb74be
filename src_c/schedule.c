/* Which kernel is given which piece, in which order. */
#include "schedule.h"
#include "channels.h"
#include "choices.h"
#include "debug.h"
#include "machine.h"
#include "pieces.h"
#include "thread_pool.h"

#include <stddef.h>
#include <string.h>

static void call(const fbn_run *run, fbn_op op, fbn_layout layout, const fbn_piece *piece) {
    fbn_kernel *const kernel = run->plan.kernels->kernel[op][layout][run->plan.job->dtype];
    FBN_ASSERT(kernel != NULL);
    kernel(piece);
}

/* ---- by planes ---- */

static void reduce_planes(const fbn_run *run, int64_t first, int64_t channels, int64_t tile) {
    fbn_piece piece;
    const int64_t together = run->plan.reduction.joined ? channels : 1;
    for (int64_t c = first; c < first + channels; c += together) {
        fbn_piece_of_planes(&piece, &run->plan, c, together, tile);
        fbn_prefetch_planes(&piece, &run->plan);
        call(run, run->reduce_op, FBN_NCS, &piece);
    }
}

/* The channels of a group lie side by side, or are visited one by one. */
static void map_planes(const fbn_run *run, int64_t first, int64_t channels, int64_t tile) {
    fbn_piece piece;
    const int64_t together = run->plan.memory.adjacent && run->plan.job->S <= FBN_PLANE_TILE ? channels : 1;
    for (int64_t c = first; c < first + channels; c += together) {
        fbn_piece_of_planes(&piece, &run->plan, c, together, tile);
        call(run, run->map_op, FBN_NCS, &piece);
    }
}

/* One kernel reduces a channel from `first` on and maps one from `mapped` on, for each channel of a group. */
static void reduce_and_map(const fbn_run *run, int64_t first, int64_t mapped, int64_t channels, int64_t tile) {
    const fbn_op op = run->reduce_op == FBN_STATS ? FBN_STATS_APPLY : FBN_GRAD_BOTH;
    fbn_piece pieces[2];
    for (int64_t i = 0; i < channels; i++) {
        fbn_piece_of_planes(&pieces[0], &run->plan, first + i, 1, tile);
        fbn_prefetch_planes(&pieces[0], &run->plan);
        fbn_piece_of_planes(&pieces[1], &run->plan, mapped + i, 1, tile);
        call(run, op, FBN_NCS, pieces);
    }
}

/* ---- by columns ---- */

/* Repeats the constants of some channels for every column, up to `count` columns. The target may be the constants themselves. */
static void expand(const fbn_plan *plan, char *target, const char *constants, int64_t channels, int64_t count) {
    const int64_t bytes = plan->constant_bytes, span = plan->memory.span, once = channels * span;
    if (span > 1)
        for (int64_t c = 0; c < channels; c++) {
            if (bytes == 8)
                for (int64_t s = 0; s < span; s++)
                    ((double *)target)[c * span + s] = ((const double *)constants)[c];
            else
                for (int64_t s = 0; s < span; s++)
                    ((float *)target)[c * span + s] = ((const float *)constants)[c];
        }
    else if (target != constants)
        memcpy(target, constants, (size_t)(once * bytes));
    for (int64_t done = once; done < count;) {
        const int64_t more = count - done < done ? count - done : done;
        memcpy(target + done * bytes, target, (size_t)(more * bytes));
        done += more;
    }
}

/* The tables of a map by columns. Slopes and offsets exist only in a backward pass through the statistics of the batch. */
static void fill_tables(const fbn_run *run) {
    const fbn_plan *plan = &run->plan;
    const int used = run->map_op == FBN_GRAD_INPUT && !plan->job->frozen ? 5 : 3;
    for (int i = 0; i < used; i++)
        expand(plan, plan->scratch.tables[i], plan->scratch.constants[i], plan->job->C, plan->map.period + FBN_TABLE_PADDING);
}

/* The sum of the columns of one channel, in 8 lanes that a compiler vectorizes. */
static double sum_of_columns(const double *values, int64_t count) {
    double lanes[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++)
            lanes[j] += values[i + j];
    for (int j = 0; i + j < count; j++)
        lanes[j] += values[i + j];
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* The sums of channels from those of the columns of a row: over the span of a channel first, then over the samples of the row. */
static void add_columns(double *sums, const double *columns, int64_t row_samples, int64_t channels, int64_t span) {
    for (int64_t c = 0; c < channels; c++)
        sums[c] = span == 1 ? columns[c] : sum_of_columns(columns + c * span, span);
    for (int64_t k = 1; k < row_samples; k++) {
        columns += channels * span;
        if (span == 1)
            for (int64_t c = 0; c < channels; c++)
                sums[c] += columns[c];
        else
            for (int64_t c = 0; c < channels; c++)
                sums[c] += sum_of_columns(columns + c * span, span);
    }
}

/* `most` channels, or those that are left from `first` on. */
static int64_t channels_from(const fbn_plan *plan, int64_t first, int64_t most) {
    const int64_t left = plan->job->C - first;
    return left < most ? left : most;
}

static int64_t group_channels(const fbn_plan *plan, int64_t first) {
    return channels_from(plan, first, plan->reduction.group_channels);
}

/* The sums of some channels of one tile. Where a row has more columns than channels, the area of the thread has constants and sums of every
 * column, and the columns of a channel are added up afterwards. */
static void reduce_tile(const fbn_run *run, double *sums, int64_t group, int64_t tile, int slot) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const fbn_scratch *scratch = &plan->scratch;
    const int64_t first = group * plan->reduction.group_channels, channels = group_channels(plan, first);
    int64_t count;
    const int64_t sample = fbn_tile_samples(plan, tile, &count);
    const int64_t row_samples = count < plan->reduction.row_samples ? count : plan->reduction.row_samples;
    fbn_piece piece;
    fbn_piece_of_columns(&piece, plan, sample, count, row_samples, first, channels);
    if (!scratch->area_columns) {
        piece.sum = sums;
        piece.dot = sums + job->C;
        call(run, run->reduce_op, FBN_NSC, &piece);
        return;
    }
    FBN_ASSERT(slot < plan->threads && piece.cols <= scratch->area_columns);
    char *const area = scratch->areas + slot * scratch->area_bytes;
    piece.sum = (double *)area;
    piece.dot = piece.sum + piece.cols;
    const void **constants[] = {&piece.center, &piece.scale, &piece.shift};
    char *columns = area + scratch->area_columns * 2 * (int64_t)sizeof(double);
    const int used = run->reduce_op == FBN_STATS || job->activation == FBN_NO_ACTIVATION ? 1 : 3;
    for (int i = 0; i < used; i++, columns += (scratch->area_columns + FBN_TABLE_PADDING) * plan->constant_bytes) {
        expand(plan, columns, *constants[i], channels, piece.cols);
        *constants[i] = columns;
    }
    /* A kernel may read constants that it does not use: the tables of channels are too short for its columns. */
    piece.slope = piece.offset = piece.center;
    if (used == 1)
        piece.scale = piece.shift = piece.center;
    call(run, run->reduce_op, FBN_NSC, &piece);
    add_columns(sums, piece.sum, row_samples, channels, plan->memory.span);
    add_columns(sums + job->C, piece.dot, row_samples, channels, plan->memory.span);
}

/* One tile of a group of channels. Tiles that come in order, one at a time, are added to the first: all their sums would not stay in the
 * core's cache. */
static void reduce_columns(const fbn_run *run, int64_t group, int64_t tile, int slot) {
    const fbn_plan *plan = &run->plan;
    const int64_t C = plan->job->C, first = group * plan->reduction.group_channels, channels = group_channels(plan, first);
    double *const totals = plan->scratch.sums + first;
    if (tile < plan->reduction.kept) {
        reduce_tile(run, totals + 2 * tile * C, group, tile, slot);
        return;
    }
    double *const sums = totals + 2 * C;
    reduce_tile(run, sums, group, tile, slot);
    for (int64_t i = 0; i < channels; i++) {
        totals[i] += sums[i];
        totals[C + i] += sums[C + i];
    }
}

/* ---- maps in the order of memory ---- */

static void map_block(const fbn_run *run, int64_t sample, int64_t count, int64_t c, int64_t channels, int64_t s, int64_t cols) {
    fbn_piece piece;
    fbn_piece_of_map(&piece, &run->plan, sample, count, c, channels, s, cols);
    call(run, run->map_op, run->plan.map.layout, &piece);
}

static void map_samples(const fbn_run *run, int64_t sample, int64_t count) {
    const fbn_job *job = run->plan.job;
    if (run->plan.map.layout == FBN_NSC || run->plan.memory.adjacent)
        map_block(run, sample, count, 0, job->C, 0, run->plan.memory.span);
    else
        for (int64_t c = 0; c < job->C; c++)
            map_block(run, sample, count, c, 1, 0, job->S);
}

static void map_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const fbn_plan *plan = &run->plan;
    const fbn_map_plan *map = &plan->map;
    const int64_t C = plan->job->C, span = plan->memory.span, samples = plan->memory.samples;
    (void)slot;
    const int64_t along_s = (span + map->chunk_cols - 1) / map->chunk_cols, along_c = (C + map->chunk_channels - 1) / map->chunk_channels;
    const int64_t s = index % along_s * map->chunk_cols, c = index / along_s % along_c * map->chunk_channels;
    const int64_t block = index / along_s / along_c, blocks = map->chunks / along_s / along_c / plan->memory.outer;
    const int64_t sample = block % blocks * map->chunk_samples, left = samples - sample;
    map_block(run, block / blocks * samples + sample, left < map->chunk_samples ? left : map->chunk_samples, c,
              C - c < map->chunk_channels ? C - c : map->chunk_channels, s, span - s < map->chunk_cols ? span - s : map->chunk_cols);
}

/* ---- the order of pieces ---- */

/* The pivots come from a kernel where values of neighboring channels lie side by side; it leaves them where the sums of the first tile will
 * be. */
static void set_pivots(const fbn_run *run, int64_t first, int64_t channels) {
    const fbn_plan *plan = &run->plan;
    const int by_columns = plan->job->x.c == 1, by_kernel = by_columns || plan->reduction.joined;
    double pivot[FBN_CHANNEL_BLOCK];
    if (by_kernel) {
        fbn_piece piece;
        if (by_columns)
            fbn_piece_of_rows(&piece, plan, run->sample.offset, run->sample.count, first, channels);
        else
            fbn_piece_of_planes(&piece, plan, first, channels, 0);
        call(run, FBN_PIVOT, by_columns ? FBN_NSC : FBN_NCS, &piece);
    }
    for (int64_t c = first; c < first + channels; c += FBN_CHANNEL_BLOCK) {
        const int64_t left = first + channels - c, count = left < FBN_CHANNEL_BLOCK ? left : FBN_CHANNEL_BLOCK;
        if (by_kernel)
            for (int64_t i = 0; i < count; i++)
                pivot[i] = fbn_finite_pivot(plan->scratch.sums[c + i]);
        else
            fbn_pivots(pivot, plan->job, &run->sample, c, count);
        fbn_set_constants(plan, FBN_CENTER, c, (int)count, pivot);
    }
}

/* The map of a group, backwards, from what its reduction left in the cache. */
static void map_group(const fbn_run *run, int64_t first, int64_t channels) {
    for (int64_t tile = run->plan.reduction.tiles - 1; tile >= 0; tile--)
        map_planes(run, first, channels, tile);
}

/* By columns, fused: reduction, arithmetic and map of a group of channels. */
static void columns_task(void *context, int64_t group, int slot) {
    const fbn_run *run = context;
    const fbn_plan *plan = &run->plan;
    const int64_t first = group * plan->reduction.group_channels, channels = group_channels(plan, first);
    if (run->reduce_op == FBN_STATS)
        set_pivots(run, first, channels);
    for (int64_t tile = 0; tile < plan->reduction.tiles; tile++)
        reduce_columns(run, group, tile, slot);
    run->finish(run, first, channels);
    map_block(run, 0, plan->memory.samples, first, channels, 0, plan->memory.span);
}

/* By planes, fused: reduction, arithmetic and map of the channels of one task, group by group. Interleaved, the map of a group runs inside
 * the reduction of the next; `mapped` is the first channel that has not been mapped. */
static void groups_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const fbn_plan *plan = &run->plan;
    const fbn_reduction_plan *reduction = &plan->reduction;
    const int64_t group = reduction->group_channels, start = index * reduction->task_channels;
    const int64_t stop = start + channels_from(plan, start, reduction->task_channels);
    int64_t mapped = start, sampled = start;
    (void)slot;
    for (int64_t first = start; first < stop; first += group) {
        const int64_t channels = stop - first < group ? stop - first : group;
        if (run->reduce_op == FBN_STATS && sampled < first + channels) {
            /* At least a block of channels at a time: the samples lie far apart, and the loads of many channels overlap. */
            const int64_t more = channels < FBN_CHANNEL_BLOCK ? FBN_CHANNEL_BLOCK : channels;
            const int64_t most = stop - first < more ? stop - first : more;
            set_pivots(run, sampled, first + most - sampled);
            sampled = first + most;
        }
        const int interleaved = reduction->interleaved && mapped < first && channels == group;
        for (int64_t tile = 0; tile < reduction->tiles; tile++) {
            if (interleaved)
                reduce_and_map(run, first, mapped, channels, tile);
            else
                reduce_planes(run, first, channels, tile);
            if (run->maps && run->independent)
                map_planes(run, first, channels, tile);
        }
        run->finish(run, first, channels);
        if (interleaved)
            mapped = first;
        else if (run->maps && !run->independent && !reduction->interleaved)
            map_group(run, first, channels);
    }
    for (; reduction->interleaved && mapped < stop; mapped += group)
        map_group(run, mapped, stop - mapped < group ? stop - mapped : group);
}

static void reduce_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const fbn_plan *plan = &run->plan;
    const int64_t tile = index / plan->reduction.groups, group = index % plan->reduction.groups;
    if (plan->reduction.layout == FBN_NSC) {
        reduce_columns(run, group, tile, slot);
        return;
    }
    const int64_t first = group * plan->reduction.group_channels;
    reduce_planes(run, first, group_channels(plan, first), tile);
}

/* A tile by columns, reduced and mapped together. */
static void tile_task(void *context, int64_t tile, int slot) {
    const fbn_run *run = context;
    int64_t count;
    const int64_t sample = fbn_tile_samples(&run->plan, tile, &count);
    for (int64_t group = 0; group < run->plan.reduction.groups; group++)
        reduce_columns(run, group, tile, slot);
    map_samples(run, sample, count);
}

/* Channels of a task that reads samples, which lie far apart, or does the arithmetic of channels. docs/numerics.md: tiles and tasks. */
enum { TASK_CHANNELS = 256 };

static void sample_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const int64_t first = index * TASK_CHANNELS;
    (void)slot;
    set_pivots(run, first, channels_from(&run->plan, first, TASK_CHANNELS));
}

static void finish_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const int64_t first = index * TASK_CHANNELS;
    (void)slot;
    run->finish(run, first, channels_from(&run->plan, first, TASK_CHANNELS));
}

/* No values: statistics and gradients are zero, the running statistics stay. */
static void execute_empty(const fbn_run *run) {
    const fbn_job *job = run->plan.job;
    const double zero = 0;
    for (int64_t c = 0; c < job->C; c++) {
        if (run->reduces && run->reduce_op == FBN_STATS)
            job->batch_mean[c] = job->batch_m2[c] = 0;
        if (run->reduces && job->sums != NULL)
            job->sums[c] = job->sums[job->C + c] = 0;
        fbn_scatter(&job->dweight, c, 1, &zero);
        fbn_scatter(&job->dbias, c, 1, &zero);
    }
}

static void tables_task(void *context, int64_t index, int slot) {
    (void)index, (void)slot;
    fill_tables(context);
}

/* The phases of a job that has values; returns how many. */
static int list_phases(fbn_phase *phases, const fbn_run *run) {
    const fbn_plan *plan = &run->plan;
    const fbn_reduction_plan *reduction = &plan->reduction;
    const int64_t C = plan->job->C;
    int count = 0;
    const int fused = run->reduces && reduction->fused;
    if (fused && reduction->layout == FBN_NSC && run->maps) {
        phases[count++] = (fbn_phase){columns_task, reduction->groups, 0};
        return count;
    }
    if (fused && reduction->layout == FBN_NCS) {
        phases[count++] = (fbn_phase){groups_task, (C + reduction->task_channels - 1) / reduction->task_channels, 0};
        return count;
    }
    const int together = run->maps && run->independent && reduction->layout == FBN_NSC && reduction->tiles >= plan->threads;
    if (run->reduces) {
        if (run->reduce_op == FBN_STATS)
            phases[count++] = (fbn_phase){sample_task, (C + TASK_CHANNELS - 1) / TASK_CHANNELS, 0};
        if (together) {
            if (plan->map.layout == FBN_NSC)
                phases[count++] = (fbn_phase){tables_task, 1, 0};
            phases[count++] = (fbn_phase){tile_task, reduction->tiles, 0};
        } else
            phases[count++] = (fbn_phase){reduce_task, reduction->tiles * reduction->groups, 0};
        phases[count++] = (fbn_phase){finish_task, (C + TASK_CHANNELS - 1) / TASK_CHANNELS, 0};
    }
    if (!run->maps || (run->reduces && together))
        return count;
    if (plan->map.layout == FBN_NSC)
        phases[count++] = (fbn_phase){tables_task, 1, 0};
    phases[count++] = (fbn_phase){map_task, plan->map.chunks, run->reduces};
    return count;
}

void fbn_execute(fbn_run *run) {
    const fbn_job *job = run->plan.job;
    fbn_phase phases[FBN_MOST_PHASES];
    FBN_ASSERT(!run->reduces || run->finish != NULL);
    FBN_ASSERT(!run->maps || job->out.data != NULL || job->N * job->C * job->S == 0);
    if (job->N * job->C * job->S == 0) {
        execute_empty(run);
        return;
    }
    if (run->reduces && run->reduce_op == FBN_STATS)
        run->sample = fbn_choose_sample(job);
    const int count = list_phases(phases, run);
    const int64_t start = job->choice.job ? fbn_nanoseconds() : 0;
    fbn_parallel(phases, count, run, run->plan.threads, job->on_team);
    if (start)
        fbn_tell_time(&job->choice, fbn_nanoseconds() - start);
}
