/* fastbn: batch normalization on CPUs, in C11 with libc, libm and pthreads only.
 *
 * Every function takes outputs first, then inputs, then sizes. Pointers are valid for the sizes given, sizes are not negative, `out` may be
 * the input itself but may not overlap it otherwise. No function allocates or fails; a build with -DFASTBN_DEBUG ends the process where a
 * precondition does not hold. */
#ifndef FASTBN_H
#define FASTBN_H

#include <stdint.h>

/* The storage types of a tensor. Their numbers are part of the API: the Python side has the same. */
typedef enum { FBN_FLOAT32, FBN_FLOAT64, FBN_FLOAT16, FBN_BFLOAT16 } fbn_dtype;

/* What the rounding of scaled weights did, as numbers of elements. */
typedef struct {
    int64_t nonfinite; /* results that are Inf or NaN */
    int64_t flushed;   /* zero results of a weight and a scale that are both not zero */
} fbn_scale_report;

/* out[g][m][c][s] = round(weight[g][m][c][s] * scale[g][c]): the product in float64, rounded once, to nearest even.
 *
 * The contiguous weights are read as (G, M, C, S): G groups, M rows before the axis of the scale, C channels on it and S elements behind
 * it. With out == NULL nothing is stored and only the report is made. docs/numerics.md: scaled weights. */
void fbn_scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                      int64_t S, fbn_dtype dtype);

/* What follows normalizes tensors x[N][C][S]: N samples, C channels, S spatial positions, with n = N*S values per channel:
 *
 *   mean = sum(x)/n    var = sum((x-mean)^2)/n    y = activation((x-mean)/sqrt(var+eps)*weight + bias + residual)
 *
 * A tensor may lie in memory in any order that has stride 1 along S (channels first, "ncs") or along C (channels last, "nsc"), the same for
 * all tensors of a job. The results are the same bits for any number of threads and for every ISA, except which NaN a NaN is. */

typedef enum { FBN_NO_ACTIVATION, FBN_RELU, FBN_LEAKY_RELU, FBN_RELU6 } fbn_activation; /* the leak is 0.01 */

/* Strides in elements; data is NULL for a tensor that the job does not have. */
typedef struct {
    char *data;
    int64_t n, c, s;
} fbn_tensor;

/* One value per channel, float32 or float64, stride in elements; data is NULL where the default holds. */
typedef struct {
    char *data;
    int64_t stride;
    int is_f64;
} fbn_vector;

/* How a job is run, set by fbn_choose. */
enum { FBN_MOST_WAYS = 3 };
typedef struct {
    int threads;  /* that work on it; 0: not chosen yet */
    int stream;   /* its map stores past the cache, and its reduction prefetches more */
    int way;      /* its number among those that are compared */
    uint64_t job; /* the name under which their times are kept, 0 where nothing is compared */
} fbn_choice;

/* One call. `out` is y, or dx in the backward pass; it may be x, dy or residual itself but may not overlap them otherwise. */
typedef struct {
    int64_t N, C, S;
    fbn_dtype dtype;
    fbn_activation activation;
    int frozen;  /* backward through statistics that do not depend on x: dx = dy*scale */
    int threads; /* the most that may work on it, 1 to fbn_num_threads() */
    int on_team; /* it may run on the team of fbn_use_team */
    double eps;
    fbn_tensor out, dresidual, dy, x, residual;
    fbn_vector dweight, dbias, weight, bias, mean, var;
    double *batch_mean, *batch_m2; /* C values each: written by fbn_train and fbn_stats, read by fbn_backward; m2 = n*var */
    int64_t count; /* backward: the values per channel that batch_m2 is the sum of, n unless the statistics come from elsewhere */
    double *sums;  /* sum_dy of C channels, then their sum_dy_xmu: written by fbn_backward_sums, read by fbn_backward_input */
    fbn_choice choice;
} fbn_job;

/* The first channel whose var + eps is not positive, so that 1/sqrt(var + eps) does not exist, or -1. NaN is let through. */
int64_t fbn_first_without_root(const fbn_vector *var, int64_t C, double eps);

/* Chooses how a job is run: how many threads work on it and how it stores. Where that depends on the machine, the ways are tried in the
 * first calls of such a job and the fastest is kept. Without it, threads and stores follow from the size alone. */
void fbn_choose(fbn_job *job);

/* Bytes of scratch that the functions below need for this job, after fbn_choose where that is called; they allocate nothing themselves. */
int64_t fbn_work_bytes(const fbn_job *job);

/* How a job is run here: what no result depends on. */
typedef struct {
    int threads; /* that work on it, */
    int streams; /* its map stores past the cache, and its reduction prefetches more */
    int ways;    /* that are compared by the time of calls, 1 where nothing is; */
    int way_threads[FBN_MOST_WAYS], way_streams[FBN_MOST_WAYS];
    int64_t way_nanoseconds[FBN_MOST_WAYS]; /* of the calls so far, 0 before */
    int reduces_by_columns;                 /* sums of columns side by side, instead of channel by channel */
    int maps_by_columns;
    int fused;                      /* some channels are mapped as soon as they are reduced, in the core's cache */
    int64_t bytes;                  /* of all tensors that it reads or writes, */
    int64_t most_bytes;             /* above which it streams */
    int64_t core_cache, last_cache; /* bytes, read from the system or guessed */
} fbn_description;
void fbn_describe(fbn_description *description, const fbn_job *job);

/* Inference: reads mean and var. */
void fbn_infer(const fbn_job *job, void *work);
/* Training forward: writes the batch statistics; mean and var, where given, are the running ones and move by momentum. */
void fbn_train(const fbn_job *job, double momentum, int unbiased, void *work);
/* The batch statistics alone. */
void fbn_stats(const fbn_job *job, void *work);
/* dx, and dweight and dbias where they are given. */
void fbn_backward(const fbn_job *job, void *work);
/* The same in two halves, between which several processes may add up their sums: first the sums, dweight and dbias of these values alone,
 * then dx from the sums over all `count` values of batch_mean and batch_m2. */
void fbn_backward_sums(const fbn_job *job, void *work);
void fbn_backward_input(const fbn_job *job, void *work);

/* The ISAs this build and this CPU have, the best first; NULL behind the last. */
const char *fbn_isa_name(int index);
/* Selects an ISA for all calls that follow, or reports 0 when there is none of that name. AVX-512 leaves some short rows to
 * AVX2. docs/numerics.md: short rows apart. */
int fbn_use_isa(const char *name);
/* The ISA in use. */
const char *fbn_isa(void);
/* The name of the kernel in use, in the order (op, layout, dtype); 0 behind the last. */
int fbn_kernel_name(int index, char *name, int size);

/* The most threads a call uses; at least 1. The first call reads FASTBN_NUM_THREADS, the affinity mask and the cgroup quota. */
int fbn_num_threads(void);
void fbn_set_num_threads(int threads);

/* Runs member(argument) on the caller and on other threads, which all have returned when it does: GOMP_parallel of the OpenMP libraries,
 * which takes `threads` = 0 for as many as the library wants. */
typedef void fbn_team(void (*member)(void *), void *argument, unsigned threads, unsigned flags);
/* The number of a member, from 0 on: omp_get_thread_num. */
typedef int fbn_member_number(void);
/* Has jobs `on_team` run on the threads of another library instead of the pool's own: they would be in each other's way. NULL for the
 * pool's own, which the child of a fork has. */
void fbn_use_team(fbn_team *team, fbn_member_number *number);

/* Microseconds for which threads look for the next call before they sleep. */
int fbn_spin_microseconds(void);

#endif
