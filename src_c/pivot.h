/* The pivot of one-pass statistics: a guess of each channel's mean, subtracted from every value before it is squared. Private to src_c. */
#ifndef FASTBN_PIVOT_H
#define FASTBN_PIVOT_H

#include "fastbn.h"

/* Where a channel is sampled: the offsets, in elements, of up to 16 values spread over it. docs/numerics.md: the pivot. */
enum { FBN_PIVOT_SAMPLES = 16 };
typedef struct {
    int count;
    int64_t offset[FBN_PIVOT_SAMPLES];
} fbn_pivot_sample;
fbn_pivot_sample fbn_choose_sample(const fbn_job *job);

/* A pivot, or 0 where it is not finite: any pivot gives the right formula. */
static inline double fbn_finite_pivot(double pivot) {
    return pivot - pivot == 0 ? pivot : 0;
}

/* pivot[c] = the mean of the sample of channel first + c, or 0 where that is not finite, for c below channels. */
void fbn_pivots(double *pivot, const fbn_job *job, const fbn_pivot_sample *sample, int64_t first, int64_t channels);

#endif
