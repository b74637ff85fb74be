/* Folding a per-channel scale into weights: one pass, product in float64, one rounding. */
#include "fastbn.h"
#include "narrow.h"

#include <math.h>
#include <stddef.h>

static inline double widen_same_f32(float value) {
    return value;
}
static inline float narrow_same_f32(double value) {
    return (float)value;
}
static inline double same_f64(double value) {
    return value;
}
static inline int is_zero_f(double value) {
    return value == 0;
}
static inline int is_zero_h(uint16_t bits) {
    return (bits & 0x7fff) == 0;
}
static inline int is_finite_f32(float value) {
    return fabsf(value) <= 0x1.fffffep127f;
}
static inline int is_finite_f64(double value) {
    return fabs(value) <= 0x1.fffffffffffffp1023;
}
static inline int is_finite_f16(uint16_t bits) {
    return (bits & 0x7c00) != 0x7c00;
}
static inline int is_finite_bf16(uint16_t bits) {
    return (bits & 0x7f80) != 0x7f80;
}

/* One row: n elements that share a scale (STEP 0) or have one each (STEP 1). The counts stay 32 bits wide inside a block of at most
 * BLOCK elements, so that the loop vectorises. */
#define BLOCK 4096
#define ROW(NAME, T, STEP, WIDEN, NARROW, FINITE, ZERO)                                                                                    \
    static void NAME(T *out, fbn_scale_report *report, const T *weight, const double *scale, int64_t n) {                                  \
        for (int64_t start = 0; start < n; start += BLOCK) {                                                                               \
            const int64_t stop = n - start < BLOCK ? n : start + BLOCK;                                                                    \
            int32_t nonfinite = 0, flushed = 0;                                                                                            \
            for (int64_t i = start; i < stop; i++) {                                                                                       \
                const T w = weight[i];                                                                                                     \
                const double s = scale[STEP * i];                                                                                          \
                const T r = NARROW(WIDEN(w) * s);                                                                                          \
                nonfinite += !FINITE(r);                                                                                                   \
                flushed += ZERO(r) & !ZERO(w) & (s != 0);                                                                                  \
                if (out != NULL)                                                                                                           \
                    out[i] = r;                                                                                                            \
            }                                                                                                                              \
            report->nonfinite += nonfinite;                                                                                                \
            report->flushed += flushed;                                                                                                    \
        }                                                                                                                                  \
    }

/* The whole view: rows of S elements, or of C elements when nothing lies behind the channels. */
#define SCALE(DTYPE, T, WIDEN, NARROW, FINITE, ZERO)                                                                                       \
    ROW(row_shared_##DTYPE, T, 0, WIDEN, NARROW, FINITE, ZERO)                                                                             \
    ROW(row_each_##DTYPE, T, 1, WIDEN, NARROW, FINITE, ZERO)                                                                               \
    static void scale_##DTYPE(T *out, fbn_scale_report *report, const T *weight, const double *scale, int64_t G, int64_t M, int64_t C,     \
                              int64_t S) {                                                                                                 \
        for (int64_t g = 0; g < G; g++)                                                                                                    \
            for (int64_t m = 0; m < M; m++) {                                                                                              \
                const int64_t at = (g * M + m) * C * S;                                                                                    \
                if (S == 1) {                                                                                                              \
                    row_each_##DTYPE(out ? out + at : NULL, report, weight + at, scale + g * C, C);                                        \
                    continue;                                                                                                              \
                }                                                                                                                          \
                for (int64_t c = 0; c < C; c++)                                                                                            \
                    row_shared_##DTYPE(out ? out + at + c * S : NULL, report, weight + at + c * S, scale + g * C + c, S);                  \
            }                                                                                                                              \
    }

SCALE(f32, float, widen_same_f32, narrow_same_f32, is_finite_f32, is_zero_f)
SCALE(f64, double, same_f64, same_f64, is_finite_f64, is_zero_f)
SCALE(f16, uint16_t, widen_f16, narrow_f16, is_finite_f16, is_zero_h)
SCALE(bf16, uint16_t, widen_bf16, narrow_bf16, is_finite_bf16, is_zero_h)

void fbn_scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                      int64_t S, fbn_dtype dtype) {
    *report = (fbn_scale_report){0, 0};
    switch (dtype) {
    case FBN_FLOAT32:
        scale_f32(out, report, weight, scale, G, M, C, S);
        break;
    case FBN_FLOAT64:
        scale_f64(out, report, weight, scale, G, M, C, S);
        break;
    case FBN_FLOAT16:
        scale_f16(out, report, weight, scale, G, M, C, S);
        break;
    case FBN_BFLOAT16:
        scale_bf16(out, report, weight, scale, G, M, C, S);
        break;
    }
}
