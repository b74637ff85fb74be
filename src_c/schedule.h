/* One job on its way. Private to src_c. */
#ifndef FASTBN_SCHEDULE_H
#define FASTBN_SCHEDULE_H

#include "plan.h"
#include "wide.h"

/* A job is a reduction of every channel, arithmetic on its sums, and a map over its elements; any of them may be missing. */
typedef struct fbn_run fbn_run;
struct fbn_run {
    fbn_plan plan;
    fbn_sample sample; /* where statistics look for a first guess of the mean */
    int reduces, maps;
    fbn_op reduction, map;
    void (*finish)(const fbn_run *run, int64_t first, int64_t channels);
    int independent; /* the map does not need the sums: both visit a tile together */
    double momentum;
    int unbiased;
};

/* Visits every piece of the job, on as many threads as its plan allows. */
void fbn_execute(fbn_run *run);

#endif
