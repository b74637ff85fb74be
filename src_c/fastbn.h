/* fastbn: batch normalization on CPUs, in C11 with libc and libm only.
 *
 * Every function takes outputs first, then inputs, then sizes. Pointers are valid for the sizes given, sizes are not negative, `out` may be
 * the input itself but may not overlap it otherwise. No function allocates or fails.
 */
#ifndef FASTBN_H
#define FASTBN_H

#include <stdint.h>

/* The storage types of a tensor, in the order that fastbn/affine.py names them. */
typedef enum { FBN_FLOAT32, FBN_FLOAT64, FBN_FLOAT16, FBN_BFLOAT16 } fbn_dtype;

/* What the rounding of scaled weights met, as numbers of elements. */
typedef struct {
    int64_t nonfinite; /* results that are Inf or NaN */
    int64_t flushed;   /* zero results of a weight and a scale that are both not zero */
} fbn_scale_report;

/* out[g][m][c][s] = round(weight[g][m][c][s] * scale[g][c]): the product in float64, rounded once, to nearest even.
 *
 * The four sizes are a view of the weights in which one axis takes the scale: G groups, M rows before that axis, C channels on it and
 * S elements behind it. With out == NULL nothing is stored and only the report is made. */
void fbn_scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                      int64_t S, fbn_dtype dtype);

#endif
