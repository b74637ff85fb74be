/* How one job is cut into pieces. Private to src_c. */
#ifndef FASTBN_PLAN_H
#define FASTBN_PLAN_H

#include "kernels.h"

#include <math.h>

/* Two ways to walk a tensor, chosen apart for the reduction and for the map of a job.
 *
 * By planes (layout ncs): a channel's rows are its planes of S elements. Tile t of a channel is a run of planes or a part of one. A map
 * takes the planes of neighbouring channels as one run of memory where they lie side by side. By columns (layout nsc): a sample is C
 * channels of `span` elements side by side: channels last (span 1), and channels first with planes too small to visit one by one (span S).
 * In a reduction a row holds K samples, each column in a sum of its own; tile t is a run of rows, and the samples that do not fill a row
 * follow as a last tile.
 *
 * What decides the order of additions, K and the tiles, depends on shape and memory order only; how the work is shared out may depend on
 * the machine.
 */
typedef struct {
    const fbn_job *job;
    const fbn_kernels *table;
    int64_t bytes, constant_bytes; /* of an element, of a constant */
    int threads, stream;

    fbn_layout reduction, map;
    int adjacent;             /* by planes: neighbouring channels lie side by side */
    int64_t span;             /* by columns */
    int64_t outer, samples;   /* by columns: `samples` evenly spaced samples in each of `outer` places */
    int contiguous;           /* by columns: no gap between samples */
    int64_t K, rows, rest;    /* reduction by columns: full rows in each outer place, samples left over */
    int64_t tile_rows, tiles; /* of each channel */
    int64_t group, groups;    /* channels reduced together, and how many such groups there are */
    int fused;                /* the map of a group follows its reduction, while it is in the core's cache, */
    int64_t stride;           /* in tasks of so many channels, */
    int beside;               /* and side by side with the reduction of the next group */
    int64_t period;           /* map by columns: values of a table of constants */
    int64_t chunk_samples, chunk_channels, chunk_cols, chunks; /* the tasks of a map in the order of memory, how large and how many */
    int map_only;                                              /* nothing to add up: inference, or dx alone through frozen statistics */

    double *sums;       /* [tiles][2][C] */
    char *constants[5]; /* [C] each: center, scale, shift, slope, offset */
    char *tables[5];    /* the same, repeated up to `period` */
    char *slots;        /* one scratch area per thread */
    int64_t slot_bytes, slot_columns;
} fbn_plan;

enum { FBN_CENTER, FBN_SCALE, FBN_SHIFT, FBN_SLOPE, FBN_OFFSET };

/* Elements of a tile by planes: a plane longer than this is visited in parts. */
enum { FBN_PLANE_TILE = 16384 };

/* Plans a job and lays its scratch out from `work`, which may be NULL; returns the bytes of scratch. */
int64_t fbn_plan_job(fbn_plan *plan, const fbn_job *job, void *work);

/* Every NaN becomes the one that bfloat16 can hold: rounding the bits of others would overflow into the sign. */
static inline float fbn_constant_f32(double value) {
    return value == value ? (float)value : (float)NAN;
}

#endif
