/* What a kernel is given, and the table of all of them. Private to src_c. */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include "fastbn.h"

/* The sums of a reduction start in float32 (float64 for float64 data) and move to float64 sums every FBN_BLOCK rows. */
#define FBN_BLOCK 16

/* A piece of a tensor: rows of `cols` contiguous elements, `stride` elements apart.
 *
 * In layout ncs a row is of one channel and finds its constants `constant_step` values behind those of the row before; a reduction is of
 * one channel. In layout nsc each column has its own channel and each constant is an array of `cols`. The constants are float32, float64
 * for float64 data:
 *
 *   z = (x - center) * scale + shift + residual     with a rounding after each step
 *   stats        sums of d and d*d,  d = x - center
 *   apply        out = activation(z)
 *   grad_reduce  sums of g and g*d,  g = dy where the activation passed z, so that no mask is stored
 *   grad_input   out = scale*g + slope*d + offset, or scale*g alone when frozen; dresidual = g
 *
 * `sums` are 2 values in ncs and 2*cols in nsc, first moments first; they are set, not added to. */
typedef struct {
    int64_t rows, cols;
    void *out, *dresidual;
    double *sums;
    const void *dy, *x, *residual;
    int64_t out_stride, dresidual_stride, dy_stride, x_stride, residual_stride;
    const void *center, *scale, *shift, *slope, *offset;
    int64_t constant_step;
    fbn_activation activation;
    int frozen, stream;
} fbn_piece;

typedef void fbn_kernel(const fbn_piece *piece);

typedef enum { FBN_STATS, FBN_APPLY, FBN_GRAD_REDUCE, FBN_GRAD_INPUT, FBN_OPS } fbn_op;
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
