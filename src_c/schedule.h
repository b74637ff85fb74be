/* One job on its way: which kernel is given which piece, in which order. Private to src_c. */
#ifndef FASTBN_SCHEDULE_H
#define FASTBN_SCHEDULE_H

#include "pivot.h"
#include "plan.h"

/* A job is a reduction of every channel, arithmetic on its sums, and a map over its elements; any of them may be missing. */
typedef struct fbn_run fbn_run;
struct fbn_run {
    fbn_plan plan;
    fbn_pivot_sample sample; /* of statistics */
    int reduces, maps;
    fbn_op reduce_op, map_op;
    /* Turns the sums of all tiles of some channels into results and into the constants of the map. */
    void (*finish)(const fbn_run *run, int64_t first, int64_t channels);
    int independent; /* the map needs no sums: both visit a tile together */
    double momentum;
    int unbiased;
};

/* Visits every piece of the job, on as many threads as its plan allows. */
void fbn_execute(fbn_run *run);

#endif
