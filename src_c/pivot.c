/* The pivot of one-pass statistics. */
#include "pivot.h"
#include "channels.h"
#include "debug.h"

/* pivot = x0 + sum(x_k - x0)/count over the sampled values x_k: the differences are small where the values lie far from zero, so that the
 * sum loses nothing of them. Channels that lie side by side are added up together. CT is what is added up in. */
#define PIVOTS(name, T, CT)                                                                                                                \
    static inline void pivots_side_by_side_##name(double *pivot, const T *x, const fbn_pivot_sample *sample, int channels) {               \
        CT sums[FBN_CHANNEL_BLOCK] = {0};                                                                                                  \
        for (int k = 1; k < sample->count; k++)                                                                                            \
            for (int c = 0; c < channels; c++)                                                                                             \
                sums[c] += (CT)name##_to_f64(x[sample->offset[k] + c]) - (CT)name##_to_f64(x[sample->offset[0] + c]);                      \
        for (int c = 0; c < channels; c++)                                                                                                 \
            pivot[c] = name##_to_f64(x[sample->offset[0] + c]) + (double)sums[c] / sample->count;                                          \
    }                                                                                                                                      \
    static void pivots_##name(double *pivot, const fbn_job *job, const fbn_pivot_sample *sample, int64_t first, int64_t channels) {        \
        const T *x = (const T *)job->x.data + first * job->x.c;                                                                            \
        if (job->x.c == 1 && channels == FBN_CHANNEL_BLOCK)                                                                                \
            pivots_side_by_side_##name(pivot, x, sample, FBN_CHANNEL_BLOCK);                                                               \
        else                                                                                                                               \
            for (int64_t c = 0; c < channels; c++)                                                                                         \
                pivots_side_by_side_##name(pivot + c, x + c * job->x.c, sample, 1);                                                        \
    }
PIVOTS(f32, float, float)
PIVOTS(f64, double, double)
PIVOTS(f16, uint16_t, double)
PIVOTS(bf16, uint16_t, double)

typedef void pivots(double *pivot, const fbn_job *job, const fbn_pivot_sample *sample, int64_t first, int64_t channels);
#define PIVOTS_OF_DTYPE(DTYPE, name, type) [FBN_##DTYPE] = pivots_##name,
static pivots *const pivots_of_dtype[FBN_DTYPES] = {FBN_EACH_DTYPE(PIVOTS_OF_DTYPE)};

/* One value in each sixteenth of a channel, at the fractional part of k times the golden ratio. At the same place of every part they could
 * all lie in one column of an image, perhaps on its border, where a padded convolution gives other values. docs/numerics.md: the pivot. */
fbn_pivot_sample fbn_choose_sample(const fbn_job *job) {
    const int64_t n = job->N * job->S;
    FBN_ASSERT(n > 0);
    fbn_pivot_sample sample = {.count = n < FBN_PIVOT_SAMPLES ? (int)n : FBN_PIVOT_SAMPLES};
    for (int k = 0; k < sample.count; k++) {
        const double place = k * 0.6180339887498949;
        const int64_t start = k * n / sample.count, q = start + (int64_t)((place - (int)place) * (double)(n / sample.count));
        sample.offset[k] = q / job->S * job->x.n + q % job->S * job->x.s;
    }
    return sample;
}

void fbn_pivots(double *pivot, const fbn_job *job, const fbn_pivot_sample *sample, int64_t first, int64_t channels) {
    FBN_ASSERT(sample->count > 0 && channels <= FBN_CHANNEL_BLOCK && first + channels <= job->C);
    pivots_of_dtype[job->dtype](pivot, job, sample, first, channels);
    for (int64_t c = 0; c < channels; c++)
        pivot[c] = fbn_finite_pivot(pivot[c]);
}
