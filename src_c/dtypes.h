/* The storage types, once, and their conversions from and to float64 under one name each: f32_to_f64, f64_to_bf16, ... Private to src_c. */
#ifndef FASTBN_DTYPES_H
#define FASTBN_DTYPES_H

#include "fastbn.h"
#include "half.h"

/* X(DTYPE, name, type): FBN_<DTYPE> is its number, <name> its suffix in the names of functions, <type> what memory holds. */
#define FBN_EACH_DTYPE(X)                                                                                                                  \
    X(FLOAT32, f32, float)                                                                                                                 \
    X(FLOAT64, f64, double)                                                                                                                \
    X(FLOAT16, f16, uint16_t)                                                                                                              \
    X(BFLOAT16, bf16, uint16_t)

#define FBN_COUNT_DTYPE(DTYPE, name, type) +1
enum { FBN_DTYPES = 0 FBN_EACH_DTYPE(FBN_COUNT_DTYPE) };

static inline double f32_to_f64(float value) {
    return value;
}
static inline float f64_to_f32(double value) {
    return (float)value;
}
static inline double f64_to_f64(double value) {
    return value;
}

#endif
