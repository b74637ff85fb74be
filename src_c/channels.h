/* Arithmetic per channel, in float64: from parameters and statistics to the constants of the kernels. It runs over blocks of channels, in
 * loops that a compiler vectorizes: a batch of few samples has little else to do. Private to src_c. */
#ifndef FASTBN_CHANNELS_H
#define FASTBN_CHANNELS_H

#include "plan.h"

/* The most channels of a block. docs/numerics.md: tiles and tasks. */
enum { FBN_CHANNEL_BLOCK = 16 };

/* `count` values of a vector from channel `first` on, or `missing` where there is no vector; and back, where there is one. */
void fbn_gather(double *values, const fbn_vector *vector, int64_t first, int count, double missing);
void fbn_scatter(const fbn_vector *vector, int64_t first, int count, const double *values);

/* The same for a table of constants of the kernels. */
void fbn_get_constants(double *values, const fbn_plan *plan, fbn_constant which, int64_t first, int count);
void fbn_set_constants(const fbn_plan *plan, fbn_constant which, int64_t first, int count, const double *values);

/* invstd = 1/sqrt(var + eps), but 0 where var + eps is 0: a constant channel with eps 0 becomes its bias. */
void fbn_invstd(double *invstd, const double *var, int count, double eps);

/* The constants of apply. The kernels compute in float32, so that the mean is split: center = mean rounded, mean_low = mean - center, and
 *
 *   y = (x - mean)*scale + bias = (x - center)*scale + shift,    shift = bias - mean_low*scale,    scale = weight*invstd
 *
 * x - center is exact where x is near the mean (Sterbenz), so that no mean/std is too large. docs/numerics.md: the split mean. */
void fbn_set_affine(const fbn_plan *plan, int64_t first, int count, const double *mean, const double *var);

#endif
