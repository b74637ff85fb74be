/* How one job is cut into pieces. Private to src_c. */
#ifndef FASTBN_PLAN_H
#define FASTBN_PLAN_H

#include "kernels.h"

/* A job has a reduction, a map or both. Each visits the tensor in one of two ways, and the two are chosen independently.
 *
 * By planes (layout ncs): the rows of a channel are its planes of S elements. Tile t of a channel is a run of planes or a part of one. A
 * map takes the planes of neighboring channels as one run of memory where they lie side by side.
 *
 * By columns (layout nsc): a sample is C channels of `span` elements side by side: channels last (span 1), and channels first with planes
 * too small to visit one by one (span S). In a reduction a row holds `row_samples` samples, each column in a sum of its own; tile t is a
 * run of rows, and the samples that do not fill a row are a last tile.
 *
 * What decides the order of additions (row_samples and the tiles) depends on shape and memory order only. How the work is shared out may
 * depend on the machine. docs/numerics.md: tiles and tasks. */

/* How the tensors lie in memory. */
typedef struct {
    int adjacent;           /* channels first, and the planes of neighboring channels lie side by side */
    int64_t span;           /* elements of a sample that belong to one channel */
    int64_t outer, samples; /* `samples` evenly spaced samples in each of `outer` places */
    int contiguous;         /* no gap between samples */
} fbn_memory_order;

typedef struct {
    fbn_layout layout;
    int64_t tiles, tile_rows;       /* of each channel */
    int64_t kept;                   /* tiles whose sums are kept until all are added up; 1 where each is added as it comes */
    int64_t row_samples;            /* by columns: samples in a row, */
    int64_t full_rows, left_over;   /* the full rows in each outer place, and the samples that fill none */
    int64_t prefetch;               /* elements, as in a piece, or 0 */
    int64_t rows_ahead;             /* by planes: rows, or 0 */
    int outgrows;                   /* by columns: what is read is more than half of the last cache */
    int64_t group_channels, groups; /* channels that are reduced together, and how many such groups there are */
    int joined;                     /* by planes: short planes of neighboring channels lie side by side and are reduced together */
    int fused;                      /* the map of a group, by planes, follows its reduction, while it is in the core's cache */
    int in_first;                   /* by planes: what a group reads and writes fits the level-1 cache of a core */
    int interleaved;                /* by planes, fused, and one kernel maps a group while it reduces the next */
    int64_t task_channels;          /* by planes, fused: channels of a task */
} fbn_reduction_plan;

typedef struct {
    fbn_layout layout;
    int64_t period;                                    /* by columns: values of a table of constants */
    int group_ahead;                                   /* after a reduction by columns: prefetches the next group */
    int64_t chunk_samples, chunk_channels, chunk_cols; /* a task: so many samples, channels and elements of a channel's plane */
    int64_t chunks;
} fbn_map_plan;

/* Memory of the caller, shared out. */
typedef struct {
    double *sums;       /* [kept][2][C]: sum and dot of every tile; where not all are kept, one more for the tile that comes */
    char *constants[5]; /* [C] each, by fbn_constant */
    char *tables[5];    /* map by columns: the same, repeated up to `period` */
    char *areas;        /* one for each thread: sums and constants of the columns of a row */
    int64_t area_bytes, area_columns;
} fbn_scratch;

typedef enum { FBN_CENTER, FBN_SCALE, FBN_SHIFT, FBN_SLOPE, FBN_OFFSET } fbn_constant;

typedef struct {
    const fbn_job *job;
    const fbn_kernels *kernels;
    int64_t element_bytes, constant_bytes;
    int64_t bytes;  /* of all tensors */
    int threads;    /* of the job, or 1 where it is small */
    int stream;     /* of the way that was chosen: maps store past the last cache, reductions prefetch more */
    int in_core;    /* the cores of the job's threads cache all tensors */
    int outgrows;   /* the tensors are more than the last cache keeps of them, whether the job streams or not */
    int short_rows; /* by columns: rows are short and lie apart */
    int map_only;   /* nothing to add up: inference, or dx alone through frozen statistics */
    fbn_memory_order memory;
    fbn_reduction_plan reduction;
    fbn_map_plan map;
    fbn_scratch scratch;
} fbn_plan;

/* Elements of a tile by planes: a plane longer than this is visited in parts. docs/numerics.md: tiles and tasks. */
enum { FBN_PLANE_TILE = 16384 };

/* Plans a job and lays its scratch out from `work`, which may be NULL; returns the bytes of scratch. */
int64_t fbn_plan_job(fbn_plan *plan, const fbn_job *job, void *work);

#endif
