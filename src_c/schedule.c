/* Which kernel meets which piece, in which order. */
#include "schedule.h"
#include "channels.h"
#include "machine.h"

#include <stddef.h>
#include <string.h>

/* ---- pieces ---- */

static void *at(const fbn_tensor *tensor, int64_t bytes, int64_t n, int64_t c, int64_t s) {
    return tensor->data ? tensor->data + (n * tensor->n + c * tensor->c + s * tensor->s) * bytes : NULL;
}

/* A piece that begins at sample n, channel c, position s, its rows a step apart along n or along s. */
static fbn_piece piece_at(const fbn_run *run, int64_t n, int64_t c, int64_t s, int along_n, int64_t step) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const int64_t bytes = plan->bytes;
    return (fbn_piece){.out = at(&job->out, bytes, n, c, s),
                       .dresidual = at(&job->dresidual, bytes, n, c, s),
                       .dy = at(&job->dy, bytes, n, c, s),
                       .x = at(&job->x, bytes, n, c, s),
                       .residual = at(&job->residual, bytes, n, c, s),
                       .out_stride = step * (along_n ? job->out.n : job->out.s),
                       .dresidual_stride = step * (along_n ? job->dresidual.n : job->dresidual.s),
                       .dy_stride = step * (along_n ? job->dy.n : job->dy.s),
                       .x_stride = step * (along_n ? job->x.n : job->x.s),
                       .residual_stride = step * (along_n ? job->residual.n : job->residual.s),
                       .activation = job->activation,
                       .frozen = job->frozen,
                       .stream = plan->stream};
}

static void set_constants(fbn_piece *piece, char *const *values, int64_t bytes) {
    const void **constants[] = {&piece->center, &piece->scale, &piece->shift, &piece->slope, &piece->offset};
    for (int i = 0; i < 5; i++)
        *constants[i] = values[i] + bytes;
}

static void call(const fbn_run *run, fbn_op op, fbn_layout layout, const fbn_piece *piece) {
    run->plan.table->kernel[op][layout][run->plan.job->dtype](piece);
}

/* Tile `tile` of channel c and, in a map, of the channels behind it that lie side by side. */
static fbn_piece plane_piece(const fbn_run *run, int64_t c, int64_t channels, int64_t tile) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    int64_t n = tile * plan->tile_rows, s = 0, rows = job->N - n < plan->tile_rows ? job->N - n : plan->tile_rows, cols = job->S;
    if (job->S > FBN_PLANE_TILE) {
        const int64_t pieces = plan->tiles / job->N;
        n = tile / pieces;
        s = tile % pieces * FBN_PLANE_TILE;
        rows = 1;
        cols = job->S - s < FBN_PLANE_TILE ? job->S - s : FBN_PLANE_TILE;
    }
    fbn_piece piece = piece_at(run, n, c, s, 1, 1);
    set_constants(&piece, plan->constants, c * plan->constant_bytes);
    piece.rows = rows;
    piece.cols = channels * cols;
    piece.period = cols;
    piece.first = plan->sums + 2 * tile * job->C + c;
    piece.second = piece.first + job->C;
    /* What follows in a row is read next, unless another thread does. */
    if (plan->stream && plan->threads == 1 && cols == job->S)
        piece.ahead = channels * cols;
    return piece;
}

static void reduce_planes(const fbn_run *run, int64_t first, int64_t channels, int64_t tile) {
    for (int64_t c = first; c < first + channels; c++) {
        const fbn_piece piece = plane_piece(run, c, 1, tile);
        call(run, run->reduction, FBN_NCS, &piece);
    }
}

/* The channels of a group lie side by side, or are visited one by one. */
static void map_planes(const fbn_run *run, int64_t first, int64_t channels, int64_t tile) {
    const int64_t together = run->plan.adjacent && run->plan.job->S <= FBN_PLANE_TILE ? channels : 1;
    for (int64_t c = first; c < first + channels; c += together) {
        const fbn_piece piece = plane_piece(run, c, together, tile);
        call(run, run->map, FBN_NCS, &piece);
    }
}

/* The channels from `first` on are reduced beside the map of those from `mapped` on. */
static void reduce_and_map(const fbn_run *run, int64_t first, int64_t mapped, int64_t channels, int64_t tile) {
    for (int64_t i = 0; i < channels; i++) {
        const fbn_piece pieces[2] = {plane_piece(run, first + i, 1, tile), plane_piece(run, mapped + i, 1, tile)};
        call(run, run->reduction == FBN_STATS ? FBN_STATS_APPLY : FBN_GRAD_BOTH, FBN_NCS, pieces);
    }
}

/* Repeats the constants of channels first.. for every column of a row and, in a whole table, behind it; a table may be the constants
 * themselves. */
static void expand(const fbn_plan *plan, char *columns, const char *constants, int64_t channels, int64_t count) {
    const int64_t bytes = plan->constant_bytes, once = channels * plan->span;
    if (plan->span > 1)
        for (int64_t c = 0; c < channels; c++) {
            if (bytes == 8)
                for (int64_t s = 0; s < plan->span; s++)
                    ((double *)columns)[c * plan->span + s] = ((const double *)constants)[c];
            else
                for (int64_t s = 0; s < plan->span; s++)
                    ((float *)columns)[c * plan->span + s] = ((const float *)constants)[c];
        }
    else if (columns != constants)
        memcpy(columns, constants, (size_t)(once * bytes));
    for (int64_t done = once; done < count;) {
        const int64_t more = count - done < done ? count - done : done;
        memcpy(columns + done * bytes, columns, (size_t)(more * bytes));
        done += more;
    }
}

/* The slopes and offsets exist in a backward pass through the statistics of the batch only. */
static void fill_tables(const fbn_run *run) {
    const fbn_plan *plan = &run->plan;
    const int used = run->map == FBN_GRAD_INPUT && !plan->job->frozen ? 5 : 3;
    for (int i = 0; i < used && plan->map == FBN_NSC; i++)
        expand(plan, plan->tables[i], plan->constants[i], plan->job->C, plan->period + FBN_SPARE);
}

/* A sum over a row of columns, in lanes that a compiler can vectorise. */
static double sum_of(const double *values, int64_t count) {
    double lanes[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++)
            lanes[j] += values[i + j];
    for (int j = 0; i + j < count; j++)
        lanes[j] += values[i + j];
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* The sums of channels from those of the columns of K samples. */
static void add_columns(double *sums, const double *columns, int64_t K, int64_t channels, int64_t span) {
    for (int64_t c = 0; c < channels; c++)
        sums[c] = span == 1 ? columns[c] : sum_of(columns + c * span, span);
    for (int64_t k = 1; k < K; k++) {
        columns += channels * span;
        if (span == 1)
            for (int64_t c = 0; c < channels; c++)
                sums[c] += columns[c];
        else
            for (int64_t c = 0; c < channels; c++)
                sums[c] += sum_of(columns + c * span, span);
    }
}

/* Channels last has its samples in n and s; otherwise a sample is an n. */
static fbn_piece samples_at(const fbn_run *run, int64_t sample, int64_t c, int64_t step) {
    const fbn_job *job = run->plan.job;
    const int along_n = run->plan.span == job->S;
    return piece_at(run, along_n ? sample : sample / job->S, c, along_n ? 0 : sample % job->S, along_n, step);
}

/* The first sample of a tile and, in *count, how many there are. */
static int64_t tile_samples(const fbn_plan *plan, int64_t tile, int64_t *count) {
    const int64_t tiles = (plan->rows + plan->tile_rows - 1) / plan->tile_rows, row = tile % tiles * plan->tile_rows;
    if (plan->rest && tile == plan->tiles - 1) {
        *count = plan->rest;
        return plan->rows * plan->K;
    }
    *count = (plan->rows - row < plan->tile_rows ? plan->rows - row : plan->tile_rows) * plan->K;
    return tile / tiles * plan->samples + row * plan->K;
}

static void reduce_columns(const fbn_run *run, int64_t group, int64_t tile, int slot) {
    const fbn_plan *plan = &run->plan;
    const fbn_job *job = plan->job;
    const int64_t first = group * plan->group, channels = job->C - first < plan->group ? job->C - first : plan->group;
    int64_t count;
    const int64_t sample = tile_samples(plan, tile, &count), K = count < plan->K ? count : plan->K;
    fbn_piece piece = samples_at(run, sample, first, K);
    piece.rows = count / K;
    piece.cols = K * channels * plan->span;
    double *const sums = plan->sums + 2 * tile * job->C + first;
    set_constants(&piece, plan->constants, first * plan->constant_bytes);
    if (!plan->slot_columns) {
        piece.first = sums;
        piece.second = sums + job->C;
        call(run, run->reduction, FBN_NSC, &piece);
        return;
    }
    char *const scratch = plan->slots + slot * plan->slot_bytes;
    piece.first = (double *)scratch;
    piece.second = piece.first + piece.cols;
    const void **constants[] = {&piece.center, &piece.scale, &piece.shift};
    char *columns = scratch + plan->slot_columns * 2 * (int64_t)sizeof(double);
    const int wanted = run->reduction == FBN_STATS || job->activation == FBN_NO_ACTIVATION ? 1 : 3;
    for (int i = 0; i < wanted; i++, columns += (plan->slot_columns + FBN_SPARE) * plan->constant_bytes) {
        expand(plan, columns, *constants[i], channels, piece.cols);
        *constants[i] = columns;
    }
    call(run, run->reduction, FBN_NSC, &piece);
    for (int moment = 0; moment < 2; moment++)
        add_columns(sums + moment * job->C, piece.first + moment * piece.cols, K, channels, plan->span);
}

/* ---- maps in the order of memory ---- */

/* `count` samples of neighbouring channels, whole, or a part of the planes of one channel from s on. */
static void map_block(const fbn_run *run, int64_t sample, int64_t count, int64_t c, int64_t channels, int64_t s, int64_t cols) {
    const fbn_plan *plan = &run->plan;
    fbn_piece piece = plan->map == FBN_NSC ? samples_at(run, sample, c, 1) : piece_at(run, sample, c, s, 1, 1);
    piece.rows = count;
    piece.cols = channels * cols;
    if (plan->map == FBN_NSC) {
        set_constants(&piece, plan->tables, 0);
        piece.period = plan->period;
        if (plan->contiguous) {
            piece.rows = 1;
            piece.cols *= count;
        }
    } else {
        set_constants(&piece, plan->constants, c * plan->constant_bytes);
        piece.period = cols;
    }
    call(run, run->map, plan->map, &piece);
}

static void map_samples(const fbn_run *run, int64_t sample, int64_t count) {
    const fbn_job *job = run->plan.job;
    if (run->plan.map == FBN_NSC || run->plan.adjacent)
        map_block(run, sample, count, 0, job->C, 0, run->plan.span);
    else
        for (int64_t c = 0; c < job->C; c++)
            map_block(run, sample, count, c, 1, 0, job->S);
}

static void map_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const fbn_plan *plan = &run->plan;
    const int64_t C = plan->job->C, span = plan->span;
    (void)slot;
    /* Backwards, from what the reduction left in the cache. */
    if (run->reduces)
        index = plan->chunks - 1 - index;
    const int64_t along_s = (span + plan->chunk_cols - 1) / plan->chunk_cols,
                  along_c = (C + plan->chunk_channels - 1) / plan->chunk_channels;
    const int64_t s = index % along_s * plan->chunk_cols, c = index / along_s % along_c * plan->chunk_channels;
    const int64_t block = index / along_s / along_c, blocks = plan->chunks / along_s / along_c / plan->outer;
    const int64_t sample = block % blocks * plan->chunk_samples, left = plan->samples - sample;
    map_block(run, block / blocks * plan->samples + sample, left < plan->chunk_samples ? left : plan->chunk_samples, c,
              C - c < plan->chunk_channels ? C - c : plan->chunk_channels, s, span - s < plan->chunk_cols ? span - s : plan->chunk_cols);
}

/* ---- the order of pieces ---- */

static void center_on_sample(const fbn_run *run, int64_t first, int64_t channels) {
    double centre[FBN_CHANNELS];
    for (int64_t c = first; c < first + channels; c += FBN_CHANNELS) {
        const int64_t count = first + channels - c < FBN_CHANNELS ? first + channels - c : FBN_CHANNELS;
        fbn_sample_mean(centre, run->plan.job, &run->sample, c, count);
        fbn_set_constants(&run->plan, FBN_CENTER, c, (int)count, centre);
    }
}

static int64_t group_channels(const fbn_plan *plan, int64_t first) {
    const int64_t left = plan->job->C - first;
    return left < plan->group ? left : plan->group;
}

/* Backwards, from what the reduction left in the cache. */
static void map_group(const fbn_run *run, int64_t first, int64_t channels) {
    for (int64_t tile = run->plan.tiles - 1; tile >= 0; tile--)
        map_planes(run, first, channels, tile);
}

/* By planes: everything that is to be done to some groups of channels, one group after the other, or the map of one beside the reduction of
 * the next. */
static void groups_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const fbn_plan *plan = &run->plan;
    const int64_t start = index * plan->stride, left = plan->job->C - start, stop = start + (left < plan->stride ? left : plan->stride);
    int64_t mapped = start;
    (void)slot;
    for (int64_t first = start, sampled = start; first < stop; first += plan->group) {
        const int64_t channels = stop - first < plan->group ? stop - first : plan->group;
        if (run->reduction == FBN_STATS && sampled < first + channels) {
            /* More than this group, because the values lie far apart and arrive together. */
            const int64_t more = channels < FBN_CHANNELS ? FBN_CHANNELS : channels, most = stop - first < more ? stop - first : more;
            center_on_sample(run, sampled, first + most - sampled);
            sampled = first + most;
        }
        const int together = plan->beside && mapped < first && channels == plan->group;
        for (int64_t tile = 0; tile < plan->tiles; tile++) {
            if (together)
                reduce_and_map(run, first, mapped, channels, tile);
            else
                reduce_planes(run, first, channels, tile);
            if (run->maps && run->independent)
                map_planes(run, first, channels, tile);
        }
        run->finish(run, first, channels);
        if (together)
            mapped = first;
        else if (run->maps && !run->independent && !plan->beside)
            map_group(run, first, channels);
    }
    for (; plan->beside && mapped < stop; mapped += plan->group)
        map_group(run, mapped, stop - mapped < plan->group ? stop - mapped : plan->group);
}

static void reduce_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const fbn_plan *plan = &run->plan;
    const int64_t tile = index / plan->groups, group = index % plan->groups;
    if (plan->reduction == FBN_NSC) {
        reduce_columns(run, group, tile, slot);
        return;
    }
    const int64_t first = group * plan->group, channels = group_channels(plan, first);
    reduce_planes(run, first, channels, tile);
}

/* A tile by columns, reduced and mapped together. */
static void tile_task(void *context, int64_t tile, int slot) {
    const fbn_run *run = context;
    int64_t count;
    const int64_t sample = tile_samples(&run->plan, tile, &count);
    for (int64_t group = 0; group < run->plan.groups; group++)
        reduce_columns(run, group, tile, slot);
    map_samples(run, sample, count);
}

/* Reading samples from afar takes time: channels are shared out, but not a few of them. */
enum { SAMPLED = 256 };

static void sample_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const int64_t first = index * SAMPLED, left = run->plan.job->C - first;
    (void)slot;
    center_on_sample(run, first, left < SAMPLED ? left : SAMPLED);
}

static void finish_task(void *context, int64_t index, int slot) {
    const fbn_run *run = context;
    const int64_t first = index * FBN_CHANNELS, left = run->plan.job->C - first;
    (void)slot;
    run->finish(run, first, left < FBN_CHANNELS ? left : FBN_CHANNELS);
}

/* No values: statistics and gradients are zero, the running statistics stay. */
static void execute_empty(const fbn_run *run) {
    const fbn_job *job = run->plan.job;
    const double nothing = 0;
    for (int64_t c = 0; c < job->C; c++) {
        if (run->reduces && run->reduction == FBN_STATS)
            job->batch_mean[c] = job->batch_m2[c] = 0;
        if (run->reduces && job->sums != NULL)
            job->sums[c] = job->sums[job->C + c] = 0;
        fbn_scatter(&job->dweight, c, 1, &nothing);
        fbn_scatter(&job->dbias, c, 1, &nothing);
    }
}

void fbn_execute(fbn_run *run) {
    const fbn_plan *plan = &run->plan;
    const int64_t C = plan->job->C;
    if (plan->job->N * C * plan->job->S == 0) {
        execute_empty(run);
        return;
    }
    if (run->reduces && run->reduction == FBN_STATS)
        run->sample = fbn_sample_of(plan->job);
    if (run->reduces && plan->fused) {
        fbn_parallel(groups_task, run, (C + plan->stride - 1) / plan->stride, plan->threads);
        return;
    }
    const int together = run->maps && run->independent && plan->reduction == FBN_NSC && plan->tiles >= plan->threads;
    if (run->reduces) {
        if (run->reduction == FBN_STATS)
            fbn_parallel(sample_task, run, (C + SAMPLED - 1) / SAMPLED, plan->threads);
        if (together) {
            fill_tables(run);
            fbn_parallel(tile_task, run, plan->tiles, plan->threads);
        } else
            fbn_parallel(reduce_task, run, plan->tiles * plan->groups, plan->threads);
        fbn_parallel(finish_task, run, (C + FBN_CHANNELS - 1) / FBN_CHANNELS, plan->threads);
    }
    if (!run->maps || (run->reduces && together))
        return;
    fill_tables(run);
    fbn_parallel(map_task, run, plan->chunks, plan->threads);
}
