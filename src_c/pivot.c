/* The pivot of one-pass statistics. */
#include "pivot.h"
#include "channels.h"
#include "debug.h"

/* pivot = x0 + sum(x_k - x0)/count over the sampled values x_k: the differences are small where the values lie far from zero, so that the
 * sum loses nothing of them. CT is what is added up in. */
#define PIVOT(name, T, CT)                                                                                                                 \
    static double pivot_##name(const fbn_tensor *tensor, int64_t c, const fbn_pivot_sample *sample) {                                      \
        const T *x = (const T *)tensor->data + c * tensor->c;                                                                              \
        const double x0 = name##_to_f64(x[sample->offset[0]]);                                                                             \
        CT sum = 0;                                                                                                                        \
        for (int k = 1; k < sample->count; k++)                                                                                            \
            sum += (CT)name##_to_f64(x[sample->offset[k]]) - (CT)x0;                                                                       \
        return x0 + (double)sum / sample->count;                                                                                           \
    }
PIVOT(f32, float, float)
PIVOT(f64, double, double)
PIVOT(f16, uint16_t, double)
PIVOT(bf16, uint16_t, double)

typedef double pivot_of_channel(const fbn_tensor *x, int64_t c, const fbn_pivot_sample *sample);
#define PIVOT_OF_DTYPE(DTYPE, name, type) [FBN_##DTYPE] = pivot_##name,
static pivot_of_channel *const pivot_of_dtype[FBN_DTYPES] = {FBN_EACH_DTYPE(PIVOT_OF_DTYPE)};

/* A fifth of the values, but 16 at most: one in each part of a channel, at the fractional part of k times the golden ratio. At the same
 * place of every part they could all lie in one column of an image, perhaps on its border, where a padded convolution gives other values.
 * docs/numerics.md: the pivot. */
fbn_pivot_sample fbn_choose_sample(const fbn_job *job) {
    const int64_t n = job->N * job->S, fifth = n / 5 + (n % 5 > 0);
    FBN_ASSERT(n > 0);
    fbn_pivot_sample sample = {.count = fifth < FBN_PIVOT_SAMPLES ? (int)fifth : FBN_PIVOT_SAMPLES};
    for (int k = 0; k < sample.count; k++) {
        const double place = k * 0.6180339887498949;
        const int64_t start = k * n / sample.count, q = start + (int64_t)((place - (int)place) * (double)(n / sample.count));
        sample.offset[k] = q / job->S * job->x.n + q % job->S * job->x.s;
    }
    return sample;
}

void fbn_pivots(double *pivot, const fbn_job *job, const fbn_pivot_sample *sample, int64_t first, int64_t channels) {
    FBN_ASSERT(sample->count > 0 && first + channels <= job->C);
    for (int64_t c = 0; c < channels; c++)
        pivot[c] = fbn_finite_pivot(pivot_of_dtype[job->dtype](&job->x, first + c, sample));
}
