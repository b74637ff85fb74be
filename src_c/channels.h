/* Arithmetic per channel, in float64: from parameters and statistics to the constants of the kernels. It runs over blocks of channels, in
 * loops that a compiler vectorizes: a batch of few samples has little else to do. The functions are inlined into those of versions.h, so
 * that the vectors are as wide as the CPU has them. Private to src_c. */
#ifndef FASTBN_CHANNELS_H
#define FASTBN_CHANNELS_H

#include "debug.h"
#include "plan.h"
#include "versions.h"

#include <math.h>
#include <stddef.h>

/* The most channels of a block. docs/numerics.md: tiles and tasks. */
enum { FBN_CHANNEL_BLOCK = 64 };

/* Defines void name(context, first, channels): name_of, a FBN_BODY, for one block after another. */
#define FBN_IN_BLOCKS(name, type, context)                                                                                                 \
    FBN_BODY void name##_body(type context, int64_t first, int64_t channels) {                                                             \
        for (; channels > 0; first += FBN_CHANNEL_BLOCK, channels -= FBN_CHANNEL_BLOCK)                                                    \
            name##_of(context, first, channels < FBN_CHANNEL_BLOCK ? (int)channels : FBN_CHANNEL_BLOCK);                                   \
    }                                                                                                                                      \
    FBN_VERSIONS(name, (type context, int64_t first, int64_t channels), (context, first, channels))

/* A NaN becomes the one whose lower 16 bits are zero: the kernels round to bfloat16 by adding to the bits, and the lower bits of another
 * NaN could carry into its sign. docs/numerics.md: 16-bit storage. */
FBN_BODY float round_constant_f32(double value) {
    return value == value ? (float)value : (float)NAN;
}

/* `count` values of a vector from channel `first` on, or `missing` where there is no vector. Values side by side have a loop of their own,
 * which a compiler vectorizes. */
FBN_BODY void fbn_gather(double *values, const fbn_vector *vector, int64_t first, int count, double missing) {
    const int64_t step = vector->stride;
    if (vector->data == NULL)
        for (int i = 0; i < count; i++)
            values[i] = missing;
    else if (vector->is_f64)
        for (int i = 0; i < count; i++)
            values[i] = ((const double *)vector->data)[(first + i) * step];
    else if (step == 1)
        for (int i = 0; i < count; i++)
            values[i] = (double)((const float *)vector->data)[first + i];
    else
        for (int i = 0; i < count; i++)
            values[i] = (double)((const float *)vector->data)[(first + i) * step];
}

/* And back, where there is a vector. */
FBN_BODY void fbn_scatter(const fbn_vector *vector, int64_t first, int count, const double *values) {
    const int64_t step = vector->stride;
    if (vector->data == NULL)
        return;
    if (vector->is_f64)
        for (int i = 0; i < count; i++)
            ((double *)vector->data)[(first + i) * step] = values[i];
    else if (step == 1)
        for (int i = 0; i < count; i++)
            ((float *)vector->data)[first + i] = (float)values[i];
    else
        for (int i = 0; i < count; i++)
            ((float *)vector->data)[(first + i) * step] = (float)values[i];
}

/* The same for a table of constants of the kernels. */
FBN_BODY void fbn_get_constants(double *values, const fbn_plan *plan, fbn_constant which, int64_t first, int count) {
    const fbn_vector constants = {plan->scratch.constants[which], 1, plan->constant_bytes == 8};
    fbn_gather(values, &constants, first, count, 0);
}

FBN_BODY void fbn_set_constants(const fbn_plan *plan, fbn_constant which, int64_t first, int count, const double *values) {
    char *constants = plan->scratch.constants[which];
    if (plan->constant_bytes == 8)
        for (int i = 0; i < count; i++)
            ((double *)constants)[first + i] = values[i];
    else
        for (int i = 0; i < count; i++)
            ((float *)constants)[first + i] = round_constant_f32(values[i]);
}

/* invstd = 1/sqrt(var + eps), but 0 where var + eps is 0: a constant channel with eps 0 becomes its bias. */
FBN_BODY void fbn_invstd(double *invstd, const double *var, int count, double eps) {
    for (int i = 0; i < count; i++) {
        const double sum = var[i] + eps, root = 1 / sqrt(sum);
        invstd[i] = sum == 0 ? 0 : root;
    }
}

#define STORE_AFFINE(CT, ROUND)                                                                                                            \
    FBN_BODY void store_affine_##CT(const fbn_plan *plan, int64_t first, int count, const double *mean, const double *scale,               \
                                    const double *bias) {                                                                                  \
        CT *centers = (CT *)plan->scratch.constants[FBN_CENTER] + first, *scales = (CT *)plan->scratch.constants[FBN_SCALE] + first;       \
        CT *shifts = (CT *)plan->scratch.constants[FBN_SHIFT] + first;                                                                     \
        for (int i = 0; i < count; i++) {                                                                                                  \
            const CT center = ROUND(mean[i]);                                                                                              \
            centers[i] = center;                                                                                                           \
            scales[i] = ROUND(scale[i]);                                                                                                   \
            shifts[i] = ROUND(bias[i] - (mean[i] - (double)center) * scale[i]);                                                            \
        }                                                                                                                                  \
    }
STORE_AFFINE(float, round_constant_f32)
STORE_AFFINE(double, )

/* The constants of apply. The kernels compute in float32, so that the mean is split: center = mean rounded, mean_low = mean - center, and
 *
 *   y = (x - mean)*scale + bias = (x - center)*scale + shift,    shift = bias - mean_low*scale,    scale = weight*invstd
 *
 * x - center is exact where x is near the mean (Sterbenz), so that no mean/std is too large. docs/numerics.md: the split mean. */
FBN_BODY void fbn_set_affine(const fbn_plan *plan, int64_t first, int count, const double *mean, const double *var) {
    const fbn_job *job = plan->job;
    double scale[FBN_CHANNEL_BLOCK], bias[FBN_CHANNEL_BLOCK], invstd[FBN_CHANNEL_BLOCK];
    FBN_ASSERT(first >= 0 && count >= 0 && count <= FBN_CHANNEL_BLOCK && first + count <= job->C);
    fbn_gather(scale, &job->weight, first, count, 1);
    fbn_gather(bias, &job->bias, first, count, 0);
    fbn_invstd(invstd, var, count, job->eps);
    for (int i = 0; i < count; i++)
        scale[i] *= invstd[i];
    if (plan->constant_bytes == 8)
        store_affine_double(plan, first, count, mean, scale, bias);
    else
        store_affine_float(plan, first, count, mean, scale, bias);
}

#endif
