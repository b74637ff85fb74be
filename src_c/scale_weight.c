/* A per-channel scale into weights: one pass, the product in float64, one rounding. */
#include "debug.h"
#include "dtypes.h"

#include <math.h>
#include <stddef.h>

static inline int is_zero_f32(float value) {
    return value == 0;
}
static inline int is_zero_f64(double value) {
    return value == 0;
}
static inline int is_zero_f16(uint16_t bits) {
    return (bits & 0x7fff) == 0;
}
static inline int is_zero_bf16(uint16_t bits) {
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

/* A row of n elements that share a scale (STEP 0) or have one each (STEP 1). The counts stay 32 bits wide inside a block, so that the loop
 * vectorizes; docs/numerics.md: tiles and tasks. */
enum { COUNTED_BLOCK = 4096 };
#define SCALE_ROW(NAME, name, T, STEP)                                                                                                     \
    static void NAME(T *out, fbn_scale_report *report, const T *weight, const double *scale, int64_t n) {                                  \
        for (int64_t start = 0; start < n; start += COUNTED_BLOCK) {                                                                       \
            const int64_t stop = n - start < COUNTED_BLOCK ? n : start + COUNTED_BLOCK;                                                    \
            int32_t nonfinite = 0, flushed = 0;                                                                                            \
            for (int64_t i = start; i < stop; i++) {                                                                                       \
                const T w = weight[i];                                                                                                     \
                const double s = scale[STEP * i];                                                                                          \
                const T r = f64_to_##name(name##_to_f64(w) * s);                                                                           \
                nonfinite += !is_finite_##name(r);                                                                                         \
                flushed += is_zero_##name(r) & !is_zero_##name(w) & (s != 0);                                                              \
                if (out != NULL)                                                                                                           \
                    out[i] = r;                                                                                                            \
            }                                                                                                                              \
            report->nonfinite += nonfinite;                                                                                                \
            report->flushed += flushed;                                                                                                    \
        }                                                                                                                                  \
    }

/* All weights: rows of S elements, or of C elements where S is 1. */
#define SCALE(DTYPE, name, T)                                                                                                              \
    SCALE_ROW(row_of_one_scale_##name, name, T, 0)                                                                                         \
    SCALE_ROW(row_of_scales_##name, name, T, 1)                                                                                            \
    static void scale_##name(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M,           \
                             int64_t C, int64_t S) {                                                                                       \
        for (int64_t g = 0; g < G; g++)                                                                                                    \
            for (int64_t m = 0; m < M; m++) {                                                                                              \
                const int64_t start = (g * M + m) * C * S;                                                                                 \
                T *const target = out ? (T *)out + start : NULL;                                                                           \
                const T *const source = (const T *)weight + start;                                                                         \
                if (S == 1) {                                                                                                              \
                    row_of_scales_##name(target, report, source, scale + g * C, C);                                                        \
                    continue;                                                                                                              \
                }                                                                                                                          \
                for (int64_t c = 0; c < C; c++)                                                                                            \
                    row_of_one_scale_##name(target ? target + c * S : NULL, report, source + c * S, scale + g * C + c, S);                 \
            }                                                                                                                              \
    }
FBN_EACH_DTYPE(SCALE)

typedef void scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                          int64_t S);
#define SCALE_OF_DTYPE(DTYPE, name, T) [FBN_##DTYPE] = scale_##name,
static scale_weight *const scale_of_dtype[FBN_DTYPES] = {FBN_EACH_DTYPE(SCALE_OF_DTYPE)};

void fbn_scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                      int64_t S, fbn_dtype dtype) {
    FBN_ASSERT((unsigned)dtype < FBN_DTYPES);
    FBN_ASSERT(G >= 0 && M >= 0 && C >= 0 && S >= 0);
    FBN_ASSERT(G * M * C * S == 0 || (weight != NULL && scale != NULL));
    *report = (fbn_scale_report){0, 0};
    scale_of_dtype[dtype](out, report, weight, scale, G, M, C, S);
}
