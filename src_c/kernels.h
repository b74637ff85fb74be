/* What a kernel is given, the list of all kernels, and their table. Private to src_c. */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include "dtypes.h"

/* Rows after which a float32 sum is added to a float64 one. docs/numerics.md: sums in blocks. */
#define FBN_BLOCK_ROWS 16

/* Readable values behind the last of a table of constants. A vector that begins at the last column reads 15 more; docs/numerics.md: tiles
 * and tasks. */
#define FBN_TABLE_PADDING 48

/* Lanes of the widest vector of any ISA. */
#define FBN_MOST_LANES 16

/* Columns of a row whose sums stay in registers, at most; twice as many where a vector is a whole cache line. docs/numerics.md: tiles and
 * tasks. */
#define FBN_NARROW_ROW 128

/* Planes shorter than this are short: a reduction has fewer lanes for them. docs/numerics.md: sums of short planes. */
#define FBN_SHORT_PLANE 512

/* A piece of a tensor: `rows` rows of `cols` contiguous elements, `<tensor>_stride` elements apart. Constants are per channel, in the type
 * that is computed in: float64 for float64 data, float32 otherwise. With d = x - center, every step rounded:
 *
 *   pivot        sum = a value near the mean, from some of the values alone: the pivot of stats
 *   stats        sum = sum(d)    dot = sum(d*d)
 *   apply        out = activation(z),    z = d*scale + shift + residual
 *   grad_reduce  sum = sum(g)    dot = sum(g*d),    g = dy * activation'(z), recomputed from x, so that no mask is stored
 *   grad_input   out = scale*g + slope*d + offset, or scale*g alone when frozen;    dresidual = g
 *
 * `center` is the pivot in stats and the mean, rounded, elsewhere. `sum` and `dot` are set, not added to.
 *
 * Layout ncs: a piece is of cols / period channels, whose planes of `period` elements lie side by side; a reduction is of one channel
 * where its planes are not short.
 * Layout nsc: a reduction has one constant and one pair of sums for every column. The columns of a map find their constants again after
 * every `period`. Each table has FBN_TABLE_PADDING readable values behind its last; in a map with more columns than the period they are its
 * first. */
typedef struct {
    int64_t rows, cols, period;
    void *out, *dresidual;
    double *sum, *dot;
    const void *dy, *x, *residual;
    int64_t out_stride, dresidual_stride, dy_stride, x_stride, residual_stride;
    const void *center, *scale, *shift, *slope, *offset;
    const int64_t *row_offsets; /* pivot by columns: elements from x to each row */
    /* Elements from what is read to what is prefetched, or 0; by columns: so many at least. A reduction by planes has another number for
     * dy, and prefetches nothing in the last `rows_ahead` rows. docs/numerics.md: prefetch. */
    int64_t prefetch, dy_prefetch, rows_ahead;
    fbn_activation activation;
    int frozen;
    int short_planes; /* layout ncs: the planes of the job are short */
    int short_rows;   /* layout nsc: the rows of the job are short and lie apart. docs/numerics.md: short rows apart */
    int in_core;      /* the tensors of the job are in the core's cache */
    int outgrows;     /* what a map reads and writes, or a reduction reads, is more than the last cache keeps of it */
    int stream;       /* a map stores past the cache, a reduction prefetches more. docs/numerics.md: streaming stores; prefetch */
} fbn_piece;

typedef void fbn_kernel(const fbn_piece *piece);

/* The list of kernels: X(OP, op, layouts, activations). The enum, the functions, the table of each ISA and the names follow from it.
 *   layouts      PLANES (ncs alone) or BOTH
 *   activations  EACH (one loop compiled for each activation) or NONE (the activation does not matter)
 * The last two take two pieces of one size: they reduce the first and map the second. */
#define FBN_EACH_OP(X)                                                                                                                     \
    X(PIVOT, pivot, BOTH, NONE)                                                                                                            \
    X(STATS, stats, BOTH, NONE)                                                                                                            \
    X(APPLY, apply, BOTH, EACH)                                                                                                            \
    X(GRAD_REDUCE, grad_reduce, BOTH, FEW)                                                                                                 \
    X(GRAD_INPUT, grad_input, BOTH, EACH)                                                                                                  \
    X(STATS_APPLY, stats_apply, PLANES, EACH)                                                                                              \
    X(GRAD_BOTH, grad_both, PLANES, EACH)

#define FBN_ENUMERATE_OP(OP, op, layouts, activations) FBN_##OP,
typedef enum { FBN_EACH_OP(FBN_ENUMERATE_OP) FBN_OPS } fbn_op;
typedef enum { FBN_NCS, FBN_NSC, FBN_LAYOUTS } fbn_layout;

/* Every kernel of one ISA; NULL where an op has no kernel for a layout. */
typedef struct {
    const char *isa;
    int vector_bytes;
    fbn_kernel *kernel[FBN_OPS][FBN_LAYOUTS][FBN_DTYPES];
} fbn_kernels;

extern const fbn_kernels fbn_kernels_scalar, fbn_kernels_sse2, fbn_kernels_avx2, fbn_kernels_avx512, fbn_kernels_neon;

/* The kernels of the ISA in use. */
const fbn_kernels *fbn_table(void);
/* Those for short rows that lie apart. docs/numerics.md: short rows apart. */
const fbn_kernels *fbn_table_of_short_rows(void);

#endif
