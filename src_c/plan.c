/* From shape, strides and caches to tiles. */
#include "plan.h"
#include "choices.h"
#include "debug.h"
#include "machine.h"

#include <stddef.h>
#include <stdlib.h>

/* docs/numerics.md, tiles and tasks, says for each where it comes from. Those of the first block decide the order of additions: another
 * value gives other bits. */
enum {
    COLUMN_TILE = 65536, /* elements of a tile by columns, */
    COLUMN_TILES = 64,   /* or fewer, for so many tiles, */
    LEAST_TILE = 16384,  /* but so many at least, */
    LEAST_ROWS = 128,    /* and no fewer rows than this, */
    LEAST_JOINED = 64,   /* or than this where rows are joined samples and the elements of a place fewer than */
    FEW = 1 << 20,       /* so many */
    JOINED_ROW = 512,    /* short samples that fill no whole vectors are joined to rows of about so many columns, */
    LONG_ROW = 2048,     /* or of so many where the elements of a place number at least */
    LARGE = 1 << 21,     /* so many */
    FEW_SAMPLES = 16,    /* short planes are reduced by columns unless there are fewer samples than this */

    LEAST_PLANE = FBN_MOST_LANES, /* planes shorter than a vector are mapped by columns */
    MOST_COLUMNS = 4096,          /* columns of a group of a reduction by columns, */
    LEAST_GROUP = 128,            /* and as few where several threads share them */
    LEAST_RUN = 512,              /* columns of a group that is mapped after its reduction */
    LONG_RUN = 2048,              /* by planes: elements of neighboring channels that are mapped as one run */
    PREFETCH = 4096,              /* bytes from what a reduction reads to what it prefetches */
    SHORT_ROW = 256,              /* bytes of rows apart from which on they are not short */
    LEAST_CHUNK = 8192,           /* elements of a task of a map, */
    MOST_CHUNK = 65536,           /* and as many on one thread, */
    STREAM_CHUNK = 262144,        /* or so many where it streams, */
    STREAM_CHUNKS = 16,           /* where that leaves so many tasks to each thread, */
    TASKS_OF_THREAD = 4,          /* or so many tasks for each thread */

    PER_THREAD = 150,     /* nanoseconds that a thread more costs a call, */
    LEAST_WORK = 3000,    /* that the work of one thread takes where a second pays, */
    CERTAIN_SHARE = 20000 /* and that of each of several where they pay without a doubt */
};

#define BYTES(DTYPE, name, type) [FBN_##DTYPE] = (int64_t)sizeof(type),
static const int64_t element_bytes[FBN_DTYPES] = {FBN_EACH_DTYPE(BYTES)};

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static int64_t ceil_div(int64_t whole, int64_t part) {
    return (whole + part - 1) / part;
}
/* The next multiple of a cache line. */
static int64_t aligned(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

/* So many times what stays in the cache, tensors are stored past it without a look at how long it takes. docs/numerics.md: choices. */
enum { CERTAINLY_LARGE = 4 };

typedef int64_t stride_of(const fbn_tensor *tensor);
static int64_t n_stride(const fbn_tensor *tensor) {
    return tensor->n;
}
static int64_t c_stride(const fbn_tensor *tensor) {
    return tensor->c;
}
static int64_t s_stride(const fbn_tensor *tensor) {
    return tensor->s;
}
static int64_t one_element(const fbn_tensor *tensor) {
    (void)tensor;
    return 1;
}

/* Whether stride `a` is `times` stride `b` in every tensor of the job. */
static int all_strides(const fbn_job *job, stride_of *a, int64_t times, stride_of *b) {
    const fbn_tensor *const tensors[] = {&job->x, &job->out, &job->dy, &job->residual, &job->dresidual};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        if (tensors[i]->data != NULL && a(tensors[i]) != times * b(tensors[i]))
            return 0;
    return 1;
}

/* Bytes of all tensors that a job reads or writes. */
static int64_t traffic(const fbn_job *job, int64_t bytes) {
    const fbn_tensor *const tensors[] = {&job->x, &job->out, &job->dy, &job->residual, &job->dresidual};
    int64_t count = 0;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        count += tensors[i]->data != NULL;
    return count * job->N * job->C * job->S * bytes;
}

/* Bytes of a job that stay in the last cache. What a reduction reads leaves less room for what its map writes. docs/numerics.md: streaming
 * stores. */
static int64_t most_cached(const fbn_plan *plan) {
    return fbn_last_cache() / (plan->map_only ? 2 : 3);
}

/* About the nanoseconds that one thread takes, by the picoseconds for an element. */
static int64_t work_of(const fbn_plan *plan) {
    const fbn_job *job = plan->job;
    const int64_t an_element = job->out.data == NULL ? 100 : plan->map_only ? 130 : job->dy.data == NULL ? 220 : 350;
    return job->N * job->C * job->S / 8 * an_element / 125;
}

/* The threads with which work / threads + threads * PER_THREAD is least. */
static int deserved_threads(const fbn_plan *plan) {
    const int64_t work = work_of(plan);
    int threads = 1;
    while (work >= LEAST_WORK && threads < plan->job->threads && (int64_t)(threads + 1) * (threads + 1) * PER_THREAD <= work)
        threads++;
    return threads;
}

static int is_in_place(const fbn_job *job) {
    return job->out.data != NULL && (job->out.data == job->x.data || job->out.data == job->dy.data || job->out.data == job->residual.data);
}

/* The way that follows from sizes alone. */
static fbn_way usual_way(const fbn_plan *plan) {
    return (fbn_way){deserved_threads(plan), !is_in_place(plan->job) && plan->outgrows};
}

/* Lists the ways of running a job that are worth comparing, those first that take less of the machine; returns how many. */
static int list_ways(const fbn_plan *plan, fbn_way *ways) {
    const fbn_way usual = usual_way(plan);
    const int most = usual.threads, stream = usual.stream;
    const int compare_stores = plan->job->out.data != NULL && !is_in_place(plan->job) && plan->bytes > 2 * fbn_core_cache() &&
                               plan->bytes <= CERTAINLY_LARGE * most_cached(plan);
    const int compare_threads = most > 1 && work_of(plan) < (int64_t)most * CERTAIN_SHARE;
    int count = 0;
    if (compare_threads)
        ways[count++] = (fbn_way){1, compare_stores ? 0 : stream};
    if (compare_threads && !compare_stores && most > 3)
        ways[count++] = (fbn_way){most / 2, stream};
    ways[count++] = (fbn_way){most, compare_stores ? 0 : stream};
    if (compare_stores)
        ways[count++] = (fbn_way){most, 1};
    FBN_ASSERT(count <= FBN_MOST_WAYS);
    return count;
}

static void find_memory_order(fbn_memory_order *memory, const fbn_job *job, int channels_last) {
    memory->adjacent = !channels_last && all_strides(job, c_stride, job->S, one_element);
    memory->span = channels_last ? 1 : job->S;
    memory->outer = 1;
    memory->samples = job->N;
    memory->contiguous = all_strides(job, n_stride, job->C * memory->span, one_element);
    if (channels_last && job->S > 1) {
        const int joined = all_strides(job, n_stride, job->S, s_stride);
        memory->outer = joined ? 1 : job->N;
        memory->samples = joined ? job->N * job->S : job->S;
        memory->contiguous = joined && all_strides(job, s_stride, job->C, one_element);
    }
}

/* Bytes of a channel that a reduction reads. */
static int64_t channel_bytes(const fbn_plan *plan) {
    const fbn_job *job = plan->job;
    return job->N * job->S * plan->element_bytes * (job->dy.data ? 2 : 1);
}

/* Channels of which half the core's cache holds what a reduction reads. */
static int64_t channels_in_core(const fbn_plan *plan) {
    return fbn_core_cache() / 2 / channel_bytes(plan);
}

static void plan_reduction_by_planes(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    fbn_reduction_plan *reduction = &plan->reduction;
    const int64_t channel = job->N * job->S;
    const int64_t in_core = channels_in_core(plan), in_first = fbn_first_cache() / (plan->bytes / job->C);
    reduction->layout = FBN_NCS;
    reduction->tile_rows = larger(1, FBN_PLANE_TILE / job->S);
    reduction->tiles = job->S <= FBN_PLANE_TILE ? ceil_div(job->N, reduction->tile_rows) : job->N * ceil_div(job->S, FBN_PLANE_TILE);
    /* A short plane is better mapped in one run of memory with its neighbors. */
    reduction->joined = plan->memory.adjacent && job->S < FBN_SHORT_PLANE;
    reduction->in_first = job->S >= FBN_SHORT_PLANE && in_first > 0;
    reduction->interleaved = job->S >= FBN_SHORT_PLANE && !reduction->in_first && in_core >= 2 && job->out.data != NULL && !job->frozen;
    int64_t group = in_first;
    if (reduction->joined)
        group = plan->threads == 1 ? in_core : smaller(larger(ceil_div(LONG_RUN, job->S), in_first), in_core);
    if (plan->threads > 1 && !reduction->in_first)
        group = larger(group, smaller(FBN_PLANE_TILE, channel * job->C / plan->threads) / channel);
    reduction->group_channels = smaller(larger(1, group), job->C);
    reduction->groups = ceil_div(job->C, reduction->group_channels);
    if (reduction->in_first)
        reduction->prefetch = plan->memory.adjacent && plan->bytes > fbn_last_cache() ? reduction->group_channels * job->S : 0;
    else if (plan->stream)
        reduction->rows_ahead = ceil_div(job->N * PREFETCH, channel_bytes(plan));
    reduction->fused = plan->threads == 1 || reduction->groups >= 4 * plan->threads;
    reduction->task_channels = plan->threads > 1 ? reduction->group_channels * larger(1, reduction->groups / (4 * plan->threads)) : job->C;
}

/* How many samples are joined to a row of a reduction: to half of the most columns of a narrow row where that comes out even, else to as
 * many as are narrow and fill whole vectors of any instruction set, else, short ones, to a long row. */
static int64_t samples_of_row(const fbn_plan *plan, int64_t sample) {
    if (FBN_NARROW_ROW / 2 % sample == 0)
        return FBN_NARROW_ROW / 2 / sample;
    for (int64_t count = FBN_NARROW_ROW / sample; count > 0; count--)
        if (count * sample % FBN_MOST_LANES == 0)
            return count;
    if (sample > FBN_NARROW_ROW)
        return 1;
    return (plan->memory.samples * sample < LARGE ? JOINED_ROW : LONG_ROW) / sample;
}

/* Planes of tensors whose map streams, reduced by columns and mapped by planes: a group of channels is mapped while the core's cache
 * has it, if it fits there in rows that are not too short. docs/numerics.md: tiles and tasks. */
static void fuse_columns(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    fbn_reduction_plan *reduction = &plan->reduction;
    if (!plan->stream || !plan->memory.adjacent || reduction->row_samples > 1 || job->out.data == NULL || job->frozen)
        return;
    const int64_t group = smaller(reduction->group_channels, channels_in_core(plan)), groups = ceil_div(job->C, larger(1, group));
    if (group * job->S < LEAST_RUN || (plan->threads > 1 && groups < 4 * plan->threads))
        return;
    reduction->group_channels = group;
    reduction->groups = groups;
    reduction->fused = 1;
    const int is_crowded = job->x.n * plan->element_bytes % 4096 == 0;
    plan->map.group_ahead = job->dy.data == NULL || (plan->bytes > fbn_last_cache() && !is_crowded);
}

static void plan_reduction_by_columns(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    const fbn_memory_order *memory = &plan->memory;
    fbn_reduction_plan *reduction = &plan->reduction;
    const int64_t sample = job->C * memory->span;
    reduction->layout = FBN_NSC;
    reduction->row_samples = memory->contiguous ? larger(1, smaller(samples_of_row(plan, sample), memory->samples / FBN_BLOCK_ROWS)) : 1;
    reduction->full_rows = memory->samples / reduction->row_samples;
    reduction->left_over = memory->samples % reduction->row_samples;
    const int64_t row = reduction->row_samples * sample, elements = job->N * job->C * job->S;
    const int64_t tile = smaller(COLUMN_TILE, larger(LEAST_TILE, elements / COLUMN_TILES));
    const int64_t least_rows = reduction->row_samples > 1 && elements < FEW ? LEAST_JOINED : LEAST_ROWS;
    reduction->tile_rows = larger(least_rows, tile / row / FBN_BLOCK_ROWS * FBN_BLOCK_ROWS);
    reduction->tiles = memory->outer * ceil_div(reduction->full_rows, reduction->tile_rows) + (reduction->left_over > 0);
    int64_t group = job->C;
    if (reduction->row_samples == 1) {
        group = smaller(job->C, larger(1, MOST_COLUMNS / memory->span));
        if (plan->threads > 1) {
            const int64_t of_thread = ceil_div(job->C, ceil_div(2 * plan->threads, reduction->tiles));
            group = smaller(group, larger(ceil_div(LEAST_GROUP, memory->span), of_thread));
        }
    }
    reduction->group_channels = group;
    reduction->groups = ceil_div(job->C, group);
    reduction->prefetch = job->C * channel_bytes(plan) > fbn_core_cache() ? PREFETCH / plan->element_bytes : 0;
    reduction->outgrows = job->C * channel_bytes(plan) > fbn_last_cache() / 2;
    fuse_columns(plan);
    group = reduction->group_channels;
    if (reduction->row_samples * memory->span > 1)
        plan->scratch.area_columns = reduction->row_samples * group * memory->span;
}

/* Columns after which the constants of a map repeat: whole vectors of any instruction set if they are not many. */
static int64_t period_of_map(int64_t sample, int64_t samples) {
    int64_t unit = sample;
    while (unit % FBN_MOST_LANES != 0)
        unit += sample;
    if (unit > 2 * JOINED_ROW || unit > sample * samples)
        unit = sample;
    return unit * larger(1, smaller(ceil_div(JOINED_ROW, unit), sample * samples / unit));
}

static void plan_map(fbn_plan *plan) {
    const fbn_memory_order *memory = &plan->memory;
    fbn_map_plan *map = &plan->map;
    const int64_t C = plan->job->C, channel = memory->span, sample = C * channel;
    const int64_t share = ceil_div(plan->job->N * C * plan->job->S, plan->threads);
    const int64_t most = plan->stream ? larger(MOST_CHUNK, smaller(STREAM_CHUNK, share / STREAM_CHUNKS)) : MOST_CHUNK;
    const int64_t chunk = plan->threads == 1 ? most : smaller(most, larger(smaller(LEAST_CHUNK, share), share / TASKS_OF_THREAD));
    map->chunk_samples = 1;
    map->chunk_channels = 1;
    map->chunk_cols = channel;
    if (map->layout == FBN_NSC || (memory->adjacent && sample <= chunk)) {
        map->chunk_samples = larger(1, chunk / sample);
        map->chunk_channels = C;
    } else if (memory->adjacent && channel <= chunk)
        map->chunk_channels = chunk / channel;
    else if (channel <= chunk && llabs(plan->job->out.n) < llabs(plan->job->out.c))
        map->chunk_samples = chunk / channel;
    else
        map->chunk_cols = smaller(chunk, channel);
    map->chunks = memory->outer * ceil_div(memory->samples, map->chunk_samples) * ceil_div(C, map->chunk_channels) *
                  ceil_div(channel, map->chunk_cols);
    if (map->layout == FBN_NSC)
        map->period = memory->contiguous ? period_of_map(sample, memory->samples) : sample;
}

/* Whether the sums of all tiles wait for the last of them. Those by columns that one thread has one after the other are added as they come,
 * if they would drive what comes next out of the core's cache. */
static int keeps_tiles(const fbn_plan *plan) {
    const fbn_reduction_plan *reduction = &plan->reduction;
    return reduction->layout == FBN_NCS || plan->threads > 1 || reduction->tiles * plan->job->C * 16 <= fbn_core_cache() / 4;
}

/* Which way each of the two visits a tensor with values. */
static void cut(fbn_plan *plan) {
    const fbn_job *job = plan->job;
    const int channels_last = all_strides(job, c_stride, 1, one_element) && (job->S == 1 || !all_strides(job, s_stride, 1, one_element));
    FBN_ASSERT(channels_last || job->S == 1 || all_strides(job, s_stride, 1, one_element));
    find_memory_order(&plan->memory, job, channels_last);
    const int adjacent = plan->memory.adjacent;
    if (channels_last || (adjacent && job->S < FBN_SHORT_PLANE && job->N >= FEW_SAMPLES))
        plan_reduction_by_columns(plan);
    else
        plan_reduction_by_planes(plan);
    plan->map.layout = channels_last || (adjacent && job->S < LEAST_PLANE) ? FBN_NSC : FBN_NCS;
    plan_map(plan);
    if (plan->map.layout == FBN_NSC) {
        plan->reduction.fused = 0;
        const int64_t row = job->C * plan->memory.span * plan->element_bytes;
        plan->short_rows = !plan->memory.contiguous && row < SHORT_ROW;
        if (plan->short_rows && !plan->in_core && plan->element_bytes >= 4 && row % 64 != 0)
            plan->kernels = fbn_table_of_short_rows();
    }
    plan->reduction.kept = keeps_tiles(plan) ? plan->reduction.tiles : 1;
}

/* A map by columns begins its vectors with the first line that `out` fills alone, or with a short row: there the tables begin a line. */
static uintptr_t shift_of_tables(const fbn_plan *plan) {
    if (plan->map.period == 0 || plan->short_rows)
        return 0;
    const uintptr_t head = -(uintptr_t)plan->job->out.data % 64 / (uintptr_t)plan->element_bytes;
    return -(head * (uintptr_t)plan->constant_bytes) % 64;
}

/* Lays the scratch out from `work` and returns its bytes. Addresses are integers here, because `work` may be NULL. */
static int64_t lay_out(fbn_plan *plan, void *work) {
    fbn_scratch *scratch = &plan->scratch;
    const int64_t C = plan->job->C, constant = plan->constant_bytes;
    const uintptr_t shift = shift_of_tables(plan);
    const uintptr_t first = ((uintptr_t)work + 63) / 64 * 64;
    uintptr_t next = first;
    scratch->sums = (double *)next;
    const int64_t tables = plan->reduction.kept + (plan->reduction.kept < plan->reduction.tiles);
    next += (uintptr_t)aligned(tables * C * 2 * 8);
    for (int i = 0; i < 5; i++) {
        scratch->constants[i] = (char *)(next + shift);
        next += (uintptr_t)aligned((C + FBN_TABLE_PADDING) * constant) + 64;
    }
    for (int i = 0; i < 5 && plan->map.period; i++) {
        scratch->tables[i] = scratch->constants[i];
        if (plan->map.period == C)
            continue;
        scratch->tables[i] = (char *)(next + shift);
        next += (uintptr_t)aligned((plan->map.period + FBN_TABLE_PADDING) * constant) + 64;
    }
    scratch->areas = (char *)next;
    if (scratch->area_columns)
        scratch->area_bytes = aligned(scratch->area_columns * 2 * 8 + 3 * (scratch->area_columns + FBN_TABLE_PADDING) * constant);
    return (int64_t)(next - first) + plan->threads * scratch->area_bytes + 63;
}

/* What does not depend on the way that a job is run. */
static void begin_plan(fbn_plan *plan, const fbn_job *job) {
    FBN_ASSERT(job->N >= 0 && job->C >= 0 && job->S >= 0);
    FBN_ASSERT((unsigned)job->dtype < FBN_DTYPES && (unsigned)job->activation <= FBN_RELU6);
    FBN_ASSERT(job->threads >= 1);
    *plan = (fbn_plan){.job = job, .kernels = fbn_table()};
    FBN_ASSERT(job->N * job->C * job->S == 0 || job->x.data != NULL);
    plan->element_bytes = element_bytes[job->dtype];
    plan->constant_bytes = job->dtype == FBN_FLOAT64 ? 8 : 4;
    plan->map_only = job->out.data != NULL &&
                     (job->dy.data ? job->frozen && job->dweight.data == NULL && job->dbias.data == NULL : job->batch_mean == NULL);
    plan->bytes = traffic(job, plan->element_bytes);
    plan->outgrows = plan->bytes > most_cached(plan);
}

int64_t fbn_plan_job(fbn_plan *plan, const fbn_job *job, void *work) {
    begin_plan(plan, job);
    const fbn_way way = job->choice.threads ? (fbn_way){job->choice.threads, job->choice.stream} : usual_way(plan);
    FBN_ASSERT(way.threads >= 1 && way.threads <= job->threads);
    plan->threads = way.threads;
    plan->stream = way.stream;
    plan->in_core = plan->bytes <= plan->threads * fbn_core_cache();
    if (job->N * job->C * job->S > 0)
        cut(plan);
    return lay_out(plan, work);
}

/* A name for jobs that take the same time: 64 bits of everything that matters to it. */
static uint64_t name_of_job(const fbn_job *job) {
    const int64_t facts[] = {job->N,
                             job->C,
                             job->S,
                             job->dtype,
                             job->activation,
                             job->frozen,
                             job->threads,
                             job->on_team,
                             job->x.n,
                             job->x.c,
                             job->x.s,
                             job->batch_mean != NULL,
                             job->out.data != NULL,
                             job->dy.data != NULL,
                             job->residual.data != NULL,
                             job->dresidual.data != NULL,
                             job->dweight.data != NULL,
                             job->sums != NULL,
                             is_in_place(job)};
    uint64_t name = 0;
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
        name = (name ^ (uint64_t)facts[i]) * 0x9e3779b97f4a7c15;
        name ^= name >> 29;
    }
    return name | 1;
}

void fbn_choose(fbn_job *job) {
    fbn_plan plan;
    fbn_way ways[FBN_MOST_WAYS];
    begin_plan(&plan, job);
    const int count = list_ways(&plan, ways);
    job->choice = fbn_choose_way(count > 1 ? name_of_job(job) : 0, ways, count);
}

void fbn_describe(fbn_description *description, const fbn_job *job) {
    fbn_plan plan;
    fbn_way ways[FBN_MOST_WAYS] = {{0, 0}};
    fbn_job chosen = *job;
    chosen.choice.threads = 0;
    fbn_plan_job(&plan, &chosen, NULL);
    const int count = list_ways(&plan, ways);
    *description = (fbn_description){.ways = count};
    for (int i = 0; i < count; i++) {
        description->way_threads[i] = ways[i].threads;
        description->way_streams[i] = ways[i].stream;
    }
    if (count > 1) {
        const int kept = fbn_kept_way(name_of_job(job), count, description->way_nanoseconds);
        if (kept >= 0)
            chosen.choice = (fbn_choice){.threads = ways[kept].threads, .stream = ways[kept].stream};
        fbn_plan_job(&plan, &chosen, NULL);
    }
    description->threads = plan.threads;
    description->streams = plan.stream;
    description->reduces_by_columns = plan.reduction.layout == FBN_NSC;
    description->maps_by_columns = plan.map.layout == FBN_NSC;
    description->fused = plan.reduction.fused;
    description->bytes = plan.bytes;
    description->most_bytes = most_cached(&plan);
    description->core_cache = fbn_core_cache();
    description->last_cache = fbn_last_cache();
}
