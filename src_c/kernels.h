/* What a kernel is given, and the table of all of them. Private to src_c. */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include "fastbn.h"

/* The sums of a reduction start in float32 (float64 for float64 data) and move to float64 sums every FBN_BLOCK rows. */
#define FBN_BLOCK 16

/* Values of a table of constants behind its last: what a vector may read past a column and past the first line of a row. */
#define FBN_SPARE 48

/* A piece of a tensor: rows of `cols` contiguous elements, `stride` elements apart, and constants in float32, float64 for float64 data:
 *
 *   z = (x - center) * scale + shift + residual     with a rounding after each step
 *   stats        sums of d and d*d,  d = x - center
 *   apply        out = activation(z)
 *   grad_reduce  sums of g and g*d,  g = dy where the activation passed z, so that no mask is stored
 *   grad_input   out = scale*g + slope*d + offset, or scale*g alone when frozen; dresidual = g
 *
 * In layout ncs a reduction is of one channel, and a map is of cols / period channels in planes side by side: no fewer than 16 elements
 * each, unless the piece has one plane only. In layout nsc a reduction has a channel and a pair of sums for every column, and the columns
 * of a map find their constants again after every `period`; each table of constants has FBN_SPARE readable values behind its last, which
 * in a map with more columns than the period are its first.
 *
 * `first` and `second` take the two sums; they are set, not added to. */
typedef struct {
    int64_t rows, cols, period;
    void *out, *dresidual;
    double *first, *second;
    const void *dy, *x, *residual;
    int64_t out_stride, dresidual_stride, dy_stride, x_stride, residual_stride;
    const void *center, *scale, *shift, *slope, *offset;
    int64_t ahead; /* elements from here to what is read next, for the cache; 0 where that is not known */
    fbn_activation activation;
    int frozen, stream;
} fbn_piece;

typedef void fbn_kernel(const fbn_piece *piece);

/* The last two, for planes only, take two pieces of one size: they reduce the first and map the second. */
typedef enum { FBN_STATS, FBN_APPLY, FBN_GRAD_REDUCE, FBN_GRAD_INPUT, FBN_STATS_APPLY, FBN_GRAD_BOTH, FBN_OPS } fbn_op;
typedef enum { FBN_NCS, FBN_NSC, FBN_LAYOUTS } fbn_layout;
enum { FBN_DTYPES = 4 };

/* One row of the dispatch table: every kernel of one ISA. */
typedef struct {
    const char *isa;
    fbn_kernel *kernel[FBN_OPS][FBN_LAYOUTS][FBN_DTYPES];
} fbn_kernels;

extern const fbn_kernels fbn_kernels_scalar, fbn_kernels_sse2, fbn_kernels_avx2, fbn_kernels_avx512, fbn_kernels_neon;

/* The row in use. */
const fbn_kernels *fbn_table(void);

#endif
