/* Hashes of every result of the kernels on made-up data, for check_bits.c and check_threads.c. */
#ifndef TESTS_BITS_H
#define TESTS_BITS_H

#include "fastbn.h"
#include "half.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t N, C, S;
    int channels_last;
} shape;

static _Thread_local uint64_t state = 88172645463325252u;

static double next(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int32_t)(state >> 32) / 1073741824.0 + 0.75;
}

static void fill(char *data, int64_t count, fbn_dtype dtype) {
    for (int64_t i = 0; i < count; i++) {
        const double value = next();
        const float single = (float)value;
        uint32_t bits;
        memcpy(&bits, &single, sizeof bits);
        if (dtype == FBN_FLOAT64)
            ((double *)data)[i] = value;
        else if (dtype == FBN_FLOAT32)
            ((float *)data)[i] = single;
        else /* any pattern of a moderate number will do */
            ((uint16_t *)data)[i] = dtype == FBN_BFLOAT16 ? (uint16_t)(bits >> 16) : (uint16_t)(0x3800 + (bits >> 13 & 0x7ff));
    }
}

static uint64_t hash(uint64_t seed, const void *data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++)
        seed = (seed ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return seed;
}

/* Channels that one pass of float32 statistics does not hold, beside ordinary ones: far from zero, constant, alternating about 0 with
 * squares that vanish, with squares that overflow float32, and with a first value that is an outlier. No result is NaN. */
static double hard_value(int64_t channel, int64_t i, fbn_dtype dtype) {
    switch (channel % 6) {
    case 1:
        return 1000 + next();
    case 2:
        return 0.1;
    case 3:
        return (i % 2 ? 1 : -1) * (dtype == FBN_FLOAT64 ? 0x1p-1000 : dtype == FBN_FLOAT16 ? 0x1p-24 : 0x1p-100);
    case 4:
        return next() * (dtype == FBN_FLOAT64 ? 1e150 : dtype == FBN_FLOAT16 ? 1e4 : 1e30);
    case 5:
        return i == 0 ? 1000 : next();
    default:
        return next();
    }
}

static void fill_hard(char *data, shape it, fbn_dtype dtype) {
    for (int64_t i = 0; i < it.N * it.C * it.S; i++) {
        const int64_t channel = it.channels_last ? i % it.C : i / it.S % it.C;
        const int64_t in_channel = it.channels_last ? i / it.C : i / (it.C * it.S) * it.S + i % it.S;
        const double value = hard_value(channel, in_channel, dtype);
        if (dtype == FBN_FLOAT64)
            ((double *)data)[i] = value;
        else if (dtype == FBN_FLOAT32)
            ((float *)data)[i] = (float)value;
        else
            ((uint16_t *)data)[i] = dtype == FBN_BFLOAT16 ? f64_to_bf16(value) : f64_to_f16(value);
    }
}

static void *room(int64_t bytes) {
    void *memory = calloc((size_t)bytes + 1, 1);
    if (memory == NULL)
        exit(2);
    return memory;
}

/* How the jobs of a thread are run: as their size says, as the times of their calls say, or with streaming stores; on the pool's threads or
 * on those of fbn_use_team. No result depends on it. */
typedef enum { BY_SIZE, BY_TIME, STREAMED, RUNS } run;
static _Thread_local run way = BY_SIZE;
static _Thread_local int on_team = 0;

/* Chooses how a job is run and returns its scratch. */
static void *prepare(fbn_job *job) {
    job->choice = (fbn_choice){0};
    job->on_team = on_team;
    if (way == BY_TIME)
        fbn_choose(job);
    else if (way == STREAMED) {
        job->choice.threads = job->threads;
        job->choice.stream = 1;
    }
    return room(fbn_work_bytes(job));
}

static uint64_t results(shape it, fbn_dtype dtype, fbn_activation activation, int threads) {
    const int64_t count = it.N * it.C * it.S, size = dtype == FBN_FLOAT64 ? 8 : dtype == FBN_FLOAT32 ? 4 : 2;
    char *arrays[5];
    uint64_t sum = 14695981039346656037u;
    state = 88172645463325252u;
    for (int i = 0; i < 5; i++) {
        arrays[i] = room(count * size);
        fill(arrays[i], count, dtype);
    }
    double *values = room(it.C * 8 * 8);
    fill((char *)values, it.C * 8, FBN_FLOAT64);
    fbn_vector vectors[6];
    for (int i = 0; i < 6; i++)
        vectors[i] = (fbn_vector){(char *)(values + i * it.C), 1, 1};
    const fbn_tensor t = it.channels_last ? (fbn_tensor){NULL, it.S * it.C, 1, it.C} : (fbn_tensor){NULL, it.C * it.S, it.S, 1};
    fbn_job job = {.N = it.N, .C = it.C, .S = it.S, .dtype = dtype, .activation = activation, .threads = threads, .eps = 1e-5};
    job.out = job.x = job.residual = t;
    job.out.data = arrays[0];
    job.x.data = arrays[1];
    job.residual.data = activation ? arrays[2] : NULL;
    job.weight = vectors[0];
    job.bias = vectors[1];
    job.mean = vectors[2];
    job.var = vectors[3];
    job.batch_mean = values + 6 * it.C;
    job.batch_m2 = values + 7 * it.C;
    job.count = it.N * it.S;
    void *work = prepare(&job);
    fbn_train(&job, 0.1, 1, work);
    free(work);
    sum = hash(hash(sum, arrays[0], count * size), values, it.C * 8 * 8);
    job.dy = job.dresidual = t;
    job.dy.data = arrays[3];
    job.dresidual.data = activation ? arrays[4] : NULL;
    job.dweight = vectors[4];
    job.dbias = vectors[5];
    for (job.frozen = 0; job.frozen < 2; job.frozen++) {
        work = prepare(&job);
        fbn_backward(&job, work);
        free(work);
        sum = hash(hash(sum, arrays[0], count * size), values, it.C * 8 * 8);
        sum = hash(sum, arrays[4], count * size);
    }
    for (int i = 0; i < 5; i++)
        free(arrays[i]);
    free(values);
    return sum;
}

/* The jobs that `results` leaves out, on hard data: statistics alone, the two halves of the backward pass, inference. */
static uint64_t hard_results(shape it, fbn_dtype dtype, int threads) {
    const int64_t count = it.N * it.C * it.S, size = dtype == FBN_FLOAT64 ? 8 : dtype == FBN_FLOAT32 ? 4 : 2;
    uint64_t sum = 14695981039346656037u;
    state = 88172645463325252u;
    char *x = room(count * size), *dy = room(count * size), *out = room(count * size);
    fill_hard(x, it, dtype);
    fill(dy, count, dtype);
    double *values = room(it.C * 8 * 6);
    fill((char *)values, it.C * 2, FBN_FLOAT64);
    const fbn_tensor t = it.channels_last ? (fbn_tensor){NULL, it.S * it.C, 1, it.C} : (fbn_tensor){NULL, it.C * it.S, it.S, 1};
    fbn_job job = {.N = it.N, .C = it.C, .S = it.S, .dtype = dtype, .activation = FBN_RELU, .threads = threads, .eps = 1e-5, .x = t};
    job.x.data = x;
    job.weight = (fbn_vector){(char *)values, 1, 1};
    job.bias = (fbn_vector){(char *)(values + it.C), 1, 1};
    job.batch_mean = values + 2 * it.C;
    job.batch_m2 = values + 3 * it.C;
    job.count = it.N * it.S;
    job.sums = values + 4 * it.C;
    void *work = prepare(&job);
    fbn_stats(&job, work);
    free(work);
    job.dy = t;
    job.dy.data = dy;
    work = prepare(&job);
    fbn_backward_sums(&job, work);
    free(work);
    job.out = t;
    job.out.data = out;
    work = prepare(&job);
    fbn_backward_input(&job, work);
    free(work);
    sum = hash(hash(sum, values, it.C * 8 * 6), out, count * size);
    job.dy.data = NULL;
    job.mean = (fbn_vector){(char *)job.batch_mean, 1, 1};
    job.var = (fbn_vector){(char *)job.batch_m2, 1, 1};
    job.batch_mean = NULL;
    work = prepare(&job);
    fbn_infer(&job, work);
    free(work);
    sum = hash(sum, out, count * size);
    free(x);
    free(dy);
    free(out);
    free(values);
    return sum;
}

static __attribute__((unused)) uint64_t scaled_weight(shape it, fbn_dtype dtype) {
    const int64_t count = it.N * it.C * it.S, size = dtype == FBN_FLOAT64 ? 8 : dtype == FBN_FLOAT32 ? 4 : 2;
    char *weight = room(count * size), *out = room(count * size);
    double *scale = room(it.C * 8);
    fbn_scale_report report;
    state = 88172645463325252u;
    fill_hard(weight, it, dtype);
    fill((char *)scale, it.C, FBN_FLOAT64);
    fbn_scale_weight(out, &report, weight, scale, 1, it.N, it.C, it.S, dtype);
    const uint64_t sum = hash(hash(14695981039346656037u, out, count * size), &report, sizeof report);
    free(weight);
    free(out);
    free(scale);
    return sum;
}

static const shape shapes[] = {{3, 5, 63, 0},  {2, 3, 20000, 0}, {20, 64, 49, 0}, {3, 23, 899, 0},
                               {7, 40, 17, 0}, {700, 3, 1, 1},   {60, 131, 1, 1}, {4, 70, 99, 1}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

#endif
