/* How one job is cut into pieces. Private to src_c. */
#ifndef FASTBN_PLAN_H
#define FASTBN_PLAN_H

#include "kernels.h"

/* Two ways to walk a tensor.
 *
 * By planes (layout ncs): a channel's rows are its planes of S elements. Tile t of a channel is a run of planes or a part of one.
 * By columns (layout nsc): a row holds K samples of C channels of `span` elements, each column of it in a sum of its own: channels last
 * (span 1), and channels first with planes too small to visit one by one (span S). Tile t is a run of rows; the samples that do not fill a
 * row follow as a last tile of `rest` columns.
 *
 * What decides the order of additions, the tiles, depends on shape and layout only; how columns are shared out may depend on the machine.
 */
typedef struct {
    const fbn_job *job;
    const fbn_kernels *table;
    fbn_layout layout;
    int64_t bytes, constant_bytes; /* of an element, of a constant */
    int64_t span, K, outer, rows, rest;
    int64_t joined;                      /* rows that a map may take as one */
    int64_t tile_rows, tile_cols, tiles; /* by planes: tiles per channel */
    int64_t group, groups;               /* channels that are worked on together, and how many such groups there are */
    int map_only;                        /* nothing to add up: inference, or dx alone through frozen statistics */
    int64_t sample_group;                /* where not 0, maps go in the order of memory: so many channels of one sample at a time */
    int fused;                           /* the second sweep of a group follows its first, while it is in the core's cache */
    int threads, stream;
    double *sums;       /* [tiles][C][2] */
    char *constants[5]; /* [C] each: center, scale, shift, slope, offset */
    char *slots;        /* one scratch area per thread */
    int64_t slot_bytes;
} fbn_plan;

enum { FBN_CENTER, FBN_SCALE, FBN_SHIFT, FBN_SLOPE, FBN_OFFSET };

/* Plans a job and lays its scratch out from `work`, which may be NULL; returns the bytes of scratch. */
int64_t fbn_plan_job(fbn_plan *plan, const fbn_job *job, void *work);

static inline double fbn_constant(const fbn_plan *plan, int which, int64_t c) {
    const char *values = plan->constants[which];
    return plan->constant_bytes == 8 ? ((const double *)values)[c] : (double)((const float *)values)[c];
}

static inline void fbn_set_constant(const fbn_plan *plan, int which, int64_t c, double value) {
    char *values = plan->constants[which];
    if (plan->constant_bytes == 8)
        ((double *)values)[c] = value;
    else
        ((float *)values)[c] = (float)value;
}

#endif
