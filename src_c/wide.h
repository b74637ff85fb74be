/* Statistics that do not hurry. Private to src_c. */
#ifndef FASTBN_WIDE_H
#define FASTBN_WIDE_H

#include "channels.h"

/* Where a channel is sampled: the offsets, in elements, of up to 16 values spread over it. */
enum { FBN_SAMPLES = 16 };
typedef struct {
    int count;
    int64_t at[FBN_SAMPLES];
} fbn_sample;
fbn_sample fbn_sample_of(const fbn_job *job);

/* centre[c] = the mean of the sample of channel first + c, or 0 where that is not finite, for c below channels. */
void fbn_sample_mean(double *centre, const fbn_job *job, const fbn_sample *sample, int64_t first, int64_t channels);

/* Mean and sum of squared distances to it of channels first + c, in two passes of float64; at most FBN_CHANNELS channels. */
void fbn_wide_stats(double *mean, double *m2, const fbn_job *job, const fbn_sample *sample, int64_t first, int64_t channels);

/* Whether a channel has a value other than its first; -0 and 0 may count as two. */
void fbn_differ(int *differs, const fbn_job *job, int64_t first, int64_t channels);

#endif
