/* What the fast statistics start from, and what replaces them where float32 sums cannot hold a channel: see finish_stats in jobs.c. */
#include "wide.h"
#include "narrow.h"

#include <math.h>
#include <string.h>

enum { LANES = 8 };

/* Sums of d = x - shift and d*d of a few channels; lanes along S or, where channels lie side by side, a chain for each channel. */
#define SUMS(DT, T, WIDEN)                                                                                                                 \
    static void sums_##DT(double *sum, double *square, const double *shift, const fbn_job *job, int64_t first, int64_t channels) {         \
        const fbn_tensor t = job->x;                                                                                                       \
        const T *x = (const T *)t.data + first * t.c;                                                                                      \
        for (int64_t c = 0; c < channels; c++)                                                                                             \
            sum[c] = square[c] = 0;                                                                                                        \
        if (t.c == 1) {                                                                                                                    \
            for (int64_t n = 0; n < job->N; n++)                                                                                           \
                for (int64_t s = 0; s < job->S; s++) {                                                                                     \
                    const T *row = x + n * t.n + s * t.s;                                                                                  \
                    for (int64_t c = 0; c < channels; c++) {                                                                               \
                        const double d = WIDEN(row[c]) - shift[c];                                                                         \
                        sum[c] += d;                                                                                                       \
                        square[c] += d * d;                                                                                                \
                    }                                                                                                                      \
                }                                                                                                                          \
            return;                                                                                                                        \
        }                                                                                                                                  \
        for (int64_t c = 0; c < channels; c++) {                                                                                           \
            double sums[LANES] = {0}, squares[LANES] = {0};                                                                                \
            for (int64_t n = 0; n < job->N; n++) {                                                                                         \
                const T *row = x + c * t.c + n * t.n;                                                                                      \
                int64_t s = 0;                                                                                                             \
                for (; s + LANES <= job->S; s += LANES)                                                                                    \
                    for (int j = 0; j < LANES; j++) {                                                                                      \
                        const double d = WIDEN(row[(s + j) * t.s]) - shift[c];                                                             \
                        sums[j] += d;                                                                                                      \
                        squares[j] += d * d;                                                                                               \
                    }                                                                                                                      \
                for (; s < job->S; s++) {                                                                                                  \
                    const double d = WIDEN(row[s * t.s]) - shift[c];                                                                       \
                    sums[0] += d;                                                                                                          \
                    squares[0] += d * d;                                                                                                   \
                }                                                                                                                          \
            }                                                                                                                              \
            for (int j = 0; j < LANES; j++) {                                                                                              \
                sum[c] += sums[j];                                                                                                         \
                square[c] += squares[j];                                                                                                   \
            }                                                                                                                              \
        }                                                                                                                                  \
    }

/* The mean of the sample as the first value and the mean distance from it, which loses nothing of values that lie far from zero. Channels
 * that lie side by side are added up together, in the type CT. */
#define SAMPLE(DT, T, CT, WIDEN)                                                                                                           \
    static inline void sample_few_##DT(double *centre, const T *x, const fbn_sample *sample, int channels) {                               \
        CT sums[FBN_CHANNELS] = {0};                                                                                                       \
        for (int k = 1; k < sample->count; k++)                                                                                            \
            for (int c = 0; c < channels; c++)                                                                                             \
                sums[c] += (CT)WIDEN(x[sample->at[k] + c]) - (CT)WIDEN(x[sample->at[0] + c]);                                              \
        for (int c = 0; c < channels; c++)                                                                                                 \
            centre[c] = (double)WIDEN(x[sample->at[0] + c]) + (double)sums[c] / sample->count;                                             \
    }                                                                                                                                      \
    static void sample_##DT(double *centre, const T *x, const fbn_sample *sample, int64_t channels, int64_t stride) {                      \
        if (stride == 1 && channels == FBN_CHANNELS)                                                                                       \
            sample_few_##DT(centre, x, sample, FBN_CHANNELS);                                                                              \
        else                                                                                                                               \
            for (int64_t c = 0; c < channels; c++)                                                                                         \
                sample_few_##DT(centre + c, x + c * stride, sample, 1);                                                                    \
    }

/* Whether a value of a channel is not its first; channels that lie side by side together. */
#define DIFFER(DT, T)                                                                                                                      \
    static void differ_block_##DT(int *differs, const T *x, const fbn_job *job) {                                                          \
        T of_first[FBN_CHANNELS];                                                                                                          \
        int found[FBN_CHANNELS] = {0};                                                                                                     \
        memcpy(of_first, x, sizeof of_first);                                                                                              \
        for (int64_t n = 0; n < job->N; n++)                                                                                               \
            for (int64_t s = 0; s < job->S; s++)                                                                                           \
                for (int c = 0; c < FBN_CHANNELS; c++)                                                                                     \
                    found[c] |= x[n * job->x.n + s * job->x.s + c] != of_first[c];                                                         \
        memcpy(differs, found, sizeof found);                                                                                              \
    }                                                                                                                                      \
    static void differ_##DT(int *differs, const fbn_job *job, int64_t first, int64_t channels) {                                           \
        const fbn_tensor t = job->x;                                                                                                       \
        const T *x = (const T *)t.data + first * t.c;                                                                                      \
        if (t.c == 1 && channels == FBN_CHANNELS) {                                                                                        \
            differ_block_##DT(differs, x, job);                                                                                            \
            return;                                                                                                                        \
        }                                                                                                                                  \
        for (int64_t c = 0; c < channels; c++) {                                                                                           \
            differs[c] = 0;                                                                                                                \
            for (int64_t n = 0; n < job->N && !differs[c]; n++)                                                                            \
                for (int64_t s = 0; s < job->S; s++)                                                                                       \
                    differs[c] |= x[c * t.c + n * t.n + s * t.s] != x[c * t.c];                                                            \
        }                                                                                                                                  \
    }

#define ALL(DT, T, CT, WIDEN) SUMS(DT, T, WIDEN) SAMPLE(DT, T, CT, WIDEN) DIFFER(DT, T)
ALL(f32, float, float, )
ALL(f64, double, double, )
ALL(f16, uint16_t, double, widen_f16)
ALL(bf16, uint16_t, double, widen_bf16)

fbn_sample fbn_sample_of(const fbn_job *job) {
    const int64_t n = job->N * job->S;
    fbn_sample sample = {.count = n < FBN_SAMPLES ? (int)n : FBN_SAMPLES};
    for (int k = 0; k < sample.count; k++) {
        /* One value in each sixteenth, at the multiples of the golden ratio: places that are multiples of a fraction would all lie in one
         * column of an image, perhaps at its border, where a padded convolution gives other values. */
        const double place = k * 0.6180339887498949;
        const int64_t start = k * n / sample.count, q = start + (int64_t)((place - (int)place) * (double)(n / sample.count));
        sample.at[k] = q / job->S * job->x.n + q % job->S * job->x.s;
    }
    return sample;
}

void fbn_sample_mean(double *centre, const fbn_job *job, const fbn_sample *sample, int64_t first, int64_t channels) {
    const fbn_tensor x = job->x;
    switch (job->dtype) {
    case FBN_FLOAT32:
        sample_f32(centre, (const float *)x.data + first * x.c, sample, channels, x.c);
        break;
    case FBN_FLOAT64:
        sample_f64(centre, (const double *)x.data + first * x.c, sample, channels, x.c);
        break;
    case FBN_FLOAT16:
        sample_f16(centre, (const uint16_t *)x.data + first * x.c, sample, channels, x.c);
        break;
    case FBN_BFLOAT16:
        sample_bf16(centre, (const uint16_t *)x.data + first * x.c, sample, channels, x.c);
        break;
    }
    for (int64_t c = 0; c < channels; c++)
        centre[c] = isfinite(centre[c]) ? centre[c] : 0;
}

static void sums_of(double *sum, double *square, const double *shift, const fbn_job *job, int64_t first, int64_t channels) {
    switch (job->dtype) {
    case FBN_FLOAT32:
        sums_f32(sum, square, shift, job, first, channels);
        break;
    case FBN_FLOAT64:
        sums_f64(sum, square, shift, job, first, channels);
        break;
    case FBN_FLOAT16:
        sums_f16(sum, square, shift, job, first, channels);
        break;
    case FBN_BFLOAT16:
        sums_bf16(sum, square, shift, job, first, channels);
        break;
    }
}

void fbn_differ(int *differs, const fbn_job *job, int64_t first, int64_t channels) {
    switch (job->dtype) {
    case FBN_FLOAT32:
        differ_f32(differs, job, first, channels);
        break;
    case FBN_FLOAT64:
        differ_f64(differs, job, first, channels);
        break;
    case FBN_FLOAT16:
        differ_f16(differs, job, first, channels);
        break;
    case FBN_BFLOAT16:
        differ_bf16(differs, job, first, channels);
        break;
    }
}

void fbn_wide_stats(double *mean, double *m2, const fbn_job *job, const fbn_sample *sample, int64_t first, int64_t channels) {
    const double n = (double)job->N * (double)job->S;
    double sum[FBN_CHANNELS];
    fbn_sample_mean(mean, job, sample, first, channels);
    sums_of(sum, m2, mean, job, first, channels);
    for (int64_t c = 0; c < channels; c++)
        mean[c] += sum[c] / n;
    sums_of(sum, m2, mean, job, first, channels);
    for (int64_t c = 0; c < channels; c++)
        m2[c] -= sum[c] * sum[c] / n;
}
