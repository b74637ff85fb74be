/* From parameters and statistics to the constants of the kernels. */
#include "channels.h"

#include <math.h>
#include <stddef.h>

/* Values side by side get a loop of their own, which a compiler can vectorise. */
void fbn_gather(double *values, const fbn_vector *vector, int64_t first, int count, double otherwise) {
    const int64_t step = vector->stride;
    if (vector->data == NULL)
        for (int i = 0; i < count; i++)
            values[i] = otherwise;
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

void fbn_scatter(const fbn_vector *vector, int64_t first, int count, const double *values) {
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

void fbn_constants(double *values, const fbn_plan *plan, int which, int64_t first, int count) {
    const fbn_vector constants = {plan->constants[which], 1, plan->constant_bytes == 8};
    fbn_gather(values, &constants, first, count, 0);
}

void fbn_set_constants(const fbn_plan *plan, int which, int64_t first, int count, const double *values) {
    char *constants = plan->constants[which];
    if (plan->constant_bytes == 8)
        for (int i = 0; i < count; i++)
            ((double *)constants)[first + i] = values[i];
    else
        for (int i = 0; i < count; i++)
            ((float *)constants)[first + i] = fbn_constant_f32(values[i]);
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
