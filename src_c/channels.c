/* From parameters and statistics to the constants of the kernels. */
#include "channels.h"

#include <math.h>
#include <stddef.h>

double fbn_value_of(const fbn_vector *vector, int64_t c, double otherwise) {
    if (vector->data == NULL)
        return otherwise;
    return vector->is_f64 ? ((const double *)vector->data)[c * vector->stride] : (double)((const float *)vector->data)[c * vector->stride];
}

void fbn_set_value(const fbn_vector *vector, int64_t c, double value) {
    if (vector->data == NULL)
        return;
    if (vector->is_f64)
        ((double *)vector->data)[c * vector->stride] = value;
    else
        ((float *)vector->data)[c * vector->stride] = (float)value;
}

void fbn_gather(double *values, const fbn_vector *vector, int64_t first, int count, double otherwise) {
    const int64_t step = vector->stride;
    if (vector->data == NULL)
        for (int i = 0; i < count; i++)
            values[i] = otherwise;
    else if (vector->is_f64)
        for (int i = 0; i < count; i++)
            values[i] = ((const double *)vector->data)[(first + i) * step];
    else
        for (int i = 0; i < count; i++)
            values[i] = (double)((const float *)vector->data)[(first + i) * step];
}

void fbn_inverse_std(double *inverse, const double *var, int count, double eps) {
    for (int i = 0; i < count; i++) {
        const double sum = var[i] + eps, root = 1 / sqrt(sum);
        inverse[i] = sum == 0 ? 0 : root;
    }
}

#define STORE_AFFINE(CT, ROUND)                                                                                                            \
    static void store_affine_##CT(const fbn_plan *plan, int64_t first, int count, const double *mean, const double *scale,                 \
                                  const double *bias) {                                                                                    \
        CT *centers = (CT *)plan->constants[FBN_CENTER] + first, *scales = (CT *)plan->constants[FBN_SCALE] + first;                       \
        CT *shifts = (CT *)plan->constants[FBN_SHIFT] + first;                                                                             \
        for (int i = 0; i < count; i++) {                                                                                                  \
            const CT center = ROUND(mean[i]);                                                                                              \
            centers[i] = center;                                                                                                           \
            scales[i] = ROUND(scale[i]);                                                                                                   \
            shifts[i] = ROUND(bias[i] - (mean[i] - (double)center) * scale[i]);                                                            \
        }                                                                                                                                  \
    }
STORE_AFFINE(float, fbn_constant_f32)
STORE_AFFINE(double, )

void fbn_set_affine(const fbn_plan *plan, int64_t first, int count, const double *mean, const double *var) {
    const fbn_job *job = plan->job;
    double scale[FBN_CHANNELS], bias[FBN_CHANNELS], inverse[FBN_CHANNELS];
    fbn_gather(scale, &job->weight, first, count, 1);
    fbn_gather(bias, &job->bias, first, count, 0);
    fbn_inverse_std(inverse, var, count, job->eps);
    for (int i = 0; i < count; i++)
        scale[i] *= inverse[i];
    if (plan->constant_bytes == 8)
        store_affine_double(plan, first, count, mean, scale, bias);
    else
        store_affine_float(plan, first, count, mean, scale, bias);
}
