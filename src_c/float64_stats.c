/* Two-pass float64 statistics: the fallback where one float32 pass is not reliable. */
#include "float64_stats.h"
#include "channels.h"
#include "debug.h"

#include <math.h>
#include <string.h>

/* Sums that are added up side by side along S, so that a compiler vectorizes them; part of the order of additions. */
enum { LANES = 8 };

/* sum_d = sum(x - center) and sum_dd = sum((x - center)^2) of a few channels, in float64:
 *
 *   channels side by side (stride 1)   a chain of additions for each channel, in the order of n, then s
 *   otherwise                          lane j of 8 adds elements j, j+8, ... of every plane; those behind the last whole 8 go to lane 0;
 *                                      the lanes are added in their order
 *
 * The error of a sum is at most n * 2^-53 times the sum of the sizes of its terms. docs/numerics.md: two-pass statistics. */
#define SUMS(DTYPE, name, T)                                                                                                               \
    static void sums_side_by_side_##name(double *sum_d, double *sum_dd, const double *center, const T *x, const fbn_job *job,              \
                                         int64_t channels) {                                                                               \
        for (int64_t n = 0; n < job->N; n++)                                                                                               \
            for (int64_t s = 0; s < job->S; s++) {                                                                                         \
                const T *row = x + n * job->x.n + s * job->x.s;                                                                            \
                for (int64_t c = 0; c < channels; c++) {                                                                                   \
                    const double d = name##_to_f64(row[c]) - center[c];                                                                    \
                    sum_d[c] += d;                                                                                                         \
                    sum_dd[c] += d * d;                                                                                                    \
                }                                                                                                                          \
            }                                                                                                                              \
    }                                                                                                                                      \
    static void sums_of_channel_##name(double *sum_d, double *sum_dd, double center, const T *x, const fbn_job *job) {                     \
        const int64_t stride = job->x.s;                                                                                                   \
        double d_lanes[LANES] = {0}, dd_lanes[LANES] = {0};                                                                                \
        for (int64_t n = 0; n < job->N; n++) {                                                                                             \
            const T *row = x + n * job->x.n;                                                                                               \
            int64_t s = 0;                                                                                                                 \
            for (; s + LANES <= job->S; s += LANES)                                                                                        \
                for (int j = 0; j < LANES; j++) {                                                                                          \
                    const double d = name##_to_f64(row[(s + j) * stride]) - center;                                                        \
                    d_lanes[j] += d;                                                                                                       \
                    dd_lanes[j] += d * d;                                                                                                  \
                }                                                                                                                          \
            for (; s < job->S; s++) {                                                                                                      \
                const double d = name##_to_f64(row[s * stride]) - center;                                                                  \
                d_lanes[0] += d;                                                                                                           \
                dd_lanes[0] += d * d;                                                                                                      \
            }                                                                                                                              \
        }                                                                                                                                  \
        for (int j = 0; j < LANES; j++) {                                                                                                  \
            *sum_d += d_lanes[j];                                                                                                          \
            *sum_dd += dd_lanes[j];                                                                                                        \
        }                                                                                                                                  \
    }                                                                                                                                      \
    static void sums_##name(double *sum_d, double *sum_dd, const double *center, const fbn_job *job, int64_t first, int64_t channels) {    \
        const T *x = (const T *)job->x.data + first * job->x.c;                                                                            \
        for (int64_t c = 0; c < channels; c++)                                                                                             \
            sum_d[c] = sum_dd[c] = 0;                                                                                                      \
        if (job->x.c == 1)                                                                                                                 \
            sums_side_by_side_##name(sum_d, sum_dd, center, x, job, channels);                                                             \
        else                                                                                                                               \
            for (int64_t c = 0; c < channels; c++)                                                                                         \
                sums_of_channel_##name(sum_d + c, sum_dd + c, center[c], x + c * job->x.c, job);                                           \
    }

/* Whether a channel has a value that is not its first; a whole block of channels that lie side by side together. */
#define VARYING(DTYPE, name, T)                                                                                                            \
    static void varying_side_by_side_##name(int *varies, const T *x, const fbn_job *job) {                                                 \
        T first_values[FBN_CHANNEL_BLOCK];                                                                                                 \
        int found[FBN_CHANNEL_BLOCK] = {0};                                                                                                \
        memcpy(first_values, x, sizeof first_values);                                                                                      \
        for (int64_t n = 0; n < job->N; n++)                                                                                               \
            for (int64_t s = 0; s < job->S; s++)                                                                                           \
                for (int c = 0; c < FBN_CHANNEL_BLOCK; c++)                                                                                \
                    found[c] |= x[n * job->x.n + s * job->x.s + c] != first_values[c];                                                     \
        memcpy(varies, found, sizeof found);                                                                                               \
    }                                                                                                                                      \
    static void varying_##name(int *varies, const fbn_job *job, int64_t first, int64_t channels) {                                         \
        const fbn_tensor t = job->x;                                                                                                       \
        const T *x = (const T *)t.data + first * t.c;                                                                                      \
        if (t.c == 1 && channels == FBN_CHANNEL_BLOCK) {                                                                                   \
            varying_side_by_side_##name(varies, x, job);                                                                                   \
            return;                                                                                                                        \
        }                                                                                                                                  \
        for (int64_t c = 0; c < channels; c++) {                                                                                           \
            varies[c] = 0;                                                                                                                 \
            for (int64_t n = 0; n < job->N && !varies[c]; n++)                                                                             \
                for (int64_t s = 0; s < job->S; s++)                                                                                       \
                    varies[c] |= x[c * t.c + n * t.n + s * t.s] != x[c * t.c];                                                             \
        }                                                                                                                                  \
    }

FBN_EACH_DTYPE(SUMS)
FBN_EACH_DTYPE(VARYING)

typedef void sums(double *sum_d, double *sum_dd, const double *center, const fbn_job *job, int64_t first, int64_t channels);
typedef void varying(int *varies, const fbn_job *job, int64_t first, int64_t channels);
#define SUMS_OF_DTYPE(DTYPE, name, type) [FBN_##DTYPE] = sums_##name,
#define VARYING_OF_DTYPE(DTYPE, name, type) [FBN_##DTYPE] = varying_##name,
static sums *const sums_of_dtype[FBN_DTYPES] = {FBN_EACH_DTYPE(SUMS_OF_DTYPE)};
static varying *const varying_of_dtype[FBN_DTYPES] = {FBN_EACH_DTYPE(VARYING_OF_DTYPE)};

void fbn_find_varying(int *varies, const fbn_job *job, int64_t first, int64_t channels) {
    FBN_ASSERT(channels <= FBN_CHANNEL_BLOCK && first + channels <= job->C);
    varying_of_dtype[job->dtype](varies, job, first, channels);
}

/* With the pivot p of each channel and d = x - p:
 *
 *   first pass    mean = p + sum(d)/n
 *   second pass   m2 = sum((x - mean)^2) - sum(x - mean)^2/n
 *
 * The last term is 0 but for the rounding of the mean, which it corrects (Chan, Golub, LeVeque 1983). */
void fbn_float64_stats(double *mean, double *m2, const fbn_job *job, const fbn_pivot_sample *sample, int64_t first, int64_t channels) {
    const double n = (double)job->N * (double)job->S;
    double sum_d[FBN_CHANNEL_BLOCK];
    fbn_pivots(mean, job, sample, first, channels);
    sums_of_dtype[job->dtype](sum_d, m2, mean, job, first, channels);
    for (int64_t c = 0; c < channels; c++)
        mean[c] += sum_d[c] / n;
    sums_of_dtype[job->dtype](sum_d, m2, mean, job, first, channels);
    for (int64_t c = 0; c < channels; c++)
        m2[c] -= sum_d[c] * sum_d[c] / n;
}
