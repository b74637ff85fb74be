/* Arithmetic per channel, in float64. It runs over blocks, in loops that a compiler can vectorise: a batch of few samples has little else
 * to do. Private to src_c. */
#ifndef FASTBN_CHANNELS_H
#define FASTBN_CHANNELS_H

#include "plan.h"

/* The most channels of a block. */
enum { FBN_CHANNELS = 16 };

/* Values of a vector, `otherwise` where there is none; and back, where there is one. */
void fbn_gather(double *values, const fbn_vector *vector, int64_t first, int count, double otherwise);
void fbn_scatter(const fbn_vector *vector, int64_t first, int count, const double *values);

/* The same of a table of constants of the kernels. */
void fbn_constants(double *values, const fbn_plan *plan, int which, int64_t first, int count);
void fbn_set_constants(const fbn_plan *plan, int which, int64_t first, int count, const double *values);

/* 1/sqrt(var+eps), but 0 where there is nothing to divide by: a constant channel with eps 0 becomes its bias. */
void fbn_inverse_std(double *inverse, const double *var, int count, double eps);

/* center is mean rounded to what the kernels compute in; what the rounding lost returns through shift:
 * y = (x - center)*scale + (bias - lost*scale). */
void fbn_set_affine(const fbn_plan *plan, int64_t first, int count, const double *mean, const double *var);

#endif
