/* Statistics of the channels that one-pass float32 sums do not hold: see finish_stats in jobs.c. Private to src_c. */
#ifndef FASTBN_FLOAT64_STATS_H
#define FASTBN_FLOAT64_STATS_H

#include "pivot.h"

/* Mean and m2 = sum((x - mean)^2) of channels first + c, in two passes of float64; at most FBN_CHANNEL_BLOCK channels. */
void fbn_float64_stats(double *mean, double *m2, const fbn_job *job, const fbn_pivot_sample *sample, int64_t first, int64_t channels);

/* varies[c] = whether channel first + c has a value other than its first; at most FBN_CHANNEL_BLOCK channels. 16-bit values are compared by
 * their bits, so that 0 and -0 count as two. */
void fbn_find_varying(int *varies, const fbn_job *job, int64_t first, int64_t channels);

#endif
